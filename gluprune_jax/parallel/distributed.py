"""Several processes of one run: how they find each other, and what they tell each other.

The same command is started on every machine. All processes compute together, the first one speaks and writes files.
With one process all of this costs nothing.

A process that dies takes the others with it: they leave with a status other than 0 as soon as a message to it fails, or
when it has given no sign of life for the heartbeat timeout.
"""

import contextlib
import hashlib
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from gluprune_jax.errors import GlupruneError, OperationError, RequestError


def is_initialized() -> bool:
    """Whether this process has joined others through JAX. It has not where nobody has imported JAX yet."""
    jax: ModuleType | None = sys.modules.get("jax")
    return jax is not None and bool(jax.distributed.is_initialized())


def process_index() -> int:
    """The number of this process, from 0."""
    if not is_initialized():
        return 0
    import jax

    return jax.process_index()


def process_count() -> int:
    """How many processes there are; it does not touch the devices, which may be in use or absent."""
    if not is_initialized():
        return 1
    import jax

    return int(jax.process_count())


def is_silent() -> bool:
    """Whether this is a process that leaves speaking to another."""
    return process_index() != 0


def min_over_processes(value: int) -> int:
    """The smallest `value` of all processes. All of them must call it."""
    return min(int(text) for text in gather_from_all(str(value).encode()))  # as text: JAX would cut it to 32 bits


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return process_index() == 0


def is_joined() -> bool:
    """Whether this process is one of several."""
    return process_count() > 1


def check_same(what: str, parts: Iterable[bytes]) -> None:
    """Makes sure that all processes have read the same: else they would compute different programs, and wait for ever.

    All processes must call it.

    Args:
      what: names it in the error.
      parts: its contents, which are only looked at where there are several processes.

    Raises:
      RequestError: they have not, on all processes.
    """
    if not is_joined():
        return
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    digests = gather_from_all(digest.digest())
    if different := [i for i, other in enumerate(digests) if other != digests[0]]:
        error = RequestError(
            f"process {different[0]} has read something else than process 0: {what}; give both the same"
        )
        error.all_know = True
        raise error


def broadcast_from_main(data: bytes) -> bytes:
    """The `data` of process 0, on every process. All processes must call it; what the others pass is not looked at."""
    if not is_joined():
        return data
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    return _as_bytes(multihost_utils.broadcast_one_to_all(_as_array(data if is_main() else b"", size)))


def gather_from_all(data: bytes) -> list[bytes]:
    """The `data` of every process, in their order, on every process. All processes must call it."""
    if not is_joined():
        return [data]
    from jax.experimental import multihost_utils

    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(data))))
    if not sizes.any():
        return [b""] * len(sizes)
    rows = np.asarray(multihost_utils.process_allgather(_as_array(data, int(sizes.max()))))
    return [_as_bytes(row[:size]) for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def synchronize_errors() -> Iterator[None]:
    """Ends a block with an error on every process if it ended with one on any.

    Else the others would wait in their next collective for a process that has given up. All processes must enter the
    block, and one that fails must do so where no other waits for it.

    Raises:
      RequestError, OperationError: another process failed; which, and why. The one that failed raises its own error.
    """
    try:
        yield
    except Exception as error:
        gather_from_all(f"{isinstance(error, RequestError):d}{describe_error(error)}".encode(errors="backslashreplace"))
        if isinstance(error, GlupruneError):
            error.all_know = True
        raise
    answers = gather_from_all(b"")
    for process, answer in enumerate(answers):
        if answer:
            kind = RequestError if answer[:1] == b"1" else OperationError
            other = kind(f"process {process} of {len(answers)}: {answer[1:].decode()}")
            other.all_know = True
            raise other


def describe_error(error: Exception) -> str:
    """An exception as a part of a sentence: our own say all, of others the type and the first line."""
    if isinstance(error, GlupruneError):
        return str(error)
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _as_array(data: bytes, size: int) -> NDArray[np.uint8]:
    return np.frombuffer(data.ljust(size, b"\0"), np.uint8)


def _as_bytes(array: NDArray[np.uint8]) -> bytes:
    return np.asarray(array, np.uint8).tobytes()
