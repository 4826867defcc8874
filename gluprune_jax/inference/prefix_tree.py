"""Which tokens are run, and together with which: sequences that begin alike share their beginning.

Sorted, the sequences are the leaves of a tree of shared prefixes in depth-first order, and the tokens that two
neighbours have in common are run once. A *row* holds up to T tokens of that order (see `causal_attention` for how a row
keeps its sequences apart); subtrees are packed into rows by best fit. A beginning that is too long, or would have to be
repeated in too many rows, is run into a *cache* first, and rows stand on it:

    header (cached) ── question 1 ── endings A, B, C, D    rows of questions with their endings,
                   └── question 2 ── endings A, B, C, D    all standing on the header

The cache is one path from the root. The schedule goes depth first, so that what a branch writes into the cache lies
behind the path that it shares with the next one.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Span:
    """Where a sequence's tokens `first`, `first + 1`, ... are run: at `indices` of a step."""

    sequence: int
    first: int
    indices: NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Extend:
    """Runs `tokens [n]` into the cache, behind the `start` tokens that it holds."""

    start: int
    tokens: Tokens
    spans: tuple[Span, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """Runs n tokens on top of the first `start` of the cache, leaving it as it is.

    Attributes:
      start: how many tokens of the cache all of them see.
      tokens: `[n]` int32 in depth-first order.
      positions: `[n]` int32, their depths in the tree.
      subtree_ends: `[n]` int32 (see `causal_attention`).
      spans: whose tokens are where.
    """

    start: int
    tokens: Tokens
    positions: NDArray[np.int32]
    subtree_ends: NDArray[np.int32]
    spans: tuple[Span, ...]


def schedule(
    sequences: Sequence[Tokens],
    asked: Sequence[int],
    row_length: int,
    *,
    share: bool = True,
    members: Sequence[int] | None = None,
) -> Iterator[Extend | Row]:
    """Plans how sequences are run, each shared prefix once (or as often as is cheaper than caching it).

    Args:
      sequences: token ids of each, at least one.
      asked: for each the first of its tokens that must be found in a span, and with it all that follow.
      row_length: T, the most tokens a row holds; an `Extend` may be of any length.
      share: False runs every sequence on its own.
      members: the numbers of the sequences to run, in the order of `divide`; all when None.

    Yields:
      Steps, in the order in which they must run. Every asked token is in exactly one span.
    """
    order = divide(sequences, asked, 1)[0] if members is None else list(members)
    yield from _Planner([sequences[i] for i in order], [asked[i] for i in order], order, row_length, share).steps()


def divide(sequences: Sequence[Tokens], asked: Sequence[int], parts: int) -> list[list[int]]:
    """Divides sequences into parts of about equal work; those that begin alike stay together as far as that allows.

    Returns:
      For each part the numbers of its sequences, in an order that keeps common beginnings together.
    """
    keys = [sequence.tobytes() for sequence in sequences]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    if parts == 1:
        return [order]
    common = [0, *(_common_prefix(sequences[a], sequences[b]) for a, b in itertools.pairwise(order))]
    # A token that is scored costs about as much as one that is run.
    work = [2 * len(sequences[i]) - asked[i] - shared for i, shared in zip(order, common, strict=True)]
    middles = np.cumsum(work) - np.array(work) / 2
    owners = (middles * parts / max(1, sum(work))).astype(int)
    return [[i for i, owner in zip(order, owners, strict=True) if owner == part] for part in range(parts)]


@dataclasses.dataclass(frozen=True)
class _Run:
    """Neighbours in the order, and how many tokens they have below the cache, shared ones counted once."""

    low: int
    high: int
    size: int


class _Planner:
    def __init__(
        self, sequences: list[Tokens], asked: list[int], numbers: list[int], row_length: int, share: bool
    ) -> None:
        self._sequences, self._asked, self._numbers, self._row_length = sequences, asked, numbers, row_length
        self._lengths = np.array([len(sequence) for sequence in sequences], np.int64)
        # How many tokens each has in common with the one before.
        self._common = np.zeros(len(sequences), np.int64)
        if share:
            for i in range(1, len(sequences)):
                self._common[i] = _common_prefix(sequences[i - 1], sequences[i])

    def steps(self) -> Iterator[Extend | Row]:
        # A stack and no recursion: sequences that are prefixes of one another nest as deep as they are many.
        # Of each run: how many tokens the cache holds, and how many it shall hold.
        todo = [(_Run(0, len(self._sequences), 0), 0, 0)]
        while todo:
            run, held, depth = todo.pop()
            if depth > held:
                yield self._extend(run, held, depth)
            rows, large = self._place(self._subtrees(run.low, run.high, depth), depth)
            for group in _best_fit(rows, self._row_length):
                yield self._row(group, depth)
            todo += [(run, depth, deeper) for run, deeper in reversed(large)]

    def _extend(self, run: _Run, held: int, depth: int) -> Extend:
        path = np.arange(depth - held)
        spans = [self._span(i, held, path) for i in range(run.low, run.high) if self._asked[i] < depth]
        return Extend(held, self._sequences[run.low][held:depth], tuple(span for span in spans if span))

    def _subtrees(self, low: int, high: int, depth: int) -> list[_Run]:
        """Runs of neighbours with more than `depth` tokens in common, leaving out what has no more than that."""
        low += int(np.searchsorted(self._lengths[low:high] > depth, True))  # those that end there come first
        if low == high:
            return []
        cuts = low + 1 + np.flatnonzero(self._common[low + 1 : high] <= depth)
        bounds = [low, *cuts.tolist(), high]
        new = self._lengths[low:high] - np.maximum(self._common[low:high], depth)
        new[0] = self._lengths[low] - depth
        sizes = np.add.reduceat(new, np.array(bounds[:-1]) - low)
        return [_Run(a, b, int(n)) for a, b, n in zip(bounds[:-1], bounds[1:], sizes, strict=True)]

    def _place(self, runs: Sequence[_Run], depth: int) -> tuple[list[_Run], list[tuple[_Run, int]]]:
        """Decides how subtrees are run: within rows, or on a longer cache, whose length it says."""
        T = self._row_length
        rows: list[_Run] = []
        large: list[tuple[_Run, int]] = []
        todo = [*reversed(runs)]
        while todo:
            run = todo.pop()
            if run.size <= T:
                rows.append(run)
                continue
            shared = int(min(self._common[run.low + 1 : run.high], default=self._lengths[run.low]))
            trunk = shared - depth
            whole = trunk // T * T  # full steps
            if whole and run.size - whole <= T:
                large.append((run, depth + whole))
                continue
            if trunk < T:
                copies = -(-(run.size - trunk) // (T - trunk)) - 1
                # A cached trunk costs a step of its own, and its last row stays half empty on average.
                if copies * trunk <= T - trunk + T // 2:
                    todo += reversed(self._repeat(run, depth, shared))
                    continue
            large.append((run, shared))
        return rows, large

    def _repeat(self, run: _Run, depth: int, shared: int) -> list[_Run]:
        """Cuts a subtree into smaller ones that each repeat its trunk; they fit a row, but for single branches."""
        trunk = shared - depth
        parts = []
        low, size = run.low, trunk
        for branch in self._subtrees(run.low, run.high, shared):
            if size + branch.size > self._row_length and low < branch.low:
                parts.append(_Run(low, branch.low, size))
                low, size = branch.low, trunk
            size += branch.size
            if size > self._row_length:
                parts.append(_Run(low, branch.high, size))
                low, size = branch.high, trunk
        if low < run.high:
            parts.append(_Run(low, run.high, size))
        return parts

    def _row(self, runs: Sequence[_Run], depth: int) -> Row:
        tokens: list[Tokens] = []
        positions: list[NDArray[np.int64]] = []
        ends = np.zeros(sum(run.size for run in runs), np.int32)
        spans, n = [], 0
        for run in runs:
            path = np.zeros(0, np.int64)  # the index in the row of each token from `depth` on
            for i in range(run.low, run.high):
                common = depth if i == run.low else max(depth, int(self._common[i]))
                ends[path[common - depth :]] = n
                fresh = self._sequences[i][common:]
                tokens.append(fresh)
                positions.append(np.arange(common, common + len(fresh)))
                path = np.concatenate([path[: common - depth], np.arange(n, n + len(fresh))])
                n += len(fresh)
                if span := self._span(i, depth, path):
                    spans.append(span)
            ends[path] = n
        return Row(depth, np.concatenate(tokens), np.concatenate(positions).astype(np.int32), ends, tuple(spans))

    def _span(self, i: int, depth: int, path: NDArray[np.int64]) -> Span | None:
        """The asked tokens of sequence `i` on a path that begins at `depth`."""
        first = max(self._asked[i], depth)
        indices = path[first - depth : len(self._sequences[i]) - depth].astype(np.int32)
        return Span(self._numbers[i], first, indices) if len(indices) else None


def _common_prefix(a: Tokens, b: Tokens) -> int:
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    return int(different.argmax()) if different.any() else n


def _best_fit(runs: Sequence[_Run], capacity: int) -> list[list[_Run]]:
    """Packs runs into as few rows as best fit, the largest first, can."""
    rows: list[list[_Run]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by how many tokens they still hold
    for run in sorted(runs, key=lambda run: -run.size):
        room = next((room for room in range(run.size, capacity + 1) if by_room[room]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, capacity
        else:
            row = by_room[room].pop()
        rows[row].append(run)
        by_room[room - run.size].append(row)
    return rows
