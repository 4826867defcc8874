"""Causal grouped-query attention of new tokens to themselves and to a cache, in blocks.

Array letters: B batch, C rows of a cache, T new tokens, S cache slots, K key/value heads, G query heads per key/value
head, H head dim.

The softmax is accumulated over blocks of keys (FlashAttention, arXiv 2205.14135): for each query the largest score,
the sum of `exp(score - largest)` and the values weighted by it, all float32. Blocks of the cache behind the last
filled slot are not visited, so one compiled program costs what the cache holds and not what it could hold.

A cache is one array, whose blocks a loop visits, or several: *parts*, with keys in tiles. On CPUs, XLA copies each
block of a loop, which takes twice as long as the products with it; a part it reads where it lies.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
from jax import Array

# Above this many queries the [B, K, G, T, T] scores are never formed whole.
MAX_UNBLOCKED_QUERIES = 2048
QUERY_BLOCK = 256
# Slots of the cache whose scores exist at the same time; S is a multiple of it.
KEY_BLOCK = 256
# Slots of a tile of keys, `[H, t]`: few queries are multiplied with it in a third of the time that `[t, H]` takes.
KEY_TILE = 64

# Keys or values of a cache: an array, or parts that follow one another.
Slots = Array | tuple[Array, ...]
_Softmax = tuple[Array, Array, Array]  # largest score [B, K, G, T], sum [B, K, G, T], weighted values [B, K, G, T, H]


class Visible(NamedTuple):
    """Which keys the new tokens see, beside those behind them, which they never do.

    A row may hold a forest of token sequences in depth-first order, so that sequences with a common beginning share
    its tokens. `subtree_ends` then says for each token where its descendants end: token j is an ancestor of token i,
    and visible to it, where `j <= i < subtree_ends[j]`.

        tokens        a b c d e f     a b c, a b d and e f in one row
        subtree_ends  4 4 3 4 6 6     d (at 3) sees a, b and itself, but not c

    Padding must see itself too.

    Attributes:
      subtree_ends: `[B, T]` int32; None for one sequence a row.
      window: each token sees at most so many, itself among them; None for all before it.
      positions: `[B, T]` int32, the tokens' own, counted from the first one in the caches. Only a window needs them.
    """

    subtree_ends: Array | None = None
    window: int | None = None
    positions: Array | None = None


ALL_BEFORE = Visible()


class _Scores(NamedTuple):
    scale: float
    soft_cap: float | None


def causal_attention(
    q: Array,
    k: Array,
    v: Array,
    visible: Visible = ALL_BEFORE,
    caches: Sequence[tuple[Slots, Slots, Array]] = (),
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Array:
    """Attends from each new token to itself, to those before it, and to all that is in the caches.

    Args:
      q: `[B, T, K, G, H]` queries, already rotated.
      k: `[B, T, K, H]` keys of the new tokens.
      v: `[B, T, K, H]` values of the new tokens.
      visible: which of these each token sees.
      caches: each keys and values `[C, K, S, H]` and how many slots of each row are filled, `[C]` int32. C divides B:
        a row is that of B / C neighbours. S is a multiple of `KEY_BLOCK`, or less. With a window, those of each cache
        follow on those of the one before. Parts are tuples of values `[C, K, S, H]`, whose S are multiples of
        `KEY_TILE`, and of keys `[C, K, S / KEY_TILE, H, KEY_TILE]`.
      scale: multiplies the scores; None for `H**-0.5`.
      soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`; None for none.

    Returns:
      `[B, T, K, G, H]` in the dtype of `q`.
    """
    B, T, K, _, H = q.shape
    chex.assert_shape([k, v], (B, T, K, H))
    for given in (visible.subtree_ends, visible.positions):
        if given is not None:
            chex.assert_shape(given, (B, T))
    for keys, values, filled in caches:
        chex.assert_is_divisible(B, filled.shape[0])
        if isinstance(keys, tuple):
            for tiles, part in zip(keys, values, strict=True):
                chex.assert_shape(part, (*filled.shape, K, None, H))
                chex.assert_shape(tiles, (*filled.shape, K, part.shape[2] // KEY_TILE, H, KEY_TILE))
        else:
            chex.assert_shape([keys, values], (*filled.shape, K, None, H))
    scores = _Scores(H**-0.5 if scale is None else scale, soft_cap)
    # Heads lead, so that heads that are divided over devices stay so when T is merged with another axis.
    q, k, v = q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)
    softmax = _over_new_tokens(scores, q, k, v, visible)
    before = jnp.zeros((1,), jnp.int32)  # how many tokens the caches in front hold
    for cache in caches:
        softmax = _over_cache(scores, q, softmax, *cache, visible, before)
        before = _repeated(before, cache[2].shape[0]) + cache[2]
    _, total, out = softmax
    return (out / total[..., None]).astype(q.dtype).transpose(0, 3, 1, 2, 4)


def _over_new_tokens(scores: _Scores, q: Array, k: Array, v: Array, visible: Visible) -> _Softmax:
    T = q.shape[3]
    subtree_ends, window, positions = visible

    def block(q: Array, start: Array | int, keys: int) -> _Softmax:
        """Queries from `start` on, over the first `keys` keys."""
        queries, slots = start + jnp.arange(q.shape[3])[:, None], jnp.arange(keys)
        seen = (slots <= queries)[None]
        if subtree_ends is not None:
            seen &= queries < subtree_ends[:, None, :keys]
        if window is not None:
            assert positions is not None
            # Not slots: those of a forest are no positions.
            own = jnp.take(positions, queries[:, 0], axis=1, mode="clip")
            seen &= own[:, :, None] - positions[:, None, :keys] < window
        nothing = jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
        empty = nothing, jnp.zeros_like(nothing), jnp.zeros(q.shape, jnp.float32)
        return _over_keys(scores, empty, q, k[:, :, :keys], v[:, :, :keys], seen)

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


def _repeated(counts: Array, rows: int) -> Array:
    return jnp.repeat(counts, rows // counts.shape[0])


def _over_cache(
    scores: _Scores,
    q: Array,
    softmax: _Softmax,
    k: Slots,
    v: Slots,
    filled: Array,
    visible: Visible,
    before: Array,
) -> _Softmax:
    """Adds a cache to the softmax; `before` is how many tokens those in front of it hold, row by row of theirs."""
    B, K, G, T = q.shape[:4]
    C = filled.shape[0]
    window, positions = visible.window, visible.positions
    own = None  # of the queries, counted from the first slot of this cache, [C, queries]
    if window is not None:
        assert positions is not None
        own = (positions - _repeated(before, B)[:, None]).reshape(C, B // C * T)
    shared = C < B
    if shared:  # one long row of queries for each row of the cache, so that its keys are read once

        def joined(part: Array) -> Array:
            part = jnp.moveaxis(part.reshape(C, B // C, *part.shape[1:]), 1, 3)
            return part.reshape(C, K, G, B // C * T, *part.shape[5:])

        q, (largest, total, out) = joined(q), map(joined, softmax)
        softmax = largest, total, out

    first = 0 if window is None or own is None else jnp.maximum(jnp.min(own) - window + 1, 0)
    end = jnp.max(filled)

    def seen(start: Array | int, count: int) -> Array:
        slots = start + jnp.arange(count)
        seen = slots < filled[:, None, None]
        if window is not None and own is not None:
            seen &= own[:, :, None] - slots < window
        return seen

    if isinstance(k, tuple) and isinstance(v, tuple):
        slots = sum(part.shape[2] for part in v)
        result = _over_parts(scores, softmax, q, k, v, seen(0, slots), first, end)
    else:
        k, v = cast("tuple[Array, Array]", (k, v))
        size = min(KEY_BLOCK, k.shape[2])

        def step(i: Array | int, softmax: _Softmax) -> _Softmax:
            k_block, v_block = (jax.lax.dynamic_slice_in_dim(part, i * size, size, axis=2) for part in (k, v))
            return _over_keys(scores, softmax, q, k_block, v_block, seen(i * size, size))

        if size == k.shape[2]:
            result = step(0, softmax)
        else:
            result = jax.lax.fori_loop(first // size, (end + size - 1) // size, step, softmax)
    if shared:

        def apart(part: Array) -> Array:
            part = jnp.moveaxis(part.reshape(C, K, G, B // C, T, *part.shape[4:]), 3, 1)
            return part.reshape(B, K, G, T, *part.shape[5:])

        largest, total, out = map(apart, result)
        return largest, total, out
    return result


def _over_keys(how: _Scores, softmax: _Softmax, q: Array, k: Array, v: Array, visible: Array) -> _Softmax:
    """Adds keys and values `[B, K, S, H]` to the softmax of `q [B, K, G, T, H]`; `visible [B, T, S]`."""
    scores = jnp.einsum("bkqh,bksh->bkqs", _merged(q), k, preferred_element_type=jnp.float32)
    return _accumulate(how, softmax, scores, v, visible)


def _over_parts(
    how: _Scores,
    softmax: _Softmax,
    q: Array,
    k: tuple[Array, ...],
    v: tuple[Array, ...],
    visible: Array,
    first: Array | int,
    end: Array,
) -> _Softmax:
    """Adds a cache in parts, of which slots before `first` and from `end` on are visible to no query."""
    merged = _merged(q)
    B, K, Q, H = merged.shape

    def add(softmax: _Softmax, tiles: Array, part: Array, visible: Array) -> _Softmax:
        # Not "bkqnt": XLA's fast product of matrices takes no other order of axes than that of its operands.
        each = jnp.broadcast_to(merged[:, :, None], (B, K, tiles.shape[2], Q, H))
        scores = jnp.einsum("bknqh,bknht->bknqt", each, tiles, preferred_element_type=jnp.float32)
        scores = scores.swapaxes(2, 3).reshape(B, K, Q, -1)
        return _accumulate(how, softmax, scores, part, visible)

    start = 0
    for tiles, part in zip(k, v, strict=True):
        stop = start + part.shape[2]
        needed = (start < end) & (first < stop)
        operands = softmax, tiles, part, visible[..., start:stop]
        softmax = jax.lax.cond(needed, add, lambda softmax, *_: softmax, *operands)
        start = stop
    return softmax


def _merged(q: Array) -> Array:
    """`[B, K, G, T, H]` with G and T as one axis: one large matrix product a head instead of G small ones."""
    return q.reshape(*q.shape[:2], -1, q.shape[-1])


def _accumulate(how: _Scores, softmax: _Softmax, scores: Array, v: Array, visible: Array) -> _Softmax:
    """Adds keys with `scores [B, K, G * T, S]` and values `[B, K, S, H]` to a softmax; `visible [B, T, S]`."""
    old_largest, total, out = softmax
    B, K, G, T, _ = out.shape
    scores = (scores * how.scale).reshape(B, K, G, T, -1)
    if how.soft_cap is not None:
        scores = how.soft_cap * jnp.tanh(scores / how.soft_cap)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    largest = jnp.maximum(old_largest, jnp.max(scores, axis=-1))  # finite: a token sees itself
    weights = jnp.exp(scores - largest[..., None])
    scale = jnp.exp(old_largest - largest)
    total = total * scale + jnp.sum(weights, axis=-1)
    weights = weights.reshape(B, K, G * T, -1).astype(v.dtype)
    added = jnp.einsum("bkqs,bksh->bkqh", weights, v, preferred_element_type=jnp.float32).reshape(out.shape)
    return largest, total, out * scale[..., None] + added
