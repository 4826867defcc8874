"""Prunes a model by any number of methods, and computes once what they share."""

import contextlib
import dataclasses
import datetime
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array
from numpy.typing import NDArray

from gluprune_jax.errors import RequestError
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.parallel.distributed import min_over_processes
from gluprune_jax.parallel.machine import host_memory
from gluprune_jax.parallel.mesh import mesh_of, place, to_host
from gluprune_jax.progress import Progress, no_progress
from gluprune_jax.pruning.allocation import by_cost, by_score, layer_costs, least_widths
from gluprune_jax.pruning.budget import SizeLimit, allocated_within
from gluprune_jax.pruning.calibration import collect, gram_folds, gram_matrices, sensitivities
from gluprune_jax.pruning.choices import inputs_of_criterion, is_data_driven
from gluprune_jax.pruning.least_squares import Compensation, compensate, prune_in_order
from gluprune_jax.pruning.methods import Method, Pruned
from gluprune_jax.pruning.plan import PruningPlan, make_plan
from gluprune_jax.pruning.reconstruction import divide_windows, reconstruct
from gluprune_jax.pruning.scores import MLPWeights, Scores, score
from gluprune_jax.pruning.statistics import SENSITIVITIES, Statistics, describe_windows
from gluprune_jax.pruning.targets import chosen_layers, target_width

# Of the memory that the host has free, for Gram matrices.
_HOST_SHARE = 0.25


