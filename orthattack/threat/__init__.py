"""Threat models: what a perturbation may be, as sets with their steps, projections and random starts.

`ThreatModel` is the description; `ThreatModel.around(images)` the set of allowed images around a batch, a `Region`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from orthattack.arguments import check_bounds, check_choice, check_real, is_number, plain, same_values
from orthattack.projection import (
    Scope,
    alignment,
    block_size,
    is_fine,
    orthogonalize,
    orthonormal_basis,
    remove_directions,
    scope_dims,
)
from orthattack.threat.levels import LUMA, grid_units, levels_of, radius_in_levels
from orthattack.threat.norms import BALLS, Norm, perturbation_norm
from orthattack.threat.region import Region, masked

__all__ = ["Direction", "Mask", "Norm", "Normal", "Region", "ThreatModel", "perturbation_norm"]

Normal = Literal["image", "constant", "luma"] | Tensor | Callable[[Tensor], Tensor]
"""What a perturbation is orthogonal to in every vector of the scope: see `ThreatModel`."""

Direction = Literal["constant", "channel-constant", "luma"] | Tensor | Callable[[Tensor], Tensor]
"""What else a perturbation stays orthogonal to: see `ThreatModel`."""

Mask = Tensor | Callable[[Tensor], Tensor]
"""Which pixels a perturbation may move: see `ThreatModel`."""

NAMED = {"normal": ("image", "constant", "luma"), "directions": ("constant", "channel-constant", "luma")}
"""The normals and directions that have names."""


@dataclass(frozen=True)
class ThreatModel:
    """The set of perturbations an attack may use::

        { δ : ‖δ‖ <= eps,  low <= x + δ <= high,  ⟨δ, n⟩ = 0 in every vector of the scope,
          ⟨δ, b_j⟩ = 0 for each direction b_j }

    Args:
        norm: "linf", "l2", "l1" or "l0", the number of pixels that move, in whichever of their channels.
        eps: radius in pixel units, e.g. ``8 / 255``, at least 0; one number, or a tensor (N,) with one per sample. For
            L0 the number of pixels.
        bounds: the smallest and largest pixel value.
        scope: which vectors must stay orthogonal to those of the `normal`: "image", "channel", "pixel", or blocks of
            pixels of a channel, "block8" (see `orthattack.projection`). None for none.
        directions: what else the perturbation stays orthogonal to, as a whole: "constant", all ones, so that the mean
            brightness stays; "channel-constant", each channel's ones, so that the mean colour stays; "luma", so that
            the mean luma stays; a tensor (C, H, W), or (K, C, H, W) for several, the same for every image; or a
            function of the images (N, C, H, W) that returns (N, C, H, W) or (N, K, C, H, W). With the scope "pixel" or
            blocks, only those that follow from it.
        normal: n, the "image" itself; "constant", all ones, so that the mean of each vector stays; "luma", the weights
            (0.299, 0.587, 0.114) of the three channels; a tensor (C, H, W), the same for every image; or a function of
            the images (N, C, H, W) that returns (N, C, H, W). Where it is zero in a whole vector, that one is free.
        levels: what the images are stored with, from 2 to 65536, such as 256 for 8 bits; None: any number will do.
            Images and adversarials then have the values low + k (high - low) / (levels - 1), and all of the above
            holds for the integers k, orthogonality as an exact 0. Not with colours and luma of a pixel, tensors and
            functions, to which too few small integers are orthogonal.
        mask: which pixels may move, True or 1 where they may: a tensor (H, W) or (C, H, W), the same for every image,
            or a function of the images (N, C, H, W) that returns (N, C, H, W); N and C may be 1. The others stay as
            they are, to the bit, and all of the above is about those that move. None: all may.

    Raises:
        ValueError: an option outside these.
    """

    norm: Norm
    eps: float | Tensor
    bounds: tuple[float, float] = (0.0, 1.0)
    scope: Scope | None = "image"
    directions: Sequence[Direction] = ()
    normal: Normal = "image"
    levels: int | None = None
    mask: Mask | None = None

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
            _check_vector("each of directions", direction, NAMED["directions"])
        _check_vector("normal", self.normal, NAMED["normal"])
        if self.scope is None and not (isinstance(self.normal, str) and self.normal == "image"):
            raise ValueError(
                f'normal={_name(self.normal)} needs a scope, the vectors that it is for: scope="image", "channel", '
                '"pixel", or blocks such as "block8"'
            )
        vectors = (v.detach().clone() if isinstance(v, Tensor) else v for v in (self.normal, *self.directions))
        object.__setattr__(self, "normal", next(vectors))
        object.__setattr__(self, "directions", tuple(vectors))
        if self._more and is_fine(self.scope):
            raise ValueError(
                f'directions cannot be combined with scope="{self.scope}", which has a constraint for every '
                f"{'pixel' if self.scope == 'pixel' else 'block'} already; got {_name(self._more[0])}: take scope "
                '"image" or "channel"'
            )
        object.__setattr__(self, "levels", self._checked_levels())
        if isinstance(self.mask, Tensor):
            _check_mask(self.mask, 2, 3)
            object.__setattr__(self, "mask", self.mask.detach().bool().clone())
        elif self.mask is not None and not callable(self.mask):
            raise ValueError(f"mask must be a tensor or a function of the images; got {type(self.mask).__name__}")

    def _checked_levels(self) -> int | None:
        levels = plain(self.levels)
        if levels is None:
            return None
        if not isinstance(levels, int) or isinstance(levels, bool) or not 2 <= levels <= 65536:
            raise ValueError(f"levels must be an integer from 2 to 65536, such as 256 for 8 bits; got {levels!r}")
        unknown = [v for v in (self.normal, *self.directions) if not isinstance(v, str)]
        if unknown:
            raise ValueError(
                f"levels leaves too few integers that are orthogonal to {_name(unknown[0])}: use the normals 'image', "
                "'constant' and 'luma', and 'constant' and 'channel-constant' in directions"
            )
        if "luma" in self.directions or (self.normal == "luma" and self.directions):
            raise ValueError(
                'levels cannot be combined with \'luma\' beside others: use scope="image", normal="luma" alone'
            )
        if self.scope == "pixel" and self.normal != "constant":
            why = (
                "15 levels are the least that leave luma" if self.normal == "luma" else "few leave the product with it"
            )
            raise ValueError(
                f'levels cannot be combined with scope="pixel": next to no small changes of a pixel are orthogonal to '
                f'its colour ({why}). Use scope="image" or "channel", or normal="constant"'
            )
        if self.scope is not None and self.normal == "image":
            grid_units(levels, self.bounds)
        return levels

    def __eq__(self, other: object) -> bool:
        """Whether all of it is the same, a radius per sample included."""
        if not isinstance(other, ThreatModel) or self._names != other._names:
            return False
        mine, others = ((t.eps, t.normal, t.directions, t.mask) for t in (self, other))  # which may be tensors
        return same_values(mine, others)

    def __hash__(self) -> int:
        return hash(self._names)

    @property
    def _names(self) -> tuple[object, ...]:
        return self.norm, self.bounds, self.scope, self.levels

    @property
    def is_orthogonal(self) -> bool:
        """Whether anything but ball and bounds binds."""
        return self.scope is not None or len(self.directions) > 0

    @property
    def keeps(self) -> tuple[str, ...]:
        """In words, what a perturbation leaves as it is, or is orthogonal to; nothing of a ball and bounds alone."""
        return kept(self.scope, self.normal, self.directions)

    @property
    def _more(self) -> tuple[Direction, ...]:
        """The directions that do not follow from scope and normal."""
        return tuple(d for d in self.directions if not _follows(d, self.scope, self.normal))

    def free(self) -> ThreatModel:
        """The same ball and bounds with nothing to be orthogonal to."""
        return replace(self, scope=None, directions=(), normal="image")

    def normals(self, images: Tensor) -> Tensor:
        """(N, C, H, W) the `normal` of each image, which the vectors of the scope are taken from."""
        if not isinstance(self.normal, str):
            return _of_user("a normal", self.normal, images, several=False)[:, 0]
        return images if self.normal == "image" else _named(self.normal, images).expand_as(images)

    def moving(self, images: Tensor) -> Tensor | None:
        """(N, C, H, W) bool, which pixels of each image may move; None: all of them."""
        if self.mask is None:
            return None
        found = self.mask
        if not isinstance(found, Tensor):
            found = found(images.clone())
            _check_mask(found, 4, 4)
        try:
            return found.to(images.device).bool().clone().expand(images.shape)
        except RuntimeError as error:
            raise ValueError(
                f"mask must have the images' height and width, and their channels or one; got {tuple(found.shape)} for "
                f"{tuple(images.shape)}"
            ) from error

    @cached_property
    def frame(self) -> tuple[slice, slice]:
        """Rows and columns outside of which nothing moves, whatever the image."""
        if not isinstance(self.mask, Tensor):
            return slice(None), slice(None)
        flat = self.mask.reshape(-1, *self.mask.shape[-2:]).any(0)
        ends = [side.nonzero().flatten().tolist() or [0] for side in (flat.any(1), flat.any(0))]
        return slice(ends[0][0], ends[0][-1] + 1), slice(ends[1][0], ends[1][-1] + 1)

    def diameter(self, shape: Sequence[int]) -> float:
        """The norm of the largest difference of two images of `shape` (C, H, W) in the bounds."""
        if self.norm == "l0":
            return float(math.prod(shape[1:]))
        return (self.bounds[1] - self.bounds[0]) * BALLS[self.norm].of_ones(math.prod(shape))

    def allows_everything(self, shape: Sequence[int]) -> bool:
        """Whether a radius, of one sample at least, is so large that the ball holds every image of `shape` (C, H, W)
        in the bounds: the norm then limits nothing. With a mask that is what it is for."""
        eps = self.eps
        largest = eps if not isinstance(eps, Tensor) else float(eps.max()) if len(eps) > 0 else 0.0
        return self.mask is None and math.prod(shape) > 0 and largest >= self.diameter(shape) * (1 - 1e-6)

    def around(self, images: Tensor) -> Region:
        """The allowed images around each of `images`, (N, C, H, W), floating point, inside the bounds."""
        return Region(self, images)

    @property
    def unit(self) -> float:
        """How far apart the values of stored images are, in pixel units: 1/255 for `levels=256`; 0 without `levels`."""
        return 0.0 if self.levels is None else (self.bounds[1] - self.bounds[0]) / (self.levels - 1)

    def on_grid(self, eps: Tensor) -> Tensor:
        """Radii, float64, as large as they are on the grid of `levels`: whole levels for L-infinity; whole pixels for
        L0."""
        if self.norm == "l0":
            return eps.floor()
        if self.levels is None or self.norm != "linf":
            return eps
        return (radius_in_levels("linf", eps, 1 / self.unit) * self.unit).clamp(max=eps)

    def sizes(self, images: Tensor, adversarials: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) each: the norm of the perturbations, in pixel units, and `cosine`; of the integers if there are
        `levels`, which round-off then has no part in."""
        if self.levels is None:
            delta = adversarials.double() - images.double()
            return perturbation_norm(delta, self.norm), self.cosine(delta, images)
        k = levels_of(images, self.levels, self.bounds).double()
        d = levels_of(adversarials, self.levels, self.bounds).double() - k
        x = images.double()
        if self.scope is not None and self.normal == "image":
            shift, scale = grid_units(self.levels, self.bounds)
            x = scale * k + shift
        of = self
        if self.normal == "luma":  # in thousandths, whole numbers too
            of, x = replace(self, normal="image", levels=None), (1000 * self.normals(x)).round()
        return perturbation_norm(d, self.norm) * (1 if self.norm == "l0" else self.unit), of.cosine(d, x)

    def tangent(self, gradient: Tensor, images: Tensor) -> Tensor:
        """`gradient` without its components along the normals and the directions, (N, C, H, W), and with zeros where
        pixels may not move: the textbook projection.

        Source: docs/method.md, "Projecting the gradient".
        """
        mask = self.moving(images)
        gradient = masked(mask, gradient)
        if not self._more:
            if self.scope is None:
                return gradient
            return orthogonalize(gradient, masked(mask, self.normals(images)).to(gradient.dtype), self.scope)
        vectors = masked(None if mask is None else mask.unsqueeze(1), self._vectors(images))
        return remove_directions(gradient, orthonormal_basis(vectors.to(gradient.dtype)))

    def cosine(self, delta: Tensor, images: Tensor) -> Tensor:
        """(N,) the largest ``|cos|`` of a perturbation with what it should be orthogonal to, accumulated in float64.

        Without any constraint, that with the image.
        """
        x = images.double()
        largest = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if self.scope is not None or not self.directions:
            cosine = alignment(delta.double(), self.normals(x), self.scope or "image").abs()
            largest = cosine if cosine.ndim == 1 else cosine.flatten(1).amax(1)
        if self.directions:
            for vector in torch.cat([_directed(direction, x) for direction in self.directions], 1).unbind(1):
                largest = torch.maximum(largest, alignment(delta.double(), vector).abs())
        return largest

    def _vectors(self, images: Tensor, normals: Tensor | None = None) -> Tensor:
        """The vectors of the scope, which is "image", "channel" or None, and the directions that do not follow from
        them, (N, K, C, H, W)."""
        parts = []
        if self.scope is not None:
            normals = (self.normals(images) if normals is None else normals).unsqueeze(1)
            parts.append(normals if self.scope == "image" else normals * _channels(images))
        return torch.cat([*parts, *(_directed(direction, images) for direction in self._more)], dim=1)


