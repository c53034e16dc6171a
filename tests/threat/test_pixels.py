"""L0: how many pixels move, and what is exact once these are chosen."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from orthattack import PGD, SparseRS, ThreatModel
from orthattack.threat import perturbation_norm
from orthattack.threat.norms import largest
from tests.conftest import IMAGE_KINDS, examples, make_images, seeds
from tests.threat.test_mask import FORMS

kinds = st.sampled_from(IMAGE_KINDS)
# Of channels beside directions exactness is relative to the whole: in a channel of next to nothing it is round-off.
EXACT = [form for form in FORMS if form.get("scope") != "channel" or "directions" not in form]


def test_the_norm_counts_pixels_whatever_moves_in_them():
    delta = torch.zeros(3, 3, 2, 2)
    delta[0, 0, 0, 0] = delta[0, 2, 0, 0] = 1e-30
    delta[1, :, 0] = -1
    assert perturbation_norm(delta, "l0").tolist() == [1, 2, 0]
    assert ThreatModel("l0", 3).diameter((3, 4, 5)) == 20
    assert ThreatModel("l0", 20).allows_everything((3, 4, 5))
    assert not ThreatModel("l0", 19).allows_everything((3, 4, 5))


def test_the_largest_are_as_many_as_asked_for_where_some_are_equal():
    values = torch.tensor([[1.0, 2, 2, 2], [0, 0, 0, 0]]).view(2, 1, 2, 2)
    found = largest(values, torch.tensor([2.9, 1.0]).view(2, 1, 1, 1))
    assert found.flatten(1).tolist() == [[False, True, True, False], [True, False, False, False]]
    assert not largest(values, torch.tensor([0.5, 0.0]).view(2, 1, 1, 1)).any()


def test_attacks_without_a_step_for_it_refuse_it():
    with pytest.raises(ValueError, match="norm must be one of 'linf', 'l2', 'l1'; got 'l0'"):
        PGD(torch.nn.Flatten(), "l0", 3)


@given(st.sampled_from([*EXACT, {"scope": "block3"}]), kinds, seeds, st.sampled_from([torch.float32, torch.float64]))
@examples(40)
def test_points_move_few_pixels_in_bounds_and_on_the_planes(form, kind, seed, dtype):
    images = make_images(kind, (4, 3, 6, 6), seed).to(dtype)
    eps = torch.tensor([0.0, 1.0, 4.7, 30.0])
    threat = ThreatModel("l0", eps, **form)
    region, generator = threat.around(images), torch.Generator().manual_seed(seed)
    anywhere = 3 * torch.rand(images.shape, generator=generator).to(dtype) - 1
    start = region.random_start(generator)
    wide = ThreatModel("l0", 36, **form).around(images).project(anywhere)
    pixels = largest(torch.rand(4, 1, 6, 6, generator=generator), eps.view(-1, 1, 1, 1))
    vertex = region.vertex(anywhere - 0.5, pixels)
    assert not ((vertex != images) & ~pixels).any()
    for points in (
        start,
        region.project(anywhere),
        region.shrunk(wide),
        region.step(start, anywhere - 0.5, 0.2),
        vertex,
    ):
        assert points.min() >= 0
        assert points.max() <= 1
        count, cosine = threat.sizes(images, points)
        assert (count <= eps).all()
        if threat.is_orthogonal:
            assert cosine.max() <= (1e-6 if dtype == torch.float32 else 1e-12)


@given(st.integers(0, 5), kinds, seeds, st.sampled_from([1, 3]))
@examples(30)
def test_without_a_plane_the_projection_is_the_nearest_of_all_supports(count, kind, seed, channels):
    images = make_images(kind, (1, channels, 2, 3), seed).double()
    points = 3 * torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)).double() - 1
    found = ThreatModel("l0", count, scope=None).around(images).project(points)
    distances = []
    for support in combinations(range(6), count):
        tried = images.clone().flatten(2)
        tried[..., list(support)] = points.flatten(2)[..., list(support)].clamp(0, 1)
        distances.append(float((tried - points.flatten(2)).norm()))
    assert float((found - points).norm()) == pytest.approx(min(distances), rel=1e-12)


@given(st.integers(2, 6), kinds, seeds, st.sampled_from(["image", "channel"]))
@examples(30)
def test_with_a_plane_it_is_the_nearest_on_the_support_of_the_box(count, kind, seed, scope):
    """y = clip(p - λ x) on the pixels that come nearest without the plane, λ by bisection in float64."""
    images = make_images(kind, (1, 3, 2, 3), seed).double()
    points = 3 * torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)).double() - 1
    plain = ThreatModel("l0", count, scope=None).around(images).project(points)
    pixels = (plain != images).any(1, keepdim=True)
    if int(pixels.sum()) < count:  # a pixel that the box leaves where it is may move with the plane
        return
    x, p = (torch.where(pixels, t, 0).numpy() for t in (images, points))
    dims = (1, 2, 3) if scope == "image" else (2, 3)
    low, high = (
        np.full((1, 3 if scope == "channel" else 1, 1, 1), -1e9),
        np.full((1, 3 if scope == "channel" else 1, 1, 1), 1e9),
    )
    for _ in range(200):
        middle = (low + high) / 2
        y = np.clip(p - middle * x, 0, pixels.numpy())
        over = ((y - x) * x).sum(dims, keepdims=True) > 0
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    found = ThreatModel("l0", count, scope=scope).around(images).project(points)
    np.testing.assert_allclose(torch.where(pixels, found, 0).numpy(), y, atol=1e-6)
    assert torch.equal(torch.where(pixels, images, found), images)


@given(kinds, seeds, st.sampled_from([torch.float32, torch.float64]))
@examples(30)
def test_on_chosen_pixels_the_vertex_is_the_linear_programs(kind, seed, dtype):
    images, generator = make_images(kind, (1, 3, 2, 3), seed).to(dtype), torch.Generator().manual_seed(seed)
    g, pixels = torch.randn(images.shape, generator=generator).to(dtype), torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    pixels[..., 0, 1:] = True
    step = ThreatModel("l0", 2).around(images).vertex(g, pixels)
    x, c = (t[..., 0, 1:].double().numpy().ravel() for t in (images, g))
    best = linprog(-c, A_eq=x[None], b_eq=[x @ x], bounds=[(0, 1)] * 6)
    gain = float(((step - images).double() * g.double()).sum())
    assert gain == pytest.approx(-best.fun - c @ x, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("scope", ["image", "channel", None])
def test_in_8_bits_the_integers_are_orthogonal_on_as_many_pixels(scope):
    images = (255 * make_images("uniform", (8, 3, 12, 12), 1)).round() / 255
    region = ThreatModel("l0", 9, scope=scope, levels=256).around(images)
    anywhere = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(region.stored(images), images)
    points = region.stored(region.project(anywhere))
    k, moved = (255 * images).round().long(), (255 * points).round().long()
    assert torch.equal(moved / 255, points)
    assert (perturbation_norm(moved - k, "l0") <= 9).all()
    assert ((moved != k).flatten(1).any(1)).sum() >= 7  # now and then nothing is found on so few pixels
    if scope is not None:
        products = ((moved - k) * k).sum((1, 2, 3) if scope == "image" else (2, 3))
        assert (products == 0).all()


def test_a_number_of_pixels_that_allows_every_image_is_no_number_of_bytes():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
    with pytest.warns(UserWarning, match=r"eps=24 allows every image: in l0, .* 16 apart; choose a smaller radius$"):
        SparseRS(model, queries=2)(torch.rand(1, 3, 4, 4), torch.tensor([0]))
