"""Planes of groups of a few pixels, such as colours: the nearest point of each, the best L1 step, staying when stored.

A group of K pixels is a column of (K, R) tensors. Most columns are done at the first look; only the others go on, so
this is for a CPU: a GPU would be asked for their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthattack.projection import reciprocal
from orthattack.threat.rootfind import try_all

# A function of K pixels is piecewise linear with 2K or 4K pieces, and Newton's method skips most of them.
_TRIALS = 6
# The duality gap of an L1 step, relative to the objective.
_SPARSE_GAP = 1e-4
# How far pixels are moved to stay on the plane: what is tried first, and where that does not do, see `_nudged`.
_SPREADS = ((1.0, 16), (10.0, 64))
# Rounds in which the basis of that lattice is reduced: one more finds as many.
_SWEEPS = 3
# Columns that fit into a processor's cache.
_AT_A_TIME = 2**15


def nearest(delta: Tensor, normal: Tensor, low: Tensor, high: Tensor, shrink: Tensor | None = None) -> Tensor:
    """Solve for each column::

        min_d ½‖d - δ‖² + μ‖d‖₁  subject to  low <= d <= high,  ⟨d, n⟩ = 0

    It is d(λ) = clip(soft(δ - λn, μ)) at the root of the falling, piecewise linear f(λ) = ⟨d(λ), n⟩, which Newton's
    method inside a bracket meets as a rule at once, and trying all its kinks otherwise.

    Args:
        delta: δ, (K, ...).
        normal: n, the same shape.
        low: at most 0; the same shape.
        high: at least 0; the same shape.
        shrink: μ, at least 0, broadcast to (...).

    Returns:
        d, (K, ...), with ⟨d, n⟩ below some units of round-off of Σ (``|δ_i| + |d_i| + μ) |n_i|``.
    """
    each = delta * normal
    multiplier = each.sum(0) * reciprocal(normal.square().sum(0))
    found, f, noise, _ = _at(multiplier, delta, normal, low, high, shrink, _noise(each.abs_().sum(0), normal, shrink))
    far = f.abs() > noise
    if bool(far.any()):
        d, n, below, above = (tensor[:, far] for tensor in (delta, normal, low, high))
        threshold = None if shrink is None else shrink.expand_as(far)[far]
        found[:, far] = _searched(d, n, below, above, threshold, multiplier[far])
    return found


def _at(
    multiplier: Tensor,
    delta: Tensor,
    normal: Tensor,
    low: Tensor,
    high: Tensor,
    shrink: Tensor | None,
    noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d(λ), f(λ), what round-off may leave of that, and which pixels move with λ. `noise` is `_noise`'s."""
    moved = torch.addcmul(delta, normal, multiplier, value=-1)
    if shrink is not None:
        moved -= moved.clamp(-shrink, shrink)
    found = moved.clamp(low, high)
    free = found == moved
    each = found * normal
    return (
        found,
        each.sum(0),
        noise + 4 * torch.finfo(delta.dtype).eps * each.abs().sum(0),
        free if shrink is None else free & (found != 0),
    )


def _noise(along: Tensor, normal: Tensor, shrink: Tensor | None) -> Tensor:
    """Round-off of the products with δ, and with a threshold: of λn too, which where a pixel moves is of their size."""
    return 4 * torch.finfo(normal.dtype).eps * (along if shrink is None else along + shrink * normal.abs().sum(0))


def _searched(
    delta: Tensor, normal: Tensor, low: Tensor, high: Tensor, shrink: Tensor | None, multiplier: Tensor
) -> Tensor:
    """`nearest` for columns (K, R) that are not done at the first look, from that λ on."""
    answer, rows = torch.empty_like(delta), torch.arange(delta.shape[1], device=delta.device)
    along, normal2 = (delta * normal).abs_().sum(0), normal.square().sum(0)
    least = _noise(along, normal, shrink)
    a, b = torch.full_like(multiplier, -torch.inf), torch.full_like(multiplier, torch.inf)
    for _ in range(_TRIALS):
        found, f, noise, free = _at(multiplier, delta, normal, low, high, shrink, least)
        far = f.abs() > noise
        answer[:, rows[~far]] = found[:, ~far]
        if not bool(far.any()):
            return answer
        a, b = torch.where(f > 0, multiplier, a), torch.where(f > 0, b, multiplier)
        newton = multiplier + f / (normal.square() * free).sum(0)
        reach = multiplier.abs() + along * reciprocal(normal2)  # past an end of the bracket that is not known yet
        middle = torch.where(a.isinf(), b - reach, torch.where(b.isinf(), a + reach, (a + b) / 2))
        multiplier = torch.where((newton > a) & (newton < b), newton, middle)
        state = rows, multiplier, a, b, along, normal2, least
        rows, multiplier, a, b, along, normal2, least = (t[far] for t in state)
        delta, normal, low, high = (t[:, far] for t in (delta, normal, low, high))
        shrink = None if shrink is None else shrink[far]
    answer[:, rows] = _by_kinks(delta, normal, low, high, shrink, multiplier)
    return answer