class Chooser:
    """Scores a model once, for any number of methods and targets.

    Args:
      model: the dense model; may be abstract where only its weights are looked at.
      weights: gives the MLP matrices, layer by layer, wherever they are.
      windows: calibration windows `[N, W]`, if there is calibration text.
      names: of the texts.
      date: that the chat template wrote into them.
      statistics: of this model, if they were collected before.
      refits: whether down projections will be refitted, so that one pass gives statistics and Gram matrices.
      cache: a folder where reconstruction may keep finished layers until all are (see `reconstruction.reconstruct`).
      progress: is told what is being done.
    """

    def __init__(
        self,
        model: Decoder,
        weights: Callable[[], Iterable[MLPWeights[Any]]],
        *,
        windows: NDArray[np.int32] | None = None,
        names: Sequence[str] = (),
        date: datetime.date | None = None,
        statistics: Statistics | None = None,
        refits: bool = False,
        cache: Path | None = None,
        progress: Progress = no_progress,
    ):
        self._model, self._weights, self._windows, self._names = model, weights, windows, names
        self._date = date
        self._folder = None if cache is None else cache / "reconstruction"
        self._statistics = statistics
        self._refits, self._progress = refits, progress
        self._grams_on_host: list[NDArray[np.float32]] | None = None
        self._scores: dict[tuple[str, int], Scores] = {}

    def statistics(self, *sensitivities_of: str) -> Statistics | None:
        """Those of the model: given, or collected when they are first asked for; None without calibration text.

        Args:
          sensitivities_of: those of `statistics.SENSITIVITIES` that are needed.

        Raises:
          RequestError: statistics of other text.
        """
        if self._statistics is None and self._windows is not None:
            kept: list[NDArray[np.float32]] | None = None
            if self._refits and self._grams_on_host is None and self._has_room():
                kept = []
            with self._layers("calibrating") as on_layer:
                self._statistics = collect(
                    self._model,
                    self._windows,
                    names=self._names,
                    date=self._date,
                    on_layer=on_layer,
                    on_gram=None if kept is None else lambda gram: kept.append(to_host(gram)),
                )
            self._grams_on_host = kept or self._grams_on_host
        found = self._statistics
        if found is not None and self._windows is not None:
            ours = describe_windows(self._windows)["digest"]
            if found.texts.get("digest") != ours:
                raise RequestError(
                    "`statistics` are of other text than `calibration`; give the text that they were collected on, or "
                    "leave one of them out"
                )
        for name in sensitivities_of:
            if found is None or self._windows is None or getattr(found.layers[0], name) is not None:
                continue
            with self._progress("going back through the layers", len(self._windows), "windows") as progress:
                of_entropy = name == "entropy_sensitivity"
                values = sensitivities(self._model, self._windows, of_entropy=of_entropy, on_windows=progress)
            pairs: Iterator[tuple[Any, Any]] = zip(found.layers, values, strict=True)
            layers = [dataclasses.replace(layer, **{name: value}) for layer, value in pairs]
            found = self._statistics = dataclasses.replace(found, layers=tuple(layers))
        return found

    def scores(self, criterion: str, seed: int = 0) -> Scores:
        """The scores by a criterion, computed once.

        Raises:
          RequestError, OperationError: as for `scores.score`.
        """
        inputs = inputs_of_criterion(criterion)
        seed = seed if "key" in inputs else 0
        if (criterion, seed) not in self._scores:
            needed = [part for part in inputs if part in SENSITIVITIES]
            statistics = self.statistics(*needed) if is_data_driven(criterion) else None
            if statistics and (lacking := [part for part in needed if getattr(statistics.layers[0], part) is None]):
                part = lacking[0].replace("_", " ")
                raise RequestError(
                    f"criterion {criterion!r} looks at the {part}, which these statistics lack; collect them with "
                    f"`criterion` {criterion}, or give `calibration` TEXT too"
                )
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
            raise RequestError(f"`drop_least` is {count}; of {layers} layers it must be 1 to {layers - 1}")
        statistics = self.statistics()
        if statistics is None:
            raise RequestError("the influence of layers is that on text; give `calibration` TEXT")
        statistics.check_fits(self._model.config)
        influences = [layer.influence for layer in statistics.layers]
        return sorted(np.argsort(influences, kind="stable")[:count].tolist())

    def choose(self, method: Method, targets: Sequence[Mapping[str, Any]]) -> list[Pruned]:
        """Prunes to each target by a method; what can be shared between targets is.

        Args:
          method: how.
          targets: arguments of `make_plan`: a target, `multiple_of`, `layers`, `drop_layers`; or in place of the last
            `drop_least`, how many layers to drop (see `least_influential`). With an allocation also `within`:
            the target becomes the one that keeps most of this limit (see `budget.target_within`).

        Raises:
          RequestError, OperationError: as for `make_plan`, `scores.score`, `allocation`, `least_squares` and
            `reconstruction`.
        """
        counts = [target.get("drop_least") for target in targets]
        targets = [self._naming_layers(target) for target in targets]
        found = self._choose(method, targets)
        return [
            pruned if count is None else self._naming_texts(pruned) for pruned, count in zip(found, counts, strict=True)
        ]

    def _naming_layers(self, target: Mapping[str, Any]) -> Mapping[str, Any]:
        """A target with `drop_layers` in place of `drop_least`."""
        others = {name: value for name, value in target.items() if name != "drop_least"}
        count = target.get("drop_least")
        return others if count is None else {**others, "drop_layers": self.least_influential(count)}

    def _naming_texts(self, pruned: Pruned) -> Pruned:
        """A choice of layers by their influence, with the texts that this is of."""
        statistics = self.statistics()
        assert statistics is not None  # the layers were found by them
        statistics.check_fits(self._model.config, pruned.plan.fingerprint)
        calibration = pruned.plan.calibration or dict(statistics.texts)
        return dataclasses.replace(pruned, plan=dataclasses.replace(pruned.plan, calibration=calibration))

    def _choose(self, method: Method, targets: Sequence[Mapping[str, Any]]) -> list[Pruned]:
        scores = self.scores(method.criterion, method.seed)
        pairs = [self._plan(method, scores, target) for target in targets]
        if method.sequential:
            return [self._repaired(self._sequential(method, scores, *pair), method) for pair in pairs]
        return self.repaired([plan for _, plan in pairs], method)

    def repaired(self, plans: Sequence[PruningPlan], method: Method) -> list[Pruned]:
        """Refits and reconstructs for plans as a method says, whatever chose them; all refits take one pass.

        Raises:
          RequestError, OperationError: as for `least_squares` and `reconstruction`.
        """
        found: Sequence[Compensation | None] = [None] * len(plans)
        if method.is_compensated:
            with self._layers("refitting down_proj") as progress:
                grams = self._grams() if method.needs_grams else self._gram_folds(method)
                found = compensate(self._model, grams, plans, on_layer=progress)
        return [self._repaired(Pruned(*pair), method) for pair in zip(plans, found, strict=True)]

    def _repaired(self, pruned: Pruned, method: Method) -> Pruned:
        """Reconstructs after all else, where the method does, and notes in the plan that there was a repair."""
        if method.compensate == "none":
            return pruned
        if method.reconstructs:
            refitted = None if pruned.compensation is None else pruned.compensation.down_projs
            with self._layers("reconstructing layers") as progress:
                found = reconstruct(
                    self._model, self._text(), pruned.plan, refitted, folder=self._folder, on_layer=progress
                )
            pruned = dataclasses.replace(pruned, reconstruction=found)
        texts = pruned.plan.calibration or describe_windows(self._text(), self._names, self._date)
        return dataclasses.replace(pruned, plan=pruned.plan.compensated_on(texts, method.compensate))

    def _plan(self, method: Method, scores: Scores, target: Mapping[str, Any]) -> tuple[Mapping[str, Any], PruningPlan]:
        """The target as `make_plan` takes it, and a plan."""
        within: SizeLimit | None = target.get("within")
        target = {name: value for name, value in target.items() if name != "within"}
        uniform = make_plan(scores, **target)
        if method.allocation == "uniform":
            return target, uniform
        chosen = chosen_layers(len(scores.values), target.get("layers"), target.get("drop_layers", ()))
        sizes = [scores.intermediate_sizes[i] for i in chosen]
        shares = ("expansion_ratio", "prune_percent", "width")
        if not any(name in target for name in shares):
            raise RequestError(f"`allocation` {method.allocation} divides a width over the layers; give one")
        about: dict[str, Any] = {"method": method.allocation, "floor": method.min_keep}
        rules: dict[str, Any] = {"min_keep": method.min_keep, "multiple_of": target.get("multiple_of", 1)}
        allocate: Callable[[int], list[int]]
        if method.allocation == "global":
            allocate = functools.partial(by_score, [scores.values[i] for i in chosen], **rules)
        else:
            with self._layers("measuring layers") as progress:
                grams = self._grams() if method.is_compensated else None
                costs = layer_costs(self._model, self._text(), uniform, grams=grams, on_layer=progress)
            allocate = functools.partial(by_cost, [costs[i] for i in chosen], sizes, **rules)
            about["costs"] = [round(cost, 6) for cost in costs]
            if scores.calibration is None:
                scores = dataclasses.replace(
                    scores, calibration=describe_windows(self._text(), self._names, self._date)
                )
        if within is not None:
            rounding = {name: target[name] for name in ("multiple_of", "rounding") if name in target}
            staying = {i: size for i, size in enumerate(scores.intermediate_sizes) if i not in uniform.dropped_layers}
            found = allocated_within(within, staying, chosen, allocate, sum(least_widths(sizes, **rules)), **rounding)
            target = {**{name: value for name, value in target.items() if name not in shares}, **found}
        share = {name: target[name] for name in shares if name in target}
        budget = sum(target_width(size, scores.hidden_size, **share) for size in sizes)
        widths = list(scores.intermediate_sizes)
        for i, width in zip(chosen, allocate(budget), strict=True):
            widths[i] = width
        return target, make_plan(scores, **target, widths=widths, allocation=about)

    def _sequential(self, method: Method, scores: Scores, target: Mapping[str, Any], plan: PruningPlan) -> Pruned:
        needs = method.needs_statistics
        with self._layers("pruning layers in order") as progress:
            values, compensation = prune_in_order(
                self._model,
                self._fitted_to(method),
                method.criterion,
                plan.widths,
                statistics=self.statistics() if needs else None,
                folds=method.folds,
                seed=method.seed,
                on_layer=progress,
            )
        texts = describe_windows(self._text(), self._names, self._date)
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

    def _gram_folds(self, method: Method) -> Iterator[list[Array]]:
        return gram_folds(self._model, self._fitted_to(method), max(method.folds, 1))

    def _has_room(self) -> bool:
        """Whether the Gram matrices fit into the memory of every process's host."""
        size = sum(4 * width * width for width in self._model.config.stored_intermediate_sizes)
        return size <= min_over_processes(host_memory()) * _HOST_SHARE

    def _fitted_to(self, method: Method) -> NDArray[np.int32]:
        """The windows that weights are fitted to: not those by which reconstruction tells what helps."""
        return divide_windows(self._text())[0] if method.reconstructs else self._text()

    def _text(self) -> NDArray[np.int32]:
        if self._windows is None:
            raise RequestError("this needs the model to run on text; give `calibration` TEXT")
        return self._windows

    @contextlib.contextmanager
    def _layers(self, what: str) -> Iterator[Callable[[int], None]]:
        """Progress over layers: what it gives is called with the index of each that is done."""
        with self._progress(what, self._model.config.num_hidden_layers, "layers") as report:
            yield lambda i: report(i + 1)
