"""The attacks on trained models and real images."""

from __future__ import annotations

import foolbox
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

import orthattack
from orthattack import (
    APGD,
    FGSM,
    PGD,
    AutoAttack,
    Bisection,
    OrthoAPGD,
    OrthoAutoAttack,
    OrthoFGSM,
    OrthoPGD,
    OrthoSquare,
    Square,
    alignment,
)
from orthattack.eval.data.load import load_dataset
from orthattack.eval.models.load import load_classifier
from scripts.measure_levels import measured
from scripts.measure_rounding import measure
from tests.attacks.test_family import EPS as RADII
from tests.attacks.test_family import FAMILY, make

EPS = 8 / 255
LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module", params=["cifar10-standard", pytest.param("cifar10-robust", marks=pytest.mark.slow)])
def trained(request) -> tuple[nn.Module, Tensor, Tensor]:
    classifier = load_classifier(request.param)
    (batch,) = load_dataset("cifar10-samples", classifier).batches(20, classifier.preprocessing)
    return classifier.model, batch.images, batch.labels


def robust(model: nn.Module, adversarials: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        return float((model(adversarials).argmax(1) == labels).float().mean())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_stronger_attacks_leave_less_robust_accuracy(trained, norm):
    model, images, labels = trained
    eps = EPS if norm == "linf" else 0.5
    clean = robust(model, images, labels)
    one = robust(model, FGSM(model, norm=norm, eps=eps)(images, labels), labels)
    ten = robust(model, PGD(model, norm=norm, eps=eps, generator=seeded())(images, labels), labels)
    ortho = robust(model, OrthoPGD(model, norm=norm, eps=eps, generator=seeded())(images, labels), labels)
    assert ten <= one < clean
    assert ten <= ortho <= ten + 0.05 + 1e-6  # one image of twenty


def test_a_standard_model_falls_to_an_orthogonal_perturbation():
    classifier = load_classifier("cifar10-standard")
    (batch,) = load_dataset("cifar10-samples", classifier).batches(20, classifier.preprocessing)
    result = OrthoPGD(classifier.model, eps=EPS, steps=20, generator=seeded()).run(batch.images, batch.labels)
    assert result.success.all()
    assert result.cosine.max() <= 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scope", ["image", "channel", "pixel"])
def test_constraints_hold_on_images(trained, norm, scope):
    model, images, labels = trained
    eps = EPS if norm == "linf" else 0.5
    for attack in (
        OrthoFGSM(model, norm=norm, eps=eps, scope=scope),
        OrthoPGD(model, norm=norm, eps=eps, scope=scope, steps=5, generator=seeded()),
        OrthoPGD(model, norm=norm, eps=eps, scope=scope, steps=5, early_stop=True, generator=seeded()),
    ):
        adversarials = attack(images, labels)
        delta = adversarials.double() - images.double()
        size = delta.abs().amax((1, 2, 3)) if norm == "linf" else delta.flatten(1).norm(dim=1)
        assert adversarials.min() >= 0
        assert adversarials.max() <= 1
        assert size.max() <= eps * (1 + 1e-6)
        assert alignment(delta, images.double(), scope).abs().max() <= 1e-6


# What finds nothing in the small ball and the few steps of the other tests, where block means are kept.
FREE = {"HopSkipJump": {"eps": None, "queries": 200}, "SigmaZero": {"eps": None, "steps": 100}}
KEPT = {"8×8 block means kept": ("block8", "constant"), "luma of each pixel kept": ("pixel", "luma")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no random point fools the model")  # in which HopSkipJump begins
@pytest.mark.parametrize("words", KEPT)
@pytest.mark.parametrize("name", [*FAMILY, "Bisection"])
def test_every_attack_keeps_block_means_and_luma(trained, name, words):
    """As pooling and a grey image have them, for each norm in turn."""
    model, images, labels = (part[:6] if isinstance(part, Tensor) else part for part in trained)
    scope, normal = KEPT[words]
    norms = getattr(getattr(orthattack, name), "norms", PGD.norms)
    norm = norms[2 * len(name) % len(norms)]
    options = {"scope": scope, "normal": normal, **FREE.get(name.removeprefix("Ortho"), {})}
    attack = (
        Bisection(OrthoPGD(model, norm, RADII[norm], steps=3, generator=seeded(), **options), trials=4)
        if name == "Bisection"
        else make(name, model, norm, **options)
    )
    assert attack.card.keeps == (words,)
    result = attack.run(images, labels)
    delta = result.adversarials.double() - images.double()
    assert (result.norm > 0).sum() >= (1 if attack.card.minimal else 3)  # where nothing fools, that is the image
    assert result.cosine.max() <= 1e-6
    assert name == "Bisection" or "eps" in options or result.norm.max() <= RADII[norm] * (1 + 1e-6)
    if normal == "luma":
        change, size = torch.einsum("nchw,c->nhw", delta, LUMA) / LUMA.norm(), delta.norm(dim=1)
    else:
        change, size = 8 * avg_pool2d(delta, 8), 8 * avg_pool2d(delta**2, 8).sqrt()
    assert (change.abs() <= 1e-6 * size).all()


@pytest.mark.slow
def test_rounding_costs_what_the_documentation_says():
    """docs/faq.md: next to nothing of the image's orthogonality, all of a pixel's."""
    classifier = load_classifier("cifar10-standard")
    (batch,) = load_dataset("cifar10-samples", classifier).batches(20, classifier.preprocessing)
    image = measure(classifier.model, batch.images, batch.labels, "linf", "image")
    pixel = measure(classifier.model, batch.images, batch.labels, "l2", "pixel")
    assert 1e-6 < image["cosine"].mean() <= 1e-3
    assert image["norm"].max() <= 1 + 1e-6
    assert (image["before"], image["after"]) == (20, 20)
    assert pixel["cosine"].mean() >= 0.5
    assert 1 < pixel["norm"].max() <= 1.02


@pytest.mark.parametrize("radius", [4, 1])
def test_exactness_in_8_bits_costs_no_strength(trained, radius):
    """docs/method.md's table, here with one image of twenty allowed for."""
    (one, loss), (other, its) = (measured(*trained, radius / 255, levels) for levels in (None, 256))
    assert other <= one + 0.05 + 1e-6
    assert its >= loss - 0.05


def test_projecting_only_the_gradient_does_not_make_the_perturbation_orthogonal(trained):
    """Why enforce="perturbation" exists."""
    model, images, labels = trained
    textbook = OrthoPGD(model, eps=EPS, enforce="gradient", generator=seeded()).run(images, labels)
    plain = PGD(model, eps=EPS, generator=seeded()).run(images, labels)
    assert textbook.cosine.max() > 1e-2
    assert textbook.cosine.mean() > 0.2 * plain.cosine.mean()


def test_pgd_is_as_strong_as_foolboxs_from_the_same_start(trained):
    """Without a random start the two take the same steps; ours returns the best of them, Foolbox the last."""
    model, images, labels = trained
    attack = foolbox.attacks.LinfPGD(rel_stepsize=0.25, steps=10, random_start=False)
    _, theirs, _ = attack(foolbox.PyTorchModel(model, bounds=(0, 1)), images, labels, epsilons=EPS)
    ours = PGD(model, eps=EPS, alpha=0.25 * EPS, steps=10, random_start=False, loss="ce").run(images, labels)
    assert robust(model, ours.adversarials, labels) <= robust(model, theirs, labels)
    last = ours.steps == 10
    assert last.sum() >= 5
    differing = ((ours.adversarials - theirs)[last].abs() > 1e-5).float().mean()
    assert differing < 0.01  # signs of gradients that are nearly zero


@pytest.mark.parametrize("eps", [2.0, 12.0])
def test_one_l1_step_spends_its_radius(trained, eps):
    """Also on images that are mostly black and white."""
    model, images, labels = trained
    for x in (images, (2 * images - 0.5).clamp(0, 1)):
        for attack in (FGSM, OrthoFGSM):
            result = attack(model, norm="l1", eps=eps).run(x, labels)
            moved = result.steps == 1  # the image itself is returned where the step lowers the loss
            assert moved.sum() >= 10
            torch.testing.assert_close(result.norm[moved], torch.full_like(result.norm[moved], eps), rtol=2e-6, atol=0)


def test_one_l1_step_fools_more_than_foolboxs_on_digits():
    """Written in black and white, so that most of a dense step, Foolbox's, is clipped."""
    digits = load_digits()
    x, y = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:1500]), y[:1500]).backward()
        optimizer.step()
    images, labels = x[1500:1600], y[1500:1600]
    for eps in (2.0, 4.0):
        attack = foolbox.attacks.L1FastGradientAttack()
        _, theirs, _ = attack(foolbox.PyTorchModel(model.eval(), bounds=(0, 1)), images, labels, epsilons=eps)
        kept = robust(model, theirs, labels)
        for ours in (FGSM, OrthoFGSM):
            assert robust(model, ours(model, norm="l1", eps=eps)(images, labels), labels) <= kept - 0.1


