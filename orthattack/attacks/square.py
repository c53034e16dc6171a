"""Square attack: a random search that asks for nothing but logits, so that masked gradients cannot stop it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from orthattack.arguments import uploaded
from orthattack.attacks.base import Attack, Options
from orthattack.attacks.task import Counts, Merit, Task
from orthattack.losses import attack_loss
from orthattack.models import Model
from orthattack.projection import reciprocal
from orthattack.threat import Norm, Region, perturbation_norm

# Part of the image's area that the first squares cover, and after which share of the queries it is halved
# (Andriushchenko et al. 2020, for 10,000 queries).
_SHARE = 0.8
_HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class SquareSearch(Counts):
    """Random squares, kept where they raise the margin, and projected onto the region before they are tried.

    All samples of a batch get the same squares: that makes no difference to any of them, needs no loop over samples,
    and what becomes of a sample does not depend on its batch. The first point counts as one of the `queries`. A faster
    copy of the model is asked, if there is one; what it calls a success the model confirms, with one more evaluation.
    """

    queries: int = 5000
    merit: ClassVar[Merit] = "margin"

    def __call__(self, task: Task, start: Tensor | None = None) -> None:
        def propose(task: Task, points: Tensor, query: int) -> Tensor:
            change = _stamped if task.region.threat.norm == "linf" else _moved
            return change(task, points, self._side(query, [len(part) for part in _framed(task)]))

        search_at_random(task, _stripes, start, self.queries, propose, by_copy=True)

    def _side(self, query: int, size: Sequence[int]) -> int:
        """The side of the squares at a query."""
        halvings = sum(query > share * self.queries for share in _HALVINGS)
        height, width = size
        side = round(math.sqrt(_SHARE / 2**halvings * height * width))
        return min(max(side, 1), height, width)


def search_at_random(
    task: Task, begin: Callable[[Task], Tensor], start: Tensor | None, queries: int,
    propose: Callable[[Task, Tensor, int], Tensor], by_copy: bool = False,
) -> None:  # fmt: skip
    """Score the start, or what `begin` makes, and then what `propose` makes of the best points and the number of the
    last query; keep what raises the margin."""
    left = task.unsolved() if task.early_stop else task
    if left is None:
        return
    if start is not None and left is not task:
        start = start[~task.best.success[task.index]]
    for piece, own in replace(left, loss=attack_loss("margin")).pieces(start):
        _search(piece, begin, own, queries, propose, by_copy)


def _search(
    task: Task, begin: Callable[[Task], Tensor], start: Tensor | None, queries: int,
    propose: Callable[[Task, Tensor, int], Tensor], by_copy: bool,
) -> None:  # fmt: skip
    points = begin(task) if start is None else start
    margin = torch.full((len(points),), -torch.inf, device=points.device)
    tried = points
    for query in range(queries):
        evaluation = task.score(tried, query, with_gradient=False, by_copy=by_copy)
        better = evaluation.loss > margin  # towards a class where there is one
        margin = torch.where(better, evaluation.loss.to(margin.dtype), margin)
        points = torch.where(better.view(-1, 1, 1, 1), tried, points)
        if task.early_stop and bool(evaluation.success.any()):
            rows = (~evaluation.success).nonzero().squeeze(1)
            if len(rows) == 0:
                return
            task, points, margin = task.select(rows), points[rows], margin[rows]
        if query + 1 < queries:
            tried = propose(task, points, query)


def drawn(task: Task, *shape: int) -> Tensor:
    """Uniform numbers in [0, 1), drawn where the generator is, so that they are the same on every device."""
    images = task.region.images
    return uploaded(task.uniform(*shape).to(images.dtype), images.device)


def _signs(task: Task, *shape: int) -> Tensor:
    return torch.where(drawn(task, *shape) < 0.5, -1.0, 1.0).to(task.region.images)


def _framed(task: Task) -> tuple[range, range]:
    """The rows and the columns that squares lie in: those of the mask, if it is the same for all images."""
    height, width = task.region.images.shape[-2:]
    rows, columns = task.region.threat.frame
    return range(height)[rows], range(width)[columns]


def _window(task: Task, side: int) -> tuple[slice, slice]:
    rows, columns = _framed(task)
    uniform = task.uniform(2).to(task.region.images.dtype).tolist()
    top, left = (part.start + int(u * (len(part) - side + 1)) for u, part in zip(uniform, (rows, columns), strict=True))
    return slice(top, top + side), slice(left, left + side)


def _stripes(task: Task) -> Tensor:
    """Vertical stripes of the largest perturbation, the start of the published attack."""
    region = task.region
    signs = _signs(task, 1, region.images.shape[1], 1, region.images.shape[3])
    return region.project(region.images + _filled(region, region.masked(signs.expand_as(region.images))))


def _filled(region: Region, pattern: Tensor) -> Tensor:
    """A pattern scaled to the radius."""
    length = perturbation_norm(pattern.double(), region.threat.norm).view(-1, 1, 1, 1)
    filled: Tensor = pattern * (region.eps * reciprocal(length)).to(pattern.dtype)
    return filled


def _stamped(task: Task, points: Tensor, side: int) -> Tensor:
    """L-infinity: in one square, each channel at +eps or -eps."""
    region = task.region
    rows, columns = _window(task, side)
    signs = _signs(task, 1, points.shape[1], 1, 1)
    tried = points.to(region.images.dtype, copy=True)
    eps = region.eps.to(tried.dtype)
    tried[..., rows, columns] = region.images[..., rows, columns] + eps * signs
    return region.project(tried.clamp_(*region.threat.bounds))


def _moved(task: Task, points: Tensor, side: int) -> Tensor:
    """L2 and L1: the perturbation of one square is moved to another, with a random bump, and what is left of the
    radius is used up."""
    region = task.region
    order = 2 if region.threat.norm == "l2" else 1
    delta = points.to(region.images.dtype) - region.images
    to_rows, to_columns = _window(task, side)
    from_rows, from_columns = _window(task, side)
    target, source = delta[..., to_rows, to_columns], delta[..., from_rows, from_columns]

    def power(values: Tensor, dims: tuple[int, ...]) -> Tensor:
        return values.double().abs().pow(order).sum(dims, keepdim=True)

    unused = (region.eps.pow(order) - power(delta, (1, 2, 3))).clamp(min=0) / delta.shape[1]
    budget = (unused + power(target, (2, 3)) + power(source, (2, 3))).pow(1 / order)
    bump = uploaded(_bump(side).to(delta.dtype), delta.device) * _signs(task, 1, delta.shape[1], 1, 1)
    kept = target * reciprocal(power(target, (2, 3)).pow(1 / order)).to(delta.dtype)
    pattern = bump * reciprocal(power(bump, (2, 3)).pow(1 / order)).to(delta.dtype) + kept
    pattern = pattern * (budget * reciprocal(power(pattern, (2, 3)).pow(1 / order))).to(delta.dtype)
    tried = delta.clone()
    tried[..., from_rows, from_columns] = 0
    tried[..., to_rows, to_columns] = pattern
    return region.project((region.images + tried).clamp_(*region.threat.bounds))


def _bump(side: int) -> Tensor:
    """(side, side): two opposite peaks, one above the other, that fall off with the square of the distance."""
    at = torch.arange(side, dtype=torch.float64)
    upper = (side + 1) // 2

    def peak(height: int) -> Tensor:
        distance2 = (at[:height, None] - (height - 1) / 2) ** 2 + (at[None] - (side - 1) / 2) ** 2
        return 1 / (1 + distance2)

    return torch.cat([peak(upper), -peak(side - upper)])


class Square(Attack, optimize="none"):
    """Square attack (Andriushchenko et al. 2020, arXiv:1912.00049): random search over squares, without gradients::

        δ' = δ with a random square set to ±eps;   δ = δ' if the margin rises

    The square's area falls from 80 % of the image to a few pixels. For L2 and L1 the perturbation of one square moves
    to another. It needs no gradient, so where it beats a gradient attack the gradients are masked.

    Args:
        model: as for `PGD`, like `norm` and `eps`; it need not be differentiable.
        queries: evaluations per sample, at least 1.
        **options: as for `PGD`, without those of gradients. What it climbs is the margin, whatever the `loss`.
            ``optimize="auto"`` scores by the faster copy; the model confirms what that calls a success, in an
            evaluation more than `queries`.
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float | Tensor = 4 / 255,
        queries: int = 5000,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, norm, eps, SquareSearch(queries), **options)


class OrthoSquare(Square, scope="image"):
    """`Square` whose perturbation stays orthogonal to the image: each proposal is projected before it is tried.
    Arguments as for `Square`.
    """
