"""Scores: exact where they are promised exact, the reference's where there is one, the same bits wherever computed."""

import copy
import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray
from tiny_config import tiny_config

import convert
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model
from gluprune_jax.pruning.criteria import WEIGHT_CRITERIA, pairwise_sum, peak_to_peak
from gluprune_jax.pruning.scores import fingerprint, score, select_neurons

CONFIG = tiny_config(
    hidden_size=24, intermediate_sizes=(40, 33), num_attention_heads=2, num_key_value_heads=1, head_dim=4
)
MATRICES = ("gate_proj", "up_proj", "down_proj")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
PERCENTAGES = (10, 20, 30, 40, 50, 60)
# How far optipfair's float32 sums and ours may lie apart; Peak-to-Peak Magnitude sums nothing.
TOLERANCE = {"ppm": 0.0, "vow": 1e-5, "pon": 1e-5, "l2": 1e-5}

all_criteria = pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def random_matrices(F: int, D: int, dtype: str, seed: int = 0) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    return tuple((0.02 * random.standard_normal((F, D))).astype(DTYPES[dtype]) for _ in range(2))


def make_model(config: ModelConfig = CONFIG, dtype: Any = jnp.float32, seed: int = 0) -> Decoder:
    """A model of MLP weights alone, of eight significant bits: bfloat16, float16 and float32 hold them all."""
    model = abstract_model(config)
    random = np.random.default_rng(seed)
    for layer, width in zip(model.layers, config.intermediate_sizes, strict=True):
        for name in MATRICES:
            shape = (width, config.hidden_size)
            values = random.choice([-1, 1], shape) * random.integers(1, 256, shape) / 1024
            padded = np.pad(values, ((0, layer.mlp.gate_proj.shape[0] - width), (0, 0)))
            weights = (padded.T if name == "down_proj" else padded).astype(dtype)
            getattr(layer.mlp, name).set_value(jnp.asarray(weights))
    return model


def shard(model: Decoder) -> Decoder:
    """Spreads the neurons over eight devices."""
    mesh = Mesh(np.array(jax.devices()), ("neurons",))
    for layer in model.layers:
        for name, spec in zip(MATRICES, [("neurons",), ("neurons",), (None, "neurons")], strict=True):
            parameter = getattr(layer.mlp, name)
            parameter.set_value(jax.device_put(parameter[...], NamedSharding(mesh, PartitionSpec(*spec))))
    return model


def change(model: Decoder, layer: int, name: str, index: tuple[int, int], value: float) -> None:
    parameter = getattr(model.layers[layer].mlp, name)
    weights = np.array(parameter[...])
    weights[index] = value
    parameter.set_value(jnp.asarray(weights))


def bits(scores: Any) -> list[bytes]:
    return [np.asarray(values).tobytes() for values in scores]


# ------------------------------------------------------------------------------------------------- the numbers


def float64_reference(criterion: str, gate: NDArray[Any], up: NDArray[Any]) -> NDArray[np.float64]:
    gate, up = gate.astype(np.float64), up.astype(np.float64)
    if criterion == "ppm":
        return np.ptp(gate, axis=1) + np.ptp(up, axis=1)  # max + |min| in a row of both signs
    if criterion == "vow":
        return gate.var(axis=1, ddof=1) + up.var(axis=1, ddof=1)
    if criterion == "pon":
        return np.linalg.norm(gate, 1, axis=1) * np.linalg.norm(up, 1, axis=1)
    return np.linalg.norm(gate, axis=1) + np.linalg.norm(up, axis=1)


@all_criteria
@both_dtypes
@pytest.mark.parametrize("D", [3, 576, 2048, 3000])
def test_scores_are_within_1e_6_of_float64(criterion: str, dtype: str, D: int) -> None:
    gate, up = random_matrices(200, D, dtype)
    gate += gate.dtype.type(0.05)  # away from zero mean, where a one-pass variance would lose digits
    up[0] = up[1]
    up[2] *= up.dtype.type(1000)
    for w in (gate, up):
        w[:, 0], w[:, 1] = 1, -1  # of both signs, as the reference for ppm wants it
    scores = jax.jit(WEIGHT_CRITERIA[criterion])(gate, up)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, float64_reference(criterion, gate, up), rtol=1e-6)


