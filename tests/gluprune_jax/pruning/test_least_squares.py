"""Least-squares compensation: what it gives back, and what it promises never to do."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from calibrated import CONFIG, SHAPES, of_all, with_down_projections
from hypothesis import given, settings
from hypothesis import strategies as st
from inspecting import logits
from numpy.typing import NDArray
from sharded import shard_model
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.parallel.mesh import MeshShape, make_mesh
from gluprune_jax.pruning.calibration import collect, gram_folds, gram_matrices
from gluprune_jax.pruning.least_squares import (
    DAMPING,
    DAMPINGS,
    FOLDS,
    compensate,
    compensate_layer,
    cross_validate_layer,
    least_squares,
    prune_in_order,
)
from gluprune_jax.pruning.plan import make_plan
from gluprune_jax.pruning.scores import score, select_neurons
from gluprune_jax.pruning.slicing import slice_model

F32 = NDArray[np.float32]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return convert.load(write_folder(tmp_path_factory.mktemp("compensation") / "tiny", CONFIG)).model


@pytest.fixture(scope="module")
def windows() -> NDArray[np.int32]:
    return np.random.default_rng(2).integers(0, 97, (16, 16)).astype(np.int32)


def problem(seed: int, tokens: int, F: int = 24, D: int = 7) -> tuple[F32, F32, F32]:
    """Activations whose neurons depend on each other, a down projection, and a mask of about half."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((tokens, F)) @ rng.standard_normal((F, F)) * np.exp(rng.standard_normal(F))
    mask = (rng.random(F) < 0.5).astype(np.float32)
    mask[0], mask[1] = 1, 0
    return a.astype(np.float32), rng.standard_normal((D, F)).astype(np.float32), mask


def solved(a: F32, down: F32, mask: F32, damping: float = DAMPING) -> tuple[NDArray[np.float64], F32]:
    new, errors = least_squares(jnp.asarray(a.T @ a), jnp.asarray(down), jnp.asarray(mask), np.float32(damping))
    return np.asarray(new, np.float64), np.asarray(errors)


# --------------------------------------------------------------------------------------------------------- a layer


@pytest.mark.parametrize("seed", range(5))
def test_the_closed_form_in_float64(seed: int) -> None:
    a, down, mask = problem(seed, 400)
    new, _ = solved(a, down, mask)
    G, W = a.astype(np.float64).T @ a, down.astype(np.float64).T
    k, r = np.flatnonzero(mask), np.flatnonzero(1 - mask)
    damped = G[np.ix_(k, k)] + DAMPING * np.diagonal(G)[k].mean() * np.eye(len(k))
    expected = W[k] + np.linalg.solve(damped, G[np.ix_(k, r)] @ W[r])
    np.testing.assert_allclose(new.T[k], expected, rtol=1e-3, atol=1e-3 * abs(expected).max())
    assert not new.T[r].any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 60), st.sampled_from([1e-6, 1e-3, 1e-1]))
def test_the_output_on_the_calibration_tokens_is_never_further_off_than_without(
    seed: int, tokens: int, damping: float
) -> None:
    """With fewer tokens than neurons too, where the Gram matrix is singular."""
    a, down, mask = problem(seed, tokens)
    new, fit = compensate_layer(None, 0, jnp.asarray(a.T @ a), jnp.asarray(down), mask, damping)
    output = a.astype(np.float64) @ down.T.astype(np.float64)
    without = np.linalg.norm(output - (a * mask).astype(np.float64) @ down.T) ** 2
    error = np.linalg.norm(output - a.astype(np.float64) @ np.asarray(new, np.float64).T) ** 2
    scale = np.linalg.norm(output) ** 2
    assert error <= without * (1 + 1e-4) + 1e-6 * scale
    assert fit.error_without == pytest.approx(without / scale, rel=1e-3, abs=1e-5)
    # With few tokens and the least damping large numbers cancel, and what the float32 Gram matrix was rounded by shows:
    # at most this. With more damping it is below 1e-5.
    difference = abs(down.T.astype(np.float64) - np.asarray(new, np.float64).T)
    products = np.sum(difference * (abs(a.T.astype(np.float64) @ a) @ difference))
    rounding = np.finfo(np.float32).eps / 2 * products / scale
    assert fit.error == pytest.approx(error / scale, rel=1e-3, abs=max(1e-5, rounding))
    assert fit.damping >= damping


