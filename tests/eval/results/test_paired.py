from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import binom, multinomial

from orthattack.eval.results.paired import Paired, optimality
from orthattack.eval.results.rates import Rate

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
        assert -1 <= low <= paired.difference <= high <= 1
        assert low < high


@given(outcomes)
def test_swapping_the_two_turns_the_sign_and_keeps_p(pairs):
    first, second = columns(pairs)
    one, other = Paired.of(first, second), Paired.of(second, first)
    assert one.p == other.p
    if pairs:
        assert one.difference == pytest.approx(-other.difference)
        assert one.interval() == pytest.approx(tuple(-end for end in reversed(other.interval())))


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


@pytest.mark.parametrize(
    ("n", "first_only", "second_only", "expected"),
    [
        # Airway hyper-responsiveness before and after stem cell transplantation, and complete response before and after
        # consolidation, in Fagerland, Lydersen & Laake 2014, doi:10.1002/sim.6148.
        (21, 1, 7, (-0.517, -0.026)),
        (161, 6, 16, (-0.124, -0.005)),
    ],
)
def test_the_interval_is_that_of_published_examples(n, first_only, second_only, expected):
    assert Paired(n, 0, first_only, second_only).interval() == pytest.approx(expected, abs=5.1e-4)


def score(n, first_only, second_only, delta):
    """The statistic of a test that the difference is delta, its nuisance parameter by numerical maximum likelihood."""
    rest = n - first_only - second_only

    def minus_log_likelihood(q):
        return -(xlogy(first_only, q + delta) + xlogy(second_only, q) + xlogy(rest, 1 - delta - 2 * q))

    ends = max(0.0, -delta), (1 - delta) / 2
    inside = minimize_scalar(minus_log_likelihood, bounds=ends, method="bounded", options={"xatol": 1e-12}).x
    q = min((*ends, inside), key=minus_log_likelihood)
    variance = n * (2 * q + delta - delta**2)
    return (first_only - second_only - n * delta) / variance**0.5 if variance > 1e-15 else np.inf


@pytest.mark.parametrize(
    ("n", "first_only", "second_only"),
    [(4, 0, 0), (4, 1, 0), (4, 0, 3), (10, 3, 2), (10, 0, 0), (21, 1, 7), (50, 20, 1), (200, 30, 12), (1000, 5, 9)],
)
def test_the_interval_is_what_a_score_test_does_not_reject(n, first_only, second_only):
    low, high = Paired(n, 0, first_only, second_only).interval()
    for end, inward in ((low, 1e-4), (high, -1e-4)):
        assert abs(score(n, first_only, second_only, end + inward)) < 1.959964
        assert abs(score(n, first_only, second_only, end - inward)) > 1.959964


@pytest.mark.parametrize("n", [1, 4, 40])
def test_no_difference_on_few_images_says_little(n):
    """Like Wilson's interval of 0 of n, and never a point."""
    low, high = Paired(n, n, 0, 0).interval()
    assert high == pytest.approx(-low)
    assert high == pytest.approx(Rate(0, n).interval()[1])


def test_a_difference_on_every_image_reaches_the_end_and_is_no_point():
    for n in (1, 4, 30):
        low, high = Paired(n, 0, n, 0).interval()
        assert high == 1
        assert low < 1
        assert Paired(n, 0, 0, n).interval() == pytest.approx((-high, -low))


@pytest.mark.parametrize("n", [4, 10, 30])
def test_the_interval_covers_the_truth_as_often_as_it_says(n):
    """Exactly, over all tables of n images; of the bootstrap, in a tenth of the cases at the worst."""
    tables = [(a, b) for a in range(n + 1) for b in range(n + 1 - a)]
    intervals = np.array([Paired(n, 0, a, b).interval() for a, b in tables])
    counts = np.array([(a, b, n - a - b) for a, b in tables])
    covered = []
    for p, q in [(0.01, 0.01), (0.02, 0.0), (0.05, 0.02), (0.1, 0.0), (0.1, 0.1), (0.2, 0.1), (0.4, 0.3), (0.5, 0.0)]:
        chances = multinomial.pmf(counts, n, [p, q, 1 - p - q])
        inside = (intervals[:, 0] <= p - q + 1e-12) & (p - q - 1e-12 <= intervals[:, 1])
        covered.append(chances[inside].sum())
    assert min(covered) >= 0.93
    assert np.mean(covered) >= 0.95


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
    assert optimality(np.array([0.0, 0.0]), np.array([0.0, 0.0])) is None  # initially misclassified
    assert optimality(np.full(3, np.inf), np.full(3, np.inf)) is None  # nothing fooled
    assert optimality(np.array([2.0, 2.0]), np.array([2.0, 2.0])) is None  # nothing to be better at
