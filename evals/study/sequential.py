"""When a verdict is settled: tests that may be looked at after every item, and intervals that always hold.

Someone who looks at an ordinary p-value after every batch, and stops when it is small, finds differences where there
are none. Here a test is a bet (Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS B
86, 2024, arXiv 2010.09686): against the hypothesis that the mean of the differences `d` is at most `b`, wealth begins
at 1 and is multiplied by `1 + c (d - b) / (1 + b)` with every item, for differences from -1 to 1 and a bet `c` below 1.
If the hypothesis is true the wealth is a nonnegative supermartingale: that it ever reaches `1 / p` has at most the
probability `p` (Ville's inequality), however often one looks. The bets are a fixed mixture (their "diversified Kelly"
betting): nothing has to be tuned, and every batch can be of any size.

Items come in an order that is random but for a seed, so that those seen so far stand for all of their kind, as they do
in the tests of a full run (`evals.study.significance`). The verdict is about that kind of items, not about the set at
hand: sampling without replacement from a finite set would make every difference significant when the set is used up.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import scipy.special
from numpy.typing import ArrayLike, NDArray

from evals.results.outcomes import Outcomes
from evals.study.significance import CONFIDENCE, Comparison, p_value_paired

Key = tuple[str, int]

SEED = 0  # of the order of items
# The best bet grows with the difference over the variance: from differences of a percent to those of a half.
_BETS = np.geomspace(0.03, 0.9, 8)
_FIRST, _GROWTH = 16, 1.25  # items of the first look, and how many times as many each next one has
_HALVINGS = 30  # of the range of a mean, for the end of an interval


# ------------------------------------------------------------------------------------------------------------- items


def draw_order(keys: Iterable[Key]) -> list[Key]:
    """Items by task and position, in the random order of `SEED`: that of a hash, the same wherever it is computed."""
    return sorted(keys, key=lambda key: hashlib.sha256(f"{SEED} {key[0]} {key[1]}".encode()).digest())


def looks(order: Sequence[Key]) -> Iterator[Sequence[Key]]:
    """The items of each look: ever more of the same order, all of them at last.

    The first look has an item of every task, without which lm-eval computes no score of a group.
    """
    first_of_task: dict[str, int] = {}
    for number, (task, _) in enumerate(order):
        first_of_task.setdefault(task, number)
    count = max(_FIRST, 1 + max(first_of_task.values()))
    while count < len(order):
        yield order[:count]
        count = math.ceil(count * _GROWTH)
    yield order


# ------------------------------------------------------------------------------------------------------------- tests


def log_evidence(differences: ArrayLike, bound: float) -> NDArray[np.float64]:
    """The evidence so far that a mean is above a bound: the logarithm of the largest wealth, at least 0.

    Args:
      differences: `[..., N]`, of items in the order in which they came, from -1 to 1.
      bound: above -1 and below 1.

    Returns:
      `[...]` float64. `exp` of its negative is a p-value of the hypothesis that the mean is at most the bound.

    Raises:
      ValueError: a difference is outside of -1 to 1.
    """
    d = np.asarray(differences, np.float64)
    if not (np.abs(d) <= 1).all():
        raise ValueError("a difference of outcomes lies outside of -1 to 1")
    wealth = np.log1p(_BETS[:, None] * ((d - bound) / (1 + bound))[..., None, :]).cumsum(-1)
    mixed = scipy.special.logsumexp(wealth, axis=-2) - math.log(_BETS.size)
    evidence: NDArray[np.float64] = np.maximum(mixed.max(-1), 0)
    return evidence


def p_different(differences: ArrayLike) -> NDArray[np.float64]:
    """The p-value `[...]` of no difference, two-sided, whenever one looks. Arguments as for `log_evidence`."""
    d = np.asarray(differences, np.float64)
    p_value: NDArray[np.float64] = np.minimum(2 * np.exp(-np.maximum(log_evidence(d, 0), log_evidence(-d, 0))), 1)
    return p_value


def p_within(from_lowest: ArrayLike, from_highest: ArrayLike, margin: float) -> NDArray[np.float64]:
    """The p-value of a score that lies `margin` or more below the lowest of others or above the highest of them.

    The larger of two one-sided tests, neither of which needs to be corrected for the other.

    Args:
      from_lowest: differences `[..., N]` from the lowest, as for `log_evidence`.
      from_highest: from the highest; the same, where there is one other score.
      margin: above 0 and below 1.
    """
    above, below = log_evidence(from_lowest, -margin), log_evidence(-np.asarray(from_highest, np.float64), -margin)
    p_value: NDArray[np.float64] = np.exp(-np.minimum(above, below))
    return p_value


def interval(differences: ArrayLike, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Bounds of the mean of differences `[N]` that all hold at once, at every number of items, with this confidence."""
    d = np.asarray(differences, np.float64)
    return _lower(d, confidence), -_lower(-d, confidence)


def _lower(d: NDArray[np.float64], confidence: float) -> float:
    """The largest bound that the mean is above: evidence falls as the bound rises."""
    low, high = -1.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if log_evidence(d, middle) >= math.log(2 / (1 - confidence)):
            low = middle
        else:
            high = middle
    return low


# ------------------------------------------------------------------------------------------------------- comparisons


def differences_drawn(first: Outcomes, second: Outcomes) -> NDArray[np.float64]:
    """The differences, second minus first, of the items that the second has, in the order in which they were drawn.

    Raises:
      ValueError: the first lacks one of them.
    """
    a, b = (dict(zip(one.keys, one.values.tolist(), strict=True)) for one in (first, second))
    if not b.keys() <= a.keys():
        raise ValueError("the outcomes are not of the same items")
    return np.array([b[key] - a[key] for key in draw_order(b)], np.float64)


def p_value_drawn(first: Outcomes, second: Outcomes, of: int) -> tuple[float, str]:
    """The p-value of no difference, two-sided, of a benchmark that may have stopped early, and the name of the test.

    Half of the level is for looks on the way, the other half for the test of a full run once all items are there. So
    what the bets left open is tested as ever, and both together err as often as one test.

    Args:
      first: of the first model, at least on the items of the second.
      second: of the second.
      of: how many items there are in all.
    """
    p_value = float(p_different(differences_drawn(first, second)))
    if len(second.keys) < of:
        return min(2 * p_value, 1.0), "betting, anytime-valid"
    a = first.on(second.keys)
    at_the_end, name = p_value_paired(a.values, second.values)
    return min(2 * p_value, 2 * at_the_end, 1.0), f"betting, anytime-valid, or at the end {name}"


def compare_drawn(first: Outcomes, second: Outcomes, of: int) -> Comparison:
    """Compares two models on a benchmark that may have stopped early. Arguments as for `p_value_drawn`.

    Returns:
      The difference on the items of the second, with an interval that holds whenever one looks.
    """
    differences = differences_drawn(first, second)
    low, high = interval(differences)
    return Comparison(float(differences.mean()), low, high, *p_value_drawn(first, second, of), differences.size)
