"""Particles: scenes of L windows drawn from the prior (D, P, L), their order, their resampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dscsnet_jax.inference import clustered
from dscsnet_jax.inference.alike import Alike
from dscsnet_jax.inference.scene_model import SceneModel
from dscsnet_jax.inference.theta import theta_of

_TRIES = 24  # of places for each target, to keep its distance


def draws_of(
    keys: jax.Array, number: Any, index: Any, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    """Uniform numbers (*shape, L) of each window's own stream."""

    def one(key: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, number), index)
        return jax.random.uniform(own, shape, dtype)

    return jnp.moveaxis(jax.vmap(one)(keys), 0, -1)


def from_prior(
    model: SceneModel, draws: Callable[..., jax.Array], number: int
) -> tuple[jax.Array, jax.Array]:
    """Particles (D, P, L) drawn from the prior, and their log weights for joint places (P, L).

    Targets are placed one after the other, each at the first of some places that is free.
    """
    prior, mask = model.known.prior, model.mask
    slots = mask.shape[0]
    u = draws(0, 1, (3, number))
    shape = jnp.asarray(model.seen.counts.shape[:2], u.dtype).reshape(2, 1, 1)
    if prior.cluster_size is None:
        low, size = jnp.full_like(u[:2], -0.5), shape
    else:
        size = jnp.broadcast_to(jnp.asarray(prior.cluster_size, u.dtype), (2, 1, 1))
        low = shape * u[:2] - 0.5 - size / 2
        if prior.cluster_offset is not None:
            low = jnp.floor(shape * u[:2]) + prior.cluster_offset
    tries = low[:, None, None] + size[:, None, None] * draws(0, 2, (2, slots, _TRIES, number))
    placed = [tries[:, 0, 0]]
    for slot in range(1, slots):
        apart = jnp.stack([((tries[:, slot] - p[:, None]) ** 2).sum(0) for p in placed])
        free = ((apart >= prior.separation**2) | ~mask[:slot, None]).all(0)
        first = jnp.argmax(free, 0)
        placed.append(jnp.take_along_axis(tries[:, slot], first[None, None], 1)[:, 0])
    place = jnp.stack(placed, 1)
    if prior.spread is not None:
        u = draws(0, 4, (2 * slots + 1, number))
        place = clustered.drawn(place[:, :1], mask, model.spread_width(), u)
    v = draws(0, 3, (slots, number))
    if isinstance(prior.intensity, Alike):
        white = jax.scipy.special.ndtri(jnp.clip(v, 1e-6, 1 - 1e-6))
        latent = prior.intensity.unwhitened(white, mask)
        v = prior.intensity.value(latent) / jnp.maximum(mask.sum(0), 1)[None]
    row, col, v = (jnp.where(mask, a, 0) for a in (place[0], place[1], v))
    normal = jax.scipy.special.ndtri(jnp.clip(u[2], 1e-6, 1 - 1e-6))
    theta = in_order(theta_of(row, col, v, normal), mask)[0]
    if prior.spread is not None:
        return theta, model.log_distances(theta)
    if prior.cluster_size is None:
        return theta, jnp.broadcast_to(model.log_free_share(), theta.shape[1:])
    one_by_one = dataclasses.replace(
        model.known, prior=dataclasses.replace(prior, places="sequential")
    )
    sequential = dataclasses.replace(model, known=one_by_one)
    return theta, jnp.broadcast_to(-sequential.log_places(theta), theta.shape[1:])


def resampled(weight: jax.Array, u: jax.Array) -> jax.Array:
    """(P, L) particles to go on with, by systematic resampling of log weights."""
    share = jax.nn.softmax(weight, axis=0)
    below = jnp.cumsum(share, 0)
    number = len(weight)
    at = (jnp.arange(number, dtype=u.dtype)[:, None] + u[None]) / number * below[-1:]
    index = jax.vmap(partial(jnp.searchsorted, side="right"), (1, 1), 1)(below, at)
    return jnp.minimum(index, number - 1)


def in_order(theta: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Targets in the order of their rows, and (P, L) whether they were so.

    Targets can be numbered at will; in one order particles tell each other where to step.
    """
    slots = mask.shape[0]
    table = theta[:-1].reshape(slots, 3, *theta.shape[1:])
    key = jnp.where(mask, table[:, 0], jnp.inf)
    order = jnp.argsort(key, axis=0, stable=True)
    fine = (order == jnp.arange(slots).reshape(-1, 1, 1)).all(0)
    table = jnp.take_along_axis(table, order[:, None], 0)
    return jnp.concatenate([table.reshape(-1, *theta.shape[1:]), theta[-1:]]), fine
