"""The attacks that are made to transfer: against their papers' iterations, written anew, and on models not asked."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import orthattack
from orthattack import (
    AutoAttack,
    OrthoDIFGSM,
    OrthoMIFGSM,
    OrthoSINIFGSM,
    OrthoTIFGSM,
    OrthoVMIFGSM,
    OrthoVNIFGSM,
    Square,
    ThreatModel,
    fooled,
)
from orthattack.attacks.rules import gaussian, smooth, variance
from orthattack.attacks.transforms import admix, composed, diversity, mixed, scales
from tests.attacks.test_attacks import drawn, small_model
from tests.attacks.test_family import Alone
from tests.attacks.test_numbers import Reference

pytestmark = pytest.mark.heavy

EPS, STEPS = 0.1, 6
ALPHA = EPS / 20  # so small that Nesterov's look-ahead, which is projected here, stays in the ball
KERNEL = 5


def linear() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 5)).double()


MODELS = {"linear": linear, "network": lambda: small_model(1).double()}


def prepared():
    images, labels = drawn(n=4)
    return 0.2 + 0.6 * images.double(), labels, [3, 1, 4, 1]


def gradient_at(model, seen, labels, leaf):
    """Of the cross-entropy at what is `seen` of `leaf`."""
    loss = functional.cross_entropy(model(seen), labels, reduction="sum")
    return torch.autograd.grad(loss, leaf)[0]


def diverse(x, numbers, rate=0.9, probability=0.5):
    """Input diversity by torch's own interpolation and padding, one image at a time."""
    side, made = x.shape[-1], []
    low, high = sorted((side, int(side * rate)))
    for image, (size, top, left, chance) in zip(x, numbers, strict=True):
        if chance >= probability:
            made.append(image)
            continue
        r = low + math.floor(size * (high - low))
        small = functional.interpolate(image[None], size=[r, r], mode="bilinear", align_corners=False)
        top, left = math.floor(top * (high - r + 1)), math.floor(left * (high - r + 1))
        whole = functional.pad(small, [left, high - r - left, top, high - r - top])
        made.append(functional.interpolate(whole, size=[side, side], mode="bilinear", align_corners=False)[0])
    return torch.stack(made)


def published(name, model, images, labels, seeds, scope, decay=1.0):
    """The last iterate of a paper's iteration, and with a scope that along the best steps in the plane."""
    streams = [Reference(seed) for seed in seeds]
    region = ThreatModel("linf", EPS, (0, 1), scope).around(images)

    def uniform(*shape):
        return torch.stack([own.uniform(*shape) for own in streams])

    def gradient(x):
        leaf = x.clone().requires_grad_()
        if name == "DIFGSM":
            return gradient_at(model, diverse(leaf, uniform(4).tolist()), labels, leaf)
        if name == "SINIFGSM":
            return sum(gradient_at(model, leaf / 2**i, labels, leaf) for i in range(5)) / 5
        if name == "Admix":
            others = [(OTHERS[(uniform(1)[:, 0] * 3).long()], 2**i) for _ in range(2) for i in range(3)]
            return sum(gradient_at(model, (leaf + 0.2 * y) / i, labels, leaf) for y, i in others) / 6
        return gradient_at(model, leaf, labels, leaf)

    x, velocity, tuned = images, torch.zeros_like(images), torch.zeros_like(images)
    for t in range(STEPS):
        g = gradient(x + ALPHA * decay * velocity if "NI" in name else x)
        direction = g + tuned
        if name.startswith("V") and t + 1 < STEPS:  # what is drawn at the last step is used no more
            around = [x + 1.5 * EPS * (2 * uniform(3, 6, 6) - 1) for _ in range(4)]
            tuned = sum(gradient(y) for y in around) / 4 - g
        if name == "TIFGSM":
            bell = torch.from_numpy(stats.norm.pdf([-3, -1.5, 0, 1.5, 3]))
            kernel = torch.outer(bell, bell) / torch.outer(bell, bell).sum()
            direction = functional.conv2d(direction, kernel.expand(3, 1, 5, 5), padding=2, groups=3)
        velocity = decay * velocity + direction / direction.abs().mean((1, 2, 3), keepdim=True)
        if scope is None:
            x = (x + ALPHA * velocity.sign()).clamp(images - EPS, images + EPS).clamp(0, 1)
        else:
            x = region.step(x, velocity, torch.full((4, 1, 1, 1), ALPHA).double())
    return x