def test_it_finds_neurons_that_can_be_replaced() -> None:
    """A removed neuron that is a sum of kept ones costs next to nothing."""
    a, down, mask = problem(0, 400)
    mask[:], mask[5] = 1, 0
    a[:, 5] = a[:, 2] - 2 * a[:, 3]
    _, fit = compensate_layer(None, 0, jnp.asarray(a.T @ a), jnp.asarray(down), mask, 1e-6)
    assert fit.error < 1e-4 * fit.error_without


def test_nothing_changes_where_nothing_is_removed() -> None:
    a, down, mask = problem(0, 400)
    new, errors = solved(a, down, np.ones_like(mask))
    assert np.array_equal(new, down)
    assert errors[1] == errors[2] == 0


def test_neurons_that_do_nothing_are_no_trouble() -> None:
    a, down, mask = problem(0, 400)
    new, fit = compensate_layer(None, 0, jnp.zeros((24, 24)), jnp.asarray(down), mask)
    assert np.array_equal(new, down * mask)
    assert (fit.error_without, fit.error) == (0, 0)
    a[:, [0, 3, 9]] = 0
    new, fit = compensate_layer(None, 0, jnp.asarray(a.T @ a), jnp.asarray(down), mask)
    assert np.isfinite(np.asarray(new)).all()
    assert fit.error <= fit.error_without


def test_a_matrix_that_float32_cannot_factor_is_damped_more() -> None:
    """All neurons are the same one at scales that float32 cannot add."""
    rng = np.random.default_rng(0)
    a = (rng.standard_normal((50, 1)) * 10.0 ** np.linspace(0, 6, 24)).astype(np.float32)
    down, mask = rng.standard_normal((7, 24)).astype(np.float32), np.tile([1, 0], 12).astype(np.float32)
    _, fit = compensate_layer(None, 0, jnp.asarray(a.T @ a), jnp.asarray(down), mask, 1e-12)
    assert fit.damping > 1e-12
    assert fit.error <= fit.error_without


def test_a_matrix_that_cannot_be_factored_names_the_layer() -> None:
    _, down, mask = problem(0, 400)
    with pytest.raises(OperationError, match="the Gram matrix of layer 7 cannot be factored"):
        compensate_layer(None, 7, jnp.full((24, 24), jnp.nan), jnp.asarray(down), mask)


# ----------------------------------------------------------------------------------------------------- whole models


def test_the_layers_errors_are_those_of_its_activations(model: Decoder, windows: NDArray[np.int32]) -> None:
    plan = make_plan(score(model), prune_percent=40)
    (found,) = compensate(model, gram_matrices(model, windows), [plan])
    for i, (a, fit) in enumerate(zip(of_all(model, windows), found.fits, strict=True)):
        assert fit is not None
        down = np.asarray(model.layers[i].mlp.down_proj[...], np.float64)
        output, new = a @ down.T, a @ np.asarray(found.down_projs[i], np.float64).T
        kept = np.zeros(83)
        kept[plan.kept[i]] = 1
        scale = (output**2).sum()
        assert fit.error_without == pytest.approx(((output - (a * kept) @ down.T) ** 2).sum() / scale, rel=1e-3)
        assert fit.error == pytest.approx(((output - new) ** 2).sum() / scale, rel=2e-3)
        assert fit.error < fit.error_without
        assert not np.asarray(found.down_projs[i])[:, kept == 0].any()


def test_the_sliced_model_is_the_masked_one(model: Decoder, windows: NDArray[np.int32]) -> None:
    plan = make_plan(score(model), prune_percent=40)
    (found,) = compensate(model, gram_matrices(model, windows), [plan])
    repaired = with_down_projections(model, found.down_projs)
    sliced = logits(slice_model(repaired, plan), windows)
    np.testing.assert_allclose(sliced, logits(repaired, windows), rtol=1e-5, atol=1e-5)
    assert not np.allclose(sliced, logits(slice_model(model, plan), windows), atol=1e-3)


