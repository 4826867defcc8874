"""The commands' options for devices: meshes, and what is planned before anything is loaded."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from commands import status
from tiny_models import hf_config, hf_tensors, write_folder

import convert.__main__
import evals.__main__
import gluprune_jax.prune
from gluprune_jax.memory.mesh_choice import MeshRequest, mesh_chooser
from gluprune_jax.memory.plan import Pruning
from gluprune_jax.parallel.mesh import shape_of

Main = Callable[[list[str]], int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = hf_config(vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1, intermediate_size=83)
    folder = write_folder(tmp_path / "tiny-llama", config)
    write_tokenizer(folder)
    return folder


def document(capsys: Capture, main: Main, *argv: object) -> dict[str, Any]:
    capsys.readouterr()
    assert status(main, *argv, "--json") == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md" and path.is_file()}


@pytest.mark.parametrize("mesh", ["model=8", "data=2,model=3"])
def test_files_do_not_depend_on_the_mesh(model: Path, tmp_path: Path, capsys: Capture, mesh: str) -> None:
    target = ("--model", model, "--width", "41")
    for name, options in (("plain", ()), ("mesh", ("--mesh", mesh)), ("orbax", ("--mesh", mesh, "--format", "orbax"))):
        assert status(gluprune_jax.prune.main, *target, *options, "--output", tmp_path / name) == 0
    assert contents(tmp_path / "mesh") == contents(tmp_path / "plain")
    assert status(convert.__main__.main, tmp_path / "orbax", tmp_path / "back", "--mesh", "data=4,model=2") == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "back")]
    assert weights[0] == weights[1]


def test_other_devices_are_no_cpus(tmp_path: Path, capsys: Capture) -> None:
    """What XLA's CPU client copies is not planned for devices that are named by their memory."""
    config = hf_config(torch_dtype="bfloat16", max_position_embeddings=32768)
    folder = write_folder(tmp_path / "model", config, hf_tensors(config, "bfloat16"))
    argv = ("--model", folder, "--suite", "paper", "--dry-run", "--mesh", "model=1")
    plans = [
        document(capsys, evals.__main__.main, *argv, *options)["memory"]["bytes_per_device"]
        for options in ((), ("--device-memory", "1GiB"))
    ]
    assert plans[0]["workspace"] - plans[1]["workspace"] >= 2 * (plans[1]["weights"] + plans[1]["cache"])
    assert plans[0]["cache"] == plans[1]["cache"]


def test_what_is_loaded_whole_is_planned_whole(tmp_path: Path, model: Path, capsys: Capture) -> None:
    """An Orbax checkpoint cannot stay in its files, nor does a plan for other devices have to fit on these."""
    assert status(convert.__main__.main, model, tmp_path / "orbax", "--format", "orbax") == 0
    weights = []
    for path in (model, tmp_path / "orbax"):
        argv = ("--model", path, "--width", "41", "--dry-run", "--device-memory", "1GiB")
        memory = document(capsys, gluprune_jax.prune.main, *argv)["memory"]
        weights.append((memory["mesh"]["model"], memory["bytes_per_device"]["weights"]))
    assert weights[0] == (1, 3 * 83 * 48 * 4)  # the three matrices of a layer
    assert weights[1][0] == 8
    argv = (
        "--model",
        tmp_path / "orbax",
        "--width",
        "41",
        "--dry-run",
        "--mesh",
        "model=64",
        "--device-memory",
        "1GiB",
    )
    assert document(capsys, gluprune_jax.prune.main, *argv)["memory"]["devices"] == 64


def test_less_is_planned_where_what_is_wanted_does_not_fit(model: Path, capsys: Capture) -> None:
    argv = ("--model", model, "--suite", "paper", "--dry-run", "--mesh", "model=1")
    totals = []
    for size in ("1GiB", "20MB"):
        memory = document(capsys, evals.__main__.main, *argv, "--device-memory", size)["memory"]
        assert memory["fits"] is True
        totals.append(memory["bytes_per_device"]["total"])
    assert totals[0] > 20e6 > totals[1]
    assert status(evals.__main__.main, *argv, "--device-memory", "20MB", "--batch-size", "8") == 2
    output = capsys.readouterr()
    assert "in each replica: 8 rows of 512 tokens at once" in output.out
    assert "what would do: --batch-size" in output.err