@both_dtypes
def test_ppm_is_grouped_as_the_paper_writes_it(dtype: str) -> None:
    gate, up = random_matrices(3000, 64, dtype)
    f32 = np.float32
    extent = [w.max(1).astype(f32) + np.abs(w.min(1).astype(f32)) for w in (gate, up)]
    scores = np.asarray(jax.jit(WEIGHT_CRITERIA["ppm"])(gate, up))
    assert scores.tobytes() == (extent[0] + extent[1]).tobytes()
    left_to_right = gate.max(1).astype(f32) + np.abs(gate.min(1).astype(f32)) + up.max(1).astype(f32)
    left_to_right += np.abs(up.min(1).astype(f32))
    assert dtype == "bfloat16" or (scores != left_to_right).any()


def test_ppm_is_not_the_span_of_a_row_of_one_sign() -> None:
    row = np.array([[2, 3, 5.0]], np.float32)
    assert WEIGHT_CRITERIA["ppm"](row, -row) == 7 + 3  # (5 + |2|) + (-2 + |-5|)


# Sums of these neither overflow nor become subnormal, which compiled code may flush to zero.
floats = st.floats(2**-40, 2**40, width=32) | st.floats(-(2**40), -(2**-40), width=32) | st.sampled_from([0.0, -0.0])
# Large and small, of both signs, in one row: what makes the order of a sum matter.
adversarial = arrays(np.float32, (2, 3, 21), elements=floats)


@settings(max_examples=60, deadline=None)
@given(adversarial)
def test_a_sum_is_the_tree_of_halves(x: NDArray[np.float32]) -> None:
    def tree(row: list[np.float32]) -> np.float32:
        half = len(row) // 2
        return row[0] if len(row) == 1 else tree([a + b for a, b in zip(row[:half], row[half:], strict=True)])

    rows = x.reshape(6, 21)
    expected = np.array([tree([*row, *np.zeros(32 - 21, np.float32)]) for row in rows])
    assert np.asarray(pairwise_sum(jnp.asarray(rows))).tobytes() == expected.tobytes()
    exact = np.array([math.fsum(row) for row in rows.tolist()])
    # log2(32) additions of half a unit in the last place each.
    assert (np.abs(expected - exact) <= 5.01 * 2.0**-24 * np.abs(rows.astype(float)).sum(1)).all()


@pytest.mark.parametrize("D", [1, 2, 3, 4, 5, 575, 576, 1023, 1024, 1025])
def test_a_sum_counts_every_element_once(D: int) -> None:
    powers = np.arange(1, D + 1)
    assert pairwise_sum(jnp.asarray(powers, jnp.float32)) == D * (D + 1) // 2


# ------------------------------------------------------------------------------- the same bits wherever computed


@all_criteria
@settings(max_examples=50, deadline=None)
@given(weights=adversarial, use_bfloat16=st.booleans())
def test_eager_compiled_and_chunked_scores_of_adversarial_weights_have_the_same_bits(
    criterion: str, weights: NDArray[np.float32], use_bfloat16: bool
) -> None:
    function = WEIGHT_CRITERIA[criterion]
    gate, up = jnp.asarray(weights, jnp.bfloat16 if use_bfloat16 else jnp.float32)
    whole = np.asarray(jax.jit(function)(gate, up))
    assert np.asarray(function(gate, up)).tobytes() == whole.tobytes()
    chunks = [np.asarray(jax.jit(function)(gate[part], up[part])) for part in (slice(0, 1), slice(1, 3))]
    assert np.concatenate(chunks).tobytes() == whole.tobytes()


@all_criteria
@both_dtypes
def test_chunks_and_shards_of_an_odd_width_give_the_same_bits(criterion: str, dtype: str) -> None:
    gate, up = random_matrices(7373, 300, dtype)
    compiled = jax.jit(WEIGHT_CRITERIA[criterion])
    whole = np.asarray(compiled(gate, up))
    assert np.asarray(WEIGHT_CRITERIA[criterion](jnp.asarray(gate), jnp.asarray(up))).tobytes() == whole.tobytes()
    chunks = [np.asarray(compiled(gate[at : at + 101], up[at : at + 101])) for at in range(0, 7373, 101)]
    assert np.concatenate(chunks).tobytes() == whole.tobytes()

    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    for spec in (PartitionSpec(("a", "b")), PartitionSpec("a", "b")):
        padded = (jax.device_put(np.pad(w, ((0, 3), (0, 0))), NamedSharding(mesh, spec)) for w in (gate, up))
        assert np.asarray(compiled(*padded))[:7373].tobytes() == whole.tobytes(), spec


