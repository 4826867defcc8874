"""A study: one model pruned by some methods to some sizes, with what each scores, and what it means.

`analyse` is the same for measurements of our own, which have the outcome of every item and are compared item by item,
and for published ones, of which only values and standard errors are known.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from evals.results.outcomes import Outcomes

DENSE = "dense"
MARGIN = 0.05  # of a score: models that differ by less are the same, in a study that stops when it is decided


class Variant(NamedTuple):
    """One model of a study.

    Attributes:
      method: how it was pruned; `DENSE` for the model as it was.
      level: the size as tables show it, such as "20 %"; `DENSE` too.
      removed: share of the MLP neurons that is gone, 0 to 1.
      expansion_ratio: mean intermediate size over hidden size.
    """

    method: str
    level: str
    removed: float
    expansion_ratio: float


def name_variant(point: Variant) -> str:
    """A model in one string: "dense", "ppm, 20 %"."""
    return point.method if point.method == point.level else f"{point.method}, {point.level}"


@dataclasses.dataclass(frozen=True)
class Baseline:
    """One no-knowledge baseline of a benchmark.

    Attributes:
      name: says what it does, such as "a uniform guess".
      outcomes: its outcomes on the items.
    """

    name: str
    outcomes: Outcomes


@dataclasses.dataclass(frozen=True)
class Score:
    """A score.

    Attributes:
      value: the headline metric.
      items: how many.
      stderr: of the value, of perplexities of their logarithm; None where it is not known.
      outcomes: of each item; None where only the value is known.
      text: how degenerate generated answers are, see `evals.results.degeneration`.
    """

    value: float
    items: int
    stderr: float | None = None
    outcomes: Outcomes | None = None
    text: Mapping[str, float] | None = None

    @classmethod
    def of(cls, outcomes: Outcomes, text: Mapping[str, float] | None = None) -> "Score":
        """The mean of outcomes, with its standard error."""
        n = outcomes.values.size
        residuals = outcomes.values - outcomes.mean * (1.0 if outcomes.weights is None else outcomes.weights)
        scale = float(n if outcomes.weights is None else outcomes.weights.sum()) / n
        stderr = float(residuals.std(ddof=1)) / scale / math.sqrt(n) if n > 1 else None
        return cls(outcomes.value, n, stderr, outcomes, text)


@dataclasses.dataclass(frozen=True)
class StudiedBenchmark:
    """A benchmark on every model of a study.

    Attributes:
      name: lm-eval's.
      title: for tables.
      metric: lm-eval's key of the headline metric.
      higher_is_better: of the metric.
      is_perplexity: the metric is exp of a mean, and compared by its logarithm.
      measured: by model; a model may be missing.
      baselines: what each no-knowledge baseline scores, by its name.
    """

    name: str
    title: str
    metric: str
    higher_is_better: bool
    is_perplexity: bool
    measured: Mapping[Variant, Score]
    baselines: Mapping[str, Score]

    @property
    def best_baseline(self) -> tuple[str, Score] | None:
        """The no-knowledge baseline that scores best: its name and score."""
        best = max if self.higher_is_better else min
        return best(self.baselines.items(), key=lambda item: item[1].value, default=None)

    @property
    def worst_baseline(self) -> tuple[str, Score] | None:
        """The one that scores worst: a score between the two needs no knowledge either."""
        worst = min if self.higher_is_better else max
        return worst(self.baselines.items(), key=lambda item: item[1].value, default=None)


@dataclasses.dataclass(frozen=True)
class StoppingRule:
    """When a benchmark stops before all of its items were asked: when its verdict is settled.

    Attributes:
      margin: models whose scores differ by less are the same.
      levels: how many sizes each method is compared with the dense model at.
      benchmarks: how many benchmarks.
      items: of each benchmark that may stop, how many there are in all; others run in full.
    """

    margin: float
    levels: int
    benchmarks: int
    items: Mapping[str, int]

    @property
    def comparisons(self) -> int:
        """Of one method with the dense model, for which tests are corrected."""
        return max(self.levels, 1) * self.benchmarks


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that was measured.

    Attributes:
      model: its name.
      points: the models, the dense one first.
      benchmarks: in the order of tables.
      about: how it was measured, for the report.
      kept: shares of kept neurons `[L][bins]` by "method, level", for the picture of what was kept.
      efficiency: what `evals.efficiency` measured of the same model, if it did.
    """

    model: str
    points: Sequence[Variant]
    benchmarks: Sequence[StudiedBenchmark]
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, Sequence[Sequence[float]]] = dataclasses.field(default_factory=dict)
    efficiency: Mapping[str, Any] | None = None

    @property
    def dense(self) -> Variant:
        """The model as it was."""
        return self.points[0]

    @property
    def stopping(self) -> StoppingRule | None:
        """The rule by which its benchmarks stop early; None where all run in full."""
        rule = self.about.get("until_decided")
        return None if rule is None else StoppingRule(**rule)

    @property
    def methods(self) -> list[str]:
        """Those of the pruned models."""
        return list(dict.fromkeys(point.method for point in self.points if point.method != DENSE))

    def of_method(self, method: str) -> list[Variant]:
        """The dense model and those of a method, from the largest to the smallest."""
        return sorted((p for p in self.points if p.method in (DENSE, method)), key=lambda point: point.removed)
