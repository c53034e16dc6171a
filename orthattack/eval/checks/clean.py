"""Signs, in what a model does with clean images, that an evaluation measures a mistake instead of robustness."""

from __future__ import annotations

import math

import pandas as pd

from orthattack.assumptions import PROBABILITIES, SIGMOIDS, are_probabilities
from orthattack.eval.data.dataset import evenly

_DOUBT = 0.01  # an explanation under which the data had at most this probability is ruled out


CLEAN_COLUMNS = ["status", "wrong_share", "logit_min", "logit_max", "logit_sum", "image_min", "image_max"]


def clean_suspicions(rows: pd.DataFrame, num_classes: int) -> list[str]:
    """What looks wrong with a model on clean images, from `CLEAN_COLUMNS` of their rows: warnings, each with its reason
    and a remedy."""
    rows = rows[rows["status"] == "ok"]
    if rows.empty:
        return []
    low, high = rows[CLEAN_COLUMNS[2:]].min().astype(float), rows[CLEAN_COLUMNS[2:]].max().astype(float)
    logits, sums = (low["logit_min"], high["logit_max"]), (low["logit_sum"], high["logit_sum"])
    found = (
        _at_chance(int((rows["wrong_share"] <= 0.5).sum()), len(rows), num_classes),
        _not_finite(*logits, *sums),
        _probabilities(logits, sums, len(rows)),
        _pixels(low["image_min"], high["image_max"]),
    )
    return [warning for warning in found if warning is not None]


def _at_chance(count: int, total: int, num_classes: int) -> str | None:
    """An accuracy that guessing explains, by an exact binomial test, and a model half-way to perfect does not.

    The second condition keeps five images, of which a good model may well miss four, from raising it.
    """
    from scipy.special import bdtr, bdtrc  # scipy.stats takes a second to import

    chance = 1 / num_classes
    guessing = float(bdtrc(count - 1, total, chance))  # P(at least as many right)
    useful = float(bdtr(count, total, (1 + chance) / 2))  # P(at most as many right)
    if guessing <= _DOUBT or useful > _DOUBT:
        return None
    return (
        f"clean accuracy is at chance: {count} of {total} right, where guessing among {num_classes} "
        f"classes gets {total * chance:.3g} (exact binomial test, p = {guessing:.2g}): are the labels indices among "
        "this model's classes, in its order, and is the normalisation inside the model, once?"
    )


def _not_finite(*values: float) -> str | None:
    if all(map(math.isfinite, values)):
        return None
    return "some logits on clean images are NaN or infinite, so no loss or gradient means anything there"


def _probabilities(logits: tuple[float, float], sums: tuple[float, float], total: int) -> str | None:
    low, high = logits
    if are_probabilities(low, high, sums):
        return PROBABILITIES
    # Logits of a few images may lie in [0, 1] by chance, those of many that reach both ends do not.
    return SIGMOIDS if total >= 10 and 0 <= low < 0.1 and 0.9 < high <= 1 else None


def _pixels(low: float, high: float) -> str | None:
    found = f"pixels lie in [{low:.3g}, {high:.3g}], not in [0, 1]"
    if low < 0:
        return f"{found}: the images look normalised; pass them in [0, 1] and normalise inside the model"
    if high > 2:
        return f"{found}: the images look like 8-bit values; divide them by 255"
    if not high <= 1:
        return f"{found}: eps and the bounds are in units of [0, 1] pixels, so scale the images"
    if high <= 1.5 / 255:
        return f"no pixel is larger than {high:.3g}: the images are black, or were divided by 255 twice"
    return None


def differentiated(count: int) -> list[int]:
    """On which of `count` clean images the gradient is taken: a sixteenth, but at least 16 and at most 256.

    One gradient costs about as much as one step of an attack, and a few hundred give the distribution.
    """
    return evenly(min(max(16, count // 16), 256), count)
