"""The plane ⟨y - x, x⟩ = 0 inside a box: the best step on it, the nearest point of it, and staying on it when stored.

Each group of pixels that `scope` names (see `orthattack.projection`) has a plane of its own. Each problem
comes down to one multiplier λ per group (docs/method.md, "One multiplier"): `rootfind` searches for it in the steps,
and in the projections where Newton's method fails.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, cached_property, partial

import torch
from torch import Tensor

from orthattack.projection import IMAGE, Scope, dot, orthogonalize, reciprocal, scaled, scope_dims, total
from orthattack.threat import few
from orthattack.threat.norms import by_secant, by_threshold, in_l1_ball, sparsity
from orthattack.threat.rootfind import Bracket, by_sorting, ends_of, search, sorted_few, try_all
from orthattack.threat.rounding import Box, settled_rows
from orthattack.threat.sets import completed, soften
from orthattack.threat.sparse import best_sparse, by_group, room

# A pixel's colour has so few breakpoints that trying them all beats a search; so few planes fit a kernel that steps in
# all of an image's at once.
_FEW = 4
# In a group of fewer pixels round-off does not average out.
_MANY = 512
# A dual gap this small, relative to the objective's scale, is below float32's round-off of the objective itself.
_GAP = 1e-8
# How often Newton's method is tried before the search that cannot fail.
_NEWTON = 8


@cache
def fused_step(device: torch.device) -> Callable[..., Tensor] | None:
    """`fused.best_step` if Triton is there and works on that GPU, for which it needs a C compiler and a folder for its
    kernels."""
    try:
        from orthattack.threat.fused import best_step

        rows = [torch.zeros(1, 64, device=device) for _ in range(8)]
        best_step(*rows, alpha=rows[0][:, 0])
    except Exception:  # whatever a compiler may raise
        return None
    return best_step


@cache
def fused_projection(device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., Tensor]] | None:
    """`fused_l2.unit_tangent` and `nearest_in_ball`, likewise."""
    try:
        from orthattack.threat.fused_l2 import nearest_in_ball, unit_tangent

        rows = [torch.zeros(1, 64, device=device) for _ in range(5)]
        unit_tangent(*rows[:3], samples=1)
        nearest_in_ball(*rows, radius=torch.ones(1, dtype=torch.float64, device=device))
    except Exception:  # whatever a compiler may raise
        return None
    return unit_tangent, nearest_in_ball


class Plane:
    """The points y of a box with ⟨y - x, x⟩ = 0 in every group of pixels, a set of `sets.Allowed`.

    Args:
        images: x, (N, C, H, W), float32 or float64.
        lower, upper: the box, which holds x.
        scope: which pixels share a plane.
        normal: what the planes are orthogonal to, the images' shape; x by default, as everything here is written.
        slack: how many times what round-off leaves of a sum of many pixels ends Newton's method.
        is_whole: whether all pixels may move; otherwise there may be none that does among those looked at first.

    `is_small` says that a group has only a few pixels, for which all is tried that might be the solution. A plane keeps
    four image batches of working memory until its `release`, so no two threads may use it at once.
    """

    def __init__(
        self,
        images: Tensor,
        lower: Tensor,
        upper: Tensor,
        scope: Scope,
        normal: Tensor | None = None,
        slack: float = 1.0,
        is_whole: bool = True,
    ) -> None:
        self.images, self.lower, self.upper, self.scope, self._slack = images, lower, upper, scope, slack
        self.dims = scope_dims(scope)
        # In a range where its square neither overflows nor vanishes.
        scaled_normal, exponent = scaled(images if normal is None else normal, self.dims)
        scaled_normal.add_(0.0)  # not -0: the side of a ratio g / n is read off its sign
        self._width2 = total((upper - lower).square_(), self.dims)
        # Beside perturbations as wide as this, rounding is nothing, and nothing has to be repaired pixel by pixel.
        wide = 1e6 * torch.finfo(images.dtype).eps * images.abs().amax(self.dims, keepdim=True)
        found = (exponent.abs() > 16).any(), (scaled_normal < 0).any(), (self._width2 > wide**2).all()
        is_extreme, self._has_negative, is_wide = torch.stack(found).tolist()  # one question to a GPU
        self.normal = images if normal is None and not is_extreme else scaled_normal
        self._settling = images if normal is None else scaled_normal
        self._normal2 = dot(self.normal, self.normal, self.dims)
        self._grid = self._normal2 if normal is None else dot(images.abs(), self.normal.abs(), self.dims)
        self._normal1 = total(self.normal.abs(), self.dims)
        self.is_small = images.numel() <= _FEW * self._normal2.numel()
        self._is_coarse = is_wide and is_whole and images.numel() >= _MANY * self._normal2.numel()

    def boxed(self, lower: Tensor, upper: Tensor) -> Plane:
        """The same planes in another box, which holds x; made without a question to a GPU."""
        plane = copy.copy(self)
        plane.release()
        plane.lower, plane.upper = lower, upper
        plane._width2 = total((upper - lower).square_(), self.dims)
        plane._is_coarse = False  # not that it is known: only a GPU makes use of it, which asking would stop
        return plane

    @cached_property
    def _scratch(self) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(self.images) for _ in range(4))

    def release(self) -> None:
        self.__dict__.pop("_scratch", None)

    @property
    def _is_fusible(self) -> bool:
        """Whether the fused kernels are for these groups: float32, each in one piece of memory, and many pixels."""
        is_plain = self.normal is self._settling and self.images.dtype == torch.float32
        return self._is_coarse and is_plain and self.dims != (-3,) and len(self.images) > 0

    def _fused_projection(self) -> tuple[Callable[..., Tensor], Callable[..., Tensor]] | None:
        is_fit = self.images.is_cuda and self._is_fusible and self._normal2[0].numel() <= _FEW
        return fused_projection(self.images.device) if is_fit else None

    def _rows(self, *tensors: Tensor) -> list[Tensor]:
        return [t.contiguous().view(self._normal2.numel(), -1) for t in tensors]

    def tangent(self, gradient: Tensor) -> Tensor:
        return orthogonalize(gradient, self.normal, self.scope)

    def step(self, start: Tensor, gradient: Tensor, alpha: Tensor | float) -> Tensor:
        """Solve the linear program, exactly and without sorting.

        Its solution is the usual step along a shifted gradient, y(λ) = clip(s + α sign(g - λx)), at the λ for which
        the plane holds; pixels with g = λx at that λ may take any value between and settle the equation. The duality
        gap is below 1e-8 of α‖g‖₁ plus round-off. A group whose gradient is zero, or parallel to the image, stays.

        Source: docs/method.md, "The best step".
        """
        dims, normal = self.dims, self.normal
        start, gradient = start.contiguous(), gradient.contiguous()
        ratio, bottom, weight, scratch = self._scratch
        alpha = torch.as_tensor(alpha, dtype=start.dtype, device=start.device)
        if start.is_cuda and self._is_fusible and (best_step := fused_step(start.device)) is not None:
            rows = self._rows(start, gradient, self.images, self.lower, self.upper, normal, ratio, weight)
            sizes = alpha.expand_as(self._normal2).flatten().contiguous()
            return best_step(*rows, alpha=sizes).view_as(start)
        # The optimum is the same for g and g - cx; projected, λ is near 0 and a parallel gradient is 0, not round-off.
        g, size = self._projected(gradient, dims)
        # Without a gradient every step is as good, so the search stops at once, and what it found is not taken.
        moves = size > 0
        # y_i is at one end of its range while g_i / x_i > λ, at the other while it is less. With x_i = 0 there is no
        # ratio, or an infinite one, and no influence on f.
        torch.div(g, normal, out=ratio)
        self._range(start, alpha, bottom, weight)
        least = dot(torch.sub(bottom, self.images, out=scratch), normal, dims, scratch)
        weight.sub_(bottom).mul_(normal)
        ends = (least + total(weight, dims)).clamp(min=0), least.clamp(max=0)
        noise = alpha * self._normal1 * (torch.finfo(start.dtype).eps / 4)

        def residual(multiplier: Tensor) -> Tensor:
            f = least + dot(torch.gt(ratio, multiplier, out=scratch), weight, dims, scratch)
            return f * (f.abs() > noise)

        scale = torch.where(moves, size, self._normal1) * reciprocal(self._normal1)
        scale = torch.where(scale > 0, scale, 1)
        if self.is_small:
            jumps = sorted_few(by_group(ratio.nan_to_num(0), dims))
            bracket = try_all(residual, scale, jumps[1:] / 2 + jumps[:-1] / 2)
        elif ratio.is_cuda:
            bracket = by_sorting(residual, ratio, weight, least, dims)
        else:
            bracket = search(residual, scale, torch.where(moves, _GAP * alpha * size, torch.inf), ends, None)

        def mix(share: Tensor, out: Tensor) -> Tensor:
            torch.lerp(torch.gt(ratio, bracket[0], out=scratch), torch.gt(ratio, bracket[2], out=out), share, out=out)
            self._range(start, alpha, bottom, weight)
            return torch.lerp(bottom, weight, out, out=out)

        y = self._mixture(mix, bracket, start)
        return y if not y.is_cuda and bool(moves.all()) else torch.where(moves, y, start)

    def sparse_step(self, start: Tensor, gradient: Tensor, alpha: Tensor, count: Tensor | int | None = None) -> Tensor:
        """See `sets.Allowed`; with a duality gap below 1e-4 of the optimum as a rule.

        A sample whose gradient is zero, or parallel to the image in every group, stays at s.

        Source: docs/method.md, "The L1 step".
        """
        count, start = sparsity(start) if count is None else count, start.contiguous()
        g, size = self._projected(gradient.contiguous(), IMAGE)
        g, moves = g.clone(), size.sum(IMAGE, keepdim=True) > 0
        within = start, self.lower, self.upper, alpha / count
        if self.is_small and not g.is_cuda:
            move, spent = self._by_column(g, *room(*within), alpha)
        else:
            move, spent = best_sparse(g, self.normal, *within, alpha, sparsity(g), self.dims)
        y = torch.addcmul(start, move, moves).clamp_(self.lower, self.upper)  # `nearest_in_l1_ball`, next, settles it
        short = moves & (spent < (1 - 1e-6) * alpha)
        is_capped = isinstance(count, Tensor) or count > 1
        if is_capped and (y.is_cuda or bool(short.any())):  # asking would stop the GPU
            y = torch.where(short, self.sparse_step(start, gradient, alpha, 1), y)
        return y

    def _by_column(self, g: Tensor, up: Tensor, down: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The same for groups of a few pixels."""
        radii, guess = alpha.expand(len(g), 1, 1, 1).flatten().tolist(), max(1, sparsity(g) // 2)
        move, spent = torch.empty_like(g), torch.empty_like(g[:, :1, :1, :1])
        gs, ns, ups, downs, moves = (by_group(t, self.dims).flatten(2) for t in (g, self.normal, up, down, move))
        for k, radius in enumerate(radii):
            moves[:, k], size = few.best_sparse(gs[:, k], ns[:, k], ups[:, k], downs[:, k], radius, guess)
            spent[k] = size
        return move, spent

    def unit_tangent(self, gradient: Tensor) -> Tensor:
        """See `sets.Allowed`. It is in the plane's working memory, until the next call."""
        if (fused := self._fused_projection()) is not None:
            rows = self._rows(gradient, self.normal, self._scratch[0])
            return fused[0](*rows, samples=len(gradient)).view_as(gradient)
        g, _ = self._projected(gradient.contiguous(), IMAGE)
        length2 = dot(g, g, self.dims, self._scratch[3]).sum(IMAGE, keepdim=True)
        return g.mul_(reciprocal(length2.sqrt()))

    def _projected(self, gradient: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The gradient, scaled by powers of two over `dims`, without its components along the normals, exactly 0 if
        less than round-off is left; and the sum of its absolute values per group."""
        g, _, _, scratch = self._scratch
        scaled(gradient, dims, out=g)
        tolerance = 4 * torch.finfo(g.dtype).eps * total(torch.abs(g, out=scratch), self.dims)
        inverse = reciprocal(self._normal2)
        g.addcmul_(self.normal, dot(g, self.normal, self.dims, scratch) * inverse, value=-1)
        size = total(torch.abs(g, out=scratch), self.dims)
        nearly_parallel = size < 1e3 * tolerance  # for the others a second pass would change round-off only
        if g.is_cuda or bool(nearly_parallel.any()):
            again = dot(g, self.normal, self.dims, scratch) * inverse * nearly_parallel
            g.addcmul_(self.normal, again, value=-1)
            size = total(torch.abs(g, out=scratch), self.dims)
        rest = size > tolerance
        return g if not g.is_cuda and bool(rest.all()) else g.mul_(rest), size * rest

    def _range(self, start: Tensor, alpha: Tensor, bottom: Tensor, top: Tensor) -> None:
        """Write the ends of what each pixel may reach, the one with the smaller product with the image to `bottom`."""
        torch.maximum(torch.sub(start, alpha, out=bottom), self.lower, out=bottom)
        torch.minimum(torch.add(start, alpha, out=top), self.upper, out=top)
        if self._has_negative:
            low, negative = bottom.clone(), self.normal < 0
            torch.where(negative, top, bottom, out=bottom)
            torch.where(negative, low, top, out=top)

    def nearest(self, points: Tensor, shrink: Tensor | None = None) -> Tensor:
        """y(λ) = clip(p - λx), or with μ > 0 clip(x + soft(p - λx - x, μ)), at the λ for which the plane holds;
        soft(v, μ) takes μ off every ``|v_i|``, down to 0. Within 1e-7 ‖p - x‖ of the projection plus round-off.

        Source: docs/method.md, "The nearest point".
        """
        if self.is_small:
            return self.settle(self._unsettled(points, shrink))
        if shrink is not None:
            return self._searched(points, shrink)
        y, found = self._newton(points, None)
        y = completed(self, y, found, lambda some, p: some._searched(p, None), points)
        return self._settled(y, [self._box], self.images)

    def nearest_in_l2_ball(self, points: Tensor, radius: Tensor) -> Tensor:
        """By Newton's method, which may fail where few pixels are free; then by a search that cannot."""
        if self.is_small:
            return self.settle(by_secant(self, points, radius, self._unsettled))
        y, found = self._newton(points, radius.to(points.dtype))
        y = self._settled(y, [self._box], self.images)
        return completed(self, y, found, by_secant, points, radius)

    def near_in_l2_ball(self, points: Tensor, radius: Tensor) -> Tensor | None:
        if (fused := self._fused_projection()) is None:
            return None
        rows = self._rows(points, self.images, self.lower, self.upper, self.normal)
        sizes = radius.to(torch.float64).expand(len(points), 1, 1, 1).flatten().contiguous()
        return fused[1](*rows, radius=sizes).view_as(points)

    def nearest_in_l1_ball(self, points: Tensor, radius: Tensor) -> Tensor:
        """Where a group has a few pixels, less than the radius by what settling takes from groups that hardly move."""
        x, delta, scratch = self.images, self._scratch[0], self._scratch[1]
        torch.sub(points, x, out=delta)
        noise = self._noise(dot(delta, delta, self.dims, scratch))
        d, found = in_l1_ball(delta, self.lower - x, self.upper - x, radius, self.normal, self.dims, noise)
        y = d.add_(x).clamp_(self.lower, self.upper)

        def search(some: Plane, points: Tensor, radius: Tensor) -> Tensor:
            return by_threshold(some, points, radius, some._unsettled if some.is_small else some.nearest, some._held)

        return self.settle(completed(self, y, found, search, points, radius))

    def _noise(self, distance2: Tensor) -> Tensor:
        """What round-off may leave of ⟨y - x, n⟩: of equal pixels with a perturbation below their grid, all round the
        same way, and λ cannot settle more than that."""
        unit = self._slack * torch.finfo(distance2.dtype).eps
        return unit * ((torch.minimum(distance2, self._width2) * self._normal2).sqrt() + self._grid / 4)

    def _held(self, signs: Tensor, free: Tensor) -> Tensor:
        """‖P s‖² for the signs s of free pixels, (N, 1, 1, 1), P projecting onto their part of the normals: with s they
        would leave the planes, so λ takes that up."""
        along, length2 = dot(signs, self.normal, self.dims), total(self.normal.square().mul_(free), self.dims)
        return total(along.square_().mul_(reciprocal(length2)), IMAGE).double()

    def _newton(self, points: Tensor, radius: Tensor | None) -> tuple[Tensor, Tensor]:
        """y(s, λ) = clip(x + s (p - x) - λx) on the plane and, with a radius, in the ball; per sample, whether it is.

        With D the pixels that are not clipped, both equations have the derivatives

            F = ⟨y - x, x⟩ = 0              F_s = ⟨p - x, x⟩_D,      F_λ = -⟨x, x⟩_D
            E = ‖y - x‖² / 2 = radius² / 2   E_s = ⟨p - x, y - x⟩_D,  E_λ = -⟨x, y - x⟩_D

        and there are as many F and λ as groups, none of which depends on another's λ.
        """
        x, normal, dims = self.images, self.normal, self.dims
        delta0, v, delta, scratch = self._scratch
        torch.sub(points, x, out=delta0)
        along, distance2 = dot(delta0, normal, dims, scratch), dot(delta0, delta0, dims, scratch)
        noise = self._noise(distance2)
        s = torch.ones_like(x[:, :1, :1, :1])
        if radius is not None:
            s = (radius * reciprocal(distance2.sum(IMAGE, keepdim=True).sqrt())).clamp(max=1)
        multiplier = s * along * reciprocal(self._normal2)
        found = torch.zeros_like(s, dtype=torch.bool)
        y = torch.empty_like(x)
        for trial in range(_NEWTON):
            torch.addcmul(x, delta0, s, out=v).addcmul_(normal, multiplier, value=-1)
            torch.clamp(v, self.lower, self.upper, out=y)
            torch.sub(y, x, out=delta)
            f = dot(delta, normal, dims, scratch)
            right = (f.abs() <= noise).flatten(1).all(1).view(-1, 1, 1, 1)
            if radius is not None:
                length = dot(delta, delta, dims, scratch).sum(IMAGE, keepdim=True).sqrt()
                binds = (s < 1) | (length > radius)
                right &= (length <= radius * (1 + 3e-7)) & ((s >= 1) | (length >= radius * (1 - 3e-7)))
            found = found | right
            if trial + 1 == _NEWTON or (not x.is_cuda and bool(found.all())):
                break
            free = torch.eq(y, v, out=v)
            more = f
            if radius is not None:
                moved = torch.mul(free, delta0, out=y)
                f_s, e_s = dot(moved, normal, dims, scratch), dot(moved, delta, IMAGE, scratch)
            free.mul_(normal)
            inverse = reciprocal(dot(free, normal, dims, scratch))
            if radius is not None:
                e_multiplier = dot(free, delta, dims, scratch) * inverse
                e = (length - radius) * (length + radius) / 2
                rise = e_s - (e_multiplier * f_s).sum(IMAGE, keepdim=True)
                s_next = (s + ((e_multiplier * f).sum(IMAGE, keepdim=True) - e) * reciprocal(rise)).clamp(0, 1)
                s_next = torch.where(binds & ~found, s_next, s)
                more, s = f + f_s * (s_next - s), s_next
            multiplier = torch.where(found, multiplier, multiplier + more * inverse)
        return y, found

    def _unsettled(self, points: Tensor, shrink: Tensor | None = None) -> Tensor:
        """`nearest` on groups of a few pixels, off the plane by what rounding costs, which is much for so few."""
        if points.is_cuda:  # where counting what is left to do would take longer than trying all
            return self._searched(points, shrink, settles=False)
        x, low, high, normal = (by_group(t, self.dims) for t in (self.images, self.lower, self.upper, self.normal))
        found = few.nearest(by_group(points, self.dims) - x, normal, low - x, high - x, shrink)
        y = torch.empty_like(points)
        by_group(y, self.dims).copy_(found.add_(x).clamp_(low, high))
        return y

    def _searched(self, points: Tensor, shrink: Tensor | None, settles: bool = True) -> Tensor:
        """`nearest` by a search that cannot fail."""
        dims, normal = self.dims, self.normal
        delta = torch.sub(points, self.images, out=self._scratch[0])
        along = dot(delta, normal, dims, self._scratch[1])
        distance2 = dot(delta, delta, dims, delta)
        noise = (torch.minimum(distance2, self._width2) * self._normal2).sqrt() * (torch.finfo(delta.dtype).eps / 4)
        scratch = self._scratch[1]

        def point(multiplier: Tensor, out: Tensor) -> Tensor:
            torch.addcmul(points, normal, multiplier, value=-1, out=out)
            if shrink is not None:
                soften(out, self.images, shrink)
            return out.clamp_(self.lower, self.upper)

        def residual(multiplier: Tensor) -> Tensor:
            delta = point(multiplier, scratch).sub_(self.images)
            f = dot(delta, normal, dims, delta)
            return f * (f.abs() > noise)

        # λ if nothing were clipped; the search needs only its order of magnitude.
        scale = along.abs() * reciprocal(self._normal2)
        if self.is_small:
            bracket = try_all(residual, scale, self._at_kinks(points, shrink))
        else:
            ends = ends_of(residual, scale)
            near = along * reciprocal(self._normal2), -self._normal2
            bracket = search(residual, torch.where(scale > 0, scale, 1), 5e-15 * distance2, (ends[1], ends[3]), near)
        high, low = point(bracket[0], self._scratch[2]), point(bracket[2], self._scratch[0])
        if not settles:
            return torch.lerp(high, low, bracket[1] * reciprocal(bracket[1] - bracket[3]))
        return self._mixture(lambda share, out: torch.lerp(high, low, share, out=out), bracket, self.images)

    def settle(self, points: Tensor) -> Tensor:
        return self._settled(points, [self._box], self.images)

    def _box(self) -> Box:
        return self.lower, self.upper

    def _lost(self, points: Tensor) -> Tensor:
        """Which groups are off the plane by more than may be, as far as float32's sums can tell."""
        unit = 1e-6 if points.dtype == torch.float32 else 1e-12
        _, scratch, _, delta = self._scratch
        torch.sub(points, self.images, out=delta)
        along = dot(delta, self.normal, self.dims, scratch).abs()
        # A tenth is left for the round-off of these sums.
        return along > 0.9 * unit * (dot(delta, delta, self.dims, scratch) * self._normal2).sqrt()

    def _settled(self, points: Tensor, boxes: list[Callable[[], Box]], fallback: Tensor) -> Tensor:
        """`points`, with the orthogonality restored that rounding has cost (see `rounding`) in the groups where it is
        too much: inside the first of the `boxes` in which it can be, or else by the `fallback`."""
        lost = self._lost(points)
        is_quick = points.is_cuda and self._is_coarse  # one pixel of many will do, and little is lost with the others
        boxes = [self._box] if is_quick else boxes
        if not points.is_cuda and not bool(lost.any()):
            return points
        unit = 1e-6 if points.dtype == torch.float32 else 1e-12
        if self.is_small and not points.is_cuda:
            low, high = self._box()
            some = lost.flatten().nonzero().squeeze(1)
            columns = [by_group(t, self.dims).flatten(1) for t in (points, self.images, self._settling, low, high)]
            y, x, n, low, high = (t.index_select(1, some) for t in columns)
            moved = columns[0].index_copy(1, some, few.nudged(y, x, n, low, high, 0.75 * unit))
            points = torch.empty_like(self.images)
            by_group(points, self.dims).copy_(moved.view(-1, *lost.shape))
            lost = self._lost(points)
            if not bool(lost.any()):
                return points
        groups = lost.squeeze(self.dims)
        where = () if points.is_cuda else groups.nonzero(as_tuple=True)

        def rows(tensor: Tensor) -> Tensor:  # a view with the pixels of a group along the last dimension
            return tensor.movedim(-3, -1) if self.scope == "pixel" else tensor.flatten(self.dims[0])

        def chosen(tensor: Tensor) -> Tensor:  # all of them on a GPU
            return rows(tensor).flatten(0, -2) if tensor.is_cuda else rows(tensor)[where]

        def chosen_box(box: Callable[[], Box]) -> Box:
            low, high = box()
            return chosen(low), chosen(high)

        settled = points.clone(memory_format=torch.contiguous_format)
        y, x, n, z = (chosen(tensor) for tensor in (points, self.images, self._settling, fallback))
        found = settled_rows(y, x, n, [partial(chosen_box, box) for box in boxes], z, 0.75 * unit, is_quick)
        if points.is_cuda:
            rows(settled).copy_(torch.where(groups.reshape(-1, 1), found, y).view_as(rows(settled)))
        else:
            rows(settled)[where] = found
        return settled

    def _mixture(self, mix: Callable[[Tensor, Tensor], Tensor], bracket: Bracket, fallback: Tensor) -> Tensor:
        """The point on the plane between the ends of a bracket, f(a) >= 0 >= f(b).

        y(a) and y(b) lie in the box, which is convex, so their mixture that is on the plane does too, and its duality
        gap is at most f(a) |f(b)| / (f(a) + |f(b)|) · (b - a), which is what the searches make small: the answer comes
        with its certificate.

        Args:
            mix: writes y(a) at a share of 0, y(b) at 1 to a tensor, and uses none of the second and the last scratch.
            bracket: a, f(a), b, f(b) per group.
            fallback: a point of the box on the plane, taken where there is no better one on the dtype's grid.
        """
        _, fa, _, fb = bracket
        rise = torch.where(fa - fb > 0, fa - fb, 1)
        share = fa / rise  # exactly 0 if y(a) is on the plane, exactly 1 if y(b) is

        def between() -> Box:
            """Where y(a) and y(b) differ, anything between them is as good: a pixel to move is best found there."""
            at_a, at_b = (mix(torch.full_like(share, end), torch.empty_like(self.images)) for end in (0.0, 1.0))
            return torch.minimum(at_a, at_b), torch.maximum(at_a, at_b)

        y = mix(share, torch.empty_like(self.images))
        lost = self._lost(y)
        if y.is_cuda or bool(lost.any()):
            # Rounding has moved the mixture off the plane; where many pixels are mixed, a corrected share may help.
            error = dot(y - self.images, self.normal, self.dims)
            corrected = torch.where(lost, (share + error / rise).clamp(0, 1), share)
            quick = self.is_small and not y.is_cuda  # then a few units of a grid will do, in any pixel
            y = self._settled(mix(corrected, y), [self._box] if quick else [between, self._box], fallback)
        return y

    def _at_kinks(self, points: Tensor, shrink: Tensor | None) -> Tensor:
        """0, so that a point on the plane is found to be, and the λ at which a pixel of y(λ) meets a bound or x."""
        ends = [self.lower, self.upper]
        if shrink is not None:
            ends = [self.lower - shrink, self.upper + shrink, self.images - shrink, self.images + shrink]
        kinks = (((points - end) / self.normal).nan_to_num(0) for end in ends)
        grouped = [by_group(k, self.dims) for k in kinks]
        return torch.cat([torch.zeros_like(grouped[0][:1]), *grouped])
