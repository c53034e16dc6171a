"""The L2 step by Triton kernels: on a GPU, or else on a CPU by Triton's interpreter."""

from __future__ import annotations

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
from tests.threat.test_fused import BLOCK, CAN_RUN, DEVICE, needs_gpu, quiet
from tests.threat.test_plane import groups

__all__ = ["quiet"]  # which is used by itself

pytestmark = pytest.mark.skipif(not CAN_RUN, reason="needs Triton 3.7, or a GPU and any Triton")


def sizes(plane: Plane, radius: float | Tensor) -> Tensor:
    return torch.as_tensor(radius, dtype=torch.float64).expand(len(plane.images), 1, 1, 1).contiguous()


def fused(plane: Plane, points: Tensor, radius: float | Tensor) -> Tensor:
    """`Plane.nearest_in_l2_ball` by the kernels, whatever the size of the groups."""
    from orthattack.threat.fused_l2 import nearest_in_ball

    given = points, plane.images, plane.lower, plane.upper, plane.normal
    rows = [t.reshape(plane._normal2.numel(), -1).to(DEVICE) for t in given]
    return nearest_in_ball(*rows, radius=sizes(plane, radius).flatten().to(DEVICE), block=BLOCK).cpu().view_as(points)


def fused_tangent(plane: Plane, gradient: Tensor) -> Tensor:
    from orthattack.threat.fused_l2 import unit_tangent

    g, n = (t.reshape(plane._normal2.numel(), -1).to(DEVICE) for t in (gradient, plane.normal))
    return unit_tangent(g, n, torch.empty_like(g), samples=len(gradient), block=BLOCK).cpu().view_as(gradient)


def within(x: Tensor, scope: str, low: float = 0.0, normal: Tensor | None = None) -> Plane:
    return Plane(x, torch.full_like(x, low), torch.ones_like(x), scope, normal)


def assert_allowed(plane: Plane, y: Tensor, radius: float | Tensor) -> None:
    assert ((y >= plane.lower) & (y <= plane.upper)).all()
    delta = (y.double() - plane.images.double()).flatten(1)
    assert (delta.norm(dim=1) <= sizes(plane, radius).flatten() * (1 + 1e-6)).all()
    deltas = groups(y, plane.scope) - groups(plane.images, plane.scope)
    n = groups(plane.normal, plane.scope)
    along = np.abs((deltas * n).sum(1))
    assert (along <= 1e-6 * np.linalg.norm(deltas, axis=1) * np.linalg.norm(n, axis=1)).all()


def distances(points: Tensor, *others: Tensor) -> list[Tensor]:
    """In each sample."""
    return [(points.double() - other.double()).flatten(1).norm(dim=1) for other in others]


@examples(12)
@given(
    image_kinds, gradient_kinds, st.sampled_from(["image", "channel"]), seeds, st.booleans(),
    st.sampled_from([1e-3, 0.1, 1.0, 4.0]), st.sampled_from([0.5, 1.5, 4.0]),
)  # fmt: skip
def test_a_projection_is_feasible_and_no_farther_than_the_search_finds(
    image, gradient, scope, seed, negative, radius, far
):
    x = make_images(image, (1, 3, 16, 16), seed)
    x = 2 * x - 1 if negative else x
    plane = within(x, scope, -1.0 if negative else 0.0)
    p = x + far * radius * plane.unit_tangent(make_gradient(gradient, x, seed)) + 0.1 * radius * x
    y, expected = fused(plane, p, radius), plane.nearest_in_l2_ball(p, sizes(plane, radius))
    assert_allowed(plane, y, radius)
    found, best, size = distances(p, y, expected, x)
    assert (found <= size * (1 + 1e-6)).all()
    if radius >= 0.1:  # a pixel has a grid of 6e-8, beside which less is not much
        grid = 6e-8 * x[0].numel() ** 0.5
        assert (found <= best + 1e-6 * size + grid).all()


