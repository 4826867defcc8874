"""Builds the tokenizer files of a Hugging Face checkpoint from the metadata of a GGUF file.

Two kinds exist in models of our families: byte-level BPE with stored merges (Llama 3, Qwen, SmolLM, Phi-4), and
SentencePiece BPE, which stores scores only (Llama 2, Gemma, Phi-3). `transformers` itself reads neither without torch.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from convert.gguf.file import printable
from gluprune_jax.errors import OperationError, RequestError, shortened


@dataclasses.dataclass(frozen=True)
class Splitting:
    """How a byte-level tokenizer divides text before its merges.

    Attributes:
      pattern: what stays together; None for what GPT-2 does.
      digits: whether digits stand one by one before that.
      whole_words: whether a part that is a token is taken as it is, whatever the merges would make of it.
      begins: whether texts begin with BOS where the file does not say.
      composes: whether characters are composed first (NFC). The tokenizers of the models do so, and llama.cpp does not.
      keeps_marks: whether combining marks are a part of words, as here on purpose; llama.cpp ends words there.
    """

    pattern: str | None
    digits: bool = False
    whole_words: bool = False
    begins: bool = False
    composes: bool = False
    keeps_marks: bool = False

    @property
    def normalizer(self) -> normalizers.Normalizer | None:
        """What is done to text first."""
        return normalizers.NFC() if self.composes else None


# Contractions; words; a number of digits; punctuation; line ends; spaces: as the tokenizers of the models have it.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_IN_THREES = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_ONE_BY_ONE = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
# Words also end where small letters are followed by large ones.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_TEKKEN = rf"{_WORDS[0]}|{_WORDS[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT_4O = (
    rf"{_WORDS[0]}{_CONTRACTION}?|{_WORDS[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

# By `tokenizer.ggml.pre`, with what llama.cpp does for each.
SPLITTINGS = {
    "smollm": Splitting(None, digits=True),  # SmolLM and SmolLM2
    "refact": Splitting(None, digits=True),  # Granite 3
    "llama-bpe": Splitting(_IN_THREES, whole_words=True, begins=True),  # Llama 3, SmolLM3
    "dbrx": Splitting(_IN_THREES),  # Phi-4, OLMo 2 and 3, Granite 4
    "qwen2": Splitting(_ONE_BY_ONE, composes=True),  # Qwen2 to 3
    "deepseek-r1-qwen": Splitting(_ONE_BY_ONE),
    "tekken": Splitting(_TEKKEN, whole_words=True, begins=True, keeps_marks=True),  # Mistral from Nemo on
    "gpt-4o": Splitting(_GPT_4O, keeps_marks=True),  # Phi-4-mini
    "gpt-2": Splitting(None),
}
SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
END_TOKENS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
NAMED_TEMPLATE = "tokenizer.chat_template."
# What the tokenizer is made of.
TOKENIZER_KEYS = frozenset(
    {
        *SPECIAL_TOKENS.values(),
        *END_TOKENS,
        "tokenizer.chat_template",
        "tokenizer.chat_templates",
        "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_eos_token",
        "tokenizer.ggml.add_sep_token",
        "tokenizer.ggml.add_space_prefix",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.precompiled_charsmap",
        "tokenizer.ggml.remove_extra_whitespaces",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.tokens",
    }
)
# What llama.cpp does not use to split text for a Llama model: tokens for filling in the middle, for BERT and RWKV.
_INERT_KEYS = frozenset(
    {
        "tokenizer.ggml.added_tokens",
        "tokenizer.ggml.cls_token_id",
        "tokenizer.ggml.mask_token_id",
        "tokenizer.ggml.middle_token_id",
        "tokenizer.ggml.prefix_token_id",
        "tokenizer.ggml.seperator_token_id",  # spelled so by llama.cpp
        "tokenizer.ggml.suffix_token_id",
        "tokenizer.ggml.token_type_count",
        "tokenizer.huggingface.json",
        "tokenizer.rwkv.world",
        *(f"tokenizer.ggml.fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
    }
)
NO_VOCABULARY = ("no_vocab", "none")
SPACE = "\u2581"  # SentencePiece's visible space


def check_tokenizer_keys(fields: Mapping[str, Any]) -> None:
    """Refuses keys below `tokenizer.` that are not known: a default would stand in for a misspelt one.

    Raises:
      RequestError: there is one.
    """
    for key in fields:
        known = key in TOKENIZER_KEYS or key in _INERT_KEYS or key.startswith(NAMED_TEMPLATE)
        if key.startswith("tokenizer.") and not known:
            raise RequestError(f"the metadata key {printable(key)} is not known, and may be a misspelt one")


def tokenizer_assets(fields: Mapping[str, Any], spaces_stay_behind: Collection[str] | None = None) -> dict[str, bytes]:
    """The tokenizer of a GGUF file as files that `transformers.AutoTokenizer` loads.

    Args:
      fields: the metadata of the file by key, as Python values.
      spaces_stay_behind: as of `convert.families.family.GGUFTable`.

    Returns:
      `tokenizer.json` and `tokenizer_config.json`; nothing if the file holds no tokenizer.

    Raises:
      RequestError: a kind of tokenizer or of pre-tokenisation that is not supported, or a SentencePiece model
        whose scores do not say in which order pieces merge.
      OperationError: metadata that is missing or contradicts itself.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind is None and "tokenizer.ggml.tokens" in fields:
        raise OperationError("tokenizer.ggml.model is missing, but there are tokenizer.ggml.tokens")
    if kind is None or kind in NO_VOCABULARY:
        return {}
    if kind not in ("gpt2", "llama"):
        raise RequestError(
            f"tokenizer.ggml.model is {shortened(kind)}; accepted: 'gpt2' (byte-level BPE), 'llama' (SentencePiece BPE)"
        )
    tokens = _strings(fields, "tokenizer.ggml.tokens")
    types = _token_types(fields, len(tokens))
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise OperationError(f"tokenizer.ggml.tokens holds {shortened(twice)} more than once")
    special = {name: tokens[i] for name, i in special_token_ids(fields, len(tokens)).items()}
    if kind == "llama" and TokenType.UNKNOWN in types:
        special.setdefault("unk_token", tokens[types.index(TokenType.UNKNOWN)])

    if kind == "gpt2":
        splitting = _splitting(fields)
        tokenizer = _byte_level_bpe(fields, ids, splitting)
        add_bos_by_default = splitting.begins
    else:
        tokenizer = _sentencepiece_bpe(fields, ids, types, special.get("unk_token"))
        add_bos_by_default = True

    # Where a space is put before the text, it would be put before the tokens to search for too.
    visible_spaces = kind == "llama" and not _flag(fields, "tokenizer.ggml.add_space_prefix", True)
    added = []
    for token, token_type in zip(tokens, types, strict=True):
        is_special = token in special.values() or token_type in (TokenType.CONTROL, TokenType.UNKNOWN)
        if is_special or token_type == TokenType.USER_DEFINED:
            # Text is searched for spaces after they were made visible, as those of the text itself are the same then.
            spaces = visible_spaces and not is_special and " " in token
            swallows = kind == "llama" and spaces_stay_behind is not None and token not in spaces_stay_behind
            added.append(AddedToken(token, special=is_special, normalized=spaces, rstrip=swallows))
    tokenizer.add_tokens(added)

    add_bos = _flag(fields, "tokenizer.ggml.add_bos_token", add_bos_by_default and "bos_token" in special)
    add_eos = _flag(fields, "tokenizer.ggml.add_eos_token", False)
    if _flag(fields, "tokenizer.ggml.add_sep_token", False):
        raise RequestError("tokenizer.ggml.add_sep_token is true; accepted: false")
    for wanted, name in ((add_bos, "bos_token"), (add_eos, "eos_token")):
        if wanted and name not in special:
            raise OperationError(f"tokenizer.ggml.add_{name} is true, but {SPECIAL_TOKENS[name]} is missing")
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
    if (context := f"{fields.get('general.architecture', 'llama')}.context_length") in fields:
        config["model_max_length"] = fields[context]
    config |= _chat_templates(fields)
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }


def special_token_ids(fields: Mapping[str, Any], vocab_size: int) -> dict[str, int]:
    """The ids of `bos_token`, `eos_token`, `unk_token` and `pad_token`, those that the metadata names.

    Args:
      fields: the metadata of the file by key, as Python values.
      vocab_size: what ids must be below.

    Raises:
      OperationError: an id outside the vocabulary.
    """
    ids = {name: _token_id(fields, key, vocab_size) for name, key in SPECIAL_TOKENS.items() if key in fields}
    if fields.get("tokenizer.ggml.model") == "llama":
        # What llama.cpp takes where a SentencePiece file names none.
        for name, default in (("bos_token", 1), ("eos_token", 2)):
            if _token_types(fields, vocab_size)[default : default + 1] == [TokenType.CONTROL]:
                ids.setdefault(name, default)
    return ids


def end_token_ids(fields: Mapping[str, Any], vocab_size: int) -> list[int]:
    """The ids of the tokens that end a text, a turn or a message, those that the metadata names.

    Raises:
      OperationError: an id outside the vocabulary.
    """
    return list(dict.fromkeys(_token_id(fields, key, vocab_size) for key in END_TOKENS if key in fields))


def _token_id(fields: Mapping[str, Any], key: str, vocab_size: int) -> int:
    value = fields[key]
    if type(value) is not int or not 0 <= value < vocab_size:
        raise OperationError(f"{key} is {shortened(value)}; it must be an id below {vocab_size}")
    return value


def _token_types(fields: Mapping[str, Any], vocab_size: int) -> list[int]:
    types = fields.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != vocab_size:
        # llama.cpp would take all tokens as text, control tokens too.
        raise OperationError(f"tokenizer.ggml.token_type does not hold one type for each of {vocab_size} tokens")
    accepted = {int(kind) for kind in TokenType}
    unknown = [(i, kind) for i, kind in enumerate(types) if type(kind) is not int or kind not in accepted]
    if unknown:
        i, kind = unknown[0]
        raise OperationError(
            f"tokenizer.ggml.token_type of {len(unknown)} tokens is none of the format's: of token {i} it is "
            f"{shortened(kind)}; accepted: {min(accepted)} to {max(accepted)}"
        )
    return types


