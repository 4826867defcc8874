"""Folders as stock tools write them: pruned from file to file and loaded, in memory and onto a mesh, bit for bit."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from llama_tensors import model_arrays
from safetensors.numpy import load_file
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from gluprune_jax import prune
from gluprune_jax.parallel.mesh import MeshShape, make_mesh

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore"),  # those of other projects
]

CONFIGS = {tied: hf_config(num_hidden_layers=2, tie_word_embeddings=tied) for tied in (False, True)}
WEIGHTS = {tied: hf_tensors(CONFIGS[tied]) for tied in (False, True)}
SHARD = "40KB"


def only_weights(write: Callable[[Any, Path], Any]) -> Callable[[Any, Path], None]:
    """A writer that leaves the config to the user."""

    def both(model: Any, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        write(model, folder)
        model.config.save_pretrained(folder)

    return both


def save_model(model: Any, folder: Path) -> None:
    from safetensors.torch import save_model

    save_model(model, str(folder / "model.safetensors"))


def compiled(model: Any, folder: Path) -> None:
    import torch

    save_model(torch.compile(model), folder)


def base_model(model: Any, folder: Path) -> None:
    """As a model without head; the config is that of the whole."""
    model.model.save_pretrained(folder)
    model.config.architectures = CONFIGS[True]["architectures"]
    model.config.save_pretrained(folder)


def accelerate(model: Any, folder: Path, **options: Any) -> None:
    from accelerate import Accelerator

    Accelerator(cpu=True).save_model(model, str(folder), **options)


def merged_adapter(model: Any, folder: Path) -> None:
    """The adapter changes nothing, as one does before it is trained."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    wrapped.merge_and_unload().save_pretrained(folder)


def ours(formats: str) -> Callable[[Any, Path], None]:
    def write(model: Any, folder: Path) -> None:
        source = write_folder(folder.with_name(f"{folder.name}-source"), CONFIGS[model.config.tie_word_embeddings])
        model.save_pretrained(source)
        convert.save(convert.load(source), folder, formats=[formats])

    return write


WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "transformers 5": lambda model, folder: model.save_pretrained(folder),
    "transformers 5 in shards": lambda model, folder: model.save_pretrained(folder, max_shard_size=SHARD),
    "safetensors.torch.save_model": only_weights(save_model),
    "save_model of a compiled model": only_weights(compiled),
    "peft merge_and_unload": merged_adapter,
    "accelerate save_model": only_weights(accelerate),
    "accelerate save_model in shards": only_weights(lambda model, to: accelerate(model, to, max_shard_size=SHARD)),
    "this tool": ours("hf"),
    "Orbax": ours("orbax"),
}

TRANSFORMERS_4 = """
import sys, torch, transformers
assert transformers.__version__.startswith("4.")
for source, whole, shards in zip(*[iter(sys.argv[1:])] * 3):
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model.save_pretrained(whole)
    model.save_pretrained(shards, max_shard_size="40KB")
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The weights as a folder of their own, untied and tied."""
    place = tmp_path_factory.mktemp("sources")
    return {tied: write_folder(place / str(tied), CONFIGS[tied], WEIGHTS[tied]) for tied in (False, True)}


@pytest.fixture(scope="module")
def pruned(sources: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, bytes]]:
    """What pruning these makes of them."""
    place = tmp_path_factory.mktemp("pruned")
    return {tied: prune_folder(source, place / str(tied)) for tied, source in sources.items()}


def prune_folder(folder: Path, output: Path) -> dict[str, bytes]:
    assert prune.main(["--model", str(folder), "--width", "40", "--output", str(output)]) == 0
    return {name: array.tobytes() for name, array in load_file(output / "model.safetensors").items()}


def check(folder: Path, tied: bool, expected: dict[str, bytes]) -> None:
    choice = lambda _: make_mesh(MeshShape(1, 2), 2, devices=jax.devices()[:2])  # noqa: E731
    for checkpoint in (convert.load(folder), convert.load(folder, mesh=choice)):
        for name, array in model_arrays(checkpoint.model):
            assert np.asarray(array).tobytes() == WEIGHTS[tied][name.hf].tobytes(), name.hf
    assert prune_folder(folder, folder.with_name(f"{folder.name}-pruned")) == expected


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_of_another_tool_is_read_bit_for_bit(
    sources: dict[bool, Path], pruned: dict[bool, dict[str, bytes]], tmp_path: Path, name: str, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sources[tied], dtype="auto")
    WRITERS[name](model, tmp_path / "folder")
    if "shards" in name:
        assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 2
    check(tmp_path / "folder", tied, pruned[tied])


def test_a_base_model_without_head_is_read_where_the_head_is_tied(
    sources: dict[bool, Path], pruned: dict[bool, dict[str, bytes]], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sources[True], dtype="auto")
    base_model(model, tmp_path / "folder")
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "folder" / "model.safetensors"))
    check(tmp_path / "folder", True, pruned[True])


def test_folders_of_transformers_4_are_read_bit_for_bit(
    sources: dict[bool, Path], pruned: dict[bool, dict[str, bytes]], tmp_path: Path
) -> None:
    python = os.environ.get("GLUPRUNE_TRANSFORMERS4_PYTHON")
    if not python:
        pytest.skip("GLUPRUNE_TRANSFORMERS4_PYTHON names no Python with transformers 4")
    folders = {tied: [tmp_path / str(tied) / kind for kind in ("whole", "shards")] for tied in sources}
    arguments = [path for tied, source in sources.items() for path in (source, *folders[tied])]
    done = subprocess.run([python, "-c", TRANSFORMERS_4, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for tied, places in folders.items():
        assert len(list(places[1].glob("*.safetensors"))) > 2
        for folder in places:
            check(folder, tied, pruned[tied])
