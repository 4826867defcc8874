"""Decoding on one CPU, pass by pass: the host looks at the tokens of each pass before it starts the next one.

A program of one layer serves all that are alike (`gluprune_jax.inference.by_layers`), and to start one takes little
beside what a CPU computes in it. So the host may decide between any two passes:

- Drafts are checked where that pays (`gluprune_jax.inference.lookup`): a pass is of one token for each sequence, or of
  one and its draft.
- When no prompt waits any more and half of the rows are free, the others go on without these.

Which of the programs a pass takes depends on the tokens alone, so that a run gives the same bits every time.
"""

import functools
from collections.abc import Sequence
from typing import cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray

from gluprune_jax.inference.by_layers import Ends, bind_ends, ends_of, run_layers
from gluprune_jax.inference.decoding import Decoding
from gluprune_jax.inference.host_cache import HostCache
from gluprune_jax.inference.lookup import DRAFT, Lookup
from gluprune_jax.inference.sampling import NON_FINITE, Sampling, choose
from gluprune_jax.models.cache import KVCache
from gluprune_jax.models.config import ModelConfig

# Passes in which half of the rows are free before the others go on without these: about as long as it takes to compile
# the programs for fewer rows.
_PATIENCE = 16


class HostLoop:
    """Sequences that are decoded together.

    Args:
      decoding: the model, and how to decode.
      prompts: token ids of all prompts.
      looks_up: whether drafts are looked up.
    """

    def __init__(self, decoding: Decoding, prompts: Sequence[Sequence[int]], *, looks_up: bool) -> None:
        self._decoding, self._prompts = decoding, prompts
        self._ends = ends_of(decoding.params)
        slots = decoding.slots
        self._cache = HostCache(decoding.config, slots, decoding.size, decoding.dtype)
        self._slot_of_row = np.arange(slots)
        # Of each row: the tokens in its cache, the last one, which is not, how many may follow, and whose they are.
        self._lengths, self._token, self._remaining, self._numbers = np.zeros((4, slots), np.int32)
        self._lookup = Lookup(slots) if looks_up else None
        self._half_free = 0  # passes of late

    def admit(
        self, prompts: KVCache, hidden: Array, slots: NDArray[np.int32], numbers: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        """Puts a prompt into a slot, and chooses the token that follows it.

        Args:
          prompts: its keys and values.
          hidden: `[1, D]`, the hidden state of its last token.
          slots: `[1]`, the slot, which is free.
          numbers: `[1]`, the number of the prompt.

        Returns:
          The chosen token `[1]`.
        """
        row = int(slots[0])  # prompts come before `decode` gives up rows
        prompt = np.asarray(self._prompts[numbers[0]], np.int32)
        self._cache.fill(row, prompts.layers, len(prompt))
        length = np.array([len(prompt)], np.int32)
        chosen: NDArray[np.int32] = self._choose(hidden, numbers, length)[0]
        self._lengths[row], self._numbers[row] = len(prompt), numbers[0]
        self._remaining[row] = self._decoding.max_new_tokens
        if self._lookup:
            self._lookup.begin(row, prompt)
        self._add(row, chosen, None)
        return chosen

    def decode(self, *, is_last: bool) -> NDArray[np.int32]:
        """Runs the model once.

        Args:
          is_last: no prompt waits: slots that are free, or will be, are not filled again.

        Returns:
          The new tokens of each slot `[slots, n]`, at least one where a sequence runs; -1 fills up.
        """
        running = np.flatnonzero(self._remaining)
        if not len(running):
            return np.full((self._decoding.slots, 1), -1, np.int32)
        if is_last:
            self._give_up_rows(running)
            running = np.flatnonzero(self._remaining)
        rows = len(self._remaining)
        drafts = self._lookup.drafts(running) if self._lookup else {}
        width = 1
        if self._lookup and self._lookup.are_worth_it(drafts, len(running), rows):
            width += DRAFT
        tokens = np.zeros((rows, width), np.int32)
        tokens[:, 0] = self._token
        for row, draft in drafts.items():
            tokens[row, 1:] = draft[: width - 1]
        chosen = self._run(tokens)
        out = np.full((self._decoding.slots, width), -1, np.int32)
        for row in map(int, running):
            right = tokens[row, 1:] == chosen[row, :-1] if row in drafts else np.zeros(0, bool)
            new = chosen[row, : 1 + int(np.argmin(np.append(right, False)))]
            self._lengths[row] += len(new)
            new = self._add(row, new, drafts.get(row))
            out[self._slot_of_row[row], : len(new)] = new
        return out

    def release(self, slot: int) -> None:
        """Ends the sequence in a slot."""
        row = self._slot_of_row == slot
        self._lengths[row] = self._remaining[row] = 0

    def _run(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """Runs `tokens [rows, T]` behind what the rows hold. Returns what follows each, `[rows, T]`."""
        how = self._decoding
        lengths, numbers = self._lengths.copy(), self._numbers.copy()  # JAX may look at them later
        cache = KVCache(self._cache.layers, cast("Array", lengths))  # NumPy's array, which jit takes
        hidden, new = run_layers(how.config, how.params, cache, tokens, None, None, how.neuron_masks)
        self._cache.write(new, np.where(self._remaining > 0, lengths, self._cache.size).astype(np.int32))
        return self._choose(hidden, numbers, lengths + 1)

    def _choose(self, hidden: Array, numbers: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int32]:
        how = self._decoding
        return np.asarray(follow(how.config, self._ends, hidden, how.sampling, numbers, positions))

    def _add(self, row: int, new: NDArray[np.int32], draft: NDArray[np.int32] | None) -> NDArray[np.int32]:
        """Adds tokens to a sequence, up to its end, and returns those."""
        new = new[: self._remaining[row]]
        ends = np.flatnonzero((new == NON_FINITE) | np.isin(new, self._decoding.sampling.eos_ids))
        if len(ends):
            new = new[: ends[0] + 1]
        if self._lookup:
            self._lookup.add(row, new, draft)
        self._token[row] = new[-1]
        self._remaining[row] = 0 if len(ends) else self._remaining[row] - len(new)
        if not self._remaining[row]:
            self._lengths[row] = 0  # not attended to any more
        return new

    def _give_up_rows(self, running: NDArray[np.intp]) -> None:
        """Goes on with the fewest rows, a power of two, that the running sequences fit into; not at once."""
        rows = 1 << (len(running) - 1).bit_length()
        self._half_free = self._half_free + 1 if rows < len(self._remaining) else 0
        if self._half_free <= _PATIENCE:
            return
        self._half_free = 0
        kept = np.concatenate([running, np.flatnonzero(self._remaining == 0)])[:rows]
        self._cache.keep(kept, int(self._lengths.max()))
        self._slot_of_row, self._token = self._slot_of_row[kept], self._token[kept]
        self._lengths, self._remaining = self._lengths[kept], self._remaining[kept]
        self._numbers = self._numbers[kept]
        if self._lookup:
            self._lookup.keep(kept)


@functools.partial(jax.jit, static_argnums=0)
def follow(
    config: ModelConfig, ends: Ends, hidden: Array, sampling: Sampling, numbers: ArrayLike, positions: ArrayLike
) -> Array:
    """What follows each of T tokens of a row.

    Args:
      config: of the model.
      ends: its parameters that belong to no layer.
      hidden: `[B, T, D]` after the final norm; `[B, D]` of one token.
      sampling: how to choose.
      numbers: `[B]` int32, the prompt of each row.
      positions: `[B]` int32, where what follows the first token will stand.

    Returns:
      `[B, T]` int32; `NON_FINITE` where the logits are not finite.
    """
    B, D = *jnp.shape(numbers), hidden.shape[-1]
    T = hidden.size // (B * D)
    chex.assert_shape(positions, (B,))
    every = jnp.asarray(positions)[:, None] + jnp.arange(T, dtype=jnp.int32)
    logits = bind_ends(config, ends).logits(hidden.reshape(B * T, D))
    return choose(logits, sampling, jnp.repeat(jnp.asarray(numbers), T), every.reshape(-1)).reshape(B, T)
