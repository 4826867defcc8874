"""GGUF output: every family bit for bit, types, widths that differ, what llama.cpp cannot express."""

import pathlib
from typing import Any

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType
from gguf_families import SMALL, WIDTHS, random_checkpoint, write
from gguf_files import write_gguf as write_by_package
from tiny_families import CONFIGS

from convert.checkpoint import Checkpoint
from convert.gguf.reader import read_gguf
from convert.gguf.writer import GGUFPlan, plan_gguf, write_gguf
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.models.parameters import parameters_of


def export(checkpoint: Checkpoint, path: pathlib.Path, **options: Any) -> GGUFPlan:
    plan = plan_gguf(checkpoint, **options)
    write_gguf(checkpoint, plan, path)
    return plan


def stored(path: pathlib.Path) -> dict[str, tuple[GGMLType, tuple[int, ...], bytes]]:
    """The tensors of a file as the `gguf` package reads them."""
    return {
        tensor.name: (tensor.tensor_type, tuple(map(int, tensor.shape)), tensor.data.tobytes())
        for tensor in gguf.GGUFReader(path).tensors
    }


def assert_same_model(first: Checkpoint, second: Checkpoint) -> None:
    assert first.config == second.config
    others = parameters_of(second.model)
    for name, array in parameters_of(first.model).items():
        assert (array.dtype, array.shape) == (others[name].dtype, others[name].shape), name
        assert np.asarray(array).tobytes() == np.asarray(others[name]).tobytes(), name


# ------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", [name for name in SMALL if name != "smollm3 with biases"])
def test_what_was_read_is_written_bit_for_bit(tmp_path: pathlib.Path, name: str) -> None:
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16)
    path, _ = write(tmp_path, SMALL[name], dtypes[list(SMALL).index(name) % 3])
    checkpoint = read_gguf(path)
    export(checkpoint, tmp_path / "again.gguf")
    assert stored(tmp_path / "again.gguf") == stored(path)
    again = read_gguf(tmp_path / "again.gguf")
    assert again.hf_config["model_type"] == checkpoint.hf_config["model_type"]
    assert_same_model(again, checkpoint)


def test_the_divisors_of_llama_3_are_those_of_the_converter(tmp_path: pathlib.Path) -> None:
    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    config = {**SMALL["llama"], "rope_theta": 500000.0, "rope_scaling": rope}
    checkpoint = random_checkpoint(config)
    export(checkpoint, tmp_path / "model.gguf")
    divisors = np.frombuffer(stored(tmp_path / "model.gguf")["rope_freqs.weight"][2], np.float32)
    # Wavelengths up to 2,048 tokens are left, from 8,192 on divided by 32.
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(8) / 8)
    assert (divisors[wavelengths < 2048] == 1).all()
    assert (divisors[wavelengths > 8192] == 32).all()
    between = [w for w in wavelengths if 2048 < w < 8192]
    smooth = (8192 / between[0] - 1) / 3
    np.testing.assert_allclose(divisors[wavelengths == between[0]], 1 / ((1 - smooth) / 32 + smooth), rtol=1e-6)
    assert read_gguf(tmp_path / "model.gguf").config == checkpoint.config


# ---------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_types(tmp_path: pathlib.Path, kind: str) -> None:
    checkpoint = random_checkpoint(SMALL["qwen2"])
    export(checkpoint, tmp_path / "model.gguf", gguf_type=kind)
    for name, (found, shape, _) in stored(tmp_path / "model.gguf").items():
        assert found.name == ("F32" if len(shape) == 1 else kind), name
    dtype = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}[kind]
    again = read_gguf(tmp_path / "model.gguf")
    gate = checkpoint.model.layers[2].mlp.gate_proj.get_value()
    np.testing.assert_array_equal(again.model.layers[2].mlp.gate_proj.get_value(), gate.astype(dtype))


def test_q8_0_falls_back_to_f16_where_rows_are_no_whole_blocks(tmp_path: pathlib.Path) -> None:
    checkpoint = random_checkpoint(SMALL["llama"] | {"intermediate_size": 90})
    plan = export(checkpoint, tmp_path / "model.gguf", gguf_type="Q8_0")
    kinds = {name: kind.name for name, (kind, shape, _) in stored(tmp_path / "model.gguf").items() if len(shape) > 1}
    assert {kind for name, kind in kinds.items() if "ffn_down" in name} == {"F16"}
    assert {kind for name, kind in kinds.items() if "ffn_down" not in name} == {"Q8_0"}
    assert plan.notes == ("4 of 30 matrices are F16, as 32 does not divide their rows",)
    assert (plan.fields["general.file_type"], plan.fields["general.quantization_version"]) == (7, 2)
    again, gate = read_gguf(tmp_path / "model.gguf"), checkpoint.model.layers[0].mlp.gate_proj.get_value()
    blocks = np.abs(np.asarray(gate)).reshape(90, 2, 32).max(-1)
    error = np.abs(np.asarray(again.model.layers[0].mlp.gate_proj.get_value()) - gate).reshape(90, 2, 32).max(-1)
    assert (error <= blocks / 127 * 0.57).all()  # half a step, and the step is rounded to float16
    assert error.max() > 0


