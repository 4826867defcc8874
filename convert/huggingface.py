"""Hugging Face folders: loading them into our model and writing them for stock `transformers`."""

import concurrent.futures
import dataclasses
import fnmatch
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from convert import shards
from convert.checkpoint import (
    Checkpoint,
    MeshChoice,
    abstract_weights,
    build_model,
    cast,
    choose_mesh,
    model_arrays,
    parameter_shapes,
)
from convert.hf_config import accepted_without_effect, read_config, write_config
from convert.names import TensorName, tensor_names
from convert.safetensors_files import (
    StoredTensor,
    hold_the_same,
    index_folder,
    layout,
    read_ahead,
    read_tensor,
    write_order,
    write_tensors,
)
from gluprune_jax.distributed import is_main
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.importance import MLPWeights
from gluprune_jax.mesh import is_local, parameter_sharding, to_host
from gluprune_jax.model import ModelConfig
from gluprune_jax.object_store import Folder
from gluprune_jax.plan import PruningPlan
from gluprune_jax.slicing import slice_neurons

# (what is being done, bytes done, bytes in all)
Progress = Callable[[str, int, int], None]

# Files of a checkpoint that pruning does not change; they are copied byte for byte.
ASSET_PATTERNS = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
)

HISTORY_FILE = "gluprune_history.json"
MAX_SHARD_BYTES = 5_000_000_000  # as transformers splits

_INV_FREQ = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")


def read_assets(folder: Folder) -> dict[str, bytes]:
    """The tokenizer, generation config and licence files of a folder, by name."""
    try:
        return {
            path.name: path.read_bytes()
            for path in sorted(folder.iterdir())
            if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in ASSET_PATTERNS)
        }
    except OSError as error:
        raise OperationError(f"cannot read {error.filename}: {error.strerror}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamedCheckpoint(Checkpoint):
    """A Hugging Face folder whose weights stay in their files until each is asked for.

    It scores, prunes and saves like any other checkpoint, to the same bits, with a few tensors in memory at a time.
    `model` holds shapes and dtypes in place of arrays; `load` gives one that runs.

    Attributes:
      stored: where each tensor lies, by Hugging Face name in this model: in the file a tensor has the number of its
        layer before others were dropped.
      stored_config: the architecture of what is in the files, as far as a plan has left its layers; `config` is that of
        the pruned model.
      kept: for each layer the neurons that a plan keeps, if one was applied.
      dtype: what every tensor is cast to as it is read; None keeps each tensor's own.
    """

    stored: Mapping[str, StoredTensor]
    stored_config: ModelConfig
    kept: tuple[NDArray[np.int32], ...] | None = None
    dtype: np.dtype[Any] | None = None

    def array(self, name: TensorName) -> jax.Array:
        """Reads one tensor.

        Raises:
          OperationError: the file cannot be read, or has changed since it was opened; NaN or Inf.
          RequestError: values too large for the dtype they are cast to.
        """
        stored = self.stored[name.hf]
        values = self._without_padding(name, read_tensor(stored))
        if self.dtype is not None and self.dtype != values.dtype:
            values = cast(values, self.dtype, f"{stored.file}: tensor {stored.name}")
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

    def mlp_weights(self) -> Iterator[MLPWeights]:
        """Reads the MLP matrices of one layer after the other."""
        names = {name.path: name for name in tensor_names(self.config)}
        layers = range(self.config.num_hidden_layers)
        wanted = [names["layers", i, "mlp", matrix] for i in layers for matrix in MLPWeights._fields]
        matrices = read_ahead(self.array, wanted)
        for gate, up, down in zip(matrices, matrices, matrices, strict=True):
            yield MLPWeights(gate, up, down)

    def pruned(self, plan: PruningPlan, *, donate: bool = False) -> "StreamedCheckpoint":
        """The checkpoint of which only the kept layers and neurons will be read. There is nothing to donate."""
        config, layers = plan.pruned_config(self.config), plan.remaining_layers
        before = {name.path: name.hf for name in tensor_names(self.config)}
        stored = {name.hf: self.stored[before[_path_before(name, layers)]] for name in tensor_names(config)}
        remaining = dataclasses.replace(
            self.stored_config, intermediate_sizes=tuple(self.stored_config.intermediate_sizes[i] for i in layers)
        )
        return dataclasses.replace(
            self,
            model=abstract_weights(config, {hf: self.dtype or tensor.dtype for hf, tensor in stored.items()}),
            stored=stored,
            stored_config=remaining,
            kept=tuple(plan.kept[i] if self.kept is None else self.kept[i][plan.kept[i]] for i in layers),
            history=(*self.history, self.record(plan)),
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
        names = {name.hf: name for name in tensor_names(self.config)}
        chosen, config = choose_mesh(mesh, self.model)
        read = self.array if chosen is None else self._reader(chosen, config)
        total, done = sum(tensor.nbytes for tensor in self.stored.values()), 0
        arrays = {}
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            futures = {pool.submit(read, name): hf for hf, name in names.items()}
            try:
                for future in concurrent.futures.as_completed(futures):
                    hf = futures[future]
                    arrays[hf] = future.result()
                    done += self.stored[hf].nbytes
                    if progress:
                        progress("reading safetensors", done, total)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Checkpoint)}
        return Checkpoint(**fields | {"model": build_model(config, arrays)})

    def _reader(self, mesh: Mesh, config: ModelConfig) -> Callable[[TensorName], jax.Array]:
        """Reads tensors onto a mesh."""
        shapes = {hf: leaf.shape for hf, leaf in parameter_shapes(config).items()}

        def read(name: TensorName) -> jax.Array:
            shape = shapes[name.hf]
            sharding = parameter_sharding(mesh, name.path, shape)
            if name.neuron_axis is not None and self.kept is not None:
                return shards.place(np.asarray(self.array(name)), shape, sharding)
            return shards.read_parameter(self.stored[name.hf], name, shape, sharding, self.dtype)

        return read

    def _without_padding(self, name: TensorName, values: NDArray[Any]) -> NDArray[Any]:
        """Removes the padding of a layer that is narrower than the widest, which must be zero."""
        if name.neuron_axis is None:
            return values
        width = self.stored_config.intermediate_sizes[int(name.path[1])]
        if values.shape[name.neuron_axis] == width:
            return values
        real, padding = np.split(values, [width], axis=name.neuron_axis)
        if np.any(padding):
            raise shards.beyond_the_neurons(self.stored[name.hf], width)
        return np.ascontiguousarray(real)


