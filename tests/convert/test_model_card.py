"""Model cards: the whole method, the licence and the base model, through formats, prunings and training."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from calibration_text import TEXT
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.card_header import format_licence, parse_header, read_header, recognise
from convert.model_card import model_card, recovery_card
from gluprune_jax import make_plan, prune_model, score

CONFIG = hf_config(vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1, intermediate_size=83, max_position_embeddings=64)
CARD = """---
language: [en]
license: other
license_name: "some-licence"
license_link: https://example.com/licence
base_model: someone/else
tags:
- chat
---
license: not this
"""
RECORD = {"steps": 6, "tokens": 768, "teacher": "dense", "settings": {"--lora-rank": 4, "--teacher": None}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(write_folder(tmp_path / "model", CONFIG, hf_tensors(CONFIG)))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "model"


def pruned(folder: Path, method: str, **options: Any) -> tuple[convert.Checkpoint, str]:
    """A pruned checkpoint and its card."""
    dense = convert.load(folder)
    if "+" in method:
        options |= {"calibration": [str(folder.parent / "text.txt")], "calibration_tokens": 640, "sequence_length": 32}
    found = prune_model(dense, method, **options)
    return found, model_card(found, dense.config, None, "command")


# ------------------------------------------------------------------------------------------------------ the method


def test_a_card_says_the_whole_method(folder: Path) -> None:
    checkpoint, card = pruned(folder, "wanda+global+least-squares+sequential", prune_percent=20, min_keep=0.3)
    record = checkpoint.history[-1]
    for part in (
        "- Criterion: `wanda` on float32 weights",
        "- Target: prune_percent 20.0, multiple of 1",
        "- Allocation: global, one budget over the layers; each keeps at least 30% of its neurons",
        "- Sequential: each layer was pruned on the outputs",
        "- Refit of down_proj: least-squares (damping 0.001); the error of a layer's output",
        f"- Calibration text: {folder.parent / 'text.txt'}; 640 tokens in windows of 32, "
        f"`{record['calibration']['digest']}`",
    ):
        assert part in card
    assert record["request"]["compensate"] == "least-squares"


def test_a_card_says_nothing_of_what_was_not_done(folder: Path) -> None:
    _, card = pruned(folder, "ppm", width=40)
    for word in ("Allocation", "Sequential", "Refit", "Calibration", "Step "):
        assert word not in card


def test_a_card_says_that_a_refit_of_the_plan_is_missing(folder: Path) -> None:
    checkpoint, _ = pruned(folder, "ppm+least-squares", width=40)
    dense = convert.load(folder)
    plan = make_plan(score(dense.model), width=40).compensated_on(checkpoint.history[0]["calibration"])
    card = model_card(dense.pruned(plan), dense.config, None, "command")
    assert "- Refit of down_proj: none, although the plan was made with one" in card


def test_earlier_steps_are_listed(folder: Path) -> None:
    once, _ = pruned(folder, "ppm+least-squares", width=60)
    twice = prune_model(once, "l2", width=40, drop_layers=[0])
    card = model_card(twice, once.config, None, "command")
    assert "- Step 1 before this: pruned: ppm, width 60, down_proj refitted by least squares" in card
    trained = dataclasses.replace(twice, history=(*twice.history, {"recovery": RECORD}))
    card = recovery_card(trained, RECORD, {"loss": 1.5}, "command")
    assert "- Step 2 before this: pruned: l2, width 40, layers [0] dropped" in card
    assert "- Step 3" not in card  # the training itself
    assert "| `--lora-rank` | 4 |" in card
    again = dataclasses.replace(trained, history=(*trained.history, trained.history[0]))
    card = model_card(again, once.config, None, "command")
    assert "- Step 3 before this: recovery training, 768 tokens, teacher dense" in card


# ---------------------------------------------------------------------------------- the licence and the base model


def test_the_licence_of_the_base_model_goes_through_formats_and_steps(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text(CARD)
    checkpoint, card = pruned(folder, "ppm", width=60)
    known = {"license": "other", "license_name": "some-licence", "license_link": "https://example.com/licence"}
    assert checkpoint.card == known  # the base model of the base model is not ours
    assert parse_header(card) == known
    assert "- Licence of the base model: other (some-licence, https://example.com/licence)" in card
    convert.save(checkpoint, tmp_path / "hf", extra_files={"README.md": card})
    convert.save(checkpoint, tmp_path / "orbax", formats=["orbax"], extra_files={"README.md": card})
    for source in (tmp_path / "hf", tmp_path / "orbax"):
        loaded = convert.load(source)
        assert loaded.card == known
        again = prune_model(loaded, "ppm", width=40)
        assert f"- Base model: {folder}\n- Made from: {source}\n" in model_card(again, loaded.config, None, "command")
        assert parse_header(recovery_card(again, RECORD, {}, "command"))["license"] == "other"


def test_the_base_model_is_known_after_pruning_and_recovery(folder: Path, tmp_path: Path) -> None:
    dense = dataclasses.replace(convert.load(folder), source="someone/something")  # as from the hub
    once = prune_model(dense, "ppm", width=60)
    card = model_card(once, dense.config, None, "command")
    assert parse_header(card) == {"license": "unknown", "base_model": "someone/something"}
    convert.save(once, tmp_path / "once", extra_files={"README.md": card})
    loaded = convert.load(tmp_path / "once")
    trained = dataclasses.replace(loaded, history=(*loaded.history, {"recovery": RECORD}))
    card = recovery_card(trained, RECORD, {}, "command")
    assert parse_header(card) == {"license": "unknown", "base_model": "someone/something"}
    assert f"- Base model: someone/something\n- Made from: {tmp_path / 'once'}\n" in card


def test_a_path_is_no_base_model_on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    dense = dataclasses.replace(convert.load(folder), source=f"{folder.parent.name}/{folder.name}")
    card = model_card(prune_model(dense, "ppm", width=60), dense.config, None, "command")
    assert "base_model" not in parse_header(card)


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("                  Apache License\n                  Version 2.0, January 2004", "apache-2.0"),
        ("MIT License\n\nCopyright (c) 2025 somebody", "mit"),
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2 Version Release Date", "llama3.2"),
        ("You may do as you like.", None),
        ("", None),
    ],
)
def test_a_licence_file_is_recognised_where_no_card_says_it(folder: Path, text: str, licence: str | None) -> None:
    assert recognise(text) == licence
    (folder / "LICENSE.txt").write_text(text)
    assert read_header(folder) == ({} if licence is None else {"license": licence})
    (folder / "README.md").write_text(CARD)
    assert read_header(folder)["license"] == "other"


@pytest.mark.parametrize(
    "card",
    ["", "no header", "---\nlicense: mit\n", "---\nlicense:\n- mit\n---\n", "---\n---\nlicense: mit", "\x00---\n"],
)
def test_a_card_that_says_nothing_leaves_the_licence_unknown(folder: Path, card: str) -> None:
    (folder / "README.md").write_text(card)
    checkpoint = convert.load(folder)
    assert checkpoint.card == {}
    assert format_licence(checkpoint.card) == "unknown"


def test_bytes_that_are_no_text_keep_no_model_from_being_loaded(folder: Path) -> None:
    (folder / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    (folder / "LICENSE").write_bytes(bytes(range(256)) * 10)
    convert.load(folder)


@pytest.mark.real_model
def test_a_gguf_file_says_its_licence(demo: convert.Checkpoint) -> None:
    assert demo.card == {"license": "apache-2.0"}


def test_the_header_is_yaml_that_others_read(folder: Path) -> None:
    yaml = pytest.importorskip("yaml")
    (folder / "README.md").write_text("---\nlicense: 'a: b # c'\n---\n")
    _, card = pruned(folder, "ppm", width=60)
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "a: b # c"
    assert header["tags"] == ["gluprune", "pruned", "llama"]


# ----------------------------------------------------------------------------------------------------------- sizes


def test_a_card_says_the_bytes_of_the_files_and_what_of_them_are_zeros(folder: Path) -> None:
    dense = convert.load(folder)
    found = prune_model(dense, "ppm", width=70)
    card = model_card(found, dense.config, None, "command", sizes={"safetensors": (2_000_000, 1_500_000)}, pad_to=32)
    assert "| safetensors | 2.00 MB | 1.50 MB |" in card
    assert f"| parameters | {dense.config.num_parameters:,} | {found.config.num_parameters:,} |" in card
    assert "- Neurons of zeros: the safetensors are zero-padded to 96" in card
    assert "zero-padded" not in model_card(found, dense.config, None, "command", pad_to=35)
