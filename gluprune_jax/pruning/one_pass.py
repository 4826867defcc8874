"""Choosing neurons MLP by MLP, for files that are read once.

Where all layers get one width, what one of them keeps needs no other: it is known before the next is read. What only
the end can tell, such as whether a saved plan was made for these weights, `Choice.plan` says.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gluprune_jax.models.config import ModelConfig
from gluprune_jax.pruning.mixture import MixtureSizes
from gluprune_jax.pruning.plan import PruningPlan, blank_plan, make_plan
from gluprune_jax.pruning.scores import Fingerprinter, MLPWeights, Scorer, select_neurons
from gluprune_jax.pruning.statistics import Statistics

if TYPE_CHECKING:
    from gluprune_jax.pruning.criteria import Criterion


class Choice(Protocol):
    """Decides for one MLP after the other which neurons it keeps.

    Attributes:
      blank: a plan that has the widths; which neurons it keeps, and of what weights, need not be right yet.
    """

    blank: PruningPlan

    def keep(self, mlp: MLPWeights[Any]) -> NDArray[np.int32]:
        """The neurons that the next MLP keeps, ascending; none where its layer is dropped.

        Raises:
          OperationError: NaN or Inf weights, naming the layer or expert and the matrix.
        """

    def plan(self) -> PruningPlan:
        """The plan, once each MLP was asked for.

        Raises:
          RequestError: the weights are not those that the plan or the statistics are of.
        """


class Ranking:
    """Ranks neurons by a criterion and keeps the highest: the same choice as `make_plan` of `score`.

    Args:
      sizes: of the dense model.
      criterion: as for `score`.
      target: arguments of `make_plan`, without `widths`.
      statistics: of the model, for criteria that look at activations.
      seed: of criteria that draw random numbers.

    Raises:
      RequestError: as `score` and `make_plan`.
    """

    def __init__(
        self,
        sizes: ModelConfig | MixtureSizes,
        criterion: "str | Criterion",
        target: Mapping[str, Any],
        *,
        statistics: Statistics | None = None,
        seed: int = 0,
    ):
        self._scorer = Scorer(sizes, criterion, statistics=statistics, seed=seed)
        self._target = target
        self.blank = blank_plan(sizes, **target)
        self._widths = iter(self.blank.widths)

    def keep(self, mlp: MLPWeights[Any]) -> NDArray[np.int32]:
        """As `Choice.keep`."""
        return select_neurons(self._scorer.add(mlp), next(self._widths))

    def plan(self) -> PruningPlan:
        """As `Choice.plan`."""
        return make_plan(self._scorer.scores(), **self._target)


class Replay:
    """Keeps what a plan keeps, and finds out meanwhile whether it was made for these weights.

    Args:
      sizes: of the dense model.
      plan: made for it.

    Raises:
      RequestError: the plan was made for a model of another shape.
    """

    def __init__(self, sizes: ModelConfig | MixtureSizes, plan: PruningPlan):
        plan.check_fits(sizes)
        self.blank, self._sizes = plan, sizes
        self._fingerprinter, self._kept = Fingerprinter(sizes), iter(plan.kept)

    def keep(self, mlp: MLPWeights[Any]) -> NDArray[np.int32]:
        """As `Choice.keep`."""
        self._fingerprinter.add(mlp)
        return next(self._kept)

    def plan(self) -> PruningPlan:
        """As `Choice.plan`."""
        self.blank.check_fits(self._sizes, self._fingerprinter.fingerprint)
        return self.blank
