from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthattack.losses import attack_loss, fooled, margin


def drawn(seed: int, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(20, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (20,), generator=generator)


@given(st.integers(0, 10_000))
def test_losses_agree_with_their_definitions(seed):
    logits, labels = drawn(seed)
    for i, (z, y) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True)):
        others = max(v for k, v in enumerate(z) if k != y)
        top = sorted(z, reverse=True)
        partition = torch.tensor(z, dtype=torch.float64).exp().sum().log().item()
        assert attack_loss("ce", False)(logits, labels)[i].item() == pytest.approx(partition - z[y])
        assert attack_loss("margin", False)(logits, labels)[i].item() == pytest.approx(others - z[y])
        assert attack_loss("dlr", False)(logits, labels)[i].item() == pytest.approx((others - z[y]) / (top[0] - top[2]))


@given(st.integers(0, 10_000), st.sampled_from(["ce", "margin"]))
def test_targeting_flips_the_sign_and_nothing_else(seed, name):
    logits, labels = drawn(seed)
    assert torch.equal(attack_loss(name, True)(logits, labels), -attack_loss(name, False)(logits, labels))


@given(st.integers(0, 10_000))
def test_the_margin_is_positive_exactly_if_fooled(seed):
    logits, labels = drawn(seed)
    assert torch.equal(margin(logits, labels) > 0, fooled(logits, labels, targeted=False))
    assert torch.equal(fooled(logits, labels, targeted=True), ~fooled(logits, labels, targeted=False))


@given(st.integers(0, 10_000), st.floats(1e-6, 1e6), st.floats(-100, 100))
def test_dlr_ignores_scale_and_shift(seed, scale, shift):
    logits, labels = drawn(seed)
    dlr = attack_loss("dlr", False)
    torch.testing.assert_close(dlr(scale * logits + shift, labels), dlr(logits, labels), rtol=1e-6, atol=1e-6)


def test_dlr_of_tied_logits_is_finite():
    logits = torch.ones(1, 3, requires_grad=True)
    value = attack_loss("dlr", False)(logits, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.item() == 0
    assert gradient.isfinite().all()


def test_nan_logits_fool_nobody():
    logits = torch.tensor([[0.0, float("nan")], [0.0, 1.0]])
    assert fooled(logits, torch.tensor([0, 0]), targeted=False).tolist() == [False, True]
    assert fooled(logits, torch.tensor([1, 1]), targeted=True).tolist() == [False, True]


def test_a_callable_is_a_loss():
    logits, labels = drawn(0)
    loss = attack_loss(lambda z, y: -z.gather(1, y[:, None])[:, 0], targeted=True)
    assert torch.equal(loss(logits, labels), logits.gather(1, labels[:, None])[:, 0])


def test_bad_losses_are_explained():
    logits, labels = drawn(0)
    with pytest.raises(ValueError, match="loss must be one of 'ce', 'margin', 'dlr' or callable; got 'mse'"):
        attack_loss("mse", False)
    with pytest.raises(ValueError, match="loss must be a name or a function of"):
        attack_loss(3, False)
    with pytest.raises(ValueError, match=r"one value per sample, \(20,\); got \(\)"):
        attack_loss(lambda z, _: z.mean(), False)(logits, labels)
    with pytest.raises(ValueError, match='loss "dlr" needs at least 3 classes; the model has 2: use "margin"'):
        attack_loss("dlr", False)(*drawn(0, classes=2))


@given(st.integers(0, 10_000))
def test_targeted_dlr_has_a_gradient_at_every_rank(seed):
    logits, labels = drawn(seed, classes=6)
    z = logits.double().sort(dim=1, descending=True).values
    own = logits.double().gather(1, labels[:, None])[:, 0]
    expected = -(z[:, 0] - own) / (z[:, 0] - (z[:, 2] + z[:, 3]) / 2)
    torch.testing.assert_close(attack_loss("dlr", True)(logits.double(), labels), expected)
    for rank in range(1, 6):
        leaf = logits.double().requires_grad_()
        targets = logits.argsort(dim=1, descending=True)[:, rank]
        (gradient,) = torch.autograd.grad(attack_loss("dlr", True)(leaf, targets).sum(), leaf)
        assert (gradient.abs().amax(1) > 1e-6).all()
    with pytest.raises(ValueError, match='targeted "dlr" needs at least 4 classes; the model has 3: use "margin"'):
        attack_loss("dlr", True)(*drawn(0, classes=3))
