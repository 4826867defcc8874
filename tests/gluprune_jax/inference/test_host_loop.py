"""What one CPU keeps of the sequences that it decodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_models import hf_config

from convert.huggingface.config import read_config
from gluprune_jax.inference.host_loop import PART, SLOTS_IN_PARTS, empty_cache, write
from gluprune_jax.models.cache import LayerCache, to_tiles

CONFIG, _ = read_config(hf_config(num_hidden_layers=1))
K, H = CONFIG.num_key_value_heads, CONFIG.head_dim
SIZE = 3 * PART


def layer_of(size: int, keys: NDArray[np.float32], values: NDArray[np.float32]) -> LayerCache:
    """A layer of `empty_cache` that holds these, `[2, K, size, H]`."""
    v = empty_cache(CONFIG, len(keys), size, jnp.float32).layers[0].v
    if not isinstance(v, tuple):
        return LayerCache(jnp.asarray(keys), jnp.asarray(values))
    cuts = np.cumsum([part.shape[2] for part in v])[:-1].tolist()
    parts = [tuple(jnp.asarray(part) for part in np.split(whole, cuts, axis=2)) for whole in (keys, values)]
    return LayerCache(tuple(map(to_tiles, parts[0])), parts[1])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, SIZE + 3), min_size=2, max_size=2), st.sampled_from([1, 6]), st.integers(0, 9))
def test_tokens_are_written_where_they_belong(first: list[int], T: int, seed: int) -> None:
    """Into one part, over a border, behind the end (nowhere); parts that no row reaches are the same arrays."""
    rng = np.random.default_rng(seed)
    whole, new = rng.standard_normal((2, 2, K, SIZE, H)), rng.standard_normal((2, 2, K, T, H))
    whole, new = whole.astype(np.float32), new.astype(np.float32)
    before = layer_of(SIZE, *whole)
    assert isinstance(before.v, tuple)
    untouched = [
        all(at >= end or at + T <= start for at in first)
        for start, end in ((n * PART, (n + 1) * PART) for n in range(3))
    ]
    kept = list(before.v)
    found = write(before, LayerCache(*map(jnp.asarray, new)), np.array(first, np.int32))

    for row, at in enumerate(first):
        fits = max(0, min(T, SIZE - at))
        whole[:, row, :, at : at + fits] = new[:, row, :, :fits]
    wanted = layer_of(SIZE, *whole)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert isinstance(found.v, tuple)
    assert [a is b for a, b in zip(found.v, kept, strict=True)] == untouched


@pytest.mark.parametrize("at", [0, 7, SLOTS_IN_PARTS])
def test_long_slots_are_written_whole(at: int) -> None:
    size = 2 * SLOTS_IN_PARTS
    whole, new = np.zeros((2, 2, K, size, H), np.float32), np.ones((2, 2, K, 6, H), np.float32)
    found = write(layer_of(size, *whole), LayerCache(*map(jnp.asarray, new)), np.array([at, 3], np.int32))
    whole[:, 0, :, at : at + 6] = whole[:, 1, :, 3:9] = 1
    np.testing.assert_array_equal(found.k, whole[0])
    np.testing.assert_array_equal(found.v, whole[1])
