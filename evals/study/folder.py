"""The folder of a study: what was measured so far, and how it becomes a `Study`.

    study/
      sweep.json      what is studied, and a row for each model that is finished
      floors.json     outcomes of the no-knowledge baselines, on the same items
    results/      the results of every model, item by item (see `evals.results.store`)
    efficiency.json what `python -m evals.efficiency --output study` measured, if it did

The report stands beside them (see `evals.report`), and is made from them alone.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evals.results.degeneration import summarise
from evals.results.outcomes import PERPLEXITIES, Outcomes, outcomes_of_items
from evals.results.store import Result, load_items, load_result
from evals.study.rows import method_name_now
from evals.study.study import DENSE, Baseline, Score, StudiedBenchmark, Study, Variant, name_variant
from gluprune_jax.errors import RequestError, shortened
from gluprune_jax.files.atomic import write_file_atomic
from gluprune_jax.files.records import (
    ANYTHING,
    NUMBER,
    SEAL,
    TEXT,
    WHOLE,
    Kind,
    check,
    check_seal,
    damaged,
    json_digest,
    list_of,
    optional,
    parse,
    problem,
    record_of,
    sealed,
    table_of,
)

# The baselines keep the file name and format of the first studies, which still load.
SWEEP_FILE, BASELINES_FILE, RESULTS_FOLDER = "sweep.json", "floors.json", "results"
EFFICIENCY_FILE, EFFICIENCY_FORMAT = "efficiency.json", "gluprune-efficiency"
SWEEP_FORMAT, BASELINES_FORMAT, VERSION = "gluprune-sweep", "gluprune-floors", 1

_REMEDY = "move it away, and run the sweep again"
_ROW = record_of(
    {
        "method": TEXT,
        "level": TEXT,
        "removed": NUMBER,
        "expansion_ratio": NUMBER,
        "widths": list_of(WHOLE),
        "kept": list_of(ANYTHING),
        "setting": TEXT,
        "results": table_of(TEXT),
    }
)
_ITEM = Kind(
    "a task and the number of an item",
    lambda value: isinstance(value, list) and len(value) == 2 and TEXT.holds(value[0]) and WHOLE.holds(value[1]),
)
_COLUMNS = record_of({"values": list_of(NUMBER), "weights": optional(list_of(NUMBER))})
_STOPPING = optional(record_of({"margin": NUMBER, "levels": WHOLE, "benchmarks": WHOLE, "items": table_of(WHOLE)}))
_BASELINES = record_of(
    {"benchmarks": table_of(record_of({"metric": TEXT, "keys": list_of(_ITEM), "responders": table_of(_COLUMNS)}))}
)


def is_sweep_row(number: int, row: Any) -> bool:
    """Whether a row of a sweep's file could have been written there: the dense model's comes first."""
    return _row_fault(number, row) is None


def _row_fault(number: int, row: Any) -> str | None:
    """What is wrong with a row, if anything is."""
    if fault := problem(row, _ROW, f"row {number + 1}"):
        return fault
    if (row["method"] == DENSE) != (number == 0):
        return f"row {number + 1} is of {row['method']!r}; the dense model has the first row, and only that"
    return None


def baselines_of(document: Mapping[str, Any], data: Mapping[str, str]) -> str:
    """What baselines are of: the study as its file says, without its rows, and the data of each benchmark.

    Of a study that stops when it is decided there is no data yet when baselines are needed: it is not looked at.
    """
    if document.get("until_decided") is not None:
        data = {}
    return json_digest([{name: value for name, value in document.items() if name != "rows"}, dict(data)])


def save_baselines(path: Path, baselines: Mapping[str, tuple[str, Sequence[Baseline]]], of: str) -> None:
    """Writes the no-knowledge baselines of benchmarks, with their metrics, and what they are `of` (see `baselines_of`).

    Raises:
      OperationError: the disk refuses.
    """
    benchmarks = {}
    for name, (metric, found) in baselines.items():
        by_rule = {
            baseline.name: {
                "values": baseline.outcomes.values.tolist(),
                "weights": None if baseline.outcomes.weights is None else baseline.outcomes.weights.tolist(),
            }
            for baseline in found
        }
        keys = found[0].outcomes.keys if found else ()
        benchmarks[name] = {"metric": metric, "keys": keys, "responders": by_rule}
    document = {"format": BASELINES_FORMAT, "version": VERSION, "of": of, "benchmarks": benchmarks}
    write_file_atomic(path, json.dumps(sealed(document)).encode(), overwrite=True)


def has_baselines(path: Path, of: str) -> bool:
    """Whether there is a file of baselines `of` that."""
    return path.is_file() and bool(_load(path, BASELINES_FORMAT).get("of") == of)


def load_baselines(path: Path) -> dict[str, dict[str, Outcomes]]:
    """The outcomes of every no-knowledge baseline, by benchmark.

    Raises:
      OperationError: the file is not there or damaged.
    """
    document = _load(path, BASELINES_FORMAT)
    check(document, _BASELINES, str(path), _REMEDY)
    found: dict[str, dict[str, Outcomes]] = {}
    for name, about in document["benchmarks"].items():
        keys = tuple((task, number) for task, number in about["keys"])
        for rule, columns in about["responders"].items():
            if {len(column) for column in columns.values() if column is not None} - {len(keys)}:
                reason = f"benchmarks.{name}.responders.{rule} has not one value for each of {len(keys)} keys"
                raise damaged(str(path), reason, _REMEDY)
        found[name] = {
            rule: Outcomes(
                keys,
                np.array(columns["values"], np.float64),
                None if columns["weights"] is None else np.array(columns["weights"], np.float64),
                about["metric"].partition(",")[0] in PERPLEXITIES,
            )
            for rule, columns in about["responders"].items()
        }
    return found


def load_study(folder: Path) -> Study:
    """Reads all that a sweep has finished.

    Raises:
      RequestError: the folder is of no study, or nothing is finished.
      OperationError: a file is damaged.
    """
    if not (folder / SWEEP_FILE).is_file():
        raise RequestError(f"{folder} is no folder of a study: it has no {SWEEP_FILE}; make one with gluprune sweep")
    document = _load(folder / SWEEP_FILE, SWEEP_FORMAT)
    rows = document.get("rows")
    faults = (
        (_row_fault(number, row) for number, row in enumerate(rows)) if isinstance(rows, list) else ["it has no rows"]
    )
    if fault := next((fault for fault in faults if fault), None):
        raise damaged(str(folder / SWEEP_FILE), fault, _REMEDY)
    if fault := problem(document.get("until_decided"), _STOPPING, "until_decided"):
        raise damaged(str(folder / SWEEP_FILE), fault, _REMEDY)
    stopping = (document.get("until_decided") or {}).get("items", {})
    if not isinstance(document.get("model"), str):
        raise damaged(str(folder / SWEEP_FILE), "it names no model", _REMEDY)
    if not rows:
        raise RequestError(f"{folder / SWEEP_FILE}: no model is finished yet; run the sweep on")
    points = [
        Variant(method_name_now(row["method"]), row["level"], row["removed"], row["expansion_ratio"]) for row in rows
    ]
    results: dict[str, dict[Variant, tuple[Result, Score]]] = {}
    answered: dict[tuple[str, str, int], tuple[str, str]] = {}  # the content of items, of which models had some each
    for point, row in zip(points, rows, strict=True):
        for name, stem in row["results"].items():
            setting = folder / RESULTS_FOLDER / row["setting"]
            result = load_result(setting / f"{stem}.json")
            items = load_items(setting, result)
            if name in stopping:
                _check_same_items(folder, name, items, answered)
            texts = [item["text"] for item in items if "text" in item]
            measured = Score.of(outcomes_of_items(items, result.metric), summarise(texts) if texts else None)
            results.setdefault(name, {})[point] = result, measured
    data = {name: _same_data(folder, name, found.values()) for name, found in results.items() if name not in stopping}
    # Others, of an older study in this folder, are none of this one.
    path = folder / BASELINES_FILE
    baselines = load_baselines(path) if has_baselines(path, baselines_of(document, data)) else {}
    benchmarks = []
    for name, found in results.items():
        result = next(iter(found.values()))[0]
        benchmarks.append(
            StudiedBenchmark(
                name,
                result.title,
                result.metric,
                result.higher_is_better,
                result.metric.partition(",")[0] in PERPLEXITIES,
                {point: measured for point, (_, measured) in found.items()},
                {rule: Score.of(outcomes) for rule, outcomes in baselines.get(name, {}).items()},
            )
        )
    about = {key: value for key, value in document.items() if key not in ("rows", "format", "version")}
    about["shots"] = {name: next(iter(found.values()))[0].shots for name, found in results.items()}
    kept = {name_variant(point): row["kept"] for point, row in zip(points, rows, strict=True)}
    return Study(document["model"], points, benchmarks, about, kept, _efficiency(folder, document["model"]))


def _same_data(folder: Path, name: str, found: Iterable[tuple[Result, Score]]) -> str:
    """The digest of a benchmark's data, which like its prompts must be the same for all models, compared by item."""
    results = [result for result, _ in found]
    digests = {result.data for result in results}
    if len(digests) > 1:
        raise _different_data(folder, name)
    if len({result.identity for result in results}) > 1:
        raise RequestError(
            f"{folder}: the models of this study were asked different prompts of {name}, as by a chat template that "
            f"wrote the dates of different days; move the folder away, and begin anew"
        )
    return digests.pop()


