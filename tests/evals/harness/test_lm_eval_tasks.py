"""Tasks beyond the suites: groups without a score, metrics that are no numbers, tasks that need what is not there."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.tasks import TaskManager
from merging_tokenizer import write_tiny
from tiny_tasks import HashLM, write_tasks

import convert
from evals.harness.backend import GlupruneLM
from evals.harness.run import LoadedBenchmark, check_testable, evaluate, load_benchmarks
from evals.harness.suites import choose_benchmarks, resolve_tasks
from evals.results.describe import describe_setting
from evals.results.outcomes import outcomes_of_items
from evals.results.setting import Setting
from evals.results.store import Result, load_items, load_results, open_setting
from evals.study.baselines import baselines
from gluprune_jax.errors import GlupruneError, OperationError, RequestError

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import lm_eval_tasks

SETTING = Setting("tiny", "float32", {"weights": "sha256:00"}, {})


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield write_tasks(tmp_path_factory.mktemp("tasks"))


def load(folder: Path, name: str, notes: list[str] | None = None) -> list[LoadedBenchmark]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return load_benchmarks(resolve_tasks([name], manager), manager, note=None if notes is None else notes.append)


def answer(loaded: list[LoadedBenchmark], lm: Any = None, **options: Any) -> list[Result]:
    return list(evaluate(lm or HashLM(), loaded, bootstrap_iterations=10, **options))


def add_task(tasks: Path, name: str, like: str = "tiny_choice_a", program: str = "", **changes: str) -> None:
    """A task like another one, with other lines and a module of its own."""
    lines = (tasks / f"{like}.yaml").read_text().replace(f"task: {like}", f"task: {name}")
    (tasks / f"{name}_code.py").write_text(program)
    more = "".join(f"{key}: {value}\n" for key, value in changes.items())
    if "metric_list" in changes:
        start, end = lines.index("metric_list:"), lines.index("dataset_path:")
        lines = lines[:start] + lines[end:]
    (tasks / f"{name}.yaml").write_text(lines + more)


def add_group(tasks: Path, name: str, members: str, *metrics: str) -> None:
    wanted = ", ".join(f"{{{metric}}}" for metric in metrics)
    (tasks / f"{name}.yaml").write_text(f"group: {name}\ntask: [{members}]\naggregate_metric_list: [{wanted}]\n")


def test_members_stand_for_a_group_none_of_which_reports_its_metric(tasks: Path, tmp_path: Path) -> None:
    add_group(tasks, "tiny_inner", "tiny_choice_a, tiny_choice_b", "metric: acc_norm, weight_by_size: true")
    add_group(tasks, "tiny_absent", "tiny_inner, tiny_sums", "metric: f1", "metric: exact_match, filter_list: none")
    notes: list[str] = []
    loaded = load(tasks, "tiny_absent", notes)
    assert [(one.benchmark.name, one.asked_for) for one in loaded] == [
        ("tiny_inner", "tiny_absent"),
        ("tiny_sums", "tiny_absent"),
    ]
    assert notes == [
        "the group tiny_absent has no score, as none of its tasks reports 'f1', 'exact_match'; its members stand for it"
    ]
    results = answer(loaded)
    assert [result.metric for result in results] == ["acc_norm,none", "exact_match,strict"]
    alone = answer(load(tasks, "tiny_inner") + load(tasks, "tiny_sums"))
    assert [result.metrics for result in results] == [result.metrics for result in alone]
    with open_setting(tmp_path / "results", SETTING) as folder:
        for result in results:
            folder.save(result)
    assert {result.benchmark for result in load_results(tmp_path / "results")[0].results} == {"tiny_inner", "tiny_sums"}


def test_groups_with_a_score_keep_it(tasks: Path) -> None:
    notes: list[str] = []
    add_group(tasks, "tiny_partly", "tiny_choice_a, tiny_sums", "metric: acc", "metric: f1")
    (loaded,) = load(tasks, "tiny_partly", notes)
    assert not notes
    assert loaded.rehearsal is not None
    assert [result.metric for result in answer([loaded])] == ["acc,none"]


RESULTS = "!function {}_code.results"


@pytest.mark.parametrize(
    ("name", "program", "message"),
    [
        ("needs_package", "import no_such_package", "needs_package needs the Python package no_such_package, which is"),
        ("exits", "import sys\nsys.exit('install it')", "lm-eval cannot load exits: SystemExit: install it$"),
        ("asks", "raise ImportError('please install more')", "cannot load asks: ImportError: please install more$"),
        (
            "needs_metric",
            "def results(doc, results):\n    import no_such_package",
            "the metrics of needs_metric need the Python package no_such_package, which is not installed$",
        ),
        (
            "needs_network",
            "def results(doc, results):\n    raise ConnectionError('no network\\nat all')",
            "the metrics of needs_network need what cannot be had here: ConnectionError: no network$",
        ),
        ("says_nothing", "def results(doc, results):\n    return {'a': {'b': 1}}", "lm-eval gave no metric for"),
    ],
)
def test_what_a_task_needs_is_missed_before_anything_is_computed(
    tmp_path: Path, tasks: Path, name: str, program: str, message: str
) -> None:
    own = write_tasks(tmp_path / "tasks")
    aggregation = "!function says_nothing_code.last" if name == "says_nothing" else "mean"
    program += "\ndef last(items):\n    return items[-1]\n"
    add_task(
        own,
        name,
        program=program,
        process_results=RESULTS.format(name),
        metric_list=f"[{{metric: a, aggregation: {aggregation}, higher_is_better: true}}]",
    )
    with pytest.raises(OperationError, match=message):
        load(own, name)


def test_a_metric_that_lm_eval_does_not_have_is_refused(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "evaluate", None)  # which would look for it on the hub
    own = write_tasks(tmp_path / "tasks")
    metric = "[{metric: no_such, aggregation: mean, higher_is_better: true}]"
    add_task(own, "unmeasured", like="sums", metric_list=metric)
    text = (own / "unmeasured.yaml").read_text().replace("task: tiny_sums", "task: unmeasured")
    (own / "unmeasured.yaml").write_text(text)
    with pytest.raises(RequestError, match="unmeasured reports no_such, which lm-eval does not have"):
        load(own, "unmeasured")


def test_a_metric_that_fails_is_one_sentence_and_a_model_that_fails_is_not_blamed_on_it(
    tasks: Path, tmp_path: Path
) -> None:
    own = write_tasks(tmp_path / "tasks")
    program = "def results(doc, results):\n    raise ValueError(f'not {results[0][1]}\\nmore')"
    metric = "[{metric: a, aggregation: mean, higher_is_better: true}]"
    add_task(own, "fails", program=program, process_results=RESULTS.format("fails"), metric_list=metric)
    loaded = load(own, "fails")
    assert loaded[0].rehearsal is None  # the made-up answers may be at fault
    with pytest.raises(OperationError, match=r"^lm-eval fails on fails: ValueError: not (True|False)$"):
        answer(loaded)

    class Failing(HashLM):
        def loglikelihood(self, requests: Any) -> list[Any]:
            raise ValueError("the model")

    with pytest.raises(ValueError, match="the model"):
        answer(loaded, Failing())


def test_outcomes_of_any_type_are_stored_without_the_datas_text(tasks: Path, tmp_path: Path) -> None:
    own = write_tasks(tmp_path / "tasks")
    program = """