def test_values_that_are_too_large_for_a_type(tmp_path: pathlib.Path) -> None:
    checkpoint = random_checkpoint(SMALL["llama"])
    down = checkpoint.model.layers[1].mlp.down_proj
    down.set_value(down.get_value().at[3, 5].set(1e6))
    with pytest.raises(RequestError, match=r"^blk\.1\.ffn_down\.weight holds values too large for float16; accepted"):
        export(checkpoint, tmp_path / "model.gguf", gguf_type="F16")
    export(checkpoint, tmp_path / "model.gguf", gguf_type="BF16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gguf_type": "Q4_K"}, r"^`gguf_type` is 'Q4_K'; choose from F32, F16, BF16, Q8_0$"),
        ({"gguf_widths": "wide"}, r"^`gguf_widths` is 'wide'; choose from per-layer, uniform$"),
        ({"width_multiple": 0}, r"^`width_multiple` is 0; it must be at least 1$"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        plan_gguf(random_checkpoint(SMALL["llama"]), **options)


# --------------------------------------------------------------------------------------------------------- widths


def test_layers_of_different_widths_are_written_as_they_are(tmp_path: pathlib.Path) -> None:
    checkpoint = random_checkpoint(SMALL["llama"], intermediate_sizes=WIDTHS)
    plan = export(checkpoint, tmp_path / "model.gguf")
    assert plan.widths == (96, 64, 64, 32)
    assert plan.fields["general.architecture"] == "deci"
    assert plan.fields["deci.feed_forward_length"] == [96, 64, 64, 32]
    assert plan.fields["gluprune.feed_forward_length"] == list(WIDTHS)
    assert plan.notes == ()
    tensors = stored(tmp_path / "model.gguf")
    assert [tensors[f"blk.{i}.ffn_down.weight"][1] for i in range(4)] == [(96, 64), (64, 64), (64, 64), (32, 64)]
    assert_same_model(read_gguf(tmp_path / "model.gguf"), checkpoint)


def test_exact_widths(tmp_path: pathlib.Path) -> None:
    checkpoint = random_checkpoint(SMALL["llama"], intermediate_sizes=WIDTHS)
    plan = export(checkpoint, tmp_path / "model.gguf", width_multiple=1)
    assert plan.fields["deci.feed_forward_length"] == list(WIDTHS)
    assert "gluprune.feed_forward_length" not in plan.fields
    assert_same_model(read_gguf(tmp_path / "model.gguf"), checkpoint)


def test_widths_that_become_equal_need_no_other_architecture(tmp_path: pathlib.Path) -> None:
    checkpoint = random_checkpoint(SMALL["llama"], intermediate_sizes=(64, 40, 33, 50))
    plan = export(checkpoint, tmp_path / "model.gguf")
    assert (plan.fields["llama.feed_forward_length"], plan.notes) == (64, ())
    assert_same_model(read_gguf(tmp_path / "model.gguf"), checkpoint)


def test_equal_widths_are_filled_up_if_asked(tmp_path: pathlib.Path) -> None:
    checkpoint = random_checkpoint(SMALL["llama"], intermediate_sizes=(70,) * 4)
    assert export(checkpoint, tmp_path / "exact.gguf").fields["llama.feed_forward_length"] == 70
    plan = export(checkpoint, tmp_path / "model.gguf", width_multiple=32)
    assert plan.fields["llama.feed_forward_length"] == 96
    assert_same_model(read_gguf(tmp_path / "model.gguf"), checkpoint)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("llama", {"gguf_widths": "uniform"}, ""),
        ("qwen3", {}, r" \(llama\.cpp's architecture 'qwen3' has one width for all layers\)"),
        ("phi3, long rows", {}, r" \(llama\.cpp's architecture 'phi3' has one width for all layers\)"),
        ("granite 4 without rope", {}, r" \(llama\.cpp's architecture 'granite' has one width for all layers\)"),
        ("mistral with a window", {}, r" \(llama\.cpp's architecture 'deci' has no windows\)"),
    ],
)
def test_layers_are_filled_up_to_the_widest(
    tmp_path: pathlib.Path, name: str, options: dict[str, Any], reason: str
) -> None:
    checkpoint = random_checkpoint(SMALL[name], intermediate_sizes=WIDTHS)
    plan = export(checkpoint, tmp_path / "model.gguf", **options)
    assert plan.widths == (96,) * 4
    note = "layers of 7 to 96 neurons were all filled up to 96 with zero neurons"
    assert plan.notes[0] == note + reason.replace("\\", "")
    assert_same_model(read_gguf(tmp_path / "model.gguf"), checkpoint)


def test_true_widths_that_llama_cpp_cannot_take_are_refused() -> None:
    checkpoint = random_checkpoint(SMALL["qwen3"], intermediate_sizes=WIDTHS)
    with pytest.raises(RequestError, match=r"cannot be written as they are: .*'qwen3'.*; give `gguf_widths` uniform$"):
        plan_gguf(checkpoint, gguf_widths="per-layer")


