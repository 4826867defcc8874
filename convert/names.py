"""The one table of tensor names: our parameters, Hugging Face, GGUF.

It drives loading and saving alike. Shapes are spelled in products of the model's dimensions, in the order of the
Hugging Face files: V vocabulary, D hidden size, F intermediate size, NH query heads x head dim, KH key/value
heads x head dim. Our arrays hold the same elements in the same order (NH and KH are two axes in ours).
"""

import dataclasses

from gluprune_jax.model import ModelConfig

# our parameter, Hugging Face tensor, GGUF tensor, shape
_TABLE = (
    ("embed_tokens", "model.embed_tokens.weight", "token_embd.weight", "V D"),
    ("layers.{i}.input_layernorm.weight", "model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight", "D"),
    ("layers.{i}.self_attn.q_proj", "model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight", "NH D"),
    ("layers.{i}.self_attn.k_proj", "model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight", "KH D"),
    ("layers.{i}.self_attn.v_proj", "model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight", "KH D"),
    ("layers.{i}.self_attn.o_proj", "model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight", "D NH"),
    (
        "layers.{i}.post_attention_layernorm.weight",
        "model.layers.{i}.post_attention_layernorm.weight",
        "blk.{i}.ffn_norm.weight",
        "D",
    ),
    ("layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight", "F D"),
    ("layers.{i}.mlp.up_proj", "model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight", "F D"),
    ("layers.{i}.mlp.down_proj", "model.layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight", "D F"),
    ("norm.weight", "model.norm.weight", "output_norm.weight", "D"),
    ("lm_head", "lm_head.weight", "output.weight", "V D"),
)


@dataclasses.dataclass(frozen=True)
class TensorName:
    """One tensor of a model.

    Attributes:
      path: where it stands in the model's state, such as `("layers", 3, "mlp", "gate_proj")`.
      hf: its name in Hugging Face files.
      gguf: its name in GGUF files.
      shape: its logical shape in Hugging Face files.
      neuron_axis: the axis of `shape` that counts MLP neurons, or None.
    """

    path: tuple[str | int, ...]
    hf: str
    gguf: str
    shape: tuple[int, ...]
    neuron_axis: int | None


def tensor_names(config: ModelConfig) -> list[TensorName]:
    """All tensors of a model, in the order of the forward pass. A tied output projection is not one of them."""
    names = []

    def add(row: tuple[str, str, str, str], i: int | None) -> None:
        ours, hf, gguf, letters = row
        sizes = {
            "V": config.vocab_size,
            "D": config.hidden_size,
            "NH": config.num_attention_heads * config.head_dim,
            "KH": config.num_key_value_heads * config.head_dim,
            "F": 0 if i is None else config.intermediate_sizes[i],
        }
        axes = letters.split()
        names.append(
            TensorName(
                path=tuple(int(part) if part.isdigit() else part for part in ours.format(i=i).split(".")),
                hf=hf.format(i=i),
                gguf=gguf.format(i=i),
                shape=tuple(sizes[axis] for axis in axes),
                neuron_axis=axes.index("F") if "F" in axes else None,
            )
        )

    per_layer = [row for row in _TABLE if "{i}" in row[0]]
    for row in _TABLE:
        if row is per_layer[0]:
            for i in range(config.num_hidden_layers):
                for layer_row in per_layer:
                    add(layer_row, i)
        elif row not in per_layer and not (row[0] == "lm_head" and config.tie_word_embeddings):
            add(row, None)
    return names
