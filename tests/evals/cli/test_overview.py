"""A comparison at a single size: sample answers and chance levels, in the file and in the two tables."""

import functools
import json
from pathlib import Path
from typing import Any

import commands
import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.tokenizer import encode_prompt, end_of_sequence_ids, load_tokenizer
from evals.cli.compare import shown_tables
from evals.compare import main
from gluprune_jax.cli import terminal
from gluprune_jax.inference.generation import generate
from gluprune_jax.pruning.plan import make_plan
from gluprune_jax.pruning.scores import score

Capture = pytest.CaptureFixture[str]
CONFIG = hf_config(vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1, max_position_embeddings=64, num_hidden_layers=1)
PROMPT = "What is a cube?"

run = functools.partial(commands.run, main)
report = functools.partial(commands.report, main)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("overview")
    write_tokenizer(write_folder(folder / "model", CONFIG, hf_tensors(CONFIG)))
    (folder / "held-out.txt").write_text("".join(f"The cube of {i} is {i**3}. " for i in range(9)))
    (folder / "data" / "piqa").mkdir(parents=True)
    items = [{"goal": f"To count to {i},", "sol1": "count.", "sol2": "wait.", "label": i % 2} for i in range(6)]
    for split in ("train", "validation"):
        (folder / "data" / "piqa" / f"{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


@pytest.fixture
def argv(folder: Path) -> list[object]:
    measure = ["--eval-data", folder / "held-out.txt", "--eval-tokens", 64, "--sequence-length", 32, "--seeds", 1]
    return ["--model", folder / "model", "--mesh", "data=1", *measure, "--methods", "ppm,random"]


SAMPLE = ("--sample", PROMPT, "--sample-tokens", 8)


@pytest.fixture
def tasks(folder: Path) -> list[object]:
    pytest.importorskip("lm_eval")
    return ["--tasks", "piqa", "--limit", 5, "--benchmark-data", folder / "data"]


def test_answers_are_those_of_the_pruned_models(folder: Path, argv: list[object], capsys: Capture) -> None:
    found = report(capsys, *argv, "--prune-percent", 40, *SAMPLE)
    checkpoint = convert.load(folder / "model")
    tokenizer = load_tokenizer(checkpoint)
    plan = make_plan(score(checkpoint.model), prune_percent=40)
    for row, model in zip(found["rows"][:2], (checkpoint, checkpoint.pruned(plan)), strict=True):
        (ids,) = generate(
            model.model,
            [encode_prompt(tokenizer, PROMPT)],
            max_new_tokens=8,
            eos_ids=end_of_sequence_ids(checkpoint),
        )
        assert row["answer"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert found["evaluation"]["sample"] == {"prompt": PROMPT, "tokens": 8}


def test_at_a_single_size_one_table_holds_perplexities_and_answers_and_one_the_benchmarks(
    argv: list[object], tasks: list[object], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    options = (*argv, "--prune-percent", 40, *SAMPLE, *tasks)
    found = report(capsys, *options, "--tasks-for", "ppm")
    answers, benchmarks = shown_tables(found)
    dense, ppm, random = found["rows"]
    (text,) = dense["perplexity"]
    assert [row["method"] for row in found["rows"]] == ["dense", "ppm", "random"]
    assert "benchmarks" not in random, "asked of ppm alone"
    assert dense["benchmarks"]["PIQA"]["chance"] == 0.5
    assert "chance" not in ppm["benchmarks"]["PIQA"]
    cells = [[str(cell) for cell in column.cells] for column in answers.columns]
    assert cells[0] == ["dense", "ppm", "random"]
    assert cells[1] == [f"{row['perplexity'][text]:,.2f}" for row in found["rows"]]
    assert cells[2] == [f"{row['perplexity'][text] / dense['perplexity'][text]:,.2f}" for row in found["rows"]]
    assert cells[3] == [" ".join(row["answer"].split()) for row in found["rows"]]
    headers = [str(column.header) for column in benchmarks.columns]
    assert headers == ["benchmark", "metric", "dense", "chance", "ppm"]
    (line,) = zip(*(column.cells for column in benchmarks.columns), strict=True)
    value = ppm["benchmarks"]["PIQA"]
    expected = ("PIQA (5 items)", "acc_norm", None, "0.5000", f"{value['value']:.4f} ± {value['stderr']:.4f}")
    assert all(want is None or str(cell) == want for cell, want in zip(line, expected, strict=True)), line
    status, out, _ = run(capsys, *options, "--tasks-for", "ppm")
    assert status == 0
    assert f"answer to: {PROMPT}" in out
    assert "chance" in out


def test_of_several_sizes_each_measure_has_its_table(argv: list[object], capsys: Capture) -> None:
    found = report(capsys, *argv, "--prune-percent", "20,40")
    (table,) = shown_tables(found)
    assert [column.header for column in table.columns] == ["method", "20 %", "40 %"]


def test_a_comparison_of_before_samples_is_resumed(argv: list[object], tmp_path: Path, capsys: Capture) -> None:
    """Its file has no entry for them."""
    options = (*argv, "--prune-percent", 40, "--output", tmp_path / "out")
    found = report(capsys, *options)
    assert found["evaluation"].keys() == {"perplexity", "benchmarks"}
    status, _, err = run(capsys, *options, *SAMPLE)
    assert (status, "its evaluation differs" in err) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample-tokens", 5], "--sample-tokens is of an answer; give --sample PROMPT too"),
        (["--sample", "x", "--sample-tokens", 0], "--sample-tokens is 0; it must be at least 1"),
        (["--tasks-for", "ppm"], "--tasks-for chooses who is asked the benchmarks; give --tasks LIST too"),
        (["--tasks", "piqa", "--tasks-for", "l2"], "--tasks-for has 'l2'; --methods has ppm, random"),
    ],
)
def test_refusals(argv: list[object], options: list[Any], message: str, capsys: Capture) -> None:
    status, out, err = run(capsys, *argv, "--prune-percent", 40, *options)
    assert (status, out) == (2, "")
    assert message in err


def test_a_model_may_answer_markup(capsys: Capture) -> None:
    rows = [
        {"method": method, "target": target, "seed": None, "perplexity": {}, "answer": "[/bold] [red]\n\n:smile:"}
        for method, target in (("dense", None), ("ppm", "40 %"))
    ]
    evaluation = {"perplexity": {}, "sample": {"prompt": "[/b]", "tokens": 5}}
    for table in shown_tables({"by_layer": False, "rows": rows, "evaluation": evaluation}):
        terminal.console().print(table)
    assert capsys.readouterr().out.count("[/bold] [red] :smile:") == 2


def test_of_several_texts_the_one_that_suffers_most_is_told(
    argv: list[object], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "other.txt").write_text("0123456789 " * 40)
    place = argv.index("--eval-data") + 2
    options = [*argv[:place], tmp_path / "other.txt", *argv[place:]]
    found = report(capsys, *options, "--prune-percent", 40)
    dense, ppm, _ = found["rows"]
    worst = max(ppm["perplexity"][text] / value for text, value in dense["perplexity"].items())
    (table,) = shown_tables(found)
    assert [list(column.cells)[1] for column in table.columns][-1].plain == f"{worst:,.2f}"
    found = report(capsys, *options, "--prune-percent", "20,40")
    *texts, last = shown_tables(found)
    assert len(texts) == 2
    assert "where it rose most (dense 1.00)" in str(last.title)
    assert next(iter(last.columns[2].cells)) == f"{worst:,.2f}"
