"""Losses, optimiser and the one compiled step of recovery training.

The losses, each a mean over the predicted tokens, and summed with their weights:

    kl      temperature^2 x KL(teacher || student) of the next-token distributions at a temperature: knowledge
            distillation (arXiv 1503.02531); the factor keeps the size of gradients when the temperature changes
    ce      cross-entropy of the next token: plain language modelling
    hidden  squared distance of the hidden states behind each layer over the squared norm of the teacher's, a mean over
            layers (hidden-state distillation, as in arXiv 2407.14679)

Memory: of each layer only the input is kept for the backward pass, the rest is computed again (`jax.checkpoint`, arXiv
1604.06174), and so are the logits, which exist for `LOGITS_TOKENS` tokens at a time.

Array letters: A micro-batches of a step, B rows of one, T tokens of a row, D hidden size, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from gluprune_jax.errors import RequestError
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder, DecoderLayer, embed
from gluprune_jax.models.loss import cross_entropy, sum_over_positions
from gluprune_jax.models.parameters import Parameters, abstract_model, with_parameters
from gluprune_jax.parallel.mesh import place, shape_of
from gluprune_jax.parallel.sharding import constrain
from gluprune_jax.training.trainable import Trainable, weights

# Tokens of a replica whose logits exist at the same time, float32, of student and teacher.
LOGITS_TOKENS = 512


Terms = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
      kl: weight of the distillation from the teacher's next-token distribution.
      ce: weight of the cross-entropy.
      hidden: weight of the distance of the hidden states.
      temperature: at which the distributions of `kl` are compared.
    """

    kl: float = 1.0
    ce: float = 0.0
    hidden: float = 0.0
    temperature: float = 1.0

    def check(self, student: ModelConfig, teacher: ModelConfig | None) -> None:
        """Makes sure that these models can be trained so.

        Raises:
          RequestError: a weight or temperature that makes no sense, a term that needs a teacher where there is none,
            or a teacher that the student cannot be compared with.
        """
        parts = {"`kl_weight`": self.kl, "`ce_weight`": self.ce, "`hidden_weight`": self.hidden}
        for name, value in parts.items():
            if not 0 <= value < math.inf:
                raise RequestError(f"{name} is {value:g}; a weight is a finite number from 0")
        if not any(parts.values()):
            raise RequestError("`kl_weight`, `ce_weight` and `hidden_weight` are all 0, so nothing would be trained")
        if not 0 < self.temperature < math.inf:
            raise RequestError(f"`temperature` is {self.temperature:g}; it must be a finite number above 0")
        if teacher is None:
            if self.kl or self.hidden:
                name = "`kl_weight`" if self.kl else "`hidden_weight`"
                raise RequestError(f"{name} compares with a teacher; give `teacher` MODEL, or leave it out")
            return
        if teacher.vocab_size != student.vocab_size:
            raise RequestError(
                f"the teacher has a vocabulary of {teacher.vocab_size} tokens and the model one of "
                f"{student.vocab_size}; distillation needs the same one: give the model that was pruned as `teacher`"
            )
        shapes = [(config.num_hidden_layers, config.hidden_size) for config in (student, teacher)]
        if self.hidden and shapes[0] != shapes[1]:
            raise RequestError(
                f"`hidden_weight` compares layer by layer, and the model has {shapes[0][0]} layers of hidden size "
                f"{shapes[0][1]}, the teacher {shapes[1][0]} of {shapes[1][1]}; leave it out for this teacher"
            )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The optimiser, AdamW (arXiv 1711.05101), and its learning rate: linear warm-up, then a cosine down to 0.

    Attributes:
      steps: how many there are in all.
      learning_rate: at its highest.
      warmup_steps: until then.
      weight_decay: of matrices; the gains of the norms and biases have none.
      clip: the global norm that gradients are scaled down to where theirs is larger.
    """

    steps: int
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0

    def check(self) -> None:
        """Makes sure that the numbers make sense.

        Raises:
          RequestError: one does not.
        """
        if self.steps < 1:
            raise RequestError(f"`steps` is {self.steps}; it must be at least 1")
        if not 0 <= self.warmup_steps <= self.steps:
            raise RequestError(
                f"`warmup_steps` is {self.warmup_steps}; it must lie between 0 and the {self.steps} steps"
            )
        for name, value, above in (
            ("`learning_rate`", self.learning_rate, True),
            ("`clip`", self.clip, True),
            ("`weight_decay`", self.weight_decay, False),
        ):
            if not (value > 0 if above else value >= 0) or value == math.inf:
                raise RequestError(f"{name} is {value:g}; it must be a finite number {'above' if above else 'from'} 0")

    def rate(self, step: Any) -> Any:
        """The learning rate of a step, counted from 0: the first one already learns."""
        rise = (step + 1) / max(self.warmup_steps, 1)
        done = jnp.maximum(step - self.warmup_steps, 0) / max(self.steps - self.warmup_steps, 1)
        return self.learning_rate * jnp.minimum(rise, 0.5 * (1 + jnp.cos(math.pi * done)))

    def optimizer(self) -> optax.GradientTransformation:
        """The optimiser of these numbers."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(self.rate, b1=0.9, b2=0.95, weight_decay=self.weight_decay, mask=_is_decayed),
        )


