"""GGUF input: block formats, the permutation of Q and K, RoPE divisors, refusals, damaged files, tokenizers."""

import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from flax import nnx
from gguf import GGMLQuantizationType as GGMLType
from gguf import TokenType
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

import convert
from convert.checkpoint import Checkpoint, model_arrays
from convert.gguf_model import read_gguf
from convert.gguf_tokenizer import tokenizer_assets
from convert.names import tensor_names
from gluprune_jax.errors import GlupruneError, OperationError, RequestError
from gluprune_jax.mesh import MeshShape, make_mesh, mesh_of, parameter_sharding
from gluprune_jax.model import Llama, Llama3Rope, ModelConfig, rope_frequencies, rotate

CONFIG = ModelConfig(
    vocab_size=11,
    hidden_size=16,
    intermediate_sizes=(24, 20),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
)

# ------------------------------------------------------------------------------------------- writing fixtures


def metadata(config: ModelConfig) -> dict[str, Any]:
    return {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": list(config.intermediate_sizes),
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
        "llama.vocab_size": config.vocab_size,
    }


def weights(config: ModelConfig) -> dict[str, np.ndarray]:
    """Random float32 tensors by GGUF name, in the row order of the Hugging Face files."""
    rng = np.random.default_rng(0)
    return {name.gguf: rng.standard_normal(name.shape).astype(np.float32) for name in tensor_names(config)}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: the pair (i, i + H/2) that Hugging Face rotates together stands at (2i, 2i + 1)."""
    out = np.empty_like(rows)
    H = rows.shape[0] // heads
    for head in range(heads):
        for i in range(H // 2):
            out[head * H + 2 * i] = rows[head * H + i]
            out[head * H + 2 * i + 1] = rows[head * H + i + H // 2]
    return out


def permute_all(tensors: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return {
        name: permute(a, heads[kind]) if (kind := name.split(".")[-2]) in heads else a for name, a in tensors.items()
    }


def write_gguf(
    path: pathlib.Path,
    fields: dict[str, Any],
    tensors: Mapping[str, np.ndarray | tuple[np.ndarray, GGMLType]],
    architecture: str = "llama",
) -> pathlib.Path:
    """Writes a GGUF file; a tensor given with a type is an array of the bytes of its blocks, row by row."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path: pathlib.Path, fields: dict[str, Any] | None = None, **tensors: Any) -> pathlib.Path:
    """A GGUF of CONFIG; `fields` are changed (None: left out), as are tensors, with `__` for the dots."""
    changed = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    all_tensors = permute_all(weights(CONFIG), CONFIG) | changed
    kept = {name: tensor for name, tensor in all_tensors.items() if tensor is not None}
    return write_gguf(path / "model.gguf", metadata(CONFIG) | (fields or {}), kept)


