"""Mistral: Llama with other defaults and, in version 0.1, a window. In GGUF files it is called `llama`."""

import dataclasses

from convert.families.layers import all_if_given
from convert.families.llama import LLAMA, SILU, WHOLE_HEAD

MISTRAL = dataclasses.replace(
    LLAMA,
    name="Mistral",
    covers="Mistral 7B",
    model_type="mistral",
    architecture="MistralForCausalLM",
    heads=("MistralForSequenceClassification", "MistralForTokenClassification", "MistralForQuestionAnswering"),
    # An absent window is one of 4096 tokens: only null switches it off. Without `layer_types`, which the class ignores.
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    only={**SILU, **WHOLE_HEAD},
    flags={},  # the class has no biases, whatever a config says
    layer_kinds=all_if_given,
)
