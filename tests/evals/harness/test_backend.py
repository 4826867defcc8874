"""The lm-eval backend: texts against lm-eval's own handling of them, numbers against a plain forward pass."""

import contextlib
import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import get_model
from merging_tokenizer import CHAT, LICENSE, VOCABULARY, WINDOW, write_tiny
from tiny_models import hf_config, write_folder
from tiny_tasks import write_tasks

import convert
from evals.harness.backend import MODEL_ARGUMENTS, GlupruneLM
from evals.harness.decoding import Decoding, StopStrings, parse_decoding
from evals.lm_eval_command import run_lm_eval
from evals.results.journal import Journal
from gluprune_jax import make_plan, score
from gluprune_jax.errors import GlupruneError, OperationError, RequestError
from gluprune_jax.inference.device_loop import STEPS_PER_CALL
from gluprune_jax.inference.engine import LogLikelihood
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.parallel.mesh import MeshShape, shape_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> convert.Checkpoint:
    return convert.load(folder)


@pytest.fixture(scope="module")
def lm(checkpoint: convert.Checkpoint) -> GlupruneLM:
    return GlupruneLM.from_checkpoint(checkpoint)


class Scripted:
    """In place of the engine: answers from the lengths, generates what it is told, and remembers what it was asked."""

    def __init__(self, window: int = WINDOW, scripts: dict[tuple[int, ...], Sequence[int]] | None = None):
        self.window, self.scripts = window, scripts or {}
        self.asked: list[Any] = []
        self.fails_after = -1

    def loglikelihood(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        on_result: Callable[[int, LogLikelihood], None] | None = None,
    ) -> list[LogLikelihood]:
        results = [LogLikelihood(-float(len(k)), len(c) % 2 == 0) for c, k in requests]
        self._tell([(list(c), list(k)) for c, k in requests], results, on_result)
        return results

    def loglikelihood_rolling(self, documents: Sequence[Sequence[int]], *, prefix_token: int, on_result: Any) -> Any:
        self._tell([(prefix_token, list(d)) for d in documents], [-float(len(d)) for d in documents], on_result)

    def generate(
        self, prompts: Sequence[Sequence[int]], *, should_stop: Any, on_tokens: Any, on_result: Any, **options: Any
    ) -> Any:
        results = []
        for prompt in prompts:
            ids = list(self.scripts[tuple(prompt)])[: options["max_new_tokens"]]
            end = next((i for i, token in enumerate(ids) if token in options["eos_ids"]), len(ids))
            for count in range(1 + STEPS_PER_CALL, end, STEPS_PER_CALL):
                if should_stop(ids[:count]):
                    end = count
                    break
            results.append(ids[:end])
        self._tell([(list(prompt), options) for prompt in prompts], results, on_result)

    def _tell(self, asked: Sequence[Any], results: Sequence[Any], on_result: Any) -> None:
        for number in reversed(range(len(asked))):  # in any order
            if len(self.asked) == self.fails_after:
                raise MemoryError
            self.asked.append(asked[number])
            on_result(number, results[number])


def scripted(checkpoint: convert.Checkpoint, **options: Any) -> tuple[GlupruneLM, Scripted]:
    scripts = options.pop("scripts", None)
    lm = GlupruneLM.from_checkpoint(checkpoint, **options)
    engine = Scripted(scripts=scripts)
    lm.engine = engine
    return lm, engine


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, 0, ("made_up", i, 1)) for i, args in enumerate(arguments)]


