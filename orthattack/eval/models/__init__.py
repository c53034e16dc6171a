"""The models that an evaluation attacks, by name, with their weights and preprocessing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthattack.eval import lazily

if TYPE_CHECKING:
    from orthattack.eval.models.classifier import Classifier
    from orthattack.eval.models.load import load_classifier
    from orthattack.eval.models.preprocessing import Preprocessing

__all__ = ["Classifier", "Preprocessing", "load_classifier"]

BUNDLED = {"cifar10-standard": "standard.safetensors", "cifar10-robust": "robust-linf-8.safetensors"}
"""The models that come with the package, see weights/MODEL_CARD.md, and their files."""

IMAGENET = {"efficientnet-lite0": 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}
"""The models that the extra "imagenet" brings, with their weights, and the pixels of their input."""

__getattr__ = lazily(
    __name__, {"Classifier": "classifier", "Preprocessing": "preprocessing", "load_classifier": "load"}
)
