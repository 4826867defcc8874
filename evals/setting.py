"""What decides a model's answers, as a record and as a digest: results are only ever continued under the same one.

In the digest is what decides numbers: the weights bit for bit (and so their dtype), the mask, the tokenizer, the chat
template, the window, the tokens that end an answer, seeds and the precision of matrix products. Beside it stands what
is only good to know: where the model was loaded from, its sizes and its past. Versions, devices and batches change
rounding at most, and stand with each result.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.checkpoint import Checkpoint, model_arrays
from convert.tokenizer import end_of_sequence_ids
from gluprune_jax.errors import RequestError
from gluprune_jax.mesh import to_host
from gluprune_jax.model import ModelConfig
from gluprune_jax.plan import PruningPlan

# To be raised with every change to this program that changes answers by more than rounding: what older versions
# answered is then not continued.
REVISION = 1

# lm-eval's own: of Python, of numpy, and of the choice of few-shot examples.
SEEDS = {"python": 0, "numpy": 1234, "fewshot": 1234}

_MAX_NAME = 60


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model and the way it is asked.

    Attributes:
      label: names the model to a reader, such as "smollm2-135m-instruct.ppm-1383".
      dtype: of the weights; "mixed" where they differ.
      decides: what decides the answers, as JSON.
      about: what else is known, as JSON.
    """

    label: str
    dtype: str
    decides: Mapping[str, Any]
    about: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the answers."""
        return json_digest(self.decides)

    @property
    def folder_name(self) -> str:
        """The readable name with the start of the digest."""
        chat = ".chat" if self.decides.get("chat_template") else ""
        return f"{self.label}.{self.dtype}{chat}-{self.digest[:8]}"


def describe_setting(
    checkpoint: Checkpoint,
    tokenizer: Any,
    *,
    plan: PruningPlan | None = None,
    max_length: int | None = None,
    apply_chat_template: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Setting:
    """The setting of an evaluation.

    Args:
      checkpoint: the model as it is evaluated. Its weights are read once.
      tokenizer: its `transformers` tokenizer.
      plan: masks the model, if given.
      max_length: tokens of the window, if fewer than the model's.
      apply_chat_template: requests are wrapped in the tokenizer's chat template.
      progress: called with what is being done, the bytes done and the bytes in all.

    Raises:
      RequestError: the tokenizer does not fit the model, there is no chat template, or the window is longer than the
        model's.
    """
    config = checkpoint.config
    check_tokenizer(tokenizer, config)
    if max_length is not None and not 2 <= max_length <= config.max_position_embeddings:
        raise RequestError(
            f"--max-length is {max_length}; it must lie between 2 and the model's {config.max_position_embeddings}"
        )
    template = getattr(tokenizer, "chat_template", None)
    if apply_chat_template and not template:
        raise RequestError(f"--apply-chat-template: the tokenizer of {checkpoint.source} has no chat template")
    dtypes = {array.dtype.name for _, array in model_arrays(checkpoint.model)}
    decides = {
        "revision": REVISION,
        "weights": weights_digest(checkpoint, progress),
        "mask": None if plan is None else _kept_digest(plan),
        "tokenizer": tokenizer_digest(tokenizer, checkpoint.assets),
        # One of them stands for an empty context.
        "special_tokens": {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")},
        "bos_added": False,
        # Few-shot examples become turns of the conversation, lm-eval's default.
        "chat_template": {"sha256": json_digest(template), "multiturn": True} if apply_chat_template else None,
        "window": max_length or config.max_position_embeddings,
        "end_of_sequence": list(end_of_sequence_ids(checkpoint)),
        "decoding": "greedy unless the task says otherwise",
        "seeds": SEEDS,
        "matmul_precision": jax.config.values["jax_default_matmul_precision"],
    }
    known = {
        "model": checkpoint.source,
        "history": list(checkpoint.history),
        "plan": None if plan is None else plan.summary(),
        "intermediate_sizes": list(config.intermediate_sizes),
        "hidden_size": config.hidden_size,
        "parameters": config.num_parameters,
    }
    label = model_name(checkpoint.source) + ("" if plan is None else f".{_mask_name(plan)}")
    return Setting(
        label=label,
        dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        decides=decides,
        about=known,
    )


def check_tokenizer(tokenizer: Any, config: ModelConfig) -> None:
    """Makes sure that every token of the tokenizer is one of the model's.

    Raises:
      RequestError: one is not.
    """
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= config.vocab_size:
        raise RequestError(
            f"the tokenizer has token {token!r} with id {highest}, and the model a vocabulary of {config.vocab_size}; "
            f"they do not belong together"
        )


def weights_digest(checkpoint: Checkpoint, progress: Callable[[str, int, int], None] | None = None) -> str:
    """SHA-256 over the architecture and each tensor's name, dtype, shape and values, as "sha256:..." .

    A model has the same digest whatever format it was loaded from and however its arrays are padded and spread over
    devices. With several processes all of them must call it.
    """
    architecture = dataclasses.asdict(checkpoint.config)
    for stored in ("width_multiple", "max_position_embeddings"):  # the window is part of the setting by itself
        del architecture[stored]
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    total = sum(array.nbytes for _, array in model_arrays(checkpoint.model))
    done = 0
    for name, array in model_arrays(checkpoint.model):
        values = to_host(array)
        done += values.nbytes
        if name.neuron_axis is not None:  # storage padding is no part of the model
            values = values.take(range(name.shape[name.neuron_axis]), axis=name.neuron_axis)
        digest.update(f"{name.hf} {values.dtype.name} {name.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        if progress:
            progress("identifying the weights", done, total)
    return f"sha256:{digest.hexdigest()}"


def tokenizer_digest(tokenizer: Any, assets: Mapping[str, bytes]) -> str:
    """SHA-256 of what the tokenizer does to a text, as "sha256:...".

    Of a tokenizer that is not written in Rust nothing better is known than its files.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return f"sha256:{hashlib.sha256(backend.to_str().encode()).hexdigest()}"
    files = {name: data.hex() for name, data in assets.items() if re.match(r"tokenizer|vocab|merges|.*tokens", name)}
    return f"sha256:{json_digest(files)}"


def model_name(source: str) -> str:
    """A short name for a model from where it was loaded: the last part of a path or hub id, in lower case."""
    parts = [part for part in re.sub(r"\s*\(.*\)$", "", source).split("/") if part not in ("", ".", "orbax")]
    name = parts[-1] if parts and parts[-1] != ".." else Path(source).expanduser().resolve().name
    return _slug(name.removesuffix(".gguf")) or "model"


def json_digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _mask_name(plan: PruningPlan) -> str:
    low, high = min(plan.widths), max(plan.widths)
    return f"{_slug(plan.criterion)}-{low}" + ("" if low == high else f"to{high}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.")[:_MAX_NAME]


def _kept_digest(plan: PruningPlan) -> str:
    digest = hashlib.sha256()
    for kept in plan.kept:
        digest.update(f"{len(kept)}\n".encode())
        digest.update(np.asarray(kept, "<i4").tobytes())
    return f"sha256:{digest.hexdigest()}"