def _by_kinks(
    delta: Tensor, normal: Tensor, low: Tensor, high: Tensor, shrink: Tensor | None, multiplier: Tensor
) -> Tensor:
    """The mixture of d(λ) at the two neighbouring kinks between which f is 0."""
    about = delta, normal, low, high, shrink, torch.zeros_like(multiplier)
    ends = [low, high] if shrink is None else [low - shrink, high + shrink, -shrink, shrink]
    kinks = torch.cat([((delta - end) / normal).nan_to_num(0) for end in ends])
    a, fa, b, fb = try_all(lambda tried: _at(tried, *about)[1], multiplier, kinks)
    return torch.lerp(_at(a, *about)[0], _at(b, *about)[0], fa * reciprocal(fa - fb))


def best_sparse(g: Tensor, normal: Tensor, up: Tensor, down: Tensor, alpha: float, guess: int) -> tuple[Tensor, float]:
    """Solve, for the columns of one sample together::

        max_d ⟨g, d⟩  subject to  -down <= d <= up,  ⟨d, n⟩ = 0 in each column,  ‖d‖₁ <= α

    For each multiplier ν of the norm it comes apart into columns, and those whose ``|g|`` is nowhere beyond ν stay at
    0. The norm L of that answer falls as ν grows. Of the concave gain V(L) a bracket gives two points, and the slope
    between them is the next ν, until the chord is the curve.

    Args:
        g: the gradient, (K, R), without its components along the normals.
        normal: n, the same shape.
        up: at least 0, like `down`; the same shape.
        down: how far each pixel may move.
        alpha: α, greater than 0.
        guess: how many columns will move, to start with.

    Returns:
        d, (K, R), with a duality gap below 1e-4 of the optimum, and its norm, or some number above α if that is α.
    """
    top = g.abs().amax(0)
    low, high, bound = 0.0, float(top.max()), torch.inf
    tried = float(top.topk(min(guess, len(top))).values[-1])
    few = many = _Answer(g, g[:0, 0].long(), g[:, :0])
    for attempt in range(40):
        columns = (top > tried).nonzero().squeeze(1)
        found = _Answer(g, columns, _at_threshold(tried, *(t.index_select(1, columns) for t in (g, normal, up, down))))
        bound = min(bound, found.gain + tried * (alpha - found.size))
        if found.size > alpha:
            many, low = found, tried
        else:
            few, high = found, tried
            if tried == 0:
                break
        if many.size <= alpha:  # no ν is known yet that is small enough
            tried = high / 4 if attempt < 3 else 0.0
            continue
        share = (alpha - few.size) / (many.size - few.size)
        reached = few.gain + share * (many.gain - few.gain)
        if bound - reached <= _SPARSE_GAP * reached:
            break
        chord = (many.gain - few.gain) / (many.size - few.size)
        tried = chord if attempt % 2 else low + (high - low) * min(max(1 - share, 0.1), 0.9)
    move = torch.zeros_like(g)
    if many.size <= alpha:
        move[:, few.columns] = few.move
        return move, few.size
    share = (alpha - few.size) / (many.size - few.size)
    move[:, few.columns] = (1 - share) * few.move
    move[:, many.columns] += share * many.move
    return move, many.size


class _Answer:
    """The best move for one ν: which columns move, and how; its L1 norm and gain."""

    def __init__(self, g: Tensor, columns: Tensor, move: Tensor) -> None:
        self.columns, self.move = columns, move
        self.size = float(move.abs().sum(dtype=torch.float64))
        self.gain = float((g.index_select(1, columns) * move).sum(dtype=torch.float64))


