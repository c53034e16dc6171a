"""The best step by Triton kernels: on a GPU, or else on a CPU by Triton's interpreter."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orthattack import ThreatModel
from orthattack.threat import plane as plane_module
from orthattack.threat.plane import Plane
from tests.conftest import examples, gradient_kinds, image_kinds, make_gradient, make_images, seeds
from tests.pretend import OnGpu, pretended
from tests.threat.test_plane import assert_feasible, groups, smallest_dual_value

HAS_GPU = torch.cuda.is_available()
VERSION = version("triton") if importlib.util.find_spec("triton") is not None else "0.0"
# Earlier ones compile the kernels, but their interpreter fails at loops, or at functions that kernels call.
CAN_RUN = VERSION != "0.0" and (HAS_GPU or tuple(map(int, VERSION.split(".")[:2])) >= (3, 7))
pytestmark = pytest.mark.skipif(not CAN_RUN, reason="needs Triton 3.7, or a GPU and any Triton")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")
DEVICE = "cuda" if HAS_GPU else "cpu"
BLOCK = 512
EPS = 8 / 255


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):  # the interpreter's infinities
        yield


def fused(plane: Plane, start: Tensor, gradient: Tensor, alpha: float | Tensor) -> Tensor:
    """`Plane.step` by the kernels, whatever the size of the groups."""
    from orthattack.threat.fused import best_step

    count = plane._normal2.numel()
    given = start, gradient, plane.images, plane.lower, plane.upper, plane.normal
    rows = [t.reshape(count, -1).to(DEVICE) for t in given]
    sizes = torch.as_tensor(alpha).expand_as(plane._normal2).flatten().contiguous().to(DEVICE)
    return best_step(*rows, *torch.empty_like(torch.stack(rows[:2])), alpha=sizes, block=BLOCK).cpu().view_as(start)


def around(x: Tensor, eps: float, scope: str, low: float = 0.0, normal: Tensor | None = None) -> Plane:
    return Plane(x, (x - eps).clamp(min=low), (x + eps).clamp(max=1), scope, normal)


def inside(plane: Plane, eps: float, seed: int) -> Tensor:
    """A point of the set, away from the images."""
    noise = torch.rand(plane.images.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return plane.settle(plane.nearest((plane.images + eps * noise).clamp(plane.lower, plane.upper)))


@examples(24)
@given(
    image_kinds, gradient_kinds, st.sampled_from(["image", "channel"]), seeds, st.booleans(), st.booleans(),
    st.sampled_from([1.0, 1e-30, 1e30]),
)  # fmt: skip
def test_a_step_is_feasible_and_has_no_duality_gap(image, gradient, scope, seed, moved, negative, scale):
    x = make_images(image, (1, 3, 16, 16), seed)
    x = 2 * x - 1 if negative else x
    g = make_gradient(gradient, x, seed, scale)
    plane = around(x, EPS, scope, -1.0 if negative else 0.0)
    start, alpha = (inside(plane, EPS, seed), EPS / 4) if moved else (x, EPS)
    y, present = fused(plane, start, g, alpha), plane.step(start, g, alpha)
    rows = [groups(t, scope) for t in (g.double() / scale, x, start, plane.lower, plane.upper, y, present)]
    assert_feasible(*rows[1:5], alpha, rows[5])
    for g1, x1, start1, low, high, y1, present1 in zip(*rows, strict=True):
        optimum = smallest_dual_value(g1, x1, start1, low, high, alpha)
        # Of a gradient parallel to the image, what the plane leaves to gain is round-off.
        slack = 1e-6 * np.linalg.norm(g1) * (alpha * len(g1) ** 0.5 + np.linalg.norm(start1 - x1))
        size = slack if "parallel" in gradient else 1e-6 * alpha * np.abs(g1).sum()
        assert abs(g1 @ (y1 - start1) - optimum) <= size
        assert abs(g1 @ (y1 - present1)) <= size


def mixed_batch() -> tuple[Tensor, Tensor]:
    """Images and gradients of many kinds, the gradient of the first image zero and of the second parallel to it."""
    image, gradient = ["uniform", "mixed", "8-bit", "saturated"], ["zero", "parallel", "sparse", "heavy"]
    scales = [1.0, 1.0, 1e-30, 1e30]
    x = torch.cat([make_images(kind, (1, 3, 16, 16), k) for k, kind in enumerate(image)])
    made = zip(gradient, x.split(1), scales, strict=True)
    return x, torch.cat([make_gradient(kind, each, k, scale) for k, (kind, each, scale) in enumerate(made)])


@pytest.mark.parametrize("scope", ["image", "channel"])
def test_a_sample_does_not_depend_on_its_batch_and_stays_without_a_direction(scope):
    x, g = mixed_batch()
    plane = around(x, EPS, scope)
    start = inside(plane, EPS, 0)
    alpha = torch.linspace(0.1, 1, len(x)).view(-1, 1, 1, 1) * EPS
    y = fused(plane, start, g, alpha)
    assert torch.equal(y[:2], start[:2])
    assert (y[2:] != start[2:]).flatten(1).any(1).all()
    for k in (1, 3):
        alone = fused(around(x[k : k + 1], EPS, scope), start[k : k + 1], g[k : k + 1], alpha[k : k + 1])
        assert torch.equal(alone[0], y[k]), k


@pytest.mark.parametrize("alpha", [1e-3, 1e-5, 3e-7])
def test_what_rounding_takes_off_the_plane_is_put_back(alpha):
    """Equal pixels are all rounded the same way, which tiny steps do not hide."""
    x = torch.full((3, 3, 16, 16), 0.3)
    x[1] = 0.7
    x[2, :, ::2] = 0.6
    g = make_gradient("normal", x, 1)
    plane = around(x, EPS, "image")
    y = fused(plane, x, g, alpha)
    rows = [groups(t, "image") for t in (g, x, x, plane.lower, plane.upper, y)]
    gs, xs, starts, lows, highs, ys = rows
    assert_feasible(xs, starts, lows, highs, alpha, ys)
    gained = (gs * (ys - xs)).sum(1)
    best = [smallest_dual_value(g1, x1, x1, low, high, alpha) for g1, x1, _, low, high, _ in zip(*rows, strict=True)]
    # A pixel moves by whole units of float32's grid, up to 6e-8.
    assert (gained >= np.array(best) - (6e-8 + 1e-3 * alpha) * np.abs(gs).sum(1)).all()


def test_a_normal_may_be_negative_or_zero_in_places():
    x, g = make_images("8-bit", (2, 3, 16, 16), 0), make_gradient("normal", make_images("8-bit", (2, 3, 16, 16), 0), 0)
    normal = make_gradient("sparse", x, 7) - make_gradient("sparse", x, 9) + 0.0  # not -0
    plane = around(x, EPS, "image", normal=normal)
    y = fused(plane, x, g, EPS)
    present = plane.step(x, g, EPS)
    n, delta = groups(normal, "image"), groups(y, "image") - groups(x, "image")
    assert (np.abs((n * delta).sum(1)) <= 1e-6 * np.linalg.norm(n, axis=1) * np.linalg.norm(delta, axis=1)).all()
    assert ((y >= plane.lower) & (y <= plane.upper)).all()
    gains = [((p - x).double() * g).sum((1, 2, 3)) for p in (y, present)]
    torch.testing.assert_close(*gains, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scope", ["image", "channel"])
def test_a_step_on_a_gpu_is_by_the_kernels(scope, monkeypatch):
    """Through `Region.step`, with a step size of its own for each sample."""
    x, g = make_images("8-bit", (2, 3, 24, 24), 0), make_gradient("normal", make_images("8-bit", (2, 3, 24, 24), 0), 0)
    threat = ThreatModel("linf", EPS, scope=scope)
    alpha = torch.tensor([0.2, 0.7]).view(-1, 1, 1, 1) * EPS
    expected = threat.around(x).step(x, g, alpha)
    calls = []

    def counted(_: torch.device) -> Any:
        from orthattack.threat.fused import best_step

        def on_what_there_is(*given: Any, alpha: Any) -> Tensor:
            calls.append(len(given))
            if DEVICE == "cuda":
                return best_step(*given, alpha=alpha)
            here = [t.as_subclass(Tensor) for t in (*given, alpha)]
            return best_step(*here[:-1], alpha=here[-1]).as_subclass(OnGpu)

        return on_what_there_is

    if DEVICE == "cuda":
        monkeypatch.setattr(plane_module, "fused_step", counted)
        found = threat.around(x.cuda()).step(x.cuda(), g.cuda(), alpha.cuda()).cpu()
    else:
        with pretended(monkeypatch):
            monkeypatch.setattr(plane_module, "fused_step", counted)
            there = (t.to("cuda") for t in (x, x, g, alpha))
            found = threat.around(next(there)).step(*there).as_subclass(Tensor)
    assert len(calls) == 1
    gains = [((p - x).double() * g).sum((1, 2, 3)) for p in (found, expected)]
    torch.testing.assert_close(*gains, rtol=1e-6, atol=0)


@needs_gpu
def test_the_kernels_work_here_and_in_a_cuda_graph():
    assert plane_module.fused_step(torch.device("cuda", 0)) is not None
    x = make_images("uniform", (4, 3, 64, 64), 0).cuda()
    g = make_gradient("normal", x.cpu(), 0).cuda()
    allowed = ThreatModel("linf", EPS, scope="image").around(x)._allowed
    alpha = torch.full((4, 1, 1, 1), EPS / 4, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = allowed.step(x, g, alpha)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # which refuses to wait for the device
        found = allowed.step(x, g, alpha)
    graph.replay()
    assert torch.equal(found, expected)
