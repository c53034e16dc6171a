"""What became of each image under an attack, and what is counted and measured over images."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from orthattack.eval.results.paired import Paired
from orthattack.eval.results.rates import Rate

UNSCORED, WRONG, ROBUST, FOOLED = -1, 0, 1, 2
"""Not scored, initially misclassified, robust, newly fooled: in this order the largest of several is the worst case."""


@dataclass(frozen=True)
class Outcomes:
    """What became of each image, in three columns of one length: of an attack at a radius on a model."""

    position: NDArray[np.int32]  # of the image in the data
    label: NDArray[np.int32]  # its class
    outcome: NDArray[np.int8]  # UNSCORED, WRONG, ROBUST or FOOLED

    @classmethod
    def of(cls, rows: pd.DataFrame, norm: str, within: float | None = None) -> Outcomes:
        """From stored rows; of an attack that minimises the norm a success counts `within` a radius."""
        fooled = bools(rows["success"])
        if within is not None:
            fooled = fooled & (floats(rows[norm]) <= within)
        outcome = np.full(len(rows), UNSCORED, np.int8)
        outcome[is_(rows["status"], "misclassified")] = WRONG
        ok = is_(rows["status"], "ok")
        outcome[ok] = np.where(fooled[ok], FOOLED, ROBUST)
        return cls(ints(rows["position"]), ints(rows["label"]), outcome)

    def dense(self, size: int) -> NDArray[np.int8]:
        """The outcome by position, UNSCORED where there is no row."""
        full = np.full(size, UNSCORED, np.int8)
        full[self.position] = self.outcome
        return full


def rates(outcome: NDArray[np.int8], some_were_right: bool = False) -> dict[str, Any]:
    """Counts, robust accuracy and success rate of a column of outcomes, with intervals.

    Where some images were initially correct and none of them is scored, nothing is: those that were wrong say nothing
    of the attack, and would make a robust accuracy of 0.
    """
    wrong, robust, fooled = (int((outcome == code).sum()) for code in (WRONG, ROBUST, FOOLED))
    scored = 0 if some_were_right and robust + fooled == 0 else wrong + robust + fooled
    return {
        "rows": len(outcome),
        "scored": scored,
        "ok": robust + fooled,
        "robust": robust,
        "fooled": fooled,
        "misclassified": wrong,
        **rate_columns("robust_accuracy", Rate(robust, scored)),
        **rate_columns("success_rate", Rate(fooled, robust + fooled)),
    }


def measures(table: pd.DataFrame, norm_name: str, minimal: bool, outcome: NDArray[np.int8]) -> dict[str, Any]:
    """What is measured of an attack's rows, over the attacked images; NaN entries are left out of it.

    The norm of an attack that minimises it is of the fooled images only: the others' says nothing.
    """
    attacked = outcome > WRONG
    norm = floats(table[norm_name])[(outcome == FOOLED) if minimal else attacked]
    cosine = np.abs(floats(table["cosine"])[attacked])
    rounded = table["rounded_success"][outcome == FOOLED].dropna()
    left_out = outcome == UNSCORED
    why = table["status"][left_out].str.cat(table["message"][left_out].fillna("no reason given"), sep=": ")
    reasons = by_cause(Counter(map(str, why)).items())  # in order, which value_counts of pandas 2.1 does not keep
    return {
        **{status: int(is_(table["status"], status).sum()) for status in ("error", "unreadable", "invalid")},
        "mean_norm": _of(np.mean, norm),
        "max_norm": _of(np.max, norm),
        "mean_abs_cosine": _of(np.mean, cosine),
        "max_abs_cosine": _of(np.max, cosine),
        "forward_calls": _of(np.mean, floats(table["forward_calls"])[attacked]),
        "gradient_calls": _of(np.mean, floats(table["gradient_calls"])[attacked]),
        "seconds": float(np.nansum(floats(table["seconds"]))),
        "rounded_success": float(rounded.mean()) if len(rounded) else None,
        "reasons": json.dumps(reasons),
    }


def median_queries(
    table: pd.DataFrame, about: Mapping[str, Any], has_budget: bool, outcome: NDArray[np.int8]
) -> float | None:
    """How often an image's model was evaluated until its first success, the median over the fooled images.

    The calls that are stored are those only of an attack that left each image there, as it does by default where the
    model answers the same question alike. None of others, and, unless the run has a budget, of those with gradients.
    """
    stopped = "early_stop" in (about.get("parameters") or {}) or not (table["evaluations"] > 1).any()
    attacked = table[outcome > WRONG]
    if not (about.get("early_stop") and stopped and (has_budget or not attacked["gradient_calls"].any())):
        return None
    return _of(np.median, floats(table["forward_calls"])[outcome == FOOLED])


def cause(text: str) -> str:
    """What is left of a reason without the numbers and names that differ from image to image.

    >>> cause("unreadable: pixels lie in [-2.1, 2.6]") == cause("unreadable: pixels lie in [-1.9, 2]")
    True
    """
    plain = re.sub(r"'[^']*'|\"[^\"]*\"", "''", text.removeprefix(EXAMPLE))
    return re.sub(r"0x[0-9a-fA-F]+|[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "0", plain)


def by_cause(reasons: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Reasons with their counts, those of one `cause` as one, of which the first is the example."""
    groups: dict[str, tuple[str, int]] = {}
    for text, count in reasons:
        key = cause(text)
        first, before = groups.get(key, (text, 0))
        if before and first != text:
            first = EXAMPLE + first.removeprefix(EXAMPLE)
        groups[key] = first, before + count
    return dict(sorted(groups.values(), key=lambda group: -group[1]))


