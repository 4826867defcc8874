"""Gemma 2: norms before and behind attention and MLP, every other layer with a window, soft caps."""

from typing import Any

from convert.families import llama_cpp, tensors
from convert.families.family import ATTENTION_BIAS, FULL, SLIDING, Family, GGUFTable, Number
from convert.families.gemma import CAUSAL_AND_TIED, EMBEDDING, FIELDS
from convert.families.layers import periodic
from convert.families.llama import WHOLE_HEAD
from convert.gguf.metadata import Metadata
from gluprune_jax.models.config import ModelConfig

GELU = {"hidden_activation": ("gelu_pytorch_tanh",)}
SCALE = {"attention_scale": Number("query_pre_attn_scalar", power=-0.5, whole=True)}
FINAL_CAP = {"logit_soft_cap": Number("final_logit_softcapping", optional=True)}


def _of_gguf(own: Metadata) -> dict[str, Any]:
    return {
        **llama_cpp.scaled(own),
        **llama_cpp.layer_types(own.slides(period=2)),
        **llama_cpp.gemma_scale(own, largest=46),
        "sliding_window": own.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": own.positive("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": own.positive("final_logit_softcapping", 30.0),
    }


def _to_gguf(config: ModelConfig) -> dict[str, Any]:
    return {
        **llama_cpp.write_scaled(config),
        **llama_cpp.write_windows(config, period=2),
        **llama_cpp.present({"attn_logit_softcapping": config.attention_soft_cap}),
        **llama_cpp.present({"final_logit_softcapping": config.logit_soft_cap}),
    }


GEMMA2 = Family(
    name="Gemma 2",
    covers="Gemma 2",
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    heads=("Gemma2ForSequenceClassification", "Gemma2ForTokenClassification"),
    defaults={
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attn_logit_softcapping": 50.0,  # null, not absence, switches these off
        "final_logit_softcapping": 30.0,
        "layer_types": None,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    only={**GELU, **CAUSAL_AND_TIED, **WHOLE_HEAD},
    written={"hidden_activation": "gelu_pytorch_tanh"},
    needs_bos=True,
    tensors=tensors.SANDWICH,
    fields={**FIELDS, "post_norm": True},
    flags=ATTENTION_BIAS,
    numbers={
        **EMBEDDING,
        **SCALE,
        **FINAL_CAP,
        "attention_soft_cap": Number("attn_logit_softcapping", optional=True),
    },
    layer_types={FULL: FULL, SLIDING: SLIDING},
    layer_kinds=periodic(2),
    gguf=GGUFTable(
        architecture="gemma2",
        config=_of_gguf,
        metadata=_to_gguf,
        keys=frozenset(
            {
                "attention.sliding_window",
                "attention.sliding_window_pattern",
                "attn_logit_softcapping",
                "final_logit_softcapping",
            }
        ),
        norm_offset=1,
        output="never",
    ),
)
