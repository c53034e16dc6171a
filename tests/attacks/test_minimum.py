"""The search for the smallest norm, against closed forms and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from orthattack import Bisection, MinimumNorm, OrthoMinimumNorm, OrthoPGD
from orthattack.eval.attacks.load import attack_kind
from tests.attacks.test_attacks import Recorder, drawn, small_model
from tests.attacks.test_family import make, norms, seeded

pytestmark = pytest.mark.heavy

ORDER = {"linf": math.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": math.inf}


def plane(distance: float, norm: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A linear model of two classes, images of one channel well inside the bounds, and the weights; the boundary is at
    `distance` from the first image."""
    generator = seeded(3)
    images = 0.4 + 0.2 * torch.rand(4, 1, 5, 5, generator=generator)
    weights = torch.randn(25, generator=generator)
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 2))
    bias = distance * torch.linalg.vector_norm(weights, DUAL[norm]) - weights @ images[0].flatten()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([weights, torch.zeros(25)]))
        model[1].bias.copy_(torch.stack([bias, torch.zeros(())]))
    return model.eval(), images, weights


def smallest_dual(weights: torch.Tensor, image: torch.Tensor, order: float) -> float:
    """min over λ of the norm of w - λx, convex in λ: a search by thirds."""
    w, x = weights.double(), image.double().flatten()
    low, high = -50.0, 50.0
    for _ in range(200):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        f, g = (float(torch.linalg.vector_norm(w - t * x, order)) for t in (a, b))
        low, high = (low, b) if f < g else (a, high)
    return float(torch.linalg.vector_norm(w - (low + high) / 2 * x, order))


@norms
@pytest.mark.parametrize("kind", [MinimumNorm, OrthoMinimumNorm])
def test_of_a_linear_model_it_is_the_closed_form(kind, norm):
    """max ⟨w, δ⟩ over the unit ball is the dual norm of w, and over the part orthogonal to x that of w - λx."""
    model, images, weights = plane({"linf": 0.02, "l2": 0.1, "l1": 0.15}[norm], norm)
    with torch.no_grad():
        logits = model(images)
    result = kind(model, norm, gradients=100).run(images, logits.argmax(1))
    assert result.success.all()
    margin = (logits[:, 0] - logits[:, 1]).abs().double()
    for k in range(len(images)):
        dual = (
            float(torch.linalg.vector_norm(weights.double(), DUAL[norm]))
            if kind is MinimumNorm
            else smallest_dual(weights, images[k], DUAL[norm])
        )
        expected = float(margin[k]) / dual
        assert expected * (1 - 1e-4) <= result.norm[k] <= 1.01 * expected
    assert kind is MinimumNorm or result.cosine.max() <= 1e-6


@pytest.mark.parametrize("levels", [0.3, 1.6, 7.4])
def test_in_8_bits_it_is_the_smallest_number_of_levels_that_fools(levels):
    """k levels change the logits' difference by k ‖w‖₁ / 255 at most; less than one is nothing."""
    model, images, weights = plane(levels / 255, "linf")
    images = (images * 255).round() / 255
    with torch.no_grad():
        logits = model(images)
    result = MinimumNorm(model, gradients=40, levels=256).run(images, logits.argmax(1))
    margin = (logits[:, 0] - logits[:, 1]).abs().double()
    fewest = (margin * 255 / weights.double().abs().sum()).floor() + 1
    assert fewest[0] == math.ceil(levels)  # rounding the image moves its margin by less
    torch.testing.assert_close(result.norm * 255, fewest, rtol=0, atol=1e-9)
    assert result.success.all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_in_8_bits_orthogonality_finds_what_fixed_radii_find(norm):
    model, images, _ = plane({"linf": 0.6 / 255, "l2": 2.5 / 255}[norm], norm)
    images = (images * 255).round() / 255
    labels = model(images).argmax(1)
    result = OrthoMinimumNorm(model, norm, gradients=40, levels=256).run(images, labels)
    other = Bisection(OrthoPGD(model, norm=norm, eps=64 / 255, levels=256), trials=12).run(images, labels)
    assert result.success.all()
    assert other.success.all()
    assert (result.norm <= other.norm + 1.01 / 255).all()
    assert (result.cosine == 0).all()


