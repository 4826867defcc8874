"""The suites against lm-eval itself: its names, its metrics, its tasks."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from evals.harness.suites import (
    SUITES,
    Benchmark,
    find_benchmark,
    find_suite,
    resolve_tasks,
    task_manager,
    with_num_fewshot,
)
from evals.harness.task_data import task_datasets
from gluprune_jax.errors import OperationError, RequestError

PAPER = [benchmark.name for benchmark in SUITES["paper"].benchmarks]


@pytest.fixture(scope="module")
def everything() -> Any:
    """lm-eval's index of all its tasks, which takes seconds to build."""
    return task_manager(["hellaswag", "arc_easy"])


def leaves(manager: Any, name: str) -> dict[str, Any]:
    """The tasks that a name stands for, with their definitions."""
    entry = manager.task_index[name]
    members = {"TAG": entry.tags, "GROUP": (entry.cfg or {}).get("task")}.get(entry.kind.name)
    if members is None:
        return {name: (entry.yaml_path, entry.cfg)}
    return {leaf: cfg for member in members for leaf, cfg in leaves(manager, member).items()}


def test_the_paper_has_13_benchmarks_with_its_few_shot_settings() -> None:
    assert len(PAPER) == len(set(PAPER)) == 13
    assert {b.name: b.num_fewshot for b in SUITES["paper"].benchmarks if b.num_fewshot} == {"mmlu": 5, "gsm8k": 5}
    assert [b.name for b in SUITES["paper"].benchmarks if not b.higher_is_better] == ["wikitext", "lambada_openai"]
    assert len(SUITES["paper-instruct"].benchmarks) == 7
    for suite in SUITES.values():
        assert set(suite.benchmarks) <= set(SUITES["paper"].benchmarks)
    assert SUITES["paper"].limit is SUITES["paper-instruct"].limit is None
    assert SUITES["quick"].limit


def test_the_small_index_defines_the_suites_as_the_whole_one_does(everything: Any) -> None:
    small = task_manager(PAPER)
    assert len(small.all_tasks) < len(everything.all_tasks) / 20
    for name in PAPER:
        assert leaves(small, name) == leaves(everything, name), name
    assert len(leaves(small, "mmlu")) == 57


def test_a_task_that_moved_in_lm_eval_is_still_found(monkeypatch: pytest.MonkeyPatch, everything: Any) -> None:
    import lm_eval.tasks

    true_one = lm_eval.tasks.TaskManager
    monkeypatch.setattr("evals.harness.suites._FOLDERS", ("arc", "there/is/none"))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **options: true_one(**options) if options else everything)
    assert task_manager(["arc_challenge"]) is not everything
    assert task_manager(["hellaswag"]) is everything


def test_names_of_tasks_tags_and_groups_become_benchmarks(everything: Any) -> None:
    found = resolve_tasks([" piqa", "mmlu", "piqa", "ai2_arc", "", "mmlu_anatomy"], everything)
    assert [b.name for b in found] == ["piqa", "mmlu", "arc_challenge", "arc_easy", "mmlu_anatomy"]
    assert found[1] == find_benchmark("mmlu")
    assert found[1].num_fewshot == 5
    assert found[3] == Benchmark("arc_easy", None, None, "arc_easy", None)


UNKNOWN = {
    "hellaswg": "hellaswag,",
    "ARC": "arc_challenge,",
    "musr": "leaderboard_musr,",
    "mmlu_anatmy": "mmlu_anatomy,",
    "truthful-qa": "truthfulqa_mc",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_the_nearest_names_are_offered_for_an_unknown_one(everything: Any, name: str) -> None:
    with pytest.raises(RequestError, match=rf"no task, group or tag '{name}'; did you mean {UNKNOWN[name]}[^?]*\?$"):
        resolve_tasks(["piqa", name], everything)


def test_all_unknown_names_are_reported_at_once(everything: Any) -> None:
    with pytest.raises(RequestError, match=r"'hellaswg'; did you mean .*\? lm-eval has no task, .* 'zzzzqqq'$"):
        resolve_tasks(["hellaswg", "zzzzqqq"], everything)


def test_what_cannot_be_asked_for(everything: Any) -> None:
    with pytest.raises(RequestError, match=r"^`tasks` is empty"):
        resolve_tasks([" ", ""], everything)
    with pytest.raises(
        RequestError, match=r"the group pythia, .* no metric in common; give its members lambada_openai,"
    ):
        resolve_tasks(["pythia"], everything)
    with pytest.raises(RequestError, match=r"the group tinyBenchmarks, .* in common; give single tasks$"):
        resolve_tasks(["tinyBenchmarks"], everything)
    with pytest.raises(RequestError, match=r"^there is no suite 'papr'; choose from paper, paper-instruct, quick$"):
        find_suite("papr")
    with pytest.raises(RequestError, match=r"^`num_fewshot` is -1"):
        with_num_fewshot(SUITES["quick"].benchmarks, -1)


def test_the_number_of_examples_can_be_changed_and_nothing_else_with_it() -> None:
    before = SUITES["quick"].benchmarks
    changed = with_num_fewshot(before, 3)
    assert [b.num_fewshot for b in changed] == [3] * len(before)
    assert with_num_fewshot(changed, 0) == before


def test_the_headline_of_an_unknown_task_is_its_first_metric() -> None:
    metrics = ["alias", "f1_stderr,none", "f1,none", "acc,none"]
    assert find_benchmark("some_task").headline(metrics) == "f1,none"
    assert find_benchmark("boolq").headline(metrics) == "acc,none"
    with pytest.raises(OperationError, match=r"^lm-eval gave no acc_norm,none for piqa, but f1,none, acc,none$"):
        find_benchmark("piqa").headline(metrics)
    with pytest.raises(OperationError, match=r"^lm-eval gave no metric for some_task, but nothing$"):
        find_benchmark("some_task").headline(["alias"])


@pytest.mark.skipif("GLUPRUNE_DATA" not in os.environ, reason="needs the benchmark data: set GLUPRUNE_DATA")
@pytest.mark.skipif("NLTK_DATA" not in os.environ, reason="IFEval needs NLTK's punkt_tab: set NLTK_DATA")
@pytest.mark.filterwarnings("default")  # lm-eval's own
def test_the_headline_metrics_are_those_that_lm_eval_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.models.dummy import DummyLM

    monkeypatch.setattr(DummyLM, "tokenizer", None)  # it would be fetched from the Hub
    manager = task_manager(PAPER)
    with task_datasets(Path(os.environ["GLUPRUNE_DATA"])):
        outcome: Mapping[str, Any] = lm_eval.simple_evaluate(
            model="dummy", tasks=PAPER, task_manager=manager, limit=2, bootstrap_iters=0, log_samples=False
        )
    for benchmark in SUITES["paper"].benchmarks:
        metrics = outcome["results"][benchmark.name]
        assert isinstance(metrics[benchmark.headline(metrics)], float), benchmark.name
        assert benchmark.metric is not None
        key = benchmark.metric.partition(",")[0]
        for task in leaves(manager, benchmark.name):
            assert outcome["higher_is_better"][task][key] == benchmark.higher_is_better, task
            own = outcome["configs"][task]["num_fewshot"]
            # MMLU is the one whose number is the paper's and not the task's own.
            assert own == (0 if benchmark.name == "mmlu" else benchmark.num_fewshot), task
