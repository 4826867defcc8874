"""The files of a report: a page, figures, tables and everything as JSON."""

import dataclasses
import functools
import importlib.metadata
import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import vl_convert

from evals.report.drawing import drawings
from evals.report.figures import Figure, study_figures
from evals.report.tables import Table, row_json, study_tables
from evals.report.words import summary
from evals.results.store import make_folder
from evals.study.analysis import Analysis, analyse
from evals.study.significance import POWER, SMALLEST_DIFFERENCE
from evals.study.study import Study
from gluprune_jax.files.atomic import write_file_atomic

PAGE, DOCUMENT, FIGURES, TABLES = "report.html", "study.json", "figures", "tables"
FORMAT, VERSION = "gluprune-study", 2

# Names of figures and tables, which are replaced, or removed where a study has none.
KNOWN = {
    *("dichotomy", "fragile_robust", "perplexity", "knowledge_truthfulness", "kept", "quality_speed", "paper"),
    *("scores", "changes", "trends", "baselines", "groups", "correlations", "texts", "efficiency"),
    "floors",  # what the table of baselines was called
}

# What a sweep's file calls otherwise than a reader would.
_LABELS = {
    "weights": "checksums of the weights",
    "data_dir": "benchmark data",
    "floor": "least share of a layer kept",
    "shots": "few-shot examples",
    "slice": "sliced, not masked",
    "until_decided": "stops when decided",
}
_MOST_ROWS = 40  # of a table that the page shows unfolded


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
        for ending, drawn in drawings(figure.spec).items():
            write(f"{FIGURES}/{figure.name}.{ending}", drawn)
    for table in tables:
        write(f"{TABLES}/{table.name}.csv", table.to_csv().encode())
    write(DOCUMENT, to_json(study_json(study, analysis, sentences)).encode())
    write(PAGE, page(study, sentences, figures, tables).encode())
    for part, endings in ((FIGURES, (".svg", ".png")), (TABLES, (".csv", ".tex"))):  # of older reports
        for old in (folder / part).glob("*"):
            if old.suffix in endings and old.stem in KNOWN and old not in written:
                old.unlink()


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
                "baselines": {name: measured.value for name, measured in benchmark.baselines.items()},
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
        most_rows=_MOST_ROWS,
        power=POWER,
        smallest=SMALLEST_DIFFERENCE,
        bundle=markupsafe.Markup(_bundle()),
        specs=markupsafe.Markup(specs),
    )


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def _spell_about(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    shown = {name: value for name, value in about.items() if value not in (None, False)}
    return [(_LABELS.get(name, name.replace("_", " ")), _in_words(value)) for name, value in shown.items()]


def _in_words(value: Any) -> str:
    """A value of JSON as a reader would write it."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_in_words(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_in_words(one) for one in value if one is not None)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