@all_criteria
@both_dtypes
def test_a_model_scores_the_same_on_one_device_and_on_eight(criterion: str, dtype: str) -> None:
    config = dataclasses.replace(CONFIG, hidden_size=2048, intermediate_sizes=(613, 320))
    padded = dataclasses.replace(config, width_multiple=8)
    one = score(make_model(config, DTYPES[dtype]), criterion)
    eight = score(shard(make_model(padded, DTYPES[dtype])), criterion)
    assert bits(eight.values) == bits(one.values)
    assert eight == dataclasses.replace(one, values=eight.values)
    assert one.weights_dtype == dtype
    assert one.intermediate_sizes == (613, 320)
    assert len({len(set(values.tolist())) for values in one.values}) == 2


# ------------------------------------------------------------------------------------------------- invariances


@all_criteria
@both_dtypes
def test_moving_neurons_moves_their_scores(criterion: str, dtype: str) -> None:
    gate, up = random_matrices(257, 96, dtype)
    order = np.random.default_rng(1).permutation(257)
    function = jax.jit(WEIGHT_CRITERIA[criterion])
    assert np.array_equal(function(gate[order], up[order]), np.asarray(function(gate, up))[order])


@all_criteria
def test_signs_and_the_roles_of_gate_and_up_do_not_matter(criterion: str) -> None:
    gate, up = random_matrices(500, 96, "float32")
    function = jax.jit(WEIGHT_CRITERIA[criterion])
    scores = np.asarray(function(gate, up))
    assert np.array_equal(function(-gate, up), scores)
    assert np.array_equal(function(gate, -up), scores)
    assert np.array_equal(function(up, gate), scores)


def test_ppm_does_not_depend_on_the_order_within_a_row() -> None:
    gate, up = random_matrices(500, 96, "float32")
    order = np.random.default_rng(1).permutation(96)
    assert np.array_equal(WEIGHT_CRITERIA["ppm"](gate[:, order], up), WEIGHT_CRITERIA["ppm"](gate, up))


@all_criteria
@settings(max_examples=20, deadline=None)
@given(exponent=st.integers(-8, 8))
def test_scaling_by_a_power_of_two_scales_scores_exactly(criterion: str, exponent: int) -> None:
    gate, up = random_matrices(64, 96, "float32")
    scale = np.float32(2.0**exponent)
    degree = {"ppm": 1, "vow": 2, "pon": 2, "l2": 1}[criterion]
    function = jax.jit(WEIGHT_CRITERIA[criterion])
    assert np.array_equal(function(gate * scale, up * scale), np.asarray(function(gate, up)) * scale**degree)


# ---------------------------------------------------------------------------------------------------- optipfair


