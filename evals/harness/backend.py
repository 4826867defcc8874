"""The model backend "gluprune" of lm-evaluation-harness: texts come in, and our engine answers.

What happens between texts and token ids is what lm-eval's own `hf` backend does, to the letter: how texts are
tokenised, whether they begin with the BOS token, where contexts are cut, which token stands for an empty context, and
where a generated text ends. The reference is lm-eval 0.4.13 with one request at a time: with several, its sequences run
on until the last of them has met the same stop string. Nothing here imports torch.

The commands of this project ask in the protocol of the paper, for which they say add_bos_token=False; for families that
need the BOS token (Gemma) they say True, as `hf` does by itself.

    lm_eval.simple_evaluate(GlupruneLM("demo"), tasks=["arc_easy"])
    python -m evals lm-eval run --model gluprune --model_args pretrained=demo --tasks arc_easy
"""

import array
import contextlib
import dataclasses
import datetime
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from jax.typing import ArrayLike
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import postprocess_generated_text

import convert
from convert.chat import (
    TemplateError,
    choose_template,
    choose_thinking,
    parse_date,
    render,
    template_of,
    today,
    writes_date,
)
from convert.tokenizer import check_ids, end_of_sequence_ids, load_tokenizer, tokens_beyond
from evals.harness.decoding import DEFAULT_NEW_TOKENS, Decoding, StopStrings, changes_to_greedy, parse_decoding
from evals.harness.footprint import evaluation_uses
from evals.harness.requests import Requests
from evals.results.journal import Journal
from gluprune_jax.errors import GlupruneError, RequestError, shortened, spelled
from gluprune_jax.inference.engine import Engine, LogLikelihood
from gluprune_jax.memory.mesh_choice import MeshRequest, mesh_chooser
from gluprune_jax.models.parameters import parameters_of
from gluprune_jax.parallel.distributed import check_same
from gluprune_jax.progress import Progress, Report, no_progress
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.scores import fingerprint

MODEL_ARGUMENTS = (
    "pretrained",
    "revision",
    "dtype",
    "mask",
    "batch_size",
    "max_length",
    "add_bos_token",
    "prefix_token_id",
    "date",
    "chat_template",
    "mesh",
)

# What lm-eval's `hf` takes as well and changes no answer here, with the values of which that is true; () for any.
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "attn_implementation": (),
    "autogptq": (False, None),
    "backend": ("default", "causal"),
    "chat_template_args": (None, {}),
    "delta": (None,),
    "device_map": (),
    "enable_thinking": (None,),
    "gguf_file": (None,),
    "gptqmodel": (False, None),
    "logits_cache": (),
    "low_cpu_mem_usage": (),
    "max_batch_size": (),
    "max_cpu_memory": (),
    "max_memory_per_gpu": (),
    "mixed_precision_dtype": (None,),
    "offload_folder": (),
    "parallelize": (),
    "peft": (None,),
    "softmax_dtype": (None, "float32"),
    "subfolder": (None, ""),
    "think_end_token": (None,),
    "tp_plan": (),
    "truncation": (False, None),
    "trust_remote_code": (),
    "use_fast_tokenizer": (True, None),
}

# Requests whose texts are tokenised together: enough for all cores; a token takes a hundred bytes meanwhile.
_TOKENISED_TOGETHER = 256


@contextlib.contextmanager
def _naming_arguments() -> Iterator[None]:
    """Lets errors name the context length as lm-eval's argument does."""
    try:
        yield
    except GlupruneError as error:
        raise type(error)(spelled(str(error), {"context_length": "max_length"})) from error


