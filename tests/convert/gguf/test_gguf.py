"""GGUF input: block formats, the permutation of Q and K, RoPE divisors, refusals, damaged files, tokenizers."""

import dataclasses
import io
import json
import math
import os
import pathlib
import tracemalloc
from collections.abc import Callable
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
from gguf import GGUFValueType, TokenType
from gguf.constants import GGML_QUANT_SIZES
from gguf_files import permute, write_gguf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from llama_tensors import model_arrays, tensor_names
from tiny_config import one_rope, tiny_config
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

import convert
from convert.checkpoint import Checkpoint
from convert.gguf import file
from convert.gguf.reader import read_gguf
from convert.gguf.tokenizer import check_tokenizer_keys, tokenizer_assets
from gluprune_jax.errors import GlupruneError, OperationError, RequestError
from gluprune_jax.models.config import LayerAttention, LinearRope, Llama3Rope, ModelConfig, Rope, YarnRope
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.frequencies import rope_frequencies
from gluprune_jax.models.rope import rotate
from gluprune_jax.parallel.mesh import MeshShape, make_mesh, mesh_of, parameter_sharding
from gluprune_jax.prune import main as prune

CONFIG = tiny_config(Rope(500000.0))
ONE_HEAD = {
    "vocab_size": 3,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 8,
    "tie_word_embeddings": True,
}

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
        "llama.rope.freq_base": one_rope(config).theta,
        "llama.vocab_size": config.vocab_size,
    }


def weights(config: ModelConfig) -> dict[str, np.ndarray]:
    """Random float32 tensors by GGUF name, in the row order of the Hugging Face files."""
    rng = np.random.default_rng(0)
    return {name.gguf: rng.standard_normal(name.shape).astype(np.float32) for name in tensor_names(config)}