def read_arrays(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """By GGUF name, in the shapes of the Hugging Face files."""
    return {name.gguf: np.asarray(array).reshape(name.shape) for name, array in model_arrays(checkpoint.model)}


# -------------------------------------------------------------------------------------------- block formats
# Each packs rows of whole blocks from the definition of the format in ggml, and computes what they stand for. The
# scales are powers of two times small whole numbers, so that float32 arithmetic is exact in any order.


def pack_q8_0(rng: np.random.Generator) -> tuple[bytes, list[float]]:
    scale, q = 2.0 ** int(rng.integers(-6, 0)), rng.integers(-128, 128, 32)
    return np.float16(scale).tobytes() + q.astype(np.int8).tobytes(), [scale * int(v) for v in q]


def pack_q4_0(rng: np.random.Generator) -> tuple[bytes, list[float]]:
    scale, q = 2.0 ** int(rng.integers(-6, 0)), [int(v) for v in rng.integers(0, 16, 32)]
    nibbles = bytes(q[j] | q[j + 16] << 4 for j in range(16))
    return np.float16(scale).tobytes() + nibbles, [scale * (v - 8) for v in q]


def pack_q4_1(rng: np.random.Generator) -> tuple[bytes, list[float]]:
    scale, low = 2.0 ** int(rng.integers(-6, 0)), float(rng.integers(-8, 8))
    q = [int(v) for v in rng.integers(0, 16, 32)]
    nibbles = bytes(q[j] | q[j + 16] << 4 for j in range(16))
    return np.array([scale, low], np.float16).tobytes() + nibbles, [scale * v + low for v in q]


def pack_q4_k(rng: np.random.Generator) -> tuple[bytes, list[float]]:
    """256 values in 8 sub-blocks of 32, each with a 6-bit scale and a 6-bit minimum."""
    d, dmin = 2.0**-5, 2.0**-3
    scales, mins = ([int(v) for v in rng.integers(0, 64, 8)] for _ in range(2))
    q = [int(v) for v in rng.integers(0, 16, 256)]
    packed = [0] * 12
    for j in range(4):
        packed[j] = scales[j] | scales[j + 4] >> 4 << 6
        packed[j + 4] = mins[j] | mins[j + 4] >> 4 << 6
        packed[j + 8] = scales[j + 4] & 15 | (mins[j + 4] & 15) << 4
    nibbles = bytes(q[64 * c + j] | q[64 * c + 32 + j] << 4 for c in range(4) for j in range(32))
    values = [d * scales[i // 32] * q[i] - dmin * mins[i // 32] for i in range(256)]
    return np.array([d, dmin], np.float16).tobytes() + bytes(packed) + nibbles, values


def pack_q6_k(rng: np.random.Generator) -> tuple[bytes, list[float]]:
    """256 values of 6 bits in 16 sub-blocks of 16, each with an 8-bit scale; low nibbles apart from high bits."""
    d, scales = 2.0**-7, [int(v) for v in rng.integers(-128, 128, 16)]
    q = [int(v) for v in rng.integers(0, 64, 256)]
    low, high = [0] * 128, [0] * 64
    for half in range(2):
        for j in range(32):
            a, b, c, e = (q[128 * half + 32 * quarter + j] for quarter in range(4))
            low[64 * half + j] = a & 15 | (c & 15) << 4
            low[64 * half + 32 + j] = b & 15 | (e & 15) << 4
            high[32 * half + j] = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | e >> 4 << 6
    values = [d * scales[i // 16] * (q[i] - 32) for i in range(256)]
    return bytes(low) + bytes(high) + np.array(scales, np.int8).tobytes() + np.float16(d).tobytes(), values


@pytest.mark.parametrize(
    ("kind", "pack", "block"),
    [
        (GGMLType.Q8_0, pack_q8_0, 32),
        (GGMLType.Q4_0, pack_q4_0, 32),
        (GGMLType.Q4_1, pack_q4_1, 32),
        (GGMLType.Q4_K, pack_q4_k, 256),
        (GGMLType.Q6_K, pack_q6_k, 256),
    ],
)
def test_quantised_blocks(tmp_path: pathlib.Path, kind: GGMLType, pack: Callable[..., Any], block: int) -> None:
    config = ModelConfig(3, 512, (5,), 1, 1, 4, 8, 1e-5, 1e4, tie_word_embeddings=True)
    rng = np.random.default_rng(1)
    blocks = [pack(rng) for _ in range(5 * 512 // block)]
    packed = np.frombuffer(b"".join(data for data, _ in blocks), np.uint8).reshape(5, -1)
    expected = np.array([values for _, values in blocks], np.float32).reshape(5, 512)
    assert len(np.unique(expected)) > 15  # or the order of the values would not be tested
    tensors = weights(config) | {"blk.0.ffn_gate.weight": (packed, kind)}
    checkpoint = read_gguf(write_gguf(tmp_path / "model.gguf", metadata(config), tensors))
    got = read_arrays(checkpoint)["blk.0.ffn_gate.weight"]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)
    assert any(f"1 {kind.name}" in note for note in checkpoint.notes)


def test_plain_types_are_kept_bit_for_bit(tmp_path: pathlib.Path) -> None:
    half = np.random.default_rng(2).standard_normal((24, 16)).astype(np.float16)
    brain = np.random.default_rng(3).standard_normal((24, 16)).astype(ml_dtypes.bfloat16)
    path = write_model(
        tmp_path, blk__0__ffn_gate__weight=half, blk__0__ffn_up__weight=(brain.view(np.uint8), GGMLType.BF16)
    )
    arrays = read_arrays(read_gguf(path))
    for name, expected in (
        ("blk.0.ffn_gate.weight", half),
        ("blk.0.ffn_up.weight", brain),
        ("blk.0.ffn_down.weight", weights(CONFIG)["blk.0.ffn_down.weight"]),
    ):
        assert arrays[name].dtype == expected.dtype
        assert arrays[name].tobytes() == expected.tobytes()


def test_dtype_casts_every_tensor(tmp_path: pathlib.Path) -> None:
    path = write_model(tmp_path, blk__0__ffn_gate__weight=np.ones((24, 16), np.float16))
    arrays = read_arrays(read_gguf(path, dtype=np.dtype(ml_dtypes.bfloat16)))
    assert {array.dtype for array in arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
    expected = weights(CONFIG)["blk.1.attn_q.weight"].astype(ml_dtypes.bfloat16)
    assert arrays["blk.1.attn_q.weight"].tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_onto_a_mesh(tmp_path: pathlib.Path, dtype: str | None) -> None:
    gate = np.random.default_rng(0).normal(size=(20, 16)).astype(ml_dtypes.bfloat16)
    path = write_model(tmp_path, blk__1__ffn_gate__weight=(gate.view(np.uint8), GGMLType.BF16))
    plain, sizes = convert.load(path, dtype=dtype), []

    def choose(abstract: Llama) -> Mesh:
        config = abstract.config
        sizes.append(sum(array.size * array.dtype.itemsize for _, array in model_arrays(abstract)))
        return make_mesh(MeshShape(1, 8), config.num_key_value_heads)

    loaded = convert.load(path, dtype=dtype, mesh=choose)
    assert sizes == [sum(array.nbytes for _, array in model_arrays(plain.model))]
    assert loaded.config == dataclasses.replace(plain.config, width_multiple=8)
    mesh = mesh_of(loaded.model)
    assert mesh is not None
    expected = {name.hf: np.asarray(array) for name, array in model_arrays(plain.model)}
    for name, array in model_arrays(loaded.model):
        assert array.sharding == parameter_sharding(mesh, name.path, array.shape)
        values = np.zeros(array.shape, array.dtype)
        values[tuple(map(slice, expected[name.hf].shape))] = expected[name.hf]
        assert np.asarray(array).tobytes() == values.tobytes(), name.hf


def test_another_type_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    blocks = np.zeros((24, 16), np.float32).view(np.int32)
    with pytest.raises(RequestError, match=r"blk\.0\.ffn_up\.weight is stored as I32; accepted: F32, F16, BF16"):
        read_gguf(write_model(tmp_path, blk__0__ffn_up__weight=blocks))


# ------------------------------------------------------------------------------------------ arrays and shapes


def test_reads_what_was_written(tmp_path: pathlib.Path) -> None:
    calls: list[tuple[str, int, int]] = []
    checkpoint = read_gguf(write_model(tmp_path), progress=lambda *call: calls.append(call))
    assert checkpoint.config == CONFIG
    original = weights(CONFIG)
    arrays = read_arrays(checkpoint)
    assert arrays.keys() == original.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, original[name], err_msg=name)
    assert checkpoint.model.layers[0].self_attn.q_proj[...].shape == (4, 8, 16)
    assert checkpoint.hf_config == {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert any("no tokenizer" in note for note in checkpoint.notes)

    done = [call[1] for call in calls]
    total = sum(array.nbytes for array in original.values())
    assert len(calls) == len(original)
    assert done == sorted(done)
    assert done[-1] == total
    assert {call[2] for call in calls} == {total}
    assert {what for what, _, _ in calls} == {"reading GGUF"}


def test_permuted_rows_rotate_in_neighbouring_pairs_as_ours_do_in_halves(tmp_path: pathlib.Path) -> None:
    """The scores that llama.cpp computes from the file's own rows are those of the model read from it."""
    original = permute_all(weights(CONFIG), CONFIG)
    attention = read_gguf(write_model(tmp_path)).model.layers[1].self_attn
    x = np.random.default_rng(4).standard_normal((2, 16)).astype(np.float32)  # the inputs at two positions
    positions = np.array([3, 50])
    H, frequencies = CONFIG.head_dim, np.asarray(rope_frequencies(CONFIG))

    def llama_cpp(name: str) -> np.ndarray:
        pairs = (x @ original[name].T).reshape(2, -1, H // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * positions[:, None, None] * frequencies)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(2, -1, H)

    def ours(projection: jax.Array) -> np.ndarray:
        heads = np.einsum("td,nhd->tnh", x, projection)
        return np.asarray(rotate(*map(jnp.asarray, (heads[None], positions[None], frequencies)))[0])

    q, k = llama_cpp("blk.1.attn_q.weight"), llama_cpp("blk.1.attn_k.weight")
    expected = np.einsum("tnh,snh->nts", q, np.repeat(k, 2, axis=1))
    q, k = ours(attention.q_proj[...]), ours(attention.k_proj[...])
    np.testing.assert_allclose(np.einsum("tnh,snh->nts", q, np.repeat(k, 2, axis=1)), expected, atol=1e-4)


def test_arrays_do_not_depend_on_the_file_afterwards(tmp_path: pathlib.Path) -> None:
    path = write_model(tmp_path)
    checkpoint = read_gguf(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))
    np.testing.assert_array_equal(read_arrays(checkpoint)["token_embd.weight"], weights(CONFIG)["token_embd.weight"])


def test_without_output_weight_the_embeddings_are_tied(tmp_path: pathlib.Path) -> None:
    checkpoint = read_gguf(write_model(tmp_path, output__weight=None))
    assert checkpoint.config.tie_word_embeddings
    assert not hasattr(checkpoint.model, "lm_head")
    assert not any("output.weight" in note for note in checkpoint.notes)


def test_an_output_weight_equal_to_the_embedding_is_tied_with_a_note(tmp_path: pathlib.Path) -> None:
    embedding = weights(CONFIG)["token_embd.weight"]
    checkpoint = read_gguf(write_model(tmp_path, output__weight=embedding))
    assert checkpoint.config.tie_word_embeddings
    assert any("output.weight is identical to token_embd.weight" in note for note in checkpoint.notes)

    nearly = embedding.copy()
    nearly[-1, -1] = np.nextafter(nearly[-1, -1], 9)
    assert not read_gguf(write_model(tmp_path, output__weight=nearly)).config.tie_word_embeddings


def test_all_tensor_problems_are_listed_at_once(tmp_path: pathlib.Path) -> None:
    path = write_model(
        tmp_path,
        blk__0__ffn_up__weight=None,
        output_norm__weight=None,
        blk__0__attn_q__bias=np.zeros(32, np.float32),
        blk__7__attn_norm__weight=np.zeros(16, np.float32),
        blk__1__ffn_down__weight=np.zeros((20, 16), np.float32),
    )
    with pytest.raises(OperationError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert str(path) in message
    assert "missing: blk.0.ffn_up.weight, output_norm.weight;" in message
    assert "unexpected: blk.0.attn_q.bias, blk.7.attn_norm.weight;" in message
    assert "of a wrong shape: blk.1.ffn_down.weight (20, 16) instead of (16, 20)" in message


def test_a_missing_embedding_is_reported_with_the_others(tmp_path: pathlib.Path) -> None:
    with pytest.raises(OperationError, match=r"missing: token_embd\.weight, output_norm\.weight"):
        read_gguf(write_model(tmp_path, token_embd__weight=None, output_norm__weight=None, output__weight=None))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: pathlib.Path, bad: float) -> None:
    norm = np.ones(16, np.float32)
    norm[3] = bad
    with pytest.raises(OperationError, match=r"blk\.1\.ffn_norm\.weight holds values that are not finite"):
        read_gguf(write_model(tmp_path, blk__1__ffn_norm__weight=norm))


def test_an_infinite_block_scale_is_refused(tmp_path: pathlib.Path) -> None:
    config = ModelConfig(3, 32, (5,), 1, 1, 4, 8, 1e-5, 1e4, tie_word_embeddings=True)
    packed = np.zeros((5, 34), np.uint8)
    packed[2, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
    tensors = weights(config) | {"blk.0.ffn_up.weight": (packed, GGMLType.Q8_0)}
    with pytest.raises(OperationError, match=r"blk\.0\.ffn_up\.weight holds values that are not finite"):
        read_gguf(write_gguf(tmp_path / "model.gguf", metadata(config), tensors))


def test_a_cast_that_overflows_is_refused(tmp_path: pathlib.Path) -> None:
    path = write_model(tmp_path, blk__0__ffn_up__weight=np.full((24, 16), 1e6, np.float32))
    with pytest.raises(RequestError, match=r"blk\.0\.ffn_up\.weight holds values too large for float16"):
        read_gguf(path, dtype=np.dtype(np.float16))


# --------------------------------------------------------------------------------------------------- config


def test_defaults_of_absent_keys(tmp_path: pathlib.Path) -> None:
    config = ModelConfig(5, 16, (24, 24), 4, 4, 4, 64, 1e-6, 10000.0, tie_word_embeddings=True)
    absent = (
        "rope.freq_base",
        "head_count_kv",
        "key_length",
        "value_length",
        "dimension_count",
        "vocab_size",
    )
    fields = {key: value for key, value in metadata(config).items() if not key.endswith(absent)}
    fields["llama.feed_forward_length"] = 24
    checkpoint = read_gguf(write_gguf(tmp_path / "model.gguf", fields, weights(config)))
    assert checkpoint.config == config


def test_neutral_keys_are_accepted(tmp_path: pathlib.Path) -> None:
    fields = {
        "llama.expert_count": 0,
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 1.0,
        "llama.rope.scaling.original_context_length": 32,
        "llama.attention.head_count_kv": [2, 2],
        "llama.tensor_data_layout": "Meta AI original pth",
        "general.name": "tiny",
        "general.quantization_version": 2,
    }
    assert read_gguf(write_model(tmp_path, fields)).config == CONFIG


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"llama.expert_count": 8}, RequestError, r"llama\.expert_count is 8: .*Mixtral"),
        ({"llama.expert_used_count": 2}, RequestError, r"llama\.expert_used_count is 2; accepted: 0"),
        ({"llama.attention.sliding_window": 4096}, RequestError, r"llama\.attention\.sliding_window is 4096"),
        ({"llama.rope.scaling.type": "linear"}, RequestError, r"llama\.rope\.scaling\.type is 'linear'"),
        ({"llama.rope.scaling.type": "yarn"}, RequestError, r"llama\.rope\.scaling\.type is 'yarn'"),
        # Without a type, llama.cpp takes a factor as linear.
        ({"llama.rope.scaling.factor": 4.0}, RequestError, r"llama\.rope\.scaling\.factor is 4\.0"),
        ({"llama.rope.scale_linear": 2.0}, RequestError, r"llama\.rope\.scale_linear is 2\.0"),
        (
            {"llama.rope.dimension_count": 4},
            RequestError,
            r"llama\.rope\.dimension_count is 4; accepted: .*8",
        ),
        ({"llama.attention.value_length": 4}, RequestError, r"llama\.attention\.value_length is 4"),
        ({"llama.attention.causal": False}, RequestError, r"llama\.attention\.causal is False"),
        ({"llama.attention.head_count": [4, 2]}, RequestError, r"llama\.attention\.head_count differs"),
        ({"llama.logit_scale": 0.5}, RequestError, r"llama\.logit_scale is 0\.5.* not supported"),
        (
            {"llama.tensor_data_layout": "reference"},
            RequestError,
            r"llama\.tensor_data_layout is 'reference'",
        ),
        ({"general.type": "adapter"}, RequestError, r"general\.type is 'adapter'; accepted: 'model'"),
        ({"split.count": 3}, RequestError, r"split\.count is 3"),
        ({"llama.attention.head_count_kv": 3}, RequestError, r"num_key_value_heads = 3"),
        ({"llama.block_count": None}, OperationError, r"llama\.block_count is missing"),
        ({"llama.block_count": 4_000_000_000}, OperationError, r"llama\.block_count is 4000000000"),
        ({"llama.context_length": "long"}, OperationError, r"llama\.context_length is 'long'"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, OperationError, r"rms_epsilon is missing"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, OperationError, r"rms_epsilon is nan"),
        ({"llama.rope.freq_base": 0.0}, OperationError, r"llama\.rope\.freq_base is 0\.0"),
        ({"llama.feed_forward_length": [24, 20, 8]}, OperationError, r"feed_forward_length is \[24, 20, 8\]"),
        ({"llama.feed_forward_length": None}, OperationError, r"llama\.feed_forward_length is missing"),
        (
            {"llama.vocab_size": 12},
            OperationError,
            r"token_embd.weight holds 11 tokens, but llama\.vocab_size",
        ),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, OperationError, r"tokenizer\.ggml\.tokens says 2"),
        ({"tokenizer.ggml.tokens": "abc"}, OperationError, r"tokenizer\.ggml\.tokens is not a list"),
        (
            {"llama.attention.key_length": None, "llama.attention.head_count": 3},
            OperationError,
            r"llama\.attention\.head_count = 3 does not divide llama\.embedding_length = 16",
        ),
    ],
)
def test_refused_metadata(
    tmp_path: pathlib.Path, fields: dict[str, Any], error: type[GlupruneError], message: str
) -> None:
    path = write_model(tmp_path, fields)
    with pytest.raises(error, match=message) as caught:
        read_gguf(path)
    assert type(caught.value) is error
    assert str(caught.value).startswith(str(path))


def test_another_architecture_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", metadata(CONFIG), weights(CONFIG), architecture="qwen2")
    with pytest.raises(RequestError, match=r"general\.architecture is 'qwen2'; accepted: 'llama'"):
        read_gguf(path)


def llama3_divisors(head_dim: int, factor: float, original: int = 8192) -> np.ndarray:
    """`rope_freqs.weight` as llama.cpp's converter computes it, written out for one frequency at a time."""
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * 500000.0 ** (2 * i / head_dim)
        if wavelength < original / 4.0:
            divisors.append(1.0)
        elif wavelength > original / 1.0:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def write_with_divisors(path: pathlib.Path, head_dim: int, divisors: np.ndarray) -> pathlib.Path:
    config = ModelConfig(3, 16, (8,), 2, 1, head_dim, 131072, 1e-5, 500000.0, tie_word_embeddings=True)
    tensors = weights(config) | {"rope_freqs.weight": divisors}
    return write_gguf(path / "model.gguf", metadata(config), tensors)


@pytest.mark.parametrize(("head_dim", "factor"), [(64, 32.0), (128, 32.0), (128, 8.0)])
def test_rope_divisors_become_the_scaling_of_llama_3(tmp_path: pathlib.Path, head_dim: int, factor: float) -> None:
    divisors = llama3_divisors(head_dim, factor)
    assert len(np.unique(divisors)) > 3  # plain, scaled and some between
    checkpoint = read_gguf(write_with_divisors(tmp_path, head_dim, divisors))
    assert checkpoint.config.rope_scaling == Llama3Rope(factor, 1.0, 4.0, 8192)
    plain = 500000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    np.testing.assert_allclose(rope_frequencies(checkpoint.config), plain / divisors, rtol=1e-5)


def test_rope_divisors_of_one_mean_no_scaling(tmp_path: pathlib.Path) -> None:
    path = write_with_divisors(tmp_path, 64, np.ones(32, np.float32))
    assert read_gguf(path).config.rope_scaling is None


@pytest.mark.parametrize(
    "divisors",
    [
        llama3_divisors(64, 32.0, original=4096),
        llama3_divisors(64, 32.0) * np.where(np.arange(32) == 13, np.float32(1.001), np.float32(1)),
        np.linspace(1, 32, 32, dtype=np.float32),
        np.full(32, 0.5, np.float32),
        np.zeros(32, np.float32),
    ],
    ids=["original", "one-value", "linear", "half", "zero"],
)
def test_foreign_rope_divisors_are_refused(tmp_path: pathlib.Path, divisors: np.ndarray) -> None:
    with pytest.raises(RequestError, match=r"rope_freqs\.weight is not the RoPE scaling of Llama 3"):
        read_gguf(write_with_divisors(tmp_path, 64, divisors))


def test_rope_divisors_of_a_wrong_shape_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(OperationError, match=r"rope_freqs\.weight has shape \(64,\); expected \(32,\)"):
        read_gguf(write_with_divisors(tmp_path, 64, llama3_divisors(128, 8.0)))


# -------------------------------------------------------------------------------------------- damaged files


def test_a_file_cut_anywhere_is_refused(tmp_path: pathlib.Path) -> None:
    whole = write_model(tmp_path).read_bytes()
    cut = tmp_path / "cut.gguf"
    # The last 32 bytes may be padding, which nobody would miss.
    for length in [*range(64), *range(64, len(whole) - 32, 251), len(whole) - 33]:
        cut.write_bytes(whole[:length])
        with pytest.raises(OperationError, match=r"cut\.gguf: this is not a readable GGUF file") as caught:
            read_gguf(cut)
        assert caught.value.__cause__ is not None


def test_garbage_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.gguf"
    noise = np.random.default_rng(5).bytes(5000)
    for content in (
        b"",
        b"\x80\x04pickle",
        noise,
        b"GGUF\x03\0\0\0" + noise,
        b"GGUF\x03\0\0\0" + b"\xff" * 5000,
    ):
        path.write_bytes(content)
        with pytest.raises(OperationError, match=r"model\.gguf: this is not a readable GGUF file"):
            read_gguf(path)


def test_an_array_longer_than_the_file_is_refused(tmp_path: pathlib.Path) -> None:
    """The reader of the gguf package goes on for as many numbers as the count says."""
    content = write_model(tmp_path).read_bytes()
    name = b"llama.feed_forward_length"
    count = content.index(name) + len(name) + 8  # after the types of the value and of its items
    assert content[count : count + 8] == (2).to_bytes(8, "little")
    path = tmp_path / "long.gguf"
    path.write_bytes(content[:count] + (20_000).to_bytes(8, "little") + content[count + 8 :])
    with pytest.raises(OperationError, match=rf"it has {len(content)} bytes, and its own header asks for"):
        read_gguf(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RequestError, match=r"nothing\.gguf: there is no such file"):
        read_gguf(tmp_path / "nothing.gguf")
    with pytest.raises(OperationError, match="not a readable GGUF file"):
        read_gguf(tmp_path)


def test_a_flipped_byte_of_the_header_gives_a_model_or_one_of_our_errors(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=len(byte_level_fields()["tokenizer.ggml.tokens"]))
    path = tmp_path / "model.gguf"
    whole = write_gguf(path, metadata(config) | byte_level_fields(), weights(config)).read_bytes()
    header = whole.index(b"output.weight") + 32
    outcomes: set[type] = {type(read_gguf(path))}
    rng = np.random.default_rng(6)
    for _ in range(150):
        content = bytearray(whole)
        content[int(rng.integers(header))] ^= int(rng.integers(1, 256))
        path.write_bytes(content)
        try:
            read_gguf(path)
        except GlupruneError as error:
            outcomes.add(type(error))
    assert outcomes == {Checkpoint, RequestError, OperationError}


# --------------------------------------------------------------------------------------- byte-level tokenizers


def byte_level_fields(**changed: Any) -> dict[str, Any]:
    """The metadata of a byte-level BPE made by hand: all bytes, a few merges, three added tokens."""
    merges = ["3 4", "1 2", "12 3", "4 5", "45 6", "h e", "l l", "he ll", "hell o", "\u0120 hello", "' t"]
    tokens = sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in merges]
    tokens += ["world", "<bos>", "<eos>", "<tool>"]  # no merges lead to "world"
    types = [int(TokenType.NORMAL)] * (len(tokens) - 3)
    types += [int(TokenType.CONTROL), int(TokenType.CONTROL), int(TokenType.USER_DEFINED)]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        "tokenizer.chat_template": "{% for m in messages %}<bos>{{ m['content'] }}<eos>{% endfor %}",
        "llama.context_length": 64,
    } | {f"tokenizer.ggml.{key}": value for key, value in changed.items()}
    return {key: value for key, value in fields.items() if value is not None}


def fast_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_assets(fields)["tokenizer.json"].decode())


