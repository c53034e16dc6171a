"""What a search is told of a model: loss, success and gradient, and what they cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orthattack.assumptions import DRAWS, NEEDED
from orthattack.attacks.scoring import NoGradientError, Oracle, input_gradient
from orthattack.losses import Goal, attack_loss

CE, MARGIN = attack_loss("ce"), attack_loss("margin")
WEIGHT = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 3.0, 0]])


def linear(images):
    return images.flatten(1) @ WEIGHT.to(images).T


def points(*rows):
    return torch.tensor(rows).view(len(rows), 1, 2, 2)


X = points([0.9, 0.1, 0.1, 0.5], [0.1, 0.4, 0.1, 0.5])  # of classes 0 and 1
GOAL = Goal(torch.tensor([0, 0]))


def test_one_pass_says_everything():
    found = Oracle(linear).evaluate(X, GOAL, CE, None, with_gradient=True)
    assert found.success.tolist() == [False, True]
    logits = linear(X)
    torch.testing.assert_close(found.loss, nn.functional.cross_entropy(logits, GOAL.classes, reduction="none"))
    torch.testing.assert_close(found.margin, torch.tensor([-0.6, 0.7]))
    share = logits.softmax(1)
    share[:, 0] -= 1
    torch.testing.assert_close(found.gradient, (share @ WEIGHT).view_as(X))
    assert found.unusable.tolist() == found.stuck.tolist() == [False] * 2
    assert found.forward_calls.tolist() == found.gradient_calls.tolist() == [1, 1]
    assert found.exact.tolist() == [True] * 2
    without = Oracle(linear).evaluate(X, GOAL, CE, None, with_gradient=False)
    assert without.gradient is None
    assert without.gradient_calls.tolist() == [0, 0]
    torch.testing.assert_close(without.loss, found.loss)


def test_targets_are_approached():
    goal = Goal(None, torch.tensor([2, 1]))
    found = Oracle(linear).evaluate(X, goal, MARGIN, None, with_gradient=True)
    assert found.success.tolist() == [False, True]
    torch.testing.assert_close(found.loss, torch.tensor([-0.6, 0.5]))
    torch.testing.assert_close(found.margin, found.loss)
    expected = torch.stack([WEIGHT[2] - WEIGHT[0], WEIGHT[1] - WEIGHT[2]])
    torch.testing.assert_close(found.gradient, expected.view_as(X))


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_a_saturated_cross_entropy_gives_way_to_the_margin_where_the_goal_is_not_reached(scale):
    x = points([0.9, 0.1, 0.2, 0.5], [0.1, 0.4, 0.1, 0.5])

    def model(images):
        return scale * linear(images)

    found = Oracle(model).evaluate(x, GOAL, CE, None, with_gradient=True)
    torch.testing.assert_close(found.loss[0], scale * torch.tensor(0.6 - 0.9))
    torch.testing.assert_close(found.gradient[0].flatten(), scale * (WEIGHT[2] - WEIGHT[0]))
    assert found.unusable.tolist() == [scale == 1e4, False]  # of close logits the gradient is small, not unusable
    assert found.stuck.tolist() == [False, False]
    loss = nn.functional.cross_entropy(model(x), GOAL.classes, reduction="none")
    torch.testing.assert_close(found.loss[1], loss[1])
    share = model(x).softmax(1)[1]
    share[0] -= 1
    torch.testing.assert_close(found.gradient[1].flatten(), scale * share @ WEIGHT)
    towards = Oracle(model).evaluate(x, Goal(None, torch.tensor([2, 1])), CE, None, with_gradient=True)
    torch.testing.assert_close(towards.loss[0], scale * torch.tensor(0.6 - 0.9))
    torch.testing.assert_close(towards.gradient[0].flatten(), scale * (WEIGHT[2] - WEIGHT[0]))


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float16, 2.0**-14), (torch.bfloat16, 1e8 * 2.0**-126), (torch.float32, 1e8 * 2.0**-126),
     (torch.float64, 1e8 * 2.0**-1022)],
)  # fmt: skip
def test_a_slope_is_nothing_where_the_images_dtype_would_round_it_to_nothing(dtype, limit):
    x = X[:1].to(dtype)
    for slope, is_usable in ((0.9 * limit, False), (1.1 * limit, True)):
        found = Oracle(linear).evaluate(
            x, Goal(GOAL.classes[:1]), lambda logits, goal, s=slope: s * goal.margin(logits), None, with_gradient=True
        )
        assert found.unusable.tolist() == [not is_usable]
        expected = (slope if is_usable else 1) * (WEIGHT[2] - WEIGHT[0]).to(dtype)
        torch.testing.assert_close(found.gradient[0].flatten(), expected, rtol=1e-2, atol=0)


def test_a_sample_without_any_gradient_has_one_of_zeros():
    def model(images):
        return linear(torch.where(images.mean((1, 2, 3), keepdim=True) > 0.3, images, images.detach().round()))

    found = Oracle(model).evaluate(X, GOAL, CE, None, with_gradient=True)
    assert found.stuck.tolist() == found.unusable.tolist() == [False, True]
    assert (found.gradient[1] == 0).all()
    assert (found.gradient[0] != 0).any()

    def broken(images):
        return linear(images) + 0 * (images - X[1:].to(images)).square().sum((1, 2, 3), keepdim=True).sqrt().flatten(1)

    found = Oracle(broken).evaluate(X, GOAL, CE, None, with_gradient=True)
    assert found.stuck.tolist() == [False, True]  # 0 · ∞ is NaN
    assert found.gradient.isfinite().all()


class Rough(nn.Module):
    """Takes everything for class 1: what a claim of success looks like."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, images):
        self.calls.append(len(images))
        return linear(images) * 0.01 + torch.tensor([0.0, 5.0, 0.0])


