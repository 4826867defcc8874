"""`python -m convert`: what it writes and prints, and how it refuses."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import LLAMA3_ROPE, hf_config, hf_tensors, write_folder

import convert
from convert.__main__ import main
from gluprune_jax.errors import OperationError

CONFIG = hf_config(rope_scaling=LLAMA3_ROPE)
TENSORS = hf_tensors(CONFIG, "bfloat16")
PARAMETERS = sum(array.size for array in TENSORS.values())

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `model` in the working folder."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "model", CONFIG, TENSORS)
    (tmp_path / "model" / "tokenizer.json").write_bytes(b"{}\r\n")
    return tmp_path / "model"


def assert_same_weights(folder: Path | str) -> None:
    written = load_file(Path(folder) / "model.safetensors")
    assert written.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert written[name].dtype == array.dtype, name
        assert written[name].tobytes() == array.tobytes(), name


# ------------------------------------------------------------------------------------------------ what it does


@pytest.mark.usefixtures("model")
def test_a_folder_is_written_and_one_line_is_printed(capsys: Capture) -> None:
    assert main(["model", "out"]) == 0
    assert sorted(os.listdir("out")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert_same_weights("out")
    out, err = capsys.readouterr()
    assert out == f"wrote hf to out: {PARAMETERS:,} parameters\n"
    assert err.startswith("note: config.json: accepted without effect on the weights: bos_token_id, ")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("model")
def test_through_orbax_and_back(capsys: Capture) -> None:
    assert main(["model", "orbax-only", "--format", "orbax"]) == 0
    assert sorted(os.listdir("orbax-only")) == ["config.json", "orbax", "tokenizer.json"]
    assert main(["orbax-only", "out"]) == 0
    assert_same_weights("out")
    assert main(["orbax-only/orbax", "out2"]) == 0
    assert_same_weights("out2")
    assert Path("out2/tokenizer.json").read_bytes() == b"{}\r\n"
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "wrote orbax to orbax-only",
        "wrote hf to out",
        "wrote hf to out2",
    ]


@pytest.mark.usefixtures("model")
def test_orbax_weights_that_are_not_finite(capsys: Capture) -> None:
    checkpoint = convert.load("model")
    checkpoint.model.layers[1].mlp.up_proj.set_value(checkpoint.model.layers[1].mlp.up_proj[...].at[0, 0].set(3e38))
    convert.save(checkpoint, "large", formats=["orbax"])
    assert main(["large", "out", "--dtype", "float16"]) == 2
    assert "layers.1.mlp.up_proj holds values too large for float16" in capsys.readouterr().err
    checkpoint.model.norm.weight.set_value(checkpoint.model.norm.weight[...].at[3].set(float("nan")))
    convert.save(checkpoint, "spoilt", formats=["orbax"])
    assert main(["spoilt", "out"]) == 1
    assert "has NaN or Inf weights in norm.weight" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.usefixtures("model")
def test_both_formats_side_by_side(capsys: Capture) -> None:
    assert main(["model", "out", "--format", "hf,orbax"]) == 0
    assert_same_weights("out")
    assert main(["out/orbax", "again"]) == 0
    assert_same_weights("again")
    assert capsys.readouterr().out.startswith("wrote hf and orbax to out: ")


@pytest.mark.usefixtures("model")
def test_a_cast_is_only_made_when_asked_for() -> None:
    assert main(["model", "out", "--dtype", "float32"]) == 0
    for name, array in load_file("out/model.safetensors").items():
        assert array.dtype == np.float32, name
        np.testing.assert_array_equal(array, TENSORS[name].astype(np.float32), err_msg=name)
    assert json.loads(Path("out/config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.usefixtures("model")
def test_json_is_one_document(capsys: Capture) -> None:
    assert main(["model", "out", "--json", "--format", "orbax,hf"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report.pop("notes")[0].startswith("config.json: accepted without effect")
    assert report == {"model": "model", "output": "out", "formats": ["orbax", "hf"], "parameters": PARAMETERS}
    assert err == ""


def test_a_model_is_overwritten_when_asked_for(model: Path, capsys: Capture) -> None:
    write_folder(Path("out"), tensors=hf_tensors(hf_config(), seed=5), shards=2)
    assert main(["model", "out"]) == 2
    assert capsys.readouterr().err == (
        f"gluprune: error: {model.parent / 'out'} exists; choose another path or add --overwrite\n"
    )
    assert main(["model", "out", "--overwrite"]) == 0
    assert_same_weights("out")
    assert sorted(os.listdir("out")) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_hub_id(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("convert.sources.hub_snapshot", lambda name, revision: asked.append((name, revision)) or model)
    assert main(["owner/name", "out", "--revision", "v2"]) == 0
    assert asked == [("owner/name", "v2")]
    assert_same_weights("out")


def test_derived_tensors_are_reported(model: Path, capsys: Capture) -> None:
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(3)}
    write_folder(model, CONFIG, TENSORS | extra)
    assert main(["model", "out"]) == 0
    assert "note: 3 rotary_emb.inv_freq tensors were left out" in capsys.readouterr().err
    assert_same_weights("out")


def test_as_a_command_of_its_own(model: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(convert.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}

    def run(*arguments: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "convert", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=model.parent)
        return done.returncode, done.stdout, done.stderr

    status, out, err = run("model", "out")
    assert (status, out) == (0, f"wrote hf to out: {PARAMETERS:,} parameters\n")
    assert [line[:5] for line in err.splitlines()] == ["note:"], "warnings, or the remains of a progress bar"
    assert_same_weights("out")
    status, out, err = run("nothing", "out2")
    assert (status, out) == (2, "")
    assert err == "gluprune: error: there is no model nothing: " + (
        "not a file, not a folder, not a hub id (owner/name) and not 'demo' or 'demo:gemma3-270m'\n"
    )


# ---------------------------------------------------------------------------------------------------- refusals


def change_config(**changes: Any) -> Callable[[Path], None]:
    return lambda model: (model / "config.json").write_text(json.dumps(CONFIG | changes)) and None


def change_tensors(**changes: np.ndarray | None) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        tensors = {name: array for name, array in (TENSORS | changes).items() if array is not None}
        save_file(tensors, model / "model.safetensors")

    return edit


NAN = TENSORS["model.layers.2.mlp.down_proj.weight"].copy()
NAN[3, 4] = np.nan


def no_change(model: Path) -> None:
    pass


# Arguments, what is done to the model before, exit status, the line on standard error.
REFUSED: dict[str, tuple[list[str], Callable[[Path], Any], int, str]] = {
    "no model": (
        ["./nothing", "out"],
        no_change,
        2,
        "there is no model ./nothing: not a file, not a folder, not a hub",
    ),
    "no file": (["model/tokenizer.json", "out"], no_change, 2, "model/tokenizer.json is a file but not .gguf"),
    "format": (["model", "out", "--format", "hf,onnx"], no_change, 2, "--format is 'hf,onnx'; choose from hf, orbax"),
    "no format": (["model", "out", "--format", ""], no_change, 2, "--format is ''; choose from hf, orbax"),
    "revision": (["model", "out", "--revision", "v2"], no_change, 2, "--revision v2 belongs to a hub id; model is not"),
    "itself": (["model", "model", "--overwrite"], no_change, 2, "the output model is or holds the model itself"),
    "its folder": (
        ["model/orbax", "model", "--overwrite"],
        lambda m: ((m / "orbax").mkdir(), (m / "orbax" / "_CHECKPOINT_METADATA").touch()),
        2,
        "the output model is or",
    ),
    "output": (["model", "."], no_change, 2, "is the working folder or holds it"),
    "mixtral": (
        ["model", "out"],
        change_config(model_type="mixtral"),
        2,
        r"model/config.json has architectures \['LlamaForCausalLM'\]; supported is .* for mixtral",
    ),
    "qwen2": (["model", "out"], change_config(model_type="qwen2_moe"), 2, "config.json has model_type 'qwen2_moe'"),
    "gemma": (["model", "out"], change_config(model_type="gemma4"), 2, "model/config.json has model_type 'gemma4'"),
    "rope": (
        ["model", "out"],
        change_config(rope_scaling={"rope_type": "dynamic", "factor": 4.0}),
        2,
        "model/config.json: rope_scaling has rope_type 'dynamic'; supported are 'default', ",
    ),
    "bias": (["model", "out"], change_config(mlp_bias=True), 2, "model/config.json asks for .* mlp_bias = True"),
    "dtype": (
        ["model", "out"],
        change_tensors(**{"lm_head.weight": np.ones((97, 48), np.float64)}),
        2,
        r"model.safetensors has tensors of dtypes other than F32, F16, BF16: lm_head.weight \(F64\)",
    ),
    "truncated": (
        ["model", "out"],
        lambda model: os.truncate(model / "model.safetensors", 9000),
        1,
        "model.safetensors is truncated: it is 9,000 bytes long",
    ),
    "missing": (
        ["model", "out"],
        change_tensors(**{"model.norm.weight": None, "extra": np.ones(1, np.float32), "lm_head.weight": None}),
        1,
        "model: the tensors do not match config.json: missing lm_head.weight, model.norm.weight; unexpected extra$",
    ),
    "shape": (
        ["model", "out"],
        change_tensors(**{"model.norm.weight": np.ones(47, ml_dtypes.bfloat16)}),
        1,
        r"model.norm.weight has shape \[47\], config.json means \[48\]$",
    ),
    "nan": (
        ["model", "out"],
        change_tensors(**{"model.layers.2.mlp.down_proj.weight": NAN}),
        1,
        "tensor model.layers.2.mlp.down_proj.weight has NaN or Inf weights$",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_one_line_and_leaves_nothing(model: Path, capsys: Capture, name: str) -> None:
    arguments, damage, status, message = REFUSED[name]
    damage(model)
    before = sorted(model.parent.rglob("*"))
    assert main(arguments) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gluprune: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert re.search(message, err.strip()), err
    assert sorted(model.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments", [[], ["model"], ["model", "out", "--dtype", "int8"], ["model", "out", "--form", "hf"]]
)
def test_a_wrong_command_line_is_refused(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_a_damaged_model_costs_no_model_that_is_there(model: Path) -> None:
    assert main(["model", "out"]) == 0
    os.truncate(model / "model.safetensors", 9000)
    assert main(["model", "out", "--overwrite"]) == 1
    assert_same_weights("out")
    assert sorted(os.listdir()) == ["model", "out"]


def test_a_full_disk_is_said_to_be_full(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """As the system says it: without a file name, in the middle of a file."""

    def full(file: Path, tensors: Any, values: Any, written: Any, ahead: bool) -> None:
        file.write_bytes(b"half")
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OperationError(f"cannot write {file}: {error.strerror}") from error

    monkeypatch.setattr("convert.huggingface.folder.write_tensors", full)
    assert main(["model", "out"]) == 1
    assert f"gluprune: error: cannot write {model.parent / 'out'}: the disk is full (" in capsys.readouterr().err
    assert os.listdir() == ["model"]


@pytest.mark.usefixtures("model")
def test_debug_shows_the_traceback() -> None:
    Path("model/config.json").write_text("[]")
    with pytest.raises(OperationError, match=r"config\.json is no model config"):
        main(["model", "out", "--debug"])


def test_foreign_names_cannot_write_to_the_terminal(model: Path, capsys: Capture) -> None:
    for name, status in (("a\n\x1b[31mb\udc80", 0), ("__a\n\x1b[31mb\udc80", 2)):  # accepted, and refused
        write_folder(model, CONFIG | {name: 1}, TENSORS)
        assert main(["model", "out", "--overwrite"]) == status
        err = capsys.readouterr().err
        assert r"a\n\x1b[31mb\udc80'" in err
        assert err.count("\n") == 1


@pytest.mark.usefixtures("model")
def test_a_model_that_was_pruned_before_gets_a_width_that_runtimes_take_well(capsys: Capture) -> None:
    assert main(["model", "padded", "--pad-to", "32"]) == 0
    config = json.loads(Path("padded/config.json").read_text())
    assert (config["intermediate_size"], config["gluprune"]) == (96, {"intermediate_sizes": [80] * 3})
    assert main(["padded", "again"]) == 0
    assert_same_weights("again")
    assert main(["model", "orbax", "--format", "orbax", "--pad-to", "32"]) == 2
    assert "--pad-to 32 has no effect with --format orbax" in capsys.readouterr().err
