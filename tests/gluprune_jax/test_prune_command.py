"""`python -m gluprune_jax.prune`, from its arguments to the files it leaves and the sentence it refuses with."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from inspecting import contents, logits, tensors
from safetensors.numpy import load_file
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.huggingface.streamed import StreamedCheckpoint
from gluprune_jax import PruningPlan, make_plan, score
from gluprune_jax.errors import RequestError, format_bytes
from gluprune_jax.prune import main

CONFIG = hf_config(intermediate_size=120)  # expansion ratio 2.5
TOKENS = np.random.default_rng(0).integers(3, 97, (2, 24))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", CONFIG)


run = functools.partial(commands.run, main)
report = functools.partial(commands.report, main)


# --------------------------------------------------------------------------------------------------- what it does


def test_the_output_is_the_sliced_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    done = report(capsys, "--model", model, "--expansion-ratio", "2.0", "--output", out)
    dense = hf_tensors(CONFIG)
    plan = PruningPlan.load(out / "gluprune_plan.json")
    written = tensors(convert.load(out))
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 96
    assert written.keys() == dense.keys()
    for name, before in dense.items():
        expected = before
        if ".mlp." in name:
            kept = plan.kept[int(name.split(".")[2])]
            expected = before[:, kept] if "down_proj" in name else before[kept]
        np.testing.assert_array_equal(written[name], expected, err_msg=name)
    # The report counts what is really there.
    assert done["before"]["parameters"] == sum(tensor.size for tensor in dense.values())
    assert done["after"]["parameters"] == sum(tensor.size for tensor in written.values())
    assert done["after"]["bytes"] == sum(tensor.nbytes for tensor in written.values())
    assert done["after"]["expansion_ratio"] == 2.0


@pytest.mark.parametrize(
    ("target", "width"),
    [
        (("--expansion-ratio", "2.01"), 97),
        (("--prune-percent", "33"), 81),
        (("--width", "77"), 77),
        (("--width", "77", "--multiple-of", "8"), 72),
        (("--width", "77", "--for", "mlx"), 64),
        (("--width", "77", "--for", "tpu"), 77),
        (("--target-parameters", "70k"), 97),
        (("--target-bytes", "280kB", "--multiple-of", "8"), 96),
        (("--target-bytes", "150kB", "--target-type", "F16"), 105),
    ],
)
def test_targets(model: Path, capsys: pytest.CaptureFixture[str], target: tuple[str, ...], width: int) -> None:
    done = report(capsys, "--model", model, *target, "--dry-run")
    assert done["after"]["intermediate_sizes"] == [width] * 3


def test_a_dry_run_writes_nothing_and_shows_the_layers_that_differ(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tmp_path)
    argv = ("--model", model, "--width", "60", "--layers", "0,-1", "--output", tmp_path / "out")
    status, out, _ = run(capsys, *argv, "--plan-out", tmp_path / "plan.json", "--dry-run")
    assert status == 0
    assert contents(tmp_path) == before
    rows = [line.split() for line in out.splitlines()]
    assert [row[1::2] for row in rows if row[1:2] in (["0"], ["1"], ["2"])] == [
        ["0", "120", "60", "1.25"],
        ["1", "120", "120", "2.5"],
        ["2", "120", "60", "1.25"],
    ]


def test_a_saved_plan_is_replayed_to_the_bit(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    report(capsys, "--model", model, "--prune-percent", "40", "--criterion", "l2", "--plan-out", plan)
    report(capsys, "--model", model, "--prune-percent", "40", "--criterion", "l2", "--output", tmp_path / "a")
    report(capsys, "--model", model, "--plan", plan, "--output", tmp_path / "b")
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a.pop("README.md") != b.pop("README.md")  # the command to reproduce differs
    assert a == b
    assert a["gluprune_plan.json"] == plan.read_bytes()


def test_layers_that_differ_in_width_are_padded_for_transformers_and_not_for_orbax(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ("--model", model, "--width", "50", "--layers", "0", "--output", out, "--format", "hf,orbax")
    status, printed, _ = run(capsys, *argv)
    assert status == 0
    assert "zero-padded to 120" in " ".join(printed.split())
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 120
    for path in (out, out / "orbax"):
        checkpoint = convert.load(path)
        assert checkpoint.config.intermediate_sizes == (50, 120, 120)
        assert checkpoint.model.layers[0].mlp.gate_proj.shape == (50, 48)


def safetensors_bytes(folder: Path) -> int:
    """Of the tensors in the file: without its header."""
    return sum(array.nbytes for array in load_file(folder / "model.safetensors").values())


def orbax_bytes(folder: Path) -> int:
    return sum(array.nbytes for array in tensors(convert.load(folder / "orbax")).values())


@pytest.mark.parametrize(
    ("target", "file_width"),
    [
        (("--prune-percent", "20", "--allocation", "global"), None),
        (("--width", "60", "--layers", "1"), 120),
        (("--width", "77", "--pad-to", "32"), 96),
        (("--width", "77", "--pad-to", "64"), 128),
        (("--width", "77", "--drop-layers", "0"), 77),
    ],
)
def test_reported_bytes_are_those_of_the_files_that_are_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: tuple[str, ...], file_width: int | None
) -> None:
    out = tmp_path / "out"
    asked = ("--model", model, *target, "--format", "hf,orbax")
    done = report(capsys, *asked, "--output", out)
    after = done["after"]
    assert after["file_bytes"] == {"hf": safetensors_bytes(out), "orbax": orbax_bytes(out)}
    assert after["bytes"] == after["file_bytes"]["orbax"] == after["parameters"] * 4
    assert after["file_width"] == json.loads((out / "config.json").read_text())["intermediate_size"]
    assert file_width in (None, after["file_width"])
    assert done["before"]["file_bytes"]["hf"] == safetensors_bytes(model)
    dry = report(capsys, *asked, "--dry-run")
    assert [dry[when] for when in ("before", "after")] == [done[when] for when in ("before", "after")]
    # The card and the table say the same of them.
    size = format_bytes(after["file_bytes"]["hf"])
    assert f"| safetensors | {format_bytes(safetensors_bytes(model))} | {size} |" in (out / "README.md").read_text()
    _, printed, _ = run(capsys, *asked, "--dry-run")
    (row,) = [line for line in printed.splitlines() if "│ safetensors " in line]
    assert size in row
    is_padded = set(after["intermediate_sizes"]) != {after["file_width"]}
    assert is_padded == (f"zero-padded to {after['file_width']} (" in printed)


def test_forecasts_and_the_warning_are_of_the_widths_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_folder(tmp_path / "of-blocks", hf_config(hidden_size=256, intermediate_size=768, num_hidden_layers=2))
    argv = ("--model", model, "--width", "690", "--dry-run")
    bad = report(capsys, *argv)
    assert "larger than the dense one (Q4_K_M: " in bad["warning"]
    assert bad["warning"].endswith("give --multiple-of 256")  # padding would make it as wide as the dense one
    assert "warning" not in report(capsys, *argv, "--pad-to", "256")
    q8 = report(capsys, *argv, "--format", "gguf", "--gguf-type", "Q8_0")
    assert q8["warning"].endswith("give --pad-to 32, which loses no neuron, or --multiple-of 32")
    status, printed, said = run(capsys, *argv)
    assert status == 0
    assert "GGUF Q4_K_M, forecast" in printed
    assert "larger than the dense one" in " ".join(said.split())
    # Layers of different widths are converted with their padding.
    mixed = report(capsys, "--model", model, "--width", "60", "--layers", "1", "--dry-run")
    assert mixed["after"]["gguf_bytes"] == mixed["before"]["gguf_bytes"]


def test_pruning_twice_keeps_both_records(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(capsys, "--model", model, "--width", "80", "--output", tmp_path / "a")
    report(capsys, "--model", tmp_path / "a", "--width", "60", "--output", tmp_path / "b", "--format", "orbax")
    history = convert.load(tmp_path / "b").history
    assert [record["widths"] for record in history] == [[80] * 3, [60] * 3]
    # Pruned in two steps or at once: ppm looks at each row alone, so the survivors are the same.
    report(capsys, "--model", model, "--width", "60", "--output", tmp_path / "c")
    twice, once = tensors(convert.load(tmp_path / "b")), tensors(convert.load(tmp_path / "c"))
    for name, tensor in once.items():
        np.testing.assert_array_equal(twice[name], tensor, err_msg=name)


def test_the_model_card_says_what_was_done(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(capsys, "--model", model, "--expansion-ratio", "2", "--output", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    record = convert.load(tmp_path / "out").history[-1]
    for part in (
        f"Base model: {model}",
        "`ppm`",
        "| expansion ratio | 2.5 | 2 |",
        record["source"]["fingerprint"],
        f"python -m gluprune_jax.prune --model {model} --expansion-ratio 2 --output {tmp_path / 'out'}",
    ):
        assert part in card
    before = sum(tensor.size for tensor in hf_tensors(CONFIG).values())
    assert f"| parameters | {before:,} | {before - 3 * 3 * (120 - 96) * 48:,} |" in card


def test_dtype_casts_what_is_scored_and_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    done = report(capsys, "--model", model, "--width", "50", "--dtype", "bfloat16", "--output", out)
    assert done["plan"]["source"]["weights_dtype"] == "bfloat16"
    assert {array.dtype.name for array in tensors(convert.load(out)).values()} == {"bfloat16"}


@pytest.mark.parametrize("target", [("--width", "50", "--layers", "0,2"), ("--prune-percent", "40")])
def test_streamed_and_loaded_give_the_same_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, target: tuple[str, ...]
) -> None:
    model = write_folder(tmp_path / "model", CONFIG, hf_tensors(CONFIG, "bfloat16"), shards=3)
    monkeypatch.setattr("convert.huggingface.folder.MAX_SHARD_BYTES", 40_000)
    written = {}
    for flag in ("--stream", "--no-stream", None):
        opened = recorded_loads(monkeypatch)
        report(capsys, "--model", model, *target, *([flag] if flag else []), "--output", tmp_path / "out")
        assert opened == [flag != "--no-stream"]
        written[flag] = contents(tmp_path / "out")
        del written[flag]["README.md"]  # it quotes the command
        shutil.rmtree(tmp_path / "out")
    assert sum(name.endswith(".safetensors") for name in written[None]) > 1
    assert written["--stream"] == written["--no-stream"] == written[None]


def recorded_loads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Filled, from now on, with whether each model that is loaded stays in its files."""
    streamed: list[bool] = []
    load = convert.load

    def record(*args: Any, **options: Any) -> convert.Checkpoint:
        checkpoint = load(*args, **options)
        streamed.append(isinstance(checkpoint, StreamedCheckpoint))
        return checkpoint

    monkeypatch.setattr("convert.load", record)
    return streamed


