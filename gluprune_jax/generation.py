"""The one decode loop: prompts in as token ids, continuations out, greedy or sampled.

A fixed number of slots is decoded together, each with its own place in the cache. A sequence that ends leaves its
slot, and the next waiting prompt takes it, so that no slot idles while there is work:

    slot 0    prompt A . . . . . . end | prompt C . . . . . . .
    slot 1    prompt B . . . . . . . . . . . . end | prompt D .

A prompt is run into a cache of its own (`gluprune_jax.prefill`), which is then copied into the slot. What the next
prompt begins with stays there and is not run again.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from gluprune_jax.errors import OperationError, RequestError, is_out_of_memory
from gluprune_jax.model import KVCache, Llama, ModelConfig
from gluprune_jax.prefill import CHUNKS, Chunk, append, cache_slots, chunks, extend

# Tokens decoded by one call into compiled code; between calls the host fills slots and looks for stop strings.
STEPS_PER_CALL = 16
# In place of a token, where the model computes NaN or infinities: what it left in the cache would spoil what follows.
NONSENSE = -2
_EOS_BUCKET = 8


class Sampling(NamedTuple):
    """How tokens are chosen; all scalars are arrays, so that none recompiles anything.

    Attributes:
      eos_ids: `[E]` int32, tokens that end a sequence; -1 fills up.
      temperature: float32; 0 takes the most likely token.
      top_p: float32; the smallest set of most likely tokens that holds this probability is drawn from.
      seed: uint32. A draw depends on it, on the number of the prompt and on the position, and on nothing else:
        neither on the slot nor on what else is decoded.
    """

    eos_ids: ArrayLike
    temperature: ArrayLike
    top_p: ArrayLike
    seed: ArrayLike


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


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    should_stop: Callable[[Sequence[int]], bool] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    neuron_masks: tuple[ArrayLike, ...] | None = None,
    slots: int = 16,
    on_tokens: Callable[[int], None] | None = None,
    on_result: Callable[[int, list[int]], None] | None = None,
    on_out_of_memory: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continues prompts.

    Args:
      model: the model.
      prompts: token ids of each prompt, at least one each.
      max_new_tokens: most tokens to add to each.
      eos_ids: tokens that end a sequence; the one that did is not returned.
      should_stop: asked every `STEPS_PER_CALL` tokens with the new tokens of a running sequence; True ends it, all
        tokens so far included.
      temperature: 0 for greedy decoding; else logits are divided by it and a token is drawn.
      top_p: draws from the smallest set of most likely tokens that together have this probability.
      seed: of the draws. A prompt's tokens depend on it and on the prompt's number, not on the other prompts.
      neuron_masks: see `Llama.__call__`.
      slots: sequences decoded at the same time; it does not change the result. When the device has no memory for
        them it is halved, and the unfinished prompts start anew.
      on_tokens: called with the number of new tokens so far, of all prompts together, for progress.
      on_result: called with the number of a prompt and its new tokens as soon as it has ended.
      on_out_of_memory: called with the new number of slots.

    Returns:
      The new token ids of each prompt.

    Raises:
      RequestError: an empty prompt, one that does not fit the context window with its continuation, token ids
        outside the vocabulary, or a number out of range.
      OperationError: the model gives logits that are not finite.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p, seed, slots)
    results: list[list[int]] = [[] for _ in prompts]
    if not max_new_tokens:
        if on_result:
            for number, tokens in enumerate(results):
                on_result(number, tokens)
        return results
    ends = np.full(-(-max(1, len(eos_ids)) // _EOS_BUCKET) * _EOS_BUCKET, -1, np.int32)
    ends[: len(eos_ids)] = eos_ids
    sampling = Sampling(ends, np.float32(temperature), np.float32(top_p), np.uint32(seed))
    graphdef, params = nnx.split(model)
    dtype = model.embed_tokens[...].dtype
    longest = max(map(len, prompts), default=0)
    waiting = queue(prompts)
    running: dict[int, int] = {}  # the number of the prompt in each slot
    total = 0

    def decode_all(slots: int) -> None:
        nonlocal total
        state = empty_state(model.config, slots, slots_for(longest + max_new_tokens), dtype)
        prompt_cache, held = KVCache.empty(model.config, 1, cache_slots(longest), dtype), list[Chunk]()
        while waiting or running:
            firsts: dict[int, Array] = {}
            for slot in range(slots):
                if slot not in running and waiting:
                    running[slot] = number = waiting.pop()
                    results[number] = []
                    parts = chunks(prompts[number])
                    for chunk in parts[_shared(parts[:-1], held) :]:
                        prompt_cache = prompt_cache.holding(chunk.start)
                        hidden, added = extend(graphdef, params, prompt_cache, chunk.tokens, neuron_masks)
                        prompt_cache = append(prompt_cache, added, np.full(1, chunk.length, np.int32))
                    held = parts
                    numbers = (np.int32(value) for value in (chunk.length, slot, number, max_new_tokens))
                    state, firsts[slot] = admit(graphdef, params, state, prompt_cache, hidden, *numbers, sampling)
            state, out = decode(graphdef, params, state, sampling, neuron_masks)
            new = np.asarray(out)
            for slot, number in list(running.items()):
                fresh = [int(firsts[slot])] if slot in firsts else []
                fresh += new[slot][new[slot] != -1].tolist()
                if NONSENSE in fresh:
                    raise OperationError(
                        f"the logits after {len(results[number])} new tokens of prompt {number} are not finite: the "
                        f"model computes nothing sensible in {dtype}"
                    )
                end = next((i for i, token in enumerate(fresh) if token in eos_ids), None)
                tokens = results[number]
                tokens += fresh[:end]
                total += len(fresh[:end])
                if end is None and len(tokens) < max_new_tokens:
                    if not (should_stop and should_stop(tokens)):
                        continue
                    state = release(state, np.int32(slot))
                del running[slot]
                if on_result:
                    on_result(number, tokens)
            if on_tokens:
                on_tokens(total)

    slots = min(slots, 1 << (max(1, len(prompts)) - 1).bit_length())
    while waiting or running:
        try:
            decode_all(slots)
        except Exception as error:
            if not is_out_of_memory(error) or slots == 1:
                raise
            waiting += running.values()
            total -= sum(len(results[number]) for number in running.values())
            running.clear()
            slots //= 2
            if on_out_of_memory:
                on_out_of_memory(slots)
    return results


def slots_for(longest: int) -> int:
    """Slots of the cache for sequences of up to `longest` tokens: a power of two, so that few programs serve all."""
    longest += STEPS_PER_CALL  # a call writes that many, wanted or not
    return max(CHUNKS[-1], 1 << (longest - 1).bit_length())


def queue(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The numbers of prompts, the first to run at the end.

    Those that begin alike follow each other, so that the beginning is run once; else long prompts come first and
    those of about the same length together, because decoding visits as much of each cache as of the fullest.
    """
    beginnings = [tuple(prompt[: CHUNKS[0]]) for prompt in prompts]
    longest = dict[tuple[int, ...], int]()
    for beginning, prompt in zip(beginnings, prompts, strict=True):
        longest[beginning] = max(longest.get(beginning, 0), len(prompt))
    return sorted(range(len(prompts)), key=lambda n: (longest[beginnings[n]], beginnings[n], len(prompts[n])))


