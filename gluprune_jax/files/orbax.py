"""How Orbax is called, and how a folder of it is told; not what is in it."""

import contextlib
import gc
import inspect
import json
import logging
import re
import signal
import sys
import threading
import traceback
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

from gluprune_jax.errors import OperationError, RequestError, first_line, shortened
from gluprune_jax.files.object_store import Folder, in_store, sizes
from gluprune_jax.files.records import (
    WHOLE,
    Kind,
    check,
    either,
    parse,
    record_of,
    table_of,
)
from gluprune_jax.parallel.distributed import gather_from_all, process_index, synchronize_errors

COMMIT_FILE = "files.json"
_ORBAX_MARKER = "_CHECKPOINT_METADATA"

# What Orbax reads before any array is in smaller files. Those are checked first, the others when arrays are loaded.
_SMALL = 1 << 20  # bytes
_READ_AT_ONCE = 1 << 22  # bytes
_READERS = 4  # threads

_CRC32 = Kind(
    "eight hexadecimal digits", lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{8}", value) is not None
)
_FILES = table_of(either(WHOLE, record_of({"size": WHOLE, "crc32": _CRC32})))


def is_orbax(path: Folder) -> bool:
    """Whether `path` is the folder of an Orbax checkpoint, ours or not; on a disk, of one that is committed."""
    return (path / _ORBAX_MARKER).is_file()


@contextlib.contextmanager
def calling_orbax(failure: str) -> Iterator[None]:
    """Reports whatever Orbax and its storage layers raise as one sentence, and keeps their logs off the terminal."""
    _ignore_abandoned_reads()
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    except Exception as error:
        # asyncio logs every other read or write that failed when its future is collected: have that done here.
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            gc.collect()
        raise OperationError(f"{failure}: {first_line(error)}") from error
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


