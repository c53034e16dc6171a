"""A small model and small images, for evaluations that take a moment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orthattack.eval import evaluate
from orthattack.eval.data.dataset import ImageDataset
from orthattack.eval.data.readers import Dataset
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.preprocessing import Preprocessing
from orthattack.eval.results.stored_run import Run

SIZE, CLASSES, COUNT = 8, 5, 10
EPS = 8 / 255


class Net(nn.Module):
    """With what an attack may change: weights, buffers, layers in two modes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():  # whose numbers are thrown away
            self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2))
            self.head = nn.Linear(6 * 16, CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            self.features[1].running_mean.copy_(torch.randn(6, generator=generator) * 0.1)
            self.features[1].weight.fill_(1.0)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images - 0.5).flatten(1))


def images_of(count: int = COUNT) -> Tensor:
    """Of one colour each, with noise, on the grid of 8 bits."""
    generator = torch.Generator().manual_seed(7)
    colours = torch.rand(count, 3, 1, 1, generator=generator)
    noise = torch.rand(count, 3, SIZE, SIZE, generator=generator) - 0.5
    return ((colours + 0.4 * noise).clamp(0, 1) * 255).round() / 255


def classifier(model: nn.Module | None = None, name: str = "net") -> Classifier:
    model = Net() if model is None else model
    return Classifier(name, model.eval(), Preprocessing(SIZE, SIZE), None, CLASSES, "here")


def dataset(labels: list[int] | None = None, images: Tensor | None = None) -> ImageDataset:
    """Images with the labels that `Net` gives them, but for the last, which it gets wrong."""
    x = images_of() if images is None else images
    if labels is None:
        with torch.no_grad():
            labels = Net().eval()(x).argmax(1).tolist()
        labels[-1] = (labels[-1] + 1) % CLASSES
    source = Dataset([(image, label) for image, label in zip(x, labels, strict=True)], "made", False)
    names = tuple(f"{k:02d}" for k in range(len(labels)))
    return ImageDataset("made", names, tuple(labels), None, "by number", source, range(len(labels)))


def evaluated(
    out: Any, attacks: Any, model: nn.Module | None = None, data: ImageDataset | None = None, **more: Any
) -> Run:
    """A run of these attacks on the net."""
    options = {"eps": EPS, "steps": 3, "batch_size": 4, "shard_size": 6, "save_images": "all", "checks": False}
    return evaluate(
        classifier(model), dataset() if data is None else data, attacks, out=out,
        **{"progress": False, "report": False, **options, **more},
    )  # fmt: skip
