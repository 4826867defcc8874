"""GGUF files of llama.cpp's quantised types, made by llama.cpp's own quantiser.

Which tensor gets which type, and the search for scales, are llama.cpp's: nothing of it is written a second time here.
Its library comes prebuilt with `pip install gluprune-jax[llama-cpp]`; without it, `llama-quantize` on the PATH is used.
"""

import errno
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from convert.gguf import libllama
from gluprune_jax.errors import OperationError, RequestError, one_line
from gluprune_jax.files.atomic import staged_file

# llama.cpp's numbers of the kinds of file that need no importance matrix.
KINDS: Mapping[str, int] = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q8_0": 7,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
}
_FULL = 1 << 20  # bytes: what a full disk may still have
_PROGRAM = "llama-quantize"
_INSTALL = "pip install 'gluprune-jax[llama-cpp]'"


def check_quantizer(target: Path, kind: str) -> None:
    """Refuses what `quantize_file` could not do, before any work is done.

    Args:
      target: the file to make, for the commands that a refusal gives.
      kind: of the file to write, as in `KINDS`.

    Raises:
      RequestError: there is no such kind, or llama.cpp is not installed.
    """
    _command(Path(f"{target.stem}-f16.gguf"), target, kind)


def quantize_file(source: Path, target: Path, kind: str, *, overwrite: bool = False) -> None:
    """Writes a GGUF file of a quantised type, whole or not at all.

    Args:
      source: a GGUF file of F32, F16 or BF16 weights.
      target: the file to make. The folders above it are made.
      kind: of the file to write, as in `KINDS`: Q4_K_M.
      overwrite: whether an existing file is replaced.

    Raises:
      RequestError: there is no such kind, llama.cpp is not installed, there is no source, or `target` exists and
        `overwrite` is not given.
      OperationError: llama.cpp refuses the source or fails, or the disk is full or otherwise unwilling.
    """
    check_quantizer(target, kind)
    if not source.is_file():
        raise RequestError(f"there is no file {source}; accepted: a GGUF file of F32, F16 or BF16 weights")
    with staged_file(target, overwrite=overwrite) as fresh:
        quantize_into(source, fresh, kind)


def quantize_into(source: Path, fresh: Path, kind: str) -> None:
    """Runs the quantiser, whose log is shown only where it fails.

    Args:
      source: a GGUF file of F32, F16 or BF16 weights.
      fresh: the file to make, which nobody reads yet.
      kind: of the file to write, as in `KINDS`.

    Raises:
      RequestError: as `check_quantizer`.
      OperationError: llama.cpp refuses the source or fails.
      OSError: the disk is full.
    """
    ended = subprocess.run(_command(source, fresh, kind), capture_output=True, text=True, errors="replace", check=False)
    if ended.returncode == 0 and fresh.is_file():
        return
    if shutil.disk_usage(fresh.parent).free < _FULL:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(fresh))
    _, said, reason = ended.stderr.rpartition("failed to quantize: ")
    reason = reason.split("\n")[0] if said else f"it ended with status {ended.returncode}"
    raise OperationError(
        f"llama.cpp cannot make {kind} of {source}: {one_line(reason, 200)}; accepted: a GGUF file of F32, F16 or BF16 "
        f"weights"
    )


def _command(source: Path, target: Path, kind: str) -> list[str]:
    if kind not in KINDS:
        raise RequestError(f"`quantize` is {kind!r}; choose from {', '.join(KINDS)}")
    if package := libllama.find():
        return [sys.executable, libllama.__file__, str(package), str(source), str(target), str(KINDS[kind])]
    if program := shutil.which(_PROGRAM):
        return [program, str(source), str(target), kind]
    by_hand = shlex.join([_PROGRAM, source.name, target.name, kind])
    raise RequestError(
        f"`quantize` {kind} is done by llama.cpp, which is not installed here: run `{_INSTALL}`, or write "
        f"{source.name} without `quantize` and run `{by_hand}` where llama.cpp is"
    )