def permute_all(tensors: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return {
        name: permute(a, heads[kind]) if (kind := name.split(".")[-2]) in heads else a for name, a in tensors.items()
    }


def write_model(path: pathlib.Path, fields: dict[str, Any] | None = None, **tensors: Any) -> pathlib.Path:
    """A GGUF of CONFIG; `fields` are changed (None: left out), as are tensors, with `__` for the dots."""
    changed = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    all_tensors = permute_all(weights(CONFIG), CONFIG) | changed
    kept = {name: tensor for name, tensor in all_tensors.items() if tensor is not None}
    return write_gguf(path / "model.gguf", metadata(CONFIG) | (fields or {}), kept)


def read_arrays(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """By GGUF name, in the shapes of the Hugging Face files."""
    return {name.gguf: np.asarray(array).reshape(name.shape) for name, array in model_arrays(checkpoint.model)}


VALUE_TYPES = {
    int: (GGUFValueType.UINT32,),
    float: (GGUFValueType.FLOAT32,),
    list: (GGUFValueType.ARRAY, GGUFValueType.INT32),
}

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
    config = tiny_config(**ONE_HEAD, hidden_size=512, intermediate_sizes=(5,))
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

    def choose(abstract: Decoder) -> Mesh:
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


def finite_blocks(kind: GGMLType, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """The bytes of random rows `shape` of a type, none of whose values is infinite."""
    block, nbytes = GGML_QUANT_SIZES[kind]
    count = shape[0] * shape[1] // block
    blocks = rng.integers(0, 256, (4 * count, nbytes), np.uint8)
    with np.errstate(all="ignore"):
        blocks = blocks[np.isfinite(gguf.quants.dequantize(blocks, kind)).all(axis=-1)]
    return np.resize(blocks, (count, nbytes)).reshape(shape[0], -1)


def dequantised_types() -> list[GGMLType]:
    def is_dequantised(kind: GGMLType) -> bool:
        try:
            gguf.quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    return [kind for kind in GGML_QUANT_SIZES if is_dequantised(kind)]


def test_every_type_that_the_gguf_package_dequantises_is_read_as_it_does(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "_CHUNK", 1024)  # four rows at a time
    kinds = [kind for kind in dequantised_types() if kind not in (GGMLType.F32, GGMLType.F16, GGMLType.BF16)]
    assert {GGMLType.Q5_0, GGMLType.Q3_K, GGMLType.IQ2_XXS, GGMLType.TQ1_0} < set(kinds)
    config = tiny_config(**ONE_HEAD, hidden_size=256, intermediate_sizes=(18,) * len(kinds))
    rng, tensors, expected = np.random.default_rng(7), dict[str, Any](weights(config)), {}
    for i, kind in enumerate(kinds):
        blocks = finite_blocks(kind, (18, 256), rng)
        tensors[f"blk.{i}.ffn_up.weight"] = (blocks, kind)
        with np.errstate(all="ignore"):
            expected[kind] = gguf.quants.dequantize(blocks, kind)
    checkpoint = read_gguf(write_gguf(tmp_path / "model.gguf", metadata(config), tensors))
    arrays = read_arrays(checkpoint)
    for i, kind in enumerate(kinds):
        got = arrays[f"blk.{i}.ffn_up.weight"]
        assert got.dtype == np.float32
        assert len(np.unique(got)) > 3, kind.name
        np.testing.assert_array_equal(got, expected[kind], err_msg=kind.name)
    assert all(f"1 {kind.name}" in checkpoint.notes[-2] for kind in kinds)


@pytest.mark.parametrize("kind", sorted(set(GGML_QUANT_SIZES) - set(dequantised_types())), ids=lambda kind: kind.name)
def test_a_type_that_the_gguf_package_does_not_dequantise_is_refused_by_name(
    tmp_path: pathlib.Path, kind: GGMLType
) -> None:
    rows = np.zeros((24, GGML_QUANT_SIZES[kind][1]), np.uint8)
    accepted = ", ".join(accepted.name for accepted in dequantised_types())
    with pytest.raises(RequestError, match=rf"blk\.0\.ffn_up\.weight is stored as {kind.name}; accepted: {accepted}$"):
        read_gguf(write_model(tmp_path, blk__0__ffn_up__weight=(rows, kind)))


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
    H, frequencies = CONFIG.head_dim, np.asarray(rope_frequencies(one_rope(CONFIG), CONFIG.head_dim), np.float32)

    def llama_cpp(name: str) -> np.ndarray:
        pairs = (x @ original[name].T).reshape(2, -1, H // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * positions[:, None, None] * frequencies)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(2, -1, H)

    def ours(projection: jax.Array) -> np.ndarray:
        heads = np.einsum("td,nhd->tnh", x, projection)
        return np.asarray(rotate(*map(jnp.asarray, (heads[None], positions[None])), one_rope(CONFIG))[0])

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


def test_a_long_list_of_tensor_problems_is_a_count(tmp_path: pathlib.Path) -> None:
    extra = {f"blk__{i}__some_tensor_that_no_llama_has__weight": np.zeros(4, np.float32) for i in range(50)}
    wrong = {f"blk__{i}__{n}__weight": np.zeros((5, 7), np.float32) for i in range(2) for n in ("ffn_up", "ffn_down")}
    path = write_model(tmp_path, **extra, **wrong, output_norm__weight=None)
    with pytest.raises(OperationError) as caught:
        read_gguf(path)
    message = str(caught.value).removeprefix(f"{path}: ")
    assert len(message) < 430
    assert "and 48 more; of a wrong shape: blk.0.ffn_up.weight (5, 7) instead of (24, 16)" in message
    assert message.endswith(" and 2 more")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: pathlib.Path, bad: float) -> None:
    norm = np.ones(16, np.float32)
    norm[3] = bad
    with pytest.raises(OperationError, match=r"blk\.1\.ffn_norm\.weight holds values that are not finite"):
        read_gguf(write_model(tmp_path, blk__1__ffn_norm__weight=norm))


def test_an_infinite_block_scale_is_refused(tmp_path: pathlib.Path) -> None:
    config = tiny_config(**ONE_HEAD, hidden_size=32, intermediate_sizes=(5,))
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
    config = tiny_config(
        vocab_size=5,
        intermediate_sizes=(24, 24),
        num_key_value_heads=4,
        head_dim=4,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
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
        ({"llama.attention.sliding_window": "x"}, OperationError, r"sliding_window is 'x'; it must be .* from 0 to"),
        (
            {"llama.rope.scaling.type": "longrope"},
            RequestError,
            r"llama\.rope\.scaling\.type is 'longrope'; accepted: 'n",
        ),
        ({"llama.rope.scaling.type": 3}, RequestError, r"llama\.rope\.scaling\.type is 3; accepted: 'none', 'linear'"),
        (
            {"llama.rope.scaling.factor": -4.0},
            OperationError,
            r"llama\.rope\.scaling\.factor is -4\.0; it must be a pos",
        ),
        ({"llama.rope.scaling.factor": 4}, OperationError, r"llama\.rope\.scaling\.factor is 4; it must be a positive"),
        (
            {"llama.rope.scaling.attn_factor": 1.5},
            RequestError,
            r"llama\.rope\.scaling\.attn_factor is 1\.5; acc.* 1\.0",
        ),
        ({"llama.rope.scaling.yarn_ext_factor": 0.5}, RequestError, r"yarn_ext_factor is 0\.5; accepted: 1\.0"),
        ({"llama.attention.sliding_window_pattern": 2}, RequestError, r"window_pattern is 2, and this key is not sup"),
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
        ({"split.count": 3}, RequestError, r"split\.count is 3, and the file is not called NAME-00001-of-00003"),
        ({"split.count": 100_000}, RequestError, r"split\.count is 100000; accepted: a model in one file, or"),
        ({"llama.attention.head_count_kv": 3}, RequestError, r"num_key_value_heads = 3"),
        ({"llama.block_count": None}, OperationError, r"llama\.block_count is missing"),
        ({"llama.block_count": 4_000_000_000}, OperationError, r"llama\.block_count is 4000000000"),
        ({"llama.context_length": "long"}, OperationError, r"llama\.context_length is 'long'"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, OperationError, r"rms_epsilon is missing"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, OperationError, r"rms_epsilon is nan"),
        ({"llama.rope.freq_base": 0.0}, OperationError, r"llama\.rope\.freq_base is 0\.0"),
        ({"llama.feed_forward_length": [24, 20, 8]}, OperationError, r"feed_forward_length is \[24, 20, 8\]"),
        ({"llama.feed_forward_length": None}, OperationError, r"llama\.feed_forward_length is missing"),
        ({"llama.feed_forward_length": list(range(1, 999))}, OperationError, r"is \[1, 2, .*\.\.\..* for 2 layers"),
        ({"llama.feed_forward_length": [24, -20]}, OperationError, r"llama\.feed_forward_length is -20"),
        ({"llama.attention.head_count": [4]}, OperationError, r"attention\.head_count is \[4\]; expected .* 2 layers"),
        ({"llama.attention.head_count": 0}, OperationError, r"llama\.attention\.head_count is 0"),
        ({"llama.block_count": True}, OperationError, r"llama\.block_count is True; it must be a whole number"),
        ({"llama.context_length": [64, 64]}, OperationError, r"llama\.context_length is \[64, 64\]"),
        ({"llama.rope.freq_base": "big" * 500}, OperationError, r"llama\.rope\.freq_base is 'big.*\.\.\..*'; it must"),
        ({"split.count": "x" * 600}, RequestError, r"split\.count is 'xxx.*\.\.\..*'; accepted: a model in one file"),
        ({"general.quantization_version": 1}, RequestError, r"general\.quantization_version is 1; accepted: 2"),
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


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("tokenizer.ggml.eos_token_ie", None),
        ("tokenizer.ggml.add_bos", None),
        ("tokenizer.chat_tmplate", None),
        ("llama.rope.freq_bace", None),
        ("lama.rope.freq_base", "llama.rope.freq_base"),
        ("mistral.rope.freq_base", "llama.rope.freq_base"),
        ("llama-rope.freq_base", "llama.rope.freq_base"),
        ("tokeniser.ggml.add_bos_token", "tokenizer.ggml.add_bos_token"),
        ("general.alignmnet", "general.alignment"),
        ("split.cuont", "split.count"),
        ("llama." + "x" * 900, None),
        ("tokenizer." + "x" * 900, None),
    ],
)
def test_a_misspelt_key_is_refused_by_name(tmp_path: pathlib.Path, key: str, meant: str | None) -> None:
    """A default would stand in for it without a word."""
    with pytest.raises(RequestError, match=r"this key is not supported|is not known") as caught:
        read_gguf(write_model(tmp_path, {key: 7}))
    assert f"looks like a misspelt {meant}" in str(caught.value) or meant is None
    assert key in str(caught.value) or len(key) > 64
    assert len(str(caught.value)) < 300


def test_keys_that_other_tools_add_are_left_out_with_a_note(tmp_path: pathlib.Path) -> None:
    fields = {
        "quantize.imatrix.file": "imatrix.dat",
        "quantize.imatrix.chunks_count": 128,
        "mradermacher.quantized_by": "someone",
        "split.no": 0,
        "split.count": 1,
        "split.tensors.count": 0,
        "my.own.key": [1, 2],
        "general.base_model.0.name": "other",
        "general.sampling.top_k": 40,
        "general.remark": "a key that nobody has defined",
        "tokenizer.ggml.fim_pre_token_id": 3,
    }
    checkpoint = read_gguf(write_model(tmp_path, fields))
    assert checkpoint.config == CONFIG
    assert (
        "metadata without effect was left out: quantize.imatrix.file, quantize.imatrix.chunks_count, "
        "mradermacher.quantized_by, split.no and 2 more"
    ) in checkpoint.notes
    np.testing.assert_array_equal(read_arrays(checkpoint)["output.weight"], weights(CONFIG)["output.weight"])


def test_a_model_without_a_tokenizer_is_pruned_with_a_note(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_model(tmp_path)
    assert prune(["--model", str(path), "--width", "12", "--output", str(tmp_path / "out")]) == 0
    assert "the file holds no tokenizer" in "".join(capsys.readouterr())
    assert convert.load(tmp_path / "out").config.intermediate_sizes == (12, 12)
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_another_architecture_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", metadata(CONFIG), weights(CONFIG), architecture="qwen2moe")
    with pytest.raises(
        RequestError, match=r"general\.architecture is 'qwen2moe'; accepted: 'llama', 'deci', 'qwen2', 'qwen3'"
    ):
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
    config = tiny_config(
        vocab_size=3,
        intermediate_sizes=(8,),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope=Rope(500000.0),
        tie_word_embeddings=True,
    )
    tensors = weights(config) | {"rope_freqs.weight": divisors}
    return write_gguf(path / "model.gguf", metadata(config), tensors)


@pytest.mark.parametrize(("head_dim", "factor"), [(64, 32.0), (128, 32.0), (128, 8.0)])
def test_rope_divisors_become_the_scaling_of_llama_3(tmp_path: pathlib.Path, head_dim: int, factor: float) -> None:
    divisors = llama3_divisors(head_dim, factor)
    assert len(np.unique(divisors)) > 3  # plain, scaled and some between
    checkpoint = read_gguf(write_with_divisors(tmp_path, head_dim, divisors))
    assert one_rope(checkpoint.config).scaling == Llama3Rope(factor, 1.0, 4.0, 8192)
    plain = 500000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    np.testing.assert_allclose(rope_frequencies(one_rope(checkpoint.config), head_dim), plain / divisors, rtol=1e-5)


def test_rope_divisors_of_one_mean_no_scaling(tmp_path: pathlib.Path) -> None:
    path = write_with_divisors(tmp_path, 64, np.ones(32, np.float32))
    assert one_rope(read_gguf(path).config).scaling is None


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


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, LinearRope(4.0)),
        ({"rope.scaling.type": "linear"}, None),
        # Without a type, llama.cpp takes a factor as linear; before, the key had another name.
        ({"rope.scaling.factor": 4.0}, LinearRope(4.0)),
        ({"rope.scale_linear": 2.0}, LinearRope(2.0)),
        ({"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0}, LinearRope(4.0)),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, YarnRope(4.0, 64, 0.1 * math.log(4) + 1)),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.yarn_attn_factor": 1.25,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
            },
            YarnRope(8.0, 32, 1.25, 16.0, 2.0),
        ),
        # The float32 of what transformers computes is what it computes.
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.yarn_attn_factor": 1.2079441541679836,
            },
            YarnRope(8.0, 64, 1.2079441541679836),
        ),
    ],
)
def test_scalings_of_rope(tmp_path: pathlib.Path, fields: dict[str, Any], scaling: Any) -> None:
    path = write_model(tmp_path, {f"llama.{key}": value for key, value in fields.items()})
    assert one_rope(read_gguf(path).config) == Rope(500000.0, scaling)


