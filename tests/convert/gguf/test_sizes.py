"""Forecasts of GGUF sizes against figures that were measured with llama.cpp's own quantiser (docs/prune.md)."""

import dataclasses
import json

import gguf
import pytest
from gguf.constants import GGML_QUANT_SIZES

from convert.families.registry import FAMILIES
from convert.gguf.sizes import (
    BLOCKS,
    FILE_TYPES,
    check_file_type,
    forecast,
    metadata_bytes,
    quantisation_warning,
    tensor_bytes,
    tensor_type,
)
from gluprune_jax.errors import RequestError
from gluprune_jax.models.config import LayerAttention, ModelConfig, Rope

LLAMA = FAMILIES["llama"]
ROPE = LayerAttention(Rope(500000.0))
TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
MIB, MB = 1 << 20, 1_000_000
# MiB of tensors, by width and in the order of TYPES: the dry run of llama-quantize on the shapes of Llama 3.2 1B.
MEASURED_1B = {
    8192: (2357, 1252, 967, 862, 763, 728),
    7373: (2204, 1387, 1176, 1094, 1018, 1016),
    7360: (2201, 1170, 959, 842, 758, 684),
    7424: (2213, 1176, 908, 811, 719, 687),
    7168: (2165, 1150, 888, 794, 705, 674),
    6554: (2050, 1281, 1083, 1008, 938, 936),
    6656: (2069, 1099, 849, 760, 676, 647),
    5735: (1897, 1176, 989, 922, 858, 856),
    5632: (1877, 997, 770, 692, 618, 593),
    4916: (1743, 1070, 896, 835, 778, 776),
    4896: (1739, 924, 751, 666, 604, 554),
    4864: (1733, 921, 711, 640, 574, 552),
    3277: (1436, 859, 710, 662, 618, 616),
    3264: (1433, 762, 613, 550, 502, 468),
    3072: (1397, 742, 573, 521, 472, 458),
}
MEASURED_3B = {8192: 1918, 7373: 2588, 7360: 1905, 7168: 1766, 4916: 1958, 4864: 1422}  # Q4_K_M
# MB of tensors of Llama 3.2 1B, measured another time: Q4_K_M, and Q8_0 where it was.
MEASURED_AGAIN = {
    8192: (800, 1313),
    7373: (1067, 1454),
    6554: (983, 1344),
    4916: (816, 1122),
    4096: (556, 885),
    3277: (648, 901),
    6656: (708, None),
    6528: (740, 1139),
}
# MB of whole files of SmolLM2 135M, which has a tokenizer of 49,152 tokens.
MEASURED_SMOLLM2 = {
    1536: {"F16": 270.9, "Q8_0": 144.8, "Q4_K_M": 105.5, "Q4_0": 91.7},
    1383: {"Q8_0": 158.8, "Q4_K_M": 131.5, "Q4_0": 121.6},
    1376: {"Q4_K_M": 104.0},
    1408: {"Q8_0": 137.8, "Q4_K_M": 105.3, "Q4_0": 88.0},
    1280: {"Q4_K_M": 96.4},
}
SMOLLM2_METADATA = 1_785_664  # bytes of the file of the demo before its first tensor


def config(width: int, *, hidden: int, layers: int, heads: int, kv: int, head: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_sizes=(width,) * layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        attention=(ROPE,) * layers,
        tie_word_embeddings=True,
    )


def llama_1b(width: int) -> ModelConfig:
    return config(width, hidden=2048, layers=16, heads=32, kv=8, head=64, vocab=128256)


def llama_3b(width: int) -> ModelConfig:
    return config(width, hidden=3072, layers=28, heads=24, kv=8, head=128, vocab=128256)


def smollm2(width: int) -> ModelConfig:
    return config(width, hidden=576, layers=30, heads=9, kv=3, head=64, vocab=49152)


# --------------------------------------------------------------------------------------------- against llama.cpp


@pytest.mark.parametrize("width", MEASURED_1B)
def test_a_1b_model_in_six_types(width: int) -> None:
    found = [tensor_bytes(llama_1b(width), LLAMA, file_type) / MIB for file_type in TYPES]
    assert found == pytest.approx(MEASURED_1B[width], rel=0.002)


@pytest.mark.parametrize("width", MEASURED_AGAIN)
def test_a_1b_model_in_megabytes(width: int) -> None:
    for file_type, wanted in zip(("Q4_K_M", "Q8_0"), MEASURED_AGAIN[width], strict=True):
        if wanted is not None:
            assert tensor_bytes(llama_1b(width), LLAMA, file_type) / MB == pytest.approx(wanted, rel=0.002)


@pytest.mark.parametrize("width", MEASURED_3B)
def test_a_3b_model(width: int) -> None:
    assert tensor_bytes(llama_3b(width), LLAMA, "Q4_K_M") / MIB == pytest.approx(MEASURED_3B[width], rel=0.002)


@pytest.mark.parametrize("width", MEASURED_SMOLLM2)
def test_whole_files_of_a_model_whose_hidden_size_is_no_multiple_of_256(width: int) -> None:
    for file_type, wanted in MEASURED_SMOLLM2[width].items():
        found = tensor_bytes(smollm2(width), LLAMA, file_type) + SMOLLM2_METADATA
        assert found / MB == pytest.approx(wanted, rel=0.01), file_type


# -------------------------------------------------------------------------------------------------------- the rules


def test_blocks_are_those_of_the_format() -> None:
    assert {name: GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in BLOCKS} == dict(BLOCKS)


