"""Scores the neurons of a whole model by a criterion (`gluprune_jax.pruning.criteria`), and selects among them.

Weights in the memory of devices are scored there, by compiled programs (`device_scores`). Of weights in the host's
memory, as files give them, the fingerprint and the criterion `ppm` need no device, and JAX is not imported for them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.models.config import NEURON_AXES, ModelConfig
from gluprune_jax.pruning.choices import WEIGHT_CRITERION_NAMES, inputs_of_criterion, is_data_driven
from gluprune_jax.pruning.extents import host_extents
from gluprune_jax.pruning.mixture import MixtureSizes, mlp_names, mlp_sizes
from gluprune_jax.pruning.statistics import Statistics

if TYPE_CHECKING:
    from jax import Array
    from jax.sharding import Mesh

    from gluprune_jax.models.decoder import Decoder
    from gluprune_jax.pruning.criteria import Criterion

# Arrays, wherever they lie.
W = TypeVar("W")


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


class MLPWeights(NamedTuple, Generic[W]):
    """The matrices of one layer: gate and up `[F, D]`, down `[D, F]`, F as stored.

    They are arrays of JAX, or NumPy's where they have been read from files and lie in the host's memory.
    """

    gate_proj: W
    up_proj: W
    down_proj: W


class Extents(NamedTuple):
    """Peak-to-peak magnitudes of a layer's neurons, `[F]` float32 each: of rows of gate and up, columns of down."""

    gate_proj: NDArray[np.float32]
    up_proj: NDArray[np.float32]
    down_proj: NDArray[np.float32]


def mlp_weights(model: Decoder) -> Iterator[MLPWeights[Array]]:
    """The MLP matrices of a model, layer by layer."""
    for layer in model.layers:
        yield MLPWeights(layer.mlp.gate_proj[...], layer.mlp.up_proj[...], layer.mlp.down_proj[...])


