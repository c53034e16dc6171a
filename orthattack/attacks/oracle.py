"""What an attack asks of a model: its loss, its success and its input gradient, checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orthattack.losses import fooled, margin
from orthattack.model import Model

__all__ = ["Evaluation", "Oracle", "Precision"]

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Evaluation:
    """The model at a batch of points, per sample."""

    success: Tensor
    loss: Tensor
    gradient: Tensor | None
    zero_gradient: Tensor
    forward_calls: Tensor


class Oracle:
    """A borrowed model and a loss: all that the loop sees of the model."""

    def __init__(self, model: Model, loss: Callable[[Tensor, Tensor], Tensor], targeted: bool, precision: Precision):
        self._model, self._loss, self._targeted = model, loss, targeted
        self._reduced = precision == "bfloat16"
        self._is_first = True

    def evaluate(self, points: Tensor, labels: Tensor, solved: Tensor, with_gradient: bool) -> Evaluation:
        """Score `points` and, if asked, differentiate the loss there, in one forward pass.

        A pass in reduced precision only claims a success; for samples not `solved` yet, another in full precision
        confirms it or not. Without a gradient the pass is in full precision to begin with.
        """
        calls = torch.ones_like(labels)
        if not with_gradient:
            logits = self._logits(points, labels, reduced=False)
            success, loss = fooled(logits, labels, self._targeted), self._loss(logits, labels)
            return Evaluation(success, loss, None, torch.zeros_like(success), calls)
        leaf = points.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._logits(leaf, labels, self._reduced)
            loss = self._loss(logits, labels)
            gradient = _gradient(loss.sum(), leaf)
        loss, success = loss.detach(), fooled(logits.detach(), labels, self._targeted)
        if self._reduced:
            rows = (success & ~solved).nonzero().squeeze(1)
            success = torch.zeros_like(success)
            if len(rows) > 0:
                confirmed = self._logits(points[rows], labels[rows], reduced=False)
                success[rows] = fooled(confirmed, labels[rows], self._targeted)
                loss[rows] = self._loss(confirmed, labels[rows])
                calls[rows] += 1
        largest = gradient.abs().amax((1, 2, 3))
        unusable = ~((largest > 0) & largest.isfinite())
        if bool(unusable.any()):
            gradient[unusable] = 0
            if self._is_first and bool(unusable.all()):
                self._explain_zero(points, labels)
        self._is_first = False
        return Evaluation(success, loss, gradient, unusable, calls)

    def _logits(self, points: Tensor, labels: Tensor, reduced: bool) -> Tensor:
        with torch.autocast(points.device.type, dtype=torch.bfloat16, enabled=reduced):
            logits = self._model(points)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(points):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model must return logits of shape ({len(points)}, classes); got {found}")
        if self._is_first:
            bad = ~logits.detach().isfinite().all(1)
            if bool(bad.any()):
                raise ValueError(f"model returned NaN or infinite logits (sample {int(bad.long().argmax())})")
            outside = (labels < 0) | (labels >= logits.shape[1])
            if bool(outside.any()):
                sample = int(outside.long().argmax())
                raise ValueError(
                    f"labels must lie in [0, {logits.shape[1] - 1}], the model has {logits.shape[1]} classes; "
                    f"found {int(labels[sample])} (sample {sample})"
                )
        return logits if logits.dtype.itemsize >= 4 else logits.float()

    def _explain_zero(self, points: Tensor, labels: Tensor) -> None:
        """Raise if not only the loss is flat, which a confident model may cause, but the model itself."""
        leaf = points.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._logits(leaf, labels, reduced=False)
            gradient = _gradient(margin(logits, logits.argmax(1)).sum(), leaf)
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


def _gradient(value: Tensor, leaf: Tensor) -> Tensor:
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "the model has no gradient with respect to the images: part of it is detached, runs under "
            "torch.no_grad(), or leaves torch"
        )
    return gradient
