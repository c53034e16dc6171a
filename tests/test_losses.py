from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthattack.losses import Goal, attack_loss, margin


def drawn(seed: int, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(20, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (20,), generator=generator)


def defined(name: str, z: list[float], y: int) -> float:
    """The losses as their papers define them, one sample at a time."""
    others = [v for k, v in enumerate(z) if k != y]
    top = sorted(z, reverse=True)
    if name == "ce":
        return torch.tensor(z, dtype=torch.float64).exp().sum().log().item() - z[y]
    if name == "logit-difference":
        return sum(others) / len(others) - z[y]
    return max(others) - z[y] if name in ("margin", "scaled-ce") else (max(others) - z[y]) / (top[0] - top[2])


@given(st.integers(0, 10_000), st.sampled_from(["ce", "margin", "dlr", "scaled-ce", "logit-difference"]))
def test_losses_agree_with_their_definitions(seed, name):
    logits, labels = drawn(seed)
    values = attack_loss(name)(logits, Goal(labels))
    for value, z, y in zip(values.tolist(), logits.tolist(), labels.tolist(), strict=True):
        assert value == pytest.approx(defined(name, z, y))


@given(st.integers(0, 10_000), st.sampled_from(["ce", "margin", "scaled-ce", "logit-difference"]))
def test_targeting_flips_the_sign_and_nothing_else(seed, name):
    logits, labels = drawn(seed)
    loss = attack_loss(name)
    assert torch.equal(loss(logits, Goal(None, labels)), -loss(logits, Goal(labels)))
    # With labels too, the targets direct the loss.
    assert torch.equal(loss(logits, Goal((labels + 1) % 5, labels)), -loss(logits, Goal(labels)))


@given(st.integers(0, 10_000))
def test_the_divergence_from_the_images_answer_agrees_with_its_definition(seed):
    logits, labels = drawn(seed)
    clean = drawn(seed + 1)[0]
    values = attack_loss("kl")(logits, Goal(labels, clean=clean))
    p, q = clean.softmax(1), logits.softmax(1)
    torch.testing.assert_close(values, (p * (p / q).log()).sum(1))
    rows = torch.tensor([3, 1])
    assert torch.equal(attack_loss("kl")(logits[rows], Goal(labels, clean=clean).select(rows)), values[rows])


@given(st.integers(0, 10_000))
def test_targeted_dlr_agrees_with_its_definition(seed):
    logits, labels = drawn(seed)
    targets = (labels + 1 + torch.arange(20) % 4) % 5
    known = attack_loss("dlr")(logits, Goal(labels, targets))
    unknown = attack_loss("dlr")(logits, Goal(None, targets))
    for i, (z, y, t) in enumerate(zip(logits.tolist(), labels.tolist(), targets.tolist(), strict=True)):
        top = sorted(z, reverse=True)
        spread = top[0] - (top[2] + top[3]) / 2
        assert known[i].item() == pytest.approx(-(z[y] - z[t]) / spread)
        assert unknown[i].item() == pytest.approx(-(top[0] - z[t]) / spread)


@given(st.integers(0, 10_000))
def test_the_margin_is_positive_exactly_if_the_goal_is_reached(seed):
    logits, labels = drawn(seed)
    away, towards = Goal(labels), Goal(None, labels)
    assert torch.equal(margin(logits, labels) > 0, away.reached(logits))
    assert torch.equal(away.margin(logits) > 0, away.reached(logits))
    assert torch.equal(towards.margin(logits) > 0, towards.reached(logits))
    assert torch.equal(towards.reached(logits), ~away.reached(logits))
    # A target that only directs the loss does not decide about success.
    assert torch.equal(Goal(labels, (labels + 1) % 5).reached(logits), away.reached(logits))


@given(st.integers(0, 10_000), st.floats(1e-6, 1e6), st.floats(-100, 100))
def test_dlr_ignores_scale_and_shift(seed, scale, shift):
    logits, labels = drawn(seed)
    for goal in (Goal(labels), Goal(None, labels), Goal(labels, (labels + 1) % 5)):
        dlr = attack_loss("dlr")
        torch.testing.assert_close(dlr(scale * logits + shift, goal), dlr(logits, goal), rtol=1e-6, atol=1e-6)


def test_dlr_of_tied_logits_is_finite():
    for goal in (Goal(torch.tensor([0])), Goal(None, torch.tensor([0])), Goal(torch.tensor([1]), torch.tensor([0]))):
        logits = torch.ones(1, 4, requires_grad=True)
        value = attack_loss("dlr")(logits, goal)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.item() == 0
        assert gradient.isfinite().all()


@given(st.integers(0, 10_000), st.floats(1e-4, 1e4), st.floats(-100, 100))
def test_the_scaled_cross_entropy_has_the_slope_of_logits_whose_first_two_are_1_apart(seed, scale, shift):
    logits, labels = drawn(seed)
    (slope,) = torch.autograd.grad(attack_loss("scaled-ce")(logits.requires_grad_(), Goal(labels)).sum(), logits)
    top = logits.detach().sort(1, descending=True).values
    unit = (logits.detach() / (top[:, :1] - top[:, 1:2])).requires_grad_()
    (known,) = torch.autograd.grad(torch.nn.functional.cross_entropy(unit, labels, reduction="sum"), unit)
    torch.testing.assert_close(slope, known / (top[:, :1] - top[:, 1:2]), rtol=1e-9, atol=1e-12)
    other = (scale * logits.detach() + shift).requires_grad_()
    (scaled,) = torch.autograd.grad(attack_loss("scaled-ce")(other, Goal(labels)).sum(), other)
    torch.testing.assert_close(scale * scaled, slope, rtol=1e-6, atol=1e-9)


@given(st.integers(0, 10_000), st.integers(0, 29))
def test_the_scaled_cross_entropy_is_among_the_label_and_ten_others(seed, label):
    logits = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    labels = torch.full((4,), label)
    (slope,) = torch.autograd.grad(attack_loss("scaled-ce")(logits.requires_grad_(), Goal(labels)).sum(), logits)
    for row, z in zip(slope, logits.detach(), strict=True):
        order = z.argsort(descending=True)
        among = [label, *(k for k in order.tolist() if k != label)][:11]
        gap = z[order[0]] - z[order[1]]
        p = (z[among] / gap).softmax(0)
        p[0] -= 1
        torch.testing.assert_close(row[among], p / gap, rtol=1e-9, atol=1e-12)
        assert row.count_nonzero() <= 11


@pytest.mark.parametrize("logits", [[1.0, 1, 1, 1], [1.0, 1, 0, -1e30], [0.0, 1e-30, 0, 5]])
def test_the_scaled_cross_entropy_of_tied_logits_is_finite(logits):
    z = torch.tensor([logits], requires_grad=True)
    for goal in (Goal(torch.tensor([0])), Goal(None, torch.tensor([1]))):
        value = attack_loss("scaled-ce")(z, goal)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_targeted_dlr_leads_to_a_target_in_any_place():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).repeat(5, 1).requires_grad_()
    targets = torch.arange(5)
    (gradient,) = torch.autograd.grad(attack_loss("dlr")(logits, Goal(None, targets)).sum(), logits)
    towards = gradient.gather(1, targets[:, None]).squeeze(1)
    assert (towards[1:] > 0).all()  # the first is reached already


