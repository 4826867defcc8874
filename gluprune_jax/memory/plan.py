"""What a model takes of each device's memory, worked out before anything is loaded, and the mesh that it fits on.

Weights and caches are exact: the part of each array that lies on one device, by the table of
`gluprune_jax.parallel.sharding`. The workspace is an upper
estimate of what compiled programs use besides; its formulas are `_evaluation_workspace` and `_pruning_workspace`. No
devices are needed: a mesh of any size and devices of any memory can be planned for.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding

from gluprune_jax.errors import RequestError, format_bytes
from gluprune_jax.inference.device_loop import STEPS_PER_CALL
from gluprune_jax.inference.engine import BATCHES_IN_FLIGHT, SCORED_TOKENS
from gluprune_jax.inference.generation import slots_for
from gluprune_jax.inference.prefill import CHUNKS, cache_slots
from gluprune_jax.memory.mesh_choice import REMEDIES
from gluprune_jax.models.attention import KEY_BLOCK
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model
from gluprune_jax.parallel.mesh import MeshShape, axis_sizes
from gluprune_jax.parallel.sharding import CACHE_AXES, MESH_AXES, PARAMETERS, partition_spec
from gluprune_jax.pruning.calibration import BATCH_TOKENS
from gluprune_jax.pruning.reconstruction import STEP_TOKENS

# The share of a device's memory that is planned with: programs, buffers of the runtime and gaps take the rest.
USABLE = Fraction(9, 10)


# No model is spread over more devices than this by a suggestion.
_MOST_DEVICES = 4096


# ----------------------------------------------------------------------------------------------------------- uses


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scoring and generation.

    Attributes:
      cached: tokens of the longest shared beginning or document that is scored.
      decoded: tokens of the longest prompt with its continuation; 0 where nothing is generated.
      rows: rows of 512 tokens that each replica runs at once.
      slots: sequences that each replica decodes together.
      on_cpu: whether the devices are CPUs, which hold float32 copies of narrower weights and caches.
      has_replicas: whether more devices than hold the model are put to use; else what one replica does is looked at.
    """

    cached: int
    decoded: int
    rows: int = 4
    slots: int = 8
    on_cpu: bool = False
    has_replicas: bool = True

    def within(self, window: int) -> "Evaluation":
        """The same with no sequence of more tokens than `window`."""
        return dataclasses.replace(self, cached=min(self.cached, window), decoded=min(self.decoded, window))


