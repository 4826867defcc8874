"""A study: one model pruned by some methods to some sizes, with what each scores, and what it means.

`analyse` is the same for measurements of our own, which have the outcome of every item and are compared item by item,
and for published ones, of which only values and standard errors are known.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from evals.outcomes import Outcomes
from evals.significance import (
    Comparison,
    Correlation,
    compare_paired,
    compare_published,
    correlate,
    holm,
    p_value_paired,
    trend,
    trend_published,
)

ALPHA = 0.05
DENSE = "dense"

# The paper's pair: factual knowledge, and the choice of true statements.
KNOWLEDGE, TRUTHFULNESS = "mmlu", "truthfulqa_mc2"

GROUPS = ("fragile", "no difference found", "improving", "at the floor", "below the floor")

Relation = Literal["above", "at", "below"]
Change = Literal["worse", "same", "better"]


class Point(NamedTuple):
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


def name_point(point: Point) -> str:
    """A model in one string: "dense", "ppm, 20 %"."""
    return point.method if point.method == point.level else f"{point.method}, {point.level}"


@dataclasses.dataclass(frozen=True)
class Measured:
    """A score.

    Attributes:
      value: the headline metric.
      items: how many.
      stderr: of the value, of perplexities of their logarithm; None where it is not known.
      outcomes: of each item; None where only the value is known.
      text: how degenerate generated answers are, see `evals.degeneration`.
    """

    value: float
    items: int
    stderr: float | None = None
    outcomes: Outcomes | None = None
    text: Mapping[str, float] | None = None

    @classmethod
    def of(cls, outcomes: Outcomes, text: Mapping[str, float] | None = None) -> "Measured":
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
      floors: what responders that know nothing score.
    """

    name: str
    title: str
    metric: str
    higher_is_better: bool
    is_perplexity: bool
    measured: Mapping[Point, Measured]
    floors: Mapping[str, Measured]

    @property
    def floor(self) -> tuple[str, Measured] | None:
        """The responder that comes out best, and its score."""
        best = max if self.higher_is_better else min
        return best(self.floors.items(), key=lambda item: item[1].value, default=None)

    @property
    def lowest_floor(self) -> tuple[str, Measured] | None:
        """The responder that comes out worst: what lies between the two takes no knowledge either."""
        worst = min if self.higher_is_better else max
        return worst(self.floors.items(), key=lambda item: item[1].value, default=None)


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
    points: Sequence[Point]
    benchmarks: Sequence[StudiedBenchmark]
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, Sequence[Sequence[float]]] = dataclasses.field(default_factory=dict)
    efficiency: Mapping[str, Any] | None = None

    @property
    def dense(self) -> Point:
        """The model as it was."""
        return self.points[0]

    @property
    def methods(self) -> list[str]:
        """Those of the pruned models."""
        return list(dict.fromkeys(point.method for point in self.points if point.method != DENSE))

    def of_method(self, method: str) -> list[Point]:
        """The dense model and those of a method, from the largest to the smallest."""
        return sorted((p for p in self.points if p.method in (DENSE, method)), key=lambda point: point.removed)


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of a model on a benchmark.

    Differences are in the units of the metric; of perplexities they are in nats (differences of the logarithm).

    Attributes:
      benchmark: lm-eval's name.
      point: the model.
      measured: its score.
      from_dense: the difference from the dense model; None for itself, or where nothing can be tested.
      p_from_dense: corrected for all comparisons of the method with the dense model.
      from_floor: the difference from the best responder that knows nothing; None where there is none.
      p_above: of being no better than some responder: the largest p-value of being better over all of them, corrected
        for the benchmarks of the model. That the best of them was found on the same items needs no further correction.
      p_below: of being no worse than some responder, likewise.
      relation: "above" the floor if significantly better than every responder, "below" if significantly worse than
        every one, else "at" it.
      change: from the dense model.
      verdict: both in words.
    """

    benchmark: str
    point: Point
    measured: Measured
    from_dense: Comparison | None
    p_from_dense: float | None
    from_floor: Comparison | None
    p_above: float | None
    p_below: float | None
    relation: Relation | None
    change: Change | None
    verdict: str


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What a study says.

    Attributes:
      rows: by benchmark and model, in the study's order.
      trends: by method and benchmark: the change of the score for all neurons removed, by a straight line.
      groups: by method, the benchmarks in each of `GROUPS` (see `grouped`).
      correlations: by method, of knowledge with truthfulness over levels.
    """

    rows: Sequence[Row]
    trends: Mapping[tuple[str, str], Comparison]
    groups: Mapping[str, Mapping[str, Sequence[str]]]
    correlations: Mapping[str, Correlation]

    def row(self, benchmark: str, point: Point) -> Row | None:
        """The row of a benchmark and a model, if that was measured."""
        return next((row for row in self.rows if (row.benchmark, row.point) == (benchmark, point)), None)


