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
from benchmarks.timing import DEVICE, side_by_side
from orthattack import Normalized, ThreatModel
from orthattack.eval.data.dataset import Batch
from orthattack.eval.data.load import load_dataset
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from orthattack.projection import Scope
from orthattack.threat import Norm

RADII: dict[Norm, float] = {"linf": 4 / 255, "l2": 2.0, "l1": 60.0}
ALPHAS: dict[Norm, float] = {"linf": 1 / 255, "l2": 0.5, "l1": 15.0}
SCOPES: tuple[Scope, ...] = ("image", "channel", "pixel", "block8")


def rows(batch_size: int, rounds: int, name: str = "resnet18") -> list[Row]:
    torch.manual_seed(0)
    made = getattr(torchvision.models, name)()
    model = Normalized(made, IMAGENET_MEAN, IMAGENET_STD).eval().requires_grad_(False).to(DEVICE)
    preprocessing = Preprocessing(256, 224)
    classifier = Classifier(name, model, preprocessing, None, 1000, "random")
    first = next(load_dataset("imagenet-samples", classifier).batches(20, preprocessing))
    assert isinstance(first, Batch)
    again = torch.arange(batch_size) % len(first.images)
    images, labels = first.images[again].to(DEVICE), first.labels[again].to(DEVICE)
    gradient = input_gradient(model, images, labels)

    def step(threat: ThreatModel) -> Callable[[], Tensor]:
        region = threat.around(images)
        points = region.random_start(torch.Generator().manual_seed(0))
        alpha = torch.full((batch_size, 1, 1, 1), ALPHAS[threat.norm], device=DEVICE)
        return lambda: region.step(points, gradient, alpha)

    bare = f"{name}, forward and input gradient"
    candidates: dict[str, Callable[[], Tensor]] = {bare: lambda: input_gradient(model, images, labels)}
    for norm, eps in RADII.items():
        candidates[f"{norm}, plain"] = step(ThreatModel(norm, eps, scope=None))
        for scope in SCOPES:
            candidates[f"{norm}, {scope}"] = step(ThreatModel(norm, eps, scope=scope))
        candidates[f"{norm}, image and constant"] = step(ThreatModel(norm, eps, directions=["constant"]))
    candidates["for comparison: one full sort"] = lambda: (gradient / images.clamp(min=1e-3)).flatten(1).sort(1).values
    seconds = side_by_side(candidates, rounds, warm_up=3)  # a GPU records the third call
    whole = statistics.median(seconds[bare])
    return [
        {"one step": key, "ms per image": [1e3 * s / len(images) for s in times],
         f"of {name}'s, %": round(100 * statistics.median(times) / whole, 1)}
        for key, times in seconds.items()
    ]  # fmt: skip


def input_gradient(model: torch.nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    leaf = images.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(leaf), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient
