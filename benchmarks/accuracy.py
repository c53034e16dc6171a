"""Seconds and gradients to the robust accuracy that Foolbox's LinfPGD reaches in 20 steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.steps import EPS
from benchmarks.stored import Row
from benchmarks.timing import DEVICE
from benchmarks.timing import seconds as seconds_of
from orthattack import PGD, OrthoPGD
from orthattack.attacks import AttackResult
from orthattack.eval.data import load_dataset
from orthattack.eval.models import load_classifier

TRIED_STEPS = (3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30, 50)


_EARLY: dict[str, Any] = {"early_stop": True}
_FAST = {**_EARLY, "precision": "bfloat16"}
OURS: dict[str, dict[str, Any]] = {
    "PGD": {"kind": PGD},
    "PGD, early stop": {"kind": PGD, **_EARLY},
    "OrthoPGD": {"kind": OrthoPGD},
    "OrthoPGD, early stop": {"kind": OrthoPGD, **_EARLY},
    "OrthoPGD, bfloat16, early stop": {"kind": OrthoPGD, **_FAST},
    "the same, steps from 2 eps down to 0": {"kind": OrthoPGD, **_FAST, "alpha": 2 * EPS, "schedule": "linear"},
}


def accuracy_rows(weights: Path, data: str, limit: int, rounds: int) -> list[Row]:
    """What each candidate needs to leave no more robust than Foolbox's LinfPGD does in 20 steps.

    The fewest steps are sought first; then the candidates, Foolbox with 20 steps first, are timed in turn.
    """
    import foolbox

    classifier = load_classifier("resnet18", weights, 64)
    dataset = load_dataset(data, classifier).limited(limit)
    images = torch.stack([dataset.load(k, classifier.preprocessing) for k in range(len(dataset))]).to(DEVICE)
    labels = torch.tensor(dataset.labels, device=DEVICE)
    model = classifier.model.to(DEVICE)
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in images.split(50)]) == labels  # type: ignore[no-untyped-call]
    images, labels, total = images[right], labels[right], len(images)
    batches = [slice(k, k + 50) for k in range(0, len(images), 50)]

    def robust(adversarials: Tensor, part: slice) -> int:
        with torch.no_grad():
            return int((model(adversarials).argmax(1) == labels[part]).sum())

    def theirs(steps: int) -> tuple[int, float, float]:
        attack = foolbox.attacks.LinfPGD(steps=steps, rel_stepsize=2.5 / steps)
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=DEVICE)
        returned: list[Tensor] = []
        seconds = seconds_of(
            lambda: returned.extend(attack(wrapped, images[part], labels[part], epsilons=EPS)[1] for part in batches)
        )
        return sum(map(robust, returned, batches)), seconds, float(steps)

    def mine(steps: int, kind: Any, **options: Any) -> tuple[int, float, float]:
        attack = kind(model, eps=EPS, steps=steps, loss="ce", generator=torch.Generator().manual_seed(0), **options)
        found: list[AttackResult] = []
        seconds = seconds_of(lambda: found.append(attack.run(images, labels, batch_size=50)))
        standing = sum(robust(found[0].adversarials[part], part) for part in batches)
        return standing, seconds, float(found[0].gradient_calls.double().mean())

    ours = {name: partial(mine, **options) for name, options in OURS.items()}
    named: dict[str, Callable[[int], tuple[int, float, float]]] = {"Foolbox LinfPGD, fewest steps": theirs, **ours}
    target = theirs(20)[0]
    fewest = {
        name: next((n for n in TRIED_STEPS if run(n)[0] <= target), TRIED_STEPS[-1]) for name, run in named.items()
    }
    named, fewest = {"Foolbox LinfPGD": theirs, **named}, {"Foolbox LinfPGD": 20, **fewest}
    rows: list[Row] = [
        {"model": weights.stem, "candidate": name, "steps": steps, "images": total, "seconds": []}
        for name, steps in fewest.items()
    ]
    for _ in range(rounds):
        for row in rows:
            standing, seconds, calls = named[row["candidate"]](row["steps"])
            row["seconds"].append(round(seconds, 2))
            row |= {"robust accuracy": round(100 * standing / total, 2), "gradient calls": round(calls, 2)}
    return rows
