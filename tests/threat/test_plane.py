from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, linprog, minimize
from torch import Tensor

from orthattack import ThreatModel, alignment
from orthattack.threat import plane as plane_module
from orthattack.threat import sets, sparse
from orthattack.threat.blocks import Blocks
from orthattack.threat.plane import Plane
from orthattack.threat.sets import Free
from tests.conftest import examples, gradient_kinds, image_kinds, make_gradient, make_images, scopes, seeds

epsilons = st.sampled_from([0.5 / 255, 4 / 255, 8 / 255, 0.3])


def box(images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (images - eps).clamp(0), (images + eps).clamp(max=1)


def groups(tensor: Tensor, scope: str) -> np.ndarray:
    """(groups, n) in float64."""
    t = tensor.double()
    if scope == "image":
        return t.flatten(1).numpy()
    if scope == "channel":
        return t.flatten(2).flatten(0, 1).numpy()
    return t.movedim(1, -1).flatten(0, 2).numpy()


def linear_program(g, x, start, low, high, alpha):
    """The optimal value of <g, y - start> by scipy, all arguments (n,) float64."""
    bounds = np.stack([np.maximum(low, start - alpha) - x, np.minimum(high, start + alpha) - x], axis=1)
    solved = linprog(-g, A_eq=x[None], b_eq=[0.0], bounds=bounds, method="highs")
    assert solved.status == 0, solved.message
    return -solved.fun - g @ (start - x)


def dual_value(multiplier, g, x, start, low, high, alpha):
    """The Lagrangian's maximum over the box: an upper bound of the linear program for any multiplier."""
    reduced = g - multiplier * x
    low, high = np.maximum(low, start - alpha) - x, np.minimum(high, start + alpha) - x
    return np.where(reduced > 0, high * reduced, low * reduced).sum() - g @ (start - x)


def smallest_dual_value(g, x, start, low, high, alpha):
    """The minimum over all multipliers, by trying every breakpoint: the dual is piecewise linear between them."""
    breakpoints = g[x != 0] / x[x != 0]
    return min(dual_value(m, g, x, start, low, high, alpha) for m in [0.0, *breakpoints])


def grid_free(scope, dtype):
    """float64 for pixels: on float32's grid three numbers cannot balance to 1e-6 and be optimal to 1e-5."""
    return torch.float64 if scope == "pixel" else dtype


def best_step(image, gradient, scope, seed, eps, shape, moved, dtype=torch.float32, scale=1.0):
    """A drawn problem and its solution: float64 rows g, x, start, low, high, the step size, and y."""
    x = make_images(image, shape, seed, dtype)
    g = make_gradient(gradient, x, seed, scale)
    low, high = box(x, eps)
    plane = Plane(x, low, high, scope)
    start, alpha = x, eps
    if moved:
        noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 2), dtype=dtype) * 2 - 1
        start, alpha = plane.settle(plane.nearest((x + eps * noise).clamp(0, 1))), eps / 4
    y = plane.settle(plane.step(start, g, alpha))
    return [groups(t, scope) for t in (g / scale, x, start, low, high)], alpha, y, groups(y, scope)


def assert_feasible(x, start, low, high, alpha, y):
    assert np.isfinite(y).all()
    assert (y >= low).all()
    assert (y <= high).all()
    assert (np.abs(y - start) <= alpha + 2e-7).all()
    delta = y - x
    along = np.abs((delta * x).sum(1))
    assert (along <= 1e-6 * np.linalg.norm(delta, axis=1) * np.linalg.norm(x, axis=1)).all()


@examples(60)
@given(image_kinds, gradient_kinds, scopes, seeds, epsilons, st.booleans())
def test_step_is_feasible_and_within_1e5_of_linprog(image, gradient, scope, seed, eps, moved):
    dtype = grid_free(scope, torch.float32)
    (g, x, start, low, high), alpha, _, y = best_step(image, gradient, scope, seed, eps, (1, 3, 32, 32), moved, dtype)
    assert_feasible(x, start, low, high, alpha, y)
    step = 1 if scope != "pixel" else 97  # a sample of the thousand pixels
    for row in range(0, len(g), step):
        problem = (g[row], x[row], start[row], low[row], high[row], alpha)
        optimum = linear_program(*problem)
        gained = g[row] @ (y[row] - start[row])
        # Of a gradient parallel to the image, what the plane leaves to gain is round-off; and one pixel has a grid.
        slack = 2e-7 * np.abs(g[row]).max()
        if "parallel" in gradient:
            slack = 1e-6 * np.linalg.norm(g[row]) * (alpha * len(g[row]) ** 0.5 + np.linalg.norm(start[row] - x[row]))
        assert abs(gained - optimum) <= 1e-5 * abs(optimum) + slack


