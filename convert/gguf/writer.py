"""Writes a model as a GGUF file, tensor by tensor: the tables of the reader, backwards.

llama.cpp keeps tensors of one axis (norms, biases, divisors of frequencies) in float32 whatever the others are, and so
do we.
"""

import dataclasses
import functools
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from gguf import LlamaFileType
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray

from convert.checkpoint import Checkpoint, Progress, cast, for_file
from convert.families.family import GGUFTable
from convert.families.llama_cpp import is_own_yarn, main_rope
from convert.families.names import TensorName, file_shape, grouped, is_router, tensor_names
from convert.gguf.config import write_metadata, write_mixture_metadata
from convert.gguf.file_writer import tensor_bytes, write_file
from convert.gguf.widths import BLOCK, WIDTHS, Widths, choose_widths
from convert.huggingface.mixture import MixtureCheckpoint
from convert.huggingface.mixture_config import as_dense
from convert.huggingface.safetensors import read_ahead
from convert.huggingface.streamed import StreamedCheckpoint
from gluprune_jax.errors import RequestError
from gluprune_jax.models.config import ModelConfig, YarnRope

TYPES: Mapping[str, GGMLType] = {kind.name: kind for kind in (GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0)}
_DTYPES: Mapping[GGMLType, np.dtype[Any]] = {
    GGMLType.F32: np.dtype(np.float32),
    GGMLType.F16: np.dtype(np.float16),
    GGMLType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_FILE_TYPES = {
    GGMLType.F32: LlamaFileType.ALL_F32,
    GGMLType.F16: LlamaFileType.MOSTLY_F16,
    GGMLType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
_CHUNK = 1 << 20  # values that are converted at a time, in a processor's cache


@dataclasses.dataclass(frozen=True)
class GGUFPlan:
    """What a GGUF file of a model will hold, before any weight is read.

    Attributes:
      table: of its architecture.
      widths: of each layer in the file, zero neurons included.
      fields: the metadata.
      tensors: type and shape of each tensor, by name, in the order of the file.
      parts: our parameters in each tensor that holds some, one under the other.
      vectors: the values of the others.
      notes: what is stored in another way than one would expect, one sentence each.
    """

    table: GGUFTable
    widths: tuple[int, ...]
    fields: Mapping[str, Any]
    tensors: Mapping[str, tuple[GGMLType, tuple[int, ...]]]
    parts: Mapping[str, Sequence[TensorName]]
    vectors: Mapping[str, tuple[float, ...]]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor_bytes(*tensor) for tensor in self.tensors.values())


def plan_gguf(
    checkpoint: Checkpoint,
    gguf_type: str | None = None,
    gguf_widths: Widths | None = None,
    width_multiple: int | None = None,
) -> GGUFPlan:
    """Decides how a model is written as a GGUF file.

    Args:
      checkpoint: the model; of its weights only shapes and dtypes are looked at.
      gguf_type: what its matrices are stored as, one of `TYPES`; None keeps the dtype of each. In Q8_0, those with rows
        that 32 does not divide are F16.
      gguf_widths: how layers of different widths are written: "per-layer" as llama.cpp takes them in its architecture
        "deci", "uniform" with zero neurons up to the widest. None is the first where `deci` can express the model.
      width_multiple: zero neurons are added up to a multiple of this; None is 32 where layers differ, else 1.

    Raises:
      RequestError: llama.cpp has no architecture for the model, or cannot express it, or a parameter is none of these.
    """
    _check_choices(gguf_type, gguf_widths)
    if width_multiple is not None and width_multiple < 1:
        raise RequestError(f"`width_multiple` is {width_multiple}; it must be at least 1")
    config, family = checkpoint.config, checkpoint.family
    if family.gguf is None:
        raise RequestError(f"llama.cpp has no architecture that is known here for {family.name}; write `format` hf")
    table, widths, notes = choose_widths(family.gguf, config, gguf_widths, width_multiple)
    padded = dataclasses.replace(config, intermediate_sizes=widths)
    parts = grouped(tensor_names(padded, family), "gguf")
    dtypes = checkpoint.dtypes
    tensors = _tensors(table.divisors(config), parts, lambda name: dtypes[name.name], gguf_type)
    fields = write_metadata(table, config, widths, {name: shape for name, (_, shape) in tensors.items()})
    return _plan(table, config, widths, fields, tensors, parts, gguf_type, notes)


def plan_gguf_mixture(
    checkpoint: MixtureCheckpoint,
    gguf_type: str | None = None,
    gguf_widths: Widths | None = None,
) -> GGUFPlan:
    """As `plan_gguf`, of a mixture of experts, which all have one width.

    Args:
      checkpoint: the mixture.
      gguf_type, gguf_widths: as of `plan_gguf`.

    Raises:
      RequestError: llama.cpp cannot express it, or a parameter is none of these.
    """
    _check_choices(gguf_type, gguf_widths)
    config, sizes = checkpoint.config, checkpoint.sizes
    dense = as_dense(config, sizes)
    table, widths, notes = choose_widths(config.mixture.gguf, dense, gguf_widths, None)
    parts = grouped(config.names_with(sizes), "gguf")
    dtypes = {name: dtype for name, (dtype, _) in checkpoint.tensors().items()}
    tensors = _tensors(table.divisors(dense), parts, lambda name: dtypes[name.hf], gguf_type)
    fields = write_mixture_metadata(config, sizes, {name: shape for name, (_, shape) in tensors.items()})
    return _plan(table, dense, widths, fields, tensors, parts, gguf_type, notes)


def _check_choices(gguf_type: str | None, gguf_widths: Widths | None) -> None:
    if gguf_type is not None and gguf_type not in TYPES:
        raise RequestError(f"`gguf_type` is {gguf_type!r}; choose from {', '.join(TYPES)}")
    if gguf_widths is not None and gguf_widths not in WIDTHS:
        raise RequestError(f"`gguf_widths` is {gguf_widths!r}; choose from {', '.join(WIDTHS)}")


def _tensors(
    vectors: Mapping[str, Sequence[float]],
    parts: Mapping[str, Sequence[TensorName]],
    dtype_of: Callable[[TensorName], np.dtype[Any]],
    gguf_type: str | None,
) -> dict[str, tuple[GGMLType, tuple[int, ...]]]:
    """Type and shape of each tensor, in the order of the file."""
    tensors: dict[str, tuple[GGMLType, tuple[int, ...]]] = {
        name: (GGMLType.F32, (len(values),)) for name, values in vectors.items()
    }
    for name, names in parts.items():
        shape = file_shape(names)
        dtypes = {dtype_of(part) for part in names}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)  # which holds all of them
        tensors[name] = (GGMLType.F32 if is_router(name) else _type_of(dtype, shape, gguf_type), shape)
    return tensors


