from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from orthattack.eval.results.rates import Rate, attack_success_rate, clean_accuracy, robust_accuracy


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_rates_have_the_denominators_they_claim(pairs):
    clean, adversarial = (torch.tensor(column) for column in zip(*pairs, strict=True))
    n, right = len(pairs), sum(c for c, _ in pairs)
    assert clean_accuracy(clean) == Rate(right, n)
    assert robust_accuracy(clean, adversarial) == Rate(sum(c and a for c, a in pairs), n)
    assert attack_success_rate(clean, adversarial) == Rate(sum(c and not a for c, a in pairs), right)


def test_an_image_the_attack_corrects_is_neither_robust_nor_a_success():
    clean, adversarial = torch.tensor([False]), torch.tensor([True])
    assert robust_accuracy(clean, adversarial).value == 0
    assert attack_success_rate(clean, adversarial).value is None


@given(st.integers(1, 5000), st.data())
def test_the_interval_is_wilsons(total, data):
    count = data.draw(st.integers(0, total))
    expected = binomtest(count, total).proportion_ci(0.95, method="wilson")
    assert Rate(count, total).interval() == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_nothing_has_no_rate():
    assert Rate(0, 0).value is None
    assert Rate(0, 0).interval() is None
