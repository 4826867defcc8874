"""What either loop of decoding is given."""

import dataclasses
from typing import Any

from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from gluprune_jax.inference.sampling import Sampling
from gluprune_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Decoding:
    """A model, and how it continues sequences that are decoded together.

    Attributes:
      config: of the model.
      params: of the model.
      slots: sequences at the same time; on a mesh an equal share, in order, belongs to each replica.
      size: tokens in the cache of each: `gluprune_jax.inference.generation.slots_for`.
      dtype: of keys and values.
      max_new_tokens: most tokens to add to each.
      sampling: how tokens are chosen.
      neuron_masks: see `Decoder.__call__`.
    """

    config: ModelConfig
    params: nnx.State[Any, Any]
    slots: int
    size: int
    dtype: DTypeLike
    max_new_tokens: int
    sampling: Sampling
    neuron_masks: tuple[ArrayLike, ...] | None
