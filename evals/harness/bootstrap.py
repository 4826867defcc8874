"""Standard errors by resampling, with lm-eval's own random draws.

lm-eval estimates the standard error of a perplexity by drawing the documents anew 100,000 times, from Python's random
numbers with the seeds 0 to 99, in a pool of forked processes (which a process that holds JAX must not be). NumPy's
legacy generator, seeded alike, gives the same draws in blocks: the numbers agree with lm-eval's up to the order of
summation, and take a seventh of the time on one core.

For word perplexity and its relatives lm-eval gives no standard error. They are ratios of sums over documents, and get
theirs here in the same way.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ITERATIONS = 100_000  # lm-eval's default; 4 seconds for the 5,153 documents of LAMBADA

# For statistics that only lm-eval can compute, one draw at a time (F1, BLEU, ...). The standard error is then known
# to 2 %; a hundred times as many draws would give it to 0.2 %, and take minutes.
SLOW_ITERATIONS = 1000

_DRAWS_PER_SEED = 1000
_NUMBERS_AT_ONCE = 1 << 19

Statistic = Callable[[Sequence[Any]], float]
# From the sums `[draws]` of each column of the values, and the number of values, to the statistic.
_OfSums = Callable[[NDArray[np.float64], int], NDArray[np.float64]]

_OF_SUMS: dict[str, _OfSums] = {
    "perplexity": lambda sums, n: np.exp(-sums[0] / n),
    "weighted_perplexity": lambda sums, n: np.exp(-sums[0] / sums[1]),
    "bits_per_byte": lambda sums, n: -sums[0] / sums[1] / math.log(2),
}


def bootstrap_stderr(statistic: Statistic, values: Sequence[Any], iterations: int = ITERATIONS) -> float:
    """The standard error of a statistic: its standard deviation over sets of documents drawn with replacement.

    Args:
      statistic: an aggregation of lm-eval, which is known by its name.
      values: one for each document, at least two.
      iterations: how often to draw; rounded down to whole thousands if more than one thousand, as lm-eval does. At
        most `SLOW_ITERATIONS` for statistics that are not computed in blocks.
    """
    of_sums = _of_sums(statistic)
    if not of_sums:
        iterations = min(iterations, SLOW_ITERATIONS)
    per_seed = min(_DRAWS_PER_SEED, iterations)
    columns = np.atleast_2d(np.asarray(values, np.float64).T) if of_sums else np.zeros((1, 0))
    estimates: list[NDArray[np.float64]] = []
    for seed in range(iterations // per_seed):
        for drawn in _draws(seed, len(values), per_seed):
            if of_sums:
                estimates.append(of_sums(np.stack([column[drawn].sum(1) for column in columns]), len(values)))
            else:
                estimates.append(np.array([statistic([values[i] for i in row]) for row in drawn], np.float64))
    return float(np.concatenate(estimates).std(ddof=1))


@contextlib.contextmanager
def standard_errors() -> Iterator[None]:
    """While it is active, lm-eval's evaluations get the standard errors that come by resampling from here."""
    from lm_eval import evaluator_utils
    from lm_eval.api import metrics

    forking, known = metrics.bootstrap_stderr, evaluator_utils.stderr_for_metric

    def resampled(f: Statistic, xs: Sequence[Any], iters: int) -> float:
        return bootstrap_stderr(f, xs, iters)

    def stderr_for_metric(metric: Statistic, bootstrap_iters: int) -> Callable[[Sequence[Any]], float] | None:
        function: Callable[[Sequence[Any]], float] | None = known(metric=metric, bootstrap_iters=bootstrap_iters)
        if function is None and _of_sums(metric) and bootstrap_iters > 0:
            return lambda values: bootstrap_stderr(metric, values, bootstrap_iters)
        return function

    metrics.bootstrap_stderr = resampled
    evaluator_utils.stderr_for_metric = stderr_for_metric
    try:
        yield
    finally:
        metrics.bootstrap_stderr = forking
        evaluator_utils.stderr_for_metric = known


def _of_sums(statistic: Statistic) -> _OfSums | None:
    return _OF_SUMS.get(getattr(statistic, "__name__", ""))


def _draws(seed: int, count: int, rows: int) -> Iterator[NDArray[np.intp]]:
    """The indices that `random.Random(seed).choices` draws, `[some rows, count]` at a time."""
    random = np.random.RandomState([seed])
    at_once = max(1, _NUMBERS_AT_ONCE // count)
    for start in range(0, rows, at_once):
        uniform = random.random_sample((min(at_once, rows - start), count))
        yield (uniform * count).astype(np.intp)
