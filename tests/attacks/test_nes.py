"""NES: gradients from differences of scores, within a budget of queries."""

from __future__ import annotations

import re

import pytest
import torch

from orthattack import NES, PGD, OrthoNES, OrthoPGD
from tests.attacks.test_attacks import Recorder, drawn, linear_model, small_model
from tests.attacks.test_family import RADII


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("kind", [NES, OrthoNES])
def test_the_budget_of_queries_is_kept_and_counted(kind, seeded):
    model, (images, labels) = Recorder(small_model()), drawn(n=3)
    attack = kind(model, queries=50, pairs=4, generator=torch.Generator().manual_seed(0))
    assert (attack.steps, attack.alpha) == (5, pytest.approx(2.5 * 4 / 255 / 5))  # 5 (2 * 4 + 1) + 1 = 46
    result = attack.run(images, labels, seeds=range(3) if seeded else None)
    assert result.forward_calls.tolist() == [46] * 3
    assert (result.gradient_calls == 0).all()
    assert sum(len(points) == 3 for points in model.seen) <= 46 + 3  # and the looks at what the model is like
    early = attack.replace(eps=0.3, early_stop=True).run(images, labels)
    assert (early.forward_calls <= 46).all()
    assert early.forward_calls.sum() < 46 * 3


def test_the_estimate_is_the_sum_of_differences_times_the_noise():
    """On a linear model, (L(x + σu) - L(x - σu)) / 2σ = ⟨w, u⟩, so that the gradient is the mean of ⟨w, u⟩ u."""
    model, (images, _) = linear_model(dtype=torch.float64), drawn(n=2)
    images, labels = images.double() * 0.2 + 0.4, torch.tensor([0, 1])
    weight = (model[1].weight[1 - labels] - model[1].weight[labels]).detach().view(2, 3, 6, 6)
    seen = Recorder(model)
    result = NES(seen, "l2", 0.1, queries=2 * 3 + 2, pairs=3, alpha=0.1).run(images, labels, seeds=[4, 5])
    pairs = [points for points in seen.seen if points.shape == images.shape and not torch.equal(points, images)][:6]
    noise = [(up - images) / 1e-3 for up in pairs[::2]]
    for up, down in zip(pairs[::2], pairs[1::2], strict=True):
        torch.testing.assert_close(up - images, images - down, atol=1e-12, rtol=0)
    expected = sum((weight * u).sum((1, 2, 3), keepdim=True) * u for u in noise)
    moved = result.adversarials - images
    torch.testing.assert_close(
        moved, 0.1 * expected / expected.flatten(1).norm(dim=1).view(-1, 1, 1, 1), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(("kind", "gradient"), [(NES, PGD), (OrthoNES, OrthoPGD)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_with_queries_enough_it_comes_near_what_gradients_reach(kind, gradient, norm):
    model, (images, _) = small_model(), drawn(n=8)
    labels = model(images).argmax(1)
    eps = 2 * RADII[norm]
    alike = {"loss": "margin", "schedule": "fixed"}
    best = gradient(model, norm, eps, steps=20, random_start=False, **alike).run(images, labels)
    found = kind(model, norm, eps, queries=1000, pairs=20).run(images, labels, seeds=range(8))
    start = -(model(images).topk(2).values.diff().abs().squeeze(1)).detach()
    assert ((found.loss - start) >= 0.6 * (best.loss - start)).all()
    assert found.success.sum() >= best.success.sum() - 1


def test_a_model_that_leaves_torch_is_attacked():
    model, (images, labels) = small_model(), drawn(n=4)

    def outside(x):
        with torch.no_grad():
            return torch.from_numpy(model(x).numpy().copy())

    result = OrthoNES(outside, eps=0.2, queries=200, pairs=5).run(images, labels)
    assert result.success.any()
    assert result.cosine.max() <= 1e-6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"queries": 51}, "queries must be at least 2 * pairs + 2 = 52, for one step; got 51"),
        ({"pairs": 0}, "pairs must be an integer >= 1; got 0"),
        ({"sigma": 0}, "sigma must be a finite distance > 0, in pixel units; got 0"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        NES(small_model(), **options)
