"""Model types that somebody will try and that are not supported, each with what it would need."""

_EXPERTS = "mixtures of experts are not supported yet"
_RECURRENT = "layers of linear attention, of Mamba or of convolutions are not supported"

REFUSED = {
    "bamba": _RECURRENT,
    "deepseek_v2": "multi-head latent attention is not supported, nor are mixtures of experts",
    "deepseek_v3": "multi-head latent attention is not supported, nor are mixtures of experts",
    "gemma3n": "embeddings of each layer and keys that layers share are not supported",
    "gemma3n_text": "embeddings of each layer and keys that layers share are not supported",
    "gemma4": "heads of two sizes and keys that layers share are not supported",
    "gemma4_text": "heads of two sizes and keys that layers share are not supported",
    "gpt_oss": "attention sinks are not supported, nor are mixtures of experts",
    "granitemoe": _EXPERTS,
    "granitemoeshared": _EXPERTS,
    "lfm2": _RECURRENT,
    "llama4": _EXPERTS,
    "llama4_text": _EXPERTS,
    "ministral3": "attention whose temperature depends on the position is not supported",
    "phi4mm": "multimodal models are supported for Gemma 3 alone",
    "phimoe": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_5": _RECURRENT,
    "qwen3_5_moe": _EXPERTS,
    "qwen3_5_text": _RECURRENT,
    "qwen3_next": _RECURRENT,
}
