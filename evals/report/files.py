"""The files of a report: a page, figures, tables and everything as JSON."""

import dataclasses
import functools
import importlib.metadata
import importlib.resources
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import rich.table
import vl_convert
from rich.console import Console
from rich.text import Text

from evals.report.figures import Figure, study_figures
from evals.report.tables import Table, row_json, spell_value, study_tables
from evals.report.words import summary
from evals.results import make_folder
from evals.study import Analysis, Point, Study, analyse
from gluprune_jax.atomic import write_file_atomic

PAGE, DOCUMENT, FIGURES, TABLES = "report.html", "study.json", "figures", "tables"
FORMAT, VERSION = "gluprune-study", 1

# Names of figures and tables, which are replaced, or removed where a study has none.
KNOWN = {
    *("dichotomy", "fragile_robust", "perplexity", "knowledge_truthfulness", "kept", "quality_speed", "paper"),
    *("scores", "changes", "trends", "floors", "groups", "correlations", "texts", "efficiency"),
}

_SCALE = 2  # pixels of a PNG for each of the figure's
_PRINT: dict[str, Any] = {
    "background": "white",
    "font": "sans-serif",
    "legend": {"orient": "bottom"},
    "axis": {"titleFontWeight": "normal"},
}


def write_report(study: Study, folder: Path) -> None:
    """Writes `report.html`, `study.json`, and `figures/` and `tables/` beside them, over those that are there.

    Raises:
      OperationError: the disk refuses.
    """
    analysis = analyse(study)
    tables, figures, sentences = study_tables(study, analysis), study_figures(study, analysis), summary(study, analysis)

    written = set()

    def write(name: str, data: bytes) -> None:
        make_folder((folder / name).parent)
        write_file_atomic(folder / name, data, overwrite=True)
        written.add(folder / name)

    for figure in figures:
        for ending, draw in (("svg", vl_convert.vegalite_to_svg), ("png", _png)):
            drawn = draw(figure.spec, config=_PRINT)
            write(f"{FIGURES}/{figure.name}.{ending}", drawn.encode() if isinstance(drawn, str) else drawn)
    for table in tables:
        write(f"{TABLES}/{table.name}.csv", table.to_csv().encode())
        write(f"{TABLES}/{table.name}.tex", table.to_latex().encode())
    write(DOCUMENT, to_json(study_json(study, analysis, sentences)).encode())
    write(PAGE, page(study, sentences, figures, tables).encode())
    for part, endings in ((FIGURES, (".svg", ".png")), (TABLES, (".csv", ".tex"))):  # of an older study
        for old in (folder / part).glob("*"):
            if old.suffix in endings and old.stem in KNOWN and old not in written:
                old.unlink()


def print_study(study: Study, *, as_json: bool) -> None:
    """The summary and the tables of scores and changes on standard output."""
    analysis = analyse(study)
    sentences = summary(study, analysis)
    if as_json:
        print(to_json(study_json(study, analysis, sentences)))
        return
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    for method in study.methods:
        dense, *pruned = study.of_method(method)
        for table in _overviews(console, study, analysis, method, dense, pruned):
            console.print(table)
    console.print("↓ ↑ significantly worse or better than dense; ° not above the floor", style="dim", markup=False)
    for sentence in sentences:
        console.print(f"- {sentence}", markup=False)


def _overviews(
    console: Console, study: Study, analysis: Analysis, method: str, dense: Point, pruned: Sequence[Point]
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


def _overview(study: Study, analysis: Analysis, method: str, points: Sequence[Point]) -> rich.table.Table:
    table = rich.table.Table(title=Text(method), title_justify="left")
    table.add_column("benchmark")
    for column in ("floor", *(point.level for point in points)):
        table.add_column(Text(column), justify="right", no_wrap=True)
    for benchmark in study.benchmarks:
        cells = [Text(spell_value(benchmark, benchmark.floor[1].value) if benchmark.floor else "")]
        for point in points:
            row = analysis.row(benchmark.name, point)
            if row is None:
                cells.append(Text(""))
                continue
            mark = {"worse": "↓", "better": "↑"}.get(row.change or "", " ")
            mark += "°" if row.relation in ("at", "below") else " "
            cells.append(Text(f"{spell_value(benchmark, row.measured.value)}{mark}"))
        table.add_row(Text(benchmark.title), *cells)
    return table


def to_json(document: Any) -> str:
    """A document as JSON, which has no infinite numbers: they are null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [finite(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(document), indent=1, allow_nan=False)


def study_json(study: Study, analysis: Analysis, sentences: Sequence[str]) -> dict[str, Any]:
    """Everything the report says, as JSON."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": study.model,
        "about": study.about,
        "summary": list(sentences),
        "points": [point._asdict() for point in study.points],
        "benchmarks": [
            {
                "name": benchmark.name,
                "title": benchmark.title,
                "metric": benchmark.metric,
                "higher_is_better": benchmark.higher_is_better,
                "floors": {name: measured.value for name, measured in benchmark.floors.items()},
            }
            for benchmark in study.benchmarks
        ],
        "rows": [row_json(row) for row in analysis.rows],
        "trends": [
            {"method": method, "benchmark": name, **dataclasses.asdict(found)}
            for (method, name), found in analysis.trends.items()
        ],
        "groups": analysis.groups,
        "efficiency": study.efficiency,
        "correlations": {method: dataclasses.asdict(found) for method, found in analysis.correlations.items()},
    }


def page(study: Study, sentences: Sequence[str], figures: Sequence[Figure], tables: Sequence[Table]) -> str:
    """The page, with everything it needs inside it."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(
        importlib.resources.files("evals.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    )
    # Without "<" no text in a script can end it.
    specs = json.dumps({figure.name: figure.spec for figure in figures}).replace("<", "\\u003c")
    return template.render(
        title=f"What pruning does to {study.model}",
        version=importlib.metadata.version("gluprune-jax"),
        sentences=sentences,
        figures=figures,
        tables=tables,
        about=_spell_about(study.about),
        bundle=markupsafe.Markup(_bundle()),
        specs=markupsafe.Markup(specs),
    )


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def _png(spec: dict[str, Any], config: dict[str, Any]) -> bytes:
    drawn: bytes = vl_convert.vegalite_to_png(spec, scale=_SCALE, config=config)
    return drawn


def _spell_about(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    shown = {name.replace("_", " "): value for name, value in about.items() if value not in (None, False)}
    return [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in shown.items()]
