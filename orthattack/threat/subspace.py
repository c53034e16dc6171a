"""Several planes at once, ⟨y - x, b_j⟩ = 0 for j = 1 … k, inside a box: what `Plane` does, for k directions.

With one direction the dual has one multiplier and `Plane` brackets it. With k there is nothing to bracket, but the dual
of the Euclidean projection is smooth, and Newton's method finds its k multipliers in a few steps; the linear program of
the best step is the limit of such projections: docs/method.md, "Several directions". `multipliers` does this in a few
passes over the images; what it does not find, and the L-infinity step on a GPU, is searched for here, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from orthattack.projection import IMAGE, dot, orthonormal_basis, reciprocal, remove_directions, scaled, total
from orthattack.threat.multipliers import SMALL, best_step, components, in_ball
from orthattack.threat.norms import by_secant, greedy_step, length
from orthattack.threat.rounding import Box
from orthattack.threat.sets import Allowed, completed, soften, some_of

# The duality gap at which a step is done.
_GAP = 1e-5


class _Trials(NamedTuple):
    """How often is tried, at most: τ, Newton's directions for each, lengths of each, moves back onto the planes."""

    stages: int
    newton: int
    line: int
    settle: int


_ASKING = _Trials(9, 100, 30, 24)
# To ask whether a search is done, the host would have to wait for the GPU; there, it is so long whatever it finds.
_ON_GPU = _Trials(5, 5, 2, 6)