@pytest.mark.slow
def test_apgd_in_l1_climbs_as_far_as_the_official_code():
    """Both from random starts; on 98 images, docs/attacks/apgd.md, they differ by no more than chance."""
    theirs = pytest.importorskip("pyautoattack.autopgd_base", reason="needs pyautoattack, the official code")
    classifier = load_classifier("cifar10-robust")
    (batch,) = load_dataset("cifar10-samples", classifier).batches(20, classifier.preprocessing)
    model, images, labels = classifier.model, batch.images, batch.labels

    def climbed(found: Tensor) -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(found), labels)) / 3

    here = there = 0.0
    for seed in range(3):
        official = theirs.APGDAttack(model, n_iter=60, norm="L1", eps=12.0, seed=seed, loss="ce", device="cpu")
        torch.manual_seed(seed)
        there += climbed(official.perturb(images, labels, best_loss=True))
        generator = torch.Generator().manual_seed(seed)
        here += climbed(APGD(model, "l1", 12.0, 60, loss="ce", generator=generator)(images, labels))
    assert here >= there - 0.05  # one seed differs from another by as much


def test_restarts_and_steps_never_help_the_model(trained):
    model, images, labels = trained
    one = OrthoPGD(model, eps=4 / 255, steps=5, generator=seeded()).run(images, labels)
    five = OrthoPGD(model, eps=4 / 255, steps=5, restarts=3, generator=seeded()).run(images, labels)
    assert (five.success | ~one.success).all()
    assert (five.loss >= one.loss - 1e-6)[five.success == one.success].all()