def optipfair_kept(percent: int, scores: Any) -> NDArray[np.int64]:
    """Optipfair's own choice from its own scores, on an MLP whose weights are the neurons' indices."""
    import torch
    from optipfair.pruning.mlp_glu import prune_neuron_pairs

    class MLP(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj = self.up_proj = torch.nn.Linear(1, len(scores), bias=False)
            self.down_proj = torch.nn.Linear(len(scores), 1, bias=False)
            self.down_proj.weight.data = torch.arange(len(scores), dtype=torch.float32)[None]

    _, _, down, width = prune_neuron_pairs(MLP(), percent, importance_fn=lambda gate, up: scores)
    kept = down.weight.data[0].long().numpy()
    assert len(kept) == width
    return kept


def assert_same_but_for_ties(ours: NDArray[Any], theirs: NDArray[Any], scores: NDArray[Any], tolerance: float) -> None:
    """Two choices of the highest `scores` differ at most in neurons that tie at the threshold."""
    assert len(ours) == len(theirs) == len(set(ours)) == len(set(theirs))
    threshold = np.sort(scores)[-len(ours)]
    disputed = scores[np.setxor1d(ours, theirs)]
    assert (np.abs(disputed - threshold) <= 2 * tolerance * threshold).all()


@pytest.fixture
def optipfair() -> Any:
    optipfair = pytest.importorskip("optipfair", reason="the reference (pip install gluprune-jax[parity])")
    assert optipfair.__version__ == "0.4.2"
    # It reports every call at INFO.
    logging.getLogger("optipfair").setLevel(logging.WARNING)
    return optipfair


@pytest.mark.torch
@pytest.mark.real_model
@all_criteria
def test_the_demo_model_scores_and_keeps_as_optipfair_does(
    optipfair: Any, demo: convert.Checkpoint, criterion: str
) -> None:
    import torch

    scores = score(demo.model, criterion)
    compare = optipfair.pruning.mlp_glu.IMPORTANCE_FUNCTIONS[criterion.upper()]
    for layer, ours in zip(demo.model.layers, scores.values, strict=True):
        gate, up = (torch.from_numpy(np.array(w[...])) for w in (layer.mlp.gate_proj, layer.mlp.up_proj))
        theirs = compare(gate, up)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=TOLERANCE[criterion], atol=0)
        np.testing.assert_allclose(ours, float64_reference(criterion, gate.numpy(), up.numpy()), rtol=1e-6)
        for percent in PERCENTAGES:
            kept = select_neurons(ours, 1536 - 1536 * percent // 100)
            assert_same_but_for_ties(kept, optipfair_kept(percent, theirs), ours, TOLERANCE[criterion])


@pytest.mark.torch
@all_criteria
@both_dtypes
def test_optipfair_prunes_a_random_model_to_the_same_neurons(
    optipfair: Any, tmp_path: Path, criterion: str, dtype: str
) -> None:
    """Through both front doors: a saved transformers model, and `prune_model` as in optipfair's README."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=200,
        intermediate_size=1111,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    dense = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    dense.save_pretrained(tmp_path / "model")
    scores = score(convert.load(str(tmp_path / "model")).model, criterion)
    assert scores.weights_dtype == dtype

    compute = optipfair.pruning.mlp_glu.IMPORTANCE_FUNCTIONS[criterion.upper()]
    for layer, ours in zip(dense.model.layers, scores.values, strict=True):
        # Pruning casts weights of any dtype to float32 before it scores them, as we do. (The same function called
        # on bfloat16 tensors rounds to bfloat16 at every step; optipfair never calls it so.)
        theirs = compute(layer.mlp.gate_proj.weight.data.float(), layer.mlp.up_proj.weight.data.float())
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=TOLERANCE[criterion], atol=0)

    for percent in PERCENTAGES:
        pruned = copy.deepcopy(dense)  # optipfair prunes in place
        for layer in pruned.model.layers:
            # Static criteria do not read down_proj: two rows carry the neuron's index through the pruning,
            # in base 128 because bfloat16 counts to 256.
            index = torch.arange(1111)
            layer.mlp.down_proj.weight.data[0] = index // 128
            layer.mlp.down_proj.weight.data[1] = index % 128
        pruned = optipfair.prune_model(
            pruned,
            pruning_type="MLP_GLU",
            neuron_selection_method=criterion.upper(),
            pruning_percentage=percent,
            show_progress=False,
        )
        for layer, ours in zip(pruned.model.layers, scores.values, strict=True):
            carried = layer.mlp.down_proj.weight.data.float().numpy()
            theirs = (128 * carried[0] + carried[1]).astype(int)
            kept = select_neurons(ours, 1111 - int(1111 * percent / 100))
            assert_same_but_for_ties(kept, theirs, ours, TOLERANCE[criterion])


# ----------------------------------------------------------------------------------------------------- selection

# Few distinct values: ties everywhere, also between the two zeros.
tied_scores = st.lists(st.sampled_from([-2.0, -0.0, 0.0, 1.0, 1.5, 1e30]), min_size=1, max_size=40)


@given(tied_scores, st.data())
def test_the_highest_are_kept_and_of_equals_the_lower_index(scores: list[float], data: st.DataObject) -> None:
    width = data.draw(st.integers(1, len(scores)))
    kept = select_neurons(np.array(scores, np.float32), width)
    assert kept.tolist() == sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:width])
    assert kept.dtype == np.int32


@given(tied_scores, st.data())
def test_narrower_choices_are_nested_and_two_steps_equal_one(scores: list[float], data: st.DataObject) -> None:
    values = np.array(scores, np.float32)
    wide = data.draw(st.integers(1, len(scores)))
    narrow = data.draw(st.integers(1, wide))
    first = select_neurons(values, wide)
    assert set(select_neurons(values, narrow)) <= set(first)
    assert np.array_equal(first[select_neurons(values[first], narrow)], select_neurons(values, narrow))
    assert np.array_equal(select_neurons(values[first], wide), np.arange(wide))


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=30, unique=True), st.data())
def test_without_ties_the_choice_follows_the_neurons_when_they_move(scores: list[float], data: st.DataObject) -> None:
    values = np.array(scores, np.float32)
    width = data.draw(st.integers(1, len(scores)))
    order = np.array(data.draw(st.permutations(range(len(scores)))))
    assert set(order[select_neurons(values[order], width)]) == set(select_neurons(values, width))


# -------------------------------------------------------------------------------------------------- whole models


def test_scores_carry_what_a_plan_needs() -> None:
    seen: list[int] = []
    scores = score(make_model(), on_layer=seen.append)
    assert seen == [0, 1]
    assert (scores.criterion, scores.hidden_size, scores.weights_dtype) == ("ppm", 24, "float32")
    assert scores.intermediate_sizes == (40, 33)
    assert all(values.dtype == np.float32 for values in scores.values)


def test_mixed_dtypes_are_said_to_be_mixed() -> None:
    model = make_model()
    gate = model.layers[1].mlp.gate_proj
    gate.set_value(gate[...].astype(jnp.bfloat16))
    assert score(model).weights_dtype == "mixed"
    assert bits(score(model).values) == bits(score(make_model()).values)


def test_the_criterion_may_be_a_function() -> None:
    def first_gate_weight(gate: jax.Array, up: jax.Array) -> jax.Array:
        return gate[:, 0]

    model = make_model(dataclasses.replace(CONFIG, width_multiple=16), jnp.bfloat16)
    scores = score(model, first_gate_weight)
    assert scores.criterion == "first_gate_weight"
    for layer, values, width in zip(model.layers, scores.values, (40, 33), strict=True):
        assert values.dtype == np.float32
        assert np.array_equal(values, np.asarray(layer.mlp.gate_proj[...], np.float32)[:width, 0])
    assert bits(score(model, WEIGHT_CRITERIA["vow"]).values) == bits(score(model, "vow").values)


def test_an_unknown_criterion_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown criterion 'best'; known are ppm, vow, pon, l2"):
        score(make_model(), "best")


BAD_SCORES: dict[str, Callable[[jax.Array, jax.Array], Any]] = {
    "one for each weight": lambda gate, up: gate,
    "one for all": lambda gate, up: gate.sum(),
    "too few": lambda gate, up: gate[1:, 0],
    "NaN": lambda gate, up: gate[:, 0].at[3].set(jnp.nan),
    "Inf": lambda gate, up: gate[:, 0].at[3].set(jnp.inf),
}


@pytest.mark.parametrize("what", BAD_SCORES)
def test_scores_that_cannot_rank_are_refused(what: str) -> None:
    with pytest.raises(
        OperationError,
        match=r"criterion .* gave layer 0 (float32 scores of shape .*, not 40 numbers|1 scores that are not finite)",
    ):
        score(make_model(), BAD_SCORES[what])


def test_weights_whose_scores_overflow_are_refused() -> None:
    model = make_model()
    change(model, 1, "up_proj", (5, 0), 3e38)
    change(model, 1, "up_proj", (5, 1), -3e38)
    with pytest.raises(OperationError, match="criterion 'ppm' gave layer 1"):
        score(model)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("matrix", MATRICES)
@both_dtypes
def test_weights_that_are_not_finite_are_named(dtype: str, matrix: str, value: float) -> None:
    model = make_model(dataclasses.replace(CONFIG, width_multiple=8), DTYPES[dtype])
    change(model, 1, matrix, (20, 23), value)
    refused = f"^layer 1 has NaN or Inf weights in {matrix};"
    with pytest.raises(OperationError, match=refused):
        score(model)
    with pytest.raises(OperationError, match=refused):
        fingerprint(shard(model))


def test_all_matrices_that_are_not_finite_are_named() -> None:
    model = make_model()
    change(model, 0, "gate_proj", (0, 0), np.nan)
    change(model, 0, "down_proj", (0, 0), np.inf)
    with pytest.raises(OperationError, match="layer 0 has NaN or Inf weights in gate_proj and down_proj"):
        score(model)


def test_random_scores_are_a_seeded_baseline() -> None:
    model = make_model(CONFIG.with_layers((0, 0, 1), (4000, 4000, 33)))
    values = score(model, "random", seed=7).values
    assert bits(values) == bits(score(model, "random", seed=7).values)
    assert [len(v) for v in values] == [4000, 4000, 33]
    for v in values[:2]:
        assert ((v >= 0) & (v < 1)).all()
        assert abs(v.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(values[0], values[1])[0, 1]) < 0.06
    assert abs(np.corrcoef(values[0], score(model, "random", seed=8).values[0])[0, 1]) < 0.06


# --------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_is_of_the_values_not_of_their_storage() -> None:
    expected = fingerprint(make_model())
    assert expected.startswith("sha256:")
    assert len(expected) == len("sha256:") + 64
    padded = dataclasses.replace(CONFIG, width_multiple=8)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        assert fingerprint(make_model(dtype=dtype)) == expected
        assert fingerprint(make_model(padded, dtype)) == expected
        assert fingerprint(shard(make_model(padded, dtype))) == expected
    assert {score(make_model(), criterion).fingerprint for criterion in WEIGHT_CRITERIA} == {expected}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_changed_extreme_of_any_row_changes_the_fingerprint(data: st.DataObject) -> None:
    model = make_model()
    before = fingerprint(model)
    i, name = data.draw(st.integers(0, 1)), data.draw(st.sampled_from(MATRICES))
    neuron = data.draw(st.integers(0, CONFIG.intermediate_sizes[i] - 1))
    weights = np.asarray(getattr(model.layers[i].mlp, name)[...])
    row = weights[:, neuron] if name == "down_proj" else weights[neuron]
    at = int(data.draw(st.sampled_from([row.argmax(), row.argmin()])))
    # Outwards, by a few units in the last place of the magnitude.
    change(model, i, name, (at, neuron) if name == "down_proj" else (neuron, at), row[at] * (1 + 2**-20))
    assert fingerprint(model) != before


def test_the_fingerprint_knows_which_neuron_layer_and_matrix_a_weight_belongs_to() -> None:
    config = dataclasses.replace(CONFIG, intermediate_sizes=(40, 40))
    seen = {fingerprint(make_model(config))}
    for swap in ("neurons", "layers", "gate and up"):
        model = make_model(config)
        first, second = model.layers[0].mlp, model.layers[1].mlp
        gate, up = first.gate_proj[...], first.up_proj[...]
        if swap == "neurons":
            first.gate_proj.set_value(gate.at[jnp.array([3, 4])].set(gate[jnp.array([4, 3])]))
        elif swap == "layers":
            first.gate_proj.set_value(second.gate_proj[...])
            second.gate_proj.set_value(gate)
        else:
            first.gate_proj.set_value(up)
            first.up_proj.set_value(gate)
        seen.add(fingerprint(model))
    assert len(seen) == 4


def test_training_that_touches_all_weights_changes_the_fingerprint() -> None:
    model = make_model(dtype=jnp.bfloat16)
    before = fingerprint(model)
    random = np.random.default_rng(0)
    for layer in model.layers:
        for name in MATRICES:
            w = getattr(layer.mlp, name)
            # A fine-tune with a tiny rate: most updates are lost in bfloat16, some are not.
            update = 1e-3 * random.standard_normal(w.shape) * np.abs(np.asarray(w[...], np.float32))
            w.set_value((w[...].astype(jnp.float32) + update).astype(jnp.bfloat16))
    assert fingerprint(model) != before


def test_what_the_fingerprint_does_not_see() -> None:
    """It is of the peak-to-peak magnitudes, so what leaves them all alone passes; `ppm` cannot rank it otherwise."""
    expected = fingerprint(make_model())

    negated = make_model()
    gate = negated.layers[0].mlp.gate_proj
    gate.set_value(-gate[...])
    assert fingerprint(negated) == expected

    inside = make_model()
    row = np.asarray(inside.layers[0].mlp.up_proj[0])
    change(inside, 0, "up_proj", (0, int(np.argsort(row)[len(row) // 4])), 0.0)
    assert fingerprint(inside) == expected
    assert bits(score(inside).values) == bits(score(make_model()).values)
    assert bits(score(inside, "l2").values) != bits(score(make_model(), "l2").values)


def test_peak_to_peak_of_columns_is_that_of_the_rows_of_the_transpose() -> None:
    w = jnp.asarray(random_matrices(30, 20, "bfloat16")[0])
    assert np.array_equal(peak_to_peak(w, axis=0), peak_to_peak(w.T))
