"""Foolbox's attacks, as baselines."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import foolbox
import torch
from foolbox.attacks.base import FixedEpsilonAttack
from foolbox.attacks.gradient_descent_base import BaseGradientDescent
from foolbox.distances import LpDistance
from torch import Tensor, nn

from orthattack.attacks.base import Card
from orthattack.eval.attacks.kind import STEP, AttackKind, Conditions, Found, Goals, Runner, class_named, family, listed
from orthattack.eval.attacks.seeds import joint_seed
from orthattack.interop.foolbox import FromFoolbox
from orthattack.threat import Norm
from orthattack.threat.norms import BALLS


def foolbox_attacks() -> dict[str, Any]:
    """Foolbox's attacks by name."""
    kinds = {
        name: kind
        for name, kind in vars(foolbox.attacks).items()
        if inspect.isclass(kind) and issubclass(kind, foolbox.Attack) and name not in _NOT_RUN
    }
    # What people call it, as Foolbox's own short names are those of L-infinity.
    return kinds | {"BIM": foolbox.attacks.LinfBasicIterativeAttack}


def list_foolbox() -> list[dict[str, Any]]:
    """Foolbox's attacks, for a list."""
    return [
        listed(
            f"foolbox:{name}", kind, foolbox_norms(kind), _in_force(kind, {}, Conditions().steps), _goals(kind),
            needs="numba" if kind.__name__.endswith("BrendelBethgeAttack") else "",
        )
        for name, kind in sorted(foolbox_attacks().items())
    ]  # fmt: skip


def foolbox_attack(name: str, rest: str, options: dict[str, Any]) -> AttackKind:
    kind = class_named(name, rest, "Foolbox", foolbox_attacks(), _NOT_RUN, options)
    takes_any = "distance" in inspect.signature(kind).parameters

    def make(model: nn.Module, conditions: Conditions) -> Runner:
        more = _in_force(kind, options, conditions.steps)
        if takes_any:
            more["distance"] = LpDistance(BALLS[conditions.norm].order)
        attack = kind(**more)

        def run(images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Found:
            options: dict[str, Any] = {"generator": torch.Generator().manual_seed(joint_seed(seeds))}
            options["targeted"] = conditions.targeted
            return Found(FromFoolbox(model, attack, conditions.norm, conditions.eps, **options)(images, labels))

        return run

    norms = foolbox_norms(kind, options)
    is_descent = issubclass(kind, BaseGradientDescent)
    minimal = not issubclass(kind, FixedEpsilonAttack)
    card = Card(family(kind.__name__), minimal=minimal, loss="ce" if is_descent else None)
    return AttackKind(name, "foolbox", options, card, norms, make, goals=_goals(kind))


def _in_force(kind: Any, options: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The options and, where they leave it open, the run's steps, of the size that ours take."""
    parameters, more = inspect.signature(kind).parameters, dict(options)
    if "rel_stepsize" in parameters or (
        "steps" in parameters and parameters["steps"].default is inspect.Parameter.empty
    ):
        more.setdefault("steps", steps)
    if "rel_stepsize" in parameters and "abs_stepsize" not in more:
        more.setdefault("rel_stepsize", STEP / more["steps"])
    return more


def _goals(kind: Any) -> Goals:
    return "targeted" if kind is foolbox.attacks.GenAttack else "untargeted" if kind in _NOT_AIMED else "any"


def foolbox_norms(kind: Any, options: Mapping[str, Any] | None = None) -> tuple[Norm, ...]:
    """The norms that an attack can be run in."""
    if "distance" in inspect.signature(kind).parameters or kind is foolbox.attacks.SpatialAttack:
        return ("linf", "l2", "l1")
    constraint = (options or {}).get("constraint", "l2" if kind is foolbox.attacks.HopSkipJumpAttack else None)
    if constraint in ("linf", "l2"):
        return (constraint,)
    distance = inspect.getattr_static(kind, "distance", None)
    if isinstance(distance, LpDistance):
        return (_BY_ORDER[distance.p],)
    if kind is foolbox.attacks.PointwiseAttack:  # which takes back as many numbers as it can
        return ("l0",)
    return ("linf",) if kind.__name__.startswith("Linf") else ("l2",)


_NOT_AIMED = (
    foolbox.attacks.L1FastGradientAttack, foolbox.attacks.L2FastGradientAttack, foolbox.attacks.LinfFastGradientAttack,
    foolbox.attacks.NewtonFoolAttack, foolbox.attacks.VirtualAdversarialAttack,
)  # fmt: skip
"""What refuses the criterion of a class to reach."""

_BY_ORDER: dict[float, Norm] = {ball.order: norm for norm, ball in BALLS.items()}

_NOT_RUN = {
    "Attack": "it is what the others are made of",
    "BinarizationRefinementAttack": "it only improves what another attack has found",
    "DatasetAttack": "it chooses among other images, which have to be fed to it first",
}  # fmt: skip
"""Why some of Foolbox's classes are no attacks of an evaluation."""
