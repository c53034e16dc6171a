"""What an attack climbs: per-sample losses of logits and labels.

Every loss grows as the attack gets closer to its goal: away from the labels, or, if targeted, towards them. The sign of
a targeted attack is flipped here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Loss", "LossName", "attack_loss", "fooled", "margin"]

LossName = Literal["ce", "margin", "dlr"]
Loss = LossName | Callable[[Tensor, Tensor], Tensor]


def attack_loss(loss: Loss, targeted: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of (logits (N, K), labels (N,)) that the attack maximises, one value per sample.

    Args:
        loss: "ce", cross-entropy; "margin", the best other logit minus the label's (Carlini & Wagner 2017,
            arXiv:1608.04644); "dlr", the margin divided by the distance from the highest to the third-highest logit,
            which makes it independent of the logits' scale (Croce & Hein 2020, arXiv:2003.01690; needs 3 classes, and
            4 if targeted, where the denominator is the distance to the mean of the third- and the fourth-highest); or
            a function of (logits, labels) that returns (N,) values, larger for a worse prediction of the labels.
        targeted: whether the labels are the classes to reach; the loss is then negated.

    Raises:
        ValueError: an unknown name.
    """
    named = {"ce": _cross_entropy, "margin": margin, "dlr": _dlr}
    if loss == "dlr" and targeted:
        chosen: Callable[[Tensor, Tensor], Tensor] = _targeted_dlr
    elif isinstance(loss, str):
        if loss not in named:
            raise ValueError(
                f"loss must be one of {', '.join(map(repr, get_args(LossName)))} or callable; got {loss!r}"
            )
        chosen = named[loss]
    elif callable(loss):
        chosen = loss
    else:
        raise ValueError(f"loss must be a name or a function of (logits, labels); got {loss!r}")
    sign = -1 if targeted else 1

    def ascended(logits: Tensor, labels: Tensor) -> Tensor:
        values = chosen(logits, labels)
        if values.shape != labels.shape:
            raise ValueError(f"loss must return one value per sample, {tuple(labels.shape)}; got {tuple(values.shape)}")
        return sign * values

    return ascended


def fooled(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """Whether each prediction is what the attack wants: not the label or, if targeted, the label. (N,), bool.

    Logits with a NaN predict nothing, so they never count.
    """
    hit = logits.argmax(dim=1) == labels
    return (hit if targeted else ~hit) & ~logits.isnan().any(dim=1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The best other logit minus the label's: positive exactly if another class is predicted. (N,)."""
    label = labels.unsqueeze(1)
    others = logits.scatter(1, label, -torch.inf)
    return others.amax(dim=1) - logits.gather(1, label).squeeze(1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


def _dlr(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[1] < 3:
        raise ValueError(f'loss "dlr" needs at least 3 classes; the model has {logits.shape[1]}: use "margin"')
    top = logits.topk(3, dim=1).values
    spread = top[:, 0] - top[:, 2]
    return margin(logits, labels) / torch.where(spread > 0, spread, 1)


def _targeted_dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """How far the target is below the top. Not _dlr, which is constant while the target is in third place."""
    if logits.shape[1] < 4:
        raise ValueError(f'targeted "dlr" needs at least 4 classes; the model has {logits.shape[1]}: use "margin"')
    top = logits.topk(4, dim=1).values
    spread = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
    return (top[:, 0] - logits.gather(1, labels.unsqueeze(1)).squeeze(1)) / torch.where(spread > 0, spread, 1)
