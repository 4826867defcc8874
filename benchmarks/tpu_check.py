"""Compiles the programs with the real TPU compiler, for real topologies, without a TPU.

    pip install 'gluprune-jax[tpu]' && python benchmarks/tpu_check.py      # Llama-3.2-1B on one v5e chip and on eight
    python benchmarks/tpu_check.py --case all                              # the other models too
    python benchmarks/tpu_check.py --model llama-3.1-8b --topology v5e:4x4 --mesh data=4,model=4
    python benchmarks/tpu_check.py --scaling                               # what a chip does of 1, 8, 64 and 256

Weights are bfloat16. Says of each program how long it takes to compile, what memory it needs on a chip, and what moves
between chips. Fails if a program does not compile, does not fit into the memory of the chip, if something moves that
`EXPECTED` does not list, or if a program that evaluation spends its time in takes more bytes or operations than it must
(`Need`): arguments, temporary arrays and results against weights, cache and logits asked for, and the compiler's count
of operations against those of the matrix products.

Bytes of a collective are those of its results on one chip. What is in a loop (the steps of decoding, the blocks of a
cache) is counted once, in operations and bytes too: the compiler does not know how often it runs.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

# Before jax is imported: this process drives the CPU and only borrows the TPU's compiler.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from flax import nnx
from hlo_collectives import Collective, collectives
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from rich.console import Console
from rich.table import Table
from shapes import HF_CONFIGS, shapes_of

from gluprune_jax.errors import RequestError
from gluprune_jax.inference.device_loop import STEPS_PER_CALL, DecodeState, admit, decode
from gluprune_jax.inference.engine import SCORED_TOKENS, score_tokens, whole_rows
from gluprune_jax.inference.prefill import append, whole_extend
from gluprune_jax.inference.sampling import Sampling
from gluprune_jax.models.attention import KEY_BLOCK
from gluprune_jax.models.cache import KVCache, LayerCache
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.parameters import abstract_model
from gluprune_jax.parallel.mesh import MeshShape, make_mesh, parameter_sharding, parse_mesh, use_mesh
from gluprune_jax.parallel.sharding import CACHE_AXES, partition_spec
from gluprune_jax.pruning.calibration import BATCH_TOKENS, Sums, advance_layer, backward_layer, observe_layer
from gluprune_jax.pruning.criteria import WEIGHT_CRITERIA
from gluprune_jax.pruning.device_scores import matrix_extents, score_layer
from gluprune_jax.pruning.least_squares import least_squares
from gluprune_jax.pruning.reconstruction import LEARNING_RATE, PASSES, Example, FitState, Schedule, Start, fit_step
from gluprune_jax.pruning.scores import MLPWeights
from gluprune_jax.pruning.slicing import slice_neurons

HBM_BYTES = {"v4": 32 * 2**30, "v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30}  # of one chip
DTYPE = jnp.bfloat16
PRUNED = 0.4  # of the neurons
CALIBRATION_TOKENS = 131072  # whose residual stream is held
CHUNK, HEADER, LONG = 512, 2048 + 512, 32768 + 512  # tokens run together, and slots of caches they stand on
# Operations a logit to choose a token, by the compiler: random bits, noise, and the sort of top-p, in branches that
# greedy decoding does not take. Each chip does it for the whole vocabulary.
CHOOSING = 320
SLOTS, SLOT_SIZE = 8, 1024  # sequences decoded together in each replica
ASKED = SCORED_TOKENS[-1]  # tokens of each replica whose logits are formed together


# ------------------------------------------------------------------------------------------------------ expectations


class Expected(NamedTuple):
    """A collective that a program may hold, of arrays up to a size: a key of `largest`."""

    kind: str
    what: str
    why: str


def _gathered(what: str, why: str) -> tuple[Expected, ...]:
    # Where the parts are no multiple of a register, the compiler pads them with zeros and adds them up instead.
    return tuple(Expected(kind, what, why) for kind in ("all-gather", "all-reduce"))


_SUMS = Expected("all-reduce", "hidden states", "each chip adds its heads, neurons and part of the vocabulary")
_NUMBERS = _gathered("a number a token", "every process reads what all replicas found")
_LOGITS = _gathered("logits", "a token is chosen from all of its logits, of which each chip has a part")
EXPECTED: dict[str, tuple[Expected, ...]] = {
    "score": _gathered("scores", "each chip scores its own neurons, and the host wants all scores"),
    "fingerprint": (
        *_gathered("scores", "as for scores"),
        Expected("all-reduce", "a number a token", "whether all weights are finite"),
    ),
    "slice": (Expected("all-to-all", "part of a matrix", "from neurons to hidden size and back, in equal parts"),),
    "forward": (_SUMS,),
    "append": (),  # keys and values are written where they are
    "score tokens": _NUMBERS,
    "admit": (*_LOGITS, *_NUMBERS),
    "decode": (_SUMS, *_LOGITS, *_NUMBERS),
    "calibration": (
        _SUMS,
        *_gathered("neurons", "each chip multiplies its own neurons by all of them"),
        Expected("all-reduce", "Gram matrix", "replicas add up what their windows give"),
        *_NUMBERS,
    ),
    "least squares": (
        *_gathered("whole Gram matrix", "every chip factors the matrix, and solves for its part of the hidden size"),
        *_gathered("down in float32", "the right sides, and the solutions, change hands"),
        Expected("all-to-all", "down in float32", "from neurons to hidden size and back"),
        Expected("collective-permute", "whole Gram matrix", "a padded part changes hands"),
        *_NUMBERS,
    ),
}


def largest(config: ModelConfig, mesh: MeshShape, tokens: int) -> dict[str, int]:
    """Bytes of the largest array of each kind in `EXPECTED`, in a program on so many tokens in each replica."""
    D, F, size = config.hidden_size, config.stored_intermediate_sizes[0], jnp.dtype(DTYPE).itemsize
    return {
        "scores": 4 * F,
        "neurons": 4 * tokens * F,
        "Gram matrix": 4 * F * F // mesh.model,
        "whole Gram matrix": 4 * F * F,
        "down in float32": 4 * F * D,
        "part of a matrix": F // mesh.model * (D + -D % mesh.model) * size,
        "hidden states": tokens * D * size,
        "logits": 4 * tokens * config.vocab_size,
        "a number a token": max(512, 4 * mesh.data * tokens),  # 512 bytes: one register, packed bits for instance
    }


def unexpected(found: Sequence[Collective], expected: Sequence[Expected], limits: dict[str, int]) -> list[str]:
    """A sentence for each collective that is not expected, or larger than expected."""
    most: dict[str, int] = {}
    for kind, what, _ in expected:
        most[kind] = max(most.get(kind, 0), limits[what])
    wrong = (c for c in found if any(shape.nbytes > most.get(c.kind, -1) for shape in c.shapes))
    accepted = ", ".join(f"{kind} of {what} (up to {limits[what]:,} bytes)" for kind, what, _ in expected) or "none"
    return [
        f"{c.kind} of {' and '.join(map(str, c.shapes))} ({c.nbytes:,} bytes on each chip); expected: {accepted}"
        for c in dict.fromkeys(wrong)
    ]


# ------------------------------------------------------------------------------------------------------------- cases

PRUNING = (*WEIGHT_CRITERIA, "fingerprint", "slice gate", "slice down")
EVALUATION = ("rows", "extend", "append", "score tokens", "admit", "decode")
CALIBRATION = ("Gram matrix", "advance", "least squares", "sensitivity", "reconstruct")
EVERYTHING = (*PRUNING, *EVALUATION, *CALIBRATION, "extend a long text")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a mesh of chips, and the programs to compile for it.

    Attributes:
      model: a name in `HF_CONFIGS`.
      topology: as the TPU's compiler calls it, such as "v5e:2x4".
      mesh: replicas, and chips of each.
      programs: names in `EVERYTHING`.
      rows: of 512 tokens, in each replica.
      layers: only the first so many of the model.
    """

    model: str
    topology: str
    mesh: MeshShape
    programs: tuple[str, ...] = (*PRUNING, *EVALUATION)
    rows: int = 16
    layers: int | None = None

    def __str__(self) -> str:
        cut = f", {self.layers} layers of it" if self.layers else ""
        return f"{self.model}{cut}, on {self.topology}, {self.mesh}"

    @property
    def config(self) -> ModelConfig:
        """The architecture as it is stored on the mesh."""
        config = shapes_of(self.model)
        layers = range(config.num_hidden_layers)[: self.layers]
        return dataclasses.replace(config.with_layers(layers), width_multiple=self.mesh.model)