def greedy(context: str, *until: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return context, {"until": list(until), "do_sample": False, "max_gen_toks": 40, **more}


# ---------------------------------------------------------------------------------------------------- token ids


PAIRS = [
    ("", "The sea"),
    ("", "</s>"),
    ("", "<s>The sea"),
    ("The sea ", "is wide"),
    ("The sea \n ", "is wide"),
    ("The sea", " is wide"),
    ("The sea", " is"),
    ("The se", "a is wide"),
    ("<s>The sea", " is wide"),
    ("<s>", "The sea"),
    ("The </s>sea<|call|> ", " is"),
    ("naïve café, 東京 ", "🙂🙃"),
    (LICENSE[:400], " and so on"),
]


def as_lm_eval_encodes(lm: GlupruneLM, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """By lm-eval's own base class, text by text."""

    def encode(text: str, add_special_tokens: bool | None = None) -> list[int]:
        wish = lm._add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and text.startswith(lm.tokenizer.decode(lm.prefix_token_id)):
            wish = False
        ids: list[int] = lm.tokenizer.encode(text, **({} if wish is None else {"add_special_tokens": wish}))
        return ids

    class Plain(TemplateLM):  # type: ignore[misc]
        tok_encode = staticmethod(encode)
        eot_token_id = lm.eot_token_id
        prefix_token_id = lm.prefix_token_id
        loglikelihood_rolling = generate_until = None

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
            return [(list(context), list(continuation)) for _, context, continuation in requests]

    return Plain().loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)  # type: ignore[no-any-return]


def as_we_encode(lm: GlupruneLM, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    return [(list(context), list(more)) for context, more in lm._encode_pairs(pairs, quiet=True)]


@pytest.mark.parametrize("add_bos_token", [False, True, None])
@pytest.mark.parametrize("prefix", [None, 1, 7])
def test_requests_are_tokenised_as_by_lm_eval(
    checkpoint: convert.Checkpoint, add_bos_token: bool | None, prefix: int | None
) -> None:
    lm = GlupruneLM.from_checkpoint(checkpoint, add_bos_token=add_bos_token, prefix_token_id=prefix)
    pairs = [pair for pair in PAIRS if prefix != 1 or pair != ("", "</s>")]  # nothing would be left to score
    ours = as_we_encode(lm, pairs)
    assert ours == as_lm_eval_encodes(lm, pairs)
    assert (ours[4][0][0] == 0) == bool(add_bos_token)
    assert lm.tok_encode("<s>The sea").count(0) == (2 if add_bos_token and prefix else 1)


PIECES = [*"ab c.\n é東🙂", "the", " the", "<s>", "</s>", "  "]
TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_request_is_tokenised_as_by_lm_eval(lm: GlupruneLM, pairs: list[tuple[str, str]]) -> None:
    try:
        expected = as_lm_eval_encodes(lm, pairs)
    except IndexError:  # neither context nor continuation
        expected = [([], [])]
    if not all(context and continuation for context, continuation in expected):
        with pytest.raises(RequestError, match="has no tokens"):
            as_we_encode(lm, pairs)
    else:
        assert as_we_encode(lm, pairs) == expected


def test_each_text_is_tokenised_once_and_contexts_are_kept_once(
    checkpoint: convert.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, engine = scripted(checkpoint)
    seen: list[str] = []
    true_one = lm.tokenizer

    class Counting:
        def __call__(self, texts: list[str], **options: Any) -> Any:
            seen.extend(texts)
            return true_one(texts, **options)

        def __getattr__(self, name: str) -> Any:
            assert name != "encode"
            return getattr(true_one, name)

    lm.tokenizer = Counting()
    monkeypatch.setattr("evals.harness.backend._TOKENISED_TOGETHER", 7)
    pairs = [(f"Question {i // 4}:", f" {'ABCD'[i % 4]}") for i in range(40)]
    lm.loglikelihood(requests("loglikelihood", *pairs, *pairs))
    assert len(engine.asked) == 40
    assert len(seen) - len(set(seen)) <= 40 // 7  # a context on both sides of a cut
    seen.clear()
    encoded = lm._encode_pairs(pairs[:7], quiet=True)
    assert len({id(context) for context, _ in encoded}) == 2
    assert len(seen) == 2 + 7


# ------------------------------------------------------------------------------------------------------- numbers


@jax.jit
def log_probabilities(model: Decoder, tokens: Any, masks: Any) -> Any:
    hidden, _ = model(tokens, neuron_masks=masks)
    return jax.nn.log_softmax(model.logits(hidden[0]), axis=-1)


def plain_logits(lm: GlupruneLM, ids: Sequence[int], masks: Any = None) -> Any:
    """Log-probabilities after each token, all in one pass without a cache."""
    padded = jnp.zeros((1, WINDOW), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids))
    return np.asarray(log_probabilities(lm.checkpoint.model, padded, masks))[: len(ids)]


def test_log_likelihoods_are_those_of_a_plain_forward_pass(checkpoint: convert.Checkpoint) -> None:
    plan = make_plan(score(checkpoint.model), prune_percent=30)
    masks = plan.masks(checkpoint.config)
    for lm, used in (
        (GlupruneLM.from_checkpoint(checkpoint), None),
        (GlupruneLM.from_checkpoint(checkpoint, neuron_masks=masks), masks),
    ):
        results = lm.loglikelihood(requests("loglikelihood", *PAIRS))
        for (context, continuation), (value, is_greedy) in zip(as_we_encode(lm, PAIRS), results, strict=True):
            tokens = [*context, *continuation][-(WINDOW + 1) :]
            logits = plain_logits(lm, tokens[:-1], used)[-len(continuation) :]
            chosen = logits[np.arange(len(continuation)), continuation]
            assert value == pytest.approx(chosen.sum(), abs=1e-4)
            assert is_greedy == bool((logits.argmax(-1) == continuation).all())
            assert type(value) is float
            assert type(is_greedy) is bool


def test_documents_begin_after_the_prefix_token(lm: GlupruneLM) -> None:
    texts = ["", "The sea is wide.", "<s>The sea"]
    results = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    for text, result in zip(texts, results, strict=True):
        ids = lm.tok_encode(text)
        logits = plain_logits(lm, [0, *ids])
        assert result == pytest.approx(sum(logits[i, token] for i, token in enumerate(ids)), abs=1e-4)


def test_answers_are_those_of_a_plain_forward_pass(lm: GlupruneLM) -> None:
    contexts = ["The sea", LICENSE[:300], "naïve 東京"]
    answers = lm.generate_until(requests("generate_until", *(greedy(c, max_gen_toks=20) for c in contexts)))
    for context, answer in zip(contexts, answers, strict=True):
        prompt = lm.tok_encode(context, left_truncate_len=WINDOW - 20)
        ids: list[int] = []
        while len(ids) < 20 and 1 not in ids:
            ids.append(int(plain_logits(lm, [*prompt, *ids])[-1].argmax()))
        assert answer == lm.tok_decode(ids)
        assert answer


# ---------------------------------------------------------------------------------------------------- generation


def test_generation_tells_of_tokens_and_of_how_many_there_can_be(
    checkpoint: convert.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before the first answer is there; and an answer that ends early leaves less to do."""
    shown: list[tuple[int, int | None, str]] = []

    @contextlib.contextmanager
    def progress(what: str, total: int, unit: str) -> Iterator[Any]:
        assert (what, total, unit) == ("answers", 3 * 40 + 2 * 20, "tokens")
        yield lambda done, at_most=None, state="": shown.append((done, at_most, state))

    monkeypatch.setattr(GlupruneLM, "progress", staticmethod(progress))
    lm = GlupruneLM.from_checkpoint(checkpoint, batch_size=2)
    contexts = [greedy("The"), greedy("A sea"), greedy("It is"), greedy("To", max_gen_toks=20)]
    contexts.append(greedy("So", max_gen_toks=20))
    answers: list[int] = []
    generate = lm.engine.generate

    def counted(*args: Any, **options: Any) -> list[list[int]]:
        results = generate(*args, **options)
        answers.extend(map(len, results))
        return results

    monkeypatch.setattr(lm.engine, "generate", counted)
    lm.generate_until(requests("generate_until", *contexts))
    assert shown[0][2] == "0/5 answers"
    assert shown[0][0] > 0
    assert [done for done, _, _ in shown] == sorted(done for done, _, _ in shown)
    assert shown[-1] == (sum(answers), sum(answers), "5/5 answers")


def first_stop(tokenizer: Any, ids: Sequence[int], stops: Sequence[str]) -> int | None:
    """Where lm-eval's criteria end one sequence, looked for after every token."""
    lengths = {stop: len(tokenizer.encode(stop, add_special_tokens=False)) + 2 for stop in stops}
    for count in range(1, len(ids) + 1):
        if any(stop in tokenizer.decode(ids[:count][-length:]) for stop, length in lengths.items()):
            return count
    return None


STOPS = st.sampled_from(["\n", "\n\n", " the", "the sea", "é", "京", "<|call|>", "a b", "Q:", "\n\nQ", ".", "</s>"])


@given(st.lists(TEXT | STOPS | st.sampled_from(["Q", ":", "\n", "x" * 9]), max_size=30), st.lists(STOPS, max_size=3))
@settings(max_examples=300, deadline=None)
def test_texts_end_where_lm_eval_ends_them(lm: GlupruneLM, parts: list[str], stops: list[str]) -> None:
    # Part by part: other tokens than the tokenizer would choose for the whole text.
    ids = [token for part in parts for token in lm.tok_encode(part)]
    found = StopStrings(lm.tokenizer, stops).find(ids)
    assert found == first_stop(lm.tokenizer, ids, stops)


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=60), st.lists(TEXT | STOPS, max_size=3))
@settings(max_examples=300, deadline=None)
def test_any_tokens_end_where_lm_eval_ends_them(lm: GlupruneLM, ids: list[int], stops: list[str]) -> None:
    stops = [stop for stop in stops if stop]
    assert StopStrings(lm.tokenizer, stops).find(ids) == first_stop(lm.tokenizer, ids, stops)


@pytest.mark.parametrize("before", range(0, 3 * STEPS_PER_CALL, 5))
def test_a_stop_string_is_seen_by_one_who_looks_every_few_steps(lm: GlupruneLM, before: int) -> None:
    ids = [9] * before + lm.tok_encode("\n\nQuestion:")
    after = ids + [9] * STEPS_PER_CALL
    stops = StopStrings(lm.tokenizer, ["Question:"])
    asked = next(n for n in range(1 + STEPS_PER_CALL, 200, STEPS_PER_CALL) if n >= len(ids))
    assert stops(after[:asked])
    assert not stops(ids[:-1])
    assert stops.find(after) == len(ids)


END = ["</s>"]


def test_texts_are_trimmed_as_by_lm_eval(checkpoint: convert.Checkpoint) -> None:
    encode = GlupruneLM.from_checkpoint(checkpoint).tok_encode
    filler = " and so on" * 20
    cases = [
        # stop strings, generated, what is left of it
        ([], "Yes." + filler, None),
        ([], "Yes.</s> No", "Yes."),
        (["."], "Yes. No" + filler, "Yes"),
        (["Question:", "\n\n"], "Yes\nQuestion: why", "Yes\n"),
        (["\n"], "\nYes" + filler, ""),
        (["\n\nQ", "Q:"], "Yes\n\nQ: why?" + filler, "Yes"),  # ended at the first, before there is the second
        (["<|call|>"], "Yes<|call|> No" + filler, "Yes"),  # a special token, of which no text remains
        (["Yes No"], "Yes<|call|> No" + filler, None),  # the special token stands between them
        (["京"], "東京 is a city" + filler, "東"),
    ]
    for until, text, expected in cases:
        lm, _ = scripted(checkpoint, scripts={tuple(encode("Is it?")): encode(text)})
        (answer,) = lm.generate_until(requests("generate_until", greedy("Is it?", *until)))
        whole = lm.tok_decode(encode(text)[:40])
        if expected is None:
            expected = whole.split(until[0])[0] if until else whole
        assert answer == expected, (until, text)


def test_settings_reach_the_engine_in_groups(checkpoint: convert.Checkpoint) -> None:
    encode = GlupruneLM.from_checkpoint(checkpoint).tok_encode
    long = LICENSE[:300]
    scripts = {tuple(encode(text)[-limit:]): encode(" Yes") for text in ("A", "B", long) for limit in (24, 54)}
    lm, engine = scripted(checkpoint, scripts=scripts)
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "seed": 5, "max_tokens": 10}
    answers = lm.generate_until(requests("generate_until", greedy("A"), ("B", sampled), greedy("B"), greedy(long)))
    assert answers == [" Yes"] * 4
    prompts = [prompt for prompt, _ in engine.asked]
    assert prompts == [encode(long)[-24:], encode("B"), encode("A"), encode("B")]  # the sampled one is another group
    options = [options for _, options in engine.asked]
    assert options[0] == options[1] == options[2]
    assert options[0] == {"max_new_tokens": 40, "eos_ids": [1], "temperature": 0, "top_p": 1, "seed": 0}
    assert options[3] == {"max_new_tokens": 10, "eos_ids": [1], "temperature": 0.7, "top_p": 0.9, "seed": 5}


