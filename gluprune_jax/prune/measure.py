"""Perplexities and sample answers of the dense and the pruned model."""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

import convert
from convert.tokenizer import beginning, check_ids, encode_prompt, end_of_sequence_ids, load_tokenizer
from evals.perplexity import Masks, Perplexity, text_perplexity
from gluprune_jax.cli import terminal
from gluprune_jax.inference.generation import generate
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.prune.request import PruneRequest
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.scores import Scores, select_neurons


class Measurements:
    """Perplexities and sample answers of one model at its stages."""

    def __init__(
        self,
        request: PruneRequest,
        checkpoint: convert.Checkpoint,
        texts: Sequence[tuple[str, str]],
        date: datetime.date | None,
    ) -> None:
        self._request, self._date = request, date
        self._tokenizer = load_tokenizer(checkpoint, request.chat_template)
        self._eos = end_of_sequence_ids(checkpoint)
        self._perplexity: dict[str, Perplexity] = {}
        self._answers: dict[str, str] = {}
        self._meter = text_perplexity(
            self._tokenizer,
            texts,
            vocab_size=checkpoint.config.vocab_size,
            eval_tokens=request.eval_tokens,
            sequence_length=request.sequence_length,
            begin=beginning(checkpoint, self._tokenizer),
            note=terminal.note,
            progress=terminal.count_progress,
        )

    def take(self, stage: str, model: Decoder, masks: Masks = None) -> None:
        self._take_perplexity(stage, model, masks)
        if self._request.sample is not None:
            prompt, steps = (
                encode_prompt(self._tokenizer, self._request.sample, self._date),
                self._request.sample_tokens,
            )
            check_ids(self._tokenizer, prompt, model.config.vocab_size)
            with terminal.count_progress(f"sample answer ({stage})", steps, "tokens") as progress:
                (answer,) = generate(model, [prompt], max_new_tokens=steps, eos_ids=self._eos, on_tokens=progress)
            self._answers[stage] = self._tokenizer.decode(answer, skip_special_tokens=True)

    def take_random(self, model: Decoder, plan: PruningPlan, random: Scores) -> None:
        """The perplexity with as many neurons of each layer masked as the plan removes, chosen at random."""
        kept = tuple(select_neurons(v, width) for v, width in zip(random.values, plan.widths, strict=True))
        masks = dataclasses.replace(plan, kept=kept).masks(model.config)
        self._take_perplexity(f"random neurons (seed {self._request.seed})", model, masks)

    def _take_perplexity(self, stage: str, model: Decoder, masks: Masks) -> None:
        if not self._request.eval_data:
            return
        self._perplexity[stage] = self._meter(model, stage, masks)

    def report(self) -> dict[str, Any]:
        """What was measured, by stage."""
        report: dict[str, Any] = {}
        if self._perplexity:
            report["evaluation"] = {
                "definition": next(iter(self._perplexity.values())).definition,
                "perplexity": {stage: result.value for stage, result in self._perplexity.items()},
            }
        if self._answers:
            date = {} if self._date is None else {"date": self._date.isoformat()}
            report["sample"] = {"prompt": self._request.sample, **date, "answers": self._answers}
        return report
