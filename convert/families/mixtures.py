"""Mixtures of experts whose experts are plain GLU MLPs: what their files call things.

They are pruned from file to file and never run, so a table has only what says which tensors there are, how RoPE is
spelt, and which of them llama.cpp computes as `transformers` does. Their classes of `transformers` are those of version
4.57 and 5.24; what llama.cpp does is that of November 2026.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from convert.families import llama_cpp, tensors
from convert.families.family import Family, GGUFTable
from convert.families.mistral import MISTRAL
from convert.families.olmo2 import OLMO2
from convert.families.qwen3 import QWEN3
from convert.gguf.metadata import Metadata
from gluprune_jax.models.config import ModelConfig


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
      gguf: its GGUF table. llama.cpp has experts in every layer of it.
      gguf_width: the key of the width of an expert in GGUF files.
      computed: keys of `config.json` that the tables of its family do not have, with the values that llama.cpp computes
        with, which no GGUF file says.
      is_grouped: whether llama.cpp takes fewer key and value heads than query heads.
      dense_width: the key of that of a dense layer; None where every layer has experts.
    """

    family: Family
    block: str
    matrices: tuple[str, str, str]
    width: str
    gguf: GGUFTable
    gguf_width: str
    computed: Mapping[str, tuple[Any, ...]]
    is_grouped: bool = True
    dense_width: str | None = None


def _table(
    architecture: str,
    *,
    norm: bool,
    config: Callable[[Metadata], dict[str, Any]] = llama_cpp.scaled,
    metadata: Callable[[ModelConfig], dict[str, Any]] = llama_cpp.write_scaled,
    **others: Any,
) -> GGUFTable:
    """A table of an architecture whose router is a softmax; `norm` says whether the chosen shares are made to sum to 1.

    llama.cpp knows that by the architecture, whatever the keys of a file say.
    """
    return GGUFTable(
        architecture=architecture,
        config=config,
        metadata=metadata,
        keys=frozenset({"expert_count", "expert_used_count"}) | others.pop("keys", frozenset()),
        only={
            "expert_weights_norm": (norm,),
            "expert_weights_scale": (0.0, 1.0),
            "expert_gating_func": (1,),  # softmax
            "expert_shared_count": (0,),
            "expert_shared_feed_forward_length": (0,),
        },
        **others,
    )


def _mixtral_of_gguf(own: Metadata) -> dict[str, Any]:
    window = own.integer("attention.sliding_window", 0, least=0)
    return llama_cpp.scaled(own) | ({"sliding_window": window} if window else {})


def _mixtral_to_gguf(config: ModelConfig) -> dict[str, Any]:
    window = config.attention[0].window
    return llama_cpp.write_scaled(config) | ({} if window is None else {"attention.sliding_window": window})


_NO_BIASES = {"attention_bias": (False, None)}
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
                "num_experts_per_tok": 8,
                "norm_topk_prob": False,
                "use_sliding_window": False,
                "rms_norm_eps": 1e-6,
                "rope_theta": 10000.0,
            },
            gguf=None,
        ),
        block="mlp",
        matrices=_LLAMA_NAMES,
        width="moe_intermediate_size",
        gguf=_table("qwen3moe", norm=True, keys=frozenset({"expert_feed_forward_length"})),
        gguf_width="expert_feed_forward_length",
        computed={**_NO_BIASES, "norm_topk_prob": (True,), "use_sliding_window": (False, None)},
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
                "num_experts_per_tok": 8,
                "norm_topk_prob": False,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
            },
            gguf=None,
        ),
        block="mlp",
        matrices=_LLAMA_NAMES,
        width="intermediate_size",
        gguf=_table("olmoe", norm=False, output="required"),
        gguf_width="feed_forward_length",
        computed={**_NO_BIASES, "norm_topk_prob": (False, None), "clip_qkv": (None,)},
        is_grouped=False,
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
                "num_experts_per_tok": 2,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1000000.0,
            },
            gguf=None,
        ),
        block="block_sparse_moe",
        matrices=("w1", "w3", "w2"),
        width="intermediate_size",
        gguf=_table(
            "llama",
            norm=True,
            config=_mixtral_of_gguf,
            metadata=_mixtral_to_gguf,
            keys=frozenset({"attention.sliding_window"}),
            permuted=llama_cpp.PERMUTED,
            applies_windows=False,
        ),
        gguf_width="feed_forward_length",
        computed={},
    ),
)

# By the `model_type` of config.json.
MIXTURES: Mapping[str, Mixture] = {mixture.family.model_type: mixture for mixture in _ALL}

# By the `general.architecture` of GGUF files; `llama` is one of dense models too.
GGUF_MIXTURES: Mapping[str, Mixture] = {mixture.gguf.architecture: mixture for mixture in _ALL}
