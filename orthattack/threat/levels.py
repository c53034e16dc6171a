"""The grid of stored images: points moved onto it, with their products with the image exactly 0 as integers.

An image stored with L levels in bounds has the values low + k (high - low) / (L - 1), k = 0 ... L - 1; with 256 levels,
those that a PNG keeps. In units of that grid a perturbation is an integer vector d, the image an integer vector n, and
⟨d, n⟩ = 0 can hold exactly. A point of the region is rounded, and the few units that ⟨d, n⟩ is then off are taken up by
moving some pixels by one level each: docs/method.md, "Exact in 8 bits".
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthattack.projection import IMAGE, Scope, block_size, cut, is_fine, joined, reciprocal, scope_dims, total
from orthattack.threat.norms import BALLS, length

if TYPE_CHECKING:
    from orthattack.threat import ThreatModel
    from orthattack.threat.norms import Norm

__all__ = ["LUMA", "Grid", "grid_units", "level_values", "levels_of", "radius_in_levels", "snapped"]

LUMA = (299, 587, 114)
"""Thousandths of red, green and blue in the luma of ITU-R BT.601, which is JPEG's and PIL's grey."""

# How many pixels of a group a trial looks at and may move, and among how many of each kind the last moves are sought.
_LOOKED, _MOVED, _LAST, _FORCED = 4096, 512, 32, 4
# How often all pixels are tried for a group that nothing else has helped.
_TRIALS = 40
# Luma: how large an excess is taken off at once, and by how many moves at most, of one colour too.
_OFF, _COINS = 600, 27
# For how many rows at a time, each of which takes half a megabyte.
_CHUNK = 512
# A radius may be this much too small for the integer it stands for, as 4/255 is in float32.
_SLACK = 5e-7


def level_values(levels: int, bounds: tuple[float, float], like: Tensor) -> Tensor:
    """(levels,) the values of stored images, in the dtype of `like`: those of ToTensor for 256 levels in (0, 1)."""
    low, high = bounds
    k = torch.arange(levels, dtype=torch.float64, device=like.device)
    return (low + k * (high - low) / (levels - 1)).to(like.dtype)


def levels_of(images: Tensor, levels: int, bounds: tuple[float, float]) -> Tensor:
    """The number of the level next to each value that is on the grid but for round-off; float64 if float32 is too
    coarse to tell."""
    low, high = bounds
    fine = images.dtype == torch.float32 and levels <= 4096 and max(abs(low), abs(high)) <= 4 * (high - low)
    x = images if fine else images.double()
    x = x - low if low else x
    return (x * ((levels - 1) / (high - low))).round_().clamp_(0, levels - 1)


def snapped(images: Tensor, levels: int, bounds: tuple[float, float]) -> Tensor:
    """`images` on the grid, moved by round-off at most.

    Raises:
        ValueError: an image is not on the grid, or its dtype cannot tell the levels apart.
    """
    values = level_values(levels, bounds, images)
    if bool((values.diff() <= 0).any()):
        raise ValueError(f"levels={levels} are more than {images.dtype} can tell apart in bounds {bounds}")
    found = values[levels_of(images, levels, bounds).long()]
    low, high = bounds
    off = (found - images).abs() > 4 * torch.finfo(images.dtype).eps * max(abs(low), abs(high))
    if bool(off.any()):
        sample = int(off.flatten(1).any(1).nonzero()[0])
        value = float(images[sample][off[sample]][0])
        k = (value - low) / (high - low) * (levels - 1)
        scale = f"{(levels - 1) / (high - low):g}"
        moved = f"(images * {scale}).round() / {scale}" if low == 0 else f"to steps of {(high - low) / (levels - 1):g}"
        raise ValueError(
            f"images must be as stored with levels={levels} in bounds ({low:g}, {high:g}); found {value:.6g}, level "
            f"{k:.3f} (sample {sample}): round them first, {moved}, after any resizing, or leave levels out"
        )
    return found


def grid_units(levels: int, bounds: tuple[float, float]) -> tuple[int, int]:
    """p and q, so that q k + p, an integer, is q / unit times the value of level k.

    Raises:
        ValueError: zero is not a simple fraction of the levels, so that no such integers exist.
    """
    low, high = map(Fraction, bounds)
    zero = low / (high - low) * (levels - 1)
    near = zero.limit_denominator(100)
    if abs(float(near - zero)) > 1e-9 * max(abs(float(zero)), 1.0):
        raise ValueError(
            f"levels={levels} in bounds ({bounds[0]:g}, {bounds[1]:g}) leave no integers to be orthogonal to: use "
            "bounds such as (0, 1), (0, 255) or (-1, 1), with the normalisation inside the model, or scope=None"
        )
    return near.numerator, near.denominator


def asks(tensor: Tensor) -> bool:
    """Whether what is done next may depend on values: asking for them would stop a GPU."""
    return not tensor.is_cuda


def radius_in_levels(norm: Norm, eps: Tensor, per_unit: float) -> Tensor:
    """A radius in units of the grid: a whole number of levels for L-infinity."""
    radius = eps * per_unit * (1 + _SLACK)
    return radius.floor() if norm == "linf" else radius


class Grid:
    """The points of a region that can be stored.

    Args:
        threat: the threat model, with levels.
        images: x, (N, C, H, W), float32 or float64, on the grid.
        dtype: of the images as they were given.
        eps: (N, 1, 1, 1) radii, float64.
        mask: (N, C, H, W) which pixels may move; None: all.
    """

    def __init__(
        self, threat: ThreatModel, images: Tensor, dtype: torch.dtype, eps: Tensor, mask: Tensor | None = None
    ) -> None:
        assert threat.levels is not None
        (self._low, high), self._top, self._norm = threat.bounds, threat.levels - 1, threat.norm
        self._per_unit = self._top / (high - self._low)
        self._values = level_values(threat.levels, threat.bounds, torch.empty(0, dtype=dtype, device=images.device))
        numbers = torch.arange(threat.levels, dtype=images.dtype, device=images.device)
        # Where it gives the same, as in (0, 1) and (0, 255), dividing is faster than looking up.
        self._divides = dtype == images.dtype and torch.equal(numbers / self._per_unit, self._values)
        self._k = levels_of(images, threat.levels, threat.bounds).to(images.dtype)
        self._is_box = threat.norm in ("linf", "l0")
        if threat.norm == "l0":
            eps = torch.full_like(eps, high - self._low)
        self._radius = radius_in_levels(threat.norm, eps, self._per_unit).clamp(max=1e9).to(images.dtype)
        self._given = self._mask = mask
        self._ends: Ends | None = None  # the least and the largest d, once they are wanted
        self._reach = min(float(self._radius.max()), self._top) if len(images) > 0 else 0.0
        self._shift, self._scale, self._scope = 0, 1, threat.scope
        self._normal = threat.normal if threat.scope is not None else None
        self._weights: tuple[int, ...] = ()
        if self._normal == "luma":
            self._weights = (1, 1, 1) if self._scope == "channel" else LUMA
        if self._normal == "image":
            self._shift, self._scale = grid_units(threat.levels, threat.bounds)
        self._largest = max(self._scale * self._top + abs(self._shift), 0, *self._weights)
        sums = threat._more
        # The stronger sums where channels are on their own: pairs within a channel can then always reach the rest.
        by_channel = "channel-constant" in sums or threat.scope == "channel"
        self._sums: Scope | None = None if not sums else "channel" if by_channel else "image"

    def select(self, index: Tensor) -> Grid:
        """The grid around the images at `index` only."""
        grid = copy.copy(self)
        grid._k, grid._radius, grid._ends = self._k[index], self._radius[index], None
        grid._given = grid._mask = None if self._given is None else self._given[index]
        return grid

    def nearest(self, points: Tensor) -> Tensor:
        """Points of the grid near `points`, in the ball, the bounds and orthogonal as integers, in the images' dtype.

        Groups of pixels for which nothing else is found stay as they are in the images.
        """
        k, per_unit = self._k, self._per_unit
        target = points.to(k.dtype) - self._low if self._low else points.to(k.dtype, copy=True)
        target.mul_(per_unit)
        if self._low:  # what is on the grid is so but for round-off
            whole = target.round()
            target = torch.where((target - whole).abs() < 1e-3, whole, target)
        if self._given is not None:
            target = torch.where(self._given, target, k)
        if self._norm == "l0":  # no other pixels may move for the repair
            self._mask = ((target - k).abs() >= 1e-3).any(1, keepdim=True).expand_as(k)
        if self._is_box:
            d = target.clamp_(0, self._top).round().sub_(k).clamp_(-self._radius, self._radius)
        else:
            d = self._in_ball(target.sub_(k))
            target.add_(k)
        if self._is_bound:
            self._balance(d, target)
        level = d.add_(k)
        if self._divides:
            return level.div_(per_unit)
        return self._values.index_select(0, level.flatten().int()).view_as(level)

    def _in_ball(self, target: Tensor) -> Tensor:
        """The integers next to s times a `target` d, scaled in place, at the s at which they are as long as that.

        Rounding alone would lose a perturbation that is smaller than half a level nearly everywhere. For a linear
        objective g, round(s g) is what gains the most of all integers of its L2 norm.
        """
        order, k = BALLS[self._norm].order, self._k
        # For the last few moves of the repair, most by a level from 0, a little of the ball is kept back.
        keep = 0.0 if not self._is_bound else _COINS if self._weights else 8.0
        radius = self._radius.double()
        stays = self._is_settled(target, radius)
        radius = torch.maximum(radius.pow(order) - order * keep, 0.9 * radius.pow(order)).pow(1 / order)
        asked = length(target, order)
        wanted = torch.minimum(asked, radius)
        if self._ends is None:
            self._ends = -k, self._top - k
        (down, up), room = self._ends, torch.empty_like(k)

        def size(s: Tensor, v: Tensor = target, down: Tensor = down, up: Tensor = up, room: Tensor = room) -> Tensor:
            return length(torch.mul(v, s.to(v.dtype), out=room).round_().clamp_(down, up), order)

        def halved(wanted: Tensor, v: Tensor = target, *sample: Tensor) -> Tensor:
            largest = v.abs().amax(IMAGE, keepdim=True).double()
            low = torch.where(largest > 0, 0.4999 * reciprocal(largest), 1)
            high = torch.maximum(2 * reciprocal(wanted / v[0].numel() ** (1 / order)), 2 * low).clamp(min=2)
            best = low
            for _ in range(12):
                s = (low * high).sqrt()
                fits = size(s, v, *sample) <= wanted * (1 + 1e-7)
                best, low, high = torch.where(fits, s, best), torch.where(fits, s, low), torch.where(fits, high, s)
            return best

        count, found = target[0].numel(), wanted == 0  # where all are 0
        best = torch.ones_like(wanted)
        if asks(target) and count > 8 * _LOOKED:  # some of the pixels tell about where it is
            every = count // (4 * _LOOKED) | 1
            few = [t.flatten(1)[:, ::every].reshape(len(k), 1, 1, -1).contiguous() for t in (target, down, up)]
            few.append(torch.empty_like(few[0]))
            share = wanted * length(few[0], order) * reciprocal(asked)
            near, found = self._approached(lambda s: size(s, *few), best, share)
            if not bool(found.all()):
                near = torch.where(found, near, halved(share, *few))
            best, found = self._approached(size, near, wanted)
        if not asks(target) or not bool(found.all()):
            best = torch.where(found, best, halved(wanted))
        target.mul_(torch.where(stays, 1, best).to(target.dtype))
        return torch.round(target, out=room).clamp_(down, up)

    @staticmethod
    def _approached(size: Callable[[Tensor], Tensor], s: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The largest s found at which `size(s)`, which grows with s, is at most `wanted`, mostly by some 0.2 %, and
        where one was found. From a guess, as if the size were a power of s; each miss makes it less particular."""
        low, high, best = torch.zeros_like(s), torch.full_like(s, torch.inf), s
        found = done = torch.zeros_like(s, dtype=torch.bool)
        power, before, f_before = torch.ones_like(s), s, wanted
        for attempt in range(6):
            f, slack = size(s), min(0.002 * 2**attempt, 0.008)
            fits = f <= wanted * (1 + 1e-7)
            better = fits & ~done & (s > low)
            best, found = torch.where(better, s, best), found | better
            low, high = torch.where(better, s, low), torch.where(fits, high, torch.minimum(high, s))
            # What is done stays so, whatever else is in the batch.
            done = done | (fits & (f >= (1 - slack) * wanted)) | (high <= low * 1.002)
            if bool(done.all()):
                break
            if attempt > 0:
                slope = (f / f_before).log() / (s / before).log()
                power = torch.where(slope.isfinite(), slope.clamp(0.1, 8), power)
            s_next = s * ((1 - slack / 2) * wanted * reciprocal(f)) ** (1 / power)
            inside = (s_next > low) & (s_next < high)
            middle = torch.where(high < torch.inf, (low * high).sqrt(), 1.1 * s)
            before, f_before, s = s, f, torch.where(inside, s_next, torch.where(low > 0, middle, 0.9 * s))
        return best, found

    def _is_settled(self, target: Tensor, radius: Tensor) -> Tensor:
        """(N, 1, 1, 1) whether d is on the grid and keeps all there is to keep: of its ball nothing is kept back."""
        some = target.flatten(1)[:, :: target[0].numel() // _LOOKED | 1]
        if asks(target) and bool(((some - some.round()).abs().amax(1) >= 1e-3).all()):
            return torch.zeros_like(radius, dtype=torch.bool)
        d = target.round()
        found = ((target - d).abs().amax(IMAGE, keepdim=True) < 1e-3) & (
            length(d, BALLS[self._norm].order) <= radius * (1 + 1e-7)
        )
        if self._is_bound and (not asks(d) or bool(found.any())):
            scope = None if self._normal is None else self._scope
            for n, where in ((torch.ones_like(d), self._sums), (self._normals(), scope)):
                if where is not None:
                    kept = self._product(d, n, where) == 0
                    found = found & kept.view(len(d), -1).all(1).view(-1, 1, 1, 1)
        return found

    @property
    def _is_bound(self) -> bool:
        return self._normal is not None or self._sums is not None

    def _normals(self) -> Tensor:
        """What d is orthogonal to, in whole numbers."""
        if self._normal == "image":
            return self._k if (self._scale, self._shift) == (1, 0) else self._scale * self._k + self._shift
        if self._weights:
            return self._k.new_tensor(self._weights).view(1, 3, 1, 1).expand_as(self._k)
        return torch.ones_like(self._k)

    def _balance(self, d: Tensor, target: Tensor) -> None:
        """Make the products of d with the normals 0, in place: first the sums, then, with pixels moved in pairs that
        leave these as they are, the products."""
        kept = torch.ones_like(self._radius, dtype=torch.bool)
        if self._sums is not None:
            kept = kept & self._repaired(d, target, torch.ones_like(d), self._sums, None)
        if self._normal is not None and self._scope is not None:
            kept = kept & self._repaired(d, target, self._normals(), self._scope, self._sums)
        if not self._is_box:
            kept = kept & (length(d, BALLS[self._norm].order) <= self._radius)
        if not asks(d) or not bool(kept.all()):
            together = "image" in (self._scope if self._normal else None, self._sums)
            d.mul_(kept.amin((1, 2, 3), keepdim=True) if together else kept)

    def _repaired(self, d: Tensor, target: Tensor, n: Tensor, scope: Scope, sums: Scope | None) -> Tensor:
        """d with ⟨d, n⟩ = 0 in the vectors of the scope, in place, and where that was reached; `sums` stay."""
        apart = scope == "image" and sums == "channel"  # one channel after the other takes up what it can
        inner: Scope = "channel" if apart else scope
        excess = self._product(d, n, scope)
        for c in range(d.shape[1] if apart else 1):
            part = slice(c, c + 1) if apart else slice(None)
            rows, goal, normal, k = (_rows(t[:, part], inner) for t in (d, target, n, self._k))
            radius = self._radius.view(-1, 1).repeat_interleave(len(rows) // len(d), 0)
            wide = 1 if self._is_box else 4  # few may be moved towards 0 where most are there
            if self._mask is not None:
                radius = radius * _rows(self._mask[:, part], inner)
            limits = self._limits(k, radius)
            excess = _moved(excess, rows, goal, normal, limits, sums is not None, wide)
            if self._weights:
                excess = _exchanged(excess, rows, goal - k, normal, limits(rows, slice(None), slice(None))[1])
            if is_fine(inner):
                d.copy_(_unrolled(rows, d, inner).clone())  # of one pixel, rows are d itself
        found = excess == 0
        if scope == "image":
            return found.view(-1, 1, 1, 1)
        return _unrolled(found.expand(-1, d[0].numel() * len(d) // len(found)), d, scope)

    def _product(self, d: Tensor, n: Tensor, scope: Scope) -> Tensor:
        """⟨d, n⟩ of each row, exact, float64 (R, 1)."""
        largest = self._reach * self._largest * d.shape[-1]
        dims = None if is_fine(scope) else scope_dims(scope)
        if dims is not None and largest < 2**24:
            return total(d * n, dims).double().view(-1, 1)
        return _rows(d.double() * n, scope).sum(1, keepdim=True)

    def _limits(self, k: Tensor, radius: Tensor) -> Limits:
        """What some columns of rows of d may become, where many are moved and where the last few are, and their k."""

        def within(d: Tensor, rows: Any, columns: slice) -> tuple[Ends, Ends, Tensor]:
            at, most = k[:, columns][rows], (radius if self._mask is None else radius[:, columns])[rows]
            box = torch.maximum(-most, -at), torch.minimum(most, self._top - at)
            # Towards 0 no ball is left; of that for the last few something was left over.
            return (box if self._is_box else (d.clamp(max=0), d.clamp(min=0))), box, at

        return within


def _rows(t: Tensor, scope: Scope) -> Tensor:
    """(R, m): a row for each vector of the scope; a view, but for colours and blocks."""
    if scope == "pixel":
        return t.movedim(1, -1).reshape(-1, t.shape[1])
    return t.flatten(1) if scope == "image" else cut(t, scope).flatten(2).flatten(0, 1)


def _unrolled(rows: Tensor, like: Tensor, scope: Scope) -> Tensor:
    """The tensor (N, C, H, W) of these rows."""
    n, channels, height, width = like.shape
    if scope == "pixel":
        return rows.reshape(n, height, width, channels).movedim(-1, 1)
    k = block_size(scope)
    return rows.view_as(like) if k is None else joined(rows.reshape(n, -1, k, k), like)


Ends = tuple[Tensor, Tensor]
"""The least and the largest values."""

Limits = Callable[[Tensor, Any, slice], tuple[Ends, Ends, Tensor]]


def _moved(excess: Tensor, d: Tensor, target: Tensor, n: Tensor, limits: Limits, pairs: bool, wide: int) -> Tensor:
    """Move entries of rows d (R, m), in place, by one level each, so that `excess` (R, 1), ⟨d, n⟩, becomes 0; the
    target is one of k + d.

    Some entries of each row are looked at, then others, then all. On a GPU, which asking would stop, all are not.
    With `pairs` an entry moves up where another moves down. Returns the excess that is left.
    """
    stride = d.shape[1] // (wide * _LOOKED) | 1
    trials = [slice(first % stride, None, stride) for first in range(3)]
    if asks(d):
        trials = [*trials[:stride], *[slice(None)] * _TRIALS]
    excess, stuck = excess.clone(), torch.zeros_like(excess, dtype=torch.bool)
    for columns in trials:
        rows = None
        if asks(d):
            rows = ((excess != 0) & ~stuck).squeeze(1).nonzero().squeeze(1)
            if len(rows) == 0:
                break
        # In parts, so that what is tried for each fits the memory.
        firsts = range(0, len(d), _CHUNK)
        parts = [slice(k, k + _CHUNK) for k in firsts] if rows is None else torch.split(rows, _CHUNK)
        for chunk in parts:
            part, goal, normal = (t[:, columns][chunk] for t in (d, target, n))
            inner, outer, level = limits(part, chunk, columns)
            goal = goal - level
            count = part.shape[1] if columns == slice(None) else _MOVED
            before = excess[chunk]
            left, change = _bulk(before, part, goal, normal, inner, count, pairs)
            part = part + change
            if not asks(d) or bool(left.any()):
                some = slice(None, None, wide)  # enough for a few moves
                ends = outer[0][:, some], outer[1][:, some]
                left, change = _last(left, part[:, some], goal[:, some], normal[:, some], ends, pairs)
                part[:, some] += change
            d[:, columns][chunk], excess[chunk] = part, left
            if columns == slice(None):
                stuck[chunk] = left.abs() >= before.abs()
    return excess


def _bulk(
    excess: Tensor, d: Tensor, target: Tensor, n: Tensor, limits: Ends, count: int, pairs: bool
) -> tuple[Tensor, Tensor]:
    """What is left of the excess (R, 1), and moves (R, m), -1, 0 or 1: the cheapest, as long as the excess keeps its
    sign. Cheap is what moves little away from the target for what it takes off."""
    cheapest = _moves(excess, d, target, n, limits, count, pairs)
    a, at, way_a, _ = cheapest(1, None if pairs else excess.abs())
    gain = a
    if pairs:  # large ones with small ones
        b, bt, way_b, _ = cheapest(-1)
        order_a = a.nan_to_num(-torch.inf).argsort(1, descending=True)
        order_b = b.nan_to_num(torch.inf).argsort(1)
        at, way_a, bt, way_b = (
            t.gather(1, o) for t, o in ((at, order_a), (way_a, order_a), (bt, order_b), (way_b, order_b))
        )
        gain = a.gather(1, order_a) - b.gather(1, order_b)
    gain = gain.nan_to_num(0).clamp_(min=0)
    taken = (gain.cumsum(1) <= excess.abs()) & (gain > 0)
    change = torch.zeros_like(d).scatter_add_(1, at, way_a * taken)
    if pairs:
        change.scatter_add_(1, bt, way_b * taken)
    return excess - excess.sign() * (gain * taken).sum(1, keepdim=True), change


def _last(excess: Tensor, d: Tensor, target: Tensor, n: Tensor, limits: Ends, pairs: bool) -> tuple[Tensor, Tensor]:
    """The same by a few moves: f + a - b as near to the excess as can be, each of f, a and b one move or none; with
    `pairs`, f = a' - b' and a - b are pairs. Of those that are as near, the cheapest."""
    cheapest = _moves(excess, d, target, n, limits, 8 * _LAST, pairs)
    (a, at, way_a, cost_a), (b, bt, way_b, cost_b) = _various(cheapest(1)), _various(cheapest(-1))
    none, few = torch.zeros_like(excess), a[:, :_FORCED].shape[1]
    at_f, way_f = torch.cat([at[:, :few], bt[:, :few]], 1), torch.cat([way_a[:, :few], way_b[:, :few]], 1)
    f, cost_f = torch.cat([none, a[:, :few], -b[:, :few]], 1), torch.cat([none, cost_a[:, :few], cost_b[:, :few]], 1)
    if pairs:
        f = torch.cat([none, a[:, :few] - b[:, :few], a[:, :few] - b[:, :few].flip(1)], 1)
        cost_f = torch.cat([none, cost_a[:, :few] + cost_b[:, :few], cost_a[:, :few] + cost_b[:, :few].flip(1)], 1)
        at_f, way_f = torch.cat([at[:, :few]] * 2, 1), torch.cat([way_a[:, :few]] * 2, 1)
        bt_f = torch.cat([bt[:, :few], bt[:, :few].flip(1)], 1)
    a, b, cost_a, cost_b = (torch.cat([none, t[:, few:]], 1) for t in (a, b, cost_a, cost_b))
    left = excess.abs()[:, :, None, None] - f[:, :, None, None] - a[:, None, :, None] + b[:, None, None, :]
    cost = cost_f[:, :, None, None] + cost_a[:, None, :, None] + cost_b[:, None, None, :]
    if pairs:  # one alone would change the sum
        cost[:, :, 0, 1:], cost[:, :, 1:, 0] = torch.inf, torch.inf
    left, cost = left.flatten(1), cost.flatten(1)
    rank = (left.abs() + cost.clamp(max=400) / 1000).masked_fill_(~(cost < torch.inf), torch.inf)
    best = rank.argmin(1, keepdim=True)
    left = left.gather(1, best)
    better = left.abs() < excess.abs()
    nth_f, nth_a, nth_b = best // (a.shape[1] * b.shape[1]), best // b.shape[1] % a.shape[1], best % b.shape[1]
    uses = [(nth_a, at[:, few:], way_a[:, few:]), (nth_b, bt[:, few:], way_b[:, few:]), (nth_f, at_f, way_f)]
    if pairs:
        uses.append((nth_f, bt_f, torch.cat([way_b[:, :few]] * 2, 1)))
    change = torch.zeros_like(d)
    for nth, index, way in uses:
        if index.shape[1] > 0:
            at_most = (nth - 1).clamp(min=0)
            change.scatter_add_(1, index.gather(1, at_most), way.gather(1, at_most) * (better & (nth > 0)))
    return torch.where(better, excess.sign() * left, excess), change


@cache
def _fewest() -> list[tuple[int, ...]]:
    """Of every excess from -_OFF to _OFF, the fewest moves of red, green and blue by a level that take it off luma."""
    found, seen = {0: (0, 0, 0)}, [0]
    for excess in seen:  # which grows
        for channel, weight in enumerate(LUMA):
            for way in (1, -1):
                other = excess - way * weight
                if abs(other) <= 3 * _OFF and other not in found:
                    moves = list(found[excess])
                    moves[channel] += way
                    found[other] = (moves[0], moves[1], moves[2])
                    seen.append(other)
    return [found[excess] for excess in range(-_OFF, _OFF + 1)]


def _exchanged(excess: Tensor, d: Tensor, target: Tensor, n: Tensor, limits: Ends) -> Tensor:
    """Take off the excess (R, 1) of luma, where `_moved`, which moves three at a time, ends a little off: in rows d
    (R, m), in place, by the fewest moves that do, of the cheapest entries of each colour. Returns what is left."""
    fits = excess.abs() <= _OFF
    table = torch.tensor(_fewest(), device=d.device)
    wanted = table[torch.where(fits, excess, 0).long().squeeze(1) + _OFF]
    change, ok = torch.zeros_like(d), fits
    for channel, weight in enumerate(LUMA):
        times = wanted[:, channel : channel + 1]
        way = times.sign().to(d.dtype)
        moved = d + way
        allowed = (n == weight) & (moved >= limits[0]) & (moved <= limits[1])
        cost = torch.where(allowed, -way * (target - d), torch.inf)
        cost, at = cost.topk(min(_COINS, d.shape[1]), largest=False)
        used = torch.arange(cost.shape[1], device=d.device) < times.abs()
        ok = ok & (used.sum(1, keepdim=True) == times.abs()) & ((cost < torch.inf) | ~used).all(1, keepdim=True)
        change.scatter_add_(1, at, way * used)
    d.add_(change * ok)
    return torch.where(ok, 0, excess)


Moves = tuple[Tensor, Tensor, Tensor, Tensor]
"""What each move takes off the excess (NaN where there is none), of which entry, by 1 or -1, and its cost: (R, K)."""


def _moves(
    excess: Tensor, d: Tensor, target: Tensor, n: Tensor, limits: Ends, count: int, pairs: bool
) -> Callable[..., Moves]:
    """The `count` cheapest moves that take off (1) or add (-1), `most` (R, 1) at most; of pairs, that of the one entry
    or of the other. The cost is by how much the square distance to the target grows."""
    there = -excess.sign().to(d.dtype)
    there = there.expand_as(n) if pairs else there * n.sign()
    size = n if pairs else n.abs()

    def cheapest(side: int, most: Tensor | None = None) -> Moves:
        way = side * there
        moved, cost = d + way, (1 - 2 * way * (target - d)).clamp_(min=1e-6)
        cost = cost if pairs else cost.div_(size)
        allowed = (moved >= limits[0]) & (moved <= limits[1]) & (way != 0)
        if most is not None:
            allowed = allowed & (size <= most)
        cost, at = torch.where(allowed, cost, torch.inf).topk(min(count, d.shape[1]), largest=False)
        sizes = torch.where(cost < torch.inf, size.gather(1, at), torch.nan)
        return sizes.double(), at, way.gather(1, at), cost.double()

    return cheapest


def _various(moves: Moves) -> Moves:
    """A few of the moves, in this order but for those whose size has come before: these come after one of each size,
    and so on."""
    size = moves[0]
    number = torch.arange(size.shape[1], device=size.device).expand_as(size)
    ordered, order = size.sort(stable=True, dim=1)
    starts = torch.cat([number[:, :1], torch.where(ordered.diff() == 0, 0, number[:, 1:])], 1)
    nth = number - starts.cummax(1).values  # of those of the same size
    nth = torch.where(ordered.isnan(), len(number[0]), nth)
    index = torch.empty_like(nth).scatter_(1, order, nth).argsort(stable=True, dim=1)[:, : _LAST + _FORCED]
    size, at, way, cost = (t.gather(1, index) for t in moves)
    return size, at, way, cost
