"""The smallest perturbation that fools a model: an ascent whose ball shrinks where it is fooled and grows elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from orthattack.attacks.base import Attack, GradientOptions
from orthattack.attacks.bisection import Bisection
from orthattack.attacks.task import Counts, Merit, Task
from orthattack.losses import Goal
from orthattack.models import Model
from orthattack.threat import Norm, perturbation_norm
from orthattack.threat.norms import BALLS, unit

# Of the gradients the share that ascents towards single classes take, how many each takes at least, and how many
# classes there are usually: many gradients are for more. Chosen mostly on other images than docs/minimal-norm.md shows.
_EXPLORED: dict[Norm, tuple[float, int, int]] = {"linf": (0.45, 5, 9), "l2": (0.36, 4, 9), "l1": (0.36, 4, 9)}


@dataclass(frozen=True)
class _Best:
    """The smallest fooling points so far: what they are, and their norms, infinite where nothing has fooled."""

    points: Tensor
    norm: Tensor

    def offered(self, points: Tensor, norm: Tensor, success: Tensor) -> _Best:
        better = success & (norm < self.norm)
        return _Best(torch.where(better.view(-1, 1, 1, 1), points, self.points), torch.where(better, norm, self.norm))


@dataclass(frozen=True)
class Shrinking(Counts):
    """A short ascent towards each of the likeliest other classes, a long one from the smallest point that fooled, and
    in the end a few evaluations between this and the image; of so many `gradients`, see `MinimumNorm`."""

    gradients: int
    merit: ClassVar[Merit] = "norm"

    def __call__(self, task: Task, start: Tensor | None = None) -> None:
        for piece, begin in task.pieces(start):
            self._shrink(piece, begin)

    def _shrink(self, task: Task, start: Tensor | None) -> None:
        images = task.region.images.to(task.region.dtype)
        task.score(images.clone(), 0, with_gradient=False)
        if (left := task.unsolved()) is None:
            return
        if left is not task and start is not None:
            start = start[~task.best.success[task.index]]
        task, images = left, left.region.images
        passes, step = 2 * self.gradients - 1, 0
        best = _Best(images, torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device))
        if start is not None:
            found = task.score(start, 0, with_gradient=False)
            best, passes = best.offered(start, task.length(start), found.success), passes - 1
        share, fewest, usual = _EXPLORED[task.region.threat.norm]
        shared = int(share * self.gradients)
        most = max(min(usual, shared // fewest), shared // (4 * fewest))
        goals: list[Goal] = []  # the classes to ascend towards; none for targets or few gradients
        if task.goal.labels is not None and most > 0:
            task.best.count(task.index, 1)
            goals = task.towards(most)
        each = int(share * self.gradients / max(1, len(goals)))
        for goal in goals:
            best = _ascend(replace(task, goal=goal), images, best, each, step, fresh=True)
            passes, step = passes - 2 * each - 1, step + each
        passes -= len(goals) > 0  # for the logits
        evaluations = min(6, passes // 10)
        steps = max(1, (passes - evaluations - 1) // 2) if passes > 1 else 0
        begin = torch.where(best.norm.isfinite().view(-1, 1, 1, 1), best.points, images)
        best = _ascend(task, begin, best, steps, step)
        _pull(task, best, evaluations, step + steps)


def _ascend(task: Task, points: Tensor, best: _Best, steps: int, number: int, fresh: bool = False) -> _Best:
    """An ascent of so many steps, whose first is a radius long, the last a hundredth; `fresh`: as if nothing had fooled
    before."""
    region, norm = task.region, task.region.threat.norm
    x, largest = region.images, region.eps.flatten().clamp(max=region.threat.diameter(region.images.shape[1:]))
    radius = torch.full_like(largest, torch.inf) if fresh else best.norm
    ever = torch.zeros_like(radius, dtype=torch.bool) if fresh else best.norm.isfinite()
    velocity = torch.zeros_like(x)
    # With levels, what is asked about is rounded, and what moves is not, or short steps would come to nothing.
    level, rounds = region.threat.unit if norm == "linf" else 0.0, region.threat.levels is not None
    for step in range(steps + 1):
        moving = points
        points = region.stored(points.to(region.dtype))
        found = task.score(points, number + step, with_gradient=step < steps)
        points, length = points.to(x.dtype), task.length(points)
        best = best.offered(points, length, found.success)
        if found.gradient is None:
            break
        falling = (1 + math.cos(math.pi * step / steps)) / 2
        gamma, rate = 0.001 + 0.049 * falling, 0.01 + 0.99 * falling
        gradient = found.gradient.to(x.dtype)
        gradient = task.form(gradient, points, x) if task.form is not None else region.threat.tangent(gradient, x)
        slope = perturbation_norm(gradient.double(), BALLS[norm].dual).clamp(min=1e-30)
        # Where the boundary would be, were the loss linear; in L1 bounds soon stop the few pixels that this counts on.
        reached = length
        if rounds:
            points = moving.to(x.dtype)
            reached = length.maximum(task.length(points))
        edge = torch.maximum(reached + (2 if norm == "l1" else 1) * found.loss.double().abs() / slope, 1.01 * reached)
        smaller = torch.minimum(radius, length) * (1 - gamma)
        if level > 0:  # whole numbers of levels are all the radii there are
            edge, smaller = edge.maximum(length + level), smaller.clamp(min=level)
        radius = torch.where(found.success, smaller, torch.where(ever, radius * (1 + gamma), edge))
        ever = ever | found.success
        radius = radius.minimum(largest if fresh else largest.minimum((best.norm - level).clamp(min=level)))
        ball, alpha = region.resized(radius), (rate * radius).view(-1, 1, 1, 1).to(x.dtype)
        if norm == "l1":
            velocity = 0.7 * velocity + unit(gradient)
            points = ball.project(points + 0.6 * alpha * unit(velocity))
        else:
            points = ball.step(ball.shrunk(points), gradient, alpha)
        del ball, gradient, found
    return best


def _pull(task: Task, best: _Best, evaluations: int, number: int) -> None:
    """Bisect the last two hundredths of the way from the images to the best points."""
    images, wide = task.region.images, best.norm.isfinite()
    low = torch.full_like(best.norm, 0.98)
    high = torch.ones_like(low)
    for _ in range(evaluations):
        middle = (low + high) / 2
        points = task.region.shrunk(torch.lerp(images, best.points, middle.view(-1, 1, 1, 1).to(images.dtype)))
        success = task.score(points, number, with_gradient=False).success & wide
        low, high = torch.where(success, low, middle), torch.where(success, middle, high)


class MinimumNorm(Attack, loss="margin"):
    """The smallest perturbation that fools the model, in the manner of FMN and DDN::

        z_{t+1} = the step of size α_t r_{t+1} from x_t that gains the most along ∇L(x_t), in the ball of radius r_{t+1}
        r_{t+1} = (1 - γ_t) min(r_t, ‖x_t - x‖)   where x_t fools the model
                  (1 + γ_t) r_t                    where it does not, but something has, and at most the smallest norm
                  ‖x_t - x‖ + |L(x_t)| / ‖∇L(x_t)‖*   before anything has: where a linear L would reach 0

    with α_t and γ_t falling along half a cosine, and ‖·‖* the dual norm. Short ascents towards each of the likeliest
    other classes (untargeted) find out which of them is nearest; a long one goes on from the best point found, and a
    bisection of the last hundredths ends it. Every point that is scored counts.

    Args:
        model: as for `PGD`, like `norm`.
        eps: the largest radius allowed; None for none.
        gradients: budget of each sample, at least 1: so many gradients at most, and no more than twice as many
            passes, forward and backward, in all.
        **options: as for `PGD`; `early_stop` makes no difference.

    Raises:
        ValueError: an argument outside these; an attack in place of a model, which is for `Bisection`.

    Source: Pintor et al. 2021, arXiv:2102.12827 (FMN); Rony et al. 2019, arXiv:1811.09600 (DDN).
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float | Tensor | None = None,
        gradients: int = 100,
        **options: Unpack[GradientOptions],
    ) -> None:
        if isinstance(model, Attack | Bisection):
            raise ValueError(
                f"MinimumNorm searches by itself and needs a model; got {type(model).__name__}: for the smallest eps "
                f"at which an attack succeeds use Bisection({type(model).__name__}(...))"
            )
        super().__init__(model, norm, eps, Shrinking(gradients), **options)


class OrthoMinimumNorm(MinimumNorm, scope="image"):
    """`MinimumNorm` whose perturbation stays orthogonal to the image, exactly and at every step. Arguments as for
    `MinimumNorm`.
    """
