"""Builds the tokenizer metadata of a GGUF file from the files of a checkpoint.

llama.cpp knows how text is divided by a name (`tokenizer.ggml.pre`). The name is found by trying: what is written is
read back, and must give the ids that the checkpoint's own tokenizer gives.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer

from convert.checkpoint import Checkpoint
from convert.gguf.tokenizer import (
    END_TOKENS,
    NAMED_TEMPLATE,
    NO_VOCABULARY,
    SPACE,
    SPECIAL_TOKENS,
    SPLITTINGS,
    pre_tokenizer_of,
    tokenizer_assets,
)
from convert.tokenizer import end_of_sequence_ids, has_tokenizer, load_tokenizer
from gluprune_jax.errors import GlupruneError, RequestError, shortened

_TEXTS = (
    "The quick brown fox's tail, WE'LL see: it isn't I'M or they'Re; don't.",
    "12345 6 7890 1,234.5678 3x4 v2.10 \u0661\u0662\u0663 \u00bd\u00b2",
    "camelCase HTTPServer XMLHttpRequest snake_case UPPER lower McDonald iPhone",
    "  two  spaces   three\n\nlines\r\n\ttab \n  indented\n\n\n end  ",
    "path/to//file/ a/b\n/ ... !!! ?!\n\n --- #!@ $%^ &*() [x]{y}<z>",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 2]}  # note\n",
    "\u00c4pfel \u00fcber Stra\u00dfe, caf\u00e9 and cafe\u0301, na\u00efve \u01c5 \ufb01",
    "\u65e5\u672c\u8a9e\u306e\u6587 \u4e2d\u6587\u3002 \ud55c\uad6d\uc5b4 \u041f\u0440\u0438\u0432\u0435\u0442 "
    "\u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a",
    "\U0001f600\U0001f44d\U0001f3fd e\u0301\u200d \u00a0\u3000x \u2014 \u201cq\u201d \u2019s",
    "a",
    " a",
    "",
    " ",
    "\n",
)
_MOST_TOKENS = 4000  # of the vocabulary that are compared as texts of their own


def tokenizer_fields(
    checkpoint: Checkpoint, spaces_stay_behind: Collection[str] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The metadata below `tokenizer.` of a checkpoint's tokenizer, and notes.

    Args:
      checkpoint: the model with its files.
      spaces_stay_behind: as of `convert.families.family.GGUFTable`.

    Raises:
      RequestError: a tokenizer that llama.cpp has no form for, as far as it is known here.
      OperationError: `transformers` cannot read its files.
    """
    if not has_tokenizer(checkpoint.assets):
        return {"tokenizer.ggml.model": NO_VOCABULARY[0]}, [
            "the model has no tokenizer files, and so the GGUF file none"
        ]
    tokenizer = load_tokenizer(checkpoint)
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    data = {} if backend is None else json.loads(backend.to_str())
    kind = _kind(data)
    if backend is None or kind is None:
        raise _no_form(checkpoint, "it is neither a byte-level BPE nor a SentencePiece BPE")
    V = checkpoint.config.vocab_size
    tokens, types, notes = _vocabulary(backend, kind, V, getattr(tokenizer, "unk_token", None))
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **_special_ids(checkpoint, tokenizer),
        **_added_around(checkpoint, tokenizer, backend),
        **_chat_templates(tokenizer),
    }
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in data["model"]["merges"]]
    if kind == "llama":
        first = backend.encode("a", add_special_tokens=False).tokens
        fields["tokenizer.ggml.add_space_prefix"] = bool(first) and first[0].startswith(SPACE)
        fields["tokenizer.ggml.scores"] = _scores(tokens, types, merges)
        candidates = ["default"]
    else:
        known = set(tokens)
        fields["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges if "".join(pair) in known]
        candidates = fitting_splittings(backend, bool(data["model"].get("ignore_merges")))
    for pre in candidates:
        found = fields | {"tokenizer.ggml.pre": pre}
        read = _read_back(found, spaces_stay_behind)
        if read is None:
            continue
        texts, special = _texts(backend, V), _texts_with_special_tokens(backend, V)
        # Hugging Face's own form of SentencePiece BPE puts no space before a text that begins with one.
        at_edges = [text for text in texts if kind == "llama" and text.startswith(" ")]
        if _same_ids(backend, read, [text for text in texts if text not in at_edges], V):
            if not _same_ids(backend, read, [*at_edges, *special], V):
                notes.append(
                    "llama.cpp divides text otherwise than transformers behind special tokens, or where it begins with "
                    "a space"
                )
            splitting = SPLITTINGS.get(pre)
            if splitting is not None and splitting.keeps_marks:
                notes.append(
                    "llama.cpp divides words at combining marks, which this tokenizer does not: Hindi, Thai and others "
                    "get more tokens there"
                )
            if splitting is not None and splitting.composes:
                notes.append("llama.cpp does not compose characters (NFC) as this tokenizer does")
            return found, notes
    if kind == "gpt2":
        raise _no_form(checkpoint, "no `tokenizer.ggml.pre` that is known here divides text as it does")
    raise _no_form(checkpoint, "SentencePiece would merge its pieces otherwise")


def _no_form(checkpoint: Checkpoint, why: str) -> RequestError:
    return RequestError(
        f"the tokenizer of {checkpoint.source} has no form in a GGUF file: {why}; write `format` hf, which keeps it"
    )


# ------------------------------------------------------------------------------------------------- what it is made of


def _kind(data: Mapping[str, Any]) -> str | None:
    """ "gpt2" for a byte-level BPE and "llama" for a SentencePiece BPE, of the content of a `tokenizer.json`."""
    if data.get("model", {}).get("type") != "BPE":
        return None
    parts = json.dumps([data.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    return "gpt2" if '"ByteLevel"' in parts else "llama" if SPACE in parts else None


def _vocabulary(
    backend: Tokenizer, kind: str, size: int, unk_token: str | None
) -> tuple[list[str], list[int], list[str]]:
    """Tokens and their types, one for each row of the embedding, and notes."""
    by_id = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    added = backend.get_added_tokens_decoder()
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]

    def type_of(i: int, token: str) -> TokenType:
        if kind == "llama" and token == unk_token:
            return TokenType.UNKNOWN
        if i in added:
            return TokenType.CONTROL if added[i].special else TokenType.USER_DEFINED
        if token == f"[PAD{i}]":
            return TokenType.UNUSED
        is_byte = kind == "llama" and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        return TokenType.BYTE if is_byte else TokenType.NORMAL

    types = [int(type_of(i, token)) for i, token in enumerate(tokens)]
    beyond = [by_id[i] for i in sorted(by_id) if i >= size]
    notes = []
    if beyond:
        notes.append(
            f"{len(beyond)} tokens beyond the {size:,} rows of the embedding were left out ({shortened(beyond[0])})"
        )
    return tokens, types, notes


def _scores(tokens: Sequence[str], types: Sequence[int], merges: Sequence[Sequence[str]]) -> list[float]:
    """Scores that order the pieces as the merges do that make them; then come those that no merge makes.

    SentencePiece's own training gives just these: 0, -1, -2, ... What is no piece has no order.
    """
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    scores = []
    for token, kind in zip(tokens, types, strict=True):
        scores.append(-float(rank.setdefault(token, len(rank))) if kind == TokenType.NORMAL else 0.0)
    return scores


def _special_ids(checkpoint: Checkpoint, tokenizer: Any) -> dict[str, int]:
    V = checkpoint.config.vocab_size
    ids = {key: getattr(tokenizer, f"{name}_id", None) for name, key in SPECIAL_TOKENS.items()}
    ends = [i for i in end_of_sequence_ids(checkpoint) if i != ids[END_TOKENS[0]]]
    if ids[END_TOKENS[0]] is None and ends:
        ids[END_TOKENS[0]] = ends.pop(0)
    ids |= dict(zip(END_TOKENS[1:], ends, strict=False))
    return {key: i for key, i in ids.items() if i is not None and i < V}


def _added_around(checkpoint: Checkpoint, tokenizer: Any, backend: Tokenizer) -> dict[str, bool]:
    """Whether texts begin with BOS and end with EOS.

    Raises:
      RequestError: other tokens are put around texts.
    """
    inner = backend.encode("a", add_special_tokens=False).ids
    around = list(tokenizer("a")["input_ids"])
    for bos in (False, True):
        for eos in (False, True):
            if around == [tokenizer.bos_token_id] * bos + inner + [tokenizer.eos_token_id] * eos:
                return {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    raise _no_form(checkpoint, "it puts other tokens than BOS and EOS around a text")


def _chat_templates(tokenizer: Any) -> dict[str, Any]:
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    named = {name: template for name, template in templates.items() if name != "default"}
    fields: dict[str, Any] = {f"{NAMED_TEMPLATE}{name}": template for name, template in named.items()}
    if named:
        fields["tokenizer.chat_templates"] = list(named)
    if "default" in templates:
        fields["tokenizer.chat_template"] = templates["default"]
    return fields


# -------------------------------------------------------------------------------------------------- how it is checked


def fitting_splittings(backend: Tokenizer, whole_words: bool) -> list[str]:
    """The names under which llama.cpp divides text as a tokenizer does, those that treat whole words alike first."""

    def divided(normalizer: Any, pre_tokenizer: Any, text: str) -> list[str]:
        text = text if normalizer is None else normalizer.normalize_str(text)
        return [part for part, _ in pre_tokenizer.pre_tokenize_str(text)]

    own = [divided(backend.normalizer, backend.pre_tokenizer, text) for text in _TEXTS]
    fitting = []
    for name, splitting in SPLITTINGS.items():
        pre_tokenizer = pre_tokenizer_of(splitting)
        if own == [divided(splitting.normalizer, pre_tokenizer, text) for text in _TEXTS]:
            fitting.append(name)
    return sorted(fitting, key=lambda name: SPLITTINGS[name].whole_words != whole_words)


def _read_back(fields: Mapping[str, Any], spaces_stay_behind: Collection[str] | None) -> Tokenizer | None:
    try:
        assets = tokenizer_assets(fields, spaces_stay_behind)
    except GlupruneError:
        return None
    read: Tokenizer = Tokenizer.from_str(assets["tokenizer.json"].decode())
    return read


def _texts(backend: Tokenizer, size: int) -> list[str]:
    """Texts of many kinds, and tokens as texts of their own."""
    special = set(backend.get_added_tokens_decoder())
    ids = [i for i in range(size) if i not in special]
    some = ids[:: -(-len(ids) // _MOST_TOKENS)] if ids else []
    return [*_TEXTS, *backend.decode_batch([[i] for i in some], skip_special_tokens=False)]


def _texts_with_special_tokens(backend: Tokenizer, size: int) -> Iterator[str]:
    added = backend.get_added_tokens_decoder()
    for i in sorted(added)[:100]:
        if i < size:
            token = added[i].content
            yield from (f"{token}a", f"a{token}b", f"a {token} b {token}{token}\n{token} c")


def _same_ids(first: Tokenizer, second: Tokenizer, texts: Sequence[str], size: int) -> bool:
    """Whether two tokenizers give texts the same ids, tokens that have no row in the embedding aside."""
    found = [tokenizer.encode_batch(texts, add_special_tokens=False) for tokenizer in (first, second)]
    pairs = zip(*found, strict=True)
    return all(a.ids == b.ids for a, b in pairs if not any(i >= size for i in a.ids))
