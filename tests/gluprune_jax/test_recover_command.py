"""`python -m gluprune_jax.recover`, from its arguments to the files it leaves and the sentence it refuses with."""

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from inspecting import tensors
from tiny_models import hf_config, write_folder

import convert
from convert.tokenizer import encode_conversation, encode_text, load_tokenizer
from evals.perplexity import perplexity
from gluprune_jax import make_plan, score
from gluprune_jax.recover import main, parser

Capture = pytest.CaptureFixture[str]
CONFIG = hf_config(
    vocab_size=VOCABULARY,
    eos_token_id=VOCABULARY - 1,
    intermediate_size=83,
    num_hidden_layers=2,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, one that was pruned in one layer, and data."""
    folder = tmp_path_factory.mktemp("recover")
    write_tokenizer(write_folder(folder / "dense", CONFIG))
    dense = convert.load(folder / "dense")
    convert.save(dense.pruned(make_plan(score(dense.model), width=41, layers=[1])), folder / "pruned")
    (folder / "text.txt").write_text("".join(f"The square of {i} is {i * i}. " for i in range(60)))
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    records: list[dict[str, Any]] = [{"text": "a line of text"}, {"messages": messages}]
    (folder / "lines.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def argv(folder: Path, tmp_path: Path) -> list[object]:
    models = ("--model", folder / "pruned", "--teacher", folder / "dense")
    steps = ("--steps", 6, "--sequence-length", 32, "--batch-size", 4, "--learning-rate", "1e-3", "--mesh", "data=1")
    return [*models, "--train-data", folder / "text.txt", folder / "lines.jsonl", *steps, "--output", tmp_path / "out"]


run = functools.partial(commands.run, main)


def log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_trained_model_is_a_folder_that_loads(
    folder: Path, argv: list[object], tmp_path: Path, capsys: Capture
) -> None:
    options = ("--train", "lora", "--lora-rank", 4, "--format", "hf,orbax", "--ce-weight", "0.5", "--json")
    status, out, err = run(capsys, *argv, *options)
    assert status == 0, err
    report = json.loads(out)
    assert sorted(os.listdir(tmp_path)) == ["out", "out.recovery.jsonl"]  # no checkpoints are left
    trained = convert.load(tmp_path / "out")
    assert trained.config.intermediate_sizes == (83, 41)
    assert {name.rpartition(".")[2] for name in tensors(tmp_path / "out")} == {"weight"}  # no adapters
    before, after = tensors(folder / "pruned"), tensors(tmp_path / "out")
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {
        name for name in before if "proj" in name
    }
    for name, array in tensors(tmp_path / "out" / "orbax").items():
        np.testing.assert_array_equal(array, after[name])
    lines = log(tmp_path / "out.recovery.jsonl")
    assert (report["first"], report["last"]) == (lines[0], lines[-1])
    assert [line["step"] for line in lines] == list(range(1, 7))
    keys = {"step", "loss", "kl", "ce", "grad_norm", "learning_rate", "tokens", "seconds"}
    assert all(line.keys() == keys for line in lines)
    assert lines[0]["loss"] == pytest.approx(lines[0]["kl"] + 0.5 * lines[0]["ce"], rel=1e-6)
    record = trained.history[-1]["recovery"]
    assert (record["steps"], record["tokens"]) == (6, 6 * 4 * 32)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `--lora-rank` | 4 |" in card
    assert f"distilled from {folder / 'dense'}" in card


def test_plain_language_modelling_on_a_mesh(folder: Path, argv: list[object], tmp_path: Path, capsys: Capture) -> None:
    del argv[2:4]
    options = ("--train", "mlp", "--compute-dtype", "bfloat16", "--mesh", "data=2,model=4")
    status, out, err = run(capsys, *argv, *options)
    assert status == 0, err
    assert "wrote hf to" in out
    lines = log(tmp_path / "out.recovery.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["loss"] == line["ce"] for line in lines)
    before, after = tensors(folder / "pruned"), tensors(tmp_path / "out")
    for name in before:
        assert before[name].shape == after[name].shape  # the padding of the mesh is gone
        assert np.array_equal(before[name], after[name]) == ("mlp" not in name)


def test_conversations_are_rendered_whole(folder: Path) -> None:
    tokenizer = load_tokenizer(convert.load(folder / "dense"))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.decode(encode_conversation(tokenizer, messages)) == "<|user|>a<|assistant|>b"


KILLED = """
import os, signal, sys
import gluprune_jax.training.recovery as recovery
advance = recovery.Recovery.advance
def dying(self):
    if self.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return advance(self)
recovery.Recovery.advance = dying
from gluprune_jax.recover import main
sys.exit(main(sys.argv[1:]))
"""


def test_killed_and_given_again(folder: Path, argv: list[object], tmp_path: Path, capsys: Capture) -> None:
    """The losses and the bits of a run that was never interrupted, in processes of their own."""
    once = [*argv[:-1], tmp_path / "once", "--checkpoint-every", 2]
    again = [*argv, "--checkpoint-every", 2]
    start = [sys.executable, "-m", "gluprune_jax.recover"]
    assert subprocess.run([*start, *map(str, once)], check=False, capture_output=True).returncode == 0
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, again)], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoints = tmp_path / "out.recovery"
    assert sorted(os.listdir(checkpoints)) == ["step_00000002", "step_00000004"]
    assert not (tmp_path / "out").exists()
    assert [line["step"] for line in log(tmp_path / "out.recovery.jsonl")] == [1, 2, 3, 4, 5]
    # With anything else, it is not gone on with.
    for option, value, name in (
        ("--learning-rate", "2e-3", "--learning-rate 0.001, and this one has 0.002"),
        ("--seed", "1", "--seed 0, and this one has 1"),
        ("--kl-weight", "2", "--kl-weight 1.0, and this one has 2.0"),
        ("--train", "mlp", "--train 'all', and this one has 'mlp'"),
        ("--train-data", str(folder / "text.txt"), "--train-data 'with tokens"),
        ("--model", str(folder / "dense"), "--model 'with weights"),
    ):
        status, _, err = run(capsys, *again, option, value)
        assert (status, name in err) == (2, True), err
    finished = subprocess.run([*start, *map(str, again), "--json"], check=False, capture_output=True)
    assert finished.returncode == 0, finished.stderr
    summary = json.loads(finished.stdout)
    assert summary["resumed_from"] == 4
    assert (summary["steps"], summary["first"]["step"], summary["last"]["step"]) == (6, 1, 6), "of the whole run"
    assert (summary["tokens"], summary["seconds"]) == (summary["last"]["tokens"], summary["last"]["seconds"])
    assert not checkpoints.exists()
    found = [log(tmp_path / f"{name}.recovery.jsonl") for name in ("once", "out")]
    for one, other in zip(*found, strict=True):
        one.pop("seconds")
        other.pop("seconds")
        assert one == other
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "out")]
    assert weights[0] == weights[1]


INTERRUPTED = """
import os, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell would ignore it
from orbax.checkpoint import v1 as ocp
save = ocp.save_checkpointables
def interrupted(*args, **options):
    threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
    return save(*args, **options)
ocp.save_checkpointables = interrupted
from gluprune_jax.recover import main
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupted_checkpoint_is_finished_and_resumed_from(
    argv: list[object], tmp_path: Path, capsys: Capture
) -> None:
    argv = [*argv, "--checkpoint-every", 2]
    stopped = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *map(str, argv)], check=False, capture_output=True, text=True
    )
    assert stopped.returncode == 130, stopped.stderr
    checkpoint = tmp_path / "out.recovery" / "step_00000002"
    notes, told = stopped.stderr.splitlines()[:-3], stopped.stderr.splitlines()[-3:]
    assert all(note.startswith("note: --train-data ") for note in notes)
    assert told == [
        f"the last checkpoint is {checkpoint}; to resume from it:",
        f"  python -m gluprune_jax.recover {shlex.join(map(str, argv))}",
        "gluprune: interrupted",
    ]
    assert os.listdir(tmp_path / "out.recovery") == ["step_00000002"]
    assert (checkpoint / "files.json").is_file()
    report = commands.report(main, capsys, *argv, "--resume")
    assert report["resumed_from"] == 2
    lines = log(tmp_path / "out.recovery.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert (report["first"], report["last"]) == (lines[0], lines[-1])  # of the whole run


def test_there_must_be_something_to_resume(argv: list[object], tmp_path: Path, capsys: Capture) -> None:
    status, _, err = run(capsys, *argv, "--resume")
    assert status == 2
    assert f"there is nothing to resume: no checkpoint is in {tmp_path / 'out.recovery'}; leave out --resume" in err


def test_settings_of_older_checkpoints_are_understood(argv: list[object], tmp_path: Path, capsys: Capture) -> None:
    """Training text and window had other names in the checkpoints of before."""
    argv = [*argv, "--checkpoint-every", 3]
    assert run(capsys, *argv, "--keep-checkpoints")[0] == 0
    path = tmp_path / "out.recovery" / "step_00000006"
    renamed = {"--train-data": "--data", "--sequence-length": "--window"}
    for file in (path / "_CHECKPOINT_METADATA", *path.glob("**/_METADATA")):
        text = file.read_text()
        for new, old in renamed.items():
            text = text.replace(f'"{new}"', f'"{old}"')
        file.write_text(text)
    (path / "files.json").unlink()
    assert '"--window"' in (path / "_CHECKPOINT_METADATA").read_text()
    assert commands.report(main, capsys, *argv, "--overwrite", "--resume")["resumed_from"] == 6


def test_perplexities_say_whether_it_helped(folder: Path, argv: list[object], tmp_path: Path, capsys: Capture) -> None:
    text = ("--eval-data", folder / "text.txt", "--eval-tokens", 256)
    report = commands.report(main, capsys, *argv, *text)
    values = report["evaluation"]["perplexity"]
    assert list(values) == ["teacher", "before", "after"]
    checkpoint = convert.load(tmp_path / "out")
    tokens = encode_text(load_tokenizer(checkpoint), (folder / "text.txt").read_text())[:256]
    for stage, model in (("teacher", folder / "dense"), ("before", folder / "pruned"), ("after", tmp_path / "out")):
        expected = perplexity(convert.load(model).model, tokens, sequence_length=32).value
        assert values[stage] == pytest.approx(expected, rel=1e-4)


def test_a_damaged_checkpoint(argv: list[object], tmp_path: Path, capsys: Capture) -> None:
    argv = [*argv, "--checkpoint-every", 3]
    assert run(capsys, *argv, "--keep-checkpoints")[0] == 0
    checkpoint = tmp_path / "out.recovery" / "step_00000006"
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.name not in ("_CHECKPOINT_METADATA", "files.json"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    status, _, err = run(capsys, *argv, "--overwrite")
    assert status == 1
    assert f"the checkpoint {checkpoint} is damaged: " in err
    assert "copy or write it again, or remove it to go on from the one before" in err
    assert [line[:5] for line in err.splitlines()] == ["note:", "note:", "glupr"]  # a note for each file of data


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_refusals(folder: Path, argv: list[object], tmp_path: Path, capsys: Capture) -> None:
    config = hf_config(**{**CONFIG, "vocab_size": VOCABULARY + 1})
    write_tokenizer(write_folder(tmp_path / "other", config), VOCABULARY + 1)
    write_tokenizer(write_folder(tmp_path / "renamed", CONFIG))
    tokenizer = tmp_path / "renamed" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<extra0>", "<other0>"))
    write_folder(tmp_path / "silent", CONFIG)
    small = hf_config(**{**CONFIG, "vocab_size": 200})
    write_tokenizer(write_folder(tmp_path / "small", small))
    before = sorted(os.listdir(tmp_path))
    plain = [*argv[:2], *argv[4:]]
    data = tmp_path.parent / f"{tmp_path.name}-data"
    data.mkdir()
    cases: list[tuple[list[object], str]] = [
        ([*argv, "--steps", 0], "--steps is 0; it must be at least 1"),
        ([*argv, "--tokens", 9], "--tokens: not allowed with argument --steps"),
        (
            [*argv, "--sequence-length", 65],
            "--sequence-length is 65; it must lie between 2 and the 64 tokens of the models",
        ),
        ([*argv, "--sequence-length", 1], "--sequence-length is 1; it must lie between 2"),
        ([*argv, "--batch-size", 0], "--batch-size is 0; it must be at least 1"),
        (
            [*argv, "--batch-size", 3, "--mesh", "data=2"],
            "--batch-size is 3, which does not divide over the 2 replicas",
        ),
        ([*argv, "--mesh", "data=9"], "the mesh data=9,model=1 has 9 devices, and there are 8"),
        ([*argv, "--train", "lora", "--lora-rank", 17], "--lora-rank is 17; it must lie between 1 and 16"),
        ([*argv, "--train", "lora", "--lora-rank", 0], "--lora-rank is 0; it must be at least 1"),
        (
            [*argv, "--train", "mlp", "--lora-rank", 4],
            "--lora-rank and --lora-alpha are of adapters, and --train is mlp",
        ),
        ([*argv, "--temperature", 2, "--kl-weight", 0, "--ce-weight", 1], "--temperature is of the distillation"),
        ([*argv, "--lora-alpha", "nan"], "--lora-alpha is nan; it must be a finite number above 0"),
        ([*argv, "--checkpoint-every", -1], "--checkpoint-every is -1; it must be at least 0"),
        (
            [*argv, "--teacher", tmp_path / "other"],
            "the teacher has a vocabulary of 261 tokens and the model one of 260",
        ),
        ([*argv, "--teacher", tmp_path / "renamed"], "is another one: the token '<extra0>' is None there and 256 in"),
        ([*plain, "--kl-weight", 1], "--kl-weight compares with a teacher; give --teacher MODEL, or leave it out"),
        ([*plain, "--model", tmp_path / "silent"], "has no tokenizer files, which text needs"),
        ([*plain, "--model", tmp_path / "small"], "lies outside the model's vocabulary of 200: its embedding"),
        ([*argv, "--train-data", write(data, "empty.txt", "")], "empty.txt is empty; give text"),
        ([*argv, "--train-data", write(data, "empty.jsonl", "\n")], "empty.jsonl is empty; give text"),
        ([*argv, "--train-data", write(data, "short.txt", "abc")], "the text has 3 tokens, fewer than the 32"),
        (
            [*argv, "--train-data", write(data, "bad.jsonl", '{"text": "a"}\n{}')],
            "bad.jsonl, line 2, is {}; it must hold",
        ),
        ([*argv, "--train-data", data / "none.txt"], "none.txt: No such file or directory"),
        ([*argv, "--output", folder], f"{folder} exists; choose another path or add --overwrite"),
        (
            [*argv, "--output", folder / "pruned", "--overwrite"],
            "is or holds the model itself; write to another place",
        ),
        ([*argv, "--log", tmp_path / "out" / "log"], "lies in --output"),
        ([*argv, "--log", folder / "text.txt"], "text.txt exists; choose another path or add --overwrite"),
        ([*argv, "--checkpoints", folder / "text.txt"], "text.txt is a file; choose a folder"),
        ([*argv, "--device-memory", "1MB"], "training needs"),
        ([*argv, "--format", "gguff"], "--format is 'gguff'; choose from hf, orbax, gguf"),
        ([*argv, "--format", "gguf"], "has no form in a GGUF file"),
    ]
    for case, message in cases:
        status, _, err = run(capsys, *case)
        assert (status, message in err) == (2, True), (status, err, message)
        assert [line for line in err.splitlines() if not line.startswith("note: ")][1:] == []
        assert sorted(os.listdir(tmp_path)) == before, case


def test_the_examples_of_the_help_are_understood() -> None:
    text = parser().format_help().replace("\\\n", " ")
    examples = re.findall(r"^  gluprune recover (.*)$", text, re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        parser().parse_args(shlex.split(example))
