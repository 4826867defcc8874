"""What a GGUF file says of its architecture: values below `<architecture>.`, each checked as it is asked for."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from gluprune_jax.errors import OperationError, RequestError, shortened

_MAX_INT32 = (1 << 31) - 1


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The metadata below `<architecture>.`, and what else in the file says what the config is.

    Attributes:
      architecture: `general.architecture`.
      values: by key without that prefix.
      vectors: the tensors that belong to the config and not to the weights, by name: divisors of RoPE frequencies.
      tensors: the names of all tensors.
    """

    architecture: str
    values: Mapping[str, Any]
    vectors: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    tensors: Collection[str] = ()

    def named(self, key: str) -> str:
        """The key as it stands in the file."""
        return f"{self.architecture}.{key}"

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number.

        Raises:
          OperationError: it is absent and there is no default, or it is something else or out of range.
        """
        return self._checked(key, self.get(key, default), least)

    def _checked(self, key: str, value: Any, least: int = 1) -> int:
        if value is None:
            raise self._missing(key)
        if type(value) is not int or not least <= value <= _MAX_INT32:
            raise OperationError(
                f"{self.named(key)} is {shortened(value)}; it must be a whole number from {least} to {_MAX_INT32}"
            )
        return value

    def _missing(self, key: str) -> OperationError:
        return OperationError(f"the metadata key {self.named(key)} is missing")

    def per_layer(self, key: str, default: int | None = None) -> list[int]:
        """The whole number of each layer; it is stored once if they are all the same, or once for each layer."""
        values = self.get(key, default)
        if not isinstance(values, list):
            return [self.integer(key, default)] * self.layers
        if len(values) != self.layers:
            raise OperationError(
                f"{self.named(key)} is {shortened(values)}; expected a whole number for {self.layers} layers"
            )
        return [self._checked(key, value) for value in values]

    def same_in_all_layers(self, key: str, default: int | None = None) -> int:
        values = set(self.per_layer(key, default))
        if len(values) > 1:
            raise RequestError(f"{self.named(key)} differs between layers; accepted: one value for all")
        return values.pop()

    def positive(self, key: str, default: float | None = None) -> float:
        """A positive number: the shortest decimal that gives the float32 of the file.

        9.999999747378752e-06 was 1e-05 in the original config.

        Raises:
          OperationError: it is absent and there is no default, or it is something else.
        """
        value = self.get(key, default)
        if value is None:
            raise self._missing(key)
        if not isinstance(value, float) or not 0 < value < math.inf:
            raise OperationError(f"{self.named(key)} is {shortened(value)}; it must be a positive number")
        return float(str(np.float32(value)))

    def switch(self, key: str, default: bool) -> bool:
        """A value that is true or false.

        Raises:
          OperationError: it is neither.
        """
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise OperationError(f"{self.named(key)} is {shortened(value)}; it must be true or false")
        return value

    @property
    def layers(self) -> int:
        """The number of layers."""
        layers = self.integer("block_count")
        if layers > len(self.tensors):
            raise OperationError(
                f"{self.named('block_count')} is {layers}, but the file holds only {len(self.tensors)} tensors"
            )
        return layers

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return self.same_in_all_layers("attention.head_count")

    @property
    def head_dim(self) -> int:
        """H, the size of a key."""
        hidden_size, heads = self.integer("embedding_length"), self.heads
        if self.get("attention.key_length") is None and hidden_size % heads:
            raise OperationError(
                f"{self.named('attention.head_count')} = {heads} does not divide {self.named('embedding_length')} = "
                f"{hidden_size}, and there is no {self.named('attention.key_length')}"
            )
        return self.integer("attention.key_length", hidden_size // heads)

    def slides(self, period: int) -> list[bool]:
        """Which layers have a window: the pattern of the file, or of every `period` layers all but the last.

        Raises:
          OperationError: the pattern is neither a period nor a list of true and false for each layer.
        """
        pattern = self.get("attention.sliding_window_pattern", period)
        if isinstance(pattern, list):
            if len(pattern) != self.layers or not all(isinstance(slides, bool) for slides in pattern):
                raise OperationError(
                    f"{self.named('attention.sliding_window_pattern')} is {shortened(pattern)}; expected true or false "
                    f"for {self.layers} layers"
                )
            return pattern
        every = self._checked("attention.sliding_window_pattern", pattern, least=0)
        return [every == 0 or (i + 1) % every != 0 for i in range(self.layers)]
