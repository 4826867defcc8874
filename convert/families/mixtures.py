"""Mixtures of experts whose experts are plain GLU MLPs: what their files call things.

They are pruned from file to file and never run, so a table has only what says which tensors there are, and how RoPE is
spelt. Their classes of `transformers` are those of version 4.57 and 5.24.
"""

import dataclasses
from collections.abc import Mapping

from convert.families import tensors
from convert.families.family import Family
from convert.families.mistral import MISTRAL
from convert.families.olmo2 import OLMO2
from convert.families.qwen3 import QWEN3


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A family of mixtures of experts.

    Attributes:
      family: its names, what absent keys mean, and its tensors, of which those of the MLP are the dense layers'. A key
        with the default None is the hidden size over the number of heads (`head_dim`), or the number of heads
        (`num_key_value_heads`).
      block: where router and experts stand in a layer.
      matrices: what the gate, up and down projections of an expert are called.
      width: the key of the width of an expert.
      dense_width: the key of that of a dense layer; None where every layer has experts.
    """

    family: Family
    block: str
    matrices: tuple[str, str, str]
    width: str
    dense_width: str | None = None


_LLAMA_NAMES = ("gate_proj", "up_proj", "down_proj")

# transformers 5 writes `num_local_experts` for Qwen3-MoE and 4 reads `num_experts`: either is read, both are written.
COUNTS = ("num_experts", "num_local_experts")

_ALL = (
    Mixture(
        dataclasses.replace(
            QWEN3,
            name="Qwen3-MoE",
            covers="Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
            model_type="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            heads=(),
            defaults={
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_hidden_layers": 24,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": None,
                "max_position_embeddings": 32768,
                "num_experts": 128,
                "rope_theta": 10000.0,
            },
            gguf=None,
        ),
        block="mlp",
        matrices=_LLAMA_NAMES,
        width="moe_intermediate_size",
        dense_width="intermediate_size",
    ),
    Mixture(
        dataclasses.replace(
            OLMO2,
            name="OLMoE",
            covers="OLMoE-1B-7B",
            model_type="olmoe",
            architecture="OlmoeForCausalLM",
            heads=(),
            tensors=tensors.OLMOE,
            fields={"qk_norm": "projection"},
            rope_in_float32=False,
            defaults={
                "vocab_size": 50304,
                "hidden_size": 2048,
                "intermediate_size": 2048,
                "num_hidden_layers": 16,
                "num_attention_heads": 16,
                "num_key_value_heads": None,
                "head_dim": None,
                "max_position_embeddings": 4096,
                "num_experts": 64,
                "rope_theta": 10000.0,
            },
            gguf=None,
        ),
        block="mlp",
        matrices=_LLAMA_NAMES,
        width="intermediate_size",
    ),
    Mixture(
        dataclasses.replace(
            MISTRAL,
            name="Mixtral",
            covers="Mixtral 8x7B, 8x22B",
            model_type="mixtral",
            architecture="MixtralForCausalLM",
            heads=(),
            flags={},
            defaults={
                "vocab_size": 32000,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": None,
                "max_position_embeddings": 131072,
                "num_experts": 8,
                "rope_theta": 1000000.0,
            },
        ),
        block="block_sparse_moe",
        matrices=("w1", "w3", "w2"),
        width="intermediate_size",
    ),
)

# By the `model_type` of config.json.
MIXTURES: Mapping[str, Mixture] = {mixture.family.model_type: mixture for mixture in _ALL}
