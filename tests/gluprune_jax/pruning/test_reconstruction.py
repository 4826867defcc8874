"""Local reconstruction: what it gives back, what it leaves alone, and where it is recorded."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import jax.numpy as jnp
import numpy as np
import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from calibrated import CONFIG, SHAPES
from calibration_text import TEXT
from flax import nnx
from inspecting import logits
from numpy.typing import NDArray
from sharded import shard_model
from tiny_families import CONFIGS
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.huggingface.config import read_config
from gluprune_jax.errors import RequestError
from gluprune_jax.models.decoder import Decoder, embed
from gluprune_jax.models.parameters import parameters_of, with_parameters
from gluprune_jax.parallel.mesh import MeshShape, make_mesh
from gluprune_jax.prune import main
from gluprune_jax.pruning import kept_layers, reconstruction
from gluprune_jax.pruning.calibration import gram_matrices
from gluprune_jax.pruning.chooser import Chooser
from gluprune_jax.pruning.least_squares import compensate
from gluprune_jax.pruning.methods import Method, Pruned
from gluprune_jax.pruning.pipeline import prune_model
from gluprune_jax.pruning.plan import PruningPlan, make_plan
from gluprune_jax.pruning.reconstruction import Reconstruction, divide_windows, reconstruct
from gluprune_jax.pruning.scores import mlp_weights, score
from gluprune_jax.pruning.slicing import slice_model

Capture = pytest.CaptureFixture[str]
MATRICES = ("gate_proj", "up_proj", "down_proj")
# The tiny models have few windows, and so few steps a pass: these help.
FIT = {"passes": 20, "learning_rate": 0.02}

report = functools.partial(commands.report, main)
run = functools.partial(commands.run, main)


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    """Fits are of fewer neurons than these models have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, "WIDTH_MULTIPLE", 8)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return convert.load(write_folder(tmp_path_factory.mktemp("reconstruction") / "tiny", CONFIG)).model


