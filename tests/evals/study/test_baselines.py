"""No-knowledge baselines, on made-up tasks whose answers are known, and on the benchmarks themselves."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lm_eval.tasks import TaskManager
from tiny_tasks import ITEMS, HashLM, write_tasks

from evals.harness.run import LoadedBenchmark, evaluate, load_benchmarks
from evals.harness.suites import Benchmark, find_benchmark, task_manager
from evals.results.degeneration import describe_text, summarise
from evals.results.outcomes import Outcomes, check_is_mean, outcomes_of_items
from evals.study.baselines import _likelihoods, baselines
from evals.study.folder import BASELINES_FILE, has_baselines, load_baselines, save_baselines
from evals.study.study import Baseline
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.files.records import sealed

METRICS = {
    "tiny_choice": "acc,none",
    "tiny_words": "perplexity,none",
    "tiny_pages": "word_perplexity,none",
    "tiny_sums": "exact_match,loose",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield write_tasks(tmp_path_factory.mktemp("tasks"))


def load(folder: Path, name: str) -> LoadedBenchmark:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    (loaded,) = load_benchmarks([Benchmark(name, None, METRICS.get(name), name, None)], manager)
    return loaded


def by_name(loaded: LoadedBenchmark, metric: str, **options: object) -> dict[str, Outcomes]:
    return {one.name: one.outcomes for one in baselines(loaded, metric, **options)}  # type: ignore[arg-type]


def test_rules_of_choice_are_worth_what_their_choices_are(tasks: Path) -> None:
    loaded = load(tasks, "tiny_choice")
    found = by_name(loaded, "acc,none")
    assert set(found) == {"a uniform guess", "the shortest choice", "the longest choice"}  # choices differ by item
    np.testing.assert_allclose(found["a uniform guess"].values, 1 / 3)
    for rule, end in (("the shortest choice", min), ("the longest choice", max)):
        for (name, number), worth in zip(found[rule].keys, found[rule].values, strict=True):
            doc = list(loaded.tasks["tasks"][name].eval_docs)[number]
            lengths = [len(choice) for choice in doc["choices"]]
            tied = [i for i, length in enumerate(lengths) if length == end(lengths)]
            assert worth == pytest.approx((doc["answer"] in tied) / len(tied)), (rule, doc)
    assert len(found["a uniform guess"].keys) == 2 * ITEMS
    assert len(by_name(loaded, "acc_norm,none", limit=3)["a uniform guess"].keys) == 6


def test_an_answer_that_all_items_offer_can_always_be_given(tasks: Path, tmp_path: Path) -> None:
    text = (tasks / "tiny_choice_a.yaml").read_text()
    text = text.replace('"{{choices}}"', "[maybe, always, never]").replace("tiny_choice_a", "tiny_labels")
    (tmp_path / "tiny_labels.yaml").write_text(text)
    loaded = load(tmp_path, "tiny_labels")
    found = by_name(loaded, "acc,none")
    answers = [doc["answer"] for doc in loaded.tasks["tasks"]["tiny_labels"].eval_docs]
    for i, label in enumerate(("maybe", "always", "never")):
        assert found[f"always '{label}'"].value == pytest.approx(np.mean([answer == i for answer in answers]))
    one = by_name(loaded, "acc,none", limit=1)  # the labels are those of the whole split
    assert set(one) == set(found)


def test_perplexities_have_the_baseline_of_equally_likely_tokens(tasks: Path) -> None:
    def letters(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    pages = by_name(load(tasks, "tiny_pages"), "word_perplexity,none", tokenize=letters, vocab_size=50)
    docs = list(load(tasks, "tiny_pages").tasks["tasks"]["tiny_pages"].eval_docs)
    texts = [f"{doc['question']} {doc['choices'][1]}" for doc in docs]
    words = sum(len(text.split()) for text in texts)
    (outcomes,) = pages.values()
    assert outcomes.value == pytest.approx(math.exp(math.log(50) * sum(map(len, texts)) / words))
    (outcomes,) = by_name(load(tasks, "tiny_words"), "perplexity,none", tokenize=letters, vocab_size=50).values()
    lengths = [len(doc["choices"][0]) + 1 for doc in docs]
    assert outcomes.value == pytest.approx(math.exp(math.log(50) * np.mean(lengths)))
    assert baselines(load(tasks, "tiny_words"), "perplexity,none") == []  # without a tokenizer


def test_texts_without_content_go_through_the_checker(tasks: Path) -> None:
    found = by_name(load(tasks, "tiny_sums"), "exact_match,loose")
    assert set(found) == {
        "nothing",
        "one word repeated",
        "random words in one line",
        "random words in many lines",
        "the prompt",
        "the prompt three times",
    }
    assert all(outcomes.value == 0 for outcomes in found.values())  # no item's answer is such a word
    longest: list[int] = []

    def letters(text: str) -> list[int]:
        longest.append(len(text))
        return [0] * len(text)

    by_name(load(tasks, "tiny_sums"), "exact_match,loose", tokenize=letters)
    assert longest.count(8) >= 4 * ITEMS  # the task allows eight tokens
    again = by_name(load(tasks, "tiny_sums"), "exact_match,loose")
    for name, outcomes in found.items():
        np.testing.assert_array_equal(outcomes.values, again[name].values)


def test_a_benchmark_can_be_loaded_once_and_run_many_times(tasks: Path) -> None:
    loaded = load(tasks, "tiny_choice")
    first, second = (by_name(loaded, "acc,none") for _ in range(2))
    assert {name: one.value for name, one in first.items()} == {name: one.value for name, one in second.items()}


@pytest.mark.skipif("GLUPRUNE_DATA" not in os.environ, reason="needs the benchmarks: set GLUPRUNE_DATA")
@pytest.mark.parametrize(
    ("name", "rule", "value"),
    [
        ("mmlu", "always 'D'", 0.2689),
        ("boolq", "always 'yes'", 0.6217),
        ("leaderboard_musr", "a uniform guess", 0.371),
        ("truthfulqa_mc2", "equal log-likelihoods", 0.448),
        ("truthfulqa_mc1", "a uniform guess", 0.226),
    ],
)
def test_baselines_of_the_benchmarks(name: str, rule: str, value: float) -> None:
    benchmark = find_benchmark(name)
    (loaded,) = load_benchmarks([benchmark], task_manager([name]), benchmark_data=Path(os.environ["GLUPRUNE_DATA"]))
    assert by_name(loaded, benchmark.metric or "")[rule].value == pytest.approx(value, abs=5e-4)


@pytest.mark.skipif(
    not {"GLUPRUNE_DATA", "NLTK_DATA"} <= os.environ.keys(), reason="needs IFEval: set GLUPRUNE_DATA and NLTK_DATA"
)
def test_texts_without_content_pass_a_checker_of_form() -> None:
    benchmark = find_benchmark("ifeval")
    (loaded,) = load_benchmarks([benchmark], task_manager(["ifeval"]), benchmark_data=Path(os.environ["GLUPRUNE_DATA"]))
    found = by_name(loaded, benchmark.metric or "")
    assert found["one word repeated"].value == pytest.approx(0.144, abs=0.005)
    assert found["the prompt"].value == pytest.approx(0.25, abs=0.005)
    assert found["nothing"].value == 0


def test_outcomes_of_items() -> None:
    def items(*values: object, metric: str = "acc,none") -> list[dict[str, object]]:
        return [{"task": "t", "doc_id": i, "metrics": {metric: value}} for i, value in enumerate(values)]

    assert outcomes_of_items(items(1.0, False, True, 0), "acc,none").value == 0.5
    pages = outcomes_of_items(items([-2.0, 3], [-4.0, 1], metric="word_perplexity,none"), "word_perplexity,none")
    assert pages.value == pytest.approx(math.exp(6 / 4))
    words = outcomes_of_items(items(-2.0, -4.0, metric="perplexity,none"), "perplexity,none")
    assert words.value == pytest.approx(math.exp(3))
    with pytest.raises(RequestError, match="the metric f1,none is no mean over items"):
        outcomes_of_items(items([1, 0], [0, 0], metric="f1,none"), "f1,none")


def test_degenerate_texts_are_told() -> None:
    parrot = describe_text("say this word again and again", "say this word again " * 3)
    assert parrot["words"] == 12
    assert parrot["repetition"] == pytest.approx(1 - 4 / 9)  # nine 4-grams, of which four are different
    assert parrot["echo"] == pytest.approx(3 / 9)  # "say this word again", three times
    varied = describe_text("a question", "each word stands here once")
    assert (varied["repetition"], varied["distinct_2"], varied["echo"]) == (0, 1, 0)
    short = describe_text("a question", "no", tokenize=str.split, most_tokens=1)  # type: ignore[arg-type]
    assert (short["repetition"], short["distinct_2"], short["echo"], short["cut_off"]) == (None, None, None, 1)
    summary = summarise([parrot, short, describe_text("x", "")])
    assert "echo" not in summarise([short])  # what is not known is not there
    assert (summary["words"], summary["empty"]) == (1, pytest.approx(1 / 3))
    assert summary["repetition"] == pytest.approx(1 - 4 / 9)


def test_random_log_likelihoods_are_drawn_for_each_item() -> None:
    class Weighing:
        def process_results(self, doc: object, results: list[tuple[float, bool]]) -> dict[str, float]:
            return {"acc": 1 / (1 + math.exp(min(results[1][0] - results[0][0], 700)))}

    found = [_likelihoods(Weighing(), None, "acc", ["a", "bb"], i)["random log-likelihoods"] for i in range(300)]
    assert len(set(found)) > 1
    assert np.mean(found) == pytest.approx(0.5, abs=0.01)  # by symmetry that of equal ones


def test_a_headline_that_is_no_mean_of_items_is_refused() -> None:
    def result(value: float, *outcomes: float) -> Any:
        items = [{"task": "t", "doc_id": i, "metrics": {"acc,none": one}} for i, one in enumerate(outcomes)]
        return SimpleNamespace(title="T", metric="acc,none", value=value, items=items)

    check_is_mean(result(0.5, 1.0, 0.0))
    with pytest.raises(RequestError, match=r"is 0\.75, and the mean over its items 0\.5"):
        check_is_mean(result(0.75, 1.0, 0.0))
    with pytest.raises(OperationError, match="not a finite number"):
        check_is_mean(result(0.5, 1.0, math.nan))


def test_texts_are_cut_off_at_the_models_own_limit_where_the_task_has_none(tasks: Path, tmp_path: Path) -> None:
    text = (tasks / "sums.yaml").read_text().replace(", max_gen_toks: 8", "").replace("tiny_sums", "tiny_long")
    (tmp_path / "tiny_long.yaml").write_text(text)

    class Chatty(HashLM):
        max_gen_toks = 3
        tok_encode = staticmethod(str.split)

        def generate_until(self, requests: Sequence[Any]) -> list[Any]:
            return ["one two three" if i % 2 else "one" for i, _ in enumerate(requests)]

    (result,) = evaluate(Chatty(), [load(tmp_path, "tiny_long")], bootstrap_iterations=0)
    assert [item["text"]["cut_off"] for item in result.items] == [i % 2 for i in range(ITEMS)]


def test_the_file_of_baselines_is_that_of_the_first_studies(tmp_path: Path) -> None:
    columns = {"values": [1.0, 0.0], "weights": None}
    about = {"metric": "acc,none", "keys": [["t", 0], ["t", 1]], "responders": {"a uniform guess": columns}}
    document = {"format": "gluprune-floors", "version": 1, "of": "abc", "benchmarks": {"piqa": about}}
    path = tmp_path / BASELINES_FILE
    assert path.name == "floors.json"
    path.write_text(json.dumps(document))
    assert has_baselines(path, "abc")
    found = load_baselines(path)
    assert found["piqa"]["a uniform guess"].value == 0.5
    save_baselines(path, {"piqa": ("acc,none", [Baseline(*one) for one in found["piqa"].items()])}, "abc")
    assert json.loads(path.read_text()) == sealed(document)
