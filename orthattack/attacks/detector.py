"""Evading a detector: fool the classifier and stay below a detector's threshold, two losses at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import Unpack

from orthattack.arguments import check_choice, check_count, check_model, check_real
from orthattack.assumptions import DRAWS, NEEDED, Observer
from orthattack.attacks.ascent import Climb, rate
from orthattack.attacks.base import Attack, GradientOptions
from orthattack.attacks.gradient_form import Enforce
from orthattack.attacks.numbers import Draws
from orthattack.attacks.rules import Ascent, State, Stateless
from orthattack.attacks.scoring import Evaluation, LossFunction, Oracle, Scorer, input_gradient
from orthattack.losses import Goal
from orthattack.models import Model
from orthattack.projection import is_fine, orthogonalize
from orthattack.threat import Norm

Mode = Literal["orthogonal", "selective"]


@dataclass(frozen=True)
class _BothEvaluated(Evaluation):
    """The classifier and the detector at a batch of points."""

    avoid: Tensor | None = None  # (N, C, H, W) the other's gradient, to which the step should be orthogonal


@dataclass(frozen=True)
class _AvoidingStep(Stateless):
    """The step rule: along one gradient and, if asked, orthogonal to the other."""

    def update(
        self,
        ascent: Ascent,
        state: State,
        points: Tensor,
        evaluation: Evaluation,
        step: int,  # noqa: ARG002
    ) -> tuple[Tensor, State]:
        assert isinstance(evaluation, _BothEvaluated)
        assert evaluation.gradient is not None
        if evaluation.avoid is None:
            return ascent.step(points, evaluation.gradient, ascent.alpha), state
        return ascent.region.step(points, evaluation.gradient, ascent.alpha, evaluation.avoid), state


@dataclass(frozen=True)
class _DetectorOracle(Scorer):
    """A classifier and a detector as one oracle: success needs both, each gradient is that of one of them."""

    classifier: Scorer
    detector: Model
    is_random: bool
    samples: int
    threshold: float
    mode: Mode
    every: int | None
    enforce: Enforce

    def evaluate(
        self, points: Tensor, goal: Goal, loss: LossFunction, solved: Tensor | None, with_gradient: bool, step: int = 0,
        draws: Draws | None = None, by_copy: bool = False,
    ) -> Evaluation:  # fmt: skip
        found = self.classifier.evaluate(points, goal, loss, solved, with_gradient, step, draws, by_copy)
        if not with_gradient:
            return self._with_slack(found, torch.stack([self._slack(points) for _ in range(self.samples)]).mean(0))
        slack, unseen = self._descended(points)
        assert found.gradient is not None
        unseen = torch.where(unseen.isfinite().all((1, 2, 3), True), unseen, 0)
        hide = found.success if self.every is None else torch.full_like(found.success, (step + 1) % self.every == 0)
        hide = hide.view(-1, 1, 1, 1)
        gradient, other = torch.where(hide, unseen, found.gradient), torch.where(hide, found.gradient, unseen)
        avoid = None
        if self.mode == "orthogonal" and self.enforce == "perturbation":
            avoid = other
        elif self.mode == "orthogonal":
            gradient = orthogonalize(gradient, other)
        return self._with_slack(found, slack, gradient, avoid)

    def _descended(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Slack and its gradient, means over the EOT samples, one of these in memory at a time."""
        total: list[Tensor] = []
        for _ in range(self.samples):
            leaf = points.detach().requires_grad_()
            with torch.enable_grad():
                slack = self._slack(leaf)
                found = [slack.detach(), input_gradient(slack.sum(), leaf, "the detector")]
            total = found if not total else [a + b for a, b in zip(total, found, strict=True)]
        return total[0] / self.samples, total[1] / self.samples

    def judge(self, points: Tensor, goal: Goal, loss: LossFunction) -> Evaluation:
        found = self.classifier.judge(points, goal, loss)
        if not self.is_random:
            return self._with_slack(found, self._slack(points))
        slack = torch.stack([self._slack(points) for _ in range(DRAWS)])
        enough = (slack >= 0).sum(0) >= NEEDED
        return self._with_slack(found, slack.mean(0), is_undetected=enough)

    def logits(self, points: Tensor, goal: Goal) -> Tensor:
        return self.classifier.logits(points, goal)

    @staticmethod
    def _with_slack(
        found: Evaluation,
        slack: Tensor,
        gradient: Tensor | None = None,
        avoid: Tensor | None = None,
        is_undetected: Tensor | None = None,
    ) -> Evaluation:
        merit = torch.minimum(found.margin, slack.to(found.margin.dtype))
        stuck = found.stuck if gradient is None else (gradient == 0).flatten(1).all(1)
        success = found.success & (slack >= 0 if is_undetected is None else is_undetected)
        changed = {"success": success, "loss": merit, "margin": merit, "gradient": gradient, "avoid": avoid}
        return _BothEvaluated(**{**vars(found), **changed, "unusable": stuck, "stuck": stuck})

    def _slack(self, points: Tensor) -> Tensor:
        """(N,) how far each score is below the threshold: not detected if at least 0."""
        scores = self.detector(points.clone())  # which it may write into
        if not isinstance(scores, Tensor) or scores.shape not in ((len(points),), (len(points), 1)):
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"detector must return one score per sample, ({len(points)},); got {found}")
        return self.threshold - scores.reshape(-1).float()


