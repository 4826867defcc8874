"""Data of lm-eval's tasks: from local files in our layout, and from the Hub when it answers or not."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from evals.harness.suites import task_manager
from evals.harness.task_data import _LOCAL_SETS, check_examples, task_datasets
from gluprune_jax.errors import OperationError, RequestError

Row = dict[str, Any]

PIQA: list[Row] = [{"goal": f"Reach {i}", "sol1": "walk\u2028on", "sol2": "ré-walk", "label": i % 2} for i in range(3)]
MMLU: list[Row] = [
    {"subject": subject, "question": f"{subject} {i}?", "choices": ["a", "b", "c", "d"], "answer": i}
    for subject in ("anatomy", "virology")
    for i in range(3)
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not to be had locally fails at once."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write(data: Path, name: str, rows: list[Row]) -> Path:
    path = data / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path, "piqa/validation", PIQA)
    write(tmp_path, "mmlu/test", MMLU)
    write(tmp_path, "mmlu/dev", MMLU[:3] + MMLU[3:5])
    return tmp_path


def load(data: Path | None, *names: str) -> Callable[[str], Any]:
    """lm-eval's tasks of these names, to be had by name."""
    with task_datasets(data):
        tasks = task_manager(["mmlu"]).load(list(names))["tasks"]  # the small index, which is built soon
    return lambda name: tasks[name]


def test_a_task_gets_its_rows_in_order(data: Path) -> None:
    task = load(data, "piqa")("piqa")
    assert list(task.eval_docs) == PIQA
    assert task.doc_to_choice(PIQA[1]) == ["walk\u2028on", "ré-walk"]


def test_each_subject_gets_its_own_rows_from_files_that_are_read_once(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or read_bytes(path))
    tasks = load(data, "mmlu_anatomy", "mmlu_virology")
    for subject, examples in (("anatomy", 3), ("virology", 2)):
        task = tasks(f"mmlu_{subject}")
        assert {row["subject"] for row in task.eval_docs} == {subject}
        assert len(task.eval_docs) == 3
        assert len(task.sampler.df) == examples
    assert read.count("test.jsonl") == read.count("dev.jsonl") == 1


def test_questions_are_never_examples(data: Path) -> None:
    """PIQA has no training split here: nothing may stand in for it."""
    task = load(data, "piqa")("piqa")
    assert task.sampler.df == []
    task.set_config("num_fewshot", 0)
    check_examples(task)
    task.set_config("num_fewshot", 2)
    with pytest.raises(RequestError, match=r"^piqa would show 2 examples before each question, and its data has 0 to"):
        check_examples(task)


def test_a_training_split_that_is_there_gives_the_examples(data: Path) -> None:
    write(data, "piqa/train", [PIQA[0] | {"goal": "Learn"}])
    task = load(data, "piqa")("piqa")
    assert [row["goal"] for row in task.sampler.df] == ["Learn"]
    task.set_config("num_fewshot", 1)
    check_examples(task)


@pytest.mark.parametrize("local", [True, False])
def test_the_library_is_left_as_it_was(data: Path, local: bool) -> None:
    before = datasets.load_dataset
    with task_datasets(data if local else None):
        assert datasets.load_dataset is not before
    assert datasets.load_dataset is before
    with pytest.raises(ZeroDivisionError), task_datasets(data if local else None):
        print(1 / 0)
    assert datasets.load_dataset is before


# ------------------------------------------------------------------------------------------------- bad input


def test_there_is_no_such_folder(data: Path) -> None:
    for path in (data / "no", data / "piqa" / "validation.jsonl"):
        with pytest.raises(RequestError, match=rf"^`benchmark_data` {path} is not a folder"):
            load(path, "piqa")


def test_a_file_is_missing(data: Path) -> None:
    (data / "mmlu" / "dev.jsonl").unlink()
    (data / "piqa" / "validation.jsonl").unlink()
    with pytest.raises(RequestError, match=r"mmlu/dev.jsonl is missing: it is the dev split of cais/mmlu \(anatomy\)"):
        load(data, "mmlu_anatomy")
    with pytest.raises(
        RequestError, match=r"piqa/validation.jsonl is missing: .* of baber/piqa; add it to `benchmark_data`"
    ):
        load(data, "piqa")


OTHER_SETS = (
    ("allenai/ai2_arc", "ARC-Easy"),
    ("EleutherAI/lambada_openai", "de"),
    ("truthfulqa/truthful_qa", "generation"),
    ("aps/super_glue", "copa"),
    ("gsm8k", "main"),
)


def test_the_layout_has_no_place_for_a_data_set(data: Path) -> None:
    with pytest.raises(
        RequestError, match=r"no place for the data set allenai/ai2_arc \(ARC-Easy\), only for those of "
    ):
        load(data, "arc_easy")
    for path, name in OTHER_SETS:
        with (
            task_datasets(data),
            pytest.raises(RequestError, match=rf"{path} \({name}\).*leave `benchmark_data` out to have"),
        ):
            datasets.load_dataset(path=path, name=name)


def test_a_subject_that_is_not_there(data: Path) -> None:
    with pytest.raises(RequestError, match=r"mmlu/dev.jsonl has no line whose subject is 'sociology'$"):
        load(data, "mmlu_sociology")


