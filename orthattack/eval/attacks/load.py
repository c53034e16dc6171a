"""Attacks by name: ours, Foolbox's and torchattacks' as baselines, and a user's own function.

`attack_kind` understands a name and its parameters, and refuses what does not fit before anything runs;
`AttackKind.bind` makes the attack for a model and a radius. All get the same eps, steps and images, and the same
relative step size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orthattack.eval import plugin
from orthattack.eval.attacks.kind import AttackKind
from orthattack.eval.attacks.ours import list_ours, our_attack


def attack_kind(name: str, parameters: Mapping[str, Any] | None = None) -> AttackKind:
    """Understand an attack.

    Args:
        name: one of `OURS` or DetectorEvasion; ``foolbox:NAME`` with a class of `foolbox.attacks`;
            ``torchattacks:NAME``; or ``package.module:function``, with a function as `user_attack` takes it.
        parameters: options of the attack. For Bisection, ``attack`` names the one whose radius is searched.

    Raises:
        EvaluationError: there is no such attack, or it has no such option; the message names the nearest.
    """
    options = dict(parameters or {})
    prefix, colon, rest = name.partition(":")
    if not colon:
        return our_attack(name, options)
    if prefix == "foolbox":
        from orthattack.eval.attacks.foolbox import foolbox_attack

        return foolbox_attack(name, rest, options)
    if prefix == "torchattacks":
        from orthattack.eval.attacks.torchattacks import torchattacks_attack

        return torchattacks_attack(name, rest, options)
    from orthattack.eval.attacks.user import user_attack

    return user_attack(name, plugin.find(name), options)


def list_attacks() -> list[dict[str, Any]]:
    """Every attack that can be named, as `kind.listed` describes it."""
    from orthattack.eval.attacks.foolbox import list_foolbox
    from orthattack.eval.attacks.torchattacks import list_torchattacks

    return [*list_ours(), *list_foolbox(), *list_torchattacks()]
