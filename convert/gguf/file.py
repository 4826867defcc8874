"""Reads the GGUF file format: metadata, where each tensor lies, and ranges of rows; it knows nothing of models.

A file is a header, then the tensors. The header counts itself (of keys, of tensors, of the items of an array, of the
bytes of a string), so every count is held against the length of the file before anything is allocated. The tensors must
lie where llama.cpp's own loader wants them: in the order of the header, each at the next multiple of the alignment, up
to the end of the file. The reader of the `gguf` package checks none of this.
"""

import dataclasses
import functools
import io
import math
import os
import pathlib
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from gguf import GGUFValueType as ValueType
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray

from convert.buffers import aligned_empty
from gluprune_jax.errors import GlupruneError, OperationError, RequestError, shortened

_NUMBERS: Mapping[int, str] = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "B",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
_VERSIONS = (2, 3)
_MAX_HEADER = 1 << 27  # bytes; vocabulary and merges of 256,000 tokens take 10 MB
_MAX_ITEMS = 1 << 22  # of one array: what a damaged count may cost
_MAX_AXES = 4  # ggml's own limit
_CHUNK = 1 << 24  # values in memory at a time
_MAX_PARTS = 99_999  # files that a model can be split into: five digits of their names
_PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies.

    Attributes:
      name: its name.
      kind: how its values are stored.
      shape: outermost axis first (the file says it the other way round).
      file: the file, which was last written at `modified` (ns).
      offset: of its first byte in the file.
      nbytes: its bytes in the file.
    """

    name: str
    kind: GGMLType
    shape: tuple[int, ...]
    file: pathlib.Path
    modified: int
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """The number of rows; a row is what lies along the last axis."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """The bytes of a row in the file: whole blocks."""
        return self.nbytes // self.rows

    def chunks(self) -> list[tuple[int, int]]:
        """The rows in ranges, `(begin, end)`, of which one at a time is in memory."""
        step = max(1, _CHUNK // self.shape[-1])
        return [(begin, min(begin + step, self.rows)) for begin in range(0, self.rows, step)]

    def part(self, begin: int, end: int) -> "GGUFTensor":
        """Rows `begin` to `end` of a tensor of two axes, as one of the same name."""
        return dataclasses.replace(
            self,
            shape=(end - begin, *self.shape[1:]),
            offset=self.offset + begin * self.row_bytes,
            nbytes=(end - begin) * self.row_bytes,
        )


@dataclasses.dataclass(frozen=True)
class _Info:
    """What the header says of a tensor: innermost axis first, the number of its type, the offset in the data."""

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """The header of a file.

    Attributes:
      fields: the metadata by key, as Python values: bool, int, float, str, or a list of one of these.
      infos: what it says of each tensor; `place_tensors` checks it.
      end: the bytes of the header.
      size: the bytes of the file.
      modified: when the file was last written, in ns.
    """

    fields: Mapping[str, Any]
    infos: Sequence[_Info]
    end: int
    size: int
    modified: int


def damaged(reason: str) -> OperationError:
    """The error for a file that is not what the format says."""
    return OperationError(f"this is not a readable GGUF file, or it is cut short ({reason})")


@functools.cache
def readable_types() -> tuple[GGMLType, ...]:
    """The tensor types that the installed `gguf` package dequantises, F32, F16 and BF16 among them."""
    kinds = []
    for kind, (_, nbytes) in GGML_QUANT_SIZES.items():
        try:
            gguf.quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)
        except NotImplementedError:
            continue
        kinds.append(kind)
    return tuple(kinds)


# --------------------------------------------------------------------------------------------------- header


def read_header(path: pathlib.Path) -> GGUFHeader:
    """Reads the header of a GGUF file.

    Raises:
      RequestError: there is no such file, it is big-endian, or of a version that is not read.
      OperationError: the file cannot be read, or its header contradicts itself or the length of the file.
    """
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            return _read_header(_Cursor(stream, status.st_size), status.st_mtime_ns)
    except FileNotFoundError as error:
        raise RequestError("there is no such file") from error
    except OSError as error:
        raise damaged(error.strerror or "it cannot be read") from error


def _read_header(cursor: "_Cursor", modified: int) -> GGUFHeader:
    if cursor.bytes(4) != b"GGUF":
        raise damaged("it does not begin with 'GGUF'")
    version = cursor.number("I")
    if version and not version & 0xFFFF:
        raise RequestError("the file is big-endian; accepted: little-endian GGUF files")
    if version not in _VERSIONS:
        raise damaged(f"its version is {version}; accepted: {' and '.join(map(str, _VERSIONS))}")
    tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
    cursor.expect(13 * field_count, f"{field_count} metadata keys")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.string("a metadata key")
        if not (key and key.isascii() and key.isprintable()):
            raise damaged(f"a metadata key is {shortened(key)}; it must be printable ASCII")
        if key in fields:
            raise damaged(f"the metadata key {printable(key)} is there twice")
        fields[key] = _value(cursor, key)

    cursor.expect(24 * tensor_count, f"{tensor_count} tensors")
    infos: dict[str, _Info] = {}
    for _ in range(tensor_count):
        name = cursor.string("the name of a tensor")
        if name in infos:
            raise damaged(f"the tensor {printable(name)} is there twice")
        axes = cursor.number("I")
        if not 1 <= axes <= _MAX_AXES:
            raise damaged(f"{printable(name)} has {axes} axes; accepted: 1 to {_MAX_AXES}")
        dims = tuple(cursor.number("Q") for _ in range(axes))
        infos[name] = _Info(name, dims, cursor.number("I"), cursor.number("Q"))
    return GGUFHeader(fields, tuple(infos.values()), cursor.position, cursor.size, modified)


class _Cursor:
    """Reads a header from its beginning, within the length of the file."""

    def __init__(self, stream: BinaryIO, size: int):
        self.position = 0
        self.size = size
        self._stream = stream

    def expect(self, count: int, what: str) -> None:
        """Refuses to go on if fewer bytes are left than `what` needs."""
        end = self.position + count
        if end > self.size:
            raise damaged(f"it has {self.size} bytes, and its own header asks for {end}, with {what}")
        if end > _MAX_HEADER:
            raise damaged(f"its header asks for {end} bytes, with {what}; accepted: at most {_MAX_HEADER}")

    def bytes(self, count: int, what: str = "the next value") -> bytes:
        self.expect(count, what)
        data = self._stream.read(count)
        if len(data) != count:
            raise damaged("it became shorter while it was read")
        self.position += count
        return data

    def number(self, code: str) -> Any:
        (value,) = struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))
        return value

    def string(self, what: str) -> str:
        data = self.bytes(self.number("Q"), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise damaged(f"{what} is not UTF-8: {shortened(data)}") from error


def _value(cursor: _Cursor, key: str) -> Any:
    kind = cursor.number("I")
    if kind != ValueType.ARRAY:
        return _values(cursor, key, kind, 1)[0]
    kind, count = cursor.number("I"), cursor.number("Q")
    if count > _MAX_ITEMS:
        raise damaged(f"{printable(key)} is an array of {count} items; accepted: at most {_MAX_ITEMS}")
    return _values(cursor, key, kind, count)


def _values(cursor: _Cursor, key: str, kind: int, count: int) -> list[Any]:
    what = f"{count} items of {printable(key)}" if count != 1 else printable(key)
    if kind == ValueType.STRING:
        cursor.expect(8 * count, what)
        return [cursor.string(printable(key)) for _ in range(count)]
    if kind not in _NUMBERS:
        raise damaged(f"{printable(key)} holds values of type {kind}, which is none of the format's")
    code = "<" + _NUMBERS[kind]
    values: list[Any] = np.frombuffer(cursor.bytes(count * struct.calcsize(code), what), code).tolist()
    if kind != ValueType.BOOL:
        return values
    if any(value > 1 for value in values):
        raise damaged(f"{printable(key)} holds {max(values)}; a bool is 0 or 1")
    return [bool(value) for value in values]


# -------------------------------------------------------------------------------------------------- tensors


def all_files(path: pathlib.Path, fields: Mapping[str, Any]) -> list[pathlib.Path]:
    """The files of a model: this one, or all that gguf-split has made of it.

    Args:
      path: the file; of several the first, which holds the metadata.
      fields: its metadata.

    Raises:
      RequestError: it is one of several, but not the first, or is called otherwise.
    """
    count = fields.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= _MAX_PARTS:
        raise RequestError(
            f"split.count is {shortened(count)}; accepted: a model in one file, or the number of its files"
        )
    if count <= 1:
        return [path]
    name = _PART.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise RequestError(
            f"split.count is {count}, and the file is not called NAME-00001-of-{count:05}.gguf, by which the others "
            f"are found; give it the name that it had, or merge them (gguf-split --merge)"
        )
    names = [f"{name['name']}-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    if path.name != names[0] or fields.get("split.no", 0) != 0:
        raise RequestError(f"this is not the first of {count} files; give {names[0]}")
    return [path.with_name(name) for name in names]


def place_all_tensors(paths: Sequence[pathlib.Path], header: GGUFHeader) -> dict[str, GGUFTensor]:
    """Finds every tensor of a model, by name, in all its files.

    Args:
      paths: as of `all_files`.
      header: of the first one.

    Raises:
      RequestError: as `place_tensors`, or a file is missing.
      OperationError: as `place_tensors`, or the files are not parts of one model.
    """
    tensors = place_tensors(paths[0], header)
    for i, path in enumerate(paths[1:], start=1):
        try:
            further = _place_part(path, i, len(paths))
            if twice := sorted(tensors.keys() & further.keys()):
                raise damaged(f"the tensor {printable(twice[0])} is in an earlier file too")
        except GlupruneError as error:
            raise type(error)(f"file {i + 1} of {len(paths)}, {path.name}: {error}") from error
        tensors |= further
    stated = header.fields.get("split.tensors.count", len(tensors))
    if len(paths) > 1 and stated != len(tensors):
        raise damaged(f"split.tensors.count is {shortened(stated)}, and its {len(paths)} files hold {len(tensors)}")
    return tensors


def _place_part(path: pathlib.Path, number: int, count: int) -> dict[str, GGUFTensor]:
    header = read_header(path)
    for key, expected in (("split.no", number), ("split.count", count)):
        if header.fields.get(key) != expected:
            raise damaged(f"{key} is {shortened(header.fields.get(key))}, expected {expected}")
    return place_tensors(path, header)


def place_tensors(path: pathlib.Path, header: GGUFHeader) -> dict[str, GGUFTensor]:
    """Finds every tensor of a file, by name, in the order of the header.

    Raises:
      RequestError: tensors are of types that are not read.
      OperationError: they do not lie one after the other, or the file does not end where they do.
    """
    alignment = header.fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise damaged(f"general.alignment is {shortened(alignment)}; it must be a power of two")
    _check_types(header.infos)
    start = _padded(header.end, alignment)
    tensors: dict[str, GGUFTensor] = {}
    offset = end = 0  # in the data: where the next tensor starts, and where the last one ended
    for info in header.infos:
        kind = GGMLType(info.kind)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        shape = info.dims[::-1]
        name = printable(info.name)
        if min(shape) < 1 or shape[-1] % block:
            raise damaged(f"{name} has shape {shape}; the rows of {kind.name} are blocks of {block}")
        if info.offset != offset:
            raise damaged(f"{name} lies at {info.offset} of the data, expected {offset}")
        end = offset + math.prod(shape) // block * block_bytes
        if start + end > header.size:
            raise damaged(f"it has {header.size} bytes, and its own header asks for {start + end}, with {name}")
        tensors[info.name] = GGUFTensor(
            info.name, kind, shape, path, header.modified, offset=start + offset, nbytes=end - offset
        )
        offset = _padded(end, alignment)
    # The last tensor may be padded like the others, or not.
    if tensors and header.size > start + offset:
        raise damaged(f"it has {header.size} bytes, and its own header describes {start + offset}")
    return tensors


def _check_types(infos: Sequence[_Info]) -> None:
    accepted = readable_types()
    refused = [info for info in infos if info.kind not in accepted]
    if refused:
        kinds = [GGMLType(info.kind).name if info.kind in list(GGMLType) else f"type {info.kind}" for info in refused]
        stored = [f"{printable(info.name)} is stored as {kind}" for info, kind in zip(refused, kinds, strict=True)]
        raise RequestError(f"{some(stored)}; accepted: {', '.join(kind.name for kind in accepted)}")


def _padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


def read_rows(tensor: GGUFTensor, begin: int, end: int) -> NDArray[np.uint8]:
    """The bytes of rows `begin` to `end`, `[end - begin, row_bytes]`, in memory of their own.

    Raises:
      OperationError: the file cannot be read, has changed or became shorter.
    """
    rows = aligned_empty((end - begin, tensor.row_bytes), np.dtype(np.uint8))
    try:
        with tensor.file.open("rb", buffering=0) as stream:
            if os.fstat(stream.fileno()).st_mtime_ns != tensor.modified:
                raise OperationError("the file has changed since it was opened; run again")
            stream.seek(tensor.offset + begin * tensor.row_bytes)
            _fill(stream, rows.reshape(-1))
    except OSError as error:
        raise OperationError(f"cannot read it: {error.strerror}") from error
    return rows


def _fill(stream: io.FileIO, buffer: NDArray[np.uint8]) -> None:
    done = 0
    while done < buffer.size:
        got = stream.readinto(buffer[done:].data)
        if not got:
            raise OperationError("the file became shorter while it was read")
        done += got


# ------------------------------------------------------------------------------------------------- messages


def printable(name: str) -> str:
    """A name out of the file, as an error message shows it."""
    return name if name.isprintable() and 0 < len(name) <= 64 else shortened(name)


def some(items: Sequence[str], most: int = 2) -> str:
    """The first items of a list, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
