"""What exactness in 8 bits costs: OrthoPGD with and without `levels=256` on the same images, as a table.

ORTHATTACK_SHARED=FOLDER python -m scripts.measure_levels [IMAGES]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from orthattack import OrthoPGD
from orthattack.eval.data.dataset import Batch
from orthattack.eval.data.load import load_dataset
from orthattack.eval.models.load import load_classifier


def measured(model: nn.Module, images: Tensor, labels: Tensor, eps: float, levels: int | None) -> tuple[float, float]:
    """Robust accuracy and mean loss after ten steps, the random starts being the same."""
    attack = OrthoPGD(model, eps=eps, levels=levels, generator=torch.Generator().manual_seed(0))
    result = attack.run(images, labels)
    return 1 - float(result.success.float().mean()), float(result.loss.mean())


def cases(count: int) -> Iterator[tuple[str, nn.Module, Tensor, Tensor, tuple[int, ...]]]:
    """Label, model, images evenly spaced in the data, labels, and radii in 255ths."""
    shared = Path(os.environ.get("ORTHATTACK_SHARED", "../shared"))
    for name, weights in (("robust", "robust-linf-4"), ("standard", "standard")):
        file = shared / "weights" / f"resnet18-tiny20-{weights}.safetensors"
        classifier = load_classifier("resnet18", weights=str(file), image_size=64)
        data = load_dataset(str(shared / "data" / "tiny-imagenet-20" / "val"), classifier)
        at = torch.linspace(0, len(data) - 1, min(count, len(data))).long().tolist()
        images = torch.stack([data.load(k, classifier.preprocessing) for k in at])
        yield f"ResNet-18 {name}", classifier.model, images, torch.tensor([int(data.labels[k]) for k in at]), (4, 2, 1)
    for name in ("cifar10-robust", "cifar10-standard"):
        classifier = load_classifier(name)
        batch = next(iter(load_dataset("cifar10-samples", classifier).batches(20, classifier.preprocessing)))
        assert isinstance(batch, Batch)
        yield name, classifier.model, batch.images, batch.labels, (8, 4, 2, 1)


def main(count: int) -> None:
    print("| model | images | ε | robust accuracy, float | levels=256 | mean loss, float | levels=256 |")
    print("|---|---|---|---|---|---|---|")
    for label, model, images, labels, radii in cases(count):
        for radius in radii:
            found = [measured(model.eval(), images, labels, radius / 255, levels) for levels in (None, 256)]
            (one, loss), (other, its) = found
            cells = [label, len(images), f"{radius}/255", f"{one:.3f}", f"{other:.3f}", f"{loss:.4f}", f"{its:.4f}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