def test_every_end_token_ends_a_text(tmp_path: Path) -> None:
    checkpoint = convert.load(write_tiny(tmp_path / "llama", generation_config={"eos_token_id": [2, 5]}))
    encode = GlupruneLM.from_checkpoint(checkpoint).tok_encode
    lm, engine = scripted(checkpoint, scripts={tuple(encode("A")): encode("Yes<|call|>No")})
    assert lm.generate_until(requests("generate_until", greedy("A"))) == ["Yes"]
    assert engine.asked[0][1]["eos_ids"] == [2, 5, 1]


def test_generation_arguments() -> None:
    assert parse_decoding({}, 256, "</s>") == Decoding(("</s>",), 256, 0.0, 1.0, 0)
    arguments = {
        "until": "\n",
        "max_new_tokens": 8,
        "temperature": 0.0,
        "do_sample": False,
        "num_beams": 1,
        "top_k": None,
    }
    assert parse_decoding(arguments, 256) == Decoding(("\n",), 8, 0.0, 1.0, 0)
    assert arguments["until"] == "\n"
    assert parse_decoding({"temperature": 0.5, "do_sample": False}, 256).temperature == 0
    assert parse_decoding({"temperature": 1}, 256).temperature == 1
    once = {"until": ["a"]}
    assert parse_decoding(once, 256, "</s>") == parse_decoding(once, 256, "</s>")
    assert once == {"until": ["a"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 5, "do_sample": True, "temperature": 1.0}, r"top_k=5.*accepted: until, max_gen_toks, do_sample"),
        ({"repetition_penalty": 1.2, "num_beams": 4}, r"num_beams=4, repetition_penalty=1\.2"),
        ({"max_length": 100}, r"max_length=100"),
        ({"do_sample": True}, r"the temperature 0; to sample, it must be above 0"),
        ({"do_sample": "yes"}, r"do_sample is 'yes'"),
        ({"until": None}, r"stop strings of the task are \[None"),
        ({"until": [5]}, r"stop strings of the task are \[5"),
        ({"temperature": "warm"}, r"cannot be understood"),
        ({"max_gen_toks": 0}, r"max_gen_toks is 0"),
        ({"seed": -1}, r"the seed is -1"),
    ],
)
def test_generation_arguments_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_decoding(arguments, 256, "</s>")


