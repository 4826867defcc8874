"""The compiled loop changes its cache in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import hf_config

from convert.huggingface.config import read_config
from gluprune_jax.inference.device_loop import admit, decode, empty_state
from gluprune_jax.inference.sampling import Sampling
from gluprune_jax.models.cache import KVCache
from gluprune_jax.models.parameters import abstract_model


@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize("program", ["admit", "decode"])
@pytest.mark.parametrize("temperature", [0, 1], ids=["greedy", "drawn"])
def test_the_cache_is_not_copied(temperature: float, slots: int, program: str) -> None:
    """Temporary memory does not grow with the cache, which is changed in place."""
    config, _ = read_config(hf_config(max_position_embeddings=65536, num_hidden_layers=2))
    params = nnx.state(abstract_model(config), nnx.Param)
    sampling = Sampling.of((), temperature, 1, 0)
    prompt = jax.eval_shape(lambda: KVCache.empty(config, 1, 2560, jnp.float32))
    hidden = jax.ShapeDtypeStruct((1, config.hidden_size), jnp.float32)
    temporary = []
    for cache_slots in (8192, 16384):
        state = jax.eval_shape(lambda size=cache_slots: empty_state(config, slots, size, jnp.float32))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache.layers))
        if program == "admit":
            numbers = (*np.zeros((2, 1), np.int32), np.int32(9))
            lowered = admit.lower(config, params, state, prompt, hidden, *numbers, sampling)
        else:
            lowered = decode.lower(config, params, state, sampling, None)
        memory = lowered.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= size
        assert memory.temp_size_in_bytes < size / 8
        temporary.append(memory.temp_size_in_bytes)
    assert temporary[1] < 1.01 * temporary[0]
