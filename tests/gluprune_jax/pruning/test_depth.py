"""Dropped layers: the model without them, however it is pruned and written, and what cannot be dropped is refused."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from flax import nnx
from inspecting import arrays, contents, logits
from llama_tensors import model_arrays
from sharded import shard_model
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.huggingface.streamed import StreamedCheckpoint
from gluprune_jax import make_plan, score
from gluprune_jax.cli.report import changes
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.parallel.mesh import MeshShape, make_mesh, mesh_of
from gluprune_jax.prune import main
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.scores import fingerprint
from gluprune_jax.pruning.slicing import slice_model
from gluprune_jax.pruning.targets import parse_layers

CONFIG = hf_config(num_hidden_layers=5, intermediate_size=83)
TOKENS = np.random.default_rng(0).integers(3, 97, (2, 24))
# Of five layers; with the width of those that stay where it is pruned, and which of them.
PLANS: dict[str, dict[str, Any]] = {
    "one": {"drop_layers": [2]},
    "first and last": {"drop_layers": [4, 0]},
    "all but one": {"drop_layers": [0, 1, 2, 4]},
    "and a width": {"drop_layers": [1, 3], "width": 37},
    "and some layers": {"drop_layers": [0, 3], "prune_percent": 40, "layers": [2, 4]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three dtypes in one checkpoint of five layers, in two shards."""
    tensors = hf_tensors(CONFIG)
    for name, dtype in (("gate_proj", "bfloat16"), ("up_proj", "bfloat16"), ("q_proj", "float16")):
        tensors |= {key: tensor for key, tensor in hf_tensors(CONFIG, dtype).items() if name in key}
    return write_folder(tmp_path_factory.mktemp("depth") / "model", CONFIG, tensors, shards=2)


@pytest.fixture(scope="module")
def model(folder: Path) -> Decoder:
    return convert.load(folder).model


def copy_of(model: Decoder) -> Decoder:
    copied: Decoder = nnx.merge(nnx.split(model)[0], jax.tree.map(jnp.copy, nnx.state(model)))
    return copied


def assert_same(model: Decoder, expected: Decoder) -> None:
    assert model.config == expected.config
    found, wanted = arrays(model), arrays(expected)
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        assert found[path].dtype == array.dtype, path
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(array), err_msg=str(path))


def without_layers(model: Decoder, dropped: list[int]) -> Decoder:
    """The model put together by hand from the layers that stay."""
    remaining = [i for i in range(model.config.num_hidden_layers) if i not in dropped]
    assembled = Decoder(model.config.with_layers(remaining), rngs=nnx.Rngs(0))
    assembled.layers = nnx.List([model.layers[i] for i in remaining])
    for name in ("embed_tokens", "norm", "lm_head"):
        setattr(assembled, name, getattr(model, name))
    return assembled


run = functools.partial(commands.run, main)
report = functools.partial(commands.report, main)


# -------------------------------------------------------------------------------------------------------- slicing


@pytest.mark.parametrize("what", PLANS)
def test_the_slice_is_the_model_of_the_layers_that_stay(model: Decoder, what: str) -> None:
    request = PLANS[what]
    scores = score(model)
    plan = make_plan(scores, **request)
    sliced = slice_model(model, plan)
    widths = dataclasses.replace(plan, kept=tuple(k if len(k) else np.arange(83) for k in plan.kept), dropped_layers=())
    expected = without_layers(slice_model(model, widths), request["drop_layers"])
    assert sliced.config.num_hidden_layers == 5 - len(request["drop_layers"])
    assert_same(sliced, expected)
    np.testing.assert_array_equal(logits(sliced, TOKENS), logits(expected, TOKENS))
    assert np.abs(logits(sliced, TOKENS) - logits(model, TOKENS)).max() > 0.1


