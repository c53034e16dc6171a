"""The norms: how each measures a perturbation, steps, projects onto its ball and draws from it.

A norm is a row of `BALLS`, functions that ask the set of allowed points (`sets.Allowed`) for what they need. What else
another norm needs: docs/architecture.md, "An attack".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from orthattack.projection import IMAGE, dot, reciprocal, scaled, total

if TYPE_CHECKING:
    from orthattack.threat.sets import Allowed

__all__ = ["BALLS", "Ball", "Norm", "perturbation_norm"]

Norm = Literal["linf", "l2", "l1", "l0"]
"""L0 is the number of pixels that move, in whichever of their channels."""

# How often Newton's method is tried before the search that cannot fail; on a GPU always, since asking would stop it.
_NEWTON, _NEWTON_ON_GPU = 24, 12


@dataclass(frozen=True)
class Ball:
    """What a norm is to a region.

    Attributes:
        order: of `torch.linalg.vector_norm`; 0 for L0, of pixels.
        dual: the norm whose value at g is the most that ⟨g, δ⟩ is where this one of δ is 1, and its entries at most 1.
        step: the best step (allowed, start, gradient, alpha, count), which may leave the ball unless that is a box.
        project: the nearest allowed point in the ball (allowed, points, radius), but for round-off.
        direction: a random direction (draw, shape), uniform on the ball's surface, or in it if that is a box.
        is_box: whether its ball is a box; the set of allowed points then lies in it.
        counts: whether it counts pixels, so that neither rounding a perturbation nor shortening it makes a difference.
    """

    order: float
    dual: Norm
    step: Callable[[Allowed, Tensor, Tensor, Tensor, Tensor | int | None], Tensor]
    project: Callable[[Allowed, Tensor, Tensor], Tensor]
    direction: Callable[[Callable[..., Tensor], Sequence[int]], Tensor]
    is_box: bool = False
    counts: bool = False

    def of_ones(self, count: int) -> float:
        """The norm of `count` ones, and so of what is nowhere larger, at most."""
        return float(count if self.counts else count ** (1 / self.order))


def _laplace(draw: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
    """Exponential sizes with random signs."""
    uniform = 2 * draw(shape) - 1
    inside = uniform.abs().double().clamp(max=1 - torch.finfo(uniform.dtype).eps / 2)  # at 1 it would be infinite
    size = -torch.log1p(-inside)  # in float64 for the reason given in `Region.random_start`
    return uniform.sign() * size.to(uniform.dtype)


BALLS: dict[Norm, Ball] = {
    "linf": Ball(
        order=torch.inf,
        dual="l1",
        is_box=True,
        step=lambda allowed, start, g, alpha, _: allowed.step(start, g, alpha),
        project=lambda allowed, points, _: allowed.nearest(points),
        direction=lambda draw, shape: 2 * draw(shape) - 1,
    ),
    "l2": Ball(
        order=2,
        dual="l2",
        step=lambda allowed, start, g, alpha, _: torch.addcmul(start, allowed.unit_tangent(g), alpha),
        project=lambda allowed, points, radius: allowed.nearest_in_l2_ball(points, radius),
        direction=lambda draw, shape: draw(shape, torch.randn),
    ),
    "l1": Ball(
        order=1,
        dual="linf",
        step=lambda allowed, start, g, alpha, count: allowed.sparse_step(start, g, alpha, count),
        project=lambda allowed, points, radius: allowed.nearest_in_l1_ball(points, radius),
        direction=_laplace,
    ),
    "l0": Ball(
        order=0,
        dual="linf",
        counts=True,
        step=lambda allowed, start, g, alpha, _: allowed.step(start, g, alpha),
        project=lambda allowed, points, radius: by_support(allowed, points, radius),
        direction=lambda draw, shape: 2 * draw(shape) - 1,
    ),
}


def perturbation_norm(delta: Tensor, norm: Norm) -> Tensor:
    """The norm of each perturbation (N, C, H, W): (N,), the dtype of `delta`."""
    if norm == "l0":
        return (delta != 0).any(1).sum((1, 2)).to(delta.dtype)
    order = BALLS[norm].order
    size: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(delta, order, dim=-1), order, dim=(-2, -1))
    return size


def length(delta: Tensor, order: float) -> Tensor:
    """Norms in float64, (N, 1, 1, 1); rows first, as `orthattack.projection.total` does."""
    rows = torch.linalg.vector_norm(delta, order, dim=-1, keepdim=True)
    size: Tensor = torch.linalg.vector_norm(rows, order, dim=IMAGE, keepdim=True, dtype=torch.float64)
    return size


def unit(gradient: Tensor, order: float = 2) -> Tensor:
    """The gradient at length 1, or 0 if it is zero."""
    gradient, _ = scaled(gradient, IMAGE)
    return gradient * reciprocal(torch.linalg.vector_norm(gradient, order, dim=IMAGE, keepdim=True))


def by_secant(allowed: Allowed, points: Tensor, radius: Tensor, onto: Callable[..., Tensor] | None = None) -> Tensor:
    """The projection of `points` onto a set and an L2 ball, a factor on the perturbation being sought; `onto` projects
    onto the set."""
    x, onto = allowed.images, allowed.nearest if onto is None else onto
    nearest, delta = onto(points), points - x
    size = length(nearest - x, 2)
    s, s_before, before = torch.ones_like(size), torch.zeros_like(size), torch.zeros_like(size)
    asks = not x.is_cuda  # which would stop the GPU
    for _ in range(20 if asks else 6):
        off = (size > radius * (1 + 1e-6)) | ((s < 1) & (size < radius * (1 - 1e-6)))
        if asks and not bool(off.any()):
            break
        # The length grows with s, in proportion but for what is clipped, so a secant converges in a step or two.
        slope = (size - before) / torch.where(s != s_before, s - s_before, 1)
        s_next = torch.where(off, (s + (radius - size) * reciprocal(slope)).clamp(0, 1), s)
        s, s_before, before = s_next, s, size
        # What was right stays bit for bit, so that a sample does not depend on its batch.
        nearest = torch.where(off, onto(x + s.to(x.dtype) * delta), nearest)
        size = length(nearest - x, 2)
    return nearest


def by_threshold(
    allowed: Allowed,
    points: Tensor,
    radius: Tensor,
    onto: Callable[..., Tensor] | None = None,
    held: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The projection of `points` onto a set and an L1 ball, a soft threshold μ on the perturbation being sought; `onto`
    projects onto the set.

    ‖y(μ) - x‖₁ falls as μ grows, by 1 for each pixel that moves with μ, which is neither at x nor at a bound, less what
    planes hold of their signs: `held`, of the signs and the pixels. So Newton's method, kept inside a bracket, finds
    where it is the radius.
    """
    x, onto = allowed.images, allowed.nearest if onto is None else onto

    def moving(points: Tensor) -> Tensor:
        free = (points != x) & (points > allowed.lower) & (points < allowed.upper)
        count = free.sum(IMAGE, keepdim=True).double()
        return count if held is None else count - held((points - x).sign_().mul_(free), free)

    nearest = onto(points)
    size = length(nearest - x, 1)
    low, high = torch.zeros_like(size), (points - x).abs().amax(IMAGE, keepdim=True).double()
    f_low, slope = size - radius, moving(nearest)
    done = size <= radius * (1 + 1e-7)
    inside = torch.where(done, nearest, x)
    asks = not x.is_cuda
    for attempt in range(60 if asks else 40):
        if asks and bool(done.all()):
            break
        newton = low + f_low * reciprocal(slope)
        usable = (newton > low) & (newton < high) & (attempt % 8 < 7)
        mu = torch.where(usable, newton, (low + high) / 2)
        tried = onto(points, mu.to(x.dtype))
        f = length(tried - x, 1) - radius
        over, under = (f > 0) & ~done, (f <= 0) & ~done
        near = ~done & (f.abs() <= 1e-6 * radius)  # a little outside is as good: storing scales that back
        inside = torch.where(under | near, tried, inside)
        low, f_low = torch.where(over, mu, low), torch.where(over, f, f_low)
        slope = torch.where(over, moving(tried), slope)
        high = torch.where(under, mu, high)
        done = done | near | (high - low <= 1e-9 * high)
    return inside


