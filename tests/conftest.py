"""Eight simulated devices, exact matrix products, and the demo model for the tests that need real weights."""

import os

# Before jax is imported: an accelerator that happens to be there would change the numbers.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import pytest

import convert

jax.config.update("jax_default_matmul_precision", "highest")


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
