"""Budgets over layers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from calibrated import CONFIG, with_down_projections
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sharded import shard_model
from tiny_models import write_folder

import convert
from evals.perplexity import perplexity
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.parallel.mesh import MeshShape, make_mesh
from gluprune_jax.pruning.allocation import by_cost, by_score, layer_costs
from gluprune_jax.pruning.calibration import gram_matrices
from gluprune_jax.pruning.least_squares import compensate
from gluprune_jax.pruning.plan import PruningPlan, make_plan
from gluprune_jax.pruning.scores import score

SIZES = st.lists(st.integers(4, 60), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return convert.load(write_folder(tmp_path_factory.mktemp("allocation") / "tiny", CONFIG)).model


@pytest.fixture(scope="module")
def windows() -> NDArray[np.int32]:
    return np.random.default_rng(3).integers(0, 97, (6, 16)).astype(np.int32)


def least(size: int, floor: float, multiple_of: int) -> int:
    return min(size, max(1, math.ceil(math.ceil(floor * size) / multiple_of)) * multiple_of)


def check(widths: list[int], sizes: list[int], budget: int, floor: float, multiple_of: int) -> None:
    assert sum(widths) <= budget
    for width, size in zip(widths, sizes, strict=True):
        assert least(size, floor, multiple_of) <= width <= size
        assert width % multiple_of == 0 or width == size


@settings(max_examples=150, deadline=None)
@given(SIZES, st.floats(0.3, 1), st.sampled_from([0.0, 0.1, 0.25]), st.sampled_from([1, 4]), st.integers(0, 9))
def test_widths_keep_the_budget_the_floor_and_the_multiple(
    sizes: list[int], share: float, floor: float, multiple_of: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    budget = max(int(share * sum(sizes)), sum(least(size, floor, multiple_of) for size in sizes))
    values = [rng.random(size).astype(np.float32) ** 3 for size in sizes]
    widths = by_score(values, budget, min_keep=floor, multiple_of=multiple_of)
    check(widths, sizes, budget, floor, multiple_of)
    if multiple_of == 1:
        assert sum(widths) == min(budget, sum(sizes))
    widths = by_cost(rng.random(len(sizes)).tolist(), sizes, budget, min_keep=floor, multiple_of=multiple_of)
    check(widths, sizes, budget, floor, multiple_of)
    if multiple_of == 1:
        assert sum(widths) >= budget - len(sizes)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(20, 90), st.integers(0, 60))
def test_a_smaller_budget_keeps_less_of_every_layer(seed: int, small: int, more: int) -> None:
    rng = np.random.default_rng(seed)
    values = [rng.random(size).astype(np.float32) for size in (30, 50, 70)]
    widths = [by_score(values, budget, min_keep=0.1) for budget in (small, small + more)]
    assert all(a <= b for a, b in zip(*widths, strict=True))


def test_neurons_compete_by_their_share_of_the_layers_mean() -> None:
    """The scale of a layer's scores does not matter, their shape does."""
    flat, steep = np.ones(10, np.float32), np.array([10.0] * 2 + [0.1] * 8, np.float32)
    assert by_score([flat, steep], 12, min_keep=0) == [10, 2]
    assert by_score([flat * 1000, steep / 1000], 12, min_keep=0) == [10, 2]
    assert by_score([flat, steep], 12, min_keep=0.4) == [8, 4]


def test_the_sum_of_the_costs_is_the_smallest() -> None:
    """Against a search over all widths of three layers."""
    costs, sizes, budget = [1.0, 4.0, 0.5], [20, 20, 20], 36

    def total(widths: tuple[int, ...]) -> float:
        return sum(cost * (1 - width / size) ** 2 for cost, width, size in zip(costs, widths, sizes, strict=True))

    possible = [(a, b, budget - a - b) for a in range(4, 21) for b in range(4, 21) if 4 <= budget - a - b <= 20]
    found = by_cost(costs, sizes, budget, min_keep=0.2)
    assert total(tuple(found)) <= min(map(total, possible)) * 1.01
    assert by_cost([1, 1, 1], sizes, budget) == [12, 12, 12]
    assert by_cost([1.0, -3.0, 1.0], sizes, budget)[1] == 4  # what helps goes down to the floor
    for nothing in ([0.0] * 3, [-0.1, -0.2, 0.0], [1e-320] * 3):
        assert by_cost(nothing, sizes, budget) == [12, 12, 12]


