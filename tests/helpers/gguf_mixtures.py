"""Mixtures of experts that llama.cpp can express, and GGUF files of them written as its converter does.

The names of tensors and keys are those of the `gguf` package, and not our tables.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import MODEL_ARCH
from gguf_files import permute, write_gguf
from numpy.typing import NDArray
from tiny_mixtures import CONFIGS

ARCHITECTURES = {"qwen3_moe": "qwen3moe", "olmoe": "olmoe", "mixtral": "llama"}
EXPERTS = re.compile(r"(?P<before>model\.layers\.\d+\.\w+\.experts)\.(?P<expert>\d+)\.(?P<matrix>\w+)\.weight")

SMALL: dict[str, dict[str, Any]] = {
    "qwen3_moe": CONFIGS["qwen3_moe"],
    "qwen3_moe, tied and yarn": {
        **CONFIGS["qwen3_moe"],
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "olmoe": {**CONFIGS["olmoe"], "clip_qkv": None, "num_key_value_heads": 4},
    "mixtral": {**CONFIGS["mixtral"], "sliding_window": None},
    "mixtral of 8 experts": {**CONFIGS["mixtral"], "sliding_window": None, "num_local_experts": 8},
}


def count_of(config: Mapping[str, Any]) -> int:
    """How many experts a layer has."""
    return int(config.get("num_experts") or config["num_local_experts"])


def metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the converter writes of a config.json, as far as the architecture needs it."""
    name, is_qwen = ARCHITECTURES[config["model_type"]], config["model_type"] == "qwen3_moe"
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": 1e-6 if is_qwen else 1e-5,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(config["rope_theta"]),
        "vocab_size": config["vocab_size"],
        "expert_count": count_of(config),
        "expert_used_count": config["num_experts_per_tok"],
    }
    if is_qwen:
        values["expert_feed_forward_length"] = config["moe_intermediate_size"]
    else:
        values["rope.dimension_count"] = head_dim
    if scaling := config.get("rope_scaling"):
        values |= {"rope.scaling.type": "yarn", "rope.scaling.factor": scaling["factor"]}
        values["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    return {f"{name}.{key}": value for key, value in values.items()}


def stacked(config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The tensors of a folder as the converter stores them: experts stacked, Q and K of Mixtral in another order."""
    is_mixtral = config["model_type"] == "mixtral"
    names = gguf.get_tensor_name_map(
        MODEL_ARCH[ARCHITECTURES[config["model_type"]].upper()], config["num_hidden_layers"]
    )
    found: dict[str, NDArray[Any]] = {}
    experts: dict[str, list[NDArray[Any]]] = {}
    for name, values in tensors.items():
        if match := EXPERTS.fullmatch(name):
            of_one = experts.setdefault(f"{match['before']}.{match['matrix']}", [])
            assert len(of_one) == int(match["expert"])
            of_one.append(values)
            continue
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        projection = name.split(".")[-2]
        plain = permute(values, heads[projection]) if is_mixtral and projection in heads else values
        found[f"{names.get_name(name.removesuffix('.weight'))}.weight"] = plain
    return found | {f"{names.get_name(name)}.weight": np.stack(values) for name, values in experts.items()}


def write(path: Path, config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]], **changes: Any) -> Path:
    """A GGUF file of a mixture; `changes` replace metadata, by the key below the architecture, or None removes them."""
    name = ARCHITECTURES[config["model_type"]]
    fields = {**metadata(config), "tokenizer.ggml.model": "no_vocab"}
    fields |= {f"{name}.{key}": value for key, value in changes.items()}
    kept = {key: value for key, value in fields.items() if value is not None}
    return write_gguf(path, kept, stacked(config, tensors), name)
