"""Groups of a few pixels: against bisection and a linear program's solver in float64, and what a nudge may do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from orthattack.threat import few


def columns(seed: int, count: int, pixels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """δ, n, low and high: some pixels dark, dim, negative, or unable to move to one side or at all."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(share: float) -> Tensor:
        return torch.rand(pixels, count, generator=generator) < share

    normal = torch.rand(pixels, count, generator=generator, dtype=dtype)
    normal = torch.where(drawn(0.1), 1e-3 * normal, torch.where(drawn(0.1), 0.0, normal))
    normal = torch.where(drawn(0.2), -normal, normal)
    low, high = (-0.1 * torch.rand(pixels, count, generator=generator, dtype=dtype) * ~drawn(0.2) for _ in range(2))
    return 0.1 * torch.randn(pixels, count, generator=generator, dtype=dtype), normal, low, -high


def by_bisection(delta: Tensor, normal: Tensor, low: Tensor, high: Tensor, shrink: Tensor) -> Tensor:
    delta, normal, low, high, shrink = (t.double() for t in (delta, normal, low, high, shrink))
    a = torch.full(delta.shape[1:], -1e5, dtype=torch.float64)
    b, found = -a, delta
    for _ in range(120):
        middle = (a + b) / 2
        moved = delta - middle * normal
        found = (moved.sign() * (moved.abs() - shrink).clamp(min=0)).clamp(low, high)
        is_left = (found * normal).sum(0) > 0
        a, b = torch.where(is_left, middle, a), torch.where(is_left, b, middle)
    return found


@given(
    st.integers(0, 10**6), st.sampled_from([2, 3, 4]), st.booleans(), st.sampled_from([torch.float32, torch.float64])
)
def test_the_nearest_point_is_that_of_bisection(seed, pixels, shrinks, dtype):
    delta, normal, low, high = columns(seed, 200, pixels, dtype)
    shrink = 0.05 * torch.rand(200, dtype=dtype) if shrinks else torch.zeros(200, dtype=dtype)
    found = few.nearest(delta, normal, low, high, shrink if shrinks else None)
    unit = torch.finfo(dtype).eps
    assert bool(((found >= low) & (found <= high)).all())
    size = ((delta.abs() + shrink) * normal.abs()).sum(0)
    assert bool(((found * normal).sum(0).abs() <= 20 * unit * size).all())
    exact = by_bisection(delta, normal, low, high, shrink)

    def value(d: Tensor) -> Tensor:
        d = d.double()
        return (0.5 * (d - delta.double()).square() + shrink.double() * d.abs()).sum(0)

    # On the plane but for round-off, it costs no more than the best point does.
    assert bool((value(found) <= value(exact) + 200 * unit * delta.double().abs().sum(0)).all())


@given(st.integers(0, 10**6), st.sampled_from([0.003, 0.05, 0.4, 50.0]), st.sampled_from([2, 3]))
def test_the_best_sparse_move_is_the_linear_programs(seed, alpha, pixels):
    count = 6
    g, normal, low, high = columns(seed, count, pixels, torch.float64)
    g = g - normal * (g * normal).sum(0) / normal.square().sum(0).clamp(min=1e-12)
    move, spent = few.best_sparse(g, normal, high, -low, alpha, 2)
    assert bool(((move >= low - 1e-12) & (move <= high + 1e-12)).all())
    assert float((move * normal).sum(0).abs().max()) <= 1e-12
    assert float(move.abs().sum()) <= alpha * (1 + 1e-12)
    assert spent >= float(move.abs().sum()) * (1 - 1e-12)
    # d = up - down, both at least 0: the norm is their sum.
    planes = np.zeros((count, pixels, count))
    planes[np.arange(count), :, np.arange(count)] = normal.numpy().T
    equal = planes.reshape(count, -1)
    gain = g.numpy().ravel()
    best = linprog(
        np.concatenate([-gain, gain]),
        A_ub=np.ones((1, 2 * gain.size)),
        b_ub=[alpha],
        A_eq=np.concatenate([equal, -equal], 1),
        b_eq=np.zeros(count),
        bounds=np.stack([np.zeros(2 * gain.size), np.concatenate([high.numpy().ravel(), -low.numpy().ravel()])], 1),
    )
    assert best.status == 0
    assert -best.fun * (1 - 1e-4) - 1e-9 <= float((g * move).sum()) <= -best.fun + 1e-9


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 0.01), (torch.float64, 2e-5)])
def test_a_nudge_restores_most_columns_and_moves_none_far(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(3, 4000, generator=generator) * 256).floor().div(255).clamp(max=1).to(dtype)
    delta = scale * torch.randn(3, 4000, generator=generator, dtype=torch.float64)
    x = images.double()
    delta -= x * (delta * x).sum(0) / x.square().sum(0).clamp(min=1e-9)
    points = (x + delta).clamp(0, 1).to(dtype)
    low, high = torch.zeros_like(images), torch.ones_like(images)
    allowed = 0.75 * (1e-6 if dtype == torch.float32 else 1e-12)

    def lost(y: Tensor) -> Tensor:
        d = y.double() - x
        return (d * x).sum(0).abs() > allowed * d.norm(dim=0) * x.norm(dim=0)

    free = ((points > 0) & (points < 1)).all(0)
    found = few.nudged(points, images, images, low, high, allowed)
    assert bool(((found >= low) & (found <= high)).all())
    far = (found - points).abs().amax(0) / torch.finfo(dtype).eps
    assert float(far.max()) <= 128
    assert float((far > 16).double().mean()) < 0.05
    assert torch.equal(found[:, ~lost(points)], points[:, ~lost(points)])
    assert float((lost(points) & free).double().mean()) > 0.5
    assert int((lost(found) & free).sum()) < 0.01 * int((lost(points) & free).sum())
