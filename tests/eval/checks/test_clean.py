from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from orthattack.eval.checks.clean import CleanStatistics, suspicions
from orthattack.eval.results.rates import Rate


def statistics(**changes: object) -> CleanStatistics:
    values = {"logits": (-5.0, 9.0), "row_sums": (-3.0, 8.0), "images": (0.0, 1.0)}
    return CleanStatistics(**{"accuracy": Rate(80, 100), "num_classes": 10, **values, **changes})


def answers(logits: torch.Tensor) -> CleanStatistics:
    """Of a model that is always right, and answers so."""
    sums = logits.double().sum(1)
    ends = {
        "logits": (float(logits.min()), float(logits.max())),
        "row_sums": (float(sums.min()), float(sums.max())),
    }
    return statistics(accuracy=Rate(len(logits), len(logits)), **ends)


def test_a_sound_model_raises_none():
    assert suspicions(statistics()) == []


@pytest.mark.parametrize(("count", "total", "classes"), [(10, 100, 10), (0, 100, 10), (1, 1000, 1000), (50, 100, 2)])
def test_accuracy_at_chance(count, total, classes):
    (warning,) = suspicions(statistics(accuracy=Rate(count, total), num_classes=classes))
    assert warning.startswith(f"clean accuracy is at chance: {count} of {total} right, where guessing among {classes} ")
    p = binomtest(count, total, 1 / classes, alternative="greater").pvalue
    assert f"p = {p:.2g}" in warning
    assert "is the normalisation inside the model, once?" in warning


@pytest.mark.parametrize(
    ("count", "total", "classes"),
    [(45, 100, 10), (1, 5, 10), (0, 0, 10), (12, 20, 10), (1, 3, 1000), (75, 100, 2), (10, 1000, 1000)],
)
def test_accuracy_above_chance_or_on_too_few_images(count, total, classes):
    assert suspicions(statistics(accuracy=Rate(count, total), num_classes=classes)) == []


@given(st.integers(2, 1000), st.integers(0, 300), st.integers(0, 2**31))
def test_a_model_half_way_to_perfect_is_seldom_suspected(classes, total, seed):
    """By construction both wrong verdicts have a probability of at most 1 %; at its own expectation there is none."""
    accuracy = Rate(round(total * (1 + 1 / classes) / 2), total)
    assert suspicions(statistics(accuracy=accuracy, num_classes=classes)) == []


def test_probabilities_in_place_of_logits():
    torch.manual_seed(0)
    logits = 4 * torch.randn(50, 10)
    for values in (logits.softmax(1), logits.softmax(1).half().float()):
        (warning,) = suspicions(answers(values))
        assert "returns probabilities, not logits" in warning
        assert "remove the final softmax" in warning
    for values in (logits, logits.log_softmax(1), 0.05 + 0.3 * logits.sigmoid()):
        assert suspicions(answers(values)) == []


def test_sigmoids_in_place_of_logits():
    torch.manual_seed(0)
    logits = 4 * torch.randn(50, 10)
    (warning,) = suspicions(answers(logits.sigmoid()))
    assert "seems to return sigmoids, not logits" in warning
    assert "remove the final sigmoid" in warning
    # which five rows of logits too may be in [0, 1] by chance
    assert suspicions(answers(logits.sigmoid()[:5])) == []


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((-2.1, 2.6), r"pixels lie in \[-2.1, 2.6\], not in \[0, 1\]: the images look normalised"),
        ((0.0, 255.0), r"\[0, 255\], not in \[0, 1\]: the images look like 8-bit values; divide them by 255"),
        ((0.0, 1.2), "eps and the bounds are in units of"),
        ((0.0, 1 / 255), "the images are black, or were divided by 255 twice"),
        ((math.nan, math.nan), r"\[nan, nan\], not in"),
    ],
)
def test_images_in_other_units(images, message):
    with pytest.raises(AssertionError, match=message):
        assert not suspicions(statistics(images=images))


def test_logits_that_are_not_finite():
    (warning,) = suspicions(statistics(logits=(0.0, math.inf)))
    assert "NaN or infinite" in warning
