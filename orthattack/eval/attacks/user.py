"""A user's own attack: a function of the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from orthattack.attacks.base import Card
from orthattack.eval.attacks.kind import AttackKind, Conditions, Found, Runner, check_options
from orthattack.eval.attacks.seeds import drawing, joint_seed
from orthattack.eval.errors import EvaluationError

__all__ = ["user_attack"]


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
        if not callable(attack):
            raise TypeError(f"{name} must return a function of images and labels; it returned {type(attack).__name__}")

        def run(images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Found:
            with drawing(joint_seed(seeds)):
                return Found(attack(images, labels))

        return run

    return AttackKind(name, "user", options, Card(name), ("linf", "l2", "l1"), make)
