"""Stored images as examples to look at: clean, perturbation, adversarial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orthattack.eval.results.outcomes import records
from orthattack.eval.results.stored_run import Run


@dataclass(frozen=True)
class Example:
    """An image before and after an attack."""

    row: Mapping[str, Any]  # position, name, label and what the run has recorded of it; see `ROW_SCHEMA`
    clean: Tensor  # (3, H, W) in [0, 1]
    adversarial: Tensor  # (3, H, W) in [0, 1]

    # Differences in NumPy: torch wakes its threads for each of hundreds of small images.

    @property
    def magnification(self) -> float:
        """Factor that makes the perturbation's largest entry black or white when it is drawn around grey."""
        largest = float(np.abs(self._delta).max())
        return 0.5 / largest if 1e-30 < largest < np.inf else 1.0  # damaged files hold anything

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
    stored = sorted(set(run.folder.image_positions(model, "clean", None)))
    labels = run.clean(model, ["position", "label"]).set_index("position")["label"].reindex(stored).fillna(-1)
    turn = labels.groupby(labels).cumcount()
    return [int(position) for position in turn.sort_values(kind="stable").index]


def examples(run: Run, model: str, attack: str, eps: float | None, wanted: list[int]) -> list[Example]:
    """The examples at the positions wanted, in that order; those without a row or an image are left out."""
    columns = ["position", "name", "label", "status", "clean_prediction", "adversarial_prediction", "success", "cosine"]
    rows = run.rows(model, attack, eps, [*columns, run.norm])
    known = rows["adversarial_prediction"].notna() & rows["clean_prediction"].notna()
    rows = rows[rows["position"].isin(wanted) & known]
    by_position = {row["position"]: row for row in records(rows)}
    clean = dict(run.folder.images(model, "clean", None, wanted))
    found = {}
    for position, adversarial in run.folder.images(model, attack, run.stored_eps(attack, eps), wanted):
        if position in by_position and position in clean:
            found[position] = Example(by_position[position], clean[position].float(), adversarial.float())
    return [found[position] for position in wanted if position in found]
