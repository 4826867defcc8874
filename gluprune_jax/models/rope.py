"""Rotary position embedding."""

import chex
import jax.numpy as jnp
from jax import Array

from gluprune_jax.models.config import LongRope, Rope, YarnRope
from gluprune_jax.models.frequencies import long_frequencies, rope_frequencies


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
