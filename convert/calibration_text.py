"""Calibration text as windows of token ids."""

import datetime
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from convert.tokenizer import beginning, check_ids, encode_documents, load_tokenizer, separator
from gluprune_jax.data.documents import Document, self_seed
from gluprune_jax.data.packing import pack
from gluprune_jax.errors import RequestError
from gluprune_jax.progress import Progress, no_progress

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
    progress: Progress = no_progress,
) -> NDArray[np.int32]:
    """The calibration text as windows of token ids `[N, W]` int32, W = `sequence_length`, of at most `tokens` in all.

    Of each text they are spread evenly over it, or over its first part, so that they are of many kinds and not of the
    few documents that it begins with. Where texts have weights, those of a text follow each other, as many as its
    weight says. Conversations are those of `date` (`convert.chat.render`). What the model is to write itself it
    writes now (`convert.own_text`).

    Raises:
      RequestError: too little text, of a mixture too few tokens for a window of each, or conversations for a model
        without a chat template.
      OperationError: the model writes nothing to calibrate on.
    """
    tokenizer = load_tokenizer(checkpoint, chat_template)
    sources = [
        (source, list(group)) for source, group in itertools.groupby(documents, lambda document: document.source)
    ]
    shares = [1.0 if source is None else source[1] for source, _ in sources]
    ends = np.rint(np.cumsum(shares) * (tokens // sequence_length)).astype(int)
    found: list[NDArray[np.int32]] = []
    for (source, group), wanted in zip(sources, np.diff(ends, prepend=0).tolist(), strict=True):
        if not wanted:
            raise RequestError(
                f"of {tokens:,} calibration tokens {group[0].where} has less than a window of {sequence_length}: give "
                f"`calibration_tokens` more, or this text a larger weight"
            )
        seed = None if group[0].content else self_seed(group[0].where)
        if seed is not None:
            from convert.own_text import own_windows  # here: it runs the model, and command lines answer without JAX

            windows = own_windows(
                checkpoint, tokenizer, wanted, sequence_length=sequence_length, seed=seed, date=date, progress=progress
            )
        else:
            most = int(_SPREAD * tokens * (1.0 if source is None else source[1]))
            encoded = encode_documents(tokenizer, group, date=date, most_tokens=most)
            windows = pack(encoded, sequence_length, separator(checkpoint, tokenizer), beginning(checkpoint, tokenizer))
            check_ids(tokenizer, windows, checkpoint.config.vocab_size)
            if source is not None and len(windows) < wanted:
                raise RequestError(
                    f"{source[0]} has {len(windows)} windows of {sequence_length} tokens, and its weight asks for "
                    f"{wanted}; give more text, fewer `calibration_tokens` or another weight"
                )
        found.append(windows[spread(len(windows), wanted)])
    return np.concatenate(found)


def spread(count: int, wanted: int) -> NDArray[np.int64]:
    """`wanted` indices below `count`, evenly spread and ascending; all where there are no more."""
    return np.arange(count) if count <= wanted else np.arange(wanted) * count // wanted
