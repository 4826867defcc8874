"""Orbax checkpoints: bit for bit, self-describing, and one sentence when something is wrong with one."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

from gluprune_jax import checkpoint
from gluprune_jax.checkpoint import is_orbax, load_orbax, save_orbax
from gluprune_jax.errors import GlupruneError, OperationError, RequestError
from gluprune_jax.model import Llama, Llama3Rope, ModelConfig, abstract_model

CONFIG = ModelConfig(
    vocab_size=37,
    hidden_size=8,
    intermediate_sizes=(12, 7),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=Llama3Rope(32.0, 1.0, 4.0, 8192),
)
CONFIGS = {
    "untied": CONFIG,
    "tied": dataclasses.replace(CONFIG, tie_word_embeddings=True, rope_scaling=None),
    "padded": dataclasses.replace(CONFIG, width_multiple=8),
}
METADATA = {"plan": {"keep": [[1, 2], [0]]}, "source": "somebody/model", "note": None, "seed": 0.1}


def make_model(config: ModelConfig) -> Llama:
    """Random weights of three dtypes, with a few values that are easily lost."""
    graphdef, state = nnx.split(abstract_model(config))
    random = np.random.default_rng(0)
    dtypes = {"gate_proj": jnp.bfloat16, "embed_tokens": jnp.bfloat16, "q_proj": jnp.float16}
    flat = [
        (path, leaf.replace(jnp.asarray(random.normal(size=leaf.get_value().shape), dtypes.get(path[-1], jnp.float32))))
        for path, leaf in nnx.to_flat_state(state)
    ]
    model: Llama = nnx.merge(graphdef, nnx.from_flat_state(flat))
    model.norm.weight.set_value(jnp.array([np.nan, -np.inf, -0.0, 1e-40, 1, 2, 3, 4], jnp.float32))
    return model


def arrays(model: Llama) -> dict[tuple[Any, ...], Any]:
    return {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "orbax"
    save_orbax(path, make_model(CONFIG), METADATA)
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_a_round_trip_changes_no_bit(tmp_path: Path, name: str) -> None:
    model = make_model(CONFIGS[name])
    save_orbax(tmp_path / "orbax", model, METADATA)
    loaded, metadata = load_orbax(tmp_path / "orbax")
    assert loaded.config == CONFIGS[name]
    assert metadata == METADATA
    before, after = arrays(model), arrays(loaded)
    assert before.keys() == after.keys()
    for path, array in before.items():
        assert after[path].dtype == array.dtype, path
        assert after[path].shape == array.shape, path
        assert np.asarray(after[path]).tobytes() == np.asarray(array).tobytes(), path
    assert len({array.dtype for array in before.values()}) == 3


def test_a_loaded_model_runs(tmp_path: Path) -> None:
    model = make_model(CONFIGS["padded"])
    model.norm.weight.set_value(jnp.ones(8))
    save_orbax(tmp_path / "orbax", model, {})
    loaded, _ = load_orbax(tmp_path / "orbax")
    forward = nnx.jit(lambda model: model.logits(model(jnp.arange(5)[None])[0]))
    assert np.isfinite(forward(model)).all()
    np.testing.assert_array_equal(forward(loaded), forward(model))


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_orbax(Path("orbax"), make_model(CONFIG), {})
    assert load_orbax(Path("orbax"))[0].config == CONFIG


def test_what_is_an_orbax_checkpoint(saved: Path) -> None:
    assert is_orbax(saved)
    assert not is_orbax(saved.parent)
    assert not is_orbax(saved / "params")
    assert not is_orbax(saved.parent / "nothing")


@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring:UserWarning")
def test_anybody_can_read_the_arrays(saved: Path) -> None:
    params = ocp.load_checkpointables(saved)["params"]
    model = make_model(CONFIG)
    np.testing.assert_array_equal(params["layers"]["1"]["mlp"]["down_proj"], model.layers[1].mlp.down_proj[...])


ON_FOUR_DEVICES = """
import pathlib, sys
import jax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from gluprune_jax.checkpoint import load_orbax, save_orbax

small, large = map(pathlib.Path, sys.argv[1:])
mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))

def rule(path, leaf):
    assert isinstance(leaf, jax.ShapeDtypeStruct)
    return NamedSharding(mesh, {"q_proj": P("model"), "down_proj": P(None, "model")}.get(path[-1], P()))

