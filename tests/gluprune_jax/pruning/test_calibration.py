"""Statistics of activations: what they count, what they do not depend on, and the criteria that look at them."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibrated import CONFIG, SHAPES, of_all
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sharded import shard_model
from tiny_models import hf_tensors, write_folder

import convert
from evals.perplexity import perplexity
from gluprune_jax.data.packing import PADDING
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.parallel.mesh import MeshShape, make_mesh
from gluprune_jax.pruning import calibration
from gluprune_jax.pruning.calibration import Stream, collect, sensitivities
from gluprune_jax.pruning.choices import is_data_driven
from gluprune_jax.pruning.criteria import CRITERIA, find_criterion, inputs_of
from gluprune_jax.pruning.scores import score
from gluprune_jax.pruning.statistics import LayerStatistics, Statistics


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return convert.load(write_folder(tmp_path_factory.mktemp("calibration") / "tiny", CONFIG)).model


@pytest.fixture(scope="module")
def windows() -> NDArray[np.int32]:
    """Five windows of 16 tokens, the last one of 9."""
    windows = np.random.default_rng(1).integers(0, 97, (5, 16)).astype(np.int32)
    windows[-1, 9:] = PADDING
    return windows


# ------------------------------------------------------------------------------------------------------ statistics


def test_statistics_are_sums_over_real_tokens(model: Decoder, windows: NDArray[np.int32]) -> None:
    statistics = collect(model, windows)
    for layer, a in zip(statistics.layers, of_all(model, windows), strict=True):
        assert layer.tokens == len(a) == 4 * 16 + 9
        rounding = 2e-6 * float(abs(a).sum(0).max())  # of sums in which terms cancel
        np.testing.assert_allclose(layer.squares, (a**2).sum(0), rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(layer.sums, a.sum(0), rtol=2e-5, atol=rounding)
        np.testing.assert_allclose(layer.magnitudes, abs(a).sum(0), rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(layer.activation_norm, np.sqrt((a**2).sum(0)), rtol=2e-5)
        np.testing.assert_allclose(layer.mean, a.mean(0), rtol=2e-5, atol=rounding / len(a))
        np.testing.assert_allclose(layer.mean_magnitude, abs(a).mean(0), rtol=2e-5, atol=1e-7)
        assert layer.squares.dtype == np.float32


def test_the_gram_matrix_is_that_of_the_activations(model: Decoder, windows: NDArray[np.int32]) -> None:
    stream = Stream(model, windows)
    for i, a in enumerate(of_all(model, windows)):
        _, (gram,) = stream.observe(i, folds=1)
        np.testing.assert_allclose(gram, a.T @ a, rtol=1e-4, atol=1e-4)
        stream.advance(i)


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(5)), st.sampled_from([1, 32, 2048]), st.sampled_from([0, 3]))
def test_batches_their_order_and_padding_do_not_matter(
    model: Decoder, windows: NDArray[np.int32], order: list[int], batch_tokens: int, padding: int
) -> None:
    expected = collect(model, windows, sensitivity=True)
    changed = np.pad(windows[order], ((0, 0), (0, padding)), constant_values=PADDING)
    found = collect(model, changed, batch_tokens=batch_tokens, sensitivity=True)
    for a, b in zip(expected.layers, found.layers, strict=True):
        assert a.tokens == b.tokens
        for name in ("squares", "sums", "magnitudes", "sensitivity"):
            largest = float(np.abs(getattr(a, name)).max())
            np.testing.assert_allclose(getattr(b, name), getattr(a, name), rtol=2e-5, atol=2e-6 * largest)
        assert b.influence == pytest.approx(a.influence, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_meshes_give_the_same_statistics(model: Decoder, windows: NDArray[np.int32], shape: MeshShape) -> None:
    expected = collect(model, windows, sensitivity=True)
    sharded = shard_model(model, make_mesh(shape, model.config.num_key_value_heads))
    found = collect(sharded, windows, sensitivity=True)
    assert found.fingerprint == expected.fingerprint
    for a, b in zip(expected.layers, found.layers, strict=True):
        assert b.squares.shape == (83,)
        for name in ("squares", "sums", "magnitudes", "sensitivity"):
            largest = float(np.abs(getattr(a, name)).max())
            np.testing.assert_allclose(getattr(b, name), getattr(a, name), rtol=5e-5, atol=5e-6 * largest)
    stream = Stream(sharded, windows)
    _, (gram,) = stream.observe(0, folds=1)
    assert gram is not None
    assert gram.sharding.shard_shape(gram.shape)[0] == gram.shape[0] // shape.model
    a = of_all(model, windows)[0]
    np.testing.assert_allclose(np.asarray(gram)[:83, :83], a.T @ a, rtol=1e-4, atol=1e-4)


def test_influence_is_the_angle_by_which_a_layer_turns_its_input(model: Decoder, windows: NDArray[np.int32]) -> None:
    statistics = collect(model, windows[:1])
    hidden = [np.asarray(x, np.float64) for x in residual_stream(model, windows[0])]
    for layer, x, y in zip(statistics.layers, hidden, hidden[1:], strict=False):
        cos = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        assert layer.influence == pytest.approx(float((1 - cos).mean()), rel=1e-4)


def residual_stream(model: Decoder, tokens: NDArray[np.int32]) -> list[jax.Array]:
    x = model.embed_tokens[...][tokens[None]]
    positions, stream = jnp.arange(len(tokens), dtype=jnp.int32)[None], [x[0]]
    for layer in model.layers:
        x, _ = layer(x, positions, None, (), None)
        stream.append(x[0])
    return stream


def test_the_stream_ends_in_the_models_own_loss(model: Decoder, windows: NDArray[np.int32]) -> None:
    stream = Stream(model, windows[:4], batch_tokens=32)
    for i in range(3):
        stream.advance(i)
    expected = perplexity(model, windows[:4].ravel().tolist(), sequence_length=16)
    assert math.exp(stream.loss()) == pytest.approx(expected.value, rel=1e-5)


def test_a_copied_stream_goes_its_own_way(model: Decoder, windows: NDArray[np.int32]) -> None:
    stream = Stream(model, windows)
    twin = stream.copy()
    for i, layer in enumerate(model.layers):
        twin.advance(i, jnp.zeros_like(layer.mlp.down_proj[...]))
    untouched = Stream(model, windows)
    for i in range(3):
        stream.advance(i)
        untouched.advance(i)
    assert stream.loss() == untouched.loss()
    assert twin.loss() != stream.loss()


def test_sensitivity_is_the_gradient_by_a_mask(model: Decoder, windows: NDArray[np.int32]) -> None:
    """Against the gradient of the whole model's loss, window by window."""

    def loss(masks: tuple[jax.Array, ...], tokens: jax.Array) -> jax.Array:
        hidden, _ = model(tokens[None], neuron_masks=masks)
        log_probs = jax.nn.log_softmax(model.logits(hidden)[0])
        return -jnp.take_along_axis(log_probs[:-1], tokens[1:, None], 1).sum()

    masks = tuple(jnp.ones(83) for _ in range(3))
    gradient = jax.jit(jax.grad(loss))
    grads = [gradient(masks, jnp.asarray(window[window >= 0])) for window in windows]
    expected = [np.mean([abs(np.asarray(grad[i])) for grad in grads], axis=0) for i in range(3)]
    for found, wanted in zip(sensitivities(model, windows, batch_tokens=32), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-5 * wanted.max())