def test_rope_divisors_and_a_factor_are_refused(tmp_path: pathlib.Path) -> None:
    path = write_model(
        tmp_path, {"llama.rope.scaling.factor": 2.0}, rope_freqs__weight=np.arange(1, 5, dtype=np.float32)
    )
    with pytest.raises(
        RequestError, match=r"rope_freqs\.weight scales the RoPE, and llama\.rope\.scaling\.factor does"
    ):
        read_gguf(path)


def test_a_llama_with_a_window_is_a_mistral(tmp_path: pathlib.Path) -> None:
    checkpoint = read_gguf(write_model(tmp_path, {"llama.attention.sliding_window": 4096}))
    assert {layer.window for layer in checkpoint.config.attention} == {4096}
    assert checkpoint.hf_config["model_type"] == "mistral"
    assert read_gguf(write_model(tmp_path, {"llama.attention.sliding_window": 0})).config == CONFIG


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


def number(value: int, nbytes: int = 8) -> bytes:
    return value.to_bytes(nbytes, "little")


def tensor_info(content: bytes, name: str) -> int:
    """Where the header says of tensor `name`, of two axes: axes (4 bytes), sizes (2 x 8), type (4), offset (8)."""
    begin = content.index(number(len(name)) + name.encode()) + 8 + len(name)
    assert content[begin : begin + 4] == number(2, 4)
    return begin


