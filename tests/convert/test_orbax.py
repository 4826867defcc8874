"""Orbax checkpoints: bit for bit, self-describing, and one sentence when something is wrong with one."""

import asyncio
import dataclasses
import json
import os
import re
import shutil
import signal
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
from inspecting import arrays
from orbax.checkpoint import v1 as ocp
from orbax_checkpoints import load_orbax
from sharded import shard_model
from tiny_config import one_rope, tiny_config

from convert import orbax
from convert.orbax import save_orbax
from gluprune_jax.errors import GlupruneError, OperationError, RequestError
from gluprune_jax.files import orbax as orbax_files
from gluprune_jax.files.orbax import is_orbax
from gluprune_jax.models.config import LayerAttention, Llama3Rope, ModelConfig, Rope
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model
from gluprune_jax.parallel.mesh import MeshShape, make_mesh, parameter_sharding

CONFIG = tiny_config(
    vocab_size=37,
    hidden_size=8,
    intermediate_sizes=(12, 7),
    head_dim=4,
    attention=(LayerAttention(Rope(500000.0, Llama3Rope(32.0, 1.0, 4.0, 8192))),) * 2,
)
CONFIGS = {
    "untied": CONFIG,
    "tied": dataclasses.replace(CONFIG, tie_word_embeddings=True, attention=(LayerAttention(Rope(500000.0)),) * 2),
    "padded": dataclasses.replace(CONFIG, width_multiple=8),
}
METADATA = {"plan": {"keep": [[1, 2], [0]]}, "source": "somebody/model", "note": None, "seed": 0.1}


def make_model(config: ModelConfig) -> Decoder:
    """Random weights of three dtypes, with a few values that are easily lost."""
    graphdef, state = nnx.split(abstract_model(config))
    random = np.random.default_rng(0)
    dtypes = {"gate_proj": jnp.bfloat16, "embed_tokens": jnp.bfloat16, "q_proj": jnp.float16}
    flat = [
        (path, leaf.replace(jnp.asarray(random.normal(size=leaf.get_value().shape), dtypes.get(path[-1], jnp.float32))))
        for path, leaf in nnx.to_flat_state(state)
    ]
    model: Decoder = nnx.merge(graphdef, nnx.from_flat_state(flat))
    for layer, width in zip(model.layers, config.intermediate_sizes, strict=True):  # storage padding is zero
        for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
            matrix.set_value(matrix[...].at[width:].set(0))
        layer.mlp.down_proj.set_value(layer.mlp.down_proj[...].at[:, width:].set(0))
    model.norm.weight.set_value(jnp.array([np.nan, -np.inf, -0.0, 1e-40, 1, 2, 3, 4], jnp.float32))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "orbax"
    save_orbax(path, make_model(CONFIG), METADATA)
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_a_round_trip_changes_no_bit(tmp_path: Path, name: str) -> None:
    model = make_model(CONFIGS[name])
    save_orbax(tmp_path / "orbax", model, METADATA)
    loaded, metadata = load_orbax(tmp_path / "orbax", width_multiple=CONFIGS[name].width_multiple)
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
    loaded, _ = load_orbax(tmp_path / "orbax", width_multiple=8)
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
from convert.orbax import open_orbax, save_orbax

small, large = map(pathlib.Path, sys.argv[1:])
mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))

def rule(path, leaf):
    assert isinstance(leaf, jax.ShapeDtypeStruct)
    return NamedSharding(mesh, {"q_proj": P("model"), "down_proj": P(None, "model")}.get(path[-1], P()))

