"""The k multipliers of several planes by Newton's method, in a few passes over the images, in their dtype and in place.

It may fail where few pixels are free or many tie, and says for which samples; `subspace` does those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from orthattack.projection import IMAGE, dot, reciprocal, total
from orthattack.threat.norms import leading

# Of images of more values than this, the step's multipliers are first sought on a third of them or some 8,000.
SMALL = 2**11
_TRIALS = 10
# Where fewer pixels than these are free, a step is as long as if so many were.
_FEW = 4


class _Program(NamedTuple):
    """max ⟨g, y⟩ subject to low <= y <= high, ⟨y, b_j⟩ = -offset_j, for n of the pixels, float64."""

    g: Tensor  # (N, n), as low and high
    low: Tensor
    high: Tensor
    rows: Tensor  # the b_j, (N, k, n)
    offset: Tensor  # (N, k)


def best_step(
    g: Tensor, size: Tensor, low: Tensor, high: Tensor, rows: Sequence[Tensor], peaks: Tensor, width: Tensor,
    gap: float, looked: int, scratch: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Solve max_y ⟨g, y⟩ subject to low <= y <= high, ⟨y, b_j⟩ = 0, on a CPU.

    Multipliers found on a sample of the pixels, and corrected with two sums over all, leave few pixels undecided; those
    alone decide the rest, and what they find shows that the others were decided.

    Args:
        g: the gradient, (N, C, H, W), without its components along the b_j.
        size: ‖g‖₁, (N, 1, 1, 1).
        low, high: at most and at least 0, the same shape as g.
        rows: the b_j, orthonormal, each of that shape.
        peaks: the largest absolute value of each, (N, k).
        width: what -low and high are at most, (N, 1, 1, 1).
        gap: the duality gap that is small enough, relative to width · size.
        looked: how many times the usual number of pixels is undecided.
        scratch: three tensors of that shape.

    Returns:
        y, in the last of `scratch`, and per sample whether it is within the gap, (N, 1, 1, 1).

    Source: docs/method.md, "Several directions".
    """
    count, (centre, v, y) = g[0].numel(), scratch
    torch.add(low, high, out=centre).mul_(0.5)
    allowed = gap * (width * size).double().view(-1, 1)
    m = torch.zeros(len(g), len(rows), dtype=torch.float64)

    def rest() -> Tensor:
        torch.addcmul(g, rows[0], _wide(m[:, 0]).to(g.dtype), value=-1, out=v)
        for one, row in zip(m[:, 1:].to(g.dtype).unbind(1), rows[1:], strict=True):
            v.addcmul_(row, _wide(one), value=-1)
        return v

    def point(tau: Tensor) -> Tensor:
        torch.addcmul(centre, rest(), _wide(tau).to(g.dtype), out=y)
        return torch.clamp(y, low, high, out=y)

    every = 1 if count <= SMALL else max(3, count >> 13 | 1)  # odd, to meet no grid of blocks
    some = [t.flatten(1)[:, ::every].double() for t in (g, low, high, *rows)]
    program = _Program(some[0], some[1], some[2], torch.stack(some[3:], 1), 0 * m)
    tau = width.double().view(-1, 1) / _quantile(program)
    if every == 1:
        m, tau, certain, _ = _search(program, m, tau, 5, allowed, 1e-9)
    else:
        m, _, _, matrix = _search(program, m, tau, 1, 0 * allowed, 1e-3)
        for _ in range(2):  # by now the matrix is that of all pixels, but for what a sample misses
            m = m + _solved(every * matrix, components(point(tau), rows, v)) / tau
        torch.abs(rest(), out=y).masked_fill_(low == high, torch.inf)
        # Of 2^14 and more, torch would share a sum among threads.
        most = min(looked * round((16 * count * len(rows)) ** 0.5), 2**14 - 1)
        index, is_one, bound = leading(y.neg_().flatten(1), most)
        # All others are at their ends, and stay there while their g - Bm keeps its sign.
        torch.clamp(v.mul_(torch.finfo(g.dtype).max), low, high, out=y)
        some = [t.flatten(1).gather(1, index).double() * is_one for t in (g, low, high, y, *rows)]
        along = torch.stack(some[4:], 1)
        offset = components(y, rows, v) - (along * some[3].unsqueeze(1)).sum(2)
        before, tau = m, width.view(-1, 1) * 4 * reciprocal(-bound).double()
        m, tau, certain, _ = _search(_Program(some[0], some[1], some[2], along, offset), m, tau, 3, allowed, 1e-9)
        moved = (peaks * (m - before).abs()).sum(1, keepdim=True)
        certain &= -bound - moved > width.view(-1, 1) / tau
    # Where large gradients tie, rounding g - Bm times τ may lead off the planes.
    off, length = components(point(tau), rows, v).abs(), _flat(dot(y, y, IMAGE, v)).sqrt()
    return y, _wide(certain & (off <= 1e-6 * length).all(1, keepdim=True))


