"""`python -m evals.compare`: the numbers are those of the models it says, and survive being killed."""

import csv
import functools
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from calibration_text import TEXT, windows_of
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.tokenizer import encode_text, load_tokenizer
from evals.compare import main
from evals.perplexity import perplexity
from evals.report.comparison import plain_ticks
from gluprune_jax.pruning import chooser
from gluprune_jax.pruning.chooser import Chooser
from gluprune_jax.pruning.methods import Method

Capture = pytest.CaptureFixture[str]
CONFIG = hf_config(vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1, intermediate_size=83, max_position_embeddings=64)
METHODS = (
    "ppm",
    "random",
    "hybrid+least-squares",
    "wanda+global",
    "hybrid+least-squares+sequential",
    "ppm+reconstruct",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    write_tokenizer(write_folder(folder / "model", CONFIG, hf_tensors(CONFIG)))
    (folder / "text.txt").write_text(TEXT)
    (folder / "held-out.txt").write_text("".join(f"The cube of {i} is {i**3}. " for i in range(20)))
    return folder


@pytest.fixture
def argv(folder: Path) -> list[object]:
    calibration = ("--calibration-data", folder / "text.txt", "--calibration-tokens", 640, "--sequence-length", 32)
    measure = ("--eval-data", folder / "held-out.txt", "--eval-tokens", 256, "--sequence-length", 32)
    targets = ("--prune-percent", "20,40")
    return ["--model", folder / "model", "--mesh", "data=1", *calibration, *measure, *targets, "--seeds", 3]


run = functools.partial(commands.run, main)
report = functools.partial(commands.report, main)


# --------------------------------------------------------------------------------------------------- what it does


def test_the_numbers_are_those_of_the_pruned_models(folder: Path, argv: list[object], capsys: Capture) -> None:
    """Each against the perplexity of the sliced model."""
    found = report(capsys, *argv, "--methods", ",".join(METHODS))
    checkpoint, windows = windows_of(folder)
    tokens = encode_text(load_tokenizer(checkpoint), (folder / "held-out.txt").read_text())[:256]
    chooser = Chooser(checkpoint.model, checkpoint.mlp_weights, windows=windows)
    name = str(folder / "held-out.txt")
    dense, *rows = found["rows"]
    assert dense["perplexity"][name] == pytest.approx(
        perplexity(checkpoint.model, tokens, sequence_length=32).value, rel=1e-4
    )
    assert len(rows) == 2 * (len(METHODS) + 2)
    for row in rows:
        method = Method.parse(row["method"], seed=row["seed"] or 0)
        percent = float(row["target"].removesuffix(" %"))
        (pruned,) = chooser.choose(method, [{"prune_percent": percent}])
        assert row["widths"] == list(pruned.plan.widths)
        sliced = checkpoint.with_model(pruned.apply(checkpoint.model)).pruned(pruned.plan).model
        expected = perplexity(sliced, tokens, sequence_length=32).value
        assert row["perplexity"][name] == pytest.approx(expected, rel=1e-3), row
        assert row["expansion_ratio"] == pytest.approx(sum(row["widths"]) / 3 / 48)
    assert {row["seed"] for row in rows if row["method"] == "random"} == {0, 1, 2}


def test_tables_files_and_plot(folder: Path, argv: list[object], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    status, text, err = run(capsys, *argv, "--methods", "ppm,random", "--output", out)
    assert status == 0, err
    assert "random (median of 3)" in text
    assert f"token perplexity of {folder / 'held-out.txt'}" in text.replace("\n", "")
    document = json.loads((out / "comparison.json").read_text())
    name = str(folder / "held-out.txt")
    values = [
        row["perplexity"][name] for row in document["rows"] if (row["method"], row["target"]) == ("random", "20 %")
    ]
    assert f"{np.median(values):,.2f}" in text
    rows = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    assert len(rows) == len(document["rows"]) == 9
    assert float(rows[1][f"token perplexity of {name}"]) == document["rows"][1]["perplexity"][name]
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    svg = (out / "comparison.svg").read_text()
    assert "random (median of 3)" in svg
    assert f"{folder.name}: perplexity of held-out.txt" in svg or ": perplexity of held-out.txt" in svg


def test_a_logarithmic_axis_has_a_few_plain_numbers() -> None:
    for low, high in ((15.7, 31.3), (15.7, 125.0), (20, 5000), (9.0, 2e6), (40.0, 42.0)):
        ticks = plain_ticks([high, low])
        assert 2 <= len(ticks) <= 12, (low, high, ticks)
        assert all(low * 0.9 <= tick <= high * 1.1 for tick in ticks)
        assert all(float(f"{tick:.3g}") == tick for tick in ticks)
    assert plain_ticks([15.7, math.inf]) == []


def test_layer_by_layer(folder: Path, argv: list[object], tmp_path: Path, capsys: Capture) -> None:
    options = [*argv[:-4], "--prune-percent", 40, "--seeds", 1]
    methods_asked = ("--methods", "ppm,hybrid+least-squares")
    status, text, err = run(capsys, *options, *methods_asked, "--by-layer", "--output", tmp_path / "out")
    assert status == 0, err
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"][1:]
    assert [(row["method"], row["layer"]) for row in rows] == [
        (method, i) for method in methods_asked[1].split(",") for i in range(3)
    ]
    for row in rows:
        assert [width < 83 for width in row["widths"]] == [i == row["layer"] for i in range(3)]
    assert "40 % of layer 2" in text
    assert (tmp_path / "out" / "comparison.png").exists()
    status, _, err = run(capsys, *argv, *methods_asked, "--by-layer")
    assert (status, "--by-layer prunes each layer to one size" in err) == (2, True)
    status, _, err = run(capsys, *options, "--methods", "hybrid+global", "--by-layer")
    assert (status, "and hybrid+global divides a budget over several" in err) == (2, True)


def test_neurons_are_scored_once_and_programs_compiled_once(
    argv: list[object], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored, original = [], chooser.score
    monkeypatch.setattr(chooser, "score", lambda *args, **options: scored.append(args[1]) or original(*args, **options))
    collected, collect = [], chooser.collect
    monkeypatch.setattr(chooser, "collect", lambda *args, **rest: collected.append(1) or collect(*args, **rest))
    refitted, compensate = [], chooser.compensate
    monkeypatch.setattr(
        chooser, "compensate", lambda *args, **rest: refitted.append(len(args[2])) or compensate(*args, **rest)
    )
    report(capsys, *argv, "--methods", "ppm,hybrid,hybrid+least-squares,hybrid+global,wanda")
    assert scored == ["ppm", "hybrid", "wanda"]
    assert collected == [1]
    assert refitted == [2]  # both sizes in one pass


def test_benchmarks(folder: Path, argv: list[object], capsys: Capture, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    data = tmp_path / "data"
    (data / "piqa").mkdir(parents=True)
    items = [{"goal": f"To count to {i},", "sol1": "count.", "sol2": "wait.", "label": i % 2} for i in range(6)]
    for split in ("train", "validation"):
        (data / "piqa" / f"{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    options = ("--tasks", "piqa", "--limit", 5, "--benchmark-data", data, "--methods", "ppm")
    found = report(capsys, *argv, *options)
    assert [row["benchmarks"]["PIQA"]["items"] for row in found["rows"]] == [5, 5, 5]
    assert all(0 <= row["benchmarks"]["PIQA"]["value"] <= 1 for row in found["rows"])
    _, text, _ = run(capsys, *argv, *options)
    assert "PIQA, acc_norm" in text


def test_what_is_known_is_not_computed_again(
    argv: list[object], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = report(capsys, *argv, "--methods", "ppm", "--output", out)
    more = report(capsys, *argv, "--methods", "ppm,hybrid", "--output", out)
    assert more["rows"][:3] == first["rows"]
    assert [row["method"] for row in more["rows"][3:]] == ["hybrid", "hybrid"]

    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError("everything is known")

    monkeypatch.setattr("evals.cli.compare.perplexity", unexpected)
    assert report(capsys, *argv, "--methods", "ppm,hybrid", "--output", out) == more


def test_a_killed_comparison_goes_on(folder: Path, argv: list[object], tmp_path: Path, capsys: Capture) -> None:
    expected = report(capsys, *argv, "--methods", "ppm,hybrid+least-squares")
    out = tmp_path / "out"
    code = (
        "import os, sys\n"
        "from evals import compare\n"
        "from evals.study.rows import ResumableRows\n"
        "add, count = ResumableRows.add, [0]\n"
        "def killing(self, row):\n"
        "    add(self, row)\n"
        "    count[0] += 1\n"
        "    if count[0] == 3: os.kill(os.getpid(), 9)\n"
        "ResumableRows.add = killing\n"
        "compare.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, *map(str, argv), "--methods", "ppm,hybrid+least-squares"]
    assert subprocess.run([*command, "--output", str(out)], capture_output=True, check=False).returncode == -9
    assert len(json.loads((out / "comparison.json").read_text())["rows"]) == 3
    assert report(capsys, *argv, "--methods", "ppm,hybrid+least-squares", "--output", out) == expected


def test_an_interrupted_comparison_says_how_to_resume(
    argv: list[object], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    argv = [*argv, "--methods", "ppm"]
    with monkeypatch.context() as patch:
        patch.setattr("evals.cli.compare.compare", interrupt)
        for more, kept in (
            (["--output", tmp_path / "out"], f"what was measured so far is saved in {tmp_path / 'out'}; to resume:"),
            ([], "nothing is kept without --output DIR; to start again:"),
        ):
            status, _, err = run(capsys, *argv, *more)
            command = f"  python -m evals.compare {shlex.join(map(str, [*argv, *more]))}"
            assert (status, err.splitlines()) == (130, [kept, command, "gluprune: interrupted"])
    monkeypatch.setattr(convert, "load", interrupt)  # it is said before anything that takes long
    status, _, err = run(capsys, *argv, "--resume", "--output", tmp_path / "out")
    assert (status, "there is nothing to resume" in err) == (2, True)


def test_no_pruning_is_the_dense_model(argv: list[object], capsys: Capture) -> None:
    (dense,) = report(capsys, *argv, "--prune-percent", 0, "--methods", "ppm")["rows"]
    assert dense["method"] == "dense"


def test_the_text_is_the_models_own_where_none_is_given(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLUPRUNE_CACHE", str(tmp_path / "cache"))
    text = ("--eval-data", folder / "held-out.txt", "--calibration-tokens", 256, "--sequence-length", 64)
    argv = ["--model", folder / "model", "--mesh", "data=1", *text, "--prune-percent", 20]
    explicit = report(capsys, *argv, "--methods", "hybrid+ls", "--calibration-data", "self")
    status, out, err = run(capsys, *argv, "--methods", "hybrid+ls", "--json")
    assert (status, json.loads(out)) == (0, explicit)
    assert "note: no --calibration-data: the model writes its own text (self)" in err
    assert explicit["calibration"]["texts"] == ["self"]
    status, out, err = run(capsys, *argv, "--methods", "l2", "--json")
    assert (status, json.loads(out)["calibration"], "its own text" in err) == (0, None, False)
    argv += ["--methods", "hybrid", "--output", tmp_path / "out"]
    report(capsys, *argv, "--calibration-data", folder / "text.txt")
    monkeypatch.setattr(convert, "load", None)  # what follows is said before the model is loaded, or writes anything
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert f"is calibrated on {folder / 'text.txt'}, and self is asked for; give --calibration-data" in err


# ------------------------------------------------------------------------------------------------------- bad input


def test_refusals(folder: Path, argv: list[object], tmp_path: Path, capsys: Capture) -> None:
    plain = ["--model", folder / "model", "--prune-percent", 20, "--eval-data", folder / "held-out.txt"]
    cases: list[tuple[list[object], str]] = [
        ([*plain, "--methods", "best"], "unknown criterion 'best'"),
        ([*plain, "--methods", "ppm+more"], "method 'ppm+more' has 'more'"),
        ([*plain, "--methods", "ppm,ppm"], "--methods has ppm twice"),
        ([*plain, "--methods", "ppm", "--seeds", 0], "--seeds is 0; it must be at least 1"),
        ([*plain, "--methods", "ppm", "--limit", 5], "--limit and --benchmark-data are of benchmarks"),
        ([*plain[:-2], "--methods", "ppm"], "nothing to measure: give --evaluate, --eval-data TEXT or --tasks LIST"),
        ([*plain[:2], "--prune-percent", 100, *plain[4:], "--methods", "ppm"], "--prune-percent is 100"),
    ]
    for options, message in cases:
        status, out, err = run(capsys, *options)
        assert (status, out) == (2, ""), (options, err)
        assert message in err, (options, err)
    plain += ["--sequence-length", 64]
    late: list[tuple[list[object], str]] = [
        (["--prune-percent", "20,20.0"], "--prune-percent has 20.0 twice"),
        (["--width", 83], "a width of 83 would not shrink layer 0"),
        (["--width", 20, "--multiple-of", 30], "in multiples of 30 leaves layer 0 no neuron"),
        (["--width", 20, "--min-keep", "nan"], "--min-keep is nan"),
        (["--width", 20, "--output", folder / "text.txt"], "text.txt"),
        (["--width", 20, "--tasks", "piqaa"], "did you mean piqa"),
        (["--width", 20, "--output", "gs://bucket/folder"], "is an address"),
    ]
    for options, message in late:
        status, out, err = run(capsys, *plain[:2], *plain[4:], *options, "--methods", "ppm")
        assert (status, out) == (2, "") or (status == 1 and "text.txt" in message), (options, err)
        assert message in err, (options, err)
        assert "unexpected" not in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "comparison.csv").write_text("mine")
    status, _, err = run(capsys, *plain, "--methods", "ppm", "--output", tmp_path / "mine")
    assert (status, "no comparison.json that it could be of" in err) == (2, True)
    out_folder = tmp_path / "out"
    report(capsys, *plain, "--methods", "ppm", "--output", out_folder)
    status, _, err = run(capsys, *plain, "--methods", "ppm", "--multiple-of", 4, "--output", out_folder)
    assert status == 2
    assert "is of another comparison: its multiple_of differs" in err
    changed = report(capsys, *plain, "--methods", "ppm", "--multiple-of", 4, "--output", out_folder, "--overwrite")
    assert changed["multiple_of"] == 4
    for other in ("[]", '{"rows": []}'):
        (out_folder / "comparison.json").write_text(other)
        status, _, err = run(capsys, *plain, "--methods", "ppm", "--output", out_folder, "--overwrite")
        assert status == 2
        assert "is no comparison and is not replaced" in err
    for damage in (
        lambda rows: rows.pop(0),
        lambda rows: rows[1].pop("method"),
        lambda rows: rows[1].update(perplexity={"x": float("nan")}),
        lambda rows: rows[1].update(perplexity=5),
        lambda rows: rows.append(None),
    ):
        damaged = json.loads(json.dumps(changed))
        damage(damaged["rows"])
        (out_folder / "comparison.json").write_text(json.dumps(damaged))
        status, _, err = run(capsys, *plain, "--methods", "ppm", "--multiple-of", 4, "--output", out_folder)
        assert (status, "is damaged at row" in err) == (1, True), err
    (out_folder / "comparison.json").write_text("{")
    status, _, err = run(capsys, *plain, "--methods", "ppm", "--output", out_folder)
    assert status == 1
    assert "comparison.json is damaged: it is not JSON" in err
