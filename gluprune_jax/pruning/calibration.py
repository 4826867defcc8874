"""What the neurons of a model do on calibration text: statistics of the input of down_proj, layer by layer.

The residual stream of all calibration windows is held, and moved through the model one layer at a time (`Stream`), by
one compiled program for all layers of a width. So a layer can be looked at, changed, and what the layers behind it see
is what the changed one gives; and the Gram matrix of one layer, `[F, F]`, is all that exists of them at a time.

Sums are float32 whatever the dtype of the model, over real tokens only: padding, the size and the order of the batches
do not change them beyond the rounding of sums.

Array letters: N windows, B windows of a batch, W tokens of a window, D hidden size, F intermediate size.
"""

import copy
import dataclasses
import datetime
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from gluprune_jax.data.packing import PADDING
from gluprune_jax.errors import RequestError
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder, DecoderLayer, embed
from gluprune_jax.models.loss import cross_entropy, entropy, sum_over_positions
from gluprune_jax.models.parameters import abstract_model, with_parameters
from gluprune_jax.parallel.mesh import block_on_cpu, mesh_of, place, shape_of, to_host, use_mesh
from gluprune_jax.parallel.sharding import constrain
from gluprune_jax.pruning.scores import fingerprint
from gluprune_jax.pruning.statistics import LayerStatistics, Statistics, check_finite, describe_windows

# Tokens that a replica runs through a layer at once; windows are at least one.
BATCH_TOKENS = 2048
# Tokens of a replica whose logits exist at a time.
_LOGITS_TOKENS = 256


def collect(
    model: Decoder,
    windows: NDArray[np.int32],
    *,
    names: Sequence[str] = (),
    date: datetime.date | None = None,
    sensitivity: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    on_layer: Callable[[int], None] | None = None,
    on_gram: Callable[[Array], None] | None = None,
) -> Statistics:
    """The statistics of every layer of a model, in one pass over calibration windows.

    Args:
      model: the model, on any mesh.
      windows: `[N, W]` int32 token ids, filled up with `packing.PADDING`.
      names: of the texts, for `Statistics.texts`.
      date: that the chat template wrote into them, for the same.
      sensitivity: also the sensitivity of the loss, which takes a forward and a backward pass more.
      batch_tokens: how many tokens a replica computes at once; memory, not results, depends on it.
      on_layer: called with the index of each layer that is done.
      on_gram: called with the Gram matrix of each layer, as of `gram_matrices`; they are only computed for this.

    Raises:
      RequestError: no windows, windows longer than the model's, or token ids outside its vocabulary.
      OperationError: statistics that are not finite, naming the layer; NaN or Inf weights.
    """
    stream = Stream(model, windows, batch_tokens=batch_tokens)
    layers = []
    for i in range(model.config.num_hidden_layers):
        observed, grams = stream.observe(i, folds=0 if on_gram is None else 1)
        if on_gram:
            on_gram(grams[0])
        del grams
        influence = stream.advance(i)
        layers.append(dataclasses.replace(observed, influence=influence))
        if on_layer:
            on_layer(i)
    if sensitivity:
        values = sensitivities(model, windows, batch_tokens=batch_tokens)
        layers = [dataclasses.replace(layer, sensitivity=value) for layer, value in zip(layers, values, strict=True)]
        for i, layer in enumerate(layers):
            check_finite(layer, i)
    texts = describe_windows(windows, names, date)
    return Statistics(tuple(layers), model.config.hidden_size, fingerprint(model), texts)


# ---------------------------------------------------------------------------------------------------------- stream


class Sums(NamedTuple):
    """What is added up over tokens: `[F]` each, and the Gram matrix `[F, F]` where it is asked for; float32."""

    squares: Array
    sums: Array
    magnitudes: Array
    gram: Array | None


