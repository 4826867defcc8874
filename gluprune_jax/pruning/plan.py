"""Which layers and which of their neurons are kept: how a target becomes widths, and the file that records the choice.

A plan is JSON with one line for each layer, so that it can be read, diffed and replayed. Kept neurons are written
as ranges ("0-3,5" is 0, 1, 2, 3, 5); a layer that is dropped keeps none. `sha256` is the digest of all the rest, so
that a damaged digit is found; a plan without it, as older versions wrote them, is read too.

The plan of a mixture of experts says under `source` how many experts each layer has, and has one line for each expert.
"""

import dataclasses
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gluprune_jax.errors import OperationError, RequestError, first_line, shortened, unreadable
from gluprune_jax.files.atomic import write_file_atomic
from gluprune_jax.files.records import (
    ANYTHING,
    FLAG,
    OBJECT,
    SEAL,
    TEXT,
    WHOLE,
    check,
    check_seal,
    damaged,
    either,
    exactly,
    list_of,
    problem,
    record_of,
    sealed,
)
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.pruning.mixture import (
    MixtureSizes,
    expert_size,
    mlp_names,
    mlp_sizes,
    of_each_layer,
    of_each_mlp,
    positions,
)
from gluprune_jax.pruning.scores import Scores, select_neurons
from gluprune_jax.pruning.targets import (
    ROUNDINGS,
    TARGETS,
    WIDTHLESS,
    check_layers,
    chosen_layers,
    format_layers,
    format_ranges,
    rounded_width,
    target_width,
    width_for_share,
)

FORMAT, VERSION = "gluprune-plan", 1


MAX_NEURONS = 1 << 24  # of a layer in a plan file: a damaged number must not fill the memory


TIE_RULE = "among equal scores the lower index is kept"


_PLAN = record_of(
    {
        "criterion": TEXT,
        "score_dtype": TEXT,
        "tie_rule": TEXT,
        "request": OBJECT,
        "source": record_of(
            {
                "fingerprint": TEXT,
                "weights_dtype": TEXT,
                "hidden_size": WHOLE,
                "intermediate_sizes": list_of(WHOLE),
            },
            maybe={"experts": list_of(WHOLE)},
        ),
        "widths": list_of(WHOLE),
        "versions": OBJECT,
        "layers": list_of(record_of({"layer": WHOLE, "kept": TEXT}, maybe={"expert": WHOLE})),
    },
    maybe={"dropped_layers": ANYTHING, "calibration": OBJECT},
)


