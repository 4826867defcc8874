"""How a model is pruned: criterion, allocation and compensation together."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax import Array
from numpy.typing import NDArray

from gluprune_jax import terminal
from gluprune_jax.activation_statistics import Statistics, describe_windows
from gluprune_jax.allocation import ALLOCATIONS, FLOOR, by_cost, by_score, layer_costs
from gluprune_jax.calibration import collect, gram_matrices, sensitivities
from gluprune_jax.compensation import Compensation, compensate, prune_in_order, with_down_projections
from gluprune_jax.criteria import find_criterion, inputs_of
from gluprune_jax.distributed import least
from gluprune_jax.errors import RequestError
from gluprune_jax.importance import MLPWeights, Scores, is_data_driven, score
from gluprune_jax.memory import host_memory
from gluprune_jax.mesh import mesh_of, place, to_host
from gluprune_jax.model import Llama
from gluprune_jax.plan import PruningPlan, chosen_layers, make_plan, target_width

# Of the memory that the host has free, for Gram matrices.
_HOST_SHARE = 0.25
_SHORT = {"ls": "least-squares"}


@dataclasses.dataclass(frozen=True)
class Method:
    """How neurons are chosen, and what becomes of the others' work.

    Attributes:
      criterion: a name in `CRITERIA`, or package.module:function.
      allocation: one of `ALLOCATIONS`.
      floor: the least share of its neurons that a layer keeps, where layers differ.
      is_compensated: whether down_proj is refitted by least squares.
      in_order: whether each layer is scored on, and fitted to, what the pruned ones before it give (but for
        sensitivities, which are the dense model's).
      seed: of criteria that draw random numbers.
    """

    criterion: str = "ppm"
    allocation: str = "uniform"
    floor: float = FLOOR
    is_compensated: bool = False
    in_order: bool = False
    seed: int = 0

    @classmethod
    def parse(cls, text: str, *, floor: float = FLOOR, seed: int = 0) -> "Method":
        """A method as it is written in one word: "hybrid+global+least-squares+in-order", the criterion first.

        Raises:
          RequestError: another word.
        """
        criterion, *parts = (_SHORT.get(part, part) for part in text.split("+"))
        find_criterion(criterion)
        known = (*ALLOCATIONS[1:], "least-squares", "in-order")
        if wrong := [part for part in parts if part not in known]:
            raise RequestError(f"method {text!r} has {wrong[0]!r}; behind the criterion may come {', '.join(known)}")
        allocations = [part for part in parts if part in ALLOCATIONS]
        if len(allocations) > 1:
            raise RequestError(f"method {text!r} has two allocations; give one")
        allocation = allocations[0] if allocations else "uniform"
        return cls(criterion, allocation, floor, "least-squares" in parts, "in-order" in parts, seed)

    def __str__(self) -> str:
        parts = [self.criterion, *[self.allocation] * (self.allocation != "uniform")]
        return "+".join([*parts, *["least-squares"] * self.is_compensated, *["in-order"] * self.in_order])

    @property
    def needs_statistics(self) -> bool:
        """Whether the criterion looks at activations."""
        return is_data_driven(find_criterion(self.criterion)[1])

    @property
    def depends_on_order(self) -> bool:
        """Whether pruning in order gives another model: `sensitivity` is the dense model's in any order."""
        inputs = inputs_of(find_criterion(self.criterion)[1])
        return self.is_compensated or not {"activation_norm", "mean_magnitude"}.isdisjoint(inputs)

    @property
    def needs_grams(self) -> bool:
        """Whether it looks at Gram matrices of the dense model."""
        return self.is_compensated and not self.in_order

    @property
    def needs_text(self) -> bool:
        """Whether the model must be run on calibration text, whatever statistics there are."""
        return self.is_compensated or self.in_order or self.allocation == "measured"


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A choice of neurons, and the down projections that go with it (None: those of the model)."""

    plan: PruningPlan
    compensation: Compensation | None = None

    def apply(self, model: Llama) -> Llama:
        """The model with these down projections; `plan` is still to be masked or sliced."""
        return model if self.compensation is None else with_down_projections(model, self.compensation.down_projs)

    def record(self) -> dict[str, Any]:
        """What a history says beside the plan."""
        return {} if self.compensation is None else {"compensation": self.compensation.summary()}


class Chooser:
    """Scores a model once, for any number of methods and targets.

    Args:
      model: the dense model; may be abstract where only its weights are looked at.
      weights: gives the MLP matrices, layer by layer, wherever they are.
      windows: calibration windows `[N, W]`, if there is calibration text.
      names: of the texts.
      statistics: of this model, if they were collected before.
      refits: whether down projections will be refitted, so that one pass gives statistics and Gram matrices.
    """

    def __init__(
        self,
        model: Llama,
        weights: Callable[[], Iterable[MLPWeights]],
        *,
        windows: NDArray[np.int32] | None = None,
        names: Sequence[str] = (),
        statistics: Statistics | None = None,
        refits: bool = False,
    ):
        self._model, self._weights, self._windows, self._names = model, weights, windows, names
        self._statistics = statistics
        self._refits = refits
        self._grams_on_host: list[NDArray[np.float32]] | None = None
        self._scores: dict[tuple[str, int], Scores] = {}

    def statistics(self, *, sensitivity: bool = False) -> Statistics | None:
        """Those of the model: given, or collected when they are first asked for; None without calibration text."""
        if self._statistics is None and self._windows is not None:
            kept: list[NDArray[np.float32]] | None = None
            if self._refits and self._grams_on_host is None and self._has_room():
                kept = []
            with self._layers("calibrating") as on_layer:
                self._statistics = collect(
                    self._model,
                    self._windows,
                    names=self._names,
                    on_layer=on_layer,
                    on_gram=None if kept is None else lambda gram: kept.append(to_host(gram)),
                )
            self._grams_on_host = kept or self._grams_on_host
        found = self._statistics
        if found is not None and self._windows is not None:
            ours = describe_windows(self._windows)["digest"]
            if found.texts.get("digest") != ours:
                raise RequestError(
                    "--statistics are of other text than --calibration; give the text that they were collected on, or "
                    "leave one of them out"
                )
        if found is not None and sensitivity and found.layers[0].sensitivity is None and self._windows is not None:
            with terminal.count_progress("going back through the layers", len(self._windows), "windows") as progress:
                values = sensitivities(self._model, self._windows, on_windows=progress)
            layers = [dataclasses.replace(a, sensitivity=b) for a, b in zip(found.layers, values, strict=True)]
            self._statistics = dataclasses.replace(found, layers=tuple(layers))
        return self._statistics

    def scores(self, criterion: str, seed: int = 0) -> Scores:
        """The scores by a criterion, computed once.

        Raises:
          RequestError, OperationError: as for `importance.score`.
        """
        name, function = find_criterion(criterion)
        seed = seed if "key" in inputs_of(function, name) else 0
        if (criterion, seed) not in self._scores:
            needed = "sensitivity" in inputs_of(function)
            statistics = self.statistics(sensitivity=needed) if is_data_driven(function) else None
            with self._layers("scoring neurons") as progress:
                self._scores[criterion, seed] = score(
                    self._model,
                    criterion,
                    statistics=statistics,
                    seed=seed,
                    weights=self._weights(),
                    on_layer=progress,
                )
        return self._scores[criterion, seed]

    def least_influential(self, count: int) -> list[int]:
        """The layers to drop if `count` are: those that turn their input least (ShortGPT, arXiv 2403.03853), ascending.

        Raises:
          RequestError: there are not so many, or no statistics.
        """
        layers = self._model.config.num_hidden_layers
        if not 1 <= count < layers:
            raise RequestError(f"--drop-least is {count}; of {layers} layers it must be 1 to {layers - 1}")
        statistics = self.statistics()
        if statistics is None:
            raise RequestError("the influence of layers is that on text; give --calibration TEXT")
        statistics.check_fits(self._model.config)
        influences = [layer.influence for layer in statistics.layers]
        return sorted(np.argsort(influences, kind="stable")[:count].tolist())

    def choose(self, method: Method, targets: Sequence[Mapping[str, Any]]) -> list[Pruned]:
        """Prunes to each target by a method; what can be shared between targets is.

        Args:
          method: how.
          targets: arguments of `make_plan`: a target, `multiple_of` and `layers`.

        Raises:
          RequestError, OperationError: as for `make_plan`, `importance.score`, `allocation` and `compensation`.
        """
        scores = self.scores(method.criterion, method.seed)
        plans = [self._plan(method, scores, target) for target in targets]
        if method.in_order:
            return [self._in_order(method, scores, target, plan) for target, plan in zip(targets, plans, strict=True)]
        if method.is_compensated:
            return self.compensated(plans)
        return [Pruned(plan) for plan in plans]

    def compensated(self, plans: Sequence[PruningPlan]) -> list[Pruned]:
        """Refits down projections for plans, in one pass over the calibration text."""
        with self._layers("refitting down_proj") as progress:
            found = compensate(self._model, self._grams(), plans, on_layer=progress)
        texts = describe_windows(self._text(), self._names)
        plans = [dataclasses.replace(plan, calibration=plan.calibration or texts) for plan in plans]
        return [Pruned(plan, compensation) for plan, compensation in zip(plans, found, strict=True)]

    def _plan(self, method: Method, scores: Scores, target: Mapping[str, Any]) -> PruningPlan:
        uniform = make_plan(scores, **target)
        if method.allocation == "uniform":
            return uniform
        chosen = chosen_layers(len(scores.values), target.get("layers"), target.get("drop_layers", ()))
        sizes = [scores.intermediate_sizes[i] for i in chosen]
        multiple_of = target.get("multiple_of", 1)
        share = {key: value for key, value in target.items() if key in ("expansion_ratio", "prune_percent", "width")}
        if not share:
            raise RequestError(f"--allocation {method.allocation} divides a width over the layers; give one")
        budget = sum(target_width(size, scores.hidden_size, **share) for size in sizes)
        about: dict[str, Any] = {"method": method.allocation, "floor": method.floor}
        if method.allocation == "global":
            values = [scores.values[i] for i in chosen]
            found = by_score(values, budget, floor=method.floor, multiple_of=multiple_of)
        else:
            with self._layers("measuring layers") as progress:
                grams = self._grams() if method.is_compensated else None
                costs = layer_costs(self._model, self._text(), uniform, grams=grams, on_layer=progress)
            found = by_cost([costs[i] for i in chosen], sizes, budget, floor=method.floor, multiple_of=multiple_of)
            about["costs"] = [round(cost, 6) for cost in costs]
            if scores.calibration is None:
                scores = dataclasses.replace(scores, calibration=describe_windows(self._text(), self._names))
        widths = list(scores.intermediate_sizes)
        for i, width in zip(chosen, found, strict=True):
            widths[i] = width
        return make_plan(scores, **target, widths=widths, allocation=about)

    def _in_order(self, method: Method, scores: Scores, target: Mapping[str, Any], plan: PruningPlan) -> Pruned:
        needs = method.needs_statistics
        with self._layers("pruning layers in order") as progress:
            values, compensation = prune_in_order(
                self._model,
                self._text(),
                method.criterion,
                plan.widths,
                statistics=self.statistics() if needs else None,
                is_compensated=method.is_compensated,
                seed=method.seed,
                on_layer=progress,
            )
        texts = describe_windows(self._text(), self._names)
        scores = dataclasses.replace(scores, values=values, calibration=texts)
        plan = make_plan(scores, **target, widths=plan.widths, allocation=plan.request.get("allocation"))
        plan = dataclasses.replace(plan, request={**plan.request, "in_order": True})
        return Pruned(plan, compensation if method.is_compensated else None)

    def _grams(self) -> Iterator[Array]:
        """The Gram matrices of the layers, computed once if the host has room for them."""
        if self._grams_on_host is not None:
            mesh = mesh_of(self._model)
            yield from (place(mesh, gram, "neurons", None) for gram in self._grams_on_host)
            return
        kept: list[NDArray[np.float32]] | None = [] if self._has_room() else None
        for gram in gram_matrices(self._model, self._text()):
            if kept is not None:
                kept.append(to_host(gram))
            yield gram
        self._grams_on_host = kept

    def _has_room(self) -> bool:
        """Whether the Gram matrices fit into the memory of every process's host."""
        size = sum(4 * width * width for width in self._model.config.stored_intermediate_sizes)
        return size <= least(host_memory()) * _HOST_SHARE

    def _text(self) -> NDArray[np.int32]:
        if self._windows is None:
            raise RequestError("this needs the model to run on text; give --calibration TEXT")
        return self._windows

    @contextlib.contextmanager
    def _layers(self, what: str) -> Iterator[Callable[[int], None]]:
        """A bar over layers, called with the index of each that is done."""
        with terminal.count_progress(what, self._model.config.num_hidden_layers, "layers") as report:
            yield lambda i: report(i + 1)
