"""Objective: whitened residuals of a frame's targets and their analytic Jacobian.

The parameters of a frame with K slots are the vector

    theta = (row_0, col_0, I_0, row_1, ..., I_{K-1}, t),   background = b + b_std t

and minus the log posterior is `1/2 |r(theta)|^2` and constants, with residuals of
pixels, `(y - mu(theta)) / std`, and of the prior. A saturated pixel is censored: it tells
only that at least the full well was there, so its residual is one-sided.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.estimation.observe import Observation
from dscsnet_jax.estimation.prior import ScenePrior
from dscsnet_jax.physics import grid, limits, optics
from dscsnet_jax.physics.targets import Targets

# Softness of the prior's hard limits in the fit, pixels: a step of a few hundredths.
SOFTNESS = 0.03


class Residuals(NamedTuple):
    """Residuals of one frame with their Jacobian.

    Attributes:
      value: (R,) whitened residuals, pixels first.
      jacobian: (R, 3K+1) derivative by `theta`, at constant weights.
      std: (N M,) standard deviation of the pixels at `theta`, counts.
    """

    value: jax.Array
    jacobian: jax.Array
    std: Any = None


def pack(targets: Targets, t: jax.Array) -> jax.Array:
    """`theta` (..., 3K+1) of targets and the background's `t` (...,)."""
    table = jnp.concatenate([targets.position, targets.intensity[..., None]], -1)
    flat = table.reshape(*table.shape[:-2], -1)
    return jnp.concatenate([flat, t[..., None].astype(flat.dtype)], -1)


def unpack(theta: jax.Array, mask: jax.Array) -> Targets:
    """Targets of `theta`; padded slots hold zeros."""
    table = theta[..., :-1].reshape(*theta.shape[:-1], -1, 3)
    table = jnp.where(mask[..., None], table, 0)
    return Targets(position=table[..., :2], intensity=table[..., 2], mask=mask)


def pixel_std(observation: Observation, source: jax.Array) -> jax.Array:
    """Standard deviation of the pixels (..., N, M) that expect `source` counts of targets."""
    gain = observation.gain[..., None, None]
    return jnp.sqrt(observation.noise[..., None, None] ** 2 + jnp.maximum(source, 0) / gain)


def censor(observation: Observation, residual: jax.Array) -> jax.Array:
    """Residuals (..., N, M) without those of invalid pixels; one-sided where saturated."""
    one_sided = jnp.where(observation.saturated, jnp.maximum(residual, 0), residual)
    return jnp.where(observation.valid, one_sided, 0)


def residuals(
    theta: jax.Array, mask: jax.Array, observation: Observation, prior: ScenePrior
) -> Residuals:
    """All residuals of one frame, with the Jacobian from closed forms.

    Args:
      theta: (3K+1,) parameters.
      mask: (K,) bool, targets present.
      observation: an unbatched `Observation`.
      prior: what is known of the scene.

    Returns:
      `Residuals`; the weights of shot noise are those of `theta`, and not differentiated
      by it: `J^T r = 0` is the quasi-score of varying weights.
    """
    targets = unpack(theta, mask)
    shape = grid.frame_shape(observation.counts.shape)
    source = optics.render(targets, frame_size=shape, sigma=observation.sigma)
    std = pixel_std(observation, source)
    level = observation.background + observation.background_std * theta[-1]
    pixels = censor(observation, (observation.counts - source - level) / std)
    active = observation.valid & ((pixels > 0) | ~observation.saturated)
    slope = jnp.where(active, 1 / std, 0)
    by_target = limits.render_jacobian(targets, frame_size=shape, sigma=observation.sigma)
    columns = jnp.concatenate(
        [by_target, jnp.broadcast_to(observation.background_std, (1, *shape))]
    )
    jacobian = -(columns * slope[None]).reshape(len(theta), -1).T
    rows = [Residuals(pixels.reshape(-1), jacobian), _background_rows(theta)]
    rows += _intensity_rows(targets, prior) + _pair_rows(targets, prior)
    value = jnp.concatenate([row.value for row in rows])
    return Residuals(value, jnp.concatenate([row.jacobian for row in rows]), std.reshape(-1))