def _path_before(name: TensorName, layers: Sequence[int]) -> tuple[str | int, ...]:
    """Where a tensor stood before all but `layers` were dropped."""
    if name.path[0] != "layers":
        return name.path
    return ("layers", layers[int(name.path[1])], *name.path[2:])


def open_huggingface(folder: Path, source: str, dtype: np.dtype[Any] | None = None) -> StreamedCheckpoint:
    """Opens a folder with `config.json` and safetensors; the weights are not read yet.

    Args:
      folder: the folder.
      source: what the user calls the model.
      dtype: casts every tensor as it is read; None keeps each tensor's own.

    Raises:
      RequestError: a config, dtype or layout that is not supported.
      OperationError: damaged files; missing, unexpected or misshapen tensors (all of them listed).
    """
    data = _read_json(folder / "config.json")
    config, rest = read_config(data, str(folder / "config.json"))
    tensors = index_folder(folder)
    notes = _check_tensors(folder, config, tensors)
    if inert := accepted_without_effect(rest):
        notes.append(f"config.json: accepted without effect on the weights: {', '.join(inert)}")
    if "gluprune" in data:
        notes.append("the zero padding of narrower layers, which the file needs and the model does not, was removed")

    history = _read_json(folder / HISTORY_FILE) if (folder / HISTORY_FILE).exists() else []
    if not isinstance(history, list) or not all(isinstance(record, dict) for record in history):
        raise OperationError(f"{folder / HISTORY_FILE} is corrupt: it is not a list of records")
    return StreamedCheckpoint(
        model=abstract_weights(config, {hf: dtype or tensor.dtype for hf, tensor in tensors.items()}),
        source=source,
        hf_config=rest,
        assets=read_assets(folder),
        history=tuple(history),
        notes=tuple(notes),
        stored=tensors,
        stored_config=config,
        dtype=dtype,
    )


