"""What an attack climbs: per-sample losses of logits, and the goal that they lead to.

Every loss grows as the attack gets closer to its goal: away from the labels, or towards the targets. The sign of a
targeted attack is flipped here, and in `attacks.scoring` for the margin that replaces a flat loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

LossName = Literal["ce", "margin", "dlr", "scaled-ce", "logit-difference", "kl"]
Loss = LossName | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Goal:
    """What an attack wants of each prediction.

    Attributes:
        labels: (N,) the classes to leave, or None if the attack is targeted.
        targets: (N,) the classes to reach. With labels too, they only direct the loss: any other class is a success.
        top_k: the label is to leave the k most likely classes, or the target to be among them.
        confidence: by how much the logits are to be beyond that, at least.
        clean: (N, K) the logits of the images, which the loss "kl" leads away from.
    """

    labels: Tensor | None
    targets: Tensor | None = None
    top_k: int = 1
    confidence: float = 0.0
    clean: Tensor | None = None

    @property
    def classes(self) -> Tensor:
        """(N,) the classes that decide about success."""
        chosen = self.targets if self.labels is None else self.labels
        assert chosen is not None
        return chosen

    def select(self, index: Tensor) -> Goal:
        """The goal of the samples at `index` only."""
        known: dict[str, Any] = {k: value[index] for k, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **known)

    @staticmethod
    def joined(parts: Sequence[Goal]) -> Goal:
        """The goals of consecutive samples as one."""
        names = [name for name, value in vars(parts[0]).items() if isinstance(value, Tensor)]
        known: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return replace(parts[0], **known)

    @property
    def rank(self) -> int:
        """Which of the other classes, the most likely first, the climbed class is measured against."""
        return self.top_k if self.labels is None or self.targets is None else 1

    def reached(self, logits: Tensor) -> Tensor:
        """(N,) bool: whether each prediction is what the attack wants. Logits that are not finite predict nothing."""
        if self.top_k > 1 or self.confidence > 0:
            reached = self.margin(logits) > 0
        else:
            hit = logits.argmax(dim=1) == self.classes
            reached = hit if self.labels is None else ~hit
        return reached & logits.isfinite().all(dim=1)

    def margin(self, logits: Tensor) -> Tensor:
        """(N,) how far the logits are beyond the goal: positive exactly if it is reached."""
        beyond = margin(logits, self.classes, self.top_k) * (-1 if self.labels is None else 1)
        return beyond - self.confidence if self.confidence else beyond


def attack_loss(loss: Loss) -> Callable[[Tensor, Goal], Tensor]:
    """The function of (logits (N, K), goal) that the attack maximises, one value per sample.

    Args:
        loss: with z the logits, y the label and k the other classes,

            "ce"
                cross-entropy, ``log Σ_j exp z_j - z_y``.
            "margin"
                ``max_k z_k - z_y - confidence``, the loss of Carlini & Wagner 2017 (arXiv:1608.04644), not cut off
                where it is reached; with a goal's `top_k`, the k-th largest z_k in place of the largest.
            "scaled-ce"
                the margin in value, with the slope of the cross-entropy of ``z / (z_(1) - z_(2))`` among y and the ten
                likeliest k, the divisor held fixed, which makes it independent of the logits' scale (MIFPE, with T = 1:
                Yu & Xu, CVPR 2023, there among all k, which is weaker for a thousand of them).
            "logit-difference"
                ``mean_k z_k - z_y``: the margin to all classes at once, so its gradient never changes sides.
            "dlr"
                the margin divided by ``z_(1) - z_(3)``, sorted downwards, which makes it independent of the logits'
                scale (Croce & Hein 2020, arXiv:2003.01690; at least 3 classes). Targeted at t it is
                ``(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)``, negated (at least 4 classes), with z_(1) in place of
                z_y where no label is known.
            "kl"
                ``Σ_j p_j (log p_j - log softmax(z)_j)``, p the model's own answer for the image, whatever the label
                (TPGD, of TRADES: Zhang et al. 2019, arXiv:1901.08573).
            a function
                of (logits, labels) that returns (N,) values, larger for a worse prediction of the labels.

            Towards targets each is that of the target, negated.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(loss, str):
        if loss not in get_args(LossName):
            raise ValueError(
                f"loss must be one of {', '.join(map(repr, get_args(LossName)))} or callable; got {loss!r}"
            )
    elif not callable(loss) or isinstance(loss, type):
        hint = f": make one first, {loss.__name__}(...)" if isinstance(loss, type) else ""
        raise ValueError(f"loss must be a name or a function of (logits, labels); got {loss!r}{hint}")
    return _Ascended(loss)


