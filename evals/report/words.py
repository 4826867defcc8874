"""What a study says, in plain sentences: every one follows from the analysis by a rule that stands here."""

from collections.abc import Iterator, Sequence

from evals.report.tables import format_p, format_value
from evals.study.analysis import KNOWLEDGE, TRUTHFULNESS, Analysis, Row, round_up
from evals.study.significance import POWER, SMALLEST_DIFFERENCE
from evals.study.study import Study, name_variant


def summary(study: Study, analysis: Analysis) -> list[str]:
    """A few sentences for each method, the most important first."""
    sentences = [*_of_stopping(study, analysis), *_of_few_items(study, analysis), *_of_dense(study, analysis)]
    for method in study.methods:
        sentences += _of_method(study, analysis, method)
    return sentences


def _of_stopping(study: Study, analysis: Analysis) -> Iterator[str]:
    """How many items the verdicts took, where benchmarks stop when theirs are settled."""
    rule = study.stopping
    rows = [row for row in analysis.rows if row.settled is not None]
    if rule is None or not rows:
        return
    asked, there_are = (sum(row.measured.items for row in rows), sum(rule.items[row.benchmark] for row in rows))
    titles = {benchmark.name: benchmark.title for benchmark in study.benchmarks}
    yield (
        f"Benchmarks stopped when their verdict was settled, {rule.margin:g} being the margin within which models are "
        f"the same: {asked:,} of {there_are:,} items were asked, over all models ({asked / there_are:.0%})."
    )
    if still_open := [row for row in rows if not row.settled]:
        each = [f"{titles[row.benchmark]} ({name_variant(row.point)})" for row in still_open]
        yield f"Not settled by all of the items: {_list(each)}."
    if in_full := [benchmark.title for benchmark in study.benchmarks if benchmark.name not in rule.items]:
        yield f"Run in full, as what they measure has no bounds that stopping early needs: {_list(in_full)}."


def _of_few_items(study: Study, analysis: Analysis) -> Iterator[str]:
    """How many items would be enough, where there are too few."""
    few = [row for row in analysis.rows if row.has_too_few_items]
    for comparison, rows in (
        ("the pruned models from the dense one", [row for row in few if row.point != study.dense]),
        ("the dense model from its no-knowledge baselines", [row for row in few if row.point == study.dense]),
    ):
        needed: dict[str, int] = {}
        for row in rows:
            needed[row.benchmark] = max(needed.get(row.benchmark, 0), row.items_needed or 0)
        titles = {benchmark.name: benchmark.title for benchmark in study.benchmarks}
        items = {row.benchmark: row.measured.items for row in rows}
        if needed:
            each = [f"{round_up(number):,} of {titles[name]} (now {items[name]:,})" for name, number in needed.items()]
            yield (
                f"Too few items to tell {comparison}: use {_list(each)}, or all there are; so many show a "
                f"difference of {SMALLEST_DIFFERENCE} (of perplexities {100 * SMALLEST_DIFFERENCE:.0f} %) with "
                f"{100 * POWER:.0f} % probability."
            )


def _of_dense(study: Study, analysis: Analysis) -> Iterator[str]:
    rows = [row for row in analysis.rows if row.point == study.dense]
    above = [row for row in rows if row.relation == "above"]
    tested = [row for row in rows if row.relation is not None]
    if tested:
        others = "; on the others it cannot be told from them, or is below" if len(above) < len(tested) else ""
        yield (
            f"The dense model is above every no-knowledge baseline on {len(above)} of {len(tested)} "
            f"benchmarks{_named(study, above)}{others}."
        )


def _of_method(study: Study, analysis: Analysis, method: str) -> Iterator[str]:
    pruned = [row for row in analysis.rows if row.point.method == method]
    groups = analysis.groups[method]
    titles = {benchmark.name: benchmark.title for benchmark in study.benchmarks}

    levels = [point.level for point in study.of_method(method)[1:]]
    if not levels:
        return
    spelled = {
        "fragile": "fragile",
        "no difference found": "no difference found",
        "improving": "improving above the baseline",
        "at the baseline": "at the no-knowledge baseline already when dense",
        "below the baseline": "below the no-knowledge baseline when dense",
    }
    parts = [f"{spelled[group]}: {_list([titles[name] for name in names])}" for group, names in groups.items() if names]
    if parts:
        yield f"Under {method} ({_range(levels)}), {'; '.join(parts)}."
    for benchmark in study.benchmarks:
        better = [
            row
            for row in pruned
            if row.benchmark == benchmark.name and row.change == "better" and row.relation in ("at", "below")
        ]
        if better and benchmark.best_baseline is not None:
            name, baseline = benchmark.best_baseline
            values = _list([format_value(benchmark, row.measured.value) for row in better])
            where = _list([row.point.level for row in better])
            yield (
                f"{benchmark.title} is significantly better than dense at {where} ({values}), but not above its "
                f"no-knowledge baseline: {name} scores {format_value(benchmark, baseline.value)}. "
                f"That is no evidence of an ability."
            )
    for name in dict.fromkeys(row.benchmark for row in pruned):
        fallen = [row.point.level for row in pruned if row.benchmark == name and row.verdict.endswith("fallen to it")]
        if fallen:
            yield f"{titles[name]} falls to its no-knowledge baseline at {_list(fallen)}."
        risen = [row.point.level for row in pruned if row.benchmark == name and row.verdict.endswith("risen to it")]
        if risen:
            yield f"{titles[name]} rises to its no-knowledge baseline from below at {_list(risen)}."
    found = analysis.correlations.get(method)
    if found is not None:
        ends = [
            (knowledge, truth)
            for point in study.of_method(method)
            if (knowledge := analysis.row(KNOWLEDGE, point)) and (truth := analysis.row(TRUTHFULNESS, point))
        ][-1]
        reading = ""
        if all(end.relation == "at" for end in ends):
            reading = (
                f" At {ends[0].point.level} both are at their no-knowledge baselines: it is the correlation of two "
                f"scores that approach chance."
            )
        yield (
            f"MMLU and TruthfulQA MC2 correlate over the {found.points} levels with r = {found.r:.3f} "
            f"(95 % interval {found.low:.2f} to {found.high:.2f}, {_equals(format_p(found.p_value))}, as if "
            f"levels were independent).{reading}"
        )


def _equals(p_value: str) -> str:
    return f"p < {p_value[1:]}" if p_value.startswith("<") else f"p = {p_value}"


def _range(levels: Sequence[str]) -> str:
    return levels[0] if len(levels) == 1 else f"{levels[0]} to {levels[-1]}"


def _named(study: Study, rows: Sequence[Row]) -> str:
    titles = {benchmark.name: benchmark.title for benchmark in study.benchmarks}
    return f" ({_list([titles[row.benchmark] for row in rows])})" if rows else ""


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
