"""What an attack asks of a model: its loss, its success and its input gradient, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from orthattack.losses import Goal
from orthattack.model import Model, check_finite, checked_logits

__all__ = ["Evaluation", "InBatches", "LossFunction", "Oracle", "Precision", "Scorer", "input_gradient"]

Precision = Literal["float32", "bfloat16"]
LossFunction = Callable[[Tensor, Goal], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """The model at a batch of points, per sample.

    Attributes:
        success: (N,) whether the goal is reached.
        loss: (N,) what the attack climbs.
        margin: (N,) how far beyond the goal the logits are, which compares points whatever the loss.
        gradient: (N, C, H, W) the way up, or None if not asked for.
        unusable: (N,) whether that was zero or not finite, and is zero now.
        forward_calls: (N,) evaluations of the model that this took.
        gradient_calls: (N,) differentiations.
        exact: (N,) whether the model itself, in its own precision, says all that; the rest are claims.
        avoid: (N, C, H, W) another loss's gradient, to which the step should be orthogonal, or None.
    """

    success: Tensor
    loss: Tensor
    margin: Tensor
    gradient: Tensor | None
    unusable: Tensor
    forward_calls: Tensor
    gradient_calls: Tensor
    exact: Tensor
    avoid: Tensor | None = None

    def select(self, index: Tensor) -> Evaluation:
        """The evaluation of the samples at `index` only."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[index] for name, value in values.items() if value is not None})

    @classmethod
    def joined(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """The evaluations of consecutive samples as one."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            each = [getattr(part, field.name) for part in parts]
            values[field.name] = None if each[0] is None else torch.cat(each)
        return cls(**values)


class Scorer(Protocol):
    """What a search asks of a model, or of a model and a detector."""

    def evaluate(
        self, points: Tensor, goal: Goal, loss: LossFunction, solved: Tensor | None, with_gradient: bool, step: int = 0
    ) -> Evaluation:
        """Score `points`, iterate number `step`, and, if asked, say which way is up."""

    def logits(self, points: Tensor, goal: Goal) -> Tensor:
        """The model's logits (N, K)."""


class Oracle:
    """A borrowed model: all that a search sees of it.

    Args:
        model: images to logits.
        precision: of the passes that give gradients.
        fast: a faster copy of the model for the passes that give gradients, or None.
        eot_samples: how many passes are averaged for a model that draws at random: expectation over transformation
            (Athalye et al. 2018, arXiv:1707.07397). The loss, its gradient and the logits that decide about success
            are means over them.
    """

    def __init__(
        self,
        model: Model,
        precision: Precision = "float32",
        eot_samples: int = 1,
        fast: Model | None = None,
    ):
        self._model, self._samples = model, eot_samples
        self._fast = model if fast is None else fast
        self._is_bfloat16 = precision == "bfloat16"
        self._is_rough = self._is_bfloat16 or fast is not None
        self._is_first = True

    def evaluate(
        self,
        points: Tensor,
        goal: Goal,
        loss: LossFunction,
        solved: Tensor | None,
        with_gradient: bool,
        step: int = 0,  # noqa: ARG002
    ) -> Evaluation:
        """Score `points` and, if asked, differentiate the loss there, in one forward pass per EOT sample.

        A rough pass, in reduced precision or by a faster copy, only claims a success. For samples that are not `solved`
        yet, another pass, of the model itself in full precision, confirms it or not; with None the claim stands, for
        whoever asks to judge in the end. Without a gradient the pass is the model's own in full precision. `step` is
        the number of the iterate, which makes a difference to other oracles.
        """
        calls = torch.full_like(goal.classes, self._samples)
        if not with_gradient:
            logits, value, _ = self._pass(points, goal, loss, rough=False, with_gradient=False)
            no = torch.zeros_like(calls)
            exact = torch.ones_like(calls, dtype=torch.bool)
            return Evaluation(goal.reached(logits), value, goal.margin(logits), None, no.bool(), calls, no, exact)
        logits, value, gradient = self._pass(points, goal, loss, self._is_rough, with_gradient=True)
        assert gradient is not None
        success, margin, forward_calls = goal.reached(logits), goal.margin(logits), calls
        exact = torch.full_like(success, not self._is_rough)
        if self._is_rough and solved is not None:
            rows = (success & ~solved).nonzero().squeeze(1)
            success = torch.zeros_like(success)
            if len(rows) > 0:
                wanted = goal.select(rows)
                confirmed, loss_there, _ = self._pass(points[rows], wanted, loss, rough=False, with_gradient=False)
                success[rows], margin[rows] = wanted.reached(confirmed), wanted.margin(confirmed)
                value[rows], exact[rows] = loss_there, True
                forward_calls = calls.index_add(0, rows, torch.full_like(rows, self._samples))
        # NaN goes through both of these, and neither needs memory.
        largest = torch.maximum(gradient.amax((1, 2, 3)), -gradient.amin((1, 2, 3)))
        unusable = ~((largest > 0) & largest.isfinite())
        if self._is_first and bool(unusable.all()):
            self._explain_zero(points, goal)
        if gradient.is_cuda or bool(unusable.any()):  # asking would stop the GPU
            gradient.masked_fill_(unusable.view(-1, 1, 1, 1), 0)
        self._is_first = False
        return Evaluation(success, value, margin, gradient, unusable, forward_calls, calls, exact)

    def logits(self, points: Tensor, goal: Goal) -> Tensor:
        """The logits (N, K) in full precision, the mean over the EOT samples."""
        return self._pass(points, goal, lambda logits, _: logits[:, 0], rough=False, with_gradient=False)[0]

    def _pass(
        self, points: Tensor, goal: Goal, loss: LossFunction, rough: bool, with_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits, loss and gradient, each the mean over the EOT samples, one sample in memory at a time."""
        total: list[Tensor] = []
        for _ in range(self._samples):
            if with_gradient:
                leaf = points.detach().requires_grad_()
                with torch.enable_grad():
                    logits = self._forward(leaf, goal, rough)
                    value = loss(logits, goal)
                    gradient = input_gradient(value.sum(), leaf)
                parts = [logits.detach(), value.detach(), gradient]
            else:
                logits = self._forward(points, goal, rough)
                parts = [logits, loss(logits, goal)]
            total = parts if not total else [a + b for a, b in zip(total, parts, strict=True)]
        means = total if self._samples == 1 else [part / self._samples for part in total]
        return means[0], means[1], means[2] if with_gradient else None

    def _forward(self, points: Tensor, goal: Goal, rough: bool) -> Tensor:
        written = points._version
        with torch.autocast(points.device.type, dtype=torch.bfloat16, enabled=rough and self._is_bfloat16):
            logits = (self._fast if rough else self._model)(points)
        if points._version != written:  # with a gradient torch itself refuses that
            raise ValueError(
                "the model changes its input in place, and with it the adversarials: let it write images = images - "
                "mean instead of images -= mean"
            )
        logits = checked_logits(logits, len(points))
        if self._is_first:
            check_finite(logits.detach())
            labels = goal.classes
            outside = (labels < 0) | (labels >= logits.shape[1])
            if bool(outside.any()):
                sample = int(outside.long().argmax())
                raise ValueError(
                    f"labels must lie in [0, {logits.shape[1] - 1}], the model has {logits.shape[1]} classes; "
                    f"found {int(labels[sample])} (sample {sample})"
                )
        return logits if logits.dtype.itemsize >= 4 else logits.float()

    def _explain_zero(self, points: Tensor, goal: Goal) -> None:
        """Raise if not only the loss is flat, which a confident model may cause, but the model itself."""
        leaf = points.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._forward(leaf, goal, rough=False)
            top = Goal(logits.argmax(1))
            gradient = input_gradient(top.margin(logits).sum(), leaf)
        if not bool(gradient.isfinite().any()):
            raise ValueError(
                "the model's gradient is NaN or infinite for every image of the batch, so nothing can be climbed; look "
                "for a square root, a norm or a division that meets zero"
            )
        if not bool((gradient != 0).any()):
            raise ValueError(
                "the model's gradient is zero for every image of the batch: it is masked, by a rounding or saturated "
                "layer or by outputs that are probabilities; a gradient-based attack would measure nothing"
            )


class InBatches:
    """A scorer that is asked about at most `size` samples at a time, so that many fit into memory.

    The samples that still stand are packed anew at each step, so an attack that drops the fooled ones keeps its batches
    full to the end.
    """

    def __init__(self, scorer: Scorer, size: int) -> None:
        self._scorer, self._size = scorer, size

    def evaluate(
        self, points: Tensor, goal: Goal, loss: LossFunction, solved: Tensor | None, with_gradient: bool, step: int = 0
    ) -> Evaluation:
        rows = torch.split(torch.arange(len(points), device=points.device), self._size)
        return Evaluation.joined(
            [
                self._scorer.evaluate(
                    points[r], goal.select(r), loss, None if solved is None else solved[r], with_gradient, step
                )
                for r in rows
            ]
        )

    def logits(self, points: Tensor, goal: Goal) -> Tensor:
        rows = torch.split(torch.arange(len(points), device=points.device), self._size)
        return torch.cat([self._scorer.logits(points[r], goal.select(r)) for r in rows])


def input_gradient(value: Tensor, leaf: Tensor, what: str = "the model") -> Tensor:
    """The gradient of a sum of per-sample values; ValueError if there is none."""
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
    if gradient is None:
        raise ValueError(
            f"{what} has no gradient with respect to the images: part of it is detached, runs under "
            "torch.no_grad(), or leaves torch"
        )
    return gradient
