"""The box alone, and that every set answers what a region asks."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from orthattack.threat.plane import Plane
from orthattack.threat.sets import Allowed, Free
from orthattack.threat.subspace import Subspace
from tests.conftest import make_gradient, make_images

NAMES = sorted(name for name, value in vars(Allowed).items() if inspect.isfunction(value) and not name.startswith("_"))


@pytest.mark.parametrize("kind", [Free, Plane, Subspace])
@pytest.mark.parametrize("name", NAMES)
def test_every_set_answers_what_a_region_asks(kind, name):
    asked = list(inspect.signature(getattr(Allowed, name)).parameters)[1:]
    answered = list(inspect.signature(getattr(kind, name)).parameters.values())[1:]
    assert len(answered) >= len(asked) > 0 or name == "release"
    assert all(p.default is not p.empty for p in answered[len(asked) :])


def free(kind: str) -> tuple[Free, torch.Tensor]:
    x = make_images(kind, (2, 3, 6, 6), 0, torch.float64)
    return Free(x, torch.zeros_like(x), torch.ones_like(x)), x + 0.3 * make_gradient("normal", x, 0)


def ball(p: np.ndarray, order: int, threshold: float) -> np.ndarray:
    """The perturbation of a Lagrangian of the ball: scaled by it, or soft-thresholded."""
    return p / (1 + threshold) if order == 2 else np.sign(p) * np.maximum(np.abs(p) - threshold, 0)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", ["uniform", "8-bit", "saturated", "mixed"])
def test_the_nearest_point_of_box_and_ball_is_that_of_a_bisection(order, kind):
    """On the multiplier of the ball: the norm of what is clipped falls as it grows."""
    box, points = free(kind)
    size = 8.0 if order == 1 else 1.0
    radius = torch.full((2, 1, 1, 1), size, dtype=torch.float64)
    found = (box.nearest_in_l1_ball if order == 1 else box.nearest_in_l2_ball)(points, radius)
    for y, p, x in zip(found.flatten(1).numpy(), points.flatten(1).numpy(), box.images.flatten(1).numpy(), strict=True):
        low, high = 0.0, 1e3
        for _ in range(200):
            middle = (low + high) / 2
            expected = np.clip(x + ball(p - x, order, middle), 0, 1)
            low, high = (middle, high) if np.linalg.norm(expected - x, order) > size else (low, middle)
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)


def test_the_box_alone_projects_no_gradient_and_settles_nothing():
    box, points = free("uniform")
    assert box.tangent(points) is points
    assert box.settle(points) is points
    assert torch.equal(box.nearest(points), points.clamp(0, 1))
    shrunk = box.nearest(points, torch.full((2, 1, 1, 1), 0.1, dtype=torch.float64))
    delta = points - box.images
    expected = (box.images + delta.sign() * (delta.abs() - 0.1).clamp(min=0)).clamp(0, 1)
    torch.testing.assert_close(shrunk, expected, rtol=0, atol=1e-15)
