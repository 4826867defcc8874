"""What can be chosen by name when a model is pruned, and defaults: known before JAX is imported."""

from collections.abc import Callable
from typing import Any

from gluprune_jax.pruning.statistics import SENSITIVITIES

WEIGHTS = ("gate", "up", "down")
STATISTICS = ("activation_norm", "mean_magnitude", *SENSITIVITIES)

# What each criterion of `gluprune_jax.pruning.criteria` looks at: the parameters of the function of its name.
CRITERION_INPUTS: dict[str, tuple[str, ...]] = {
    "ppm": ("gate", "up"),
    "vow": ("gate", "up"),
    "pon": ("gate", "up"),
    "l2": ("gate", "up"),
    "random": ("gate", "key"),
    "hybrid": ("gate", "up", "down", "activation_norm"),
    "activation": ("mean_magnitude",),
    "wanda": ("down", "activation_norm"),
    "taylor": ("sensitivity",),
    "entropy": ("entropy_sensitivity",),
}
CRITERION_NAMES = tuple(CRITERION_INPUTS)
WEIGHT_CRITERION_NAMES = CRITERION_NAMES[:4]  # those of the paper
ALLOCATIONS = ("uniform", "global", "measured")  # see `gluprune_jax.pruning.allocation`
MIN_KEEP = 0.2  # the least share of its neurons that a layer keeps, where layers differ
FOLDS = 3  # of the calibration windows, where a refit is cross-validated


def inputs_of_criterion(criterion: str | Callable[..., Any]) -> tuple[str, ...]:
    """What a criterion looks at, by the names of its parameters.

    Args:
      criterion: as for `gluprune_jax.pruning.criteria.find_criterion`.

    Raises:
      RequestError: there is none of that name, or it looks at something that no criterion is given.
    """
    if isinstance(criterion, str) and criterion in CRITERION_INPUTS:
        return CRITERION_INPUTS[criterion]
    from gluprune_jax.pruning.criteria import find_criterion, inputs_of  # here: any other one is a function of JAX

    return inputs_of(find_criterion(criterion)[1])


def is_data_driven(criterion: str | Callable[..., Any]) -> bool:
    """Whether a criterion looks at activations.

    Raises:
      RequestError: as `inputs_of_criterion`.
    """
    return not set(STATISTICS).isdisjoint(inputs_of_criterion(criterion))