def test_what_a_faster_copy_claims_is_confirmed_by_the_model():
    calls, fast = [], Rough()

    def model(images):
        calls.append(len(images))
        return linear(images)

    three = points([0.9, 0.1, 0.1, 0.5], [0.1, 0.4, 0.1, 0.5], [0.9, 0.1, 0.1, 0.5])
    goal = Goal(torch.zeros(3, dtype=torch.long))
    oracle = Oracle(model, gradient_model=fast)
    claimed = oracle.evaluate(three, goal, MARGIN, None, with_gradient=True)
    assert claimed.success.tolist() == [True] * 3
    assert claimed.exact.tolist() == [False] * 3
    assert (calls, fast.calls) == ([], [3])
    known = torch.tensor([False, False, True])
    found = oracle.evaluate(three, goal, MARGIN, known, with_gradient=True)
    assert found.success.tolist() == [False, True, False]
    torch.testing.assert_close(found.loss[:2], torch.tensor([-0.6, 0.7]))
    torch.testing.assert_close(found.margin[:2], torch.tensor([-0.6, 0.7]))
    assert found.exact.tolist() == [True, True, False]
    assert found.forward_calls.tolist() == [2, 2, 1]
    assert found.gradient_calls.tolist() == [1, 1, 1]
    assert (calls, fast.calls) == ([2], [3, 3])
    assert oracle.evaluate(three, goal, MARGIN, known, with_gradient=False).exact.tolist() == [True] * 3
    assert calls == [2, 3]


def test_reduced_precision_claims_and_full_precision_confirms():
    seen = []

    def model(images):
        seen.append(torch.is_autocast_enabled("cpu"))
        return nn.functional.linear(images.flatten(1), WEIGHT)

    oracle = Oracle(model, precision="bfloat16")
    found = oracle.evaluate(X, GOAL, MARGIN, torch.tensor([False, False]), with_gradient=True)
    assert seen == [True, False]
    assert found.exact.tolist() == [False, True]
    assert found.gradient.dtype == torch.float32
    oracle.logits(X, GOAL)
    oracle.judge(X, GOAL, MARGIN)
    assert seen[2:] == [False, False]


class Draws(nn.Module):
    """Answers in turn: class 0 by the numbers of a list, else class 1."""

    def __init__(self, wins):
        super().__init__()
        self.wins, self.asked = wins, 0

    def forward(self, images):
        right = self.wins[self.asked % len(self.wins)]
        self.asked += 1
        answer = torch.tensor([1.0, 0.0, -1.0] if right else [0.0, 3.0, -1.0])
        return answer + 0 * images.flatten(1)[:, :1]


def test_a_model_that_draws_is_fooled_by_enough_of_fresh_answers():
    for right in range(DRAWS + 1):
        wins = [True] * right + [False] * (DRAWS - right)
        model = Draws(wins)
        found = Oracle(model, is_random=True).judge(X, GOAL, MARGIN)
        assert found.success.tolist() == [DRAWS - right >= NEEDED] * 2
        # It stops where enough can no longer be reached.
        asked = min(DRAWS, DRAWS - NEEDED + 1) if right > DRAWS - NEEDED else DRAWS
        assert model.asked == asked
        assert found.forward_calls.tolist() == [asked] * 2
        assert found.gradient_calls.tolist() == [0, 0]
        margins = [-1.0 if win else 3.0 for win in wins[:asked]]
        torch.testing.assert_close(found.margin, torch.full((2,), sum(margins) / asked))
        torch.testing.assert_close(found.loss, found.margin)
        assert found.exact.all()


