"""Equations with positive definite matrices, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gluprune_jax.pruning.cholesky import BLOCK, solve


@pytest.mark.parametrize("n", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 7])
@pytest.mark.parametrize("m", [1, 9])
def test_it_solves(n: int, m: int) -> None:
    rng = np.random.default_rng(n)
    a = rng.standard_normal((n, 2 * n))
    matrix, right = a @ a.T / n + 0.1 * np.eye(n), rng.standard_normal((n, m))
    found = jax.jit(solve)(jnp.asarray(matrix, jnp.float32), jnp.asarray(right, jnp.float32))
    np.testing.assert_allclose(found, np.linalg.solve(matrix, right), rtol=2e-3, atol=2e-4)


def test_only_the_lower_half_is_looked_at() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((300, 600))
    matrix, right = (a @ a.T / 300).astype(np.float32), rng.standard_normal((300, 4)).astype(np.float32)
    expected = solve(jnp.asarray(matrix), jnp.asarray(right))
    np.testing.assert_allclose(solve(jnp.asarray(np.tril(matrix)), jnp.asarray(right)), expected, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_factored_is_no_number() -> None:
    matrix = jnp.eye(300).at[290, 290].set(-1.0)
    assert not np.isfinite(np.asarray(solve(matrix, jnp.ones((300, 2))))).all()