# Of the request of a plan that ranks neurons; the target is a text under its own name.
_RANKING = record_of(
    {"multiple_of": WHOLE, "layers": either(exactly("all"), list_of(WHOLE))},
    maybe=dict.fromkeys(TARGETS, TEXT) | {"allocation": OBJECT, "in_order": FLAG, "compensate": TEXT, "rounding": TEXT},
)


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
      fingerprint: identifies those weights (see `scores.score`).
      request: the target as it was asked for, and the method (allocation, in order, compensation) where it is another
        than the same width for all layers by their scores alone.
      versions: of this package and of jax.
      calibration: the text that the choice of neurons, widths or layers comes from, or that weights were fitted to
        (`calibration.describe_windows`).
      dropped_layers: the layers that are removed whole, attention and MLP, ascending.
      experts: of a mixture of experts how many each layer has (0: it is dense); `kept` and `intermediate_sizes` are
        then of each MLP, not of each layer (see `gluprune_jax.pruning.mixture`). Empty for any other model.
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
    experts: tuple[int, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """F of each layer after pruning, or of each MLP of a mixture; 0 where it is dropped."""
        return tuple(len(kept) for kept in self.kept)

    @property
    def remaining_layers(self) -> tuple[int, ...]:
        """The layers that stay, ascending: layer i of the pruned model is the i-th of them."""
        return tuple(i for i in range(len(self.kept)) if i not in self.dropped_layers)

    @property
    def is_compensated(self) -> bool:
        """Whether weights were repaired, which the plan does not hold: to replay it is to repair them again."""
        return bool(self.request.get("compensate", "none") != "none")

    def compensated_on(self, texts: Mapping[str, Any], compensate: str = "least-squares") -> "PruningPlan":
        """The same choice, with a note that weights were repaired on these texts (`describe_windows`).

        Args:
          texts: what they were fitted to.
          compensate: how, as `Method.compensate` spells it.
        """
        return dataclasses.replace(self, request={**self.request, "compensate": compensate}, calibration=texts)

    def pruned_config(self, config: ModelConfig) -> ModelConfig:
        """The architecture after pruning a model of architecture `config`: the layers that stay, with their widths.

        Raises:
          RequestError: as `check_fits`.
        """
        self.check_fits(config)
        return config.with_layers(self.remaining_layers, [self.widths[i] for i in self.remaining_layers])

    def pruned_sizes(self, sizes: MixtureSizes) -> MixtureSizes:
        """The sizes after pruning a mixture of experts.

        Raises:
          RequestError: as `check_fits`.
        """
        self.check_fits(sizes)
        return sizes.with_mlp_sizes(self.widths)

    def check_maskable(self) -> None:
        """Makes sure that a mask over neurons says all that the plan does.

        Raises:
          RequestError: the plan drops layers, or is that of a mixture of experts.
        """
        if self.experts:
            raise RequestError(
                "the plan is that of a mixture of experts, which cannot be run under a mask; prune with it instead"
            )
        if self.dropped_layers:
            raise RequestError(
                f"the plan drops {format_layers(self.dropped_layers)}, which a mask over neurons cannot do; prune "
                f"with it and use the pruned model instead"
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

    def check_fits(self, config: ModelConfig | MixtureSizes, fingerprint: str | None = None) -> None:
        """Makes sure that the plan was made for a model of this shape and, given their fingerprint, for its weights.

        Raises:
          RequestError: other layer widths, another hidden size or another fingerprint; a mixture of experts where
            the other is none.
        """
        sizes, experts = mlp_sizes(config)
        if (self.intermediate_sizes, self.hidden_size, self.experts) != (sizes, config.hidden_size, experts):
            raise RequestError(
                f"the plan was made for {_describe(self.intermediate_sizes, self.hidden_size, self.experts)}; "
                f"this model has {_describe(sizes, config.hidden_size, experts)}"
            )
        if fingerprint is not None and self.fingerprint != fingerprint:
            raise RequestError(
                f"the plan was made for other weights: it names {self.fingerprint[:23]}..., "
                f"the MLP weights of this model are {fingerprint[:23]}..."
            )

    def summary(self) -> dict[str, Any]:
        """Everything but the indices, for model cards and the history of a checkpoint. Widths are those of each layer.

        `dropped_layers` is there only if there are any: other plans read as they did before layers could be dropped.
        """
        dropped = {"dropped_layers": list(self.dropped_layers)} if self.dropped_layers else {}
        # A layer's experts are all of one width: a list of a number for each would be long, and say no more.
        sizes, widths = self.intermediate_sizes, self.widths
        if self.experts:
            sizes, widths = of_each_layer(self.experts, sizes), of_each_layer(self.experts, widths)
        source = {
            "fingerprint": self.fingerprint,
            "weights_dtype": self.weights_dtype,
            "hidden_size": self.hidden_size,
            "intermediate_sizes": list(sizes),
        } | ({"experts": list(self.experts)} if self.experts else {})
        return {
            "criterion": self.criterion,
            "score_dtype": "float32",
            "tie_rule": TIE_RULE,
            "request": dict(self.request),
            "source": source,
            "widths": list(widths),
            **dropped,
            "versions": dict(self.versions),
        } | ({} if self.calibration is None else {"calibration": dict(self.calibration)})

    def to_json(self) -> str:
        """The plan as a file: the summary with a digest of the whole, then one line for each layer or expert."""
        places = _places(self.experts, len(self.kept))
        layers = [{**place, "kept": format_ranges(kept)} for place, kept in zip(places, self.kept, strict=True)]
        document = sealed({"format": FORMAT, "version": VERSION, **self.summary(), "layers": layers})
        del document["layers"]
        head = json.dumps(document, indent=1)
        rows = map(json.dumps, layers)
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
            raise OperationError(f"{name} is not a pruning plan: it is not JSON ({first_line(error)})") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise OperationError(f'{name} is not a pruning plan: it has no "format": "{FORMAT}"')
        if data.get("version") != VERSION:
            raise RequestError(
                f"{name} has version {shortened(data.get('version'))}; this program reads version {VERSION}"
            )
        check(data, _PLAN, name)
        source, sizes = data["source"], tuple(data["source"]["intermediate_sizes"])
        experts = tuple(source.get("experts", ()))
        if experts:
            sizes = _mlp_sizes(experts, sizes, len(data["layers"]), name)
        places = [{key: row[key] for key in ("layer", "expert") if key in row} for row in data["layers"]]
        if places != _places(experts, len(sizes)) or not sizes:
            what = "layers, numbered from 0" if not experts else "MLPs, those of `experts` numbered in each layer"
            raise damaged(name, f"it must have {len(sizes)} {what}")
        try:
            dropped = _dropped_layers(data.get("dropped_layers", []), len(sizes))
            kept = tuple(
                _kept(row, size, row["layer"] in dropped) for row, size in zip(data["layers"], sizes, strict=True)
            )
        except ValueError as error:
            raise damaged(name, str(error)) from error
        plan = cls(
            kept=kept,
            intermediate_sizes=sizes,
            hidden_size=source["hidden_size"],
            criterion=data["criterion"],
            weights_dtype=source["weights_dtype"],
            fingerprint=source["fingerprint"],
            request=data["request"],
            versions=data["versions"],
            calibration=data.get("calibration"),
            dropped_layers=dropped,
            experts=experts,
        )
        if experts and (dropped or plan.widths != of_each_mlp(experts, of_each_layer(experts, plan.widths))):
            raise damaged(name, "the experts of a layer must keep equally many neurons, and no layer may be dropped")
        summary = plan.summary()
        if wrong := [key for key in summary if data[key] != summary[key]]:
            key = wrong[0]
            raise damaged(name, f"{key} is {shortened(data[key])}, not {shortened(summary[key])}")
        if ranks_neurons(summary) and (wrong_request := problem(data["request"], _RANKING, "request")):
            raise damaged(name, wrong_request)
        check_seal(data, name, f"if you changed it yourself, remove its {SEAL}")
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
    rounding: str = "down",
    layers: Sequence[int] | None = None,
    drop_layers: Sequence[int] = (),
    widths: Sequence[int] | None = None,
    allocation: Mapping[str, Any] | None = None,
) -> PruningPlan:
    """Chooses the neurons to keep. Exactly one of the three targets is given; where layers are dropped, at most one.

    Args:
      scores: from `scores.score`; any number of plans may be made from the same scores.
      expansion_ratio: target of intermediate size over hidden size; a string keeps its decimal digits.
      prune_percent: share of each layer's neurons to remove, in percent.
      width: target intermediate size.
      multiple_of: the width is a multiple of this.
      rounding: "down", or to the "nearest" multiple (see `targets.rounded_width`).
      layers: indices of the layers to prune (all that stay when None); the others stay whole.
      drop_layers: indices of the layers to remove whole, in any order. They go by index: scores decide nothing here.
      widths: what each layer keeps of the budget that the target is, where it is not the same for all (see
        `gluprune_jax.pruning.allocation`); a layer may stay whole.
      allocation: how these widths were found, for the record.

    Raises:
      RequestError: no or more than one target, or one that would not shrink a chosen layer or leave it no neuron; a
        layer that is not there, or is to be both pruned and dropped; all layers dropped; `layers` or `multiple_of`
        without a target.
    """
    targets = {"expansion_ratio": expansion_ratio, "prune_percent": prune_percent, "width": width}
    given: dict[str, Any] = {name: value for name, value in targets.items() if value is not None}
    if scores.experts:
        _check_mixture(layers, drop_layers, widths)
    dropped = check_layers(drop_layers, len(scores.values), empty=True)
    if len(given) > 1 or not (given or dropped):
        raise RequestError(
            "give exactly one of `expansion_ratio`, `prune_percent` and `width`, or with `drop_layers` at most one"
        )
    if multiple_of < 1:
        raise RequestError(f"`multiple_of` is {multiple_of}; it must be at least 1")
    if rounding not in ROUNDINGS:
        raise RequestError(f"`rounding` is {rounding!r}; it must be {' or '.join(map(repr, ROUNDINGS))}")
    if not given and (layers is not None or multiple_of != 1):
        raise RequestError(WIDTHLESS)
    chosen = chosen_layers(len(scores.values), layers, drop_layers)
    wanted = _mlp_targets(scores, given, multiple_of, rounding) if given else []
    dense = {i for i, (_, expert) in enumerate(positions(scores.experts)) if expert is None}
    where = mlp_names(scores.experts).__getitem__ if scores.experts else "layer {}".format

    kept = []
    for i, values in enumerate(scores.values):
        size = len(values)
        if i in dropped:
            kept.append(np.empty(0, np.int32))
            continue
        if not given or i not in chosen or (wanted[i] == size and i in dense):
            kept.append(np.arange(size, dtype=np.int32))
            continue
        target = wanted[i]
        rounded = rounded_width(target, size, multiple_of, rounding)
        _check_target(target, rounded, size, scores.hidden_size, where(i), multiple_of)
        kept.append(select_neurons(values, rounded if widths is None else widths[i]))

    request: dict[str, Any] = {name: str(value) for name, value in given.items()}
    if given:
        request |= {"multiple_of": multiple_of, "layers": "all" if layers is None else chosen}
        request |= {"rounding": rounding} if rounding != "down" else {}
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
            "jax": importlib.metadata.version("jax"),
        },
        calibration=scores.calibration,
        dropped_layers=tuple(sorted(dropped)),
        experts=scores.experts,
    )


