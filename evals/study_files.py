"""The folder of a study: what was measured so far, and how it becomes a `Study`.

    study/
      sweep.json      what is studied, and a row for each model that is finished
      floors.json     outcomes of responders that know nothing, on the same items
    results/      the results of every model, item by item (see `evals.results`)
    efficiency.json what `python -m evals.efficiency --output study` measured, if it did

The report stands beside them (see `evals.report`), and is made from them alone.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evals.degeneration import summarise
from evals.outcomes import PERPLEXITIES, Floor, Outcomes, outcomes_of_items
from evals.results import Result, load_items, load_result
from evals.setting import json_digest
from evals.study import DENSE, Measured, Point, StudiedBenchmark, Study, name_point
from gluprune_jax.atomic import write_file_atomic
from gluprune_jax.errors import OperationError, RequestError

SWEEP_FILE, FLOORS_FILE, RESULTS_FOLDER = "sweep.json", "floors.json", "results"
EFFICIENCY_FILE, EFFICIENCY_FORMAT = "efficiency.json", "gluprune-efficiency"
SWEEP_FORMAT, FLOORS_FORMAT, VERSION = "gluprune-sweep", "gluprune-floors", 1


def is_sweep_row(number: int, row: Any) -> bool:
    """Whether a row of a sweep's file could have been written there: the dense model's comes first."""
    kinds: Mapping[str, type | tuple[type, ...]] = {
        "method": str,
        "level": str,
        "removed": (int, float),
        "expansion_ratio": (int, float),
        "widths": list,
        "kept": list,
        "setting": str,
        "results": dict,
    }
    if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in kinds.items()):
        return False
    return bool((row["method"] == DENSE) == (number == 0))


def floors_of(document: Mapping[str, Any], data: Mapping[str, str]) -> str:
    """What floors are of: the study as its file says, without its rows, and the data of each benchmark."""
    return json_digest([{name: value for name, value in document.items() if name != "rows"}, dict(data)])


def save_floors(path: Path, floors: Mapping[str, tuple[str, Sequence[Floor]]], of: str) -> None:
    """Writes the floors of benchmarks, each with lm-eval's key of its metric, and what they are `of` (`floors_of`).

    Raises:
      OperationError: the disk refuses.
    """
    benchmarks = {}
    for name, (metric, found) in floors.items():
        responders = {
            floor.responder: {
                "values": floor.outcomes.values.tolist(),
                "weights": None if floor.outcomes.weights is None else floor.outcomes.weights.tolist(),
            }
            for floor in found
        }
        keys = found[0].outcomes.keys if found else ()
        benchmarks[name] = {"metric": metric, "keys": keys, "responders": responders}
    document = {"format": FLOORS_FORMAT, "version": VERSION, "of": of, "benchmarks": benchmarks}
    write_file_atomic(path, json.dumps(document).encode(), overwrite=True)


def has_floors(path: Path, of: str) -> bool:
    """Whether there is a file of floors `of` that."""
    return path.is_file() and bool(_load(path, FLOORS_FORMAT).get("of") == of)


def load_floors(path: Path) -> dict[str, dict[str, Outcomes]]:
    """The outcomes of every responder, by benchmark.

    Raises:
      OperationError: the file is not there or damaged.
    """
    document = _load(path, FLOORS_FORMAT)
    found: dict[str, dict[str, Outcomes]] = {}
    try:
        for name, about in document["benchmarks"].items():
            keys = tuple((str(task), int(number)) for task, number in about["keys"])
            is_perplexity = about["metric"].partition(",")[0] in PERPLEXITIES
            found[name] = {
                responder: Outcomes(
                    keys,
                    np.array(columns["values"], np.float64),
                    None if columns["weights"] is None else np.array(columns["weights"], np.float64),
                    is_perplexity,
                )
                for responder, columns in about["responders"].items()
            }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__} at {error}") from error
    return found


def load_study(folder: Path) -> Study:
    """Reads all that a sweep has finished.

    Raises:
      RequestError: the folder is of no study, or nothing is finished.
      OperationError: a file is damaged.
    """
    if not (folder / SWEEP_FILE).is_file():
        raise RequestError(
            f"{folder} is no folder of a study: it has no {SWEEP_FILE}; make one with python -m evals.sweep"
        )
    document = _load(folder / SWEEP_FILE, SWEEP_FORMAT)
    rows = document.get("rows")
    if not isinstance(rows, list) or not all(is_sweep_row(number, row) for number, row in enumerate(rows)):
        raise _damaged(folder / SWEEP_FILE, "a row is none")
    if not isinstance(document.get("model"), str):
        raise _damaged(folder / SWEEP_FILE, "it names no model")
    if not rows:
        raise RequestError(f"{folder / SWEEP_FILE}: no model is finished yet; run the sweep on")
    points = [Point(row["method"], row["level"], row["removed"], row["expansion_ratio"]) for row in rows]
    results: dict[str, dict[Point, tuple[Result, Measured]]] = {}
    for point, row in zip(points, rows, strict=True):
        for name, stem in row["results"].items():
            setting = folder / RESULTS_FOLDER / row["setting"]
            result = load_result(setting / f"{stem}.json")
            items = load_items(setting, result)
            texts = [item["text"] for item in items if "text" in item]
            measured = Measured.of(outcomes_of_items(items, result.metric), summarise(texts) if texts else None)
            results.setdefault(name, {})[point] = result, measured
    data = {name: _same_data(folder, name, found.values()) for name, found in results.items()}
    # Others, of an older study in this folder, are none of this one.
    path = folder / FLOORS_FILE
    floors = load_floors(path) if has_floors(path, floors_of(document, data)) else {}
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
                {responder: Measured.of(outcomes) for responder, outcomes in floors.get(name, {}).items()},
            )
        )
    about = {key: value for key, value in document.items() if key not in ("rows", "format", "version")}
    about["shots"] = {name: next(iter(found.values()))[0].shots for name, found in results.items()}
    kept = {name_point(point): row["kept"] for point, row in zip(points, rows, strict=True)}
    return Study(document["model"], points, benchmarks, about, kept, _efficiency(folder, document["model"]))


def _same_data(folder: Path, name: str, found: Iterable[tuple[Result, Measured]]) -> str:
    """The digest of a benchmark's data, which must be the same for all models: they are compared item by item."""
    digests = {result.data for result, _ in found}
    if len(digests) > 1:
        raise RequestError(
            f"{folder}: the models of this study answered different versions of {name}: its data, its few-shot "
            f"examples or its task changed between runs; move the folder away, and begin anew"
        )
    return digests.pop()


def _efficiency(folder: Path, model: str) -> dict[str, Any] | None:
    path = folder / EFFICIENCY_FILE
    if not path.is_file():
        return None
    report = _load(path, EFFICIENCY_FORMAT)
    if not isinstance(report.get("rows"), list) or not {"definitions", "energy", "devices", "dtype"} <= report.keys():
        raise _damaged(path, "it is not as evals.efficiency writes it")
    if report.get("model") != model:
        raise RequestError(f"{path} is of another model, {report.get('model')!r}; measure {model!r}, or move it away")
    return report


def _load(path: Path, kind: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(document, dict) or document.get("format") != kind:
        raise _damaged(path, f'it has no "format": "{kind}"')
    if document.get("version") != VERSION:
        raise RequestError(f"{path} has version {document.get('version')!r}; this program reads version {VERSION}")
    return document


def _damaged(path: Path, reason: str) -> OperationError:
    return OperationError(f"{path} is damaged: {reason}; move it away, and run the sweep again")
