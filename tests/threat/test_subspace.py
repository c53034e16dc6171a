from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor

from orthattack import alignment
from orthattack.threat.plane import Plane
from orthattack.threat.subspace import Subspace
from tests.conftest import examples, gradient_kinds, image_kinds, make_gradient, make_images, seeds

epsilons = st.sampled_from([0.5 / 255, 4 / 255, 8 / 255, 0.3])
dtypes = st.sampled_from([torch.float32, torch.float64])
direction_kinds = st.sampled_from(["image", "brightness", "three", "channels", "dependent", "zero"])


def make_directions(kind: str, images: Tensor, seed: int) -> Tensor:
    """(N, K, C, H, W), the kinds that `ThreatModel` builds and those on which a Newton matrix is singular."""
    x, ones = images, torch.ones_like(images)
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 7), dtype=torch.float64).to(x.dtype)
    eye = torch.eye(x.shape[1], dtype=x.dtype).view(1, x.shape[1], x.shape[1], 1, 1)
    if kind == "channels":
        return torch.cat([x.unsqueeze(1) * eye, eye.expand(len(x), -1, -1, *x.shape[2:])], dim=1)
    rows = {
        "image": [x],
        "brightness": [x, ones],
        "three": [x, ones, 1e3 * other],
        "dependent": [x, ones, x / 2, 0 * x, other, ones],
        "nearly dependent": [x, ones, 2 * x - ones],  # but for the rounding
        "zero": [0 * x],
    }[kind]
    return torch.stack(rows, dim=1)


def around(images: Tensor, eps: float, directions: str, seed: int) -> tuple[Subspace, Tensor]:
    """The points within eps of the images on the planes, and the directions of those."""
    b = make_directions(directions, images, seed)
    return Subspace(images, (images - eps).clamp(0), (images + eps).clamp(max=1), b), b


def per_sample(images: Tensor, value: float) -> Tensor:
    return torch.full((len(images), 1, 1, 1), value, dtype=images.dtype)


def noisy(images: Tensor, size: float, seed: int) -> Tensor:
    """Points around the images, some of them outside the bounds."""
    return images + size * make_gradient("normal", images, seed + 3)


def vector(tensor: Tensor) -> np.ndarray:
    return tensor.double().flatten().numpy()


def rows(directions: Tensor) -> np.ndarray:
    """An orthonormal basis (k, n) of the only sample's directions, by another method than the one under test."""
    b = directions.double().flatten(2)[0].numpy()
    b = b / np.maximum(np.linalg.norm(b, axis=1, keepdims=True), 1e-300)
    _, sizes, basis = np.linalg.svd(b, full_matrices=False)
    return basis[sizes > 1e-12]


def assert_feasible(subspace: Subspace, directions: Tensor, points: Tensor) -> None:
    """The box exactly, and every direction that was given, not the basis made of them, in float64."""
    assert points.dtype == subspace.images.dtype
    assert points.isfinite().all()
    assert (points >= subspace.lower).all()
    assert (points <= subspace.upper).all()
    delta = points.double() - subspace.images.double()
    for direction in directions.double().unbind(1):
        assert alignment(delta, direction).abs().max() <= (1e-6 if points.dtype == torch.float32 else 1e-12)


@examples(100)
@given(
    image_kinds,
    gradient_kinds,
    direction_kinds | st.just("nearly dependent"),
    seeds,
    epsilons,
    dtypes,
    st.sampled_from([1e-30, 1e-13, 1.0, 1e20]),
)
def test_everything_it_returns_is_feasible(image, gradient, directions, seed, eps, dtype, scale):
    x = make_images(image, (2, 3, 12, 12), seed, dtype)
    subspace, b = around(x, eps, directions, seed)
    points = subspace.nearest(noisy(x, eps, seed))
    assert_feasible(subspace, b, points)
    assert_feasible(subspace, b, subspace.nearest(noisy(x, eps, seed), per_sample(x, eps / 2)))
    for k, start in enumerate((x, points)):
        y = subspace.step(start, make_gradient(gradient, x, seed + k, scale), per_sample(x, eps / 4))
        assert_feasible(subspace, b, y)
        assert (y - start).abs().max() <= eps / 4 + 2e-7


