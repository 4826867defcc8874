"""Granite 3: Llama with four multipliers."""

from typing import Any

from convert.families import llama_cpp, tensors
from convert.families.family import ATTENTION_BIAS, Family, GGUFTable, Number
from convert.families.llama import NO_MLP_BIAS, NO_WINDOW, SILU, WHOLE_HEAD
from convert.gguf.metadata import Metadata
from gluprune_jax.models.config import ModelConfig

MULTIPLIERS = {
    "attention_scale": Number("attention_multiplier"),  # itself, not on top of head_dim**-0.5
    "embedding_scale": Number("embedding_multiplier"),
    "residual_scale": Number("residual_multiplier"),
    "logit_scale": Number("logits_scaling", power=-1.0),
}
DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
}


def _of_gguf(own: Metadata) -> dict[str, Any]:
    def multiplier(key: str, default: float) -> float:
        return default if own.get(key) in (None, 0.0) else own.positive(key)

    config = {
        **llama_cpp.llama3_or_scaled(own),
        "attention_multiplier": multiplier("attention.scale", own.head_dim**-0.5),
        "embedding_multiplier": multiplier("embedding_scale", 1.0),
        "residual_multiplier": multiplier("residual_scale", 1.0),
        "logits_scaling": own.positive("logit_scale"),  # divides, despite its name in GGUF files
    }
    if own.switch("rope.scaling.finetuned", True):
        return config
    # What llama.cpp takes for no RoPE at all, which only the config of Granite 4 can say.
    width = max(own.per_layer("feed_forward_length"))
    return config | {
        "model_type": "granitemoehybrid",
        "position_embedding_type": "nope",
        "num_local_experts": 0,
        "shared_intermediate_size": width,
        "layer_types": ["attention"] * own.layers,
    }


def _to_gguf(config: ModelConfig) -> dict[str, Any]:
    rotates = any(layer.rope is not None for layer in config.attention)
    return {
        **llama_cpp.write_scaled(config),
        "attention.scale": config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
        "embedding_scale": config.embedding_scale,
        "residual_scale": config.residual_scale,
        "logit_scale": 1 / config.logit_scale,
        **({} if rotates else {"rope.scaling.finetuned": False}),
    }


GRANITE = Family(
    name="Granite 3",
    covers="Granite 3",
    model_type="granite",
    architecture="GraniteForCausalLM",
    heads=(),
    defaults=DEFAULTS,
    only={**SILU, **NO_MLP_BIAS, **NO_WINDOW, **WHOLE_HEAD},
    written={"hidden_act": "silu"},
    tensors=tensors.LLAMA,
    flags=ATTENTION_BIAS,
    numbers=MULTIPLIERS,
    # Dense Granite 4 as well: its converter divides the fused tensor, and writes what a model with Mamba would need.
    gguf=GGUFTable(
        architecture="granite",
        config=_of_gguf,
        metadata=_to_gguf,
        keys=frozenset(
            {"attention.scale", "embedding_scale", "logit_scale", "residual_scale", "rope.scaling.finetuned"}
        ),
        inert=frozenset(
            """
            expert_shared_feed_forward_length ssm.conv_kernel ssm.group_count ssm.inner_size ssm.state_size
            ssm.time_step_rank
            """.split()
        ),
        vectors=frozenset({llama_cpp.ROPE_FREQS}),
        divisors=llama_cpp.llama3_divisors,
        permuted=llama_cpp.PERMUTED,
        output_bias=True,
    ),
)
