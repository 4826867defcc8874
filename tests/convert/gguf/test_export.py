"""GGUF files as the commands write them: names, formats, what stands in them, what is refused and what stays."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from commands import report, run
from merging_tokenizer import VOCABULARY, write_tiny
from safetensors.numpy import load_file, save_file
from tiny_mixtures import CONFIGS as MIXTURES
from tiny_mixtures import write_mixture
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.__main__ import main
from convert.gguf import file_writer
from convert.huggingface.safetensors import TensorReader
from gluprune_jax.errors import OperationError
from gluprune_jax.models.parameters import parameters_of
from gluprune_jax.prune import main as prune

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `model`, with a tokenizer, in the working folder."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "model")
    return tmp_path / "model"


def weights(name: str | Path) -> dict[str, bytes]:
    return {parameter: np.asarray(a).tobytes() for parameter, a in parameters_of(convert.load(name).model).items()}


def field(path: str, key: str) -> Any:
    return gguf.GGUFReader(path).fields[key].contents()


# ------------------------------------------------------------------------------------------------ what is written


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("options", [(), ("--pad-to", "32"), ("--gguf-type", "F16", "--pad-to", "256")])
def test_prune_reports_the_bytes_of_the_file(capsys: Capture, options: tuple[str, ...]) -> None:
    argv = ("--model", "model", "--width", "8", "--output", "out.gguf", *options)
    found = report(prune, capsys, *argv)
    assert report(prune, capsys, *argv, "--dry-run", "--overwrite")["after"] == found["after"]
    tensors = gguf.GGUFReader("out.gguf").tensors
    assert found["after"]["file_bytes"]["gguf"] == sum(-(-int(tensor.n_bytes) // 32) * 32 for tensor in tensors)
    assert convert.load("out.gguf").config.intermediate_sizes == tuple(found["after"]["intermediate_sizes"])
    assert set(found["after"]["intermediate_sizes"]) == {8}


@pytest.mark.usefixtures("model")
def test_a_file(capsys: Capture) -> None:
    (Path("model") / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert run(main, capsys, "model", "out.gguf")[0] == 0
    assert sorted(os.listdir()) == ["model", "out.gguf"]
    assert weights("out.gguf") == weights("model")
    assert field("out.gguf", "general.name") == "model"
    assert field("out.gguf", "general.license") == "apache-2.0"
    assert field("out.gguf", "general.file_type") == 0
    assert len(field("out.gguf", "tokenizer.ggml.tokens")) == VOCABULARY
    assert convert.load("out.gguf").card == {"license": "apache-2.0"}
    status, _, err = run(main, capsys, "model", "out.gguf")
    assert (status, err.count("\n")) == (2, 1)
    assert "out.gguf exists; choose another path or add --overwrite" in err
    assert report(main, capsys, "model", "out.gguf", "--overwrite", "--gguf-type", "Q8_0")["notes"][-1:] == [
        "23 of 23 matrices are F16, as 32 does not divide their rows"
    ]


@pytest.mark.usefixtures("model")
def test_beside_safetensors_and_alone_in_a_folder(capsys: Capture) -> None:
    assert run(main, capsys, "model", "both", "--format", "hf,gguf")[0] == 0
    names = ["config.json", "model.gguf", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir("both")) == names
    assert run(main, capsys, "model", "both", "--format", "gguf", "--overwrite", "--gguf-type", "F16")[0] == 0
    assert sorted(os.listdir("both")) == [name for name in names if name != "model.safetensors"]
    loaded = convert.load("both")
    assert loaded.source == "both"
    assert {array.dtype.name for array in parameters_of(loaded.model).values()} == {"float16", "float32"}
    assert run(main, capsys, "both", "again", "--dtype", "float32")[0] == 0
    first, again = (load_file(f"{name}/model.safetensors") for name in ("model", "again"))
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(again[name], first[name].astype(np.float16).astype(np.float32))


@pytest.mark.usefixtures("model")
def test_a_pruned_model(capsys: Capture) -> None:
    said = report(prune, capsys, "--model", "model", "--width", 41, "--output", "out.gguf")
    assert (said["output"], said["formats"]) == ("out.gguf", ["gguf"])
    assert sorted(os.listdir()) == ["model", "out.gguf"]
    assert run(prune, capsys, "--model", "model", "--width", 41, "--output", "hf")[0] == 0
    assert weights("out.gguf") == weights("hf")
    ours, others = convert.load("out.gguf").history, convert.load("hf").history
    assert ours == others
    assert ours[0]["base_model"] == "model"
    # What is pruned again knows where it comes from.
    assert run(prune, capsys, "--model", "out.gguf", "--width", 31, "--output", "2.gguf")[0] == 0
    assert [record["request"]["width"] for record in json.loads(field("2.gguf", "gluprune.history"))] == ["41", "31"]


@pytest.mark.usefixtures("model")
def test_layers_of_different_widths(capsys: Capture) -> None:
    config = hf_config(vocab_size=VOCABULARY, intermediate_size=160)
    tensors = hf_tensors(config)
    tensors["model.layers.1.mlp.gate_proj.weight"] *= np.linspace(0.1, 1, 160, dtype=np.float32)[:, None]
    write_folder(Path("model"), config, tensors)
    argv = ("--model", "model", "--prune-percent", "40", "--allocation", "global")
    assert run(prune, capsys, *argv, "--output", "out.gguf")[0] == 0
    assert run(prune, capsys, *argv, "--output", "hf")[0] == 0
    widths = convert.load("hf").config.intermediate_sizes
    stored = [-(-width // 32) * 32 for width in widths]
    assert len(set(stored)) > 1
    assert field("out.gguf", "deci.feed_forward_length") == stored
    assert weights("out.gguf") == weights("hf")
    assert convert.load("out.gguf").config == convert.load("hf").config
    status, _, err = run(main, capsys, "hf", "uniform.gguf", "--gguf-widths", "uniform")
    assert status == 0
    assert f"note: layers of {min(widths)} to {max(widths)} neurons were all filled up to {max(stored)} with" in err
    assert field("uniform.gguf", "llama.feed_forward_length") == max(stored)
    assert weights("uniform.gguf") == weights("hf")


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("allocation", "method"),
    [
        ("global", ()),
        ("measured", ()),
        ("global", ("--criterion", "wanda", "--sequential", "--compensate", "least-squares")),
    ],
)
def test_an_allocation_within_a_number_of_bytes(capsys: Capture, allocation: str, method: Sequence[str]) -> None:
    config = hf_config(vocab_size=VOCABULARY, intermediate_size=160)
    tensors = hf_tensors(config)
    tensors["model.layers.1.mlp.gate_proj.weight"] *= np.linspace(0.1, 1, 160, dtype=np.float32)[:, None]
    write_folder(Path("model"), config, tensors)
    Path("text.txt").write_text("the cat sat on the mat, and the dog lay on the rug. " * 40)
    argv: list[object] = ["--model", "model", "--allocation", allocation, *method, "--overwrite"]
    if allocation == "measured" or method:
        argv += ["--calibration-data", "text.txt", "--sequence-length", 16]
    whole = Path("dense.gguf")
    assert run(main, capsys, "model", whole, "--gguf-type", "F16")[0] == 0
    most = whole.stat().st_size * 8 // 10
    asked = ("--target-bytes", most, "--target-type", "F16", "--gguf-type", "F16", "--output", "out.gguf")
    found = report(prune, capsys, *argv, *asked)
    assert 0.9 * most < Path("out.gguf").stat().st_size <= most
    assert len(set(found["after"]["intermediate_sizes"])) > 1
    assert found["plan"]["request"]["allocation"]["method"] == allocation
    if allocation == "global":  # costs are measured at the share without an allocation, which the limit alone says
        argv += ["--width", found["plan"]["request"]["width"]]
        assert report(prune, capsys, *argv, "--output", "2.gguf")["plan"] == found["plan"]
        del argv[-2:]
    # A folder holds zeros up to the widest layer, which is said.
    dense = found["before"]["bytes"]
    status, _, err = run(prune, capsys, *argv, "--target-bytes", dense * 9 // 10, "--output", "hf")
    assert status == 0, err
    assert "--target-bytes counts them padded to the widest; --target-type orbax counts true widths" in err
    stored = sum(array.nbytes for array in load_file("hf/model.safetensors").values())
    assert dense * 8 // 10 < stored <= dense * 9 // 10
    status, _, err = run(prune, capsys, *argv, "--target-bytes", dense // 2, "--output", "hf", "--min-keep", "0.6")
    assert (status, err.count("error")) == (2, 1)
    assert "; the smallest possible is " in err
    assert err.endswith(" and this allocation\n")


def test_the_base_model_on_the_hub(model: Path) -> None:
    checkpoint = convert.load(model)
    object.__setattr__(checkpoint, "source", "owner/tiny-model")
    convert.save(checkpoint, "out.gguf", formats=["gguf"])
    assert field("out.gguf", "general.name") == "tiny-model"
    assert field("out.gguf", "general.base_model.0.name") == "tiny-model"
    assert field("out.gguf", "general.base_model.0.organization") == "owner"
    assert field("out.gguf", "general.base_model.0.repo_url") == "https://huggingface.co/owner/tiny-model"


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("out.gguf", "--format", "hf"), "out.gguf is a GGUF file by its name, and --format hf is written as a folder"),
        (("out.gguf", "--format", "gguf,orbax"), "--format orbax is written as a folder; give the name of a folder"),
        (("out", "--gguf-type", "F16"), "--gguf-type is about GGUF files; add gguf to --format, or leave it out"),
        (("out", "--gguf-widths", "uniform"), "--gguf-widths is about GGUF files; add gguf to --format"),
        (("gs://bucket/out", "--format", "gguf"), "--format orbax is written and gguf is not"),
        (("text.gguf", "--overwrite"), "text.gguf is not replaced: it is no GGUF file; choose another path"),
        (("folder.gguf", "--overwrite"), "folder.gguf is not a file; choose another path for the output"),
        (("file/out.gguf",), "file is a file, not a folder"),
    ],
)
@pytest.mark.usefixtures("model")
def test_refused_outputs(argv: tuple[str, ...], message: str, capsys: Capture) -> None:
    Path("text.gguf").write_text("mine")
    Path("folder.gguf").mkdir()
    Path("file").write_text("")
    before = sorted(os.listdir())
    status, _, err = run(main, capsys, "model", *argv)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert sorted(os.listdir()) == before


@pytest.mark.usefixtures("model")
def test_a_file_does_not_replace_itself(capsys: Capture) -> None:
    assert run(main, capsys, "model", "out.gguf")[0] == 0
    status, _, err = run(main, capsys, "out.gguf", "out.gguf", "--overwrite")
    assert status == 2
    assert "is or holds the model itself" in err


def test_what_has_no_form_is_refused_before_anything_is_pruned(model: Path, capsys: Capture) -> None:
    data = json.loads((model / "tokenizer.json").read_text())
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    (model / "tokenizer.json").write_text(json.dumps(data))
    status, _, err = run(prune, capsys, "--model", "model", "--width", 8, "--output", "out.gguf")
    assert (status, err.count("error")) == (2, 1)
    assert "the tokenizer of model has no form in a GGUF file: " in err
    assert err.endswith("; write --format hf, which keeps it\n")
    assert os.listdir() == ["model"]


def test_a_mixture_that_llama_cpp_cannot_express_is_refused_before_anything_is_pruned(
    tmp_path: Path, capsys: Capture
) -> None:
    folder = write_mixture(tmp_path / "mixture", MIXTURES["olmoe"])
    argv = ("--model", folder, "--width", 8, "--output")
    status, _, err = run(prune, capsys, *argv, tmp_path / "out.gguf")
    assert (status, err.count("\n")) == (2, 1)
    assert "llama.cpp's architecture 'olmoe' cannot express clip_qkv = 0.7" in err
    assert err.endswith("; write --format hf\n")
    status, _, err = run(prune, capsys, *argv, tmp_path / "out", "--format", "orbax")
    assert status == 2
    assert f"--format orbax cannot be given for {folder}: a mixture of experts" in err
    assert os.listdir(tmp_path) == ["mixture"]


def test_weights_that_are_not_finite(tmp_path: Path, capsys: Capture) -> None:
    write_folder(tmp_path / "model", hf_config())
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    status, _, err = run(main, capsys, tmp_path / "model", tmp_path / "out.gguf")
    assert status == 1
    assert "model.layers.2.mlp.up_proj.weight" in err
    assert "NaN or Inf" in err
    assert os.listdir(tmp_path) == ["model"]


# ------------------------------------------------------------------------------------------------- what stays


@pytest.mark.usefixtures("model")
def test_a_full_disk_is_one_sentence_and_the_old_file_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    convert.save(convert.load("model"), "out.gguf", formats=["gguf"])
    old = Path("out.gguf").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_writer.os, "fsync", full)
    with pytest.raises(OperationError, match=r"^cannot write .*out\.gguf: the disk is full \(.* MB are free there wit"):
        convert.save(convert.load("model"), "out.gguf", formats=["gguf"], overwrite=True)
    assert Path("out.gguf").read_bytes() == old
    assert sorted(os.listdir()) == ["model", "out.gguf"]


@pytest.mark.usefixtures("model")
def test_an_embedding_is_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    convert.save(convert.load("model", stream=True), "whole.gguf", formats=["gguf"])
    monkeypatch.setattr("convert.huggingface.safetensors._CHUNK", 1000)
    checkpoint, most = convert.load("model", stream=True), 0
    read_into = TensorReader.read_into

    def watched(reader: TensorReader, part: Any, start: int = 0) -> None:
        nonlocal most
        if "embed_tokens" in reader.tensor.name:
            most = max(most, part.nbytes)
        read_into(reader, part, start)

    monkeypatch.setattr(TensorReader, "read_into", watched)
    convert.save(checkpoint, "pieces.gguf", formats=["gguf"])
    assert 0 < most <= 1000
    assert Path("pieces.gguf").read_bytes() == Path("whole.gguf").read_bytes()


KILLED = """
import os, signal, sys
import convert
def progress(what, done, total):
    if what == "writing GGUF" and done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
convert.save(convert.load("model"), "out.gguf", formats=["gguf"], overwrite=True, progress=progress)
"""


@pytest.mark.usefixtures("model")
def test_kill_9_in_the_middle_of_writing() -> None:
    convert.save(convert.load("model"), "out.gguf", formats=["gguf"])
    old = Path("out.gguf").read_bytes()
    ended = subprocess.run([sys.executable, "-c", KILLED], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert Path("out.gguf").read_bytes() == old
    assert len(os.listdir()) == 3  # a hidden folder, which the next run takes away
    convert.save(convert.load("model"), "out.gguf", formats=["gguf"], overwrite=True)
    assert sorted(os.listdir()) == ["model", "out.gguf"]
