"""Eight simulated devices, exact products, a quick compiler, and the demo model for tests that need real weights."""

import atexit
import ctypes
import gc
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import quick_compiler

# Before jax is imported: an accelerator that happens to be there would change the numbers.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
if "GLUPRUNE_TEST_OPTIMIZED" not in os.environ:
    # The tests compile thousands of tiny programs and run each of them a few times: code that is not optimised costs a
    # quarter of the time. `make parity` and `make test-processes` compile as users do.
    os.environ["XLA_FLAGS"] += f" {quick_compiler.FLAGS}"
# What a command prints, here or in a process of its own, must not depend on how busy the machine is.
os.environ["GLUPRUNE_PROGRESS_SECONDS"] = "inf"
os.environ.setdefault(
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0"
)  # where an operation was called costs a tenth of lowering it
# Programs that are the same are compiled once, whichever test, file or process of a worker comes first.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="gluprune-tests-", ignore_cleanup_errors=True)
    atexit.register(_compiled.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
if (cache := os.environ["JAX_COMPILATION_CACHE_DIR"]) and "PYTEST_XDIST_WORKER" in os.environ:
    # To each worker its own: JAX writes entries not in one piece, and its warning of a torn one is an error here.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{cache}/{os.environ['PYTEST_XDIST_WORKER']}"

import jax
import pytest

import convert
from gluprune_jax import make_plan, score

jax.config.update("jax_default_matmul_precision", "highest")


def _give_memory_back() -> None:
    """The C library keeps what was freed between two things that are still there: gigabytes, after some tests."""
    jax.clear_caches()
    gc.collect()  # models that hold themselves in a circle
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
    _Grown.last = max(700_000_000, _resident_bytes())


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def pytest_collection_finish() -> None:
    """What is imported stays: looking through it again and again for garbage costs a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


class _Grown:
    """Where this process stood when memory was last given back, in bytes."""

    last = 700_000_000


@pytest.fixture(autouse=True)
def _stay_small() -> Iterator[None]:
    """Workers stay below 2 GB: a program takes a megabyte or two, and what is compiled again is found on the disk."""
    yield
    if _resident_bytes() > _Grown.last + 200_000_000:
        _give_memory_back()


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Programs for eight devices take gigabytes over a whole run, and few serve more than one file."""
    yield
    _give_memory_back()


@pytest.fixture(scope="session")
def demo() -> convert.Checkpoint:
    """SmolLM2-135M-Instruct in float32. Shared by all tests of a process: not to be changed or donated."""
    return convert.load("demo")


@pytest.fixture
def shallow_demo(demo: convert.Checkpoint) -> convert.Checkpoint:
    """The first six of its thirty layers: real weights, for what takes several models or many passes."""
    return demo.pruned(make_plan(score(demo.model), drop_layers=range(6, 30)))


@pytest.fixture(scope="session")
def demo_folder(demo: convert.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("demo") / "smollm2"
    convert.save(demo, folder)
    return str(folder)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is marked `torch` is skipped without it, before any of its fixtures begins."""
    if item.get_closest_marker("torch"):
        pytest.importorskip("torch", reason="compares with PyTorch: pip install gluprune-jax[parity]")


@pytest.fixture
def load_reference() -> Callable[[str | Path], Any]:
    """Loads a folder as `transformers` does, in float32 on PyTorch."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # ten times faster where XLA's threads want the same cores
    return lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _how_to_run(report: Any) -> str:
    """What a skipped test is about, and how it runs after all."""
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple | list) else report.longrepr)
    if "transformers 4" in reason:
        return "compare with transformers 4: name a Python that has it in GLUPRUNE_TRANSFORMERS4_PYTHON"
    if "torch" in getattr(report, "keywords", ()) or "PyTorch" in reason or "torch" in reason:
        return "compare with PyTorch and OptiPFair: make parity"
    if "llama.cpp" in reason:
        return "run llama.cpp on files that we write: pip install -e '.[llama-cpp]'"
    if "browser" in reason or "Chromium" in reason or "axe" in reason:
        return "look at the report in a browser: pip install -e '.[browser]' and Chromium, then pytest -m browser"
    if "GLUPRUNE_DATA" in reason or "NLTK_DATA" in reason:
        return "need the benchmark data: set GLUPRUNE_DATA and NLTK_DATA (CONTRIBUTING.md)"
    if "notebooks" in reason:
        return "compare the files of each notebook: make notebooks"
    return "need what this machine lacks: the reasons stand above"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Iterator[None]:
    """After the reasons that pytest lists: in few words, what was not run and how to run it."""
    yield
    counts = Counter(_how_to_run(report) for report in terminalreporter.stats.get("skipped", []))
    lines = [f"{count} {what}" for what, count in counts.most_common()]
    if config.getoption("markexpr") == "not slow and not optimised":
        lines.append("those that start several processes or need an optimising compiler: make test-processes")
    if lines:
        terminalreporter.section("not run here")
        for line in lines:
            terminalreporter.line(line)
