"""Recovery training: each loss does what it is for, and a step is the same however it is divided."""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sharded import shard_model
from tiny_models import hf_config, write_folder

import convert
from gluprune_jax import make_plan, score
from gluprune_jax.data.packing import PADDING, pack
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.memory.training import choose_training_mesh, plan_training
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import bind, checksum, parameters_of
from gluprune_jax.parallel.mesh import MeshShape, make_mesh, to_host
from gluprune_jax.pruning.slicing import slice_model
from gluprune_jax.training.checkpoints import TrainingCheckpoints
from gluprune_jax.training.recovery import Recipe, Recovery, train
from gluprune_jax.training.step import Objective, Schedule, kl_divergence, loss_sums, relative_distance
from gluprune_jax.training.trainable import Trainable, merged, split, weights

RNG = np.random.default_rng(0)
# The last window has 9 of its 24 tokens.
WINDOWS = pack([RNG.integers(0, 97, 24 * 15 + 9)], 24, None)
TERMS = [{"kl": 1.0}, {"ce": 1.0, "kl": 0.0}, {"hidden": 1.0, "kl": 0.0}]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """Two layers of 83 neurons, which divide over nothing, and a tied embedding."""
    config = hf_config(num_hidden_layers=2, intermediate_size=83, tie_word_embeddings=True)
    return convert.load(write_folder(tmp_path_factory.mktemp("dense") / "tiny", config)).model


@pytest.fixture(scope="module")
def student(dense: Decoder) -> Decoder:
    """Its layers keep 83 and 41 neurons."""
    return slice_model(dense, make_plan(score(dense), width=41, layers=[1]))


def recipe(steps: int = 4, rate: float = 3e-3, **changes: Any) -> Recipe:
    options = {"schedule": Schedule(steps, rate), "batch_size": 4} | changes
    return Recipe(**options)


def lines(student: Decoder, teacher: Decoder | None, recipe: Recipe) -> tuple[Recovery, list[dict[str, float]]]:
    recovery = Recovery(student, teacher, WINDOWS, recipe)
    return recovery, [recovery.advance() for _ in range(recipe.schedule.steps)]


def losses(records: Sequence[dict[str, float]]) -> list[float]:
    return [record["loss"] for record in records]


def sums(student: Decoder, teacher: Decoder, objective: Objective, chunk: int, params: Any = None) -> Any:
    params = ({}, parameters_of(student), 1.0) if params is None else params
    tokens = jnp.asarray(WINDOWS[-3:])
    return loss_sums(
        student.config, params, teacher.config, parameters_of(teacher), objective, tokens, jnp.float32, chunk
    )


# ------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("what", ["all", "mlp", "lora"])
@pytest.mark.parametrize("weights", TERMS, ids=lambda weights: next(iter(weights)))
def test_each_term_alone_moves_the_parameters_and_goes_down(
    dense: Decoder, student: Decoder, what: Any, weights: dict[str, float]
) -> None:
    """A gradient that is zero because something was detached would leave everything where it was."""
    objective = Objective(**{"kl": 0.0} | weights)
    plan = recipe(8, 3e-3, objective=objective, trainable=Trainable(what, rank=4), batch_size=len(WINDOWS))
    recovery, records = lines(student, dense, plan)
    assert records[0]["grad_norm"] > 1e-3
    found = losses(records)
    assert found[-1] < 0.95 * found[0]
    name = next(iter(weights))
    assert found == [record[name] for record in records]
    before, after = parameters_of(student), parameters_of(recovery.model())
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    projections = {name for name in before if name.endswith("proj")}
    mlp = {name for name in before if ".mlp." in name}
    everything = before.keys() - ({"norm.weight"} if name == "hidden" else set())  # it lies behind the last layer
    assert moved == {"all": everything, "mlp": mlp, "lora": projections}[what]
    assert {after[name].dtype for name in after} == {jnp.dtype("float32")}


