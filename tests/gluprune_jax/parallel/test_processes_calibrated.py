"""What runs a model on text, in two real processes: the files and numbers are those of one, and all agree on them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from inspecting import tensors
from processes import done, finish, start
from tiny_models import hf_config, write_folder

import convert
from evals.compare import main as compare
from gluprune_jax import PruningPlan, make_plan, score
from gluprune_jax.files.records import check_seal
from gluprune_jax.prune import main as prune
from gluprune_jax.pruning.calibration import LayerStatistics, Statistics
from gluprune_jax.recover import main as recover

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.slow

CONFIG = hf_config(
    vocab_size=VOCABULARY,
    eos_token_id=VOCABULARY - 1,
    intermediate_size=83,
    num_hidden_layers=2,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model; one of one layer, and what is left of it to train; and texts."""
    folder = tmp_path_factory.mktemp("calibrated")
    write_tokenizer(write_folder(folder / "model", CONFIG))
    write_tokenizer(write_folder(folder / "teacher", hf_config(**{**CONFIG, "num_hidden_layers": 1})))
    dense = convert.load(folder / "teacher")
    convert.save(dense.pruned(make_plan(score(dense.model), width=41)), folder / "pruned")
    (folder / "text.txt").write_text("".join(f"The square of {i} is {i * i}. " for i in range(60)))
    (folder / "held-out.txt").write_text("".join(f"The cube of {i} is {i**3}. " for i in range(20)))
    return folder


@pytest.fixture
def calibrated(folder: Path) -> list[object]:
    text = ("--calibration-data", folder / "text.txt", "--calibration-tokens", 640, "--sequence-length", 32)
    return ["--model", folder / "model", *text]


def together(module: str, *argv: object) -> list[tuple[int, str, str]]:
    """A command in two processes of two devices each."""
    environment = {"JAX_COMPILATION_CACHE_DIR": ""}
    return finish(start(module, *argv, processes=2, environment=environment))


def report(capsys: Capture, main: Any, *argv: object) -> dict[str, Any]:
    """What a command says in this process."""
    capsys.readouterr()
    status = main([str(arg) for arg in (*argv, "--mesh", "data=1", "--json")])
    out, err = capsys.readouterr()
    assert status == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


def kept(folder: Path) -> list[list[int]]:
    return [neurons.tolist() for neurons in PruningPlan.load(folder / "gluprune_plan.json").kept]


# ---------------------------------------------------------------------------------------------------------- prune


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("data=2,model=2", "--criterion hybrid --compensate least-squares --allocation measured --min-keep 0.4"),
        ("data=1,model=4", "--criterion taylor --compensate least-squares --sequential"),
    ],
)
def test_calibrated_pruning(
    folder: Path, calibrated: list[object], tmp_path: Path, capsys: Capture, mesh: str, options: str
) -> None:
    argv = [*calibrated, "--prune-percent", 40, *options.split()]
    outputs = {name: tmp_path / name / "out" for name in ("one", "two")}
    statistics = {name: tmp_path / name / "statistics.npz" for name in outputs}
    for name in outputs:
        (tmp_path / name).mkdir()
    one, two = ([*argv, "--output", outputs[name], "--statistics-out", statistics[name]] for name in outputs)
    expected = report(capsys, prune, *one)
    found = json.loads(done(together("gluprune_jax.prune", *two, "--mesh", mesh, "--json")))
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["out", "statistics.npz"]
    assert kept(outputs["two"]) == kept(outputs["one"])
    assert found["after"] == expected["after"]
    wanted = tensors(outputs["one"])
    for name, array in tensors(outputs["two"]).items():
        if "down_proj" in name:
            np.testing.assert_allclose(array, wanted[name], rtol=2e-3, atol=2e-4)
        else:
            assert array.tobytes() == wanted[name].tobytes()
    for key in ("output_error", "output_error_without"):
        assert found["compensation"][key] == pytest.approx(expected["compensation"][key], rel=1e-3)
    ours, theirs = (Statistics.load(statistics[name]) for name in outputs)
    assert (theirs.fingerprint, theirs.texts) == (ours.fingerprint, ours.texts)
    for layer, other in zip(theirs.layers, ours.layers, strict=True):
        for field in ("squares", "magnitudes", *["sensitivity"] * ("taylor" in options)):
            np.testing.assert_allclose(getattr(layer, field), getattr(other, field), rtol=1e-4)
        assert layer.influence == pytest.approx(other.influence, rel=1e-4)


# -------------------------------------------------------------------------------------------------------- compare


