"""Hugging Face's image classifiers, "hf:NAME" of the hub or "hf:./FOLDER", with their processor's preprocessing.

Weights are read from safetensors only, and no code that comes with a model is run.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from orthattack.eval.errors import EvaluationError, first_line, told
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.preprocessing import Preprocessing
from orthattack.models import Normalized

PREFIX = "hf:"
_MODES = {0: "nearest-exact", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # as Pillow has them


class _Logits(nn.Module):
    """A transformers model as a function from images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


def check(name: str) -> None:
    """Raise EvaluationError if a folder is meant that has no model; the hub is not asked yet."""
    place = name.removeprefix(PREFIX)
    if _is_folder(place) and not os.path.isfile(os.path.join(place, "config.json")):  # noqa: PTH113, PTH118 - may raise
        raise EvaluationError(
            f"{name}: {place} {'has no config.json' if os.path.isdir(place) else 'is no folder'}; it must be one that "  # noqa: PTH112
            "save_pretrained wrote, with config.json, preprocessor_config.json and model.safetensors"
        )


def load(name: str, weights: object) -> Classifier:
    """A classifier from the hub, its cache, or a folder. EvaluationError: it cannot be had, is none, or prepares images
    in a way that `Preprocessing` has not."""
    if weights is not None:
        raise EvaluationError(f"--weights does not go with {name}, which comes with its own: pass hf:./FOLDER instead")
    check(name)
    place = name.removeprefix(PREFIX)
    options = {"trust_remote_code": False, "local_files_only": _is_folder(place)}
    try:
        config = transformers.AutoConfig.from_pretrained(place, **options)
        processor = transformers.AutoImageProcessor.from_pretrained(place, **options)
        model = transformers.AutoModelForImageClassification.from_pretrained(
            place, config=config, use_safetensors=True, dtype=torch.float32, **options
        )
    except Exception as error:  # of the network, of the hub, of files, of a model that is no classifier
        instead = (
            "the folder must hold config.json, preprocessor_config.json and model.safetensors of an image classifier"
            if _is_folder(place)
            else "fetch config.json, preprocessor_config.json and model.safetensors of it elsewhere, and pass their "
            "folder as hf:./FOLDER"
        )
        raise EvaluationError(f"could not load {name} ({told(error)}): {instead}") from error
    preprocessing = _preprocessing(name, processor)
    names = [str(config.id2label[k]) for k in sorted(config.id2label)]
    return Classifier(
        name,
        Normalized(_Logits(model), preprocessing.mean, preprocessing.std),
        preprocessing,
        None if all(label == f"LABEL_{k}" for k, label in enumerate(names)) else tuple(names),
        source=f"transformers {transformers.__version__}, {getattr(config, '_commit_hash', None) or place}",
        architecture=type(model).__name__,
    )


def _is_folder(place: str) -> bool:
    return place.startswith((".", "/", "~")) or os.path.isdir(place)  # noqa: PTH112 - pathlib's may raise


def _preprocessing(name: str, processor: Any) -> Preprocessing:
    """What a processor does, tried on an image: EvaluationError if this does not come to the same."""
    size, crop = dict(processor.size or {}), dict(getattr(processor, "crop_size", None) or {})
    shortest, share = size.get("shortest_edge"), getattr(processor, "crop_pct", None)
    resize = wanted = shortest or size.get("height") or 0
    is_cropped = bool(getattr(processor, "do_center_crop", False))
    if is_cropped:
        wanted = crop.get("height", 0)
    elif share and resize < 384:  # ConvNeXT's way to say what is cropped
        resize, is_cropped = int(resize / share), True
    try:
        found = Preprocessing(
            resize,
            wanted,
            InterpolationMode(_MODES[int(processor.resample)]),
            tuple(processor.image_mean) if processor.do_normalize else (0.0,) * 3,
            tuple(processor.image_std) if processor.do_normalize else (1.0,) * 3,
            "keep" if shortest and is_cropped else "squash",
        )
        difference = _difference(found, processor)
    except Exception as error:
        raise EvaluationError(f"{name}: its processor cannot be followed ({first_line(error)}): {_INSTEAD}") from error
    if difference > _TOLERANCE:
        raise EvaluationError(
            f"{name}: its {type(processor).__name__} prepares images in another way than resize, crop from the centre "
            f"and normalisation: {_INSTEAD}"
        )
    return found


_TOLERANCE = 0.1  # levels of 256 by which pixels may differ on average: resizing rounds
_INSTEAD = "load it in a function of your own that returns a Classifier, --model module:function"


def _difference(found: Preprocessing, processor: Any) -> float:
    """The mean difference between two ways to prepare an image, in levels of 256."""
    noise = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    pixels = nn.functional.interpolate(noise, (360, 480), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
    image = Image.fromarray((pixels * 255).to(torch.uint8).numpy())
    theirs = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0]).float()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (found.mean, found.std))
    return 255 * float((found(image) - (theirs * std + mean)).abs().mean())
