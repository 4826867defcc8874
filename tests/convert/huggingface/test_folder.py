"""Hugging Face folders both ways: bit for bit, loaded by stock transformers, and one sentence when one is damaged."""

import dataclasses
import json
import os
import resource
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from inspecting import logits
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from llama_tensors import build_model, model_arrays, parameter_shapes, tensor_names
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from tiny_config import tiny_config
from tiny_models import DTYPES, LLAMA3_ROPE, hf_config, hf_tensors, write_folder

import convert
from convert.huggingface import folder
from convert.huggingface.config import read_config
from convert.huggingface.safetensors import check_dtypes, read_header, read_tensor, write_tensors
from gluprune_jax.errors import GlupruneError, OperationError, RequestError
from gluprune_jax.models.config import LayerAttention, Rope

TOKENS = np.random.default_rng(1).integers(0, 97, (2, 40))
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "mlp_bias": None, "attention_bias": None}
WIDTHS = (80, 48, 17)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, by the official reader."""
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def assert_same_bits(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


def mixed_tensors(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors of all three dtypes, an odd number of elements in some, with the values that are easily lost."""
    tensors = {}
    for i, (name, array) in enumerate(hf_tensors(config).items()):
        dtype = np.dtype(list(DTYPES.values())[i % 3])
        limits = ml_dtypes.finfo(dtype)
        array = array.astype(dtype)
        array.reshape(-1)[:6] = [-0.0, limits.smallest_subnormal, limits.max, limits.min, limits.tiny, -limits.tiny]
        tensors[name] = array
    return tensors


def narrowed(folder: Path) -> convert.Checkpoint:
    """The model of a folder with layers of different widths, each the first neurons of the whole one."""
    checkpoint = convert.load(folder)
    config = dataclasses.replace(checkpoint.config, intermediate_sizes=WIDTHS)
    whole = tensors_of(folder)
    arrays = {}
    for name in tensor_names(config):
        array = whole[name.hf][tuple(slice(size) for size in name.shape)]
        arrays[name.hf] = jnp.asarray(array.reshape(parameter_shapes(config)[name.hf].shape))
    return checkpoint.with_model(build_model(config, arrays))


# ---------------------------------------------------------------------------------------------------- bit for bit

