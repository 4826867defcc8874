"""What a loader returns and a writer takes: a model and everything that travels with it."""

from __future__ import annotations

import abc
import dataclasses
import datetime
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from convert.buffers import all_finite
from convert.chat import fix_date
from convert.families.family import Family
from convert.families.names import TensorName, tensor_names
from convert.families.registry import FAMILIES
from convert.gguf.sizes import check_file_type, metadata_bytes, tensor_bytes, with_width
from convert.gguf.widths import Widths, choose_widths
from gluprune_jax import progress as work
from gluprune_jax.data.documents import Document
from gluprune_jax.errors import RequestError
from gluprune_jax.files.records import OBJECT, check, parse
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.pruning.methods import Pruned
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.scores import MLPWeights
from gluprune_jax.pruning.targets import padded_width

if TYPE_CHECKING:
    from jax import Array
    from jax.sharding import Mesh

    from convert.loaded import LoadedCheckpoint
    from gluprune_jax.models.decoder import Decoder

# Bytes of what a GGUF file of ours says of the model and of one more pruning, and for each layer: rather more than were
# seen (2.9 kB in all of a file of 30 layers).
_KEYS, _KEYS_OF_LAYER = 2560, 96

# (what is being done, bytes done, bytes in all)
Progress = Callable[[str, int, int], None]


