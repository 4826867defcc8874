"""Intervals, tests and corrections, against statsmodels and SciPy where they have them, and against simulation."""

import math

import numpy as np
import pytest
import scipy.stats
import statsmodels.api
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from evals.study.significance import (
    bootstrap_interval,
    compare_paired,
    compare_published,
    correlate,
    holm,
    items_needed,
    p_value_paired,
    trend,
)


def test_right_or_wrong_outcomes_are_compared_by_mcnemars_exact_test() -> None:
    rng = np.random.default_rng(0)
    for difference in (0.0, 0.1, 0.3):
        a = rng.random(80) < 0.5
        b = np.where(rng.random(80) < difference, True, a)
        found = compare_paired(a, b)
        table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
        assert found.p_value == pytest.approx(mcnemar(table, exact=True).pvalue)
        assert found.difference == pytest.approx(b.mean() - a.mean())
        assert found.low <= found.difference <= found.high
        assert found.items == 80


def test_other_outcomes_are_compared_by_the_paired_t_test() -> None:
    rng = np.random.default_rng(1)
    a = rng.random(50)
    b = a + rng.normal(0.05, 0.2, 50)
    assert compare_paired(a, b).p_value == pytest.approx(scipy.stats.ttest_rel(b, a).pvalue)


def test_ratios_are_compared_by_regression_through_the_origin() -> None:
    rng = np.random.default_rng(8)
    weights = rng.lognormal(6, 1, 30)
    a, d = rng.normal(0, weights), rng.normal(0.2 * weights, weights)
    found = compare_paired(a, a + d, weights)
    fit = statsmodels.api.WLS(d, weights, weights=1 / weights).fit(cov_type="HC2")
    degrees = weights.sum() ** 2 / np.square(weights).sum() - 1
    assert found.difference == pytest.approx(fit.params[0])
    assert found.p_value == pytest.approx(2 * scipy.stats.t.sf(abs(fit.params[0] / fit.bse[0]), degrees))
    same = np.full(30, 7.0)
    assert compare_paired(a, a + d, same).p_value == pytest.approx(compare_paired(a, a + d).p_value)
    assert compare_paired([0.0] * 5, weights[:5] * 0.3, weights[:5]).p_value == pytest.approx(2 * 0.5**5)
    # Documents of every length are all worse: their lengths are no reason to doubt it, as they are for Student's t.
    lengths = np.array([400.0, 900, 1500, 2700, 5000])
    worse = lengths * np.array([0.48, 0.52, 0.5, 0.51, 0.49])
    assert compare_paired(np.zeros(5), worse, lengths).p_value < 0.01 < compare_paired(np.zeros(5), worse).p_value


def test_equal_models_do_not_differ() -> None:
    outcomes = np.random.default_rng(2).random(20)
    found = compare_paired(outcomes, outcomes)
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_a_constant_difference_has_a_p_value_that_items_can_bear() -> None:
    assert compare_paired([0.25], [0.75]).p_value == 1
    assert compare_paired([0.25] * 5, [0.75] * 5).p_value == pytest.approx(2 * 0.5**5)


@pytest.mark.parametrize("weighted", [False, True])
def test_intervals_hold_the_true_difference_as_often_as_they_say(weighted: bool) -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(400):
        if weighted:  # a ratio of sums over documents of very different lengths
            weights = rng.integers(20, 200, 120).astype(float)
            values = weights * rng.normal(0.3, 1.0, 120)
            low, high = bootstrap_interval(values, weights, iterations=1000, seed=trial)
            covered += low <= 0.3 <= high
        else:  # right or wrong: 30 % gained, 10 % lost
            values = rng.choice([1.0, -1.0, 0.0], 120, p=[0.3, 0.1, 0.6])
            low, high = bootstrap_interval(values, iterations=1000, seed=trial)
            covered += low <= 0.2 <= high
    # Of 400 intervals 95 % are 380, with a standard deviation of 4.4; percentile intervals are a little short.
    assert 364 <= covered <= 394, covered


def test_the_bootstrap_draws_items() -> None:
    """By counts of equal items, or one by one: the same distribution."""
    rng = np.random.default_rng(4)
    values = rng.choice([0.0, 1.0], 60, p=[0.7, 0.3])
    drawn = rng.choice(values, (20000, 60)).mean(1)
    low, high = bootstrap_interval(values, iterations=20000)
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=1 / 60)


