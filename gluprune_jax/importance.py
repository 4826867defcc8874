"""How much each GLU neuron matters, from the weights alone.

The criteria are pure functions of one layer's gate and up matrices, `[F, D]` each, giving `[F]` float32 scores;
higher is more important. `ppm` is the Peak-to-Peak Magnitude of "Fragile Knowledge, Robust Instruction-Following:
The Width Pruning Dichotomy in Llama-3.2" (arXiv 2512.22671); the others are the ones it is compared with there.

Sums over D are a fixed pairwise tree and every product in them is rounded before it is added, so a score has the
same bits however the neurons are sharded or chunked.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.mesh import mesh_of, on
from gluprune_jax.model import Llama, ModelConfig
from gluprune_jax.sharding import constrain

Criterion = Callable[[Array, Array], Array]


# ------------------------------------------------------------------------------------------- array functions


def pairwise_sum(x: Array) -> Array:
    """Sums `x [..., D]` over its last axis: zero-pads to a power of two, then adds halves until one is left."""
    n = 1 << (x.shape[-1] - 1).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n - x.shape[-1])])
    while n > 1:
        n //= 2
        x = x[..., :n] + x[..., n:]
    return x[..., 0]


def rounded(x: Array) -> Array:
    """Returns finite `x` unchanged, as a float32 value that cannot become part of a fused multiply-add.

    Compilers contract `a * b + c` into one operation that skips the rounding of the product, depending on the
    code around it; a clamp between the two stops that (tested on the CPU).
    """
    limit = np.finfo(np.float32).max
    return jnp.clip(x, -limit, limit)


def peak_to_peak(w: Array, axis: int = -1) -> Array:
    """`max(w) + abs(min(w))` along `axis`, float32. Exact: extremes are found in the dtype of the weights."""
    return jnp.max(w, axis).astype(jnp.float32) + jnp.abs(jnp.min(w, axis).astype(jnp.float32))


def ppm(gate: Array, up: Array) -> Array:
    """Peak-to-Peak Magnitude (arXiv 2512.22671): `(max G + |min G|) + (max U + |min U|)` of each row."""
    return peak_to_peak(gate) + peak_to_peak(up)


def vow(gate: Array, up: Array) -> Array:
    """Variance of Weights: the sample variance (ddof 1) of the gate row plus that of the up row."""
    return _variance(gate) + _variance(up)


def pon(gate: Array, up: Array) -> Array:
    """Product of Norms: the L1 norm of the gate row times that of the up row."""
    gate_norm = pairwise_sum(jnp.abs(gate.astype(jnp.float32)))
    return gate_norm * pairwise_sum(jnp.abs(up.astype(jnp.float32)))


def l2(gate: Array, up: Array) -> Array:
    """The L2 norm of the gate row plus that of the up row."""
    return _l2_norm(gate) + _l2_norm(up)


def _variance(w: Array) -> Array:
    w = w.astype(jnp.float32)
    D = w.shape[-1]
    mean = rounded(pairwise_sum(w) * np.float32(1 / D))
    squares = rounded(jnp.square(w - mean[..., None]))
    return rounded(pairwise_sum(squares) * np.float32(1 / (D - 1)))


def _l2_norm(w: Array) -> Array:
    return jnp.sqrt(pairwise_sum(rounded(jnp.square(w.astype(jnp.float32)))))


CRITERIA: dict[str, Criterion] = {"ppm": ppm, "vow": vow, "pon": pon, "l2": l2}


# -------------------------------------------------------------------------------------------- whole models


@dataclasses.dataclass(frozen=True)
class Scores:
    """The importance of every neuron of a model; plans of any width are made from it.

    Attributes:
      criterion: the name of the criterion.
      values: for each layer `[F]` float32, higher is more important.
      hidden_size: D, which turns an expansion ratio into a width.
      weights_dtype: dtype of the weights that were scored ("mixed" if there are several).
      fingerprint: identifies the MLP weights that were scored (see `score`).
    """

    criterion: str
    values: tuple[NDArray[np.float32], ...]
    hidden_size: int
    weights_dtype: str
    fingerprint: str

    @property
    def intermediate_sizes(self) -> tuple[int, ...]:
        """F of each layer."""
        return tuple(len(v) for v in self.values)


class MLPWeights(NamedTuple):
    """The matrices of one layer: gate and up `[F, D]`, down `[D, F]`, F as stored."""

    gate_proj: Array
    up_proj: Array
    down_proj: Array


def mlp_weights(model: Llama) -> Iterator[MLPWeights]:
    """The MLP matrices of a model, layer by layer."""
    for layer in model.layers:
        yield MLPWeights(layer.mlp.gate_proj[...], layer.mlp.up_proj[...], layer.mlp.down_proj[...])


def score(
    model: Llama,
    criterion: str | Criterion = "ppm",
    *,
    weights: Iterable[MLPWeights] | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> Scores:
    """Scores every MLP neuron of a model.

    The fingerprint is the SHA-256 of the peak-to-peak magnitudes of every gate row, up row and down column. It is the
    same for the same weight values in any dtype, layout or sharding; it sees any training or quantisation, and equal
    ones mean equal `ppm` scores, but a weight that is no extreme of its row can change without it.

    Args:
      model: the model; storage padding (`width_multiple`) is not scored.
      criterion: a name in `CRITERIA`, or a function `(gate [F, D], up [F, D]) -> [F]` that scores each neuron by its
        own rows.
      weights: the MLP matrices of each layer, if they are not to be taken from `model` (which may then be abstract):
        a layer's are asked for when those before have been scored.
      on_layer: called with the index of each layer once it is scored, for progress.

    Raises:
      RequestError: unknown criterion.
      OperationError: NaN or Inf weights, naming the layer and the matrix.
    """
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise RequestError(f"unknown criterion {criterion!r}; known are {', '.join(CRITERIA)}")
        name, function = criterion, CRITERIA[criterion]
    else:
        name, function = getattr(criterion, "__name__", repr(criterion)), criterion

    mesh, digest = mesh_of(model), hashlib.sha256()
    values, dtypes = [], set()
    matrices = mlp_weights(model) if weights is None else weights
    for i, (mlp, width) in enumerate(zip(matrices, model.config.intermediate_sizes, strict=True)):
        _digest_layer(digest, i, mlp, width, mesh)
        with on(mesh):
            layer_scores = np.asarray(score_layer(function, mlp.gate_proj, mlp.up_proj))
        stored = mlp.gate_proj.shape[0]
        if layer_scores.shape != (stored,) or not np.isfinite(layer_scores[:width]).all():
            raise OperationError(
                f"criterion {name!r} gave layer {i} scores of shape {layer_scores.shape}, not {stored} finite numbers"
            )
        values.append(layer_scores[:width].astype(np.float32))
        dtypes |= {str(mlp.gate_proj.dtype), str(mlp.up_proj.dtype)}
        if on_layer:
            on_layer(i)
    return Scores(
        criterion=name,
        values=tuple(values),
        hidden_size=model.config.hidden_size,
        weights_dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        fingerprint=f"sha256:{digest.hexdigest()}",
    )


def random_values(config: ModelConfig, seed: int = 0) -> tuple[NDArray[np.float32], ...]:
    """Uniform random scores for each layer, `[F]` float32: the baseline that a criterion has to beat."""
    key = jax.random.key(seed)
    return tuple(
        np.asarray(jax.random.uniform(jax.random.fold_in(key, i), (width,), jnp.float32))
        for i, width in enumerate(config.intermediate_sizes)
    )


def fingerprint(
    model: Llama,
    *,
    weights: Iterable[MLPWeights] | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> str:
    """Identifies the MLP weights of a model by their extremes; for this and the arguments see `score`.

    Raises:
      OperationError: NaN or Inf weights, naming the layer and the matrix.
    """
    mesh, digest = mesh_of(model), hashlib.sha256()
    matrices = mlp_weights(model) if weights is None else weights
    for i, (mlp, width) in enumerate(zip(matrices, model.config.intermediate_sizes, strict=True)):
        _digest_layer(digest, i, mlp, width, mesh)
        if on_layer:
            on_layer(i)
    return f"sha256:{digest.hexdigest()}"


def _digest_layer(digest: "hashlib._Hash", i: int, mlp: MLPWeights, width: int, mesh: Mesh | None) -> None:
    with on(mesh):
        finite, extents = mlp_extents(*mlp)
    if not all(np.asarray(finite)):
        bad = [name for name, ok in zip(mlp._fields, np.asarray(finite), strict=True) if not ok]
        raise OperationError(f"layer {i} has NaN or Inf weights in {' and '.join(bad)}; such a model cannot be ranked")
    digest.update(np.asarray(extents, "<f4")[:, :width].tobytes())


# Padding neurons are scored like others and cut off on the host: cut off here, divided weights would have to move.


@functools.partial(jax.jit, static_argnums=0)
def score_layer(function: Criterion, gate: Array, up: Array) -> Array:
    """The scores `[F]` of a layer's neurons as stored, whole on every device; each device scores its own neurons."""
    return constrain(function(gate, up))


@jax.jit
def mlp_extents(gate: Array, up: Array, down: Array) -> tuple[Array, Array]:
    """Whether each matrix is finite, `[3]`; the peak-to-peak magnitudes of its neurons, `[3, F]` float32."""
    # Whether a matrix is finite is asked of the weights themselves: a float32 maximum may drop a NaN.
    finite = jnp.stack([jnp.isfinite(w).all() for w in (gate, up, down)])
    extents = jnp.stack([peak_to_peak(gate), peak_to_peak(up), peak_to_peak(down, axis=0)])
    return constrain(finite), constrain(extents)


# ------------------------------------------------------------------------------------------------ selection


def select_neurons(scores: Sequence[float] | NDArray[np.float32], width: int) -> NDArray[np.int32]:
    """Indices of the `width` highest of `scores [F]`, ascending; among equal scores the lower index is kept.

    Selections from the same scores are nested: a smaller one is a subset of a larger one.
    """
    order = np.argsort(-np.asarray(scores, np.float32), kind="stable")
    return cast("NDArray[np.int32]", np.sort(order[:width]).astype(np.int32))
