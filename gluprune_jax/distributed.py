"""What several processes of one run tell each other. With one process all of this costs nothing."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from gluprune_jax.errors import GlupruneError, OperationError, RequestError


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return jax.process_index() == 0


def broadcast_from_main(data: bytes) -> bytes:
    """The `data` of process 0, on every process. All processes must call it; what the others pass is not looked at."""
    if jax.process_count() == 1:
        return data
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    return _as_bytes(multihost_utils.broadcast_one_to_all(_as_array(data if is_main() else b"", size)))


def gather_from_all(data: bytes) -> list[bytes]:
    """The `data` of every process, in their order, on every process. All processes must call it."""
    if jax.process_count() == 1:
        return [data]
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(data))))
    if not sizes.any():
        return [b""] * len(sizes)
    rows = np.asarray(multihost_utils.process_allgather(_as_array(data, int(sizes.max()))))
    return [_as_bytes(row[:size]) for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Ends a block with an error on every process if it ended with one on any.

    Else the others would wait in their next collective for a process that has given up. All processes must enter the
    block, and one that fails must do so where no other waits for it.

    Raises:
      RequestError, OperationError: another process failed; which, and why. The one that failed raises its own error.
    """
    try:
        yield
    except Exception as error:
        gather_from_all(f"{isinstance(error, RequestError):d}{_sentence(error)}".encode())
        raise
    answers = gather_from_all(b"")
    for process, answer in enumerate(answers):
        if answer:
            kind = RequestError if answer[:1] == b"1" else OperationError
            raise kind(f"process {process} of {len(answers)}: {answer[1:].decode()}")


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, GlupruneError) else f"{type(error).__name__}: {error}"


def _as_array(data: bytes, size: int) -> NDArray[np.uint8]:
    return np.frombuffer(data.ljust(size, b"\0"), np.uint8)


def _as_bytes(array: NDArray[np.uint8]) -> bytes:
    return np.asarray(array, np.uint8).tobytes()
