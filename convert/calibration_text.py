"""Calibration text as windows of token ids."""

import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from convert.tokenizer import beginning, check_ids, encode_documents, load_tokenizer, separator
from gluprune_jax.data.documents import Document
from gluprune_jax.data.packing import pack

if TYPE_CHECKING:
    from convert.checkpoint import Checkpoint

# Calibration windows are taken out of up to so many times as much text.
_SPREAD = 64


def calibration_windows(
    checkpoint: "Checkpoint",
    documents: Sequence[Document],
    *,
    tokens: int,
    sequence_length: int,
    chat_template: str | None = None,
    date: datetime.date | None = None,
) -> NDArray[np.int32]:
    """The calibration text as windows of token ids `[N, W]` int32, W = `sequence_length`, of at most `tokens` in all.

    They are spread evenly over the text, or over its first part, so that they are of many kinds and not of the few
    documents that it begins with. Conversations are those of `date` (`convert.chat.render`).

    Raises:
      RequestError: too little text, or conversations for a model without a chat template.
    """
    tokenizer = load_tokenizer(checkpoint, chat_template)
    encoded = encode_documents(tokenizer, documents, date=date, most_tokens=_SPREAD * tokens)
    windows = pack(encoded, sequence_length, separator(checkpoint, tokenizer), beginning(checkpoint, tokenizer))
    check_ids(tokenizer, windows, checkpoint.config.vocab_size)
    wanted = tokens // sequence_length
    return windows[spread(len(windows), wanted)]


def spread(count: int, wanted: int) -> NDArray[np.int64]:
    """`wanted` indices below `count`, evenly spread and ascending; all where there are no more."""
    return np.arange(count) if count <= wanted else np.arange(wanted) * count // wanted
