"""Rope, losses and criteria give the same compiled or not; arrays of a wrong shape or kind stop where they enter."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from gluprune_jax.models.attention import causal_attention
from gluprune_jax.models.config import LayerAttention, ModelConfig, Rope
from gluprune_jax.models.loss import cross_entropy, entropy, sum_over_positions
from gluprune_jax.models.rope import rotate
from gluprune_jax.pruning.cholesky import solve
from gluprune_jax.pruning.criteria import CRITERIA, STATISTICS, WEIGHT_CRITERIA, inputs_of
from gluprune_jax.pruning.least_squares import least_squares
from gluprune_jax.pruning.reconstruction import make_start
from gluprune_jax.pruning.scores import MLPWeights, select_neurons
from gluprune_jax.pruning.slicing import slice_neurons

ROPE = Rope(10000.0)
CONFIG = ModelConfig(11, 8, (12,), 4, 2, 4, 64, rms_norm_eps=1e-5, attention=(LayerAttention(ROPE),))
F, D = 12, 8


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def inputs(criterion: str) -> list[Any]:
    """What a criterion looks at, for a layer of F neurons."""
    known = {"gate": normal(F, D), "up": normal(F, D, seed=1), "down": normal(D, F, seed=2), "key": jax.random.key(0)}
    vectors = {name: jnp.abs(normal(F, seed=3)) for name in STATISTICS}
    return [{**known, **vectors}[name] for name in inputs_of(CRITERIA[criterion])]


class Variants(chex.TestCase):
    """Each function with `jax.jit` and without."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*CRITERIA)
    def test_criteria_are_the_same(self, criterion: str) -> None:
        scores = self.variant(CRITERIA[criterion])(*inputs(criterion))
        chex.assert_shape(scores, (F,))
        chex.assert_type(scores, jnp.float32)
        # Those of weights alone have the same bits; a quotient (hybrid) may be fused with what follows it.
        tolerance = 0 if criterion in WEIGHT_CRITERIA else 1e-6
        np.testing.assert_allclose(scores, CRITERIA[criterion](*inputs(criterion)), rtol=tolerance, atol=0)

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_entropy_is_the_mean_of_the_losses(self) -> None:
        logits = normal(2, 3, 5)
        found = self.variant(entropy)(logits)
        probabilities = np.asarray(jax.nn.softmax(logits))
        losses = [np.asarray(cross_entropy(logits, jnp.full((2, 3), target))) for target in range(5)]
        np.testing.assert_allclose(found, np.sum(probabilities * np.stack(losses, -1), -1), rtol=1e-5)
        np.testing.assert_allclose(self.variant(entropy)(jnp.zeros((4, 8))), np.log(8), rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_a_loss_is_the_log_of_a_softmax(self) -> None:
        logits, targets = normal(2, 3, 5), jnp.array([[0, 4, 2], [1, 1, 3]])
        losses = self.variant(cross_entropy)(logits, targets)
        chex.assert_shape(losses, (2, 3))
        expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(targets)[..., None], -1)
        np.testing.assert_allclose(losses, expected[..., 0], rtol=1e-6, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(1, 4, 14, 100)
    def test_a_sum_does_not_depend_on_its_chunks(self, most_tokens: int) -> None:
        values, weights = normal(2, 7, 3), jnp.ones((2, 7))

        def total(values: jax.Array, weights: jax.Array) -> jax.Array:
            return sum_over_positions(
                lambda v, w: jnp.sum(v * w[..., None], axis=1), values, weights, most_tokens=most_tokens
            )

        np.testing.assert_allclose(self.variant(total)(values, weights), jnp.sum(values, axis=1), rtol=1e-5, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_a_rotation_keeps_lengths_and_depends_on_distances_alone(self) -> None:
        rotated = self.variant(lambda x, positions: rotate(x, positions, ROPE))
        x, y = normal(1, 6, 4, 4), normal(1, 6, 4, 4, seed=1)
        positions = jnp.arange(6)[None]
        np.testing.assert_allclose(
            jnp.linalg.norm(rotated(x, positions), axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
        )
        products = [jnp.sum(rotated(x, positions + a) * rotated(y, positions + a + 3), -1) for a in (0, 17)]
        np.testing.assert_allclose(*products, rtol=1e-4, atol=1e-5)


WRONG: dict[str, Callable[[], object]] = {
    "gate and up of two layers": lambda: CRITERIA["ppm"](normal(F, D), normal(F + 1, D)),
    "whole numbers for weights": lambda: CRITERIA["l2"](*2 * [jnp.ones((F, D), jnp.int32)]),
    "down the wrong way round": lambda: CRITERIA["hybrid"](*2 * [normal(F, D)], normal(F, D), normal(F)),
    "statistics of another layer": lambda: CRITERIA["wanda"](normal(D, F), normal(F + 1)),
    "targets of other positions": lambda: cross_entropy(normal(2, 3, 5), jnp.zeros((3, 2), jnp.int32)),
    "targets that are no ids": lambda: cross_entropy(normal(2, 3, 5), normal(2, 3)),
    "positions of other tokens": lambda: rotate(normal(1, 6, 4, 6), jnp.arange(5)[None], ROPE),
    "keys of other heads": lambda: causal_attention(normal(1, 6, 2, 2, 4), *2 * [normal(1, 6, 3, 4)]),
    "a Gram matrix of another width": lambda: least_squares(
        normal(F + 1, F + 1), normal(D, F), jnp.ones(F), jnp.float32(1)
    ),
    "a mask of another layer": lambda: make_start(MLPWeights(*2 * [normal(F, D)], normal(D, F)), jnp.ones(F + 1)),
    "a matrix that is not square": lambda: solve(normal(F, D), normal(F, D)),
    "neurons that are no indices": lambda: slice_neurons(0, 0, normal(F, D), normal(3)),
    "scores of several layers": lambda: select_neurons(normal(2, F), 3),
}


@pytest.mark.parametrize("what", WRONG)
def test_arrays_that_do_not_belong_together_stop_where_they_enter(what: str) -> None:
    with pytest.raises(AssertionError, match="ssertion"):
        WRONG[what]()
