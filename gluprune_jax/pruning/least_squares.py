"""Refits down_proj in closed form, so that the neurons that are kept do what the removed ones did.

With the Gram matrix G = sum over calibration tokens of a a^T of the activations a `[F]`, W = down_proj^T, kept neurons
k and removed ones r, the new weights of the kept ones are

    W_k + (G_kk + lambda I)^-1 G_kr W_r

the minimum of `sum |a W - a_k V|^2 + lambda |V - W_k|^2` over V: damped toward the weights that are there, so nothing
changes where nothing is removed, and on the calibration tokens the layer's output is never further from what it was
than without (Optimal Brain Surgeon, and ridge regression as in SlimGPT, arXiv 2412.18110, for whole neurons).

The damping lambda is `DAMPING` times the mean of G's diagonal over the kept neurons. Where float32 cannot factor the
damped matrix, or the error it leaves is larger than without, it is multiplied by ten until neither is so.

What is fitted to one text may harm another (arXiv 2510.07782). `cross_validate_layer` chooses, for each layer, the
damping and how much of the change is made by the error on windows that are held out in turn: G is a sum over windows,
so one matrix for each part of them is all that takes.

The system is solved for all F neurons at once, the removed ones apart from the others, so one compiled program serves
every width. On a mesh G is divided over its rows; the factor is on every device of a replica, the columns of the right
side are divided over them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike
from numpy.typing import NDArray

from gluprune_jax.errors import OperationError
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import Parameters
from gluprune_jax.parallel.mesh import block_on_cpu, mesh_of, place, to_host, use_mesh
from gluprune_jax.parallel.sharding import constrain, is_divided, partition_spec, per_shard
from gluprune_jax.pruning import cholesky
from gluprune_jax.pruning.calibration import BATCH_TOKENS, Stream
from gluprune_jax.pruning.choices import FOLDS
from gluprune_jax.pruning.criteria import Criterion, find_criterion
from gluprune_jax.pruning.device_scores import score_neurons
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.scores import check_statistics, mlp_weights, select_neurons
from gluprune_jax.pruning.statistics import SENSITIVITIES, Statistics

DAMPING = 1e-3
_MOST_DAMPING = 1e3
# Of cross-validation: what is tried, and on how many parts of the windows.
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)


# --------------------------------------------------------------------------------------------------------- a layer


@jax.jit
def least_squares(
    gram: Array, down_proj: Array, mask: Array, damping: Array, strength: ArrayLike = 1.0
) -> tuple[Array, Array]:
    """The refitted down projection of one layer, and the errors of its output.

    Args:
      gram: `[F, F]` float32.
      down_proj: `[D, F]`, any float dtype.
      mask: `[F]` float32, 1 for the kept neurons.
      damping: lambda, in units of the mean of the kept part of G's diagonal.
      strength: the share of the change that is made: 1 is all of it, 0 leaves the removed neurons out.

    Returns:
      `[D, F]` in the dtype of `down_proj`, zero for the removed neurons; and `[3]` float32: the sums of squares of the
      layer's output, of its error with the removed neurons merely left out, and of its error with this. What is not
      finite could not be factored.
    """
    weights = down_proj.astype(jnp.float32).T
    change = _change(gram, weights, mask, damping)
    new = (mask[:, None] * weights + strength * change).astype(down_proj.dtype)

    def error(difference: Array) -> Array:
        return jnp.sum(difference * jnp.matmul(gram, difference, precision="highest"))

    errors = (weights, (1 - mask)[:, None] * weights, weights - new.astype(jnp.float32))
    return constrain(new.T, None, "neurons"), constrain(jnp.stack([error(part) for part in errors]))


def _change(gram: Array, weights: Array, mask: Array, damping: Array) -> Array:
    """What is added to the kept rows of the weights `[F, D]` float32; for the other arguments see `least_squares`."""
    F = weights.shape[0]
    chex.assert_shape([gram, mask, damping], [(F, F), (F,), ()])
    chex.assert_type([gram, mask], jnp.float32)
    scale = jnp.sum(jnp.diagonal(gram) * mask) / jnp.maximum(jnp.sum(mask), 1)
    added = jnp.maximum(damping * scale, np.finfo(np.float32).tiny) * mask + (1 - mask)
    kept = mask[:, None] * gram
    matrix = constrain(kept * mask + jnp.diag(added))
    right = jnp.matmul(kept, (1 - mask)[:, None] * weights, precision="highest")

    solve = cholesky.solve
    if is_divided():
        columns = partition_spec((None, "columns"), right.shape, jax.sharding.get_abstract_mesh())
        solve = per_shard(solve, (PartitionSpec(), columns), columns)  # type: ignore[no-untyped-call]
    change: Array = mask[:, None] * solve(matrix, right)
    return change


@jax.jit
def held_out_sums(total: Array, fold: Array, down_proj: Array, mask: Array, dampings: Array) -> tuple[Array, Array]:
    """Of changes that were fitted without a fold, what their errors on that fold are made of.

    With the removed neurons' output r and a change's output c, each on the fold's tokens, a change of strength s
    leaves the error `|r - s c|^2 = |r|^2 - 2 s r.c + s^2 |c|^2`: no other pass is needed for any strength.

    Args:
      total: the Gram matrix of all folds, `[F, F]` float32.
      fold: that of the one which is held out, `[F, F]` float32.
      down_proj: `[D, F]`, any float dtype.
      mask: `[F]` float32, 1 for the kept neurons.
      dampings: `[K]` float32, each as for `least_squares`.

    Returns:
      on the fold, float32: the sum of squares of the layer's output and `|r|^2`, `[2]`; and `r.c` and `|c|^2` with each
      damping, `[K, 2]`, not finite where the matrix could not be factored.
    """
    weights = down_proj.astype(jnp.float32).T
    removed = (1 - mask)[:, None] * weights

    def seen(x: Array) -> Array:
        return jnp.matmul(fold, x, precision="highest")

    seen_removed = seen(removed)

    def of_change(damping: Array) -> Array:
        change = _change(total - fold, weights, mask, damping)
        return jnp.stack([jnp.sum(change * seen_removed), jnp.sum(change * seen(change))])

    lost = jnp.stack([jnp.sum(weights * seen(weights)), jnp.sum(removed * seen_removed)])
    return constrain(lost), constrain(jax.lax.map(of_change, dampings))


@dataclasses.dataclass(frozen=True)
class Fit:
    """How well a layer's output is kept, on the calibration tokens.

    Attributes:
      error_without: of the output with the removed neurons left out, the sum of squares over that of the output.
      error: the same with the refitted down projection.
      damping: lambda over the mean of the kept part of the Gram matrix's diagonal.
      strength: the share of the change that was made.
      held_out: of cross-validation, `error_without` and `error` on windows that the weights were not fitted to.
    """

    error_without: float
    error: float
    damping: float
    strength: float = 1.0
    held_out: tuple[float, float] | None = None


def compensate_layer(
    mesh: Mesh | None,
    i: int,
    gram: Array,
    down_proj: Array,
    mask: NDArray[np.float32],
    damping: float = DAMPING,
    strength: float = 1.0,
) -> tuple[Array, Fit]:
    """The refitted down projection of layer `i` (see `least_squares` for the arguments), with enough damping.

    Raises:
      OperationError: no damping makes the Gram matrix one that can be factored, naming the layer.
    """
    while damping <= _MOST_DAMPING:
        with use_mesh(mesh):
            new, sums = least_squares(gram, down_proj, mask, np.float32(damping), np.float32(strength))
        output, without, error = (float(value) for value in to_host(sums))
        if np.isfinite(error) and error <= without * (1 + 1e-5):
            output = output or 1.0  # of a layer that gives nothing, of which nothing can be lost
            return new, Fit(without / output, max(error, 0.0) / output, damping, strength)
        damping *= 10
    raise _unsolvable(i)


def _unsolvable(i: int) -> OperationError:
    return OperationError(
        f"the Gram matrix of layer {i} cannot be factored even when it is damped: its activations are not sensible"
    )


def cross_validate_layer(
    mesh: Mesh | None, i: int, folds: Sequence[Array], down_proj: Array, mask: NDArray[np.float32]
) -> tuple[Array, Fit]:
    """The refitted down projection of layer `i`, as strong as helps on windows that it was not fitted to.

    For each damping of `DAMPINGS` the weights are fitted without each of the folds in turn; the errors on what was held
    out are added up, and the strength between 0 (no repair) and 1 that makes them least is known in closed form. With
    the damping and the strength of the least error the weights are fitted to all folds.

    Args:
      mesh: of the arrays.
      i: the index of the layer.
      folds: the Gram matrix of each, `[F, F]` float32, at least two.
      down_proj: `[D, F]`, any float dtype.
      mask: `[F]` float32, 1 for the kept neurons.

    Raises:
      OperationError: no damping makes the Gram matrix one that can be factored, naming the layer.
    """
    with use_mesh(mesh):
        total: Array = _sum(list(folds))
        parts = [held_out_sums(total, fold, down_proj, mask, np.array(DAMPINGS, np.float32)) for fold in folds]
    output, without = np.stack([to_host(lost) for lost, _ in parts]).sum(0, np.float64).tolist()
    changes = np.stack([to_host(change) for _, change in parts]).sum(0, np.float64)
    found = []
    for damping, (along, size) in zip(DAMPINGS, changes.tolist(), strict=True):
        if np.isfinite([along, size]).all():
            strength = min(max(along / size, 0.0), 1.0) if size > 0 else 0.0
            error = max(without - 2 * strength * along + strength**2 * size, 0.0)
            found.append((error / (output or 1.0), without / (output or 1.0), damping, strength))
    if not found:
        raise _unsolvable(i)
    error, without, damping, strength = min(found)
    new, fit = compensate_layer(mesh, i, total, down_proj, mask, damping, strength)
    return new, dataclasses.replace(fit, held_out=(without, error))


@jax.jit
def _sum(grams: list[Array]) -> Array:
    return constrain(functools.reduce(jnp.add, grams), "neurons", None)


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

    @property
    def parameters(self) -> Parameters:
        """What takes the place of parameters of the dense model, by name."""
        return {f"layers.{i}.mlp.down_proj": down for i, down in enumerate(self.down_projs)}

    def summary(self) -> dict[str, Any]:
        """What a model card and the history of a checkpoint say of it."""
        fits = [fit for fit in self.fits if fit is not None]
        found = {
            "method": "least-squares",
            "in_order": self.in_order,
            "damping": max((fit.damping for fit in fits), default=0.0),
            "output_error_without": [None if fit is None else fit.error_without for fit in self.fits],
            "output_error": [None if fit is None else fit.error for fit in self.fits],
        }
        held_out = [None if fit is None else fit.held_out for fit in self.fits]
        if not any(held_out):
            return found
        return found | {
            "method": "cross-validated least-squares",
            "folds": FOLDS,
            "dampings": [None if fit is None else fit.damping for fit in self.fits],
            "strength": [None if fit is None else round(fit.strength, 4) for fit in self.fits],
            "held_out_error_without": [pair and pair[0] for pair in held_out],
            "held_out_error": [pair and pair[1] for pair in held_out],
        }


def compensate(
    model: Decoder,
    grams: Iterable[Array | list[Array]],
    plans: Sequence[PruningPlan],
    *,
    on_layer: Callable[[int], None] | None = None,
) -> list[Compensation]:
    """Refits the down projections for each plan, all layers to what they see in the dense model.

    Args:
      model: the dense model, on any mesh.
      grams: the Gram matrix of each layer (`calibration.gram_matrices`), or those of its folds to cross-validate on
        (`calibration.gram_folds`); each is asked for when the layers before it are done.
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
                layers.append(_refit(mesh, i, gram if isinstance(gram, list) else [gram], mlp.down_proj, mask[i]))
        if on_layer:
            on_layer(i)
    return [
        Compensation(tuple(down for down, _ in layers), tuple(fit for _, fit in layers), in_order=False)
        for layers in found
    ]


