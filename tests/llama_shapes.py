"""The architectures of the Llama 3 models, as their model cards and configs state them."""

from gluprune_jax.model import Llama3Rope, ModelConfig


def _llama(
    hidden_size: int, width: int, layers: int, heads: int, head_dim: int, *, tied: bool, factor: float
) -> ModelConfig:
    return ModelConfig(
        vocab_size=128256,
        hidden_size=hidden_size,
        intermediate_sizes=(width,) * layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=Llama3Rope(factor, 1.0, 4.0, 8192),
        tie_word_embeddings=tied,
    )


LLAMA = {
    "Llama-3.2-1B": _llama(2048, 8192, 16, 32, 64, tied=True, factor=32.0),
    "Llama-3.2-3B": _llama(3072, 8192, 28, 24, 128, tied=True, factor=32.0),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32, 128, tied=False, factor=8.0),
    "Llama-3.1-70B": _llama(8192, 28672, 80, 64, 128, tied=False, factor=8.0),
}
