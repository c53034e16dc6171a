"""Time the attack's own arithmetic beside the model's: one step of each kind, against ResNet-18's bare step.

    python benchmarks/step.py [--rounds 15] [--threads 2]

All candidates run in one process, in turn, round by round, on the 20 ImageNet photographs in Foolbox's package at
3x224x224; the table gives the median over the rounds, per image, and its ratio to the bare step (forward pass and input
gradient of ResNet-18, no weight gradients). The weights are random: they change no time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor

from orthattack import Normalized, ThreatModel
from orthattack.eval.data.load import Batch, load_photographs
from orthattack.eval.models.load import IMAGENET_MEAN, IMAGENET_STD, Classifier, Preprocessing

EPS, ALPHA = 4 / 255, 1 / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    model = Normalized(torchvision.models.resnet18(), IMAGENET_MEAN, IMAGENET_STD).eval().requires_grad_(False)
    preprocessing = Preprocessing(256, 224)
    classifier = Classifier("resnet18", model, preprocessing, None, 1000, "random")
    first = next(load_photographs("imagenet-samples", classifier).batches(args.batch_size, preprocessing))
    assert isinstance(first, Batch)
    images, labels = first.images, first.labels
    gradient = input_gradient(model, images, labels)

    def step(threat: ThreatModel) -> Callable[[], Tensor]:
        region = threat.around(images)
        points = region.random_start(torch.Generator().manual_seed(0))
        return lambda: region.step(points, gradient, ALPHA if threat.norm == "linf" else 0.5)

    candidates: dict[str, Callable[[], Tensor]] = {
        "ResNet-18, forward and input gradient": lambda: input_gradient(model, images, labels),
        "L-infinity, sign and clip (PGD)": step(ThreatModel("linf", EPS, scope=None)),
        "L-infinity, exact, image": step(ThreatModel("linf", EPS)),
        "L-infinity, exact, channel": step(ThreatModel("linf", EPS, scope="channel")),
        "L-infinity, exact, pixel": step(ThreatModel("linf", EPS, scope="pixel")),
        "L2 (PGD)": step(ThreatModel("l2", 2.0, scope=None)),
        "L2, exact, image": step(ThreatModel("l2", 2.0)),
        "for comparison: one full sort": lambda: (gradient / images.clamp(min=1e-3)).flatten(1).sort(1).values,
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(args.rounds + 2):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if round_ >= 2:  # two rounds to warm up
                seconds[name].append((time.perf_counter() - start) / len(images))
    bare = statistics.median(seconds["ResNet-18, forward and input gradient"])
    rows = [
        [
            name,
            f"{1e3 * statistics.median(times):.2f}",
            f"{1e3 * min(times):.2f} to {1e3 * max(times):.2f}",
            f"{100 * statistics.median(times) / bare:.1f} %",
        ]
        for name, times in seconds.items()
    ]
    print(f"{len(images)} photographs of 3x224x224, {args.threads} threads, {args.rounds} rounds, float32\n")
    print(tabulate(rows, ["one step", "ms per image", "range", "of ResNet-18's"], "github", disable_numparse=True))


def input_gradient(model: torch.nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    leaf = images.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(leaf), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


if __name__ == "__main__":
    main()
