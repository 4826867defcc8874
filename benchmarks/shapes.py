"""The models of the benchmarks in their exact shapes, by name, and checkpoints of them with random weights."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from convert.families.names import tensor_names
from convert.families.registry import FAMILIES
from convert.huggingface.config import read_config
from convert.huggingface.folder import MAX_SHARD_BYTES
from convert.huggingface.safetensors import layout, write_tensors
from gluprune_jax.models.config import ModelConfig

LLAMA_3_2_1B: dict[str, Any] = {
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
LLAMA_3_2_3B = LLAMA_3_2_1B | {
    "head_dim": 128,
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
}
LLAMA_3_1_8B = LLAMA_3_2_1B | {
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "rope_scaling": LLAMA_3_2_1B["rope_scaling"] | {"factor": 8.0},
    "tie_word_embeddings": False,
}
LLAMA_3_1_70B = LLAMA_3_1_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
GEMMA_3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
QWEN_3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
HF_CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": LLAMA_3_2_1B,
    "llama-3.2-3b": LLAMA_3_2_3B,
    "llama-3.1-8b": LLAMA_3_1_8B,
    "llama-3.1-70b": LLAMA_3_1_70B,
    "gemma-3-1b": GEMMA_3_1B,
    "qwen3-0.6b": QWEN_3_0_6B,
}

POOL = 2**26 + 1  # random numbers that a checkpoint is made of


def shapes_of(name: str) -> ModelConfig:
    """The architecture of a model in `HF_CONFIGS`."""
    return read_config(HF_CONFIGS[name])[0]


def write_checkpoint(folder: Path, name: str = "llama-3.2-1b") -> None:
    """Writes bfloat16 normal weights (standard deviation 0.02) and norms of one, in files of at most 5 GB.

    Every matrix is cut from one endless repetition of the same random numbers, each from where the one before ended:
    drawing 8 billion of them would take longer than writing them.
    """
    hf_config = HF_CONFIGS[name]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2))
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    # An odd length, and more than a matrix of the MLP has in the 8B model: no neuron of a layer is like another.
    random = (0.02 * np.random.default_rng(0).standard_normal(POOL, np.float32)).astype(bfloat16)
    names = {tensor.hf: tensor for tensor in tensor_names(shapes_of(name), FAMILIES[hf_config["model_type"]])}
    end = dict(zip(names, itertools.accumulate(math.prod(tensor.shape) for tensor in names.values()), strict=True))

    def values(hf: str) -> NDArray[Any]:
        shape = names[hf].shape
        if len(shape) == 1:
            return np.ones(shape, bfloat16)
        size = math.prod(shape)
        return np.resize(np.roll(random, (size - end[hf]) % POOL), size).reshape(shape)

    files = layout({hf: math.prod(tensor.shape) * bfloat16.itemsize for hf, tensor in names.items()}, MAX_SHARD_BYTES)
    weight_map = {}
    for number, members in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        write_tensors(
            folder / file,
            {hf: (bfloat16, names[hf].shape) for hf in members},
            lambda hf: [lambda: values(hf)],
            lambda nbytes: None,
        )
        weight_map |= dict.fromkeys(members, file)
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
