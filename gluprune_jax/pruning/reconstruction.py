"""Fits the MLP of each pruned layer to what the dense layer gives, by a few gradient steps on calibration text.

Reconstructing one block after the other from little text does what fine-tuning the whole model does, in the memory of
one block (arXiv 2510.14444). Two residual streams go through the model side by side, that of the dense model and that
of the pruned one, whose layers so far are reconstructed already. At each layer, gate, up and down projection of the
kept neurons are fitted so that the pruned stream behind the layer is nearest the dense one: the loss is the squared
distance over the real tokens, divided by the square of what the dense MLP adds to the stream. What earlier layers lost
is in it too, as far as this layer can give it back.

What is trained are changes in units of the root mean square of each matrix, so that one learning rate serves models of
any scale; they are float32, and cast to the dtype of the weights when their error is taken. The optimiser is Adam
(arXiv 1412.6980) with gradients clipped by their global norm and a learning rate that falls to zero along a cosine.

Removed neurons take no part in a step: the matrices are cut to the kept ones, filled up to a multiple of
`WIDTH_MULTIPLE` so that layers of nearly the same width share a program.

What is fitted to a text may overfit it: one window of every `HELD_OUT` is not fitted to. Its error is taken before the
first step and after each pass over the others, and the weights with the least one are kept: none is worse than what
the fit begins with, and what it begins with (removed neurons left out, or a refitted down projection) is what has the
lesser error too. A refit that is to be judged so must not have seen these windows either. Where a step has no finite
loss, or one far above that of no MLP at all, the layer stays as it was pruned.

Steps are of the same windows on every mesh: where there are more replicas than windows in a step, some have none.

Array letters: B windows of a step, W tokens of a window, D hidden size, F intermediate size, M neurons of a fit.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike
from numpy.typing import NDArray

from gluprune_jax.data.packing import PADDING
from gluprune_jax.errors import RequestError
from gluprune_jax.models.decoder import Decoder, DecoderLayer
from gluprune_jax.models.parameters import Parameters, checksum, with_parameters
from gluprune_jax.parallel.mesh import block_on_cpu, mesh_of, place, shape_of, to_host, use_mesh
from gluprune_jax.parallel.sharding import constrain
from gluprune_jax.pruning.calibration import Stream
from gluprune_jax.pruning.kept_layers import KeptLayers
from gluprune_jax.pruning.least_squares import without_neurons
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.scores import MLPWeights, mlp_weights
from gluprune_jax.pruning.statistics import describe_windows

# SmolLM2-135M, `hybrid`, 20 % removed, 8,192 tokens of WikiText-2: perplexity there and of Python text is 42.1 and 29.7
# without, 39.9 and 30.2 with 2 passes at 0.005, 38.1 and 29.7 with 4 at 0.01, 37.8 and 29.6 with 8 at 0.02, all of them
# in steps of 1,024 tokens, and 37.7 and 29.4 as here; half of the layers have their least error before the last pass.
PASSES = 8  # over the windows that are fitted to
LEARNING_RATE = 0.01  # of the first step, in units of the root mean square of a matrix
STEP_TOKENS = 512  # of the windows of a step, which has at least one
HELD_OUT = 8  # of so many windows, one is held out
_CLIP = 1.0
WIDTH_MULTIPLE = 128  # of the neurons of a fit
_VERSION = 2  # of the fit: another one for other weights from the same text
# A loss of so many times that of no MLP at all, or of the start where that is more, is divergence.
_DIVERGED = 10.0


# ------------------------------------------------------------------------------------------------------------ a layer


class Example(NamedTuple):
    """A step's windows in front of an MLP.

    Attributes:
      tokens: `[B, W]` int32, negative where there are none.
      attended: the pruned model's residual stream behind the attention, `[B, W, D]`.
      target: the dense model's stream behind the layer, `[B, W, D]`.
      scale: sum of the squares of what the dense MLP adds, in the mean of as many tokens; a number.
    """

    tokens: Array
    attended: Array
    target: Array
    scale: float


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The optimiser of a layer: how many steps, and the learning rate of the first one."""

    steps: int
    learning_rate: float

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with clipped gradients and a learning rate that falls to zero."""
        rate = optax.cosine_decay_schedule(self.learning_rate, self.steps)
        return optax.chain(optax.clip_by_global_norm(_CLIP), optax.adam(rate))


class Start(NamedTuple):
    """Where a fit begins: the matrices, with zero columns for removed neurons in the down projection; the root mean
    square of the kept part of each; and which neurons are kept, `[F]` float32.
    """

    mlp: MLPWeights[Array]
    scales: MLPWeights[Array]
    mask: Array


class FitState(NamedTuple):
    """The changes so far, float32 in units of the scales, and the optimiser's state."""

    changes: MLPWeights[Array]
    optimizer: Any


