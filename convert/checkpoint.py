"""What a loader returns and a writer takes: a model and everything that travels with it."""

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from convert.chat import fix_date
from convert.families.family import Family
from convert.families.names import TensorName, tensor_names
from convert.families.registry import FAMILIES
from convert.gguf.sizes import check_file_type, metadata_bytes, tensor_bytes, with_width
from convert.gguf.widths import Widths, choose_widths
from convert.shards import all_finite
from gluprune_jax import progress as work
from gluprune_jax.data.documents import Document
from gluprune_jax.errors import RequestError
from gluprune_jax.files.records import OBJECT, check, parse
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model, num_bytes, parameters_of, with_parameters
from gluprune_jax.parallel.mesh import shape_of, to_host
from gluprune_jax.pruning.methods import Pruned, as_pruned
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.scores import MLPWeights, mlp_weights
from gluprune_jax.pruning.slicing import slice_model
from gluprune_jax.pruning.targets import padded_width

# Bytes of what a GGUF file of ours says of the model and of one more pruning, and for each layer: rather more than were
# seen (2.9 kB in all of a file of 30 layers).
_KEYS, _KEYS_OF_LAYER = 2560, 96

# (what is being done, bytes done, bytes in all)
Progress = Callable[[str, int, int], None]


# Chooses the mesh for a model, of which there are only shapes and dtypes yet; None is the default device.
MeshChoice = Callable[[Decoder], Mesh | None]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model with its surroundings.

    Attributes:
      model: the weights, and the architecture in `model.config`.
      source: the name or path it was loaded from, as the user gave it.
      hf_config: the keys of `config.json` that are not architecture (model type, token ids, ...), kept as they
        were so that an export says the same.
      assets: other files of the checkpoint by name (tokenizer, generation config, licence), byte for byte.
      history: one record for every pruning the model has been through, oldest first.
      notes: what the loader accepted and left out, one sentence each.
      card: what its own model card says of its licence and base model (`convert.card_header`).
    """

    model: Decoder
    source: str
    hf_config: Mapping[str, Any]
    assets: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    card: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """The architecture of the model."""
        return self.model.config

    @property
    def family(self) -> Family:
        """The family whose names its tensors have in files."""
        return FAMILIES[self.hf_config.get("model_type", "llama")]

    @property
    def tensor_names(self) -> list[TensorName]:
        """All tensors of the model, in the order of the forward pass."""
        return tensor_names(self.config, self.family)

    def array(self, name: TensorName) -> Array:
        """One tensor, in the shape of our parameter."""
        node: Any = self.model
        for part in name.path:
            node = node[part] if isinstance(part, int) else getattr(node, part)
        array: Array = node.get_value()
        return array

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
        model, config, family = self.model, self.config, self.family
        if file_type == "orbax":
            return lambda widths: num_bytes(model, widths)
        if file_type == "hf":
            return lambda widths: num_bytes(model, dict.fromkeys(widths, padded_width(max(widths.values()), pad_to)))
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

    def mlp_weights(self) -> Iterator[MLPWeights]:
        """The MLP matrices, layer by layer, for scoring."""
        return mlp_weights(self.model)

    def runnable_model(self) -> Decoder:
        """The model with its weights in memory."""
        return self.model

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

    def pruned(self, pruned: Pruned | PruningPlan, *, donate: bool = False) -> Self:
        """The checkpoint with its model refitted and sliced, and a record of all of that added to its history.

        Args:
          pruned: made for this model: a choice of neurons with the down projections that go with it, or a plan alone.
          donate: frees the dense MLPs as it goes (see `slice_model`).
        """
        pruned = as_pruned(pruned)
        model = slice_model(pruned.apply(self.model), pruned.plan, donate=donate)
        return dataclasses.replace(self, model=model, history=(*self.history, self.record(pruned)))

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


def for_file(name: TensorName, array: Array | NDArray[Any], width: int) -> NDArray[Any]:
    """A tensor of a model as files hold it: head axes merged, storage padding stripped, zero neurons up to `width`."""
    values = array if isinstance(array, np.ndarray) else to_host(array)
    if name.neuron_axis is None:
        return values.reshape(name.shape)
    values = (
        values.take(range(name.shape[name.neuron_axis]), name.neuron_axis) if (values.shape != name.shape) else values
    )
    extra = width - name.shape[name.neuron_axis]
    if not extra:
        return values
    return np.pad(values, [(0, extra if axis == name.neuron_axis else 0) for axis in range(values.ndim)])


def choose_mesh(choice: MeshChoice | None, model: Decoder) -> tuple[Mesh | None, ModelConfig]:
    """The mesh for an abstract model, and its config with the storage padding that this mesh asks for."""
    mesh = choice(model) if choice else None
    return mesh, dataclasses.replace(model.config, width_multiple=shape_of(mesh).model)


def abstract_weights(config: ModelConfig, dtypes: Mapping[str, Any]) -> Decoder:
    """The model with shapes and dtypes (by the name of each parameter) in place of arrays."""
    struct: Callable[..., jax.ShapeDtypeStruct] = jax.ShapeDtypeStruct  # untyped in jax
    shapes = parameters_of(abstract_model(config))
    return build_model(config, {name: struct(leaf.shape, dtypes[name]) for name, leaf in shapes.items()})


def build_model(config: ModelConfig, arrays: Mapping[str, Array | jax.ShapeDtypeStruct]) -> Decoder:
    """Puts all parameters, by name and each in our shape, into a model without allocating anything else.

    Shapes and dtypes in place of arrays give an abstract model.
    """
    model = abstract_model(config)
    assert arrays.keys() == parameters_of(model).keys()
    return with_parameters(model, arrays)
