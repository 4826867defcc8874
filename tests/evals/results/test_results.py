"""The results store: answers that outlive a killed run, settings that are never mixed, lm-eval's standard errors."""

import contextlib
import dataclasses
import json
import math
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from lm_eval.api import metrics as lm_eval_metrics
from lm_eval.tasks import TaskManager
from tiny_models import hf_config, hf_tensors, write_folder
from tiny_tasks import ITEMS, NAMES, HashLM, write_tasks

import convert
from evals.harness.bootstrap import bootstrap_stderr, standard_errors
from evals.harness.run import evaluate, load_benchmarks
from evals.harness.suites import Benchmark, resolve_tasks, with_num_fewshot
from evals.results.describe import describe_setting, model_name, weights_digest
from evals.results.journal import Journal
from evals.results.setting import Setting
from evals.results.store import (
    RESPONSES_FILE,
    RESULTS_FILE,
    SETTING_FILE,
    Result,
    check_output,
    load_items,
    load_results,
    open_setting,
)
from gluprune_jax import make_plan, score
from gluprune_jax.errors import GlupruneError, OperationError, RequestError

SETTING = Setting(label="tiny", dtype="float32", decides={"weights": "a"}, about={})
REQUEST = ("loglikelihood", ("context", " continuation"))


# --------------------------------------------------------------------------------------------------------- journal

finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec=None))  # lone surrogates too: models generate them


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(texts, st.tuples(finite, st.booleans()) | finite | texts, max_size=6))
def test_answers_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, answers: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("journal") / "responses.jsonl"
    kinds = {tuple: "loglikelihood", float: "loglikelihood_rolling", str: "generate_until"}
    with Journal(path) as journal:
        for context, answer in answers.items():
            journal.add(kinds[type(answer)], (context,), answer)
    with Journal(path) as journal:
        assert journal.answered == len(answers)
        for context, answer in answers.items():
            stored = journal.get(kinds[type(answer)], (context,))
            assert bits(stored) == bits(answer)


def bits(answer: Any) -> Any:
    if isinstance(answer, float):
        return struct.pack("<d", answer)
    return tuple(map(bits, answer)) if isinstance(answer, tuple) else answer


