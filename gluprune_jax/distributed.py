"""Several processes of one run: how they find each other, and what they tell each other.

The same command is started on every machine. All processes compute together, the first one speaks and writes files.
With one process all of this costs nothing.

A process that dies takes the others with it: they leave with a status other than 0 as soon as a message to it fails, or
when it has given no sign of life for the time of `--heartbeat-timeout`.
"""

import argparse
import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from gluprune_jax.errors import GlupruneError, OperationError, RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `connect` to a command line."""
    group = parser.add_argument_group("several processes (start the same command on every machine)")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join the other processes of a Cloud TPU slice or a SLURM job, or those that the next three name",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many processes there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument(
        "--heartbeat-timeout",
        type=int,
        default=60,
        metavar="SECONDS",
        help="how long a process may give no sign of life before the others end",
    )


def connect(args: argparse.Namespace) -> None:
    """Joins the other processes, if `--distributed` asks for it. Nothing may have been computed before.

    Raises:
      RequestError: arguments that do not go together, or no sign of other processes.
      OperationError: the others cannot be reached.
    """
    named = {"coordinator": args.coordinator, "num-processes": args.num_processes, "process-id": args.process_id}
    given = [f"--{name}" for name, value in named.items() if value is not None]
    if given and not args.distributed:
        raise RequestError(f"{given[0]} goes with --distributed")
    if given and len(given) < len(named):
        missing = [f"--{name}" for name, value in named.items() if value is None]
        raise RequestError(f"{given[0]} needs {' and '.join(missing)} too; without all three the cluster is asked")
    if given and not 0 <= args.process_id < args.num_processes:
        raise RequestError(
            f"--process-id is {args.process_id}; of {args.num_processes} processes it must be one from 0"
        )
    if args.coordinator is not None and not re.fullmatch(r".+:[0-9]{1,5}", args.coordinator):
        raise RequestError(f"--coordinator is {args.coordinator!r}; write HOST:PORT")
    if args.heartbeat_timeout < 1:
        raise RequestError(f"--heartbeat-timeout is {args.heartbeat_timeout}; it must be at least 1 second")
    if not args.distributed:
        return
    try:
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_id,
            heartbeat_timeout_seconds=args.heartbeat_timeout,
        )
    except ValueError as error:
        raise RequestError(
            f"--distributed finds no cluster that it knows ({_sentence(error)}); on others give --coordinator, "
            f"--num-processes and --process-id"
        ) from error
    except RuntimeError as error:
        raise OperationError(f"the processes do not find each other: {_sentence(error)}") from error


def is_silent() -> bool:
    """Whether this is a process that leaves speaking to another."""
    return jax.distributed.is_initialized() and not is_main()


def least(value: int) -> int:
    """The smallest `value` of all processes. All of them must call it."""
    return min(int(text) for text in gather_from_all(str(value).encode()))  # as text: JAX would cut it to 32 bits


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return not is_joined() or jax.process_index() == 0


def is_joined() -> bool:
    """Whether this process is one of several. It does not touch the devices, which may be in use or absent."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


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
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    return _as_bytes(multihost_utils.broadcast_one_to_all(_as_array(data if is_main() else b"", size)))


def gather_from_all(data: bytes) -> list[bytes]:
    """The `data` of every process, in their order, on every process. All processes must call it."""
    if not is_joined():
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
        gather_from_all(f"{isinstance(error, RequestError):d}{_sentence(error)}".encode(errors="backslashreplace"))
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


def _sentence(error: Exception) -> str:
    if isinstance(error, GlupruneError):
        return str(error)
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _as_array(data: bytes, size: int) -> NDArray[np.uint8]:
    return np.frombuffer(data.ljust(size, b"\0"), np.uint8)


def _as_bytes(array: NDArray[np.uint8]) -> bytes:
    return np.asarray(array, np.uint8).tobytes()
