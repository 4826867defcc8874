"""Qwen2 and Qwen2.5, also as Coder and as distillations of DeepSeek R1."""

from convert.families import llama_cpp, tensors
from convert.families.family import FULL, SLIDING, Family, GGUFTable
from convert.families.layers import upper_layers
from convert.families.llama import SILU, WHOLE_HEAD

# Windows: switched off in all released models.
WINDOWS = {"layer_types": None, "max_window_layers": 28, "sliding_window": 4096, "use_sliding_window": False}

QWEN2 = Family(
    name="Qwen2",
    covers="Qwen2, Qwen2.5",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    heads=("Qwen2ForSequenceClassification", "Qwen2ForTokenClassification", "Qwen2ForQuestionAnswering"),
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        **WINDOWS,
    },
    only={**SILU, **WHOLE_HEAD},
    written={"hidden_act": "silu"},
    tensors=tensors.LLAMA,
    fields={"qkv_bias": True},  # always, and no key says so
    layer_types={FULL: FULL, SLIDING: SLIDING},
    layer_kinds=upper_layers,
    # Without windows: no converter writes any.
    gguf=GGUFTable("qwen2", llama_cpp.scaled, llama_cpp.write_scaled),
)
