"""Between Hugging Face `config.json` and our `ModelConfig`, refusing what we do not implement.

Both spellings are read and written: transformers 5 (`rope_parameters`, `dtype`) and transformers 4 (`rope_theta`,
`rope_scaling`, `torch_dtype`). A key that is in none of the tables below is an error that names it.
"""

import reprlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.model import Llama3Rope, ModelConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

# What an absent key means, where the two families differ from "absent is an error".
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
}

# Keys with no effect on the forward pass, whatever their value. They are kept for export.
INERT_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path attention_dropout attn_implementation
    bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range label2id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores pad_token_id prefix pretraining_tp problem_type remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p
    unsloth_fixed unsloth_version use_cache
    """.split()
)

# Keys whose other values would change the function that the model computes.
ONLY_THESE_VALUES: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "auto_map": (None,),
    "chunk_size_feed_forward": (0, None),
    "cross_attention_hidden_size": (None,),
    "hidden_act": ("silu", "swish"),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "is_llama_config": (True,),
    "add_cross_attention": (False,),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "sliding_window": (None,),
    "tie_word_embeddings": (False, True, None),
    "tie_encoder_decoder": (False,),
    "use_bfloat16": (False,),
}

_ARCHITECTURE_KEYS = frozenset(
    """
    architectures head_dim hidden_size intermediate_size max_position_embeddings model_type num_attention_heads
    num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings
    vocab_size gluprune layer_types
    """.split()
)

_REPR = reprlib.Repr()  # for values of any length and depth
_REPR.maxstring = 80
_shown = _REPR.repr

_MOST = 2**31 - 1
_MOST_LAYERS = 10_000  # a damaged config must not cost the memory of a list so long

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(data: Any, where: str = "config.json") -> tuple[ModelConfig, dict[str, Any]]:
    """Turns a parsed `config.json` into our config and the remaining keys, which an export repeats.

    Raises:
      RequestError: another model family, or a key or value that we do not implement, all of them named.
      OperationError: it is no config at all.
    """
    if not isinstance(data, Mapping):
        raise OperationError(f"{where} is no model config: it holds {_shown(data)} instead of an object")
    family = data.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise RequestError(
            f"{where} has model_type {_shown(family)}; supported are {_names(ARCHITECTURES)} (Llama 2 to 3.3, SmolLM2, "
            f"TinyLlama, Mistral without sliding window)"
        )
    architectures = data.get("architectures") or [ARCHITECTURES[family]]
    if architectures != [ARCHITECTURES[family]]:
        raise RequestError(
            f"{where} has architectures {_shown(architectures)}; supported is {[ARCHITECTURES[family]]} for {family}"
        )

    known = {**_DEFAULTS[family], **data}
    problems = [
        f"{key} = {_shown(known[key])} (supported: {' or '.join(repr(v) for v in allowed)})"
        for key, allowed in ONLY_THESE_VALUES.items()
        if key in known and known[key] not in allowed
    ]
    problems += [
        f"{key} = {_shown(value)} (unknown key)"
        for key, value in data.items()
        if key not in INERT_KEYS | _ARCHITECTURE_KEYS and key not in ONLY_THESE_VALUES
    ]
    layer_types = data.get("layer_types") or []
    if not isinstance(layer_types, list) or (layer_types := [kind for kind in layer_types if kind != "full_attention"]):
        problems.append(f"layer_types = {_shown(layer_types)} (supported: a list of 'full_attention')")
    if problems:
        raise RequestError(f"{where} asks for what is not supported: {'; '.join(problems)}")

    D = _integer(known, "hidden_size", where)
    N = _integer(known, "num_attention_heads", where)
    width = _integer(known, "intermediate_size", where)
    layers = _integer(known, "num_hidden_layers", where, most=_MOST_LAYERS)
    K = N if known.get("num_key_value_heads") is None else _integer(known, "num_key_value_heads", where)
    if known.get("head_dim") is None and D % N:
        raise RequestError(
            f"{where} has hidden_size {D}, which {N} heads do not divide, and no head_dim; give head_dim"
        )
    theta, scaling = _rope(known, where)
    fields: dict[str, Any] = {
        "vocab_size": _integer(known, "vocab_size", where),
        "hidden_size": D,
        "intermediate_sizes": _logical_widths(known, width, layers, where),
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": D // N if known.get("head_dim") is None else _integer(known, "head_dim", where),
        "max_position_embeddings": _integer(known, "max_position_embeddings", where),
        "rms_norm_eps": _number(known, "rms_norm_eps", where, default=1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": bool(known.get("tie_word_embeddings")),
    }
    try:
        config = ModelConfig(**fields)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error
    rest = {key: value for key, value in data.items() if key not in _ARCHITECTURE_KEYS}
    return config, rest | {"model_type": family}


def accepted_without_effect(rest: Mapping[str, Any]) -> list[str]:
    """The inert keys among those that `read_config` passed on, for the report to the user."""
    return sorted(INERT_KEYS & rest.keys())


def write_config(config: ModelConfig, rest: Mapping[str, Any], dtype: np.dtype[Any]) -> dict[str, Any]:
    """`config.json` for a model, in both spellings.

    Per-layer widths become the widest (the tensors are zero-padded to it); the logical widths stand under
    `gluprune`, where `read_config` finds them.

    Args:
      config: the architecture.
      rest: the keys that `read_config` passed on (at least `model_type`).
      dtype: of the weights.
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {"rope_type": "llama3"} | {key: getattr(config.rope_scaling, key) for key in _LLAMA3_KEYS}
    widest = max(config.intermediate_sizes)
    data = {
        **rest,
        "architectures": [ARCHITECTURES[rest["model_type"]]],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": widest,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "dtype": str(dtype),
        "torch_dtype": str(dtype),
    }
    if rest["model_type"] == "mistral":
        data["sliding_window"] = None
    if set(config.intermediate_sizes) != {widest}:
        data["gluprune"] = {"intermediate_sizes": list(config.intermediate_sizes)}
    return dict(sorted(data.items()))


