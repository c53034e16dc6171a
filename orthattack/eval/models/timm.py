"""timm's classifiers, "timm:NAME", with its pretrained weights or a file of one's own."""

from __future__ import annotations

import math
from pathlib import Path

import timm
import timm.data
from torch import nn
from torchvision.transforms import InterpolationMode

from orthattack.eval.errors import EvaluationError, nearest, told
from orthattack.eval.models.classifier import Classifier, from_checkpoint
from orthattack.eval.models.fitting import read_fitted
from orthattack.eval.models.preprocessing import Preprocessing
from orthattack.eval.models.torchvision import imagenet_names
from orthattack.models import Normalized

PREFIX = "timm:"


def check(name: str) -> None:
    """Raise EvaluationError if timm has no such model."""
    architecture = name.removeprefix(PREFIX)
    if not timm.is_model(architecture.partition(".")[0]):
        close = nearest(architecture, timm.list_models(), 3) or ["resnet50"]
        raise EvaluationError(f"unknown model {name!r}; did you mean {' or '.join(PREFIX + one for one in close)}?")


def load(name: str, weights: str | Path | None) -> Classifier:
    """A classifier of timm's, with the weights in a file, or by default its own."""
    architecture = name.removeprefix(PREFIX)
    if weights is not None:
        default = timm.create_model(architecture, pretrained=False)

        def build(num_classes: int) -> nn.Module:
            model: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=num_classes)
            return model

        file = read_fitted(name, Path(weights), build)
        return from_checkpoint(name, architecture, build, _timm_preprocessing(name, default), file)
    try:
        model = timm.create_model(architecture, pretrained=True)  # timm itself loads with weights_only=True
    except Exception as error:  # of the network, of the hub, of names without weights
        raise EvaluationError(
            f"could not get the pretrained weights of {name} ({told(error)}): pass a state dict with --weights FILE"
        ) from error
    preprocessing = _timm_preprocessing(name, model)
    tag = str(model.pretrained_cfg.get("tag") or "")
    is_imagenet = model.num_classes == 1000 and "in1k" in tag
    classes = imagenet_names() if is_imagenet else None
    source = f"timm {timm.__version__}, {architecture.partition('.')[0]}" + (f".{tag}" if tag else "")
    wrapped = Normalized(model, preprocessing.mean, preprocessing.std)
    return Classifier(name, wrapped, preprocessing, classes, model.num_classes, source, architecture)


def _timm_preprocessing(name: str, model: nn.Module) -> Preprocessing:
    """timm's own evaluation transform of `model`."""
    config = timm.data.resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    mode = config["crop_mode"]
    if channels != 3 or height != width or mode not in ("center", "squash"):
        raise EvaluationError(
            f"{name} takes {channels} channels of {height}x{width} pixels with crop mode {mode!r}; only square RGB "
            "input, cropped from the centre or squashed, is supported"
        )
    return Preprocessing(
        math.floor(height / config["crop_pct"]),
        height,
        InterpolationMode(config["interpolation"]),
        tuple(config["mean"]),
        tuple(config["std"]),
        "squash" if mode == "squash" else "keep",
    )