def test_several_plans_in_one_pass_are_as_by_themselves(model: Decoder, windows: NDArray[np.int32]) -> None:
    scores = score(model)
    plans = [make_plan(scores, prune_percent=percent) for percent in (10, 40)]
    together = compensate(model, gram_matrices(model, windows), plans)
    for plan, found in zip(plans, together, strict=True):
        (alone,) = compensate(model, gram_matrices(model, windows), [plan])
        for a, b in zip(found.down_projs, alone.down_projs, strict=True):
            assert np.array_equal(a, b)
        assert found.fits == alone.fits


def test_a_layer_that_stays_whole_keeps_its_bits(model: Decoder, windows: NDArray[np.int32]) -> None:
    plan = make_plan(score(model), width=40, layers=[1])
    (found,) = compensate(model, gram_matrices(model, windows), [plan])
    assert [fit is None for fit in found.fits] == [True, False, True]
    for i in (0, 2):
        assert np.array_equal(found.down_projs[i], model.layers[i].mlp.down_proj[...])
    assert found.summary()["output_error"][0] is None


def test_the_dtype_of_the_weights_stays(windows: NDArray[np.int32], tmp_path: Path) -> None:
    config = hf_config(torch_dtype="bfloat16", intermediate_size=83, num_attention_heads=8)
    model = convert.load(write_folder(tmp_path / "bf16", config, hf_tensors(config, "bfloat16"))).model
    plan = make_plan(score(model), prune_percent=40)
    (found,) = compensate(model, gram_matrices(model, windows), [plan])
    assert {str(down.dtype) for down in found.down_projs} == {"bfloat16"}
    assert all(fit is not None and fit.error < fit.error_without for fit in found.fits)


# --------------------------------------------------------------------------------------------------------- in order


def test_in_order_each_layer_sees_what_the_pruned_ones_give(model: Decoder, windows: NDArray[np.int32]) -> None:
    """By hand: collect on the model pruned so far, score, select, refit, and go on."""
    widths = (50, 83, 30)
    values, found = prune_in_order(model, windows, "hybrid", widths, statistics=collect(model, windows))
    so_far = model
    for i in range(3):
        statistics = dataclasses.replace(collect(so_far, windows), fingerprint=score(so_far).fingerprint)
        expected = score(so_far, "hybrid", statistics=statistics).values[i]
        np.testing.assert_allclose(values[i], expected, rtol=1e-4)
        downs = [layer.mlp.down_proj[...] for layer in so_far.layers]
        if widths[i] < 83:
            scores = dataclasses.replace(score(so_far), values=(*values[: i + 1], *score(so_far).values[i + 1 :]))
            plan = make_plan(scores, width=widths[i], layers=[i])
            (step,) = compensate(so_far, gram_matrices(so_far, windows), [plan])
            downs[i] = step.down_projs[i]
        np.testing.assert_allclose(found.down_projs[i], downs[i], rtol=2e-3, atol=2e-4)
        so_far = with_down_projections(so_far, [*found.down_projs[: i + 1], *downs[i + 1 :]])
    assert found.fits[1] is None


def test_in_order_without_compensation_only_leaves_out(model: Decoder, windows: NDArray[np.int32]) -> None:
    statistics = collect(model, windows)
    values, found = prune_in_order(model, windows, "wanda", (50, 50, 50), statistics=statistics, folds=0)
    for i, layer in enumerate(model.layers):
        mask = np.zeros(83)
        mask[select_neurons(values[i], 50)] = 1
        assert np.array_equal(found.down_projs[i], np.asarray(layer.mlp.down_proj[...]) * mask)
    assert found.fits == (None, None, None)


def test_the_first_layer_is_the_same_in_order_and_at_once(model: Decoder, windows: NDArray[np.int32]) -> None:
    plan = make_plan(score(model), prune_percent=40)
    (at_once,) = compensate(model, gram_matrices(model, windows), [plan])
    _, in_order = prune_in_order(model, windows, "ppm", plan.widths, statistics=None)
    assert np.array_equal(at_once.down_projs[0], in_order.down_projs[0])
    assert not np.array_equal(at_once.down_projs[2], in_order.down_projs[2])