def test_refusals() -> None:
    ones = [np.ones(10, np.float32)] * 2
    with pytest.raises(RequestError, match=r"`min_keep` is 1; it must be a share from 0"):
        by_score(ones, 10, min_keep=1)
    with pytest.raises(RequestError, match=r"`min_keep` 0.9 keeps at least 18 neurons, and the target leaves 10"):
        by_score(ones, 10, min_keep=0.9)
    with pytest.raises(OperationError, match="cost 1 is not finite"):
        by_cost([1.0, math.nan], [10, 10], 10)


# ----------------------------------------------------------------------------------------------------------- costs


def loss(model: Decoder, windows: NDArray[np.int32], plan: PruningPlan | None = None) -> float:
    masks = None if plan is None else plan.masks(model.config)
    return math.log(perplexity(model, windows.ravel().tolist(), sequence_length=16, neuron_masks=masks).value)


@pytest.mark.parametrize("is_compensated", [False, True])
def test_the_cost_of_a_layer_is_the_loss_with_it_alone_pruned(
    model: Decoder, windows: NDArray[np.int32], is_compensated: bool
) -> None:
    scores = score(model)
    found = layer_costs(
        model,
        windows,
        make_plan(scores, prune_percent=40),
        grams=gram_matrices(model, windows) if is_compensated else None,
    )
    for i in range(3):
        alone = make_plan(scores, prune_percent=40, layers=[i])
        repaired = model
        if is_compensated:
            repaired = with_down_projections(
                model, compensate(model, gram_matrices(model, windows), [alone])[0].down_projs
            )
        expected = loss(repaired, windows, alone) - loss(model, windows)
        assert found[i] == pytest.approx(expected, rel=1e-3, abs=2e-5)


def test_costs_on_fewer_tokens_and_of_layers_that_stay_whole(model: Decoder, windows: NDArray[np.int32]) -> None:
    scores = score(model)
    plan = make_plan(scores, prune_percent=40, layers=[0, 2])
    found = layer_costs(model, windows, plan, cost_tokens=32)
    assert found[1] == 0
    alone = make_plan(scores, prune_percent=40, layers=[2])
    measured = windows[[0, 3]]  # spread over the text
    expected = loss(model, measured, alone) - loss(model, measured)
    assert found[2] == pytest.approx(expected, rel=1e-3, abs=2e-5)


def test_a_cost_that_is_not_finite_names_the_layer(model: Decoder, windows: NDArray[np.int32]) -> None:
    plan = make_plan(score(model), prune_percent=40, layers=[1, 2])
    broken = with_down_projections(
        model, [model.layers[i].mlp.down_proj[...] * (np.inf if i == 2 else 1) for i in range(3)]
    )
    with pytest.raises(OperationError, match="pruning layer 1 alone costs no finite loss"):
        layer_costs(broken, windows, plan)


def test_meshes_give_the_same_costs(model: Decoder, windows: NDArray[np.int32]) -> None:
    plan = make_plan(score(model), prune_percent=40)
    sharded = shard_model(model, make_mesh(MeshShape(2, 4), model.config.num_key_value_heads))
    for is_compensated in (False, True):
        one = layer_costs(model, windows, plan, grams=gram_matrices(model, windows) if is_compensated else None)
        many = layer_costs(sharded, windows, plan, grams=gram_matrices(sharded, windows) if is_compensated else None)
        np.testing.assert_allclose(many, one, rtol=1e-2, atol=1e-4)


def test_a_plan_of_given_widths(model: Decoder) -> None:
    scores = score(model)
    about = {"method": "global", "floor": 0.2}
    plan = make_plan(scores, prune_percent=40, widths=[83, 40, 20], allocation=about)
    assert plan.widths == (83, 40, 20)
    assert plan.request["allocation"] == about
    assert PruningPlan.from_json(plan.to_json()).request == plan.request
    assert jnp.asarray(plan.kept[0]).shape == (83,)
