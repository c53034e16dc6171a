"""Time the attack's own arithmetic beside the model's: one step of each kind, against ResNet-18's bare step.

On the 20 ImageNet images in Foolbox's package at 3x224x224; per image, and relative to the bare step (forward pass and
input gradient of ResNet-18, no weight gradients). The weights are random: they change no time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor

from benchmarks.stored import Row
from benchmarks.timing import side_by_side
from orthattack import Normalized, ThreatModel
from orthattack.eval.data.dataset import Batch
from orthattack.eval.data.load import load_dataset
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

EPS, ALPHA = 4 / 255, 1 / 255


def rows(batch_size: int, rounds: int) -> list[Row]:
    torch.manual_seed(0)

    model = Normalized(torchvision.models.resnet18(), IMAGENET_MEAN, IMAGENET_STD).eval().requires_grad_(False)
    preprocessing = Preprocessing(256, 224)
    classifier = Classifier("resnet18", model, preprocessing, None, 1000, "random")
    first = next(load_dataset("imagenet-samples", classifier).batches(batch_size, preprocessing))
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
    seconds = side_by_side(candidates, rounds, warm_up=2)
    bare = statistics.median(seconds["ResNet-18, forward and input gradient"])
    return [
        {"one step": name, "ms per image": [1e3 * s / len(images) for s in times],
         "of ResNet-18's, %": round(100 * statistics.median(times) / bare, 1)}
        for name, times in seconds.items()
    ]  # fmt: skip


def input_gradient(model: torch.nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    leaf = images.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(leaf), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient
