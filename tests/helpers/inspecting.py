"""What is in a folder or a model, for tests to compare."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from llama_tensors import model_arrays
from numpy.typing import NDArray

import convert
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.parallel.mesh import mesh_of, place, use_mesh


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and of those in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def arrays(model: Decoder) -> dict[tuple[Any, ...], Any]:
    """The arrays as a model stores them, padding and divisions included, by their path in it."""
    return {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def tensors(source: convert.Checkpoint | Path) -> dict[str, NDArray[Any]]:
    """The weights of a checkpoint, or of what a path holds, under their names in Hugging Face files."""
    checkpoint = convert.load(source) if isinstance(source, Path) else source
    return {name.hf: np.asarray(array).reshape(name.shape) for name, array in model_arrays(checkpoint.model)}


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: Any, state: Any, tokens: Any, masks: Any) -> jax.Array:
    model = nnx.merge(graphdef, state)
    return model.logits(model(tokens, neuron_masks=masks)[0])


def logits(model: Decoder, tokens: Any, masks: Any = None) -> NDArray[np.float32]:
    """Of every position, `[B, T, V]`; the model may be divided over a mesh."""
    mesh = mesh_of(model)
    with use_mesh(mesh):
        placed = place(mesh, np.asarray(tokens, np.int32), "batch", None)
        return np.asarray(_forward(*nnx.split(model), placed, masks))
