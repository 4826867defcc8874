"""Calibration text that the model writes itself: reproducible, kept, mixed with others, refused where it is none."""

import functools
import json
from pathlib import Path

import commands
import numpy as np
import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from calibration_text import TEXT
from numpy.typing import NDArray
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert import own_text
from convert.calibration_text import calibration_windows
from convert.tokenizer import encode_text, load_tokenizer
from gluprune_jax import prune_model
from gluprune_jax.data.documents import read_calibration, read_documents
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.prune import main
from gluprune_jax.pruning.calibration import collect

CONFIG = hf_config(vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1, max_position_embeddings=128)
W = 64
NOTE = "note: no --calibration-data: the model writes its own text (self)"

run, report = functools.partial(commands.run, main), functools.partial(commands.report, main)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLUPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> convert.Checkpoint:
    folder = write_folder(tmp_path_factory.mktemp("own") / "model", CONFIG, hf_tensors(CONFIG))
    write_tokenizer(folder)
    return convert.load(folder)


def windows(checkpoint: convert.Checkpoint, *names: str, tokens: int = 6 * W) -> NDArray[np.int32]:
    return calibration_windows(checkpoint, read_calibration(names, "`x`"), tokens=tokens, sequence_length=W)


def test_half_is_text_and_half_is_conversations(checkpoint: convert.Checkpoint) -> None:
    found, tokenizer = windows(checkpoint, "self"), load_tokenizer(checkpoint)
    assert found.shape == (6, W)
    assert found.dtype == np.int32
    assert found.min() >= 0
    user = encode_text(tokenizer, "<|user|>")
    begins = [window[: len(user)].tolist() == user for window in found]
    assert begins == [False] * 3 + [True] * 3
    assert len({window[0] for window in found[:3]}) == 3  # each from another token


def test_without_a_chat_template_all_is_text(checkpoint: convert.Checkpoint) -> None:
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = None
    found = own_text.own_windows(checkpoint, tokenizer, 4, sequence_length=W)
    assert found.shape == (4, W)
    assert len({window[0] for window in found}) == 4


def test_the_seed_alone_changes_it(checkpoint: convert.Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    one, again, other = (windows(checkpoint, name) for name in ("self", "self@0", "self@7"))
    assert (one == again).all()
    assert (one != other).mean() > 0.5
    monkeypatch.setattr(own_text, "_SLOTS", 2)
    monkeypatch.setenv("GLUPRUNE_CACHE", "/dev/null/none")  # written anew, and nowhere to keep it
    assert (windows(checkpoint, "self") == one).all()


def test_it_is_written_once(checkpoint: convert.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = windows(checkpoint, "self")
    (file,) = (tmp_path / "cache").rglob("*.npz")
    with monkeypatch.context() as patch:
        patch.setattr(own_text, "generate", lambda *_, **__: pytest.fail("it is written again"))
        assert (windows(checkpoint, "self") == first).all()
    file.write_bytes(file.read_bytes()[:-40])  # a damaged file is no text
    assert (windows(checkpoint, "self") == first).all()


def test_a_mixture_has_the_windows_of_each(checkpoint: convert.Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    name = str(tmp_path / "text.txt")
    mixed = windows(checkpoint, f"{name}:0.75", "self:0.25", tokens=8 * W)
    assert (mixed[:6] == windows(checkpoint, name, tokens=6 * W)).all()
    assert (mixed[6:] == windows(checkpoint, "self", tokens=2 * W)).all()


def test_one_text_is_taken_as_before(checkpoint: convert.Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "text:0.5").write_text(TEXT)  # a file that is called so is a file
    name = str(tmp_path / "text:0.5")
    assert read_calibration([name], "`x`") == read_documents([name], "`x`")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["self", "a.txt"], "give weights, such as self:0.5 a.txt:0.5"),
        (["self:0.5", "a.txt"], "a.txt has no weight"),
        (["self:0.5", "a.txt:0.4"], r"0.5 \+ 0.4 = 0.9; they must be above 0 and add up to 1"),
        (["self:1", "a.txt:0"], "above 0"),
        (["self:0.5", "self:0.5"], "twice"),
        (["self@x"], "cannot read the text self@x"),
    ],
)
def test_weights_that_are_none(names: list[str], message: str) -> None:
    with pytest.raises((RequestError, OperationError), match=message):
        read_calibration(names, "`calibration`")


def test_a_share_without_a_window_or_with_too_little_text(checkpoint: convert.Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:200])
    name = str(tmp_path / "text.txt")
    with pytest.raises(RequestError, match="less than a window of 64"):
        windows(checkpoint, f"{name}:0.99", "self:0.01", tokens=4 * W)
    with pytest.raises(RequestError, match="its weight asks for 9"):
        windows(checkpoint, f"{name}:0.9", "self:0.1", tokens=10 * W)


def test_a_model_that_writes_one_token_is_refused(tmp_path: Path) -> None:
    tensors = hf_tensors(CONFIG)
    # What is left of every hidden state is its sign pattern of ones; only <eos> answers to it.
    for name in tensors:
        if "layers" in name:
            tensors[name][:] = 0
    tensors["model.embed_tokens.weight"][:] = 1
    tensors["model.norm.weight"][:] = 1
    tensors["lm_head.weight"][:] = 0
    tensors["lm_head.weight"][VOCABULARY - 1] = 1
    write_tokenizer(folder := write_folder(tmp_path / "model", CONFIG, tensors))
    with pytest.raises(OperationError, match=r"4 of 4 texts .* degenerate, with '<eos>' .* give other text"):
        windows(convert.load(folder), "self", tokens=4 * W)


