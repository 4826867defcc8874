"""On one CPU the decoder runs as programs of one layer each, which give what the whole one gives."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compiled
from flax import nnx
from numpy.typing import NDArray
from tiny_families import CONFIGS
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.huggingface.config import read_config
from gluprune_jax.inference import generation
from gluprune_jax.inference.engine import Engine, rows, whole_rows
from gluprune_jax.inference.generation import generate
from gluprune_jax.inference.host_loop import HostLoop
from gluprune_jax.inference.lookup import DRAFT
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


@pytest.mark.parametrize("name", ["llama with biases", "gemma3", "smollm3", "granite"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_host_decodes_what_the_device_does(name: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, and with drafts: prompts and answers are longer than a window, and repeat themselves."""
    model = Decoder(config_of(name), rngs=nnx.Rngs(1))
    prompts = [TOKENS[0, :100].tolist(), TOKENS[0, 5:9].tolist() * 9, [7]]
    options: dict[str, Any] = {"max_new_tokens": 60, "temperature": temperature, "top_p": 0.9, "seed": 3}
    widths: list[int] = []
    run = HostLoop._run

    def seen(loop: HostLoop, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        widths.append(tokens.shape[1])
        return run(loop, tokens)

    monkeypatch.setattr(HostLoop, "_run", seen)
    one_by_one = generate(model, prompts, prompt_lookup=False, **options)
    assert set(widths) == {1}
    found = generate(model, prompts, **options)
    assert set(widths) == ({1, 1 + DRAFT} if temperature == 0 else {1})
    monkeypatch.setattr(generation, "runs_by_layers", lambda: False)
    assert generate(model, prompts, **options) == one_by_one == found


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
            engine.generate([[1, 2, 3], [4] * 9], max_new_tokens=20, temperature=1)
        names = [name for name, _ in programs]
        found[widths] = {name: names.count(name) for name in ("run_layer", "follow", "decode")}
    one, deep, two = found.values()
    assert one == deep
    assert one["run_layer"] > 0
    assert one["decode"] == 0
    assert two == {**one, "run_layer": 2 * one["run_layer"]}
