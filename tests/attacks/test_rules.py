"""The step rules against plain loops that follow the papers, on models whose every number can be recomputed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from torch import nn

from orthattack import (
    APGD,
    FGSM,
    MIFGSM,
    NIFGSM,
    PGD,
    AutoAttack,
    OrthoAPGD,
    OrthoFGSM,
    OrthoMIFGSM,
    OrthoNIFGSM,
    OrthoPGD,
    OrthoTIFGSM,
    OrthoVMIFGSM,
    ThreatModel,
)
from orthattack.attacks import DIFGSM, SINIFGSM, TIFGSM, VMIFGSM, OrthoVNIFGSM
from orthattack.attacks.rules import AutoSparse, AutoStep, accumulated, chain, momentum, normalize, variance
from tests.attacks.test_attacks import Recorder, drawn, small_model
from tests.conftest import examples, seeds

EPS = 8 / 255


def losses_and_gradients(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(leaf), labels, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def prepared(n: int = 6, seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    images, labels = drawn(seed, n)
    return small_model(seed).double(), images.double(), labels


@pytest.mark.parametrize("schedule", ["fixed", "linear", "cosine"])
def test_schedules_set_the_length_of_each_step(schedule):
    model, images, labels = prepared()
    recorder = Recorder(model)
    PGD(recorder, eps=0.9, alpha=0.01, steps=8, schedule=schedule, random_start=False)(images, labels)
    for t in range(8):
        step = (recorder.seen[t + 1] - recorder.seen[t]).abs().amax()
        factor = {"fixed": 1, "linear": 1 - t / 8, "cosine": (1 + math.cos(math.pi * t / 8)) / 2}[schedule]
        assert float(step) == pytest.approx(0.01 * factor, rel=1e-9)


@pytest.mark.parametrize(("schedule", "first"), [("fixed", 2.5 / 8), ("linear", 2.0), ("cosine", 2.0)])
def test_the_first_step_crosses_the_ball_where_steps_fall(schedule, first):
    images, labels = drawn()
    found = [
        PGD(small_model(), eps=EPS, alpha=alpha, steps=8, schedule=schedule).run(images, labels, seeds=range(6))
        for alpha in (None, first * EPS)
    ]
    assert torch.equal(found[0].adversarials, found[1].adversarials)


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_mi_fgsm_is_the_published_iteration(decay):
    model, images, labels = prepared()
    recorder = Recorder(model)
    MIFGSM(recorder, eps=EPS, steps=7, decay=decay, loss="ce")(images, labels)
    x, velocity, alpha = images, torch.zeros_like(images), EPS / 7
    for seen in recorder.seen:
        torch.testing.assert_close(seen, x, rtol=0, atol=1e-12)
        _, g = losses_and_gradients(model, x, labels)
        velocity = decay * velocity + g / g.abs().mean((1, 2, 3), keepdim=True)
        x = (x + alpha * velocity.sign()).clamp(images - EPS, images + EPS).clamp(0, 1)
    assert len(recorder.seen) == 8


def test_ni_fgsm_looks_ahead_inside_the_ball():
    model, images, labels = prepared()
    recorder = Recorder(model)
    NIFGSM(recorder, eps=EPS, steps=7, loss="ce")(images, labels)
    x, velocity, alpha = images, torch.zeros_like(images), EPS / 7
    for t, seen in enumerate(recorder.seen):
        ahead = (x + alpha * velocity if t < 7 else x).clamp(images - EPS, images + EPS).clamp(0, 1)
        torch.testing.assert_close(seen, ahead, rtol=0, atol=1e-12)
        _, g = losses_and_gradients(model, ahead, labels)
        velocity = velocity + g / g.abs().mean((1, 2, 3), keepdim=True)
        x = (x + alpha * velocity.sign()).clamp(images - EPS, images + EPS).clamp(0, 1)


@pytest.mark.parametrize("attack", [MIFGSM, NIFGSM])
def test_momentum_is_measured_by_the_mean_where_that_decides_signs(attack):
    """A steep model, whose gradients' mean and largest entry are not in proportion from one step to the next."""
    model, images, labels = prepared()
    model[0].weight.data.mul_(20)
    recorder = Recorder(model)
    attack(recorder, eps=0.3, steps=7, loss="ce")(images, labels)

    def iterated(size):
        x, velocity, alpha, seen = images, torch.zeros_like(images), 0.3 / 7, []
        for t in range(8):
            ahead = x + alpha * velocity if attack is NIFGSM and t < 7 else x
            seen.append(ahead.clamp(images - 0.3, images + 0.3).clamp(0, 1))
            _, g = losses_and_gradients(model, seen[-1], labels)
            velocity = velocity + g / size(g.abs(), (1, 2, 3), keepdim=True)
            x = (x + alpha * velocity.sign()).clamp(images - 0.3, images + 0.3).clamp(0, 1)
        return seen

    for found, expected in zip(recorder.seen, iterated(torch.mean), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert ((recorder.seen[-1] - iterated(torch.amax)[-1]).abs() > 1e-3).double().mean() > 0.03


@pytest.mark.parametrize("decay", [0.5, 1.0])
@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("l1", 1)])
def test_ni_fgsm_looks_ahead_by_a_step_of_its_norm(norm, order, decay):
    """On a linear loss v keeps its direction, so from the middle of the box every move is known."""
    images = torch.full((2, 3, 6, 6), 0.5, dtype=torch.float64)
    g = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    if norm == "l1":  # a hundredth of 108 pixels
        largest = g.abs() == g.abs().amax((1, 2, 3), keepdim=True)
        unit = torch.where(largest, g.sign(), 0.0)

    def model(x):
        return torch.stack([(x * g).flatten(1).sum(1), torch.zeros(2).double()], 1)

    recorder, alpha = Recorder(model), 0.02
    NIFGSM(recorder, norm=norm, eps=0.2, alpha=alpha, steps=5, decay=decay, targeted=True)(
        images, torch.zeros(2, dtype=torch.long)
    )
    for t, seen in enumerate(recorder.seen):
        ahead = alpha * decay if 0 < t < 5 else 0.0
        torch.testing.assert_close(seen, images + (alpha * t + ahead) * unit, rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [1e-37, 1.0, 1e37])
