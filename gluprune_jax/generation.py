"""The one decode loop: prompts in as token ids, continuations out, greedy or sampled.

A fixed number of slots is decoded together, each with its own place in the cache. A sequence that ends leaves its
slot, and the next waiting prompt takes it, so that no slot idles while there is work:

    slot 0    prompt A . . . . . . end | prompt C . . . . . . .
    slot 1    prompt B . . . . . . . . . . . . end | prompt D .

A prompt is prefilled in chunks of two sizes, so lengths do not recompile anything; the padding of a last chunk lies
behind the filled slots of the cache, where nothing looks, until decoding overwrites it.
"""

import functools
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

# Tokens decoded by one call into compiled code; between calls the host fills slots and looks for stop strings.
STEPS_PER_CALL = 16
# A prompt is run in chunks of the larger size, and its rest in smaller ones.
CHUNKS = (128, 512)
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


class PromptChunk(NamedTuple):
    """A part of a prompt on its way into a slot.

    Attributes:
      slot: int32.
      number: int32, the number of the prompt.
      tokens: `[T]` int32, of which the first `length` are real.
      start: int32, how many tokens of the prompt came before.
      length: int32.
      remaining: int32, how many tokens may follow the prompt; 0 while more of the prompt follows.
    """

    slot: ArrayLike
    number: ArrayLike
    tokens: ArrayLike
    start: ArrayLike
    length: ArrayLike
    remaining: ArrayLike


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
    cache_slots = slots_for(max(map(len, prompts), default=0) + max_new_tokens)
    # Taken from the end: the longest first, so that memory runs out at the beginning or not at all.
    waiting = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    running: dict[int, int] = {}  # the number of the prompt in each slot
    total = 0

    def decode_all(slots: int) -> None:
        nonlocal total
        state = empty_state(model.config, slots, cache_slots, model.embed_tokens[...].dtype)
        while waiting or running:
            firsts: dict[int, Array] = {}
            for slot in range(slots):
                if slot not in running and waiting:
                    running[slot] = number = waiting.pop()
                    results[number] = []
                    for chunk in prompt_chunks(prompts[number], slot, number, max_new_tokens):
                        state, firsts[slot] = prefill(graphdef, params, state, chunk, sampling, neuron_masks)
            state, out = decode(graphdef, params, state, sampling, neuron_masks)
            new = np.asarray(out)
            for slot, number in list(running.items()):
                fresh = [int(firsts[slot])] if slot in firsts else []
                fresh += new[slot][new[slot] != -1].tolist()
                if NONSENSE in fresh:
                    raise OperationError(
                        f"the logits after {len(results[number])} new tokens of prompt {number} are not finite: the "
                        f"model computes nothing sensible in {model.embed_tokens[...].dtype}"
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


def chunks(count: int, small: int, large: int) -> list[tuple[int, int]]:
    """Cuts `count` tokens into starts and sizes, the last padded as little as two sizes allow in few calls."""
    whole = count // large * large
    if count - whole > 3 * small:
        whole += large
    return [(start, large) for start in range(0, whole, large)] + [
        (start, small) for start in range(whole, count, small)
    ]


def prompt_chunks(prompt: Sequence[int], slot: int, number: int, max_new_tokens: int) -> list[PromptChunk]:
    """Cuts a prompt into chunks."""
    result = []
    for start, size in chunks(len(prompt), *CHUNKS):
        part = prompt[start : start + size]
        tokens = np.zeros(size, np.int32)
        tokens[: len(part)] = part
        remaining = max_new_tokens if start + len(part) == len(prompt) else 0
        numbers = (np.int32(value) for value in (start, len(part), remaining))
        result.append(PromptChunk(np.int32(slot), np.int32(number), tokens, *numbers))
    return result


def empty_state(config: ModelConfig, slots: int, cache_slots: int, dtype: DTypeLike) -> DecodeState:
    """`slots` free slots, each with a cache of `cache_slots` tokens."""
    cache = KVCache.empty(config, slots, cache_slots, dtype)
    return DecodeState(cache, *(jnp.zeros((slots,), jnp.int32) for _ in range(3)))


@functools.partial(jax.jit, donate_argnums=0)
def release(state: DecodeState, slot: Array) -> DecodeState:
    """Ends the sequence in a slot."""
    lengths = state.cache.lengths.at[slot].set(0)
    return state._replace(cache=state.cache._replace(lengths=lengths), remaining=state.remaining.at[slot].set(0))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    graphdef: nnx.GraphDef[Llama],
    params: nnx.State[Any, Any],
    state: DecodeState,
    chunk: PromptChunk,
    sampling: Sampling,
    neuron_masks: tuple[ArrayLike, ...] | None,
) -> tuple[DecodeState, Array]:
    """Runs a chunk of a prompt into its slot; `state` is donated.

    Returns:
      The new state, and the token (int32) that follows the chunk.
    """
    model = nnx.merge(graphdef, params)
    slot, start, length = (jnp.asarray(value, jnp.int32) for value in (chunk.slot, chunk.start, chunk.length))
    row = jax.tree.map(lambda slots: jax.lax.dynamic_index_in_dim(slots, slot, axis=0), state.cache.layers)
    cache = KVCache(row, start[None])
    hidden, new = model(jnp.asarray(chunk.tokens)[None], caches=[cache], neuron_masks=neuron_masks)
    last = jax.lax.dynamic_index_in_dim(hidden[0], length - 1, axis=0)
    number = jnp.asarray(chunk.number, jnp.int32)
    (token,) = choose(model.logits(last), sampling, number[None], (start + length)[None])
    remaining = jnp.asarray(chunk.remaining, jnp.int32) - 1
    ended = (token == NONSENSE) | jnp.isin(token, jnp.asarray(sampling.eos_ids))
    remaining = jnp.where(ended, 0, jnp.maximum(remaining, 0))

    def write(slots: Array, fresh: Array) -> Array:
        return jax.lax.dynamic_update_slice(slots, fresh.astype(slots.dtype), (slot, 0, start, 0))

    filled = jnp.where(remaining > 0, start + length, 0)
    cache = KVCache(jax.tree.map(write, state.cache.layers, new), state.cache.lengths.at[slot].set(filled))
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