EXAMPLE = "for example, "  # what a reason begins with that is one of several alike


def per_class(attack: str, labels: NDArray[np.int32], outcome: NDArray[np.int8]) -> list[dict[str, Any]]:
    """How many images of each class were scored, and how many of them are robust."""
    scored = outcome != UNSCORED
    classes, place = np.unique(labels[scored], return_inverse=True)
    total = np.bincount(place, minlength=len(classes))
    robust = np.bincount(place, outcome[scored] == ROBUST, len(classes)).astype(int)
    return [
        {"label": int(label), "attack": attack, "scored": int(n), "robust": int(count)}
        for label, n, count in zip(classes, total, robust, strict=True)
    ]


def confusion(
    attack: str, table: pd.DataFrame, minimal: bool, outcome: NDArray[np.int8], most: int | None = None
) -> list[dict[str, Any]]:
    """What attacked images are taken for, where that is not their class: how many, and how many of them are successes,
    the most frequent first, or only the `most` frequent. Of an attack that minimises the norm only successes count: the
    rest is of larger norm."""
    label, taken, fooled = ints(table["label"]), ints(table["adversarial_prediction"]), outcome == FOOLED
    other = fooled | ((outcome > WRONG) & (taken != label) & (not minimal))
    pairs, place, counts = np.unique(
        np.stack([label[other], taken[other]], 1), axis=0, return_inverse=True, return_counts=True
    )
    won = np.bincount(place.reshape(-1), fooled[other], len(pairs)).astype(int)
    return [
        {"attack": attack, "label": int(pairs[k, 0]), "prediction": int(pairs[k, 1]), "images": int(counts[k]),
         "success": int(won[k])}
        for k in np.argsort(-counts, kind="stable")[:most]
    ]  # fmt: skip


def compare(first: NDArray[np.int8], second: NDArray[np.int8]) -> Paired:
    """Two columns of outcomes of the same images, on those that both scored."""
    both = (first != UNSCORED) & (second != UNSCORED)
    return Paired.of(first[both] == ROBUST, second[both] == ROBUST)


def paired_row(paired: Paired) -> dict[str, Any]:
    """A comparison as columns of a table."""
    low, high = paired.interval() or (None, None)
    return {
        "n": paired.n,
        "attack_accuracy": Rate(paired.both + paired.first_only, paired.n).value,
        "baseline_accuracy": Rate(paired.both + paired.second_only, paired.n).value,
        "difference": paired.difference,
        "low": low,
        "high": high,
        "fooled_by_attack_alone": paired.second_only,
        "fooled_by_baseline_alone": paired.first_only,
        "p": paired.p,
    }


def rate_columns(name: str, rate: Rate) -> dict[str, float | None]:
    """A rate and its interval as three columns."""
    low, high = rate.interval() or (None, None)
    return {name: rate.value, f"{name}_low": low, f"{name}_high": high}


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as dictionaries of plain Python values, None for what is undefined."""
    rows = []
    for row in table.to_dict("records"):
        values = {str(k): v.item() if hasattr(v, "item") else v for k, v in row.items()}
        rows.append({k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()})
    return rows


def is_(column: pd.Series[Any], value: str) -> NDArray[np.bool_]:
    """Where a column of text has that value."""
    return bools(column == value)


def bools(column: pd.Series[Any]) -> NDArray[np.bool_]:
    """A nullable column as an array, False where it is null."""
    return column.to_numpy(bool, na_value=False)


def floats(column: pd.Series[Any]) -> NDArray[np.float64]:
    """A nullable column as an array, NaN where it is null."""
    return column.to_numpy(float, na_value=np.nan)


def ints(column: pd.Series[Any]) -> NDArray[np.int32]:
    """A nullable column as an array, -1 where it is null."""
    return column.to_numpy(np.int32, na_value=-1)


def _of(statistic: Callable[[Any], Any], values: NDArray[np.float64]) -> float | None:
    values = values[np.isfinite(values)]
    return float(statistic(values)) if len(values) else None
