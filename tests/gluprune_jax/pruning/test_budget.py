"""Targets that say how large a model may be: against every width tried, and one sentence where none will do."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_config import tiny_config
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.families.registry import FAMILIES
from convert.gguf.sizes import tensor_bytes
from gluprune_jax import prune_model
from gluprune_jax.errors import RequestError
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.pruning.budget import SizeOf, parse_parameters, parse_target_bytes, target_within
from gluprune_jax.pruning.targets import padded_width, rounded_width, width_for_percent

CONFIG = tiny_config(hidden_size=256, intermediate_sizes=(768, 768, 768))
LLAMA = FAMILIES["llama"]


def of_gguf(config: ModelConfig, file_type: str) -> SizeOf:
    """Each layer with its own width: the size rises and falls with it."""
    return lambda widths: tensor_bytes(config.with_layers([*widths], [*widths.values()]), LLAMA, file_type)


@pytest.mark.parametrize(
    ("text", "count"), [("1.0B", 10**9), ("135M", 135_000_000), ("1.2345k", 1234), ("7", 7), ("1 t", 10**12)]
)
def test_numbers_of_parameters(text: str, count: int) -> None:
    assert parse_parameters(text) == count


@pytest.mark.parametrize(("text", "count"), [("700MB", 700_000_000), ("1.5GiB", 3 << 29), ("12345", 12345)])
def test_numbers_of_bytes(text: str, count: int) -> None:
    assert parse_target_bytes(text) == count


@pytest.mark.parametrize("text", ["", "B", "-1B", "0", "0.1", "1e9", "1.0X", "1BB", "nan"])
def test_no_number(text: str) -> None:
    with pytest.raises(RequestError, match=r"`target_parameters` is .*write a positive number such as 1\.0B"):
        parse_parameters(text)
    with pytest.raises(RequestError, match="`target_bytes` is "):
        parse_target_bytes(text)


@pytest.mark.parametrize("multiple_of", [1, 8, 256])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_it_is_the_largest_width_of_all(share: float, multiple_of: int) -> None:
    for file_type in ("F16", "Q8_0", "Q4_K_M", "Q4_0"):
        size_of = of_gguf(CONFIG, file_type)
        most = int(share * size_of(dict.fromkeys(range(3), 768)))
        fits = [w for w in range(multiple_of, 768, multiple_of) if size_of(dict.fromkeys(range(3), w)) <= most]
        found = target_within(CONFIG, target_bytes=str(most), file_size=size_of, multiple_of=multiple_of)
        assert found == {"width": max(fits)}, file_type


@pytest.mark.parametrize("pad_to", [1, 32, 96])
def test_it_is_the_largest_of_all_where_files_are_padded(pad_to: int) -> None:
    plain = of_gguf(CONFIG, "Q4_K_M")

    def size_of(widths: Mapping[int, int]) -> int:
        return plain({i: padded_width(width, pad_to) for i, width in widths.items()})

    for most in range(500_000, 1_500_000, 83_000):
        fits = [width for width in range(1, 768) if size_of(dict.fromkeys(range(3), width)) <= most]
        if fits and size_of(dict.fromkeys(range(3), 768)) > most:
            found = target_within(CONFIG, target_bytes=str(most), file_size=size_of, pad_to=pad_to)
            assert found == {"width": max(fits)}, most


def test_parameters_of_some_layers_and_without_others() -> None:
    config = tiny_config(intermediate_sizes=(80,) * 4)
    kept = config.with_layers([0, 1, 3], [37, 80, 37]).num_parameters
    for spare, width in ((0, 37), (1, 37), (-1, 36)):
        asked: dict[str, Any] = {"target_parameters": str(kept + spare), "layers": [0, 3], "drop_layers": [2]}
        assert target_within(config, **asked) == {"width": width}


def test_layers_of_different_widths_lose_the_same_share() -> None:
    config = tiny_config(intermediate_sizes=(80, 40, 64))
    most = int(0.8 * config.num_parameters)
    found = target_within(config, target_parameters=str(most), multiple_of=4)

    def parameters(percent: float) -> int:
        widths = [rounded_width(width_for_percent(percent, size), size, 4) for size in config.intermediate_sizes]
        return dataclasses.replace(config, intermediate_sizes=tuple(widths)).num_parameters

    assert parameters(found["prune_percent"]) <= most < parameters(round(found["prune_percent"] - 0.1, 1))


# ------------------------------------------------------------------------------------------------------- models


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = hf_config(hidden_size=256, intermediate_size=768, num_hidden_layers=2)
    return write_folder(tmp_path / "model", config, hf_tensors(config, "bfloat16"))


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({"target_bytes": "1.2MB"}, 314),
        ({"target_bytes": "1.2MB", "pad_to": 64}, 256),
        ({"target_bytes": "1.2MB", "runtime": "llama.cpp"}, 256),
        ({"target_bytes": "1.2MB", "runtime": "tpu"}, 314),
        ({"target_bytes": 625_000, "target_type": "Q8_0"}, 288),
        ({"target_bytes": "1.2MB", "target_type": "orbax", "multiple_of": 50}, 300),
        ({"target_parameters": 600_000}, 314),
    ],
)
def test_a_model_is_pruned_to_it(model: Path, tmp_path: Path, options: dict[str, Any], width: int) -> None:
    dense = convert.load(model)
    pruned = prune_model(dense, **options)
    assert pruned.config.intermediate_sizes == (width, width)


def test_an_allocation_keeps_within_the_parameters(model: Path) -> None:
    pruned = prune_model(convert.load(model), "ppm+global", target_parameters="600k")
    assert 590_000 < pruned.config.num_parameters <= 600_000
    assert len(set(pruned.config.intermediate_sizes)) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": "1k"}, r"`target_parameters` is 1,000; the smallest possible is .*, with `width` 1"),
        ({"target_parameters": "1k", "multiple_of": 8}, "with `width` 8"),
        (
            {"target_parameters": "5B"},
            r"`target_parameters` is 5,000,000,000, and the model has 1,296,128; ask for less",
        ),
        ({"target_bytes": "1kB"}, r"`target_bytes` is 1.00 kB; the smallest possible is .* kB, with `width` 1"),
        ({"target_bytes": "1.2MB", "runtime": "tensorrt"}, "`runtime` is 'tensorrt'; choose from llama.cpp, mlx"),
        ({"target_bytes": "1.2MB", "target_type": "Q3_K"}, "`target_type` is Q3_K; choose from hf, orbax, F32"),
        ({"target_type": "Q8_0", "width": 5}, "say what files `target_bytes` is of"),
        ({"target_parameters": "600k", "width": 5}, "one target is given alone: `prune_percent` or"),
        ({"target_parameters": "600k", "target_bytes": "1MB"}, "exactly one of `target_parameters` and `target_bytes`"),
        ({"target_parameters": "600k", "multiple_of": 768}, "`multiple_of` 768 leaves no width below"),
        ({"method": "ppm+global", "target_bytes": "1MB"}, "`target_bytes` does not go with allocation global"),
    ],
)
def test_bad_input(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        prune_model(convert.load(model), **options)