def overwritten(content: bytes, at: int, part: bytes) -> bytes:
    return content[:at] + part + content[at + len(part) :]


def with_offset_of(content: bytes, name: str, other: str) -> bytes:
    """The file with tensor `name` at the place of `other`."""
    source = tensor_info(content, other) + 24
    return overwritten(content, tensor_info(content, name) + 24, content[source : source + 8])


def swapped(content: bytes, name: str, other: str) -> bytes:
    """The file with two tensors at each other's place."""
    a, b = tensor_info(content, name) + 24, tensor_info(content, other) + 24
    return overwritten(overwritten(content, a, content[b : b + 8]), b, content[a : a + 8])


def with_size(content: bytes, name: str, inner: int, outer: int) -> bytes:
    return overwritten(content, tensor_info(content, name) + 4, number(inner) + number(outer))


def with_value(content: bytes, key: str, data: bytes) -> bytes:
    """The file with other bytes where the type of a metadata value stands, and after it."""
    return overwritten(content, content.index(key.encode()) + len(key), data)


GATE, UP, DOWN = (f"blk.0.ffn_{name}.weight" for name in ("gate", "up", "down"))
KEY = "llama.feed_forward_length"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: with_offset_of(c, UP, GATE), r"blk\.0\.ffn_up\.weight lies at \d+ of the data, expected \d+"),
        (lambda c: swapped(c, UP, GATE), r"blk\.0\.ffn_gate\.weight lies at \d+ of the data, expected \d+"),
        (lambda c: overwritten(c, tensor_info(c, UP) + 24, number(7)), r"ffn_up\.weight lies at 7 of the data"),
        (lambda c: overwritten(c, tensor_info(c, UP) + 24, number(2**64 - 32)), r"lies at 18446744073709551584"),
        (lambda c: with_size(c, UP, 16, 12), r"blk\.0\.ffn_down\.weight lies at \d+ of the data, expected \d+"),
        (lambda c: with_size(c, UP, 2**63, 2), r"and its own header asks for \d+, with blk\.0\.ffn_up\.weight"),
        (lambda c: with_size(c, UP, 2**32, 2**32), r"and its own header asks for \d+, with blk\.0\.ffn_up\.weight"),
        (lambda c: with_size(c, UP, 0, 24), r"blk\.0\.ffn_up\.weight has shape \(24, 0\)"),
        (lambda c: overwritten(c, tensor_info(c, UP), number(2**31, 4)), r"has 2147483648 axes; accepted: 1 to 4"),
        (lambda c: overwritten(c, tensor_info(c, UP) + 20, number(6, 4)), r"rows of Q5_0 are blocks of 32"),
        (lambda c: c.replace(UP.encode(), DOWN.replace("down", "xx").encode()), r"unexpected: blk\.0\.ffn_xx"),
        (lambda c: c.replace(b"blk.0.attn_q", b"blk.0.attn_k"), r"the tensor blk\.0\.attn_k\.weight is there twice"),
        (lambda c: c.replace(b"llama.vocab_size", b"llama.block_coun"), r"llama\.block_coun is 11, and this key"),
        (lambda c: c + bytes(32), r"it has \d+ bytes, and its own header describes \d+"),
        (lambda c: overwritten(c, 8, number(2**63)), r"asks for \d+, with 9223372036854775808 tensors"),
        (lambda c: overwritten(c, 8, number(20)), r"it has \d+ bytes, and its own header describes"),
        (lambda c: overwritten(c, 16, number(2**40)), r"with 1099511627776 metadata keys"),
        (lambda c: overwritten(c, 24, number(2**62)), r"and its own header asks for \d+, with a metadata key"),
        (lambda c: overwritten(c, 4, number(1, 4)), r"its version is 1; accepted: 2 and 3"),
        (lambda c: overwritten(c, 4, number(9, 4)), r"its version is 9; accepted: 2 and 3"),
        (lambda c: with_value(c, KEY, number(9, 4) + number(5, 4) + number(2**62)), r"array of 4611686018427387904"),
        (lambda c: with_value(c, KEY, number(9, 4) + number(5, 4) + number(20_000)), r"20000 items of llama\.feed"),
        (lambda c: with_value(c, KEY, number(9, 4) + number(8, 4) + number(20_000)), r"20000 items of llama\.feed"),
        (lambda c: with_value(c, KEY, number(9, 4) + number(9, 4)), r"holds values of type 9, which is none"),
        (lambda c: with_value(c, KEY, number(77, 4)), r"llama\.feed_forward_length holds values of type 77"),
        (lambda c: with_value(c, "llama.block_count", number(7, 4) + b"\2"), r"block_count holds 2; a bool is 0 or 1"),
        (lambda c: c.replace(b"general.arch", b"general\n\n\n\n\n"), r"key is 'general\\n.*'; it must be printable"),
        (lambda c: c.replace(b"general.arch", b"general\xff\xff\xff\xff\xff"), r"a metadata key is not UTF-8: b'gen"),
    ],
)
def test_a_header_that_contradicts_itself_or_the_file_is_refused(
    tmp_path: pathlib.Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = write_model(tmp_path)
    content = path.read_bytes()
    changed = damage(content)
    assert changed != content
    path.write_bytes(changed)
    tracemalloc.start()
    try:
        with pytest.raises(GlupruneError, match=message) as caught:
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22  # bytes at most, whatever a count says
    finally:
        tracemalloc.stop()
    text = str(caught.value).removeprefix(str(path))
    assert text.isprintable()
    assert len(text) < 400


@pytest.mark.parametrize("number_of_type", [5, 31, 99, 2**32 - 1])
def test_a_type_that_the_gguf_package_does_not_know_is_refused(tmp_path: pathlib.Path, number_of_type: int) -> None:
    path = write_model(tmp_path)
    content = path.read_bytes()
    path.write_bytes(overwritten(content, tensor_info(content, UP) + 20, number(number_of_type, 4)))
    with pytest.raises(RequestError, match=rf"ffn_up\.weight is stored as type {number_of_type}; accepted: F32, F16"):
        read_gguf(path)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_another_alignment_is_read(tmp_path: pathlib.Path, alignment: int) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_custom_alignment(alignment)
    for key, value in metadata(CONFIG).items():
        writer.add_key_value(key, value, *VALUE_TYPES[type(value)])
    for name, tensor in permute_all(weights(CONFIG), CONFIG).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    arrays = read_arrays(read_gguf(tmp_path / "model.gguf"))
    for name, tensor in weights(CONFIG).items():
        np.testing.assert_array_equal(arrays[name], tensor, err_msg=name)


@pytest.mark.parametrize("alignment", [0, 3, 2**31, 2**32 - 32, "32", 32.0, [32], True])
def test_an_alignment_that_is_none_is_refused(tmp_path: pathlib.Path, alignment: Any) -> None:
    path = write_model(tmp_path, {"general.alignment": alignment})
    with pytest.raises(OperationError, match=r"general\.alignment is .*; it must be a power of two|header asks for"):
        read_gguf(path)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: pathlib.Path) -> None:
    path = write_model(tmp_path)

    def touch(what: str, done: int, total: int) -> None:
        os.utime(path, ns=(1, 1))

    with pytest.raises(OperationError, match=r"the file has changed since it was opened; run again"):
        read_gguf(path, progress=touch)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RequestError, match=r"nothing\.gguf: there is no such file"):
        read_gguf(tmp_path / "nothing.gguf")
    with pytest.raises(OperationError, match="not a readable GGUF file"):
        read_gguf(tmp_path)


