"""The one decode loop: prompts in as token ids, continuations out, greedy.

Prompts are padded on the right to a shared bucket length. A cache slot's index is its position, so the padding of a
shorter prompt is never visible: the tokens generated after it overwrite its slots before anything attends to them.

    prompt    a b c . .        slots written by prefill, `.` is padding
    step 1    a b c d .        d goes to slot 3, attends to slots 0..3
    step 2    a b c d e
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from gluprune_jax.errors import RequestError
from gluprune_jax.model import KVCache, Llama

# Tokens decoded by one call into compiled code; between calls the host may report progress.
STEPS_PER_CALL = 16
_MIN_BUCKET = 32
_EOS_BUCKET = 8


class DecodeState(NamedTuple):
    """The sequences being decoded, all arrays, so that neither lengths nor end tokens recompile anything.

    Attributes:
      cache: keys and values; `S` slots a sequence.
      token: `[B]` int32, the last token of each sequence, not yet in the cache.
      position: `[B]` int32, where that token belongs.
      remaining: `[B]` int32, how many more tokens may follow; 0 once a sequence has ended.
    """

    cache: KVCache
    token: Array
    position: Array
    remaining: Array


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    neuron_masks: tuple[ArrayLike, ...] | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continues prompts greedily.

    Args:
      model: the model.
      prompts: token ids of each prompt, at least one each.
      max_new_tokens: most tokens to add to each.
      eos_ids: tokens that end a sequence; the one that did is not returned.
      neuron_masks: see `Llama.__call__`.
      on_tokens: called with the number of decoding steps done so far, for progress.

    Returns:
      The new token ids of each prompt.

    Raises:
      RequestError: an empty prompt, one that does not fit the context window with its continuation, token ids
        outside the vocabulary, or a negative number of new tokens.
    """
    if not prompts:
        return []
    window = model.config.max_position_embeddings
    longest = max(len(prompt) for prompt in prompts)
    if min(len(prompt) for prompt in prompts) == 0:
        raise RequestError("a prompt has no tokens; generation needs at least one to start from")
    if max_new_tokens < 0:
        raise RequestError(f"{max_new_tokens} new tokens were asked for; it must be at least 0")
    if longest + max_new_tokens > window:
        raise RequestError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's window of {window}"
        )
    bucket = max(_MIN_BUCKET, 1 << (longest - 1).bit_length())
    calls = -(-max_new_tokens // STEPS_PER_CALL)
    tokens = np.zeros((len(prompts), bucket), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    model.config.check_tokens(tokens)
    ends = np.full(-(-max(1, len(eos_ids)) // _EOS_BUCKET) * _EOS_BUCKET, -1, np.int32)
    ends[: len(eos_ids)] = eos_ids

    graphdef, params = nnx.split(model)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    cache_length = bucket + calls * STEPS_PER_CALL
    state = prefill(graphdef, cache_length, params, tokens, lengths, np.int32(max_new_tokens), ends, neuron_masks)
    first, emitted = np.asarray(state.token), []
    for call in range(calls):
        if not np.any(state.remaining):
            break
        state, new = decode(graphdef, params, state, ends, neuron_masks)
        emitted.append(np.asarray(new))
        if on_tokens:
            on_tokens(min((call + 1) * STEPS_PER_CALL, max_new_tokens))

    sequences = np.concatenate([first[:, None], *emitted], axis=1)[:, :max_new_tokens]
    continuations = []
    for row in sequences:
        stops = np.flatnonzero(np.isin(row, ends) | (row < 0))
        continuations.append(row[: stops[0] if len(stops) else None].tolist())
    return continuations


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(
    graphdef: nnx.GraphDef[Llama],
    cache_length: int,
    params: nnx.State[Any, Any],
    tokens: Array,
    lengths: Array,
    max_new_tokens: Array,
    eos_ids: Array,
    neuron_masks: tuple[ArrayLike, ...] | None,
) -> DecodeState:
    """Runs the prompts `tokens [B, T]`, of which the first `lengths [B]` are real, and picks the first new token."""
    model = nnx.merge(graphdef, params)
    dtype = model.embed_tokens[...].dtype
    cache = KVCache.empty(model.config, tokens.shape[0], cache_length, dtype)
    hidden, cache = model(tokens, cache=cache, neuron_masks=neuron_masks)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    token = jnp.argmax(model.logits(last), axis=-1).astype(jnp.int32)
    remaining = jnp.where(jnp.isin(token, eos_ids), 0, max_new_tokens - 1)
    return DecodeState(cache, token, lengths, remaining)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    graphdef: nnx.GraphDef[Llama],
    params: nnx.State[Any, Any],
    state: DecodeState,
    eos_ids: Array,
    neuron_masks: tuple[ArrayLike, ...] | None,
) -> tuple[DecodeState, Array]:
    """Decodes up to `STEPS_PER_CALL` tokens, fewer when all sequences have ended.

    `state` is donated: the cache is updated in place.

    Returns:
      The new state, and `[B, STEPS_PER_CALL]` int32 new tokens, -1 where a sequence had already ended.
    """
    model = nnx.merge(graphdef, params)

    def step(carry: tuple[Array, DecodeState, Array]) -> tuple[Array, DecodeState, Array]:
        i, state, out = carry
        hidden, cache = model(
            state.token[:, None], state.position[:, None], cache=state.cache, neuron_masks=neuron_masks
        )
        token = jnp.argmax(model.logits(hidden[:, 0]), axis=-1).astype(jnp.int32)
        running = state.remaining > 0
        remaining = jnp.where(running & ~jnp.isin(token, eos_ids), state.remaining - 1, 0)
        out = jax.lax.dynamic_update_index_in_dim(out, jnp.where(running, token, -1), i, axis=1)
        return i + 1, DecodeState(cache, token, state.position + 1, remaining), out

    def running(carry: tuple[Array, DecodeState, Array]) -> Array:
        return (carry[0] < STEPS_PER_CALL) & jnp.any(carry[1].remaining > 0)

    out = jnp.full((state.token.shape[0], STEPS_PER_CALL), -1, jnp.int32)
    _, state, out = jax.lax.while_loop(running, step, (jnp.int32(0), state, out))
    return state, out
