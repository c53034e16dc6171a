"""The benchmark of detectors: areas and their intervals, and that what is trained sees what it was trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from benchmarks import constraint, detector, report
from benchmarks.stored import Table, keep


@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.sampled_from([3, 1000]))
def test_the_mean_is_the_area_under_the_curve(seed, count, values):
    generator = np.random.default_rng(seed)
    clean, perturbed = generator.integers(0, values, (2, 2, count)).astype(float)  # with ties
    expected = [
        roc_auc_score(np.repeat([0, 1], count), np.concatenate(of)) for of in zip(clean, perturbed, strict=True)
    ]
    assert detector.above(clean, perturbed).mean() == pytest.approx(np.mean(expected))


def test_the_interval_is_that_of_a_bootstrap_of_the_images():
    generator = np.random.default_rng(0)
    clean = generator.normal(size=(1, 60))
    perturbed = clean + generator.normal(0.7, 1, (1, 60))
    draws = generator.integers(0, 60, (800, 60))
    answers = np.repeat([0, 1], 60)
    areas = [roc_auc_score(answers, np.concatenate([clean[0][d], perturbed[0][d]])) for d in draws]
    found = detector.interval(detector.above(clean, perturbed))
    assert found == pytest.approx(np.percentile(areas, [2.5, 97.5]).tolist(), abs=0.015)
    assert detector.interval(np.zeros((9, 9))) == [0, 0]


def test_detectors_see_what_they_were_trained_on_and_nothing_in_the_same_image(monkeypatch):
    monkeypatch.setattr(detector, "EPOCHS", 4)
    monkeypatch.setattr(detector, "BATCH", 20)
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(120, 3, 4, 4, generator=generator), size=16, mode="bilinear")
    noisy = (smooth + 0.2 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)
    for trained in (detector.network, detector.rough):
        scorer, again = (trained(smooth[:80], noisy[:80], seed) for seed in (0, 0))
        clean = scorer(smooth[80:])[None]
        assert np.array_equal(clean[0], again(smooth[80:]))
        assert detector.above(clean, scorer(noisy[80:])[None]).mean() > 0.95
        assert detector.above(clean, clean).mean() == pytest.approx(0.5)


def test_a_model_s_rows_reach_the_table(monkeypatch, tmp_path):
    monkeypatch.setattr(detector, "EPOCHS", 1)
    monkeypatch.setattr(detector, "BATCH", 4)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(3 * 16, 4)).eval()
    images = (torch.rand(40, 3, 16, 16) * 255).round() / 255
    rows = list(detector.rows(model, images, model(images).argmax(1), 8))
    assert [row["perturbation"] for row in rows] == 2 * [*detector.PERTURBATIONS, detector.RANDOM]
    for row in rows:
        assert row["images"] == len(row["flagged, seed 2"]) == 10
        assert len(row["by seed"]) == detector.SEEDS
        assert row["interval"][0] <= row["area"] <= row["interval"][1]
        if row["perturbation"] == "plain":
            assert (row["above plain"], row["its interval"]) == (0, [0, 0])
    keep("detector", "two", rows, 1, tmp_path)
    (text,) = report.tables(tmp_path).values()
    assert text.startswith("two, L∞, ε = 8/255, 10 images to test on:")


def test_the_table_says_what_is_detected():
    row = {"detector": "network", "perturbation": "plain", "eps * 255": 8, "images": 4, "fooled": 3, "area": 0.75,
           "interval": [0.5, 0.9], "by seed": [0.7, 0.8], "above plain": 0.0, "its interval": [0.0, 0.0],
           "flagged, seed 0": "1110", "flagged, seed 1": "1000"}  # fmt: skip
    other = row | {"perturbation": "other", "above plain": -0.1, "its interval": [-0.2, 0.01]}
    text = constraint.detector_table(Table(name="m", hardware="h", versions={}, rows=[row, other]))
    first, second = ([c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()[-2:])
    assert first == ["network", "plain", "75 %", "0.75 [0.50, 0.90]", "0.70 to 0.80", "–", "50 % (25 to 75)"]
    assert second[5] == "−0.100 [−0.200, +0.010]"