@jax.jit
def make_start(mlp: MLPWeights[Array], mask: Array) -> Start:
    """A start from these matrices, of which `mask` `[F]` float32 names the kept neurons."""
    F, D = mlp.gate_proj.shape
    chex.assert_shape([*mlp, mask], [(F, D), (F, D), (D, F), (F,)])
    count = jnp.maximum(jnp.sum(mask) * D, 1)

    def scale(w: Array) -> Array:
        # A matrix of zeros has no scale of its own: it stays.
        return constrain(jnp.sqrt(jnp.sum(w.astype(jnp.float32) ** 2) / count))

    gate, up, down = mlp.gate_proj * mask[:, None], mlp.up_proj * mask[:, None], mlp.down_proj * mask
    return Start(mlp, MLPWeights(scale(gate), scale(up), scale(down)), constrain(mask, "neurons"))


@functools.partial(jax.jit, static_argnums=0)
def first_state(schedule: Schedule, start: Start) -> FitState:
    """The state before the first step: no changes."""
    changes = MLPWeights(*(jnp.zeros(w.shape, jnp.float32) for w in start.mlp))
    state: FitState = _divided(FitState(changes, schedule.optimizer().init(changes)))
    return state


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def fit_step(
    graphdef: Any, schedule: Schedule, layer: Any, start: Start, state: FitState, example: Example
) -> tuple[FitState, Array]:
    """One step of the optimiser, and the loss before it; the state is donated.

    Args:
      graphdef: of the layer, as `nnx.split` gives it.
      schedule: the optimiser.
      layer: the state of the layer.
      start: where the fit began.
      state: so far.
      example: the windows of the step. Everything is computed in float32.
    """
    chex.assert_equal_shape([example.attended, example.target])

    def loss(changes: MLPWeights[Array]) -> Array:
        fitted = _changed(start, changes)
        attended = example.attended.astype(jnp.float32)
        return _distance(graphdef, layer, fitted, example._replace(attended=attended)) / example.scale

    value, gradients = jax.value_and_grad(loss)(state.changes)
    updates, optimizer = schedule.optimizer().update(gradients, state.optimizer)
    changes: Any = optax.apply_updates(state.changes, updates)
    return _divided(FitState(changes, optimizer)), constrain(value)


@jax.jit
def finished(start: Start, changes: MLPWeights[Array]) -> MLPWeights[Array]:
    """The matrices with these changes, in the dtypes that they had."""
    pairs = zip(_changed(start, changes), start.mlp, strict=True)
    mlp: MLPWeights[Array] = _divided(MLPWeights(*(new.astype(old.dtype) for new, old in pairs)))
    return mlp


@functools.partial(jax.jit, static_argnums=0)
def squared_distance(graphdef: Any, layer: Any, mlp: MLPWeights[Array], example: Example) -> Array:
    """The sum over tokens of the squared distance to the target, of what the layer gives with these matrices."""
    return constrain(_distance(graphdef, layer, mlp, example))


@jax.jit
def squared_addition(tokens: Array, attended: Array, target: Array) -> Array:
    """The sum over tokens of the squares of what an MLP adds to the stream: its `target` less what it reads."""
    return constrain(_squares(tokens, target, attended))


def _changed(start: Start, changes: MLPWeights[Array]) -> MLPWeights[Array]:
    """The matrices with these changes, float32."""
    # Without its column in the down projection, no gradient comes to a neuron's rows of the other two.
    changes = changes._replace(down_proj=changes.down_proj * start.mask)
    parts = zip(start.mlp, start.scales, changes, strict=True)
    return MLPWeights(*(w.astype(jnp.float32) + scale * change for w, scale, change in parts))


def _distance(graphdef: Any, layer: Any, mlp: MLPWeights[Array], example: Example) -> Array:
    module: DecoderLayer = nnx.merge(graphdef, layer)
    module = with_parameters(module, {f"mlp.{name}": matrix for name, matrix in mlp._asdict().items()})
    out = constrain(module.feed_forward(example.attended), "batch", None, None)
    return _squares(example.tokens, out, example.target)


def _squares(tokens: Array, a: Array, b: Array) -> Array:
    difference = a.astype(jnp.float32) - b.astype(jnp.float32)
    return jnp.sum(jnp.where(tokens[..., None] >= 0, difference**2, 0))