def test_prompts_that_cannot_be_answered(lm: GlupruneLM) -> None:
    with pytest.raises(RequestError, match=r"up to 64 new tokens, and the window has 64"):
        lm.generate_until(requests("generate_until", greedy("A", max_gen_toks=WINDOW)))
    with pytest.raises(RequestError, match=r"prompt has no tokens"):
        lm.generate_until(requests("generate_until", greedy("")))
    with pytest.raises(RequestError, match=r"longer than the window"):
        lm.loglikelihood(requests("loglikelihood", ("A", LICENSE[:400])))
    for pair in (("", ""), ("A", ""), (" ", "A"), ("", "<s>")):
        with pytest.raises(RequestError, match=r"of a request has no tokens"):
            lm.loglikelihood(requests("loglikelihood", pair))


def test_a_generation_config_that_greedy_decoding_would_obey_is_noted_once(tmp_path: Path) -> None:
    config = {"eos_token_id": 1, "repetition_penalty": 1.1, "num_beams": 1, "temperature": 0.6, "min_length": 4}
    checkpoint = convert.load(write_tiny(tmp_path / "llama", generation_config=config))
    notes: list[str] = []
    lm = GlupruneLM.from_checkpoint(checkpoint, note=notes.append)
    lm.loglikelihood(requests("loglikelihood", ("A", "B")))
    assert not notes
    for _ in range(2):
        lm.generate_until(requests("generate_until", greedy("A", max_gen_toks=2)))
    assert [note.split(" says ")[1].split(",")[0] for note in notes] == ["repetition_penalty = 1.1", "min_length = 4"]


# --------------------------------------------------------------------------------------------------- bookkeeping


def test_what_was_answered_is_not_asked_again(checkpoint: convert.Checkpoint, tmp_path: Path) -> None:
    encode = GlupruneLM.from_checkpoint(checkpoint).tok_encode
    scripts = {tuple(encode(text)): encode(" Yes.") for text in "ABCD"}
    asked = {
        "loglikelihood": [("A", " b"), ("A", " c"), ("A", " b"), ("B", " b")],
        "loglikelihood_rolling": [("A",), ("B",), ("A",), ("C",)],
        "generate_until": [greedy("A", "."), greedy("B", "."), greedy("A", "."), greedy("A", "!")],
    }
    fresh, _ = scripted(checkpoint, scripts=scripts)
    expected = {kind: getattr(fresh, kind)(requests(kind, *rows)) for kind, rows in asked.items()}
    assert expected["generate_until"] == [" Yes", " Yes", " Yes", " Yes."]
    for kind, rows in asked.items():
        with Journal(tmp_path / kind) as journal:
            killed, engine = scripted(checkpoint, journal=journal, scripts=scripts)
            engine.fails_after = 2
            with pytest.raises(MemoryError):
                getattr(killed, kind)(requests(kind, *rows))
            assert journal.answered == 2
        with Journal(tmp_path / kind) as journal:
            resumed, engine = scripted(checkpoint, journal=journal, scripts=scripts)
            assert getattr(resumed, kind)(requests(kind, *rows)) == expected[kind]
            assert len(engine.asked) == 1
            assert getattr(resumed, kind)(requests(kind, *rows)) == expected[kind]
            assert len(engine.asked) == 1


def test_sampled_texts_are_drawn_anew_for_every_request(checkpoint: convert.Checkpoint, tmp_path: Path) -> None:
    # A temperature at which the model might say anything.
    row = "Is it?", {"temperature": 5.0, "max_gen_toks": 12, "seed": 3}
    with Journal(tmp_path / "journal") as journal:
        lm = GlupruneLM.from_checkpoint(checkpoint, journal=journal)
        first = lm.generate_until(requests("generate_until", row, row, row))
        assert len(set(first)) == 3
        assert lm.generate_until(requests("generate_until", row, row, row)) == first
        other = row[0], row[1] | {"seed": 4}
        assert not set(lm.generate_until(requests("generate_until", other, other))) & set(first)
        assert journal.answered == 0


def test_lm_evals_cache_hears_of_every_answer(checkpoint: convert.Checkpoint) -> None:
    encode = GlupruneLM.from_checkpoint(checkpoint).tok_encode
    lm, _ = scripted(checkpoint, scripts={tuple(encode("A")): encode(" Yes")})
    heard: list[Any] = []
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda *parts: heard.append(parts)))
    lm.loglikelihood(requests("loglikelihood", ("A", " b")))
    lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("A",)))
    lm.generate_until(requests("generate_until", greedy("A"), ("A", {"temperature": 1.0, "max_gen_toks": 8})))
    assert [parts[:2] for parts in heard] == [
        ("loglikelihood", ("A", " b")),
        ("loglikelihood_rolling", ("A",)),
        ("generate_until", greedy("A")),
    ]


