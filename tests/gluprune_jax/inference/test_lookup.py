"""Drafts are what stood in the text before, and checking them pays or is not done."""

import numpy as np
import pytest

from gluprune_jax.inference.lookup import DRAFT, Lookup, draft_for

MATCHED = 3


def by_hand(tokens: list[int]) -> list[int] | None:
    """Every earlier place one after the other, from the latest on, with the longest match first."""
    for count in range(min(MATCHED, len(tokens)), 0, -1):
        for end in range(len(tokens) - 2, count - 2, -1):
            if tokens[end - count + 1 : end + 1] == tokens[-count:]:
                text = list(tokens)
                for _ in range(DRAFT):  # written behind the text, so that a near place is repeated
                    text.append(text[end + 1 + len(text) - len(tokens)])
                return text[len(tokens) :]
    return None


@pytest.mark.parametrize("alphabet", [1, 2, 3, 8, 50])
def test_a_draft_is_what_followed_the_longest_match(alphabet: int) -> None:
    rng = np.random.default_rng(alphabet)
    found = 0
    for length in (1, 2, 3, 4, 5, 8, 20, 60):
        for _ in range(20):
            tokens = rng.integers(0, alphabet, length).astype(np.int32)
            expected, draft = by_hand(tokens.tolist()), draft_for(tokens)
            assert (None if draft is None else draft.tolist()) == expected
            found += expected is not None
    assert found > 20


def test_drafts_go_round_what_is_repeated() -> None:
    loop = [5, 6, 7]
    assert draft_for(np.array([1, 2, *loop, *loop], np.int32)) is not None
    for count in range(4, 9):
        tokens = np.array([9, *(loop * 4)[:count]], np.int32)
        draft = draft_for(tokens)
        assert draft is not None
        assert draft.tolist() == (loop * 9)[count : count + DRAFT]


def rows_of(loops: list[list[int]]) -> tuple[Lookup, np.ndarray]:
    lookup = Lookup(len(loops))
    for row, tokens in enumerate(loops):
        lookup.begin(row, np.array(tokens, np.int32))
    return lookup, np.arange(len(loops))


def test_drafts_pay_when_they_are_right() -> None:
    """Where texts repeat themselves, drafts are right; elsewhere they are given up, and taken up again behind it."""
    lookup, rows = rows_of([[1, 2] * 4] * 8)
    decisions = []
    noise = np.random.default_rng(0).integers(0, 9, 100).tolist()
    for token in [*[1, 2] * 20, *noise, *[1, 2] * 20]:
        drafts = lookup.drafts(rows)
        decisions.append(lookup.are_worth_it(drafts, 8, 8))
        for row in rows:
            lookup.add(int(row), np.array([token], np.int32), drafts.get(int(row)))
    assert all(decisions[10:40])
    assert not any(decisions[100:140])
    assert all(decisions[-10:])


def test_without_a_draft_there_is_nothing_to_check() -> None:
    lookup, rows = rows_of([[1, 2, 3], [4, 5, 6, 7]])
    assert lookup.drafts(rows) == {}
    assert not lookup.are_worth_it({}, 2, 2)


def test_few_sequences_check_drafts_that_many_would_not() -> None:
    """A pass for one sequence reads as many weights as one for eight."""
    one, row = rows_of([[1, 2, 1]])
    assert one.are_worth_it(one.drafts(row), 1, 1)
    eight, rows = rows_of([[1, 2, 1], *[[1, 2, 3]] * 7])
    assert list(eight.drafts(rows)) == [0]
    assert not eight.are_worth_it(eight.drafts(rows), 8, 8)


def test_rows_that_are_kept_take_their_texts_along() -> None:
    lookup, rows = rows_of([[1, 2, 1], [3, 4, 3], [5, 6, 5]])
    lookup.keep(np.array([2, 0]))
    assert {row: draft[0] for row, draft in lookup.drafts(rows[:2]).items()} == {0: 6, 1: 2}
    lookup.begin(0, np.array([7, 8, 7], np.int32))
    assert lookup.drafts(rows[:1])[0][0] == 8
