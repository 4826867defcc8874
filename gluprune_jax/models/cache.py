"""The KV cache."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike
from numpy.typing import NDArray

from gluprune_jax.models.attention import KEY_BLOCK
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.parallel.sharding import CACHE_AXES, RULES, constrain, per_shard

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
        empty: KVCache = _zeroed_cache(config, batch, slots, jnp.dtype(dtype))
        return empty

    def holding(self, lengths: NDArray[np.int32]) -> "KVCache":
        """The same slots, of which the first `lengths [B]` of each row count as filled."""
        # NumPy's array, which jit puts wherever the slots are.
        return self._replace(lengths=cast("Array", lengths))

    def append(self, new: tuple[LayerCache, ...], counts: ArrayLike) -> "KVCache":
        """Puts T new tokens behind those of each row, of which the first `counts [B]` are real.

        There must be room for all T: where `lengths + T` exceeds the slots, filled ones are overwritten.
        """
        for layer, fresh in zip(self.layers, new, strict=True):
            B, K, _, H = layer.k.shape
            chex.assert_shape([fresh.k, fresh.v], (B, K, None, H))
        chex.assert_rank(self.lengths, 1)

        def write(slots: Array, fresh: Array, lengths: Array) -> Array:
            fresh = fresh.astype(slots.dtype)
            if slots.shape[0] == 1:
                return jax.lax.dynamic_update_slice_in_dim(slots, fresh, lengths[0], axis=2)
            return jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1))(slots, fresh, lengths)

        layers = per_cache_row(write, self.layers, new, self.lengths)
        return KVCache(layers, constrain(self.lengths + jnp.asarray(counts)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _zeroed_cache(config: ModelConfig, batch: int, slots: int, dtype: DTypeLike) -> KVCache:
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
