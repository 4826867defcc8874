"""What a loader returns and a writer takes: a model and everything that travels with it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from convert.names import TensorName, tensor_names
from gluprune_jax.errors import RequestError
from gluprune_jax.importance import MLPWeights, mlp_weights
from gluprune_jax.mesh import shape_of
from gluprune_jax.model import Llama, ModelConfig, abstract_model
from gluprune_jax.plan import PruningPlan
from gluprune_jax.slicing import slice_model

# Chooses the mesh for a model, of which there are only shapes and dtypes yet; None is the default device.
MeshChoice = Callable[[Llama], Mesh | None]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model with its surroundings.

    Attributes:
      model: the weights, and the architecture in `model.config`.
      source: the name or path it was loaded from, as the user gave it.
      hf_config: the keys of `config.json` that are not architecture (model type, token ids, ...), kept as they
        were so that an export says the same.
      assets: other files of the checkpoint by name (tokenizer, generation config, licence), byte for byte.
      history: one record for every pruning the model has been through, oldest first.
      notes: what the loader accepted and left out, one sentence each.
    """

    model: Llama
    source: str
    hf_config: Mapping[str, Any]
    assets: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> ModelConfig:
        """The architecture of the model."""
        return self.model.config

    def array(self, name: TensorName) -> Array:
        """One tensor, in the shape of our parameter."""
        node: Any = self.model
        for part in name.path:
            node = node[part] if isinstance(part, int) else getattr(node, part)
        array: Array = node.get_value()
        return array

    def mlp_weights(self) -> Iterator[MLPWeights]:
        """The MLP matrices, layer by layer, for scoring."""
        return mlp_weights(self.model)

    def pruned(self, plan: PruningPlan, *, donate: bool = False) -> "Checkpoint":
        """The checkpoint with its model sliced by `plan`, and the plan's summary added to its history.

        Args:
          plan: made for this model.
          donate: frees the dense MLPs as it goes (see `slice_model`).
        """
        model = slice_model(self.model, plan, donate=donate)
        return dataclasses.replace(self, model=model, history=(*self.history, self.record(plan)))

    def record(self, plan: PruningPlan) -> Mapping[str, Any]:
        """What `history` says of a pruning."""
        return {"base_model": self.source, **plan.summary()}


def build_model(config: ModelConfig, arrays: Mapping[str, Array | jax.ShapeDtypeStruct]) -> Llama:
    """Puts arrays into a model without allocating anything else.

    Args:
      config: the architecture.
      arrays: by Hugging Face name, exactly the tensors of `tensor_names(config)`, each in our shape. Shapes and
        dtypes in place of arrays give an abstract model.
    """
    model = abstract_model(config)
    graphdef, state = nnx.split(model)
    by_path: dict[tuple[Any, ...], Any] = {name.path: arrays[name.hf] for name in tensor_names(config)}
    flat = [(path, variable.replace(by_path[path])) for path, variable in nnx.to_flat_state(state)]
    merged: Llama = nnx.merge(graphdef, nnx.from_flat_state(flat))
    return merged


def model_arrays(model: Llama) -> Iterator[tuple[TensorName, Array]]:
    """The tensors of a model with their names, in the order of the forward pass."""
    flat = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    for name in tensor_names(model.config):
        yield name, flat[name.path]


def cast(values: NDArray[Any], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """The finite values of tensor `name` in another dtype.

    Raises:
      RequestError: some are too large for it.
    """
    with np.errstate(over="ignore"):
        values = values.astype(dtype)
    if not np.isfinite(values).all():
        raise too_large(name, dtype)
    return values


def too_large(name: str, dtype: np.dtype[Any]) -> RequestError:
    """The refusal of a cast."""
    return RequestError(f"{name} holds values too large for {dtype}; accepted: a dtype of wider range")


def choose_mesh(choice: MeshChoice | None, model: Llama) -> tuple[Mesh | None, ModelConfig]:
    """The mesh for an abstract model, and its config with the storage padding that this mesh asks for."""
    mesh = choice(model) if choice else None
    return mesh, dataclasses.replace(model.config, width_multiple=shape_of(mesh).model)


def abstract_weights(config: ModelConfig, dtypes: Mapping[str, Any]) -> Llama:
    """The model with shapes and dtypes (given by Hugging Face name) in place of arrays."""
    shapes = parameter_shapes(config)
    struct: Callable[..., jax.ShapeDtypeStruct] = jax.ShapeDtypeStruct  # untyped in jax
    return build_model(config, {hf: struct(leaf.shape, dtypes[hf]) for hf, leaf in shapes.items()})


def parameter_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The stored shape of every parameter in our layout, by Hugging Face name."""
    flat = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(abstract_model(config)))}
    return {name.hf: flat[name.path] for name in tensor_names(config)}