def _check_mixture(layers: Any, dropped: Any, widths: Any) -> None:
    """Refuses what would give experts several widths, or would have to renumber layers."""
    given = {"layers": layers is not None, "drop_layers": bool(dropped), "allocation": widths is not None}
    if names := [f"`{name}`" for name, is_given in given.items() if is_given]:
        raise RequestError(
            f"{' and '.join(names)} cannot be given for a mixture of experts, whose experts have one width in all "
            f"layers; possible are `prune_percent`, `expansion_ratio` and `width`"
        )


def _mlp_targets(scores: Scores, given: Mapping[str, Any], multiple_of: int, rounding: str) -> list[int]:
    """The width that each layer or MLP is to have, before it is rounded to `multiple_of`.

    A target is that of the experts; dense layers among them, which have another width, lose the same share, or stay
    whole where that is less than a neuron.
    """
    sizes = scores.intermediate_sizes
    targets = [target_width(size, scores.hidden_size, **given) for size in sizes]
    if not scores.experts:
        return targets
    of = expert_size(scores.experts, sizes)
    kept = rounded_width(target_width(of, scores.hidden_size, **given), of, multiple_of, rounding)
    dense = [expert is None for _, expert in positions(scores.experts)]
    return [
        width_for_share(size, kept, of) if is_dense and 0 < kept < of and "prune_percent" not in given else target
        for size, target, is_dense in zip(sizes, targets, dense, strict=True)
    ]


