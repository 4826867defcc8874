"""What goes from file to file imports no JAX: that is most of the time of a small model, and takes a TPU's devices."""

import subprocess
import sys
from pathlib import Path

import pytest
from inspecting import contents
from tiny_mixtures import CONFIGS as MIXTURES
from tiny_mixtures import write_mixture
from tiny_models import hf_config, write_folder

PROGRAM = """
import sys
from gluprune_jax.cli.main import main

status = main(sys.argv[1:])
heavy = {"jax", "flax", "optax", "orbax", "chex", "transformers", "torch"}
print(",".join(sorted(heavy & sys.modules.keys())), file=sys.stderr)
sys.exit(status)
"""


def imported_by(*argv: object) -> str:
    """Which of these heavy packages a command imports."""
    command = [sys.executable, "-c", PROGRAM, *map(str, argv)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", hf_config(num_hidden_layers=3), shards=2)


def test_pruning_by_ppm(model: Path, tmp_path: Path) -> None:
    target = ("--model", model, "--prune-percent", 20, "--drop-layers", 1)
    assert imported_by("prune", *target, "--output", tmp_path / "out") == ""
    assert imported_by("prune", *target, "--output", tmp_path / "out.gguf", "--format", "gguf") == ""
    assert imported_by("prune", *target, "--plan-out", tmp_path / "plan.json") == ""
    replay = ("--model", model, "--plan", tmp_path / "plan.json", "--output", tmp_path / "replayed")
    assert imported_by("prune", *replay) == ""
    assert contents(tmp_path / "replayed")["model.safetensors"] == contents(tmp_path / "out")["model.safetensors"]


def test_other_criteria_are_programs_of_jax(model: Path, tmp_path: Path) -> None:
    argv = ("--model", model, "--prune-percent", 20, "--criterion", "vow", "--output", tmp_path / "out")
    assert "jax" in imported_by("prune", *argv)


def test_pruning_experts_by_ppm(tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "model", next(iter(MIXTURES.values())))
    assert imported_by("prune", "--model", folder, "--prune-percent", 20, "--output", tmp_path / "out") == ""


def test_converting(model: Path, tmp_path: Path) -> None:
    assert imported_by("convert", model, tmp_path / "out") == ""
    assert imported_by("convert", model, tmp_path / "out.gguf") == ""