@pytest.mark.parametrize(("classes", "goal"), [(2, Goal(torch.tensor([0]))), (3, Goal(None, torch.tensor([0])))])
def test_dlr_needs_enough_classes(classes, goal):
    with pytest.raises(ValueError, match=rf'"dlr" needs at least {classes + 1} classes; the model has {classes}: use'):
        attack_loss("dlr")(torch.zeros(1, classes), goal)


def test_a_function_is_used_as_it_is_and_checked():
    logits, labels = drawn(0)
    mine = attack_loss(lambda z, y: -z.gather(1, y[:, None]).squeeze(1))
    torch.testing.assert_close(mine(logits, Goal(labels)), -logits[torch.arange(20), labels])
    torch.testing.assert_close(mine(logits, Goal(None, labels)), logits[torch.arange(20), labels])
    with pytest.raises(ValueError, match=r"loss must return one value per sample, \(20,\); got \(\)"):
        attack_loss(lambda z, y: z.sum())(logits, Goal(labels))
    with pytest.raises(ValueError, match=r"loss must return one value per sample, \(20,\); got float"):
        attack_loss(lambda z, y: 0.0)(logits, Goal(labels))


@pytest.mark.parametrize("loss", ["mse", 3, None])
def test_other_losses_are_refused(loss):
    with pytest.raises(ValueError, match="loss must be"):
        attack_loss(loss)


def test_nan_logits_fool_nobody():
    logits = torch.tensor([[0.0, float("nan")], [0.0, 1.0]])
    assert Goal(torch.tensor([0, 0])).reached(logits).tolist() == [False, True]
    assert Goal(None, torch.tensor([1, 1])).reached(logits).tolist() == [False, True]
