"""FAB: the smallest perturbation, by steps to the nearest points of a boundary as the gradient draws it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from orthattack.attacks.ascent import Climb
from orthattack.attacks.base import Attack, GradientOptions, unlimited
from orthattack.attacks.rules import Ascent, State, Stateless
from orthattack.attacks.scoring import Evaluation
from orthattack.attacks.task import Counts, Merit, Task
from orthattack.losses import Goal
from orthattack.models import Model
from orthattack.projection import IMAGE, dot, reciprocal
from orthattack.threat import Norm, Region, perturbation_norm
from orthattack.threat.norms import BALLS

# As published: the largest a; how far beyond the boundary a step ends, relative to the way to it; how far from the
# image it starts where the point fools, relative to the perturbation.
_BIAS, _OVERSHOOT, _BACK = 0.1, 1.05, 0.9
# How often a step's size is corrected, and how close to the boundary, relative to the way, is close enough.
_CORRECTIONS = 4
_NEAR = 0.01


@dataclass(frozen=True)
class Boundary(Stateless):
    """A step rule: to where the loss, taken as linear, is 0, from the point and from the image, and a mixture of both::

        x_{t+1} = (1 - a) N(y_t) + a N(x),   N(s) = the point nearest to s at which the loss is 0, or a little beyond
        y_t     = x_t or, where that fools, x + 0.9 (x_t - x)
        a       = min(0.1, ‖N(y_t) - y_t‖ / (‖N(y_t) - y_t‖ + ‖N(x) - x‖))

    The nearest point is that of the bounds and of what the region is orthogonal to: the end of the best step of the
    smallest size that gains enough (`Region.step`). A mixture of two allowed points is allowed.

    Source: Croce & Hein 2020, arXiv:1907.02044.
    """

    def update(
        self, ascent: Ascent, state: State, points: Tensor, evaluation: Evaluation, step: int  # noqa: ARG002
    ) -> tuple[Tensor, State]:  # fmt: skip
        region, gradient, form = ascent.region, evaluation.gradient, ascent.task.form
        assert gradient is not None
        images, points = region.images, points.to(region.images.dtype)
        g = gradient if form is None else form(gradient, points, images)
        g = g.to(images.dtype)
        fools = (evaluation.margin > 0).view(-1, 1, 1, 1)
        start = torch.where(fools, torch.lerp(images, points, _BACK), points)
        missing = -evaluation.loss.double().view(-1, 1, 1, 1)
        ends, ways = [], []
        for origin in (start, images):
            needed = _OVERSHOOT * (missing - dot(g.double(), origin.double() - points.double(), IMAGE))
            ends.append(_reached(region, origin, g, needed))
            ways.append(perturbation_norm(ends[-1].to(images.dtype) - origin, region.threat.norm).view(-1, 1, 1, 1))
        share = (ways[0] * reciprocal(ways[0] + ways[1])).clamp(max=_BIAS)
        return region.project(torch.lerp(ends[0].to(images.dtype), ends[1].to(images.dtype), share)), {}


def _reached(region: Region, start: Tensor, gradient: Tensor, needed: Tensor) -> Tensor:
    """The end of the smallest step from `start` along which the `gradient` gains what is `needed`, (N, 1, 1, 1), or
    all it can; a negative gain is a step the other way.

    What a step gains is concave in its size, and proportional to it until bounds are met, so that a secant is there in
    a step or two.
    """
    threat = region.threat
    g, needed = gradient * needed.sign().to(gradient.dtype), needed.abs()
    largest = threat.diameter(start.shape[1:])
    tangent = threat.tangent(g, region.images)
    alpha = needed * reciprocal(perturbation_norm(tangent.double(), BALLS[threat.norm].dual).view(-1, 1, 1, 1))
    alpha, before, last = alpha.clamp(max=largest), torch.zeros_like(needed), torch.zeros_like(needed)
    end, asks = start, not start.is_cuda  # which would stop the GPU
    for trial in range(_CORRECTIONS):
        end = region.step(start, g, alpha.to(start.dtype), count=1)
        gain = dot(g.double(), end.double() - start.double(), IMAGE)
        short = (gain - needed).abs() > _NEAR * needed
        if trial + 1 == _CORRECTIONS or (asks and not bool(short.any())):
            break
        more = (needed - gain) * (alpha - last) * reciprocal(gain - before)
        last, before = torch.where(short, alpha, last), torch.where(short, gain, before)
        alpha = torch.where(short, (alpha + more).clamp(0, largest), alpha)
    return end


def _lead(logits: Tensor, goal: Goal) -> Tensor:
    """How far the target is ahead of the label, whatever the other classes; without both of them, the margin."""
    if goal.labels is None or goal.targets is None:
        return goal.margin(logits)
    chosen = logits.gather(1, torch.stack([goal.targets, goal.labels], 1))
    return chosen[:, 0] - chosen[:, 1] - goal.confidence


@dataclass(frozen=True)
class BoundarySearch(Counts):
    """Walks along boundaries, see `FAB`, with points of any norm; only those within the radius count."""

    steps: int = 100
    restarts: int = 1
    targets: int | None = None
    merit: ClassVar[Merit] = "norm"

    def __call__(self, task: Task, start: Tensor | None = None) -> None:
        climb = Climb(Boundary(), self.steps, alpha=0.0)
        for piece, own in task.pieces(start):
            wide = replace(unlimited(piece), loss=_lead)
            for goal in [wide.goal] if self.targets is None else wide.towards(self.targets):
                for attempt in range(self.restarts):
                    climb(replace(wide, goal=goal), own if attempt == 0 else _around_the_image(wide))


def _around_the_image(task: Task) -> Tensor:
    """Random points of half the radius, or half as far as the best that fools."""
    region, images = task.region, task.region.images
    assert task.limit is not None
    found = task.length(task.best.adversarials[task.index])
    largest = torch.full_like(found, region.threat.diameter(images.shape[1:]))
    radius = torch.minimum(torch.where(task.best.success[task.index], found, largest), task.limit.flatten())
    near = replace(region.threat, eps=radius / 2).around(images.to(region.dtype))
    return replace(task, around=near).random_start()


class FAB(Attack):
    """The fast adaptive boundary attack (Croce & Hein 2020, arXiv:1907.02044): no radius, no step size::

        x_{t+1} = (1 - a) N(x_t) + a N(x)      N(s): the nearest point to s of the boundary, linearised at x_t

    It minimises the norm, of whatever scale the gradient is. The boundary is that to the likeliest other class, or with
    `targets` to each of so many in turn (FAB-T). `AttackResult.loss` is the margin.

    Args:
        model: as for `PGD`, like `norm`.
        eps: the largest norm that counts as a success; None for any.
        steps: gradient steps per restart and target, at least 1.
        restarts: the first from the image, the others from random points half as far as the radius, or as what has been
            found.
        targets: how many of the likeliest other classes to go to, one after the other; None: to the likeliest at each
            step.
        **options: as for `PGD`; `loss` makes no difference.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    >>> images = torch.rand(4, 3, 2, 2)
    >>> result = FAB(model, "l2", steps=10).run(images, model(images).argmax(1))
    >>> bool((result.norm[result.success] > 0).all())
    True
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float | Tensor | None = None,
        steps: int = 100,
        restarts: int = 1,
        targets: int | None = None,
        **options: Unpack[GradientOptions],
    ) -> None:
        super().__init__(model, norm, eps, BoundarySearch(steps, restarts, targets), **options)


class OrthoFAB(FAB, scope="image"):
    """`FAB` whose perturbation stays orthogonal to the image: its nearest points are those of bounds, plane and
    boundary. Arguments as for `FAB`.
    """