def test_a_comparison_goes_on(folder: Path, calibrated: list[object], tmp_path: Path, capsys: Capture) -> None:
    """From what the first process knows, also where the other sees none of it: they may share no storage."""
    measure = ("--eval-data", folder / "held-out.txt", "--eval-tokens", 128, "--sequence-length", 32)
    ways = ("--methods", "random,hybrid+least-squares", "--seeds", 1, "--prune-percent", "20,40")
    own, others = tmp_path / "first", tmp_path / "second"
    argv, name = [*calibrated, *measure, *ways], str(folder / "held-out.txt")
    expected = report(capsys, compare, *argv, "--output", own)
    known = expected["rows"][:2]
    for row in known:  # to be told from what would be computed again
        row["perplexity"][name] += 1
    for path in own.iterdir():
        path.unlink()
    (own / "comparison.json").write_text(json.dumps({**expected, "rows": known}))
    others.mkdir()
    (others / "comparison.json").write_text("is not looked at")
    found = json.loads(done(together("evals.compare", *argv, "--output", [own, others], "--json")))
    assert found["rows"][:2] == known
    for row, other in zip(found["rows"], expected["rows"], strict=True):
        assert (row["method"], row["target"], row["seed"]) == (other["method"], other["target"], other["seed"])
        assert row.get("widths") == other.get("widths")
        assert row["perplexity"][name] == pytest.approx(other["perplexity"][name], rel=1e-3)
    written = json.loads((own / "comparison.json").read_text())
    check_seal(written, "comparison.json")
    assert {**found, "sha256": written["sha256"]} == written
    assert len((own / "comparison.csv").read_text().splitlines()) == 1 + len(found["rows"]) == 6
    assert [path.name for path in others.iterdir()] == ["comparison.json"]
    assert (others / "comparison.json").read_text() == "is not looked at"


# -------------------------------------------------------------------------------------------------------- recover


def log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def training(folder: Path) -> list[object]:
    steps = (
        "--steps",
        4,
        "--sequence-length",
        32,
        "--batch-size",
        4,
        "--learning-rate",
        "1e-3",
        "--checkpoint-every",
        4,
    )
    return ["--model", folder / "pruned", "--teacher", folder / "teacher", *steps]


def test_recovery(folder: Path, training: list[object], tmp_path: Path, capsys: Capture) -> None:
    argv = [*training, "--train-data", folder / "text.txt", "--train", "mlp"]
    report(capsys, recover, *argv, "--output", tmp_path / "one" / "out")
    options = ("--mesh", "data=2,model=2", "--keep-checkpoints", "--json")
    found = json.loads(done(together("gluprune_jax.recover", *argv, *options, "--output", tmp_path / "two" / "out")))
    names = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert names == ["out", "out.recovery", "out.recovery.jsonl"]
    assert [path.name for path in (tmp_path / "two" / "out.recovery").iterdir()] == ["step_00000004"]
    expected, lines = (log(tmp_path / name / "out.recovery.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert found["last"] == lines[-1]
    for line, other in zip(lines, expected, strict=True):
        assert line["tokens"] == other["tokens"]
        for key in ("loss", "kl", "ce", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=1e-5)
    wanted = tensors(tmp_path / "one" / "out")
    for name, array in tensors(tmp_path / "two" / "out").items():
        np.testing.assert_allclose(array, wanted[name], rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- input


def test_processes_that_read_something_else(folder: Path, training: list[object], tmp_path: Path) -> None:
    """All refuse it, and the first one says so in one sentence."""
    text, other, output = folder / "text.txt", folder / "held-out.txt", tmp_path / "out"
    saved = []
    for number in (0, 1):
        layer = LayerStatistics(9, *3 * [np.full(83, number, np.float32)], influence=0.5)
        saved.append(tmp_path / f"{number}.npz")
        Statistics((layer, layer), 48, "sha256:0", {"tokens": 9}).save(saved[-1])
    model = ("--model", folder / "model", "--width", 41, "--criterion", "wanda")
    for module, argv, message in (
        ("gluprune_jax.recover", (*training, "--train-data", [text, other]), "the training data; give both the same"),
        (
            "gluprune_jax.recover",
            (*training, "--train-data", [text, tmp_path / "none"]),
            f"process 1 of 2: cannot read the text {tmp_path}",
        ),
        (
            "gluprune_jax.prune",
            (*model, "--statistics", saved),
            "process 1 has read something else than process 0: --statistics",
        ),
    ):
        results = together(module, *argv, "--output", output)
        assert [status for status, _, _ in results] == [2, 2], results
        assert message in results[0][2]
        # A slow machine shows progress before it.
        lines = results[0][2].splitlines()
        assert [line for line in lines if line.startswith(("gluprune: error", "Traceback"))] == lines[-1:]
        assert results[1][1:] == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npz", "1.npz"]
