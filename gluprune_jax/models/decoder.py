"""A decoder in Flax NNX, one for all families: what they differ in is a value of `ModelConfig`.

Weights keep the orientation of the Hugging Face checkpoints ([out, in]), so loading and saving move no bit.

Array letters: B batch, T tokens, D hidden size, F intermediate size, N query heads, K key/value heads,
G = N / K, H head dim, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from gluprune_jax.models.attention import Visible, causal_attention
from gluprune_jax.models.cache import KVCache, LayerCache, LayerView
from gluprune_jax.models.config import LayerAttention, ModelConfig
from gluprune_jax.models.rope import rotate
from gluprune_jax.parallel.sharding import constrain

M = TypeVar("M", bound=nnx.Module)


# --------------------------------------------------------------------------------------------------- layers

# On CPUs, XLA rearranges the second operand of a product: for few rows that should not be the weight. With it first,
# 8 rows take 4/7 of the time, 128 rows 9/10, and 512 the same.
_FEW_ROWS = 128
# Of a product of two matrices XLA changes the order back. For so few rows an axis of one prevents that: logits of 8
# rows take 7/10 of the time, of 32 rows 8/10; those of 128 rows would take longer to read than is saved.
_FEW_MATRIX_ROWS = 32


def _normal(rngs: nnx.Rngs | None, shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param[Array]:
    if rngs is None:
        return nnx.Param(jnp.zeros(shape, dtype))
    # 0.02: `initializer_range` of the Llama configs.
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation of `x [..., size]`; the variance is float32 whatever its dtype."""

    def __init__(self, config: ModelConfig, size: int, dtype: DTypeLike):
        self.eps = config.rms_norm_eps
        self.rounding = config.norm
        fill = jnp.zeros if config.norm == "float32_plus_one" else jnp.ones
        self.weight = nnx.Param(fill((size,), dtype))

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        if self.rounding == "cast_first":
            return self.weight[...].astype(x.dtype) * x32.astype(x.dtype)
        weight = self.weight[...].astype(jnp.float32)
        return ((1 + weight if self.rounding == "float32_plus_one" else weight) * x32).astype(x.dtype)


def project(x: Array, weight: Array, dtype: DTypeLike | None = None) -> Array:
    """`x [..., D]` by `weight [F, D]`: `[..., F]`, in the dtype of `x` unless another is given."""
    weight = weight.astype(x.dtype)
    if x.ndim == 2 and x.shape[0] <= _FEW_MATRIX_ROWS:
        return project(x[:, None], weight, dtype)[:, 0]
    if math.prod(x.shape[:-1]) > _FEW_ROWS:
        return jnp.einsum("...d,fd->...f", x, weight, preferred_element_type=dtype)
    contracted = (((1,), (x.ndim - 1,)), ((), ()))
    return jnp.moveaxis(jax.lax.dot_general(weight, x, contracted, preferred_element_type=dtype), 0, -1)


def embed(config: ModelConfig, embedding: Array, tokens: Array, dtype: DTypeLike | None = None) -> Array:
    """The residual stream `[B, T, D]` in front of the first layer, of `tokens [B, T]` int32 and `embedding [V, D]`.

    Args:
      config: of the model.
      embedding: its embedding.
      tokens: token ids.
      dtype: of the stream, which all else follows; None for that of the embedding.
    """
    x = embedding[tokens]
    x = x if dtype is None else x.astype(dtype)
    # The scale is rounded first, as transformers does.
    x = x if config.embedding_scale == 1 else x * jnp.asarray(config.embedding_scale, x.dtype)
    return constrain(x, "batch", None, None)