def test_identical_models_have_no_divergence_and_no_gradient(dense: Decoder) -> None:
    def total(params: Any) -> Any:
        terms = sums(dense, dense, Objective(hidden=1.0), 16, (params, {}, 1.0))
        return terms["kl"] + terms["hidden"]

    value, gradients = jax.jit(jax.value_and_grad(total))(parameters_of(dense))
    assert abs(value) < 1e-5
    assert max(float(jnp.abs(gradient).max()) for gradient in jax.tree.leaves(gradients)) < 1e-4
    gradients = jax.jit(jax.grad(lambda params: sums(dense, dense, Objective(), 16, (params, {}, 1.0))["ce"]))(
        parameters_of(dense)
    )
    assert max(float(jnp.abs(gradient).max()) for gradient in jax.tree.leaves(gradients)) > 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_divergence_is_that_of_float64(temperature: float) -> None:
    teacher, student = (5 * RNG.standard_normal((2, 7, 97)) for _ in range(2))

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits / temperature - (logits / temperature).max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    expected, log_probs = log_softmax(teacher), log_softmax(student)
    reference = temperature**2 * (np.exp(expected) * (expected - log_probs)).sum(-1)
    found = kl_divergence(jnp.float32(teacher), jnp.float32(student), temperature)
    np.testing.assert_allclose(found, reference, rtol=2e-5, atol=1e-5)
    gradient = jax.grad(lambda logits: kl_divergence(jnp.float32(teacher), logits, temperature).sum())(
        jnp.float32(student)
    )
    np.testing.assert_allclose(gradient, temperature * (np.exp(log_probs) - np.exp(expected)), atol=1e-5)


def test_relative_distance() -> None:
    x, y = RNG.standard_normal((2, 3, 5, 8))
    np.testing.assert_allclose(
        relative_distance(jnp.float32(x), jnp.float32(y)), ((x - y) ** 2).sum(-1) / (y**2).sum(-1), rtol=1e-5
    )


@pytest.mark.parametrize("chunk", [1, 30])
def test_chunks_and_recomputation_change_nothing(dense: Decoder, student: Decoder, chunk: int) -> None:
    """Against logits that are formed whole by the model itself."""
    objective, tokens = Objective(kl=1.0, ce=0.5, temperature=2.0), WINDOWS[-3:]
    there = jnp.asarray(tokens[:, 1:] >= 0)

    def whole(config: ModelConfig, params: Any) -> Any:
        model = bind(config, params)
        return model.logits(model(jnp.maximum(tokens, 0))[0])[:, :-1]

    @jax.jit
    def plain(params: Any) -> Any:
        expected = whole(dense.config, nnx.state(dense, nnx.Param))
        logits = whole(student.config, params)
        kl = jnp.where(there, kl_divergence(expected, logits, 2.0), 0).sum()
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(tokens, 0)[:, 1:, None], -1)[..., 0]
        return kl - 0.5 * jnp.where(there, log_probs, 0).sum()

    def ours(params: Any) -> Any:
        terms = sums(student, dense, objective, chunk, (params, {}, 1.0))
        return terms["kl"] + 0.5 * terms["ce"]

    value, gradients = jax.value_and_grad(plain)(nnx.state(student, nnx.Param))
    found, ours_gradients = jax.jit(jax.value_and_grad(ours))(parameters_of(student))
    assert float(found) == pytest.approx(float(value), rel=1e-5)
    by_name = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(gradients)}
    assert by_name.keys() == ours_gradients.keys()
    for name, gradient in by_name.items():
        np.testing.assert_allclose(ours_gradients[name], gradient, atol=2e-4, rtol=1e-4, err_msg=name)


# --------------------------------------------------------------------------------------------------------- steps


def test_two_accumulated_batches_are_one_of_twice_the_size(dense: Decoder, student: Decoder) -> None:
    """Also where the last window is not full: all tokens weigh the same."""
    objective = Objective(kl=1.0, ce=0.5, hidden=0.5)
    once, records = lines(student, dense, recipe(4, objective=objective, batch_size=8))
    twice, accumulated = lines(student, dense, recipe(4, objective=objective, batch_size=4, accumulate=2))
    assert records[1]["tokens"] == accumulated[1]["tokens"] == 16 * 24 - 15
    for record, other in zip(records, accumulated, strict=True):
        for name in ("loss", "kl", "ce", "hidden", "grad_norm"):
            assert other[name] == pytest.approx(record[name], rel=2e-6, abs=1e-6)
    for name, array in once.state.trained.items():
        np.testing.assert_allclose(twice.state.trained[name], array, atol=2e-5, err_msg=name)


