"""Foolbox's attacks, as baselines."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import foolbox
import torch
from foolbox.attacks.base import FixedEpsilonAttack, MinimizationAttack
from torch import Tensor, nn

from orthattack.attacks.attack import Card
from orthattack.eval.attacks.kind import (
    GIVEN,
    STEP,
    AttackKind,
    Conditions,
    Found,
    Runner,
    check_options,
    family,
    nearest,
)
from orthattack.eval.attacks.seeds import joint_seed
from orthattack.eval.errors import EvaluationError
from orthattack.interop.foolbox import FromFoolbox
from orthattack.threat import Norm

__all__ = ["foolbox_attack", "foolbox_attacks"]


def foolbox_attacks() -> dict[str, Any]:
    """Foolbox's attacks by name."""
    kinds = {
        name: kind
        for name, kind in vars(foolbox.attacks).items()
        if inspect.isclass(kind) and issubclass(kind, FixedEpsilonAttack | MinimizationAttack)
    }
    # What people call it, as Foolbox's own short names are those of L-infinity.
    return kinds | {"BIM": foolbox.attacks.LinfBasicIterativeAttack}


def foolbox_attack(name: str, rest: str, options: dict[str, Any]) -> AttackKind:
    known = foolbox_attacks()
    if rest not in known:
        raise EvaluationError(f"Foolbox has no attack {rest!r} that can be run here; {nearest(rest, sorted(known))}")
    kind = known[rest]
    parameters = inspect.signature(kind).parameters
    check_options(name, options, [key for key in parameters if key not in GIVEN])
    minimal = issubclass(kind, MinimizationAttack)
    order = next((norm for prefix, norm in _FOOLBOX_NORMS if kind.__name__.startswith(prefix)), None)

    def make(model: nn.Module, conditions: Conditions) -> Runner:
        more = dict(options)
        if not minimal and "rel_stepsize" in parameters:
            more.setdefault("steps", conditions.steps)
            if "abs_stepsize" not in more:
                more.setdefault("rel_stepsize", STEP / more["steps"])
        attack = kind(**more)

        def run(images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Found:
            generator = torch.Generator().manual_seed(joint_seed(seeds))
            return Found(
                FromFoolbox(model, attack, conditions.norm, conditions.eps, generator=generator)(images, labels)
            )

        return run

    norms: tuple[Norm, ...] = (order,) if order is not None else ("linf", "l2", "l1")
    card = Card(family(kind.__name__), minimal=minimal)
    return AttackKind(name, "foolbox", options, card, norms, make)


_FOOLBOX_NORMS: tuple[tuple[str, Norm], ...] = (
    ("Linf", "linf"), ("LInf", "linf"), ("L2", "l2"), ("L1", "l1"), ("DDN", "l2"), ("NewtonFool", "l2"),
    ("SparseL1", "l1"), ("VirtualAdv", "l2"), ("EAD", "l1"), ("GenAttack", "linf"),
)  # fmt: skip