# Chooses the mesh for a model, of which there are only shapes and dtypes yet; None is the default device.
MeshChoice = Callable[["Decoder"], "Mesh | None"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(abc.ABC):
    """A model with its surroundings, its weights in memory (`LoadedCheckpoint`) or in files (`StreamedCheckpoint`).

    Attributes:
      source: the name or path it was loaded from, as the user gave it.
      hf_config: the keys of `config.json` that are not architecture (model type, token ids, ...), kept as they
        were so that an export says the same.
      assets: other files of the checkpoint by name (tokenizer, generation config, licence), byte for byte.
      history: one record for every pruning the model has been through, oldest first.
      notes: what the loader accepted and left out, one sentence each.
      card: what its own model card says of its licence and base model (`convert.card_header`).
    """

    source: str
    hf_config: Mapping[str, Any]
    assets: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    card: Mapping[str, str] = dataclasses.field(default_factory=dict)

    if TYPE_CHECKING:  # a field of one of them: dataclasses would take a property here for its default

        @property
        def model(self) -> Decoder:
            """The model; with shapes and dtypes in place of arrays, where its weights are in files."""

    @property
    @abc.abstractmethod
    def config(self) -> ModelConfig:
        """The architecture of the model."""

    @property
    @abc.abstractmethod
    def dtypes(self) -> Mapping[str, np.dtype[Any]]:
        """The dtype of each parameter, by name."""

    @property
    def is_spread(self) -> bool:
        """Whether this process lacks a part of the weights, so that all must gather them together."""
        return False

    @abc.abstractmethod
    def array(self, name: TensorName) -> Array | NDArray[Any]:
        """One tensor, as the model or its files hold it: `for_file` gives it the shape of `name`."""

    @abc.abstractmethod
    def mlp_weights(self) -> Iterator[MLPWeights[Any]]:
        """The MLP matrices, layer by layer, for scoring."""

    @abc.abstractmethod
    def runnable_model(self) -> Decoder:
        """The model with its weights in memory."""

    @abc.abstractmethod
    def pruned(self, pruned: Pruned | PruningPlan, *, donate: bool = False) -> Self:
        """The checkpoint with its model refitted and sliced, and a record of all of that added to its history.

        Args:
          pruned: made for this model: a choice of neurons with the down projections that go with it, or a plan alone.
          donate: frees the dense MLPs as it goes (see `slice_model`).
        """

    def with_model(self, model: Decoder) -> LoadedCheckpoint:
        """Another model, in memory, in the surroundings of this one."""
        from convert.loaded import LoadedCheckpoint  # here: whoever has a model has JAX

        return LoadedCheckpoint(
            model=model, **{field.name: getattr(self, field.name) for field in dataclasses.fields(Checkpoint)}
        )

    @property
    def family(self) -> Family:
        """The family whose names its tensors have in files."""
        return FAMILIES[self.hf_config.get("model_type", "llama")]

    @property
    def tensor_names(self) -> list[TensorName]:
        """All tensors of the model, in the order of the forward pass."""
        return tensor_names(self.config, self.family)

    def num_bytes(self, widths: Mapping[int, int] | None = None) -> int:
        """Bytes of the weights; given `widths`, with only these layers, by index, each with so many neurons."""
        names, widths = self.tensor_names, dict(enumerate(self.config.intermediate_sizes)) if widths is None else widths
        total = 0
        for name in names:
            size = math.prod(name.shape)
            if name.path[0] == "layers":
                if (layer := int(name.path[1])) not in widths:
                    continue
                if name.neuron_axis is not None:
                    size = widths[layer] * name.shape[1 - name.neuron_axis]
            total += size * self.dtypes[name.name].itemsize
        return total

    def file_size(
        self, file_type: str, pad_to: int = 1, *, from_folder: bool = False, gguf_widths: Widths | None = None
    ) -> Callable[[Mapping[int, int]], int]:
        """What gives the bytes of this model in files, when of its layers, by index, so many neurons stay.

        Args:
          file_type: "hf", "orbax", or a type of GGUF files (`convert.gguf.sizes.FILE_TYPES`). Of GGUF the tokenizer is
            counted too, of the others weights alone.
          pad_to: widths in GGUF files and a Hugging Face folder are rounded up to a multiple of this.
          from_folder: whether GGUF files are made by llama.cpp's converter of a Hugging Face folder, in which all
            layers have one width, or here, where they may differ.
          gguf_widths: how they are made here, as of `convert.gguf.writer.plan_gguf`.

        Raises:
          RequestError: another type.
        """
        config, family = self.config, self.family
        if file_type == "orbax":
            return self.num_bytes
        if file_type == "hf":
            return lambda widths: self.num_bytes(dict.fromkeys(widths, padded_width(max(widths.values()), pad_to)))
        check_file_type(file_type)
        metadata = metadata_bytes(config, family, self.assets)
        if from_folder or family.gguf is None:

            def of_folder(widths: Mapping[int, int]) -> int:
                width = padded_width(max(widths.values()), pad_to)
                return metadata + tensor_bytes(with_width(config.with_layers([*widths]), width), family, file_type)

            return of_folder
        table = family.gguf
        history = len(json.dumps(list(self.history)).encode()) + _KEYS + _KEYS_OF_LAYER * config.num_hidden_layers

        def of_gguf(widths: Mapping[int, int]) -> int:
            found = config.with_layers([*widths], [*widths.values()])
            _, stored, _ = choose_widths(table, found, gguf_widths, None if pad_to == 1 else pad_to)
            found = dataclasses.replace(found, intermediate_sizes=stored)
            return metadata + history + tensor_bytes(found, family, file_type)

        return of_gguf

    def generation_settings(self) -> dict[str, Any]:
        """What `config.json` says of generation, and over it the generation config, if there is one.

        Raises:
          OperationError: the generation config is no JSON object.
        """
        name = f"generation_config.json of {self.source}"
        settings = parse(self.assets.get("generation_config.json", b"{}"), name)
        check(settings, OBJECT, name)
        return {**self.hf_config, **settings}

    def chat_date(self, documents: Sequence[Document], given: datetime.date | None) -> datetime.date | None:
        """The day that the chat template writes into these documents, if any is a conversation and it writes one.

        Raises:
          RequestError: a day is given, and nothing writes it.
        """
        from convert.tokenizer import load_tokenizer  # here: as below

        has_chats = any(document.kind == "chat" for document in documents)
        return fix_date(load_tokenizer(self) if has_chats else None, given)

    def calibration_windows(
        self,
        documents: Sequence[Document],
        *,
        tokens: int,
        sequence_length: int,
        chat_template: str | None = None,
        date: datetime.date | None = None,
        progress: work.Progress = work.no_progress,
    ) -> NDArray[np.int32]:
        """Calibration text in the model's own tokens: see `convert.calibration_text.calibration_windows`."""
        from convert.calibration_text import calibration_windows  # here: it needs tokenizers, which take a second

        return calibration_windows(
            self,
            documents,
            tokens=tokens,
            sequence_length=sequence_length,
            chat_template=chat_template,
            date=date,
            progress=progress,
        )

    def record(self, pruned: Pruned) -> Mapping[str, Any]:
        """What `history` says of a pruning."""
        return {"base_model": self.source, **pruned.plan.summary(), **pruned.record()}


def cast(values: NDArray[Any], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """The finite values of tensor `name` in another dtype.

    Raises:
      RequestError: some are too large for it.
    """
    with np.errstate(over="ignore"):
        values = values.astype(dtype)
    if not all_finite(values):
        raise too_large(name, dtype)
    return values


def too_large(name: str, dtype: np.dtype[Any]) -> RequestError:
    """The refusal of a cast."""
    return RequestError(f"{name} holds values too large for {dtype}; accepted: a dtype of wider range")


def on_host(array: Array | NDArray[Any]) -> NDArray[Any]:
    """An array, whole, in the memory of the host; one that is spread over processes all of them must ask for."""
    if isinstance(array, np.ndarray):
        return array
    from gluprune_jax.parallel.mesh import to_host  # here: whoever has an array of JAX has JAX

    return to_host(array)


def for_file(name: TensorName, array: Array | NDArray[Any], width: int) -> NDArray[Any]:
    """A tensor of a model as files hold it: head axes merged, storage padding stripped, zero neurons up to `width`."""
    values = on_host(array)
    if name.neuron_axis is None:
        return values.reshape(name.shape)
    values = (
        values.take(range(name.shape[name.neuron_axis]), name.neuron_axis) if (values.shape != name.shape) else values
    )
    extra = width - name.shape[name.neuron_axis]
    if not extra:
        return values
    return np.pad(values, [(0, extra if axis == name.neuron_axis else 0) for axis in range(values.ndim)])