def test_a_success_of_a_model_that_draws_is_only_claimed():
    model = Draws([False])
    oracle = Oracle(model, is_random=True)
    found = oracle.evaluate(X, GOAL, MARGIN, torch.tensor([False, True]), with_gradient=True)
    assert found.success.tolist() == [True, False]
    assert found.exact.tolist() == [False, True]
    assert found.forward_calls.tolist() == [1 + DRAWS, 1]


@pytest.mark.parametrize("samples", [1, 4])
def test_answers_are_averaged(samples):
    model = Draws([True, False, False, True])
    found = Oracle(model, eot_samples=samples).evaluate(X, GOAL, MARGIN, None, with_gradient=True)
    assert model.asked == samples
    torch.testing.assert_close(found.loss, torch.full((2,), -1.0 if samples == 1 else 1.0))
    assert found.forward_calls.tolist() == found.gradient_calls.tolist() == [samples] * 2
    logits = Oracle(Draws([True, False, False, True]), eot_samples=samples).logits(X, GOAL)
    torch.testing.assert_close(logits[0], torch.tensor([1.0, 0, -1] if samples == 1 else [0.5, 1.5, -1]))


def test_the_first_images_are_checked_and_the_others_are_not():
    def model(images):
        return linear(images) + torch.where(images[:, :, :1, :1].flatten(1) > 0.5, torch.nan, 0.0)

    good = X[1:].expand(2, -1, -1, -1)
    oracle = Oracle(model, unchecked=3)
    oracle.evaluate(good, GOAL, CE, None, with_gradient=False)
    with pytest.raises(ValueError, match=r"NaN or infinite logits \(sample 0\)"):
        oracle.evaluate(X, GOAL, CE, None, with_gradient=False)
    oracle = Oracle(model, unchecked=2)
    oracle.evaluate(good, GOAL, CE, None, with_gradient=False)
    assert oracle.evaluate(X, GOAL, MARGIN, None, with_gradient=False).success.tolist() == [False, True]
    for label in (-1, 3):
        oracle = Oracle(linear, unchecked=2)
        with pytest.raises(ValueError, match=rf"labels must lie in \[0, 2\], .* 3 classes; found {label} \(sample 1\)"):
            oracle.evaluate(X, Goal(torch.tensor([2, label])), lambda z, g: z[:, 0], None, with_gradient=False)


def test_a_loss_may_share_the_models_own_computation():
    """Of features on the way to the logits: both ways to the images count, each once."""
    weight, kept = torch.tensor([[1.0, 2, 0, 0], [0, 1.0, -1, 0]]), []

    def model(images):
        kept[:] = [(images.flatten(1) @ weight.T).square()]
        return nn.functional.pad(kept[0].sin(), (0, 1))

    loss = attack_loss(lambda logits, labels: logits[:, 1] + kept[0][:, 0])
    found = Oracle(model).evaluate(X, GOAL, loss, None, with_gradient=True)
    leaf = X.clone().requires_grad_()
    value = model(leaf)[:, 1] + kept[0][:, 0]
    torch.testing.assert_close(found.loss, value.detach())
    torch.testing.assert_close(found.gradient, torch.autograd.grad(value.sum(), leaf)[0])


def test_half_precision_logits_are_widened():
    assert Oracle(lambda x: linear(x).half()).logits(X, GOAL).dtype == torch.float32
    assert Oracle(lambda x: linear(x.double())).logits(X, GOAL).dtype == torch.float64


def test_gradients_are_found_or_missed_with_a_reason():
    leaf = X.clone().requires_grad_()
    (linear(leaf)[:, 0]).sum()
    gradient = input_gradient(linear(leaf).sum(), leaf)
    torch.testing.assert_close(gradient, WEIGHT.sum(0).view(1, 1, 2, 2).expand_as(X))
    logits = linear(leaf)
    slope = torch.tensor([[1.0, 0, 0], [0, 0, 2.0]])
    torch.testing.assert_close(input_gradient(logits, leaf, slope=slope), (slope @ WEIGHT).view_as(X))
    more = torch.ones_like(X)
    torch.testing.assert_close(input_gradient(linear(leaf).sum(), leaf, more=more), gradient + 1)
    assert input_gradient(torch.ones(2), leaf, more=more) is more
    with pytest.raises(NoGradientError, match=r"^the detector has no gradient with respect to the images"):
        input_gradient(torch.ones(2), leaf, "the detector")
    with pytest.raises(NoGradientError, match=r"^the model has no gradient"):
        input_gradient(linear(X.clone().requires_grad_()).sum(), leaf)