@pytest.mark.parametrize("widths", [[96, 40, 33], [96, 40, 33, 65], [96, 40, 33, 0], "96"])
def test_true_widths_that_are_none_are_refused(tmp_path: pathlib.Path, widths: Any) -> None:
    checkpoint = random_checkpoint(SMALL["llama"], intermediate_sizes=WIDTHS)
    plan = export(checkpoint, tmp_path / "model.gguf")
    write_gguf(checkpoint, plan, tmp_path / "model.gguf", {"gluprune.feed_forward_length": widths})
    with pytest.raises(OperationError, match=r"gluprune\.feed_forward_length is .*; it must hold a whole number for 4"):
        read_gguf(tmp_path / "model.gguf")


def test_padding_that_is_not_zero_is_refused(tmp_path: pathlib.Path) -> None:
    checkpoint = random_checkpoint(SMALL["llama"], intermediate_sizes=WIDTHS)
    plan = export(checkpoint, tmp_path / "model.gguf")
    write_gguf(checkpoint, plan, tmp_path / "model.gguf", {"gluprune.feed_forward_length": [96, 39, 33, 7]})
    with pytest.raises(OperationError, match=r"blk\.1\.ffn_gate\.weight holds values beyond the 39 neurons"):
        read_gguf(tmp_path / "model.gguf")


# ---------------------------------------------------------------------------------------------------- what is lost


def test_what_llama_cpp_does_not_look_at_is_noted() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    own = {**SMALL["qwen2"], "rope_scaling": {**yarn, "beta_fast": 16.0}}
    (note,) = plan_gguf(random_checkpoint(own)).notes
    assert note.startswith("llama.cpp does not look at YaRN's betas and attention factor")
    assert plan_gguf(random_checkpoint({**SMALL["qwen2"], "rope_scaling": yarn})).notes == ()
    (note,) = plan_gguf(random_checkpoint(SMALL["mistral with a window"])).notes
    assert note.startswith("llama.cpp does not apply the window of 8 tokens in its architecture 'llama'")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIGS["smollm3"], r"^a GGUF file of llama\.cpp's architecture 'smollm3' cannot express attention of this"),
        (CONFIGS["gemma3"], r"'gemma3' cannot express attention_scale of this model; write `format` hf$"),
        (CONFIGS["qwen2 with a window from layer 2"], r"'qwen2' cannot express attention of this model"),
        (SMALL["smollm3 with biases"], r"'smollm3' cannot express output_bias of this model"),
        ({**SMALL["gemma"], "tie_word_embeddings": False}, r"'gemma' cannot express tie_word_embeddings of"),
        ({**SMALL["olmo2"], "tie_word_embeddings": True}, r"'olmo2' cannot express tie_word_embeddings of"),
        (
            {
                **SMALL["qwen3"],
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            r"'qwen3' cannot express attention of this model",
        ),
    ],
    ids=["smollm3", "gemma3", "qwen2", "biases", "gemma", "olmo2", "qwen3"],
)
def test_what_the_architecture_cannot_express_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        plan_gguf(random_checkpoint(config))


def test_deci_files_of_others_are_read_if_their_layers_attend_alike(tmp_path: pathlib.Path) -> None:
    checkpoint = random_checkpoint(SMALL["llama"], intermediate_sizes=WIDTHS)
    plan = export(checkpoint, tmp_path / "model.gguf")
    write_gguf(checkpoint, plan, tmp_path / "model.gguf", {"deci.attention.head_count_kv": [2, 2, 4, 2]})
    with pytest.raises(RequestError, match=r"deci\.attention\.head_count_kv differs between layers"):
        read_gguf(tmp_path / "model.gguf")
    write_gguf(checkpoint, plan, tmp_path / "model.gguf", {"deci.attention.head_count_kv": [2, 2, 0, 2]})
    with pytest.raises(OperationError, match=r"deci\.attention\.head_count_kv is 0; it must be a whole number from 1"):
        read_gguf(tmp_path / "model.gguf")


def test_files_of_the_package_and_ours_have_the_same_metadata(tmp_path: pathlib.Path) -> None:
    fields = {"a.flag": True, "a.count": 3, "a.number": 0.1, "a.text": "ä", "a.ints": [1, -2], "a.texts": ["x", ""]}
    fields |= {"a.flags": [True, False], "a.floats": [0.5, -1.0]}
    checkpoint = random_checkpoint(SMALL["llama"])
    plan = plan_gguf(checkpoint)
    write_gguf(checkpoint, plan, tmp_path / "ours.gguf", fields)
    write_by_package(tmp_path / "package.gguf", fields, {"x": np.zeros(1, np.float32)})
    ours, others = (gguf.GGUFReader(tmp_path / f"{name}.gguf").fields for name in ("ours", "package"))
    for key, value in fields.items():
        assert (ours[key].types, ours[key].contents()) == (others[key].types, others[key].contents()), key
        assert ours[key].contents() == pytest.approx(value), key
