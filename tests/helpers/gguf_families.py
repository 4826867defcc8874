"""Tiny random models of every family, and GGUF files of them written as llama.cpp's converter does.

The names of tensors and keys are those of the `gguf` package, and not our tables.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from gguf_files import permute, write_gguf
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tiny_families import CONFIGS

import convert
from convert.checkpoint import Checkpoint
from convert.huggingface.config import read_config
from convert.loaded import LoadedCheckpoint
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model, parameters_of, with_parameters

ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "granitemoehybrid": "granite",
    "mistral": "llama",
    "olmo3": "olmo2",
}
PERMUTED = ("llama", "smollm3", "granite")
PLUS_ONE = ("gemma", "gemma2", "gemma3")
KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
}

# Numbers that a float32 has as short as they are.
_LONG = {
    name: [round(1 + step * i, 1) for i in range(6)] for name, step in (("short_factor", 0.1), ("long_factor", 0.7))
}
_LONGROPE = {"rope_scaling": {"type": "longrope", **_LONG}}

# What a GGUF file can say: no SmolLM3 with a list of its own, no scale of Gemma's.
SMALL: dict[str, dict[str, Any]] = {
    **{name: CONFIGS[name] for name in CONFIGS if name != "qwen2 with a window from layer 2"},
    "phi3, short rows": {**CONFIGS["phi3, short rows"], **_LONGROPE},
    "phi3, long rows": {**CONFIGS["phi3, long rows"], **_LONGROPE},
    "smollm3": {**CONFIGS["smollm3"], "no_rope_layers": None},
    "smollm3 with biases": {**CONFIGS["smollm3"], "no_rope_layers": None, "attention_bias": True},
    "gemma3": {**CONFIGS["gemma3"], "query_pre_attn_scalar": 32},
    "gemma3 without caps and scaling": {
        **CONFIGS["gemma3"],
        "query_pre_attn_scalar": 32,
        "final_logit_softcapping": None,
        "rope_scaling": None,
        "num_hidden_layers": 7,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 10000.0,
    },
    "gemma2": {**CONFIGS["gemma2"], "query_pre_attn_scalar": 32},
    "olmo2, tied to nothing": {**CONFIGS["olmo2"], "tie_word_embeddings": False},
}


WIDTHS = (96, 40, 33, 7)  # of the four layers of a model whose layers differ


def architecture(config: Mapping[str, Any]) -> str:
    return ARCHITECTURES.get(config["model_type"], config["model_type"])


def metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the converter writes of a config.json, all families together."""
    kind, layers = config["model_type"], config["num_hidden_layers"]
    scaling = config.get("rope_scaling") or {}
    keys: dict[str, Any] = {key: config.get(of) for key, of in KEYS.items()}
    if scaling.get("rope_type") in ("linear", "yarn"):
        keys |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": scaling["factor"]}
        keys["rope.scaling.original_context_length"] = scaling.get("original_max_position_embeddings")
        names = {"yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
        keys |= {f"rope.scaling.{key}": scaling.get(of) for key, of in names.items()}
    if kind in ("mistral", "gemma2", "gemma3_text", "olmo3", "phi3"):
        keys["attention.sliding_window"] = config.get("sliding_window") or 0
    if kind == "gemma3_text" and config["sliding_window_pattern"] != 6:
        keys["attention.sliding_window_pattern"] = config["sliding_window_pattern"]
        keys["rope.freq_base_swa"] = config["rope_local_base_freq"]
    if kind == "olmo3":
        keys["attention.sliding_window_pattern"] = [(i + 1) % 4 != 0 for i in range(layers)]
    if kind in ("gemma2", "gemma3_text"):
        keys |= {key: config.get(key) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    if "logits_scaling" in config:
        keys |= {
            "attention.scale": config["attention_multiplier"],
            "embedding_scale": config["embedding_multiplier"],
            "residual_scale": config["residual_multiplier"],
            "logit_scale": config["logits_scaling"],
        }
    if kind == "granitemoehybrid":
        keys |= {
            "rope.scaling.finetuned": config["position_embedding_type"] == "rope",
            "attention.head_count_kv": [config["num_key_value_heads"]] * layers,
            "expert_count": 0,
            "expert_used_count": 0,
            "expert_shared_feed_forward_length": config["shared_intermediate_size"],
            "ssm.conv_kernel": 4,
            "ssm.state_size": 256,
            "ssm.group_count": 1,
            "ssm.inner_size": 128,
            "ssm.time_step_rank": 128,
        }
    if kind == "phi3":
        original = config.get("original_max_position_embeddings", config["max_position_embeddings"])
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        keys |= {
            "rope.dimension_count": int(head_dim * config.get("partial_rotary_factor", 1)),
            "rope.scaling.original_context_length": original,
        }
        if scaling:
            longer = config["max_position_embeddings"] / original
            keys["rope.scaling.attn_factor"] = float(np.sqrt(1 + np.log(longer) / np.log(original)))
    return {f"{architecture(config)}.{key}": value for key, value in keys.items() if value is not None}


def converted(
    config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]], dtype: np.dtype[Any]
) -> dict[str, NDArray[Any] | tuple[NDArray[Any], GGMLType]]:
    """Tensors of a Hugging Face file as the converter writes them: matrices in `dtype`, vectors in float32."""
    kind = architecture(config)
    arch = next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == kind)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    found: dict[str, NDArray[Any]] = {}
    for name, values in tensors.items():
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if "shared_mlp.input_linear" in name:
            block = name.split(".")[2]
            for half, part in zip(("gate", "up"), np.split(values, 2), strict=True):
                found[f"blk.{block}.ffn_{half}.weight"] = part
            continue
        if "shared_mlp.output_linear" in name:
            new = f"blk.{name.split('.')[2]}.ffn_down.weight"
        assert new is not None, name
        if kind in PERMUTED and (of := name.split(".")[-2]) in heads:
            values = permute(values, heads[of])
        if kind in PLUS_ONE and name.endswith("norm.weight"):
            values = values + np.float32(1)
        found[new] = values
    for length in ("long", "short"):
        if factors := (config.get("rope_scaling") or {}).get(f"{length}_factor"):
            found[f"rope_factors_{length}.weight"] = np.array(factors, np.float32)
    return {name: stored(values, dtype) for name, values in found.items()}


