"""Decoding with a cache gives the tokens that full forward passes give, and those of transformers."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import LLAMA3_ROPE, hf_config, write_folder

import convert
from convert.tokenizer import encode_prompt, encode_text, end_of_sequence_ids, load_tokenizer
from gluprune_jax.errors import RequestError
from gluprune_jax.generation import decode, generate, prefill
from gluprune_jax.importance import score
from gluprune_jax.model import Llama
from gluprune_jax.plan import make_plan
from gluprune_jax.slicing import slice_model

STEPS = 40  # three calls of the compiled loop
LENGTHS = (1, 31, 7, 32, 2)
PROMPTS = [np.random.default_rng(length).integers(0, 97, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return convert.load(write_folder(tmp_path_factory.mktemp("model"), hf_config(rope_scaling=LLAMA3_ROPE))).model


@functools.partial(jax.jit, static_argnums=0)
def next_tokens(graphdef: Any, state: Any, tokens: Any, masks: Any) -> Any:
    model = nnx.merge(graphdef, state)
    return jnp.argmax(model.logits(model(tokens, neuron_masks=masks)[0]), axis=-1)


def continue_without_cache(model: Llama, prompts: Sequence[Sequence[int]], masks: Any = None) -> list[list[int]]:
    """One full forward pass for each token."""
    lengths, rows = np.array([len(prompt) for prompt in prompts]), np.arange(len(prompts))
    tokens = np.zeros((len(prompts), lengths.max() + STEPS), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    for step in range(STEPS):
        tokens[rows, lengths + step] = next_tokens(*nnx.split(model), tokens, masks)[rows, lengths + step - 1]
    return [tokens[row, length : length + STEPS].tolist() for row, length in zip(rows, lengths, strict=True)]


@pytest.fixture(scope="module")
def expected(model: Llama) -> list[list[int]]:
    continuations = continue_without_cache(model, PROMPTS)
    assert all(len(set(continuation)) > 8 for continuation in continuations)
    return continuations


def until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """What comes before the first of `ends`."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), None)]


def test_decoding_equals_full_forward_passes(model: Llama, expected: list[list[int]]) -> None:
    assert generate(model, PROMPTS, max_new_tokens=STEPS) == expected


def test_a_batch_equals_its_prompts_one_by_one(model: Llama) -> None:
    together = generate(model, PROMPTS, max_new_tokens=STEPS)
    assert [generate(model, [prompt], max_new_tokens=STEPS)[0] for prompt in PROMPTS] == together
    assert generate(model, PROMPTS[::-1], max_new_tokens=STEPS) == together[::-1]


@pytest.mark.parametrize("steps", [1, 2, 16, 17, 18, 33])
def test_no_more_tokens_than_asked_for(model: Llama, expected: list[list[int]], steps: int) -> None:
    assert generate(model, PROMPTS, max_new_tokens=steps) == [tokens[:steps] for tokens in expected]


def test_a_sequence_ends_before_its_end_token(model: Llama, expected: list[list[int]]) -> None:
    """At every step of the first call of the compiled loop and of the next."""
    for step in range(20):
        ends = {tokens[step] for tokens in expected if tokens.index(tokens[step]) == step}
        for end in sorted(ends)[:1]:
            ended = generate(model, PROMPTS, max_new_tokens=STEPS, eos_ids=[end])
            assert ended == [until(tokens, [end]) for tokens in expected]
            assert step in map(len, ended)


@pytest.mark.parametrize("count", [2, 8, 9, 20])
def test_any_number_of_end_tokens(model: Llama, expected: list[list[int]], count: int) -> None:
    """The last one must count: the others never come."""
    never = [token for token in range(97) if not any(token in tokens for tokens in expected)][: count - 1]
    ends = [*never, expected[1][9]]
    assert len(ends) == count
    assert generate(model, PROMPTS, max_new_tokens=STEPS, eos_ids=ends) == [until(tokens, ends) for tokens in expected]


def test_decoding_stops_when_all_have_ended(model: Llama, expected: list[list[int]]) -> None:
    progress: list[int] = []
    generate(model, PROMPTS, max_new_tokens=STEPS, on_tokens=progress.append)
    assert progress == [16, 32, STEPS]
    progress.clear()
    end = max(expected[1][:16], key=expected[1].index)
    generate(model, PROMPTS[1:2], max_new_tokens=STEPS, eos_ids=[end], on_tokens=progress.append)
    assert progress == [16]
    progress.clear()
    generate(model, PROMPTS[:1], max_new_tokens=STEPS, eos_ids=[expected[0][0]], on_tokens=progress.append)
    assert progress == []


def test_masks_decode_as_the_sliced_model(model: Llama) -> None:
    plan = make_plan(score(model), prune_percent=40)
    masks = plan.masks(model.config)
    masked = generate(model, PROMPTS, max_new_tokens=STEPS, neuron_masks=masks)
    assert masked == continue_without_cache(model, PROMPTS, masks)
    assert masked == generate(slice_model(model, plan), PROMPTS, max_new_tokens=STEPS)
    assert masked != generate(model, PROMPTS, max_new_tokens=STEPS)


def test_values_do_not_recompile(model: Llama) -> None:
    masks = [tuple(np.full(80, value, np.float32) for _ in range(3)) for value in (1, 0.5)]
    programs = []
    for prompts, steps, ends, mask in (
        (PROMPTS[:3], 20, [], masks[0]),
        (PROMPTS[1:4], 31, [5], masks[1]),
        (PROMPTS[2:5], 17, [1, 2, 3, 4, 5, 6, 7, 8], masks[0]),
        ([[1] * 32] * 3, 32, [3], masks[1]),
    ):
        generate(model, prompts, max_new_tokens=steps, eos_ids=ends, neuron_masks=mask)
        programs.append((prefill._cache_size(), decode._cache_size()))
    assert programs == [programs[0]] * 4


def test_a_prompt_may_fill_the_window(model: Llama) -> None:
    window = model.config.max_position_embeddings
    prompt = (PROMPTS[1] * 20)[: window - 5]
    (tokens,) = generate(model, [prompt], max_new_tokens=5)
    padded = np.array([prompt + tokens], np.int32)
    assert tokens == next_tokens(*nnx.split(model), padded, None)[0, window - 6 : -1].tolist()


REFUSALS: list[tuple[list[list[int]], int, str]] = [
    ([[1, 2], []], 5, "a prompt has no tokens"),
    ([[1, 2], [1] * 508], 5, "a prompt of 508 tokens and 5 new ones do not fit the model's window of 512"),
    ([[1, 2], [3, 97]], 5, "token id 97 lies outside the model's vocabulary of 97"),
    ([[1, -1]], 5, "token id -1 lies outside the model's vocabulary of 97"),
    ([[1, 2]], -1, "-1 new tokens were asked for"),
]


@pytest.mark.parametrize(("prompts", "steps", "message"), REFUSALS)
def test_bad_input_is_refused(model: Llama, prompts: list[list[int]], steps: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        generate(model, prompts, max_new_tokens=steps)


def test_nothing_asked_for_is_nothing_done(model: Llama) -> None:
    assert generate(model, [], max_new_tokens=5) == []
    assert generate(model, PROMPTS, max_new_tokens=0) == [[]] * len(PROMPTS)


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
