"""Labelled images, whatever their source, and which class is which."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthattack.eval import lazily

if TYPE_CHECKING:
    from orthattack.eval.data.dataset import ImageDataset
    from orthattack.eval.data.load import load_dataset

__all__ = ["ImageDataset", "load_dataset"]

__getattr__ = lazily(__name__, {"ImageDataset": "dataset", "load_dataset": "load"})
