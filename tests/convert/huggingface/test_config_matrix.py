"""Every spelling of RoPE, as transformers 4 and 5 read it from what we are given and from what we write.

Where the two read one file differently, it is refused; that they do is tested as well, since docs/formats.md says so.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_models import LLAMA3_ROPE, hf_config, hf_tensors, write_folder

import convert
from convert.tokenizer import end_of_sequence_ids
from gluprune_jax.errors import RequestError

pytestmark = pytest.mark.torch

THETA, OTHER_THETA = 50000.0, 2000.0  # neither is the default, 10000
TOKENS = np.random.default_rng(3).integers(0, 97, (1, 40))
ROPES = {"default": None, "llama3": LLAMA3_ROPE}


def old(kind: str, theta: float = THETA) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_scaling": ROPES[kind]}


def new(kind: str, theta: float = THETA) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default"} | (ROPES[kind] or {})}


def bare(**keys: Any) -> dict[str, Any]:
    """The config without RoPE, and these keys."""
    return {key: value for key, value in hf_config().items() if not key.startswith("rope_")} | keys


READ = {
    f"{spelling} {kind}": bare(**keys)
    for kind in ROPES
    for spelling, keys in {"classic": old(kind), "flat": new(kind), "both": old(kind) | new(kind)}.items()
}
READ |= {f"no RoPE, {kind}": bare(rope_scaling=scaling) for kind, scaling in ROPES.items()}  # the base is 10000
READ |= {"other theta": bare(rope_theta=OTHER_THETA)}
WINDOW = "original_max_position_embeddings"
READ |= {"flat llama3 with 512": bare(**new("llama3"))}
READ["flat llama3 with 512"]["rope_parameters"][WINDOW] = 512  # which is max_position_embeddings
READ |= {"flat llama3 without": bare(**new("llama3"))}
del READ["flat llama3 without"]["rope_parameters"][WINDOW]

# What other people's files hold and no config class takes, and what one takes and does not compute with.
READ |= {
    "private": bare(
        **old("llama3"),
        _model_name_or_path="somebody/else",
        unk_token_id=0,
        auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
        architectures=["OwnForCausalLM"],
        rope_interleaved=True,
        logit_softcapping=30.0,
        vision_config={"hidden_size": 3},
        num_key_value_head=1,
        eos_token_id=[2, 97, 2**31 - 1],
        pad_token_id=-1,
        pretraining_tp=2,
        temperature=0.5,
        attention_dropout=0.5,
        layer_types=["full_attention"] * 3,
    )
}

# A config; the name of the one that transformers 5 reads it as, and of the one that transformers 4 does.
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "rope_scaling against default": (
        bare(**new("default", OTHER_THETA), **old("llama3")),
        "classic llama3",
        "classic llama3",
    ),
    "rope_scaling against llama3": (
        bare(**new("llama3", OTHER_THETA), rope_theta=THETA, rope_scaling={"rope_type": "default"}),
        "classic default",
        "classic default",
    ),
    "rope_scaling without a base": (
        bare(**new("llama3"), rope_scaling=LLAMA3_ROPE),
        "no RoPE, llama3",
        "no RoPE, llama3",
    ),
    "rope_theta against default": (
        bare(**new("default", OTHER_THETA), rope_theta=THETA),
        "other theta",
        "classic default",
    ),
    "rope_theta against llama3": (bare(**new("llama3"), rope_theta=THETA), "classic llama3", "classic default"),
    "rope_theta within rope_scaling": (
        bare(rope_theta=OTHER_THETA, rope_scaling={"rope_type": "default", "rope_theta": THETA}),
        "classic default",
        "other theta",
    ),
    "two types": (
        bare(rope_theta=THETA, rope_scaling=LLAMA3_ROPE | {"type": "default"}),
        "classic llama3",
        "classic default",
    ),
    "two windows": (bare(**old("llama3"), **{WINDOW: 512}), "flat llama3 with 512", "classic llama3"),
}

# Run by either transformers: the logits for each folder.
SCRIPT = """
import json, sys
import torch, transformers
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
tokens = torch.tensor(json.loads(sys.argv[1]))
answers = {}
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        answers[folder] = model(tokens).logits.tolist()
json.dump({"version": transformers.__version__, "logits": answers}, sys.stdout)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`in/NAME` and, as we write it, `out/NAME` for each config that we read; `refused/NAME` for the others."""
    folder = tmp_path_factory.mktemp("matrix")
    tensors = hf_tensors(hf_config())
    for name, config in READ.items():
        convert.save(convert.load(write_folder(folder / "in" / name, config, tensors)), folder / "out" / name)
    for name, (config, _, _) in REFUSED.items():
        write_folder(folder / "refused" / name, config, tensors)
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> dict[str, np.ndarray]:
    models = {name: convert.load(folder / "in" / name).model for name in READ}
    return {name: np.asarray(model.logits(model(jax.numpy.asarray(TOKENS))[0])) for name, model in models.items()}


def read_by(python: str, major: int, folder: Path) -> dict[str, np.ndarray]:
    """Logits of every folder there is, by the `transformers` of an interpreter, in one process."""
    folders = [str(path.parent.relative_to(folder)) for path in sorted(folder.glob("*/*/config.json"))]
    command = [python, "-c", SCRIPT, json.dumps(TOKENS.tolist()), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    if int(answer["version"].split(".")[0]) != major:
        pytest.skip(f"transformers of {python} is {answer['version']}")
    return {name: np.array(logits, np.float32) for name, logits in answer["logits"].items()}


@pytest.fixture(scope="module")
def by_5(folder: Path) -> dict[str, np.ndarray]:
    return read_by(sys.executable, 5, folder)


@pytest.fixture(scope="module")
def by_4(folder: Path) -> dict[str, np.ndarray]:
    python = os.environ.get("GLUPRUNE_TRANSFORMERS4_PYTHON")
    if not python:
        pytest.skip("GLUPRUNE_TRANSFORMERS4_PYTHON names no Python with transformers 4")
    return read_by(python, 4, folder)


def assert_close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


def test_the_configs_of_the_matrix_mean_different_things(ours: dict[str, np.ndarray]) -> None:
    """Else the comparisons below would say nothing."""
    names = ["classic default", "classic llama3", "flat llama3 with 512", "no RoPE, default", "no RoPE, llama3"]
    for one, other in itertools.combinations([*names, "other theta"], 2):
        assert np.abs(ours[one] - ours[other]).max() > 0.01, (one, other)
    for kind in ROPES:
        for spelling in ("flat", "both"):
            np.testing.assert_array_equal(ours[f"{spelling} {kind}"], ours[f"classic {kind}"])
    np.testing.assert_array_equal(ours["private"], ours["classic llama3"])


def test_what_is_accepted_without_effect_is_one_short_note(folder: Path) -> None:
    (note,) = (note for note in convert.load(folder / "in" / "private").notes if "without effect" in note)
    for name in ("_model_name_or_path", "unk_token_id", "auto_map", "num_key_value_head"):
        assert name in note
    assert len(note) <= 500
    assert "\n" not in note


def test_what_no_config_class_takes_stands_in_what_we_write(folder: Path) -> None:
    written = json.loads((folder / "out" / "private" / "config.json").read_text())
    kept = READ["private"].keys() - {"auto_map", "architectures", "layer_types"}
    assert {key: written[key] for key in kept} == {key: READ["private"][key] for key in kept}
    assert "auto_map" not in written


def test_ids_beyond_the_vocabulary_end_nothing(folder: Path) -> None:
    assert end_of_sequence_ids(convert.load(folder / "in" / "private")) == [2]


@pytest.mark.parametrize("name", READ)
def test_transformers_5_reads_what_we_read_and_write_as_we_do(
    name: str, ours: dict[str, np.ndarray], by_5: dict[str, np.ndarray]
) -> None:
    assert_close(by_5[f"in/{name}"], ours[name])
    assert_close(by_5[f"out/{name}"], ours[name])


@pytest.mark.parametrize("name", READ)
def test_transformers_4_reads_what_we_write_as_we_do(
    name: str, ours: dict[str, np.ndarray], by_4: dict[str, np.ndarray]
) -> None:
    assert_close(by_4[f"out/{name}"], ours[name])
    # What it was given it reads likewise, or, where only the new keys are there, as if there were none.
    assert_close(by_4[f"in/{name}"], ours["no RoPE, default" if name.startswith("flat") else name])


@pytest.mark.parametrize("name", REFUSED)
def test_what_says_two_things_about_rope_is_refused(name: str, folder: Path) -> None:
    with pytest.raises(RequestError, match=r"config\.json"):
        convert.load(folder / "refused" / name)


@pytest.mark.parametrize("name", REFUSED)
def test_transformers_5_reads_it_as_the_table_says(name: str, by_5: dict[str, np.ndarray]) -> None:
    _, five, _ = REFUSED[name]
    assert_close(by_5[f"refused/{name}"], by_5[f"in/{five}"])


@pytest.mark.parametrize("name", REFUSED)
def test_transformers_4_reads_it_as_the_table_says(name: str, by_4: dict[str, np.ndarray]) -> None:
    _, _, four = REFUSED[name]
    assert_close(by_4[f"refused/{name}"], by_4[f"out/{four}"])
