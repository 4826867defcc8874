"""Perplexity of a text under a model, without any benchmark library.

The text is cut into disjoint windows of W tokens; in each window every token but the first is predicted from those
before it. Token perplexity is exp of the mean negative log-likelihood of the predicted tokens. No token is added to
the text.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence

from jax.typing import ArrayLike

from evals.engine import Engine, LogLikelihood
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.model import Llama


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


def perplexity(
    model: Llama,
    tokens: Sequence[int],
    *,
    window: int = 512,
    batch_size: int | None = None,
    neuron_masks: tuple[ArrayLike, ...] | None = None,
    texts: Sequence[str] = ("the text",),
    on_tokens: Callable[[int], None] | None = None,
) -> Perplexity:
    """Token perplexity of a token sequence (see the module docstring for the definition).

    Args:
      model: the model; log-probabilities are float32 whatever its dtype.
      tokens: token ids of the whole text. A last window of a single token is dropped.
      window: W, at least 2 and at most the model's window.
      batch_size: see `Engine`; it does not change the result beyond rounding.
      neuron_masks: see `Llama.__call__`; masks of any ratio share the compiled programs.
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
    if len(tokens) < 2:
        raise RequestError(f"{', '.join(texts)} has {len(tokens)} tokens; perplexity needs at least 2")
    window = min(window, len(tokens))
    windows = [tokens[start : start + window] for start in range(0, len(tokens), window)]
    requests = [(piece[:1], piece[1:]) for piece in windows if len(piece) > 1]
    done = 0

    def count(number: int, _: LogLikelihood) -> None:
        nonlocal done
        done += 1 + len(requests[number][1])
        if on_tokens:
            on_tokens(done)

    engine = Engine(model, neuron_masks=neuron_masks, batch_size=batch_size)
    results = engine.loglikelihood(requests, on_result=count)
    predicted = sum(len(continuation) for _, continuation in requests)
    loss = -math.fsum(result.value for result in results) / predicted
    if not loss < math.log(sys.float_info.max):
        raise OperationError(
            f"the mean negative log-likelihood of {', '.join(texts)} is {loss:g}: the model computes nothing sensible"
        )
    return Perplexity(math.exp(loss), predicted, window, tuple(texts))
