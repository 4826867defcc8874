"""Memory of the host that weights are read into, and looks at what was read."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Where XLA's CPU client takes a buffer over instead of copying it.
_ALIGNMENT = 64


def aligned_empty(shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Memory that JAX takes over instead of copying it, uninitialised."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def all_finite(values: NDArray[Any]) -> bool:
    """Whether float32, float16 or bfloat16 values hold neither NaN nor Inf."""
    # On the bits: all exponent bits set is NaN or Inf. Several times as fast as isfinite.
    exponent = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[values.dtype.name]
    bits: NDArray[np.unsignedinteger[Any]] = values.view(np.uint32 if values.dtype.itemsize == 4 else np.uint16)
    return not bits.size or int(np.bitwise_and(bits, bits.dtype.type(exponent)).max()) != exponent
