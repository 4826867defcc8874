"""Reads safetensors folders and writes safetensors files, tensor by tensor.

The safetensors library maps whole files, so every page that is read stays in the resident set beside the copy made
of it. Reading byte ranges into buffers that JAX adopts keeps the peak at the size of the weights, and lets a
process read only what it needs. To write, the library wants all tensors of a file in memory at once; here it is a few.
"""

import collections
import concurrent.futures
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from convert.buffers import aligned_empty, all_finite
from gluprune_jax.errors import OperationError, RequestError, listed, shortened

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


K = TypeVar("K")


T = TypeVar("T")


_CHUNK = 1 << 23


_READ_AHEAD = 2


_MAX_HEADER = 100_000_000  # the format's own limit


_MAX_OFFSET = 2**63 - 1


INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `nbytes` bytes at `offset` of `file`, which was last written at `modified` (ns).

    `name` and `code` are its name and type as the file spells them. Only a tensor that `check_dtypes` has let
    pass has a `dtype`.
    """

    file: Path
    name: str
    code: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    modified: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its elements."""
        return DTYPES[self.code]

    @property
    def where(self) -> str:
        """File and name, as messages say them."""
        return f"{self.file}: tensor {listed([self.name])}"

    def read(self) -> NDArray[Any]:
        """All of it; see `read_tensor`."""
        return read_tensor(self)