@pytest.mark.parametrize(
    ("norm", "expected"), [("l1", [0.5, -1.5]), ("l2", [0.2**0.5, -(1.8**0.5)]), ("linf", [1 / 3, -1])]
)
def test_a_direction_is_scaled_to_ones_and_none_stays_none(norm, expected, size):
    direction = size * torch.tensor([[1.0, -3.0], [0.0, 0.0]]).view(2, 1, 1, 2)
    scaled, _ = normalize(norm).update({}, direction, None)
    torch.testing.assert_close(scaled.flatten(1), torch.tensor([expected, [0.0, 0.0]]))


def test_momentum_survives_gradients_of_any_size():
    """Cross-entropy gradients of 1e-30 and less, whose mean alone would underflow, and such as have no finite sum."""
    images, labels = drawn()
    inner = small_model()
    for scale in (1e-37, 1e35, 3e38):
        result = OrthoMIFGSM(inner, eps=EPS, steps=3, loss=lambda z, y, s=scale: -s * z.gather(1, y[:, None])[:, 0])
        found = result.run(images, labels)
        assert found.adversarials.isfinite().all()
        assert (found.norm > 0.9 * EPS).all()
        assert found.cosine.max() <= 1e-6


@pytest.mark.parametrize(
    ("kind", "options", "rate"),
    [(FGSM, {}, 1), (OrthoFGSM, {}, 1), (PGD, {}, 2), (OrthoPGD, {}, 2),
     (PGD, {"schedule": "fixed"}, 0.25), (OrthoPGD, {"schedule": "cosine"}, 2), (MIFGSM, {"steps": 5}, 0.2),
     (NIFGSM, {"steps": 5}, 0.2), (OrthoMIFGSM, {"steps": 5}, 0.2), (OrthoNIFGSM, {"steps": 5}, 0.2), (APGD, {}, 2),
     (OrthoAPGD, {}, 2), *((kind, {"steps": 5}, 0.2) for kind in (DIFGSM, TIFGSM, SINIFGSM, VMIFGSM, OrthoVNIFGSM))],
)  # fmt: skip
def test_first_steps_are_a_share_of_eps(kind, options, rate):
    search = kind(nn.Flatten(), eps=0.1, **options).search
    assert search.options(0.1)["alpha"] == pytest.approx(0.1 * rate)
    assert search.steps == options.get("steps", {FGSM: 1, OrthoFGSM: 1, APGD: 100, OrthoAPGD: 100}.get(kind, 10))