class Stream:
    """The residual stream of calibration windows, moved through a model one layer at a time.

    Args:
      model: the model, on any mesh.
      windows: `[N, W]` int32 token ids, filled up with `packing.PADDING`.
      batch_tokens: how many tokens a replica computes at once.

    Raises:
      RequestError: no windows, windows longer than the model's, or token ids outside its vocabulary.
    """

    def __init__(self, model: Decoder, windows: NDArray[np.int32], *, batch_tokens: int = BATCH_TOKENS):
        self._model, self._mesh = model, mesh_of(model)
        self._batches = list(batches(model, windows, batch_tokens))
        self._tokens, self._count = int((windows >= 0).sum()), len(windows)
        with use_mesh(self._mesh):
            self._hidden = [_embed(model.config, model.embed_tokens[...], tokens) for tokens in self._batches]
        block_on_cpu(self._mesh, self._hidden)
        self._attended: list[Array] | None = None

    def copy(self) -> "Stream":
        """Another stream at the same place; what happens to one does not touch the other."""
        return copy.copy(self)  # arrays are never changed, and lists are replaced

    @property
    def batches(self) -> list[Array]:
        """The tokens of each batch, `[B, W]` int32, negative where there are none."""
        return self._batches

    @property
    def hidden(self) -> list[Array]:
        """The residual stream where it is, of each batch `[B, W, D]`."""
        return self._hidden

    def attend(self, i: int) -> list[Array]:
        """The stream behind the attention of layer `i`, into which it goes next, of each batch `[B, W, D]`."""
        if self._attended is None:
            graphdef, state = nnx.split(self._model.layers[i])
            found = []
            with use_mesh(self._mesh):
                for hidden in self._hidden:
                    found.append(_attend(graphdef, state, hidden))
                    block_on_cpu(self._mesh, found[-1])
            self._attended = found
        return self._attended

    def observe(self, i: int, *, folds: int = 0) -> tuple[LayerStatistics, list[Array]]:
        """Statistics of layer `i`, into which the stream goes next; its `influence` is not known before `advance`.

        Args:
          i: the index of the layer.
          folds: also so many Gram matrices of the activations, `[F as stored, F as stored]` float32 each, divided over
            neurons: one of all windows, or of as many parts of them that follow each other.

        Raises:
          RequestError: fewer than two windows for each of several folds.
          OperationError: they are not finite, naming the layer.
        """
        if folds > 1:
            check_folds(self._count, folds)
        layer: DecoderLayer = self._model.layers[i]
        graphdef, state = nnx.split(layer)
        attended = []
        with use_mesh(self._mesh):
            parts = [zero_sums(layer.mlp.gate_proj.shape[0], folds > 0) for _ in range(max(folds, 1))]
            for tokens, hidden, members in zip(self._batches, self._hidden, self._members(folds), strict=True):
                for number, member in members:
                    seen = tokens if member is None else _only(tokens, place(self._mesh, member, "batch"))
                    mid, parts[number] = observe_layer(graphdef, state, seen, hidden, parts[number])
                    block_on_cpu(self._mesh, parts[number])
                attended.append(mid)
        self._attended = attended
        width = self._model.config.intermediate_sizes[i]
        found = [[np.asarray(to_host(part))[:width] for part in sums[:3]] for sums in parts]
        squares, totals, magnitudes = (functools.reduce(np.add, column) for column in zip(*found, strict=True))
        statistics = LayerStatistics(self._tokens, squares, totals, magnitudes, math.nan)
        check_finite(statistics, i)
        return statistics, [sums.gram for sums in parts if sums.gram is not None]

    def _members(self, folds: int) -> Iterator[list[tuple[int, NDArray[np.bool_] | None]]]:
        """Of each batch, the folds that have windows in it, and which `[B]`; None where that is all of them."""
        size = self._batches[0].shape[0]
        for start in range(0, len(self._batches) * size, size):
            numbers = np.minimum(np.arange(start, start + size) * max(folds, 1) // self._count, max(folds, 1) - 1)
            present = np.unique(numbers).tolist()
            yield [(number, None if len(present) == 1 else numbers == number) for number in present]

    def advance(
        self, i: int, down_proj: Array | None = None, *, gate_proj: Array | None = None, up_proj: Array | None = None
    ) -> float:
        """Moves the stream behind layer `i`, and returns the layer's influence (see `LayerStatistics`).

        Args:
          i: the index of the layer.
          down_proj: to use in place of the layer's own, `[D, F as stored]`; zero columns remove neurons.
          gate_proj: likewise, `[F as stored, D]`.
          up_proj: likewise, `[F as stored, D]`.
        """
        layer: DecoderLayer = self._model.layers[i]
        others = {"mlp.gate_proj": gate_proj, "mlp.up_proj": up_proj}
        layer = with_parameters(layer, {name: array for name, array in others.items() if array is not None})
        graphdef, state = nnx.split(layer)
        down = layer.mlp.down_proj[...] if down_proj is None else down_proj
        behind, influence = [], 0.0
        with use_mesh(self._mesh):
            for number, (tokens, hidden) in enumerate(zip(self._batches, self._hidden, strict=True)):
                seen = self._attended
                mid = _attend(graphdef, state, hidden) if seen is None else seen[number]
                out, turned = advance_layer(graphdef, state, down, tokens, hidden, mid)
                block_on_cpu(self._mesh, out)
                behind.append(out)
                influence += float(to_host(turned))
        self._hidden, self._attended = behind, None
        return influence / self._tokens

    def loss(self) -> float:
        """Mean negative log-likelihood of the tokens, each predicted within its window, behind the last layer."""
        total = predicted = 0.0
        with use_mesh(self._mesh):
            for tokens, hidden in zip(self._batches, self._hidden, strict=True):
                sums = _loss(self._model.config, _head(self._model), tokens, hidden)
                total, predicted = total + float(to_host(sums[0])), predicted + float(to_host(sums[1]))
        return total / predicted


def gram_matrices(model: Decoder, windows: NDArray[np.int32], *, batch_tokens: int = BATCH_TOKENS) -> Iterator[Array]:
    """The Gram matrix of the activations of each layer, `[F as stored, F as stored]` float32, divided over neurons.

    Each is computed when it is asked for, and only one exists at a time unless they are kept.

    Args:
      model: the model, on any mesh.
      windows: `[N, W]` int32 token ids, filled up with `packing.PADDING`.
      batch_tokens: how many tokens a replica computes at once.

    Raises:
      RequestError: as for `Stream`.
      OperationError: activations that are not finite, naming the layer.
    """
    for (gram,) in gram_folds(model, windows, 1, batch_tokens=batch_tokens):
        yield gram


def gram_folds(
    model: Decoder, windows: NDArray[np.int32], folds: int, *, batch_tokens: int = BATCH_TOKENS
) -> Iterator[list[Array]]:
    """As `gram_matrices`, of each of `folds` parts of the windows: those that follow each other are in the same one.

    So windows of one document, or of one text of several, are mostly in one fold, and what is fitted without it has
    not seen them.

    Raises:
      RequestError: as for `Stream`; fewer than two windows for each of several folds.
      OperationError: activations that are not finite, naming the layer.
    """
    stream = Stream(model, windows, batch_tokens=batch_tokens)
    for i in range(model.config.num_hidden_layers):
        _, grams = stream.observe(i, folds=folds)
        yield grams
        del grams
        stream.advance(i)


def check_folds(windows: int, folds: int) -> None:
    """Makes sure that each fold has two windows.

    Raises:
      RequestError: it has not.
    """
    if windows < 2 * folds:
        raise RequestError(
            f"{windows} calibration windows are too few to hold some of them out {folds} times; give at least "
            f"{2 * folds}: more `calibration_tokens`, or a smaller `sequence_length`"
        )


def batches(model: Decoder, windows: NDArray[np.int32], batch_tokens: int) -> Iterator[Array]:
    """The windows in batches `[B, W]` on the model's mesh, all of one shape, filled up with padding.

    Raises:
      RequestError: no windows, windows longer than the model's, or token ids outside its vocabulary.
    """
    config, mesh = model.config, mesh_of(model)
    if not windows.size or not (windows >= 0).any():
        raise RequestError("there is no calibration text")
    if windows.shape[1] > config.context_length:
        raise RequestError(
            f"calibration windows of {windows.shape[1]} tokens (`sequence_length`); the window of the model holds "
            f"{config.context_length}"
        )
    config.check_tokens(np.where(windows == PADDING, 0, windows))
    replicas = shape_of(mesh).data
    size = replicas * max(1, min(batch_tokens // windows.shape[1], -(-len(windows) // replicas)))
    windows = np.pad(windows, ((0, -len(windows) % size), (0, 0)), constant_values=PADDING)
    for start in range(0, len(windows), size):
        yield place(mesh, np.ascontiguousarray(windows[start : start + size], np.int32), "batch", None)


def _head(model: Decoder) -> dict[str, Array]:
    """The parameters behind the last layer, by name."""
    name = "embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    return {"norm.weight": model.norm.weight[...], name: getattr(model, name)[...]}


@functools.partial(jax.jit, static_argnums=0)
def _embed(config: ModelConfig, embedding: Array, tokens: Array) -> Array:
    return embed(config, embedding, jnp.maximum(tokens, 0))


@functools.partial(jax.jit, static_argnums=(0, 1))
def zero_sums(width: int, gram: bool) -> Sums:
    """Nothing added up yet, for `width` neurons; with a Gram matrix or without."""
    vectors = (constrain(jnp.zeros(width, jnp.float32), "neurons") for _ in range(3))
    matrix = constrain(jnp.zeros((width, width), jnp.float32), "neurons", None) if gram else None
    return Sums(next(vectors), next(vectors), next(vectors), matrix)


@jax.jit
def _only(tokens: Array, member: Array) -> Array:
    """The tokens `[B, W]` of the windows that are members `[B]`, the others as padding."""
    chex.assert_shape(member, tokens.shape[:1])
    return constrain(jnp.where(member[:, None], tokens, PADDING), "batch", None)


def _attended(layer: DecoderLayer, x: Array) -> Array:
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    attended, _ = layer.attend(x, positions)
    return constrain(attended, "batch", None, None)


@functools.partial(jax.jit, static_argnums=0)
def _attend(graphdef: Any, state: Any, x: Array) -> Array:
    return _attended(nnx.merge(graphdef, state), x)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def observe_layer(graphdef: Any, state: Any, tokens: Array, x: Array, sums: Sums) -> tuple[Array, Sums]:
    """The stream behind the attention of a layer, and its statistics added to `sums`, which is donated.

    Args:
      graphdef: of the layer, as `nnx.split` gives it.
      state: of the layer.
      tokens: `[B, W]` int32, negative where there are none.
      x: the residual stream in front of the layer, `[B, W, D]`.
      sums: so far.
    """
    layer: DecoderLayer = nnx.merge(graphdef, state)
    chex.assert_shape(x, (*tokens.shape, layer.mlp.down_proj[...].shape[0]))
    attended = _attended(layer, x)
    neurons = layer.mlp.neurons(layer.mlp_input(attended)).astype(jnp.float32)
    neurons = jnp.where(tokens[..., None] >= 0, neurons, 0).reshape(-1, neurons.shape[-1])
    neurons = constrain(neurons, "batch", "neurons")
    gram = sums.gram
    if gram is not None:
        products = jnp.einsum("tf,tg->fg", neurons, neurons, precision="highest")
        gram = constrain(gram + products, "neurons", None)
    added = Sums(
        constrain(sums.squares + jnp.sum(neurons**2, axis=0), "neurons"),
        constrain(sums.sums + jnp.sum(neurons, axis=0), "neurons"),
        constrain(sums.magnitudes + jnp.sum(jnp.abs(neurons), axis=0), "neurons"),
        gram,
    )
    return attended, added


@functools.partial(jax.jit, static_argnums=0)
def advance_layer(
    graphdef: Any, state: Any, down_proj: Array, tokens: Array, x: Array, attended: Array
) -> tuple[Array, Array]:
    """The stream behind the layer, and the sum over tokens of 1 - cos(x, it)."""
    chex.assert_shape([x, attended], (*tokens.shape, down_proj.shape[0]))
    layer: DecoderLayer = nnx.merge(graphdef, state)
    layer.mlp.down_proj[...] = down_proj
    out = constrain(layer.feed_forward(attended), "batch", None, None)
    before, behind = x.astype(jnp.float32), out.astype(jnp.float32)
    norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(behind, axis=-1)
    turned = 1 - jnp.sum(before * behind, axis=-1) / jnp.maximum(norms, np.finfo(np.float32).tiny)
    return out, constrain(jnp.sum(jnp.where(tokens >= 0, turned, 0)))


@functools.partial(jax.jit, static_argnums=0)
def _loss(config: ModelConfig, head: dict[str, Array], tokens: Array, x: Array) -> tuple[Array, Array]:
    """Sum of the negative log-likelihoods of the predicted tokens, and how many there are."""
    losses, predicts = _losses(config, head, tokens, x)
    return constrain(jnp.sum(losses)), constrain(jnp.sum(predicts.astype(jnp.float32)))


def _losses(config: ModelConfig, head: dict[str, Array], tokens: Array, x: Array) -> tuple[Array, Array]:
    """Negative log-likelihoods `[B]` of each window, and which of its positions predict a token, `[B, W]`."""
    predicts = jnp.pad(tokens[:, 1:] >= 0, ((0, 0), (0, 1)))
    targets = jnp.roll(tokens, -1, axis=1)
    model = with_parameters(abstract_model(config), head)

    def losses(hidden: Array, targets: Array, predicts: Array) -> Array:
        return jnp.sum(jnp.where(predicts, cross_entropy(model.logits(hidden), targets), 0), axis=1)

    arrays = model.norm(x), targets, predicts
    return sum_over_positions(losses, *arrays, most_tokens=_LOGITS_TOKENS), predicts


# ----------------------------------------------------------------------------------------------------- sensitivity


def sensitivities(
    model: Decoder,
    windows: NDArray[np.int32],
    *,
    of_entropy: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    on_windows: Callable[[int], None] | None = None,
) -> list[NDArray[np.float32]]:
    """First-order effect of each neuron on the loss (Molchanov et al., arXiv 1611.06440), for each layer `[F]` float32.

    The mean over windows of `|sum over its tokens of a dL/da|`, with a the neuron's activation and L the sum of the
    window's negative log-likelihoods: the gradient by a mask over neurons, at 1. Each batch goes forward through the
    layers, whose inputs are kept, and back.

    Args:
      model: the model, on any mesh.
      windows: `[N, W]` int32 token ids, filled up with `packing.PADDING`.
      of_entropy: L is the sum of the entropies of what the model predicts behind each token, which looks at no labels
        (arXiv 2603.08083).
      batch_tokens: how many tokens a replica computes at once.
      on_windows: called with how many windows are done.

    Raises:
      RequestError: as for `Stream`.
    """
    config, mesh = model.config, mesh_of(model)
    totals: list[Any] = [None] * config.num_hidden_layers
    parts = [nnx.split(layer) for layer in model.layers]
    with use_mesh(mesh):
        for number, tokens in enumerate(batches(model, windows, batch_tokens), start=1):
            inputs = [_embed(model.config, model.embed_tokens[...], tokens)]
            for graphdef, state in parts:
                inputs.append(_forward(graphdef, state, inputs[-1]))
                block_on_cpu(mesh, inputs[-1])
            gradient = _loss_gradient(config, of_entropy, _head(model), tokens, inputs.pop())
            block_on_cpu(mesh, gradient)
            for i, (graphdef, state) in reversed(list(enumerate(parts))):
                gradient, added = backward_layer(graphdef, state, inputs.pop(), gradient)
                block_on_cpu(mesh, gradient)
                totals[i] = added if totals[i] is None else _add(totals[i], added)
            if on_windows:
                on_windows(min(number * tokens.shape[0], len(windows)))
    return [
        (np.asarray(to_host(total))[:width] / len(windows)).astype(np.float32)
        for total, width in zip(totals, config.intermediate_sizes, strict=True)
    ]


def _run(layer: DecoderLayer, x: Array, mask: Array | None) -> Array:
    return constrain(layer.feed_forward(_attended(layer, x), mask), "batch", None, None)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: Any, state: Any, x: Array) -> Array:
    return _run(nnx.merge(graphdef, state), x, None)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss_gradient(config: ModelConfig, of_entropy: bool, head: dict[str, Array], tokens: Array, x: Array) -> Array:
    def total(x: Array) -> Array:
        return jnp.sum(_entropies(config, head, tokens, x) if of_entropy else _losses(config, head, tokens, x)[0])

    gradient: Array = jax.grad(total)(x)
    return gradient


def _entropies(config: ModelConfig, head: dict[str, Array], tokens: Array, x: Array) -> Array:
    """Sums `[B]` of the entropies of what is predicted behind each token of a window."""
    model = with_parameters(abstract_model(config), head)

    def entropies(hidden: Array, is_token: Array) -> Array:
        return jnp.sum(jnp.where(is_token, entropy(model.logits(hidden)), 0), axis=1)

    return sum_over_positions(entropies, model.norm(x), tokens >= 0, most_tokens=_LOGITS_TOKENS)


@functools.partial(jax.jit, static_argnums=0)
def backward_layer(graphdef: Any, state: Any, x: Array, gradient: Array) -> tuple[Array, Array]:
    """The gradient by the layer's input, and the sums over windows of the absolute gradients by its mask, `[F]`."""
    chex.assert_equal_shape([x, gradient])
    width = state["mlp"]["gate_proj"][...].shape[0]
    mask = constrain(jnp.ones((x.shape[0], 1, width), x.dtype), "batch", None, "neurons")
    _, pull = jax.vjp(lambda x, mask: _run(nnx.merge(graphdef, state), x, mask), x, mask)
    by_input, by_mask = pull(gradient)
    return by_input, constrain(jnp.sum(jnp.abs(by_mask[:, 0].astype(jnp.float32)), axis=0), "neurons")


@jax.jit
def _add(total: Array, added: Array) -> Array:
    return total + added
