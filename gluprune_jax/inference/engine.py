"""Log-likelihoods and continuations of token sequences: what every benchmark asks of a model, and nothing else.

Token ids in, numbers out. What is not done is what makes it fast: a prefix shared by several requests is run once
(`gluprune_jax.inference.prefix_tree`), logits exist only for the tokens that are asked about, some hundred at a time,
and lengths, masks, end tokens and temperatures are arrays, so that a handful of compiled programs serves a whole suite.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray

from gluprune_jax.errors import OperationError, RequestError, is_out_of_memory
from gluprune_jax.inference.by_layers import run_layers, runs_by_layers
from gluprune_jax.inference.generation import generate, slots_for
from gluprune_jax.inference.prefill import CHUNKS, Chunk, append, cache_slots, chunk_sizes, chunks, extend
from gluprune_jax.inference.prefix_tree import Extend, Row, Span, divide, schedule
from gluprune_jax.models.cache import KVCache
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import bind
from gluprune_jax.parallel.distributed import min_over_processes
from gluprune_jax.parallel.machine import free_memory
from gluprune_jax.parallel.mesh import block_on_cpu, mesh_of, place, shape_of, use_mesh
from gluprune_jax.parallel.sharding import constrain

# Tokens of a row: long rows waste less at their ends, short ones less on attention to what is masked. What is left
# over at the end runs in the smaller size.
ROW_LENGTHS = CHUNKS
# Tokens whose logits are formed by one call: most rows ask about few, a document about all. On CPUs the logits of 128
# stay in the cache between the passes over them; a token costs three quarters of what it costs among 256.
SCORED_TOKENS, CPU_SCORED_TOKENS = (32, 256), (32, 128)
# Tokens of one call on an accelerator, and sequences that it decodes together: enough to keep it busy.
_ACCELERATOR_TOKENS, _ACCELERATOR_SLOTS, _CPU_SLOTS = 8192, 64, 8
# Calls whose results are not waited for yet.
BATCHES_IN_FLIGHT = 2


class LogLikelihood(NamedTuple):
    """What a model makes of a continuation.

    Attributes:
      value: natural logarithm of its probability given the context, summed over its tokens.
      is_greedy: whether greedy decoding would have said the same.
    """

    value: float
    is_greedy: bool


@dataclasses.dataclass
class _Question:
    """A request on its way: what must follow its sequence's tokens from `first` on, and what is known of it so far."""

    first: int
    targets: NDArray[np.int32]
    missing: int
    value: float = 0.0
    is_greedy: bool = True


class _Piece(NamedTuple):
    """Tokens of a question: at `indices` of a replica's hidden states, followed by `targets`."""

    question: int
    indices: NDArray[np.int32]
    targets: NDArray[np.int32]


