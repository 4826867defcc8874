"""Orbax checkpoints of a training run: the last two, each whole or not there at all.

<folder>/step_00000200/       an Orbax v1 checkpoint: the arrays of a `TrainState` by name, and as custom metadata
                              the settings of the run, the step, and what was counted so far; and `files.json` with
                              the size and the checksum of every file
"""

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from gluprune_jax.errors import OperationError, RequestError, shortened
from gluprune_jax.files.atomic import check_no_address
from gluprune_jax.files.orbax import (
    COMMIT_FILE,
    calling_orbax,
    check_contents,
    check_files,
    deferring_interrupts,
    is_orbax,
    write_commit_file,
)
from gluprune_jax.files.records import NUMBER, OBJECT, WHOLE, check, record_of, table_of
from gluprune_jax.parallel.distributed import broadcast_from_main, is_main, synchronize_errors
from gluprune_jax.training.step import TrainState

_FORMAT = "gluprune-training"
_VERSION = 1
_ITEM = "state"
_KEPT = 2
_METADATA = record_of({"settings": OBJECT, "step": WHOLE, "counts": table_of(NUMBER)})
_NAME = re.compile(r"step_([0-9]{8,})")
_UNFINISHED = re.compile(_NAME.pattern + r"\.orbax-checkpoint-tmp.*")


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a run resumes from.

    Attributes:
      path: of the checkpoint.
      state: on the devices that were asked for.
      step: how many steps were done.
      counts: the caller's.
    """

    path: Path
    state: TrainState
    step: int
    counts: Mapping[str, float]


class TrainingCheckpoints:
    """The checkpoints of one run in a folder of their own. With several processes all must make the same calls."""

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        former: Mapping[str, str] | None = None,
        later: Collection[str] = (),
    ):
        """Names the folder; nothing is made yet.

        Args:
          folder: one that all processes share.
          settings: JSON by the name of each setting, all that decides what the steps compute.
          former: what settings that have another name now are called in older checkpoints: old name to new.
          later: settings that older checkpoints do not record, and that another one implies.

        Raises:
          RequestError: the folder is an address of an object store, or a file.
        """
        check_no_address(folder)
        self._folder = folder.resolve()
        if self._folder.exists() and not self._folder.is_dir():
            raise RequestError(f"`checkpoints` {folder} is a file; choose a folder")
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._former, self._later = former or {}, later

    def save(self, step: int, state: TrainState, counts: Mapping[str, float]) -> Path:
        """Saves a state, removes all but the last two, and returns the path of the new one.

        Raises:
          OperationError: it cannot be written.
        """
        from orbax.checkpoint import v1 as ocp  # here: it costs a third of a second, to those who use it

        path = self._folder / f"step_{step:08d}"
        own = {"format": _FORMAT, "version": _VERSION, "step": step}
        metadata = {**own, "settings": self._settings, "counts": dict(counts)}
        # An interruption waits until the checkpoint is whole: it is what the next run resumes from.
        with deferring_interrupts():
            with synchronize_errors(), calling_orbax(f"cannot write the checkpoint {path}"):
                ocp.save_checkpointables(path, {_ITEM: _named(state)}, custom_metadata=metadata)
            with synchronize_errors():
                write_commit_file(path)
        self._remove(self._committed()[:-_KEPT])
        return path

    def restore(self, state: TrainState) -> Restored | None:
        """The state of the last checkpoint, or None where there is none.

        What a killed run left half written is removed.

        Args:
          state: gives shapes, dtypes and shardings.

        Raises:
          RequestError: it is of a run with other settings; the first that differs is named.
          OperationError: it is damaged.
        """
        from orbax.checkpoint import v1 as ocp  # here: as above

        with synchronize_errors():
            self._remove(self._unfinished())
            paths = self._committed() if is_main() else []
        name = broadcast_from_main(paths[-1].name.encode() if paths else b"").decode()
        if not name:
            return None
        path = self._folder / name
        with synchronize_errors():  # by itself: Orbax makes processes wait for each other
            if is_main():
                _check_files(path)
        with synchronize_errors():
            with _reading(path):
                metadata = ocp.checkpointables_metadata(path).custom_metadata or {}
            if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
                raise RequestError(f"{path} is no training checkpoint of this gluprune; choose another `checkpoints`")
            check(metadata, _METADATA, str(path), "remove it to go on from the one before")
            self._check_settings(metadata["settings"])
            wanted = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)  # type: ignore[no-untyped-call]
                for name, leaf in _named(state).items()
            }
            with _reading(path):
                arrays = ocp.load_checkpointables(path, {_ITEM: wanted})[_ITEM]
        restored: TrainState = jax.tree.unflatten(jax.tree.structure(state), [arrays[name] for name in wanted])
        return Restored(path, restored, int(metadata["step"]), metadata["counts"])

    def remove(self) -> None:
        """Removes all checkpoints, and the folder if nothing else is in it."""
        self._remove([*self._committed(), *self._unfinished()])
        if is_main():
            with contextlib.suppress(OSError):
                self._folder.rmdir()

    def _check_settings(self, stored: Mapping[str, Any]) -> None:
        stored = {self._former.get(name, name): value for name, value in stored.items()}
        for name in self._settings | stored:
            if name in self._later and name not in stored:
                continue
            old, new = stored.get(name), self._settings.get(name)
            if old != new:
                raise RequestError(
                    f"the checkpoints in {self._folder} are of a run with {name} {shortened(old)}, and this one has "
                    f"{shortened(new)}; give the same to go on, or another `checkpoints` folder to begin anew"
                )

    def _committed(self) -> list[Path]:
        """The checkpoints that are whole, the oldest first."""
        return list_checkpoints(self._folder)

    def _unfinished(self) -> list[Path]:
        return _entries(self._folder, _UNFINISHED)

    def _remove(self, paths: list[Path]) -> None:
        if is_main():
            for path in paths:
                shutil.rmtree(path, ignore_errors=True)


def recorded_dates(folder: Path, name: str) -> dict[str, str]:
    """The day, YYYY-MM-DD, of the data of the last checkpoint, by the checkpoint, if its setting `name` has one.

    A folder without checkpoints, or whose last one cannot be read, names none: restoring it will say what is wrong.
    """
    for path in list_checkpoints(folder.resolve())[-1:]:
        # Not with Orbax, which makes processes wait for each other: this is for one of them alone.
        with contextlib.suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
            metadata = json.loads((path / "_CHECKPOINT_METADATA").read_bytes())
            date = metadata["custom_metadata"]["settings"][name]
            if isinstance(date, str):
                return {str(path): date}
    return {}


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that are whole, the oldest first."""
    return [path for path in _entries(folder, _NAME) if is_orbax(path)]


def _entries(folder: Path, name: re.Pattern[str]) -> list[Path]:
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in entries if path.is_dir() and name.fullmatch(path.name))


def _named(state: TrainState) -> dict[str, Any]:
    """The arrays of a state by where they stand in it, in the order of its leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _check_files(path: Path) -> None:
    if not (path / COMMIT_FILE).exists():  # of an older version, or of a run that was killed just before
        return
    try:
        check_contents(path, check_files(path))
    except OperationError as error:
        raise OperationError(f"{error}, or remove it to go on from the one before") from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    with calling_orbax(f"the checkpoint {path} is damaged or cannot be read; remove it to go on from the one before"):
        yield