def _quantile(program: _Program) -> Tensor:
    """What an eighth of the gradient's entries that are not 0 are below, where pixels can move, (N, 1)."""
    size = program.g[:, ::8].abs()
    size = size.masked_fill((size == 0) | (program.low == program.high)[:, ::8], torch.inf).sort(dim=1).values
    number = (size < torch.inf).sum(1, keepdim=True)
    return size.gather(1, number // 8).clamp(max=torch.finfo(torch.float32).max)


def _search(
    program: _Program, m: Tensor, tau: Tensor, stages: int, allowed: Tensor, noise: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The multipliers m, (N, k), of the y that maximises ⟨g, y⟩ - ‖y - c‖² / 2τ, c being the middle of the box: clip(c
    + τ (g - Bm)). τ grows until the duality gap is as allowed; that τ, whether it is, and BᵀDB, D being the pixels
    that are not clipped.

    The dual is convex in m, so a Newton step after which it is larger was too long.
    """
    g, low, high, rows, offset = program
    centre = (low + high) / 2
    floor = _FEW * (rows * rows).sum(2).mean(1, keepdim=True) / rows.shape[2]
    certain = failed = torch.zeros_like(tau, dtype=torch.bool)
    for stage in range(stages):
        base, step, rate, stays = m, 0 * m, 0 * tau, certain | failed
        matrix, least = rows.new_zeros(*m.shape, m.shape[1]), torch.full_like(tau, torch.inf)
        for trial in range(_TRIALS):
            rest = g - (m.unsqueeze(2) * rows).sum(1)
            free = centre + rest * tau
            y = free.clamp(low, high)
            f = offset + (rows * y.unsqueeze(1)).sum(2)
            right = (f.abs() <= noise * torch.linalg.vector_norm(y, dim=1, keepdim=True)).all(1, keepdim=True)
            dual = (rest * y - (y - centre).square_() / (2 * tau)).sum(1, keepdim=True)
            dual = dual - (m * offset).sum(1, keepdim=True)
            keeps = stays | (dual > least + 1e-12 * least.abs())
            now = ((rows * (free == y).unsqueeze(1)).unsqueeze(2) * rows.unsqueeze(1)).sum(3)
            matrix = torch.where(keeps.unsqueeze(2), matrix, now)
            stays = right | certain | failed
            if trial + 1 == _TRIALS or bool(stays.all()):
                break
            base, least = torch.where(keeps, base, m), torch.where(keeps, least, dual)
            step = torch.where(keeps, step, _solved(matrix, f, floor) / tau)
            rate = torch.where(keeps, rate / 4, 1)
            m = torch.where(stays, m, base + rate * step)
        left = (torch.maximum(rest * low, rest * high) - rest * y).sum(1, keepdim=True)
        failed = failed | (~right & ~certain)
        certain = certain | (~failed & (left <= allowed))
        if stage + 1 == stages or bool((certain | failed).all()):
            break
        grown = tau * (1.3 * (left / allowed).sqrt()).clamp(1.5, 8)  # the gap falls as 1 / τ²
        tau = torch.where(certain | failed, tau, grown)
    return m, tau, certain, matrix


def in_ball(
    delta: Tensor, low: Tensor, high: Tensor, rows: Sequence[Tensor], radius: Tensor, order: int,
    scratch: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """d = clip(sδ - Bm) or, if the order is 1, clip(soft(δ - Bm, μ)), on the planes and in the ball; per sample, if it
    was found.

    With D the pixels that are neither clipped nor 0, and e the ball's own multiplier, s <= 1 or μ >= 0,

        F = Bᵀd = 0                                F_e = Bᵀu,    F_m = -BᵀDB
        E = (‖d‖² - radius²) / 2 or ‖d‖₁ - radius   E_e = ⟨u, w⟩,  E_m = -Bᵀw

    with u = Dδ and w = Dd, or the signs of Dd as w and u = -w.

    Args:
        delta: δ, (N, C, H, W).
        low, high: at most and at least 0, the same shape.
        rows: the b_j, orthonormal, each of that shape.
        radius: (N, 1, 1, 1), float64; infinite for no ball.
        order: 1 or 2.
        scratch: four tensors of that shape; d is in the first.
    """
    d, v, free, product = scratch
    unit, number, floor = max(torch.finfo(delta.dtype).eps, 1e-13), len(rows), _FEW / delta[0].numel()
    inside = radius.view(-1, 1) * (1 - 4 * unit)  # rounding x + d should not lead out
    m = components(delta, rows, product)
    s, threshold = torch.ones_like(inside), torch.zeros_like(inside)
    reach = _flat(dot(delta, delta, IMAGE, product)).sqrt()  # where few pixels are free, m could go anywhere at once
    if order == 2:
        s = (inside * reciprocal(reach)).clamp(max=1)
        m = s * m
    found = torch.zeros_like(inside, dtype=torch.bool)
    asks = not delta.is_cuda
    trials = 8 if order == 2 else 20
    for trial in range(trials):
        torch.mul(delta, _wide(s).to(delta.dtype), out=v)
        for one, row in zip(m.to(delta.dtype).unbind(1), rows, strict=True):
            v.addcmul_(row, _wide(one), value=-1)
        if order == 1:
            edge = _wide(threshold).to(delta.dtype)
            v.sub_(torch.clamp(v, -edge, edge, out=product))
        torch.clamp(v, low, high, out=d)
        f, length = components(d, rows, product), _flat(dot(d, d, IMAGE, product)).sqrt()
        size = length if order == 2 else _flat(total(torch.abs(d, out=product), IMAGE))
        excess, binds = size - inside, (s < 1) | (threshold > 0)
        right = torch.where(binds, excess.abs() <= 3 * unit * inside, excess <= 0)
        found = found | (right & (f.abs() <= 2 * unit * length).all(1, keepdim=True))
        if trial + 1 == trials or (asks and bool(found.all())):
            break
        torch.eq(d, v, out=free)
        if order == 1:
            free.mul_(torch.sign(d, out=product))
        matrix, p, q = torch.empty(*m.shape, number, dtype=m.dtype, device=m.device), 0 * m, 0 * m
        for j, row in enumerate(rows):
            torch.mul(row, free, out=v)
            if order == 1:
                q[:, j : j + 1] = _flat(total(v, IMAGE))
                v.mul_(free)
            else:
                p[:, j : j + 1], q[:, j : j + 1] = (_flat(dot(v, t, IMAGE, product)) for t in (delta, d))
            for k in range(j, number):
                matrix[:, j, k] = matrix[:, k, j] = _flat(dot(v, rows[k], IMAGE, product)).squeeze(1)
        if order == 1:
            p, rise = -q, -_flat(total(free.abs_(), IMAGE))
        else:
            rise, excess = _flat(dot(free.mul_(delta), d, IMAGE, product)), excess * (size + inside) / 2
        rate = 0.5 if trial % 3 == 2 and trial > 3 else 1.0  # between two kinks it may go to and fro
        by_f, by_e = _solved(matrix, f, floor), _solved(matrix, p, floor)
        change = ((q * by_f).sum(1, keepdim=True) - excess) * reciprocal(rise - (q * by_e).sum(1, keepdim=True))
        change = torch.where((binds | (size > inside)) & ~found, rate * change, 0)
        before = s if order == 2 else threshold
        if order == 2:
            s = (s + change).clamp(0, 1)
        else:
            threshold = (threshold + change).clamp(min=0)
        change = (s if order == 2 else threshold) - before
        m = torch.where(found, m, m + (rate * by_f + change * by_e).clamp(-reach, reach))
        reach = 2 * reach
    return d, _wide(found)


def components(delta: Tensor, rows: Sequence[Tensor], scratch: Tensor) -> Tensor:
    """⟨δ, b_j⟩, (N, k), float64."""
    return torch.cat([_flat(dot(delta, row, IMAGE, scratch)) for row in rows], 1)


def _solved(matrix: Tensor, f: Tensor, floor: Tensor | float = 0.0) -> Tensor:
    """matrix⁻¹ f, regularised a little, or by `floor`, (N, 1), where the trace is less than that. A direction that was
    dropped has a multiplier of 0."""
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    damping = 1e-12 + 1e-10 * trace + floor * (trace < floor)
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    solution: Tensor = torch.linalg.solve_ex(matrix + damping.unsqueeze(2) * eye, f).result
    return solution


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _flat(values: Tensor) -> Tensor:
    return values.double().view(-1, 1)
