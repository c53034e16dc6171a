"""The best L-infinity step on planes of many pixels, in a few passes over the batch: Triton kernels for a GPU.

The same linear program as `plane.Plane.step`, for groups that are the rows of (G, L) float32 tensors. Each pass is one
kernel over (group, block) whose blocks write their sums to a place of their own; whoever needs the total adds them up,
always in the same order, so that a result does not depend on its batch, nor change from run to run. The device is asked
nothing, so a step may be captured in a CUDA graph.

Importing this needs Triton. With TRITON_INTERPRET=1 the kernels run on tensors of a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# How many pixels a program has; how many λ a pass tries, and how many such passes there are. The last ones are hardly
# ever needed, and where they are not, take no time.
_BLOCK = 2048
_TRIED = 32
_PASSES = 7
# A cosine is at most 1e-6; see `rounding`, which aims at this too.
_ALLOWED = tl.constexpr(0.75e-6)
_LARGEST = tl.constexpr(8e37)  # λ = infinity, to all intents
# A group's sums of the gradient and normal, those of what it may reach, those of a point.
_GN, _NN, _G, _N, _MAX = (tl.constexpr(k) for k in range(5))
_BASE, _WEIGHT, _SIZE = (tl.constexpr(k) for k in range(3))
_OFF, _LENGTH = (tl.constexpr(k) for k in range(2))
# A group's state: the bracket f(a) >= 0 >= f(b), f(infinity), what is nothing beside f and beside the gap, whether the
# search goes on, and whether the group moves.
_A, _FA, _B, _FB, _LEAST, _NOISE, _TOLERANCE, _GOES_ON, _MOVES = (tl.constexpr(k) for k in range(9))
_STATES = tl.constexpr(9)


def best_step(
    start: Tensor, gradient: Tensor, images: Tensor, lower: Tensor, upper: Tensor, normal: Tensor,
    ratio: Tensor, weight: Tensor, *, alpha: Tensor, block: int = _BLOCK,
) -> Tensor:  # fmt: skip
    """max_y ⟨g, y⟩ subject to lower <= y <= upper, ``|y - s| <= α`` and ⟨y - x, n⟩ = 0 in each row.

    Up to a duality gap of 1e-8 α‖g‖₁ plus round-off as a rule, and within the box and a cosine of 1e-6 always, as
    stored. A row whose gradient is zero or parallel to the normal stays, and so does one in which no pixel takes up
    what rounding has left.

    Args:
        start, gradient, images, lower, upper, normal: s, g, x, the box and n, (G, L), contiguous, float32.
        ratio, weight: working memory, likewise.
        alpha: α, (G,), float32.

    Source: docs/method.md, "The best step".
    """
    rows, length = start.shape
    blocks = triton.cdiv(length, block)
    given = normal, start, images, lower, upper, alpha
    y = torch.empty_like(start)

    def sums(count: int) -> Tensor:
        return torch.empty((rows, count, blocks), dtype=torch.float64, device=start.device)

    of_gradient, of_range, tried, at_first, at_last = sums(5), sums(3), sums(_TRIED), sums(2), sums(2)
    state = torch.empty((rows, _STATES.value), dtype=torch.float64, device=start.device)
    multipliers = torch.empty((rows, _TRIED), dtype=torch.float32, device=start.device)
    each, all_of = (rows,), (rows, blocks)
    sizes, parts = {"L": length, "B": blocks}, triton.next_power_of_2(blocks)
    wide = {**sizes, "BLOCK": block, "num_warps": 8}
    with torch.cuda.device_of(start):
        _sum_gradient[all_of](gradient, normal, of_gradient, **wide)
        _weigh[all_of](gradient, *given, ratio, weight, of_gradient, of_range, PARTS=parts, **wide)
        _begin[each](of_gradient, of_range, alpha, state, multipliers, B=blocks, PARTS=parts, TRIED=_TRIED)
        for _ in range(_PASSES):
            _evaluate[all_of](ratio, weight, state, multipliers, tried, **sizes, BLOCK=block, TRIED=_TRIED)
            _narrow[each](tried, state, multipliers, B=blocks, TRIED=_TRIED)
        for out, is_first in ((at_first, True), (at_last, False)):
            _mix[all_of](*given, ratio, y, of_gradient, state, at_first, out, PARTS=parts, FIRST=is_first, **wide)
        _settle[each](*given, y, of_gradient, state, at_first, at_last, **sizes, PARTS=parts, FEW=1024)
        _stay[all_of](start, y, state, L=length, BLOCK=block)
    return y


@triton.jit
def _total(sums, row, number, COUNT: tl.constexpr, B, PARTS: tl.constexpr):
    """The sum over all blocks of one of a group's COUNT numbers."""
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(sums + (row * COUNT + number) * B + part, mask=part < B, other=0.0), 0)


