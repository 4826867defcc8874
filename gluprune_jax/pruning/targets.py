"""How much to prune: widths from percentages and expansion ratios, and which layers."""

import decimal
import math
import operator
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gluprune_jax.errors import RequestError

# How widths can be asked for, and how tables spell it.
TARGETS = {"prune_percent": "{} %", "expansion_ratio": "{}x", "width": "{}"}


ROUNDINGS = ("down", "nearest")


# The multiples that runtimes take well, from what each was seen to do (docs/prune.md): of other widths llama.cpp leaves
# down projections in F16, MLX in the dtype that they have, and OpenVINO exports none in 4 bits. Several devices share
# an MLP in vLLM only where their number divides its width; 8 are those of a machine. The others, among them the TPU
# compiler, lost nothing by odd widths.
RUNTIMES: Mapping[str, int] = {
    "llama.cpp": 256,
    "mlx": 64,
    "openvino": 128,
    "vllm": 8,
    "onnxruntime": 1,
    "ctranslate2": 1,
    "tpu": 1,
}


MAX_PADDING = 4096  # what widths can be padded to a multiple of


WIDTHLESS = "`layers` and `multiple_of` refine `expansion_ratio`, `prune_percent` or `width`; none of these is given"


# --------------------------------------------------------------------------------------------------- widths


def width_for_percent(percent: float, intermediate_size: int) -> int:
    """`F - min(int(percent / 100 * F), F - 1)`, as the paper and OptiPFair round.

    Raises:
      RequestError: `percent` is not between 0 and 100.
    """
    if not 0 < percent < 100:
        raise RequestError(f"`prune_percent` is {percent:g}; it must lie between 0 and 100")
    return intermediate_size - min(int(percent / 100 * intermediate_size), intermediate_size - 1)


def width_for_expansion_ratio(ratio: str | float, hidden_size: int) -> int:
    """`ceil(ratio * D)`, computed on the decimal digits of the ratio: 2.4 of 2560 is 6144, not 6145.

    Raises:
      RequestError: `ratio` is not a positive decimal number.
    """
    # No exponents: the digits of 1e999999999 would fill the memory.
    is_decimal = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,99})?|\.[0-9]{1,99}", str(ratio))
    exact = Fraction(str(ratio)) if is_decimal else Fraction(0)
    if exact <= 0:
        raise RequestError(f"`expansion_ratio` is {ratio}; it must be a positive decimal number such as 2.4")
    return math.ceil(exact * hidden_size)


def parse_layers(text: str, num_layers: int, flag: str = "`layers`") -> tuple[int, ...]:
    """Layer indices from a list such as `0-3,8,-1` (negative ones count from the end), ascending.

    `flag` says in errors which option is meant.

    Raises:
      RequestError: not such a list, or an index out of range.
    """
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d{1,9})(?:-(-?\d{1,9}))?\s*", part)
        if not match:
            raise RequestError(f"{flag} has {part!r}; write indices and ranges such as 0-3,8,-1")
        bounds = [int(bound) for bound in match.groups() if bound is not None]
        for bound in bounds:
            if not -num_layers <= bound < num_layers:
                raise RequestError(
                    f"{flag} names layer {bound}; this model has layers 0 to {num_layers - 1} "
                    f"(or -{num_layers} to -1, from the end)"
                )
        first, last = bounds[0] % num_layers, bounds[-1] % num_layers
        if first > last:
            raise RequestError(f"{flag} has {part!r}, which runs backwards: layer {first} to layer {last}")
        chosen |= set(range(first, last + 1))
    return tuple(sorted(chosen))


def chosen_layers(num_layers: int, layers: Sequence[int] | None, drop_layers: Sequence[int] = ()) -> list[int]:
    """The indices of the layers whose neurons are pruned, ascending.

    Args:
      num_layers: L.
      layers: those that are asked for; all that stay when None.
      drop_layers: those that are removed whole.

    Raises:
      RequestError: a layer that the model does not have or that is to be both pruned and dropped, or none is left.
    """
    dropped = check_layers(drop_layers, num_layers, empty=True)
    if len(dropped) == num_layers:
        raise RequestError(f"all {num_layers} layers would be dropped; a model keeps at least one")
    chosen = set(range(num_layers)) - dropped if layers is None else check_layers(layers, num_layers)
    if both := sorted(chosen & dropped):
        raise RequestError(
            f"`layers` and `drop_layers` both name {format_layers(both)}; prune or drop a layer, not both"
        )
    return sorted(chosen)