@given(image_kinds, gradient_kinds, scopes, seeds, epsilons)
def test_step_on_images_with_negative_pixels_is_within_1e5_of_linprog(image, gradient, scope, seed, eps):
    """Bounds (-1, 1): where a pixel is negative, its product with the image is largest at the bottom of its range."""
    x = 2 * make_images(image, (1, 3, 8, 8), seed, torch.float64) - 1
    g = make_gradient(gradient, x, seed)
    low, high = (x - eps).clamp(min=-1), (x + eps).clamp(max=1)
    plane = Plane(x, low, high, scope)
    y = groups(plane.settle(plane.step(x, g, eps)), scope)
    gs, xs, lows, highs = (groups(t, scope) for t in (g, x, low, high))
    assert_feasible(xs, xs, lows, highs, eps, y)
    for row in range(0, len(gs), 1 if scope != "pixel" else 7):
        optimum = linear_program(gs[row], xs[row], xs[row], lows[row], highs[row], eps)
        slack = 1e-6 * eps * np.linalg.norm(gs[row]) * len(gs[row]) ** 0.5  # as above, where g is parallel to x
        assert abs(gs[row] @ (y[row] - xs[row]) - optimum) <= 1e-5 * abs(optimum) + slack


@given(image_kinds, gradient_kinds, scopes, seeds, epsilons, st.booleans(), st.sampled_from([1e-30, 1e-13, 1e20]))
def test_step_has_no_duality_gap(image, gradient, scope, seed, eps, moved, scale):
    """The certificate that needs no oracle: the primal value reaches the smallest dual value."""
    shape = (1, 3, 8, 8)
    problem, alpha, _, y = best_step(image, gradient, scope, seed, eps, shape, moved, torch.float64, scale)
    g, x, start, low, high = problem
    for row in range(0, len(g), 1 if scope != "pixel" else 7):
        dual = smallest_dual_value(g[row], x[row], start[row], low[row], high[row], alpha)
        primal = g[row] @ (y[row] - start[row])
        assert abs(dual - primal) <= 1e-7 * alpha * np.abs(g[row]).sum() + 1e-15


@given(image_kinds, gradient_kinds, scopes, seeds)
def test_step_beats_every_vertex_by_brute_force(image, gradient, scope, seed):
    """All combinations of bounds, with each pixel in turn settling the equation: the vertices of the polytope."""
    shape, dtype = (1, 3, 1, 2), torch.float64
    (g, x, start, low, high), alpha, _, y = best_step(image, gradient, scope, seed, 0.1, shape, False, dtype)
    for gi, xi, si, li, hi, yi in zip(g, x, start, low, high, y, strict=True):
        sides = list(itertools.product(*zip(np.maximum(li, si - alpha), np.minimum(hi, si + alpha), strict=True)))
        for side in np.array(sides):
            for j in np.flatnonzero(xi):
                vertex = side.copy()
                vertex[j] = xi[j] - ((side - xi) @ xi - (side[j] - xi[j]) * xi[j]) / xi[j]
                if li[j] <= vertex[j] <= hi[j]:
                    assert gi @ (vertex - si) <= gi @ (yi - si) + 1e-6 * alpha * np.abs(gi).sum()


@given(image_kinds, scopes, seeds, st.sampled_from(["zero", "parallel"]), st.booleans())
def test_step_without_a_direction_stays(image, scope, seed, gradient, moved):
    (_, _, start, *_), _, _, y = best_step(image, gradient, scope, seed, 8 / 255, (2, 3, 16, 16), moved)
    np.testing.assert_array_equal(y, start)


