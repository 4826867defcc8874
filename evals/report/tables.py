"""The tables of a study, each as rows of values that every format spells for itself."""

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from evals.paper import METHOD, paper_study, published
from evals.significance import Comparison, holm
from evals.study import ALPHA, Analysis, Measured, Point, Row, StudiedBenchmark, Study, compare, name_point

Cell = str | float | int | None

_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "%&#_{}$"}
    | {"±": "$\\pm$", "<": "$<$", ">": "$>$", "\\": "\\textbackslash{}", "^": "\\^{}", "~": "\\~{}", "\n": " "}
)


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
    """

    name: str
    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    formats: Mapping[str, Callable[[float], str]] = dataclasses.field(default_factory=dict)

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

    def to_latex(self) -> str:
        """A tabular of the booktabs package."""
        align = "".join("r" if self.is_number(i) else "l" for i in range(len(self.columns)))
        lines = [" & ".join(text.translate(_LATEX) for text in row) + r" \\" for row in [self.columns, *self.texts()]]
        body = [rf"\begin{{tabular}}{{{align}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
        return "\n".join([f"% {self.title}: {self.note}".replace("\n", " "), *body, r"\end{tabular}", ""])


def study_tables(study: Study, analysis: Analysis) -> list[Table]:
    """All tables that a study has something for."""
    tables = [
        scores(study),
        changes(study, analysis),
        trends(study, analysis),
        floors(study),
        groups(study, analysis),
        correlations(analysis),
        texts(study),
        efficiency(study),
        against_paper(study),
    ]
    return [table for table in tables if table.rows]


def scores(study: Study) -> Table:
    """Every headline metric, with its standard error, and the floor."""
    rows: list[list[Cell]] = []
    for benchmark in study.benchmarks:
        floor = benchmark.floor
        cells = [_with_error(benchmark, benchmark.measured.get(point)) for point in study.points]
        lowest = benchmark.lowest_floor
        band = None
        if floor and lowest:
            ends = [spell_value(benchmark, one[1].value) for one in (lowest, floor)]
            band = ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
        items = max((one.items for one in benchmark.measured.values()), default=0)
        rows.append([benchmark.title, benchmark.metric.removesuffix(",none"), items, *cells, band])
    columns = ["benchmark", "metric", "items", *map(name_point, study.points), "floor"]
    note = "Headline metrics ± standard error; the floor is what responders that know nothing score, worst to best."
    return Table("scores", "Scores", note, columns, rows, {"items": "{:,.0f}".format})


def changes(study: Study, analysis: Analysis) -> Table:
    """Each model against the dense one and the floor."""
    rows: list[list[Cell]] = []
    titles = {benchmark.name: benchmark.title for benchmark in study.benchmarks}
    for row in analysis.rows:
        dense, floor = row.from_dense, row.from_floor
        rows.append(
            [
                titles[row.benchmark],
                name_point(row.point),
                row.measured.value,
                *_comparison(dense, row.p_from_dense),
                None if floor is None else floor.difference,
                row.p_above,
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
        "distance from floor",
        "p of being above, corrected",
        "verdict",
    ]
    formats = dict.fromkeys(columns[3:6], spell_difference) | {"distance from floor": spell_difference}
    formats |= dict.fromkeys(("p", "p, corrected", "p of being above, corrected"), spell_p) | {"value": spell_number}
    has_items = any(one.outcomes is not None for benchmark in study.benchmarks for one in benchmark.measured.values())
    note = (
        "Differences are of the same items, with 95 % bootstrap intervals"
        if has_items
        else "Differences are tested as if models had answered different items, with 95 % normal intervals"
    )
    note += (
        "; of perplexities in nats (logarithms). "
        "p-values are corrected for the number of comparisons (Holm): with dense all of a method, with floors all of a "
        "model. The distance is from the best responder that knows nothing; being above is tested against every one."
    )
    return Table("changes", "What changed", note, columns, rows, formats)


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
    formats = dict.fromkeys(columns[2:5], spell_difference) | dict.fromkeys(columns[5:7], spell_p)
    note = (
        "The change for all neurons removed, by a straight line over the levels; of perplexities in nats. p-values are "
        "corrected for the number of trends (Holm)."
    )
    return Table("trends", "Trends over levels", note, columns, rows, formats)


def floors(study: Study) -> Table:
    """What each responder that knows nothing scores."""
    rows: list[list[Cell]] = [
        [benchmark.title, responder, spell_value(benchmark, measured.value)]
        for benchmark in study.benchmarks
        for responder, measured in benchmark.floors.items()
    ]
    note = "Computed on the same items, through the benchmark's own checker."
    return Table("floors", "What takes no knowledge", note, ["benchmark", "responder", "score"], rows)


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
        "significantly better, above the floor; no difference found: with so many items, which is no proof that there "
        "is none; at or below the floor: the dense model is not above what takes no knowledge."
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
    return Table("correlations", "Knowledge and truthfulness", note, columns, rows, formats | {"p": spell_p})


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
                rows.append([benchmark.title, name_point(point), *shown])
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
    definitions = "; ".join(f"{name}: {text}" for name, text in report["definitions"].items())
    energy = f" Energy is not available: {unavailable}." if unavailable else ""
    note = f"On {report['devices']} in {report['dtype']}, medians.{energy} Definitions: {definitions}."
    return Table("efficiency", "Speed, memory and energy", note, columns, rows, formats)


def against_paper(study: Study) -> Table:
    """Ours beside the published values, where they are of the same model."""
    theirs_all = same_model(study)
    rows: list[list[Cell]] = []
    for ours, theirs, benchmark in _common(study, theirs_all) if theirs_all else ():
        found = compare(theirs[1], ours[1])
        within = None if found is None else "not significantly different" if found.p_value > ALPHA else "different"
        difference = None if found is None else found.difference
        rows.append([benchmark.title, name_point(ours[0]), ours[1].value, theirs[1].value, difference, within])
    columns = ["benchmark", "model", "ours", "published", "difference", "verdict"]
    formats = {"ours": spell_number, "published": spell_number, "difference": spell_difference}
    note = "Published values with their standard errors, or binomial ones; tested as independent samples at 5 % each."
    return Table("paper", "Against the published values", note, columns, rows, formats)


def same_model(study: Study) -> Study | None:
    """The published study of the same model, if there is one and this is not it."""
    name = study.model.rstrip("/").split("/")[-1]
    return paper_study(name) if name in published()["models"] else None


def _common(
    study: Study, theirs: Study
) -> Iterable[tuple[tuple[Point, Measured], tuple[Point, Measured], StudiedBenchmark]]:
    known = {benchmark.name: benchmark.measured for benchmark in theirs.benchmarks}
    for benchmark in study.benchmarks:
        for point, measured in benchmark.measured.items():
            for other, value in known.get(benchmark.name, {}).items():
                is_same = point.method in (other.method, METHOD) and abs(point.removed - other.removed) < 1e-3
                if is_same and not benchmark.is_perplexity:
                    yield (point, measured), (other, value), benchmark


def spell_value(benchmark: StudiedBenchmark, value: float) -> str:
    """A score as tables show it."""
    return spell_number(value) if benchmark.is_perplexity else f"{value:.4f}"


def spell_number(value: float) -> str:
    """Four digits behind the point, fewer for large numbers."""
    size = abs(value)
    return f"{value:.4f}" if size < 10 else f"{value:,.2f}" if size < 1e5 else f"{value:.2e}"


def spell_difference(value: float) -> str:
    """With its sign."""
    return f"{value:+.4f}" if abs(value) < 10 else f"{value:+.2f}"


def spell_p(value: float) -> str:
    """A p-value, never as zero."""
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def _with_error(benchmark: StudiedBenchmark, measured: Measured | None) -> str | None:
    if measured is None:
        return None
    text = spell_value(benchmark, measured.value)
    if measured.stderr is None:
        return text
    # Of perplexities the error is that of the logarithm; to first order it is relative.
    error = measured.stderr * (measured.value if benchmark.is_perplexity else 1)
    return f"{text} ± {spell_value(benchmark, error)}"


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
