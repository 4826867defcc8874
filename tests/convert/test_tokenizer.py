"""Tokenizers: the ids of stock transformers, every chat template, tokens without an embedding, damaged files."""

import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tiny_models import hf_config, write_folder
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.tokenization_utils_tokenizers import TokenizersBackend

import convert
from convert.__main__ import main as convert_main
from convert.chat import choose_template, render, template_of
from convert.gguf.tokenizer import tokenizer_assets
from convert.tokenizer import check_ids, encode_prompt, encode_text, load_tokenizer, portable_assets, tokens_beyond
from evals import compare
from evals.__main__ import main as evals_main
from evals.efficiency import __main__
from gluprune_jax import prune, recover
from gluprune_jax.errors import GlupruneError, OperationError, RequestError

Capture = pytest.CaptureFixture[str]
Files = Mapping[str, bytes]

LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
SPECIAL = ("<unk>", "<s>", "</s>")
SPACE = "\u2581"
SIZE = 340
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
LLAMA3 = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def hundred_strings() -> list[str]:
    """Words of many scripts, code, white space and special tokens, each by itself and beside others."""
    words = [
        "the quick fox",
        "Äpfel für Öl",
        "日本語の文",
        "Привет, мир",
        "مرحبا بكم",
        "नमस्ते",
        "😀👍🏽",
        "e\u0301\u200d",
        "it's I'M",
    ]
    code = [
        "def f(x):\n    return x + 1\n",
        "for (i = 0; i < 10; ++i) { a[i] *= 2; }",
        "<p class='a'>&amp;</p>",
        "\\u0041\x00\x7f",
    ]
    spaces = ["", " ", "  ", "\n", "\r\n\t", " \n\n  ", "\u00a0\u3000", SPACE, f"{SPACE}{SPACE}a"]
    special = ["<s>", "</s>", "<unk>", "<pad>", "<s><s>", "<0x41>", "<|end|>", "[INST]"]
    numbers = ["1", "12345678", "3.14", "1e-5"]
    alone = words + code + spaces + special + numbers
    beside = [
        f"{a}{joint}{b}" for a, b in zip(words * 2, special + spaces + code[:1], strict=True) for joint in ("", " ")
    ]
    strings = alone + beside + [f" {text}" for text in words + code] + [f"{text} " for text in words + code + numbers]
    strings += [f"{text}{text}" for text in words + code]
    return list(dict.fromkeys(strings))[:100]


STRINGS = hundred_strings()


def byte_level(*, llama3: bool = False, adds_bos: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=llama3))
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not llama3)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain]) if llama3 else plain
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([LICENSE], trainer)
    return with_bos(tokenizer) if adds_bos else tokenizer