def _check_same_items(
    folder: Path, name: str, items: Iterable[Mapping[str, Any]], answered: dict[tuple[str, str, int], tuple[str, str]]
) -> None:
    """Makes sure that items are those that other models `answered`, as far as these did, and adds them."""
    for item in items:
        content = item["doc_hash"], item["target_hash"]
        if answered.setdefault((name, item["task"], item["doc_id"]), content) != content:
            raise _different_data(folder, name)


def _different_data(folder: Path, name: str) -> RequestError:
    return RequestError(
        f"{folder}: the models of this study answered different versions of {name}: its data, its few-shot examples or "
        f"its task changed between runs; move the folder away, and begin anew"
    )


def _efficiency(folder: Path, model: str) -> dict[str, Any] | None:
    path = folder / EFFICIENCY_FILE
    if not path.is_file():
        return None
    report = _load(path, EFFICIENCY_FORMAT)
    if not isinstance(report.get("rows"), list) or not {"definitions", "energy", "devices", "dtype"} <= report.keys():
        raise damaged(str(path), "it is not as evals.efficiency writes it", _REMEDY)
    if report.get("model") != model:
        raise RequestError(f"{path} is of another model, {report.get('model')!r}; measure {model!r}, or move it away")
    return report


def _load(path: Path, kind: str) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise damaged(str(path), f"it cannot be read: {error.strerror}", _REMEDY) from error
    document = parse(data, str(path), _REMEDY)
    if not isinstance(document, dict) or document.get("format") != kind:
        raise damaged(str(path), f'it has no "format": "{kind}"', _REMEDY)
    if document.get("version") != VERSION:
        raise RequestError(
            f"{path} has version {shortened(document.get('version'))}; this program reads version {VERSION}"
        )
    check_seal(document, str(path), _REMEDY)
    document.pop(SEAL, None)
    return document
