"""SPD: inverse and root of many small symmetric positive definite matrices.

In plain array operations, vectorised over the batch. The library routines call LAPACK
once a matrix; two of their batched calls at a time wait for each other for ever when the
processor has few cores (seen with jaxlib 0.10 on two), and the fit makes thousands.
Matrices come with a unit diagonal, which keeps the elimination accurate without pivots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rounding_floor(matrix: jax.Array) -> float:
    """Pivot below which a matrix with unit diagonal decides nothing."""
    return 4.0 * float(jnp.finfo(matrix.dtype).eps) * matrix.shape[-1]


def inverse(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverse and log determinant by Gauss-Jordan elimination.

    Pivots are held above the rounding floor: a singular matrix gets a large inverse.

    Args:
      matrix: (..., P, P), symmetric positive definite with unit diagonal.

    Returns:
      (..., P, P) and (...,).

    Example:
      >>> a = jnp.array([[1.0, 0.5], [0.5, 1.0]])
      >>> (inverse(a)[0] @ a).round(4).tolist(), round(float(jnp.exp(inverse(a)[1])), 4)
      ([[1.0, 0.0], [0.0, 1.0]], 0.75)
    """
    size = matrix.shape[-1]
    floor = rounding_floor(matrix)

    def eliminate(k: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a, log_determinant = state
        unit = (jnp.arange(size) == k).astype(a.dtype)
        row, col = jnp.take(a, k, axis=-2), jnp.take(a, k, axis=-1)
        unit = jnp.broadcast_to(unit, row.shape)
        pivot = jnp.maximum(jnp.take(row, k, axis=-1), floor)[..., None]
        row = (row * (1 - unit) + unit) / pivot
        others = a * (1 - unit)[..., None, :]
        a = others - (col * (1 - unit))[..., :, None] * row[..., None, :]
        a = a * (1 - unit)[..., :, None] + unit[..., :, None] * row[..., None, :]
        return a, log_determinant + jnp.log(pivot[..., 0])

    start = (matrix, jnp.zeros(matrix.shape[:-2], matrix.dtype))
    return jax.lax.fori_loop(0, size, eliminate, start)


def cholesky(matrix: jax.Array) -> jax.Array:
    """Lower triangular root `L`, `L L^T = matrix`.

    Args:
      matrix: (..., P, P), symmetric positive semi-definite with unit diagonal.

    Returns:
      (..., P, P); columns of pivots below the rounding floor are zero.

    Example:
      >>> root = cholesky(jnp.array([[1.0, 0.6], [0.6, 1.0]]))
      >>> [round(float(value), 4) for value in root.ravel()]
      [1.0, 0.0, 0.6, 0.8]
    """
    size = matrix.shape[-1]
    floor = rounding_floor(matrix)

    def eliminate(k: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left, root = state
        col = jnp.take(left, k, axis=-1)
        pivot = jnp.take(col, k, axis=-1)[..., None]
        scale = jnp.where(pivot > floor, jax.lax.rsqrt(jnp.maximum(pivot, floor)), 0)
        col = jnp.where(jnp.arange(size) >= k, col, 0) * scale
        left = left - col[..., :, None] * col[..., None, :]
        unit = (jnp.arange(size) == k).astype(left.dtype)
        unit = jnp.broadcast_to(unit, col.shape)
        return left, root + col[..., :, None] * unit[..., None, :]

    return jax.lax.fori_loop(0, size, eliminate, (matrix, jnp.zeros_like(matrix)))[1]
