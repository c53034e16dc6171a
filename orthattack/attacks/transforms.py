"""Transforms for gradients that transfer: each is a function of images and random numbers, or several to average over.

For ``transform=`` of every gradient attack. All treat each image for itself, by random numbers of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from orthattack.arguments import check_count, check_real, plain_fields
from orthattack.attacks.numbers import Draws
from orthattack.attacks.scoring import Transform


@dataclass(frozen=True)
class diversity:  # noqa: N801
    """A transform: the image resized and put among zeros, both at random, or left as it is (input diversity, DI).

    With a rate below 1 it gets a size from ``rate · S`` up to S - 1, bilinearly, and is padded to its own, S. With a
    rate above 1 it gets one from S up to ``rate · S - 1``, is padded to ``rate · S`` and resized to S: with 331 / 299
    the authors' code.

    Args:
        rate: of the sizes, > 0.
        probability: that this is done, in [0, 1].

    Source: Xie et al. 2019, arXiv:1803.06978.
    """

    rate: float = 0.9
    probability: float = 0.5

    def __post_init__(self) -> None:
        plain_fields(self)
        check_real("rate", self.rate, "a finite number > 0", low=0, above=True)
        check_real("probability", self.probability, "a number in [0, 1]", low=0)
        if self.probability > 1:
            raise ValueError(f"probability must be a number in [0, 1]; got {self.probability}")

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        size, *place, chance = draws.uniform(4).to(images).unbind(1)
        rows, columns = (
            self._resized(side, size, where, images) for side, where in zip(images.shape[2:], place, strict=True)
        )
        made = rows @ images.transpose(0, 1) @ columns.mT
        return torch.where((chance < self.probability).view(-1, 1, 1, 1), made.transpose(0, 1), images)

    def _resized(self, side: int, size: Tensor, place: Tensor, images: Tensor) -> Tensor:
        """(N, side, side): what resizes and pads one axis. As matrices, so that the gradient has the same bits on each
        run, which that of torch's interpolation has not on a GPU."""
        low, high = sorted((side, max(1, int(side * self.rate))))
        drawn = (low + (size * (high - low)).floor()).clamp(max=max(low, high - 1))
        first = (place * (high - drawn + 1)).floor().minimum(high - drawn)
        padded = _interpolation(high, side, drawn, first)
        whole = torch.full((1,), float(side), dtype=images.dtype, device=images.device)
        return padded if high == side else _interpolation(side, high, whole, 0 * whole) @ padded


def _interpolation(out: int, side: int, size: Tensor, first: Tensor) -> Tensor:
    """(N, out, side): `side` pixels to `size` of them, bilinearly, from the place `first` on; zeros elsewhere."""
    at = torch.arange(out, dtype=size.dtype, device=size.device)
    source = (at - first[:, None] + 0.5) * (side / size[:, None]) - 0.5
    near = 1 - (source.clamp(0, side - 1)[..., None] - at.new_tensor(range(side))).abs()
    inside = (at >= first[:, None]) & (at < (first + size)[:, None])
    return near.clamp(min=0) * inside[..., None]


@dataclass(frozen=True)
class scaled:  # noqa: N801
    """A transform: pixels times a `factor`; see `scales`."""

    factor: float

    def __post_init__(self) -> None:
        plain_fields(self)
        check_real("factor", self.factor, "a finite number")

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:  # noqa: ARG002
        return images * float(self.factor)


def scales(copies: int = 5) -> tuple[Transform, ...]:
    """Transforms: the image times 1, 1/2, 1/4, …, so many `copies` to average over (scale invariance, SI).

    Source: Lin et al. 2020, arXiv:1908.06281.
    """
    check_count("copies", copies)
    return tuple(scaled(0.5**k) for k in range(copies))


@dataclass(frozen=True, eq=False)
class mixed:  # noqa: N801
    """A transform: the image plus a `share` of one of the `others`, drawn at random; see `admix`."""

    others: Tensor = field(repr=False)
    share: float = 0.2

    def __post_init__(self) -> None:
        plain_fields(self)
        if not isinstance(self.others, Tensor) or self.others.ndim != 4 or len(self.others) == 0:
            raise ValueError("others must be images (M, C, H, W), at least one, of the size of those attacked")
        check_real("share", self.share, "a finite number")
        object.__setattr__(self, "others", self.others.detach().clone())

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        count = len(self.others)
        drawn = (draws.uniform(1).squeeze(1) * count).long().clamp(max=count - 1)  # rounding may reach it
        return images + float(self.share) * self.others[drawn.to(self.others.device)].to(images)


def admix(others: Tensor, samples: int = 3, share: float = 0.2, copies: int = 5) -> tuple[Transform, ...]:
    """Transforms: the image with a little of another one, each at the `scales` (Admix); 15 to average over.

    The others are given, not neighbours of the batch, so that no result depends on these; each of the transforms draws
    one anew, where the paper draws one for all its scales: the mean is that of the same images.

    Args:
        others: (M, C, H, W) images to draw from, of other classes in the paper.
        samples: how many to draw at each scale, at least 1.
        share: of the other image.
        copies: scales, at least 1.

    Source: Wang et al. 2021, arXiv:2102.00436.
    """
    check_count("samples", samples)
    return composed([mixed(others, share)] * samples, scales(copies))


def composed(*transforms: Transform | Sequence[Transform]) -> tuple[Transform, ...]:
    """Transforms one after the other, the first one first; of several to average over each with each.

    ``composed(scales(5), diversity())`` is SI-DI: each of the five scales is resized by random numbers of its own.
    """
    several = [[one] if callable(one) else list(one) for one in transforms]
    return tuple(_Composed(parts) for parts in product(*several))


@dataclass(frozen=True)
class _Composed:
    parts: tuple[Transform, ...]

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        for part in self.parts:
            images = part(images, draws)
        return images