def test_all_other_arrays_are_shared(model: Decoder) -> None:
    dense, sliced = arrays(model), arrays(slice_model(model, make_plan(score(model), drop_layers=[1, 2])))
    for path, array in sliced.items():
        old = ("layers", {0: 0, 1: 3, 2: 4}[path[1]], *path[2:]) if path[0] == "layers" else path
        assert array is dense[old], path


@pytest.mark.parametrize("width", [None, 40])
def test_donating_frees_what_is_dropped_and_what_is_cut_and_nothing_else(model: Decoder, width: int | None) -> None:
    plan = make_plan(score(model), drop_layers=[1, 4], width=width)
    expected, donated = slice_model(model, plan), copy_of(model)
    dense = arrays(donated)
    assert_same(slice_model(donated, plan, donate=True), expected)
    for path, array in dense.items():
        is_cut = path[0] == "layers" and (path[1] in (1, 4) or (width is not None and path[2] == "mlp"))
        assert array.is_deleted() == is_cut, path


def test_layers_of_different_widths_and_storage_padding(model: Decoder) -> None:
    uneven = slice_model(model, make_plan(score(model), width=21, layers=[0, 3]), width_multiple=16)
    sliced = slice_model(uneven, make_plan(score(uneven), drop_layers=[0, 1]))
    assert sliced.config.intermediate_sizes == (83, 21, 83)
    assert [layer.mlp.up_proj.shape[0] for layer in sliced.layers] == [96, 32, 96]
    assert_same(sliced, without_layers(uneven, [0, 1]))


def test_in_two_steps_as_at_once(model: Decoder) -> None:
    once = slice_model(model, make_plan(score(model), drop_layers=[0, 3], width=30))
    halfway = slice_model(model, make_plan(score(model), drop_layers=[3]))
    assert_same(slice_model(halfway, make_plan(score(halfway), drop_layers=[0], width=30)), once)


MESHES = [MeshShape(8, 1), MeshShape(2, 4), MeshShape(1, 8)]


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("what", ["one", "and a width"])
def test_on_meshes(model: Decoder, shape: MeshShape, what: str) -> None:
    plan = make_plan(score(model), **PLANS[what])
    mesh = make_mesh(shape, model.config.num_key_value_heads)
    expected = slice_model(model, plan)
    sliced = slice_model(shard_model(copy_of(model), mesh), plan, donate=True)
    assert mesh_of(sliced) == mesh
    assert_same(sliced, shard_model(expected, mesh))
    if shape.data == 2:  # the batch is of two
        np.testing.assert_allclose(logits(sliced, TOKENS), logits(expected, TOKENS), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- files and formats


def prune(path: Path, output: Path, stream: bool, dtype: str | None = None, **target: Any) -> Path:
    checkpoint = convert.load(path, stream=stream, dtype=dtype)
    assert isinstance(checkpoint, StreamedCheckpoint) == stream
    scores = score(checkpoint.model, weights=checkpoint.mlp_weights())
    convert.save(checkpoint.pruned(make_plan(scores, **target)), output)
    return output


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("what", PLANS)
def test_streamed_and_in_memory_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, dtype: str | None
) -> None:
    monkeypatch.setattr("convert.huggingface.folder.MAX_SHARD_BYTES", 100_000)
    streamed = contents(prune(folder, tmp_path / "streamed", True, dtype, **PLANS[what]))
    assert streamed == contents(prune(folder, tmp_path / "loaded", False, dtype, **PLANS[what]))
    config = json.loads(streamed["config.json"])
    assert config["num_hidden_layers"] == 5 - len(PLANS[what]["drop_layers"])