@given(image_kinds, direction_kinds, seeds, dtypes, st.booleans())
def test_a_gradient_in_the_span_moves_nothing(image, directions, seed, dtype, is_zero):
    x = make_images(image, (2, 3, 12, 12), seed, dtype)
    subspace, b = around(x, 8 / 255, directions, seed)
    start = subspace.nearest(noisy(x, 8 / 255, seed))
    weights = torch.randn(b.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    g = torch.einsum("k,nkchw->nchw", weights, b.double() / b.double().abs().max().clamp(min=1)).to(dtype)
    assert torch.equal(subspace.step(start, 0 * g if is_zero else g, per_sample(x, 2 / 255)), start)


def solve_linear_program(g, b, start, low, high, alpha):
    """The optimal value of <g, y - start> by scipy, scaled and without what the planes take away: its tolerances are
    absolute."""
    g = g - (g @ b.T) @ b
    size = np.abs(g).max()
    if size == 0:
        return 0.0
    solved = linprog(
        -g / size,
        A_eq=b if len(b) else None,
        b_eq=np.zeros(len(b)) if len(b) else None,
        bounds=np.stack([np.maximum(low - start, -alpha), np.minimum(high - start, alpha)], axis=1) / alpha,
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    assert solved.status == 0, solved.message
    return -alpha * size * solved.fun


@examples(150)
@given(image_kinds, gradient_kinds, direction_kinds, seeds, epsilons, dtypes, st.booleans())
def test_step_agrees_with_linprog(image, gradient, directions, seed, eps, dtype, moved):
    if image == "sparse" or gradient == "sparse":
        dtype = torch.float64  # where few pixels count, settling them on float32's grid costs more than the bound
    x = make_images(image, (1, 3, 16, 16), seed, dtype)
    g = make_gradient(gradient, x, seed)
    subspace, b = around(x, eps, directions, seed)
    start, alpha = (subspace.nearest(noisy(x, eps, seed)), eps / 4) if moved else (x, eps)
    y = subspace.step(start, g, per_sample(x, alpha))
    g, s, low, high = (vector(t) for t in (g, start, subspace.lower, subspace.upper))
    gap = solve_linear_program(g, rows(b), s, low, high, alpha) - g @ (vector(y) - s)
    assert abs(gap) <= 5e-5 * alpha * np.abs(g).sum()


@given(image_kinds, gradient_kinds, st.sampled_from(["brightness", "three", "channels"]), seeds)
def test_ascend_keeps_the_components_of_a_start_off_the_planes(image, gradient, directions, seed):
    """So that a step can be orthogonal to a direction that the perturbation is not orthogonal to."""
    x = make_images(image, (2, 3, 12, 12), seed, torch.float64)
    subspace, b = around(x, 0.1, directions, seed)
    start = noisy(x, 0.1, seed).clamp(subspace.lower, subspace.upper)
    y = subspace.ascend(start, make_gradient(gradient, x, seed), per_sample(x, 0.05))
    assert (y >= subspace.lower).all()
    assert (y <= subspace.upper).all()
    assert (y - start).abs().max() <= 0.05 + 1e-15
    for direction in b.unbind(1):
        assert alignment(y - start, direction).abs().max() <= 1e-8


def solve_quadratic_program(points, x, b, low, high, shrink):
    """min ½‖y - p‖² + μ‖y - x‖₁ on box and planes by scipy, with y - x split into its positive and negative parts."""
    n = len(x)

    def value(parts):
        delta = parts[:n] - parts[n:]
        rest = x + delta - points
        return 0.5 * rest @ rest + shrink * parts.sum(), np.concatenate([rest, -rest]) + shrink

    planes = np.concatenate([b, -b], axis=1)
    solved = minimize(
        value,
        np.zeros(2 * n),
        jac=True,
        bounds=np.stack([np.zeros(2 * n), np.concatenate([high - x, x - low])], axis=1),
        constraints={"type": "eq", "fun": lambda parts: planes @ parts, "jac": lambda parts: planes} if len(b) else (),
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return x + solved.x[:n] - solved.x[n:]


@given(image_kinds, direction_kinds, seeds, st.sampled_from([0.0, 0.02, 0.1]))
def test_nearest_agrees_with_a_quadratic_program_solver(image, directions, seed, shrink):
    x = make_images(image, (1, 3, 2, 2), seed, torch.float64)
    subspace, b = around(x, 0.1, directions, seed)
    p = noisy(x, 0.1, seed)
    y = subspace.nearest(p, per_sample(x, shrink) if shrink else None)
    low, high = vector(subspace.lower), vector(subspace.upper)
    expected = solve_quadratic_program(vector(p), vector(x), rows(b), low, high, shrink)
    np.testing.assert_allclose(vector(y), expected, atol=1e-5)


@given(image_kinds, direction_kinds, seeds, epsilons, dtypes, st.sampled_from([0.0, 0.3, 1.0]))
def test_nearest_obeys_the_variational_inequality(image, directions, seed, eps, dtype, shrink):
    """<p - y, q - y> <= μ (‖q - x‖₁ - ‖y - x‖₁) for every feasible q: what makes y the optimum."""
    x = make_images(image, (1, 3, 16, 16), seed, dtype)
    subspace, _ = around(x, eps, directions, seed)
    p = noisy(x, eps, seed)
    y = subspace.nearest(p, per_sample(x, shrink * eps))
    p, x64, y64 = p.double(), x.double(), y.double()
    others = [x, subspace.nearest(noisy(x, eps, seed + 1)), subspace.step(y, p.to(dtype) - y, per_sample(x, 2 * eps))]
    for q in others:
        q64 = q.double()
        rise = shrink * eps * ((q64 - x64).abs().sum() - (y64 - x64).abs().sum())
        assert float(((p - y64) * (q64 - y64)).sum()) <= rise + 1e-5 * float((p - x64).norm() ** 2)


@given(image_kinds, direction_kinds, seeds, epsilons, dtypes)
def test_points_of_the_region_are_their_own_projection(image, directions, seed, eps, dtype):
    x = make_images(image, (2, 3, 12, 12), seed, dtype)
    subspace, _ = around(x, eps, directions, seed)
    y = subspace.nearest(noisy(x, eps, seed))
    if image != "sparse" or dtype == torch.float64:
        torch.testing.assert_close(subspace.nearest(y), y, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-12)
    assert torch.equal(subspace.nearest(x), x)
    assert subspace.settle(y) is y


@given(image_kinds, gradient_kinds, seeds, epsilons, st.sampled_from(["image", "channel"]))
def test_the_image_alone_gives_the_plane(image, gradient, seed, eps, scope):
    """Two unrelated methods for the same problems: a bracketed multiplier and Newton's method."""
    x = make_images(image, (1, 3, 16, 16), seed, torch.float64)
    b = x.unsqueeze(1) if scope == "image" else x.unsqueeze(1) * torch.eye(3, dtype=x.dtype).view(1, 3, 3, 1, 1)
    low, high = (x - eps).clamp(0), (x + eps).clamp(max=1)
    plane, subspace = Plane(x, low, high, scope), Subspace(x, low, high, b)
    g, p, alpha = make_gradient(gradient, x, seed), noisy(x, eps, seed), per_sample(x, eps)
    for shrink in (None, alpha / 2):
        torch.testing.assert_close(subspace.nearest(p, shrink), plane.nearest(p, shrink), rtol=0, atol=1e-6)
    gained = [float((g * (s.step(x, g, alpha) - x)).sum()) for s in (plane, subspace)]
    slack = 1e-12 * float(g.abs().sum())  # of a gradient parallel to the image only round-off is left
    assert abs(gained[0] - gained[1]) <= eps * (1e-5 * float(subspace.tangent(g).abs().sum()) + slack)


@given(image_kinds, direction_kinds, seeds, st.sampled_from([1e-4, 1 / 255, 8 / 255]))
def test_settling_does_not_give_the_perturbation_up(image, directions, seed, eps):
    x = make_images(image, (2, 3, 16, 16), seed)
    subspace, b = around(x, eps, directions, seed)
    exact = Subspace(x.double(), subspace.lower.double(), subspace.upper.double(), b)
    rough = exact.nearest(noisy(x, eps, seed).double()).float().clamp(subspace.lower, subspace.upper)
    y = subspace.settle(rough)
    assert_feasible(subspace, b, y)
    if eps >= 1 / 255 and image != "sparse":  # of a plane through a dozen pixels float32 has few points
        assert (y - rough).abs().mean() <= 0.01 * eps


def test_the_newton_matrix_is_regularised_by_a_little_of_its_trace():
    x = make_images("uniform", (2, 3, 8, 8), 0)
    subspace, _ = around(x, 0.1, "three", 0)
    f = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]], dtype=torch.float64)
    expected = f / (1 + 1e-12 + 1e-10 * 3)  # of an orthonormal basis the matrix is that of the identity
    torch.testing.assert_close(subspace._solve(torch.ones_like(x).double(), f), expected, rtol=1e-11, atol=0)


