"""Reads a model from a GGUF file: config, weights (dequantised) and tokenizer.

GGUF files are written by llama.cpp's converter, and by us as it does. Its habits with weights: in some architectures
the rows of Q and K are permuted for a RoPE that pairs neighbouring dimensions, in some one is added to the weights of
norms, and Phi-3's fused tensors stay fused. What it makes of the config: `convert.gguf.config`.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from convert import shards
from convert.buffers import aligned_empty
from convert.card_header import LICENCE_KEYS
from convert.checkpoint import MeshChoice, Progress, cast
from convert.families.family import Family, GGUFTable
from convert.families.names import TensorName, file_shape, grouped, tensor_names
from convert.gguf.config import (
    HISTORY,
    TRUE_WIDTHS,
    check_keys,
    check_model,
    find_mixture,
    find_table,
    is_tied,
    read_metadata,
    read_mixture_metadata,
    stored_widths,
)
from convert.gguf.file import GGUFTensor, all_files, place_all_tensors, printable, read_header, read_rows, some
from convert.gguf.tokenizer import end_token_ids, special_token_ids, tokenizer_assets
from convert.huggingface.mixture import MixtureCheckpoint
from convert.huggingface.mixture_config import MixtureConfig
from convert.loaded import LoadedCheckpoint, abstract_weights, build_model, choose_mesh
from gluprune_jax.errors import GlupruneError, OperationError, shortened
from gluprune_jax.files.records import parse
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model, parameters_of
from gluprune_jax.parallel.mesh import parameter_sharding

# What the values of the other types, which are all quantised, become is float32.
_PLAIN_TYPES: Mapping[GGMLType, np.dtype[Any]] = {
    GGMLType.F32: np.dtype(np.float32),
    GGMLType.F16: np.dtype(np.float16),
    GGMLType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_MAX_DIVISORS = 1 << 12  # of RoPE frequencies: half a head


def read_gguf(
    path: pathlib.Path,
    dtype: np.dtype[Any] | None = None,
    progress: Progress | None = None,
    mesh: MeshChoice | None = None,
) -> LoadedCheckpoint:
    """Reads a GGUF file of an architecture that a family's table has.

    Args:
      path: the file.
      dtype: what every tensor is cast to. None keeps float32, float16 and bfloat16 tensors bit for bit, and
        turns quantised ones into float32.
      progress: called after each tensor with a description and the bytes of the file read so far and in all.
      mesh: chooses the mesh that the weights are spread over, tensor by tensor; by default all of them go to the
        default device.

    Returns:
      The model with its tokenizer and generation config as assets. What is not supported is refused, never dropped.

    Raises:
      RequestError: there is no such file, or it holds a model or tensor type that is not supported.
      OperationError: the file is damaged: unreadable, cut short, tensors missing, unexpected, of a wrong shape
        or not finite.
    """
    return open_gguf(path, dtype=dtype).load(progress, mesh)


@dataclasses.dataclass(frozen=True)
class GGUFSource:
    """An opened GGUF file as a source of models (`convert.sources.Source`): all is checked but the weights.

    Attributes:
      path: the file; of several the first.
      name: what the user calls the model.
      table: what llama.cpp makes of its architecture.
      family: its family.
      config: its architecture.
      widths: of each layer in the file, with the zero neurons that it may have been padded with.
      fields: the metadata as Python values.
      tensors: where our parameters lie, by name.
      notes: what was accepted and left out, one sentence each.
      dtype: what every tensor is cast to. None keeps float32, float16 and bfloat16 tensors bit for bit, and turns
        quantised ones, and norms that something was added to, into float32.
    """

    path: pathlib.Path
    name: str
    table: GGUFTable
    family: Family
    config: ModelConfig
    widths: tuple[int, ...]
    fields: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]
    notes: tuple[str, ...]
    dtype: np.dtype[Any] | None = None

    @property
    def abstract_model(self) -> Decoder:
        """The model with shapes and dtypes in place of arrays."""
        dtypes = {
            name: self.dtype or _dtype(tensor.kind, _offset(self.table, tensor))
            for name, tensor in self.tensors.items()
        }
        return abstract_weights(self.config, dtypes)

    @property
    def identity(self) -> str:
        """Tells the model from others of the same name."""
        files = {self.path, *(tensor.file for tensor in self.tensors.values())}
        return f"{sum(file.stat().st_size for file in files)} bytes"

    def stream(self) -> None:
        """A GGUF file is loaded whole: its tensors are dequantised as they are read."""

    def load(self, progress: Progress | None = None, mesh: MeshChoice | None = None) -> LoadedCheckpoint:
        """Reads the weights, tensor by tensor; for the arguments and errors see `read_gguf`."""
        with _naming(self.path):
            chosen, config = choose_mesh(mesh, self.abstract_model)
            notes = [*self.notes, _kinds(self.tensors.values(), self.dtype)]
            arrays = self._read(config, chosen, progress)
            beside = read_beside(self.fields, self.table, config.vocab_size)
        family = {"model_type": self.family.model_type, "architectures": [self.family.architecture]}
        return LoadedCheckpoint(
            model=build_model(config, arrays),
            source=self.name,
            hf_config={**family, **beside.token_ids},
            assets=beside.assets,
            history=beside.history,
            notes=(*notes, *beside.notes),
            card=beside.card,
        )

    def _read(self, config: ModelConfig, mesh: Mesh | None, progress: Progress | None) -> dict[str, Array]:
        """All tensors in the shapes of our parameters, by name."""
        logical = parameters_of(abstract_model(dataclasses.replace(config, width_multiple=1)))
        stored = parameters_of(abstract_model(config))
        total, done = sum(tensor.nbytes for tensor in self.tensors.values()), 0
        arrays: dict[str, Array] = {}
        for name in tensor_names(config, self.family):
            tensor, shape = self.tensors[name.name], logical[name.name].shape
            with _naming_part(tensor.file, self.path):
                values = _values(tensor, self.dtype, _offset(self.table, tensor))
                values = _without_padding(values, name)
            if name.path[-1] in self.table.permuted:
                values = _undo_permutation(values, *shape[:2])
            values = np.ascontiguousarray(values.reshape(shape))
            if mesh is None:
                arrays[name.name] = jax.device_put(values)
            else:
                shape = stored[name.name].shape
                arrays[name.name] = shards.place(values, shape, parameter_sharding(mesh, name.path, shape))
            done += tensor.nbytes
            if progress is not None:
                progress("reading GGUF", done, total)
        return arrays


def open_gguf(path: pathlib.Path, name: str | None = None, dtype: np.dtype[Any] | None = None) -> GGUFSource:
    """Opens a GGUF file of a dense model; its weights are not read yet, but for tensors that say what the config is.

    Args:
      path: the file; of a model in several, as gguf-split makes them, the first.
      name: what the user calls the model; the path where it is None.
      dtype: as of `GGUFSource`.

    Raises:
      RequestError: there is no such file, or it holds a model or tensor type that is not supported.
      OperationError: the file is damaged, as far as its header shows.
    """
    with _naming(path):
        header = read_header(path)
        paths = all_files(path, header.fields)
        table = find_table(header.fields)
        tensors = place_all_tensors(paths, header)
        notes = check_keys(table, header.fields)
        vectors = {name: _vector(tensors[name]) for name in sorted(table.vectors & tensors.keys())}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        family, config = read_metadata(table, header.fields, shapes, is_tied(table, tensors), vectors)
        widths = stored_widths(table, header.fields, tensors.keys())
        if "output.weight" in tensors and config.tie_word_embeddings and table.output == "optional":
            notes.append("output.weight is identical to token_embd.weight, so the embeddings were taken as tied")
        names = tensor_names(dataclasses.replace(config, intermediate_sizes=widths), family)
        parts = _parameters(table, names, config.tie_word_embeddings, tensors)
    return GGUFSource(
        path=path,
        name=str(path) if name is None else name,
        table=table,
        family=family,
        config=config,
        widths=widths,
        fields=header.fields,
        tensors={name.name: tensor for name, tensor in parts},
        notes=tuple(notes),
        dtype=dtype,
    )


def open_gguf_mixture(path: pathlib.Path, name: str, dtype: np.dtype[Any] | None = None) -> MixtureCheckpoint | None:
    """Opens a GGUF file of a mixture of experts, whose weights stay there until each is asked for.

    Args:
      path: the file; of a model in several, as gguf-split makes them, the first.
      name: what the user calls the model.
      dtype: what every tensor is cast to as it is read; None keeps float32, float16 and bfloat16 tensors bit for bit,
        and turns quantised ones into float32.

    Returns:
      The mixture; None where the file holds something else.

    Raises:
      RequestError: it holds a tensor type, or a mixture, that is not supported.
      OperationError: the file is damaged, as far as its header shows.
    """
    with _naming(path):
        header = read_header(path)
        mixture, fields = find_mixture(header.fields), header.fields
        if mixture is None:
            return None
        check_model(fields)
        table = mixture.gguf
        tensors = place_all_tensors(all_files(path, fields), header)
        notes = check_keys(table, fields)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        config = read_mixture_metadata(mixture, fields, shapes, is_tied(table, tensors), {})
        parts = _parameters(table, config.names, config.tied, tensors)
        beside = read_beside(fields, table, shapes["token_embd.weight"][0])
    family = {"model_type": mixture.family.model_type, "architectures": [mixture.family.architecture]}
    stored = {part.hf: GGUFMatrix(path, tensor, part.shape, _heads(table, config, part)) for part, tensor in parts}
    return MixtureCheckpoint(
        config=dataclasses.replace(config, data={**config.data, **family, **beside.token_ids}),
        stored=stored,
        sizes=config.sizes,
        source=name,
        dtype=dtype,
        assets=beside.assets,
        history=beside.history,
        notes=(*notes, _kinds(tensors.values(), dtype), *beside.notes),
        card=beside.card,
    )


@dataclasses.dataclass(frozen=True)
class GGUFMatrix:
    """One of our tensors in a GGUF file, such as a matrix of one expert (`convert.huggingface.mixture.StoredWeight`).

    Attributes:
      path: the file; of several the first.
      tensor: where it lies.
      shape: its own.
      heads: of how many heads it holds the rows in llama.cpp's order for RoPE; None where they are in ours.
    """

    path: pathlib.Path
    tensor: GGUFTensor
    shape: tuple[int, ...]
    heads: int | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its elements once they are read."""
        return _dtype(self.tensor.kind)

    @property
    def where(self) -> str:
        """File and name, as messages say them."""
        return f"{self.path}: {self.tensor.name}"

    def read(self) -> NDArray[Any]:
        """Reads it, dequantised.

        Raises:
          OperationError: the file cannot be read, or has changed since it was opened; NaN or Inf.
        """
        with _naming(self.path), _naming_part(self.tensor.file, self.path):
            values = _values(self.tensor, None)
        if self.heads is not None:
            values = _undo_permutation(values, self.heads, self.shape[0] // self.heads)
        return np.ascontiguousarray(values.reshape(self.shape))


def _heads(table: GGUFTable, config: MixtureConfig, name: TensorName) -> int | None:
    return name.shape[0] // config.head_dim if name.path[-1] in table.permuted else None


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Puts the name of the file before errors."""
    try:
        yield
    except GlupruneError as error:
        raise type(error)(f"{path}: {error}") from error


@contextlib.contextmanager
def _naming_part(part: pathlib.Path, path: pathlib.Path) -> Iterator[None]:
    """Puts the name of one of several files before errors, if it is another one than the first."""
    try:
        yield
    except GlupruneError as error:
        if part == path:
            raise
        raise type(error)(f"{part.name}: {error}") from error


# --------------------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class Beside:
    """What a file holds beside the weights: as of `convert.checkpoint.Checkpoint`.

    Attributes:
      token_ids: what `config.json` says of special tokens.
      assets: tokenizer and generation config.
      history: what the model has been through.
      notes: one sentence each.
      card: what it says of the licence.
    """

    token_ids: Mapping[str, Any]
    assets: Mapping[str, bytes]
    history: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    card: Mapping[str, str]


def read_beside(fields: Mapping[str, Any], table: GGUFTable, vocab_size: int) -> Beside:
    """What a file holds beside the weights.

    Args:
      fields: the metadata as Python values.
      table: of its architecture.
      vocab_size: V.

    Raises:
      RequestError: a tokenizer that is not supported.
      OperationError: it is damaged.
    """
    token_ids = _token_ids(fields, vocab_size)
    assets = tokenizer_assets(fields, table.spaces_stay_behind)
    notes = () if assets else ("the file holds no tokenizer",)
    if token_ids:
        assets["generation_config.json"] = json.dumps(token_ids, indent=2).encode()
    return Beside(token_ids, assets, _history(fields), notes, _licence(fields))


def _licence(fields: Mapping[str, Any]) -> dict[str, str]:
    """What the metadata says of the licence, by the keys of a model card."""
    keys = zip(LICENCE_KEYS, ("general.license", "general.license.name", "general.license.link"), strict=True)
    values = {name: fields.get(key) for name, key in keys}
    return {name: value for name, value in values.items() if isinstance(value, str) and value and value.isprintable()}


def _history(fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """What the model has been through, if the file is one of ours."""
    records = parse(str(fields.get(HISTORY, "[]")).encode(), HISTORY)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise OperationError(f"{HISTORY} is {shortened(records)}; it must be a list of records")
    return tuple(records)


def _token_ids(fields: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    special = special_token_ids(fields, vocab_size)
    ids: dict[str, Any] = {f"{name}_id": i for name, i in special.items() if name != "unk_token"}
    # Chat models end their turn with another token than their text.
    ends = end_token_ids(fields, vocab_size)
    if len(ends) > 1 and "eos_token_id" in ids:
        ids["eos_token_id"] = ends
    return ids


# -------------------------------------------------------------------------------------------------- tensors


def _parameters(
    table: GGUFTable, names: Sequence[TensorName], tied: bool, tensors: Mapping[str, GGUFTensor]
) -> list[tuple[TensorName, GGUFTensor]]:
    """Where each of our parameters lies: some in a tensor that holds several.

    Raises:
      OperationError: tensors are missing, unexpected or of a wrong shape.
    """
    groups = grouped(names, "gguf")
    expected = {gguf_name: file_shape(parts) for gguf_name, parts in groups.items()}
    optional = {*table.vectors, *(["output.weight"] if tied and table.output == "optional" else [])}
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [printable(name) for name in tensors if name not in expected and name not in optional],
        "of a wrong shape": [
            f"{name} {tensor.shape} instead of {expected[name]}"
            for name, tensor in tensors.items()
            if name in expected and tensor.shape != expected[name]
        ],
    }
    found = [f"{problem}: {some(names)}" for problem, names in problems.items() if names]
    if found:
        raise OperationError(f"the tensors do not fit the config; {'; '.join(found)}")
    return [
        (name, tensor)
        for gguf_name, parts in groups.items()
        for name, tensor in zip(parts, _parts(tensors[gguf_name], parts), strict=True)
    ]


def _parts(tensor: GGUFTensor, names: Sequence[TensorName]) -> list[GGUFTensor]:
    """Where each of several parameters lies in a tensor that holds all of them, one under the other or stacked."""
    if len(names) == 1 and len(tensor.shape) < 3:
        return [tensor]
    flat = dataclasses.replace(tensor, shape=(tensor.rows, tensor.shape[-1]))
    ends = list(itertools.accumulate(name.shape[0] for name in names))
    return [flat.part(end - name.shape[0], end) for name, end in zip(names, ends, strict=True)]


def _kinds(tensors: Iterable[GGUFTensor], dtype: np.dtype[Any] | None) -> str:
    """How the tensors are stored, and what becomes of them, for the report to the user."""
    types = Counter({tensor.name: tensor.kind for tensor in tensors}.values())
    counts = ", ".join(f"{count} {kind.name}" for kind, count in types.most_common())
    became = ""
    if dtype:
        became = f", all cast to {dtype}"
    elif not types.keys() <= _PLAIN_TYPES.keys():
        became = ", the quantised ones now float32"
    return f"tensors in the file: {counts}{became}"


def _offset(table: GGUFTable, tensor: GGUFTensor) -> int:
    """What was added to the values of a tensor."""
    return table.norm_offset if tensor.name.endswith("norm.weight") else 0


def _dtype(kind: GGMLType, offset: int = 0) -> np.dtype[Any]:
    """What the values of a tensor become in memory, if they are not cast."""
    # In the dtype of the file, a difference would not be what was there before the sum was rounded to it.
    return np.dtype(np.float32) if offset else _PLAIN_TYPES.get(kind, np.dtype(np.float32))


def _vector(tensor: GGUFTensor) -> tuple[float, ...]:
    """The values of a small tensor of one axis, each as the shortest decimal that gives its float32.

    Raises:
      OperationError: it is not one, or has values that are not finite.
    """
    if len(tensor.shape) != 1 or tensor.shape[0] > _MAX_DIVISORS:
        raise OperationError(f"{tensor.name} has shape {tensor.shape}; expected one axis of at most {_MAX_DIVISORS}")
    return tuple(float(str(value)) for value in _values(tensor, np.dtype(np.float32)))


def _values(tensor: GGUFTensor, dtype: np.dtype[Any] | None, offset: int = 0) -> np.ndarray:
    """The values of a tensor, less what was added to them; beside them, only a few rows are in memory."""
    values = aligned_empty(tensor.shape, dtype or _dtype(tensor.kind, offset))
    rows = values.reshape(tensor.rows, tensor.shape[-1])
    for begin, end in tensor.chunks():
        part = read_rows(tensor, begin, end)
        with np.errstate(all="ignore"):
            plain = _PLAIN_TYPES.get(tensor.kind)
            read = gguf.quants.dequantize(part, tensor.kind) if plain is None else part.view(plain)
            if not np.isfinite(read).all():
                raise OperationError(f"{tensor.name} holds values that are not finite")
            if offset:
                read = read.astype(np.float32) - np.float32(offset)
            rows[begin:end] = read if read.dtype == rows.dtype else cast(read, rows.dtype, tensor.name)
    return values


def _without_padding(values: np.ndarray, name: TensorName) -> np.ndarray:
    """Leaves out the zero neurons that a layer was padded with.

    One whose row of either factor is zero adds nothing, whatever its column of the down projection holds, which a
    quantiser that works in blocks along this axis may have filled.

    Raises:
      OperationError: they are not zero.
    """
    if name.neuron_axis is None or values.shape == name.shape:
        return values
    width = name.shape[name.neuron_axis]
    real, padding = np.split(values, [width], axis=name.neuron_axis)
    if name.neuron_axis == 0 and np.any(padding):
        raise OperationError(f"{name.gguf} holds values beyond the {width} neurons of its layer ({TRUE_WIDTHS})")
    return real


def _undo_permutation(rows: np.ndarray, heads: int, head_dim: int) -> np.ndarray:
    """Brings rows `[heads * H, D]` of Q, K or a bias back: dimension i of a head stood at 2i, i + H/2 at 2i + 1."""
    return rows.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2)