opened = open_orbax(small)
model, metadata = opened.load(rule, width_multiple=8), opened.metadata
layer = model.layers[0]
assert layer.self_attn.q_proj[...].sharding.spec == P("model")
assert layer.mlp.down_proj[...].sharding.spec == P(None, "model")
assert {shard.data.shape for shard in layer.mlp.down_proj[...].addressable_shards} == {(8, 4)}
save_orbax(large, model, metadata)
"""


def test_from_one_device_to_four_and_back_without_a_word(tmp_path: Path) -> None:
    model = make_model(CONFIGS["padded"])
    save_orbax(tmp_path / "one", model, METADATA)
    four_devices = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": four_devices}
    command = [sys.executable, "-c", ON_FOUR_DEVICES, tmp_path / "one", tmp_path / "four"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    loaded, metadata = load_orbax(tmp_path / "four")
    assert metadata == METADATA
    assert loaded.config == CONFIG
    assert loaded.layers[1].mlp.down_proj[...].shape == (8, 7)
    for path, array in arrays(load_orbax(tmp_path / "four", width_multiple=8)[0]).items():
        assert np.asarray(array).tobytes() == np.asarray(arrays(model)[path]).tobytes(), path
        assert arrays(loaded)[path].devices() == {jax.devices()[0]}, path


@pytest.mark.parametrize(("neurons", "other"), [(737, 256), (5, 256), (737, 12), (737, 7)])
def test_padding_is_cut_off_where_the_arrays_are(neurons: int, other: int) -> None:
    """What divided the padded axis divides the other one, as far as that can be divided."""
    mesh = make_mesh(MeshShape(1, 8), 2)  # kv 2, group 4
    x = np.arange(-(-neurons // 8) * 8 * other, dtype=np.float32).reshape(-1, other)
    for values, path, shape in (
        (x, ("layers", 0, "mlp", "gate_proj"), (neurons, other)),
        (x.T, ("layers", 0, "mlp", "down_proj"), (other, neurons)),
    ):
        padded = jax.device_put(values, parameter_sharding(mesh, path, values.shape))
        cut = orbax.without_padding(padded, shape)
        np.testing.assert_array_equal(cut, values[: shape[0], : shape[1]])
        ways = {256: 8, 12: 2, 7: 1}[other]
        assert {shard.data.size for shard in cut.addressable_shards} == {neurons * other // ways}
        assert orbax.without_padding(padded, values.shape) is padded


def test_another_reader_needs_the_config_alone(tmp_path: Path) -> None:
    """Every array of a model that was on a mesh has the shape that its config says."""
    model = shard_model(make_model(CONFIG), make_mesh(MeshShape(1, 8), 2))
    assert model.layers[1].mlp.down_proj[...].shape == (8, 8)
    save_orbax(tmp_path / "orbax", model, {})
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        ),
        nnx.to_pure_dict(nnx.state(make_model(CONFIG), nnx.Param)),
    )
    params = ocp.load_checkpointables(tmp_path / "orbax", {"params": json_keys(template)})["params"]
    np.testing.assert_array_equal(
        params["layers"]["1"]["mlp"]["down_proj"], make_model(CONFIG).layers[1].mlp.down_proj[...]
    )
    saved = json.loads((tmp_path / "orbax" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["config"]
    assert saved["width_multiple"] == 1


def json_keys(tree: Any) -> Any:
    """The same tree with texts in place of numbers as keys."""
    return {str(key): json_keys(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def save_as_before(path: Path, model: Decoder) -> None:
    """As version 0.1 saved: arrays with their padding, and sizes alone in files.json."""
    params: dict[str, Any] = {}
    for names, array in arrays(model).items():
        node = params
        for name in map(str, names[:-1]):
            node = node.setdefault(name, {})
        node[str(names[-1])] = array
    rope = one_rope(model.config)
    assert isinstance(rope.scaling, Llama3Rope)
    config = {
        "vocab_size": 37,
        "hidden_size": 8,
        "intermediate_sizes": [12, 7],
        "num_attention_heads": model.config.num_attention_heads,
        "num_key_value_heads": model.config.num_key_value_heads,
        "head_dim": model.config.head_dim,
        "max_position_embeddings": model.config.max_position_embeddings,
        "rms_norm_eps": model.config.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": dataclasses.asdict(rope.scaling),
        "tie_word_embeddings": False,
        "width_multiple": model.config.width_multiple,
    }
    own = {"format": "gluprune-orbax", "version": 1, "config": config}
    ocp.save_checkpointables(path, {"params": params}, custom_metadata={**METADATA, **own})
    (path / "files.json").write_text(json.dumps(orbax_files.file_sizes(path)))


@pytest.mark.parametrize("multiple", [None, 1, 4])
def test_checkpoints_with_padding_and_without_checksums_still_load(tmp_path: Path, multiple: int | None) -> None:
    model = make_model(CONFIGS["padded"])
    save_as_before(tmp_path / "orbax", model)
    loaded, metadata = load_orbax(tmp_path / "orbax", width_multiple=multiple)
    assert metadata == METADATA
    assert loaded.config == dataclasses.replace(CONFIG, width_multiple=multiple or 8)
    for path, array in arrays(loaded).items():
        whole = tuple(map(slice, array.shape))
        assert np.asarray(array).tobytes() == np.asarray(arrays(model)[path][whole]).tobytes(), path


# --------------------------------------------------------------------------------------------------- refusals


def test_an_interruption_waits_until_orbax_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads would report for 40 lines what each of them was doing."""
    save, order = ocp.save_checkpointables, []

    def interrupted(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save(*args, **options)
        order.append("written")

    monkeypatch.setattr(ocp, "save_checkpointables", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            save_orbax(tmp_path / "orbax", make_model(CONFIG), METADATA)
    finally:
        signal.signal(signal.SIGINT, before)
    assert order == ["written"]
    assert not (tmp_path / "orbax" / "files.json").exists(), "it would count as a whole checkpoint"


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
    (path / "files.json").write_text(json.dumps(orbax_files.file_sizes(path)))


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], type[GlupruneError], str]] = {
    "foreign": (lambda m: m.pop("format"), RequestError, "its metadata has no format 'gluprune-orbax'"),
    "newer": (
        lambda m: m.update(version=3),
        RequestError,
        "has version 3 of the format .*; this gluprune reads 1 and 2",
    ),
    "no config": (lambda m: m.pop("config"), OperationError, "config of the checkpoint .* cannot be read"),
    "missing": (lambda m: m["config"].pop("head_dim"), RequestError, "the config of .* has no head_dim"),
    "unknown": (lambda m: m["config"].update(bias=True), RequestError, "the config of .* has an unknown bias"),
    "both": (
        lambda m: [m["config"].update(bias=True), m["config"].pop("vocab_size")],
        RequestError,
        "has no vocab_size, an unknown bias",
    ),
    "rope": (
        lambda m: m["config"]["ropes"][0]["scaling"].update(rope_type="dynamic"),
        RequestError,
        r"the config\.ropes\[0\] of .* has rope_type 'dynamic'; known: llama3, linear, yarn, longrope",
    ),
    "another rope": (
        lambda m: m["config"]["ropes"][0]["scaling"].update(rope_type="linear"),
        RequestError,
        r"the config\.ropes\[0\]\.scaling of .* has an unknown high_freq_factor",
    ),
    "no such rope": (
        lambda m: m["config"]["layers"][1].update(rope=1),
        OperationError,
        r"the config of .* cannot be read: a layer has rope 1 of 1",
    ),
    "window": (
        lambda m: m["config"]["layers"][1].update(window=0),
        OperationError,
        r"layers\[1\]\.window is 0; it must be a whole number from 1",
    ),
    "norm": (
        lambda m: m["config"].update(norm="layer"),
        OperationError,
        "norm is 'layer'; it must be 'cast_first' or 'float32'",
    ),
    "type": (
        lambda m: m["config"].update(vocab_size="37"),
        OperationError,
        "the config of the checkpoint .* cannot be read: vocab_size is '37'; it must be a whole number from 1",
    ),
    "float": (
        lambda m: m["config"].update(rms_norm_eps=[1]),
        OperationError,
        r"rms_norm_eps is \[1\]; .* finite number",
    ),
    "list": (lambda m: m.update(config=[1]), OperationError, r"it is \[1\]; it must be an object"),
    "value": (lambda m: m["config"].update(head_dim=3), RequestError, "head_dim = 3"),
    "layers": (
        lambda m: [m["config"].update(intermediate_sizes=[12]), m["config"]["layers"].pop()],
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
    (cut, "files.json", r"files\.json is damaged: it is not JSON"),
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


CHANGED = [
    "_CHECKPOINT_METADATA",
    "params/_METADATA",
    "params/_sharding",
    "params/array_metadatas/process_0",
    "params/manifest.ocdbt",
    "params/d/*",
    "params/ocdbt.process_0/d/*",
]


@pytest.mark.parametrize("pattern", CHANGED)
@pytest.mark.parametrize("limit", [1 << 20, 0], ids=["small files", "large files"])
def test_a_changed_byte_is_found_by_the_checksum(
    saved: Path, pattern: str, limit: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(orbax_files, "_SMALL", limit)
    if limit == 0 and "ocdbt.process" not in pattern:  # Orbax reads it before the arrays are asked for
        monkeypatch.setattr(orbax_files, "_SMALL", 1 << 20)
    (file,) = saved.glob(pattern)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    name = file.relative_to(saved).as_posix()
    with pytest.raises(
        OperationError, match=rf"damaged: {name} has the checksum [0-9a-f]{{8}} instead of [0-9a-f]{{8}}"
    ):
        load_orbax(saved)
    assert capfd.readouterr() == ("", "")


FILE_LISTS = {
    "a text for a size": ('{"a": "1"}', "a is '1'; it must be a whole number from 0 or an object"),
    "no checksum": ('{"a": {"size": 1}}', r"a\.crc32 is missing; it must be eight hexadecimal digits"),
    "a checksum of another kind": ('{"a": {"size": 1, "crc32": 7}}', r"a\.crc32 is 7; it must be eight"),
    "a list": ("[1]", r"it is \[1\]; it must be an object"),
    "true": ('{"a": true}', "a is True; it must be"),
    "line ends": ('{"a\\nb": -1}', r"a\\nb is -1; it must be"),
}


@pytest.mark.parametrize("name", FILE_LISTS)
def test_a_damaged_list_of_files_is_one_sentence(saved: Path, name: str) -> None:
    text, message = FILE_LISTS[name]
    (saved / "files.json").write_text(text)
    with pytest.raises(OperationError, match=rf"files\.json is damaged: {message}") as raised:
        load_orbax(saved)
    assert len(str(raised.value).splitlines()) == 1


def test_damage_that_orbax_finds_by_itself_keeps_the_terminal_clean(saved: Path) -> None:
    """Of a checkpoint without checksums. TensorStore's threads speak after the error, so this takes a process."""
    edit_custom(saved, lambda metadata: None)
    file = saved / "params" / "array_metadatas" / "process_0"
    file.write_bytes(b"?" + file.read_bytes()[1:])
    code = "import pathlib, sys; from convert.orbax import open_orbax; open_orbax(pathlib.Path(sys.argv[1])).load()"
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code, saved], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if re.search("closed|awaited|ignored", line)] == []
    error, _, message = done.stderr.splitlines()[-1].partition(": ")
    assert error == "gluprune_jax.errors.OperationError", done.stderr
    assert message.startswith(f"the checkpoint {saved} is damaged or cannot be read: ")
    assert len(message) <= 500


# What Orbax does with a read that is under way when its event loop ends: the end of the coroutine is an error to it.
ABANDONED_READ = """
async def read(array):
    try:
        await array
    except BaseException as error:
        raise Exception("Encountered error while reading") from error
"""


@pytest.mark.parametrize(("file", "reported"), [(ocp.__file__, []), (__file__, ["Encountered error while reading"])])
def test_only_reads_of_orbax_are_given_up_without_a_word(
    monkeypatch: pytest.MonkeyPatch, file: str, reported: list[str]
) -> None:
    said: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: said.append(str(unraisable.exc_value)))
    with orbax_files.calling_orbax("cannot be read"):
        pass
    loop = asyncio.new_event_loop()
    names: dict[str, Any] = {}
    exec(compile(ABANDONED_READ, file, "exec"), names)
    read = names["read"](asyncio.Future(loop=loop))
    read.send(None)
    del read
    loop.close()
    assert said == reported


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
    """Without checksums, damage that keeps the sizes is found by Orbax, if at all."""
    edit_custom(saved, lambda metadata: None)
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
    code = "import sys, convert.orbax; sys.exit('orbax.checkpoint.experimental.v1' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