def test_what_auto_chooses(model: Path, tmp_path: Path, capsys: Capture) -> None:
    """Pruning divides one model over the eight devices; evaluation holds a replica on each."""
    loaded: list[Any] = []

    def remember(abstract: Any) -> Any:
        loaded.append(mesh_chooser(MeshRequest(), [Pruning()])(abstract))
        return loaded[-1]

    convert.load(model, mesh=remember)
    assert str(shape_of(loaded[0])) == "data=1,model=8"
    memory = document(capsys, evals.__main__.main, "--model", model, "--suite", "quick", "--dry-run")["memory"]
    assert memory["mesh"] == {"data": jax.device_count(), "model": 1}
    assert memory["fits"] is True


@pytest.mark.parametrize("command", ["prune", "evals"])
def test_a_dry_run_plans_for_devices_that_are_not_there(
    model: Path, tmp_path: Path, capsys: Capture, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "evals":
        monkeypatch.setattr(os, "preadv", None)  # no weight is read
    main, options = {
        "prune": (gluprune_jax.prune.main, ("--width", "41")),
        "evals": (evals.__main__.main, ("--suite", "paper")),
    }[command]
    argv = ("--model", model, *options, "--dry-run", "--device-memory", "16GiB", "--mesh", "data=16,model=16")
    memory = document(capsys, main, *argv)["memory"]
    assert (memory["devices"], memory["bytes_per_device"]["device"]) == (256, 16 * 2**30)
    parts = memory["bytes_per_device"]
    assert parts["total"] == parts["weights"] + parts["cache"] + parts["workspace"] > 0
    assert status(main, *argv) == 0
    assert "memory of each device, data=16,model=16 (256 devices)" in capsys.readouterr().out
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny-llama"]


@pytest.mark.parametrize(
    ("main", "options", "remedy"),
    [
        (gluprune_jax.prune.main, ("--width", "41", "--mesh", "data=8", "--output", "out"), "--mesh data="),
        (
            evals.__main__.main,
            ("--suite", "quick", "--dry-run", "--mesh", "data=8", "--batch-size", "4"),
            "--mesh data=4,model=2, or --batch-size 2",
        ),
        (evals.__main__.main, ("--suite", "quick", "--mesh", "data=8", "--batch-size", "4"), "--batch-size 2"),
        (convert.__main__.main, ("out", "--format", "orbax", "--mesh", "data=8"), "--mesh data="),
    ],
)
def test_what_cannot_fit_is_refused_before_a_weight_is_read(
    model: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    main: Main,
    options: tuple[str, ...],
    remedy: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "preadv", None)
    named = (model,) if main is convert.__main__.main else ("--model", model)
    size = {gluprune_jax.prune.main: "300kB", convert.__main__.main: "300kB"}.get(main, "30MB")
    data = ("--benchmark-data", tmp_path) if main is evals.__main__.main and "--dry-run" not in options else ()
    if data:
        monkeypatch.setattr("evals.harness.run.load_benchmarks", lambda *args, **options: [])
    assert status(main, *named, *options, *data, "--device-memory", size) == 2
    error = capsys.readouterr().err
    assert "the model needs" in error
    assert remedy in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mesh", "2x4"), "--mesh is '2x4'; write auto, or sizes such as data=2,model=4"),
        (("--mesh", "model=9"), "the mesh data=1,model=9 has 9 devices, and there are 8"),
        (("--device-memory", "16"), "--device-memory is '16'; write a positive number and its unit"),
        (("--output", "s3://bucket/model"), "is an address, which is not opened here"),
        (("--output", "gs://bucket/model", "--format", "hf"), "give --format orbax, or mount the bucket"),
    ],
)
def test_refusals(
    model: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ("--model", model, "--width", "41", "--output", "out", "--format", "orbax", *options)
    assert status(gluprune_jax.prune.main, *argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny-llama"]


def test_addresses_are_no_models(capsys: Capture, tmp_path: Path) -> None:
    for main, argv in (
        (gluprune_jax.prune.main, ("--model", "s3://bucket/model", "--width", "4", "--dry-run")),
        (evals.__main__.main, ("--model", "demo", "--suite", "quick", "--output", "gs://bucket/results")),
        (convert.__main__.main, ("s3://bucket/model", tmp_path / "out")),
    ):
        assert status(main, *argv) == 2
        assert "is an address, which is not opened here" in capsys.readouterr().err
