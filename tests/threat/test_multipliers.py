"""The quick search for several multipliers: what it says it has found is right, and on ordinary images it finds it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orthattack.threat import multipliers, subspace
from orthattack.threat.multipliers import SMALL
from orthattack.threat.subspace import Subspace
from tests.conftest import examples, gradient_kinds, image_kinds, make_gradient, make_images, seeds
from tests.threat.test_subspace import (
    around,
    assert_feasible,
    direction_kinds,
    make_directions,
    noisy,
    per_sample,
    rows,
    solve_linear_program,
    vector,
)

RADII = {1: 3.0, 2: 0.5}


@pytest.fixture
def found(monkeypatch) -> list[Tensor]:
    """Which samples the quick search has found, in the order of the calls."""
    known: list[Tensor] = []
    for name in ("best_step", "in_ball"):
        search = getattr(multipliers, name)
        monkeypatch.setattr(
            subspace, name, lambda *a, search=search: (r := search(*a), known.append(r[1].flatten()))[0]
        )
    return known


def step_of(s: Subspace, start: Tensor, gradient: Tensor, alpha: Tensor, looked: int) -> tuple[Tensor, Tensor]:
    """The step that `best_step` finds, and of which samples."""
    g, size = s._projected(gradient)
    low, high = torch.maximum(s.lower - start, -alpha), torch.minimum(s.upper - start, alpha)
    scratch = [torch.empty_like(g) for _ in range(3)]
    y, found = multipliers.best_step(g, size, low, high, s._near, s._peaks, alpha, 1e-5, looked, scratch)
    return (start + y).clamp(s.lower, s.upper), found.flatten() & (size > 0).flatten()


@examples(40)
@given(image_kinds, gradient_kinds, direction_kinds, seeds, st.sampled_from([1, 8]), st.sampled_from([12, 32]))
def test_a_step_that_is_said_to_be_found_is_the_best(image, gradient, directions, seed, looked, side):
    x = make_images(image, (2, 3, side, side), seed)
    s, b = around(x, 8 / 255, directions, seed)
    g, alpha = make_gradient(gradient, x, seed), per_sample(x, 8 / 255)
    y, is_found = step_of(s, x, g, alpha, looked)
    tangent = s.tangent(g).double()
    best = ((s._ascend(x, g, alpha).double() - x) * tangent).sum((1, 2, 3))
    mine = ((y.double() - x) * tangent).sum((1, 2, 3))
    slack = 3e-5 * 8 / 255 * tangent.abs().sum((1, 2, 3))  # the gap of either, and of float32
    assert (mine >= best - slack)[is_found].all()
    assert ((y >= s.lower) & (y <= s.upper)).flatten(1).all(1)[is_found].all()
    delta = (y.double() - x).flatten(1)
    for direction in b.double().flatten(2).unbind(1):
        off = (delta * direction).sum(1).abs()
        assert (off <= 2e-6 * delta.norm(dim=1) * direction.norm(dim=1) + 1e-30)[is_found].all()


@pytest.mark.parametrize("directions", ["brightness", "three", "channels"])
@pytest.mark.parametrize("image", ["uniform", "8-bit", "dark", "white"])
def test_a_step_on_some_of_the_pixels_agrees_with_linprog(image, directions, found):
    x = make_images(image, (1, 3, 32, 32), 1)
    assert x.numel() > SMALL
    s, b = around(x, 4 / 255, directions, 1)
    g, alpha = make_gradient("normal", x, 1), 2 / 255
    start = s.nearest(noisy(x, 4 / 255, 1))
    found.clear()
    y = s.step(start, g, per_sample(x, alpha))
    assert any(bool(f.all()) for f in found) or image not in ("uniform", "8-bit")
    assert_feasible(s, b, y)
    gain = np.dot(vector(g), vector(y) - vector(start))
    best = solve_linear_program(vector(g), rows(b), vector(start), vector(s.lower), vector(s.upper), alpha)
    assert abs(best - gain) <= 2e-5 * alpha * float(g.abs().sum())


@given(image_kinds, direction_kinds, seeds, st.sampled_from([1, 2]), st.sampled_from([torch.float32, torch.float64]))
def test_what_it_finds_in_a_ball_is_the_nearest_point(image, directions, seed, order, dtype):
    """<p - y, q - y> <= 0 for every q in ball, box and planes: what makes y the optimum."""
    x = make_images(image, (2, 3, 12, 12), seed, dtype)
    s, _ = around(x, 1.0, directions, seed)
    radius = torch.full((2, 1, 1, 1), RADII[order], dtype=torch.float64)
    p = noisy(x, 0.1, seed)
    scratch = [torch.empty_like(x) for _ in range(4)]
    d, is_found = multipliers.in_ball(p - x, s.lower - x, s.upper - x, s._near, radius, order, scratch)
    d, distance2 = d.double(), ((p - x).double() ** 2).sum((1, 2, 3))
    size = torch.linalg.vector_norm(d.flatten(1), order, dim=1)
    assert (size <= RADII[order] * (1 + 1e-6))[is_found.flatten()].all()
    for k in range(3):
        q = Subspace(x.double(), s.lower.double(), s.upper.double(), s._directions)
        other = q.nearest_in_l1_ball if order == 1 else q.nearest_in_l2_ball
        e = other(noisy(x, 0.1, seed + k).double(), radius) - x.double()
        product = (((p - x).double() - d) * (e - d)).sum((1, 2, 3))
        assert (product <= 3e-6 * distance2)[is_found.flatten()].all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_on_ordinary_images_nothing_is_left_to_the_slow_search(norm, found):
    x = torch.cat([make_images(kind, (1, 3, 64, 64), 3) for kind in ("uniform", "8-bit", "dark")])
    s, b = around(x, 8 / 255 if norm == "linf" else 1.0, "channels", 0)
    g, radius = make_gradient("normal", x, 0), torch.full((3, 1, 1, 1), {"l1": 20.0}.get(norm, 1.0)).double()
    if norm == "linf":
        y = s.step(x, g, per_sample(x, 2 / 255))
    else:
        y = {"l2": s.nearest_in_l2_ball, "l1": s.nearest_in_l1_ball}[norm](x + 0.02 * g, radius)
    assert_feasible(s, b, y)
    assert len(found) == 1
    assert found[0].all()


def test_a_step_is_found_for_any_ordinary_gradient(found):
    """Also where the sample that is looked at first has nothing to correct."""
    x = make_images("uniform", (60, 3, 48, 48), 0)
    s, _ = around(x, 8 / 255, "brightness", 0)
    s.step(x, make_gradient("normal", x, 0), per_sample(x, 2 / 255))
    assert len(found) == 1


@pytest.mark.parametrize("directions", ["brightness", "channels"])
def test_a_large_batch_is_its_samples(directions):
    x = torch.cat([make_images(kind, (1, 3, 48, 48), 0) for kind in ("uniform", "8-bit", "sparse", "white", "black")])
    g = torch.cat([make_gradient(kind, x[:1], 0) for kind in ("normal", "heavy", "sparse", "zero", "one-sided")])
    b, alpha, radius = make_directions(directions, x, 0), per_sample(x, 2 / 255), 0 * per_sample(x, 0).double() + 2

    def results(which: slice) -> list[Tensor]:
        low, high = (x - 8 / 255).clamp(0)[which], (x + 8 / 255).clamp(max=1)[which]
        s, points = Subspace(x[which], low, high, b[which]), (x + 0.1 * g)[which]
        in_balls = [s.nearest_in_l2_ball(points, radius[which]), s.nearest_in_l1_ball(points, 5 * radius[which])]
        return [s.step(x[which], g[which], alpha[which]), s.nearest(points), *in_balls]

    together = results(slice(None))
    for i in range(len(x)):
        for batch, alone in zip(together, results(slice(i, i + 1)), strict=True):
            assert torch.equal(batch[i], alone[0])