import numpy as np
def results(doc, results):
    values = {"doc": doc, "pair": (np.float32(0.5), doc["question"]), "many": np.arange(3), "some": {"b", "a"}, 7: None}
    return {"a": np.float64(1), **values}
def last(items):
    return 0.0
"""
    metrics = ", ".join(
        f"{{metric: {name}, aggregation: !function kept_code.last, higher_is_better: true}}"
        for name in ("doc", "pair", "many", "some")
    )
    metrics = f"[{{metric: a, aggregation: mean, higher_is_better: true}}, {metrics}]"
    add_task(own, "kept", program=program, process_results=RESULTS.format("kept"), metric_list=metrics)
    del_seven = (own / "kept_code.py").read_text().replace(", 7: None", "")  # lm-eval would take a mean of it
    (own / "kept_code.py").write_text(del_seven)
    with open_setting(tmp_path / "results", SETTING) as folder:
        (result,) = (folder.save(one) for one in answer(load(own, "kept")))
        item = load_items(folder.path, result)[0]["metrics"]
        text = (folder.path / f"{result.file_stem}.items.jsonl").read_text()
    assert item["a,none"] == 1
    assert item["many,none"] == [0, 1, 2]
    assert item["pair,none"][0] == 0.5
    assert item["pair,none"][1].startswith("sha256:")
    assert item["doc,none"].startswith("sha256:")
    for line in (own / "test.jsonl").read_text().splitlines():
        assert json.loads(line)["question"] not in text


def test_a_study_refuses_what_it_cannot_test_before_a_model_is_loaded(tasks: Path) -> None:
    add_task(tasks, "tiny_mcc", metric_list="[{metric: mcc}]")
    with pytest.raises(RequestError, match="mcc,none is no mean over items"):
        check_testable(load(tasks, "tiny_mcc")[0], None)
    add_task(tasks, "tiny_short")
    rows = (tasks / "test.jsonl").read_text().splitlines()[:5]
    (tasks / "short.jsonl").write_text("\n".join(rows) + "\n")
    text = (tasks / "tiny_short.yaml").read_text().replace("test.jsonl", "short.jsonl")
    (tasks / "tiny_short.yaml").write_text(text)
    add_group(tasks, "tiny_uneven", "tiny_choice_a, tiny_short", "metric: acc, weight_by_size: false")
    (loaded,) = load(tasks, "tiny_uneven")
    with pytest.raises(RequestError, match="acc is the mean over tasks of different sizes"):
        check_testable(loaded, None)
    check_testable(loaded, 5)
    with pytest.raises(RequestError, match="no mean over items as long as some are missing"):
        check_testable(loaded, 5, some=True)
    check_testable(load(tasks, "tiny_choice")[0], None, some=True)


def test_baselines_of_mutual_information_are_those_of_choices_alike_without_the_question(tasks: Path) -> None:
    add_task(tasks, "tiny_mutual", metric_list="[{metric: acc}, {metric: acc_mutual_info}]")
    (loaded,) = load(tasks, "tiny_mutual")
    found = {name: baselines(loaded, f"{name},none") for name in ("acc", "acc_mutual_info")}
    assert [one.name for one in found["acc"]] == [one.name for one in found["acc_mutual_info"]]
    for one, other in zip(*found.values(), strict=True):
        np.testing.assert_array_equal(one.outcomes.values, other.outcomes.values)
    (result,) = answer([loaded])
    assert (
        outcomes_of_items(result.items, "acc_mutual_info,none").value == result.metrics["acc_mutual_info,none"]["value"]
    )


# Of what `benchmarks/lm_eval_tasks.py` tries: the definition, and how it goes.
SHIPPED = {
    "glue/mrpc/default.yaml": "lm-eval fails",  # F1 of two classes, and the made-up items have four
    "glue/cola/default.yaml": "no study",
    "asdiv/default.yaml": "scored",
    "arithmetic/arithmetic_1dc.yaml": "scored",
    "wikitext/wikitext.yaml": "scored",
    "squadv2/squadv2.yaml": None,  # written in Python
    "humaneval/humaneval.yaml": "refused",
    "wmt2016/ro_en-t5_prompt.yaml": "refused",
    "gsm8k/gsm8k-cot-self-consistency.yaml": "scored",
    "translation/iwslt2017_ar-en.yaml": "no study",
}


def test_kinds_of_tasks_that_lm_eval_ships_are_scored_or_refused_in_a_sentence(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    monkeypatch.setitem(sys.modules, "evaluate", None)
    root = Path(lm_eval.tasks.__file__).parent
    expected = {root / path: outcome for path, outcome in SHIPPED.items() if outcome and (root / path).exists()}
    assert len(expected) > 5
    kinds = {lm_eval_tasks.kind_of(load_yaml(path, resolve_func=False, recursive=True)): path for path in expected}
    written = lm_eval_tasks.write_tasks(tmp_path, kinds)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = convert.load(write_tiny(tmp_path / "llama"))
    lm = GlupruneLM.from_checkpoint(model)
    with open_setting(tmp_path / "results", describe_setting(model, lm.tokenizer)) as store:
        for name, kind in written.items():
            outcome, sentence = lm_eval_tasks.try_task(name, manager, model, lm, store)
            assert outcome == expected[kinds[kind]], (kind, sentence)


def test_definitions_that_cannot_be_indexed_are_refused(tmp_path: Path) -> None:
    own = write_tasks(tmp_path / "tasks")
    (own / "nameless.yaml").write_text("task: nameless\ntag: [null]\n")
    with pytest.raises(GlupruneError, match="`include_path`"):
        choose_benchmarks(None, "tiny_sums", own)
