"""Causal grouped-query attention whose memory does not grow with the square of the length.

Array letters: B batch, T queries, S keys, K key/value heads, G query heads per key/value head, H head dim.
"""

import jax
import jax.numpy as jnp
from jax import Array

# Above this many queries the [B, K, G, T, S] scores are never formed whole.
MAX_UNBLOCKED_QUERIES = 2048
QUERY_BLOCK = 256


def causal_attention(q: Array, k: Array, v: Array, positions: Array) -> Array:
    """Attends from each query to the keys at its own position and before.

    Softmax is computed in float32. Up to 2,048 queries the scores are one array; above, queries are taken in
    blocks of 256, so that the largest array is `[B, K, G, 256, S]`.

    Args:
      q: `[B, T, K, G, H]` queries, already rotated.
      k: `[B, S, K, H]` keys; the slot index along S is the position of the key.
      v: `[B, S, K, H]` values.
      positions: `[B, T]` int32, the position of each query. Slots after it are masked out, so a cache that is
        longer than what has been written needs no other mask.

    Returns:
      `[B, T, K, G, H]` in the dtype of `q`.
    """
    B, T = positions.shape
    if T <= MAX_UNBLOCKED_QUERIES:
        return _attend(q, k, v, positions)

    blocks = -(-T // QUERY_BLOCK)
    padding = blocks * QUERY_BLOCK - T
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0), (0, 0)))
    positions = jnp.pad(positions, ((0, 0), (0, padding)))
    q_blocks = q.reshape(B, blocks, QUERY_BLOCK, *q.shape[2:]).swapaxes(0, 1)
    position_blocks = positions.reshape(B, blocks, QUERY_BLOCK).swapaxes(0, 1)
    out: Array = jax.lax.map(lambda block: _attend(block[0], k, v, block[1]), (q_blocks, position_blocks))
    return out.swapaxes(0, 1).reshape(q.shape)[:, :T]


def _attend(q: Array, k: Array, v: Array, positions: Array) -> Array:
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    visible = jnp.arange(k.shape[1]) <= positions[:, None, None, :, None]  # [B, 1, 1, T, S]
    probabilities = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", probabilities.astype(v.dtype), v)
