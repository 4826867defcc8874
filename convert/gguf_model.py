"""Reads a Llama model from a GGUF file: config, weights (dequantised) and tokenizer.

GGUF files are written by llama.cpp's converter. Three of its habits matter here: Q and K rows are permuted for
a RoPE that pairs neighbouring dimensions, Llama 3's RoPE scaling is a tensor of divisors (`rope_freqs.weight`)
and not a config key, and shapes are stored innermost axis first.
"""

import dataclasses
import json
import math
import pathlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from jax import Array

from convert import shards
from convert.checkpoint import (
    Checkpoint,
    MeshChoice,
    abstract_weights,
    build_model,
    cast,
    choose_mesh,
    parameter_shapes,
)
from convert.gguf_tokenizer import special_token_ids, token_id, tokenizer_assets
from convert.names import tensor_names
from gluprune_jax.errors import GlupruneError, OperationError, RequestError
from gluprune_jax.mesh import parameter_sharding
from gluprune_jax.model import Llama3Rope, ModelConfig, rope_frequencies

Progress = Callable[[str, int, int], None]

_PLAIN_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
_QUANTIZED_TYPES = (GGMLType.Q8_0, GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q4_K, GGMLType.Q6_K)

# The keys below `llama.` that the config is made of.
_CONFIG_KEYS = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "vocab_size",
    }
)
# Keys for what we do not implement, with the values that switch it off.
_NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.type": ("none",),
    "tensor_data_layout": ("Meta AI original pth",),
}
# What only qualifies a scaling that `rope.scaling.type` has switched off.
_INERT_KEYS = frozenset({"rope.scaling.finetuned", "rope.scaling.original_context_length"})


def read_gguf(
    path: pathlib.Path,
    dtype: np.dtype[Any] | None = None,
    progress: Progress | None = None,
    mesh: MeshChoice | None = None,
) -> Checkpoint:
    """Reads a GGUF file of the llama architecture.

    Args:
      path: the file.
      dtype: what every tensor is cast to. None keeps float32, float16 and bfloat16 tensors bit for bit, and
        turns quantised ones into float32.
      progress: called after each tensor with a description and the bytes of the file read so far and in all.
      mesh: chooses the mesh that the weights are spread over, tensor by tensor; by default all of them go to the
        default device.

    Returns:
      The model with its tokenizer and generation config as assets. Biases, experts, and any RoPE scaling other
      than that of Llama 3 are refused, never dropped.

    Raises:
      RequestError: there is no such file, or it holds a model or tensor type that is not supported.
      OperationError: the file is damaged: unreadable, cut short, tensors missing, unexpected, of a wrong shape
        or not finite.
    """
    try:
        return _read(path, dtype, progress, mesh)
    except GlupruneError as error:
        raise type(error)(f"{path}: {error}") from error


