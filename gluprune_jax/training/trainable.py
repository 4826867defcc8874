"""What of a model is trained: all of it, its MLPs, or low-rank adapters (LoRA, arXiv 2106.09685).

Parameters are dictionaries from their names ("layers.3.mlp.gate_proj") to arrays. What is trained is float32 whatever
the dtype of the model (the master weights of mixed precision, arXiv 1710.03740); what is not stays as it is stored.

An adapter of a weight `[out, in]` is two factors, "NAME.lora_b" `[out, R]` and "NAME.lora_a" `[R, in]`, and the model
computes with `weight + alpha / R * lora_b @ lora_a`. `lora_b` begins as zeros, so that the model begins as it was.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from gluprune_jax.errors import RequestError
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import Parameters, abstract_model, parameters_of, with_parameters
from gluprune_jax.parallel.mesh import mesh_of, place
from gluprune_jax.parallel.sharding import PARAMETERS

_PROJECTIONS = {  # the weights that adapters are made for, and how many of their leading axes are outputs
    "q_proj": 2,
    "k_proj": 2,
    "v_proj": 2,
    "o_proj": 1,
    "gate_proj": 1,
    "up_proj": 1,
    "down_proj": 1,
}


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What is trained.

    Attributes:
      what: "all", "mlp" (gate, up and down of every layer) or "lora" (adapters of all projections of every layer).
      rank: R of the adapters.
      alpha: the adapters are scaled by `alpha / R`.
    """

    what: Literal["all", "mlp", "lora"] = "all"
    rank: int = 16
    alpha: float = 32.0

    @property
    def scale(self) -> float:
        """What the product of two factors is multiplied by."""
        return self.alpha / self.rank


def check_rank(config: ModelConfig, rank: int) -> None:
    """Makes sure that adapters of this rank are smaller than the matrices they stand for.

    Raises:
      RequestError: the rank is less than 1, or larger than the smallest side of a matrix.
    """
    sides = {"hidden size": config.hidden_size, "intermediate size": min(config.intermediate_sizes)}
    sides["key/value heads times head dim"] = config.num_key_value_heads * config.head_dim
    name, least = min(sides.items(), key=lambda side: side[1])
    if not 1 <= rank <= least:
        raise RequestError(
            f"`lora_rank` is {rank}; it must lie between 1 and {least}, the smallest side of the matrices ({name})"
        )


def split(model: Decoder, trainable: Trainable, seed: int) -> tuple[Parameters, Parameters]:
    """What is trained of a model, and what is not.

    Args:
      model: on one device or a mesh, where the parts stay.
      trainable: what to train.
      seed: of the first factors of adapters.

    Returns:
      New float32 arrays, which may be donated, and arrays of the model. With adapters the second part is all of it.

    Raises:
      RequestError: a rank that does not fit.
    """
    parameters = parameters_of(model)
    if trainable.what == "lora":
        check_rank(model.config, trainable.rank)
        return _adapters(model, parameters, trainable.rank, seed), parameters
    chosen = {name for name in parameters if trainable.what == "all" or ".mlp." in name}
    masters = {name: jnp.array(parameters[name], jnp.float32, copy=True) for name in sorted(chosen)}
    return masters, {name: array for name, array in parameters.items() if name not in chosen}


def weights(trained: Mapping[str, Array], frozen: Mapping[str, Array], scale: float) -> Parameters:
    """The weights that a model computes with; for use within compiled code.

    Args:
      trained: the first part of `split`, or those of its entries whose names begin alike.
      frozen: the second.
      scale: of adapters.
    """
    result = dict(frozen)
    for name, array in trained.items():
        weight, _, factor = name.rpartition(".")
        if factor == "lora_b":
            result[weight] = _adapted(frozen[weight], array, trained[f"{weight}.lora_a"], scale)
        elif factor != "lora_a":
            result[name] = array
    return result


def layout_of(model: Decoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of the parameters of a model, by name: what remains to be known of it in training."""
    struct: Callable[..., jax.ShapeDtypeStruct] = jax.ShapeDtypeStruct  # untyped in jax
    arrays = parameters_of(model).items()
    return {name: struct(array.shape, array.dtype, sharding=array.sharding) for name, array in arrays}


def merged(
    config: ModelConfig,
    layout: Mapping[str, jax.ShapeDtypeStruct],
    trained: Mapping[str, Array],
    frozen: Mapping[str, Array],
    scale: float,
) -> Decoder:
    """The trained model: adapters added to their weights.

    Args:
      config: of the model.
      layout: its parameters as they shall be.
      trained: the first part of `split`, after training.
      frozen: the second, which the model shares where nothing was trained.
      scale: of adapters.
    """
    values = {}
    for name, target in layout.items():
        part = {key: array for key, array in trained.items() if key == name or key.startswith(f"{name}.lora_")}
        rest = {name: frozen[name]} if name in frozen else {}
        values[name] = _cast(part, rest, name, scale, target) if part else rest[name]
    return with_parameters(abstract_model(config), values)


def _cast(trained: Parameters, frozen: Parameters, name: str, scale: float, target: jax.ShapeDtypeStruct) -> Array:
    def cast(trained: Parameters, frozen: Parameters) -> Array:
        return weights(trained, frozen, scale)[name].astype(target.dtype)

    result: Array = jax.jit(cast, out_shardings=target.sharding)(trained, frozen)
    return result


def _adapted(weight: Array, b: Array, a: Array, scale: float) -> Array:
    # As one matrix rather than two more products with the activations: R is small beside the tokens of a batch, and
    # the model needs to know nothing of adapters.
    product = jnp.tensordot(b, a, axes=1, precision=jax.lax.Precision.HIGHEST)
    return weight.astype(jnp.float32) + scale * product


def _adapters(model: Decoder, parameters: Parameters, rank: int, seed: int) -> Parameters:
    mesh, result = mesh_of(model), {}
    for number, (name, weight) in enumerate(sorted(parameters.items())):
        outputs = _PROJECTIONS.get(last := name.rpartition(".")[2])
        if outputs is None:
            continue
        axes, shape = PARAMETERS[last], weight.shape
        logical = list(shape[outputs:])
        if last == "down_proj":
            logical = [model.config.intermediate_sizes[int(name.split(".")[1])]]
        # Drawn on the host for the logical width: the same on every mesh, and zero at neurons that are only padding.
        drawn = np.random.default_rng((seed, number)).standard_normal((rank, *logical), np.float32)
        drawn /= np.float32(math.sqrt(math.prod(logical)))
        padding = [(0, size - there) for size, there in zip(shape[outputs:], logical, strict=True)]
        first = np.pad(drawn, [(0, 0), *padding])
        result[f"{name}.lora_a"] = _put(mesh, first, None, *axes[outputs:])
        result[f"{name}.lora_b"] = _put(mesh, np.zeros((*shape[:outputs], rank), np.float32), *axes[:outputs], None)
    return result


def _put(mesh: Mesh | None, value: Any, *axes: str | None) -> Array:
    return jnp.asarray(value) if mesh is None else place(mesh, value, *axes)
