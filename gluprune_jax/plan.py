"""Which layers and which of their neurons are kept: how a target becomes widths, and the file that records the choice.

A plan is JSON with one line for each layer, so that it can be read, diffed and replayed. Kept neurons are written
as ranges ("0-3,5" is 0, 1, 2, 3, 5); a layer that is dropped keeps none.
"""

import dataclasses
import decimal
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
from numpy.typing import ArrayLike, NDArray

from gluprune_jax.atomic import write_file_atomic
from gluprune_jax.errors import OperationError, RequestError, unreadable
from gluprune_jax.importance import Scores, select_neurons
from gluprune_jax.model import ModelConfig

FORMAT, VERSION = "gluprune-plan", 1
MAX_NEURONS = 1 << 24  # of a layer in a plan file: a damaged number must not fill the memory
# How widths can be asked for, and how tables spell it.
TARGETS = {"prune_percent": "{} %", "expansion_ratio": "{}x", "width": "{}"}
TIE_RULE = "among equal scores the lower index is kept"
WIDTHLESS = "--layers and --multiple-of refine --expansion-ratio, --prune-percent or --width; none of these is given"


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


def parse_layers(text: str, num_layers: int, flag: str = "--layers") -> tuple[int, ...]:
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


# ---------------------------------------------------------------------------------------------------- plans


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """The kept neurons of every layer, and where the choice comes from.

    Layers are counted as in the dense model; those that stay are renumbered only in the pruned one.

    Attributes:
      kept: for each layer the kept indices, int32, ascending. A layer that stays whole keeps all of them, one that is
        dropped none.
      intermediate_sizes: F of each layer before pruning.
      hidden_size: D.
      criterion: the name of the criterion that ranked the neurons.
      weights_dtype: dtype of the weights that were scored; the scores are float32.
      fingerprint: identifies those weights (see `importance.score`).
      request: the target as it was asked for.
      versions: of this package and of jax.
      calibration: the text that the choice of neurons, widths or layers comes from, or that down projections were
        refitted to (`calibration.describe_windows`).
      dropped_layers: the layers that are removed whole, attention and MLP, ascending.
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
    dropped_layers: tuple[int, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """F of each layer after pruning; 0 where it is dropped."""
        return tuple(len(kept) for kept in self.kept)

    @property
    def remaining_layers(self) -> tuple[int, ...]:
        """The layers that stay, ascending: layer i of the pruned model is the i-th of them."""
        return tuple(i for i in range(len(self.kept)) if i not in self.dropped_layers)

    def pruned_config(self, config: ModelConfig) -> ModelConfig:
        """The architecture after pruning a model of architecture `config`: the layers that stay, with their widths.

        Raises:
          RequestError: as `check_fits`.
        """
        self.check_fits(config)
        widths = self.widths
        return dataclasses.replace(config, intermediate_sizes=tuple(widths[i] for i in self.remaining_layers))

    def check_maskable(self) -> None:
        """Makes sure that a mask over neurons says all that the plan does.

        Raises:
          RequestError: the plan drops layers.
        """
        if self.dropped_layers:
            raise RequestError(
                f"the plan drops {spell_layers(self.dropped_layers)}, which a mask over neurons cannot do; prune "
                f"with it (python -m gluprune_jax.prune --plan) and use the pruned model instead"
            )

    def masks(self, config: ModelConfig) -> tuple[NDArray[np.float32], ...]:
        """For each layer `[F as stored]` float32: 1 where a neuron is kept, 0 where it is removed.

        Raises:
          RequestError: the plan drops layers: without its neurons a layer would still have its attention.
        """
        self.check_maskable()
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
        """Everything but the indices, for model cards and the history of a checkpoint.

        `dropped_layers` is there only if there are any: other plans read as they did before layers could be dropped.
        """
        dropped = {"dropped_layers": list(self.dropped_layers)} if self.dropped_layers else {}
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
            **dropped,
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
            dropped = _dropped_layers(data.get("dropped_layers", []), len(sizes))
            plan = cls(
                kept=tuple(
                    _kept(row, size, row["layer"] in dropped) for row, size in zip(data["layers"], sizes, strict=True)
                ),
                intermediate_sizes=sizes,
                hidden_size=int(source["hidden_size"]),
                criterion=str(data["criterion"]),
                weights_dtype=str(source["weights_dtype"]),
                fingerprint=str(source["fingerprint"]),
                request=dict(data["request"]),
                versions=dict(data["versions"]),
                calibration=dict(data["calibration"]) if "calibration" in data else None,
                dropped_layers=dropped,
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
    drop_layers: Sequence[int] = (),
    widths: Sequence[int] | None = None,
    allocation: Mapping[str, Any] | None = None,
) -> PruningPlan:
    """Chooses the neurons to keep. Exactly one of the three targets is given; where layers are dropped, at most one.

    Args:
      scores: from `importance.score`; any number of plans may be made from the same scores.
      expansion_ratio: target of intermediate size over hidden size; a string keeps its decimal digits.
      prune_percent: share of each layer's neurons to remove, in percent.
      width: target intermediate size.
      multiple_of: the width is floored to a multiple of this.
      layers: indices of the layers to prune (all that stay when None); the others stay whole.
      drop_layers: indices of the layers to remove whole, in any order. They go by index: scores decide nothing here.
      widths: what each layer keeps of the budget that the target is, where it is not the same for all (see
        `gluprune_jax.allocation`); a layer may stay whole.
      allocation: how these widths were found, for the record.

    Raises:
      RequestError: no or more than one target, or one that would not shrink a chosen layer or leave it no neuron; a
        layer that is not there, or is to be both pruned and dropped; all layers dropped; `layers` or `multiple_of`
        without a target.
    """
    targets = {"expansion_ratio": expansion_ratio, "prune_percent": prune_percent, "width": width}
    given: dict[str, Any] = {name: value for name, value in targets.items() if value is not None}
    dropped = _check_layers(drop_layers, len(scores.values), empty=True)
    if len(given) > 1 or not (given or dropped):
        raise RequestError(
            "give exactly one of --expansion-ratio, --prune-percent and --width, or with --drop-layers at most one"
        )
    if multiple_of < 1:
        raise RequestError(f"--multiple-of is {multiple_of}; it must be at least 1")
    if not given and (layers is not None or multiple_of != 1):
        raise RequestError(WIDTHLESS)
    chosen = chosen_layers(len(scores.values), layers, drop_layers)

    kept = []
    for i, values in enumerate(scores.values):
        size = len(values)
        if i in dropped:
            kept.append(np.empty(0, np.int32))
            continue
        if not given or i not in chosen:
            kept.append(np.arange(size, dtype=np.int32))
            continue
        target = target_width(size, scores.hidden_size, **given)
        _check_target(target, size, scores.hidden_size, i, multiple_of)
        kept.append(select_neurons(values, target // multiple_of * multiple_of if widths is None else widths[i]))

    request: dict[str, Any] = {name: str(value) for name, value in given.items()}
    if given:
        request |= {"multiple_of": multiple_of, "layers": "all" if layers is None else chosen}
    if dropped:
        request["drop_layers"] = sorted(dropped)
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
        dropped_layers=tuple(sorted(dropped)),
    )


def chosen_layers(num_layers: int, layers: Sequence[int] | None, drop_layers: Sequence[int] = ()) -> list[int]:
    """The indices of the layers whose neurons are pruned, ascending.

    Args:
      num_layers: L.
      layers: those that are asked for; all that stay when None.
      drop_layers: those that are removed whole.

    Raises:
      RequestError: a layer that the model does not have or that is to be both pruned and dropped, or none is left.
    """
    dropped = _check_layers(drop_layers, num_layers, empty=True)
    if len(dropped) == num_layers:
        raise RequestError(f"all {num_layers} layers would be dropped; a model keeps at least one")
    chosen = set(range(num_layers)) - dropped if layers is None else _check_layers(layers, num_layers)
    if both := sorted(chosen & dropped):
        raise RequestError(
            f"--layers and --drop-layers both name {spell_layers(both)}; prune or drop a layer, not both"
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


def check_targets(config: ModelConfig, targets: Sequence[Mapping[str, Any]]) -> None:
    """Refuses targets that a model cannot be pruned to, before anything is scored.

    Raises:
      RequestError: as `make_plan`.
    """
    blank = tuple(np.zeros(size, np.float32) for size in config.intermediate_sizes)
    for target in targets:
        make_plan(Scores("", blank, config.hidden_size, "", ""), **target)


def spell_target(target: Mapping[str, Any]) -> str:
    """A target as tables show it: "20 %", "2.4x", "4096", "20 % of layer 3"."""
    (kind,) = (name for name in TARGETS if name in target)
    where = f" of layer {target['layers'][0]}" if "layers" in target else ""
    number = f"{decimal.Decimal(str(target[kind])).normalize():f}"  # 1.20 is 1.2, and 20.0 is 20
    return TARGETS[kind].format(number) + where


def _check_layers(layers: Sequence[int], num_layers: int, *, empty: bool = False) -> set[int]:
    chosen = set(map(operator.index, layers))
    if not chosen <= set(range(num_layers)) or not (chosen or empty):
        raise RequestError(f"layers {sorted(chosen)} are not all among 0 to {num_layers - 1}")
    return chosen


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


def ranks_neurons(summary: Mapping[str, Any]) -> bool:
    """Whether the plan of a summary is more than a list of dropped layers, in which its criterion had no say."""
    sizes = zip(summary["widths"], summary["source"]["intermediate_sizes"], strict=True)
    return any(0 < width < size for width, size in sizes) or not summary.get("dropped_layers")


def spell_layers(indices: Sequence[int]) -> str:
    """Ascending layers for people: "layer 3", "layers 0-2,7"."""
    return f"layer{'s' * (len(indices) > 1)} {_to_ranges(indices)}"


def _to_ranges(indices: ArrayLike) -> str:
    """Ascending whole numbers as a plan spells them: 0, 1, 2, 3, 5 is "0-3,5", none is ""."""
    indices = np.asarray(indices, np.int32)
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1) if len(indices) else []
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _dropped_layers(value: Any, num_layers: int) -> tuple[int, ...]:
    """Reads the layers that a plan file drops."""
    is_list = isinstance(value, list) and all(type(i) is int and 0 <= i < num_layers for i in value)
    if not is_list or value != sorted(set(value)) or len(value) == num_layers:
        raise ValueError(
            f"dropped_layers is {value!r}; it must hold ascending layers of 0 to {num_layers - 1}, and not all of them"
        )
    return tuple(value)


def _kept(row: Mapping[str, Any], size: int, is_dropped: bool) -> NDArray[np.int32]:
    """Reads the line of one layer."""
    if size > MAX_NEURONS:
        raise ValueError(f"layer {row['layer']} has {size} neurons; it may have {MAX_NEURONS}")
    if is_dropped:
        if row["kept"] != "":
            raise ValueError(f"layer {row['layer']} is dropped and keeps {row['kept']!r}; it must keep nothing")
        return np.empty(0, np.int32)
    runs, free = [], 0
    for part in row["kept"].split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (-1, -1)
        if not free <= first <= last < size:
            raise ValueError(f"layer {row['layer']} keeps {part!r}; it must keep ascending neurons of 0 to {size - 1}")
        runs.append(np.arange(first, last + 1, dtype=np.int32))
        free = last + 1
    return np.concatenate(runs)
