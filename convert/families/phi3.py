"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: fused projections, LongRoPE, some with a window and with partial rotation."""

import math
from typing import Any

from convert.families import llama_cpp, tensors
from convert.families.family import Family, GGUFTable
from convert.families.layers import all_if_given
from convert.families.llama import SILU
from convert.gguf.metadata import Metadata
from convert.huggingface.rope import longrope_attention_factor
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.models.config import LongRope, ModelConfig


def _of_gguf(own: Metadata) -> dict[str, Any]:
    """Files say nothing of LongRoPE but its divisors and what multiplies cosines and sines."""
    head_dim, context = own.head_dim, own.integer("context_length")
    original = own.integer("rope.scaling.original_context_length", context)
    rotary_dim = own.integer("rope.dimension_count", head_dim)
    if rotary_dim > head_dim:
        raise OperationError(f"{own.named('rope.dimension_count')} is {rotary_dim}; a head has {head_dim} dimensions")
    partial = rotary_dim / head_dim
    config: dict[str, Any] = {
        "sliding_window": own.integer("attention.sliding_window", 0, least=0) or None,
        "original_max_position_embeddings": original,
        "partial_rotary_factor": partial if int(head_dim * partial) == rotary_dim else math.nextafter(partial, 1),
    }
    lists = {name: own.vectors.get(f"rope_factors_{name}.weight") for name in ("short", "long")}
    if None in lists.values():
        if own.positive("rope.scaling.attn_factor", 1.0) != 1 or any(lists.values()):
            raise RequestError(
                f"{own.named('rope.scaling.attn_factor')} or one of rope_factors_short.weight and "
                f"rope_factors_long.weight is there without the others; accepted: all of them (LongRoPE), or none"
            )
        return config
    implied = longrope_attention_factor(context / original, original)
    return config | {
        "rope_scaling": {
            "type": "longrope",
            **{f"{name}_factor": list(values or ()) for name, values in lists.items()},
            **llama_cpp.attention_factor(own, "rope.scaling.attn_factor", 1.0, implied),
        }
    }


def _to_gguf(config: ModelConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {"attention.sliding_window": config.attention[0].window or 0}
    rope = config.attention[0].rope
    if rope is not None:
        keys["rope.dimension_count"] = rope.rotary_dim or config.head_dim
    if rope is not None and isinstance(rope.scaling, LongRope):
        keys["rope.scaling.original_context_length"] = rope.scaling.original_max_position_embeddings
        keys["rope.scaling.attn_factor"] = rope.scaling.attention_factor
    return keys


def _divisors(config: ModelConfig) -> dict[str, tuple[float, ...]]:
    rope = config.attention[0].rope
    if rope is None or not isinstance(rope.scaling, LongRope):
        return {}
    return {
        "rope_factors_long.weight": rope.scaling.long_factor,
        "rope_factors_short.weight": rope.scaling.short_factor,
    }


PHI3 = Family(
    name="Phi-3",
    covers="Phi-3, Phi-3.5, Phi-4",
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    heads=("Phi3ForSequenceClassification", "Phi3ForTokenClassification"),
    defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 1.0,
        "sliding_window": None,
    },
    # The last two are parameters of a method that takes what a file says.
    only={**SILU, "default_theta": (10000,), "ignore_keys": (None,)},
    written={"hidden_act": "silu"},
    tensors=tensors.PHI3,
    inert=frozenset({"embd_pdrop", "resid_pdrop"}),
    layer_kinds=all_if_given,
    # The first files said "su"; transformers takes "yarn" here for LongRoPE as well.
    rope_types={"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
    gguf=GGUFTable(
        architecture="phi3",
        config=_of_gguf,
        metadata=_to_gguf,
        keys=frozenset({"attention.sliding_window", "rope.dimension_count", "rope.scaling.attn_factor"}),
        only={"rope.scaling.type": ("longrope", "none"), "rope.scaling.factor": (0.0, 1.0)},
        spaces_stay_behind=frozenset({"<s>", "<unk>", "<|endoftext|>"}),
        vectors=frozenset({"rope_factors_long.weight", "rope_factors_short.weight"}),
        divisors=_divisors,
        applies_windows=False,
    ),
)
