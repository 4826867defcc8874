"""GGUF files as llama.cpp's converter writes them: keys, permuted rows, norms plus one."""

import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GGMLType


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: the pair (i, i + H/2) that Hugging Face rotates together stands at (2i, 2i + 1)."""
    out = np.empty_like(rows)
    H = rows.shape[0] // heads
    for head in range(heads):
        for i in range(H // 2):
            out[head * H + 2 * i] = rows[head * H + i]
            out[head * H + 2 * i + 1] = rows[head * H + i + H // 2]
    return out


def write_gguf(
    path: pathlib.Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray | tuple[np.ndarray, GGMLType]],
    architecture: str = "llama",
    split_after: int = 0,
) -> pathlib.Path:
    """Writes a GGUF file; a tensor given with a type is an array of the bytes of its blocks, row by row.

    With `split_after`, several files of at most so many tensors; their names end as those of gguf-split.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_after)
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