@pytest.fixture(scope="module")
def windows() -> NDArray[np.int32]:
    return np.random.default_rng(2).integers(0, 97, (16, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def plan(model: Decoder) -> PruningPlan:
    return make_plan(score(model), prune_percent=40)


@pytest.fixture(scope="module")
def found(model: Decoder, windows: NDArray[np.int32], plan: PruningPlan) -> Reconstruction:
    return reconstruct(model, windows, plan, **FIT)


def fits(found: Reconstruction) -> list[reconstruction.LayerFit]:
    return [fit for fit in found.fits if fit is not None]


def held_out_error(dense: Decoder, pruned: Decoder, windows: NDArray[np.int32], i: int) -> float:
    """The relative squared error of the stream behind layer `i`, by the layers' own calls."""

    def streams(model: Decoder) -> tuple[Any, Any]:
        x, mid = embed(model.config, model.embed_tokens[...], jnp.asarray(windows)), None
        positions = jnp.broadcast_to(jnp.arange(windows.shape[1], dtype=jnp.int32), windows.shape)
        for layer in list(model.layers)[: i + 1]:
            mid, _ = layer.attend(x, positions)
            x = layer.feed_forward(mid)
        return np.asarray(mid, np.float64), np.asarray(x, np.float64)

    (mid, target), (_, out) = streams(dense), streams(pruned)
    return float(((out - target) ** 2).sum() / ((target - mid) ** 2).sum())


# --------------------------------------------------------------------------------------------------- what it promises


def test_the_error_on_held_out_windows_falls(found: Reconstruction) -> None:
    assert len(fits(found)) == 3
    for fit in fits(found):
        assert fit.error < fit.error_without
        assert fit.passes > 0


def test_the_errors_are_those_of_the_model_that_comes_out(
    model: Decoder, windows: NDArray[np.int32], plan: PruningPlan, found: Reconstruction
) -> None:
    _, held_out = divide_windows(windows)
    for i, fit in enumerate(fits(found)):
        pruned = Pruned(plan, reconstruction=found).apply(model)
        assert fit.error == pytest.approx(held_out_error(model, pruned, held_out, i), rel=1e-3)
        mask = plan.masks(model.config)[i]
        down = f"layers.{i}.mlp.down_proj"
        unrepaired = parameters_of(model)[down] * mask
        others = {f"layers.{i}.mlp.{name}": parameters_of(model)[f"layers.{i}.mlp.{name}"] for name in MATRICES[:2]}
        without = with_parameters(pruned, {**others, down: unrepaired})
        assert fit.error_without == pytest.approx(held_out_error(model, without, held_out, i), rel=1e-3)


@pytest.mark.parametrize("learning_rate", [1e-4, 0.02, 0.3])
@pytest.mark.parametrize("refits", [False, True])
def test_it_is_never_worse_than_no_repair(
    model: Decoder, windows: NDArray[np.int32], plan: PruningPlan, learning_rate: float, refits: bool
) -> None:
    downs = compensate(model, gram_matrices(model, windows), [plan])[0].down_projs if refits else None
    for fit in fits(reconstruct(model, windows, plan, downs, passes=3, learning_rate=learning_rate)):
        assert fit.error <= fit.error_without


def test_a_bad_refit_is_not_what_it_begins_with(model: Decoder, windows: NDArray[np.int32], plan: PruningPlan) -> None:
    downs = [
        -layer.mlp.down_proj[...] * mask for layer, mask in zip(model.layers, plan.masks(model.config), strict=True)
    ]
    for fit in fits(reconstruct(model, windows, plan, downs, passes=1, learning_rate=1e-6)):
        assert fit.error <= fit.error_without


def test_it_begins_with_the_refit_where_that_helps(model: Decoder, plan: PruningPlan) -> None:
    """Without a step that changes anything, what it begins with remains, to the bit."""
    windows = np.random.default_rng(3).integers(0, 97, (96, 16)).astype(np.int32)  # little text would be overfitted
    downs = compensate(model, gram_matrices(model, windows), [plan])[0].down_projs
    kept = reconstruct(model, windows, plan, downs, passes=1, learning_rate=0.0)
    for i, (mlp, fit) in enumerate(zip(kept.mlps, fits(kept), strict=True)):
        assert mlp is not None
        dense = model.layers[i].mlp
        left_out = dense.down_proj[...] * plan.masks(model.config)[i]
        assert np.array_equal(mlp.down_proj, downs[i] if fit.error < fit.error_without else left_out)
        assert np.array_equal(mlp.gate_proj, dense.gate_proj[...])
    assert fits(kept)[0].error < fits(kept)[0].error_without
    assert kept.summary()["left_as_pruned"] == [0, 1, 2]
    fitted = reconstruct(model, windows, plan, downs, **FIT)
    for fit, begun in zip(fits(fitted), fits(kept), strict=True):
        assert fit.error < begun.error


@pytest.mark.parametrize("sequential", [False, True])
def test_the_refit_has_not_seen_what_is_held_out(model: Decoder, windows: NDArray[np.int32], sequential: bool) -> None:
    chooser = Chooser(model, lambda: mlp_weights(model), windows=windows, refits=True)
    method = Method("ppm", is_compensated=True, sequential=sequential, reconstructs=True)
    (pruned,) = chooser.choose(method, [{"prune_percent": 40}])
    training, _ = divide_windows(windows)
    (expected,) = compensate(model, gram_matrices(model, training), [pruned.plan])
    assert pruned.compensation is not None
    np.testing.assert_allclose(pruned.compensation.down_projs[0], expected.down_projs[0], rtol=1e-5, atol=1e-6)


def test_gate_and_up_can_do_what_no_down_projection_can(model: Decoder, windows: NDArray[np.int32]) -> None:
    """Each removed neuron has the gate and the down column of a kept one: the sum of their up rows is both."""
    arrays = parameters_of(model)
    kept = np.arange(40)
    changed = {}
    for i in range(3):
        gate, up, down = (np.asarray(arrays[f"layers.{i}.mlp.{name}"]).copy() for name in MATRICES)
        gate[40:80], down[:, 40:80] = gate[:40], down[:, :40]
        down[:, 80:] = 0
        changed |= {
            f"layers.{i}.mlp.{name}": jnp.asarray(w) for name, w in zip(MATRICES, (gate, up, down), strict=True)
        }
    twins = with_parameters(model, changed)
    plan = make_plan(score(twins), width=40)
    plan = dataclasses.replace(plan, kept=(kept.astype(np.int32),) * 3)
    downs = compensate(twins, gram_matrices(twins, windows), [plan])[0].down_projs
    refitted = fits(reconstruct(twins, windows, plan, downs, passes=1, learning_rate=0.0))
    fitted = fits(reconstruct(twins, windows, plan, downs, passes=150, learning_rate=0.05))
    assert fitted[0].error < 0.2 * refitted[0].error
    assert all(fit.error < before.error for fit, before in zip(fitted, refitted, strict=True))


def test_removed_neurons_stay_out_and_a_slice_is_the_masked_model(
    model: Decoder, windows: NDArray[np.int32], plan: PruningPlan, found: Reconstruction
) -> None:
    repaired = Pruned(plan, reconstruction=found).apply(model)
    for layer, dense, mask in zip(repaired.layers, model.layers, plan.masks(model.config), strict=True):
        assert not np.asarray(layer.mlp.down_proj[...])[:, mask == 0].any()
        for name in MATRICES[:2]:
            new, old = (np.asarray(getattr(one.mlp, name)[...]) for one in (layer, dense))
            assert np.array_equal(new[mask == 0], old[mask == 0])
            assert not np.array_equal(new[mask == 1], old[mask == 1])
    sliced = logits(slice_model(repaired, plan), windows)
    np.testing.assert_allclose(sliced, logits(repaired, windows), rtol=1e-5, atol=1e-5)
    masked, _ = repaired(jnp.asarray(windows), neuron_masks=plan.masks(model.config))
    np.testing.assert_allclose(sliced, repaired.logits(masked), rtol=1e-5, atol=1e-5)


def test_removed_neurons_need_not_be_computed(
    model: Decoder,
    windows: NDArray[np.int32],
    plan: PruningPlan,
    found: Reconstruction,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 83 neurons a fit has 56; with all of them it comes to the same."""
    assert {reconstruction.fitted_neurons(mask, 1).size for mask in plan.masks(model.config)} == {56}
    monkeypatch.setattr(reconstruction, "WIDTH_MULTIPLE", 83)
    whole = reconstruct(model, windows, plan, **FIT)
    for one, other in zip(fits(found), fits(whole), strict=True):
        assert one.error == pytest.approx(other.error, rel=1e-3)
        assert one.error_without == pytest.approx(other.error_without, rel=1e-5)
    for name, array in found.parameters.items():
        off = np.abs(array - whole.parameters[name]) / np.sqrt(np.mean(np.square(array)))
        assert off.mean() < 1e-3, name


@pytest.mark.parametrize(
    ("kept", "devices", "expected"), [(1, 1, 8), (8, 1, 8), (9, 1, 16), (20, 1, 24), (9, 6, 24), (24, 1, 24)]
)
def test_a_fit_is_of_the_kept_neurons_and_a_few_more(kept: int, devices: int, expected: int) -> None:
    mask = np.zeros(24, np.float32)
    mask[np.random.default_rng(kept).permutation(24)[:kept]] = 1
    neurons = reconstruction.fitted_neurons(mask, devices)
    assert neurons.dtype == np.int32
    assert len(set(neurons.tolist())) == neurons.size == expected
    assert np.array_equal(neurons[:kept], np.flatnonzero(mask))


def test_a_layer_that_stays_whole_keeps_its_bits(model: Decoder, windows: NDArray[np.int32]) -> None:
    plan = make_plan(score(model), width=40, layers=[1])
    found = reconstruct(model, windows, plan, **FIT)
    assert [fit is None for fit in found.fits] == [True, False, True]
    assert set(found.parameters) == {f"layers.1.mlp.{name}" for name in MATRICES}
    assert found.summary()["held_out_error"][0] is None


def test_the_same_call_gives_the_same_bits(
    model: Decoder, windows: NDArray[np.int32], plan: PruningPlan, found: Reconstruction
) -> None:
    again = reconstruct(model, windows, plan, **FIT)
    for name, array in again.parameters.items():
        assert np.array_equal(array, found.parameters[name])
    assert again.fits == found.fits


def test_later_layers_give_back_what_earlier_ones_lost(
    model: Decoder, windows: NDArray[np.int32], found: Reconstruction
) -> None:
    """The pruned stream comes from the reconstructed layers before: the last one is fitted to what they leave."""
    alone = reconstruct(model, windows, make_plan(score(model), prune_percent=40, layers=[2]), **FIT)
    last, other = found.mlps[2], alone.mlps[2]
    assert last is not None
    assert other is not None
    assert not np.allclose(last.up_proj, other.up_proj, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "granite", "qwen3"])
def test_every_family_is_fitted_through_its_own_layers(windows: NDArray[np.int32], family: str) -> None:
    """Norms behind the MLP, scaled branches and other activations are the layer's own."""
    config, _ = read_config(CONFIGS[family])
    model = Decoder(config, rngs=nnx.Rngs(0))
    plan = make_plan(score(model), prune_percent=40)
    found = reconstruct(model, windows, plan, **FIT)
    _, held_out = divide_windows(windows)
    pruned = Pruned(plan, reconstruction=found).apply(model)
    for i, fit in enumerate(fits(found)):
        assert fit.error <= fit.error_without
        assert fit.error == pytest.approx(held_out_error(model, pruned, held_out, i), rel=1e-2)
    assert fits(found)[0].error < fits(found)[0].error_without


def test_bfloat16_stays_on_disk_too(
    windows: NDArray[np.int32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hf_config(torch_dtype="bfloat16", intermediate_size=83, num_attention_heads=8)
    model = convert.load(write_folder(tmp_path / "bf16", config, hf_tensors(config, "bfloat16"))).model
    monkeypatch.setattr(kept_layers.KeptLayers, "clear", lambda _: None)
    fit_again = functools.partial(
        reconstruct, model, windows, make_plan(score(model), prune_percent=40), folder=tmp_path / "kept", **FIT
    )
    found = fit_again()
    assert {str(array.dtype) for array in found.parameters.values()} == {"bfloat16"}
    assert all(fit.error < fit.error_without for fit in fits(found))
    monkeypatch.setattr(reconstruction, "reconstruct_layer", lambda *_, **__: pytest.fail("fitted again"))
    again = fit_again()
    for name, array in again.parameters.items():
        assert array.dtype == jnp.bfloat16
        assert np.array_equal(array, found.parameters[name])


# ------------------------------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mesh_gives_what_one_device_does(
    model: Decoder, windows: NDArray[np.int32], plan: PruningPlan, found: Reconstruction, shape: MeshShape
) -> None:
    sharded = shard_model(model, make_mesh(shape, model.config.num_key_value_heads))
    many = reconstruct(sharded, windows, plan, **FIT)
    for one, other in zip(fits(found), fits(many), strict=True):
        assert other.error == pytest.approx(one.error, rel=1e-2)
        assert other.error_without == pytest.approx(one.error_without, rel=1e-3)
    for i, (a, b, layer) in enumerate(zip(found.mlps, many.mlps, sharded.layers, strict=True)):
        assert a is not None
        assert b is not None
        for name in MATRICES:
            old, new = getattr(a, name), getattr(b, name)
            assert new.sharding.is_equivalent_to(getattr(layer.mlp, name)[...].sharding, 2)
            cut = tuple(slice(size) for size in old.shape)
            scale = float(np.sqrt(np.mean(np.asarray(old) ** 2)))
            # Adam divides gradients by their size: where there is next to none, rounding decides a step.
            off = np.abs(np.asarray(new)[cut] - old) / scale
            assert off.mean() < 1e-2, (i, name)


@pytest.mark.parametrize("shape", [MeshShape(8, 1), MeshShape(2, 2)], ids=str)
def test_a_step_is_of_the_same_windows_on_every_mesh(
    model: Decoder,
    windows: NDArray[np.int32],
    plan: PruningPlan,
    shape: MeshShape,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five windows a step, which no number of replicas divides."""
    monkeypatch.setattr(reconstruction, "STEP_TOKENS", 80)
    one = reconstruct(model, windows, plan, passes=4, learning_rate=0.02)
    sharded = shard_model(model, make_mesh(shape, model.config.num_key_value_heads))
    many = reconstruct(sharded, windows, plan, passes=4, learning_rate=0.02)
    assert one.steps == many.steps == 4 * 3
    for a, b in zip(fits(one), fits(many), strict=True):
        assert b.error == pytest.approx(a.error, rel=1e-2)
        assert a.error < a.error_without


# --------------------------------------------------------------------------------------------------------- bad input


def test_a_fit_that_diverges_leaves_the_layer_and_is_named(
    model: Decoder, windows: NDArray[np.int32], plan: PruningPlan
) -> None:
    downs = compensate(model, gram_matrices(model, windows), [plan])[0].down_projs
    found = reconstruct(model, windows, plan, downs, passes=6, learning_rate=1e4)
    for i, (mlp, fit) in enumerate(zip(found.mlps, fits(found), strict=True)):
        assert mlp is not None
        dense = model.layers[i].mlp
        left_out = dense.down_proj[...] * plan.masks(model.config)[i]
        assert np.array_equal(mlp.down_proj, downs[i] if fit.error < fit.error_without else left_out)
        assert np.array_equal(mlp.up_proj, dense.up_proj[...])
        assert fit.diverged_at is not None
        assert 1 <= fit.diverged_at <= found.steps
    assert [entry["layer"] for entry in found.summary()["diverged"]] == [0, 1, 2]
    step = fits(found)[1].diverged_at
    assert found.notes()[1] == (
        f"the reconstruction of layer 1 diverged at step {step} of 6: the layer is left as it was pruned"
    )


def test_too_little_text_is_refused(model: Decoder, windows: NDArray[np.int32], plan: PruningPlan) -> None:
    with pytest.raises(RequestError, match="1 calibration window is too few to fit to some and hold one out"):
        reconstruct(model, windows[:1], plan)
    training, held_out = divide_windows(windows[:2])
    assert (len(training), len(held_out)) == (1, 1)
    training, held_out = divide_windows(windows)
    assert np.array_equal(held_out, windows[[7, 15]])
    assert len(training) == 14


def test_a_plan_for_another_model_is_refused(windows: NDArray[np.int32], plan: PruningPlan, tmp_path: Path) -> None:
    narrow = convert.load(write_folder(tmp_path / "narrow", {**CONFIG, "intermediate_size": 80})).model
    with pytest.raises(RequestError, match="the plan was made for"):
        reconstruct(narrow, windows, plan)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("hybrid+reconstruct", Method("hybrid", reconstructs=True)),
        ("hybrid+ls+reconstruct", Method("hybrid", is_compensated=True, reconstructs=True)),
        (
            "ppm+global+cv-least-squares+reconstruct+sequential",
            Method("ppm", "global", 0.2, True, True, 0, True, True),
        ),
    ],
)
def test_methods_in_one_word(text: str, method: Method) -> None:
    assert Method.parse(text) == method
    assert Method.parse(str(method)) == method
    assert method.needs_text


# ----------------------------------------------------------------------------------------------- interrupted, resumed


def test_an_interrupted_fit_goes_on_behind_its_last_layer(
    model: Decoder,
    windows: NDArray[np.int32],
    plan: PruningPlan,
    found: Reconstruction,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class InterruptionError(Exception):
        pass

    def kill(i: int) -> None:
        if i == 1:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        reconstruct(model, windows, plan, **FIT, folder=tmp_path, on_layer=kill)
    fitted = []
    whole = reconstruction.reconstruct_layer
    monkeypatch.setattr(
        reconstruction, "reconstruct_layer", lambda *args, **rest: fitted.append(1) or whole(*args, **rest)
    )
    again = reconstruct(model, windows, plan, **FIT, folder=tmp_path)
    assert len(fitted) == 1
    assert again.fits == found.fits
    for name, array in again.parameters.items():
        assert np.array_equal(array, found.parameters[name])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["other settings", "a damaged file"])
def test_what_was_kept_of_other_work_or_is_damaged_is_not_used(
    model: Decoder,
    windows: NDArray[np.int32],
    plan: PruningPlan,
    found: Reconstruction,
    tmp_path: Path,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept_layers.KeptLayers, "clear", lambda _: None)
    if damage == "other settings":
        reconstruct(model, windows, plan, **{**FIT, "learning_rate": 0.01}, folder=tmp_path)
        reconstruct(model, windows[:-1], plan, **FIT, folder=tmp_path)
    else:
        reconstruct(model, windows, plan, **FIT, folder=tmp_path)
        for path in tmp_path.rglob("layer-*"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    again = reconstruct(model, windows, plan, **FIT, folder=tmp_path)
    assert again.fits == found.fits


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text."""
    folder = tmp_path_factory.mktemp("command")
    config = hf_config(
        vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1, intermediate_size=83, max_position_embeddings=64
    )
    write_tokenizer(write_folder(folder / "model", config, hf_tensors(config)))
    (folder / "text.txt").write_text(TEXT)
    return folder


def options(folder: Path) -> list[object]:
    text = ["--calibration-data", folder / "text.txt", "--calibration-tokens", 640, "--sequence-length", 32]
    return ["--model", folder / "model", *text, "--mesh", "data=1,model=1"]


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
@pytest.mark.parametrize("repair", ["reconstruct", "least-squares+reconstruct", "cv-least-squares+reconstruct"])
def test_the_command_writes_what_the_library_does_and_records_it(
    folder: Path, tmp_path: Path, capsys: Capture, repair: str, stream: bool
) -> None:
    asked = ("--prune-percent", 40, "--criterion", "hybrid", "--compensate", repair)
    done = report(capsys, *options(folder), *asked, "--output", tmp_path / "out")
    text = {"calibration": [str(folder / "text.txt")], "calibration_tokens": 640, "sequence_length": 32}
    pruned = prune_model(convert.load(folder / "model", stream=stream), f"hybrid+{repair}", prune_percent=40, **text)
    convert.save(pruned, tmp_path / "library")
    for name in ("model.safetensors", "gluprune_history.json"):
        assert (tmp_path / "library" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    (record,) = convert.load(tmp_path / "out").history
    found = record["reconstruction"]
    assert found == done["reconstruction"]
    assert found["method"] == "local reconstruction"
    pairs = zip(found["held_out_error"], found["held_out_error_without"], strict=True)
    assert all(after <= before for after, before in pairs)
    assert ("compensation" in record) == ("least-squares" in repair)
    assert record["request"]["compensate"] == repair
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- Reconstruction: local reconstruction of gate, up and down projections" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 50


def test_prune_model_goes_on_from_the_layers_in_its_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {"calibration": [folder / "text.txt"], "calibration_tokens": 640, "sequence_length": 32}
    asked = {**text, "method": "hybrid+reconstruct", "prune_percent": 40, "cache": tmp_path}
    dense, whole, fitted = convert.load(folder / "model"), reconstruction.reconstruct_layer, []

    def fit(*args: Any, **rest: Any) -> Any:
        if len(fitted) == 2:
            raise KeyboardInterrupt
        fitted.append(1)
        return whole(*args, **rest)

    monkeypatch.setattr(reconstruction, "reconstruct_layer", fit)
    with pytest.raises(KeyboardInterrupt):
        prune_model(dense, **asked)
    fitted.clear()
    again = prune_model(dense, **asked)
    assert len(fitted) == dense.config.num_hidden_layers - 2
    monkeypatch.setattr(reconstruction, "reconstruct_layer", whole)
    assert again.history == prune_model(dense, **asked | {"cache": None}).history


def test_a_plan_is_replayed_with_its_repair_and_not_without_text(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    repair = ("--compensate", "reconstruct")
    report(capsys, *options(folder), "--prune-percent", 40, *repair, "--output", tmp_path / "out")
    plan = tmp_path / "out" / "gluprune_plan.json"
    argv = ("--model", folder / "model", "--plan", plan, "--output", tmp_path / "again")
    status, _, err = run(capsys, *argv)
    assert (status, "refit them again with --compensate reconstruct and --calibration-data TEXT" in err) == (2, True), (
        err
    )
    status, _, err = run(capsys, *argv, *repair)
    assert (status, "reconstruction runs the model on calibration text" in err) == (2, True), err
    report(capsys, *options(folder), "--plan", plan, "--output", tmp_path / "again", *repair)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]


def test_sequential_pruning_may_be_reconstructed(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    asked = (
        "--prune-percent",
        40,
        "--criterion",
        "hybrid",
        "--compensate",
        "least-squares+reconstruct",
        "--sequential",
    )
    done = report(capsys, *options(folder), *asked, "--output", tmp_path / "out")
    assert done["compensation"]["in_order"] is True
    assert len(done["reconstruction"]["held_out_error"]) == 3


def test_the_command_names_the_layers_that_diverged(
    folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging = functools.partial(reconstruct, learning_rate=1e4)
    monkeypatch.setattr("gluprune_jax.pruning.chooser.reconstruct", diverging)
    asked = ("--prune-percent", 40, "--compensate", "reconstruct", "--output", tmp_path / "out")
    status, _, err = run(capsys, *options(folder), *asked)
    assert (status, "the reconstruction of layer 2 diverged at step" in err) == (0, True), err
    assert "left as pruned: layers [0, 1, 2]" in (tmp_path / "out" / "README.md").read_text()
