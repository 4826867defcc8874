"""The architecture of a tiny model."""

from typing import Any

from gluprune_jax.models.config import LayerAttention, ModelConfig, Rope


def tiny_config(rope: Rope | None = Rope(10000.0), **changes: Any) -> ModelConfig:  # noqa: B008  # it is frozen
    """Two layers of different widths, and as few of everything as shows a mistake; `changes` are fields."""
    fields: dict[str, Any] = {
        "vocab_size": 11,
        "hidden_size": 16,
        "intermediate_sizes": (24, 20),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        **changes,
    }
    return ModelConfig(**{"attention": (LayerAttention(rope),) * len(fields["intermediate_sizes"]), **fields})


def one_rope(config: ModelConfig) -> Rope:
    """The RoPE of all layers."""
    (attention,) = set(config.attention)
    assert attention.rope is not None
    assert attention.window is None
    return attention.rope