def write_huggingface(checkpoint: Checkpoint, folder: Path, progress: Progress | None = None) -> None:
    """Writes `config.json`, safetensors and the assets into an existing folder, for stock `transformers`.

    Storage padding is stripped. Where layers differ in width, narrower ones are zero-padded to the widest, because
    a Hugging Face config holds one `intermediate_size`.

    Call it on every process: all of them gather what is spread over them, tensor by tensor, and the first one writes.

    Raises:
      OperationError: the disk refuses.
    """
    config = checkpoint.config
    widest = max(config.intermediate_sizes)
    names = {name.hf: name for name in tensor_names(config)}
    dtypes = {name.hf: array.dtype for name, array in model_arrays(checkpoint.model)}
    tensors = {hf: (dtypes[hf], _file_shape(name, widest)) for hf, name in names.items()}
    sizes = {hf: math.prod(shape) * dtype.itemsize for hf, (dtype, shape) in tensors.items()}
    files = _name_files(layout(sizes, MAX_SHARD_BYTES))
    total, done = sum(sizes.values()), 0
    parts = {file: {hf: tensors[hf] for hf in members} for file, members in files.items()}
    # What is spread over processes is gathered by all of them, on their main threads and in the same order.
    spread = any(isinstance(a, jax.Array) and not is_local(a) for _, a in model_arrays(checkpoint.model))
    remaining = dict.fromkeys(hf for part in parts.values() for hf in write_order(part))

    def written(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress("writing safetensors", done, total)

    def values(hf: str) -> NDArray[Any]:
        remaining.pop(hf)
        return _for_file(names[hf], checkpoint.array(names[hf]), widest)

    def gather_the_rest() -> None:
        while spread and remaining:
            values(next(iter(remaining)))

    if not is_main():
        gather_the_rest()
        return
    try:
        for file, part in parts.items():
            write_tensors(folder / file, part, values, written, ahead=not spread)
    except Exception:  # an interrupted process leaves at once instead
        gather_the_rest()  # the others wait for this one to take part
        raise
    if len(files) > 1:
        weight_map = {hf: file for file, members in files.items() for hf in members}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    write_assets(checkpoint, folder)


def write_assets(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes everything but the weights: `config.json`, the tokenizer and its like, the pruning history."""
    embedding = checkpoint.model.embed_tokens.get_value()
    _write_json(folder / "config.json", write_config(checkpoint.config, checkpoint.hf_config, embedding.dtype))
    if checkpoint.history:
        _write_json(folder / HISTORY_FILE, list(checkpoint.history))
    for name, content in checkpoint.assets.items():
        (folder / name).write_bytes(content)


def _check_tensors(folder: Path, config: ModelConfig, tensors: dict[str, StoredTensor]) -> list[str]:
    """Compares names and shapes with the config; drops derived tensors from `tensors` and says so."""
    notes = []
    if derived := [name for name in tensors if _INV_FREQ.fullmatch(name)]:
        for name in derived:
            del tensors[name]
        notes.append(f"{len(derived)} rotary_emb.inv_freq tensors were left out: the config determines them")
    embedding = tensors.get("model.embed_tokens.weight")
    head = tensors.get("lm_head.weight")
    if config.tie_word_embeddings and head and embedding:
        if not hold_the_same(head, embedding):
            raise OperationError(
                f"{folder}: lm_head.weight differs from the embedding although config.json says "
                f"tie_word_embeddings; set it to false or remove the tensor"
            )
        del tensors["lm_head.weight"]
        notes.append("lm_head.weight was left out: it equals the tied embedding")

    widest = max(config.intermediate_sizes)
    wanted = {name.hf: _file_shape(name, widest) for name in tensor_names(config)}
    problems = []
    if missing := sorted(wanted.keys() - tensors.keys()):
        problems.append(f"missing {', '.join(missing)}")
    if unexpected := sorted(tensors.keys() - wanted.keys()):
        problems.append(f"unexpected {', '.join(unexpected)}")
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, config.json means {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise OperationError(f"{folder}: the tensors do not match config.json: {'; '.join(problems)}")
    return notes


def _name_files(parts: Sequence[Sequence[str]]) -> dict[str, Sequence[str]]:
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{n:05d}-of-{len(parts):05d}.safetensors": part for n, part in enumerate(parts, start=1)}


def _file_shape(name: TensorName, widest: int) -> tuple[int, ...]:
    return tuple(widest if axis == name.neuron_axis else size for axis, size in enumerate(name.shape))


def _for_file(name: TensorName, array: jax.Array, widest: int) -> NDArray[Any]:
    """An array in the shape of the file: head axes merged, storage padding stripped, padded to the widest."""
    values = to_host(array)
    if name.neuron_axis is None:
        return values.reshape(name.shape)
    values = (
        values.take(range(name.shape[name.neuron_axis]), name.neuron_axis) if (values.shape != name.shape) else values
    )
    extra = widest - name.shape[name.neuron_axis]
    if not extra:
        return values
    return np.pad(values, [(0, extra if axis == name.neuron_axis else 0) for axis in range(values.ndim)])


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