@pytest.mark.parametrize(("image", "scope"), [("uniform", "channel"), ("8-bit", "image"), ("mixed", "channel")])
def test_a_projection_is_where_the_search_finds_it(image, scope):
    x = make_images(image, (2, 3, 16, 16), 3)
    plane = within(x, scope)
    p = x + torch.tensor([1.0, 4.0]).view(-1, 1, 1, 1) * plane.unit_tangent(make_gradient("normal", x, 0))
    radius = torch.tensor([0.8, 2.0]).view(-1, 1, 1, 1)
    y, expected = fused(plane, p, radius), plane.nearest_in_l2_ball(p, sizes(plane, radius))
    assert_allowed(plane, y, radius)
    apart, size = (y - expected).flatten(1).norm(dim=1), (p - x).flatten(1).norm(dim=1)
    assert (apart <= 2e-6 * size).all()


@pytest.mark.parametrize(("radius", "scope"), [(1e-2, "image"), (1e-3, "channel")])
def test_tiny_perturbations_are_not_given_up(radius, scope):
    """Which rounding lengthens, and turns off their planes."""
    x = make_images("8-bit", (1, 3, 32, 32), 1)
    plane = within(x, scope)
    p = x + 1.5 * radius * plane.unit_tangent(make_gradient("normal", x, 2))
    y = fused(plane, p, radius)
    assert_allowed(plane, y, radius)
    assert ((y - x).double().flatten(1).norm(dim=1) >= 0.9 * radius).all()


def test_a_point_of_the_set_stays():
    x = make_images("uniform", (2, 3, 16, 16), 5)
    plane = within(x, "channel")
    p = plane.nearest_in_l2_ball(x + plane.unit_tangent(make_gradient("normal", x, 1)), sizes(plane, 0.9))
    assert torch.equal(fused(plane, p, 1.0), p)
    assert torch.equal(fused(plane, x, 1.0), x)
    assert torch.equal(fused(plane, p, 0.0), x)


@pytest.mark.parametrize("image", ["white", "saturated"])
def test_pixels_that_only_go_one_way_stay_together(image):
    """At white pixels all of a perturbation goes down, which the plane leaves no room for."""
    x = make_images(image, (1, 3, 32, 32), 0)
    plane = within(x, "image")
    y = fused(plane, x + make_gradient("normal", x, 0), 2.0)
    assert_allowed(plane, y, 2.0)
    assert torch.equal(y[x == 1], x[x == 1])
    assert bool((y != x).any()) == (image == "saturated")


def test_a_sample_does_not_depend_on_its_batch():
    kinds = ["uniform", "mixed", "8-bit", "saturated"]
    x = torch.cat([make_images(kind, (1, 3, 16, 16), k) for k, kind in enumerate(kinds)])
    g = make_gradient("normal", x, 0) * torch.tensor([1.0, 0.0, 1e-30, 1e30]).view(-1, 1, 1, 1)
    radius = torch.tensor([0.1, 1.0, 0.05, 1.0]).view(-1, 1, 1, 1)
    plane = within(x, "channel")
    u = fused_tangent(plane, g)
    p = torch.addcmul(x, u, 2 * radius)
    y = fused(plane, p, radius)
    assert torch.equal(y[1], x[1])
    for k in (0, 2):
        alone = within(x[k : k + 1], "channel")
        assert torch.equal(fused_tangent(alone, g[k : k + 1])[0], u[k]), k
        assert torch.equal(fused(alone, p[k : k + 1], radius[k : k + 1])[0], y[k]), k


