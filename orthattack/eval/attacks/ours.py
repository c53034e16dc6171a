"""The attacks of this package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

import orthattack.attacks as ours
from orthattack.attacks.ascent import Climb
from orthattack.attacks.base import Attack
from orthattack.attacks.configured import options_of
from orthattack.attacks.sparse_rs import PixelSearch
from orthattack.attacks.square import SquareSearch
from orthattack.eval.attacks.kind import (
    GIVEN,
    AttackKind,
    Conditions,
    OwnRunner,
    Placeholder,
    Runner,
    check_options,
    listed,
    suggested,
)
from orthattack.eval.errors import EvaluationError
from orthattack.threat import Norm

OURS = tuple(
    name
    for name, kind in sorted(vars(ours).items())
    if inspect.isclass(kind)
    and issubclass(kind, (Attack, ours.Bisection))
    and kind not in (Attack, ours.DetectorEvasion)
)
"""The names of our attacks; beside them there is DetectorEvasion, whose detector only Python can give."""


def list_ours() -> list[dict[str, Any]]:
    """`OURS`, for a list."""
    kinds = [(name, getattr(ours, name)) for name in OURS]
    # A bisection's norms are its attack's.
    return [listed(name, kind, getattr(kind, "norms", get_args(Norm)), _in_force(kind)) for name, kind in kinds]


def _in_force(kind: Any) -> dict[str, Any]:
    """The number of steps, and the size of the first, in a run that says nothing of them."""
    options = options_of(kind)
    used: dict[str, Any] = {"steps": Conditions().steps} if "steps" in options else {}
    if "alpha" in options:
        made = kind(Placeholder(), eps=1.0)
        if made.card.schedule in (None, "fixed"):
            used["alpha"] = f"{made.alpha * made.steps:g}*eps/steps".removeprefix("1*")
        else:
            used |= {"alpha": f"{made.alpha:g}*eps", "schedule": made.card.schedule}
    return used


def our_attack(name: str, options: dict[str, Any]) -> AttackKind:
    """One of `OURS` or DetectorEvasion, with its parameters."""
    lower = {known.casefold(): known for known in (*OURS, ours.DetectorEvasion.__name__)}
    if name.casefold() not in lower:
        raise EvaluationError(
            f"unknown attack {name!r}; {suggested(name, OURS)} Others: foolbox:NAME, torchattacks:NAME"
        )
    kind = getattr(ours, lower[name.casefold()])
    # A bisection was called MinimumNorm before there was a search of that name; stored runs go on to be one.
    if kind is ours.Bisection or (kind is ours.MinimumNorm and any(key in options for key in _BISECTION)):
        return _bisection(kind.__name__, options)
    name = kind.__name__
    accepted = [option for option in options_of(kind) if option not in GIVEN or option == "detector"]
    check_options(name, options, accepted)
    if "detector" in accepted and not callable(options.get("detector")):
        raise EvaluationError(
            f"{name} needs a detector, a function of the images, which only Python can give: evaluate(..., "
            f'attacks=[{{"name": "{name}", "detector": detector}}])'
        )

    def make(model: nn.Module, conditions: Conditions) -> Runner:
        return OwnRunner(_own(kind, options, model, conditions), conditions.batch_size)

    declared = _declared(name, options, partial(_own, kind, options), kind.norms, make)
    if "early_stop" in options:
        return replace(declared, early_stop=bool(options["early_stop"]))
    # Not one that evades a detector: how well it is hidden is asked of it too.
    can_stop = "detector" not in accepted and _goes_on(_own(kind, options, Placeholder(), Conditions(kind.norms[0])))
    return replace(declared, early_stop=None if can_stop else False)


def _goes_on(attack: Attack) -> bool:
    """Whether an attack takes more steps when an image is fooled, which change no verdict."""
    search = attack.search
    several = search.steps > 1 if isinstance(search, Climb) else isinstance(search, SquareSearch | PixelSearch)
    return several and attack.keep == "best"


def _declared(
    name: str,
    options: dict[str, Any],
    attack: Callable[[nn.Module, Conditions], Any],
    norms: tuple[Norm, ...],
    make: Callable[[nn.Module, Conditions], Runner],
) -> AttackKind:
    """An attack of ours, with what one of its kind says of itself; EvaluationError if an option is wrong."""
    try:
        card, aimed = (attack(Placeholder(), Conditions(norms[0], targeted=way)).card for way in (False, True))
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"attack {name} cannot be made: {error}") from error
    is_foreign = any(map(_is_code, options.values()))
    return AttackKind(name, "orthattack", options, card, norms, make, is_foreign=is_foreign, aimed_card=aimed)


def _is_code(option: object) -> bool:
    """Whether an option is, or holds, a function of the user's."""
    if isinstance(option, list | tuple):
        return any(map(_is_code, option))
    return callable(option) and not isinstance(option, Tensor)


def _own(kind: Any, options: Mapping[str, Any], model: nn.Module, conditions: Conditions) -> Attack:
    more, known = {**options, "generator": torch.Generator().manual_seed(0)}, options_of(kind)
    if "steps" in known:
        more.setdefault("steps", conditions.steps)
    if conditions.queries is not None and "queries" in known:
        more.setdefault("queries", conditions.queries)
    if conditions.levels is not None:
        more["levels"] = conditions.levels
    if conditions.targeted:
        more["targeted"] = True
    if conditions.on_step is not None:
        more.setdefault("on_step", conditions.on_step)
    if conditions.early_stop:
        more.setdefault("early_stop", True)
    attack: Attack = kind(model, norm=conditions.norm, eps=conditions.eps, **more)
    return attack


_BISECTION = ("attack", "trials", "max_eps")


def _bisection(name: str, options: dict[str, Any]) -> AttackKind:
    own = {key: options[key] for key in ("trials", "max_eps") if key in options}
    inner_options = {key: value for key, value in options.items() if key not in _BISECTION}
    inner = our_attack(str(options.get("attack", "OrthoPGD")), inner_options)
    if inner.card.minimal:
        raise EvaluationError(f"{name} needs attack = the name of an attack with an eps, such as OrthoPGD")
    kind = getattr(ours, inner.name)
    # Where to begin; the radius is doubled until something falls.
    first: dict[Norm, float] = {"linf": 4 / 255, "l2": 0.5, "l1": 8.0, "l0": 8.0}

    def attack(model: nn.Module, conditions: Conditions) -> Any:
        start = replace(conditions, eps=first[conditions.norm])
        return ours.Bisection(_own(kind, inner_options, model, start), **own)

    def make(model: nn.Module, conditions: Conditions) -> Runner:
        return OwnRunner(attack(model, conditions))

    return _declared(name, options, attack, inner.norms, make)
