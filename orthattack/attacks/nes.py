"""NES: ascents along gradients that are estimated from scores, for models that give nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Unpack

from orthattack.arguments import check_count, check_real
from orthattack.attacks.ascent import Climb, rate
from orthattack.attacks.base import Attack, Options
from orthattack.attacks.numbers import Draws
from orthattack.attacks.rules import accumulated
from orthattack.attacks.scoring import Evaluation, LossFunction, Oracle, Scorer
from orthattack.losses import Goal
from orthattack.models import Model
from orthattack.threat import Norm


@dataclass(frozen=True)
class _Estimated(Scorer):
    """A scorer whose gradients are differences of losses at random points to both sides, and which differentiates
    nothing."""

    scorer: Oracle
    pairs: int
    sigma: float

    def evaluate(
        self, points: Tensor, goal: Goal, loss: LossFunction, solved: Tensor | None, with_gradient: bool, step: int = 0,
        draws: Draws | None = None, by_copy: bool = False,
    ) -> Evaluation:  # fmt: skip
        found = self.scorer.evaluate(points, goal, loss, solved, False, step, draws, by_copy)
        if not with_gradient:
            return found
        assert draws is not None
        gradient, calls = torch.zeros_like(points, dtype=torch.float32), found.forward_calls
        left, self.scorer.unchecked = self.scorer.unchecked, 0  # of the images: those are their neighbours
        for _ in range(self.pairs):
            noise = draws.normal(*points.shape[1:]).to(points)
            sides = []
            for sign in (1, -1):
                near = points + sign * self.sigma * noise
                sides.append(self.scorer.evaluate(near, goal, loss, None, False, step, draws))
                calls = calls + sides[-1].forward_calls
            rise = (sides[0].loss - sides[1].loss).float() / (2 * self.sigma * self.pairs)
            gradient += rise.nan_to_num().view(-1, 1, 1, 1) * noise
        self.scorer.unchecked = left
        return replace(found, gradient=gradient.to(points.dtype), forward_calls=calls)

    def judge(self, points: Tensor, goal: Goal, loss: LossFunction) -> Evaluation:
        return self.scorer.judge(points, goal, loss)

    def logits(self, points: Tensor, goal: Goal) -> Tensor:
        return self.scorer.logits(points, goal)


class NES(Attack, optimize="none"):
    """PGD along gradients estimated by natural evolution strategies (Ilyas et al. 2018, arXiv:1804.08598)::

        g = 1 / (2 σ n) Σ_i (L(x_t + σ u_i) - L(x_t - σ u_i)) u_i,   u_i normal, of the sample's own stream

    It asks for logits and nothing else, and takes as many steps as its queries allow: ``(queries - 1) // (2 n + 1)``.

    Args:
        model: as for `PGD`, like `norm`, `eps`, `alpha` and `momentum`; it need not be differentiable, and is asked
            outside the bounds too, by about σ.
        queries: evaluations per sample, at most; at least ``2 pairs + 2``, for one step.
        pairs: n, how many pairs of points an estimate takes, at least 1.
        sigma: σ, how far from the point they are, in pixel units.
        **options: as for `PGD`, without those of gradients.

    Raises:
        ValueError: an argument outside these.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    >>> result = NES(model, eps=8 / 255, queries=100, pairs=5).run(images, labels)
    >>> int(result.forward_calls.max()), int(result.gradient_calls.max())
    (100, 0)
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float | Tensor = 4 / 255,
        queries: int = 5000,
        pairs: int = 25,
        sigma: float = 1e-3,
        alpha: float | None = None,
        momentum: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        check_count("queries", queries)
        check_count("pairs", pairs)
        check_real("sigma", sigma, "a finite distance > 0, in pixel units", low=0, above=True)
        steps = (queries - 1) // (2 * pairs + 1)
        if steps < 1:
            raise ValueError(f"queries must be at least 2 * pairs + 2 = {2 * pairs + 2}, for one step; got {queries}")
        rule = accumulated("fixed", momentum, False)
        super().__init__(model, norm, eps, Climb(rule, steps, rate(2.5, steps), alpha), **options)
        self._estimate = pairs, float(sigma)

    def _scorer(self, oracle: Oracle, lent: Mapping[str, Model], is_random: bool) -> Scorer:  # noqa: ARG002
        return _Estimated(oracle, *self._estimate)


class OrthoNES(NES, scope="image"):
    """`NES` whose perturbation stays orthogonal to the image: its steps are the best ones along the estimate.
    Arguments as for `NES`.
    """
