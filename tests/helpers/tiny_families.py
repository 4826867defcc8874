"""A tiny model of every family, as `config.json` in the spelling of transformers 4.

Whatever a family has that others do not is there, with a value that matters.
"""

from typing import Any

_SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
_LONG = {
    "type": "longrope",
    "short_factor": [1 + 0.1 * i for i in range(6)],
    "long_factor": [1 + 0.7 * i for i in range(6)],
}
_GRANITE = {
    "attention_multiplier": 0.5,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}


def _config(architecture: str, model_type: str, **keys: Any) -> dict[str, Any]:
    return {**_SIZES, "architectures": [f"{architecture}ForCausalLM"], "model_type": model_type, **keys}


_PHI3 = {"partial_rotary_factor": 0.75, "rope_scaling": _LONG, "max_position_embeddings": 256}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _config("Llama", "llama"),
    "llama with biases": _config("Llama", "llama", attention_bias=True),
    "mistral with a window": _config("Mistral", "mistral", sliding_window=8),
    "qwen2": _config("Qwen2", "qwen2", use_sliding_window=False, sliding_window=8, max_window_layers=2),
    "qwen2 with yarn": _config("Qwen2", "qwen2", rope_scaling=_YARN),
    "qwen2 with a window from layer 2": _config(
        "Qwen2", "qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=2
    ),
    "qwen3": _config("Qwen3", "qwen3", head_dim=32, tie_word_embeddings=True),
    "smollm3": _config("SmolLM3", "smollm3", no_rope_layers=[1, 0, 1, 1]),
    "gemma3": _config(
        "Gemma3",
        "gemma3_text",
        head_dim=32,
        sliding_window=8,
        sliding_window_pattern=2,
        query_pre_attn_scalar=24,
        rope_theta=5000.0,
        rope_local_base_freq=50.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        final_logit_softcapping=2.5,
        tie_word_embeddings=True,
    ),
    "gemma2": _config(
        "Gemma2",
        "gemma2",
        head_dim=32,
        sliding_window=8,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.5,
        tie_word_embeddings=True,
    ),
    "gemma": _config("Gemma", "gemma", head_dim=32, tie_word_embeddings=True),
    "granite": _config("Granite", "granite", **_GRANITE),
    "granite 4": _config(
        "GraniteMoeHybrid",
        "granitemoehybrid",
        num_local_experts=0,
        num_experts_per_tok=0,
        intermediate_size=96,
        shared_intermediate_size=96,
        layer_types=["attention"] * 4,
        position_embedding_type="rope",
        **_GRANITE,
    ),
    "granite 4 without rope": _config(
        "GraniteMoeHybrid",
        "granitemoehybrid",
        num_local_experts=0,
        num_experts_per_tok=0,
        intermediate_size=96,
        shared_intermediate_size=96,
        layer_types=["attention"] * 4,
        position_embedding_type="nope",
        **_GRANITE,
    ),
    "phi3 with a window": _config("Phi3", "phi3", sliding_window=9),
    "phi3, short rows": _config("Phi3", "phi3", original_max_position_embeddings=64, **_PHI3),
    "phi3, long rows": _config("Phi3", "phi3", original_max_position_embeddings=16, **_PHI3),
    "olmo2": _config("Olmo2", "olmo2"),
    "olmo3": _config(
        "Olmo3",
        "olmo3",
        sliding_window=8,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    ),
}
# One of each family, for what does not depend on how it attends.
ONE_EACH = (
    "llama",
    "mistral with a window",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma3",
    "gemma2",
    "gemma",
    "granite",
    "granite 4",
    "phi3, long rows",
    "olmo2",
    "olmo3",
)
