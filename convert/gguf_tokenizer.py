"""Builds the tokenizer files of a Hugging Face checkpoint from the metadata of a GGUF file.

Two kinds exist in Llama models: byte-level BPE with stored merges (Llama 3, SmolLM2), and SentencePiece BPE,
which stores scores only (Llama 2, TinyLlama). `transformers` itself reads neither without torch.
"""

import json
from collections.abc import Mapping
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from gluprune_jax.errors import OperationError, RequestError

# How Llama 3 splits text: contractions, words, digits in threes, punctuation, line ends, spaces.
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_SPACE = "\u2581"  # SentencePiece's visible space


def tokenizer_assets(fields: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer of a GGUF file as files that `transformers.AutoTokenizer` loads.

    Args:
      fields: the metadata of the file by key, as Python values.

    Returns:
      `tokenizer.json` and `tokenizer_config.json`.

    Raises:
      RequestError: a kind of tokenizer or of pre-tokenisation that is not supported.
      OperationError: metadata that is missing or contradicts itself.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise RequestError(
            f"tokenizer.ggml.model is {kind!r}; accepted: 'gpt2' (byte-level BPE), 'llama' (SentencePiece BPE)"
        )
    tokens = _strings(fields, "tokenizer.ggml.tokens")
    types = fields.get("tokenizer.ggml.token_type", [int(TokenType.NORMAL)] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise OperationError(f"tokenizer.ggml.token_type does not hold one type for each of {len(tokens)} tokens")
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise OperationError(f"tokenizer.ggml.tokens holds {twice!r} more than once")
    special = {name: tokens[i] for name, i in special_token_ids(fields).items()}
    if kind == "llama" and TokenType.UNKNOWN in types:
        special.setdefault("unk_token", tokens[types.index(TokenType.UNKNOWN)])

    if kind == "gpt2":
        tokenizer = _byte_level_bpe(fields, ids)
        add_bos_by_default = fields["tokenizer.ggml.pre"] == "llama-bpe"
    else:
        tokenizer = _sentencepiece_bpe(fields, ids, types, special.get("unk_token"))
        add_bos_by_default = True

    added = []
    for token, token_type in zip(tokens, types, strict=True):
        is_special = token in special.values() or token_type in (TokenType.CONTROL, TokenType.UNKNOWN)
        if is_special or token_type == TokenType.USER_DEFINED:
            added.append(AddedToken(token, special=is_special, normalized=False))
    tokenizer.add_tokens(added)

    add_bos = _flag(fields, "tokenizer.ggml.add_bos_token", add_bos_by_default and "bos_token" in special)
    add_eos = _flag(fields, "tokenizer.ggml.add_eos_token", False)
    for wanted, name in ((add_bos, "bos_token"), (add_eos, "eos_token")):
        if wanted and name not in special:
            raise OperationError(f"tokenizer.ggml.add_{name} is true, but {_SPECIAL_TOKENS[name]} is missing")
    _add_template(tokenizer, special["bos_token"] if add_bos else None, special["eos_token"] if add_eos else None)

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        # transformers 5 builds its template from these two, 4 takes the one of tokenizer.json.
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
        # transformers 4 adds token_type_ids by default, which Llama models refuse.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if "llama.context_length" in fields:
        config["model_max_length"] = fields["llama.context_length"]
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }


def special_token_ids(fields: Mapping[str, Any]) -> dict[str, int]:
    """The ids of `bos_token`, `eos_token`, `unk_token` and `pad_token`, those that the metadata names.

    Raises:
      OperationError: an id outside the vocabulary.
    """
    return {name: token_id(fields, key) for name, key in _SPECIAL_TOKENS.items() if key in fields}


def token_id(fields: Mapping[str, Any], key: str) -> int:
    """The token id under a metadata key.

    Raises:
      OperationError: it lies outside the vocabulary.
    """
    value, count = fields[key], len(fields.get("tokenizer.ggml.tokens", ()))
    if not isinstance(value, int) or not 0 <= value < count:
        raise OperationError(f"{key} is {value!r}; it must be an id below {count}")
    return value


def _byte_level_bpe(fields: Mapping[str, Any], ids: dict[str, int]) -> Tokenizer:
    pre = fields.get("tokenizer.ggml.pre")
    if pre not in ("smollm", "llama-bpe"):
        raise RequestError(f"tokenizer.ggml.pre is {pre!r}; accepted: 'smollm' and 'llama-bpe'")
    if _flag(fields, "tokenizer.ggml.add_space_prefix", False):
        raise RequestError("tokenizer.ggml.add_space_prefix is true; accepted for a byte-level BPE: false")
    merges = []
    for merge in _strings(fields, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not (left in ids and right in ids and left + right in ids):
            raise OperationError(f"tokenizer.ggml.merges holds {merge!r}, whose parts or whole are not all tokens")
        merges.append((left, right))
    llama3 = pre == "llama-bpe"
    tokenizer = Tokenizer(BPE(vocab=ids, merges=merges, ignore_merges=llama3))
    split: pre_tokenizers.PreTokenizer
    if llama3:
        split = pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), behavior="isolated", invert=False)
    else:
        split = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not llama3)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(
    fields: Mapping[str, Any], ids: dict[str, int], types: list[int], unk_token: str | None
) -> Tokenizer:
    for key in ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap"):
        if fields.get(key):
            raise RequestError(f"{key} is set; only SentencePiece models that leave the text as it is are accepted")
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(ids) or not all(isinstance(s, float) for s in scores):
        raise OperationError(f"tokenizer.ggml.scores does not hold one score for each of {len(ids)} tokens")
    # Only normal pieces merge: the others are matched whole or never.
    score = {piece: s for piece, t, s in zip(ids, types, scores, strict=True) if t == TokenType.NORMAL}
    # SentencePiece merges the neighbours that give the piece of the highest score, the leftmost first among
    # equals. BPE wants an order of pairs: of the splits of one piece, the one with the longest left part comes
    # first, which is what merging from the left leaves behind.
    splits = [
        (-score[piece], -i, piece[:i], piece[i:])
        for piece in score
        for i in range(1, len(piece))
        if piece[:i] in score and piece[i:] in score
    ]
    merges = [(left, right) for _, _, left, right in sorted(splits)]
    tokenizer = Tokenizer(
        BPE(
            vocab=ids,
            merges=merges,
            unk_token=unk_token,
            fuse_unk=True,
            byte_fallback=TokenType.BYTE in types,
        )
    )
    prefix = _flag(fields, "tokenizer.ggml.add_space_prefix", True)
    visible_spaces = normalizers.Replace(" ", _SPACE)
    spaces: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), visible_spaces])
        tokenizer.decoder = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = visible_spaces
        tokenizer.decoder = decoders.Sequence(spaces)
    return tokenizer


def _add_template(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    def sequence(letter: str, segment: int) -> list[str]:
        return [f"{part}:{segment}" for part in (bos, f"${letter}", eos) if part is not None]

    if bos is not None or eos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=sequence("A", 0),
            pair=sequence("A", 0) + sequence("B", 1),
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {bos, eos} if token is not None],
        )


def _strings(fields: Mapping[str, Any], key: str) -> list[str]:
    value = fields.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise OperationError(f"{key} is not a list of strings")
    return value


def _flag(fields: Mapping[str, Any], key: str, default: bool) -> bool:
    value = fields.get(key, default)
    if not isinstance(value, bool):
        raise OperationError(f"{key} is {value!r}; it must be true or false")
    return value