# ---------------------------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_meshes_give_the_same_down_projections(model: Decoder, windows: NDArray[np.int32], shape: MeshShape) -> None:
    plan = make_plan(score(model), prune_percent=40)
    sharded = shard_model(model, make_mesh(shape, model.config.num_key_value_heads))
    (one,) = compensate(model, gram_matrices(model, windows), [plan])
    (many,) = compensate(sharded, gram_matrices(sharded, windows), [plan])
    for a, b, layer in zip(one.down_projs, many.down_projs, sharded.layers, strict=True):
        np.testing.assert_allclose(np.asarray(b)[:, :83], a, rtol=2e-3, atol=2e-4)
        assert b.sharding.is_equivalent_to(layer.mlp.down_proj[...].sharding, 2)
    _, in_order = prune_in_order(sharded, windows, "ppm", plan.widths, statistics=None)
    _, expected = prune_in_order(model, windows, "ppm", plan.widths, statistics=None)
    for a, b in zip(expected.down_projs, in_order.down_projs, strict=True):
        np.testing.assert_allclose(np.asarray(b)[:, :83], a, rtol=5e-3, atol=5e-4)
    sliced = slice_model(with_down_projections(sharded, many.down_projs), plan)
    alone = slice_model(with_down_projections(model, one.down_projs), plan)
    np.testing.assert_allclose(
        np.asarray(sliced.layers[2].mlp.down_proj[...])[:, : plan.widths[2]],
        alone.layers[2].mlp.down_proj[...],
        rtol=2e-3,
        atol=2e-4,
    )


def test_a_plan_for_another_model_is_refused(model: Decoder, windows: NDArray[np.int32], tmp_path: Path) -> None:
    narrow = convert.load(write_folder(tmp_path / "narrow", {**CONFIG, "intermediate_size": 80})).model
    with pytest.raises(RequestError, match="the plan was made for"):
        compensate(model, gram_matrices(model, windows), [make_plan(score(narrow), prune_percent=40)])


def test_one_program_serves_every_width(model: Decoder, windows: NDArray[np.int32]) -> None:
    least_squares.clear_cache()
    scores = score(model)
    compensate(
        model, gram_matrices(model, windows), [make_plan(scores, prune_percent=percent) for percent in (10, 20, 40, 60)]
    )
    assert least_squares._cache_size() == 1


# ----------------------------------------------------------------------------------------------------- cross-validated


def folds_of(*parts: F32) -> list[F32]:
    return [jnp.asarray(a.T @ a) for a in parts]


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000))
def test_the_held_out_errors_are_those_of_the_outputs(seed: int) -> None:
    """The quadratic forms say what running the activations through the refitted layer gives."""
    a, down, mask = problem(seed, 120)
    parts = np.split(a, 3)
    new, fit = cross_validate_layer(None, 0, folds_of(*parts), jnp.asarray(down), mask)
    assert fit.damping in DAMPINGS
    assert 0 <= fit.strength <= 1
    assert fit.held_out is not None
    errors, lost = 0.0, 0.0
    for i, part in enumerate(parts):
        fitted, _ = solved(np.concatenate([p for j, p in enumerate(parts) if j != i]), down, mask, fit.damping)
        used = mask * down + fit.strength * (fitted - mask * down)
        errors += np.sum((part @ (down - used).T) ** 2)
        lost += np.sum((part @ ((1 - mask) * down).T) ** 2)
    np.testing.assert_allclose(fit.held_out, np.array([lost, errors]) / np.sum((a @ down.T) ** 2), rtol=2e-2, atol=1e-5)
    whole, _ = solved(a, down, mask, fit.damping)
    np.testing.assert_allclose(new, mask * down + fit.strength * (whole - mask * down), rtol=1e-3, atol=1e-4)
    assert fit.held_out[1] <= fit.held_out[0]


