"""Evading a detector that is trained here, on natural images against PGD's adversarial images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from orthattack import PGD, DetectorEvasion, alignment
from orthattack.eval.data.load import load_dataset
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.load import load_classifier
from orthattack.eval.models.preprocessing import Preprocessing
from tests.attacks.test_attacks import SIZE, Recorder, drawn, small_model

EPS = 8 / 255


class Detector(nn.Module):
    """A score of how much like PGD the fine structure of an image looks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(24, 24, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(24, 1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        fine = images - functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
        scores: Tensor = self.layers(20 * fine)
        return scores


def patches() -> Tensor:
    """(N, 3, 32, 32): pieces of the 20 ImageNet images in Foolbox's package, at two scales."""
    preprocessing = Preprocessing(224, 224)
    any_model = Classifier("any", nn.Identity(), preprocessing, None, 1000, "none")
    dataset = next(load_dataset("imagenet-samples", any_model).batches(20, preprocessing)).images
    pieces = [
        x.unfold(2, 32, step).unfold(3, 32, step).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 32, 32)
        for x, step in ((functional.avg_pool2d(dataset, 2), 26), (dataset, 96))
    ]
    return torch.cat(pieces).contiguous()


@pytest.fixture(scope="module")
def guarded() -> tuple[nn.Module, nn.Module, float, Tensor, Tensor]:
    """A classifier, a detector with its threshold, and images that the detector has not seen."""
    classifier = load_classifier("cifar10-standard")
    model = classifier.model
    (batch,) = load_dataset("cifar10-samples", classifier).batches(20, classifier.preprocessing)
    pieces = patches()
    clean = pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))[:120]]
    with torch.no_grad():
        labels = model(clean).argmax(1)
    generator = torch.Generator().manual_seed(0)
    attack = PGD(model, eps=EPS, steps=3, generator=generator)
    attacked = torch.cat([attack(x, y) for x, y in zip(clean.split(60), labels.split(60), strict=True)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        detector = Detector()
        optimizer = torch.optim.Adam(detector.parameters(), lr=5e-3)
        for _ in range(120):
            rows = torch.randint(len(clean), (16,))
            scores = detector(torch.cat([clean[rows], attacked[rows]])).squeeze(1)
            truth = torch.arange(32) >= 16
            loss = functional.binary_cross_entropy_with_logits(scores, truth.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    detector.eval()
    with torch.no_grad():
        threshold = float(detector(batch.images).max())  # no false alarm on the images to be attacked
    return model, detector, threshold, batch.images, batch.labels


def unseen(detector: nn.Module, threshold: float, images: Tensor) -> Tensor:
    with torch.no_grad():
        return detector(images).squeeze(1) <= threshold


def wrong(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1) != labels


def test_the_detector_sees_plain_pgd(guarded):
    """Else evading it would prove nothing."""
    model, detector, threshold, images, labels = guarded
    attacked = PGD(model, eps=EPS, steps=10, generator=torch.Generator().manual_seed(1))(images, labels)
    assert wrong(model, attacked, labels).all()
    assert unseen(detector, threshold, attacked).float().mean() <= 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "selective"},
        pytest.param({"mode": "orthogonal"}, marks=pytest.mark.slow),
        pytest.param({"mode": "orthogonal", "enforce": "gradient"}, marks=pytest.mark.slow),
        pytest.param({"mode": "orthogonal", "every": 2}, marks=pytest.mark.slow),
        pytest.param({"mode": "orthogonal", "scope": "image"}, marks=pytest.mark.slow),
        pytest.param({"mode": "orthogonal", "scope": "image", "directions": ["constant"]}, marks=pytest.mark.slow),
        {"mode": "orthogonal", "norm": "l2", "eps": 1.0, "scope": "image"},
    ],
    ids=str,
)
def test_evasion_reaches_what_plain_pgd_does_not(guarded, options):
    model, detector, threshold, images, labels = guarded
    options = {"eps": EPS, "steps": 30, **options}
    clean = images.clone()
    result = DetectorEvasion(model, detector, threshold, **options).run(images, labels)
    assert torch.equal(images, clean)
    found = result.adversarials
    assert torch.equal(result.success, wrong(model, found, labels) & unseen(detector, threshold, found))
    assert result.success.float().mean() >= 0.9
    assert (result.loss[result.success] >= 0).all()
    assert result.norm.max() <= options["eps"] * (1 + 1e-6)
    if "scope" in options:
        assert result.cosine.max() <= 1e-6


@pytest.mark.slow
def test_targets_are_reached_unseen(guarded):
    """Class 0 among them."""
    model, detector, threshold, images, labels = guarded
    targets = torch.where(labels == 0, 3, 0)
    attack = DetectorEvasion(model, detector, threshold, eps=16 / 255, steps=40, targeted=True, early_stop=True)
    result = attack.run(images, targets)
    with torch.no_grad():
        hit = model(result.adversarials).argmax(1) == targets
    assert torch.equal(result.success, hit & unseen(detector, threshold, result.adversarials))
    assert result.success.float().mean() >= 0.8


# --- the step, on models whose gradients are known --------------------------------------------------------------------


def linear_detector(seed: int = 7) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 1)).eval()


