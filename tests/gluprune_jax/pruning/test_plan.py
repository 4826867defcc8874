"""Widths, layer lists and plan files: what was asked for is what is kept, and what cannot be is refused."""

import dataclasses
import decimal
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_config import tiny_config

from gluprune_jax.errors import GlupruneError, OperationError, RequestError
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.pruning.plan import PruningPlan, make_plan
from gluprune_jax.pruning.scores import Scores
from gluprune_jax.pruning.targets import (
    RUNTIMES,
    parse_layers,
    rounded_width,
    width_for_expansion_ratio,
    width_for_percent,
    width_rounding,
)

CONFIG = tiny_config(intermediate_sizes=(40, 40, 33), num_attention_heads=2, num_key_value_heads=1, head_dim=4)


def make_scores(sizes: tuple[int, ...] = CONFIG.intermediate_sizes, hidden_size: int = 16, seed: int = 0) -> Scores:
    """Random scores with many ties."""
    random = np.random.default_rng(seed)
    values = tuple(random.integers(0, 12, size).astype(np.float32) for size in sizes)
    return Scores("ppm", values, hidden_size, "bfloat16", "sha256:" + "5c" * 32)


def kept_lists(plan: PruningPlan) -> list[list[int]]:
    return [kept.tolist() for kept in plan.kept]


# ------------------------------------------------------------------------------------------------------- widths


def test_the_widths_of_the_paper() -> None:
    widths = [width_for_percent(percent, 8192) for percent in (10, 20, 30, 40, 50, 60)]
    assert widths == [7373, 6554, 5735, 4916, 4096, 3277]


@given(st.floats(0, 100, exclude_min=True, exclude_max=True), st.integers(1, 30000))
def test_a_percentage_removes_what_it_says_and_leaves_a_neuron(percent: float, size: int) -> None:
    width = width_for_percent(percent, size)
    assert 1 <= width <= size
    # The exact share, but for the rounding of the product, and never the last neuron.
    exact = decimal.Decimal(percent) / 100 * size
    removed = size - width
    assert removed <= exact * (1 + decimal.Decimal("1e-15"))
    assert removed > exact - 1 - decimal.Decimal("1e-9") or removed == size - 1


@pytest.mark.parametrize("percent", [0, -0.0, -5, 100, 100.0001, 1e300, math.nan, math.inf, -math.inf])
def test_a_percentage_outside_0_to_100_is_refused(percent: float) -> None:
    with pytest.raises(RequestError, match=r"`prune_percent` is .*; it must lie between 0 and 100"):
        width_for_percent(percent, 8192)
    with pytest.raises(RequestError, match="`prune_percent`"):
        make_plan(make_scores(), prune_percent=percent)


@pytest.mark.parametrize(
    ("ratio", "hidden_size", "width"),
    [
        ("1.1", 2880, 3168),  # in binary the product is above 3168
        (1.1, 2880, 3168),
        ("2.4", 2560, 6144),
        (2.4, 2560, 6144),
        ("2.40", 2048, 4916),
        ("2.4", 576, 1383),
        ("4", 2048, 8192),
        (3, 576, 1728),
        ("1.", 576, 576),
        (".5", 576, 288),
        ("2.000000000000000000000000001", 576, 1153),
        ("0.0000001", 576, 1),
    ],
)
def test_an_expansion_ratio_is_rounded_up_on_its_decimal_digits(
    ratio: str | float, hidden_size: int, width: int
) -> None:
    assert width_for_expansion_ratio(ratio, hidden_size) == width


ratios = st.decimals("0.001", 100, places=3) | st.decimals("0.1", 10, places=12)


@given(ratios, st.integers(1, 20000))
def test_an_expansion_ratio_agrees_with_decimal_arithmetic(ratio: decimal.Decimal, hidden_size: int) -> None:
    expected = int((ratio * hidden_size).to_integral_value(decimal.ROUND_CEILING))
    assert width_for_expansion_ratio(f"{ratio:f}", hidden_size) == expected


@given(st.integers(1, 99999), st.integers(0, 4), st.integers(1, 20000))
def test_a_ratio_given_as_a_number_means_the_digits_it_prints(digits: int, places: int, hidden_size: int) -> None:
    text = f"{decimal.Decimal(digits).scaleb(-places):f}"
    assert width_for_expansion_ratio(float(text), hidden_size) == width_for_expansion_ratio(text, hidden_size)


