"""A model to evaluate, with what its manifest says of it; and one made from an architecture and a weights file."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from orthattack.eval.errors import FAILURES, EvaluationError, told
from orthattack.eval.models.preprocessing import Preprocessing
from orthattack.eval.models.weights import Checkpoint, few, load_strictly, state_sha256
from orthattack.models import Normalized, check_finite, checked_logits

Builder = Callable[[int], nn.Module]  # an architecture, for a number of classes


@dataclass(frozen=True)
class Classifier:
    """A model to evaluate.

    Attributes:
        name: as asked for.
        model: images (N, 3, H, W) in [0, 1] to logits (N, K), in evaluation mode. It normalises them itself:
            `orthattack.Normalized` makes such a model from one that does not.
        preprocessing: how images become its input; its mean and std say what `model` does, and are not applied.
        classes: names of the K classes, where they are known.
        num_classes: K; 0 to have the model asked.
        source: where the weights came from.
        architecture: the network's name; without it, its class.
        file_sha256: of the weights file, where there is one.
        published_accuracy: on ImageNet's validation set, as a share, where the weights' authors state it.
        notes: what a person should know of how it was made; printed, and kept with the run's warnings.
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    classes: tuple[str, ...] | None = None
    num_classes: int = 0
    source: str = "at hand"
    architecture: str | None = None
    file_sha256: str | None = None
    published_accuracy: float | None = None
    notes: tuple[str, ...] = ()

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
    """The same, in evaluation mode, and tried on a grey image.

    A `num_classes` of 0 is filled in from the model's logits. EvaluationError: a model that does not take its input, or
    whose logits have another shape than (1, K), are not finite, or are not as many as its classes."""
    name, size, model = classifier.name, classifier.preprocessing.crop, classifier.model
    model.eval()
    try:
        answer = _answer(model, 3, size, size)
    except FAILURES as error:  # what an architecture says of an image that it cannot take
        raise EvaluationError(
            f"{name} does not take images of {size}x{size}: {_cause(model, size, error) or _unknown(error, size)}"
        ) from error
    try:
        logits = checked_logits(answer, 1)
        check_finite(logits)
    except ValueError as error:
        module = "; for an evaluation write that as the forward of an nn.Module" if "lambda" in str(error) else ""
        raise EvaluationError(f"{name} on a grey image: {error}{module}") from error
    count = logits.shape[1]
    if classifier.num_classes not in (0, count):
        raise EvaluationError(f"{name} says it has {classifier.num_classes} classes but returns {count} logits")
    if classifier.classes is not None and len(classifier.classes) != count:
        raise EvaluationError(f"{name} names {len(classifier.classes)} classes but returns {count} logits")
    return replace(classifier, num_classes=count)


