"""What a model answers to a prompt, beside its numbers: a sentence says sooner than a perplexity that it is broken."""

from jax.typing import ArrayLike

from convert import Checkpoint
from convert.tokenizer import check_ids, encode_prompt, end_of_sequence_ids, load_tokenizer
from gluprune_jax.inference.engine import Engine
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.progress import Progress, no_progress

PROMPT_TOKENS = 1024  # that memory is planned for


class Sampler:
    """Asks models of one shape the same.

    Args:
      checkpoint: whose tokenizer, chat template and end tokens all of the models have.
      prompt: what is asked, in the chat template if there is one.
      max_new_tokens: the most tokens of an answer.
      chat_template: the name of the template, where the tokenizer has several.
      progress: is told what is being done.

    Raises:
      RequestError: the prompt has token ids that the model does not have, or no tokens at all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        chat_template: str | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self._tokenizer = load_tokenizer(checkpoint, chat_template)
        self._prompt = encode_prompt(self._tokenizer, prompt)
        check_ids(self._tokenizer, self._prompt, checkpoint.config.vocab_size)
        self._ends = end_of_sequence_ids(checkpoint)
        self._max_new_tokens, self._progress = max_new_tokens, progress

    def answer(self, model: Decoder, neuron_masks: tuple[ArrayLike, ...] | None = None) -> str:
        """The greedy answer of a model, under masks if there are any; all of them run in the same programs."""
        engine = Engine(model, neuron_masks=neuron_masks, batch_size=1)
        with self._progress("sample answer", self._max_new_tokens, "tokens") as progress:
            (ids,) = engine.generate(
                [self._prompt], max_new_tokens=self._max_new_tokens, eos_ids=self._ends, on_tokens=progress
            )
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
