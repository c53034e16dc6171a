"""Whether orthogonal adversarial images look different, and whether they fool other models as well."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.study.cost import SCOPES
from benchmarks.study.panel import Group, Study
from benchmarks.study.training import network_path, small_network
from orthattack import Normalized
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.results.stored_run import Run

__all__ = ["SMALL", "likeness", "transfer"]

SMALL = "cifar10-small"


def likeness(study: Study, group: Group) -> pd.DataFrame:
    """A row per model, attack and attacked image: similarity to the clean image, and what changed of its brightness.

    ``ssim``, ``fsim`` and ``haarpsi`` (1: alike) and ``gmsd`` (0: alike) are piq's, which need no weights. `along` is
    ⟨δ, x⟩ / ⟨x, x⟩, the change along the image; `brightness` that of the mean, `contrast` the relative one of the
    standard deviation.
    """
    import piq  # an extra; its absence is told before the study begins

    run, models, images, _ = _attacked(study, group)
    parts = []
    for model in models:
        for attack in run.attacks:
            positions, adversarials = _found(run, model, attack, group.eps)
            y, x = adversarials, images[positions]
            delta = (y.double() - x.double()).flatten(1)
            flat = x.double().flatten(1)
            measures = {
                "ssim": piq.ssim(y, x, reduction="none"),
                "fsim": piq.fsim(y, x, reduction="none"),
                "haarpsi": piq.haarpsi(y, x, reduction="none"),
                "gmsd": piq.gmsd(y, x, reduction="none"),
                "l2": delta.norm(dim=1),
                "along": (delta * flat).sum(1) / flat.square().sum(1),
                "brightness": delta.mean(1),
                "contrast": (flat + delta).std(1) / flat.std(1) - 1,
            }
            table = pd.DataFrame(
                {name: values.double().numpy().astype(np.float32) for name, values in measures.items()}
            )
            parts.append(table.assign(model=model, attack=attack, position=positions.numpy()))
    return pd.concat(parts, ignore_index=True)


def transfer(study: Study, group: Group) -> pd.DataFrame:
    """A row per source, target, attack and image that both models get right: does the source's image fool it?"""
    run, models, images, labels = _attacked(study, group)
    right = {label: _predicted(model, images) == labels for label, model in models.items()}
    parts = []
    for source in models:
        for attack in run.attacks:
            positions, adversarials = _found(run, source, attack, group.eps)
            for target, model in models.items():
                both = right[target][positions]
                fooled = _predicted(model, adversarials) != labels[positions]
                table = pd.DataFrame({"position": positions[both].numpy(), "fooled": fooled[both].numpy()})
                parts.append(table.assign(source=source, target=target, attack=attack))
    return pd.concat(parts, ignore_index=True)


def _attacked(study: Study, group: Group) -> tuple[Run, dict[str, Classifier], Tensor, Tensor]:
    """The run with its images kept, its models, and the clean images and labels by position.

    Without early stop: an image that has just crossed one model's boundary says little about another's.
    """
    models = study.classifiers(group)
    first = next(iter(models.values()))
    if study.train is not None and network_path(study).exists() and first.preprocessing.crop == 32:
        network = small_network(first.num_classes)
        network.load_state_dict(load_file(network_path(study)))
        wrapped = Normalized(network, first.preprocessing.mean, first.preprocessing.std).eval().requires_grad_(False)
        models[SMALL] = Classifier(SMALL, wrapped, first.preprocessing, first.classes, first.num_classes, "this study")
    attacks: list[dict[str, Any]] = [
        {"name": "PGD", "loss": "ce"},
        *({"name": "OrthoPGD", "label": f"OrthoPGD, {scope}", "scope": scope, "loss": "ce"} for scope in SCOPES),
    ]
    dataset = study.dataset(group, first, group.images["likeness"])
    images = torch.stack([dataset.load(k, first.preprocessing) for k in range(len(dataset))])
    labels = torch.tensor(dataset.labels)
    models = {label: model for label, model in models.items() if bool((_predicted(model, images) == labels).any())}
    run = study.attack(f"pictures-{group.key}", group, attacks, len(dataset), models, eps=[group.eps], keep_images=True)
    return run, models, images, labels


def _found(run: Run, model: str, attack: str, eps: float) -> tuple[Tensor, Tensor]:
    """Positions of the attacked images, and what became of them."""
    pairs = list(run.folder.images(model, attack, eps))
    return torch.tensor([position for position, _ in pairs]), torch.stack([image for _, image in pairs])


def _predicted(classifier: Classifier, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([classifier.model(part).argmax(1) for part in torch.split(images, 64)])