@norms
def test_of_a_small_network_it_is_what_brute_force_finds(norm):
    """Images of two pixels: every perturbation of a fine grid is tried."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[1].weight.mul_(4)
        model[3].weight.mul_(3)
    axis = torch.linspace(0, 1, 801)
    grid = torch.cartesian_prod(axis, axis)
    images = torch.rand(8, 1, 1, 2, generator=seeded(1))
    with torch.no_grad():
        labels, classes = model(images).argmax(1), model(grid.view(-1, 1, 1, 2)).argmax(1)
    result = MinimumNorm(model, norm, gradients=100).run(images, labels)
    assert len(set(classes.tolist())) >= 3
    for k in range(len(images)):
        other = grid[classes != labels[k]] - images[k].flatten()
        expected = float(torch.linalg.vector_norm(other, ORDER[norm], dim=1).min())
        assert result.norm[k] <= 1.01 * expected + 1 / 800


@norms
@pytest.mark.parametrize("gradients", [1, 2, 7, 20, 33, 60])
def test_no_budget_is_exceeded(norm, gradients):
    """Gradients, and passes forward and backward together, as the model sees them and as they are counted."""
    model, (images, labels) = Recorder(small_model()), drawn(n=3)
    result = MinimumNorm(model, norm, gradients=gradients).run(images, labels)
    assert (result.gradient_calls <= gradients).all()
    assert (result.forward_calls + result.gradient_calls <= 2 * gradients).all()
    assert sum(len(batch) == 3 for batch in model.seen) <= result.forward_calls.max()
    attacked = result.norm > 0
    assert (result.gradient_calls[attacked] >= 0.8 * gradients - 3).all()
    assert (result.gradient_calls[~attacked] == 0).all()


@norms
def test_more_gradients_find_smaller_norms(norm):
    model, (images, _) = small_model(), drawn(n=12)
    labels = model(images).argmax(1)
    few, many = (MinimumNorm(model, norm, gradients=k).run(images, labels) for k in (10, 150))
    assert many.success.all()
    assert (many.norm / few.norm.where(few.success, torch.inf)).mean() < 0.999
    bisected = Bisection(make("PGD", model, norm, loss="margin", steps=12), trials=12).run(images, labels)
    assert (many.norm / bisected.norm).mean() <= 1.01


@norms
def test_it_does_not_depend_on_the_scale_of_the_logits(norm):
    model, (images, _) = small_model(), drawn(n=6)
    labels = model(images).argmax(1)
    found = [
        MinimumNorm(lambda x, s=s: s * model(x), norm, gradients=40).run(images, labels).norm for s in (1, 1e-3, 1e3)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-2, atol=0)


def test_nothing_beyond_a_largest_radius_is_found():
    model, (images, _) = small_model(), drawn(n=8)
    labels = model(images).argmax(1)
    free = MinimumNorm(model, "l2", gradients=40).run(images, labels)
    eps = float(free.norm.median())
    held = MinimumNorm(model, "l2", eps=eps, gradients=40).run(images, labels)
    assert held.norm.max() <= eps * (1 + 1e-6)
    assert 0 < held.success.sum() < 8


def test_the_nearest_class_is_found_behind_a_likelier_one():
    """Two boundaries: the class with the larger logit is farther away, for its logit hardly grows."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [0, 50, 0, 0]]))
        model[1].bias.copy_(torch.tensor([1.0, 0.2, -30.0]))
    image = torch.full((1, 1, 2, 2), 0.5)
    result = MinimumNorm(model, "l2", gradients=40).run(image, torch.tensor([0]))
    torch.testing.assert_close(result.norm, torch.tensor([6.0 / 50], dtype=torch.float64), rtol=1e-2, atol=0)


def test_an_attack_in_place_of_a_model_is_told_of_bisection():
    attack = OrthoPGD(small_model())
    with pytest.raises(ValueError, match=r"needs a model; got OrthoPGD: .* use Bisection\(OrthoPGD\(...\)\)"):
        MinimumNorm(attack)
    with pytest.raises(ValueError, match=r"use Bisection\(Bisection"):
        OrthoMinimumNorm(Bisection(attack))
    with pytest.raises(ValueError, match="gradients must be an integer >= 1; got 0"):
        MinimumNorm(small_model(), gradients=0)


def test_a_suite_s_minimum_norm_of_an_attack_goes_on_to_be_a_bisection():
    assert attack_kind("MinimumNorm").card.family == "MinimumNorm"
    assert attack_kind("MinimumNorm").card.scope is None
    assert attack_kind("OrthoMinimumNorm", {"gradients": 5}).card.scope == "image"
    for name, options in [("MinimumNorm", {"attack": "OrthoPGD"}), ("MinimumNorm", {"trials": 3}), ("Bisection", {})]:
        kind = attack_kind(name, options)
        assert (kind.name, kind.card.family, kind.card.scope, kind.card.minimal) == (name, "Bisection", "image", True)