def _rope(data: Mapping[str, Any], where: str) -> tuple[float, Llama3Rope | None]:
    """RoPE from either spelling; if both are there they must agree."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(data.get(key), Mapping | None):
            raise RequestError(f"{where} has {key} = {_shown(data[key])}; it must be an object or null")
    readings = []
    if data.get("rope_parameters") is not None:
        readings.append(_rope_from(data["rope_parameters"], data, f"{where}: rope_parameters"))
    if "rope_theta" in data or data.get("rope_scaling") is not None or not readings:
        scaling = {"rope_theta": data.get("rope_theta", 10000.0), **(data.get("rope_scaling") or {})}
        readings.append(_rope_from(scaling, data, f"{where}: rope_scaling"))
    if readings[0] != readings[-1]:
        raise RequestError(
            f"{where} says two things about RoPE: rope_parameters mean {readings[0]}, "
            f"rope_theta and rope_scaling mean {readings[-1]}"
        )
    return readings[0]


def _rope_from(rope: Mapping[str, Any], data: Mapping[str, Any], where: str) -> tuple[float, Llama3Rope | None]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = _number({"rope_theta": data.get("rope_theta", 10000.0), **rope}, "rope_theta", where)
    expected = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind == "llama3":
        expected |= set(_LLAMA3_KEYS)
    elif kind != "default":
        raise RequestError(f"{where} has rope_type {_shown(kind)}; supported are 'default' and 'llama3'")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise RequestError(f"{where} has partial_rotary_factor {_shown(rope['partial_rotary_factor'])}; supported is 1")
    if unknown := sorted(rope.keys() - expected):
        raise RequestError(f"{where} has keys that rope_type {kind!r} does not: {', '.join(unknown)}")
    if kind == "default":
        return theta, None
    factor, low, high = (_number(rope, key, where) for key in _LLAMA3_KEYS[:3])
    if factor < 1 or high <= low:
        raise RequestError(
            f"{where} has factor {factor}, low_freq_factor {low} and high_freq_factor {high}; "
            f"llama3 needs a factor of at least 1 and a high above the low"
        )
    return theta, Llama3Rope(factor, low, high, _integer(rope, _LLAMA3_KEYS[3], where))


def _logical_widths(data: Mapping[str, Any], width: int, layers: int, where: str) -> tuple[int, ...]:
    ours = data.get("gluprune")
    if ours is None:
        return (width,) * layers
    widths = ours.get("intermediate_sizes") if isinstance(ours, Mapping) and len(ours) == 1 else None
    if (
        not isinstance(widths, list)
        or len(widths) != layers
        or not all(type(size) is int and 0 < size <= width for size in widths)
    ):
        raise RequestError(
            f"{where} has gluprune = {_shown(ours)}; it must hold intermediate_sizes alone, {layers} whole numbers "
            f"from 1 to {width}"
        )
    return tuple(widths)


def _integer(data: Mapping[str, Any], key: str, where: str, most: int = _MOST) -> int:
    value = data.get(key)
    if type(value) is not int or not 1 <= value <= most:
        found = f"no {key}" if value is None else f"{key} = {_shown(value)}"
        raise RequestError(f"{where} has {found}; it must be a whole number from 1 to {most}")
    return value


def _number(data: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = data.get(key, default)
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise RequestError(f"{where} has {key} = {_shown(value)}; it must be a positive number")
    return float(value)


def _names(names: Mapping[str, Any]) -> str:
    return " and ".join(repr(name) for name in names)
