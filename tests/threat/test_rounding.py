"""Rows moved onto the plane within float32's grid, against the same by trying."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orthattack.threat.rounding import _combine, settled_rows
from tests.conftest import image_kinds, make_gradient, make_images, seeds

ALLOWED = 7.5e-7


def problem(kind: str, n: int, seed: int, eps: float, rows: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points y whose perturbation is orthogonal to x but for what float32 cannot hold, x, and the box."""
    x = make_images(kind, (rows, 1, 1, n), seed)
    if kind == "uniform":  # so that no pixel meets a bound of [0, 1]
        x = 0.2 + 0.6 * x
    delta = eps * make_gradient("normal", x, seed).double()
    x64 = x.double()
    delta -= (delta * x64).sum(-1, keepdim=True) / (x64 * x64).sum(-1, keepdim=True).clamp(min=1e-30) * x64
    low, high = (x - 4 * eps).clamp(0), (x + 4 * eps).clamp(max=1)
    y = (x64 + delta).float().clamp(low, high)
    return tuple(t.flatten(1) for t in (y, x, low, high))


def cosine(y: Tensor, x: Tensor) -> Tensor:
    delta, x = y.double() - x.double(), x.double()
    norms = delta.norm(dim=1) * x.norm(dim=1)
    return (delta * x).sum(1).abs() / torch.where(norms > 0, norms, 1)


@given(image_kinds, st.sampled_from([3, 12, 300, 5000]), seeds, st.sampled_from([1e-6, 1e-4, 1 / 255]))
def test_settled_rows_are_in_the_box_and_orthogonal_as_stored(kind, n, seed, eps):
    y, x, low, high = problem(kind, n, seed, eps)
    settled = settled_rows(y, x, x, [lambda: (low, high)], x, ALLOWED)
    assert settled.dtype == torch.float32
    assert (settled >= low).all()
    assert (settled <= high).all()
    assert (cosine(settled, x) <= ALLOWED * (1 + 1e-9)).all()
    good = cosine(y, x) <= ALLOWED * (1 - 1e-9)
    assert torch.equal(settled[good], y[good])
    moved = (settled != y).sum(1)
    given_up = (settled == x).all(1)
    assert (moved[~given_up] <= 10).all()  # a pixel or two in each attempt


def test_rows_that_can_be_settled_are_not_given_up():
    y, x, low, high = problem("uniform", 300, 0, 1 / 255, rows=50)
    y[:, 7] += 2e-4
    assert (cosine(y, x) > ALLOWED).all()
    settled = settled_rows(y, x, x, [lambda: (low, high)], x, ALLOWED)
    assert ((settled != y).sum(1) <= 2).all()
    assert (cosine(settled, x) <= ALLOWED).all()


def test_a_row_that_cannot_be_settled_becomes_the_fallback():
    x = torch.tensor([[1.0, 1.0], [1.0, 0.5]])
    y = torch.tensor([[1.0, 0.9], [0.9, 0.5]])
    low, high = torch.tensor([[1.0, 0.9], [0.9, 0.5]]), torch.tensor([[1.0, 0.95], [1.0, 0.5]])
    fallback = torch.tensor([[0.25, 0.25], [0.75, 0.5]])
    settled = settled_rows(y, x, x, [lambda: (low, high)], fallback, ALLOWED)
    assert torch.equal(settled[0], fallback[0])
    assert torch.equal(settled[1], torch.tensor([1.0, 0.5]))  # moved back to the image, which is on its plane