@contextlib.contextmanager
def deferring_interrupts() -> Iterator[None]:
    """Lets the first Ctrl-C wait until the block is done; the second one ends it at once.

    Orbax writes from an event loop and from threads: interrupted, they would report for 40 lines what each was doing,
    and leave a checkpoint that is not whole.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # only the main thread may change what a signal does; and who ignores it is not interrupted
        return
    waiting: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if waiting:
            before(number, frame)
        waiting.append(number)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        before(waiting[0], None)


def _ignore_abandoned_reads() -> None:
    """Keeps off the terminal, from now on, what is said of reads and writes that Orbax has given up waiting for.

    One array that cannot be read ends the event loop. TensorStore's threads then find it closed, what had not begun is
    collected without having been awaited, and what had begun takes its own end for an error of reading (84 lines for
    each array): all at any later time, the end of the process included.
    """
    # However often: an equal filter is moved to the front, not added.
    never_awaited = "coroutine '_read_array_index_and_device_put' was never awaited"
    warnings.filterwarnings("ignore", never_awaited, RuntimeWarning)
    before = sys.unraisablehook
    if getattr(before, "ignores_abandoned_reads", False):
        return

    def hook(unraisable: Any) -> None:
        closed = isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(unraisable.exc_value)
        if not (closed or _is_of_orbax(unraisable.object)):
            before(unraisable)

    hook.ignores_abandoned_reads = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


def _is_of_orbax(collected: object) -> bool:
    return inspect.iscoroutine(collected) and "orbax" in Path(collected.cr_code.co_filename).parts


# ----------------------------------------------------------------------------------------------------- checks


def absolute(path: Folder) -> Folder:
    """The full path of a folder, which Orbax asks for."""
    return path if in_store(path) else path.absolute()


def file_sizes(path: Folder) -> dict[str, int]:
    """The bytes of every file of a checkpoint, by its path in it; `files.json` is not one of them."""
    if in_store(path):
        return {name: size for name, size in sizes(path).items() if name != COMMIT_FILE}
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file != path / COMMIT_FILE)
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in files}


def write_commit_file(path: Folder) -> None:
    """Writes `files.json` into an Orbax checkpoint that is whole otherwise. Call it on every process.

    Raises:
      OperationError: the disk refuses.
    """
    ours = {}
    with synchronize_errors(), calling_orbax(f"cannot write the Orbax checkpoint {path}"):
        if not in_store(path) and process_index() > 0:
            # What a process has written is surely to be seen by it, and still in its memory.
            mine = path.glob(f"**/ocdbt.process_{process_index()}/**/*")
            ours = _checksums(path, [file.relative_to(path).as_posix() for file in mine if file.is_file()])
    known: dict[str, str] = {}
    for answer in gather_from_all(json.dumps(ours).encode()):
        known |= json.loads(answer)
    if process_index() == 0:
        with calling_orbax(f"cannot write the Orbax checkpoint {path}"):
            found: Mapping[str, Any] = file_sizes(path)
            if not in_store(path):
                known |= _checksums(path, found.keys() - known.keys())
                found = {name: {"size": size, "crc32": known[name]} for name, size in found.items()}
            (path / COMMIT_FILE).write_text(json.dumps(found, indent=1), encoding="utf-8")


def check_files(path: Folder) -> dict[str, str]:
    """Compares the files of a checkpoint with `files.json`, but not the contents of large ones, and not in a store.

    Returns:
      By name, the checksums that are still to be compared (`check_contents`).

    Raises:
      RequestError: it has no `files.json`, or is no Orbax checkpoint.
      OperationError: a file is missing or another one, or `files.json` is damaged.
    """
    if not is_orbax(path):
        raise RequestError(
            f"{path} is not an Orbax checkpoint, or one whose writing was not finished: it has no {_ORBAX_MARKER}"
        )
    try:
        text = (path / COMMIT_FILE).read_text(encoding="utf-8")
        actual = file_sizes(path)
    except FileNotFoundError as error:
        raise RequestError(
            f"{path} is not an Orbax checkpoint of gluprune, or one whose writing was not finished: it has no "
            f"{COMMIT_FILE}"
        ) from error
    except (OSError, ValueError) as error:
        raise OperationError(f"{path / COMMIT_FILE} cannot be read: {first_line(error)}") from error
    checksums = {}
    for name, (size, checksum) in _recorded(path / COMMIT_FILE, text).items():
        if actual.get(name) != size:
            found = f"has {actual[name]:,} bytes instead of {size:,}" if name in actual else "is missing"
            raise OperationError(
                f"the checkpoint {path} is damaged: {shortened(name)[1:-1]} {found}; copy or write it again"
            )
        if checksum is not None and not in_store(path):
            checksums[name] = checksum
    small = {name: checksum for name, checksum in checksums.items() if actual[name] <= _SMALL}
    check_contents(path, small)
    return {name: checksum for name, checksum in checksums.items() if name not in small}


def check_contents(path: Path, checksums: Mapping[str, str]) -> None:
    """Reads files of a checkpoint and compares their checksums, given by name.

    Raises:
      OperationError: one has another, or cannot be read.
    """
    try:
        found = _checksums(path, checksums)
    except OSError as error:
        raise OperationError(f"the checkpoint {path} cannot be read: {first_line(error)}") from error
    for name in sorted(checksums):
        if found[name] != checksums[name]:
            raise OperationError(
                f"the checkpoint {path} is damaged: {name} has the checksum {found[name]} instead of "
                f"{checksums[name]}; copy or write it again"
            )


def _checksums(path: Path, names: Collection[str]) -> dict[str, str]:
    """The CRC-32 of files, eight hexadecimal digits each. Of what tells changed bytes it is the fastest at hand."""

    def checksum(name: str) -> str:
        buffer, value = memoryview(bytearray(_READ_AT_ONCE)), 0
        with (path / name).open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                value = zlib.crc32(buffer[:count], value)
        return f"{value:08x}"

    with ThreadPoolExecutor(_READERS) as readers:
        return dict(zip(names, readers.map(checksum, names), strict=True))


def _recorded(file: Folder, text: str) -> dict[str, tuple[int, str | None]]:
    """What `files.json` says: size and checksum by name. Those without checksums have the size alone, as a number."""
    remedy = "copy or write the checkpoint again"
    files = parse(text, str(file), remedy)
    check(files, _FILES, str(file), remedy)
    return {
        name: (entry, None) if isinstance(entry, int) else (entry["size"], entry["crc32"])
        for name, entry in files.items()
    }
