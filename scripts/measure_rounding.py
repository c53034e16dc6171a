"""Measure what rounding to 8 bits leaves of cosine, norm and success, and print docs/faq.md's table.

    python -m scripts.measure_rounding

OrthoPGD with 10 steps on the bundled images and model, in every scope and norm.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from orthattack import OrthoPGD, ThreatModel
from orthattack.eval.data.dataset import Batch
from orthattack.eval.data.load import load_dataset
from orthattack.eval.models.load import load_classifier
from orthattack.projection import Scope
from orthattack.threat import Norm, perturbation_norm

RADII: dict[Norm, tuple[float, str]] = {"linf": (8 / 255, "8/255"), "l2": (0.5, "0.5"), "l1": (12.0, "12")}


def measure(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm, scope: Scope) -> dict[str, Any]:
    """The |cos| after rounding, (N,), the norm over eps, (N,), and how many fool the model before and after."""
    eps, _ = RADII[norm]
    attack = OrthoPGD(model, norm, eps, scope=scope, generator=torch.Generator().manual_seed(0))
    found = attack.run(images, labels)
    rounded = (found.adversarials * 255).round() / 255
    delta = rounded.double() - images.double()
    with torch.inference_mode():
        fooled = model(rounded).argmax(1) != labels
    return {
        "cosine": ThreatModel(norm, eps, scope=scope).cosine(delta, images),
        "norm": perturbation_norm(delta, norm) / eps,
        "before": int(found.success.sum()),
        "after": int(fooled.sum()),
    }


def row(norm: Norm, scope: Scope, found: dict[str, Any]) -> str:
    """A line of the table."""
    cosine, size = found["cosine"], found["norm"]
    return (
        f"| {norm}, {RADII[norm][1]} | {scope} | {cosine.mean():.1e} | {cosine.max():.1e} | {size.mean():.3f} | "
        f"{size.max():.3f} | {found['before']} → {found['after']} |"
    )


def main() -> None:
    classifier = load_classifier("cifar10-standard")
    (batch,) = load_dataset("cifar10-samples", classifier).batches(20, classifier.preprocessing)
    assert isinstance(batch, Batch)
    print("| norm, ε | scope | mean \\|cos\\| | largest | mean norm / ε | largest | fooled of 20 |")
    print("|---|---|---|---|---|---|---|")
    for norm in get_args(Norm):
        for scope in ("image", "channel", "pixel"):
            print(row(norm, scope, measure(classifier.model, batch.images, batch.labels, norm, scope)), flush=True)


if __name__ == "__main__":
    main()
