"""The L2 step on planes of many pixels, in a few passes over the batch: Triton kernels for a GPU.

The same as `plane.Plane.unit_tangent` and `nearest_in_l2_ball`, for groups that are the rows of (G, L) float32 tensors,
as many of them to each sample. How the passes work: `fused`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthattack.threat.fused import _ALLOWED, _BLOCK, _G, _GN, _NN, _brightest, _few, _sum_gradient, _total

# How many steps Newton's method may take, after how many what rounding leaves of F is near enough, and how often a
# point outside the ball is pulled in, the last time to x itself. What is found does no more work.
_NEWTON, _LATE = 16, 4
_ROUNDS = 4
# How far below the radius Newton's method aims, how near it comes, and what above the radius is let pass, in radii.
_BELOW, _NEAR, _BEYOND = (tl.constexpr(size) for size in (2e-7, 3e-7, 8e-7))
# The cosine that ends it, at most what rounding takes from a number, the cosine beyond which one pixel is not enough.
_COSINE, _UNIT, _MUCH = (tl.constexpr(size) for size in (4e-7, 3e-8, 2e-5))
# A group's sums of its point, of its gradient without the normal's part, of y(s, λ).
_ALONG, _DISTANCE, _N2, _GRID, _FIRST = (tl.constexpr(k) for k in range(5))
_SIZE, _SQUARE = (tl.constexpr(k) for k in range(2))
_F, _LENGTH, _NORMAL_D, _PULLED_D, _F_S, _E_L, _SUMS = (tl.constexpr(k) for k in range(7))
# A sample's state: s, the least it may be, whether the search goes on.
_S, _LEAST_S, _GOES_ON, _STATES = (tl.constexpr(k) for k in range(4))


def unit_tangent(gradient: Tensor, normal: Tensor, out: Tensor, *, samples: int, block: int = _BLOCK) -> Tensor:
    """The gradient without its components along the normals, 0 in a row where no more than round-off is left, at length
    1 in each sample.

    Args:
        gradient, normal, out: (G, L), contiguous, float32.
        samples: how many samples the rows are of.
    """
    rows, length = gradient.shape
    blocks, groups = triton.cdiv(length, block), rows // samples

    def sums(count: int) -> Tensor:
        return torch.empty((rows, count, blocks), dtype=torch.float64, device=gradient.device)

    of_gradient, of_rest = sums(5), sums(2)
    sizes = {"L": length, "B": blocks, "BLOCK": block, "num_warps": 8}
    with torch.cuda.device_of(gradient):
        _sum_gradient[(rows, blocks)](gradient, normal, of_gradient, **sizes)
        _sum_rest[(rows, blocks)](gradient, normal, of_gradient, of_rest, PARTS=triton.next_power_of_2(blocks), **sizes)
        several = triton.next_power_of_2(groups)
        _unite[(rows, blocks)](gradient, normal, out, of_gradient, of_rest, groups, GROUPS=several, **sizes)
    return out


def nearest_in_ball(
    points: Tensor, images: Tensor, lower: Tensor, upper: Tensor, normal: Tensor, *, radius: Tensor,
    block: int = _BLOCK,
) -> Tensor:  # fmt: skip
    """min_y ‖y - p‖ subject to lower <= y <= upper, ⟨y - x, n⟩ = 0 in each row, ``‖y - x‖ <= radius`` in each sample.

    As a rule up to some 1e-6 of the radius plus round-off. Always within the box, a cosine of 1e-6 and the radius
    (1 + 1e-6), as stored: where rounding, or Newton's method, leaves no such point, a row, or the sample, is x.

    Args:
        points, images, lower, upper, normal: p, x, the box and n, (G, L), contiguous, float32.
        radius: (N,), contiguous, float64.

    Source: docs/method.md, "The nearest point".
    """
    rows, length = points.shape
    samples, blocks = len(radius), triton.cdiv(length, block)
    groups = rows // samples
    y, given = torch.empty_like(points), (normal, images, lower, upper)

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=points.device)

    of_points, sums = numbers(rows, _FIRST.value, blocks), numbers(rows, _SUMS.value, blocks)
    state, multipliers, before = numbers(samples, _STATES.value), numbers(rows), numbers(rows)
    settled = numbers(_ROUNDS, rows)
    each, all_of = (rows,), (rows, blocks)
    sizes, several = {"L": length, "B": blocks}, {"C": groups, "GROUPS": triton.next_power_of_2(groups)}
    parts, wide = triton.next_power_of_2(blocks), {**sizes, "BLOCK": block, "num_warps": 8}
    with torch.cuda.device_of(points):
        _sum_points[all_of](points, images, normal, of_points, **wide)
        _begin_newton[(samples,)](of_points, radius, state, multipliers, B=blocks, **several)
        for k in range(_NEWTON):
            _evaluate_point[all_of](points, *given, y, state, multipliers, sums, groups, **wide)
            step = of_points, sums, radius, state, multipliers, before
            _take_step[(samples,)](*step, B=blocks, LATE=k >= _LATE, **several)
        for k in range(_ROUNDS):
            found = settled[max(k - 1, 0)], settled[k]
            _settle_point[each](
                *given, y, of_points, sums, *found, radius, **sizes, **several, PARTS=parts, FEW=1024, ROUND=k
            )
            is_last = k + 1 == _ROUNDS
            _pull[all_of](images, normal, y, settled[k], sums, radius, **wide, **several, ROUND=k, LAST=is_last)
    return y


@triton.jit
def _totals(sums, first, number, COUNT: tl.constexpr, C, B, GROUPS: tl.constexpr):
    """The sums over all blocks of one of the numbers of a sample's C groups, the first of which is given."""
    group, part = tl.arange(0, GROUPS), tl.arange(0, 64)
    reached = tl.zeros((GROUPS, 64), dtype=tl.float64)
    for start in range(0, B, 64):
        block = (start + part)[None, :]
        here = sums + ((first + group)[:, None] * COUNT + number) * B + block
        reached += tl.load(here, mask=(group[:, None] < C) & (block < B), other=0.0)
    return tl.sum(reached, 1)


