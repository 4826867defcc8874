"""The one decode loop: prompts in as token ids, continuations out, greedy or sampled.

A fixed number of slots is decoded together, each with its own place in the cache. A sequence that ends leaves its
slot, and the next waiting prompt takes it, so that no slot idles while there is work:

    slot 0    prompt A . . . . . . end | prompt C . . . . . . .
    slot 1    prompt B . . . . . . . . . . . . end | prompt D .

A prompt is run into a cache of its own (`gluprune_jax.inference.prefill`), which is then copied into the slot. What the
next prompt begins with stays there and is not run again.

On a mesh each replica has its own slots and its own cache for prompts, and all replicas do the same at the same time:
as many prompts are run together as there are replicas, and all slots are decoded together.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from gluprune_jax.errors import OperationError, RequestError, is_out_of_memory
from gluprune_jax.inference.by_layers import (
    Ends,
    Weights,
    bind_ends,
    bind_layer,
    ends_of,
    layers_of,
    runs_by_layers,
)
from gluprune_jax.inference.prefill import CHUNKS, Chunk, append, cache_slots, chunks, extend
from gluprune_jax.models.attention import KEY_BLOCK, Slots
from gluprune_jax.models.cache import (
    KVCache,
    LayerCache,
    LayerView,
    per_cache_row,
    to_tiles,
    with_bounds,
    write_layer,
)
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder, embed
from gluprune_jax.models.parameters import bind
from gluprune_jax.parallel.mesh import mesh_of, place, shape_of, use_mesh
from gluprune_jax.parallel.sharding import constrain, is_divided

# Tokens decoded by one call into compiled code; between calls the host fills slots and looks for stop strings.
STEPS_PER_CALL = 16
# On one CPU a slot of up to so many tokens lies in parts (see `gluprune_jax.models.attention`): four, or fewer of so
# many tokens. In finer ones less would be read in vain, and the program would compile longer.
CPU_SLOTS_IN_PARTS, CPU_PART = 4096, 256
# In place of a token, where the model computes NaN or infinities: what it left in the cache would spoil what follows.
NON_FINITE = -2
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
    model: Decoder,
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
      neuron_masks: see `Decoder.__call__`.
      slots: sequences decoded at the same time, in all replicas together; it does not change the result. When the
        devices have no memory for them it is halved, and the unfinished prompts start anew.
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
    config, params, mesh = model.config, nnx.state(model, nnx.Param), mesh_of(model)
    replicas = shape_of(mesh).data
    dtype = model.embed_tokens[...].dtype
    longest = max(map(len, prompts), default=0)
    waiting = queue(prompts)
    running: dict[int, int] = {}  # the number of the prompt in each slot
    total = 0

    def decode_all(slots: int) -> None:
        """Decodes with so many slots in each replica."""
        nonlocal total
        state = empty_state(config, replicas * slots, slots_for(longest + max_new_tokens), dtype)
        prefill = _Prefill(config, params, KVCache.empty(config, replicas, cache_slots(longest), dtype), mesh)
        while waiting or running:
            firsts: dict[int, int] = {}
            while waiting and len(running) < replicas * slots:
                fresh: dict[int, tuple[int, int]] = {}  # by replica: the slot in it, and the number of the prompt
                for replica in range(replicas):
                    free = (slot for slot in range(slots) if replica * slots + slot not in running)
                    if waiting and (slot := next(free, None)) is not None:
                        fresh[replica] = slot, (number := waiting.pop())
                        running[replica * slots + slot] = number
                        results[number] = []
                asked = {replica: prompts[number] for replica, (_, number) in fresh.items()}
                for done, hidden in prefill.run(asked, neuron_masks):
                    slot_of, number_of = np.full(replicas, -1, np.int32), np.zeros(replicas, np.int32)
                    for replica in done:
                        slot_of[replica], number_of[replica] = fresh[replica]
                    limit = np.int32(max_new_tokens)
                    state, chosen = admit(
                        config, params, state, prefill.cache, hidden, slot_of, number_of, limit, sampling
                    )
                    tokens_chosen = np.asarray(chosen)
                    firsts |= {replica * slots + fresh[replica][0]: int(tokens_chosen[replica]) for replica in done}
            state, recent, out = decode(config, params, state, sampling, neuron_masks)
            state = store(state, recent)
            new = np.asarray(out)
            for slot, number in list(running.items()):
                added = [firsts[slot]] if slot in firsts else []
                added += new[slot][new[slot] != -1].tolist()
                if NON_FINITE in added:
                    raise OperationError(
                        f"the logits after {len(results[number])} new tokens of prompt {number} are not finite in "
                        f"{dtype}; check the weights, or use `dtype` float32"
                    )
                end = next((i for i, token in enumerate(added) if token in eos_ids), None)
                tokens = results[number]
                tokens += added[:end]
                total += len(added[:end])
                if end is None and len(tokens) < max_new_tokens:
                    if not (should_stop and should_stop(tokens)):
                        continue
                    state = release(state, np.int32(slot))
                del running[slot]
                if on_result:
                    on_result(number, tokens)
            if on_tokens:
                on_tokens(total)

    slots = min(-(-slots // replicas), 1 << (max(1, -(-len(prompts) // replicas)) - 1).bit_length())
    while waiting or running:
        try:
            with use_mesh(mesh):
                decode_all(slots)
        except Exception as error:
            # What one process has no memory for, the others go on with.
            if not is_out_of_memory(error) or slots == 1 or jax.process_count() > 1:
                raise
            waiting += running.values()
            total -= sum(len(results[number]) for number in running.values())
            running.clear()
            slots //= 2
            if on_out_of_memory:
                on_out_of_memory(replicas * slots)
    return results


class _Prefill:
    """Runs prompts into a cache, one in each replica, leaving out what is there already."""

    def __init__(self, config: ModelConfig, params: nnx.State[Any, Any], cache: KVCache, mesh: Mesh | None):
        self.cache = cache
        self._config, self._params, self._mesh = config, params, mesh
        replicas = cache.lengths.shape[0]
        self._held: list[list[Chunk]] = [[] for _ in range(replicas)]  # the chunks in each row of the cache
        self._filled = np.zeros(replicas, np.int32)

    def run(
        self, prompts: Mapping[int, Sequence[int]], neuron_masks: tuple[ArrayLike, ...] | None
    ) -> Iterator[tuple[list[int], Array]]:
        """Runs a prompt in each of some replicas.

        Yields:
          The replicas whose prompt has been run, and the hidden states `[R, D]` of their last tokens.
        """
        todo: dict[int, deque[Chunk]] = {}
        for replica, prompt in prompts.items():
            parts = chunks(prompt)
            todo[replica] = deque(parts[_shared(parts[:-1], self._held[replica]) :])
            self._held[replica] = parts
            self._filled[replica] = todo[replica][0].start
        while todo:
            size = next(iter(todo.values()))[0].tokens.shape[1]
            now = {r: parts.popleft() for r, parts in todo.items() if parts[0].tokens.shape[1] == size}
            tokens, counts = np.zeros((len(self._filled), size), np.int32), np.zeros_like(self._filled)
            for replica, chunk in now.items():
                tokens[replica], counts[replica] = chunk.tokens[0], chunk.length
            cache = self.cache.holding(self._filled.copy())
            placed = place(self._mesh, tokens, "batch", None)
            hidden, new = extend(self._config, self._params, cache, placed, neuron_masks)
            self.cache = append(cache, new, counts)
            self._filled += counts
            if done := [replica for replica in now if not todo[replica]]:
                yield done, last_hidden(hidden, np.maximum(counts - 1, 0))
            todo = {replica: parts for replica, parts in todo.items() if parts}


@jax.jit
def last_hidden(hidden: Array, last: ArrayLike) -> Array:
    """The hidden states `[R, D]` at `last [R]` of `hidden [R, T, D]`."""
    chex.assert_rank(hidden, 3)
    chex.assert_shape(last, hidden.shape[:1])
    chosen: Array = jax.vmap(lambda own, index: own[index])(hidden, jnp.asarray(last))
    return chosen


def slots_for(longest: int) -> int:
    """Slots of the cache for sequences of up to `longest` tokens: of few sizes, so that few programs serve all."""
    longest += STEPS_PER_CALL  # a call writes that many, wanted or not
    if longest <= 2048:
        return max(CHUNKS[-1], -(-longest // KEY_BLOCK) * KEY_BLOCK)
    return 1 << (longest - 1).bit_length()


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


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_state(config: ModelConfig, slots: int, size: int, dtype: DTypeLike) -> DecodeState:
    """`slots` free slots, each with a cache of `size` tokens."""
    is_alone = jax.default_backend() == "cpu" and not is_divided()
    part = max(CPU_PART, size // 4)
    in_parts = is_alone and size <= CPU_SLOTS_IN_PARTS and size % part == 0
    cache = KVCache.empty(config, slots, size, dtype, part=part if in_parts else None)
    return DecodeState(cache, *(constrain(jnp.zeros((slots,), jnp.int32)) for _ in range(3)))


@functools.partial(jax.jit, donate_argnums=0)
def release(state: DecodeState, slot: ArrayLike) -> DecodeState:
    """Ends the sequence in a slot."""
    lengths = constrain(state.cache.lengths.at[slot].set(0))
    remaining = constrain(state.remaining.at[slot].set(0))
    return state._replace(cache=state.cache._replace(lengths=lengths), remaining=remaining)


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
    layers = None
    if runs_by_layers():
        layers = tuple(fill_layer(*pair, slots) for pair in zip(state.cache.layers, prompts.layers, strict=True))
        state, prompts = state._replace(cache=state.cache._replace(layers=())), prompts._replace(layers=())
    token: Array
    state, token = whole_admit(config, params, state, prompts, hidden, slots, numbers, max_new_tokens, sampling)
    return state if layers is None else state._replace(cache=state.cache._replace(layers=layers)), token


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def whole_admit(
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
    """`admit` as one program; of the caches those layers that it is given."""
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


@functools.partial(jax.jit, donate_argnums=0)
def fill_layer(layer: LayerCache, prompts: LayerCache, slots: ArrayLike) -> LayerCache:
    """Copies a layer of prompts `[R, K, S, H]` into those slots of it, -1 for none; `layer` is donated."""
    return per_cache_row(_fill, (layer,), (prompts,), slots)[0]


def _fill(layer: Slots, prompt: Array, slot: Array) -> Slots:
    if isinstance(layer, tuple):
        return tuple(_fill_part(part, prompt[:, :, a:b], slot) for part, (a, b) in with_bounds(layer))
    return _fill_part(layer, prompt[:, :, : layer.shape[2]], slot)


def _fill_part(part: Array, prompt: Array, slot: Array) -> Array:
    prompt = to_tiles(prompt) if part.ndim == 5 else prompt
    start = [jnp.maximum(slot[0], 0), *[jnp.int32(0)] * (part.ndim - 1)]
    there = jax.lax.dynamic_slice(part, start, prompt.shape)
    return jax.lax.dynamic_update_slice(part, jnp.where(slot[0] < 0, there, prompt), start)


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
    if not runs_by_layers():
        whole: tuple[DecodeState, KVCache, Array] = whole_decode(config, params, state, sampling, neuron_masks)
        return whole
    cache, ends, weights = state.cache, ends_of(params), list(layers_of(config, params))
    rest = state._replace(cache=cache._replace(layers=()))
    recent = list(_recent(config, state).layers)
    x, steps = begin_steps(config, ends, rest)
    for _ in range(STEPS_PER_CALL):
        before = steps.remaining
        for n, (i, own) in enumerate(weights):
            mask = None if neuron_masks is None else neuron_masks[n]
            old = *cache.layers[n], cache.lengths
            x, recent[n] = decode_layer(config, i, own, x, old, recent[n], steps.taken, mask)
        x, steps = end_step(config, ends, rest, x, steps, sampling)
        if not np.asarray(before).any():  # not what this step has left, which is being computed
            break
    state = DecodeState(cache._replace(lengths=steps.lengths), steps.token, steps.remaining, state.number)
    return state, KVCache(tuple(recent), cache.lengths), steps.out


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def whole_decode(
    config: ModelConfig,
    params: nnx.State[Any, Any],
    state: DecodeState,
    sampling: Sampling,
    neuron_masks: tuple[ArrayLike, ...] | None,
) -> tuple[DecodeState, KVCache, Array]:
    """`decode` as one program."""
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


@functools.partial(jax.jit, static_argnums=0)
def begin_steps(config: ModelConfig, ends: Ends, state: DecodeState) -> tuple[Array, Steps]:
    """The residual stream `[B, 1, D]` of the first step, and no steps."""
    return embed(config, bind_ends(config, ends).embed_tokens[...], state.token[:, None]), _no_steps(state)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def decode_layer(
    config: ModelConfig,
    i: int,
    weights: Weights,
    x: Array,
    old: LayerView,
    recent: LayerCache,
    taken: Array,
    neuron_mask: ArrayLike | None,
) -> tuple[Array, LayerCache]:
    """A layer like layer `i` at a step: the stream `[B, 1, D]` behind it, and `recent`, which is donated, with it."""
    positions = (old[2] + taken)[:, None]
    x, new = bind_layer(config, i, weights)(x, positions, None, [old, (*recent, taken)], neuron_mask)
    return x, _at_step(recent, new, taken[0])


@functools.partial(jax.jit, static_argnums=0)
def end_step(
    config: ModelConfig, ends: Ends, state: DecodeState, x: Array, steps: Steps, sampling: Sampling
) -> tuple[Array, Steps]:
    """From the stream `[B, 1, D]` behind the last layer to that in front of the first one at the next step."""
    model = bind_ends(config, ends)
    steps = _after_step(model, model.norm(x), state, steps, sampling)
    return embed(config, model.embed_tokens[...], steps.token[:, None]), steps


def store(state: DecodeState, recent: KVCache) -> DecodeState:
    """Puts what `decode` returned into the cache of its state, which is donated."""
    cache = state.cache
    pairs = zip(cache.layers, recent.layers, strict=True)
    layers = tuple(write_layer(layer, new, recent.lengths) for layer, new in pairs)
    return state._replace(cache=cache._replace(layers=layers))


def choose(logits: Array, sampling: Sampling, numbers: Array, positions: Array) -> Array:
    """The next token `[B]` int32 of logits `[B, V]`: the likeliest, or a draw (nucleus sampling, arXiv 1904.09751).

    `NON_FINITE` where the logits are not finite.

    Args:
      logits: float32.
      sampling: how to choose.
      numbers: `[B]` int32, the prompt of each row.
      positions: `[B]` int32, where each token will stand.
    """
    chex.assert_rank(logits, 2)
    chex.assert_shape([numbers, positions], logits.shape[:1])
    temperature, top_p = (jnp.asarray(value, jnp.float32) for value in (sampling.temperature, sampling.top_p))
    logits = constrain(logits, "batch", None)  # a vocabulary that is divided would be sorted piece by piece

    def draw() -> Array:
        likeliest = jnp.max(logits, axis=-1, keepdims=True)

        def nucleus() -> Array:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            probabilities = jax.nn.softmax((ordered - likeliest) / temperature, axis=-1)
            before = jnp.cumsum(probabilities, axis=-1)[:, :-1]  # probability of all that are likelier
            before = jnp.pad(before, ((0, 0), (1, 0)))  # exactly 0 for the first, which is thus never left out
            # A logit and not a probability: XLA computes those twice, and not always to the same last bit.
            return jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)

        # To sort a vocabulary takes longer than all else here, and where every token may come it leaves out none.
        least = jax.lax.cond(top_p < 1, nucleus, lambda: jnp.full_like(likeliest, -jnp.inf))
        key = jax.random.key(jnp.asarray(sampling.seed, jnp.uint32))
        keys = jax.vmap(lambda n, p: jax.random.fold_in(jax.random.fold_in(key, n), p))(numbers, positions)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
        noisy = (logits - likeliest) / temperature + noise
        return jnp.argmax(jnp.where(logits >= least, noisy, -jnp.inf), axis=-1)

    token: Array = jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits, axis=-1))
    logit = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]  # NaN if any is: argmax takes it for the largest
    return constrain(jnp.where(jnp.isfinite(logit), token, NON_FINITE).astype(jnp.int32))


def _check(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    slots: int,
) -> None:
    """Refuses what cannot be generated."""
    window = model.config.context_length
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