OTHERS = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
OURS = {
    "DIFGSM": {},
    "TIFGSM": {"links": [smooth(gaussian(KERNEL))]},
    "SINIFGSM": {},
    "VMIFGSM": {"links": [variance(4)]},
    "VNIFGSM": {"links": [variance(4)]},
    "Admix": {"transform": admix(OTHERS, samples=2, copies=3)},
}


def ours(name, model, scope, **options):
    kind = getattr(orthattack, ("Ortho" if scope else "") + name.replace("Admix", "MIFGSM"))
    return kind(model, **{"eps": EPS, "alpha": ALPHA, "steps": STEPS, "loss": "ce", "keep": "last", **OURS[name],
                          **options})  # fmt: skip


@pytest.mark.parametrize("decay", [1.0, 0.4])
@pytest.mark.parametrize("scope", [None, "image"])
@pytest.mark.parametrize("network", MODELS)
@pytest.mark.parametrize("name", OURS)
def test_each_is_the_published_iteration(name, network, scope, decay):
    model, (images, labels, seeds) = MODELS[network](), prepared()
    found = ours(name, model, scope, decay=decay).run(images, labels, seeds=seeds).adversarials
    expected = published(name, model, images, labels, seeds, scope, decay)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert ((found - images).abs().amax((1, 2, 3)) > 0.9 * STEPS * ALPHA).all()


def test_the_published_iterations_differ():
    """So that the test above tells them apart."""
    model, (images, labels, seeds) = MODELS["network"](), prepared()
    found = [published(name, model, images, labels, seeds, None) for name in [*OURS, "MIFGSM"]]
    for k, one in enumerate(found):
        assert all((one - other).abs().max() > ALPHA for other in found[:k])


@pytest.mark.parametrize("rate", [0.6, 0.9, 1.3])
@pytest.mark.parametrize("shape", [(10, 10), (7, 12)])
def test_input_diversity_is_torchs_interpolation_and_padding(rate, shape):
    x, numbers = torch.rand(40, 3, *shape, dtype=torch.float64), torch.rand(40, 4, dtype=torch.float64)

    class Given:
        def uniform(self, count):
            return numbers[:, :count]

    found = diversity(rate, 0.7)(x, Given())
    assert found.shape == x.shape
    if shape[0] == shape[1]:
        torch.testing.assert_close(found, diverse(x, numbers.tolist(), rate, 0.7), rtol=0, atol=1e-12)
    kept = (found == x).flatten(1).all(1)
    assert torch.equal(kept, numbers[:, 3] >= 0.7)


def test_input_diversity_is_torchattacks_own(monkeypatch):
    theirs = pytest.importorskip("torchattacks", reason="needs the extra torchattacks")
    attack, x = theirs.DIFGSM(nn.Identity(), resize_rate=0.7, diversity_prob=1.0), torch.rand(1, 3, 20, 20)
    for size, top, left in [(14, 5, 0), (17, 1, 2), (19, 0, 0)]:
        given = iter([size, top, left])
        monkeypatch.setattr(torch, "randint", lambda *_, given=given, **__: torch.tensor([next(given)]))
        expected = attack.input_diversity(x)
        monkeypatch.undo()
        room = 20 - size + 1
        numbers = torch.tensor([[(size - 14) / 6 + 0.01, (top + 0.5) / room, (left + 0.5) / room, 0.0]])

        class Given:
            def uniform(self, _, numbers=numbers):
                return numbers

        torch.testing.assert_close(diversity(0.7, 1.0)(x, Given()), expected, rtol=0, atol=1e-6)