@triton.jit
def _rest(g, n, of_gradient, row, B, PARTS: tl.constexpr):
    """A gradient without its component along the normal; in float64 once is enough."""
    nn = _total(of_gradient, row, _NN, 5, B, PARTS)
    along = _total(of_gradient, row, _GN, 5, B, PARTS) / tl.where(nn > 0, nn, 1.0)
    return g.to(tl.float64) - along * n.to(tl.float64)


@triton.jit
def _sum_rest(gradient, normal, of_gradient, sums, L, B, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradient + row * L + at, mask=at < L, other=0.0)
    n = tl.load(normal + row * L + at, mask=at < L, other=0.0)
    rest = _rest(g, n, of_gradient, row, B, PARTS)
    out = sums + row * 2 * B + block
    tl.store(out + B * _SIZE, tl.sum(tl.abs(rest), 0))
    tl.store(out + B * _SQUARE, tl.sum(rest * rest, 0))


@triton.jit
def _unite(gradient, normal, out, of_gradient, of_rest, C, L, B, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, group = row // C * C, tl.arange(0, GROUPS)
    # Or else no more than round-off is left.
    goes = _totals(of_rest, first, _SIZE, 2, C, B, GROUPS) > 4 * 1.1920929e-07 * _totals(
        of_gradient, first, _G, 5, C, B, GROUPS
    )
    length2 = tl.sum(tl.where(goes, _totals(of_rest, first, _SQUARE, 2, C, B, GROUPS), 0.0), 0)
    is_own = group == row - first
    nn = tl.sum(tl.where(is_own, _totals(of_gradient, first, _NN, 5, C, B, GROUPS), 0.0), 0)
    along = tl.sum(tl.where(is_own, _totals(of_gradient, first, _GN, 5, C, B, GROUPS), 0.0), 0)
    goes = tl.max(tl.where(is_own & goes, 1, 0), 0) > 0
    at = block * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradient + row * L + at, mask=at < L, other=0.0).to(tl.float64)
    n = tl.load(normal + row * L + at, mask=at < L, other=0.0).to(tl.float64)
    rest = (g - along / tl.where(nn > 0, nn, 1.0) * n) / tl.sqrt(tl.where(length2 > 0, length2, 1.0))
    tl.store(out + row * L + at, tl.where(goes, rest, 0.0).to(tl.float32), mask=at < L)