def _plan(
    table: GGUFTable,
    config: ModelConfig,
    widths: tuple[int, ...],
    fields: Mapping[str, Any],
    tensors: Mapping[str, tuple[GGMLType, tuple[int, ...]]],
    parts: Mapping[str, Sequence[TensorName]],
    gguf_type: str | None,
    notes: Sequence[str],
) -> GGUFPlan:
    """The plan with what its types and architecture mean; of a mixture `config` is that of `as_dense`."""
    notes = [*notes]
    matrices = {name: kind for name, (kind, shape) in tensors.items() if len(shape) > 1 and not is_router(name)}
    if gguf_type == "Q8_0" and (others := [name for name, kind in matrices.items() if kind != GGMLType.Q8_0]):
        notes.append(f"{len(others)} of {len(matrices)} matrices are F16, as {BLOCK} does not divide their rows")
    rope = main_rope(config)
    if rope is not None and isinstance(rope.scaling, YarnRope) and is_own_yarn(rope.scaling):
        notes.append(
            "llama.cpp does not look at YaRN's betas and attention factor, which this model has of its own: it gets "
            "other logits there"
        )
    windows = [layer.window for layer in config.attention if layer.window is not None]
    if windows and not table.applies_windows:
        notes.append(
            f"llama.cpp does not apply the window of {min(windows)} tokens in its architecture {table.architecture!r}: "
            f"longer texts get other logits there"
        )
    fields = {**fields, **_type_fields(gguf_type, matrices)}
    return GGUFPlan(table, widths, fields, tensors, parts, table.divisors(config), tuple(notes))


