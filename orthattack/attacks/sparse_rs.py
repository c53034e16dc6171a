"""Sparse-RS: a random search over few pixels and their colours, which asks for nothing but logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from orthattack.attacks.base import Attack, Options
from orthattack.attacks.square import drawn, search_at_random
from orthattack.attacks.task import Counts, Merit, Task
from orthattack.models import Model
from orthattack.threat import Norm
from orthattack.threat.norms import largest

# The share of the pixels that are exchanged at first, and what divides it from which query on, of 10,000.
_SHARE = 0.3
_DIVISORS = ((0, 2), (50, 4), (200, 5), (500, 6), (1000, 8), (2000, 10), (4000, 12), (6000, 15), (8000, 20))


@dataclass(frozen=True)
class PixelSearch(Counts):
    """Random pixels at the ends of what they may reach, exchanged for others where that raises the margin; in so many
    queries, the first point's included."""

    queries: int = 5000
    merit: ClassVar[Merit] = "margin"

    def __call__(self, task: Task, start: Tensor | None = None) -> None:
        def propose(task: Task, points: Tensor, query: int) -> Tensor:
            divisor = next((d for after, d in reversed(_DIVISORS) if query / self.queries > after / 10_000), 1)
            return _exchanged(task, points, _SHARE / divisor)

        search_at_random(task, lambda t: _exchanged(t, t.region.images, 1), start, self.queries, propose)


def _exchanged(task: Task, points: Tensor, share: float) -> Tensor:
    """Points in which a share of the pixels that may move, one at least, are others, each channel at a random end."""
    region, x = task.region, task.region.images
    signs = (points.to(x.dtype) - x).sign()
    moving = (signs != 0).any(1, keepdim=True)
    uniform = drawn(task, 2 + x.shape[1], *x.shape[2:])
    count = region.eps.floor().clamp(max=moving[0].numel())
    kept = moving & largest(torch.where(moving, uniform[:1], -1), count - (share * count).floor().clamp(min=1))
    others = ~kept & (region.masked(torch.ones_like(x)) > 0).any(1, keepdim=True)  # those that leave may come again
    new = others & largest(torch.where(others, uniform[1:2], -1), count - kept.sum((1, 2, 3), keepdim=True))
    signs = torch.where(kept, signs, torch.where(new, torch.where(uniform[2:] < 0.5, -1.0, 1.0).to(x), 0))
    return region.vertex(signs, kept | new)


class SparseRS(Attack, optimize="none"):
    """Sparse-RS in L0 (Croce et al. 2022, arXiv:2006.12834): random search over k pixels, without gradients::

        δ' = δ with some of its pixels back at the image, as many others at random corners;  δ = δ' if the margin rises

    A corner has each channel at one of the bounds. The share of pixels that are exchanged falls from 30 % to one.

    Args:
        model: as for `PGD`; it need not be differentiable.
        norm: "l0".
        eps: k, how many pixels may move, in whichever of their channels.
        queries: evaluations per sample, at least 1.
        **options: as for `PGD`, without those of gradients. What it climbs is the margin, whatever the `loss`.
    """

    norms: ClassVar[tuple[Norm, ...]] = ("l0",)

    def __init__(
        self, model: Model, norm: Norm = "l0", eps: float | Tensor = 24, queries: int = 5000, **options: Unpack[Options]
    ) -> None:
        super().__init__(model, norm, eps, PixelSearch(queries), **options)


class OrthoSparseRS(SparseRS, scope="image"):
    """`SparseRS` whose perturbation stays orthogonal to the image: in place of corners of the bounds it tries vertices
    of bounds and plane together, on the pixels chosen. Arguments as for `SparseRS`.
    """
