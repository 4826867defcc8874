"""Stored results as tables and as data for `--json`."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from evals.results import Result, SettingResults
from evals.suites import SUITES


def results_table(stored: Sequence[SettingResults]) -> Table:
    """Headline metrics: a column for each model and setting, a row for each benchmark.

    In a row stand only numbers for the same items, task versions and few-shot examples; where these differ between
    models or runs, the benchmark has several rows.
    """
    table = Table()
    table.add_column("benchmark")
    table.add_column("metric")
    for column in column_names(stored):
        table.add_column(Text(column, overflow="fold"), justify="right")
    cells = [{_row(result): result for result in one.results} for one in stored]
    rows = sorted({row: result for column in cells for row, result in column.items()}.items(), key=_order)
    titles = [_title(result) for _, result in rows]
    for (row, result), title in zip(rows, titles, strict=True):
        if titles.count(title) > 1:
            title += f" [{result.data[:8]}]"
        values = (format_value(column[row]) if row in column else "" for column in cells)
        table.add_row(*map(Text, (title, result.metric.removesuffix(",none"), *values)))
    return table


def results_json(stored: Iterable[SettingResults]) -> list[dict[str, Any]]:
    """Everything that is stored but the items."""
    documents = []
    for one in stored:
        results = [dataclasses.asdict(dataclasses.replace(result, items=())) for result in one.results]
        for result in results:
            del result["items"]
        setting = dataclasses.asdict(one.setting) | {"digest": one.setting.digest}
        documents.append({"path": str(one.path), "setting": setting, "results": results})
    return documents


def format_value(result: Result) -> str:
    """The headline metric with its standard error."""
    spell = "{:.4f}".format if abs(result.value) <= 1 else "{:,.2f}".format if result.value < 1e6 else "{:.3e}".format
    return spell(result.value) + ("" if result.stderr is None else f" ± {spell(result.stderr)}")


def column_names(stored: Sequence[SettingResults]) -> list[str]:
    """The shortest names that tell the settings apart: label, with dtype, or the whole folder name."""
    choices = ([one.setting.label for one in stored], [f"{one.setting.label}.{one.setting.dtype}" for one in stored])
    return next((names for names in choices if len(set(names)) == len(names)), [one.path.name for one in stored])


def _row(result: Result) -> tuple[str, str, str]:
    return result.benchmark, result.metric, result.data


def _title(result: Result) -> str:
    notes = [f"{result.shots}-shot"] if result.shots != "0" else []
    notes += [] if result.limit is None else [f"first {result.limit:g}"]
    return result.title + (f" ({', '.join(notes)})" if notes else "")


def _order(row: tuple[tuple[str, str, str], Result]) -> tuple[int, str, str]:
    names = [benchmark.name for benchmark in SUITES["paper"].benchmarks]
    (benchmark, _, data), _ = row
    return names.index(benchmark) if benchmark in names else len(names), benchmark, data