def stored(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any] | tuple[NDArray[Any], GGMLType]:
    if values.ndim == 1 or dtype != ml_dtypes.bfloat16:
        return np.ascontiguousarray(values, None if values.ndim == 1 else dtype)
    return np.ascontiguousarray(values, dtype).view(np.uint8), GGMLType.BF16


def random_model(config: ModelConfig) -> Decoder:
    """All weights random, norms and biases too; those of Gemma are such that adding one loses nothing."""
    rng = np.random.default_rng(0)

    def values(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if name.endswith("norm.weight"):
            return (rng.integers(-(2**20), 2**20, shape) / 2**20).astype(np.float32)
        return (0.15 * rng.standard_normal(shape)).astype(np.float32)

    shapes = parameters_of(abstract_model(config))
    return with_parameters(
        abstract_model(config), {name: jnp.asarray(values(name, leaf.shape)) for name, leaf in shapes.items()}
    )


def write(
    path: pathlib.Path, config: Mapping[str, Any], dtype: Any = np.float32, **fields: Any
) -> tuple[pathlib.Path, Decoder]:
    """A GGUF file of a random model of this config; `fields`, with `__` for dots, are changed (None: left out)."""
    ours, rest = read_config(config)
    model = random_model(ours)
    path.mkdir(exist_ok=True)
    convert.save(LoadedCheckpoint(model=model, source="random", hf_config=rest), path / "hf")
    changed = {f"{architecture(config)}.{key.replace('__', '.')}": value for key, value in fields.items()}
    tensors = converted(config, load_file(path / "hf" / "model.safetensors"), np.dtype(dtype))
    return write_gguf(path / "model.gguf", metadata(config) | changed, tensors, architecture(config)), model


def random_checkpoint(config: dict[str, Any], **changes: Any) -> Checkpoint:
    """A random model of a config, fields of which are changed."""
    ours, rest = read_config(config)
    return LoadedCheckpoint(model=random_model(dataclasses.replace(ours, **changes)), source="random", hf_config=rest)
