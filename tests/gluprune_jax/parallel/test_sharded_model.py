"""The same model on one device and on meshes of eight: the same scores, slices, log-likelihoods and texts."""

import dataclasses
import functools
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from inspecting import arrays
from jax.sharding import Mesh, PartitionSpec
from sharded import shard_model
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.tokenizer import encode_text, load_tokenizer
from gluprune_jax.errors import RequestError
from gluprune_jax.inference import device_loop
from gluprune_jax.inference.device_loop import admit, decode, empty_state
from gluprune_jax.inference.engine import Engine, score_tokens, whole_rows
from gluprune_jax.inference.generation import generate, last_hidden
from gluprune_jax.inference.prefill import append, extend, whole_extend
from gluprune_jax.inference.sampling import Sampling
from gluprune_jax.models.cache import KVCache
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model, bind
from gluprune_jax.parallel.mesh import MeshShape, make_mesh, mesh_of, parse_mesh, place, shape_of, use_mesh
from gluprune_jax.parallel.sharding import RULES, constrain, partition_spec
from gluprune_jax.pruning.criteria import WEIGHT_CRITERIA
from gluprune_jax.pruning.device_scores import matrix_extents, score_layer
from gluprune_jax.pruning.plan import make_plan
from gluprune_jax.pruning.scores import score
from gluprune_jax.pruning.slicing import slice_model, slice_neurons

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import hlo_collectives

SHAPES = [
    MeshShape(*sizes) for sizes in ((1, 1), (1, 2), (2, 1), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4), (1, 8))
]
# Replicas alone, the model alone, both; with and without groups of devices for the same key/value heads.
FEW_SHAPES = [MeshShape(*sizes) for sizes in ((8, 1), (1, 8), (2, 2), (2, 4))]
# 83 neurons divide over nothing; neither do 97 tokens of the vocabulary.
CONFIG = hf_config(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, intermediate_size=83)
RNG = np.random.default_rng(0)


def tensors(dtype: str) -> dict[str, Any]:
    """Weights that give logits of the size that real models have."""
    return {name: tensor / 2 if "proj" in name else tensor for name, tensor in hf_tensors(CONFIG, dtype).items()}


def tokens(n: int) -> list[int]:
    return RNG.integers(0, 97, n).tolist()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp(request.param) / "tiny"
    return convert.load(write_folder(folder, CONFIG, tensors(request.param))).model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return convert.load(write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG, tensors("float32"))).model


def mesh_for(model: Decoder, shape: MeshShape) -> Mesh:
    return make_mesh(shape, model.config.num_key_value_heads)


@functools.cache
def divided(model: Decoder, shape: MeshShape) -> Decoder:
    """The model on a mesh: the same one for all tests, which leave it as it is."""
    return shard_model(model, mesh_for(model, shape))


scores_alone = functools.cache(score)


# --------------------------------------------------------------------------------------------------- the table


def test_meshes_as_they_are_written() -> None:
    assert parse_mesh("auto") is None
    assert parse_mesh("data=2,model=4") == parse_mesh(" model=4 , data=2") == MeshShape(2, 4)
    assert (parse_mesh("model=8"), parse_mesh("data=3")) == (MeshShape(1, 8), MeshShape(3, 1))
    assert str(MeshShape(2, 4)) == "data=2,model=4"


@pytest.mark.parametrize(
    "text", ["", "2,4", "data=0", "data=2,data=2", "data=-1", "tensor=2", "model=2;data=1", "model=1e3"]
)
def test_meshes_that_are_none(text: str) -> None:
    with pytest.raises(RequestError, match="write auto, or sizes such as data=2,model=4"):
        parse_mesh(text)


def test_a_mesh_of_more_devices_than_there_are() -> None:
    with pytest.raises(RequestError, match=r"the mesh data=3,model=4 has 12 devices, and there are 8"):
        make_mesh(MeshShape(3, 4), 8)


