"""What a study says, in plain sentences: every one follows from the analysis by a rule that stands here."""

from collections.abc import Iterator, Sequence

from evals.report.tables import spell_p, spell_value
from evals.study import KNOWLEDGE, TRUTHFULNESS, Analysis, Row, Study


def summary(study: Study, analysis: Analysis) -> list[str]:
    """A few sentences for each method, the most important first."""
    sentences = list(_of_dense(study, analysis))
    for method in study.methods:
        sentences += _of_method(study, analysis, method)
    return sentences


def _of_dense(study: Study, analysis: Analysis) -> Iterator[str]:
    rows = [row for row in analysis.rows if row.point == study.dense]
    above = [row for row in rows if row.relation == "above"]
    tested = [row for row in rows if row.relation is not None]
    if tested:
        others = "; on the others it is not distinguishable from them, or below" if len(above) < len(tested) else ""
        yield (
            f"The dense model is above what responders that know nothing score on {len(above)} of {len(tested)} "
            f"benchmarks with such a floor{_named(study, above)}{others}."
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
        "improving": "improving above the floor",
        "at the floor": "at the floor already when dense",
        "below the floor": "below the floor when dense",
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
        if better and benchmark.floor is not None:
            name, floor = benchmark.floor
            values = _list([spell_value(benchmark, row.measured.value) for row in better])
            where = _list([row.point.level for row in better])
            yield (
                f"{benchmark.title} is significantly better than dense at {where} ({values}), but not above its floor: "
                f"{name} scores {spell_value(benchmark, floor.value)}. That is no evidence of an ability."
            )
    for name in dict.fromkeys(row.benchmark for row in pruned):
        fallen = [row.point.level for row in pruned if row.benchmark == name and row.verdict.endswith("fallen to it")]
        if fallen:
            yield f"{titles[name]} falls to its floor at {_list(fallen)}."
        risen = [row.point.level for row in pruned if row.benchmark == name and row.verdict.endswith("risen to it")]
        if risen:
            yield f"{titles[name]} rises to its floor from below at {_list(risen)}."
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
                f" At {ends[0].point.level} both are at their floors: it is the correlation of two scores that "
                f"approach chance."
            )
        yield (
            f"MMLU and TruthfulQA MC2 correlate over the {found.points} levels with r = {found.r:.3f} "
            f"(95 % interval {found.low:.2f} to {found.high:.2f}, p = {spell_p(found.p_value)}, as if "
            f"levels were independent).{reading}"
        )


def _range(levels: Sequence[str]) -> str:
    return levels[0] if len(levels) == 1 else f"{levels[0]} to {levels[-1]}"


def _named(study: Study, rows: Sequence[Row]) -> str:
    titles = {benchmark.name: benchmark.title for benchmark in study.benchmarks}
    return f" ({_list([titles[row.benchmark] for row in rows])})" if rows else ""


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
