"""Mixtures of experts as pruning sees them: a sequence of GLU MLPs, one for each expert and for each dense layer.

Scores and plans of a mixture have an entry for each of these MLPs, in the order of the layers, the experts of a layer
one after the other. All experts of a model have one width; which of its neurons an expert keeps is its own affair.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeVar

from gluprune_jax.models.config import ModelConfig

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class MixtureSizes:
    """How large the parts of a mixture of experts are.

    Attributes:
      hidden_size: D.
      experts: for each layer how many experts it has; 0 where it is dense.
      intermediate_sizes: for each layer F of each of its experts, or of its one MLP.
      num_parameters: in all; tied embeddings counted once.
    """

    hidden_size: int
    experts: tuple[int, ...]
    intermediate_sizes: tuple[int, ...]
    num_parameters: int

    @property
    def num_hidden_layers(self) -> int:
        """L."""
        return len(self.experts)

    @property
    def expansion_ratio(self) -> float:
        """Intermediate size of an expert over hidden size."""
        return self.expert_size / self.hidden_size

    @property
    def expert_size(self) -> int:
        """F of the experts."""
        return expert_size(self.experts, self.mlp_sizes)

    @property
    def mlp_sizes(self) -> tuple[int, ...]:
        """F of each MLP."""
        return of_each_mlp(self.experts, self.intermediate_sizes)

    def with_mlp_sizes(self, sizes: Sequence[int]) -> "MixtureSizes":
        """The sizes of the model whose MLPs are cut to these."""
        removed = sum(self.mlp_sizes) - sum(sizes)
        return dataclasses.replace(
            self,
            intermediate_sizes=of_each_layer(self.experts, sizes),
            num_parameters=self.num_parameters - 3 * self.hidden_size * removed,
        )


def mlp_sizes(sizes: ModelConfig | MixtureSizes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """F of each MLP of a model, and how many experts each layer has; of a dense model there are none of the latter."""
    if isinstance(sizes, MixtureSizes):
        return sizes.mlp_sizes, sizes.experts
    return sizes.intermediate_sizes, ()


def of_each_mlp(experts: Sequence[int], values: Iterable[T]) -> tuple[T, ...]:
    """The value of its layer for each MLP."""
    return tuple(value for count, value in zip(experts, values, strict=True) for _ in range(max(1, count)))


def of_each_layer(experts: Sequence[int], values: Sequence[T]) -> tuple[T, ...]:
    """The value of its first MLP for each layer."""
    firsts, i = [], 0
    for count in experts:
        firsts.append(values[i])
        i += max(1, count)
    assert i == len(values)
    return tuple(firsts)


def positions(experts: Sequence[int]) -> list[tuple[int, int | None]]:
    """The layer of each MLP, and which of its experts it is; None for that of a dense layer."""
    return [(i, e) for i, count in enumerate(experts) for e in (range(count) if count else (None,))]


def mlp_names(experts: Sequence[int]) -> list[str]:
    """What errors call each MLP: "layers.3.experts.17", or of a dense layer "layers.0.mlp"."""
    return [f"layers.{i}.mlp" if e is None else f"layers.{i}.experts.{e}" for i, e in positions(experts)]


def expert_size(experts: Sequence[int], sizes: Sequence[int]) -> int:
    """F of the experts, from that of each MLP."""
    return next(size for count, size in zip(experts, of_each_layer(experts, sizes), strict=True) if count)