def test_contexts_that_are_cut_are_counted(checkpoint: convert.Checkpoint, tmp_path: Path) -> None:
    encode = GlupruneLM.from_checkpoint(checkpoint).tok_encode
    filling = next(LICENSE[:n] for n in range(300) if len(encode(LICENSE[:n] + " b")) == WINDOW + 1)
    pairs = [("A", " b"), (filling, " b"), (filling + " b b", " b"), (filling + " b b", " b")]
    prompt = next(LICENSE[:n] for n in range(300) if len(encode(LICENSE[:n])) == WINDOW - 40)
    prompts = [greedy(prompt), greedy(prompt + " b")]
    scripts = {tuple(encode(text)[-(WINDOW - 40) :]): encode(" Yes") for text, _ in prompts}
    notes: list[str] = []
    lm, _ = scripted(checkpoint, note=notes.append, scripts=scripts)
    lm.loglikelihood(requests("loglikelihood", *pairs))
    assert notes == ["1 of 3 contexts were longer than the window of 64 tokens; they were cut on the left"]
    lm.generate_until(requests("generate_until", *prompts))
    assert notes[1:] == ["1 of 2 contexts were longer than the window of 64 tokens; they were cut on the left"]
    with Journal(tmp_path / "journal") as journal:
        lm, _ = scripted(checkpoint, note=notes.append, scripts=scripts, journal=journal)
        lm.loglikelihood(requests("loglikelihood", *pairs))
        lm.generate_until(requests("generate_until", *prompts))
        answers = [journal.answer("loglikelihood", pair) for pair in pairs]
        answers += [journal.answer("generate_until", prompt) for prompt in prompts]
        assert [answer and answer.truncated for answer in answers] == [False, False, True, True, False, True]
    assert len(notes) == 2


def test_no_requests_have_no_answers(lm: GlupruneLM) -> None:
    assert lm.loglikelihood([]) == lm.loglikelihood_rolling([]) == lm.generate_until([]) == []


# --------------------------------------------------------------------------------------------------------- model


def test_models_are_made_from_lm_evals_arguments(folder: Path, tmp_path: Path) -> None:
    assert get_model("gluprune") is GlupruneLM
    lm = GlupruneLM.create_from_arg_string(
        f"pretrained={folder},dtype=bfloat16,max_length=32,add_bos_token=True,prefix_token_id=1",
        {"batch_size": "auto:4", "max_batch_size": None, "device": "cuda:0"},
    )
    assert (lm.max_length, lm.prefix_token_id, lm.eot_token_id, lm.batch_size) == (32, 1, 1, "auto")
    assert lm.tok_encode("A")[0] == 0
    info = lm.get_model_info()
    assert info["model_dtype"] == "bfloat16"
    assert info["model_num_parameters"] == lm.checkpoint.config.num_parameters
    assert (lm.rank, lm.world_size, lm.max_gen_toks) == (0, 1, 256)

    plan = make_plan(score(convert.load(folder).model), prune_percent=30)
    plan.save(tmp_path / "plan.json")
    row = requests("loglikelihood", ("A", " b"))
    masked = GlupruneLM.create_from_arg_obj({"pretrained": str(folder), "mask": str(tmp_path / "plan.json")})
    sliced = GlupruneLM.from_checkpoint(convert.load(folder).pruned(plan), batch_size=2)
    dense = GlupruneLM.create_from_arg_obj({"pretrained": str(folder), "dtype": "auto"}, {"batch_size": "2"})
    (a, _), (b, _), (c, _) = (lm.loglikelihood(row)[0] for lm in (masked, sliced, dense))
    assert a == pytest.approx(b, abs=1e-4)
    assert abs(a - c) > 0.01
    assert masked.get_model_info()["model_masked"]
    assert dense.batch_size == sliced.batch_size == 2