def index_folder(folder: Path) -> dict[str, StoredTensor]:
    """Finds every tensor of `model.safetensors` or of the files that `model.safetensors.index.json` names.

    Of the index only the names of the files are used, as in transformers 5: what they hold says where a tensor is.

    Raises:
      RequestError: no safetensors in the folder.
      OperationError: missing, truncated or corrupt files, or a tensor that lies in two of them and differs.
    """
    single, index = folder / "model.safetensors", folder / INDEX
    if single.exists():  # first, as in transformers: an index may be left from an earlier save
        return read_header(single)
    if not index.exists():
        raise _no_weights(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in _files_of(index):
        found = read_header(folder / file)
        twice = sorted(tensors.keys() & found.keys())
        check_dtypes(found[name] for name in twice)
        if differing := [name for name in twice if not hold_the_same(tensors[name], found[name])]:
            raise OperationError(f"{folder / file} has other contents than an earlier file for {listed(differing)}")
        tensors |= found
    return tensors


def indexed_names(folder: Path) -> set[str] | None:
    """The tensors that the index of a folder lists; None where the folder is read without one.

    Raises:
      OperationError: it is damaged.
    """
    index = folder / INDEX
    return None if (folder / "model.safetensors").exists() else set(_weight_map(index))


def _weight_map(index: Path) -> Mapping[str, Any]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except OSError as error:
        raise OperationError(f"cannot read {index}: {error.strerror}") from error
    except UnicodeDecodeError as error:  # its repr is the whole file
        raise OperationError(f"{index} is not a safetensors index: byte {error.start} is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise OperationError(f"{index} is not a safetensors index: it is not JSON ({error})") from error
    except (KeyError, TypeError) as error:
        raise OperationError(f"{index} is not a safetensors index: it has no weight_map") from error
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise OperationError(
            f"{index} is not a safetensors index: its weight_map is {shortened(weight_map)} instead of a table"
        )
    return weight_map


def _files_of(index: Path) -> list[str]:
    """The files that an index names, which lie in its folder or below."""
    weight_map = _weight_map(index)
    if wrong := [name for name, file in weight_map.items() if not isinstance(file, str) or not file]:
        raise OperationError(f"{index} names no file for {listed(wrong)}")
    files = sorted(set(weight_map.values()))
    outside = [file for file in files if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts]
    if outside:
        raise OperationError(f"{index} names files outside its folder: {listed(outside)}")
    if missing := [file for file in files if "\0" in file or not os.path.isfile(index.parent / file)]:
        raise OperationError(f"{index} names files that are not there: {listed(missing)}")
    return files


def _no_weights(folder: Path) -> RequestError:
    """The refusal of a folder without safetensors, which says what is there instead and what would do."""
    names = sorted(path.name for path in folder.glob("*"))
    others = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth"))]
    remedy = ""
    if any(name.startswith("adapter_model.") for name in others):
        remedy = "; merge the adapter into its model first, with merge_and_unload of peft, and save that"
    elif any(name.startswith("pytorch_model") for name in others):
        remedy = "; pickles are never read: load the model with transformers and save it with save_pretrained"
    return RequestError(
        f"{folder} has no model.safetensors and no {INDEX}"
        + (f" (it has {listed(others)}, which are not read)" if others else "")
        + remedy
    )


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, checked against its length.

    Raises:
      OperationError: truncated or corrupt.
    """
    try:
        status = file.stat()
        size = status.st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise OperationError(f"{file} is truncated or not safetensors: {size:,} bytes cannot hold its header")
            text = stream.read(length)
    except OSError as error:
        raise OperationError(f"cannot read {file}: {error.strerror}") from error
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_repetition)
    except UnicodeDecodeError as error:
        raise OperationError(f"{file} is corrupt: its header is not UTF-8 from byte {error.start} on") from error
    except _RepeatedKeyError as error:
        raise OperationError(f"{file} is corrupt: its header has {error} twice") from error
    except (ValueError, RecursionError) as error:
        raise OperationError(f"{file} is corrupt: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise OperationError(f"{file} is corrupt: its header is not a table of tensors")
    header.pop("__metadata__", None)

    tensors, end = {}, 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            code, shape = entry["dtype"], tuple(entry["shape"])
            if not isinstance(code, str) or any(type(n) is not int or n < 0 for n in (start, stop, *shape)):
                raise ValueError(f"{listed([name])}: the dtype must be text, shape and offsets whole numbers")
            if stop > _MAX_OFFSET:
                raise ValueError(f"{listed([name])}: offsets must be whole numbers up to {_MAX_OFFSET}")
            if start != end or stop < start:
                raise OperationError(
                    f"{file} is corrupt: {listed([name])} lies at {shortened(start)}-{stop}, expected from {end}"
                )
            end = stop
            tensor = StoredTensor(file, name, code, shape, 8 + length + start, stop - start, status.st_mtime_ns)
            if code in DTYPES and tensor.nbytes != math.prod(shape) * tensor.dtype.itemsize:
                raise OperationError(
                    f"{file} is corrupt: {listed([name])} has {tensor.nbytes} bytes for shape {shortened(shape)} of "
                    f"{tensor.dtype}"
                )
            tensors[name] = tensor
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise OperationError(f"{file} is corrupt: bad entry in its header ({error!r})") from error
    if size != 8 + length + end:
        state = "truncated" if size < 8 + length + end else "corrupt"
        raise OperationError(f"{file} is {state}: it is {size:,} bytes long, its header describes {8 + length + end:,}")
    return tensors


class _RepeatedKeyError(Exception):
    """A JSON object has a key twice; the message is the key."""


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        name, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise _RepeatedKeyError(listed([name]))
    return table


def check_dtypes(tensors: Iterable[StoredTensor]) -> None:
    """Refuses what is neither F32 nor F16 nor BF16.

    Raises:
      RequestError: there is some.
    """
    if refused := [tensor for tensor in tensors if tensor.code not in DTYPES]:
        raise RequestError(
            f"{refused[0].file} has tensors of dtypes other than {', '.join(DTYPES)}: "
            + listed([f"{tensor.name} ({tensor.code})" for tensor in refused])
        )


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
                check_finite(chunk.view(tensor.dtype), tensor.where)
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


def row_ranges(tensor: StoredTensor) -> list[tuple[int, int]]:
    """The rows of a tensor in ranges, each of a few megabytes or one row."""
    count = tensor.shape[0] if tensor.shape else 1
    step = max(1, _CHUNK * count // max(1, tensor.nbytes))
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def hold_the_same(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit; a few of their rows are in memory at a time.

    Raises:
      OperationError: as `read_tensor`.
    """
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with TensorReader(a) as first, TensorReader(b) as second:
        for start, stop in row_ranges(a):
            if first.rows(start, stop).tobytes() != second.rows(start, stop).tobytes():
                return False
    return True


# Gives a part of a tensor's rows; called once.
Piece = Callable[[], NDArray[Any]]


def write_tensors(
    file: Path,
    tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
    pieces: Callable[[str], Sequence[Piece]],
    written: Callable[[int], None],
    *,
    ahead: bool = True,
) -> None:
    """Writes a safetensors file with a few pieces of tensors in memory: one is written while the next are made ready.

    Args:
      file: the file to write.
      tensors: dtype and shape by name.
      pieces: gives what makes the tensor of a name, rows after rows; called once for each, in `write_order`.
      written: called with the bytes of each piece when it is written.
      ahead: makes pieces on threads, the next ones while one is written; else on this one.

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
    wanted = ((name, piece) for name in names for piece in pieces(name))

    def make(of: tuple[str, Piece]) -> tuple[str, NDArray[Any]]:
        name, piece = of
        return name, np.asarray(piece(), order="C")

    left = {name: (math.prod(shape) * dtype.itemsize) for name, (dtype, shape) in tensors.items()}
    try:
        with file.open("wb") as stream, concurrent.futures.ThreadPoolExecutor(1) as background:
            stream.write(len(text).to_bytes(8, "little") + text)
            # The disk works while the next tensors are made ready, and has little left to do at the end.
            flushed = background.submit(os.fsync, stream.fileno())
            for name, array in read_ahead(make, wanted) if ahead else map(make, wanted):
                left[name] -= array.nbytes
                assert array.dtype == tensors[name][0], name
                assert left[name] >= 0, name
                stream.write(array.reshape(-1).view(np.uint8).data)
                if flushed.done():
                    flushed.result()
                    flushed = background.submit(os.fsync, stream.fileno())
                written(array.nbytes)
            flushed.result()
    except OSError as error:
        raise OperationError(f"cannot write {file}: {error.strerror}") from error
    assert not any(left.values())


def write_order(tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> list[str]:
    """The names of tensors in the order in which they stand in a file."""
    # Wide elements first: each tensor then starts at a multiple of its element size, which zero-copy readers need.
    return sorted(tensors, key=lambda name: -tensors[name][0].itemsize)


def read_ahead(function: Callable[[K], T], names: Iterable[K], count: int = _READ_AHEAD) -> Iterator[T]:
    """Maps in order, working on the next `count` values while one is used, so that reading and computing overlap."""
    pending: list[concurrent.futures.Future[T]] = []
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        try:
            for name in names:
                pending.append(pool.submit(function, name))
                if len(pending) > count:
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
    if not all_finite(values):
        raise OperationError(f"{where} has NaN or Inf weights")


def beyond_the_neurons(stored: StoredTensor, width: int) -> OperationError:
    """The refusal of weights where a file should only have padding."""
    return OperationError(
        f"{stored.where} has weights beyond neuron {width - 1}, where config.json "
        f"(gluprune.intermediate_sizes) says that there is only padding"
    )


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