def _shared(parts: Sequence[Chunk], held: Sequence[Chunk]) -> int:
    """How many chunks from the first on are the same in both."""

    def same(a: Chunk, b: Chunk) -> bool:
        return a.length == b.length and np.array_equal(a.tokens, b.tokens)

    return sum(1 for _ in itertools.takewhile(lambda pair: same(*pair), zip(parts, held, strict=False)))


def empty_state(config: ModelConfig, slots: int, size: int, dtype: DTypeLike) -> DecodeState:
    """`slots` free slots, each with a cache of `size` tokens."""
    cache = KVCache.empty(config, slots, size, dtype)
    return DecodeState(cache, *(jnp.zeros((slots,), jnp.int32) for _ in range(3)))


@functools.partial(jax.jit, donate_argnums=0)
def release(state: DecodeState, slot: Array) -> DecodeState:
    """Ends the sequence in a slot."""
    lengths = state.cache.lengths.at[slot].set(0)
    return state._replace(cache=state.cache._replace(lengths=lengths), remaining=state.remaining.at[slot].set(0))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def admit(
    graphdef: nnx.GraphDef[Llama],
    params: nnx.State[Any, Any],
    state: DecodeState,
    prompt: KVCache,
    hidden: Array,
    length: ArrayLike,
    slot: ArrayLike,
    number: ArrayLike,
    max_new_tokens: ArrayLike,
    sampling: Sampling,
) -> tuple[DecodeState, Array]:
    """Puts a prompt into a slot, and chooses the token that follows it; `state` is donated.

    Args:
      graphdef: of the model.
      params: of the model.
      state: all slots.
      prompt: keys and values of the prompt.
      hidden: `[T, D]`, the hidden states of its last chunk.
      length: int32, how many of them are of real tokens.
      slot: int32.
      number: int32, the number of the prompt.
      max_new_tokens: int32, how many tokens may follow the prompt.
      sampling: how to choose.

    Returns:
      The new state, and the chosen token (int32).
    """
    length, slot, number = (jnp.asarray(value, jnp.int32) for value in (length, slot, number))
    logits = nnx.merge(graphdef, params).logits(jax.lax.dynamic_slice_in_dim(hidden, length - 1, 1))
    (token,) = choose(logits, sampling, number[None], prompt.lengths)
    ended = (token == NONSENSE) | jnp.isin(token, jnp.asarray(sampling.eos_ids))
    remaining = jnp.where(ended, 0, jnp.asarray(max_new_tokens, jnp.int32) - 1)

    def write(slots: Array, row: Array) -> Array:
        return jax.lax.dynamic_update_slice(slots, row[:, :, : slots.shape[2]], (slot, 0, 0, 0))

    filled = jnp.where(remaining > 0, prompt.lengths[0], 0)
    cache = KVCache(jax.tree.map(write, state.cache.layers, prompt.layers), state.cache.lengths.at[slot].set(filled))
    state = DecodeState(
        cache,
        state.token.at[slot].set(token),
        state.remaining.at[slot].set(remaining),
        state.number.at[slot].set(number),
    )
    return state, token


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    graphdef: nnx.GraphDef[Llama],
    params: nnx.State[Any, Any],
    state: DecodeState,
    sampling: Sampling,
    neuron_masks: tuple[ArrayLike, ...] | None,
) -> tuple[DecodeState, Array]:
    """Decodes up to `STEPS_PER_CALL` tokens, fewer when all sequences have ended.

    `state` is donated: the cache is updated in place.

    Returns:
      The new state, and `[B, STEPS_PER_CALL]` int32 new tokens, -1 where a sequence had already ended.
    """
    model = nnx.merge(graphdef, params)
    # The large cache is only read within the loop: written there, XLA would copy all of it at every step.
    old, B = state.cache, state.token.shape[0]
    recent = KVCache.empty(model.config, B, STEPS_PER_CALL, old.layers[0].k.dtype)
    out = jnp.full((B, STEPS_PER_CALL), -1, jnp.int32)

    def step(carry: tuple[Array, Array, Array, KVCache, Array]) -> tuple[Array, Array, Array, KVCache, Array]:
        i, token, remaining, recent, out = carry
        running = remaining > 0
        hidden, new = model(token[:, None], caches=[old, recent], neuron_masks=neuron_masks)
        recent = recent.append(new, running.astype(jnp.int32))
        token = choose(model.logits(hidden[:, 0]), sampling, state.number, old.lengths + recent.lengths)
        out = jax.lax.dynamic_update_index_in_dim(out, jnp.where(running, token, -1), i, axis=1)
        ended = (token == NONSENSE) | jnp.isin(token, jnp.asarray(sampling.eos_ids))
        remaining = jnp.where(running & ~ended, remaining - 1, 0)
        return i + 1, token, remaining, recent, out

    def running(carry: tuple[Array, Array, Array, KVCache, Array]) -> Array:
        return (carry[0] < STEPS_PER_CALL) & jnp.any(carry[2] > 0)

    carry = jnp.int32(0), state.token, state.remaining, recent, out
    _, token, remaining, recent, out = jax.lax.while_loop(running, step, carry)
    cache = old.append(recent.layers, recent.lengths)
    # An ended sequence is not attended to any more, so the others need not wait for its length.
    cache = cache._replace(lengths=jnp.where(remaining > 0, cache.lengths, 0))
    return DecodeState(cache, token, remaining, state.number), out


