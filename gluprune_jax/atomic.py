"""Output that is there whole or not at all.

A folder is built beside its target under a hidden name and renamed into place; an old target is first renamed
aside, and deleted last. A process killed at any moment leaves the old target, the new one, or the old one under its
hidden name, and the next run for the same target puts that right before it looks at anything else.

The hidden names carry the target's name, a random part, the process and the host: what belongs to a living process
is never touched. Whether a process of another host lives cannot be known, so what it left counts as abandoned after
a day without a new file.

Object stores rename nothing. There a model is loaded only if the object that is written last is there, and an old one
loses that before anything else: a process killed at any moment leaves the old model, the new one, or none.
"""

import contextlib
import errno
import fnmatch
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gluprune_jax import object_store
from gluprune_jax.checkpoint import COMMIT_FILE, is_orbax
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.object_store import Folder

# All that a model folder written by us, or one downloaded from the Hub, may hold. `--overwrite` deletes a folder
# only if nothing else is in it, so that a wrong path can cost a model but never somebody's home.
MODEL_FILES = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.txt",
    "tokenizer.model",
    "README.md",
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
)
MODEL_FOLDERS = ("orbax",)

_HOST = re.sub(r"[^\w.-]", "_", socket.gethostname())
_SECONDS_UNTIL_ABANDONED = 24 * 3600
_NO_SPACE = os.strerror(errno.ENOSPC)

# What this very process is writing. Its number alone does not say: in a container that is started again, the
# process that was killed had the same one.
_ours: set[Path] = set()


# ------------------------------------------------------------------------------------------------- front doors


def check_target(target: Folder, overwrite: bool) -> Folder:
    """Refuses a folder that could not be written, before any work is done, and returns its full path.

    What a killed run for the same target left behind is put right first.

    Raises:
      RequestError: the target exists and `overwrite` is not given; or it is something else than a model folder
        (see `MODEL_FILES`) or an empty folder; or it cannot be replaced at all (the working folder or one above
        it, a mount point).
      OperationError: the folder it goes into cannot be written to.
    """
    if object_store.in_store(target):
        with object_store.reaching(target):
            _refuse_to_lose_in_store(target, overwrite)
            _try_to_write_in_store(target)
        return target
    refuse_address(target)
    target = target.resolve()
    if Path.cwd().is_relative_to(target):
        raise RequestError(f"{target} is the working folder or holds it; choose another folder for the output")
    if os.path.ismount(target):
        raise RequestError(f"{target} is a mount point and cannot be replaced; choose a folder inside it")
    with _reported(target):
        _recover(target)
        _refuse_to_lose(target, overwrite)
        _try_to_write_beside(target)
    return target


