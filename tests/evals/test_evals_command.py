"""`python -m evals`, from its arguments to the files it leaves and the sentence it refuses with."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import numpy as np
import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from scripted_backend import Backend
from scripted_backend import backend as backend
from scripted_backend import tasks as tasks
from tiny_models import hf_config, write_folder
from tiny_tasks import ITEMS, NAMES, write_tasks

import convert
from evals.__main__ import main
from evals.harness.suites import SUITES
from evals.results.store import load_items, load_results, open_setting
from gluprune_jax import make_plan, score


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "tiny-llama", hf_config(vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1))
    write_tokenizer(folder)
    return folder


run = functools.partial(commands.run, main)
report = functools.partial(commands.report, main)


ALL = ",".join(NAMES)


# --------------------------------------------------------------------------------------------------- what it does


def test_results_are_stored_printed_and_shown(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: type[Backend]
) -> None:
    output = tmp_path / "results"
    argv = ("--model", model, "--tasks", ALL, "--include-path", tasks, "--output", output)
    status, out, err = run(capsys, *argv)
    assert status == 0, err
    (stored,) = load_results(output)
    assert stored.path.name.startswith("tiny-llama.float32-")
    assert stored.setting.about["model"] == str(model)
    for result in stored.results:
        assert f"{result.value:.4f}" in out or f"{result.value:,.2f}" in out
        assert "±" in out
        assert result.benchmark in err  # as soon as it is finished
        assert str(model) in result.about["command"]
        assert len(load_items(stored.path, result)) == result.num_items
    # Again: everything is there.
    again = report(capsys, *argv)
    assert backend.made[1].asked == []
    (shown,) = report(capsys, "show", output)
    assert {r["benchmark"]: r for r in again["results"]} == {r["benchmark"]: r for r in shown["results"]}
    assert [r["benchmark"] for r in again["results"]] == list(NAMES)
    assert run(capsys, "show", output)[1].split() == run(capsys, "show", stored.path)[1].split()


def test_a_plan_is_a_setting_of_its_own(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: type[Backend]
) -> None:
    plan = make_plan(score(convert.load(model).model), prune_percent=40)
    plan.save(tmp_path / "plan.json")
    argv = ("--model", model, "--tasks", "tiny_words", "--include-path", tasks, "--output", tmp_path / "results")
    report(capsys, *argv)
    document = report(capsys, *argv, "--plan", tmp_path / "plan.json")
    dense, masked = backend.made
    assert dense.options["neuron_masks"] is None
    for mask, kept in zip(masked.options["neuron_masks"], plan.kept, strict=True):
        assert np.flatnonzero(mask).tolist() == kept.tolist()
    assert len(masked.asked) == ITEMS
    assert document["setting"]["about"]["plan"] == plan.summary()
    _, out, _ = run(capsys, "show", tmp_path / "results")
    assert "tiny-llama.ppm-48" in out
    rows = [line for line in out.splitlines() if "tiny_words" in line]
    assert len(rows) == 1
    assert rows[0].count("±") == 2
    _, _, whole, pruned, difference = (cell.strip() for cell in rows[0].strip("│").split("│"))  # dense first
    values = [float(cell.split(" ± ")[0].replace(",", "")) for cell in (whole, pruned)]
    (one,) = document["results"]
    assert values[1] == pytest.approx(one["metrics"][one["metric"]]["value"], rel=1e-3)
    assert float(difference.replace(",", "")) == pytest.approx(values[1] - values[0], abs=0.011)


def test_options_reach_the_model_and_the_results(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: type[Backend]
) -> None:
    argv = ("--model", model, "--include-path", tasks, "--output", tmp_path / "results", "--tasks", "tiny_choice_a")
    document = report(
        capsys,
        *argv,
        "--dtype",
        "bfloat16",
        "--batch-size",
        3,
        "--context-length",
        64,
        "--limit",
        4,
        "--num-fewshot",
        2,
    )
    (lm,) = backend.made
    assert (lm.options["batch_size"], lm.options["context_length"]) == (3, 64)
    assert lm.checkpoint.model.embed_tokens.get_value().dtype == "bfloat16"
    (result,) = document["results"]
    assert (result["limit"], result["num_items"], result["shots"]) == (4, 4, "2")
    assert all(arguments[0].count("Question:") == 3 for _, arguments in lm.asked)
    assert document["setting"]["decides"]["window"] == 64
    assert Path(document["path"]).name.startswith("tiny-llama.bfloat16-")
    document = report(capsys, *argv, "--apply-chat-template", "--num-fewshot", 1)
    assert ".float32.chat-" in Path(document["path"]).name
    assert all(arguments[0].startswith("<user>Question:") for _, arguments in backend.made[1].asked)


def test_accuracies_stand_beside_their_chance_level(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: type[Backend]
) -> None:
    argv = ("--model", model, "--tasks", "tiny_choice_a,tiny_words", "--include-path", tasks)
    report(capsys, *argv, "--output", tmp_path / "results")
    _, out, _ = run(capsys, "show", tmp_path / "results")
    (head,) = [line for line in out.splitlines() if "benchmark" in line]
    assert [cell.strip() for cell in head.split("┃")][-2] == "chance"
    chance = {line.split("│")[1].strip(): line.split("│")[-2].strip() for line in out.splitlines() if "tiny_" in line}
    assert chance == {"tiny_choice_a": "0.3333", "tiny_words": ""}  # three choices; a perplexity has none


def test_rows_hold_only_what_can_be_compared(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: type[Backend]
) -> None:
    argv = ("--model", model, "--tasks", "tiny_words", "--output", tmp_path / "results")
    other = write_tasks(tmp_path / "other", seed=1)
    for options in ((tasks,), (other,), (tasks, "--limit", 5), (tasks, "--num-fewshot", 2)):
        report(capsys, *argv, "--include-path", *options)
    _, out, _ = run(capsys, "show", tmp_path / "results")
    rows = [line.split("│")[1].strip() for line in out.splitlines() if "tiny_words" in line]
    assert len(rows) == len(set(rows)) == 4
    assert sum("[" in row for row in rows) == 2  # the two that differ in their data alone
    assert any("first 5" in row for row in rows)
    assert any("2-shot" in row for row in rows)


def test_the_other_commands(capsys: pytest.CaptureFixture[str], backend: type[Backend]) -> None:
    assert run(capsys, "lm-eval", "run", "--tasks", "piqa")[0] == 3
    for argv in (("--help",), ("show", "--help")):
        status, out, _ = run(capsys, *argv)
        assert status == 0
        assert "examples:" in out
        assert "exit codes: 0" in out


def test_the_paper_runs_on_local_data(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: type[Backend]
) -> None:
    data = os.environ.get("GLUPRUNE_DATA")
    if not data or "NLTK_DATA" not in os.environ:
        pytest.skip("needs the benchmark data: set GLUPRUNE_DATA and NLTK_DATA")
    argv = (
        "--model",
        model,
        "--suite",
        "paper",
        "--benchmark-data",
        data,
        "--limit",
        "2,mmlu=114,leaderboard_musr=6",
        "--output",
        tmp_path / "results",
    )
    document = report(capsys, *argv)
    for result, benchmark in zip(document["results"], SUITES["paper"].benchmarks, strict=True):
        assert (result["benchmark"], result["metric"]) == (benchmark.name, benchmark.metric)
        assert result["shots"] == ("5" if benchmark.name in ("mmlu", "gsm8k") else "0")
        assert result["metrics"][result["metric"]]["stderr"] is not None
        assert result["num_items"] == {"mmlu": 114, "leaderboard_musr": 6}.get(benchmark.name, 2)


def test_the_real_backend(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    argv = ("--model", model, "--tasks", ALL, "--include-path", tasks, "--output", tmp_path / "results")
    argv = (*argv, "--context-length", 48, "--limit", "5,tiny_choice=10")
    status, out, err = run(capsys, *argv, "--json")
    assert status == 0, err
    results = {result["benchmark"]: result for result in json.loads(out)["results"]}
    assert 0 < results["tiny_choice"]["truncated"] <= results["tiny_choice"]["requests"]
    assert f"{results['tiny_choice']['truncated']} of 30 contexts were longer than the window of 48 tokens" in err
    assert results["tiny_words"]["truncated"] == 0
    again = report(capsys, *argv)
    assert {result["benchmark"]: result for result in again["results"]} == results


# ------------------------------------------------------------------------------------------------ when it is stopped


def test_ctrl_c_saves_and_says_how_to_go_on(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: type[Backend]
) -> None:
    output = tmp_path / "re sults"
    argv = ("--model", model, "--tasks", ALL, "--include-path", tasks, "--output", output)
    backend.fails_after, backend.failure = 3 * ITEMS + 5, KeyboardInterrupt()
    status, _, err = run(capsys, *argv)
    assert status == 130
    assert f"python -m evals --model {model} --tasks {ALL} --include-path {tasks} --output '{output}'" in err
    assert [result.benchmark for result in load_results(output)[0].results] == ["tiny_choice"]
    backend.fails_after = -1
    report(capsys, *argv)
    assert not {json.dumps(r) for r in backend.made[0].asked} & {json.dumps(r) for r in backend.made[1].asked}
    report(capsys, *argv[:-1], tmp_path / "unbroken")
    assert [(r.benchmark, r.metrics, r.identity) for r in load_results(output)[0].results] == [
        (r.benchmark, r.metrics, r.identity) for r in load_results(tmp_path / "unbroken")[0].results
    ]


def test_a_failure_keeps_what_was_answered(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: type[Backend]
) -> None:
    argv = ("--model", model, "--tasks", ALL, "--include-path", tasks, "--output", tmp_path / "results")
    backend.fails_after, backend.failure = 7, MemoryError()
    status, out, err = run(capsys, *argv)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == "gluprune: error: out of memory"
    backend.fails_after = -1
    report(capsys, *argv)
    assert not {json.dumps(r) for r in backend.made[0].asked} & {json.dumps(r) for r in backend.made[1].asked}


_COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell would ignore it
sys.path[:0] = {tests!r}
from types import ModuleType
import test_evals_command as tests
class Slow(tests.Backend):
    made, fails_after = [], -1
    def _answer(self, kind, arguments):
        self.seconds = 0.05
        return super()._answer(kind, arguments)
module = ModuleType("evals.harness.backend")
module.GlupruneLM = Slow
sys.modules["evals.harness.backend"] = module
sys.exit(tests.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_real_interrupt(model: Path, tasks: Path, tmp_path: Path) -> None:
    argv = ("--model", model, "--tasks", ALL, "--include-path", tasks, "--output", tmp_path / "results")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    code = _COMMAND.format(tests=[str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")])
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, argv)], env=environment, stdout=-1, stderr=-1, text=True
    )
    deadline = time.monotonic() + 600
    answered = 0
    while answered < 5 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
        answered = sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("results/*/responses.jsonl"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "gluprune: interrupted"
    assert "python -m evals --model" in err


# ------------------------------------------------------------------------------------------------------- refusals


def test_refusals(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: type[Backend]
) -> None:
    words = ("--model", model, "--include-path", tasks, "--tasks", "tiny_words")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "novel.txt").write_text("")
    other_plan = tmp_path / "other.json"
    other = convert.load(write_folder(tmp_path / "other", hf_config(intermediate_size=64)))
    make_plan(score(other.model), width=10).save(other_plan)
    bare = write_folder(tmp_path / "bare", hf_config(vocab_size=VOCABULARY))
    cases: list[tuple[tuple[object, ...], tuple[str, ...]]] = [
        ((*words, "--suite", "paper"), ("not allowed with",)),
        (("--model", model), ("--suite", "--tasks")),
        (("--model", model, "--suite", "papers"), ("'papers'", "paper-instruct")),
        (("--model", model, "--tasks", "hellaswagg,piqa"), ("'hellaswagg'", "hellaswag")),
        ((*words, "--limit", "0"), ("--limit is 0",)),
        ((*words, "--limit", "1.5"), ("--limit is 1.5",)),
        ((*words, "--limit", "ten"), ("--limit is ten",)),
        ((*words, "--limit", "nan"), ("--limit is nan",)),
        ((*words, "--limit", "5,piqa=3"), ("--limit names piqa, which is not evaluated; there are tiny_words",)),
        ((*words, "--resume"), ("there is nothing to resume", "leave out --resume")),
        ((*words, "--num-fewshot", "-1"), ("--num-fewshot is -1",)),
        ((*words, "--num-fewshot", "13"), ("tiny_words", "13")),
        ((*words, "--batch-size", "0"), ("--batch-size is 0",)),
        ((*words, "--context-length", "1"), ("--context-length is 1",)),
        ((*words, "--context-length", "513"), ("--context-length is 513", "512")),
        ((*words, "--output", foreign), (str(foreign), "novel.txt")),
        ((*words, "--plan", tmp_path / "none.json"), ("none.json",)),
        ((*words, "--plan", other_plan), ("3 layers of 64 neurons", "3 layers of 80 neurons")),
        ((*words, "--benchmark-data", tmp_path / "nowhere"), ("--benchmark-data", "nowhere")),
        ((*words, "--include-path", tmp_path / "nowhere"), ("--include-path", "nowhere")),
        (("--model", tmp_path / "nowhere", *words[2:]), ("there is no model",)),
        ((*words, "--chat-template", "rag"), ("--chat-template rag", "give --apply-chat-template too")),
        (("--model", bare, *words[2:]), ("no tokenizer files",)),
        (("show", tmp_path / "nowhere"), ("no such folder",)),
        (("show", foreign), ("no results folder",)),
    ]
    output = tmp_path / "results"
    for argv, expected in cases:
        placed = argv if argv[0] == "show" or "--output" in argv else (*argv, "--output", output)
        status, out, err = run(capsys, *placed)
        assert (status, out) == (2, ""), (argv, err)
        assert len(err.splitlines()) <= 2, err  # a note may stand before it
        for part in expected:
            assert part in " ".join(err.split()), (argv, err)
    assert not output.exists()
    assert backend.made == []


def test_a_token_without_embedding_is_noted(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: type[Backend]
) -> None:
    small = write_folder(tmp_path / "small", hf_config(vocab_size=VOCABULARY - 1))
    write_tokenizer(small)
    argv = ("--model", small, "--include-path", tasks, "--tasks", "tiny_words", "--output", tmp_path / "results")
    status, _, err = run(capsys, *argv)
    assert status == 0, err
    assert "note: the tokenizer has 1 token beyond the 259 of the model's embedding ('<eos>' with id 259)" in err


def test_a_plan_for_other_weights_is_refused(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: type[Backend]
) -> None:
    from tiny_models import hf_tensors

    config = hf_config(vocab_size=VOCABULARY)
    other = convert.load(write_folder(tmp_path / "other", config, hf_tensors(config, seed=1)))
    make_plan(score(other.model), width=10).save(tmp_path / "plan.json")
    argv = ("--model", model, "--tasks", "tiny_words", "--include-path", tasks, "--output", tmp_path / "results")
    status, _, err = run(capsys, *argv, "--plan", tmp_path / "plan.json")
    assert status == 2
    assert "other weights" in err


def test_a_plan_that_drops_layers_is_refused(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: type[Backend]
) -> None:
    make_plan(score(convert.load(model).model), width=10, drop_layers=[1]).save(tmp_path / "plan.json")
    argv = ("--model", model, "--tasks", "tiny_words", "--include-path", tasks, "--output", tmp_path / "results")
    status, _, err = run(capsys, *argv, "--plan", tmp_path / "plan.json")
    assert status == 2
    assert "the plan drops layer 1, which a mask over neurons cannot do; prune with it" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "results").exists()
    assert backend.made == []


def test_a_run_beside_another_is_refused(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: type[Backend]
) -> None:
    argv = ("--model", model, "--tasks", "tiny_words", "--include-path", tasks, "--output", tmp_path / "results")
    report(capsys, *argv)
    (stored,) = load_results(tmp_path / "results")
    with open_setting(tmp_path / "results", stored.setting):
        status, _, err = run(capsys, *argv)
    assert status == 2
    assert "another run" in err
    report(capsys, *argv)


def test_data_that_cannot_be_had(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: type[Backend]
) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    (tasks / "test.jsonl").unlink()
    argv = ("--model", model, "--tasks", "tiny_words", "--include-path", tasks, "--output", tmp_path / "results")
    status, _, err = run(capsys, *argv)
    assert status == 1
    assert "--benchmark-data" in err
    assert len(err.splitlines()) == 1
