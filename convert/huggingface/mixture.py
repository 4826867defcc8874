"""Mixtures of experts from file to file: read, scored, pruned and written a few tensors at a time, and never run."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from convert.card_header import read_header
from convert.checkpoint import Progress, cast
from convert.huggingface.folder import (
    plain_tensors,
    read_assets,
    read_config_file,
    read_history,
    without_tied_head,
    write_texts,
    write_weights,
)
from convert.huggingface.mixture_config import MixtureConfig, read_mixture_config, write_mixture_config
from convert.huggingface.safetensors import StoredTensor, read_ahead
from gluprune_jax.errors import OperationError, RequestError, listed, shortened
from gluprune_jax.models.config import NEURON_AXES
from gluprune_jax.pruning.mixture import MixtureSizes
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.scores import MLPWeights

# Of the tensors of an expert in a file, as transformers 4 and 5 write it, there are three for each expert.
_PACKED = re.compile(r".*\.layers\.\d+\.(?:mlp|block_sparse_moe)\.(?:experts\.\D.*|(?:input|output)_linear\..*)")


class StoredWeight(Protocol):
    """A tensor that lies in a file."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its elements."""

    @property
    def where(self) -> str:
        """What errors call it."""

    def read(self) -> NDArray[Any]:
        """Reads it.

        Raises:
          OperationError: the file cannot be read, or has changed since it was opened; NaN or Inf.
        """