def kept(scope: Scope | None, normal: Normal, directions: Sequence[Direction]) -> tuple[str, ...]:
    """See `ThreatModel.keeps`."""
    means = {"image": "mean", "channel": "channel means", "pixel": "means of the pixels"}
    found: list[str] = []
    if scope is not None:
        block = f"{block_size(scope)}×{block_size(scope)} block"
        if not isinstance(normal, str) or normal == "image":
            what = "the image" if isinstance(normal, str) else _name(normal)
            found.append(
                f"orthogonal to {what}" + {"image": ""}.get(scope, f" in each {scope if scope in means else block}")
            )
        elif normal == "luma" and scope in ("image", "pixel"):
            found.append("mean luma kept" if scope == "image" else "luma of each pixel kept")
        else:
            found.append(f"{means.get(scope, f'{block} means')} kept")
    named = {"constant": "mean kept", "channel-constant": "channel means kept", "luma": "mean luma kept"}
    found += [named[d] if isinstance(d, str) else f"orthogonal to {_name(d)}" for d in directions]
    return tuple(dict.fromkeys(found))


def _follows(direction: Direction, scope: Scope | None, normal: Normal) -> bool:
    """Whether what is orthogonal to the normal in each vector of the scope is so to the direction: sums of what is
    zero in every group are zero."""
    if scope is None or not isinstance(direction, str) or not isinstance(normal, str) or normal == "image":
        return False
    if scope in ("image", "pixel"):
        return direction == normal
    return True  # within a channel, luma is a constant


