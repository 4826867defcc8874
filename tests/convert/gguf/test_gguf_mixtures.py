"""GGUF files of mixtures of experts: read, written and pruned, and refused where llama.cpp computes something else."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import gguf_mixtures
import ml_dtypes
import numpy as np
import pytest
from commands import report, run
from gguf import GGMLQuantizationType as GGMLType
from gguf_files import write_gguf
from gguf_mixtures import SMALL, stacked
from merging_tokenizer import VOCABULARY, write_tiny
from numpy.typing import NDArray
from tiny_mixtures import CONFIGS, tensors_of, write_mixture

import convert
from convert.__main__ import main
from convert.families.mixtures import MIXTURES
from convert.gguf.export import GGUFOptions
from convert.gguf.file import read_header
from convert.huggingface.safetensors import index_folder, read_tensor
from gluprune_jax import PruningPlan, make_plan
from gluprune_jax.errors import GlupruneError, OperationError, RequestError
from gluprune_jax.prune import main as prune
from gluprune_jax.pruning.scores import score_mixture

Capture = pytest.CaptureFixture[str]
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def opened(path: Path, **options: Any) -> convert.MixtureCheckpoint:
    checkpoint = convert.open_mixture(path, **options)
    assert checkpoint is not None
    return checkpoint


def export(checkpoint: convert.MixtureCheckpoint, path: Path, gguf_type: str | None = None) -> Path:
    convert.save(checkpoint, path, formats=["gguf"], gguf=GGUFOptions(gguf_type), overwrite=True)
    return path


def tensors_in(path: Path) -> dict[str, tuple[str, NDArray[Any]]]:
    """Type and values of each tensor of a GGUF file, as the `gguf` package reads them."""
    return {
        tensor.name: (tensor.tensor_type.name, gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(path).tensors
    }


def pruned(checkpoint: convert.MixtureCheckpoint, width: int) -> convert.MixtureCheckpoint:
    return checkpoint.pruned(make_plan(score_mixture(checkpoint.mlp_weights(), checkpoint.sizes, "ppm"), width=width))


def test_every_family_is_here() -> None:
    assert {config["model_type"] for config in SMALL.values()} == MIXTURES.keys() == gguf_mixtures.ARCHITECTURES.keys()


# ---------------------------------------------------------------------------------------------- as the converter writes


@pytest.mark.parametrize("name", SMALL)
def test_a_file_of_the_converter_is_read_and_written_again(name: str, tmp_path: Path) -> None:
    config = SMALL[name]
    tensors = tensors_of(config)
    path = gguf_mixtures.write(tmp_path / "theirs.gguf", config, tensors)
    checkpoint = opened(path)
    assert checkpoint.sizes == opened(write_mixture(tmp_path / "hf", config)).sizes
    assert checkpoint.tensors().keys() == tensors.keys()
    for tensor, values in tensors.items():
        np.testing.assert_array_equal(checkpoint.values(tensor), values, err_msg=tensor)
    ours = export(checkpoint, tmp_path / "ours.gguf")
    theirs, found = read_header(path).fields, read_header(ours).fields
    assert {key: found[key] for key in theirs} == {key: theirs[key] for key in found if key in theirs}
    expected = stacked(config, tensors)
    written = tensors_in(ours)
    assert written.keys() == expected.keys()
    for tensor, (kind, values) in written.items():
        assert kind == "F32"
        np.testing.assert_array_equal(values, expected[tensor], err_msg=tensor)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", SMALL)
def test_there_and_back_is_the_same_to_the_bit(name: str, kind: str, tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "hf", SMALL[name], tensors_of(SMALL[name], dtype=DTYPES[kind]))
    first = export(opened(folder), tmp_path / "a" / "model.gguf")
    again = export(opened(first), tmp_path / "b" / "model.gguf")
    kept = {key: value for key, value in read_header(first).fields.items() if key != "general.name"}
    assert {key: value for key, value in read_header(again).fields.items() if key != "general.name"} == kept
    a, b = gguf.GGUFReader(first), gguf.GGUFReader(again)
    assert [(one.name, one.tensor_type) for one in a.tensors] == [(one.name, one.tensor_type) for one in b.tensors]
    for one, other in zip(a.tensors, b.tensors, strict=True):
        assert one.data.tobytes() == other.data.tobytes(), one.name
        plain = len(one.shape) == 1 or one.name.endswith("ffn_gate_inp.weight")
        assert one.tensor_type.name == ("F32" if plain else kind), one.name
    convert.save(opened(first), tmp_path / "back")
    stored = index_folder(tmp_path / "back")
    for tensor, values in tensors_of(SMALL[name], dtype=DTYPES[kind]).items():
        found = read_tensor(stored[tensor])
        np.testing.assert_array_equal(found.astype(np.float32), values.astype(np.float32), err_msg=tensor)
        assert found.dtype == (np.float32 if "norm" in tensor or tensor.endswith("gate.weight") else values.dtype)


def test_experts_of_several_dtypes_are_stored_in_one_that_holds_them(tmp_path: Path) -> None:
    config = SMALL["olmoe"]
    tensors = tensors_of(config)
    narrow = "model.layers.1.mlp.experts.2.up_proj.weight"
    mixed = {name: values.astype(np.float16) if name == narrow else values for name, values in tensors.items()}
    path = export(opened(write_mixture(tmp_path / "hf", config, mixed)), tmp_path / "out.gguf")
    np.testing.assert_array_equal(opened(path).values(narrow), mixed[narrow].astype(np.float32))
    kinds = {name: kind for name, (kind, _) in tensors_in(path).items()}
    assert set(kinds.values()) == {"F32"}


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_q8_0(name: str, tmp_path: Path) -> None:
    """Of rows that 32 does not divide, F16; the router stays float32."""
    width = "moe_intermediate_size" if name == "qwen3_moe" else "intermediate_size"
    config = SMALL[name] | {width: 40}
    tensors = tensors_of(config)
    path = tmp_path / "out.gguf"
    checkpoint = opened(write_mixture(tmp_path / "hf", config))
    notes = convert.save(checkpoint, path, formats=["gguf"], gguf=GGUFOptions("Q8_0"))
    assert "3 of " in notes[0]
    assert notes[0].endswith("matrices are F16, as 32 does not divide their rows")
    found, expected = tensors_in(path), stacked(config, tensors)
    for tensor, (kind, values) in found.items():
        plain = values.ndim == 1 or "gate_inp" in tensor
        assert kind == ("F32" if plain else "F16" if "ffn_down" in tensor else "Q8_0")
        wanted = expected[tensor]
        if kind == "Q8_0":
            wanted = gguf.dequantize(gguf.quantize(wanted, GGMLType.Q8_0), GGMLType.Q8_0)
        np.testing.assert_allclose(values, wanted, rtol=1e-3 if kind == "F16" else 0, atol=1e-6, err_msg=tensor)
    again = opened(path)
    assert {dtype.name for dtype, _ in again.tensors().values()} == {"float32", "float16"}
    gate = checkpoint.config.mlps[-1][0]
    np.testing.assert_array_equal(again.values(gate), found["blk.2.ffn_gate_exps.weight"][1][-1])
    assert opened(path, dtype="bfloat16").values(gate).dtype == ml_dtypes.bfloat16


def test_a_window_of_mixtral_is_kept_and_said_not_to_be_applied(tmp_path: Path) -> None:
    checkpoint = opened(write_mixture(tmp_path / "hf", CONFIGS["mixtral"]))
    notes = convert.save(checkpoint, tmp_path / "out.gguf", formats=["gguf"])
    assert "llama.cpp does not apply the window of 8 tokens in its architecture 'llama'" in notes[0]
    assert opened(tmp_path / "out.gguf").config.data["sliding_window"] == 8


# -------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob = None"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers or decoder_sparse_step \(layer 1 has no experts\)"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias = True"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window = True"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("olmoe", {"clip_qkv": 0.7}, "clip_qkv = 0.7"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob = True"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads = 2 for 4 heads"),
        ("olmoe", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        (
            "mixtral",
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "attention",
        ),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused_by_name(
    name: str, changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    checkpoint = opened(write_mixture(tmp_path / "hf", SMALL[name] | changes))
    architecture = gguf_mixtures.ARCHITECTURES[name]
    with pytest.raises(RequestError, match=rf"architecture '{architecture}' cannot express {field} of this model; wri"):
        export(checkpoint, tmp_path / "out.gguf")
    assert os.listdir(tmp_path) == ["hf"]


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("qwen3_moe", {"expert_weights_norm": False}, RequestError, r"expert_weights_norm is False; accepted: True"),
        ("olmoe", {"expert_weights_norm": True}, RequestError, r"expert_weights_norm is True; accepted: False"),
        ("mixtral", {"expert_weights_scale": 2.5}, RequestError, r"expert_weights_scale is 2\.5; accepted: 0\.0 or 1"),
        ("mixtral", {"expert_gating_func": 2}, RequestError, r"llama\.expert_gating_func is 2; accepted: 1"),
        ("mixtral", {"expert_shared_count": 1}, RequestError, r"llama\.expert_shared_count is 1; accepted: 0"),
        ("mixtral", {"expert_group_count": 4}, RequestError, r"expert_group_count is 4, and this key is not supported"),
        ("olmoe", {"expert_feed_forward_length": 48}, RequestError, r"expert_feed_forward_length is 48, and this key"),
        ("qwen3_moe", {"expert_feed_forward_length": None}, OperationError, r"expert_feed_forward_length is missing"),
        ("olmoe", {"expert_count": None}, OperationError, r"olmoe\.expert_count is missing"),
        ("mixtral", {"expert_used_count": None}, OperationError, r"expert_used_count is missing"),
        ("mixtral", {"expert_count": 5}, OperationError, r"of a wrong shape: blk\.0\.ffn_gate_inp\.weight \(6, 32\)"),
        ("olmoe", {"feed_forward_length": [48, 40, 48]}, RequestError, r"feed_forward_length differs between layers"),
    ],
)
def test_files_that_say_something_else(
    name: str, changes: dict[str, Any], error: type[GlupruneError], message: str, tmp_path: Path
) -> None:
    path = gguf_mixtures.write(tmp_path / "model.gguf", SMALL[name], tensors_of(SMALL[name]), **changes)
    with pytest.raises(error, match=rf"^{path}: .*{message}"):
        convert.open_mixture(path)


def test_tensors_that_are_missing_or_damaged(tmp_path: Path) -> None:
    config = SMALL["qwen3_moe"]
    tensors = tensors_of(config)
    some = {name: values for name, values in tensors.items() if ".1.mlp.experts." not in name or "up_proj" not in name}
    path = gguf_mixtures.write(tmp_path / "missing.gguf", config, some)
    with pytest.raises(OperationError, match=r"do not fit the config; missing: blk\.1\.ffn_up_exps\.weight$"):
        convert.open_mixture(path)
    tensors["model.layers.2.mlp.experts.4.down_proj.weight"][3, 4] = np.nan
    checkpoint = opened(gguf_mixtures.write(tmp_path / "nan.gguf", config, tensors))
    with pytest.raises(OperationError, match=r"nan\.gguf: blk\.2\.ffn_down_exps\.weight holds values that are not fin"):
        export(checkpoint, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_more_experts_for_a_token_than_there_are(tmp_path: Path) -> None:
    checkpoint = opened(write_mixture(tmp_path / "hf", SMALL["mixtral"] | {"num_experts_per_tok": 7}))
    with pytest.raises(RequestError, match="has num_experts_per_tok = 7; it must be a whole number from 1 to 6"):
        export(checkpoint, tmp_path / "out.gguf")


def test_a_model_in_several_files(tmp_path: Path) -> None:
    config = SMALL["mixtral"]
    tensors = tensors_of(config)
    fields = {**gguf_mixtures.metadata(config), "tokenizer.ggml.model": "no_vocab"}
    write_gguf(tmp_path / "model.gguf", fields, stacked(config, tensors), split_after=8)
    first, *others = sorted(tmp_path.glob("*.gguf"))
    assert len(others) == 4
    checkpoint = opened(first)
    for tensor, values in tensors.items():
        np.testing.assert_array_equal(checkpoint.values(tensor), values, err_msg=tensor)
    others[-1].write_bytes(others[-1].read_bytes()[:-64])
    with pytest.raises(OperationError, match=f"{first}: file 5 of 5, {others[-1].name}: .*cut short"):
        convert.open_mixture(first)


def test_it_is_not_loaded_to_run(tmp_path: Path) -> None:
    path = gguf_mixtures.write(tmp_path / "model.gguf", SMALL["mixtral"], tensors_of(SMALL["mixtral"]))
    for load in (convert.load, convert.describe):
        with pytest.raises(RequestError, match=r"llama\.expert_count is 6: a mixture of experts \(Mixtral\), which is"):
            load(path)
    with pytest.raises(RequestError, match="`gguf_widths` uniform"):
        convert.save(opened(path), tmp_path / "out.gguf", formats=["gguf"], gguf=GGUFOptions(gguf_widths="per-layer"))


# ------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "mixtral"])
def test_pruning_a_file_gives_what_pruning_the_folder_gives(name: str, tmp_path: Path, capsys: Capture) -> None:
    folder = write_mixture(tmp_path / "hf", SMALL[name])
    path = export(opened(folder), tmp_path / "model.gguf")
    plans, reports = [], []
    for model, out in ((folder, "a"), (path, "b")):  # both stay in their files, also where that is asked for
        argv = ("--model", model, "--width", 16, "--format", "hf,gguf", "--output", tmp_path / out)
        assert run(prune, capsys, *argv, "--stream", "--dry-run")[0] == 0
        reports.append(report(prune, capsys, *argv))
        plans.append(PruningPlan.load(tmp_path / out / "gluprune_plan.json"))
    assert [kept.tolist() for kept in plans[0].kept] == [kept.tolist() for kept in plans[1].kept]
    first, second = (index_folder(tmp_path / out) for out in "ab")
    assert first.keys() == second.keys()
    for tensor in first:
        np.testing.assert_array_equal(read_tensor(first[tensor]), read_tensor(second[tensor]))
    ours, others = (tensors_in(tmp_path / out / "model.gguf") for out in "ab")
    assert ours.keys() == others.keys()
    for tensor, (kind, values) in ours.items():
        assert others[tensor][0] == kind
        np.testing.assert_array_equal(others[tensor][1], values)
    shape = ours["blk.1.ffn_gate_exps.weight"][1].shape
    assert shape == (6, 16, 32)
    for found in reports:
        nbytes = sum(-(-values.nbytes // 32) * 32 for _, values in ours.values())
        assert found["after"]["file_bytes"] == {"hf": nbytes, "gguf": nbytes}
        assert found["formats"] == ["hf", "gguf"]


def test_the_command_converts_both_ways(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = SMALL["mixtral"] | {"vocab_size": VOCABULARY}
    write_tiny(tmp_path / "dense")
    write_mixture(tmp_path / "hf", config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).write_bytes((tmp_path / "dense" / name).read_bytes())
    (tmp_path / "hf" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    found = report(main, capsys, "hf", "out.gguf")
    assert found["formats"] == ["gguf"]
    assert found["parameters"] == opened(tmp_path / "hf").sizes.num_parameters
    fields = read_header(tmp_path / "out.gguf").fields
    assert len(fields["tokenizer.ggml.tokens"]) == VOCABULARY
    assert (fields["general.license"], fields["general.name"], fields["general.file_type"]) == ("apache-2.0", "hf", 0)
    assert run(main, capsys, "out.gguf", "back")[0] == 0
    first, back = index_folder(tmp_path / "hf"), index_folder(tmp_path / "back")
    for tensor in first:
        np.testing.assert_array_equal(read_tensor(first[tensor]), read_tensor(back[tensor]))
    assert (tmp_path / "back" / "tokenizer.json").exists()
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    same = {key for key in config if key not in ("pad_token_id", "eos_token_id", "bos_token_id", "sliding_window")}
    assert {key: written[key] for key in same} == {key: config[key] for key in same}
    # What is pruned again knows where it comes from, also out of a folder that holds nothing but a GGUF file.
    assert run(prune, capsys, "--model", "out.gguf", "--width", 40, "--output", "p40", "--format", "gguf")[0] == 0
    assert sorted(path.name for path in Path("p40").glob("*.safetensors")) == []
    assert run(prune, capsys, "--model", "p40", "--width", 31, "--output", "p31.gguf")[0] == 0
    history = json.loads(read_header(tmp_path / "p31.gguf").fields["gluprune.history"])
    assert [record["request"]["width"] for record in history] == ["40", "31"]
    assert opened(tmp_path / "p31.gguf").sizes.intermediate_sizes == (31,) * 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--format", "orbax"), "--format orbax is written of dense models"),
        (("--format", "hf,orbax"), "--format orbax is written of dense models"),
        (("--pad-to", "8"), "--pad-to pads no experts"),
        (("--mesh", "data=1"), "--mesh cannot be given for"),
    ],
)
def test_what_the_command_does_not_do(argv: tuple[str, ...], message: str, tmp_path: Path, capsys: Capture) -> None:
    folder = write_mixture(tmp_path / "hf", SMALL["mixtral"])
    status, _, err = run(main, capsys, folder, tmp_path / "out", *argv)
    assert status == 2
    assert message in err
    assert os.listdir(tmp_path) == ["hf"]


def test_a_few_tensors_in_memory(tmp_path: Path) -> None:
    """A stack of experts, most of a layer, is written expert by expert."""
    config = SMALL["mixtral"] | {"hidden_size": 128, "intermediate_size": 256, "num_local_experts": 48}
    tensors = tensors_of(config)
    folder = write_mixture(tmp_path / "model", config, tensors)
    total = sum(values.nbytes for values in tensors.values())
    matrix = tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"].nbytes
    del tensors
    export(opened(folder), tmp_path / "warm.gguf")
    for source, out in ((folder, "a.gguf"), (tmp_path / "a.gguf", "b.gguf")):
        tracemalloc.start()
        try:
            export(opened(source), tmp_path / out)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < total / 8
        assert peak < 16 * matrix  # a stack is 48
