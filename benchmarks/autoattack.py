"""Our AutoAttack beside the official code, `pyautoattack`: robust accuracy, image by image, and the time it takes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.stored import Row, by_machine, machine
from benchmarks.timing import DEVICE
from orthattack import PGD, AutoAttack, OrthoAutoAttack, OrthoPGD
from orthattack.eval.data import load_dataset
from orthattack.eval.models import load_classifier
from orthattack.threat import Norm

BATCH = 250
OFFICIAL: dict[Norm, str] = {"linf": "Linf", "l2": "L2", "l1": "L1"}
Judged = tuple[Tensor, dict[str, float]]
"""Adversarial images, and the robust accuracy after each part."""


def official(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm, eps: float) -> Judged:
    """Its defaults, and the seed 0."""
    import pyautoattack

    found: dict[str, float] = {}

    class Parts(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            words = record.getMessage().split()
            if words[:3] == ["robust", "accuracy", "after"]:
                found[words[3].rstrip(":").lower()] = float(words[4].rstrip("%")) / 100

    logger = logging.getLogger("auto-attack")
    logger.handlers = [Parts()]
    logger.setLevel(logging.DEBUG)
    attack = pyautoattack.AutoAttack(model, norm=OFFICIAL[norm], eps=eps, seed=0, device=images.device)
    adversarials, _ = attack.run_standard_evaluation(images, labels, batch_size=BATCH)
    return adversarials, found


def ours(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm, eps: float) -> Judged:
    return _of(AutoAttack(model, norm, eps, generator=_seeded()), images, labels)


def orthogonal(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm, eps: float) -> Judged:
    return _of(OrthoAutoAttack(model, norm, eps, generator=_seeded()), images, labels)


def quick(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm, eps: float) -> Judged:
    attack = AutoAttack(model, norm, eps, steps=25, parts=["apgd-ce", "apgd-t"], generator=_seeded())
    return _of(attack, images, labels)


def single(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm, eps: float, kind: type[PGD] = PGD) -> Judged:
    """One attack, by its defaults but for twice the steps."""
    attack = kind(model, norm, eps, steps=20, early_stop=True, generator=_seeded())
    return attack.run(images, labels, batch_size=BATCH).adversarials, {}


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _of(attack: AutoAttack, images: Tensor, labels: Tensor) -> Judged:
    result = attack.run(images, labels, batch_size=BATCH)
    return result.adversarials, attack.after_each_part(result)


CANDIDATES: dict[str, Callable[[nn.Module, Tensor, Tensor, Norm, float], Judged]] = {
    "official": official,
    "AutoAttack": ours,
    "OrthoAutoAttack": orthogonal,
    "AutoAttack, 25 steps, apgd-ce and apgd-t": quick,
    "PGD, 20 steps": single,
    "OrthoPGD, 20 steps": partial(single, kind=OrthoPGD),
}


def rows(
    name: str, model: tuple[str, Path | None, int | None], data: str, limit: int, norm: Norm, eps: float,
    only: list[str] | None, folder: Path,
) -> Iterator[list[Row]]:  # fmt: skip
    """A row per candidate, all known ones after each that ends, for one may take an hour.

    Candidates stored for as many images are not run again, unless `only` names them.
    """
    classifier = load_classifier(*model)
    dataset = load_dataset(data, classifier).limited(limit)
    images = torch.stack([dataset.load(k, classifier.preprocessing) for k in range(len(dataset))]).to(DEVICE)
    labels = torch.tensor(dataset.labels, device=DEVICE)
    network = classifier.model.to(DEVICE)
    stored = [table.rows for table in by_machine(folder, "autoattack").get(machine()[0], []) if table.name == name]
    found = {str(row["attack"]): row for table in stored for row in table if row["images"] == len(images)}
    for candidate in only or [each for each in CANDIDATES if each not in found]:
        start = time.process_time()
        adversarials, parts = CANDIDATES[candidate](network, images, labels, norm, eps)
        taken = time.process_time() - start
        found[candidate] = _row(candidate, network, images, labels, adversarials, parts) | {"seconds": round(taken, 1)}
        yield [found[candidate] for candidate in CANDIDATES if candidate in found]


@torch.no_grad()
def _row(
    candidate: str, model: nn.Module, images: Tensor, labels: Tensor, adversarials: Tensor, parts: dict[str, float]
) -> Row:
    """What came back, judged by one piece of code: `robust` has a digit for each image."""
    clean, robust = (
        torch.cat([model(part).argmax(1) for part in torch.split(batch, BATCH)]) == labels
        for batch in (images, adversarials)
    )
    return {
        "attack": candidate,
        "images": len(images),
        "clean": round(float(clean.double().mean()), 4),
        "parts": ", ".join(f"{part} {100 * share:.1f}" for part, share in parts.items() if part != "clean"),
        "robust": "".join(str(int(each)) for each in (clean & robust).tolist()),
    }
