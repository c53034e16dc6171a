"""The search for one multiplier λ per group: where a falling function f(λ) = ⟨y(λ) - x, x⟩ meets 0.

The steps on a plane in a box come down to it, and the projections where Newton's method fails: docs/method.md, "One
multiplier".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from orthattack.projection import reciprocal, total

Bracket = tuple[Tensor, Tensor, Tensor, Tensor]
"""a, f(a), b, f(b) per group, with f(a) >= 0 >= f(b)."""

# To ask whether a search is done, the host would have to wait for the GPU; there, it is so long whatever it finds.
_TRIALS_GPU = 16

# After these trials a search goes on with the groups that are not done.
_NARROWED = (4, 8, 14, 20)


def ends_of(residual: Callable[[Tensor], Tensor], like: Tensor) -> Bracket:
    """The bracket (a, f(a), b, f(b)) of all λ, for f = `residual`."""
    b = torch.full_like(like, _largest(like))
    a = -b
    # There every pixel is as bright, or as dark, as it may be; round-off must not leave f without a root.
    return a, residual(a).clamp(min=0), b, residual(b).clamp(max=0)


def try_all(residual: Callable[[Tensor], Tensor], scale: Tensor, pivots: Tensor) -> Bracket:
    """The narrowest bracket that the (K, ...) pivots give."""
    a, fa, b, fb = ends_of(residual, scale)
    for pivot in pivots:
        f = residual(pivot)
        is_a, is_b = (f >= 0) & (pivot > a), (f < 0) & (pivot < b)
        a, fa = torch.where(is_a, pivot, a), torch.where(is_a, f, fa)
        b, fb = torch.where(is_b, pivot, b), torch.where(is_b, f, fb)
    return a, fa, b, fb


def sorted_few(values: Tensor) -> Tensor:
    """The (K, ...) values in ascending order along the first dimension, by K rounds of comparing neighbours: of a few
    quicker than a sort."""
    rows = list(values)
    for turn in range(len(rows)):
        for k in range(turn % 2, len(rows) - 1, 2):
            rows[k], rows[k + 1] = torch.minimum(rows[k], rows[k + 1]), torch.maximum(rows[k], rows[k + 1])
    return torch.stack(rows)


def by_sorting(
    residual: Callable[[Tensor], Tensor], ratio: Tensor, weight: Tensor, least: Tensor, dims: tuple[int, ...]
) -> Bracket:
    """The bracket of f(λ) = least + Σ weight_i over the pixels with ratio_i > λ, weights >= 0: the jump across 0.

    For a GPU: there a sort takes less than the many small steps of a search, one by one.
    """
    first = dims[0]
    ordered, order = ratio.nan_to_num(0).flatten(first).sort(dim=-1, descending=True)
    unit = 2**50 * reciprocal(total(weight, dims).flatten(first).double())
    # In integers: a GPU adds up the others in an order that changes from run to run.
    reached = (weight.flatten(first).gather(-1, order) * unit).long().cumsum(-1)
    at = (reached < (-least.flatten(first) * unit).long()).sum(-1, keepdim=True).clamp(max=ordered.shape[-1] - 1)
    b = ordered.gather(-1, at).view_as(least)
    a = torch.nextafter(b, torch.full_like(b, -torch.inf))  # all that tie with b are beyond it
    return a, residual(a).clamp(min=0), b, residual(b).clamp(max=0)


def at_jump(at: Tensor, jump: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """a and b, (..., 1), between which f(λ) meets 0: it is `top`, (..., 1), at first, and falls by each `jump` where λ
    passes `at`, both (..., J). Neither is a place of a jump, unless it is as near another as the dtype can tell."""
    ordered, order = at.sort(dim=-1)
    fallen = jump.gather(-1, order).cumsum(-1)
    here = ordered.gather(-1, (fallen < top).sum(-1, keepdim=True).clamp(max=at.shape[-1] - 1))
    ends = torch.full_like(here, _largest(here))
    places = torch.cat([-ends, ordered, ends], dim=-1)  # the first place is 1
    first, beyond = ((ordered < here).sum(-1, keepdim=True) + 1, (ordered <= here).sum(-1, keepdim=True) + 1)
    a, b = (places.gather(-1, k - 1) / 2 + places.gather(-1, k) / 2 for k in (first, beyond))
    return a, b


def search(
    residual: Callable[[Tensor], Tensor],
    scale: Tensor,
    tolerance: Tensor,
    ends: tuple[Tensor, Tensor],
    near: tuple[Tensor, Tensor] | None,
    narrow: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None,
) -> Bracket:
    """A bracket whose mixture has a duality gap of at most `tolerance`, by a safeguarded secant.

    It runs over u = λ / (scale + |λ|), which maps all λ to [-1, 1]; `scale` is the order of magnitude of λ, not 0.
    `ends` are f where λ is -infinity and infinity, `near` a λ to start at and the slope of f there, by default 0 and
    that between the ends. All are per group. Of many small groups, (N, G, 1, 1), `narrow` gives the function of some,
    (N, G) bool, so that a CPU need not go on with those that are done.
    """
    scale64 = scale.double()
    largest = _largest(scale)

    def value(u: Tensor) -> Tensor:
        return (scale64 * u / (1 - u.abs())).clamp(-largest, largest)

    def f_at(u: Tensor) -> Tensor:
        return residual(value(u).to(scale.dtype)).double()

    fa, fb = (end.double() for end in ends)
    a, b = torch.full_like(scale64, -1), torch.ones_like(scale64)
    u, slope = torch.zeros_like(scale64), (fb - fa) / 2
    if near is not None:
        u = near[0] / (scale64 + near[0].abs())
        slope = near[1] * scale64 / (1 - u.abs()).square()
    f = f_at(u)
    right = f >= 0
    stuck = done = torch.zeros_like(right)
    asks = not scale.is_cuda
    left = torch.ones(0)
    answer: tuple[Tensor, ...] = ()
    for attempt in range(200 if asks else _TRIALS_GPU):
        # A group that is done keeps its bracket, so that its answer does not depend on its batch.
        is_a, is_b = right & ~done, ~right & ~done
        a, fa = torch.where(is_a, u, a), torch.where(is_a, f, fa)
        b, fb = torch.where(is_b, u, b), torch.where(is_b, f, fb)
        gap = fa * -fb * reciprocal(fa - fb) * (value(b) - value(a))
        done = gap <= tolerance
        if asks and bool(done.all()):
            break
        if asks and narrow is not None and attempt in _NARROWED:
            bracket = value(a), fa, value(b), fb
            if not answer:
                answer, left = tuple(t.clone() for t in bracket), torch.ones(done.shape[:2], dtype=torch.bool)
            for known, found in zip(answer, bracket, strict=True):
                known[left] = found.view(-1, 1, 1)
            going = ~done.flatten()
            left = left.masked_scatter(left, going)
            state = a, fa, b, fb, u, f, slope, right, stuck, done, scale64, tolerance
            a, fa, b, fb, u, f, slope, right, stuck, done, scale64, tolerance = (t.view(-1, 1, 1)[going] for t in state)
            residual = narrow(left)
        # The secant tends to come from one side, which leaves the bracket wide: so it aims a little beyond the root, by
        # what the tolerance allows, and twice as far after two trials on the same side. Later trials also halve.
        beyond = (tolerance * reciprocal(slope.abs() * scale64)).sqrt() / 2
        target = u - f * reciprocal(slope) * torch.where(stuck, 2, 1) + torch.where(right, beyond, -beyond)
        usable = (target > a) & (target < b) & (attempt < 6 or attempt % 3 < 2)
        target = torch.where(usable, target, (a + b) / 2)
        u_before, f_before, right_before = u, f, right
        u, f = target, f_at(target)
        right = f >= 0
        stuck = right == right_before
        slope = torch.where(u != u_before, (f - f_before) * reciprocal(u - u_before), slope)
    bracket = value(a), fa, value(b), fb
    for known, found in zip(answer, bracket, strict=False):
        known[left] = found
    a, fa, b, fb = (t.to(scale.dtype) for t in answer or bracket)
    return a, fa, b, fb


def _largest(like: Tensor) -> float:
    """λ = infinity, to all intents: finite, so that times 0 it is 0 and the width of a bracket is a number."""
    return torch.finfo(like.dtype).max / 4
