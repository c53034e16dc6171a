"""Masks: a region in which some pixels may not move is that of the pixels that may, in every norm and scope."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from orthattack import OrthoPGD, ThreatModel
from tests.attacks.test_attacks import drawn, small_model
from tests.attacks.test_family import EPS, IN_EACH_NORM, make, sizes
from tests.conftest import examples, image_kinds, make_images, seeds

NORMS = {"linf": 0.1, "l2": 0.6, "l1": 4.0}
norms = st.sampled_from(list(NORMS))
FORMS = [
    {"scope": None}, {"scope": "image"}, {"scope": "channel"}, {"scope": "pixel"}, {"scope": "image", "normal": "luma"},
    {"scope": "image", "directions": ["constant"]}, {"scope": None, "directions": ["channel-constant"]},
    {"scope": "channel", "normal": "constant"}, {"scope": None, "directions": ["constant"]},
    {"scope": "channel", "directions": ["luma"]},
]  # fmt: skip
forms = st.sampled_from(FORMS)


def drawn_mask(seed: int, share: float = 0.4, shape: tuple[int, ...] = (6, 6)) -> torch.Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    mask[..., 0, :2] = True
    return mask


@given(norms, forms, image_kinds, seeds)
@examples(40)
def test_a_masked_region_is_the_region_of_an_image_of_the_pixels_that_move(norm, form, kind, seed):
    images = make_images(kind, (2, 3, 6, 6), seed).double()
    mask = drawn_mask(seed)
    whole = ThreatModel(norm, NORMS[norm], **form, mask=mask).around(images)
    part = ThreatModel(norm, NORMS[norm], **form).around(images[..., mask].unsqueeze(2))

    def moving(points):
        assert torch.equal(points[..., ~mask], images[..., ~mask])
        return points[..., mask].unsqueeze(2)

    torch.manual_seed(seed)
    anywhere, g = torch.rand_like(images) * 1.4 - 0.2, torch.randn_like(images)
    tolerance = {"atol": 2e-6 if norm == "l1" else 1e-7, "rtol": 0}
    start, same = whole.project(anywhere), part.project(moving(torch.where(mask, anywhere, images)))
    torch.testing.assert_close(moving(start), same, **tolerance)
    alpha = NORMS[norm] / 3
    stepped = whole.step(start, g, alpha, count=2)
    expected = part.step(moving(start), g[..., mask].unsqueeze(2), alpha, count=2)
    if norm == "l2":
        torch.testing.assert_close(moving(stepped), expected, **tolerance)
    else:  # of several optima, one of the same gain
        moves = (g * (stepped - start))[..., mask], g[..., mask] * (expected - moving(start)).squeeze(2)
        gains = [move.sum((1, 2)) for move in moves]
        torch.testing.assert_close(*gains, atol=1e-4 * float(gains[1].abs().max()) + 1e-9, rtol=0)
    shrunk = moving(whole.resized(torch.full((2,), NORMS[norm] / 2)).shrunk(start))
    torch.testing.assert_close(
        shrunk, part.resized(torch.full((2,), NORMS[norm] / 2)).shrunk(moving(start)), **tolerance
    )


@given(st.sampled_from(["image", "channel", None]), image_kinds, seeds)
@examples(20)
def test_the_step_is_within_1e5_of_linprog(scope, kind, seed):
    """max ⟨g, y⟩ over the pixels that move, each channel with a mask of its own."""
    images, mask = make_images(kind, (1, 3, 6, 6), seed), drawn_mask(seed, shape=(3, 6, 6))
    region = ThreatModel("linf", 0.1, scope=scope, mask=mask).around(images)
    g, start = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed)), region.images
    found = region.step(start, g, 0.04)
    x, c, free = (t.double().numpy().ravel() for t in (images, g, mask))
    low, high = np.maximum(x - 0.04, 0), np.minimum(x + 0.04, 1)
    low, high = np.where(free, low, x), np.where(free, high, x)
    rows = {"image": [np.ones(108)], "channel": np.repeat(np.eye(3), 36, 1), None: []}[scope]
    a = [row * x for row in rows] or None
    best = linprog(-c, A_eq=a, b_eq=None if a is None else [row @ x for row in a], bounds=np.stack([low, high], 1))
    assert best.success
    gain = float((g.double() * (found.double() - start.double())).sum())
    assert gain >= -best.fun - c @ x - 1e-5 * 0.04 * np.abs(c[free > 0]).sum()


@given(norms, forms, image_kinds, seeds, st.sampled_from([torch.float32, torch.float64]))
@examples(40)
def test_what_may_not_move_stays_to_the_bit_and_every_promise_is_kept(norm, form, kind, seed, dtype):
    images, mask = make_images(kind, (2, 3, 6, 6), seed).to(dtype), drawn_mask(seed, 0.2)
    threat = ThreatModel(norm, NORMS[norm], **form, mask=mask)
    region = threat.around(images)
    points = region.random_start(torch.Generator().manual_seed(seed))
    for k in range(3):
        assert torch.equal(points[..., ~mask], region.images[..., ~mask])
        norm_, cosine = threat.sizes(images, points)
        assert (norm_ <= NORMS[norm] * (1 + 1e-6)).all()
        if threat.is_orthogonal:
            assert (cosine <= (1e-6 if dtype == torch.float32 else 1e-12)).all()
        assert points.min() >= 0
        assert points.max() <= 1
        g = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed + k)).to(dtype)
        points = region.step(points, g, NORMS[norm] / 2)


@given(norms, forms, image_kinds, seeds)
@examples(20)
def test_the_projection_obeys_the_variational_inequality(norm, form, kind, seed):
    """⟨p - y, q - y⟩ <= 0 for every allowed q, p being masked."""
    images, mask = make_images(kind, (2, 3, 6, 6), seed).double(), drawn_mask(seed)
    region = ThreatModel(norm, NORMS[norm], **form, mask=mask).around(images)
    points = torch.where(mask, torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)).double(), images)
    nearest = region.project(points)
    for k in range(4):
        other = region.random_start(torch.Generator().manual_seed(seed + k))
        inner = ((points - nearest) * (other - nearest)).sum((1, 2, 3))
        assert (inner <= 2e-6 * (points - images).flatten(1).norm(dim=1).clamp(min=1e-9)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mask", ["(H, W)", "(C, H, W)", "a function"])
def test_blocks_and_masks_of_every_form_agree(norm, mask):
    images = make_images("8-bit", (2, 3, 8, 8), 0).double()
    where = torch.zeros(8, 8, dtype=torch.bool)
    where[4:, :4] = True
    given_ = {"(H, W)": where, "(C, H, W)": where.expand(3, 8, 8).float(), "a function": lambda x: where.expand_as(x)}
    threat = ThreatModel(norm, NORMS[norm], scope="block2", mask=given_[mask])
    whole = threat.around(images)
    part = ThreatModel(norm, NORMS[norm], scope="block2").around(images[..., 4:, :4])
    anywhere = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).double()
    found = whole.project(anywhere)
    torch.testing.assert_close(found[..., 4:, :4], part.project(anywhere[..., 4:, :4]), atol=2e-6, rtol=0)
    assert threat == ThreatModel(norm, NORMS[norm], scope="block2", mask=given_[mask])
    assert threat != ThreatModel(norm, NORMS[norm], scope="block2")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", [*FORMS[:3], {"scope": "block4"}, *FORMS[4:8]], ids=str)
def test_with_levels_it_is_exact_and_what_may_not_move_stays(norm, form):
    images = (make_images("8-bit", (3, 3, 16, 16), 1) * 255).round() / 255
    mask = drawn_mask(3, 0.3, (16, 16))
    threat = ThreatModel(norm, 2 * NORMS[norm], **form, levels=256, mask=mask)
    region = threat.around(images)
    points, moved = region.random_start(torch.Generator().manual_seed(0)), 0
    for k in range(3):
        points = region.stored(points)
        assert torch.equal(points[..., ~mask], images[..., ~mask])
        size, cosine = threat.sizes(images, points)
        assert (size <= 2 * NORMS[norm] * (1 + 1e-6)).all()
        assert (cosine == 0).all() or (form["scope"] is None and not form.get("directions"))
        assert torch.equal((points * 255).round() / 255, points)
        moved += int((points != images).flatten(1).any(1).sum())
        points = region.step(points, torch.randn(images.shape, generator=torch.Generator().manual_seed(k)), NORMS[norm])
    assert moved >= 8  # of few pixels, now and then nothing is found, as without a mask


# Each attack in all norms in the slow lane, in one in the fast one.
EVERY = [
    pytest.param(name, norm, marks=[] if norm == "l0" or (k // 3 + k) % 3 == 0 else pytest.mark.slow)
    for k, (name, norm) in enumerate(IN_EACH_NORM)
]


@pytest.mark.parametrize(("name", "norm"), EVERY)
def test_every_attack_moves_nothing_else(name, norm):
    model, (images, labels) = small_model(), drawn(n=6)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[1:5, 2:] = True
    result = make(name, model, norm, mask=mask).run(images, labels)
    assert torch.equal(result.adversarials[..., ~mask], images[..., ~mask])
    delta = (result.adversarials - images)[..., mask]
    assert (sizes(delta, norm) <= EPS[norm] * (1 + 1e-6)).all()
    assert (delta.flatten(1).any(1) | result.success).sum() >= 4
    if name.startswith("Ortho"):
        assert result.cosine.max() <= 1e-6


def test_a_patch_is_a_mask_with_a_radius_of_the_bounds_and_nothing_warns():
    model, (images, labels) = small_model(), drawn(n=8)
    mask = torch.zeros(6, 6)
    mask[:3, :3] = 1
    attack = OrthoPGD(model, eps=1.0, steps=20, mask=mask)
    assert "mask=tensor(6, 6)" in repr(attack)
    small = OrthoPGD(model, eps=8 / 255, steps=20, mask=mask).run(images, labels)
    result = attack.run(images, labels)
    assert result.norm.max() > 0.5
    assert result.cosine.max() <= 1e-6
    assert result.success.sum() >= small.success.sum()
    assert result.loss.mean() > small.loss.mean()


def test_momentum_and_steps_do_not_see_gradients_outside_the_mask():
    """A gradient of 1e6 outside, which would be nearly all of a mean absolute value or of a norm. In float64: beside
    what that adds to the logits, float32 does not tell points apart."""
    weight = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[2:4, 2:4] = True

    def model(x, scale):
        z = (x * torch.where(mask, weight, scale * weight)).sum((1, 2, 3))
        return torch.stack([z, torch.zeros_like(z)], 1)

    images, labels = torch.full((1, 3, 6, 6), 0.5, dtype=torch.float64), torch.tensor([0])
    for name, norm in (("MIFGSM", "l2"), ("OrthoMIFGSM", "linf"), ("APGD", "l2")):
        found = [
            make(name, lambda x, s=scale: model(x, s), norm, mask=mask, loss="margin").run(images, labels, seeds=[0])
            for scale in (0.0, 1e6)
        ]
        torch.testing.assert_close(found[0].adversarials, found[1].adversarials, atol=1e-5, rtol=0)


def test_a_mask_that_frees_nothing_returns_the_images_and_says_so():
    model, (images, labels) = small_model(), drawn(n=4)
    labels = model(images).argmax(1)
    with pytest.warns(UserWarning, match="leaves nothing but the image itself for 4 of 4 images .eps, bounds, mask"):
        result = OrthoPGD(model, steps=2, mask=torch.zeros(6, 6)).run(images, labels)
    assert torch.equal(result.adversarials, images)


def test_random_starts_are_uniform_in_the_ball_of_the_pixels_that_move():
    """In n dimensions the share within half the radius is 2^-n; with n = 3 pixels of 108, 1/8."""
    mask = torch.zeros(3, 6, 6, dtype=torch.bool)
    mask[:, 0, 0] = True
    threat = ThreatModel("l2", 0.1, scope=None, mask=mask)
    start = threat.around(torch.full((2000, 3, 6, 6), 0.5)).random_start(torch.Generator().manual_seed(0))
    share = ((start - 0.5).flatten(1).norm(dim=1) <= 0.05).double().mean()
    assert abs(share - 1 / 8) < 4 * math.sqrt(1 / 8 * 7 / 8 / 2000)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ("all", "mask must be a tensor or a function of the images; got str"),
        (torch.ones(6), "mask must be (H, W) or (C, H, W), C being the images' channels or 1; got (6,)"),
        (torch.full((6, 6), 0.5), "mask must be True, or 1, where pixels may move"),
    ],
)
def test_wrong_masks_are_explained(mask, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        ThreatModel("linf", 0.1, mask=mask)


def test_a_mask_of_another_size_is_explained():
    with pytest.raises(
        ValueError, match=r"mask must have the images' height and width.*got \(5, 5\) for \(6, 3, 6, 6\)"
    ):
        OrthoPGD(small_model(), mask=torch.ones(5, 5)).run(*drawn())
