"""What a model costs by its shapes alone: FLOPs and bytes of a token."""

from gluprune_jax.models.config import ModelConfig


def matrix_weights(config: ModelConfig) -> int:
    """Weights of the matrices that every token is multiplied with, without embedding and output projection."""
    attention = 2 * config.hidden_size * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    return sum(attention + 3 * config.hidden_size * width for width in config.intermediate_sizes)


def flops_per_token(config: ModelConfig, context: int) -> int:
    """FLOPs of decoding a token: two for each weight, those of the logits too, and attention over `context` tokens."""
    weights = matrix_weights(config) + config.vocab_size * config.hidden_size
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context
    return 2 * weights + attention


def bytes_per_token(config: ModelConfig, context: int, batch: int, itemsize: int) -> float:
    """Bytes that decoding one token must read: its share of all weights, and keys and values of `context` tokens."""
    weights = matrix_weights(config) + config.vocab_size * config.hidden_size
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * context
    return itemsize * (weights / batch + cached)
