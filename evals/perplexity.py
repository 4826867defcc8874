"""Perplexity of a text under a model, without any benchmark library.

The text is cut into disjoint windows of W tokens; in each window every token but the first is predicted from those
before it. Token perplexity is exp of the mean negative log-likelihood of the predicted tokens. No token is added to
the text.
"""

import dataclasses
import functools
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from gluprune_jax.errors import OperationError, RequestError, unreadable
from gluprune_jax.model import Llama

# Names the English text that every Python carries: the language reference, as `help()` shows it.
PYTHON_REFERENCE = "python-reference"

# Positions whose logits exist at the same time, over all sequences of a batch.
_LOGIT_POSITIONS = 512


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
      value: token perplexity.
      predicted_tokens: how many tokens were predicted.
      window: W, in tokens.
      texts: names of the texts.
    """

    value: float
    predicted_tokens: int
    window: int
    texts: tuple[str, ...]

    @property
    def definition(self) -> str:
        """What the number means, in one sentence."""
        return (
            f"token perplexity of {', '.join(self.texts)}: exp of the mean negative log-likelihood of "
            f"{self.predicted_tokens:,} tokens, each predicted within disjoint windows of {self.window} tokens, "
            f"no BOS added"
        )


def read_text(name: str) -> str:
    """Reads a UTF-8 text file, or the built-in text `python-reference` (it differs between Python versions).

    Raises:
      RequestError: there is no such file, or it is not UTF-8.
      OperationError: it cannot be read.
    """
    if name == PYTHON_REFERENCE:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        return "\n".join(topics[key] for key in sorted(topics))
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(f"the text {name}", error) from error


def perplexity(
    model: Llama,
    tokens: Sequence[int],
    *,
    window: int = 512,
    batch_size: int = 4,
    neuron_masks: tuple[ArrayLike, ...] | None = None,
    texts: Sequence[str] = ("the text",),
    on_tokens: Callable[[int], None] | None = None,
) -> Perplexity:
    """Token perplexity of a token sequence (see the module docstring for the definition).

    Args:
      model: the model; log-probabilities are float32 whatever its dtype.
      tokens: token ids of the whole text. A last window of a single token is dropped.
      window: W, at least 2 and at most the model's window.
      batch_size: windows in one forward pass; it does not change the result beyond rounding.
      neuron_masks: see `Llama.__call__`; masks of any ratio share one compiled program.
      texts: what the tokens are, for the report.
      on_tokens: called with the number of tokens done so far.

    Raises:
      RequestError: fewer than two tokens, token ids outside the vocabulary, a window that does not fit, or an
        empty batch.
      OperationError: the model gives log-likelihoods that are not finite.
    """
    if not 2 <= window <= model.config.max_position_embeddings:
        raise RequestError(
            f"a window of {window} tokens; it must lie between 2 and the model's {model.config.max_position_embeddings}"
        )
    if batch_size < 1:
        raise RequestError(f"a batch of {batch_size} windows; it must be at least 1")
    ids = np.asarray(tokens, np.int32)
    if len(ids) < 2:
        raise RequestError(f"{', '.join(texts)} has {len(ids)} tokens; perplexity needs at least 2")
    model.config.check_tokens(ids)
    window = min(window, len(ids))
    count = -(-len(ids) // window)
    padded = np.zeros((-(-count // batch_size) * batch_size, window), np.int32)
    padded.reshape(-1)[: len(ids)] = ids
    lengths = np.clip(len(ids) - window * np.arange(len(padded)), 0, window).astype(np.int32)

    graphdef, params = nnx.split(model)
    total = 0.0
    for start in range(0, len(padded), batch_size):
        rows = slice(start, start + batch_size)
        total += math.fsum(
            np.asarray(window_log_likelihoods(graphdef, params, padded[rows], lengths[rows], neuron_masks)).tolist()
        )
        if on_tokens:
            on_tokens(int(lengths[: start + batch_size].sum()))
    predicted = int(np.maximum(lengths - 1, 0).sum())
    loss = -total / predicted
    if not loss < math.log(sys.float_info.max):  # NaN is not below it either
        raise OperationError(
            f"the mean negative log-likelihood of {', '.join(texts)} is {loss:g}: the model computes nothing sensible"
        )
    return Perplexity(math.exp(loss), predicted, window, tuple(texts))


@functools.partial(jax.jit, static_argnums=0)
def window_log_likelihoods(
    graphdef: nnx.GraphDef[Llama],
    params: nnx.State[Any, Any],
    tokens: Array,
    lengths: Array,
    neuron_masks: tuple[ArrayLike, ...] | None,
) -> Array:
    """Sums the log-likelihoods of tokens 1 to `lengths - 1` of each row of `tokens [B, W]`: `[B]` float32.

    Logits exist for a few hundred positions at a time, never as `[B, W, V]`.
    """
    model = nnx.merge(graphdef, params)
    hidden, _ = model(tokens, neuron_masks=neuron_masks)
    B, W, D = hidden.shape
    chunk = max(1, _LOGIT_POSITIONS // B)
    chunks = -(-(W - 1) // chunk)
    padding = ((0, 0), (0, chunks * chunk - (W - 1)))
    contexts = jnp.pad(hidden[:, :-1], (*padding, (0, 0))).reshape(B, chunks, chunk, D).swapaxes(0, 1)
    targets = jnp.pad(tokens[:, 1:], padding).reshape(B, chunks, chunk).swapaxes(0, 1)

    def log_likelihoods(block: tuple[Array, Array]) -> Array:
        context, target = block
        log_probabilities = jax.nn.log_softmax(model.logits(context), axis=-1)
        return jnp.take_along_axis(log_probabilities, target[..., None], axis=-1)[..., 0]

    per_token = jax.lax.map(log_likelihoods, (contexts, targets)).swapaxes(0, 1).reshape(B, -1)
    predicted = jnp.arange(1, chunks * chunk + 1) < lengths[:, None]
    return jnp.sum(jnp.where(predicted, per_token, 0.0), axis=1)