@triton.jit
def _sum_points(points, images, normal, sums, L, B, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(points + row * L + at, mask=at < L, other=0.0).to(tl.float64)
    x = tl.load(images + row * L + at, mask=at < L, other=0.0).to(tl.float64)
    n = tl.load(normal + row * L + at, mask=at < L, other=0.0).to(tl.float64)
    out = sums + row * _FIRST * B + block
    tl.store(out + B * _ALONG, tl.sum((p - x) * n, 0))
    tl.store(out + B * _DISTANCE, tl.sum((p - x) * (p - x), 0))
    tl.store(out + B * _N2, tl.sum(n * n, 0))
    tl.store(out + B * _GRID, tl.sum(tl.abs(x * n), 0))


@triton.jit
def _begin_newton(of_points, radius, state, multipliers, C, B, GROUPS: tl.constexpr):
    """s and λ as they are where nothing is clipped. s is hardly less: ‖y - x‖ <= s ‖p - x‖, but for rounding."""
    sample, group = tl.program_id(0).to(tl.int64), tl.arange(0, GROUPS)
    along = _totals(of_points, sample * C, _ALONG, _FIRST, C, B, GROUPS)
    distance2 = _totals(of_points, sample * C, _DISTANCE, _FIRST, C, B, GROUPS)
    nn = _totals(of_points, sample * C, _N2, _FIRST, C, B, GROUPS)
    distance = tl.sqrt(tl.sum(distance2, 0))
    size = tl.load(radius + sample)
    s = (size - size * _BELOW) / tl.where(distance > 0, distance, 1.0)
    s = tl.where((s < 1) & (distance > 0), s, 1.0)
    here = state + sample * _STATES
    tl.store(here + _S, s)
    tl.store(here + _LEAST_S, s / 2)
    tl.store(here + _GOES_ON, 1.0)
    is_off = tl.abs(along) > tl.sqrt(distance2 * nn) * _COSINE  # or else the point stays as it is
    multiplier = tl.where(is_off & (nn > 0), s * along / tl.where(nn > 0, nn, 1.0), 0.0)
    tl.store(multipliers + sample * C + group, multiplier, mask=group < C)


@triton.jit
def _evaluate_point(points, normal, images, lower, upper, y, state, multipliers, sums, C,
                    L, B, BLOCK: tl.constexpr):  # fmt: skip
    """y(s, λ) as it is stored, and the sums that Newton's method needs: F, ‖y - x‖², and over the pixels D that are not
    clipped ⟨n, n⟩, ⟨s (p - x), y - x⟩, ⟨s (p - x), n⟩ and ⟨n, y - x⟩."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    here = state + row // C * _STATES
    if tl.load(here + _GOES_ON) > 0:
        s, multiplier = tl.load(here + _S), tl.load(multipliers + row)
        at = block * BLOCK + tl.arange(0, BLOCK)
        place, inside = row * L + at, at < L
        p = tl.load(points + place, mask=inside, other=0.0).to(tl.float64)
        x = tl.load(images + place, mask=inside, other=0.0).to(tl.float64)
        n = tl.load(normal + place, mask=inside, other=0.0).to(tl.float64)
        low = tl.load(lower + place, mask=inside, other=0.0).to(tl.float64)
        high = tl.load(upper + place, mask=inside, other=0.0).to(tl.float64)
        pulled = s * (p - x)
        moved = x + (pulled - multiplier * n)
        stored = tl.minimum(tl.maximum(moved, low), high).to(tl.float32)
        tl.store(y + place, stored, mask=inside)
        delta = tl.where(inside, stored.to(tl.float64) - x, 0.0)
        free = inside & (moved >= low) & (moved <= high)
        n_d = tl.where(free, n, 0.0).to(tl.float32)
        pulled_d = tl.where(free, pulled, 0.0).to(tl.float32)
        delta_d = delta.to(tl.float32)
        out = sums + row * _SUMS * B + block
        tl.store(out + B * _F, tl.sum(delta * n, 0))
        tl.store(out + B * _LENGTH, tl.sum(delta * delta, 0))
        tl.store(out + B * _NORMAL_D, tl.sum(n_d * n_d, 0).to(tl.float64))
        tl.store(out + B * _PULLED_D, tl.sum(pulled_d * delta_d, 0).to(tl.float64))
        tl.store(out + B * _F_S, tl.sum(pulled_d * n_d, 0).to(tl.float64))
        tl.store(out + B * _E_L, tl.sum(n_d * delta_d, 0).to(tl.float64))


@triton.jit
def _take_step(of_points, sums, radius, state, multipliers, before, C, B,
               GROUPS: tl.constexpr, LATE: tl.constexpr):  # fmt: skip
    """Newton's step for a sample's s and all its λ, as in `Plane._newton`, with derivatives by log s."""
    sample, group = tl.program_id(0).to(tl.int64), tl.arange(0, GROUPS)
    here = state + sample * _STATES
    if tl.load(here + _GOES_ON) > 0:
        first = sample * C
        f = _totals(sums, first, _F, _SUMS, C, B, GROUPS)
        parts2 = _totals(sums, first, _LENGTH, _SUMS, C, B, GROUPS)
        nn = _totals(of_points, first, _N2, _FIRST, C, B, GROUPS)
        n_d = _totals(sums, first, _NORMAL_D, _SUMS, C, B, GROUPS)
        f_s = _totals(sums, first, _F_S, _SUMS, C, B, GROUPS)
        e_s = tl.sum(_totals(sums, first, _PULLED_D, _SUMS, C, B, GROUPS), 0)
        e_l = _totals(sums, first, _E_L, _SUMS, C, B, GROUPS)
        s, least = tl.load(here + _S), tl.load(here + _LEAST_S)
        size = tl.load(radius + sample)
        aim, near = size - size * _BELOW, size * _NEAR
        length2 = tl.sum(parts2, 0)
        length = tl.sqrt(length2)
        lengths = tl.sqrt(parts2 * nn)
        noise = lengths * _COSINE
        size_f = tl.abs(f)
        if LATE:  # equal pixels are all rounded the same way, and F goes to and fro
            rounded = _totals(of_points, first, _GRID, _FIRST, C, B, GROUPS) * _UNIT
            stays = size_f > tl.load(before + first + group, mask=group < C, other=0.0) / 2
            noise = tl.where(stays, tl.maximum(noise, tl.minimum(rounded, lengths * _MUCH)), noise)
        tl.store(before + first + group, size_f, mask=group < C)
        off = tl.max(tl.where(size_f > noise, 1, 0), 0) > 0
        short, long = (s < 1) & (length < aim - near), length > aim + near
        if off | short | long:
            inverse = 1 / tl.where(n_d > 0, n_d, tl.where(nn > 0, nn, 1.0))  # with no pixel free, as with all of them
            rise = e_s - tl.sum(e_l * inverse * f_s, 0)
            excess = (length - aim) * (length + aim) / 2 - tl.sum(e_l * inverse * f, 0)
            usable = rise > 1e-9 * length2
            change = tl.where(
                usable, -excess / tl.where(usable, rise, 1.0), aim / tl.where(length > 0, length, 1.0) - 1
            )
            binds = (s < 1) | (length > aim)
            s_next = tl.where(binds, tl.minimum(tl.maximum(s * (1 + change), least), 1.0), s)
            change = tl.where(s > 0, s_next / tl.where(s > 0, s, 1.0) - 1, 0.0)
            tl.store(here + _S, s_next)
            known = tl.load(multipliers + first + group, mask=group < C, other=0.0)
            tl.store(multipliers + first + group, known + (f + f_s * change) * inverse, mask=group < C)
        else:
            tl.store(here + _GOES_ON, 0.0)


@triton.jit
def _share(settled, radius, row, C, GROUPS: tl.constexpr, ROUND: tl.constexpr):
    """What a group's perturbation must be multiplied by: 0 if it could not be settled, less than 1 if the sample is
    outside the ball, in each round by more, since on a coarse grid little changes nothing. 1 if there is nothing to
    do."""
    sample, group = row // C, tl.arange(0, GROUPS)
    parts2 = tl.load(settled + sample * C + group, mask=group < C, other=0.0)
    length = tl.sqrt(tl.sum(tl.maximum(parts2, 0.0), 0))
    size = tl.load(radius + sample)
    share = (size - size * _BELOW) / tl.where(length > 0, length, 1.0)
    share = tl.where(length > size + size * _BEYOND, share, 1.0)
    if ROUND == 1:
        share = tl.where(share < 1, share * 0.999, share)
    if ROUND > 1:
        share = tl.where(share < 1, share * 0.97, share)
    return tl.where(tl.load(settled + row) < 0, 0.0, share)


@triton.jit
def _settle_point(normal, images, lower, upper, y, of_points, sums, before, settled, radius, L, B, C,
                  GROUPS: tl.constexpr, PARTS: tl.constexpr, FEW: tl.constexpr, ROUND: tl.constexpr):  # fmt: skip
    """What rounding has left, taken up by one pixel, and ‖y - x‖² then, -1 if there is none. In later rounds only for
    groups that were pulled in the one before."""
    row = tl.program_id(0).to(tl.int64)
    is_new = ROUND == 0
    if ROUND > 0:
        is_new = _share(before, radius, row, C, GROUPS, ROUND - 1) != 1
    if is_new:
        nn = _total(of_points, row, _N2, _FIRST, B, PARTS)
        off = _total(sums, row, _F, _SUMS, B, PARTS)
        length2 = _total(sums, row, _LENGTH, _SUMS, B, PARTS)
        if tl.abs(off) > tl.sqrt(length2 * nn) * _ALLOWED:
            here, n, new, grown2, right = _few(normal, images, lower, upper, y, row, off, length2, nn, L, FEW)
            chosen = _brightest(n, right, right & (grown2 <= length2), FEW)
            tl.store(y + here, new, mask=chosen)
            length2 = tl.max(tl.where(chosen, grown2, -1.0), 0)
        tl.store(settled + row, length2)
    else:
        tl.store(settled + row, tl.load(before + row))


@triton.jit
def _pull(images, normal, y, settled, sums, radius, L, B, C, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
          ROUND: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """Perturbations made shorter, which leads out of neither box nor plane, but for rounding."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    share = _share(settled, radius, row, C, GROUPS, ROUND)
    if share != 1:
        if LAST:
            share = share * 0
        at = block * BLOCK + tl.arange(0, BLOCK)
        place, inside = row * L + at, at < L
        x = tl.load(images + place, mask=inside, other=0.0).to(tl.float64)
        n = tl.load(normal + place, mask=inside, other=0.0).to(tl.float64)
        old = tl.load(y + place, mask=inside, other=0.0).to(tl.float64)
        stored = (x + share * (old - x)).to(tl.float32)
        tl.store(y + place, stored, mask=inside)
        delta = stored.to(tl.float64) - x
        out = sums + row * _SUMS * B + block
        tl.store(out + B * _F, tl.sum(delta * n, 0))
        tl.store(out + B * _LENGTH, tl.sum(delta * delta, 0))
