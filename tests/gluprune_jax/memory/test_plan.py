"""What is planned against what is there: shards of real models and caches, temporaries of compiled programs."""

import dataclasses
import io
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sharded import shard_model
from tiny_config import tiny_config

from gluprune_jax.cli.memory import show_plan
from gluprune_jax.errors import RequestError
from gluprune_jax.inference.device_loop import decode, empty_state
from gluprune_jax.inference.engine import score_tokens, whole_rows
from gluprune_jax.inference.generation import slots_for
from gluprune_jax.inference.prefill import cache_slots, whole_extend
from gluprune_jax.inference.sampling import Sampling
from gluprune_jax.memory.plan import Evaluation, MemoryPlan, Pruning, check_fits, choose_mesh, plan_memory
from gluprune_jax.models.cache import KVCache
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model
from gluprune_jax.parallel import machine
from gluprune_jax.parallel.machine import device_memory, free_memory, parse_bytes
from gluprune_jax.parallel.mesh import MeshShape, make_mesh, place, use_mesh
from gluprune_jax.pruning.calibration import advance_layer, observe_layer, zero_sums
from gluprune_jax.pruning.least_squares import least_squares
from gluprune_jax.pruning.reconstruction import STEP_TOKENS, Example, first_state, fit_step, make_start
from gluprune_jax.pruning.reconstruction import Schedule as FitSchedule
from gluprune_jax.pruning.scores import mlp_weights

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from shapes import shapes_of

GiB = 2**30
LLAMA = {name: shapes_of(name.lower()) for name in ("Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B", "Llama-3.1-70B")}
CONFIG = tiny_config(
    vocab_size=96,
    hidden_size=48,
    intermediate_sizes=(80, 80, 80),
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=4096,
)
EVALUATION = Evaluation(cached=2048, decoded=2048)
MESHES = [MeshShape(*sizes) for sizes in ((1, 1), (8, 1), (2, 4), (4, 2), (1, 8), (1, 3), (2, 3))]


def on_first_device(tree: Any) -> int:
    first = jax.devices()[0]
    shards = (shard for array in jax.tree.leaves(tree) for shard in array.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == first)


# --------------------------------------------------------------------------------------------------- weights, cache


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"intermediate_sizes": (77, 80, 3)},
        {"tie_word_embeddings": True, "vocab_size": 97},
        {"num_attention_heads": 6, "num_key_value_heads": 2},
        {"num_key_value_heads": 1},
    ],
    ids=["even", "odd widths", "odd vocabulary, tied", "6 heads", "one key/value head"],
)
def test_weights_are_what_a_device_holds(shape: MeshShape, changes: dict[str, Any]) -> None:
    model = Decoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0), dtype=jnp.float32)
    model.layers[1].mlp.gate_proj.set_value(model.layers[1].mlp.gate_proj.get_value().astype(jnp.bfloat16))
    model.layers[2].self_attn.q_proj.set_value(model.layers[2].self_attn.q_proj.get_value().astype(jnp.float16))
    mesh = make_mesh(shape, model.config.num_key_value_heads)
    real = on_first_device(nnx.state(shard_model(model, mesh), nnx.Param))
    for use in (EVALUATION, Pruning()):
        assert plan_memory(model, shape, use).weights == real


def test_padding_of_another_mesh_is_not_counted() -> None:
    odd = dataclasses.replace(CONFIG, intermediate_sizes=(77,) * 3)
    models = [abstract_model(dataclasses.replace(odd, width_multiple=multiple)) for multiple in (1, 16)]
    plans = [plan_memory(model, MeshShape(2, 4), EVALUATION) for model in models]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_cache_is_what_a_device_holds(shape: MeshShape, dtype: Any) -> None:
    use = Evaluation(cached=300, decoded=700, slots=3)
    mesh = make_mesh(shape, CONFIG.num_key_value_heads)
    with use_mesh(mesh):
        prefix = KVCache.empty(CONFIG, shape.data, cache_slots(300), dtype)
        slots = empty_state(CONFIG, shape.data * 3, slots_for(700), dtype).cache
    model = abstract_model(CONFIG, dtype)
    assert plan_memory(model, shape, use).cache == on_first_device((prefix, slots))
    scoring = dataclasses.replace(use, decoded=0)
    assert plan_memory(model, shape, scoring).cache == on_first_device(prefix)
    assert plan_memory(model, shape, Pruning()).cache == 0