def test_the_first_answer_to_a_request_stays(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    with Journal(path) as journal:
        journal.add(*REQUEST, (np.float32(-1.1), np.bool(True)), truncated=True)
        journal.add(*REQUEST, (-2.0, False))
        # Another kind, other arguments, or the same ones cut elsewhere are other requests.
        assert journal.get("generate_until", REQUEST[1]) is None
        assert journal.get("loglikelihood", ("context ", "continuation")) is None
        journal.add("generate_until", ("a", {"until": ["\n"], "temperature": 0}), "x")
        assert journal.get("generate_until", ("a", {"temperature": 0, "until": ["\n"]})) == "x"
        assert journal.get("generate_until", ("a", {"temperature": 1, "until": ["\n"]})) is None
    with Journal(path) as journal:
        assert journal.answer(*REQUEST) == ((float(np.float32(-1.1)), True), True)
        assert journal.answered == 2


def test_a_half_written_last_line_is_cut_and_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    with Journal(path) as journal:
        for i in range(3):
            journal.add("loglikelihood_rolling", (str(i),), -float(i))
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 2):
        path.write_bytes(whole[:-cut])
        with Journal(path) as journal:
            assert journal.answered == 2
            assert journal.get("loglikelihood_rolling", ("2",)) is None
            journal.add("loglikelihood_rolling", ("2",), -2.0)
        assert path.read_bytes() == whole
    path.write_bytes(whole + bytes(100))  # what a lost machine may leave of a line
    with Journal(path) as journal:
        assert journal.answered == 3


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"null",
        b"\xff\xfe",
        b'{"key": "ab", "kind": "loglikelihood_rolling", "value": -1.0}',
        b'{"key": "%064d", "kind": "loglikelihood_rolling", "value": "text"}' % 0,
        b'{"key": "%064d", "kind": "loglikelihood", "value": [-1.0]}' % 0,
        b'{"key": "%064d", "kind": "unknown", "value": -1.0}' % 0,
    ],
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "responses.jsonl"
    with Journal(path) as journal:
        journal.add(*REQUEST, (-1.0, True))
    whole = path.read_bytes()
    path.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(OperationError, match=r"responses\.jsonl, line 2: "):
        Journal(path)
    assert path.read_bytes() == whole + line + b"\n" + whole
    path.write_bytes(whole)
    Journal(path).close()  # the refusal left no lock


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"-1.5", b"-1.6", "its crc32 is not that of its content"),
        (b'"kind"', b'"kinf"', "kind is missing; it must be a text"),
        (b"true],", b"1],", "its crc32 is not|is no response to a request of kind 'loglikelihood'"),
    ],
)
def test_a_changed_answer_is_named(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    path = tmp_path / "responses.jsonl"
    with Journal(path) as journal:
        journal.add(*REQUEST, (-1.5, True))
    line = path.read_bytes()
    assert line.count(old) == 1
    path.write_bytes(line.replace(old, new))
    with pytest.raises(OperationError, match=rf"responses\.jsonl, line 1: not an answer .*{message}"):
        Journal(path)
    path.write_bytes(unsealed(line))  # as older versions wrote it
    with Journal(path) as journal:
        assert journal.get(*REQUEST) == (-1.5, True)


def unsealed(line: bytes) -> bytes:
    record = json.loads(line)
    del record["crc32"]
    return json.dumps(record).encode() + b"\n"


RECORDS: dict[str, tuple[Any, str]] = {
    "truncated": ("1", "truncated is '1'; it must be a whole number from 0, or null"),
    "metrics": ([], r"metrics is \[\]; it must be an object"),
    "higher_is_better": (1, "higher_is_better is 1; it must be true or false"),
    "shots": (None, "shots is None; it must be a text"),
    "limit": (True, "limit is True; it must be a number, or null"),
    "metric": ("none", "it has no number for its metric, 'none'"),
    "seconds": (99.5, "its sha256 is not that of its content"),
}


@pytest.mark.parametrize("field", RECORDS)
def test_a_field_of_a_result_that_is_something_else_is_named(tmp_path: Path, field: str) -> None:
    value, message = RECORDS[field]
    result = Result(
        **dict.fromkeys(("benchmark", "title", "shots", "identity", "data"), "0"),
        **dict.fromkeys(("num_items", "requests", "computed", "truncated", "bootstrap_iterations"), 1),
        metric="acc,none",
        higher_is_better=True,
        limit=None,
        metrics={"acc,none": {"value": 0.5, "stderr": None}},
        tasks={},
        seconds=1.0,
    )
    with open_setting(tmp_path, SETTING) as folder:
        folder.save(result)
        path = folder.path / f"{result.file_stem}.json"
    assert load_results(tmp_path)[0].results == (result,)
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(
        OperationError, match=rf"json is damaged: {message}; move it away, and run the evaluation again$"
    ):
        load_results(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_that_computes_nothing_sensible_is_an_error(tmp_path: Path, value: float) -> None:
    with Journal(tmp_path / "responses.jsonl") as journal:
        with pytest.raises(OperationError, match="non-finite answer"):
            journal.add(*REQUEST, (value, True))
        assert journal.answered == 0
    assert (tmp_path / "responses.jsonl").read_bytes() == b""


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    with Journal(path) as journal:
        journal.add(*REQUEST, (-1.0, True))
        with pytest.raises(RequestError, match="another run"):
            Journal(path)
        journal.add("generate_until", ("a", {}), "b")
    with Journal(path) as journal:
        assert journal.answered == 2


def test_a_full_disk_keeps_what_was_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "responses.jsonl"
    with Journal(path) as journal:
        journal.add(*REQUEST, (-1.0, True))
        size = path.stat().st_size
        # Half a line still fits.
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, limits[1]))
        try:
            with pytest.raises(OperationError, match=r"cannot write .*responses\.jsonl: .* continues"):
                journal.add("generate_until", ("a", {}), "b")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert path.stat().st_size == size
        assert journal.get("generate_until", ("a", {})) is None
        journal.add("generate_until", ("a", {}), "b")
    with Journal(path) as journal:
        assert journal.answered == 2


