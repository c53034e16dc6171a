"""The evaluation: attacks on models over images, measured, stored, and reported.

>>> from orthattack.eval import evaluate
>>> run = evaluate("cifar10-robust", "cifar10-samples", ["OrthoPGD"], eps=8 / 255)  # doctest: +SKIP

Names are imported on first use, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthattack.eval.api import evaluate, load, transfer
    from orthattack.eval.results.stored_run import Run

__all__ = ["Run", "evaluate", "load", "transfer"]


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__``: its public names, each imported from its module on first use."""

    def attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return attribute


__getattr__ = lazily(__name__, {"evaluate": "api", "load": "api", "transfer": "api", "Run": "results.stored_run"})
