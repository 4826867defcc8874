"""`prune_model` does what the command does: equal files and equal history, and errors that name its own parameters."""

import functools
import json
from pathlib import Path
from typing import Any

import commands
import jax
import numpy as np
import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from calibration_text import TEXT, windows_of
from llama_tensors import model_arrays
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.huggingface.streamed import StreamedCheckpoint
from gluprune_jax import RequestError, make_plan, prune_model, score
from gluprune_jax.data.documents import Document
from gluprune_jax.parallel.mesh import MeshShape, make_mesh, mesh_of
from gluprune_jax.prune import main
from gluprune_jax.pruning.calibration import collect, gram_matrices
from gluprune_jax.pruning.least_squares import compensate
from gluprune_jax.pruning.methods import Method, Pruned
from gluprune_jax.pruning.plan import PruningPlan

Capture = pytest.CaptureFixture[str]
CONFIG = hf_config(vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1, intermediate_size=83, max_position_embeddings=64)

report = functools.partial(commands.report, main)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_tokenizer(write_folder(folder / "model", CONFIG, hf_tensors(CONFIG)))
    (folder / "text.txt").write_text(TEXT)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def calibration(folder: Path) -> dict[str, Any]:
    return {"calibration": [str(folder / "text.txt")], "calibration_tokens": 640, "sequence_length": 32}


def as_options(folder: Path) -> list[object]:
    # On one device, as the library's model is: sums over tokens depend on how the tokens are divided.
    text = ["--calibration-data", folder / "text.txt", "--calibration-tokens", 640, "--sequence-length", 32]
    return [*text, "--mesh", "data=1,model=1"]


