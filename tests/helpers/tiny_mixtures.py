"""Tiny mixtures of experts of the families that are pruned: configs, and folders as transformers 5 writes them."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from convert.huggingface.mixture_config import read_mixture_config
from convert.huggingface.safetensors import write_tensors

_SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# In the spelling of transformers 4; whatever matters has a value that is no default.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **_SIZES,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "rope_theta": 500.0,
    },
    "qwen3_moe, a dense layer": {
        **_SIZES,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "mlp_only_layers": [1],
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_theta": 500.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "olmoe": {
        **_SIZES,
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "num_experts": 6,
        "clip_qkv": 0.7,
        "rope_theta": 700.0,
    },
    "mixtral": {
        **_SIZES,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 6,
        "sliding_window": 8,
        "rope_theta": 900.0,
    },
}


def tensors_of(config: dict[str, Any], seed: int = 0, dtype: str = "float32") -> dict[str, NDArray[Any]]:
    """All random, norms and biases too."""
    rng = np.random.default_rng(seed)
    cast_to = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return {
        name: (0.15 * rng.standard_normal(shape) + float(name.endswith("norm.weight"))).astype(cast_to)
        for name, shape in read_mixture_config(config).tensors.items()
    }


def write_mixture(folder: Path, config: dict[str, Any], tensors: dict[str, NDArray[Any]] | None = None) -> Path:
    """A folder with these tensors, or random ones."""
    tensors = tensors_of(config) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {name: (values.dtype, values.shape) for name, values in tensors.items()}
    write_tensors(folder / "model.safetensors", shapes, lambda name: [lambda: tensors[name]], lambda _: None)
    return folder
