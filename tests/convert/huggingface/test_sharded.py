"""Models that are spread over meshes: what is read, where it goes, and that files do not know of it."""

import dataclasses
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from inspecting import contents
from jax.sharding import PartitionSpec as P
from llama_tensors import model_arrays, tensor_names
from sharded import shard_model
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert import buffers, shards
from convert.checkpoint import Checkpoint, MeshChoice
from convert.families.names import TensorName
from convert.huggingface import sharded
from convert.huggingface.safetensors import StoredTensor, index_folder
from evals.results.describe import weights_digest
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.parallel.mesh import MeshShape, make_mesh, mesh_of, parameter_sharding, shape_of
from gluprune_jax.pruning.plan import make_plan
from gluprune_jax.pruning.scores import score

SHAPES = [(1, 1), (1, 2), (2, 2), (1, 4), (1, 8), (2, 4), (8, 1)]
# All divides but the neurons; and little does: three key/value heads, an odd vocabulary.
CONFIGS = {
    "even": hf_config(
        vocab_size=96, intermediate_size=73, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=2
    ),
    "odd": hf_config(intermediate_size=61, num_key_value_heads=3, num_hidden_layers=2, tie_word_embeddings=True),
}
ROWS, COLUMNS = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.down_proj.weight"


def on(data: int, model: int) -> MeshChoice:
    return lambda abstract: make_mesh(MeshShape(data, model), abstract.config.num_key_value_heads)


def arrays(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name.hf: array for name, array in model_arrays(checkpoint.model)}


def padded(name: TensorName, array: Any, multiple: int) -> np.ndarray:
    values = np.asarray(array)
    extra = [(0, -size % multiple if axis == name.neuron_axis else 0) for axis, size in enumerate(values.shape)]
    return np.pad(values, extra)


def assert_spread(loaded: Checkpoint, plain: Checkpoint, data: int, model: int) -> None:
    """The bits of `plain` with zeros behind its neurons, every parameter where `parameter_sharding` wants it."""
    assert loaded.config == dataclasses.replace(plain.config, width_multiple=model)
    mesh = mesh_of(loaded.model)
    assert mesh is not None
    assert shape_of(mesh) == MeshShape(data, model)
    expected = arrays(plain)
    for name, array in model_arrays(loaded.model):
        values = padded(name, expected[name.hf], model)
        assert array.dtype == values.dtype, name.hf
        assert array.sharding == parameter_sharding(mesh, name.path, values.shape), name.hf
        assert np.asarray(array).tobytes() == values.tobytes(), name.hf
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == values[shard.index].tobytes(), name.hf


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three dtypes in two files."""
    config = CONFIGS[request.param]
    tensors = hf_tensors(config)
    for part, dtype in (("mlp", "bfloat16"), ("o_proj", "float16"), ("k_proj", "bfloat16")):
        tensors |= {key: t for key, t in hf_tensors(config, dtype).items() if part in key}
    return write_folder(tmp_path_factory.mktemp(request.param) / "model", config, tensors, shards=2)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Checkpoint:
    return convert.load(folder)


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("even") / "model", CONFIGS["even"])


@pytest.fixture(scope="module")
def uneven(even: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of 73 and 29 neurons, both written as 73."""
    checkpoint = convert.load(even)
    output = tmp_path_factory.mktemp("uneven") / "model"
    convert.save(checkpoint.pruned(make_plan(score(checkpoint.model), width=29, layers=[1])), output)
    return output


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(("data", "model"), SHAPES)
def test_every_mesh_holds_the_same_bits(folder: Path, plain: Checkpoint, data: int, model: int) -> None:
    loaded = convert.load(folder, mesh=on(data, model))
    assert_spread(loaded, plain, data, model)
    assert loaded.notes == plain.notes