def test_a_plan_upon_a_plan(folder: Path, tmp_path: Path) -> None:
    """Without writing in between, and with layers of different widths in the files: all is renumbered twice."""
    uneven = prune(folder, tmp_path / "uneven", True, width=50, layers=[0, 3])
    for stream in (True, False):
        checkpoint = convert.load(uneven, stream=stream)
        for request in ({"drop_layers": [1], "width": 40}, {"drop_layers": [0, 2]}, {"width": 20, "layers": [1]}):
            scores = score(checkpoint.model, weights=checkpoint.mlp_weights())
            checkpoint = checkpoint.pruned(make_plan(scores, **request))
        convert.save(checkpoint, tmp_path / str(stream))
    assert contents(tmp_path / "True") == contents(tmp_path / "False")
    assert convert.load(tmp_path / "True").config.intermediate_sizes == (40, 20)
    # Layers 2 and 4 of the first model are those that are left.
    before, after = (dict(named(convert.load(path))) for path in (folder, tmp_path / "True"))
    for new, old in enumerate((2, 4)):
        name = "model.layers.{}.self_attn.o_proj.weight"
        np.testing.assert_array_equal(after[name.format(new)], before[name.format(old)])


def named(checkpoint: convert.Checkpoint) -> list[tuple[str, np.ndarray]]:
    return [(name.hf, np.asarray(array)) for name, array in model_arrays(checkpoint.model)]


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 8)])
def test_a_streamed_checkpoint_is_loaded_onto_a_mesh(folder: Path, model: Decoder, shape: tuple[int, int]) -> None:
    checkpoint = convert.load(folder, stream=True)
    assert isinstance(checkpoint, StreamedCheckpoint)
    plan = make_plan(score(model), drop_layers=[0, 3], width=30)
    mesh = make_mesh(MeshShape(*shape), model.config.num_key_value_heads)
    loaded = checkpoint.pruned(plan).load(mesh=lambda abstract: mesh)
    assert_same(loaded.model, shard_model(slice_model(model, plan), mesh))
    assert_same(checkpoint.pruned(plan).load().model, slice_model(model, plan))


def test_only_what_stays_is_read_and_errors_name_the_tensor_of_the_file(tmp_path: Path) -> None:
    tensors = hf_tensors(CONFIG)
    for i in (1, 3):
        tensors[f"model.layers.{i}.self_attn.o_proj.weight"][1, 2] = np.inf
    path = write_folder(tmp_path / "model", CONFIG, tensors)
    with pytest.raises(OperationError, match=r"model\.layers\.3\.self_attn\.o_proj\.weight has NaN or Inf"):
        prune(path, tmp_path / "out", True, drop_layers=[1])
    assert not (tmp_path / "out").exists()
    prune(path, tmp_path / "out", True, drop_layers=[1, 3])


@pytest.mark.parametrize("what", ["first and last", "and some layers"])
def test_orbax_keeps_it_to_the_bit(folder: Path, tmp_path: Path, what: str) -> None:
    checkpoint = convert.load(folder)
    pruned = checkpoint.pruned(make_plan(score(checkpoint.model), **PLANS[what]))
    convert.save(pruned, tmp_path / "out", formats=["orbax", "hf"])
    for path in (tmp_path / "out", tmp_path / "out" / "orbax"):
        loaded = convert.load(path)
        assert_same(loaded.model, pruned.model)
        assert loaded.history == pruned.history
    # And what was streamed: it is loaded to be written.
    streamed = convert.load(folder, stream=True)
    convert.save(streamed.pruned(make_plan(score(checkpoint.model), **PLANS[what])), tmp_path / "b", formats=["orbax"])
    assert_same(convert.load(tmp_path / "b").model, pruned.model)