# An evaluation has as many replicas as fit; pruning has one, divided over all chips.
CASES: dict[str, Case] = {
    "1b-one-chip": Case("llama-3.2-1b", "v5e:1x1", MeshShape(1, 1), EVERYTHING),
    "1b-calibration": Case("llama-3.2-1b", "v5e:2x4", MeshShape(2, 4), CALIBRATION),
    "1b-replicas": Case("llama-3.2-1b", "v5e:2x4", MeshShape(8, 1), EVALUATION),
    "1b-divided": Case("llama-3.2-1b", "v5e:2x4", MeshShape(1, 8)),
    # Of all families: windows with a RoPE of their own, norms of heads, norms behind, one key/value head.
    "gemma-3-1b-one-chip": Case("gemma-3-1b", "v5e:1x1", MeshShape(1, 1), EVERYTHING),
    "qwen3-0.6b-one-chip": Case("qwen3-0.6b", "v5e:1x1", MeshShape(1, 1), EVERYTHING),
    "3b-replicas": Case("llama-3.2-3b", "v6e:2x4", MeshShape(8, 1), EVALUATION),
    "3b-divided": Case("llama-3.2-3b", "v6e:2x4", MeshShape(1, 8)),
    "8b-replicas": Case("llama-3.1-8b", "v5p:2x2x1", MeshShape(4, 1), EVALUATION),
    "8b-calibration": Case("llama-3.1-8b", "v5p:2x2x1", MeshShape(1, 4), CALIBRATION),
    "8b-divided": Case("llama-3.1-8b", "v5p:2x2x1", MeshShape(1, 4), PRUNING),
    "70b-v5e": Case("llama-3.1-70b", "v5e:16x16", MeshShape(16, 16), EVALUATION),
    "70b-v5e-pruning": Case("llama-3.1-70b", "v5e:16x16", MeshShape(1, 256), PRUNING),
    "70b-v6e": Case("llama-3.1-70b", "v6e:16x16", MeshShape(32, 8), EVALUATION),
    "70b-v6e-pruning": Case("llama-3.1-70b", "v6e:16x16", MeshShape(1, 256), PRUNING),
}
# What CI has the time for: not `admit`, which sorts logits as `decode` does, and that alone compiles for 20 s; nor the
# refitting (50 s) and the backward pass (25 s).
CI = (
    dataclasses.replace(
        CASES["1b-one-chip"], programs=("ppm", "fingerprint", "slice down", "rows", "score tokens", "Gram matrix")
    ),
    dataclasses.replace(CASES["1b-replicas"], programs=("append", "score tokens")),
    dataclasses.replace(CASES["1b-divided"], programs=(*PRUNING, "extend", "append", "score tokens", "decode")),
    dataclasses.replace(CASES["1b-calibration"], programs=("Gram matrix", "advance")),
    dataclasses.replace(CASES["gemma-3-1b-one-chip"], programs=("ppm", "rows", "extend", "score tokens", "advance")),
    dataclasses.replace(CASES["qwen3-0.6b-one-chip"], programs=("ppm", "rows", "extend", "score tokens", "advance")),
)
# Work for each replica as before on more and more replicas; then one replica on more and more chips.
SCALING = ("ppm", "rows", "decode")
SCALING_TOPOLOGIES = {1: "v5e:1x1", 8: "v5e:2x4", 64: "v5e:8x8", 256: "v5e:16x16"}