def test_the_gradients_of_several_transforms_are_averaged_and_counted():
    model, (images, labels) = small_model(), drawn(n=5)
    one = OrthoMIFGSM(model, eps=0.05, steps=3, transform=[lambda x, _: x, lambda x, _: x], loss="ce")
    plain = OrthoMIFGSM(model, eps=0.05, steps=3, loss="ce").run(images, labels)
    twice = one.run(images, labels)
    torch.testing.assert_close(twice.adversarials, plain.adversarials, rtol=0, atol=1e-6)
    assert twice.gradient_calls.tolist() == [6] * 5
    assert twice.forward_calls.tolist() == [4 + 6] * 5  # four of the model itself
    si_di = OrthoMIFGSM(model, steps=2, transform=composed(scales(3), diversity()), eot_samples=2)
    assert si_di.run(images, labels).gradient_calls.tolist() == [2 * 3 * 2] * 5
    for bad, message in [([], "a list of one or more of them; got an empty list"), ([scales(2)], "got tuple")]:
        with pytest.raises(ValueError, match=message):
            OrthoMIFGSM(model, transform=bad)


def test_transforms_compose_from_first_to_last_and_each_with_each():
    x = torch.rand(2, 3, 4, 4)
    (one,) = composed(lambda y, _: y + 1, lambda y, _: 2 * y)
    torch.testing.assert_close(one(x, None), 2 * (x + 1))
    several = composed(scales(2), [lambda y, _: y, lambda y, _: y + 1])
    assert len(several) == 4
    for made, expected in zip(several, [x, x + 1, x / 2, x / 2 + 1], strict=True):
        torch.testing.assert_close(made(x, None), expected)


@pytest.mark.parametrize("name", ["DIFGSM", "VNIFGSM", "Admix"])
def test_what_they_draw_depends_on_no_neighbour(name):
    model, (images, labels, seeds) = Alone(MODELS["network"]()), prepared()
    together = ours(name, model, "image").run(images, labels, seeds=seeds)
    alone = ours(name, model, "image").run(images[2:3], labels[2:3], seeds=seeds[2:3])
    parts = ours(name, model, "image").run(images, labels, seeds=seeds, batch_size=3)
    assert torch.equal(alone.adversarials[0], together.adversarials[2])
    assert torch.equal(parts.adversarials, together.adversarials)


def test_a_copy_does_what_the_original_does():
    model, (images, labels, seeds) = MODELS["network"](), prepared()
    for name in ("DIFGSM", "TIFGSM", "Admix"):
        attack = ours(name, model, "image")
        assert repr(attack) == repr(pickle.loads(pickle.dumps(attack)))
        expected = attack.run(images, labels, seeds=seeds).adversarials
        for twin in (pickle.loads(pickle.dumps(attack)), attack.replace()):
            assert torch.equal(twin.run(images, labels, seeds=seeds).adversarials, expected)


# --- keep="last" --------------------------------------------------------------------------------------------------


def test_the_last_iterate_comes_back_whether_it_is_the_best_or_not():
    model, (images, labels) = small_model(), drawn(n=12)
    scored = []
    options = {"eps": 0.3, "alpha": 0.25, "steps": 5, "random_start": False, "loss": "ce"}  # too long a step to settle
    last = orthattack.PGD(model, keep="last", on_step=scored.append, **options).run(images, labels)
    best = orthattack.PGD(model, **options).run(images, labels)
    assert (last.steps == 5).all()
    assert torch.equal(last.loss, scored[-1].loss)
    assert torch.equal(last.success, scored[-1].success)
    assert torch.equal(last.success, fooled(model, last.adversarials, labels))
    assert (best.loss >= last.loss).all()
    assert ((best.loss > last.loss) & (best.steps < 5)).any()


def test_with_early_stop_the_last_iterate_is_the_first_that_fools():
    model, (images, _) = small_model(), drawn(n=12)
    labels = model(images).argmax(1)
    options = {"eps": 0.02, "steps": 6, "random_start": False, "early_stop": True}
    last, best = (orthattack.OrthoPGD(model, keep=keep, **options).run(images, labels) for keep in ("last", "best"))
    assert 0 < last.success.sum() < 12
    assert torch.equal(last.success, best.success)
    assert torch.equal(last.adversarials[last.success], best.adversarials[best.success])
    assert (last.steps[~last.success] == 6).all()


