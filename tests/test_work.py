"""How much work steps and projections are: how often they sum over images, which no clock or load changes.

The numbers were measured. A change that needs fewer lowers them; one that needs more has to say why.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from orthattack import ThreatModel
from tests.conftest import make_gradient, make_images


class Sums(TorchDispatchMode):
    """Counts the sums and norms inside the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.overloadpacket.__name__ in ("sum", "linalg_vector_norm")
        return func(*args, **(kwargs or {}))


RADII = {"linf": (8 / 255, 2 / 255), "l2": (0.5, 0.125), "l1": (8.0, 2.0)}
DIRECTIONS = {"none": (), "one": ("constant",), "many": ("channel-constant", lambda x: x.flip(3))}
# Scope "pixel" sums over the colours that are not done, channel by channel: more sums, of fewer numbers; most are of
# the lattice that repairs rounding, which cut a third of a step's time in L1, a fifth in the others. At
# 224 pixels its projections took 300 ms and took 69 in L1 before that, 160 and 23 in L2. In L1 so do the other scopes
# of one plane per vector, over candidates: a step and a projection took 70 ms and take 2 without a plane, 82 and 5 in
# scope "image", 82 and 8 in "channel". Of several directions the quick search, most of whose sums are over a few
# pixels, comes before the slow one, which images as small and gradients as heavy as these often need: at 224 pixels a
# step with the image and the constant took 77, 32 and 59 ms and takes 3, 2 and 6 in L-infinity, L2 and L1.
EXPECTED: dict[tuple[str, str, str], tuple[int, int, int, int]] = {
    ("linf", "none", "none"): (0, 0, 0, 0),
    ("linf", "none", "one"): (8, 26, 256, 68),
    ("linf", "none", "many"): (44, 238, 9553, 579),
    ("linf", "image", "none"): (6, 30, 238, 68),
    ("linf", "image", "many"): (65, 308, 14067, 779),
    ("linf", "channel", "none"): (6, 34, 334, 74),
    ("linf", "pixel", "none"): (3, 124, 412, 136),
    ("l2", "none", "none"): (0, 5, 40, 20),
    ("l2", "image", "none"): (6, 102, 415, 686),
    ("l2", "image", "many"): (65, 539, 1576, 1783),
    ("l2", "channel", "none"): (6, 132, 415, 411),
    ("l2", "pixel", "none"): (3, 116, 665, 345),
    ("l1", "none", "none"): (0, 5, 114, 279),
    ("l1", "none", "one"): (8, 113, 2338, 3473),
    ("l1", "image", "none"): (6, 113, 1258, 3949),
    ("l1", "image", "many"): (65, 545, 4014, 6911),
    ("l1", "channel", "none"): (6, 125, 2008, 5839),
    ("l1", "pixel", "none"): (3, 223, 2129, 4319),
}


def work(norm: str, scope: str, directions: str) -> tuple[int, int, int, int]:
    """Of the region, a random start, four steps, and a projection from outside; for images on which searches differ."""
    eps, alpha = RADII[norm]
    images = torch.cat([make_images(kind, (1, 3, 12, 12), 0) for kind in ("uniform", "8-bit", "mixed", "dark")])
    kinds = ("normal", "heavy", "one-sided", "normal")
    gradients = [torch.cat([make_gradient(kind, images[:1], k) for kind in kinds]) for k in range(4)]
    threat = ThreatModel(norm, eps, scope=None if scope == "none" else scope, directions=DIRECTIONS[directions])
    with Sums() as around:
        region = threat.around(images)
    with Sums() as start:
        points: Tensor = region.random_start(torch.Generator().manual_seed(0))
    with Sums() as steps:
        for gradient in gradients:
            points = region.step(points, gradient, alpha)
    with Sums() as projection:
        region.project(images + eps * gradients[0])
    return around.calls, start.calls, steps.calls, projection.calls


@pytest.mark.parametrize("case", EXPECTED, ids="-".join)
def test_steps_are_as_much_work_as_they_were(case):
    for found, expected in zip(work(*case), EXPECTED[case], strict=True):
        assert found == pytest.approx(expected, rel=0.01, abs=2)
