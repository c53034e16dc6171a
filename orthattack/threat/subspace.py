"""Several planes at once, ⟨y - x, b_j⟩ = 0 for j = 1 … k, inside a box: what `Plane` does, for k directions.

With one direction the dual has one multiplier and `Plane` brackets it. With k there is nothing to bracket, but the dual
of the Euclidean projection is smooth, and Newton's method finds its k multipliers in a few steps; the linear program of
the best step is the limit of such projections. Everything is computed in float64: docs/method.md, "Several directions".
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from orthattack.projection import IMAGE, dot, orthonormal_basis, reciprocal, remove_directions, scaled
from orthattack.threat.norms import by_secant, greedy_step
from orthattack.threat.sets import Allowed, soften

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
        self.basis = orthonormal_basis(directions.double())
        self._rows = self.basis.unbind(-4)
        # A direction that was dropped as dependent would make the Newton matrix singular.
        self._dropped = torch.diag_embed((self.basis == 0).flatten(2).all(2).double())

    def boxed(self, lower: Tensor, upper: Tensor) -> Subspace:
        subspace = copy.copy(self)
        subspace.lower, subspace.upper = lower, upper
        return subspace

    def tangent(self, gradient: Tensor) -> Tensor:
        return remove_directions(gradient, self.basis)

    def step(self, start: Tensor, gradient: Tensor, alpha: Tensor) -> Tensor:
        """`ascend`, settled; where that cannot be, `start`."""
        lower, upper = torch.maximum(self.lower, start - alpha), torch.minimum(self.upper, start + alpha)
        y = self.ascend(start.contiguous(), gradient.contiguous(), alpha)
        return self._settled(y, lower, upper, start)

    def sparse_step(self, start: Tensor, gradient: Tensor, alpha: Tensor, count: Tensor | int | None = None) -> Tensor:
        """By the projected gradient, which leaves the planes."""
        return greedy_step(start, self.tangent(gradient), alpha, self.lower, self.upper, count)

    def ascend(self, start: Tensor, gradient: Tensor, alpha: Tensor) -> Tensor:
        """Solve the linear program of the best L-infinity step, ⟨y - s, b_j⟩ = 0, from any s in the box.

        It is done as the projection of s + τg onto the same set, for growing τ, each search starting from the last
        one's multipliers; from some τ on, that is the solution. The duality gap is below 1e-5 of α‖g‖₁ as a rule; a
        sample whose gradient is zero, or in the span of the directions, stays at s.

        Source: docs/method.md, "Several directions".
        """
        s, width = start.double(), alpha.double()
        lower, upper = torch.maximum(self.lower.double(), s - width), torch.minimum(self.upper.double(), s + width)
        g, _ = scaled(self.tangent(gradient).double(), IMAGE)
        size = g.abs().sum(IMAGE, keepdim=True)
        allowed = _GAP * width * size
        y, moves = s, size > 0
        primal, dual = torch.zeros_like(size), torch.where(moves, torch.inf, 0.0)
        multiplier = torch.zeros(*self.basis.shape[:2], dtype=torch.float64, device=s.device)
        tau = width * s[0].numel() * reciprocal(size)  # a pixel of average gradient just reaches its bound
        for _ in range(self._trials.stages):
            active = (dual - primal > allowed).flatten()
            if self._asks and not bool(active.any()):
                break

            def point(m: Tensor, tau: Tensor = tau) -> tuple[Tensor, Tensor]:
                return _clipped(s + tau * (g - self._along(m)), lower, upper)

            multiplier, tried = self._newton(point, multiplier, s, tau, active)
            rest = g - self._along(multiplier)
            bound = torch.maximum(rest * (upper - s), rest * (lower - s)).sum(IMAGE, keepdim=True)
            # Only what is on the planes counts, and the last stages, with few pixels between their bounds, may miss.
            length = torch.linalg.vector_norm(tried - s, dim=IMAGE)
            missed = active & (self._components(tried - s).abs().amax(1) > 1e-9 * length)
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
        lower, upper = self.lower.double(), self.upper.double()
        y = self._nearest(points.double(), lower, upper, self.images.double(), shrink)
        return self.settle(y.to(points.dtype).clamp_(self.lower, self.upper))

    nearest_in_l2_ball = by_secant

    def nearest_in_l1_ball(self, points: Tensor, eps: Tensor) -> Tensor:
        """y(m, μ) = clip(x + soft(p - Σ m_j b_j - x, μ)), off the ball by 1e-9 ε as a rule: ‖y - x‖₁ = ε is one more
        equation for Newton's method, with the signs of y - x as its direction.

        Source: docs/method.md, "The nearest point".
        """
        x, lower, upper = self.images.double(), self.lower.double(), self.upper.double()
        y = self._nearest(points.double(), lower, upper, x, None)
        outside = ((y - x).abs().sum(IMAGE, keepdim=True) > eps).flatten()
        if not self._asks or bool(outside.any()):
            inside = self._nearest(points.double(), lower, upper, x, None, outside, eps)
            y = torch.where(outside.view(-1, 1, 1, 1), inside, y)
        return self.settle(y.to(points.dtype).clamp_(self.lower, self.upper))

    def settle(self, points: Tensor) -> Tensor:
        return self._settled(points, self.lower, self.upper, self.images)

    def release(self) -> None:
        pass

    def _settled(self, points: Tensor, lower: Tensor, upper: Tensor, fallback: Tensor) -> Tensor:
        """`settle` in a smaller box, where what cannot be settled becomes the `fallback`."""
        unit = (1e-6 if points.dtype == torch.float32 else 1e-12) * 0.9 / len(self._rows) ** 0.5
        x, lower, upper = self.images.double(), lower.double(), upper.double()

        def off(points: Tensor) -> Tensor:
            delta = points.double() - x
            length = torch.linalg.vector_norm(delta, dim=IMAGE)
            misses: Tensor = self._components(delta).abs().amax(1) > unit * length
            return misses

        for attempt in range(self._trials.settle):
            lost = off(points)
            if self._asks and not bool(lost.any()):
                return points
            y = points.double()
            excess = self._components(y - x)
            room = torch.minimum(y - lower, upper - y)  # in proportion to it, so that no pixel meets a bound
            if attempt > 0:  # rounding all pixels again would err as much again: now a few, each time others
                if attempt % 3 == 2:  # where pixels at a bound are all there is, they may have to do
                    room = torch.where(self._along(excess) > 0, y - lower, upper - y)
                room = room * self._few(room, points, (attempt - 1) // 3, 2 if attempt % 3 == 0 else 1)
            room = room * reciprocal(room.amax(IMAGE, keepdim=True))
            shift = self._along(self._solve(room, excess))
            moved = (y - shift * room).clamp_(lower, upper).to(points.dtype)
            points = torch.where(lost.view(-1, 1, 1, 1), moved, points)
        settled: Tensor = torch.where(off(points).view(-1, 1, 1, 1), fallback, points)
        return settled

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
            excess = (y - anchor).abs().sum(IMAGE, keepdim=True) - radius
            return torch.cat([f, unit * excess.flatten(1)], dim=1)

        m, (y, free) = start, point(start)
        f = residual(y)
        reach = f.abs().amax(1)
        for _ in range(self._trials.newton):
            length = torch.linalg.vector_norm(y - anchor, dim=IMAGE)
            active = active & (f.abs().amax(1) > 2e-13 * length)
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
        return torch.stack([(delta * row).sum(IMAGE) for row in self._rows], dim=1)

    def _solve(
        self, weight: Tensor, f: Tensor, damping: Tensor | float = 0.0, rows: list[Tensor] | None = None
    ) -> Tensor:
        """(BᵀDB + damping)⁻¹ f with D the weights of the pixels; always regularised a little."""
        rows = list(self._rows) if rows is None else rows
        columns = [torch.stack([(row * other * weight).sum(IMAGE) for other in rows], 1) for row in rows]
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