class Engine:
    """Scores and generates with one model.

    Args:
      model: the model; activations have the dtype of its embedding, log-probabilities are float32.
      neuron_masks: see `Decoder.__call__`. Models of all masks and none share the compiled programs.
      batch_size: rows of 512 tokens in one call, and sequences decoded together, in each replica; by default from the
        free memory. An out-of-memory error halves it. Results do not depend on it beyond rounding.
      context_length: the window in tokens, if it is to be smaller than the model's.
      share_prefixes: False runs every request on its own, which takes longer and gives the same.
      note: called with what the user should know, in a sentence.

    A model on a mesh is run as one program: each replica runs its part of the requests, all at the same time.

    Attributes:
      model: the model.
      params: its parameters.
      mesh: what they lie on; None for one device.
      replicas: R, how many there are of the model.
      window: the most tokens the model sees at once.
      truncated: how many contexts have been cut to fit so far.

    Raises:
      RequestError: `batch_size` or `context_length` out of range.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        neuron_masks: tuple[ArrayLike, ...] | None = None,
        batch_size: int | None = None,
        context_length: int | None = None,
        share_prefixes: bool = True,
        note: Callable[[str], None] | None = None,
    ) -> None:
        window = model.config.context_length
        if context_length is not None and not 2 <= context_length <= window:
            raise RequestError(
                f"`context_length` is {context_length}; it must lie between 2 and the model's window of {window}"
            )
        if batch_size is not None and batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}; it must be at least 1")
        self.model = model
        self.window = window if context_length is None else context_length
        self.truncated = 0
        widths = model.config.stored_intermediate_sizes
        masks = [np.ones(width, np.float32) for width in widths] if neuron_masks is None else neuron_masks
        self.mesh = mesh_of(model)
        self.replicas = shape_of(self.mesh).data
        masks = [np.asarray(mask, np.float32) for mask in masks]
        self._masks = tuple(jax.device_put(mask) if self.mesh is None else place(self.mesh, mask) for mask in masks)
        self._batch_size, self._share, self._note = batch_size, share_prefixes, note or (lambda _: None)
        self.params = nnx.state(model, nnx.Param)
        self._rows_at_once: int | None = None
        self._proven: set[tuple[int, int]] = set()  # batches that fit into the memory

    # ------------------------------------------------------------------------------------------- log-likelihoods

    def loglikelihood(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        on_result: Callable[[int, LogLikelihood], None] | None = None,
    ) -> list[LogLikelihood]:
        """The log-likelihood of each continuation given its context.

        Args:
          requests: token ids of context and continuation, neither empty. Together they are cut on the left to
            `window + 1` tokens (the last is only predicted), which `truncated` counts.
          on_result: called with the number of a request and its result as soon as it is known.

        Raises:
          RequestError: an empty context or continuation, a continuation longer than the window, or a token id outside
            the vocabulary.
          OperationError: the model gives log-likelihoods that are not finite.
        """
        results: list[LogLikelihood | None] = [None] * len(requests)
        sequences: list[NDArray[np.int32]] = []
        numbers: dict[bytes, int] = {}
        askers: list[list[int]] = []  # the requests that are answered by each sequence
        questions: list[_Question] = []
        for number, (context, continuation) in enumerate(requests):
            if not len(context) or not len(continuation):
                raise RequestError(f"request {number} has an empty context or continuation; both need a token")
            if len(continuation) > self.window:
                raise RequestError(
                    f"a continuation of {len(continuation)} tokens is longer than the window of {self.window}"
                )
            tokens = np.array([*context, *continuation], np.int32)
            if len(tokens) > self.window + 1:
                self.truncated += 1
                tokens = tokens[-(self.window + 1) :]
            sequence = tokens[:-1]
            key = sequence.tobytes() if self._share else str(number).encode()
            if key not in numbers:
                numbers[key] = len(sequences)
                sequences.append(sequence)
                askers.append([])
            askers[numbers[key]].append(number)
            targets = tokens[len(tokens) - len(continuation) :]
            questions.append(_Question(len(sequence) - len(targets), targets, len(targets)))
        for sequence in sequences:
            self.model.config.check_tokens(sequence)
        for question in questions:
            self.model.config.check_tokens(question.targets)

        def record(number: int, value: float, is_greedy: bool) -> None:
            if not math.isfinite(value):
                raise OperationError(
                    f"non-finite log-likelihood ({value:g}) for request {number}; check the weights, or use `dtype` "
                    f"float32"
                )
            results[number] = result = LogLikelihood(value, is_greedy)
            if on_result:
                on_result(number, result)

        asked = [min(questions[number].first for number in group) for group in askers]
        if sequences:
            with use_mesh(self.mesh):
                self._run(sequences, asked, _Scorer(self, questions, askers, record))
        return [result for result in results if result is not None]

    def loglikelihood_rolling(
        self,
        documents: Sequence[Sequence[int]],
        *,
        prefix_token: int,
        on_result: Callable[[int, float], None] | None = None,
    ) -> list[float]:
        """The log-likelihood of whole documents: every token is predicted once.

        A document longer than the window is predicted in disjoint pieces of `window` tokens; the first is conditioned
        on `prefix_token`, the others on as much of what comes before as fits (at least a token).

        Args:
          documents: token ids; an empty one has the log-likelihood 0.
          prefix_token: what stands before the first token.
          on_result: called with the number of a document and its result as soon as it is known.

        Raises:
          RequestError: a token id outside the vocabulary.
          OperationError: the model gives log-likelihoods that are not finite.
        """
        results = [0.0] * len(documents)
        windows: list[tuple[Sequence[int], Sequence[int]]] = []
        owners: list[int] = []
        unknown: list[set[int]] = []  # windows of each document
        for number, tokens in enumerate(documents):
            own = list(rolling_windows(tokens, prefix_token, self.window))
            unknown.append(set(range(len(windows), len(windows) + len(own))))
            windows += own
            owners += [number] * len(own)
            if not own and on_result:
                on_result(number, 0.0)

        def record(window: int, result: LogLikelihood) -> None:
            number = owners[window]
            results[number] += result.value
            unknown[number].remove(window)
            if not unknown[number] and on_result:
                on_result(number, results[number])

        self.loglikelihood(windows, on_result=record)
        return results

    def _run(self, sequences: Sequence[NDArray[np.int32]], asked: Sequence[int], scorer: "_Scorer") -> None:
        """Runs sequences, each from its asked token on to be scored."""
        parts = divide(sequences, asked, self.replicas)
        lanes = [_ReplicaSchedule(sequences, asked, part, share=self._share) for part in parts]
        slots = cache_slots(max(lane.longest for lane in lanes))
        cache = KVCache.empty(self.model.config, self.replicas, slots, self._dtype)
        while wanted := collections.Counter(call for lane in lanes if (call := lane.wants())):
            # All replicas do the same at the same time: what most are waiting for, while the others idle.
            (call, _), *_ = wanted.most_common()
            if call.program == "rows":
                self._run_rows([lane if lane.wants() == call else None for lane in lanes], call.length, cache, scorer)
            else:
                cache = self._extend(lanes, call, cache, scorer)
        scorer.finish()

    def _extend(self, lanes: "Sequence[_ReplicaSchedule]", call: "_Call", cache: KVCache, scorer: "_Scorer") -> KVCache:
        """Runs the next chunk of each lane that waits for this call into the cache, which it takes."""
        tokens = np.zeros((len(lanes), call.length), np.int32)
        held, counts = np.zeros((2, len(lanes)), np.int32)
        spans: list[list[tuple[int, Span]]] = [[] for _ in lanes]
        for replica, lane in enumerate(lanes):
            if lane.wants() == call:
                step, chunk = lane.take_chunk()
                lane.held = step.start + chunk.start
                counts[replica], tokens[replica] = chunk.length, chunk.tokens[0]
                parts = (_within(span, chunk.start, chunk.length) for span in step.spans)
                spans[replica] = [(0, part) for part in parts if part]
            held[replica] = lane.held
            lane.held += counts[replica]
        cache = cache.holding(held)
        placed = place(self.mesh, tokens, "batch", None)
        hidden, new = extend(self.model.config, self.params, cache, placed, self._masks)
        cache = append(cache, new, counts)
        block_on_cpu(self.mesh, cache)
        scorer.score(hidden, spans)
        return cache

    def _run_rows(
        self, lanes: "Sequence[_ReplicaSchedule | None]", length: int, cache: KVCache, scorer: "_Scorer"
    ) -> None:
        """Runs the next rows of each lane."""
        while True:
            at_once = self._rows(length)
            batch = [[] if lane is None else lane.rows[length][:at_once] for lane in lanes]
            try:
                hidden = self._forward(batch, length, at_once, cache)
                break
            except Exception as error:
                # What one process has no memory for, the others go on with.
                if not is_out_of_memory(error) or at_once == 1 or jax.process_count() > 1:
                    raise
                self._rows_at_once = max(1, self._rows(ROW_LENGTHS[-1]) // 2)
                self._note(f"out of memory: continuing with {self._rows_at_once} rows of 512 tokens at a time")
        for lane, rows_of_lane in zip(lanes, batch, strict=True):
            if lane is not None:
                del lane.rows[length][: len(rows_of_lane)]
        scorer.score(
            hidden, [[(i * length, span) for i, row in enumerate(part) for span in row.spans] for part in batch]
        )

    def _forward(self, batch: Sequence[Sequence[Row]], length: int, at_once: int, cache: KVCache) -> Array:
        """Hidden states `[R, at_once * length, D]` of rows of each replica."""
        shape = len(batch) * at_once, length
        tokens, positions = (np.zeros(shape, np.int32) for _ in range(2))
        ends = np.broadcast_to(np.arange(1, length + 1, dtype=np.int32), shape).copy()  # padding sees itself
        held = np.zeros(len(batch), np.int32)
        for replica, part in enumerate(batch):
            for i, row in enumerate(part, start=replica * at_once):
                n = len(row.tokens)
                tokens[i, :n], positions[i, :n], ends[i, :n] = row.tokens, row.positions, row.subtree_ends
                held[replica] = row.start
        a, b, c = (place(self.mesh, values, "batch", None) for values in (tokens, positions, ends))
        hidden = rows(self.model.config, self.params, cache.holding(held), a, b, c, self._masks)
        block_on_cpu(self.mesh, hidden)
        if (at_once, length) not in self._proven:
            hidden.block_until_ready()  # elsewhere nobody would know which batch was too large
            self._proven.add((at_once, length))
        return hidden

    @property
    def _dtype(self) -> Any:
        return self.model.embed_tokens[...].dtype

    def _rows(self, length: int) -> int:
        """Rows of a length in one call."""
        longest = ROW_LENGTHS[-1]
        if self._rows_at_once is None:
            if self._batch_size is not None:
                self._rows_at_once = self._batch_size
            elif jax.default_backend() == "cpu":
                self._rows_at_once = 1
            else:
                config, divided = self.model.config, shape_of(self.mesh).model
                widths = 2 * max(config.stored_intermediate_sizes) // divided + 8 * config.hidden_size
                row = longest * (widths * self._dtype.itemsize + config.num_attention_heads * longest * 4 // divided)
                self._rows_at_once = max(
                    1, min(_ACCELERATOR_TOKENS // longest, min_over_processes(free_memory()) // 4 // row)
                )
        return self._rows_at_once if self._rows_at_once == 1 else self._rows_at_once * longest // length

    # ------------------------------------------------------------------------------------------------- generation

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int] = (),
        should_stop: Callable[[Sequence[int]], bool] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_tokens: Callable[[int], None] | None = None,
        on_result: Callable[[int, list[int]], None] | None = None,
    ) -> list[list[int]]:
        """Continues prompts: `gluprune_jax.inference.generation.generate` with as many slots as the memory allows.

        Raises:
          RequestError: as there; a prompt and its continuation must fit the window.
        """
        longest = max(map(len, prompts), default=0) + max_new_tokens
        if longest > self.window:
            raise RequestError(
                f"a prompt of {longest - max_new_tokens} tokens and {max_new_tokens} new ones do not fit the window of "
                f"{self.window}"
            )
        slots = self._batch_size
        if slots is None:
            config, on_cpu = self.model.config, jax.default_backend() == "cpu"
            heads = config.num_key_value_heads // (1 if self.mesh is None else self.mesh.shape["kv"])
            token_bytes = 2 * heads * config.head_dim * self._dtype.itemsize
            slot_bytes = slots_for(longest) * config.num_hidden_layers * token_bytes
            slots = max(
                1,
                min(_CPU_SLOTS if on_cpu else _ACCELERATOR_SLOTS, min_over_processes(free_memory()) // 3 // slot_bytes),
            )
            slots = 1 << (slots.bit_length() - 1)
        slots *= self.replicas
        return generate(
            self.model,
            prompts,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            should_stop=should_stop,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            neuron_masks=self._masks,
            slots=slots,
            on_tokens=on_tokens,
            on_result=on_result,
            on_out_of_memory=lambda n: self._note(f"out of memory: continuing with {n} sequences at a time"),
        )


class _Call(NamedTuple):
    """A program that a lane waits for: "extend" or "rows", of so many tokens."""

    program: str
    length: int


class _ReplicaSchedule:
    """One replica's way through its part of the sequences.

    Attributes:
      longest: the most tokens that the cache must hold for it.
      held: how many it holds.
      rows: those that stand on them, by length.
    """

    def __init__(
        self, sequences: Sequence[NDArray[np.int32]], asked: Sequence[int], members: Sequence[int], *, share: bool
    ) -> None:
        steps = schedule(sequences, asked, ROW_LENGTHS[-1], share=share, members=members) if members else ()
        self._steps = collections.deque(steps)
        self.longest = max((s.start + len(s.tokens) for s in self._steps if isinstance(s, Extend)), default=0)
        self.held = 0
        self.rows: dict[int, list[Row]] = {length: [] for length in ROW_LENGTHS}
        self._chunks: collections.deque[tuple[Extend, Chunk]] = collections.deque()

    def wants(self) -> _Call | None:
        """What must run next; None when all is done."""
        if not self._chunks and not any(self.rows.values()):
            self._take_steps()
        for length, waiting in self.rows.items():
            if waiting:
                return _Call("rows", length)
        return _Call("extend", self._chunks[0][1].tokens.shape[1]) if self._chunks else None

    def take_chunk(self) -> tuple[Extend, Chunk]:
        """The next part of what the cache must hold."""
        return self._chunks.popleft()

    def _take_steps(self) -> None:
        """Takes all rows that stand on the same cache, to run many together; or what the cache must hold next."""
        while self._steps:
            step = self._steps[0]
            if isinstance(step, Extend):
                if not any(self.rows.values()):
                    self._chunks.extend((step, chunk) for chunk in chunks(step.tokens))
                    self._steps.popleft()
                return
            self._steps.popleft()
            self.rows[next(length for length in ROW_LENGTHS if len(step.tokens) <= length)].append(step)


class _Scorer:
    """Looks up the targets of questions in hidden states, and adds up what they say."""

    def __init__(
        self,
        engine: Engine,
        questions: Sequence[_Question],
        askers: Sequence[Sequence[int]],
        learn: Callable[[int, float, bool], None],
    ) -> None:
        self._engine, self._questions, self._askers, self._learn = engine, questions, askers, learn
        self._pending: collections.deque[Callable[[], None]] = collections.deque()

    def score(self, hidden: Array, spans: Sequence[Sequence[tuple[int, Span]]]) -> None:
        """Takes hidden states `[R, n, D]`, and each replica's spans with where in its `n` their row begins."""
        pieces = [self._pieces(part) for part in spans]
        longest = max(sum(len(indices) for _, indices, _ in part) for part in pieces)
        if not longest:
            return
        where, targets = np.zeros((2, len(pieces), longest), np.int32)
        for replica, part in enumerate(pieces):
            if part:
                for rows_of_all, values in zip((where, targets), list(zip(*part, strict=True))[1:], strict=True):
                    joined = np.concatenate(values)
                    rows_of_all[replica, : len(joined)] = joined
        outputs = []
        sizes = CPU_SCORED_TOKENS if jax.default_backend() == "cpu" else SCORED_TOKENS
        engine = self._engine
        for start, size in chunk_sizes(longest, *sizes):
            padding = ((0, 0), (0, max(0, start + size - longest)))
            chunk = (np.pad(part[:, start : start + size], padding) for part in (where, targets))
            placed = [place(engine.mesh, part, "batch", None) for part in chunk]
            outputs.append(score_tokens(engine.model.config, engine.params, hidden, *placed))
            block_on_cpu(engine.mesh, outputs[-1])
        self._pending.append(functools.partial(self._hand_out, pieces, outputs))
        # Looking at a result waits for it; the next steps can be on their way meanwhile.
        while len(self._pending) > BATCHES_IN_FLIGHT:
            self._pending.popleft()()

    def finish(self) -> None:
        """Waits for what is still on its way."""
        while self._pending:
            self._pending.popleft()()

    def _pieces(self, spans: Sequence[tuple[int, Span]]) -> list[_Piece]:
        pieces = []
        for offset, span in spans:
            for number in self._askers[span.sequence]:
                question = self._questions[number]
                skip = max(question.first - span.first, 0)
                indices = span.indices[skip:] + np.int32(offset)
                if len(indices):
                    begin = span.first + skip - question.first
                    pieces.append(_Piece(number, indices, question.targets[begin : begin + len(indices)]))
        return pieces

    def _hand_out(self, pieces: Sequence[Sequence[_Piece]], outputs: Sequence[tuple[Array, Array]]) -> None:
        values, greedy = (
            np.concatenate([np.asarray(part) for part in parts], axis=1) for parts in zip(*outputs, strict=True)
        )
        for replica, own in enumerate(pieces):
            at = 0
            for number, indices, _ in own:
                question, part = self._questions[number], slice(at, at + len(indices))
                at += len(indices)
                question.value += math.fsum(values[replica, part].tolist())
                question.is_greedy &= bool(greedy[replica, part].all())
                question.missing -= len(indices)
                if not question.missing:
                    self._learn(number, question.value, question.is_greedy)