NOT_RATIOS = ["", " ", ".", "-", "nan", "inf", "-inf", "1e400", "1e999999999", "1e-999999999", "2,4", "1/0", "12/5"]
NOT_RATIOS += ["0", "0.000", "-2.4", "2.4x", "2.4.1", "0x2", "2_4", "²", "9" * 5000, "0." + "1" * 5000, "None"]


@pytest.mark.parametrize("ratio", NOT_RATIOS)
def test_what_is_not_a_positive_decimal_number_is_refused(ratio: str) -> None:
    with pytest.raises(RequestError, match=r"`expansion_ratio` is .*; it must be a positive decimal number such as"):
        width_for_expansion_ratio(ratio, 2560)


@pytest.mark.parametrize("ratio", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e300])
def test_a_float_that_is_no_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(RequestError, match="`expansion_ratio`"):
        width_for_expansion_ratio(ratio, 2560)


number_like = st.text("0123456789.,-+eE/_ naif", max_size=12)


@given(st.text() | number_like)
@example("1E9999999")
@example("9" * 400)
def test_any_text_gives_a_plan_or_one_of_our_errors(ratio: str) -> None:
    try:
        plan = make_plan(make_scores(), expansion_ratio=ratio)
    except GlupruneError:
        return
    assert max(plan.widths) < 40


# -------------------------------------------------------------------------------------------------- layer lists


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0", (0,)),
        ("0-3,8,-1", (0, 1, 2, 3, 8, 9)),
        ("-3--1", (7, 8, 9)),
        ("-10-1", (0, 1)),
        ("5--1", (5, 6, 7, 8, 9)),
        ("3,1,1-2", (1, 2, 3)),
        (" 4 , 2-2 ", (2, 4)),
    ],
)
def test_layer_lists(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, 10) == layers


@pytest.mark.parametrize(
    "text", ["", " ", ",", "1,", ",1", "1,,2", "a", "1-", "--1-2", "1-2-3", "1.5", "1:3", "9" * 5000]
)
def test_what_is_not_a_layer_list_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"^`layers` has '.*'; write indices and ranges such as 0-3,8,-1$"):
        parse_layers(text, 10)


@pytest.mark.parametrize("text", ["3-1", "-1-0", "-1--3", "0-3,9-8"])
def test_a_range_that_runs_backwards_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="which runs backwards"):
        parse_layers(text, 10)


@pytest.mark.parametrize(("text", "bad"), [("10", "10"), ("0-10", "10"), ("-11", "-11"), ("0,999999999", "999999999")])
def test_a_layer_out_of_range_is_named(text: str, bad: str) -> None:
    with pytest.raises(RequestError, match=rf"`layers` names layer {bad}; this model has layers 0 to 9 \(or -10 to -1"):
        parse_layers(text, 10)


@given(st.text() | st.text("0123456789-, ", max_size=12), st.integers(1, 40))
def test_any_layer_list_gives_layers_of_the_model_or_one_of_our_errors(text: str, num_layers: int) -> None:
    try:
        layers = parse_layers(text, num_layers)
    except GlupruneError:
        return
    assert layers
    assert list(layers) == sorted(set(layers))
    assert 0 <= layers[0] <= layers[-1] < num_layers


@given(st.sets(st.integers(0, 19), min_size=1), st.booleans())
def test_a_layer_list_written_out_is_read_back(layers: set[int], from_the_end: bool) -> None:
    text = ",".join(str(i - 20 if from_the_end else i) for i in layers)
    assert parse_layers(text, 20) == tuple(sorted(layers))


# ------------------------------------------------------------------------------------------------- making plans


def test_each_target_reaches_its_width() -> None:
    scores = make_scores()
    assert make_plan(scores, width=7).widths == (7, 7, 7)
    assert make_plan(scores, expansion_ratio="1.3").widths == (21, 21, 21)
    assert make_plan(scores, prune_percent=40).widths == (24, 24, 20)
    assert make_plan(scores, prune_percent=99.9).widths == (1, 1, 1)