@pytest.mark.parametrize(
    ("kind", "rule"),
    [(FGSM, chain()), (OrthoFGSM, chain()), (PGD, chain(schedule="linear")),
     (OrthoPGD, chain(schedule="linear")),
     (MIFGSM, chain(normalize("l1"), momentum(1.0))), (OrthoMIFGSM, chain(normalize("l1"), momentum(1.0))),
     (NIFGSM, chain(normalize("l1"), momentum(1.0), look_ahead=1.0)),
     (OrthoNIFGSM, chain(normalize("l1"), momentum(1.0), look_ahead=1.0)),
     (DIFGSM, chain(normalize("l1"), momentum(1.0))), (SINIFGSM, chain(normalize("l1"), momentum(1.0), look_ahead=1.0)),
     (VMIFGSM, chain(variance(20, 1.5), normalize("l1"), momentum(1.0))),
     (OrthoVNIFGSM, chain(variance(20, 1.5), normalize("l1"), momentum(1.0), look_ahead=1.0)),
     (APGD, AutoStep(0.75)), (OrthoAPGD, AutoStep(0.75))],
)  # fmt: skip
def test_each_attack_steps_by_its_rule(kind, rule):
    assert kind(nn.Flatten()).search.rule == rule


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("plain", "ortho"),
    [(FGSM, OrthoFGSM), (PGD, OrthoPGD), (MIFGSM, OrthoMIFGSM), (NIFGSM, OrthoNIFGSM), (APGD, OrthoAPGD),
     (TIFGSM, OrthoTIFGSM), (VMIFGSM, OrthoVMIFGSM)],
)  # fmt: skip
def test_a_plain_attack_is_the_orthogonal_one_without_the_plane(plain, ortho, norm):
    model, images, labels = prepared()
    eps = {"linf": EPS, "l2": 0.5}[norm]
    steps = {} if plain is FGSM else {"steps": 6}
    draws = {"generator": torch.Generator().manual_seed(3)} if plain in (PGD, APGD, VMIFGSM) else {}
    one = plain(model, norm=norm, eps=eps, **steps, **draws)(images, labels)
    draws = {"generator": torch.Generator().manual_seed(3)} if draws else {}
    assert torch.equal(one, ortho(model, norm=norm, eps=eps, scope=None, **steps, **draws)(images, labels))