def _refit(
    mesh: Mesh | None, i: int, grams: Sequence[Array], down_proj: Array, mask: NDArray[np.float32]
) -> tuple[Array, Fit]:
    if len(grams) > 1:
        return cross_validate_layer(mesh, i, grams, down_proj, mask)
    return compensate_layer(mesh, i, grams[0], down_proj, mask)


def prune_in_order(
    model: Decoder,
    windows: NDArray[np.int32],
    criterion: str | Criterion,
    widths: Sequence[int],
    *,
    statistics: Statistics | None,
    folds: int = 1,
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
      folds: 1 refits down projections, more cross-validate that on so many parts of the windows; with 0 removed
        neurons are left out.
      seed: of criteria that draw random numbers.
      batch_tokens: how many tokens a replica computes at once.
      on_layer: called with the index of each layer that is done.

    Returns:
      the scores of each layer `[F]`, from which the `widths` highest were kept, and the down projections.

    Raises:
      RequestError, OperationError: as for `compensate` and `scores.score`.
    """
    name, function = find_criterion(criterion)
    check_statistics(criterion, statistics, model.config)
    mesh, stream = mesh_of(model), Stream(model, windows, batch_tokens=batch_tokens)
    values, downs, fits = [], [], []
    for i, (mlp, size) in enumerate(zip(mlp_weights(model), model.config.intermediate_sizes, strict=True)):
        observed, grams = stream.observe(i, folds=folds)
        if statistics is not None:
            dense = {part: getattr(statistics.layers[i], part) for part in SENSITIVITIES}
            observed = dataclasses.replace(observed, **dense)
        scores = score_neurons(name, function, i, mlp, size, observed, seed, mesh)
        down, fit = mlp.down_proj, None
        if widths[i] < size:
            mask = np.zeros(mlp.gate_proj.shape[0], np.float32)
            mask[select_neurons(scores, widths[i])] = 1
            if grams:
                down, fit = _refit(mesh, i, grams, down, mask)
            else:
                down = without_neurons(mesh, down, mask)
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
