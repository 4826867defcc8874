"""Hugging Face folders: loading them into our model and writing them for stock `transformers`."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from convert.card_header import read_header
from convert.checkpoint import Checkpoint, MeshChoice, Progress, for_file
from convert.families.family import Family
from convert.families.names import (
    TensorName,
    grouped,
    is_derived,
    not_plain_weights,
    standard_names,
    tensor_names,
)
from convert.families.registry import FAMILIES
from convert.huggingface.config import accepted_without_effect, file_width, read_config, stored_width, write_config
from convert.huggingface.safetensors import (
    INDEX,
    Piece,
    StoredTensor,
    check_dtypes,
    hold_the_same,
    index_folder,
    indexed_names,
    layout,
    write_order,
    write_tensors,
)
from convert.huggingface.streamed import StreamedCheckpoint
from convert.output import CHAT_TEMPLATE_FOLDER
from convert.tokenizer import portable_assets
from gluprune_jax.errors import OperationError, RequestError, listed, shortened
from gluprune_jax.files.object_store import Folder
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.parallel.distributed import is_main

if TYPE_CHECKING:
    from jax import Array

    from gluprune_jax.models.decoder import Decoder

# Files of a checkpoint that pruning does not change; they are copied byte for byte (see `portable_assets`). Among them
# is all that `AutoTokenizer` reads, in transformers 4.57 and 5.24.
ASSET_PATTERNS = (
    "tokenizer*.json",
    "*.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
)

HISTORY_FILE = "gluprune_history.json"

MAX_SHARD_BYTES = 5_000_000_000  # as transformers splits


def read_assets(folder: Folder) -> dict[str, bytes]:
    """The tokenizer, generation config and licence files of a folder, by their path in it."""
    try:
        templates = folder / CHAT_TEMPLATE_FOLDER
        paths = {path.name: path for path in sorted(folder.iterdir())}
        if templates.is_dir():
            paths |= {f"{CHAT_TEMPLATE_FOLDER}/{path.name}": path for path in sorted(templates.iterdir())}
        return {
            name: path.read_bytes()
            for name, path in paths.items()
            if any(fnmatch.fnmatch(name, pattern) for pattern in ASSET_PATTERNS) and path.is_file()
        }
    except OSError as error:
        raise OperationError(f"cannot read {error.filename}: {error.strerror}") from error


def open_huggingface(folder: Path, source: str, dtype: np.dtype[Any] | None = None) -> StreamedCheckpoint:
    """Opens a folder with `config.json` and safetensors; the weights are not read yet.

    Args:
      folder: the folder.
      source: what the user calls the model.
      dtype: casts every tensor as it is read; None keeps each tensor's own.

    Raises:
      RequestError: a config, dtype or layout that is not supported; quantised weights or an adapter.
      OperationError: damaged files; missing, unexpected or misshapen tensors.
    """
    data = read_config_file(folder)
    config, rest = read_config(data, str(folder / "config.json"))
    tensors, notes = _model_tensors(
        folder,
        config,
        FAMILIES[rest["model_type"]],
        data["model_type"],
        stored_width(data, str(folder / "config.json")),
    )
    if inert := accepted_without_effect(data):
        notes.append(f"config.json: accepted without effect on the weights: {listed(inert, 300)}")
    if "gluprune" in data:
        notes.append("the zero padding of layers, which the file needs and the model does not, was removed")

    return StreamedCheckpoint(
        source=source,
        hf_config=rest,
        assets=read_assets(folder),
        history=read_history(folder),
        notes=tuple(notes),
        card=read_header(folder),
        stored=tensors,
        stored_config=config,
        dtype=dtype,
    )


def read_config_file(folder: Path) -> Any:
    """The parsed `config.json` of a folder that is a model by itself.

    Raises:
      RequestError: there is none, or there is an adapter too.
      OperationError: it cannot be read, or is not JSON.
    """
    if (folder / "adapter_config.json").exists():
        raise RequestError(
            f"{folder} has adapter_config.json: it is an adapter to a model, or one that transformers would add to the "
            f"model here; merge it first, with merge_and_unload of peft, and save that, or take the file away"
        )
    return _read_json(folder / "config.json")


def read_history(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """What the model of a folder has been through, oldest first.

    Raises:
      OperationError: the file is damaged.
    """
    history = _read_json(folder / HISTORY_FILE) if (folder / HISTORY_FILE).exists() else []
    if not isinstance(history, list) or not all(isinstance(record, dict) for record in history):
        raise OperationError(f"{folder / HISTORY_FILE} is corrupt: it is not a list of records")
    return tuple(history)


@dataclasses.dataclass(frozen=True)
class HuggingFaceSource:
    """An opened folder as a source of models (`convert.sources.Source`).

    Attributes:
      opened: the model, with its weights in their files.
      revision: the commit that a hub id stands for; empty for a folder that the user named.
    """

    opened: StreamedCheckpoint
    revision: str = ""

    @property
    def abstract_model(self) -> Decoder:
        """The model with shapes and dtypes in place of arrays."""
        return self.opened.model

    @property
    def identity(self) -> str:
        """Tells the model from others of the same name."""
        tensors = [(tensor.name, tensor.dtype.name, tensor.shape) for tensor in self.opened.stored.values()]
        return f"{self.revision} {self.opened.stored_config} {sorted(tensors)}"

    def stream(self) -> StreamedCheckpoint:
        """The model with its weights in their files until each is asked for."""
        return self.opened

    def load(self, progress: Progress | None = None, mesh: MeshChoice | None = None) -> Checkpoint:
        """Reads all weights: see `StreamedCheckpoint.load`."""
        return self.opened.load(progress, mesh)


def write_huggingface(
    checkpoint: Checkpoint, folder: Path, progress: Progress | None = None, *, pad_to: int = 1
) -> None:
    """Writes `config.json`, safetensors and the assets into an existing folder, for stock `transformers`.

    Call it on every process: all of them gather what is spread over them, tensor by tensor, and the first one writes.

    Raises:
      OperationError: the disk refuses.
    """
    write_weights_of(checkpoint, folder, progress, pad_to=pad_to)
    if is_main():
        write_assets(checkpoint, folder, pad_to)


def write_weights_of(
    checkpoint: Checkpoint,
    folder: Path,
    progress: Progress | None = None,
    *,
    pad_to: int = 1,
    array: Callable[[TensorName], Array | NDArray[Any]] | None = None,
) -> None:
    """Writes the safetensors of `write_huggingface`.

    Storage padding is stripped. All layers have one width in the files, because a Hugging Face config holds one
    `intermediate_size`: that of the widest, rounded up to a multiple of `pad_to`. What a layer lacks is filled up with
    neurons of zeros, which change nothing, and which reading the folder takes away.

    Args:
      checkpoint: the model.
      folder: an existing one.
      progress: called with what is being done, the bytes done and the bytes in all.
      pad_to: the width in the files is a multiple of this.
      array: gives each tensor once; by default `checkpoint.array`.

    Raises:
      OperationError: the disk refuses.
    """
    config, array = checkpoint.config, array or checkpoint.array
    width = file_width(config.intermediate_sizes, pad_to)
    names = grouped(checkpoint.tensor_names, "hf")
    tensors = {hf: (checkpoint.dtypes[parts[0].name], _file_shape(parts, width)) for hf, parts in names.items()}
    files = _divided(tensors)
    # What is spread over processes is gathered by all of them, on their main threads and in the same order.
    spread = checkpoint.is_spread
    remaining = dict.fromkeys(hf for part in files.values() for hf in write_order(part))

    def pieces(hf: str) -> Sequence[Piece]:
        remaining.pop(hf)
        found = [piece for name in names[hf] for piece in pieces_of(name)]
        # All of a tensor at once: should the disk fail between two pieces, the other processes gather both.
        return [functools.partial(np.asarray, piece()) for piece in found] if spread else found

    def pieces_of(name: TensorName) -> Sequence[Piece]:
        if isinstance(checkpoint, StreamedCheckpoint) and name.neuron_axis is None:
            return checkpoint.pieces(name)  # an embedding may be larger than all of a layer
        return [lambda: for_file(name, array(name), width)]

    def gather_the_rest() -> None:
        while spread and remaining:
            pieces(next(iter(remaining)))

    if not is_main():
        gather_the_rest()
        return
    try:
        _write_files(folder, files, pieces, progress, ahead=not spread)
    except Exception:  # an interrupted process leaves at once instead
        gather_the_rest()  # the others wait for this one to take part
        raise


def write_weights(
    folder: Path,
    tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
    pieces: Callable[[str], Sequence[Piece]],
    progress: Progress | None = None,
) -> None:
    """Writes safetensors into an existing folder, in several files if there is much, with a few tensors in memory.

    Args:
      folder: the folder.
      tensors: dtype and shape by name.
      pieces: as of `write_tensors`.
      progress: called with what is being done, the bytes done and the bytes in all.

    Raises:
      OperationError: the disk refuses.
    """
    _write_files(folder, _divided(tensors), pieces, progress, ahead=True)


_Part = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]


def _divided(tensors: _Part) -> dict[str, _Part]:
    """The tensors of each file."""
    files = _name_files(layout({hf: _nbytes(*tensor) for hf, tensor in tensors.items()}, MAX_SHARD_BYTES))
    return {file: {hf: tensors[hf] for hf in members} for file, members in files.items()}


def _nbytes(dtype: np.dtype[Any], shape: Sequence[int]) -> int:
    return math.prod(shape) * dtype.itemsize


def _write_files(
    folder: Path,
    files: Mapping[str, _Part],
    pieces: Callable[[str], Sequence[Piece]],
    progress: Progress | None,
    *,
    ahead: bool,
) -> None:
    total, done = sum(_nbytes(*tensor) for part in files.values() for tensor in part.values()), 0

    def written(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress("writing safetensors", done, total)

    for file, part in files.items():
        write_tensors(folder / file, part, pieces, written, ahead=ahead)
    if len(files) > 1:
        weight_map = {hf: file for file, members in files.items() for hf in members}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX, index)


def write_assets(checkpoint: Checkpoint, folder: Path, pad_to: int = 1) -> None:
    """Writes everything but the weights: `config.json`, the tokenizer and its like, the pruning history.

    `pad_to` is that of the weights beside them, as of `write_huggingface`.
    """
    dtype = checkpoint.dtypes["embed_tokens"]
    config = write_config(checkpoint.config, checkpoint.hf_config, dtype, pad_to)
    write_texts(folder, config, checkpoint.history, checkpoint.assets)


def write_texts(
    folder: Path,
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    assets: Mapping[str, bytes],
) -> None:
    """Writes `config.json`, what a model has been through, and its assets."""
    _write_json(folder / "config.json", config)
    if history:
        _write_json(folder / HISTORY_FILE, list(history))
    for name, content in portable_assets(assets).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def plain_tensors(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of a folder by their names in its files, without those that the config determines, and notes.

    Raises:
      RequestError: quantised weights, adapters, or dtypes that are not read.
      OperationError: damaged files.
    """
    files = index_folder(folder)
    notes = []
    if derived := [name for name in files if is_derived(name)]:
        notes.append(f"{len(derived)} rotary_emb.inv_freq tensors were left out: the config determines them")
    found = {name: tensor for name, tensor in files.items() if not is_derived(name)}
    if (indexed := indexed_names(folder)) is not None:
        if unlisted := sorted(found.keys() - indexed):
            notes.append(
                f"{INDEX} does not list {listed(unlisted)} of its files: read, as in transformers 5 (4 leaves it out)"
            )
        if absent := sorted(name for name in indexed - files.keys() if not is_derived(name)):
            notes.append(f"{INDEX} lists {listed(absent)}, which its files do not hold")
    if why := not_plain_weights(found):
        raise RequestError(f"{folder}: {why}")
    check_dtypes(found.values())
    return found, notes


