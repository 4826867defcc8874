"""Meshes of devices, and what is put onto them: `data=2,model=4` holds two replicas, each on four devices.

The mesh of a model is that of its weights (`mesh_of`), and is made the current one around calls into compiled code
(`on`). How arrays are divided is said by `gluprune_jax.parallel.sharding`.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from numpy.typing import NDArray

from gluprune_jax.errors import RequestError
from gluprune_jax.parallel.sharding import MESH_AXES, PARAMETERS, partition_spec

_GATHERED_AT_ONCE = 1 << 26  # bytes


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How many replicas of a model there are (`data`), and over how many devices each is spread (`model`)."""

    data: int
    model: int

    @property
    def devices(self) -> int:
        """All devices of the mesh."""
        return self.data * self.model

    def __str__(self) -> str:
        return f"data={self.data},model={self.model}"


def parse_mesh(text: str) -> MeshShape | None:
    """A mesh as it is spelled: "data=2,model=4" (what is not named is 1), or None for "auto".

    Raises:
      RequestError: anything else.
    """
    if text == "auto":
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(data|model)=([1-9][0-9]{0,5})\s*", part)
        if match is None or match[1] in sizes:
            raise RequestError(f"`mesh` is {text!r}; write auto, or sizes such as data=2,model=4")
        sizes[match[1]] = int(match[2])
    return MeshShape(sizes.get("data", 1), sizes.get("model", 1))


def axis_sizes(shape: MeshShape, num_key_value_heads: int) -> tuple[int, int, int]:
    """Sizes of the axes `data`, `kv` and `group` for a model with so many key/value heads."""
    kv = math.gcd(shape.model, num_key_value_heads)
    return shape.data, kv, shape.model // kv


def make_mesh(shape: MeshShape, num_key_value_heads: int, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh for a model with so many key/value heads.

    Args:
      shape: replicas, and devices of each.
      num_key_value_heads: K.
      devices: as many as the shape has; by default the first of those there are, near ones in the same replica.

    Raises:
      RequestError: there are too few devices, or with several processes not exactly as many.
    """
    if devices is None:
        devices = jax.devices()
        if shape.devices > len(devices) or (jax.process_count() > 1 and shape.devices != len(devices)):
            raise RequestError(
                f"the mesh {shape} has {shape.devices} devices, and there are {len(devices)}"
                + (f" in {jax.process_count()} processes; all of them must be used" * (jax.process_count() > 1))
            )
        devices = devices[: shape.devices]
    sizes = axis_sizes(shape, num_key_value_heads)
    # `jax.make_mesh` divides an axis of the hardware between two of the mesh on v5e alone: on a v6e of 16 x 16 it has
    # no mesh of 32 x 8.
    try:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:  # of TPUs whose chips form no such grid
        raise RequestError(
            f"the mesh {shape} cannot be laid out on these {len(devices)} devices ({error}); choose sizes that use all "
            f"of them, in powers of two"
        ) from error
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def shape_of(mesh: Mesh | None) -> MeshShape:
    """Replicas and devices of each; one of one without a mesh."""
    return MeshShape(1, 1) if mesh is None else MeshShape(mesh.shape["data"], mesh.shape["kv"] * mesh.shape["group"])


def mesh_of(model: nnx.Module) -> Mesh | None:
    """The mesh that a model's weights lie on; None where they lie on one device, or on a mesh of another kind."""
    weight = jax.tree.leaves(nnx.state(model, nnx.Param))[0]
    sharding = getattr(weight, "sharding", None)
    is_ours = isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == MESH_AXES
    return cast("Mesh", sharding.mesh) if is_ours and isinstance(sharding, NamedSharding) else None


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Makes a mesh the current one, for `constrain` and `per_shard` in code that is compiled in the block."""
    return (
        contextlib.nullcontext() if mesh is None else cast("contextlib.AbstractContextManager[Any]", jax.set_mesh(mesh))
    )


# ------------------------------------------------------------------------------------------- host and devices


def parameter_sharding(mesh: Mesh, path: Sequence[Any], shape: Sequence[int]) -> NamedSharding:
    """Where the parameter at `path` of a model, such as ("layers", 3, "mlp", "gate_proj"), lives."""
    return NamedSharding(mesh, partition_spec(PARAMETERS[path[-1]], shape, mesh))


def place(mesh: Mesh | None, value: NDArray[Any], *axes: str | None) -> Any:
    """Puts an array that every process holds onto a mesh, each device taking its part; without a mesh, `value`."""
    if mesh is None:
        return value
    sharding = NamedSharding(mesh, partition_spec(axes or (None,) * value.ndim, value.shape, mesh))
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def block_on_cpu(mesh: Mesh | None, computed: Any) -> None:
    """Waits for arrays that were computed on a mesh of CPUs, before something else is that does not depend on them.

    Such devices share a few threads. Programs that run at the same time can take all of them, each waiting for its
    part on another device, which gets none.
    """
    if mesh is not None and mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(computed)  # type: ignore[no-untyped-call]


def to_host(array: Array) -> NDArray[Any]:
    """An array, whole, in the memory of every process. All processes must call it, in the same order."""
    if not is_local(array):
        return _gather(array)
    if array.is_fully_replicated:
        array = array.addressable_data(0)
    # Through a handle of its own: a copy that numpy must make stays with the handle, and would stay with the model.
    shards = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))


def _gather(array: Array) -> NDArray[Any]:
    # What is gathered is for a moment on every device, and in copies beside the one that stays: so it is done in
    # slices, along an axis that no device has only a part of.
    parts = array.sharding.shard_shape(array.shape)
    whole = [axis for axis, size in enumerate(array.shape) if parts[axis] == size]
    if not whole or array.nbytes <= _GATHERED_AT_ONCE:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    axis = max(whole, key=lambda axis: array.shape[axis])
    size = array.shape[axis]
    step = max(1, size * _GATHERED_AT_ONCE // array.nbytes)
    values = np.empty(array.shape, array.dtype)
    for start in range(0, size, step):
        part = jax.lax.dynamic_slice_in_dim(array, start, min(step, size - start), axis)
        where = (slice(None),) * axis + (slice(start, start + step),)
        values[where] = multihost_utils.process_allgather(part, tiled=True)
    return values


def is_local(array: Array) -> bool:
    """Whether this process holds all of an array, so that nothing must be gathered; the same on every process."""
    return array.is_fully_addressable or array.is_fully_replicated