def test_nothing_is_repaired_where_that_helps_no_other_text() -> None:
    """Neurons that tell nothing of each other in common: each part alone shows dependencies, another one each."""
    rng = np.random.default_rng(5)
    kept, removed = rng.standard_normal((2, 40, 12)).astype(np.float32)
    parts = [np.concatenate([kept, sign * removed], axis=1) for sign in (1, -1)]
    parts[0][:, 12:] += 2 * kept
    parts[1][:, 12:] -= 2 * kept
    down = rng.standard_normal((7, 24)).astype(np.float32)
    mask = np.repeat(np.float32([1, 0]), 12)
    new, fit = cross_validate_layer(None, 0, folds_of(*parts), jnp.asarray(down), mask)
    assert fit.strength == 0
    assert fit.held_out[0] == pytest.approx(fit.held_out[1])
    np.testing.assert_array_equal(new, mask * down)
    _, plain = compensate_layer(None, 0, sum(folds_of(*parts)), jnp.asarray(down), mask)
    assert plain.strength == 1


def test_much_text_is_fitted_in_full() -> None:
    a, down, mask = problem(3, 4000)
    _, fit = cross_validate_layer(None, 0, folds_of(*np.split(a, 4)), jnp.asarray(down), mask)
    assert fit.strength > 0.99
    assert fit.damping == DAMPINGS[0]


def test_a_gram_matrix_that_is_no_number_is_refused_in_cross_validation() -> None:
    _, down, mask = problem(0, 40)
    with pytest.raises(OperationError, match="layer 7 cannot be factored"):
        cross_validate_layer(None, 7, 2 * [jnp.full((24, 24), jnp.nan)], jnp.asarray(down), mask)


def test_folds_are_of_windows_that_follow_each_other(model: Decoder, windows: NDArray[np.int32]) -> None:
    """The sizes of the batches do not decide it, and together the folds are the whole."""
    for folds, whole in zip(gram_folds(model, windows, FOLDS), gram_matrices(model, windows), strict=True):
        np.testing.assert_allclose(sum(folds), whole, rtol=1e-4, atol=1e-4)
    parts = [windows[:14][np.arange(14) * FOLDS // 14 == f] for f in range(FOLDS)]
    alone = [next(gram_matrices(model, part)) for part in parts]
    for batch_tokens in (16, 80, 2048):
        folds = next(gram_folds(model, windows[:14], FOLDS, batch_tokens=batch_tokens))
        for fold, expected in zip(folds, alone, strict=True):
            np.testing.assert_allclose(fold, expected, rtol=1e-4, atol=1e-4)


def test_too_few_windows_for_the_folds_are_refused(model: Decoder, windows: NDArray[np.int32]) -> None:
    with pytest.raises(RequestError, match=r"5 calibration windows are too few .* give at least 6"):
        next(gram_folds(model, windows[:5], FOLDS))


def test_cross_validation_at_once_in_order_and_on_a_mesh(model: Decoder, windows: NDArray[np.int32]) -> None:
    plan = make_plan(score(model), prune_percent=40)
    (one,) = compensate(model, gram_folds(model, windows, FOLDS), [plan])
    _, in_order = prune_in_order(model, windows, "ppm", plan.widths, statistics=None, folds=FOLDS)
    np.testing.assert_allclose(one.down_projs[0], in_order.down_projs[0], rtol=1e-4, atol=1e-5)
    summary = one.summary()
    assert summary["method"] == "cross-validated least-squares"
    assert len(summary["strength"]) == 3
    assert all(a >= b for a, b in zip(summary["held_out_error_without"], summary["held_out_error"], strict=True))
    sharded = shard_model(model, make_mesh(MeshShape(2, 2), model.config.num_key_value_heads))
    (many,) = compensate(sharded, gram_folds(sharded, windows, FOLDS), [plan])
    for a, b in zip(one.fits, many.fits, strict=True):
        assert a is not None
        assert b is not None
        assert a.damping == b.damping
        np.testing.assert_allclose([a.strength, *(a.held_out or ())], [b.strength, *(b.held_out or ())], rtol=1e-3)
