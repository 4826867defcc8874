"""Pruning from file to file: the same bits as in memory, with a few tensors in memory at a time."""

import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from inspecting import contents
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from gluprune_jax import make_plan, score
from gluprune_jax.cli.report import changes
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.pruning.criteria import WEIGHT_CRITERIA
from gluprune_jax.pruning.scores import fingerprint

CONFIG = hf_config(num_hidden_layers=4)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Three dtypes in one checkpoint, in two shards."""
    tensors = hf_tensors(CONFIG)
    for name, dtype in (("gate_proj", "bfloat16"), ("up_proj", "bfloat16"), ("q_proj", "float16")):
        tensors |= {key: t for key, t in hf_tensors(CONFIG, dtype).items() if name in key}
    return write_folder(tmp_path / "model", CONFIG, tensors, shards=2)


def prune(path: Path, output: Path, stream: bool, criterion: str = "ppm", **target: Any) -> Path:
    options = {key: target.pop(key) for key in ("dtype", "formats") if key in target}
    checkpoint = convert.load(path, stream=stream, dtype=options.get("dtype"))
    scores = score(checkpoint.model, criterion, weights=checkpoint.mlp_weights())
    convert.save(checkpoint.pruned(make_plan(scores, **target)), output, formats=options.get("formats", ["hf"]))
    return output


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
def test_the_same_bits_as_in_memory(model: Path, tmp_path: Path, criterion: str, dtype: str | None) -> None:
    target = {"criterion": criterion, "dtype": dtype, "prune_percent": 30}
    streamed = prune(model, tmp_path / "streamed", True, **target)
    assert contents(streamed) == contents(prune(model, tmp_path / "loaded", False, **target))


def test_layers_of_different_widths_pruned_again(model: Path, tmp_path: Path) -> None:
    for stream in (True, False):
        once = prune(model, tmp_path / f"once-{stream}", stream, width=50, layers=[0, 2])
        prune(once, tmp_path / f"twice-{stream}", stream, width=40, layers=[0, 1])
    assert contents(tmp_path / "once-True") == contents(tmp_path / "once-False")
    twice = {stream: contents(tmp_path / f"twice-{stream}") for stream in (True, False)}
    for files in twice.values():  # they name where they came from
        del files["gluprune_history.json"]
    assert twice[True] == twice[False]
    assert convert.load(tmp_path / "twice-True").config.intermediate_sizes == (40, 40, 50, 80)


def test_a_plan_upon_a_plan(model: Path, tmp_path: Path) -> None:
    """Without writing in between: the second plan counts the neurons that the first one left."""
    for stream in (True, False):
        checkpoint = convert.load(model, stream=stream)
        for width in (60, 30):
            scores = score(checkpoint.model, "l2", weights=checkpoint.mlp_weights())
            checkpoint = checkpoint.pruned(make_plan(scores, width=width))
        convert.save(checkpoint, tmp_path / str(stream))
    assert contents(tmp_path / "True") == contents(tmp_path / "False")


def test_orbax_output(model: Path, tmp_path: Path) -> None:
    output = prune(model, tmp_path / "out", True, width=50, formats=["hf", "orbax"])
    a, b = (nnx.state(convert.load(path).model, nnx.Param) for path in (output, output / "orbax"))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_fingerprint_and_report(model: Path) -> None:
    streamed, loaded = (convert.load(model, stream=stream) for stream in (True, False))
    assert fingerprint(streamed.model, weights=streamed.mlp_weights()) == fingerprint(loaded.model)
    plan = make_plan(score(loaded.model), width=50)
    assert changes(streamed.config, streamed.num_bytes, plan) == changes(loaded.config, loaded.num_bytes, plan)


def test_a_few_tensors_in_memory(tmp_path: Path) -> None:
    config = hf_config(num_hidden_layers=24, intermediate_size=2048)
    tensors = hf_tensors(config)
    path = write_folder(tmp_path / "model", config, tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    matrix = tensors["model.layers.0.mlp.gate_proj.weight"].nbytes
    del tensors
    prune(path, tmp_path / "warm", True, width=1024)  # compiles; the caches of the compiler are not what is measured
    tracemalloc.start()
    try:
        prune(path, tmp_path / "out", True, width=1024)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < total / 4
    assert peak < 16 * matrix


def test_damage_is_found_when_it_is_read_and_nothing_is_written(tmp_path: Path) -> None:
    tensors = hf_tensors(CONFIG)
    tensors["model.layers.3.self_attn.o_proj.weight"][1, 2] = np.inf
    path = write_folder(tmp_path / "model", CONFIG, tensors)
    with pytest.raises(OperationError, match=r"model\.layers\.3\.self_attn\.o_proj\.weight has NaN or Inf"):
        prune(path, tmp_path / "out", True, width=50)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_file_that_changes_between_scoring_and_writing(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "model", CONFIG)
    checkpoint = convert.load(path, stream=True)
    plan = make_plan(score(checkpoint.model, weights=checkpoint.mlp_weights()), width=50)
    write_folder(path, CONFIG, hf_tensors(CONFIG, seed=1))
    with pytest.raises(OperationError, match=r"model\.safetensors has changed since it was opened"):
        convert.save(checkpoint.pruned(plan), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_for_another_shape(model: Path) -> None:
    checkpoint = convert.load(model, stream=True)
    plan = make_plan(score(checkpoint.model, weights=checkpoint.mlp_weights()), width=50)
    with pytest.raises(RequestError, match="this model has 4 layers of 50 neurons"):
        checkpoint.pruned(plan).pruned(plan)