def test_the_boxes_are_tried_in_order_and_only_when_they_are_needed():
    y, x, low, high = problem("uniform", 300, 0, 1 / 255, rows=4)
    y[:, 7] += 2e-4
    asked = []

    def box(name: str, room: Tensor | float) -> tuple[Tensor, Tensor]:
        asked.append(name)
        return torch.maximum(low, y - room), torch.minimum(high, y + room)

    first = torch.zeros_like(y)
    first[:, 11] = 1
    boxes = [lambda: box("first", first), lambda: box("second", 1.0)]
    settled = settled_rows(y, x, x, boxes, x, ALLOWED)
    assert asked == ["first"]
    assert (settled != y).nonzero()[:, 1].unique().tolist() == [11]
    asked.clear()
    boxes[0] = lambda: box("first", 0.0)
    settled = settled_rows(y, x, x, boxes, x, ALLOWED)
    assert asked[:2] == ["first", "second"]
    assert (cosine(settled, x) <= ALLOWED).all()
    asked.clear()
    assert torch.equal(settled_rows(settled, x, x, boxes, x, ALLOWED), settled)
    assert asked == []


def spacing(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(np.inf))) - float(value)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12])
def test_one_pixel_takes_up_what_is_too_much(seed):
    """It has the room, and a grid fine enough: of those the one that moves least, the brightest."""
    y, x, low, high = problem("uniform", 60, seed, 8e-3, rows=1)
    y[0, 5] += 4e-5 * (-1) ** seed
    low, high = torch.maximum(low, y - 2e-4), torch.minimum(high, y + 2e-4)
    settled = settled_rows(y, x, x, [lambda: (low, high)], x, ALLOWED)
    ys, xs, lows, highs = (t[0].double().numpy() for t in (y, x, low, high))
    excess = ((ys - xs) * xs).sum()
    limit = ALLOWED * np.linalg.norm(ys - xs) * np.linalg.norm(xs)
    room = np.where(excess * xs > 0, ys - lows, highs - ys) * xs
    fine = [i for i in range(60) if room[i] >= abs(excess) and spacing(y[0, i]) * xs[i] <= limit]
    pixel = max(fine, key=lambda i: xs[i])
    expected = y.clone()
    expected[0, pixel] = ys[pixel] - excess / xs[pixel]
    assert torch.equal(settled, expected)


@pytest.mark.parametrize(("n", "allowed"), [(60, ALLOWED), (3, 1e-8)])
def test_the_signs_of_pixels_make_no_difference(n, allowed):
    y, x, low, high = problem("uniform", n, 0, 8e-3, rows=50)
    y[:, 0] += 4e-5
    sign = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    ends = torch.minimum(sign * low, sign * high), torch.maximum(sign * low, sign * high)
    settled = settled_rows(y, x, x, [lambda: (low, high)], x, allowed)
    assert (settled != x).any()
    assert torch.equal(settled_rows(sign * y, sign * x, sign * x, [lambda: ends], sign * x, allowed), sign * settled)


def test_of_two_pixels_the_first_moves_no_more_than_it_must():
    x = torch.tensor([[0.9, 0.5, 0.7]], dtype=torch.float64)
    y, low, high = x + torch.tensor([[0.0, 0.01, -0.005]]), x - 0.1, x + 0.1
    excess = ((y - x) * x).sum(1, keepdim=True)
    moved = _combine(y, x, low, high, excess, torch.ones(1, 1), dtype=torch.float32, radius=8)
    assert moved[0, 0] == y[0, 0].float()  # which has the most room to both sides


@pytest.mark.parametrize(("allowed", "share"), [(1e-7, 1), (1e-8, 0.988), (1e-9, 0.719)])
def test_two_pixels_settle_three_numbers_where_one_cannot(allowed, share):
    """Pixels' colours: three numbers on float32's grid, of which one or two are moved by up to 64 units."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2000, 3, generator=generator) * 0.9 + 0.05
    delta = torch.randn(2000, 3, generator=generator).double() * 0.02
    x64 = x.double()
    delta -= (delta * x64).sum(1, keepdim=True) / (x64 * x64).sum(1, keepdim=True) * x64
    low, high = x - 0.1, x + 0.1
    y = (x64 + delta).float()
    settled = settled_rows(y, x, x, [lambda: (low, high)], x, allowed)
    found = (settled != x).any(1)
    assert (cosine(settled, x) <= allowed * (1 + 1e-9)).all()
    assert found.double().mean() >= share
    assert (settled - y).abs()[found].max() <= 1e-4
