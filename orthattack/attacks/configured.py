"""Objects made of options: checked by name, read as attributes, and never changed."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from orthattack.arguments import plain, same_values

T = TypeVar("T", bound="Configured")


class Configured:
    """What its constructor was given, as attributes: set once, plain numbers, and pickled and copied with its state.

    Subclasses annotate ``**options`` with ``Unpack[...]`` of a TypedDict, if they have any. One that differs in
    defaults alone names them: ``class Longer(PGD, steps=100): pass``.
    """

    _defaults: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **defaults: Any) -> None:
        super().__init_subclass__()
        cls._defaults = {**cls._defaults, **defaults}
        base = next((base for base in cls.__mro__[1:] if "__signature__" in vars(base)), object)
        known = {} if base is object else dict(inspect.signature(base).parameters)
        if "__init__" in vars(cls):
            init = vars(cls)["__init__"]
            known = {p.name: p for p in _expanded(init, known)}
            cls.__init__ = _recorded(init, list(known.values()))  # type: ignore[method-assign]
        for name in defaults:
            if name not in known:
                raise TypeError(f"{cls.__name__} has no option {name!r} to give a default{_known(name, list(known))}")
        given = [p.replace(default=defaults[p.name]) if p.name in defaults else p for p in known.values()]
        cls.__signature__ = inspect.Signature(given)  # type: ignore[attr-defined]

    def replace(self: T, **options: Any) -> T:
        """A new object with these options and the others as they were given here; a given `generator` is shared."""
        return type(self)(**{**vars(self)["_given"], **options})

    def _resolved(self) -> Mapping[str, Any]:
        """The options as they are in force, where that is more than what was given."""
        return {}

    def __getattr__(self, name: str) -> Any:  # of what is not an attribute
        given: dict[str, Any] = vars(self).get("_given", {})
        if name[:1] != "_" and given:
            for known in (self._resolved(), given):
                if name in known:
                    return known[name]
        raise AttributeError(f"{type(self).__name__} has no option {name!r}{_known(name, self._names())}")

    def __setattr__(self, name: str, value: object) -> None:
        if name[:1] != "_" and "_is_made" in vars(self):
            kind, names = type(self).__name__, self._names()
            if name not in names and hasattr(self, name):
                raise AttributeError(f"{kind} cannot be changed, and {name} is no option{_known(name, names)}")
            if name not in names:
                raise AttributeError(f"{kind} has no option {name!r}{_known(name, names)}")
            raise AttributeError(
                f"{kind} cannot be changed: make a new one, {kind}(..., {name}=...), or one that differs in this "
                f"alone, .replace({name}=...)"
            )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed: {name!r} stays")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._names()})

    def _names(self) -> list[str]:
        return list(dict.fromkeys([*options_of(type(self)), *vars(self).get("_given", {})]))

    def __eq__(self, other: object) -> bool:
        """Whether class and options are the same: models by their weights, generators by their state."""
        return type(self) is type(other) and same_values(vars(self).get("_given"), vars(other).get("_given"))

    def __hash__(self) -> int:
        return hash(type(self))  # its options may not be hashable

    def __copy__(self: T) -> T:
        """Another object with a stream of random numbers of its own, in the same state, on the same models."""
        return copy.deepcopy(self, {id(model): model for model in self._shared_by_copies()})

    def _shared_by_copies(self) -> list[object]:
        return []


def options_of(kind: Callable[..., Any]) -> list[str]:
    """The names of all options of a class, those behind ``**options`` included."""
    return [p.name for p in inspect.signature(kind).parameters.values() if p.kind is not p.VAR_KEYWORD]


def _expanded(init: Callable[..., None], known: Mapping[str, inspect.Parameter]) -> list[inspect.Parameter]:
    """A constructor's parameters, with what ``**options`` stands for: a TypedDict, or the base's options."""
    parameters = list(inspect.signature(init).parameters.values())[1:]
    if not parameters or parameters[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        return parameters
    *named, rest = parameters
    declared = str(rest.annotation).rpartition("[")[2].rstrip("]").rpartition(".")[2]
    kind = inspect.unwrap(init).__globals__.get(declared)
    behind = list(getattr(kind, "__annotations__", {})) or [p.name for p in known.values() if p.default is not p.empty]
    behind = [name for name in behind if name not in {p.name for p in named}]
    return [*named, *(known[name].replace(kind=rest.KEYWORD_ONLY) for name in behind)] if behind else parameters


def _own(value: Any) -> Any:
    """Numbers that the caller cannot change any more: copies of tensors and arrays, in lists too."""
    if type(value) in (list, tuple):
        return type(value)(map(_own, value))
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if type(value).__module__ == "numpy" else value


def _recorded(init: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """A constructor that names the class called when it refuses an option, and keeps what it was given."""
    signature = inspect.signature(init)
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    is_open = len(names) < len(parameters)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)

    @functools.wraps(init)
    def made(self: Any, *args: Any, **options: Any) -> None:
        kind = type(self).__name__
        for name in options:
            if name not in names and not is_open:
                raise TypeError(f"{kind} got an unexpected keyword argument {name!r}{_known(name, names)}")
        try:
            bound = signature.bind(self, *args, **options)
        except TypeError as error:
            raise TypeError(f"{kind}: {error}") from None
        given = dict(list(bound.arguments.items())[1:])
        given |= given.pop(rest, {}) if rest else {}
        given = {**{name: value for name, value in type(self)._defaults.items() if name in names}, **given}
        bound.apply_defaults()
        own = {name: value for name, value in list(bound.arguments.items())[1:] if name != rest}
        given = {name: plain(value) for name, value in {**own, **given}.items()}
        is_outermost = "_given" not in vars(self)
        if is_outermost:
            vars(self)["_given"] = given = {name: _own(value) for name, value in given.items()}
        init(self, **given)
        if is_outermost:
            vars(self)["_is_made"] = True

    return made


# What other libraries call them, where no part of the name tells.
_ELSEWHERE = {
    "step_size": "alpha", "iterations": "steps", "iters": "steps", "nb_iter": "steps", "n_iter": "steps",
    "num_steps": "steps", "seed": "generator", "steps": "queries",
}  # fmt: skip


def _known(name: str, options: Collection[str]) -> str:
    """The end of a sentence about a wrong name: which one may be meant, and which there are."""
    near = [_ELSEWHERE[name]] if name in _ELSEWHERE else [o for o in options if name.startswith(o) or name in o]
    near = [known for known in near or get_close_matches(name, options, 1, 0.6) if known in options]
    listed = ", ".join(options)
    return f"; did you mean {near[0]}? It has {listed}" if near else f"; it has {listed}" if options else ""