@triton.jit
def _reach(normal, start, images, lower, upper, alpha, row, here, inside):
    """The normal and the image at some pixels, and the ends of what each may reach, the one with the smaller product
    with the normal first."""
    n = tl.load(normal + here, mask=inside, other=0.0)
    s = tl.load(start + here, mask=inside, other=0.0)
    x = tl.load(images + here, mask=inside, other=0.0)
    size = tl.load(alpha + row)
    low = tl.maximum(s - size, tl.load(lower + here, mask=inside, other=0.0))
    high = tl.maximum(tl.minimum(s + size, tl.load(upper + here, mask=inside, other=0.0)), low)
    return n, x, tl.where(n < 0, high, low), tl.where(n < 0, low, high)


@triton.jit
def _sum_gradient(gradient, normal, sums, L, B, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradient + row * L + at, mask=at < L, other=0.0)
    n = tl.load(normal + row * L + at, mask=at < L, other=0.0)
    out = sums + row * 5 * B + block
    g64, n64 = g.to(tl.float64), n.to(tl.float64)
    tl.store(out + B * _GN, tl.sum(g64 * n64, 0))
    tl.store(out + B * _NN, tl.sum(n64 * n64, 0))
    tl.store(out + B * _G, tl.sum(tl.abs(g64), 0))
    tl.store(out + B * _N, tl.sum(tl.abs(n64), 0))
    tl.store(out + B * _MAX, tl.max(tl.abs(g), 0).to(tl.float64))


