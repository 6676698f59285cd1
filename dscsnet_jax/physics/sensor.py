"""Sensor: from expected to recorded counts: noise, offset, saturation, quantisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dscsnet_jax.physics.preset import Sensor

_QUANTISATION_VARIANCE = 1 / 12

jax.tree_util.register_dataclass(Sensor)


def expose(sensor: Sensor, key: jax.Array, expected: jax.Array) -> jax.Array:
    """Record a frame: `clip(round(P(expected) + offset + read_noise * n), 0, saturation)`.

    Rounding and the lower clip at 0 apply to quantised sensors only; the upper clip
    wherever `saturation` is finite.

    Args:
      sensor: the `Sensor`.
      key: PRNG key of this frame (or batch).
      expected: (..., N, M) expected counts of the targets, non-negative.

    Returns:
      (..., N, M) recorded counts, same dtype.

    Raises:
      TypeError: if the expected counts are not floating point.

    Example:
      >>> from dscsnet_jax.physics.preset import digital
      >>> expose(digital(8), jax.random.key(0), jnp.array([0.4, 1.6, 300.0])).tolist()
      [0.0, 2.0, 255.0]
    """
    shot_key, read_key = jax.random.split(key)
    y = jnp.asarray(expected)
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(f"expected counts must be floating point, got {y.dtype}")
    if sensor.electrons_per_count is not None:
        gain = jnp.asarray(sensor.electrons_per_count, y.dtype)
        y = jax.random.poisson(shot_key, y * gain).astype(y.dtype) / gain
    y = y + jnp.asarray(sensor.offset, y.dtype)
    if not _is_zero(sensor.read_noise):
        noise = jax.random.normal(read_key, y.shape, y.dtype)
        y = y + jnp.asarray(sensor.read_noise, y.dtype) * noise
    if sensor.quantised:
        y = jnp.maximum(jnp.round(y), 0)
    return jnp.minimum(y, jnp.asarray(sensor.saturation, y.dtype))


def variance(sensor: Sensor, expected: jax.Array) -> jax.Array:
    """Variance of a recorded, unsaturated pixel: read + shot + quantisation (1/12).

    Args:
      sensor: the `Sensor`.
      expected: (..., N, M) expected counts of the targets.

    Returns:
      (..., N, M) counts squared.

    Example:
      >>> from dscsnet_jax.physics.preset import digital
      >>> round(float(variance(digital(8, read_noise=2.0), jnp.array(9.0))), 3)
      4.083
    """
    total = jnp.asarray(sensor.read_noise, expected.dtype) ** 2 + jnp.zeros_like(expected)
    if sensor.electrons_per_count is not None:
        total = total + expected / jnp.asarray(sensor.electrons_per_count, expected.dtype)
    return total + _QUANTISATION_VARIANCE if sensor.quantised else total


def is_saturated(sensor: Sensor, y: jax.Array) -> jax.Array:
    """(..., N, M) bool: recorded pixels at the sensor's full well.

    Example:
      >>> from dscsnet_jax.physics.preset import digital
      >>> is_saturated(digital(8), jnp.array([254.0, 255.0])).tolist()
      [False, True]
    """
    return y >= jnp.asarray(sensor.saturation, y.dtype)


def _is_zero(value: float | jax.Array) -> bool:
    """True only for a Python zero: skips drawing noise nobody asked for."""
    return isinstance(value, int | float) and value == 0
