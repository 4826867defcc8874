"""Tensors read by byte range straight into the devices' parts."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, Sharding
from numpy.typing import NDArray

from convert.buffers import aligned_empty
from convert.checkpoint import cast
from convert.families.names import TensorName
from convert.huggingface.safetensors import StoredTensor, TensorReader, beyond_the_neurons
from convert.huggingface.streamed import StreamedCheckpoint
from convert.shards import Box, assemble, place
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.parameters import abstract_model, parameters_of
from gluprune_jax.parallel.mesh import parameter_sharding

_BLOCK = 1 << 20


def reader(checkpoint: StreamedCheckpoint, mesh: Mesh | None, config: ModelConfig) -> Callable[[TensorName], Array]:
    """What reads the parameters of a checkpoint, each in our shape, onto a mesh or the default device.

    Args:
      checkpoint: whose weights are in files.
      mesh: None is the default device.
      config: the architecture of `checkpoint`, with the storage padding that the mesh asks for.
    """
    shapes = {name: leaf.shape for name, leaf in parameters_of(abstract_model(config)).items()}

    def read(name: TensorName) -> Array:
        shape = shapes[name.name]
        if mesh is None:
            # device_put takes an aligned buffer over; asarray would copy it.
            array: Array = jax.device_put(checkpoint.array(name).reshape(shape))
            return array
        sharding = parameter_sharding(mesh, name.path, shape)
        if name.neuron_axis is not None and checkpoint.kept is not None:
            return place(checkpoint.array(name), shape, sharding)
        return read_parameter(checkpoint.stored[name.name], name, shape, sharding, checkpoint.dtype)

    return read


def read_parameter(
    stored: StoredTensor, name: TensorName, shape: Sequence[int], sharding: Sharding, dtype: np.dtype[Any] | None = None
) -> Array:
    """Reads one tensor of a Hugging Face folder onto a mesh.

    Args:
      stored: where it lies. Along the neurons it may be longer than `name.shape`: there it must be zero.
      name: its name and logical shape.
      shape: that of our parameter: heads are an axis of their own, neurons are zero-padded.
      sharding: of our parameter.
      dtype: casts it; None keeps its own.

    Raises:
      OperationError: the file cannot be read or has changed, what was read has NaN or Inf, or a weight that is not
        zero where there is only padding.
      RequestError: values too large for the dtype.
    """

    def read(boxes: list[Box]) -> list[NDArray[Any]]:
        parts = read_boxes(stored, name, [in_file(box, name, shape) for box in boxes], dtype)
        shapes = [[stop - start for start, stop in box] for box in boxes]
        return [part.reshape(own) for part, own in zip(parts, shapes, strict=True)]

    return assemble(shape, sharding, read)


def read_boxes(
    stored: StoredTensor, name: TensorName, boxes: Sequence[Box], dtype: np.dtype[Any] | None = None
) -> list[NDArray[Any]]:
    """Reads parts of a tensor `[rows, columns]` (of a vector: `[rows]`), no byte twice.

    Args:
      stored: where it lies.
      name: its name and logical shape; beyond that the file must hold zeros, and a box is filled with zeros.
      boxes: rows and columns of each part. Their rows are the same or do not overlap, and so for their columns.
      dtype: casts them; None keeps the tensor's own.

    Raises:
      OperationError, RequestError: as `read_parameter`.
    """
    dtype = dtype or stored.dtype
    parts = [aligned_empty([stop - start for start, stop in box], dtype) for box in boxes]
    by_rows: dict[tuple[int, int], list[tuple[Box, NDArray[Any]]]] = {}
    for box, part in zip(boxes, parts, strict=True):
        by_rows.setdefault(box[0], []).append((box, part))
    with TensorReader(stored) as reader:
        for (start, stop), members in by_rows.items():
            _read_rows(reader, name, start, min(stop, name.shape[0]), members)
            if start < name.shape[0] <= stop:  # of all processes, those that hold the last row look at what follows
                for rows in _blocks(stored, name.shape[0], stored.shape[0]):
                    _check_padding(stored, name, reader.rows(*rows))
    return parts


def _read_rows(
    reader: TensorReader, name: TensorName, start: int, stop: int, members: Sequence[tuple[Box, NDArray[Any]]]
) -> None:
    """Fills parts that begin with row `start`; those beyond `stop`, and columns beyond the logical ones, with zeros."""
    stored, columns = reader.tensor, name.shape[1:]
    for _, part in members:
        part[max(0, stop - start) :] = 0
    box, part = members[0]
    is_whole = box[1:] == tuple((0, size) for size in stored.shape[1:]) and columns == stored.shape[1:]
    if is_whole and part.dtype == stored.dtype:
        reader.read_into(part[: max(0, stop - start)], start)
        return
    for first, last in _blocks(stored, start, stop):
        block = reader.rows(first, last)
        if columns != stored.shape[1:]:
            _check_padding(stored, name, block[:, columns[0] :])
        for box, part in members:
            inside = [slice(begin, min(end, size)) for (begin, end), size in zip(box[1:], columns, strict=True)]
            values = block[(slice(None), *inside)]
            if part.dtype != values.dtype:
                values = cast(values, part.dtype, stored.where)
            rows = part[first - start : last - start]
            if values.shape != rows.shape:
                rows[:, values.shape[1] :] = 0
                rows = rows[:, : values.shape[1]]
            # As bits: numpy copies bfloat16 element by element.
            bits = np.dtype(f"u{part.dtype.itemsize}")
            rows.view(bits)[...] = values.view(bits)


def _blocks(stored: StoredTensor, start: int, stop: int) -> list[tuple[int, int]]:
    """Rows `start` to `stop` in blocks of about a megabyte."""
    step = max(1, _BLOCK * stored.shape[0] // max(1, stored.nbytes))
    return [(first, min(first + step, stop)) for first in range(start, stop, step)]


def _check_padding(stored: StoredTensor, name: TensorName, values: NDArray[Any]) -> None:
    if np.any(values):
        assert name.neuron_axis is not None
        raise beyond_the_neurons(stored, name.shape[name.neuron_axis])


def in_file(box: Box, name: TensorName, shape: Sequence[int]) -> Box:
    """A box of our parameter, which has a shape, as one of the file, where heads and head dimension are one axis."""
    if len(shape) == len(name.shape):
        return box
    if shape[0] == name.shape[0]:  # o_proj [D, N, H]
        rows, (start, stop), _ = box
        return rows, (start * shape[2], stop * shape[2])
    (start, stop), _, *columns = box  # q_proj [N, H, D], q_bias [N, H] and their like
    return (start * shape[1], stop * shape[1]), *columns