def _model_tensors(
    folder: Path, config: ModelConfig, family: Family, model_type: str, width: int
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Where the parameters of a folder lie, by name, and what was left out or read in another way than it is called.

    `model_type` is that of the folder: of a multimodal model the family's text half is read. `width` is that of all
    layers in its files.

    Raises:
      RequestError: quantised weights, adapters, or dtypes that are not read.
      OperationError: damaged files; tensors that are missing, unexpected, misshapen or there twice.
    """
    found, notes = plain_tensors(folder)
    if family.wrapper is not None and family.wrapper.model_type == model_type:
        other = [name for name in found if name.removeprefix("model.").startswith(family.wrapper.beside)]
        notes.append(f"{len(other)} tensors that are not of the text half were left out ({listed(other, 100)})")
        found = {name: tensor for name, tensor in found.items() if name not in set(other)}
    try:
        standard, changes = standard_names(found, config.tie_word_embeddings)
    except ValueError as error:
        raise OperationError(f"{folder}: {error}") from error
    notes += changes
    tensors = {standard[name]: tensor for name, tensor in found.items()}
    if config.tie_word_embeddings:
        notes += without_tied_head(folder, tensors)
    names = grouped(tensor_names(config, family), "hf")
    _check_tensors(folder, config, names, tensors, width)
    return {name: part for hf, parts in names.items() for name, part in _parts(tensors[hf], parts).items()}, notes


def without_tied_head(folder: Path, tensors: dict[str, StoredTensor]) -> list[str]:
    """Takes the output projection out of the tensors of a model where it is the embedding, and notes that.

    Raises:
      OperationError: it is there and another one.
    """
    embedding, head = tensors.get("model.embed_tokens.weight"), tensors.get("lm_head.weight")
    if not (head and embedding):
        return []
    if not hold_the_same(head, embedding):
        raise OperationError(
            f"{folder}: {listed([head.name])} differs from the embedding although config.json says "
            f"tie_word_embeddings; set it to false or remove the tensor"
        )
    del tensors["lm_head.weight"]
    return [f"{listed([head.name])} was left out: it equals the tied embedding"]


def _parts(tensor: StoredTensor, names: Sequence[TensorName]) -> dict[str, StoredTensor]:
    """Where each of several parameters lies in a tensor that holds all of them, by name."""
    if len(names) == 1:
        return {names[0].name: tensor}
    rows = [name.shape[0] for name in names]
    if names[0].neuron_axis is not None:  # their heights are that of the file, where all layers have one
        rows = [tensor.shape[0] // len(names)] * len(names)
    row_bytes = tensor.nbytes // tensor.shape[0]
    return {
        name.name: dataclasses.replace(
            tensor, shape=(count, *tensor.shape[1:]), offset=tensor.offset + start * row_bytes, nbytes=count * row_bytes
        )
        for name, count, start in zip(names, rows, itertools.accumulate(rows, initial=0), strict=False)
    }


def _check_tensors(
    folder: Path,
    config: ModelConfig,
    names: Mapping[str, Sequence[TensorName]],
    tensors: Mapping[str, StoredTensor],
    width: int,
) -> None:
    """Compares names and shapes with the config, and with the width that all layers have in the files."""
    wanted = {hf: _file_shape(parts, width) for hf, parts in names.items()}
    missing = sorted(wanted.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - wanted.keys())
    misshapen = [name for name, shape in wanted.items() if name in tensors and tensors[name].shape != shape]
    if not wanted.keys() & tensors.keys():
        levels = zip(*(name.split(".") for name in unexpected), strict=False)
        common = "".join(f"{level[0]}." for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
        raise OperationError(
            f"{folder}: none of its {len(tensors)} tensors has a name that is understood"
            + (f" ({listed(unexpected, 120)})" if tensors else "")
            + (f"; all begin with {shortened(common)}" if common and len(tensors) > 1 else "")
            + "; accepted: the names of transformers, such as model.embed_tokens.weight"
        )
    problems = []
    layers = sum(name.endswith(_down_proj(names)) for name in tensors)
    if abs(layers - config.num_hidden_layers) > 1 and (missing or unexpected):
        problems.append(f"they are of {layers} layers, num_hidden_layers is {config.num_hidden_layers}")
    if missing:
        problems.append(f"missing {listed(missing, 90)}")
        if missing == ["lm_head.weight"]:
            problems[-1] += " (with tie_word_embeddings it would be the embedding)"
    if unexpected:
        problems.append(f"unexpected {listed(unexpected, 90)}")
    if misshapen:
        first, shape = tensors[misshapen[0]], list(wanted[misshapen[0]])
        more = f", and so have {len(misshapen) - 1} more other shapes" if len(misshapen) > 1 else ""
        found = shortened(list(first.shape))
        problems.append(f"{listed([first.name])} has shape {found}, config.json means {shape}{more}")
    if problems:
        raise OperationError(f"{folder}: the tensors do not match config.json: {'; '.join(problems)}")


def _name_files(parts: Sequence[Sequence[str]]) -> dict[str, Sequence[str]]:
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{n:05d}-of-{len(parts):05d}.safetensors": part for n, part in enumerate(parts, start=1)}


def _file_shape(names: Sequence[TensorName], width: int) -> tuple[int, ...]:
    """The shape of a tensor of the file that holds these, one under the other."""
    shapes = [
        tuple(width if axis == name.neuron_axis else size for axis, size in enumerate(name.shape)) for name in names
    ]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _down_proj(names: Mapping[str, Sequence[TensorName]]) -> str:
    """How the name of a layer's down projection ends."""
    first = next(hf for hf, parts in names.items() if parts[0].name == "layers.0.mlp.down_proj")
    return first.partition(".0.")[2]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RequestError(f"{path.parent} has no {path.name}; it is not a Hugging Face model folder") from error
    except OSError as error:
        raise OperationError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise OperationError(f"{path} is not JSON: {error}") from error


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
