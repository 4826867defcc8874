"""`config.json` of every family: published ones, all spellings, absent keys and nulls, both ways, refusals."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_configs import (
    LINEAR,
    LLAMA3,
    LONG,
    MULTIMODAL,
    NEEDED,
    PUBLISHED,
    SPARSE,
    YARN,
    gemma3_layers,
    plain,
    tiny,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.families.family import FULL, SLIDING
from convert.families.refused import REFUSED
from convert.families.registry import FAMILIES
from convert.huggingface.config import accepted_without_effect, read_config, write_config
from gluprune_jax.errors import GlupruneError, RequestError, listed
from gluprune_jax.models.config import LayerAttention, LinearRope, Llama3Rope, LongRope, ModelConfig, Rope, YarnRope

ROOT = Path(__file__).resolve().parents[3]
FLOAT32 = np.dtype(np.float32)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_right(name: str) -> None:
    data, head_dim, attention, fields, parameters = PUBLISHED[name]
    config, rest = read_config(data)
    expected = ModelConfig(
        vocab_size=data["vocab_size"],
        hidden_size=data["hidden_size"],
        intermediate_sizes=(data["intermediate_size"],) * data["num_hidden_layers"],
        num_attention_heads=data["num_attention_heads"],
        num_key_value_heads=data["num_key_value_heads"],
        head_dim=head_dim,
        max_position_embeddings=data["max_position_embeddings"],
        rms_norm_eps=data["rms_norm_eps"],
        attention=attention,
        **fields,
    )
    assert [layer.window for layer in config.attention] == [layer.window for layer in attention]
    assert dataclasses.replace(config, attention=attention) == expected
    for layer, wanted in zip(config.attention, attention, strict=True):
        assert (layer.rope is None) == (wanted.rope is None)
        if layer.rope and wanted.rope:
            assert dataclasses.replace(layer.rope, scaling=None) == dataclasses.replace(wanted.rope, scaling=None)
            assert_same_scaling(layer.rope.scaling, wanted.rope.scaling)
    if parameters is not None:
        assert config.num_parameters == parameters
    assert rest["model_type"] == data["model_type"]
    assert "auto_map" not in rest


def assert_same_scaling(got: Any, wanted: Any) -> None:
    """Up to the last bit of a logarithm."""
    assert type(got) is type(wanted)
    if isinstance(wanted, YarnRope | LongRope):
        assert got.attention_factor == pytest.approx(wanted.attention_factor, rel=1e-14)
        wanted = dataclasses.replace(wanted, attention_factor=got.attention_factor)
    assert got == wanted


def test_the_text_half_of_a_multimodal_model_says_only_what_is_not_the_default() -> None:
    config, rest = read_config(MULTIMODAL | {"text_config": SPARSE})
    assert config.attention == gemma3_layers(34, 1024, LinearRope(8.0))
    assert (config.vocab_size, config.num_attention_heads, config.num_key_value_heads) == (262208, 8, 4)
    assert (config.head_dim, config.max_position_embeddings, config.tie_word_embeddings) == (256, 131072, True)
    assert rest["eos_token_id"] == [1, 106]
    assert not rest.keys() & {"vision_config", "text_config", "image_token_index", "mm_tokens_per_image"}
    written = write_config(config, rest, FLOAT32)
    assert (written["model_type"], written["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert accepted_without_effect(MULTIMODAL | {"text_config": SPARSE})[:3] == [
        "image_token_index",
        "mm_tokens_per_image",
        "vision_config",
    ]


def test_the_sizes_of_larger_multimodal_models() -> None:
    text = SPARSE | {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48}
    config, _ = read_config(MULTIMODAL | {"text_config": text | {"num_attention_heads": 16, "num_key_value_heads": 8}})
    assert (config.head_dim, config.attention_scale, config.embedding_scale) == (256, None, 3840**0.5)
    text |= {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32}
    text |= {"num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168}
    config, rest = read_config(MULTIMODAL | {"text_config": text})
    assert config.attention_scale == 168**-0.5
    assert write_config(config, rest, FLOAT32)["query_pre_attn_scalar"] == 168


def test_keys_of_the_multimodal_model_are_not_those_of_its_text_half() -> None:
    """transformers looks for the architecture in `text_config` alone."""
    outer = {"num_attention_heads": 3, "rope_theta": 5.0, "hidden_activation": "relu", "sliding_window": 7}
    assert read_config(MULTIMODAL | outer | {"text_config": SPARSE}) == read_config(
        MULTIMODAL | {"text_config": SPARSE}
    )


# --------------------------------------------------------------------------------------------------- spellings

SCALINGS: dict[str, dict[str, Any] | None] = {"default": None, "linear": LINEAR, "llama3": LLAMA3, "yarn": YARN}
FLAT = [name for name, family in FAMILIES.items() if not family.thetas]
NESTED = [name for name, family in FAMILIES.items() if family.thetas]


def scalings_of(model_type: str) -> dict[str, dict[str, Any] | None]:
    return {"default": None} if model_type == "phi3" else SCALINGS


FLAT_CASES = [(name, kind) for name in FLAT for kind in scalings_of(name)]


@pytest.mark.parametrize(("model_type", "kind"), FLAT_CASES)
def test_old_and_new_spelling_mean_the_same(model_type: str, kind: str) -> None:
    scaling = SCALINGS[kind]
    old = tiny(model_type, rope_theta=2000.0, rope_scaling=scaling)
    new = tiny(model_type, rope_parameters={"rope_type": "default", "rope_theta": 2000.0} | (scaling or {}))
    config, rest = read_config(old)
    assert read_config(new)[0] == read_config(new | old)[0] == config
    ropes = {layer.rope for layer in config.attention} - {None}
    assert {rope.theta for rope in ropes if rope} == {2000.0}
    assert {rope.in_float32 for rope in ropes if rope} == {model_type == "olmo2"}
    written = write_config(config, rest, FLOAT32)
    both = ("rope_theta", "rope_scaling")
    assert read_config({key: value for key, value in written.items() if key not in both})[0] == config
    assert read_config({key: value for key, value in written.items() if key != "rope_parameters"})[0] == config
    with pytest.raises(RequestError, match="says two things about RoPE"):
        read_config(new | old | {"rope_theta": 3000.0})


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("model_type", NESTED)
def test_nested_and_old_spelling_mean_the_same(model_type: str, kind: str) -> None:
    scaling, local = SCALINGS[kind], 50.0 if model_type == "gemma3_text" else 2000.0
    base = tiny(model_type) | ({"sliding_window_pattern": 2} if model_type == "gemma3_text" else {})
    old: dict[str, Any] = {"rope_theta": 2000.0, "rope_scaling": scaling}
    old |= {"rope_local_base_freq": 50.0} if model_type == "gemma3_text" else {}
    full, sliding = {"rope_type": "default"} | (scaling or {}), {"rope_type": "default"}
    entries = {FULL: full | {"rope_theta": 2000.0}, SLIDING: sliding | {"rope_theta": local}}
    new = base | {"rope_parameters": entries}
    config, rest = read_config(base | old)
    assert read_config(new)[0] == read_config(new | old)[0] == config
    ropes = {layer.window: layer.rope for layer in config.attention}
    assert ropes[4096] == Rope(local, in_float32=model_type == "olmo3")
    of_full_layers = ropes[None]
    assert of_full_layers is not None
    assert of_full_layers.theta == 2000.0
    assert (of_full_layers.scaling is None) == (kind == "default")
    written = write_config(config, rest, FLOAT32)
    assert written["rope_parameters"].keys() == {FULL, SLIDING}
    assert {written["rope_parameters"][one]["rope_theta"] for one in (FULL, SLIDING)} == {2000.0, local}
    assert read_config({key: value for key, value in written.items() if key not in old})[0] == config
    assert read_config({key: value for key, value in written.items() if key != "rope_parameters"})[0] == config
    for changed in ({"rope_theta": 3000.0}, {"rope_scaling": LINEAR | {"factor": 3.0}}):
        with pytest.raises(RequestError, match=r"two things about RoPE|must be the same"):
            read_config(new | changed)


def test_nested_entries_without_a_base_have_the_old_one() -> None:
    """TranslateGemma: the scaling stands in the new spelling alone, and the bases in the old one."""
    entries = {FULL: {"rope_type": "linear", "factor": 8.0}, SLIDING: {"rope_type": "default"}}
    text = {key: value for key, value in SPARSE.items() if key != "rope_scaling"} | {"rope_scaling": None}
    text |= {"rope_parameters": entries, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}
    assert read_config(MULTIMODAL | {"text_config": text})[0].attention == gemma3_layers(34, 1024, LinearRope(8.0))


def test_flat_rope_parameters_where_they_should_be_nested() -> None:
    flat = {"rope_parameters": YARN | {"rope_theta": 2000.0}}
    classic = tiny("olmo3", rope_theta=2000.0, rope_scaling=YARN)
    assert read_config(tiny("olmo3", **flat))[0] == read_config(classic)[0]
    with pytest.raises(
        RequestError, match="rope_parameters without full_attention and sliding_attention; Gemma 3 has a"
    ):
        read_config(tiny("gemma3_text", **flat))


@pytest.mark.parametrize("kind", [FULL, SLIDING])
@pytest.mark.parametrize("value", [True, 5, "linear", {"rope_type": "linear", "factor": 2.0}])
def test_layer_types_within_rope_scaling(kind: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"rope_scaling has keys that rope_type 'default' does not: {kind}"):
        read_config(tiny("gemma3_text", rope_scaling={kind: value}))


def test_the_old_base_of_olmo3_is_that_of_all_layers() -> None:
    config, rest = read_config(tiny("olmo3", rope_theta=2000.0))
    assert {layer.rope.theta for layer in config.attention if layer.rope} == {2000.0}
    written = write_config(config, rest, FLOAT32)
    assert written["rope_parameters"][SLIDING]["rope_theta"] == 2000.0
    assert written["rope_theta"] == 2000.0


def test_two_bases_of_olmo3_are_written_in_the_new_spelling_alone() -> None:
    """As transformers 5 saves what it has misread."""
    entries = {
        FULL: {"rope_type": "default", "rope_theta": 2000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 5e5},
    }
    config, rest = read_config(tiny("olmo3", rope_parameters=entries))
    written = write_config(config, rest, FLOAT32)
    assert written["rope_parameters"] == entries
    assert not written.keys() & {"rope_theta", "rope_scaling"}


PHI3_ROPE = {"partial_rotary_factor": 0.5, "head_dim": 16, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_the_names_of_longrope(key: str, kind: str) -> None:
    old = tiny("phi3", **PHI3_ROPE, rope_scaling={key: kind, **LONG})
    config, rest = read_config(old)
    factor = (1 + np.log(8) / np.log(64)) ** 0.5
    rope = config.attention[0].rope
    assert rope is not None
    assert_same_scaling(rope.scaling, LongRope((1.0, 1.5, 2.0, 2.5), (1.0, 3.0, 5.0, 7.0), 64, factor))
    assert rope.rotary_dim == 8
    new = {"rope_type": "longrope", **LONG, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    only_new = tiny("phi3", head_dim=16, original_max_position_embeddings=64, rope_parameters=new)
    assert read_config(only_new)[0] == config
    written = write_config(config, rest, FLOAT32)
    assert written["rope_scaling"] == {"type": "longrope", **LONG}, "transformers 4 takes exactly three keys"
    assert (written["original_max_position_embeddings"], written["partial_rotary_factor"]) == (64, 0.5)
    within = {"rope_type": "longrope", **LONG, "original_max_position_embeddings": 9}
    assert read_config(tiny("phi3", **PHI3_ROPE, rope_parameters=within))[0] == config, "the outer one does not win"


def test_an_attention_factor_of_its_own() -> None:
    data = tiny("phi3", **PHI3_ROPE, rope_parameters={"rope_type": "longrope", **LONG, "attention_factor": 1.5})
    config, rest = read_config(data)
    assert write_config(config, rest, FLOAT32)["rope_scaling"]["attention_factor"] == 1.5
    config, _ = read_config(tiny("qwen2", rope_scaling=YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}))
    rope = config.attention[0].rope
    assert rope is not None
    assert isinstance(rope.scaling, YarnRope)
    assert rope.scaling.attention_factor == pytest.approx((0.2 * np.log(4) + 1) / (0.05 * np.log(4) + 1))
    config, rest = read_config(tiny("qwen2", rope_scaling=YARN | {"truncate": False}))
    assert write_config(config, rest, FLOAT32)["rope_scaling"]["truncate"] is False


# ------------------------------------------------------------------------------------- absent, null, switched off


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_keys_mean_what_transformers_takes_them_for(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    data = {key: tiny(model_type)[key] for key in needed} | {"num_attention_heads": 32, "hidden_size": 1024}
    data |= NEEDED[model_type] | {"model_type": model_type}
    config, _ = read_config(data)
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(data)), pad_token_id=0)
    assert config.num_key_value_heads == theirs.num_key_value_heads
    assert config.head_dim == (getattr(theirs, "head_dim", None) or 1024 // 32)
    for field in ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, field) == getattr(theirs, field), field
    if int(transformers.__version__.split(".")[0]) < 5:
        return
    kinds = getattr(theirs, "layer_types", None)
    rotate = getattr(theirs, "no_rope_layers", None) or [1] * 4
    for i, layer in enumerate(config.attention):
        kind = kinds[i] if kinds else FULL if getattr(theirs, "sliding_window", None) is None else SLIDING
        assert layer.window == (theirs.sliding_window if kind == SLIDING else None), i
        rope = theirs.rope_parameters.get(kind, theirs.rope_parameters)
        assert (None if layer.rope is None else layer.rope.theta) == (rope["rope_theta"] if rotate[i] else None), i


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_transformers_writes_is_read(model_type: str, full: bool) -> None:
    """Every key that this version of transformers knows, where `full`."""
    transformers = pytest.importorskip("transformers")
    data = tiny(model_type, head_dim=8)
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(data)), pad_token_id=0)
    saved = {"model_type": model_type} | json.loads(theirs.to_json_string(use_diff=not full))
    assert read_config(saved)[0] == read_config(data)[0]


def test_no_bias_is_an_option_of_qwen2() -> None:
    assert read_config(tiny("qwen2", attention_bias=False))[0].qkv_bias
    assert not read_config(tiny("qwen2", attention_bias=True))[0].output_bias


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.flags])
def test_biases_of_queries_keys_values_and_output(model_type: str) -> None:
    config, rest = read_config(tiny(model_type, attention_bias=True))
    assert (config.qkv_bias, config.output_bias) == (True, True)
    assert write_config(config, rest, FLOAT32)["attention_bias"] is True
    assert not read_config(tiny(model_type))[0].qkv_bias


def test_null_is_not_absent() -> None:
    assert read_config(tiny("mistral"))[0].attention[0].window == 4096
    assert read_config(tiny("mistral", sliding_window=None))[0].attention[0].window is None
    without = {key: value for key, value in tiny("qwen2").items() if key != "num_key_value_heads"}
    without |= {"num_attention_heads": 48, "hidden_size": 384}
    with pytest.raises(RequestError, match="num_attention_heads = 48 and num_key_value_heads = 32"):
        read_config(without)
    assert read_config(without | {"num_key_value_heads": None})[0].num_key_value_heads == 48
    config, _ = read_config(tiny("gemma2"))
    assert (config.attention_soft_cap, config.logit_soft_cap) == (50.0, 30.0)
    config, rest = read_config(tiny("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None))
    assert (config.attention_soft_cap, config.logit_soft_cap) == (None, None)
    assert write_config(config, rest, FLOAT32)["attn_logit_softcapping"] is None
    assert read_config(tiny("smollm3"))[0].head_dim == 8
    assert read_config(tiny("smollm3", head_dim=None))[0].head_dim == 8
    for model_type, size in (("qwen3", 128), ("gemma", 256), ("gemma2", 256), ("gemma3_text", 256)):
        assert read_config(tiny(model_type))[0].head_dim == size
        with pytest.raises(RequestError, match="has no head_dim; it must be a whole number"):
            read_config(tiny(model_type, head_dim=None))


def windows(model_type: str, **keys: Any) -> list[int | None]:
    return [layer.window for layer in read_config(tiny(model_type, **keys))[0].attention]


def test_windows() -> None:
    switched = {"use_sliding_window": True, "sliding_window": 5}
    for model_type in ("qwen2", "qwen3"):
        assert windows(model_type, sliding_window=5, max_window_layers=1) == [None] * 4
        assert windows(model_type, **switched) == [None] * 4, "28 layers are full by default"
        assert windows(model_type, **switched, max_window_layers=3) == [None, None, None, 5]
        assert windows(model_type, **switched, max_window_layers=0) == [5] * 4
        listed = [SLIDING, FULL, FULL, SLIDING]
        assert windows(model_type, **switched, layer_types=listed) == [5, None, None, 5], "the list does not win"
    assert windows("smollm3", **switched) == [None, None, None, 5], "the layers without RoPE slide"
    assert windows("smollm3", sliding_window=5) == [None] * 4
    assert windows("gemma2", sliding_window=5) == [5, None, 5, None]
    assert windows("gemma3_text", sliding_window=5, sliding_window_pattern=2) == [5, None, 5, None]
    assert windows("gemma3_text", sliding_window=5, _sliding_window_pattern=2) == [5] * 4
    assert windows("olmo3", sliding_window=5) == [5, 5, 5, None]
    assert windows("phi3") == [None] * 4
    assert windows("phi3", sliding_window=2047) == [2047] * 4


def test_layers_without_rope() -> None:
    def rotating(model_type: str, **keys: Any) -> list[bool]:
        return [layer.rope is not None for layer in read_config(tiny(model_type, **keys))[0].attention]

    assert rotating("smollm3") == [True, True, True, False]
    assert rotating("smollm3", no_rope_layer_interval=2) == [True, False, True, False]
    assert rotating("smollm3", no_rope_layers=[1, 0, 0, 1, 1, 0]) == [True, False, False, True], "1 means rotate"
    assert rotating("granitemoehybrid") == [True] * 4
    for kind in ("nope", None):
        assert rotating("granitemoehybrid", position_embedding_type=kind) == [False] * 4
    absent = {key: value for key, value in tiny("granitemoehybrid").items() if key != "position_embedding_type"}
    config, rest = read_config(absent)
    assert {layer.rope for layer in config.attention} == {None}
    assert write_config(config, rest, FLOAT32)["position_embedding_type"] == "nope"


def test_the_width_of_granite_4_is_that_of_the_shared_mlp() -> None:
    config, rest = read_config(tiny("granitemoehybrid", intermediate_size=7))
    assert config.intermediate_sizes == (80,) * 4
    pruned = dataclasses.replace(config, intermediate_sizes=(60,) * 4)
    written = write_config(pruned, rest, FLOAT32)
    assert (written["shared_intermediate_size"], written["intermediate_size"]) == (60, 60)
    assert written["layer_types"] == ["attention"] * 4, "transformers 4 takes no other name"
    five = tiny("granitemoehybrid", layer_types=[FULL] * 4)
    assert read_config(five)[0] == config, "what transformers 5 writes"


def test_what_gemma_calls_its_activation() -> None:
    for name in ("gelu", "gelu_pytorch_tanh"):
        config, rest = read_config(tiny("gemma", hidden_act=name))
        assert config.activation == "gelu_tanh"
        assert write_config(config, rest, FLOAT32)["hidden_act"] == "gelu_pytorch_tanh"
    with pytest.raises(RequestError, match="hidden_activation = 'gelu'"):
        read_config(tiny("gemma2", hidden_activation="gelu"))


def test_the_soft_cap_that_gemma_3_ignores_is_noted() -> None:
    data = tiny("gemma3_text", attn_logit_softcapping=50.0)
    assert read_config(data)[0] == read_config(tiny("gemma3_text"))[0]
    assert "attn_logit_softcapping" in accepted_without_effect(data)
    assert read_config(tiny("gemma3_text", final_logit_softcapping=30.0))[0].logit_soft_cap == 30.0


# ------------------------------------------------------------------------------------------------------ refusals

SLIDE = [SLIDING, FULL, FULL, FULL]
FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "a window without a value": (
        tiny("gemma2", sliding_window=None),
        "has no sliding_window; it must be a whole number",
    ),
    "a window switched off": (tiny("qwen2", layer_types=SLIDE), "in layer_types and use_sliding_window = False"),
    "a switch of text": (tiny("qwen2", use_sliding_window="no"), "use_sliding_window = 'no'"),
    "chunks": (tiny("gemma2", layer_types=["chunked_attention"] * 4), r"layer_types = \['chunked_attention'"),
    "too few": (tiny("gemma2", layer_types=[FULL] * 3), r"3 times 'full_attention' \(supported: once for each of 4"),
    "windows of Mistral": (tiny("mistral", layer_types=SLIDE), r"layer_types = \['sliding_attention'\]"),
    "Mamba": (tiny("granitemoehybrid", layer_types=["mamba"] * 4), r"layer_types = \['mamba', .*'attention' or 'full_"),
    "Mamba by default": (
        tiny("granitemoehybrid", layer_types=None),
        "has no layer_types, which means 'mamba' for all 4",
    ),
    "experts of Granite 4": (tiny("granitemoehybrid", num_local_experts=64), "num_local_experts = 64"),
    "another position": (
        tiny("granitemoehybrid", position_embedding_type="alibi"),
        "position_embedding_type = 'alibi'",
    ),
    "no list of NoPE layers": (tiny("smollm3", no_rope_layers=[]), r"no_rope_layers = \[\]; it must be a list"),
    "EmbeddingGemma": (tiny("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention = True"),
    "mlp_bias": (tiny("granite", mlp_bias=True), "mlp_bias = True"),
    "a bias of text": (tiny("qwen3", attention_bias="yes"), "attention_bias = 'yes'"),
    "untied by null": (tiny("gemma", tie_word_embeddings=None), "tie_word_embeddings = None"),
    "a scale that is none": (tiny("gemma2", query_pre_attn_scalar=0), "query_pre_attn_scalar = 0"),
    "a scale of a part": (
        tiny("gemma2", query_pre_attn_scalar=24.5),
        "query_pre_attn_scalar = 24.5; it must be a whole",
    ),
    "a multiplier of null": (tiny("granite", logits_scaling=None), "logits_scaling = None; it must be a positive"),
    "no period": (tiny("gemma3_text", sliding_window_pattern=0), "sliding_window_pattern = 0"),
    "dynamic": (tiny("qwen2", rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type 'dynamic'; supported are"),
    "llama3 of Phi-3": (tiny("phi3", rope_scaling=LLAMA3), "rope_type 'llama3'; supported are"),
    "longrope elsewhere": (tiny("qwen2", rope_scaling={"type": "longrope", **LONG}), "rope_type 'longrope'"),
    "factors missing": (tiny("phi3", rope_scaling={"type": "longrope"}), "short_factor = None; it must be a list"),
    "factors of another head": (tiny("phi3", rope_scaling={"type": "longrope", **LONG}, head_dim=16), "4 numbers in"),
    "more than all": (tiny("phi3", partial_rotary_factor=1.5), "partial_rotary_factor = 1.5"),
    "partial Qwen": (tiny("qwen3", partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
    "truncate of text": (tiny("qwen2", rope_scaling=YARN | {"truncate": 1}), "truncate = 1"),
    "truncate where 5 does not look": (tiny("olmo3", rope_scaling=YARN | {"truncate": False}), "truncate = False"),
    "a third kind": (tiny("olmo3", rope_parameters={FULL: {}, "chunked_attention": {}}), "chunked_attention beside"),
    "an entry that is none": (tiny("olmo3", rope_parameters={FULL: 3}), "full_attention = 3; it must be an object"),
    "nested in a flat family": (
        tiny("qwen2", rope_parameters={FULL: LINEAR}),
        "keys that rope_type 'default' does not",
    ),
    "no text half": (MULTIMODAL, "text_config None; of such a model the text half is read"),
    "another text half": (MULTIMODAL | {"text_config": {"model_type": "llama"}}, r"{'model_type': 'llama'}"),
    "two ties": (MULTIMODAL | {"text_config": SPARSE | {"tie_word_embeddings": False}}, "must be the same"),
    "another head": (MULTIMODAL | {"text_config": SPARSE, "architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
    "quantised": (MULTIMODAL | {"text_config": SPARSE, "quantization_config": {"bits": 4}}, "quantization_config = "),
}
FOREIGN |= {model_type: (tiny("llama") | {"model_type": model_type}, REFUSED[model_type]) for model_type in REFUSED}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_supported_is_refused_by_name(name: str) -> None:
    data, message = FOREIGN[name]
    with pytest.raises(RequestError, match=f"^some/config.json.*{message}") as caught:
        read_config(data, "some/config.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 500


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**18, 10**400, 2**31, 0.5, 2, 1, 0, -1])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["linear", "yarn", "longrope", "default", FULL, SLIDING, "attention", "rope"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SCALING = st.dictionaries(st.sampled_from(sorted({*YARN, *LONG, *LLAMA3, "type", "rope_theta", "truncate"})), JSON)
SCALING |= st.builds(lambda whole, part: whole | part, st.sampled_from([YARN, LINEAR, LLAMA3, LONG]), SCALING)
ENTRIES = st.dictionaries(st.sampled_from([FULL, SLIDING]), SCALING | JSON)
KINDS = st.lists(st.sampled_from([FULL, SLIDING, "attention"]) | st.integers(0, 1), min_size=3, max_size=5)


def keys_of(model_type: str) -> list[str]:
    family = FAMILIES[model_type]
    keys = {*tiny(model_type), *family.defaults, *family.only, *(number.key for number in family.numbers.values())}
    return sorted(keys | {*family.flags.values(), *family.inert, "rope_scaling", "rope_parameters", "layer_types"})


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from([*FAMILIES, "gemma3"]), st.data())
def test_any_json_is_read_or_refused(model_type: str, data: st.DataObject) -> None:
    wrapped = model_type == "gemma3"
    keys = st.sampled_from(keys_of("gemma3_text" if wrapped else model_type)) | st.text(max_size=8)
    changes = data.draw(st.dictionaries(keys, JSON | SCALING | ENTRIES | KINDS, min_size=1, max_size=3))
    whole = MULTIMODAL | changes | {"text_config": SPARSE | changes} if wrapped else tiny(model_type) | changes
    config = None
    try:
        config, rest = read_config(whole)
        said = listed(accepted_without_effect(whole))
    except GlupruneError as error:
        said = str(error)
    assert len(said) <= 500
    assert "\n" not in said
    if config is not None:
        written = json.loads(json.dumps(write_config(config, rest, FLOAT32)))
        assert read_config(written)[0] == config


# ------------------------------------------------------------------------------------------------------- writing

POSITIVE = st.floats(1e-6, 1e6)
WINDOW = st.integers(1, 10**6)


@st.composite
def scaling_of(draw: st.DrawFn, model_type: str, half: int) -> Any:
    if model_type == "phi3":
        factors = st.lists(POSITIVE, min_size=half, max_size=half).map(tuple)
        long = st.builds(LongRope, factors, factors, st.integers(2, 10**6), POSITIVE)
        return draw(st.none() | long)
    low = draw(st.floats(0.1, 8))
    llama3 = st.builds(Llama3Rope, st.floats(1, 64), st.just(low), st.floats(low + 0.1, 20), st.integers(1, 10**6))
    truncate = st.just(True) if model_type in NESTED else st.booleans()
    yarn = st.builds(YarnRope, POSITIVE, st.integers(1, 10**6), POSITIVE, POSITIVE, POSITIVE, truncate)
    return draw(st.none() | st.builds(LinearRope, POSITIVE) | llama3 | yarn)


@st.composite
def configs(draw: st.DrawFn, model_type: str) -> ModelConfig:
    """Everything that a family can say."""
    family = FAMILIES[model_type]
    groups, layers, head_dim = draw(st.integers(1, 16)), draw(st.integers(1, 9)), 2 * draw(st.integers(1, 64))
    hidden = draw(st.integers(1, 10**5))
    widths = draw(st.lists(st.integers(1, 10**5), min_size=layers, max_size=layers))
    rotary = 2 * draw(st.integers(1, head_dim // 2)) if model_type == "phi3" else head_dim
    partial = None if rotary == head_dim else rotary
    full = Rope(draw(POSITIVE), draw(scaling_of(model_type, rotary // 2)), partial, family.rope_in_float32)
    sliding = full
    if family.thetas:
        one_base = len({*family.thetas.values()}) == 1
        sliding = Rope(full.theta if one_base else draw(POSITIVE), None, None, family.rope_in_float32)
    window = draw(WINDOW) if "sliding_window" in family.defaults and draw(st.booleans()) else None
    slides = [window is not None] * layers
    if "layer_types" in family.defaults and window is not None:
        slides = draw(st.lists(st.booleans(), min_size=layers, max_size=layers))
    rotates = [True] * layers
    if "no_rope_layers" in family.defaults:
        rotates = draw(st.lists(st.booleans(), min_size=layers, max_size=layers))
    elif "position_embedding_type" in family.defaults:
        rotates = [draw(st.booleans())] * layers
    attention = tuple(
        LayerAttention((sliding if slide else full) if rotate else None, window if slide else None)
        for slide, rotate in zip(slides, rotates, strict=True)
    )
    bias = draw(st.booleans())
    fields: dict[str, Any] = dict.fromkeys(family.flags, bias) | dict(family.fields)
    for field, number in family.numbers.items():
        given = hidden if number.key == "hidden_size" else draw(st.integers(1, 10**4) if number.whole else POSITIVE)
        fields[field] = None if number.optional and draw(st.booleans()) else given**number.power
    if fields.get("attention_scale") == head_dim**-0.5:
        fields["attention_scale"] = None
    return ModelConfig(
        vocab_size=draw(st.integers(1, 10**6)),
        hidden_size=hidden,
        intermediate_sizes=tuple(widths),
        num_attention_heads=groups * draw(st.integers(1, 8)),
        num_key_value_heads=groups,
        head_dim=head_dim,
        max_position_embeddings=draw(st.integers(1, 10**7)),
        rms_norm_eps=draw(POSITIVE),
        attention=attention,
        tie_word_embeddings=draw(st.booleans()),
        **fields,
    )


def without_nulls_that_are_refused(written: Mapping[str, Any]) -> bool:
    """Whether no size is null: transformers 5 takes no null for most of them."""
    return all(written[key] is not None for key in ("head_dim", "num_key_value_heads", "tie_word_embeddings"))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.data())
def test_every_config_survives_the_way_there_and_back(model_type: str, data: st.DataObject) -> None:
    config = data.draw(configs(model_type))
    rest = {"model_type": model_type, "eos_token_id": [7, 8], "pretraining_tp": 1}
    written = json.loads(json.dumps(write_config(config, rest, FLOAT32)))
    again, rest_again = read_config(written)
    assert again == config
    assert rest_again.items() >= rest.items()
    assert without_nulls_that_are_refused(written)
    assert write_config(again, rest_again, FLOAT32) == written, "a second way changes something"


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.data())
def test_layers_that_stay_attend_as_before(model_type: str, data: st.DataObject) -> None:
    config = data.draw(configs(model_type))
    some = st.sets(st.integers(0, config.num_hidden_layers - 1), min_size=1).map(sorted)
    pruned = config.with_layers(data.draw(some))
    assert read_config(write_config(pruned, {"model_type": model_type}, FLOAT32))[0] == pruned


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_pruned_model_says_how_each_of_its_layers_attends(name: str) -> None:
    config, rest = read_config(PUBLISHED[name][0])
    pruned = config.with_layers([0, 3, *range(5, config.num_hidden_layers, 3)])
    written = write_config(pruned, rest, FLOAT32)
    assert read_config(written)[0] == pruned
    for key in ("layer_types", "no_rope_layers"):
        assert len(written.get(key, pruned.attention)) == pruned.num_hidden_layers


WORDLESS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a window in Llama": ("llama", {"attention": plain(1e4, 1, 8)}, "attention"),
    "two windows": ("gemma2", {"attention": plain(1e4, 1, 8) + plain(1e4, 1, 9)}, "attention"),
    "a window in one layer of Mistral": ("mistral", {"attention": plain(1e4, 1, 8) + plain(1e4, 1)}, "attention"),
    "two bases": ("qwen3", {"attention": plain(1e4, 1) + plain(1e5, 1)}, "attention"),
    "no position in Qwen": ("qwen2", {"attention": (LayerAttention(None),)}, "attention"),
    "a soft cap in Llama": (
        "llama",
        {"attention_soft_cap": 50.0},
        "attention_soft_cap = 50.0 cannot be written as Llama",
    ),
    "Llama's norms in Gemma": ("gemma", {"norm": "cast_first"}, "norm = 'cast_first' cannot be written as Gemma"),
    "another scale of the embedding": ("gemma", {"embedding_scale": 3.0}, "embedding_scale = 3.0"),
}


@pytest.mark.parametrize("name", WORDLESS)
def test_what_a_family_has_no_words_for_is_not_written(name: str) -> None:
    model_type, changes, message = WORDLESS[name]
    config, rest = read_config(tiny(model_type))
    layers = len(changes.get("attention", config.attention))
    changed = dataclasses.replace(config.with_layers(range(layers)), **changes)
    with pytest.raises(RequestError, match=message) as caught:
        write_config(changed, rest, FLOAT32)
    assert len(str(caught.value)) <= 600


def test_the_documentation_lists_the_families() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    for model_type, family in FAMILIES.items():
        assert f"| `{model_type}` | {family.covers}" in page
