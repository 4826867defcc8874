"""A checkpoint whose weights are in memory."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from convert.checkpoint import Checkpoint, MeshChoice
from convert.families.names import TensorName
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model, parameters_of, with_parameters
from gluprune_jax.parallel.mesh import is_local, shape_of
from gluprune_jax.pruning.methods import Pruned, as_pruned
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.scores import MLPWeights, mlp_weights
from gluprune_jax.pruning.slicing import slice_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint(Checkpoint):
    """A model in the memory of devices, with its surroundings.

    Attributes:
      model: the weights, and the architecture in `model.config`.
    """

    model: Decoder

    @property
    def config(self) -> ModelConfig:
        """The architecture of the model."""
        return self.model.config

    @functools.cached_property
    def dtypes(self) -> Mapping[str, np.dtype[Any]]:
        """The dtype of each parameter, by name."""
        return {name: np.dtype(leaf.dtype) for name, leaf in parameters_of(self.model).items()}

    @property
    def is_spread(self) -> bool:
        """Whether this process lacks a part of the weights, so that all must gather them together."""
        arrays = parameters_of(self.model).values()
        return any(isinstance(array, jax.Array) and not is_local(array) for array in arrays)

    def array(self, name: TensorName) -> Array:
        """One tensor, in the shape of our parameter."""
        node: Any = self.model
        for part in name.path:
            node = node[part] if isinstance(part, int) else getattr(node, part)
        array: Array = node.get_value()
        return array

    def mlp_weights(self) -> Iterator[MLPWeights[Array]]:
        """The MLP matrices, layer by layer, for scoring."""
        return mlp_weights(self.model)

    def runnable_model(self) -> Decoder:
        """The model with its weights in memory."""
        return self.model

    def pruned(self, pruned: Pruned | PruningPlan, *, donate: bool = False) -> Self:
        """As `Checkpoint.pruned`."""
        pruned = as_pruned(pruned)
        model = slice_model(pruned.apply(self.model), pruned.plan, donate=donate)
        return dataclasses.replace(self, model=model, history=(*self.history, self.record(pruned)))


def choose_mesh(choice: MeshChoice | None, model: Decoder) -> tuple[Mesh | None, ModelConfig]:
    """The mesh for an abstract model, and its config with the storage padding that this mesh asks for."""
    mesh = choice(model) if choice else None
    return mesh, dataclasses.replace(model.config, width_multiple=shape_of(mesh).model)


def abstract_weights(config: ModelConfig, dtypes: Mapping[str, Any]) -> Decoder:
    """The model with shapes and dtypes (by the name of each parameter) in place of arrays."""
    struct: Callable[..., jax.ShapeDtypeStruct] = jax.ShapeDtypeStruct  # untyped in jax
    shapes = parameters_of(abstract_model(config))
    return build_model(config, {name: struct(leaf.shape, dtypes[name]) for name, leaf in shapes.items()})


def build_model(config: ModelConfig, arrays: Mapping[str, Array | jax.ShapeDtypeStruct]) -> Decoder:
    """Puts all parameters, by name and each in our shape, into a model without allocating anything else.

    Shapes and dtypes in place of arrays give an abstract model.
    """
    model = abstract_model(config)
    assert arrays.keys() == parameters_of(model).keys()
    return with_parameters(model, arrays)