@pytest.mark.torch
@pytest.mark.parametrize("what", PLANS)
def test_transformers_loads_what_is_written(
    tmp_path: Path, load_reference: Callable[[str | Path], Any], what: str
) -> None:
    import torch

    folder = write_folder(tmp_path / "model", CONFIG)
    checkpoint = convert.load(folder)
    pruned = checkpoint.pruned(make_plan(score(checkpoint.model), **PLANS[what]))
    convert.save(pruned, tmp_path / "out")
    theirs = load_reference(tmp_path / "out")
    assert theirs.config.num_hidden_layers == len(theirs.model.layers) == pruned.config.num_hidden_layers
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    # Against float64, theirs are wrong by up to 1.1e-5 on some processors; logits reach 6.
    np.testing.assert_allclose(logits(pruned.model, TOKENS), expected, rtol=0, atol=5e-6 * np.abs(expected).max())
    # With the layers taken out of the dense model over there it is the same function.
    if set(PLANS[what]) == {"drop_layers"}:
        dense = load_reference(folder)
        dense.model.layers = torch.nn.ModuleList(
            layer for i, layer in enumerate(dense.model.layers) if i not in PLANS[what]["drop_layers"]
        )
        dense.config.num_hidden_layers = len(dense.model.layers)
        with torch.no_grad():
            by_hand = dense(torch.tensor(TOKENS), use_cache=False).logits.numpy()
        np.testing.assert_allclose(expected, by_hand, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- the command


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    argv = ("--model", folder, "--drop-layers", "1-2,-1", "--output", out, "--format", "hf,orbax")
    done = report(capsys, *argv)
    checkpoint = convert.load(out)
    tensors = dict(named(checkpoint))
    assert (done["before"]["layers"], done["after"]["layers"]) == (5, 2)
    assert done["after"]["intermediate_sizes"] == [83, 83] == list(checkpoint.config.intermediate_sizes)
    assert done["plan"]["dropped_layers"] == [1, 2, 4]
    assert done["plan"]["widths"] == [83, 0, 0, 83, 0]
    assert done["plan"]["request"] == {"drop_layers": [1, 2, 4]}
    assert done["before"]["parameters"] == sum(tensor.size for _, tensor in named(convert.load(folder)))
    assert done["after"]["parameters"] == sum(tensor.size for tensor in tensors.values())
    assert done["after"]["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert done["after"]["expansion_ratio"] == done["before"]["expansion_ratio"]
    (record,) = checkpoint.history
    assert record["dropped_layers"] == [1, 2, 4]
    assert_same(convert.load(out / "orbax").model, checkpoint.model)
    status, printed, _ = run(capsys, *argv, "--overwrite")
    assert status == 0
    assert re.search(r"layers +│ +5 │ +2 │ +-60\.0%", printed)
    assert "layers 1-2,4 dropped" in printed
    assert "ppm" not in printed  # which had no say


def test_the_command_with_a_width(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--model", folder, "--drop-layers=-1,0", "--width", "40", "--layers", "1,3", "--output", tmp_path / "out")
    done = report(capsys, *argv)
    assert done["after"]["intermediate_sizes"] == [40, 83, 40]
    assert done["plan"]["request"] == {"width": "40", "multiple_of": 1, "layers": [1, 3], "drop_layers": [0, 4]}
    assert convert.load(tmp_path / "out").config.intermediate_sizes == (40, 83, 40)
    status, printed, _ = run(capsys, *argv, "--dry-run")
    assert status == 0
    assert "ppm, layers 0,4 dropped" in printed
    rows = [re.findall(r"[\w.]+", line) for line in printed.split("by layer")[1].splitlines()]
    assert [row for row in rows if row[:1] != ["layer"] and row] == [
        ["0", "83", "dropped"],
        ["1", "83", "40", "0.8333"],
        ["2", "83", "83", "1.729"],
        ["3", "83", "40", "0.8333"],
        ["4", "83", "dropped"],
    ]


def test_the_model_card(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(capsys, "--model", folder, "--drop-layers", "3", "--output", tmp_path / "depth")
    report(capsys, "--model", folder, "--drop-layers", "1,3-4", "--width", "40", "--output", tmp_path / "both")
    depth, both = ((tmp_path / name / "README.md").read_text() for name in ("depth", "both"))
    assert "pruned to 4 layers\n" in depth
    assert "- Dropped: layer 3 of the base model" in depth
    assert "| layers | 5 | 4 |" in depth
    assert "Criterion" not in depth
    assert "pruned to 2 layers and expansion ratio 0.8333\n" in both
    assert "- Dropped: layers 1,3-4 of the base model" in both
    assert "- Target: width 40, multiple of 1, layers" in both


@pytest.mark.parametrize("extra", [(), ("--width", "40")])
def test_streaming_and_a_replayed_plan_give_the_same_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: tuple[str, ...]
) -> None:
    plan, written = tmp_path / "plan.json", {}
    argv = ("--model", folder, "--drop-layers", "0,2", *extra)
    report(capsys, *argv, "--plan-out", plan)
    for flag in ("--stream", "--no-stream"):
        report(capsys, *argv, flag, "--output", tmp_path / flag)
        report(capsys, "--model", folder, "--plan", plan, flag, "--output", tmp_path / f"plan{flag}")
        for name in (flag, f"plan{flag}"):
            written[name] = contents(tmp_path / name)
            del written[name]["README.md"]  # it quotes the command
    first, *others = written.values()
    assert first["gluprune_plan.json"] == plan.read_bytes()
    assert all(other == first for other in others)


def test_measured_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = hf_config(vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1)
    write_tokenizer(write_folder(tmp_path / "model", config, hf_tensors(config)))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    argv = ("--model", tmp_path / "model", "--drop-layers", "1", "--output", tmp_path / "out", "--mesh", "data=1")
    measure = (
        "--eval-data",
        text,
        "--sequence-length",
        "64",
        "--eval-tokens",
        "128",
        "--sample",
        "Hi",
        "--sample-tokens",
        "4",
    )
    done = report(capsys, *argv, *measure)
    assert list(done["evaluation"]["perplexity"]) == list(done["sample"]["answers"]) == ["dense", "pruned"]
    assert done["evaluation"]["perplexity"]["dense"] != done["evaluation"]["perplexity"]["pruned"]


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--model", folder, "--drop-layers", "0,2", "--dry-run")
    done = report(capsys, *argv, "--output", tmp_path / "out", "--plan-out", tmp_path / "plan.json")
    assert done["after"]["layers"] == 3
    assert list(tmp_path.iterdir()) == []


def test_the_report_of_a_streamed_model_is_that_of_a_loaded_one(folder: Path, model: Decoder) -> None:
    loaded, streamed = convert.load(folder), convert.load(folder, stream=True)
    for request in PLANS.values():
        plan = make_plan(score(model), **request)
        counted = changes(loaded.config, loaded.num_bytes, plan)
        assert changes(streamed.config, streamed.num_bytes, plan) == counted
        padded = shard_model(model, make_mesh(MeshShape(1, 8), model.config.num_key_value_heads))
        assert changes(padded.config, loaded.with_model(padded).num_bytes, plan) == counted
        assert counted["after"]["bytes"] == sum(array.nbytes for array in arrays(slice_model(model, plan)).values())


OUTPUT = ("--output", "out")
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": (
        OUTPUT,
        "nothing says what to prune: give --expansion-ratio, --prune-percent, --width, ",
    ),
    "out of range": (("--drop-layers", "5", *OUTPUT), "--drop-layers names layer 5; this model has layers 0 to 4"),
    "no list": (("--drop-layers", "", *OUTPUT), "--drop-layers has ''; write indices and ranges such as 0-3,8,-1"),
    "backwards": (("--drop-layers", "3-1", *OUTPUT), "--drop-layers has '3-1', which runs backwards"),
    "everything": (("--drop-layers", "0--1", *OUTPUT), "all 5 layers would be dropped; a model keeps at least one"),
    "pruned and dropped": (
        ("--drop-layers", "1-3", "--width", "40", "--layers", "0-2", *OUTPUT),
        "--layers and --drop-layers both name layers 1-2; prune or drop a layer, not both",
    ),
    "layers without a width": (("--drop-layers", "1", "--layers", "0", *OUTPUT), "none of these is given"),
    "a multiple without a width": (("--drop-layers", "1", "--multiple-of", "8", *OUTPUT), "none of these is given"),
    "beside a plan": (("--drop-layers", "1", "--plan", "plan.json", *OUTPUT), "--plan decides what is kept"),
    "a random baseline": (
        ("--drop-layers", "1", "--random-baseline", "--eval-data", "python-reference", *OUTPUT),
        "--random-baseline masks neurons, and a mask cannot drop layers",
    ),
    "a width that grows": (("--drop-layers", "1", "--width", "90", *OUTPUT), "a width of 90 would grow layer 0"),
    "nothing to write": (("--drop-layers", "1"), "nothing to do: give --output DIR"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    argv, sentence = REFUSED[what]
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "--model", folder, *argv)
    (line,) = [line for line in err.splitlines() if not line.startswith("note:")]
    assert (status, out) == (2, "")
    assert sentence in line
    assert list(tmp_path.iterdir()) == []


def test_a_random_baseline_is_refused_for_a_saved_plan_too(
    folder: Path, model: Decoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_plan(score(model), drop_layers=[1]).save(tmp_path / "plan.json")
    argv = ("--model", folder, "--plan", tmp_path / "plan.json", "--output", tmp_path / "out")
    status, _, err = run(capsys, *argv, "--random-baseline", "--eval-data", "python-reference")
    assert (status, "a mask cannot drop layers" in err.splitlines()[-1]) == (2, True)
    assert not (tmp_path / "out").exists()


def test_the_fingerprint_is_that_of_all_layers(folder: Path, model: Decoder, tmp_path: Path) -> None:
    plan = make_plan(score(model), drop_layers=[1])
    plan.check_fits(model.config, fingerprint(model))
    tensors = hf_tensors(CONFIG)
    tensors["model.layers.1.mlp.gate_proj.weight"] *= 2  # of the layer that is dropped
    other = convert.load(write_folder(tmp_path / "other", CONFIG, tensors)).model
    with pytest.raises(RequestError, match="made for other weights"):
        plan.check_fits(other.config, fingerprint(other))
    with pytest.raises(RequestError, match="this model has 4 layers"):
        slice_model(slice_model(model, plan), plan)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "with `drop_layers` at most one"),
        ({"drop_layers": []}, "with `drop_layers` at most one"),
        ({"drop_layers": [1], "width": 3, "prune_percent": 40}, "with `drop_layers` at most one"),
        ({"drop_layers": [5]}, r"layers \[5\] are not all among 0 to 4"),
        ({"drop_layers": [-1]}, r"layers \[-1\] are not all among 0 to 4"),
        ({"drop_layers": range(5)}, "all 5 layers would be dropped"),
        ({"drop_layers": [1], "layers": [0]}, "none of these is given"),
        ({"drop_layers": [1], "multiple_of": 2}, "none of these is given"),
        ({"drop_layers": [1], "multiple_of": 0}, "`multiple_of` is 0"),
        ({"drop_layers": [1, 2], "width": 40, "layers": [2]}, "both name layer 2;"),
    ],
)
def test_the_library_refuses_it_too(model: Decoder, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        make_plan(score(model), **request_)
    assert "\n" not in str(error.value)


def test_computed_lists_of_layers(model: Decoder) -> None:
    """As a ranking of layers hands them over: in any order, of any kind of integer."""
    scores = score(model)
    expected = make_plan(scores, drop_layers=[1, 3])
    for layers in (np.array([3, 1]), (3, 1, 3), parse_layers("-2,1", 5), np.argsort([5, 1, 4, 2, 3])[:2]):
        plan = make_plan(scores, drop_layers=layers)
        assert plan.dropped_layers == (1, 3)
        assert PruningPlan.from_json(plan.to_json()).to_json() == expected.to_json()


def test_a_mask_cannot_drop_layers(model: Decoder) -> None:
    with pytest.raises(
        RequestError, match="the plan drops layer 3, which a mask over neurons cannot do; prune with it"
    ):
        make_plan(score(model), drop_layers=[3], width=40).masks(model.config)
