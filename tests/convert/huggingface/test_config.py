"""`config.json`: published ones are read right, ours are read right by transformers, and anything else is refused."""

import dataclasses
import functools
import json
import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import DTYPES, LLAMA3_ROPE, hf_config

import convert.huggingface.config
from convert.families.registry import FAMILIES
from convert.huggingface.config import INERT_KEYS, ONLY_THESE_VALUES, accepted_without_effect, read_config, write_config
from gluprune_jax.errors import GlupruneError, OperationError, RequestError, listed
from gluprune_jax.models.config import LayerAttention, Llama3Rope, ModelConfig, Rope

ROOT = Path(__file__).resolve().parents[3]

# ------------------------------------------------------------------------------------------- published configs

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "initializer_range": 0.02}
LLAMA |= {"bos_token_id": 1, "eos_token_id": 2, "use_cache": True, "transformers_version": "4.40.0"}
LLAMA3 = LLAMA | {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001}
LLAMA3 |= {"pretraining_tp": 1, "torch_dtype": "bfloat16", "vocab_size": 128256, "rope_theta": 500000.0}
LLAMA31 = LLAMA3 | {"mlp_bias": False, "eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 131072}


def llama31_scaling(factor: float) -> dict[str, Any]:
    return LLAMA3_ROPE | {"factor": factor, "original_max_position_embeddings": 8192}


def sizes(D: int, F: int, L: int, N: int, K: int, eps: float = 1e-5) -> dict[str, Any]:
    return {
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "rms_norm_eps": eps,
    }


# The config as published; what it means (head_dim, window, theta, factor of the scaling, tied); and the number of
# parameters that the model's page states, which no sum of ours went into.
PUBLISHED: dict[str, tuple[dict[str, Any], tuple[int, int, float, float | None, bool], int]] = {
    "Llama-2-7b": (
        LLAMA
        | sizes(4096, 11008, 32, 32, 32)
        | {"_name_or_path": "meta-llama/Llama-2-7b-hf", "max_position_embeddings": 4096, "pretraining_tp": 1}
        | {"rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 32000},
        (128, 4096, 10000.0, None, False),
        6_738_415_616,
    ),
    "Llama-3-8B": (
        LLAMA3
        | sizes(4096, 14336, 32, 32, 8)
        | {"max_position_embeddings": 8192, "rope_scaling": None, "tie_word_embeddings": False},
        (128, 8192, 500000.0, None, False),
        8_030_261_248,
    ),
    "Llama-3.1-8B": (
        LLAMA31 | sizes(4096, 14336, 32, 32, 8) | {"rope_scaling": llama31_scaling(8.0), "tie_word_embeddings": False},
        (128, 131072, 500000.0, 8.0, False),
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        LLAMA31
        | sizes(2048, 8192, 16, 32, 8)
        | {"head_dim": 64, "rope_scaling": llama31_scaling(32.0), "tie_word_embeddings": True},
        (64, 131072, 500000.0, 32.0, True),
        1_235_814_400,
    ),
    "Llama-3.2-3B": (
        LLAMA31
        | sizes(3072, 8192, 28, 24, 8)
        | {"head_dim": 128, "rope_scaling": llama31_scaling(32.0), "tie_word_embeddings": True},
        (128, 131072, 500000.0, 32.0, True),
        3_212_749_824,
    ),
    "Llama-3.3-70B": (
        LLAMA31
        | sizes(8192, 28672, 80, 64, 8)
        | {"head_dim": 128, "rope_scaling": llama31_scaling(8.0), "tie_word_embeddings": False},
        (128, 131072, 500000.0, 8.0, False),
        70_553_706_496,
    ),
    "SmolLM2-135M-Instruct": (
        LLAMA
        | sizes(576, 1536, 30, 9, 3)
        | {"is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False, "attention_bias": False}
        | {
            "pad_token_id": 2,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "vocab_size": 49152,
        }
        | {"tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers.js_config": {"dtype": "q4"}},
        (64, 8192, 100000.0, None, True),
        134_515_008,
    ),
    "SmolLM2-1.7B": (
        LLAMA
        | sizes(2048, 8192, 24, 32, 32)
        | {"max_position_embeddings": 8192, "rope_scaling": None, "rope_theta": 130000, "vocab_size": 49152}
        | {"tie_word_embeddings": True, "torch_dtype": "bfloat16"},
        (64, 8192, 130000.0, None, True),
        1_711_376_384,
    ),
    "TinyLlama-1.1B": (
        LLAMA
        | sizes(2048, 5632, 22, 32, 4)
        | {"max_position_embeddings": 2048, "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 32000}
        | {"tie_word_embeddings": False, "torch_dtype": "bfloat16", "pretraining_tp": 1, "attention_bias": False},
        (64, 2048, 10000.0, None, False),
        1_100_048_384,
    ),
    "Mistral-7B-v0.3": (
        LLAMA
        | sizes(4096, 14336, 32, 32, 8)
        | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "attention_dropout": 0.0}
        | {"max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768}
        | {"tie_word_embeddings": False, "torch_dtype": "bfloat16"},
        (128, 32768, 1000000.0, None, False),
        7_248_023_552,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_right(name: str) -> None:
    data, (head_dim, window, theta, factor, tied), parameters = PUBLISHED[name]
    config, rest = read_config(data)
    scaling = None if factor is None else Llama3Rope(factor, 1.0, 4.0, 8192)
    assert config == ModelConfig(
        vocab_size=data["vocab_size"],
        hidden_size=data["hidden_size"],
        intermediate_sizes=(data["intermediate_size"],) * data["num_hidden_layers"],
        num_attention_heads=data["num_attention_heads"],
        num_key_value_heads=data["num_key_value_heads"],
        head_dim=head_dim,
        max_position_embeddings=window,
        rms_norm_eps=1e-5,
        attention=(LayerAttention(Rope(theta, scaling)),) * data["num_hidden_layers"],
        tie_word_embeddings=tied,
    )
    assert config.num_parameters == parameters
    assert rest["eos_token_id"] == data["eos_token_id"]
    assert rest["model_type"] == data["model_type"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_spelling_of_transformers_5_means_the_same(name: str) -> None:
    data = PUBLISHED[name][0]
    five = {key: value for key, value in data.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    five["dtype"] = data["torch_dtype"]
    rope = {"rope_type": "default", "rope_theta": data.get("rope_theta", 10000.0)} | (data.get("rope_scaling") or {})
    assert read_config(five | {"rope_parameters": rope})[0] == read_config(data)[0]
    assert read_config(data | {"rope_parameters": rope})[0] == read_config(data)[0]


def test_the_old_name_of_the_rope_type() -> None:
    old = {("type" if key == "rope_type" else key): value for key, value in LLAMA3_ROPE.items()}
    assert read_config(hf_config(rope_scaling=old))[0] == read_config(hf_config(rope_scaling=LLAMA3_ROPE))[0]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_transformers_writes_is_read(family: str, full: bool) -> None:
    """Every key that this version of transformers knows, where `full`."""
    transformers = pytest.importorskip("transformers")
    kind = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[family]
    more = {} if family == "llama" else {"sliding_window": None}
    # What it keeps of a GGUF file that it has read.
    private = {"_model_name_or_path": "model.gguf", "unk_token_id": 0}
    theirs = kind(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, **more, **private)
    config, rest = read_config(more | json.loads(theirs.to_json_string(use_diff=not full)))
    assert rest.items() >= private.items()
    assert (config.hidden_size, config.head_dim, config.num_hidden_layers) == (64, 16, 3)
    assert config.intermediate_sizes[0] == theirs.intermediate_size
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps


def test_absent_keys_mean_what_transformers_takes_them_for() -> None:
    transformers = pytest.importorskip("transformers")
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    bare = {key: hf_config()[key] for key in needed}
    config, _ = read_config(bare | {"model_type": "llama"})
    theirs = transformers.LlamaConfig(**bare)
    assert config.num_key_value_heads == theirs.num_key_value_heads
    assert config.head_dim == theirs.head_dim
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    bare["num_attention_heads"] = 8
    config, _ = read_config(bare | {"model_type": "mistral"})
    theirs = transformers.MistralConfig(**bare)
    assert {layer.window for layer in config.attention} == {theirs.sliding_window} == {4096}
    assert read_config(bare | {"model_type": "mistral", "sliding_window": None})[0].attention[0].window is None
    assert config.num_key_value_heads == theirs.num_key_value_heads == 8
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert (config.rms_norm_eps, config.head_dim) == (theirs.rms_norm_eps, theirs.head_dim)
    assert config.tie_word_embeddings == theirs.tie_word_embeddings


def test_inert_keys_are_kept_and_reported() -> None:
    data = hf_config(pretraining_tp=2, use_cache=False, temperature=0.6)
    config, rest = read_config(data)
    assert config == read_config(hf_config())[0]
    assert {"pretraining_tp", "use_cache", "temperature", "bos_token_id"} <= set(accepted_without_effect(data))
    written = write_config(config, rest, np.dtype(np.float32))
    assert (written["pretraining_tp"], written["use_cache"], written["temperature"]) == (2, False, 0.6)


# What files of other people hold, and no config class of transformers knows.
PRIVATE: dict[str, Any] = {
    "_model_name_or_path": "somebody/else",
    "unk_token_id": 0,
    "unsloth_version": "2026.1",
    "rope_interleaved": True,
    "logit_softcapping": 30.0,
    "vision_config": {"hidden_size": 3},
    "lora": [{"r": 8}, None],
}


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_keys_that_transformers_does_not_know_change_nothing_and_are_kept(family: str) -> None:
    plain = hf_config(model_type=family, architectures=None) | {"sliding_window": None}
    config, rest = read_config(plain | PRIVATE)
    assert config == read_config(plain)[0]
    inert = accepted_without_effect(plain | PRIVATE)
    bias = ["attention_bias", "mlp_bias"] if family == "mistral" else []  # MistralConfig knows neither
    assert inert[: len(PRIVATE) + len(bias)] == sorted([*PRIVATE, *bias]), "what is strange does not come first"
    assert write_config(config, rest, np.dtype(np.float32)).items() >= PRIVATE.items()


def test_a_key_that_is_almost_another_is_named_with_it() -> None:
    data = hf_config(num_key_value_heads=None) | {"num_key_value_head": 2}
    assert read_config(data)[0].num_key_value_heads == 6, "not what transformers takes"
    assert "num_key_value_head (num_key_value_heads is not given)" in accepted_without_effect(data)
    assert "num_key_value_head" in accepted_without_effect(data | {"num_key_value_heads": 2})


def test_a_misspelt_key_of_rope_is_named() -> None:
    data = hf_config(rope_theta=None, rope_parameters={"rope_type": "default", "rope_thet": 5e5})
    assert read_config(data)[0].attention[0].rope == Rope(10000.0), "not what transformers takes"
    assert "rope_parameters.rope_thet" in accepted_without_effect(data)


def test_code_that_a_native_model_brings_is_ignored_and_does_not_stay() -> None:
    data = hf_config() | {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    config, rest = read_config(data)
    assert config == read_config(hf_config())[0]
    assert "auto_map" in accepted_without_effect(data)
    assert "auto_map" not in write_config(config, rest, np.dtype(np.float32)), "names a file that is not copied"


@pytest.mark.parametrize(
    "names", [None, [], ["LlamaModel"], ["OwnForCausalLM"], ["OwnModel", "LlamaForCausalLM"]], ids=str
)
def test_architectures_that_the_model_type_overrules(names: list[str] | None) -> None:
    config, rest = read_config(hf_config() | {"architectures": names})
    assert write_config(config, rest, np.dtype(np.float32))["architectures"] == ["LlamaForCausalLM"]


NULLS = ["attention_bias", "mlp_bias", "tie_word_embeddings", "quantization_config", "partial_rotary_factor"]


@pytest.mark.parametrize("value", [None, 0, 0.0], ids=str)
def test_what_one_of_the_two_transformers_refuses_to_load_is_not_written(value: Any) -> None:
    """Version 5 wants its switches to be `bool`s; version 4 fails on `quantization_config` and others of null."""
    keys = NULLS if value is None else NULLS[:2]
    config, rest = read_config(hf_config() | dict.fromkeys(keys, value))
    assert config == read_config(hf_config())[0]
    written = write_config(config, rest, np.dtype(np.float32))
    assert not written.keys() & {*keys} - {"tie_word_embeddings", "attention_bias"}
    assert written["attention_bias"] is False


def test_lists_and_values_of_any_length_are_refused_in_one_short_line() -> None:
    wide = {f"__{'x' * 500}{i}\n": ["y" * 1000] * 1000 for i in range(50)}
    deep = [[[["z" * 70] * 9] * 9] * 9] * 9
    for changes in (wide, {"hidden_act": deep}, dict.fromkeys(ONLY_THESE_VALUES, deep), {"eos_token_id": deep}):
        with pytest.raises(RequestError) as caught:
            read_config(hf_config(**changes), "x.json")
        assert len(str(caught.value)) <= 500, changes.keys()
        assert "\n" not in str(caught.value)
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.raises(RequestError) as caught:
            read_config(hf_config(**{key: dict.fromkeys(wide, hf_config())}), "x.json")
        assert len(str(caught.value)) <= 500
    private = {key.strip("_"): 1 for key in wide}
    assert len(listed(accepted_without_effect(hf_config(**private)))) <= 500


# ------------------------------------------------------------------------------------------------------ refusals

FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "Mixtral": (
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
        "model_type 'mixtral', a mixture of experts, which is pruned from file to file by its weights alone ",
    ),
    "Phi-MoE": (
        {"model_type": "phimoe", "architectures": ["PhimoeForCausalLM"]},
        "model_type 'phimoe': mixtures of experts are not supported yet; supported are 'llama', 'mistral', ",
    ),
    "Falcon": ({"model_type": "falcon", "architectures": ["FalconForCausalLM"]}, "model_type 'falcon'; supported are"),
    "no family": ({"model_type": None}, "model_type None"),
    "a classifier": ({"architectures": ["LlamaForSequenceClassification"]}, r"\['LlamaForSequenceClassification'\]"),
    "another head": ({"model_type": "mistral"}, r"architectures \['LlamaForCausalLM'\]"),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias = True"),
    "gelu": ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' \(supported: 'silu' or 'swish'\)"),
    "sliding window": ({"sliding_window": 4096}, r"sliding_window = 4096 \(supported: None\)"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = {'quant_method': 'gptq'}"),
    "own code": (
        {"model_type": "llamoid", "auto_map": {"AutoModel": "m.Own"}},
        r"model_type 'llamoid'; supported are 'llama', 'mistral', .*; code that it brings \(auto_map\) is never run",
    ),
    "not causal": ({"is_causal": False}, r"is_causal = False \(supported: True\)"),
    "chunks of attention": ({"attention_chunk_size": 64}, "attention_chunk_size = 64"),
    "layers of their own": ({"per_layer_config": {"0": {"intermediate_size": 40}}}, "per_layer_config = {'0': {"),
    "another model inside": ({"text_config": {"hidden_size": 5}}, "text_config = {'hidden_size': 5}"),
    "other weights": ({"transformers_weights": "other.safetensors"}, "transformers_weights = 'other.safetensors'"),
    "a method": ({"to_dict": 1}, r"to_dict = 1 \(transformers' config class has a part of that name\)"),
    "a part of Python": ({"__dict__": {}}, r"__dict__ = {} \(transformers' config class has a part of that name\)"),
    "its own map": ({"attribute_map": {"hidden_size": "n"}}, "attribute_map = "),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "partial in rope": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
        "partial_rotary_factor 0.25",
    ),
    "local layers": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        r"layer_types = \['sliding_attention'\]",
    ),
    "too few layers": ({"layer_types": ["full_attention"] * 2}, r"layer_types = 2 times .* once for each of 3\)"),
    "many": ({"mlp_bias": True, "is_causal": False}, r"mlp_bias = True .*; is_causal = False"),
    "an end of another type": ({"eos_token_id": [2, 2.5]}, r"eos_token_id = \[2, 2.5\] \(supported: a token id"),
    "an end too far": ({"eos_token_id": 2**40}, r"eos_token_id = 1099511627776 \(supported: a token id"),
    "llama3 without": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor = None"),
    "llama3 with more": ({"rope_scaling": LLAMA3_ROPE | {"beta_fast": 32}}, "keys .* does not: beta_fast"),
    "llama3 shrinking": ({"rope_scaling": LLAMA3_ROPE | {"factor": 0.5}}, "factor 0.5"),
    "llama3 backwards": ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "low_freq_factor 4.0"),
    "two thetas": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        r"two things about RoPE: rope_parameters mean base 500000.0, no scaling, rope_theta and rope_scaling mean",
    ),
    "two scalings": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": LLAMA3_ROPE},
        "two things about RoPE",
    ),
    "a parameter of another RoPE": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 8.0}},
        "rope_parameters has keys that rope_type 'default' does not: factor",
    ),
    "RoPE by layer type": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}},
        "rope_parameters has keys that rope_type 'default' does not: full_attention",
    ),
    "two types": (
        {"rope_scaling": LLAMA3_ROPE | {"type": "default"}},
        "rope_type 'llama3' and type 'default'; transformers 5 takes the first, transformers 4 the second",
    ),
    "theta in the scaling": (
        {"rope_scaling": LLAMA3_ROPE | {"rope_theta": 5e5}},
        "rope_scaling has rope_theta 500000.0, which transformers 5 takes and transformers 4 does not",
    ),
    "two windows": (
        {"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 32},
        "original_max_position_embeddings 64, and the config 32; transformers 5 takes the second",
    ),
    "heads": ({"num_key_value_heads": 4}, "num_attention_heads = 6 and num_key_value_heads = 4"),
    "head size": ({"head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 1}, "hidden_size 48, which 5"),
    "odd head size": ({"head_dim": 7}, "head_dim = 7"),
}
FOREIGN |= {
    f"{kind} in {key}": ({key: {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}}, f"{key} has rope_type '{kind}'")
    for kind in ("dynamic", "proportional", "longrope", "su", "mrope")
    for key in ("rope_scaling", "rope_parameters")
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_we_do_not_implement_is_refused_by_name(name: str) -> None:
    changes, message = FOREIGN[name]
    with pytest.raises(RequestError, match=f"^some/config.json.*{message}") as caught:
        read_config(hf_config(**changes), "some/config.json")
    assert "\n" not in str(caught.value)


NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
WRONG = ["big", "4096", -1, 0, 4.0, True, [4096], {}, math.nan, 10**30]


@pytest.mark.parametrize("key", NEEDED)
@pytest.mark.parametrize("value", [*WRONG, None], ids=str)
def test_sizes_that_are_none(key: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^x\.json has (no )?{key}.*; it must be a whole number from 1 to"):
        read_config(hf_config(**{key: value}), "x.json")


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "max_position_embeddings"])
@pytest.mark.parametrize("value", WRONG, ids=str)
def test_optional_sizes_that_are_none(key: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^x\.json has {key} = .*; it must be a whole number from 1 to"):
        read_config(hf_config(**{key: value}), "x.json")


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", ["1e-5", -1e-5, 0, True, [1e-5], {}, math.nan, math.inf, 10**400], ids=str)
def test_numbers_that_are_none(key: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^x\.json.* has {key} = .*; it must be a positive number"):
        read_config(hf_config(**{key: value}), "x.json")


WRONG_TYPES = [
    ("rope_scaling", "linear"),
    ("rope_scaling", ["llama3"]),
    ("rope_scaling", False),
    ("rope_parameters", "default"),
    ("rope_parameters", []),
    ("layer_types", 5),
    ("layer_types", "full_attention"),
    ("layer_types", [["full_attention"], {}, 1]),
    ("architectures", "LlamaForCausalLM"),
    ("architectures", 3),
    ("architectures", [["LlamaForCausalLM"], {}]),
    ("model_type", ["llama"]),
    ("tie_word_embeddings", "false"),
    ("hidden_act", ["silu"]),
    ("attention_bias", {}),
    ("gluprune", True),
    ("gluprune", {"intermediate_sizes": 80}),
    ("gluprune", {"intermediate_sizes": [80, 80]}),
    ("gluprune", {"intermediate_sizes": [80, 80, 81]}),
    ("gluprune", {"intermediate_sizes": [80, 80, 0]}),
    ("gluprune", {"intermediate_sizes": [80, 80, 8.0]}),
    ("gluprune", {"intermediate_sizes": [80, 80, True]}),
    ("gluprune", {"intermediate_sizes": [80, 80, 80], "version": 2}),
]


@pytest.mark.parametrize(("key", "value"), WRONG_TYPES, ids=str)
def test_values_of_a_wrong_type(key: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^x\.json.*{key}"):
        read_config(hf_config(**{key: value}), "x.json")


@pytest.mark.parametrize("data", [[], "llama", 3, None, [hf_config()]], ids=str)
def test_a_config_that_is_no_object(data: Any) -> None:
    with pytest.raises(OperationError, match=r"^x\.json is no model config: it holds .* instead of an object"):
        read_config(data, "x.json")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**18, 10**30, 10**400, 2**31, -1, 0])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["llama3", "default", "full_attention", "silu"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ROPE = st.dictionaries(
    st.sampled_from([*LLAMA3_ROPE, "type", "rope_theta", "partial_rotary_factor"]), JSON, min_size=1, max_size=4
)
VALUES = (
    JSON
    | ROPE
    | st.builds(lambda changes: LLAMA3_ROPE | changes, ROPE)
    | st.builds(lambda sizes: {"intermediate_sizes": sizes}, JSON | st.lists(st.integers(0, 90), max_size=4))
)
KEYS = sorted(
    {*hf_config(), *ONLY_THESE_VALUES, "rope_parameters", "layer_types", "gluprune", "dtype"}
    | {"auto_map", "original_max_position_embeddings", "to_dict", "__dict__"}
)


@settings(max_examples=1500, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), VALUES, min_size=1, max_size=3))
def test_any_json_is_read_or_refused(changes: dict[str, Any]) -> None:
    data = hf_config() | changes
    config = None
    try:
        config, rest = read_config(data)
    except GlupruneError as error:
        said = str(error)
    else:
        said = listed(accepted_without_effect(data))
    assert len(said) <= 500
    assert "\n" not in said
    if config is None:
        return
    written = json.loads(json.dumps(write_config(config, rest, np.dtype(np.float32))))
    assert read_config(written)[0] == config


# ------------------------------------------------------------------------------------------------------- writing

POSITIVE = st.floats(1e-12, 1e12)


@st.composite
def scalings(draw: st.DrawFn) -> Llama3Rope:
    low = draw(st.floats(0.1, 8))
    return Llama3Rope(draw(st.floats(1, 64)), low, low + draw(st.floats(0.1, 8)), draw(st.integers(1, 10**6)))


@st.composite
def configs(draw: st.DrawFn, family: str) -> ModelConfig:
    groups = draw(st.integers(1, 16))
    layers = draw(st.integers(1, 20))
    widths = draw(
        st.integers(1, 10**5).map(lambda width: [width] * layers)
        | st.lists(st.integers(1, 10**5), min_size=layers, max_size=layers)
    )
    window = st.none() | st.integers(1, 10**6) if family == "mistral" else st.none()
    return ModelConfig(
        vocab_size=draw(st.integers(1, 10**6)),
        hidden_size=draw(st.integers(1, 10**5)),
        intermediate_sizes=tuple(widths),
        num_attention_heads=groups * draw(st.integers(1, 8)),
        num_key_value_heads=groups,
        head_dim=2 * draw(st.integers(1, 128)),
        max_position_embeddings=draw(st.integers(1, 10**7)),
        rms_norm_eps=draw(POSITIVE),
        attention=(LayerAttention(Rope(draw(POSITIVE), draw(st.none() | scalings())), draw(window)),) * layers,
        tie_word_embeddings=draw(st.booleans()),
        width_multiple=draw(st.sampled_from([1, 8, 128])),
    )


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["llama", "mistral"]), st.data(), st.sampled_from(sorted(DTYPES)))
def test_every_config_survives_the_way_there_and_back(family: str, data: st.DataObject, dtype: str) -> None:
    config = data.draw(configs(family))
    rest = {"model_type": family, "eos_token_id": [7, 8], "pretraining_tp": 1}
    written = json.loads(json.dumps(write_config(config, rest, np.dtype(DTYPES[dtype]))))
    logical = dataclasses.replace(config, width_multiple=1)
    again, rest_again = read_config(written)
    assert again == logical
    assert rest_again.items() >= rest.items()
    assert written["dtype"] == written["torch_dtype"] == dtype
    assert written["intermediate_size"] == max(config.intermediate_sizes)
    assert write_config(again, rest_again, np.dtype(DTYPES[dtype])) == written, "a second way changes something"
    assert write_config(logical, rest, np.dtype(DTYPES[dtype])) == written, "storage padding shows"