def test_an_answer_is_in_the_file_as_soon_as_it_is_added(tmp_path: Path) -> None:
    with Journal(tmp_path / "responses.jsonl") as journal:
        for i in range(5):
            journal.add("loglikelihood_rolling", (str(i),), -float(i))
            assert len((tmp_path / "responses.jsonl").read_bytes().splitlines()) == i + 1


# ------------------------------------------------------------------------------------------------ standard errors


@pytest.mark.parametrize("iterations", [300, 2000])
def test_resampling_draws_as_lm_eval_does(monkeypatch: pytest.MonkeyPatch, iterations: int) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    values = [-random.Random(0).expovariate(0.3) * i for i in range(1, 40)]
    for statistic, given_iterations in ((lm_eval_metrics.perplexity, iterations), (lm_eval_metrics.median, 300)):
        expected = lm_eval_metrics.bootstrap_stderr(statistic, values, given_iterations)
        assert bootstrap_stderr(statistic, values, given_iterations) == pytest.approx(expected, rel=1e-9)


def test_many_values_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(-2, 1, 500).tolist()
    whole = bootstrap_stderr(lm_eval_metrics.perplexity, values, 1000)
    monkeypatch.setattr("evals.harness.bootstrap._NUMBERS_AT_ONCE", 1700)
    assert bootstrap_stderr(lm_eval_metrics.perplexity, values, 1000) == pytest.approx(whole, rel=1e-12)


def test_word_perplexity_has_the_standard_error_of_a_ratio() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(50, 500, 200)
    losses = -words * rng.normal(2.0, 0.3, 200)
    values = list(zip(losses.tolist(), words.tolist(), strict=True))
    ratio = losses.sum() / words.sum()
    linearised = math.sqrt(((losses - ratio * words) ** 2).sum()) / words.sum() * math.exp(-ratio)
    estimate = bootstrap_stderr(lm_eval_metrics.weighted_perplexity, values, 20_000)
    assert estimate == pytest.approx(linearised, rel=0.03)


def test_lm_eval_is_left_as_it_was() -> None:
    from lm_eval import evaluator_utils

    before = lm_eval_metrics.bootstrap_stderr, evaluator_utils.stderr_for_metric
    with contextlib.suppress(KeyError), standard_errors():
        assert evaluator_utils.stderr_for_metric(lm_eval_metrics.mean, 10)([1.0, 2.0, 4.0]) == pytest.approx(
            lm_eval_metrics.mean_stderr([1.0, 2.0, 4.0])
        )
        assert evaluator_utils.stderr_for_metric(lm_eval_metrics.weighted_perplexity, 0) is None
        raise KeyError
    assert (lm_eval_metrics.bootstrap_stderr, evaluator_utils.stderr_for_metric) == before


# -------------------------------------------------------------------------------------------------------- settings


@pytest.fixture
def checkpoint(tmp_path: Path) -> convert.Checkpoint:
    return convert.load(write_folder(tmp_path / "model"))


class Tokenizer:
    """As much of a tokenizer as a setting looks at."""

    def __init__(self, size: int = 97, chat_template: str | None = "{{ messages }}"):
        self.size, self.chat_template = size, chat_template

    def get_vocab(self) -> dict[str, int]:
        return {f"token{i}": i for i in range(self.size)}


def test_the_same_weights_are_the_same_model_however_they_are_stored(
    checkpoint: convert.Checkpoint, tmp_path: Path
) -> None:
    digest = weights_digest(checkpoint)
    convert.save(checkpoint, tmp_path / "both", formats=("hf", "orbax"))
    for copy in (tmp_path / "both", tmp_path / "both" / "orbax"):
        assert weights_digest(convert.load(copy)) == digest
    # A layer that is narrower than the others is padded in Hugging Face files.
    pruned = checkpoint.pruned(make_plan(score(checkpoint.model), width=50, layers=[1]))
    convert.save(pruned, tmp_path / "orbax-only", formats=("orbax",))
    assert weights_digest(convert.load(tmp_path / "orbax-only")) == weights_digest(pruned) != digest


