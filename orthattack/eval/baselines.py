"""Attacks that are not ours, as baselines: Foolbox's, torchattacks', and a user's own function."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import foolbox
import torch
from foolbox.attacks.base import FixedEpsilonAttack, MinimizationAttack
from torch import Tensor, nn

from orthattack.eval.errors import EvaluationError
from orthattack.eval.kinds import (
    GIVEN,
    AttackKind,
    Conditions,
    Found,
    Runner,
    check_options,
    drawing,
    joint_seed,
    nearest,
)
from orthattack.interop.foolbox import FromFoolbox
from orthattack.threat import Norm

__all__ = ["foolbox_attack", "foolbox_attacks", "torchattacks_attack", "user_attack"]

_STEP = 2.5  # steps times step size, in units of eps: enough to cross the ball from a random start


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
                more.setdefault("rel_stepsize", _STEP / more["steps"])
        attack = kind(**more)

        def run(images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Found:
            generator = torch.Generator().manual_seed(joint_seed(seeds))
            return Found(
                FromFoolbox(model, attack, conditions.norm, conditions.eps, generator=generator)(images, labels)
            )

        return run

    norms: tuple[Norm, ...] = (order,) if order is not None else ("linf", "l2", "l1")
    return AttackKind(name, "foolbox", options, False, minimal, _family(kind.__name__), norms, make)


_FOOLBOX_NORMS: tuple[tuple[str, Norm], ...] = (
    ("Linf", "linf"), ("LInf", "linf"), ("L2", "l2"), ("L1", "l1"), ("DDN", "l2"), ("NewtonFool", "l2"),
    ("SparseL1", "l1"), ("VirtualAdv", "l2"), ("EAD", "l1"), ("GenAttack", "linf"),
)  # fmt: skip

_FAMILIES = {"FastGradientAttack": "FGSM", "ProjectedGradientDescentAttack": "PGD", "BasicIterativeAttack": "PGD",
             "MomentumIterativeFastGradientMethod": "MIFGSM", "BIM": "PGD"}  # fmt: skip


def _family(name: str) -> str:
    for norm in ("Linf", "L2", "L1"):
        name = name.removeprefix(norm).removesuffix(norm)
    return _FAMILIES.get(name, name)


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
                    more.setdefault("alpha", _STEP * conditions.eps / more["steps"])
        attack = kind(model, **more)

        def run(images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Found:
            with drawing(joint_seed(seeds)):
                return Found(attack(images, labels))

        return run

    norms: tuple[Norm, ...] = ("linf", "l2") if "norm" in parameters else ("l2",) if _is_l2(rest) else ("linf",)
    return AttackKind(name, "torchattacks", options, False, minimal, _family(rest), norms, make)


def _is_l2(name: str) -> bool:
    return name.endswith("L2") or name in ("CW", "DeepFool")


def user_attack(name: str, factory: Any, given: Mapping[str, Any] | None = None) -> AttackKind:
    """A user's own attack.

    Args:
        name: what it is called.
        factory: a function that takes the model, and parameters called ``norm``, ``eps`` and ``steps`` if it has them,
            and returns a callable (images, labels) -> adversarial images.
        given: further arguments of the function.
    """
    options = dict(given or {})
    if not callable(factory):
        raise EvaluationError(f"attack {name!r} must be a function of the model; it is a {type(factory).__name__}")
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_any:
        check_options(name, options, list(parameters)[1:])

    def make(model: nn.Module, conditions: Conditions) -> Runner:
        shared = {"norm": conditions.norm, "eps": conditions.eps, "steps": conditions.steps}
        more = {key: value for key, value in shared.items() if key in parameters}
        attack = factory(model, **{**more, **options})

        def run(images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Found:
            with drawing(joint_seed(seeds)):
                return Found(attack(images, labels))

        return run

    return AttackKind(name, "user", options, False, False, name, ("linf", "l2", "l1"), make)
