"""Rows of a table that takes hours to compute, in a file that is whole whenever it is looked at."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.files.atomic import write_file_atomic
from gluprune_jax.files.records import SEAL, check_seal, parse, sealed
from gluprune_jax.parallel.distributed import broadcast_from_main, is_main, synchronize_errors

# What the words of methods were in rows that were stored before.
_FORMER_WORDS = {"in-order": "sequential"}


def check_rows(path: Path | None) -> None:
    """Makes sure, before anything that takes long, that there is a file of rows to resume.

    Raises:
      RequestError: there is none.
    """
    if path is None or not path.exists():
        what = "no `output` is given" if path is None else f"{path} is missing"
        raise RequestError(f"there is nothing to resume: {what}; leave out `resume` to begin")


class ResumableRows:
    """The rows that are known, kept in a file if there is one.

    Attributes:
      document: what the file holds: what the rows are of, and `rows`.
    """

    def __init__(self, path: Path | None, document: dict[str, Any]):
        self._path, self.document = path, document

    @classmethod
    def open(
        cls,
        path: Path | None,
        about: Mapping[str, Any],
        *,
        is_row: Callable[[int, Any], bool],
        overwrite: bool,
        optional: Collection[str] = (),
        resume: bool = False,
    ) -> "ResumableRows":
        """Those in `path`, if they are of the same thing; else new ones.

        With several processes all must call it, and all get the rows of the first one, which writes the file: with
        others, say where the folder is not shared, they would not compute the same, and wait for each other for ever.

        Args:
          path: the file; None keeps the rows in memory alone.
          about: what they are of, as JSON; "format" says what kind of file it is.
          is_row: whether what stands in a file at some position could have been written there.
          overwrite: begins anew where the file is of something else.
          optional: entries that are None as long as no row needs them; they may come later, and stay.
          resume: whether there must be rows of the same thing.

        Raises:
          RequestError: the file is of another comparison or study and `overwrite` is false, or of another kind; or
            there is nothing to resume.
          OperationError: it cannot be read.
        """
        document = json.loads(json.dumps(about))
        rows: list[Any] = []
        with synchronize_errors():
            if resume and is_main():
                check_rows(path)
            if is_main() and path is not None and path.exists():
                found = _read(path, document["format"], is_row)
                rows = [{**row, "method": method_name_now(row["method"])} for row in found.pop("rows")]
                known = {key: found[key] for key in optional if document[key] is None and found.get(key) is not None}
                later = {key: document[key] for key in optional if key in found and found[key] is None}
                asked, found = {**document, **known}, {**found, **later}
                if found == asked:
                    document = asked
                elif overwrite:
                    rows = []
                else:
                    missing = object()
                    keys = {**asked, **found}
                    different = next(key for key in keys if asked.get(key, missing) != found.get(key, missing))
                    raise RequestError(
                        f"{path} is of another {_kind(document)}: its {different} differs; choose another `output`, or "
                        f"replace it with `overwrite`"
                    )
        return cls(path, json.loads(broadcast_from_main(json.dumps({**document, "rows": rows}).encode())))

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row that has these entries, if it is known."""

        def is_it(row: Mapping[str, Any]) -> bool:
            return all(row[name] == value for name, value in key.items())

        return next((row for row in self.document["rows"] if is_it(row)), None)

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row."""
        self.document["rows"].append(row)
        self.write()

    def write(self) -> None:
        """Writes the file, as after a change to a row."""
        if self._path is not None:
            with synchronize_errors():
                if is_main():
                    data = json.dumps(sealed(self.document), indent=1).encode()
                    write_file_atomic(self._path, data, overwrite=True)


def check_texts(path: Path | None, names: Sequence[str]) -> None:
    """Makes sure, before the model writes text for minutes, that rows in a file are calibrated on texts of these names.

    Raises:
      RequestError: they are of others.
    """
    recorded = _recorded(path)[1].get("texts")
    if names and isinstance(recorded, list) and recorded != list(names):
        there = " ".join(map(str, recorded))
        raise RequestError(
            f"{path} is calibrated on {there}, and {' '.join(names)} is asked for; give `calibration` {there}, "
            f"choose another `output`, or replace it with `overwrite`"
        )


def recorded_dates(path: Path | None) -> dict[str, str]:
    """The day, YYYY-MM-DD, that a file says its prompts or its calibration text are of, by its name, if it says one."""
    dates = [entries.get("date") for entries in _recorded(path)]
    return next(({str(path): date} for date in dates if isinstance(date, str)), {})


def _recorded(path: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file says, and what it says of calibration; empty where `ResumableRows.open` will refuse it."""
    try:
        found = json.loads(b"null" if path is None else path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}, {}
    found = found if isinstance(found, dict) else {}
    calibration = found.get("calibration")
    return found, calibration if isinstance(calibration, dict) else {}


def method_name_now(name: str) -> str:
    """The name of a method in a stored row, in the words of today: "hybrid+in-order" is "hybrid+sequential"."""
    return "+".join(_FORMER_WORDS.get(word, word) for word in name.split("+"))


def _read(path: Path, kind: str, is_row: Callable[[int, Any], bool]) -> dict[str, Any]:
    remedy = "remove it to start anew"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OperationError(f"{path} cannot be read: {error.strerror}; {remedy}") from error
    found = parse(data, str(path), remedy)
    if not isinstance(found, dict) or found.get("format") != kind or not isinstance(found.get("rows"), list):
        raise RequestError(f"{path} is no {_kind({'format': kind})} and is not replaced; choose another `output`")
    for number, row in enumerate(found["rows"]):
        if not is_row(number, row):
            raise OperationError(f"{path} is damaged at row {number}; {remedy}")
    check_seal(found, str(path), remedy)
    found.pop(SEAL, None)
    return found


def _kind(document: Mapping[str, Any]) -> str:
    """ "comparison" of "gluprune-comparison"."""
    return str(document["format"]).partition("-")[2]