def test_the_sensitivity_of_the_entropy_looks_at_no_labels(model: Decoder, windows: NDArray[np.int32]) -> None:
    def total(masks: tuple[jax.Array, ...], tokens: jax.Array) -> jax.Array:
        hidden, _ = model(tokens[None], neuron_masks=masks)
        log_probs = jax.nn.log_softmax(model.logits(hidden)[0])
        return -jnp.sum(jnp.exp(log_probs) * log_probs)

    masks = tuple(jnp.ones(83) for _ in range(3))
    gradient = jax.jit(jax.grad(total))
    grads = [gradient(masks, jnp.asarray(window[window >= 0])) for window in windows]
    expected = [np.mean([abs(np.asarray(grad[i])) for grad in grads], axis=0) for i in range(3)]
    for found, wanted in zip(sensitivities(model, windows, of_entropy=True, batch_tokens=32), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-5 * wanted.max())


# -------------------------------------------------------------------------------------------------------- criteria


def with_entropy(statistics: Statistics) -> Statistics:
    """As if the sensitivity of the entropy were that of the loss."""
    layers = [dataclasses.replace(layer, entropy_sensitivity=layer.sensitivity) for layer in statistics.layers]
    return dataclasses.replace(statistics, layers=tuple(layers))


def test_hybrid_wanda_activation_and_taylor_by_their_formulas(model: Decoder, windows: NDArray[np.int32]) -> None:
    statistics = collect(model, windows, sensitivity=True)
    for i, (layer, found) in enumerate(zip(model.layers, statistics.layers, strict=True)):
        matrices = (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        gate, up, down = (np.asarray(matrix[...], np.float64) for matrix in matrices)

        def extent(rows: NDArray[np.float64]) -> NDArray[np.float64]:
            values = rows.max(1) + abs(rows.min(1))
            return np.asarray(values / values.max())

        expected = {
            "hybrid": (extent(gate) + extent(up) + extent(down.T)) * np.sqrt(found.squares),
            "wanda": np.sqrt((down**2).sum(0)) * np.sqrt(found.squares),
            "activation": found.magnitudes / found.tokens,
            "taylor": found.sensitivity,
        }
        for name, values in expected.items():
            np.testing.assert_allclose(score(model, name, statistics=statistics).values[i], values, rtol=1e-5)


@pytest.mark.torch
def test_hybrid_is_optipfairs_on_one_batch(model: Decoder, windows: NDArray[np.int32]) -> None:
    import torch

    glu = pytest.importorskip("optipfair.pruning.mlp_glu")
    full = windows[:4]
    statistics = collect(model, full)
    scores = score(model, "hybrid", statistics=statistics)
    for layer, found, ours in zip(model.layers, statistics.layers, scores.values, strict=True):
        gate, up, down = (
            torch.from_numpy(np.asarray(matrix[...]).copy())
            for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        )
        norms = torch.from_numpy(found.activation_norm.copy())
        theirs = glu.compute_neuron_pair_importance_maw_hybrid(gate, up, down, norms)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_meshes_give_the_same_scores(model: Decoder, windows: NDArray[np.int32], shape: MeshShape) -> None:
    statistics = with_entropy(collect(model, windows, sensitivity=True))
    sharded = shard_model(model, make_mesh(shape, model.config.num_key_value_heads))
    for criterion in CRITERIA:
        one = score(model, criterion, statistics=statistics).values
        many = score(sharded, criterion, statistics=statistics).values
        assert [v.tobytes() for v in many] == [v.tobytes() for v in one], criterion


def test_a_criterion_of_ones_own(model: Decoder, windows: NDArray[np.int32], monkeypatch: pytest.MonkeyPatch) -> None:
    def kurtosis_of_down(down: jax.Array, mean_magnitude: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(down), axis=0) / (1 + mean_magnitude)

    statistics = collect(model, windows)
    expected = score(model, kurtosis_of_down, statistics=statistics)
    assert (expected.criterion, expected.calibration) == ("kurtosis_of_down", statistics.texts)
    monkeypatch.setitem(CRITERIA, "mine", kurtosis_of_down)
    found = score(model, "mine", statistics=statistics)
    assert [v.tobytes() for v in found.values] == [v.tobytes() for v in expected.values]
    assert score(model, "gluprune_jax.pruning.criteria:ppm").criterion == "gluprune_jax.pruning.criteria:ppm"
    assert find_criterion("gluprune_jax.pruning.criteria:ppm")[1] is CRITERIA["ppm"]


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("best", "unknown criterion 'best'; known are ppm"),
        ("gluprune_jax.nothing:here", "cannot be imported: No module named 'gluprune_jax.nothing'"),
        (
            "gluprune_jax.pruning.criteria:nothing",
            "cannot be imported: module 'gluprune_jax.pruning.criteria' has no attribute",
        ),
        ("gluprune_jax.pruning.criteria:INPUTS", "is no function"),
        (":x", "cannot be imported"),
        (lambda gate, bias: gate, "has the parameter 'bias'; a criterion may look at gate, up, down"),
    ],
)
def test_what_is_no_criterion_is_refused(criterion: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        find_criterion(criterion)


def test_criteria_say_what_they_look_at() -> None:
    assert inputs_of(CRITERIA["hybrid"]) == ("gate", "up", "down", "activation_norm")
    assert {name for name, function in CRITERIA.items() if is_data_driven(function)} == {
        "hybrid",
        "activation",
        "wanda",
        "taylor",
        "entropy",
    }


# ----------------------------------------------------------------------------------------------------------- files


def same(a: Statistics, b: Statistics) -> bool:
    def contents(layer: LayerStatistics) -> list[Any]:
        values = (getattr(layer, field.name) for field in dataclasses.fields(layer))
        return [value.tobytes() if isinstance(value, np.ndarray) else value for value in values]

    return (a.fingerprint, a.hidden_size, dict(a.texts), [*map(contents, a.layers)]) == (
        b.fingerprint,
        b.hidden_size,
        dict(b.texts),
        [*map(contents, b.layers)],
    )


@pytest.mark.parametrize("sensitivity", [False, True])
def test_statistics_are_saved_and_read_again(
    model: Decoder, windows: NDArray[np.int32], tmp_path: Path, sensitivity: bool
) -> None:
    statistics = collect(model, windows, names=["corpus.txt"], sensitivity=sensitivity)
    statistics = with_entropy(statistics) if sensitivity else statistics
    statistics.save(tmp_path / "s.npz")
    assert same(Statistics.load(tmp_path / "s.npz"), statistics)
    assert statistics.texts["texts"] == ["corpus.txt"]
    assert (statistics.texts["tokens"], statistics.texts["window"]) == (73, 16)
    with pytest.raises(RequestError, match="exists"):
        statistics.save(tmp_path / "s.npz")


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda data: data[:100], OperationError),
        (lambda data: b"", OperationError),
        (lambda data: b"not a file of numpy's", OperationError),
        (lambda data: data.replace(b"gluprune-statistics", b"gluprune-statistica"), OperationError),
    ],
)
def test_damaged_statistics_are_refused(
    model: Decoder,
    windows: NDArray[np.int32],
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    error: type[Exception],
) -> None:
    collect(model, windows).save(tmp_path / "s.npz")
    (tmp_path / "s.npz").write_bytes(damage((tmp_path / "s.npz").read_bytes()))
    with pytest.raises(error, match=r"s\.npz holds no statistics of `statistics_out`, or is damaged"):
        Statistics.load(tmp_path / "s.npz")
    with pytest.raises(RequestError, match="cannot read the statistics"):
        Statistics.load(tmp_path / "none.npz")


