"""A sliced model holds the kept rows and columns bit for bit, and is the function that the mask makes of the dense."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from inspecting import arrays, logits
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.tokenizer import encode_text, load_tokenizer
from gluprune_jax.errors import RequestError
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.pruning.criteria import WEIGHT_CRITERIA
from gluprune_jax.pruning.plan import PruningPlan, make_plan
from gluprune_jax.pruning.scores import fingerprint, score
from gluprune_jax.pruning.slicing import slice_model

MATRICES = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of 80 neurons."""
    config = hf_config(torch_dtype=request.param)
    path = tmp_path_factory.mktemp(request.param) / "tiny"
    return write_folder(path, config, hf_tensors(config, request.param))


def load(folder: Path) -> Decoder:
    return convert.load(str(folder)).model


def plan_keeping(model: Decoder, kept: list[Any]) -> PruningPlan:
    plan = make_plan(score(model), width=1)
    return dataclasses.replace(plan, kept=tuple(np.array(sorted(indices), np.int32) for indices in kept))


def mlp(model: Decoder, layer: int, name: str) -> jax.Array:
    array: jax.Array = getattr(model.layers[layer].mlp, name)[...]
    return array


def same_bits(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def everything_kept(model: Decoder) -> Any:
    return plan_keeping(model, [range(size) for size in model.config.intermediate_sizes]).masks(model.config)


KEPT: dict[str, list[Any]] = {
    "other widths in each layer": [range(0, 80, 3), [79], [0, 1, 5, 40, 78]],
    "one layer whole": [range(40), range(80), range(41, 80)],
    "all layers whole": [range(80)] * 3,
}


@pytest.mark.parametrize("what", KEPT)
@pytest.mark.parametrize("width_multiple", [1, 16])
def test_slices_are_the_kept_rows_and_columns_bit_for_bit(folder: Path, what: str, width_multiple: int) -> None:
    model = load(folder)
    sliced = slice_model(model, plan_keeping(model, KEPT[what]), width_multiple=width_multiple)
    assert sliced.config == dataclasses.replace(
        model.config, intermediate_sizes=tuple(map(len, KEPT[what])), width_multiple=width_multiple
    )
    for i, kept in enumerate(KEPT[what]):
        dense = {name: np.asarray(mlp(model, i, name)) for name in MATRICES}
        padding = -len(kept) % width_multiple
        assert same_bits(mlp(sliced, i, "gate_proj"), np.pad(dense["gate_proj"][list(kept)], ((0, padding), (0, 0))))
        assert same_bits(mlp(sliced, i, "up_proj"), np.pad(dense["up_proj"][list(kept)], ((0, padding), (0, 0))))
        assert same_bits(mlp(sliced, i, "down_proj"), np.pad(dense["down_proj"][:, list(kept)], ((0, 0), (0, padding))))


@pytest.mark.optimised
@settings(max_examples=25, deadline=None)
@given(kept=st.sets(st.integers(0, 79), min_size=7, max_size=7), seed=st.integers(0, 99))
def test_any_bits_survive(tiny_bfloat16: Decoder, kept: set[int], seed: int) -> None:
    """NaNs with a payload, infinities, subnormals, both zeros: a slice computes nothing."""
    model = nnx.clone(tiny_bfloat16)
    shape = mlp(model, 0, "gate_proj").shape
    patterns = np.random.default_rng(seed).integers(0, 1 << 16, shape, np.uint16).view(ml_dtypes.bfloat16)
    plan = plan_keeping(model, [kept, range(80), range(80)])
    model.layers[0].mlp.gate_proj.set_value(jnp.asarray(patterns))
    sliced = mlp(slice_model(model, plan), 0, "gate_proj")
    assert np.asarray(sliced).tobytes() == patterns[sorted(kept)].tobytes()


@pytest.fixture(scope="module")
def tiny_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    config = hf_config()
    return load(write_folder(tmp_path_factory.mktemp("any") / "tiny", config, hf_tensors(config, "bfloat16")))


def test_untouched_arrays_are_shared_and_the_dense_model_stays(folder: Path) -> None:
    model = load(folder)
    before = {path: np.array(array) for path, array in arrays(model).items()}
    sliced = arrays(slice_model(model, plan_keeping(model, KEPT["one layer whole"])))
    for path, array in arrays(model).items():
        assert same_bits(array, before[path])
        is_cut = path[0] == "layers" and path[2] == "mlp" and path[1] != 1
        assert (sliced[path] is array) != is_cut, path


def test_donating_frees_the_cut_arrays_and_no_others(folder: Path) -> None:
    model = load(folder)
    plan = plan_keeping(model, KEPT["one layer whole"])
    expected = {path: np.array(array) for path, array in arrays(slice_model(model, plan)).items()}
    dense = arrays(model)
    sliced = arrays(slice_model(model, plan, donate=True))
    for path, array in dense.items():
        assert array.is_deleted() == (path[0] == "layers" and path[2] == "mlp" and path[1] != 1), path
    assert all(same_bits(sliced[path], expected[path]) for path in expected)


def test_a_plan_of_another_shape_is_refused_and_frees_nothing(folder: Path) -> None:
    model = load(folder)
    plan = make_plan(score(model), width=8)
    for other in (
        dataclasses.replace(plan, intermediate_sizes=(160,) * 3, kept=(np.arange(80, 160, dtype=np.int32),) * 3),
        dataclasses.replace(plan, intermediate_sizes=(80,) * 2, kept=plan.kept[:2]),
        dataclasses.replace(plan, hidden_size=64),
    ):
        with pytest.raises(RequestError, match="the plan was made for"):
            slice_model(model, other, donate=True)
    assert not any(array.is_deleted() for array in arrays(model).values())


# ---------------------------------------------------------------------------------------------- mask equals slice


@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
@pytest.mark.parametrize("width_multiple", [1, 16])
def test_the_masked_model_and_the_sliced_one_are_the_same_function(
    tmp_path: Path, criterion: str, width_multiple: int
) -> None:
    model = load(write_folder(tmp_path / "tiny"))
    tokens = np.random.default_rng(0).integers(0, 97, (2, 33))
    plan = make_plan(score(model, criterion), prune_percent=45, layers=(0, 2))
    masked = logits(model, tokens, plan.masks(model.config))
    sliced = logits(slice_model(model, plan, width_multiple=width_multiple), tokens)
    np.testing.assert_allclose(sliced, masked, rtol=0, atol=1e-5)
    # The pruned neurons mattered: the two agree on something else than the dense model.
    assert np.abs(masked - logits(model, tokens, everything_kept(model))).max() > 0.1


@pytest.mark.real_model
def test_the_demo_model_masked_and_sliced_is_the_same_function(demo: convert.Checkpoint) -> None:
    text = "The gated linear unit multiplies two projections of its input, one of them through an activation. " * 3
    tokens = [encode_text(load_tokenizer(demo), text)]
    plan = make_plan(score(demo.model), expansion_ratio="2.4")
    masked = logits(demo.model, tokens, plan.masks(demo.config))
    sliced = logits(slice_model(demo.model, plan), tokens)
    assert set(plan.widths) == {1383}
    np.testing.assert_allclose(sliced, masked, rtol=0, atol=1e-3)
    assert np.abs(masked - logits(demo.model, tokens, everything_kept(demo.model))).max() > 1


# --------------------------------------------------------------------------------- two steps, scores and padding


@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
def test_pruning_in_two_steps_equals_pruning_at_once(folder: Path, criterion: str) -> None:
    """The criteria look at one neuron at a time, so the neurons that are left keep their scores."""
    model = load(folder)
    scores = score(model, criterion)
    halfway = slice_model(model, first := make_plan(scores, width=57))
    again = score(halfway, criterion)
    for values, kept, new in zip(scores.values, first.kept, again.values, strict=True):
        assert same_bits(new, values[kept])
    two_steps = arrays(slice_model(halfway, make_plan(again, width=23), width_multiple=16))
    at_once = arrays(slice_model(model, make_plan(scores, width=23), width_multiple=16))
    assert all(same_bits(two_steps[path], at_once[path]) for path in at_once)


def test_slicing_the_pruned_model_by_all_it_has_changes_nothing(folder: Path) -> None:
    model = load(folder)
    pruned = slice_model(model, make_plan(score(model), width=23))
    again = slice_model(pruned, plan_keeping(pruned, [range(23)] * 3))
    assert again.config == pruned.config
    assert all(array is arrays(pruned)[path] for path, array in arrays(again).items())


def test_padding_changes_no_exported_bit(folder: Path, tmp_path: Path) -> None:
    checkpoint = convert.load(str(folder))
    plan = make_plan(score(checkpoint.model), width=23, layers=(0, 1))
    exports = []
    for width_multiple in (1, 8, 64):
        padded = slice_model(checkpoint.model, plan, width_multiple=width_multiple)
        assert {mlp(padded, i, "up_proj").shape[0] % width_multiple for i in range(3)} == {0}
        # Slicing what is padded already, further.
        padded = slice_model(padded, make_plan(score(padded), width=11))
        convert.save(checkpoint.with_model(padded), tmp_path / str(width_multiple))
        exports.append(
            {file.name: file.read_bytes() for file in (tmp_path / str(width_multiple)).glob("*.safetensors")}
        )
    assert exports[0]
    assert exports[0] == exports[1] == exports[2]


def test_padding_is_unseen_by_scores_and_fingerprint(folder: Path) -> None:
    model = load(folder)
    padded = slice_model(model, plan_keeping(model, [range(80)] * 3), width_multiple=64)
    assert mlp(padded, 0, "gate_proj").shape[0] == 128
    assert fingerprint(padded) == fingerprint(model)
    assert [v.tobytes() for v in score(padded, "vow").values] == [v.tobytes() for v in score(model, "vow").values]
    back = arrays(slice_model(padded, plan_keeping(padded, [range(80)] * 3), width_multiple=1))
    assert all(same_bits(back[path], array) for path, array in arrays(model).items())


def test_a_random_plan_slices_too(folder: Path) -> None:
    model = load(folder)
    scores = score(model, "random", seed=3)
    sliced = slice_model(model, make_plan(scores, width=9))
    for i, v in enumerate(scores.values):
        kept = sorted(np.argsort(v)[-9:])
        assert same_bits(mlp(sliced, i, "up_proj"), np.asarray(mlp(model, i, "up_proj"))[kept])


# -------------------------------------------------------------------------------------------------- eight devices


@pytest.mark.parametrize("width_multiple", [1, 8])
@pytest.mark.parametrize("donate", [False, True])
def test_slicing_on_eight_devices_gives_the_same_bits(folder: Path, width_multiple: int, donate: bool) -> None:
    model, sharded = load(folder), load(folder)
    plan = plan_keeping(model, KEPT["other widths in each layer"])
    expected = arrays(slice_model(model, plan, width_multiple=width_multiple))
    mesh = Mesh(np.array(jax.devices()), ("neurons",))
    for layer in sharded.layers:
        for name in MATRICES:
            spec = PartitionSpec(None, "neurons") if name == "down_proj" else PartitionSpec("neurons")
            parameter = getattr(layer.mlp, name)
            parameter.set_value(jax.device_put(parameter[...], NamedSharding(mesh, spec)))
    assert fingerprint(sharded) == fingerprint(model)
    assert len(mlp(sharded, 0, "gate_proj").devices()) == 8
    sliced = arrays(slice_model(sharded, plan, width_multiple=width_multiple, donate=donate))
    assert all(same_bits(sliced[path], expected[path]) for path in expected)
