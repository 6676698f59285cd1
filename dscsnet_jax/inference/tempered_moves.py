"""Moves of the particles of a tempered posterior: half of them step as the others tell.

Each takes particles (D, P/2, L), those that tell how far, uniform numbers, the length of steps and
the model, and answers with new places and whether targets must stay in their order.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dscsnet_jax.inference.scene_model import SceneModel
from dscsnet_jax.inference.theta import parts_of, theta_of

_Proposal = tuple[jax.Array, jax.Array]


def _difference(others: jax.Array, u: jax.Array) -> jax.Array:
    """Differences (D, P/2, L) of two of the other particles."""
    number = others.shape[1]
    at = jnp.minimum((u[:2] * number).astype(jnp.int32), number - 1)
    one, other = (jnp.take_along_axis(others, i[None], 1) for i in at)
    return one - other


def _chosen(u: jax.Array, mask: jax.Array) -> jax.Array:
    """(K, P/2, L) bool: one of the targets that are there."""
    number = mask.sum(0)
    rank = jnp.cumsum(mask, 0) - 1
    return mask & (rank == jnp.minimum((u * number).astype(jnp.int32), number - 1))


def _along(
    own: jax.Array, others: jax.Array, u: jax.Array, length: jax.Array, some: jax.Array
) -> _Proposal:
    """Steps along the difference of two others, of some parameters (D, P/2, L)."""
    dimension = jnp.maximum(some.sum(0), 1).astype(own.dtype)
    step = _difference(others, u) * jnp.where(some, 2.38 / jnp.sqrt(2 * dimension) * length, 0)
    # Lengths of their own, or particles would meet on a lattice of differences.
    jitter = 1 + 0.1 * (u[2] - 0.5)
    return own + step * jitter, jnp.ones((), bool)


def _along_all(own: Any, others: Any, u: Any, length: Any, model: SceneModel) -> _Proposal:
    return _along(own, others, u, length, jnp.ones(own.shape, bool))


def _along_some(own: Any, others: Any, u: Any, length: Any, model: SceneModel) -> _Proposal:
    """Of two targets and the level."""
    both = _chosen(u[3], model.mask) | _chosen(u[4], model.mask)
    return _along(own, others, u, length, _of_targets(both, level=True))


def _along_one(own: Any, others: Any, u: Any, length: Any, model: SceneModel) -> _Proposal:
    return _along(own, others, u, length, _of_targets(_chosen(u[3], model.mask), level=False))


def _of_targets(some: jax.Array, *, level: bool) -> jax.Array:
    """(D, P/2, L) the parameters of some targets (K, P/2, L)."""
    table = jnp.repeat(some, 3, 0)
    return jnp.concatenate([table, jnp.full((1, *some.shape[1:]), level)])


def _redrawn(own: Any, others: Any, u: Any, length: Any, model: SceneModel) -> _Proposal:
    """One target anywhere in its square, of any intensity."""
    prior = model.known.prior
    row, col, v, t = parts_of(own)
    one = _chosen(u[3], model.mask)
    rows, cols = model.seen.counts.shape[:2]
    if prior.cluster_size is None:
        new = rows * u[0] - 0.5, cols * u[1] - 0.5
    elif prior.cluster_offset is None:
        anchor = _chosen(u[4], model.mask)
        middle = (jnp.where(anchor, place, 0).sum(0) for place in (row, col))
        new = tuple(m + prior.cluster_size * (2 * x - 1) for m, x in zip(middle, u, strict=False))
    else:
        new = tuple(
            model.square(place).begin + prior.cluster_size * x
            for place, x in zip((row, col), u, strict=False)
        )
    moved = [jnp.where(one, a, place) for a, place in zip(new, (row, col), strict=True)]
    if prior.cluster_offset is not None:  # the way back must begin from the same square
        kept = []
        for after, before in zip(moved, (row, col), strict=True):
            same = jnp.abs(model.square(after).begin - model.square(before).begin) < 0.5
            kept.append(jnp.where(same, after, before))
        moved = kept
    row, col = moved
    return theta_of(row, col, jnp.where(one, u[2], v), t), jnp.zeros((), bool)


def _shifted(own: Any, others: Any, u: Any, length: Any, model: SceneModel) -> _Proposal:
    """All targets a pixel further along an axis."""
    row, col, v, t = parts_of(own)
    way = jnp.where(u[0] < 0.5, -1, 1).astype(own.dtype)
    along = u[1] < 0.5
    row = jnp.where(model.mask, row + jnp.where(along, way, 0), row)
    col = jnp.where(model.mask, col + jnp.where(along, 0, way), col)
    return theta_of(row, col, v, t), jnp.zeros((), bool)


def _rotated(own: Any, others: Any, u: Any, length: Any, model: SceneModel) -> _Proposal:
    """The targets rotated by any angle about the centre of their light, or mirrored through it.

    The centre stays, so that the volume does.
    """
    row, col, v, t = parts_of(own)
    light = jnp.where(model.mask, model.intensity(v), 0)
    total = light.sum(0)
    share = light / jnp.where(total > 0, total, 1)
    middle = [(share * place).sum(0) for place in (row, col)]
    angle = 2 * jnp.pi * u[0]
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    a, b = row - middle[0], col - middle[1]
    b = jnp.where(u[1] < 0.5, -b, b)
    new = middle[0] + cosine * a - sine * b, middle[1] + sine * a + cosine * b
    row, col = (jnp.where(model.mask, x, y) for x, y in zip(new, (row, col), strict=True))
    return theta_of(row, col, v, t), jnp.zeros((), bool)


KINDS = (
    *(_along_all, _along_some, _along_one, _redrawn, _along_all, _along_some, _rotated),
    *(_along_one, _along_all, _along_some, _shifted),
)
