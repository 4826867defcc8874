"""Outcomes of items as numbers that can be compared: what a benchmark's headline metric is the mean of."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.results.store import Result
from gluprune_jax.errors import OperationError, RequestError

# Metrics that are exp of a mean negative log-likelihood. Differences are taken, and tested, on its logarithm.
PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity")
# Metrics that give each item a number from 0 to 1, whatever the model answers.
SHARES = (
    *("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em"),
    *("prompt_level_strict_acc", "prompt_level_loose_acc"),
)


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """One number for each item.

    Attributes:
      keys: task and position in its split, of each item, ascending.
      values: `[N]` float64; of perplexities negative log-likelihoods in nats.
      weights: `[N]`, what the sum is divided by, such as words; None where it is the number of items.
      is_perplexity: the metric is exp of the mean.
    """

    keys: tuple[tuple[str, int], ...]
    values: NDArray[np.float64]
    weights: NDArray[np.float64] | None = None
    is_perplexity: bool = False

    @classmethod
    def of(cls, by_item: Mapping[tuple[str, int], float]) -> "Outcomes":
        """Plain outcomes by task and position."""
        keys = tuple(sorted(by_item))
        return cls(keys, np.array([by_item[key] for key in keys], np.float64))

    def on(self, keys: tuple[tuple[str, int], ...]) -> "Outcomes":
        """Those of some of the items.

        Raises:
          KeyError: an item is not there.
        """
        if keys == self.keys:
            return self
        positions = {key: number for number, key in enumerate(self.keys)}
        rows = [positions[key] for key in keys]
        return dataclasses.replace(
            self, keys=keys, values=self.values[rows], weights=None if self.weights is None else self.weights[rows]
        )

    @property
    def mean(self) -> float:
        """The mean; of perplexities in nats."""
        return float(self.values.sum()) / float(self.values.size if self.weights is None else self.weights.sum())

    @property
    def value(self) -> float:
        """The metric."""
        if not self.is_perplexity:
            return self.mean
        try:
            return math.exp(self.mean)
        except OverflowError:
            return math.inf


def check_is_mean(result: Result) -> None:
    """Makes sure that a result's headline is the mean of its items' outcomes, which is what a study tests.

    Raises:
      RequestError: it is not.
      OperationError: an outcome is not a finite number.
    """
    outcomes = outcomes_of_items(result.items, result.metric)
    if not np.isfinite(outcomes.values).all():
        raise OperationError(f"{result.title}: the outcome of an item is not a finite number ({result.metric})")
    if not math.isclose(outcomes.value, result.value, rel_tol=1e-6, abs_tol=1e-9):
        raise RequestError(
            f"{result.title}: {result.metric} is {result.value:g}, and the mean over its items {outcomes.value:g}: a "
            f"study cannot test it; give the tasks of the group one by one"
        )


def outcomes_of_items(items: Iterable[Mapping[str, Any]], metric: str) -> Outcomes:
    """Outcomes of stored items (see `evals.harness.run`) under a metric.

    Args:
      items: at least one.
      metric: lm-eval's key, such as "acc_norm,none".

    Raises:
      RequestError: the metric is no mean over items.
    """
    by_item = {(item["task"], item["doc_id"]): item["metrics"].get(metric) for item in items}
    keys = tuple(sorted(by_item))
    found = [by_item[key] for key in keys]
    name = metric.partition(",")[0]
    if name in PERPLEXITIES:
        weighted = isinstance(found[0], list | tuple)
        pairs = np.array(found if weighted else [(value, 1.0) for value in found], np.float64)
        return Outcomes(keys, -pairs[:, 0], pairs[:, 1] if weighted else None, is_perplexity=True)
    if not all(isinstance(value, bool | int | float) for value in found):
        raise RequestError(f"the metric {metric} is no mean over items: a study cannot test it; leave its task out")
    return Outcomes(keys, np.array(found, np.float64))
