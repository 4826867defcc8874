"""GGUF files of every family, written from known Hugging Face tensors as llama.cpp's converter does.

The names of tensors and keys are those of the `gguf` package, and not our tables.
"""

import dataclasses
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf_families import SMALL, architecture, converted, metadata, random_model, write
from gguf_files import write_gguf
from numpy.typing import NDArray
from safetensors.numpy import load_file

import convert
from convert.families.registry import FAMILIES
from convert.gguf.reader import read_gguf
from convert.huggingface.config import read_config
from gluprune_jax.errors import GlupruneError, OperationError, RequestError
from gluprune_jax.models.config import LayerAttention, Llama3Rope, LongRope, ModelConfig, Rope
from gluprune_jax.models.parameters import parameters_of


def rounded(name: str, values: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """What the file holds of a parameter: vectors in float32 whatever the others are."""
    return values if name.endswith(("norm.weight", "bias")) else values.astype(dtype)


def test_every_family_is_here() -> None:
    assert {config["model_type"] for config in SMALL.values()} == FAMILIES.keys()
    accepted = {family.gguf.architecture for family in FAMILIES.values() if family.gguf is not None}
    assert accepted == {architecture(config) for config in SMALL.values()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", SMALL)
def test_config_and_weights_are_those_of_the_hugging_face_files(tmp_path: pathlib.Path, name: str, dtype: Any) -> None:
    path, model = write(tmp_path, SMALL[name], dtype)
    checkpoint = read_gguf(path)
    assert checkpoint.config == model.config
    expected, found = parameters_of(model), parameters_of(checkpoint.model)
    assert found.keys() == expected.keys()
    for parameter, array in found.items():
        values = rounded(parameter, np.asarray(expected[parameter]), dtype)
        assert (array.dtype, array.shape) == (values.dtype, values.shape), parameter
        assert np.asarray(array).tobytes() == values.tobytes(), parameter
    # Where llama.cpp has one name for several families, it is the one whose config can say what it computes.
    others = {"granite 4": "granite"}
    assert checkpoint.hf_config["model_type"] == others.get(name, SMALL[name]["model_type"])


@pytest.mark.parametrize("name", ["gemma3", "phi3, long rows", "olmo3", "granite 4 without rope", "smollm3"])
def test_what_was_read_is_written_as_its_family(tmp_path: pathlib.Path, name: str) -> None:
    path, model = write(tmp_path, SMALL[name])
    convert.save(read_gguf(path), tmp_path / "again")
    first, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "again"))
    assert first.keys() == again.keys()
    for tensor, values in first.items():
        np.testing.assert_array_equal(again[tensor], values, err_msg=tensor)
    assert convert.load(tmp_path / "again").config == model.config


def test_norms_are_less_one_in_float32_whatever_the_file_has(tmp_path: pathlib.Path) -> None:
    path, _ = write(tmp_path, SMALL["gemma3"])
    tensors = converted(SMALL["gemma3"], load_file(tmp_path / "hf" / "model.safetensors"), np.dtype(np.float32))
    halves = {name: values.astype(np.float16) for name, values in tensors.items() if isinstance(values, np.ndarray)}
    write_gguf(path, metadata(SMALL["gemma3"]), halves, "gemma3")
    checkpoint = read_gguf(path)
    norm = np.asarray(checkpoint.model.layers[1].self_attn.q_norm.weight[...])
    assert norm.dtype == np.float32
    np.testing.assert_array_equal(norm, halves["blk.1.attn_q_norm.weight"].astype(np.float32) - np.float32(1))
    assert checkpoint.model.embed_tokens[...].dtype == np.float16
    cast = read_gguf(path, dtype=np.dtype(ml_dtypes.bfloat16))
    assert cast.model.layers[1].self_attn.q_norm.weight[...].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        np.asarray(cast.model.layers[1].self_attn.q_norm.weight[...]), norm.astype(ml_dtypes.bfloat16)
    )