@pytest.mark.parametrize("scope", [None, "image", "channel"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_each_step_is_orthogonal_to_the_other_losss_gradient(norm, scope):
    """Exactly so for L-infinity, in spite of signs and clips; for L2 as far as no bound cuts it."""
    model, (images, labels) = Recorder(small_model().double()), drawn(n=4)
    images = 0.2 + 0.6 * images.double() if norm == "l2" else images.double()
    detector = linear_detector().double()
    eps = 0.05 if norm == "linf" else 0.5
    options = {"norm": norm, "eps": eps, "steps": 4, "scope": scope, "alpha": eps / 8}
    # Nothing is ever detected or everything: each sample climbs the loss that its success says.
    DetectorEvasion(model, detector, 1e6, **options)(images, labels)
    hidden = -detector[1].weight[0].detach().view(1, *SIZE).expand_as(images)
    for before, after in zip(model.seen, model.seen[1:], strict=False):
        fooling = wrong(model.model, before, labels)
        leaf = before.clone().requires_grad_()
        logits = model.model(leaf)
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        (classified,) = torch.autograd.grad((others - logits.gather(1, labels[:, None])[:, 0]).sum(), leaf)
        other = torch.where(fooling.view(-1, 1, 1, 1), classified, hidden)
        own = torch.where(fooling.view(-1, 1, 1, 1), hidden, classified)
        step = after - before
        assert alignment(step, other).abs().max() <= (1e-9 if norm == "linf" else 1e-5)
        assert (alignment(step, own) > 0.05).all()
        if scope is not None:
            assert alignment(after - images, images, scope).abs().max() <= 1e-9


@pytest.mark.parametrize("mode", ["orthogonal", "selective"])
def test_a_detectors_gradient_that_is_nan_is_that_samples_alone(mode):
    model, (images, labels), inner = small_model(), drawn(n=3), linear_detector()

    def detector(x: Tensor) -> Tensor:  # of the first image the root has no slope
        return inner(x) + 0 * (x - images[:1]).square().sum((1, 2, 3), keepdim=True).sqrt().flatten(1)

    attack = DetectorEvasion(model, detector, 1e6, eps=0.05, steps=2, alpha=0.01, mode=mode, every=1)
    together, alone = attack(images, labels), attack(images[1:], labels[1:])
    assert torch.equal(together[1:], alone)


def test_which_loss_is_climbed_follows_success_or_the_count():
    images, labels = drawn(n=6)
    images = 0.3 + 0.4 * images
    model, detector = small_model(), linear_detector()
    weight = detector[1].weight[0].detach().view(1, *SIZE)
    for every in (None, 3):
        recorder = Recorder(model)
        attack = DetectorEvasion(recorder, detector, -1e6, eps=0.2, alpha=0.01, steps=6, mode="selective", every=every)
        attack(images, labels)
        for t, (before, after) in enumerate(zip(recorder.seen, recorder.seen[1:], strict=False)):
            hiding = wrong(model, before, labels) if every is None else torch.full((6,), t % 3 == 2)
            down = alignment(after - before, -weight.expand_as(images)) > 0.7
            moved = (after - before).flatten(1).norm(dim=1) > 1e-3
            assert (down[hiding & moved]).all()
            assert not down[~hiding & moved].any()


def test_the_last_iterate_counts_and_success_needs_both():
    """A detector that only the last step satisfies."""

    def model(x: Tensor) -> Tensor:  # always class 1
        brightness = x.mean((1, 2, 3))
        return torch.stack([1e-3 * brightness, torch.ones_like(brightness)], dim=1)

    def detector(x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))

    images, labels = torch.full((1, *SIZE), 0.5), torch.tensor([0])
    options = {"threshold": 0.4051, "eps": 0.1, "alpha": 0.01, "mode": "selective"}
    result = DetectorEvasion(model, detector, steps=10, **options).run(images, labels)
    assert bool(result.success[0])
    assert int(result.steps[0]) == 10
    assert not bool(DetectorEvasion(model, detector, steps=9, **options).run(images, labels).success[0])


def test_both_models_come_back_as_they_were():
    model, detector, (images, labels) = small_model().train(), linear_detector().train(), drawn()
    DetectorEvasion(model, detector, steps=2)(images, labels)
    for module in (model, detector):
        assert module.training
        assert all(p.requires_grad and p.grad is None for p in module.parameters())


@pytest.mark.parametrize(
    ("detector", "options", "message"),
    [
        ("high", {}, "detector must be callable on a batch of images; got str"),
        (linear_detector(), {"mode": "both"}, "mode must be one of 'orthogonal', 'selective'; got 'both'"),
        (linear_detector(), {"threshold": float("nan")}, "threshold must be a finite score; got nan"),
        (linear_detector(), {"every": 0}, "every must be an integer >= 1; got 0"),
        (linear_detector(), {"scope": "pixel"}, 'scope must be None, "image" or "channel"'),
        (small_model(), {}, r"detector must return one score per sample, \(6,\); got \(6, 5\)"),
        (lambda x: x.detach().mean((1, 2, 3)), {}, "the detector has no gradient with respect to the images"),
    ],
)
def test_bad_detectors_and_options_are_explained(detector, options, message):
    images, labels = drawn()
    with pytest.raises(ValueError, match=message):
        DetectorEvasion(small_model(), detector, **options)(images, labels)
