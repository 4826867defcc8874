"""The frequencies of rotary position embeddings, in NumPy: files are checked against them without JAX."""

import math

import numpy as np
from numpy.typing import NDArray

from gluprune_jax.models.config import LinearRope, Llama3Rope, LongRope, Rope, YarnRope


def rope_frequencies(rope: Rope, head_dim: int) -> NDArray[np.float64]:
    """Rotary frequencies in radians per token, `[R/2]`, as float64: to be rounded once.

    At position 8,000 an error of 1e-7 in a frequency is one of 1e-3 in an angle. Of `LongRope` they are those of short
    rows (see `long_frequencies`).
    """
    R, s = rope.rotary_dim or head_dim, rope.scaling
    frequencies = _plain(rope, head_dim)
    if isinstance(s, LinearRope):
        frequencies = frequencies / s.factor
    elif isinstance(s, Llama3Rope):
        # Wavelengths longer than `original / low_freq_factor` are stretched by `factor`, those shorter than
        # `original / high_freq_factor` are left, and those between are interpolated.
        rotations = s.original_max_position_embeddings * frequencies / (2 * math.pi)  # within the old window
        smooth = np.clip((rotations - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
        frequencies = np.asarray((1 - smooth) * frequencies / s.factor + smooth * frequencies)
    elif isinstance(s, YarnRope):
        low, high = (_dimension_of(count, rope.theta, R, s) for count in (s.beta_fast, s.beta_slow))
        if s.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, R - 1)
        stretched = np.clip((np.arange(R // 2) - low) / ((high - low) or 0.001), 0, 1)
        frequencies = stretched * frequencies / s.factor + (1 - stretched) * frequencies
    elif isinstance(s, LongRope):
        frequencies = frequencies / np.asarray(s.short_factor)
    return frequencies


def long_frequencies(rope: Rope, head_dim: int) -> NDArray[np.float64]:
    """The frequencies of `LongRope` in rows of more than the original length, `[R/2]` float64."""
    assert isinstance(rope.scaling, LongRope)
    return np.asarray(_plain(rope, head_dim) / np.asarray(rope.scaling.long_factor))


def _plain(rope: Rope, head_dim: int) -> NDArray[np.float64]:
    R = rope.rotary_dim or head_dim
    frequencies: NDArray[np.float64] = rope.theta ** -(np.arange(0, R, 2) / R)
    return frequencies


def _dimension_of(rotations: float, theta: float, R: int, s: YarnRope) -> float:
    """The dimension whose frequency makes so many rotations within the original window."""
    return R * math.log(s.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))