def test_any_changed_weight_shape_or_dtype_is_another_model(checkpoint: convert.Checkpoint, tmp_path: Path) -> None:
    digests = {weights_digest(checkpoint)}
    config = hf_config()
    for name in hf_tensors(config):
        tensors = hf_tensors(config)
        tensors[name].reshape(-1).view(np.uint8)[0] ^= 1  # the last bit of the first number
        digests.add(weights_digest(convert.load(write_folder(tmp_path / name, config, tensors))))
    assert len(digests) == 1 + len(hf_tensors(config))
    digests.add(weights_digest(convert.load(tmp_path / "model", dtype="bfloat16")))
    digests.add(weights_digest(convert.load(write_folder(tmp_path / "rope", hf_config(rope_theta=1e5)))))
    assert len(digests) == 3 + len(hf_tensors(config))


@pytest.mark.real_model
def test_a_gguf_file_and_its_conversion_are_the_same_model(demo: convert.Checkpoint, demo_folder: str) -> None:
    from convert.tokenizer import load_tokenizer

    converted = convert.load(demo_folder)
    settings = [describe_setting(model, load_tokenizer(model)) for model in (demo, converted)]
    assert settings[0].digest == settings[1].digest


def test_what_decides_numbers_is_in_the_digest(checkpoint: convert.Checkpoint) -> None:
    narrow, narrower = (make_plan(score(checkpoint.model), width=width) for width in (60, 50))
    described = [
        describe_setting(checkpoint, Tokenizer()),
        describe_setting(checkpoint, Tokenizer(96)),
        describe_setting(checkpoint, Tokenizer(), plan=narrow),
        describe_setting(checkpoint, Tokenizer(), plan=narrower),
        describe_setting(checkpoint, Tokenizer(), context_length=100),
        describe_setting(checkpoint, Tokenizer(), apply_chat_template=True),
        describe_setting(checkpoint, Tokenizer(chat_template="{{ eos }}"), apply_chat_template=True),
        describe_setting(dataclasses.replace(checkpoint, hf_config={"eos_token_id": 3}), Tokenizer()),
    ]
    # A tokenizer that is not in Rust is known by its files alone, and this model has none.
    assert described[1].digest == described[0].digest
    assert len({setting.digest for setting in described}) == len(described) - 1
    assert [setting.folder_name.rpartition("-")[0] for setting in described[2:6]] == [
        "model.ppm-60.float32",
        "model.ppm-50.float32",
        "model.float32",
        "model.float32.chat",
    ]
    # A template that is not applied decides nothing, nor does the place of the model.
    same = [
        describe_setting(checkpoint, Tokenizer(chat_template=None)),
        describe_setting(dataclasses.replace(checkpoint, source="elsewhere"), Tokenizer()),
        describe_setting(checkpoint, Tokenizer(), context_length=512),
    ]
    assert {setting.digest for setting in same} == {described[0].digest}


def test_what_does_not_fit_is_refused(checkpoint: convert.Checkpoint) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        describe_setting(checkpoint, Tokenizer(chat_template=None), apply_chat_template=True)
    with pytest.raises(RequestError, match="`context_length` is 513; it must lie between 2 and the model's 512"):
        describe_setting(checkpoint, Tokenizer(), context_length=513)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("meta-llama/Llama-3.2-1B", "llama-3.2-1b"),
        ("/models/My Model/", "my-model"),
        ("models/small/orbax", "small"),
        ("x/SmolLM2.Q8_0.gguf", "smollm2.q8_0"),
        ("SmolLM2-135M-Instruct (demo)", "smollm2-135m-instruct"),
        (".hidden", "hidden"),
        ("日本", "model"),
    ],
)
def test_names_are_fit_for_folders(source: str, name: str) -> None:
    assert model_name(source) == name


# ----------------------------------------------------------------------------------------------------------- store


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield write_tasks(tmp_path_factory.mktemp("tasks"))


def run(*arguments: Any, **options: Any) -> list[Result]:
    return list(stream(*arguments, **options))


def stream(folder: Path, lm: Any, names: Any = NAMES, shots: int | None = None, **options: Any) -> Iterator[Result]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    benchmarks = resolve_tasks(names, manager)
    benchmarks = benchmarks if shots is None else with_num_fewshot(benchmarks, shots)
    return evaluate(lm, load_benchmarks(benchmarks, manager), bootstrap_iterations=1000, **options)