def sentencepiece_like(scheme: str | None) -> Tokenizer:
    """As Llama 2's: visible spaces from the pre-tokeniser, or (None) from the normaliser of old files."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(
        [LICENSE], trainers.BpeTrainer(vocab_size=SIZE + 100, special_tokens=pieces, show_progress=False)
    )
    known = json.loads(trained.to_str())["model"]
    tokenizer = Tokenizer(
        models.BPE(
            known["vocab"],
            [tuple(pair) for pair in known["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if scheme is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return with_bos(tokenizer)


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def files(tokenizer: Tokenizer, name: str | None = None, **config: Any) -> dict[str, bytes]:
    config = NAMES | ({} if name is None else {"tokenizer_class": name}) | config
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def with_added(content: Files, *tokens: str) -> dict[str, bytes]:
    tokenizer = Tokenizer.from_str(content["tokenizer.json"].decode())
    tokenizer.add_special_tokens(list(tokens))
    return {**content, "tokenizer.json": tokenizer.to_str().encode()}


def sentencepiece_file(folder: Path) -> bytes:
    (folder / "text.txt").write_text(LICENSE)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "spm"), vocab_size=SIZE, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    return (folder / "spm.model").read_bytes()


def merges_and_vocabulary() -> dict[str, bytes]:
    known = json.loads(byte_level().to_str())["model"]
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in known["merges"])])
    config = json.dumps(NAMES | {"tokenizer_class": "GPT2Tokenizer"}).encode()
    return {
        "vocab.json": json.dumps(known["vocab"]).encode(),
        "merges.txt": merges.encode(),
        "tokenizer_config.json": config,
    }


SITUATIONS: dict[str, Callable[[Path], Files]] = {
    "byte-level": lambda _: files(byte_level(), "PreTrainedTokenizerFast"),
    "byte-level, called Llama": lambda _: files(byte_level(adds_bos=True), "LlamaTokenizer"),
    "byte-level, called Llama, no BOS": lambda _: files(
        byte_level(llama3=True), "LlamaTokenizerFast", add_bos_token=False
    ),
    "byte-level of Llama 3, no class": lambda _: files(byte_level(llama3=True, adds_bos=True)),
    "no config": lambda _: {"tokenizer.json": byte_level(adds_bos=True).to_str().encode()},
    "saved by 5": lambda _: with_added(
        files(byte_level(adds_bos=True), "TokenizersBackend", extra_special_tokens=["<pad>", "<|end|>"], backend="x"),
        "<pad>",
        "<|end|>",
    ),
    "a class that nobody knows": lambda _: files(byte_level(), "OurOwnTokenizer"),
    "as Llama 2": lambda _: files(sentencepiece_like(None), "LlamaTokenizer", legacy=False, add_bos_token=True),
    "as Llama 2, legacy": lambda _: files(sentencepiece_like("first"), "LlamaTokenizerFast", legacy=True),
    "visible spaces, no class": lambda _: files(sentencepiece_like("always")),
    "added tokens that no text has": lambda _: with_added(files(byte_level(), "PreTrainedTokenizerFast"), "<a>", "<b>"),
    "added tokens in two files": lambda _: {
        **with_added(files(byte_level(), "PreTrainedTokenizerFast", pad_token="<pad>"), "<pad>"),
        "added_tokens.json": json.dumps({"<pad>": SIZE, "<|end|>": SIZE}).encode(),
        "special_tokens_map.json": json.dumps(NAMES | {"pad_token": "<pad>"}).encode(),
    },
    "SentencePiece alone": lambda folder: {
        "tokenizer.model": sentencepiece_file(folder),
        "tokenizer_config.json": json.dumps(NAMES | {"tokenizer_class": "LlamaTokenizer", "legacy": False}).encode(),
    },
    "vocabulary and merges": lambda _: merges_and_vocabulary(),
    "named templates": lambda _: {
        **files(byte_level(), "PreTrainedTokenizerFast"),
        "chat_template.jinja": b"{{ messages[0].content }}",
        "additional_chat_templates/tool_use.jinja": b"tools: {{ messages[0].content }}",
    },
    "named templates in the config": lambda _: files(
        byte_level(), chat_template=[{"name": name, "template": name} for name in ("default", "rag")]
    ),
    "a template in two places": lambda _: {
        **files(byte_level(), chat_template="of the config"),
        "chat_template.jinja": b"of the file",
    },
}  # fmt: skip


def write(folder: Path, content: Files, **config: Any) -> Path:
    """A tiny model with these files beside it."""
    config = hf_config(**{"vocab_size": 600, "bos_token_id": 1, "eos_token_id": 2} | config) | {"sliding_window": None}
    write_folder(folder, config)
    for name, data in content.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def is_one_line(error: BaseException) -> bool:
    return len(str(error)) <= 500 and "\n" not in str(error)


def does(tokenizer: Any) -> dict[str, Any]:
    """All that a tokenizer does to texts and conversations."""
    return {
        "bare": [tokenizer.encode(text, add_special_tokens=False) for text in STRINGS],
        "with special tokens": [tokenizer.encode(text) for text in STRINGS],
        "back": [tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) for text in STRINGS],
        "special": (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            sorted(tokenizer.all_special_ids),
        ),
        "templates": tokenizer.chat_template,
    }


# For Mistral, transformers builds nothing from vocab.json and merges.txt.
BOTH = [(family, situation) for situation in SITUATIONS for family in ("llama", "mistral")]
BOTH.remove(("mistral", "vocabulary and merges"))


@pytest.mark.parametrize(("family", "situation"), BOTH)
def test_ids_are_those_of_stock_transformers_on_a_hundred_strings(tmp_path: Path, situation: str, family: str) -> None:
    assert len(STRINGS) == 100
    folder = write(tmp_path / "in", SITUATIONS[situation](tmp_path), **(MISTRAL if family == "mistral" else {}))
    stock = does(AutoTokenizer.from_pretrained(folder))
    checkpoint = convert.load(folder, stream=True)
    assert does(load_tokenizer(checkpoint)) == stock
    convert.save(checkpoint, tmp_path / "out")
    assert does(AutoTokenizer.from_pretrained(tmp_path / "out")) == stock
    assert does(load_tokenizer(convert.load(tmp_path / "out", stream=True))) == stock


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_a_byte_level_vocabulary_called_llama_is_read_as_it_is_by_every_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # As versions before 5.4 or so, which do not look.
    monkeypatch.setattr(TokenizersBackend, "_tokenizer_json_has_byte_level", lambda *args, **kwargs: False)
    folder = write(tmp_path / "in", files(byte_level(), name))
    true_ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(LICENSE, add_special_tokens=False).ids
    assert AutoTokenizer.from_pretrained(folder).encode(LICENSE, add_special_tokens=False) != true_ids
    assert encode_text(load_tokenizer(convert.load(folder, stream=True)), LICENSE) == true_ids


def test_a_tokenizer_saved_by_version_5_is_written_as_both_versions_read_it() -> None:
    content = files(
        byte_level(), "TokenizersBackend", extra_special_tokens=["<pad>"], add_prefix_space=True, theirs=[1]
    )
    config = json.loads(portable_assets(content)["tokenizer_config.json"])
    assert config == NAMES | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<pad>"],  # 4 takes the other name for a mapping
        "add_prefix_space": False,  # of tokenizer.json, the only place where 5 looks
        "theirs": [1],
    }
    assert portable_assets(content)["tokenizer.json"] == content["tokenizer.json"]
    for other in (files(byte_level(), "LlamaTokenizer"), {**content, "tokenizer_config.json": b"["}, {"LICENSE": b""}):
        assert portable_assets(other) == other


def test_a_tokenizer_of_transformers_5_0_is_quiet_about_a_large_vocabulary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIAL, *alphabet]
    names += [f"w{number}" for number in range(100_200 - len(names))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    warned = {}
    for version in ("5.0.0", "4.50.0"):
        content = files(tokenizer, "TokenizersBackend")
        folder = write(tmp_path / version, content, transformers_version=version, **MISTRAL)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            logging.getLogger("transformers").propagate = True
            load_tokenizer(convert.load(folder, stream=True))
        warned[version] = "incorrect regex" in caplog.text
    assert warned == {"5.0.0": False, "4.50.0": True}  # as transformers itself


# ------------------------------------------------------------------------------------------------------- templates

TEMPLATES = {name: f"{name}: {{{{ messages[-1].content }}}}" for name in ("default", "rag", "tool_use")}
NAMED = {
    **files(byte_level(), "PreTrainedTokenizerFast"),
    "chat_template.jinja": TEMPLATES["default"].encode(),
    **{f"additional_chat_templates/{name}.jinja": TEMPLATES[name].encode() for name in ("rag", "tool_use")},
}
NO_DEFAULT = files(
    byte_level(), chat_template=[{"name": name, "template": TEMPLATES[name]} for name in ("rag", "tool_use")]
)


def templates_at(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize(
    "options", [[], ["--no-stream"], ["--format", "hf,orbax"], ["--format", "orbax"]], ids=" ".join
)
def test_pruning_keeps_every_template(tmp_path: Path, options: list[str], capsys: Capture) -> None:
    folder, out = write(tmp_path / "in", NAMED), tmp_path / "out"
    (folder / "additional_chat_templates" / "README").write_text("of no use")
    argv = ["--model", folder, "--width", 40, "--output", out, *options]
    assert prune.main(list(map(str, argv))) == 0
    assert templates_at(out) == templates_at(folder) == TEMPLATES
    assert sorted(path.name for path in (out / "additional_chat_templates").iterdir()) == [
        "rag.jinja",
        "tool_use.jinja",
    ]
    assert prune.main([*map(str, argv), "--overwrite"]) == 0
    assert convert_main([str(out), str(tmp_path / "again")]) == 0  # from Orbax where there is nothing else
    assert templates_at(tmp_path / "again") == TEMPLATES
    capsys.readouterr()
    (out / "additional_chat_templates" / "novel.txt").write_text("")
    assert prune.main([*map(str, argv), "--overwrite"]) == 2
    assert "additional_chat_templates/, which is no part of a model folder" in capsys.readouterr().err


def test_named_templates_of_a_gguf_file_are_kept() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.merges": []}
    fields |= {"tokenizer.ggml.tokens": alphabet, "tokenizer.ggml.token_type": [1] * len(alphabet)}

    def config(more: Mapping[str, Any]) -> dict[str, Any]:
        read: dict[str, Any] = json.loads(tokenizer_assets(fields | dict(more))["tokenizer_config.json"])
        return read

    assert "chat_template" not in config({})
    assert config({"tokenizer.chat_template": "one"})["chat_template"] == "one"
    keys = {"tokenizer.chat_template": "one", "tokenizer.chat_template.rag": "two", "tokenizer.chat_templates": ["rag"]}
    both = [{"name": "default", "template": "one"}, {"name": "rag", "template": "two"}]
    assert config(keys)["chat_template"] == both
    with pytest.raises(OperationError, match="chat template 'rag' is 7; it must be text"):
        config({"tokenizer.chat_template.rag": 7})


def test_a_template_is_chosen_by_its_name(tmp_path: Path) -> None:
    checkpoint = convert.load(write(tmp_path / "named", NAMED), stream=True)
    for name in (None, *TEMPLATES):
        tokenizer = load_tokenizer(checkpoint, name)
        assert template_of(tokenizer) == TEMPLATES[name or "default"]
        assert tokenizer.decode(encode_prompt(tokenizer, "why")) == f"{name or 'default'}: why"
    with pytest.raises(RequestError, match=r"'none'.* its templates are 'default', 'rag', 'tool_use'") as caught:
        load_tokenizer(checkpoint, "none")
    assert str(checkpoint.source) in str(caught.value)

    several = load_tokenizer(convert.load(write(tmp_path / "several", NO_DEFAULT), stream=True))
    assert encode_text(several, "why")  # plain text needs none
    with pytest.raises(RequestError, match=r"'rag', 'tool_use', and none is called 'default'; .*`chat_template` NAME"):
        encode_prompt(several, "why")
    choose_template(several, "rag", "it")
    assert render(several, [{"role": "user", "content": "why"}], add_generation_prompt=True) == "rag: why"

    single = load_tokenizer(
        convert.load(write(tmp_path / "one", files(byte_level(), chat_template="{{ 1 }}")), stream=True)
    )
    choose_template(single, "default", "it")
    with pytest.raises(RequestError, match="its templates are 'default'"):
        choose_template(single, "rag", "it")
    with pytest.raises(RequestError, match="it has no chat template"):
        load_tokenizer(convert.load(write(tmp_path / "none", files(byte_level())), stream=True), "rag")


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
def test_the_reasoning_mode_is_switched_and_a_part_of_the_template(tmp_path: Path, name: str) -> None:
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        f"{{% if {name} is defined and {name} is false %}}<think></think>{{% endif %}}"
    )
    checkpoint = convert.load(write(tmp_path, files(byte_level(), chat_template=template)))
    said = {}
    for mode in (None, "on", "off"):
        tokenizer = load_tokenizer(checkpoint, thinking=mode)
        said[mode] = render(tokenizer, [{"role": "user", "content": "hello"}], add_generation_prompt=True)
        assert (template_of(tokenizer) == template) == (mode is None), (
            "results of the modes must not be taken for another's"
        )
    assert said == {None: "hello", "on": "hello", "off": "hello<think></think>"}


def test_a_template_without_reasoning_mode_refuses_one(tmp_path: Path) -> None:
    checkpoint = convert.load(write(tmp_path, files(byte_level(), chat_template="{{ messages }}")))
    with pytest.raises(RequestError, match=r"`thinking` is off, and the tokenizer of .* without a reasoning mode"):
        load_tokenizer(checkpoint, thinking="off")


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% for %}", "{{ 1 + messages[0].content }}", "{{ [][1].x }}"]
)
def test_a_template_that_fails_is_one_sentence(tmp_path: Path, template: str) -> None:
    folder = write(tmp_path / "in", files(byte_level(), chat_template=template))
    with pytest.raises(OperationError, match="the chat template of the tokenizer fails: ") as caught:
        encode_prompt(load_tokenizer(convert.load(folder, stream=True)), "why")
    assert is_one_line(caught.value)


def test_commands_say_that_no_template_is_the_default_and_take_one_by_name(tmp_path: Path, capsys: Capture) -> None:
    folder, text = write(tmp_path / "in", NO_DEFAULT), tmp_path / "text.txt"
    text.write_text("plain text " * 20)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "a question " * 20}]}) + "\n")
    pruning = ["--model", folder, "--width", 40, "--output", tmp_path / "out", "--overwrite"]
    sampling = [*pruning, "--sample", "why", "--sample-tokens", 2]
    calibrating = [*pruning, "--criterion", "activation", "--calibration-data", chats]
    calibrating += ["--calibration-tokens", 16, "--sequence-length", 16]
    recovering = [
        "--model",
        folder,
        "--train-data",
        chats,
        "--steps",
        1,
        "--sequence-length",
        16,
        "--output",
        tmp_path / "recovered",
    ]
    efficient = ["--model", folder, "--prompts", text, "--prune-percent", "0"]
    for main, argv in (
        (prune.main, sampling),
        (prune.main, calibrating),
        (recover.main, recovering),
        (__main__.main, efficient),
    ):
        assert main(list(map(str, argv))) == 2, argv
        err = capsys.readouterr().err
        assert "the chat templates 'rag', 'tool_use', and none is called 'default'" in err
        assert "please report" not in err
        assert main([*map(str, argv), "--chat-template", "other"]) == 2, argv
        assert "the chat template 'other' is asked for" in capsys.readouterr().err
    assert prune.main([*map(str, sampling), "--chat-template", "rag"]) == 0
    capsys.readouterr()
    unused = (
        (prune.main, pruning),
        (
            compare.main,
            [
                "--model",
                folder,
                "--eval-data",
                text,
                "--methods",
                "ppm",
                "--width",
                40,
                "--output",
                tmp_path / "compared",
            ],
        ),
        (__main__.main, ["--model", folder]),
        (evals_main, ["--model", folder, "--tasks", "piqa"]),
    )
    for main, argv in unused:
        assert main([*map(str, argv), "--chat-template", "rag"]) == 2, argv
        assert "--chat-template" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ tokens without embedding


def test_a_token_beyond_the_embedding_is_an_error_only_where_a_text_has_it(tmp_path: Path, capsys: Capture) -> None:
    content = with_added(files(byte_level(), "PreTrainedTokenizerFast", pad_token="<pad>"), "<pad>")
    folder, clean, dirty = (
        write(tmp_path / "in", content, vocab_size=SIZE),
        tmp_path / "clean.txt",
        tmp_path / "dirty.txt",
    )
    clean.write_text(LICENSE[:400])
    dirty.write_text(LICENSE[:200] + "<pad>" + LICENSE[200:400])
    pruning = ["--model", folder, "--width", 40, "--overwrite", "--sequence-length", 32, "--eval-tokens", 64]
    pruning += ["--output", tmp_path / "out"]
    assert prune.main([*map(str, pruning), "--eval-data", str(clean)]) == 0
    assert f"1 token beyond the {SIZE} of the model's embedding ('<pad>' with id {SIZE})" in capsys.readouterr().err
    calibrated = [
        "--criterion",
        "activation",
        "--calibration-data",
        dirty,
        "--calibration-tokens",
        96,
        "--sequence-length",
        32,
    ]
    common = ["--model", folder]
    cases: list[tuple[Callable[[list[str]], int], list[object]]] = [
        (prune.main, [*pruning, "--eval-data", dirty, "--eval-tokens", 4096]),
        (prune.main, [*pruning, "--sample", "why <pad>"]),
        (prune.main, [*pruning, *calibrated]),
        (
            compare.main,
            [*common, "--eval-data", dirty, "--methods", "ppm", "--width", 40, "--output", tmp_path / "compared"],
        ),
        (
            recover.main,
            [*common, "--train-data", dirty, "--steps", 1, "--sequence-length", 32, "--output", tmp_path / "recovered"],
        ),
        (__main__.main, [*common, "--prompts", dirty, "--prune-percent", "0", "--batch-sizes", "1"]),
    ]
    for main, argv in cases:
        assert main(list(map(str, argv))) == 2, argv
        assert f"a text has the token '<pad>' with id {SIZE}" in capsys.readouterr().err, argv


def test_tokens_are_checked_against_the_embedding(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(convert.load(write(tmp_path / "in", files(byte_level()), vocab_size=600), stream=True))
    assert tokens_beyond(tokenizer, SIZE) is None  # models pad their embeddings
    assert str(tokens_beyond(tokenizer, SIZE - 2)).startswith("the tokenizer has 2 tokens beyond the 338 of")
    check_ids(tokenizer, [], SIZE)
    check_ids(tokenizer, np.array([[1, -1], [SIZE - 1, 2]], np.int32), SIZE)
    with pytest.raises(
        RequestError, match=f"with id {SIZE - 1}, which lies outside the model's vocabulary of {SIZE - 1}"
    ):
        check_ids(tokenizer, [1, SIZE - 1], SIZE - 1)


# -------------------------------------------------------------------------------------------------------- refusals


def test_a_sentencepiece_model_asks_for_sentencepiece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "in", SITUATIONS["SentencePiece alone"](tmp_path))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(OperationError, match=r"is in tokenizer.model alone.*pip install sentencepiece$"):
        load_tokenizer(convert.load(folder, stream=True))
    for name, data in files(byte_level()).items():
        (folder / name).write_bytes(data)
    assert encode_text(load_tokenizer(convert.load(folder, stream=True)), "why")  # of tokenizer.json


DAMAGE = {
    "not JSON": ({"tokenizer.json": b'{"version": '}, "tokenizer.json is not JSON"),
    "not UTF-8": ({"tokenizer.json": b'{"version": "\xff"}'}, "tokenizer.json is not JSON"),
    "another object": ({"tokenizer.json": b"[]"}, "cannot be read"),
    "empty": ({"tokenizer.json": b""}, "tokenizer.json is not JSON"),
    "config no object": (
        {"tokenizer_config.json": b"[1, 2]"},
        r"tokenizer_config.json of .* holds \[1, 2\] instead of an",
    ),
    "config not JSON": ({"tokenizer_config.json": b"{"}, "tokenizer_config.json of .* is not JSON"),
    "class a number": ({"tokenizer_config.json": b'{"tokenizer_class": 7}'}, "has tokenizer_class 7; it must be"),
    "map not JSON": ({"special_tokens_map.json": b"{"}, "special_tokens_map.json is not JSON"),
}


def test_what_transformers_cannot_build_is_one_sentence(tmp_path: Path) -> None:
    for number, content in enumerate((merges_and_vocabulary(), {"tokenizer_config.json": b"{}"})):
        checkpoint = convert.load(write(tmp_path / str(number), content, **MISTRAL), stream=True)
        with pytest.raises(OperationError, match=r"there is no tokenizer.json, and transformers makes none") as caught:
            load_tokenizer(checkpoint)
        assert is_one_line(caught.value)


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_named(tmp_path: Path, case: str) -> None:
    changes, message = DAMAGE[case]
    folder = write(tmp_path / "in", files(byte_level()) | changes)
    with pytest.raises(OperationError, match=message) as caught:
        load_tokenizer(convert.load(folder, stream=True))
    assert is_one_line(caught.value)


def test_whatever_is_wrong_with_tokenizer_json_is_one_sentence(tmp_path: Path) -> None:
    content = files(byte_level(adds_bos=True), "PreTrainedTokenizerFast")
    checkpoint = convert.load(write(tmp_path / "in", content), stream=True)
    generator, data = np.random.default_rng(0), content["tokenizer.json"]
    refused = []
    for _ in range(60):
        damaged = bytearray(data)
        start, length = int(generator.integers(len(data))), int(generator.integers(1, 40))
        damaged[start : start + length] = generator.integers(
            32, 127, int(generator.integers(0, 40)), np.uint8
        ).tobytes()
        checkpoint.assets["tokenizer.json"] = bytes(damaged)  # type: ignore[index]
        try:
            encode_text(load_tokenizer(checkpoint), LICENSE[:200])
        except GlupruneError as error:
            refused.append(error)
    assert len(refused) > 20
    assert all(map(is_one_line, refused))


def test_a_model_without_tokenizer_is_pruned_and_its_text_refused(tmp_path: Path, capsys: Capture) -> None:
    folder = write(tmp_path / "in", {})
    argv = ["--model", str(folder), "--width", "40", "--output", str(tmp_path / "out")]
    assert prune.main(argv) == 0
    assert prune.main([*argv, "--overwrite", "--sample", "why"]) == 2
    assert "has no tokenizer files, which text needs" in capsys.readouterr().err
