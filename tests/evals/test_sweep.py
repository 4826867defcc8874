"""A study of a tiny model, from its arguments to its report, and after every kind of interruption."""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from tiny_models import hf_config, write_folder
from tiny_tasks import write_tasks

import convert
from evals.report.__main__ import main as report_main
from evals.study.folder import load_study
from evals.study.study import DENSE
from evals.sweep import PRESETS, main
from evals.sweep import parser as sweep_parser
from gluprune_jax.files.records import sealed

run, report = partial(commands.run, main), partial(commands.report, main)
TASKS = "tiny_choice,tiny_words,tiny_pages,tiny_sums"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = hf_config(vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1)
    folder = write_folder(tmp_path_factory.mktemp("model") / "tiny-llama", config)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("xla")))
        yield write_tasks(tmp_path_factory.mktemp("tasks"))


def arguments(model: Path, tasks: Path, output: Path, *more: object) -> list[object]:
    what = ["--model", model, "--include-path", tasks, "--tasks", TASKS, "--context-length", 64, "--mesh", "data=1"]
    return [*what, "--output", output, *more]


def test_a_study_from_beginning_to_end(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "study"
    found = report(capsys, *arguments(model, tasks, output, "--prune-percent", "0,10,50", "--limit", "8,tiny_pages=3"))
    assert [(point["method"], point["level"]) for point in found["points"]] == [
        (DENSE, DENSE),
        ("ppm", "10 %"),
        ("ppm", "50 %"),
    ]
    assert [round(point["expansion_ratio"] * 48) for point in found["points"]] == [80, 72, 40]
    study = load_study(output)
    assert [one.name for one in study.benchmarks] == TASKS.split(",")
    sizes = {one.name: one.measured[study.dense].items for one in study.benchmarks}
    assert sizes == {"tiny_choice": 8, "tiny_words": 8, "tiny_pages": 3, "tiny_sums": 8}  # the group has two tasks
    baselines = {one.name: set(one.baselines) for one in study.benchmarks}
    assert baselines["tiny_choice"] == {"a uniform guess", "the shortest choice", "the longest choice"}
    assert baselines["tiny_words"] == baselines["tiny_pages"] == {f"all {VOCABULARY} tokens equally likely"}
    assert "one word repeated" in baselines["tiny_sums"]
    for one in study.benchmarks:  # baselines are of the same items
        for baseline in one.baselines.values():
            assert baseline.outcomes is not None
            assert baseline.outcomes.keys == one.measured[study.dense].outcomes.keys  # type: ignore[union-attr]
    texts = next(one for one in study.benchmarks if one.name == "tiny_sums").measured[study.dense].text
    assert texts is not None
    assert {"words", "empty", "distinct_2", "cut_off"} <= texts.keys()
    assert {path.name for path in output.iterdir()} >= {"report.html", "study.json", "figures", "tables"}
    assert (output / "tables" / "texts.csv").exists()
    assert len(found["rows"]) == 4 * 3


def test_masks_and_slices_say_the_same(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    levels = ("--prune-percent", "50", "--limit", 6)
    masked = report(capsys, *arguments(model, tasks, tmp_path / "masked", *levels))
    sliced = report(capsys, *arguments(model, tasks, tmp_path / "sliced", *levels, "--slice"))
    for a, b in zip(masked["rows"], sliced["rows"], strict=True):
        assert a["measured"]["value"] == pytest.approx(b["measured"]["value"], rel=1e-4)
    for name, width in (("masked", 80), ("sliced", 40)):  # of the model that answered
        row = json.loads((tmp_path / name / "sweep.json").read_text())["rows"][1]
        setting = json.loads((tmp_path / name / "results" / row["setting"] / "setting.json").read_text())
        assert setting["about"]["intermediate_sizes"] == [width] * 3
        assert (setting["decides"]["mask"] is None) == (name == "sliced")


def test_more_levels_and_methods_join_a_study(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("all neurons are equal, but some neurons are more equal than others. " * 40)
    calibration = ("--calibration-data", text, "--calibration-tokens", 512, "--sequence-length", 64, "--limit", 4)
    output = tmp_path / "study"
    report(capsys, *arguments(model, tasks, output, "--limit", 4, "--methods", "ppm", "--prune-percent", 20))
    report(capsys, *arguments(model, tasks, output, *calibration, "--methods", "hybrid", "--prune-percent", 20))
    report(capsys, *arguments(model, tasks, output, "--limit", 4, "--methods", "ppm", "--prune-percent", 40))
    first = (output / "sweep.json").read_text()
    assert json.loads(first)["calibration"]["tokens"] == 512  # of those rows that needed it: another is refused
    more = ("--methods", "hybrid,hybrid+least-squares", "--expansion-ratio", "1.0")
    found = report(capsys, *arguments(model, tasks, output, *calibration, *more))
    assert [(point["method"], point["level"]) for point in found["points"]] == [
        (DENSE, DENSE),
        ("ppm", "20 %"),
        ("hybrid", "20 %"),
        ("ppm", "40 %"),
        ("hybrid", "1x"),
        ("hybrid+least-squares", "1x"),
    ]
    assert json.loads(first)["rows"] == json.loads((output / "sweep.json").read_text())["rows"][:4]
    assert set(found["groups"]) == {"ppm", "hybrid", "hybrid+least-squares"}
    whole = (output / "sweep.json").read_text()
    report(capsys, *arguments(model, tasks, output, *calibration, *more))  # nothing is left to do
    assert (output / "sweep.json").read_text() == whole
    status, out, err = run(capsys, *arguments(model, tasks, output, *calibration[:-1], 5, "--methods", "hybrid"))
    assert (status, out) == (2, "")
    assert "is of another sweep: its items differs" in err
    other = ("--calibration-tokens", 256, "--methods", "hybrid")
    status, out, err = run(capsys, *arguments(model, tasks, output, *calibration, *other))
    assert (status, out) == (2, "")
    assert "is of another sweep: its calibration differs" in err


def test_the_text_is_the_models_own_where_none_is_given(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLUPRUNE_CACHE", str(tmp_path / "cache"))
    options = ("--methods", "wanda", "--prune-percent", 20, "--limit", 2)
    argv = arguments(model, tasks, tmp_path / "study", *options, "--calibration-tokens", 512, "--sequence-length", 128)
    status, _, err = run(capsys, *argv, "--json")
    assert status == 0, err
    assert "note: no --calibration-data: the model writes its own text (self)" in err
    first = (tmp_path / "study" / "sweep.json").read_text()
    assert json.loads(first)["calibration"]["own_text"] == {"seed": 0, "temperature": 1.0}
    report(capsys, *argv, "--calibration-data", "self")  # the same study: nothing is left to do
    assert (tmp_path / "study" / "sweep.json").read_text() == first
    monkeypatch.setattr(convert, "load", None)  # what follows is said before the model is loaded, or writes anything
    status, _, err = run(capsys, *argv, "--calibration-data", "self@1")
    assert status == 2
    assert "sweep.json is calibrated on self, and self@1 is asked for; give --calibration-data self" in err


def stored_items(study: Path) -> dict[tuple[str, str, str, int], Any]:
    """The outcomes of a study by method, benchmark, task and position."""
    return {
        (row["method"], benchmark, item["task"], item["doc_id"]): item
        for row in json.loads((study / "sweep.json").read_text())["rows"]
        for benchmark, stem in row["results"].items()
        for line in (study / "results" / row["setting"] / f"{stem}.items.jsonl").read_text().splitlines()
        for item in [json.loads(line)]
    }


def test_a_study_that_stops_when_it_is_decided(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the end it has the results of a full run, and before that some of them."""
    what = ("--tasks", "tiny_choice,tiny_pages", "--prune-percent", 50)
    whole = report(capsys, *arguments(model, tasks, tmp_path / "full", *what))
    to_the_end = report(capsys, *arguments(model, tasks, tmp_path / "open", *what, "--until-decided", 0.01))
    stops = ("--until-decided", 0.95)
    early = report(capsys, *arguments(model, tasks, tmp_path / "early", *what, *stops))
    full, all_of_them, some = (stored_items(tmp_path / name) for name in ("full", "open", "early"))
    assert [row["measured"]["items"] for row in whole["rows"]] == [24, 24, 12, 12]
    assert [(row["measured"]["items"], row["settled"]) for row in to_the_end["rows"]] == [
        *[(24, False)] * 2,
        *[(12, None)] * 2,
    ]
    assert [row["measured"]["items"] < 24 and row["settled"] for row in early["rows"][:2]] == [True, True]
    assert some.keys() < all_of_them.keys() == full.keys()
    for found in (all_of_them, some):
        for key, item in found.items():
            expected = full[key]
            for name in ("doc_hash", "target_hash", "metrics"):
                if key[1] == "tiny_choice":
                    assert item[name] == expected[name]
            # Which items stand beside each other in a batch changes how numbers are rounded.
            np.testing.assert_allclose(np.array(item["responses"]), np.array(expected["responses"]), rtol=1e-4)
    # The same command resumes: here the row of the pruned model is lost, its answers are there.
    document = json.loads((tmp_path / "early" / "sweep.json").read_text())
    (tmp_path / "early" / "sweep.json").write_text(json.dumps(sealed(document | {"rows": document["rows"][:1]})))
    found = report(capsys, *arguments(model, tasks, tmp_path / "early", *what, *stops, "--resume"))
    assert json.loads((tmp_path / "early" / "sweep.json").read_text()) == document
    assert found["about"]["until_decided"]["items"] == {"tiny_choice": 24}
    assert any("items were asked, over all models" in sentence for sentence in found["summary"])
    for other, message in (
        ((*what[:3], "10,50", *stops), "its until_decided differs"),  # more comparisons, another level of each
        (what, "its until_decided differs"),
        (("--tasks", "tiny_pages", *what[2:], *stops), "all of the benchmarks run in full"),
    ):
        status, _, err = run(capsys, *arguments(model, tasks, tmp_path / "early", *other))
        assert status == 2
        assert message in err


def test_what_cannot_be_is_refused_before_anything_is_evaluated(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for output, options, message in (
        (tmp_path / "study", ("--expansion-ratio", 5), "grow"),
        (tmp_path / "study", ("--prune-percent", 10, "--multiple-of", 128), "128"),
        (tmp_path / "file" / "study", ("--prune-percent", 10), "file"),
    ):
        status, out, err = run(capsys, *arguments(model, tasks, output, *options))
        assert status in (1, 2), err
        assert (out, "Traceback" in err, "unexpected" in err) == ("", False, False), err
        assert message in err
        assert "evaluating" not in err


def test_data_that_changed_is_not_compared(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    what = ("--tasks", "tiny_choice", "--limit", 4)
    tasks = write_tasks(tmp_path / "tasks")
    report(capsys, *arguments(model, tasks, tmp_path / "study", *what, "--prune-percent", 0))
    write_tasks(tmp_path / "tasks", seed=1)
    status, _, err = run(capsys, *arguments(model, tasks, tmp_path / "study", *what, "--prune-percent", 20))
    assert status == 2
    assert "different versions of tiny_choice" in err


def test_a_study_in_the_middle_has_a_report(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "study"
    what = ("--tasks", "tiny_choice", "--limit", 4, "--prune-percent", 20)
    report(capsys, *arguments(model, tasks, output, *what))
    document = json.loads((output / "sweep.json").read_text())
    (output / "sweep.json").write_text(json.dumps(sealed(document | {"rows": document["rows"][:1]})))
    assert commands.run(report_main, capsys, output)[0] == 0
    baselines = json.loads((output / "floors.json").read_text())
    (output / "floors.json").write_text(json.dumps(sealed(baselines | {"of": "0"})))
    found = commands.report(report_main, capsys, output)  # baselines of something else are not read
    assert [row["relation"] for row in found["rows"]] == [None]
    again = report(capsys, *arguments(model, tasks, output, *what))
    assert all(row["relation"] is not None for row in again["rows"])
    (output / "efficiency.json").write_text(json.dumps({"format": "gluprune-efficiency", "version": 1, "rows": []}))
    status, _, err = commands.run(report_main, capsys, output)
    assert status == 1
    assert "efficiency.json is damaged" in err
    rest = {"definitions": {}, "energy": {}, "devices": "", "dtype": "", "model": "another"}
    written = {"format": "gluprune-efficiency", "version": 1, "rows": [], **rest}
    (output / "efficiency.json").write_text(json.dumps(written))
    status, _, err = commands.run(report_main, capsys, output)
    assert status == 2
    assert "is of another model, 'another'" in err


def test_presets_are_the_papers() -> None:
    for name, hidden in (("paper-1b", "Llama-3.2-1B"), ("paper-3b", "Llama-3.2-3B")):
        assert PRESETS[name].model.endswith(hidden)
        assert PRESETS[name].prune_percent == (0, 10, 20, 30, 40, 50, 60)
    assert PRESETS["paper-1b-instruct"].prune_percent == (0, 10, 40, 60)
    for preset in PRESETS.values():
        assert sweep_parser().parse_args(["--model", preset.model, "--suite", preset.suite, "--dtype", preset.dtype])


def test_refusals(model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--model", model, "--tasks", "piqa", "--output", tmp_path / "study"]
    for argv, message in (
        (["--tasks", "piqa"], "no model: give --model MODEL or --preset NAME"),
        (["--model", model], "no benchmarks: give --suite NAME"),
        ([*base, "--prune-percent", "0,ten"], "--prune-percent has 'ten'"),
        ([*base, "--prune-percent", "10,10.0"], "--prune-percent has 10.0 twice"),
        ([*base, "--prune-percent", "100"], "100"),
        ([*base, "--prune-percent", "nan"], "--prune-percent is nan"),
        ([*base, "--prune-percent=-5"], "--prune-percent is -5"),
        ([*base, "--limit", 0], "--limit is 0"),
        ([*base, "--limit", "1.5"], "--limit is 1.5"),
        ([*base, "--limit", "9,=3"], "--limit is 9,=3"),
        ([*base, "--limit", "9,8"], "give one number for all"),
        ([*base, "--limit", "9,piqa=3,piqa=4"], "one for each benchmark that is named"),
        ([*base, "--limit", "9,mmlu=3"], "--limit names mmlu, which is not evaluated; there are piqa"),
        (["--model", model, "--tasks", "piqa,boolq", *base[4:], "--limit", "piqa=3"], "no number for boolq"),
        ([*base, "--until-decided", "1"], "--until-decided is 1; give a margin between 0 and 1"),
        ([*base, "--until-decided", "0"], "--until-decided is 0"),
        ([*base, "--until-decided", "nan"], "--until-decided is nan"),
        ([*base, "--until-decided", "some"], "--until-decided"),
        ([*base, "--methods", "ppm,ppm"], "--methods has ppm twice"),
        ([*base, "--methods", "hybrid", "--calibration-tokens", 99], "--calibration-tokens is 99, less than the 512"),
        ([*base, "--calibration-data", "python-reference"], "--calibration-data has no effect with --methods ppm"),
        ([*base[:3], "piqaa", *base[4:]], "did you mean piqa"),
        ([*base, "--include-path", tmp_path / "none"], "is no folder"),
        ([*base, "--output", "gs://bucket/study"], "is an address"),
    ):
        status, out, err = run(capsys, *argv)
        assert (status, out) == (2, ""), err
        assert message in err, (argv, err)
        assert not (tmp_path / "study").exists()


# Imports once what every run needs, and forks one for each line, which is its arguments; JAX is not yet started.
ZYGOTE = """
import json, os, sys, warnings
import evals.harness.backend, evals.study.baselines, evals.report.files, evals.harness.run, lm_eval
from evals.sweep import main
warnings.simplefilter("ignore")
for line in sys.stdin:
    if (child := os.fork()) == 0:
        os.dup2(os.open(json.loads(line)[0], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(2, 1)
        os._exit(main(json.loads(line)[1:]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_study_that_is_killed_twenty_times_is_that_of_an_unbroken_run(
    model: Path, tasks: Path, tmp_path: Path
) -> None:
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
    }
    what = ("--prune-percent", "10,30,60", "--limit", 12, "--tasks", "tiny_choice,tiny_sums")
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    zygote = subprocess.Popen(
        [sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert zygote.stdin is not None
    assert zygote.stdout is not None

    def run_for(output: Path, seconds: float = math.inf) -> tuple[int, float]:
        """Runs a study, kills it if it takes longer, and returns its exit status and how many seconds it took."""
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        zygote.stdin.write(json.dumps([str(log), *map(str, arguments(model, tasks, output, *what))]) + "\n")
        zygote.stdin.flush()
        process, begun = int(zygote.stdout.readline()), time.monotonic()
        with contextlib.suppress(ProcessLookupError):  # it has ended
            while time.monotonic() < begun + seconds:
                time.sleep(0.01)
                os.kill(process, 0)
            os.kill(process, signal.SIGKILL)
        return int(zygote.stdout.readline()), time.monotonic() - begun

    with zygote:
        assert run_for(whole)[0] == 0, log.read_text()
        shutil.rmtree(whole)
        status, duration = run_for(whole)  # with all programs in the cache, as those that are killed
        assert status == 0, log.read_text()
        rng, kills = random.Random(0), 0
        while kills < 20:
            from_the_beginning = not broken.exists()
            status, seconds = run_for(broken, rng.uniform(0.1, 0.9) * duration)
            assert status in (0, -signal.SIGKILL), log.read_text()
            kills += status != 0
            if status == 0:  # it was done before the kill came: again from the beginning, for more moments
                shutil.rmtree(broken)
                if from_the_beginning:  # the machine has less to do than it had when the time was taken
                    duration = seconds
        assert run_for(broken)[0] == 0, log.read_text()
        zygote.stdin.close()
    for name in ("study.json", *(f"tables/{path.name}" for path in (whole / "tables").iterdir())):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
