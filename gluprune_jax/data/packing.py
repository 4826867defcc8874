"""Text for training and calibration: documents of token ids packed into windows, and which windows each step sees.

Documents follow each other with one end-of-sequence token between them, and the whole is cut every W tokens: no token
is lost and none is seen twice in an epoch. Attention goes across the documents of a window, as is usual.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from gluprune_jax.errors import RequestError

# Fills up the last window. Nothing is predicted there, and no token sees it.
PADDING = -1


def pack(
    documents: Iterable[Sequence[int] | NDArray[np.int32]],
    window: int,
    end_of_sequence: int | None,
    begin: int | None = None,
) -> NDArray[np.int32]:
    """Packs documents into windows.

    Args:
      documents: token ids of each; empty ones are left out.
      window: W, the tokens of a window.
      end_of_sequence: the token between two documents. A single document needs none.
      begin: the token that every window begins with, of models that compute nothing sensible without (Gemma's BOS).

    Returns:
      `[windows, W]` int32; the last window is filled up with `PADDING`. A last window of one token is dropped, for
      there is nothing to predict in it.

    Raises:
      RequestError: W is less than 2, there are fewer tokens than fill a window, or several documents and no token to
        stand between them.
    """
    if window < 2:
        raise RequestError(
            f"a window of {window} tokens; it must be at least 2, for each token is predicted from others"
        )
    parts: list[NDArray[np.int32]] = []
    for document in documents:
        if not len(document):
            continue
        if parts:
            if end_of_sequence is None:
                raise RequestError("the model names no end-of-sequence token, which must stand between two documents")
            parts.append(np.array([end_of_sequence], np.int32))
        parts.append(np.asarray(document, np.int32))
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    if begin is not None:
        window -= 1
    if len(tokens) < window:
        raise RequestError(
            f"the text has {len(tokens)} tokens, fewer than the {window} of one window; give more text or a smaller "
            f"window"
        )
    if len(tokens) % window == 1:
        tokens = tokens[:-1]
    windows = np.pad(tokens, (0, -len(tokens) % window), constant_values=PADDING).reshape(-1, window)
    return windows if begin is None else np.pad(windows, ((0, 0), (1, 0)), constant_values=begin)


def window_indices(windows: int, per_step: int, step: int, seed: int) -> NDArray[np.int64]:
    """Which windows a step is made of: a function of nothing but these arguments, so that any step can be repeated.

    The windows are shuffled anew for every epoch, and the epochs follow each other without a gap.

    Args:
      windows: how many there are.
      per_step: how many a step takes.
      step: the number of the step, from 0.
      seed: of the shuffling.

    Returns:
      `[per_step]` int64.
    """
    positions = np.arange(step * per_step, (step + 1) * per_step)
    epochs = {
        epoch: np.random.default_rng((seed, int(epoch))).permutation(windows) for epoch in set(positions // windows)
    }
    return np.array([epochs[position // windows][position % windows] for position in positions])
