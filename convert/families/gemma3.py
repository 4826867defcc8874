"""Gemma 3, and the text half of its multimodal models: five of six layers with a window and a RoPE of their own."""

from typing import Any

from convert.families import llama_cpp, tensors
from convert.families.family import ATTENTION_BIAS, FULL, SLIDING, Family, GGUFTable, Wrapper
from convert.families.gemma import CAUSAL_AND_TIED, EMBEDDING, FIELDS
from convert.families.gemma2 import FINAL_CAP, GELU, SCALE
from convert.families.layers import periodic
from convert.families.llama import WHOLE_HEAD
from convert.gguf.metadata import Metadata
from gluprune_jax.models.config import ModelConfig


def _of_gguf(own: Metadata) -> dict[str, Any]:
    # Most files say neither which layers have the window nor the base of their RoPE. No scaling is theirs.
    window = own.integer("attention.sliding_window", 0, least=0)
    cap = own.get("final_logit_softcapping", 0.0)
    return {
        **llama_cpp.scaled(own),
        **llama_cpp.layer_types(own.slides(period=6) if window else [False] * own.layers),
        **llama_cpp.gemma_scale(own, largest=62),
        "sliding_window": window or 4096,
        "rope_local_base_freq": own.positive("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": None if cap == 0.0 else own.positive("final_logit_softcapping"),
    }


def _to_gguf(config: ModelConfig) -> dict[str, Any]:
    sliding = [layer.rope for layer in config.attention if layer.window is not None and layer.rope is not None]
    return {
        **llama_cpp.write_scaled(config),
        **llama_cpp.write_windows(config, period=6),
        **({"rope.freq_base_swa": sliding[0].theta} if sliding else {}),
        **llama_cpp.present({"final_logit_softcapping": config.logit_soft_cap}),
    }


GEMMA3 = Family(
    name="Gemma 3",
    covers="Gemma 3",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    heads=("Gemma3TextForSequenceClassification", "Gemma3ForSequenceClassification"),
    # All sizes as well: the text halves of multimodal models say only what differs from them.
    defaults={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "final_logit_softcapping": None,
        "layer_types": None,
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    only={**GELU, **CAUSAL_AND_TIED, **WHOLE_HEAD},
    written={"hidden_activation": "gelu_pytorch_tanh"},
    needs_bos=True,
    tensors=tensors.SANDWICH,
    fields={**FIELDS, "post_norm": True, "qk_norm": "head"},
    flags=ATTENTION_BIAS,
    numbers={**EMBEDDING, **SCALE, **FINAL_CAP},
    # transformers stores the soft cap of the scores and never applies it. The last three are for the multimodal model.
    inert=frozenset(
        """
        attn_logit_softcapping _sliding_window_pattern image_token_id mm_tokens_per_image vision_config
        """.split()
    ),
    layer_types={FULL: FULL, SLIDING: SLIDING},
    layer_kinds=periodic("sliding_window_pattern"),
    thetas={FULL: "rope_theta", SLIDING: "rope_local_base_freq"},
    wrapper=Wrapper(
        model_type="gemma3",
        architecture="Gemma3ForConditionalGeneration",
        text="text_config",
        dropped=frozenset(
            """
            vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index boi_token_id
            eoi_token_id image_token_id
            """.split()
        ),
        beside=("vision_tower.", "multi_modal_projector."),
    ),
    gguf=GGUFTable(
        architecture="gemma3",
        config=_of_gguf,
        metadata=_to_gguf,
        keys=frozenset(
            {
                "attention.sliding_window",
                "attention.sliding_window_pattern",
                "final_logit_softcapping",
                "rope.freq_base_swa",
            }
        ),
        norm_offset=1,
    ),
)
