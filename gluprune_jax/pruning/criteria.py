"""How much each GLU neuron matters: the criteria, as pure functions of one layer.

The names of a criterion's parameters say what it looks at:

    gate, up                rows of the neurons, `[F, D]` each
    down                    their columns, `[D, F]`
    activation_norm         L2 norm of each neuron's activation (the input of down_proj) over calibration tokens, `[F]`
    mean_magnitude          mean of its absolute value, `[F]`
    sensitivity             first-order change of the loss without it (`calibration.sensitivities`), `[F]`
    entropy_sensitivity     the same of the output's entropy, which needs no labels, `[F]`
    key                     a PRNG key, another one for each layer

It gives `[F]` float32 scores, higher is more important. Those that look at nothing but weights can be used without
calibration; `ppm` is the Peak-to-Peak Magnitude of "Fragile Knowledge, Robust Instruction-Following: The Width Pruning
Dichotomy in Llama-3.2" (arXiv 2512.22671), and `vow`, `pon` and `l2` are those that it is compared with there.

A criterion of one's own is another such function: an entry in `CRITERIA` under a new name, an argument of
`scores.score`, or package.module:function in place of a name.

Sums over D are a fixed pairwise tree and every product in them is rounded before it is added, so a score has the
same bits however the neurons are sharded or chunked.
"""

import importlib
import inspect
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gluprune_jax.errors import RequestError
from gluprune_jax.pruning.choices import STATISTICS, WEIGHTS

Criterion = Callable[..., Array]
INPUTS = (*WEIGHTS, *STATISTICS, "key")

# ------------------------------------------------------------------------------------------------- arithmetic


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


# ---------------------------------------------------------------------------------------------- weights alone


def ppm(gate: Array, up: Array) -> Array:
    """Peak-to-Peak Magnitude (arXiv 2512.22671): `(max G + |min G|) + (max U + |min U|)` of each row."""
    _assert_layer(gate, up)
    return peak_to_peak(gate) + peak_to_peak(up)


def vow(gate: Array, up: Array) -> Array:
    """Variance of Weights: the sample variance (ddof 1) of the gate row plus that of the up row."""
    _assert_layer(gate, up)
    return _variance(gate) + _variance(up)


def pon(gate: Array, up: Array) -> Array:
    """Product of Norms: the L1 norm of the gate row times that of the up row."""
    _assert_layer(gate, up)
    gate_norm = pairwise_sum(jnp.abs(gate.astype(jnp.float32)))
    return gate_norm * pairwise_sum(jnp.abs(up.astype(jnp.float32)))


def l2(gate: Array, up: Array) -> Array:
    """The L2 norm of the gate row plus that of the up row."""
    _assert_layer(gate, up)
    return _l2_norm(gate) + _l2_norm(up)


def _assert_layer(gate: Array, up: Array, down: Array | None = None, *statistics: Array) -> None:
    """Shapes and kinds of what a criterion looks at; of compiled code they are checked while it is traced, once."""
    chex.assert_rank(gate, 2)
    chex.assert_shape(up, gate.shape)
    chex.assert_type([gate, up], float)
    if down is not None:
        chex.assert_shape(down, gate.shape[::-1])
        chex.assert_type(down, float)
    for values in statistics:
        chex.assert_shape(values, gate.shape[:1])


def _variance(w: Array) -> Array:
    w = w.astype(jnp.float32)
    D = w.shape[-1]
    mean = rounded(pairwise_sum(w) * np.float32(1 / D))
    squares = rounded(jnp.square(w - mean[..., None]))
    return rounded(pairwise_sum(squares) * np.float32(1 / (D - 1)))


def _l2_norm(w: Array) -> Array:
    return jnp.sqrt(pairwise_sum(rounded(jnp.square(w.astype(jnp.float32)))))


def random(gate: Array, key: Array) -> Array:
    """Uniform random numbers: the baseline that a criterion has to beat. In tables it is the median of five seeds."""
    return jax.random.uniform(key, gate.shape[:1], jnp.float32)


# ---------------------------------------------------------------------------------------- weights and activations


