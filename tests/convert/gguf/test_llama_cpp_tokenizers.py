"""The real llama.cpp on tokenizers that we write: its token ids are those that `transformers` gives of the folder."""

import json
import unicodedata
from pathlib import Path

import llama_cpp
import pytest
from gguf_families import SMALL, random_model
from token_texts import TEXTS
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

import convert
from convert.gguf.tokenizer import SPLITTINGS, pre_tokenizer_of
from convert.huggingface.config import read_config
from convert.loaded import LoadedCheckpoint

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 1200


def byte_level(name: str) -> Tokenizer:
    """A byte-level BPE that divides text as the models do that llama.cpp calls by this name."""
    splitting = SPLITTINGS[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=splitting.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizer_of(splitting)
    tokenizer.decoder = decoders.ByteLevel()
    if splitting.normalizer is not None:
        tokenizer.normalizer = splitting.normalizer
    return train(tokenizer, sorted(pre_tokenizers.ByteLevel.alphabet()))


def sentencepiece(prefix: bool) -> Tokenizer:
    """A SentencePiece BPE with a token for each byte, as Llama 2 (`prefix`: a space before every text) and Gemma."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # so that training has words
    data = json.loads(train(tokenizer, [], [f"<0x{byte:02X}>" for byte in range(256)]).to_str())
    return Tokenizer.from_str(json.dumps(data | {"pre_tokenizer": None}))


def train(tokenizer: Tokenizer, alphabet: list[str], extra: list[str] | None = None) -> Tokenizer:
    special = [*SPECIAL, *(extra or [])]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    # A token of SentencePiece with a NUL would end there for llama.cpp; no published vocabulary has one.
    tokenizer.train_from_iterator([text for text in TEXTS if "\0" not in text] * 3, trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.add_tokens([AddedToken("<|unknown|>", special=False)])
    return tokenizer


def written(tokenizer: Tokenizer, folder: Path) -> Path:
    """A tiny model with this tokenizer as a folder and as the GGUF file that is returned."""
    config, rest = read_config({**SMALL["llama"], "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2})
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    assets = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(names).encode()}
    checkpoint = LoadedCheckpoint(model=random_model(config), source="mine", hf_config=rest, assets=assets)
    convert.save(checkpoint, folder / "hf")
    convert.save(checkpoint, folder / "model.gguf", formats=["gguf"])
    return folder / "model.gguf"


def different(folder: Path, path: Path, texts: tuple[str, ...]) -> dict[str, tuple[list[str], list[str]]]:
    """The texts that `transformers` and llama.cpp divide otherwise, and how."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert llama_cpp.tokenize(path, texts[:1], add_special=True) == [tokenizer.encode(texts[0])]
    found = llama_cpp.tokenize(path, texts)
    name = tokenizer.convert_ids_to_tokens
    rows = zip(texts, expected, found, strict=True)
    return {text: (name(ours), name(theirs)) for text, ours, theirs in rows if ours != theirs}


def has_mark(text: str) -> bool:
    """Whether a text has combining marks, as accents that stand by themselves and vowels in Hindi or Thai are."""
    return any(unicodedata.category(letter).startswith("M") for letter in text)


@pytest.mark.parametrize("name", SPLITTINGS)
def test_byte_level(tmp_path: Path, name: str) -> None:
    path = written(byte_level(name), tmp_path)
    found = different(tmp_path / "hf", path, TEXTS)
    if SPLITTINGS[name].composes:  # llama.cpp composes no characters
        assert all(not unicodedata.is_normalized("NFC", text) for text in found)
    elif SPLITTINGS[name].keeps_marks:  # and llama.cpp ends words at them
        assert found
        assert all(has_mark(text) for text in found)
    else:
        assert found == {}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    path = written(sentencepiece(prefix), tmp_path)
    assert different(tmp_path / "hf", path, TEXTS) == {}


@pytest.mark.real_model
def test_the_demo_model(demo: convert.Checkpoint, demo_folder: str, tmp_path: Path) -> None:
    convert.save(demo, tmp_path / "demo.gguf", formats=["gguf"])
    assert different(Path(demo_folder), tmp_path / "demo.gguf", TEXTS) == {}