def in_l1_ball(
    delta: Tensor,
    low: Tensor,
    high: Tensor,
    radius: Tensor,
    normal: Tensor | None,
    dims: tuple[int, ...],
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """d(λ, μ) = clip(soft(δ - λn, μ)) with ⟨d, n⟩ = 0 in every group, by Newton's method in all λ and in μ >= 0, which
    is 0 or makes ‖d‖₁ the radius; per sample, whether it was found.

    With D the pixels that move with λ and μ, neither clipped nor 0, and s their signs,

        F = ⟨d, n⟩ = 0        F_λ = -⟨n, n⟩_D,  F_μ = -⟨s, n⟩_D
        E = ‖d‖₁ - radius = 0  E_λ = -⟨s, n⟩_D,  E_μ = -⟨s, s⟩_D

    and there are as many F and λ as groups, none of which depends on another's λ.

    Args:
        delta: δ, (N, C, H, W).
        low, high: what d is clipped to, the same shape; at most and at least 0.
        radius: (N, 1, 1, 1), float64.
        normal: n, the same shape, with a group's pixels along `dims`; None for no equation but the ball's.
        noise: what round-off may leave of each F.
    """
    v, d, scratch = torch.empty_like(delta), torch.empty_like(delta), torch.empty_like(delta)
    threshold = torch.zeros_like(delta[:, :1, :1, :1])
    multiplier = f = reach = torch.zeros_like(noise)
    if normal is not None:
        inverse = reciprocal(dot(normal, normal, dims, v))
        multiplier = total(torch.mul(delta, normal, out=v), dims) * inverse
        reach = total(v.abs_(), dims) * inverse  # where few pixels are free, λ could go anywhere at once
    found = torch.zeros_like(radius, dtype=torch.bool)
    asks = not delta.is_cuda
    inside = radius * (1 - 8 * torch.finfo(delta.dtype).eps)  # rounding x + d should not lead out
    trials = _NEWTON if asks else _NEWTON_ON_GPU
    for trial in range(trials):
        moved = delta if normal is None else torch.addcmul(delta, normal, multiplier, value=-1, out=v)
        torch.sub(moved, torch.clamp(moved, -threshold, threshold, out=scratch), out=v)
        torch.clamp(v, low, high, out=d)
        size = total(torch.abs(d, out=scratch), IMAGE)
        right = torch.where(threshold == 0, size <= radius, (size - inside).abs() <= 5e-7 * radius)
        if normal is not None:
            f = dot(d, normal, dims, scratch)
            right &= (f.abs() <= noise).flatten(1).all(1).view(-1, 1, 1, 1)
        found = found | right
        if trial + 1 == trials or (asks and bool(found.all())):
            break
        signs = torch.eq(d, v, out=v).mul_(torch.sign(d, out=scratch))
        excess, count = size - inside, total(torch.abs(signs, out=scratch), IMAGE).double()
        binds = (threshold > 0) | (size > radius)
        if normal is not None:
            across = total(signs.mul_(normal), dims)
            inverse = reciprocal(dot(signs, signs, dims, scratch))
            excess = excess - (across * inverse * f).sum(IMAGE, keepdim=True, dtype=torch.float64)
            count = count - (across * inverse * across).sum(IMAGE, keepdim=True, dtype=torch.float64)
        rate = 0.5 if trial % 3 == 2 and trial > 3 else 1.0  # between two kinks it may go to and fro
        change = torch.where(binds & ~found, rate * excess * reciprocal(count), 0).to(delta.dtype)
        threshold, before = (threshold + change).clamp(min=0), threshold
        if normal is not None:
            more = ((rate * f - across * (threshold - before)) * inverse).clamp(-reach, reach)
            reach = 2 * reach
            multiplier = torch.where(found, multiplier, multiplier + more)
    return d, found


def by_support(allowed: Allowed, points: Tensor, radius: Tensor) -> Tensor:
    """The projection onto a set of which `radius` pixels move, those by which the box's nearest point comes nearer.

    Without planes it is the nearest point of the L0 ball in the box. With them that would be one among all supports;
    this is the nearest one on the support chosen.
    """
    x = allowed.images
    beyond = points - points.clamp(allowed.lower, allowed.upper)
    gain = ((points - x).square_() - beyond.square_()).sum(1, keepdim=True)
    pixels = largest(gain, radius)
    return among(allowed, pixels).nearest(torch.where(pixels, points, x))


def among(allowed: Allowed, pixels: Tensor) -> Allowed:
    """The set in which only these pixels, (N, 1, H, W), move."""
    x = allowed.images
    return allowed.boxed(torch.where(pixels, allowed.lower, x), torch.where(pixels, allowed.upper, x))


def largest(values: Tensor, count: Tensor) -> Tensor:
    """(N, 1, H, W) bool, of each sample the `count` (N, 1, 1, 1), rounded down, largest, of equal ones the first."""
    ranks = values.flatten(1).argsort(stable=True, dim=1, descending=True).argsort(1)
    return (ranks < count.floor().view(-1, 1)).view_as(values)


def sparsity(points: Tensor) -> int:
    """k, how many pixels an L1 step changes at least: a hundredth, as SLIDE (Tramèr & Boneh 2019)."""
    return max(1, round(0.01 * points[0].numel()))


def greedy_step(
    points: Tensor, gradient: Tensor, alpha: Tensor, lower: Tensor, upper: Tensor, count: Tensor | int | None = None
) -> Tensor:
    """The best L1 step in a box alone: see `sets.Allowed`.

    The pixels with the largest gradient take what they may, one after the other, until α is spent; those that tie for
    the last share what is left.
    """
    count = sparsity(points) if count is None else count

    def fill(points: Tensor, gradient: Tensor, lower: Tensor, upper: Tensor, is_whole: bool) -> tuple[Tensor, Tensor]:
        gradient, _ = scaled(gradient, IMAGE)
        room = torch.where(gradient > 0, upper - points, points - lower) * (gradient != 0)
        size, limit = gradient.abs() * (room > 0), torch.minimum(room, alpha / count)
        spent = filled(size, limit, alpha)
        left = alpha - total(spent, IMAGE)
        if is_whole and (points.is_cuda or not bool((left <= 1e-6 * alpha).all())):  # asking would stop the GPU
            spent = spent + filled(size, room - spent, left)
        return spent.copysign_(gradient), left <= 1e-6 * alpha

    if points.is_cuda:
        return points + fill(points, gradient, lower, upper, True)[0]
    index, is_one, _ = leading(gradient.abs().flatten(1), 2 * sparsity(points))
    part = (t.flatten(1).gather(1, index).view(len(t), 1, 1, -1) for t in (points, gradient, lower, upper))
    some, slope, low, high = part
    move, found = fill(some, slope * is_one.view_as(slope), low, high, False)
    y = points.flatten(1).scatter_add(1, index, move.flatten(1)).view_as(points)
    return y if bool(found.all()) else torch.where(found, y, points + fill(points, gradient, lower, upper, True)[0])


def leading(size: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the largest entries of rows (R, n) are, about `count` or all that are as large: positions (R, K), of which
    some stand for none; which do not; and what the other entries are at most, (R, 1), smaller than all of these.

    The bound is that of a sample of the row, which is quicker than to select exactly.
    """
    slots = min(size.shape[1], 2 * count)
    sample = size[:, :: max(1, count // 128)]
    bound = sample.topk(min(sample.shape[1], -(-count * sample.shape[1] // size.shape[1])), dim=1).values[:, -1:]
    beyond = size > bound
    row, column = beyond.nonzero().unbind(1)
    number = row.bincount(minlength=len(size)).unsqueeze(1)
    place = torch.arange(len(row)) - (number.cumsum(0) - number).squeeze(1)[row]
    index = torch.zeros(len(size), slots, dtype=torch.long)
    fits = place < slots
    index[row[fits], place[fits]] = column[fits]
    if bool((number > slots).any()):
        top = size.topk(slots, dim=1)
        index = torch.where(number > slots, top.indices, index)
        bound = torch.where(number > slots, top.values[:, -1:], bound)
    return index, (torch.arange(slots) < number) & (size.gather(1, index) > bound), bound


def filled(size: Tensor, limit: Tensor, amount: Tensor) -> Tensor:
    """Amounts of at most `limit`, the pixels of the largest `size` first, that add up to `amount` or all they may."""
    flat, limits, amount = size.flatten(1), limit.flatten(1), amount.flatten(1).double()
    top = flat.sort(dim=1, descending=True)
    reached = limits.gather(1, top.indices).double().cumsum(1) >= amount
    # The size of the pixel at which the amount is reached; 0 where it never is.
    last = torch.where(reached.any(1), top.values.gather(1, reached.long().argmax(1, keepdim=True)).squeeze(1), 0)
    last = last.view(-1, 1, 1, 1)
    full = limit * (size > last)
    tied = limit * ((size == last) & (size > 0))
    rest = (amount.view(-1, 1, 1, 1).to(size.dtype) - total(full, IMAGE)).clamp(min=0)
    return full + tied * (rest * reciprocal(total(tied, IMAGE))).clamp(max=1)