def _is_decayed(parameters: Parameters) -> dict[str, bool]:
    # By name too: the biases of heads are an array of two axes.
    return {name: array.ndim > 1 and not name.endswith("_bias") for name, array in parameters.items()}


class TrainState(NamedTuple):
    """What a step changes: what is trained, in float32, and the optimiser's state."""

    trained: Parameters
    optimizer: Any


def new_state(trained: Parameters, schedule: Schedule, mesh: Mesh | None) -> TrainState:
    """The state before the first step; the optimiser's moments lie where the parameters do."""

    def placed(array: Array) -> Array:
        if mesh is None or isinstance(array.sharding, NamedSharding):
            # Committed to where it is, as what a step gives is: else the second step would be compiled again.
            return cast("Array", jax.device_put(array, array.sharding))
        return cast("Array", place(mesh, np.asarray(array)))

    state: TrainState = jax.tree.map(placed, TrainState(trained, schedule.optimizer().init(trained)))
    return state


# ----------------------------------------------------------------------------------------------------- the step

Step = Callable[[TrainState, Parameters, Parameters, Array], tuple[TrainState, Terms]]


def compile_step(
    state: TrainState,
    student: ModelConfig,
    teacher: ModelConfig | None,
    objective: Objective,
    schedule: Schedule,
    trainable: Trainable,
    compute_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> Step:
    """The jitted step: `step(state, frozen, teacher parameters, tokens) -> state, terms`.

    Call it with the mesh as the current one (`gluprune_jax.parallel.mesh.use_mesh`). The state that goes in is donated.
    Tokens are `[A, B, T]` int32, with `packing.PADDING` where there are none: gradients are summed over the A
    micro-batches, and all tokens of a step weigh the same, so that A micro-batches of B rows do what one of A x B does.

    The terms are float32 scalars: `loss`, those of the objective (see the module), and `grad_norm` before clipping.

    Args:
      state: as `new_state` gives it; shapes and shardings count.
      student: the model that is trained.
      teacher: None without one; then the teacher's parameters are an empty dictionary.
      objective: the losses.
      schedule: the optimiser.
      trainable: what is trained.
      compute_dtype: of activations and of the weights where they are multiplied.
      mesh: that of the parameters.
    """
    optimizer = schedule.optimizer()
    chunk = LOGITS_TOKENS * shape_of(mesh).data

    def step(state: TrainState, frozen: Parameters, teacher_params: Parameters, tokens: Array) -> Any:
        predicted = jnp.maximum(jnp.sum(tokens[:, :, 1:] >= 0), 1).astype(jnp.float32)

        def loss(trained: Parameters, tokens: Array) -> tuple[Array, Terms]:
            params = trained, frozen, trainable.scale
            sums = loss_sums(student, params, teacher, teacher_params, objective, tokens, compute_dtype, chunk)
            terms = {name: value / predicted for name, value in sums.items()}
            total = sum((getattr(objective, name) * value for name, value in terms.items()), jnp.float32(0))
            return total, terms | {"loss": total}

        gradients = jax.grad(loss, has_aux=True)
        if tokens.shape[0] == 1:
            grads, terms = gradients(state.trained, tokens[0])
        else:

            def accumulate(total: Parameters, tokens: Array) -> tuple[Parameters, Terms]:
                grads, terms = gradients(state.trained, tokens)
                return jax.tree.map(jnp.add, total, grads), terms

            grads, parts = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, state.trained), tokens)
            terms = {name: jnp.sum(part) for name, part in parts.items()}
        updates, moments = optimizer.update(grads, state.optimizer, state.trained)
        terms["grad_norm"] = optax.tree.norm(grads)
        trained: Any = optax.apply_updates(state.trained, updates)
        return TrainState(trained, moments), terms

    shardings = jax.tree.map(lambda array: array.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def loss_sums(
    student: ModelConfig,
    params: tuple[Mapping[str, Array], Mapping[str, Array], float],
    teacher: ModelConfig | None,
    teacher_params: Mapping[str, Array],
    objective: Objective,
    tokens: Array,
    compute_dtype: DTypeLike = jnp.float32,
    chunk: int = LOGITS_TOKENS,
) -> Terms:
    """The terms of the objective, summed over the predicted tokens of one micro-batch.

    Args:
      student: its config.
      params: its trained and frozen parameters, and the scale of adapters, as `trainable.weights` takes them.
      teacher: its config, if there is one.
      teacher_params: its parameters; no gradient goes to them.
      objective: `kl` is computed where there is a teacher, `hidden` where it has a weight, and `ce` always.
      tokens: `[B, T]` int32, negative where there are none.
      compute_dtype: of the activations.
      chunk: how many tokens' logits may exist at a time.

    Returns:
      float32 scalars.
    """
    there = tokens >= 0
    tokens = jnp.where(there, tokens, 0)
    predicts = jnp.pad(there[:, 1:], ((0, 0), (0, 1)))  # whether a next token is there
    targets = jnp.roll(tokens, -1, axis=1)

    learner = _Forward(student, params, compute_dtype)
    model, x = learner.model, learner.embed(tokens)
    reference = None if teacher is None else _Forward(teacher, ({}, teacher_params, 1.0), compute_dtype)
    y = None if reference is None else reference.embed(tokens)
    sums: Terms = {}
    if objective.hidden:
        assert reference is not None
        distances = []
        for i in range(student.num_hidden_layers):
            x, y = learner.layer(i, x), reference.layer(i, y)
            distances.append(jnp.sum(relative_distance(x, y) * predicts))
        sums["hidden"] = sum(distances, jnp.float32(0)) / len(distances)
    else:
        for i in range(student.num_hidden_layers):
            x = learner.layer(i, x)
        if reference is not None and teacher is not None:
            for i in range(teacher.num_hidden_layers):
                y = reference.layer(i, y)

    inputs = [model.norm(x), targets, predicts]
    if reference is not None and y is not None:
        inputs.append(jax.lax.stop_gradient(reference.model.norm(y)))

    def terms_of(hidden: Array, targets: Array, predicts: Array, reference_hidden: Array | None = None) -> Terms:
        logits = model.logits(hidden)
        terms = {"ce": jnp.sum(cross_entropy(logits, targets) * predicts)}
        if reference is not None and reference_hidden is not None:
            expected = jax.lax.stop_gradient(reference.model.logits(reference_hidden))
            terms["kl"] = jnp.sum(kl_divergence(expected, logits, objective.temperature) * predicts)
        return terms

    return sums | sum_over_positions(terms_of, *inputs, most_tokens=chunk)


def kl_divergence(teacher: Array, student: Array, temperature: float) -> Array:
    """`temperature^2 x KL(teacher || student)` `[...]` of logits `[..., V]` at a temperature, float32."""
    expected, log_probs = (jax.nn.log_softmax(logits / temperature, axis=-1) for logits in (teacher, student))
    return temperature**2 * jnp.sum(jnp.exp(expected) * (expected - log_probs), axis=-1)


def relative_distance(student: Array, teacher: Array) -> Array:
    """`|student - teacher|^2 / |teacher|^2` `[...]` of hidden states `[..., D]`, float32."""
    x, y = student.astype(jnp.float32), jax.lax.stop_gradient(teacher).astype(jnp.float32)
    return jnp.sum((x - y) ** 2, axis=-1) / (jnp.sum(y**2, axis=-1) + 1e-12)


# -------------------------------------------------------------------------------------------------- the forward


class _Forward:
    """The model of `params`, layer by layer, each computed again in the backward pass."""

    def __init__(
        self, config: ModelConfig, params: tuple[Mapping[str, Array], Mapping[str, Array], float], dtype: DTypeLike
    ):
        self._abstract, self._dtype = abstract_model(config), dtype
        self._trained, self._frozen, self._scale = params
        above = weights(_outside_layers(self._trained), _outside_layers(self._frozen), self._scale)
        self.model: Decoder = with_parameters(self._abstract, above)

    def embed(self, tokens: Array) -> Array:
        """The residual stream `[B, T, D]` before the first layer, in the compute dtype, which all else follows."""
        return embed(self.model.config, self.model.embed_tokens[...], tokens, self._dtype)

    def layer(self, i: int, x: Array | None) -> Array:
        """The residual stream `[B, T, D]` behind layer `i`."""
        assert x is not None
        abstract: DecoderLayer = self._abstract.layers[i]

        # Master weights are cast and adapters added within, so that the results are not kept either.
        @jax.checkpoint
        def run(trained: Parameters, frozen: Parameters, x: Array) -> Array:
            layer = with_parameters(abstract, weights(trained, frozen, self._scale))
            positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
            out, _ = layer(x, positions, None, (), None)
            return constrain(out, "batch", None, None)

        prefix = f"layers.{i}."
        behind: Array = run(_below(self._trained, prefix), _below(self._frozen, prefix), x)
        return behind


def _outside_layers(parameters: Mapping[str, Array]) -> Parameters:
    return {name: array for name, array in parameters.items() if not name.startswith("layers.")}


def _below(parameters: Mapping[str, Array], prefix: str) -> Parameters:
    return {name.removeprefix(prefix): array for name, array in parameters.items() if name.startswith(prefix)}