model, metadata = load_orbax(small, rule)
layer = model.layers[0]
assert layer.self_attn.q_proj[...].sharding.spec == P("model")
assert layer.mlp.down_proj[...].sharding.spec == P(None, "model")
assert {shard.data.shape for shard in layer.mlp.down_proj[...].addressable_shards} == {(8, 4)}
save_orbax(large, model, metadata)
"""


def test_from_one_device_to_four_and_back_without_a_word(tmp_path: Path) -> None:
    model = make_model(CONFIGS["padded"])
    save_orbax(tmp_path / "one", model, METADATA)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", ON_FOUR_DEVICES, tmp_path / "one", tmp_path / "four"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    loaded, metadata = load_orbax(tmp_path / "four")
    assert metadata == METADATA
    for path, array in arrays(model).items():
        assert np.asarray(arrays(loaded)[path]).tobytes() == np.asarray(array).tobytes(), path
        assert arrays(loaded)[path].devices() == {jax.devices()[0]}, path


# --------------------------------------------------------------------------------------------------- refusals


def test_nothing_is_overwritten(saved: Path) -> None:
    with pytest.raises(RequestError, match="exists"):
        save_orbax(saved, make_model(CONFIG), {})
    assert load_orbax(saved)[1] == METADATA


def test_metadata_cannot_hide_the_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['config'\]"):
        save_orbax(tmp_path / "orbax", make_model(CONFIG), {"config": 1})


def test_what_is_no_checkpoint_of_ours(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing is not an Orbax checkpoint"):
        load_orbax(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RequestError, match="is not an Orbax checkpoint"):
        load_orbax(tmp_path)
    ocp.save(tmp_path / "foreign", {"params": jnp.ones(3)})
    assert is_orbax(tmp_path / "foreign")
    with pytest.raises(RequestError, match=r"foreign is not an Orbax checkpoint of gluprune.*no files\.json"):
        load_orbax(tmp_path / "foreign")


def edit_custom(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Changes the custom metadata as another version of this package would have written it."""
    file = path / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text())
    edit(content["custom_metadata"])
    file.write_text(json.dumps(content))
    (path / "files.json").write_text(json.dumps(checkpoint._sizes(path)))


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], type[GlupruneError], str]] = {
    "foreign": (lambda m: m.pop("format"), RequestError, "its metadata has no format 'gluprune-orbax'"),
    "newer": (lambda m: m.update(version=2), RequestError, "has version 2 of the format .*; this gluprune reads 1"),
    "no config": (lambda m: m.pop("config"), OperationError, "config of the checkpoint .* cannot be read"),
    "missing": (lambda m: m["config"].pop("head_dim"), RequestError, "the config of .* has no head_dim"),
    "unknown": (lambda m: m["config"].update(bias=True), RequestError, "the config of .* has an unknown bias"),
    "both": (
        lambda m: [m["config"].update(bias=True), m["config"].pop("vocab_size")],
        RequestError,
        "has no vocab_size, an unknown bias",
    ),
    "rope": (
        lambda m: m["config"]["rope_scaling"].update(rope_type="yarn"),
        RequestError,
        r"config\.rope_scaling of .* has an unknown rope_type",
    ),
    "type": (lambda m: m["config"].update(vocab_size="37"), OperationError, "cannot be read"),
    "value": (lambda m: m["config"].update(head_dim=3), RequestError, "head_dim = 3"),
    "layers": (
        lambda m: m["config"].update(intermediate_sizes=[12]),
        OperationError,
        r"layers\.1\.mlp\.gate_proj is unexpected",
    ),
    "tied": (lambda m: m["config"].update(tie_word_embeddings=True), OperationError, "lm_head is unexpected"),
    "width": (
        lambda m: m["config"].update(intermediate_sizes=[12, 6]),
        OperationError,
        r"layers\.1\.mlp\.down_proj is \[8, 7\] instead of \[8, 6\]",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_config_we_do_not_know(saved: Path, name: str) -> None:
    edit, kind, message = EDITS[name]
    edit_custom(saved, edit)
    with pytest.raises(kind, match=message):
        load_orbax(saved)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


DAMAGE = [
    (cut, "_CHECKPOINT_METADATA", "has [0-9,]+ bytes instead of [0-9,]+"),
    (cut, "params/ocdbt.process_0/d/*", "has [0-9,]+ bytes instead of [0-9,]+"),
    (cut, "params/manifest.ocdbt", r"manifest\.ocdbt has [0-9,]+ bytes instead of [0-9,]+"),
    (cut, "files.json", r"files\.json cannot be read"),
    (remove, "params/ocdbt.process_0/d/*", "is missing"),
    (remove, "params/_METADATA", "params/_METADATA is missing"),
    (remove, "params", "is missing"),
]


@pytest.mark.parametrize(("damage", "pattern", "message"), DAMAGE)
def test_damage_is_one_sentence(
    saved: Path, damage: Callable[[Path], None], pattern: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    files = list(saved.glob(pattern))
    assert files
    for file in files:
        damage(file)
    with pytest.raises(OperationError, match=message):
        load_orbax(saved)
    assert capfd.readouterr() == ("", "")


def test_unfinished_writing(saved: Path) -> None:
    (saved / "files.json").unlink()
    with pytest.raises(RequestError, match="writing was not finished"):
        load_orbax(saved)
    (saved / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(RequestError, match="writing was not finished"):
        load_orbax(saved)


def test_what_orbax_itself_raises_is_one_sentence(
    saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Damage that keeps the sizes is found by Orbax, if at all."""
    file = saved / "params" / "_METADATA"
    file.write_bytes(b"?" * file.stat().st_size)
    with pytest.raises(OperationError, match="is damaged or cannot be read: Orbax finds no arrays in params"):
        load_orbax(saved)
    assert caplog.records == []
    edit_custom(saved, lambda metadata: None)

    def failing(*args: object, **kwargs: object) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand more")

    monkeypatch.setattr(ocp, "save_checkpointables", failing)
    with pytest.raises(OperationError, match=r"cannot write the Orbax checkpoint .*No space left on device$"):
        save_orbax(saved.parent / "full", make_model(CONFIG), {})


def test_orbax_is_not_imported_before_it_is_used() -> None:
    code = "import sys, gluprune_jax.checkpoint; sys.exit('orbax.checkpoint.experimental.v1' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
