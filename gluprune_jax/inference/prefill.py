"""Runs token sequences into a cache, chunk by chunk: prompts, shared prefixes, long documents.

Chunks have two sizes and caches a few, so lengths do not recompile anything; the padding of a last chunk lies behind
the filled slots of the cache, where nothing looks, until what follows overwrites it.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray

from gluprune_jax.inference.by_layers import run_layers, runs_by_layers
from gluprune_jax.models.attention import KEY_BLOCK
from gluprune_jax.models.cache import KVCache, LayerCache
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.parameters import bind

# A sequence is run in chunks of the larger size, and its rest in smaller ones.
CHUNKS = (128, 512)
# Sizes of caches; the last chunk may overhang.
_CACHE_SLOTS = tuple(size + CHUNKS[-1] for size in (2048, 8192, 32768, 131072))


class Chunk(NamedTuple):
    """A part of a sequence.

    Attributes:
      start: how many tokens of the sequence come before.
      tokens: `[1, T]` int32, of which the first `length` are real.
      length: how many of the tokens are real.
    """

    start: int
    tokens: NDArray[np.int32]
    length: int


def cache_slots(longest: int) -> int:
    """Slots of a cache into which sequences of up to `longest` tokens are run."""
    needed = longest + CHUNKS[-1]
    return next((size for size in _CACHE_SLOTS if size >= needed), -(-needed // KEY_BLOCK) * KEY_BLOCK)


def chunk_sizes(count: int, small: int, large: int) -> list[tuple[int, int]]:
    """Cuts `count` tokens into starts and sizes, the last padded as little as two sizes allow in few calls."""
    whole = count // large * large
    if count - whole > 3 * small:
        whole += large
    return [(start, large) for start in range(0, whole, large)] + [
        (start, small) for start in range(whole, count, small)
    ]


def chunks(tokens: Sequence[int] | NDArray[np.int32]) -> list[Chunk]:
    """Cuts a sequence into chunks, the last of them padded."""
    result = []
    for start, size in chunk_sizes(len(tokens), *CHUNKS):
        part = tokens[start : start + size]
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(part)] = part
        result.append(Chunk(start, padded, len(part)))
    return result


def extend(
    config: ModelConfig,
    params: nnx.State[Any, Any],
    cache: KVCache,
    tokens: ArrayLike,
    neuron_masks: tuple[ArrayLike, ...] | None,
) -> tuple[Array, tuple[LayerCache, ...]]:
    """Hidden states `[R, T, D]` of `tokens [R, T]` behind those in `cache`, and their keys and values for `append`.

    R is the number of replicas of the mesh: each runs another sequence.
    """
    if runs_by_layers():
        return run_layers(config, params, cache, tokens, None, None, neuron_masks)
    whole: tuple[Array, tuple[LayerCache, ...]] = whole_extend(config, params, cache, tokens, neuron_masks)
    return whole


@functools.partial(jax.jit, static_argnums=0)
def whole_extend(
    config: ModelConfig,
    params: nnx.State[Any, Any],
    cache: KVCache,
    tokens: ArrayLike,
    neuron_masks: tuple[ArrayLike, ...] | None,
) -> tuple[Array, tuple[LayerCache, ...]]:
    """`extend` as one program."""
    chex.assert_shape(tokens, (*cache.lengths.shape, None))
    return bind(config, params)(jnp.asarray(tokens), caches=[cache], neuron_masks=neuron_masks)


@functools.partial(jax.jit, donate_argnums=0)
def append(cache: KVCache, new: tuple[LayerCache, ...], counts: ArrayLike) -> KVCache:
    """`KVCache.append` in place: within `extend`, which reads the cache in a loop, XLA would copy it first."""
    return cache.append(new, counts)