def hybrid(gate: Array, up: Array, down: Array, activation_norm: Array) -> Array:
    """Weights and activations, as OptiPFair's data-driven pruning ranks them.

    `(g_i / max g + u_i / max u + d_i / max d) * A_i`, where g, u and d are the peak-to-peak magnitudes of the row of
    gate, of the row of up and of the column of down, and A the activation norms. OptiPFair adds up the norms of its
    batches, padding included, so its A depends on the batch size; one batch without padding gives the same numbers.
    """
    _assert_layer(gate, up, down, activation_norm)
    extents = (peak_to_peak(gate), peak_to_peak(up), peak_to_peak(down, axis=0))
    g, u, d = (extent / jnp.maximum(jnp.max(extent), np.finfo(np.float32).tiny) for extent in extents)
    return (g + u + d) * activation_norm


def activation(mean_magnitude: Array) -> Array:
    """The mean absolute activation, as Minitron ranks neurons (arXiv 2407.14679)."""
    chex.assert_rank(mean_magnitude, 1)
    return mean_magnitude


def wanda(down: Array, activation_norm: Array) -> Array:
    """Activation norm times the L2 norm of the column of down: Wanda (arXiv 2306.11695), summed over the output."""
    chex.assert_shape(activation_norm, down.shape[1:])
    return activation_norm * _l2_norm(down.T)


def taylor(sensitivity: Array) -> Array:
    """First-order Taylor expansion of the loss (arXiv 1611.06440): gradient times activation."""
    chex.assert_rank(sensitivity, 1)
    return sensitivity


def entropy(entropy_sensitivity: Array) -> Array:
    """As `taylor`, of the entropy of the model's output in place of the labels' loss (arXiv 2603.08083)."""
    chex.assert_rank(entropy_sensitivity, 1)
    return entropy_sensitivity


# Those of the paper.
WEIGHT_CRITERIA: dict[str, Criterion] = {"ppm": ppm, "vow": vow, "pon": pon, "l2": l2}
CRITERIA: dict[str, Criterion] = WEIGHT_CRITERIA | {
    "random": random,
    "hybrid": hybrid,
    "activation": activation,
    "wanda": wanda,
    "taylor": taylor,
    "entropy": entropy,
}


# ----------------------------------------------------------------------------------------------------- by name


def find_criterion(criterion: str | Criterion) -> tuple[str, Criterion]:
    """The name and function of a criterion.

    Args:
      criterion: a name in `CRITERIA`, a function as the module describes it, or where one is found:
        "package.module:function".

    Raises:
      RequestError: there is none of that name, or it looks at something that no criterion is given.
    """
    if not isinstance(criterion, str):
        name, function = getattr(criterion, "__name__", repr(criterion)), criterion
    elif ":" in criterion:
        name, function = criterion, _imported(criterion)
    elif criterion in CRITERIA:
        name, function = criterion, CRITERIA[criterion]
    else:
        raise RequestError(
            f"unknown criterion {criterion!r}; known are {', '.join(CRITERIA)}, and package.module:function"
        )
    inputs_of(function, name)
    return name, function


def inputs_of(function: Criterion, name: str = "the criterion") -> tuple[str, ...]:
    """What a criterion looks at, by the names of its parameters.

    Raises:
      RequestError: something that no criterion is given.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise RequestError(f"criterion {name!r} does not say what its parameters are: {error}") from error
    inputs = tuple(parameters)
    if odd := [p.name for p in parameters.values() if p.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD]:
        raise RequestError(f"criterion {name!r} has the parameter {odd[0]!r}, which is not a plain one")
    if unknown := [repr(parameter) for parameter in inputs if parameter not in INPUTS]:
        raise RequestError(
            f"criterion {name!r} has the parameter {' and '.join(unknown)}; a criterion may look at {', '.join(INPUTS)}"
        )
    return inputs


def _imported(address: str) -> Criterion:
    module, _, attribute = address.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a module is a program
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise RequestError(f"criterion {address!r} cannot be imported: {first_line}") from error
    if not callable(function):
        raise RequestError(f"criterion {address!r} is no function")
    result: Criterion = function
    return result
