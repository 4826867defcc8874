"""Scores and extremes of a layer's neurons, by compiled programs on the devices that hold its weights."""

import functools
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from gluprune_jax.errors import OperationError, is_out_of_memory
from gluprune_jax.parallel.mesh import place, use_mesh
from gluprune_jax.parallel.sharding import constrain
from gluprune_jax.pruning.choices import WEIGHTS
from gluprune_jax.pruning.criteria import CRITERIA, Criterion, inputs_of, peak_to_peak
from gluprune_jax.pruning.scores import MLPWeights, check_scores
from gluprune_jax.pruning.statistics import LayerStatistics


def score_neurons(
    name: str,
    function: Criterion,
    layer: int,
    mlp: MLPWeights[Any],
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
            weight: Array | NDArray[Any] = getattr(mlp, f"{parameter}_proj")
            # What lies in the host's memory is adopted where it can be: a compiled program would copy its arguments.
            return jax.device_put(weight) if isinstance(weight, np.ndarray) else weight
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
    return check_scores(scores, stored, width, name, where)


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