def test_a_normal_may_be_negative_or_zero_in_places():
    x = make_images("8-bit", (2, 3, 16, 16), 0)
    normal = make_gradient("sparse", x, 7) - make_gradient("sparse", x, 9) + 0.0  # not -0
    normal[1, 0] = 0
    plane = within(x, "channel", normal=normal)
    p = x + 2 * fused_tangent(plane, make_gradient("normal", x, 0))
    y, expected = fused(plane, p, 1.0), plane.nearest_in_l2_ball(p, sizes(plane, 1.0))
    assert_allowed(plane, y, 1.0)
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scope", ["image", "channel"])
def test_unit_tangents_are_those_of_torch(scope):
    kinds = ["normal", "heavy", "nearly parallel", "parallel", "zero"]
    x = make_images("mixed", (5, 3, 16, 16), 0)
    made = [make_gradient(kind, x[k : k + 1], k, 10.0 ** (30 - 15 * k)) for k, kind in enumerate(kinds)]
    g, plane = torch.cat(made), within(x, scope)
    u = fused_tangent(plane, g)
    torch.testing.assert_close(u, plane.unit_tangent(g), rtol=0, atol=2e-5)
    torch.testing.assert_close(u.double().flatten(1).norm(dim=1), torch.tensor([1.0, 1, 1, 0, 0]).double())
    assert np.abs((groups(u, scope) * groups(x, scope)).sum(1)).max() <= 1e-6


@pytest.mark.parametrize("scope", ["image", "channel"])
def test_an_l2_step_on_a_gpu_is_by_the_kernels(scope, monkeypatch):
    """Through `Region.step`, whose promise holds though nothing is scaled back."""
    x = make_images("8-bit", (2, 3, 24, 24), 0)
    g = make_gradient("normal", x, 0)
    threat = ThreatModel("l2", 0.5, scope=scope)
    alpha = torch.tensor([0.2, 0.7]).view(-1, 1, 1, 1)
    start = threat.around(x).step(x, make_gradient("normal", x, 1), 0.4)
    expected = threat.around(x).step(start, g, alpha)
    calls = []

    def counted(_: torch.device) -> Any:
        from orthattack.threat import fused_l2

        def on_what_there_is(kernels: Any) -> Any:
            def call(*given: Tensor, **more: Any) -> Tensor:
                calls.append(kernels)
                if DEVICE == "cuda":
                    return kernels(*given, **more)
                here = [t.as_subclass(Tensor) for t in given]
                more = {key: t.as_subclass(Tensor) if isinstance(t, Tensor) else t for key, t in more.items()}
                return kernels(*here, **more).as_subclass(OnGpu)

            return call

        return on_what_there_is(fused_l2.unit_tangent), on_what_there_is(fused_l2.nearest_in_ball)

    def stepped(region: Any, *given: Tensor) -> Tensor:
        monkeypatch.setattr(region, "_stored_in_ball", None)
        return region.step(*given)

    if DEVICE == "cuda":
        monkeypatch.setattr(plane_module, "fused_projection", counted)
        found = stepped(threat.around(x.cuda()), start.cuda(), g.cuda(), alpha.cuda()).cpu()
    else:
        with pretended(monkeypatch) as gpu:
            monkeypatch.setattr(plane_module, "fused_projection", counted)
            there = [t.to("cuda") for t in (x, start, g, alpha)]
            region = threat.around(there[0])
            gpu.asked.clear()
            found = stepped(region, *there[1:]).as_subclass(Tensor)
            assert not gpu.asked
    assert len(calls) == 2
    assert_allowed(threat.around(x)._allowed, found, 0.5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@needs_gpu
def test_the_kernels_work_here_and_in_a_cuda_graph():
    assert plane_module.fused_projection(torch.device("cuda", 0)) is not None
    x = make_images("uniform", (4, 3, 64, 64), 0).cuda()
    g = make_gradient("normal", x.cpu(), 0).cuda()
    allowed = ThreatModel("l2", 1.0, scope="image").around(x)._allowed
    radius = torch.ones(4, 1, 1, 1, dtype=torch.float64, device="cuda")

    def step() -> Tensor:
        return allowed.near_in_l2_ball(x + 2 * allowed.unit_tangent(g), radius)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # which refuses to wait for the device
        found = step()
    graph.replay()
    assert torch.equal(found, expected)