def _read(
    path: pathlib.Path, dtype: np.dtype[Any] | None, progress: Progress | None, mesh: MeshChoice | None
) -> Checkpoint:
    fields, tensors = _open(path)
    _check_keys(fields)
    _check_types(tensors)
    config = _config(fields, tensors)
    notes = ["the general.* metadata (name, licence, file type, ...) was left out"]
    if "output.weight" in tensors and config.tie_word_embeddings:
        notes.append("output.weight is identical to token_embd.weight, so the embeddings were taken as tied")
    _check_tensors(config, tensors)

    wanted = [(name, tensors[name.gguf]) for name in tensor_names(config)]
    abstract = abstract_weights(config, {name.hf: dtype or _dtype(tensor) for name, tensor in wanted})
    chosen, config = choose_mesh(mesh, abstract)
    logical = parameter_shapes(dataclasses.replace(config, width_multiple=1))
    stored = parameter_shapes(config)
    total = sum(int(tensor.n_bytes) for _, tensor in wanted)
    done = 0
    arrays: dict[str, Array] = {}
    for name, tensor in wanted:
        values = _values(tensor, dtype)
        if name.path[-1] in ("q_proj", "k_proj"):
            heads, head_dim, _ = logical[name.hf].shape
            values = _undo_permutation(values, heads, head_dim)
        values = np.ascontiguousarray(values.reshape(logical[name.hf].shape))
        if chosen is None:
            arrays[name.hf] = jax.device_put(values)
        else:
            shape = stored[name.hf].shape
            arrays[name.hf] = shards.place(values, shape, parameter_sharding(chosen, name.path, shape))
        done += int(tensor.n_bytes)
        if progress is not None:
            progress("reading GGUF", done, total)

    types = Counter(tensor.tensor_type for _, tensor in wanted)
    counts = ", ".join(f"{count} {kind.name}" for kind, count in types.most_common())
    quantized = any(kind in _QUANTIZED_TYPES for kind in types)
    became = f", all cast to {dtype}" if dtype else ", the quantised ones now float32" if quantized else ""
    notes.append(f"tensors in the file: {counts}{became}")

    hf_config: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    token_ids = _token_ids(fields)
    assets = {}
    if fields.get("tokenizer.ggml.model", "no_vocab") == "no_vocab":
        notes.append("the file holds no tokenizer")
    else:
        assets = tokenizer_assets(fields)
    if token_ids:
        assets["generation_config.json"] = json.dumps(token_ids, indent=2).encode()
    return Checkpoint(
        model=build_model(config, arrays),
        source=str(path),
        hf_config=hf_config | token_ids,
        assets=assets,
        notes=tuple(notes),
    )


class _CheckedReader(gguf.GGUFReader):  # type: ignore[misc]  # gguf is untyped
    """GGUFReader that knows where the file ends; itself, it reads a damaged array of numbers for ever."""

    data: np.ndarray

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        if isinstance(self.data, np.memmap):
            # Slicing a plain array is several times faster, and a vocabulary is 100,000s of slices.
            self.data = np.asarray(self.data)
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise ValueError(f"it has {len(self.data)} bytes, and its own header asks for {end}")
        part: np.ndarray = super()._get(offset, dtype, count, override_order)
        return part


