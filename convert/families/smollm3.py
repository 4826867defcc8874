"""SmolLM3: every fourth layer has no position embedding."""

from typing import Any

from convert.families import llama_cpp, tensors
from convert.families.family import ATTENTION_BIAS, FULL, SLIDING, Family, GGUFTable
from convert.families.layers import NO_ROPE_LAYERS, layers_without_rope
from convert.families.llama import NO_MLP_BIAS, SILU, WHOLE_HEAD
from convert.gguf.metadata import Metadata


def _of_gguf(own: Metadata) -> dict[str, Any]:
    # llama.cpp leaves out every fourth RoPE, whatever the model's own list of layers said.
    return llama_cpp.scaled(own) | {"no_rope_layers": None, "no_rope_layer_interval": 4}


SMOLLM3 = Family(
    name="SmolLM3",
    covers="SmolLM3",
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    heads=("SmolLM3ForSequenceClassification", "SmolLM3ForTokenClassification", "SmolLM3ForQuestionAnswering"),
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "layer_types": None,
        "no_rope_layer_interval": 4,
        "no_rope_layers": None,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    only={**SILU, **NO_MLP_BIAS, **WHOLE_HEAD, "tie_word_embeddings": (False, True)},
    written={"hidden_act": "silu"},
    tensors=tensors.LLAMA,
    flags=ATTENTION_BIAS,
    inert=frozenset({"max_window_layers"}),
    layer_types={FULL: FULL, SLIDING: SLIDING},
    layer_kinds=layers_without_rope,
    rotation=NO_ROPE_LAYERS,
    # The rows of layers without RoPE are permuted too.
    gguf=GGUFTable("smollm3", _of_gguf, llama_cpp.write_scaled, permuted=llama_cpp.PERMUTED),
)