CONFIGS = {
    "llama": hf_config(),
    "llama3 rope": hf_config(rope_scaling=LLAMA3_ROPE),
    "tied": hf_config(tie_word_embeddings=True),
    "mistral": hf_config(**MISTRAL) | {"sliding_window": None},
    "odd": hf_config(vocab_size=91, intermediate_size=77, num_hidden_layers=2),
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_changes_no_bit(tmp_path: Path, name: str, shards: int) -> None:
    tensors = mixed_tensors(CONFIGS[name])
    write_folder(tmp_path / "in", CONFIGS[name], tensors, shards)
    convert.save(convert.load(tmp_path / "in"), tmp_path / "out")
    assert_same_bits(tensors_of(tmp_path / "out"), tensors)
    assert {array.dtype.name for array in tensors.values()} == set(DTYPES)


def test_there_and_back_through_orbax_changes_no_bit(tmp_path: Path) -> None:
    tensors = mixed_tensors(CONFIGS["llama3 rope"])
    write_folder(tmp_path / "in", CONFIGS["llama3 rope"], tensors)
    (tmp_path / "in" / "tokenizer.json").write_bytes(b"{}\r\n")
    convert.save(convert.load(tmp_path / "in"), tmp_path / "orbax", formats=("orbax",))
    convert.save(convert.load(tmp_path / "orbax"), tmp_path / "out")
    convert.save(convert.load(tmp_path / "in"), tmp_path / "direct")
    assert_same_bits(tensors_of(tmp_path / "out"), tensors)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_of_one_dtype(tmp_path: Path, dtype: str) -> None:
    tensors = hf_tensors(hf_config(), dtype)
    write_folder(tmp_path / "in", hf_config(), tensors)
    checkpoint = convert.load(tmp_path / "in")
    convert.save(checkpoint, tmp_path / "out")
    assert_same_bits(tensors_of(tmp_path / "out"), tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype


def test_a_cast_is_the_rounding_of_numpy(tmp_path: Path) -> None:
    tensors = hf_tensors(hf_config())
    write_folder(tmp_path / "in", hf_config(), tensors)
    convert.save(convert.load(tmp_path / "in", dtype="bfloat16"), tmp_path / "out")
    cast = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    assert_same_bits(tensors_of(tmp_path / "out"), cast)


def test_a_cast_that_overflows_is_refused(tmp_path: Path) -> None:
    tensors = hf_tensors(hf_config())
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    write_folder(tmp_path / "in", hf_config(), tensors)
    with pytest.raises(RequestError, match=r"layers\.1\.mlp\.up_proj\.weight holds values too large for float16"):
        convert.load(tmp_path / "in", dtype="float16")


def test_storage_padding_changes_no_exported_bit(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", hf_config(), mixed_tensors(hf_config()))
    for name, checkpoint in {"plain": convert.load(tmp_path / "in"), "narrow": narrowed(tmp_path / "in")}.items():
        config = dataclasses.replace(checkpoint.config, width_multiple=64)
        arrays = {}
        for tensor, array in model_arrays(checkpoint.model):
            stored = parameter_shapes(config)[tensor.hf].shape
            padding = [(0, a - b) for a, b in zip(stored, array.shape, strict=True)]
            arrays[tensor.hf] = jnp.asarray(np.pad(np.asarray(array), padding))
        assert arrays["model.layers.2.mlp.down_proj.weight"].shape[1] % 64 == 0
        convert.save(checkpoint, tmp_path / name)
        convert.save(checkpoint.with_model(build_model(config, arrays)), tmp_path / f"{name} padded")
        for file in ("model.safetensors", "config.json"):
            padded = (tmp_path / f"{name} padded" / file).read_bytes()
            assert padded == (tmp_path / name / file).read_bytes(), (name, file)


def test_layers_of_different_widths(tmp_path: Path) -> None:
    tensors = mixed_tensors(hf_config())
    write_folder(tmp_path / "in", hf_config(), tensors)
    convert.save(narrowed(tmp_path / "in"), tmp_path / "out")
    written = tensors_of(tmp_path / "out")
    for i, width in enumerate(WIDTHS):
        gate, down = (f"model.layers.{i}.mlp.{name}_proj.weight" for name in ("gate", "down"))
        assert written[gate].shape == (80, 48)
        assert not written[gate][width:].any()
        assert not written[down][:, width:].any()
        assert written[gate][:width].tobytes() == tensors[gate][:width].tobytes()
        assert written[down][:, :width].tobytes() == tensors[down][:, :width].tobytes()

    again = convert.load(tmp_path / "out")
    assert again.config.intermediate_sizes == WIDTHS
    assert any("zero padding" in note for note in again.notes)
    assert [layer.mlp.down_proj[...].shape for layer in again.model.layers] == [(48, width) for width in WIDTHS]
    convert.save(again, tmp_path / "again")
    assert_same_bits(tensors_of(tmp_path / "again"), written)
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()


@pytest.mark.parametrize(("matrix", "place"), [("gate_proj", (17, 0)), ("up_proj", (79, 47)), ("down_proj", (0, 17))])
def test_weights_in_the_padding_are_refused(tmp_path: Path, matrix: str, place: tuple[int, int]) -> None:
    write_folder(tmp_path / "in")
    convert.save(narrowed(tmp_path / "in"), tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    tensors[f"model.layers.2.mlp.{matrix}.weight"][place] = 1e-30
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(OperationError, match=rf"layers\.2\.mlp\.{matrix}\.weight has weights beyond neuron 16, where"):
        convert.load(tmp_path / "out")


# ------------------------------------------------------------------------------------------------- what surrounds it


def test_the_other_files_travel_byte_for_byte(tmp_path: Path) -> None:
    write_folder(tmp_path / "in")
    assets = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "LICENSE.txt"]
    assets += ["chat_template.jinja", "generation_config.json", "USE_POLICY.md", "NOTICE", "merges.txt", "vocab.json"]
    for name in assets:
        (tmp_path / "in" / name).write_bytes(name.encode() + b"\r\n\xff\x00")
    for name in ("README.md", "pytorch_model.bin", "training_args.bin"):
        (tmp_path / "in" / name).write_bytes(b"stays")
    convert.save(convert.load(tmp_path / "in"), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*assets, "config.json", "model.safetensors"])
    for name in assets:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes(), name


def test_the_history_travels(tmp_path: Path) -> None:
    write_folder(tmp_path / "in")
    history = ({"criterion": "ppm", "seed": 0.1}, {"criterion": "l2"})
    convert.save(dataclasses.replace(convert.load(tmp_path / "in"), history=history), tmp_path / "out")
    assert convert.load(tmp_path / "out").history == history
    convert.save(convert.load(tmp_path / "out"), tmp_path / "orbax", formats=["orbax"])
    assert convert.load(tmp_path / "orbax").history == history


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_files_have_the_permissions_of_any_new_file(tmp_path: Path, umask: int) -> None:
    write_folder(tmp_path / "in")
    checkpoint = convert.load(tmp_path / "in")
    before = os.umask(umask)
    try:
        convert.save(checkpoint, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {"config.json": 0o666 & ~umask, "model.safetensors": 0o666 & ~umask}


def test_a_hub_id_is_read_from_the_folder_it_becomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = hf_tensors(hf_config(), "bfloat16")
    write_folder(tmp_path / "snapshot", hf_config(), tensors, shards=2)
    asked = []
    monkeypatch.setattr(
        "convert.sources.hub_snapshot",
        lambda name, revision: asked.append((name, revision)) or tmp_path / "snapshot",
    )
    checkpoint = convert.load("owner/name", revision="v2")
    assert asked == [("owner/name", "v2")]
    assert checkpoint.source == "owner/name"
    convert.save(checkpoint, tmp_path / "out")
    assert_same_bits(tensors_of(tmp_path / "out"), tensors)


def test_derived_tensors_are_left_out_and_reported(tmp_path: Path) -> None:
    config = CONFIGS["tied"]
    tensors = mixed_tensors(config)
    derived = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(3)}
    derived["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write_folder(tmp_path / "in", config, tensors | derived)
    checkpoint = convert.load(tmp_path / "in")
    assert any("3 rotary_emb.inv_freq tensors were left out" in note for note in checkpoint.notes)
    assert any("lm_head.weight was left out" in note for note in checkpoint.notes)
    assert any("accepted without effect" in note and "initializer_range" in note for note in checkpoint.notes)
    convert.save(checkpoint, tmp_path / "out")
    assert_same_bits(tensors_of(tmp_path / "out"), tensors)


# One bit of the last element, another dtype, another shape, a scalar.
HEADS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "values": lambda array: np.concatenate([array[:-1], -array[-1:]]),
    "dtype": lambda array: array.astype(np.float16),
    "shape": lambda array: array[:-1],
    "scalar": lambda array: array[0, 0].reshape(()),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_differs_from_the_tied_embedding_is_refused(tmp_path: Path, name: str) -> None:
    tensors = hf_tensors(CONFIGS["tied"])
    head = np.ascontiguousarray(HEADS[name](tensors["model.embed_tokens.weight"]))
    write_folder(tmp_path / "in", CONFIGS["tied"], tensors | {"lm_head.weight": head})
    with pytest.raises(OperationError, match=r"lm_head\.weight differs from the embedding although .*tie_word_embed"):
        convert.load(tmp_path / "in")


# ------------------------------------------------------------------------------------------------------- the writer


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(folder, "MAX_SHARD_BYTES", 50_000)
    return 50_000


def test_large_models_are_written_in_shards(tmp_path: Path, small_shards: int) -> None:
    tensors = mixed_tensors(hf_config())
    write_folder(tmp_path / "in", hf_config(), tensors)
    convert.save(convert.load(tmp_path / "in"), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    for file in files:
        there = load_file(tmp_path / "out" / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == there.keys()
        assert sum(array.nbytes for array in there.values()) <= small_shards
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert_same_bits(tensors_of(tmp_path / "out"), tensors)
    convert.save(convert.load(tmp_path / "out"), tmp_path / "again")
    assert_same_bits(tensors_of(tmp_path / "again"), tensors)


TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 2**32)),
    max_size=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TENSORS)
def test_the_official_library_reads_what_we_write(tmp_path: Path, specs: dict[str, tuple[str, list[int], int]]) -> None:
    arrays = {
        name: np.random.default_rng(seed).normal(size=shape).astype(DTYPES[dtype])
        for name, (dtype, shape, seed) in specs.items()
    }
    written: list[int] = []
    file = tmp_path / "model.safetensors"
    write_tensors(
        file, {n: (a.dtype, a.shape) for n, a in arrays.items()}, lambda n: [lambda: arrays[n]], written.append
    )
    assert_same_bits(load_file(file), arrays)
    with safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert sum(written) == sum(array.nbytes for array in arrays.values())
    assert file.stat().st_size - sum(written) == 8 + int.from_bytes(file.read_bytes()[:8], "little")
    for tensor in read_header(file).values():
        assert tensor.offset % tensor.dtype.itemsize == 0, "not aligned"


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """Sharded weights and narrow layers must be copied to be written; no copy may stay, here or in the arrays."""
    first = tiny_config(
        vocab_size=64, intermediate_sizes=(32, 30), num_attention_heads=2, num_key_value_heads=1, width_multiple=8
    )
    ones = {name: jnp.ones(shape.shape, jnp.float32) for name, shape in parameter_shapes(first).items()}
    # What is imported on the way is not counted.
    checkpoint = convert.LoadedCheckpoint(
        model=build_model(first, ones), source="ones", hf_config={"model_type": "llama"}
    )
    convert.save(checkpoint, tmp_path / "first")
    # The largest tensor is eight times any other, for some are read ahead while one is written.
    widths = (2048, 2000, 1800, 2048) * 2
    config = tiny_config(vocab_size=16384, hidden_size=256, intermediate_sizes=widths, head_dim=64, width_multiple=8)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    arrays = {
        name: jax.device_put(jnp.ones(shape.shape, jnp.float32), NamedSharding(mesh, P("model")))
        if shape.shape[0] % 8 == 0
        else jnp.ones(shape.shape, jnp.float32)
        for name, shape in parameter_shapes(config).items()
    }
    checkpoint = convert.LoadedCheckpoint(
        model=build_model(config, arrays), source="ones", hf_config={"model_type": "llama"}
    )
    largest = max(array.nbytes for array in arrays.values())
    tracemalloc.start()
    convert.save(checkpoint, tmp_path / "out")
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(array.nbytes for array in arrays.values()) > 4 * largest
    assert peak < 1.5 * largest
    assert now < 0.1 * largest


def test_progress_is_told_for_every_tensor(tmp_path: Path, small_shards: int) -> None:
    tensors = mixed_tensors(hf_config())
    write_folder(tmp_path / "in", hf_config(), tensors)
    total = sum(array.nbytes for array in tensors.values())
    told: list[tuple[str, int, int]] = []
    convert.save(
        convert.load(tmp_path / "in", progress=lambda *report: told.append(report)),
        tmp_path / "out",
        progress=lambda *report: told.append(report),
    )
    for what in ("reading safetensors", "writing safetensors"):
        done = [report[1] for report in told if report[0] == what]
        assert len(done) == len(tensors)
        assert done == sorted(done)
        assert done[-1] == total
    assert {report[2] for report in told} == {total}


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """A disk that refuses the ten-thousandth byte of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_refuses(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    write_folder(tmp_path / "in")
    checkpoint = convert.load(tmp_path / "in")
    (tmp_path / "place").mkdir()
    request.getfixturevalue("small_files_only")
    with pytest.raises(OperationError, match=r"^cannot write .*model\.safetensors: File too large$"):
        convert.save(checkpoint, tmp_path / "place" / "out")
    assert os.listdir(tmp_path / "place") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk() -> None:
    array = np.ones(10, np.float32)
    with pytest.raises(OperationError, match=r"^cannot write /dev/full: No space left on device$"):
        write_tensors(Path("/dev/full"), {"a": (array.dtype, (10,))}, lambda name: [lambda: array], lambda nbytes: None)


# ------------------------------------------------------------------------------------------------ stock transformers

# "narrow" has layers of different widths.
FOR_TRANSFORMERS = {
    **{name: CONFIGS[name] for name in ("llama", "llama3 rope", "tied", "mistral")},
    "narrow": hf_config(),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, np.ndarray]]:
    """For each case the folder that was there, the folder that we wrote, and our logits."""
    cases = {}
    for name, config in FOR_TRANSFORMERS.items():
        source, target = (tmp_path_factory.mktemp("transformers") / kind for kind in ("in", "out"))
        write_folder(source, config)
        checkpoint = narrowed(source) if name == "narrow" else convert.load(source)
        convert.save(checkpoint, target)
        cases[name] = source, target, logits(checkpoint.model, TOKENS)
    return cases


@pytest.mark.torch
@pytest.mark.parametrize("name", FOR_TRANSFORMERS)
def test_stock_transformers_computes_the_same(written: dict[str, tuple[Path, Path, np.ndarray]], name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    def theirs(folder: Path) -> np.ndarray:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", attn_implementation="eager", output_loading_info=True
        )
        assert not any(loading.values()), loading
        with torch.no_grad():
            values: np.ndarray = model(torch.from_numpy(TOKENS)).logits.numpy()
        return values

    source, target, ours = written[name]
    got = theirs(target)
    np.testing.assert_allclose(got, ours, rtol=0, atol=1e-4)
    assert np.ptp(ours) > 3, "too flat to show anything"
    if name != "narrow":
        np.testing.assert_array_equal(got, theirs(source))


@pytest.mark.torch
def test_stock_transformers_loads_shards_and_mixed_dtypes(tmp_path: Path, small_shards: int) -> None:
    from transformers import AutoModelForCausalLM

    tensors = mixed_tensors(hf_config())
    for array in tensors.values():  # float16 cannot hold the largest bfloat16
        array.reshape(-1)[:6] = 1
    write_folder(tmp_path / "in", hf_config(), tensors)
    convert.save(convert.load(tmp_path / "in"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert_same_bits(state, {name: array.astype(np.float32) for name, array in tensors.items()})


TRANSFORMERS_4 = """
import json, sys, transformers
answers = {"version": transformers.__version__}
answers["full config"] = json.loads(transformers.LlamaConfig(num_hidden_layers=3).to_json_string(use_diff=False))
try:
    import torch
except ImportError:
    torch = None
tokens = json.load(open(sys.argv[1]))
for folder in sys.argv[2:]:
    config = transformers.AutoConfig.from_pretrained(folder)
    answers[folder] = answer = {
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "dtype": str(config.dtype).removeprefix("torch."),
        "sliding_window": getattr(config, "sliding_window", None),
        "eos_token_id": config.eos_token_id,
        "logits": None,
    }
    if torch is not None:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", attn_implementation="eager", output_loading_info=True
        )
        assert not any(loading.values()), loading
        with torch.no_grad():
            answer["logits"] = model(torch.tensor(tokens)).logits.tolist()
json.dump(answers, sys.stdout)
"""


@pytest.mark.torch
def test_transformers_4_reads_the_same(written: dict[str, tuple[Path, Path, np.ndarray]], tmp_path: Path) -> None:
    python = os.environ.get("GLUPRUNE_TRANSFORMERS4_PYTHON")
    if not python:
        pytest.skip("GLUPRUNE_TRANSFORMERS4_PYTHON names no Python with transformers 4")
    (tmp_path / "tokens.json").write_text(json.dumps(TOKENS.tolist()))
    folders = [str(target) for _, target, _ in written.values()]
    done = subprocess.run(
        [python, "-c", TRANSFORMERS_4, tmp_path / "tokens.json", *folders], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert answers["version"].startswith("4.")
    full, _ = read_config(answers["full config"])
    assert (full.hidden_size, full.num_hidden_layers, full.attention) == (4096, 3, (LayerAttention(Rope(10000.0)),) * 3)
    for name, (_, target, ours) in written.items():
        answer = answers[str(target)]
        assert answer["rope_theta"] == 10000.0, name
        assert answer["rope_scaling"] == (LLAMA3_ROPE if name == "llama3 rope" else None), name
        assert answer["dtype"] == "float32", name
        assert answer["sliding_window"] is None, name
        assert answer["eos_token_id"] == 2, name
        if answer["logits"] is not None:
            np.testing.assert_allclose(np.array(answer["logits"], np.float32), ours, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.torch
def test_an_index_left_beside_a_single_file_is_ignored_as_transformers_does(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_folder(tmp_path, tensors=hf_tensors(hf_config(), seed=1), shards=2)
    new = hf_tensors(hf_config(), seed=2)
    write_folder(tmp_path, tensors=new)
    state = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    assert_same_bits({name: tensor.numpy() for name, tensor in state.items()}, new)
    convert.save(convert.load(tmp_path), tmp_path.parent / f"{tmp_path.name}-out")
    assert_same_bits(tensors_of(tmp_path.parent / f"{tmp_path.name}-out"), new)


# ---------------------------------------------------------------------------------------------------------- refusals


def rewrite(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_header(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the header as a broken writer would have written it."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def rename_in_header(folder: Path, name: str, other: str | bytes) -> None:
    """Puts bytes of the same length into the header."""
    file, other = folder / "model.safetensors", other.encode() if isinstance(other, str) else other
    content = file.read_bytes()
    assert content.count(name.encode()) == 1
    assert len(other) == len(name)
    file.write_bytes(content.replace(name.encode(), other))


def rewrite_shard(folder: Path, name: str, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name)


def break_index(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(content)


def poke(name: str, value: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors[name].reshape(-1).__setitem__(-1, value))

    return edit


def remove_and_add(tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = tensors["model.layers.3.extra"] = np.ones(3, np.float32)


def write_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def shard(edit: Callable[[Path, dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        write_folder(folder, shards=2)
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        edit(folder, index)
        file.write_text(json.dumps(index))

    return damage


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def entry(change: dict[str, Any]) -> Callable[[Path], None]:
    """Puts something else into the header's entry of the final norm, whose 192 bytes are 48 float32."""
    return lambda folder: edit_header(folder, lambda header: header["model.norm.weight"].update(change))


GATE = "model.layers.1.mlp.gate_proj.weight"
SECOND = "model-00002-of-00002.safetensors"
BAD: dict[str, tuple[Callable[[Path], Any], type[GlupruneError], str]] = {
    "missing and extra": (
        lambda folder: rewrite(folder, remove_and_add),
        OperationError,
        r"missing model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight; unexpected "
        r"model\.layers\.0\.self_attn\.q_proj\.bias, model\.layers\.3\.extra$",
    ),
    "shape": (
        lambda folder: rewrite(folder, lambda t: t.update({GATE: t[GATE].T.copy()})),
        OperationError,
        r"model\.layers\.1\.mlp\.gate_proj\.weight has shape \[48, 80\], config\.json means \[80, 48\]$",
    ),
    "nan": (poke(GATE, np.nan), OperationError, r"tensor model\.layers\.1\.mlp\.gate_proj\.weight has NaN or Inf"),
    "inf": (poke("lm_head.weight", np.inf), OperationError, r"tensor lm_head\.weight has NaN or Inf weights$"),
    "-inf": (poke("model.norm.weight", -np.inf), OperationError, r"tensor model\.norm\.weight has NaN or Inf weights$"),
    "empty file": (cut("model.safetensors", 0), OperationError, r"model\.safetensors is truncated or not safetensors"),
    "cut header": (cut("model.safetensors", 100), OperationError, "truncated or not safetensors: 100 bytes cannot"),
    "cut data": (cut("model.safetensors", 200_000), OperationError, "is truncated: it is 200,000 bytes long, its hea"),
    "more data": (
        lambda folder: os.truncate(folder / "model.safetensors", 10**6),
        OperationError,
        "is corrupt: it is 1,000,000 bytes long, its header describes",
    ),
    "pickle": (
        write_text("model.safetensors", "\x80\x02}q\x00(this is a PyTorch file"),
        OperationError,
        "is truncated or not safetensors",
    ),
    "no JSON": (
        write_text("model.safetensors", "\x08" + "\0" * 7 + "not JSON"),
        OperationError,
        r"model\.safetensors is corrupt: its header is not JSON",
    ),
    "no table": (write_text("model.safetensors", "\x02" + "\0" * 7 + "[]"), OperationError, "not a table of tensors"),
    "deep": (
        lambda folder: (folder / "model.safetensors").write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5),
        OperationError,
        "its header is not JSON",
    ),
    "fractional": (entry({"shape": [48.0]}), OperationError, r"bad entry in its header .*whole numbers"),
    "text as shape": (entry({"shape": "48"}), OperationError, "bad entry in its header"),
    "negative": (entry({"shape": [-6, -8]}), OperationError, "bad entry in its header"),
    "overflow": (
        entry({"shape": [2**64, 10**30]}),
        OperationError,
        r"has 192 bytes for shape \(18446744073709551616, ",
    ),
    "half": (entry({"dtype": "F16"}), OperationError, r"norm\.weight has 192 bytes for shape \(48,\) of float16"),
    "overlap": (entry({"data_offsets": [0, 192]}), OperationError, r"is corrupt: .* lies at 0-"),
    "no dtype": (entry({"dtype": None}), OperationError, "bad entry in its header .*the dtype must be text"),
    "new dtype": (
        entry({"dtype": "F4"}),
        RequestError,
        r"dtypes other than F32, F16, BF16: model\.norm\.weight \(F4\)$",
    ),
    "dtype list": (entry({"dtype": ["F32"]}), OperationError, "bad entry in its header"),
    "no entry": (
        lambda folder: edit_header(folder, lambda header: header.update({"model.norm.weight": 3})),
        OperationError,
        "bad entry in its header",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), RequestError, r"has no config\.json; it is not a"),
    "config no JSON": (write_text("config.json", "{"), OperationError, r"config\.json is not JSON: "),
    "config a list": (
        write_text("config.json", "[]"),
        OperationError,
        r"config\.json is no model config: it holds \[\]",
    ),
    "config deep": (write_text("config.json", "[" * 10**5), OperationError, r"config\.json is not JSON: "),
    "config binary": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"),
        OperationError,
        r"config\.json is not JSON: ",
    ),
    "mixtral": (
        write_text("config.json", json.dumps(hf_config(model_type="mixtral"))),
        RequestError,
        r"config\.json has model_type 'mixtral', a mixture of experts, which is pruned from file to file by its",
    ),
    "yarn": (
        write_text("config.json", json.dumps(hf_config(rope_scaling={"rope_type": "dynamic", "factor": 4.0}))),
        RequestError,
        r"config\.json: rope_scaling has rope_type 'dynamic'; supported are 'default', ",
    ),
    "heads": (
        write_text("config.json", json.dumps(hf_config(num_key_value_heads=4))),
        RequestError,
        r"config\.json: the config says num_attention_heads = 6 and num_key_value_heads = 4",
    ),
    "history": (write_text("gluprune_history.json", "{}"), OperationError, r"gluprune_history\.json is corrupt"),
    "history item": (write_text("gluprune_history.json", "[1]"), OperationError, r"gluprune_history\.json is corrupt"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        RequestError,
        r"has no model\.safetensors and no .*index\.json \(it has pytorch_model\.bin, which are not read\)",
    ),
    "no shard": (
        shard(lambda folder, index: (folder / SECOND).unlink()),
        OperationError,
        f"names files that are not there: {SECOND}",
    ),
    "cut shard": (
        shard(lambda folder, index: os.truncate(folder / SECOND, 9000)),
        OperationError,
        f"{SECOND} is truncated",
    ),
    "index and files": (
        shard(lambda folder, index: rewrite_shard(folder, SECOND, lambda tensors: tensors.pop("model.norm.weight"))),
        OperationError,
        r"the tensors do not match config\.json: missing model\.norm\.weight$",
    ),
    "index of bytes": (
        lambda folder: break_index(folder, b'{"weight_map": {"a": "' + b"b" * 9000 + b"\xff"),
        OperationError,
        r"model\.safetensors\.index\.json is not a safetensors index: byte 9022 is not UTF-8$",
    ),
    "index of numbers": (
        shard(lambda folder, index: index["weight_map"].update({GATE: 3, "model.norm.weight": ""})),
        OperationError,
        r"index\.json names no file for model\.layers\.1\.mlp\.gate_proj\.weight, model\.norm\.weight$",
    ),
    "absolute": (
        shard(lambda folder, index: index["weight_map"].update({GATE: "/etc/hosts"})),
        OperationError,
        r"names files outside its folder: /etc/hosts$",
    ),
    "null in a file name": (
        shard(lambda folder, index: index["weight_map"].update({GATE: "a\0b"})),
        OperationError,
        r"names files that are not there: 'a\\x00b'$",
    ),
    "outside": (
        shard(lambda folder, index: index["weight_map"].update({GATE: "../secret.safetensors"})),
        OperationError,
        r"names files outside its folder: \.\./secret\.safetensors",
    ),
    "long name": (
        shard(lambda folder, index: index["weight_map"].update({GATE: "x" * 5000})),
        OperationError,
        "names files that are not there: xxx",
    ),
    "no map": (shard(lambda folder, index: index.pop("weight_map")), OperationError, "is not a safetensors index"),
    "map a list": (shard(lambda folder, index: index.update(weight_map=[])), OperationError, "not a safetensors index"),
    "twice": (
        shard(lambda folder, index: save_file(hf_tensors(hf_config(), seed=1), folder / SECOND)),
        OperationError,
        rf"{SECOND} has other contents than an earlier file for lm_head\.weight, .* and \d more$",
    ),
    "name twice": (
        lambda folder: rename_in_header(folder, "layers.1.mlp.up_proj", "layers.0.mlp.up_proj"),
        OperationError,
        r"is corrupt: its header has model\.layers\.0\.mlp\.up_proj\.weight twice$",
    ),
    "header not UTF-8": (
        lambda folder: rename_in_header(folder, "model.norm.weight", b"model.norm.\xffeight"),
        OperationError,
        r"is corrupt: its header is not UTF-8 from byte \d+ on$",
    ),
    "endless offset": (
        entry({"data_offsets": [0, 10**4000]}),
        OperationError,
        r"bad entry in its header .*offsets must be whole numbers up to 9223372036854775807",
    ),
    "a name of many lines": (
        lambda folder: rewrite(folder, lambda tensors: tensors.update({"a\nb" * 1000: tensors["model.norm.weight"]})),
        OperationError,
        r"unexpected 'a\\nba.*\.\.\..*a\\nb'$",
    ),
    "fewer layers": (
        write_text("config.json", json.dumps(hf_config(num_hidden_layers=1))),
        OperationError,
        r"they are of 3 layers, num_hidden_layers is 1; unexpected model\.layers\.1\.input_.* and 1\d more$",
    ),
    "more layers": (
        write_text("config.json", json.dumps(hf_config(num_hidden_layers=10_000))),
        OperationError,
        r"they are of 3 layers, num_hidden_layers is 10000; missing model\.layers\.10\.input_.* and 899\d\d more$",
    ),
    "another width": (
        write_text("config.json", json.dumps(hf_config(intermediate_size=81))),
        OperationError,
        r"gate_proj\.weight has shape \[80, 48\], config\.json means \[81, 48\], and so have 8 more other shapes$",
    ),
    "no head": (
        lambda folder: rewrite(folder, lambda tensors: tensors.pop("lm_head.weight")),
        OperationError,
        r"config\.json: missing lm_head\.weight \(with tie_word_embeddings it would be the embedding\)$",
    ),
    "no embedding": (
        lambda folder: rewrite(folder, lambda tensors: tensors.pop("model.embed_tokens.weight")),
        OperationError,
        r"config\.json: missing model\.embed_tokens\.weight$",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_every_refusal_is_one_sentence_that_says_where(tmp_path: Path, name: str) -> None:
    damage, kind, message = BAD[name]
    damage(write_folder(tmp_path))
    with pytest.raises(kind, match=message) as caught:
        convert.load(tmp_path)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path)), "does not say where"
    assert len(str(caught.value)) <= 500


