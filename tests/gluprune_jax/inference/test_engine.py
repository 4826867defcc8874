"""However requests are shared, packed, cached and batched, the numbers are those of plain full forward passes."""

import dataclasses
import functools
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_sizes import sizes
from compilations import compiled
from flax import nnx
from tiny_models import LLAMA3_ROPE, hf_config, hf_tensors, write_folder

import convert
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.inference import engine as engine_module
from gluprune_jax.inference.engine import Engine, LogLikelihood, rolling_windows, score_tokens
from gluprune_jax.inference.generation import generate
from gluprune_jax.inference.host_loop import HostLoop
from gluprune_jax.inference.lookup import DRAFT
from gluprune_jax.inference.prefill import extend, whole_extend
from gluprune_jax.models.cache import KVCache
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model
from gluprune_jax.pruning.plan import PruningPlan, make_plan
from gluprune_jax.pruning.scores import score
from gluprune_jax.pruning.slicing import slice_model

Request = tuple[list[int], list[int]]

WINDOW = 1024
PREFIX = 3


def tiny_model(folder: Path, dtype: str = "float32", **changes: Any) -> Decoder:
    changes = {"num_hidden_layers": 2, "max_position_embeddings": WINDOW, "torch_dtype": dtype} | changes
    config = hf_config(rope_scaling=LLAMA3_ROPE, **changes)
    return convert.load(write_folder(folder, config, hf_tensors(config, dtype))).model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """One layer, for what does not depend on how many: it compiles faster."""
    return tiny_model(tmp_path_factory.mktemp("shallow"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def plan(shallow: Decoder) -> PruningPlan:
    return make_plan(score(shallow), prune_percent=40)


# ------------------------------------------------------------------------------------------------------ oracle


# It runs hundreds of times: worth optimising, unlike the other programs of the tests.
OPTIMISED = {"xla_backend_optimization_level": 2, "xla_llvm_disable_expensive_passes": False}


@functools.partial(jax.jit, static_argnums=0, compiler_options=OPTIMISED)
def all_log_probabilities(graphdef: Any, params: Any, tokens: Any, masks: Any) -> Any:
    model = nnx.merge(graphdef, params)
    return jax.nn.log_softmax(model.logits(model(tokens, neuron_masks=masks)[0]), axis=-1)


class Oracle:
    """One full forward pass a request: no cache, no batch, nothing shared, every logit."""

    def __init__(self, model: Decoder, masks: Any = None, slots: int = WINDOW) -> None:
        self._parts, self._masks, self._slots = nnx.split(model), masks, slots
        self._after: dict[tuple[int, ...], Any] = {}

    def after(self, tokens: Sequence[int]) -> Any:
        """Log-probabilities `[len(tokens), V]` of what follows each token."""
        key = tuple(tokens)
        if key not in self._after:
            padded = np.zeros((1, self._slots), np.int32)
            padded[0, : len(key)] = key
            self._after[key] = np.asarray(all_log_probabilities(*self._parts, padded, self._masks))[0, : len(key)]
        return self._after[key]

    def __call__(self, request: Request, window: int = WINDOW) -> LogLikelihood:
        context, continuation = request
        inputs = (context + continuation)[-(window + 1) :][:-1]  # as lm-eval cuts them
        predicted = self.after(inputs)[-len(continuation) :]
        values = predicted[np.arange(len(continuation)), continuation]
        greedy = (predicted.argmax(axis=-1) == continuation).all()
        return LogLikelihood(math.fsum(values.tolist()), bool(greedy))


def tolerance(request: Request) -> float:
    return 1e-4 + 5e-6 * len(request[1])


def check(got: Sequence[LogLikelihood], expected: Sequence[LogLikelihood], requests: Sequence[Request]) -> None:
    assert len(got) == len(expected) == len(requests)
    for result, wanted, request in zip(got, expected, requests, strict=True):
        assert isinstance(result.value, float)
        assert isinstance(result.is_greedy, bool)
        assert abs(result.value - wanted.value) <= tolerance(request)
        assert result.is_greedy == wanted.is_greedy


# ---------------------------------------------------------------------------------------------------- workload

random_tokens = random.Random(0)


def tokens(count: int) -> list[int]:
    return [random_tokens.randrange(97) for _ in range(count)]


def workload() -> list[Request]:
    """Single and long continuations, choices, headers of all lengths, nested headers, duplicates, cut contexts."""
    requests: list[Request] = [([PREFIX], [4]), (tokens(1), tokens(1)), (tokens(2), tokens(700))]
    headers = [tokens(count) for count in (1, 5, 130, 600)]
    headers += [headers[3] + tokens(count) for count in (40, 300)]
    for header in headers:
        for extra in (0, 3, 90):
            question = header + tokens(extra)
            requests += [(question, tokens(count)) for count in random_tokens.choice(([1, 1, 1, 1], [7], [2, 40]))]
    # One question with choices that share their beginnings and are prefixes of one another.
    question, answer = headers[1] + tokens(30), tokens(12)
    requests += [(question, answer[:n]) for n in (1, 2, 12)] + [(question, [*answer[:6], n]) for n in range(3)]
    # The same sequence of tokens, asked about from different places.
    requests += [(question + answer[:n], answer[n:]) for n in (1, 5, 11)]
    # Longer than the window: by a token, by many; the continuation alone fills it.
    requests += [(tokens(n), tokens(count)) for n, count in ((1020, 5), (1020, 6), (1500, 3), (5, WINDOW))]
    requests += requests[:2] + requests[-3:]  # duplicates
    random_tokens.shuffle(requests)
    return requests


REQUESTS = workload()
TRUNCATED = sum(len(context) + len(continuation) > WINDOW + 1 for context, continuation in REQUESTS)


@pytest.fixture(scope="module")
def oracle(model: Decoder) -> Oracle:
    return Oracle(model)


@pytest.fixture(scope="module")
def expected(oracle: Oracle) -> list[LogLikelihood]:
    assert TRUNCATED >= 5
    return [oracle(request) for request in REQUESTS]


# ---------------------------------------------------------------------------------------------- log-likelihoods


@pytest.mark.parametrize(
    ("batch_size", "share_prefixes"),
    [(None, True), (1, True), (2, True), (3, True), (8, True), (1, False), (3, False)],
)
def test_log_likelihoods_are_those_of_full_forward_passes(
    model: Decoder, expected: list[LogLikelihood], batch_size: int | None, share_prefixes: bool
) -> None:
    engine = Engine(model, batch_size=batch_size, share_prefixes=share_prefixes)
    assert engine.window == WINDOW
    check(engine.loglikelihood(REQUESTS), expected, REQUESTS)
    assert engine.truncated == TRUNCATED


def test_the_order_of_the_requests_does_not_matter(model: Decoder, expected: list[LogLikelihood]) -> None:
    order = random.Random(1).sample(range(len(REQUESTS)), len(REQUESTS))
    requests = [REQUESTS[i] for i in order]
    check(Engine(model).loglikelihood(requests), [expected[i] for i in order], requests)
    engine = Engine(model)
    in_parts = [engine.loglikelihood([request])[0] for request in REQUESTS[:20]]
    check(in_parts, expected[:20], REQUESTS[:20])


def test_requests_may_be_any_sequences_of_integers(model: Decoder, expected: list[LogLikelihood]) -> None:
    requests: list[Any] = [(np.array(context), tuple(continuation)) for context, continuation in REQUESTS[:10]]
    check(Engine(model).loglikelihood(requests), expected[:10], REQUESTS[:10])


def test_duplicates_get_the_same_answer(model: Decoder) -> None:
    request = (tokens(50), tokens(5))
    results = Engine(model).loglikelihood([request, REQUESTS[0], request, request])
    assert results[0] == results[2] == results[3] != results[1]


def test_masks_of_ones_are_no_masks(model: Decoder) -> None:
    ones = tuple(np.ones(80, np.float32) for _ in range(2))
    requests = REQUESTS[:20]
    assert Engine(model, neuron_masks=ones).loglikelihood(requests) == Engine(model).loglikelihood(requests)


def test_masks_score_as_the_sliced_model(shallow: Decoder, plan: PruningPlan) -> None:
    requests = REQUESTS[:25]
    masks = plan.masks(shallow.config)
    masked = Engine(shallow, neuron_masks=masks).loglikelihood(requests)
    oracle = Oracle(shallow, masks)
    check(masked, [oracle(request) for request in requests], requests)
    short = [i for i, request in enumerate(requests) if len(request[0] + request[1]) < 400]
    sliced = Engine(slice_model(shallow, plan)).loglikelihood([requests[i] for i in short])
    check(sliced, [masked[i] for i in short], [requests[i] for i in short])
    dense = Engine(shallow).loglikelihood(requests)
    assert all(abs(a.value - b.value) > 1e-3 for a, b in zip(masked, dense, strict=True))


def test_what_is_greedy_is_known(model: Decoder, oracle: Oracle) -> None:
    context, greedy = tokens(20), list[int]()
    while len(greedy) < 6:
        greedy.append(int(oracle.after(context + greedy)[-1].argmax()))
    wrong = [token if i != 3 else (token + 1) % 97 for i, token in enumerate(greedy)]
    cases = [greedy, greedy[:1], [*greedy[:5], (greedy[5] + 1) % 97], wrong, [(greedy[0] + 1) % 97, *greedy[1:]]]
    results = Engine(model).loglikelihood([(context, case) for case in cases])
    assert [result.is_greedy for result in results] == [True, True, False, False, False]


@pytest.mark.parametrize("window", [2, 7, 128, 600, 1023])
def test_a_smaller_window_cuts_as_lm_eval_does(model: Decoder, oracle: Oracle, window: int) -> None:
    requests = [request for request in REQUESTS if len(request[1]) <= window]
    engine = Engine(model, context_length=window)
    assert engine.window == window
    check(engine.loglikelihood(requests), [oracle(request, window) for request in requests], requests)
    assert engine.truncated == sum(len(a) + len(b) > window + 1 for a, b in requests) >= 5
    before = engine.truncated
    engine.loglikelihood(requests[:0])
    engine.loglikelihood([([1], [2] * window)])
    assert engine.truncated == before, "a context of one token before as many as fit is not cut"


def test_branches_at_many_depths_of_a_deep_prefix(model: Decoder, oracle: Oracle) -> None:
    """The cache is cut back and written again; what an earlier branch left in it must not be seen."""
    trunk = tokens(900)
    requests = []
    for depth in (3, 127, 128, 129, 511, 512, 513, 600, 640, 700, 897, 900):
        for _ in range(3):
            branch = trunk[:depth] + tokens(min(100, 1000 - depth))
            requests += [(branch, tokens(4)) for _ in range(4)]
    requests += [(trunk[:n], trunk[n : n + 3]) for n in range(1, 890, 37)]
    check(Engine(model).loglikelihood(requests), [oracle(request) for request in requests], requests)


def test_a_large_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs nothing where the documents are small; and a longer document takes a larger cache."""
    cache_sizes = set()
    programs = {"rows": engine_module.rows, "extend": extend}
    for name in programs:

        def recorded(config: Any, params: Any, cache: KVCache, *rest: Any, name: str = name) -> Any:
            cache_sizes.add(cache.layers[0].k.shape[2])
            return programs[name](config, params, cache, *rest)

        monkeypatch.setattr(engine_module, name, recorded)
    model = tiny_model(tmp_path, max_position_embeddings=131_072, num_hidden_layers=1)
    engine, oracle = Engine(model), Oracle(model, slots=2816)
    assert engine.window == 131_072
    requests = [(tokens(700), tokens(5)) for _ in range(2)] + [([1], [2])]
    check(engine.loglikelihood(requests), [oracle(request, 131_072) for request in requests], requests)
    assert cache_sizes == {2048 + 512}

    document = tokens(2700)
    requests = [(document[:-10], document[-10:]), (document[:-10], tokens(3)), ([PREFIX], document)]
    check(engine.loglikelihood(requests), [oracle(request, 131_072) for request in requests], requests)
    assert cache_sizes == {2048 + 512, 8192 + 512}


def test_bfloat16(tmp_path: Path) -> None:
    half, exact = (tiny_model(tmp_path / dtype, dtype, num_hidden_layers=1) for dtype in ("bfloat16", "float32"))
    assert half.embed_tokens[...].dtype == jnp.bfloat16
    nnx.update(exact, jax.tree.map(lambda array: array.astype(jnp.float32), nnx.state(half)))
    oracle = Oracle(exact)
    requests = [request for request in REQUESTS if len(request[1]) < 50][:20]
    for result, request in zip(Engine(half).loglikelihood(requests), requests, strict=True):
        assert abs(result.value - oracle(request).value) < 0.1 + 0.15 * len(request[1]) ** 0.5


# -------------------------------------------------------------------------------------------------- on_result


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every call of `rows`."""
    calls, real = list[int](), engine_module.rows

    def rows(*arguments: Any) -> Any:
        calls.append(arguments[3].shape[0])
        return real(*arguments)

    monkeypatch.setattr(engine_module, "rows", rows)
    return calls


def test_results_are_told_once_each_as_they_become_known(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    told: list[tuple[int, LogLikelihood]] = []
    calls_at_first: list[int] = []

    def on_result(number: int, result: LogLikelihood) -> None:
        if not told:
            calls_at_first.append(len(calls))
        told.append((number, result))

    results = Engine(model).loglikelihood(REQUESTS, on_result=on_result)
    assert sorted(told) == list(enumerate(results))
    assert calls_at_first[0] < len(calls) / 2


def test_documents_are_told_once_each(model: Decoder) -> None:
    documents = [tokens(n) for n in (0, 200, 1, 150, 0)]
    told: list[tuple[int, float]] = []
    engine = Engine(model, context_length=64)
    results = engine.loglikelihood_rolling(
        documents, prefix_token=PREFIX, on_result=lambda number, value: told.append((number, value))
    )
    assert sorted(told) == list(enumerate(results))


def test_what_on_result_raises_comes_through(model: Decoder) -> None:
    def interrupt(number: int, result: LogLikelihood) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Engine(model).loglikelihood(REQUESTS[:5], on_result=interrupt)


# ---------------------------------------------------------------------------------------------------- refusals

REFUSALS: list[tuple[list[tuple[list[int], list[int]]], str]] = [
    ([([1], [2]), ([], [3])], "request 1 has an empty context or continuation"),
    ([([1], [])], "request 0 has an empty context or continuation"),
    ([([1], [2] * 65)], "a continuation of 65 tokens is longer than the window of 64"),
    ([([1], [97])], "token id 97 lies outside the model's vocabulary of 97"),
    ([([1, 97, 2], [3])], "token id 97 lies outside the model's vocabulary of 97"),
    ([([1, -1], [3])], "token id -1 lies outside the model's vocabulary of 97"),
]


@pytest.mark.parametrize(("requests", "message"), REFUSALS)
def test_bad_requests_are_refused_before_anything_is_run(
    model: Decoder, requests: list[Request], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    with pytest.raises(RequestError, match=message):
        Engine(model, context_length=64).loglikelihood(requests)
    assert not calls


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"batch_size": -3}, "batch_size is -3; it must be at least 1"),
        ({"context_length": 1}, "`context_length` is 1; it must lie between 2 and the model's window of 1024"),
        ({"context_length": 1025}, "`context_length` is 1025; it must lie between 2 and the model's window of 1024"),
    ],
)
def test_settings_out_of_range_are_refused(model: Decoder, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Engine(model, **settings)


def test_nothing_asked_for_is_nothing_done(model: Decoder) -> None:
    engine = Engine(model)
    assert engine.loglikelihood([]) == []
    assert engine.loglikelihood_rolling([], prefix_token=PREFIX) == []
    assert engine.generate([], max_new_tokens=5) == []
    assert engine.truncated == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_computes_nothing_sensible_is_an_error(tmp_path: Path, value: float) -> None:
    broken = tiny_model(tmp_path)
    broken.norm.weight[...] = jnp.full((48,), value)
    with pytest.raises(OperationError, match=r"non-finite log-likelihood \(\S+\) for request 0; check the weights"):
        Engine(broken).loglikelihood([([1, 2], [3])])
    with pytest.raises(OperationError, match="non-finite log-likelihood"):
        Engine(broken).loglikelihood_rolling([[1, 2, 3]], prefix_token=PREFIX)


# ----------------------------------------------------------------------------------------------- out of memory


def failing_above(real: Callable[..., Any], rows: int, error: Exception, size: Callable[..., int]) -> Any:
    """The function, which fails for batches of more than so many."""

    def limited(*arguments: Any, **options: Any) -> Any:
        if size(*arguments) > rows:
            raise error
        return real(*arguments, **options)

    return limited


EXHAUSTED = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1234 bytes")


@pytest.mark.parametrize("error", [EXHAUSTED, MemoryError()])
def test_out_of_memory_halves_the_batch(
    model: Decoder, expected: list[LogLikelihood], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    limited = failing_above(engine_module.rows, 2 * 512, error, lambda *arguments: int(arguments[3].size))
    monkeypatch.setattr(engine_module, "rows", limited)
    engine = Engine(model, batch_size=8, note=notes.append)
    told: list[int] = []
    results = engine.loglikelihood(REQUESTS, on_result=lambda number, _: told.append(number))
    check(results, expected, REQUESTS)
    assert sorted(told) == list(range(len(REQUESTS)))
    assert notes == [f"out of memory: continuing with {n} rows of 512 tokens at a time" for n in (4, 2)]
    check(engine.loglikelihood(REQUESTS), expected, REQUESTS)
    assert len(notes) == 2, "the size that fits is remembered"


@pytest.mark.parametrize(
    ("error", "batch_size"), [(EXHAUSTED, 1), (EXHAUSTED, 8), (ValueError("something else"), 8), (OSError(5, "x"), 1)]
)
def test_what_no_smaller_batch_cures_comes_through(
    model: Decoder, error: Exception, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "rows", failing_above(engine_module.rows, 0, error, lambda *_: 1))
    with pytest.raises(type(error)) as caught:
        Engine(model, batch_size=batch_size).loglikelihood(REQUESTS)
    assert caught.value is error


# ----------------------------------------------------------------------------------------------------- rolling

LENGTHS = (0, 1, 2, 63, 64, 65, 127, 128, 129, 192, 200)


def test_windows_are_those_of_lm_eval() -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="compares with lm-eval: pip install gluprune-jax[evals]")
    for window in (2, 3, 64):
        for length in LENGTHS:
            document = list(range(100, 100 + length))
            theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(document, PREFIX, window, 1))
            ours = [(list(context), list(tokens)) for context, tokens in rolling_windows(document, PREFIX, window)]
            assert ours == [(list(context), list(tokens)) for context, tokens in theirs]
            assert [token for _, tokens in ours for token in tokens] == document


