"""The parameters of a model: by name, abstract, put into other arrays."""

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from gluprune_jax.models.config import ModelConfig, name_of
from gluprune_jax.models.decoder import Decoder, M

# Arrays by name.
Parameters = dict[str, Array]


def abstract_model(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Decoder:
    """The model with `jax.ShapeDtypeStruct` in place of arrays: costs no memory, for any size."""
    graphdef, state = _abstract_parts(config, jnp.dtype(dtype))
    model: Decoder = nnx.merge(graphdef, state, copy=True)
    return model


@functools.lru_cache(maxsize=16)
def _abstract_parts(config: ModelConfig, dtype: DTypeLike) -> tuple[nnx.GraphDef[Decoder], nnx.State[Any, Any]]:
    # Cached: loading, slicing and saving all ask for the same shapes.
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=None, dtype=dtype)))


def bind(config: ModelConfig, params: nnx.State[Any, Any]) -> Decoder:
    """The model of this architecture with these parameters: within compiled code, whose arguments they are.

    The config is a cheap static argument; `nnx.GraphDef` takes milliseconds to hash.
    """
    graphdef, _ = _abstract_parts(config, jnp.dtype(jnp.float32))
    model: Decoder = nnx.merge(graphdef, params)
    return model


def with_parameters(module: M, parameters: Mapping[str, Any]) -> M:
    """A module with some of its parameters replaced, by name ("layers.0.mlp.down_proj"); it shares the others.

    Given all of them, an abstract model becomes one of these arrays, or of what stands for them.
    """
    graphdef, state = nnx.split(module)
    flat = [
        (path, variable.replace(parameters.get(name_of(path), variable.get_value())))
        for path, variable in nnx.to_flat_state(state)
    ]
    replaced: M = nnx.merge(graphdef, nnx.from_flat_state(flat))
    return replaced


def parameters_of(model: Decoder) -> Parameters:
    """The parameters of a model by name."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {name_of(path): variable.get_value() for path, variable in flat}


# ----------------------------------------------------------------------------------------------------- identity


def checksum(model: Decoder, *, mlps: bool = True) -> str:
    """Tells a model from one with other weights, whatever device reads them: 16 hexadecimal digits.

    MLPs count with their storage padding, which differs between meshes: without them (`mlps`) it is the same on all.
    """
    found = parameters_of(model)
    arrays = [(name, found[name]) for name in sorted(found) if mlps or ".mlp." not in name]
    sums = {name: int(_checksum(array)) for name, array in arrays}
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


@jax.jit
def _checksum(array: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(array, jnp.uint32 if array.dtype.itemsize == 4 else jnp.uint16)
    position = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    # Whole numbers modulo 2^32: their sum does not depend on the order. Odd factors, so that each bit counts.
    return jnp.sum(bits.astype(jnp.uint32) * (jnp.uint32(2654435761) * position | 1), dtype=jnp.uint32)
