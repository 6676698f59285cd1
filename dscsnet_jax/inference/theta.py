"""Theta: the vector of a window's parameters, and matrices over it.

    theta = (row_0, col_0, v_0, row_1, ..., v_{K-1}, t)

Three of each target and the level's, see `scene_model`; windows may be behind.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.inference import lanes, spd


def present_of(mask: jax.Array) -> jax.Array:
    """(3K+1, ...) bool: parameters of targets present, and the level."""
    return jnp.concatenate([jnp.repeat(mask, 3, 0), jnp.ones((1, *mask.shape[1:]), bool)])


def pairs_of(mask: jax.Array) -> jax.Array:
    """(K, K, ...) bool: two different targets, both present."""
    same = lanes.behind(np.eye(mask.shape[0], dtype=bool), mask.ndim + 1)
    return mask[:, None] & mask[None] & ~same


def with_jacobian(function: Any, theta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values (R, ...) and their Jacobian (R, 3K+1, ...), in one forward sweep."""
    value, push = jax.linearize(function, theta)
    return value, jax.vmap(push, out_axes=1)(spd.diagonal_matrix(jnp.ones_like(theta)))


def parts_of(theta: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Rows, cols, `v` (K, ...) and `t` (...)."""
    return theta[0:-1:3], theta[1:-1:3], theta[2:-1:3], theta[-1]


def theta_of(row: jax.Array, col: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
    """`theta` (3K+1, ...) of its parts."""
    table = jnp.stack([row, col, v], 1)
    return jnp.concatenate([table.reshape(-1, *table.shape[2:]), t[None]])


def spread(block: jax.Array, i: int, j: int) -> jax.Array:
    """(3K+1, 3K+1, ...) with a block (K, K, ...) in the `i`-th rows and `j`-th cols of targets."""
    size, windows = 3 * block.shape[0], block.shape[2:]
    place = np.zeros((1, 3, 1, 3), block.dtype)
    place[0, i, 0, j] = 1
    table = block[:, None, :, None] * lanes.behind(place, block.ndim + 2)
    table = table.reshape(size, size, *windows)
    return jnp.pad(table, ((0, 1), (0, 1), *((0, 0) for _ in windows)))
