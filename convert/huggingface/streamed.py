"""A Hugging Face checkpoint whose weights stay in their files.

They are read into the host's memory, and JAX is not imported before the model is asked for, or loaded.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from convert.checkpoint import Checkpoint, MeshChoice, Progress, cast, on_host
from convert.families.names import TensorName, tensor_names
from convert.huggingface.safetensors import (
    Piece,
    StoredTensor,
    TensorReader,
    beyond_the_neurons,
    read_ahead,
    read_tensor,
    row_ranges,
)
from gluprune_jax.models.config import NEURON_AXES, ModelConfig, name_of
from gluprune_jax.pruning.methods import Pruned, as_pruned
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.scores import MLPWeights

if TYPE_CHECKING:
    from convert.loaded import LoadedCheckpoint
    from gluprune_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamedCheckpoint(Checkpoint):
    """A Hugging Face folder whose weights stay in their files until each is asked for.

    It scores, prunes and saves like any other checkpoint, to the same bits, with a few tensors in memory at a time.
    `model` holds shapes and dtypes in place of arrays; `load` gives one that runs.

    Attributes:
      stored: where each parameter lies, by its name in this model: in the file it has the number of its layer before
        others were dropped.
      stored_config: the architecture of what is in the files, as far as a plan has left its layers.
      kept: for each layer the neurons that a plan keeps, if one was applied.
      refitted: matrices of MLPs that are in memory instead of in the files, by name in this model.
      dtype: what every tensor is cast to as it is read; None keeps each tensor's own.
    """

    stored: Mapping[str, StoredTensor]
    stored_config: ModelConfig
    kept: tuple[NDArray[np.int32], ...] | None = None
    refitted: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    dtype: np.dtype[Any] | None = None

    @functools.cached_property
    def config(self) -> ModelConfig:
        """The architecture of the model, as far as plans have left its neurons."""
        if self.kept is None:
            return self.stored_config
        return self.stored_config.with_layers(range(len(self.kept)), [len(kept) for kept in self.kept])

    @functools.cached_property
    def dtypes(self) -> Mapping[str, np.dtype[Any]]:
        """The dtype of each parameter, by name."""
        return {name: self.dtype or tensor.dtype for name, tensor in self.stored.items()}

    @functools.cached_property
    def model(self) -> Decoder:
        """The model with shapes and dtypes in place of arrays."""
        from convert.loaded import abstract_weights  # here: it needs JAX

        return abstract_weights(self.config, self.dtypes)

    def array(self, name: TensorName) -> NDArray[Any]:
        """Reads one tensor, in the shape of `name`.

        NumPy adds bfloat16 up in bfloat16, where sums stall, and sorts NaN anywhere: convert to float32 for statistics.

        Raises:
          OperationError: the file cannot be read, or has changed since it was opened; NaN or Inf.
          RequestError: values too large for the dtype they are cast to.
        """
        if name.name in self.refitted:
            return self.refitted[name.name]
        stored = self.stored[name.name]
        values = self._without_padding(name, read_tensor(stored))
        if self.dtype is not None and self.dtype != values.dtype:
            values = cast(values, self.dtype, stored.where)
        if name.neuron_axis is None or self.kept is None:
            return values
        kept = self.kept[int(name.path[1])]
        return values if len(kept) == values.shape[name.neuron_axis] else values.take(kept, name.neuron_axis)

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

    def mlp_weights(self) -> Generator[MLPWeights[NDArray[Any]]]:
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
        before = {name.name: _name_before(name.path, layers) for name in tensor_names(config, self.family)}
        stored = {name: self.stored[old] for name, old in before.items()}
        refitted = {}
        for name, old in before.items():
            if old in new or old in self.refitted:
                dense = self.refitted[old] if old not in new else on_host(new[old])
                _, i, _, matrix = old.split(".")
                refitted[name] = np.take(dense, plan.kept[int(i)], NEURON_AXES[matrix])
        return dataclasses.replace(
            self,
            stored=stored,
            stored_config=self.stored_config.with_layers(layers),
            kept=tuple(plan.kept[i] if self.kept is None else self.kept[i][plan.kept[i]] for i in layers),
            refitted=refitted,
            history=(*self.history, self.record(pruned)),
        )

    def load(self, progress: Progress | None = None, mesh: MeshChoice | None = None) -> LoadedCheckpoint:
        """Reads everything into a model that runs.

        Args:
          progress: called with what is being done, the bytes done and the bytes in all.
          mesh: chooses the mesh that the weights are spread over, each process reading only the parts of its own
            devices; by default all of them go to the default device.

        Raises:
          OperationError: the files cannot be read; NaN or Inf.
        """
        from convert.huggingface.sharded import reader  # here: these need JAX
        from convert.loaded import build_model, choose_mesh

        chosen, config = choose_mesh(mesh, self.model)
        read = reader(self, chosen, config)
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
        return self.with_model(build_model(config, arrays))

    def _without_padding(self, name: TensorName, values: NDArray[Any]) -> NDArray[Any]:
        """Removes the padding of a layer that is narrower than the file has it, which must be zero."""
        if name.neuron_axis is None:
            return values
        width = self.stored_config.intermediate_sizes[int(name.path[1])]
        if values.shape[name.neuron_axis] == width:
            return values
        real, padding = np.split(values, [width], axis=name.neuron_axis)
        if np.any(padding):
            raise beyond_the_neurons(self.stored[name.name], width)
        return np.ascontiguousarray(real)


def _name_before(path: Sequence[str | int], layers: Sequence[int]) -> str:
    """What the parameter at a path was called before all but `layers` were dropped."""
    match path:
        case "layers", int(i), *rest:
            return name_of(("layers", layers[i], *rest))
    return name_of(tuple(path))
