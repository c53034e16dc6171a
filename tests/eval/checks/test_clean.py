from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from orthattack.eval.checks.clean import clean_suspicions


def suspicions(accuracy=(80, 100), num_classes=10, logits=(-5.0, 9.0), images=(0.0, 1.0)) -> list[str]:
    """Of so many right images of so many, with the smallest and largest of these."""
    right, total = accuracy
    values = {"logit_min": logits[0], "logit_max": logits[1], "image_min": images[0], "image_max": images[1]}
    shares = [float(k >= right) for k in range(total)]
    return clean_suspicions(
        pd.DataFrame({"wrong_share": shares, "status": "ok", "logit_sum": 8.0, **values}), num_classes
    )


def of_answers(logits: torch.Tensor) -> list[str]:
    """Of a model that is always right, and answers so."""
    rows = {"logit_min": logits.amin(1), "logit_max": logits.amax(1), "logit_sum": logits.double().sum(1)}
    rows |= {"wrong_share": torch.zeros(len(logits)), "image_min": torch.zeros(len(logits))}
    return clean_suspicions(pd.DataFrame({**rows, "image_max": 1.0, "status": "ok"}), logits.shape[1])


def test_a_sound_model_raises_none():
    assert suspicions() == []


@pytest.mark.parametrize(("count", "total", "classes"), [(10, 100, 10), (0, 100, 10), (1, 1000, 1000), (50, 100, 2)])
def test_accuracy_at_chance(count, total, classes):
    (warning,) = suspicions((count, total), classes)
    assert warning.startswith(f"clean accuracy is at chance: {count} of {total} right, where guessing among {classes} ")
    p = binomtest(count, total, 1 / classes, alternative="greater").pvalue
    assert f"p = {p:.2g}" in warning
    assert "is the normalisation inside the model, once?" in warning


@pytest.mark.parametrize(
    ("count", "total", "classes"),
    [(45, 100, 10), (1, 5, 10), (0, 0, 10), (12, 20, 10), (1, 3, 1000), (75, 100, 2), (10, 1000, 1000)],
)
def test_accuracy_above_chance_or_on_too_few_images(count, total, classes):
    assert suspicions((count, total), classes) == []


@given(st.integers(2, 1000), st.integers(0, 300), st.integers(0, 2**31))
def test_a_model_half_way_to_perfect_is_seldom_suspected(classes, total, seed):
    """By construction both wrong verdicts have a probability of at most 1 %; at its own expectation there is none."""
    assert suspicions((round(total * (1 + 1 / classes) / 2), total), classes) == []


def test_probabilities_in_place_of_logits():
    torch.manual_seed(0)
    logits = 4 * torch.randn(50, 10)
    for values in (logits.softmax(1), logits.softmax(1).half().float()):
        (warning,) = of_answers(values)
        assert "returns probabilities, not logits" in warning
        assert "remove the final softmax" in warning
    for values in (logits, logits.log_softmax(1), 0.05 + 0.3 * logits.sigmoid()):
        assert of_answers(values) == []


def test_sigmoids_in_place_of_logits():
    torch.manual_seed(0)
    logits = 4 * torch.randn(50, 10)
    (warning,) = of_answers(logits.sigmoid())
    assert "seems to return sigmoids, not logits" in warning
    assert "remove the final sigmoid" in warning
    # which five rows of logits too may be in [0, 1] by chance
    assert of_answers(logits.sigmoid()[:5]) == []


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
        assert not suspicions(images=images)


def test_logits_that_are_not_finite():
    (warning,) = suspicions(logits=(0.0, math.inf))
    assert "NaN or infinite" in warning