def test_a_dry_run_streams_whatever_it_would_write(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--model", model, *WIDTH, "--stream", "--dry-run", "--output", tmp_path / "out", "--format", "orbax")
    report(capsys, *argv)
    assert not (tmp_path / "out").exists()


def test_the_library_gives_the_same_bits(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(capsys, "--model", model, "--expansion-ratio", "2.0", "--output", tmp_path / "a")
    checkpoint = convert.load(model)
    convert.save(checkpoint.pruned(make_plan(score(checkpoint.model), expansion_ratio="2.0")), tmp_path / "b")
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {name: a[name] for name in b} == b


@pytest.mark.torch
def test_memory_transformers_and_orbax_agree(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    checkpoint = convert.load(model)
    plan = make_plan(score(checkpoint.model), width=40, layers=[0, 2])
    in_memory = logits(checkpoint.pruned(plan).model, TOKENS)
    argv = ("--model", model, "--width", "40", "--layers", "0,2", "--output", out, "--format", "hf,orbax")
    report(capsys, *argv)
    theirs = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        through_transformers = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(through_transformers, in_memory, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(logits(convert.load(out / "orbax").model, TOKENS), in_memory)
    np.testing.assert_array_equal(logits(convert.load(out).model, TOKENS), in_memory)


@pytest.mark.real_model
@pytest.mark.optimised  # four runs of a real model
def test_the_demo_with_everything_measured(
    demo_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    out = tmp_path / "out"
    argv = ("--model", demo_folder, "--prune-percent", "40", "--output", out, "--random-baseline", "--seed", "3")
    argv += ("--mesh", "data=1")  # eight simulated devices take five times as long
    argv += ("--eval-data", text, "--sequence-length", "64", "--eval-tokens", "128")
    done = report(capsys, *argv, "--sample", "What is the capital of France?", "--sample-tokens", "12")
    values = done["evaluation"]["perplexity"]
    assert list(values) == ["dense", "random neurons (seed 3)", "pruned"]
    assert values["dense"] < values["pruned"]
    assert "126 tokens" in done["evaluation"]["definition"]  # two windows, each but its first token
    assert "Paris" in done["sample"]["answers"]["dense"]
    assert "## Perplexity" in (out / "README.md").read_text()
    # What transformers would tokenise is what was there before.
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (Path(demo_folder) / name).read_bytes()


def test_weights_alone_need_neither_transformers_nor_orbax(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from gluprune_jax.prune import main; status = main(sys.argv[1:]);"
        "heavy = {'transformers', 'torch', 'orbax', 'huggingface_hub'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    argv = ["--model", str(model), "--width", "50", "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------ refusals


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        (model / "config.json").write_text(json.dumps(CONFIG | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        tensors = hf_tensors(CONFIG)
        change(tensors)
        write_folder(model, CONFIG, tensors)

    return edit


def poison(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan


def misshape(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.2.mlp.down_proj.weight"] = np.zeros((48, 99), np.float32)


def rename(tensors: dict[str, np.ndarray]) -> None:
    for i in (0, 1):
        tensors[f"model.layers.{i}.mlp.gate.weight"] = tensors.pop(f"model.layers.{i}.mlp.gate_proj.weight")


def as_float64(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)


def truncate(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def corrupt(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def nothing(model: Path) -> None:
    pass


WIDTH = ("--width", "50")


@pytest.mark.parametrize(
    ("damage", "argv", "status", "sentence"),
    [
        (truncate, WIDTH, 1, ("model.safetensors", "truncated")),
        (corrupt, WIDTH, 1, ("model.safetensors", "not safetensors")),
        (
            edit_tensors(rename),
            WIDTH,
            1,
            (
                "missing model.layers.0.mlp.gate_proj.weight, model.layers.1.mlp.gate_proj.weight",
                "unexpected model.layers.0.mlp.gate.weight, model.layers.1.mlp.gate.weight",
            ),
        ),
        (edit_tensors(misshape), WIDTH, 1, ("model.layers.2.mlp.down_proj.weight", "[48, 99]", "[48, 120]")),
        (edit_tensors(poison), WIDTH, 1, ("model.layers.1.mlp.up_proj.weight", "NaN or Inf")),
        (edit_tensors(as_float64), WIDTH, 2, ("model.norm.weight (F64)", "F32")),
        (edit_config(model_type="phimoe"), WIDTH, 2, ("'phimoe'", "mixtures of experts are not supported yet")),
        (edit_config(model_type="gemma4"), WIDTH, 2, ("'gemma4'", "'llama'")),
        (edit_config(rope_scaling={"rope_type": "dynamic", "factor": 4.0}), WIDTH, 2, ("'dynamic'", "'llama3'")),
        (edit_config(sliding_window=64), WIDTH, 2, ("sliding_window = 64",)),
        (edit_config(is_causal=False), WIDTH, 2, ("is_causal = False", "supported: True")),
        (nothing, ("--expansion-ratio", "3"), 2, ("144", "grow", "120")),
        (nothing, ("--expansion-ratio", "2.5"), 2, ("not shrink",)),
        (nothing, ("--expansion-ratio", "wide"), 2, ("--expansion-ratio is wide",)),
        (nothing, ("--width", "0"), 2, ("width of 0",)),
        (nothing, ("--width", "-3"), 2, ("width of -3",)),
        (nothing, ("--prune-percent", "100"), 2, ("--prune-percent is 100",)),
        (nothing, ("--prune-percent", "nan"), 2, ("--prune-percent is nan",)),
        (nothing, (*WIDTH, "--multiple-of", "64"), 2, ("multiples of 64",)),
        (nothing, (*WIDTH, "--layers", "0-3"), 2, ("layer 3", "0 to 2")),
        (nothing, (*WIDTH, "--layers", "one"), 2, ("'one'",)),
        (nothing, (*WIDTH, "--format", "gguff"), 2, ("--format is 'gguff'", "hf, orbax, gguf")),
        (nothing, (*WIDTH, "--criterion", "magic"), 2, ("magic", "ppm")),
        (nothing, (*WIDTH, "--random-baseline"), 2, ("--evaluate",)),
        (nothing, (*WIDTH, "--sample", "Hello"), 2, ("no tokenizer files",)),
        (nothing, (*WIDTH, "--dry-run", "--sample", "Hello"), 2, ("--dry-run measures nothing",)),
        (nothing, (*WIDTH, "--stream", "--sample", "Hello"), 2, ("--stream", "--evaluate and --sample cannot run")),
        (nothing, (*WIDTH, "--stream", "--eval-data", "a.txt"), 2, ("--stream", "--evaluate and --sample cannot run")),
        (nothing, (*WIDTH, "--stream", "--format", "hf,orbax"), 2, ("--stream writes --format hf",)),
        (nothing, (*WIDTH, "--eval-data", "no-such-text"), 2, ("cannot read the text no-such-text: No such file",)),
        (nothing, (*WIDTH, "--eval-data", "x", "--sequence-length", "1"), 2, ("--sequence-length is 1", "at least 2")),
        (nothing, ("--plan", "no-such-plan"), 2, ("cannot read the plan no-such-plan: No such file",)),
        (nothing, ("--prune-percent", "0.5"), 2, ("width of 120 would not shrink", "fewer neurons")),
        (nothing, ("--width", "125", "--multiple-of", "120"), 2, ("width of 120 would not shrink",)),
        (nothing, (), 2, ("--expansion-ratio",)),
        (nothing, ("--plan", "p.json", "--for", "mlx"), 2, ("--plan decides", "--for")),
        (nothing, (*WIDTH, "--for", "mlx", "--multiple-of", "8"), 2, ("--for mlx rounds", "--multiple-of is 8")),
        (nothing, (*WIDTH, "--for", "llama.cpp"), 2, ("no multiple of 256 is a width below",)),
        (nothing, (*WIDTH, "--for", "tensorrt"), 2, ("--for", "llama.cpp", "mlx")),
        (nothing, (*WIDTH, "--pad-to", "0"), 2, ("--pad-to is 0", "between 1 and 4096")),
        (nothing, (*WIDTH, "--pad-to", "8", "--format", "orbax"), 2, ("--pad-to 8 has no effect",)),
        (nothing, (*WIDTH, "--target-type", "F16"), 2, ("--target-type says what files --target-bytes is of",)),
        (nothing, ("--target-bytes", "1MB", "--target-type", "Q2_K"), 2, ("--target-type is Q2_K", "Q4_K_M")),
        (nothing, ("--target-bytes", "many"), 2, ("--target-bytes is 'many'",)),
        (nothing, ("--target-parameters", "many"), 2, ("--target-parameters is 'many'", "1.0B")),
        (nothing, ("--target-parameters", "1k"), 2, ("the smallest possible is", "with --width 1")),
        (nothing, ("--target-bytes", "1kB", "--allocation", "global"), 2, ("the smallest possible is",)),
        (nothing, (*WIDTH, "--prune-percent", "10"), 2, ("not allowed with",)),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    argv: tuple[str, ...],
    status: int,
    sentence: tuple[str, ...],
) -> None:
    damage(model)
    before = contents(tmp_path)
    got, out, err = run(capsys, "--model", model, *argv, "--output", tmp_path / "out")
    assert (got, out) == (status, "")
    (line,) = [line for line in err.splitlines() if not line.startswith("note:")]
    assert "error: " in line
    for part in sentence:
        assert part in line
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["model"]


def test_a_model_that_is_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "--model", tmp_path / "nowhere", *WIDTH, "--dry-run")
    assert status == 2
    assert "there is no model" in err


def test_an_unreadable_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    status, _, err = run(capsys, "--model", tmp_path / "model.gguf", *WIDTH, "--output", tmp_path / "out")
    assert (status, len(err.splitlines()), os.listdir(tmp_path)) == (1, 1, ["model.gguf"])
    assert "model.gguf: this is not a readable GGUF file" in err


def test_a_plan_for_other_weights(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    report(capsys, "--model", model, *WIDTH, "--plan-out", plan)
    same_shape = write_folder(tmp_path / "other", CONFIG, hf_tensors(CONFIG, seed=1))
    status, _, err = run(capsys, "--model", same_shape, "--plan", plan, "--output", tmp_path / "out")
    assert (status, "made for other weights" in err) == (2, True)
    narrower = write_folder(tmp_path / "narrower", CONFIG | {"intermediate_size": 90})
    status, _, err = run(capsys, "--model", narrower, "--plan", plan, "--output", tmp_path / "out")
    assert (status, "3 layers of 120 neurons" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_what_exists_is_kept_unless_told(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    report(capsys, "--model", model, *WIDTH, "--output", out, "--plan-out", plan)
    before = contents(out)
    status, _, err = run(capsys, "--model", model, "--width", "20", "--output", out)
    assert (status, "--overwrite" in err) == (2, True)
    status, _, err = run(capsys, "--model", model, "--width", "20", "--plan-out", plan)
    assert (status, "--overwrite" in err) == (2, True)
    assert contents(out) == before
    report(capsys, "--model", model, "--width", "20", "--output", out, "--overwrite")
    assert convert.load(out).config.intermediate_sizes == (20,) * 3
    status, _, err = run(capsys, "--model", model, "--width", "20", "--output", model, "--overwrite")
    assert (status, "the model itself" in err) == (2, True)


def test_plan_out_destroys_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(tmp_path)
    weights = model / "model.safetensors"
    status, _, err = run(capsys, "--model", model, *WIDTH, "--plan-out", weights, "--overwrite")
    assert (status, "is no plan and is not replaced" in err) == (2, True)
    for plan, output in (("out", "out"), ("out/plan.json", "out"), ("plan", "plan/out")):
        argv = ("--model", model, *WIDTH, "--plan-out", tmp_path / plan, "--output", tmp_path / output)
        status, _, err = run(capsys, *argv)
        assert (status, "collide" in err) == (2, True)
    assert contents(tmp_path) == before


def test_stream_refuses_what_is_loaded_whole(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(capsys, "--model", model, "--width", "80", "--output", tmp_path / "a", "--format", "orbax")
    report(capsys, "--model", model, "--width", "80", "--output", tmp_path / "both", "--format", "hf,orbax")
    (tmp_path / "m.gguf").touch()
    refused = {
        "demo": "a GGUF file",
        tmp_path / "m.gguf": "a GGUF file",
        tmp_path / "a": "an Orbax checkpoint",
        tmp_path / "a" / "orbax": "an Orbax checkpoint",
        tmp_path / "both" / "orbax": "an Orbax checkpoint",
    }
    for name, kind in refused.items():
        status, _, err = run(capsys, "--model", name, *WIDTH, "--stream", "--output", tmp_path / "out")
        assert (status, f"{name} is {kind}, which is loaded whole" in err) == (2, True), err
    assert not (tmp_path / "out").exists()
    # The safetensors of a folder that has both are what is read.
    report(capsys, "--model", tmp_path / "both", *WIDTH, "--stream", "--output", tmp_path / "out")


def test_a_model_name_is_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_folder(tmp_path / "m[bold][/x]", CONFIG)
    status, out, err = run(capsys, "--model", model, *WIDTH, "--dry-run")
    assert status == 0, err
    assert "m[bold][/x]" in "".join(out.split())


def test_a_plan_is_not_saved_when_the_output_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = hf_tensors(CONFIG)
    tensors["model.norm.weight"][0] = np.nan
    model = write_folder(tmp_path / "model", CONFIG, tensors)
    argv = ("--model", model, *WIDTH, "--plan-out", tmp_path / "plan.json", "--output", tmp_path / "out")
    status, _, err = run(capsys, *argv)
    assert (status, "model.norm.weight has NaN or Inf" in err) == (1, True)
    assert os.listdir(tmp_path) == ["model"]


def test_what_nobody_foresaw_is_one_line_too(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("gluprune_jax.prune.report.changes", fail)
    status, out, err = run(capsys, "--model", model, *WIDTH, "--dry-run", "--json")
    assert (status, out) == (1, "")
    assert "unexpected ZeroDivisionError: first line (--debug shows where" in err.splitlines()[-1]


def test_only_a_hub_id_becomes_a_base_model(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent.parent)
    local = f"{model.parent.name}/{model.name}"
    report(capsys, "--model", local, *WIDTH, "--output", model.parent / "out")
    assert "base_model" not in (model.parent / "out" / "README.md").read_text()
    monkeypatch.setattr("convert.sources.hub_snapshot", lambda repo_id, revision: model)
    report(capsys, "--model", "someone/something", *WIDTH, "--output", model.parent / "hub")
    assert "base_model: someone/something" in (model.parent / "hub" / "README.md").read_text()


def test_debug_shows_the_traceback(model: Path) -> None:
    with pytest.raises(RequestError):
        main(["--model", str(model), "--width", "0", "--dry-run", "--debug"])


KILLED = """
import sys, time
import convert.huggingface.one_pass as one_pass
from gluprune_jax.prune import main

write_assets = one_pass.write_assets
def slow(*args):
    print("weights written", flush=True)
    time.sleep(600)
one_pass.write_assets = slow
main(sys.argv[1:])
"""


@pytest.mark.parametrize("old", [False, True])
def test_kill_9_in_the_middle_of_writing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: bool
) -> None:
    out = tmp_path / "out"
    if old:
        report(capsys, "--model", model, "--width", "20", "--output", out)
    before = contents(out) if old else None
    argv = ["--model", str(model), *WIDTH, "--output", str(out), "--overwrite"]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *argv], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "weights written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (contents(out) if out.exists() else None) == before
    # The next run clears away what the killed one left.
    assert len(os.listdir(tmp_path)) == 2 + old
    report(capsys, *argv)
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]
    assert convert.load(out).config.intermediate_sizes == (50,) * 3


def test_interrupted(model: Path, tmp_path: Path) -> None:
    code = KILLED.replace("time.sleep(600)", "raise KeyboardInterrupt").replace("main(", "sys.exit(main(") + ")"
    argv = ["--model", str(model), *WIDTH, "--output", str(tmp_path / "out")]
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert (done.returncode, "interrupted" in done.stderr, os.listdir(tmp_path)) == (130, True, ["model"])
    assert time.monotonic() - start < 300


def test_the_models_of_the_fixture_are_as_ours(model: Path) -> None:
    """Guards the tests above: the tiny model runs, and pruning it changes its logits."""
    checkpoint = convert.load(model)
    plan = make_plan(score(checkpoint.model), width=50)
    masked = logits(checkpoint.model, TOKENS, plan.masks(checkpoint.config))
    sliced = logits(checkpoint.pruned(plan).model, TOKENS)
    np.testing.assert_allclose(masked, sliced, atol=1e-5)
    assert np.abs(sliced - logits(checkpoint.model, TOKENS)).max() > 0.1
    assert dataclasses.is_dataclass(plan)
