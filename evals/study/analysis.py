"""What a study says: tests, verdicts, trends."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from evals.results.outcomes import Outcomes
from evals.study.sequential import compare_drawn, differences_drawn, p_value_drawn, p_within
from evals.study.significance import (
    Comparison,
    Correlation,
    compare_paired,
    compare_published,
    correlate,
    holm,
    items_needed,
    p_value_paired,
    trend,
    trend_published,
)
from evals.study.study import Score, StudiedBenchmark, Study, Variant

ALPHA = 0.05


# The paper's pair: factual knowledge, and the choice of true statements.
KNOWLEDGE, TRUTHFULNESS = "mmlu", "truthfulqa_mc2"


GROUPS = ("fragile", "no difference found", "improving", "at the baseline", "below the baseline")


Relation = Literal["above", "at", "below"]


Change = Literal["worse", "same", "better"]


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
      from_baseline: the difference from the best no-knowledge baseline; None where there is none.
      p_above: of being no better than some baseline: the largest p-value of being better over all of them, corrected
        for the benchmarks of the model. That the best of them was found on the same items needs no further correction.
      p_below: of being no worse than some baseline, likewise.
      relation: "above" the baseline if significantly better than every no-knowledge baseline, "below" if significantly
        worse than every one, else "at" it.
      change: from the dense model.
      items_needed: how many items would show the smallest difference that matters (see
        `evals.study.significance.items_needed`) from the dense model, of that itself from the best no-knowledge
        baseline; None where outcomes of items are not known.
      verdict: relation and change in words.
      p_within: of a difference from dense as large as the margin of a benchmark that may stop early, or larger,
        corrected for all comparisons of the method with the dense model; None where it runs in full.
      p_at: of not lying within the margin of the no-knowledge baselines, corrected for all benchmarks; likewise.
      settled: whether change and relation are known, the margin told apart from "no difference found"; likewise.
    """

    benchmark: str
    point: Variant
    measured: Score
    from_dense: Comparison | None
    p_from_dense: float | None
    from_baseline: Comparison | None
    p_above: float | None
    p_below: float | None
    relation: Relation | None
    change: Change | None
    items_needed: int | None
    verdict: str
    p_within: float | None = None
    p_at: float | None = None
    settled: bool | None = None

    @property
    def is_within(self) -> bool:
        """Whether the difference from dense is known to be smaller than the margin."""
        return self.p_within is not None and self.p_within <= ALPHA

    @property
    def has_too_few_items(self) -> bool:
        """Whether no difference was found where `items_needed` says so little that it could have been missed."""
        if self.from_dense is not None:
            is_open = self.change == "same" and not self.is_within
        else:
            is_open = self.relation == "at" and not self.settled
        return is_open and self.items_needed is not None and self.measured.items < self.items_needed


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

    def row(self, benchmark: str, point: Variant) -> Row | None:
        """The row of a benchmark and a model, if that was measured."""
        return next((row for row in self.rows if (row.benchmark, row.point) == (benchmark, point)), None)


def analyse(study: Study) -> Analysis:
    """Compares every model with the dense one and with the no-knowledge baselines, and puts both together."""
    plain = [_compared(study, benchmark, point) for benchmark in study.benchmarks for point in study.points]
    rows = [row for row in plain if row is not None]
    by_name = {benchmark.name: benchmark for benchmark in study.benchmarks}
    from_dense: dict[int, float] = {}
    needed: dict[int, int | None] = {}
    for method in study.methods:
        compared = {i: row.from_dense for i, row in enumerate(rows) if row.point.method == method}
        p_values = {i: found.p_value for i, found in compared.items() if found is not None}
        from_dense |= _corrected(p_values)
        level = ALPHA / max(len(p_values), 1)
        for i in p_values:
            benchmark = by_name[rows[i].benchmark]
            needed[i] = _items_needed(benchmark, benchmark.measured[study.dense], rows[i].measured, level)
    of_dense = [i for i, row in enumerate(rows) if row.point == study.dense and row.from_baseline is not None]
    for i in of_dense:
        benchmark = by_name[rows[i].benchmark]
        if benchmark.best_baseline is not None:
            best = benchmark.best_baseline[1]
            needed[i] = _items_needed(benchmark, best, rows[i].measured, ALPHA / len(of_dense))
    above: dict[int, float] = {}
    below: dict[int, float] = {}
    for point in study.points:
        ours = [i for i, row in enumerate(rows) if row.point == point]
        above |= _corrected({i: rows[i].p_above for i in ours})
        below |= _corrected({i: rows[i].p_below for i in ours})
    relations: dict[str, Relation | None] = {}
    judged = []
    for i, row in enumerate(rows):
        benchmark = by_name[row.benchmark]
        row = dataclasses.replace(row, p_from_dense=from_dense.get(i), p_above=above.get(i), p_below=below.get(i))
        relation = _relation(row)
        if row.point == study.dense:
            relations[row.benchmark] = relation
        change = _change(benchmark, row)
        row = dataclasses.replace(row, relation=relation, change=change, items_needed=needed.get(i))
        if row.benchmark in _stopping_items(study):
            row = dataclasses.replace(row, settled=_is_settled(row))
        verdict = _verdict(study, row, relations.get(row.benchmark))
        judged.append(dataclasses.replace(row, verdict=verdict))
    return Analysis(
        judged,
        {(m, b.name): t for m in study.methods for b in study.benchmarks if (t := _trend(study, b, m)) is not None},
        {method: grouped(study, judged, method) for method in study.methods},
        {method: c for method in study.methods if (c := _correlation(study, method)) is not None},
    )