def mesh_for(case: Case) -> Mesh:
    """The mesh of a case, on chips that are not there."""
    one = {"chips_per_host_bounds": (1, 1, 1)} if case.topology.endswith(":1x1") else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=case.topology, **one).devices
    if case.mesh.devices != len(devices):
        raise RequestError(f"--mesh {case.mesh} has {case.mesh.devices} chips, and {case.topology} has {len(devices)}")
    return make_mesh(case.mesh, case.config.num_key_value_heads, devices)


class Need(NamedTuple):
    """What a program cannot do without, on one chip.

    Attributes:
      nbytes: of weights, caches, logits asked for, and what goes in and comes out for each token.
      flops: of matrix products and of choosing tokens, what is in a loop counted once, as the compiler does.
      most_bytes: times `nbytes` that arguments, temporary arrays and results may take.
      most_flops: times `flops` that the compiler may count.
    """

    nbytes: int
    flops: int
    most_bytes: float = 1.10
    most_flops: float = 1.05


class Program(NamedTuple):
    """A jitted function and the shapes it is run on; `tokens` of each replica decide how much may move."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    expected: str
    tokens: int = 1
    beside: int = 0  # bytes on each chip that live beside its arguments and results
    need: Need | None = None


def programs(case: Case, mesh: Mesh) -> dict[str, Program]:
    """Every program with the shapes it is run on, and where these lie."""
    config, R = case.config, case.mesh.data
    D, F, L = config.hidden_size, config.stored_intermediate_sizes[0], config.num_hidden_layers
    kept = (width := shapes_of(case.model).intermediate_sizes[0]) - int(PRUNED * width)

    def array(dtype: Any, *shape: int, axes: Sequence[str | None] | None = None) -> jax.ShapeDtypeStruct:
        spec = partition_spec(axes or (None,) * len(shape), shape, mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return array(jnp.int32, *shape)

    def batch(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return array(dtype, *shape, axes=("batch", *(None,) * (len(shape) - 1)))

    def cache(rows: int, slots: int) -> KVCache:
        part = array(DTYPE, rows, config.num_key_value_heads, slots, config.head_dim, axes=CACHE_AXES)
        return KVCache((LayerCache(part, part),) * L, integers(rows))

    gate, down = array(DTYPE, F, D, axes=("neurons", None)), array(DTYPE, D, F, axes=(None, "neurons"))
    model = config, parameters(config, mesh)
    masks = (array(jnp.float32, F),) * L
    state = DecodeState(cache(R * SLOTS, SLOT_SIZE), *(integers(R * SLOTS),) * 3)
    number = array(jnp.float32)
    sampling = Sampling(integers(8), number, number, array(jnp.uint32))
    row_tokens = case.rows * CHUNK
    asked = batch(R, row_tokens, D, dtype=DTYPE), batch(R, ASKED), batch(R, ASKED)
    # Calibration runs a layer at a time, with the whole model and the residual stream beside it.
    graphdef, layer = layer_parameters(config, mesh)
    windows = R * BATCH_TOKENS // CHUNK
    stream = batch(windows, CHUNK, D, dtype=DTYPE)
    sums = Sums(*(array(jnp.float32, F, axes=("neurons",)),) * 3, array(jnp.float32, F, F, axes=("neurons", None)))
    step = graphdef, layer
    held = weights_on_a_chip(model[1]) + 2 * CALIBRATION_TOKENS // R * D * jnp.dtype(DTYPE).itemsize
    mask = array(jnp.float32, F)
    fit = fit_arguments(graphdef, layer, MLPWeights(gate, gate, down), array, batch)
    # Two streams, of the dense model and of the pruned one, and the new matrices of all layers.
    streams = held - weights_on_a_chip(model[1])
    held_in_fit = held + streams + L * 3 * F * D * jnp.dtype(DTYPE).itemsize // case.mesh.model
    need = needs(case, model[1])
    return {
        **{name: Program(score_layer, (function, gate, gate), "score") for name, function in WEIGHT_CRITERIA.items()},
        "fingerprint": Program(matrix_extents, (down, 0), "fingerprint"),
        "slice gate": Program(slice_neurons, (0, -kept % case.mesh.model, gate, integers(kept)), "slice"),
        "slice down": Program(slice_neurons, (1, -kept % case.mesh.model, down, integers(kept)), "slice"),
        "rows": Program(
            whole_rows,
            (*model, cache(R, HEADER), *(batch(R * case.rows, CHUNK),) * 3, masks),
            "forward",
            row_tokens,
            need=need["rows"],
        ),
        "extend": Program(
            whole_extend, (*model, cache(R, HEADER), batch(R, CHUNK), masks), "forward", CHUNK, need=need["extend"]
        ),
        "extend a long text": Program(whole_extend, (*model, cache(R, LONG), batch(R, CHUNK), masks), "forward", CHUNK),
        "append": Program(append, (cache(R, HEADER), cache(R, CHUNK).layers, integers(R)), "append"),
        "score tokens": Program(score_tokens, (*model, *asked), "score tokens", ASKED, need=need["score tokens"]),
        "admit": Program(
            admit,
            (*model, state, cache(R, HEADER), batch(R, D, dtype=DTYPE), *(integers(R),) * 2, integers(), sampling),
            "admit",
        ),
        "decode": Program(decode, (*model, state, sampling, masks), "decode", SLOTS, need=need["decode"]),
        "Gram matrix": Program(
            observe_layer, (*step, batch(windows, CHUNK), stream, sums), "calibration", BATCH_TOKENS, held
        ),
        "advance": Program(
            advance_layer,
            (graphdef, layer, down, batch(windows, CHUNK), stream, stream),
            "calibration",
            BATCH_TOKENS,
            held,
        ),
        "least squares": Program(least_squares, (sums.gram, down, mask, number), "least squares", 1, held),
        "sensitivity": Program(backward_layer, (*step, stream, stream), "calibration", BATCH_TOKENS, held),
        "reconstruct": Program(fit_step, fit, "calibration", CHUNK, held_in_fit),
    }


def fit_arguments(
    graphdef: Any,
    layer: nnx.State[Any, Any],
    mlp: MLPWeights[Any],
    array: Callable[..., Any],
    batch: Callable[..., Any],
) -> tuple[Any, ...]:
    """What a step of local reconstruction takes, of one window in each replica; `array` and `batch` make shapes."""
    D, F = mlp.down_proj.shape
    schedule = Schedule(PASSES * CALIBRATION_TOKENS // CHUNK, LEARNING_RATE)
    number, mask = array(jnp.float32), array(jnp.float32, F, axes=("neurons",))
    changes = MLPWeights(*(jax.ShapeDtypeStruct(w.shape, jnp.float32, sharding=w.sharding) for w in mlp))
    moments = jax.tree.map(
        lambda leaf: changes if isinstance(leaf, MLPWeights) else array(leaf.dtype, *leaf.shape),
        jax.eval_shape(schedule.optimizer().init, changes),
        is_leaf=lambda leaf: isinstance(leaf, MLPWeights),
    )
    replicas = batch(1).sharding.mesh.shape["data"]
    stream = batch(replicas, CHUNK, D, dtype=DTYPE)
    start = Start(mlp, MLPWeights(number, number, number), mask)
    example = Example(batch(replicas, CHUNK), stream, stream, number)
    return graphdef, schedule, layer, start, FitState(changes, moments), example


def layer_parameters(config: ModelConfig, mesh: Mesh) -> tuple[Any, nnx.State[Any, Any]]:
    """The graph of a decoder layer, and the shapes of its parameters."""
    graphdef, state = nnx.split(abstract_model(config, DTYPE).layers[0])
    flat = []
    for path, variable in nnx.to_flat_state(state):
        shape = variable.get_value()
        where = parameter_sharding(mesh, ("layers", 0, *path), shape.shape)
        flat.append((path, variable.replace(jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where))))
    return graphdef, nnx.from_flat_state(flat)


def needs(case: Case, state: nnx.State[Any, Any]) -> dict[str, Need]:
    """What the programs of evaluation cannot do without, on one chip; `state` holds the shapes of the weights."""
    config, itemsize = case.config, jnp.dtype(DTYPE).itemsize
    D, V, L = config.hidden_size, config.vocab_size, config.num_hidden_layers
    weights = weights_on_a_chip(state)
    vocabulary = -(-V // case.mesh.model)
    embedding = vocabulary * D * itemsize
    layers = weights - embedding * (1 if config.tie_word_embeddings else 2)
    slot = 2 * L * -(-config.num_key_value_heads // case.mesh.model) * config.head_dim * itemsize  # of keys and values
    heads = L * -(-config.num_attention_heads // case.mesh.model) * config.head_dim

    def products(tokens: int, keys: int) -> int:
        """Operations of the layers, each token with so many keys: a multiplication and an addition for each weight."""
        return 2 * tokens * (layers // itemsize) + 4 * tokens * keys * heads

    row_tokens, logits = case.rows * CHUNK, 2 * vocabulary * D
    return {
        # The activations of a layer for its many tokens stand beside, of MLP and attention: the more so the smaller the
        # model. Llama-3.2-1B takes 1.22 on one chip and 1.21 on eight, Gemma 3 1B 1.14, Qwen3-0.6B 1.34.
        "rows": Need(
            weights + HEADER * slot + row_tokens * D * itemsize,
            products(row_tokens, KEY_BLOCK + CHUNK),
            most_bytes=1.4,
        ),
        "extend": Need(weights + (HEADER + CHUNK) * slot + CHUNK * D * itemsize, products(CHUNK, KEY_BLOCK + CHUNK)),
        "score tokens": Need(embedding + row_tokens * D * itemsize + 4 * ASKED * vocabulary, ASKED * logits),
        "decode": Need(
            weights + SLOTS * (SLOT_SIZE + STEPS_PER_CALL) * slot + 4 * SLOTS * vocabulary,
            products(SLOTS, KEY_BLOCK + STEPS_PER_CALL) + SLOTS * (logits + CHOOSING * V),
        ),
    }


def weights_on_a_chip(state: nnx.State[Any, Any]) -> int:
    """Bytes of a model that one chip holds."""
    arrays = (variable.get_value() for _, variable in nnx.to_flat_state(state))
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)


def parameters(config: ModelConfig, mesh: Mesh) -> nnx.State[Any, Any]:
    """The shapes of a model's parameters, and where they lie."""
    _, state = nnx.split(abstract_model(config, DTYPE))
    flat = []
    for path, variable in nnx.to_flat_state(state):
        shape = variable.get_value()
        placed = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=parameter_sharding(mesh, path, shape.shape))
        flat.append((path, variable.replace(placed)))
    return nnx.from_flat_state(flat)


