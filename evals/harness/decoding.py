"""What lm-eval's tasks say of generation: how to decode, and where a generated text ends."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

import convert
from gluprune_jax.errors import RequestError, shortened
from gluprune_jax.inference.device_loop import STEPS_PER_CALL

# What a task may say of decoding beside stop strings and lengths, and what changes nothing.
_DECODING_ARGUMENTS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "seed")
_WITHOUT_EFFECT: Mapping[str, Any] = {"num_beams": 1, "repetition_penalty": 1, "top_k": 0}

# What a checkpoint's generation config may ask for, which `transformers` would then do to greedy decoding as well, and
# the values that ask for nothing.
_CHANGES_GREEDY: Mapping[str, Any] = {
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "num_beams": 1,
    "guidance_scale": 1,
} | dict.fromkeys(
    (
        "min_new_tokens",
        "bad_words_ids",
        "force_words_ids",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "suppress_tokens",
        "begin_suppress_tokens",
        "sequence_bias",
        "penalty_alpha",
        "exponential_decay_length_penalty",
        "dola_layers",
        "watermarking_config",
        "stop_strings",
    )
)

# Of an answer, where the task does not say: lm-eval's number.
DEFAULT_NEW_TOKENS = 256


class Decoding(NamedTuple):
    """How a task wants its texts generated.

    Attributes:
      until: strings before which a text ends, that of the EOS token among them.
      max_new_tokens: at most.
      temperature: 0 for greedy decoding.
      top_p: see `Engine.generate`.
      seed: of the draws.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def parse_decoding(arguments: Mapping[str, Any], max_gen_toks: int, end: str | None = None) -> Decoding:
    """The generation arguments of a task.

    Args:
      arguments: as the task has them.
      max_gen_toks: new tokens where they do not say how many.
      end: the text of the EOS token, which ends every text.

    Raises:
      RequestError: one is not supported, or has a value that it cannot have.
    """
    try:
        settings = dict(normalize_gen_kwargs(dict(arguments), max_gen_toks))
        until = handle_stop_sequences(settings.pop("until"), eos=end)
        chosen = {name: value for name, value in settings.items() if value is not None}
        temperature, top_p = float(chosen.pop("temperature", 0)), float(chosen.pop("top_p", 1))
        max_new_tokens, seed = int(chosen.pop("max_gen_toks")), int(chosen.pop("seed", 0))
    except (TypeError, ValueError) as error:
        raise RequestError(f"the generation arguments {shortened(arguments)} cannot be understood: {error}") from error
    sampled = chosen.pop("do_sample")
    if unknown := [f"{k}={v!r}" for k, v in sorted(chosen.items()) if v != _WITHOUT_EFFECT.get(k)]:
        raise RequestError(
            f"the task asks for generation with {', '.join(unknown)}, which is not supported; "
            f"accepted: {', '.join(_DECODING_ARGUMENTS)}"
        )
    if not all(isinstance(stop, str) for stop in until):
        raise RequestError(f"the stop strings of the task are {shortened(until)}; accepted: a string or a list of them")
    if not isinstance(sampled, bool):
        raise RequestError(f"do_sample is {sampled!r}; it must be true or false")
    if sampled and temperature <= 0:
        raise RequestError(f"do_sample is true and the temperature {temperature:g}; to sample, it must be above 0")
    if max_new_tokens < 1:
        raise RequestError(f"max_gen_toks is {max_new_tokens}; it must be at least 1")
    if not 0 <= seed < 1 << 32:
        raise RequestError(f"the seed is {seed}; it must lie between 0 and {(1 << 32) - 1}")
    return Decoding(tuple(until), max_new_tokens, temperature, top_p, seed)


class StopStrings:
    """Finds where lm-eval's `hf` backend ends a text.

    After each token it decodes the last few, two more than the stop string has itself, and looks whether the stop
    string is among their text. Called with a sequence's new tokens, an object says whether one was met of late, which
    is what `Engine.generate` asks; `find` says where the first was.

    Args:
      tokenizer: the model's.
      strings: end a text.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self._decode: Callable[[Sequence[int]], str] = tokenizer.decode
        self._lookback = {text: len(tokenizer.encode(text, add_special_tokens=False)) + 2 for text in strings}

    def __call__(self, ids: Sequence[int]) -> bool:
        # Twice what the decode loop promises: what is overlooked here would cost decoding up to the last token.
        return self.find(ids, max(0, len(ids) - 2 * STEPS_PER_CALL)) is not None

    def find(self, ids: Sequence[int], start: int = 0) -> int | None:
        """How many tokens there are when a text ends, more than `start`; None if no stop string is met."""
        longest = max(self._lookback.values(), default=0)
        for begin in range(start, len(ids), STEPS_PER_CALL):
            end = min(begin + STEPS_PER_CALL, len(ids))
            # The text of some tokens is part of that of more tokens, so most are decoded once for many.
            text = self._decode(ids[max(0, begin + 1 - longest) : end])
            if not any(stop in text for stop in self._lookback):
                continue
            for count in range(begin + 1, end + 1):
                for stop, lookback in self._lookback.items():
                    if stop in self._decode(ids[max(0, count - lookback) : count]):
                        return count
        return None


def changes_to_greedy(checkpoint: convert.Checkpoint) -> Iterator[str]:
    """What `transformers` would do to greedy decoding because the checkpoint says so, and we do not."""
    settings = checkpoint.generation_settings()
    for name, nothing in _CHANGES_GREEDY.items():
        value = settings.get(name)
        if value is not None and value != nothing:
            yield (
                f"the generation config of {checkpoint.source} says {name} = {shortened(value)}, which lm-eval's hf "
                f"backend applies even to greedy decoding; here it is left out"
            )
