"""Signs, in what a model does with clean images, that an evaluation measures a mistake instead of robustness."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from orthattack.assumptions import PROBABILITIES, SIGMOIDS, are_probabilities
from orthattack.eval.data.dataset import evenly
from orthattack.eval.results.rates import Rate

_DOUBT = 0.01  # an explanation under which the data had at most this probability is ruled out


@dataclass(frozen=True)
class CleanStatistics:
    """What is collected over clean images."""

    accuracy: Rate  # right predictions
    num_classes: int  # K, the length of a row of logits
    logits: tuple[float, float]  # smallest and largest logit
    row_sums: tuple[float, float]  # smallest and largest sum of an image's logits
    images: tuple[float, float]  # smallest and largest pixel


def suspicions(statistics: CleanStatistics) -> list[str]:
    """Warnings, each with its reason and a remedy; none if nothing is odd."""
    checks = (_at_chance, _not_finite, _probabilities, _pixels)
    return [warning for check in checks if (warning := check(statistics)) is not None]


def _at_chance(statistics: CleanStatistics) -> str | None:
    """An accuracy that guessing explains, by an exact binomial test, and a model half-way to perfect does not.

    The second condition keeps five images, of which a good model may well miss four, from raising it.
    """
    from scipy.special import bdtr, bdtrc  # scipy.stats takes a second to import

    count, total, chance = statistics.accuracy.count, statistics.accuracy.total, 1 / statistics.num_classes
    guessing = float(bdtrc(count - 1, total, chance))  # P(at least as many right)
    useful = float(bdtr(count, total, (1 + chance) / 2))  # P(at most as many right)
    if total == 0 or guessing <= _DOUBT or useful > _DOUBT:
        return None
    return (
        f"clean accuracy is at chance: {count} of {total} right, where guessing among {statistics.num_classes} "
        f"classes gets {total * chance:.3g} (exact binomial test, p = {guessing:.2g}): are the labels indices among "
        "this model's classes, in its order, and is the normalisation inside the model, once?"
    )


def _not_finite(statistics: CleanStatistics) -> str | None:
    if all(map(math.isfinite, (*statistics.logits, *statistics.row_sums))):
        return None
    return "some logits on clean images are NaN or infinite, so no loss or gradient means anything there"


def _probabilities(statistics: CleanStatistics) -> str | None:
    if are_probabilities(*statistics.logits, statistics.row_sums):
        return PROBABILITIES
    # Logits of a few images may lie in [0, 1] by chance, those of many that reach both ends do not.
    (low, high), total = statistics.logits, statistics.accuracy.total
    return SIGMOIDS if total >= 10 and 0 <= low < 0.1 and 0.9 < high <= 1 else None


def _pixels(statistics: CleanStatistics) -> str | None:
    low, high = statistics.images
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


CLEAN_COLUMNS = ["status", "wrong_share", "logit_min", "logit_max", "logit_sum", "image_min", "image_max"]


def clean_suspicions(rows: pd.DataFrame, num_classes: int) -> list[str]:
    """What looks wrong with a model on clean images, from `CLEAN_COLUMNS` of their rows; see `suspicions`."""
    rows = rows[rows["status"] == "ok"]
    if rows.empty:
        return []
    ends = {name: (float(rows[name].min()), float(rows[name].max())) for name in CLEAN_COLUMNS[2:]}
    right = Rate(int((rows["wrong_share"] <= 0.5).sum()), len(rows))
    logits, images = (ends["logit_min"][0], ends["logit_max"][1]), (ends["image_min"][0], ends["image_max"][1])
    return suspicions(CleanStatistics(right, num_classes, logits, ends["logit_sum"], images))


def differentiated(count: int) -> list[int]:
    """On which of `count` clean images the gradient is taken: a sixteenth, but at least 16 and at most 256.

    One gradient costs about as much as one step of an attack, and a few hundred give the distribution.
    """
    return evenly(min(max(16, count // 16), 256), count)
