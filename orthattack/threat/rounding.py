"""Staying orthogonal when numbers are stored: rows moved onto the plane within the grid of their dtype.

Rounding an image to float32 moves ⟨y - x, x⟩ by about 1e-8 per pixel. Beside a tiny perturbation that is more than a
cosine of 1e-6, and is taken up by one pixel, or two, of the row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Box = tuple[Tensor, Tensor]
"""The smallest and the largest value of each pixel."""

_NEIGHBOURS = ((1, 1), (8, 2), (64, 16))
"""How many neighbouring values are tried to each side, and on a GPU of one in how many rows."""

_AT_A_TIME = 2**16
"""Rows for which a GPU tries neighbouring values at a time: 70 MB for each of them in float64."""

_IN_CACHE = 2**12
"""The same for a CPU, so that what is tried stays in its cache."""


def settled_rows(
    points: Tensor,
    images: Tensor,
    normals: Tensor,
    boxes: list[Callable[[], Box]],
    fallback: Tensor,
    allowed: float,
    is_quick: bool = False,
) -> Tensor:
    """Rows y (R, n) of a box near the plane ⟨y - x, n⟩ = 0, moved onto it as nearly as their dtype allows.

    They are moved inside the `boxes`, each asked for only when it is needed, the first tried first. A row whose |cos|
    stays above `allowed` becomes the `fallback`; rows that are near enough stay. On a GPU, which asking would stop, the
    last and costliest attempts are for a part of the rows at most; if `is_quick` the first attempt is the only one.
    """
    y, x, n, dtype = points.double(), images.double(), normals.double(), points.dtype
    # Among many pixels there is one that will do in any thousand of them.
    few = slice(None, None, y.shape[1] // 1024 | 1)
    Attempt = tuple[Callable[[], Box], slice, Callable[..., Tensor], int]
    attempts: list[Attempt] = [
        (boxes[-1], few, _take_up, 1),
        *((box, slice(None), _take_up, 1) for box in boxes),
        *((boxes[-1], slice(None), partial(_combine, radius=radius), share) for radius, share in _NEIGHBOURS),
    ]
    for box, columns, attempt, share in attempts[y.shape[1] < 4096 :][: 1 if is_quick else None]:
        excess, limit = _excess(y - x, n, allowed)
        off = (excess.abs() > limit).squeeze(1)
        tried = off.byte().topk(-(-len(y) // share)).indices if y.is_cuda else off.nonzero().squeeze(1)
        if len(tried) == 0:
            return y.to(dtype)
        lower, upper = box()
        for rows in torch.split(tried, _AT_A_TIME if y.is_cuda else _IN_CACHE):
            part, n_part = y[rows][:, columns], n[rows][:, columns]
            # No pixel moves by more than the whole perturbation: that would not repair it but replace it.
            size = torch.linalg.vector_norm(y[rows] - x[rows], dim=1, keepdim=True)
            low = torch.maximum(lower[rows][:, columns], part - size)
            high = torch.minimum(upper[rows][:, columns], part + size)
            # The limits may lie between two numbers of the dtype, so what an attempt gives is judged as it will be
            # stored.
            moved = attempt(part.clamp(low, high), n_part, low, high, excess[rows], limit[rows], dtype=dtype)
            moved = moved.to(dtype).double()
            if y.is_cuda:  # where rows are among them that are near enough
                moved = torch.where(off[rows].unsqueeze(1), moved, part)
            y[rows.unsqueeze(1), torch.arange(y.shape[1], device=y.device)[columns]] = moved
    excess, limit = _excess(y - x, n, allowed)
    return torch.where(excess.abs() > limit, fallback.double(), y).to(dtype)


def _excess(delta: Tensor, n: Tensor, allowed: float) -> tuple[Tensor, Tensor]:
    """⟨δ, n⟩ and allowed ‖δ‖ ‖n‖ per row, (R, 1)."""
    norms = torch.linalg.vector_norm(delta, dim=1, keepdim=True) * torch.linalg.vector_norm(n, dim=1, keepdim=True)
    return (delta * n).sum(1, keepdim=True), allowed * norms


def _take_up(
    y: Tensor, n: Tensor, low: Tensor, high: Tensor, amount: Tensor, limit: Tensor, *, dtype: torch.dtype
) -> Tensor:
    """(R, n) float64 rows with ⟨y - x, n⟩ = amount taken up by a pixel that has the room: of those with a grid fine
    enough the one that moves least, or else the one with the finest grid."""
    room = torch.where(amount * n > 0, y - low, high - y) * n.abs()
    grid = _spacing(y, dtype) * n.abs()
    enough = room >= amount.abs()
    fine = enough & (grid <= limit)
    finest = torch.where(enough, grid, torch.inf).argmin(1, keepdim=True)
    brightest = torch.where(fine, n.abs(), -1).argmax(1, keepdim=True)
    pixel = torch.where(enough.any(1, keepdim=True), finest, room.argmax(1, keepdim=True))
    pixel = torch.where(fine.any(1, keepdim=True), brightest, pixel)
    ns, ys, lows, highs = (t.gather(1, pixel) for t in (n, y, low, high))
    return y.scatter(1, pixel, _lowered(ys, ns, amount, dtype).clamp(lows, highs))


def _combine(
    y: Tensor,
    n: Tensor,
    low: Tensor,
    high: Tensor,
    excess: Tensor,
    limit: Tensor,
    *,
    dtype: torch.dtype,
    radius: int,
) -> Tensor:
    """(R, n) float64 rows with neighbouring values of one pixel tried, each with the best value of another for it.

    The one tried is the one with most room to both sides; the other that with the finest grid or else the widest range.
    """
    size = n.abs()
    first = (torch.minimum(y - low, high - y) * size).argmax(1, keepdim=True)
    others = ((high - low) * size).scatter(1, first, 0)
    finest = torch.where(others > 0, _spacing(y, dtype) * size, torch.inf).argmin(1, keepdim=True)
    offsets = torch.arange(-radius, radius + 1, device=y.device)
    for other in (finest, others.argmax(1, keepdim=True)):
        y1, n1, low1, high1 = (t.gather(1, other) for t in (y, n, low, high))
        y2, n2, low2, high2 = (t.gather(1, first) for t in (y, n, low, high))
        tried = (y2 + offsets * _spacing(y2, dtype)).to(dtype).double().clamp(low2, high2)
        amount = excess + (tried - y2) * n2
        answer = _lowered(y1, n1, amount, dtype).clamp(low1, high1)
        left = (amount + (answer - y1) * n1).abs()
        # The smallest move that is good enough, or else the best.
        best = torch.where(left <= limit, offsets.abs() - 1000.0, left).argmin(1, keepdim=True)
        moved = y.scatter(1, first, tried.gather(1, best)).scatter(1, other, answer.gather(1, best))
        better = left.gather(1, best) <= excess.abs()
        excess = excess + torch.where(better, ((moved - y) * n).sum(1, keepdim=True), 0)
        y = torch.where(better, moved, y)
    return y


def _lowered(values: Tensor, normals: Tensor, amount: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of the dtype whose product with the normal is smaller by `amount`, as nearly as can be."""
    return (values - amount / torch.where(normals != 0, normals, 1)).to(dtype).double()


def _spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance to the next larger number of the dtype."""
    stored = values.to(dtype)
    spacing: Tensor = torch.nextafter(stored, torch.full_like(stored, torch.inf)).double() - values
    return spacing