def auto_tokenizer(folder: pathlib.Path, assets: dict[str, bytes]) -> Any:
    folder.mkdir(exist_ok=True)
    for name, content in assets.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return AutoTokenizer.from_pretrained(folder)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text, add_special_tokens=False).tokens


def test_llama_bpe_splits_as_llama_3() -> None:
    tokenizer = fast_tokenizer(byte_level_fields())

    def words(text: str) -> list[str]:
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    assert words("1234567") == ["123", "456", "7"]
    assert words("don't DON'T we'll") == ["don", "'t", "\u0120DON", "'T", "\u0120we", "'ll"]
    assert words("a  b\n\n c!?\n") == ["a", "\u0120", "\u0120b", "\u010a\u010a", "\u0120c", "!?\u010a"]
    assert pieces(tokenizer, "123456") == ["123", "456"]  # not 34, the first of the merges
    assert pieces(tokenizer, "hello hello't") == ["hello", "\u0120hello", "'t"]


def test_llama_bpe_takes_whole_words_before_merges_and_smollm_does_not() -> None:
    assert pieces(fast_tokenizer(byte_level_fields()), "world") == ["world"]
    assert pieces(fast_tokenizer(byte_level_fields(pre="smollm")), "world") == list("world")


def test_smollm_splits_digits_one_by_one() -> None:
    tokenizer = fast_tokenizer(byte_level_fields(pre="smollm"))
    assert pieces(tokenizer, "1234 hello") == ["1", "2", "3", "4", "\u0120hello"]


