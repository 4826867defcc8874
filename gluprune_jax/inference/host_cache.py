"""The KV cache of one CPU: in parts, which take memory when the first sequence reaches them.

A part that no sequence has reached is the same zeros in all layers. A layer is written part by part: a program of one
part serves all.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from numpy.typing import NDArray

from gluprune_jax.models.attention import KEY_TILE
from gluprune_jax.models.cache import LayerCache
from gluprune_jax.models.config import ModelConfig

# Sequences of up to so many tokens lie in parts (see `gluprune_jax.models.attention`): four, or fewer of so many
# tokens. In finer ones less would be read in vain, and the program would compile longer.
TOKENS_IN_PARTS, PART = 4096, 256

Part = tuple[Array, Array]  # keys and values of a layer


class HostCache:
    """Keys and values of sequences that are decoded together.

    Args:
      config: of the model.
      rows: how many sequences.
      size: tokens of each.
      dtype: of keys and values.
    """

    def __init__(self, config: ModelConfig, rows: int, size: int, dtype: DTypeLike) -> None:
        part = max(PART, size // 4)
        self._in_parts = size <= TOKENS_IN_PARTS and size % part == 0
        self._part = part if self._in_parts else size
        self._config, self._dtype, self.size = config, jnp.dtype(dtype), size
        self._layers: list[list[Part | None]] = [[None] * (size // self._part) for _ in range(config.num_hidden_layers)]
        self._unreached = self._empty_part(rows)

    @property
    def layers(self) -> tuple[LayerCache, ...]:
        """As `causal_attention` takes them. What is written next is donated, and no longer there."""
        filled = [[self._unreached if part is None else part for part in parts] for parts in self._layers]
        if not self._in_parts:
            return tuple(LayerCache(*part) for (part,) in filled)
        return tuple(LayerCache(*map(tuple, zip(*parts, strict=True))) for parts in filled)

    def fill(self, row: int, prompt: tuple[LayerCache, ...], length: int) -> None:
        """Copies `length` tokens of a prompt into a row.

        Args:
          row: which.
          prompt: layers `[1, K, S, H]`; S is at least the end of the last part that is reached.
          length: at least 1.
        """
        rows, reached = self._unreached[0].shape[0], -(-length // self._part)
        room = jax.tree.leaves(prompt)[0].shape[2]
        assert not self._in_parts or reached * self._part <= room, "a slice of the prompt would begin too early"
        for parts, own in zip(self._layers, prompt, strict=True):
            for i in range(reached):
                part = parts[i] or self._empty_part(rows)
                parts[i] = fill_part(part, own, np.int32(row), np.int32(i * self._part))

    def write(self, new: tuple[LayerCache, ...], first: NDArray[np.int32]) -> None:
        """Puts T new tokens of each row behind others, as far as there is room.

        Args:
          new: layers `[B, K, T, H]`.
          first: `[B]` int32, the place of the first of them in its row; `size` for rows that get none.
        """
        rows, last = len(first), first + jax.tree.leaves(new)[0].shape[2]
        for i in range(self.size // self._part):
            start = np.int32(i * self._part)
            if not ((first < start + self._part) & (last > start)).any():
                continue
            for parts, fresh in zip(self._layers, new, strict=True):
                parts[i] = write_part(parts[i] or self._empty_part(rows), fresh, first - start)

    def keep(self, rows: NDArray[np.intp], longest: int) -> None:
        """Leaves these rows, in this order, and no more than the first `longest` tokens of each."""
        self._unreached = self._empty_part(len(rows))
        for parts in self._layers:
            for i, part in enumerate(parts):
                parts[i] = None if part is None or i * self._part >= longest else take_rows(part, rows)

    def _empty_part(self, rows: int) -> Part:
        empty: Part = empty_part(self._config, rows, self._part, self._in_parts, self._dtype)
        return empty


def to_tiles(keys: Array) -> Array:
    """Keys `[B, K, S, H]` as those of a part are laid out, `[B, K, S / t, H, t]`."""
    B, K, S, H = keys.shape
    chex.assert_is_divisible(S, KEY_TILE)
    return keys.reshape(B, K, S // KEY_TILE, KEY_TILE, H).swapaxes(3, 4)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty_part(config: ModelConfig, rows: int, size: int, in_tiles: bool, dtype: DTypeLike) -> Part:
    """Zeros for keys, in tiles or not, and values."""
    k, v = jnp.zeros((2, rows, config.num_key_value_heads, size, config.head_dim), dtype)
    return (to_tiles(k) if in_tiles else k), v


@functools.partial(jax.jit, donate_argnums=0)
def fill_part(part: Part, prompt: LayerCache, row: ArrayLike, start: ArrayLike) -> Part:
    """Copies what a layer of a prompt, `[1, K, S, H]`, holds from `start` on into a row of a part, which is donated."""

    def put(slots: Array, own: Array) -> Array:
        size = slots.shape[2] * (KEY_TILE if slots.ndim == 5 else 1)
        own = jax.lax.dynamic_slice_in_dim(own, start, min(size, own.shape[2]), axis=2)
        own = to_tiles(own) if slots.ndim == 5 else own
        return jax.lax.dynamic_update_slice_in_dim(slots, own, row, axis=0)

    k, v = jax.tree.map(put, part, tuple(prompt))
    return k, v


@functools.partial(jax.jit, donate_argnums=0)
def write_part(part: Part, new: LayerCache, first: Array) -> Part:
    """Writes `new [B, K, T, H]` into a part, which is donated, from the slots `first [B]` on.

    What lies in front of the part or behind it is left out.
    """

    def put(slots: Array, fresh: Array) -> Array:
        at = first[:, None] + jnp.arange(fresh.shape[2])
        at = jnp.where(at < 0, np.iinfo(np.int32).max, at)  # negative indices would count from the end
        rows, fresh = jnp.arange(slots.shape[0])[:, None], fresh.swapaxes(1, 2).astype(slots.dtype)
        if slots.ndim == 5:
            return slots.at[rows, :, at // KEY_TILE, :, at % KEY_TILE].set(fresh, mode="drop")
        return slots.at[rows, :, at].set(fresh, mode="drop")

    k, v = jax.tree.map(put, part, tuple(new))
    return k, v


@jax.jit
def take_rows(part: Part, rows: ArrayLike) -> Part:
    """Some rows of a part."""
    k, v = jax.tree.map(lambda slots: slots[rows], part)
    return k, v
