"""What efficiency measures: the same work for all models, defined quantities, energy that is counted or not there."""

import json
import os
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import commands
import jax
import numpy as np
import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from tiny_models import hf_config, write_folder

import convert
from evals.efficiency import measure as timing
from evals.efficiency.__main__ import NEW_TOKENS, main, parser
from evals.efficiency.costs import bytes_per_token, flops_per_token
from evals.efficiency.energy import Energy, EnergyMeter
from evals.efficiency.measure import DEFINITIONS, decode_memory, measure
from evals.efficiency.workloads import PAPER, Workload, from_texts, of_paper, synthetic
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.inference.device_loop import STEPS_PER_CALL

run, report = partial(commands.run, main), partial(commands.report, main)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = hf_config(vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1, intermediate_size=300)
    folder = write_folder(tmp_path_factory.mktemp("model") / "tiny-llama", config)
    write_tokenizer(folder)
    return folder


def test_a_report(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--prune-percent",
        "0,40",
        "--prompt-tokens",
        8,
        "--new-tokens",
        17,
        "--repeats",
        2,
        "--batch-sizes",
        1,
        "--mesh",
        "data=1",
    )
    found = report(capsys, "--model", model, *options, "--output", tmp_path)
    assert json.loads((tmp_path / "efficiency.json").read_text()) == found
    assert [(row["level"], row["width"], row["batch"]) for row in found["rows"]] == [
        ("dense", 300, 1),
        ("40 %", 180, 1),
        ("40 %, multiple of 128", 128, 1),
    ]
    for row in found["rows"]:
        assert (row["new_tokens"], row["mean_prompt_tokens"]) == (17, 8)
        assert row["time_to_first_token"]["median"] > 0
        timing = row["latency"]
        assert 0 < timing["low"] <= timing["median"] <= timing["high"]
        assert row["output_tokens_per_second"] == pytest.approx(row["batch"] * 17 / timing["median"])
        assert row["energy_per_token"] is None or row["energy_per_token"] > 0
    assert found["definitions"] == DEFINITIONS
    by_width = {row["width"]: row for row in found["rows"]}
    for key in ("memory_bytes", "flops_per_token", "bytes_per_token"):
        assert by_width[128][key] < by_width[180][key] < by_width[300][key]
    status, _, err = run(capsys, "--model", model, *options, "--output", tmp_path)
    assert status == 2
    assert "efficiency.json" in err
    assert "--overwrite" in err


