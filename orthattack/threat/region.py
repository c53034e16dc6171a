"""The allowed images around a batch: norm ball ∩ bounds ∩ orthogonality, as stored.

A `Region` deals in images, not in perturbations: what it returns are the very numbers that the model sees, so every
constraint holds for them as stored, not merely before a last rounding. What box and planes allow is one of the sets
(see `sets`), what the ball is one of the norms (see `norms`); a region joins the two and sees to the grid of the dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orthattack.arguments import uploaded
from orthattack.projection import block_size, cut, is_fine, joined, reciprocal, scope_dims
from orthattack.replay import Calls
from orthattack.threat.blocks import Blocks
from orthattack.threat.levels import Grid, snapped
from orthattack.threat.norms import BALLS, among, length, unit
from orthattack.threat.plane import Plane
from orthattack.threat.sets import Allowed, Free
from orthattack.threat.subspace import Subspace

if TYPE_CHECKING:
    from orthattack.threat import ThreatModel

# A group whose values are all below this many times the smallest normal number is not perturbed.
_DARK = 2.0**46
# A group of pixels whose share of the ball is at most this may be given up.
_LITTLE = 3e-4


class Region:
    """The allowed images around a batch; made by `ThreatModel.around`.

    Points of the region are tensors (N, C, H, W) in the images' dtype. For float32 images they satisfy, recomputed in
    float64: inside the bounds, ‖δ‖ <= eps (1 + 1e-6), and ``|cos(δ, n)|`` <= 1e-6 in every group of the scope, n being
    the image or another normal, and so with every direction. A group of the image as the normal with nothing but values
    below some 1e-24, not all zero, stays as it is: denormal numbers are too coarse for more, and to some processors
    zero. float16 and bfloat16 images keep the bounds and the ball, and orthogonality as far as their grid allows:
    docs/attacks/threat-models.md says how far. Scope "pixel" and blocks are refused there.
    """

    def __init__(self, threat: ThreatModel, images: Tensor) -> None:
        if is_fine(threat.scope) and torch.finfo(images.dtype).bits < 32:
            raise ValueError(
                f'scope="{threat.scope}" needs images of float32 or float64; got {images.dtype}, where so few pixels '
                "have next to no orthogonal neighbours (|cos| up to 0.7): pass images.float(), to a model that takes "
                'float32; precision="bfloat16" computes its gradients in bfloat16'
            )
        self.threat, self.dtype, self._ball = threat, images.dtype, BALLS[threat.norm]
        x = images.detach().to(torch.promote_types(images.dtype, torch.float32)).contiguous()
        bits = x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)
        zero = bits << 1 == 0
        if x.is_cuda or bool((zero & (bits != 0)).any()):  # asking would stop the GPU
            x = torch.where(zero, 0.0, x)  # not -0: the side of a ratio g / x is read off its sign
        if isinstance(threat.eps, Tensor):
            eps = threat.eps.to(x.device, torch.float64)
        else:
            eps = torch.full((), threat.eps, dtype=torch.float64, device=x.device)
        if eps.shape not in ((), (len(x),)):
            raise ValueError(f"eps has {eps.numel()} values for {len(x)} images: it must have one per sample or be one")
        self.eps = eps.expand(len(x)).view(-1, 1, 1, 1)
        if threat.levels is not None:
            x = snapped(x.to(self.dtype), threat.levels, threat.bounds).to(x.dtype)
            self.eps = threat.on_grid(self.eps)
        self._mask = threat.moving(x)
        self._grid = None if threat.levels is None else Grid(threat, x, self.dtype, self.eps, self._mask)
        fixed = self.eps == 0
        normals = threat.normals(x) if threat.scope is not None else x
        if threat.scope is not None and normals is x:
            dims = scope_dims(threat.scope)
            dark = cut(x, threat.scope).abs().amax(dims, keepdim=True) < _DARK * torch.finfo(x.dtype).tiny
            dark = dark & ~cut(zero, threat.scope).amin(dims, keepdim=True)
            fixed = fixed | joined(dark.expand_as(cut(x, threat.scope)), x)
        if self._mask is not None:
            fixed = fixed | ~self._mask
            normals = self.masked(normals) if threat.scope is not None else x
        self._fixed = fixed.expand_as(x) if x.is_cuda or bool(fixed.any()) else None  # asking would stop the GPU
        lower, upper = self._box(x)
        vectors = threat._vectors(x, normals) if threat._more else None
        if vectors is not None and self._mask is not None:
            vectors = masked(self._mask.unsqueeze(1), vectors)
        self._set(x, lower, upper, vectors, None if normals is x else normals.contiguous())

    def _set(
        self, images: Tensor, lower: Tensor, upper: Tensor, vectors: Tensor | None, normals: Tensor | None
    ) -> None:
        self.images, self._vectors, self._normals = images, vectors, normals
        self._calls = Calls()
        self._allowed = _allowed(self.threat, images, lower, upper, vectors, normals, self._mask)

    def _box(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the bounds allow, and the ball if it is a box."""
        x, (low, high) = images, self.threat.bounds
        if self._ball.is_box:
            lower = self._within_eps((x.double() - self.eps).to(x.dtype), x).clamp_(min=low)
            upper = self._within_eps((x.double() + self.eps).to(x.dtype), x).clamp_(max=high)
        else:
            lower, upper = torch.full_like(x, low), torch.full_like(x, high)
        if self._fixed is not None:
            lower, upper = torch.where(self._fixed, x, lower), torch.where(self._fixed, x, upper)
        return lower, upper

    def masked(self, tensor: Tensor) -> Tensor:
        """(N, C, H, W) with zeros where pixels may not move."""
        return masked(self._mask, tensor)

    def resized(self, eps: Tensor) -> Region:
        """The region with other radii, (N,), on the same images; `stored` is the old one's to answer."""
        region = copy.copy(self)
        region.eps, region._grid = self.threat.on_grid(eps.double()).view(-1, 1, 1, 1), None
        region._calls = Calls()
        if self._ball.is_box:
            region._allowed = self._allowed.boxed(*region._box(self.images))
        return region

    def nearest(self, points: Tensor, pixels: Tensor) -> Tensor:
        """The point of bounds and planes nearest to `points` in which these pixels, (N, 1, H, W) bool, move alone."""
        points = torch.where(pixels, points.to(self.images.dtype), self.images)
        return self._stored(among(self._allowed, pixels).nearest(points))

    def vertex(self, gradient: Tensor, pixels: Tensor) -> Tensor:
        """Of the same points, the one that gains the most along a gradient: without planes, a corner of the bounds."""
        alpha = torch.full_like(self.images[:, :1, :1, :1], self.threat.bounds[1] - self.threat.bounds[0])
        return self._stored(among(self._allowed, pixels).step(self.images, gradient, alpha))

    def release(self) -> None:
        """Give back the working memory of the steps, four image batches, which the next one takes again."""
        self._allowed.release()

    def select(self, index: Tensor) -> Region:
        """The region around the images at `index`, positions in the batch, only."""
        region = copy.copy(self)
        region.eps, region._grid = self.eps[index], None if self._grid is None else self._grid.select(index)
        region._fixed, region._mask, vectors, normals = (
            None if tensor is None else tensor[index]
            for tensor in (self._fixed, self._mask, self._vectors, self._normals)
        )
        region._set(self.images[index], self._allowed.lower[index], self._allowed.upper[index], vectors, normals)
        return region

    def step(
        self, points: Tensor, gradient: Tensor, alpha: Tensor | float, avoid: Tensor | None = None,
        count: Tensor | int | None = None,
    ) -> Tensor:  # fmt: skip
        """The step of size `alpha` from `points` that gains the most along `gradient` and stays in the region.

        L-infinity: the exact solution of the linear program::

            max_y ⟨g, y⟩  subject to  ‖y - x_t‖∞ <= α  and  y in the region

        L2: `alpha` along the normalised (projected) gradient, then `project`. L1: the exact solution of::

            max_y ⟨g, y⟩  subject to  ‖y - x_t‖₁ <= α,  |y - x_t| <= α/k,  bounds,  orthogonality

        with k a hundredth of the pixels or `count`, where that lets α be spent, or else without it; then `project`, for
        the ball. Where several vectors share pixels, L1 chooses these by the projected gradient and leaves
        orthogonality to `project`. Where the gradient is zero, or parallel to the image, the points stay.

        Args:
            points: (N, C, H, W), in the region.
            gradient: the same shape, finite, any scale.
            alpha: step size in pixel units and the threat model's norm; one number, or (N, 1, 1, 1).
            avoid: (N, C, H, W), one more direction that the step itself, y - x_t, is orthogonal to: exactly for
                L-infinity, before the projection for the others. Not with scope "pixel" or blocks.
            count: k, for L1 alone, at least 1; one number, or (N, 1, 1, 1).

        Returns:
            (N, C, H, W), in the region.

        Source: docs/method.md, "The best step" and "The L1 step"; the latter is that of SLIDE (Tramèr & Boneh 2019,
        arXiv:1904.13000), with the box counted in as Croce & Hein 2021 (arXiv:2103.01208) advise.
        """
        x = self.images
        size = alpha.to(x) if isinstance(alpha, Tensor) else torch.full((), alpha, dtype=x.dtype, device=x.device)
        alpha = size.expand(len(points), 1, 1, 1)
        return self._calls(self._stepped, points, gradient, alpha, avoid, count, release=self.release)

    def _stepped(
        self, points: Tensor, gradient: Tensor, alpha: Tensor, avoid: Tensor | None, count: Tensor | int | None
    ) -> Tensor:
        start, g = points.to(self.images.dtype), self.masked(gradient.to(self.images.dtype))
        if avoid is not None:
            return self._step_avoiding(start, g, alpha, self.masked(avoid.to(start)).unsqueeze(1), count)
        moved = self._ball.step(self._allowed, start, g, alpha, count)
        return self._stored(moved) if self._ball.is_box else self._projected(moved, is_near=True)

    def _step_avoiding(
        self, start: Tensor, g: Tensor, alpha: Tensor, avoid: Tensor, count: Tensor | int | None
    ) -> Tensor:
        x, lower, upper = self.images, self._allowed.lower, self._allowed.upper
        if self.threat.is_orthogonal:
            vectors = self.threat._vectors(x, self._normals) if self._vectors is None else self._vectors
            avoid = torch.cat([vectors, avoid], 1)
        through = Subspace(x, lower, upper, avoid)
        if self._ball.is_box:
            return self._stored(self._settled(through.ascend(start, g, alpha)))
        g = self._allowed.tangent(through.tangent(g))
        return self._projected(self._ball.step(Free(x, lower, upper), start, g, alpha, count))

    def project(self, points: Tensor) -> Tensor:
        """The Euclidean projection of any `points` (N, C, H, W) onto the region.

        On the box and the plane it is ``clip(p - λ x)``. The L2 ball adds a second multiplier, a factor s <= 1 on the
        perturbation: ``clip(x + s (p - x) - λ x)`` with the s at which the ball's surface is reached; the L1 ball a
        threshold μ >= 0: ``clip(x + soft(p - x - λ x, μ))``. L0: on the pixels that come nearest without the plane.

        Source: docs/method.md, "The nearest point".
        """
        return self._calls(self._projected, points, release=self.release)

    def _projected(self, points: Tensor, is_near: bool = False) -> Tensor:
        points = points.to(self.images.dtype).contiguous()
        points = points if self._mask is None else torch.where(self._mask, points, self.images)
        if is_near and self.threat.norm == "l2" and self.dtype == points.dtype:
            found = self._allowed.near_in_l2_ball(points, self.eps)
            if found is not None:
                return self._stored(found)
        points = self._ball.project(self._allowed, points, self.eps)
        in_ball = self._ball.is_box or self._ball.counts  # which rounding does not lead out of
        return self._stored(points) if in_ball else self._stored_in_ball(points)

    def stored(self, points: Tensor) -> Tensor:
        """`points` of the region as they are judged: with `levels`, the nearest ones that can be stored and keep what
        the region promises as integers, the images' own where there are none; otherwise as they are.

        Source: docs/method.md, "Exact in 8 bits".
        """
        return points if self._grid is None else self._grid.nearest(points)

    def shrunk(self, points: Tensor) -> Tensor:
        """Points of a larger region of the same kind, pulled towards the images until they are in this one.

        A good start after the ball became smaller: unlike `project` it keeps the perturbation's direction, for pulling
        leaves neither box nor plane.
        """
        if self._ball.counts:
            return self.project(points)
        points = points.to(self.images.dtype)
        size = length((points - self.images).double(), self._ball.order)
        factor = (self.eps * reciprocal(size)).clamp(max=1).to(points.dtype)
        return self.project(torch.lerp(self.images, points, factor))

    def random_start(
        self, generator: torch.Generator | Sequence[torch.Generator] | Callable[..., Tensor] | None = None
    ) -> Tensor:
        """A random point of the region.

        Uniform in the ball (for L2 and L1 within the plane; for L0 in the bounds), then projected onto the region. The
        numbers are drawn on the generator's device, so a CPU generator gives the same start on every device. With a
        generator for each sample, a sample's start does not depend on the others. Instead of a generator there may be a
        function of (shape, draws, dtype), which draws itself.
        """
        x, eps = self.images, self.eps.to(self.images.dtype)

        def draw(shape: Sequence[int], draws: Callable[..., Tensor] = torch.rand) -> Tensor:
            if callable(generator):
                return uploaded(generator(shape, draws, x.dtype), x.device)
            if generator is None or isinstance(generator, torch.Generator):
                device = x.device if generator is None else generator.device
                return uploaded(draws(tuple(shape), generator=generator, device=device, dtype=x.dtype), x.device)
            rows = [draws(tuple(shape[1:]), generator=own, device=own.device, dtype=x.dtype) for own in generator]
            return uploaded(torch.stack(rows), x.device)

        offset = self.masked(self._ball.direction(draw, x.shape))
        if self._ball.counts:
            eps = torch.full_like(eps, self.threat.bounds[1] - self.threat.bounds[0])
        elif not self._ball.is_box:  # the volume within a radius grows as its n-th power
            count = x[0].numel() if self._mask is None else self._mask.sum((1, 2, 3)).view(-1, 1, 1, 1).clamp(min=1)
            # In float64: the last bit of a power depends on how many are taken at a time, so on a sample's batch.
            share = draw((len(x), 1, 1, 1)).double() ** (1 / (count if isinstance(count, Tensor) else max(1, count)))
            radius = share.to(x.dtype)
            offset = radius * unit(self._allowed.tangent(offset), self._ball.order)
        return self.project((x + eps * offset).clamp_(*self.threat.bounds))

    def _within_eps(self, bound: Tensor, images: Tensor) -> Tensor:
        """`bound` on the grid of the dtype, moved one step towards the image where rounding has put it outside."""
        bound = bound.to(self.dtype)
        outside = (bound.double() - images.double()).abs() > self.eps
        inward = torch.nextafter(bound, images.to(self.dtype))
        return torch.where(outside, inward, bound).to(images.dtype)

    def _settled(self, points: Tensor) -> Tensor:
        """Points of the box, on the planes if the images' dtype is fine enough to aim on."""
        return points if self.dtype != points.dtype else self._allowed.settle(points)

    def _stored(self, points: Tensor) -> Tensor:
        """Points that box and planes allow, in the images' dtype, still in the box."""
        if self._fixed is not None:  # arithmetic may have made zeros of denormal numbers
            points = torch.where(self._fixed, self.images, points)
        if self.dtype != points.dtype:
            lower, upper = self._allowed.lower.to(self.dtype), self._allowed.upper.to(self.dtype)
            return points.to(self.dtype).clamp(lower, upper)
        return points

    def _stored_in_ball(self, points: Tensor) -> Tensor:
        """`points`, stored, with each perturbation scaled by what it takes to be in the ball: scaling towards x leaves
        neither box nor plane. It takes parts in 1e7, or more where eps is so tiny that the grid is coarse beside it."""
        x, eps = self.images, self.eps

        def excess(stored: Tensor) -> tuple[Tensor, Tensor]:
            size = length(stored.to(x.dtype) - x, self._ball.order)
            return size, size <= eps * (1 + 5e-7)

        stored = self._stored(points)
        size, fits = excess(stored)
        if not x.is_cuda and is_fine(self.threat.scope) and self._vectors is None and not bool(fits.all()):
            stored = torch.where(fits, stored, self._put_back(stored, size))
            size, fits = excess(stored)
        factor = (eps * reciprocal(size)).clamp(max=1)
        asks = not x.is_cuda  # which would stop the GPU: there, three times whatever is found
        for attempt in range(12 if asks else 3):
            if asks and bool(fits.all()):
                break
            scaled_down = self._stored(self._settled(torch.lerp(x, points, factor.to(x.dtype))))
            stored = torch.where(fits, stored, scaled_down)
            size, fits = excess(stored)
            # On a coarse grid a slight shrink changes nothing, so each attempt shrinks by more.
            factor = torch.where(fits, factor, factor * (eps * reciprocal(size)) ** 2**attempt)
        return stored if asks and bool(fits.all()) else torch.where(fits, stored, x.to(self.dtype))

    def _put_back(self, stored: Tensor, size: Tensor) -> Tensor:
        """The same with as many groups of pixels at the image's as bring the size, (N, 1, 1, 1), to the radius, the
        smallest first, unless one is large; then the point itself. Each group has a plane of its own."""
        x, order, scope = self.images, self._ball.order, self.threat.scope
        assert scope is not None
        parts = cut((stored.to(x.dtype) - x).double(), scope).abs().pow(order).sum(scope_dims(scope), keepdim=True)
        ordered, index = parts.flatten(1).sort(dim=1)
        beyond, radius = (t.flatten(1) ** order for t in (size, self.eps))
        goes = ordered.cumsum(1) - ordered < beyond - radius
        goes &= (ordered * goes).amax(1, keepdim=True) <= _LITTLE * radius
        put = torch.zeros_like(goes).scatter_(1, index, goes).view_as(parts).expand_as(cut(x, scope))
        return torch.where(joined(put, x), x.to(stored.dtype), stored)