def down_types(file_type: str, width: int) -> list[str]:
    found = llama_1b(width)
    return [tensor_type(f"blk.{i}.ffn_down.weight", (2048, width), file_type, found) for i in range(16)]


@pytest.mark.parametrize(
    ("file_type", "width", "types"),
    [
        ("Q4_K_M", 7424, {"Q4_K", "Q6_K"}),
        ("Q4_K_M", 7360, {"Q5_0", "Q8_0"}),
        ("Q4_K_M", 7373, {"F16"}),
        ("Q5_K_M", 7360, {"Q5_1", "Q8_0"}),
        ("Q6_K", 7360, {"Q8_0"}),
        ("Q4_0", 7360, {"Q4_0"}),
        ("Q8_0", 7373, {"F16"}),
        ("BF16", 7373, {"BF16"}),
    ],
)
def test_the_type_of_down_projections_follows_from_the_width(file_type: str, width: int, types: set[str]) -> None:
    assert set(down_types(file_type, width)) == types


def test_the_first_and_last_layers_and_every_third_between_have_more_bits() -> None:
    more = [i for i, kind in enumerate(down_types("Q4_K_M", 8192)) if kind == "Q6_K"]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]


def test_norms_stay_and_the_embedding_is_finer_where_it_is_the_head_too() -> None:
    tied, untied = llama_1b(8192), dataclasses.replace(llama_1b(8192), tie_word_embeddings=False)
    assert tensor_type("output_norm.weight", (2048,), "Q4_K_M", tied) == "F32"
    assert tensor_type("token_embd.weight", (9, 2048), "Q4_K_M", tied) == "Q6_K"
    assert tensor_type("token_embd.weight", (9, 2048), "Q4_K_M", untied) == "Q4_K"
    assert tensor_type("output.weight", (9, 2048), "Q4_0", untied) == "Q6_K"
    assert tensor_type("output.weight", (9, 2048), "Q8_0", untied) == "Q8_0"


def test_a_file_type_that_is_not_known() -> None:
    with pytest.raises(RequestError, match="`target_type` is Q3_K_S; choose from hf, orbax, F32, F16"):
        check_file_type("Q3_K_S")
    for name in FILE_TYPES:
        check_file_type(name)


# --------------------------------------------------------------------------------------------- metadata and warnings


@pytest.mark.parametrize("has_scores", [False, True])
def test_the_tokenizer_is_counted_as_the_file_has_it(has_scores: bool) -> None:
    model = {"vocab": {"a": 0, "bc": 1, "é": 2}, "merges": ["b c"], "byte_fallback": has_scores}
    tokenizer = {"model": model, "added_tokens": [{"content": "<s>"}, {"content": "a"}]}
    small = dataclasses.replace(smollm2(64), vocab_size=4)
    found = metadata_bytes(small, LLAMA, {"tokenizer.json": json.dumps(tokenizer).encode()})
    tokens = 4 * (8 + 4 + 4 * has_scores) + len("abcé<s>".encode())
    assert found - metadata_bytes(small, LLAMA, {}) == tokens + (0 if has_scores else 8 + len("b c"))


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"model": {"vocab": 3}}'])
def test_a_tokenizer_of_another_kind_counts_as_it_is(content: bytes) -> None:
    found = metadata_bytes(smollm2(64), LLAMA, {"tokenizer.json": content})
    assert found - metadata_bytes(smollm2(64), LLAMA, {}) == len(content)


def warning(width: int, made: str | None = None) -> str | None:
    dense, pruned = (forecast(llama_1b(size), LLAMA, 0) for size in (8192, width))
    return quantisation_warning(dense, pruned, (width,) * 16, 8192, made)


def test_a_width_that_makes_the_quantised_model_larger_is_warned_of() -> None:
    text = warning(7373)
    assert text is not None
    for part in ("33% larger than the dense one (Q4_K_M: 1.07 GB, dense 799.", "7373", "`pad_to` 256", "`multiple_of`"):
        assert part in text
    assert "hardly smaller" in (warning(7360) or "")


@pytest.mark.parametrize(("made", "block"), [("Q8_0", 32), ("Q4_K_M", 256), ("F16", 256), (None, 256)])
def test_the_multiple_is_that_of_the_type_that_is_made(made: str | None, block: int) -> None:
    remedy = f"`pad_to` {block}, which loses no neuron, or `multiple_of` {block}"
    assert (warning(7373, made) or "").endswith(f"because width 7373 is no multiple of {block}; give {remedy}")
    assert (warning(7360, made) is None) == (block == 32)  # 7360 is a multiple of 32, and Q4_K_M hardly smaller


def test_padding_to_the_dense_width_is_not_proposed() -> None:
    dense, pruned = (forecast(smollm2(width), LLAMA, 0) for width in (1536, 1383))
    text = quantisation_warning(dense, pruned, (1383,) * 30, 1536) or ""
    assert text.endswith("because width 1383 is no multiple of 256; give `multiple_of` 256")


@pytest.mark.parametrize("width", [7424, 4096, 3277])
def test_a_width_that_makes_it_smaller_is_not(width: int) -> None:
    assert warning(width) is None


# -------------------------------------------------------------------------------------------------- mixed widths


def test_layers_of_different_widths_are_counted_each_by_itself() -> None:
    mixed = dataclasses.replace(llama_1b(8192), intermediate_sizes=(8192,) * 8 + (4096,) * 8)
    halves = [tensor_bytes(llama_1b(width), LLAMA, "Q8_0") for width in (8192, 4096)]
    assert tensor_bytes(mixed, LLAMA, "Q8_0") == sum(halves) / 2