def blank_plan(config: ModelConfig | MixtureSizes, **target: Any) -> PruningPlan:
    """A plan with the widths of a target and any neurons, before anything is scored.

    Raises:
      RequestError: as `make_plan`.
    """
    sizes, experts = mlp_sizes(config)
    values = tuple(np.zeros(size, np.float32) for size in sizes)
    return make_plan(Scores("", values, config.hidden_size, "", "", experts=experts), **target)


def check_targets(config: ModelConfig | MixtureSizes, targets: Sequence[Mapping[str, Any]]) -> None:
    """Refuses targets that a model cannot be pruned to, before anything is scored.

    Raises:
      RequestError: as `make_plan`.
    """
    for target in targets:
        blank_plan(config, **target)


def _check_target(target: int, width: int, size: int, hidden_size: int, where: str, multiple_of: int) -> None:
    if target < 1:
        raise RequestError(f"a width of {target} was asked for; a layer keeps at least one neuron")
    if width < 1 and size <= multiple_of:
        raise RequestError(
            f"no multiple of {multiple_of} is a width below that of {where}, which has {size} neurons; leave rounding "
            f"out, or give a smaller `multiple_of`"
        )
    if width < 1:
        raise RequestError(
            f"a width of {target} in multiples of {multiple_of} leaves {where} no neuron; "
            f"ask for at least {multiple_of} or a smaller `multiple_of`"
        )
    if width >= size:
        verb = "grow" if width > size else "not shrink"
        raise RequestError(
            f"a width of {width} would {verb} {where}, which has {size} neurons (expansion ratio "
            f"{size / hidden_size:.4g}); ask for fewer neurons"
        )