@pytest.mark.parametrize(
    ("changed", "before", "after"),
    [
        ({}, True, False),
        ({"add_bos_token": False}, False, False),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
        ({"bos_token_id": None}, False, False),
        ({"pre": "smollm"}, False, False),
        ({"pre": "smollm", "add_bos_token": True}, True, False),
    ],
)
def test_bos_and_eos(tmp_path: pathlib.Path, changed: dict[str, Any], before: bool, after: bool) -> None:
    fields = byte_level_fields(**changed)
    bos, eos = (fields["tokenizer.ggml.tokens"].index(token) for token in ("<bos>", "<eos>"))
    tokenizer = fast_tokenizer(fields)
    text = tokenizer.encode("hello", add_special_tokens=False).ids
    expected = [bos] * before + text + [eos] * after
    assert tokenizer.encode("hello").ids == expected
    assert tokenizer.encode("hello", "hello").ids == expected * 2
    loaded = auto_tokenizer(tmp_path, tokenizer_assets(fields))
    assert loaded("hello") == {"input_ids": expected, "attention_mask": [1] * len(expected)}


def test_added_tokens_and_config_of_the_loaded_tokenizer(tmp_path: pathlib.Path) -> None:
    fields = byte_level_fields(padding_token_id=3)
    loaded = auto_tokenizer(tmp_path, tokenizer_assets(fields))
    tokens = fields["tokenizer.ggml.tokens"]
    assert loaded.convert_ids_to_tokens(list(range(len(loaded)))) == tokens
    ids = loaded("<bos>hello<tool>é <eos>", add_special_tokens=False)["input_ids"]
    assert [tokens[i] for i in ids if i > 255] == ["<bos>", "hello", "<tool>", "<eos>"]
    assert loaded.decode(ids) == "<bos>hello<tool>é <eos>"
    assert loaded.decode(ids, skip_special_tokens=True) == "hello<tool>é "
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<bos>", "<eos>", tokens[3])
    assert loaded.model_max_length == 64
    # transformers 5 would leave token_type_ids out by itself, 4 would not.
    assert loaded.init_kwargs["model_input_names"] == ["input_ids", "attention_mask"]
    assert loaded.decode(loaded("he 's , n't .")["input_ids"], skip_special_tokens=True) == "he 's , n't ."
    assert loaded.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<bos>x<eos>"


