"""Labelled images, whatever their source, and which class is which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthattack.eval.data.dataset import Photographs
    from orthattack.eval.data.load import load_photographs

__all__ = ["Photographs", "load_photographs"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    homes = {"Photographs": "dataset", "load_photographs": "load"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)
