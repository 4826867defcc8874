"""Rotary position embedding."""

import math

import chex
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from gluprune_jax.models.config import LinearRope, Llama3Rope, LongRope, Rope, YarnRope


def rope_frequencies(rope: Rope, head_dim: int) -> NDArray[np.float64]:
    """Rotary frequencies in radians per token, `[R/2]`, as float64: to be rounded once.

    At position 8,000 an error of 1e-7 in a frequency is one of 1e-3 in an angle. Of `LongRope` they are those of short
    rows (see `long_frequencies`).
    """
    R, s = rope.rotary_dim or head_dim, rope.scaling
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


def rotate(x: Array, positions: Array, rope: Rope) -> Array:
    """Applies rotary embeddings to `x [B, T, ..., H]` at `positions [B, T]`, pairing dimension i with i + R/2."""
    head_dim = x.shape[-1]
    R = rope.rotary_dim or head_dim
    chex.assert_equal_shape_prefix([x, positions], 2)
    frequencies = jnp.asarray(rope_frequencies(rope, head_dim), jnp.float32)
    if isinstance(rope.scaling, LongRope):
        # Of the whole row: transformers looks at the longest row of a batch instead.
        is_long = jnp.max(positions, axis=1)[:, None, None] >= rope.scaling.original_max_position_embeddings
        frequencies = jnp.where(is_long, jnp.asarray(long_frequencies(rope, head_dim), jnp.float32), frequencies)
    angles = positions[..., None].astype(jnp.float32) * frequencies  # [B, T, R/2]
    angles = angles.reshape(*positions.shape, *(1,) * (x.ndim - 3), -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if isinstance(rope.scaling, YarnRope | LongRope):
        cos, sin = cos * rope.scaling.attention_factor, sin * rope.scaling.attention_factor
    dtype = jnp.float32 if rope.in_float32 else x.dtype
    cos, sin, rotated = cos.astype(dtype), sin.astype(dtype), x[..., :R].astype(dtype)
    first, second = jnp.split(rotated, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return rotated if head_dim == R else jnp.concatenate([rotated, x[..., R:]], axis=-1)