GOOD = json.dumps(PIQA[0]).encode()
MALFORMED = {
    "not JSON": (b'{"goal": "x",', r"line 2 is not JSON: "),
    "nothing": (b"", r"line 2 is not JSON: "),
    "not an object": (b'["goal"]', r"line 2 is list in JSON; it must be an object"),
    "not UTF-8": (b'{"goal": "\xff"}', r"line 2 is not UTF-8 text \(byte 11\)"),
    "nested without end": (b"[" * 100_000, r"line 2 is not JSON: "),
    "a column too few": (b'{"goal": "x", "sol1": "y", "label": 0}', r"line 2 .* columns of line 1: .* in sol2$"),
    "a column too many": (GOOD[:-1] + b', "more": 1}', r"line 2 .* columns of line 1: .* in more$"),
    "another kind": (GOOD.replace(b'"label": 0', b'"label": "0"'), r'line 2 has "0" as label, where line 1 has 0$'),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_line_is_named(data: Path, name: str) -> None:
    line, message = MALFORMED[name]
    path = data / "piqa" / "validation.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    with pytest.raises(RequestError, match=rf"^{path} {message}"):
        load(data, "piqa")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r" is empty; it must have one JSON object a line$"),
        (b'{"question": "x"}\n', r" line 1 lacks goal, sol1, sol2, label; it has question$"),
        (b'{"goal": "x", "sol1": [[1], "a"], "sol2": "z", "label": 0}\n', r" has values of different kinds"),
    ],
)
def test_a_file_of_something_else(data: Path, content: bytes, message: str) -> None:
    path = data / "piqa" / "validation.jsonl"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=rf"^{path}{message}"):
        load(data, "piqa")


def test_a_file_that_is_a_folder(data: Path) -> None:
    path = data / "piqa" / "validation.jsonl"
    path.unlink()
    path.mkdir()
    with pytest.raises(RequestError, match=rf"^cannot read the data file {path}: Is a directory$"):
        load(data, "piqa")


# --------------------------------------------------------------------------------------------------- the Hub


def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(
        OperationError,
        match=r"^the data set allenai/ai2_arc \(ARC-Challenge\) cannot be had from the Hugging Face Hub \(Couldn't "
        r"reach .*\); connect to the network once .*, or give local copies as `benchmark_data`$",
    ):
        load(None, "arc_challenge")


@pytest.mark.parametrize(
    "error", [datasets.exceptions.DatasetNotFoundError("no such\nset"), OSError(28, "No space left"), ValueError()]
)
def test_whatever_the_hub_does_is_reported(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    reason = next(iter(str(error).splitlines()), "ValueError")
    with pytest.raises(OperationError) as caught:
        load(None, "piqa")
    assert str(caught.value).startswith(
        f"the data set baber/piqa cannot be had from the Hugging Face Hub ({reason}); connect"
    )


def test_no_memory_is_no_fault_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(MemoryError):
        load(None, "piqa")


def test_what_the_hub_has_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.DatasetDict({split: datasets.Dataset.from_list(PIQA) for split in ("train", "validation")})
    asked: list[tuple[str, Any]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, **more: asked.append((path, name)) or rows)
    assert list(load(None, "piqa")("piqa").eval_docs) == PIQA
    assert asked == [("baber/piqa", None)]


# --------------------------------------------------------------------------------------------- the true data

needs_data = pytest.mark.skipif("GLUPRUNE_DATA" not in os.environ, reason="needs the benchmark data: set GLUPRUNE_DATA")

ROWS = {
    "wikitext": 62,
    "lambada_openai": 5153,
    "arc_challenge": 1172,
    "hellaswag": 10042,
    "winogrande": 1267,
    "piqa": 1838,
    "boolq": 3270,
    "truthfulqa_mc1": 817,
    "truthfulqa_mc2": 817,
    "gsm8k": 1319,
    "ifeval": 541,
    "leaderboard_musr_murder_mysteries": 250,
    "leaderboard_musr_object_placements": 256,
    "leaderboard_musr_team_allocation": 250,
}


@needs_data
@pytest.mark.skipif("NLTK_DATA" not in os.environ, reason="IFEval needs NLTK's punkt_tab: set NLTK_DATA")
@pytest.mark.filterwarnings("default")  # lm-eval's own
def test_all_benchmarks_load_with_the_official_number_of_questions() -> None:
    with task_datasets(Path(os.environ["GLUPRUNE_DATA"])):
        names = [*[name for name in ROWS if "musr" not in name], "leaderboard_musr", "mmlu"]
        tasks = task_manager(names).load(names)["tasks"]
    assert {name: len(task.task_docs) for name, task in tasks.items() if "mmlu" not in name} == ROWS
    subjects = [task for name, task in tasks.items() if "mmlu" in name]
    assert len(subjects) == 57
    assert sum(len(task.task_docs) for task in subjects) == 14042
    assert {len(task.sampler.df) for task in subjects} == {5}
    assert len(tasks["gsm8k"].sampler.df) == 7473
    for name in ("wikitext", "arc_challenge", "hellaswag", "winogrande", "piqa", "boolq"):
        assert tasks[name].sampler.df == [], name


@needs_data
def test_the_table_is_the_layout() -> None:
    data = Path(os.environ["GLUPRUNE_DATA"])
    files = {path.relative_to(data).with_suffix("").as_posix() for path in data.glob("*/*.jsonl")}
    assert files == {f"{local.folder}/{split}" for local in _LOCAL_SETS.values() for split in local.splits}
