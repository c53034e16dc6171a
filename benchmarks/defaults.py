"""Which loss, schedule and start PGD should have by default: robust accuracy that each leaves, over several models.

The evaluation runs them, in a folder that a second start resumes. Those of ImageNet are of the extra "imagenet".
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.stored import Row
from orthattack.eval import evaluate

LOSSES = ("ce", "margin", "dlr")
FORMS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "fixed, no random start": {"random_start": False},
    "linear from 2 eps": {"schedule": "linear", "alpha": 2.0},  # of eps
    "cosine from 2 eps": {"schedule": "cosine", "alpha": 2.0},
}
BUDGETS = (5, 10, 20, 50)


def models(shared: Path, build: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any], float]]:
    """Each model with its images and a radius at which 10 to 70 % stay robust."""
    cifar10 = build / "cifar10"
    if not cifar10.exists():
        with tarfile.open(shared / "data" / "cifar10" / "test.tar") as tar:
            tar.extractall(cifar10, filter="data")
    tiny = {"source": str(shared / "data" / "tiny-imagenet-20" / "val")}
    photographs = shared / "data" / "imagenet-sample"
    imagenet = {"source": str(photographs), "labels": str(photographs / "labels.csv")}
    resnet = {"name": "resnet18", "image_size": 64}
    return {
        "cifar10-robust": ({"name": "cifar10-robust"}, {"source": str(cifar10 / "test")}, 8 / 255),
        "cifar10-standard": ({"name": "cifar10-standard"}, {"source": str(cifar10 / "test")}, 1 / 255),
        "resnet18-tiny20-robust": (
            resnet | {"weights": str(shared / "weights" / "resnet18-tiny20-robust-linf-4.safetensors")}, tiny, 4 / 255,
        ),
        "resnet18-tiny20-standard": (
            resnet | {"weights": str(shared / "weights" / "resnet18-tiny20-standard.safetensors")}, tiny, 1 / 255,
        ),
        "efficientnet-lite0": ({"name": "efficientnet-lite0"}, imagenet, 0.25 / 255),
        "efficientnet-lite2": ({"name": "efficientnet-lite2", "image_size": 224}, imagenet, 0.25 / 255),
    }  # fmt: skip


def tables(shared: Path, build: Path, limit: int, names: list[str] | None) -> Iterator[tuple[str, list[Row]]]:
    """Of each model, what each choice leaves robust, in % of `limit` images."""
    for name, (model, data, eps) in models(shared, build).items():
        if names and name not in names:
            continue
        cells = list(product(LOSSES, FORMS, BUDGETS))
        attacks = {
            f"{loss}, {form}, {steps}": {
                "name": "PGD", "loss": loss, "steps": steps, "early_stop": True, **FORMS[form],
                **({"alpha": FORMS[form]["alpha"] * eps} if "alpha" in FORMS[form] else {}),
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