@pytest.mark.parametrize("targets", [{}, {"width": 3, "prune_percent": 40}, {"expansion_ratio": "1", "width": 3}])
def test_exactly_one_target_is_asked_for(targets: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="give exactly one of `expansion_ratio`, `prune_percent` and `width`"):
        make_plan(make_scores(), **targets)


@given(st.integers(0, 1000), st.integers(1, 32))
def test_the_highest_scores_are_kept_and_of_equals_the_lower_index(seed: int, width: int) -> None:
    scores = make_scores(seed=seed)
    for values, kept in zip(scores.values, make_plan(scores, width=width).kept, strict=True):
        ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
        assert kept.tolist() == sorted(ranked[:width])
        assert kept.dtype == np.int32


@given(st.integers(0, 1000), st.data())
def test_plans_from_the_same_scores_are_nested_and_two_steps_equal_one(seed: int, data: st.DataObject) -> None:
    scores = make_scores(seed=seed)
    wide = data.draw(st.integers(2, 32))
    narrow = data.draw(st.integers(1, wide - 1))
    first, at_once = make_plan(scores, width=wide), make_plan(scores, width=narrow)
    remaining = tuple(values[kept] for values, kept in zip(scores.values, first.kept, strict=True))
    second = make_plan(dataclasses.replace(scores, values=remaining), width=narrow)
    for kept, kept_of_kept, expected in zip(first.kept, second.kept, at_once.kept, strict=True):
        assert set(expected) <= set(kept)
        assert np.array_equal(kept[kept_of_kept], expected)


def test_chosen_layers_alone_are_pruned() -> None:
    for layers in ((1,), np.array([1]), parse_layers("-2", 3)):
        plan = make_plan(make_scores(), width=7, layers=layers)
        assert plan.widths == (40, 7, 33)
        assert kept_lists(plan)[0] == list(range(40))
        assert kept_lists(PruningPlan.from_json(plan.to_json())) == kept_lists(plan)
    assert make_plan(make_scores(), width=35, layers=(0, 1)).widths == (35, 35, 33)


@pytest.mark.parametrize("layers", [(), (3,), (-1,), (0, 7)])
def test_layers_the_model_does_not_have_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"layers \[.*\] are not all among 0 to 2"):
        make_plan(make_scores(), width=7, layers=layers)


@pytest.mark.parametrize(("multiple", "width"), [(1, 23), (8, 16), (23, 23), (12, 12)])
def test_a_multiple_floors_the_width(multiple: int, width: int) -> None:
    assert make_plan(make_scores(), width=23, multiple_of=multiple).widths == (width,) * 3


@pytest.mark.parametrize(
    ("width", "size", "multiple", "nearest"),
    [
        (7373, 8192, 256, 7424),
        (6554, 8192, 256, 6656),
        (4916, 8192, 256, 4864),
        (3277, 8192, 256, 3328),
        (1383, 1536, 256, 1280),  # 1408 is nearer to nothing: 1383 / 256 is 5.4
        (8190, 8192, 256, 7936),  # never the whole layer
        (3, 8192, 256, 256),  # never none of it
        (384, 8192, 256, 512),  # halves go up
        (7373, 8192, 1, 7373),
        (8191, 8192, 1, 8191),
        (9000, 8192, 256, 8960),  # left for the check that refuses it
    ],
)
def test_the_nearest_multiple_is_below_the_layer_and_not_zero(
    width: int, size: int, multiple: int, nearest: int
) -> None:
    assert rounded_width(width, size, multiple, "nearest") == nearest
    assert rounded_width(width, size, multiple) == width // multiple * multiple


def test_a_plan_with_the_nearest_multiple_says_so_and_is_read_back() -> None:
    plan = make_plan(make_scores(), width=30, multiple_of=8, rounding="nearest")
    assert plan.widths == (32, 32, 32)
    assert plan.request == {"width": "30", "multiple_of": 8, "layers": "all", "rounding": "nearest"}
    assert PruningPlan.from_json(plan.to_json()).request == plan.request
    assert "rounding" not in make_plan(make_scores(), width=30, multiple_of=8).request


