"""Classifiers by name: torchvision's, timm's, two bundled ones, and whatever a function of the user's returns."""

from __future__ import annotations

import difflib
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
from torchvision.transforms import InterpolationMode

from orthattack.eval import plugin
from orthattack.eval.errors import EvaluationError, first_line
from orthattack.eval.models.classifier import Builder, Classifier, checked, from_checkpoint, shapes
from orthattack.eval.models.fitting import fitted
from orthattack.eval.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from orthattack.eval.models.weights import Checkpoint, load_strictly, read_checkpoint
from orthattack.models import Normalized

__all__ = [
    "BUNDLED",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Classifier",
    "EvaluationError",
    "Preprocessing",
    "check_name",
    "list_models",
    "load_classifier",
]

BUNDLED = {"cifar10-standard": "standard.safetensors", "cifar10-robust": "robust-linf-8.safetensors"}
"""The models that come with the package, see weights/MODEL_CARD.md, and their files."""

_TIMM = "timm:"
_WEIGHTS = (".pt", ".pth", ".safetensors", ".bin", ".ckpt", ".tar")


def list_models() -> list[dict[str, Any]]:
    """Every model that has a plain name, the bundled ones first; nothing is downloaded.

    Each has ``name``; ``source``, "bundled" or "torchvision"; ``weights``, what ``--weights`` may name; of those
    ``default_weights``; and ``input_size``, the default weights' crop in pixels.
    """
    bundled: list[dict[str, Any]] = [
        {"name": name, "source": "bundled", "weights": [], "default_weights": None, "input_size": 32}
        for name in BUNDLED
    ]
    others = []
    for name in _torchvision_names():
        weights = torchvision.models.get_model_weights(name)
        others.append(
            {
                "name": name,
                "source": "torchvision",
                "weights": [str(member) for member in weights],
                "default_weights": str(weights.DEFAULT),
                "input_size": _preset(weights.DEFAULT).crop,
            }
        )
    return bundled + others


def check_name(name: str) -> None:
    """Raise EvaluationError if there is no classifier of that name; a user's function is not called yet."""
    if plugin.is_plugin(name) and not name.startswith(_TIMM) and not name.partition(":")[0].endswith(".py"):
        return
    if name.startswith(_TIMM):
        timm = _import_timm(name)
        architecture = name.removeprefix(_TIMM)
        if not timm.is_model(architecture.partition(".")[0]):
            close = difflib.get_close_matches(architecture, timm.list_models(), n=3) or ["resnet50"]
            raise EvaluationError(f"unknown model {name!r}; did you mean {' or '.join(_TIMM + one for one in close)}?")
        return
    known = [*_torchvision_names(), *BUNDLED]
    if name not in known:
        suffix = Path(name.partition(":")[0]).suffix
        if suffix in _WEIGHTS:
            raise EvaluationError(f"{name!r} is a weights file: pass --model ARCHITECTURE --weights {name}")
        if suffix == ".py":
            path, _, function = name.partition(":")
            module = path.removeprefix("./").removesuffix(".py").replace("/", ".")
            raise EvaluationError(
                f"{name!r} is a Python file: name a function of it, --model {module}:{function or 'FUNCTION'}"
            )
        close = difflib.get_close_matches(name, known, n=3) or ["resnet50", *BUNDLED]
        raise EvaluationError(
            f"unknown model {name!r}; did you mean {' or '.join(close)}? There are also timm:NAME and your own "
            "package.module:function"
        )


def load_classifier(name: str, weights: str | Path | None = None, image_size: int | None = None) -> Classifier:
    """Load a classifier.

    Args:
        name: one of `BUNDLED`; a torchvision classifier such as "resnet50"; "timm:NAME"; or "package.module:function",
            called without arguments, which returns a `Classifier`, or an ``nn.Module`` that takes images in [0, 1] as
            they are.
        weights: a file with a state dict, .safetensors or PyTorch, for that architecture with any number of classes;
            or, for torchvision, the name of weights, such as "IMAGENET1K_V2" or "ResNet50_Weights.IMAGENET1K_V2".
            Without it, torchvision's or timm's default weights are used, and downloaded if they are not cached.
        image_size: pixels of the model's square input, where it differs from what the weights say. For an ``nn.Module``
            of the user's it is needed: images are resized to it by their shorter side, and cropped.

    Raises:
        EvaluationError: unknown name, weights that cannot be downloaded or read, or that do not fit; a function of the
            user's that fails or returns something else.
    """
    if image_size is not None and image_size < 1:
        raise EvaluationError(f"--image-size must be at least 1; got {image_size}")
    check_name(name)
    if name.startswith(_TIMM):
        classifier = _from_timm(name, weights)
    elif plugin.is_plugin(name):
        classifier = _from_plugin(name, weights, image_size)
    elif name in BUNDLED:
        if weights is not None:
            raise EvaluationError(f"--weights goes with a torchvision architecture; {name} comes with its own")
        with resources.as_file(resources.files("orthattack.eval") / "weights" / BUNDLED[name]) as path:
            file = read_checkpoint(path)
        classifier = from_checkpoint(name, "RegNet for 32x32", _cifar_regnet, Preprocessing(32, 32), file)
        classifier = replace(classifier, source="bundled")
    else:
        classifier = _from_torchvision(name, weights)
    if image_size is not None:
        classifier = replace(classifier, preprocessing=classifier.preprocessing.at_size(image_size))
    classifier.model.requires_grad_(False)
    return checked(classifier)


