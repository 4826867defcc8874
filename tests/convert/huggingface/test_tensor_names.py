"""Tensors under other names than a Llama model's own: found whatever they are called, or refused in one sentence."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from llama_tensors import model_arrays
from safetensors.numpy import load_file, save_file
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.checkpoint import Checkpoint
from gluprune_jax.errors import GlupruneError, OperationError, RequestError
from gluprune_jax.parallel.mesh import MeshShape, make_mesh

Tensors = Mapping[str, np.ndarray]

CONFIGS = {tied: hf_config(num_hidden_layers=2, tie_word_embeddings=tied) for tied in (False, True)}
WEIGHTS = {tied: hf_tensors(CONFIGS[tied]) for tied in (False, True)}
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def before(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def only(name: str, other: str) -> Callable[[str], str]:
    return lambda found: other if found == name else found


# Names in a file by our own, what is said about it, and whether transformers 5 loads the same.
SPELLINGS: dict[str, tuple[Callable[[str], str], str, bool]] = {
    "torch.compile": (before("_orig_mod."), "'_orig_mod.' was dropped from the names of", False),
    "DDP": (before("module."), "'module.' was dropped from the names of", False),
    "both": (before("_orig_mod.module."), "'_orig_mod.', 'module.' was dropped from the names of", False),
    "a compiled layer": (
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
        "'_orig_mod.' was dropped from the names of 9 tensors",
        False,
    ),
    "FSDP": (
        lambda name: "_fsdp_wrapped_module." + name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
        "'_checkpoint_wrapped_module.', '_fsdp_wrapped_module.' was dropped from the names of",
        False,
    ),
    "peft": (before("base_model.model."), "'base_model.model.' was dropped from the names of", False),
    "inside another model": (before("language_model."), "'language_model.' was dropped from the names of", False),
    "inside another base model": (
        lambda name: name.replace("model.", "model.language_model.", 1),
        "'model.language_model.' was dropped from the names of 20 tensors",
        False,
    ),
    "any prefix": (before("student.net."), "'student.net.' was dropped from the names of", False),
    "base model alone": (lambda name: name.removeprefix("model."), "'model.' was put before the names of 20", True),
    "one tensor": (only(NORM, "norm.weight"), "'model.' was put before the names of 1 tensors", True),
    "base model twice": (before("model."), "'model.' was dropped from the names of 20 tensors", True),
    "head in the base model": (only(HEAD, "model.lm_head.weight"), "", True),
}
# The tied pair under the name that safetensors.torch.save_model keeps, the first in the alphabet.
TIED_SPELLINGS: dict[str, tuple[Callable[[str], str], str, bool]] = {
    "head": (only(EMBEDDING, HEAD), "lm_head.weight was read as the embedding that it is tied to", True),
    "compiled head": (
        lambda name: "_orig_mod." + only(EMBEDDING, HEAD)(name),
        "_orig_mod.lm_head.weight was read as the embedding that it is tied to",
        False,
    ),
    "head of a base model alone": (
        lambda name: only(EMBEDDING, HEAD)(name).removeprefix("model."),
        "lm_head.weight was read as the embedding that it is tied to",
        True,
    ),
}
CASES = [
    *((False, name, *case) for name, case in SPELLINGS.items()),
    *((True, name, *case) for name, case in (SPELLINGS | TIED_SPELLINGS).items()),
]
IDS = [f"{name}, {'tied' if tied else 'untied'}" for tied, name, *_ in CASES]


def assert_holds(checkpoint: Checkpoint, weights: Tensors) -> None:
    """The bits of a Hugging Face folder, in our shapes."""
    for name, array in model_arrays(checkpoint.model):
        assert np.asarray(array).tobytes() == weights[name.hf].tobytes(), name.hf


def spelled(folder: Path, tied: bool, spelling: Callable[[str], str], shards: int = 1) -> Path:
    tensors = {spelling(name): tensor for name, tensor in WEIGHTS[tied].items()}
    return write_folder(folder, CONFIGS[tied], tensors, shards)


@pytest.mark.parametrize(("tied", "name", "spelling", "note", "exact"), CASES, ids=IDS)
def test_every_path_reads_other_names_alike(
    tmp_path: Path, tied: bool, name: str, spelling: Callable[[str], str], note: str, exact: bool
) -> None:
    folder = spelled(tmp_path / "in", tied, spelling, shards=1 + len(name) % 2)
    streamed = convert.load(folder, stream=True)
    assert any(note in said for said in streamed.notes)
    assert all(len(said) <= 500 for said in streamed.notes[1:])
    convert.save(streamed, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: array.tobytes() for name, array in written.items()} == {
        name: array.tobytes() for name, array in WEIGHTS[tied].items()
    }
    assert_holds(convert.load(folder), WEIGHTS[tied])
    on_mesh = convert.load(folder, mesh=lambda _: make_mesh(MeshShape(1, 2), 2, devices=jax.devices()[:2]))
    assert_holds(on_mesh, WEIGHTS[tied])


@pytest.mark.torch
@pytest.mark.parametrize(("tied", "name", "spelling", "note", "exact"), CASES, ids=IDS)
def test_what_transformers_loads_of_it(
    tmp_path: Path, tied: bool, name: str, spelling: Callable[[str], str], note: str, exact: bool
) -> None:
    """What it does not load has random weights there, which is why we say what was dropped."""
    from transformers import AutoModelForCausalLM

    folder = spelled(tmp_path, tied, spelling)
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert (not loading["missing_keys"]) == (exact or all(spelling(hf) == hf for hf in WEIGHTS[tied]))
    if exact:
        state = model.state_dict()
        for hf, array in WEIGHTS[tied].items():
            assert state[hf].numpy().tobytes() == array.tobytes(), hf


# --------------------------------------------------------------------------------------------------------- indexes


def with_index(folder: Path, edit: Callable[[Path, dict[str, Any]], Any], more: Tensors | None = None) -> Path:
    """Two files, of which the second holds `more`; what stands in their index is edited."""
    write_folder(folder, CONFIGS[True], WEIGHTS[True], shards=2)
    save_file(load_file(folder / SECOND) | dict(more or {}), folder / SECOND, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    edit(folder, index)
    (folder / INDEX).write_text(json.dumps(index))
    return folder


BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float64),
    "model.rotary_emb.original_inv_freq": np.ones(4, ml_dtypes.bfloat16),
}
INDEXES: dict[str, tuple[Callable[[Path, dict[str, Any]], Any], Tensors, str]] = {
    "buffers it does not list": (lambda folder, index: None, BUFFERS, "3 rotary_emb.inv_freq tensors were left out"),
    "buffers that no file has": (
        lambda folder, index: index["weight_map"].update(dict.fromkeys(BUFFERS, SECOND)),
        {},
        "accepted without effect",
    ),
    "a weight it does not list": (
        lambda folder, index: index["weight_map"].pop(NORM),
        {},
        f"{INDEX} does not list {NORM} of its files: read, as in transformers 5",
    ),
    "a weight that no file has": (
        lambda folder, index: index["weight_map"].update({"model.layers.7.extra": FIRST}),
        {},
        f"{INDEX} lists model.layers.7.extra, which its files do not hold",
    ),
    "the wrong file": (lambda folder, index: index["weight_map"].update({NORM: FIRST}), {}, "accepted without effect"),
    "a wrong size": (lambda folder, index: index["metadata"].update(total_size=1), {}, "accepted without effect"),
    "no metadata": (lambda folder, index: index.pop("metadata"), {}, "accepted without effect"),
    "a tensor twice": (
        lambda folder, index: None,
        {EMBEDDING: WEIGHTS[True][EMBEDDING]},
        "accepted without effect",
    ),
    "a folder below": (
        lambda folder, index: (
            (folder / "parts").mkdir(),
            (folder / FIRST).rename(folder / "parts" / FIRST),
            index.update(weight_map={k: v if v == SECOND else f"parts/{v}" for k, v in index["weight_map"].items()}),
        ),
        {},
        "accepted without effect",
    ),
}


@pytest.mark.parametrize("name", INDEXES)
def test_what_the_files_hold_decides_not_their_index(tmp_path: Path, name: str) -> None:
    edit, more, note = INDEXES[name]
    checkpoint = convert.load(with_index(tmp_path, edit, more))
    assert any(note in said for said in checkpoint.notes)
    assert_holds(checkpoint, WEIGHTS[True])


@pytest.mark.torch
@pytest.mark.parametrize("name", sorted(set(INDEXES) - {"no metadata"}))
def test_transformers_reads_these_indexes_so(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    edit, more, _ = INDEXES[name]
    folder = with_index(tmp_path, edit, more)
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not loading["missing_keys"]
    state = model.state_dict()
    for hf, array in WEIGHTS[True].items():
        assert state[hf].numpy().tobytes() == array.tobytes(), hf


# -------------------------------------------------------------------------------------------------------- refusals


def rename(spelling: Callable[[str], str], **more: np.ndarray) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        tensors = {spelling(name): tensor for name, tensor in WEIGHTS[False].items()}
        write_folder(folder, CONFIGS[False], tensors | more)

    return write


def add(tensors: Tensors) -> Callable[[Path], Any]:
    return lambda folder: write_folder(folder, CONFIGS[False], WEIGHTS[False] | dict(tensors))


def instead(*files: str, config: bool = True) -> Callable[[Path], Any]:
    """Empty files in place of the weights."""

    def write(folder: Path) -> None:
        write_folder(folder, CONFIGS[False], WEIGHTS[False])
        (folder / "model.safetensors").unlink()
        if not config:
            (folder / "config.json").unlink()
        for file in files:
            (folder / file).write_text("{}")

    return write


def quantised(kind: str) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        tensors = dict(WEIGHTS[False])
        for name in [name for name in tensors if ".mlp." in name]:
            del tensors[name]
            stem = name.removesuffix(".weight")
            tensors |= {
                "gptq": {f"{stem}.{part}": np.ones(4, np.int32) for part in ("qweight", "qzeros", "g_idx")},
                "bnb": {
                    f"{stem}.weight": np.ones(4, np.uint8),
                    f"{stem}.weight.absmax": np.ones(1, np.float32),
                    f"{stem}.weight.quant_state.bitsandbytes__nf4": np.ones(4, np.uint8),
                },
                "fp8": {
                    f"{stem}.weight": np.ones(4, ml_dtypes.float8_e4m3fn),
                    f"{stem}.weight_scale": np.ones(1, np.float32),
                },
            }[kind]
        write_folder(folder, CONFIGS[False], tensors)

    return write


ONES = np.ones(48, np.float32)
REFUSED: dict[str, tuple[Callable[[Path], Any], type[GlupruneError], str]] = {
    "a tensor under two names": (
        add({"norm.weight": ONES}),
        OperationError,
        r"model\.norm\.weight, norm\.weight are two tensors for model\.norm\.weight; accepted: one$",
    ),
    "two models": (
        lambda folder: write_folder(
            folder, CONFIGS[False], {who + name: t for who in ("a.", "b.") for name, t in WEIGHTS[False].items()}
        ),
        OperationError,
        r"names of tensors have 2 different prefixes, 'a\.', 'b\.'; accepted: one model$",
    ),
    "the head of another model": (
        rename(only(HEAD, "draft.lm_head.weight")),
        OperationError,
        r"missing lm_head\.weight .*; unexpected draft\.lm_head\.weight$",
    ),
    "names that mean nothing": (
        lambda folder: write_folder(
            folder,
            CONFIGS[False],
            {f"gpt_neox.layers.{i}.attention.query_key_value.weight": ONES for i in range(300)},
        ),
        OperationError,
        r"none of its 300 tensors has a name that is understood \(gpt_neox\.layers\.0\..* and 29\d more\); all begin "
        r"with 'gpt_neox\.layers\.'; accepted: the names of transformers, such as model\.embed_tokens\.weight$",
    ),
    "no tensors": (
        lambda folder: write_folder(folder, CONFIGS[False], {}),
        OperationError,
        r"none of its 0 tensors has a name that is understood; accepted: the names of transformers",
    ),
    "an adapter that is not merged": (
        rename(
            lambda name: name.replace("q_proj.", "q_proj.base_layer."),
            **{"model.layers.0.self_attn.q_proj.lora_A.default.weight": ONES},
        ),
        RequestError,
        r": 3 of 22 tensors belong to an adapter \(.*base_layer.*\); merge it into the model first, with ",
    ),
    "GPTQ": (
        quantised("gptq"),
        RequestError,
        r": 18 of \d+ tensors belong to quantised weights \(.*; give the model that",
    ),
    "bitsandbytes": (quantised("bnb"), RequestError, r": 12 of \d+ tensors belong to quantised weights \("),
    "FP8": (quantised("fp8"), RequestError, r": 6 of \d+ tensors belong to quantised weights \("),
    "an adapter's folder": (
        instead("adapter_config.json", "adapter_model.safetensors", config=False),
        RequestError,
        r"has adapter_config\.json: it is an adapter to a model.*merge it first, with merge_and_unload of peft",
    ),
    "an adapter beside the model": (
        lambda folder: (instead("adapter_config.json")(folder), add({})(folder)),
        RequestError,
        r"has adapter_config\.json: .* or one that transformers would add to the model here; merge it first",
    ),
    "an adapter without its config": (
        instead("adapter_model.safetensors"),
        RequestError,
        r"\(it has adapter_model\.safetensors, which are not read\); merge the adapter into its model first",
    ),
    "pickles": (
        instead("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
        RequestError,
        r"\(it has .*bin, which are not read\); pickles are never read: load the model with transformers and save it",
    ),
    "Mistral's own file alone": (
        instead("consolidated.safetensors"),
        RequestError,
        r"has no model\.safetensors and no .*index\.json \(it has consolidated\.safetensors, which are not read\)$",
    ),
    "a hundred files": (
        instead(*(f"part-{i}.safetensors" for i in range(100))),
        RequestError,
        r"\(it has part-0\.safetensors, .* and \d\d more, which are not read\)$",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_in_one_short_sentence(tmp_path: Path, name: str) -> None:
    write, kind, message = REFUSED[name]
    write(tmp_path)
    for load in (convert.load, convert.describe, lambda folder: convert.load(folder, stream=True)):
        with pytest.raises(kind, match=message) as caught:
            load(tmp_path)
        assert str(caught.value).startswith(str(tmp_path))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) <= 500


def test_weights_a_second_time_under_mistrals_names_are_not_read(tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIGS[False], WEIGHTS[False])
    save_file({"tok_embeddings.weight": ONES}, tmp_path / "consolidated.safetensors")
    os.truncate(tmp_path / "consolidated.safetensors", 20)
    assert_holds(convert.load(tmp_path), WEIGHTS[False])
