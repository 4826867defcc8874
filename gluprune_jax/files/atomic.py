"""Output that is there whole or not at all.

A folder is built beside its target under a hidden name and renamed into place; an old target is first renamed
aside, and deleted last. A process killed at any moment leaves the old target, the new one, or the old one under its
hidden name, and the next run that writes into the same folder puts that right before it looks at anything else.

The hidden names carry the target's name, a random part, the process and the host: what belongs to a living process
is never touched. It also holds a lock on its folder, for those who cannot see it: other containers of the same name.
Whether a process of another host lives cannot be known, so what it left and nothing locks counts as abandoned after a
day without a new file.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.files.object_store import Folder

_HOST = re.sub(r"[^\w.-]", "_", socket.gethostname())
_SECONDS_UNTIL_ABANDONED = 24 * 3600
_NO_SPACE = os.strerror(errno.ENOSPC)

# What this very process is writing. Its number alone does not say: in a container that is started again, the
# process that was killed had the same one.
_ours: set[Path] = set()


# ------------------------------------------------------------------------------------------------- front doors


# Raises, if what is at a path must not be replaced.
MayReplace = Callable[[Path], None]


def check_directory(target: Path, may_replace: MayReplace) -> Path:
    """Refuses a folder that could not be written, before any work is done, and returns its full path.

    What killed runs left behind beside the target is put right first.

    Args:
      target: the folder to write. A symbolic link is followed.
      may_replace: raises if what is at the target must stay; called with its full path.

    Raises:
      RequestError: as `may_replace`; or the target cannot be replaced at all (the working folder or one above it, a
        mount point).
      OperationError: the folder it goes into cannot be written to.
    """
    check_no_address(target)
    target = target.resolve()
    if Path.cwd().is_relative_to(target):
        raise RequestError(f"{target} is the working folder or holds it; choose another folder for the output")
    if os.path.ismount(target):
        raise RequestError(f"{target} is a mount point and cannot be replaced; choose a folder inside it")
    with _reported(target):
        _recover(target.parent)
        may_replace(target)
        _try_to_write_beside(target)
    return target


@contextlib.contextmanager
def staged_directory(target: Path, may_replace: MayReplace) -> Iterator[Path]:
    """Gives a fresh folder that takes the place of `target` if the block ends without an exception.

    The folders above `target` are made. On any exception the fresh folder is removed and the old one stays.

    Args:
      target: the folder to write. A symbolic link is followed.
      may_replace: as for `check_directory`; called once more at the end, for hours may have passed.

    Raises:
      RequestError: as `check_directory`.
      OperationError: the disk is full, read-only or otherwise unwilling, also when the block found that out.
    """
    target = check_directory(target, may_replace)
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
            _commit(stage, target, may_replace)


def check_file(path: Path, overwrite: bool) -> Path:
    """Refuses a file that `write_file_atomic` would refuse, before any work is done, and returns its full path.

    Raises:
      RequestError: it exists and `overwrite` is not given, or it is not a file.
      OperationError: the folder it goes into cannot be written to.
    """
    check_no_address(path)
    path = path.resolve()
    with _reported(path):
        if os.path.lexists(path) and not path.is_file():
            raise RequestError(f"{path} is not a file; choose another path for the output")
        if os.path.lexists(path) and not overwrite:
            raise already_exists(path)
        _try_to_write_beside(path)
    return path


def write_file_atomic(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Writes a file by one rename. The folders above it are made; a symbolic link is followed.

    Raises:
      RequestError: as `check_file`.
      OperationError: the disk is full, read-only or otherwise unwilling.
    """
    with staged_file(path, overwrite=overwrite) as fresh:
        fresh.write_bytes(data)


@contextlib.contextmanager
def staged_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives the path of a file to write, which takes the place of `path` if the block ends without an exception.

    The folders above it are made; a symbolic link is followed.

    Raises:
      RequestError: as `check_file`.
      OperationError: the disk is full, read-only or otherwise unwilling, also when the block found that out.
    """
    path = check_file(path, overwrite)
    with contextlib.ExitStack() as stack:
        with _reported(path):
            stage = stack.enter_context(scratch_directory(path))
        try:
            yield stage / path.name
        except Exception as error:
            if not _is_failure_to_write(error, stage):
                raise
            shutil.rmtree(stage, ignore_errors=True)  # before the free space is measured
            raise _explained(error, path) from error
        with _reported(path):
            _flush(stage)
            check_file(path, overwrite)  # again: hours may have passed
            (stage / path.name).replace(path)


@contextlib.contextmanager
def scratch_directory(target: Path) -> Iterator[Path]:
    """A fresh hidden folder beside `target`, removed at the end with all that is left in it.

    Scratch folders of killed runs beside it are removed too. Errors are plain `OSError`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target.parent)
    stage = target.with_name(f".{target.name}.{secrets.token_hex(4)}.{os.getpid()}@{_HOST}.new")
    _ours.add(stage)
    try:
        stage.mkdir()
        with _locked(stage):
            yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        _ours.discard(stage)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder, under whatever name, where the file system has locks of folders.

    Other containers may have the host's name and processes of their own: the lock tells them that this one lives.
    """
    descriptor = None
    with contextlib.suppress(OSError, ImportError):
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _is_locked(folder: Path) -> bool:
    with contextlib.suppress(OSError, ImportError):
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


def check_no_address(path: str | Path) -> None:
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


def _commit(stage: Path, target: Path, may_replace: MayReplace) -> None:
    may_replace(target)
    if not os.path.lexists(target):
        try:
            stage.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process was first
                raise already_exists(target) from error
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


_HIDDEN = re.compile(r"(\.(.+)\.[0-9a-f]{8}\.(\d+)@(.+))\.(new|old)")
_PROBE = re.compile(r"\.gluprune-(?:[a-z0-9_]{8}|[0-9a-f]{8}\.\d+@.+)")


def _recover(folder: Path) -> None:
    """Finishes or undoes what killed runs left in a folder, whatever they were writing there."""
    if not folder.is_dir():
        return
    for name in os.listdir(folder):
        left = folder / name
        # Other processes may be recovering the same target: what is gone has been dealt with.
        with contextlib.suppress(FileNotFoundError):
            if match := _HIDDEN.fullmatch(name):
                if _is_in_use(left, folder / f"{match[1]}.new", int(match[3]), match[4]):
                    continue
                target = folder / match[2]
                if match[5] == "old" and not os.path.lexists(target):
                    left.rename(target)
                else:
                    shutil.rmtree(left, ignore_errors=True)
            elif _PROBE.fullmatch(name):
                # There is never anything in it, and the run that made it does not miss it.
                with contextlib.suppress(OSError):
                    left.rmdir()


def _is_in_use(left: Path, stage: Path, process: int, host: str) -> bool:
    if _is_locked(left):
        return True
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


def already_exists(path: Folder) -> RequestError:
    """The refusal to replace what is at a path."""
    return RequestError(f"{path} exists; choose another path or add `overwrite`")


def _try_to_write_beside(target: Path) -> None:
    folder = next(parent for parent in target.parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise RequestError(f"{target} cannot be made: {folder} is a file, not a folder")
    # Trying is the only sure way: permission bits say nothing about root, quotas or network file systems.
    probe = folder / f".gluprune-{secrets.token_hex(4)}.{os.getpid()}@{_HOST}"
    probe.mkdir()
    with contextlib.suppress(FileNotFoundError):  # another run has tidied up
        probe.rmdir()


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
