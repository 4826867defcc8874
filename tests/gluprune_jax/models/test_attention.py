"""Attention is the textbook formula, in forests and on caches too; its memory does not grow with the length squared."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_sizes import sizes
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_models import LLAMA3_ROPE, hf_config, hf_tensors, write_folder

import convert
from convert.huggingface.config import read_config
from gluprune_jax.inference.device_loop import decode, empty_state
from gluprune_jax.inference.host_cache import to_tiles
from gluprune_jax.inference.prefill import whole_extend
from gluprune_jax.inference.sampling import Sampling
from gluprune_jax.models import attention
from gluprune_jax.models.attention import KEY_BLOCK, MAX_UNBLOCKED_QUERIES, Visible, causal_attention
from gluprune_jax.models.config import LayerAttention, Llama3Rope, ModelConfig, Rope
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model, bind

B, K, G, H = 2, 2, 3, 8
Inputs = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
Cache = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]


def random_inputs(T: int, batch: int = B, seed: int = 0) -> Inputs:
    """Queries, keys and values of new tokens."""
    random = np.random.default_rng(seed)
    shapes = (batch, T, K, G, H), (batch, T, K, H), (batch, T, K, H)
    q, k, v = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    return 2 * q, k, v


def random_cache(S: int, filled: Sequence[int], seed: int = 1) -> Cache:
    """Keys and values of all slots, those behind the filled ones too."""
    random = np.random.default_rng(seed)
    k, v = (random.standard_normal((len(filled), K, S, H)).astype(np.float32) for _ in range(2))
    return k, v, np.array(filled, np.int32)


def textbook(
    q: Any, k: Any, v: Any, visible: NDArray[np.bool_] | None = None, caches: Sequence[Cache] = ()
) -> NDArray[np.float64]:
    """One query at a time, in float64; `visible [B, T, T]` says which new tokens see which."""
    if visible is None:
        visible = np.broadcast_to(np.tri(q.shape[1], dtype=bool), (*q.shape[:2], q.shape[1]))
    out = np.zeros(q.shape)
    for b, t, head, group in np.ndindex(q.shape[:-1]):
        keys, values = [k[b, visible[b, t], head]], [v[b, visible[b, t], head]]
        for cache_k, cache_v, filled in caches:
            row = b if len(filled) > 1 else 0
            keys.append(cache_k[row, head, : filled[row]])
            values.append(cache_v[row, head, : filled[row]])
        scores = np.concatenate(keys).astype(np.float64) @ q[b, t, head, group] / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, head, group] = weights / weights.sum() @ np.concatenate(values)
    return out


@functools.cache
def compiled(*sizes: int) -> Callable[..., Any]:
    return jax.jit(functools.partial(over))  # jit would know the bare function again, sizes or not


def over(
    q: Any,
    k: Any,
    v: Any,
    subtree_ends: Any = None,
    caches: Any = (),
    *,
    window: int | None = None,
    positions: Any = None,
) -> Any:
    return causal_attention(q, k, v, Visible(subtree_ends, window, positions), caches)


def attend(*args: Any) -> NDArray[np.float32]:
    """Compiled anew where a test has changed the sizes of the blocks."""
    sizes = attention.MAX_UNBLOCKED_QUERIES, attention.QUERY_BLOCK, attention.KEY_BLOCK
    return np.asarray(compiled(*sizes)(*args))


def check(inputs: Inputs, caches: Sequence[Cache] = ()) -> NDArray[np.float32]:
    actual = attend(*inputs, None, caches)
    np.testing.assert_allclose(actual, textbook(*inputs, caches=caches), rtol=0, atol=5e-6)
    return actual


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_UNBLOCKED_QUERIES", 32)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 32)


@pytest.mark.parametrize("T", [1, 9, 40, 255, 256, 259])
def test_attention_is_the_textbook_formula(T: int) -> None:
    check(random_inputs(T))


@pytest.mark.parametrize("T", [64, 65, 150])
def test_blocks_change_nothing(T: int, request: pytest.FixtureRequest) -> None:
    whole = attend(*random_inputs(T))
    request.getfixturevalue("small_blocks")
    np.testing.assert_allclose(check(random_inputs(T)), whole, rtol=0, atol=5e-6)


def test_blocks_of_the_real_size_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    T = MAX_UNBLOCKED_QUERIES + 1
    q, k, v = (x[:, :, :1] for x in random_inputs(T))
    blocked = attend(q, k, v)
    monkeypatch.setattr(attention, "MAX_UNBLOCKED_QUERIES", T)
    np.testing.assert_allclose(blocked, attend(q, k, v), rtol=0, atol=5e-6)


@pytest.mark.parametrize("T", [60, 300])
@pytest.mark.parametrize("limit", [2048, 32])
def test_tokens_after_the_query_do_not_matter(limit: int, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_UNBLOCKED_QUERIES", limit)
    q, k, v = random_inputs(T)
    rubbish = (np.arange(T) >= 40)[:, None, None]
    expected = attend(q, k, v)
    actual = attend(q, np.where(rubbish, np.float32(1e9), k), np.where(rubbish, np.float32(-1e9), v))
    np.testing.assert_array_equal(actual[:, :40], expected[:, :40])


@pytest.mark.parametrize(("T", "filled"), [(1, 4095), (16, 4080), (2048, 0), (4096, 0)])
def test_the_sum_of_a_softmax_of_bfloat16_is_float32(T: int, filled: int) -> None:
    """4,096 equal weights do not add up in bfloat16, which ends at 256."""
    q, k = jnp.zeros((1, T, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, T, 1, 8), jnp.bfloat16)
    cache = jnp.zeros((1, 1, 4096, 8), jnp.bfloat16)
    out = attend(q, k, jnp.ones_like(k), None, [(cache, jnp.ones_like(cache), jnp.array([filled]))])
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, np.ones((1, T, 1, 1, 8)))


@pytest.mark.parametrize("cached", [0, 200])
def test_the_scores_of_bfloat16_are_float32(cached: int) -> None:
    """A score of 50 is rounded by up to an eighth in bfloat16, its weight by 13 %."""
    q, k, v = (x.astype(jnp.bfloat16) for x in random_inputs(40))
    q = q * 16
    cache_k, cache_v, filled = random_cache(256, [cached])
    caches = [(cache_k.astype(jnp.bfloat16), cache_v.astype(jnp.bfloat16), filled)]
    expected = textbook(*(x.astype(np.float32) for x in (q, k, v)), caches=caches)
    np.testing.assert_allclose(attend(q, k, v, None, caches).astype(np.float32), expected, rtol=0.02, atol=0.02)


# -------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("window", [1, 3, 8, 21, 200])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("filled", [[(19, 40), (7, 0)], [(37, 5)], [(0, 9)], []])
def test_a_window_reaches_over_caches(
    window: int, rows: int, filled: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of several caches follow each other, each with rows of its own; `rows` queries share those of a cache."""
    monkeypatch.setattr(attention, "KEY_BLOCK", 8)
    T, batch = 6, 2 * rows
    q, k, v = random_inputs(T, batch)
    caches = [random_cache(40, counts, seed) for seed, counts in enumerate(filled)]
    before = np.sum([np.repeat(counts, rows) for counts in filled], axis=0, dtype=np.int32) + np.zeros(batch, np.int32)
    positions = before[:, None] + np.arange(T, dtype=np.int32)
    actual = jax.jit(functools.partial(over, window=window))(q, k, v, None, caches, positions=positions)
    for b in range(batch):
        keys = np.concatenate([c[0][b // rows, :, : c[2][b // rows]] for c in caches] + [k[b].swapaxes(0, 1)], axis=1)
        values = np.concatenate([c[1][b // rows, :, : c[2][b // rows]] for c in caches] + [v[b].swapaxes(0, 1)], axis=1)
        for t in range(T):
            end = before[b] + t + 1
            seen = slice(max(0, end - window), end)
            scores = np.einsum("kgh,ksh->kgs", q[b, t], keys[:, seen]).astype(np.float64) / math.sqrt(H)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            expected = np.einsum("kgs,ksh->kgh", weights / weights.sum(-1, keepdims=True), values[:, seen])
            np.testing.assert_allclose(actual[b, t], expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("window", [1, 2, 4, 50])
def test_a_window_of_a_forest_counts_depths(window: int) -> None:
    """Not slots: between a token and its ancestor stand those of other branches."""
    parents = [random_forest(np.random.default_rng(seed), 30) for seed in range(B)]
    ends = np.stack([subtree_ends(row) for row in parents])
    depths = np.array([[len(path_to(row, t)) - 1 for t in range(30)] for row in parents], np.int32)
    visible = np.zeros((B, 30, 30), bool)
    for b, t in np.ndindex(B, 30):
        visible[b, t, path_to(parents[b], t)[-window:]] = True
    inputs = random_inputs(30)
    actual = jax.jit(functools.partial(over, window=window))(*inputs, ends, positions=depths)
    np.testing.assert_allclose(actual, textbook(*inputs, visible), rtol=0, atol=5e-6)


def test_scores_are_scaled_and_then_capped() -> None:
    q, k, v = random_inputs(9)
    actual = jax.jit(functools.partial(causal_attention, scale=0.7, soft_cap=1.5))(q, k, v)
    for b, t, head, group in np.ndindex(q.shape[:-1]):
        scores = 1.5 * np.tanh(0.7 * k[b, : t + 1, head].astype(np.float64) @ q[b, t, head, group] / 1.5)
        expected = np.exp(scores) / np.exp(scores).sum() @ v[b, : t + 1, head]
        np.testing.assert_allclose(actual[b, t, head, group], expected, rtol=0, atol=5e-6)


# -------------------------------------------------------------------------------------------------------- forests


def random_forest(random: np.random.Generator, T: int) -> list[int]:
    """The parent of each token, -1 for none, in depth-first order."""
    parents, path = [], [-1]
    for token in range(T):
        while len(path) > 1 and random.random() < 0.3:
            path.pop()
        parents.append(path[-1])
        path.append(token)
    return parents


def path_to(parents: Sequence[int], token: int) -> list[int]:
    """The tokens from the root to this one."""
    path = []
    while token >= 0:
        path.append(token)
        token = parents[token]
    return path[::-1]


def subtree_ends(parents: Sequence[int]) -> NDArray[np.int32]:
    paths = [path_to(parents, token) for token in range(len(parents))]
    return np.array([1 + max(i for i, path in enumerate(paths) if token in path) for token in range(len(paths))])


def check_forests(inputs: Inputs, seed: int, caches: Sequence[Cache] = ()) -> None:
    random, T = np.random.default_rng(seed), inputs[0].shape[1]
    forests = [random_forest(random, T) for _ in inputs[0]]
    actual = attend(*inputs, np.stack([subtree_ends(parents) for parents in forests]), caches)
    for row, parents in enumerate(forests):
        for leaf in set(range(T)) - set(parents):
            path = path_to(parents, leaf)
            q, k, v = (x[row, path][None] for x in inputs)
            own = [tuple(x[row if len(x) > 1 else 0][None] for x in cache) for cache in caches]
            expected = textbook(q, k, v, caches=own)
            np.testing.assert_allclose(actual[row, path], expected[0], rtol=0, atol=5e-6)


def test_the_example_of_the_docstring() -> None:
    assert subtree_ends([-1, 0, 1, 1, -1, 4]).tolist() == [4, 4, 3, 4, 6, 6]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_forest_is_its_sequences_alone(seed: int) -> None:
    check_forests(random_inputs(24, seed=seed), seed)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_forest_stands_on_caches(seed: int) -> None:
    random = np.random.default_rng(seed)
    filled = [random.integers(0, 513, 1).tolist(), random.integers(0, 17, B).tolist()]
    caches = [random_cache(512, filled[0], seed), random_cache(16, filled[1], seed + 1)]
    check_forests(random_inputs(12, seed=seed), seed, caches)


@pytest.mark.parametrize("T", [256, 259])
def test_a_long_forest_is_its_sequences_alone(T: int) -> None:
    check_forests(random_inputs(T), 0)


@pytest.mark.usefixtures("small_blocks")
def test_a_forest_in_blocks_is_its_sequences_alone() -> None:
    check_forests(random_inputs(70), 0)


def test_one_tree_without_branches_is_a_sequence() -> None:
    q, k, v = random_inputs(40)
    np.testing.assert_array_equal(attend(q, k, v, np.full((B, 40), 40)), attend(q, k, v))


# ---------------------------------------------------------------------------------------------------------- caches

FILLED = [
    (16, [0]),
    (16, [16]),
    (16, [5, 0]),
    (100, [99]),
    (256, [256, 1]),
    (512, [0]),
    (512, [255, 257]),
    (512, [512]),
    (768, [511]),
    (768, [3, 768]),
]


@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize(("S", "filled"), FILLED)
def test_new_tokens_see_all_that_is_cached(S: int, filled: list[int], T: int) -> None:
    check(random_inputs(T), [random_cache(S, filled)])


@pytest.mark.parametrize("T", [1, 259])
def test_several_caches_are_one_after_the_other(T: int) -> None:
    caches = [random_cache(768, [700], 1), random_cache(256, [17, 200], 2), random_cache(16, [16, 0], 3)]
    out = check(random_inputs(T), caches)
    np.testing.assert_allclose(attend(*random_inputs(T), None, caches[::-1]), out, rtol=0, atol=5e-6)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("filled", [0, 1, 300])
def test_a_shared_cache_is_a_copy_for_every_row(filled: int, batch: int) -> None:
    k, v, _ = random_cache(512, [filled])
    copies = np.repeat(k, batch, axis=0), np.repeat(v, batch, axis=0), np.full(batch, filled)
    inputs = random_inputs(7, batch)
    shared = attend(*inputs, None, [(k, v, np.array([filled]))])
    np.testing.assert_allclose(shared, attend(*inputs, None, [copies]), rtol=0, atol=5e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("filled", [[40], [40, 64]])
def test_blocks_of_queries_see_the_cache(filled: list[int]) -> None:
    check(random_inputs(70), [random_cache(64, filled)])


@pytest.mark.parametrize("filled", [[512], [100, 333]])
def test_blocks_of_the_cache_change_nothing(filled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, caches = random_inputs(9), [random_cache(512, filled)]
    expected = attend(*inputs, None, caches)
    for size in (32, 512):
        monkeypatch.setattr(attention, "KEY_BLOCK", size)
        np.testing.assert_allclose(attend(*inputs, None, caches), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("window", [None, 3, 70])
@pytest.mark.parametrize("filled", [[0, 0], [1, 64], [192, 65], [150], [0]])
def test_parts_of_a_cache_change_nothing(filled: list[int], window: int | None, T: int) -> None:
    inputs, cache = random_inputs(T), random_cache(192, filled)
    positions = np.repeat(cache[2], B // len(filled))[:, None] + np.arange(T, dtype=np.int32)
    run = functools.partial(jax.jit(functools.partial(over, window=window)), *inputs, None, positions=positions)
    expected = run([cache])
    for cuts in ([64], [128], [64, 128]):
        parts = tuple(tuple(np.split(slots, cuts, axis=2)) for slots in cache[:2])
        tiles = tuple(to_tiles(part) for part in parts[0])
        np.testing.assert_allclose(run([(tiles, parts[1], cache[2])]), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("filled", [[0], [300], [0, 257], [255, 256]])
def test_what_lies_behind_the_filled_slots_does_not_matter(filled: list[int]) -> None:
    inputs, (k, v, lengths) = random_inputs(9), random_cache(512, filled)
    behind = np.arange(512)[:, None] >= lengths[:, None, None, None]
    expected = attend(*inputs, None, [(k, v, lengths)])
    for key, value in ((1e9, -1e9), (np.nan, 1e30)):
        spoiled = np.where(behind, np.float32(key), k), np.where(behind, np.float32(value), v), lengths
        np.testing.assert_array_equal(attend(*inputs, None, [spoiled]), expected)


@pytest.mark.parametrize("filled", [[0], [256], [1, 512]])
def test_blocks_that_no_row_has_filled_are_not_visited(filled: list[int]) -> None:
    """A value that is not a number would show even with a weight of zero."""
    inputs, (k, v, lengths) = random_inputs(9), random_cache(1024, filled)
    unvisited = (np.arange(1024) >= -(-max(filled) // KEY_BLOCK) * KEY_BLOCK)[:, None]
    out = attend(*inputs, None, [(k, np.where(unvisited, np.float32(np.nan), v), lengths)])
    np.testing.assert_array_equal(out, attend(*inputs, None, [(k, v, lengths)]))


@pytest.mark.parametrize("batch", [1, 8])
def test_a_long_cache_forms_no_large_array(batch: int) -> None:
    T, S = 512, 131072

    def like(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    inputs = like(batch, T, 8, 4, 64), like(batch, T, 8, 64), like(batch, T, 8, 64)
    for rows in {1, batch}:
        cache = like(rows, 8, S, 64), like(rows, 8, S, 64), like(rows, dtype=jnp.int32)
        largest = max(sizes(jax.make_jaxpr(over)(*inputs, None, [cache]).jaxpr))
        assert largest <= batch * 32 * T * KEY_BLOCK


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
    attention=(LayerAttention(Rope(500000.0, Llama3Rope(32.0, 1.0, 4.0, 8192))),) * 16,
    tie_word_embeddings=True,
)
TINY, _ = read_config(hf_config())


def last_logits(config: ModelConfig, state: Any, tokens: Any) -> Any:
    model = bind(config, state)
    return model.logits(model(tokens)[0][:, -1])


def tokens_like(T: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, T), jnp.int32)


def largest_array(program: str, T: int, config: ModelConfig = LLAMA_3_2_1B) -> int:
    """Elements of the largest array that a program computes over a text of T tokens."""
    state = nnx.state(abstract_model(config), nnx.Param)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    decoding = jax.eval_shape(lambda: empty_state(config, 1, -(-T // KEY_BLOCK) * KEY_BLOCK, jnp.float32))
    sampling = Sampling(jax.ShapeDtypeStruct((8,), jnp.int32), *(jax.ShapeDtypeStruct((), jnp.float32),) * 2, number)
    functions: dict[str, Callable[[], Any]] = {
        "forward": lambda: jax.make_jaxpr(functools.partial(last_logits, config))(state, tokens_like(T)),
        "extend": lambda: jax.make_jaxpr(functools.partial(whole_extend, config))(
            state, decoding.cache, tokens_like(T), None
        ),
        "decode": lambda: jax.make_jaxpr(functools.partial(decode, config))(state, decoding, sampling, None),
    }
    return max(sizes(functions[program]().jaxpr))


@pytest.mark.parametrize("program", ["forward", "extend", "decode"])
def test_the_largest_array_grows_with_the_length_not_its_square(program: str) -> None:
    heads, block = 32, 256
    for T in (8000, 16000):
        assert largest_array(program, T) <= heads * block * (T + 16)


def test_a_square_array_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_UNBLOCKED_QUERIES", 8000)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8001)
    assert largest_array("forward", 8000) == 32 * 8000 * 8000


def test_eight_thousand_tokens_form_no_square_array() -> None:
    assert largest_array("forward", 8000, TINY) < 8000 * 8000


def test_compiled_memory_grows_with_the_length_not_its_square() -> None:
    state = nnx.state(abstract_model(TINY), nnx.Param)
    compiled = jax.jit(last_logits, static_argnums=0)
    temporary = [
        compiled.lower(TINY, state, tokens_like(T)).compile().memory_analysis().temp_size_in_bytes
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
    model: Decoder = convert.load(folder).model
    hidden, _ = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    np.testing.assert_allclose(model.logits(hidden[:, -200:]), expected, rtol=0, atol=1e-5)