@dataclasses.dataclass(frozen=True)
class Pruning:
    """Scoring of neurons, and slicing.

    Attributes:
      stream: whether the weights of only one layer are in memory at a time.
      calibration: tokens of calibration text that the model is run on; 0 without.
      window: tokens of one of its windows.
      is_compensated: whether down projections are refitted, by Gram matrices.
      folds: how many Gram matrices a layer has, where refitting is cross-validated.
      reconstructs: whether the MLPs are fitted to the outputs of the dense layers.
    """

    stream: bool = False
    calibration: int = 0
    window: int = 512
    is_compensated: bool = False
    folds: int = 1
    reconstructs: bool = False


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device.

    Attributes:
      mesh: replicas, and devices of each.
      use: what the model is to do.
      weights: exact, with width padding and what every device holds whole.
      cache: keys and values, exact for sequences of these lengths; 0 for pruning. Scoring and generating do not
        happen at the same time, so it is the larger of what they hold.
      workspace: an upper estimate of all else.
    """

    mesh: MeshShape
    use: Evaluation | Pruning
    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """All bytes on one device."""
        return self.weights + self.cache + self.workspace

    def fits(self, capacity: int) -> bool:
        """Whether devices of `capacity` bytes hold it, with a tenth to spare (`USABLE`)."""
        return self.total <= USABLE * capacity

    def summary(self, capacity: int | None = None) -> dict[str, Any]:
        """The plan as JSON holds it; `capacity` is the bytes of one device, where they are known."""
        return {
            "mesh": {"data": self.mesh.data, "model": self.mesh.model},
            "devices": self.mesh.devices,
            "bytes_per_device": {
                "weights": self.weights,
                "cache": self.cache,
                "workspace": self.workspace,
                "total": self.total,
                "device": capacity,
            },
            "fits": None if capacity is None else self.fits(capacity),
        }


# ----------------------------------------------------------------------------------------------------------- plan


def plan_memory(model: Decoder, shape: MeshShape, use: Evaluation | Pruning) -> MemoryPlan:
    """What a model takes of each device of a mesh.

    Args:
      model: may be abstract; its dtypes count, parameter by parameter. It is padded to the devices of a replica,
        whatever padding it has.
      shape: of the mesh.
      use: what the model is to do.
    """
    config = dataclasses.replace(model.config, width_multiple=shape.model)
    mesh = AbstractMesh(axis_sizes(shape, config.num_key_value_heads), MESH_AXES)
    parameters = dict(parameter_bytes(model, config, mesh))
    if isinstance(use, Pruning):
        layers = [
            sum(bytes_ for path, bytes_ in parameters.items() if path[:3] == ("layers", i, "mlp"))
            for i in range(config.num_hidden_layers)
        ]
        weights = max(layers) if use.stream else sum(parameters.values())
        workspace = _pruning_workspace(config, mesh, max(layers))
        if use.calibration:
            workspace = max(workspace, _calibration_workspace(config, mesh, use, _itemsize(model)))
        if use.calibration and use.reconstructs:
            workspace = max(workspace, _reconstruction_workspace(config, mesh, use, _itemsize(model), layers))
        return MemoryPlan(shape, use, weights, 0, workspace)
    itemsize, weights = _itemsize(model), sum(parameters.values())

    def held(*rows: tuple[int, int]) -> int:
        """Caches of so many rows and tokens; all devices hold how much of each row is filled."""
        return sum(_cache_bytes(config, mesh, count, size, itemsize) + 4 * count for count, size in rows)

    cache = held((shape.data, cache_slots(use.cached)))
    if use.decoded:  # the slots, and a row for prompts
        slots = (shape.data * use.slots, slots_for(use.decoded))
        cache = max(cache, held(slots, (shape.data, cache_slots(use.decoded))))
    workspace = _evaluation_workspace(config, mesh, use, itemsize)
    if use.on_cpu and itemsize < 4:
        workspace += (weights + cache) * 4 // itemsize
    return MemoryPlan(shape, use, weights, cache, workspace)


def _bytes(mesh: AbstractMesh, axes: Sequence[str | None], shape: Sequence[int], itemsize: int) -> int:
    """Bytes that one device holds of an array."""
    sharding = NamedSharding(mesh, partition_spec(axes, shape, mesh))
    return math.prod(sharding.shard_shape(tuple(shape))) * itemsize


def parameter_bytes(model: Decoder, config: ModelConfig, mesh: AbstractMesh) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Bytes that one device holds of each parameter, by path, its neurons padded as `config` says."""
    flat: Sequence[tuple[tuple[Any, ...], Any]] = nnx.to_flat_state(nnx.state(model, nnx.Param))
    for path, variable in flat:
        weight, axes = variable.get_value(), PARAMETERS[path[-1]]
        shape = [
            config.stored_intermediate_sizes[path[1]] if axis == "neurons" else size
            for axis, size in zip(axes, weight.shape, strict=True)
        ]
        yield path, _bytes(mesh, axes, shape, weight.dtype.itemsize)


def _cache_bytes(config: ModelConfig, mesh: AbstractMesh, rows: int, slots: int, itemsize: int) -> int:
    """Bytes that one device holds of the keys and values of all layers."""
    shape = (rows, config.num_key_value_heads, slots, config.head_dim)
    return 2 * config.num_hidden_layers * _bytes(mesh, CACHE_AXES, shape, itemsize)


def _itemsize(model: Decoder) -> int:
    """Bytes of an element of activations and caches."""
    itemsize: int = model.embed_tokens.get_value().dtype.itemsize
    return itemsize


def _evaluation_workspace(config: ModelConfig, mesh: AbstractMesh, use: Evaluation, itemsize: int) -> int:
    """The masks, hidden states of three batches, and the largest of four programs:

    - rows: of one layer, the residual stream (6 arrays, 2 of them float32) and the larger of 3 arrays of the MLP's
      width and of what attention holds: queries, keys and values, 3 arrays of float32 scores of a block of 256 keys,
      and 5 of its float32 results;
    - a chunk of a prompt: the same for one row, and the keys and values of all layers;
    - 256 scored tokens: 2 arrays of float32 logits;
    - decoding: 16 arrays of float32 logits, which sampling with top-p sorts whole; the keys and values of 16 steps,
      twice; and one block of the cache.
    """
    replicas, D, K, H = mesh.shape["data"], config.hidden_size, config.num_key_value_heads, config.head_dim

    def layer(rows: int, tokens: int) -> int:
        return _layer_workspace(config, mesh, itemsize, rows, tokens, keys=KEY_BLOCK)

    def logits(tokens: int, *axes: str | None) -> int:
        return _bytes(mesh, axes, (replicas, tokens, config.vocab_size), 4)

    chunk, rows, slots = CHUNKS[-1], replicas * use.rows, replicas * use.slots
    in_rows = layer(rows, chunk)
    in_chunk = layer(replicas, chunk) + _cache_bytes(config, mesh, replicas, chunk, itemsize)
    in_scoring = 2 * logits(SCORED_TOKENS[-1], "batch", None, "vocab")
    steps = 2 * _cache_bytes(config, mesh, slots, STEPS_PER_CALL, itemsize)
    block = 2 * _bytes(mesh, CACHE_AXES, (slots, K, KEY_BLOCK, H), itemsize)
    in_decoding = layer(slots, 1) + steps + block + 16 * logits(use.slots, "batch", None, None)
    hidden = (BATCHES_IN_FLIGHT + 1) * _bytes(mesh, ("batch", None, None), (rows, chunk, D), itemsize)
    masks = 4 * sum(config.stored_intermediate_sizes)
    return masks + hidden + max(in_rows, in_chunk, in_scoring, in_decoding)


