"""A model to evaluate, with what its manifest says of it; and one made from an architecture and a weights file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from orthattack.eval.errors import FAILURES, EvaluationError, first_line
from orthattack.eval.models.preprocessing import Preprocessing
from orthattack.eval.models.weights import Checkpoint, load_strictly, state_sha256
from orthattack.model import Normalized

__all__ = ["Builder", "Classifier", "checked", "from_checkpoint"]

Builder = Callable[[int], nn.Module]
"""An architecture, for a number of classes."""


@dataclass(frozen=True)
class Classifier:
    """A model to evaluate.

    Attributes:
        name: as asked for.
        model: images (N, 3, H, W) in [0, 1] to logits (N, K), in evaluation mode. It normalises them itself:
            `orthattack.Normalized` makes such a model from one that does not.
        preprocessing: how photographs become its input; its mean and std say what `model` does, and are not applied.
        classes: names of the K classes, where they are known.
        num_classes: K.
        source: where the weights came from.
        architecture: the network's name; without it, its class.
        file_sha256: of the weights file, where there is one.
        published_accuracy: on ImageNet's validation set, as a share, where the weights' authors state it.
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    num_classes: int
    source: str
    architecture: str | None = None
    file_sha256: str | None = None
    published_accuracy: float | None = None

    def describe(self) -> dict[str, Any]:
        """What a reader needs to tell which model it was, as JSON.

        ``sha256`` is the weights file's, or else, where there is none, the state dict's (`state_sha256`).
        """
        inner = self.model.model if isinstance(self.model, Normalized) else self.model
        return {
            "name": self.name,
            "architecture": self.architecture or type(inner).__name__,
            "source": self.source,
            "sha256": self.file_sha256 or state_sha256(inner.state_dict()),
            "sha256_of": "state dict" if self.file_sha256 is None else "file",
            "num_classes": self.num_classes,
            "published_accuracy": self.published_accuracy,
            "classes": None if self.classes is None else list(self.classes),
            "parameters": sum(parameter.numel() for parameter in inner.parameters()),
            "preprocessing": self.preprocessing.describe(),
        }


def checked(classifier: Classifier) -> Classifier:
    """The same, in evaluation mode, without weight gradients, and tried on a grey image.

    A `num_classes` of 0 is filled in from the model's logits.

    Raises:
        EvaluationError: a model that does not take its input's size, or whose logits have another shape than (1, K),
            are not finite, or are not as many as its classes.
    """
    name, size, model = classifier.name, classifier.preprocessing.crop, classifier.model
    model.eval().requires_grad_(False)
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    try:
        with torch.inference_mode():
            logits = model(torch.full((1, 3, size, size), 0.5, device=device))
    except FAILURES as error:  # what an architecture says of a size that it cannot take
        raise EvaluationError(
            f"{name} does not take images of {size}x{size} ({first_line(error)}): see --image-size"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1 or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise EvaluationError(f"{name} must return logits of shape (N, classes), at least 2; for one image got {found}")
    if not bool(logits.isfinite().all()):
        raise EvaluationError(
            f"{name} returns NaN or infinite logits for a grey image: are the weights from {classifier.source} whole?"
        )
    count = logits.shape[1]
    if classifier.num_classes not in (0, count):
        raise EvaluationError(f"{name} says it has {classifier.num_classes} classes but returns {count} logits")
    if classifier.classes is not None and len(classifier.classes) != count:
        raise EvaluationError(f"{name} names {len(classifier.classes)} classes but returns {count} logits")
    return replace(classifier, num_classes=count)


def from_checkpoint(
    name: str, architecture: str, build: Builder, preprocessing: Preprocessing, file: Checkpoint
) -> Classifier:
    """A classifier whose number of classes, and names and normalisation if it has them, come from the file.

    Raises:
        EvaluationError: weights of another architecture, damaged ones, or metadata that cannot be meant.
    """
    num_classes = _num_classes(name, build, file)
    if num_classes < 2:
        raise EvaluationError(f"{file.path} has weights for {num_classes} classes; at least 2 are needed")
    model = build(num_classes)
    load_strictly(name, model, file.tensors, file.path)
    classes = file.listed("classes")
    if classes is not None and len(classes) != num_classes:
        raise EvaluationError(f"{file.path} names {len(classes)} classes but has weights for {num_classes}")
    preprocessing = replace(
        preprocessing,
        mean=_normalisation("mean", file, preprocessing.mean),
        std=_normalisation("std", file, preprocessing.std),
    )
    return Classifier(
        name,
        Normalized(model, preprocessing.mean, preprocessing.std),
        preprocessing,
        None if classes is None else tuple(map(str, classes)),
        num_classes,
        str(file.path),
        architecture,
        file.sha256,
    )


def _normalisation(key: str, file: Checkpoint, default: tuple[float, ...]) -> tuple[float, ...]:
    """Three numbers from the metadata, if it has them."""
    values = file.listed(key)
    if values is None:
        return default
    # Not isfinite, which raises where a whole number is too large for a float.
    good = len(values) == 3 and all(isinstance(v, int | float) and -1e30 < v < 1e30 for v in values)
    if not good or (key == "std" and min(values) <= 0):
        raise EvaluationError(f"{file.path} has metadata {key}={values}: it must be three finite numbers, std > 0")
    return tuple(map(float, values))


def _num_classes(name: str, build: Builder, file: Checkpoint) -> int:
    """The size of what in the file are the weights of the architecture's last layer: those that differ in size between
    two builds with different numbers of classes."""
    few, more = _shapes(build, 2), _shapes(build, 3)
    head = [key for key in few if few[key] != more[key]]
    # With the right shape but for the count, which is then no larger than the file.
    counts = {
        file.tensors[key].shape[0]
        for key in head
        if key in file.tensors and file.tensors[key].ndim > 0 and file.tensors[key].shape[1:] == few[key][1:]
    }
    if len(counts) != 1:
        raise EvaluationError(f"{file.path} does not look like weights of {name}: it has no {' or '.join(head)}")
    return counts.pop()


def _shapes(build: Builder, count: int) -> Mapping[str, torch.Size]:
    try:
        with torch.device("meta"):  # nothing is allocated or initialised
            model = build(count)
    except RuntimeError:  # RegNet and some of timm compute with tensors while they are built
        model = build(count)
    return {key: value.shape for key, value in model.state_dict().items()}
