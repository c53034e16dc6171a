"""How often adversarials fool a model that was not asked: by the attack, plain and orthogonal, as papers measure it.

The last iterate of ten steps on the cross-entropy, on images that both models classify correctly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import defaults
from benchmarks.stored import Row
from orthattack import DIFGSM, MIFGSM, SINIFGSM, TIFGSM, VMIFGSM, fooled
from orthattack.attacks.rules import gaussian, smooth, variance
from orthattack.attacks.transforms import admix
from orthattack.eval.data import load_dataset
from orthattack.eval.models import load_classifier
from orthattack.eval.models.classifier import Classifier

PAIRS = {
    "cifar10-standard": ("cifar10-robust", 8 / 255),
    "cifar10-robust": ("cifar10-standard", 8 / 255),
}
"""Each source with the model that is not asked, and the radius."""


def attacks(others: Tensor) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The attacks by name, for images of 32 pixels; `others` are what Admix draws from."""
    kernel = smooth(gaussian(5))
    return {
        "MI": (MIFGSM, {}),
        "DI-MI": (DIFGSM, {}),
        "TI-MI": (TIFGSM, {"links": [kernel]}),
        "SI-NI": (SINIFGSM, {}),
        "VMI, 5 neighbours": (VMIFGSM, {"links": [variance(5)]}),
        "Admix-MI": (MIFGSM, {"transform": admix(others, samples=1)}),
        "DI-TI-MI": (DIFGSM, {"links": [kernel]}),
    }


def tables(shared: Path, build: Path, limit: int, names: list[str] | None) -> Iterator[tuple[str, list[Row]]]:
    """Of each pair, how many of at most `limit` images each attack fools the second model on."""
    known = defaults.models(shared, build)
    for name, (other, eps) in PAIRS.items():
        if names and name not in names:
            continue
        source, target = (_loaded(known[model][0]) for model in (name, other))
        images, labels = _known_to_both(source, target, known[name][1], limit + 50)
        count = min(limit, len(images) - 10)
        images, others, labels = images[:count], images[count:], labels[:count]
        rows: list[Row] = []
        for attack, (kind, options) in attacks(others).items():
            options = {"eps": eps, "alpha": eps / 10, "steps": 10, "loss": "ce", "keep": "last", **options}
            row: Row = {"attack": attack, "eps * 255": round(255 * eps, 4), "images": count}
            for form, scope in (("plain", None), ("orthogonal", "image")):
                result = kind(source.model, scope=scope, **options).run(
                    images, labels, seeds=range(count), batch_size=50
                )
                held = int(fooled(target.model, result.adversarials, labels).sum())
                row |= {form: held, f"{form}, source": int(result.success.sum())}
                row["gradients"] = int(result.gradient_calls.max())
            rows.append(row)
        yield f"{name}-to-{other}", rows


def _loaded(spec: dict[str, Any]) -> Classifier:
    return load_classifier(spec["name"], spec.get("weights"), spec.get("image_size"))


def _known_to_both(source: Classifier, target: Classifier, data: dict[str, Any], limit: int) -> tuple[Tensor, Tensor]:
    """The first images of each class in turn, as the source takes them, that both classify correctly."""
    dataset = load_dataset(data["source"], source, Path(data["labels"]) if "labels" in data else None)
    by_class: dict[int, list[int]] = {}
    for k, label in enumerate(dataset.labels):
        by_class.setdefault(label, []).append(k)
    longest = max(map(len, by_class.values()))
    order = [of[turn] for turn in range(longest) for of in by_class.values() if turn < len(of)]
    images, labels, found = [], [], 0
    for first in range(0, len(order), 50):
        if found >= limit:
            break
        x = torch.stack([dataset.load(k, source.preprocessing) for k in order[first : first + 50]])
        y = torch.tensor([dataset.labels[k] for k in order[first : first + 50]])
        right = ~(fooled(source.model, x, y) | fooled(target.model, x, y))
        images.append(x[right])
        labels.append(y[right])
        found += int(right.sum())
    return torch.cat(images)[:limit], torch.cat(labels)[:limit]
