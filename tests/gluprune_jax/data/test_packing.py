"""Every token once, in order; every window once an epoch; any step by itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gluprune_jax.data.documents import parse_json_lines
from gluprune_jax.data.packing import PADDING, pack, window_indices
from gluprune_jax.errors import RequestError

EOS = 99
DOCUMENTS = st.lists(st.lists(st.integers(0, 98), max_size=40), min_size=1, max_size=12)


@given(DOCUMENTS, st.integers(2, 17))
def test_every_token_once_in_order_and_an_eos_between_documents(documents: list[list[int]], window: int) -> None:
    stream: list[int] = []
    for document in (document for document in documents if document):
        stream += [EOS] * bool(stream) + document
    if len(stream) < window:
        with pytest.raises(RequestError, match=f"has {len(stream)} tokens, fewer than the {window} of one window"):
            pack(documents, window, EOS)
        return
    windows = pack(documents, window, EOS)
    assert windows.dtype == np.int32
    assert windows.shape[1] == window
    flat = windows.ravel()
    kept = len(stream) - (len(stream) % window == 1)  # a token alone predicts nothing
    assert flat[:kept].tolist() == stream[:kept]
    assert (flat[kept:] == PADDING).all()
    assert len(flat) - kept < window


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5))
def test_every_window_once_an_epoch(windows: int, per_step: int, seed: int) -> None:
    steps = -(-3 * windows // per_step)
    order = np.concatenate([window_indices(windows, per_step, step, seed) for step in range(steps)])
    for epoch in range(3):
        assert sorted(order[epoch * windows : (epoch + 1) * windows].tolist()) == list(range(windows))


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = [window_indices(50, 50, step, seed).tolist() for step in range(2) for seed in range(2)]
    assert len({tuple(order) for order in orders}) == 4


def test_every_window_begins_with_the_token_that_a_model_needs() -> None:
    documents = [[5, 6, 7, 8], [9]]
    assert pack(documents, 4, 2, begin=1).tolist() == [[1, 5, 6, 7], [1, 8, 2, 9]]
    assert pack(documents, 5, 2, begin=1).tolist() == [[1, 5, 6, 7, 8], [1, 2, 9, PADDING, PADDING]]


def test_what_cannot_be_packed() -> None:
    with pytest.raises(RequestError, match="has 0 tokens"):
        pack([[], []], 4, EOS)
    with pytest.raises(RequestError, match="names no end-of-sequence token"):
        pack([[1, 2], [3]], 2, None)
    with pytest.raises(RequestError, match="a window of 1 tokens; it must be at least 2"):
        pack([[1, 2]], 1, EOS)
    assert pack([[1, 2, 3]], 3, None).tolist() == [[1, 2, 3]]


def test_json_lines() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = '{"text": "one\\u2028line", "id": 3}\n\n{"messages": [%s, %s]}\n'
    text %= tuple(str(message).replace("'", '"') for message in messages)
    assert [document.content for document in parse_json_lines(text, "x.jsonl")] == ["one\u2028line", messages]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "x.jsonl, line 2, is not JSON"),
        ("[1]", r"x.jsonl, line 2, is \[1\]; it must hold \"text\", a string, or \"messages\", a list"),
        ('{"text": 3}', "it must hold"),
        ('{"messages": []}', "it must hold"),
        ('{"messages": [{"role": "user"}]}', "it must hold role and content, as strings"),
    ],
)
def test_lines_that_are_no_documents(line: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_json_lines('{"text": "a"}\n' + line, "x.jsonl")