def _torchvision_names() -> list[str]:
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _from_torchvision(name: str, weights: str | Path | None) -> Classifier:
    available = torchvision.models.get_model_weights(name)
    chosen = available.DEFAULT if weights is None else _named_weights(name, available, str(weights))
    if chosen is not None:
        return _downloaded(name, chosen)
    file = _read(name, str(weights), _architecture(name, {}))
    preprocessing = _preset(available.DEFAULT)
    size = _vit_image_size(name, file.tensors)
    if size is not None and size != preprocessing.crop:
        preprocessing = preprocessing.at_size(size)
    return from_checkpoint(name, name, _architecture(name, file.tensors), preprocessing, file)


def _read(name: str, weights: str | Path, build: Builder) -> Checkpoint:
    """A weights file, with its names as the architecture has them."""
    return fitted(read_checkpoint(Path(weights)), name, shapes(build, 2))


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


def _import_timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise EvaluationError(f"{name} needs timm ({first_line(error)}): pip install 'orthattack[timm]'") from error
    return timm


def _from_timm(name: str, weights: str | Path | None) -> Classifier:
    timm = _import_timm(name)
    architecture = name.removeprefix(_TIMM)
    if weights is not None:
        default = timm.create_model(architecture, pretrained=False)

        def build(num_classes: int) -> nn.Module:
            model: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=num_classes)
            return model

        file = _read(name, weights, build)
        return from_checkpoint(name, architecture, build, _timm_preprocessing(name, default), file)
    try:
        model = timm.create_model(architecture, pretrained=True)  # timm itself loads with weights_only=True
    except Exception as error:  # of the network, of the hub, of names without weights
        raise EvaluationError(
            f"could not get the pretrained weights of {name} ({type(error).__name__}: {first_line(error)}): pass a "
            "state dict with --weights FILE"
        ) from error
    preprocessing = _timm_preprocessing(name, model)
    tag = str(model.pretrained_cfg.get("tag") or "")
    is_imagenet = model.num_classes == 1000 and "in1k" in tag
    classes = tuple(torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"]) if is_imagenet else None
    source = f"timm {timm.__version__}, {architecture.partition('.')[0]}" + (f".{tag}" if tag else "")
    wrapped = Normalized(model, preprocessing.mean, preprocessing.std)
    return Classifier(name, wrapped, preprocessing, classes, model.num_classes, source, architecture)


def _timm_preprocessing(name: str, model: nn.Module) -> Preprocessing:
    """timm's own evaluation transform of `model`."""
    import timm.data

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


def _from_plugin(name: str, weights: str | Path | None, image_size: int | None) -> Classifier:
    made = plugin.call(name)
    if isinstance(made, Classifier):
        source = f"{name} ({made.source})" if made.source else name
        classifier = replace(made, name=name, source=source)
    elif isinstance(made, nn.Module):
        if image_size is None:
            raise EvaluationError(
                f"{name} returned a {type(made).__name__}, which does not say its input's size: pass --image-size, or "
                "return an orthattack.eval.models.Classifier"
            )
        plain = Preprocessing(image_size, image_size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        classifier = Classifier(name, made, plain, None, 0, name)
    else:
        raise EvaluationError(
            f"{name} must return an nn.Module that takes images in [0, 1], or an orthattack.eval.models.Classifier; "
            f"it returned {type(made).__name__}"
        )
    if weights is not None:
        model = classifier.model
        inner = model.model if isinstance(model, Normalized) else model
        file = fitted(read_checkpoint(Path(weights)), name, inner.state_dict())
        own = {"mean": classifier.preprocessing.mean, "std": classifier.preprocessing.std}
        for key in own if any("normalisation" in note for note in file.notes) else ():
            if tuple(file.listed(key) or ()) != own[key]:
                raise EvaluationError(
                    f"{file.path} brings its own normalisation, {key} {file.metadata[key]}, but {name} has "
                    f"{key} {list(own[key])}: let the function return Normalized(model, mean, std) with the file's"
                )
        load_strictly(name, inner, file.tensors, file.path)
        classifier = replace(
            classifier,
            source=f"{name} with {file.path}",
            file_sha256=file.sha256,
            notes=(*classifier.notes, *file.notes),
        )
    return classifier


def _cifar_regnet(num_classes: int) -> nn.Module:
    """A torchvision RegNet whose strides suit 32x32 images, with full instead of grouped convolutions."""
    widths = [64, 128, 192]
    model: nn.Module = RegNet(BlockParams([2, 2, 2], widths, widths, [1.0] * 3, [1, 2, 2]), num_classes=num_classes)
    return model
