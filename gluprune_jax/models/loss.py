"""Losses of next tokens, and sums of them that never hold the logits of all positions."""

from collections.abc import Callable
from typing import TypeVar

import chex
import jax
import jax.numpy as jnp
from jax import Array

T = TypeVar("T")


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Negative log-likelihood `[...]` of `targets [...]` int32 under `logits [..., V]`, float32."""
    chex.assert_shape(targets, logits.shape[:-1])
    chex.assert_type(targets, int)
    # Not by index: a vocabulary that is divided over devices would be gathered.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0), axis=-1)


def entropy(logits: Array) -> Array:
    """Entropy in nats `[...]` of the distribution that logits `[..., V]` give, float32."""
    logits = logits.astype(jnp.float32)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)


def sum_over_positions(terms: Callable[..., T], *arrays: Array, most_tokens: int) -> T:
    """The sum of `terms(*parts)` over chunks of positions, each computed again in the backward pass.

    So the logits of a chunk are all that exists of them. Chunks are of positions rather than rows, so that rows stay
    with the replicas that have them.

    Args:
      terms: takes the parts of the arrays, `[B, S, ...]`, and gives arrays to add up.
      arrays: `[B, T, ...]`; zero-padded to a whole number of chunks.
      most_tokens: of a chunk, B x S.
    """
    chex.assert_equal_shape_prefix(arrays, 2)
    batch, length = arrays[0].shape[:2]
    size = min(length, max(1, most_tokens // batch))

    def chunks(array: Array) -> Array:
        padded = jnp.pad(array, ((0, 0), (0, -length % size), *((0, 0),) * (array.ndim - 2)))
        return jnp.moveaxis(padded.reshape(batch, -1, size, *array.shape[2:]), 1, 0)

    checkpointed = jax.checkpoint(terms)
    _, parts = jax.lax.scan(lambda carry, part: (carry, checkpointed(*part)), None, [chunks(array) for array in arrays])
    total: T = jax.tree.map(lambda part: jnp.sum(part, axis=0), parts)
    return total