def test_what_cannot_be_rounded_to_a_multiple() -> None:
    with pytest.raises(RequestError, match="no multiple of 256 is a width below that of layer 0, which has 40 neurons"):
        make_plan(make_scores(), width=30, **width_rounding("llama.cpp"))
    with pytest.raises(RequestError, match="a width of 40 would not shrink layer 0"):
        make_plan(make_scores(), width=40, multiple_of=8, rounding="nearest")
    with pytest.raises(RequestError, match="`rounding` is 'up'; it must be 'down' or 'nearest'"):
        make_plan(make_scores(), width=30, rounding="up")


def test_runtimes_say_what_widths_are_rounded_to() -> None:
    assert width_rounding(None, 8) == {"multiple_of": 8}
    assert width_rounding("llama.cpp") == {"multiple_of": 256, "rounding": "nearest"}
    assert all(256 % multiple == 0 for multiple in RUNTIMES.values()), "the docs say that 256 suits all of them"
    with pytest.raises(RequestError, match=r"`runtime` is 'tensorrt'; choose from llama\.cpp, mlx"):
        width_rounding("tensorrt")
    with pytest.raises(RequestError, match="nearest multiple of 64, and `multiple_of` is 8; give one of them"):
        width_rounding("mlx", 8)


def test_a_multiple_may_make_an_equal_width_shrink() -> None:
    assert make_plan(make_scores((40, 40)), width=40, multiple_of=16).widths == (32, 32)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "grows": ({"width": 41}, "a width of 41 would grow layer 0, which has 40 neurons"),
    "grows a narrow layer": ({"width": 34}, "a width of 34 would grow layer 2, which has 33 neurons"),
    "ratio that grows": (
        {"expansion_ratio": "2.6"},
        r"would grow layer 0, .* \(expansion ratio 2.5\); ask for fewer neurons",
    ),
    "huge": ({"width": 10**400}, "would grow layer 0"),
    "huge ratio": ({"expansion_ratio": "999999999"}, "would grow layer 0"),
    "no-op": ({"width": 40}, "a width of 40 would not shrink layer 0"),
    "ratio that is a no-op": ({"expansion_ratio": "2.5"}, "a width of 40 would not shrink layer 0"),
    "percentage that rounds to nothing": ({"prune_percent": 1}, "a width of 40 would not shrink layer 0"),
    "zero": ({"width": 0}, "a width of 0 was asked for; a layer keeps at least one neuron"),
    "negative": ({"width": -3}, "a width of -3 was asked for"),
    "below the multiple": ({"width": 7, "multiple_of": 8}, "in multiples of 8 leaves layer 0 no neuron"),
    "huge multiple": ({"width": 7, "multiple_of": 10**30}, "is a width below that of layer 0, which has 40 neurons"),
    "zero multiple": ({"width": 7, "multiple_of": 0}, "`multiple_of` is 0; it must be at least 1"),
    "negative multiple": ({"width": 7, "multiple_of": -8}, "`multiple_of` is -8; it must be at least 1"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_widths_that_cannot_be_are_refused(what: str) -> None:
    request, message = REFUSED[what]
    with pytest.raises(RequestError, match=message) as error:
        make_plan(make_scores(), **request)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------- masks


def test_masks_are_one_where_kept_and_zero_elsewhere_and_in_the_padding() -> None:
    plan = make_plan(make_scores(), prune_percent=40)
    masks = plan.masks(dataclasses.replace(CONFIG, width_multiple=16))
    for mask, kept, stored in zip(masks, kept_lists(plan), (48, 48, 48), strict=True):
        assert mask.dtype == np.float32
        assert mask.tolist() == [float(i in kept) for i in range(stored)]


# --------------------------------------------------------------------------------------------------- plan files

neuron_sets = st.integers(1, 200).flatmap(
    lambda size: st.tuples(st.just(size), st.sets(st.integers(0, size - 1), min_size=1))
)


def plan_of(sizes_and_kept: list[tuple[int, set[int]]]) -> PruningPlan:
    kept: tuple[NDArray[np.int32], ...] = tuple(np.array(sorted(kept), np.int32) for _, kept in sizes_and_kept)
    return PruningPlan(
        kept=kept,
        intermediate_sizes=tuple(size for size, _ in sizes_and_kept),
        hidden_size=16,
        criterion="vow",
        weights_dtype="float32",
        fingerprint="sha256:" + "0f" * 32,
        request={"width": "7", "multiple_of": 1, "layers": "all"},
        versions={"gluprune_jax": "0.1.0", "jax": "0.10.0"},
    )


def everything(plan: PruningPlan) -> dict[str, Any]:
    return {**vars(plan), "kept": kept_lists(plan)}


@given(st.lists(neuron_sets, min_size=1, max_size=5))
def test_a_plan_is_read_as_it_was_written(sizes_and_kept: list[tuple[int, set[int]]]) -> None:
    plan = plan_of(sizes_and_kept)
    read = PruningPlan.from_json(plan.to_json())
    assert everything(read) == everything(plan)
    assert all(kept.dtype == np.int32 for kept in read.kept)
    assert read.to_json() == plan.to_json()


def test_a_plan_file_says_where_it_comes_from_with_one_line_a_layer(tmp_path: Path) -> None:
    plan = plan_of([(9, {0, 1, 2, 3, 5, 8}), (9, {4}), (3, {0, 1, 2})])
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    lines = [line.strip().rstrip(",") for line in text.splitlines() if '"kept"' in line]
    assert lines == [
        '{"layer": 0, "kept": "0-3,5,8"}',
        '{"layer": 1, "kept": "4"}',
        '{"layer": 2, "kept": "0-2"}',
    ]
    data = json.loads(text)
    del data["layers"]
    assert re.fullmatch("[0-9a-f]{64}", data.pop("sha256"))
    assert data == {
        "format": "gluprune-plan",
        "version": 1,
        "criterion": "vow",
        "score_dtype": "float32",
        "tie_rule": "among equal scores the lower index is kept",
        "request": {"width": "7", "multiple_of": 1, "layers": "all"},
        "source": {
            "fingerprint": "sha256:" + "0f" * 32,
            "weights_dtype": "float32",
            "hidden_size": 16,
            "intermediate_sizes": [9, 9, 3],
        },
        "widths": [6, 1, 3],
        "versions": {"gluprune_jax": "0.1.0", "jax": "0.10.0"},
    }


def test_a_plan_records_its_scores_its_request_and_the_versions() -> None:
    scores = make_scores()
    plan = make_plan(scores, expansion_ratio="1.30", multiple_of=2, layers=(0, 2))
    assert plan.request == {"expansion_ratio": "1.30", "multiple_of": 2, "layers": [0, 2]}
    assert (plan.criterion, plan.weights_dtype, plan.fingerprint) == ("ppm", "bfloat16", scores.fingerprint)
    assert (plan.intermediate_sizes, plan.hidden_size) == ((40, 40, 33), 16)
    assert set(plan.versions) == {"gluprune_jax", "jax"}
    assert all(version[0].isdigit() for version in plan.versions.values())


def test_an_existing_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("mine")
    plan = make_plan(make_scores(), width=7)
    with pytest.raises(RequestError, match=r"plan\.json"):
        plan.save(path)
    assert path.read_text() == "mine"
    plan.save(path, overwrite=True)
    assert everything(PruningPlan.load(path)) == everything(plan)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x93NUMPY")
    reasons = {"missing": "No such file or directory", "binary": "is not UTF-8 text", ".": "Is a directory"}
    for name, reason in reasons.items():
        with pytest.raises(RequestError, match=rf"the plan {re.escape(str(tmp_path / name))}.*{reason}"):
            PruningPlan.load(tmp_path / name)


@pytest.mark.parametrize("text", ["", "null", "[]", "7", '"gluprune-plan"', "{}", '{"format": "gguf"}', "[" * 100_000])
def test_other_files_are_not_plans(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(OperationError, match=r"plan\.json is not a pruning plan"):
        PruningPlan.load(tmp_path / "plan.json")


TEXT = make_plan(make_scores(), prune_percent=40, layers=(0, 2)).to_json()


@given(st.integers(0, len(TEXT) - 3))
def test_a_plan_cut_short_anywhere_is_refused(length: int) -> None:
    with pytest.raises(OperationError, match=r"^mine is not a pruning plan") as error:
        PruningPlan.from_json(TEXT[:length], "mine")
    assert "\n" not in str(error.value)


def unsealed(text: str) -> dict[str, Any]:
    """A plan without its digest, as older versions wrote it."""
    data: dict[str, Any] = json.loads(text)
    return {key: value for key, value in data.items() if key != "sha256"}


def with_value(path: tuple[str | int, ...], value: Any) -> str:
    data = unsealed(TEXT)
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    "kept",
    [
        *("-1", "-1-3", "0--1", "3,2", "2,2", "0-3,3-5", "5-3", "0-3,9-8", "0-40", "40", "0-99999999999", "4" * 5000),
        *("0-3,", "", ",", "-", "1_0", " 1", "1.0", "٣", "0x3", "1-2-3", "nan"),
        *(None, 3, 1.5, True, [0, 1], {"0": 1}),
    ],
)
def test_neurons_that_no_plan_keeps_are_refused(kept: Any) -> None:
    with pytest.raises(OperationError, match=r"^mine is damaged: ") as error:
        PruningPlan.from_json(with_value(("layers", 0, "kept"), kept), "mine")
    assert "\n" not in str(error.value)
    if isinstance(kept, str):
        assert "layer 0 keeps" in str(error.value)


def test_a_damaged_size_does_not_fill_the_memory() -> None:
    data = json.loads(TEXT)
    data["source"]["intermediate_sizes"][0] = data["widths"][0] = 999_999_999
    data["layers"][0]["kept"] = "0-999999998"
    with pytest.raises(OperationError, match="layer 0 has 999999999 neurons"):
        PruningPlan.from_json(json.dumps(data))


PLACES: list[tuple[str | int, ...]] = [
    *((key,) for key in ("criterion", "score_dtype", "tie_rule", "request", "source", "widths", "versions", "layers")),
    *(("source", key) for key in ("fingerprint", "weights_dtype", "hidden_size", "intermediate_sizes")),
    ("source", "intermediate_sizes", 0),
    ("widths", 0),
    ("layers", 0),
    ("layers", 0, "layer"),
]
WRONG = [None, "x", "40", -1, 7, 40.5, math.inf, math.nan, [], [1], {}, {"x": 1}, [[0]], 10**25]


# These hold free text or free keys, or a number that only the model can contradict.
FREE = {
    "criterion": str,
    "fingerprint": str,
    "weights_dtype": str,
    "versions": dict,
    "hidden_size": int,
}


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("path", PLACES, ids=lambda path: ".".join(map(str, path)))
def test_fields_of_the_wrong_type_or_value_are_refused(path: tuple[str | int, ...], value: Any) -> None:
    text = with_value(path, value)
    if FREE.get(str(path[-1])) is type(value) and value != -1:
        assert unsealed(PruningPlan.from_json(text).to_json()) == json.loads(text)
        return
    with pytest.raises(OperationError, match=r"^mine is damaged: ") as error:
        PruningPlan.from_json(text, "mine")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", [path for path in PLACES if path[-1] != 0], ids=lambda path: ".".join(map(str, path)))
def test_missing_fields_are_named(path: tuple[str | int, ...]) -> None:
    data = json.loads(TEXT)
    place = data
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    name = ".".join(map(str, path)).replace(".0.", "[0].")
    with pytest.raises(OperationError, match=rf"^mine is damaged: {re.escape(name)} is missing; it must be "):
        PruningPlan.from_json(json.dumps(data), "mine")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "multiple_of is missing; it must be a whole number from 0"),
        ({"multiple_of": 1}, "layers is missing; it must be 'all' or a list"),
        ({"multiple_of": 1, "layers": "some"}, "layers is 'some'; it must be 'all' or a list"),
        ({"multiple_of": 1, "layers": ["0"]}, r"layers\[0\] is '0'; it must be a whole number"),
        ({"multiple_of": "1", "layers": "all"}, "multiple_of is '1'; it must be a whole number"),
        ({"multiple_of": 1, "layers": "all", "width": [3]}, r"width is \[3\]; it must be a text"),
    ],
)
def test_a_request_that_no_card_could_show_is_refused(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(OperationError, match=rf"^mine is damaged: request\.{message}"):
        PruningPlan.from_json(with_value(("request",), request_), "mine")


def test_a_changed_digit_is_found_by_the_digest() -> None:
    """Such a plan is as good as another: only the digest tells them apart."""
    text = OLD.replace('"0-3,5,8"', '"0-3,6,8"')
    PruningPlan.from_json(text)
    sealed = PruningPlan.from_json(OLD).to_json()
    data = json.loads(sealed) | {"layers": json.loads(text)["layers"]}
    with pytest.raises(
        OperationError, match="its sha256 is not that of its content; if you changed it yourself, remove"
    ):
        PruningPlan.from_json(json.dumps(data), "mine")
    PruningPlan.from_json(json.dumps({key: value for key, value in data.items() if key != "sha256"}))
    for wrong in (None, 3, "", [1]):
        with pytest.raises(OperationError, match="its sha256 is not that"):
            PruningPlan.from_json(json.dumps(json.loads(sealed) | {"sha256": wrong}), "mine")


def test_missing_repeated_and_additional_layers_are_refused() -> None:
    rows = json.loads(TEXT)["layers"]
    for wrong in (rows[:2], rows[1:], [*rows, rows[2]], [rows[0], rows[0], rows[2]], rows[::-1]):
        with pytest.raises(OperationError, match="it must have 3 layers, numbered from 0"):
            PruningPlan.from_json(with_value(("layers",), wrong))


def test_a_plan_of_no_layers_is_refused() -> None:
    data = json.loads(TEXT) | {"layers": [], "widths": []}
    data["source"]["intermediate_sizes"] = []
    with pytest.raises(OperationError, match="is damaged"):
        PruningPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("version", [2, 1.5, "1", None, [1]])
def test_a_later_version_is_a_request_for_another_program(version: Any) -> None:
    with pytest.raises(RequestError, match=r"^mine has version .*; this program reads version 1$"):
        PruningPlan.from_json(with_value(("version",), version), "mine")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200)