def is_settled(study: Study, benchmark: StudiedBenchmark, point: Variant) -> bool:
    """Whether the verdict on a model is settled by the items that there are, at the corrected level.

    As long as other verdicts are open, each of them counts (Bonferroni's correction); `analyse` finds at least as much.

    Args:
      study: with a rule for stopping early.
      benchmark: one that may stop early, with its baselines; the dense model was asked at least the same items.
      point: the model.
    """
    rule, row = study.stopping, _compared(study, benchmark, point)
    assert rule is not None
    assert row is not None
    p_from_dense = None if row.from_dense is None else row.from_dense.p_value * rule.comparisons
    p_above, p_below = (None if p is None else p * rule.benchmarks for p in (row.p_above, row.p_below))
    row = dataclasses.replace(row, p_from_dense=p_from_dense, p_above=p_above, p_below=p_below)
    return _is_settled(dataclasses.replace(row, change=_change(benchmark, row), relation=_relation(row)))


def _is_settled(row: Row) -> bool:
    return (row.change != "same" or row.is_within) and (row.relation != "at" or row.p_at is None or row.p_at <= ALPHA)


def retention(study: Study, analysis: Analysis, point: Variant) -> float | None:
    """How much of the dense model's distance from its baselines a model still has, 1 for all and 0 for none.

    The mean over the benchmarks on which the dense model is above the baseline, of (score - baseline) / (dense -
    baseline), with the best no-knowledge baseline, of perplexities on the logarithm. None where there is no such
    benchmark.
    """
    shares = []
    for benchmark in study.benchmarks:
        dense, row = analysis.row(benchmark.name, study.dense), analysis.row(benchmark.name, point)
        baseline = benchmark.best_baseline
        if dense is None or row is None or baseline is None or dense.relation != "above":
            continue
        spell = math.log if benchmark.is_perplexity else float
        low, high, own = (spell(one) for one in (baseline[1].value, dense.measured.value, row.measured.value))
        shares.append((own - low) / (high - low))
    return float(np.mean(shares)) if shares else None


def grouped(study: Study, rows: Iterable[Row], method: str) -> dict[str, list[str]]:
    """Which benchmarks were fragile and which robust under a method, as the data says.

    Where the dense model is significantly worse than every no-knowledge baseline, a benchmark is "below the baseline";
    where it cannot be told from them with so many items, it is "at the baseline". Otherwise it is "fragile" if some
    level is significantly worse than the dense model, "improving" if none is and some level is significantly better
    while above the baseline, and "no difference found" if no level differs. Where nothing can be tested, for want of
    baselines or standard errors, it is in no group.
    """
    groups: dict[str, list[str]] = {name: [] for name in GROUPS}
    rows = list(rows)
    for benchmark in study.benchmarks:
        ours = [row for row in rows if row.benchmark == benchmark.name]
        dense = next((row for row in ours if row.point == study.dense), None)
        pruned = [row for row in ours if row.point.method == method]
        changes = {row.change for row in pruned} - {None}
        if dense is None or dense.relation is None:
            if "worse" in changes:  # that needs no baseline
                groups["fragile"].append(benchmark.name)
        elif dense.relation != "above":
            groups[f"{dense.relation} the baseline"].append(benchmark.name)
        elif "worse" in changes:
            groups["fragile"].append(benchmark.name)
        elif any(row.change == "better" and row.relation == "above" for row in pruned):
            groups["improving"].append(benchmark.name)
        elif changes == {"same"}:
            groups["no difference found"].append(benchmark.name)
    return groups


def _compared(study: Study, benchmark: StudiedBenchmark, point: Variant) -> Row | None:
    if point not in benchmark.measured:
        return None
    measured = benchmark.measured[point]
    dense = benchmark.measured.get(study.dense)
    of = _stopping_items(study).get(benchmark.name)
    from_dense = None if dense is None or point == study.dense else compare(dense, measured, of)
    baseline = benchmark.best_baseline
    from_baseline = None if baseline is None else compare(baseline[1], measured, of)
    p_above, p_below = _one_sided(benchmark, measured, of)
    row = Row(benchmark.name, point, measured, from_dense, None, from_baseline, p_above, p_below, None, None, None, "")
    return row if of is None else _with_margin(study, benchmark, row)


