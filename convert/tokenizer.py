"""The tokenizer of a checkpoint, as `transformers` builds it from the checkpoint's own files."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint
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
        except (OSError, ValueError, ImportError) as error:
            raise OperationError(f"the tokenizer of {checkpoint.source} cannot be read: {error}") from error


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text with nothing added."""
    # verbose: a text longer than the window is expected here.
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a user's prompt, in the chat template if the tokenizer has one."""
    if tokenizer.chat_template is None:
        ids: list[int] = tokenizer.encode(prompt)
        return ids
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return encode_text(tokenizer, text)


def end_of_sequence_ids(checkpoint: Checkpoint) -> Sequence[int]:
    """The token ids that end an answer: from the generation config if there is one, else from the model's."""
    config: dict[str, Any] = dict(checkpoint.hf_config)
    if "generation_config.json" in checkpoint.assets:
        config |= json.loads(checkpoint.assets["generation_config.json"])
    ids = config.get("eos_token_id")
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]
