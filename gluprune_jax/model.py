"""A Llama-family decoder in Flax NNX: config, layers, model, cache.

Weights keep the orientation of the Hugging Face checkpoints ([out, in]), so loading and saving move no bit.

Array letters: B batch, T tokens, D hidden size, F intermediate size, N query heads, K key/value heads,
G = N / K, H head dim, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from numpy.typing import NDArray

from gluprune_jax.attention import causal_attention
from gluprune_jax.errors import RequestError

# --------------------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """The frequency scaling of Llama 3.1 and later (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a model: everything the forward pass depends on, and nothing else.

    Attributes:
      vocab_size: V.
      hidden_size: D.
      intermediate_sizes: the logical F of each layer; its length is the number of layers.
      num_attention_heads: N.
      num_key_value_heads: K, a divisor of N.
      head_dim: H; need not be D / N.
      max_position_embeddings: the context window in tokens.
      rms_norm_eps: added to the variance in every RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None for `rope_type: default`.
      tie_word_embeddings: whether the output projection is the embedding; then it is stored once.
      width_multiple: the stored arrays are zero-padded along F to a multiple of this, so that they divide over
        devices. Padding neurons compute `silu(0) * 0` and meet a zero column, and no export contains them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_sizes: tuple[int, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None = None
    tie_word_embeddings: bool = False
    width_multiple: int = 1

    def __post_init__(self) -> None:
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type in (int, "int")}
        sizes |= {f"intermediate_sizes[{i}]": size for i, size in enumerate(self.intermediate_sizes)}
        for name, size in sizes.items():
            if size < 1:
                raise RequestError(f"the config says {name} = {size}; it must be at least 1")
        if not self.intermediate_sizes:
            raise RequestError("the config says num_hidden_layers = 0; a model has at least one layer")
        if self.num_attention_heads % self.num_key_value_heads:
            raise RequestError(
                f"the config says num_attention_heads = {self.num_attention_heads} and num_key_value_heads = "
                f"{self.num_key_value_heads}; the second must divide the first"
            )
        if self.head_dim % 2:
            raise RequestError(f"the config says head_dim = {self.head_dim}; rotary embeddings need an even one")

    @property
    def num_hidden_layers(self) -> int:
        """The number of decoder layers, L."""
        return len(self.intermediate_sizes)

    @property
    def stored_intermediate_sizes(self) -> tuple[int, ...]:
        """F of each layer as stored: the logical size rounded up to `width_multiple`."""
        return tuple(-(-size // self.width_multiple) * self.width_multiple for size in self.intermediate_sizes)

    @property
    def expansion_ratio(self) -> float:
        """Mean intermediate size over hidden size."""
        return sum(self.intermediate_sizes) / self.num_hidden_layers / self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Parameters of the logical model: tied embeddings counted once, width padding not at all."""
        D, H = self.hidden_size, self.head_dim
        attention = 2 * D * H * (self.num_attention_heads + self.num_key_value_heads)
        embeddings = self.vocab_size * D * (1 if self.tie_word_embeddings else 2)
        layers = sum(attention + 3 * D * size + 2 * D for size in self.intermediate_sizes)
        return embeddings + layers + D

    def check_tokens(self, tokens: NDArray[np.int32]) -> None:
        """Makes sure that token ids lie in the vocabulary: compiled code would quietly take others for one that does.

        Raises:
          RequestError: one does not.
        """
        outside = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if outside.size:
            raise RequestError(
                f"token id {outside[0]} lies outside the model's vocabulary of {self.vocab_size}; tokenizer and model "
                f"do not belong together"
            )


# --------------------------------------------------------------------------------------------------- layers


def rope_frequencies(config: ModelConfig) -> Array:
    """Rotary frequencies in radians per token, `[H/2]` float32 (RoFormer, arXiv 2104.09864).

    With `rope_scaling`, wavelengths longer than `original / low_freq_factor` are stretched by `factor`, those
    shorter than `original / high_freq_factor` are left, and those between are interpolated (Llama 3.1).
    """
    # float64 rounded once: at position 8,000 an error of 1e-7 in a frequency is one of 1e-3 in an angle.
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_scaling is not None:
        s = config.rope_scaling
        rotations = s.original_max_position_embeddings * frequencies / (2 * math.pi)  # within the old window
        smooth = (rotations - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        frequencies = (1 - smooth) * frequencies / s.factor + smooth * frequencies
    return jnp.asarray(frequencies, jnp.float32)


def rotate(x: Array, positions: Array, frequencies: Array) -> Array:
    """Applies rotary embeddings to `x [B, T, ..., H]` at `positions [B, T]`, pairing dimension i with i + H/2."""
    angles = positions[..., None].astype(jnp.float32) * frequencies  # [B, T, H/2]
    angles = angles.reshape(*positions.shape, *(1,) * (x.ndim - 3), -1)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _normal(rngs: nnx.Rngs | None, shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param[Array]:
    if rngs is None:
        return nnx.Param(jnp.zeros(shape, dtype))
    # 0.02: `initializer_range` of the Llama configs.
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation; the variance is float32 whatever the dtype of `x [..., D]`."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike):
        self.eps = config.rms_norm_eps
        self.weight = nnx.Param(jnp.ones((config.hidden_size,), dtype))

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return self.weight[...].astype(x.dtype) * x32.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary embeddings."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None, dtype: DTypeLike):
        D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = _normal(rngs, (N, H, D), dtype)
        self.k_proj = _normal(rngs, (K, H, D), dtype)
        self.v_proj = _normal(rngs, (K, H, D), dtype)
        self.o_proj = _normal(rngs, (D, N, H), dtype)

    def __call__(
        self, x: Array, positions: Array, frequencies: Array, cache: "LayerCache | None"
    ) -> tuple[Array, "LayerCache"]:
        dtype = x.dtype
        q = jnp.einsum("btd,nhd->btnh", x, self.q_proj[...].astype(dtype))
        k = jnp.einsum("btd,khd->btkh", x, self.k_proj[...].astype(dtype))
        v = jnp.einsum("btd,khd->btkh", x, self.v_proj[...].astype(dtype))
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        cache = LayerCache(k, v) if cache is None else cache.write(k, v, positions)
        B, T, N, H = q.shape
        K = k.shape[2]
        out = causal_attention(q.reshape(B, T, K, N // K, H), cache.k, cache.v, positions)
        return jnp.einsum("btnh,dnh->btd", out.reshape(B, T, N, H), self.o_proj[...].astype(dtype)), cache


class MLP(nnx.Module):
    """Gated linear unit: `down(silu(gate(x)) * up(x))`, with an optional mask over its neurons."""

    def __init__(self, config: ModelConfig, width: int, rngs: nnx.Rngs | None, dtype: DTypeLike):
        self.gate_proj = _normal(rngs, (width, config.hidden_size), dtype)
        self.up_proj = _normal(rngs, (width, config.hidden_size), dtype)
        self.down_proj = _normal(rngs, (config.hidden_size, width), dtype)

    def __call__(self, x: Array, neuron_mask: ArrayLike | None) -> Array:
        dtype = x.dtype
        gate = jnp.einsum("btd,fd->btf", x, self.gate_proj[...].astype(dtype))
        up = jnp.einsum("btd,fd->btf", x, self.up_proj[...].astype(dtype))
        neurons = jax.nn.silu(gate) * up
        if neuron_mask is not None:
            neurons = neurons * jnp.asarray(neuron_mask, dtype)
        return jnp.einsum("btf,df->btd", neurons, self.down_proj[...].astype(dtype))


class DecoderLayer(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig, width: int, rngs: nnx.Rngs | None, dtype: DTypeLike):
        self.input_layernorm = RMSNorm(config, dtype)
        self.self_attn = Attention(config, rngs, dtype)
        self.post_attention_layernorm = RMSNorm(config, dtype)
        self.mlp = MLP(config, width, rngs, dtype)

    def __call__(
        self,
        x: Array,
        positions: Array,
        frequencies: Array,
        cache: "LayerCache | None",
        neuron_mask: ArrayLike | None,
    ) -> tuple[Array, "LayerCache"]:
        with jax.named_scope("attention"):
            attended, cache = self.self_attn(self.input_layernorm(x), positions, frequencies, cache)
            x = x + attended
        with jax.named_scope("mlp"):
            return x + self.mlp(self.post_attention_layernorm(x), neuron_mask), cache


# ---------------------------------------------------------------------------------------------------- model


class Llama(nnx.Module):
    """Decoder-only transformer of the Llama family.

    Activations take the dtype of the embedding; every other weight is cast to it where it is used, so a
    checkpoint of mixed dtypes runs as it is stored. Weights are drawn from `rngs`, or zero where it is None.

    Compiled code splits the module once and jits a pure function over its state:

        graphdef, state = nnx.split(model)

        @functools.partial(jax.jit, static_argnums=0)
        def forward(graphdef, state, tokens):
            model = nnx.merge(graphdef, state)
            hidden, _ = model(tokens)
            return model.logits(hidden)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.embed_tokens = _normal(rngs, (config.vocab_size, config.hidden_size), dtype)
        self.layers = nnx.List([DecoderLayer(config, width, rngs, dtype) for width in config.stored_intermediate_sizes])
        self.norm = RMSNorm(config, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = _normal(rngs, (config.vocab_size, config.hidden_size), dtype)

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        cache: "KVCache | None" = None,
        neuron_masks: tuple[ArrayLike, ...] | None = None,
    ) -> tuple[Array, "KVCache"]:
        """Runs the decoder over `tokens`: a full sequence, a prefill, or one step of decoding.

        Args:
          tokens: `[B, T]` int32.
          positions: `[B, T]` int32, default 0..T-1. Rows may stand at different positions.
          cache: keys and values already computed; `tokens` are written at `positions` and attend to every slot
            up to their own. None runs the tokens on their own.
          neuron_masks: for each layer `[F]`, 1 keeps a neuron and 0 removes it. An array, so that every pruning
            ratio runs in one compiled program.

        Returns:
          `[B, T, D]` hidden states after the final norm (see `logits`), and the cache that includes `tokens`.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        frequencies = rope_frequencies(self.config)
        x = self.embed_tokens[...][tokens]
        layer_caches = []
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                x, layer_cache = layer(
                    x,
                    positions,
                    frequencies,
                    None if cache is None else cache.layers[i],
                    None if neuron_masks is None else neuron_masks[i],
                )
            layer_caches.append(layer_cache)
        return self.norm(x), KVCache(tuple(layer_caches))

    def logits(self, hidden: Array) -> Array:
        """Next-token logits `[..., V]` float32 of hidden states `[..., D]`; ask only for the positions you need."""
        weight = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return jnp.einsum("...d,vd->...v", hidden, weight[...].astype(hidden.dtype), preferred_element_type=jnp.float32)


def abstract_model(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Llama:
    """The model with `jax.ShapeDtypeStruct` in place of arrays: costs no memory, for any size."""
    graphdef, state = _abstract_parts(config, jnp.dtype(dtype))
    model: Llama = nnx.merge(graphdef, state, copy=True)
    return model


@functools.lru_cache(maxsize=16)
def _abstract_parts(config: ModelConfig, dtype: DTypeLike) -> tuple[nnx.GraphDef[Llama], nnx.State[Any, Any]]:
    # Cached: loading, slicing and saving all ask for the same shapes.
    return nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=None, dtype=dtype)))


# ---------------------------------------------------------------------------------------------------- cache


class LayerCache(NamedTuple):
    """Keys and values of one layer, each `[B, S, K, H]`; the slot index along S is the position."""

    k: Array
    v: Array

    def write(self, k: Array, v: Array, positions: Array) -> "LayerCache":
        """Puts `k, v [B, T, K, H]` at `positions [B, T]`; positions outside the cache are dropped."""
        rows = jnp.arange(k.shape[0])[:, None]
        return LayerCache(
            self.k.at[rows, positions].set(k.astype(self.k.dtype), mode="drop", unique_indices=True),
            self.v.at[rows, positions].set(v.astype(self.v.dtype), mode="drop", unique_indices=True),
        )


class KVCache(NamedTuple):
    """Keys and values of all layers."""

    layers: tuple[LayerCache, ...]

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, length: int, dtype: DTypeLike) -> "KVCache":
        """A zeroed cache of `length` slots a sequence."""
        shape = (batch, length, config.num_key_value_heads, config.head_dim)
        return cls(
            tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_hidden_layers))
        )
