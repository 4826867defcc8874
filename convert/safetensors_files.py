"""Reads safetensors folders and writes safetensors files, tensor by tensor.

The safetensors library maps whole files, so every page that is read stays in the resident set beside the copy made
of it. Reading byte ranges into buffers that JAX adopts keeps the peak at the size of the weights, and lets a
process read only what it needs. To write, the library wants all tensors of a file in memory at once; here it is a few.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gluprune_jax.errors import OperationError, RequestError

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

K = TypeVar("K")
T = TypeVar("T")

# Where XLA's CPU client takes a buffer over instead of copying it.
_ALIGNMENT = 64
_CHUNK = 1 << 23
_READ_AHEAD = 2
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `nbytes` bytes at `offset` of `file`, which was last written at `modified` (ns)."""

    file: Path
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    modified: int


def index_folder(folder: Path) -> dict[str, StoredTensor]:
    """Finds every tensor of `model.safetensors` or of the files that `model.safetensors.index.json` names.

    Raises:
      RequestError: no safetensors in the folder, or dtypes other than F32, F16 and BF16 (each tensor named).
      OperationError: missing, truncated or corrupt files, or an index that does not match them.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():  # first, as in transformers: an index may be left from an earlier save
        return read_header(single)
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({str(file) for file in weight_map.values()})
        except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
            raise OperationError(f"{index} is not a safetensors index: {error!r}") from error
        if outside := [file for file in files if Path(file).name != file]:
            raise OperationError(f"{index} names files outside its folder: {', '.join(outside)}")
        if missing := [file for file in files if not os.path.isfile(folder / file)]:
            raise OperationError(f"{index} names files that are not there: {', '.join(missing)}")
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            found = read_header(folder / file)
            if twice := sorted(tensors.keys() & found.keys()):
                raise OperationError(f"{folder / file} repeats tensors of another file: {', '.join(twice)}")
            tensors |= found
        if differing := sorted(tensors.keys() ^ weight_map.keys()):
            raise OperationError(f"{index} and its files do not hold the same tensors: {_list(differing)}")
        return tensors
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    others += sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    raise RequestError(
        f"{folder} has no model.safetensors and no model.safetensors.index.json"
        + (f" (it has {_list(others)}, which are not read)" if others else "")
    )


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, checked against its length.

    Raises:
      RequestError: dtypes other than F32, F16 and BF16 (each tensor named).
      OperationError: truncated or corrupt.
    """
    try:
        status = file.stat()
        size = status.st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise OperationError(f"{file} is truncated or not safetensors: {size:,} bytes cannot hold its header")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise OperationError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise OperationError(f"{file} is corrupt: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise OperationError(f"{file} is corrupt: its header is not a table of tensors")
    header.pop("__metadata__", None)

    tensors, refused, end = {}, [], 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if any(type(n) is not int or n < 0 for n in (start, stop, *shape)):
                raise ValueError(f"{name}: shape and offsets must be whole numbers")
            if start != end or stop < start:
                raise OperationError(f"{file} is corrupt: {name} lies at {start}-{stop}, expected from {end}")
            end = stop
            dtype = DTYPES.get(entry["dtype"])
            if dtype is None:
                refused.append(f"{name} ({entry['dtype']})")
                continue
            tensor = StoredTensor(file, name, dtype, shape, 8 + length + start, stop - start, status.st_mtime_ns)
            if tensor.nbytes != math.prod(shape) * dtype.itemsize:
                raise OperationError(
                    f"{file} is corrupt: {name} has {tensor.nbytes} bytes for shape {shape} of {dtype}"
                )
            tensors[name] = tensor
    except (KeyError, TypeError, ValueError) as error:
        raise OperationError(f"{file} is corrupt: bad entry in its header ({error!r})") from error
    if size != 8 + length + end:
        state = "truncated" if size < 8 + length + end else "corrupt"
        raise OperationError(f"{file} is {state}: it is {size:,} bytes long, its header describes {8 + length + end:,}")
    if refused:
        raise RequestError(f"{file} has tensors of dtypes other than {', '.join(DTYPES)}: {_list(refused)}")
    return tensors


class TensorReader:
    """Reads ranges of rows of one tensor; a context manager that holds its file open.

    Raises:
      OperationError: in the `with` block: the file cannot be read or has changed, or what was read has NaN or Inf.
    """

    def __init__(self, tensor: StoredTensor):
        self.tensor = tensor
        self._row_bytes = tensor.nbytes // max(1, tensor.shape[0]) if tensor.shape else tensor.nbytes

    def __enter__(self) -> "TensorReader":
        file = self.tensor.file
        try:
            self._stream = file.open("rb", buffering=0)
            if os.fstat(self._stream.fileno()).st_mtime_ns != self.tensor.modified:
                self._stream.close()
                raise OperationError(f"{file} has changed since it was opened; run again")
        except OSError as error:
            raise OperationError(f"cannot read {file}: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop`, in memory of their own."""
        part = aligned_empty((stop - start, *self.tensor.shape[1:]), self.tensor.dtype)
        self.read_into(part, start)
        return part

    def read_into(self, part: NDArray[Any], start: int = 0) -> None:
        """Fills a contiguous array of the tensor's dtype with whole rows from `start` on."""
        tensor, buffer = self.tensor, part.reshape(-1).view(np.uint8)
        offset = tensor.offset + start * self._row_bytes
        try:
            for begin in range(0, buffer.nbytes, _CHUNK):
                chunk = buffer[begin : begin + _CHUNK]
                done = 0
                while done < len(chunk):
                    got = os.preadv(self._stream.fileno(), [chunk[done:].data], offset + begin + done)
                    if not got:
                        raise OperationError(f"{tensor.file} became shorter while it was read")
                    done += got
                check_finite(chunk.view(tensor.dtype), f"{tensor.file}: tensor {tensor.name}")
        except OSError as error:
            raise OperationError(f"cannot read {tensor.file}: {error.strerror}") from error


def read_tensor(tensor: StoredTensor) -> NDArray[Any]:
    """Reads one tensor into memory that JAX can take over.

    Raises:
      OperationError: the file cannot be read, or the tensor has NaN or Inf in it.
    """
    values = aligned_empty(tensor.shape, tensor.dtype)
    with TensorReader(tensor) as reader:
        reader.read_into(values)
    return values


def hold_the_same(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit; a few of their rows are in memory at a time.

    Raises:
      OperationError: as `read_tensor`.
    """
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    count = a.shape[0] if a.shape else 1
    step = max(1, _CHUNK * count // max(1, a.nbytes))
    with TensorReader(a) as first, TensorReader(b) as second:
        for start in range(0, count, step):
            stop = min(start + step, count)
            if first.rows(start, stop).tobytes() != second.rows(start, stop).tobytes():
                return False
    return True


def aligned_empty(shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Memory that JAX takes over instead of copying it, uninitialised."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def write_tensors(
    file: Path,
    tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
    values: Callable[[str], NDArray[Any]],
    written: Callable[[int], None],
    *,
    ahead: bool = True,
) -> None:
    """Writes a safetensors file with a few tensors in memory: one is written while the next are made ready.

    Args:
      file: the file to write.
      tensors: dtype and shape by name.
      values: gives the tensor of a name; called once for each, in `write_order`.
      written: called with the bytes of each tensor when it is written.
      ahead: calls `values` on threads, for the next tensors while one is written; else on this one.

    Raises:
      OperationError: the disk refuses.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    names = write_order(tensors)
    # "pt" is what transformers 4 wants to read there; it says nothing about who wrote the file.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = tensors[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with file.open("wb") as stream, concurrent.futures.ThreadPoolExecutor(1) as background:
            stream.write(len(text).to_bytes(8, "little") + text)
            # The disk works while the next tensors are made ready, and has little left to do at the end.
            flushed = background.submit(os.fsync, stream.fileno())
            arrays = read_ahead(values, names) if ahead else map(values, names)
            for name, value in zip(names, arrays, strict=True):
                array = np.asarray(value, order="C")
                assert (array.dtype, array.shape) == tensors[name], name
                stream.write(array.reshape(-1).view(np.uint8).data)
                if flushed.done():
                    flushed.result()
                    flushed = background.submit(os.fsync, stream.fileno())
                written(array.nbytes)
            flushed.result()
    except OSError as error:
        raise OperationError(f"cannot write {file}: {error.strerror}") from error


def write_order(tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> list[str]:
    """The names of tensors in the order in which they stand in a file."""
    # Wide elements first: each tensor then starts at a multiple of its element size, which zero-copy readers need.
    return sorted(tensors, key=lambda name: -tensors[name][0].itemsize)


def read_ahead(function: Callable[[K], T], names: Iterable[K]) -> Iterator[T]:
    """Maps in order, working on the next two values while one is used, so that reading and computing overlap."""
    pending: list[concurrent.futures.Future[T]] = []
    with concurrent.futures.ThreadPoolExecutor(_READ_AHEAD) as pool:
        try:
            for name in names:
                pending.append(pool.submit(function, name))
                if len(pending) > _READ_AHEAD:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()


def check_finite(values: NDArray[Any], where: str) -> None:
    """Refuses NaN and Inf.

    Raises:
      OperationError: there are some; `where` says in what.
    """
    # On the bits: all exponent bits set is NaN or Inf. Six times as fast as isfinite for bfloat16.
    exponent = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[values.dtype.name]
    bits: NDArray[np.unsignedinteger[Any]] = values.view(np.uint32 if values.dtype.itemsize == 4 else np.uint16)
    if bits.size and int(np.bitwise_and(bits, bits.dtype.type(exponent)).max()) == exponent:
        raise OperationError(f"{where} has NaN or Inf weights")


def layout(tensors: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Groups tensors, in order, into files of at most `max_shard_bytes` (or one tensor, if that is larger)."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, nbytes in tensors.items():
        if files[-1] and filled + nbytes > max_shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += nbytes
    return files


def _list(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
