"""The results store: a folder with one sub-folder for each model and setting.

    results/
      gluprune_results.json                     says what the folder is
      smollm2-135m-instruct.float32-e8662fbd/   a model and setting: readable name, start of the setting's digest
        setting.json                            what was evaluated and how
        responses.jsonl                         every answer of the model (see `evals.results.journal`)
        arc_challenge.0shot-1f2e3d4c.json       a benchmark's metrics, with standard errors
        arc_challenge.0shot-1f2e3d4c.items.jsonl    its outcomes, one line an item

The digest in a benchmark's name stands for the version of its tasks, its data and every prompt: results of another
version stand beside the old ones and never replace or join them. Of data sets nothing is kept but hashes.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.chat import parse_date
from evals.results.journal import Journal, cannot_write
from evals.results.setting import GIVEN, Setting
from gluprune_jax.errors import GlupruneError, OperationError, RequestError, shortened, unreadable
from gluprune_jax.files.atomic import check_no_address, write_file_atomic
from gluprune_jax.files.records import (
    FLAG,
    NUMBER,
    OBJECT,
    TEXT,
    WHOLE,
    check,
    check_seal,
    damaged,
    json_digest,
    list_of,
    optional,
    parse,
    record_of,
    sealed,
    table_of,
)
from gluprune_jax.parallel.distributed import broadcast_from_main, is_joined, is_main, synchronize_errors

RESULTS_FILE, SETTING_FILE, RESPONSES_FILE = "gluprune_results.json", "setting.json", "responses.jsonl"
VERSION = 1

_REMEDY = "move it away, and run the evaluation again"
_SETTING = record_of({"label": TEXT, "dtype": TEXT, "decides": OBJECT, "about": OBJECT, "digest": TEXT})
_VALUES = table_of(record_of({"value": optional(NUMBER), "stderr": optional(NUMBER)}))
_RESULT = record_of(
    {
        "benchmark": TEXT,
        "title": TEXT,
        "metric": TEXT,
        "higher_is_better": FLAG,
        "shots": TEXT,
        "limit": optional(NUMBER),
        "identity": TEXT,
        "data": TEXT,
        "metrics": _VALUES,
        "tasks": table_of(OBJECT),
        "num_items": WHOLE,
        "requests": WHOLE,
        "computed": WHOLE,
        "truncated": optional(WHOLE),
        "seconds": NUMBER,
        "bootstrap_iterations": WHOLE,
        "about": OBJECT,
    }
)


@dataclasses.dataclass(frozen=True)
class Result:
    """A benchmark's outcome.

    Attributes:
      benchmark: lm-eval's name of the task or group.
      title: its name in tables.
      metric: lm-eval's key of the headline metric, such as "acc_norm,none".
      higher_is_better: of the headline metric.
      shots: few-shot examples as lm-eval used them, such as "5"; "0-5" where the tasks of a group differ.
      limit: how many items of each task were asked for (below 1: which share); None for all.
      identity: SHA-256 of task versions, data and every request.
      data: SHA-256 of task versions, few-shot examples, items and their answers: the same for every model.
      metrics: by lm-eval's key, each with "value" and "stderr" (None where there is none).
      tasks: by name, each task's and sub-group's version, number of items and metrics.
      num_items: how many items.
      requests: how many requests to the model they took.
      computed: how many different requests this run computed; the others had been answered before. Benchmarks that ask
        the same questions are computed with the first of them, and counted there.
      truncated: how many requests had their context cut to the window; None if the model does not say.
      seconds: wall time of this run for this benchmark.
      bootstrap_iterations: draws behind the standard errors that come by resampling.
      about: what else is known of the run: versions, devices, the command.
      items: outcomes of the items; see `evals.harness.run`. Stored in a file of their own.
    """

    benchmark: str
    title: str
    metric: str
    higher_is_better: bool
    shots: str
    limit: int | float | None
    identity: str
    data: str
    metrics: Mapping[str, Mapping[str, float | None]]
    tasks: Mapping[str, Mapping[str, Any]]
    num_items: int
    requests: int
    computed: int
    truncated: int | None
    seconds: float
    bootstrap_iterations: int
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    items: Sequence[Mapping[str, Any]] = ()

    @property
    def value(self) -> float:
        """The headline metric."""
        value = self.metrics[self.metric]["value"]
        assert value is not None
        return value

    @property
    def stderr(self) -> float | None:
        """The standard error of the headline metric."""
        return self.metrics[self.metric]["stderr"]

    @property
    def file_stem(self) -> str:
        """The name of the files, without their ends."""
        limit = "" if self.limit is None else f".limit{self.limit:g}"
        return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', self.benchmark)}.{self.shots}shot{limit}-{self.identity[:8]}"


@dataclasses.dataclass(frozen=True)
class SettingResults:
    """All that is stored of one model and setting."""

    path: Path
    setting: Setting
    results: tuple[Result, ...]


# ------------------------------------------------------------------------------------------------------ writing


def check_output(root: Path) -> None:
    """Makes sure that a folder is a results folder or can become one, before any work is done.

    Raises:
      RequestError: it is something else, or belongs to a later version of this program.
    """
    check_no_address(root)
    if (root / SETTING_FILE).is_file() and (root.parent / RESULTS_FILE).is_file():
        raise RequestError(f"{root} holds the results of one model; give the folder above it, {root.parent}")
    if (root / RESULTS_FILE).is_file():
        _load(root / RESULTS_FILE, "results")
        return
    try:
        foreign = [name for name in sorted(os.listdir(root)) if not name.startswith(".")]
    except FileNotFoundError:
        return
    except OSError as error:
        raise unreadable(f"the results folder {root}", error) from error
    if foreign:
        raise RequestError(
            f"{root} is no results folder: it has no {RESULTS_FILE} and is not empty (there is {foreign[0]}); choose "
            f"another folder"
        )


class SettingFolder:
    """The folder of one model and setting, open for writing by this process alone.

    Attributes:
      path: the folder.
      journal: the answers of the model.
    """

    def __init__(self, path: Path, journal: Journal):
        self.path = path
        self.journal = journal

    def save(self, result: Result) -> Result:
        """Writes a benchmark's result, whole or not at all, and returns it as it is stored.

        A result that was stored before stays, with its time, if this run had nothing to compute for it.

        Raises:
          OperationError: the disk refuses.
        """
        path = self.path / f"{result.file_stem}.json"
        if result.computed == 0 and path.is_file():
            stored = load_result(path)
            if stored.identity == result.identity and stored.metrics == result.metrics:
                return stored
        lines = b"".join(_json(item, indent=None) for item in result.items)
        record = dataclasses.asdict(dataclasses.replace(result, items=()))
        del record["items"]
        record["items_sha256"] = hashlib.sha256(lines).hexdigest()
        # The items first: a result without its items would claim what it cannot show.
        write_file_atomic(_items_path(path), lines, overwrite=True)
        _write(path, "result", record)
        return result


@contextlib.contextmanager
def open_setting(root: Path, setting: Setting, *, resume: bool = False) -> Iterator[SettingFolder]:
    """Opens the folder of a model and setting in a results folder, making both where they are not there.

    A folder that was made for the same setting under another name is used: a model that was moved is still the same.

    Of several processes of one run the first one opens it. The others, which must call this too, get a folder of their
    own with the answers that are there, so that all ask the model the same; it is gone at the end.

    Args:
      root: the results folder.
      setting: of the model.
      resume: whether there must be a folder of that setting.

    Raises:
      RequestError: as `check_output`; another run has it open; or there is nothing to resume.
      OperationError: it is damaged, or the disk refuses.
    """
    if is_main():
        with contextlib.ExitStack() as stack:
            with synchronize_errors():
                path = _setting_path(root, setting, resume)
                journal = stack.enter_context(Journal(path / RESPONSES_FILE))
            if is_joined():
                broadcast_from_main((path / RESPONSES_FILE).read_bytes())
            yield SettingFolder(path, journal)
        return
    with synchronize_errors():
        pass
    with tempfile.TemporaryDirectory(prefix="gluprune-") as scratch:
        path = Path(scratch)
        (path / RESPONSES_FILE).write_bytes(broadcast_from_main(b""))
        with Journal(path / RESPONSES_FILE) as journal:
            yield SettingFolder(path, journal)


def recorded_dates(root: Path, setting: Setting) -> dict[str, str]:
    """The days, YYYY-MM-DD, on which a model was asked in this setting but for the day, by the folder.

    Those that are the day of a first run come before those that were asked for. What cannot be read is left out.
    """
    found = []
    for path in _setting_paths(root):
        with contextlib.suppress(GlupruneError):
            stored = _load_setting(path / SETTING_FILE)
            if stored.date and stored.digest == setting.on(parse_date(stored.date)).digest:
                found.append((stored.about.get("date") == GIVEN, stored.date, str(path)))
    return {path: date for _, date, path in sorted(found)}


def _setting_path(root: Path, setting: Setting, resume: bool) -> Path:
    """The folder of a setting, which is made where it is not there."""
    check_output(root)
    path = next((folder for folder in _setting_paths(root) if folder.name.endswith(f"-{setting.digest[:8]}")), None)
    if path is None and resume:
        raise RequestError(
            f"there is nothing to resume: {root} has no results of this model and setting; leave out `resume` to begin"
        )
    if path is None:
        path = root / setting.folder_name
        make_folder(root)
        if not (root / RESULTS_FILE).is_file():
            _write(root / RESULTS_FILE, "results", {})
        make_folder(path)
        _write(path / SETTING_FILE, "setting", dataclasses.asdict(setting) | {"digest": setting.digest})
    elif (stored := _load_setting(path / SETTING_FILE)).digest != setting.digest:
        differ = sorted(key for key, value in setting.decides.items() if stored.decides.get(key) != value)
        raise RequestError(f"{path} belongs to another model or setting: {', '.join(differ)} differ; rename it")
    return path


# ------------------------------------------------------------------------------------------------------ reading


def load_results(root: Path) -> list[SettingResults]:
    """Reads a results folder, without the items.

    Raises:
      RequestError: there is no such folder, it is no results folder, or one of a later version.
      OperationError: a file in it is damaged.
    """
    if (root / SETTING_FILE).is_file():
        return [_load_folder(root)]
    if not (root / RESULTS_FILE).is_file():
        what = f"it has no {RESULTS_FILE}" if root.is_dir() else "there is no such folder"
        raise RequestError(f"{root} is no results folder: {what}")
    _load(root / RESULTS_FILE, "results")
    return [_load_folder(path) for path in _setting_paths(root)]


def load_result(path: Path) -> Result:
    """Reads one result, without its items.

    Raises:
      RequestError: it is of a later version.
      OperationError: it is not there or damaged.
    """
    record = _load(path, "result")
    check(record, _RESULT, str(path), _REMEDY)
    result = Result(**{f.name: record[f.name] for f in dataclasses.fields(Result) if f.name != "items"})
    if result.metric not in result.metrics or not isinstance(result.metrics[result.metric]["value"], float):
        raise damaged(str(path), f"it has no number for its metric, {shortened(result.metric)}", _REMEDY)
    check_seal(record, str(path), _REMEDY)
    return result


def load_items(folder: Path, result: Result) -> list[dict[str, Any]]:
    """Reads the outcomes of a result's items.

    Args:
      folder: of the model and setting.
      result: one of that folder.

    Raises:
      OperationError: they are not there, or not as they were written.
    """
    path = folder / f"{result.file_stem}.json"
    expected = _load(path, "result").get("items_sha256")
    lines = _read(_items_path(path))
    if hashlib.sha256(lines).hexdigest() != expected:
        raise OperationError(f"{_items_path(path)} is damaged: its SHA-256 is not that in {path.name}; run it again")
    items = [parse(line, f"{_items_path(path)}, line {number}") for number, line in enumerate(lines.splitlines(), 1)]
    check(items, list_of(OBJECT), str(_items_path(path)), _REMEDY)
    return items


def _load_folder(path: Path) -> SettingResults:
    results = (load_result(file) for file in sorted(path.glob("*.json")) if file.name != SETTING_FILE)
    return SettingResults(path, _load_setting(path / SETTING_FILE), tuple(results))


def _setting_paths(root: Path) -> list[Path]:
    return sorted(file.parent for file in root.glob(f"*/{SETTING_FILE}"))


def _items_path(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix('.json')}.items.jsonl")


# --------------------------------------------------------------------------------------------------------- files


def _load_setting(path: Path) -> Setting:
    record = _load(path, "setting")
    check(record, _SETTING, str(path), _REMEDY)
    setting = Setting(**{field.name: record[field.name] for field in dataclasses.fields(Setting)})
    if record["digest"] != json_digest(setting.decides):
        raise damaged(str(path), "its digest is not that of its content", _REMEDY)
    check_seal(record, str(path), _REMEDY)
    return setting


def _load(path: Path, kind: str) -> dict[str, Any]:
    record = parse(_read(path), str(path), _REMEDY)
    if not isinstance(record, dict) or record.get("format") != f"gluprune-{kind}":
        raise damaged(str(path), f'it has no "format": "gluprune-{kind}"', _REMEDY)
    if record.get("version") != VERSION:
        raise RequestError(
            f"{path} has version {shortened(record.get('version'))}; this program reads version {VERSION}"
        )
    return record


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OperationError(f"cannot read {path}: {error.strerror}") from error


def _write(path: Path, kind: str, record: Mapping[str, Any]) -> None:
    document = {"format": f"gluprune-{kind}", "version": VERSION} | dict(record)
    write_file_atomic(path, _json(sealed(document), indent=1), overwrite=True)


def _json(value: Any, indent: int | None) -> bytes:
    return json.dumps(value, indent=indent, allow_nan=True).encode() + b"\n"


def make_folder(folder: Path) -> None:
    """Makes a folder where there is none.

    Raises:
      OperationError: the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
