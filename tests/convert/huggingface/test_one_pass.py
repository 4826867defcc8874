"""Pruning in one pass: the same bytes as scoring first, every byte read once, and nothing left if it fails."""

import dataclasses
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inspecting import contents
from numpy.typing import NDArray
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.huggingface.one_pass import KeptNeurons, can_read_once
from convert.huggingface.streamed import StreamedCheckpoint
from convert.store import save_pruned
from gluprune_jax import make_plan, score
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.pruning.calibration import collect
from gluprune_jax.pruning.criteria import WEIGHT_CRITERIA
from gluprune_jax.pruning.one_pass import Ranking, Replay
from gluprune_jax.pruning.scores import MLPWeights, fingerprint

CONFIG = hf_config(num_hidden_layers=4)
TARGETS: dict[str, dict[str, Any]] = {
    "uniform": {"prune_percent": 30},
    "some layers": {"width": 50, "layers": [0, 2]},
    "fewer layers": {"width": 50, "drop_layers": [1, 3]},
    "only fewer layers": {"drop_layers": [0]},
}


def opened(path: Path, dtype: str | None = None) -> StreamedCheckpoint:
    checkpoint = convert.load(path, stream=True, dtype=dtype)
    assert isinstance(checkpoint, StreamedCheckpoint)
    return checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", CONFIG, shards=2)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
def test_the_same_bytes_as_scoring_first(model: Path, tmp_path: Path, criterion: str, target: dict[str, Any]) -> None:
    dense = opened(model, "bfloat16" if criterion == "l2" else None)
    plan = make_plan(score(dense.model, criterion, weights=dense.mlp_weights()), **target)
    convert.save(dense.pruned(plan), tmp_path / "scored first", pad_to=32)
    _, found = save_pruned(dense, Ranking(dense.config, criterion, target), tmp_path / "once", pad_to=32)
    assert found.to_json() == plan.to_json()
    assert contents(tmp_path / "once") == contents(tmp_path / "scored first")
    save_pruned(dense, Replay(dense.config, plan), tmp_path / "replayed", pad_to=32)
    assert contents(tmp_path / "replayed") == contents(tmp_path / "once")


def test_pruned_again(model: Path, tmp_path: Path) -> None:
    """What was pruned before, in memory or in files with padding, is dense to the next pruning."""
    dense = opened(model)
    once, _ = save_pruned(dense, Ranking(dense.config, "ppm", {"width": 50, "layers": [0]}), tmp_path / "once")
    read = opened(tmp_path / "once")
    for name, checkpoint in (("files", read), ("memory", once)):
        assert isinstance(checkpoint, StreamedCheckpoint)
        save_pruned(checkpoint, Ranking(read.config, "ppm", {"width": 40}), tmp_path / name)
    files, memory = contents(tmp_path / "files"), contents(tmp_path / "memory")
    assert files.pop("gluprune_history.json") != memory.pop("gluprune_history.json")  # they name where they came from
    assert files == memory


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("matrix", ["mlp.gate_proj", "mlp.down_proj", "self_attn.o_proj"])
def test_damage_anywhere_leaves_nothing(tmp_path: Path, layer: int, matrix: str) -> None:
    tensors = hf_tensors(CONFIG)
    tensors[f"model.layers.{layer}.{matrix}.weight"][1, 2] = np.nan
    dense = opened(write_folder(tmp_path / "model", CONFIG, tensors))
    target = {"width": 50, "drop_layers": [3]} if matrix.startswith("mlp") else {"width": 50}
    with pytest.raises(OperationError, match=rf"model\.layers\.{layer}\.{matrix}\.weight has NaN or Inf"):
        save_pruned(dense, Ranking(dense.config, "ppm", target), tmp_path / "out")
    assert os.listdir(tmp_path) == ["model"]


def test_a_plan_for_other_weights_leaves_nothing(model: Path, tmp_path: Path) -> None:
    dense = opened(model)
    plan = make_plan(score(dense.model, weights=dense.mlp_weights()), width=50)
    other = dataclasses.replace(plan, fingerprint="sha256:" + "0" * 64)
    with pytest.raises(RequestError, match="made for other weights"):
        save_pruned(dense, Replay(dense.config, other), tmp_path / "out")
    assert os.listdir(tmp_path) == ["model"]