def test_tokenizer_and_token_ids_in_the_checkpoint(tmp_path: pathlib.Path) -> None:
    fields = byte_level_fields(eot_token_id=5)
    config = ModelConfig(len(fields["tokenizer.ggml.tokens"]), 8, (8,), 1, 1, 4, 64, 1e-5, 1e4)
    path = write_gguf(tmp_path / "model.gguf", metadata(config) | fields, weights(config))
    checkpoint = read_gguf(path)
    bos, eos = fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]
    assert checkpoint.hf_config["bos_token_id"] == bos
    assert "pad_token_id" not in checkpoint.hf_config
    generation = {"bos_token_id": bos, "eos_token_id": [eos, 5]}
    assert json.loads(checkpoint.assets["generation_config.json"]) == generation
    for name, content in tokenizer_assets(fields).items():
        assert checkpoint.assets[name] == content


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"model": "bert"}, RequestError, r"tokenizer\.ggml\.model is 'bert'; accepted: 'gpt2' .*'llama'"),
        ({"model": "t5"}, RequestError, r"tokenizer\.ggml\.model is 't5'"),
        (
            {"pre": "qwen2"},
            RequestError,
            r"tokenizer\.ggml\.pre is 'qwen2'; accepted: 'smollm' and 'llama-bpe'",
        ),
        ({"pre": None}, RequestError, r"tokenizer\.ggml\.pre is None"),
        ({"add_space_prefix": True}, RequestError, r"tokenizer\.ggml\.add_space_prefix is true"),
        ({"merges": None}, OperationError, r"tokenizer\.ggml\.merges is not a list of strings"),
        ({"merges": ["h e", "x y"]}, OperationError, r"tokenizer\.ggml\.merges holds 'x y'"),
        (
            {"tokens": ["a", "b", "a"], "token_type": [1] * 3},
            OperationError,
            r"tokens holds 'a' more than once",
        ),
        ({"token_type": [1]}, OperationError, r"tokenizer\.ggml\.token_type does not hold one type for each"),
        ({"model": "llama", "scores": ["0"] * 271}, OperationError, r"tokenizer\.ggml\.scores does not hold"),
        ({"eos_token_id": 9999}, OperationError, r"tokenizer\.ggml\.eos_token_id is 9999"),
        (
            {"add_bos_token": True, "bos_token_id": None},
            OperationError,
            r"tokenizer\.ggml\.bos_token_id is missing",
        ),
        ({"add_bos_token": "yes"}, OperationError, r"tokenizer\.ggml\.add_bos_token is 'yes'"),
        ({"model": "llama"}, OperationError, r"tokenizer\.ggml\.scores does not hold one score for each"),
        (
            {"model": "llama", "remove_extra_whitespaces": True},
            RequestError,
            r"ggml\.remove_extra_whitespaces",
        ),
    ],
)
def test_refused_tokenizers(changed: dict[str, Any], error: type[GlupruneError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        tokenizer_assets(byte_level_fields(**changed))
    assert type(caught.value) is error


# --------------------------------------------------------------------------------------------- SentencePiece

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and then it jumps over the other dogs.",
    "Pruning the neurons of a gated network makes the network smaller, not always weaker.",
    "She said that the weather there was rather better than the weather here.",
    "def forward(self, x):\n        return self.down(self.gate(x) * self.up(x))",
    "In 1984 and in 2024, there were 366 days; in 1985 there were 365.",
    "An ounce of prevention is worth a pound of cure, said the old man to the other man.",
    "naïve café déjà vu, über größer",
    "    four spaces        eight spaces    and four again",
]


def train(vocab_size: int, byte_fallback: bool) -> sentencepiece.SentencePieceProcessor:
    """A model with the settings of Llama 2's: BPE, no normalisation."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=byte_fallback,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def processor() -> sentencepiece.SentencePieceProcessor:
    return train(vocab_size=480, byte_fallback=True)


def sentencepiece_fields(processor: sentencepiece.SentencePieceProcessor, **changed: Any) -> dict[str, Any]:
    def token_type(i: int) -> int:
        kinds = (
            (processor.is_unknown, TokenType.UNKNOWN),
            (processor.is_control, TokenType.CONTROL),
            (processor.is_byte, TokenType.BYTE),
        )
        return next((int(kind) for test, kind in kinds if test(i)), int(TokenType.NORMAL))

    ids = range(processor.vocab_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [token_type(i) for i in ids],
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
    } | {f"tokenizer.ggml.{key}": value for key, value in changed.items()}


@pytest.fixture(scope="module")
def llama2(processor: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    return fast_tokenizer(sentencepiece_fields(processor))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(text=st.text(st.one_of(st.sampled_from("the other weather .\n\t 123é漢🙂\u2581"), st.characters(codec="utf-8"))))
@example(text="")
@example(text=" ")
@example(text="   leading, trailing   ")
@example(text="a" + " " * 17 + "b")
@example(text="\n\n  def f():\n\treturn 1234567\n")
@example(text="漢字 and 🙂 and ∀x∈A")
@example(text="café and cafe\u0301")
@example(text="The other brothers gather together rather often; the weather there is better.")
def test_sentencepiece_ids(processor: sentencepiece.SentencePieceProcessor, llama2: Tokenizer, text: str) -> None:
    # Control tokens in the text are characters to sentencepiece and tokens to Hugging Face.
    if "\0" in text or any(control in text for control in ("<s>", "</s>", "<unk>")):
        return
    expected = processor.encode(text)
    assert llama2.encode(text, add_special_tokens=False).ids == expected
    assert llama2.decode(expected) == processor.decode(expected)


def test_the_sentencepiece_model_exercises_merges_bytes_and_spaces(
    processor: sentencepiece.SentencePieceProcessor, llama2: Tokenizer
) -> None:
    assert len(pieces(llama2, SENTENCES[0])) < len(SENTENCES[0]) / 2
    assert pieces(llama2, "漢") == ["\u2581", "<0xE6>", "<0xBC>", "<0xA2>"]
    assert any(set(processor.id_to_piece(i)) == {"\u2581"} and len(processor.id_to_piece(i)) > 1 for i in range(480))


def test_sentencepiece_adds_bos_unless_told_otherwise(
    tmp_path: pathlib.Path, processor: sentencepiece.SentencePieceProcessor, llama2: Tokenizer
) -> None:
    text = "the other dogs"
    ids = processor.encode(text)
    assert llama2.encode(text).ids == [processor.bos_id(), *ids]
    assert fast_tokenizer(sentencepiece_fields(processor, add_bos_token=False)).encode(text).ids == ids
    loaded = auto_tokenizer(tmp_path, tokenizer_assets(sentencepiece_fields(processor, add_eos_token=True)))
    assert loaded(text)["input_ids"] == [processor.bos_id(), *ids, processor.eos_id()]
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
    assert loaded.unk_token == "<unk>"


def test_without_byte_fallback_unknown_characters_in_a_row_are_one_token() -> None:
    processor = train(vocab_size=200, byte_fallback=False)
    tokenizer = fast_tokenizer(sentencepiece_fields(processor))
    for text in ("the 漢字 dogs", "🙂🙂", "漢 字the other"):
        ids = processor.encode(text)
        assert processor.unk_id() in ids
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids


def test_only_normal_pieces_are_merged() -> None:
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "a", "b", "c", "\u2581", "ab", "bc"],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
        "tokenizer.ggml.token_type": [int(TokenType.UNKNOWN), *[int(TokenType.NORMAL)] * 6],
    }
    assert pieces(fast_tokenizer(fields), "abc") == ["\u2581", "ab", "c"]
    fields["tokenizer.ggml.token_type"][5] = int(TokenType.UNUSED)
    assert pieces(fast_tokenizer(fields), "abc") == ["\u2581", "a", "bc"]


def test_without_a_space_prefix_the_text_stands_as_it_is(
    processor: sentencepiece.SentencePieceProcessor,
) -> None:
    tokenizer = fast_tokenizer(sentencepiece_fields(processor, add_space_prefix=False))
    ids = tokenizer.encode(" the dog", add_special_tokens=False).ids
    assert ids == processor.encode("the dog")
    assert tokenizer.decode(ids) == " the dog"


# ---------------------------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def smollm(demo: Checkpoint) -> Checkpoint:
    return demo


@pytest.fixture(scope="module")
def smollm_tokenizer(smollm: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return auto_tokenizer(tmp_path_factory.mktemp("smollm"), dict(smollm.assets))


@pytest.mark.real_model
def test_smollm_config(smollm: Checkpoint) -> None:
    assert smollm.config == ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_sizes=(1536,) * 30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    assert {key: smollm.hf_config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


@pytest.mark.real_model
def test_smollm_knows_the_capital_of_france(smollm: Checkpoint, smollm_tokenizer: Any) -> None:
    graphdef, state = nnx.split(smollm.model)

    @jax.jit
    def next_token(state: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        hidden, _ = model(tokens)
        return model.logits(hidden[:, -1]).argmax(-1)

    text = "The capital of Germany is Berlin. The capital of France is"
    tokens = np.array([smollm_tokenizer(text)["input_ids"]], np.int32)
    assert smollm_tokenizer.decode(next_token(state, tokens)) == " Paris"


@pytest.mark.real_model
@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "  two  spaces \n\n\ttab",
        "naïve café 漢字 🙂",
        "def f(x):\n    return x['a']",
        "it's 3.14",
        "",
    ],
)
def test_smollm_round_trip(smollm_tokenizer: Any, text: str) -> None:
    assert smollm_tokenizer.decode(smollm_tokenizer(text)["input_ids"]) == text


@pytest.mark.real_model
def test_smollm_tokens(smollm_tokenizer: Any) -> None:
    # The ids of the tokenizer that HuggingFaceTB publishes begin with the 17 control tokens.
    assert smollm_tokenizer("<|endoftext|><|im_start|><|im_end|>")["input_ids"] == [0, 1, 2]
    assert smollm_tokenizer.tokenize("in 2024") == ["in", "\u0120", "2", "0", "2", "4"]
    messages = [{"role": "user", "content": "Hi"}]
    text = smollm_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert smollm_tokenizer(text)["input_ids"].count(1) == 3
