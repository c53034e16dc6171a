"""HopSkipJump: the smallest perturbation, for models that say which class they see and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from orthattack.arguments import warn
from orthattack.assumptions import Observer
from orthattack.attacks.base import Attack, Options, unlimited
from orthattack.attacks.task import Counts, Merit, Task
from orthattack.losses import Goal, attack_loss
from orthattack.models import Model
from orthattack.threat import Norm
from orthattack.threat.norms import unit

# How far from the boundary the directions are probed, in L2 and relative to the perturbation; how many sizes of a step,
# and how many random points to begin with, are tried; the size of the coarse ones.
_REACH, _HALVINGS, _TRIES, _COARSE = 0.03, 10, 1000, (4, 4)


class _Decision(Goal):
    """A goal that is told no scores: the margin is 1 where it is reached, and -1 elsewhere."""

    def margin(self, logits: Tensor) -> Tensor:
        beyond = super().margin(logits)
        return torch.where(beyond.isfinite(), beyond.sign(), beyond)


@dataclass
class _Walk:
    """Samples on their way along the boundary: where each is, whether beyond it, and how many queries it has left."""

    task: Task
    points: Tensor
    beyond: Tensor
    left: Tensor

    def only(self, rows: Tensor) -> _Walk | None:
        """The samples at `rows`, (n,) bool, alone; None if there are none."""
        own = self.points[rows], self.beyond[rows], self.left[rows]
        return _Walk(self.task.select(rows.nonzero().squeeze(1)), *own) if len(own[0]) > 0 else None

    def fools(self, points: Tensor, step: int, asked: Tensor) -> Tensor:
        """(n,) whether `points` fool the model; False where that was not `asked`, or no query is left for it."""
        told = torch.zeros_like(asked)
        rows = (asked & (self.left > 0)).nonzero().squeeze(1)
        if len(rows) > 0:
            is_whole = len(rows) == len(asked)
            task, points = (self.task, points) if is_whole else (self.task.select(rows), points[rows])
            found = task.score(points, step, with_gradient=False)
            self.left[rows] -= found.forward_calls
            told[rows] = found.success | (found.margin > 0)  # beyond the radius there is no success
        return told


@dataclass(frozen=True)
class JumpSearch(Counts):
    """Walks along the boundary, see `HopSkipJump`."""

    queries: int = 5000
    probes: int = 100
    merit: ClassVar[Merit] = "norm"

    def __call__(self, task: Task, start: Tensor | None = None) -> None:
        lost = sum(self._jump(piece, begin) for piece, begin in task.pieces(start))
        if lost > 0:
            warn(
                f"no random point fools the model, of {_TRIES} or as many as the queries allow, for {lost} of "
                f"{len(task.index)} images: they come back as they are, which is no sign of robustness. Pass images of "
                "other classes, or of the targets, to begin with: run(images, labels, start=others)"
            )

    def _jump(self, task: Task, start: Tensor | None) -> int:
        """Walk with all samples; how many there are that nothing fools to begin with."""
        task = replace(unlimited(task), goal=_Decision(**vars(task.goal)), loss=attack_loss("margin"))
        images = task.region.images.to(task.region.dtype)
        left = torch.full_like(task.index, self.queries)
        (walk, lost), step = _begun(_Walk(task, images, left < 0, left), start), 1
        bisections = math.ceil(math.log2(math.sqrt(images[0].numel()) / _REACH))
        while walk is not None:
            _return(walk, bisections, step)
            going = walk.left > bisections + 1
            if task.early_stop:
                going &= ~task.best.success[walk.task.index]
            if (walk := walk.only(going)) is not None:
                counts = (walk.left - bisections - 1).clamp(max=int(self.probes * math.sqrt(step)))
                _jump(walk, _way_out(walk, counts, step), step)
            step += 1
        return lost


def _begun(walk: _Walk, start: Tensor | None) -> tuple[_Walk | None, int]:
    """The samples that the model is right on, at points that fool it: at `start`, or at random ones between image and
    noise. Those without such a point, so many, come back as they are."""
    task, images = walk.task, walk.points
    region, (low, high) = task.region, task.region.threat.bounds
    right = ~walk.fools(images, 0, ~walk.beyond)
    for attempt in range(_TRIES):
        todo = right & ~walk.beyond & (walk.left > 0)
        if len(rows := todo.nonzero().squeeze(1)) == 0:
            break
        if attempt > 0 or start is None:
            draws = replace(task, index=task.index[rows]).draws
            size, own = images.shape[2:], images[rows].to(region.images.dtype)
            noise = draws.uniform(images.shape[1], *(size if attempt % 2 == 0 else _COARSE))
            noise = low + (high - low) * nn.functional.interpolate(noise, size)
            tried = images.to(own.dtype, copy=True).index_copy_(0, rows, own.lerp(noise, 1 - draws.uniform(1, 1, 1)))
        else:
            tried = start
        tried = region.stored(region.project(tried))
        walk.beyond |= walk.fools(tried, 0, todo)
        walk.points = torch.where(_each(walk.beyond & todo), tried, walk.points)
    lost = (right & ~walk.beyond).nonzero().squeeze(1)
    task.best.adversarials[task.index[lost]] = images[lost]
    return walk.only(walk.beyond), len(lost)


def _return(walk: _Walk, bisections: int, step: int) -> None:
    """Back to the boundary, where points are beyond it: the smallest ball about the image whose nearest point fools."""
    region, far = walk.task.region, walk.points
    radius, asked = walk.task.length(far), walk.beyond
    low, high = torch.zeros_like(radius), torch.ones_like(radius)
    for _ in range(bisections):
        middle = (low + high) / 2
        tried = region.stored(region.resized(middle * radius).project(far))
        fools = walk.fools(tried, step, asked)
        walk.points = torch.where(_each(fools), tried, walk.points)
        low, high = torch.where(fools, low, middle), torch.where(fools, middle, high)
    walk.beyond = torch.zeros_like(asked)


def _way_out(walk: _Walk, counts: Tensor, step: int) -> Tensor:
    """The direction v in which the model is fooled, of so many points, (n,); without the mean where all φ are alike."""
    region, points = walk.task.region, walk.points.to(walk.task.region.images.dtype)
    # On the grid of what is stored, points have to be so far apart that they differ.
    grain = region.threat.unit or torch.finfo(region.dtype).eps
    least = 0.5 * grain * math.sqrt(points[0].numel())
    reach = (_REACH * walk.task.length(points, "l2")).clamp(min=least).to(points.dtype)
    signed, plain, signs = torch.zeros_like(points), torch.zeros_like(points), torch.zeros_like(reach)
    for k in range(int(counts.max())):
        noise = unit(walk.task.draws.normal(*points.shape[1:]))
        near, asked = region.stored(region.project(points + _each(reach) * noise)), counts > k
        sign = (2.0 * walk.fools(near, step, asked) - 1) * asked
        way = near.to(points.dtype) - points
        signed, plain, signs = signed + _each(sign) * way, plain + _each(asked) * way, signs + sign
    mean = signs / counts
    return signed - _each(mean * (mean.abs() < 1)) * plain


def _jump(walk: _Walk, way: Tensor, step: int) -> None:
    """The largest step along the direction that fools, of some sizes, each half of the last."""
    region, points = walk.task.region, walk.points
    alpha = _each(walk.task.length(points) / math.sqrt(step)).to(way.dtype)
    for halved in range(_HALVINGS):
        if bool(walk.beyond.all()):
            return
        tried = region.stored(region.step(points, way, alpha / 2**halved))
        fools = walk.fools(tried, step, ~walk.beyond)
        walk.points = torch.where(_each(fools), tried, walk.points)
        walk.beyond = walk.beyond | fools


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)  # for images


class HopSkipJump(Attack, optimize="none"):
    """HopSkipJump (Chen, Jordan & Wainwright 2020, arXiv:1904.02144): the smallest norm, from decisions alone::

        x_t     = the point nearest to y_t, which fools, in the smallest ball about the image where that fools too
        v       = Σ_k (φ_k - mean(φ)) u_k,  φ_k = 1 if x_t + u_k fools, else -1;  u_k random, of length 0.03 ‖x_t - x‖₂
        y_{t+1} = the best step from x_t along v of size ‖x_t - x‖ / (√t 2^j), with the smallest j for which it fools

    The model may return anything whose largest entry is the class, such as one-hot rows: scores make no difference. The
    first y is random, between the image and noise, or the `start` of `run`.

    Args:
        model: as for `PGD`, like `norm`; it need not be differentiable.
        eps: the largest norm that counts as a success; None for any.
        queries: evaluations per sample, at most, at least 1. What confirms the answers of a model that draws at random
            may add ten.
        probes: how many u the first v is made of, at least 1; the t-th is of √t times as many.
        **options: as for `PGD`, without those of gradients; `loss` makes no difference.

    >>> _ = torch.manual_seed(1)
    >>> linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    >>> decide = lambda x: torch.nn.functional.one_hot(linear(x).argmax(1), 3).float()
    >>> images = torch.rand(4, 3, 2, 2)
    >>> result = HopSkipJump(decide, "l2", queries=300, probes=20).run(images, linear(images).argmax(1))
    >>> bool((result.forward_calls <= 300).all()), int(result.gradient_calls.max())
    (True, 0)
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float | Tensor | None = None,
        queries: int = 5000,
        probes: int = 100,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, norm, eps, JumpSearch(queries, probes), **options)
        self._observer = Observer({"probabilities"})  # which decisions look like


class OrthoHopSkipJump(HopSkipJump, scope="image"):
    """`HopSkipJump` whose perturbation stays orthogonal to the image: all points that the model is asked about are.
    Arguments as for `HopSkipJump`.
    """
