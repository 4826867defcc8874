"""Whatever the schedule, every asked token is run once, behind exactly the tokens that precede it in its sequence."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gluprune_jax.inference.prefix_tree import Extend, Row, schedule

ROW = 512  # the engine's

# Few different tokens, so that much is shared, by accident too.
POOL = np.random.default_rng(0).integers(0, 97, 200_000).astype(np.int32)


def sequence(*parts: Iterable[int]) -> NDArray[np.int32]:
    return np.concatenate([np.zeros(0, np.int32), *(np.asarray(part, np.int32) for part in parts)])


def ancestors(row: Row, index: int) -> NDArray[np.int64]:
    """Indices in the row that `index` sees, itself last: the definition in `causal_attention`."""
    return np.flatnonzero(row.subtree_ends[: index + 1] > index)


def run(
    sequences: Sequence[NDArray[np.int32]], asked: Sequence[int] | None, row_length: int, share: bool = True
) -> list[Extend | Row]:
    """The schedule, after acting it out: what is in the cache and in the rows is what it ought to be."""
    asked = [0] * len(sequences) if asked is None else asked
    steps = list(schedule(sequences, asked, row_length, share=share))
    cache = np.zeros(0, np.int32)
    found: list[tuple[int, int]] = []
    for step in steps:
        assert 0 <= step.start <= len(cache)
        assert len(step.tokens)
        held = cache[: step.start]
        if isinstance(step, Extend):
            cache = np.concatenate([held, step.tokens])
        else:
            n = len(step.tokens)
            assert n <= row_length
            assert step.positions.shape == step.subtree_ends.shape == (n,)
            assert (np.arange(n) < step.subtree_ends).all()
            assert (step.subtree_ends <= n).all()
            assert {step.tokens.dtype, step.positions.dtype, step.subtree_ends.dtype} == {np.dtype(np.int32)}
        for span in step.spans:
            assert span.indices.dtype == np.int32
            assert len(span.indices)
            assert (np.diff(span.indices) > 0).all()
            whole = sequences[span.sequence]
            found += [(span.sequence, span.first + i) for i in range(len(span.indices))]
            # The last token's ancestors contain those of all before it, if the order of the indices is right.
            last = int(span.indices[-1])
            if isinstance(step, Extend):
                assert span.indices.tolist() == list(range(span.first - step.start, last + 1))
                before = cache[: step.start + last + 1]
            else:
                path = ancestors(step, last)
                assert path[span.first - step.start :].tolist() == span.indices.tolist()
                assert step.positions[path].tolist() == list(range(step.start, step.start + len(path)))
                for i in {int(span.indices[0]), int(span.indices[len(span.indices) // 2])}:
                    assert ancestors(step, i).tolist() == path[path <= i].tolist()
                before = np.concatenate([held, step.tokens[path]])
            assert before.tolist() == whole[: span.first + len(span.indices)].tolist()
    assert len(set(found)) == len(found), "a token is in two spans"
    assert set(found) == {(i, j) for i, whole in enumerate(sequences) for j in range(asked[i], len(whole))}
    return steps


def tokens_run(steps: Iterable[Extend | Row]) -> int:
    return sum(len(step.tokens) for step in steps)


def distinct_prefixes(sequences: Iterable[NDArray[np.int32]]) -> int:
    return len({whole[: i + 1].tobytes() for whole in sequences for i in range(len(whole))})


def padded(steps: Iterable[Extend | Row]) -> int:
    """Tokens that the device computes: steps are padded to 128 or 512."""
    total = 0
    for step in steps:
        whole, rest = divmod(len(step.tokens), ROW)
        total += whole * ROW + next(size for size in (0, 128, 256, ROW) if rest <= size)
    return total


# -------------------------------------------------------------------------------------------------- properties

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(sequence)


@st.composite
def forests(draw: st.DrawFn) -> list[NDArray[np.int32]]:
    """Sequences that grow out of one another, with duplicates and prefixes of one another, in any order."""
    grown = [draw(tokens)]
    for _ in range(draw(st.integers(0, 25))):
        parent = draw(st.sampled_from(grown))
        cut = draw(st.integers(0, len(parent)))
        tail = draw(st.one_of(st.just(sequence()), tokens, st.sampled_from((20, 64, 200)).map(lambda n: POOL[:n] % 3)))
        if cut + len(tail):
            grown.append(sequence(parent[:cut], tail))
    return draw(st.permutations(grown))


@settings(deadline=None, max_examples=150, database=None)
@given(sequences=forests(), row_length=st.sampled_from((1, 2, 4, 8, 16, 32, 100)), data=st.data())
def test_every_asked_token_is_run_once_behind_its_prefix(
    sequences: list[NDArray[np.int32]], row_length: int, data: st.DataObject
) -> None:
    asked = [data.draw(st.integers(0, len(whole) - 1)) for whole in sequences]
    shared = tokens_run(run(sequences, asked, row_length))
    alone = tokens_run(run(sequences, asked, row_length, share=False))
    assert alone == sum(map(len, sequences))
    assert distinct_prefixes(sequences) <= shared <= alone


@settings(deadline=None, max_examples=60, database=None)
@given(sequences=forests())
def test_what_fits_a_row_is_run_in_one_with_nothing_twice(sequences: list[NDArray[np.int32]]) -> None:
    distinct = distinct_prefixes(sequences)
    (row,) = run(sequences, None, distinct)
    assert isinstance(row, Row)
    assert (row.start, len(row.tokens)) == (0, distinct)


@settings(deadline=None, max_examples=60, database=None)
@given(sequences=forests(), row_length=st.sampled_from((4, 16, 100)))
def test_the_order_of_the_sequences_does_not_matter(sequences: list[NDArray[np.int32]], row_length: int) -> None:
    assert tokens_run(run(sequences, None, row_length)) == tokens_run(run(sequences[::-1], None, row_length))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_forests_like_those_of_benchmarks(seed: int, share: bool) -> None:
    """Headers, questions that share one, endings that share a question; rows of the real length."""
    random = np.random.default_rng(seed)

    def fresh(*lengths: int) -> NDArray[np.int32]:
        return random.integers(0, 97, random.choice(lengths)).astype(np.int32)

    sequences = []
    for _ in range(4):
        header = fresh(1, 60, 300, 511, 512, 513, 1500)
        for _ in range(random.integers(1, 12)):
            question = sequence(header, fresh(5, 40, 200, 700))
            sequences += [sequence(question, fresh(1, 3, 30)) for _ in range(random.choice((1, 4)))]
    asked = [len(whole) - int(random.integers(1, min(4, len(whole) + 1))) for whole in sequences]
    steps = run(sequences, asked, ROW, share)
    if share:
        alone = run(sequences, asked, ROW, share=False)
        assert tokens_run(steps) < tokens_run(alone) / 1.5
        assert padded(steps) < padded(alone) + 2 * ROW


# ---------------------------------------------------------------------------------------------- what is shared


@pytest.mark.parametrize("header", [400, 512, 700, 1024, 2000])
def test_a_header_shared_by_many_is_run_once(header: int) -> None:
    sequences = [sequence(POOL[:header], [i], POOL[i : i + 60]) for i in range(96)]
    steps = run(sequences, None, ROW)
    (cached,) = (step for step in steps if isinstance(step, Extend))
    assert (cached.start, len(cached.tokens)) == (0, header)
    assert tokens_run(steps) == distinct_prefixes(sequences) == header + 96 * 61
    rows = [step for step in steps if isinstance(step, Row)]
    assert {row.start for row in rows} == {header}
    assert len(rows) == -(-96 // (ROW // 61)), "rows are filled"


@pytest.mark.parametrize("header", [1, 20, 100, 200])
def test_a_short_header_is_run_again_only_where_that_is_cheaper(header: int) -> None:
    for count in (5, 10, 20, 40, 80):
        sequences = [sequence(POOL[:header], [i], POOL[i : i + 60]) for i in range(count)]
        steps = run(sequences, None, ROW)
        again = tokens_run(steps) - distinct_prefixes(sequences)
        assert again % header == 0
        assert again <= 3 * ROW // 2, "caching it would have cost less"
        if any(isinstance(step, Extend) for step in steps):
            assert again == 0


def test_headers_within_headers_are_each_run_once() -> None:
    sequences = [
        sequence(POOL[:600], [a], POOL[a : a + 600], [b], POOL[b : b + 600], [c])
        for a, b, c in itertools.product(range(3), range(3), range(30))
    ]
    steps = run(sequences, None, ROW)
    assert tokens_run(steps) == distinct_prefixes(sequences) == 600 + 3 * 601 + 9 * (601 + 30)
    assert padded(steps) < 1.3 * tokens_run(steps)


def test_nothing_is_shared_where_that_is_not_wanted() -> None:
    sequences = [sequence(POOL[:100], [i]) for i in range(10)] + [POOL[:700]] * 2
    steps = run(sequences, None, ROW, share=False)
    assert tokens_run(steps) == 10 * 101 + 2 * 700
    assert all(len({span.sequence for span in step.spans}) == 1 for step in steps if isinstance(step, Extend))
    packed = [step for step in steps if isinstance(step, Row) and step.start == 0]
    assert len(packed) == 2, "short sequences still stand side by side in a row"


# -------------------------------------------------------------------------------------------- degenerate shapes


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("row_length", [1, 3, 8, ROW])
@pytest.mark.parametrize(
    "sequences",
    [
        [[5]],
        [[5], [5], [6]],
        [[5], [5, 6], [5, 6, 7], [5, 6]],
        [[5, 6, 7]] * 4,
        [[0], [256], [65536], [1], [0, 256]],  # token ids of several bytes
        [range(8), range(16), range(24)],
        [range(9)],
        [[*range(8), 1], [*range(8), 2], range(8)],
    ],
    ids=str,
)
def test_degenerate_shapes(sequences: list[list[int]], row_length: int, share: bool) -> None:
    wholes = [sequence(whole) for whole in sequences]
    run(wholes, None, row_length, share)
    run(wholes, [len(whole) - 1 for whole in wholes], row_length, share)


@pytest.mark.parametrize("length", [511, 512, 513, 1024, 131_072, 131_073])
def test_one_long_sequence(length: int) -> None:
    steps = run([POOL[:length]], [length // 2], ROW)
    assert tokens_run(steps) == length
    assert padded(steps) < length + ROW


def test_what_follows_a_document_shorter_than_its_steps_stands_on_it() -> None:
    """The longer of two sequences begins with the shorter, which ends in the middle of the cached part."""
    steps = run([POOL[:300], POOL[:2000]], [290, 1990], ROW)
    assert tokens_run(steps) == 2000


# ---------------------------------------------------------------------------------------- many, and many levels


def chain(count: int, step: int, tail: Sequence[int] = ()) -> list[NDArray[np.int32]]:
    """a, ab, abc, ...; with a tail each sequence leaves the chain."""
    wholes = [POOL[: step * (i + 1)] for i in range(count)]
    return [sequence(whole, tail) for whole in wholes] if tail else wholes


# How `chain` makes each. They are made where they are used: together they take 700 MB.
NESTED: dict[str, tuple[Any, ...]] = {
    "a, ab, abc": (2000, 1),
    "by a hundred tokens": (1310, 100),
    "by more than a row": (200, 600),
    "branches at every token": (2000, 1, [98, 99]),
    "branches far apart": (1200, 90, [98, 99]),
}


@pytest.mark.parametrize("name", NESTED)
def test_prefixes_of_one_another_nest_as_deep_as_they_are_many(name: str) -> None:
    """The planner's recursion does not; and running them together is worth it nevertheless."""
    sequences = chain(*NESTED[name])
    asked = [len(whole) - 1 for whole in sequences]
    steps = run(sequences, asked, ROW)
    assert padded(steps) < sum(-(-len(whole) // 128) * 128 for whole in sequences) / 2


@pytest.mark.parametrize("row_length", [2, 4, 32])
def test_chains_in_short_rows(row_length: int) -> None:
    sequences = chain(1500, 1)
    run(sequences, [len(whole) - 1 for whole in sequences], row_length)


def test_thousands_of_sequences() -> None:
    random = np.random.default_rng(0)
    headers = random.integers(0, 97, (57, 700)).astype(np.int32)
    questions = [sequence(headers[i % 57], random.integers(0, 97, random.integers(20, 150))) for i in range(3000)]
    sequences = [sequence(question, ending) for question in questions for ending in ([1], [2], [3, 4], [5])]
    asked = [len(whole) - 1 for whole in sequences]
    steps = list(schedule(sequences, asked, ROW))
    assert sum(len(span.indices) for step in steps for span in step.spans) == len(sequences)
    assert tokens_run(steps) <= 57 * 700 + sum(map(len, questions)) - 3000 * 700 + 3000 * 5
    assert padded(steps) < 1.2 * tokens_run(steps)
