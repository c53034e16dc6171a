"""Our AutoAttack beside the official code, `pyautoattack`: robust accuracy, image by image, and the time it takes."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.stored import Row, by_machine, machine
from benchmarks.timing import DEVICE
from orthattack import PGD, AutoAttack, OrthoAutoAttack, OrthoPGD
from orthattack.eval.data import load_dataset
from orthattack.eval.models import load_classifier
from orthattack.threat import Norm

BATCH = 50
"""So many images are attacked at a time, and kept when done."""
OFFICIAL: dict[Norm, str] = {"linf": "Linf", "l2": "L2", "l1": "L1"}
Judged = tuple[Tensor, dict[str, float]]
"""Adversarial images, and the robust accuracy after each part."""
Attacked = Callable[[nn.Module, Tensor, Tensor, Norm, float], Judged]


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


CANDIDATES: dict[str, Attacked] = {
    "official": official,
    "AutoAttack": ours,
    "OrthoAutoAttack": orthogonal,
    "AutoAttack, 25 steps, apgd-ce and apgd-t": quick,
    "PGD, 20 steps": single,
    "OrthoPGD, 20 steps": partial(single, kind=OrthoPGD),
}


def rows(
    name: str, model: tuple[str, Path | None, int | None], data: tuple[str, Path | None], limit: int, norm: Norm,
    eps: float, only: list[str] | None, build: Path, folder: Path,
) -> Iterator[list[Row]]:  # fmt: skip
    """A row per candidate, all known ones after each that ends, for one may take hours.

    Candidates stored for as many images are not run again, unless `only` names them; images that are done lie in
    `build`, and are not attacked again.
    """
    classifier = load_classifier(*model)
    dataset = load_dataset(data[0], classifier, data[1]).limited(limit)
    images = torch.stack([dataset.load(k, classifier.preprocessing) for k in range(len(dataset))]).to(DEVICE)
    labels = torch.tensor(dataset.labels, device=DEVICE)
    network = classifier.model.to(DEVICE)
    stored = [table.rows for table in by_machine(folder, "autoattack").get(machine()[0], []) if table.name == name]
    found = {str(row["attack"]): row for table in stored for row in table if row["images"] == len(images)}
    done = build / "autoattack" / f"{name}-{norm}-{round(255 * eps, 4)}-of-{len(images)}"
    done.mkdir(parents=True, exist_ok=True)
    for candidate in only or [each for each in CANDIDATES if each not in found]:
        pieces = []
        for number, (x, y) in enumerate(zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True)):
            path = done / f"{re.sub('[^a-z0-9]+', '-', candidate.lower())}-{number}.json"
            if not path.exists():
                piece = _measured(CANDIDATES[candidate], network, x, y, norm, eps)
                path.with_suffix(".partial").write_text(json.dumps(piece), encoding="utf-8")
                path.with_suffix(".partial").rename(path)
            pieces.append(json.loads(path.read_text(encoding="utf-8")))
        found[candidate] = _row(candidate, pieces)
        yield [found[candidate] for candidate in CANDIDATES if candidate in found]


def _measured(attack: Attacked, model: nn.Module, x: Tensor, y: Tensor, norm: Norm, eps: float) -> dict[str, Any]:
    """What comes back, judged by one piece of code; `robust` has a digit for each image, `parts` counts them."""
    start = time.process_time()
    adversarials, parts = attack(model, x, y, norm, eps)
    taken = time.process_time() - start
    with torch.no_grad():
        clean, robust = (model(images).argmax(1) == y for images in (x, adversarials))
    return {
        "clean": int(clean.sum()),
        "parts": {part: round(share * len(x)) for part, share in parts.items() if part != "clean"},
        "robust": "".join(str(int(each)) for each in (clean & robust).tolist()),
        "seconds": taken,
    }


def _row(candidate: str, pieces: list[dict[str, Any]]) -> Row:
    robust = "".join(piece["robust"] for piece in pieces)
    longest = max((piece["parts"] for piece in pieces), key=len)  # parts that had nothing left to do are not reported
    left = {part: sum(piece["parts"].get(part, 0) for piece in pieces) for part in longest}
    return {
        "attack": candidate,
        "images": len(robust),
        "clean": round(sum(piece["clean"] for piece in pieces) / len(robust), 4),
        "parts": ", ".join(f"{part} {100 * count / len(robust):.1f}" for part, count in left.items()),
        "robust": robust,
        "seconds": round(sum(piece["seconds"] for piece in pieces), 1),
    }