class Subspace(Allowed):
    """The points y of a box with ⟨y - x, b_j⟩ = 0 for every direction b_j, a set of `sets.Allowed`.

    Args:
        images, lower, upper: as for `Plane`.
        directions: b, (N, K, C, H, W), any scale; they may be zero or depend on each other.
    """

    def __init__(self, images: Tensor, lower: Tensor, upper: Tensor, directions: Tensor) -> None:
        self.images, self.lower, self.upper = images, lower, upper
        self._asks = not images.is_cuda
        self._trials = _ASKING if self._asks else _ON_GPU
        self._directions, self._is_small = directions, images[0].numel() <= SMALL
        basis = orthonormal_basis(directions.double())
        # A direction that was dropped as dependent would make the Newton matrix singular.
        self._dropped = torch.diag_embed((basis == 0).flatten(2).all(2).double())
        self._near = tuple(row.to(images.dtype).contiguous() for row in basis.unbind(-4))
        self._peaks = torch.stack([torch.linalg.vector_norm(row, torch.inf, dim=IMAGE) for row in self._near], 1)

    @cached_property
    def basis(self) -> Tensor:
        """(N, K, C, H, W), orthonormal, float64; kept until `release`, as are six image batches of working memory."""
        return orthonormal_basis(self._directions.double())

    @property
    def _rows(self) -> tuple[Tensor, ...]:
        return self.basis.unbind(-4)

    @cached_property
    def _scratch(self) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(self.images) for _ in range(6))

    def release(self) -> None:
        for name in ("basis", "_scratch"):
            self.__dict__.pop(name, None)

    def boxed(self, lower: Tensor, upper: Tensor) -> Subspace:
        subspace = copy.copy(self)
        subspace.release()
        subspace.lower, subspace.upper = lower, upper
        return subspace

    def tangent(self, gradient: Tensor) -> Tensor:
        return remove_directions(gradient, torch.stack(self._near, -4))

    def unit_tangent(self, gradient: Tensor) -> Tensor:
        """See `sets.Allowed`. It is in the working memory, until the next call."""
        g, _ = self._projected(gradient.contiguous())
        return g.mul_(reciprocal(dot(g, g, IMAGE, self._scratch[1]).sqrt()))

    def _projected(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient, scaled by powers of two, without its components along the directions, exactly 0 if less than
        round-off is left; and the sum of its absolute values."""
        g, scratch = self._scratch[:2]
        scaled(gradient, IMAGE, out=g)
        tolerance = 16 * torch.finfo(g.dtype).eps * total(torch.abs(g, out=scratch), IMAGE)
        size, more = 0 * tolerance, torch.ones_like(tolerance)
        for _ in range(2):
            for row in self._near:
                g.addcmul_(row, dot(g, row, IMAGE, scratch) * more, value=-1)
            size = total(torch.abs(g, out=scratch), IMAGE)
            more = (size < 1e3 * tolerance).to(g.dtype)  # for the others a second pass would change round-off only
            if self._asks and not bool(more.any()):
                break
        rest = size > tolerance
        return g if self._asks and bool(rest.all()) else g.mul_(rest), size * rest

    def step(self, start: Tensor, gradient: Tensor, alpha: Tensor) -> Tensor:
        """`ascend`, settled; where that cannot be, `start`."""
        y = self.ascend(start, gradient, alpha)

        def within() -> Box:
            return torch.maximum(self.lower, start - alpha), torch.minimum(self.upper, start + alpha)

        return self._settled(y, within, start)

    def sparse_step(self, start: Tensor, gradient: Tensor, alpha: Tensor, count: Tensor | int | None = None) -> Tensor:
        """By the projected gradient, which leaves the planes."""
        return greedy_step(start, self._projected(gradient.contiguous())[0], alpha, self.lower, self.upper, count)

    def ascend(self, start: Tensor, gradient: Tensor, alpha: Tensor) -> Tensor:
        """Solve the linear program of the best L-infinity step, ⟨y - s, b_j⟩ = 0, from any s in the box.

        The duality gap is below 1e-5 of α‖g‖₁ as a rule; a sample whose gradient is zero, or in the span of the
        directions, stays at s.
        """
        start, gradient = start.contiguous(), gradient.contiguous()
        if not self._asks:
            return self._ascend(start, gradient, alpha)
        return self._ascended(start, gradient, alpha, 1)

    def _ascended(self, start: Tensor, gradient: Tensor, alpha: Tensor, looked: int) -> Tensor:
        """The same by `best_step`, which looks at some pixels, then at eight times as many, then `_ascend`."""
        g, size = self._projected(gradient)
        _, low, high, *scratch = self._scratch
        torch.maximum(torch.sub(self.lower, start, out=low), -alpha, out=low)
        torch.minimum(torch.sub(self.upper, start, out=high), alpha, out=high)
        move, found = best_step(g, size, low, high, self._near, self._peaks, alpha, _GAP, looked, scratch)
        moves = size > 0
        move = move if bool(moves.all()) else torch.where(moves, move, 0)
        y = torch.add(start, move).clamp_(self.lower, self.upper)

        def search(some: Subspace, start: Tensor, gradient: Tensor, alpha: Tensor) -> Tensor:
            if looked == 1 and not some._is_small:
                return some._ascended(start, gradient, alpha, 8)
            return some._ascend(start, gradient, alpha)

        return completed(self, y, found | ~moves, search, start, gradient, alpha)

    def _ascend(self, start: Tensor, gradient: Tensor, alpha: Tensor) -> Tensor:
        """The same in float64, by a search that goes on for longer.

        It is done as the projection of s + τg onto the same set, for growing τ, each search starting from the last
        one's multipliers; from some τ on, that is the solution.

        Source: docs/method.md, "Several directions".
        """
        s, width = start.double(), alpha.double()
        lower, upper = torch.maximum(self.lower.double(), s - width), torch.minimum(self.upper.double(), s + width)
        g, _ = scaled(self.tangent(gradient).double(), IMAGE)
        size = total(g.abs(), IMAGE)
        allowed = _GAP * width * size
        y, moves = s, size > 0
        primal, dual = torch.zeros_like(size), torch.where(moves, torch.inf, 0.0)
        multiplier = torch.zeros(self._dropped.shape[:2], dtype=torch.float64, device=s.device)
        tau = width * s[0].numel() * reciprocal(size)  # a pixel of average gradient just reaches its bound
        for _ in range(self._trials.stages):
            active = (dual - primal > allowed).flatten()
            if self._asks and not bool(active.any()):
                break

            def point(m: Tensor, tau: Tensor = tau) -> tuple[Tensor, Tensor]:
                return _clipped(s + tau * (g - self._along(m)), lower, upper)

            multiplier, tried = self._newton(point, multiplier, s, tau, active)
            rest = g - self._along(multiplier)
            bound = total(torch.maximum(rest * (upper - s), rest * (lower - s)), IMAGE)
            # Only what is on the planes counts, and the last stages, with few pixels between their bounds, may miss.
            moved = length(tried - s, 2).flatten(1)
            missed = active & (self._components(tried - s).abs() > 1e-9 * moved).any(1)
            if not self._asks:
                active = active & ~missed
            elif bool(missed.any()):
                tried = self._nearest(tried, lower, upper, s, None, missed)
            value = dot(g, tried - s, IMAGE)
            running = active.view(-1, 1, 1, 1)
            dual = torch.where(running, torch.minimum(dual, bound), dual)
            better = running & (value > primal)
            y, primal = torch.where(better, tried, y), torch.where(better, value, primal)
            tau = 8 * tau
        return y.to(start.dtype).clamp_(self.lower, self.upper)

    def nearest(self, points: Tensor, shrink: Tensor | None = None) -> Tensor:
        if shrink is not None:
            return self.settle(self._searched(points, shrink))
        no_ball = torch.full((len(points), 1, 1, 1), torch.inf, dtype=torch.float64, device=points.device)
        return self._in_ball(points, no_ball, 2, lambda some, p, _: some._searched(p))

    def nearest_in_l2_ball(self, points: Tensor, radius: Tensor) -> Tensor:
        return self._in_ball(points, radius, 2, by_secant)

    def nearest_in_l1_ball(self, points: Tensor, radius: Tensor) -> Tensor:
        return self._in_ball(points, radius, 1, lambda some, p, r: some._searched(p, None, r))

    def _in_ball(
        self, points: Tensor, radius: Tensor, order: int, search: Callable[[Subspace, Tensor, Tensor], Tensor]
    ) -> Tensor:
        x, (low, high, *scratch) = self.images, self._scratch
        torch.sub(self.lower, x, out=low)
        torch.sub(self.upper, x, out=high)
        d, found = in_ball(points - x, low, high, self._near, radius, order, scratch)
        y = d.add(x).clamp_(self.lower, self.upper)
        return self.settle(completed(self, y, found, search, points, radius))

    def _searched(self, points: Tensor, shrink: Tensor | None = None, radius: Tensor | None = None) -> Tensor:
        """The same in float64, by a search that goes on for longer; with a radius, in the L1 ball but for 1e-9 of it as
        a rule: ‖y - x‖₁ is one more equation for Newton's method, with the signs of y - x as its direction."""
        given = points.double(), self.lower.double(), self.upper.double(), self.images.double()
        y = self._nearest(*given, shrink)
        if radius is not None:
            outside = (total((y - given[3]).abs(), IMAGE) > radius).flatten()
            y = torch.where(outside.view(-1, 1, 1, 1), self._nearest(*given, None, outside, radius), y)
        return y.to(points.dtype).clamp_(self.lower, self.upper)

    def settle(self, points: Tensor) -> Tensor:
        return self._settled(points, lambda: (self.lower, self.upper), self.images)

    def _settled(self, points: Tensor, box: Callable[[], Box], fallback: Tensor) -> Tensor:
        """`settle` in a smaller box, where what cannot be settled becomes the `fallback`."""
        lost = self._lost(points)
        if self._asks and not bool(lost.any()):
            return points
        lower, upper = box()
        if self._asks and not bool(lost.all()):
            points = points.clone()
            points[lost] = some_of(self, lost)._settled(
                points[lost], lambda: (lower[lost], upper[lost]), fallback[lost]
            )
            return points
        x, low, high = self.images.double(), lower.double(), upper.double()
        for attempt in range(self._trials.settle):
            y = points.double()
            excess = self._components(y - x)
            room = torch.minimum(y - low, high - y)  # in proportion to it, so that no pixel meets a bound
            if attempt > 0:  # rounding all pixels again would err as much again: now a few, each time others
                if attempt % 3 == 2:  # where pixels at a bound are all there is, they may have to do
                    room = torch.where(self._along(excess) > 0, y - low, high - y)
                room = room * self._few(room, points, (attempt - 1) // 3, 2 if attempt % 3 == 0 else 1)
            room = room * reciprocal(room.amax(IMAGE, keepdim=True))
            shift = self._along(self._solve(room, excess))
            moved = (y - shift * room).clamp_(low, high).to(points.dtype)
            points = torch.where(lost.view(-1, 1, 1, 1), moved, points)
            lost = self._lost(points)
            if self._asks and not bool(lost.any()):
                return points
        settled: Tensor = torch.where(lost.view(-1, 1, 1, 1), fallback, points)
        return settled

    def _lost(self, points: Tensor) -> Tensor:
        """Which samples, (N,), are off the planes by more than may be, as far as the sums in their dtype can tell."""
        unit = (1e-6 if points.dtype == torch.float32 else 1e-12) * 0.9 / len(self._near) ** 0.5
        delta, scratch = self._scratch[:2]
        torch.sub(points, self.images, out=delta)
        allowed = unit * dot(delta, delta, IMAGE, scratch).flatten(1).sqrt()
        lost: Tensor = (components(delta, self._near, scratch).abs() > allowed).any(1)
        return lost

    def _few(self, room: Tensor, points: Tensor, rank: int, count: int) -> Tensor:
        """1 for `count` pixels per direction with much room and a fine grid, the best ones at rank 0; 0 elsewhere."""
        grid = torch.nextafter(points, torch.full_like(points, torch.inf)).double() - points.double()
        merit = ((room * room / grid).unsqueeze(1) * self.basis.abs()).flatten(2)
        best = merit.topk(min(count * (rank + 1), merit.shape[2]), dim=2).indices
        few: Tensor = torch.zeros_like(room.flatten(1)).scatter_(1, best[:, :, -count:].flatten(1), 1.0).view_as(room)
        return few

    def _nearest(
        self,
        points: Tensor,
        lower: Tensor,
        upper: Tensor,
        anchor: Tensor,
        shrink: Tensor | None,
        active: Tensor | None = None,
        radius: Tensor | None = None,
    ) -> Tensor:
        """The projection onto another box and the planes through `anchor`, and an L1 ball around it, all float64."""
        count = len(self._rows)
        unit = points[0].numel() ** -0.5

        def point(m: Tensor) -> tuple[Tensor, Tensor]:
            moved = points - self._along(m[:, :count])
            threshold = shrink if radius is None else unit * m[:, count].clamp(min=0).view(-1, 1, 1, 1)
            if threshold is None:
                return _clipped(moved, lower, upper)
            near = (moved - anchor).abs() <= threshold
            y, free = _clipped(soften(moved, anchor, threshold.double()), lower, upper)
            return y, free & ~near

        start = torch.zeros(len(points), count + (radius is not None), dtype=torch.float64, device=points.device)
        if active is None:
            active = torch.ones(len(points), dtype=torch.bool, device=points.device)
        one = torch.ones(len(points), 1, 1, 1, dtype=torch.float64, device=points.device)
        return self._newton(point, start, anchor, one, active, radius)[1]

    def _newton(
        self,
        point: Callable[[Tensor], tuple[Tensor, Tensor]],
        start: Tensor,
        anchor: Tensor,
        tau: Tensor,
        active: Tensor,
        radius: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The multipliers m, (N, K), at which F(m) = (⟨y(m) - anchor, b_j⟩)_j is zero, and y(m).

        y(m) = clip(p - τ Σ m_j b_j), and `point` gives it with the pixels D that are not clipped. -F is the gradient of
        a convex function and -τ BᵀDB its Jacobian, so a Newton direction is one of descent, and a search along it needs
        only the sign of ⟨F, direction⟩. A sample that is done keeps its multipliers whatever the others in its batch
        do. With a `radius`, ‖y - anchor‖₁ - radius is one more entry of F, scaled like the others, and the last
        multiplier the threshold that goes with it.
        """
        unit = anchor[0].numel() ** -0.5

        def rows(y: Tensor) -> list[Tensor]:
            return [*self._rows] if radius is None else [*self._rows, unit * (y - anchor).sign()]

        def residual(y: Tensor) -> Tensor:
            f = self._components(y - anchor)
            if radius is None:
                return f
            excess = total((y - anchor).abs(), IMAGE) - radius
            return torch.cat([f, unit * excess.flatten(1)], dim=1)

        m, (y, free) = start, point(start)
        f = residual(y)
        reach = f.abs().amax(1)
        for _ in range(self._trials.newton):
            active = active & (f.abs() > 2e-13 * length(y - anchor, 2).flatten(1)).any(1)
            if self._asks and not bool(active.any()):
                break
            # Where fewer pixels than directions are free, the damping keeps the step finite; it fades with F.
            damping = 1e-3 * f.abs().amax(1) * reciprocal(reach)
            direction = self._solve(free, f, damping, rows(y)) / tau.view(-1, 1)
            slope = (f * direction).sum(1)
            rate = torch.ones_like(slope)
            least, most = torch.zeros_like(slope), torch.full_like(slope, torch.inf)
            for _ in range(self._trials.line):
                y_next, free_next = point(m + rate.unsqueeze(1) * direction)
                f_next = residual(y_next)
                now = (f_next * direction).sum(1)
                too_far, too_near = (now < -0.5 * slope) & active, (now > 0.5 * slope) & active
                if self._asks and not bool((too_far | too_near).any()):
                    break
                least, most = torch.where(too_near, rate, least), torch.where(too_far, rate, most)
                # Across a flat stretch of F, where no pixel is free, only the bracket shows the way.
                back = torch.where(least > 0, 0.5, (slope * reciprocal(slope - now)).clamp(0.1, 0.5))
                target = torch.where(most < torch.inf, least + back * (most - least), 2 * rate)
                rate = torch.where(too_far | too_near, target, rate)
            taken, keep = active.unsqueeze(1), active.view(-1, 1, 1, 1)
            reach = torch.maximum(reach, f_next.abs().amax(1))
            m, f = torch.where(taken, m + rate.unsqueeze(1) * direction, m), torch.where(taken, f_next, f)
            y, free = torch.where(keep, y_next, y), torch.where(keep, free_next, free)
        return m, y

    def _along(self, multiplier: Tensor) -> Tensor:
        """Σ m_j b_j for (N, K) multipliers."""
        total = torch.zeros_like(self._rows[0])
        for m, row in zip(multiplier.unbind(1), self._rows, strict=True):
            total = torch.addcmul(total, m.view(-1, 1, 1, 1), row)
        return total

    def _components(self, delta: Tensor) -> Tensor:
        """⟨δ, b_j⟩, (N, K)."""
        return torch.cat([dot(delta, row, IMAGE).flatten(1) for row in self._rows], dim=1)

    def _solve(
        self, weight: Tensor, f: Tensor, damping: Tensor | float = 0.0, rows: list[Tensor] | None = None
    ) -> Tensor:
        """(BᵀDB + damping)⁻¹ f with D the weights of the pixels; always regularised a little."""
        rows = list(self._rows) if rows is None else rows
        columns = [torch.cat([dot(row * other, weight, IMAGE).flatten(1) for other in rows], 1) for row in rows]
        matrix = torch.stack(columns, 1)
        known = len(self._rows)
        matrix[:, :known, :known] += self._dropped
        trace = matrix.diagonal(dim1=1, dim2=2).sum(1)
        eye = torch.eye(len(rows), dtype=f.dtype, device=f.device)
        matrix = matrix + (1e-12 + 1e-10 * trace + damping).view(-1, 1, 1) * eye
        solution: Tensor = torch.linalg.solve_ex(matrix, f).result  # `solve` asks the GPU whether it could
        return solution


def _clipped(points: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The points in the box, and which pixels were strictly inside."""
    return points.clamp(lower, upper), (points > lower) & (points < upper)
