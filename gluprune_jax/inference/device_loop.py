"""Decoding in compiled loops: on accelerators and meshes, where what the host does between two steps would take time.

A call decodes `STEPS_PER_CALL` tokens of each sequence. On a mesh each replica has its own slots, and all are decoded
together.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from numpy.typing import NDArray

from gluprune_jax.inference.decoding import Decoding
from gluprune_jax.inference.sampling import NON_FINITE, Sampling, choose
from gluprune_jax.models.attention import Slots
from gluprune_jax.models.cache import KVCache, LayerCache, per_cache_row, write_layer
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import bind
from gluprune_jax.parallel.sharding import constrain

# Tokens decoded by one call into compiled code; between calls the host fills slots and looks for stop strings.
STEPS_PER_CALL = 16


class DeviceLoop:
    """Sequences that are decoded together.

    Args:
      decoding: the model, and how to decode.
    """

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._state = empty_state(decoding.config, decoding.slots, decoding.size, decoding.dtype)

    def admit(
        self, prompts: KVCache, hidden: Array, slots: NDArray[np.int32], numbers: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        """Puts prompts into slots: see `admit`. Returns the chosen tokens `[R]`."""
        how, limit = self._decoding, np.int32(self._decoding.max_new_tokens)
        self._state, token = admit(
            how.config, how.params, self._state, prompts, hidden, slots, numbers, limit, how.sampling
        )
        return np.asarray(token)

    def decode(self, *, is_last: bool) -> NDArray[np.int32]:
        """The next `STEPS_PER_CALL` tokens of each slot, fewer where a sequence ends; -1 fills up."""
        del is_last  # all slots are computed anyway
        how = self._decoding
        self._state, recent, out = decode(how.config, how.params, self._state, how.sampling, how.neuron_masks)
        self._state = store(self._state, recent)
        return np.asarray(out)

    def release(self, slot: int) -> None:
        """Ends the sequence in a slot."""
        self._state = release(self._state, np.int32(slot))


class DecodeState(NamedTuple):
    """The slots being decoded, all arrays.

    Attributes:
      cache: keys and values of all tokens but the last of each sequence; length 0 where a slot is free.
      token: `[B]` int32, the last token of each sequence, not yet in the cache.
      remaining: `[B]` int32, how many more tokens may follow; 0 once a sequence has ended.
      number: `[B]` int32, which prompt a slot holds.
    """

    cache: KVCache
    token: Array
    remaining: Array
    number: Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_state(config: ModelConfig, slots: int, size: int, dtype: DTypeLike) -> DecodeState:
    """`slots` free slots, each with a cache of `size` tokens."""
    cache = KVCache.empty(config, slots, size, dtype)
    return DecodeState(cache, *(constrain(jnp.zeros((slots,), jnp.int32)) for _ in range(3)))


@functools.partial(jax.jit, donate_argnums=0)
def release(state: DecodeState, slot: ArrayLike) -> DecodeState:
    """Ends the sequence in a slot."""
    lengths = constrain(state.cache.lengths.at[slot].set(0))
    remaining = constrain(state.remaining.at[slot].set(0))
    return state._replace(cache=state.cache._replace(lengths=lengths), remaining=remaining)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def admit(
    config: ModelConfig,
    params: nnx.State[Any, Any],
    state: DecodeState,
    prompts: KVCache,
    hidden: Array,
    slots: ArrayLike,
    numbers: ArrayLike,
    max_new_tokens: ArrayLike,
    sampling: Sampling,
) -> tuple[DecodeState, Array]:
    """Puts prompts into slots, and chooses the tokens that follow them; `state` is donated.

    Args:
      config: of the model.
      params: of the model.
      state: all slots; an equal share, in order, belongs to each of R replicas.
      prompts: keys and values of a prompt in each replica.
      hidden: `[R, D]`, the hidden states of their last tokens.
      slots: `[R]` int32, which of the replica's slots takes its prompt; -1 for none.
      numbers: `[R]` int32, the numbers of the prompts.
      max_new_tokens: int32, how many tokens may follow a prompt.
      sampling: how to choose.

    Returns:
      The new state, and the chosen tokens `[R]` int32.
    """
    slots, numbers = jnp.asarray(slots, jnp.int32), jnp.asarray(numbers, jnp.int32)
    chex.assert_shape([slots, numbers], prompts.lengths.shape)
    chex.assert_shape(hidden, (*prompts.lengths.shape, config.hidden_size))
    token = choose(bind(config, params).logits(hidden), sampling, numbers, prompts.lengths)
    ended = (token == NON_FINITE) | jnp.isin(token, jnp.asarray(sampling.eos_ids))
    remaining = jnp.where(ended, 0, jnp.asarray(max_new_tokens, jnp.int32) - 1)

    B, R = state.token.shape[0], slots.shape[0]
    at = jnp.where(slots < 0, B, jnp.arange(R) * (B // R) + slots)  # B is out of range, and dropped

    def put(old: Array, new: Array) -> Array:
        return constrain(old.at[at].set(new, mode="drop"))

    filled = jnp.where(remaining > 0, prompts.lengths, 0)
    layers = per_cache_row(_fill, state.cache.layers, prompts.layers, slots)
    cache = KVCache(layers, put(state.cache.lengths, filled))
    state = DecodeState(cache, put(state.token, token), put(state.remaining, remaining), put(state.number, numbers))
    return state, token


def _fill(layer: Slots, prompt: Array, slot: Array) -> Slots:
    assert not isinstance(layer, tuple), "parts are for one CPU"
    prompt = prompt[:, :, : layer.shape[2]]
    start = [jnp.maximum(slot[0], 0), *[jnp.int32(0)] * (layer.ndim - 1)]
    there = jax.lax.dynamic_slice(layer, start, prompt.shape)
    return jax.lax.dynamic_update_slice(layer, jnp.where(slot[0] < 0, there, prompt), start)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    config: ModelConfig,
    params: nnx.State[Any, Any],
    state: DecodeState,
    sampling: Sampling,
    neuron_masks: tuple[ArrayLike, ...] | None,
) -> tuple[DecodeState, KVCache, Array]:
    """Decodes up to `STEPS_PER_CALL` tokens, fewer when all sequences have ended.

    `state` is donated.

    Returns:
      The new state, whose cache lacks the keys and values of the new tokens: `store` them next; those, with the slot in
      which each row's begin as lengths; and `[B, STEPS_PER_CALL]` int32 new tokens, -1 where a sequence had already
      ended.
    """
    chex.assert_shape([state.token, state.remaining, state.number], state.cache.lengths.shape)
    model = bind(config, params)
    # The large cache is only read within the loop: written there, XLA would copy all of it at every step.
    old = state.cache

    def step(carry: tuple[Array, KVCache, Steps]) -> tuple[Array, KVCache, Steps]:
        i, recent, steps = carry
        hidden, new = model(steps.token[:, None], caches=[old, recent], neuron_masks=neuron_masks)
        layers = tuple(_at_step(*pair, i) for pair in zip(recent.layers, new, strict=True))
        steps = _after_step(model, hidden, state, steps, sampling)
        return i + 1, KVCache(layers, steps.taken), steps

    def running(carry: tuple[Array, KVCache, Steps]) -> Array:
        return (carry[0] < STEPS_PER_CALL) & jnp.any(carry[2].remaining > 0)

    _, recent, steps = jax.lax.while_loop(running, step, (jnp.int32(0), _recent(config, state), _no_steps(state)))
    state = DecodeState(
        old._replace(lengths=steps.lengths), constrain(steps.token), constrain(steps.remaining), constrain(state.number)
    )
    return state, recent._replace(lengths=constrain(old.lengths)), constrain(steps.out)


class Steps(NamedTuple):
    """What the steps of a call have come to.

    Attributes:
      taken: `[B]` int32, how many steps, for all rows the same.
      token: `[B]` int32, the last token of each sequence.
      remaining: `[B]` int32, how many more may follow.
      lengths: `[B]` int32, how many tokens of each sequence its cache will hold; 0 for those that have ended: they are
        not attended to any more, so the others need not wait for their length.
      out: `[B, STEPS_PER_CALL]` int32 new tokens, -1 where a sequence had already ended.
    """

    taken: Array
    token: Array
    remaining: Array
    lengths: Array
    out: Array


def _recent(config: ModelConfig, state: DecodeState) -> KVCache:
    """Empty slots for the keys and values of a call."""
    dtype = jax.tree.leaves(state.cache.layers)[0].dtype
    return KVCache.empty(config, state.token.shape[0], STEPS_PER_CALL, dtype)


def _no_steps(state: DecodeState) -> Steps:
    out = jnp.full((state.token.shape[0], STEPS_PER_CALL), -1, jnp.int32)
    return Steps(jnp.zeros_like(state.token), state.token, state.remaining, state.cache.lengths, out)


def _at_step(recent: LayerCache, new: LayerCache, step: Array) -> LayerCache:
    """All rows at the same slot: those that still run have as many tokens, and what the others hold is not used."""
    update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=2)
    updated: LayerCache = jax.tree.map(lambda slots, x: update(slots, x.astype(slots.dtype), step), recent, new)
    return updated


def _after_step(model: Decoder, hidden: Array, state: DecodeState, steps: Steps, sampling: Sampling) -> Steps:
    """Adds a step whose hidden states are `[B, 1, D]`; `state` is that before the first."""
    running, taken, before = steps.remaining > 0, constrain(steps.taken + 1), state.cache.lengths
    token = choose(model.logits(hidden[:, 0]), sampling, state.number, before + taken)
    new = jnp.where(running, token, -1)
    out = constrain(jax.lax.dynamic_update_index_in_dim(steps.out, new, steps.taken[0], axis=1))
    ended = (token == NON_FINITE) | jnp.isin(token, jnp.asarray(sampling.eos_ids))
    remaining = jnp.where(running & ~ended, steps.remaining - 1, 0)
    lengths = constrain(jnp.where(remaining > 0, before + taken, 0))
    return Steps(taken, token, remaining, lengths, out)


def store(state: DecodeState, recent: KVCache) -> DecodeState:
    """Puts what `decode` returned into the cache of its state, which is donated."""
    cache = state.cache
    pairs = zip(cache.layers, recent.layers, strict=True)
    layers = tuple(write_layer(layer, new, recent.lengths) for layer, new in pairs)
    return state._replace(cache=cache._replace(layers=layers))