def test_a_flipped_byte_of_the_header_gives_the_same_weights_or_one_of_our_errors(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=len(byte_level_fields()["tokenizer.ggml.tokens"]))
    path = tmp_path / "model.gguf"
    whole = write_gguf(path, metadata(config) | byte_level_fields(), weights(config)).read_bytes()
    expected = {name: array.tobytes() for name, array in read_arrays(read_gguf(path)).items()}
    header = whole.index(b"output.weight") + 32
    infos = whole.index(b"token_embd.weight")
    outcomes: set[type] = set()
    messages: list[str] = []
    rng = np.random.default_rng(6)
    for i in range(300):
        content = bytearray(whole)
        # As many in what is said of the tensors as in the metadata, which is mostly vocabulary.
        content[int(rng.integers(infos * (i % 2), header))] ^= int(rng.integers(1, 256))
        path.write_bytes(content)
        try:
            arrays = read_arrays(read_gguf(path))
        except GlupruneError as error:
            outcomes.add(type(error))
            messages.append(str(error))
        else:
            outcomes.add(Checkpoint)
            assert {name: array.tobytes() for name, array in arrays.items()} == expected
    assert outcomes == {Checkpoint, RequestError, OperationError}
    assert all(message.isprintable() and len(message) <= 500 for message in messages)


# ---------------------------------------------------------------------------------------------- split files