def test_where_each_parameter_lives(even: Path) -> None:
    """In so many words, on two replicas of four devices, with two key/value heads."""
    model = convert.load(even, mesh=on(2, 4)).model
    layer, both = model.layers[0], ("kv", "group")
    expected = {
        "embed": (model.embed_tokens, P(both, None), (24, 48)),
        "head": (model.lm_head, P(both, None), (24, 48)),
        "norm": (model.norm.weight, P(None), (48,)),
        "q": (layer.self_attn.q_proj, P(both, None, None), (2, 8, 48)),
        "k": (layer.self_attn.k_proj, P(("kv",), None, None), (1, 8, 48)),
        "v": (layer.self_attn.v_proj, P(("kv",), None, None), (1, 8, 48)),
        "o": (layer.self_attn.o_proj, P(None, both, None), (48, 2, 8)),
        "gate": (layer.mlp.gate_proj, P(both, None), (19, 48)),
        "up": (layer.mlp.up_proj, P(both, None), (19, 48)),
        "down": (layer.mlp.down_proj, P(None, both), (48, 19)),
    }
    for what, (parameter, spec, shape) in expected.items():
        array = parameter.get_value()
        assert array.sharding.spec == spec, what
        assert len(array.addressable_shards) == 8, what
        assert {shard.data.shape for shard in array.addressable_shards} == {shape}, what


def shapes(model: Decoder) -> dict[Any, Any]:
    return {name.hf: (array.shape, array.dtype) for name, array in model_arrays(model)}