def _check_vector(what: str, given: object, names: tuple[str, ...]) -> None:
    if not isinstance(given, Tensor) and not callable(given) and not (isinstance(given, str) and given in names):
        listed = ", ".join(map(repr, names))
        raise ValueError(f"{what} must be {listed}, a tensor or a function of the images; got {given!r}")


def _check_mask(mask: object, fewest: int, most: int) -> None:
    if not isinstance(mask, Tensor) or not fewest <= mask.ndim <= most:
        shape = "(H, W) or (C, H, W)" if most == 3 else "(N, C, H, W) as a function"
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be {shape}, C being the images' channels or 1; got {found}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            "mask must be True, or 1, where pixels may move, and False, or 0, elsewhere; found other numbers"
        )


def _name(vector: object) -> str:
    """A normal or a direction in a sentence."""
    if isinstance(vector, str):
        return repr(vector)
    return "a tensor" if isinstance(vector, Tensor) else f"{getattr(vector, '__name__', type(vector).__name__)}(images)"


def _channels(images: Tensor) -> Tensor:
    """(1, C, C, 1, 1) what takes each channel out of the images."""
    count = images.shape[1]
    return torch.eye(count, dtype=images.dtype, device=images.device).view(1, count, count, 1, 1)


def _named(name: str, images: Tensor) -> Tensor:
    """All ones, or the weights of luma, to be expanded to the images."""
    if name == "luma":
        if images.shape[1] != 3:
            raise ValueError(f"luma is of red, green and blue; the images have {images.shape[1]} channels")
        return torch.tensor(LUMA, dtype=images.dtype, device=images.device).view(1, 3, 1, 1) / 1000
    return torch.ones_like(images)