@pytest.fixture
def split(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    """A GGUF of CONFIG in files of five tensors."""
    write_gguf(tmp_path / "model.gguf", metadata(CONFIG), permute_all(weights(CONFIG), CONFIG), split_after=5)
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == [f"model-{i:05}-of-00005.gguf" for i in range(1, 6)]
    return paths


def test_a_split_model_is_read_from_its_first_file(split: list[pathlib.Path], tmp_path: pathlib.Path) -> None:
    calls: list[tuple[str, int, int]] = []
    checkpoint = read_gguf(split[0], progress=lambda *call: calls.append(call))
    assert checkpoint.config == CONFIG
    for name, array in read_arrays(checkpoint).items():
        np.testing.assert_array_equal(array, weights(CONFIG)[name], err_msg=name)
    assert calls[-1][1] == calls[-1][2] == sum(array.nbytes for array in weights(CONFIG).values())
    identity = convert.gguf.reader.open_gguf(split[0]).identity
    assert identity == f"{sum(path.stat().st_size for path in split)} bytes"


def test_another_file_of_a_split_model_is_refused_with_the_name_of_the_first(split: list[pathlib.Path]) -> None:
    # Its header has no metadata but of the splitting.
    with pytest.raises(RequestError, match=r"this is not the first of 5 files; give model-00001-of-00005\.gguf"):
        read_gguf(split[2])


def test_a_missing_file_of_a_split_model_is_named(split: list[pathlib.Path]) -> None:
    split[3].unlink()
    with pytest.raises(RequestError, match=r"file 4 of 5, model-00004-of-00005\.gguf: there is no such file") as caught:
        read_gguf(split[0])
    assert str(caught.value).startswith(str(split[0]))


def test_a_split_model_under_another_name_is_refused(split: list[pathlib.Path], tmp_path: pathlib.Path) -> None:
    path = split[0].rename(tmp_path / "mine.gguf")
    with pytest.raises(RequestError, match=r"split\.count is 5, and the file is not called NAME-00001-of-00005\.gguf"):
        read_gguf(path)


def test_a_file_of_another_split_model_is_refused(split: list[pathlib.Path]) -> None:
    split[1].write_bytes(split[2].read_bytes())
    with pytest.raises(OperationError, match=r"file 2 of 5, model-00002-of-00005\.gguf: .*split\.no is 2, expected 1"):
        read_gguf(split[0])


def test_a_tensor_that_two_files_have_is_refused(split: list[pathlib.Path]) -> None:
    name = b"blk.0.attn_q.weight"
    (at,) = [path for path in split if name in path.read_bytes()]
    other = next(path for path in split[1:] if path != at and b"blk.1.attn_q.weight" in path.read_bytes())
    other.write_bytes(other.read_bytes().replace(b"blk.1.attn_q.weight", name))
    with pytest.raises(OperationError, match=r"the tensor blk\.0\.attn_q\.weight is in an earlier file too"):
        read_gguf(split[0])


def test_a_number_of_tensors_that_is_wrong_is_refused(split: list[pathlib.Path]) -> None:
    content = split[0].read_bytes()
    at = content.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    split[0].write_bytes(overwritten(content, at, number(22, 4)))
    with pytest.raises(OperationError, match=r"split\.tensors\.count is 22, and its 5 files hold 21"):
        read_gguf(split[0])


def test_errors_in_another_file_name_it(split: list[pathlib.Path]) -> None:
    def touch(what: str, done: int, total: int) -> None:
        os.utime(split[4], ns=(1, 1))

    with pytest.raises(OperationError, match=r"model-00005-of-00005\.gguf: the file has changed") as caught:
        read_gguf(split[0], progress=touch)
    assert str(caught.value).startswith(str(split[0]))


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


SPLITS = {
    "refact": [
        "don",
        "'t",
        "\u0120DON",
        "'",
        "T",
        "\u0120",
        "1",
        "2",
        "3",
        "4",
        "\u0120a",
        "/",
        "b",
        "\u010a",
        "\u010a",
        "x",
    ],
    "dbrx": ["don", "'t", "\u0120DON", "'T", "\u0120", "123", "4", "\u0120a", "/b", "\u010a\u010a", "x"],
    "qwen2": ["don", "'t", "\u0120DON", "'T", "\u0120", "1", "2", "3", "4", "\u0120a", "/b", "\u010a\u010a", "x"],
    "tekken": ["don", "'t", "\u0120DON", "'T", "\u0120", "1", "2", "3", "4", "\u0120a", "/b", "\u010a\u010a", "x"],
    "gpt-4o": ["don't", "\u0120DON'T", "\u0120", "123", "4", "\u0120a", "/b", "\u010a\u010a", "x"],
}
SPLITS |= {"smollm": SPLITS["refact"], "deepseek-r1-qwen": SPLITS["qwen2"], "llama-bpe": SPLITS["dbrx"]}


@pytest.mark.parametrize("pre", SPLITS)
def test_how_text_is_split(pre: str) -> None:
    tokenizer = fast_tokenizer(byte_level_fields(pre=pre))
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("don't DON'T 1234 a/b\n\nx")]
    assert words == SPLITS[pre]


@pytest.mark.parametrize("pre", ["tekken", "gpt-4o"])
def test_words_end_where_large_letters_follow_small_ones(pre: str) -> None:
    tokenizer = fast_tokenizer(byte_level_fields(pre=pre))
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("getHTTPResponse Code//\n")]
    assert words == ["get", "HTTPResponse", "\u0120Code", "//\u010a"]


def test_qwen_2_composes_characters() -> None:
    for pre, same in (("qwen2", True), ("dbrx", False)):
        tokenizer = fast_tokenizer(byte_level_fields(pre=pre))
        assert (pieces(tokenizer, "cafe\u0301") == pieces(tokenizer, "caf\u00e9")) == same