@given(
    st.integers(1, 300),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([EVALUATION, Evaluation(9000, 0, rows=1), Pruning(), Pruning(stream=True)]),
)
@settings(max_examples=60, deadline=None)
def test_more_devices_never_hold_more(width: int, kv_heads: int, group: int, use: Evaluation | Pruning) -> None:
    """Where heads and vocabulary divide over them, and but for the padding of the neurons."""
    config = dataclasses.replace(
        CONFIG.with_layers((0, 1), (width, 2 * width)),
        num_key_value_heads=1 << kv_heads,
        num_attention_heads=8 << group,
    )
    model = abstract_model(config, jnp.bfloat16)
    plans = [plan_memory(model, MeshShape(1, size), use) for size in (1, 2, 4, 8)]
    for fewer, more in itertools.pairwise(plans):
        padding = more.mesh.model * config.hidden_size * 3 * config.num_hidden_layers * 2
        assert more.weights <= fewer.weights + padding
        assert more.cache <= fewer.cache
        assert more.workspace <= fewer.workspace + 4 * padding + 3 * 4 * EVALUATION.rows * 512


def test_replicas_change_nothing_but_how_many_fill_levels_there_are() -> None:
    model = abstract_model(CONFIG)
    one, four = (plan_memory(model, MeshShape(data, 2), EVALUATION) for data in (1, 4))
    assert (one.weights, one.workspace) == (four.weights, four.workspace)
    assert four.cache - one.cache == 3 * 4 * (1 + EVALUATION.slots)


def test_streaming_holds_one_layer() -> None:
    config = dataclasses.replace(CONFIG, intermediate_sizes=(8, 72, 16))
    plan = plan_memory(abstract_model(config, jnp.bfloat16), MeshShape(1, 8), Pruning(stream=True))
    assert plan.weights == 3 * 72 * 48 * 2 // 8


# --------------------------------------------------------------------------------------------------- workspace

MID = dataclasses.replace(
    CONFIG.with_layers((0, 1), (1536, 1536)), vocab_size=8192, hidden_size=512, num_attention_heads=8, head_dim=64
)
WIDE_VOCABULARY = dataclasses.replace(MID, vocab_size=65536, hidden_size=128, intermediate_sizes=(256,) * 2)


def temporaries(config: ModelConfig, shape: MeshShape, use: Evaluation, dtype: Any) -> dict[str, int]:
    """Bytes of a device that the compiled programs of an evaluation use besides their arguments and results."""
    mesh = None if shape == MeshShape(1, 1) else make_mesh(shape, config.num_key_value_heads)
    model = Decoder(config, rngs=None, dtype=dtype)
    if mesh is not None:
        model = shard_model(model, mesh)
    params = nnx.state(model, nnx.Param)
    masks = tuple(place(mesh, jnp.ones(w)) for w in model.config.stored_intermediate_sizes)
    sampling = Sampling(
        *(jnp.zeros(size, kind) for size, kind in ((8, "int32"), ((), "f4"), ((), "f4"), ((), "uint32")))
    )

    def tokens(count: int, length: int) -> Any:
        return place(mesh, jnp.zeros((count, length), jnp.int32), "batch", None)

    with use_mesh(mesh):
        cache = KVCache.empty(config, shape.data, cache_slots(use.cached), dtype)
        state = empty_state(config, shape.data * use.slots, slots_for(use.decoded), dtype)
        hidden = place(mesh, jnp.zeros((shape.data, use.rows * 512, config.hidden_size), dtype), "batch", None, None)
        asked = jnp.zeros((shape.data, 256), jnp.int32)
        many = tokens(shape.data * use.rows, 512)
        lowered = {
            "rows": whole_rows.lower(model.config, params, cache, many, many, many, masks),
            "extend": whole_extend.lower(model.config, params, cache, tokens(shape.data, 512), masks),
            "score": score_tokens.lower(model.config, params, hidden, asked, asked),
            "decode": decode.lower(model.config, params, state, sampling, masks),
        }
        return {name: program.compile().memory_analysis().temp_size_in_bytes for name, program in lowered.items()}