ARRAYS: list[tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = [
    (lambda head, arrays: arrays.update(squares_0=arrays["squares_0"] * 2), "its sha256 is not that of its content"),
    (lambda head, arrays: head["texts"].update(tokens=74), "its sha256 is not that of its content"),
    (lambda head, arrays: arrays.update(sensitivity_9=arrays["sums_0"]), "an unknown sensitivity_9"),
    (lambda head, arrays: arrays.pop("sums_1"), "it is without sums_1"),
    (lambda head, arrays: head.update(tokens="73"), "tokens is '73'; it must be a list"),
    (
        lambda head, arrays: head["tokens"].__setitem__(0, 73.5),
        r"tokens\[0\] is 73.5; it must be a whole number",
    ),
    (lambda head, arrays: head.pop("fingerprint"), "fingerprint is missing; it must be a text"),
    (lambda head, arrays: head["influence"].pop(), "it counts tokens of . layers and has the influence of ."),
]


@pytest.mark.parametrize(("change", "message"), ARRAYS, ids=[message for _, message in ARRAYS])
def test_other_contents_of_a_whole_file_are_named(
    model: Decoder,
    windows: NDArray[np.int32],
    tmp_path: Path,
    change: Callable[[dict[str, Any], dict[str, Any]], Any],
    message: str,
) -> None:
    path = tmp_path / "s.npz"
    collect(model, windows).save(path)
    arrays: dict[str, Any] = dict(np.load(path))
    head = json.loads(arrays.pop("head").tobytes())
    change(head, arrays)
    np.savez(path, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
    with pytest.raises(OperationError, match=rf"s\.npz holds no statistics .*: .*{message}"):
        Statistics.load(path)
    if "sha256" in message:  # as older versions wrote them
        del head["sha256"]
        np.savez(path, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
        Statistics.load(path)


# ------------------------------------------------------------------------------------------------------- bad input


def test_statistics_of_another_model_are_refused(model: Decoder, windows: NDArray[np.int32], tmp_path: Path) -> None:
    statistics = collect(model, windows)
    other = convert.load(write_folder(tmp_path / "seed", CONFIG, hf_tensors(CONFIG, seed=9))).model
    with pytest.raises(RequestError, match="the statistics are of other weights"):
        score(other, "hybrid", statistics=statistics)
    narrow = convert.load(write_folder(tmp_path / "narrow", {**CONFIG, "intermediate_size": 80})).model
    with pytest.raises(RequestError, match="of a model with 3 layers of 83 neurons at hidden size 48; this one has 3"):
        score(narrow, "hybrid", statistics=statistics)


def test_criteria_need_the_statistics_they_look_at(model: Decoder, windows: NDArray[np.int32]) -> None:
    with pytest.raises(RequestError, match="criterion 'wanda' looks at activations; give `calibration`"):
        score(model, "wanda")
    with pytest.raises(RequestError, match="criterion 'taylor' looks at the sensitivity"):
        score(model, "taylor", statistics=collect(model, windows))


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (np.zeros((0, 16), np.int32), "there is no calibration text"),
        (np.full((2, 16), PADDING, np.int32), "there is no calibration text"),
        (np.full((2, 16), 97, np.int32), "token id 97 lies outside the model's vocabulary of 97"),
        (np.zeros((1, 513), np.int32), "calibration windows of 513 tokens .*; the window of the model holds 512"),
    ],
)
def test_windows_that_make_no_sense_are_refused(model: Decoder, windows: NDArray[np.int32], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        collect(model, windows)


def test_statistics_that_are_not_numbers_name_the_layer(windows: NDArray[np.int32], tmp_path: Path) -> None:
    model = convert.load(write_folder(tmp_path / "tiny", CONFIG)).model
    up = model.layers[1].mlp.up_proj
    up.set_value(up[...].at[5, 0].set(jnp.inf))
    with pytest.raises(OperationError, match="the squares of layer 1 are not finite numbers"):
        collect(model, windows)


# ---------------------------------------------------------------------------------------------------------- memory


def test_one_program_serves_all_layers_and_one_gram_matrix_exists(
    model: Decoder, windows: NDArray[np.int32], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = calibration.observe_layer
    compiled.clear_cache()
    stream = Stream(model, windows, batch_tokens=16)
    for i in range(3):
        stream.observe(i, folds=1)
        stream.advance(i)
        grams = [array for array in jax.live_arrays() if array.shape == (83, 83)]
        assert len(grams) <= 1
    assert compiled._cache_size() == 1


def test_statistics_do_not_touch_the_model(model: Decoder, windows: NDArray[np.int32]) -> None:
    before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    collect(model, windows, sensitivity=True)
    stream = Stream(model, windows)
    stream.advance(0, jnp.zeros_like(model.layers[0].mlp.down_proj[...]))
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))] == before
