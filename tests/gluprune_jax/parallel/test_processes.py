"""The commands in several real processes: the same files and answers as in one, and nobody is left waiting."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from processes import HEARTBEAT, done, finish, start
from tiny_models import hf_config, write_folder
from tiny_tasks import NAMES, write_tasks

from evals.report.__main__ import main as report
from evals.results.store import load_items, load_results
from gluprune_jax.errors import RequestError
from gluprune_jax.prune import main as prune

pytestmark = pytest.mark.slow

Run = Callable[..., list[tuple[int, str, str]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(*argv: object, processes: int = 2) -> list[tuple[int, str, str]]:
        environment = {"HF_DATASETS_CACHE": str(tmp_path / "datasets"), "JAX_COMPILATION_CACHE_DIR": ""}
        return finish(start(*argv, processes=processes, environment=environment))

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = hf_config(vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1, intermediate_size=83)
    folder = write_folder(tmp_path / "tiny-llama", config)
    write_tokenizer(folder)
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_prune_in_two_processes_and_restore_in_one_and_in_four(
    tmp_path: Path, model: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    target = ("--model", model, "--width", "41", "--format", "hf,orbax", "--json")
    assert prune([str(arg) for arg in (*target, "--output", alone)]) == 0
    expected = json.loads(capsys.readouterr().out)
    report = json.loads(done(run("gluprune_jax.prune", *target, "--output", together)))
    assert report["plan"] == expected["plan"]
    assert weights(together) == weights(alone)
    assert (together / "gluprune_plan.json").read_bytes() == (alone / "gluprune_plan.json").read_bytes()
    for processes in (1, 4):
        back = tmp_path / f"back-{processes}"
        done(run("convert", together / "orbax", back, processes=processes))
        assert weights(back) == weights(alone)
    # Measuring runs the model, dense and sliced.
    measured = (
        "--eval-data",
        "python-reference",
        "--eval-tokens",
        "700",
        "--sample",
        "hello",
        "--sample-tokens",
        "9",
    )
    reports = [
        json.loads(done(run("gluprune_jax.prune", *target, *measured, "--output", tmp_path / str(n), processes=n)))
        for n in (1, 2)
    ]
    assert reports[0]["sample"]["answers"] == reports[1]["sample"]["answers"]
    perplexities = [list(report["evaluation"]["perplexity"].values()) for report in reports]
    np.testing.assert_allclose(perplexities[1], perplexities[0], rtol=1e-5)
    assert weights(tmp_path / "2") == weights(alone)


def answers(folder: Path) -> Iterator[Any]:
    """Every response in a results folder, benchmark by benchmark."""
    (stored,) = load_results(folder)
    for result in stored.results:
        for item in load_items(stored.path, result):
            for responses in item["responses"]:
                yield from responses


def test_evaluate(tmp_path: Path, model: Path, run: Run) -> None:
    """Choices, words, whole pages and generated texts, in one process and in several."""
    tasks = ("--tasks", ",".join(NAMES), "--include-path", write_tasks(tmp_path / "tasks"), "--num-fewshot", "0")
    command = ("evals", "--model", model, *tasks)
    done(run(*command, "--output", tmp_path / "alone", "--mesh", "data=1,model=1", processes=1))
    done(run(*command, "--output", tmp_path / "two", processes=2))
    done(run(*command, "--output", tmp_path / "four", "--mesh", "data=2,model=4", processes=4))
    alone = list(answers(tmp_path / "alone"))
    assert len(alone) > 100
    assert {type(answer) for answer in alone} == {list, float, str}
    for several in ("two", "four"):
        check_answers(list(answers(tmp_path / several)), alone)


def test_a_study(tmp_path: Path, model: Path, run: Run) -> None:
    """A sweep, and what is timed for its report; the second process leaves nothing behind."""
    tasks = ("--tasks", "tiny_choice", "--include-path", write_tasks(tmp_path / "tasks"), "--limit", 6)
    text = tmp_path / "text.txt"
    text.write_text("all neurons are equal, but some neurons are more equal than others. " * 40)
    calibration = ("--calibration-data", text, "--calibration-tokens", 512, "--sequence-length", 64)
    methods = ("--methods", "hybrid+least-squares", "--prune-percent", 50, "--context-length", 64)
    sweep = ("evals.sweep", "--model", model, *tasks, *calibration, *methods, "--json")
    alone, together, nothing = (tmp_path / name for name in ("alone", "together", "nothing"))
    expected = json.loads(done(run(*sweep, "--output", alone, "--mesh", "data=1,model=2", processes=1)))
    found = json.loads(done(run(*sweep, "--output", [together, nothing], "--mesh", "data=2,model=2")))
    assert [point["method"] for point in found["points"]] == ["dense", "hybrid+least-squares"]
    assert found["rows"] == expected["rows"]
    assert len(found["rows"]) == 2
    work = ("--prune-percent", 50, "--no-aligned", "--batch-sizes", 2, "--prompt-tokens", 9, "--new-tokens", 17)
    efficiency = ("evals.efficiency", "--model", model, *work, "--repeats", 2, "--mesh", "data=2,model=2", "--json")
    timed = json.loads(done(run(*efficiency, "--output", [together, nothing])))
    assert [(row["level"], row["width"]) for row in timed["rows"]] == [("50 %", 42)]
    assert timed["rows"][0]["latency"]["median"] > 0
    assert not nothing.exists()
    assert report([str(together), "--json"]) == 0


def check_answers(several: list[Any], single: list[Any]) -> None:
    pairs = list(zip(several, single, strict=True))
    for together, alone in pairs:
        if isinstance(alone, list):  # log-likelihood and greedy flag
            assert abs(together[0] - alone[0]) <= 1e-4
            assert together[1] == alone[1]
        elif isinstance(alone, float):
            assert together == pytest.approx(alone, rel=1e-5)
        else:
            assert together == alone


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_and_its_work_is_kept(
    tmp_path: Path, model: Path, run: Run, victim: int
) -> None:
    tasks = ("--tasks", ",".join(NAMES), "--include-path", write_tasks(tmp_path / "tasks"), "--num-fewshot", "0")
    command = ("evals", "--model", model, *tasks, "--output", tmp_path / "results")
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "datasets"), "JAX_COMPILATION_CACHE_DIR": ""}
    workers = start(*command, processes=2, environment=environment)
    deadline = time.monotonic() + 200
    while not any(path.stat().st_size for path in (tmp_path / "results").glob("*/responses.jsonl")):
        assert all(worker.poll() is None for worker in workers), finish(workers)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers[victim].send_signal(signal.SIGKILL)
    results = finish(workers, timeout=HEARTBEAT + 60)  # or it fails
    assert results[victim][0] == -signal.SIGKILL
    assert results[1 - victim][0] != 0
    (journal,) = (tmp_path / "results").glob("*/responses.jsonl")
    before = journal.read_bytes()
    kept = before[: before.rindex(b"\n") + 1]
    done(run(*command))
    assert journal.read_bytes().startswith(kept)
    (stored,) = load_results(tmp_path / "results")
    assert len(stored.results) == len(NAMES)


def test_what_one_process_refuses_all_do_and_the_first_says_so(tmp_path: Path, model: Path, run: Run) -> None:
    target = ("--width", "41", "--output", tmp_path / "out")
    results = run("gluprune_jax.prune", "--model", [model, tmp_path / "elsewhere"], *target)
    assert [status for status, _, _ in results] == [2, 2]
    assert results[0][2] == (
        f"gluprune: error: process 1 of 2: there is no model {tmp_path / 'elsewhere'}: not a file, not a folder, not a "
        f"hub id (owner/name) and not 'demo' or 'demo:gemma3-270m'"
    )
    assert results[1][1:] == ("", "")
    assert not (tmp_path / "out").exists()
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text in texts:
        text.write_text(f"{text.name} is not the other one. " * 40)
    results = run("gluprune_jax.prune", "--model", model, *target, "--eval-data", texts)
    assert [status for status, _, _ in results] == [2, 2]
    assert (
        "process 1 has read something else than process 0: the texts of --eval-data; give both the same"
        in results[0][2]
    )
    results = run("gluprune_jax.prune", "--model", model, *target, "--mesh", "data=1,model=3")
    assert [status for status, _, _ in results] == [2, 2]
    assert "the mesh data=1,model=3 has 3 devices, and there are 4 in 2 processes" in results[0][2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--coordinator localhost:1", "--coordinator goes with --distributed"),
        ("--distributed --process-id 0", "--process-id needs --coordinator and --num-processes too"),
        (
            "--distributed --coordinator localhost:1 --num-processes 2 --process-id 2",
            "--process-id is 2; of 2 processes it must be one from 0",
        ),
        ("--distributed --coordinator nowhere --num-processes 1 --process-id 0", "write HOST:PORT"),
        ("--distributed --heartbeat-timeout 0", "--heartbeat-timeout is 0; it must be at least 1 second"),
    ],
)
def test_options_that_do_not_go_together(
    model: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    assert prune(["--model", str(model), "--width", "41", "--dry-run", *options.split()]) == RequestError.exit_status
    assert message in capsys.readouterr().err


def test_no_cluster(model: Path) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "TPU_"))}
    command = [
        sys.executable,
        "-m",
        "gluprune_jax.prune",
        "--model",
        model,
        "--width",
        "41",
        "--dry-run",
        "--distributed",
    ]
    result = subprocess.run(command, env=own, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == RequestError.exit_status
    assert "--distributed finds no cluster that it knows" in result.stderr
