"""What a model has answered so far, in a file that grows: a killed run loses nothing that was answered.

Answers are found by their content: the key is a hash of the kind of request and all of its arguments, down to the
last byte of the prompt. A changed task, few-shot setting or data set asks other questions, and simply does not find
the old answers.
"""

import contextlib
import errno
import hashlib
import json
import math
import numbers
import os
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from gluprune_jax.errors import OperationError, RequestError, first_line
from gluprune_jax.files.records import ANYTHING, FLAG, TEXT, problem, record_of

Response = tuple[float, bool] | float | str

_ANSWER = record_of({"key": TEXT, "kind": TEXT, "value": ANYTHING}, maybe={"truncated": FLAG, "crc32": TEXT})

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")

# Every answer is handed to the system at once, which keeps it if this process is killed. Flushing to the disk guards
# against the loss of the machine, and costs tens of milliseconds on some disks.
_SECONDS_BETWEEN_FLUSHES = 1.0

# What file systems that know no locks answer, such as a Google Drive mounted on Colab.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class Answer(NamedTuple):
    """A response, and whether its context had to be truncated to the model's window."""

    response: Response
    truncated: bool


class Journal:
    """The answers of one model under one setting. One process at a time has it open, as a context manager.

    A response is `(natural logarithm of the likelihood, is greedy)` for "loglikelihood", a natural logarithm for
    "loglikelihood_rolling" and a text for "generate_until". Numbers come back with the bits they went in with.

    Requests that are sampled several times with the same arguments share one answer: only what is deterministic
    belongs here.

    Args:
      path: the file; made if it is not there.

    Raises:
      RequestError: another process has it open.
      OperationError: it is damaged, or cannot be opened.
    """

    def __init__(self, path: Path):
        self.path = path
        self._answers: dict[bytes, Answer] = {}
        self._flushed = time.monotonic()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            self._lock()
            self._size = self._read()
            # What a killed process left of its last line would run into the next one.
            os.ftruncate(self._file, self._size)
        except OSError as error:
            os.close(self._file)
            raise cannot_write(path, error) from error
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def answered(self) -> int:
        """How many different requests have been answered."""
        return len(self._answers)

    def get(self, kind: str, arguments: Sequence[Any]) -> Response | None:
        """The response to a request, or None if it has not been answered."""
        answer = self.answer(kind, arguments)
        return None if answer is None else answer.response

    def answer(self, kind: str, arguments: Sequence[Any]) -> Answer | None:
        """The response to a request with what else is known of it, or None if it has not been answered."""
        return self._answers.get(_key(kind, arguments))

    def add(self, kind: str, arguments: Sequence[Any], response: Response, *, truncated: bool = False) -> None:
        """Records the response to a request. The first response to a request stays; later ones are not recorded.

        Args:
          kind: one of `KINDS`.
          arguments: what lm-eval calls the request's arguments: everything the response depends on.
          response: see the class.
          truncated: the context was cut to fit the model's window.

        Raises:
          OperationError: the response is not a finite number, or the disk refuses.
        """
        key = _key(kind, arguments)
        if key in self._answers:
            return
        answer = Answer(_checked(kind, response), truncated)
        value = answer.response[0] if isinstance(answer.response, tuple) else answer.response
        if isinstance(value, float) and not math.isfinite(value):
            raise OperationError(
                f"non-finite answer ({value}) to a {kind} request; check the weights, or use `dtype` float32"
            )
        record: dict[str, Any] = {"key": key.hex(), "kind": kind, "value": answer.response}
        if truncated:
            record["truncated"] = True
        record["crc32"] = _checksum(record)
        self._append(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self._answers[key] = answer
        if time.monotonic() - self._flushed >= _SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def flush(self) -> None:
        """Makes sure that the answers survive the loss of the machine.

        Raises:
          OperationError: the disk refuses.
        """
        try:
            os.fsync(self._file)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and lets other processes open the file.

        Raises:
          OperationError: the disk refuses.
        """
        try:
            self.flush()
        finally:
            os.close(self._file)  # and with it the lock

    def _append(self, line: bytes) -> None:
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)  # a full disk takes half a line
            raise cannot_write(self.path, error) from error
        self._size += len(line)

    def _lock(self) -> None:
        if sys.platform == "win32":  # there is no flock; JAX runs there on the CPU alone
            return
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RequestError(
                f"{self.path} is being written by another run of the same model and setting; wait for it, or choose "
                f"another `output`"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise

    def _read(self) -> int:
        """Reads all whole lines and returns the bytes they take."""
        with open(self._file, "rb", closefd=False) as file:
            size = 0
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    key, answer = _parsed(line)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise OperationError(
                        f"{self.path}, line {number}: not an answer as this program writes them ({first_line(error)}); "
                        f"delete the line, and the request will be asked again"
                    ) from error
                self._answers.setdefault(key, answer)
                size += len(line)
        return size


def request_key(kind: str, arguments: Sequence[Any]) -> str:
    """Identifies a request by its content: 64 hexadecimal digits."""
    return _key(kind, arguments).hex()


def _key(kind: str, arguments: Sequence[Any]) -> bytes:
    text = json.dumps([kind, list(arguments)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def _parsed(line: bytes) -> tuple[bytes, Answer]:
    record = json.loads(line)
    if wrong := problem(record, _ANSWER):
        raise ValueError(wrong)
    if record.pop("crc32", (checksum := _checksum(record))) != checksum:
        raise ValueError("its crc32 is not that of its content")
    key = bytes.fromhex(record["key"])
    if len(key) != hashlib.sha256().digest_size:
        raise ValueError(f"a key of {len(key)} bytes")
    value = tuple(record["value"]) if isinstance(record["value"], list) else record["value"]
    answer = Answer(_checked(record["kind"], value), record.get("truncated", False))
    number = answer.response[0] if isinstance(answer.response, tuple) else answer.response
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"an answer of {number}")
    return key, answer


def _checksum(record: Mapping[str, Any]) -> str:
    """The CRC-32 of an answer's content, eight hexadecimal digits: of millions of short lines, as little as will do."""
    content = {name: value for name, value in record.items() if name != "crc32"}
    return f"{zlib.crc32(json.dumps(content, sort_keys=True, separators=(',', ':')).encode()):08x}"


def _checked(kind: str, response: Any) -> Response:
    """The response with numpy's scalars made Python's; anything else than the kind's type is a ValueError."""
    match kind, response:
        case "loglikelihood", (numbers.Real() as value, bool() | np.bool() as is_greedy):
            return _float(value), bool(is_greedy)
        case "loglikelihood_rolling", numbers.Real() as value:
            return _float(value)
        case "generate_until", str(text):
            return text
    raise ValueError(f"{str(response)[:40]!r} is no response to a request of kind {kind!r}")


def _float(value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError as error:  # a whole number of 400 digits
        raise ValueError("a number too large for a float") from error


def cannot_write(path: Path, error: OSError) -> OperationError:
    """The error for a file of results that the disk refuses."""
    return OperationError(
        f"cannot write {path}: {error.strerror or error}; what was answered so far is kept, and the same command "
        f"continues from there"
    )
