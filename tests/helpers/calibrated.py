"""A tiny model's activations, computed plainly, and the meshes that calibration is tried on."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray
from tiny_models import hf_config

from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import with_parameters
from gluprune_jax.parallel.mesh import MeshShape

CONFIG = hf_config(num_attention_heads=8, num_key_value_heads=2, intermediate_size=83)
SHAPES = [MeshShape(*sizes) for sizes in ((8, 1), (1, 8), (2, 2), (2, 4))]


def activations(model: Decoder, tokens: NDArray[np.int32]) -> list[NDArray[np.float64]]:
    """The input of down_proj of each layer for one sequence, `[T, F]`, by the model's own modules."""
    found, config = [], model.config
    x = model.embed_tokens[...][tokens[None]]
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    for layer, width in zip(model.layers, config.intermediate_sizes, strict=True):
        attended, _ = layer.self_attn(layer.input_layernorm(x), positions, None, ())
        x = x + attended
        y = layer.post_attention_layernorm(x)[0]
        gate, up = (np.asarray(w[...], np.float64)[:width] for w in (layer.mlp.gate_proj, layer.mlp.up_proj))
        g = np.asarray(y, np.float64) @ gate.T
        found.append(g / (1 + np.exp(-g)) * (np.asarray(y, np.float64) @ up.T))
        x = x + layer.mlp(layer.post_attention_layernorm(x), None)
    return found


def of_all(model: Decoder, windows: NDArray[np.int32]) -> list[NDArray[np.float64]]:
    parts = [activations(model, window[window >= 0]) for window in windows]
    return [np.concatenate(layer) for layer in zip(*parts, strict=True)]


def with_down_projections(model: Decoder, down_projs: Sequence[Array]) -> Decoder:
    """The model with other down projections, of the same shapes."""
    return with_parameters(model, {f"layers.{i}.mlp.down_proj": down for i, down in enumerate(down_projs)})
