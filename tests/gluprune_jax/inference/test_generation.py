"""Decoding with a cache gives the tokens that full forward passes give, and those of transformers."""

import collections
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.typing import NDArray
from tiny_models import LLAMA3_ROPE, hf_config, hf_tensors, write_folder

import convert
from convert.tokenizer import encode_prompt, encode_text, end_of_sequence_ids, load_tokenizer
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.inference import generation
from gluprune_jax.inference.by_layers import run_layer
from gluprune_jax.inference.device_loop import STEPS_PER_CALL, DeviceLoop, admit, decode, release
from gluprune_jax.inference.generation import generate
from gluprune_jax.inference.host_cache import HostCache, empty_part, fill_part, take_rows, write_part
from gluprune_jax.inference.host_loop import HostLoop, follow
from gluprune_jax.inference.lookup import DRAFT
from gluprune_jax.inference.prefill import append, cache_slots, extend
from gluprune_jax.models.cache import write_layer
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.pruning.plan import make_plan
from gluprune_jax.pruning.scores import score
from gluprune_jax.pruning.slicing import slice_model

pytestmark = pytest.mark.usefixtures("loop")

CONFIG = hf_config(rope_scaling=LLAMA3_ROPE, num_hidden_layers=2)
STEPS = 40  # three calls of the compiled loop
LENGTHS = (1, 31, 7, 32, 2)
PROMPTS = [np.random.default_rng(length).integers(0, 97, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return convert.load(write_folder(tmp_path_factory.mktemp("model"), CONFIG, hf_tensors(CONFIG, seed=2))).model


@functools.partial(jax.jit, static_argnums=0)
def next_tokens(graphdef: Any, state: Any, tokens: Any, masks: Any) -> Any:
    model = nnx.merge(graphdef, state)
    return jnp.argmax(model.logits(model(tokens, neuron_masks=masks)[0]), axis=-1)


def continue_without_cache(model: Decoder, prompts: Sequence[Sequence[int]], masks: Any = None) -> list[list[int]]:
    """One full forward pass for each token."""
    lengths, rows = np.array([len(prompt) for prompt in prompts]), np.arange(len(prompts))
    tokens = np.zeros((len(prompts), lengths.max() + STEPS), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    for step in range(STEPS):
        tokens[rows, lengths + step] = next_tokens(*nnx.split(model), tokens, masks)[rows, lengths + step - 1]
    return [tokens[row, length : length + STEPS].tolist() for row, length in zip(rows, lengths, strict=True)]


@pytest.fixture(scope="module")
def expected(model: Decoder) -> list[list[int]]:
    continuations = continue_without_cache(model, PROMPTS)
    assert all(len(set(continuation)) > 8 for continuation in continuations)
    return continuations


def until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """What comes before the first of `ends`."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), None)]


def test_decoding_equals_full_forward_passes(model: Decoder, expected: list[list[int]]) -> None:
    assert generate(model, PROMPTS, max_new_tokens=STEPS) == expected


def test_a_batch_equals_its_prompts_one_by_one(model: Decoder) -> None:
    together = generate(model, PROMPTS, max_new_tokens=STEPS)
    assert [generate(model, [prompt], max_new_tokens=STEPS)[0] for prompt in PROMPTS] == together
    assert generate(model, PROMPTS[::-1], max_new_tokens=STEPS) == together[::-1]


@pytest.mark.parametrize("steps", [1, 2, 16, 17, 18, 33])
def test_no_more_tokens_than_asked_for(model: Decoder, expected: list[list[int]], steps: int) -> None:
    assert generate(model, PROMPTS, max_new_tokens=steps) == [tokens[:steps] for tokens in expected]


def test_a_sequence_ends_before_its_end_token(model: Decoder, expected: list[list[int]]) -> None:
    """At every step of the first call of the compiled loop and of the next."""
    for step in range(20):
        ends = {tokens[step] for tokens in expected if tokens.index(tokens[step]) == step}
        for end in sorted(ends)[:1]:
            ended = generate(model, PROMPTS, max_new_tokens=STEPS, eos_ids=[end])
            assert ended == [until(tokens, [end]) for tokens in expected]
            assert step in map(len, ended)


@pytest.mark.parametrize("count", [2, 8, 9, 20])
def test_any_number_of_end_tokens(model: Decoder, expected: list[list[int]], count: int) -> None:
    """The last one must count: the others never come."""
    never = [token for token in range(97) if not any(token in tokens for tokens in expected)][: count - 1]
    ends = [*never, expected[1][9]]
    assert len(ends) == count
    assert generate(model, PROMPTS, max_new_tokens=STEPS, eos_ids=ends) == [until(tokens, ends) for tokens in expected]


def calls(loop: str) -> list[int]:
    """How many new tokens there are after each call, the first token among them."""
    return [17, 33, STEPS] if loop == "device" else list(range(2, STEPS + 1))


def test_decoding_stops_when_all_have_ended(model: Decoder, expected: list[list[int]], loop: str) -> None:
    progress: list[int] = []
    generate(model, PROMPTS, max_new_tokens=STEPS, prompt_lookup=False, on_tokens=progress.append)
    assert progress == [5 * count for count in calls(loop)]
    progress.clear()
    end = max(expected[1][:16], key=expected[1].index)
    generate(model, PROMPTS[1:2], max_new_tokens=STEPS, eos_ids=[end], on_tokens=progress.append)
    assert progress[-1] == expected[1].index(end)
    assert len(progress) == 1 or progress[-2] < progress[-1] or loop == "host"
    progress.clear()
    generate(model, PROMPTS[:1], max_new_tokens=STEPS, eos_ids=[expected[0][0]], on_tokens=progress.append)
    assert progress == [0]


def test_masks_decode_as_the_sliced_model(model: Decoder) -> None:
    plan = make_plan(score(model), prune_percent=40)
    masks = plan.masks(model.config)
    masked = generate(model, PROMPTS, max_new_tokens=STEPS, neuron_masks=masks)
    assert masked == continue_without_cache(model, PROMPTS, masks)
    assert masked == generate(slice_model(model, plan), PROMPTS, max_new_tokens=STEPS)
    assert masked != generate(model, PROMPTS, max_new_tokens=STEPS)


HOST_PROGRAMS = (run_layer, append, empty_part, fill_part, write_part, take_rows, follow)
DEVICE_PROGRAMS = (run_layer, append, admit, decode, write_layer, release)


def sizes(loop: str) -> list[int]:
    """How often each program has been compiled."""
    return [program._cache_size() for program in (HOST_PROGRAMS if loop == "host" else DEVICE_PROGRAMS)]


def test_values_do_not_recompile(model: Decoder, loop: str) -> None:
    """On one CPU, programs are of few numbers of rows and tokens, and all of them are here in the first text."""
    masks = [tuple(np.full(80, value, np.float32) for _ in range(2)) for value in (1, 0.5)]
    again = {"max_new_tokens": 12, "slots": 4, "temperature": 1.0, "neuron_masks": masks[0]}
    for count in (1, 2, 4):
        generate(model, PROMPTS[:count], **again)
        generate(model, [[1, 2] * 16] * count, **again | {"temperature": 0.0, "max_new_tokens": 60})
    for number in (4, 3):
        generate(model, PROMPTS[:number], eos_ids=range(0, 97, 5), **again)
    programs = []
    for prompts, steps, ends, mask, (temperature, top_p, seed) in (
        (PROMPTS[:3], 20, [], masks[0], (0.0, 1.0, 0)),
        (PROMPTS[1:4], 31, [5], masks[1], (1.0, 0.9, 1)),
        (PROMPTS[2:5], 17, [1, 2, 3, 4, 5, 6, 7, 8], masks[0], (0.3, 0.1, 2**32 - 1)),
        ([[1] * 32] * 3, 32, [3], masks[1], (0.0, 1.0, 3)),
        ([[1], [2] * 128, [3] * 99, [4] * 129, [5] * 300], 100, [3], masks[1], (0.0, 1.0, 3)),
    ):
        options = {"temperature": temperature, "top_p": top_p, "seed": seed, "slots": 4}
        options |= {"should_stop": lambda tokens: len(tokens) > 16}
        generate(model, prompts, max_new_tokens=steps, eos_ids=ends, neuron_masks=mask, **options)
        programs.append(sizes(loop))
    assert programs == [programs[0]] * 5


def test_chunks_of_two_sizes_serve_all_lengths(long_model: Decoder, loop: str) -> None:
    options = {"max_new_tokens": 4, "slots": 1}
    generate(long_model, [[1] * 600, [1] * 1000], **options)
    before = sizes(loop)
    generate(long_model, [[1] * length for length in (513, 640, 641, 896, 897, 1000)], **options)
    assert sizes(loop) == before


def test_a_cache_has_few_slots_more_than_are_needed(model: Decoder) -> None:
    for longest in (1, 496, 497, 512, 900, 1546, 2032):
        needed, slots = longest + STEPS_PER_CALL, generation.slots_for(longest)
        assert needed <= slots < max(513, needed + 256)
        keys = HostCache(model.config, 1, slots, jnp.float32).layers[0].k
        assert len(keys) == min(4, slots // 256)
    assert generation.slots_for(2033) == 4096  # longer ones have fewer sizes


def test_a_prompt_may_fill_the_window(model: Decoder) -> None:
    window = model.config.max_position_embeddings
    prompt = (PROMPTS[1] * 20)[: window - 5]
    (tokens,) = generate(model, [prompt], max_new_tokens=5)
    padded = np.array([prompt + tokens], np.int32)
    assert tokens == next_tokens(*nnx.split(model), padded, None)[0, window - 6 : -1].tolist()


REFUSALS: list[tuple[list[list[int]], dict[str, Any], str]] = [
    ([[1, 2], []], {}, "a prompt has no tokens"),
    ([[1, 2], [1] * 508], {}, "a prompt of 508 tokens and 5 new ones do not fit the model's window of 512"),
    ([[1, 2], [3, 97]], {}, "token id 97 lies outside the model's vocabulary of 97"),
    ([[1, -1]], {}, "token id -1 lies outside the model's vocabulary of 97"),
    ([[1, 2]], {"max_new_tokens": -1}, "-1 new tokens were asked for"),
    ([[1, 2]], {"temperature": -0.5}, "the temperature is -0.5"),
    ([[1, 2]], {"temperature": float("nan")}, "the temperature is nan"),
    ([[1, 2]], {"top_p": 0.0}, "top-p is 0"),
    ([[1, 2]], {"top_p": 1.5}, "top-p is 1.5"),
    ([[1, 2]], {"top_p": float("nan")}, "top-p is nan"),
    ([[1, 2]], {"slots": 0}, "0 sequences at a time"),
    ([[1, 2]], {"seed": -1}, "the seed is -1"),
    ([[1, 2]], {"seed": 2**32}, "the seed is 4294967296"),
]


@pytest.mark.parametrize(("prompts", "options", "message"), REFUSALS)
def test_bad_input_is_refused(model: Decoder, prompts: list[list[int]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        generate(model, prompts, **{"max_new_tokens": 5} | options)


def test_nothing_asked_for_is_nothing_done(model: Decoder) -> None:
    assert generate(model, [], max_new_tokens=5) == []
    ended: list[tuple[int, list[int]]] = []
    on_result = functools.partial(add, ended)
    assert generate(model, PROMPTS, max_new_tokens=0, on_result=on_result) == [[]] * len(PROMPTS)
    assert sorted(ended) == [(number, []) for number in range(len(PROMPTS))]


# ------------------------------------------------------------------------------------------------------- slots

Ended = list[tuple[int, list[int]]]


def add(ended: Ended, number: int, tokens: list[int]) -> None:
    """An `on_result` that keeps what was said when it was said."""
    ended.append((number, list(tokens)))


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    config = hf_config(rope_scaling=LLAMA3_ROPE, max_position_embeddings=1200, num_hidden_layers=2)
    return convert.load(write_folder(tmp_path_factory.mktemp("long"), config)).model


def check_greedy(model: Decoder, prompt: Sequence[int], tokens: Sequence[int]) -> None:
    """Each token is what a full forward pass gives for all that come before it."""
    padded = np.zeros((1, model.config.max_position_embeddings), np.int32)
    padded[0, : len(prompt) + len(tokens)] = [*prompt, *tokens]
    following = next_tokens(*nnx.split(model), padded, None)[0]
    assert following[len(prompt) - 1 : len(prompt) - 1 + len(tokens)].tolist() == list(tokens)


# Just below, at and above the sizes of chunks; one, two and more of the larger.
LONG_LENGTHS = (513, 1, 129, 512, 3, 128, 641, 127, 1040, 896, 385)
LONG_PROMPTS = [np.random.default_rng(length).integers(0, 97, length).tolist() for length in LONG_LENGTHS]


@pytest.fixture(scope="module")
def long_expected(long_model: Decoder) -> list[list[int]]:
    return generate(long_model, LONG_PROMPTS, max_new_tokens=STEPS)


@pytest.mark.parametrize("number", range(len(LONG_LENGTHS)), ids=LONG_LENGTHS)
def test_prompts_in_chunks_equal_full_forward_passes(
    long_model: Decoder, long_expected: list[list[int]], number: int
) -> None:
    assert len(long_expected[number]) == STEPS
    check_greedy(long_model, LONG_PROMPTS[number], long_expected[number])


@pytest.mark.parametrize("slots", [1, 3])
def test_slots_do_not_change_the_result(long_model: Decoder, long_expected: list[list[int]], slots: int) -> None:
    assert generate(long_model, LONG_PROMPTS, max_new_tokens=STEPS, slots=slots) == long_expected


def test_what_prompts_begin_with_is_run_once(long_model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whole chunks, so that each continuation is what its prompt has alone; whatever else is between them."""
    header, other = (np.random.default_rng(seed).integers(0, 97, 700).tolist() for seed in (1, 2))
    prompts = [header + [n] * 5 for n in range(4)] + [other[:600], header[:600], [*other, 1, 2], header, header]
    alone = [generate(long_model, [prompt], max_new_tokens=STEPS)[0] for prompt in prompts]
    run: list[int] = []

    def counted(*args: Any) -> Any:
        run.append(args[3].shape[1])
        return extend(*args)

    monkeypatch.setattr(generation, "extend", counted)
    assert generate(long_model, prompts, max_new_tokens=STEPS, slots=2) == alone
    # Once 512 tokens of each beginning. Of the header once the next 128 too, and each prompt's last chunk.
    assert collections.Counter(run) == {512: 2, 128: 1 + 7 + 1 + 2}


@pytest.mark.parametrize("slots", [1, 2, 3, 16])
def test_slots_are_refilled_as_sequences_end(model: Decoder, expected: list[list[int]], slots: int) -> None:
    """Sequences of every length from none to all, more of them than slots; each is told once, as it ends."""
    ends = sorted({tokens[step] for tokens, step in zip(expected, (0, 3, 18, 30, 39), strict=True)})
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    wanted = [until(tokens, ends) for tokens in expected for _ in range(4)]
    assert len(set(map(len, wanted))) > 2
    ended: Ended = []
    on_result = functools.partial(add, ended)
    assert generate(model, prompts, max_new_tokens=STEPS, eos_ids=ends, slots=slots, on_result=on_result) == wanted
    assert sorted(ended) == list(enumerate(wanted))


def test_an_ended_slot_is_refilled_while_others_run(model: Decoder, expected: list[list[int]], loop: str) -> None:
    """Two slots: one sequence takes all calls, the others take turns beside it."""
    end = expected[1][5]
    prompts = [PROMPTS[0], *[PROMPTS[1]] * 3]
    assert end not in expected[0]
    assert len(PROMPTS[1]) > len(PROMPTS[0])
    ended: Ended = []
    totals: list[int] = []
    options: dict[str, Any] = {"eos_ids": [end], "slots": 2, "on_result": functools.partial(add, ended)}
    generate(model, prompts, max_new_tokens=STEPS, prompt_lookup=False, on_tokens=totals.append, **options)
    short = expected[1].index(end)
    assert [number for number, _ in ended][-1] == 0
    if loop == "device":  # two short ones in the first call; the third beside the long one
        assert totals == [2 * short, 3 * short + 17, 3 * short + 33, 3 * short + STEPS]
    else:  # the short ones end in the call of their end token, and the next one begins in the one after it
        assert len(totals) == short + STEPS - 1
        assert totals[short - 1 :: short][:2] == [2 * short, 3 * short + short + 1]


def test_results_are_told_before_the_rest_is_decoded(model: Decoder) -> None:
    events: list[str] = []
    generate(
        model,
        PROMPTS[:3],
        max_new_tokens=4,
        slots=1,
        on_tokens=lambda total: total < 4 or total % 4 or events.append("call"),
        on_result=lambda number, tokens: events.append(f"result {number}"),
    )
    assert events == ["result 1", "call", "result 2", "call", "result 0", "call"]


def test_should_stop_ends_a_sequence(model: Decoder, expected: list[list[int]], loop: str) -> None:
    """It is asked after each call; the tokens of the call that it looked at stay."""
    marks = {expected[0][5], expected[1][20]}
    counts = calls(loop)
    wanted = [tokens[: next((count for count in counts if marks & set(tokens[:count])), STEPS)] for tokens in expected]
    assert len(set(map(len, wanted))) > 1
    for slots in (1, 2, 16):
        ended: Ended = []
        asked: list[list[int]] = []

        def should_stop(tokens: Sequence[int], asked: list[list[int]] = asked) -> bool:
            asked.append(list(tokens))
            return bool(marks & set(tokens))

        options: dict[str, Any] = {
            "should_stop": should_stop,
            "slots": slots,
            "on_result": functools.partial(add, ended),
            "prompt_lookup": False,
        }
        assert generate(model, PROMPTS, max_new_tokens=STEPS, **options) == wanted
        assert sorted(ended) == list(enumerate(wanted))
        possible = sorted(
            tokens[:n]
            for tokens, all_of in zip(expected, wanted, strict=True)
            for n in counts
            if n <= len(all_of) and n < STEPS
        )
        assert sorted(asked) == possible, "asked again, or not asked"


def test_a_stopped_sequence_leaves_its_slot(model: Decoder, expected: list[list[int]], loop: str) -> None:
    progress: list[int] = []
    options: dict[str, Any] = {"should_stop": lambda tokens: True, "prompt_lookup": False}
    stopped = generate(model, PROMPTS, max_new_tokens=STEPS, slots=1, on_tokens=progress.append, **options)
    first = calls(loop)[0]
    assert stopped == [tokens[:first] for tokens in expected]
    assert progress == [first * n for n in range(1, 6)]


# ------------------------------------------------------------------------------------------------------ one CPU


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and tokens of each pass on one CPU."""
    shapes: list[tuple[int, int]] = []
    run = HostLoop._run

    def seen(self: HostLoop, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        shapes.append((tokens.shape[0], tokens.shape[1]))
        return run(self, tokens)

    monkeypatch.setattr(HostLoop, "_run", seen)
    return shapes


LONG = 150


@pytest.fixture(scope="module")
def looping(model: Decoder) -> Decoder:
    """A model that repeats itself, because it hardly looks at more than the last token."""
    forgetful = nnx.clone(model)
    for layer in forgetful.layers:
        layer.self_attn.o_proj[...] *= 0.02
    return forgetful


@pytest.fixture(scope="module")
def repeated(looping: Decoder) -> list[list[int]]:
    return generate(looping, PROMPTS, max_new_tokens=LONG, prompt_lookup=False)


def test_drafts_do_not_change_the_result(
    looping: Decoder, repeated: list[list[int]], passes: list[tuple[int, int]]
) -> None:
    assert generate(looping, PROMPTS, max_new_tokens=LONG) == repeated
    if passes:  # not on devices
        assert {tokens for _, tokens in passes} == {1, 1 + DRAFT}
        assert len(passes) < LONG / 2


@pytest.mark.parametrize("place", [10, 77, 140])
def test_a_sequence_ends_within_a_draft(looping: Decoder, repeated: list[list[int]], place: int) -> None:
    """At an end token that stands in the middle of what is repeated, or at the last token asked for."""
    for row, tokens in enumerate(repeated):
        end = tokens[place]
        wanted = until(tokens, [end])
        assert generate(looping, [PROMPTS[row]], max_new_tokens=LONG, eos_ids=[end]) == [wanted]
        assert generate(looping, [PROMPTS[row]], max_new_tokens=place) == [tokens[:place]]


def test_draws_are_made_one_by_one(model: Decoder, passes: list[tuple[int, int]]) -> None:
    generate(model, [[1, 2] * 20], max_new_tokens=STEPS, temperature=0.1)
    assert {tokens for _, tokens in passes} <= {1}


@pytest.mark.parametrize("prompts", [PROMPTS, [(PROMPTS[1] * 9)[n : n + 250] for n in range(5)]], ids=["short", "long"])
def test_rows_that_nothing_waits_for_are_given_up(
    model: Decoder, prompts: list[list[int]], passes: list[tuple[int, int]], loop: str
) -> None:
    """Answers of very different lengths: the last ones do not pay for the rows of the first ones.

    Behind long prompts they reach another part of the cache.
    """
    options: dict[str, Any] = {"max_new_tokens": LONG, "prompt_lookup": False}
    alone = generate(model, prompts, slots=1, **options)
    passes.clear()
    lengths = [10, 60, 40, 90, LONG]
    ends = {tuple(tokens[:length]) for tokens, length in zip(alone, lengths, strict=True)}

    def should_stop(tokens: Sequence[int]) -> bool:
        return tuple(tokens) in ends

    found = generate(model, prompts, slots=8, should_stop=should_stop, **options)
    assert all(tokens == whole[: len(tokens)] for tokens, whole in zip(found, alone, strict=True))
    if loop == "host":
        assert list(map(len, found)) == lengths
        rows = [count for count, _ in passes]
        assert rows == sorted(rows, reverse=True)
        assert set(rows) == {8, 4, 2, 1}
        assert rows.count(1) > LONG // 5


# ---------------------------------------------------------------------------------------------------- sampling


def sample(model: Decoder, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    return generate(model, prompts, **{"max_new_tokens": STEPS, "temperature": 1.0, "seed": 7} | options)


def test_a_draw_depends_on_the_seed_and_the_number_of_the_prompt(model: Decoder) -> None:
    drawn = sample(model, PROMPTS)
    assert sample(model, PROMPTS) == drawn
    for slots in (1, 2, 3, 16):
        assert sample(model, PROMPTS, slots=slots) == drawn
    others = [PROMPTS[0], [1] * 40, PROMPTS[2], [5], PROMPTS[4], [3] * 200, [9, 9]]
    for number in (0, 2, 4):
        assert sample(model, others, slots=2)[number] == drawn[number]
    assert all(a != b for a, b in zip(sample(model, PROMPTS, seed=8), drawn, strict=True))
    same = sample(model, [PROMPTS[0]] * 4)
    assert same[0] == drawn[0]
    assert len(set(map(tuple, same))) == 4


def test_the_end_of_one_sequence_does_not_change_the_draws_of_others(model: Decoder) -> None:
    drawn = sample(model, PROMPTS)
    end = drawn[1][3]
    for slots in (1, 2, 16):
        assert sample(model, PROMPTS, slots=slots, eos_ids=[end]) == [until(tokens, [end]) for tokens in drawn]


@pytest.mark.parametrize(
    "options", [{"temperature": t} for t in (1e-4, 1e-10, 1e-38, 1e-39, 1e-60)] + [{"top_p": 1e-6}, {"top_p": 1e-30}]
)
def test_the_limits_of_sampling_are_greedy(
    model: Decoder, expected: list[list[int]], options: dict[str, float]
) -> None:
    assert sample(model, PROMPTS, **options) == expected


# ------------------------------------------------------------------------------------------------------ memory


def exhaust(monkeypatch: pytest.MonkeyPatch, program: str, fails: Callable[[int], bool], error: Exception) -> None:
    """A program has no memory for some numbers of slots, and what it was given is lost as what is donated is."""
    if program == "extend":

        def run(*args: Any) -> Any:
            if fails(0):
                raise error
            return extend(*args)

        monkeypatch.setattr(generation, "extend", run)
        return
    for kind in (HostLoop, DeviceLoop):

        def method(self: Any, *args: Any, original: Any, **options: Any) -> Any:
            held = self._cache.layers if isinstance(self, HostLoop) else self._state
            if fails(jax.tree.leaves(held)[0].shape[0]):
                jax.tree.map(lambda array: isinstance(array, jax.Array) and array.delete(), held)
                raise error
            return original(self, *args, **options)

        whole = functools.partialmethod(method, original=getattr(kind, program))
        monkeypatch.setattr(kind, program, whole)


OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.")


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, MemoryError()], ids=["device", "host"])
@pytest.mark.parametrize("program", ["admit", "decode"])
def test_without_memory_for_all_slots_there_are_fewer(
    model: Decoder, expected: list[list[int]], program: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    exhaust(monkeypatch, program, lambda slots: slots > 2, error)
    told: list[int] = []
    progress: list[int] = []
    ended: Ended = []
    options: dict[str, Any] = {"on_result": functools.partial(add, ended), "on_tokens": progress.append}
    assert generate(model, PROMPTS, max_new_tokens=STEPS, on_out_of_memory=told.append, **options) == expected
    assert told == [4, 2]
    assert sorted(ended) == list(enumerate(expected))
    assert progress[-1] == len(PROMPTS) * STEPS


@pytest.mark.parametrize("program", ["extend", "admit", "decode"])
@pytest.mark.parametrize("call", range(1, 7))
def test_what_has_ended_is_not_begun_anew(
    model: Decoder, expected: list[list[int]], program: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out later, when some sequences have ended and others have tokens already."""
    end = expected[1][5]
    wanted = [until(tokens, [end]) for tokens in expected]
    numbers = iter(range(1, 1000))
    exhaust(monkeypatch, program, lambda _: next(numbers) == call, OUT_OF_MEMORY)
    told: list[int] = []
    progress: list[int] = []
    ended: Ended = []
    options: dict[str, Any] = {"on_result": functools.partial(add, ended), "on_out_of_memory": told.append}
    options |= {"slots": 2, "on_tokens": progress.append, "eos_ids": [end]}
    assert generate(model, PROMPTS, max_new_tokens=STEPS, **options) == wanted
    assert told == [1] * (next(numbers) > call)
    assert sorted(ended) == list(enumerate(wanted))
    assert progress[-1] == sum(map(len, wanted))


@pytest.mark.parametrize("program", ["extend", "admit", "decode"])
def test_without_memory_for_one_slot_nothing_is_generated(
    model: Decoder, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exhaust(monkeypatch, program, lambda _: True, OUT_OF_MEMORY)
    told: list[int] = []
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        generate(model, PROMPTS, max_new_tokens=STEPS, on_out_of_memory=told.append)
    assert told == [4, 2, 1]


@pytest.mark.parametrize("error", [ValueError("wrong"), jax.errors.JaxRuntimeError("INTERNAL: wrong")])
def test_other_errors_are_not_swallowed(model: Decoder, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    exhaust(monkeypatch, "decode", lambda _: True, error)
    told: list[int] = []
    with pytest.raises(type(error), match="wrong"):
        generate(model, PROMPTS, max_new_tokens=STEPS, on_out_of_memory=told.append)
    assert told == []


def test_prompts_need_no_memory_when_none_waits(long_model: Decoder) -> None:
    """Their cache of keys and values is given back, in the middle of the run."""
    prompts = [[1, 2, 3], [4] * 600, [5, 6]]
    shape = (1, long_model.config.num_key_value_heads, cache_slots(600), long_model.config.head_dim)
    found: list[int] = []
    before = [array for array in jax.live_arrays() if array.shape == shape]  # of other tests

    def look(_: int) -> None:
        found.append(sum(array.shape == shape for array in jax.live_arrays()) - len(before))

    generate(long_model, prompts, max_new_tokens=STEPS, slots=2, on_tokens=look)
    layers = long_model.config.num_hidden_layers
    assert found[0] == 2 * layers
    assert found[-1] == 0
    assert set(found) == {2 * layers, 0}


# ----------------------------------------------------------------------------------------------- a real model

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "List three prime numbers and explain why each is prime.",
    "Say yes.",
)
TEXTS = (
    "The quick brown fox",
    "def fibonacci(n):\n",
    "In 1969, the first",
    "Once upon a time, in a small village at the edge of a very large forest, there lived",
    "1, 2, 3, 5, 8,",
    "The mitochondria is",
)


@pytest.mark.torch
@pytest.mark.real_model
def test_a_real_model_says_what_it_says_in_transformers(
    demo: convert.Checkpoint, demo_folder: str, load_reference: Callable[[str | Path], Any]
) -> None:
    import torch

    tokenizer, ends = load_tokenizer(demo), end_of_sequence_ids(demo)
    prompts = [encode_prompt(tokenizer, text) for text in QUESTIONS] + [encode_text(tokenizer, text) for text in TEXTS]
    ours = generate(demo.model, prompts, max_new_tokens=64, eos_ids=ends)

    longest = max(map(len, prompts))
    padded = torch.tensor([[ends[0]] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    theirs = load_reference(demo_folder).generate(
        padded, attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=list(ends), pad_token_id=ends[0]
    )
    assert ours == [until(row, ends) for row in theirs[:, longest:].tolist()]
    lengths = [len(tokens) for tokens in ours]
    assert max(lengths) == 64
    assert min(lengths) < 64, "none came to its end"


def test_a_model_that_computes_nonsense_is_reported(model: Decoder) -> None:
    """What it leaves in a slot would spoil the sequences that come after it."""
    broken = nnx.clone(model)
    broken.embed_tokens[...] = broken.embed_tokens[...].at[7].set(jnp.nan)
    good, bad = [1, 2, 3], [7] * 40
    generate(broken, [good], max_new_tokens=8)
    for prompts in ([good, bad], [bad, good]):
        with pytest.raises(OperationError, match=r"prompt \d are not finite in float32; check the weights"):
            generate(broken, prompts, max_new_tokens=8, slots=1)