def _places(experts: Sequence[int], count: int) -> list[dict[str, int]]:
    """How a plan file numbers what it has a line for."""
    if not experts:
        return [{"layer": i} for i in range(count)]
    return [{"layer": i} if e is None else {"layer": i, "expert": e} for i, e in positions(experts)]


def _mlp_sizes(experts: tuple[int, ...], sizes: tuple[int, ...], rows: int, name: str) -> tuple[int, ...]:
    """F of each MLP of a mixture, from those of the layers in a plan file with so many rows."""
    if len(experts) != len(sizes) or not any(experts) or sum(max(1, count) for count in experts) != rows:
        raise damaged(
            name,
            f"experts is {shortened(list(experts))}; it must have one number for each of {len(sizes)} layers, "
            f"and their experts and dense MLPs a line each, which are {rows}",
        )
    return of_each_mlp(experts, sizes)


def _describe(sizes: Sequence[int], hidden_size: int, experts: Sequence[int] = ()) -> str:
    unique = sorted(set(sizes))
    span = str(unique[0]) if len(unique) == 1 else f"{unique[0]} to {unique[-1]}"
    if experts:
        return f"{sum(experts)} experts in {len(experts)} layers, MLPs of {span} neurons at hidden size {hidden_size}"
    return f"{len(sizes)} layers of {span} neurons at hidden size {hidden_size}"


def ranks_neurons(summary: Mapping[str, Any]) -> bool:
    """Whether the plan of a summary is more than a list of dropped layers, in which its criterion had no say."""
    sizes = zip(summary["widths"], summary["source"]["intermediate_sizes"], strict=True)
    return any(0 < width < size for width, size in sizes) or not summary.get("dropped_layers")


def _dropped_layers(value: Any, num_layers: int) -> tuple[int, ...]:
    """Reads the layers that a plan file drops."""
    is_list = isinstance(value, list) and all(type(i) is int and 0 <= i < num_layers for i in value)
    if not is_list or value != sorted(set(value)) or len(value) == num_layers:
        raise ValueError(
            f"dropped_layers is {shortened(value)}; it must hold ascending layers of 0 to {num_layers - 1}, and not "
            f"all of them"
        )
    return tuple(value)


def _kept(row: Mapping[str, Any], size: int, is_dropped: bool) -> NDArray[np.int32]:
    """Reads the line of one layer."""
    where = f"layer {row['layer']}" + (f", expert {row['expert']}," if "expert" in row else "")
    if size > MAX_NEURONS:
        raise ValueError(f"{where} has {size} neurons; it may have {MAX_NEURONS}")
    if is_dropped:
        if row["kept"] != "":
            raise ValueError(f"{where} is dropped and keeps {shortened(row['kept'])}; it must keep nothing")
        return np.empty(0, np.int32)
    runs, free = [], 0
    for part in row["kept"].split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (-1, -1)
        if not free <= first <= last < size:
            raise ValueError(f"{where} keeps {shortened(part)}; it must keep ascending neurons of 0 to {size - 1}")
        runs.append(np.arange(first, last + 1, dtype=np.int32))
        free = last + 1
    return np.concatenate(runs)