@pytest.mark.slow
def test_targeted_attacks_reach_targets_on_the_standard_model():
    classifier = load_classifier("cifar10-standard")
    (batch,) = load_dataset("cifar10-samples", classifier).batches(20, classifier.preprocessing)
    targets = (batch.labels + 3) % 10
    result = OrthoPGD(classifier.model, eps=EPS, steps=40, targeted=True, generator=seeded()).run(batch.images, targets)
    assert result.success.float().mean() >= 0.8
    assert result.cosine.max() <= 1e-6


@pytest.mark.parametrize("attack", [FGSM, OrthoFGSM, PGD, OrthoPGD])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "scaled-ce", "logit-difference"])
def test_every_loss_fools(trained, attack, loss):
    model, images, labels = trained
    assert robust(model, attack(model, eps=EPS, loss=loss)(images, labels), labels) < robust(model, images, labels)


RULES = [
    ("MIFGSM", {"steps": 10}),
    ("NIFGSM", {"steps": 10}),
    ("APGD", {"steps": 15}),
    ("APGD", {"steps": 15, "loss": "dlr"}),
    ("PGD", {"steps": 10, "schedule": "cosine"}),
    ("PGD", {"steps": 10, "momentum": 0.75}),
    ("DIFGSM", {"steps": 10}),
]


@pytest.mark.parametrize(
    ("name", "options", "norm"),
    [
        # In the fast lane every rule in one norm.
        pytest.param(
            name,
            options,
            norm,
            marks=[pytest.mark.slow] * ((j + k) % 3 > 0 or j > 3 or (name == "APGD" and norm != "linf")),
        )
        for j, (name, options) in enumerate(RULES)
        for k, norm in enumerate(("linf", "l2", "l1"))
    ],
    ids=str,
)
def test_orthogonality_costs_an_image_at_most(trained, norm, name, options):
    """Every rule, plain and orthogonal, on the robust and the standard model: about as strong, and on the plane."""
    model, images, labels = trained
    eps = {"linf": 4 / 255, "l2": 0.5, "l1": 8.0}[norm]
    clean = robust(model, images, labels)
    kept = {}
    for form in (name, f"Ortho{name}"):
        attack = getattr(orthattack, form)(model, norm=norm, eps=eps, generator=seeded(), **options)
        result = attack.run(images, labels)
        delta = result.adversarials.double() - images.double()
        size = torch.linalg.vector_norm(delta.flatten(1), {"linf": float("inf"), "l2": 2, "l1": 1}[norm], dim=1)
        assert size.max() <= eps * (1 + 1e-6)
        assert result.adversarials.min() >= 0
        assert result.adversarials.max() <= 1
        kept[form] = robust(model, result.adversarials, labels)
        if form != name:
            assert alignment(delta, images.double()).abs().max() <= 1e-6
    assert kept[name] < clean
    # One image of twenty; L1 is further from converged.
    assert abs(kept[f"Ortho{name}"] - kept[name]) <= (0.1 if norm == "l1" else 0.05) + 1e-6


@pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=pytest.mark.slow)])
def test_autoattack_is_the_strongest(trained, norm):
    model, images, labels = trained
    eps = 4 / 255 if norm == "linf" else 0.25
    pgd = PGD(model, norm=norm, eps=eps, steps=20, generator=seeded()).run(images, labels)
    for attack in (AutoAttack, OrthoAutoAttack):
        result = attack(model, norm=norm, eps=eps, steps=20, targets=3, queries=30, generator=seeded()).run(
            images, labels
        )
        assert robust(model, result.adversarials, labels) <= robust(model, pgd.adversarials, labels)
        assert torch.equal(result.success, model(result.adversarials).argmax(1) != labels)
    assert result.cosine.max() <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_random_squares_fool_without_a_gradient(norm):
    classifier = load_classifier("cifar10-standard")
    (batch,) = load_dataset("cifar10-samples", classifier).batches(20, classifier.preprocessing)
    eps = {"linf": EPS, "l2": 1.5, "l1": 60.0}[norm]

    @torch.no_grad()
    def model(x: Tensor) -> Tensor:
        return classifier.model(x)

    kept = {}
    for attack in (Square, OrthoSquare):
        result = attack(model, norm=norm, eps=eps, queries=150, early_stop=True, generator=seeded()).run(
            batch.images, batch.labels
        )
        kept[attack] = robust(classifier.model, result.adversarials, batch.labels)
        assert result.norm.max() <= eps * (1 + 1e-6)
    assert robust(classifier.model, batch.images, batch.labels) >= 0.85
    assert max(kept.values()) <= 0.75
    assert result.cosine.max() <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=pytest.mark.slow)])
def test_the_smallest_norms_agree_with_attacks_at_fixed_eps(trained, norm):
    model, images, labels = trained
    eps = 4 / 255 if norm == "linf" else 0.5
    attack = OrthoAPGD(model, norm=norm, eps=eps, steps=10, generator=seeded())
    smallest = Bisection(attack, trials=8).run(images, labels)
    assert smallest.success.float().mean() >= 0.9
    assert torch.equal(smallest.success, model(smallest.adversarials).argmax(1) != labels)
    assert smallest.cosine.max() <= 1e-6
    fixed = attack.run(images, labels)
    within = smallest.norm <= eps * (1 + 1e-6)
    assert abs(int(within.sum()) - int(fixed.success.sum())) <= 1


def test_a_trained_model_in_training_mode_is_attacked_in_evaluation_mode(trained):
    model, images, labels = trained
    expected = OrthoPGD(model, generator=seeded())(images, labels)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        model.train()
        assert torch.equal(OrthoPGD(model, generator=seeded())(images, labels), expected)
        assert model.training
    finally:
        model.eval()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_on_tiny_imagenet_orthogonality_costs_less_than_a_point(shared):
    """200 of the images of docs/evaluation.md, where one image is half a point."""
    weights = shared / "weights" / "resnet18-tiny20-robust-linf-4.safetensors"
    classifier = load_classifier("resnet18", weights, image_size=64)
    dataset = load_dataset(str(shared / "data" / "tiny-imagenet-20" / "val"), classifier).limited(200)
    kept = {"plain": 0, "ortho": 0}
    for batch in dataset.batches(50, classifier.preprocessing):
        for name, attack in (("plain", PGD), ("ortho", OrthoPGD)):
            result = attack(classifier.model, eps=4 / 255, generator=seeded()).run(batch.images, batch.labels)
            kept[name] += int((~result.success).sum())
            if name == "ortho":
                assert result.cosine.max() <= 1e-6
    assert abs(kept["ortho"] - kept["plain"]) <= 4
    assert 0.3 <= kept["plain"] / 200 <= 0.6
