"""Threat models: what a perturbation may be, as sets with their steps, projections and random starts.

`ThreatModel` is the description; `ThreatModel.around(images)` the set of allowed images around a batch, a `Region`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from orthattack.arguments import check_bounds, check_choice, check_real, is_number, plain, same_values
from orthattack.projection import Scope, alignment, orthogonalize, orthonormal_basis, remove_directions, scope_dims
from orthattack.threat.norms import BALLS, Norm, perturbation_norm
from orthattack.threat.region import Region

__all__ = ["Direction", "Norm", "Region", "ThreatModel", "perturbation_norm"]

Direction = Literal["constant", "channel-constant"] | Tensor | Callable[[Tensor], Tensor]
"""What else a perturbation stays orthogonal to: see `ThreatModel`."""


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


def _is_same(a: object, b: object) -> bool:
    is_either = isinstance(a, Tensor) or isinstance(b, Tensor)
    return same_values(a, b) if is_either else a == b


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

    def __eq__(self, other: object) -> bool:
        """Whether all of it is the same, a radius per sample included."""
        return isinstance(other, ThreatModel) and self._rest == other._rest and _is_same(self.eps, other.eps)

    def __hash__(self) -> int:
        return hash(self._rest)

    @property
    def _rest(self) -> tuple[object, ...]:
        """What it is besides its radius."""
        return self.norm, self.bounds, self.scope, self.directions

    @property
    def is_orthogonal(self) -> bool:
        """Whether anything but ball and bounds binds."""
        return self.scope is not None or len(self.directions) > 0

    def diameter(self, shape: Sequence[int]) -> float:
        """The norm of the largest difference of two images of `shape` (C, H, W) in the bounds."""
        return (self.bounds[1] - self.bounds[0]) * BALLS[self.norm].of_ones(math.prod(shape))

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
            if given.is_complex():
                raise ValueError(f"a direction must be real; got {given.dtype}: give its .real and .imag, as two")
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
