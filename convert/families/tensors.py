"""Rows of tensors that families share, and those of families that fuse some; see `family.TensorRow`.

Rows with the same name in a file lie one under the other in one tensor of it, in the order of the table.
"""

import dataclasses
from collections.abc import Mapping

from convert.families.family import TensorRow

_HF, _GGUF = "model.layers.{i}", "blk.{i}"


def _layer(ours: str, hf: str, gguf: str, shape: str, needs: tuple[str, tuple[object, ...]] | None = None) -> TensorRow:
    return TensorRow(f"layers.{{i}}.{ours}", f"{_HF}.{hf}", f"{_GGUF}.{gguf}", shape, needs)


_PRE = ("pre_norm", (True,))
_POST = ("post_norm", (True,))
_BIASES = ("qkv_bias", (True,))

# Of a model whose norms are all in front. A row is there where the config has what it needs.
LLAMA = (
    TensorRow("embed_tokens", "model.embed_tokens.weight", "token_embd.weight", "V D"),
    _layer("input_layernorm.weight", "input_layernorm.weight", "attn_norm.weight", "D", _PRE),
    _layer("self_attn.q_proj", "self_attn.q_proj.weight", "attn_q.weight", "NH D"),
    _layer("self_attn.k_proj", "self_attn.k_proj.weight", "attn_k.weight", "KH D"),
    _layer("self_attn.v_proj", "self_attn.v_proj.weight", "attn_v.weight", "KH D"),
    _layer("self_attn.q_bias", "self_attn.q_proj.bias", "attn_q.bias", "NH", _BIASES),
    _layer("self_attn.k_bias", "self_attn.k_proj.bias", "attn_k.bias", "KH", _BIASES),
    _layer("self_attn.v_bias", "self_attn.v_proj.bias", "attn_v.bias", "KH", _BIASES),
    _layer("self_attn.q_norm.weight", "self_attn.q_norm.weight", "attn_q_norm.weight", "H", ("qk_norm", ("head",))),
    _layer("self_attn.k_norm.weight", "self_attn.k_norm.weight", "attn_k_norm.weight", "H", ("qk_norm", ("head",))),
    _layer("self_attn.o_proj", "self_attn.o_proj.weight", "attn_output.weight", "D NH"),
    _layer("self_attn.o_bias", "self_attn.o_proj.bias", "attn_output.bias", "D", ("output_bias", (True,))),
    _layer("post_attention_layernorm.weight", "post_attention_layernorm.weight", "ffn_norm.weight", "D", _PRE),
    _layer("mlp.gate_proj", "mlp.gate_proj.weight", "ffn_gate.weight", "F D"),
    _layer("mlp.up_proj", "mlp.up_proj.weight", "ffn_up.weight", "F D"),
    _layer("mlp.down_proj", "mlp.down_proj.weight", "ffn_down.weight", "D F"),
    TensorRow("norm.weight", "model.norm.weight", "output_norm.weight", "D"),
    TensorRow("lm_head", "lm_head.weight", "output.weight", "V D", ("tie_word_embeddings", (False,))),
)

_BEHIND_ATTENTION = _layer(
    "attention_output_norm.weight", "post_attention_layernorm.weight", "post_attention_norm.weight", "D", _POST
)
_BEFORE_MLP = _layer(
    "post_attention_layernorm.weight", "pre_feedforward_layernorm.weight", "ffn_norm.weight", "D", _PRE
)
_BEHIND_MLP = _layer("mlp_output_norm.weight", "post_feedforward_layernorm.weight", "post_ffw_norm.weight", "D", _POST)


def _changed(rows: tuple[TensorRow, ...], changes: Mapping[str, tuple[TensorRow, ...]]) -> tuple[TensorRow, ...]:
    """Rows of which some, by the end of the name of our parameter, are replaced by others."""
    replaced = (changes.get(row.ours.removeprefix("layers.{i}."), (row,)) for row in rows)
    return tuple(row for others in replaced for row in others)


# Norms in front and behind: Gemma 2 and 3. What is called `post_attention_layernorm` is another one than Llama's.
SANDWICH = _changed(
    LLAMA,
    {
        "post_attention_layernorm.weight": (_BEHIND_ATTENTION, _BEFORE_MLP),
        "mlp.down_proj": (_layer("mlp.down_proj", "mlp.down_proj.weight", "ffn_down.weight", "D F"), _BEHIND_MLP),
    },
)

_PROJECTION_NORMS = {
    f"self_attn.{x}_norm.weight": (
        _layer(
            f"self_attn.{x}_norm.weight",
            f"self_attn.{x}_norm.weight",
            f"attn_{x}_norm.weight",
            size,
            ("qk_norm", ("projection",)),
        ),
    )
    for x, size in (("q", "NH"), ("k", "KH"))
}

# Norms behind alone, and of whole projections: OLMo-2 and 3. Norms in front, and of whole projections: OLMoE.
POST_NORM = _changed(SANDWICH, _PROJECTION_NORMS)
OLMOE = _changed(LLAMA, _PROJECTION_NORMS)


def _renamed(rows: tuple[TensorRow, ...], names: Mapping[str, tuple[str, str]]) -> tuple[TensorRow, ...]:
    """Rows of which some, by the end of the name of our parameter, have other names in files (Hugging Face, GGUF)."""

    def renamed(row: TensorRow) -> TensorRow:
        found = names.get(row.ours.removeprefix("layers.{i}."))
        return row if found is None else dataclasses.replace(row, hf=f"{_HF}.{found[0]}", gguf=f"{_GGUF}.{found[1]}")

    return tuple(map(renamed, rows))


# One tensor for queries, keys and values, and one for gate and up: Phi-3 and 4, in GGUF files too.
PHI3 = _renamed(
    LLAMA,
    {
        **{f"self_attn.{x}_proj": ("self_attn.qkv_proj.weight", "attn_qkv.weight") for x in "qkv"},
        **{f"mlp.{name}_proj": ("mlp.gate_up_proj.weight", "ffn_up.weight") for name in ("gate", "up")},
    },
)

# One tensor for gate and up, in Hugging Face files: dense Granite 4.
GRANITE_HYBRID = _renamed(
    LLAMA,
    {
        **{f"mlp.{x}_proj": ("shared_mlp.input_linear.weight", f"ffn_{x}.weight") for x in ("gate", "up")},
        "mlp.down_proj": ("shared_mlp.output_linear.weight", "ffn_down.weight"),
    },
)
