"""A Hugging Face checkpoint whose weights stay in their files."""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from convert import shards
from convert.checkpoint import (
    Checkpoint,
    MeshChoice,
    Progress,
    abstract_weights,
    build_model,
    cast,
    choose_mesh,
)
from convert.families.names import TensorName
from convert.huggingface import sharded
from convert.huggingface.safetensors import (
    Piece,
    StoredTensor,
    TensorReader,
    read_ahead,
    read_tensor,
    row_ranges,
)
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model, name_of, parameters_of
from gluprune_jax.parallel.mesh import parameter_sharding, to_host
from gluprune_jax.pruning.methods import Pruned, as_pruned
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.scores import MLPWeights
from gluprune_jax.pruning.slicing import NEURON_AXES, slice_neurons


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamedCheckpoint(Checkpoint):
    """A Hugging Face folder whose weights stay in their files until each is asked for.

    It scores, prunes and saves like any other checkpoint, to the same bits, with a few tensors in memory at a time.
    `model` holds shapes and dtypes in place of arrays; `load` gives one that runs.

    Attributes:
      stored: where each parameter lies, by its name in this model: in the file it has the number of its layer before
        others were dropped.
      stored_config: the architecture of what is in the files, as far as a plan has left its layers; `config` is that of
        the pruned model.
      kept: for each layer the neurons that a plan keeps, if one was applied.
      refitted: matrices of MLPs that are in memory instead of in the files, by name in this model.
      dtype: what every tensor is cast to as it is read; None keeps each tensor's own.
    """

    stored: Mapping[str, StoredTensor]
    stored_config: ModelConfig
    kept: tuple[NDArray[np.int32], ...] | None = None
    refitted: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    dtype: np.dtype[Any] | None = None

    def array(self, name: TensorName) -> jax.Array:
        """Reads one tensor.

        Raises:
          OperationError: the file cannot be read, or has changed since it was opened; NaN or Inf.
          RequestError: values too large for the dtype they are cast to.
        """
        if name.name in self.refitted:
            refitted: jax.Array = jax.device_put(self.refitted[name.name])
            return refitted
        stored = self.stored[name.name]
        values = self._without_padding(name, read_tensor(stored))
        if self.dtype is not None and self.dtype != values.dtype:
            values = cast(values, self.dtype, stored.where)
        if name.neuron_axis is None:
            values = values.reshape(super().array(name).shape)
        # device_put takes an aligned buffer over; asarray would copy it.
        array: jax.Array = jax.device_put(values)
        if name.neuron_axis is None or self.kept is None:
            return array
        kept = self.kept[int(name.path[1])]
        if len(kept) == array.shape[name.neuron_axis]:
            return array
        sliced: jax.Array = slice_neurons(name.neuron_axis, 0, array, kept)
        return sliced

    def pieces(self, name: TensorName) -> list[Piece]:
        """What reads a tensor that has no neurons as files hold it, a few megabytes of its rows at a time."""
        stored = self.stored[name.name]

        def read(start: int, stop: int) -> NDArray[Any]:
            with TensorReader(stored) as reader:
                values = reader.rows(start, stop)
            if self.dtype is not None and self.dtype != values.dtype:
                values = cast(values, self.dtype, stored.where)
            return values

        return [functools.partial(read, *rows) for rows in row_ranges(stored)]

    def mlp_weights(self) -> Generator[MLPWeights]:
        """Reads the MLP matrices of one layer after the other."""
        names = {name.path: name for name in self.tensor_names}
        layers = range(self.config.num_hidden_layers)
        wanted = [names["layers", i, "mlp", matrix] for i in layers for matrix in MLPWeights._fields]
        matrices = read_ahead(self.array, wanted, 1)
        yield from map(MLPWeights, matrices, matrices, matrices)  # a loop would hold a layer while the next is read

    def runnable_model(self) -> Decoder:
        """The model with its weights in memory: they are read each time."""
        return self.load().model

    def pruned(self, pruned: Pruned | PruningPlan, *, donate: bool = False) -> Self:
        """The checkpoint of which only the kept layers and neurons will be read. There is nothing to donate.

        Refitted matrices are kept in memory, cut to the neurons that stay.
        """
        pruned = as_pruned(pruned)
        plan, new = pruned.plan, pruned.parameters
        config, layers = plan.pruned_config(self.config), plan.remaining_layers
        before = {name: _name_before(name, layers) for name in parameters_of(abstract_model(config))}
        stored = {name: self.stored[old] for name, old in before.items()}
        refitted = {}
        for name, old in before.items():
            if old in new or old in self.refitted:
                dense = to_host(new[old]) if old in new else self.refitted[old]
                _, i, _, matrix = old.split(".")
                refitted[name] = np.take(dense, plan.kept[int(i)], NEURON_AXES[matrix])
        return dataclasses.replace(
            self,
            model=abstract_weights(config, {name: self.dtype or tensor.dtype for name, tensor in stored.items()}),
            stored=stored,
            stored_config=self.stored_config.with_layers(layers),
            kept=tuple(plan.kept[i] if self.kept is None else self.kept[i][plan.kept[i]] for i in layers),
            refitted=refitted,
            history=(*self.history, self.record(pruned)),
        )

    def load(self, progress: Progress | None = None, mesh: MeshChoice | None = None) -> Checkpoint:
        """Reads everything into a model that runs.

        Args:
          progress: called with what is being done, the bytes done and the bytes in all.
          mesh: chooses the mesh that the weights are spread over, each process reading only the parts of its own
            devices; by default all of them go to the default device.

        Raises:
          OperationError: the files cannot be read; NaN or Inf.
        """
        chosen, config = choose_mesh(mesh, self.model)
        read = self.array if chosen is None else self._reader(chosen, config)
        total, done = sum(tensor.nbytes for tensor in self.stored.values()), 0
        arrays = {}
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            futures = {pool.submit(read, name): name.name for name in self.tensor_names}
            try:
                for future in concurrent.futures.as_completed(futures):
                    name = futures[future]
                    arrays[name] = future.result()
                    done += self.stored[name].nbytes
                    if progress:
                        progress("reading safetensors", done, total)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Checkpoint)}
        return Checkpoint(**fields | {"model": build_model(config, arrays)})

    def _reader(self, mesh: Mesh, config: ModelConfig) -> Callable[[TensorName], jax.Array]:
        """Reads tensors onto a mesh."""
        shapes = {name: leaf.shape for name, leaf in parameters_of(abstract_model(config)).items()}

        def read(name: TensorName) -> jax.Array:
            shape = shapes[name.name]
            sharding = parameter_sharding(mesh, name.path, shape)
            if name.neuron_axis is not None and self.kept is not None:
                return shards.place(np.asarray(self.array(name)), shape, sharding)
            return sharded.read_parameter(self.stored[name.name], name, shape, sharding, self.dtype)

        return read

    def _without_padding(self, name: TensorName, values: NDArray[Any]) -> NDArray[Any]:
        """Removes the padding of a layer that is narrower than the file has it, which must be zero."""
        if name.neuron_axis is None:
            return values
        width = self.stored_config.intermediate_sizes[int(name.path[1])]
        if values.shape[name.neuron_axis] == width:
            return values
        real, padding = np.split(values, [width], axis=name.neuron_axis)
        if np.any(padding):
            raise sharded.beyond_the_neurons(self.stored[name.name], width)
        return np.ascontiguousarray(real)


def _name_before(name: str, layers: Sequence[int]) -> str:
    """What a parameter was called before all but `layers` were dropped."""
    match name.split("."):
        case "layers", i, *rest:
            return name_of(("layers", layers[int(i)], *rest))
    return name