def target_width(
    size: int,
    hidden_size: int,
    *,
    expansion_ratio: str | float | None = None,
    prune_percent: float | None = None,
    width: int | None = None,
) -> int:
    """What one of the three targets leaves of a layer of `size` neurons.

    Raises:
      RequestError: a target that is no such number.
    """
    if prune_percent is not None:
        return width_for_percent(prune_percent, size)
    if expansion_ratio is not None:
        return width_for_expansion_ratio(expansion_ratio, hidden_size)
    assert width is not None
    return width


def rounded_width(width: int, size: int, multiple_of: int, rounding: str = "down") -> int:
    """What is left of a layer of `size` neurons where `width` is asked for, in multiples.

    Args:
      width: what is asked for.
      size: what there is.
      multiple_of: the width is a multiple of this.
      rounding: "down", or to the "nearest" multiple that leaves at least one and is smaller than the layer: 7373 of
        8192 in multiples of 256 is 7424, not 7168.
    """
    down = width // multiple_of * multiple_of
    if rounding == "down" or width >= size:
        return down
    nearest = (width + multiple_of // 2) // multiple_of * multiple_of
    return min(max(nearest, multiple_of), (size - 1) // multiple_of * multiple_of)


def width_rounding(runtime: str | None, multiple_of: int = 1) -> dict[str, Any]:
    """The arguments of `make_plan` that round widths: to what a runtime takes well, where one is named.

    Raises:
      RequestError: no such runtime, or a multiple beside it.
    """
    if runtime is None:
        return {"multiple_of": multiple_of}
    if runtime not in RUNTIMES:
        raise RequestError(f"`runtime` is {runtime!r}; choose from {', '.join(RUNTIMES)}")
    if multiple_of != 1:
        raise RequestError(
            f"`runtime` {runtime} rounds widths to the nearest multiple of {RUNTIMES[runtime]}, and `multiple_of` is "
            f"{multiple_of}; give one of them"
        )
    return {"multiple_of": RUNTIMES[runtime], "rounding": "nearest"}


def padded_width(width: int, multiple: int) -> int:
    """The width with so many zero neurons appended that it is a multiple: 7373 of 256 is 7424."""
    return -(-width // multiple) * multiple


def check_pad_to(pad_to: int) -> None:
    """Refuses what no widths are padded to a multiple of.

    Raises:
      RequestError: it is not between 1 and `MAX_PADDING`.
    """
    if not 1 <= pad_to <= MAX_PADDING:
        raise RequestError(
            f"`pad_to` is {pad_to}; it must lie between 1 and {MAX_PADDING}: widths are padded to a multiple of it"
        )


def width_for_share(size: int, kept: int, of: int) -> int:
    """What is left of `size` neurons when the share removed is that of a width of `of` of which `kept` stay.

    It rounds as `width_for_percent` does.
    """
    return size - size * (of - kept) // of


def format_target(target: Mapping[str, Any]) -> str:
    """A target as tables show it: "20 %", "2.4x", "4096", "20 % of layer 3"."""
    (kind,) = (name for name in TARGETS if name in target)
    where = f" of layer {target['layers'][0]}" if "layers" in target else ""
    number = f"{decimal.Decimal(str(target[kind])).normalize():f}"  # 1.20 is 1.2, and 20.0 is 20
    return TARGETS[kind].format(number) + where


def check_layers(layers: Sequence[int], num_layers: int, *, empty: bool = False) -> set[int]:
    """Indices of layers as a set.

    Raises:
      RequestError: one that the model does not have; or none, unless `empty` allows that.
    """
    chosen = set(map(operator.index, layers))
    if not chosen <= set(range(num_layers)) or not (chosen or empty):
        raise RequestError(f"layers {sorted(chosen)} are not all among 0 to {num_layers - 1}")
    return chosen


def format_layers(indices: Sequence[int]) -> str:
    """Ascending layers for people: "layer 3", "layers 0-2,7"."""
    return f"layer{'s' * (len(indices) > 1)} {format_ranges(indices)}"


def format_ranges(indices: ArrayLike) -> str:
    """Ascending whole numbers as a plan writes them: 0, 1, 2, 3, 5 is "0-3,5", none is ""."""
    indices = np.asarray(indices, np.int32)
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1) if len(indices) else []
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
