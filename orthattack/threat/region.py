"""What a perturbation may be: norm ball ∩ bounds ∩ orthogonality, with the step, the projection and the random start.

`ThreatModel` is the description; `ThreatModel.around(images)` is the set of allowed images around a batch, a `Region`.
A region deals in images, not in perturbations: what it returns are the very numbers that the model sees, so every
constraint holds for them as stored, not merely before a last rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from orthattack.arguments import check_bounds, check_choice, check_real, is_number, plain
from orthattack.projection import (
    Scope,
    alignment,
    orthogonalize,
    orthonormal_basis,
    reciprocal,
    remove_directions,
    scaled,
    scope_dims,
    total,
)
from orthattack.threat.plane import Plane, soften
from orthattack.threat.subspace import Subspace

__all__ = ["Direction", "Norm", "Region", "ThreatModel", "perturbation_norm"]

Norm = Literal["linf", "l2", "l1"]
Direction = Literal["constant", "channel-constant"] | Tensor | Callable[[Tensor], Tensor]
"""What else a perturbation stays orthogonal to: see `ThreatModel`."""

_IMAGE = scope_dims("image")
# The share of the pixels that one L1 step changes: SLIDE's (Tramèr & Boneh 2019).
_SPARSITY = 0.01
# A group whose values are all below this many times the smallest normal number is not perturbed.
_DARK = 2.0**46


class _Directions(tuple[Direction, ...]):
    """Directions of our own, equal to others by their values."""

    def __new__(cls, given: Sequence[Direction]) -> _Directions:
        owned = isinstance(given, _Directions)
        return super().__new__(
            cls, given if owned else (d.detach().clone() if isinstance(d, Tensor) else d for d in given)
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple) and len(self) == len(other) and all(map(_is_same, self, other))

    def __hash__(self) -> int:
        return hash(tuple(None if isinstance(direction, Tensor) else direction for direction in self))


def _is_same(a: Direction, b: Direction) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
    return a is b or (a.device == b.device and a.dtype == b.dtype and torch.equal(a, b))


@dataclass(frozen=True)
class ThreatModel:
    """The set of perturbations an attack may use::

        { δ : ‖δ‖ <= eps,  low <= x + δ <= high,  ⟨δ, x⟩ = 0,  ⟨δ, b_j⟩ = 0 for each direction b_j }

    Args:
        norm: "linf", "l2" or "l1".
        eps: radius in pixel units, e.g. ``8 / 255``, at least 0; one number, or a tensor (N,) with one per sample.
        bounds: the smallest and largest pixel value.
        scope: which vectors must stay orthogonal to the image's own (see `orthattack.projection`), or None for no
            orthogonality to the image.
        directions: what else the perturbation stays orthogonal to: "constant", all ones, so that the mean brightness
            stays; "channel-constant", each channel's ones, so that the mean colour stays; a tensor (C, H, W), or
            (K, C, H, W) for several, the same for every image; or a function of the images (N, C, H, W) that returns
            (N, C, H, W) or (N, K, C, H, W). Not with ``scope="pixel"``.

    Raises:
        ValueError: an option outside these.
    """

    norm: Norm
    eps: float | Tensor
    bounds: tuple[float, float] = (0.0, 1.0)
    scope: Scope | None = "image"
    directions: Sequence[Direction] = ()

    def __post_init__(self) -> None:
        if is_number(self.norm):
            raise ValueError(f"norm must be a name; got {self.norm!r}: pass a radius as eps={self.norm!r}")
        check_choice("norm", self.norm, get_args(Norm))
        object.__setattr__(self, "eps", _radius(self.eps))
        object.__setattr__(self, "bounds", check_bounds(self.bounds))
        if self.scope is not None:
            scope_dims(self.scope)
        if not isinstance(self.directions, Sequence) or isinstance(self.directions, str):
            raise ValueError("directions must be a list, such as directions=['constant']")
        for direction in self.directions:
            known = isinstance(direction, Tensor) or callable(direction)
            if not known and not (isinstance(direction, str) and direction in ("constant", "channel-constant")):
                raise ValueError(
                    "each of directions must be 'constant', 'channel-constant', a tensor or a function of the images; "
                    f"got {direction!r}"
                )
        object.__setattr__(self, "directions", _Directions(self.directions))
        if self.directions and self.scope == "pixel":
            raise ValueError('directions cannot be combined with scope="pixel", which has a constraint for every pixel')

    @property
    def is_orthogonal(self) -> bool:
        """Whether anything but ball and bounds binds."""
        return self.scope is not None or len(self.directions) > 0

    def diameter(self, shape: Sequence[int]) -> float:
        """The norm of the largest difference of two images of `shape` (C, H, W) in the bounds."""
        pixels = math.prod(shape)
        return float(self.bounds[1] - self.bounds[0]) * {"linf": 1, "l2": math.sqrt(pixels), "l1": pixels}[self.norm]

    def allows_everything(self, shape: Sequence[int]) -> bool:
        """Whether a radius, of one sample at least, is so large that the ball holds every image of `shape` (C, H, W)
        in the bounds: the norm then limits nothing."""
        eps = self.eps
        largest = eps if not isinstance(eps, Tensor) else float(eps.max()) if len(eps) > 0 else 0.0
        return largest >= self.diameter(shape) * (1 - 1e-6)

    def around(self, images: Tensor) -> Region:
        """The allowed images around each of `images`, (N, C, H, W), floating point, inside the bounds."""
        return Region(self, images)

    def tangent(self, gradient: Tensor, images: Tensor) -> Tensor:
        """`gradient` without its components along `images` and the directions, (N, C, H, W): the textbook projection.

        Source: docs/method.md, "Projecting the gradient".
        """
        if not self.directions:
            return gradient if self.scope is None else orthogonalize(gradient, images, self.scope)
        return remove_directions(gradient, orthonormal_basis(self._vectors(images).to(gradient.dtype)))

    def cosine(self, delta: Tensor, images: Tensor) -> Tensor:
        """(N,) the largest ``|cos|`` of a perturbation with what it should be orthogonal to, accumulated in float64.

        Without any constraint, that with the image.
        """
        x = images.double()
        largest = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if self.scope is not None or not self.directions:
            cosine = alignment(delta.double(), x, self.scope or "image").abs()
            largest = cosine if cosine.ndim == 1 else cosine.flatten(1).amax(1)
        if self.directions:
            for vector in self._vectors(x).unbind(1):
                largest = torch.maximum(largest, alignment(delta.double(), vector).abs())
        return largest

    def _vectors(self, images: Tensor) -> Tensor:
        """All directions, those of the scope included, (N, K, C, H, W)."""
        eye = torch.eye(images.shape[1], dtype=images.dtype, device=images.device).view(1, *[images.shape[1]] * 2, 1, 1)
        parts = []
        if self.scope is not None:
            parts.append(images.unsqueeze(1) if self.scope == "image" else images.unsqueeze(1) * eye)
        for direction in self.directions:
            if isinstance(direction, str):
                ones = torch.ones_like(images).unsqueeze(1)
                parts.append(ones if direction == "constant" else ones * eye)
                continue
            # A function may write into what it is given, and into what it has returned.
            given = direction if isinstance(direction, Tensor) else direction(images.clone())
            if not isinstance(given, Tensor):
                raise ValueError(f"a direction must return a tensor; got {type(given).__name__}")
            given = given.detach().clone()
            vector = given.to(images)
            if isinstance(direction, Tensor) and vector.ndim < 5:
                vector = vector.unsqueeze(0) if vector.ndim == 4 else vector.unsqueeze(0).unsqueeze(0)
            vector = vector.unsqueeze(1) if vector.ndim == 4 else vector
            if vector.ndim != 5 or vector.shape[2:] != images.shape[1:] or vector.shape[0] not in (1, len(images)):
                raise ValueError(
                    f"a direction must have the images' shape {tuple(images.shape[1:])}, one or several for all "
                    f"images, or as a function (N, K, C, H, W); got {tuple(given.shape)}"
                )
            if not bool(vector.isfinite().all()):
                raise ValueError("a direction must be finite; found NaN or infinity")
            parts.append(vector.expand(len(images), *vector.shape[1:]))
        return torch.cat(parts, dim=1)


def _radius(eps: Any) -> float | Tensor:
    """One radius as a number, one per sample as a tensor of our own; ValueError for anything else."""
    if isinstance(eps, list | tuple):
        raise ValueError(
            f"eps must be a number, or a tensor with one per sample; got a {type(eps).__name__}: use torch.tensor(eps) "
            "for one per sample, or an attack's sweep(images, labels, eps) for several radii"
        )
    eps, what = plain(eps), "a finite number >= 0, in pixel units such as 8/255"
    if not isinstance(eps, Tensor) and getattr(eps, "ndim", 0) > 0 and getattr(eps.dtype, "kind", "") in "iuf":
        eps = torch.as_tensor(eps.copy())  # of NumPy
    if not isinstance(eps, Tensor):
        check_real("eps", eps, what, low=0)
        number: float = eps
        return number
    if eps.ndim > 1:
        raise ValueError(f"eps must be a number or one per sample, (N,); got shape {tuple(eps.shape)}")
    is_real = not eps.dtype.is_complex and eps.dtype != torch.bool
    if not is_real or not bool((eps.isfinite() & (eps >= 0)).all()):
        raise ValueError(f"eps must be {what}; got {eps!r}")
    return eps.detach().clone()


class Region:
    """The allowed images around a batch; made by `ThreatModel.around`.

    Points of the region are tensors (N, C, H, W) in the images' dtype. For float32 images they satisfy, recomputed in
    float64: inside the bounds, ‖δ‖ <= eps (1 + 1e-6), and ``|cos(δ, x)|`` <= 1e-6 in every group of the scope, and so
    with every direction. A group of nothing but values below some 1e-24, not all zero, stays as it is: denormal numbers
    are too coarse for more, and to some processors zero. float16 and bfloat16 images keep the bounds and the ball, and
    orthogonality as far as their grid allows: docs/api/threat-models.md says how far. Scope "pixel" is refused there.
    """

    def __init__(self, threat: ThreatModel, images: Tensor) -> None:
        if threat.scope == "pixel" and torch.finfo(images.dtype).bits < 32:
            raise ValueError(
                f'scope="pixel" needs images of float32 or float64; got {images.dtype}, where a colour has next to no '
                "orthogonal neighbours (|cos| up to 0.7): pass images.float(), to a model that takes float32; "
                'precision="bfloat16" computes its gradients in bfloat16'
            )
        self.threat, self.dtype = threat, images.dtype
        low, high = threat.bounds
        x = images.detach().to(torch.promote_types(images.dtype, torch.float32)).contiguous()
        bits = x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)
        zero = bits << 1 == 0
        if bool((zero & (bits != 0)).any()):
            x = torch.where(zero, 0.0, x)  # not -0: the side of a ratio g / x is read off its sign
        eps = torch.as_tensor(threat.eps, dtype=torch.float64, device=x.device)
        if eps.shape not in ((), (len(x),)):
            raise ValueError(
                f"eps has {eps.numel()} values for {len(x)} images: it must have one per sample, or be one"
            )
        self.eps = eps.expand(len(x)).view(-1, 1, 1, 1)
        fixed = self.eps == 0
        if threat.scope is not None:
            dims = scope_dims(threat.scope)
            dark = x.abs().amax(dims, keepdim=True) < _DARK * torch.finfo(x.dtype).tiny
            fixed = fixed | (dark & ~zero.amin(dims, keepdim=True))
        self._fixed = fixed.expand_as(x) if bool(fixed.any()) else None
        if threat.norm == "linf":
            lower = self._within_eps((x.double() - self.eps).to(x.dtype), x).clamp_(min=low)
            upper = self._within_eps((x.double() + self.eps).to(x.dtype), x).clamp_(max=high)
        else:
            lower, upper = torch.full_like(x, low), torch.full_like(x, high)
        if self._fixed is not None:
            lower, upper = torch.where(self._fixed, x, lower), torch.where(self._fixed, x, upper)
        self._set(x, lower, upper, threat._vectors(x) if threat.directions else None)

    def _set(self, images: Tensor, lower: Tensor, upper: Tensor, vectors: Tensor | None) -> None:
        self.images, self._lower, self._upper, self._vectors = images, lower, upper, vectors
        scope = self.threat.scope
        self._plane: Plane | Subspace | None = None
        if vectors is None and self.threat.norm == "l1" and scope != "pixel":
            # Newton's method finds the ball's multiplier along with the planes', so it serves without planes too.
            vectors = torch.zeros_like(images).unsqueeze(1) if scope is None else self.threat._vectors(images)
        if vectors is not None:
            self._plane = Subspace(images, lower, upper, vectors)
        elif scope is not None:
            self._plane = Plane(images, lower, upper, scope)
        # What solves for an L1 step, where each group of pixels has one plane.
        self._l1_plane: Plane | None = None
        if self.threat.norm == "l1" and scope is not None and not self.threat.directions:
            self._l1_plane = self._plane if isinstance(self._plane, Plane) else Plane(images, lower, upper, scope)

    def release(self) -> None:
        """Give back the working memory of the steps, four image batches, which the next one takes again."""
        for plane in (self._plane, self._l1_plane):
            if isinstance(plane, Plane):
                plane.release()

    def select(self, index: Tensor) -> Region:
        """The region around the images at `index`, positions in the batch, only."""
        region = object.__new__(Region)
        region.threat, region.dtype, region.eps = self.threat, self.dtype, self.eps[index]
        region._fixed = None if self._fixed is None else self._fixed[index]
        vectors = None if self._vectors is None else self._vectors[index]
        region._set(self.images[index], self._lower[index], self._upper[index], vectors)
        return region

    def step(self, points: Tensor, gradient: Tensor, alpha: Tensor | float, avoid: Tensor | None = None) -> Tensor:
        """The step of size `alpha` from `points` that gains the most along `gradient` and stays in the region.

        L-infinity: the exact solution of the linear program::

            max_y ⟨g, y⟩  subject to  ‖y - x_t‖∞ <= α  and  y in the region

        which is ``clip(x_t + alpha * sign(g))`` without orthogonality and ``clip(x_t + alpha * sign(g - λ x))`` with
        it. L2: `alpha` along the normalised (projected) gradient, then `project`. L1: the exact solution of::

            max_y ⟨g, y⟩  subject to  ‖y - x_t‖₁ <= α,  |y - x_t| <= α/k,  bounds,  orthogonality

        with k a hundredth of the pixels, where that lets α be spent, or else without it; then `project`, for the ball.
        With `directions`, L1 chooses pixels by the projected gradient and leaves orthogonality to `project`. Where the
        gradient is zero, or parallel to the image, the points stay.

        Args:
            points: (N, C, H, W), in the region.
            gradient: the same shape, finite, any scale.
            alpha: step size in pixel units and the threat model's norm; one number, or (N, 1, 1, 1).
            avoid: (N, C, H, W), one more direction that the step itself, y - x_t, is orthogonal to: exactly for
                L-infinity, before the projection for the others. Not with scope "pixel".

        Returns:
            (N, C, H, W), in the region.

        Source: docs/method.md, "The best step" and "The L1 step"; the latter is that of SLIDE (Tramèr & Boneh 2019,
        arXiv:1904.13000), with the box counted in as Croce & Hein 2021 (arXiv:2103.01208) advise.
        """
        start, g = points.to(self.images.dtype), gradient.to(self.images.dtype)
        alpha = torch.as_tensor(alpha, dtype=start.dtype, device=start.device).expand(len(start), 1, 1, 1)
        if avoid is not None:
            others = [avoid.to(start).unsqueeze(1)]
            if self.threat.is_orthogonal:
                others.insert(0, self.threat._vectors(self.images) if self._vectors is None else self._vectors)
            through = Subspace(self.images, self._lower, self._upper, torch.cat(others, 1))
            if self.threat.norm == "linf":
                return self._store(through.ascend(start, g, alpha))
            g = through.tangent(g)
        if self.threat.norm == "l2" and avoid is None and isinstance(self._plane, Plane):
            return self.project(torch.addcmul(start, self._plane.unit_tangent(g.contiguous()), alpha))
        if self.threat.norm == "l1":
            count = max(1, round(_SPARSITY * start[0].numel()))
            if self._l1_plane is not None and avoid is None:
                return self.project(self._l1_plane.sparse_step(start.contiguous(), g.contiguous(), alpha, count))
        if self.threat.norm != "linf":
            g = g if self._plane is None else self._plane.tangent(g)
            if self.threat.norm == "l1":
                return self.project(start + _sparse(g, start, self._lower, self._upper, alpha, count))
            return self.project(torch.addcmul(start, _unit(g), alpha))
        if self._plane is not None:
            return self._rounded(self._plane.step(start.contiguous(), g.contiguous(), alpha))
        signs = torch.sign(g)
        return self._rounded(torch.addcmul(start, signs, alpha, out=signs).clamp_(self._lower, self._upper))

    def project(self, points: Tensor) -> Tensor:
        """The Euclidean projection of any `points` (N, C, H, W) onto the region.

        On the box and the plane it is ``clip(p - λ x)``. The L2 ball adds a second multiplier, a factor s <= 1 on the
        perturbation: ``clip(x + s (p - x) - λ x)`` with the s at which the ball's surface is reached; the L1 ball a
        threshold μ >= 0: ``clip(x + soft(p - x - λ x, μ))``.

        Source: docs/method.md, "The nearest point".
        """
        points = points.to(self.images.dtype).contiguous()
        if self.threat.norm == "l1" and isinstance(self._plane, Subspace):
            return self._store_in_ball(self._plane.nearest_in_l1_ball(points, self.eps))
        if self.threat.norm == "linf":
            return self._rounded(self._nearest(points))
        if self.threat.norm == "l1":
            return self._store_in_ball(self._in_l1_ball(points, self._nearest(points)))
        if isinstance(self._plane, Plane) and not self._plane.is_small:
            inside, found = self._plane.nearest_in_ball(points, self.eps)
            if points.is_cuda or bool(found.all()):
                return self._store_in_ball(inside, is_settled=True)
            return self._store_in_ball(torch.where(found, inside, self._in_ball(points, self._nearest(points))))
        return self._store_in_ball(self._in_ball(points, self._nearest(points)))

    def shrunk(self, points: Tensor) -> Tensor:
        """Points of a larger region of the same kind, pulled towards the images until they are in this one.

        A good start after the ball became smaller: unlike `project` it keeps the perturbation's direction, for pulling
        leaves neither box nor plane.
        """
        points = points.to(self.images.dtype)
        length = perturbation_norm((points - self.images).double(), self.threat.norm).view(-1, 1, 1, 1)
        factor = (self.eps * reciprocal(length)).clamp(max=1).to(points.dtype)
        return self.project(torch.lerp(self.images, points, factor))

    def random_start(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """A random point of the region.

        Uniform in the ball (for L2 and L1 within the plane), then projected onto the region. The numbers are drawn on
        the generator's device, so a CPU generator gives the same start on every device. With a generator for each
        sample, a sample's start does not depend on the others.
        """
        x, eps = self.images, self.eps.to(self.images.dtype)

        def draw(shape: Sequence[int], draws: Callable[..., Tensor] = torch.rand) -> Tensor:
            if generator is None or isinstance(generator, torch.Generator):
                device = x.device if generator is None else generator.device
                return draws(tuple(shape), generator=generator, device=device, dtype=x.dtype).to(x.device)
            rows = [draws(tuple(shape[1:]), generator=own, device=own.device, dtype=x.dtype) for own in generator]
            return torch.stack(rows).to(x.device)

        if self.threat.norm == "linf":
            offset = 2 * draw(x.shape) - 1
        else:
            # A radius^n is uniform where the volume within a radius grows as its n-th power.
            if self.threat.norm == "l2":
                direction = draw(x.shape, torch.randn)
            else:  # uniform on the sphere of L1: exponential sizes, random signs
                direction = 2 * draw(x.shape) - 1
                direction = direction.sign() * -torch.log1p(-direction.abs())
            radius = draw((len(x), 1, 1, 1)) ** (1 / max(1, x[0].numel()))
            direction = direction if self._plane is None else self._plane.tangent(direction)
            offset = radius * (_unit(direction) if self.threat.norm == "l2" else _unit(direction, 1))
        return self.project((x + eps * offset).clamp_(*self.threat.bounds))

    def _within_eps(self, bound: Tensor, images: Tensor) -> Tensor:
        """`bound` on the grid of the dtype, moved one step towards the image where rounding has put it outside."""
        bound = bound.to(self.dtype)
        outside = (bound.double() - images.double()).abs() > self.eps
        inward = torch.nextafter(bound, images.to(self.dtype))
        return torch.where(outside, inward, bound).to(images.dtype)

    def _store(self, points: Tensor) -> Tensor:
        """`points` in the images' dtype, still in the box and, if that dtype is fine enough, still on the plane."""
        # Per group if it can be: a channel may have so little of the perturbation that the whole says nothing of it.
        plane = self._plane if self._l1_plane is None else self._l1_plane
        points = points if plane is None or self.dtype != points.dtype else plane.settle(points)
        return self._rounded(points)

    def _rounded(self, points: Tensor) -> Tensor:
        """Points that box and plane hold, in the images' dtype."""
        if self._fixed is not None:  # arithmetic may have made zeros of denormal numbers
            points = torch.where(self._fixed, self.images, points)
        if self.dtype != points.dtype:  # half precision: a grid too coarse to aim on
            return points.to(self.dtype).clamp(self._lower.to(self.dtype), self._upper.to(self.dtype))
        return points

    def _nearest(self, points: Tensor, shrink: Tensor | None = None) -> Tensor:
        """The projection onto box and plane, with a soft threshold on the perturbation if asked."""
        if self._plane is not None:
            return self._plane.nearest(points, shrink)
        points = points if shrink is None else soften(points.clone(), self.images, shrink)
        return points.clamp(self._lower, self._upper)

    def _in_ball(self, points: Tensor, nearest: Tensor) -> Tensor:
        """The projection of `points` onto the L2 ball too, given that onto box and plane; safe to store."""
        x, eps = self.images, self.eps
        delta = points - x
        length = _length(nearest - x, 2)
        s, s_before, before = torch.ones_like(length), torch.zeros_like(length), torch.zeros_like(length)
        for _ in range(20):
            off = (length > eps * (1 + 1e-6)) | ((s < 1) & (length < eps * (1 - 1e-6)))
            if not bool(off.any()):
                break
            # The length grows with s, in proportion but for what is clipped, so a secant converges in a step or two.
            slope = (length - before) / torch.where(s != s_before, s - s_before, 1)
            s_next = torch.where(off, (s + (eps - length) * reciprocal(slope)).clamp(0, 1), s)
            s, s_before, before = s_next, s, length
            # What was right stays bit for bit, so that a sample does not depend on its batch.
            nearest = torch.where(off, self._nearest(x + s.to(x.dtype) * delta), nearest)
            length = _length(nearest - x, 2)
        return nearest

    def _in_l1_ball(self, points: Tensor, nearest: Tensor) -> Tensor:
        """The projection of `points` onto the L1 ball too, given that onto box and plane; safe to store.

        ‖y(μ) - x‖₁ falls as the threshold μ grows, by 1 for each pixel that moves with μ, which is neither at x nor at
        a bound. So Newton's method, kept inside a bracket, finds where it is eps.
        """
        x, eps = self.images, self.eps
        length = _length(nearest - x, 1)
        low, high = torch.zeros_like(length), (points - x).abs().amax(_IMAGE, keepdim=True).double()
        f_low, slope = length - eps, self._moving(nearest)
        done = length <= eps * (1 + 1e-7)
        inside = torch.where(done, nearest, x)
        for attempt in range(60):
            if bool(done.all()):
                break
            newton = low + f_low * reciprocal(slope)
            usable = (newton > low) & (newton < high) & (attempt % 8 < 7)
            mu = torch.where(usable, newton, (low + high) / 2)
            tried = self._nearest(points, mu.to(x.dtype))
            f = _length(tried - x, 1) - eps
            over, under = (f > 0) & ~done, (f <= 0) & ~done
            near = ~done & (f.abs() <= 1e-6 * eps)  # a little outside is as good: storing scales that back
            inside = torch.where(under | near, tried, inside)
            low, f_low = torch.where(over, mu, low), torch.where(over, f, f_low)
            slope = torch.where(over, self._moving(tried), slope)
            high = torch.where(under, mu, high)
            done = done | near | (high - low <= 1e-9 * high)
        return inside

    def _moving(self, points: Tensor) -> Tensor:
        """How many pixels are strictly between x and the bounds, (N, 1, 1, 1)."""
        free = (points != self.images) & (points > self._lower) & (points < self._upper)
        return free.sum(_IMAGE, keepdim=True).double()

    def _store_in_ball(self, points: Tensor, is_settled: bool = False) -> Tensor:
        """`points`, stored, with each perturbation scaled by what it takes to be in the ball: scaling towards x leaves
        neither box nor plane. It takes parts in 1e7, or more where eps is so tiny that the grid is coarse beside it."""
        x, eps, order = self.images, self.eps, 2 if self.threat.norm == "l2" else 1

        def excess(stored: Tensor) -> tuple[Tensor, Tensor]:
            length = _length(stored.to(x.dtype) - x, order)
            return length, length <= eps * (1 + 5e-7)

        stored = self._rounded(points) if is_settled else self._store(points)
        length, fits = excess(stored)
        factor = (eps * reciprocal(length)).clamp(max=1)
        asks = not x.is_cuda  # which would stop the GPU: there, three times whatever is found
        for attempt in range(12 if asks else 3):
            if asks and bool(fits.all()):
                break
            scaled_down = self._store(torch.lerp(x, points, factor.to(x.dtype)))
            stored = torch.where(fits, stored, scaled_down)
            length, fits = excess(stored)
            # On a coarse grid a slight shrink changes nothing, so each attempt shrinks by more.
            factor = torch.where(fits, factor, factor * (eps * reciprocal(length)) ** 2**attempt)
        return stored if asks and bool(fits.all()) else torch.where(fits, stored, x.to(self.dtype))


