"""Writes the GGUF file format: metadata, and tensors one after the other; it knows nothing of models."""

import concurrent.futures
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gguf
from gguf import GGMLQuantizationType as GGMLType
from gguf import GGUFValueType as ValueType
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray

_VERSION = 3
_ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT

# What Python values become. llama.cpp takes whole numbers that stand alone as unsigned, and those of arrays as signed.
_SCALARS: Mapping[type, tuple[ValueType, str]] = {
    bool: (ValueType.BOOL, "?"),
    int: (ValueType.UINT32, "I"),
    float: (ValueType.FLOAT32, "f"),
}
_ITEMS = {**_SCALARS, int: (ValueType.INT32, "i")}


def tensor_bytes(kind: GGMLType, shape: Sequence[int]) -> int:
    """The bytes of a tensor of this type and shape, whose rows are whole blocks."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return int(math.prod(shape) // block * block_bytes)


def write_file(
    path: pathlib.Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, tuple[GGMLType, tuple[int, ...]]],
    data: Iterable[NDArray[Any]],
    written: Callable[[int], None],
) -> None:
    """Writes a GGUF file.

    Args:
      path: the file to write.
      fields: the metadata by key: bool, int, float, str, or a list of one of these.
      tensors: type and shape (outermost axis first) by name, in the order in which they will lie.
      data: their bytes in this order, in parts of any size that end where tensors do; at most one is in memory.
      written: called with the bytes of each part.

    Raises:
      OSError: the disk refuses.
    """
    header = _header(fields, tensors)
    with path.open("wb") as stream, concurrent.futures.ThreadPoolExecutor(1) as background:
        stream.write(header + bytes(-len(header) % _ALIGNMENT))
        # The disk works while the next part is made ready, and has little left to do at the end.
        flushed = background.submit(os.fsync, stream.fileno())
        parts = iter(data)
        for name, tensor in tensors.items():
            left = tensor_bytes(*tensor)
            padding = -left % _ALIGNMENT
            while left:
                part = next(parts).reshape(-1).view("u1").data
                left -= len(part)
                assert left >= 0, name
                stream.write(part)
                written(len(part))
                if flushed.done():
                    flushed.result()
                    flushed = background.submit(os.fsync, stream.fileno())
            stream.write(bytes(padding))
        flushed.result()


def _header(fields: Mapping[str, Any], tensors: Mapping[str, tuple[GGMLType, tuple[int, ...]]]) -> bytes:
    header = bytearray(b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(fields)))
    for key, value in fields.items():
        header += _string(key) + _value(value)
    offset = 0
    for name, (kind, shape) in tensors.items():
        header += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", kind, offset)
        nbytes = tensor_bytes(kind, shape)
        offset += nbytes + -nbytes % _ALIGNMENT
    return bytes(header)


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", ValueType.STRING) + _string(value)
    if not isinstance(value, list):
        kind, code = _SCALARS[type(value)]
        return struct.pack(f"<I{code}", kind, value)
    if all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", ValueType.ARRAY, ValueType.STRING, len(value)) + b"".join(map(_string, value))
    kind, code = _ITEMS[type(value[0])]
    return struct.pack(f"<IIQ{len(value)}{code}", ValueType.ARRAY, kind, len(value), *value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