@given(st.sampled_from([*PLACES, ("layers", 0, "kept"), ("version",), ("format",)]), json_values)
def test_any_damage_is_reported_as_one_of_our_errors(path: tuple[str | int, ...], value: Any) -> None:
    try:
        plan = PruningPlan.from_json(with_value(path, value))
    except GlupruneError:
        return
    for kept, size in zip(plan.kept, plan.intermediate_sizes, strict=True):
        assert 0 <= kept[0] <= kept[-1] < size


# ----------------------------------------------------------------------------------------------- dropped layers

# Written before layers could be dropped, byte for byte.
OLD = """{
 "format": "gluprune-plan",
 "version": 1,
 "criterion": "vow",
 "score_dtype": "float32",
 "tie_rule": "among equal scores the lower index is kept",
 "request": {
  "width": "7",
  "multiple_of": 1,
  "layers": "all"
 },
 "source": {
  "fingerprint": "sha256:0f0f",
  "weights_dtype": "float32",
  "hidden_size": 16,
  "intermediate_sizes": [
   9,
   3
  ]
 },
 "widths": [
  6,
  3
 ],
 "versions": {
  "gluprune_jax": "0.1.0",
  "jax": "0.10.0"
 },
 "layers": [
  {"layer": 0, "kept": "0-3,5,8"},
  {"layer": 1, "kept": "0-2"}
 ]
}
"""