# ------------------------------------------------------------------------------------------------ compiled programs


def rows(
    config: ModelConfig,
    params: nnx.State[Any, Any],
    cache: KVCache,
    tokens: Array,
    positions: Array,
    subtree_ends: Array,
    neuron_masks: tuple[ArrayLike, ...],
) -> Array:
    """Hidden states `[R, B * T, D]` of rows `tokens [R * B, T]`, B in each replica, standing on its row of `cache`."""
    if runs_by_layers():
        hidden, _ = run_layers(config, params, cache, tokens, positions, subtree_ends, neuron_masks)
        return hidden.reshape(cache.lengths.shape[0], -1, hidden.shape[-1])
    whole: Array = whole_rows(config, params, cache, tokens, positions, subtree_ends, neuron_masks)
    return whole


@functools.partial(jax.jit, static_argnums=0)
def whole_rows(
    config: ModelConfig,
    params: nnx.State[Any, Any],
    cache: KVCache,
    tokens: Array,
    positions: Array,
    subtree_ends: Array,
    neuron_masks: tuple[ArrayLike, ...],
) -> Array:
    """`rows` as one program."""
    chex.assert_is_divisible(tokens.shape[0], cache.lengths.shape[0])
    hidden, _ = bind(config, params)(tokens, positions, [cache], subtree_ends, neuron_masks)
    return hidden.reshape(cache.lengths.shape[0], -1, hidden.shape[-1])