def _with_margin(study: Study, benchmark: StudiedBenchmark, row: Row) -> Row:
    """The row of a benchmark that may stop early, with what is known of the margin."""
    rule, best, worst = study.stopping, benchmark.best_baseline, benchmark.worst_baseline
    assert rule is not None

    def p_value(lowest: Score, highest: Score, corrected_for: int) -> float:
        low, high, own = _outcomes(lowest, highest, row.measured)
        found = p_within(differences_drawn(low, own), differences_drawn(high, own), rule.margin)
        return min(float(found) * corrected_for, 1.0)

    dense = benchmark.measured.get(study.dense)
    if row.from_dense is not None and dense is not None:
        row = dataclasses.replace(row, p_within=p_value(dense, dense, rule.comparisons))
    if best is not None and worst is not None:
        lowest, highest = sorted((best[1], worst[1]), key=lambda score: score.value)
        row = dataclasses.replace(row, p_at=p_value(lowest, highest, rule.benchmarks))
    return row


def _stopping_items(study: Study) -> Mapping[str, int]:
    """Of each benchmark that may stop early how many items there are in all."""
    return {} if study.stopping is None else study.stopping.items


def _one_sided(
    benchmark: StudiedBenchmark, measured: Score, of: int | None = None
) -> tuple[float | None, float | None]:
    """The largest p-values of being better, and of being worse, than each no-knowledge baseline."""
    better, worse = [], []
    for baseline in benchmark.baselines.values():
        tested = _test(baseline, measured, of)
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


def compare(first: Score, second: Score, of: int | None = None) -> Comparison | None:
    """Compares two scores on the same items: item by item where their outcomes are known.

    Args:
      first: of the first model.
      second: of the second.
      of: how many items there are in all, of a benchmark that may stop early, the first model no sooner than the
        second; None where all were asked.

    Raises:
      ValueError: the outcomes are not of the same items.
    """
    if of is not None:
        one, other = _outcomes(first, second)
        return compare_drawn(one, other, of)
    a, b = first.outcomes, second.outcomes
    if a is not None and b is not None:
        _check_items(a, b)
        return compare_paired(a.values, b.values, a.weights)
    if first.stderr is None or second.stderr is None:
        return None
    return compare_published(first.value, first.stderr, second.value, second.stderr, second.items)


def _test(first: Score, second: Score, of: int | None) -> tuple[float, float] | None:
    """The difference and its p-value, as `compare` has them, without the interval."""
    if of is not None:
        a, b = _outcomes(first, second)
        return b.mean - a.on(b.keys).mean, p_value_drawn(a, b, of)[0]
    one, other = first.outcomes, second.outcomes
    if one is not None and other is not None:
        _check_items(one, other)
        return other.mean - one.mean, p_value_paired(one.values, other.values, one.weights)[0]
    found = compare(first, second)
    return None if found is None else (found.difference, found.p_value)


def _outcomes(*scores: Score) -> list[Outcomes]:
    """The outcomes of scores on a benchmark that may stop early, of which they are always known."""
    found = [score.outcomes for score in scores if score.outcomes is not None]
    assert len(found) == len(scores)
    return found


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


def _items_needed(benchmark: StudiedBenchmark, one: Score, other: Score, level: float) -> int | None:
    """Items that would tell two scores apart; of scores that can exceed 1 it is not known what difference matters."""
    first, second = one.outcomes, other.outcomes
    if first is None or second is None:
        return None
    first = first.on(second.keys)  # of a benchmark that stopped early
    if not benchmark.is_perplexity and max(first.values.max(), second.values.max()) > 1:
        return None
    weights = np.ones(first.values.size) if benchmark.is_perplexity and first.weights is None else first.weights
    return items_needed(first.values, second.values, weights, level=level)


def round_up(number: int) -> int:
    """A number of items to two digits, not below it."""
    unit = int(10 ** max(len(str(number)) - 2, 0))
    return -(-number // unit) * unit


def _verdict(study: Study, row: Row, dense: Relation | None) -> str:
    relation, change, is_dense = row.relation, row.change, row.point == study.dense
    moves = {"worse": "falling", "same": "holding", "better": "improving", None: "not tested against dense"}
    moved = moves[change]
    if change == "same" and row.is_within and study.stopping is not None:
        moved = f"within {study.stopping.margin:g} of dense"
    if row.has_too_few_items:
        moved = f"too few items to tell from dense: use {round_up(row.items_needed or 0):,}"
    if relation is None:
        return "no baseline to compare with" if is_dense else f"{moved} (no baseline to compare with)"
    if is_dense:
        return f"{relation} the baseline"
    if relation == "at" and change is not None:
        came = {("above", "worse"): "fallen to it", ("below", "better"): "risen to it"}
        if change == "same" and not row.has_too_few_items and not row.is_within:
            moved = "not distinguishable from dense"
        return f"at the baseline: {came.get((dense or 'at', change), moved)}"
    return f"{relation} the baseline, {moved}"


def _trend(study: Study, benchmark: StudiedBenchmark, method: str) -> Comparison | None:
    points = [point for point in study.of_method(method) if point in benchmark.measured]
    measured = [benchmark.measured[point] for point in points]
    removed = [point.removed for point in points]
    if len(set(removed)) < 3:
        return None
    outcomes = [one.outcomes for one in measured]
    known = [one for one in outcomes if one is not None]
    if len({one.keys for one in known}) > 1:  # some stopped sooner than others
        return None
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
