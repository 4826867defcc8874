"""Rows of a table that takes hours to compute, in a file that is whole whenever it is looked at."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from gluprune_jax.atomic import write_file_atomic
from gluprune_jax.distributed import broadcast_from_main, failing_together, is_main
from gluprune_jax.errors import OperationError, RequestError


class Rows:
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
    ) -> "Rows":
        """Those in `path`, if they are of the same thing; else new ones.

        With several processes all must call it, and all get the rows of the first one, which writes the file: with
        others, say where the folder is not shared, they would not compute the same, and wait for each other for ever.

        Args:
          path: the file; None keeps the rows in memory alone.
          about: what they are of, as JSON; "format" says what kind of file it is.
          is_row: whether what stands in a file at some position could have been written there.
          overwrite: begins anew where the file is of something else.
          optional: entries that are None as long as no row needs them; they may come later, and stay.

        Raises:
          RequestError: the file is of another comparison or study and `overwrite` is false, or of another kind.
          OperationError: it cannot be read.
        """
        document = json.loads(json.dumps(about))
        rows: list[Any] = []
        with failing_together():
            if is_main() and path is not None and path.exists():
                found = _read(path, document["format"], is_row)
                rows = found.pop("rows")
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
                        f"{path} is of another {_kind(document)}: its {different} differs; choose another --output, or "
                        f"replace it with --overwrite"
                    )
        return cls(path, json.loads(broadcast_from_main(json.dumps({**document, "rows": rows}).encode())))

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row that has these entries, if it is known."""
        rows = self.document["rows"]
        return next((row for row in rows if all(row[name] == value for name, value in key.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row."""
        self.document["rows"].append(row)
        if self._path is not None:
            with failing_together():
                if is_main():
                    write_file_atomic(self._path, json.dumps(self.document, indent=1).encode(), overwrite=True)


def _read(path: Path, kind: str, is_row: Callable[[int, Any], bool]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OperationError(f"{path} cannot be read: {error}; remove it to start anew") from error
    if not isinstance(found, dict) or found.get("format") != kind or not isinstance(found.get("rows"), list):
        raise RequestError(f"{path} is no {_kind({'format': kind})} and is not replaced; choose another --output")
    for number, row in enumerate(found["rows"]):
        if not is_row(number, row):
            raise OperationError(f"{path} is damaged at row {number}; remove it to start anew")
    return found


def _kind(document: Mapping[str, Any]) -> str:
    """ "comparison" of "gluprune-comparison"."""
    return str(document["format"]).partition("-")[2]