def _divided(tree: Any) -> Any:
    """A tree with all `MLPWeights` in it divided over devices as those of a model are."""

    def divide(leaf: Any) -> Any:
        if not isinstance(leaf, MLPWeights):
            return constrain(leaf)
        gate, up = (constrain(w, "neurons", None) for w in (leaf.gate_proj, leaf.up_proj))
        return MLPWeights(gate, up, constrain(leaf.down_proj, None, "neurons"))

    return jax.tree.map(divide, tree, is_leaf=lambda leaf: isinstance(leaf, MLPWeights))


@dataclasses.dataclass(frozen=True)
class LayerFit:
    """How near the stream behind a layer is to the dense model's, on the windows that are held out.

    Attributes:
      error_without: with the removed neurons left out and no more, the sum of squared distances over that of the
        squares of what the dense MLP adds.
      error: with the weights that are kept.
      passes: after which these are; 0 where none helped, and the layer is as it was pruned and refitted.
      diverged_at: the step, counted from 1, that had no sensible loss, if there was one.
    """

    error_without: float
    error: float
    passes: int
    diverged_at: int | None = None


def reconstruct_layer(
    layer: DecoderLayer,
    starts: Sequence[MLPWeights[Array]],
    mask: NDArray[np.float32],
    training: Sequence[Example],
    held_out: Sequence[Example],
    *,
    mesh: Mesh | None = None,
    passes: int = PASSES,
    learning_rate: float = LEARNING_RATE,
) -> tuple[MLPWeights[Array], LayerFit]:
    """The matrices of a layer fitted to what the dense one gives.

    Args:
      layer: of the dense model.
      starts: matrices to begin with, zero for removed neurons in the down projection: the first as pruned, perhaps
        others that were repaired already. The fit begins with those that have the least error.
      mask: `[F as stored]` float32, 1 for the kept neurons.
      training: what is fitted to, a step for each.
      held_out: what decides which weights are kept.
      mesh: of the arrays.
      passes: over `training`.
      learning_rate: of the first step, in units of the root mean square of a matrix.
    """
    graphdef, parameters = nnx.split(layer)
    scale = sum(example.scale for example in held_out)
    neurons = fitted_neurons(mask, shape_of(mesh).model)

    def error(mlp: MLPWeights[Array]) -> float:
        return sum(float(to_host(squared_distance(graphdef, parameters, mlp, part))) for part in held_out) / scale

    schedule = Schedule(passes * len(training), learning_rate)
    with use_mesh(mesh):
        cut = [with_neurons(mlp, neurons) for mlp in starts]
        errors = [error(mlp) for mlp in cut]
        first = least = min(errors)
        begun, kept = starts[errors.index(first)], cut[errors.index(first)]
        passes_kept = 0
        start = make_start(kept, place(mesh, mask[neurons], "neurons"))
        del cut
        state = first_state(schedule, start)
        for number in range(passes):
            losses = []
            for example in training:
                state, loss = fit_step(graphdef, schedule, parameters, start, state, example)
                block_on_cpu(mesh, loss)
                losses.append(loss)
            mlp = finished(start, state.changes)
            found = [*(float(to_host(loss)) for loss in losses), error(mlp)]
            senseless = [not value <= _DIVERGED * max(1.0, first) for value in found]
            if any(senseless):
                step = number * len(training) + min(senseless.index(True) + 1, len(training))
                return begun, LayerFit(errors[0], first, 0, step)
            if found[-1] < least:
                kept, least, passes_kept = mlp, found[-1], number + 1
        whole = put_back(begun, neurons, kept)
        block_on_cpu(mesh, whole)
    return whole, LayerFit(errors[0], least, passes_kept)