class Attention(nnx.Module):
    """Grouped-query self-attention of a layer: its projections, their norms and biases, its RoPE and window."""

    def __init__(self, config: ModelConfig, attention: LayerAttention, rngs: nnx.Rngs | None, dtype: DTypeLike):
        D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.attention = attention
        self.scale = H**-0.5 if config.attention_scale is None else config.attention_scale
        self.soft_cap = config.attention_soft_cap
        self.q_proj = _normal(rngs, (N, H, D), dtype)
        self.k_proj = _normal(rngs, (K, H, D), dtype)
        self.v_proj = _normal(rngs, (K, H, D), dtype)
        self.o_proj = _normal(rngs, (D, N, H), dtype)
        has_bias = config.qkv_bias
        self.q_bias = nnx.Param(jnp.zeros((N, H), dtype)) if has_bias else None
        self.k_bias = nnx.Param(jnp.zeros((K, H), dtype)) if has_bias else None
        self.v_bias = nnx.Param(jnp.zeros((K, H), dtype)) if has_bias else None
        self.o_bias = nnx.Param(jnp.zeros((D,), dtype)) if config.output_bias else None
        self.norms_heads = config.qk_norm == "head"
        is_normed = config.qk_norm != "none"
        self.q_norm = RMSNorm(config, H if self.norms_heads else N * H, dtype) if is_normed else None
        self.k_norm = RMSNorm(config, H if self.norms_heads else K * H, dtype) if is_normed else None

    def __call__(
        self,
        x: Array,
        positions: Array,
        subtree_ends: Array | None,
        caches: "Sequence[LayerView]",
    ) -> tuple[Array, "LayerCache"]:
        q = self._heads(x, self.q_proj, self.q_bias, self.q_norm)
        k = self._heads(x, self.k_proj, self.k_bias, self.k_norm)
        v = self._heads(x, self.v_proj, self.v_bias, None)
        rope, window = self.attention.rope, self.attention.window
        if rope is not None:
            q, k = rotate(q, positions, rope), rotate(k, positions, rope)
        B, T, N, H = q.shape
        K = k.shape[2]
        q = constrain(q.reshape(B, T, K, N // K, H), "batch", None, "kv_heads", "query_group", None)
        k, v = (constrain(x, "batch", None, "kv_heads", None) for x in (k, v))
        mask = Visible(subtree_ends, window, positions)
        out = causal_attention(q, k, v, mask, caches, scale=self.scale, soft_cap=self.soft_cap)
        attended = project(out.reshape(B, T, N * H), self.o_proj[...].reshape(-1, N * H))
        if self.o_bias is not None:
            attended = attended + self.o_bias[...].astype(x.dtype)
        return attended, LayerCache(k.swapaxes(1, 2), v.swapaxes(1, 2))

    def _heads(self, x: Array, weight: nnx.Param[Array], bias: nnx.Param[Array] | None, norm: RMSNorm | None) -> Array:
        """`x [B, T, D]` by a weight `[N, H, D]`: `[B, T, N, H]`, with the bias and norm that there are."""
        # As one matrix: with the heads apart, XLA copies the weight before every product (2.5 times as slow in
        # decoding).
        N, H, D = weight[...].shape
        y = project(x, weight[...].reshape(N * H, D))
        if bias is not None:
            y = y + bias[...].reshape(N * H).astype(x.dtype)
        if norm is not None and not self.norms_heads:
            y = norm(y)
        y = y.reshape(*x.shape[:2], N, H)
        return norm(y) if norm is not None and self.norms_heads else y


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class MLP(nnx.Module):
    """Gated linear unit: `down(act(gate(x)) * up(x))`, with an optional mask over its neurons."""

    def __init__(self, config: ModelConfig, width: int, rngs: nnx.Rngs | None, dtype: DTypeLike):
        self.activation = config.activation
        self.gate_proj = _normal(rngs, (width, config.hidden_size), dtype)
        self.up_proj = _normal(rngs, (width, config.hidden_size), dtype)
        self.down_proj = _normal(rngs, (config.hidden_size, width), dtype)

    def __call__(self, x: Array, neuron_mask: ArrayLike | None) -> Array:
        return project(self.neurons(x, neuron_mask), self.down_proj[...])

    def neurons(self, x: Array, neuron_mask: ArrayLike | None = None) -> Array:
        """What the down projection reads, `[..., F]`, for `x [..., D]`."""
        gate = _ACTIVATIONS[self.activation](project(x, self.gate_proj[...]))
        neurons = gate * project(x, self.up_proj[...])
        return neurons if neuron_mask is None else neurons * jnp.asarray(neuron_mask, x.dtype)


class DecoderLayer(nnx.Module):
    """Transformer block: what attention and MLP read and give is normalised as the config says.

    The norms are called as in Llama, which has those in front: `post_attention_layernorm` is the one in front of the
    MLP. Those behind are `attention_output_norm` and `mlp_output_norm`.
    """

    def __init__(self, config: ModelConfig, i: int, rngs: nnx.Rngs | None, dtype: DTypeLike):
        def norm(exists: bool) -> RMSNorm | None:
            return RMSNorm(config, config.hidden_size, dtype) if exists else None

        self.residual_scale = config.residual_scale
        self.input_layernorm = norm(config.pre_norm)
        self.self_attn = Attention(config, config.attention[i], rngs, dtype)
        self.attention_output_norm = norm(config.post_norm)
        self.post_attention_layernorm = norm(config.pre_norm)
        self.mlp = MLP(config, config.stored_intermediate_sizes[i], rngs, dtype)
        self.mlp_output_norm = norm(config.post_norm)

    def __call__(
        self,
        x: Array,
        positions: Array,
        subtree_ends: Array | None,
        caches: "Sequence[LayerView]",
        neuron_mask: ArrayLike | None,
    ) -> tuple[Array, "LayerCache"]:
        x, new = self.attend(x, positions, subtree_ends, caches)
        return self.feed_forward(x, neuron_mask), new

    def attend(
        self,
        x: Array,
        positions: Array,
        subtree_ends: Array | None = None,
        caches: "Sequence[LayerView]" = (),
    ) -> tuple[Array, "LayerCache"]:
        """The residual stream `[B, T, D]` behind the attention, before the MLP; and its keys and values."""
        with jax.named_scope("attention"):
            normed = x if self.input_layernorm is None else self.input_layernorm(x)
            attended, new = self.self_attn(normed, positions, subtree_ends, caches)
            return self._add(x, attended, self.attention_output_norm), new

    def mlp_input(self, x: Array) -> Array:
        """What the MLP reads, of the residual stream `x [..., D]` behind the attention."""
        return x if self.post_attention_layernorm is None else self.post_attention_layernorm(x)

    def feed_forward(self, x: Array, neuron_mask: ArrayLike | None = None) -> Array:
        """The residual stream behind the layer, of that behind its attention, `x [..., D]`."""
        with jax.named_scope("mlp"):
            return self._add(x, self.mlp(self.mlp_input(x), neuron_mask), self.mlp_output_norm)

    def _add(self, x: Array, branch: Array, norm: RMSNorm | None) -> Array:
        branch = branch if norm is None else norm(branch)
        if self.residual_scale != 1:
            # In float32: 0.22 rounded to bfloat16 first would change a fifth of the products.
            branch = (branch.astype(jnp.float32) * self.residual_scale).astype(branch.dtype)
        return x + branch


# ---------------------------------------------------------------------------------------------------- model


class Decoder(nnx.Module):
    """Decoder-only transformer with gated MLPs.

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
        self.layers = nnx.List([DecoderLayer(config, i, rngs, dtype) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config, config.hidden_size, dtype)
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
        chex.assert_rank(tokens, 2)
        chex.assert_type(tokens, int)
        for given in (positions, subtree_ends):
            if given is not None:
                chex.assert_shape(given, tokens.shape)
        if positions is None:
            start = sum((cache.lengths for cache in caches), start=jnp.zeros((1,), jnp.int32))
            start = jnp.repeat(start, tokens.shape[0] // start.shape[0])
            positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        x = embed(self.config, self.embed_tokens[...], tokens)
        new = []
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                x, layer_new = layer(
                    x,
                    positions,
                    subtree_ends,
                    [(*cache.layers[i], cache.lengths) for cache in caches],
                    None if neuron_masks is None else neuron_masks[i],
                )
            new.append(layer_new)
        return self.norm(x), tuple(new)

    def logits(self, hidden: Array) -> Array:
        """Next-token logits `[..., V]` float32 of hidden states `[..., D]`; ask only for the positions you need."""
        chex.assert_axis_dimension(hidden, -1, self.config.hidden_size)
        weight = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        logits = project(hidden, weight[...], jnp.float32)
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        if (cap := self.config.logit_soft_cap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        # Asked for whole logits, the TPU's compiler would gather a divided embedding instead.
        return constrain(logits, "batch", *(None,) * (logits.ndim - 2), "vocab")
