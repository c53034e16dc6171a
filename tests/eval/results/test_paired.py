from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, bootstrap

from orthattack.eval.results.paired import Paired, optimality

outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60)


def columns(pairs):
    table = np.array(pairs, bool).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@given(outcomes)
def test_a_comparison_counts_what_it_says(pairs):
    paired = Paired.of(*columns(pairs))
    assert paired.n == len(pairs)
    assert paired.both == sum(a and b for a, b in pairs)
    assert paired.first_only == sum(a and not b for a, b in pairs)
    assert paired.second_only == sum(b and not a for a, b in pairs)
    if pairs:
        assert paired.difference == pytest.approx(np.mean([a for a, _ in pairs]) - np.mean([b for _, b in pairs]))
        low, high = paired.interval()
        assert -1 <= low <= paired.difference <= high <= 1 or np.isclose([low, high], paired.difference).any()


@given(outcomes)
def test_swapping_the_two_turns_the_sign_and_keeps_p(pairs):
    first, second = columns(pairs)
    one, other = Paired.of(first, second), Paired.of(second, first)
    assert one.p == other.p
    if pairs:
        assert one.difference == pytest.approx(-other.difference)


def test_nothing_compared_is_undefined_and_columns_must_agree_in_length():
    nothing = Paired.of(*columns([]))
    assert (nothing.difference, nothing.interval(), nothing.p) == (None, None, None)
    with pytest.raises(ValueError, match=r"of one length; found \(2,\), \(3,\)"):
        Paired.of(np.zeros(2, bool), np.zeros(3, bool))


@given(st.integers(0, 12), st.integers(0, 12))
def test_p_is_the_exact_two_sided_binomial(first_only, second_only):
    """By enumeration: all splits of the discordant images that are no likelier than the one found."""
    n = first_only + second_only
    chances = binom.pmf(np.arange(n + 1), n, 0.5)
    expected = chances[chances <= chances[first_only] * (1 + 1e-7)].sum()
    assert Paired(40, 40 - n, first_only, second_only).p == pytest.approx(expected)


@pytest.mark.parametrize(("n", "first_only", "second_only"), [(200, 30, 12), (1000, 5, 9), (50, 20, 1), (400, 60, 60)])
def test_the_interval_is_that_of_resampling_the_images(n, first_only, second_only):
    """SciPy resamples the images themselves, which says nothing of counts or multinomials."""
    d = np.repeat([1, -1, 0], [first_only, second_only, n - first_only - second_only])
    reference = bootstrap(
        (d,), np.mean, n_resamples=9_999, method="percentile", vectorized=True, rng=np.random.default_rng(1)
    ).confidence_interval
    found = Paired(n, 0, first_only, second_only).interval()
    # Of two draws of 9,999 from the same distribution: an end moves by about a fortieth of the interval, or one count.
    slack = max(0.05 * (reference.high - reference.low), 1.01 / n)
    assert found == pytest.approx((reference.low, reference.high), abs=slack)
    assert found == Paired(n, 0, first_only, second_only).interval()


def test_the_interval_is_that_of_all_resamples_of_a_few_images():
    d = np.array([1, 1, -1, 0, 0, 0])
    means = np.sort([np.mean(resample) for resample in itertools.product(d, repeat=6)])
    expected = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    assert Paired(6, 0, 2, 1).interval() == pytest.approx(expected, abs=1e-9)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    counts = rng.multinomial(300, [0.2, 0.12, 0.68], size=400)
    intervals = [Paired(300, 0, int(a), int(b)).interval() for a, b, _ in counts]
    covered = np.mean([low <= 0.08 <= high for low, high in intervals])
    assert 0.92 <= covered <= 0.98  # 0.95 ± 2.7 standard deviations of 400 trials


distance = st.one_of(st.just(0.0), st.just(np.inf), st.floats(1e-3, 10))


@given(st.lists(st.tuples(st.floats(1e-3, 10), st.booleans(), st.floats(1, 5)), min_size=2, max_size=30))
def test_optimality_is_one_for_the_best_and_between_otherwise(rows):
    best = np.array([0.0 if wrong else d for d, wrong, _ in rows])
    worse = np.array([0.0 if wrong else d * f for d, wrong, f in rows])
    value = optimality(best, best)
    if value is None:
        assert len(set(best[best > 0])) <= 1 or np.ptp(best[best > 0]) < 1e-9 * best.max() * len(best)
        return
    assert value == pytest.approx(1)
    assert -1e-9 <= optimality(worse, best) <= 1 + 1e-9
    nothing = np.where(best == 0, 0.0, np.inf)
    assert optimality(nothing, best) == pytest.approx(0, abs=1e-9)


@given(st.lists(st.tuples(distance, st.floats(1, 3)), min_size=1, max_size=25), st.floats(0.01, 100))
def test_optimality_has_no_unit(rows, scale):
    best = np.array([d for d, _ in rows])
    worse = best * np.array([f for _, f in rows])
    one, other = optimality(worse, best), optimality(scale * worse, scale * best)
    assert (one is None) == (other is None)
    assert one is None or one == pytest.approx(other, rel=1e-6, abs=1e-6)


@given(st.integers(0, 10_000))
def test_optimality_is_the_area_between_the_curves(seed):
    """The curves drawn out on a fine grid and integrated there, as the definition says."""
    rng = np.random.default_rng(seed)
    best = rng.uniform(0.5, 4, 30) * (rng.random(30) < 0.8)
    found = np.where(rng.random(30) < 0.9, best * rng.uniform(1, 2, 30), np.where(best > 0, np.inf, 0))
    grid = (np.arange(20_000) + 0.5) / 20_000 * best.max()

    def area(distances):
        return (distances[None] > grid[:, None]).mean() * best.max()

    nothing = (best > 0).mean() * best.max()
    expected = (nothing - area(found)) / (nothing - area(best))
    assert optimality(found, best) == pytest.approx(expected, abs=2e-3)


def test_optimality_of_nothing_is_undefined():
    assert optimality(np.array([]), np.array([])) is None
    assert optimality(np.array([0.0, 0.0]), np.array([0.0, 0.0])) is None  # wrong to begin with
    assert optimality(np.full(3, np.inf), np.full(3, np.inf)) is None  # nothing fooled
    assert optimality(np.array([2.0, 2.0]), np.array([2.0, 2.0])) is None  # nothing to be better at
