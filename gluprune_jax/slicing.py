"""Makes a model really smaller: the rows and columns of removed neurons leave the weights.

The sliced model is the same function as the dense one under the plan's mask (`PruningPlan.masks`), up to the order
of summation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from gluprune_jax.model import Llama, abstract_model
from gluprune_jax.plan import PruningPlan


def slice_model(model: Llama, plan: PruningPlan, *, width_multiple: int | None = None, donate: bool = False) -> Llama:
    """Returns the model with only the neurons that `plan` keeps; all other arrays are shared with `model`.

    Args:
      model: the dense model.
      plan: made for this model; only its shape is checked here (see `PruningPlan.check_fits`).
      width_multiple: zero-pads the stored arrays to a multiple of this (default: as in `model`).
      donate: frees each MLP of `model` once it is sliced; the largest layer is then all the extra memory that
        slicing needs, and `model` can no longer be used.

    Raises:
      RequestError: the plan was made for a model of another shape.
    """
    plan.check_fits(model.config)
    config = dataclasses.replace(
        model.config,
        intermediate_sizes=plan.widths,
        width_multiple=model.config.width_multiple if width_multiple is None else width_multiple,
    )
    graphdef, state = nnx.split(abstract_model(config))
    arrays = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    for i, (kept, stored) in enumerate(zip(plan.kept, config.stored_intermediate_sizes, strict=True)):
        mlp = model.layers[i].mlp
        paths = [("layers", i, "mlp", name) for name in ("gate_proj", "up_proj", "down_proj")]
        if len(kept) == stored == mlp.gate_proj.shape[0]:
            continue
        sliced = slice_mlp(stored - len(kept), *(arrays[path] for path in paths), kept)
        if donate:
            for path in paths:
                arrays[path].delete()
        arrays |= dict(zip(paths, sliced, strict=True))
    flat = [(path, variable.replace(arrays[path])) for path, variable in nnx.to_flat_state(state)]
    sliced_model: Llama = nnx.merge(graphdef, nnx.from_flat_state(flat))
    return sliced_model


@functools.partial(jax.jit, static_argnums=0)
def slice_mlp(
    padding: int, gate: Array, up: Array, down: Array, kept: np.ndarray[tuple[int], np.dtype[np.int32]]
) -> tuple[Array, Array, Array]:
    rows = ((0, padding), (0, 0))
    return (
        jnp.pad(jnp.take(gate, kept, axis=0, mode="clip"), rows),
        jnp.pad(jnp.take(up, kept, axis=0, mode="clip"), rows),
        jnp.pad(jnp.take(down, kept, axis=1, mode="clip"), rows[::-1]),
    )
