"""Stored images as examples to look at: clean, perturbation, adversarial."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from orthattack.eval.errors import EvaluationError
from orthattack.eval.results.outcomes import records
from orthattack.eval.results.stored_run import Run
from orthattack.eval.storage.run_folder import shown_eps


@dataclass(frozen=True)
class Example:
    """An image before and after an attack.

    Attributes:
        model: label of the model.
        attack: label of the attack.
        eps: radius of the run, None for an attack that minimises the norm.
        position: of the image in the data.
        name: of the image.
        label: its class.
        clean_prediction: the model's on the clean image.
        adversarial_prediction: the model's on the adversarial image.
        success: newly fooled.
        norm: of the perturbation, in the run's norm; NaN if not recorded.
        cosine: of perturbation and image; NaN if not recorded.
        clean: (3, H, W) in [0, 1].
        adversarial: (3, H, W) in [0, 1].
    """

    model: str
    attack: str
    eps: float | None
    position: int
    name: str
    label: int
    clean_prediction: int
    adversarial_prediction: int
    success: bool
    norm: float
    cosine: float
    clean: Tensor
    adversarial: Tensor

    # Differences in NumPy: torch wakes its threads for each of hundreds of small images.

    @property
    def magnification(self) -> float:
        """Factor that makes the perturbation's largest entry black or white when it is drawn around grey."""
        largest = float(np.abs(self._delta).max())
        return 0.5 / largest if largest > 0 else 1.0

    @property
    def perturbation(self) -> Tensor:
        """(3, H, W), magnified, grey where nothing changed."""
        return torch.from_numpy(np.float32(0.5) + np.float32(self.magnification) * self._delta)

    @property
    def _delta(self) -> NDArray[np.float32]:
        delta: NDArray[np.float32] = self.adversarial.numpy() - self.clean.numpy()
        return delta


def order(run: Run, model: str) -> list[int]:
    """Positions of the stored clean images, so that the first of them are of as many classes as there are."""
    stored = set(run.folder.image_positions(model, "clean", None))
    rows = run.clean(model, ["position", "label"])
    labels = {int(p): int(n) for p, n in rows[rows["position"].isin(stored)].fillna(-1).itertuples(index=False)}
    seen: Counter[int] = Counter()
    turn = {}
    for position in sorted(stored):
        label = labels.get(position, -1)
        turn[position] = seen[label]
        seen[label] += 1
    return sorted(turn, key=lambda position: (turn[position], position))


def examples(run: Run, model: str, attack: str, eps: float | None, wanted: list[int]) -> list[Example]:
    """The examples at the positions wanted, in that order; those without a row or an image are left out."""
    stored_eps = run.stored_eps(attack, eps)
    columns = ["position", "name", "label", "status", "clean_prediction", "adversarial_prediction", "success", "cosine"]
    rows = run.rows(model, attack, eps, [*columns, run.norm])
    rows = rows[rows["position"].isin(wanted) & rows["adversarial_prediction"].notna()]
    by_position: dict[int, dict[str, Any]] = {int(row["position"]): row for row in records(rows)}
    clean = dict(run.folder.images(model, "clean", None, wanted))
    found = {}
    for position, adversarial in run.folder.images(model, attack, stored_eps, wanted):
        row = by_position.get(position)
        if row is not None and position in clean:
            found[position] = Example(
                model,
                attack,
                stored_eps,
                position,
                str(row["name"]),
                int(row["label"]),
                int(row["clean_prediction"]),
                int(row["adversarial_prediction"]),
                row["success"] is True,
                _number(row[run.norm]),
                _number(row["cosine"]),
                clean[position].float(),
                adversarial.float(),
            )
    return [found[position] for position in wanted if position in found]


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def save_picture(run: Run, path: Path, model: str, attack: str, eps: float | None, columns: int = 8) -> None:
    """Clean image, magnified perturbation and adversarial image of a few images, one column each.

    Fooled ones come first. A prediction in red is one that the perturbation has changed. EvaluationError without any
    stored images.
    """
    stored = set(run.folder.image_positions(model, attack, run.stored_eps(attack, eps)))
    first = [position for position in order(run, model) if position in stored][:200]
    found = examples(run, model, attack, eps, first)
    chosen = sorted(found, key=lambda example: not example.success)[:columns]
    if not chosen:
        raise EvaluationError(f"{run.folder} holds no images of {attack} on {model} at {shown_eps(eps, run.norm)}")
    size = 1.5
    figure = Figure(figsize=(max(size * len(chosen), 3.0) + 1.0, 3 * size + 1.1), layout="constrained")
    radius = "" if chosen[0].eps is None else f", ε = {shown_eps(chosen[0].eps, run.norm)}"
    figure.suptitle(f"{attack} on {model}{radius}", parse_math=False)
    axes = figure.subplots(3, len(chosen), squeeze=False)
    for column, example in enumerate(chosen):
        names = [run.class_name(model, n) for n in (example.clean_prediction, example.adversarial_prediction)]
        captions = (names[0], f"× {example.magnification:.3g}", names[1])
        for axis, panel, caption in zip(
            axes[:, column], (example.clean, example.perturbation, example.adversarial), captions, strict=True
        ):
            axis.imshow(panel.clamp(0, 1).movedim(0, -1).numpy(), interpolation="nearest")
            short = caption if len(caption) <= 18 else caption[:17] + "…"
            axis.set_xlabel(short, fontsize=8, parse_math=False)
            axis.set_xticks([])
            axis.set_yticks([])
        if example.adversarial_prediction != example.clean_prediction:
            axes[2, column].xaxis.label.set_color("firebrick")
    for axis, title in zip(axes[:, 0], ("clean", "perturbation", "adversarial"), strict=True):
        axis.set_ylabel(title)
    figure.savefig(path, dpi=130)