@pytest.mark.parametrize("spelling", ["both", "transformers 5", "transformers 4"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_what_we_write_is_understood_by_transformers(tmp_path: Path, name: str, spelling: str) -> None:
    """By the installed one; tests/test_huggingface.py asks transformers 4. For the fifth, either spelling is enough."""
    transformers = pytest.importorskip("transformers")
    major = int(transformers.__version__.split(".")[0])
    if major < 5 and spelling == "transformers 5":
        pytest.skip("transformers 4 knows one spelling")
    config, rest = read_config(PUBLISHED[name][0])
    written = write_config(config, rest, np.dtype(DTYPES["bfloat16"]))
    dropped = {"both": (), "transformers 5": ("rope_theta", "rope_scaling", "torch_dtype")}
    for key in dropped.get(spelling, ("rope_parameters", "dtype")):
        del written[key]
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == rest["model_type"]
    for field in dataclasses.fields(config):
        if hasattr(theirs, field.name):
            assert getattr(theirs, field.name) == getattr(config, field.name), field.name
    assert theirs.num_hidden_layers == config.num_hidden_layers
    assert theirs.intermediate_size == config.intermediate_sizes[0]
    assert str(theirs.dtype).removeprefix("torch.") == "bfloat16"
    assert theirs.eos_token_id == rest["eos_token_id"]
    assert getattr(theirs, "sliding_window", None) is None
    if major >= 5:
        rope = dict(theirs.rope_parameters)
    else:
        rope = {"rope_theta": theirs.rope_theta} | (getattr(theirs, "rope_scaling", None) or {"rope_type": "default"})
    ours = config.attention[0].rope
    assert ours is not None
    expected: dict[str, Any] = {"rope_theta": ours.theta, "rope_type": "default"}
    if ours.scaling is not None:
        expected |= {"rope_type": "llama3"} | dataclasses.asdict(ours.scaling)
    assert rope == expected


# ----------------------------------------------------------------------------------------- the keys of transformers


def test_the_tables_do_not_contradict_each_other() -> None:
    assert not INERT_KEYS & ONLY_THESE_VALUES.keys()
    for model_type, family in FAMILIES.items():
        only = convert.huggingface.config._only(model_type).keys()
        assert not family.inert & (INERT_KEYS | only | convert.huggingface.config._architecture_keys(model_type))
        assert not (INERT_KEYS | family.inert | only) & convert.huggingface.config._OF_NO_CONCERN


@functools.cache
def installed_table() -> tuple[str, dict[str, dict[str, str]]]:
    """What `benchmarks/config_keys.py` derives from the installed transformers, and which one that is."""
    pytest.importorskip("transformers")
    script = runpy.run_path(str(ROOT / "benchmarks" / "config_keys.py"))
    ((version, found),) = script["table"]().items()
    return version, found


def recorded(table: dict[str, dict[str, str]], model_type: str, part: str) -> set[str]:
    """Keys of a family, which stand under its name or with those of all."""
    return set(f"{table['all'][part]} {table[model_type][part]}".split())


def undecided(table: dict[str, dict[str, str]]) -> dict[str, set[str]]:
    """Keys that mean something to transformers and that no table of ours has, so that they would pass."""
    missing = {}
    for model_type, family in FAMILIES.items():
        ours = {
            *INERT_KEYS,
            *family.inert,
            *convert.huggingface.config._only(model_type),
            *convert.huggingface.config._OF_NO_CONCERN,
            *convert.huggingface.config._architecture_keys(model_type),
        }
        known = recorded(table, model_type, "takes") | recorded(table, model_type, "reads")
        missing[model_type] = known - ours
    return {model_type: keys for model_type, keys in missing.items() if keys}


RECORDED = json.loads((ROOT / "convert" / "huggingface" / "config_keys.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("version", RECORDED)
def test_every_recorded_key_is_decided_on(version: str) -> None:
    assert undecided(RECORDED[version]) == {}


def test_the_installed_transformers_has_no_key_that_would_pass_unseen() -> None:
    """One of another version than the recorded ones may have fewer keys, and others only if we know them."""
    version, found = installed_table()
    if version in RECORDED:
        assert found == RECORDED[version], "run benchmarks/config_keys.py --write"
    assert undecided(found) == {}, "decide in convert/huggingface/config.py what they mean"
    assert set(found["rope"]["keys"].split()) <= convert.huggingface.config.ROPE_KEYS


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_change_what_transformers_computes_are_found(family: str) -> None:
    """So that the scan of its source cannot become empty unseen."""
    _, found = installed_table()
    assert {"tie_word_embeddings", "rms_norm_eps", *FAMILIES[family].widths} <= recorded(found, family, "takes")
    assert {"attention_chunk_size", "transformers_weights"} <= recorded(found, family, "reads")
    assert {"to_dict", "from_pretrained"} <= recorded(found, family, "members")
    assert ("attention_bias" in recorded(found, family, "takes")) == (family not in ("mistral", "phi3", "qwen2"))