@pytest.mark.parametrize(
    ("model_devices", "heads", "kv"), [(1, 8, 1), (4, 8, 4), (8, 8, 8), (8, 2, 2), (8, 3, 1), (6, 4, 2)]
)
def test_the_model_axis_is_shared_between_heads_and_groups(model_devices: int, heads: int, kv: int) -> None:
    mesh = make_mesh(MeshShape(1, model_devices), heads)
    assert dict(mesh.shape) == {"data": 1, "kv": kv, "group": model_devices // kv}
    assert shape_of(mesh) == MeshShape(1, model_devices)


def test_axes_that_do_not_divide_stay_whole() -> None:
    mesh = make_mesh(MeshShape(1, 8), 2)  # kv 2, group 4
    spec = functools.partial(partition_spec, mesh=mesh)
    assert spec(("vocab", None), (96, 48)) == PartitionSpec(("kv", "group"), None)
    assert spec(("vocab", None), (98, 48)) == PartitionSpec(("kv",), None)
    assert spec(("vocab", None), (97, 48)) == PartitionSpec(None, None)
    with pytest.raises(ValueError, match="divided by the same mesh axis twice"):
        spec(("heads", "neurons"), (8, 8))
    with pytest.raises(ValueError, match="zip"):
        spec(("heads",), (8, 8))


def test_every_pair_of_axes_that_meet_in_an_array_is_divided_by_different_mesh_axes() -> None:
    mesh = make_mesh(MeshShape(2, 4), 2)
    for names in (("batch", "kv_heads", "query_group"), ("batch", "vocab"), ("batch", "neurons"), ("batch", "heads")):
        assert partition_spec(names, (8,) * len(names), mesh) == PartitionSpec(*(RULES[name] for name in names))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where_weights_live(model: Decoder, shape: MeshShape) -> None:
    sharded = divided(model, shape)
    kv = math.gcd(shape.model, 2)
    stored = -(-83 // shape.model) * shape.model
    assert sharded.config == dataclasses.replace(model.config, width_multiple=shape.model)
    parts = {
        "embed_tokens": (97, 48),  # does not divide
        "lm_head": (97, 48),
        "q_proj": (8 // shape.model, 8, 48),
        "k_proj": (2 // kv, 8, 48),
        "v_proj": (2 // kv, 8, 48),
        "o_proj": (48, 8 // shape.model, 8),
        "gate_proj": (stored // shape.model, 48),
        "up_proj": (stored // shape.model, 48),
        "down_proj": (48, stored // shape.model),
        "weight": (48,),
    }
    dense = arrays(model)
    for path, array in arrays(sharded).items():
        assert {shard.data.shape for shard in array.addressable_shards} == {parts[path[-1]]}, path
        values = np.asarray(array)
        real = values[tuple(slice(0, size) for size in dense[path].shape)]
        np.testing.assert_array_equal(real, dense[path])
        assert np.count_nonzero(values) == np.count_nonzero(real), "padding is not zero"
    assert mesh_of(sharded) is not None
    assert mesh_of(model) is None


# ------------------------------------------------------------------------------------------- scoring and slicing


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
def test_scores_and_kept_sets_are_equal_to_the_bit(any_model: Decoder, criterion: str, shape: MeshShape) -> None:
    alone = scores_alone(any_model, criterion)
    together = score(divided(any_model, shape), criterion)
    assert together.fingerprint == alone.fingerprint
    for values, expected in zip(together.values, alone.values, strict=True):
        np.testing.assert_array_equal(values, expected)
    for width in (1, 41, 82):
        kept = [make_plan(scores, width=width).kept for scores in (together, alone)]
        for a, b in zip(*kept, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("donate", [False, True])
def test_slices_are_equal_to_the_bit_and_balanced(any_model: Decoder, shape: MeshShape, donate: bool) -> None:
    plan = make_plan(scores_alone(any_model), width=37)
    expected = arrays(slice_model(any_model, plan))
    # A copy: where a device has a whole array, both models have the same.
    copy = nnx.merge(*nnx.split(any_model)[:1], jax.tree.map(jnp.copy, nnx.state(any_model)))
    sliced = slice_model(shard_model(copy, mesh_for(any_model, shape)), plan, donate=donate)
    assert sliced.config.intermediate_sizes == (37,) * 2
    for path, array in arrays(sliced).items():
        values = np.asarray(array)
        assert len({shard.data.shape for shard in array.addressable_shards}) == 1
        if path[-1] in ("gate_proj", "up_proj", "down_proj"):
            axis = 1 if path[-1] == "down_proj" else 0
            stored = values.shape[axis]
            assert stored == -(-37 // shape.model) * shape.model
            assert array.addressable_shards[0].data.shape[axis] == stored // shape.model
            real, padding = np.split(values, [37], axis=axis)
            assert not padding.any()
            values = real
        np.testing.assert_array_equal(values, expected[path])


def test_negative_zeros_survive_a_slice(model: Decoder) -> None:
    """They would not if devices added up what each has of a row."""
    negative = nnx.clone(model)
    negative.layers[0].mlp.gate_proj[...] = jnp.full((83, 48), -0.0)
    plan = make_plan(score(model), width=24)
    sliced = slice_model(shard_model(negative, mesh_for(model, MeshShape(1, 8))), plan)
    assert np.signbit(np.asarray(sliced.layers[0].mlp.gate_proj[...])).all()


def test_the_paper_s_odd_widths() -> None:
    """8192 neurons at 10, 20 and 30 %: none of the widths divides over two devices."""
    config = dataclasses.replace(convert_config().with_layers([0], [8192]), hidden_size=16)
    model = Decoder(config, rngs=nnx.Rngs(0))
    scores = score(model)
    for shape in FEW_SHAPES[1:]:
        sharded = shard_model(model, mesh_for(model, shape))
        for percent, width in ((10, 7373), (20, 6554), (30, 5735)):
            plan = make_plan(scores, prune_percent=percent)
            gate = slice_model(sharded, plan).layers[0].mlp.gate_proj[...]
            assert gate.shape[0] == -(-width // shape.model) * shape.model
            np.testing.assert_array_equal(gate[:width], np.asarray(model.layers[0].mlp.gate_proj[...])[plan.kept[0]])


def convert_config() -> ModelConfig:
    from convert.huggingface.config import read_config

    return read_config(CONFIG)[0]


def test_a_width_multiple_that_does_not_divide_over_the_mesh(model: Decoder) -> None:
    sharded = divided(model, MeshShape(1, 4))
    with pytest.raises(RequestError, match="the width multiple is 6; the neurons are divided over 4 devices"):
        slice_model(sharded, make_plan(score(model), width=30), width_multiple=6)


# ------------------------------------------------------------------------------------------------ the forward pass


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config: ModelConfig, params: Any, tokens: Any) -> jax.Array:
    model = bind(config, params)
    return constrain(model.logits(model(tokens)[0]))


def logits(model: Decoder, tokens: Any) -> Any:
    mesh = mesh_of(model)
    with use_mesh(mesh):
        return np.asarray(logits_of(model.config, nnx.state(model, nnx.Param), place(mesh, tokens, "batch", None)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits(model: Decoder, shape: MeshShape) -> None:
    batch = np.array([tokens(40) for _ in range(8)], np.int32)
    expected = logits(model, batch)
    sharded = divided(model, shape)
    np.testing.assert_allclose(logits(sharded, batch), expected, rtol=0, atol=1e-5)
    plan = make_plan(scores_alone(model), width=37)
    sliced = logits(slice_model(model, plan), batch)
    np.testing.assert_allclose(logits(slice_model(sharded, plan), batch), sliced, rtol=0, atol=1e-5)


@pytest.mark.real_model
def test_logits_of_a_real_model(shallow_demo: convert.Checkpoint) -> None:
    shape = MeshShape(2, 3)  # of nine heads and three key/value heads
    model = shallow_demo.model
    text = "The Eiffel Tower, named after the engineer whose company built it, stands in Paris, the capital of France."
    batch = np.array([encode_text(load_tokenizer(shallow_demo), text)] * 2, np.int32)
    expected = logits(model, batch)
    sharded = shard_model(model, mesh_for(model, shape))
    np.testing.assert_allclose(logits(sharded, batch), expected, rtol=0, atol=1e-3)
    assert score(sharded).fingerprint == score(model).fingerprint


# -------------------------------------------------------------------------------------- evaluation and generation

HEADER = tokens(300)
REQUESTS = [
    *((tokens(n), tokens(4)) for n in (1, 30, 200, 480)),
    *((HEADER + tokens(n), tokens(3)) for n in range(1, 40)),  # stand on a cached header
    *((tokens(5), tokens(300)) for _ in range(3)),
]
DOCUMENTS = [tokens(n) for n in (0, 1, 300, 900, 1500)]
PROMPTS = [tokens(n) for n in (3, 50, 200, 7, 130, 300, 9, 40, 128, 129)] + [
    HEADER[:160] + tokens(n) for n in (3, 9, 20)
]
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    "one slot": {"slots": 1},
}


@pytest.fixture(scope="module")
def loglikelihoods(model: Decoder) -> tuple[list[Any], list[float]]:
    engine = Engine(model)
    return engine.loglikelihood(REQUESTS), engine.loglikelihood_rolling(DOCUMENTS, prefix_token=1)


@pytest.fixture(scope="module")
def texts(model: Decoder) -> dict[str, list[list[int]]]:
    return {name: generate(model, PROMPTS, max_new_tokens=24, **options) for name, options in OPTIONS.items()}


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_log_likelihoods(model: Decoder, loglikelihoods: tuple[list[Any], list[float]], shape: MeshShape) -> None:
    engine = Engine(divided(model, shape))
    told: list[int] = []
    results = engine.loglikelihood(REQUESTS, on_result=lambda number, _: told.append(number))
    assert sorted(told) == list(range(len(REQUESTS)))
    for (_, continuation), result, expected in zip(REQUESTS, results, loglikelihoods[0], strict=True):
        assert abs(result.value - expected.value) <= 1e-4 + 5e-6 * len(continuation)
        assert result.is_greedy == expected.is_greedy
    rolling = engine.loglikelihood_rolling(DOCUMENTS, prefix_token=1)
    np.testing.assert_allclose(rolling, loglikelihoods[1], rtol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_requests_than_replicas(
    model: Decoder, loglikelihoods: tuple[list[Any], list[float]], count: int
) -> None:
    sharded = divided(model, MeshShape(8, 1))
    results = Engine(sharded).loglikelihood(REQUESTS[:count])
    for result, expected in zip(results, loglikelihoods[0], strict=False):
        assert abs(result.value - expected.value) <= 1e-4
    assert len(results) == count
    assert [len(text) for text in generate(sharded, PROMPTS[:count], max_new_tokens=5)] == [5] * count


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_texts(model: Decoder, texts: dict[str, list[list[int]]], shape: MeshShape, options: str) -> None:
    sharded = divided(model, shape)
    assert generate(sharded, PROMPTS, max_new_tokens=24, **OPTIONS[options]) == texts[options]


def test_out_of_memory_on_a_mesh(
    model: Decoder, texts: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode_few(config: Any, params: Any, state: Any, *args: Any) -> Any:
        if state.token.shape[0] > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return decode(config, params, state, *args)

    monkeypatch.setattr(device_loop, "decode", decode_few)
    told: list[int] = []
    sharded = divided(model, MeshShape(2, 2))
    assert generate(sharded, PROMPTS, max_new_tokens=24, slots=8, on_out_of_memory=told.append) == texts["greedy"]
    assert told == [4, 2]


def test_programs_are_compiled_once(model: Decoder) -> None:
    """What a program returns lies where it takes it from."""
    sharded = divided(model, MeshShape(2, 2))
    programs = (admit, decode, empty_state, whole_extend, append, last_hidden, whole_rows, score_tokens)
    for program in programs:
        program.clear_cache()
    for _ in range(2):
        generate(sharded, [*PROMPTS[:6], tokens(460)], max_new_tokens=40, slots=4)
    assert [program._cache_size() for program in programs] == [1, 1, 1, 2, 2, 2, 0, 0]  # two sizes of chunks
    for program in programs:
        program.clear_cache()
    engine = Engine(sharded)
    for _ in range(2):
        engine.loglikelihood(REQUESTS[4:30])
    assert [program._cache_size() for program in programs[-2:]] == [1, 1]


# --------------------------------------------------------------------------------------------------- collectives


def collectives(program: Any, *args: Any) -> Counter[tuple[str, str]]:
    """How often each kind moves certain arrays, by what one device has of them."""
    found = hlo_collectives.collectives(program.lower(*args).compile().as_text())
    return Counter((collective.kind, " ".join(map(str, collective.shapes))) for collective in found)


@pytest.fixture(scope="module")
def compiled_for(model: Decoder) -> dict[str, Counter[tuple[str, str]]]:
    """The collectives of each program on two replicas of four devices."""
    config = dataclasses.replace(model.config, vocab_size=96)
    sharded = shard_model(Decoder(config, rngs=nnx.Rngs(0)), make_mesh(MeshShape(2, 4), 2))
    mesh, config, params = mesh_of(sharded), sharded.config, nnx.state(sharded, nnx.Param)
    mlp = sharded.layers[0].mlp
    gate, down = mlp.gate_proj[...], mlp.down_proj[...]
    masks = (np.ones(84, np.float32),) * 2
    zeros = np.zeros(2, np.int32)

    def batch(*shape: int) -> Any:
        return place(mesh, np.zeros(shape, np.int32), "batch", None)

    with use_mesh(mesh):
        cache = KVCache.empty(config, 2, 2560, jnp.float32)
        hidden, new = extend(config, params, cache, batch(2, 128), masks)
        state = empty_state(config, 8, 1024, jnp.float32)
        sampling = Sampling.of((), 0, 1, 0)
        programs: dict[str, Callable[[], Any]] = {
            **{name: functools.partial(collectives, score_layer, f, gate, gate) for name, f in WEIGHT_CRITERIA.items()},
            "extents of gate": lambda: collectives(matrix_extents, gate, 1),
            "extents of down": lambda: collectives(matrix_extents, down, 0),
            "slice gate": lambda: collectives(slice_neurons, 0, 3, gate, np.arange(41, dtype=np.int32)),
            "slice down": lambda: collectives(slice_neurons, 1, 3, down, np.arange(41, dtype=np.int32)),
            "extend": lambda: collectives(whole_extend, config, params, cache, batch(2, 128), masks),
            "append": lambda: collectives(append, cache, new, zeros),
            "rows": lambda: collectives(whole_rows, config, params, cache, *(batch(4, 128),) * 3, masks),
            "score tokens": lambda: collectives(score_tokens, config, params, hidden, *(batch(2, 32),) * 2),
            "admit": lambda: collectives(
                admit, config, params, state, cache, hidden[:, 0], zeros, zeros, np.int32(9), sampling
            ),
            "decode": lambda: collectives(decode, config, params, state, sampling, masks),
        }
        return {name: compile_it() for name, compile_it in programs.items()}


@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
def test_scoring_is_local_and_only_scores_are_gathered(compiled_for: Any, criterion: str) -> None:
    assert compiled_for[criterion] == {("all-gather", "f32[84]"): 1}


@pytest.mark.parametrize("matrix", ["gate", "down"])
def test_the_fingerprint_is_local(compiled_for: Any, matrix: str) -> None:
    found = compiled_for[f"extents of {matrix}"]
    assert found == {("all-gather", "f32[84]"): 1, ("all-reduce", "pred[]"): 1}


@pytest.mark.parametrize("matrix", ["slice gate", "slice down"])
def test_slicing_gathers_no_matrix(compiled_for: Any, matrix: str) -> None:
    found = compiled_for[matrix]
    assert {kind for kind, _ in found} == {"all-to-all"}
    assert found.total() == 2


@pytest.mark.parametrize("program", ["extend", "rows"])
def test_the_forward_pass_adds_up_hidden_states_twice_a_layer(compiled_for: Any, program: str) -> None:
    """After attention and after the MLP; and once more for an embedding whose vocabulary is divided."""
    assert {kind for kind, _ in compiled_for[program]} == {"all-reduce"}
    rows_of_each = {"extend": 1, "rows": 2}[program]
    assert compiled_for[program] == {("all-reduce", f"f32[{rows_of_each},128,48]"): 5}


def test_caches_are_written_where_they_are(compiled_for: Any) -> None:
    assert compiled_for["append"] == {}


@pytest.mark.parametrize("program", ["score tokens", "admit", "decode"])
def test_what_is_chosen_from_logits_moves_little(compiled_for: Any, program: str) -> None:
    """Of logits at most those of one token for each slot of a replica are gathered, of the cache nothing."""
    most = {"score tokens": 2 * 32, "admit": 1 * 96, "decode": 4 * 96}[program]
    assert compiled_for[program]
    for kind, shapes in compiled_for[program]:
        for sizes in re.findall(r"\[([0-9,]*)\]", shapes):
            assert math.prod(int(size) for size in sizes.split(",") if size) <= max(most, 4 * 48), (kind, shapes)


def test_an_abstract_model_lives_nowhere() -> None:
    assert mesh_of(abstract_model(convert_config())) is None


def test_out_of_a_mesh_nothing_is_constrained(tmp_path: Path) -> None:
    x = jnp.ones((3, 4))
    assert constrain(x, "batch", None) is x
