"""torchvision's classifiers, with its weights or a file of one's own; and the bundled ones, which are its RegNets."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.regnet import BlockParams, RegNet

from orthattack.eval.errors import EvaluationError
from orthattack.eval.models import BUNDLED, IMAGENET
from orthattack.eval.models.classifier import Builder, Classifier, from_checkpoint
from orthattack.eval.models.fitting import read_fitted
from orthattack.eval.models.preprocessing import Preprocessing
from orthattack.eval.models.weights import load_strictly, read_checkpoint
from orthattack.models import Normalized


def list_models() -> list[dict[str, Any]]:
    """Every model that has a plain name, the bundled ones first; nothing is downloaded.

    Each has ``name``; ``source``, "bundled", "extra imagenet" or "torchvision"; ``weights``, what ``--weights`` may
    name; of those ``default_weights``; and ``input_size``, the default weights' crop in pixels.
    """
    small = [(name, "bundled", 32) for name in BUNDLED]
    lite = [(name, "extra imagenet", size) for name, size in IMAGENET.items()]
    found: list[dict[str, Any]] = [
        {"name": name, "source": source, "weights": [], "default_weights": None, "input_size": size}
        for name, source, size in small + lite
    ]
    for name in names():
        weights = torchvision.models.get_model_weights(name)
        found.append(
            {
                "name": name,
                "source": "torchvision",
                "weights": [str(member) for member in weights],
                "default_weights": str(weights.DEFAULT),
                "input_size": _preset(weights.DEFAULT).crop,
            }
        )
    return found


def names() -> list[str]:
    """The plain names of its classifiers."""
    found: list[str] = torchvision.models.list_models(module=torchvision.models)
    return found


def imagenet_names() -> tuple[str, ...]:
    """What the classes of ImageNet-1k are called, in their order."""
    return tuple(torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"])


def bundled(name: str) -> Classifier:
    """A model that comes with the package."""
    with resources.as_file(resources.files("orthattack.eval") / "weights" / BUNDLED[name]) as path:
        file = read_checkpoint(path)
    classifier = from_checkpoint(name, "RegNet for 32x32", _cifar_regnet, Preprocessing(32, 32), file)
    return replace(classifier, source="bundled")


def load(name: str, weights: str | Path | None) -> Classifier:
    """A classifier of torchvision's, with the weights named or in a file, or by default its own."""
    available = torchvision.models.get_model_weights(name)
    chosen = available.DEFAULT if weights is None else _named_weights(name, available, str(weights))
    if chosen is not None:
        return _downloaded(name, chosen)
    file = read_fitted(name, Path(weights or ""), _architecture(name, {}))
    preprocessing = _preset(available.DEFAULT)
    size = _vit_image_size(name, file.tensors)
    if size is not None and size != preprocessing.crop:
        preprocessing = preprocessing.at_size(size)
    return from_checkpoint(name, name, _architecture(name, file.tensors), preprocessing, file)


def _named_weights(name: str, available: Any, text: str) -> Any:
    """The member of torchvision's enumeration `available` that is meant, or None if a file is."""
    enumeration, _, member = text.rpartition(".")
    if enumeration in ("", available.__name__) and member in available.__members__:
        return available[member]
    if re.fullmatch(r"\w+_Weights\.\w+|IMAGENET1K_\w+", text) and not os.path.exists(text):  # noqa: PTH110 - pathlib's may raise
        raise EvaluationError(f"{name} has no weights {text}; it has {', '.join(map(str, available))}")
    return None


def _downloaded(name: str, weights: Any) -> Classifier:
    cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # of the network, of HTTP, of a damaged file
        if cache.exists():
            raise EvaluationError(
                f"{cache}, the cached weights of {name}, is damaged: delete it, and try again"
            ) from error
        reason = str(getattr(error, "reason", error)).partition("\n")[0]
        raise EvaluationError(
            f"could not download the weights of {name} ({reason}): either fetch {weights.url} "
            f"elsewhere and save it as {cache}, or pass a state dict of your own with --weights FILE"
        ) from error
    classes, preprocessing = tuple(weights.meta["categories"]), _preset(weights)
    model = _architecture(name, state)(len(classes))
    load_strictly(name, model, state, cache)
    wrapped = Normalized(model, preprocessing.mean, preprocessing.std)
    published = weights.meta["_metrics"].get("ImageNet-1K", {}).get("acc@1")
    return Classifier(
        name, wrapped, preprocessing, classes, len(classes), str(weights), name,
        published_accuracy=None if published is None else published / 100,
    )  # fmt: skip


def _preset(weights: Any) -> Preprocessing:
    preset = weights.transforms()
    return Preprocessing(
        preset.resize_size[0], preset.crop_size[0], preset.interpolation, tuple(preset.mean), tuple(preset.std)
    )


def _architecture(name: str, state: Mapping[str, Tensor]) -> Builder:
    """torchvision's builder of an architecture as `state`, weights trained on ImageNet-style input, needs it."""
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        has_auxiliary = any(key.lower().startswith("aux") for key in state)
        options = {"init_weights": False, "aux_logits": has_auxiliary, "transform_input": True}
    elif (size := _vit_image_size(name, state)) is not None:
        options = {"image_size": size}
    return lambda num_classes: torchvision.models.get_model(name, num_classes=num_classes, **options)


def _vit_image_size(name: str, state: Mapping[str, Tensor]) -> int | None:
    """The input size that a vision transformer's positions were learned for, if `state` is one's."""
    positions, patches = state.get("encoder.pos_embedding"), state.get("conv_proj.weight")
    if not name.startswith("vit_") or positions is None or patches is None or positions.ndim != 3 or patches.ndim != 4:
        return None
    return math.isqrt(max(positions.shape[1] - 1, 0)) * patches.shape[-1] or None


def _cifar_regnet(num_classes: int) -> nn.Module:
    """A torchvision RegNet whose strides suit 32x32 images, with full instead of grouped convolutions."""
    widths = [64, 128, 192]
    model: nn.Module = RegNet(BlockParams([2, 2, 2], widths, widths, [1.0] * 3, [1, 2, 2]), num_classes=num_classes)
    return model
