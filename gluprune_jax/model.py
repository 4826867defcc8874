"""A Llama-family decoder in Flax NNX: config, layers, model, cache.

Weights keep the orientation of the Hugging Face checkpoints ([out, in]), so loading and saving move no bit.

Array letters: B batch, T tokens, D hidden size, F intermediate size, N query heads, K key/value heads,
G = N / K, H head dim, V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike
from numpy.typing import NDArray

from gluprune_jax.attention import KEY_BLOCK, causal_attention
from gluprune_jax.errors import RequestError
from gluprune_jax.sharding import CACHE_AXES, RULES, constrain, per_shard

M = TypeVar("M", bound=nnx.Module)

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

# On CPUs, XLA rearranges the second operand of a product: for few rows that should not be the weight. With it first,
# 8 rows take 4/7 of the time, 128 rows 9/10, and 512 the same.
_FEW_ROWS = 128


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


def project(x: Array, weight: Array, dtype: DTypeLike | None = None) -> Array:
    """`x [..., D]` by `weight [F, D]`: `[..., F]`, in the dtype of `x` unless another is given."""
    weight = weight.astype(x.dtype)
    if math.prod(x.shape[:-1]) > _FEW_ROWS:
        return jnp.einsum("...d,fd->...f", x, weight, preferred_element_type=dtype)
    contracted = (((1,), (x.ndim - 1,)), ((), ()))
    return jnp.moveaxis(jax.lax.dot_general(weight, x, contracted, preferred_element_type=dtype), 0, -1)


def _to_heads(x: Array, weight: Array) -> Array:
    """`x [B, T, D]` by `weight [N, H, D]`: `[B, T, N, H]`."""
    # As one matrix: with the heads apart, XLA copies the weight before every product (2.5 times as slow in decoding).
    N, H, D = weight.shape
    return project(x, weight.reshape(N * H, D)).reshape(*x.shape[:2], N, H)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary embeddings."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None, dtype: DTypeLike):
        D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = _normal(rngs, (N, H, D), dtype)
        self.k_proj = _normal(rngs, (K, H, D), dtype)
        self.v_proj = _normal(rngs, (K, H, D), dtype)
        self.o_proj = _normal(rngs, (D, N, H), dtype)

    def __call__(
        self,
        x: Array,
        positions: Array,
        frequencies: Array,
        subtree_ends: Array | None,
        caches: "Sequence[LayerView]",
    ) -> tuple[Array, "LayerCache"]:
        q, k, v = (_to_heads(x, weight[...]) for weight in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        B, T, N, H = q.shape
        K = k.shape[2]
        q = constrain(q.reshape(B, T, K, N // K, H), "batch", None, "kv_heads", "query_group", None)
        k, v = (constrain(x, "batch", None, "kv_heads", None) for x in (k, v))
        out = causal_attention(q, k, v, subtree_ends, caches)
        attended = project(out.reshape(B, T, N * H), self.o_proj[...].reshape(-1, N * H))
        return attended, LayerCache(k.swapaxes(1, 2), v.swapaxes(1, 2))


class MLP(nnx.Module):
    """Gated linear unit: `down(silu(gate(x)) * up(x))`, with an optional mask over its neurons."""

    def __init__(self, config: ModelConfig, width: int, rngs: nnx.Rngs | None, dtype: DTypeLike):
        self.gate_proj = _normal(rngs, (width, config.hidden_size), dtype)
        self.up_proj = _normal(rngs, (width, config.hidden_size), dtype)
        self.down_proj = _normal(rngs, (config.hidden_size, width), dtype)

    def __call__(self, x: Array, neuron_mask: ArrayLike | None) -> Array:
        return project(self.neurons(x, neuron_mask), self.down_proj[...])

    def neurons(self, x: Array, neuron_mask: ArrayLike | None = None) -> Array:
        """What the down projection reads, `[..., F]`, for `x [..., D]`."""
        neurons = jax.nn.silu(project(x, self.gate_proj[...])) * project(x, self.up_proj[...])
        return neurons if neuron_mask is None else neurons * jnp.asarray(neuron_mask, x.dtype)


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
        subtree_ends: Array | None,
        caches: "Sequence[LayerView]",
        neuron_mask: ArrayLike | None,
    ) -> tuple[Array, "LayerCache"]:
        x, new = self.attend(x, positions, frequencies, subtree_ends, caches)
        with jax.named_scope("mlp"):
            return x + self.mlp(self.post_attention_layernorm(x), neuron_mask), new

    def attend(
        self,
        x: Array,
        positions: Array,
        frequencies: Array,
        subtree_ends: Array | None = None,
        caches: "Sequence[LayerView]" = (),
    ) -> tuple[Array, "LayerCache"]:
        """The residual stream `[B, T, D]` behind the attention, before the MLP; and its keys and values."""
        with jax.named_scope("attention"):
            attended, new = self.self_attn(self.input_layernorm(x), positions, frequencies, subtree_ends, caches)
            return x + attended, new


# ---------------------------------------------------------------------------------------------------- model


class Llama(nnx.Module):
    """Decoder-only transformer of the Llama family.

    Activations take the dtype of the embedding; every other weight is cast to it where it is used, so a
    checkpoint of mixed dtypes runs as it is stored. Weights are drawn from `rngs`, or zero where it is None.

    Compiled code is pure functions over the module's state, with its config as a static argument:

        params = nnx.state(model, nnx.Param)

        @functools.partial(jax.jit, static_argnums=0)
        def forward(config, params, tokens):
            model = bind(config, params)
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
        caches: "Sequence[KVCache]" = (),
        subtree_ends: Array | None = None,
        neuron_masks: tuple[ArrayLike, ...] | None = None,
    ) -> tuple[Array, "tuple[LayerCache, ...]"]:
        """Runs the decoder over `tokens`: whole sequences, a part of a prompt, or one step of decoding.

        Args:
          tokens: `[B, T]` int32.
          positions: `[B, T]` int32; default 0..T-1, counted from what the caches hold.
          caches: keys and values of the tokens that came before, which all `tokens` see; with fewer rows than
            `tokens` each is that of as many neighbours. They are not changed: see `KVCache.append`.
          subtree_ends: `[B, T]` int32 where a row holds a forest of sequences (see `causal_attention`); then
            `positions` are the depths of the tokens in it.
          neuron_masks: for each layer `[F]`, 1 keeps a neuron and 0 removes it. An array, so that every pruning
            ratio runs in one compiled program.

        Returns:
          `[B, T, D]` hidden states after the final norm (see `logits`), and the keys and values of `tokens`, layer by
          layer.
        """
        if positions is None:
            start = sum((cache.lengths for cache in caches), start=jnp.zeros((1,), jnp.int32))
            start = jnp.repeat(start, tokens.shape[0] // start.shape[0])
            positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        frequencies = rope_frequencies(self.config)
        x = constrain(self.embed_tokens[...][tokens], "batch", None, None)
        new = []
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                x, layer_new = layer(
                    x,
                    positions,
                    frequencies,
                    subtree_ends,
                    [(*cache.layers[i], cache.lengths) for cache in caches],
                    None if neuron_masks is None else neuron_masks[i],
                )
            new.append(layer_new)
        return self.norm(x), tuple(new)

    def logits(self, hidden: Array) -> Array:
        """Next-token logits `[..., V]` float32 of hidden states `[..., D]`; ask only for the positions you need."""
        weight = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        logits = project(hidden, weight[...], jnp.float32)
        # Asked for whole logits, the TPU's compiler would gather a divided embedding instead.
        return constrain(logits, "batch", *(None,) * (logits.ndim - 2), "vocab")


def abstract_model(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Llama:
    """The model with `jax.ShapeDtypeStruct` in place of arrays: costs no memory, for any size."""
    graphdef, state = _abstract_parts(config, jnp.dtype(dtype))
    model: Llama = nnx.merge(graphdef, state, copy=True)
    return model


@functools.lru_cache(maxsize=16)
def _abstract_parts(config: ModelConfig, dtype: DTypeLike) -> tuple[nnx.GraphDef[Llama], nnx.State[Any, Any]]:
    # Cached: loading, slicing and saving all ask for the same shapes.
    return nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=None, dtype=dtype)))


