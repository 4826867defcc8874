"""Which neurons of which layer are kept: how a target becomes widths, and the file that records the choice.

A plan is JSON with one line for each layer, so that it can be read, diffed and replayed. Kept neurons are written
as ranges ("0-3,5" is 0, 1, 2, 3, 5).
"""

import dataclasses
import importlib.metadata
import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from gluprune_jax.atomic import write_file_atomic
from gluprune_jax.errors import OperationError, RequestError, unreadable
from gluprune_jax.importance import Scores, select_neurons
from gluprune_jax.model import ModelConfig

FORMAT, VERSION = "gluprune-plan", 1
MAX_NEURONS = 1 << 24  # of a layer in a plan file: a damaged number must not fill the memory
TIE_RULE = "among equal scores the lower index is kept"


# --------------------------------------------------------------------------------------------------- widths


def width_for_percent(percent: float, intermediate_size: int) -> int:
    """`F - min(int(percent / 100 * F), F - 1)`, as the paper and OptiPFair round.

    Raises:
      RequestError: `percent` is not between 0 and 100.
    """
    if not 0 < percent < 100:
        raise RequestError(f"--prune-percent is {percent:g}; it must lie between 0 and 100")
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
        raise RequestError(f"--expansion-ratio is {ratio}; it must be a positive decimal number such as 2.4")
    return math.ceil(exact * hidden_size)


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Layer indices from a list such as `0-3,8,-1` (negative ones count from the end), ascending.

    Raises:
      RequestError: not such a list, or an index out of range.
    """
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d{1,9})(?:-(-?\d{1,9}))?\s*", part)
        if not match:
            raise RequestError(f"--layers has {part!r}; write indices and ranges such as 0-3,8,-1")
        bounds = [int(bound) for bound in match.groups() if bound is not None]
        for bound in bounds:
            if not -num_layers <= bound < num_layers:
                raise RequestError(
                    f"--layers names layer {bound}; this model has layers 0 to {num_layers - 1} "
                    f"(or -{num_layers} to -1, from the end)"
                )
        first, last = bounds[0] % num_layers, bounds[-1] % num_layers
        if first > last:
            raise RequestError(f"--layers has {part!r}, which runs backwards: layer {first} to layer {last}")
        chosen |= set(range(first, last + 1))
    return tuple(sorted(chosen))


# ---------------------------------------------------------------------------------------------------- plans


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """The kept neurons of every layer, and where the choice comes from.

    Attributes:
      kept: for each layer the kept indices, int32, ascending. A layer that stays whole keeps all of them.
      intermediate_sizes: F of each layer before pruning.
      hidden_size: D.
      criterion: the name of the criterion that ranked the neurons.
      weights_dtype: dtype of the weights that were scored; the scores are float32.
      fingerprint: identifies those weights (see `importance.score`).
      request: the target as it was asked for.
      versions: of this package and of jax.
      calibration: the text whose statistics the criterion or the widths come from (`calibration.describe_windows`).
    """

    kept: tuple[NDArray[np.int32], ...]
    intermediate_sizes: tuple[int, ...]
    hidden_size: int
    criterion: str
    weights_dtype: str
    fingerprint: str
    request: Mapping[str, Any]
    versions: Mapping[str, str]
    calibration: Mapping[str, Any] | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """F of each layer after pruning."""
        return tuple(len(kept) for kept in self.kept)

    def masks(self, config: ModelConfig) -> tuple[NDArray[np.float32], ...]:
        """For each layer `[F as stored]` float32: 1 where a neuron is kept, 0 where it is removed."""
        masks = []
        for kept, stored in zip(self.kept, config.stored_intermediate_sizes, strict=True):
            mask = np.zeros(stored, np.float32)
            mask[kept] = 1
            masks.append(mask)
        return tuple(masks)

    def check_fits(self, config: ModelConfig, fingerprint: str | None = None) -> None:
        """Makes sure that the plan was made for a model of this shape and, given their fingerprint, for its weights.

        Raises:
          RequestError: other layer widths, another hidden size or another fingerprint.
        """
        if (self.intermediate_sizes, self.hidden_size) != (config.intermediate_sizes, config.hidden_size):
            raise RequestError(
                f"the plan was made for {_describe(self.intermediate_sizes, self.hidden_size)}; "
                f"this model has {_describe(config.intermediate_sizes, config.hidden_size)}"
            )
        if fingerprint is not None and self.fingerprint != fingerprint:
            raise RequestError(
                f"the plan was made for other weights: it names {self.fingerprint[:23]}..., "
                f"the MLP weights of this model are {fingerprint[:23]}..."
            )

    def summary(self) -> dict[str, Any]:
        """Everything but the indices, for model cards and the history of a checkpoint."""
        return {
            "criterion": self.criterion,
            "score_dtype": "float32",
            "tie_rule": TIE_RULE,
            "request": dict(self.request),
            "source": {
                "fingerprint": self.fingerprint,
                "weights_dtype": self.weights_dtype,
                "hidden_size": self.hidden_size,
                "intermediate_sizes": list(self.intermediate_sizes),
            },
            "widths": list(self.widths),
            "versions": dict(self.versions),
        } | ({} if self.calibration is None else {"calibration": dict(self.calibration)})

    def to_json(self) -> str:
        """The plan as a file: the summary, then one line for each layer."""
        head = json.dumps({"format": FORMAT, "version": VERSION, **self.summary()}, indent=1)
        rows = [json.dumps({"layer": i, "kept": _to_ranges(kept)}) for i, kept in enumerate(self.kept)]
        return head.removesuffix("\n}") + ',\n "layers": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes the plan, whole or not at all.

        Raises:
          RequestError: `path` exists and `overwrite` is false.
          OperationError: it cannot be written.
        """
        write_file_atomic(Path(path), self.to_json().encode(), overwrite=overwrite)

    @classmethod
    def from_json(cls, text: str, name: str = "the plan") -> "PruningPlan":
        """Reads what `to_json` wrote; `name` says in errors which plan is meant.

        Raises:
          OperationError: not a plan, or a damaged one.
          RequestError: a plan of a later version.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise OperationError(f"{name} is not a pruning plan: it is not JSON ({error})") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise OperationError(f'{name} is not a pruning plan: it has no "format": "{FORMAT}"')
        if data.get("version") != VERSION:
            raise RequestError(f"{name} has version {data.get('version')!r}; this program reads version {VERSION}")
        try:
            source = data["source"]
            sizes = tuple(int(size) for size in source["intermediate_sizes"])
            layers = [row["layer"] for row in data["layers"]]
            if layers != list(range(len(sizes))) or not sizes:
                raise OperationError(f"{name} is damaged: it must have {len(sizes)} layers, numbered from 0")
            plan = cls(
                kept=tuple(_kept(row, size) for row, size in zip(data["layers"], sizes, strict=True)),
                intermediate_sizes=sizes,
                hidden_size=int(source["hidden_size"]),
                criterion=str(data["criterion"]),
                weights_dtype=str(source["weights_dtype"]),
                fingerprint=str(source["fingerprint"]),
                request=dict(data["request"]),
                versions=dict(data["versions"]),
                calibration=dict(data["calibration"]) if "calibration" in data else None,
            )
            summary = plan.summary()
            wrong = [key for key in summary if data[key] != summary[key]]
        except ValueError as error:
            raise OperationError(f"{name} is damaged: {error}") from error
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise OperationError(f"{name} is damaged: {type(error).__name__} at {error}") from error
        if wrong:
            raise OperationError(f"{name} is damaged: {wrong[0]} is {data[wrong[0]]!r}, not {summary[wrong[0]]!r}")
        return plan

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Reads a plan file.

        Raises:
          OperationError: it cannot be read, is not a plan, or is damaged.
          RequestError: there is no such file, or it is a plan of a later version.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise unreadable(f"the plan {path}", error) from error
        return cls.from_json(text, str(path))


def make_plan(
    scores: Scores,
    *,
    expansion_ratio: str | float | None = None,
    prune_percent: float | None = None,
    width: int | None = None,
    multiple_of: int = 1,
    layers: Sequence[int] | None = None,
    widths: Sequence[int] | None = None,
    allocation: Mapping[str, Any] | None = None,
) -> PruningPlan:
    """Chooses the neurons to keep. Exactly one of the three targets is given.

    Args:
      scores: from `importance.score`; any number of plans may be made from the same scores.
      expansion_ratio: target of intermediate size over hidden size; a string keeps its decimal digits.
      prune_percent: share of each layer's neurons to remove, in percent.
      width: target intermediate size.
      multiple_of: the width is floored to a multiple of this.
      layers: indices of the layers to prune (all when None); the others stay whole.
      widths: what each layer keeps of the budget that the target is, where it is not the same for all (see
        `gluprune_jax.allocation`); a layer may stay whole.
      allocation: how these widths were found, for the record.

    Raises:
      RequestError: not exactly one target, or one that would not shrink a chosen layer or leave it no neuron.
    """
    targets = {"expansion_ratio": expansion_ratio, "prune_percent": prune_percent, "width": width}
    given: dict[str, Any] = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise RequestError("give exactly one of --expansion-ratio, --prune-percent and --width")
    if multiple_of < 1:
        raise RequestError(f"--multiple-of is {multiple_of}; it must be at least 1")
    chosen = chosen_layers(scores, layers)

    kept = []
    for i, values in enumerate(scores.values):
        size = len(values)
        if i not in chosen:
            kept.append(np.arange(size, dtype=np.int32))
            continue
        target = target_width(size, scores.hidden_size, **given)
        _check_target(target, size, scores.hidden_size, i, multiple_of)
        kept.append(select_neurons(values, target // multiple_of * multiple_of if widths is None else widths[i]))

    request: dict[str, Any] = {name: str(value) for name, value in given.items()}
    request |= {"multiple_of": multiple_of, "layers": "all" if layers is None else chosen}
    if allocation is not None:
        request["allocation"] = dict(allocation)
    return PruningPlan(
        kept=tuple(kept),
        intermediate_sizes=scores.intermediate_sizes,
        hidden_size=scores.hidden_size,
        criterion=scores.criterion,
        weights_dtype=scores.weights_dtype,
        fingerprint=scores.fingerprint,
        request=request,
        versions={
            "gluprune_jax": importlib.metadata.version("gluprune-jax"),
            "jax": jax.__version__,
        },
        calibration=scores.calibration,
    )


def chosen_layers(scores: Scores, layers: Sequence[int] | None) -> list[int]:
    """The indices of the layers to prune, ascending: all when None.

    Raises:
      RequestError: none, or one that the model does not have.
    """
    chosen = set(range(len(scores.values)) if layers is None else map(operator.index, layers))
    if not chosen <= set(range(len(scores.values))) or not chosen:
        raise RequestError(f"layers {sorted(chosen)} are not all among 0 to {len(scores.values) - 1}")
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


def _check_target(target: int, size: int, hidden_size: int, layer: int, multiple_of: int) -> None:
    if target < 1:
        raise RequestError(f"a width of {target} was asked for; a layer keeps at least one neuron")
    if target // multiple_of * multiple_of < 1:
        raise RequestError(
            f"a width of {target} in multiples of {multiple_of} leaves layer {layer} no neuron; "
            f"ask for at least {multiple_of} or a smaller --multiple-of"
        )
    if (width := target // multiple_of * multiple_of) >= size:
        verb = "grow" if width > size else "not shrink"
        raise RequestError(
            f"a width of {width} would {verb} layer {layer}, which has {size} neurons (expansion ratio "
            f"{size / hidden_size:.4g}); ask for fewer neurons"
        )


def _describe(sizes: Sequence[int], hidden_size: int) -> str:
    unique = sorted(set(sizes))
    span = str(unique[0]) if len(unique) == 1 else f"{unique[0]} to {unique[-1]}"
    return f"{len(sizes)} layers of {span} neurons at hidden size {hidden_size}"


def _to_ranges(indices: NDArray[np.int32]) -> str:
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _kept(row: Mapping[str, Any], size: int) -> NDArray[np.int32]:
    """Reads the line of one layer."""
    if size > MAX_NEURONS:
        raise ValueError(f"layer {row['layer']} has {size} neurons; it may have {MAX_NEURONS}")
    runs, free = [], 0
    for part in row["kept"].split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (-1, -1)
        if not free <= first <= last < size:
            raise ValueError(f"layer {row['layer']} keeps {part!r}; it must keep ascending neurons of 0 to {size - 1}")
        runs.append(np.arange(first, last + 1, dtype=np.int32))
        free = last + 1
    return np.concatenate(runs)
