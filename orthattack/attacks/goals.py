"""Which classes an attack aims at: those it is given, or others that it chooses from the model's answer."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from orthattack.arguments import check_flag
from orthattack.attacks.task import Task

Targeted = bool | str
"""Whether labels are the classes to reach, or how these are chosen: see `orthattack.PGD`."""


def check_targeted(targeted: object) -> None:
    """ValueError unless it is a `Targeted`."""
    if not isinstance(targeted, str):
        check_flag("targeted", targeted)
    elif targeted not in ("random", "least-likely") and turns(targeted) is None:
        raise ValueError(
            "targeted must be True or False, or one of 'random', 'least-likely' and 'each', or, for some classes, "
            f"such as 'each9'; got {targeted!r}"
        )


def turns(targeted: Targeted) -> int | None:
    """How many classes are aimed at in turn, as many as there are for "each"; None if there is one target or none."""
    found = re.fullmatch(r"each([1-9][0-9]{0,8})?", targeted) if isinstance(targeted, str) else None
    return found and int(found[1] or 2**31)


def least_likely(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) the class with the smallest logit of (N, K), the label left out."""
    return logits.scatter(1, labels.unsqueeze(1), torch.inf).argmin(1)


def aimed(task: Task, targeted: Targeted, known: Tensor | None, samples: int) -> Task:
    """The task, whose goal is to leave the labels, with the goal that `targeted` makes of them.

    A target that is chosen is not the label: the class with the smallest logit at the image, or one that the sample's
    stream draws. It is the `known` one if that was chosen in an earlier call. Asking the model counts `samples` calls.
    """
    labels = task.goal.labels
    assert labels is not None
    if not targeted or turns(targeted) is not None:
        return task
    if not isinstance(targeted, str):
        targets = labels
    elif known is not None:
        targets = known
    else:
        logits = task.logits()
        task.best.count(task.index, samples)
        if targeted == "random":
            # A whole number times the largest drawn, 1 - 2^-53, is not rounded up to it.
            drawn = (task.streams.uniform(task.index, (), torch.float64) * (logits.shape[1] - 1)).long()
            targets = drawn + (drawn >= labels)
        else:
            targets = least_likely(logits, labels)
    task.best.targets[task.index] = targets
    return replace(task, goal=replace(task.goal, labels=None, targets=targets))