def score(
    model: Decoder,
    criterion: str | Criterion = "ppm",
    *,
    statistics: Statistics | None = None,
    seed: int = 0,
    weights: Iterable[MLPWeights[Any]] | None = None,
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
    from gluprune_jax.parallel.mesh import mesh_of  # here: whoever has a model has JAX

    scorer = Scorer(model.config, criterion, statistics=statistics, seed=seed, mesh=mesh_of(model))
    return _scored(scorer, mlp_weights(model) if weights is None else weights, on_layer)


def score_mixture(
    weights: Iterable[MLPWeights[Any]],
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


def _scored(scorer: Scorer, matrices: Iterable[MLPWeights[Any]], on_mlp: Callable[[int], None] | None) -> Scores:
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
        self._criterion, self._name = criterion, name_of_criterion(criterion)
        if not isinstance(sizes, MixtureSizes):
            check_statistics(criterion, statistics, sizes)
        elif is_data_driven(criterion):
            raise RequestError(
                f"criterion {self._name!r} looks at activations, and a mixture of experts is pruned without running "
                f"it; give a criterion of weights alone, such as {', '.join(WEIGHT_CRITERION_NAMES)}"
            )
        self._sizes, self._statistics, self._seed, self._mesh = sizes, statistics, seed, mesh
        self.widths, self._experts = mlp_sizes(sizes)
        self._fingerprinter = Fingerprinter(sizes, mesh=mesh)
        self._values: list[NDArray[np.float32]] = []
        self._dtypes: set[str] = set()

    def add(self, mlp: MLPWeights[Any]) -> NDArray[np.float32]:
        """The scores `[F]` of the next MLP's neurons.

        Raises:
          OperationError: NaN or Inf weights, naming the layer or expert and the matrix; a criterion that does not give
            a finite number for each neuron.
        """
        i = len(self._values)
        where, extents = self._fingerprinter.add(mlp)
        if self._criterion == "ppm":  # it is made of what the fingerprint is of
            with np.errstate(over="ignore"):
                values = check_scores(
                    extents.gate_proj + extents.up_proj, len(extents.gate_proj), self.widths[i], self._name, where
                )
        else:
            values = self._score(i, mlp, where)
        self._values.append(values)
        self._dtypes |= {str(mlp.gate_proj.dtype), str(mlp.up_proj.dtype)}
        return values

    def _score(self, i: int, mlp: MLPWeights[Any], where: str) -> NDArray[np.float32]:
        from gluprune_jax.pruning.criteria import find_criterion  # here: criteria are functions of JAX
        from gluprune_jax.pruning.device_scores import score_neurons

        name, function = find_criterion(self._criterion)
        observed = None if self._statistics is None else self._statistics.layers[i]
        return score_neurons(name, function, i, mlp, self.widths[i], observed, self._seed, self._mesh, where)

    def scores(self) -> Scores:
        """Those of the whole model, once each of its MLPs was added.

        Raises:
          RequestError: the statistics are of other weights.
        """
        assert len(self._values) == len(self.widths)
        fingerprint, texts = self._fingerprinter.fingerprint, None
        if self._statistics is not None and isinstance(self._sizes, ModelConfig):
            self._statistics.check_fits(self._sizes, fingerprint)
            texts = self._statistics.texts if is_data_driven(self._criterion) else None
        return Scores(
            criterion=self._name,
            values=tuple(self._values),
            hidden_size=self._sizes.hidden_size,
            weights_dtype=next(iter(self._dtypes)) if len(self._dtypes) == 1 else "mixed",
            fingerprint=fingerprint,
            calibration=texts,
            experts=self._experts,
        )


def name_of_criterion(criterion: str | Criterion) -> str:
    """What a criterion is called: its name, or that of its function."""
    return criterion if isinstance(criterion, str) else getattr(criterion, "__name__", repr(criterion))


def check_statistics(criterion: str | Criterion, statistics: Statistics | None, config: ModelConfig) -> None:
    """Makes sure that a criterion has the statistics that it looks at.

    Raises:
      RequestError: it has not, or they are of another model; unknown criterion.
    """
    if not is_data_driven(criterion):
        return
    name = name_of_criterion(criterion)
    if statistics is None:
        raise RequestError(f"criterion {name!r} looks at activations; give `calibration` TEXT or `statistics` FILE")
    statistics.check_fits(config)
    for part, of in (("sensitivity", "loss"), ("entropy_sensitivity", "entropy")):
        if part in inputs_of_criterion(criterion) and any(getattr(layer, part) is None for layer in statistics.layers):
            raise RequestError(
                f"criterion {name!r} looks at the sensitivity of the {of}, which these statistics lack; collect them "
                f"with `criterion` {'taylor' if of == 'loss' else 'entropy'}, or give `calibration` TEXT too"
            )


def check_scores(scores: NDArray[Any], stored: int, width: int, name: str, where: str) -> NDArray[np.float32]:
    """The scores `[F]` float32 that a criterion gave the neurons of an MLP, without those of storage padding.

    Args:
      scores: what it gave.
      stored: how many neurons the matrices have.
      width: F.
      name: of the criterion.
      where: what errors call the MLP.

    Raises:
      OperationError: they are not a finite number for each neuron.
    """
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
    weights: Iterable[MLPWeights[Any]] | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> str:
    """Identifies the MLP weights of a model by their extremes; for this and the arguments see `score`.

    Raises:
      OperationError: NaN or Inf weights, naming the layer and the matrix.
    """
    from gluprune_jax.parallel.mesh import mesh_of  # here: as in `score`

    fingerprinter = Fingerprinter(model.config, mesh=mesh_of(model))
    return _fingerprinted(fingerprinter, mlp_weights(model) if weights is None else weights, on_layer)


def mixture_fingerprint(
    weights: Iterable[MLPWeights[Any]], sizes: MixtureSizes, *, on_mlp: Callable[[int], None] | None = None
) -> str:
    """Identifies the MLP weights of a mixture of experts, as `fingerprint`; for the arguments see `score_mixture`.

    Raises:
      OperationError: NaN or Inf weights, naming the expert and the matrix.
    """
    return _fingerprinted(Fingerprinter(sizes), weights, on_mlp)


def _fingerprinted(
    fingerprinter: Fingerprinter, matrices: Iterable[MLPWeights[Any]], on_mlp: Callable[[int], None] | None
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

    def add(self, mlp: MLPWeights[Any]) -> tuple[str, Extents]:
        """Takes the next MLP into account, and returns what errors call it, and the extents of its neurons.

        Raises:
          OperationError: NaN or Inf weights, naming the layer or expert and the matrix.
        """
        where, width = self._names[self._count], self.widths[self._count]
        found = [self._extents(matrix, 1 - axis) for matrix, axis in zip(mlp, NEURON_AXES.values(), strict=True)]
        if bad := [name for name, (finite, _) in zip(mlp._fields, found, strict=True) if not finite]:
            raise OperationError(
                f"{where} has NaN or Inf weights in {' and '.join(bad)}; such a model cannot be ranked"
            )
        extents = Extents(*(values for _, values in found))
        for values in extents:
            self._digest.update(values[:width].astype("<f4", copy=False).tobytes())
        self._count += 1
        return where, extents

    def _extents(self, matrix: Array | NDArray[Any], axis: int) -> tuple[bool, NDArray[np.float32]]:
        if isinstance(matrix, np.ndarray):
            return host_extents(matrix, axis)
        from gluprune_jax.parallel.mesh import use_mesh  # here: whoever has an array of JAX has JAX
        from gluprune_jax.pruning.device_scores import matrix_extents

        with use_mesh(self._mesh):
            finite, values = matrix_extents(matrix, axis)
        return bool(np.asarray(finite)), np.asarray(values)

    @property
    def fingerprint(self) -> str:
        """That of the MLPs that were added."""
        return f"sha256:{self._digest.hexdigest()}"


# ------------------------------------------------------------------------------------------------ selection


def select_neurons(scores: Sequence[float] | NDArray[np.float32], width: int) -> NDArray[np.int32]:
    """Indices of the `width` highest of `scores [F]`, ascending; among equal scores the lower index is kept.

    Selections from the same scores are nested: a smaller one is a subset of a larger one.
    """
    values = np.asarray(scores, np.float32)
    assert values.ndim == 1, f"Assertion of one layer's scores `[F]` failed: they have shape {values.shape}"
    order = np.argsort(-values, kind="stable")
    return cast("NDArray[np.int32]", np.sort(order[:width]).astype(np.int32))
