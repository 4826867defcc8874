"""Llama-3.2-1B in its exact shapes, with random weights: what the benchmarks run on."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from convert.hf_config import read_config
from convert.names import tensor_names

HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
CONFIG, _ = read_config(HF_CONFIG)


def write_checkpoint(folder: Path) -> None:
    """Writes 2.5 GB of bfloat16 normal weights (standard deviation 0.02), norms of one."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG, indent=2))
    rng = np.random.default_rng(0)
    tensors = {}
    for name in tensor_names(CONFIG):
        if len(name.shape) == 1:
            tensors[name.hf] = np.ones(name.shape, ml_dtypes.bfloat16)
        else:
            tensors[name.hf] = (0.02 * rng.standard_normal(name.shape, np.float32)).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