def numbers(results: list[Result]) -> list[Any]:
    """Everything that must not depend on how often a run was interrupted."""
    return [dataclasses.replace(result, seconds=0.0, computed=0, about={}) for result in results]


def test_results_are_lm_evals_own(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    for result in run(tasks, HashLM(), shots=2):
        reference = lm_eval.simple_evaluate(
            HashLM(), tasks=[result.benchmark], num_fewshot=2, task_manager=manager, bootstrap_iters=1000
        )
        expected = reference["results"][result.benchmark]
        for key, metric in result.metrics.items():
            name, _, filtered = key.partition(",")
            assert metric["value"] == expected[key]
            if result.benchmark != "tiny_pages":  # where lm-eval has none
                assert metric["stderr"] == pytest.approx(expected[f"{name}_stderr,{filtered}"], rel=1e-9)
            assert metric["stderr"] is not None
        assert result.shots == ("0" if result.benchmark == "tiny_sums" else "2")
        samples = [sample for task in reference["samples"].values() for sample in task]
        assert {item["doc_hash"] for item in result.items} == {sample["doc_hash"] for sample in samples}
        for sample in samples:
            item = next(i for i in result.items if i["doc_id"] == sample["doc_id"])
            for name in sample["metrics"]:
                assert item["metrics"][f"{name},{sample['filter']}"] == pytest.approx(sample[name])


def test_some_items_are_asked_what_they_are_asked_among_all(tasks: Path) -> None:
    """The few-shot examples of an item are drawn after those of the items before it."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    loaded = load_benchmarks(with_num_fewshot(resolve_tasks(["tiny_choice"], manager), 2), manager)
    (whole,) = evaluate(HashLM(), loaded)
    chosen = {("tiny_choice_a", 7), ("tiny_choice_b", 3), ("tiny_choice_b", 11)}
    for _ in range(2):  # prompts are made once
        lm = HashLM()
        (some,) = evaluate(lm, loaded, chosen=chosen)
        assert some.num_items == 3
        assert len(lm.asked) == 9
        assert list(some.items) == [item for item in whole.items if (item["task"], item["doc_id"]) in chosen]
    everything = {(item["task"], item["doc_id"]) for item in whole.items}
    assert numbers(list(evaluate(HashLM(), loaded, chosen=everything))) == numbers([whole])
    assert numbers(list(evaluate(HashLM(), loaded))) == numbers([whole])


def test_a_task_that_fixes_its_examples_says_so(tasks: Path) -> None:
    notes: list[str] = []
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    load_benchmarks(with_num_fewshot(resolve_tasks(["tiny_sums"], manager), 3), manager, note=notes.append)
    assert len(notes) == 1
    assert "tiny_sums takes no few-shot examples" in notes[0]


def test_nothing_of_the_data_is_kept(tasks: Path, tmp_path: Path) -> None:
    with open_setting(tmp_path / "results", SETTING) as folder:
        for result in run(tasks, HashLM(folder.journal), shots=2, journal=folder.journal):
            folder.save(result)
    kept = b"".join(path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file())
    for split in ("dev", "test"):
        for line in (tasks / f"{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert row["question"].encode() not in kept
            assert not any(f'"{choice}"'.encode() in kept for choice in row["choices"])


def test_stored_results_come_back(tasks: Path, tmp_path: Path) -> None:
    root = tmp_path / "results"
    with open_setting(root, SETTING) as folder:
        results = [folder.save(r) for r in run(tasks, HashLM(folder.journal), journal=folder.journal, limit=5)]
    (stored,) = load_results(root)
    assert stored.setting == SETTING
    assert {r.benchmark: dataclasses.replace(r, items=()) for r in results} == {r.benchmark: r for r in stored.results}
    for result in results:
        assert load_items(folder.path, result) == list(result.items)
        assert result.num_items == len(result.items) == (10 if result.benchmark == "tiny_choice" else 5)
        assert result.truncated is not None
    assert load_results(folder.path) == [stored]
    assert sorted(path.name.rpartition("-")[0] for path in folder.path.glob("*.json") if "-" in path.name) == sorted(
        f"{name}.0shot.limit5" for name in NAMES
    )


def test_a_finished_benchmark_is_not_asked_again_and_keeps_its_time(tasks: Path, tmp_path: Path) -> None:
    stored = []
    for _ in range(2):
        with open_setting(tmp_path, SETTING) as folder:
            lm = HashLM(folder.journal)
            stored.append([folder.save(r) for r in run(tasks, lm, journal=folder.journal)])
    assert lm.asked == []
    assert [dataclasses.replace(r, items=()) for r in stored[0]] == stored[1]


def test_the_same_choices_in_two_benchmarks_are_asked_once(tasks: Path, tmp_path: Path) -> None:
    with open_setting(tmp_path, SETTING) as folder:
        lm = HashLM(folder.journal)
        first, second = run(tasks, lm, ("tiny_choice_a", "tiny_choice_b"), journal=folder.journal)
    assert (first.requests, first.computed) == (3 * ITEMS, 3 * ITEMS)
    assert (second.requests, second.computed) == (3 * ITEMS, 0)
    assert first.truncated == second.truncated


class CountingLM(HashLM):
    """Counts the log-likelihoods of each call."""

    def __init__(self, journal: Journal | None = None) -> None:
        super().__init__(journal)
        self.calls: list[int] = []

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        self.calls.append(len({request.args for request in requests}))
        return super().loglikelihood(requests)


@pytest.fixture
def same_questions(tmp_path: Path) -> Path:
    """Tasks of which "tiny_more" offers other answers after the questions of "tiny_choice_a", and those too."""
    folder = write_tasks(tmp_path / "same")
    text = (folder / "tiny_choice_a.yaml").read_text()
    more = text.replace("tiny_choice_a", "tiny_more").replace("{{choices}}", "{{choices + [question]}}")
    (folder / "tiny_more.yaml").write_text(more)
    return folder


def test_the_same_questions_with_other_answers_are_asked_together(same_questions: Path, tmp_path: Path) -> None:
    names = ("tiny_choice_a", "tiny_words", "tiny_more")
    alone = [run(same_questions, HashLM(), (name,))[0] for name in names]
    with open_setting(tmp_path / "results", SETTING) as folder:
        lm = CountingLM(folder.journal)
        results = stream(same_questions, lm, names, journal=folder.journal)
        assert next(results).items == alone[0].items, "before the others are asked"
        assert lm.calls == [4 * ITEMS]
        assert [result.items for result in results] == [result.items for result in alone[1:]]
    assert lm.calls[1:] == [ITEMS, 4 * ITEMS]  # of the last the journal has all
    assert len(lm.asked) == 5 * ITEMS
    assert "loglikelihood" not in vars(lm)


def test_an_interrupted_run_goes_on_with_what_was_asked_together(same_questions: Path, tmp_path: Path) -> None:
    names = ("tiny_choice_a", "tiny_more")
    asked, computed = [], []
    for _ in range(3):
        with open_setting(tmp_path / "results", SETTING) as folder:
            lm = CountingLM(folder.journal)
            results = stream(same_questions, lm, names, journal=folder.journal)
            computed.append([next(results).computed])
            if len(asked):
                computed[-1].append(next(results).computed)
            asked.append(len(lm.asked))
    assert asked == [4 * ITEMS, 0, 0]
    assert computed == [[4 * ITEMS], [0, 0], [0, 0]]


def test_what_is_known_is_not_asked_again_for_the_sake_of_others(same_questions: Path, tmp_path: Path) -> None:
    """So that a finished benchmark keeps its time."""
    with open_setting(tmp_path / "results", SETTING) as folder:
        run(same_questions, HashLM(folder.journal), ("tiny_choice_a",), journal=folder.journal)
        lm = CountingLM(folder.journal)
        first, second = run(same_questions, lm, ("tiny_choice_a", "tiny_more"), journal=folder.journal)
    assert (first.computed, second.computed) == (0, ITEMS)
    assert lm.calls == [3 * ITEMS, 4 * ITEMS]


def test_each_benchmark_has_its_own_limit(same_questions: Path, tmp_path: Path) -> None:
    limit = {"tiny_choice_a": 2, "tiny_more": 5}
    with open_setting(tmp_path / "results", SETTING) as folder:
        lm = CountingLM(folder.journal)
        results = run(same_questions, lm, tuple(limit), journal=folder.journal, limit=limit)
    assert [result.num_items for result in results] == [2, 5]
    assert lm.calls == [4 * 5, 4 * 5]


def test_other_versions_data_and_examples_stand_beside_the_old(tasks: Path, tmp_path: Path) -> None:
    changed = [
        (tasks, {}),
        (write_tasks(tmp_path / "version", version=2), {}),
        (write_tasks(tmp_path / "data", seed=1), {}),
        (tasks, {"shots": 1}),
        (tasks, {"limit": 3}),
        (tasks, {"limit": 0.25}),  # the same items, but another request
    ]
    root = tmp_path / "results"
    for number, (folder_of_tasks, options) in enumerate(changed, start=1):
        with open_setting(root, SETTING) as folder:
            lm = HashLM(folder.journal)
            (result,) = run(folder_of_tasks, lm, ("tiny_words",), journal=folder.journal, **options)
            folder.save(result)
        (stored,) = load_results(root)
        assert len(stored.results) == number
        # New questions are asked; old ones that are still the same are not.
        assert len(lm.asked) == {1: ITEMS, 2: 0, 3: ITEMS, 4: ITEMS, 5: 0, 6: 0}[number]
    assert len({result.data for result in stored.results}) == 5


def test_models_are_never_mixed(tasks: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(SETTING, decides={"weights": "b"})
    for setting, salt in ((SETTING, ""), (other, "b")):
        with open_setting(tmp_path, setting) as folder:
            lm = HashLM(folder.journal, salt=salt)
            folder.save(run(tasks, lm, ("tiny_words",), journal=folder.journal)[0])
            assert len(lm.asked) == ITEMS
    one, two = load_results(tmp_path)
    assert one.results[0].data == two.results[0].data
    assert one.results[0].value != two.results[0].value


def test_a_moved_model_finds_its_folder(tmp_path: Path) -> None:
    with open_setting(tmp_path, SETTING) as first:
        pass
    with open_setting(tmp_path, dataclasses.replace(SETTING, label="renamed")) as second:
        assert second.path == first.path


def test_a_folder_of_another_setting_is_refused(tmp_path: Path) -> None:
    with open_setting(tmp_path, SETTING) as folder:
        pass
    other = dataclasses.replace(SETTING, decides={"weights": "b"})
    folder.path.rename(tmp_path / other.folder_name)
    with pytest.raises(RequestError, match="another model or setting: weights differ"), open_setting(tmp_path, other):
        pass


def put(text: str) -> Any:
    return lambda path: path.write_text(text)


@pytest.mark.parametrize(
    ("file", "damage", "error", "words"),
    [
        (RESULTS_FILE, put('{"format": "gluprune-results", "version": 2}'), RequestError, "has version 2"),
        (RESULTS_FILE, put("{"), OperationError, "not JSON"),
        (RESULTS_FILE, Path.unlink, RequestError, "no results folder"),
        (SETTING_FILE, put("[]"), OperationError, 'no "format"'),
        (SETTING_FILE, lambda p: p.write_text(p.read_text().replace('"a"', '"z"')), OperationError, "digest"),
        ("tiny_words.*[0-9a-f].json", put('{"format": "gluprune-result", "version": 1}'), OperationError, "damaged"),
        (
            "tiny_words.*[0-9a-f].json",
            lambda p: p.write_text(p.read_text().replace('"stderr":', '"std":')),
            OperationError,
            "damaged",
        ),
    ],
)
def test_damaged_and_foreign_files_are_named(
    tasks: Path, tmp_path: Path, file: str, damage: Any, error: type[GlupruneError], words: str
) -> None:
    with open_setting(tmp_path, SETTING) as folder:
        folder.save(run(tasks, HashLM(), ("tiny_words",))[0])
    (path,) = tmp_path.rglob(file)
    damage(path)
    with pytest.raises(error, match=words) as caught:
        load_results(tmp_path)
    assert str(path) in str(caught.value) or str(path.parent) in str(caught.value)


def test_items_that_do_not_belong_are_noticed(tasks: Path, tmp_path: Path) -> None:
    with open_setting(tmp_path, SETTING) as folder:
        result = folder.save(run(tasks, HashLM(), ("tiny_words",))[0])
    (path,) = folder.path.glob("*.items.jsonl")
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    with pytest.raises(OperationError, match=r"items\.jsonl is damaged"):
        load_items(folder.path, result)


def test_only_a_results_folder_is_written_to(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "folder")
    check_output(tmp_path)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RequestError, match=r"thesis\.tex"):
        check_output(tmp_path)
    with pytest.raises(RequestError, match=r"thesis\.tex"), open_setting(tmp_path, SETTING):
        pass
    with pytest.raises(RequestError, match="cannot read"):
        check_output(tmp_path / "thesis.tex")
    with open_setting(tmp_path / "results", SETTING) as folder:
        pass
    with pytest.raises(RequestError, match="give the folder above it"):
        check_output(folder.path)
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(RequestError, match="no results folder"):
            load_results(missing)


# ------------------------------------------------------------------------------------------------------------ kills

_RUN = """
import sys
from pathlib import Path
sys.path[:0] = {tests!r}
from test_results import SETTING, stream
from tiny_tasks import HashLM
from evals.results.store import open_setting
with open_setting(Path({root!r}), SETTING) as folder:
    lm = HashLM(folder.journal, seconds=0.02, log=Path({log!r}))
    for result in stream(Path({tasks!r}), lm, shots=1, journal=folder.journal):
        folder.save(result)
"""


def test_a_killed_run_goes_on_where_it_was(tasks: Path, tmp_path: Path) -> None:
    root, log = tmp_path / "results", tmp_path / "asked"
    code = _RUN.format(
        tests=[str(Path(__file__).parent), str(Path(__file__).parents[2] / "helpers")],
        root=str(root),
        log=str(log),
        tasks=str(tasks),
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    asked = 0
    # In the middle of the first benchmark, and of the third.
    for enough in (10, 3 * ITEMS + ITEMS + 4):
        process = subprocess.Popen([sys.executable, "-c", code], env=environment)
        deadline = time.monotonic() + 600
        while asked < enough and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
            asked = len(log.read_bytes().splitlines()) if log.exists() else 0
        process.kill()
        assert process.wait() == -signal.SIGKILL
    journal = next(root.glob(f"*/{RESPONSES_FILE}"))
    journal.write_bytes(journal.read_bytes() + b'{"key": "ab')  # the kill came between two system calls
    assert [result.benchmark for result in load_results(root)[0].results] == ["tiny_choice", "tiny_words"]
    with open_setting(root, SETTING) as folder:
        lm = HashLM(folder.journal)
        interrupted = [folder.save(r) for r in run(tasks, lm, shots=1, journal=folder.journal)]
    before = [line.split(" ", 1) for line in log.read_text().splitlines()]
    everything = [(kind, json.loads(arguments)) for kind, arguments in before]
    everything += [(kind, json.loads(json.dumps(arguments))) for kind, arguments in lm.asked]
    assert 0 < len(lm.asked) < len(everything)
    assert len({json.dumps(request) for request in everything}) == len(everything)  # nothing was asked twice
    with open_setting(tmp_path / "unbroken", SETTING) as folder:
        unbroken = [folder.save(r) for r in run(tasks, HashLM(folder.journal), shots=1, journal=folder.journal)]
    assert numbers([dataclasses.replace(r, items=()) for r in interrupted]) == numbers(
        [dataclasses.replace(r, items=()) for r in unbroken]
    )
    for one, two in zip(interrupted, unbroken, strict=True):
        assert load_items(next(root.glob("tiny*")), one) == load_items(folder.path, two)
    assert not list(root.rglob(".*"))


def test_headlines_follow_the_benchmark(tasks: Path) -> None:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    benchmark = Benchmark("tiny_choice_a", 1, "acc_norm,none", "Choice", True)
    (result,) = evaluate(HashLM(), load_benchmarks([benchmark], manager), bootstrap_iterations=10)
    assert (result.title, result.metric, result.shots) == ("Choice", "acc_norm,none", "1")
    assert result.value == result.metrics["acc_norm,none"]["value"]
    (chat,) = evaluate(
        HashLM(), load_benchmarks([benchmark], manager), apply_chat_template=True, bootstrap_iterations=10
    )
    assert chat.identity != result.identity