def test_windows_as_long_as_the_context(tmp_path: Path) -> None:
    config = CONFIG | {"max_position_embeddings": W}
    write_tokenizer(folder := write_folder(tmp_path / "model", config, hf_tensors(config)))
    found = windows(convert.load(folder), "self")
    assert found.shape == (6, W)
    assert (found[:, :40] >= 0).all()
    assert ((found >= 0)[:, 1:] <= (found >= 0)[:, :-1]).all()  # padding only behind


def test_a_window_without_room_and_a_template_beyond_the_vocabulary(checkpoint: convert.Checkpoint) -> None:
    with pytest.raises(RequestError, match="no room for a conversation"):
        calibration_windows(checkpoint, read_calibration(["self"], "`x`"), tokens=64, sequence_length=8)
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.add_tokens(["<|user|>"], special_tokens=True)
    with pytest.raises(RequestError, match=r"the chat template of .*lies outside the model's vocabulary"):
        own_text.own_windows(checkpoint, tokenizer, 2, sequence_length=W)


def test_the_record_says_how_it_was_written(checkpoint: convert.Checkpoint) -> None:
    prune = functools.partial(prune_model, checkpoint, "hybrid", prune_percent=40, calibration_tokens=4 * W)
    one, again = (prune(calibration=["self@3"], sequence_length=W) for _ in range(2))
    assert json.dumps(one.history) == json.dumps(again.history)
    texts = one.history[-1]["calibration"]
    assert texts["own_text"] == {"seed": 3, "temperature": 1.0}
    assert texts["digest"].startswith("sha256:")
    assert texts["texts"] == ["self@3"]
    found = collect(checkpoint.model, windows(checkpoint, "self@3", tokens=4 * W), names=["self@3"])
    assert found.texts == texts


# ------------------------------------------------------------------------------------------------------- the default


@pytest.fixture
def argv(checkpoint: convert.Checkpoint) -> list[object]:
    return ["--model", checkpoint.source, "--mesh", "model=1", "--calibration-tokens", 6 * W, "--sequence-length", W]


@pytest.mark.parametrize(
    "options",
    [
        ("--width", 40, "--criterion", "hybrid"),
        ("--width", 40, "--compensate", "least-squares"),
        ("--width", 40, "--allocation", "measured"),
        ("--drop-least", 1),
    ],
)
def test_it_is_the_default_where_text_is_needed(
    argv: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...]
) -> None:
    status, _, err = run(capsys, *argv, *options, "--output", tmp_path / "default")
    assert (status, err.count(NOTE)) == (0, 1), err
    status, _, err = run(capsys, *argv, *options, "--output", tmp_path / "said", "--calibration-data", "self")
    assert (status, err.count(NOTE)) == (0, 0), err
    plans = [(tmp_path / name / "gluprune_plan.json").read_text() for name in ("default", "said")]
    assert plans[0] == plans[1]
    assert json.loads(plans[0])["calibration"]["own_text"] == {"seed": 0, "temperature": 1.0}


def test_where_no_text_is_needed_none_is_written(
    argv: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "statistics.npz"
    hybrid = [*argv, "--width", 40, "--criterion", "hybrid"]
    report(capsys, *hybrid, "--statistics-out", saved, "--output", tmp_path / "out")
    monkeypatch.setattr("convert.own_text.own_windows", lambda *_, **__: pytest.fail("it is written"))
    for options in (["--criterion", "hybrid", "--statistics", saved], ["--criterion", "l2"]):
        status, _, err = run(capsys, *argv, "--width", 40, *options, "--dry-run")
        assert (status, "own text" in err) == (0, False), err


def test_a_dry_run_has_the_sizes_without_the_text(
    argv: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--prune-percent", 40, "--criterion", "hybrid", "--compensate", "least-squares")
    expected = report(capsys, *argv, *options, "--output", tmp_path / "out")
    monkeypatch.setattr("convert.own_text.own_windows", lambda *_, **__: pytest.fail("it is written"))
    status, out, err = run(capsys, *argv, *options, "--dry-run", "--json")
    assert status == 0, err
    assert "note: no --calibration-data: the model would write its own text (self)" in err
    found = json.loads(out)
    assert (found["after"], found["plan"]["criterion"]) == (expected["after"], "hybrid")
    for more in (("--allocation", "global"), ("--drop-least", 1)):
        status, out, err = run(capsys, *argv, *options[:4], *more, "--dry-run")
        assert (status, out) == (2, "")
        assert f"what {' '.join(map(str, more[:1]))}" in err
        assert "a dry run writes none; give --calibration-data TEXT" in err


def test_a_model_without_a_tokenizer_writes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "model", CONFIG, hf_tensors(CONFIG))
    status, out, err = run(
        capsys, "--model", folder, "--width", 40, "--criterion", "hybrid", "--output", tmp_path / "o"
    )
    assert (status, out) == (2, "")
    assert "has no tokenizer files, without which it neither writes calibration text nor takes --calibration" in err


def test_it_is_the_default_of_the_library(checkpoint: convert.Checkpoint) -> None:
    prune = functools.partial(prune_model, checkpoint, width=40, calibration_tokens=4 * W, sequence_length=W)
    for method in ("hybrid", "ppm+least-squares"):
        assert json.dumps(prune(method).history) == json.dumps(prune(method, calibration=["self"]).history)
    assert "calibration" not in prune("ppm").history[-1]