# --------------------------------------------------------------------------------------------------------- compiling


@dataclasses.dataclass(frozen=True)
class Result:
    """What the compiler says of a program; all bytes and operations are those of one chip.

    Attributes:
      case: the model and the chips.
      program: its name.
      problems: a sentence each.
      seconds: how long it took to compile.
      cpu_seconds: of all threads.
      argument_bytes: of weights, caches and all else that goes in.
      temporary_bytes: of what lives only within the program.
      hbm_bytes: of everything: arguments, results that do not take their place, temporary arrays and code.
      flops: operations, of a loop once.
      accessed_bytes: read from and written to memory, in a loop once.
      times_bytes: of what it cannot do without, that arguments, temporary arrays and results take; 0 if none is known.
      times_flops: likewise of operations.
      collectives: what moves between chips.
    """

    case: Case
    program: str
    problems: tuple[str, ...]
    seconds: float
    cpu_seconds: float
    argument_bytes: int = 0
    temporary_bytes: int = 0
    hbm_bytes: int = 0
    flops: float = 0
    accessed_bytes: float = 0
    times_bytes: float = 0
    times_flops: float = 0
    collectives: tuple[Collective, ...] = ()

    @property
    def hbm_share(self) -> float:
        """Of the memory that a chip has."""
        return self.hbm_bytes / HBM_BYTES[self.case.topology.partition(":")[0]]

    def moved(self) -> dict[str, tuple[int, int]]:
        """How many collectives there are of each kind, those in loops apart, and their bytes."""
        moved: dict[str, tuple[int, int]] = {}
        for collective in self.collectives:
            kind = collective.kind + " in a loop" * collective.in_loop
            count, nbytes = moved.get(kind, (0, 0))
            moved[kind] = count + 1, nbytes + collective.nbytes
        return moved

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        case = dataclasses.asdict(self.case) | {"mesh": str(self.case.mesh)}
        del case["programs"]
        moved = {kind: {"count": count, "bytes": nbytes} for kind, (count, nbytes) in self.moved().items()}
        return fields | {"case": case, "hbm_share": self.hbm_share, "collectives": moved}