@pytest.mark.parametrize(
    ("method", "request_", "options"),
    [
        ("ppm", {"prune_percent": 40}, ["--prune-percent", 40]),
        ("vow", {"width": 50, "layers": [0, 2], "multiple_of": 8}, ["--width", 50, "--layers=0,2", "--multiple-of", 8]),
        ("l2", {"expansion_ratio": "1.25", "drop_layers": [1]}, ["--expansion-ratio", "1.25", "--drop-layers", 1]),
        (
            "hybrid+least-squares",
            {"prune_percent": 20},
            ["--prune-percent", 20, "--criterion", "hybrid", "--compensate", "least-squares"],
        ),
        (
            "ppm+global",
            {"prune_percent": 40, "min_keep": 0.3},
            ["--prune-percent", 40, "--allocation", "global", "--min-keep", 0.3],
        ),
        (
            "wanda+measured+least-squares+sequential",
            {"width": 60},
            *[["--width", 60, "--criterion", "wanda", "--allocation", "measured", "--compensate", "least-squares"]],
        ),
        ("random", {"width": 41, "seed": 7}, ["--width", 41, "--criterion", "random", "--seed", 7]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_library_and_command_write_equal_bytes_and_equal_history(
    folder: Path,
    tmp_path: Path,
    capsys: Capture,
    method: str,
    request_: dict[str, Any],
    options: list[Any],
    stream: bool,
) -> None:
    if method in ("vow", "l2"):
        options = [*options, "--criterion", method]
    if "sequential" in method:
        options = [*options, "--sequential"]
    text = any(word in method for word in ("hybrid", "least-squares"))
    options = [*options, *(as_options(folder) if text else [])]
    report(capsys, "--model", folder / "model", *options, "--output", tmp_path / "command")
    checkpoint = convert.load(folder / "model", stream=stream)
    pruned = prune_model(checkpoint, method, **request_, **(calibration(folder) if text else {}))
    assert type(pruned) is type(checkpoint)
    convert.save(pruned, tmp_path / "library")
    written, wanted = contents(tmp_path / "library"), contents(tmp_path / "command")
    # The model card and the plan are extra files of the command; all else is the same to the byte.
    assert wanted.keys() - written.keys() == {"README.md", "gluprune_plan.json"}
    assert written == {name: wanted[name] for name in written}
    plan = PruningPlan.load(tmp_path / "command" / "gluprune_plan.json")
    (record,) = pruned.history
    assert {key: record[key] for key in plan.summary()} == json.loads(json.dumps(plan.summary()))
    assert ("compensation" in record) == plan.is_compensated == ("least-squares" in method)


def test_the_dense_checkpoint_is_left_as_it_is(folder: Path) -> None:
    checkpoint = convert.load(folder / "model")
    before = {name.hf: np.asarray(array) for name, array in model_arrays(checkpoint.model)}
    pruned = prune_model(checkpoint, "ppm+least-squares", prune_percent=50, **calibration(folder))
    assert (checkpoint.history, len(pruned.history)) == ((), 1)
    for name, array in model_arrays(checkpoint.model):
        assert np.array_equal(before[name.hf], np.asarray(array))


def test_the_history_says_that_down_proj_was_refitted(folder: Path) -> None:
    checkpoint = convert.load(folder / "model")
    plan = make_plan(score(checkpoint.model), prune_percent=40)
    windows = checkpoint.calibration_windows([Document(TEXT, "text", "")], tokens=640, sequence_length=32)
    (compensation,) = compensate(checkpoint.model, gram_matrices(checkpoint.model, windows), [plan])
    (record,) = checkpoint.pruned(Pruned(plan, compensation)).history
    assert record["compensation"] == compensation.summary()
    assert "compensation" not in checkpoint.pruned(plan).history[0]


def test_a_plan_that_needs_a_refit_is_not_taken_for_one(folder: Path) -> None:
    checkpoint = convert.load(folder / "model")
    pruned = prune_model(checkpoint, "ppm+least-squares", prune_percent=40, **calibration(folder))
    record = pruned.history[0]
    plan = make_plan(score(checkpoint.model), prune_percent=40.0).compensated_on(record["calibration"])
    assert plan.summary() == {key: record[key] for key in plan.summary()}
    (without,) = checkpoint.pruned(plan).history
    assert without["compensation"] is None  # the plan says least squares, and the weights are not refitted
    assert not np.array_equal(
        pruned.model.layers[0].mlp.down_proj[...], checkpoint.pruned(plan).model.layers[0].mlp.down_proj[...]
    )


def test_a_streamed_checkpoint_is_refitted_and_pruned_again(folder: Path, tmp_path: Path) -> None:
    whole, streamed = (convert.load(folder / "model", stream=stream) for stream in (False, True))
    assert isinstance(streamed, StreamedCheckpoint)
    steps: list[dict[str, Any]] = [{"prune_percent": 40}, {"width": 30, "drop_layers": [0]}]
    for name, checkpoint in (("whole", whole), ("streamed", streamed)):
        refitted = prune_model(checkpoint, "ppm+least-squares", **steps[0], **calibration(folder))
        convert.save(prune_model(refitted, "ppm", **steps[1]), tmp_path / name)
    assert contents(tmp_path / "whole") == contents(tmp_path / "streamed")


def test_a_model_on_a_mesh_is_pruned_there(folder: Path, tmp_path: Path) -> None:
    mesh = make_mesh(MeshShape(2, 2), 2, jax.devices()[:4])
    spread = convert.load(folder / "model", mesh=lambda model: mesh)
    pruned = prune_model(spread, "ppm", prune_percent=40)
    assert mesh_of(pruned.model) is not None
    convert.save(pruned, tmp_path / "spread")
    convert.save(prune_model(convert.load(folder / "model"), "ppm", prune_percent=40), tmp_path / "one")
    assert contents(tmp_path / "spread") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("method", "request_", "sentence"),
    [
        ("ppm", {}, "give exactly one of `expansion_ratio`, `prune_percent` and `width`"),
        ("ppm", {"prune_percent": 120}, "`prune_percent` is 120; it must lie between 0 and 100"),
        ("ppm", {"width": 40, "prune_percent": 10}, "give exactly one of"),
        ("bogus", {"width": 40}, "unknown criterion 'bogus'"),
        ("ppm+bogus", {"width": 40}, "method 'ppm+bogus' has 'bogus'"),
        ("hybrid+least-squares", {"width": 40, "statistics": True}, "give as `calibration` what `statistics` are of"),
        ("ppm", {"width": 40, "text": True}, "`calibration` has no effect with `method` ppm"),
        ("ppm", {"width": 40, "statistics": "none.npz"}, "cannot read the statistics none.npz"),
        ("ppm", {"width": 40, "min_keep": 0.5}, "`min_keep` is 0.5 and has no effect"),
        ("ppm+global", {"width": 40, "min_keep": 1}, "`min_keep` is 1; it must be a share from 0"),
        ("ppm+sequential", {"width": 40, "text": True}, "ppm chooses the same neurons in any order"),
        ("ppm+least-squares", {"width": 40, "drop_layers": [0], "text": True}, "drop layers first"),
        ("hybrid", {"width": 40, "text": True, "calibration_tokens": 8}, "`calibration_tokens` is 8, less than the 32"),
        ("hybrid", {"width": 40, "text": True, "sequence_length": 1}, "`sequence_length` is 1; it must be at least 2"),
        ("hybrid", {"width": 40, "calibration": ["nowhere.txt"]}, "cannot read the text nowhere.txt"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_by_its_parameter(
    folder: Path, method: str, request_: dict[str, Any], sentence: str
) -> None:
    arguments = dict(request_)
    if arguments.pop("text", False):
        arguments = calibration(folder) | arguments
    if arguments.get("statistics") is True:
        checkpoint, windows = windows_of(folder)
        arguments["statistics"] = collect(checkpoint.model, windows)
    with pytest.raises(RequestError) as refused:
        prune_model(convert.load(folder / "model"), method, **arguments)
    assert sentence in str(refused.value)
    assert "--" not in str(refused.value)


def test_a_method_may_be_given_as_one(folder: Path) -> None:
    checkpoint = convert.load(folder / "model")
    found = [prune_model(checkpoint, method, width=41).history for method in ("l2", Method("l2"))]
    assert found[0] == found[1]
