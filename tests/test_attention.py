"""Attention is the textbook formula, and its memory does not grow with the square of the length."""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import Jaxpr
from numpy.typing import NDArray
from tiny_models import LLAMA3_ROPE, hf_config, hf_tensors, write_folder

import convert
from convert.hf_config import read_config
from evals.perplexity import window_log_likelihoods
from gluprune_jax import attention
from gluprune_jax.attention import MAX_UNBLOCKED_QUERIES, causal_attention
from gluprune_jax.generation import prefill
from gluprune_jax.model import Llama, Llama3Rope, ModelConfig, abstract_model

B, K, G, H = 2, 2, 3, 8


def random_inputs(T: int, S: int) -> tuple[Any, ...]:
    """Queries, keys, values, and positions that differ between the rows."""
    random = np.random.default_rng(0)
    shapes = (B, T, K, G, H), (B, S, K, H), (B, S, K, H)
    q, k, v = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    starts = np.array([0, S - T])
    return 2 * q, k, v, (starts[:, None] + np.arange(T)).astype(np.int32)


def textbook(q: Any, k: Any, v: Any, positions: Any) -> NDArray[np.float64]:
    """One query at a time, in float64."""
    out = np.zeros(q.shape)
    for b, t, head, group in np.ndindex(q.shape[:-1]):
        seen = positions[b, t] + 1
        scores = k[b, :seen, head].astype(np.float64) @ q[b, t, head, group] / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, head, group] = weights / weights.sum() @ v[b, :seen, head]
    return out


@pytest.mark.parametrize(("T", "S"), [(40, 40), (1, 30), (9, 50)])
def test_attention_is_the_textbook_formula(T: int, S: int) -> None:
    inputs = random_inputs(T, S)
    np.testing.assert_allclose(causal_attention(*inputs), textbook(*inputs), rtol=0, atol=5e-6)


@pytest.mark.parametrize(("T", "S"), [(64, 64), (65, 80), (150, 150)])
def test_blocks_change_nothing(T: int, S: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(T, S)
    whole = causal_attention(*inputs)
    monkeypatch.setattr(attention, "MAX_UNBLOCKED_QUERIES", 32)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 32)
    np.testing.assert_allclose(causal_attention(*inputs), whole, rtol=0, atol=5e-6)
    np.testing.assert_allclose(causal_attention(*inputs), textbook(*inputs), rtol=0, atol=5e-6)


def test_blocks_of_the_real_size_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    T = MAX_UNBLOCKED_QUERIES + 1
    inputs = tuple(x[:, :, :1] if x.ndim > 2 else x for x in random_inputs(T, T + 100))
    blocked = causal_attention(*inputs)
    monkeypatch.setattr(attention, "MAX_UNBLOCKED_QUERIES", T)
    np.testing.assert_allclose(blocked, causal_attention(*inputs), rtol=0, atol=5e-6)


@pytest.mark.parametrize("limit", [2048, 32])
def test_slots_after_the_query_do_not_matter(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_UNBLOCKED_QUERIES", limit)
    q, k, v, positions = random_inputs(60, 90)
    positions = positions - positions[:, :1]
    rubbish = (np.arange(90) >= 60)[:, None, None]
    expected = causal_attention(q, k, v, positions)
    actual = causal_attention(q, np.where(rubbish, 1e9, k), np.where(rubbish, -1e9, v), positions)
    np.testing.assert_array_equal(actual, expected)


def test_the_softmax_of_bfloat16_is_float32() -> None:
    """4,096 equal probabilities of 1/4,096 do not add up to 1 in bfloat16."""
    q, k = jnp.zeros((1, 1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 4096, 1, 8), jnp.bfloat16)
    out = causal_attention(q, k, jnp.ones_like(k), jnp.array([[4095]]))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, np.ones((1, 1, 1, 1, 8)))


# ----------------------------------------------------------------------------------------------- long contexts

LLAMA_3_2_1B = ModelConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_sizes=(8192,) * 16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=Llama3Rope(32.0, 1.0, 4.0, 8192),
    tie_word_embeddings=True,
)
TINY, _ = read_config(hf_config())


def sizes(jaxpr: Jaxpr) -> Iterator[int]:
    """Elements of every array that the program computes, inside loops and calls too."""
    for equation in jaxpr.eqns:
        yield from (math.prod(variable.aval.shape) for variable in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, Jaxpr):
                yield from sizes(inner)


def last_logits(graphdef: Any, state: Any, tokens: Any) -> Any:
    model = nnx.merge(graphdef, state)
    return model.logits(model(tokens)[0][:, -1])


def tokens_like(T: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, T), jnp.int32)


def largest_array(program: str, T: int, config: ModelConfig = LLAMA_3_2_1B) -> int:
    """Elements of the largest array that a program computes over a text of T tokens."""
    graphdef, state = nnx.split(abstract_model(config))
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    functions: dict[str, Callable[[], Any]] = {
        "forward": lambda: jax.make_jaxpr(functools.partial(last_logits, graphdef))(state, tokens_like(T)),
        "prefill": lambda: jax.make_jaxpr(functools.partial(prefill, graphdef, T + 16))(
            state, tokens_like(T), lengths, lengths, lengths, None
        ),
        "perplexity": lambda: jax.make_jaxpr(functools.partial(window_log_likelihoods, graphdef))(
            state, tokens_like(T), lengths, None
        ),
    }
    return max(sizes(functions[program]().jaxpr))


@pytest.mark.parametrize("program", ["forward", "prefill", "perplexity"])
def test_the_largest_array_grows_with_the_length_not_its_square(program: str) -> None:
    heads, block = 32, 256
    for T in (8000, 16000):
        assert largest_array(program, T) <= heads * block * (T + 16)


def test_a_square_array_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_UNBLOCKED_QUERIES", 8000)
    assert largest_array("forward", 8000) == 32 * 8000 * 8000


def test_eight_thousand_tokens_form_no_square_array() -> None:
    assert largest_array("forward", 8000, TINY) < 8000 * 8000


def test_compiled_memory_grows_with_the_length_not_its_square() -> None:
    graphdef, state = nnx.split(abstract_model(TINY))
    compiled = jax.jit(last_logits, static_argnums=0)
    temporary = [
        compiled.lower(graphdef, state, tokens_like(T)).compile().memory_analysis().temp_size_in_bytes
        for T in (8000, 16000)
    ]
    assert temporary[0] < 8000 * 8000 * 4
    assert temporary[1] < 2.1 * temporary[0]


@pytest.mark.torch
def test_long_contexts_are_those_of_transformers(tmp_path: Path, load_reference: Callable[[Path], Any]) -> None:
    import torch

    T = 3001
    assert T > MAX_UNBLOCKED_QUERIES
    config = hf_config(max_position_embeddings=4096, rope_scaling=LLAMA3_ROPE, num_hidden_layers=2)
    tensors = {
        name: tensor / 2 if name.endswith("proj.weight") else tensor for name, tensor in hf_tensors(config).items()
    }
    folder = write_folder(tmp_path, config, tensors)
    tokens = np.random.default_rng(0).integers(0, 97, (1, T)).astype(np.int32)
    with torch.no_grad():
        expected = load_reference(folder)(torch.tensor(tokens)).logits[:, -200:].numpy()
    model: Llama = convert.load(folder).model
    hidden, _ = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    np.testing.assert_allclose(model.logits(hidden[:, -200:]), expected, rtol=0, atol=1e-5)
