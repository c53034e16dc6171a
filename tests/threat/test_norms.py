"""The table of norms, and what its rows do without any plane."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from orthattack.threat import Norm, perturbation_norm
from orthattack.threat.norms import BALLS, filled, length, sparsity, unit
from orthattack.threat.sets import Free
from tests.conftest import make_gradient, make_images


def test_every_norm_has_a_row():
    assert set(BALLS) == set(get_args(Norm))


def test_norms_of_known_perturbations():
    delta = torch.zeros(2, 3, 2, 2)
    delta[0, 0, 0, 0], delta[0, 2, 1, 1] = 3, -4
    delta[1] = 0.5
    assert perturbation_norm(delta, "linf").tolist() == [4, 0.5]
    assert perturbation_norm(delta, "l2").tolist() == pytest.approx([5, 3**0.5])
    assert perturbation_norm(delta, "l1").tolist() == [7, 6]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_lengths_are_norms_in_float64_and_units_have_length_1_at_any_scale(norm):
    delta = make_gradient("heavy", make_images("uniform", (3, 3, 5, 7), 0), 0)
    delta[1] = 0
    order = BALLS[norm].order
    expected = torch.linalg.vector_norm(delta.double().flatten(1), order, dim=1)
    size = length(delta, order)
    assert size.shape == (3, 1, 1, 1)
    torch.testing.assert_close(size.flatten(), expected, rtol=1e-6, atol=0)
    for scale in (1e-30, 1.0, 1e30):
        ones = length(unit(scale * delta, order), order).flatten()
        torch.testing.assert_close(ones, torch.tensor([1.0, 0, 1]).double(), rtol=1e-6, atol=0)


def test_an_l1_step_changes_a_hundredth_of_the_pixels():
    assert [sparsity(torch.zeros(2, 3, n, n)) for n in (1, 8, 32, 224)] == [1, 2, 31, 1505]


@pytest.mark.parametrize("limit", [0.5, 0.02])
def test_an_amount_fills_the_largest_pixels_first_however_many_it_takes(limit):
    size = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    amount = torch.tensor([0.01, 2.0, 1e4]).view(3, 1, 1, 1)
    found = filled(size, torch.full_like(size, limit), amount).flatten(1)
    for given, sizes, total in zip(found, size.flatten(1), (0.01, 2.0, limit * 1200), strict=True):
        assert float(given.sum()) == pytest.approx(total, rel=1e-5)
        whole = round(total / limit - 0.5)
        assert (given[sizes.argsort(descending=True)[:whole]] == limit).all()


def test_an_l2_projection_asks_no_gpu_whether_it_is_done():
    """On tensors that only say they are a GPU's, a question is an error."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        images, points = torch.rand(2, 2, 3, 8, 8, device="cuda")
        box = Free(images, torch.zeros_like(images), torch.ones_like(images))
        radius = torch.full((2, 1, 1, 1), 0.5, dtype=torch.float64, device="cuda")
        assert box.nearest_in_l2_ball(points, radius).device.type == "cuda"
