"""How a model is pruned, criterion, allocation and repair together, and what comes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gluprune_jax.data.documents import SELF
from gluprune_jax.errors import RequestError
from gluprune_jax.pruning.choices import ALLOCATIONS, FOLDS, MIN_KEEP, inputs_of_criterion, is_data_driven
from gluprune_jax.pruning.plan import PruningPlan

if TYPE_CHECKING:
    from gluprune_jax.models.decoder import Decoder
    from gluprune_jax.models.parameters import Parameters
    from gluprune_jax.pruning.least_squares import Compensation
    from gluprune_jax.pruning.reconstruction import Reconstruction

_SHORT = {"ls": "least-squares", "cv-ls": "cv-least-squares"}
_REFITS = ("least-squares", "cv-least-squares")


@dataclasses.dataclass(frozen=True)
class Method:
    """How neurons are chosen, and what becomes of the others' work.

    Attributes:
      criterion: a name in `CRITERIA`, or package.module:function.
      allocation: one of `ALLOCATIONS`.
      min_keep: the least share of its neurons that a layer keeps, where layers differ.
      is_compensated: whether down_proj is refitted by least squares.
      sequential: whether each layer is scored on, and fitted to, what the pruned ones before it give (but for
        sensitivities, which are the dense model's).
      seed: of criteria that draw random numbers.
      cross_validates: whether the refit is only as strong as helps on calibration windows that are held out.
      reconstructs: whether each layer's MLP is then fitted to what the dense layer gives (`reconstruction`).
    """

    criterion: str = "ppm"
    allocation: str = "uniform"
    min_keep: float = MIN_KEEP
    is_compensated: bool = False
    sequential: bool = False
    seed: int = 0
    cross_validates: bool = False
    reconstructs: bool = False

    @classmethod
    def parse(cls, text: str, *, min_keep: float = MIN_KEEP, seed: int = 0) -> Method:
        """A method as it is written in one word: "hybrid+global+least-squares+sequential", the criterion first.

        Raises:
          RequestError: another word.
        """
        criterion, *parts = (_SHORT.get(part, part) for part in text.split("+"))
        inputs_of_criterion(criterion)  # refuses what is none
        known = (*ALLOCATIONS[1:], *_REFITS, "reconstruct", "sequential")
        if "in-order" in parts:
            raise RequestError(f"method {text!r} has 'in-order', which is called sequential now")
        if wrong := [part for part in parts if part not in known]:
            raise RequestError(f"method {text!r} has {wrong[0]!r}; behind the criterion may come {', '.join(known)}")
        allocations = [part for part in parts if part in ALLOCATIONS]
        if len(allocations) > 1:
            raise RequestError(f"method {text!r} has two allocations; give one")
        allocation = allocations[0] if allocations else "uniform"
        refits = [part for part in parts if part in _REFITS]
        if len(set(refits)) > 1:
            raise RequestError(f"method {text!r} has {' and '.join(refits)}; give one")
        return cls(
            criterion,
            allocation,
            min_keep,
            bool(refits),
            "sequential" in parts,
            seed,
            refits == [_REFITS[1]],
            "reconstruct" in parts,
        )

    def __str__(self) -> str:
        parts = [self.criterion, *[self.allocation] * (self.allocation != "uniform")]
        repair = [self.compensate] * (self.compensate != "none")
        return "+".join([*parts, *repair, *["sequential"] * self.sequential])

    @property
    def compensate(self) -> str:
        """How weights are repaired, in one word: "least-squares+reconstruct"; "none" where they are not."""
        parts = [_REFITS[self.cross_validates]] * self.is_compensated + ["reconstruct"] * self.reconstructs
        return "+".join(parts) or "none"

    @property
    def needs_statistics(self) -> bool:
        """Whether the criterion looks at activations."""
        return is_data_driven(self.criterion)

    @property
    def depends_on_order(self) -> bool:
        """Whether pruning in order gives another model: sensitivities are the dense model's in any order."""
        inputs = inputs_of_criterion(self.criterion)
        return self.is_compensated or not {"activation_norm", "mean_magnitude"}.isdisjoint(inputs)

    @property
    def needs_grams(self) -> bool:
        """Whether it looks at Gram matrices of the dense model, of all windows together."""
        return self.is_compensated and not (self.sequential or self.cross_validates or self.reconstructs)

    @property
    def folds(self) -> int:
        """How many Gram matrices of a layer it looks at: of as many parts of the calibration windows."""
        return 0 if not self.is_compensated else FOLDS if self.cross_validates else 1

    @property
    def needs_text(self) -> bool:
        """Whether the model must be run on calibration text, whatever statistics there are."""
        return self.compensate != "none" or self.sequential or self.allocation == "measured"


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A choice of neurons, and the repaired weights that go with it (None: those of the model)."""

    plan: PruningPlan
    compensation: Compensation | None = None
    reconstruction: Reconstruction | None = None

    @property
    def parameters(self) -> Parameters:
        """What takes the place of parameters of the dense model, by name, neurons as stored."""
        repairs = [repair for repair in (self.compensation, self.reconstruction) if repair is not None]
        return {name: array for repair in repairs for name, array in repair.parameters.items()}

    def apply(self, model: Decoder) -> Decoder:
        """The model with these weights; `plan` is still to be masked or sliced."""
        from gluprune_jax.models.parameters import with_parameters  # here: whoever has a model has JAX

        return with_parameters(model, self.parameters)

    def record(self) -> dict[str, Any]:
        """What a history says beside the plan."""
        repairs = {"compensation": self.compensation, "reconstruction": self.reconstruction}
        if found := {name: repair.summary() for name, repair in repairs.items() if repair is not None}:
            return found
        # A plan that was made with a repair is applied without: the history must not read as if there had been one.
        return {"compensation": None} if self.plan.is_compensated else {}

    def notes(self) -> list[str]:
        """What a command says beside the results, a sentence each."""
        return [] if self.reconstruction is None else self.reconstruction.notes()


def as_pruned(pruned: Pruned | PruningPlan) -> Pruned:
    """A plan alone is a choice of neurons that leaves the weights as they are."""
    return Pruned(pruned) if isinstance(pruned, PruningPlan) else pruned


def calibration_texts(
    methods: Iterable[Method], given: Sequence[str], *, has_statistics: bool = False, needs_text: bool = False
) -> tuple[str, ...]:
    """The names of the calibration text: what is given, or the model's own where text is needed and there is none.

    Beside statistics nothing is added: what they lack must come from the text that they are of.

    Args:
      methods: those that are wanted.
      given: names of texts.
      has_statistics: whether statistics are given.
      needs_text: whether something else than the methods needs text.
    """
    has_use = needs_text or any(method.needs_text or method.needs_statistics for method in methods)
    return (SELF,) if has_use and not (given or has_statistics) else tuple(given)