def test_plans_of_before_are_read_and_written_as_they_were_but_for_the_digest() -> None:
    plan = PruningPlan.from_json(OLD)
    assert plan.dropped_layers == ()
    assert plan.remaining_layers == (0, 1)
    assert re.sub(r' "sha256": "[0-9a-f]{64}",\n', "", plan.to_json()) == OLD


def test_a_dropped_layer_keeps_nothing() -> None:
    plan = make_plan(make_scores(), width=7, drop_layers=[1])
    assert (plan.dropped_layers, plan.remaining_layers, plan.widths) == ((1,), (0, 2), (7, 0, 7))
    assert plan.kept[1].dtype == np.int32
    assert plan.request == {"width": "7", "multiple_of": 1, "layers": "all", "drop_layers": [1]}
    assert plan.summary()["dropped_layers"] == [1]
    assert plan.pruned_config(CONFIG) == CONFIG.with_layers((0, 2), (7, 7))
    plan = make_plan(make_scores(), drop_layers=[2, 0])
    assert (plan.dropped_layers, plan.widths) == ((0, 2), (0, 40, 0))
    assert plan.request == {"drop_layers": [0, 2]}


@given(st.sets(st.integers(0, 2), min_size=1, max_size=2), st.none() | st.integers(1, 32))
def test_a_plan_that_drops_layers_is_read_as_it_was_written(dropped: set[int], width: int | None) -> None:
    plan = make_plan(make_scores(), width=width, drop_layers=sorted(dropped))
    read = PruningPlan.from_json(plan.to_json())
    assert everything(read) == everything(plan)
    assert all(kept.dtype == np.int32 for kept in read.kept)
    assert read.to_json() == plan.to_json()
    # Which neurons of the others are kept does not depend on it.
    for i in read.remaining_layers:
        expected = np.arange(len(plan.kept[i])) if width is None else make_plan(make_scores(), width=width).kept[i]
        assert np.array_equal(read.kept[i], expected)


