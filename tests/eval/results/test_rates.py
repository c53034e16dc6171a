from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from orthattack.eval.results.outcomes import FOOLED, ROBUST, UNSCORED, WRONG, rates
from orthattack.eval.results.rates import Rate


@given(st.lists(st.sampled_from([UNSCORED, WRONG, ROBUST, FOOLED]), min_size=1))
def test_rates_have_the_denominators_they_claim(outcomes):
    robust, fooled, wrong = (outcomes.count(code) for code in (ROBUST, FOOLED, WRONG))
    found = rates(np.array(outcomes, np.int8))
    assert found["robust_accuracy"] == Rate(robust, robust + fooled + wrong).value
    assert found["success_rate"] == Rate(fooled, robust + fooled).value
    assert (found["rows"], found["scored"]) == (len(outcomes), robust + fooled + wrong)
    for name, rate in (("robust_accuracy", Rate(robust, found["scored"])), ("success_rate", Rate(fooled, found["ok"]))):
        assert (found[f"{name}_low"], found[f"{name}_high"]) == (rate.interval() or (None, None))


def test_an_image_that_was_wrong_to_begin_with_is_neither_robust_nor_a_success():
    found = rates(np.array([WRONG], np.int8))
    assert found["robust_accuracy"] == 0
    assert found["success_rate"] is None


@given(st.integers(1, 5000), st.data())
def test_the_interval_is_wilsons(total, data):
    count = data.draw(st.integers(0, total))
    expected = binomtest(count, total).proportion_ci(0.95, method="wilson")
    assert Rate(count, total).interval() == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_nothing_has_no_rate():
    assert Rate(0, 0).value is None
    assert Rate(0, 0).interval() is None
