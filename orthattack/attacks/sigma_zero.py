"""σ-zero: the fewest pixels, by gradients of a smooth count of them and a threshold that leaves the rest out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from orthattack.attacks.ascent import Climb
from orthattack.attacks.base import Attack, GradientOptions, unlimited
from orthattack.attacks.rules import Ascent, State
from orthattack.attacks.scoring import Evaluation
from orthattack.attacks.task import Counts, Merit, Task
from orthattack.models import Model
from orthattack.threat import Norm

# As published, relative to the bounds' distance: how smooth the count is, the first threshold, how fast it changes in
# units of the step size, which falls from 1 to 0.1; and Adam's two decays.
_SIGMA, _FIRST, _RATE, _DECAYS = 1e-3, 0.3, 0.01, (0.9, 0.999)


@dataclass(frozen=True)
class Threshold:
    """A step rule: Adam along the margin, until it is reached, and against a count of pixels; then those that have gone
    less far than a threshold go back to the image, and the others onto the region."""

    def init(self, ascent: Ascent, points: Tensor) -> State:  # noqa: ARG002
        none = torch.zeros_like(ascent.region.images)
        return {"mean": none, "square": none, "tau": torch.full_like(none[:, :1, :1, :1], _FIRST)}

    def update(
        self, ascent: Ascent, state: State, points: Tensor, evaluation: Evaluation, step: int
    ) -> tuple[Tensor, State]:
        region, form, gradient = ascent.region, ascent.task.form, evaluation.gradient
        assert gradient is not None
        x, (low, high) = region.images, region.threat.bounds
        delta = (points.to(x.dtype) - x) / (high - low)
        fools = (evaluation.margin > 0).view(-1, 1, 1, 1)  # whatever the radius
        size = delta.square().sum(1, keepdim=True)
        fewer = 2 * _SIGMA * delta / (size + _SIGMA).square() / size[0].numel()
        g = torch.where(fools, 0, gradient.to(x.dtype) * (high - low)) - region.masked(fewer)
        g = region.threat.tangent(g, x) if form is None else form(g, points, x)
        g = g / g.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
        mean = state["mean"].lerp(g, 1 - _DECAYS[0])
        square = state["square"].lerp(g.square(), 1 - _DECAYS[1])
        unbiased = [part / (1 - decay ** (step + 1)) for part, decay in zip((mean, square), _DECAYS, strict=True)]
        now, then = (0.55 + 0.45 * math.cos(math.pi * at / ascent.steps) for at in (max(step - 1, 0), step))
        moved = delta + now * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
        moved = moved.clamp((low - x) / (high - low), (high - x) / (high - low))
        tau = (state["tau"] + torch.where(fools, 1, -1) * _RATE * then).clamp(0, 1)
        pixels = moved.abs().amax(1, keepdim=True) >= tau
        return region.nearest(x + moved * (high - low), pixels), {"mean": mean, "square": square, "tau": tau}


@dataclass(frozen=True)
class FewestPixels(Counts):
    """One ascent by `Threshold`, of so many steps; of its points, with any number of pixels, those within eps count."""

    steps: int = 100
    merit: ClassVar[Merit] = "norm"

    def __call__(self, task: Task, start: Tensor | None = None) -> None:
        for piece, begin in task.pieces(start):
            Climb(Threshold(), self.steps, alpha=0.0)(unlimited(piece), begin)


class SigmaZero(Attack, loss="margin"):
    """σ-zero (Cinà et al. 2025, arXiv:2402.01879): the fewest pixels that fool the model, without a radius::

        g_t     = ∇ (min(L, 0) - mean_p ‖δ_p‖² / (‖δ_p‖² + σ)) at δ_t, at length 1 in L-infinity
        δ_{t+1} = clip(δ_t + α_t Adam(g_t)), 0 in the pixels p that have moved by less than τ_t
        τ_{t+1} = τ_t + 0.01 α_t where δ_t fools the model, τ_t - 0.01 α_t where it does not

    Args:
        model: as for `PGD`.
        norm: "l0", which counts pixels, whatever moves in their channels.
        eps: the most pixels that count as a success; None for any number.
        steps: gradient steps, at least 1. The first have size 1, relative to the bounds, the last 0.1, whatever their
            number.
        **options: as for `PGD`.
    """

    norms: ClassVar[tuple[Norm, ...]] = ("l0",)

    def __init__(
        self, model: Model, norm: Norm = "l0", eps: float | Tensor | None = None, steps: int = 100,
        **options: Unpack[GradientOptions],
    ) -> None:  # fmt: skip
        super().__init__(model, norm, eps, FewestPixels(steps), **options)


class OrthoSigmaZero(SigmaZero, scope="image"):
    """`SigmaZero` whose perturbation stays orthogonal to the image: after the threshold, each point goes to the nearest
    one of bounds and plane in which the same pixels move. Arguments as for `SigmaZero`.
    """
