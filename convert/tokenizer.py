"""The tokenizer of a checkpoint, as `transformers` builds it from the checkpoint's own files."""

import datetime
import importlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from convert.chat import RefusedError, choose_template, choose_thinking, first_line, render, template_of
from gluprune_jax.data.documents import Document
from gluprune_jax.errors import GlupruneError, OperationError, RequestError, shortened

if TYPE_CHECKING:
    from convert.checkpoint import Checkpoint

# Files that hold a vocabulary, besides those called tokenizer or vocab.
_VOCABULARIES = ("merges.txt", "sentencepiece.bpe.model", "spiece.model", "tekken.json", "tiktoken.model")
_CONFIG_KEYS = ("model_type", "tokenizer_class", "transformers_version")
_MAX_REASON = 300  # characters


def has_tokenizer(assets: Mapping[str, bytes]) -> bool:
    """Whether files of a tokenizer are among the files of a checkpoint."""
    return any(name.startswith(("tokenizer", "vocab")) or name in _VOCABULARIES for name in assets)


def load_tokenizer(checkpoint: "Checkpoint", chat_template: str | None = None, thinking: str | None = None) -> Any:
    """The checkpoint's `transformers` tokenizer: with the ids of stock `AutoTokenizer`, whatever its version.

    Args:
      checkpoint: the model with its files.
      chat_template: the name of the only template to apply, of a tokenizer that has several.
      thinking: "on" or "off" switches the reasoning mode of the template; None leaves it as the template has it.

    Raises:
      RequestError: the checkpoint has no tokenizer files, no chat template of that name, or one without such a mode.
      OperationError: `transformers` cannot read them, or needs a library that is not installed.
    """
    source, assets = checkpoint.source, checkpoint.assets
    if not has_tokenizer(assets):
        raise RequestError(f"{source} has no tokenizer files, which text needs")
    _check_sentencepiece(assets, source)
    from transformers import AutoTokenizer

    # What it looks at in the model's config.
    config = {key: checkpoint.hf_config[key] for key in _CONFIG_KEYS if key in checkpoint.hf_config}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {**assets, **_for_any_version(assets, config, source)}.items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the Rust library raises bare ones, and panics
            reason = _damaged_file(assets) or first_line(error).replace(folder, source)
            if "tokenizer.json" not in assets:
                reason = f"there is no tokenizer.json, and transformers makes none of the other files: {reason}"
            raise OperationError(f"the tokenizer of {source} cannot be read: {reason[:_MAX_REASON]}") from error
    if chat_template is not None:
        choose_template(tokenizer, chat_template, source)
    if thinking is not None:
        choose_thinking(tokenizer, thinking, source)
    return tokenizer


def portable_assets(assets: Mapping[str, bytes]) -> dict[str, bytes]:
    """A checkpoint's files as transformers 4 and 5 both read them: a tokenizer saved by 5 is spelled as 4 spells it.

    Version 5 calls every tokenizer that is what its `tokenizer.json` says `TokenizersBackend`, a name that 4 does not
    know; both know `PreTrainedTokenizerFast`. It lists additional special tokens under a name that means something else
    in 4, and looks for `add_prefix_space` in `tokenizer.json` alone. Everything else is left byte for byte as it is,
    and so is a config that cannot be read.
    """
    try:
        config = json.loads(assets["tokenizer_config.json"])
        if not isinstance(config, dict) or config.get("tokenizer_class") != "TokenizersBackend":
            return dict(assets)
        backend = json.loads(assets["tokenizer.json"])
    except (KeyError, ValueError, RecursionError):
        return dict(assets)
    if not isinstance(backend, dict):
        return dict(assets)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config.setdefault("additional_special_tokens", config.pop("extra_special_tokens"))
    pre_tokenizer = backend.get("pre_tokenizer")
    if isinstance(pre_tokenizer, dict) and "add_prefix_space" in pre_tokenizer:
        config["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    return {**assets, "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode()}


