"""Perplexity of a text under a model, without any benchmark library.

The text is cut into disjoint windows of W tokens; in each window every token but the first is predicted from those
before it. Token perplexity is exp of the mean negative log-likelihood of the predicted tokens. No token is added to
the text.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jax.typing import ArrayLike

from convert.tokenizer import check_ids, encode_text
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.inference.engine import Engine, LogLikelihood
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.progress import Progress, no_progress

Masks = tuple[ArrayLike, ...] | None


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
      value: token perplexity.
      predicted_tokens: how many tokens were predicted.
      window: W, in tokens.
      texts: names of the texts.
      begin: the token before each window, not predicted; None for none.
    """

    value: float
    predicted_tokens: int
    window: int
    texts: tuple[str, ...]
    begin: int | None = None

    @property
    def definition(self) -> str:
        """What the number means, in one sentence."""
        return (
            f"token perplexity of {', '.join(self.texts)}: exp of the mean negative log-likelihood of "
            f"{self.predicted_tokens:,} tokens, each predicted within disjoint windows of {self.window} tokens, "
            f"{spelled_beginning(self.begin)}"
        )


def spelled_beginning(begin: int | None) -> str:
    """What stands before each window, for definitions."""
    return "no BOS added" if begin is None else f"behind the BOS token {begin}"


def perplexity(
    model: Decoder,
    tokens: Sequence[int],
    *,
    sequence_length: int = 512,
    begin: int | None = None,
    batch_size: int | None = None,
    neuron_masks: tuple[ArrayLike, ...] | None = None,
    texts: Sequence[str] = ("the text",),
    on_tokens: Callable[[int], None] | None = None,
) -> Perplexity:
    """Token perplexity of a token sequence (see the module docstring for the definition).

    Args:
      model: the model; log-probabilities are float32 whatever its dtype.
      tokens: token ids of the whole text. A last window of a single token is dropped.
      sequence_length: W, at least 2 and at most the model's window.
      begin: a token put before each window, of models that need one (`convert.tokenizer.beginning`); W counts without.
      batch_size: see `Engine`; it does not change the result beyond rounding.
      neuron_masks: see `Llama.__call__`; masks of any ratio share the compiled programs.
      texts: what the tokens are, for the report.
      on_tokens: called with the number of tokens done so far.

    Raises:
      RequestError: fewer than two tokens, token ids outside the vocabulary, a window that does not fit, or an
        empty batch.
      OperationError: the model gives log-likelihoods that are not finite.
    """
    longest = model.config.context_length - (begin is not None)
    if not 2 <= sequence_length <= longest:
        raise RequestError(f"`sequence_length` is {sequence_length}; it must lie between 2 and the model's {longest}")
    if len(tokens) < 2:
        raise RequestError(f"{', '.join(texts)} has {len(tokens)} tokens; perplexity needs at least 2")
    window = min(sequence_length, len(tokens))
    windows = [tokens[start : start + window] for start in range(0, len(tokens), window)]
    before = [] if begin is None else [begin]
    requests = [([*before, piece[0]], piece[1:]) for piece in windows if len(piece) > 1]
    done = 0

    def count(number: int, _: LogLikelihood) -> None:
        nonlocal done
        done += 1 + len(requests[number][1])  # `begin` is none of the text
        if on_tokens:
            on_tokens(done)

    engine = Engine(model, neuron_masks=neuron_masks, batch_size=batch_size)
    results = engine.loglikelihood(requests, on_result=count)
    predicted = sum(len(continuation) for _, continuation in requests)
    loss = -math.fsum(result.value for result in results) / predicted
    if not loss < math.log(sys.float_info.max):
        raise OperationError(
            f"non-finite perplexity of {', '.join(texts)}: the mean negative log-likelihood is {loss:g}; check the "
            f"weights, or use `dtype` float32"
        )
    return Perplexity(math.exp(loss), predicted, window, tuple(texts), begin)


def text_perplexity(
    tokenizer: Any,
    texts: Sequence[tuple[str, str]],
    *,
    vocab_size: int,
    eval_tokens: int,
    sequence_length: int,
    begin: int | None = None,
    note: Callable[[str], None],
    progress: Progress = no_progress,
) -> Callable[[Decoder, str, Masks], Perplexity]:
    """How the perplexity of some texts together is measured, of any models that share a tokenizer.

    Args:
      tokenizer: theirs.
      texts: names and texts.
      vocab_size: of the models.
      eval_tokens: tokens to use: the first ones, of all texts together.
      sequence_length: as for `perplexity`.
      begin: as for `perplexity`.
      note: called with a sentence for each text that is too far behind to be used.
      progress: draws progress while a model is measured.

    Returns:
      A function of a model, of what it is called while it is measured, and of masks over its neurons.

    Raises:
      RequestError: the text has tokens that are not in the vocabulary.
    """
    tokens: list[int] = []
    used: list[str] = []
    for name, text in texts:
        if len(tokens) == eval_tokens:
            note(f"{name} is not used: the texts before it have the {eval_tokens:,} tokens that are evaluated")
            continue
        used.append(name)
        tokens += encode_text(tokenizer, text)[: eval_tokens - len(tokens)]
    check_ids(tokenizer, tokens, vocab_size)

    def measure(model: Decoder, stage: str, masks: Masks = None) -> Perplexity:
        with progress(f"perplexity ({stage})", len(tokens), "tokens") as on_tokens:
            return perplexity(
                model,
                tokens,
                sequence_length=sequence_length,
                begin=begin,
                neuron_masks=masks,
                texts=used,
                on_tokens=on_tokens,
            )

    return measure
