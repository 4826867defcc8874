"""The Llamas of the benchmarks in their exact shapes, by name."""

from typing import Any

from llama_3_2_1b import HF_CONFIG as LLAMA_3_2_1B

from convert.hf_config import read_config
from gluprune_jax.model import ModelConfig

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
    "rope_scaling": LLAMA_3_2_1B["rope_scaling"] | {"factor": 8.0},  # type: ignore[operator]
    "tie_word_embeddings": False,
}
LLAMA_3_1_70B = LLAMA_3_1_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
HF_CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": LLAMA_3_2_1B,
    "llama-3.2-3b": LLAMA_3_2_3B,
    "llama-3.1-8b": LLAMA_3_1_8B,
    "llama-3.1-70b": LLAMA_3_1_70B,
}


def shapes_of(name: str) -> ModelConfig:
    """The architecture of a model in `HF_CONFIGS`."""
    return read_config(HF_CONFIGS[name])[0]