@dataclasses.dataclass(frozen=True)
class MixtureCheckpoint:
    """A mixture of experts whose weights stay in their files until each is asked for.

    Attributes:
      config: the model in the files.
      stored: where each tensor lies, by its name in Hugging Face files.
      sizes: of the MLPs, as far as plans have left their neurons.
      source: the name or path it was opened from, as the user gave it.
      dtype: what every tensor is cast to as it is read; None keeps each tensor's own.
      kept: for each MLP the neurons that plans keep, if one was applied.
      assets: other files of the checkpoint by name (tokenizer, generation config, licence), byte for byte.
      history: one record for every pruning the model has been through, oldest first.
      notes: what was accepted and left out, one sentence each.
      card: what its own model card says of its licence and base model (`convert.card_header`).
    """

    config: MixtureConfig
    stored: Mapping[str, StoredWeight]
    sizes: MixtureSizes
    source: str
    dtype: np.dtype[Any] | None = None
    kept: tuple[NDArray[np.int32], ...] | None = None
    assets: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    card: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def tensors(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of each tensor, in the order of the forward pass."""
        names = self.config.names_with(self.sizes)
        return {name.hf: (self.dtype or self.stored[name.hf].dtype, name.shape) for name in names}

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors().values())

    def mlp_weights(self) -> Generator[MLPWeights[NDArray[Any]]]:
        """Reads the matrices of one MLP after the other."""
        wanted = [name for names in self.config.mlps for name in names]
        matrices = read_ahead(self.values, wanted, 1)
        yield from map(MLPWeights, matrices, matrices, matrices)  # a loop would hold an MLP while the next is read

    def pruned(self, plan: PruningPlan) -> "MixtureCheckpoint":
        """The checkpoint of which only the kept neurons will be read, with a record of that in its history.

        Raises:
          RequestError: the plan was made for another model.
        """
        sizes = plan.pruned_sizes(self.sizes)
        kept = plan.kept if self.kept is None else tuple(a[b] for a, b in zip(self.kept, plan.kept, strict=True))
        record = {"base_model": self.source, **plan.summary()}
        return dataclasses.replace(self, sizes=sizes, kept=kept, history=(*self.history, record))

    def write_weights(self, folder: Path, progress: Progress | None, values: Callable[[str], NDArray[Any]]) -> None:
        """Writes safetensors into an existing folder, for stock `transformers`.

        Args:
          folder: the folder.
          progress: called with what is being done, the bytes done and the bytes in all.
          values: gives each tensor once, by its name; `self.values` reads them.

        Raises:
          OperationError: the disk refuses, or the model's files cannot be read, have changed, or have NaN or Inf.
          RequestError: values too large for the dtype they are cast to.
        """
        write_weights(folder, self.tensors(), lambda name: [lambda: values(name)], progress)

    def write_assets(self, folder: Path) -> None:
        """Writes `config.json` and the assets beside the weights."""
        dtype, _ = self.tensors()["model.embed_tokens.weight"]
        write_texts(folder, write_mixture_config(self.config, self.sizes, dtype), self.history, self.assets)

    def read(self, name: str) -> NDArray[Any]:
        """Reads one tensor as it is in the files, cast to `dtype`.

        Raises:
          OperationError: the file cannot be read, or has changed since it was opened; NaN or Inf.
          RequestError: values too large for the dtype they are cast to.
        """
        values = self.stored[name].read()
        if self.dtype is not None and self.dtype != values.dtype:
            values = cast(values, self.dtype, self.stored[name].where)
        return values

    def values(self, name: str) -> NDArray[Any]:
        """Reads what is kept of one tensor; errors as of `read`."""
        values = self.read(name)
        if self.kept is None or name not in self._places:
            return values
        i, axis = self._places[name]
        return values.take(self.kept[i], axis)

    @functools.cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """For each matrix of an MLP that MLP's index and the axis that counts its neurons, by name."""
        return {
            name: (i, axis)
            for i, names in enumerate(self.config.mlps)
            for name, axis in zip(names, NEURON_AXES.values(), strict=True)
        }


def open_mixture_folder(folder: Path, source: str, dtype: np.dtype[Any] | None = None) -> MixtureCheckpoint:
    """Opens a folder with the `config.json` of a mixture of experts and safetensors; the weights are not read yet.

    Args:
      folder: the folder.
      source: what the user calls the model.
      dtype: casts every tensor as it is read; None keeps each tensor's own.

    Raises:
      RequestError: a config, dtype or layout that is not supported; quantised weights or an adapter.
      OperationError: damaged files; missing, unexpected or misshapen tensors.
    """
    config = read_mixture_config(read_config_file(folder), str(folder / "config.json"))
    tensors, notes = plain_tensors(folder)
    if config.tied:
        notes += without_tied_head(folder, tensors)
    _check_tensors(folder, config, tensors)
    return MixtureCheckpoint(
        config=config,
        stored=tensors,
        sizes=config.sizes,
        source=source,
        dtype=dtype,
        assets=read_assets(folder),
        history=read_history(folder),
        notes=tuple(notes),
        card=read_header(folder),
    )


def _check_tensors(folder: Path, config: MixtureConfig, tensors: Mapping[str, StoredTensor]) -> None:
    """Compares names and shapes with the config."""
    wanted = config.tensors
    if packed := [name for name in tensors if name not in wanted and _PACKED.fullmatch(name)]:
        raise RequestError(
            f"{folder}: {listed(packed, 120)} hold several experts in one tensor; accepted: "
            f"{', '.join(config.mlps[-1])}, as save_pretrained of transformers writes them"
        )
    missing = [name for name in wanted if name not in tensors]
    unexpected = sorted(tensors.keys() - wanted.keys())
    misshapen = [name for name, shape in wanted.items() if name in tensors and tensors[name].shape != shape]
    problems = []
    if missing:
        problems.append(f"missing {listed(missing, 90)}")
    if unexpected:
        problems.append(f"unexpected {listed(unexpected, 90)}")
    if misshapen:
        first = misshapen[0]
        more = f", and so have {len(misshapen) - 1} more other shapes" if len(misshapen) > 1 else ""
        found, means = shortened(list(tensors[first].shape)), list(wanted[first])
        problems.append(f"{listed([first])} has shape {found}, config.json means {means}{more}")
        if ".experts." in first:
            problems[-1] += f" (all experts have one width, {config.mixture.width})"
    if problems:
        raise OperationError(f"{folder}: the tensors do not match config.json: {'; '.join(problems)}")
