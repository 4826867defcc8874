"""The tokenizer of a checkpoint, as `transformers` builds it from the checkpoint's own files."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.checkpoint import Checkpoint
from gluprune_jax.documents import Messages
from gluprune_jax.errors import OperationError, RequestError


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's `transformers` tokenizer.

    Raises:
      RequestError: the checkpoint has no tokenizer files.
      OperationError: `transformers` cannot read them.
    """
    if not any(name.startswith(("tokenizer", "vocab")) for name in checkpoint.assets):
        raise RequestError(f"{checkpoint.source} has no tokenizer files, which text needs")
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in checkpoint.assets.items():
            (Path(folder) / name).write_bytes(content)
        config = {"model_type": checkpoint.hf_config["model_type"]}
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            return AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # the Rust library raises bare ones
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            raise OperationError(f"the tokenizer of {checkpoint.source} cannot be read: {first_line}") from error


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text with nothing added."""
    # verbose: a text longer than the window is expected here.
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a user's prompt, in the chat template if the tokenizer has one.

    Raises:
      OperationError: the template fails.
    """
    if tokenizer.chat_template is None:
        ids: list[int] = tokenizer.encode(prompt)
        return ids
    return _encode_messages(tokenizer, [{"role": "user", "content": prompt}], is_asking=True)


def encode_conversation(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a whole conversation in the chat template.

    Raises:
      RequestError: the tokenizer has no chat template.
      OperationError: the template fails.
    """
    if tokenizer.chat_template is None:
        raise RequestError("the model's tokenizer has no chat template, which conversations need; give plain text")
    return _encode_messages(tokenizer, messages, is_asking=False)


def encode_documents(
    tokenizer: Any,
    documents: Sequence[str | Messages],
    *,
    most_tokens: int | None = None,
    on_document: Callable[[int], None] | None = None,
) -> list[NDArray[np.int32]]:
    """Token ids of each document, plain texts with nothing added and conversations in the chat template.

    Args:
      tokenizer: of the model.
      documents: see `gluprune_jax.documents`.
      most_tokens: documents behind the one that reaches this many are left out.
      on_document: called with how many documents are done.

    Raises:
      RequestError: conversations, and the tokenizer has no chat template.
      OperationError: the template fails.
    """
    encoded: list[NDArray[np.int32]] = []
    total = 0
    for document in documents:
        if most_tokens is not None and total >= most_tokens:
            break
        if isinstance(document, str):
            ids = encode_text(tokenizer, document)
        else:
            ids = encode_conversation(tokenizer, document)
        encoded.append(np.array(ids, np.int32))
        total += len(ids)
        if on_document:
            on_document(len(encoded))
    return encoded


def separator(checkpoint: Checkpoint, tokenizer: Any) -> int | None:
    """The token that stands between two documents, where the model has one."""
    end: int | None = tokenizer.eos_token_id
    return next(iter(end_of_sequence_ids(checkpoint)), None) if end is None else end


def _encode_messages(tokenizer: Any, messages: Sequence[Mapping[str, Any]], is_asking: bool) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=is_asking, tokenize=False)
    except Exception as error:  # a template is a program
        raise OperationError(f"the chat template of the tokenizer fails: {error}") from error
    return encode_text(tokenizer, text)


def end_of_sequence_ids(checkpoint: Checkpoint) -> Sequence[int]:
    """The token ids that end an answer: from the generation config if there is one, else from the model's.

    Raises:
      OperationError: they are no token ids.
    """
    config: dict[str, Any] = dict(checkpoint.hf_config)
    try:
        config |= json.loads(checkpoint.assets.get("generation_config.json", b"{}"))
    except (ValueError, TypeError) as error:
        raise OperationError(f"generation_config.json of {checkpoint.source} cannot be read: {error}") from error
    ids = config.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int for i in ids):
        raise OperationError(f"eos_token_id of {checkpoint.source} is {ids}; it must be a token id or a list of them")
    return ids