def test_a_step_is_compiled_once_and_its_state_given_away(dense: Decoder, student: Decoder) -> None:
    recovery = Recovery(student, dense, WINDOWS, recipe())
    before = recovery.state
    for _ in range(3):
        recovery.advance()
    assert recovery._step._cache_size() == 1  # type: ignore[attr-defined]
    assert all(array.is_deleted() for array in before.trained.values())
    assert not any(array.is_deleted() for array in parameters_of(student).values())


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    schedule = Schedule(steps=110, learning_rate=1.0, warmup_steps=10)
    rates = [float(schedule.rate(step)) for step in range(111)]
    np.testing.assert_allclose(rates[:11], [*np.arange(1, 11) / 10, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates[60], 0.5, rtol=1e-5)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rates[-1] < 1e-6


def test_gradients_are_clipped(dense: Decoder, student: Decoder) -> None:
    """Adam does not feel the size of all gradients together, but the moments show it."""
    plan = recipe(1, trainable=Trainable("mlp"))
    clipped, (record,) = lines(student, dense, dataclasses.replace(plan, schedule=Schedule(1, 1e-3, clip=1e-3)))
    free, (same,) = lines(student, dense, dataclasses.replace(plan, schedule=Schedule(1, 1e-3, clip=1e3)))
    assert record["grad_norm"] == same["grad_norm"] > 0.1  # before clipping
    norms = [float(jnp.sqrt(sum((m**2).sum() for m in _moments(r)))) for r in (clipped, free)]
    assert norms[0] == pytest.approx(0.1 * 1e-3, rel=1e-4)
    assert norms[1] == pytest.approx(0.1 * same["grad_norm"], rel=1e-4)


def _moments(recovery: Recovery) -> list[Any]:
    (adam,) = (
        part
        for part in jax.tree.leaves(recovery.state.optimizer, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    )
    return jax.tree.leaves(adam.mu)


def test_bfloat16_computes_on_float32_masters(dense: Decoder, student: Decoder) -> None:
    _, records = lines(student, dense, recipe(6))
    rough, in_bfloat16 = lines(student, dense, recipe(6, compute_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(rough.state.trained)} == {jnp.dtype("float32")}
    assert losses(records) != losses(in_bfloat16)
    np.testing.assert_allclose(losses(in_bfloat16), losses(records), rtol=0.05)


def test_a_bfloat16_model_stays_one(dense: Decoder) -> None:
    narrow = nnx.clone(dense)
    nnx.update(narrow, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(narrow, nnx.Param)))
    recovery, _ = lines(narrow, None, recipe(2, objective=Objective(kl=0, ce=1)))
    assert {array.dtype for array in parameters_of(recovery.model()).values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(("mode", "shape"), [("all", MeshShape(2, 4)), ("lora", MeshShape(1, 8))], ids=str)
def test_eight_devices_give_the_same_losses(dense: Decoder, student: Decoder, mode: Any, shape: MeshShape) -> None:
    plan = recipe(
        4,
        objective=Objective(kl=1.0, ce=0.5, hidden=0.5),
        trainable=Trainable(mode, rank=4),
        accumulate=2,
        schedule=Schedule(4, 3e-3, weight_decay=0.1),
    )
    alone, records = lines(student, dense, plan)
    mesh = make_mesh(shape, dense.config.num_key_value_heads)
    divided, on_mesh = lines(shard_model(student, mesh), shard_model(dense, mesh), plan)
    np.testing.assert_allclose(losses(on_mesh), losses(records), rtol=1e-5)
    before, after = parameters_of(alone.model()), parameters_of(divided.model())
    for name, array in before.items():
        found = to_host(after[name])
        # The padding of widths is zero still: 83 and 41 are stored as multiples of the devices of a replica.
        inside = tuple(slice(0, size) for size in array.shape)
        np.testing.assert_allclose(found[inside], array, atol=2e-4, err_msg=name)
        assert np.count_nonzero(found) == np.count_nonzero(found[inside])
        assert after[name].sharding == parameters_of(shard_model(student, mesh))[name].sharding
    assert divided.model().layers[1].mlp.gate_proj.shape[0] == -(-41 // shape.model) * shape.model
    # The moments lie where what is trained does.
    for moment, array in zip(_moments(divided), jax.tree.leaves(divided.state.trained), strict=True):
        assert moment.sharding == array.sharding


def test_tied_embeddings_stay_tied(dense: Decoder, student: Decoder) -> None:
    recovery, _ = lines(student, dense, recipe(1))
    model = recovery.model()
    assert model.config.tie_word_embeddings
    assert not hasattr(model, "lm_head")
    assert not np.array_equal(model.embed_tokens[...], student.embed_tokens[...])


# ---------------------------------------------------------------------------------------------- what is trained


def test_mlp_only_leaves_all_else_equal_to_the_bit(dense: Decoder, student: Decoder) -> None:
    recovery, _ = lines(student, dense, recipe(2, trainable=Trainable("mlp")))
    assert sorted(recovery.state.trained) == sorted(name for name in parameters_of(student) if ".mlp." in name)
    before, after = parameters_of(student), parameters_of(recovery.model())
    for name in before:
        assert np.array_equal(before[name], after[name]) == (".mlp." not in name), name


def test_merged_adapters_compute_what_adapters_do(student: Decoder) -> None:
    trainable = Trainable("lora", rank=3, alpha=12.0)
    trained, frozen = split(student, trainable, seed=1)
    assert len(trained) == 2 * 7 * 2
    assert not any(jnp.any(array) for name, array in trained.items() if name.endswith("lora_b"))
    trained = {name: jnp.asarray(0.3 * RNG.standard_normal(a.shape), jnp.float32) for name, a in trained.items()}
    model = _merged(student, trained, frozen, trainable.scale)
    tokens, objective = jnp.asarray(WINDOWS[:2]), Objective(kl=0, ce=1)

    def loss(trained: Any, frozen: Any) -> float:
        terms = jax.jit(lambda *params: loss_sums(student.config, (*params, 4.0), None, {}, objective, tokens))
        return float(terms(trained, frozen)["ce"])

    apart, together = loss(trained, frozen), loss({}, parameters_of(model))
    as_it_was = loss({}, parameters_of(student))
    assert apart == pytest.approx(together, rel=1e-6)
    assert abs(apart - as_it_was) > 1
    name = "layers.1.self_attn.o_proj"
    b, a, weight = (
        np.asarray(x, np.float64)
        for x in (trained[f"{name}.lora_b"], trained[f"{name}.lora_a"], parameters_of(student)[name])
    )
    expected = weight.reshape(48, 48) + 12.0 / 3 * b @ a.reshape(3, 48)
    np.testing.assert_allclose(parameters_of(model)[name].reshape(48, 48), expected, atol=1e-5)


def _merged(model: Decoder, trained: Any, frozen: Any, scale: float) -> Decoder:
    layout = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for n, a in parameters_of(model).items()}
    return merged(model.config, layout, trained, frozen, scale)


def test_adapters_begin_as_the_model(student: Decoder) -> None:
    trained, frozen = split(student, Trainable("lora", rank=4), seed=0)
    for name, array in weights(trained, frozen, 2.0).items():
        np.testing.assert_array_equal(array, parameters_of(student)[name])


@pytest.mark.parametrize("rank", [0, -1, 17])
def test_ranks_that_do_not_fit(student: Decoder, rank: int) -> None:
    message = rf"`lora_rank` is {rank}; it must lie between 1 and 16, the smallest side of the matrices \(key/value"
    with pytest.raises(RequestError, match=message):
        Recovery(student, None, WINDOWS, recipe(trainable=Trainable("lora", rank), objective=Objective(kl=0, ce=1)))


def test_checksums_tell_models_apart(dense: Decoder, student: Decoder) -> None:
    changed = nnx.clone(dense)
    array = changed.layers[1].self_attn.q_proj[...]
    changed.layers[1].self_attn.q_proj[...] = array.at[0, 0, 0].set(array[0, 0, 1]).at[0, 0, 1].set(array[0, 0, 0])
    mesh = make_mesh(MeshShape(8, 1), 2)
    assert len({checksum(dense), checksum(changed), checksum(student)}) == 3
    assert checksum(shard_model(dense, mesh)) == checksum(dense)


# ------------------------------------------------------------------------------------------------------- failure


def test_resumed_to_the_bit(dense: Decoder, student: Decoder, tmp_path: Path) -> None:
    plan = recipe(6)
    mesh = make_mesh(MeshShape(2, 2), 2)
    models = shard_model(student, mesh), shard_model(dense, mesh)

    def fresh() -> Recovery:
        return Recovery(*models, WINDOWS, plan)

    class StoppedError(Exception):
        pass

    def stop(line: Any) -> None:
        if line["step"] == 5:
            raise StoppedError

    unbroken, records = fresh(), []
    train(unbroken, on_step=records.append)
    checkpoints = TrainingCheckpoints(tmp_path / "checkpoints", {"--seed": 0})
    assert checkpoints.restore(unbroken.state) is None
    with pytest.raises(StoppedError):
        train(fresh(), checkpoints=checkpoints, checkpoint_every=1, log=tmp_path / "log", on_step=stop)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000004", "step_00000005"]
    # As if killed in the middle of a line, and of a checkpoint; and the last whole one is lost.
    with (tmp_path / "log").open("a") as log:
        log.write('{"step": 6, "lo')
    (tmp_path / "checkpoints" / "step_00000005").rename(
        tmp_path / "checkpoints" / "step_00000005.orbax-checkpoint-tmp-1"
    )
    resumed, rest = fresh(), []
    found = checkpoints.restore(resumed.state)
    assert found is not None
    assert found.step == 4
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]
    resumed.resume(found)
    train(resumed, log=tmp_path / "log", on_step=rest.append)
    assert losses(rest) == losses(records)[4:]
    for one, other in zip(jax.tree.leaves(unbroken.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding == other.sharding
    written = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert losses(written) == losses(records)
    assert [line["tokens"] for line in written] == [line["tokens"] for line in records]


def test_not_a_number_stops(dense: Decoder, student: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recovery = Recovery(student, dense, WINDOWS, recipe(5))
    checkpoints = TrainingCheckpoints(tmp_path / "checkpoints", {})
    step = recovery._step

    def broken(*args: Any) -> Any:
        state, terms = step(*args)
        return state, {**terms, "loss": jnp.nan if recovery.step == 3 else terms["loss"]}

    monkeypatch.setattr(recovery, "_step", broken)
    with pytest.raises(
        OperationError, match=r"the loss is nan at step 4, .* checkpoint is .*/step_00000002; try a lower"
    ):
        train(recovery, checkpoints=checkpoints, checkpoint_every=2)
    assert (tmp_path / "checkpoints" / "step_00000002").exists()
    recovery = Recovery(student, dense, WINDOWS, recipe(5, schedule=Schedule(5, 1e30)))
    with pytest.raises(OperationError, match="at step 2, and training stops; there is no checkpoint before it"):
        train(recovery)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": Schedule(0)}, "`steps` is 0; it must be at least 1"),
        ({"schedule": Schedule(3, warmup_steps=4)}, "`warmup_steps` is 4; it must lie between 0 and the 3 steps"),
        ({"schedule": Schedule(3, 0.0)}, "`learning_rate` is 0; it must be a finite number above 0"),
        ({"schedule": Schedule(3, math.nan)}, "`learning_rate` is nan"),
        ({"schedule": Schedule(3, clip=-1.0)}, "`clip` is -1"),
        ({"schedule": Schedule(3, weight_decay=-1.0)}, "`weight_decay` is -1; it must be a finite number from 0"),
        ({"objective": Objective(temperature=0.0)}, "`temperature` is 0; it must be a finite number above 0"),
        ({"objective": Objective(kl=0.0)}, "are all 0, so nothing would be trained"),
        ({"objective": Objective(ce=-1.0)}, "`ce_weight` is -1; a weight is a finite number from 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"accumulate": 0}, "`accumulate` is 0"),
        ({"seed": -1}, "`seed` is -1"),
        ({"compute_dtype": "float16"}, "`compute_dtype` is float16"),
    ],
)
def test_recipes_that_make_no_sense(dense: Decoder, student: Decoder, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Recovery(student, dense, WINDOWS, recipe(**changes))


def test_models_and_data_that_do_not_go_together(dense: Decoder, student: Decoder) -> None:
    other = Decoder(dataclasses.replace(dense.config, vocab_size=98), rngs=None)
    deep = Decoder(dense.config.with_layers((0, 0, 0), (8, 8, 8)), rngs=None)
    with pytest.raises(RequestError, match="the teacher has a vocabulary of 98 tokens and the model one of 97"):
        Recovery(student, other, WINDOWS, recipe())
    with pytest.raises(RequestError, match="the model has 2 layers of hidden size 48, the teacher 3 of 48"):
        Recovery(student, deep, WINDOWS, recipe(objective=Objective(hidden=1.0)))
    Recovery(student, deep, WINDOWS, recipe())
    with pytest.raises(RequestError, match="`kl_weight` compares with a teacher"):
        Recovery(student, None, WINDOWS, recipe())
    with pytest.raises(RequestError, match="`hidden_weight` compares with a teacher"):
        Recovery(student, None, WINDOWS, recipe(objective=Objective(kl=0, hidden=1)))
    with pytest.raises(RequestError, match="token id 97 lies outside the model's vocabulary of 97"):
        Recovery(student, dense, np.where(WINDOWS == PADDING, PADDING, WINDOWS + 1), recipe())
    with pytest.raises(
        RequestError, match="`sequence_length` is 513; it must lie between 2 and the 512 tokens of the models"
    ):
        Recovery(student, dense, np.zeros((4, 513), np.int32), recipe())
    mesh = make_mesh(MeshShape(8, 1), 2)
    with pytest.raises(RequestError, match="`batch_size` is 4, which does not divide over the 8 replicas"):
        Recovery(shard_model(student, mesh), shard_model(dense, mesh), WINDOWS, recipe())


# -------------------------------------------------------------------------------------------------------- memory


def test_memory_is_planned_as_it_is_taken(dense: Decoder, student: Decoder) -> None:
    """Weights, moments and gradients to the byte."""
    shape, plan = MeshShape(2, 4), recipe(1, accumulate=2)
    mesh = make_mesh(shape, 2)
    for what in ("all", "mlp", "lora"):
        plan = dataclasses.replace(plan, trainable=Trainable(what, 4))
        recovery = Recovery(shard_model(student, mesh), shard_model(dense, mesh), WINDOWS, plan)
        planned = plan_training(student, dense, shape, plan, 24).parts

        def on_one_device(arrays: Any) -> int:
            return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(arrays))

        if what != "lora":  # of adapters, as if no axis were divided
            assert planned["gradients"] == 2 * on_one_device(recovery.state.trained)
            assert 0 <= on_one_device(recovery.state) - planned["master weights and moments"] <= 16  # counters
        else:
            assert planned["gradients"] >= 2 * on_one_device(recovery.state.trained)
        assert planned["weights"] == on_one_device(recovery._frozen)
        assert planned["teacher"] == on_one_device(recovery._teacher)


def test_the_mesh_is_chosen_by_what_fits(dense: Decoder, student: Decoder) -> None:
    def choose(capacity: int | None, plan: Recipe, is_shared: bool = False, asked: MeshShape | None = None) -> Any:
        mesh = choose_training_mesh(student, dense, plan, 24, asked=asked, capacity=capacity, is_shared=is_shared)
        return None if mesh is None else (mesh.shape["data"], mesh.shape["kv"] * mesh.shape["group"])

    one = plan_training(student, dense, MeshShape(8, 1), recipe(1, batch_size=8), 24).total
    assert choose(None, recipe(1, batch_size=8)) == (8, 1)
    assert choose(None, recipe(1, batch_size=6)) == (2, 1)
    assert choose(None, recipe(1, batch_size=1)) is None
    assert choose(2 * one, recipe(1, batch_size=8)) == (8, 1)
    assert choose(one, recipe(1, batch_size=8)) == (4, 2)
    assert choose(None, recipe(1), asked=MeshShape(2, 3)) == (2, 3)
    with pytest.raises(RequestError, match=r"on the mesh data=2,model=4 training needs .*; try `train` lora"):
        choose(one // 8, recipe(1, batch_size=8))