def compile_case(case: Case) -> Iterator[Result]:
    """Compiles the programs of a case, one after the other."""
    mesh = mesh_for(case)
    known = programs(case, mesh)
    for name in case.programs:
        start = time.perf_counter(), time.process_time()

        def result(problems: Sequence[str], **found: Any) -> Result:
            seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]  # noqa: B023
            return Result(case, name, tuple(problems), seconds, cpu_seconds, **found)  # noqa: B023

        try:
            with use_mesh(mesh):
                compiled = known[name].function.lower(*known[name].args).compile()  # type: ignore[attr-defined]
        except jax.errors.JaxRuntimeError as error:
            yield result([f"it does not compile: {str(error).splitlines()[0]}"])
            continue
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        data = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        data += memory.temp_size_in_bytes
        need = known[name].need
        found = result(
            (),
            argument_bytes=memory.argument_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
            hbm_bytes=data + memory.generated_code_size_in_bytes + known[name].beside,
            times_bytes=data / need.nbytes if need else 0,
            times_flops=cost["flops"] / need.flops if need else 0,
            flops=cost["flops"],
            accessed_bytes=cost["bytes accessed"],
            collectives=tuple(collectives(compiled.as_text())),
        )
        limits = largest(case.config, case.mesh, known[name].tokens)
        problems = unexpected(found.collectives, EXPECTED[known[name].expected], limits)
        problems += excess(found, need) if need else []
        if found.hbm_share > 1:
            problems.append(f"it needs {found.hbm_bytes / 1e9:.1f} GB, {found.hbm_share:.0%} of what a chip has")
        yield dataclasses.replace(found, problems=tuple(problems))