class DetectorEvasion(Attack, loss="margin"):
    """Orthogonal and selective projected gradient descent: an adversarial that a detector does not see.

    The two losses are never added, so no weight has to be found: each step climbs one of them. A sample that is not
    misclassified yet climbs the classifier's loss, one that is descends the detector's score. "orthogonal" takes each
    step orthogonal to the other loss's gradient::

        max_s ⟨g, s⟩   subject to   ‖s‖ <= alpha,  ⟨s, g_other⟩ = 0,  x_t + s in the threat model

    so that, to first order, what one loss has gained the other does not take back. For L-infinity that holds exactly,
    by the linear program; ``enforce="gradient"`` only projects g, as published, and the sign undoes most of it.

    Args:
        model: as for `PGD`, like `norm`, `eps`, `alpha`, `steps`, `random_start` and `restarts`.
        detector: images (N, C, H, W) to scores (N,) or (N, 1), differentiable; larger is more suspicious. It comes back
            as it was, like the model.
        threshold: an image is detected if its score exceeds this.
        mode: "orthogonal", or "selective", which climbs the same loss without regard to the other.
        every: descend the detector's score at every so-many-th step instead of where the classifier is fooled.
        **options: as for `PGD`, with ``loss="margin"`` and ``scope=None`` by default; the scope "pixel" and blocks
            leave no room. ``enforce="perturbation"`` is for exact steps, "gradient" the published form. The
            classifier's alone are `loss`, `precision` and `optimize`; ``early_stop`` stops where it is fooled and
            nothing is detected.

    An `AttackResult`'s ``success`` means both: fooled and not detected, ``loss`` is the smaller of the margin and of
    threshold - score, positive on success; calls are the classifier's, the detector is called as often.

    Raises:
        ValueError: an option out of its range; the call raises it for bad images, labels, models or scores.

    Source: Bryniarski et al. 2022, arXiv:2106.15023.
    """

    def __init__(
        self,
        model: Model,
        detector: Model,
        threshold: float = 0.0,
        norm: Norm = "linf",
        eps: float | Tensor = 4 / 255,
        alpha: float | None = None,
        steps: int = 50,
        mode: Mode = "orthogonal",
        every: int | None = None,
        random_start: bool = False,
        restarts: int = 1,
        **options: Unpack[GradientOptions],
    ) -> None:
        check_model("detector", detector)
        check_choice("mode", mode, get_args(Mode))
        check_real("threshold", threshold, "a finite score")
        if every is not None:
            check_count("every", every)
        if is_fine(scope := options.get("scope")):
            raise ValueError(
                f'scope must be None, "image" or "channel" here: "{scope}" leaves no room for another gradient'
            )
        search = Climb(_AvoidingStep(), steps, rate(2.5, steps), alpha, random_start, restarts)
        super().__init__(model, norm, eps, search, **options)
        self._models["detector"] = detector
        self._second = Observer()
        self._detects = threshold, mode, every, self.enforce

    def _scorer(self, oracle: Oracle, lent: Mapping[str, Model], is_random: bool) -> Scorer:
        return _DetectorOracle(oracle, lent["detector"], is_random, self.eot_samples, *self._detects)

    def _observed(self, lent: Mapping[str, Model], images: Tensor) -> bool:
        is_random = super()._observed(lent, images)

        def as_logits(images: Tensor) -> Tensor:  # the score is the second, the first is 0
            return functional.pad(lent["detector"](images).reshape(-1, 1), (1, 0))

        other = self._second.of(self._models["detector"], as_logits, images, self.threat.bounds)
        self._second.say("batch", other.on_batches("the detector"))
        if self.eot_samples == 1:
            self._second.say("random", other.on_randomness("the detector"))
        return is_random or other.is_random
