"""The public names with their arguments and defaults, and the command line, are what tests/public_surface.txt says.

A change of the surface is a change of that file, which `make surface` writes anew: in a diff, it is seen.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orthattack.eval.cli import _parser

STORED = Path(__file__).with_name("public_surface.txt")
MODULES = ["orthattack", "orthattack.eval", "orthattack.eval.data", "orthattack.eval.models"]
MODULES += ["orthattack.interop.foolbox", "orthattack.interop.torchattacks", "orthattack.interop.autoattack"]


def arguments(of: Any) -> str:
    signature = inspect.signature(of)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "self"]
    return str(inspect.Signature(bare))


def of_class(kind: type) -> Iterator[str]:
    """A class as it is made, and what it defines for its users."""
    bases = [base.__name__ for base in kind.__bases__ if base is not object]
    made = "(...)" if issubclass(kind, Exception) else arguments(kind)
    yield f"class {kind.__name__}{made}" + (f"  # {', '.join(bases)}" if bases else "")
    for name, value in sorted(vars(kind).items()):
        if name.startswith("_") and name != "__call__":
            continue
        if isinstance(value, classmethod | staticmethod):
            yield f"    {name}{arguments(getattr(kind, name))}  # {type(value).__name__}"
        else:
            yield f"    {name}{arguments(value)}" if inspect.isfunction(value) else f"    {name}"


def of_commands() -> Iterator[str]:
    (commands,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, parser in commands.choices.items():
        yield f"orthattack {name}"
        for action in parser._actions:
            flag = " ".join(action.option_strings) or action.dest
            more = {"nargs": action.nargs, "choices": action.choices, "default": action.default}
            given = [f"{key}={value!r}" for key, value in more.items() if value not in (None, argparse.SUPPRESS)]
            yield "    " + " ".join([flag, *given])


def surface() -> str:
    lines: list[str] = []
    for path in MODULES:
        module = importlib.import_module(path)
        lines += [f"# {path}", ""]
        public = {name: getattr(module, name) for name in module.__all__}
        # Whose methods a public class has as well.
        kinds = [parent for value in public.values() if inspect.isclass(value) for parent in value.__mro__]
        public |= {kind.__name__: kind for kind in kinds if kind.__module__.startswith("orthattack")}
        for name, value in sorted(public.items()):
            if inspect.isclass(value):
                lines += of_class(value)
            else:
                lines.append(f"{name}{arguments(value)}" if inspect.isfunction(value) else name)
        lines.append("")
    return "\n".join([*lines, "# the command line", "", *of_commands(), ""])


def test_the_public_surface_is_the_one_written_down():
    assert surface().splitlines() == STORED.read_text(encoding="utf-8").splitlines(), "meant? then: make surface"


if __name__ == "__main__":
    STORED.write_text(surface(), encoding="utf-8")
