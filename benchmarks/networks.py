"""The trained models that attacks are judged on, with images and radii. The extra "imagenet" holds EfficientNets."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from orthattack.threat import Norm


@dataclass(frozen=True)
class Network:
    """A model and its images, as a suite has them, and radii at which some images stand and some fall."""

    model: dict[str, Any]
    data: dict[str, Any]
    radii: dict[Norm, float]


def networks(shared: Path, build: Path) -> dict[str, Network]:
    """All of them by name. `shared` is a folder with data and weights; `build` is where data is unpacked."""
    cifar10 = build / "cifar10"
    if not cifar10.exists():
        with tarfile.open(shared / "data" / "cifar10" / "test.tar") as tar:
            tar.extractall(cifar10, filter="data")
    small = {"source": str(cifar10 / "test")}
    tiny = {"source": str(shared / "data" / "tiny-imagenet-20" / "val")}
    photographs = shared / "data" / "imagenet-sample"
    imagenet = {"source": str(photographs), "labels": str(photographs / "labels.csv")}
    found = {
        "cifar10-robust": Network({}, small, {"linf": 8 / 255, "l2": 0.5, "l1": 8}),
        "cifar10-standard": Network({}, small, {"linf": 1 / 255, "l2": 0.125, "l1": 2}),
        "resnet18-tiny20-robust": Network(
            _resnet18(shared, "robust-linf-4"), tiny, {"linf": 4 / 255, "l2": 1, "l1": 16}
        ),
        "resnet18-tiny20-standard": Network(
            _resnet18(shared, "standard"), tiny, {"linf": 1 / 255, "l2": 0.25, "l1": 4}
        ),
        "efficientnet-lite0": Network({}, imagenet, {"linf": 0.25 / 255, "l2": 0.25, "l1": 8}),
        "efficientnet-lite2": Network({"image_size": 224}, imagenet, {"linf": 0.25 / 255, "l2": 0.25, "l1": 8}),
    }
    package = find_spec("pyautoattack")
    if package is not None and package.origin is not None:
        weights = Path(package.origin).parent / "examples" / "model_test.pt"
        model = {"name": "benchmarks.networks:pyautoattack_resnet18", "weights": str(weights), "image_size": 32}
        found["pyautoattack-resnet18"] = Network(model, small, {"linf": 1 / 255, "l2": 0.125, "l1": 2})
    return {
        name: Network({"name": name, "label": name} | each.model, each.data, each.radii) for name, each in found.items()
    }


def _resnet18(shared: Path, training: str) -> dict[str, Any]:
    weights = shared / "weights" / f"resnet18-tiny20-{training}.safetensors"
    return {"name": "resnet18", "image_size": 64, "weights": str(weights)}


def pyautoattack_resnet18() -> nn.Module:
    """The architecture of the CIFAR-10 network that the official AutoAttack's code tries itself on."""
    from pyautoattack.examples.resnet import ResNet18

    model: nn.Module = ResNet18()
    return model