@pytest.mark.parametrize("pre", ["qwen2"])
def test_the_splitting_is_that_of_transformers(pre: str) -> None:
    """Of the only family of these whose tokenizer transformers can make of a vocabulary."""
    from transformers import Qwen2TokenizerFast

    fields = byte_level_fields(pre=pre)
    vocab = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    theirs = Qwen2TokenizerFast(vocab=vocab, merges=merges).backend_tokenizer
    ours = fast_tokenizer(fields)
    for text in (
        "don't DON'T 1234 a/b\n\n  x",
        "cafe\u0301 \u00e9 hello hello't",
        " \t\r\n 12 345\u00a0x\u2003\u2028y",
        *SENTENCES,
    ):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids


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
        ({"pre": "tekken"}, True, False),
        ({"pre": "qwen2"}, False, False),
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
    config = tiny_config(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=8,
        intermediate_sizes=(8,),
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
    )
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
            {"pre": "qwen35"},
            RequestError,
            r"tokenizer\.ggml\.pre is 'qwen35'; accepted: 'smollm', 'refact', 'llama-bpe', 'dbrx', 'qwen2', ",
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
        (
            {"tokens": ["a", "b" * 900, "b" * 900], "token_type": [1] * 3, "bos_token_id": None, "eos_token_id": None},
            OperationError,
            r"tokens holds 'bbb.*\.\.\..*' more than once",
        ),
        ({"merges": ["h e", "x" * 900]}, OperationError, r"tokenizer\.ggml\.merges holds 'xxx.*\.\.\..*', whose"),
        ({"merges": [1, 2]}, OperationError, r"tokenizer\.ggml\.merges is not a list of strings"),
        ({"token_type": [1]}, OperationError, r"tokenizer\.ggml\.token_type does not hold one type for each"),
        ({"token_type": None}, OperationError, r"tokenizer\.ggml\.token_type does not hold one type for each"),
        ({"token_type": [1.0] * 271}, OperationError, r"of 271 tokens is none of the format's: of token 0 it is 1\.0"),
        ({"token_type": [1] * 270 + [9]}, OperationError, r"of 1 tokens .* of token 270 it is 9; accepted: 1 to 6"),
        ({"model": None}, OperationError, r"tokenizer\.ggml\.model is missing, but there are tokenizer\.ggml\.tokens"),
        ({"model": ["gpt2"] * 99}, RequestError, r"tokenizer\.ggml\.model is \['gpt2'.*\.\.\..*; accepted: 'gpt2'"),
        ({"pre": "x" * 900}, RequestError, r"tokenizer\.ggml\.pre is 'xxx.*\.\.\..*'; accepted: 'smollm'"),
        ({"add_sep_token": True}, RequestError, r"tokenizer\.ggml\.add_sep_token is true; accepted: false"),
        ({"bos_token_id": -1}, OperationError, r"tokenizer\.ggml\.bos_token_id is -1; it must be an id below 271"),
        ({"bos_token_id": True}, OperationError, r"tokenizer\.ggml\.bos_token_id is True; it must be an id below"),
        ({"padding_token_id": 2**32 - 1}, OperationError, r"tokenizer\.ggml\.padding_token_id is 4294967295"),
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


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({"chat_template": 5}, r"the chat template 'default' is 5; it must be text"),
        ({"chat_template.tool_use": [1]}, r"the chat template 'tool_use' is \[1\]; it must be text"),
        ({"chat_template.": "x"}, r"the chat template '' is 'x'"),
        ({"chat_templates": ["rag"]}, r"chat_templates names 'rag', and there is no such template among the 0"),
        ({"chat_templates": "rag"}, r"tokenizer\.chat_templates is not a list of strings"),
    ],
)
def test_refused_chat_templates(templates: dict[str, Any], message: str) -> None:
    fields = byte_level_fields() | {f"tokenizer.{key}": value for key, value in templates.items()}
    with pytest.raises(OperationError, match=message):
        tokenizer_assets(fields)


@pytest.mark.parametrize("default", [True, False])
def test_chat_templates_keep_their_names(tmp_path: pathlib.Path, default: bool) -> None:
    fields = byte_level_fields() | {
        "tokenizer.chat_template.tool_use": "T{{ messages[0]['content'] }}",
        "tokenizer.chat_template.rag": "R",
        "tokenizer.chat_templates": ["rag", "tool_use"],
    }
    if not default:
        del fields["tokenizer.chat_template"]
    check_tokenizer_keys(fields)
    loaded = auto_tokenizer(tmp_path, tokenizer_assets(fields))
    assert loaded.chat_template.keys() == {"tool_use", "rag"} | ({"default"} if default else set())
    messages = [{"role": "user", "content": "x"}]
    assert loaded.apply_chat_template(messages, tokenize=False, chat_template="tool_use") == "Tx"
    if default:
        assert loaded.apply_chat_template(messages, tokenize=False) == "<bos>x<eos>"


def test_every_tokenizer_key_of_the_gguf_package_is_read_or_known_to_be_inert() -> None:
    keys = [value for name, value in vars(gguf.Keys.Tokenizer).items() if name.isupper()]
    assert len(keys) > 30
    check_tokenizer_keys(dict.fromkeys(keys))


def test_of_a_merge_that_is_there_twice_the_first_counts() -> None:
    """As in llama.cpp."""
    merges = byte_level_fields()["tokenizer.ggml.merges"]
    fields = byte_level_fields(pre="smollm", merges=[*merges, "h e"])
    assert pieces(fast_tokenizer(fields), "hello") == pieces(fast_tokenizer(byte_level_fields(pre="smollm")), "hello")
    model = json.loads(tokenizer_assets(fields)["tokenizer.json"])["model"]
    assert [" ".join(merge) for merge in model["merges"]] == merges


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


