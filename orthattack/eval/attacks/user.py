"""A user's own attack: a function of the model, or an `Attack` of the user's."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from orthattack.attacks import Attack, Bisection, Card
from orthattack.eval.attacks.kind import AttackKind, Conditions, Found, OwnRunner, Placeholder, Runner, check_options
from orthattack.eval.attacks.seeds import drawing, joint_seed
from orthattack.eval.errors import EvaluationError
from orthattack.eval.plugin import kept_process
from orthattack.threat import Norm, ThreatModel


def user_attack(name: str, factory: Any, given: Mapping[str, Any] | None = None) -> AttackKind:
    """A user's own attack: `factory` takes the model, what it has of ``norm``, ``eps``, ``steps``, ``levels``,
    ``targeted``, ``on_step`` and ``queries``, and `given`, and returns a callable (images, labels) -> adversarial
    images. One that does not take ``targeted`` cannot be given classes to reach.

    What it says of itself is its attribute ``card``, an `orthattack.attacks.Card`: ``Card("mine", minimal=True)`` says
    that it looks for the smallest norm, so that it is run once, with ``eps=None``, and counts at each radius. A
    subclass of `orthattack.attacks.Attack`, or a function that returns such an attack, is one of ours: what it
    promises is read from its card, on a model of no account, and its calls are counted per image.
    """
    options = dict(given or {})
    if not callable(factory):
        raise EvaluationError(f"attack {name!r} must be a function of the model; it is a {type(factory).__name__}")
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_any:
        check_options(name, options, list(parameters)[1:])

    def made(model: nn.Module, conditions: Conditions) -> Any:
        shared: dict[str, Any] = {"norm": conditions.norm, "eps": conditions.eps, "steps": conditions.steps}
        shared |= {"levels": conditions.levels, "targeted": conditions.targeted, "on_step": conditions.on_step}
        shared |= {} if conditions.queries is None else {"queries": conditions.queries}
        if isinstance(factory, type) and issubclass(factory, Attack):
            shared["generator"] = torch.Generator().manual_seed(0)
        more = {key: value for key, value in shared.items() if key in parameters}
        return factory(model, **{**more, **options})

    norms = factory.norms if isinstance(factory, type) and issubclass(factory, Attack) else get_args(Norm)
    can_aim = takes_any or "targeted" in parameters
    card, said = _card(made, Conditions(norms[0])), getattr(factory, "card", None)
    # Towards a class it may climb another loss.
    aimed = _card(made, Conditions(norms[0], targeted=True)) if can_aim else card
    said = said if isinstance(said, Card) else Card(name)  # of a class of ours it is a property

    def make(model: nn.Module, conditions: Conditions) -> Runner:
        attack = made(model, conditions)
        if not callable(attack):
            raise TypeError(f"{name} must return a function of images and labels; it returned {type(attack).__name__}")
        promised = aimed if conditions.targeted else card
        if (found := _told(attack)) != promised:
            what = f"{promised}, not {found}"
            raise TypeError(f"{name} must return an attack that promises the same for every model: {what}")
        own = OwnRunner(attack, conditions.batch_size if isinstance(attack, Attack) else None)

        def run(images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Found:
            with drawing(joint_seed(seeds)):
                return Found(attack(images, labels)) if promised is None else own(images, labels, seeds)

        return run

    own = AttackKind(name, "user", options, said if card is None else card, norms, make, aimed_card=aimed)
    return own if can_aim else replace(own, goals="untargeted")


def _card(made: Any, conditions: Conditions) -> Card | None:
    """What an attack of ours says of itself; None of what is none, or cannot be made for any model but the real one."""
    try:
        with drawing(0), kept_process():
            warnings.simplefilter("ignore")
            return _told(made(Placeholder(), conditions))
    except (Exception, SystemExit):  # a user's function may raise anything
        return None


def _told(attack: Any) -> Card | None:
    """The card of an attack of ours, which a user may have written anew; its threat model is checked."""
    if not isinstance(attack, Attack | Bisection):
        return None
    card = attack.card
    if not isinstance(card, Card) or not isinstance(card.family, str):
        raise TypeError(f"the card of {type(attack).__name__} must be an orthattack.attacks.Card; got {card!r}")
    ThreatModel("linf", 0.0, scope=card.scope, directions=card.directions, normal=card.normal)
    return card