def fitted_neurons(mask: NDArray[np.float32], devices: int) -> NDArray[np.int32]:
    """The neurons `[M]` that a fit computes: those of `mask [F]`, ascending, and behind them some of the removed ones.

    M is a multiple of `WIDTH_MULTIPLE` and of the devices that the neurons are divided over, or else F.
    """
    kept = np.flatnonzero(mask)
    multiple = math.lcm(WIDTH_MULTIPLE, devices)
    wanted = min(-(-len(kept) // multiple) * multiple, len(mask))
    return np.append(kept, np.flatnonzero(mask == 0)[: wanted - len(kept)]).astype(np.int32)


@jax.jit
def with_neurons(mlp: MLPWeights[Array], neurons: ArrayLike) -> MLPWeights[Array]:
    """The matrices cut to `neurons [M]`."""
    neurons = jnp.asarray(neurons)
    cut: MLPWeights[Array] = _divided(
        MLPWeights(mlp.gate_proj[neurons], mlp.up_proj[neurons], jnp.take(mlp.down_proj, neurons, axis=1))
    )
    return cut


@jax.jit
def put_back(whole: MLPWeights[Array], neurons: ArrayLike, cut: MLPWeights[Array]) -> MLPWeights[Array]:
    """Matrices of which those of `neurons [M]` are replaced."""
    gate, up = (old.at[neurons].set(new) for old, new in zip(whole[:2], cut[:2], strict=True))
    mlp: MLPWeights[Array] = _divided(MLPWeights(gate, up, whole.down_proj.at[:, neurons].set(cut.down_proj)))
    return mlp


# ------------------------------------------------------------------------------------------------------- whole models


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Matrices that were fitted to the outputs of the dense layers.

    Attributes:
      mlps: of each layer, gate and up `[F as stored, D]` and down `[D, F as stored]`, with zero columns for the removed
        neurons in the last; None for a layer that stays whole.
      fits: of each layer, likewise.
      passes: over the windows.
      steps: of each layer.
      learning_rate: of the first step.
    """

    mlps: tuple[MLPWeights[Array] | None, ...]
    fits: tuple[LayerFit | None, ...]
    passes: int
    steps: int
    learning_rate: float

    @property
    def parameters(self) -> Parameters:
        """What takes the place of parameters of the dense model, by name."""
        return {
            f"layers.{i}.mlp.{name}": matrix
            for i, mlp in enumerate(self.mlps)
            if mlp is not None
            for name, matrix in mlp._asdict().items()
        }

    def summary(self) -> dict[str, Any]:
        """What a model card and the history of a checkpoint say of it."""
        fits = list(enumerate(self.fits))
        return {
            "method": "local reconstruction",
            "passes": self.passes,
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "held_out_error_without": [fit and fit.error_without for _, fit in fits],
            "held_out_error": [fit and fit.error for _, fit in fits],
            "left_as_pruned": [i for i, fit in fits if fit is not None and not fit.passes],
            "diverged": [{"layer": i, "step": fit.diverged_at} for i, fit in fits if fit and fit.diverged_at],
        }

    def notes(self) -> list[str]:
        """What a command says: the layers whose fit diverged."""
        return [
            f"the reconstruction of layer {i} diverged at step {fit.diverged_at} of {self.steps}: the layer is left as "
            f"it was pruned"
            for i, fit in enumerate(self.fits)
            if fit is not None and fit.diverged_at is not None
        ]


def reconstruct(
    model: Decoder,
    windows: NDArray[np.int32],
    plan: PruningPlan,
    down_projs: Sequence[Array] | None = None,
    *,
    passes: int = PASSES,
    learning_rate: float = LEARNING_RATE,
    folder: Path | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> Reconstruction:
    """Fits the layers that a plan cuts to what the dense model's give, in order.

    Args:
      model: the dense model, on any mesh.
      windows: `[N, W]` int32 token ids, filled up with `packing.PADDING`.
      plan: made for this model.
      down_projs: refitted ones of all layers (`Compensation.down_projs`), with which the fit may begin.
      passes: over the windows that are fitted to.
      learning_rate: of the first step, in units of the root mean square of a matrix.
      folder: where finished layers are kept until all are, so that the same call goes on there after an interruption;
        several processes keep none.
      on_layer: called with the index of each layer that is done.

    Raises:
      RequestError: as for `calibration.Stream`; a plan that was made for a model of another shape, or drops layers;
        fewer than two windows.
    """
    plan.check_fits(model.config)
    mesh, masks = mesh_of(model), plan.masks(model.config)
    training, held_out = (_Streams(model, part) for part in divide_windows(windows))
    kept = None
    if folder is not None and jax.process_count() == 1:
        kept = KeptLayers(folder, _identity(model, windows, plan, down_projs, passes, learning_rate))
    mlps: list[MLPWeights[Array] | None] = []
    fits: list[LayerFit | None] = []
    for i, mlp in enumerate(mlp_weights(model)):
        examples = [streams.enter(i) for streams in (training, held_out)]
        fitted, fit = None, None
        is_whole = plan.widths[i] == plan.intermediate_sizes[i]
        if found := None if kept is None or is_whole else kept.load(i):
            arrays, about = found
            fitted, fit = _placed(mlp, arrays), LayerFit(**about)
        elif not is_whole:
            downs = [without_neurons(mesh, mlp.down_proj, masks[i]), *([] if down_projs is None else [down_projs[i]])]
            block_on_cpu(mesh, downs)
            fitted, fit = reconstruct_layer(
                model.layers[i],
                [mlp._replace(down_proj=down) for down in downs],
                masks[i],
                *examples,
                mesh=mesh,
                passes=passes,
                learning_rate=learning_rate,
            )
            if kept is not None:
                kept.save(i, {name: to_host(w) for name, w in fitted._asdict().items()}, dataclasses.asdict(fit))
        del examples
        for streams in (training, held_out):
            streams.leave(i, mlp if fitted is None else fitted)
        mlps.append(fitted)
        fits.append(fit)
        if on_layer:
            on_layer(i)
    if kept is not None:
        kept.clear()
    return Reconstruction(tuple(mlps), tuple(fits), passes, passes * training.steps, learning_rate)


def _identity(
    model: Decoder,
    windows: NDArray[np.int32],
    plan: PruningPlan,
    down_projs: Sequence[Array] | None,
    passes: int,
    learning_rate: float,
) -> list[Any]:
    """All that the fitted matrices depend on."""
    digest = hashlib.sha256(b"".join(kept.tobytes() for kept in plan.kept))
    for down in down_projs or ():
        digest.update(to_host(down).tobytes())
    settings = [_VERSION, passes, learning_rate, STEP_TOKENS, HELD_OUT, str(shape_of(mesh_of(model)))]
    return [settings, checksum(model), describe_windows(windows)["digest"], list(plan.widths), digest.hexdigest()]


def _placed(mlp: MLPWeights[Array], arrays: Mapping[str, NDArray[Any]]) -> MLPWeights[Array]:
    """Matrices from the host, in the dtypes and on the devices of those of a layer."""
    pairs = {name: (arrays[name].view(old.dtype), old.sharding) for name, old in mlp._asdict().items()}
    return MLPWeights(**{name: jax.device_put(*pair) for name, pair in pairs.items()})


def divide_windows(windows: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The windows `[N, W]` that are fitted to, and those that are held out: every `HELD_OUT`-th, or else the last.

    Raises:
      RequestError: there are fewer than two.
    """
    if len(windows) < 2:
        raise RequestError(
            f"{len(windows)} calibration window is too few to fit to some and hold one out; give at least 2: more "
            f"`calibration_tokens`, or a smaller `sequence_length`"
        )
    every = min(HELD_OUT, len(windows))
    is_held_out = np.arange(len(windows)) % every == every - 1
    return windows[~is_held_out], windows[is_held_out]


class _Streams:
    """The residual streams of the same windows through the dense and the pruned model, a batch for each step."""

    def __init__(self, model: Decoder, windows: NDArray[np.int32]):
        self._mesh = mesh_of(model)
        replicas, size = shape_of(self._mesh).data, windows.shape[1]
        batches = _in_steps(windows, replicas)
        self._dense = Stream(model, batches.reshape(-1, size), batch_tokens=batches.shape[1] // replicas * size)
        self._pruned = self._dense.copy()
        self._tokens = (batches >= 0).sum((1, 2)).tolist()

    @property
    def steps(self) -> int:
        """How many batches there are."""
        return len(self._tokens)

    def enter(self, i: int) -> list[Example]:
        """The windows of each step in front of the MLP of layer `i`; moves the dense stream behind the layer."""
        before = self._dense.attend(i)
        self._dense.advance(i)
        batches = list(zip(self._dense.batches, self._dense.hidden, strict=True))
        squares = 0.0
        with use_mesh(self._mesh):
            for (tokens, target), attended in zip(batches, before, strict=True):
                squares += float(to_host(squared_addition(tokens, attended, target)))
        mean = squares / sum(self._tokens) or 1.0  # an MLP that adds nothing has no scale
        counted = zip(batches, self._pruned.attend(i), self._tokens, strict=True)
        return [Example(tokens, attended, target, mean * count) for (tokens, target), attended, count in counted]

    def leave(self, i: int, mlp: MLPWeights[Array]) -> None:
        """Moves the pruned stream behind layer `i` with these matrices."""
        self._pruned.advance(i, **mlp._asdict())


def _in_steps(windows: NDArray[np.int32], replicas: int) -> NDArray[np.int32]:
    """Windows `[N, W]` as steps `[S, B, W]`, each of windows from all over the text; filled up to whole replicas."""
    size = windows.shape[1]
    steps = -(-len(windows) // max(1, STEP_TOKENS // size))
    rows = -(-len(windows) // steps)
    found = np.full((steps, -(-rows // replicas) * replicas, size), PADDING, np.int32)
    for step in range(steps):
        part = windows[step::steps]
        found[step, : len(part)] = part
    return found
