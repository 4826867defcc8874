"""Tokenizers as GGUF metadata: the same ids when read back, whatever llama.cpp calls the way that text is divided."""

import json
import pathlib
from typing import Any

import pytest
from byte_tokenizer import write_tokenizer
from gguf import TokenType
from gguf_tokenizers import LICENSE, PUBLISHED, V, byte_level, checkpoint, sentencepiece_fields
from tokenizers import Tokenizer, models, processors

from convert.gguf.tokenizer import SPLITTINGS, pre_tokenizer_of, tokenizer_assets
from convert.gguf.tokenizer_writer import fitting_splittings, tokenizer_fields
from convert.loaded import LoadedCheckpoint
from gluprune_jax.errors import RequestError

TEXTS = ["We'll see 12345 CamelCase cafe\u0301!\n\n  x", "<s>a</s> b <mine>c", "\u65e5\u672c \U0001f600 a/b/\n"]

OTHERWISE = ("qwen2", "tekken", "gpt-4o")  # what llama.cpp does not do as these tokenizers do, a note says


def read_back(fields: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_assets(fields)["tokenizer.json"].decode())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_way_that_text_is_divided_is_found(name: str) -> None:
    tokenizer = byte_level(*PUBLISHED[name])
    fields, notes = tokenizer_fields(checkpoint(tokenizer))
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert [note.partition(" ")[0] for note in notes] == ["llama.cpp"] * (name in OTHERWISE)
    again = read_back(fields)
    for text in [*TEXTS, LICENSE]:
        assert again.encode(text, add_special_tokens=False).ids == tokenizer.encode(text, add_special_tokens=False).ids
    pairs = zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True)
    types = {token: TokenType(kind) for token, kind in pairs}
    found = (types["<s>"], types["<mine>"], types["a"], types[f"[PAD{V - 1}]"])
    assert found == (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.NORMAL, TokenType.UNUSED)
    assert len(types) == V


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_there_and_back(prefix: bool) -> None:
    fields = sentencepiece_fields(prefix)
    model = checkpoint(tokenizer_assets(fields), len(fields["tokenizer.ggml.tokens"]))
    found, notes = tokenizer_fields(model)
    assert found == fields
    assert notes == []


def test_byte_level_there_and_back() -> None:
    first, _ = tokenizer_fields(checkpoint(byte_level(*PUBLISHED["smollm"]), chat_template="{{ messages }}"))
    again, _ = tokenizer_fields(checkpoint(tokenizer_assets(first)))
    assert again == first
    assert first["tokenizer.chat_template"] == "{{ messages }}"


def test_a_metaspace_pre_tokenizer_is_sentencepiece_too() -> None:
    fields = sentencepiece_fields(True)
    data = json.loads(tokenizer_assets(fields)["tokenizer.json"])
    data["normalizer"] = None
    data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    model = checkpoint(Tokenizer.from_str(json.dumps(data)), len(fields["tokenizer.ggml.tokens"]), unk_token="<unk>")
    found, notes = tokenizer_fields(model)
    assert found == fields
    # llama.cpp puts a space behind a special token and before a text that begins with one, and this one none.
    assert len(notes) == 1
    assert notes[0].startswith("llama.cpp divides text otherwise than transformers behind special tokens, or where it")


def test_tokens_around_a_text_and_ends() -> None:
    tokenizer = byte_level(*PUBLISHED["gpt-2"])
    names = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=names)
    fields, _ = tokenizer_fields(checkpoint(tokenizer, pad_token="<|turn|>", generation={"eos_token_id": [2, 1]}))
    ids = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items() if key.endswith("_id")}
    assert ids == {"bos_token_id": 0, "eos_token_id": 1, "eot_token_id": 2, "padding_token_id": 2}
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is True
    assert read_back(fields).encode("a").ids == tokenizer.encode("a").ids


def test_named_chat_templates() -> None:
    templates = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    fields, _ = tokenizer_fields(checkpoint(byte_level(*PUBLISHED["gpt-2"]), chat_template=templates))
    assert fields["tokenizer.chat_template"] == "A"
    assert fields["tokenizer.chat_template.tool_use"] == "B"
    assert fields["tokenizer.chat_templates"] == ["tool_use"]


def test_tokens_without_an_embedding_are_left_out() -> None:
    tokenizer = byte_level(*PUBLISHED["gpt-2"])
    fields, notes = tokenizer_fields(checkpoint(tokenizer, V - 11))
    assert len(fields["tokenizer.ggml.tokens"]) == V - 11
    first = tokenizer.id_to_token(V - 11)
    assert notes == [f"2 tokens beyond the 389 rows of the embedding were left out ({first!r})"]


def test_a_model_without_a_tokenizer() -> None:
    model = checkpoint({"tokenizer_config.json": b"{}"})
    empty = LoadedCheckpoint(model=model.model, source="mine", hf_config=model.hf_config)
    assert tokenizer_fields(empty) == (
        {"tokenizer.ggml.model": "no_vocab"},
        ["the model has no tokenizer files, and so the GGUF file none"],
    )
    assert tokenizer_assets({"tokenizer.ggml.model": "no_vocab"}) == {}


def test_tokenizers_that_have_no_form_are_named(tmp_path: pathlib.Path) -> None:
    start = r"^the tokenizer of mine has no form in a GGUF file: "
    end = r"; write `format` hf, which keeps it$"
    write_tokenizer(tmp_path)  # it divides nothing
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RequestError, match=start + r"no `tokenizer\.ggml\.pre` that is known here divides .*" + end):
        tokenizer_fields(checkpoint(files))
    unigram = Tokenizer(models.Unigram([("<s>", 0.0), ("</s>", 0.0), ("a", -1.0)]))
    with pytest.raises(RequestError, match=start + "it is neither a byte-level BPE nor a SentencePiece BPE" + end):
        tokenizer_fields(checkpoint(unigram))
    around = byte_level(*PUBLISHED["gpt-2"])
    around.post_processor = processors.TemplateProcessing(single="<|turn|> $A", special_tokens=[("<|turn|>", 2)])
    with pytest.raises(RequestError, match=start + "it puts other tokens than BOS and EOS around a text" + end):
        tokenizer_fields(checkpoint(around))


def test_all_ways_are_told_apart() -> None:
    """By what they do to the texts that are tried, or by how they treat whole words; but two have two names."""
    for name, splitting in SPLITTINGS.items():
        tokenizer = Tokenizer(models.BPE())
        if splitting.normalizer is not None:
            tokenizer.normalizer = splitting.normalizer
        tokenizer.pre_tokenizer = pre_tokenizer_of(splitting)
        assert fitting_splittings(tokenizer, splitting.whole_words)[0] == ("smollm" if name == "refact" else name)
