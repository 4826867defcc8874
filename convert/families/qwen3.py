"""Qwen3, its dense models: norms of each head's queries and keys, heads of 128 whatever the hidden size."""

from convert.families import llama_cpp, tensors
from convert.families.family import ATTENTION_BIAS, FULL, SLIDING, Family, GGUFTable
from convert.families.layers import upper_layers
from convert.families.llama import SILU, WHOLE_HEAD
from convert.families.qwen2 import WINDOWS

QWEN3 = Family(
    name="Qwen3",
    covers="Qwen3 up to 32B",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    heads=("Qwen3ForSequenceClassification", "Qwen3ForTokenClassification", "Qwen3ForQuestionAnswering"),
    defaults={
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        **WINDOWS,
    },
    only={**SILU, **WHOLE_HEAD},
    written={"hidden_act": "silu"},
    tensors=tensors.LLAMA,
    fields={"qk_norm": "head"},
    flags=ATTENTION_BIAS,
    layer_types={FULL: FULL, SLIDING: SLIDING},
    layer_kinds=upper_layers,
    gguf=GGUFTable("qwen3", llama_cpp.scaled, llama_cpp.write_scaled),
)