def test_layers_of_different_width_in_fused_tensors(tmp_path: pathlib.Path) -> None:
    """Each layer's own, which a Hugging Face file cannot have."""
    config = {**SMALL["phi3, long rows"], "num_hidden_layers": 2, "gluprune": {"intermediate_sizes": [96, 64]}}
    ours, _ = read_config(config)
    model = random_model(ours)
    tensors: dict[str, NDArray[Any]] = {}
    for i, layer in enumerate(model.layers):
        attention, mlp, block = layer.self_attn, layer.mlp, f"blk.{i}"
        q, k, v = (np.asarray(p[...]).reshape(-1, 64) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        tensors[f"{block}.attn_qkv.weight"] = np.concatenate([q, k, v])
        tensors[f"{block}.ffn_up.weight"] = np.concatenate(
            [np.asarray(mlp.gate_proj[...]), np.asarray(mlp.up_proj[...])]
        )
        tensors[f"{block}.ffn_down.weight"] = np.asarray(mlp.down_proj[...])
        tensors[f"{block}.attn_output.weight"] = np.asarray(attention.o_proj[...]).reshape(64, 64)
        tensors[f"{block}.attn_norm.weight"] = np.asarray(layer.input_layernorm.weight[...])
        tensors[f"{block}.ffn_norm.weight"] = np.asarray(layer.post_attention_layernorm.weight[...])
    tensors["token_embd.weight"], tensors["output.weight"] = (
        np.asarray(p[...]) for p in (model.embed_tokens, model.lm_head)
    )
    tensors["output_norm.weight"] = np.asarray(model.norm.weight[...])
    for length in ("long", "short"):
        tensors[f"rope_factors_{length}.weight"] = np.array(config["rope_scaling"][f"{length}_factor"], np.float32)
    fields = metadata(config) | {"phi3.feed_forward_length": [96, 64]}
    checkpoint = read_gguf(write_gguf(tmp_path / "model.gguf", fields, tensors, "phi3"))
    assert checkpoint.config == ours
    for parameter, array in parameters_of(checkpoint.model).items():
        np.testing.assert_array_equal(array, parameters_of(model)[parameter], err_msg=parameter)


# ------------------------------------------------------------------------------- what llama.cpp does unasked


def config_of(tmp_path: pathlib.Path, name: str, changes: dict[str, Any] | None = None, **fields: Any) -> ModelConfig:
    path, _ = write(tmp_path, {**SMALL[name], **(changes or {})}, **fields)
    return read_gguf(path).config


@pytest.mark.parametrize(
    ("name", "layers", "largest"), [("gemma2", 46, True), ("gemma3", 62, True), ("gemma3", 46, False)]
)
def test_the_largest_gemma_has_another_scale(tmp_path: pathlib.Path, name: str, layers: int, largest: bool) -> None:
    scalar = 64 // 4 if largest else 32
    sizes = {"num_hidden_layers": layers, "intermediate_size": 8, "vocab_size": 16, "query_pre_attn_scalar": scalar}
    config = config_of(tmp_path, name, sizes)
    assert (config.attention_scale or config.head_dim**-0.5) == scalar**-0.5


def test_gemma_2_without_its_keys(tmp_path: pathlib.Path) -> None:
    absent = ("attention__sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    config = config_of(tmp_path, "gemma2", **dict.fromkeys(absent))
    assert [layer.window for layer in config.attention] == [4096, None, 4096, None]
    assert (config.attention_soft_cap, config.logit_soft_cap) == (50.0, 30.0)


@pytest.mark.parametrize("window", [0, None])
def test_gemma_3_without_a_window_has_one_rope(tmp_path: pathlib.Path, window: int | None) -> None:
    config = config_of(tmp_path, "gemma3", attention__sliding_window=window)
    assert set(config.attention) == {config.attention[1]}
    assert config.attention[0].window is None
    assert config.attention[0].rope == Rope(5000.0, SMALL_LINEAR)


SMALL_LINEAR = read_config(SMALL["gemma3"])[0].attention[1].rope.scaling  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("pattern", "slides"),
    [(3, "110110"), (1, "000000"), (0, "111111"), ([True, False, False, True, True, False], "100110")],
)
def test_patterns_of_windows(tmp_path: pathlib.Path, pattern: Any, slides: str) -> None:
    config = config_of(tmp_path, "gemma3", {"num_hidden_layers": 6}, attention__sliding_window_pattern=pattern)
    assert "".join("0" if layer.window is None else "1" for layer in config.attention) == slides


def test_smollm3_has_no_rope_in_every_fourth_layer(tmp_path: pathlib.Path) -> None:
    config = config_of(tmp_path, "smollm3", {"num_hidden_layers": 9})
    assert [i for i, layer in enumerate(config.attention) if layer.rope is None] == [3, 7]


def test_granite_without_multipliers(tmp_path: pathlib.Path) -> None:
    """transformers would take 1 for the scale of the scores."""
    config = config_of(tmp_path, "granite", attention__scale=None, embedding_scale=None, residual_scale=0.0)
    assert config.attention_scale is None
    assert (config.embedding_scale, config.residual_scale, config.logit_scale) == (1.0, 1.0, 1 / 8)


def test_granite_with_the_divisors_of_llama_3(tmp_path: pathlib.Path) -> None:
    path, _ = write(tmp_path, SMALL["granite"])
    tensors = converted(SMALL["granite"], load_file(tmp_path / "hf" / "model.safetensors"), np.dtype(np.float32))
    tensors["rope_freqs.weight"] = np.ones(8, np.float32)
    rope = read_gguf(write_gguf(path, metadata(SMALL["granite"]), tensors, "granite")).config.attention[0].rope
    assert rope == Rope(500.0)
    # At this base all wavelengths are short.
    assert not isinstance(rope.scaling, Llama3Rope)


def test_olmo_3_has_yarn_where_it_has_no_window(tmp_path: pathlib.Path) -> None:
    config = config_of(tmp_path, "olmo3", attention__sliding_window_pattern=None)
    plain = LayerAttention(Rope(500000.0, in_float32=True), 8)
    assert config.attention[:3] == (plain,) * 3
    last = config.attention[3]
    assert last.window is None
    assert last.rope is not None
    assert last.rope.scaling is not None


def test_phi_with_other_factors_than_computed(tmp_path: pathlib.Path) -> None:
    config = config_of(tmp_path, "phi3, long rows", rope__scaling__attn_factor=1.5)
    rope = config.attention[0].rope
    assert rope is not None
    assert isinstance(rope.scaling, LongRope)
    assert rope.scaling.attention_factor == 1.5
    # Without the key, llama.cpp multiplies by nothing.
    rope = config_of(tmp_path / "2", "phi3, long rows", rope__scaling__attn_factor=None).attention[0].rope
    assert rope is not None
    assert isinstance(rope.scaling, LongRope)
    assert rope.scaling.attention_factor == 1.0


def test_phi_without_divisors_has_a_plain_rope(tmp_path: pathlib.Path) -> None:
    config = config_of(tmp_path, "phi3 with a window", attention__sliding_window=0)
    assert set(config.attention) == {LayerAttention(Rope(500.0))}


def test_an_olmo_2_without_a_head_of_its_own_is_not_complete(tmp_path: pathlib.Path) -> None:
    path, _ = write(tmp_path, SMALL["olmo2"])
    tensors = converted(SMALL["olmo2"], load_file(tmp_path / "hf" / "model.safetensors"), np.dtype(np.float32))
    del tensors["output.weight"]
    with pytest.raises(OperationError, match=r"missing: output\.weight"):
        read_gguf(write_gguf(path, metadata(SMALL["olmo2"]), tensors, "olmo2"))


@pytest.mark.parametrize("name", ["gemma", "gemma2"])
def test_the_first_gemmas_have_no_head_of_their_own(tmp_path: pathlib.Path, name: str) -> None:
    path, _ = write(tmp_path, SMALL[name])
    tensors = converted(SMALL[name], load_file(tmp_path / "hf" / "model.safetensors"), np.dtype(np.float32))
    tensors["output.weight"] = np.ones((256, 64), np.float32)
    with pytest.raises(OperationError, match=r"unexpected: output\.weight"):
        read_gguf(write_gguf(path, metadata(SMALL[name]), tensors, name))


@pytest.mark.parametrize(
    ("name", "fields", "error", "message"),
    [
        (
            "qwen2",
            {"attention__sliding_window": 8},
            RequestError,
            r"qwen2\.attention\.sliding_window is 8; accepted: 0",
        ),
        ("qwen3", {"expert_count": 8}, RequestError, r"qwen3\.expert_count is 8: mixtures of experts"),
        ("qwen3", {"rope__dimension_count": 16}, RequestError, r"qwen3\.rope\.dimension_count is 16; accepted: .* 32"),
        ("qwen3", {"attention__scale": 0.5}, RequestError, r"qwen3\.attention\.scale is 0\.5, and this key is not sup"),
        (
            "gemma3",
            {"attn_logit_softcapping": 50.0},
            RequestError,
            r"gemma3\.attn_logit_softcapping is 50\.0, and this",
        ),
        ("gemma3", {"attention__sliding_window_pattern": [True]}, OperationError, r"is \[True\]; expected .* 4 layers"),
        ("gemma3", {"attention__sliding_window_pattern": [1, 0, 1, 0]}, OperationError, r"expected true or false for"),
        ("gemma3", {"attention__sliding_window_pattern": "x"}, OperationError, r"pattern is 'x'; it must be a whole"),
        (
            "gemma3",
            {"rope__freq_base_swa": 0.0},
            OperationError,
            r"gemma3\.rope\.freq_base_swa is 0\.0; it must be a p",
        ),
        ("gemma2", {"final_logit_softcapping": 0.0}, OperationError, r"final_logit_softcapping is 0\.0; it must be a"),
        (
            "olmo2",
            {"rope__freq_base_swa": 2.0},
            RequestError,
            r"olmo2\.rope\.freq_base_swa is 2\.0; accepted: .* 500\.0",
        ),
        ("granite", {"logit_scale": None}, OperationError, r"the metadata key granite\.logit_scale is missing"),
        ("granite", {"rope__scaling__finetuned": 1}, OperationError, r"finetuned is 1; it must be true or false"),
        (
            "phi3 with a window",
            {"rope__scaling__attn_factor": 1.2},
            RequestError,
            r"rope\.scaling\.attn_factor or one of",
        ),
        (
            "phi3 with a window",
            {"rope__scaling__type": "yarn"},
            RequestError,
            r"scaling\.type is 'yarn'; accepted: 'lon",
        ),
        ("phi3 with a window", {"rope__dimension_count": 18}, OperationError, r"is 18; a head has 16 dimensions"),
        ("phi3, long rows", {"rope__dimension_count": 14}, RequestError, r"6 numbers in short_factor; 14 rotary dim"),
        ("smollm3", {"attention__sliding_window": 9}, RequestError, r"smollm3\.attention\.sliding_window is 9; accept"),
    ],
)
def test_refused_metadata(
    tmp_path: pathlib.Path, name: str, fields: dict[str, Any], error: type[GlupruneError], message: str
) -> None:
    path, _ = write(tmp_path, SMALL[name], **fields)
    with pytest.raises(error, match=message) as caught:
        read_gguf(path)
    assert type(caught.value) is error
    assert str(caught.value).startswith(str(path))


def test_a_vector_of_the_config_that_is_none_is_refused(tmp_path: pathlib.Path) -> None:
    path, _ = write(tmp_path, SMALL["phi3, long rows"])
    tensors = converted(
        SMALL["phi3, long rows"], load_file(tmp_path / "hf" / "model.safetensors"), np.dtype(np.float32)
    )
    tensors["rope_factors_long.weight"] = np.ones((2, 3), np.float32)
    with pytest.raises(OperationError, match=r"rope_factors_long\.weight has shape \(2, 3\); expected one axis"):
        read_gguf(write_gguf(path, metadata(SMALL["phi3, long rows"]), tensors, "phi3"))
    del tensors["rope_factors_long.weight"]
    with pytest.raises(RequestError, match=r"one of rope_factors_short\.weight and rope_factors_long\.weight is there"):
        read_gguf(write_gguf(path, metadata(SMALL["phi3, long rows"]), tensors, "phi3"))


def test_the_vocabulary_is_that_of_the_file(tmp_path: pathlib.Path) -> None:
    """Gemma 3's converter cuts the embedding to the tokenizer's size, and writes no size of the vocabulary."""
    path, model = write(tmp_path, SMALL["gemma3"], vocab_size=None)
    assert read_gguf(path).config == dataclasses.replace(model.config, vocab_size=256)
