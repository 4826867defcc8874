"""Tests that may be looked at after every item: how often they err, what they find, and what they refuse."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray
from synthetic_studies import POINTS, study

from evals.report.words import summary
from evals.results.outcomes import Outcomes
from evals.study.analysis import analyse, is_settled
from evals.study.sequential import (
    compare_drawn,
    differences_drawn,
    draw_order,
    interval,
    log_evidence,
    looks,
    p_different,
    p_value_drawn,
    p_within,
)
from evals.study.study import Score, StoppingRule, Study

RUNS, ITEMS = 2000, 240
MARGIN = 0.1


def right_or_wrong(mean: float, changed: float, seed: int, items: int = ITEMS) -> NDArray[np.float64]:
    """Differences of right-or-wrong outcomes `[RUNS, items]`, of which a share changed, with this mean."""
    rng = np.random.default_rng(seed)
    return rng.choice([1.0, -1.0, 0.0], (RUNS, items), p=[(changed + mean) / 2, (changed - mean) / 2, 1 - changed])


def mcnemar(d: NDArray[np.float64]) -> NDArray[np.float64]:
    gained, lost = (d > 0).sum(-1), (d < 0).sum(-1)
    return np.minimum(2 * scipy.stats.binom.cdf(np.minimum(gained, lost), gained + lost, 0.5), 1)


@pytest.mark.parametrize("changed", [0.1, 0.5])
def test_equal_models_are_rarely_told_apart_however_often_one_looks(changed: float) -> None:
    d = right_or_wrong(0.0, changed, seed=0)
    on_the_way = 2 * p_different(d)  # after any item: p-values are of the largest wealth
    assert np.mean(np.minimum(on_the_way, 2 * mcnemar(d)) <= 0.05) <= 0.05
    # A set of items on which two models are equal, in random order.
    whole = np.concatenate([np.repeat([1.0, -1.0], round(changed * ITEMS / 2)), np.zeros(ITEMS)])[:ITEMS]
    shuffled = np.random.default_rng(1).permuted(np.tile(whole, (RUNS, 1)), axis=1)
    assert np.mean(p_different(shuffled) <= 0.05) <= 0.05
    # What is wrong with an ordinary test at every look:
    ordinary = [mcnemar(d[:, : len(seen)]) <= 0.05 for seen in looks([("task", i) for i in range(ITEMS)])]
    assert np.mean(np.any(ordinary, axis=0)) > 0.07


def test_models_that_are_the_margin_apart_are_rarely_called_the_same() -> None:
    for mean in (MARGIN, -MARGIN):
        d = right_or_wrong(mean, 0.15, seed=2)
        assert np.mean(p_within(d, d, MARGIN) <= 0.05) <= 0.05
    same = right_or_wrong(0.0, 0.02, seed=3)
    assert np.mean(p_within(same, same, MARGIN) <= 0.05) > 0.8


def test_intervals_hold_at_all_numbers_of_items_at_once() -> None:
    d = right_or_wrong(0.2, 0.4, seed=4, items=100)
    threshold = math.log(2 / 0.05)  # of the interval's ends
    outside = (log_evidence(d, 0.2) >= threshold) | (log_evidence(-d, -0.2) >= threshold)
    assert np.mean(outside) <= 0.05
    ends = [interval(d[0, :count]) for count in (10, 30, 100)]
    assert all(a[0] <= b[0] <= 0.2 <= b[1] <= a[1] for a, b in itertools.pairwise(ends))
    assert log_evidence(d[0], ends[-1][0] - 1e-6) >= threshold > log_evidence(d[0], ends[-1][0] + 1e-6)


def test_evidence_is_the_wealth_of_bets() -> None:
    d = np.random.default_rng(5).uniform(-1, 1, (3, 40)) + 0.0
    shares = np.geomspace(0.03, 0.9, 8)
    for bound in (-0.3, 0.0, 0.2):
        wealth = np.ones((3, 8))
        most = np.zeros(3)
        for item in d.T:
            wealth *= 1 + shares * ((item[:, None] - bound) / (1 + bound))
            most = np.maximum(most, np.log(wealth.mean(1)))
        np.testing.assert_allclose(log_evidence(d, bound), most, atol=1e-12)
    assert (log_evidence(d, -0.3) >= log_evidence(d, 0.2)).all()
    with pytest.raises(ValueError, match="outside of -1 to 1"):
        log_evidence([0.0, 1.5], 0.0)
    with pytest.raises(ValueError, match="outside of -1 to 1"):
        log_evidence([0.0, math.nan], 0.0)


def test_the_order_is_random_and_the_same_for_every_subset() -> None:
    keys = [(task, i) for task in ("a", "b") for i in range(300)]
    order = draw_order(keys)
    assert sorted(order) == sorted(keys)
    assert order == draw_order(reversed(keys))
    assert draw_order(order[:50]) == order[:50]
    positions = [i for task, i in order if task == "a"]
    assert abs(scipy.stats.spearmanr(positions, range(300)).statistic) < 0.2
    seen = list(looks(order))
    assert [len(one) for one in seen[:4]] == [16, 20, 25, 32]
    assert seen[-1] == order
    rare = [*(("a", i) for i in range(100)), ("b", 0), ("a", 100), ("a", 101)]
    assert [len(one) for one in looks(rare)] == [101, 103]
    assert list(looks(order[:3])) == [order[:3]]


def test_models_are_compared_on_the_items_that_both_have() -> None:
    keys = tuple(("task", i) for i in range(50))
    first = Outcomes(keys, np.ones(50))
    some = tuple(sorted(draw_order(keys)[:20]))
    second = Outcomes(some, np.zeros(20))
    assert differences_drawn(first, second).tolist() == [-1.0] * 20
    found = compare_drawn(first, second, 50)
    assert (found.difference, found.items, found.test) == (-1, 20, "betting, anytime-valid")
    assert found.low == pytest.approx(-1)
    assert -1 < found.high < 0
    assert found.p_value == p_value_drawn(first, second, 50)[0] < 1e-3
    whole, name = p_value_drawn(first, Outcomes(keys, np.zeros(50)), 50)  # with the test of a full run
    assert (whole, name) == (pytest.approx(4 * 0.5**50), "betting, anytime-valid, or at the end McNemar, exact")
    with pytest.raises(ValueError, match="not of the same items"):
        compare_drawn(second, first, 50)


def stopped(counts: dict[str, int], margin: float = 0.2) -> Study:
    """The study made to order as it is where pruned models stopped after so many items."""
    whole = study()
    rule = StoppingRule(margin, 4, len(whole.benchmarks), {one.name: 400 for one in whole.benchmarks[:-1]})

    def some(score: Score, count: int) -> Score:
        assert score.outcomes is not None
        return Score.of(score.outcomes.on(tuple(sorted(draw_order(score.outcomes.keys)[:count]))))

    benchmarks = [
        dataclasses.replace(
            one,
            measured={
                point: score if point == POINTS[0] else some(score, counts[one.name])
                for point, score in one.measured.items()
            },
        )
        if one.name in counts
        else one
        for one in whole.benchmarks
    ]
    return dataclasses.replace(whole, benchmarks=benchmarks, about={"until_decided": dataclasses.asdict(rule)})


def test_a_study_says_what_was_settled_by_how_many_items() -> None:
    made = stopped({"mmlu": 100, "steady": 150, "guessed": 20})
    found = analyse(made)
    by_name = {one.name: one for one in made.benchmarks}
    worst, same = found.row("mmlu", POINTS[-1]), found.row("steady", POINTS[1])
    early, in_full = found.row("guessed", POINTS[1]), found.row("wikitext", POINTS[1])
    assert worst is not None
    assert same is not None
    assert early is not None
    assert in_full is not None
    assert (worst.change, worst.measured.items) == ("worse", 100)
    assert (same.change, same.verdict, same.settled) == ("same", "above the baseline, within 0.2 of dense", True)
    assert same.from_dense is not None
    assert -0.2 < same.from_dense.low < 0 < same.from_dense.high < 0.2
    assert (early.change, early.settled, in_full.settled) == ("same", False, None)
    assert "too few items to tell from dense" in early.verdict
    for point in POINTS[1:]:  # what is settled on the way stays so when all tests are corrected together
        for name in ("mmlu", "steady", "rising", "guessed"):
            row = found.row(name, point)
            assert row is not None
            assert row.settled or not is_settled(made, by_name[name], point)
    assert is_settled(made, by_name["steady"], POINTS[1])
    assert not is_settled(made, by_name["guessed"], POINTS[1])
    words = " ".join(summary(made, found))
    asked = sum(row.measured.items for row in found.rows if row.settled is not None)
    assert f"{asked:,} of {6 * 5 * 400:,} items were asked" in words
    assert "Run in full, as what they measure has no bounds that stopping early needs: WikiText-2." in words
    assert ("ppm", "mmlu") not in found.trends  # of other items for each model
    assert ("ppm", "wikitext") in found.trends


def test_models_that_know_nothing_are_settled_at_the_baseline() -> None:
    made = stopped({}, margin=0.15)
    (guessed,) = (one for one in made.benchmarks if one.name == "guessed")
    row = analyse(made).row("guessed", POINTS[0])
    assert row is not None
    assert (row.relation, row.settled) == ("at", True)
    assert is_settled(made, guessed, POINTS[0])
    narrow = dataclasses.replace(made.stopping or StoppingRule(0, 0, 0, {}), margin=0.01)
    strict = dataclasses.replace(made, about={"until_decided": dataclasses.asdict(narrow)})
    assert not is_settled(strict, guessed, POINTS[0])