def _allowed(
    threat: ThreatModel, images: Tensor, lower: Tensor, upper: Tensor, vectors: Tensor | None, normals: Tensor | None,
    mask: Tensor | None,
) -> Allowed:  # fmt: skip
    """The set for a threat model: one plane per group of pixels where that is all, or else several for each image. With
    a mask the vectors and normals have zeros where pixels may not move, which their empty ranges see to."""
    whole = mask is None
    plane: Plane | None = None
    if threat.scope is not None and block_size(threat.scope) is not None:
        return Blocks(images, lower, upper, threat.scope, normals, whole)
    if threat.scope is not None and vectors is None:
        plane = Plane(images, lower, upper, threat.scope, normals, is_whole=whole)
    elif threat.scope is None and list(threat.directions) == ["channel-constant"]:
        ones = torch.ones_like(images) if mask is None else mask.to(images.dtype)
        plane = Plane(images, lower, upper, "channel", ones, is_whole=whole)
    elif vectors is not None and vectors.shape[1] == 1:
        plane = Plane(images, lower, upper, "image", vectors[:, 0].contiguous(), is_whole=whole)
    if vectors is not None and plane is None:
        return Subspace(images, lower, upper, vectors)
    return Free(images, lower, upper) if plane is None else plane


def masked(mask: Tensor | None, tensor: Tensor) -> Tensor:
    """The tensor with zeros outside a mask."""
    return tensor if mask is None else torch.where(mask, tensor, 0)