def _background_rows(theta: jax.Array) -> Residuals:
    return Residuals(theta[-1:], jnp.eye(len(theta), dtype=theta.dtype)[-1:])


def _intensity_rows(targets: Targets, prior: ScenePrior) -> list[Residuals]:
    """`(I - mean) / std`: the range as a Gaussian of its mean and variance."""
    if prior.intensity is None:
        return []
    mean, std = (m.astype(targets.intensity.dtype) for m in prior.intensity_moments())
    value = jnp.where(targets.mask, (targets.intensity - mean) / std, 0)
    slots = len(value)
    jacobian = jnp.zeros((slots, 3 * slots + 1), value.dtype)
    slot = np.arange(slots)
    jacobian = jacobian.at[slot, 3 * slot + 2].set(jnp.where(targets.mask, 1 / std, 0))
    return [Residuals(value, jacobian)]


def _pair_rows(targets: Targets, prior: ScenePrior) -> list[Residuals]:
    """Pairs that are closer than the separation, or wider than the extent."""
    slots = len(targets.mask)
    first, second = np.triu_indices(slots, 1)
    both = targets.mask[first] & targets.mask[second]
    apart = targets.position[first] - targets.position[second]
    # d(apart)/d(position): +1 for the first of the pair, -1 for the second.
    sign = np.eye(slots)[first] - np.eye(slots)[second]

    def rows(excess: jax.Array, slope: jax.Array) -> Residuals:
        """Residual `max(excess, 0) / softness`, `slope` (pairs, 2) by `apart`."""
        active = both & (excess > 0)
        value = jnp.where(active, excess, 0) / SOFTNESS
        slope = jnp.where(active[:, None], slope, 0) / SOFTNESS
        table = jnp.asarray(sign, value.dtype)[:, :, None] * slope[:, None, :]
        table = jnp.pad(table, ((0, 0), (0, 0), (0, 1)))
        return Residuals(value, jnp.pad(table.reshape(len(first), 3 * slots), ((0, 0), (0, 1))))

    distance2 = (apart**2).sum(-1)
    distance = jnp.sqrt(jnp.where(distance2 > 0, distance2, 1))
    close = jnp.where(distance2 > 0, distance, 0)
    found = [rows(prior.separation - close, -apart / distance[:, None])]
    if prior.corner is not None:
        return [*found, *_square_rows(targets, prior)]
    if prior.extent is not None:
        for axis in (0, 1):
            direction = jnp.zeros_like(apart).at[:, axis].set(jnp.sign(apart[:, axis]))
            found.append(rows(jnp.abs(apart[:, axis]) - prior.extent, direction))
    return found


def nearest_square(place: jax.Array, mask: jax.Array, prior: ScenePrior) -> jax.Array:
    """Where the square of the prior that fits the targets best begins, pixels.

    Args:
      place: (K, ...) row or col of the targets.
      mask: (K, ...) targets present.
      prior: with an extent and a corner.

    Returns:
      (...,) first row or col of the square.
    """
    corner, extent = jnp.asarray(prior.corner), jnp.asarray(prior.extent)
    low = jnp.where(mask, place, jnp.inf).min(0)
    high = jnp.where(mask, place, -jnp.inf).max(0)
    middle = jnp.where(mask.any(0), (low + high) / 2, 0)
    return jnp.round(middle - corner - extent / 2) + corner


def _square_rows(targets: Targets, prior: ScenePrior) -> list[Residuals]:
    """Targets outside the square that fits them best."""
    slots = len(targets.mask)
    found = []
    for axis in (0, 1):
        place = targets.position[:, axis]
        begin = jax.lax.stop_gradient(nearest_square(place, targets.mask, prior))
        before, after = begin - place, place - (begin + jnp.asarray(prior.extent))
        outside = targets.mask & ((before > 0) | (after > 0))
        value = jnp.where(outside, jnp.maximum(before, after), 0) / SOFTNESS
        slope = jnp.where(outside, jnp.where(before > after, -1.0, 1.0), 0) / SOFTNESS
        slot = np.arange(slots)
        jacobian = jnp.zeros((slots, 3 * slots + 1), place.dtype)
        found.append(Residuals(value, jacobian.at[slot, 3 * slot + axis].set(slope)))
    return found
