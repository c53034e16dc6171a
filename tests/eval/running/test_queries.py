"""A run with a budget of model evaluations per image."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from orthattack import PGD
from orthattack.eval.errors import EvaluationError
from orthattack.eval.report.text import leaderboard_table
from tests.eval.tiny import EPS, Net, evaluated

LARGE = 100 / 255


def rows(run, attack, eps=LARGE):
    table = run.rows("net", attack, eps)
    return table[table["status"] == "ok"]


class Counting(Net):
    asked = 0

    def forward(self, images):
        Counting.asked += len(images)
        return super().forward(images)


def test_every_attack_of_a_run_keeps_the_budget_or_counts_as_not_fooled(tmp_path):
    given = set()

    def mine(model, eps, queries=100):
        given.add(queries)
        return PGD(model, eps=eps, steps=queries // 2)

    attacks = {
        "Square": "Square", "own": {"name": "Square", "queries": 20}, "PGD": {"name": "PGD", "steps": 20},
        "stopping": {"name": "PGD", "steps": 20, "early_stop": True, "random_start": False},
        "short": {"name": "foolbox:LinfPGD", "steps": 2}, "long": {"name": "foolbox:LinfPGD", "steps": 40},
        "mine": mine,
    }  # fmt: skip
    options = {"eps": LARGE, "early_stop": False}
    run = evaluated(tmp_path / "few", attacks, queries=8, **options)
    free = evaluated(tmp_path / "free", {name: attacks[name] for name in ("own", "PGD", "stopping")}, **options)
    assert (rows(run, "Square")["forward_calls"] == 8).all()
    assert rows(run, "Square")["success"].any()
    for name in ("own", "PGD"):
        assert (rows(run, name)["forward_calls"] > 8).all()
        assert rows(free, name)["success"].any()
        assert not rows(run, name)["success"].any()
    quick = rows(free, "stopping")
    expected = quick["success"].to_numpy(bool) & (quick["forward_calls"].to_numpy(float) <= 8)
    assert np.array_equal(rows(run, "stopping")["success"].to_numpy(bool), expected)
    assert expected.any()
    assert rows(run, "short")["success"].any()
    assert (rows(run, "long")["forward_calls"] <= 8).all()  # stopped
    assert (rows(run, "long")["linf"] == 0).all()
    assert rows(run, "mine")["success"].any()
    assert given == {100, 8}  # the first, to see what it is
    median = run.table().set_index("attack")["median_queries"]
    quick = rows(run, "stopping")  # alone stops at a success
    assert median["stopping"] == np.median(quick["forward_calls"][quick["success"]])
    assert median.drop("stopping").isna().all()
    assert free.table()["median_queries"].isna().all()  # it asks for gradients
    assert "queries: at most 8 evaluations of the model per image" in leaderboard_table(run)
    assert "queries: at most" not in leaderboard_table(free)


def test_what_is_stopped_asks_no_more_and_says_so(tmp_path, capsys):
    Counting.asked = 0
    run = evaluated(tmp_path, [{"name": "foolbox:LinfPGD", "steps": 500}], Counting(), eps=EPS, queries=10)
    assert Counting.asked < 10 * (10 + 30)  # and what the run itself looks at
    assert not rows(run, "foolbox:LinfPGD", EPS)["success"].any()
    told = capsys.readouterr()
    assert "asked for more than 10 evaluations per image and was stopped there" in told.out + told.err


@pytest.mark.parametrize("queries", [0, "many"])
def test_a_budget_is_a_number(tmp_path, queries):
    with pytest.raises(EvaluationError, match="queries: must be a whole number, at least 1"):
        evaluated(tmp_path, ["PGD"], queries=queries)


class Noisy(Net):
    def forward(self, images):
        logits = super().forward(images)
        return logits + 0.1 * torch.rand_like(logits)


def test_queries_to_success_are_a_column_of_100_where_they_were_counted(tmp_path, monkeypatch):
    """Against the calls of single images; not of gradients, of one that goes on, nor of a model that draws."""
    monkeypatch.setenv("COLUMNS", "100")
    square = {"name": "Square", "queries": 100}
    attacks = [square, {**square, "label": "on", "early_stop": False}, "PGD"]
    run = evaluated(tmp_path / "run", attacks, eps=2 * EPS, save_images="none", report=True)
    won = rows(run, "Square", 2 * EPS)
    won = won["forward_calls"][won["success"]].to_numpy(float)
    expected = np.median(won)
    assert 1 <= expected <= 100
    median = run.table().set_index("attack")["median_queries"]
    assert median["Square"] == expected
    assert median.drop("Square").isna().all()
    text, cell = leaderboard_table(run), f"{expected:.5g} ({len(won)})"
    assert max(map(len, text.splitlines())) <= 100
    assert "queries" in text
    assert cell in next(line for line in text.splitlines() if " Square " in line)
    assert "queries (n): evaluations of the model until an image's first success" in text
    assert f"| {cell} |" in run.folder.read_text("results.md")
    assert f"{cell} </td>" in run.folder.read_text("report.html").replace("\n", "")
    stored = {row["attack"]: row["median_queries"] for row in json.loads(run.folder.read_text("results.json"))["table"]}
    assert stored == {"Square": expected, "on": None, "PGD": None, "worst case of all": None}

    noisy = evaluated(tmp_path / "noisy", [square], Noisy(), eps=2 * EPS, save_images="none")
    assert noisy.table()["median_queries"].isna().all()
    assert "queries" not in leaderboard_table(noisy)
