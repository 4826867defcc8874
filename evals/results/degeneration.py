"""How degenerate generated text is, whatever a checker of form makes of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

_PHRASE = 4  # words that, if they come again, are a repetition


# A text that was cut off may have a token or two fewer when it is tokenised again.
_NEAR_LIMIT = 0.98


def describe_text(
    prompt: str,
    answer: str,
    tokenize: Callable[[str], Sequence[int]] | None = None,
    most_tokens: int | None = None,
) -> dict[str, float | int | None]:
    """Figures of one answer; None where it has too few words for them, or something is not known.

    Args:
      prompt: what was asked.
      answer: what was written.
      tokenize: the model's tokenizer.
      most_tokens: of an answer, as the task says.

    Returns:
      "words": words of the answer, split at white space; "repetition": the share of its 4-grams of words that stood in
      it before; "distinct_2": different 2-grams over 2-grams; "echo": the share of its 4-grams that the prompt has;
      "cut_off": 1 if it has as many tokens as an answer may have, else 0.
    """
    words = answer.split()
    fours, twos = _grams(words, _PHRASE), _grams(words, 2)
    asked = set(_grams(prompt.split(), _PHRASE))
    return {
        "words": len(words),
        "repetition": 1 - len(set(fours)) / len(fours) if fours else None,
        "distinct_2": len(set(twos)) / len(twos) if twos else None,
        "echo": sum(gram in asked for gram in fours) / len(fours) if fours else None,
        "cut_off": int(len(tokenize(answer)) >= _NEAR_LIMIT * most_tokens) if tokenize and most_tokens else None,
    }


def summarise(texts: Iterable[Mapping[str, float | int | None]]) -> dict[str, float]:
    """Means over answers of what is known of any, the median of "words", and "empty", the share without a word."""
    found = list(texts)
    words = [float(text["words"] or 0) for text in found]
    summary = {"words": float(np.median(words)), "empty": float(np.mean([count == 0 for count in words]))}
    for key in sorted({key for text in found for key in text} - {"words"}):
        if values := [float(value) for text in found if (value := text.get(key)) is not None]:
            summary[key] = float(np.mean(values))
    return summary


def _grams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
