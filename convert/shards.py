"""Puts parameters onto a mesh: each process reads and holds the parts of its own devices, and nothing else.

Of a matrix that is divided along its rows a part is a range of bytes, which is read into the memory that the device
takes over. Of one that is divided along its columns (down_proj, o_proj) whole rows stream through a small buffer, from
which each part takes its columns. Devices that hold the same part, in other replicas, share what was read.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import Sharding
from numpy.typing import NDArray

from convert.buffers import aligned_empty

# (start, stop) along each axis.
Box = tuple[tuple[int, int], ...]


def assemble(shape: Sequence[int], sharding: Sharding, read: Callable[[list[Box]], list[NDArray[Any]]]) -> Array:
    """An array of which this process makes the parts that its devices hold.

    Args:
      shape: of the whole array.
      sharding: how it is divided.
      read: gives the contents of boxes; called once, with each distinct box of this process. The arrays are taken
        over: nobody may change them afterwards.
    """
    shape = tuple(shape)
    indices = sharding.addressable_devices_indices_map(shape)
    boxes = {device: box_of(index, shape) for device, index in indices.items() if index is not None}
    distinct = list(dict.fromkeys(boxes.values()))
    parts = dict(zip(distinct, read(distinct), strict=True))
    on_devices = [jax.device_put(parts[box], device) for device, box in boxes.items()]
    # The memory of the host is free again before the next tensor is read.
    for array in on_devices:
        array.block_until_ready()
    return jax.make_array_from_single_device_arrays(shape, sharding, on_devices)


def box_of(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """The box that JAX's index of a shard means in an array of a shape."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def place(values: NDArray[Any], shape: Sequence[int], sharding: Sharding) -> Array:
    """An array in the memory of every process, zero-padded to `shape` and divided; `values` is not kept alive."""

    def part(box: Box) -> NDArray[Any]:
        array = aligned_empty([stop - start for start, stop in box], values.dtype)
        held = values[tuple(slice(start, stop) for start, stop in box)]
        if held.shape != array.shape:
            array[...] = 0
        array[tuple(slice(size) for size in held.shape)] = held
        return array

    return assemble(shape, sharding, lambda boxes: [part(box) for box in boxes])
