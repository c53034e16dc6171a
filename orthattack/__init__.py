"""Adversarial attacks whose perturbation is kept orthogonal to the image.

>>> from orthattack import OrthoPGD
>>> adversarials = OrthoPGD(model, eps=4 / 255)(images, labels)  # doctest: +SKIP

The names are those of the stub beside this file, imported on first use, so that the command line answers before torch
is loaded.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.2.0.dev0"

_STUB = ast.parse(Path(__file__).with_name("__init__.pyi").read_text(encoding="utf-8"))
_HOME = {name.name: node.module or "" for node in _STUB.body if isinstance(node, ast.ImportFrom) for name in node.names}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'orthattack' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
