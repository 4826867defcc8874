"""One budget of neurons over all layers: how many each layer keeps.

    uniform     every layer keeps the width that the target says
    global      the neurons of all layers compete by their scores, each divided by the mean score of its layer
    measured    layers that cost more keep more: the loss on calibration text is measured with one layer pruned at a
                time (and compensated, where that is asked for). The costs of layers add up nearly, and grow with the
                share p of neurons removed about as `p^EXPONENT`; the shares are those with the smallest sum of costs

In the last two the layers that are pruned keep together no more neurons than the target leaves, each at least the share
`min_keep` of its own, in multiples of `multiple_of` unless it stays whole.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jax import Array
from numpy.typing import NDArray

from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.parallel.mesh import block_on_cpu, mesh_of
from gluprune_jax.pruning.calibration import BATCH_TOKENS, Stream
from gluprune_jax.pruning.choices import MIN_KEEP
from gluprune_jax.pruning.least_squares import compensate_layer, without_neurons
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.scores import mlp_weights

EXPONENT = 2.0
# Tokens that the loss is measured on, for each layer: the whole takes L / 2 forward passes over them.
COST_TOKENS = 4096


def by_score(
    values: Sequence[NDArray[np.float32]], budget: int, *, min_keep: float = MIN_KEEP, multiple_of: int = 1
) -> list[int]:
    """Widths by the scores of all layers, each divided by their mean in its layer.

    With `multiple_of` 1 and the same `min_keep`, a smaller budget keeps a subset of what a larger one keeps.

    Args:
      values: scores `[F]` of each layer.
      budget: how many neurons are kept in all.
      min_keep: the least share of its neurons that a layer keeps.
      multiple_of: widths are multiples of this, or whole.

    Raises:
      RequestError: a share that is none, or that leaves no room in the budget.
    """
    sizes = [len(value) for value in values]
    least = _least(sizes, budget, min_keep, multiple_of)
    ranked = []
    for value, sure in zip(values, least, strict=True):
        normal = np.sort(value)[::-1] / np.maximum(np.mean(np.abs(value)), np.finfo(np.float32).tiny)
        normal[:sure] = np.inf
        ranked.append(normal)
    layers = np.repeat(np.arange(len(sizes)), sizes)
    order = np.argsort(-np.concatenate(ranked), kind="stable")[:budget]
    return _rounded(np.bincount(layers[order], minlength=len(sizes)).astype(float), sizes, least, budget, multiple_of)


def by_cost(
    costs: Sequence[float],
    sizes: Sequence[int],
    budget: int,
    *,
    min_keep: float = MIN_KEEP,
    multiple_of: int = 1,
    exponent: float = EXPONENT,
) -> list[int]:
    """Widths that make the sum of `cost_i p_i^exponent` smallest, with p the share of its neurons that layer i loses.

    Args:
      costs: what it costs to prune each layer alone, at the same share, finite; what is below a hundredth of the mean
        counts as that much.
      sizes: F of each layer.
      budget: how many neurons are kept in all.
      min_keep: the least share of its neurons that a layer keeps.
      multiple_of: widths are multiples of this, or whole.
      exponent: how costs grow, above 1.

    Raises:
      RequestError: a share that is none, or that leaves no room in the budget.
      OperationError: a cost that is not finite.
    """
    if not np.isfinite(costs).all():
        raise OperationError(f"cost {int(np.argmin(np.isfinite(costs)))} is not finite: no budget follows from it")
    least = _least(sizes, budget, min_keep, multiple_of)
    widths, most = np.array(sizes, float), 1 - np.array(least) / np.array(sizes)
    cost = np.maximum(np.asarray(costs, np.float64), 0)
    # Where nothing costs anything, nothing tells the layers apart.
    cost = cost / cost.max() if cost.max() > 0 else np.ones(len(cost))
    cost = np.maximum(cost, 0.01 * cost.mean())
    # The derivatives of all costs are equal where the sum is smallest: cost_i p_i^(exponent - 1) F_i^-1 is the same.
    relative = (widths / cost) ** (1 / (exponent - 1))
    relative /= relative.max()
    low, high = 0.0, 1 / relative.min()
    for _ in range(100):
        middle = (low + high) / 2
        kept = np.sum(widths * (1 - np.minimum(middle * relative, most)))
        low, high = (middle, high) if kept > budget else (low, middle)
    return _rounded(widths * (1 - np.minimum(high * relative, most)), sizes, least, budget, multiple_of)


def least_widths(sizes: Sequence[int], min_keep: float, multiple_of: int) -> list[int]:
    """What each layer keeps at least.

    Args:
      sizes: F of each layer.
      min_keep: the least share of its neurons that a layer keeps.
      multiple_of: widths are multiples of this, or whole.

    Raises:
      RequestError: a share that is none.
    """
    if not 0 <= min_keep < 1:
        raise RequestError(f"`min_keep` is {min_keep:g}; it must be a share from 0 and below 1")
    return [min(size, max(1, -(-int(np.ceil(min_keep * size)) // multiple_of)) * multiple_of) for size in sizes]


def _least(sizes: Sequence[int], budget: int, min_keep: float, multiple_of: int) -> list[int]:
    """What each layer keeps at least, where the budget has room for it."""
    least = least_widths(sizes, min_keep, multiple_of)
    if sum(least) > budget:
        raise RequestError(
            f"`min_keep` {min_keep:g} keeps at least {sum(least):,} neurons, and the target leaves {budget:,}; "
            f"give a smaller one or keep more"
        )
    return least


def _rounded(
    widths: NDArray[np.float64], sizes: Sequence[int], least: Sequence[int], budget: int, multiple_of: int
) -> list[int]:
    """Widths in multiples; what rounding down sets free goes to those that lost most by it."""
    steps = np.floor(widths / multiple_of + 1e-9).astype(int) * multiple_of
    found = [max(int(width), low) for width, low in zip(steps, least, strict=True)]
    for i in np.argsort(-(widths - np.array(found)), kind="stable"):
        more = min(multiple_of, sizes[i] - found[i])
        if more > 0 and sum(found) + more <= budget and widths[i] > found[i]:
            found[i] += more
    while sum(found) > budget:  # where floors were rounded up
        i = int(np.argmax([width - low for width, low in zip(found, least, strict=True)]))
        found[i] -= min(found[i] - least[i], found[i] % multiple_of or multiple_of)
    return found


def layer_costs(
    model: Decoder,
    windows: NDArray[np.int32],
    plan: PruningPlan,
    *,
    grams: Iterable[Array] | None = None,
    cost_tokens: int = COST_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    on_layer: Callable[[int], None] | None = None,
) -> list[float]:
    """What pruning each layer alone costs: the loss on calibration text above that of the dense model, in nats a token.

    Args:
      model: the dense model, on any mesh.
      windows: `[N, W]` int32 token ids, filled up with `packing.PADDING`.
      plan: which neurons are kept where a layer is pruned; 0 is the cost of a layer that it leaves whole.
      grams: the Gram matrix of each layer (`calibration.gram_matrices`), where the pruned layer is to be refitted.
      cost_tokens: the loss is taken on windows of about so many tokens in all.
      batch_tokens: how many tokens a replica computes at once.
      on_layer: called with the index of each layer that is done.

    Raises:
      RequestError, OperationError: as for `least_squares.compensate`; and a cost that is not finite.
    """
    plan.check_fits(model.config)
    L, mesh, masks = model.config.num_hidden_layers, mesh_of(model), plan.masks(model.config)
    # Spread over the text, as the windows themselves are.
    count = min(len(windows), max(1, cost_tokens // windows.shape[1]))
    measured = windows[np.arange(count) * len(windows) // count]
    matrices: Iterable[Array | None] = itertools.repeat(None, L) if grams is None else grams
    stream = Stream(model, measured, batch_tokens=batch_tokens)
    losses: list[float | None] = []
    for i, (mlp, gram) in enumerate(zip(mlp_weights(model), matrices, strict=True)):
        if plan.widths[i] == plan.intermediate_sizes[i]:
            losses.append(None)
        else:
            if gram is None:
                down = without_neurons(mesh, mlp.down_proj, masks[i])
            else:
                down, _ = compensate_layer(mesh, i, gram, mlp.down_proj, masks[i])
            block_on_cpu(mesh, down)
            pruned = stream.copy()
            pruned.advance(i, down)
            for j in range(i + 1, L):
                pruned.advance(j)
            losses.append(pruned.loss())
        stream.advance(i)
        if on_layer:
            on_layer(i)
    dense = stream.loss()
    costs = [0.0 if loss is None else loss - dense for loss in losses]
    if not np.isfinite(costs).all():
        raise OperationError(f"pruning layer {int(np.argmin(np.isfinite(costs)))} alone costs no finite loss")
    return costs
