"""Extremes of weights that lie in the host's memory, in NumPy: what is pruned from file to file needs no device."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 18  # bytes: rows that are looked at together stay in a core's cache

# Of 16-bit floats the bits of +Inf: what lies above them is NaN.
_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}


def host_extents(weights: NDArray[Any], axis: int) -> tuple[bool, NDArray[np.float32]]:
    """Whether a matrix of an MLP is finite, and the peak-to-peak magnitudes of its neurons along `axis`, `[F]` float32.

    The same bits as `device_scores.matrix_extents` gives. Where it is not finite, the magnitudes mean nothing.

    Args:
      weights: `[F, D]` or `[D, F]`, float32, float16 or bfloat16.
      axis: the one along D.
    """
    assert weights.ndim == 2, f"Assertion of one matrix failed: it has shape {weights.shape}"
    infinity = _INFINITY.get(weights.dtype.name)
    # NumPy compares 16-bit floats one by one, and whole numbers many at a time: their bits, in the order of values.
    values = weights if infinity is None else weights.view(np.int16)
    rows = max(1, _BLOCK // max(1, weights.itemsize * weights.shape[1]))
    parts = []
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(values), rows):
            block = values[start : start + rows] if infinity is None else _in_order(values[start : start + rows])
            parts.append((block.max(axis), block.min(axis)))
        if axis == 1:
            highest, lowest = (np.concatenate(part) for part in zip(*parts, strict=True))
        else:
            highest, lowest = np.maximum.reduce([a for a, _ in parts]), np.minimum.reduce([b for _, b in parts])
        if infinity is None:
            finite = bool(np.isfinite(highest).all() and np.isfinite(lowest).all())
        else:
            finite = bool(highest.max() < infinity and lowest.min() >= -infinity)
            highest, lowest = (_in_order(keys).view(weights.dtype) for keys in (highest, lowest))
        return finite, highest.astype(np.float32) + np.abs(lowest.astype(np.float32))


def _in_order(bits: NDArray[np.int16]) -> NDArray[np.int16]:
    """The bits of 16-bit floats as numbers of the same order; of such numbers the bits. +0 and -0 differ by one."""
    # The sign bit makes a whole number smaller, but those behind it larger: they are turned round.
    return bits ^ (bits >> 15 & np.int16(0x7FFF))