def tokens_beyond(tokenizer: Any, vocab_size: int) -> str | None:
    """A sentence about tokens that the model's embedding has no row for, or None if there are none.

    Such tokens are no error where no text has them: padding tokens were often added without enlarging the embedding.
    """
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= vocab_size}
    if not beyond:
        return None
    token, first = min(beyond.items(), key=lambda item: item[1])
    count = "1 token" if len(beyond) == 1 else f"{len(beyond):,} tokens"
    return (
        f"the tokenizer has {count} beyond the {vocab_size:,} of the model's embedding ({shortened(token)} with id "
        f"{first}{' and up' * (len(beyond) > 1)}); a text that holds one is refused"
    )


def check_ids(tokenizer: Any, ids: Sequence[int] | NDArray[np.int32], vocab_size: int) -> None:
    """Makes sure that the model's embedding has a row for every token of a text.

    Args:
      tokenizer: what the ids are of.
      ids: token ids; negative ones are not looked at.
      vocab_size: rows of the embedding.

    Raises:
      RequestError: it has not.
    """
    known = np.asarray(ids)
    outside = known[known >= vocab_size]
    if outside.size:
        token = tokenizer.convert_ids_to_tokens(int(outside[0]))
        raise RequestError(
            f"a text has the token {shortened(token)} with id {outside[0]}, which lies outside the model's vocabulary "
            f"of {vocab_size}: its embedding has no row for it; give text without it, or a model that has"
        )


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text with nothing added."""
    # verbose: a text longer than the window is expected here.
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def encode_prompt(tokenizer: Any, prompt: str, date: datetime.date | None = None) -> list[int]:
    """Token ids of a user's prompt, in the chat template if the tokenizer has one.

    Args:
      tokenizer: of the model.
      prompt: what the user says.
      date: see `convert.chat.render`.

    Raises:
      OperationError: the template fails.
    """
    if template_of(tokenizer) is None:
        ids: list[int] = tokenizer.encode(prompt)
        return ids
    messages = [{"role": "user", "content": prompt}]
    return encode_text(tokenizer, render(tokenizer, messages, add_generation_prompt=True, date=date))


def encode_conversation(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], date: datetime.date | None = None
) -> list[int]:
    """Token ids of a whole conversation in the chat template.

    Args:
      tokenizer: of the model.
      messages: the turns, each with "role" and "content".
      date: see `convert.chat.render`.

    Raises:
      RequestError: the tokenizer has no chat template.
      OperationError: the template fails.
    """
    if template_of(tokenizer) is None:
        raise RequestError("the model's tokenizer has no chat template, which conversations need; give plain text")
    return encode_text(tokenizer, render(tokenizer, messages, add_generation_prompt=False, date=date))


def encode_documents(
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    date: datetime.date | None = None,
    most_tokens: int | None = None,
    on_document: Callable[[int], None] | None = None,
) -> list[NDArray[np.int32]]:
    """Token ids of each document, plain texts with nothing added and conversations in the chat template.

    Args:
      tokenizer: of the model.
      documents: see `gluprune_jax.data.documents`.
      date: see `convert.chat.render`.
      most_tokens: documents behind the one that reaches this many are left out.
      on_document: called with how many documents are done.

    Raises:
      RequestError: conversations, and the tokenizer has no chat template; or one that the template refuses, which is
        named by where it stands.
      OperationError: the template fails, likewise.
    """
    encoded: list[NDArray[np.int32]] = []
    total = 0
    for document in documents:
        if most_tokens is not None and total >= most_tokens:
            break
        if isinstance(document.content, str):
            ids = encode_text(tokenizer, document.content)
        else:
            try:
                ids = encode_conversation(tokenizer, document.content, date)
            except GlupruneError as error:
                is_fault_of_text = isinstance(error, RequestError | RefusedError)
                kind = RequestError if is_fault_of_text else OperationError
                raise kind(f"{document.where}: {error}") from error
        encoded.append(np.array(ids, np.int32))
        total += len(ids)
        if on_document:
            on_document(len(encoded))
    return encoded


def separator(checkpoint: "Checkpoint", tokenizer: Any) -> int | None:
    """The token that stands between two documents, where the model has one."""
    end: int | None = tokenizer.eos_token_id
    return next(iter(end_of_sequence_ids(checkpoint)), None) if end is None else end


def beginning(checkpoint: "Checkpoint", tokenizer: Any) -> int | None:
    """The token that every text must begin with, of a family whose models compute nothing sensible without: its BOS.

    Raises:
      RequestError: the family needs one, and the tokenizer has none.
    """
    if not checkpoint.family.needs_bos:
        return None
    bos: int | None = tokenizer.bos_token_id
    if bos is None:
        raise RequestError(
            f"the tokenizer of {checkpoint.source} has no BOS token, which every text for a model of the family "
            f"{checkpoint.family.name} begins with"
        )
    return bos


def _check_sentencepiece(assets: Mapping[str, bytes], source: str) -> None:
    """Makes sure that a vocabulary in SentencePiece's format can be read, where nothing else holds it.

    Without the library `transformers` takes the file for one of tiktoken, and asks for that.
    """
    # Protocol buffers begin with the tag of their first field; tiktoken's files are text.
    files = [name for name, content in assets.items() if name.endswith(".model") and content[:1] == b"\n"]
    if not files or "tokenizer.json" in assets:
        return
    for module, package in (("sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf")):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise OperationError(
                f"the tokenizer of {source} is in {files[0]} alone, a SentencePiece model, which {package} reads and "
                f"which is not installed: pip install {package}"
            ) from error


def _for_any_version(assets: Mapping[str, bytes], config: Mapping[str, Any], source: str) -> dict[str, bytes]:
    """The files that must be spelled otherwise for all versions of `transformers` to build the same tokenizer.

    Some 5.x build `LlamaTokenizer` with the pre-tokeniser of SentencePiece whatever `tokenizer.json` says, also where
    no class is named. Later ones take byte-level vocabularies, and those without a class, as they are: so do we.
    Transformers 4 knows neither the classes of 5 nor others; both take the generic class.
    """
    backend = assets.get("tokenizer.json")
    written = _read_object(assets, "tokenizer_config.json", source)
    if backend is None:
        return {}
    import transformers
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    declared = written.get("tokenizer_class") or config.get("tokenizer_class")
    if declared is not None and not isinstance(declared, str):
        raise OperationError(
            f"tokenizer_config.json of {source} has tokenizer_class {shortened(declared)}; it must be a class's name"
        )
    assets = portable_assets(assets)
    changed = {"tokenizer_config.json": assets["tokenizer_config.json"]} if "tokenizer_config.json" in assets else {}
    if declared == "TokenizersBackend":
        return changed
    is_version_5 = int(transformers.__version__.split(".")[0]) >= 5
    if declared is None:
        as_written = is_version_5
    elif declared.removesuffix("Fast") == "LlamaTokenizer":
        as_written = is_version_5 and config.get("model_type") == "llama" and b'"ByteLevel"' in backend
    else:
        as_written = tokenizer_class_from_name(declared) is None
    if not as_written:
        return {}
    written["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {"tokenizer_config.json": json.dumps(written).encode()}


def _read_object(assets: Mapping[str, bytes], name: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(assets.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise OperationError(f"{name} of {source} is not JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise OperationError(f"{name} of {source} holds {shortened(value)} instead of an object")
    return value


def _damaged_file(assets: Mapping[str, bytes]) -> str | None:
    """What is wrong with the JSON files of a tokenizer, if anything is: `transformers` does not say in which file."""
    for name, content in assets.items():
        if name.endswith(".json"):
            try:
                json.loads(content)
            except (ValueError, RecursionError) as error:
                return f"{name} is not JSON: {first_line(error)}"
    return None


def end_of_sequence_ids(checkpoint: "Checkpoint") -> Sequence[int]:
    """The token ids that end an answer: from the generation config if there is one, else from the model's.

    An id that no row of the embedding has ends nothing, in `transformers` as well; it is left out.

    Raises:
      OperationError: they are no token ids.
    """
    ids = checkpoint.generation_settings().get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int for i in ids):
        raise OperationError(
            f"eos_token_id of {checkpoint.source} is {shortened(ids)}; it must be a token id or a list of them"
        )
    return [token for token in ids if 0 <= token < checkpoint.config.vocab_size]
