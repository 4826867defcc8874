"""Solves equations with a positive definite matrix, in blocks of a fixed size.

`jax.scipy.linalg.cho_solve` does the same. For TPUs XLA unrolls it: compiling takes 19 s at 1,024 rows, 72 s at 2,048,
more than eight minutes at 8,192. These loops take 10 to 11 s at any of them (2 CPU cores).
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

BLOCK = 256


def solve(matrix: Array, right: Array) -> Array:
    """`matrix^-1 right` by a Cholesky factorisation, float32.

    Args:
      matrix: `[n, n]` float32, symmetric and positive definite; only its lower half is looked at.
      right: `[n, m]` float32.

    Returns:
      `[n, m]` float32; not finite where the matrix could not be factored.
    """
    n = matrix.shape[0]
    chex.assert_shape([matrix, right], [(n, n), (n, None)])
    chex.assert_type([matrix, right], jnp.float32)
    size = min(BLOCK, n)
    blocks, padding = -(-n // size), -n % size
    # Rows that are filled up belong to a unit matrix.
    matrix = jnp.pad(matrix, (0, padding)) + jnp.diag((jnp.arange(n + padding) >= n).astype(jnp.float32))
    right = jnp.pad(right, ((0, padding), (0, 0)))
    rows = jnp.arange(n + padding)[:, None]
    unit = jnp.eye(size, dtype=jnp.float32)

    def product(a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, precision="highest")

    def down(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """Factors block column j, and takes what it explains out of the rest of the matrix and of the right side."""
        matrix, right, inverses = state
        start = j * size
        panel = jax.lax.dynamic_slice_in_dim(matrix, start, size, axis=1)
        block = jax.lax.dynamic_slice_in_dim(panel, start, size, axis=0)
        factor = jnp.linalg.cholesky(block, symmetrize_input=False)
        inverse = jax.scipy.linalg.solve_triangular(factor, unit, lower=True)
        below = jnp.where(rows >= start + size, product(panel, inverse.T), 0)
        solved = product(inverse, jax.lax.dynamic_slice_in_dim(right, start, size))
        right = jax.lax.dynamic_update_slice_in_dim(right - product(below, solved), solved, start, axis=0)
        matrix = jax.lax.dynamic_update_slice_in_dim(matrix - product(below, below.T), below, start, axis=1)
        return matrix, right, inverses.at[j].set(inverse)

    def up(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        matrix, right, inverses = state
        j = blocks - 1 - i
        start = j * size
        solved = product(inverses[j].T, jax.lax.dynamic_slice_in_dim(right, start, size))
        row = jax.lax.dynamic_slice_in_dim(matrix, start, size, axis=0)
        before = jnp.where(jnp.arange(n + padding) < start, row, 0)
        right = jax.lax.dynamic_update_slice_in_dim(right - product(before.T, solved), solved, start, axis=0)
        return matrix, right, inverses

    state = matrix, right, jnp.zeros((blocks, size, size), jnp.float32)
    _, right, _ = jax.lax.fori_loop(0, blocks, up, jax.lax.fori_loop(0, blocks, down, state))
    return right[:n]