def _at_threshold(threshold: float, g: Tensor, normal: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The move (K, R) that gains the most less `threshold` times its L1 norm.

    A pixel is at the end of its range to which g - λn points where that is beyond ±ν, and stays where it is between. As
    λ grows ⟨d, n⟩ falls, by ``|n|`` times a range at each of the 2K λ at which a pixel crosses ν or -ν: it is followed
    in that order until it is 0.
    """
    size, rises = normal.abs(), normal > 0
    crossing = torch.cat([(g - threshold) / normal, (g + threshold) / normal]).nan_to_num(0)
    weight = torch.cat([size * up, size * down]).double()
    order = crossing.sort(dim=0, stable=True).indices
    ordered = weight.gather(0, order)
    start = torch.where(rises, size * up, size * down).double().sum(0)
    crossed = ((start - ordered.cumsum(0) + ordered) * reciprocal(ordered)).clamp(0, 1)
    above, below = torch.empty_like(crossed).scatter_(0, order, crossed).to(g.dtype).chunk(2)
    move = torch.where(rises, up * (1 - above) - down * below, up * above - down * (1 - below))
    still = torch.where(g > threshold, up, torch.where(g < -threshold, -down, 0))
    return torch.where(normal == 0, still, move)


def nudged(points: Tensor, images: Tensor, normal: Tensor, low: Tensor, high: Tensor, allowed: float) -> Tensor:
    """Columns y (K, R) of a box near the plane ⟨y - x, n⟩ = 0, where that can be moved onto it by a few units of their
    grids; the others as they are.

    A unit of pixel i changes ⟨y - x, n⟩ by c_i, so whole numbers k_i are sought with Σ k_i c_i near the excess and
    ``|k_i|`` small: a near point of a lattice. Its basis is reduced by pairs, as Euclid's algorithm, and the excess
    brought down along it (Babai 1986, doi:10.1007/BF02579403), until ``|cos|`` is at most `allowed`.
    """
    y, others = points, (images, normal, low, high)
    off = torch.arange(points.shape[1])
    for spread, most in _SPREADS:
        parts = (torch.split(t.index_select(1, off), _AT_A_TIME, dim=1) for t in (y, *others))
        found = [_nudged(p, x, n, a, b, allowed, spread, most) for p, x, n, a, b in zip(*parts, strict=True)]
        y = y.index_copy(1, off, torch.cat([moved for moved, _ in found], 1))
        off = off[~torch.cat([good for _, good in found])]
    return y


def _nudged(
    points: Tensor, images: Tensor, normal: Tensor, low: Tensor, high: Tensor, allowed: float, spread: float, most: int
) -> tuple[Tensor, Tensor]:
    """The same, and for which columns it was found, with ``|k_i|`` of about ``√(spread · max c_i / limit)`` or less."""
    n, delta, count = normal.double(), points.double() - images.double(), len(points)
    excess, size = (delta * n).sum(0), delta.square().sum(0).sqrt()
    limit = allowed * size * n.square().sum(0).sqrt()
    grid = torch.nextafter(points, torch.full_like(points, torch.inf)) - points
    # Vectors of k_1 … k_K and Σ k_i c_i in half limits, the squares of the k weighted by w.
    inverse = 2 * reciprocal(limit)
    changes = (grid.double() * n * inverse).to(points.dtype)
    w = reciprocal((spread * changes.abs().amax(0)).clamp(1, most**2))

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.addcmul(a[count] * b[count], (a[:count] * b[:count]).sum(0), w)

    basis = torch.zeros(count, count + 1, points.shape[1], dtype=points.dtype)
    basis[:, count] = changes
    for k in range(count):
        basis[k, k] = 1
    left = torch.zeros_like(basis[0])
    left[count] = excess * inverse * (excess.abs() > limit)
    for _ in range(_SWEEPS):
        for j in range(count):
            inverse2 = reciprocal(product(basis[j], basis[j]))
            for other in (*(basis[i] for i in range(count) if i != j), left):
                other.addcmul_((product(other, basis[j]) * inverse2).round_(), basis[j], value=-1)
    moved = points + left[:count] * grid
    rest = ((moved.double() - images.double()) * n).sum(0).abs()
    reach = torch.minimum(2 * most * grid.amax(0), size.to(points.dtype) / 4)
    good = (rest <= limit) & ((moved - points).abs() <= reach).all(0) & ((moved >= low) & (moved <= high)).all(0)
    return torch.where(good, moved, points), good
