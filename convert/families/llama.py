"""Llama 2 to 3.3, SmolLM2, TinyLlama, and all that call themselves `llama`."""

import dataclasses
from typing import Any

from convert.families import llama_cpp, tensors
from convert.families.family import ATTENTION_BIAS, Family, GGUFTable
from convert.gguf.metadata import Metadata
from gluprune_jax.models.config import ModelConfig

# What llama and its relatives accept alone, one row a key.
SILU = {"hidden_act": ("silu", "swish")}
NO_MLP_BIAS = {"mlp_bias": (False, None)}
WHOLE_HEAD = {"partial_rotary_factor": (1, None)}
NO_WINDOW = {"sliding_window": (None,)}


def _of_gguf(own: Metadata) -> dict[str, Any]:
    # llama.cpp has one name for Llama and Mistral. Its converter drops the window of Mistral 7B 0.1.
    window = own.integer("attention.sliding_window", 0, least=0)
    return llama_cpp.llama3_or_scaled(own) | ({"model_type": "mistral", "sliding_window": window} if window else {})


def _to_gguf(config: ModelConfig) -> dict[str, Any]:
    window = config.attention[0].window
    return llama_cpp.write_scaled(config) | ({} if window is None else {"attention.sliding_window": window})


_TABLE = GGUFTable(
    architecture="llama",
    config=_of_gguf,
    metadata=_to_gguf,
    keys=frozenset({"attention.sliding_window"}),
    vectors=frozenset({llama_cpp.ROPE_FREQS}),
    divisors=llama_cpp.llama3_divisors,
    permuted=llama_cpp.PERMUTED,
    output_bias=True,
    applies_windows=False,
)
# Nvidia's descendants of Llama, whose layers differ; otherwise they compute what Llama does.
_DECI = dataclasses.replace(
    _TABLE, architecture="deci", config=llama_cpp.llama3_or_scaled, metadata=llama_cpp.write_scaled, keys=frozenset()
)

LLAMA = Family(
    name="Llama",
    covers="Llama 2 to 3.3, SmolLM2, TinyLlama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    heads=("LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaForQuestionAnswering"),
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    only={
        **SILU,
        **NO_MLP_BIAS,
        **WHOLE_HEAD,
        **NO_WINDOW,
    },
    written={"hidden_act": "silu"},
    tensors=tensors.LLAMA,
    flags=ATTENTION_BIAS,
    gguf=dataclasses.replace(_TABLE, per_layer=_DECI),
)
