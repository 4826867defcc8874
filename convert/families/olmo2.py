"""OLMo 2: norms behind attention and MLP instead of before, and of whole projections to queries and keys."""

from typing import Any

from convert.families import llama_cpp, tensors
from convert.families.family import ATTENTION_BIAS, Family, GGUFTable
from convert.families.llama import NO_WINDOW, SILU, WHOLE_HEAD
from convert.gguf.metadata import Metadata
from gluprune_jax.errors import RequestError
from gluprune_jax.models.config import ModelConfig

FIELDS = {"norm": "float32", "pre_norm": False, "post_norm": True, "qk_norm": "projection"}


def _of_gguf(own: Metadata) -> dict[str, Any]:
    """llama.cpp has one name for OLMo 2 and 3; the second has a window, and scales the RoPE of the other layers."""
    theta = own.positive("rope.freq_base", 10000.0)
    if own.positive("rope.freq_base_swa", theta) != theta:
        raise RequestError(
            f"{own.named('rope.freq_base_swa')} is {own.get('rope.freq_base_swa')}; accepted: the base of all layers, "
            f"{theta}"
        )
    window = own.integer("attention.sliding_window", 0, least=0)
    if not window:
        return llama_cpp.scaled(own)
    kinds = llama_cpp.layer_types(own.slides(period=4))
    return {**llama_cpp.scaled(own), **kinds, "model_type": "olmo3", "sliding_window": window}


def _to_gguf(config: ModelConfig) -> dict[str, Any]:
    return {**llama_cpp.write_scaled(config), **llama_cpp.write_windows(config, period=4)}


OLMO2 = Family(
    name="OLMo 2",
    covers="OLMo 2",
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    heads=("Olmo2ForSequenceClassification",),
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    only={**SILU, **NO_WINDOW, **WHOLE_HEAD},
    written={"hidden_act": "silu"},
    tensors=tensors.POST_NORM,
    fields=FIELDS,
    flags=ATTENTION_BIAS,
    rope_in_float32=True,
    gguf=GGUFTable(
        architecture="olmo2",
        config=_of_gguf,
        metadata=_to_gguf,
        keys=frozenset({"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"}),
        output="required",
    ),
)