def write_gguf(
    checkpoint: Checkpoint | MixtureCheckpoint,
    plan: GGUFPlan,
    path: pathlib.Path,
    fields: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a GGUF file, with a few tensors in memory.

    Args:
      checkpoint: the model.
      plan: made for it.
      path: the file to write.
      fields: further metadata, and what is to replace those of the plan.
      progress: called with what is being done, the bytes done and the bytes in all.

    Raises:
      RequestError: weights too large for their type.
      OperationError: weights that cannot be read; NaN or Inf.
      OSError: the disk refuses.
    """
    done, total = 0, plan.nbytes

    def written(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress("writing GGUF", done, total)

    write_file(path, {**plan.fields, **(fields or {})}, plan.tensors, _data(checkpoint, plan), written)


# -------------------------------------------------------------------------------------------------------- choices


def _type_of(dtype: np.dtype[Any], shape: Sequence[int], wanted: str | None) -> GGMLType:
    if len(shape) == 1:
        return GGMLType.F32
    kind = next(kind for kind, of in _DTYPES.items() if of == dtype) if wanted is None else TYPES[wanted]
    block, _ = GGML_QUANT_SIZES[kind]
    return GGMLType.F16 if shape[-1] % block else kind


def _type_fields(wanted: str | None, matrices: Mapping[str, GGMLType]) -> dict[str, Any]:
    """What says how most matrices are stored, for people and for llama.cpp's own lists."""
    kind = Counter(matrices.values()).most_common(1)[0][0] if wanted is None else TYPES[wanted]
    version = {"general.quantization_version": gguf.GGML_QUANT_VERSION} if kind == GGMLType.Q8_0 else {}
    return {"general.file_type": int(_FILE_TYPES[kind]), **version}


# ----------------------------------------------------------------------------------------------------------- data


def _data(checkpoint: Checkpoint | MixtureCheckpoint, plan: GGUFPlan) -> Iterator[NDArray[Any]]:
    """The bytes of all tensors in their order, in parts."""
    if isinstance(checkpoint, MixtureCheckpoint):
        of_part = functools.partial(_mixture_reads, checkpoint, plan)
    else:
        of_part = functools.partial(_reads, checkpoint, plan, {name.name: name for name in checkpoint.tensor_names})

    def reads() -> Iterator[tuple[str, Callable[[], NDArray[Any]]]]:
        for tensor in plan.tensors:
            if tensor in plan.vectors:
                yield tensor, functools.partial(np.array, plan.vectors[tensor], np.float32)
            for part in plan.parts.get(tensor, ()):
                for read in of_part(part):
                    yield tensor, read

    def load(of: tuple[str, Callable[[], NDArray[Any]]]) -> tuple[str, NDArray[Any]]:
        tensor, read = of
        return tensor, read()

    def convert(piece: tuple[str, NDArray[Any]]) -> NDArray[Any]:
        tensor, rows = piece
        return _convert(rows, plan.tensors[tensor][0], tensor, _offset(plan.table, tensor))

    def pieces() -> Iterator[tuple[str, NDArray[Any]]]:
        for tensor, values in read_ahead(load, reads()):
            step = max(1, _CHUNK // (values.shape[-1] if values.ndim > 1 else 1))
            for begin in range(0, values.shape[0], step):
                yield tensor, values[begin : begin + step]

    return read_ahead(convert, pieces())


def _mixture_reads(
    checkpoint: MixtureCheckpoint, plan: GGUFPlan, stored: TensorName
) -> Sequence[Callable[[], NDArray[Any]]]:
    """What reads a tensor of a mixture, such as a matrix of one of the experts that are stacked in the file."""

    def read() -> NDArray[Any]:
        values = checkpoint.values(stored.hf)
        is_permuted = stored.path[-1] in plan.table.permuted
        return _permuted(values, checkpoint.config.head_dim) if is_permuted else values

    return [read]


def _reads(
    checkpoint: Checkpoint, plan: GGUFPlan, names: Mapping[str, TensorName], stored: TensorName
) -> Sequence[Callable[[], NDArray[Any]]]:
    """What reads a parameter in the shape and dtype it has in the file, a few rows at a time where that is possible."""
    name = names[stored.name]
    is_as_stored = name.neuron_axis is None and name.path[-1] not in plan.table.permuted
    if is_as_stored and isinstance(checkpoint, StreamedCheckpoint):
        return checkpoint.pieces(name)
    return [functools.partial(_values, checkpoint, plan, name, stored)]


def _values(checkpoint: Checkpoint, plan: GGUFPlan, name: TensorName, stored: TensorName) -> NDArray[Any]:
    width = 0 if stored.neuron_axis is None else stored.shape[stored.neuron_axis]
    values = for_file(name, checkpoint.array(name), width)
    if name.path[-1] in plan.table.permuted:
        config = checkpoint.config
        values = _permuted(values, config.head_dim)
    return values


def _permuted(rows: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """Rows `[heads * H, ...]` of Q, K or a bias for a RoPE that pairs neighbours: i goes to 2i, i + H/2 to 2i + 1."""
    heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def _offset(table: GGUFTable, tensor: str) -> int:
    return table.norm_offset if tensor.endswith("norm.weight") else 0


def _convert(rows: NDArray[Any], kind: GGMLType, name: str, offset: int) -> NDArray[Any]:
    """Values as a tensor of this type holds them."""
    if offset:
        rows = rows.astype(np.float32) + np.float32(offset)
    if kind in _DTYPES:
        dtype = _DTYPES[kind]
        return np.ascontiguousarray(rows if rows.dtype == dtype else cast(rows, dtype, name))
    quantised: NDArray[Any] = gguf.quants.quantize(np.asarray(rows, np.float32), kind)
    return quantised
