"""torchattacks' attacks, as baselines."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from orthattack.attacks.base import Card
from orthattack.eval.attacks.kind import STEP, AttackKind, Conditions, Found, Goals, Runner, class_named, family, listed
from orthattack.eval.attacks.seeds import drawing, joint_seed
from orthattack.eval.errors import EvaluationError
from orthattack.threat import Norm


def torchattacks_attack(name: str, rest: str, options: dict[str, Any]) -> AttackKind:
    try:
        package = import_module("torchattacks")
    except ImportError as error:
        raise EvaluationError(f"{name} needs torchattacks: pip install 'orthattack[torchattacks]'") from error
    not_run = {key: why for key, why in _NOT_RUN.items() if hasattr(package, key)}
    kind = class_named(name, rest, "torchattacks", torchattacks_attacks(), not_run, options)
    parameters = inspect.signature(kind).parameters
    radius = _radius(kind)

    def make(model: nn.Module, conditions: Conditions) -> Runner:
        more = _in_force(kind, options, conditions.steps)
        if "norm" in parameters:
            more["norm"] = {"linf": "Linf", "l2": "L2", "l1": "L1"}[conditions.norm]
        if "n_classes" in parameters:
            more.setdefault("n_classes", conditions.classes)
        if radius is not None:
            more[radius] = conditions.eps if radius != "pixels" else int(conditions.eps or 0)
            if _scales(kind) and conditions.eps is not None:
                more.setdefault("alpha", STEP * conditions.eps / more["steps"])
        attack = kind(model, **more)
        if conditions.targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        if rest == "FAB" and conditions.norm == "l1":
            if more.get("multi_targeted"):
                raise EvaluationError(f"{name} has no multi_targeted in l1: leave it out")
            attack = partial(_fab_l1, attack)

        def run(images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Found:
            with drawing(joint_seed(seeds)):
                return Found(attack(images, labels))

        return run

    card = Card(
        family(rest), minimal=radius is None, loss=options.get("loss", "ce") if rest in _CROSS_ENTROPY else None
    )
    norms = torchattacks_norms(rest, kind)
    return AttackKind(name, "torchattacks", options, card, norms, make, goals=_goals(rest))


def list_torchattacks() -> list[dict[str, Any]]:
    """torchattacks' attacks, for a list."""
    rows = []
    for name, kind in sorted(torchattacks_attacks().items()):
        used = _in_force(kind, {}, Conditions().steps) | ({"alpha": f"{STEP}*eps/steps"} if _scales(kind) else {})
        used |= {"n_classes": "the model's"} if "n_classes" in inspect.signature(kind).parameters else {}
        rows.append(listed(f"torchattacks:{name}", kind, torchattacks_norms(name, kind), used, _goals(name)))
    return rows


def _in_force(kind: Any, options: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The options and, where they leave it open, the run's steps, of an attack with a radius."""
    keys = inspect.signature(kind).parameters if _radius(kind) else ()
    return {**{key: steps for key in ("steps", "num_iter_set") if key in keys}, **options}


def _scales(kind: Any) -> bool:
    """Whether it takes steps of a size that the evaluation chooses."""
    return _radius(kind) is not None and {"steps", "alpha"} <= inspect.signature(kind).parameters.keys()


def _radius(kind: Any) -> str | None:
    """What an attack calls its radius; None if it minimises the norm."""
    return next((key for key in ("eps", "max_epsilon", "pixels") if key in inspect.signature(kind).parameters), None)


def _goals(name: str) -> Goals:
    return "untargeted" if name in _NOT_AIMED else "any"


_CROSS_ENTROPY = {"FGSM", "FFGSM", "RFGSM", "BIM", "PGD", "PGDL2", "EOTPGD", "MIFGSM", "NIFGSM", "DIFGSM", "TIFGSM"} | {
    "SINIFGSM", "VMIFGSM", "VNIFGSM", "APGD",
}  # fmt: skip
"""What climbs the cross-entropy, APGD unless told otherwise."""


def _fab_l1(attack: Any, images: Tensor, labels: Tensor) -> Tensor:
    """FAB in L1: torchattacks 3.5 has the steps, but what calls them measures no L1 norm, and fails."""
    found = images.clone()
    torch.manual_seed(attack.seed)
    with torch.no_grad():
        left = attack.get_logits(images).argmax(1) == labels
        for restart in range(attack.n_restarts):
            rows = left.nonzero().squeeze(1)
            if len(rows) == 0:
                break
            tried = attack.attack_single_run(images[rows].clone(), labels[rows].clone(), use_rand_start=restart > 0)
            near = (tried - images[rows]).abs().flatten(1).sum(1) <= attack.eps
            fooled = near & (attack.get_logits(tried).argmax(1) != labels[rows])
            found[rows[fooled]] = tried[fooled]
            left[rows[fooled]] = False
    return found


def torchattacks_attacks() -> dict[str, Any]:
    """torchattacks' attacks by name, those that can be run here; none if it is not installed."""
    try:
        package = import_module("torchattacks")
    except ImportError:
        return {}
    return {
        key: kind
        for key, kind in vars(package).items()
        if inspect.isclass(kind) and key not in _NOT_RUN and torchattacks_norms(key, kind)
    }


def torchattacks_norms(name: str, kind: Any) -> tuple[Norm, ...]:
    """The norms that an attack perturbs in: as known, or as its documentation says."""
    if name in _NORMS:
        return _NORMS[name]
    said = re.search(r"Distance Measure\s*:\s*(.*)", kind.__doc__ or "")
    words = said[1].lower() if said else ""
    return tuple(norm for norm in _ALL if norm in words)


_ALL: tuple[Norm, ...] = ("linf", "l2", "l1")

_NORMS: dict[str, tuple[Norm, ...]] = {
    **dict.fromkeys(("APGD", "APGDT", "AutoAttack", "Square"), ("linf", "l2")),
    **dict.fromkeys(("CW", "DeepFool", "PGDL2", "PGDRSL2"), ("l2",)),
    **dict.fromkeys(("JSMA", "OnePixel", "Pixle", "SparseFool"), ("l0",)),
    "FAB": _ALL, "EADL1": ("l1",), "EADEN": ("l1", "l2"),
}  # fmt: skip

_NOT_AIMED = {"APGD", "APGDT", "AutoAttack", "DeepFool", "PIFGSM", "SparseFool", "TPGD"}
"""What cannot be given classes to reach: torchattacks' ``supported_mode``."""

_NOT_RUN = {
    "GN": "it adds noise of one size (std) whatever the radius",
    "VANILA": "it returns the images as they are",
    "LGV": "it trains models first, on a training set",
    "MultiAttack": "it is made of other attacks: name these",
    "Attack": "it is what the others are made of",
}  # fmt: skip
"""Why some of torchattacks' classes are no attacks of an evaluation."""
