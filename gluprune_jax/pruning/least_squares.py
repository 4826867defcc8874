"""Refits down_proj in closed form, so that the neurons that are kept do what the removed ones did.

With the Gram matrix G = sum over calibration tokens of a a^T of the activations a `[F]`, W = down_proj^T, kept neurons
k and removed ones r, the new weights of the kept ones are

    W_k + (G_kk + lambda I)^-1 G_kr W_r

the minimum of `sum |a W - a_k V|^2 + lambda |V - W_k|^2` over V: damped toward the weights that are there, so nothing
changes where nothing is removed, and on the calibration tokens the layer's output is never further from what it was
than without (Optimal Brain Surgeon, and ridge regression as in SlimGPT, arXiv 2412.18110, for whole neurons).

The damping lambda is `DAMPING` times the mean of G's diagonal over the kept neurons. Where float32 cannot factor the
damped matrix, or the error it leaves is larger than without, it is multiplied by ten until neither is so.

The system is solved for all F neurons at once, the removed ones apart from the others, so one compiled program serves
every width. On a mesh G is divided over its rows; the factor is on every device of a replica, the columns of the right
side are divided over them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from numpy.typing import NDArray

from gluprune_jax.errors import OperationError
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import with_parameters
from gluprune_jax.parallel.mesh import block_on_cpu, mesh_of, place, to_host, use_mesh
from gluprune_jax.parallel.sharding import constrain, is_divided, partition_spec, per_shard
from gluprune_jax.pruning import cholesky
from gluprune_jax.pruning.calibration import BATCH_TOKENS, Stream
from gluprune_jax.pruning.criteria import Criterion, find_criterion
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.scores import check_statistics, mlp_weights, score_neurons, select_neurons
from gluprune_jax.pruning.statistics import Statistics

DAMPING = 1e-3
_MOST_DAMPING = 1e3


# --------------------------------------------------------------------------------------------------------- a layer


@jax.jit
def least_squares(gram: Array, down_proj: Array, mask: Array, damping: Array) -> tuple[Array, Array]:
    """The refitted down projection of one layer, and the errors of its output.

    Args:
      gram: `[F, F]` float32.
      down_proj: `[D, F]`, any float dtype.
      mask: `[F]` float32, 1 for the kept neurons.
      damping: lambda, in units of the mean of the kept part of G's diagonal.

    Returns:
      `[D, F]` in the dtype of `down_proj`, zero for the removed neurons; and `[3]` float32: the sums of squares of the
      layer's output, of its error with the removed neurons merely left out, and of its error with this. What is not
      finite could not be factored.
    """
    D, F = down_proj.shape
    chex.assert_shape([gram, down_proj, mask, damping], [(F, F), (D, F), (F,), ()])
    chex.assert_type([gram, mask], jnp.float32)
    weights = down_proj.astype(jnp.float32).T
    scale = jnp.sum(jnp.diagonal(gram) * mask) / jnp.maximum(jnp.sum(mask), 1)
    added = jnp.maximum(damping * scale, np.finfo(np.float32).tiny) * mask + (1 - mask)
    kept = mask[:, None] * gram
    matrix = constrain(kept * mask + jnp.diag(added))
    right = jnp.matmul(kept, (1 - mask)[:, None] * weights, precision="highest")

    solve = cholesky.solve
    if is_divided():
        columns = partition_spec((None, "columns"), right.shape, jax.sharding.get_abstract_mesh())
        solve = per_shard(solve, (PartitionSpec(), columns), columns)  # type: ignore[no-untyped-call]
    change = mask[:, None] * solve(matrix, right)
    new = (mask[:, None] * weights + change).astype(down_proj.dtype)

    def error(difference: Array) -> Array:
        return jnp.sum(difference * jnp.matmul(gram, difference, precision="highest"))

    errors = (weights, (1 - mask)[:, None] * weights, weights - new.astype(jnp.float32))
    return constrain(new.T, None, "neurons"), constrain(jnp.stack([error(part) for part in errors]))


@dataclasses.dataclass(frozen=True)
class Fit:
    """How well a layer's output is kept, on the calibration tokens.

    Attributes:
      error_without: of the output with the removed neurons left out, the sum of squares over that of the output.
      error: the same with the refitted down projection.
      damping: lambda over the mean of the kept part of the Gram matrix's diagonal.
    """

    error_without: float
    error: float
    damping: float


def compensate_layer(
    mesh: Mesh | None, i: int, gram: Array, down_proj: Array, mask: NDArray[np.float32], damping: float = DAMPING
) -> tuple[Array, Fit]:
    """The refitted down projection of layer `i` (see `least_squares` for the arguments), with enough damping.

    Raises:
      OperationError: no damping makes the Gram matrix one that can be factored, naming the layer.
    """
    while damping <= _MOST_DAMPING:
        with use_mesh(mesh):
            new, sums = least_squares(gram, down_proj, mask, np.float32(damping))
        output, without, error = (float(value) for value in to_host(sums))
        if np.isfinite(error) and error <= without * (1 + 1e-5):
            output = output or 1.0  # of a layer that gives nothing, of which nothing can be lost
            return new, Fit(without / output, max(error, 0.0) / output, damping)
        damping *= 10
    raise OperationError(
        f"the Gram matrix of layer {i} cannot be factored even when it is damped: its activations are not sensible"
    )


# ----------------------------------------------------------------------------------------------------- whole models


@dataclasses.dataclass(frozen=True)
class Compensation:
    """Refitted down projections for the neurons that a plan keeps.

    Attributes:
      down_projs: of each layer `[D, F as stored]`, zero for the removed neurons.
      fits: of each layer; None for one that stays whole.
      in_order: whether each layer was fitted to what the pruned ones before it give.
    """

    down_projs: tuple[Array, ...]
    fits: tuple[Fit | None, ...]
    in_order: bool

    def summary(self) -> dict[str, Any]:
        """What a model card and the history of a checkpoint say of it."""
        fits = [fit for fit in self.fits if fit is not None]
        return {
            "method": "least-squares",
            "in_order": self.in_order,
            "damping": max((fit.damping for fit in fits), default=0.0),
            "output_error_without": [None if fit is None else fit.error_without for fit in self.fits],
            "output_error": [None if fit is None else fit.error for fit in self.fits],
        }


def with_down_projections(model: Decoder, down_projs: Sequence[Array]) -> Decoder:
    """The model with other down projections, of the same shapes; all other arrays are shared with `model`."""
    return with_parameters(model, {f"layers.{i}.mlp.down_proj": down for i, down in enumerate(down_projs)})


def compensate(
    model: Decoder,
    grams: Iterable[Array],
    plans: Sequence[PruningPlan],
    *,
    on_layer: Callable[[int], None] | None = None,
) -> list[Compensation]:
    """Refits the down projections for each plan, all layers to what they see in the dense model.

    Args:
      model: the dense model, on any mesh.
      grams: the Gram matrix of each layer (`calibration.gram_matrices`); each is asked for when the layers before it
        are done.
      plans: made for this model.
      on_layer: called with the index of each layer that is done.

    Raises:
      RequestError: a plan that was made for a model of another shape.
      OperationError: a Gram matrix that no damping helps, naming the layer.
    """
    for plan in plans:
        plan.check_fits(model.config)
    mesh = mesh_of(model)
    masks = [plan.masks(model.config) for plan in plans]
    found: list[list[tuple[Array, Fit | None]]] = [[] for _ in plans]
    for i, (mlp, gram) in enumerate(zip(mlp_weights(model), grams, strict=True)):
        for plan, layers, mask in zip(plans, found, masks, strict=True):
            is_whole = plan.widths[i] == plan.intermediate_sizes[i]
            if is_whole:
                layers.append((mlp.down_proj, None))
            else:
                layers.append(compensate_layer(mesh, i, gram, mlp.down_proj, mask[i]))
        if on_layer:
            on_layer(i)
    return [
        Compensation(tuple(down for down, _ in layers), tuple(fit for _, fit in layers), in_order=False)
        for layers in found
    ]


def prune_in_order(
    model: Decoder,
    windows: NDArray[np.int32],
    criterion: str | Criterion,
    widths: Sequence[int],
    *,
    statistics: Statistics | None,
    is_compensated: bool = True,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    on_layer: Callable[[int], None] | None = None,
) -> tuple[tuple[NDArray[np.float32], ...], Compensation]:
    """Scores and prunes the layers in order: each sees, and is fitted to, what the pruned ones before it give.

    Args:
      model: the dense model, on any mesh.
      windows: `[N, W]` int32 token ids, filled up with `packing.PADDING`.
      criterion: a name or a function, as for `scores.score`.
      widths: how many neurons each layer keeps.
      statistics: of the dense model. Its sensitivities are used as they are; the other statistics of each layer are
        taken anew.
      is_compensated: whether down projections are refitted; else removed neurons are left out.
      seed: of criteria that draw random numbers.
      batch_tokens: how many tokens a replica computes at once.
      on_layer: called with the index of each layer that is done.

    Returns:
      the scores of each layer `[F]`, from which the `widths` highest were kept, and the down projections.

    Raises:
      RequestError, OperationError: as for `compensate` and `scores.score`.
    """
    name, function = find_criterion(criterion)
    check_statistics(name, function, statistics, model.config)
    mesh, stream = mesh_of(model), Stream(model, windows, batch_tokens=batch_tokens)
    values, downs, fits = [], [], []
    for i, (mlp, size) in enumerate(zip(mlp_weights(model), model.config.intermediate_sizes, strict=True)):
        observed, gram = stream.observe(i, gram=is_compensated)
        if statistics is not None:
            observed = dataclasses.replace(observed, sensitivity=statistics.layers[i].sensitivity)
        scores = score_neurons(name, function, i, mlp, size, observed, seed, mesh)
        down, fit = mlp.down_proj, None
        if widths[i] < size:
            mask = np.zeros(mlp.gate_proj.shape[0], np.float32)
            mask[select_neurons(scores, widths[i])] = 1
            if gram is None:
                down = without_neurons(mesh, down, mask)
            else:
                down, fit = compensate_layer(mesh, i, gram, down, mask)
            block_on_cpu(mesh, down)
        stream.advance(i, down)
        values.append(scores)
        downs.append(down)
        fits.append(fit)
        if on_layer:
            on_layer(i)
    return tuple(values), Compensation(tuple(downs), tuple(fits), in_order=True)


def without_neurons(mesh: Mesh | None, down_proj: Array, mask: NDArray[np.float32]) -> Array:
    """A down projection `[D, F]` with the columns of the neurons that are not in the mask `[F]` at zero."""
    with use_mesh(mesh):
        pruned: Array = _without(down_proj, place(mesh, mask, "neurons"))
        return pruned


@jax.jit
def _without(down_proj: Array, mask: Array) -> Array:
    chex.assert_shape(mask, down_proj.shape[1:])
    return constrain(down_proj * mask.astype(down_proj.dtype), None, "neurons")