def test_a_step_ends_when_its_certificate_says_so(monkeypatch):
    searches = []
    newton = Subspace._newton
    monkeypatch.setattr(Subspace, "_newton", lambda self, *args: searches.append(1) or newton(self, *args))
    x = make_images("uniform", (2, 3, 16, 16), 0)
    subspace, _ = around(x, 8 / 255, "three", 0)
    subspace._ascend(x, make_gradient("normal", x, 0), per_sample(x, 2 / 255))
    assert len(searches) == 4  # of at most 9


def test_settling_tries_one_pixel_then_one_at_a_bound_then_two_and_each_time_others(monkeypatch):
    tried, few = [], Subspace._few
    monkeypatch.setattr(Subspace, "_few", lambda self, *args: tried.append(args[2:]) or few(self, *args))
    images = torch.full((1, 1, 2, 4), 0.5)
    off = images + torch.linspace(0.1, 0.2, 8).view_as(images)
    subspace = Subspace(images, off, off, make_directions("image", images, 0))  # no room at all
    assert torch.equal(subspace.settle(off), images)
    assert tried[:6] == [(0, 1), (0, 1), (0, 2), (1, 1), (1, 1), (1, 2)]


def test_points_whose_pixels_are_all_at_bounds_settle_inwards():
    images = torch.full((1, 1, 2, 4), 0.5)
    images[0, 0, 0] += torch.tensor([1e-3, 0, 2e-3, 0])
    subspace, _ = around(images, 0.1, "image", 0)
    for signs in ([1, -1, 1, -1] * 2, [-1, 1, -1, 1] * 2):
        start = torch.where(torch.tensor(signs).view_as(images) > 0, subspace.upper, subspace.lower)
        points = subspace.settle(start)
        assert alignment(points - images, images).abs().max() <= 1e-6
        assert (points - start).abs().max() < 1e-2


@pytest.mark.parametrize("directions", ["image", "three", "channels", "dependent"])
def test_a_batch_is_its_samples(directions):
    x = torch.cat([make_images(kind, (1, 3, 16, 16), 0) for kind in ("uniform", "8-bit", "sparse", "white", "black")])
    g = torch.cat([make_gradient(kind, x[:1], 0) for kind in ("normal", "heavy", "sparse", "zero", "one-sided")])
    b, alpha, p = make_directions(directions, x, 0), torch.tensor([1, 2, 4, 8, 16]).view(-1, 1, 1, 1) / 255, x + 0.1 * g
    low, high = (x - 8 / 255).clamp(0), (x + 8 / 255).clamp(max=1)

    def results(rows: slice) -> list[Tensor]:
        subspace = Subspace(x[rows], low[rows], high[rows], b[rows])
        step = subspace.step(x[rows], g[rows], alpha[rows])
        return [step, subspace.nearest(p[rows]), subspace.nearest(p[rows], alpha[rows])]

    together = results(slice(None))
    for i in range(len(x)):
        for batch, alone in zip(together, results(slice(i, i + 1)), strict=True):
            assert torch.equal(batch[i], alone[0])
