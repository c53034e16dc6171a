"""The benchmark of transfer: what each source's adversarials do to each model, by image, and the tables of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import constraint, trained, transfer
from benchmarks.stored import Table
from orthattack.eval.models import load_classifier
from orthattack.eval.results.paired import Paired


@pytest.mark.slow
def test_sources_are_measured_on_images_that_all_know(shared, tmp_path):
    ((name, rows),) = transfer.tables(shared, tmp_path, 4, ["cifar10"], ["cifar10-robust"])
    assert name == "cifar10-robust"
    every = list(transfer.attacks(torch.zeros(1, 3, 8, 8), 5, 5))
    assert [(row["attack"], row["form"]) for row in rows] == [(a, f) for a in every for f in transfer.FORMS]
    for row in rows:
        for target in ("cifar10-standard", "cifar10-robust"):
            assert len(row[f"fools {target}"]) == 4
            assert set(row[f"fools {target}"]) <= {"0", "1"}
    assert any("1" in row["fools cifar10-robust"] for row in rows)


@pytest.mark.slow
def test_a_network_is_trained_once_and_loads_as_a_model(shared, tmp_path, monkeypatch):
    path = trained.weights(shared, tmp_path, "shufflenet_v2_x0_5", 0, epochs=1)
    classifier = load_classifier("shufflenet_v2_x0_5", path, 64)
    assert classifier.num_classes == 20
    monkeypatch.setattr(trained, "train", None)
    assert trained.weights(shared, tmp_path, "shufflenet_v2_x0_5", 0, epochs=1) == path


def table(name: str, **digits: tuple[str, str]) -> Table:
    """Of one attack, for each target (underscores for dashes) what plain and orthogonal fool."""
    row = {"group": "g", "attack": "MI", "eps * 255": 8.0, "gradients": 10}
    rows = [
        row | {"form": form} | {f"fools {target.replace('_', '-')}": of[k] for target, of in digits.items()}
        for k, form in enumerate(transfer.FORMS)
    ]
    return Table(name=name, hardware="h", versions={}, rows=rows)


def test_one_pair_has_the_paired_statistics():
    (found,) = transfer.compared([table("a", a=("1111", "1111"), b=("1110", "1000"))], "g").values()
    pair = found["MI"]
    assert (pair.rate("plain"), pair.rate("orthogonal"), pair.loss) == (0.75, 0.25, 0.5)
    robust = np.array([True, True, True, False]), np.array([True, False, False, False])
    assert pair.interval() == Paired.of(~robust[1], ~robust[0]).interval()
    assert pair.pairs[0].difference == 0.5
    assert pair.pairs[0].p == 0.5  # two images, both lost: 2 * (1/2)^2


def test_seeds_of_one_network_are_taken_together_and_the_source_is_no_target():
    found = transfer.compared(
        [
            table("net-0", net_0=("11", "11"), net_1=("01", "01"), other=("10", "00")),
            table("net-1", net_0=("00", "00"), net_1=("11", "11"), other=("11", "11")),
        ],
        "g",
    )
    assert set(found) == {("net", "net"), ("net", "other")}
    assert found["net", "net"]["MI"].plain.tolist() == [[False, True], [False, False]]
    to_other = found["net", "other"]["MI"]
    assert to_other.loss == 0.25
    # Two images, of which half a one is lost, and two more: one without a difference, and a half of each.
    half = 1.959963984540054 * np.sqrt((1.25 / 4 - 0.125**2) / 4)
    assert to_other.interval() == pytest.approx((0.125 - half, 0.125 + half))


def test_what_is_lost_is_told_by_seed_of_training():
    stored = [
        table("net-0", net_0=("11", "11"), net_1=("11", "00"), other=("10", "00")),
        table("net-1", net_0=("11", "00"), net_1=("11", "11"), other=("00", "00")),
        table("other", net_0=("11", "11"), net_1=("10", "11"), other=("11", "11")),
    ]
    found = transfer.by_seed(stored, "g")
    assert {seed: [of.name for of in tables] for seed, tables in found.items()} == {
        0: ["net-0", "other"], 1: ["net-1", "other"],
    }  # fmt: skip
    lost = {
        seed: {pair: of["MI"].loss for pair, of in transfer.compared(tables, "g").items()}
        for seed, tables in found.items()
    }
    assert lost == {
        0: {("net", "other"): 0.5, ("other", "net"): 0.0},
        1: {("net", "other"): 0.0, ("other", "net"): -0.5},
    }
    head, _, line = constraint.transfer_tables(stored)["g-attacks"].splitlines()[-3:]
    told = dict(zip(*([cell.strip() for cell in of.strip("|").split("|")] for of in (head, line)), strict=True))
    assert told["by seed"] == "−25.0 to +25.0"


def test_several_pairs_of_the_same_images_are_no_more_images():
    generator = np.random.default_rng(0)
    plain, ortho = generator.random((2, 1, 80)) < 0.5
    once, often = transfer.Compared(plain, ortho), transfer.Compared(plain.repeat(20, 0), ortho.repeat(20, 0))
    assert often.interval() == pytest.approx(once.interval(), abs=0.03)
    same = transfer.Compared(plain.repeat(2, 0), plain.repeat(2, 0))
    low, high = same.interval()
    assert low == -high < -0.02  # 80 images without a difference are no proof of none


def test_the_tables_say_both_rates_and_what_is_lost():
    stored = [table("a", a=("1" * 50,) * 2, b=("1" * 20 + "0" * 30, "1" * 5 + "0" * 45))]
    text = constraint.transfer_tables(stored)
    assert set(text) == {"g-attacks", "g-pairs"}
    assert text["g-attacks"].startswith("L∞, ε = 8/255, 50 images, 1 pairs of models:")
    cells = [cell.strip() for cell in text["g-attacks"].splitlines()[-1].strip("|").split("|")]
    low, high = Paired(50, 30, 15, 0).interval()
    assert cells == ["MI", "10", "40.0 %", "10.0 %", f"+30.0 [+{100 * low:.1f}, +{100 * high:.1f}]", "1 of 1"]
    assert [cell.strip() for cell in text["g-pairs"].splitlines()[-1].strip("|").split("|")] == ["a → b", "**40 / 10**"]
