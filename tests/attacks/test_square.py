"""The squares: how large, where, with what on them, and that each proposal is a point of the region."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from orthattack import Square, ThreatModel
from orthattack.attacks.square import SquareSearch, _bump, _filled, _moved, _stamped, _stripes, _window
from orthattack.threat import perturbation_norm
from tests.conftest import make_images


def task(norm="linf", eps=0.1, seed=0, shape=(2, 3, 12, 16), scope=None):
    images = 0.25 + 0.5 * make_images("uniform", shape, 0, torch.float64)
    region = ThreatModel(norm, eps, scope=scope).around(images)
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(region=region, uniform=lambda *s: torch.rand(s, generator=generator, dtype=torch.float64))


def test_the_area_halves_after_the_shares_of_the_paper():
    """p = 0.8, halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 of 10,000 queries."""
    search = SquareSearch(10_000)
    sides = [search._side(query, torch.Size([224, 224])) for query in range(10_000)]
    changes = [0, *(k for k in range(1, 10_000) if sides[k] != sides[k - 1])]
    assert changes == [0, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
    assert [sides[k] for k in changes] == [round(math.sqrt(0.8 / 2**j) * 224) for j in range(10)]
    assert SquareSearch(100)._side(3, torch.Size([224, 224])) == sides[201]
    assert SquareSearch(10)._side(9, torch.Size([2, 2])) == 1
    assert SquareSearch(10)._side(0, torch.Size([4, 30])) == 4
    assert SquareSearch(10)._side(0, torch.Size([8, 15])) == 8
    assert SquareSearch(10)._side(0, torch.Size([11, 10])) == round(math.sqrt(88))


def test_windows_reach_every_place_and_lie_inside():
    seen = set()
    for seed in range(400):
        rows, columns = _window(task(seed=seed), 10)
        assert (rows.stop - rows.start, columns.stop - columns.start) == (10, 10)
        seen.add((rows.start, columns.start))
    assert seen == {(top, left) for top in range(3) for left in range(7)}


def test_the_start_is_stripes_of_the_largest_perturbation():
    for norm, eps in (("linf", 0.1), ("l2", 0.7), ("l1", 9.0)):
        for seed in range(3):
            made = task(norm, eps, seed)
            delta = _stripes(made) - made.region.images
            torch.testing.assert_close(perturbation_norm(delta, norm), torch.full((2,), eps).double())
            assert (delta == delta[:1, :, :1]).all() or torch.allclose(delta, delta[:1, :, :1].expand_as(delta))
            height = float(delta.abs().max())
            torch.testing.assert_close(delta.abs(), torch.full_like(delta, height))
    signs = torch.cat([(_stripes(task(seed=s)) > task().region.images)[0, :, 0].flatten() for s in range(40)])
    assert 0.45 < float(signs.double().mean()) < 0.55


def test_a_pattern_fills_the_radius_of_each_sample():
    eps = torch.tensor([0.1, 0.3], dtype=torch.float64)
    for norm in ("linf", "l2", "l1"):
        region = ThreatModel(norm, eps).around(task().region.images)
        pattern = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        torch.testing.assert_close(perturbation_norm(_filled(region, pattern), norm), eps)


def test_a_stamp_sets_one_square_to_the_radius_and_nothing_else():
    for seed in range(5):
        made = task(seed=seed)
        before = made.region.images + 0.03
        after = _stamped(made, before, 5)
        changed = (after != before).all(1).all(0)
        rows, columns = changed.any(1).nonzero().squeeze(1), changed.any(0).nonzero().squeeze(1)
        assert int(changed.sum()) == 25
        assert (len(rows), len(columns)) == (5, 5)
        delta = (after - made.region.images)[:, :, rows[0] : rows[0] + 5, columns[0] : columns[0] + 5]
        torch.testing.assert_close(delta.abs(), torch.full_like(delta, 0.1))
        assert (delta == delta[:1, :, :1, :1]).all() or torch.allclose(delta, delta[:1, :, :1, :1].expand_as(delta))
        assert torch.equal(before, made.region.images + 0.03)  # not written into


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.3), ("l1", 0.9)])
def test_a_move_empties_one_square_fills_another_and_uses_the_radius_up(norm, eps):
    order, side, checked = 2 if norm == "l2" else 1, 3, 0

    def power(values):
        return values.abs().pow(order).sum()

    for seed in range(8):
        made = task(norm, eps, seed)
        noise = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        share = torch.tensor([0.5, 1.0], dtype=torch.float64) * eps / perturbation_norm(noise, norm)
        old = noise * share.view(-1, 1, 1, 1)
        drawn = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        corners = [int(u * (n - side + 1)) for u, n in zip(drawn, (12, 16, 12, 16), strict=True)]
        new, emptied = (
            (..., slice(top, top + side), slice(left, left + side)) for top, left in (corners[:2], corners[2:])
        )
        expected = old.clone()
        expected[emptied] = 0
        if not torch.equal(expected[new], old[new]):  # they overlap: what they share counts twice, and is projected
            continue
        checked += 1
        # In each channel: a bump of either sign and what was there, both at length 1, scaled to what is free.
        after = _moved(made, made.region.images + old, side) - made.region.images
        unused = (eps**order - perturbation_norm(old, norm) ** order).clamp(min=0) / 3
        for sample in range(2):
            for channel in range(3):
                target, source = old[new][sample, channel], old[emptied][sample, channel]
                budget = (unused[sample] + power(target) + power(source)) ** (1 / order)
                bump, kept = (values / power(values) ** (1 / order) for values in (_bump(side), target))
                both = [kept + sign * bump for sign in (1, -1)]
                both = [budget * values / power(values) ** (1 / order) for values in both]
                found = after[new][sample, channel]
                expected[new][sample, channel] = min(both, key=lambda values: float((values - found).abs().max()))
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-6 * eps)
        torch.testing.assert_close(perturbation_norm(after, norm), torch.full((2,), eps).double(), rtol=1e-6, atol=0)
    assert checked >= 4


def test_each_proposal_is_one_square_away_from_the_best_point_so_far():
    images = 0.25 + 0.5 * make_images("uniform", (1, 3, 12, 12), 0)
    normal = torch.randn(images.numel(), generator=torch.Generator().manual_seed(0))
    asked = []

    def model(x):
        score = x.flatten(1) @ normal - 1e3  # never fooled
        if len(x) == 1:  # not when it is looked at
            asked.append((x.clone(), float(score)))
        return torch.stack([torch.zeros(len(x)), score], 1)

    Square(model, eps=0.1, queries=30, generator=torch.Generator().manual_seed(0))(images, torch.tensor([0]))
    tried = asked[-30:]
    (best, highest), gains = tried[0], 0
    for query, (x, score) in enumerate(tried[1:]):
        changed = (x != best)[0].any(0)
        side = SquareSearch(30)._side(query, images.shape[-2:])
        for lines in (changed.any(0), changed.any(1)):
            places = lines.nonzero()
            assert len(places) == 0 or places.max() - places.min() < side
        if score > highest:
            best, highest, gains = x, score, gains + 1
    assert gains > 3


def test_a_bump_is_two_opposite_peaks():
    assert _bump(1).tolist() == [[1.0]]
    bump = _bump(4)
    assert bump.shape == (4, 4)
    torch.testing.assert_close(bump[2:], -bump[:2])
    expected = [[1 / (1 + 0.25 + (k - 1.5) ** 2) for k in range(4)]] * 2
    torch.testing.assert_close(bump[:2], torch.tensor(expected, dtype=torch.float64))
    bump = _bump(5)
    assert bump[1, 2] == 1
    assert bump[3:].sign().tolist() == [[-1.0] * 5] * 2
    torch.testing.assert_close(bump[0, 0], torch.tensor(1 / (1 + 1 + 4), dtype=torch.float64))


@pytest.mark.parametrize("scope", ["image", "channel"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.7), ("l1", 9.0)])
def test_proposals_are_points_of_the_region(norm, eps, scope):
    made = task(norm, eps, scope=scope)
    points = _stripes(made)
    for side in (9, 4, 1):
        points = (_stamped if norm == "linf" else _moved)(made, points, side)
        delta = points - made.region.images
        assert (perturbation_norm(delta, norm) <= eps * (1 + 1e-6)).all()
        assert made.region.threat.cosine(delta, made.region.images).max() <= 1e-9


def test_its_option_is_the_number_of_queries():
    assert SquareSearch(1).options(0.1) == {"queries": 1}
    with pytest.raises(ValueError, match="queries must be an integer >= 1; got None"):
        SquareSearch(None)
