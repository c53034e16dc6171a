"""Objects made of options: checked by name, read as attributes, and never changed."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from torch import Tensor

from orthattack.arguments import plain

__all__ = ["Configured", "options_of"]

T = TypeVar("T", bound="Configured")


class Configured:
    """What its constructor was given, as attributes: set once, plain numbers, and pickled and copied with its state.

    Subclasses annotate ``**options`` with ``Unpack[...]`` of a TypedDict in their module, if they have any.
    """

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "__init__" in vars(cls):
            cls.__init__ = _recorded(vars(cls)["__init__"])  # type: ignore[method-assign]

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

    def __copy__(self: T) -> T:
        """Another object with a stream of random numbers of its own, in the same state, on the same models."""
        return copy.deepcopy(self, {id(model): model for model in self._shared_by_copies()})

    def _shared_by_copies(self) -> list[object]:
        return []


def options_of(kind: Callable[..., Any]) -> list[str]:
    """The names of all options of a class, those behind ``**options`` included."""
    names: list[str] = []
    for parameter in inspect.signature(kind).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:  # no more is known of **options: Any
            names += _behind(getattr(kind, "__init__", kind), parameter)
        else:
            names.append(parameter.name)
    return names


def _behind(init: Any, parameter: inspect.Parameter) -> list[str]:
    """The options that ``**options: Unpack[Name]`` stands for."""
    name = str(parameter.annotation).rpartition("[")[2].rstrip("]")
    declared = inspect.unwrap(init).__globals__.get(name)
    return list(getattr(declared, "__annotations__", {}))


def _own(value: Any) -> Any:
    """Numbers that the caller cannot change any more: copies of tensors and arrays, in lists too."""
    if type(value) in (list, tuple):
        return type(value)(map(_own, value))
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if type(value).__module__ == "numpy" else value


def _recorded(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that names the class called when it refuses an option, and keeps what it was given."""
    signature = inspect.signature(init)
    parameters = list(signature.parameters.values())[1:]
    rest = next((p for p in parameters if p.kind is p.VAR_KEYWORD), None)
    behind = [] if rest is None else _behind(init, rest)
    is_open = rest is not None and not behind
    names = [p.name for p in parameters if p is not rest] + behind

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
        bound.apply_defaults()
        given = {name: plain(value) for name, value in list(bound.arguments.items())[1:]}
        if rest is not None:
            given |= {name: plain(value) for name, value in given.pop(rest.name).items()}
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