def test_checkpoints_are_those_of_the_paper():
    """p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), for 100 steps."""
    assert list(AutoStep.checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(AutoStep.checkpoints(100).values()) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert AutoStep.checkpoints(1) == {}
    for steps in range(1, 60):
        assert all(0 < at < steps for at in AutoStep.checkpoints(steps))


def next_of_apgd(seen, losses, gradients, image, eps, steps):
    """The points that Algorithm 1 of arXiv:2003.01690 goes to from each point seen, for one sample and L-infinity."""
    low, high = (image - eps).clamp(min=0), (image + eps).clamp(max=1)
    eta, best, best_loss, best_gradient = 2 * eps, None, -math.inf, None
    checked, halved, last_check, before = float(losses[0]), True, 0, seen[0]
    for t in range(steps):
        x, loss, g = seen[t], float(losses[t]), gradients[t]
        if loss > best_loss:
            best, best_loss, best_gradient = x, loss, g
        if t in AutoStep.checkpoints(steps):
            rises = sum(float(losses[j]) > float(losses[j - 1]) for j in range(last_check + 1, t + 1))
            halve = rises <= 0.75 * (t - last_check) or (not halved and checked >= best_loss)
            if halve:
                eta, x, g = eta / 2, best, best_gradient
            halved, checked, last_check = halve, best_loss, t
        z = (x + eta * g.sign()).clamp(low, high)
        yield z if t == 0 else (x + 0.75 * (z - x) + 0.25 * (x - before)).clamp(low, high)
        before = x


@examples(10)
@given(seeds)
def test_apgd_is_the_published_algorithm(seed):
    model, images, labels = prepared(4, seed % 1000)
    recorder, steps = Recorder(model), 25
    APGD(recorder, eps=0.1, steps=steps, loss="ce", generator=torch.Generator().manual_seed(seed))(images, labels)
    assert len(recorder.seen) == steps + 1
    known = [losses_and_gradients(model, x, labels) for x in recorder.seen[:-1]]
    for i in range(4):
        seen = [x[i] for x in recorder.seen]
        losses, gradients = [loss[i] for loss, _ in known], [g[i] for _, g in known]
        for t, expected in enumerate(next_of_apgd(seen, losses, gradients, images[i], 0.1, steps)):
            torch.testing.assert_close(seen[t + 1], expected, rtol=0, atol=1e-12)


def next_of_l1_apgd(seen, losses, gradients, region, eps, steps):
    """The points that Croce & Hein 2021 (arXiv:2103.01208) go to in L1 from each point seen, for one sample."""
    image = region.images[0]
    alpha, count, before, best, best_loss, best_gradient = eps, image.numel() // 5, image.numel(), None, -math.inf, None
    for t in range(steps):
        x, loss, g = seen[t], float(losses[t]), gradients[t]
        if loss > best_loss:
            best, best_loss, best_gradient = x, loss, g
        if t > 0 and t % max(int(0.04 * steps), 1) == 0:
            now = int((best != image).sum())
            if now / before < 0.95:
                alpha, x, g = eps, best, best_gradient
            else:
                alpha = max(alpha / 1.5, eps / 10)
            count, before = max(int(now / 1.5), 1), now
        least = g.abs().flatten().topk(count).values[-1]
        signs = torch.where(g.abs() >= least, g.sign(), 0)
        yield region.project((x + alpha * signs / signs.abs().sum())[None])[0]


@examples(5)
@given(seeds)
def test_apgd_in_l1_adapts_how_many_pixels_it_moves_as_published(seed):
    model, images, labels = prepared(3, seed % 1000)
    recorder, steps, eps = Recorder(model), 55, 3.0
    APGD(recorder, "l1", eps, steps, loss="ce", generator=torch.Generator().manual_seed(seed))(images, labels)
    known = [losses_and_gradients(model, x, labels) for x in recorder.seen[:-1]]
    moved = [(x != images).sum((1, 2, 3)).double().mean() for x in recorder.seen]
    assert moved[-1] < 0.6 * moved[0]
    for i in range(3):
        region = ThreatModel("l1", eps, scope=None).around(images[i : i + 1])
        losses, gradients = [loss[i] for loss, _ in known], [g[i] for _, g in known]
        following = next_of_l1_apgd([x[i] for x in recorder.seen], losses, gradients, region, eps, steps)
        for t, expected in enumerate(following):
            torch.testing.assert_close(recorder.seen[t + 1][i], expected, rtol=0, atol=1e-9)
    assert APGD(model, "l1", eps).search.rule == AutoSparse()


@pytest.mark.parametrize("kind", [FGSM, OrthoFGSM])
def test_one_l1_step_moves_more_pixels_at_a_larger_radius(kind):
    """Each by a twentieth of the bounds, up to a fifth of the pixels, 21 of 108; then each by more."""
    model, images, labels = prepared()
    images = 0.4 + 0.2 * images  # far from the bounds
    for eps, count in ((0.04, 1), (0.2, 4), (0.8, 16), (2.16, 22)):
        result = kind(model, "l1", eps, loss="margin").run(images, labels)
        moved = result.steps == 1
        assert moved.sum() >= 3
        changed = (result.adversarials != images).sum((1, 2, 3))[moved]
        assert (changed >= count).all()
        assert (changed <= count + 2).all()
        largest = (result.adversarials - images).abs().amax((1, 2, 3))[moved]
        each = max(min(eps, 0.05), eps / 21.6)
        assert (largest <= each * (1 + 1e-6)).all()
        assert kind is OrthoFGSM or (largest >= each * (1 - 1e-6)).all()


def test_autoattack_begins_with_apgd():
    (model, images, _), seen = prepared(), []
    model[3].weight.data /= 1e4  # so that nothing is fooled
    model[3].bias.data = torch.tensor([9.0, 0, 0, 0, 0]).double()
    labels = torch.zeros(6, dtype=torch.long)
    for kind, options in ((AutoAttack, {"queries": 1, "targets": 1}), (APGD, {"loss": "ce"})):
        recorder = Recorder(model)
        kind(recorder, norm="l2", eps=0.3, steps=5, generator=torch.Generator().manual_seed(0), **options)(
            images, labels
        )
        seen.append(recorder.seen)
    for one, other in zip(seen[0][1:], seen[1][:5], strict=False):  # after the images themselves
        assert torch.equal(one, other)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_every_iterate_of_apgd_stays_on_the_plane(norm):
    model, images, labels = prepared()
    recorder = Recorder(model)
    eps = {"linf": EPS, "l2": 0.5, "l1": 5.0}[norm]
    OrthoAPGD(recorder, norm=norm, eps=eps, steps=15)(images, labels)
    threat = ThreatModel(norm, eps)
    assert len(recorder.seen) == 16
    for seen in recorder.seen:
        assert threat.cosine(seen - images, images).max() <= 1e-9
        assert seen.min() >= 0
        assert seen.max() <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: chain(schedule="step"), "schedule must be one of 'fixed', 'linear', 'cosine'; got 'step'"),
        (lambda: accumulated("fixed", -1, False), "momentum must be a finite number >= 0; got -1"),
        (lambda: accumulated("fixed", 0, True), "nesterov=True needs a momentum > 0"),
        (lambda: AutoStep(1.0), r"rho must lie in \(0, 1\); got 1.0"),
        (lambda: PGD(small_model(), schedule="step"), "schedule must be one of"),
        (lambda: APGD(small_model(), rho=0), "rho must lie in"),
        (lambda: MIFGSM(small_model(), decay=float("nan")), "momentum must be a finite number >= 0; got nan"),
    ],
)
def test_bad_rules_are_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()