@contextlib.contextmanager
def staged_directory(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives a fresh folder that takes the place of `target` if the block ends without an exception.

    The folders above `target` are made. On any exception the fresh folder is removed and the old one stays.

    Args:
      target: the folder to write. A symbolic link is followed.
      overwrite: whether an existing model folder is replaced.

    Raises:
      RequestError: as `check_target`.
      OperationError: the disk is full, read-only or otherwise unwilling, also when the block found that out.
    """
    target = check_target(target, overwrite)
    with contextlib.ExitStack() as stack:
        with _reported(target):
            stage = stack.enter_context(scratch_directory(target))
        try:
            yield stage
        except Exception as error:
            if not _is_failure_to_write(error, stage):
                raise
            shutil.rmtree(stage, ignore_errors=True)  # before the free space is measured
            raise _explained(error, target) from error
        with _reported(target):
            _flush(stage)
            _commit(stage, target, overwrite)


def begin_in_store(target: Folder, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Makes way for a model in an object store and writes the small files of it. The Orbax checkpoint is to follow.

    Until that is whole nothing can be loaded, also from a folder that held a model before.

    Args:
      target: a folder in an object store.
      files: contents by name; config.json must be among them.
      overwrite: whether an existing model folder is replaced.

    Raises:
      RequestError: as `check_target`.
      OperationError: the store refuses, or cannot be reached.
    """
    with object_store.reaching(target):
        _refuse_to_lose_in_store(target, overwrite)  # again: hours may have passed
        commit = target / "orbax" / COMMIT_FILE
        if commit.exists():
            object_store.delete(commit)
        # config.json comes first and never goes: should this process be killed, `--overwrite` knows the folder by it.
        for name in object_store.entries(target):
            if name != "config.json":
                object_store.delete(target / name)
        for name in sorted(files, key=lambda name: name != "config.json"):
            (target / name).write_bytes(files[name])


def check_file(path: Path, overwrite: bool) -> Path:
    """Refuses a file that `write_file_atomic` would refuse, before any work is done, and returns its full path.

    Raises:
      RequestError: it exists and `overwrite` is not given, or it is not a file.
      OperationError: the folder it goes into cannot be written to.
    """
    refuse_address(path)
    path = path.resolve()
    with _reported(path):
        if os.path.lexists(path) and not path.is_file():
            raise RequestError(f"{path} is not a file; choose another path for the output")
        if os.path.lexists(path) and not overwrite:
            raise _exists(path)
        _try_to_write_beside(path)
    return path


def write_file_atomic(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Writes a file by one rename. The folders above it are made; a symbolic link is followed.

    Raises:
      RequestError: as `check_file`.
      OperationError: the disk is full, read-only or otherwise unwilling.
    """
    path = check_file(path, overwrite)
    with _reported(path), scratch_directory(path) as stage:
        fresh = stage / path.name
        fresh.write_bytes(data)
        _flush(stage)
        fresh.replace(path)


@contextlib.contextmanager
def scratch_directory(target: Path) -> Iterator[Path]:
    """A fresh hidden folder beside `target`, removed at the end with all that is left in it.

    Scratch folders of killed runs for the same target are removed too. Errors are plain `OSError`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target)
    stage = target.with_name(f".{target.name}.{secrets.token_hex(4)}.{os.getpid()}@{_HOST}.new")
    _ours.add(stage)
    try:
        stage.mkdir()
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        _ours.discard(stage)


def refuse_address(path: str | Path) -> None:
    """Refuses what is spelled as an address: as a path, it would name a folder `gs:` here.

    Raises:
      RequestError: it is one.
    """
    if re.match(r"[a-z][a-z0-9+]+:/", str(path)):
        raise RequestError(
            f"{path} is an address, which is not opened here; gs://bucket/folder names a model in Orbax format, and "
            f"otherwise mount the bucket and give its folder, or copy"
        )


# --------------------------------------------------------------------------------------------------- in place


def _commit(stage: Path, target: Path, overwrite: bool) -> None:
    _refuse_to_lose(target, overwrite)  # again: hours may have passed
    if not os.path.lexists(target):
        try:
            stage.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process was first
                raise _exists(target) from error
            raise
        return
    aside = stage.with_suffix(".old")
    target.rename(aside)
    try:
        stage.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    # Under the name of a scratch folder it can be deleted bit by bit: nobody will take half of it for the target.
    aside.rename(stage)


def _recover(target: Path) -> None:
    """Finishes or undoes what killed runs for `target` left."""
    if not target.parent.is_dir():
        return
    hidden = re.compile(rf"(\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(\d+)@(.+))\.(new|old)")
    for name in os.listdir(target.parent):
        match = hidden.fullmatch(name)
        if match is None:
            continue
        left = target.parent / name
        # Other processes may be recovering the same target: what is gone has been dealt with.
        with contextlib.suppress(FileNotFoundError):
            if _is_in_use(left, target.parent / f"{match[1]}.new", int(match[2]), match[3]):
                continue
            if match[4] == "old" and not os.path.lexists(target):
                left.rename(target)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _is_in_use(left: Path, stage: Path, process: int, host: str) -> bool:
    if host != _HOST:
        return time.time() - left.stat().st_mtime < _SECONDS_UNTIL_ABANDONED
    if process == os.getpid():
        return stage in _ours
    if os.name == "nt":  # there os.kill ends the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _flush(folder: Path) -> None:
    # A machine that is taken away, as preemptible ones are, must not keep the rename and lose the bytes.
    if os.name == "nt":  # there only writable descriptors can be flushed
        return
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


# --------------------------------------------------------------------------------------------------- refusals


def _exists(path: Folder) -> RequestError:
    return RequestError(f"{path} exists; choose another path or add --overwrite")


def _refuse_to_lose(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise RequestError(f"{target} is a file; choose another path for the output folder")
    if not overwrite:
        raise _exists(target)
    entries = sorted(target.iterdir())
    foreign = [entry.name + "/" * entry.is_dir() for entry in entries if not _belongs_to_a_model(entry)]
    if foreign:
        raise _holds_foreign(target, foreign)
    if entries and not _is_model(target):
        raise RequestError(
            f"{target} is not replaced: it has no config.json with weights beside it, so it is no model folder; choose "
            "another path"
        )


def _refuse_to_lose_in_store(target: Folder, overwrite: bool) -> None:
    names = object_store.entries(target)
    if "" in names:
        raise RequestError(f"{target} is an object; choose another path for the output folder")
    if names and not overwrite:
        raise _exists(target)
    known = (*MODEL_FILES, *(f"{folder}/" for folder in MODEL_FOLDERS))
    if foreign := [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in known)]:
        raise _holds_foreign(target, foreign)
    if names and "config.json" not in names:  # weights there need not be: a killed run may have left none
        raise RequestError(
            f"{target} is not replaced: it has no config.json, so it is no model folder; choose another path"
        )


def _holds_foreign(target: Folder, names: Sequence[str]) -> RequestError:
    more = f" and {len(names) - 1} more" * (len(names) > 1)
    return RequestError(
        f"{target} is not replaced: it holds {names[0]}{more}, which is no part of a model folder; move it away or "
        "choose another path"
    )


def _is_model(folder: Path) -> bool:
    weights = any(folder.glob("*.safetensors")) or any((folder / name).is_dir() for name in MODEL_FOLDERS)
    return weights and (folder / "config.json").is_file()


def _belongs_to_a_model(entry: Path) -> bool:
    if entry.is_dir():
        return entry.name in MODEL_FOLDERS and is_orbax(entry)
    return any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in MODEL_FILES)


