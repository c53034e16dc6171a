"""Time against image size and number of images."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.steps import EPS, pictures, step_rows
from benchmarks.stored import Row
from benchmarks.timing import DEVICE, peak_memory
from benchmarks.timing import seconds as seconds_of
from orthattack import OrthoPGD
from orthattack.eval.models import load_classifier


def size_rows(rounds: int) -> list[Row]:
    shown = ("Foolbox LinfPGD", "bare step", "PGD", "OrthoPGD")
    measured = [row for size in (64, 128, 224, 320, 512) for row in step_rows("resnet18", 2, size, 3, rounds, shown)]
    return [{"against": "size", "x": row["size"], "candidate": row["candidate"], "ms": row["ms"]} for row in measured]


def count_rows() -> list[Row]:
    """Seconds for 10^2 to 10^4 images of 32x32 in one call, and the memory that the attack needs."""
    classifier = load_classifier("cifar10-standard")
    model = classifier.model.to(DEVICE)
    rows = []
    for count in (100, 1_000, 10_000):
        images = pictures(100, 32).repeat(count // 100, 1, 1, 1).to(DEVICE)
        labels = torch.zeros(count, dtype=torch.long, device=DEVICE)
        attack = OrthoPGD(model, eps=EPS, steps=3)
        run, seconds = partial(attack.run, images, labels, batch_size=50), list[float]()
        memory = peak_memory(lambda run=run, seconds=seconds: seconds.append(seconds_of(run)))  # type: ignore[misc]
        rows.append({"against": "count", "x": count, "candidate": "OrthoPGD", "seconds": seconds, "peak MB": memory})
    return rows
