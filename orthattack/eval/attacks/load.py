"""Attacks by name: ours, Foolbox's and torchattacks' as baselines, and a user's own function.

`attack_kind` understands a name and its parameters, and refuses what does not fit before anything runs;
`AttackKind.bind` makes the attack for a model and a radius. All get the same eps, steps and images, and the same
relative step size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from orthattack import attacks
from orthattack.eval import plugin
from orthattack.eval.attacks.kind import GIVEN, AttackKind, defaults
from orthattack.eval.attacks.ours import OURS, our_attack
from orthattack.threat import Norm


def attack_kind(name: str, parameters: Mapping[str, Any] | None = None) -> AttackKind:
    """Understand an attack.

    Args:
        name: one of `OURS` or DetectorEvasion; ``foolbox:NAME`` with a class of `foolbox.attacks`;
            ``torchattacks:NAME``; or ``package.module:function`` with a function that takes the model, and parameters
            called ``norm``, ``eps``, ``steps`` and ``seed`` if it has them, and returns a callable (images, labels) ->
            adversarial images.
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
    """Every attack that can be named, with its parameters and their defaults, and ``norms``, those it can be run in."""
    from orthattack.eval.attacks.foolbox import foolbox_attacks, foolbox_norms
    from orthattack.eval.attacks.torchattacks import torchattacks_attacks, torchattacks_norms

    theirs = [(f"foolbox:{name}", kind, foolbox_norms(kind)) for name, kind in sorted(foolbox_attacks().items())]
    listed = sorted(torchattacks_attacks().items())
    theirs += [(f"torchattacks:{name}", kind, torchattacks_norms(name, kind)) for name, kind in listed]
    every = [(name, getattr(attacks, name), get_args(Norm)) for name in OURS] + theirs
    without = GIVEN | {"options", "distance", "max_epsilon"}
    return [{"name": name, "parameters": defaults(kind, without), "norms": [*norms]} for name, kind, norms in every]