def excess(result: Result, need: Need) -> list[str]:
    """A sentence for each of bytes and operations of which a program takes more than it may."""
    found = (("bytes", result.times_bytes, need.most_bytes), ("operations", result.times_flops, need.most_flops))
    return [
        f"it takes {times:.2f} times the {what} that it must; at most {most:.2f} are allowed"
        for what, times, most in found
        if times > most
    ]


# --------------------------------------------------------------------------------------------------------- reporting


def spelled(moved: dict[str, tuple[int, int]]) -> str:
    """Collectives as a table shows them."""
    return ", ".join(f"{count} {kind} {size(nbytes)}" for kind, (count, nbytes) in moved.items()) or "none"


def size(nbytes: float) -> str:
    """Bytes in a unit that leaves few digits."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.3g} {name}"
    return f"{nbytes:.0f} B"


def check_table(case: Case, results: Sequence[Result]) -> Table:
    """One row a program; bytes and FLOPs are times what it cannot do without."""
    table = Table(title=str(case), title_justify="left")
    columns = ("program", "compile s", "arguments", "temporary", "HBM", "of the chip", "bytes", "FLOPs", "collectives")
    for column in columns:
        justify = "left" if column in ("program", "collectives") else "right"
        table.add_column(column, justify=justify, no_wrap=column != "collectives")  # type: ignore[arg-type]
    for result in results:
        found = ["", "", "", "", "", "", "does not compile"]
        if result.hbm_bytes:
            sizes = map(size, (result.argument_bytes, result.temporary_bytes, result.hbm_bytes))
            times = (f"{times:.2f} x" if times else "" for times in (result.times_bytes, result.times_flops))
            found = [*sizes, f"{result.hbm_share:.1%}", *times, spelled(result.moved())]
        table.add_row(result.program, f"{result.seconds:.1f}", *found)
    return table


def scaling_table(results: Sequence[Result]) -> Table:
    """One row a program and mesh."""
    table = Table(title="Of one chip, by the compiler's analysis; loops are counted once", title_justify="left")
    for column in ("program", "chips", "mesh", "GFLOPs", "accessed", "HBM", "collectives"):
        justify = "left" if column in ("program", "mesh", "collectives") else "right"
        table.add_column(column, justify=justify, no_wrap=column != "collectives")  # type: ignore[arg-type]
    compiled = (result for result in results if result.hbm_bytes)
    for result in sorted(compiled, key=lambda r: (r.program, r.case.mesh.model, r.case.mesh.data)):
        sizes = map(size, (result.accessed_bytes, result.hbm_bytes))
        mesh, flops = result.case.mesh, f"{result.flops / 1e9:,.3f}"
        table.add_row(result.program, str(mesh.devices), str(mesh), flops, *sizes, spelled(result.moved()))
    return table


def scaling_cases(model: str, layers: int | None) -> list[Case]:
    """A model on more and more chips: as more replicas, and as one replica that is divided further."""
    meshes = [MeshShape(chips, 1) for chips in SCALING_TOPOLOGIES]
    meshes += [MeshShape(1, chips) for chips in SCALING_TOPOLOGIES if chips > 1]
    return [Case(model, SCALING_TOPOLOGIES[mesh.devices], mesh, SCALING, layers=layers) for mesh in meshes]


def asked_cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    if args.scaling:
        if args.topology or args.mesh:
            raise RequestError("--scaling has its own topologies and meshes")
        cases = scaling_cases(args.model or "llama-3.2-1b", args.layers)
    elif args.topology or args.mesh or args.model:
        if not (args.topology and args.mesh and args.model):
            raise RequestError("--model, --topology and --mesh belong together")
        mesh = parse_mesh(args.mesh)
        if mesh is None:
            raise RequestError("--mesh is 'auto'; write sizes such as data=2,model=4")
        cases = [Case(args.model, args.topology, mesh)]
    elif args.case:
        cases = list(CASES.values()) if "all" in args.case else [CASES[name] for name in args.case]
    else:
        cases = list(CI)
    if args.programs:
        cases = [dataclasses.replace(case, programs=tuple(args.programs.split(","))) for case in cases]
    if strange := {name for case in cases for name in case.programs} - set(EVERYTHING):
        raise RequestError(f"--programs names {', '.join(sorted(strange))}; known are {', '.join(EVERYTHING)}")
    if strange := {case.topology for case in cases if case.topology.partition(":")[0] not in HBM_BYTES}:
        raise RequestError(f"--topology is {strange.pop()!r}; known are {', '.join(HBM_BYTES)}, as in v5e:2x4")
    changes = {name: value for name in ("rows", "layers") if (value := getattr(args, name))}
    return [dataclasses.replace(case, **changes) for case in cases]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[*CASES, "all"], help="may be repeated")
    parser.add_argument("--model", choices=HF_CONFIGS)
    parser.add_argument("--topology", help="such as v5e:2x4")
    parser.add_argument("--mesh", help="such as data=8,model=1")
    parser.add_argument("--programs", help="names with commas between them, instead of those of the case")
    parser.add_argument("--rows", type=int, help="rows of 512 tokens in each replica")
    parser.add_argument("--layers", type=int, help="only so many: quicker, but the memory is not that of the model")
    parser.add_argument("--scaling", action="store_true", help="a table of 1, 8, 64 and 256 chips")
    parser.add_argument("--json", action="store_true", help="print one JSON document a program instead of tables")
    args = parser.parse_args()
    try:
        cases = asked_cases(args)
        results: list[Result] = []
        for case in cases:
            start = len(results)
            for result in compile_case(case):
                results.append(result)
                if args.json:
                    print(json.dumps(result.as_json()), flush=True)
            if not args.json and not args.scaling:
                Console(width=120).print(check_table(case, results[start:]))
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    if args.scaling and not args.json:
        Console(width=120).print(scaling_table(results))
    problems = [f"{r.program} of {r.case}: {problem}" for r in results for problem in r.problems]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
