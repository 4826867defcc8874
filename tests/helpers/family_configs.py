"""Configs of all families as files hold them: published ones, and tiny ones."""

from typing import Any

import numpy as np

from convert.families.family import FULL, SLIDING
from convert.families.registry import FAMILIES
from gluprune_jax.models.config import LayerAttention, LinearRope, LongRope, Rope, YarnRope


def sizes(V: int, D: int, F: int, L: int, N: int, K: int, context: int, eps: float = 1e-6) -> dict[str, Any]:
    return {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "max_position_embeddings": context,
        "rms_norm_eps": eps,
    }


def of(model_type: str, architecture: str, **keys: Any) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [architecture], "torch_dtype": "bfloat16", **keys}


# ------------------------------------------------------------------------------------------- published configs

QWEN2 = of("qwen2", "Qwen2ForCausalLM", hidden_act="silu", attention_dropout=0.0, use_cache=True)
QWEN2 |= {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21, "rope_theta": 1000000.0}
QWEN3 = of("qwen3", "Qwen3ForCausalLM", hidden_act="silu", attention_bias=False, head_dim=128, rope_theta=1000000)
QWEN3 |= {"rope_scaling": None, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28}
GEMMA = of("gemma", "GemmaForCausalLM", attention_bias=False, hidden_act="gelu", head_dim=256, rope_theta=10000.0)
GEMMA2 = of("gemma2", "Gemma2ForCausalLM", attention_bias=False, hidden_activation="gelu_pytorch_tanh")
GEMMA2 |= {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "sliding_window_size": 4096}
GEMMA2 |= {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA3 = of("gemma3_text", "Gemma3ForCausalLM", attention_bias=False, hidden_activation="gelu_pytorch_tanh")
GEMMA3 |= {"attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256, "rope_scaling": None}
GEMMA3 |= {"query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_theta": 1000000, "sliding_window": 512}
MULTIMODAL = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
LINEAR = {"factor": 8.0, "rope_type": "linear"}
PHI3 = of("phi3", "Phi3ForCausalLM", hidden_act="silu", attention_bias=False, embd_pdrop=0.0, resid_pdrop=0.0)
PHI3 |= {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, "rope_theta": 10000.0}
YARN8 = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32,
    "beta_slow": 1,
}
OLMO3 = of("olmo3", "Olmo3ForCausalLM", hidden_act="silu", attention_bias=False, rope_theta=500000, sliding_window=4096)
OLMO3 |= {"rope_scaling": YARN8, "tie_word_embeddings": False}
GRANITE = {
    "hidden_act": "silu",
    "attention_bias": False,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.015625,
}
GRANITE4 = of("granitemoehybrid", "GraniteMoeHybridForCausalLM", **GRANITE, num_local_experts=0, num_experts_per_tok=0)
GRANITE4 |= {
    "position_embedding_type": "rope",
    "rope_theta": 10000000,
    "logits_scaling": 4,
    "tie_word_embeddings": True,
}
GRANITE4 |= {"residual_multiplier": 0.263, "shared_intermediate_size": 2048, "layer_types": ["attention"] * 28}
GRANITE4 |= {"mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_expand": 2, "router_aux_loss_coef": 0.01}

FACTORS = {"short_factor": [1.0] * 48, "long_factor": [float(i) for i in range(1, 49)]}


def plain(theta: float, layers: int, window: int | None = None) -> tuple[LayerAttention, ...]:
    return (LayerAttention(Rope(theta), window),) * layers


def gemma3_layers(layers: int, window: int, scaling: LinearRope | None = None) -> tuple[LayerAttention, ...]:
    full, sliding = LayerAttention(Rope(1e6, scaling)), LayerAttention(Rope(1e4), window)
    return tuple(sliding if (i + 1) % 6 else full for i in range(layers))


def olmo3_layers(layers: int) -> tuple[LayerAttention, ...]:
    yarn = YarnRope(8.0, 8192, 1.2079441541679836, 32.0, 1.0)
    full = LayerAttention(Rope(5e5, yarn, in_float32=True))
    sliding = LayerAttention(Rope(5e5, in_float32=True), 4096)
    return tuple(sliding if (i + 1) % 4 else full for i in range(layers))


GEMMA_FIELDS = {"norm": "float32_plus_one", "activation": "gelu_tanh", "tie_word_embeddings": True}
GEMMA2_FIELDS = {**GEMMA_FIELDS, "post_norm": True, "attention_soft_cap": 50.0, "logit_soft_cap": 30.0}
GEMMA3_FIELDS = {**GEMMA_FIELDS, "post_norm": True, "qk_norm": "head"}
OLMO_FIELDS = {"norm": "float32", "pre_norm": False, "post_norm": True, "qk_norm": "projection"}
GRANITE_FIELDS = {"attention_scale": 0.015625, "embedding_scale": 12.0, "tie_word_embeddings": True}

# The config as published; the head size, how layers attend, and the fields that are not Llama's; the number of
# parameters that the model's page states, where it is known.
PUBLISHED: dict[str, tuple[dict[str, Any], int, tuple[LayerAttention, ...], dict[str, Any], int | None]] = {
    "Mistral-7B-v0.1": (
        of("mistral", "MistralForCausalLM", hidden_act="silu", rope_theta=10000.0, sliding_window=4096)
        | sizes(32000, 4096, 14336, 32, 32, 8, 32768, 1e-5),
        128,
        plain(1e4, 32, 4096),
        {},
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        QWEN2 | sizes(151936, 896, 4864, 24, 14, 2, 32768) | {"tie_word_embeddings": True},
        64,
        plain(1e6, 24),
        {"qkv_bias": True, "tie_word_embeddings": True},
        494_032_768,
    ),
    "Qwen2.5-7B with YaRN": (
        QWEN2
        | sizes(152064, 3584, 18944, 28, 28, 4, 32768)
        | {"tie_word_embeddings": False}
        | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        128,
        (LayerAttention(Rope(1e6, YarnRope(4.0, 32768, 0.1 * np.log(4.0) + 1))),) * 28,
        {"qkv_bias": True},
        7_615_616_512,
    ),
    "Qwen3-0.6B": (
        QWEN3 | sizes(151936, 1024, 3072, 28, 16, 8, 40960) | {"tie_word_embeddings": True},
        128,
        plain(1e6, 28),
        {"qk_norm": "head", "tie_word_embeddings": True},
        596_049_920,
    ),
    "Qwen3-8B": (
        QWEN3 | sizes(151936, 4096, 12288, 36, 32, 8, 40960) | {"tie_word_embeddings": False, "max_window_layers": 36},
        128,
        plain(1e6, 36),
        {"qk_norm": "head"},
        8_190_735_360,
    ),
    "SmolLM3-3B": (
        of("smollm3", "SmolLM3ForCausalLM", hidden_act="silu", attention_bias=False, mlp_bias=False, pretraining_tp=2)
        | sizes(128256, 2048, 11008, 36, 16, 4, 65536)
        | {"rope_theta": 5000000.0, "rope_scaling": None, "layer_types": [FULL] * 36, "no_rope_layer_interval": 4}
        | {"no_rope_layers": [1, 1, 1, 0] * 9, "use_sliding_window": False, "max_window_layers": 28},
        128,
        tuple(LayerAttention(Rope(5e6) if (i + 1) % 4 else None) for i in range(36)),
        {"tie_word_embeddings": True},
        3_075_098_624,
    ),
    "gemma-2b": (
        GEMMA | sizes(256000, 2048, 16384, 18, 8, 1, 8192),
        256,
        plain(1e4, 18),
        {**GEMMA_FIELDS, "embedding_scale": 2048**0.5},
        2_506_172_416,
    ),
    "gemma-2-2b": (
        GEMMA2 | sizes(256000, 2304, 9216, 26, 8, 4, 8192) | {"head_dim": 256, "query_pre_attn_scalar": 256},
        256,
        tuple(LayerAttention(Rope(1e4), None if i % 2 else 4096) for i in range(26)),
        {**GEMMA2_FIELDS, "embedding_scale": 48.0},
        2_614_341_888,
    ),
    "gemma-2-27b": (
        GEMMA2 | sizes(256000, 4608, 36864, 46, 32, 16, 8192) | {"head_dim": 128, "query_pre_attn_scalar": 144},
        128,
        tuple(LayerAttention(Rope(1e4), None if i % 2 else 4096) for i in range(46)),
        {**GEMMA2_FIELDS, "embedding_scale": 4608**0.5, "attention_scale": 1 / 12},
        27_227_128_320,
    ),
    "gemma-3-270m": (
        GEMMA3
        | sizes(262144, 640, 2048, 18, 4, 1, 32768)
        | {"_sliding_window_pattern": 6, "use_bidirectional_attention": False}
        | {"layer_types": [SLIDING if (i + 1) % 6 else FULL for i in range(18)]},
        256,
        gemma3_layers(18, 512),
        {**GEMMA3_FIELDS, "embedding_scale": 640**0.5},
        268_098_176,
    ),
    "gemma-3-1b": (
        GEMMA3 | sizes(262144, 1152, 6912, 26, 4, 1, 32768) | {"sliding_window_pattern": 6},
        256,
        gemma3_layers(26, 512),
        {**GEMMA3_FIELDS, "embedding_scale": 1152**0.5},
        999_885_952,
    ),
    "granite-3.1-2b": (
        of("granite", "GraniteForCausalLM", **GRANITE, mlp_bias=False, residual_multiplier=0.22, logits_scaling=8.0)
        | sizes(49152, 2048, 8192, 40, 32, 8, 131072, 1e-5)
        | {"rope_theta": 5000000.0, "rope_scaling": None, "tie_word_embeddings": True},
        64,
        plain(5e6, 40),
        {**GRANITE_FIELDS, "residual_scale": 0.22, "logit_scale": 0.125},
        None,
    ),
    "granite-4.0-350m": (
        GRANITE4 | sizes(100352, 1024, 2048, 28, 16, 4, 32768, 1e-5),
        64,
        plain(1e7, 28),
        {**GRANITE_FIELDS, "residual_scale": 0.263, "logit_scale": 0.25},
        None,
    ),
    "Phi-3-mini-4k": (
        PHI3
        | sizes(32064, 3072, 8192, 32, 32, 32, 4096, 1e-5)
        | {"rope_scaling": None, "sliding_window": 2047, "original_max_position_embeddings": 4096}
        | {"tie_word_embeddings": False},
        96,
        plain(1e4, 32, 2047),
        {},
        3_821_079_552,
    ),
    "Phi-4-mini": (
        PHI3
        | sizes(200064, 3072, 8192, 32, 24, 8, 131072, 1e-5)
        | {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 4096}
        | {"partial_rotary_factor": 0.75, "sliding_window": 262144, "tie_word_embeddings": True}
        | {"interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "full_attn_mod": 1},
        128,
        (
            LayerAttention(
                Rope(
                    1e4,
                    LongRope((1.0,) * 48, tuple(map(float, range(1, 49))), 4096, (1 + 5 / 12) ** 0.5),
                    rotary_dim=96,
                ),
                262144,
            ),
        )
        * 32,
        {"tie_word_embeddings": True},
        3_836_021_760,
    ),
    "OLMo-2-0425-1B": (
        of("olmo2", "Olmo2ForCausalLM", hidden_act="silu", attention_bias=False, rope_theta=500000, rope_scaling=None)
        | sizes(100352, 2048, 8192, 16, 16, 16, 4096)
        | {"tie_word_embeddings": False},
        128,
        (LayerAttention(Rope(5e5, in_float32=True)),) * 16,
        OLMO_FIELDS,
        1_484_916_736,
    ),
    "Olmo-3-7B": (
        OLMO3 | sizes(100278, 4096, 11008, 32, 32, 32, 65536),
        128,
        olmo3_layers(32),
        OLMO_FIELDS,
        7_298_011_136,
    ),
    "Olmo-3-32B": (
        OLMO3 | sizes(100278, 5120, 27648, 64, 40, 8, 65536),
        128,
        olmo3_layers(64),
        OLMO_FIELDS,
        None,
    ),
}

SPARSE = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": LINEAR,
    "sliding_window": 1024,
}

# ------------------------------------------------------------------------------------------------------- tiny ones

TINY = sizes(97, 48, 80, 4, 6, 2, 512)
NEEDED: dict[str, dict[str, Any]] = {model_type: {} for model_type in FAMILIES}
NEEDED["granitemoehybrid"] = {
    "num_local_experts": 0,
    "shared_intermediate_size": 80,
    "layer_types": ["attention"] * 4,
    "position_embedding_type": "rope",
    "mamba_n_heads": 4,
}


def tiny(model_type: str, **keys: Any) -> dict[str, Any]:
    return TINY | {"model_type": model_type} | NEEDED[model_type] | keys


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3.0, 5.0, 7.0]}
