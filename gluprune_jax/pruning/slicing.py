"""Makes a model really smaller: rows and columns of removed neurons leave the weights, dropped layers leave the model.

Where no layer is dropped, the sliced model is the same function as the dense one under the plan's mask
(`PruningPlan.masks`), up to the order of summation.

On a mesh, where each device has a part of the neurons, matrices are first divided along the hidden size instead: every
device then takes the kept neurons of its part, and the result is divided along the neurons again, in equal shares.
Weights move twice, and no device ever holds a whole matrix.
"""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec
from numpy.typing import NDArray

from gluprune_jax.errors import RequestError
from gluprune_jax.models.config import NEURON_AXES, name_of
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model, with_parameters
from gluprune_jax.parallel.mesh import block_on_cpu, mesh_of, shape_of, use_mesh
from gluprune_jax.parallel.sharding import RULES, is_divided, per_shard
from gluprune_jax.pruning.plan import PruningPlan


def slice_model(
    model: Decoder, plan: PruningPlan, *, width_multiple: int | None = None, donate: bool = False
) -> Decoder:
    """Returns the model with only the layers and neurons that `plan` keeps; all other arrays are shared with `model`.

    Args:
      model: the dense model.
      plan: made for this model; only its shape is checked here (see `PruningPlan.check_fits`).
      width_multiple: zero-pads the stored arrays to a multiple of this (default: as in `model`). On a mesh it is a
        multiple of the devices of a replica.
      donate: frees the layers of `model` that are dropped, then each MLP matrix once it is sliced; the largest one is
        then all the extra memory that slicing needs, and `model` can no longer be used.

    Raises:
      RequestError: the plan was made for a model of another shape, or the width multiple does not divide over the mesh.
    """
    config = plan.pruned_config(model.config)
    if width_multiple is not None:
        config = dataclasses.replace(config, width_multiple=width_multiple)
    mesh = mesh_of(model)
    if config.width_multiple % shape_of(mesh).model:
        raise RequestError(
            f"the width multiple is {config.width_multiple}; the neurons are divided over {shape_of(mesh).model} "
            f"devices, so it must be a multiple of that"
        )
    arrays = _remaining(model, plan, donate)
    for i, (old, stored) in enumerate(zip(plan.remaining_layers, config.stored_intermediate_sizes, strict=True)):
        kept = plan.kept[old]
        if len(kept) == stored == model.layers[old].mlp.gate_proj.shape[0]:
            continue
        for name, axis in NEURON_AXES.items():
            path = ("layers", i, "mlp", name)
            with use_mesh(mesh):
                dense, arrays[path] = arrays[path], slice_neurons(axis, stored - len(kept), arrays[path], kept)
            block_on_cpu(mesh, arrays[path])
            if donate:
                # Else the slices of all layers would be allocated before the first dense array is free.
                arrays[path].block_until_ready()
                dense.delete()
    return with_parameters(abstract_model(config), {name_of(path): array for path, array in arrays.items()})


def _remaining(model: Decoder, plan: PruningPlan, donate: bool) -> dict[tuple[Any, ...], Array]:
    """The arrays of the layers that stay and of what is no layer, by path in the pruned model."""
    renumbered = {old: new for new, old in enumerate(plan.remaining_layers)}
    arrays: dict[tuple[Any, ...], Array] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[0] != "layers":
            arrays[path] = variable.get_value()
        elif path[1] in renumbered:
            arrays["layers", renumbered[path[1]], *path[2:]] = variable.get_value()
        elif donate:
            variable.get_value().delete()
    return arrays


@functools.partial(jax.jit, static_argnums=(0, 1))
def slice_neurons(axis: int, padding: int, w: Array, kept: NDArray[np.int32]) -> Array:
    """The neurons `kept` of a matrix along `axis`, and after them `padding` neurons of zeros."""
    chex.assert_rank([w, kept], [2, 1])
    chex.assert_type(kept, int)
    devices, other = RULES["neurons"], 1 - axis

    def take(w: Array, kept: Array) -> Array:
        taken = jnp.take(w, kept, axis=axis, mode="clip")
        return jnp.pad(taken, [(0, padding if a == axis else 0) for a in range(w.ndim)])

    def exchange(w: Array, kept: Array) -> Array:
        size = w.shape[other]
        w = jnp.pad(w, [(0, -size % jax.lax.axis_size(devices) if a == other else 0) for a in range(w.ndim)])
        w = jax.lax.all_to_all(w, devices, split_axis=other, concat_axis=axis, tiled=True)  # type: ignore[no-untyped-call]
        w = jax.lax.all_to_all(take(w, kept), devices, split_axis=axis, concat_axis=other, tiled=True)  # type: ignore[no-untyped-call]
        return jax.lax.slice_in_dim(w, 0, size, axis=other)

    if not is_divided():
        return take(w, jnp.asarray(kept))
    neurons = PartitionSpec(*(devices if a == axis else None for a in range(w.ndim)))  # type: ignore[no-untyped-call]
    return per_shard(exchange, (neurons, PartitionSpec()), neurons)(w, jnp.asarray(kept))  # type: ignore[no-untyped-call]
