"""Targets that say how large the pruned model may be: the widest layers with which it is no larger."""

import bisect
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from gluprune_jax.errors import RequestError, format_bytes
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.parallel.machine import parse_bytes
from gluprune_jax.pruning.targets import TARGETS, chosen_layers, padded_width, rounded_width, width_for_percent

# How large a model is of whose layers, by index, so many neurons stay; the others are dropped.
SizeOf = Callable[[Mapping[int, int]], int]

ALL_TARGETS = (*TARGETS, "target_parameters", "target_bytes")

_LARGEST_BLOCK = 256  # of values that are quantised together
_TRIED = 32  # budgets, before bisection


def parse_parameters(text: str) -> int:
    """A number of parameters such as "1.0B", "135M" or "500000".

    Raises:
      RequestError: it is none.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([KMBT]?)", text.strip(), re.IGNORECASE | re.ASCII)
    count = int(Fraction(match[1]) * 1000 ** " KMBT".index(match[2].upper() or " ")) if match else 0
    if count < 1:
        raise RequestError(f"`target_parameters` is {text!r}; write a positive number such as 1.0B, 350M or 1000000000")
    return count


def parse_target_bytes(text: str) -> int:
    """A file size such as "700MB" or "1.5GiB", or a plain number of bytes.

    Raises:
      RequestError: it is none.
    """
    return int(text) if re.fullmatch(r"[1-9][0-9]{0,15}", text) else parse_bytes(text, "`target_bytes`")


@dataclasses.dataclass(frozen=True)
class SizeLimit:
    """How large a model may be.

    Attributes:
      name: of the parameter that says it.
      most: parameters or bytes.
      size_of: how many a model has.
      spell: one of these numbers for people.
    """

    name: str
    most: int
    size_of: SizeOf
    spell: Callable[[int], str]

    def unreachable(self, least: int, how: str) -> RequestError:
        """The refusal where the smallest model has `least`; `how` says which one that is."""
        return RequestError(
            f"`{self.name}` is {self.spell(self.most)}; the smallest possible is {self.spell(least)}, with {how}"
        )


def target_within(
    config: ModelConfig,
    *,
    target_parameters: str | None = None,
    target_bytes: str | None = None,
    file_size: SizeOf | None = None,
    multiple_of: int = 1,
    pad_to: int = 1,
    layers: Sequence[int] | None = None,
    drop_layers: Sequence[int] = (),
    allocation: str = "uniform",
) -> dict[str, Any]:
    """The target of `make_plan` that removes least, such that the pruned model is no larger than asked.

    With an allocation the widths, and so the size, follow from scores. The target is then what is no larger without it,
    and the limit goes with it, as `within`: `chooser.Chooser` finds the share that keeps it (`allocated_within`).

    Args:
      config: of the dense model.
      target_parameters: how many parameters there may be, such as "1.0B". Padding is none.
      target_bytes: in place of that, how many bytes, such as "700MB".
      file_size: of the files that the bytes are of.
      multiple_of: the width is a multiple of this.
      pad_to: what `file_size` rounds widths up to a multiple of.
      layers: indices of the layers that are pruned; all that stay when None.
      drop_layers: indices of those that are removed whole.
      allocation: as of `allocation`.

    Returns:
      A `width`; where the layers differ in width, a `prune_percent` in steps of a tenth. With an allocation, `within`.

    Raises:
      RequestError: not exactly one of the two; the model is no larger as it is; or it is larger however little is kept,
        and then the smallest possible is named.
    """
    if (target_parameters is None) == (target_bytes is None):
        raise RequestError("give exactly one of `target_parameters` and `target_bytes`")
    name, spell, size_of = "target_bytes", format_bytes, file_size
    if target_parameters is not None:
        name, spell, size_of = "target_parameters", _with_commas, _parameters_of(config)
    assert size_of is not None
    most = parse_target_bytes(target_bytes) if target_bytes is not None else parse_parameters(str(target_parameters))
    limit = SizeLimit(name, most, size_of, spell)

    sizes, chosen = config.intermediate_sizes, chosen_layers(config.num_hidden_layers, layers, drop_layers)
    dense = {i: size for i, size in enumerate(sizes) if i not in set(drop_layers)}
    if (found := size_of(dense)) <= most:
        without = " without the dropped layers" * bool(drop_layers)
        raise RequestError(f"`{name}` is {spell(most)}, and the model{without} has {spell(found)}; ask for less")

    def pruned(target: Mapping[str, Any]) -> int:
        return size_of(dense | {i: _width(target, sizes[i], multiple_of) for i in chosen})

    groups = _candidates([sizes[i] for i in chosen], multiple_of, pad_to)
    if not groups:
        raise RequestError(f"`multiple_of` {multiple_of} leaves no width below that of the layers; give a smaller one")
    fitting = [group[: bisect.bisect_right(group, most, key=pruned)] for group in groups]
    if best := [group[-1] for group in fitting if group]:
        target = max(best, key=lambda target: sum(_width(target, sizes[i], multiple_of) for i in chosen))
        return target if allocation == "uniform" else {**target, "within": limit}
    least = min((group[0] for group in groups), key=pruned)
    raise limit.unreachable(pruned(least), ", ".join(f"`{key}` {value}" for key, value in least.items()))


def allocated_within(
    limit: SizeLimit,
    sizes: Mapping[int, int],
    chosen: Sequence[int],
    allocate: Callable[[int], Sequence[int]],
    least: int,
    *,
    multiple_of: int = 1,
    rounding: str = "down",
) -> dict[str, Any]:
    """The target of `make_plan` that removes least, such that the model with allocated widths is no larger than asked.

    More neurons can be a smaller file: one where a width is a multiple of what is quantised together. So some budgets
    are tried from the largest on, and then those between the first that fits and the one before it by bisection: the
    next larger share is too large.

    Args:
      limit: what is asked for.
      sizes: the width of each layer that stays, by index.
      chosen: the indices of those that are pruned.
      allocate: their widths for a budget of neurons in all.
      least: the smallest budget.
      multiple_of, rounding: as of `make_plan`, which is to take the target.

    Returns:
      A `width`, whose multiple is the budget; where the layers differ in width, a `prune_percent` in steps of a tenth.

    Raises:
      RequestError: it is larger however little is kept, and then the smallest possible is named.
    """
    of = [sizes[i] for i in chosen]

    def budget(target: Mapping[str, Any]) -> int:
        return sum(_wanted(target, size) for size in of)

    def is_taken(target: Mapping[str, Any]) -> bool:
        rounded = (rounded_width(_wanted(target, size), size, multiple_of, rounding) for size in of)
        return all(0 < width < size for width, size in zip(rounded, of, strict=True)) and budget(target) >= least

    def size(target: Mapping[str, Any]) -> int:
        widths = allocate(budget(target))
        return limit.size_of({**sizes, **dict(zip(chosen, widths, strict=True))})

    targets = [target for target in _shares(of) if is_taken(target)]
    if not targets:
        raise RequestError(f"`multiple_of` {multiple_of} or `min_keep` leaves no share to remove; give a smaller one")
    step = -(-len(targets) // _TRIED)
    tried: dict[int, int] = {}
    fits, too_large = -1, len(targets)
    for i in [*range(len(targets) - 1, 0, -step), 0]:
        tried[i] = size(targets[i])
        if tried[i] <= limit.most:
            fits = i
            break
        too_large = i
    if fits < 0:
        i = min(tried, key=tried.__getitem__)
        share = ", ".join(f"`{key}` {value}" for key, value in targets[i].items())
        raise limit.unreachable(tried[i], f"{share} and this allocation")
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        fits, too_large = (middle, too_large) if size(targets[middle]) <= limit.most else (fits, middle)
    return targets[fits]


def _parameters_of(config: ModelConfig) -> SizeOf:
    return lambda widths: config.with_layers([*widths], [*widths.values()]).num_parameters


def _with_commas(count: int) -> str:
    return f"{count:,}"


def _candidates(sizes: Sequence[int], multiple_of: int, pad_to: int) -> list[list[dict[str, Any]]]:
    """The targets for layers of these sizes, in groups within which more neurons are never the smaller model.

    Of all widths that is not so: one that is a multiple of a block is quantised, and the next one above it and the next
    one below are not, or less.
    """
    if len(set(sizes)) > 1:
        shares = reversed(_shares(sizes))
        return [[share] for share in shares if all(0 < _width(share, size, multiple_of) < size for size in sizes)]
    groups: dict[int, list[dict[str, Any]]] = {}
    for width in range(multiple_of, sizes[0], multiple_of):
        groups.setdefault(math.gcd(padded_width(width, pad_to), _LARGEST_BLOCK), []).append({"width": width})
    return list(groups.values())


def _shares(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The targets for layers of these sizes in the finest steps, from the one that keeps least on."""
    if len(set(sizes)) > 1:
        return [{"prune_percent": (1000 - kept) / 10} for kept in range(1, 1000)]
    return [{"width": width} for width in range(1, sizes[0])]


def _wanted(target: Mapping[str, Any], size: int) -> int:
    """What a candidate asks for of a layer."""
    width: int = target["width"] if "width" in target else width_for_percent(target["prune_percent"], size)
    return width


def _width(target: Mapping[str, Any], size: int, multiple_of: int) -> int:
    """What a candidate leaves of a layer."""
    return rounded_width(_wanted(target, size), size, multiple_of)
