"""σ-zero and Sparse-RS: against the published iteration, and against all supports of a linear model."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from orthattack import Bisection, OrthoSigmaZero, OrthoSparseRS, SigmaZero, SparseRS
from tests.attacks.test_attacks import Recorder, drawn, small_model
from tests.attacks.test_family import seeded


def published(model, inputs, labels, steps):
    """The points that σ-zero evaluates, as in the authors' code, of one channel and with steps of L-infinity."""
    delta, mean, square = (torch.zeros_like(inputs) for _ in range(3))
    tau, size, seen = torch.full((len(inputs), 1, 1, 1), 0.3), 1.0, []
    for i in range(steps):
        seen.append(inputs + delta)
        leaf = delta.clone().requires_grad_()
        with torch.enable_grad():
            logits = model(inputs + leaf)
            others = logits.scatter(1, labels[:, None], -math.inf).amax(1)
            lead = logits.gather(1, labels[:, None]).squeeze(1) - others
            count = (leaf.square() / (leaf.square() + 1e-3)).flatten(1).mean(1)
            (g,) = torch.autograd.grad((lead.clamp(min=0) + count).sum(), leaf)
        fools = (lead < 0).view(-1, 1, 1, 1)
        g = g / g.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
        mean, square = mean.lerp(g, 0.1), 0.999 * square + 0.001 * g * g
        adam = mean / (1 - 0.9 ** (i + 1)) / ((square / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
        delta = (inputs + delta - size * adam).clamp(0, 1) - inputs
        size = 0.1 + 0.9 * (1 + math.cos(math.pi * i / steps)) / 2
        tau = (tau + torch.where(fools, 0.01 * size, -0.01 * size)).clamp(0, 1)
        delta = torch.where(delta.abs() < tau, 0, delta)
    return seen


def test_sigma_zero_is_the_published_iteration():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 4)).double().eval()
    images = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    labels = model(images).argmax(1)
    recorder = Recorder(model)
    result = SigmaZero(recorder, steps=25, optimize="none").run(images, labels)
    own = [x for x in recorder.seen if len(x) == 5][:25]
    for k, (mine, theirs) in enumerate(zip(own, published(model, images, labels, 25), strict=True)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, msg=f"point {k}")
    assert result.success.all()
    assert (result.gradient_calls == 25).all()


class Linear(nn.Module):
    """Two classes of images of 3×3 pixels, the second ahead by ⟨w, x⟩ - b."""

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = nn.Parameter(w.flatten()), b

    def forward(self, x):
        lead = x.flatten(1) @ self.w.to(x) - self.b
        return torch.stack([torch.zeros_like(lead), lead], 1)


def linear(seed):
    generator = torch.Generator().manual_seed(seed)
    image, w = torch.rand(1, 3, 3, 3, generator=generator), torch.randn(3, 3, 3, generator=generator)
    return image, w


def gains(image, w, ortho):
    """By number of pixels, the most that ⟨w, δ⟩ can be: of all supports, each by a linear program."""
    x, c = (t.double().reshape(3, 9).numpy() for t in (image[0], w))
    found = [0.0]
    for count in range(1, 5):
        best = -np.inf
        for support in combinations(range(9), count):
            at, gain = x[:, support].ravel(), c[:, support].ravel()
            plane = {"A_eq": at[None], "b_eq": [0.0]} if ortho else {}
            best = max(best, -linprog(-gain, bounds=np.stack([-at, 1 - at], 1), **plane).fun)
        found.append(best)
    return found


@pytest.mark.parametrize("kind", [SparseRS, OrthoSparseRS])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_sparse_rs_comes_close_to_the_best_of_all_supports(kind, seed):
    image, w = linear(seed)
    best = gains(image, w, kind is OrthoSparseRS)[2]
    start = float((w * image[0]).sum())
    model = Linear(w, start + 10 * best)  # never fooled
    result = kind(model, eps=2, queries=600 if kind is SparseRS else 300, generator=seeded()).run(
        image, torch.tensor([0])
    )
    gain = float(((result.adversarials - image)[0].double() * w.double()).sum())
    assert result.norm.tolist() == [2]
    assert result.cosine.max() <= 1e-6 or kind is SparseRS
    assert 0.95 * best <= gain <= best * (1 + 1e-5)


@pytest.mark.parametrize("kind", [SigmaZero, OrthoSigmaZero])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_sigma_zero_needs_hardly_more_pixels_than_the_fewest_of_all(kind, seed):
    image, w = linear(seed)
    most = gains(image, w, kind is OrthoSigmaZero)
    start = float((w * image[0]).sum())
    for fewest in (1, 2, 3):
        needed = (most[fewest - 1] + most[fewest]) / 2
        result = kind(Linear(w, start + needed), steps=100).run(image, torch.tensor([0]))
        assert result.success.all()
        assert fewest <= float(result.norm) <= fewest + 1
        assert result.cosine.max() <= 1e-6 or kind is SigmaZero


def test_sparse_rs_exchanges_fewer_and_fewer_pixels_and_keeps_what_raises_the_margin():
    model, (images, _) = Recorder(small_model()), drawn(n=3)
    labels = model.model(images).argmax(1)
    result = SparseRS(model, eps=20, queries=400, generator=seeded()).run(images, labels)
    seen = torch.stack([x for x in model.seen if len(x) == 3][-400:])
    assert ((seen != images).any(2).flatten(2).sum(2) <= 20).all()
    moved = seen[(seen != images).any(2, keepdim=True).expand_as(seen)]
    assert torch.isin(moved, torch.tensor([0.0, 1.0])).all()
    with torch.no_grad():
        margins = torch.stack(
            [
                -model.model(x).gather(1, labels[:, None]).squeeze(1)
                + model.model(x).scatter(1, labels[:, None], -math.inf).amax(1)
                for x in seen
            ]
        )
    best = margins.cummax(0)
    torch.testing.assert_close(result.loss, best.values[-1])
    before = torch.stack([seen[best.indices[k], torch.arange(3)] for k in range(399)])
    changed = (seen[1:] != before).any(2).flatten(2).sum(2).float()
    assert changed[0].max() >= 5  # 30 % of 20 leave and as many come
    assert changed.max() <= 12
    assert changed[-40:].max() <= 2


def test_the_fewest_pixels_of_an_attack_are_a_whole_number():
    model, (images, _) = small_model(), drawn(n=6)
    labels = model(images).argmax(1)
    result = Bisection(SparseRS(model, eps=4, queries=60, generator=seeded()), max_eps=36, trials=12).run(
        images, labels
    )
    assert result.success.all()
    assert torch.equal(result.norm, result.norm.round())
    assert (result.forward_calls <= 1 + 8 * 60).all()  # 4, 2 or 8, ... until neighbours: of 36, never twelve radii