@pytest.mark.parametrize("dtype", ["float64", "int8", "int32", "int64", "bool", "float8_e4m3fn", "float8_e5m2"])
def test_other_dtypes_are_refused_by_name(tmp_path: Path, dtype: str) -> None:
    """Whatever their number: a quantised model has hundreds."""
    tensors = hf_tensors(hf_config())
    code = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "bool": "BOOL"}.get(dtype) or (
        dtype[0].upper() + dtype.lstrip("floatin")
    )
    numpy_dtype = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    tensors[GATE] = tensors[GATE].astype(numpy_dtype)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(numpy_dtype)
    write_folder(tmp_path, tensors=tensors)
    message = rf"model\.safetensors has tensors of dtypes other than F32, F16, BF16: .*{GATE} \({code}\).*"
    with pytest.raises(RequestError, match=message) as caught:
        convert.load(tmp_path)
    assert f"model.norm.weight ({code})" in str(caught.value)


SMALL = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1.5, -0.0, 7.0], np.float16),
    "c": np.ones((1, 2), ml_dtypes.bfloat16),
}


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("small") / "model.safetensors"
    save_file(SMALL, file, metadata={"format": "pt"})
    return file.read_bytes()


def read_all(file: Path) -> dict[str, np.ndarray] | None:
    try:
        tensors = read_header(file)
        check_dtypes(tensors.values())
        return {name: read_tensor(tensor) for name, tensor in tensors.items()}
    except GlupruneError:
        return None


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([(0, 255)])
@example([(7, 255)])
@given(st.lists(st.tuples(st.integers(0, 10**4), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_are_refused_or_read_as_the_official_library_reads_them(
    tmp_path: Path, small_file: bytes, flips: list[tuple[int, int]]
) -> None:
    content = bytearray(small_file)
    for place, bits in flips:
        content[place % len(content)] ^= bits
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    ours = read_all(file)
    try:
        theirs = load_file(file)
    except (SafetensorError, KeyError, ValueError, OverflowError):  # dtypes that numpy lacks are KeyError
        return
    if ours is not None:
        assert_same_bits(ours, theirs)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, small_file: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(small_file)
    read = read_all(file)
    assert read is not None
    assert_same_bits(read, SMALL)
    for size in range(len(small_file)):
        file.write_bytes(small_file[:size])
        with pytest.raises(OperationError, match=r"model\.safetensors is truncated"):
            read_header(file)