def analyse(study: Study) -> Analysis:
    """Compares every model with the dense one and with the floor, and puts both together."""
    plain = [_compared(study, benchmark, point) for benchmark in study.benchmarks for point in study.points]
    rows = [row for row in plain if row is not None]
    from_dense: dict[int, float] = {}
    for method in study.methods:
        compared = {i: row.from_dense for i, row in enumerate(rows) if row.point.method == method}
        from_dense |= _corrected({i: found.p_value for i, found in compared.items() if found is not None})
    above: dict[int, float] = {}
    below: dict[int, float] = {}
    for point in study.points:
        ours = [i for i, row in enumerate(rows) if row.point == point]
        above |= _corrected({i: rows[i].p_above for i in ours})
        below |= _corrected({i: rows[i].p_below for i in ours})
    by_name = {benchmark.name: benchmark for benchmark in study.benchmarks}
    relations: dict[str, Relation | None] = {}
    judged = []
    for i, row in enumerate(rows):
        benchmark = by_name[row.benchmark]
        row = dataclasses.replace(row, p_from_dense=from_dense.get(i), p_above=above.get(i), p_below=below.get(i))
        relation = _relation(row)
        if row.point == study.dense:
            relations[row.benchmark] = relation
        change = _change(benchmark, row)
        verdict = _verdict(relation, change, relations.get(row.benchmark), is_dense=row.point == study.dense)
        judged.append(dataclasses.replace(row, relation=relation, change=change, verdict=verdict))
    return Analysis(
        judged,
        {(m, b.name): t for m in study.methods for b in study.benchmarks if (t := _trend(study, b, m)) is not None},
        {method: grouped(study, judged, method) for method in study.methods},
        {method: c for method in study.methods if (c := _correlation(study, method)) is not None},
    )


def retention(study: Study, analysis: Analysis, point: Point) -> float | None:
    """How much of what the dense model has above its floors a model still has, 1 for all and 0 for none.

    The mean over the benchmarks on which the dense model is above its floor, of (score - floor) / (dense - floor), the
    floor being the best responder that knows nothing, of perplexities on the logarithm. None where there is no such
    benchmark.
    """
    shares = []
    for benchmark in study.benchmarks:
        dense, row = analysis.row(benchmark.name, study.dense), analysis.row(benchmark.name, point)
        floor = benchmark.floor
        if dense is None or row is None or floor is None or dense.relation != "above":
            continue
        spell = math.log if benchmark.is_perplexity else float
        low, high, own = (spell(one) for one in (floor[1].value, dense.measured.value, row.measured.value))
        shares.append((own - low) / (high - low))
    return float(np.mean(shares)) if shares else None


def grouped(study: Study, rows: Iterable[Row], method: str) -> dict[str, list[str]]:
    """Which benchmarks were fragile and which robust under a method, as the data says.

    Where the dense model is significantly worse than every responder that knows nothing, a benchmark is "below the
    floor"; where it cannot be told from them with so many items, it is "at the floor". Otherwise it is "fragile" if
    some level is significantly worse than the dense model, "improving" if none is and some level is significantly
    better while above the floor, and "no difference found" if no level differs. Where nothing can be tested, for want
    of floors or standard errors, it is in no group.
    """
    groups: dict[str, list[str]] = {name: [] for name in GROUPS}
    rows = list(rows)
    for benchmark in study.benchmarks:
        ours = [row for row in rows if row.benchmark == benchmark.name]
        dense = next((row for row in ours if row.point == study.dense), None)
        pruned = [row for row in ours if row.point.method == method]
        changes = {row.change for row in pruned} - {None}
        if dense is None or dense.relation is None:
            if "worse" in changes:  # that needs no floor
                groups["fragile"].append(benchmark.name)
        elif dense.relation != "above":
            groups[f"{dense.relation} the floor"].append(benchmark.name)
        elif "worse" in changes:
            groups["fragile"].append(benchmark.name)
        elif any(row.change == "better" and row.relation == "above" for row in pruned):
            groups["improving"].append(benchmark.name)
        elif changes == {"same"}:
            groups["no difference found"].append(benchmark.name)
    return groups


def _compared(study: Study, benchmark: StudiedBenchmark, point: Point) -> Row | None:
    if point not in benchmark.measured:
        return None
    measured = benchmark.measured[point]
    dense = benchmark.measured.get(study.dense)
    from_dense = None if dense is None or point == study.dense else compare(dense, measured)
    floor = benchmark.floor
    from_floor = None if floor is None else compare(floor[1], measured)
    p_above, p_below = _one_sided(benchmark, measured)
    return Row(benchmark.name, point, measured, from_dense, None, from_floor, p_above, p_below, None, None, "")