def train(vocab_size: int, byte_fallback: bool, **further: Any) -> sentencepiece.SentencePieceProcessor:
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
        **further,
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


PLACEHOLDERS: dict[str, Callable[[list[float]], list[float]]] = {
    "all zero": lambda scores: [0.0] * len(scores),
    "all -1000": lambda scores: [-1000.0] * len(scores),
    "the second half": lambda scores: scores[:350] + [-1000.0] * (len(scores) - 350),
    "two of them": lambda scores: [*scores[:300], scores[301], *scores[301:]],
}


@pytest.mark.parametrize("scores", PLACEHOLDERS.values(), ids=PLACEHOLDERS.keys())
def test_placeholder_scores_are_refused_as_they_do_not_say_which_merge_comes_first(
    processor: sentencepiece.SentencePieceProcessor, scores: Callable[[list[float]], list[float]]
) -> None:
    fields = sentencepiece_fields(processor)
    changed = scores(fields["tokenizer.ggml.scores"])
    with pytest.raises(RequestError, match=r"gives \d+ of the \d+ pieces that merges make a score that an.* is lost"):
        tokenizer_assets(fields | {"tokenizer.ggml.scores": changed})


def test_scores_of_pieces_that_no_merge_makes_may_be_placeholders(
    processor: sentencepiece.SentencePieceProcessor, llama2: Tokenizer
) -> None:
    """llama.cpp's converter writes some for control, byte and added tokens; characters are never merged."""
    fields = sentencepiece_fields(processor)
    merged = [t == TokenType.NORMAL and len(p) > 1 for p, t in zip(*token_fields(fields), strict=True)]
    scores = [s if m else -1000.0 for s, m in zip(fields["tokenizer.ggml.scores"], merged, strict=True)]
    assert scores.count(-1000.0) > 259
    tokenizer = fast_tokenizer(fields | {"tokenizer.ggml.scores": scores})
    assert tokenizer.to_str() == llama2.to_str()


def token_fields(fields: dict[str, Any]) -> tuple[list[str], list[int]]:
    return fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(processor: sentencepiece.SentencePieceProcessor, bad: float) -> None:
    fields = sentencepiece_fields(processor)
    fields["tokenizer.ggml.scores"][300:302] = [bad, bad]
    with pytest.raises(OperationError, match=rf"scores holds {bad} for '.*', and values that are not finite for 2 tok"):
        tokenizer_assets(fields)


def test_a_sentencepiece_file_that_names_no_ids_has_those_of_llama_cpp(
    tmp_path: pathlib.Path, processor: sentencepiece.SentencePieceProcessor
) -> None:
    fields = sentencepiece_fields(processor)
    for name in ("bos", "eos", "unknown"):
        del fields[f"tokenizer.ggml.{name}_token_id"]
    loaded = auto_tokenizer(tmp_path, tokenizer_assets(fields))
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (1, 2, 0)
    assert loaded("the other")["input_ids"] == [1, *processor.encode("the other")]
    # Where these are no control tokens, there is none.
    fields["tokenizer.ggml.token_type"][1:3] = [int(TokenType.NORMAL)] * 2
    assert "bos_token" not in json.loads(tokenizer_assets(fields)["tokenizer_config.json"])


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


def test_special_tokens_of_phi_3_swallow_the_spaces_behind_them(
    processor: sentencepiece.SentencePieceProcessor,
) -> None:
    fields = sentencepiece_fields(processor)
    text = "</s>  the<s>  the"
    plain = fast_tokenizer(fields)
    swallowing = Tokenizer.from_str(tokenizer_assets(fields, frozenset({"<s>"}))["tokenizer.json"].decode())
    ids = swallowing.encode(text, add_special_tokens=False).ids
    assert ids == plain.encode("</s>the<s>  the", add_special_tokens=False).ids
    assert ids != plain.encode(text, add_special_tokens=False).ids


def test_user_defined_pieces_are_found_first_the_longest_of_them(tmp_path: pathlib.Path) -> None:
    """Gemma's runs of spaces and line ends, which the converter writes with spaces: as sentencepiece takes them."""
    runs = ["\u2581" * 2, "\u2581" * 3, "\u2581" * 4, "\n", "\n\n", "<a>"]
    processor = train(vocab_size=480, byte_fallback=True, add_dummy_prefix=False, user_defined_symbols=runs)
    fields = sentencepiece_fields(processor, add_space_prefix=False)
    for i in range(3, 9):
        assert processor.id_to_piece(i) == runs[i - 3]
        fields["tokenizer.ggml.token_type"][i] = int(TokenType.USER_DEFINED)
        fields["tokenizer.ggml.tokens"][i] = runs[i - 3].replace("\u2581", " ")
    tokenizer = fast_tokenizer(fields)
    loaded = auto_tokenizer(tmp_path, tokenizer_assets(fields))
    rng = np.random.default_rng(8)
    parts = [
        " ",
        "  ",
        "   ",
        "    ",
        " " * 9,
        "\n",
        "\n\n\n",
        "<a>",
        "\u2581",
        "\u2581\u2581",
        "the",
        "other dogs",
        "x",
    ]
    for _ in range(200):
        text = "".join(rng.choice(parts, 6))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == processor.encode(text), text
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids) == text.replace("\u2581", " ")


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
        attention=(LayerAttention(Rope(100000.0)),) * 30,
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
