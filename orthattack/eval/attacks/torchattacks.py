"""torchattacks' attacks, as baselines."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

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
from orthattack.eval.attacks.seeds import drawing, joint_seed
from orthattack.eval.errors import EvaluationError
from orthattack.threat import Norm

__all__ = ["torchattacks_attack"]


def torchattacks_attack(name: str, rest: str, options: dict[str, Any]) -> AttackKind:
    try:
        package = import_module("torchattacks")
    except ImportError as error:
        raise EvaluationError(f"{name} needs torchattacks: pip install 'orthattack[torchattacks]'") from error
    known = [
        key
        for key, kind in vars(package).items()
        if inspect.isclass(kind) and key not in ("Attack", "MultiAttack", "LGV", "VANILA")
    ]
    if rest not in known:
        raise EvaluationError(
            f"torchattacks has no attack {rest!r} that can be run here; {nearest(rest, sorted(known))}"
        )
    kind = getattr(package, rest)
    parameters = inspect.signature(kind).parameters
    check_options(name, options, [key for key in parameters if key not in GIVEN])
    minimal = "eps" not in parameters

    def make(model: nn.Module, conditions: Conditions) -> Runner:
        more = dict(options)
        if "norm" in parameters:
            more["norm"] = {"linf": "Linf", "l2": "L2", "l1": "L1"}[conditions.norm]
        if "n_classes" in parameters:
            more.setdefault("n_classes", conditions.classes)
        if not minimal:
            more["eps"] = conditions.eps
            if "steps" in parameters:
                more.setdefault("steps", conditions.steps)
                if "alpha" in parameters and conditions.eps is not None:
                    more.setdefault("alpha", STEP * conditions.eps / more["steps"])
        attack = kind(model, **more)

        def run(images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Found:
            with drawing(joint_seed(seeds)):
                return Found(attack(images, labels))

        return run

    norms: tuple[Norm, ...] = ("linf", "l2") if "norm" in parameters else ("l2",) if _is_l2(rest) else ("linf",)
    return AttackKind(name, "torchattacks", options, Card(family(rest), minimal=minimal), norms, make)


def _is_l2(name: str) -> bool:
    return name.endswith("L2") or name in ("CW", "DeepFool")
