"""Step rules: how an ascent turns gradients into its next point. Each is data, an init and an update.

A rule keeps what it must remember in a `State`, tensors with one row per sample, so that samples can be dropped from
the batch at any time. Every point that a rule returns lies in the region, and is scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from orthattack.arguments import check_choice, check_flag, check_real, is_number
from orthattack.attacks.scoring import Evaluation
from orthattack.threat import Region, ThreatModel

__all__ = ["Ascent", "AutoStep", "Reference", "Schedule", "ScheduledStep", "State", "StepRule"]

State = dict[str, Tensor]
Reference = Literal["clean", "iterate"]
Schedule = Literal["fixed", "linear", "cosine"]


@dataclass(frozen=True)
class Ascent:
    """Where a batch may go and how a direction becomes a step.

    Attributes:
        region: the allowed images.
        alpha: (N, 1, 1, 1) the first step size, in pixel units.
        steps: how many steps there will be.
        textbook: for ``enforce="gradient"``, what every direction is projected against; else None.
        reference: whether that projection is against the clean image or the iterate.
    """

    region: Region
    alpha: Tensor
    steps: int
    textbook: ThreatModel | None = None
    reference: Reference = "clean"

    def step(self, points: Tensor, direction: Tensor, alpha: Tensor, avoid: Tensor | None = None) -> Tensor:
        """`Region.step`, the direction projected first if that is all the orthogonality there is."""
        if self.textbook is not None:
            against = points if self.reference == "iterate" else self.region.images
            direction = self.textbook.tangent(direction.to(against.dtype), against)  # finer than a half-precision model
        return self.region.step(points, direction, alpha, avoid)

    def select(self, index: Tensor) -> Ascent:
        """The ascent of the samples at `index` only."""
        return replace(self, region=self.region.select(index), alpha=self.alpha[index])


class StepRule(Protocol):
    """What `Climb` asks of a rule."""

    def init(self, ascent: Ascent, points: Tensor) -> State:
        """What to remember before the first evaluation, each tensor with one row per sample."""

    def update(
        self, ascent: Ascent, state: State, points: Tensor, evaluation: Evaluation, step: int
    ) -> tuple[Tensor, State]:
        """The point after `points`, the iterate number `step` (from 0), and what to remember.

        `evaluation` is that of `points`, with a gradient.
        """


@dataclass(frozen=True)
class ScheduledStep:
    """Steps along the gradient or a momentum of it, of a size set in advance::

        v_{t+1} = momentum · v_t + ∇L(y_t) / mean|∇L(y_t)|
        x_{t+1} = step of size α_t from x_t along v_{t+1}
        y_{t+1} = x_{t+1}, or with Nesterov's momentum
                  L-infinity: the projection of x_{t+1} + α_t · momentum · v_{t+1}
                  L2, L1: a step of size α_t · momentum from x_{t+1} along v_{t+1}

    with α_t = α (fixed), α (1 - t/T) (linear) or α (1 + cos(π t/T)) / 2 (cosine). What is evaluated and scored are the
    y_t, and at the end x_T.

    Args:
        schedule: of the step size.
        momentum: 0 for none; MI-FGSM's decay is 1.
        nesterov: evaluate the gradient where the momentum leads.

    Source: Dong et al. 2018, arXiv:1710.06081 (MI); Lin et al. 2020, arXiv:1908.06281 (NI), whose look-ahead leaves the
    ball, while here it is projected, so that it counts as a candidate too. It is stated for L-infinity, whose unit is
    that of v, whose entries are about 1; in another norm so many entries of α are far more than α.
    """

    schedule: Schedule = "fixed"
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_real("momentum", self.momentum, "a finite number >= 0", low=0)
        check_flag("nesterov", self.nesterov)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=True needs a momentum > 0")

    def init(self, ascent: Ascent, points: Tensor) -> State:  # noqa: ARG002
        state = {}
        if self.momentum > 0:
            state["velocity"] = torch.zeros_like(points)
        if self.nesterov:
            state["base"] = points
        return state

    def update(
        self, ascent: Ascent, state: State, points: Tensor, evaluation: Evaluation, step: int
    ) -> tuple[Tensor, State]:
        assert evaluation.gradient is not None
        alpha = ascent.alpha * self._factor(step / ascent.steps)
        if self.momentum == 0:
            return ascent.step(points, evaluation.gradient, alpha, evaluation.avoid), state
        # In two divisions, for the mean of gradients of 1e-40 and of 1e38 is not a number of the same dtype.
        gradient = evaluation.gradient
        largest = gradient.abs().amax((1, 2, 3), keepdim=True)
        gradient = gradient / torch.where(largest > 0, largest, 1)
        mean = gradient.abs().mean((1, 2, 3), keepdim=True)
        velocity = self.momentum * state["velocity"] + gradient / torch.where(mean > 0, mean, 1)
        base = ascent.step(state.get("base", points), velocity, alpha, evaluation.avoid)
        state = {**state, "velocity": velocity}
        if not self.nesterov:
            return base, state
        state["base"] = base
        if step + 1 == ascent.steps:
            return base, state
        if ascent.region.threat.norm != "linf":
            return ascent.step(base, velocity, self.momentum * alpha, evaluation.avoid), state
        return ascent.region.project(torch.addcmul(base, velocity, alpha.to(base.dtype), value=self.momentum)), state

    def _factor(self, progress: float) -> float:
        if self.schedule == "linear":
            return 1 - progress
        return (1 + math.cos(math.pi * progress)) / 2 if self.schedule == "cosine" else 1.0


@dataclass(frozen=True)
class AutoStep:
    """The automatic schedule of APGD: large steps that are halved where they stop paying, and momentum::

        z_{t+1} = step of size α from x_t along ∇L(x_t)
        x_{t+1} = project(x_t + 3/4 (z_{t+1} - x_t) + 1/4 (x_t - x_{t-1}))

    At checkpoints, whose distance shrinks from 22 % of the steps to 6 %, each sample's α is halved, and the sample goes
    back to its best point so far, if the loss rose in no more than a share `rho` of the steps since the last one, or if
    neither α nor the best loss changed there.

    Args:
        rho: that share, in (0, 1).

    Source: Croce & Hein 2020, arXiv:2003.01690.
    """

    rho: float = 0.75

    def __post_init__(self) -> None:
        if not is_number(self.rho) or not 0 < self.rho < 1:
            raise ValueError(f"rho must lie in (0, 1); got {self.rho!r}")

    def init(self, ascent: Ascent, points: Tensor) -> State:
        n, device = len(points), points.device
        loss = torch.full((n,), -torch.inf, device=device, dtype=torch.promote_types(points.dtype, torch.float32))
        return {
            "alpha": ascent.alpha,
            "previous": points,
            "best": points,
            "best_gradient": torch.zeros_like(points),
            "best_loss": loss,
            "checked_loss": loss,
            "loss": loss,
            "rises": torch.zeros(n, dtype=torch.long, device=device),
            "halved": torch.ones(n, dtype=torch.bool, device=device),
        }

    def update(
        self, ascent: Ascent, state: State, points: Tensor, evaluation: Evaluation, step: int
    ) -> tuple[Tensor, State]:
        gradient, s = evaluation.gradient, dict(state)
        assert gradient is not None
        loss = evaluation.loss.to(s["loss"].dtype)
        if step > 0:
            s["rises"] = s["rises"] + (loss > s["loss"])
        s["loss"] = loss
        is_best = loss > s["best_loss"]
        s["best_loss"] = torch.where(is_best, loss, s["best_loss"])
        s["best"] = _where(is_best, points, s["best"])
        s["best_gradient"] = _where(is_best, gradient, s["best_gradient"])
        if step == 0:
            s["checked_loss"] = loss
        window = self.checkpoints(ascent.steps).get(step)
        if window is not None:
            oscillates = s["rises"] <= self.rho * window
            stalls = ~s["halved"] & (s["checked_loss"] >= s["best_loss"])
            halve = oscillates | stalls
            s["halved"], s["checked_loss"] = halve, s["best_loss"]
            s["rises"] = torch.zeros_like(s["rises"])
            s["alpha"] = torch.where(halve.view(-1, 1, 1, 1), s["alpha"] / 2, s["alpha"])
            points, gradient = _where(halve, s["best"], points), _where(halve, s["best_gradient"], gradient)
        target = ascent.step(points, gradient, s["alpha"], evaluation.avoid)
        if step > 0:
            mixed = points + 0.75 * (target - points) + 0.25 * (points - s["previous"])
            target = ascent.region.project(mixed)
        s["previous"] = points
        return target, s

    @staticmethod
    def checkpoints(steps: int) -> dict[int, int]:
        """The iterates at which to check, each with the number of steps since the one before."""
        window, smallest, less = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
        found, at = {}, window
        while at < steps:
            found[at] = window
            window = max(window - less, smallest)
            at += window
        return found


def _where(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(chosen.view(-1, 1, 1, 1), a, b)
