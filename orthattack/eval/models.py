"""Classifiers to evaluate: torchvision's by name, with their own weights or a file's, and two bundled ones.

This is the only module that reads weights: safetensors, or PyTorch files with ``weights_only=True``, so nothing in a
file is ever executed.
"""

from __future__ import annotations

import difflib
import json
import math
import pickle  # for the error that torch.load raises
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from orthattack.model import Normalized

__all__ = ["BUNDLED", "Classifier", "EvaluationError", "Preprocessing", "check_name", "load_classifier"]

BUNDLED = {"cifar10-standard": "standard.safetensors", "cifar10-robust": "robust-linf-8.safetensors"}
"""The models that come with the package, see weights/MODEL_CARD.md, and their files."""

Builder = Callable[[int], nn.Module]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class EvaluationError(Exception):
    """Something the person who started the evaluation can put right; the message says what and how."""


@dataclass(frozen=True)
class Preprocessing:
    """From a photograph to the model's input in [0, 1]; the normalisation stays inside the model.

    Attributes:
        resize: pixels of the shorter side before the crop.
        crop: pixels of the model's square input. A photograph of that size already is used as it is.
        interpolation: how the weights were trained to be resized.
        mean: normalisation, one number per channel, in units of [0, 1] pixels.
        std: the same.
    """

    resize: int
    crop: int
    interpolation: InterpolationMode = InterpolationMode.BILINEAR
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, crop, crop), float32."""
        image = _eight_bit(image).convert("RGB")
        if image.size != (self.crop, self.crop):
            image = transforms.resize(image, [self.resize], interpolation=self.interpolation, antialias=True)
            image = transforms.center_crop(image, [self.crop, self.crop])
        pixels: Tensor = transforms.convert_image_dtype(transforms.pil_to_tensor(image), torch.float32)
        return pixels

    def at_size(self, size: int) -> Preprocessing:
        """The same for an input of `size` pixels, with the crop's share of the photograph kept."""
        return replace(self, resize=max(size, round(size * self.resize / self.crop)), crop=size)


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, where Pillow would clip it; wider pixels have no known range."""
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; save the photograph with 8 bits a channel")
    return image


@dataclass(frozen=True)
class Classifier:
    """A model to evaluate.

    Attributes:
        name: as asked for.
        model: images (N, 3, H, W) in [0, 1] to logits (N, K), in evaluation mode.
        preprocessing: how photographs become its input.
        classes: names of the K classes, where they are known.
        num_classes: K.
        source: where the weights came from.
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    num_classes: int
    source: str


def check_name(name: str) -> None:
    """Raise EvaluationError if there is no classifier of that name."""
    known = [*torchvision.models.list_models(module=torchvision.models), *BUNDLED]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3) or ["resnet50", *BUNDLED]
        raise EvaluationError(f"unknown model {name!r}; did you mean {' or '.join(close)}?")


def load_classifier(name: str, weights: Path | None = None, image_size: int | None = None) -> Classifier:
    """Load a classifier.

    Args:
        name: one of `BUNDLED`, or a torchvision classifier such as "resnet50".
        weights: a state dict, .safetensors or PyTorch, for that architecture with any number of classes; without it,
            torchvision's own default weights are used, and downloaded if they are not in torch's cache.
        image_size: pixels of the model's square input, where it differs from what the weights say.

    Raises:
        EvaluationError: unknown name, weights that cannot be downloaded or read, or that do not fit.
    """
    if image_size is not None and image_size < 1:
        raise EvaluationError(f"--image-size must be at least 1; got {image_size}")
    check_name(name)
    if name in BUNDLED:
        if weights is not None:
            raise EvaluationError(f"--weights goes with a torchvision architecture; {name} comes with its own")
        with resources.as_file(resources.files(__package__) / "weights" / BUNDLED[name]) as path:
            classifier = _from_file(name, _cifar_regnet, Preprocessing(32, 32), path, _read(path))
        classifier = replace(classifier, source="bundled")
    else:
        default = torchvision.models.get_model_weights(name).DEFAULT
        if weights is None:
            classifier = _downloaded(name, default)
        else:
            state = _read(weights)
            classifier = _from_file(name, _architecture(name, state.tensors), _preset(default), weights, state)
    if image_size is not None:
        classifier = replace(classifier, preprocessing=classifier.preprocessing.at_size(image_size))
    size = classifier.preprocessing.crop
    try:
        with torch.inference_mode():
            logits = classifier.model(torch.full((1, 3, size, size), 0.5))
    except Exception as error:  # what an architecture says of a size that it cannot take
        reason = str(error).partition("\n")[0]
        raise EvaluationError(f"{name} does not take images of {size}x{size} ({reason}): see --image-size") from error
    if not bool(logits.isfinite().all()):
        raise EvaluationError(
            f"{name} returns NaN or infinite logits for a grey image: are the weights from {classifier.source} whole?"
        )
    return classifier


def _downloaded(name: str, default: Any) -> Classifier:
    cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(default.url).name
    try:
        state = default.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # of the network, of HTTP, of a damaged file
        if cache.exists():
            raise EvaluationError(
                f"{cache}, the cached weights of {name}, is damaged: delete it, and try again"
            ) from error
        reason = str(getattr(error, "reason", error)).partition("\n")[0]
        raise EvaluationError(
            f"could not download the weights of {name} ({reason}): either fetch {default.url} "
            f"elsewhere and save it as {cache}, or pass a state dict of your own with --weights FILE"
        ) from error
    classes = tuple(default.meta["categories"])
    model = _architecture(name, state)(len(classes))
    _load_strictly(name, model, state, cache)
    return _classifier(name, model, _preset(default), classes, len(classes), str(default))