@pytest.mark.parametrize("kind", [Square, AutoAttack, orthattack.FAB, orthattack.MinimumNorm])
def test_what_has_no_last_iterate_refuses(kind):
    with pytest.raises((ValueError, TypeError), match=r'keep="last" is for attacks|argument .keep.'):
        kind(small_model(), keep="last")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: orthattack.MIFGSM(small_model(), keep="first"), "keep must be one of 'best', 'last'; got 'first'"),
        (
            lambda: orthattack.MIFGSM(small_model(), links=variance(2)),
            "links must be a list of links.*got variance",
        ),
        (lambda: diversity(rate=0), "rate must be a finite number > 0; got 0"),
        (lambda: diversity(probability=1.5), r"probability must be a number in \[0, 1\]; got 1.5"),
        (lambda: scales(0), "copies must be an integer >= 1; got 0"),
        (lambda: mixed(torch.rand(3, 4, 4)), r"others must be images \(M, C, H, W\)"),
        (lambda: gaussian(5, 0), "reach must be a finite number of standard deviations > 0; got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made()


def test_neighbours_are_no_steps_in_what_is_said_of_masked_gradients():
    inner, (images, labels) = small_model(), drawn(n=4)
    attack = OrthoVMIFGSM(lambda x: inner((255 * x).round() / 255), steps=4, optimize="none")
    with pytest.warns(UserWarning, match="nothing could be climbed: the model's gradient is zero"):
        attack(images, labels)


# --- away from what the model said ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [None, "image"])
def test_tpgd_is_the_published_iteration(scope):
    model, (images, labels, _) = MODELS["network"](), prepared()
    start = images + 0.001 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).double()
    options = {"eps": 0.02, "alpha": 0.005, "steps": 6, "random_start": False, "loss": "kl", "keep": "last"}
    result = orthattack.PGD(model, scope=scope, **options).run(images, labels, start=start)
    region, clean = ThreatModel("linf", 0.02, (0, 1), scope).around(images), model(images).detach().softmax(1)
    x = region.shrunk(start)
    for _ in range(6):
        leaf = x.clone().requires_grad_()
        divergence = functional.kl_div(model(leaf).log_softmax(1), clean, reduction="sum")
        x = region.step(x, torch.autograd.grad(divergence, leaf)[0], torch.full((4, 1, 1, 1), 0.005).double())
    torch.testing.assert_close(result.adversarials, x, rtol=0, atol=1e-9)
    assert (result.forward_calls == 1 + 7).all()
    with pytest.raises(ValueError, match='loss="kl" leads to no class; got targeted=True'):
        orthattack.PGD(model, loss="kl", targeted=True)


# --- models that were not asked -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """Two networks that have learnt the digits, and 300 that both know."""
    data = load_digits()
    images, labels = torch.tensor(data.images / 16).float()[:, None], torch.tensor(data.target)

    def trained(seed, *layers):
        model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model(images[:1])
            for layer in model:
                if hasattr(layer, "reset_parameters"):
                    layer.reset_parameters()
            optimizer = torch.optim.Adam(model.parameters(), 3e-3)
            for _ in range(12):
                for rows in torch.randperm(1200).split(64):
                    optimizer.zero_grad()
                    functional.cross_entropy(model(images[rows]), labels[rows]).backward()
                    optimizer.step()
        return model.eval()

    source = trained(0, nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
    target = trained(1, nn.Flatten(), nn.Linear(64, 64), nn.ReLU())
    images, labels = images[1200:], labels[1200:]
    known = ~(fooled(source, images, labels) | fooled(target, images, labels))
    return source, target, images[known][:300], labels[known][:300]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [OrthoMIFGSM, OrthoDIFGSM, OrthoTIFGSM, OrthoSINIFGSM, OrthoVMIFGSM, OrthoVNIFGSM])
@pytest.mark.parametrize("scope", [None, "image"])
def test_a_model_that_was_not_asked_is_fooled_more_often_than_by_noise(digits, kind, scope):
    """Of the same size, by intervals of 99 %."""
    source, target, images, labels = digits
    links = {OrthoTIFGSM: [smooth(gaussian(3, 1))], OrthoVMIFGSM: [variance(5)], OrthoVNIFGSM: [variance(5)]}
    more = {"links": links[kind]} if kind in links else {}
    found = kind(source, eps=0.25, keep="last", loss="ce", scope=scope, **more)(images, labels)
    noise = 0.25 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).sign()
    by_attack, by_noise = (
        stats.binomtest(int(fooled(target, x, labels).sum()), len(labels)).proportion_ci(0.99, "wilson")
        for x in (found, (images + noise).clamp(0, 1))
    )
    assert by_attack.low > by_noise.high
