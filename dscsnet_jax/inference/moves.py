"""Moves: what the sampler's chains propose."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.inference import spd
from dscsnet_jax.inference.hamiltonian import trajectory
from dscsnet_jax.inference.lanes import sum_leading
from dscsnet_jax.inference.redraw import light_redrawn
from dscsnet_jax.inference.scene_model import SceneModel
from dscsnet_jax.inference.summary import numbered
from dscsnet_jax.inference.theta import parts_of, theta_of

# Shares of the moves, in the order of `propose`.
_MOVES = (0.5, 0.12, 0.03, 0.2, 0.15)
_LINEAR_MOVES = (0.4, 0.1, 0.02, 0.08, 0.1, 0.2, 0.1, 0.0)
_SLOW_MOVES = (0.32, 0.08, 0.016, 0.064, 0.08, 0.16, 0.08, 0.2)  # where chains have disagreed
_LENGTHS = (0.01, 0.7)  # pixels, of moves of one or two targets
WALK = 0
"""The kind of the move of all parameters."""
NUM_FURTHER = 3
"""Uniform numbers that moves need beside one for each parameter."""


class Shape(NamedTuple):
    """The Gaussian distribution by which moves of all parameters are shaped.

    Attributes:
      mean: (3K+1, 1, C).
      root: (3K+1, 3K+1, 1, C) lower triangular, of the covariance; zero for what is not there.
      inverse: of the root, likewise.
    """

    mean: jax.Array
    root: jax.Array
    inverse: jax.Array


def kind_of(u: jax.Array, model: SceneModel, number: int | jax.Array = 0) -> jax.Array:
    """Which move of a turn; chosen at random, so that any number of moves is reversible."""
    shares = (_LINEAR_MOVES, _SLOW_MOVES) if model.linear else (_MOVES, _MOVES)
    first, later = (jnp.asarray(np.cumsum(of)[:-1], u.dtype) for of in shares)
    return (u >= jnp.where(jnp.asarray(number) > 0, later, first)).sum(dtype=jnp.int32)


def propose(
    theta: jax.Array,
    shape: Shape,
    length: jax.Array,
    model: SceneModel,
    fitted: jax.Array,
    kind: jax.Array,
    u: jax.Array,
    log_density: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """A proposal (3K+1, 1, C) of one kind, from uniform numbers.

    All parameters at once, partly drawn anew from the Gaussian distribution that they seem to
    have: only what differs from it is ever rejected, however long the step. The cluster rotated
    or reflected about its centre of energy, which makes blends that look alike; the intensities
    of two targets exchanged; one target over lengths of many scales; two targets with their
    centre of energy held. Where the prior lets light be linear: one or two targets, the light
    of all drawn anew, and trajectories of all parameters.

    Args:
      theta: (3K+1, 1, C) places of C chains.
      shape: of the moves of all parameters.
      length: (1, C) of a step of all parameters; at 1 it forgets where it came from.
      model: of each chain's window, (..., 1, C).
      fitted: (3K+1, 1, C) the fit, by which targets are numbered.
      kind: which move, see `kind_of`.
      u: (3K+1 + `NUM_FURTHER`, 1, C) uniform numbers.
      log_density: of places, by which trajectories go.

    Returns:
      Where to, and the logarithm (1, C) of how much likelier its proposal is on the way back.

    References:
      R. M. Neal, Bayesian Statistics 6 (1998) 475; S. L. Cotter, G. O. Roberts, A. M. Stuart,
      D. White, Stat. Sci. 28 (2013) 424 (preconditioned Crank-Nicolson proposals).
    """
    mask, size = model.mask, theta.shape[0]

    def walk() -> tuple[jax.Array, jax.Array]:
        new = _normal(u[:size])
        new = jnp.where(spd.diagonal(shape.root) > 0, new, 0)
        off = theta - shape.mean
        old, stays = spd.times(shape.inverse, off), jnp.sqrt(1 - length**2)
        # Three sums: of one of all, the compiler works out `new` again for each row of the root.
        there, across, here = (sum_leading(x) for x in (new**2, old * new, old**2))
        gain = length**2 * (there - here) / 2 + length * stays * across
        return shape.mean + stays * off + length * spd.times(shape.root, new), gain

    def rotate() -> jax.Array:
        energy = jnp.where(mask, jnp.maximum(model.intensity(theta[2:-1:3]), 0), 0)
        turned = _rotated(theta, energy, mask, 2 * np.pi * u[size + 2], u[size + 1] < 0.5)
        return numbered(turned, fitted, mask)

    def exchange() -> jax.Array:
        v = theta[2:-1:3]
        one, other = (jnp.where(p, v, 0).sum(0) for p in (first, second))
        swapped = jnp.where(first, other, jnp.where(second, one, v))
        return theta.at[2:-1:3].set(swapped)

    def centred() -> jax.Array:
        energy = jnp.where(mask, jnp.maximum(model.intensity(theta[2:-1:3]), 0), 0)
        own, other = ((energy * of).sum(0) for of in (first, second))
        total = jnp.where(own + other > 0, own + other, 1)
        return jnp.where(first, other / total, 0) - jnp.where(second, own / total, 0)

    def apart(share: jax.Array, turn: jax.Array) -> jax.Array:
        low, high = _LENGTHS
        angle, length = 2 * np.pi * turn, low * (high / low) ** u[size + 2]
        off = share[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle), 0 * angle])[None]
        off = (off * length).reshape(-1, *off.shape[2:])
        return theta.at[:-1].add(off)

    def symmetric(move: Callable[[], jax.Array]) -> tuple[jax.Array, jax.Array]:
        return move(), jnp.zeros_like(theta[-1])

    def redrawn(share: jax.Array) -> tuple[jax.Array, jax.Array]:
        number = size // 3 + 1  # of what is light
        moved = apart(share, u[number])  # whatever the light, which is another on the way back
        return light_redrawn(theta, moved, model, _normal(u[:number]))

    first, second = (_one_of(u[size + i], mask) for i in (0, 1))
    one = first.astype(theta.dtype)
    others = rotate, exchange, lambda: apart(one, u[0]), lambda: apart(centred(), u[0])
    moves: list[Callable[[], Any]] = [walk, *(partial(symmetric, move) for move in others)]
    if model.linear:
        moves += [partial(redrawn, one), partial(redrawn, (one - second) / 2)]
        moves += [lambda: trajectory(theta, shape.root, log_density, _normal(u[:size]), u[size])]
    return jax.lax.switch(kind, moves)


def _normal(u: jax.Array) -> jax.Array:
    """Standard normal numbers of uniform ones, which may be 0."""
    return 2**0.5 * jax.lax.erf_inv(2 * (u + float(jnp.finfo(u.dtype).eps) / 4) - 1)


def _one_of(u: jax.Array, mask: jax.Array) -> jax.Array:
    """(K, 1, C) bool: one of the targets present, by a uniform number."""
    index = jnp.floor(u * mask.sum(0))
    return mask & (jnp.cumsum(mask, axis=0) - 1 == index)


def _rotated(
    theta: jax.Array, energy: jax.Array, mask: jax.Array, angle: jax.Array, mirror: jax.Array
) -> jax.Array:
    """The targets rotated, or reflected, about their centre of energy, which stays."""
    row, col, v, t = parts_of(theta)
    total = energy.sum(0)
    total = jnp.where(total > 0, total, 1)
    row_off = row - (energy * row).sum(0) / total
    col_off = col - (energy * col).sum(0) / total
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    sign = jnp.where(mirror, -1, 1)
    new_row = row - row_off + cosine * row_off - sign * sine * col_off
    new_col = col - col_off + sine * row_off + sign * cosine * col_off
    return theta_of(jnp.where(mask, new_row, row), jnp.where(mask, new_col, col), v, t)
