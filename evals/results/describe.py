"""The setting of an evaluation, from the model and its tokenizer: see `evals.results.setting`."""

import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.chat import template_of
from convert.checkpoint import Checkpoint, for_file
from convert.tokenizer import end_of_sequence_ids
from evals.results.setting import Setting
from gluprune_jax.errors import RequestError
from gluprune_jax.files.records import json_digest
from gluprune_jax.models.config import LayerAttention, Llama3Rope, ModelConfig, Rope
from gluprune_jax.pruning.plan import PruningPlan

# To be raised with every change to this program that changes answers by more than rounding: what older versions
# answered is then not continued.
REVISION = 1

# lm-eval's own: of Python, of numpy, and of the choice of few-shot examples.
SEEDS = {"python": 0, "numpy": 1234, "fewshot": 1234}

_MAX_NAME = 60


def describe_setting(
    checkpoint: Checkpoint,
    tokenizer: Any,
    *,
    plan: PruningPlan | None = None,
    context_length: int | None = None,
    apply_chat_template: bool = False,
    date: datetime.date | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Setting:
    """The setting of an evaluation.

    Args:
      checkpoint: the model as it is evaluated. Its weights are read once.
      tokenizer: its `transformers` tokenizer.
      plan: masks the model, if given.
      context_length: tokens of the window, if fewer than the model's.
      apply_chat_template: requests are wrapped in the tokenizer's chat template.
      date: the day that the template takes for today; None where it reads no calendar.
      progress: called with what is being done, the bytes done and the bytes in all.

    Raises:
      RequestError: there is no chat template or no default one, or the window is longer than the model's.
    """
    config = checkpoint.config
    if context_length is not None and not 2 <= context_length <= config.context_length:
        raise RequestError(
            f"`context_length` is {context_length}; it must lie between 2 and the model's {config.context_length}"
        )
    template = template_of(tokenizer) if apply_chat_template else None
    if apply_chat_template and template is None:
        raise RequestError(f"`apply_chat_template`: the tokenizer of {checkpoint.source} has no chat template")
    chat: dict[str, Any] | None = None
    if apply_chat_template:
        # Few-shot examples become turns of the conversation, lm-eval's default.
        chat = {"sha256": json_digest(template), "multiturn": True}
        chat |= {} if date is None else {"date": date.isoformat()}
    dtypes = {dtype.name for dtype in checkpoint.dtypes.values()}
    decides = {
        "revision": REVISION,
        "weights": weights_digest(checkpoint, progress),
        "mask": None if plan is None else _kept_digest(plan),
        "tokenizer": tokenizer_digest(tokenizer, checkpoint.assets),
        # One of them stands for an empty context.
        "special_tokens": {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")},
        "bos_added": checkpoint.family.needs_bos,
        "chat_template": chat,
        "window": context_length or config.context_length,
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


def weights_digest(checkpoint: Checkpoint, progress: Callable[[str, int, int], None] | None = None) -> str:
    """SHA-256 over the architecture and each tensor's name, dtype, shape and values, as "sha256:..." .

    A model has the same digest whatever format it was loaded from and however its arrays are padded and spread over
    devices. With several processes all of them must call it.
    """
    architecture = _architecture(checkpoint.config)
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    total = checkpoint.num_bytes()
    done = 0
    for name in checkpoint.tensor_names:
        width = 0 if name.neuron_axis is None else name.shape[name.neuron_axis]
        values = for_file(name, checkpoint.array(name), width)  # without storage padding, which is no part of the model
        done += values.nbytes
        digest.update(f"{name.hf} {values.dtype.name} {name.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        if progress:
            progress("identifying the weights", done, total)
    return f"sha256:{digest.hexdigest()}"


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """What the digest says of an architecture: what differs from Llama's, and what it said when there was no other."""
    fields = dataclasses.fields(ModelConfig)
    # The context window is part of the setting by itself; storage padding is no part of the model.
    left_out = {"attention", "width_multiple", "max_position_embeddings"}
    told = {
        field.name: getattr(config, field.name)
        for field in fields
        if field.name not in left_out
        and (field.name == "tie_word_embeddings" or getattr(config, field.name) != field.default)
    }
    rope = config.attention[0].rope
    plain = None if rope is None else LayerAttention(Rope(rope.theta, rope.scaling))
    if rope is not None and isinstance(rope.scaling, Llama3Rope | None) and set(config.attention) == {plain}:
        scaling = None if rope.scaling is None else dataclasses.asdict(rope.scaling)
        return told | {"rope_theta": rope.theta, "rope_scaling": scaling}
    return told | {"attention": [dataclasses.asdict(attention) for attention in config.attention]}


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
