"""Eight simulated devices, exact matrix products, and the demo model for the tests that need real weights."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before jax is imported: an accelerator that happens to be there would change the numbers.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
if (cache := os.environ.get("JAX_COMPILATION_CACHE_DIR")) and "PYTEST_XDIST_WORKER" in os.environ:
    # To each worker its own: JAX writes entries not in one piece, and its warning of a torn one is an error here.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{cache}/{os.environ['PYTEST_XDIST_WORKER']}"

import jax
import pytest

import convert

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Programs for eight devices take gigabytes over a whole run, and few serve more than one file."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def demo() -> convert.Checkpoint:
    """SmolLM2-135M-Instruct in float32. Shared by all tests of a process: not to be changed or donated."""
    return convert.load("demo")


@pytest.fixture(scope="session")
def demo_folder(demo: convert.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("demo") / "smollm2"
    convert.save(demo, folder)
    return str(folder)


@pytest.fixture
def load_reference() -> Callable[[str | Path], Any]:
    """Loads a folder as `transformers` does, in float32 on PyTorch."""
    torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install gluprune-jax[parity]")
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # ten times faster where XLA's threads want the same cores
    return lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
