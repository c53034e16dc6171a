"""What exactness in 8 bits costs: OrthoPGD with and without `levels=256` on the same images, as a table.

ORTHATTACK_SHARED=FOLDER python -m scripts.measure_levels [IMAGES]
python -m scripts.measure_levels cost    # the repair's time beside a step's, which needs no data
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time

import torch
import torchvision
from torch import Tensor, nn

from orthattack import OrthoPGD, ThreatModel
from orthattack.eval.data.dataset import Batch
from orthattack.eval.data.load import load_dataset
from orthattack.eval.models.load import load_classifier
from orthattack.threat.levels import snapped
from orthattack.threat.norms import Norm


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


RADII: tuple[tuple[Norm, float], ...] = (("linf", 4 / 255), ("l2", 0.5), ("l2", 2.0), ("l1", 20.0))


def costs(count: int = 12, rounds: int = 5) -> Iterator[tuple[str, float, float, float]]:
    """Norm and radius, and in CPU milliseconds per image the medians of the repair, of putting images on the grid,
    which is done twice a call, and of a step of a ResNet-18 at 224x224; on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    images, labels = torch.randint(0, 256, (count, 3, 224, 224)) / 255, torch.randint(0, 1000, (count,))
    gradient = torch.randn_like(images)

    def milliseconds(call: Callable[[], object]) -> float:
        start = process_time()
        call()
        return (process_time() - start) * 1e3 / count

    for norm, eps in RADII:
        region = ThreatModel(norm, eps, levels=256).around(images)
        points = [region.random_start(torch.Generator().manual_seed(0))]
        for k in range(3):
            points.append(region.step(region.stored(points[-1]), gradient.roll(k, 3), eps / 4))
        few, many = (OrthoPGD(model, norm, eps, steps=steps, random_start=False) for steps in (1, 4))
        repair, grid, step = [], [], []
        for _ in range(rounds):
            repair += [milliseconds(partial(region.stored, point)) for point in points[1:]]
            grid.append(milliseconds(lambda: snapped(images, 256, (0, 1))))
            calls = [milliseconds(partial(attack, images, labels)) for attack in (many, few)]
            step.append((calls[0] - calls[1]) / 3)
        yield f"{norm} {eps:.3g}", median(repair), median(grid), median(step)


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
    if sys.argv[1:] == ["cost"]:
        print("| norm, ε | repair, ms | grid, ms | step, ms | of a step |\n|---|---|---|---|---|")
        for ball, repair, grid, step in costs():
            print(
                f"| {ball} | {repair:.1f} | {grid:.1f} | {step:.0f} | {(repair + 2 * grid / 10) / step:.1%} |",
                flush=True,
            )
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