@pytest.mark.parametrize("window", [64, 600])
def test_documents_are_scored_window_by_window(model: Decoder, oracle: Oracle, window: int) -> None:
    documents = [tokens(n) for n in (0, 1, window - 1, window, window + 1, 3 * window, 2 * window + 7)]
    documents.append(documents[-1])
    engine = Engine(model, context_length=window)
    results = engine.loglikelihood_rolling(documents, prefix_token=PREFIX)
    assert results[0] == 0.0
    assert math.isclose(results[-1], results[-2], rel_tol=1e-7)
    for result, document in zip(results, documents, strict=True):
        # Written out: the first window follows the prefix token, the others a context that fills theirs up.
        total = 0.0
        for start in range(0, len(document), window):
            piece = document[start : start + window]
            context = document[max(0, start + len(piece) - window - 1) : start] if start else [PREFIX]
            total += oracle((context, piece), window).value
        assert abs(result - total) <= 1e-4 + 5e-6 * len(document)
    assert engine.truncated == 0


def test_a_bad_prefix_token_is_refused(model: Decoder) -> None:
    with pytest.raises(RequestError, match="token id 97 lies outside"):
        Engine(model).loglikelihood_rolling([[1, 2]], prefix_token=97)


def test_of_equal_logits_the_first_is_greedy(model: Decoder) -> None:
    """Hidden states of zeros make all logits equal."""
    hidden, targets = jnp.zeros((1, 3, model.config.hidden_size)), np.array([[0, 1, 96]])
    params = nnx.state(model, nnx.Param)
    values, is_greedy = score_tokens(model.config, params, hidden, np.arange(3)[None], targets)
    assert np.asarray(is_greedy).tolist() == [[True, False, False]]
    np.testing.assert_allclose(values, -math.log(97), rtol=1e-6)