def _layer_workspace(config: ModelConfig, mesh: AbstractMesh, itemsize: int, rows: int, tokens: int, keys: int) -> int:
    """What a layer holds of `rows` of `tokens`, each of which is compared with `keys` at a time."""
    D, K, H = config.hidden_size, config.num_key_value_heads, config.head_dim
    G = config.num_attention_heads // K

    def heads(size: int, itemsize: int) -> int:
        axes = ("batch", "kv_heads", "query_group", None, None)
        return _bytes(mesh, axes, (rows, K, G, tokens, size), itemsize)

    stream = _bytes(mesh, ("batch", None, None), (rows, tokens, D), 4 * itemsize + 2 * 4)
    width = max(config.stored_intermediate_sizes)
    mlp = 3 * _bytes(mesh, ("batch", None, "neurons"), (rows, tokens, width), itemsize)
    projected = 2 * heads(H, itemsize) + 4 * _bytes(mesh, CACHE_AXES, (rows, K, tokens, H), itemsize)
    return stream + max(mlp, projected + 3 * heads(keys, 4) + 5 * heads(H, 4))


def _calibration_workspace(config: ModelConfig, mesh: AbstractMesh, use: Pruning, itemsize: int) -> int:
    """The residual stream in front of a layer and within it, and the larger of two programs:

    - a batch: a layer, and its neurons in float32, of which a device needs all for its part of the Gram matrix, once
      more as they are and once added up;
    - the refitting: the Gram matrix whole, four times, and the down projection in float32, four times.

    Where refitting is cross-validated, the Gram matrices of the folds are there besides.
    """
    replicas, D, width = mesh.shape["data"], config.hidden_size, max(config.stored_intermediate_sizes)
    windows = -(-use.calibration // use.window)
    stream = 2 * _bytes(mesh, ("batch", None, None), (-(-windows // replicas) * replicas, use.window, D), itemsize)
    rows = replicas * max(1, BATCH_TOKENS // use.window)
    batch = _layer_workspace(config, mesh, itemsize, rows, use.window, keys=use.window)
    batch += 2 * _bytes(mesh, ("batch", None, None), (rows, use.window, width), 4)
    if not use.is_compensated:
        return stream + batch
    part = _bytes(mesh, ("neurons", None), (width, width), 4)
    held = part * (1 if use.folds == 1 else 1 + use.folds)
    return stream + held + max(part + batch, 4 * 4 * width * width + 4 * 4 * width * D)


def _reconstruction_workspace(
    config: ModelConfig, mesh: AbstractMesh, use: Pruning, itemsize: int, layers: Sequence[int]
) -> int:
    """What reconstruction holds:

    - the residual streams of the dense and of the pruned model, each in front of a layer and within it;
    - the matrices that were fitted so far, in the end those of all layers, and refitted down projections;
    - of the layer, its matrices as they are, as they were best and as they are tried; and in float32 the changes, the
      optimiser's two moments, and 6 arrays of a step;
    - of a step's windows, in float32, 8 arrays of the hidden size and 10 of the MLP's width, for the way back.
    """
    replicas, D, width = mesh.shape["data"], config.hidden_size, max(config.stored_intermediate_sizes)
    rows = max(1, STEP_TOKENS // use.window)
    steps = -(-use.calibration // (use.window * rows)) + 1  # those held out are a step more
    rows = -(-rows // replicas) * replicas
    stream = _bytes(mesh, ("batch", None, None), (steps * rows, use.window, D), itemsize)
    results = sum(layers) + (-(-sum(layers) // 3) if use.is_compensated else 0)
    matrices = 3 * _bytes(mesh, ("neurons", None), (width, D), 4)
    step = 8 * _bytes(mesh, ("batch", None, None), (rows, use.window, D), 4)
    step += 10 * _bytes(mesh, ("batch", None, "neurons"), (rows, use.window, width), 4)
    return 4 * stream + results + 3 * max(layers) + 9 * matrices + step


def _pruning_workspace(config: ModelConfig, mesh: AbstractMesh, layer: int) -> int:
    """The scores, and the larger of what slicing and scoring hold.

    Slicing: the matrices of a layer twice. Scoring: the rows of a matrix in float32, zero-padded to a power of two, and
    what the sums over halves of them leave, three times in all.
    """
    width = max(config.stored_intermediate_sizes)
    padded = 1 << (config.hidden_size - 1).bit_length()
    scoring = 3 * _bytes(mesh, ("neurons", None), (width, padded), 4)
    return 4 * width + max(2 * layer, scoring)


# ----------------------------------------------------------------------------------------------------------- mesh


def choose_mesh(model: Decoder, devices: int, capacity: int | None, use: Evaluation | Pruning) -> MeshShape:
    """The mesh where none is asked for.

    Pruning divides one model over all devices; from file to file it is the work of one. Evaluation holds as many
    replicas as fit, if it has more than one: it spreads each over the fewest devices, a divisor of their number, that
    have the memory (of several processes a single replica is spread over all). Where none of these fit, it is the mesh
    that asks for least (`check_fits` refuses it).

    Args:
      model: may be abstract; its dtypes count.
      devices: how many there are.
      capacity: bytes of each; None where they are not known, or are CPUs, which share one memory: then each device
        holds a replica.
      use: what the model is to do.
    """
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    candidates = [MeshShape(devices // size, size) for size in sizes]
    if isinstance(use, Evaluation) and not use.has_replicas:
        candidates = [MeshShape(1, size) for size in sizes if jax.process_count() == 1 or size == devices]
    if isinstance(use, Pruning):
        candidates = [MeshShape(1, 1)] if use.stream else candidates[-1:]
    if capacity is None:
        return candidates[0]
    plans = [plan_memory(model, shape, use) for shape in candidates]
    return next((plan.mesh for plan in plans if plan.fits(capacity)), min(plans, key=lambda plan: plan.total).mesh)


def check_fits(model: Decoder, plan: MemoryPlan, capacity: int, options: Collection[str] = REMEDIES) -> None:
    """Makes sure that a plan fits on its devices.

    Args:
      model: that of the plan.
      plan: from `plan_memory`.
      capacity: bytes of each device.
      options: which of `REMEDIES` can be changed.

    Raises:
      RequestError: it does not; with those changes that alone would help.
    """
    if plan.fits(capacity):
        return
    parts = {"weights": plan.weights, "cache": plan.cache, "workspace": plan.workspace}
    spelled = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
    remedies = [text for option, text in _remedies(model, plan, capacity) if option in options]
    does = ", or ".join(remedies) if remedies else "no single change; fewer tokens, a smaller batch or larger devices"
    raise RequestError(
        f"on the mesh {plan.mesh} the model needs {format_bytes(plan.total)} of each device ({spelled}), and of the "
        f"{format_bytes(capacity)} that one has at most {float(USABLE):.0%} are used; what would do: {does}"
    )


def _remedies(model: Decoder, plan: MemoryPlan, capacity: int) -> Iterator[tuple[str, str]]:
    """Changes each of which would make a plan fit: the parameter, and the change in words."""
    shape, use = plan.mesh, plan.use

    def fits(shape: MeshShape = shape, use: Evaluation | Pruning = use, model: Decoder = model) -> bool:
        return plan_memory(model, shape, use).fits(capacity)

    wider = (size for size in range(shape.model + 1, shape.devices + 1) if shape.devices % size == 0)
    spread = (MeshShape(shape.devices // size, size) for size in wider)
    if other := next((other for other in spread if fits(other)), None):
        yield "mesh", f"`mesh` {other}"
    if isinstance(use, Pruning):
        if not (use.stream or use.calibration) and fits(use=Pruning(stream=True)):
            yield "stream", "`stream`"
    else:
        rows = max(use.rows, use.slots)
        smaller = (rows >> n for n in range(1, rows.bit_length()))
        if size := next((n for n in smaller if fits(use=dataclasses.replace(use, rows=n, slots=n))), None):
            yield "batch_size", f"`batch_size` {size}"
        longest = max(use.cached, use.decoded)
        shorter = (1 << n for n in reversed(range(7, (longest - 1).bit_length())))
        if size := next((n for n in shorter if fits(use=use.within(n))), None):
            yield "context_length", f"`context_length` {size}"
    wide = any(weight.dtype.itemsize > 2 for weight in jax.tree.leaves(nnx.state(model, nnx.Param)))
    if wide and fits(model=abstract_model(model.config, jnp.bfloat16)):
        yield "dtype", "`dtype` bfloat16"
    if other is None:
        # Powers of two, as devices come: others divide few models.
        counts = (1 << n for n in range(shape.devices.bit_length(), _MOST_DEVICES.bit_length()))
        if count := next((count for count in counts if fits(MeshShape(1, count))), None):
            yield "mesh", f"{count} such devices and `mesh` model={count}"
