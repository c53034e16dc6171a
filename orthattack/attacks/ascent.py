"""The one loop of all gradient attacks here: climb a loss inside a region by a step rule, and score every iterate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orthattack.arguments import check_count, check_flag, check_real, plain_fields
from orthattack.attacks.rules import Ascent, StepRule
from orthattack.attacks.task import Merit, Task


@dataclass(frozen=True)
class Climb:
    """Ascents from one or more starts.

    Args:
        rule: how gradients become steps.
        rate: first step size in units of eps.
        alpha: or in pixel units, which overrides `rate`.
        steps, random_start, restarts: as for `orthattack.PGD`.
        merit: what makes a point the better one, the larger "loss" or "margin", or the smaller "norm".

    Raises:
        ValueError: a number out of its range.
    """

    rule: StepRule
    steps: int
    rate: float = 1.0
    alpha: float | None = None
    random_start: bool = False
    restarts: int = 1
    merit: Merit = "loss"

    def __post_init__(self) -> None:
        plain_fields(self)
        check_count("steps", self.steps)
        check_count("restarts", self.restarts)
        if self.alpha is not None:
            check_real("alpha", self.alpha, "a finite step size >= 0, in pixel units such as 2/255", low=0)
        check_flag("random_start", self.random_start)
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts={self.restarts} needs random_start=True: every restart would be the same")

    def options(self, eps: float | Tensor) -> dict[str, object]:
        alpha = float(self.alpha) if self.alpha is not None else self.rate * eps
        schedule = getattr(self.rule, "schedule", "fixed")
        return {
            "alpha": alpha,
            "steps": self.steps,
            **({"schedule": schedule} if schedule != "fixed" else {}),
            **({"restarts": self.restarts} if self.restarts > 1 else {}),
        }

    def __call__(self, task: Task, start: Tensor | None = None) -> None:
        for piece, begin in task.pieces(start):
            self._climb(piece, begin)

    def _climb(self, task: Task, start: Tensor | None) -> None:
        for attempt in range(self.restarts):
            if (left := task.unsolved() if task.early_stop else task) is None:
                return
            given = start if attempt == 0 else None
            if given is not None and left is not task:
                given = given[~task.best.success[task.index]]
            # No name for the starting points here: it would keep them in memory during the whole ascent.
            self._ascend(left, self._start(left, given))

    def _start(self, task: Task, given: Tensor | None) -> Tensor:
        if given is not None:
            return given
        if self.random_start:
            return task.random_start()
        return task.region.images.to(task.region.dtype).clone()

    def _ascend(self, task: Task, points: Tensor) -> None:
        """One ascent from `points`, the first and the last iterate scored like the others."""
        region = task.region
        alpha = self.rate * region.eps if self.alpha is None else torch.full_like(region.eps, float(self.alpha))
        ascent = Ascent(task, alpha.to(region.images.dtype), self.steps)
        del region
        state = self.rule.init(ascent, points)
        for step in range(self.steps + 1):
            evaluation = ascent.task.score(points, step, with_gradient=step < self.steps)
            if evaluation.gradient is None:
                return
            if task.early_stop and bool(evaluation.success.any()):
                left = (~evaluation.success).nonzero().squeeze(1)
                if len(left) == 0:
                    return
                ascent, points = ascent.select(left), points[left]
                state = {name: value[left] for name, value in state.items()}
                evaluation = evaluation.select(left)
            points, state = self.rule.update(ascent, state, points, evaluation, step)
            del evaluation  # its gradient is as large as the images


def rate(total: float, steps: int) -> float:
    """`total` over the steps; a wrong number of steps is left to `Climb` to refuse."""
    return total / steps if isinstance(steps, int) and steps > 0 else total
