"""A person's own code: ``package.module:function``, found and called, and what it changes of the process put back."""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from orthattack.eval.errors import FAILURES, EvaluationError, told


@contextmanager
def kept_process() -> Iterator[None]:
    """Put back the current directory, the environment's variables and the warnings' filters."""
    place, variables = Path.cwd(), dict(os.environ)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        if variables != dict(os.environ):
            os.environ.clear()
            os.environ.update(variables)
        os.chdir(place)


def is_plugin(name: str) -> bool:
    """Whether `name` has the form ``package.module:function``.

    >>> is_plugin("mine.models:build"), is_plugin("resnet50"), is_plugin("C:/photos")
    (True, False, False)
    """
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name) is not None


def find(name: str) -> Callable[..., object]:
    """The function.

    The module is looked for on ``sys.path`` and then in the current directory, which stays on the path, since the code
    may import its neighbours later. EvaluationError: no such module or function, or an error in the module."""
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except FAILURES as error:  # of whatever the module does when imported
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            why = f"there is no module {missing} on sys.path or in the current directory {here}"
        else:
            why = f"importing {module_name} failed ({told(error)})"
        raise EvaluationError(f"{name}: {why}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "no function" if function is None else f"a {type(function).__name__}, not a function, called"
        raise EvaluationError(f"{name}: {getattr(module, '__file__', module_name)} has {what} {function_name}")
    found: Callable[..., object] = function
    return found


def call(name: str) -> object:
    """What the function returns without arguments; EvaluationError if it cannot be found or fails."""
    function = find(name)
    try:
        return function()
    except FAILURES as error:  # of whatever the function does
        raise EvaluationError(f"{name}() failed ({told(error)})") from error
