"""Tokens are drawn with the probabilities that a plain computation of them gives."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.typing import NDArray
from tiny_models import hf_config, write_folder

import convert
from gluprune_jax.inference.generation import generate
from gluprune_jax.inference.sampling import Sampling, choose


def check_distribution(drawn: NDArray[np.int32], probabilities: NDArray[np.float64]) -> None:
    """Pearson's statistic lies within five of its standard deviations; what has no probability is never drawn."""
    counts = np.bincount(drawn, minlength=len(probabilities))
    possible = probabilities > 0
    assert not counts[~possible].any()
    wanted = probabilities[possible] * len(drawn)
    freedom = possible.sum() - 1
    assert ((counts[possible] - wanted) ** 2 / wanted).sum() <= freedom + 5 * np.sqrt(2 * freedom)


def nucleus(logits: NDArray[np.float64], temperature: float, top_p: float) -> NDArray[np.float64]:
    """Probabilities of the smallest set of likeliest tokens that holds `top_p`, one token at a time."""
    weights = np.exp((logits - logits.max()) / temperature)
    weights /= weights.sum()
    kept, total = np.zeros_like(weights), 0.0
    for token in np.argsort(-weights):
        if total >= top_p:
            break
        kept[token] = weights[token]
        total += weights[token]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "draws"), [(0, False), (1e-60, False), (1e-39, False), (1e-37, True), (0.5, True), (1e300, True)]
)
def test_programs_that_take_the_likeliest_cannot_draw(temperature: float, draws: bool) -> None:
    """Temperatures that processors round to 0 are none."""
    with np.errstate(over="ignore"):
        sampling = Sampling.of([1, 2], temperature, 0.5, 3)
    zeros = np.zeros(4, np.int32)
    program = str(jax.make_jaxpr(choose)(np.zeros((4, 12), np.float32), sampling, zeros, zeros))
    assert ("random_bits" in program) == (" sort[" in program) == draws


NUCLEI = [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.9), (1.0, 0.5), (0.7, 0.3), (3.0, 0.99)]


@pytest.mark.parametrize(("temperature", "top_p"), NUCLEI)
def test_tokens_are_drawn_with_their_probabilities(temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(0).standard_normal(12)
    draws = 20000
    sampling = Sampling(np.array([-1]), temperature, top_p, np.uint32(3))
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, 12))
    numbers, positions = np.divmod(np.arange(draws, dtype=np.int32), 100)
    drawn = np.asarray(jax.jit(choose)(rows, sampling, numbers, positions))
    assert drawn.dtype == np.int32
    check_distribution(drawn, nucleus(logits, temperature, top_p))


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_first_tokens_follow_the_model(tmp_path: Path, top_p: float) -> None:
    """And second ones: those after the likeliest first one."""
    config = hf_config(vocab_size=5, num_hidden_layers=1)
    model = convert.load(write_folder(tmp_path, config)).model
    prompt = [3, 1, 4, 1]
    drawn = np.array(generate(model, [prompt] * 400, max_new_tokens=2, temperature=4.0, top_p=top_p, seed=7))

    all_logits = nnx.jit(lambda model, tokens: model.logits(model(tokens)[0]))

    def logits_after(tokens: list[int]) -> NDArray[np.float64]:
        padded = np.array([[*tokens, *[0] * (5 - len(tokens))]])
        return np.asarray(all_logits(model, padded)[0, len(tokens) - 1], np.float64)

    check_distribution(drawn[:, 0], nucleus(logits_after(prompt), 4.0, top_p))
    first = np.bincount(drawn[:, 0]).argmax()
    check_distribution(drawn[drawn[:, 0] == first, 1], nucleus(logits_after([*prompt, int(first)]), 4.0, top_p))