@given(gradient_kinds, scopes, seeds)
def test_on_a_black_image_only_the_box_binds(gradient, scope, seed):
    (g, *_), alpha, _, y = best_step("black", gradient, scope, seed, 8 / 255, (2, 3, 4, 4), False)
    np.testing.assert_allclose(y, alpha * (g > 0), atol=1e-9)


@given(gradient_kinds, scopes, seeds)
def test_a_white_image_cannot_move(gradient, scope, seed):
    _, _, y, _ = best_step("white", gradient, scope, seed, 8 / 255, (2, 3, 4, 4), False)
    assert (y == 1).all()


@given(image_kinds, scopes, seeds, epsilons, st.floats(0.0, 1.0), st.sampled_from([torch.float32, torch.float64]))
def test_nearest_agrees_with_a_float64_root_find(image, scope, seed, eps, spread, dtype):
    dtype = grid_free(scope, dtype)
    x = make_images(image, (2, 3, 12, 12), seed, dtype)
    low, high = box(x, eps)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    p = x + spread * noise
    result = groups(Plane(x, low, high, scope).nearest(p), scope)
    rows = [groups(t, scope) for t in (p, x, low, high)]
    for row in range(0, len(result), 1 if scope != "pixel" else 11):
        pi, xi, li, hi = (r[row] for r in rows)

        def residual(multiplier, pi=pi, xi=xi, li=li, hi=hi):
            return (np.clip(pi - multiplier * xi, li, hi) - xi) @ xi

        limit = 2 * (np.abs(pi).max() + 2) / xi[xi > 0].min() if (xi > 0).any() else 1.0
        ends = residual(-limit), residual(limit)
        multiplier = 0.0 if abs(ends[0] - ends[1]) < 1e-15 else None
        if multiplier is None:
            multiplier = (
                -limit if ends[0] <= 0 else limit if ends[1] >= 0 else brentq(residual, -limit, limit, xtol=1e-15)
            )
        expected = np.clip(pi - multiplier * xi, li, hi)
        assert np.linalg.norm(result[row] - expected) <= 2e-5 * np.linalg.norm(pi - xi) + 1e-5


