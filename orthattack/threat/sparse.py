"""The best L1 step on planes: few pixels move, so it is sought among those with the largest gradient.

The multipliers found tell whether it is that of all pixels: none of the others would move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orthattack.projection import IMAGE, dot, reciprocal, total
from orthattack.threat.norms import leading
from orthattack.threat.rootfind import Bracket, at_jump, search, try_all

# The duality gap, relative to the objective.
_GAP = 1e-5
# Of more groups than channels, those are chosen that move, not some pixels of each.
_GROUPS = 16
# Of so few pixels a sort is quicker than a search.
_SORTED = 3 * 2**10
# Of images of so few values more are looked at, which costs little there.
_SMALL = 2**16


def best_sparse(
    g: Tensor,
    normal: Tensor,
    start: Tensor,
    lower: Tensor,
    upper: Tensor,
    limit: Tensor,
    alpha: Tensor,
    count: int,
    dims: tuple[int, ...],
    looked: int = 0,
) -> tuple[Tensor, Tensor]:
    """Solve::

        max_d ⟨g, d⟩  subject to  lower <= s + d <= upper, |d| <= limit,  ⟨d, n⟩ = 0 in each group,  ‖d‖₁ <= α

    Args:
        g: the gradient, (N, C, H, W), without its components along the normals.
        normal: n, the same shape.
        start: s, the same shape.
        lower, upper: the box, which holds s; the same shape.
        limit: how far each pixel may move, (N, 1, 1, 1).
        alpha: α, (N, 1, 1, 1), greater than 0.
        count: how many pixels will move, to start with.
        dims: those of a group.
        looked: how many times as many pixels are looked at, 2 or of small images 4 to start with; where that turns out
            to be too few, four times as many.

    Returns:
        d, with a duality gap below 1e-5 of the optimum as a rule, and its norm, or some number above α if that is α.
    """
    looked = looked or (2 if g[0].numel() > _SMALL else 4)
    if g.is_cuda or g[0].numel() <= 4 * looked * count:  # asking would stop the GPU
        return _solved(g, normal, start, lower, upper, limit, alpha, count, dims)[:2]
    groups = 1 if dims == IMAGE else g.shape[1]
    flat = [t.reshape(len(g), groups, -1) for t in (g, normal, start, lower, upper)]
    size = flat[0].abs()
    if groups > _GROUPS:
        top = size.amax(2).topk(min(groups, 1 + looked * count // 3), dim=1)  # in each, two or more move
        index, shape = top.indices.unsqueeze(2).expand(-1, -1, size.shape[2]), (-1, *g.shape[2:])
        along, weight = 1, torch.ones(())
    else:
        index, is_one, _ = leading(size.flatten(0, 1), looked * count // min(groups, 2))
        index, weight = index.view(len(g), groups, -1), is_one.view(len(g), groups, -1)
        shape, along = (groups, 1, -1), 2
    some, along_some, *box = (t.gather(along, index).mul_(weight).view(len(g), *shape) for t in flat)
    at, low, high = box
    move, spent, multiplier, nu = _solved(some, along_some, at, low, high, limit, alpha, count, dims)
    found = torch.zeros_like(flat[0]).scatter_add_(along, index, move.view_as(index)).view_as(g)
    multiplier = multiplier.flatten(1).unsqueeze(2)
    if groups > _GROUPS:
        multiplier = torch.zeros_like(size[:, :, :1]).scatter_(1, index[:, :, :1], multiplier)
    moves = torch.addcmul(flat[0], flat[1], multiplier, value=-1, out=size).abs_() > nu.flatten(1).unsqueeze(2)
    looked_at = moves.gather(along, index) & (weight > 0)
    if bool((left := moves.count_nonzero((1, 2)) > looked_at.count_nonzero((1, 2))).any()):
        of, within = (g[left], normal[left]), (start[left], lower[left], upper[left], limit[left])
        found[left], spent[left] = best_sparse(*of, *within, alpha[left], count, dims, 4 * looked)
    return found, spent


def _solved(
    g: Tensor, normal: Tensor, start: Tensor, lower: Tensor, upper: Tensor, limit: Tensor, alpha: Tensor, count: int,
    dims: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`_beyond`, of few pixels in float64, in which sorted places seldom tie."""
    kind = torch.float64 if _sorts(g) else g.dtype
    ranges = room(*(t.to(kind) for t in (start, lower, upper, limit)))
    answer = _beyond(g.to(kind), normal.to(kind), *ranges, alpha.to(kind), count, dims)
    move, spent, multiplier, nu = (t.to(g.dtype) for t in answer)
    return move, spent, multiplier, nu