def choose(logits: Array, sampling: Sampling, numbers: Array, positions: Array) -> Array:
    """The next token `[B]` int32 of logits `[B, V]`: the likeliest, or a draw (nucleus sampling, arXiv 1904.09751).

    `NONSENSE` where the logits are not finite.

    Args:
      logits: float32.
      sampling: how to choose.
      numbers: `[B]` int32, the prompt of each row.
      positions: `[B]` int32, where each token will stand.
    """
    temperature, top_p = (jnp.asarray(value, jnp.float32) for value in (sampling.temperature, sampling.top_p))

    def draw() -> Array:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        likeliest = ordered[:, :1]
        probabilities = jax.nn.softmax((ordered - likeliest) / temperature, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1)[:, :-1]  # probability of all that are likelier
        before = jnp.pad(before, ((0, 0), (1, 0)))  # exactly 0 for the first, which is thus never left out
        # A logit and not a probability: XLA computes those twice, and not always to the same last bit.
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        key = jax.random.key(jnp.asarray(sampling.seed, jnp.uint32))
        keys = jax.vmap(lambda n, p: jax.random.fold_in(jax.random.fold_in(key, n), p))(numbers, positions)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
        noisy = (logits - likeliest) / temperature + noise
        return jnp.argmax(jnp.where(logits >= least, noisy, -jnp.inf), axis=-1)

    token: Array = jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits, axis=-1))
    logit = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]  # NaN if any is: argmax takes it for the largest
    return jnp.where(jnp.isfinite(logit), token, NONSENSE).astype(jnp.int32)


def _check(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    slots: int,
) -> None:
    """Refuses what cannot be generated."""
    window = model.config.max_position_embeddings
    if any(len(prompt) == 0 for prompt in prompts):
        raise RequestError("a prompt has no tokens; generation needs at least one to start from")
    if max_new_tokens < 0:
        raise RequestError(f"{max_new_tokens} new tokens were asked for; it must be at least 0")
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > window:
        raise RequestError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's window of {window}"
        )
    if not temperature >= 0:  # NaN is not
        raise RequestError(f"the temperature is {temperature:g}; it must be at least 0")
    if not 0 < top_p <= 1:
        raise RequestError(f"top-p is {top_p:g}; it must lie above 0 and at most at 1")
    if not 0 <= seed < 2**32:
        raise RequestError(f"the seed is {seed}; it must be at least 0 and below 2**32")
    if slots < 1:
        raise RequestError(f"{slots} sequences at a time; it must be at least 1")
    for prompt in prompts:
        model.config.check_tokens(np.asarray(prompt, np.int32))
