"""Puts a model in memory onto a mesh."""

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding

from gluprune_jax.models.config import name_of
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model, parameters_of, with_parameters
from gluprune_jax.parallel.mesh import parameter_sharding, shape_of


def shard_model(model: Decoder, mesh: Mesh) -> Decoder:
    """A model in memory, put onto a mesh; its MLPs are padded to a multiple of the devices of a replica.

    Where a device of the mesh has an array already, both models share it.

    Args:
      model: on any devices of this process.
      mesh: from `make_mesh`.
    """
    config = dataclasses.replace(model.config, width_multiple=shape_of(mesh).model)
    abstract = abstract_model(config)
    arrays, values = parameters_of(model), {}
    for path, variable in nnx.to_flat_state(nnx.state(abstract, nnx.Param)):
        shape = variable.get_value().shape
        values[name_of(path)] = _fit(arrays[name_of(path)], shape, parameter_sharding(mesh, path, shape))
    return with_parameters(abstract, values)


@functools.partial(jax.jit, static_argnums=1)
def _resize(x: Array, shape: tuple[int, ...]) -> Array:
    """Cuts each axis to a size, or zero-pads it."""
    x = x[tuple(slice(0, size) for size in shape)]
    return jnp.pad(x, [(0, wanted - size) for wanted, size in zip(shape, x.shape, strict=True)])


def _fit(x: Array, shape: tuple[int, ...], sharding: NamedSharding) -> Array:
    if x.shape != shape:
        x = _resize(x, shape)
    return cast("Array", jax.device_put(x, sharding))
