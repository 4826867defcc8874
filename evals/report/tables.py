"""The tables of a study, each as rows of values that every format spells for itself."""

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from evals.study.analysis import ALPHA, Analysis, Row, compare
from evals.study.paper import METHOD, paper_study, published
from evals.study.significance import Comparison, holm
from evals.study.study import Score, StudiedBenchmark, Study, Variant, name_variant

Cell = str | float | int | None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      name: of its files.
      title: one line.
      note: how to read it.
      columns: their titles.
      rows: values; None where there is none.
      formats: by column, how a number is spelled.
      definitions: of what stands in it.
      parts: what the page shows instead, of a table that is too wide for it.
    """

    name: str
    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    formats: Mapping[str, Callable[[float], str]] = dataclasses.field(default_factory=dict)
    definitions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parts: Sequence["Table"] = ()

    def texts(self) -> list[list[str]]:
        """The rows as they are shown."""
        return [
            [_spell(value, self.formats.get(column)) for column, value in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers alone."""
        values = [row[column] for row in self.rows if row[column] is not None]
        return bool(values) and all(isinstance(value, int | float) for value in values)

    def to_csv(self) -> str:
        """All values in full."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(["" if value is None else value for value in row] for row in self.rows)
        return file.getvalue()


def study_tables(study: Study, analysis: Analysis) -> list[Table]:
    """All tables that a study has something for."""
    tables = [
        scores(study),
        changes(study, analysis),
        trends(study, analysis),
        baselines(study),
        groups(study, analysis),
        correlations(analysis),
        texts(study),
        efficiency(study),
        against_paper(study),
    ]
    return [table for table in tables if table.rows]


def scores(study: Study) -> Table:
    """Every headline metric, with its standard error, and the range of the no-knowledge baselines."""
    note = "Headline metrics ± standard error; baseline: from the worst to the best no-knowledge baseline."
    if study.stopping is not None:
        note += " Models were asked different numbers of items, at most so many: what changed compares the same ones."
    whole = Table("scores", "Scores", note, *_scores(study, study.points, name_variant), {"items": "{:,.0f}".format})
    if len(study.methods) < 2:
        return whole
    parts = [
        dataclasses.replace(whole, title=method, columns=columns, rows=rows)
        for method in study.methods
        for columns, rows in [_scores(study, study.of_method(method), lambda point: point.level)]
    ]
    return dataclasses.replace(whole, parts=parts)


def _scores(
    study: Study, points: Sequence[Variant], name: Callable[[Variant], str]
) -> tuple[list[str], list[list[Cell]]]:
    rows: list[list[Cell]] = []
    for benchmark in study.benchmarks:
        best, worst = benchmark.best_baseline, benchmark.worst_baseline
        cells = [_with_error(benchmark, benchmark.measured.get(point)) for point in points]
        band = None
        if best and worst:
            ends = [format_value(benchmark, one[1].value) for one in (worst, best)]
            band = ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
        items = max((one.items for one in benchmark.measured.values()), default=0)
        rows.append([benchmark.title, benchmark.metric.removesuffix(",none"), items, *cells, band])
    return ["benchmark", "metric", "items", *map(name, points), "baseline"], rows


def changes(study: Study, analysis: Analysis) -> Table:
    """Each model against the dense one and the baseline."""
    rows: list[list[Cell]] = []
    titles = {benchmark.name: benchmark.title for benchmark in study.benchmarks}
    for row in analysis.rows:
        dense, baseline = row.from_dense, row.from_baseline
        stopped: list[Cell] = [] if study.stopping is None else [row.measured.items, _spell_settled(row)]
        rows.append(
            [
                titles[row.benchmark],
                name_variant(row.point),
                row.measured.value,
                *_comparison(dense, row.p_from_dense),
                None if baseline is None else baseline.difference,
                row.p_above,
                *stopped,
                row.verdict,
            ]
        )
    columns = [
        "benchmark",
        "model",
        "value",
        "difference from dense",
        "low",
        "high",
        "p",
        "p, corrected",
        "distance from baseline",
        "p of being above, corrected",
        *([] if study.stopping is None else ["items", "settled"]),
        "verdict",
    ]
    formats = dict.fromkeys(columns[3:6], format_difference) | {"distance from baseline": format_difference}
    formats |= dict.fromkeys(("p", "p, corrected", "p of being above, corrected"), format_p) | {"value": format_number}
    formats |= {"items": "{:,.0f}".format}
    has_items = any(one.outcomes is not None for benchmark in study.benchmarks for one in benchmark.measured.values())
    note = (
        "Differences are of the same items, with 95 % bootstrap intervals"
        if has_items
        else "Differences are tested as if models had answered different items, with 95 % normal intervals"
    )
    note += (
        "; of perplexities in nats (logarithms). "
        "p-values are corrected for the number of comparisons (Holm): with dense all of a method, with baselines all "
        "of a model. The distance is from the best no-knowledge baseline; being above is tested against every one."
    )
    if study.stopping is not None:
        note += (
            f" Of benchmarks that stop when their verdict is settled, p-values and intervals hold whenever one looks "
            f"(confidence sequences), and models less than {study.stopping.margin:g} apart are the same."
        )
    return Table("changes", "What changed", note, columns, rows, formats)


def _spell_settled(row: Row) -> str:
    return "in full" if row.settled is None else "yes" if row.settled else "no"


def trends(study: Study, analysis: Analysis) -> Table:
    """The slope of each benchmark over levels."""
    titles = {benchmark.name: benchmark.title for benchmark in study.benchmarks}
    rows: list[list[Cell]] = [
        [method, titles[name], found.difference, found.low, found.high, found.p_value, p_corrected, found.test]
        for ((method, name), found), p_corrected in zip(
            analysis.trends.items(), holm([found.p_value for found in analysis.trends.values()]).tolist(), strict=True
        )
    ]
    columns = ["method", "benchmark", "slope", "low", "high", "p", "p, corrected", "test"]
    formats = dict.fromkeys(columns[2:5], format_difference) | dict.fromkeys(columns[5:7], format_p)
    note = (
        "The change for all neurons removed, by a straight line over the levels; of perplexities in nats. p-values are "
        "corrected for the number of trends (Holm)."
    )
    return Table("trends", "Trends over levels", note, columns, rows, formats)


def baselines(study: Study) -> Table:
    """The score of each no-knowledge baseline."""
    rows: list[list[Cell]] = [
        [benchmark.title, rule, format_value(benchmark, measured.value)]
        for benchmark in study.benchmarks
        for rule, measured in benchmark.baselines.items()
    ]
    note = "What a model scores that knows nothing, on the same items, through the benchmark's own checker."
    return Table("baselines", "No-knowledge baselines", note, ["benchmark", "baseline", "score"], rows)


def groups(study: Study, analysis: Analysis) -> Table:
    """Fragile and robust benchmarks."""
    titles = {benchmark.name: benchmark.title for benchmark in study.benchmarks}
    rows: list[list[Cell]] = [
        [method, group, ", ".join(titles[name] for name in names) or "none"]
        for method, found in analysis.groups.items()
        for group, names in found.items()
    ]
    note = (
        "fragile: some level is significantly worse than the dense model; improving: none is, and some level is "
        "significantly better, above the baseline; no difference found: with so many items, which is no proof that "
        "there is none; at or below the baseline: the dense model is not above every no-knowledge baseline."
    )
    return Table("groups", "Fragile and robust", note, ["method", "group", "benchmarks"], rows)


def correlations(analysis: Analysis) -> Table:
    """Knowledge with truthfulness."""
    rows: list[list[Cell]] = [
        [method, found.r, found.low, found.high, found.p_value, found.points]
        for method, found in analysis.correlations.items()
    ]
    columns = ["method", "r", "low", "high", "p", "levels"]
    formats: dict[str, Callable[[float], str]] = dict.fromkeys(("r", "low", "high"), "{:+.3f}".format)
    note = "Pearson's r of MMLU with TruthfulQA MC2 over levels, with its 95 % interval, as if levels were independent."
    return Table("correlations", "Knowledge and truthfulness", note, columns, rows, formats | {"p": format_p})


def texts(study: Study) -> Table:
    """How degenerate generated text is."""
    rows: list[list[Cell]] = []
    names = ("words", "empty", "repetition", "distinct_2", "echo", "cut_off")
    for benchmark in study.benchmarks:
        for point in study.points:
            measured = benchmark.measured.get(point)
            if measured is not None and measured.text is not None:
                values = [measured.text.get(name) for name in names]
                shown = [None if value is None or math.isnan(value) else value for value in values]
                rows.append([benchmark.title, name_variant(point), *shown])
    columns = ["benchmark", "model", "median words", "empty", "repetition", "distinct 2-grams", "echo", "cut off"]
    share: Callable[[float], str] = "{:.1%}".format
    formats: dict[str, Callable[[float], str]] = {"median words": "{:.0f}".format} | dict.fromkeys(columns[3:], share)
    note = (
        "Of generated answers: repetition is the share of 4-grams of words that stood in the answer before, echo the "
        "share that the prompt has, cut off the share of answers as long as the task allows."
    )
    return Table("texts", "Generated text", note, columns, rows, formats)


def efficiency(study: Study) -> Table:
    """Latency, throughput, memory and energy, if they were measured."""
    rows: list[list[Cell]] = []
    report = study.efficiency or {"rows": [], "definitions": {}, "energy": {}, "devices": "", "dtype": ""}
    for row in report["rows"]:
        first, each = row["time_to_first_token"], row["time_per_output_token"]
        rows.append(
            [
                row["level"],
                row["width"],
                f"{row['workload']}, batch {row['batch']}",
                None if first is None else 1e3 * first["median"],
                None if each is None else 1e3 * each["median"],
                1e3 * row["latency"]["median"],
                row["prefill_tokens_per_second"],
                row["decode_tokens_per_second"],
                None if row["memory_bytes"] is None else row["memory_bytes"] / 1e6,
                row["flops_per_token"] / 1e6,
                row["bytes_per_token"] / 1e6,
                row["energy_per_token"],
                row["net_energy_per_token"],
            ]
        )
    columns = [
        "model",
        "width",
        "workload",
        "time to first token, ms",
        "time per output token, ms",
        "latency, ms",
        "prefill tokens/s",
        "decode tokens/s",
        "memory, MB",
        "MFLOPs per token",
        "MB per token",
        "J per token",
        "J per token, net",
    ]
    formats: dict[str, Callable[[float], str]] = dict.fromkeys(columns[3:], "{:,.1f}".format)
    formats |= {"width": "{:,}".format} | dict.fromkeys(columns[-2:], "{:.3f}".format)
    unavailable = report["energy"].get("unavailable")
    energy = f" Energy is not available: {unavailable}." if unavailable else ""
    note = f"On {report['devices']} in {report['dtype']}, medians.{energy}"
    return Table("efficiency", "Speed, memory and energy", note, columns, rows, formats, report["definitions"])


def against_paper(study: Study) -> Table:
    """Ours beside the published values, where they are of the same model."""
    theirs_all = same_model(study)
    rows: list[list[Cell]] = []
    for ours, theirs, benchmark in _common(study, theirs_all) if theirs_all else ():
        found = compare(theirs[1], ours[1])
        within = None if found is None else "not significantly different" if found.p_value > ALPHA else "different"
        difference = None if found is None else found.difference
        rows.append([benchmark.title, name_variant(ours[0]), ours[1].value, theirs[1].value, difference, within])
    columns = ["benchmark", "model", "ours", "published", "difference", "verdict"]
    formats = {"ours": format_number, "published": format_number, "difference": format_difference}
    note = "Published values with their standard errors, or binomial ones; tested as independent samples at 5 % each."
    return Table("paper", "Against the published values", note, columns, rows, formats)


def same_model(study: Study) -> Study | None:
    """The published study of the same model, if there is one and this is not it."""
    name = study.model.rstrip("/").split("/")[-1]
    return paper_study(name) if name in published()["models"] else None


def _common(
    study: Study, theirs: Study
) -> Iterable[tuple[tuple[Variant, Score], tuple[Variant, Score], StudiedBenchmark]]:
    known = {benchmark.name: benchmark.measured for benchmark in theirs.benchmarks}
    for benchmark in study.benchmarks:
        for point, measured in benchmark.measured.items():
            for other, value in known.get(benchmark.name, {}).items():
                is_same = point.method in (other.method, METHOD) and abs(point.removed - other.removed) < 1e-3
                if is_same and not benchmark.is_perplexity:
                    yield (point, measured), (other, value), benchmark


def format_value(benchmark: StudiedBenchmark, value: float) -> str:
    """A score as tables show it."""
    return format_number(value) if benchmark.is_perplexity else f"{value:.4f}"


def format_number(value: float) -> str:
    """Four digits behind the point, fewer for large numbers."""
    size = abs(value)
    return f"{value:.4f}" if size < 10 else f"{value:,.2f}" if size < 1e5 else f"{value:.2e}"


def format_difference(value: float) -> str:
    """With its sign."""
    return f"{value:+.4f}" if abs(value) < 10 else f"{value:+.2f}"


def format_p(value: float) -> str:
    """A p-value, never as zero."""
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def _with_error(benchmark: StudiedBenchmark, measured: Score | None) -> str | None:
    if measured is None:
        return None
    text = format_value(benchmark, measured.value)
    if measured.stderr is None:
        return text
    # Of perplexities the error is that of the logarithm; to first order it is relative.
    error = measured.stderr * (measured.value if benchmark.is_perplexity else 1)
    return f"{text} ± {format_value(benchmark, error)}"


def _comparison(found: Comparison | None, corrected: float | None) -> list[Cell]:
    if found is None:
        return [None] * 5
    return [found.difference, found.low, found.high, found.p_value, corrected]


def _spell(value: Cell, spelled: Callable[[float], str] | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return spelled(value) if spelled else str(value)


def row_json(row: Row) -> dict[str, Any]:
    """A row of the analysis as JSON, without the outcomes of items."""
    record = dataclasses.asdict(dataclasses.replace(row, measured=dataclasses.replace(row.measured, outcomes=None)))
    del record["measured"]["outcomes"]
    record["point"] = row.point._asdict()
    return record
