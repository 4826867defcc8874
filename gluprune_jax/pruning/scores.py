"""Scores the neurons of a whole model by a criterion (`gluprune_jax.pruning.criteria`), and selects among them."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from gluprune_jax.errors import OperationError, RequestError, is_out_of_memory
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.parallel.mesh import mesh_of, place, use_mesh
from gluprune_jax.parallel.sharding import constrain
from gluprune_jax.pruning.criteria import (
    CRITERIA,
    STATISTICS,
    WEIGHT_CRITERIA,
    WEIGHTS,
    Criterion,
    find_criterion,
    inputs_of,
    peak_to_peak,
)
from gluprune_jax.pruning.mixture import MixtureSizes, mlp_names, mlp_sizes
from gluprune_jax.pruning.statistics import LayerStatistics, Statistics


@dataclasses.dataclass(frozen=True)
class Scores:
    """The importance of every neuron of a model; plans of any width are made from it.

    Attributes:
      criterion: the name of the criterion.
      values: for each layer `[F]` float32, higher is more important.
      hidden_size: D, which turns an expansion ratio into a width.
      weights_dtype: dtype of the weights that were scored ("mixed" if there are several).
      fingerprint: identifies the MLP weights that were scored (see `score`).
      calibration: what the statistics are of, where the criterion looked at any.
      experts: of a mixture of experts how many each layer has (0: it is dense); `values` are then of each MLP, not of
        each layer (see `gluprune_jax.pruning.mixture`). Empty for any other model.
    """

    criterion: str
    values: tuple[NDArray[np.float32], ...]
    hidden_size: int
    weights_dtype: str
    fingerprint: str
    calibration: Mapping[str, Any] | None = None
    experts: tuple[int, ...] = ()

    @property
    def intermediate_sizes(self) -> tuple[int, ...]:
        """F of each layer."""
        return tuple(len(v) for v in self.values)


class MLPWeights(NamedTuple):
    """The matrices of one layer: gate and up `[F, D]`, down `[D, F]`, F as stored."""

    gate_proj: Array
    up_proj: Array
    down_proj: Array


def mlp_weights(model: Decoder) -> Iterator[MLPWeights]:
    """The MLP matrices of a model, layer by layer."""
    for layer in model.layers:
        yield MLPWeights(layer.mlp.gate_proj[...], layer.mlp.up_proj[...], layer.mlp.down_proj[...])


def score(
    model: Decoder,
    criterion: str | Criterion = "ppm",
    *,
    statistics: Statistics | None = None,
    seed: int = 0,
    weights: Iterable[MLPWeights] | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> Scores:
    """Scores every MLP neuron of a model.

    The fingerprint is the SHA-256 of the peak-to-peak magnitudes of every gate row, up row and down column. It is the
    same for the same weight values in any dtype, layout or sharding; it sees any training or quantisation, and equal
    ones mean equal `ppm` scores, but a weight that is no extreme of its row can change without it.

    Args:
      model: the model; storage padding (`width_multiple`) is not scored.
      criterion: a name in `CRITERIA`, or a function as `gluprune_jax.pruning.criteria` describes it.
      statistics: of the same model (`calibration.collect`), for criteria that look at activations.
      seed: of criteria that draw random numbers.
      weights: the MLP matrices of each layer, if they are not to be taken from `model` (which may then be abstract):
        a layer's are asked for when those before have been scored.
      on_layer: called with the index of each layer once it is scored, for progress.

    Raises:
      RequestError: unknown criterion, one that looks at activations without statistics, or statistics of another model.
      OperationError: NaN or Inf weights, naming the layer and the matrix.
    """
    scorer = Scorer(model.config, criterion, statistics=statistics, seed=seed, mesh=mesh_of(model))
    return _scored(scorer, mlp_weights(model) if weights is None else weights, on_layer)


def score_mixture(
    weights: Iterable[MLPWeights],
    sizes: MixtureSizes,
    criterion: str | Criterion = "ppm",
    *,
    seed: int = 0,
    on_mlp: Callable[[int], None] | None = None,
) -> Scores:
    """Scores the neurons of every MLP of a mixture of experts by its weights.

    Args:
      weights: the matrices of each MLP, in the order of `gluprune_jax.pruning.mixture`.
      sizes: of the model.
      criterion: as for `score`, of those that look at nothing but weights.
      seed: as for `score`.
      on_mlp: called with the index of each MLP once it is scored, for progress.

    Raises:
      RequestError: unknown criterion, or one that looks at activations.
      OperationError: NaN or Inf weights, naming the expert and the matrix.
    """
    return _scored(Scorer(sizes, criterion, seed=seed), weights, on_mlp)


def _scored(scorer: "Scorer", matrices: Iterable[MLPWeights], on_mlp: Callable[[int], None] | None) -> Scores:
    # By map: a loop would hold the matrices of one MLP while the next are read.
    for i, _ in enumerate(zip(scorer.widths, map(scorer.add, matrices), strict=True)):
        if on_mlp:
            on_mlp(i)
    return scorer.scores()


class Scorer:
    """Scores the MLPs of a model one after the other, each as soon as it is there.

    Args:
      sizes: of the model; storage padding is not scored.
      criterion: as for `score`; of a mixture of experts one that looks at nothing but weights.
      statistics: as for `score`.
      seed: as for `score`.
      mesh: that the weights lie on.

    Attributes:
      widths: F of each MLP, without storage padding.

    Raises:
      RequestError: unknown criterion, one that looks at activations without statistics, or statistics of another model.
    """

    def __init__(
        self,
        sizes: ModelConfig | MixtureSizes,
        criterion: str | Criterion = "ppm",
        *,
        statistics: Statistics | None = None,
        seed: int = 0,
        mesh: Mesh | None = None,
    ):
        self._name, self._function = find_criterion(criterion)
        if not isinstance(sizes, MixtureSizes):
            check_statistics(self._name, self._function, statistics, sizes)
        elif is_data_driven(self._function):
            raise RequestError(
                f"criterion {self._name!r} looks at activations, and a mixture of experts is pruned without running "
                f"it; give a criterion of weights alone, such as {', '.join(WEIGHT_CRITERIA)}"
            )
        self._sizes, self._statistics, self._seed, self._mesh = sizes, statistics, seed, mesh
        self.widths, self._experts = mlp_sizes(sizes)
        self._fingerprinter = Fingerprinter(sizes, mesh=mesh)
        self._values: list[NDArray[np.float32]] = []
        self._dtypes: set[str] = set()

    def add(self, mlp: MLPWeights) -> NDArray[np.float32]:
        """The scores `[F]` of the next MLP's neurons.

        Raises:
          OperationError: NaN or Inf weights, naming the layer or expert and the matrix; a criterion that does not give
            a finite number for each neuron.
        """
        i = len(self._values)
        where = self._fingerprinter.add(mlp)
        observed = None if self._statistics is None else self._statistics.layers[i]
        values = score_neurons(
            self._name, self._function, i, mlp, self.widths[i], observed, self._seed, self._mesh, where
        )
        self._values.append(values)
        self._dtypes |= {str(mlp.gate_proj.dtype), str(mlp.up_proj.dtype)}
        return values

    def scores(self) -> Scores:
        """Those of the whole model, once each of its MLPs was added.

        Raises:
          RequestError: the statistics are of other weights.
        """
        assert len(self._values) == len(self.widths)
        fingerprint, texts = self._fingerprinter.fingerprint, None
        if self._statistics is not None and isinstance(self._sizes, ModelConfig):
            self._statistics.check_fits(self._sizes, fingerprint)
            texts = self._statistics.texts if is_data_driven(self._function) else None
        return Scores(
            criterion=self._name,
            values=tuple(self._values),
            hidden_size=self._sizes.hidden_size,
            weights_dtype=next(iter(self._dtypes)) if len(self._dtypes) == 1 else "mixed",
            fingerprint=fingerprint,
            calibration=texts,
            experts=self._experts,
        )


def is_data_driven(function: Criterion) -> bool:
    """Whether a criterion looks at activations."""
    return not set(STATISTICS).isdisjoint(inputs_of(function))


def check_statistics(name: str, function: Criterion, statistics: Statistics | None, config: ModelConfig) -> None:
    """Makes sure that a criterion has the statistics that it looks at.

    Raises:
      RequestError: it has not, or they are of another model.
    """
    if not is_data_driven(function):
        return
    if statistics is None:
        raise RequestError(f"criterion {name!r} looks at activations; give `calibration` TEXT or `statistics` FILE")
    statistics.check_fits(config)
    for part, of in (("sensitivity", "loss"), ("entropy_sensitivity", "entropy")):
        if part in inputs_of(function) and any(getattr(layer, part) is None for layer in statistics.layers):
            raise RequestError(
                f"criterion {name!r} looks at the sensitivity of the {of}, which these statistics lack; collect them "
                f"with `criterion` {'taylor' if of == 'loss' else 'entropy'}, or give `calibration` TEXT too"
            )


def score_neurons(
    name: str,
    function: Criterion,
    layer: int,
    mlp: MLPWeights,
    width: int,
    statistics: LayerStatistics | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    where: str = "",
) -> NDArray[np.float32]:
    """The scores `[F]` float32 of one layer's neurons.

    Args:
      name: of the criterion, for errors.
      function: the criterion.
      layer: its index.
      mlp: its weights.
      width: F without storage padding.
      statistics: of the layer.
      seed: of criteria that draw random numbers.
      mesh: that the weights lie on.
      where: what errors call it; "layer 3" by default.

    Raises:
      OperationError: the criterion does not give a finite number for each neuron.
    """
    stored, where = mlp.gate_proj.shape[0], where or f"layer {layer}"

    def value(parameter: str) -> Array:
        if parameter in WEIGHTS:
            weight: Array = getattr(mlp, f"{parameter}_proj")
            return weight
        if parameter == "key":
            return jax.random.fold_in(jax.random.key(seed), layer)
        values = np.pad(np.asarray(getattr(statistics, parameter), np.float32), (0, stored - width))
        return cast("Array", place(mesh, values, "neurons"))

    inputs = [value(parameter) for parameter in inputs_of(function)]
    try:
        with use_mesh(mesh):
            scores = np.asarray(score_layer(function, *inputs))
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error) or function in CRITERIA.values():
            raise
        first_line = next(iter(str(error).splitlines()), "")
        raise OperationError(f"criterion {name!r} failed: {type(error).__name__}: {first_line}") from error
    if scores.shape != (stored,) or not np.isrealobj(scores):
        raise OperationError(
            f"criterion {name!r} gave {where} {scores.dtype} scores of shape {scores.shape}, not {stored} numbers"
        )
    with np.errstate(over="ignore"):
        scores = scores.astype(np.float32)
    if wrong := int((~np.isfinite(scores[:width])).sum()):
        raise OperationError(f"criterion {name!r} gave {where} {wrong} scores that are not finite numbers")
    return scores[:width]


def fingerprint(
    model: Decoder,
    *,
    weights: Iterable[MLPWeights] | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> str:
    """Identifies the MLP weights of a model by their extremes; for this and the arguments see `score`.

    Raises:
      OperationError: NaN or Inf weights, naming the layer and the matrix.
    """
    fingerprinter = Fingerprinter(model.config, mesh=mesh_of(model))
    return _fingerprinted(fingerprinter, mlp_weights(model) if weights is None else weights, on_layer)


def mixture_fingerprint(
    weights: Iterable[MLPWeights], sizes: MixtureSizes, *, on_mlp: Callable[[int], None] | None = None
) -> str:
    """Identifies the MLP weights of a mixture of experts, as `fingerprint`; for the arguments see `score_mixture`.

    Raises:
      OperationError: NaN or Inf weights, naming the expert and the matrix.
    """
    return _fingerprinted(Fingerprinter(sizes), weights, on_mlp)


def _fingerprinted(
    fingerprinter: "Fingerprinter", matrices: Iterable[MLPWeights], on_mlp: Callable[[int], None] | None
) -> str:
    for i, _ in enumerate(zip(fingerprinter.widths, map(fingerprinter.add, matrices), strict=True)):  # as `_scored`
        if on_mlp:
            on_mlp(i)
    return fingerprinter.fingerprint


class Fingerprinter:
    """Takes the fingerprint of a model's MLPs, which are added one after the other; see `score`.

    Args:
      sizes: of the model.
      mesh: that the weights lie on.

    Attributes:
      widths: F of each MLP, without storage padding.
    """

    def __init__(self, sizes: ModelConfig | MixtureSizes, *, mesh: Mesh | None = None):
        self.widths, experts = mlp_sizes(sizes)
        self._names = mlp_names(experts) if experts else [f"layer {i}" for i in range(len(self.widths))]
        self._mesh, self._digest, self._count = mesh, hashlib.sha256(), 0

    def add(self, mlp: MLPWeights) -> str:
        """Takes the next MLP into account, and returns what errors call it.

        Raises:
          OperationError: NaN or Inf weights, naming the layer or expert and the matrix.
        """
        where, width = self._names[self._count], self.widths[self._count]
        with use_mesh(self._mesh):
            found = [matrix_extents(matrix, axis) for matrix, axis in zip(mlp, (1, 1, 0), strict=True)]
        if bad := [name for name, (finite, _) in zip(mlp._fields, found, strict=True) if not np.asarray(finite)]:
            raise OperationError(
                f"{where} has NaN or Inf weights in {' and '.join(bad)}; such a model cannot be ranked"
            )
        for _, extents in found:
            self._digest.update(np.asarray(extents, "<f4")[:width].tobytes())
        self._count += 1
        return where

    @property
    def fingerprint(self) -> str:
        """That of the MLPs that were added."""
        return f"sha256:{self._digest.hexdigest()}"


# Padding neurons are scored like others and cut off on the host: cut off here, divided weights would have to move.


@functools.partial(jax.jit, static_argnums=0)
def score_layer(function: Criterion, *inputs: Array) -> Array:
    """The scores `[F]` of a layer's neurons as stored, whole on every device; each device scores its own neurons.

    `inputs` are those of the criterion, in the order of its parameters.
    """
    return constrain(function(*inputs))


@functools.partial(jax.jit, static_argnums=1)
def matrix_extents(weights: Array, axis: int) -> tuple[Array, Array]:
    """Whether a matrix of an MLP is finite, and the peak-to-peak magnitudes of its neurons along `axis`, `[F]` float32.

    One matrix at a time: of three together XLA's CPU compiler reads each of them more than once.
    """
    chex.assert_rank(weights, 2)
    # Inf and NaN times 0 are NaN, and make the sum one; a maximum may drop a NaN. XLA's CPU compiler adds numbers up as
    # it reads them, but of what `isfinite` says it makes an array first.
    finite = (jnp.sum(weights * 0, axis) == 0).all()
    return constrain(finite), constrain(peak_to_peak(weights, axis))


# ------------------------------------------------------------------------------------------------ selection


def select_neurons(scores: Sequence[float] | NDArray[np.float32], width: int) -> NDArray[np.int32]:
    """Indices of the `width` highest of `scores [F]`, ascending; among equal scores the lower index is kept.

    Selections from the same scores are nested: a smaller one is a subset of a larger one.
    """
    values = np.asarray(scores, np.float32)
    chex.assert_rank(values, 1)
    order = np.argsort(-values, kind="stable")
    return cast("NDArray[np.int32]", np.sort(order[:width]).astype(np.int32))
