"""Labelled images, whatever their source, and which class is which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthattack.eval.data.dataset import ImageDataset
    from orthattack.eval.data.load import load_dataset

__all__ = ["ImageDataset", "load_dataset"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    homes = {"ImageDataset": "dataset", "load_dataset": "load"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)