@functools.partial(jax.jit, static_argnums=0)
def score_tokens(
    config: ModelConfig, params: nnx.State[Any, Any], hidden: Array, indices: Array, targets: Array
) -> tuple[Array, Array]:
    """What follows tokens of each of R replicas.

    Args:
      config: of the model.
      params: of the model.
      hidden: `[R, n, D]`.
      indices: `[R, Q]` int32, which of the n.
      targets: `[R, Q]` int32, what follows them.

    Returns:
      `[R, Q]` float32 log-probabilities of the targets, and `[R, Q]` whether each is the likeliest.
    """
    chex.assert_shape(hidden, (indices.shape[0], None, config.hidden_size))
    chex.assert_equal_shape([indices, targets])
    asked = constrain(jax.vmap(lambda own, where: own[where])(hidden, indices), "batch", None, None)
    logits = bind(config, params).logits(asked.reshape(-1, asked.shape[-1]))  # [R * Q, V]
    target = jnp.take_along_axis(logits, targets.reshape(-1, 1), axis=-1)
    # Of equal logits the first is the likeliest. Not argmax(logits) == targets: on CPUs, argmax takes as long as the
    # logarithm of the sum.
    earlier = jnp.arange(logits.shape[-1]) < targets.reshape(-1, 1)
    is_greedy = ~jnp.any((logits > target) | ((logits == target) & earlier), axis=-1)
    values = target[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    return constrain(values.reshape(targets.shape)), constrain(is_greedy.reshape(targets.shape))


# ---------------------------------------------------------------------------------------------------------- windows


def rolling_windows(
    tokens: Sequence[int], prefix_token: int, window: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Cuts a document into contexts and continuations that together predict every token once, as lm-eval cuts it.

    Yields:
      Contexts and continuations, of `window + 1` tokens together, fewer where the document is shorter.
    """
    if len(tokens):
        yield [prefix_token], tokens[:window]
    for start in range(window, len(tokens), window):
        end = min(start + window, len(tokens))
        yield tokens[end - window - 1 : start], tokens[start:end]


def _within(span: Span, start: int, length: int) -> Span | None:
    """The part of a span whose indices lie in a chunk, counted from the chunk's beginning."""
    low, high = np.searchsorted(span.indices, [start, start + length])
    if low == high:
        return None
    return Span(span.sequence, span.first + int(low), span.indices[low:high] - np.int32(start))
