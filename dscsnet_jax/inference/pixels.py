"""Pixels: the likelihood of recorded counts, given what targets are expected to bring.

With `mu` the expected counts and

    var = noise^2 + max(photons, 0) / gain + (misfit max(light, 0))^2,

where `light` is what is above the level that is known, a pixel's log likelihood is
`-(y - mu)^2 / (2 var) - 1/2 log var`, and `log Phi((mu - y) / sd)` where it is saturated.
Arrays are (N, M, ...), variances in those of a pixel without targets; `log_scale` is the rest.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dscsnet_jax.inference.lanes import sum_leading
from dscsnet_jax.inference.normal import inverse_mills, log_ndtr
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.physics.preset import LightNoise


class Pixels(NamedTuple):
    """Log likelihood (N, M, ...) of pixels, its derivative by `mu`, and their information."""

    value: jax.Array
    slope: jax.Array
    information: jax.Array


def pixel_std(seen: Observation, gain: Any) -> jax.Array:
    """Standard deviation of pixels without targets, counts; (N, M, ...), or (1, 1, ...) of all."""
    if gain is None:
        return seen.noise
    return jnp.sqrt(seen.noise**2 + jnp.maximum(seen.background, 0) / gain)


def typical(seen: Observation) -> Observation:
    """Windows whose noise, pedestal and background are one number (...,) for all their pixels."""
    number = jnp.maximum(seen.valid.sum((0, 1)), 1)

    def mean(values: jax.Array) -> jax.Array:
        if values.shape[:2] == (1, 1):
            return values[0, 0]
        return jnp.where(seen.valid, values, 0).sum((0, 1)) / number

    square = mean(seen.noise**2)
    noise = seen.noise[0, 0] if seen.noise.shape[:2] == (1, 1) else jnp.sqrt(square)
    return dataclasses.replace(
        seen, noise=noise, pedestal=mean(seen.pedestal), background=mean(seen.background)
    )


def all_counts(seen: Observation, gain: Any) -> jax.Array:
    """(...,) counts of windows (N, M, ...) above their level: the most a target can have."""
    above = seen.counts - seen.neighbours - seen.level
    total = jnp.where(seen.valid, jnp.maximum(above, 0), 0).sum((0, 1))
    return jnp.maximum(total, pixel_std(typical(seen), gain))


def variance(
    seen: Observation,
    noise: LightNoise | None,
    source: jax.Array,
    t: jax.Array | float = 0.0,
) -> tuple[jax.Array, Any]:
    """(N, M, ...) variance of the pixels, counts squared, and its derivative by `mu`.

    Args:
      seen: the pixels.
      noise: what the light adds, `Sensor.light_noise`; None: nothing.
      source: (N, M, ...) expected counts of the targets.
      t: (...,) error of the level, in its standard deviations.
    """
    read = seen.noise**2
    if noise is None:
        return jnp.broadcast_to(read, source.shape), 0.0
    var: jax.Array = read
    slope: Any = 0.0
    if noise.gain is not None:
        photons = seen.background + seen.background_std * t + seen.neighbours + source
        slope = jnp.where(photons > 0, 1 / jnp.asarray(noise.gain, source.dtype), 0)
        var = read + photons * slope
    if noise.misfit is not None:
        light = jnp.maximum(seen.background_std * t + seen.neighbours + source, 0)
        square = jnp.asarray(noise.misfit, source.dtype) ** 2
        var, slope = var + square * light**2, slope + 2 * square * light
    return var, slope


def log_scale(seen: Observation, gain: Any) -> jax.Array:
    """(...,) log likelihood that no target changes: `-log` of the noise, of every pixel."""
    tells, std = seen.valid & ~seen.saturated, pixel_std(seen, gain)
    if std.shape[:2] == (1, 1):
        return -tells.sum((0, 1)) * jnp.log(std[0, 0])
    return -jnp.where(tells, jnp.log(std), 0).sum((0, 1))


def log_likelihood(
    seen: Observation,
    noise: LightNoise | None,
    censors: jax.Array,
    source: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """(...,) sum of `likelihoods(...).value`; arguments as there."""

    def total(censors: bool) -> jax.Array:
        residual, var = _residuals(seen, noise, source, t)
        censored = log_ndtr(-residual) if censors else jnp.zeros_like(residual)
        return sum_leading(
            sum_leading(_chosen(seen, censored, _gaussian(seen, noise, residual, var)))
        )

    # All of it in each branch: what crosses the border of one is written to memory.
    return jax.lax.cond(censors, partial(total, True), partial(total, False))


def likelihoods(
    seen: Observation,
    noise: LightNoise | None,
    censors: jax.Array,
    source: jax.Array,
    t: jax.Array,
) -> Pixels:
    """Log likelihoods of the pixels with derivative and information; arguments as of `variance`.

    `censors` tells whether any pixel of the batch is saturated.
    """
    residual, var = _residuals(seen, noise, source, t)
    slope, sd = variance(seen, noise, source, t)[1], jnp.sqrt(var)
    tail = jax.lax.cond(censors, log_ndtr, jnp.zeros_like, -residual)

    def told(censors: bool) -> Pixels:
        by_mu = residual / sd + (residual**2 - 1) * slope / var / 2
        information = 1 / var + (slope / var) ** 2 / 2
        value, zero = _gaussian(seen, noise, residual, var), jnp.zeros_like(residual)
        if not censors:
            return Pixels(*(_chosen(seen, zero, a) for a in (value, by_mu, information)))
        mills, excess = inverse_mills(residual, tail)
        by_sd = 1 / sd + residual * slope / var / 2
        return Pixels(
            _chosen(seen, tail, value),
            _chosen(seen, mills * by_sd, by_mu),
            _chosen(seen, mills * excess * by_sd**2, information),
        )

    return jax.lax.cond(censors, partial(told, True), partial(told, False))


def _residuals(
    seen: Observation, noise: LightNoise | None, source: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Residuals in standard deviations, and the variances."""
    var, _ = variance(seen, noise, source, t)
    expected = seen.neighbours + source + (seen.level + seen.background_std * t)
    # One root for all pixels where they share a variance.
    return (seen.counts - expected) / (seen.noise if noise is None else jnp.sqrt(var)), var


def _gaussian(
    seen: Observation, noise: LightNoise | None, residual: jax.Array, var: jax.Array
) -> jax.Array:
    """Log likelihood of pixels that are not saturated."""
    value = -(residual**2) / 2
    if noise is None:
        return value
    return value - jnp.log(var / pixel_std(seen, noise.gain) ** 2) / 2


def _chosen(seen: Observation, saturated: jax.Array, otherwise: jax.Array) -> jax.Array:
    """Values of saturated and of other pixels; 0 where nothing was seen."""
    return jnp.where(seen.valid, jnp.where(seen.saturated, saturated, otherwise), 0)
