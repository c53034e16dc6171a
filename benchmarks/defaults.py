"""Which loss, schedule and start PGD should have by default: robust accuracy that each leaves, over several models.

The evaluation runs them, in a folder that a second start resumes. Those of ImageNet are of the extra "imagenet".
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.stored import Row
from orthattack.eval import evaluate
from orthattack.eval.data import load_dataset
from orthattack.eval.models import load_classifier
from orthattack.eval.models.classifier import Classifier

LOSSES = ("ce", "margin", "dlr", "scaled-ce")
FORMS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "fixed, no random start": {"random_start": False},
    "linear from 2 eps": {"schedule": "linear"},
    "cosine from 2 eps": {"schedule": "cosine"},
}
BUDGETS = (5, 10, 20, 50)


def models(shared: Path, build: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any], float]]:
    """Each model with its images and an L-infinity radius at which 10 to 70 % stay robust."""
    cifar10 = build / "cifar10"
    if not cifar10.exists():
        with tarfile.open(shared / "data" / "cifar10" / "test.tar") as tar:
            tar.extractall(cifar10, filter="data")
    tiny = {"source": str(shared / "data" / "tiny-imagenet-20" / "val")}
    photographs = shared / "data" / "imagenet-sample"
    imagenet = {"source": str(photographs), "labels": str(photographs / "labels.csv")}
    resnet = {"name": "resnet18", "image_size": 64}
    found: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
        "cifar10-robust": ({"name": "cifar10-robust"}, {"source": str(cifar10 / "test")}, 8 / 255),
        "cifar10-standard": ({"name": "cifar10-standard"}, {"source": str(cifar10 / "test")}, 1 / 255),
        "resnet18-tiny20-robust": (
            resnet | {"weights": str(shared / "weights" / "resnet18-tiny20-robust-linf-4.safetensors")}, tiny, 4 / 255,
        ),
        "resnet18-tiny20-standard": (
            resnet | {"weights": str(shared / "weights" / "resnet18-tiny20-standard.safetensors")}, tiny, 2 / 255,
        ),
        "efficientnet-lite0": ({"name": "efficientnet-lite0"}, imagenet, 0.125 / 255),
        "efficientnet-lite2": ({"name": "efficientnet-lite2", "image_size": 224}, imagenet, 0.15 / 255),
    }  # fmt: skip
    package = find_spec("pyautoattack")
    if package is not None and package.origin is not None:
        weights = Path(package.origin).parent / "examples" / "model_test.pt"
        model = {"name": "benchmarks.defaults:pyautoattack_resnet18", "weights": str(weights), "image_size": 32}
        found["pyautoattack-resnet18"] = (model, {"source": str(cifar10 / "test")}, 0.6 / 255)
    return found


def pyautoattack_resnet18() -> nn.Module:
    """The architecture of the CIFAR-10 network on which the official AutoAttack's code is tried out."""
    from pyautoattack.examples.resnet import ResNet18

    model: nn.Module = ResNet18()
    return model


def in_turns(labels: Sequence[int]) -> list[int]:
    """Positions: the first image of each class, then the second of each, and so on."""
    by_class: dict[int, list[int]] = {}
    for k, label in enumerate(labels):
        by_class.setdefault(label, []).append(k)
    return [k for turn in zip_longest(*by_class.values()) for k in turn if k is not None]


def loaded(spec: dict[str, Any], data: dict[str, Any], limit: int) -> tuple[Classifier, Tensor, Tensor]:
    """A model of `models`, at most so many of its images, evenly spaced, as it takes them, and their labels."""
    classifier = load_classifier(spec["name"], spec.get("weights"), spec.get("image_size"))
    labels = Path(data["labels"]) if "labels" in data else None
    dataset = load_dataset(data["source"], classifier, labels).limited(limit)
    images = torch.stack([dataset.load(k, classifier.preprocessing) for k in range(len(dataset))])
    return classifier, images, torch.tensor(dataset.labels)


def tables(shared: Path, build: Path, limit: int, names: list[str] | None) -> Iterator[tuple[str, list[Row]]]:
    """Of each model, what each choice leaves robust, in % of `limit` images."""
    for name, (model, data, eps) in models(shared, build).items():
        if names and name not in names:
            continue
        cells = list(product(LOSSES, FORMS, BUDGETS))
        attacks = {
            f"{loss}, {form}, {steps}": {
                "name": "PGD", "loss": loss, "steps": steps, "early_stop": True, **FORMS[form],
            }
            for loss, form, steps in cells
        }  # fmt: skip
        run = evaluate(
            [model | {"label": name}], data | {"limit": limit}, [{"label": k, **v} for k, v in attacks.items()],
            out=build / name, eps=eps, checks=False, report=False, save_images="none", batch_size=50,
        )  # fmt: skip
        found = run.table().set_index("attack")["robust_accuracy"]
        yield name, [
            {"loss": loss, "form": form, "steps": steps, "eps * 255": round(255 * eps, 4), "images": limit,
             "robust accuracy": round(100 * float(found[f"{loss}, {form}, {steps}"]), 2)}
            for loss, form, steps in cells
        ]  # fmt: skip
