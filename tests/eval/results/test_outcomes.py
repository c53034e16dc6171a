"""Outcomes of a few rows that are written down here, so that every number can be counted by hand."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from orthattack.eval.results.outcomes import (
    FOOLED,
    ROBUST,
    UNSCORED,
    WRONG,
    Outcomes,
    bools,
    by_cause,
    cause,
    compare,
    floats,
    ints,
    is_,
    measures,
    paired_row,
    per_class,
    rate_columns,
    rates,
    records,
)
from orthattack.eval.results.paired import Paired
from orthattack.eval.results.rates import Rate

STATUS = ["ok", "ok", "misclassified", "ok", "error", "ok", "unreadable", "invalid", "error"]
TABLE = pd.DataFrame(
    {
        "position": pd.array([4, 0, 2, 8, 3, 1, 6, 7, None], "Int32"),
        "label": pd.array([1, 1, 0, 0, 2, 1, 0, 0, 5], "Int32"),
        "status": pd.array(STATUS, "string"),
        "message": pd.array([None] * 4 + ["why", None, "gone", "bad", None], "string"),
        "success": pd.array([True, False, None, True, None, True, None, None, None], "boolean"),
        "linf": pd.array([0.1, 0.2, 0.05, 0.3, 0.9, np.nan, None, 0.4, 0.9], "Float64"),
        "cosine": pd.array([-0.5, 0.25, 0.9, 0.0, 0.9, None, None, 0.9, 0.9], "Float64"),
        "rounded_success": pd.array([True, None, None, False, None, None, None, None, None], "boolean"),
        "forward_calls": pd.array([10, 20, 99, 30, 99, 40, None, 99, 99], "Float64"),
        "gradient_calls": pd.array([1, 2, 99, 3, 99, None, None, 99, 99], "Float64"),
        "seconds": pd.array([1, 2, 4, 8, 16, 32, None, 64, 128], "Float64"),
    }
)
OUTCOME = np.array([FOOLED, ROBUST, WRONG, FOOLED, UNSCORED, FOOLED, UNSCORED, UNSCORED, UNSCORED], np.int8)


def test_the_order_of_outcomes_is_that_of_the_worst_case():
    assert UNSCORED < WRONG < ROBUST < FOOLED


def test_outcomes_are_read_from_status_and_success():
    found = Outcomes.of(TABLE, "linf")
    assert found.outcome.tolist() == OUTCOME.tolist()
    assert found.outcome.dtype == np.int8
    assert found.position.tolist() == [4, 0, 2, 8, 3, 1, 6, 7, -1]
    assert found.label.tolist() == [1, 1, 0, 0, 2, 1, 0, 0, 5]
    # Within a radius: at it counts, beyond it, or of unknown size, does not.
    assert Outcomes.of(TABLE, "linf", 0.1).outcome.tolist()[:6] == [FOOLED, ROBUST, WRONG, ROBUST, UNSCORED, ROBUST]
    assert Outcomes.of(TABLE, "linf", 0.3).outcome.tolist()[:6] == [FOOLED, ROBUST, WRONG, FOOLED, UNSCORED, ROBUST]


def test_dense_outcomes_are_by_position():
    positions, outcome = np.array([4, 0, 2], np.int32), np.array([FOOLED, ROBUST, WRONG], np.int8)
    dense = Outcomes(positions, positions, outcome).dense(6)
    assert dense.tolist() == [ROBUST, UNSCORED, WRONG, UNSCORED, FOOLED, UNSCORED]
    assert dense.dtype == np.int8


def test_rates_count_each_kind_over_its_own_denominator():
    found = rates(OUTCOME)
    assert {key: found[key] for key in ("rows", "scored", "ok", "robust", "fooled", "misclassified")} == {
        "rows": 9, "scored": 5, "ok": 4, "robust": 1, "fooled": 3, "misclassified": 1
    }  # fmt: skip
    for name, rate in (("robust_accuracy", Rate(1, 5)), ("success_rate", Rate(3, 4))):
        assert (found[f"{name}_low"], found[f"{name}_high"]) == rate.interval()
        assert found[name] == rate.value
    assert rate_columns("a", Rate(0, 0)) == {"a": None, "a_low": None, "a_high": None}


def test_where_none_that_was_right_is_scored_nothing_is():
    """One of two was initially misclassified, and the attack failed on the other: no robust accuracy of 0 of 1."""
    outcome = np.array([WRONG, UNSCORED], np.int8)
    found = rates(outcome, some_were_right=True)
    assert (found["scored"], found["misclassified"], found["robust_accuracy"]) == (0, 1, None)
    found = rates(outcome)  # where the other one is unreadable
    assert (found["scored"], found["robust_accuracy"]) == (1, 0.0)
    assert rates(OUTCOME, some_were_right=True) == rates(OUTCOME)


def test_measures_are_of_attacked_images():
    found = measures(TABLE, "linf", False, OUTCOME)
    assert (found["error"], found["unreadable"], found["invalid"]) == (2, 1, 1)
    assert found["mean_norm"] == pytest.approx((0.1 + 0.2 + 0.3) / 3)
    assert found["max_norm"] == 0.3
    assert found["mean_abs_cosine"] == 0.25
    assert found["max_abs_cosine"] == 0.5
    assert found["forward_calls"] == 25
    assert found["gradient_calls"] == 2
    assert found["seconds"] == 255 - 0
    assert found["rounded_success"] == 0.5
    assert json.loads(found["reasons"]) == {
        "error: why": 1, "unreadable: gone": 1, "invalid: bad": 1, "error: no reason given": 1
    }  # fmt: skip
    assert all(type(found[key]) in (int, float, str) for key in found)


def test_measures_of_a_minimal_attack_have_the_norm_of_the_fooled_alone():
    found = measures(TABLE, "linf", True, OUTCOME)
    assert found["mean_norm"] == pytest.approx((0.1 + 0.3) / 2)
    assert found["max_norm"] == 0.3
    assert found["mean_abs_cosine"] == 0.25
    held = np.array([ROBUST] * 2 + [WRONG] + [ROBUST] * 6, np.int8)
    assert measures(TABLE, "linf", True, held)["mean_norm"] is None
    assert measures(TABLE, "linf", True, held)["max_norm"] is None
    assert measures(TABLE, "linf", True, held)["rounded_success"] is None


def test_reasons_of_one_cause_are_one_with_an_example_the_commonest_first():
    messages = ["at 0x1f", "seldom", "pixel -1.5e-3 of 'a'", 'pixel 7 of "b"', "at 0xAB", "at 0xAB", "often"] + [
        "often"
    ] * 9
    n = len(messages)
    columns = {name: pd.array([None] * n, TABLE[name].dtype) for name in TABLE}
    table = pd.DataFrame(columns).assign(status=pd.array(["error"] * n, "string"), message=messages)
    found = json.loads(measures(table, "linf", False, np.full(n, UNSCORED, np.int8))["reasons"])
    assert list(found.items())[:2] == [("error: often", 10), ("for example, error: at 0x1f", 3)]
    assert found["error: seldom"] == 1
    assert sum(found.values()) == n
    assert by_cause([("a 1", 1), ("b", 5), ("a 2", 2)]) == {"b": 5, "for example, a 1": 3}
    assert by_cause([("for example, a 1", 2), ("a 1", 1)]) == {"for example, a 1": 3}
    assert by_cause([("a 1", 2), ("a 1", 3)]) == {"a 1": 5}
    assert cause("for example, x -2.5") == cause("x +3") != cause("y 3")


def test_classes_are_counted_by_those_scored():
    assert per_class("PGD", Outcomes.of(TABLE, "linf").label, OUTCOME) == [
        {"label": 0, "attack": "PGD", "scored": 2, "robust": 0},
        {"label": 1, "attack": "PGD", "scored": 3, "robust": 1},
    ]
    assert per_class("PGD", np.array([3], np.int32), np.array([UNSCORED], np.int8)) == []


def test_two_columns_are_compared_where_both_are_scored():
    first = np.array([ROBUST, ROBUST, FOOLED, FOOLED, WRONG, UNSCORED, ROBUST, ROBUST], np.int8)
    second = np.array([ROBUST, FOOLED, ROBUST, FOOLED, ROBUST, ROBUST, UNSCORED, WRONG], np.int8)
    assert compare(first, second) == Paired(6, 1, 2, 2)
    assert compare(second, first) == Paired(6, 1, 2, 2)


def test_a_comparison_as_a_row():
    paired = Paired(10, 4, 3, 1)
    assert paired_row(paired) == {
        "n": 10,
        "attack_accuracy": 0.7,
        "baseline_accuracy": 0.5,
        "difference": 0.2,
        "low": paired.interval()[0],
        "high": paired.interval()[1],
        "fooled_by_attack_alone": 1,
        "fooled_by_baseline_alone": 3,
        "p": paired.p,
    }
    assert {key for key, value in paired_row(Paired(0, 0, 0, 0)).items() if value is None} == {
        "attack_accuracy", "baseline_accuracy", "difference", "low", "high", "p"
    }  # fmt: skip


def test_records_are_plain_values():
    table = pd.DataFrame({"a": np.array([1.5, np.nan]), "b": np.array([1, 2]), "c": ["x", None]})
    (first, second) = records(table)
    assert first == {"a": 1.5, "b": 1, "c": "x"}
    assert (type(first["a"]), type(first["b"])) == (float, int)
    assert (second["a"], second["b"]) == (None, 2)


def test_nullable_columns_as_arrays():
    assert bools(TABLE["success"]).tolist() == [True, False, False, True, False, True, False, False, False]
    assert ints(TABLE["position"]).tolist()[-1] == -1
    assert np.isnan(floats(TABLE["cosine"])).nonzero()[0].tolist() == [5, 6]
    assert is_(TABLE["message"], "why").tolist() == [k == 4 for k in range(9)]