def test_a_dropped_layer_need_not_be_wider_than_the_target() -> None:
    assert make_plan(make_scores(), width=36, drop_layers=[2]).widths == (36, 36, 0)


DROPPED = make_plan(make_scores(), width=7, drop_layers=[1])


@pytest.mark.parametrize(
    "value",
    [[], [0], [2], [0, 1], [1, 1], [1, 0], [0, 1, 2], [3], [-1], [True], [1.0], ["1"], [[1]], [None], 1, "1", None, {}],
    ids=repr,
)
def test_damaged_lists_of_dropped_layers_are_refused(value: Any) -> None:
    data = json.loads(DROPPED.to_json()) | {"dropped_layers": value}
    with pytest.raises(OperationError, match=r"^mine is damaged: ") as error:
        PruningPlan.from_json(json.dumps(data), "mine")
    assert "\n" not in str(error.value)


def test_a_plan_must_say_the_same_of_a_dropped_layer_everywhere() -> None:
    def damaged(change: Callable[[dict[str, Any]], Any]) -> str:
        data = unsealed(DROPPED.to_json())
        change(data)
        return json.dumps(data)

    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "layer 1 keeps ''": lambda data: data.pop("dropped_layers"),
        "layer 1 is dropped and keeps '0-3'": lambda data: data["layers"][1].update(kept="0-3"),
        r"layers\[1\].kept is None; it must be a text": lambda data: data["layers"][1].update(kept=None),
        r"widths is \[7, 40, 7\]": lambda data: data["widths"].__setitem__(1, 40),
        "dropped_layers is": lambda data: data.update(dropped_layers=[0, 1, 2]),
        r"layers\[1\].kept is missing": lambda data: data["layers"][1].pop("kept"),
    }
    for message, change in changes.items():
        with pytest.raises(OperationError, match=f"is damaged: .*{message}"):
            PruningPlan.from_json(damaged(change))