@triton.jit
def _largest(of_gradient, row, B, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    largest = tl.max(tl.load(of_gradient + (row * 5 + _MAX) * B + part, mask=part < B, other=0.0), 0)
    return tl.where(largest > 0, largest, 1.0)


@triton.jit
def _weigh(gradient, normal, start, images, lower, upper, alpha, ratio, weight, of_gradient, sums,
           L, B, BLOCK: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """The λ at which each pixel goes from one end of what it may reach to the other, and what that takes off f."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    here, inside = row * L + at, at < L
    g = tl.load(gradient + here, mask=inside, other=0.0)
    n, x, bottom, top = _reach(normal, start, images, lower, upper, alpha, row, here, inside)
    # The optimum is the same for g and g - cn; in float64 once is enough, even of nearly parallel gradients.
    nn = _total(of_gradient, row, _NN, 5, B, PARTS)
    along = _total(of_gradient, row, _GN, 5, B, PARTS) / tl.where(nn > 0, nn, 1.0)
    rest = ((g.to(tl.float64) - along * n.to(tl.float64)) / _largest(of_gradient, row, B, PARTS)).to(tl.float32)
    beyond = tl.where(rest > 0, float("inf"), float("-inf"))  # it has no influence on f
    w = tl.where(inside, (top - bottom) * n, 0.0)
    tl.store(ratio + here, tl.where(n != 0, rest / tl.where(n != 0, n, 1.0), beyond), mask=inside)
    tl.store(weight + here, w, mask=inside)
    least = tl.where(inside, (bottom.to(tl.float64) - x.to(tl.float64)) * n.to(tl.float64), 0.0)
    out = sums + row * 3 * B + block
    tl.store(out + B * _BASE, tl.sum(least, 0))
    tl.store(out + B * _WEIGHT, tl.sum(w, 0).to(tl.float64))
    tl.store(out + B * _SIZE, tl.sum(tl.abs(rest), 0).to(tl.float64))


@triton.jit
def _begin(of_gradient, of_range, alpha, state, multipliers, B, PARTS: tl.constexpr, TRIED: tl.constexpr):
    """The first bracket, of all λ, and what to try in it: on both sides of 0, the more the nearer to λ's magnitude, and
    around the λ at which all pixels without a gradient go from one end to the other."""
    row = tl.program_id(0).to(tl.int64)
    size = _total(of_range, row, _SIZE, 3, B, PARTS)
    least = _total(of_range, row, _BASE, 3, B, PARTS)
    most = least + _total(of_range, row, _WEIGHT, 3, B, PARTS)
    largest = _largest(of_gradient, row, B, PARTS)
    before = _total(of_gradient, row, _G, 5, B, PARTS) / largest
    width = _total(of_gradient, row, _N, 5, B, PARTS)
    nn = _total(of_gradient, row, _NN, 5, B, PARTS)
    common = -_total(of_gradient, row, _GN, 5, B, PARTS) / tl.where(nn > 0, nn, 1.0) / largest
    moves = size > 4 * 1.1920929e-07 * before  # or else no more than round-off is left
    out = state + row * _STATES
    step = tl.load(alpha + row).to(tl.float64)
    noise = step * width * 5.96e-8  # half of float32's unit
    tl.store(out + _A, -_LARGEST)
    tl.store(out + _FA, tl.where(most > noise, most, 0.0))
    tl.store(out + _B, _LARGEST)
    tl.store(out + _FB, tl.where(least < -noise, least, 0.0))
    tl.store(out + _LEAST, least)
    tl.store(out + _NOISE, noise)
    tl.store(out + _TOLERANCE, step * size * 1e-8)
    tl.store(out + _GOES_ON, moves.to(tl.float64))
    tl.store(out + _MOVES, moves.to(tl.float64))
    scale = tl.where(moves & (width > 0), size / tl.where(width > 0, width, 1.0), 1.0).to(tl.float32)
    k = tl.arange(0, TRIED)
    place = (k // 2).to(tl.float32) * (32.0 / TRIED) - 10.0
    power = tl.exp2(place * (1.0 + 0.016 * place * place))  # from 2^-26, within which the gap is small enough, on
    tried = tl.where(k % 2 == 0, scale * power, -scale * power)
    around = (common * tl.where(k % 2 == 0, 1.0000004, 0.9999996)).to(tl.float32)
    tl.store(multipliers + row * TRIED + k, tl.where(k < TRIED - 2, tried, around))


@triton.jit
def _evaluate(ratio, weight, state, multipliers, sums, L, B, BLOCK: tl.constexpr, TRIED: tl.constexpr):
    """What f gains, of all pixels with a ratio above λ, for each λ of the group."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(state + row * _STATES + _GOES_ON) > 0:
        at = block * BLOCK + tl.arange(0, BLOCK)
        r = tl.load(ratio + row * L + at, mask=at < L, other=0.0)
        w = tl.load(weight + row * L + at, mask=at < L, other=0.0)
        for k in tl.static_range(TRIED):
            multiplier = tl.load(multipliers + row * TRIED + k)
            reached = tl.sum(tl.where(r > multiplier, w, 0.0), 0)
            tl.store(sums + (row * TRIED + k) * B + block, reached.to(tl.float64))


@triton.jit
def _rank(value):
    """The place of a float32 among all of them, 0 for 0."""
    bits = value.to(tl.int32, bitcast=True)
    rank = (bits & 0x7FFFFFFF).to(tl.int64)
    return tl.where(bits < 0, -rank, rank)


@triton.jit
def _narrow(sums, state, multipliers, B, TRIED: tl.constexpr):
    """The bracket that the λ tried give, and what to try in it: half of them evenly among its float32 numbers, which
    narrows any bracket, half ever closer to where the secant meets 0, which narrows smooth ones faster."""
    row = tl.program_id(0).to(tl.int64)
    here = state + row * _STATES
    if tl.load(here + _GOES_ON) > 0:
        k, part = tl.arange(0, TRIED), tl.arange(0, 64)
        reached = tl.zeros((TRIED, 64), dtype=tl.float64)
        for first in range(0, B, 64):
            block = (first + part)[None, :]
            reached += tl.load(sums + (row * TRIED + k)[:, None] * B + block, mask=block < B, other=0.0)
        f = tl.load(here + _LEAST) + tl.sum(reached, 1)
        f = tl.where(tl.abs(f) > tl.load(here + _NOISE), f, 0.0)
        multiplier = tl.load(multipliers + row * TRIED + k).to(tl.float64)
        a, fa = tl.load(here + _A), tl.load(here + _FA)
        b, fb = tl.load(here + _B), tl.load(here + _FB)
        next_a = tl.max(tl.where(f >= 0, multiplier, -_LARGEST), 0)
        next_b = tl.min(tl.where(f < 0, multiplier, _LARGEST), 0)
        at_a = tl.max(tl.where((f >= 0) & (multiplier == next_a), f, 0.0), 0)
        at_b = tl.min(tl.where((f < 0) & (multiplier == next_b), f, 0.0), 0)
        fa, fb = tl.where(next_a > a, at_a, fa), tl.where(next_b < b, at_b, fb)
        a, b = tl.maximum(a, next_a), tl.minimum(b, next_b)
        tl.store(here + _A, a)
        tl.store(here + _FA, fa)
        tl.store(here + _B, b)
        tl.store(here + _FB, fb)
        rise = tl.where(fa > fb, fa - fb, 1.0)
        rank_a, rank_b = _rank(a.to(tl.float32)), _rank(b.to(tl.float32))
        is_wide = (-fa * fb / rise * (b - a) > tl.load(here + _TOLERANCE)) & (rank_b > rank_a + 1)
        tl.store(here + _GOES_ON, is_wide.to(tl.float64))
        half = k // 2
        rank = rank_a + (rank_b - rank_a) * (half + 1) // (TRIED // 2 + 1)
        size = tl.abs(rank).to(tl.int32).to(tl.float32, bitcast=True)
        even = tl.where(rank < 0, -size, size)
        root = a + (b - a) * (fa / rise)
        away = (b - a) * tl.exp2(-2.0 - 2.0 * (half // 2).to(tl.float32)).to(tl.float64)
        near = tl.where(half % 2 == 0, root + away, root - away)
        near = tl.minimum(tl.maximum(near, a), b).to(tl.float32)
        tl.store(multipliers + row * TRIED + k, tl.where(k % 2 == 0, even, near))


@triton.jit
def _is_off(sums, row, nn, B, PARTS: tl.constexpr):
    """Whether a point is farther off its plane than may be; ⟨y - x, n⟩ and ‖y - x‖²."""
    off = _total(sums, row, _OFF, 2, B, PARTS)
    length2 = _total(sums, row, _LENGTH, 2, B, PARTS)
    return tl.abs(off) > tl.sqrt(length2 * nn) * _ALLOWED, off, length2


@triton.jit
def _mix(normal, start, images, lower, upper, alpha, ratio, y, of_gradient, state, at_first, sums,
         L, B, BLOCK: tl.constexpr, PARTS: tl.constexpr, FIRST: tl.constexpr):  # fmt: skip
    """y: the mixture of y(a) and y(b) that is on the plane; the second time with the share corrected by what rounding
    has moved it off, where that is too much."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    found = state + row * _STATES
    fa, fb = tl.load(found + _FA), tl.load(found + _FB)
    rise = tl.where(fa > fb, fa - fb, 1.0)
    share = -fb / rise
    goes = tl.load(found + _MOVES) > 0
    if not FIRST:
        lost, off, _ = _is_off(at_first, row, _total(of_gradient, row, _NN, 5, B, PARTS), B, PARTS)
        share = tl.minimum(tl.maximum(share - off / rise, 0.0), 1.0)
        goes = goes & lost
    if goes:
        at = block * BLOCK + tl.arange(0, BLOCK)
        here, inside = row * L + at, at < L
        n, x, bottom, top = _reach(normal, start, images, lower, upper, alpha, row, here, inside)
        r = tl.load(ratio + here, mask=inside, other=0.0)
        a = tl.load(found + _A).to(tl.float32)
        b = tl.load(found + _B).to(tl.float32)
        mixed = bottom + share.to(tl.float32) * (top - bottom)
        mixed = tl.minimum(tl.maximum(mixed, tl.minimum(bottom, top)), tl.maximum(bottom, top))
        point = tl.where(r > b, top, tl.where(r > a, mixed, bottom))
        tl.store(y + here, point, mask=inside)
        delta = tl.where(inside, point.to(tl.float64) - x.to(tl.float64), 0.0)
        out = sums + row * 2 * B + block
        tl.store(out + B * _OFF, tl.sum(delta * n.to(tl.float64), 0))
        tl.store(out + B * _LENGTH, tl.sum(delta * delta, 0))


@triton.jit
def _few(normal, images, lower, upper, y, row, off, length2, nn, L, FEW: tl.constexpr):
    """A group's pixels, one in so many: where they are, their normals, what each would be if it alone took `off` off
    ⟨y - x, n⟩, ‖y - x‖² then, and whether it may: in the box, on the plane, by no more than the whole perturbation."""
    at = tl.arange(0, FEW) * (L // FEW + 1)
    here, inside = row * L + at, at < L
    n = tl.load(normal + here, mask=inside, other=0.0)
    x = tl.load(images + here, mask=inside, other=0.0).to(tl.float64)
    low = tl.load(lower + here, mask=inside, other=0.0)
    high = tl.load(upper + here, mask=inside, other=0.0)
    old = tl.load(y + here, mask=inside, other=0.0).to(tl.float64)
    n64 = n.to(tl.float64)
    new = (old - off / tl.where(n != 0, n64, 1.0)).to(tl.float32)
    new64 = new.to(tl.float64)
    left = tl.abs(off + (new64 - old) * n64)
    grown2 = length2 + (new64 - x) * (new64 - x) - (old - x) * (old - x)
    right = inside & (n != 0) & (new >= low) & (new <= high) & (left <= tl.sqrt(tl.abs(grown2) * nn) * _ALLOWED)
    return here, n, new, grown2, right & ((new64 - old) * (new64 - old) <= length2)


@triton.jit
def _brightest(n, right, best, FEW: tl.constexpr):
    """One of those that are best, or else right, if there is any: the one that moves least for what it takes up."""
    best = tl.where(tl.max(best.to(tl.int32), 0) > 0, best, right)
    return best & (tl.arange(0, FEW) == tl.argmax(tl.where(best, tl.abs(n), -1.0), 0))


@triton.jit
def _settle(normal, start, images, lower, upper, alpha, y, of_gradient, state, at_first, at_last,
            L, B, PARTS: tl.constexpr, FEW: tl.constexpr):  # fmt: skip
    """What rounding has left, taken up by one pixel of the group, the one that moves least for it, among every so
    many; within the step's range, or else within the box and by no more than the whole perturbation."""
    row = tl.program_id(0).to(tl.int64)
    nn = _total(of_gradient, row, _NN, 5, B, PARTS)
    lost, off, length2 = _is_off(at_first, row, nn, B, PARTS)
    if lost:
        lost, off, length2 = _is_off(at_last, row, nn, B, PARTS)
    if lost:
        here, n, new, _, right = _few(normal, images, lower, upper, y, row, off, length2, nn, L, FEW)
        s = tl.load(start + here, mask=right, other=0.0)
        size = tl.load(alpha + row)
        chosen = _brightest(n, right, right & (new >= s - size) & (new <= s + size), FEW)
        tl.store(y + here, new, mask=chosen)
        if tl.max(chosen.to(tl.int32), 0) == 0:
            tl.store(state + row * _STATES + _MOVES, 0.0)


@triton.jit
def _stay(start, y, state, L, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(state + row * _STATES + _MOVES) == 0:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        here = row * L + at
        tl.store(y + here, tl.load(start + here, mask=at < L), mask=at < L)