def bind(config: ModelConfig, params: nnx.State[Any, Any]) -> Llama:
    """The model of this architecture with these parameters: within compiled code, whose arguments they are.

    The config is a cheap static argument; `nnx.GraphDef` takes milliseconds to hash.
    """
    graphdef, _ = _abstract_parts(config, jnp.dtype(jnp.float32))
    model: Llama = nnx.merge(graphdef, params)
    return model


def with_parameters(module: M, parameters: Mapping[str, Any]) -> M:
    """A module with some of its parameters replaced, by name ("layers.0.mlp.down_proj"); it shares the others."""
    graphdef, state = nnx.split(module)
    flat = [
        (path, variable.replace(parameters.get(".".join(map(str, path)), variable.get_value())))
        for path, variable in nnx.to_flat_state(state)
    ]
    replaced: M = nnx.merge(graphdef, nnx.from_flat_state(flat))
    return replaced


# ---------------------------------------------------------------------------------------------------- cache


class LayerCache(NamedTuple):
    """Keys and values of one layer, each `[B, K, S, H]`; the slot index along S is the position."""

    k: Array
    v: Array


LayerView = tuple[Array, Array, Array]  # keys, values, and how many slots of each row are filled


class KVCache(NamedTuple):
    """Keys and values of all layers. On a mesh, B is a multiple of its replicas.

    Attributes:
      layers: `S` slots a row, of which the first `lengths` are filled.
      lengths: `[B]` int32.
    """

    layers: tuple[LayerCache, ...]
    lengths: Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int, dtype: DTypeLike) -> "KVCache":
        """A zeroed cache of `slots` a row; a multiple of `attention.KEY_BLOCK`, or less than that."""
        if slots > KEY_BLOCK and slots % KEY_BLOCK:
            raise ValueError(f"a cache of {slots} slots; above {KEY_BLOCK} it must be a multiple of it")
        empty: KVCache = _empty_cache(config, batch, slots, jnp.dtype(dtype))
        return empty

    def holding(self, lengths: NDArray[np.int32]) -> "KVCache":
        """The same slots, of which the first `lengths [B]` of each row count as filled."""
        # NumPy's array, which jit puts wherever the slots are.
        return self._replace(lengths=cast("Array", lengths))

    def append(self, new: tuple[LayerCache, ...], counts: ArrayLike) -> "KVCache":
        """Puts T new tokens behind those of each row, of which the first `counts [B]` are real.

        There must be room for all T: where `lengths + T` exceeds the slots, filled ones are overwritten.
        """

        def write(slots: Array, fresh: Array, lengths: Array) -> Array:
            fresh = fresh.astype(slots.dtype)
            if slots.shape[0] == 1:
                return jax.lax.dynamic_update_slice_in_dim(slots, fresh, lengths[0], axis=2)
            return jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1))(slots, fresh, lengths)

        layers = per_cache_row(write, self.layers, new, self.lengths)
        return KVCache(layers, constrain(self.lengths + jnp.asarray(counts)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty_cache(config: ModelConfig, batch: int, slots: int, dtype: DTypeLike) -> KVCache:
    shape = (batch, config.num_key_value_heads, slots, config.head_dim)

    def zeros() -> Array:
        return constrain(jnp.zeros(shape, dtype), *CACHE_AXES)

    layers = tuple(LayerCache(zeros(), zeros()) for _ in range(config.num_hidden_layers))
    return KVCache(layers, constrain(jnp.zeros((batch,), jnp.int32)))


def per_cache_row(
    function: Callable[[Array, Array, Array], Array],
    layers: tuple[LayerCache, ...],
    others: tuple[LayerCache, ...],
    indices: ArrayLike,
) -> tuple[LayerCache, ...]:
    """Within compiled code, maps `function(slots, other, indices)` over caches, on each device for its own rows.

    Divided caches that are written at indices which differ between rows would be gathered first.

    Args:
      function: of arrays `[B, K, S, H]`, `[C, K, T, H]` and `[C]` of one device, giving new slots.
      layers: the slots.
      others: what goes into them.
      indices: `[C]` int32.
    """
    axes = (CACHE_AXES[:2], CACHE_AXES[:2], CACHE_AXES[:1])
    specs = tuple(PartitionSpec(*(RULES[axis] for axis in names)) for names in axes)  # type: ignore[no-untyped-call]

    def every(layers: Any, others: Any, indices: Array) -> Any:
        return jax.tree.map(lambda slots, other: function(slots, other, indices), layers, others)

    result: tuple[LayerCache, ...] = per_shard(every, specs, specs[0])(layers, others, jnp.asarray(indices))
    return result
