"""What a perturbation may be: norm ball ∩ bounds ∩ orthogonality, with the step, the projection and the random start.

`ThreatModel` is the description; `ThreatModel.around(images)` is the set of allowed images around a batch, a `Region`.
A region deals in images, not in perturbations: what it returns are the very numbers that the model sees, so every
constraint holds for them as stored, not merely before a last rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from orthattack.plane import Plane
from orthattack.projection import Scope, orthogonalize, reciprocal, scaled, scope_dims

__all__ = ["Norm", "Region", "ThreatModel", "perturbation_norm"]

Norm = Literal["linf", "l2"]

_IMAGE = scope_dims("image")


@dataclass(frozen=True)
class ThreatModel:
    """The set of perturbations an attack may use::

        { δ : ‖δ‖ <= eps,  low <= x + δ <= high,  ⟨δ, x⟩ = 0 }

    Args:
        norm: "linf" or "l2".
        eps: radius in pixel units, e.g. ``8 / 255``; at least 0.
        bounds: the smallest and largest pixel value.
        scope: which vectors must stay orthogonal to the image's own (see `orthattack.projection`), or None for no
            orthogonality constraint.

    Raises:
        ValueError: an option outside these.
    """

    norm: Norm
    eps: float
    bounds: tuple[float, float] = (0.0, 1.0)
    scope: Scope | None = "image"

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {', '.join(map(repr, get_args(Norm)))}; got {self.norm!r}")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps must be a finite number >= 0, in pixel units such as 8/255; got {self.eps!r}")
        low, high = self.bounds
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"bounds must be two finite numbers (low, high) with low < high; got {self.bounds!r}")
        if self.scope is not None:
            scope_dims(self.scope)

    def around(self, images: Tensor) -> Region:
        """The allowed images around each of `images`, (N, C, H, W), floating point, inside the bounds."""
        return Region(self, images)


class Region:
    """The allowed images around a batch; made by `ThreatModel.around`.

    Points of the region are tensors (N, C, H, W) in the images' dtype. For float32 images they satisfy, recomputed in
    float64: inside the bounds, ‖δ‖ <= eps (1 + 1e-6), and |cos(δ, x)| <= 1e-6 in every group of the scope. float16 and
    bfloat16 images keep the bounds and the ball, and orthogonality as far as the coarse grid allows.
    """

    def __init__(self, threat: ThreatModel, images: Tensor) -> None:
        self.threat, self.dtype = threat, images.dtype
        low, high = threat.bounds
        x = images.detach().to(torch.promote_types(images.dtype, torch.float32)).contiguous()
        if threat.norm == "linf":
            lower = self._within_eps(x - threat.eps, x).clamp_(min=low)
            upper = self._within_eps(x + threat.eps, x).clamp_(max=high)
        else:
            lower, upper = torch.full_like(x, low), torch.full_like(x, high)
        self._set(x, lower, upper)

    def _set(self, images: Tensor, lower: Tensor, upper: Tensor) -> None:
        self._images, self._lower, self._upper = images, lower, upper
        scope = self.threat.scope
        self._plane = None if scope is None else Plane(images, lower, upper, scope)

    def select(self, index: Tensor) -> Region:
        """The region around the images at `index`, positions in the batch, only."""
        region = object.__new__(Region)
        region.threat, region.dtype = self.threat, self.dtype
        region._set(self._images[index], self._lower[index], self._upper[index])
        return region

    def step(self, points: Tensor, gradient: Tensor, alpha: float) -> Tensor:
        """The step of size `alpha` from `points` that gains the most along `gradient` and stays in the region.

        L-infinity: the exact solution of the linear program::

            max_y ⟨g, y⟩  subject to  ‖y - x_t‖∞ <= α  and  y in the region

        which is ``clip(x_t + alpha * sign(g))`` without orthogonality and ``clip(x_t + alpha * sign(g - λ x))`` with
        it. L2: `alpha` along the normalised (projected) gradient, then `project`. Where the gradient is zero, or
        parallel to the image, the points stay.

        Args:
            points: (N, C, H, W), in the region.
            gradient: the same shape, finite, any scale.
            alpha: step size in pixel units.

        Returns:
            (N, C, H, W), in the region.

        Source: docs/method.md, "The best step".
        """
        start, g = points.to(self._images.dtype), gradient.to(self._images.dtype)
        if self.threat.norm == "l2":
            return self.project(start + alpha * _unit(g, self._images, self.threat.scope))
        if self._plane is not None:
            return self._store(self._plane.step(start.contiguous(), g.contiguous(), alpha))
        return self._store(torch.add(start, g.sign(), alpha=alpha).clamp_(self._lower, self._upper))

    def project(self, points: Tensor) -> Tensor:
        """The Euclidean projection of any `points` (N, C, H, W) onto the region.

        On the box and the plane it is ``clip(p - λ x)``. The L2 ball adds a second multiplier, a factor s <= 1 on the
        perturbation: ``clip(x + s (p - x) - λ x)`` with the s at which the ball's surface is reached.

        Source: docs/method.md, "The nearest point".
        """
        points = points.to(self._images.dtype).contiguous()
        nearest = self._nearest(points)
        return (
            self._store(nearest) if self.threat.norm == "linf" else self._store_in_ball(self._in_ball(points, nearest))
        )

    def random_start(self, generator: torch.Generator | None = None) -> Tensor:
        """A random point of the region.

        L-infinity: uniform in the ball; L2: uniform in the ball (within the plane); then projected onto the region.
        The numbers are drawn on the generator's device, so a CPU generator gives the same start on every device.
        """
        x, eps = self._images, self.threat.eps
        device = x.device if generator is None else generator.device
        if self.threat.norm == "linf":
            noise = torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype)
            offset = (2 * noise - 1).to(x.device)
        else:
            noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
            radius = torch.rand((len(x), 1, 1, 1), generator=generator, device=device, dtype=x.dtype)
            # A radius^n is uniform where the volume within a radius grows as its n-th power.
            radius = radius.to(x.device) ** (1 / max(1, x[0].numel()))
            offset = radius * _unit(noise.to(x.device), x, self.threat.scope)
        return self.project((x + eps * offset).clamp_(*self.threat.bounds))

    def _within_eps(self, bound: Tensor, images: Tensor) -> Tensor:
        """`bound` on the grid of the dtype, moved one step towards the image where rounding has put it outside."""
        bound = bound.to(self.dtype)
        outside = (bound.double() - images.double()).abs() > self.threat.eps
        inward = torch.nextafter(bound, images.to(self.dtype))
        return torch.where(outside, inward, bound).to(images.dtype)

    def _store(self, points: Tensor) -> Tensor:
        """`points` in the images' dtype, still in the box and, if that dtype is fine enough, still on the plane."""
        if self.dtype != points.dtype:  # half precision: a grid too coarse to aim on
            return points.to(self.dtype).clamp(self._lower.to(self.dtype), self._upper.to(self.dtype))
        return points if self._plane is None else self._plane.settle(points)

    def _nearest(self, points: Tensor) -> Tensor:
        return points.clamp(self._lower, self._upper) if self._plane is None else self._plane.nearest(points)

    def _in_ball(self, points: Tensor, nearest: Tensor) -> Tensor:
        """The projection of `points` onto the L2 ball too, given that onto box and plane; safe to store."""
        x, eps = self._images, self.threat.eps
        delta = points - x
        length = _length(nearest - x)
        s, s_before, before = torch.ones_like(length), torch.zeros_like(length), torch.zeros_like(length)
        for _ in range(20):
            off = (length > eps * (1 + 1e-6)) | ((s < 1) & (length < eps * (1 - 1e-6)))
            if not bool(off.any()):
                break
            # The length grows with s, in proportion but for what is clipped, so a secant converges in a step or two.
            slope = (length - before) / torch.where(s != s_before, s - s_before, 1)
            s_next = torch.where(off, (s + (eps - length) * reciprocal(slope)).clamp(0, 1), s)
            s, s_before, before = s_next, s, length
            nearest = self._nearest(x + s.to(x.dtype) * delta)
            length = _length(nearest - x)
        return nearest

    def _store_in_ball(self, points: Tensor) -> Tensor:
        """`points`, stored, with each perturbation scaled by what it takes to be in the ball: scaling towards x leaves
        neither box nor plane. It takes parts in 1e7, or more where eps is so tiny that the grid is coarse beside it."""
        x, eps = self._images, self.threat.eps
        factor = (eps * reciprocal(_length(points - x))).clamp(max=1)
        for attempt in range(12):
            stored = self._store(torch.lerp(x, points, factor.to(x.dtype)))
            length = _length(stored.double() - x.double())
            fits = length <= eps * (1 + 5e-7)
            if bool(fits.all()):
                break
            # On a coarse grid a slight shrink changes nothing, so each attempt shrinks by more.
            factor = torch.where(fits, factor, factor * (eps * reciprocal(length)) ** 2**attempt)
        return torch.where(fits, stored, x.to(self.dtype))


def _length(delta: Tensor) -> Tensor:
    """L2 norms in float64, (N, 1, 1, 1)."""
    length: Tensor = torch.linalg.vector_norm(delta, dim=_IMAGE, keepdim=True, dtype=torch.float64)
    return length


def perturbation_norm(delta: Tensor, norm: Norm) -> Tensor:
    """The norm of each perturbation.

    Args:
        delta: (N, C, H, W).
        norm: "linf" or "l2".

    Returns:
        (N,), the dtype of `delta`.
    """
    if norm == "linf":
        return delta.abs().amax(_IMAGE)
    length: Tensor = torch.linalg.vector_norm(delta, dim=_IMAGE)
    return length


def _unit(gradient: Tensor, images: Tensor, scope: Scope | None) -> Tensor:
    """The (projected) gradient at length 1, or 0 if it is zero."""
    if scope is not None:
        gradient = orthogonalize(gradient, images, scope)
    gradient, _ = scaled(gradient, _IMAGE)
    return gradient * reciprocal(torch.linalg.vector_norm(gradient, dim=_IMAGE, keepdim=True))