def _one_sided(benchmark: StudiedBenchmark, measured: Measured) -> tuple[float | None, float | None]:
    """The largest p-values of being better, and of being worse, than each responder that knows nothing."""
    better, worse = [], []
    for floor in benchmark.floors.values():
        tested = _test(floor, measured)
        if tested is None:
            return None, None
        difference, p_value = tested
        is_better = _is_better(benchmark, difference)
        better.append(p_value if is_better and difference else 1.0)
        worse.append(p_value if not is_better and difference else 1.0)
    return (max(better), max(worse)) if better else (None, None)


def _corrected(p_values: Mapping[int, float | None]) -> dict[int, float]:
    """Corrected p-values of the tests that there are."""
    known = {i: p_value for i, p_value in p_values.items() if p_value is not None}
    return dict(zip(known, holm(list(known.values())).tolist(), strict=True))


def compare(first: Measured, second: Measured) -> Comparison | None:
    """Compares two scores on the same items: item by item where their outcomes are known.

    Raises:
      ValueError: the outcomes are not of the same items.
    """
    a, b = first.outcomes, second.outcomes
    if a is not None and b is not None:
        _check_items(a, b)
        return compare_paired(a.values, b.values, a.weights)
    if first.stderr is None or second.stderr is None:
        return None
    return compare_published(first.value, first.stderr, second.value, second.stderr, second.items)


def _test(first: Measured, second: Measured) -> tuple[float, float] | None:
    """The difference and its p-value, as `compare` has them, without the interval."""
    a, b = first.outcomes, second.outcomes
    if a is not None and b is not None:
        _check_items(a, b)
        return b.mean - a.mean, p_value_paired(a.values, b.values, a.weights)[0]
    found = compare(first, second)
    return None if found is None else (found.difference, found.p_value)


def _check_items(a: Outcomes, b: Outcomes) -> None:
    if a.keys != b.keys:
        raise ValueError("the outcomes are not of the same items")


def _relation(row: Row) -> Relation | None:
    if row.p_above is None or row.p_below is None:
        return None
    return "above" if row.p_above <= ALPHA else "below" if row.p_below <= ALPHA else "at"


def _change(benchmark: StudiedBenchmark, row: Row) -> Change | None:
    if row.from_dense is None or row.p_from_dense is None:
        return None
    if row.p_from_dense > ALPHA:
        return "same"
    return "better" if _is_better(benchmark, row.from_dense.difference) else "worse"


def _is_better(benchmark: StudiedBenchmark, difference: float) -> bool:
    return (difference > 0) == benchmark.higher_is_better


def _verdict(relation: Relation | None, change: Change | None, dense: Relation | None, *, is_dense: bool) -> str:
    moves = {"worse": "falling", "same": "holding", "better": "improving", None: "not tested against dense"}
    if relation is None:
        return "no floor to compare with" if is_dense else f"{moves[change]} (no floor to compare with)"
    if is_dense:
        return f"{relation} the floor"
    if relation == "at" and change is not None:
        came = {("above", "worse"): "fallen to it", ("below", "better"): "risen to it"}
        moved = came.get(
            (dense or "at", change), "not distinguishable from dense" if change == "same" else moves[change]
        )
        return f"at the floor: {moved}"
    return f"{relation} the floor, {moves[change]}"


def _trend(study: Study, benchmark: StudiedBenchmark, method: str) -> Comparison | None:
    points = [point for point in study.of_method(method) if point in benchmark.measured]
    measured = [benchmark.measured[point] for point in points]
    removed = [point.removed for point in points]
    if len(set(removed)) < 3:
        return None
    outcomes = [one.outcomes for one in measured]
    known = [one for one in outcomes if one is not None]
    if len(known) == len(points):
        return trend(removed, np.stack([one.values for one in known]), known[0].weights)
    stderrs = [one.stderr for one in measured]
    if all(stderr for stderr in stderrs):
        return trend_published(removed, [one.value for one in measured], [s or 0 for s in stderrs], measured[0].items)
    return None


def _correlation(study: Study, method: str) -> Correlation | None:
    found = {benchmark.name: benchmark.measured for benchmark in study.benchmarks}
    if not {KNOWLEDGE, TRUTHFULNESS} <= found.keys():
        return None
    points = [p for p in study.of_method(method) if p in found[KNOWLEDGE] and p in found[TRUTHFULNESS]]
    return correlate(*([found[name][point].value for point in points] for name in (KNOWLEDGE, TRUTHFULNESS)))