def _directed(direction: Direction, images: Tensor) -> Tensor:
    """(N, K, C, H, W) the one or several vectors that a direction stands for."""
    if not isinstance(direction, str):
        return _of_user("a direction", direction, images)
    if direction == "channel-constant":
        return torch.ones_like(images).unsqueeze(1) * _channels(images)
    return _named(direction, images).expand_as(images).unsqueeze(1)


def _of_user(what: str, vector: Tensor | Callable[[Tensor], Tensor], images: Tensor, several: bool = True) -> Tensor:
    """(N, K, C, H, W) a tensor, or what a function makes of the images; K is 1 if not `several`."""
    # A function may write into what it is given, and into what it has returned.
    given = vector if isinstance(vector, Tensor) else vector(images.clone())
    if not isinstance(given, Tensor):
        raise ValueError(f"{what} must return a tensor; got {type(given).__name__}")
    if given.is_complex():
        raise ValueError(f"{what} must be real; got {given.dtype}: give its .real and .imag, as two")
    given = given.detach().clone()
    found = given.to(images)
    if isinstance(vector, Tensor) and found.ndim < 5:
        found = found.unsqueeze(0) if found.ndim == 4 else found.unsqueeze(0).unsqueeze(0)
    found = found.unsqueeze(1) if found.ndim == 4 else found
    fits = found.ndim == 5 and found.shape[2:] == images.shape[1:] and found.shape[0] in (1, len(images))
    if not fits or (found.shape[1] != 1 and not several):
        raise ValueError(
            f"{what} must have the images' shape {tuple(images.shape[1:])}, one{' or several' * several} for all "
            f"images, or as a function (N, {'K, ' * several}C, H, W); got {tuple(given.shape)}"
        )
    if not bool(found.isfinite().all()):
        raise ValueError(f"{what} must be finite; found NaN or infinity")
    return found.expand(len(images), *found.shape[1:])


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
        return float(eps)  # an integer may be larger than torch takes
    if eps.ndim > 1:
        raise ValueError(f"eps must be a number or one per sample, (N,); got shape {tuple(eps.shape)}")
    is_real = not eps.dtype.is_complex and eps.dtype != torch.bool
    if not is_real or not bool((eps.isfinite() & (eps >= 0)).all()):
        raise ValueError(f"eps must be {what}; got {eps!r}")
    return eps.detach().clone()
