"""Targets that say how large a model may be: against every width tried, and one sentence where none will do."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_config import tiny_config
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.families.registry import FAMILIES
from convert.gguf.export import GGUFOptions
from convert.gguf.file import read_header
from convert.gguf.sizes import tensor_bytes
from convert.huggingface.safetensors import index_folder
from gluprune_jax import prune_model
from gluprune_jax.errors import RequestError
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.pruning.allocation import by_cost, by_score, least_widths
from gluprune_jax.pruning.budget import (
    SizeLimit,
    SizeOf,
    allocated_within,
    parse_parameters,
    parse_target_bytes,
    target_within,
)
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


# ---------------------------------------------------------------------------------------------------- allocations


def allocations(sizes: Sequence[int], seed: int, multiple_of: int) -> list[Callable[[int], list[int]]]:
    """Widths by scores, whose spread differs between layers, and by costs."""
    rng = np.random.default_rng(seed)
    values = [rng.lognormal(sigma=rng.uniform(0.2, 2), size=size).astype(np.float32) for size in sizes]
    costs = rng.lognormal(size=len(sizes)).tolist()
    rules: dict[str, Any] = {"min_keep": 0.1, "multiple_of": multiple_of}
    return [functools.partial(by_score, values, **rules), functools.partial(by_cost, costs, sizes, **rules)]


@pytest.mark.parametrize("multiple_of", [1, 32, 256])
@pytest.mark.parametrize("file_type", ["F16", "Q8_0", "Q4_K_M", "hf"])
def test_the_next_larger_share_is_too_large(file_type: str, multiple_of: int) -> None:
    true_widths = of_gguf(CONFIG, "F16" if file_type == "hf" else file_type)

    def size_of(widths: Mapping[int, int]) -> int:
        stored = dict.fromkeys(widths, max(widths.values())) if file_type == "hf" else widths
        return true_widths({i: padded_width(width, 32) for i, width in stored.items()})

    dense, least = dict.fromkeys(range(3), 768), sum(least_widths([768] * 3, 0.1, multiple_of))
    compared = 0
    for allocate in allocations([768] * 3, 0, multiple_of):
        allowed = range(max(multiple_of, -(-least // 3)), 768)
        sizes = {width: size_of(dict(enumerate(allocate(3 * width)))) for width in allowed}
        for share in (0.5, 0.75, 0.95):
            most = int(share * size_of(dense))
            if min(sizes.values()) > most:
                continue
            limit = SizeLimit("target_bytes", most, size_of, str)
            width = allocated_within(limit, dense, [0, 1, 2], allocate, least, multiple_of=multiple_of)["width"]
            assert sizes[width] <= most
            assert width == 767 or sizes[width + 1] > most
            # Where more neurons are never the smaller file, it is the largest of all.
            if list(sizes.values()) == sorted(sizes.values()):
                assert width == max(w for w in allowed if sizes[w] <= most)
                compared += 1
    assert compared or file_type in ("Q4_K_M", "hf")


def test_an_allocation_of_some_layers_of_different_widths() -> None:
    config = tiny_config(intermediate_sizes=(80, 40, 64, 80))
    dense, chosen = {0: 80, 1: 40, 3: 80}, [0, 1]  # the third is dropped, the last stays whole
    allocate, _ = allocations([80, 40], 0, 1)

    def parameters(widths: Mapping[int, int]) -> int:
        return config.with_layers([*widths], [*widths.values()]).num_parameters

    most = parameters({0: 60, 1: 30, 3: 80})
    limit = SizeLimit("target_parameters", most, parameters, str)
    found = allocated_within(limit, dense, chosen, allocate, 12)

    def size(percent: float) -> int:
        budget = sum(width_for_percent(percent, dense[i]) for i in chosen)
        return parameters({**dense, **dict(zip(chosen, allocate(budget), strict=True))})

    assert size(found["prune_percent"]) <= most < size(round(found["prune_percent"] - 0.1, 1))


# ------------------------------------------------------------------------------------------------------- models


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = hf_config(hidden_size=256, intermediate_size=768, num_hidden_layers=2)
    return write_folder(tmp_path / "model", config, hf_tensors(config, "bfloat16"))


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """A model whose second layer has few neurons that matter."""
    config = hf_config(hidden_size=256, intermediate_size=768, num_hidden_layers=2)
    tensors = hf_tensors(config, "bfloat16")
    tensors["model.layers.1.mlp.gate_proj.weight"] *= np.linspace(0.1, 4, 768)[:, None] ** 3
    tensors["model.layers.1.mlp.up_proj.weight"] *= np.linspace(0.1, 4, 768)[:, None] ** 3
    return write_folder(tmp_path / "model", config, tensors)


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


@pytest.mark.parametrize(("target_type", "gguf_type"), [("F16", "F16"), ("BF16", None), ("Q8_0", "Q8_0")])
@pytest.mark.parametrize("options", [{}, {"pad_to": 64}, {"multiple_of": 50}, {"runtime": "llama.cpp"}])
def test_the_file_is_no_larger_than_asked(
    uneven: Path, tmp_path: Path, target_type: str, gguf_type: str | None, options: dict[str, Any]
) -> None:
    dense = convert.load(uneven)
    pad_to = options.get("pad_to", 1)
    whole = dense.file_size(target_type, pad_to)({0: 768, 1: 768})
    for share in (0.5, 0.8):
        most = int(share * whole)
        pruned = prune_model(dense, "l2+global", target_bytes=most, target_type=target_type, min_keep=0.05, **options)
        path = tmp_path / "out.gguf"
        gguf = GGUFOptions(gguf_type)
        convert.save(pruned, path, formats=["gguf"], gguf=gguf, pad_to=pad_to, overwrite=True)
        assert path.stat().st_size <= most
        if not options:  # coarse steps leave more
            assert read_header(path).fields["general.architecture"] == "deci"
            assert path.stat().st_size > 0.9 * most
        (record,) = pruned.history
        assert record["request"].keys() >= {"width", "allocation"}


def test_of_safetensors_padding_counts(uneven: Path, tmp_path: Path) -> None:
    dense = convert.load(uneven)
    found = {}
    for kind in ("hf", "orbax"):
        pruned = prune_model(dense, "l2+global", target_bytes="2MB", target_type=kind)
        widths = pruned.config.intermediate_sizes
        assert len(set(widths)) == 2
        found[kind] = sum(widths)
        assert dense.file_size(kind)(dict(enumerate(widths))) <= 2_000_000
    assert found["hf"] < found["orbax"]
    convert.save(prune_model(dense, "l2+global", target_bytes="2MB"), tmp_path / "out")
    stored = index_folder(tmp_path / "out").values()
    assert 1_900_000 < sum(tensor.nbytes for tensor in stored) <= 2_000_000


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
        (
            {"method": "ppm+global", "target_bytes": "250kB"},
            r"`target_bytes` is 250\.00 kB; the smallest possible is .* kB, with `width` \d+ and this allocation$",
        ),
        (
            {"method": "ppm+global", "target_bytes": "900kB", "target_type": "F16", "min_keep": 0.7},
            r"`target_bytes` is 900\.00 kB; the smallest possible is 1\..* MB, with `width` 538 and this allocation$",
        ),
        ({"method": "ppm+global", "target_bytes": "1kB"}, r"the smallest possible is .* kB, with `width` 1$"),
        ({"method": "ppm+global", "target_bytes": "1GB"}, "and the model has 2.59 MB; ask for less"),
    ],
)
def test_bad_input(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        prune_model(convert.load(model), **options)