def _open(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata as Python values, and the tensors (views of the mapped file), by name."""
    try:
        # What a short or garbled file makes the reader do is one of these errors.
        with np.errstate(all="raise"):
            reader = _CheckedReader(path)
            fields = {key: field.contents() for key, field in reader.fields.items()}
    except FileNotFoundError as error:
        raise RequestError("there is no such file") from error
    except (OSError, ValueError, IndexError, KeyError, TypeError, ArithmeticError, MemoryError) as error:
        raise OperationError(f"this is not a readable GGUF file, or it is cut short ({error})") from error
    if reader.byte_order == "S":
        raise RequestError("the file is big-endian; accepted: little-endian GGUF files")
    if fields.get("split.count", 1) not in (0, 1):
        raise RequestError(
            f"split.count is {fields['split.count']}; accepted: a model in one file (gguf-split --merge)"
        )
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise RequestError(f"general.architecture is {architecture!r}; accepted: 'llama'")
    if fields.get("general.type", "model") != "model":
        raise RequestError(f"general.type is {fields['general.type']!r}; accepted: 'model'")
    return fields, {tensor.name: tensor for tensor in reader.tensors}


# --------------------------------------------------------------------------------------------------- config


def _llama_keys(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}


def _check_keys(fields: Mapping[str, Any]) -> None:
    own = _llama_keys(fields)
    if own.get("expert_count"):
        raise RequestError(
            f"llama.expert_count is {own['expert_count']}: mixtures of experts (Mixtral) are not supported"
        )
    for key, value in own.items():
        if key in _NEUTRAL_VALUES and value not in _NEUTRAL_VALUES[key]:
            accepted = " or ".join(map(repr, _NEUTRAL_VALUES[key]))
            raise RequestError(f"llama.{key} is {value!r}; accepted: {accepted}")
        if key not in _CONFIG_KEYS and key not in _NEUTRAL_VALUES and key not in _INERT_KEYS:
            raise RequestError(f"llama.{key} is {value!r}, and this key is not supported")

    if not isinstance(fields.get("tokenizer.ggml.tokens", []), list):
        raise OperationError("tokenizer.ggml.tokens is not a list")


def _config(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> ModelConfig:
    own = _llama_keys(fields)
    layers = _integer(own, "block_count")
    if layers > len(tensors):
        raise OperationError(f"llama.block_count is {layers}, but the file holds only {len(tensors)} tensors")
    hidden_size = _integer(own, "embedding_length")
    heads = _integer(own, "attention.head_count")
    if "attention.key_length" not in own and (heads < 1 or hidden_size % heads):
        raise OperationError(
            f"llama.attention.head_count = {heads} does not divide llama.embedding_length = {hidden_size}, "
            "and there is no llama.attention.key_length"
        )
    head_dim = _integer(own, "attention.key_length", hidden_size // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if _integer(own, key, head_dim) != head_dim:
            raise RequestError(f"llama.{key} is {own[key]}; accepted: the size of a key, {head_dim}")
    widths = own.get("feed_forward_length")
    if not isinstance(widths, list):
        widths = [_integer(own, "feed_forward_length")] * layers
    if len(widths) != layers or not all(isinstance(width, int) for width in widths):
        raise OperationError(f"llama.feed_forward_length is {widths}; expected a whole number for {layers} layers")
    theta = _positive(own, "rope.freq_base", 10000.0)
    return ModelConfig(
        vocab_size=_vocab_size(fields, tensors),
        hidden_size=hidden_size,
        intermediate_sizes=tuple(widths),
        num_attention_heads=heads,
        num_key_value_heads=_integer(own, "attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=_integer(own, "context_length"),
        rms_norm_eps=_positive(own, "attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(tensors.get("rope_freqs.weight"), head_dim, theta),
        tie_word_embeddings=_is_tied(tensors),
    )


def _integer(own: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = own.get(key, default)
    # Some writers store one number for each layer.
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if value is None:
        raise OperationError(f"the metadata key llama.{key} is missing")
    if isinstance(value, list):
        raise RequestError(f"llama.{key} differs between layers; accepted: one value for all")
    if not isinstance(value, int):
        raise OperationError(f"llama.{key} is {value!r}; it must be a whole number")
    return value


def _positive(own: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = own.get(key, default)
    if value is None:
        raise OperationError(f"the metadata key llama.{key} is missing")
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise OperationError(f"llama.{key} is {value!r}; it must be a positive number")
    # The shortest decimal that gives this float32: 9.999999747378752e-06 was 1e-05 in the original config.
    return float(str(np.float32(value)))


def _vocab_size(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        # Any size will do: the tensor is about to be reported as missing, along with all others.
        return max(1, len(fields.get("tokenizer.ggml.tokens", ())))
    size = int(embedding.shape[-1])
    for key, stated in (
        ("tokenizer.ggml.tokens", len(fields.get("tokenizer.ggml.tokens", range(size)))),
        ("llama.vocab_size", fields.get("llama.vocab_size", size)),
    ):
        if stated != size:
            raise OperationError(f"token_embd.weight holds {size} tokens, but {key} says {stated}")
    return size


def _is_tied(tensors: Mapping[str, Any]) -> bool:
    output, embedding = tensors.get("output.weight"), tensors.get("token_embd.weight")
    if output is None:
        return True
    if embedding is None or output.tensor_type != embedding.tensor_type:
        return False
    return np.array_equal(output.data.view(np.uint8), embedding.data.view(np.uint8))


def _rope_scaling(tensor: Any, head_dim: int, theta: float) -> Llama3Rope | None:
    """The config whose frequencies are the plain ones divided by `rope_freqs.weight`, `[H/2]`."""
    if tensor is None:
        return None
    divisors = _values(tensor, np.dtype(np.float32))
    if divisors.shape != (head_dim // 2,):
        raise OperationError(f"rope_freqs.weight has shape {divisors.shape}; expected ({head_dim // 2},)")
    if np.all(divisors == 1):
        return None
    factor = float(str(divisors.max()))
    if factor > 1:
        scaling = Llama3Rope(factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
        config = ModelConfig(1, 1, (1,), 1, 1, head_dim, 1, rms_norm_eps=1.0, rope_theta=theta)
        scaled = dataclasses.replace(config, rope_scaling=scaling)
        if np.allclose(rope_frequencies(config) / rope_frequencies(scaled), divisors, rtol=1e-4, atol=0):
            return scaling
    raise RequestError(
        "rope_freqs.weight is not the RoPE scaling of Llama 3 (low 1, high 4, original length 8192, "
        f"factor {factor}), which is the only one supported"
    )


def _token_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    ids: dict[str, Any] = {f"{name}_id": i for name, i in special_token_ids(fields).items() if name != "unk_token"}
    # Chat models end their turn with another token than their text.
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(token_id(fields, key) for key in keys if key in fields))
    if len(ends) > 1 and "eos_token_id" in ids:
        ids["eos_token_id"] = ends
    return ids


# -------------------------------------------------------------------------------------------------- tensors


def _check_types(tensors: Mapping[str, Any]) -> None:
    accepted = (*_PLAIN_TYPES, *_QUANTIZED_TYPES)
    for name, tensor in tensors.items():
        if tensor.tensor_type not in accepted:
            names = ", ".join(kind.name for kind in accepted)
            raise RequestError(f"{name} is stored as {tensor.tensor_type.name}; accepted: {names}")


def _check_tensors(config: ModelConfig, tensors: Mapping[str, Any]) -> None:
    expected = {name.gguf: name.shape for name in tensor_names(config)}
    optional = {"rope_freqs.weight"} | ({"output.weight"} if config.tie_word_embeddings else set())
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected and name not in optional],
        "of a wrong shape": [
            f"{name} {shape} instead of {expected[name]}"
            for name, tensor in tensors.items()
            if name in expected and (shape := tuple(tensor.shape[::-1].tolist())) != expected[name]
        ],
    }
    found = [f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names]
    if found:
        raise OperationError(f"the tensors do not fit the config; {'; '.join(found)}")


def _dtype(tensor: Any) -> np.dtype[Any]:
    """What the values of a tensor become in memory, if they are not cast."""
    kept: dict[Any, np.dtype[Any]] = {
        GGMLType.F16: np.dtype(np.float16),
        GGMLType.BF16: np.dtype(ml_dtypes.bfloat16),
    }
    return kept.get(tensor.tensor_type, np.dtype(np.float32))


def _values(tensor: Any, dtype: np.dtype[Any] | None) -> np.ndarray:
    """The values of a tensor in an array of its own: nothing may depend on the file once it has been read."""
    kind = tensor.tensor_type
    with np.errstate(all="ignore"):
        if kind in _QUANTIZED_TYPES:
            values: np.ndarray = gguf.quants.dequantize(tensor.data, kind)
        else:
            values = np.array(tensor.data.view(ml_dtypes.bfloat16) if kind == GGMLType.BF16 else tensor.data)
        if not np.isfinite(values).all():
            raise OperationError(f"{tensor.name} holds values that are not finite")
        if dtype is not None and values.dtype != dtype:
            values = cast(values, dtype, tensor.name)
    return values


def _undo_permutation(rows: np.ndarray, heads: int, head_dim: int) -> np.ndarray:
    """Brings rows `[heads * H, D]` of Q or K back: dimension i of a head stood at 2i, i + H/2 at 2i + 1."""
    return rows.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2)