@dataclass(frozen=True)
class _Ascended:
    """A loss turned towards the goal; an object rather than a closure, so that attacks pickle."""

    loss: Loss

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        if self.loss == "kl":
            assert goal.clean is not None
            answers = [functional.log_softmax(z, dim=1) for z in (logits, goal.clean)]
            return functional.kl_div(answers[0], answers[1], reduction="none", log_target=True).sum(1)
        own = goal.classes if goal.targets is None else goal.targets
        if self.loss == "margin":
            values = margin(logits, own, goal.rank)
        elif self.loss == "dlr":
            values = _dlr(logits, goal)
        else:
            values = (_NAMED[self.loss] if isinstance(self.loss, str) else self._of_copies)(logits, own)
        if not isinstance(values, Tensor) or values.shape != goal.classes.shape:
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"loss must return one value per sample, {tuple(goal.classes.shape)}; got {found}")
        if values.is_complex():
            raise ValueError(f"loss must return real values; got {values.dtype}: return values.real or .abs()")
        values = values if goal.targets is None else -values
        return values - goal.confidence if goal.confidence and self.loss == "margin" else values

    def _of_copies(self, logits: Tensor, labels: Tensor) -> Tensor:
        """A function's values: it may write into logits and labels, which judge, and into what it has returned."""
        assert not isinstance(self.loss, str)
        values = self.loss(logits.clone(), labels.clone())
        return values.clone() if isinstance(values, Tensor) else values


def margin(logits: Tensor, labels: Tensor, top_k: int = 1) -> Tensor:
    """The k-th largest other logit minus the label's: positive exactly if the label is not among the top k. (N,)."""
    label = labels.unsqueeze(1)
    others = logits.scatter(1, label, -torch.inf)
    best = others.amax(dim=1) if top_k == 1 else others.gather(1, rival(others, top_k)).squeeze(1)
    return best - logits.gather(1, label).squeeze(1)


def rival(others: Tensor, top_k: int) -> Tensor:
    """(N, 1) the class of the k-th largest of the `others`, logits (N, K) that are -inf for the class itself."""
    if top_k == 1:
        return others.argmax(1, keepdim=True)
    if top_k >= others.shape[1]:
        raise ValueError(f"top_k must be below the number of classes; got {top_k}, and the model has {others.shape[1]}")
    return others.topk(top_k, dim=1).indices[:, -1:]


_RIVALS = 10


def _scaled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """With the margin's value: that of the scaled logits hardly says how near an image is to being fooled."""
    known, own = logits.detach(), labels.unsqueeze(1)
    rivals = known.scatter(1, own, -torch.inf).topk(min(_RIVALS, known.shape[1] - 1), dim=1)
    values = torch.cat([known.gather(1, own), rivals.values], dim=1)  # the largest rival's second
    asked = logits.gather(1, torch.cat([own, rivals.indices], dim=1))
    top = values.topk(2, dim=1).values
    gap = (top[:, :1] - top[:, 1:]).maximum(1e-6 * (top[:, :1] - known.amin(1, keepdim=True)))
    scaled = (asked - top[:, :1]) / torch.where(gap > 0, gap, 1)
    climbed = scaled.logsumexp(1) - scaled[:, 0]
    return values[:, 1] - values[:, 0] + (climbed - climbed.detach())


def _logit_difference(logits: Tensor, labels: Tensor) -> Tensor:
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    return (logits.sum(1) - own) / (logits.shape[1] - 1) - own


def _dlr(logits: Tensor, goal: Goal) -> Tensor:
    """The margin or, with a target, how far that is below the label, or else the top; divided by a spread, another one
    with a target, for beside the third place it would be constant while the target is there."""
    what, fewest = ('loss "dlr"', 3) if goal.targets is None else ('targeted "dlr"', 4)
    if logits.shape[1] < fewest:
        raise ValueError(f'{what} needs at least {fewest} classes; the model has {logits.shape[1]}: use "margin"')
    top = logits.topk(fewest, dim=1).values
    spread = top[:, 0] - (top[:, 2] if goal.targets is None else (top[:, 2] + top[:, 3]) / 2)
    if goal.targets is None:
        lead = margin(logits, goal.classes)
    else:
        own = top[:, 0] if goal.labels is None else logits.gather(1, goal.labels.unsqueeze(1)).squeeze(1)
        lead = own - logits.gather(1, goal.targets.unsqueeze(1)).squeeze(1)
    return lead / torch.where(spread > 0, spread, 1)


_NAMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": partial(functional.cross_entropy, reduction="none"),
    "scaled-ce": _scaled_cross_entropy,
    "logit-difference": _logit_difference,
}