@register_model("gluprune")
class GlupruneLM(TemplateLM):  # type: ignore[misc]
    """A model of ours as lm-eval knows models.

    Requests with the same arguments are run once, sampled ones excepted.

    Args:
      pretrained: a folder, a `.gguf` file, an Orbax checkpoint, a hub id, or "demo" (see `convert.load`).
      revision: branch, tag or commit of a hub id.
      dtype: "float32", "bfloat16" or "float16" casts the weights; None or "auto" leaves them as they are.
      mask: a pruning plan's file; what it would remove is masked.
      batch_size: see `Engine`; None or "auto" goes by the memory there is.
      max_length: tokens of the window, if fewer than the model's.
      add_bos_token: whether texts begin with the BOS token, unless they do already. None leaves it to the tokenizer,
        as `hf` does; the paper's protocol is False.
      prefix_token_id: stands for an empty context and before documents; otherwise BOS, or EOS where there is none.
      date: the day, YYYY-MM-DD, that the chat template takes for today, if it writes one; otherwise the day on which
        the model is loaded, however long it takes.
      chat_template: the name of the chat template to apply, of a tokenizer that has several; otherwise the one that
        lm-eval's `apply_chat_template` names, or the one called "default".
      mesh: such as "data=2,model=4", as `mesh` of `MeshRequest`: replicas, and the devices that each is divided
        over; "auto": as many replicas as fit. On lm-eval's command line it stands in quotes of its own, for its comma:
        --model_args 'pretrained=demo,mesh="data=2,model=4"'.
      device: does nothing, for lm-eval's command line says "cuda:0" to every model. JAX takes the accelerator that is
        there, or what the environment variable JAX_PLATFORMS names.
      others: what `hf` takes as well, such as parallelize or trust_remote_code, as long as it changes no answer: it
        does nothing, and a note says so. Nothing else is accepted.

    Attributes:
      checkpoint: the model with its surroundings.
      engine: computes the answers.
      tokenizer: the checkpoint's `transformers` tokenizer.
      progress: is told what is being done, by all models alike; commands let it draw bars.

    Raises:
      RequestError: an argument that is not known or out of range, or a model, plan or chat template that cannot be
        had.
      OperationError: files of the model are damaged.
    """

    # Of all models in a process: lm-eval makes them itself, and has no place for it.
    progress: ClassVar[Progress] = staticmethod(no_progress)

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        revision: str | None = None,
        dtype: str | None = None,
        mask: str | None = None,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        date: str | None = None,
        chat_template: str | None = None,
        mesh: str = "auto",
        device: str | None = None,
        **others: Any,
    ) -> None:
        _check_others(others)
        if pretrained is None:
            raise RequestError("the model gluprune needs the argument pretrained; give a folder, hub id or demo")
        rows = _parse_batch_size(batch_size)
        window = _parse_integer("max_length", max_length)
        prefix = _parse_integer("prefix_token_id", prefix_token_id)
        plan = None if mask is None else PruningPlan.load(Path(str(mask)).expanduser())
        if plan is not None:
            plan.check_maskable()
        with _naming_arguments():
            where = MeshRequest(mesh=str(mesh), remedies=("mesh", "batch_size", "context_length", "dtype"))
            checkpoint = convert.load(
                str(pretrained),
                dtype=None if dtype in (None, "auto") else str(dtype),
                revision=None if revision is None else str(revision),
                mesh=mesh_chooser(where, evaluation_uses(rows, window, None)),
            )
            for sentence in checkpoint.notes:
                _log(sentence)
            if plan is not None:
                plan.check_fits(checkpoint.config, fingerprint(checkpoint.model))
            self._set_up(
                checkpoint,
                neuron_masks=None if plan is None else plan.masks(checkpoint.config),
                batch_size=rows,
                context_length=window,
                add_bos_token=add_bos_token,
                prefix_token_id=prefix,
                date=None if date is None else parse_date(str(date)),
                chat_template=chat_template,
                revision=revision,
            )
        if beyond := tokens_beyond(self.tokenizer, checkpoint.config.vocab_size):
            _log(beyond)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: convert.Checkpoint,
        *,
        neuron_masks: tuple[ArrayLike, ...] | None = None,
        batch_size: int | None = None,
        context_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        date: datetime.date | None = None,
        chat_template: str | None = None,
        thinking: str | None = None,
        journal: Journal | None = None,
        note: Callable[[str], None] | None = None,
    ) -> Self:
        """The backend of a model that is already there.

        Args:
          checkpoint: the model, its tokenizer and its token ids.
          neuron_masks: see `Llama.__call__`.
          batch_size: see `Engine`.
          context_length: tokens of the window, if fewer than the model's.
          add_bos_token: see the class.
          prefix_token_id: see the class.
          date: see the class.
          chat_template: see the class.
          thinking: "on" or "off" switches the reasoning mode of the chat template.
          journal: what it knows is not asked again, and it is told each answer as soon as that is there, also
            whether the context was cut. Sampled texts are kept from it: their requests may be repeated, and a seed
            fixes them only together.
          note: called with what the user should know, in a sentence; by default it is logged. How many contexts were
            cut is only said where no journal records it.

        Raises:
          RequestError: an argument out of range, no tokenizer, or no chat template of that name.
          OperationError: the tokenizer or the generation config cannot be read.
        """
        lm = cls.__new__(cls)
        lm._set_up(
            checkpoint,
            neuron_masks=neuron_masks,
            batch_size=batch_size,
            context_length=context_length,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            date=date,
            chat_template=chat_template,
            thinking=thinking,
            journal=journal,
            note=note,
        )
        return lm

    def _set_up(
        self,
        checkpoint: convert.Checkpoint,
        *,
        neuron_masks: tuple[ArrayLike, ...] | None,
        batch_size: int | None,
        context_length: int | None,
        add_bos_token: bool | None,
        prefix_token_id: int | None,
        date: datetime.date | None,
        chat_template: str | None = None,
        thinking: str | None = None,
        revision: str | None = None,
        journal: Journal | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__()
        if add_bos_token not in (True, False, None):
            raise RequestError(f"add_bos_token is {shortened(add_bos_token)}; it must be True, False or None")
        add_bos_token = None if add_bos_token is None else bool(add_bos_token)  # lm-eval reads 1 as a number
        vocabulary = checkpoint.config.vocab_size
        if prefix_token_id is not None and not 0 <= prefix_token_id < vocabulary:
            raise RequestError(f"prefix_token_id is {prefix_token_id}; it must lie between 0 and {vocabulary - 1}")
        self.checkpoint = checkpoint
        self.tokenizer, self._template_name = load_tokenizer(checkpoint), ""
        if chat_template is not None:
            self._choose_template(str(chat_template))
        if thinking is not None:
            choose_thinking(self.tokenizer, thinking, checkpoint.source)
        self._given_date, self._today = date, today()
        self._written_date: datetime.date | None = None  # as soon as a template was applied
        if add_bos_token:
            self.tokenizer.add_bos_token = True
        self.engine = Engine(
            checkpoint.model,
            neuron_masks=neuron_masks,
            batch_size=batch_size,
            context_length=context_length,
            note=note or _log,
        )
        self._batch_size, self._revision, self._journal, self._note = batch_size, revision, journal, note or _log
        self._add_bos_token, self._prefix_token_id = add_bos_token, prefix_token_id
        self._masked = neuron_masks is not None
        # lm-eval ends a text at the tokenizer's EOS, `transformers` at those of the generation config.
        ends = [*end_of_sequence_ids(checkpoint), self.tokenizer.eos_token_id]
        self._eos_ids = [token for token in dict.fromkeys(ends) if token is not None]
        self._said: set[str] = set()
        self._encoded: dict[tuple[str, bool | None], list[int]] = {}

    # --------------------------------------------------------------------------------------- what lm-eval looks up

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context.

        Raises:
          RequestError: the tokenizer has neither BOS nor EOS, or the model no embedding for it.
        """
        token = self._find_prefix()
        if token is None:
            raise RequestError(
                f"the tokenizer of {self.checkpoint.source} has neither a BOS nor an EOS token to stand for an empty "
                f"context; give prefix_token_id"
            )
        check_ids(self.tokenizer, [token], self.checkpoint.config.vocab_size)
        return token

    def _find_prefix(self) -> int | None:
        candidates = self._prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return next((token for token in candidates if token is not None), None)

    @property
    def max_length(self) -> int:
        """The window in tokens."""
        return self.engine.window

    @property
    def max_gen_toks(self) -> int:
        """New tokens of an answer where the task does not say how many."""
        return DEFAULT_NEW_TOKENS

    @property
    def batch_size(self) -> int | str:
        """As it was asked for."""
        return self._batch_size or "auto"

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer and its chat template in lm-eval's cache of requests."""
        date = self._prompt_date()
        # The requests in the cache are prompts.
        about = [self._template_name, "" if date is None else f"{date}"]
        return "__".join([self.checkpoint.source.replace("/", "__"), *filter(None, about)])

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results about the model."""
        dtypes = sorted({array.dtype.name for array in parameters_of(self.checkpoint.model).values()})
        return {
            "model_num_parameters": self.checkpoint.config.num_parameters,
            "model_dtype": ", ".join(dtypes),
            "model_revision": self._revision or "",
            "model_sha": "",  # the hub's, which would have to be asked
            "model_source": self.checkpoint.source,
            "model_masked": self._masked,
            "model_history": list(self.checkpoint.history),
            "chat_template_date": None if self._written_date is None else self._written_date.isoformat(),
        }

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that lm-eval writes into its results. One that it names is applied from now on.

        Raises:
          RequestError: the tokenizer has several templates and none of that name, or none called "default".
        """
        if not chat_template or not isinstance(self.tokenizer.chat_template, Mapping):
            template: str | None = super().chat_template(chat_template)
            return template
        if isinstance(chat_template, str):
            self._choose_template(chat_template)
        return template_of(self.tokenizer)

    def _choose_template(self, name: str) -> None:
        choose_template(self.tokenizer, name, self.checkpoint.source)
        self._template_name = name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text. A template that refuses it is tried without the system's messages.

        Raises:
          RequestError: the tokenizer has no chat template, or several without a default.
          OperationError: the template fails.
        """
        if template_of(self.tokenizer) is None:
            raise RequestError(
                f"the tokenizer of {self.checkpoint.source} has no chat template; leave out --apply_chat_template"
            )
        self._written_date = self._prompt_date()
        if self._written_date is not None and self._given_date is None:
            self._note_once(f"the chat template writes the date: {self._written_date}, today's; date= gives another")
        write = functools.partial(
            render,
            self.tokenizer,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            date=self._written_date,
        )
        try:
            return write(chat_history)
        except TemplateError:
            without_system = [message for message in chat_history if message["role"] != "system"]
            if len(without_system) == len(chat_history):
                raise
        text = write(without_system)
        self._note_once("the chat template takes no system messages; they are left out")
        return text

    def _prompt_date(self) -> datetime.date | None:
        """The day that the chat template writes, if it writes one."""
        templates = self.tokenizer.chat_template
        if isinstance(templates, Mapping) and "default" not in templates:
            return None  # none is applied before one is chosen
        is_given = self._given_date is not None
        return (self._given_date or self._today) if writes_date(self.tokenizer, is_given=is_given) else None

    # ---------------------------------------------------------------------------------------------------- token ids

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a text; BOS is not added to a text that begins with it."""
        key = string, self._adds_special_tokens(string, add_special_tokens)
        ids = self._encoded[key] if key in self._encoded else self._encode([key])[key]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_decode(self, tokens: Sequence[int] | int, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def _adds_special_tokens(self, text: str, wish: bool | None = None) -> bool | None:
        if wish is not None:
            return wish
        begun = self._prefix_text is not None and text.startswith(self._prefix_text)
        return False if begun else self._add_bos_token

    @functools.cached_property
    def _prefix_text(self) -> str | None:
        token = self._find_prefix()
        return None if token is None else self.tok_decode(token, skip_special_tokens=False)

    def _encode(self, texts: Iterable[tuple[str, bool | None]]) -> dict[tuple[str, bool | None], list[int]]:
        """Token ids of texts, each with whether special tokens are added; every different one is encoded once."""
        encoded: dict[tuple[str, bool | None], list[int]] = {}
        different = list(dict.fromkeys(texts))
        for wish in (True, False, None):
            keys = [key for key in different if key[1] is wish]
            if keys:
                # A text longer than the window is expected here, so nothing need be said about it.
                options = {"verbose": False, "return_attention_mask": False, "return_token_type_ids": False}
                if wish is not None:
                    options["add_special_tokens"] = wish
                encoded |= zip(keys, self.tokenizer([text for text, _ in keys], **options)["input_ids"], strict=True)
        for ids in encoded.values():
            check_ids(self.tokenizer, ids, self.checkpoint.config.vocab_size)
        return encoded

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]], quiet: bool) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Token ids of contexts and continuations, as lm-eval tells them apart."""
        encoded: list[tuple[Sequence[int], Sequence[int]]] = []
        with self._progress("tokenising", len(pairs), "requests", quiet) as progress:
            for start in range(0, len(pairs), _TOKENISED_TOGETHER):
                part = pairs[start : start + _TOKENISED_TOGETHER]
                # What `_encode_request` will look up.
                texts = {text for context, more in part if context for text in (context.rstrip(), context + more)}
                bare = {text for context, text in part if not context}
                self._encoded = self._encode(
                    [(text, self._adds_special_tokens(text)) for text in texts] + [(text, False) for text in bare]
                )
                shared: dict[str, Sequence[int]] = {}  # in memory once, for all requests of a context
                for context, continuation in part:
                    ids, targets = self._encode_request(context, continuation)
                    if not context:
                        encoded.append((ids, targets))
                        continue
                    if context not in shared:
                        shared[context] = array.array("i", ids)
                    encoded.append((shared[context], targets))
                progress(len(encoded))
        self._encoded = {}
        return encoded

    def _encode_request(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        ids: list[int]
        if context:
            ids, targets = self._encode_pair(context, continuation)
        else:
            targets = self.tok_encode(continuation, add_special_tokens=False)
            if targets[:1] == [self.prefix_token_id]:
                ids, targets = targets[:1], targets[1:]
            else:
                ids = [self.prefix_token_id]
        if not ids or not targets:
            which = "context" if not ids else "continuation"
            raise RequestError(
                f"the {which} of a request has no tokens (context {shortened(context)}, continuation "
                f"{shortened(continuation)}); a task that asks so cannot be scored"
            )
        return ids, targets

    # ---------------------------------------------------------------------------------------------- log-likelihoods

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Natural logarithms of the likelihood of continuations, and whether greedy decoding would say the same.

        Args:
          requests: lm-eval's instances with the arguments context and continuation.
          disable_tqdm: shows no progress.

        Raises:
          RequestError: a continuation (or a context of spaces) without tokens, or one longer than the window.
        """
        asked = self._ask("loglikelihood", requests)
        pairs = self._encode_pairs(asked.open, disable_tqdm)
        encoded = [(arguments, *pair) for arguments, pair in zip(asked.open, pairs, strict=True)]
        with self._progress("log-likelihoods", len(encoded), "requests", disable_tqdm) as progress:

            def record(number: int, result: LogLikelihood) -> None:
                _, context, continuation = encoded[number]
                truncated = len(context) + len(continuation) > self.engine.window + 1
                asked.record(number, (result.value, result.is_greedy), truncated=truncated)
                progress(asked.recorded)

            self._loglikelihood_tokens(encoded, on_result=record)
        self._report_truncated(asked)
        return asked.responses()

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]],
        *,
        on_result: Callable[[int, LogLikelihood], None] | None = None,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [(value, is_greedy) for value, is_greedy in self.engine.loglikelihood(pairs, on_result=on_result)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Natural logarithms of the likelihood of whole documents.

        Args:
          requests: lm-eval's instances with a text as their one argument.
          disable_tqdm: shows no progress.
        """
        asked = self._ask("loglikelihood_rolling", requests)
        texts = [(text, self._adds_special_tokens(text)) for (text,) in asked.open]
        encoded = self._encode(texts)
        with self._progress("documents", len(texts), "documents", disable_tqdm) as progress:

            def record(number: int, value: float) -> None:
                asked.record(number, value)
                progress(asked.recorded)

            self.engine.loglikelihood_rolling(
                [encoded[text] for text in texts], prefix_token=self.prefix_token_id, on_result=record
            )
        return asked.responses()

    # --------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts.

        Stop strings, `max_gen_toks` (under any of lm-eval's names), `do_sample`, `temperature`, `top_p` and `seed` are
        heeded. Sampling differs from that of `transformers`, which also draws from the 50 likeliest tokens only unless
        told otherwise.

        Args:
          requests: lm-eval's instances with a context and a mapping of generation arguments.
          disable_tqdm: shows no progress.

        Raises:
          RequestError: generation arguments that are not supported, no room in the window, or an empty context.
        """
        for sentence in changes_to_greedy(self.checkpoint):
            self._note_once(sentence)
        end = None if self.eot_token_id is None else self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        asked = self._ask("generate_until", requests)
        groups: dict[Decoding, list[int]] = {}
        for number, (_, arguments) in enumerate(asked.open):
            groups.setdefault(parse_decoding(arguments, self.max_gen_toks, end), []).append(number)
        for decoding in groups:
            if decoding.max_new_tokens >= self.engine.window:
                raise RequestError(
                    f"the task asks for up to {decoding.max_new_tokens} new tokens, and the window has "
                    f"{self.engine.window}; give a smaller max_gen_toks or a longer max_length"
                )
        tally = _Tally(len(asked.open), sum(key.max_new_tokens * len(numbers) for key, numbers in groups.items()))
        with self._progress("answers", tally.at_most, "tokens", disable_tqdm) as progress:
            for decoding, numbers in groups.items():
                before = tally.tokens

                def on_tokens(count: int, before: int = before) -> None:
                    tally.tokens = before + count
                    progress(tally.tokens, at_most=tally.at_most, state=f"{asked.recorded:,}/{tally.answers:,} answers")

                self._generate(asked, decoding, numbers, tally, on_tokens)
        self._report_truncated(asked)
        return asked.responses()

    def _generate(
        self,
        asked: Requests,
        decoding: Decoding,
        numbers: Sequence[int],
        tally: "_Tally",
        on_tokens: Callable[[int], None],
    ) -> None:
        bos = self.tokenizer.bos_token
        texts = [
            # Unlike `tok_encode`, lm-eval looks for the BOS token here even where another one is the prefix.
            (context, False if bos and context.startswith(bos) else self._add_bos_token)
            for context in (asked.open[number][0] for number in numbers)
        ]
        encoded = self._encode(texts)
        room = self.engine.window - decoding.max_new_tokens
        stops = StopStrings(self.tokenizer, decoding.until)

        def record(index: int, ids: Sequence[int]) -> None:
            text = self.tok_decode(ids[: stops.find(ids)])
            text = postprocess_generated_text(text, list(decoding.until), think_end_token=None)
            asked.record(numbers[index], text, truncated=len(encoded[texts[index]]) > room)
            tally.at_most -= decoding.max_new_tokens - len(ids)

        self.engine.generate(
            [encoded[text][-room:] for text in texts],
            max_new_tokens=decoding.max_new_tokens,
            eos_ids=self._eos_ids,
            should_stop=stops,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            seed=decoding.seed,
            on_tokens=on_tokens,
            on_result=record,
        )

    # -------------------------------------------------------------------------------------------------- bookkeeping

    def _ask(self, kind: str, requests: Sequence[Any]) -> Requests:
        asked = Requests(kind, [request.args for request in requests], self._journal, self.cache_hook)
        check_same("the data of a benchmark", (repr(arguments).encode(errors="replace") for arguments in asked.open))
        return asked

    def _progress(self, what: str, total: int, unit: str, quiet: bool) -> contextlib.AbstractContextManager[Report]:
        report = no_progress if quiet or not total else type(self).progress
        return report(what, total, unit)

    def _report_truncated(self, asked: Requests) -> None:
        if asked.truncated and self._journal is None:
            self._note(
                f"{asked.truncated:,} of {len(asked.open):,} contexts were longer than the window of "
                f"{self.engine.window} tokens; they were cut on the left"
            )

    def _note_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self._note(sentence)


@dataclasses.dataclass
class _Tally:
    """How far the generation of answers is.

    Attributes:
      answers: how many there will be.
      at_most: tokens that they can have together, of which an answer that ends early leaves the rest.
      tokens: decoded so far.
    """

    answers: int
    at_most: int
    tokens: int = 0


def _check_others(arguments: Mapping[str, Any]) -> None:
    """Refuses what changes answers in `hf` and cannot here, or is not known at all; the rest is noted."""
    if unknown := sorted(arguments.keys() - _WITHOUT_EFFECT.keys()):
        more = f" and {len(unknown) - 3} more" * (len(unknown) > 3)
        raise RequestError(
            f"the model gluprune has no argument {', '.join(map(shortened, unknown[:3]))}{more}; "
            f"accepted: {', '.join(MODEL_ARGUMENTS)}"
        )
    for name, value in arguments.items():
        harmless = _WITHOUT_EFFECT[name]
        if harmless and value not in harmless:
            raise RequestError(
                f"the model gluprune does not support {name}={shortened(value)}; leave it out, or give {harmless[0]!r}"
            )
    if arguments:
        _log(f"accepted without effect: {', '.join(sorted(arguments))}")


def _parse_integer(name: str, value: Any) -> int | None:
    if value is None or type(value) is int:
        return value
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    raise RequestError(f"{name} is {value!r}; it must be a whole number")


def _parse_batch_size(value: Any) -> int | None:
    """lm-eval's "auto" and "auto:N" leave it to the engine."""
    return None if str(value).partition(":")[0] == "auto" else _parse_integer("batch_size", value)


def _log(sentence: str) -> None:
    logging.getLogger("lm_eval.gluprune").warning(sentence)