def test_tests_keep_their_level() -> None:
    rng = np.random.default_rng(5)
    p_values = []
    for _ in range(500):
        a, b = rng.random((2, 100)) < 0.4
        p_values.append(compare_paired(a, b).p_value)
    assert np.mean(np.array(p_values) <= 0.05) <= 0.06  # exact tests of counts are conservative
    for items in (4, 40):  # documents, whose words are independent or go together
        for power in (0.5, 1):
            p_values = []
            for _ in range(2000):
                weights = rng.lognormal(6, 0.8, items)
                p_values.append(p_value_paired(np.zeros(items), weights**power * rng.normal(size=items), weights)[0])
            assert 0.01 < np.mean(np.array(p_values) <= 0.05) < 0.07


def test_holm_is_that_of_statsmodels() -> None:
    p_values = np.random.default_rng(6).random(12) ** 4
    np.testing.assert_allclose(holm(p_values), multipletests(p_values, method="holm")[1])
    assert holm([]).size == 0


def test_the_trend_is_the_slope_of_the_means_and_its_test_that_of_the_items() -> None:
    rng = np.random.default_rng(7)
    levels = np.array([0.0, 0.1, 0.2, 0.4])
    outcomes = (rng.random((4, 300)) < 0.6 - 0.5 * levels[:, None]).astype(float)
    found = trend(levels, outcomes)
    assert found.difference == pytest.approx(np.polyfit(levels, outcomes.mean(1), 1)[0])
    assert found.p_value < 0.01
    flat = trend(levels, rng.random((4, 300)))
    assert flat.low < 0 < flat.high
    with pytest.raises(ValueError, match="two different levels"):
        trend([0.1, 0.1], rng.random((2, 5)))


def test_published_values_are_compared_by_their_standard_errors() -> None:
    found = compare_published(0.1035, 0.0131, 0.1811, 0.0166, 541)
    z = (0.1811 - 0.1035) / math.hypot(0.0131, 0.0166)
    assert found.p_value == pytest.approx(2 * scipy.stats.norm.sf(z))
    assert found.high - found.low == pytest.approx(2 * 1.959964 * math.hypot(0.0131, 0.0166))
    assert compare_published(1.0, 0.0, 1.0, 0.0, 5).p_value == 1
    assert compare_published(1.0, 0.0, 0.5, 0.0, 5).p_value == 0


def test_correlation() -> None:
    rng = np.random.default_rng(8)
    a = rng.random(7)
    b = a + 0.3 * rng.random(7)
    found = correlate(a.tolist(), b.tolist())
    assert found is not None
    assert (found.r, found.p_value) == pytest.approx(tuple(scipy.stats.pearsonr(a, b)))
    z = np.arctanh(found.r) + np.array([-1.959964, 1.959964]) / math.sqrt(7 - 3)
    assert (found.low, found.high) == pytest.approx(tuple(np.tanh(z)), abs=1e-6)
    assert correlate([1, 2, 3], [3, 2, 1]) is None
    assert correlate([1, 1, 1, 1], [3, 2, 1, 0]) is None


def test_bad_outcomes_are_refused() -> None:
    for first, second in (([], []), ([1.0], [1.0, 2.0]), ([math.nan], [1.0])):
        with pytest.raises(ValueError, match=r"outcome"):
            compare_paired(first, second)


def test_as_many_items_as_are_needed_find_the_difference_that_often() -> None:
    """The formula against simulated studies: five points gained and none lost, and as many of both."""
    rng = np.random.default_rng(0)
    for gained, lost in ((0.05, 0.0), (0.15, 0.10)):
        pilot = rng.choice([1, -1, 0], size=20_000, p=[gained, lost, 1 - gained - lost])
        first, second = (pilot < 0).astype(float), (pilot > 0).astype(float)
        number = items_needed(first, second, level=0.01)
        found = 0
        for _ in range(400):
            drawn = rng.choice([1, -1, 0], size=number, p=[gained, lost, 1 - gained - lost])
            p_value, _ = p_value_paired((drawn < 0).astype(float), (drawn > 0).astype(float))
            found += p_value <= 0.01
        assert 0.7 <= found / 400 <= 0.95, (gained, lost, number, found)


def test_items_needed_grow_with_variance_and_with_comparisons() -> None:
    agree, flip = np.ones(10), np.array([1.0, 0] * 5)
    assert items_needed(agree, agree, level=0.05) == 524
    assert items_needed(agree, agree, level=0.05 / 24) == 1025
    assert items_needed(agree, flip, level=0.05) > 524
    words = np.array([100.0, 300, 200])
    exact = items_needed(words * 3.0, words * 3.1, words, level=0.05)  # every word costs the same more
    assert exact == 1
    assert items_needed(words * 3.0, words * 3.1 + [30, -30, 0], words, level=0.05) > exact