def test_all_answers_have_the_length_that_was_asked_for(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = convert.load(str(model)).model
    asked: list[tuple[int, int]] = []

    def counted(model: Any, prompts: Any, *, max_new_tokens: int, slots: int, **_: Any) -> list[list[int]]:
        answers = generate(model, prompts, max_new_tokens=max_new_tokens, slots=slots)
        asked.append((len(prompts), slots))
        assert [len(answer) for answer in answers] == [max_new_tokens] * len(prompts)
        return answers

    generate = timing.generate
    monkeypatch.setattr(timing, "generate", counted)
    seconds = iter([0.0, 1.0, 1.0, 2.0, 10.0, 11.0, 20.0, 24.0])  # warm-up twice, then 1 s to the first, 4 s in all
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    workload = Workload("two lengths", [[1, 2, 3], [4, 5], [6]], 5)
    found = measure(loaded, workload, 2, 1, EnergyMeter(jax.devices()), None)
    assert set(asked) == {(2, 2)}  # the last group is filled up from the first prompt
    assert len(asked) == 2 * (2 + 2)  # two groups: warm-up and one repeat, of one token and of all
    assert found["mean_prompt_tokens"] == pytest.approx((3 + 2 + 1 + 3) / 4)
    assert found["time_to_first_token"] is None  # of one prompt alone
    # Of each of the two groups: half a second to the first tokens, two for all five of both prompts.
    assert found["latency"]["median"] == pytest.approx(2.0)
    assert found["time_per_output_token"]["median"] == pytest.approx(1.5 / 4)
    assert found["output_tokens_per_second"] == pytest.approx(2 * 5 / 2.0)
    assert found["decode_tokens_per_second"] == pytest.approx(2 * 4 / 1.5)
    assert found["prefill_tokens_per_second"] == pytest.approx(4.5 / 0.5)


def test_noise_is_no_rate(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = convert.load(str(model)).model
    monkeypatch.setattr(timing, "generate", lambda *_, **__: [])
    seconds = iter([0.0, 1.0, 1.0, 2.0, 10.0, 12.0, 20.0, 21.0])  # all tokens sooner than the first
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    found = measure(loaded, Workload("one", [[1, 2]], 2), 1, 1, EnergyMeter(jax.devices()), None)
    assert found["time_per_output_token"] is None
    assert found["decode_tokens_per_second"] is None


def test_smaller_batches_are_not_passed_off_as_larger_ones(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short_of_memory(*_: Any, on_out_of_memory: Any, **__: Any) -> list[Any]:
        on_out_of_memory(1)
        return []

    monkeypatch.setattr(timing, "generate", short_of_memory)
    with pytest.raises(OperationError, match="no memory for 2 sequences"):
        measure(convert.load(str(model)).model, Workload("w", [[1]] * 2, 2), 2, 1, EnergyMeter(jax.devices()), None)


def test_flops_and_bytes_are_those_of_the_compiled_program(model: Path) -> None:
    """XLA counts the products of one token, its cache as long as the slots it is given."""
    loaded = convert.load(str(model)).model
    config = loaded.config
    forward = jax.jit(lambda model, tokens: model.logits(model(tokens)[0]))
    counted = forward.lower(loaded, np.ones((1, 1), np.int32)).compile().cost_analysis()
    assert isinstance(counted, dict)
    assert flops_per_token(config, 1) == pytest.approx(counted["flops"], rel=0.05)
    weights = (flops_per_token(config, 0)) // 2
    assert bytes_per_token(config, 0, 1, 4) == 4 * weights
    assert bytes_per_token(config, 0, 4, 4) == weights
    cached = bytes_per_token(config, 10, 1, 2) - bytes_per_token(config, 0, 1, 2)
    assert cached == 2 * 10 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def test_memory_grows_with_the_batch(model: Path) -> None:
    loaded = convert.load(str(model)).model
    small, large = (decode_memory(loaded, batch, 64) for batch in (1, 8))
    assert small is not None
    assert large is not None
    assert config_bytes(loaded) < small < large


def config_bytes(model: Any) -> int:
    return 4 * int(model.config.num_parameters)


class Monitor:
    """Counts 3 J a second, as Zeus would."""

    reading = 5.0

    def __init__(self, *, gpu_indices: list[int] | None, sync_execution_with: str) -> None:
        assert sync_execution_with == "jax"
        self.gpu_indices, self.cpu_indices = gpu_indices or [], [0]

    def begin_window(self, name: str, *, sync_execution: bool) -> None:
        assert not sync_execution

    def end_window(self, name: str, *, sync_execution: bool) -> Any:
        return types.SimpleNamespace(
            time=2.0, gpu_energy={}, cpu_energy={0: self.reading}, dram_energy={0: self.reading / 5}
        )


def test_energy_is_what_the_counters_say(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeus, monitor = types.ModuleType("zeus"), types.ModuleType("zeus.monitor")
    monitor.ZeusMonitor = Monitor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zeus", zeus)
    monkeypatch.setitem(sys.modules, "zeus.monitor", monitor)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    meter = EnergyMeter(jax.devices())
    assert meter.sources == ("CPU (RAPL)",)
    assert meter.unavailable is None
    assert meter.measure(lambda: None) == Energy(6.0, 2.0)
    assert meter.idle_watts(0.0) == 3.0
    loaded = convert.load(str(model)).model
    monkeypatch.setattr(Monitor, "reading", 0.0)  # between two readings of a counter
    assert meter.measure(lambda: None) is None
    monkeypatch.setattr(Monitor, "reading", 5.0)
    found = measure(loaded, Workload("one", [[1, 2]], 3), 1, 2, meter, 1.0)
    assert found["energy_per_token"] == pytest.approx(6.0 / (2 * 3))
    assert found["net_energy_per_token"] == pytest.approx((6.0 - 1.0 * 2.0) / (2 * 3))


def test_energy_that_nothing_counts_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    meter = EnergyMeter(jax.devices())
    assert meter.sources == ()
    assert "pip install 'gluprune-jax[energy]'" in (meter.unavailable or "")
    assert meter.measure(lambda: None) is None
    assert meter.idle_watts(0.0) is None
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    assert EnergyMeter(jax.devices()).unavailable == "TPUs tell no energy"


def test_workloads() -> None:
    assert all((new_tokens - 1) % STEPS_PER_CALL == 0 for _, new_tokens in [*PAPER.values(), (0, NEW_TOKENS)])
    assert f"one more than a multiple of {STEPS_PER_CALL} is timed best" in " ".join(parser().format_help().split())
    drawn = synthetic(100, 7, 5)
    assert {len(prompt) for prompt in drawn.prompts} == {7}
    assert all(0 <= token < 100 for prompt in drawn.prompts for token in prompt)
    assert from_texts("mine", ["a b", "", "c"], str.split, 3).prompts == [["a", "b"], ["c"]]  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="mine has no prompts"):
        from_texts("mine", ["", ""], str.split, 3)  # type: ignore[arg-type]


def test_prompts_of_ones_own(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "questions.txt").write_text("What is a neuron?\n\nWhy prune it?\n")
    options = ("--prune-percent", "0", "--new-tokens", 2, "--repeats", 1, "--batch-sizes", 1, "--mesh", "data=1")
    found = report(capsys, "--model", model, "--prompts", tmp_path / "questions.txt", *options)
    (row,) = found["rows"]
    assert row["prompts"] == 2
    (tmp_path / "questions.jsonl").write_text('{"text": "Two\\nlines?"}\n{"text": "One?"}\n{"text": "Another?"}\n')
    found = report(capsys, "--model", model, "--prompts", tmp_path / "questions.jsonl", *options)
    assert found["rows"][0]["prompts"] == 3  # a record is a prompt, whatever lines it has
    options = (*options, "--most-prompts", 1)
    status, out, err = run(capsys, "--model", model, "--prompts", tmp_path / "questions.txt", *options)
    assert status == 0, err
    assert "first, ms" in out
    assert "dense" in out
    assert "energy: not available" in out or "J/token" in out
    assert row["workload"] == str(tmp_path / "questions.txt")


def test_one_device_of_many_is_measured(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = ("--prune-percent", "0", "--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 1, "--batch-sizes", 1)
    memory = {}
    for mesh, devices in (("auto", 1), ("data=1", 1), ("data=2,model=2", 4)):
        found = report(capsys, "--model", model, *work, "--mesh", mesh)
        assert found["devices"].startswith(f"{devices} x ")
        memory[mesh] = found["rows"][0]["memory_bytes"]
    assert memory["auto"] == memory["data=1"] > memory["data=2,model=2"] > 0


def test_refusals(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    for options, message in (
        (["--prune-percent", "0,100"], "--prune-percent is 100"),
        (["--prune-percent", "x"], "--prune-percent has 'x'"),
        (["--batch-sizes", "1.5"], "--batch-sizes has '1.5'"),
        (["--batch-sizes", "inf"], "--batch-sizes has 'inf'"),
        (["--new-tokens", 1], "--new-tokens is 1"),
        (["--repeats", 0], "--repeats is 0"),
        (["--prompt-tokens", 600], "the model's window 512"),
        (["--prompts", tmp_path / "none.txt"], "none.txt"),
        (["--criterion", "hybrid"], "--criterion hybrid needs activations on text; give one of weights alone"),
        (
            ["--prompts", "python-reference", "--prompt-tokens", 9],
            "--prompt-tokens has no effect with these prompts",
        ),
        (["--workload", "paper", "--new-tokens", 9], "--new-tokens has no effect with the paper workload"),
        (["--benchmark-data", tmp_path], "--benchmark-data has no effect with the synthetic workload"),
        (["--most-prompts", 2], "--most-prompts is 2, and --batch-sizes has 8, which takes as many"),
        (["--prompts", chat], "holds conversations; give plain text"),
    ):
        status, out, err = run(capsys, "--model", model, "--mesh", "data=1", *options)
        assert (status, out) == (2, ""), err
        assert message in err, (options, err)


@pytest.mark.skipif("GLUPRUNE_DATA" not in os.environ, reason="needs the benchmarks: set GLUPRUNE_DATA")
def test_the_papers_prompts_are_spread_over_subjects() -> None:
    def letters(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    few, all_subjects = (of_paper(letters, Path(os.environ["GLUPRUNE_DATA"]), most=most) for most in (19, 57))
    assert [(one.name, len(one.prompts), one.new_tokens) for one in few] == [
        ("HellaSwag", 19, 17),
        ("MMLU", 19, 49),
        ("IFEval", 19, 97),
    ]
    assert few[1].prompts == all_subjects[1].prompts[::3]  # of 57 subjects every third, one question of each
