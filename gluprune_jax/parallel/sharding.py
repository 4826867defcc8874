"""How arrays are divided over many devices: one table from the axes of arrays to those of the mesh.

A mesh (`gluprune_jax.parallel.mesh`) holds `data` replicas of a model, each spread over `model` devices, and has three
axes:

    data     replicas: each runs other rows of a batch and other slots of a cache
    kv       the part of `model` that divides the key/value heads
    group    the rest of `model`: it divides the query heads of each key/value head

`kv` is the greatest common divisor of `model` and the number of key/value heads: with more devices than those heads,
keys and values are stored once in a group instead of whole on every device. All else is divided by both. An axis whose
size does not divide stays whole (the neurons of an MLP are zero-padded instead, see `ModelConfig.width_multiple`).

Compiled code names axes by what they are (`constrain`, `per_shard`); without a current mesh these do nothing.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
from jax import Array
from jax.sharding import PartitionSpec

MESH_AXES = ("data", "kv", "group")

# The axes of arrays, and the mesh axes that divide each.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data",),
    "vocab": ("kv", "group"),
    "neurons": ("kv", "group"),
    "heads": ("kv", "group"),  # query heads, those of a key/value head next to each other
    "kv_heads": ("kv",),
    "query_group": ("group",),  # the query heads of one key/value head
    "columns": ("kv", "group"),  # the right sides of a system of equations
}

# The axes of each parameter, by the last names of its path.
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "embed_tokens": ("vocab", None),
    "lm_head": ("vocab", None),
    "q_proj": ("heads", None, None),
    "k_proj": ("kv_heads", None, None),
    "v_proj": ("kv_heads", None, None),
    "o_proj": (None, "heads", None),
    "q_bias": ("heads", None),
    "k_bias": ("kv_heads", None),
    "v_bias": ("kv_heads", None),
    "o_bias": (None,),
    "gate_proj": ("neurons", None),
    "up_proj": ("neurons", None),
    "down_proj": (None, "neurons"),
    "weight": (None,),  # of the norms
}
# Of keys and values, [B, K, S, H].
CACHE_AXES = ("batch", "kv_heads", None, None)

F = TypeVar("F", bound=Callable[..., Any])


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """How an array with these axes is divided: as `RULES` says, leaving out mesh axes that do not divide its size.

    Raises:
      ValueError: two axes would be divided by the same mesh axis, or there are not as many axes as in `shape`.
    """
    parts: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        names = () if axis is None else RULES[axis]
        while names and size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        parts.append(names or None)
    used = [name for part in parts if part for name in part]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {tuple(axes)} are divided by the same mesh axis twice: {used}")
    return PartitionSpec(*parts)  # type: ignore[no-untyped-call]


def is_divided() -> bool:
    """Whether a mesh of ours is the current one."""
    return jax.sharding.get_abstract_mesh().axis_names == MESH_AXES


def constrain(x: Array, *axes: str | None) -> Array:
    """Within compiled code, says how an array is divided; `x` itself where no mesh is current.

    An array with no named axis is whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not is_divided():
        return x
    axes = axes or (None,) * x.ndim
    spec = partition_spec(axes, x.shape, mesh)
    return cast("Array", jax.lax.with_sharding_constraint(x, spec))  # type: ignore[no-untyped-call]


def per_shard(function: F, in_specs: Any, out_specs: Any) -> F:
    """Within compiled code, runs `function` on each device's own part; as it is where no mesh is current.

    For operations at indices that differ between replicas, which the partitioner would gather first.

    Args:
      function: of arrays (or trees of them).
      in_specs: a `PartitionSpec` of mesh axes for each argument, as in `jax.shard_map`.
      out_specs: of the results.
    """
    if not is_divided():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
