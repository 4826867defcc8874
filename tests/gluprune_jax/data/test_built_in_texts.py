"""The built-in text and its halves."""

import re
from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gluprune_jax.data.documents import evaluation_text, read_documents, read_text, split_topics
from gluprune_jax.errors import RequestError

HALVES = ("python-reference:calibration", "python-reference:held-out")


def paragraphs(text: str) -> set[str]:
    return {" ".join(part.split()) for part in text.split("\n\n") if len(" ".join(part.split())) >= 40}


def test_the_whole_reference_is_all_topics_in_order() -> None:
    assert read_text("python-reference") == "\n".join(topics[name] for name in sorted(topics))


def test_the_halves_have_nothing_in_common_and_are_all_of_it() -> None:
    calibration, held_out = (read_text(name) for name in HALVES)
    assert not paragraphs(calibration) & paragraphs(held_out)
    assert paragraphs(calibration) | paragraphs(held_out) == paragraphs(read_text("python-reference"))
    assert 0.8 < len(calibration) / len(held_out) < 1.25
    assert min(len(calibration), len(held_out)) > 150_000
    assert [document.content for document in read_documents([HALVES[0]], "--calibration")] == [calibration]
    assert evaluation_text(HALVES[1]) == held_out


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.lists(st.integers(0, 9), max_size=4)))
def test_texts_that_share_a_paragraph_stay_together(numbers: dict[str, list[int]]) -> None:
    texts = {name: "\n\n".join(f"{number} " * 40 for number in own) for name, own in numbers.items()}
    first, second = split_topics(texts)
    assert sorted(first + second) == sorted(texts)
    assert not {n for name in first for n in numbers[name]} & {n for name in second for n in numbers[name]}


def test_a_half_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(RequestError, match=re.escape("built in are python-reference, python-reference:calibration, ")):
        read_text("python-reference:test")