def _preset(default: Any) -> Preprocessing:
    preset = default.transforms()
    return Preprocessing(
        preset.resize_size[0], preset.crop_size[0], preset.interpolation, tuple(preset.mean), tuple(preset.std)
    )


def _architecture(name: str, state: Mapping[str, Tensor]) -> Builder:
    """torchvision's builder of an architecture as `state`, weights trained on ImageNet-style input, needs it."""
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        has_auxiliary = any(key.lower().startswith("aux") for key in state)
        options = {"init_weights": False, "aux_logits": has_auxiliary, "transform_input": True}
    return lambda num_classes: torchvision.models.get_model(name, num_classes=num_classes, **options)


def _from_file(name: str, build: Builder, preprocessing: Preprocessing, path: Path, state: _State) -> Classifier:
    """A classifier whose number of classes, and names and normalisation if it has them, come from the file."""
    num_classes = _num_classes(name, build, state.tensors, path)
    if num_classes < 2:
        raise EvaluationError(f"{path} has weights for {num_classes} classes; at least 2 are needed")
    model = build(num_classes)
    _load_strictly(name, model, state.tensors, path)
    classes = state.listed("classes")
    if classes is not None and len(classes) != num_classes:
        raise EvaluationError(f"{path} names {len(classes)} classes but has weights for {num_classes}")
    preprocessing = replace(
        preprocessing,
        mean=_normalisation("mean", state, preprocessing.mean, path),
        std=_normalisation("std", state, preprocessing.std, path),
    )
    names = None if classes is None else tuple(map(str, classes))
    return _classifier(name, model, preprocessing, names, num_classes, str(path))


def _normalisation(key: str, state: _State, default: tuple[float, ...], path: Path) -> tuple[float, ...]:
    """Three numbers from the metadata, if it has them."""
    values = state.listed(key)
    if values is None:
        return default
    good = len(values) == 3 and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
    if not good or (key == "std" and min(values) <= 0):
        raise EvaluationError(f"{path} has metadata {key}={values}: it must be three finite numbers, std > 0")
    return tuple(map(float, values))


def _classifier(
    name: str, model: nn.Module, preprocessing: Preprocessing, classes: tuple[str, ...] | None, count: int, source: str
) -> Classifier:
    wrapped = Normalized(model, preprocessing.mean, preprocessing.std).eval().requires_grad_(False)
    return Classifier(name, wrapped, preprocessing, classes, count, source)


def _num_classes(name: str, build: Builder, tensors: Mapping[str, Tensor], path: Path) -> int:
    """The size of what in the file are the weights of the architecture's last layer: those that differ in size between
    two builds with different numbers of classes."""

    def shapes(count: int) -> dict[str, torch.Size]:
        try:
            with torch.device("meta"):  # nothing is allocated or initialised
                model = build(count)
        except NotImplementedError:  # RegNet computes its widths with tensors
            model = build(count)
        return {key: value.shape for key, value in model.state_dict().items()}

    few, more = shapes(2), shapes(3)
    head = [key for key in few if few[key] != more[key]]
    counts = {tensors[key].shape[0] for key in head if key in tensors and tensors[key].ndim > 0}
    if len(counts) != 1:
        raise EvaluationError(f"{path} does not look like weights of {name}: it has no {' or '.join(head)}")
    return counts.pop()


def _load_strictly(name: str, model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape]
    problems = [
        f"{len(keys)} {what} (such as {keys[0]})"
        for keys, what in ((missing, "missing"), (extra, "unexpected"), (sorted(wrong), "of another shape"))
        if keys
    ]
    if problems:
        raise EvaluationError(f"{path} does not fit {name}: of its weights, {', '.join(problems)}")
    broken = [key for key, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise EvaluationError(f"{path} has NaN or infinite weights, such as {broken[0]}")
    model.load_state_dict({key: value.to(own[key].dtype) for key, value in tensors.items()})


@dataclass(frozen=True)
class _State:
    """What a weights file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def listed(self, key: str) -> list[Any] | None:
        """A list from the metadata, if it is there and is one."""
        try:
            value = json.loads(self.metadata[key])
        except (KeyError, ValueError):
            return None
        return value if isinstance(value, list) else None


def _read(path: Path) -> _State:
    if not path.is_file():
        raise EvaluationError(f"weights file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            return _State({key.removeprefix("module."): file.get_tensor(key) for key in keys}, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        if path.suffix == ".safetensors":
            raise EvaluationError(f"{path} is not a whole safetensors file ({error})") from error
    try:
        with warnings.catch_warnings():  # about old formats, which are read or refused all the same
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EvaluationError(
            f"{path} is refused: it holds more than tensors, and loading it could run code; save the state dict alone, "
            "with safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # of a file that is anything at all
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise EvaluationError(f"{path} is neither a safetensors nor a PyTorch file ({reason})") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise EvaluationError(f"{path} is not a state dict: it must map names to tensors")
    # What torch.nn.DataParallel and DistributedDataParallel put before every name.
    return _State({str(key).removeprefix("module."): value for key, value in content.items()}, {})


def _cifar_regnet(num_classes: int) -> nn.Module:
    """A torchvision RegNet whose strides suit 32x32 photographs, with full instead of grouped convolutions."""
    widths = [64, 128, 192]
    model: nn.Module = RegNet(BlockParams([2, 2, 2], widths, widths, [1.0] * 3, [1, 2, 2]), num_classes=num_classes)
    return model
