"""What one CPU keeps of the sequences that it decodes, against one array of each layer."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_models import hf_config

from convert.huggingface.config import read_config
from gluprune_jax.inference.host_cache import PART, TOKENS_IN_PARTS, HostCache
from gluprune_jax.models.cache import LayerCache

CONFIG, _ = read_config(hf_config(num_hidden_layers=2))
LAYERS, K, H = CONFIG.num_hidden_layers, CONFIG.num_key_value_heads, CONFIG.head_dim
PARTS = 3
SIZE = PARTS * PART


def whole(cache: HostCache) -> NDArray[np.float32]:
    """`[L, 2, B, K, S, H]`, all that it holds."""

    def joined(k: Any, v: Any) -> tuple[Any, Any]:
        if not isinstance(k, tuple):
            return k, v
        keys = [np.swapaxes(tiles, 3, 4).reshape(part.shape) for tiles, part in zip(k, v, strict=True)]
        return np.concatenate(keys, axis=2), np.concatenate(v, axis=2)

    return np.array([joined(*layer) for layer in cache.layers])


def of_prompt(rng: np.random.Generator, rows: int, count: int) -> NDArray[np.float32]:
    return rng.standard_normal((LAYERS, 2, rows, K, count, H), dtype=np.float32)


def layers_of(values: NDArray[np.float32]) -> tuple[LayerCache, ...]:
    return tuple(LayerCache(jnp.asarray(k), jnp.asarray(v)) for k, v in values)


def reached(cache: HostCache) -> list[bool]:
    """Which parts take memory of their own."""
    values = [layer.v for layer in cache.layers]
    assert all(isinstance(parts, tuple) for parts in values)
    shared = [len({id(part) for part in parts}) < LAYERS for parts in zip(*values, strict=True)]
    return [not is_shared for is_shared in shared]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, SIZE - 8), min_size=4, max_size=4),
    st.lists(st.tuples(st.sampled_from([1, 6]), st.sets(st.integers(0, 3))), max_size=4),
    st.sampled_from([[2, 0], [3], [1, 3, 0, 2]]),
)
def test_tokens_lie_where_they_belong(lengths: list[int], writes: list[tuple[int, set[int]]], kept: list[int]) -> None:
    """Prompts, tokens behind them within a part, over a border or over the end, and then some of the rows."""
    rng, cache = np.random.default_rng(lengths[0]), HostCache(CONFIG, 4, SIZE, jnp.float32)
    assert not any(reached(cache))
    expected = np.zeros((LAYERS, 2, 4, K, SIZE, H), np.float32)
    for row, length in enumerate(lengths):
        prompt = of_prompt(rng, 1, SIZE + 64)
        cache.fill(row, layers_of(prompt), length)
        expected[:, :, row, :, :length] = prompt[:, :, 0, :, :length]
    assert reached(cache) == [max(lengths) > n * PART for n in range(PARTS)]
    ends = list(lengths)
    for T, rows in writes:
        new = of_prompt(rng, 4, T)
        cache.write(layers_of(new), np.array([ends[row] if row in rows else SIZE for row in range(4)], np.int32))
        for row in rows:
            count = min(T, SIZE - ends[row])
            expected[:, :, row, :, ends[row] : ends[row] + count] = new[:, :, row, :, :count]
            ends[row] += count
    found = whole(cache)
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(found[:, :, row, :, :end], expected[:, :, row, :, :end])

    longest = max(ends[row] for row in kept)
    cache.keep(np.array(kept), longest)
    assert reached(cache) == [longest > n * PART for n in range(PARTS)]
    found = whole(cache)
    assert found.shape[2] == len(kept)
    for row, old in enumerate(kept):
        np.testing.assert_array_equal(found[:, :, row, :, : ends[old]], expected[:, :, old, :, : ends[old]])


@pytest.mark.parametrize("at", [0, PART - 6, PART - 5, PART - 1, PART, 2 * PART - 3, SIZE - 2, SIZE])
def test_nothing_else_is_written(at: int) -> None:
    """Six tokens of each row: of the second one within the first part, of the first one anywhere."""
    cache, new = HostCache(CONFIG, 2, SIZE, jnp.float32), of_prompt(np.random.default_rng(at), 2, 6)
    cache.write(layers_of(new), np.array([at, 3], np.int32))
    expected = np.zeros((LAYERS, 2, 2, K, SIZE, H), np.float32)
    expected[:, :, 0, :, at : at + 6] = new[:, :, 0, :, : SIZE - at]
    expected[:, :, 1, :, 3:9] = new[:, :, 1]
    np.testing.assert_array_equal(whole(cache), expected)
    assert reached(cache) == [n == 0 or (at < (n + 1) * PART and at + 6 > n * PART) for n in range(PARTS)]


@pytest.mark.parametrize("at", [0, 7, TOKENS_IN_PARTS])
def test_long_sequences_lie_in_one_array(at: int) -> None:
    size, rng = 2 * TOKENS_IN_PARTS, np.random.default_rng(at)
    cache = HostCache(CONFIG, 2, size, jnp.float32)
    assert not isinstance(cache.layers[0].k, tuple)
    prompt, new = of_prompt(rng, 1, 512), of_prompt(rng, 2, 6)
    cache.fill(1, layers_of(prompt), 300)
    cache.write(layers_of(new), np.array([at, 300], np.int32))
    found = whole(cache)
    np.testing.assert_array_equal(found[:, :, 0, :, at : at + 6], new[:, :, 0])
    np.testing.assert_array_equal(found[:, :, 1, :, :300], prompt[:, :, 0, :, :300])
    np.testing.assert_array_equal(found[:, :, 1, :, 300:306], new[:, :, 1])


def test_what_no_sequence_has_reached_is_never_written() -> None:
    """The zeros that all layers share."""
    cache = HostCache(CONFIG, 2, SIZE, jnp.float32)
    shared = cache.layers[0].v[0]
    cache.write(layers_of(of_prompt(np.random.default_rng(0), 2, 6)), np.array([PART - 3, SIZE], np.int32))
    assert not np.asarray(shared).any()
    assert cache.layers[1].v[2] is shared