def _answer(model: nn.Module, channels: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> object:
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    with torch.inference_mode():
        return model(torch.full((1, channels, height, width), 0.5, device=device, dtype=dtype))


def _takes(model: nn.Module, channels: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> bool:
    try:
        return isinstance(_answer(model, channels, height, width, dtype), Tensor)
    except FAILURES:
        return False


_SIZES = (224, 32, 28, 64, 96, 128, 160, 192, 256, 288, 299, 320, 331, 384, 448, 512, 16, 48, 80, 112, 144, 176, 240)


def _cause(model: nn.Module, size: int, error: BaseException) -> str:
    """What of the input keeps a model from taking it, and the remedy, found by trying others; "" if none is taken."""
    if not isinstance(error, RuntimeError | ValueError | AssertionError | IndexError):
        return ""  # the fault of the code, not of the image
    dtypes = [torch.float32]
    kinds = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()} - {torch.float32}
    dtypes += sorted(kinds, key=str)
    first = next((layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    counts = list(dict.fromkeys((first or 3, 3, 1, 4)))
    until = time.monotonic() + _PATIENCE
    shapes = [(size, size), *((other, other) for other in _SIZES if other != size)]
    shapes += [(h, w) for h in sorted(_SIZES) for w in sorted(_SIZES) if h != w]
    rest = [(side, side) for side in range(4, 513) if side not in _SIZES]
    for channels in counts:  # what only flattens takes any shape of so many numbers: with three channels, if it can be
        for height, width in shapes + (rest if channels == counts[0] else []):
            for dtype in dtypes:
                if time.monotonic() > until:
                    return ""
                if _takes(model, channels, height, width, dtype):
                    return _remedy(size, height, width, channels, dtype)
    return ""


def _unknown(error: BaseException, size: int) -> str:
    if not re.search(r"shape|size|dimension|channel", str(error)):
        return told(error)
    return (
        f"{told(error)} (given float32 of shape (1, 3, {size}, {size})): pass --image-size if it takes another, or put "
        "a layer in front that makes of images what it takes"
    )


_PATIENCE = 20.0  # seconds that are spent on finding out what a model takes instead


def _remedy(size: int, height: int, width: int, channels: int, dtype: torch.dtype) -> str:
    found: list[str] = []
    if dtype != torch.float32:
        found.append(
            f"its weights are {_plain(dtype)}, and images come in float32: let it be model.float(), or, to attack it "
            f"as it is, a module that returns model(x.to(torch.{_plain(dtype)}))"
        )
    if channels == 1:
        found.append(
            "it takes one channel, and images have three: let it be "
            "nn.Sequential(torchvision.transforms.Grayscale(), model)"
        )
    elif channels != 3:
        found.append(f"it takes {channels} channels, and images have three: add a layer that makes them")
    if height != width:
        found.append(
            f"it takes {height}x{width} pixels, and input is square here: put a layer in front that resizes, a module "
            f"that returns model(nn.functional.interpolate(x, ({height}, {width}), mode='bilinear'))"
        )
    elif height != size:
        found.append(f"it takes {height}x{height}: pass --image-size {height}, or Preprocessing(crop={height})")
    return "; and ".join(found)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def from_checkpoint(
    name: str, architecture: str, build: Builder, preprocessing: Preprocessing, file: Checkpoint
) -> Classifier:
    """A classifier whose number of classes, and names and normalisation if it has them, come from the file.
    EvaluationError: weights of another architecture, damaged ones, or metadata that cannot be meant."""
    num_classes = _num_classes(name, build, file)
    if num_classes < 2:
        raise EvaluationError(
            f"{file.path} has weights for one logit, and two classes need two: let --model be package.module:function, "
            "which loads them and returns a module whose forward is nn.functional.pad(model(x), (1, 0)), so that class "
            "1 is what the sigmoid says"
        )
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
        notes=file.notes,
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
    two, three = shapes(build, 2), shapes(build, 3)
    head = [key for key in two if two[key] != three[key]]
    # With the right shape but for the count, which is then no larger than the file.
    counts = {
        file.tensors[key].shape[0]
        for key in head
        if key in file.tensors and file.tensors[key].ndim > 0 and file.tensors[key].shape[1:] == two[key][1:]
    }
    if len(counts) != 1:
        there = [key for key in two if key in file.tensors]
        if len(there) * 2 < len(two):
            hint = f"its names are such as {few(sorted(file.tensors))}, the model's {few(list(two))}"
        elif not counts:
            hint = "are they a network without its last layer?"
        else:
            hint = "they disagree on the number of classes"
        raise EvaluationError(
            f"{file.path} does not look like weights of {name}: it has no {' or '.join(head)} of its shape; {hint}"
        )
    return counts.pop()


def shapes(build: Builder, count: int) -> Mapping[str, torch.Size]:
    """Of the state dict of an architecture with so many classes."""
    try:
        with torch.device("meta"):  # nothing is allocated or initialised
            model = build(count)
    except RuntimeError:  # RegNet and some of timm compute with tensors while they are built
        model = build(count)
    return {key: value.shape for key, value in model.state_dict().items()}
