"""Causal grouped-query attention of new tokens to themselves and to a cache, in blocks.

Array letters: B batch, C rows of a cache, T new tokens, S cache slots, K key/value heads, G query heads per key/value
head, H head dim.

The softmax is accumulated over blocks of keys (FlashAttention, arXiv 2205.14135): for each query the largest score,
the sum of `exp(score - largest)` and the values weighted by it, all float32. Blocks of the cache behind the last
filled slot are not visited, so one compiled program costs what the cache holds and not what it could hold.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

# Above this many queries the [B, K, G, T, T] scores are never formed whole.
MAX_UNBLOCKED_QUERIES = 2048
QUERY_BLOCK = 256
# Slots of the cache whose scores exist at the same time; S is a multiple of it.
KEY_BLOCK = 256

_Softmax = tuple[Array, Array, Array]  # largest score [B, K, G, T], sum [B, K, G, T], weighted values [B, K, G, T, H]


def causal_attention(
    q: Array,
    k: Array,
    v: Array,
    subtree_ends: Array | None = None,
    caches: Sequence[tuple[Array, Array, Array]] = (),
) -> Array:
    """Attends from each new token to itself, to those before it, and to all that is in the caches.

    A row may hold a forest of token sequences in depth-first order, so that sequences with a common beginning share
    its tokens. `subtree_ends` then says for each token where its descendants end: token j is an ancestor of token i,
    and visible to it, where `j <= i < subtree_ends[j]`.

        tokens        a b c d e f     a b c, a b d and e f in one row
        subtree_ends  4 4 3 4 6 6     d (at 3) sees a, b and itself, but not c

    Padding must see itself too.

    Args:
      q: `[B, T, K, G, H]` queries, already rotated.
      k: `[B, T, K, H]` keys of the new tokens.
      v: `[B, T, K, H]` values of the new tokens.
      subtree_ends: `[B, T]` int32; None for one sequence a row.
      caches: each keys and values `[C, K, S, H]` and how many slots of each row are filled, `[C]` int32. C divides B:
        a row is that of B / C neighbours. S is a multiple of `KEY_BLOCK`, or less.

    Returns:
      `[B, T, K, G, H]` in the dtype of `q`.
    """
    # Heads lead, so that heads that are divided over devices stay so when T is merged with another axis.
    q, k, v = q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)
    softmax = _over_new_tokens(q, k, v, subtree_ends)
    for cache in caches:
        softmax = _over_cache(q, softmax, *cache)
    _, total, out = softmax
    return (out / total[..., None]).astype(q.dtype).transpose(0, 3, 1, 2, 4)


def _over_new_tokens(q: Array, k: Array, v: Array, subtree_ends: Array | None) -> _Softmax:
    T = q.shape[3]

    def block(q: Array, start: Array | int, keys: int) -> _Softmax:
        """Queries from `start` on, over the first `keys` keys."""
        queries, slots = start + jnp.arange(q.shape[3])[:, None], jnp.arange(keys)
        visible = (slots <= queries)[None]
        if subtree_ends is not None:
            visible &= queries < subtree_ends[:, None, :keys]
        nothing = jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
        empty = nothing, jnp.zeros_like(nothing), jnp.zeros(q.shape, jnp.float32)
        return _accumulate(empty, q, k[:, :, :keys], v[:, :, :keys], visible)

    if T <= MAX_UNBLOCKED_QUERIES:
        # The later half of the keys is invisible to the earlier half of the queries: four blocks save 3/8 of the work.
        size = -(-T // 4) if T >= QUERY_BLOCK else T
        parts = [block(q[:, :, :, i : i + size], i, min(i + size, T)) for i in range(0, T, size)]
        largest, total, out = (jnp.concatenate(part, axis=3) for part in zip(*parts, strict=True))
        return largest, total, out

    blocks = -(-T // QUERY_BLOCK)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, blocks * QUERY_BLOCK - T), (0, 0)))
    q = jnp.moveaxis(q.reshape(*q.shape[:3], blocks, QUERY_BLOCK, q.shape[4]), 3, 0)
    parts = jax.lax.map(lambda part: block(part[0], part[1], T), (q, QUERY_BLOCK * jnp.arange(blocks)))

    def whole(part: Array) -> Array:
        part = jnp.moveaxis(part, 0, 3)
        return part.reshape(*part.shape[:3], -1, *part.shape[5:])[:, :, :, :T]

    largest, total, out = map(whole, parts)
    return largest, total, out


def _over_cache(q: Array, softmax: _Softmax, k: Array, v: Array, filled: Array) -> _Softmax:
    B, K, G, T = q.shape[:4]
    C = k.shape[0]
    shared = C < B
    if shared:  # one long row of queries for each row of the cache, so that its keys are read once

        def joined(part: Array) -> Array:
            part = jnp.moveaxis(part.reshape(C, B // C, *part.shape[1:]), 1, 3)
            return part.reshape(C, K, G, B // C * T, *part.shape[5:])

        q, (largest, total, out) = joined(q), map(joined, softmax)
        softmax = largest, total, out

    size = min(KEY_BLOCK, k.shape[2])

    def step(i: Array | int, softmax: _Softmax) -> _Softmax:
        k_block, v_block = (jax.lax.dynamic_slice_in_dim(part, i * size, size, axis=2) for part in (k, v))
        visible = i * size + jnp.arange(size) < filled[:, None, None]
        return _accumulate(softmax, q, k_block, v_block, visible)

    if size == k.shape[2]:
        result = step(0, softmax)
    else:
        result = jax.lax.fori_loop(0, (jnp.max(filled) + size - 1) // size, step, softmax)
    if shared:

        def apart(part: Array) -> Array:
            part = jnp.moveaxis(part.reshape(C, K, G, B // C, T, *part.shape[4:]), 3, 1)
            return part.reshape(B, K, G, T, *part.shape[5:])

        largest, total, out = map(apart, result)
        return largest, total, out
    return result


def _accumulate(softmax: _Softmax, q: Array, k: Array, v: Array, visible: Array) -> _Softmax:
    """Adds keys and values `[B, K, S, H]` to the softmax of `q [B, K, G, T, H]`; `visible [B, T, S]`."""
    B, K, G, T, H = q.shape
    # G and T as one axis: one large matrix product a head instead of G small ones.
    scores = jnp.einsum("bkqh,bksh->bkqs", q.reshape(B, K, G * T, H), k, preferred_element_type=jnp.float32)
    scores = (scores * H**-0.5).reshape(B, K, G, T, -1)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    old_largest, total, out = softmax
    largest = jnp.maximum(old_largest, jnp.max(scores, axis=-1))  # finite: a token sees itself
    weights = jnp.exp(scores - largest[..., None])
    scale = jnp.exp(old_largest - largest)
    weighted = jnp.einsum(
        "bkqs,bksh->bkqh",
        weights.reshape(B, K, G * T, -1).astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    total = total * scale + jnp.sum(weights, axis=-1)
    return largest, total, out * scale[..., None] + weighted.reshape(out.shape)