@examples(15)
@given(image_kinds, seeds)
def test_nearest_agrees_with_a_quadratic_program_solver(image, seed):
    x = make_images(image, (1, 3, 2, 2), seed, torch.float64)
    low, high = box(x, 0.1)
    p = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    result = Plane(x, low, high, "image").nearest(p).flatten().numpy()
    xs, ps, ls, hs = (t.flatten().numpy() for t in (x, p, low, high))
    solved = minimize(
        lambda y: 0.5 * ((y - ps) ** 2).sum(),
        xs,
        jac=lambda y: y - ps,
        bounds=np.stack([ls, hs], axis=1),
        constraints={"type": "eq", "fun": lambda y: (y - xs) @ xs, "jac": lambda y: xs} if xs.any() else (),
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(result, solved.x, atol=1e-5)


def shrunken_nearest(p, x, low, high, shrink):
    """min ½‖y - p‖² + μ‖y - x‖₁ on box and plane by scipy, with y - x split into what is added and what is taken."""
    n = len(x)

    def value(parts):
        rest = x + parts[:n] - parts[n:] - p
        return 0.5 * rest @ rest + shrink * parts.sum(), np.concatenate([rest, -rest]) + shrink

    plane = np.concatenate([x, -x])
    solved = minimize(
        value,
        np.zeros(2 * n),
        jac=True,
        bounds=np.stack([np.zeros(2 * n), np.concatenate([high - x, x - low])], axis=1),
        constraints={"type": "eq", "fun": lambda parts: plane @ parts, "jac": lambda parts: plane} if x.any() else (),
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return x + solved.x[:n] - solved.x[n:]


@examples(60)
@given(image_kinds, scopes, seeds, st.sampled_from([0.005, 0.02, 0.1]))
def test_nearest_with_a_threshold_agrees_with_a_quadratic_program_solver(image, scope, seed, shrink):
    x = make_images(image, (1, 3, 2, 2), seed, torch.float64)
    low, high = box(x, 0.1)
    p = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = Plane(x, low, high, scope).nearest(p, torch.full((1, 1, 1, 1), shrink, dtype=torch.float64))
    for result, *problem in zip(*(groups(t, scope) for t in (y, p, x, low, high)), strict=True):
        np.testing.assert_allclose(result, shrunken_nearest(*problem, shrink), atol=1e-5)


@given(image_kinds, scopes, seeds, epsilons, st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_nearest_with_a_threshold_obeys_the_variational_inequality(image, scope, seed, eps, share):
    """<p - y, q - y> <= μ (‖q - x‖₁ - ‖y - x‖₁) for every feasible q, each sample with a μ of its own."""
    x = make_images(image, (2, 3, 10, 10), seed, torch.float64)
    low, high = box(x, eps)
    plane = Plane(x, low, high, scope)
    p, a, b = (x + 2 * eps * make_gradient("normal", x, seed + k) for k in range(3))
    shrink = eps * torch.tensor([share, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    y = plane.nearest(p, shrink)
    assert (y >= low).all()
    assert (y <= high).all()
    others = [x, plane.nearest(a), plane.nearest(b), plane.nearest(p), plane.nearest(a, shrink)]
    for q in others:
        gained = ((p - y) * (q - y)).sum((1, 2, 3))
        rise = ((q - x).abs() - (y - x).abs()).sum((1, 2, 3)) * shrink.flatten()
        assert (gained <= rise + 1e-6 * (p - x).square().sum((1, 2, 3))).all()


@given(scopes, seeds)
def test_a_threshold_above_everything_leaves_the_image(scope, seed):
    x = make_images("8-bit", (2, 3, 6, 6), seed, torch.float64)
    p = x + 0.2 * make_gradient("normal", x, seed)
    shrink = (p - x).abs().amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(Plane(x, *box(x, 0.1), scope).nearest(p, shrink), x, rtol=0, atol=1e-14)


@given(image_kinds, scopes, seeds, epsilons)
def test_nearest_obeys_the_variational_inequality(image, scope, seed, eps):
    """<p - y, q - y> <= 0 for every feasible q: what makes y the projection of p."""
    x = make_images(image, (1, 3, 10, 10), seed, torch.float64)
    low, high = box(x, eps)
    plane = Plane(x, low, high, scope)
    p, a, b = (x + 0.2 * make_gradient("normal", x, seed + k) for k in range(3))
    y = plane.nearest(p)
    for q in (x, plane.nearest(a), plane.nearest(b)):
        assert float(((p - y) * (q - y)).sum()) <= 1e-5 * float((p - x).norm() ** 2)


@given(image_kinds, scopes, seeds, epsilons)
def test_points_on_the_plane_are_their_own_projection(image, scope, seed, eps):
    x = make_images(image, (2, 3, 16, 16), seed, grid_free(scope, torch.float32))
    plane = Plane(x, *box(x, eps), scope)
    y = plane.nearest(x + 0.2 * make_gradient("normal", x, seed))
    torch.testing.assert_close(plane.nearest(y), y, rtol=0, atol=2e-6)
    torch.testing.assert_close(plane.nearest(x), x, rtol=0, atol=1e-7)


@given(image_kinds, scopes, seeds, st.sampled_from([1e-6, 1e-4, 1 / 255, 8 / 255]))
def test_settled_points_are_orthogonal_as_stored(image, scope, seed, eps):
    x = make_images(image, (2, 3, 16, 16), seed)
    low, high = box(x, eps)
    plane = Plane(x, low, high, scope)
    rough = plane.nearest(x + eps * make_gradient("normal", x, seed))
    y = plane.settle(rough)
    assert (y >= low).all()
    assert (y <= high).all()
    assert alignment(y.double() - x.double(), x.double(), scope).abs().max() <= 1e-6
    if eps >= 1 / 255:  # settling repairs round-off; it does not give the perturbation up
        assert (y - rough).abs().mean() <= 0.01 * eps


def test_images_whose_squares_neither_overflow_nor_vanish_are_their_own_normal():
    unit = make_images("uniform", (1, 3, 4, 4), 0).clamp(0.5)
    for exponent, is_own in ((0, True), (16, True), (17, False), (-15, True), (-17, False)):
        x = unit * 2.0**exponent
        assert (Plane(x, 0 * x, 2 * x, "image").normal is x) is is_own


@pytest.mark.parametrize("sign", [1, -1])
def test_a_box_is_wide_beside_rounding_whatever_the_sign_of_its_image(sign):
    x = sign * (1 - 0.5 * make_images("uniform", (1, 3, 16, 16), 0))
    for width, is_wide in ((0.003, False), (0.006, True)):  # for 768 pixels, beside 1e6 units of round-off
        assert Plane(x, x - width / 2, x + width / 2, "image")._is_coarse is is_wide


def test_what_is_left_of_a_gradient_nearly_parallel_to_the_image_is_orthogonal_to_it():
    x = make_images("uniform", (4, 3, 16, 16), 0)
    plane = Plane(x, 0 * x, 0 * x + 1, "image")
    tangent = plane.unit_tangent(x + 1e-5 * make_gradient("normal", x, 0))
    torch.testing.assert_close(tangent.flatten(1).norm(dim=1), torch.ones(4))
    assert alignment(tangent, x).abs().max() <= 1e-5


@pytest.mark.parametrize("alpha", [0.5, 1e3])
def test_an_l1_step_leaves_black_pixels_without_a_gradient_alone(alpha):
    x, g = make_images("uniform", (2, 3, 16, 16), 0), make_gradient("normal", torch.zeros(2, 3, 16, 16), 0)
    x[..., 3:5], g[..., 3:5] = 0, 0
    y = Plane(x, 0 * x, 0 * x + 1, "image").sparse_step(x, g, torch.full((2, 1, 1, 1), alpha), 1)
    assert (y != x).any()
    assert torch.equal(y[..., 3:5], x[..., 3:5])


def test_settling_leaves_good_points_alone():
    x = make_images("uniform", (2, 3, 16, 16), 0)
    plane = Plane(x, *box(x, 8 / 255), "image")
    y = plane.settle(plane.nearest(x + 0.1 * make_gradient("normal", x, 0)))
    assert plane.settle(y) is y


@pytest.mark.parametrize(("scope", "searches", "products"), [("image", 100, 1300), ("channel", 120, 1800)])
def test_an_l1_step_takes_few_searches_and_those_few_products(monkeypatch, scope, searches, products):
    counts, search, dot = [0, 0], sparse.search, sparse.dot

    def counted(which, function):
        def call(*args):
            counts[which] += 1
            return function(*args)

        return call

    monkeypatch.setattr(sparse, "search", counted(0, search))
    monkeypatch.setattr(sparse, "dot", counted(1, dot))
    for seed in range(2):
        x, eps = make_images("uniform", (2, 3, 16, 16), seed), 8 / 255
        plane = Plane(x, (x - eps).clamp(0), (x + eps).clamp(max=1), scope)
        for count in (1, 7):
            plane.sparse_step(x, make_gradient("normal", x, seed), torch.full((2, 1, 1, 1), 0.5), count)
    assert counts[0] <= searches
    assert counts[1] <= products


def soft_and_clipped(points: Tensor, x: Tensor, low: Tensor, high: Tensor, radius: float, scope: str) -> np.ndarray:
    """The nearest point in the L1 ball, (groups, n), by bisection of μ and, for each, of every group's λ."""
    p, n, lower, upper = (groups(t, scope) for t in (points, x, low, high))

    def at(mu: float) -> np.ndarray:
        a, b = np.full((len(n), 1), -1e4), np.full((len(n), 1), 1e4)
        for _ in range(70):
            middle = (a + b) / 2
            v = p - n - middle * n
            d = np.clip(np.sign(v) * np.maximum(np.abs(v) - mu, 0), lower - n, upper - n)
            above = (d * n).sum(1, keepdims=True) > 0
            a, b = np.where(above, middle, a), np.where(above, b, middle)
        return d

    below, above = 0.0, float(np.abs(p - n).max()) * 1e3
    if np.abs(at(0.0)).sum() <= radius:
        return n + at(0.0)
    for _ in range(70):
        middle = (below + above) / 2
        below, above = (middle, above) if np.abs(at(middle)).sum() > radius else (below, middle)
    return n + at(above)


@examples(60)
@given(
    st.sampled_from(["uniform", "8-bit", "mixed", "dark"]),
    gradient_kinds,
    st.sampled_from(["image", "channel"]),
    seeds,
    st.sampled_from([0.1, 1.0, 6.0]),
    st.sampled_from([0.02, 0.4]),
)
def test_the_nearest_point_in_an_l1_ball_is_that_of_nested_bisections(image, gradient, scope, seed, radius, size):
    x = make_images(image, (1, 3, 6, 6), seed, torch.float64)
    low, high = box(x, 0.3)
    points = x + size * make_gradient(gradient, x, seed)
    y = Plane(x, low, high, scope).nearest_in_l1_ball(points, torch.full((1, 1, 1, 1), radius, dtype=torch.float64))
    expected = soft_and_clipped(points, x, low, high, radius, scope)
    np.testing.assert_allclose(groups(y, scope), expected, rtol=0, atol=2e-6 * (1 + radius))


@pytest.mark.parametrize("scope", [None, "image", "channel", "block8"])
@pytest.mark.parametrize("image", ["uniform", "8-bit"])
def test_an_l1_balls_thresholds_are_mostly_found_by_newtons_method(monkeypatch, image, scope):
    monkeypatch.delattr(plane_module, "by_threshold")
    monkeypatch.delattr(sets, "by_threshold")
    x = make_images(image, (2, 3, 32, 32), 0)
    bounds = 0 * x, 0 * x + 1
    make = {None: lambda: Free(x, *bounds), "block8": lambda: Blocks(x, *bounds, "block8")}
    allowed = make.get(scope, lambda: Plane(x, *bounds, scope))()
    for seed, (size, share) in enumerate(itertools.product((0.003, 0.05), (0.3, 0.8))):
        points = allowed.nearest(x + size * make_gradient("normal", x, seed))
        radius = share * (points - x).double().abs().sum((1, 2, 3), keepdim=True)
        y = allowed.nearest_in_l1_ball(points, radius)
        norm = (y - x).double().abs().sum((1, 2, 3), keepdim=True)
        torch.testing.assert_close(norm, radius, rtol=3e-5, atol=0)


@pytest.mark.parametrize("scope", ["image", "channel", "pixel", "block4"])
def test_a_batch_is_its_samples(scope):
    x = torch.cat([make_images(kind, (1, 3, 16, 16), 0) for kind in ("uniform", "8-bit", "saturated", "white", "dark")])
    g = torch.cat([make_gradient(kind, x[:1], 0) for kind in ("normal", "heavy", "sparse", "zero", "one-sided")])
    low, high = box(x, 8 / 255)
    radius, alpha = torch.full((len(x), 1, 1, 1), 1.0, dtype=torch.float64), torch.full((len(x), 1, 1, 1), 0.3)

    def results(i: slice) -> list[Tensor]:
        made = Blocks if scope == "block4" else Plane
        allowed, points = made(x[i], low[i], high[i], scope), x[i] + 0.1 * g[i]
        return [
            allowed.step(x[i], g[i], 2 / 255),
            allowed.nearest(points),
            allowed.sparse_step(x[i], g[i], alpha[i], 20),
            allowed.nearest_in_l1_ball(points, radius[i]),
        ]

    together = results(slice(None))
    for i in range(len(x)):
        for batch, alone in zip(together, results(slice(i, i + 1)), strict=True):
            assert torch.equal(batch[i], alone[0])


def test_only_samples_that_newton_does_not_find_are_searched_again(monkeypatch):
    asked, by_threshold = [], plane_module.by_threshold

    def spy(allowed, points, radius, *how):
        asked.append(len(points))
        return by_threshold(allowed, points, radius, *how)

    monkeypatch.setattr(plane_module, "by_threshold", spy)
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(8, 3, 8, 8, generator=generator)
    points = x + 6 * torch.randn(x.shape, generator=generator)
    threat = ThreatModel("l1", 6.0, scope="image")
    together = threat.around(x).project(points)
    assert 0 < sum(asked) < 8
    alone = [threat.around(x[k : k + 1]).project(points[k : k + 1]) for k in range(8)]
    assert torch.equal(together, torch.cat(alone))
