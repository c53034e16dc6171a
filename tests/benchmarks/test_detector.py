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
from orthattack import PGD


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
    for trained in (detector.network, detector.regression(detector.roughness)):
        scorer, again = (trained(smooth[:80], noisy[:80], seed) for seed in (0, 0))
        clean = scorer(smooth[80:])[None]
        assert np.array_equal(clean[0], again(smooth[80:]))
        assert detector.above(clean, scorer(noisy[80:])[None]).mean() > 0.95
        assert detector.above(clean, clean).mean() == pytest.approx(0.5)


def smooth_images(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 3, 16, 16) in 8 bits, with values at both ends."""
    images = torch.nn.functional.interpolate(torch.rand(count, 3, 4, 4, generator=generator), size=16, mode="bilinear")
    return ((2 * images - 0.5).clamp(0, 1) * 255).round() / 255


@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.sampled_from([1, 8]))
def test_what_is_no_attack_is_as_large_as_one_or_is_one_of_another_image(seed, count, eps):
    generator = torch.Generator().manual_seed(seed)
    images = smooth_images(count, generator)
    delta = torch.randint(-eps, eps + 1, images.shape, generator=generator) / 255
    plain = ((images + delta).clamp(0, 1) * 255).round() / 255
    found = detector.without_attack(images, plain, eps, generator)
    assert [*found] == list(detector.NO_ATTACK)
    for view in found.values():
        assert view.min() >= 0
        assert view.max() <= 1
        assert torch.equal((view * 255).round() / 255, view)
        assert (view - images).abs().max() <= eps / 255 + 1e-6
    in_255ths = {kind: ((view - images) * 255).round().int() for kind, view in found.items()}
    of_plain = ((plain - images) * 255).round().int()
    assert torch.equal(in_255ths[detector.RESIGNED].abs(), of_plain.abs())
    assert not torch.equal(in_255ths[detector.RESIGNED], of_plain)
    values = (images * 255).round().int()
    moved = [[torch.equal((values[i] + of_plain[j]).clamp(0, 255) - values[i], in_255ths[detector.MOVED][i])
              for j in range(count)] for i in range(count)]  # fmt: skip
    assert all(sum(row) == 1 for row in moved)
    assert sorted(row.index(True) for row in moved) == [*range(count)]
    assert not any(moved[i][i] for i in range(count))


def test_only_a_detector_that_was_shown_noise_tells_it_from_attacks(monkeypatch):
    monkeypatch.setattr(detector, "EPOCHS", 8)
    monkeypatch.setattr(detector, "BATCH", 20)
    generator = torch.Generator().manual_seed(0)
    images = smooth_images(140, generator)
    noisy = (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    images = (noisy * 255).round() / 255
    grey = (torch.randint(0, 2, (140, 1, 16, 16), generator=generator) * 2 - 1) * 8 / 255  # an "attack"
    attacked = ((images + grey).clamp(0, 1) * 255).round() / 255
    seen = detector.without_attack(images[:100], attacked[:100], 8, generator)
    noise = detector.without_attack(images[100:], attacked[100:], 8, generator)[detector.RESIGNED]
    mixed = detector.in_turn([seen[kind] for kind in (detector.CLEAN, detector.RESIGNED)])
    of_noise, of_attacks = (
        detector.network(told_from, attacked[:100], 0) for told_from in (seen[detector.CLEAN], mixed)
    )
    assert detector.above(of_noise(images[100:])[None], of_noise(noise)[None]).mean() > 0.8
    for view in (images[100:], noise):
        assert detector.above(of_attacks(view)[None], of_attacks(attacked[100:])[None]).mean() > 0.9


def test_rows_are_taken_in_turn():
    first, second = torch.arange(10).reshape(5, 2), -torch.arange(10).reshape(5, 2)
    assert detector.in_turn([first, second])[:, 1].tolist() == [1, -3, 5, -7, 9]
    assert torch.equal(detector.in_turn([first]), first)


def test_what_a_model_answers_gives_an_attack_away():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 256, 4)).eval().requires_grad_(False)
    images = smooth_images(200, generator)
    attacked = PGD(model, eps=8 / 255, steps=3).run(images, model(images).argmax(1)).adversarials
    attacked = (attacked * 255).round() / 255
    seen, shown = (
        detector.without_attack(images[part], attacked[part], 8, generator)[detector.MOVED]
        for part in (slice(100), slice(100, None))
    )
    scorer = detector.regression(detector.answers(model))(seen, attacked[:100], 0)
    assert detector.above(scorer(shown)[None], scorer(attacked[100:])[None]).mean() > 0.8
    features = detector.answers(model)(images)
    assert features.shape == (200, 8)
    assert (np.diff(features[:, :4]) <= 0).all()
    assert np.exp(features[:, 4:]).sum(1) == pytest.approx(1)


def test_a_model_s_rows_reach_the_table(monkeypatch, tmp_path):
    monkeypatch.setattr(detector, "EPOCHS", 1)
    monkeypatch.setattr(detector, "BATCH", 4)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(3 * 16, 4)).eval()
    images = (torch.rand(40, 3, 16, 16) * 255).round() / 255
    labels = model(images).argmax(1)
    labels[-2:] = (labels[-2:] + 1) % 4  # which are not tested on
    rows = list(detector.rows(model, images, labels, 8))
    every = [*detector.PERTURBATIONS, *detector.NO_ATTACK]
    assert [row["perturbation"] for row in rows] == [
        kind for kinds, names in detector.AGAINST.values() for _ in names for kind in every if (kind,) != kinds
    ]
    for row in rows:
        assert row["images"] == len(row["flagged, seed 2"]) == len(row["fools"]) == 8
        assert len(row["by seed"]) == detector.SEEDS
        assert row["interval"][0] <= row["area"] <= row["interval"][1]
        if row["perturbation"] == "plain":
            assert (row["above plain"], row["its interval"]) == (0, [0, 0])
        if row["perturbation"] == detector.CLEAN:
            assert row["fools"] == 8 * "0"
    keep("detector", "two", rows, 1, tmp_path)
    tables = report.tables(tmp_path)
    assert [name.split("/")[2] for name in tables] == ["two-clean", "two-mixed"]
    for text in tables.values():
        assert text.startswith("two, L∞, ε = 8/255, 8 images to test on:")


def test_the_table_says_what_is_detected():
    of_clean = {"against": "clean", "detector": "network", "perturbation": "plain", "eps * 255": 8,
                "images": 4, "fools": "1101", "area": 0.75, "interval": [0.5, 0.9], "by seed": [0.7, 0.8],
                "above plain": 0.0, "its interval": [0.0, 0.0], "flagged, seed 0": "1110",
                "flagged, seed 1": "1000"}  # fmt: skip
    other = of_clean | {"perturbation": "other", "above plain": -0.1, "its interval": [-0.2, 0.01]}
    rows = [of_clean, other, of_clean | {"against": "mixed"}]
    text = constraint.detector_tables(Table(name="m", hardware="h", versions={}, rows=rows))["m-clean"]
    first, second = ([c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()[-2:])
    found = ["network", "plain", "75 %", "0.75 [0.50, 0.90]", "–", "50 % (25 to 75)", "38 %"]
    assert first == found  # undetected and fooling: image 3 of seed 0, images 1 and 3 of seed 1
    assert second[4] == "−0.100 [−0.200, +0.010]"
