"""The evaluation: attacks on models over images, measured, stored, and reported.

>>> from orthattack.eval import evaluate
>>> run = evaluate("cifar10-robust", "cifar10-samples", ["OrthoPGD"], eps=8 / 255)  # doctest: +SKIP

Names are imported on first use, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthattack.eval.api import evaluate
    from orthattack.eval.results.stored_run import Run

__all__ = ["Run", "evaluate"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        from orthattack.eval.api import evaluate

        return evaluate
    if name == "Run":
        from orthattack.eval.results.stored_run import Run

        return Run
    raise AttributeError(f"module 'orthattack.eval' has no attribute {name!r}")