def _length(delta: Tensor, order: float) -> Tensor:
    """Norms in float64, (N, 1, 1, 1); rows first, as `orthattack.projection.total` does."""
    rows = torch.linalg.vector_norm(delta, order, dim=-1, keepdim=True)
    length: Tensor = torch.linalg.vector_norm(rows, order, dim=_IMAGE, keepdim=True, dtype=torch.float64)
    return length


def perturbation_norm(delta: Tensor, norm: Norm) -> Tensor:
    """The norm of each perturbation.

    Args:
        delta: (N, C, H, W).
        norm: "linf", "l2" or "l1".

    Returns:
        (N,), the dtype of `delta`.
    """
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    length: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(delta, order, dim=-1), order, dim=(-2, -1))
    return length


def _unit(gradient: Tensor, order: float = 2) -> Tensor:
    """The gradient at length 1, or 0 if it is zero."""
    gradient, _ = scaled(gradient, _IMAGE)
    return gradient * reciprocal(torch.linalg.vector_norm(gradient, order, dim=_IMAGE, keepdim=True))


def _sparse(gradient: Tensor, points: Tensor, lower: Tensor, upper: Tensor, alpha: Tensor, count: int) -> Tensor:
    """The best L1 step that spreads over at least `count` pixels::

        max_s ⟨g, s⟩  subject to  ‖s‖₁ <= α,  |s_i| <= α / count,  lower <= points + s <= upper

    The pixels with the largest gradient take what they may, one after the other, until α is spent; those that tie for
    the last share what is left. Where the second constraint keeps α from being spent, the rest is spent without it.
    """
    gradient, _ = scaled(gradient, _IMAGE)
    room = torch.where(gradient > 0, upper - points, points - lower) * (gradient != 0)
    size, limit = gradient.abs() * (room > 0), torch.minimum(room, alpha / count)
    spent = _filled(size, limit, alpha)
    left = alpha - total(spent, _IMAGE)
    if not points.is_cuda and bool((left <= 1e-6 * alpha).all()):
        return spent.copysign_(gradient)
    return (spent + _filled(size, room - spent, left)).copysign_(gradient)


def _filled(size: Tensor, limit: Tensor, amount: Tensor) -> Tensor:
    """Amounts of at most `limit`, the pixels of the largest `size` first, that add up to `amount` or all they may."""
    flat, limits, amount = size.flatten(1), limit.flatten(1), amount.flatten(1).double()
    count = flat.shape[1]
    few = count if size.is_cuda else min(count, 4 * max(1, round(_SPARSITY * count)))
    for number in (few, count):
        top = flat.topk(number, dim=1)
        reached = limits.gather(1, top.indices).double().cumsum(1) >= amount
        if number == count or bool(reached[:, -1].all()):
            break
    # The size of the pixel at which the amount is reached; 0 where it never is.
    last = torch.where(reached.any(1), top.values.gather(1, reached.long().argmax(1, keepdim=True)).squeeze(1), 0)
    last = last.view(-1, 1, 1, 1)
    full = limit * (size > last)
    tied = limit * ((size == last) & (size > 0))
    rest = (amount.view(-1, 1, 1, 1).to(size.dtype) - total(full, _IMAGE)).clamp(min=0)
    return full + tied * (rest * reciprocal(total(tied, _IMAGE))).clamp(max=1)