def test_the_mesh_is_chosen_before_any_weight_is_read(even: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def choose(abstract: Decoder) -> None:
        chosen.append(abstract)
        raise RequestError("no such mesh")

    monkeypatch.setattr(os, "preadv", None)
    with pytest.raises(RequestError, match="no such mesh"):
        convert.load(even, mesh=choose)
    assert chosen[0].config.intermediate_sizes == (73, 73)
    assert {str(dtype) for _, dtype in shapes(chosen[0]).values()} == {"float32"}
    with pytest.raises(RequestError, match="no such mesh"):
        convert.load(even, mesh=choose, dtype="bfloat16")
    assert {str(dtype) for _, dtype in shapes(chosen[1]).values()} == {"bfloat16"}
    assert shapes(convert.describe(even, dtype="bfloat16")) == shapes(chosen[1])


def test_no_mesh_is_the_default_device(even: Path) -> None:
    loaded = convert.load(even, mesh=lambda abstract: None)
    assert mesh_of(loaded.model) is None
    assert loaded.config == convert.load(even).config


@pytest.mark.parametrize(("dtype", "data", "model"), [("float32", 1, 1), ("bfloat16", 2, 4), ("float16", 1, 8)])
def test_casts(folder: Path, tmp_path: Path, dtype: str, data: int, model: int) -> None:
    cast = convert.load(folder, dtype=dtype)
    assert_spread(convert.load(folder, dtype=dtype, mesh=on(data, model)), cast, data, model)
    convert.save(convert.load(folder, mesh=on(data, model)), tmp_path / "out", formats=["orbax"])
    assert_spread(convert.load(tmp_path / "out", dtype=dtype, mesh=on(data, model)), cast, data, model)


@pytest.mark.parametrize(("data", "model"), [(1, 1), (2, 2), (1, 4), (1, 8)])
def test_layers_of_different_widths(uneven: Path, data: int, model: int, tmp_path: Path) -> None:
    plain = convert.load(uneven)
    assert plain.config.intermediate_sizes == (73, 29)
    loaded = convert.load(uneven, mesh=on(data, model))
    assert_spread(loaded, plain, data, model)
    convert.save(loaded, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(uneven)


def test_a_plan_applied_before_loading(even: Path) -> None:
    opened = convert.load(even, stream=True)
    plan = make_plan(score(opened.model, weights=opened.mlp_weights()), width=31)
    pruned = opened.pruned(plan)
    assert_spread(pruned.load(mesh=on(2, 4)), pruned.load(), 2, 4)


# ------------------------------------------------------------------------------------------- what is read of it


@dataclasses.dataclass
class Reads:
    """How often each byte of each tensor was read."""

    tensors: Mapping[str, StoredTensor]
    calls: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)

    def times(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        inode = tensor.file.stat().st_ino
        times = np.zeros(tensor.nbytes, int)
        for file, offset, size in self.calls:
            if file == inode and tensor.offset <= offset < tensor.offset + tensor.nbytes:
                times[offset - tensor.offset : offset - tensor.offset + size] += 1
        return times.reshape(*tensor.shape, -1).max(-1)


@pytest.fixture
def reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Reads:
    record, preadv = Reads(index_folder(folder)), os.preadv

    def recording(descriptor: int, buffers: Any, offset: int) -> int:
        got = preadv(descriptor, buffers, offset)
        record.calls.append((os.fstat(descriptor).st_ino, offset, got))
        return got

    monkeypatch.setattr(os, "preadv", recording)
    return record


@pytest.mark.parametrize(("data", "model"), SHAPES)
def test_a_process_reads_no_byte_twice(folder: Path, reads: Reads, data: int, model: int) -> None:
    convert.load(folder, mesh=on(data, model))
    for name in reads.tensors:
        assert (reads.times(name) == 1).all(), name


@pytest.mark.parametrize("devices", [[0], [1], [3], [1, 2], [0, 3]])
def test_a_process_reads_what_its_devices_hold(
    folder: Path, plain: Checkpoint, reads: Reads, devices: list[int]
) -> None:
    """As a process that owns these of the four devices of a replica, and the same ones in another replica."""
    mesh = make_mesh(MeshShape(2, 4), plain.config.num_key_value_heads)
    own = [mesh.devices.reshape(2, 4)[replica, device] for replica in range(2) for device in devices]
    for name, array in model_arrays(plain.model):
        whole = padded(name, array, 4)
        indices = parameter_sharding(mesh, name.path, whole.shape).devices_indices_map(whole.shape)
        boxes = list(dict.fromkeys(shards.box_of(indices[device], whole.shape) for device in own))
        held = [whole[tuple(slice(*side) for side in box)] for box in boxes]
        in_file = [sharded.in_file(box, name, whole.shape) for box in boxes]
        for part, expected in zip(sharded.read_boxes(reads.tensors[name.hf], name, in_file), held, strict=True):
            assert part.tobytes() == expected.tobytes(), name.hf
        times = reads.times(name.hf)
        rows = [slice(*box[0]) for box in in_file]
        wanted = np.zeros_like(times)
        for some in rows:
            wanted[some] = 1
        np.testing.assert_array_equal(times, wanted, name.hf)
        if name.path[-1] in ("gate_proj", "up_proj"):
            assert times.sum() <= len(devices) * -(-name.shape[0] // 4) * name.shape[1]


def test_memory_of_columns_is_that_of_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a matrix that is divided along its columns only a block is ever whole."""
    config = hf_config(intermediate_size=4096)
    path = write_folder(tmp_path / "model", config)
    monkeypatch.setattr(sharded, "_BLOCK", 1 << 16)
    largest = 0
    allocate = buffers.aligned_empty

    def recording(shape: Any, dtype: Any) -> Any:
        nonlocal largest
        array = allocate(shape, dtype)
        largest = max(largest, array.nbytes)
        return array

    stored = index_folder(path)[COLUMNS]
    name = next(name for name in tensor_names(convert.load(path, stream=True).config) if name.hf == COLUMNS)
    monkeypatch.setattr(sharded, "aligned_empty", recording)
    monkeypatch.setattr("convert.huggingface.safetensors.aligned_empty", recording)
    sharded.read_boxes(stored, name, [((0, 48), (1024, 2048))])
    assert largest == stored.nbytes / 4


# ----------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", [ROWS, COLUMNS, "model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize(("data", "model"), [(2, 4), (1, 8)])
def test_not_finite_weights(tmp_path: Path, name: str, data: int, model: int) -> None:
    tensors = hf_tensors(CONFIGS["even"])
    tensors[name].flat[-1] = np.nan
    path = write_folder(tmp_path / "model", CONFIGS["even"], tensors)
    with pytest.raises(OperationError, match=rf"model\.safetensors: tensor {name} has NaN or Inf weights"):
        convert.load(path, mesh=on(data, model))


def in_orbax(name: str) -> str:
    """The name of a tensor in Orbax checkpoints."""
    return name.removeprefix("model.").removesuffix(".weight")


@pytest.mark.parametrize("name", [ROWS, COLUMNS])
def test_weights_too_large_for_a_dtype(tmp_path: Path, name: str) -> None:
    tensors = hf_tensors(CONFIGS["even"])
    tensors[name][-1, -1] = 1e6
    path = write_folder(tmp_path / "model", CONFIGS["even"], tensors)
    with pytest.raises(RequestError, match=f"tensor {name} holds values too large for float16"):
        convert.load(path, dtype="float16", mesh=on(1, 4))
    convert.save(convert.load(path, mesh=on(1, 4)), tmp_path / "out", formats=["orbax"])
    with pytest.raises(RequestError, match=f"{in_orbax(name)} holds values too large for float16"):
        convert.load(tmp_path / "out", dtype="float16", mesh=on(1, 4))


def test_not_finite_weights_in_orbax(even: Path, tmp_path: Path) -> None:
    checkpoint = convert.load(even, mesh=on(1, 4))
    down = checkpoint.model.layers[1].mlp.down_proj
    down.set_value(down.get_value().at[3, 70].set(jnp.nan))
    convert.save(checkpoint, tmp_path / "out", formats=["orbax"])
    with pytest.raises(OperationError, match=f"has NaN or Inf weights in {in_orbax(COLUMNS)}$"):
        convert.load(tmp_path / "out", mesh=on(2, 2))


@pytest.mark.parametrize("name", [ROWS, COLUMNS])
@pytest.mark.parametrize("neuron", [29, 31, 72])
@pytest.mark.parametrize("model", [1, 4, 8])
def test_weights_where_there_should_be_padding(
    uneven: Path, tmp_path: Path, name: str, neuron: int, model: int
) -> None:
    path = tmp_path / "model"
    path.mkdir()
    for file, data in contents(uneven).items():
        (path / file).write_bytes(data)
    tensor = index_folder(path)[name]
    row, column = (neuron, 5) if name == ROWS else (7, neuron)
    with (path / "model.safetensors").open("r+b") as stream:
        stream.seek(tensor.offset + 4 * (row * tensor.shape[1] + column))
        stream.write(np.float32(1e-30).tobytes())
    with pytest.raises(OperationError, match=f"tensor {name} has weights beyond neuron 28, where config.json"):
        convert.load(path, mesh=on(1, model))


def test_a_file_that_changes(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "model", CONFIGS["even"])
    opened = convert.load(path, stream=True)
    write_folder(path, CONFIGS["even"], hf_tensors(CONFIGS["even"], seed=1))
    with pytest.raises(OperationError, match=r"model\.safetensors has changed since it was opened"):
        opened.load(mesh=on(2, 4))  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize(("data", "model"), SHAPES)
def test_no_exported_bit_depends_on_the_mesh(
    folder: Path, plain: Checkpoint, tmp_path: Path, data: int, model: int
) -> None:
    convert.save(plain, tmp_path / "plain")
    loaded = convert.load(folder, mesh=on(data, model))
    convert.save(loaded, tmp_path / "loaded")
    mesh = on(data, model)(plain.model)
    assert mesh is not None
    moved = plain.with_model(shard_model(plain.model, mesh))
    convert.save(moved, tmp_path / "moved")
    assert contents(tmp_path / "loaded") == contents(tmp_path / "plain")
    assert contents(tmp_path / "moved") == contents(tmp_path / "plain")
    assert weights_digest(loaded) == weights_digest(plain)


def test_an_export_leaves_no_copy_with_the_model(even: Path, tmp_path: Path) -> None:
    loaded = convert.load(even, mesh=on(1, 4))
    convert.save(loaded, tmp_path / "out")
    weights_digest(loaded)
    assert all(array._npy_value is None for array in arrays(loaded).values())


@pytest.mark.parametrize(
    ("folder", "saved", "onto"),
    [*(("even", shape, SHAPES) for shape in (None, *SHAPES)), ("odd", (2, 2), [(1, 8)]), ("odd", (1, 8), [(2, 2)])],
    indirect=["folder"],
)
def test_orbax_from_any_mesh_onto_any_other(
    folder: Path, plain: Checkpoint, tmp_path: Path, saved: tuple[int, int] | None, onto: list[tuple[int, int]]
) -> None:
    convert.save(convert.load(folder, mesh=on(*saved) if saved else None), tmp_path / "orbax", formats=["orbax"])
    for data, model in onto:
        assert_spread(convert.load(tmp_path / "orbax", mesh=on(data, model)), plain, data, model)
    unpadded = convert.load(tmp_path / "orbax")
    assert unpadded.config == plain.config  # the padding stays behind with the mesh
    assert mesh_of(unpadded.model) is None
    assert weights_digest(unpadded) == weights_digest(plain)
    told: list[Any] = []
    convert.load(tmp_path / "orbax", mesh=lambda abstract: told.append(shapes(abstract)))
    assert told == [shapes(plain.model)]
    convert.save(convert.load(tmp_path / "orbax", mesh=on(2, 4)), tmp_path / "again")
    convert.save(plain, tmp_path / "plain")
    assert contents(tmp_path / "again") == contents(tmp_path / "plain")


# ------------------------------------------------------------------------------------------- several processes

WORKER = """
import os, sys
from pathlib import Path
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 2)
port, index, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, heartbeat_timeout_seconds=10)

import convert
from convert import output
from convert.huggingface import folder as huggingface
from evals.results.describe import weights_digest
from gluprune_jax.parallel import mesh
from gluprune_jax.parallel.distributed import broadcast_from_main, gather_from_all
from gluprune_jax.errors import GlupruneError, OperationError, RequestError
from gluprune_jax.parallel.mesh import MeshShape, make_mesh

count, preadv = 0, os.preadv
def counting(*arguments):
    global count
    got = preadv(*arguments)
    count += got
    return got
os.preadv = counting

def on(data, model):
    return lambda abstract: make_mesh(MeshShape(data, model), abstract.config.num_key_value_heads)

def refusal(function):
    try:
        function()
    except GlupruneError as error:
        return type(error).__name__, str(error)
    raise AssertionError("nothing was refused")

assert broadcast_from_main(b"main" if index == 0 else b"the other one") == b"main"
assert broadcast_from_main(b"") == b""
assert gather_from_all(b"x" * index) == [b"", b"x"]

for data, model in ((2, 2), (1, 4)):
    if data == 1:
        mesh._GATHERED_AT_ONCE = 2000  # so that most are gathered in several slices, the last one smaller
    count = 0
    checkpoint = convert.load(folder / "model", mesh=on(data, model))
    print("read", data, model, count)
    print("digest", weights_digest(checkpoint))
    convert.save(checkpoint, folder / f"out-{data}-{model}", formats=["hf", "orbax"], extra_files={"README.md": "hi"})
    again = convert.load(folder / f"out-{data}-{model}" / "orbax", mesh=on(4 // data // 2, 2 * data))
    print("digest", weights_digest(again))
    print("digest", weights_digest(convert.load(folder / f"out-{data}-{model}" / "orbax", mesh=on(1, 4))))
    if data == 1:
        convert.save(again, folder / "hf", formats=["hf"])

# What one process refuses, all do.
kind, text = refusal(lambda: convert.load(folder / ("model" if index == 0 else "missing"), mesh=on(1, 4)))
assert kind == "RequestError" and "there is no model" in text, text
assert text.startswith("process 1 of 2: ") == (index == 0), text
missing = folder / ("out-2-2" if index else "missing") / "orbax"
kind, text = refusal(lambda: convert.load(missing, mesh=on(1, 4)))
assert kind == "RequestError" and text.startswith("process 0 of 2: ") == (index == 1), text
kind, text = refusal(lambda: convert.save(checkpoint, folder / "hf", formats=["hf"]))
assert kind == "RequestError" and "exists; choose another path" in text, text
plain = convert.load(folder / "model")
kind, text = refusal(lambda: convert.save(plain, folder / "local", formats=["orbax"]))
assert kind == "RequestError" and "lies on one device" in text, text
convert.save(plain, folder / "local", formats=["hf"])

# A disk that fails under the first process while the others gather.
if index == 0:
    whole = huggingface.write_tensors
    def failing(file, tensors, pieces, written, ahead):
        assert not ahead
        pieces(next(iter(tensors)))
        raise OperationError("the disk is full")
    huggingface.write_tensors = failing
kind, text = refusal(lambda: convert.save(checkpoint, folder / "full", formats=["hf"]))
assert kind == "OperationError" and text.endswith("the disk is full"), text

# A folder that the other process does not see.
if index == 1:
    output.broadcast_from_main = lambda data: broadcast_from_main(data) + b"-elsewhere"
kind, text = refusal(lambda: convert.save(checkpoint, folder / "unshared", formats=["orbax"]))
assert kind == "RequestError" and "not on storage that all processes share" in text, text
print("done")
"""


def run_workers(folder: Path) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment["JAX_COMPILATION_CACHE_DIR"] = ""  # not shared: both would write the same entries at the same time
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(port), str(index), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = []
    try:
        for worker in workers:
            output, errors = worker.communicate(timeout=120)
            assert worker.returncode == 0, errors
            outputs.append(output)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return outputs


def test_two_processes(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "model", CONFIGS["even"])
    plain = convert.load(path)
    convert.save(plain, tmp_path / "plain", extra_files={"README.md": "hi"})
    outputs = run_workers(tmp_path)
    digest = weights_digest(plain)
    total = sum(tensor.nbytes for tensor in index_folder(path).values())
    read = {"1 4": 0, "2 2": 0}
    for output in outputs:
        lines = output.splitlines()
        assert Counter(line for line in lines if line.startswith("digest")) == {f"digest {digest}": 6}
        for line in lines:
            if line.startswith("read"):
                read[line[5:8]] += int(line[9:])
    # Of what is divided along its rows no byte is read twice; the rest (norms too) by both.
    by_both = ("down", "o_proj", "norm")
    twice = sum(t.nbytes for name, t in index_folder(path).items() if any(part in name for part in by_both))
    assert read == {"1 4": total + twice, "2 2": 2 * total}  # and a replica on each process
    for shape in ((1, 4), (2, 2)):
        out = tmp_path / f"out-{shape[0]}-{shape[1]}"
        exported = {name: data for name, data in contents(out).items() if not name.startswith("orbax/")}
        assert exported == contents(tmp_path / "plain")
        for data, model in ((1, 1), (1, 8), (2, 4)):
            assert_spread(convert.load(out / "orbax", mesh=on(data, model)), plain, data, model)
    for name in ("hf", "local"):
        assert contents(tmp_path / name) == {k: v for k, v in contents(tmp_path / "plain").items() if k != "README.md"}
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {"model", "plain", "hf", "local", "out-1-4", "out-2-2"}