def test_a_plan_that_drops_layers_has_no_mask() -> None:
    with pytest.raises(RequestError, match="the plan drops layer 1, which a mask over neurons cannot do; prune"):
        DROPPED.masks(CONFIG)


# ------------------------------------------------------------------------------------------- fitting to a model


def test_a_plan_fits_the_model_it_was_made_for() -> None:
    scores = make_scores()
    plan = PruningPlan.from_json(make_plan(scores, width=7).to_json())
    plan.check_fits(CONFIG, scores.fingerprint)
    plan.check_fits(dataclasses.replace(CONFIG, width_multiple=16), scores.fingerprint)
    plan.check_fits(CONFIG)


OTHERS: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "widths": lambda config: dataclasses.replace(config, intermediate_sizes=(40, 40, 32)),
    "number of layers": lambda config: config.with_layers((0, 1), (40, 40)),
    "hidden size": lambda config: dataclasses.replace(config, hidden_size=32),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_plan_does_not_fit_another_model(other: str) -> None:
    scores = make_scores()
    with pytest.raises(
        RequestError, match="the plan was made for 3 layers of 33 to 40 neurons at hidden size 16; this model has "
    ):
        make_plan(scores, width=7).check_fits(OTHERS[other](CONFIG), scores.fingerprint)


def test_a_plan_does_not_fit_other_weights() -> None:
    other = "sha256:" + "5d" + "5c" * 31
    with pytest.raises(RequestError, match=f"made for other weights: it names sha256:5c5c.*are {other[:23]}") as error:
        make_plan(make_scores(), width=7).check_fits(CONFIG, other)
    assert error.value.exit_status == 2
