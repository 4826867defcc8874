"""On one CPU the decoder runs as programs of one layer each, which give what the whole one gives."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compiled
from flax import nnx
from tiny_families import CONFIGS
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.huggingface.config import read_config
from gluprune_jax.inference.engine import Engine, rows, whole_rows
from gluprune_jax.inference.generation import (
    Sampling,
    admit,
    decode,
    empty_state,
    last_hidden,
    store,
    whole_admit,
    whole_decode,
)
from gluprune_jax.inference.prefill import append, extend, whole_extend
from gluprune_jax.models.cache import KVCache
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder

TOKENS = np.random.default_rng(0).integers(1, 256, (1, 128)).astype(np.int32)


def config_of(name: str) -> ModelConfig:
    """Of a family, with two widths of which neighbours differ."""
    config, _ = read_config(CONFIGS[name])
    return dataclasses.replace(config, intermediate_sizes=(96, 64, 96, 64))


def assert_equal(found: object, expected: object) -> None:
    """To rounding: where a layer ends, XLA may fuse a product and a sum or not. Integers are equal."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "is_masked"),
    [("llama with biases", False), ("gemma3", True), ("smollm3", True), ("granite", False), ("phi3, long rows", False)],
)
def test_layer_by_layer_is_the_whole_decoder(name: str, is_masked: bool) -> None:
    config = config_of(name)
    params = nnx.state(Decoder(config, rngs=nnx.Rngs(1)), nnx.Param)
    masks = tuple((np.arange(width) % 3 > 0).astype(np.float32) for width in config.stored_intermediate_sizes)
    given = masks if is_masked else None
    cache = KVCache.empty(config, 1, 512, "float32")

    hidden, new = extend(config, params, cache, TOKENS, given)
    assert_equal((hidden, new), whole_extend(config, params, cache, TOKENS, given))
    cache = append(cache, new, np.array([100], np.int32))
    assert_equal(extend(config, params, cache, TOKENS, given), whole_extend(config, params, cache, TOKENS, given))

    tokens = TOKENS.reshape(2, 64)  # two rows, each of two sequences that share their first 20 tokens
    positions = np.array([[*range(100, 142), *range(120, 142)]] * 2, np.int32)
    ends = np.array([[64] * 20 + [42] * 22 + [64] * 22] * 2, np.int32)
    forest = config, params, cache, *map(jnp.asarray, (tokens, positions, ends)), masks
    assert_equal(rows(*forest), whole_rows(*forest))

    sampling = Sampling(np.full(8, -1, np.int32), np.float32(0.7), np.float32(0.9), np.uint32(3))

    def decoded(*, whole: bool) -> list[object]:
        state, last = empty_state(config, 2, 512, "float32"), last_hidden(hidden, np.array([99]))
        states: list[object] = []
        for slot in (0, 1):
            puts = whole_admit if whole else admit
            numbers = np.array([slot], np.int32), np.array([slot + 5], np.int32), np.int32(20 - 9 * slot)
            state, token = puts(config, params, state, cache, last, *numbers, sampling)
            states.append(token)
        for _ in range(2):  # the first sequence ends in the second call, the other one in the first
            step = whole_decode if whole else decode
            state, recent, out = step(config, params, state, sampling, given)
            runs = np.asarray(state.remaining) > 0  # of the others, the last token and what is cached are not used
            states += [*map(np.array, (out, state.remaining, state.cache.lengths)), np.where(runs, state.token, -1)]
            states += [np.asarray(leaf)[runs] for leaf in jax.tree.leaves(recent.layers)]
            state = store(state, recent)
        return states

    assert_equal(decoded(whole=False), decoded(whole=True))


def test_a_deeper_model_needs_no_more_programs(tmp_path: Path) -> None:
    """Of layers that are alike; one whose width differs is compiled for itself."""
    found = {}
    for depth, widths in ((2, (80, 80)), (6, (80,) * 6), (4, (80, 40, 80, 40))):
        config = hf_config(num_hidden_layers=depth, vocab_size=110 + depth)  # of its own: nothing is compiled yet
        folder = write_folder(tmp_path / str(depth), config, hf_tensors(config))
        model = convert.load(folder).model
        if len(set(widths)) > 1:
            model = Decoder(dataclasses.replace(model.config, intermediate_sizes=widths), rngs=nnx.Rngs(0))
        engine = Engine(model)
        with compiled() as programs:
            engine.loglikelihood([([1, 2, 3], [4]), ([5] * 30, [6, 7])])
            engine.generate([[1, 2, 3], [4] * 9], max_new_tokens=20)
        names = [name for name, _ in programs]
        found[widths] = {name: names.count(name) for name in ("run_layer", "decode_layer", "end_step", "whole_decode")}
    one, deep, two = found.values()
    assert one == deep
    assert one["decode_layer"] == 1
    assert one["whole_decode"] == 0
    assert two == {**one, **{name: 2 * one[name] for name in ("run_layer", "decode_layer")}}