def _chat_templates(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The templates as `tokenizer_config.json` holds them: one string, or names and strings if some have names."""
    keys = [key for key in fields if key.startswith(NAMED_TEMPLATE)]
    templates = {key.removeprefix(NAMED_TEMPLATE): fields[key] for key in keys}
    names = _strings(fields, "tokenizer.chat_templates") if "tokenizer.chat_templates" in fields else templates
    if missing := sorted(set(names) - templates.keys() - {"default"}):
        raise OperationError(
            f"tokenizer.chat_templates names {shortened(missing[0])}, and there is no such template among the "
            f"{len(templates)} with a name"
        )
    if "tokenizer.chat_template" in fields:
        templates = {"default": fields["tokenizer.chat_template"]} | templates
    for name, template in templates.items():
        if not name or not isinstance(template, str):
            raise OperationError(f"the chat template {shortened(name)} is {shortened(template)}; it must be text")
    if templates.keys() == {"default"}:
        return {"chat_template": templates["default"]}
    listed = [{"name": name, "template": template} for name, template in templates.items()]
    return {"chat_template": listed} if listed else {}


def _splitting(fields: Mapping[str, Any]) -> Splitting:
    pre = fields.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in SPLITTINGS:
        accepted = ", ".join(map(repr, SPLITTINGS))
        raise RequestError(f"tokenizer.ggml.pre is {shortened(pre)}; accepted: {accepted}")
    return SPLITTINGS[pre]


def _byte_level_bpe(fields: Mapping[str, Any], ids: dict[str, int], splitting: Splitting) -> Tokenizer:
    if _flag(fields, "tokenizer.ggml.add_space_prefix", False):
        raise RequestError("tokenizer.ggml.add_space_prefix is true; accepted for a byte-level BPE: false")
    merges = []
    for merge in _strings(fields, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not (left in ids and right in ids and left + right in ids):
            raise OperationError(
                f"tokenizer.ggml.merges holds {shortened(merge)}, whose parts or whole are not all tokens"
            )
        merges.append((left, right))
    # Of a pair that is there twice llama.cpp takes the first, and BPE would take the last.
    tokenizer = Tokenizer(BPE(vocab=ids, merges=list(dict.fromkeys(merges)), ignore_merges=splitting.whole_words))
    if splitting.normalizer is not None:
        tokenizer.normalizer = splitting.normalizer
    tokenizer.pre_tokenizer = pre_tokenizer_of(splitting)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pre_tokenizer_of(splitting: Splitting) -> pre_tokenizers.PreTokenizer:
    """What divides text in this way and spells its bytes as GPT-2 does."""
    steps: list[pre_tokenizers.PreTokenizer] = []
    if splitting.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitting.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated", invert=False))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
    return pre_tokenizers.Sequence(steps)


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
    if bad := [piece for piece, s in score.items() if not math.isfinite(s)]:
        raise OperationError(
            f"tokenizer.ggml.scores holds {score[bad[0]]} for {shortened(bad[0])}, and values that are not finite "
            f"for {len(bad)} tokens in all"
        )
    # SentencePiece merges the neighbours that give the piece of the highest score, the leftmost first among
    # equals. BPE wants an order of pairs: of the splits of one piece, the one with the longest left part comes
    # first, which is what merging from the left leaves behind.
    splits = [
        (-score[piece], -i, piece[:i], piece[i:])
        for piece in score
        for i in range(1, len(piece))
        if piece[:i] in score and piece[i:] in score
    ]
    _check_order({piece: score[piece] for piece in (left + right for _, _, left, right in splits)})
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
    visible_spaces = normalizers.Replace(" ", SPACE)
    spaces: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), visible_spaces])
        tokenizer.decoder = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = visible_spaces
        tokenizer.decoder = decoders.Sequence(spaces)
    return tokenizer


def _check_order(score: Mapping[str, float]) -> None:
    """Refuses scores, of the pieces that merges make, that do not say which merge comes first.

    Training gives every piece a score of its own. Tools that had no SentencePiece model write the same placeholder for
    all. The order of the ids is then often that of the merges, but not in vocabularies that were extended, sorted or
    cut, and the file does not say of which kind it is. Among pieces of equal score SentencePiece takes the leftmost of
    the text, which no list of merges can say.
    """
    counts = Counter(score.values())
    shared = [piece for piece, s in score.items() if counts[s] > 1]
    if shared:
        raise RequestError(
            f"tokenizer.ggml.scores gives {len(shared)} of the {len(score)} pieces that merges make a score that "
            f"another has too ({score[shared[0]]} for {shortened(shared[0])}), so the order of the merges is "
            "lost; accepted: a file made from the model's own tokenizer.model, or its Hugging Face folder"
        )


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
        raise OperationError(f"{key} is {shortened(value)}; it must be true or false")
    return value
