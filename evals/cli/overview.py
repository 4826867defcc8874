"""A comparison at a single size as two tables: perplexities with sample answers, and benchmarks with chance levels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

Report = Mapping[str, Any]
Row = Mapping[str, Any]
Value = Callable[[Row], float | None]
# The median of a value over the rows (the seeds) of a method.
Median = Callable[[str, Value], float | None]


def is_single_size(report: Report) -> bool:
    """Whether there is one pruned size, and all layers are pruned together."""
    return not report["by_layer"] and len({row["target"] for row in report["rows"] if row["target"] is not None}) == 1


def overview(report: Report, name: Callable[[str], str], median: Median) -> Iterator[Table]:
    """The tables of a comparison at a single size.

    Args:
      report: as `evals.compare` keeps it.
      name: how a method is called.
      median: see `Median`; None where no row of the method has the value.
    """
    rows = {row["method"]: row for row in reversed(report["rows"])}  # of several seeds the first, for what it answers
    order = list(dict.fromkeys(row["method"] for row in report["rows"]))
    (target,) = {row["target"] for row in report["rows"] if row["target"] is not None}
    texts, sample = list(report["evaluation"]["perplexity"]), report["evaluation"].get("sample")
    if texts or sample:
        yield _answers(texts, sample, target, order, rows, name, median)
    if any(row.get("benchmarks") for row in report["rows"]):
        yield _benchmarks(target, [m for m in order if rows[m].get("benchmarks")], rows, name, median)


def captions(report: Report, notes: Sequence[str]) -> Iterator[str]:
    """What the numbers of a comparison are of, in sentences.

    Args:
      report: as `evals.compare` keeps it.
      notes: of the loader, of which the one about quantised weights counts here.
    """
    yield from report["evaluation"]["perplexity"].values()
    if calibration := report.get("calibration"):
        yield f"calibrated on {calibration['tokens']:,} tokens of {', '.join(calibration['texts'])}"
    for note in notes:
        if "quantised" in note:
            yield f"all numbers are of these weights: {note}"


def _answers(
    texts: list[str],
    sample: Mapping[str, Any] | None,
    target: str,
    order: list[str],
    rows: Mapping[str, Row],
    name: Callable[[str], str],
    median: Median,
) -> Table:
    table = Table(title=Text(f"dense, and pruned to {target}"), title_justify="left")
    table.add_column("method")
    for text in texts:
        table.add_column(Text("token perplexity" + f" of {text}" * (len(texts) > 1)), justify="right")
        table.add_column("times dense", justify="right")
    if len(texts) > 1:
        table.add_column("worst text, times dense", justify="right")
    if sample is not None:
        table.add_column(Text(f"answer to: {sample['prompt']}"), overflow="fold", max_width=60)
    for method in order:
        cells, ratios = [name(method)], []
        for text in texts:
            value = median(method, _perplexity_of(text))
            assert value is not None  # every model has been measured on every text
            ratios.append(value / rows["dense"]["perplexity"][text])
            cells += [f"{value:,.2f}", f"{ratios[-1]:,.2f}"]
        if len(texts) > 1:
            cells.append(f"{max(ratios):,.2f}")
        if sample is not None:
            cells.append(" ".join(rows[method].get("answer", "").split()))
        table.add_row(*map(Text, cells))
    return table


def _benchmarks(
    target: str,
    order: list[str],
    rows: Mapping[str, Row],
    name: Callable[[str], str],
    median: Median,
) -> Table:
    table = Table(title=Text(f"benchmarks, dense and pruned to {target}"), title_justify="left")
    table.add_column("benchmark")
    table.add_column("metric")
    for method in order:
        table.add_column(Text(name(method)), justify="right")
        if method == "dense":
            table.add_column("chance", justify="right")
    for title, about in rows["dense"]["benchmarks"].items():
        cells = [f"{title} ({about['items']} items)", about["metric"].removesuffix(",none")]
        for method in order:
            value = median(method, _score_of(title))
            stderr = rows[method]["benchmarks"].get(title, {}).get("stderr")
            spelled = "" if value is None else f"{value:.4f}" if abs(value) <= 1 else f"{value:,.2f}"
            cells.append(spelled + (f" ± {stderr:.4f}" if value is not None and isinstance(stderr, float) else ""))
            if method == "dense":
                cells.append("" if about.get("chance") is None else f"{about['chance']:.4f}")
        table.add_row(*map(Text, cells))
    return table


def _perplexity_of(text: str) -> Value:
    return lambda row: row["perplexity"].get(text)


def _score_of(title: str) -> Value:
    return lambda row: row.get("benchmarks", {}).get(title, {}).get("value")