def test_the_mesh_is_one_of_the_arguments(folder: Path) -> None:
    row = requests("loglikelihood", ("A", " b"), ("B", " c d"))
    one = GlupruneLM(str(folder), mesh="model=1")
    expected = [value for value, _ in one.loglikelihood(row)]
    assert one.engine.mesh is None
    for mesh, shape in (("data=2,model=4", MeshShape(2, 4)), ("model=2", MeshShape(1, 2)), ("auto", MeshShape(8, 1))):
        lm = GlupruneLM.create_from_arg_obj({"pretrained": str(folder), "mesh": mesh})
        assert shape_of(lm.engine.mesh) == shape
        assert [value for value, _ in lm.loglikelihood(row)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrained={},trust=True,load_in_8bit=x", r"no argument 'load_in_8bit', 'trust'; accepted: pretrained"),
        ("a=1,b=2,c=3,d=4,e=5", r"no argument 'a', 'b', 'c' and 2 more; accepted: pretrained"),
        ("pretrained={},peft=adapter", r"does not support peft='adapter'; leave it out, or give None$"),
        ("pretrained={},backend=seq2seq", r"does not support backend='seq2seq'; leave it out, or give 'default'$"),
        ("pretrained={},truncation=True", r"does not support truncation=True"),
        ("dtype=float32", r"needs the argument pretrained"),
        ("pretrained=/there/is/none", r"there is no model"),
        ("pretrained={},batch_size=many", r"batch_size is 'many'; it must be a whole number"),
        ("pretrained={},batch_size=0", r"batch_size is 0"),
        ("pretrained={},max_length=1e3", r"max_length is 1000.0; it must be a whole number"),
        ("pretrained={},max_length=65", r"max_length is 65"),
        ("pretrained={},dtype=int8", r"dtype 'int8' is not supported"),
        ("pretrained={},add_bos_token=maybe", r"add_bos_token is 'maybe'"),
        ("pretrained={},prefix_token_id=320", r"prefix_token_id is 320; it must lie between 0 and 319"),
        ("pretrained={},mask=none.json", r"none\.json"),
        ("pretrained={},mesh=2x4", r"`mesh` is '2x4'; write auto, or sizes such as data=2,model=4"),
        ("pretrained={},mesh=data=2,model=4", r"no argument 'model'"),
        ("pretrained={},revision=main", r"`revision` main belongs to a hub id"),
    ],
)
def test_arguments_that_are_refused(folder: Path, arguments: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        GlupruneLM.create_from_arg_string(arguments.format(folder))


def test_arguments_of_the_hf_backend_that_change_nothing_are_accepted_and_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = "trust_remote_code=True,parallelize=True,max_batch_size=8,backend=causal,add_bos_token=1"
    lm = GlupruneLM.create_from_arg_string(f"pretrained={folder},{arguments}", {"device": "cpu", "batch_size": 1})
    assert "accepted without effect: backend, max_batch_size, parallelize, trust_remote_code" in caplog.messages
    assert lm.tok_encode("A")[0] == 0


def test_plans_and_tokenizers_of_other_models_are_refused(folder: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", hf_config(hidden_size=24, vocab_size=VOCABULARY - 1))
    make_plan(score(convert.load(other).model), prune_percent=30).save(tmp_path / "plan.json")
    with pytest.raises(RequestError):
        GlupruneLM(str(folder), mask=str(tmp_path / "plan.json"))
    make_plan(score(convert.load(folder).model), drop_layers=[0]).save(tmp_path / "depth.json")
    with pytest.raises(RequestError, match="the plan drops layer 0, which a mask over neurons cannot do"):
        GlupruneLM(str(folder), mask=str(tmp_path / "depth.json"))
    with pytest.raises(RequestError, match="has no tokenizer files"):
        GlupruneLM(str(other))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((folder / name).read_bytes())
    lm = GlupruneLM(str(other))  # a token that no text has is no error
    token = max(lm.tokenizer.get_vocab(), key=lm.tokenizer.get_vocab().get)
    text = lm.tokenizer.decode([VOCABULARY - 1])
    with pytest.raises(RequestError, match=re.escape(f"a text has the token {token!r} with id {VOCABULARY - 1}")):
        lm.loglikelihood(requests("loglikelihood", ("A", text)))


def test_a_tokenizer_without_begin_and_end(tmp_path: Path) -> None:
    lm = GlupruneLM.from_checkpoint(convert.load(write_tiny(tmp_path / "llama", bos_token=None, eos_token=None)))
    (known,) = lm.loglikelihood(requests("loglikelihood", ("A", " b")))
    assert known[0] < 0
    for kind, row in (("loglikelihood", ("", " b")), ("loglikelihood_rolling", ("A",))):
        with pytest.raises(RequestError, match="neither a BOS nor an EOS token"):
            getattr(lm, kind)(requests(kind, row))
    assert lm.generate_until(requests("generate_until", greedy("A", max_gen_toks=3)))
    given = GlupruneLM.from_checkpoint(lm.checkpoint, prefix_token_id=4)
    assert given.loglikelihood(requests("loglikelihood", ("", " b")))[0][0] < 0
    eos_only = GlupruneLM.from_checkpoint(convert.load(write_tiny(tmp_path / "eos", bos_token=None)))
    assert eos_only.prefix_token_id == 1


def test_conversations_take_the_models_template(checkpoint: convert.Checkpoint, folder: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    lm = GlupruneLM.from_checkpoint(checkpoint, note=notes.append)
    turns = [{"role": role, "content": text} for role, text in (("user", "A?"), ("assistant", "B."), ("user", "C?"))]
    asked = "<s>user: A?</s><s>assistant: B.</s><s>user: C?</s><s>assistant:"
    assert lm.apply_chat_template(turns) == asked
    begun = [*turns, {"role": "assistant", "content": "D"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == asked + " D"
    assert not notes
    system = {"role": "system", "content": "Be brief."}
    assert [lm.apply_chat_template([system, *turns]) for _ in range(2)] == [asked] * 2
    assert notes == ["the chat template takes no system messages; they are left out"]
    assert lm.chat_template(True) == CHAT
    assert lm.tokenizer_name == str(folder).replace("/", "__")

    plain = GlupruneLM.from_checkpoint(convert.load(write_tiny(tmp_path / "plain", chat_template=None)))
    with pytest.raises(RequestError, match="has no chat template"):
        plain.apply_chat_template(turns)
    broken = "{{ raise_exception('never') }}"
    failing = GlupruneLM.from_checkpoint(convert.load(write_tiny(tmp_path / "failing", chat_template=broken)))
    with pytest.raises(OperationError, match=r"chat template of .* fails: never"):
        failing.apply_chat_template(turns)


def test_a_template_is_taken_by_its_name(folder: Path, tmp_path: Path) -> None:
    named = [{"name": name, "template": f"{name} {{{{ messages[-1].content }}}}"} for name in ("rag", "tools")]
    checkpoint = convert.load(write_tiny(tmp_path / "named", chat_template=named))
    turns = [{"role": "user", "content": "A?"}]
    lm = GlupruneLM.from_checkpoint(checkpoint)
    for without in (lambda: lm.apply_chat_template(turns), lambda: lm.chat_template(True)):
        with pytest.raises(RequestError, match="templates 'rag', 'tools', and none is called 'default'"):
            without()
    with pytest.raises(RequestError, match="the chat template 'none' is asked for"):
        lm.chat_template("none")
    plain = lm.tokenizer_name
    assert lm.chat_template("tools") == named[1]["template"]  # lm-eval's --apply_chat_template tools
    given = GlupruneLM.create_from_arg_string(f"pretrained={tmp_path / 'named'},chat_template=tools")
    for chosen in (lm, given):
        assert chosen.apply_chat_template(turns) == "tools A?"
        assert chosen.tokenizer_name == f"{plain}__tools"  # lm-eval keeps requests under it


def test_pytorch_is_not_needed(folder: Path) -> None:
    program = """
import sys
sys.modules["torch"] = None  # importing it fails
from lm_eval.api.instance import Instance
from evals.harness.backend import GlupruneLM
lm = GlupruneLM(sys.argv[1])
text = lm.apply_chat_template([{"role": "user", "content": "A?"}])
print(lm.loglikelihood([Instance("loglikelihood", {}, (text, " b"), 0)]))
print(lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)]))
print(lm.generate_until([Instance("generate_until", {}, (text, {"until": ["b"], "max_gen_toks": 4}), 0)]))
"""
    one_device = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": one_device}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3


# -------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def lm_eval_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What lm-eval's command line does to its process is undone."""
    logger = logging.getLogger("lm_eval")
    level, handlers, propagate = logger.level, list(logger.handlers), logger.propagate
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    logger.setLevel(level)
    logger.handlers[:], logger.propagate = handlers, propagate


@pytest.mark.usefixtures("lm_eval_process")
def test_lm_evals_command_line_runs_our_models(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tasks(tmp_path / "tasks")
    common = ["--include_path", str(tmp_path / "tasks"), "--num_fewshot", "0", "--limit", "3"]
    names = "tiny_choice,tiny_words,tiny_pages,tiny_sums"
    before = list(sys.argv)
    mesh = 'mesh="data=2,model=4"'
    arguments = ["--model", "gluprune", "--model_args", f"pretrained={folder},{mesh}", "--tasks", names, *common]
    output = ["--output_path", str(tmp_path / "out"), "--log_samples", "--apply_chat_template"]
    assert run_lm_eval([*arguments, *output]) == 0
    assert sys.argv == before
    out = capsys.readouterr().out
    assert "batch_size: auto" in out
    for name in ("tiny_choice_a", "tiny_words", "tiny_pages", "tiny_sums"):
        assert name in out
    (results,) = tmp_path.glob("out/*/results_*.json")
    report = json.loads(results.read_text())
    assert report["config"]["model_num_parameters"] > 0
    assert report["config"]["model_args"]["mesh"] == "data=2,model=4"
    assert report["chat_template"] == CHAT
    assert len(list(tmp_path.glob("out/*/samples_*.jsonl"))) == 5


def test_lm_evals_command_line_refuses_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = list(sys.argv)
    with pytest.raises(SystemExit) as stop:
        run_lm_eval(["run", "--help"])
    assert stop.value.code == 0
    assert "--model" in capsys.readouterr().out
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: GlupruneLM(load_in_8bit=True))
    assert run_lm_eval(["run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lm-eval: error: the model gluprune has no argument 'load_in_8bit'; accepted: pretrained")
    with pytest.raises(GlupruneError):
        run_lm_eval(["run", "--debug"])
    assert sys.argv == before


def test_lm_evals_command_line_without_a_network_ends_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    assert run_lm_eval(["run", "--model", "dummy", "--tasks", "piqa"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("lm-eval: error: the data set baber/piqa cannot be had from the Hugging Face Hub (Couldn't")
    assert "connect to the network once" in line


@pytest.mark.parametrize(
    ("argv", "added"),
    [
        (["run", "--model", "gluprune", "--tasks", "piqa"], True),
        (["-M", "gluprune"], True),
        (["--model=gluprune"], True),
        (["--model", "gluprune", "--batch_size", "4"], False),
        (["--model", "gluprune", "-b", "4"], False),
        (["--model", "gluprune", "--batch_size=4"], False),
        (["--model", "gluprune", "--config", "run.yaml"], False),
        (["--model", "hf"], False),
        (["ls", "tasks"], False),
    ],
)
def test_lm_evals_batch_of_one_is_not_ours(argv: list[str], added: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(list(sys.argv)))
    assert run_lm_eval(argv) == 0
    assert seen == [["lm-eval", *argv, *(["--batch_size", "auto"] if added else [])]]


def test_later_lm_evals_find_the_backend_by_its_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    target = project["entry-points"]["lm_eval.models"]["gluprune"]
    assert importlib.metadata.EntryPoint("gluprune", target, "lm_eval.models").load() is GlupruneLM
    assert set(MODEL_ARGUMENTS) < set(GlupruneLM.__init__.__annotations__)


# ------------------------------------------------------------------------------------------------ lm-eval on PyTorch


@pytest.fixture(scope="module")
def torch() -> Iterator[Any]:
    pytest.importorskip("accelerate", reason="lm-eval's hf backend needs it")
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # ten times faster where XLA's threads want the same cores
    yield torch
    torch.set_num_threads(threads)


def hf_backend(folder: Path | str, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    # With its cache of logits, 0.4.13 mistakes requests that cut the same tokens in different places for one another.
    options = {"add_bos_token": False, "batch_size": 1, "logits_cache": False} | options
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", **options)


@pytest.mark.torch
@pytest.mark.parametrize("add_bos_token", [False, True, None])
def test_the_hf_backend_says_the_same_of_a_tiny_model(
    torch: Any, folder: Path, checkpoint: convert.Checkpoint, add_bos_token: bool | None
) -> None:
    peer = hf_backend(folder, add_bos_token=add_bos_token)
    ours = GlupruneLM.from_checkpoint(checkpoint, add_bos_token=add_bos_token)
    assert (ours.max_length, ours.prefix_token_id, ours.eot_token_id, ours.max_gen_toks, ours.tokenizer_name) == (
        peer.max_length,
        peer.prefix_token_id,
        peer.eot_token_id,
        peer.max_gen_toks,
        peer.tokenizer_name,
    )
    pairs = requests("loglikelihood", *PAIRS)
    for (a, is_greedy), (b, also) in zip(peer.loglikelihood(pairs), ours.loglikelihood(pairs), strict=True):
        assert b == pytest.approx(a, abs=1e-3)
        assert is_greedy == also
    documents = requests("loglikelihood_rolling", ("",), ("A",), ("<s>The sea",), (LICENSE[:900],))
    assert ours.loglikelihood_rolling(documents) == pytest.approx(peer.loglikelihood_rolling(documents), rel=1e-5)
    rows = [
        greedy("The sea"),
        greedy("The sea", " a", "e"),
        greedy("<s>naïve 東京", "the", "in"),
        greedy(LICENSE[:300], "on", "\n\n", max_gen_toks=20),
        greedy("Copyright", "<|call|>", "<s>"),
        ("License", {"until": ["s"], "max_new_tokens": 30, "temperature": 0.0}),
        ("License", {}),
    ]
    rows = [row if "until" in row[1] else (row[0], row[1] | {"max_gen_toks": 8}) for row in rows]
    prompts = [Instance("generate_until", {}, row, 0) for row in rows]
    theirs = [peer.generate_until([prompt])[0] for prompt in prompts]
    assert ours.generate_until(prompts) == theirs
    turns = [{"role": role, "content": "A?"} for role in ("system", "user")]
    for history, prompt in ((turns, True), (turns[1:], True), (turns[1:], False)):
        assert ours.apply_chat_template(history, prompt) == peer.apply_chat_template(history, prompt)
    assert ours.chat_template(True) == peer.chat_template(True)


AROUND = {"nothing": None, "BOS": "<s> $A", "BOS and EOS": "<s> $A </s>"}


@pytest.fixture(scope="module", params=AROUND)
def wrapping(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts something around every text."""
    return write_tiny(tmp_path_factory.mktemp("wrapping") / "llama", around=AROUND[request.param])


@pytest.mark.torch
@pytest.mark.parametrize("options", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"prefix_token_id": 7}])
def test_the_model_is_asked_the_same_as_by_the_hf_backend(torch: Any, wrapping: Path, options: dict[str, Any]) -> None:
    peer = hf_backend(wrapping, **({"add_bos_token": None} | options))
    ours, engine = scripted(convert.load(wrapping), **options)
    turns = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "B."},
        {"role": "user", "content": "C"},
    ]
    chat = ours.apply_chat_template(turns)
    assert chat == peer.apply_chat_template(turns)

    scored: list[Any] = []

    def record(requests: Any, **_: Any) -> list[Any]:
        scored.extend((context, continuation) for _, context, continuation in requests)
        return [(0.0, True)] * len(requests)

    peer._loglikelihood_tokens = record
    pairs = [*PAIRS, (chat, " D"), (f"\n{chat}", " D"), (LICENSE[:900], " end")]
    peer.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert as_we_encode(ours, pairs) == scored

    scored.clear()
    texts = ["The sea", "<s>The sea", chat, LICENSE[:100]]  # each of one window
    peer.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True)
    ours.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    assert [([prefix], ids) for prefix, ids in reversed(engine.asked)] == scored

    prompted: list[list[int]] = []
    peer._model_generate = lambda context, **_: prompted.append(context[0].tolist()) or context
    prompts = ["The sea", "<s>The sea", chat, LICENSE[:300]] + [""] * (ours.tok_encode("") != [])
    engine.scripts = defaultdict(lambda: [5])
    engine.asked.clear()
    for prompt in prompts:
        peer.generate_until(requests("generate_until", greedy(prompt)), disable_tqdm=True)
    ours.generate_until(requests("generate_until", *map(greedy, prompts)))
    assert [ids for ids, _ in reversed(engine.asked)] == prompted


@pytest.mark.torch
def test_by_default_a_choice_is_worth_what_it_is_to_the_hf_backend(torch: Any, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "llama", around="<s> $A")
    pairs = requests("loglikelihood", *PAIRS)
    theirs = hf_backend(folder, add_bos_token=None).loglikelihood(pairs)
    ours = GlupruneLM(str(folder)).loglikelihood(pairs)
    without = GlupruneLM(str(folder), add_bos_token=False).loglikelihood(pairs)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-3)
    assert [flag for _, flag in ours] == [flag for _, flag in theirs]
    assert max(abs(a - b) for (a, _), (b, _) in zip(ours, without, strict=True)) > 0.1


@pytest.mark.torch
@pytest.mark.real_model
def test_the_hf_backend_tokenises_alike_and_stops_alike(torch: Any, demo_folder: str) -> None:
    from lm_eval.models.utils_hf import stop_sequences_criteria

    peer, ours = hf_backend(demo_folder), GlupruneLM(demo_folder, add_bos_token=False)
    recorded: list[Any] = []
    peer._loglikelihood_tokens = lambda rows, **_: recorded.extend((c, k) for _, c, k in rows) or []
    bos = ours.tokenizer.bos_token
    pairs = [
        *((c.replace("<s>", bos), k.replace("<s>", bos).replace("</s>", "<|im_end|>")) for c, k in PAIRS),
        ("Q: 1234.5 + 678 =\n\n", "   1,912.5"),
        (f"{bos}user\nHi<|im_end|>\n{bos}assistant\n", " Hello"),
        ("x" * 3000, " y"),
        ("tabs\tand\u00a0spaces \t", "\u2028end"),
    ]
    peer.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert as_we_encode(ours, pairs) == recorded

    rng = np.random.default_rng(0)
    stops = ["\n\n", "Question:", "<|im_end|>", " the", "é", ". A", "京"]
    pieces = [
        "Question",
        ":",
        " Question:",
        "\n",
        "\n\n",
        ".",
        " A",
        ". ",
        "caf",
        "é",
        "東京",
        " the",
        "<|im_end|>",
        " sea",
    ]
    for _ in range(60):
        ids = [token for i in rng.integers(len(pieces), size=20) for token in ours.tok_encode(pieces[i])]
        ids = [int(token) if rng.random() < 0.9 else int(rng.integers(40000)) for token in ids]
        until = [stops[i] for i in rng.permutation(len(stops))[:2]]
        criteria = stop_sequences_criteria(peer.tokenizer, until, 3, 1)
        context = [5, 6, 7]
        ended = (n for n in range(1, len(ids) + 1) if any(c(torch.tensor([context + ids[:n]]), None) for c in criteria))
        assert StopStrings(ours.tokenizer, until).find(ids) == next(ended, None), (ids, until)
