"""The decoder over tokens that stand on a cache, layer by layer: what one CPU runs in place of one large program.

XLA compiles a program the longer, and in the more memory, the more layers it has, although they are alike. A program of
one layer serves all that are alike. To start it takes a tenth of a millisecond, which is little beside what a CPU
computes in it, and much on an accelerator, which gets the whole decoder as one program. The results differ by rounding
at most, those of Llama not at all.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from gluprune_jax.models.cache import KVCache, LayerCache, LayerView
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder, DecoderLayer, embed
from gluprune_jax.models.parameters import abstract_model
from gluprune_jax.parallel.sharding import is_divided

Weights = tuple[Array, ...]  # of a layer, in the order of its parameters: JAX flattens a `nnx.State` slowly
Ends = Mapping[str, Any]  # parameters by name


def runs_by_layers() -> bool:
    """Whether programs are to be of one layer each: on one CPU."""
    return jax.default_backend() == "cpu" and not is_divided()


def run_layers(
    config: ModelConfig,
    params: nnx.State[Any, Any],
    cache: KVCache,
    tokens: ArrayLike,
    positions: ArrayLike | None,
    subtree_ends: ArrayLike | None,
    neuron_masks: tuple[ArrayLike, ...] | None,
) -> tuple[Array, tuple[LayerCache, ...]]:
    """What `Decoder.__call__` gives on one cache.

    Args:
      config: of the model.
      params: of the model.
      cache: keys and values of the tokens that came before, C rows; C divides B.
      tokens: `[B, T]` int32.
      positions: `[B, T]` int32; None for those that follow on the cache, for which C is B.
      subtree_ends: see `Decoder.__call__`.
      neuron_masks: see `Decoder.__call__`.

    Returns:
      `[B, T, D]` hidden states after the final norm, and the keys and values of `tokens`, layer by layer.
    """
    ends = ends_of(params)
    x, following = begin(config, ends, tokens, cache.lengths)
    positions = following if positions is None else positions
    new = []
    for n, (i, weights) in enumerate(layers_of(config, params)):
        view = *cache.layers[n], cache.lengths
        mask = None if neuron_masks is None else neuron_masks[n]
        x, layer_new = run_layer(config, i, weights, x, positions, subtree_ends, view, mask)
        new.append(layer_new)
    return finish(config, ends, x), tuple(new)


def layers_of(config: ModelConfig, params: nnx.State[Any, Any]) -> Iterator[tuple[int, Weights]]:
    """For each layer the first one that differs from it in nothing but its weights, and these."""
    return zip(_first_alike(config), (tuple(jax.tree.leaves(one)) for one in params["layers"].values()), strict=True)


def bind_layer(config: ModelConfig, i: int, weights: Weights) -> DecoderLayer:
    """A layer like layer `i` with these weights: within compiled code, whose arguments they are."""
    graphdef, state = nnx.split(abstract_model(config).layers[i])
    layer: DecoderLayer = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), weights))
    return layer


def ends_of(params: nnx.State[Any, Any]) -> Ends:
    """The parameters of a model that belong to no layer."""
    return {name: part for name, part in params.items() if name != "layers"}


def bind_ends(config: ModelConfig, ends: Ends) -> Decoder:
    """A model with these parameters, and none in its layers: within compiled code, whose arguments they are."""
    graphdef, state = nnx.split(abstract_model(config))
    model: Decoder = nnx.merge(graphdef, nnx.State({**state, **ends}))
    return model


@functools.lru_cache(maxsize=16)
def _first_alike(config: ModelConfig) -> tuple[int, ...]:
    kinds = list(zip(config.attention, config.stored_intermediate_sizes, strict=True))
    return tuple(kinds.index(kind) for kind in kinds)


@functools.partial(jax.jit, static_argnums=0)
def begin(config: ModelConfig, ends: Ends, tokens: Array, lengths: Array) -> tuple[Array, Array]:
    """The residual stream `[B, T, D]` in front of the first layer, and the positions of tokens behind `lengths`."""
    positions = lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return embed(config, bind_ends(config, ends).embed_tokens[...], tokens), positions


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_layer(
    config: ModelConfig,
    i: int,
    weights: Weights,
    x: Array,
    positions: Array,
    subtree_ends: Array | None,
    cache: LayerView,
    neuron_mask: ArrayLike | None,
) -> tuple[Array, LayerCache]:
    """The residual stream `[B, T, D]` behind a layer like layer `i`, and the keys and values of its tokens."""
    return bind_layer(config, i, weights)(x, positions, subtree_ends, [cache], neuron_mask)


@functools.partial(jax.jit, static_argnums=0)
def finish(config: ModelConfig, ends: Ends, x: Array) -> Array:
    """Hidden states of the residual stream `x [B, T, D]` behind the last layer."""
    return bind_ends(config, ends).norm(x)
