"""The table of docs/attacks/sparse.md: the L0 attacks beside adversarial-library's and Foolbox's, in pixels.

    pip install --no-deps adv-lib
    python -m scripts.measure_pixels

Every attack that minimises is given as many gradients, every random search as many queries.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from types import ModuleType

import foolbox
import torch
from torch import Tensor, nn

from orthattack import OrthoSigmaZero, OrthoSparseRS, SigmaZero, SparseRS
from orthattack.eval import load
from orthattack.interop.foolbox import FromFoolbox
from orthattack.threat import perturbation_norm

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def published(steps: int) -> Attack:
    """adversarial-library's σ-zero, which is the authors' code; Visdom, which it imports, is for its plots."""
    sys.modules.setdefault("visdom", ModuleType("visdom")).__dict__.setdefault("Visdom", object)
    from adv_lib.attacks.sigma_zero import sigma_zero

    return lambda model, x, y: sigma_zero(model, x, y, num_steps=steps)


def attacks(steps: int, pixels: int, queries: int) -> dict[str, Attack]:
    fmn = foolbox.attacks.L0FMNAttack(steps=steps)
    return {
        "`SigmaZero`": lambda model, x, y: SigmaZero(model, steps=steps)(x, y),
        "`OrthoSigmaZero`": lambda model, x, y: OrthoSigmaZero(model, steps=steps)(x, y),
        "σ-zero of adv-lib": published(steps),
        "L0-FMN of Foolbox": lambda model, x, y: FromFoolbox(model, fmn, "l0", None)(x, y),
        "`SparseRS`": lambda model, x, y: SparseRS(model, eps=pixels, queries=queries, early_stop=True)(x, y),
        "`OrthoSparseRS`": lambda model, x, y: OrthoSparseRS(model, eps=pixels, queries=queries, early_stop=True)(x, y),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 16), ("steps", 100), ("pixels", 8), ("queries", 500)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    print(f"| model | attack | fooled | within {given.pixels} pixels | median pixels |\n|---|---|---|---|---|")
    for name in ("cifar10-standard", "cifar10-robust"):
        model, images, labels = load(name, "cifar10-samples")
        with torch.no_grad():
            right = model(images).argmax(1) == labels
        x, y = images[right][: given.images], labels[right][: given.images]
        for label, attack in attacks(given.steps, given.pixels, given.queries).items():
            torch.manual_seed(0)
            found = attack(model, x, y).detach()
            with torch.no_grad():
                fooled = model(found).argmax(1) != y
            size = torch.where(fooled, perturbation_norm(found - x, "l0"), torch.inf)
            within = int((size <= given.pixels).sum())
            middle = f"{float(size.median()):g}" if bool(size.median().isfinite()) else "–"
            print(f"| {name} | {label} | {int(fooled.sum())} of {len(x)} | {within} | {middle} |", flush=True)


if __name__ == "__main__":
    main()