def test_statistics_are_of_the_weights_that_are_read(tmp_path: Path) -> None:
    model, other = (write_folder(tmp_path / str(seed), CONFIG, hf_tensors(CONFIG, seed=seed)) for seed in (0, 1))
    dense = opened(model)
    statistics = collect(dense.runnable_model(), np.arange(64, dtype=np.int32).reshape(2, 32))
    scores = score(dense.model, "wanda", statistics=statistics, weights=dense.mlp_weights())
    choice = Ranking(dense.config, "wanda", {"width": 50}, statistics=statistics)
    _, plan = save_pruned(dense, choice, tmp_path / "out")
    assert plan.to_json() == make_plan(scores, width=50).to_json()
    choice = Ranking(dense.config, "wanda", {"width": 50}, statistics=statistics)
    with pytest.raises(RequestError, match=r"other weights|another model"):
        save_pruned(opened(other), choice, tmp_path / "refused")
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "out"]


def test_matrices_of_several_dtypes_are_scored_first(tmp_path: Path) -> None:
    """Files begin with the widest elements: the narrow matrices of all layers would have to wait in memory."""
    tensors = hf_tensors(CONFIG)
    narrow = {name: tensor for name, tensor in hf_tensors(CONFIG, "bfloat16").items() if "up_proj" in name}
    path = write_folder(tmp_path / "model", CONFIG, tensors | narrow)
    assert not can_read_once(opened(path))
    assert can_read_once(opened(path, "bfloat16"))


def cut(dense: StreamedCheckpoint, weights: Iterable[MLPWeights[Any]]) -> None:
    kept = KeptNeurons(weights, Ranking(dense.config, "ppm", {"width": 8}))
    for layer in range(dense.config.num_hidden_layers):
        assert kept.matrix(layer, "gate_proj").shape[0] == 8
    kept.finish()


def scored(dense: StreamedCheckpoint, weights: Iterable[MLPWeights[Any]]) -> None:
    score(dense.model, "ppm", weights=weights)


def fingerprinted(dense: StreamedCheckpoint, weights: Iterable[MLPWeights[Any]]) -> None:
    fingerprint(dense.model, weights=weights)


@pytest.mark.parametrize("use", [cut, scored, fingerprinted])
def test_a_layer_is_let_go_before_the_next_is_asked_for(
    model: Path, use: Callable[[StreamedCheckpoint, Iterable[MLPWeights[Any]]], None]
) -> None:
    dense = opened(model)
    seen: list[weakref.ref[NDArray[Any]]] = []

    def watched() -> Iterator[MLPWeights[Any]]:
        weights = dense.mlp_weights()
        while (mlp := next(weights, None)) is not None:
            seen.extend(map(weakref.ref, mlp))
            yield mlp
            del mlp
            assert [ref() for ref in seen] == [None] * len(seen)

    use(dense, watched())
    assert len(seen) == 3 * dense.config.num_hidden_layers


COUNTED = """
import sys
from gluprune_jax.prune import main

def counters():
    return {key: int(value) for key, value in (line.split(": ") for line in open("/proc/self/io"))}

import gluprune_jax.prune.run  # what Python itself reads
import convert.tokenizer
before = counters()
status = main(sys.argv[1:])
after = counters()
print(after["rchar"] - before["rchar"], after["wchar"] - before["wchar"], file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system counts no bytes")
def test_every_byte_is_read_and_written_once(tmp_path: Path) -> None:
    config = hf_config(num_hidden_layers=8, hidden_size=512, intermediate_size=4096)
    path = write_folder(tmp_path / "model", config)
    argv = ["--model", str(path), "--prune-percent", "20", "--output", str(tmp_path / "out"), "--json"]
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, *argv], capture_output=True, text=True, check=True, env=environment
    )
    read, written = map(int, done.stderr.splitlines()[-1].split())
    sizes = {folder: sum(file.stat().st_size for file in (tmp_path / folder).iterdir()) for folder in ("model", "out")}
    assert read <= 1.03 * sizes["model"]
    assert written <= 1.01 * sizes["out"]


def test_what_is_refused_once_is_refused_to_all_who_ask(tmp_path: Path) -> None:
    """Files are written on several threads: another one must neither go on with what follows nor run out of it."""
    tensors = hf_tensors(CONFIG)
    last = CONFIG["num_hidden_layers"] - 1
    tensors[f"model.layers.{last}.mlp.up_proj.weight"][0, 0] = np.nan
    dense = opened(write_folder(tmp_path / "model", CONFIG, tensors))
    kept = KeptNeurons(dense.mlp_weights(), Ranking(dense.config, "ppm", {"width": 8}))
    for name in ("gate_proj", "up_proj", "down_proj"):
        with pytest.raises(OperationError, match=rf"layers\.{last}\.mlp\.up_proj\.weight.*NaN or Inf"):
            kept.matrix(last, name)
