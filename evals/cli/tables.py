"""Stored results as tables and as data for `--json`."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from evals.harness.suites import SUITES
from evals.results.store import Result, SettingResults, load_items


def results_table(stored: Sequence[SettingResults]) -> Table:
    """Headline metrics: a column for each model and setting, a row for each benchmark.

    Dense models come first, then the chance level of accuracies (a uniform guess on the same items), then pruned
    models, each with its difference from the dense model that it was made of, where that is there too. In a row stand
    only numbers for the same items, task versions and few-shot examples; where these differ between models or runs,
    the benchmark has several rows.
    """
    names = column_names(stored)
    cells = [{_row(result): result for result in one.results} for one in stored]
    rows = sorted({row: result for column in cells for row, result in column.items()}.items(), key=_order)
    titles = [_title(result) for _, result in rows]
    chances = _chances(stored)
    dense = [i for i, one in enumerate(stored) if _is_dense(one)]
    pruned = [i for i in range(len(stored)) if i not in dense]
    origins = {i: _origin(stored[i], [(j, stored[j]) for j in dense]) for i in pruned}

    table = Table()
    table.add_column("benchmark")
    table.add_column("metric")
    shown = [*dense, *([None] if any(row in chances for row, _ in rows) else []), *pruned]
    for i in shown:
        table.add_column(Text("chance" if i is None else names[i], overflow="fold"), justify="right")
        if i is not None and origins.get(i) is not None:
            table.add_column("difference", justify="right")
    for (row, result), title in zip(rows, titles, strict=True):
        if titles.count(title) > 1:
            title += f" [{result.data[:8]}]"
        line = [title, result.metric.removesuffix(",none")]
        for i in shown:
            if i is None:
                line.append(f"{chances[row]:.4f}" if row in chances else "")
                continue
            own, origin = cells[i].get(row), origins.get(i)
            line.append("" if own is None else format_value(own))
            if origin is not None:
                line.append(_difference(own, cells[origin].get(row)))
        table.add_row(*map(Text, line))
    return table


def chance_level(result: Result, items: Sequence[Mapping[str, Any]]) -> float | None:
    """The expected accuracy of a uniform guess, from the number of choices of each item.

    None where there is no such thing: the headline is no accuracy, items have no choices to rank, or an outcome is
    neither right nor wrong (TruthfulQA MC2). All no-knowledge baselines of a benchmark need its data; a study has them.
    """
    if result.metric.partition(",")[0] not in ("acc", "acc_norm") or not items:
        return None
    choices = [len(item["responses"]) for item in items]
    if min(choices) < 2 or any(item["metrics"].get(result.metric) not in (0, 1) for item in items):
        return None
    return sum(1 / number for number in choices) / len(choices)


def _chances(stored: Sequence[SettingResults]) -> dict[tuple[str, str, str], float]:
    """The chance level of each row that has one; the choices of all its models are the same."""
    found: dict[tuple[str, str, str], float | None] = {}
    for one in stored:
        for result in one.results:
            if _row(result) not in found:
                found[_row(result)] = chance_level(result, result.items or load_items(one.path, result))
    return {row: value for row, value in found.items() if value is not None}


def _is_dense(one: SettingResults) -> bool:
    history = one.setting.about.get("history") or ()
    return one.setting.about.get("plan") is None and not any("criterion" in step for step in history)


def _origin(one: SettingResults, dense: Sequence[tuple[int, SettingResults]]) -> int | None:
    """The place of the dense model that a pruned one was made of, in the same dtype."""
    history = one.setting.about.get("history") or ()
    sources = {one.setting.about.get("model"), *(step.get("base_model") for step in history)} - {None}
    same = [i for i, other in dense if other.setting.about.get("model") in sources]
    return next((i for i, other in dense if i in same and other.setting.dtype == one.setting.dtype), None)


def _difference(own: Result | None, dense: Result | None) -> str:
    if own is None or dense is None:
        return ""
    difference = own.value - dense.value
    return f"{difference:+.4f}" if max(own.value, dense.value) <= 1 else f"{difference:+,.2f}"


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
    """The shortest names that tell the settings apart: label, with dtype, with date, or the whole folder name."""
    labels = [one.setting.label for one in stored]
    dtypes = [f"{one.setting.label}.{one.setting.dtype}" for one in stored]
    dates = [
        name if one.setting.date is None else f"{name} ({one.setting.date})"
        for name, one in zip(dtypes, stored, strict=True)
    ]
    choices = labels, dtypes, dates
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
