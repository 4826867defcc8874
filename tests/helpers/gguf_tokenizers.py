"""Tiny tokenizers of the kinds that GGUF files hold, in the form that models' own files have."""

import json
import pathlib
from typing import Any

from gguf import TokenType
from gguf_families import SMALL, random_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from convert.checkpoint import Checkpoint
from convert.huggingface.config import read_config
from convert.loaded import LoadedCheckpoint

LICENSE = (pathlib.Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
V = 400
# As the models' own files have them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def by_pattern(pattern: str) -> list[pre_tokenizers.PreTokenizer]:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


# What divides text, whether whole words are taken as they are, and whether characters are composed.
PUBLISHED: dict[str, tuple[list[pre_tokenizers.PreTokenizer], bool, bool]] = {
    "gpt-2": ([GPT_2], False, False),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), GPT_2], False, False),
    "llama-bpe": (by_pattern(LLAMA3), True, False),
    "dbrx": (by_pattern(LLAMA3), False, False),
    "qwen2": (by_pattern(QWEN2), False, True),
    "deepseek-r1-qwen": (by_pattern(QWEN2), False, False),
}


def byte_level(steps: list[pre_tokenizers.PreTokenizer], whole_words: bool = False, nfc: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    special = ["<s>", "</s>", "<|turn|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=V - 10, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([LICENSE], trainer)
    tokenizer.add_tokens([AddedToken("<mine>", special=False)])
    return tokenizer


def checkpoint(tokenizer: Tokenizer | dict[str, bytes], size: int = V, **settings: Any) -> Checkpoint:
    """A tiny model with this tokenizer; `settings` are of its config, but for `generation`."""
    config, rest = read_config({**SMALL["llama"], "vocab_size": size})
    assets = tokenizer if isinstance(tokenizer, dict) else {"tokenizer.json": tokenizer.to_str().encode()}
    if generation := settings.pop("generation", None):
        assets = {**assets, "generation_config.json": json.dumps(generation).encode()}
    if "tokenizer_config.json" not in assets:
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **settings}
        assets = {**assets, "tokenizer_config.json": json.dumps(names).encode()}
    return LoadedCheckpoint(
        model=random_model(config), source="mine", hf_config={**rest, "eos_token_id": None}, assets=assets
    )


def sentencepiece_fields(prefix: bool) -> dict[str, Any]:
    """A vocabulary of bytes, letters and some words, with scores of its own."""
    words = ["\u2581t", "he", "\u2581the", "in", "\u2581a", "\u2581\u2581"]
    letters = sorted(set("".join(words)) | set("abcdefghijklmnopqrstuvwxyz"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, *letters, "<mine>"]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    types += [TokenType.NORMAL] * (len(words) + len(letters)) + [TokenType.USER_DEFINED]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words) + len(letters))] + [0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": list(map(int, types)),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
