"""The one decode loop: prompts in as token ids, continuations out, greedy or sampled.

A fixed number of slots is decoded together, each with its own place in the cache. A sequence that ends leaves its
slot, and the next waiting prompt takes it, so that no slot idles while there is work:

    slot 0    prompt A . . . . . . end | prompt C . . . . . . .
    slot 1    prompt B . . . . . . . . . . . . end | prompt D .

A prompt is run into a cache of its own (`gluprune_jax.inference.prefill`), which is then copied into the slot. What the
next prompt begins with stays there and is not run again.

On a mesh each replica has its own slots and its own cache for prompts, and all replicas do the same at the same time:
as many prompts are run together as there are replicas, and all slots are decoded together. Who decodes them depends on
where the model lies: `gluprune_jax.inference.device_loop`, or on one CPU `gluprune_jax.inference.host_loop`.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from gluprune_jax.errors import OperationError, RequestError, is_out_of_memory
from gluprune_jax.inference.by_layers import runs_by_layers
from gluprune_jax.inference.decoding import Decoding
from gluprune_jax.inference.device_loop import STEPS_PER_CALL, DeviceLoop
from gluprune_jax.inference.host_loop import HostLoop
from gluprune_jax.inference.prefill import CHUNKS, Chunk, append, cache_slots, chunks, extend
from gluprune_jax.inference.sampling import NON_FINITE, Sampling
from gluprune_jax.models.attention import KEY_BLOCK
from gluprune_jax.models.cache import KVCache
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.parallel.mesh import mesh_of, place, shape_of, use_mesh


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
    prompt_lookup: bool = True,
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
      should_stop: asked at least every `STEPS_PER_CALL` tokens with the new tokens of a running sequence; True ends
        it, all tokens so far included.
      temperature: 0 for greedy decoding; else logits are divided by it and a token is drawn.
      top_p: draws from the smallest set of most likely tokens that together have this probability.
      seed: of the draws. A prompt's tokens depend on it and on the prompt's number, not on the other prompts.
      neuron_masks: see `Decoder.__call__`.
      slots: sequences decoded at the same time, in all replicas together; it does not change the result. When the
        devices have no memory for them it is halved, and the unfinished prompts start anew.
      prompt_lookup: whether one CPU may check several tokens of a greedy continuation at once, where what stands
        earlier in the sequence suggests them (prompt lookup decoding). It does not change the result beyond rounding;
        False makes every token cost the same, for measurements.
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
    sampling = Sampling.of(eos_ids, temperature, top_p, seed)
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
        size = slots_for(longest + max_new_tokens)
        decoding = Decoding(
            config, params, replicas * slots, size, dtype, max_new_tokens, sampling=sampling, neuron_masks=neuron_masks
        )
        loop: DeviceLoop | HostLoop
        if runs_by_layers():
            # To draw from many logits takes too long to draw for drafts in vain.
            loop = HostLoop(decoding, prompts, looks_up=prompt_lookup and sampling.temperature is None)
        else:
            loop = DeviceLoop(decoding)
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
                    chosen = loop.admit(prefill.cache, hidden, slot_of, number_of)
                    firsts |= {replica * slots + fresh[replica][0]: int(chosen[replica]) for replica in done}
            if not waiting:
                prefill.close()
            new = loop.decode(is_last=not waiting)
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
                    loop.release(slot)
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

    def close(self) -> None:
        """Gives its memory back: no prompt is run any more."""
        self.cache = self.cache._replace(layers=())


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