@pytest.mark.parametrize(
    ("config", "shape", "use", "largest"),
    [
        (MID, (1, 1), Evaluation(512, 512), "rows"),
        (WIDE_VOCABULARY, (1, 1), Evaluation(512, 512, rows=1, slots=2), "score"),
        (WIDE_VOCABULARY, (1, 1), Evaluation(512, 512, rows=1, slots=96), "decode"),
        (MID, (2, 4), Evaluation(512, 512), "rows"),
    ],
)
def test_the_workspace_is_above_what_compiled_programs_use(
    config: ModelConfig, shape: tuple[int, int], use: Evaluation, largest: str
) -> None:
    used = temporaries(config, MeshShape(*shape), use, jnp.float32)
    planned = plan_memory(abstract_model(config), MeshShape(*shape), use).workspace
    assert max(used, key=used.__getitem__) == largest, used
    assert used[largest] <= planned <= 4 * used[largest], used


def test_the_workspace_of_bfloat16_on_cpus() -> None:
    """Up to some version, XLA keeps float32 copies of weights and caches there while it decodes."""
    use = Evaluation(512, 512, rows=1, on_cpu=True)
    used = temporaries(MID, MeshShape(1, 1), use, jnp.bfloat16)
    assert max(used.values()) <= plan_memory(abstract_model(MID, jnp.bfloat16), MeshShape(1, 1), use).workspace


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize("is_compensated", [False, True])
def test_the_workspace_of_calibration_is_above_what_compiled_programs_use(
    shape: tuple[int, int], is_compensated: bool
) -> None:
    use = Pruning(calibration=8192, is_compensated=is_compensated)
    model, mesh = Decoder(MID, rngs=None, dtype=jnp.float32), None
    if shape != (1, 1):
        mesh = make_mesh(MeshShape(*shape), MID.num_key_value_heads)
        model = shard_model(model, mesh)
    graphdef, state = nnx.split(model.layers[0])
    windows = place(mesh, jnp.zeros((4 * shape[0], 512), jnp.int32), "batch", None)
    x = place(mesh, jnp.zeros((4 * shape[0], 512, MID.hidden_size)), "batch", None, None)
    down = model.layers[0].mlp.down_proj[...]
    with use_mesh(mesh):
        sums = zero_sums(1536, is_compensated)
        lowered = {"observe": observe_layer.lower(graphdef, state, windows, x, sums)}
        lowered["advance"] = advance_layer.lower(graphdef, state, down, windows, x, x)
        if is_compensated:
            lowered["refit"] = least_squares.lower(sums.gram, down, jnp.ones(1536), jnp.float32(1))
        analyses = {name: program.compile().memory_analysis() for name, program in lowered.items()}
    # Beside a program's temporary arrays: the residual stream, and the Gram matrix that it adds to or refits by.
    stream = 2 * 16 // shape[0] * 512 * MID.hidden_size * 4
    gram = 0 if sums.gram is None else sums.gram.addressable_shards[0].data.nbytes
    used = {name: analysis.temp_size_in_bytes + stream + gram for name, analysis in analyses.items()}
    planned = plan_memory(abstract_model(MID), MeshShape(*shape), use).workspace
    assert max(used.values()) <= planned <= 4 * max(used.values()), used


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 8)])
def test_the_workspace_of_reconstruction_is_above_what_it_holds_and_a_step_uses(shape: tuple[int, int]) -> None:
    model, mesh = Decoder(MID, rngs=None, dtype=jnp.float32), None
    if shape != (1, 1):
        mesh = make_mesh(MeshShape(*shape), MID.num_key_value_heads)
        model = shard_model(model, mesh)
    graphdef, layer = nnx.split(model.layers[0])
    rows = -(-STEP_TOKENS // 512 // shape[0]) * shape[0]
    x = place(mesh, jnp.zeros((rows, 512, MID.hidden_size)), "batch", None, None)
    example = Example(place(mesh, jnp.zeros((rows, 512), jnp.int32), "batch", None), x, x, 1.0)
    schedule = FitSchedule(8, 1e-3)
    with use_mesh(mesh):
        start = make_start(next(mlp_weights(model)), place(mesh, jnp.ones(1536), "neurons"))
        state = first_state(schedule, start)
        analysis = fit_step.lower(graphdef, schedule, layer, start, state, example).compile().memory_analysis()
    held = on_first_device((state, start.mlp, start.mlp))
    streams = 3 * 16 * 512 * MID.hidden_size * 4 // shape[0]
    fitted = sum(on_first_device(tuple(mlp)) for mlp in mlp_weights(model))
    used = analysis.temp_size_in_bytes + held + streams + fitted
    planned = plan_memory(
        abstract_model(MID), MeshShape(*shape), Pruning(calibration=8192, reconstructs=True)
    ).workspace
    assert used <= planned <= 4 * used


# -------------------------------------------------------------------------------------------------------- choice


def llama(name: str, dtype: Any = jnp.bfloat16) -> Decoder:
    return abstract_model(LLAMA[name], dtype)


def test_the_shapes_are_those_of_the_models() -> None:
    sizes = {name: round(config.num_parameters / 1e9, 2) for name, config in LLAMA.items()}
    assert sizes == {"Llama-3.2-1B": 1.24, "Llama-3.2-3B": 3.21, "Llama-3.1-8B": 8.03, "Llama-3.1-70B": 70.55}


@pytest.mark.parametrize(
    ("name", "devices", "gibibytes", "model"),
    [
        ("Llama-3.2-1B", 1, 16, 1),
        ("Llama-3.2-1B", 8, 16, 1),
        ("Llama-3.2-3B", 8, 16, 1),
        ("Llama-3.1-8B", 4, 95, 1),  # TPU v5p
        ("Llama-3.1-8B", 4, 16, 2),
        ("Llama-3.1-8B", 6, 16, 2),
        ("Llama-3.1-8B", 3, 16, 3),
        ("Llama-3.1-70B", 256, 16, 16),  # 131.4 GiB: 16.4 on each of 8 devices, 8.4 on each of 16
        ("Llama-3.1-70B", 256, 32, 8),  # 32.9 GiB on each of 4
    ],
)
def test_evaluation_holds_as_many_replicas_as_fit(name: str, devices: int, gibibytes: int, model: int) -> None:
    shape = choose_mesh(llama(name), devices, gibibytes * GiB, EVALUATION)
    assert shape == MeshShape(devices // model, model)


def test_a_single_replica_takes_the_fewest_devices() -> None:
    one = dataclasses.replace(EVALUATION, has_replicas=False)
    for name, size in (("Llama-3.2-1B", 1), ("Llama-3.1-8B", 2)):
        assert choose_mesh(llama(name), 8, 16 * GiB, one) == MeshShape(1, size)
    assert choose_mesh(llama("Llama-3.1-70B"), 8, None, one) == MeshShape(1, 1)


def test_weights_by_arithmetic() -> None:
    model = llama("Llama-3.1-70B")
    whole = 2 * LLAMA["Llama-3.1-70B"].num_parameters
    norms = 2 * (2 * 80 + 1) * 8192
    for size in (1, 2, 4, 8):
        assert plan_memory(model, MeshShape(1, size), EVALUATION).weights == (whole - norms) // size + norms
    # From 16 devices on, pairs of them hold the same one of the 8 key/value heads.
    keys_and_values = 2 * 2 * 80 * 8192 * 8 * 128
    divided = (whole - norms - keys_and_values) // 16 + keys_and_values // 8 + norms
    assert plan_memory(model, MeshShape(1, 16), EVALUATION).weights == divided


def test_more_tokens_take_more_devices() -> None:
    model = llama("Llama-3.1-8B")
    sizes = [choose_mesh(model, 8, 32 * GiB, Evaluation(n, n)).model for n in (2048, 16384, 65536)]
    assert sizes == [1, 2, 8]


def test_pruning_divides_one_model_over_all_devices_and_streams_on_one() -> None:
    for name in LLAMA:
        assert choose_mesh(llama(name), 16, 16 * GiB, Pruning()) == MeshShape(1, 16)
        assert choose_mesh(llama(name), 16, 16 * GiB, Pruning(stream=True)) == MeshShape(1, 1)


def test_unknown_memory_and_that_of_cpus() -> None:
    model = llama("Llama-3.1-70B")
    assert choose_mesh(model, 8, None, EVALUATION) == MeshShape(8, 1)
    assert choose_mesh(model, 8, None, Pruning()) == MeshShape(1, 8)


# -------------------------------------------------------------------------------------------------------- refusal


def refusal(name: str, shape: MeshShape, capacity: int, use: Evaluation | Pruning, dtype: Any = jnp.bfloat16) -> str:
    model = llama(name, dtype)
    with pytest.raises(RequestError) as error:
        check_fits(model, plan_memory(model, shape, use), capacity)
    return str(error.value)


def test_a_refusal_says_what_is_needed_and_what_would_do() -> None:
    assert refusal("Llama-3.1-70B", MeshShape(1, 8), 16 * GiB, EVALUATION) == (
        "on the mesh data=1,model=8 the model needs 19.57 GB of each device (weights 17.64 GB, cache 1.45 GB, "
        "workspace 481.03 MB), and of the 17.18 GB that one has at most 90% are used; what would do: 16 such devices "
        "and `mesh` model=16"
    )


@pytest.mark.parametrize(
    ("arguments", "remedies"),
    [
        (("Llama-3.1-8B", MeshShape(4, 1), 16 * GiB, EVALUATION), "`mesh` data=2,model=2"),
        (("Llama-3.1-8B", MeshShape(1, 1), 16 * GiB, Pruning()), "`stream`, or 2 such devices and `mesh` model=2"),
        (("Llama-3.1-8B", MeshShape(1, 1), 4 * GiB, Pruning(stream=True), jnp.float32), None),
        (
            ("Llama-3.2-1B", MeshShape(1, 1), 8 * GiB, Evaluation(16384, 16384)),
            "`batch_size` 2, or `context_length` 8192, or 2 such devices and `mesh` model=2",
        ),
        (
            ("Llama-3.2-1B", MeshShape(1, 1), 6 * GiB, EVALUATION, jnp.float32),
            "`batch_size` 1, or `dtype` bfloat16, or 2 such devices and `mesh` model=2",
        ),
        (
            ("Llama-3.1-8B", MeshShape(1, 1), 4 * GiB, Evaluation(131072, 131072, rows=8, slots=64)),
            "no single change; fewer tokens, a smaller batch or larger devices",
        ),
    ],
)
def test_remedies(arguments: tuple[Any, ...], remedies: str | None) -> None:
    if remedies is None:
        model = llama(arguments[0], *arguments[4:])
        check_fits(model, plan_memory(model, arguments[1], arguments[3]), arguments[2])
    else:
        assert refusal(*arguments).split("what would do: ")[1] == remedies


def test_bfloat16_is_no_remedy_on_cpus() -> None:
    use = dataclasses.replace(EVALUATION, on_cpu=True)
    assert "bfloat16" not in refusal("Llama-3.2-1B", MeshShape(1, 1), 6 * GiB, use, jnp.float32)


def test_the_automatic_choice_is_refused_too() -> None:
    for devices, use, message in (
        (4, EVALUATION, r"on the mesh data=1,model=4 .* 16 such devices and `mesh` model=16$"),
        (8, Pruning(), r"what would do: `stream`, or 16 such devices and `mesh` model=16$"),
    ):
        shape = choose_mesh(llama("Llama-3.1-70B"), devices, 16 * GiB, use)
        model = llama("Llama-3.1-70B")
        with pytest.raises(RequestError, match=message):
            check_fits(model, plan_memory(model, shape, use), 16 * GiB)


def test_only_options_that_a_command_has_are_named() -> None:
    model = llama("Llama-3.1-70B")
    with pytest.raises(RequestError, match=r"what would do: 16 such devices and `mesh` model=16$"):
        check_fits(model, plan_memory(model, MeshShape(1, 8), Pruning()), 16 * GiB, {"mesh", "dtype"})


def test_a_tenth_is_spared() -> None:
    plan = MemoryPlan(MeshShape(1, 1), Pruning(), weights=80, cache=5, workspace=5)
    assert plan.fits(100)
    assert not plan.fits(99)


# ---------------------------------------------------------------------------------------------------------- table


def test_table_and_json() -> None:
    plan = MemoryPlan(MeshShape(2, 4), EVALUATION, weights=4 * 10**9, cache=10**9, workspace=5 * 10**8)

    def shown(capacity: int | None) -> tuple[str, list[list[str]]]:
        show_plan(plan, capacity, Console(file=(file := io.StringIO()), width=80))
        title, *rows = file.getvalue().splitlines()
        return title.strip(), [[cell.strip() for cell in row.split("│")[1:-1]] for row in rows if "│" in row]

    title, lines = shown(10**10)
    assert title == "memory of each device, data=2,model=4 (8 devices)"
    assert lines == [
        ["weights", "4.00 GB", "40.0%"],
        ["cache", "1.00 GB", "10.0%"],
        ["workspace, at most", "500.00 MB", "5.0%"],
        ["total", "5.50 GB", "55.0%"],
        ["the device", "10.00 GB", "100.0%"],
    ]
    assert json.loads(json.dumps(plan.summary(10**10))) == {
        "mesh": {"data": 2, "model": 4},
        "devices": 8,
        "bytes_per_device": {
            "weights": 4 * 10**9,
            "cache": 10**9,
            "workspace": 5 * 10**8,
            "total": 5_500_000_000,
            "device": 10**10,
        },
        "fits": True,
    }
    assert plan.summary()["fits"] is None
    assert shown(None) == (title, [[name, size, ""] for name, size, _ in lines[:-1]])


# -------------------------------------------------------------------------------------------------------- machine


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GiB", 16 * 2**30),
        ("80GB", 80 * 10**9),
        (" 1.5 tib ", 3 * 2**39),
        ("512MiB", 2**29),
        ("0.1GB", 10**8),
        ("3kB", 3000),
    ],
)
def test_bytes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["16", "16G", "GiB", "", "-1GiB", "0GB", "1e3GB", "16 GiB x", "٣GB", "1" * 30 + "GB"])
def test_other_sizes_are_refused(text: str) -> None:
    message = f"--memory is {text!r}; write a positive number and its unit, such as 16GiB or 80GB"
    with pytest.raises(RequestError) as error:
        parse_bytes(text, "--memory")
    assert str(error.value) == message


def test_cpu_devices_share_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "host_memory", lambda: 8000)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 16, "SC_PAGE_SIZE": 1000}.get)
    assert jax.local_device_count() == 8
    assert (device_memory(), free_memory()) == (2000, 1000)


@pytest.mark.parametrize(
    ("stats", "total", "free"),
    [({"bytes_limit": 900, "bytes_in_use": 300}, 900, 600), ({}, None, 1000), (None, None, 1000)],
)
def test_accelerators_say_what_they_have(
    stats: dict[str, int] | None, total: int | None, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Device:
        platform = "tpu"

        def memory_stats(self) -> dict[str, int] | None:
            return stats

    monkeypatch.setattr(machine, "host_memory", lambda: 8000)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert device_memory() == total
    assert free_memory() == free