def _beyond(
    g: Tensor, normal: Tensor, up: Tensor, down: Tensor, alpha: Tensor, count: int, dims: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same by the multiplier ν of the L1 norm, and the λ of each group and the ν that show that it is the optimum.

    A pixel is at the end of its range to which g - λx points where that is beyond ±ν, and stays where it is between.
    For each ν that is a search for λ, and the move's norm L falls as ν grows. Of the concave gain V(L) a bracket gives
    two points, and the slope between them is the next ν, until the chord is the curve.
    """
    size = g.abs().flatten(1)
    largest = size.topk(min(count + count // 4 + 1, size.shape[1]), dim=1).values
    low, high = torch.zeros_like(alpha), largest[:, :1].view_as(alpha)
    problem = _Problem(g, normal, up, down, dims)
    many = few = torch.zeros_like(g)
    gain = won = less = share = torch.zeros_like(alpha)
    spent = bound = torch.full_like(alpha, torch.inf)  # no ν is known yet that is small enough
    done, asks = torch.zeros_like(alpha, dtype=torch.bool), not g.is_cuda
    multiplier, nu = torch.zeros_like(problem.multiplier), torch.where(high == 0, 0, bound)
    for attempt in range(40 if asks else 16):
        share = torch.where(done, share, (alpha - less) * reciprocal(spent - less))  # of the larger move
        reached = won + share * (gain - won)
        done = done | (bound - reached <= _GAP * reached) | (high == 0)
        if asks and bool(done.all()):
            break
        chord = (gain - won) * reciprocal(spent - less)
        if attempt == 0:
            tried = largest[:, -1].view_as(alpha)
        elif attempt == 1:  # as if each pixel that moves took as much as another
            rank = (0.98 * share * (largest.shape[1] - 1)).long().view(-1, 1)
            tried = torch.where(spent < torch.inf, largest.gather(1, rank).view_as(alpha), high / 4)
        else:
            tried = chord if attempt % 2 == 0 else low + (high - low) * (1 - share).clamp(0.1, 0.9)
            tried = torch.where(spent < torch.inf, tried, high / 4 if attempt == 2 else 0)
        found, size = problem.moved(tried)
        value = dot(g, found, IMAGE)
        over, under = ~done & (size > alpha), ~done & (size <= alpha)
        dual = value + tried * (alpha - size)
        least = ~done & (dual < bound)
        known = (dual, bound), (tried, nu), (problem.multiplier, multiplier)
        bound, nu, multiplier = (torch.where(least, *pair) for pair in known)
        low, high = torch.where(over, tried, low), torch.where(under, tried, high)
        many, spent, gain = (torch.where(over, *pair) for pair in ((found, many), (size, spent), (value, gain)))
        few, less, won = (torch.where(under, *pair) for pair in ((found, few), (size, less), (value, won)))
    return torch.lerp(few, many, share), torch.where(high == 0, less, spent), multiplier, nu


class _Problem:
    """The moves for one ν after the other, each search for λ starting from the last."""

    def __init__(self, g: Tensor, normal: Tensor, up: Tensor, down: Tensor, dims: tuple[int, ...]) -> None:
        self._parts, self._dims = (g, normal, up, -down), dims
        sizes = total(normal.abs(), dims)
        scale = total(g.abs(), dims) * reciprocal(sizes)
        self._scale = torch.where(scale > 0, scale, 1)
        higher, lower = up * normal, -down * normal
        self._ends = total(torch.maximum(higher, lower), dims), total(torch.minimum(higher, lower), dims)
        self.multiplier = torch.zeros_like(scale)  # λ
        self._slope: Tensor | None = None
        self._is_small = g.numel() <= 4 * scale.numel()

    def moved(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """For one ν, the move on the planes of the pixels whose g - λx is beyond it, and its L1 norm, (N, 1, 1, 1)."""
        dims, (g, normal, _, _) = self._dims, self._parts

        def along(g: Tensor, normal: Tensor, up: Tensor, down: Tensor, threshold: Tensor) -> Callable[..., Tensor]:
            return lambda multiplier: dot(_at(multiplier, g, normal, up, down, threshold), normal, dims)

        def narrowed(groups: Tensor) -> Callable[..., Tensor]:
            wide = threshold.expand(*groups.shape, 1, 1)
            return along(*(t[groups] for t in (*self._parts, wide)))

        def move(multiplier: Tensor) -> Tensor:
            return _at(multiplier, *self._parts, threshold)

        residual = along(*self._parts, threshold)
        if self._is_small:
            jumps = [by_group(((g + side) / normal).nan_to_num(0), dims) for side in (threshold, -threshold)]
            at = torch.cat(jumps).sort(dim=0).values
            bracket = try_all(residual, self._scale, at[1:] / 2 + at[:-1] / 2)
        elif _sorts(g):
            bracket = self._at_a_jump(threshold, residual)
            _, fa, _, fb = bracket
            holds = (fa >= 0) & (fb <= 0) & (fa > fb)
            if not bool(holds.all()):  # of pixels whose places tie but for round-off
                a, fa, b, fb = map(torch.where, (holds,) * 4, bracket, self._searched(residual, None))
                bracket = a, fa, b, fb
        else:
            bracket = self._searched(residual, narrowed if self._scale[0].numel() > _GROUPS else None)
        a, fa, b, fb = bracket
        found = torch.lerp(move(a), move(b), fa * reciprocal(fa - fb))
        self.multiplier, self._slope = a / 2 + b / 2, (fb - fa) * reciprocal(b - a)
        return found, total(found.abs(), IMAGE)

    def _at_a_jump(self, threshold: Tensor, residual: Callable[[Tensor], Tensor]) -> Bracket:
        """The narrowest bracket, by sorting the λ at which a pixel starts or stops to move."""
        g, normal, up, down = (t.flatten(self._dims[0]) for t in self._parts)
        nu, most = (t.flatten(self._dims[0]) for t in (threshold, self._ends[0]))
        places = torch.cat([(g - nu) / normal, (g + nu) / normal], -1).nan_to_num(0)
        jumps = torch.cat([up * normal, down * normal], -1).abs()
        a, b = (t.view_as(self._scale) for t in at_jump(places, jumps, most))
        return a, residual(a), b, residual(b)

    def _searched(self, residual: Callable[[Tensor], Tensor], narrow: Callable[..., Any] | None) -> Bracket:
        most, least = self._ends
        near = None if self._slope is None else (self.multiplier, self._slope)
        return search(residual, self._scale, 1e-6 * self._scale * (most - least), self._ends, near, narrow)


def _sorts(g: Tensor) -> bool:
    return not g.is_cuda and g[0].numel() <= _SORTED


def _at(multiplier: Tensor, g: Tensor, normal: Tensor, up: Tensor, down: Tensor, threshold: Tensor) -> Tensor:
    rest = torch.addcmul(g, normal, multiplier, value=-1)
    return torch.where(rest > threshold, up, torch.where(rest < -threshold, down, 0))


def room(start: Tensor, lower: Tensor, upper: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """How far each pixel may move up, and down."""
    return torch.minimum(upper - start, limit), torch.minimum(start - lower, limit)


def by_group(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """(K, ...): the K pixels of each group first, then the shape of a number per group."""
    shape = [1 if d - tensor.ndim in dims else n for d, n in enumerate(tensor.shape)]
    moved: Tensor = tensor.movedim(dims, tuple(range(len(dims))))
    return moved.reshape(-1, *shape)