@pytest.mark.parametrize("window", [16_384, 131_072])
def test_a_document_as_long_as_a_large_window_forms_no_square_array(model: Decoder, window: int) -> None:
    """Neither traced nor compiled: nothing but the cache itself grows with the window, and it is not copied."""
    slots = window + 512
    config = dataclasses.replace(model.config, max_position_embeddings=window)
    params = nnx.state(abstract_model(config), nnx.Param)
    cache = jax.eval_shape(lambda: KVCache.empty(config, 1, slots, jnp.float32))
    masks = tuple(jax.ShapeDtypeStruct((80,), jnp.float32) for _ in range(2))
    arguments = params, cache, jax.ShapeDtypeStruct((1, 512), jnp.int32), masks
    square_of_a_row = config.num_attention_heads * 512 * 512
    largest = max(sizes(jax.make_jaxpr(functools.partial(whole_extend, config))(*arguments).jaxpr))
    assert largest <= max(cache.layers[0].k.size, square_of_a_row)
    memory = whole_extend.lower(config, *arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 4 * square_of_a_row


# -------------------------------------------------------------------------------------------------- generation

PROMPTS = [tokens(n) for n in (1, 31, 300, 7, 130, 2)]
ONES = (np.ones(80, np.float32),)


@pytest.fixture(scope="module")
def plain(shallow: Decoder) -> list[list[int]]:
    return generate(shallow, PROMPTS, max_new_tokens=40, neuron_masks=ONES)


def test_generation_is_that_of_the_decode_loop(shallow: Decoder, plan: PruningPlan, plain: list[list[int]]) -> None:
    assert Engine(shallow).generate(PROMPTS, max_new_tokens=40) == plain
    masks = plan.masks(shallow.config)
    told: list[tuple[int, list[int]]] = []
    masked = Engine(shallow, neuron_masks=masks).generate(
        PROMPTS, max_new_tokens=40, on_result=lambda number, new: told.append((number, new))
    )
    assert masked == generate(shallow, PROMPTS, max_new_tokens=40, neuron_masks=masks) != plain
    assert sorted(told) == list(enumerate(masked))


def test_all_of_the_decode_loop_can_be_asked_for(shallow: Decoder, plain: list[list[int]]) -> None:
    settings: dict[str, Any] = {
        "max_new_tokens": 40,
        "eos_ids": [plain[1][20]],
        "should_stop": lambda new: plain[2][9] in new,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 5,
    }
    engine = Engine(shallow)
    variants = [settings | changes for changes in ({}, {"temperature": 0.0}, {"seed": 6}, {"top_p": 0.1})]
    results = [engine.generate(PROMPTS, **variant) for variant in variants]
    assert results == [generate(shallow, PROMPTS, neuron_masks=ONES, **variant) for variant in variants]
    assert len({str(result) for result in results}) == 4
    assert engine.generate(PROMPTS, max_new_tokens=0) == [[]] * len(PROMPTS)


@pytest.mark.parametrize(("batch_size", "slots"), [(1, 1), (3, 3), (4, 4), (None, 8)])
def test_the_batch_size_is_the_number_of_slots(
    shallow: Decoder, batch_size: int | None, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def generate(model: Decoder, prompts: Any, **settings: Any) -> list[list[int]]:
        asked.append(settings["slots"])
        return []

    monkeypatch.setattr(engine_module, "generate", generate)
    monkeypatch.setattr(engine_module, "free_memory", lambda: 1 << 30)
    Engine(shallow, batch_size=batch_size).generate(PROMPTS, max_new_tokens=3)
    assert asked == [slots]


def test_slots_are_those_that_the_memory_holds(shallow: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 slots of keys and values, 2 heads of 8 float32 numbers; a third of the memory is for them."""
    asked: list[int] = []
    monkeypatch.setattr(engine_module, "generate", lambda *_, **settings: asked.append(settings["slots"]))
    for sequences in (0.1, 1, 5, 8, 1000):
        free = round(3 * sequences * 512 * 2 * 2 * 8 * 4)
        monkeypatch.setattr(engine_module, "free_memory", lambda free=free: free)
        Engine(shallow).generate(PROMPTS, max_new_tokens=3)
    assert asked == [1, 1, 4, 8, 8]


def test_a_prompt_must_fit_the_window_with_its_continuation(shallow: Decoder) -> None:
    engine = Engine(shallow, context_length=340)
    assert [len(new) for new in engine.generate(PROMPTS, max_new_tokens=40)] == [40] * len(PROMPTS)
    message = "a prompt of 300 tokens and 41 new ones do not fit the window of 340"
    with pytest.raises(RequestError, match=message):
        engine.generate(PROMPTS, max_new_tokens=41)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "a prompt has no tokens"),
        ([[97]], {}, "token id 97 lies outside"),
        ([[1]], {"max_new_tokens": -1}, "-1 new tokens were asked for"),
        ([[1]], {"max_new_tokens": -1000}, "-1000 new tokens were asked for"),
        ([[1]], {"temperature": -1.0}, "the temperature is -1"),
        ([[1]], {"top_p": 0.0}, "top-p is 0"),
    ],
)
def test_bad_generation_is_refused(shallow: Decoder, prompts: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Engine(shallow).generate(prompts, **{"max_new_tokens": 5} | settings)


def test_out_of_memory_halves_the_slots(
    shallow: Decoder, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = failing_above(HostLoop.decode, 4, EXHAUSTED, lambda loop: len(loop._remaining))
    monkeypatch.setattr(HostLoop, "decode", limited)
    notes: list[str] = []
    assert Engine(shallow, note=notes.append).generate(PROMPTS, max_new_tokens=40) == plain
    assert notes == ["out of memory: continuing with 4 sequences at a time"]


# ---------------------------------------------------------------------------------------------------- programs


def mixed_workload(engine: Engine, variant: int) -> None:
    """A suite in small: choices, long contexts, documents, and generation of several kinds."""
    engine.loglikelihood(REQUESTS[variant::3])
    engine.loglikelihood([(tokens(20 + variant), tokens(1 + variant)) for _ in range(3 + 40 * variant)])
    header = tokens(700 + variant)
    engine.loglikelihood([(header + tokens(30), tokens(1)) for _ in range(40)])
    engine.loglikelihood_rolling([tokens(n + variant) for n in (5, 300, 1500)], prefix_token=PREFIX)
    short = [tokens(1 + n % 7 + variant) for n in range(17)]
    engine.generate(short, max_new_tokens=20 + variant, eos_ids=[variant, 7])
    engine.generate(short, max_new_tokens=5, temperature=0.5 + variant, top_p=0.9, seed=variant)
    engine.generate([tokens(200 + n) for n in range(18)], max_new_tokens=20, should_stop=lambda new: len(new) > 9)
    engine.generate([tokens(590 + variant) for n in range(17)], max_new_tokens=7, eos_ids=range(variant + 1))


def decodes(program: tuple[str, str]) -> bool:
    """Whether a program is part of a pass of decoding: of 1, 2, 4 or 8 rows, and of one token or one and its draft."""
    name, shapes = program
    if name in ("empty_part", "take_rows", "write_part", "follow"):
        return True
    passes = re.search(rf"\[[1248],(?:1|{1 + DRAFT})(?:,48)?\]", shapes)
    return name in ("begin", "run_layer", "finish") and passes is not None


def test_a_handful_of_programs_serves_everything(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, vocab_size=97 + 4, num_hidden_layers=1)
    first = Engine(model)
    jax.clear_caches()  # of programs that other tests have compiled: how many there are depends on their order
    with compiled() as programs:
        mixed_workload(first, 0)
    assert sum(not decodes(program) for program in programs) <= 19, programs
    # For each of two sizes of slots, seven programs of each number of rows and tokens that is met.
    assert sum(map(decodes, programs)) <= 2 * 7 * 4 * 2
    ours = [(name, shapes) for name, shapes in programs if hasattr(engine_module, name)]
    assert len(set(ours)) == len(ours), "compiled once each"
    assert {"run_layer", "score_tokens", "fill_part", "write_part", "follow"} <= {name for name, _ in programs}

    # Other lengths, counts, conditions and masks: nothing new, not even the small change of eager operations; but for
    # passes of other numbers of rows, or with drafts, to which only the tokens lead.
    second = Engine(model, neuron_masks=make_plan(score(model), prune_percent=30).masks(model.config))
    third = Engine(model, neuron_masks=(np.full(80, 0.5, np.float32),))
    with compiled() as more:
        mixed_workload(first, 1)
        mixed_workload(second, 2)
        third.loglikelihood(REQUESTS[:9])
    assert all(map(decodes, more)), more
    with compiled() as more:
        mixed_workload(second, 2)
        mixed_workload(first, 1)
        mixed_workload(first, 0)
    assert more == []
