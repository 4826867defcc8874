"""A study on the terminal."""

from collections.abc import Iterator, Sequence

import rich.table
from rich.console import Console
from rich.text import Text

from evals.report.files import study_json, to_json
from evals.report.tables import format_value
from evals.report.words import summary
from evals.study.analysis import Analysis, analyse
from evals.study.study import Study, Variant
from gluprune_jax.cli import terminal


def print_study(study: Study, *, as_json: bool) -> None:
    """The summary and the tables of scores and changes on standard output."""
    analysis = analyse(study)
    sentences = summary(study, analysis)
    if as_json:
        print(to_json(study_json(study, analysis, sentences)))
        return
    console = terminal.console()
    for method in study.methods:
        dense, *pruned = study.of_method(method)
        for table in _overviews(console, study, analysis, method, dense, pruned):
            console.print(table)
    console.print("↓ ↑ significantly worse or better than dense; ° not above the baseline", style="dim", markup=False)
    for sentence in sentences:
        console.print(f"- {sentence}", markup=False)


def _overviews(
    console: Console, study: Study, analysis: Analysis, method: str, dense: Variant, pruned: Sequence[Variant]
) -> Iterator[rich.table.Table]:
    """Scores of a method: beside each other, or below each other where the terminal is too narrow."""
    table = _overview(study, analysis, method, [dense, *pruned])
    wide = console.options.update(max_width=10_000)
    if len(pruned) < 2 or console.measure(table, options=wide).maximum <= console.width:
        yield table
        return
    half = len(pruned) // 2
    for part in (pruned[:half], pruned[half:]):
        yield from _overviews(console, study, analysis, method, dense, part)


def _overview(study: Study, analysis: Analysis, method: str, points: Sequence[Variant]) -> rich.table.Table:
    table = rich.table.Table(title=Text(method), title_justify="left")
    table.add_column("benchmark")
    for column in ("baseline", *(point.level for point in points)):
        table.add_column(Text(column), justify="right", no_wrap=True)
    for benchmark in study.benchmarks:
        cells = [Text(format_value(benchmark, benchmark.best_baseline[1].value) if benchmark.best_baseline else "")]
        for point in points:
            row = analysis.row(benchmark.name, point)
            if row is None:
                cells.append(Text(""))
                continue
            mark = {"worse": "↓", "better": "↑"}.get(row.change or "", " ")
            mark += "°" if row.relation in ("at", "below") else " "
            cells.append(Text(f"{format_value(benchmark, row.measured.value)}{mark}"))
        table.add_row(Text(benchmark.title), *cells)
    return table
