"""What a run's detector sees of its adversarial images, at thresholds that are chosen on its clean ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from orthattack.eval.results.outcomes import FOOLED, WRONG, floats, is_, rate_columns
from orthattack.eval.results.rates import Rate
from orthattack.eval.storage.schema import SCORE

if TYPE_CHECKING:
    from orthattack.eval.results.stored_run import Run

RATES = (0.01, 0.05)  # of clean images that may be flagged, where a run does not say


def threshold(clean: NDArray[np.float64], rate: float) -> float:
    """The smallest of the scores of clean images that no more than a share `rate` of them exceed; NaN of none.

    >>> threshold(np.array([0.1, 0.9, 0.3, 0.2]), 0.25)
    0.3
    """
    return float(np.sort(clean)[len(clean) - 1 - math.floor(rate * len(clean) + 1e-9)]) if len(clean) else math.nan


def detection(run: Run, worst: str) -> Iterator[dict[str, Any]]:
    """The rows of `Run.detection`."""
    rates = run.manifest["config"].get("false_positive_rates") or RATES
    for model in run.models if run.detector is not None else ():
        rows = run.clean(model, ["status", SCORE.name])
        clean = floats(rows[SCORE.name])[is_(rows["status"], "ok")]
        clean = clean[~np.isnan(clean)]
        limits = [threshold(clean, rate) for rate in rates]
        told: list[list[dict[str, Any]]] = [[] for _ in rates]
        for eps in run.radii:
            every = {attack: _states(run, model, attack, eps, limits) for attack in run.attacks_at(eps)}
            if len(every) > 1:
                every[worst] = [np.maximum.reduce(states) for states in zip(*every.values(), strict=True)]
            for attack, found in every.items():
                for rows_at, states in zip(told, found, strict=True):
                    rows_at.append({"eps": eps, "attack": attack, **_shares(states)})
        for rate, limit, rows_at in zip(rates, limits, told, strict=True):
            place = {"model": model, "false_positive_rate": float(rate), "threshold": limit}
            place |= {"clean": len(clean), "flagged": int((clean > limit).sum())}
            yield from ({**place, **row} for row in rows_at)


_LEFT, _SEEN, _EVADED = 1, 2, 3
"""Not fooled, fooled and flagged, fooled and not flagged, in this order: the largest of several is the worst case."""


def _states(run: Run, model: str, attack: str, eps: float | None, limits: Sequence[float]) -> list[NDArray[np.int8]]:
    """What became of each image, by position, at each threshold; 0 where it was misclassified, or has no outcome or no
    score."""
    rows = run.rows(model, attack, eps, ["position", "label", "status", "success", run.norm, SCORE.name])
    outcomes, scores = run.outcomes_of(rows, attack, eps), floats(rows[SCORE.name])
    known, found = (outcomes.outcome > WRONG) & ~np.isnan(scores), []
    for limit in limits:
        fooled = np.where(scores > limit, _SEEN, _EVADED)
        full = np.zeros(run.images(model), np.int8)
        full[outcomes.position] = np.where(outcomes.outcome == FOOLED, fooled, _LEFT) * known
        found.append(full)
    return found


def _shares(states: NDArray[np.int8]) -> dict[str, Any]:
    n, detected, evaded = int((states > 0).sum()), int((states == _SEEN).sum()), int((states == _EVADED).sum())
    return {
        "n": n, "fooled": detected + evaded, "detected": detected, "evaded": evaded,
        **rate_columns("detected_share", Rate(detected, detected + evaded)),
        **rate_columns("evaded_share", Rate(evaded, n)),
    }  # fmt: skip
