"""SPD: inverse and root of many small symmetric positive definite matrices.

In plain array operations, vectorised over the batch, which is behind: (P, P, ...). The library
routines call LAPACK once a matrix; two of their batched calls at a time wait for each other for
ever when the processor has few cores (seen with jaxlib 0.10 on two), and the fit makes thousands.
Matrices come with a unit diagonal, which keeps the elimination accurate without pivots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.inference.lanes import behind, sum_of


def rounding_floor(matrix: jax.Array) -> float:
    """Pivot below which a matrix with unit diagonal decides nothing."""
    return 4.0 * float(jnp.finfo(matrix.dtype).eps) * matrix.shape[0]


def diagonal(matrix: jax.Array) -> jax.Array:
    """(P, ...) of matrices (P, P, ...)."""
    index = np.arange(matrix.shape[0])
    return matrix[index, index]


def diagonal_matrix(values: jax.Array) -> jax.Array:
    """(P, P, ...) of diagonals (P, ...)."""
    eye = np.eye(values.shape[0], dtype=bool)
    zero = jnp.zeros((), values.dtype)
    return jnp.where(behind(eye, values.ndim + 1), values[:, None], zero)


def times(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """(P, ...) products of matrices (P, P, ...) and vectors."""
    return sum_of(matrix[:, q] * vector[q][None] for q in range(len(vector)))


def inverse(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverse and log determinant by symmetric Gauss-Jordan elimination.

    With `c` row `k` of what earlier steps left and `p = c_k` its pivot, step `k` is

        s_j = c_j / sqrt(p),  s_k = (p - 1) / sqrt(p),  A <- A - s s^T,

    and `P` of them turn `A` into `2 I - A^-1`. No step adds to the diagonal, so that of
    the inverse is 1 at least. Pivots are held above the rounding floor: a singular matrix
    gets a large inverse, finite and positive semi-definite.

    Args:
      matrix: (P, P, ...), symmetric positive semi-definite with unit diagonal.

    Returns:
      (P, P, ...), exactly symmetric if `matrix` is, and (...,).

    Example:
      >>> a = jnp.array([[1.0, 0.5], [0.5, 1.0]])
      >>> (3 * inverse(a)[0]).round(4).tolist(), round(float(jnp.exp(inverse(a)[1])), 4)
      ([[4.0, -2.0], [-2.0, 4.0]], 0.75)
    """
    size = matrix.shape[0]
    floor = rounding_floor(matrix)
    place = behind(np.arange(size), matrix.ndim - 1)

    def column(k: jax.Array | int, a: jax.Array, pivots: jax.Array) -> jax.Array:
        c = jax.lax.dynamic_index_in_dim(a, k, keepdims=False)
        told = jax.lax.dynamic_index_in_dim(pivots, k)
        p = jnp.maximum(told, floor)
        # c_j^2 <= p_k p_j but for rounding, which a pivot near the floor would multiply from
        # step to step. Rows done already hold -A^-1 c, whose squares are below
        # 1 / p where the data tell them.
        bound = jnp.sqrt(jax.lax.stop_gradient(jnp.maximum(told, 0) * jnp.maximum(pivots, 0)))
        bound = jnp.where(place > k, bound, 1 / floor)
        return jnp.where(place == k, p - 1, jnp.clip(c, -bound, bound)) * jax.lax.rsqrt(p)

    def eliminate(k: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        a, pivots, s = state
        a = a - s[:, None] * s[None]
        pivots = jnp.where(place > k, pivots - s * s, pivots)
        # A step ahead: XLA keeps what a loop carries, else it works out `s` for every pair.
        return a, pivots, column(k + 1, a, pivots)

    pivots = diagonal(matrix)
    start = (matrix, pivots, column(0, matrix, pivots))
    a, pivots, _ = jax.lax.fori_loop(0, size, eliminate, start)
    log_determinant = jnp.log(jnp.maximum(pivots, floor)).sum(0)
    return diagonal_matrix(jnp.full_like(pivots, 2)) - a, log_determinant


def cholesky(matrix: jax.Array) -> jax.Array:
    """Lower triangular root `L`, `L L^T = matrix`.

    Args:
      matrix: (P, P, ...), symmetric positive semi-definite with unit diagonal.

    Returns:
      (P, P, ...); columns of pivots below the rounding floor are zero.

    Example:
      >>> root = cholesky(jnp.array([[1.0, 0.6], [0.6, 1.0]]))
      >>> [round(float(value), 4) for value in root.ravel()]
      [1.0, 0.0, 0.6, 0.8]
    """
    size = matrix.shape[0]
    floor = rounding_floor(matrix)
    place = behind(np.arange(size), matrix.ndim - 1)

    def eliminate(k: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left, root = state
        col = jax.lax.dynamic_index_in_dim(left, k, keepdims=False)
        pivot = jax.lax.dynamic_index_in_dim(col, k)
        scale = jnp.where(pivot > floor, jax.lax.rsqrt(jnp.maximum(pivot, floor)), 0)
        col = jnp.where(place >= k, col, 0) * scale
        left = left - col[:, None] * col[None]
        return left, root + col[:, None] * (place == k).astype(left.dtype)[None]

    return jax.lax.fori_loop(0, size, eliminate, (matrix, jnp.zeros_like(matrix)))[1]


def triangular_inverse(root: jax.Array) -> jax.Array:
    """Inverse of lower triangular matrices (P, P, ...); where a diagonal is zero, so is its row.

    Example:
      >>> triangular_inverse(jnp.array([[2.0, 0.0], [1.0, 1.0]])).tolist()
      [[0.5, 0.0], [-0.5, 1.0]]
    """
    size = root.shape[0]
    place = behind(np.arange(size), root.ndim - 1)

    def substitute(k: jax.Array, done: jax.Array) -> jax.Array:
        col = jax.lax.dynamic_index_in_dim(root, k, 1, keepdims=False)
        pivot = jax.lax.dynamic_index_in_dim(col, k)
        row = jax.lax.dynamic_index_in_dim(done, k, keepdims=False)
        row = jnp.where(pivot > 0, row / jnp.where(pivot > 0, pivot, 1), 0)
        left = done - jnp.where(place > k, col, 0)[:, None] * row[None]
        return jnp.where(behind(np.arange(size), root.ndim) == k, row[None], left)

    return jax.lax.fori_loop(0, size, substitute, diagonal_matrix(jnp.ones_like(diagonal(root))))