def _try_to_write_beside(target: Path) -> None:
    folder = next(parent for parent in target.parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise RequestError(f"{target} cannot be made: {folder} is a file, not a folder")
    # Trying is the only sure way: permission bits say nothing about root, quotas or network file systems.
    with tempfile.TemporaryDirectory(prefix=".gluprune-", dir=folder):
        pass


def _try_to_write_in_store(target: Folder) -> None:
    # It also finds a bucket that is missing, which Orbax would try to make.
    probe = target.parent / f".gluprune-{secrets.token_hex(4)}"
    probe.write_bytes(b"")
    object_store.delete(probe)


@contextlib.contextmanager
def _reported(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _explained(error, target) from error


def _is_failure_to_write(error: Exception, stage: Path) -> bool:
    """Whether an exception of the caller's block is about our folder, and not, say, about a file it reads.

    Libraries that write through Rust or C++ raise types of their own, with the system's words for a full disk.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return Path(os.fsdecode(error.filename)).is_relative_to(stage)
    return _NO_SPACE in str(error)


def _explained(error: Exception, target: Path) -> OperationError:
    if _NO_SPACE in str(error):
        folder = next(parent for parent in target.parents if parent.is_dir())
        free = shutil.disk_usage(folder).free / 1e6
        return OperationError(
            f"cannot write {target}: the disk is full ({free:,.1f} MB are free there without it); free some space or "
            "choose another path"
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return OperationError(f"cannot write {target}: {reason}; choose a path that you can write to")
