"""Sensor: from expected to recorded counts: noise, pedestal, saturation, quantisation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import require

_QUANTISATION_VARIANCE = 1 / 12
PER_PIXEL = ("read_noise", "pedestal", "background")
"""Fields of a `Sensor` that may be maps, or planes of each frame."""

jax.tree_util.register_dataclass(Sensor)


def checked(sensor: Sensor, shape: tuple[int, int, int] | None = None) -> Sensor:
    """The sensor, if it can be one, and one of these frames.

    Args:
      sensor: what is known; not traced.
      shape: (B, N, M) of the frames; None: any.

    Raises:
      ValueError: for a number out of its range, or a map that is not of the frames' shape;
        names the field.

    Example:
      >>> checked(Sensor(gain=0.0))
      Traceback (most recent call last):
      ValueError: gain must be finite electrons per count above 0, got 0.0
    """
    for name in PER_PIXEL:
        value = getattr(sensor, name)
        if value is None:
            continue
        array = _numbers(name, value)
        _check_shape(name, array, shape)
        if array.ndim < 2:  # a pixel of a map may be told to have no value
            bound = " of at least 0" if name == "read_noise" else ""
            right = np.isfinite(array) & ((array >= 0) if bound else True)
            require(bool(right.all()), f"{name} must be finite counts{bound}, got {value!r}")
        elif name == "read_noise":
            require(not (array < 0).any(), f"{name} of a map must be counts of at least 0")
        else:
            require(bool(np.isfinite(array).all()), f"{name} of a map must be finite counts")
    for name, unit, least, most in (
        ("gain", "finite electrons per count above 0", np.nextafter(0, 1), np.inf),
        ("excess_noise", "a finite factor of at least 1", 1, np.inf),
        ("misfit", "a finite number of at least 0", 0, np.inf),
        ("saturation", "counts above 0 (inf: none)", np.nextafter(0, 1), np.nan),
    ):
        value = getattr(sensor, name)
        if value is not None:
            array = _numbers(name, value)
            require(array.ndim == 0, f"{name} must be one number, got {array.shape}")
            require(
                bool(least <= array and not array >= most), f"{name} must be {unit}, got {value!r}"
            )
    require(sensor.excess_noise is not None, "excess_noise must be a number, 1 for none, got None")
    quantised = sensor.quantised
    right = quantised is None or isinstance(quantised, bool)
    require(right, f"quantised must be true, false or null, got {quantised!r}")
    if sensor.bad_pixels is not None:
        bad = np.asarray(sensor.bad_pixels)
        require(
            bad.dtype == bool and bad.ndim == 2,
            f"bad_pixels must be (N, M) of true and false, got {bad.dtype} of {bad.shape}",
        )
        right_shape = shape is None or bad.shape == shape[1:]
        require(right_shape, f"bad_pixels has the shape {bad.shape}, frames are {shape}")
    return sensor


def _numbers(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    require(array.dtype.kind in "uif", f"{name} must be a number, got {value!r}")
    return array


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, int, int] | None) -> None:
    """Refuse an array that is neither a number nor of the frames."""
    if shape is None:
        require(array.ndim <= 3, f"{name} must have at most three axes, got {array.shape}")
        return
    right = (), shape[:1], shape[1:], shape
    text = f"{name} of frames {shape} must have one of the shapes {right}, got {array.shape}"
    require(array.shape in right, text)


def expose(sensor: Sensor, key: jax.Array, expected: jax.Array) -> jax.Array:
    """Record a frame: `clip(round(P(expected + background) + pedestal + read_noise * n))`.

    Of what is expected of the targets each pixel gets `1 + misfit * n` times as much. Rounding and
    the clip below, at 0, apply to quantised sensors only; the clip above, at the
    saturation, where there is one. Multiplied electrons follow a gamma distribution, as at the
    end of an electron-multiplying register.

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

    References:
      M. Hirsch et al., PLoS ONE 8 (2013) e53671, of the gamma distribution.
    """
    shot_key, read_key = jax.random.split(key)
    y = jnp.asarray(expected)
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(f"expected counts must be floating point, got {y.dtype}")
    if not _is_none(sensor.misfit):
        off = jax.random.normal(jax.random.fold_in(read_key, 1), y.shape, y.dtype)
        y = jnp.maximum(y * (1 + _of(sensor.misfit, y) * off), 0)
    if not _is_none(sensor.background):
        y = y + _of(sensor.background, y)
    if sensor.gain is not None:
        gain = jnp.asarray(sensor.gain, y.dtype)
        y = _multiplied(sensor, shot_key, jax.random.poisson(shot_key, y * gain).astype(y.dtype))
        y = y / gain
    if not _is_none(sensor.pedestal):
        y = y + _of(sensor.pedestal, y)
    if not _is_none(sensor.read_noise):
        noise = jax.random.normal(read_key, y.shape, y.dtype)
        y = y + _of(sensor.read_noise, y) * noise
    if sensor.quantised:
        y = jnp.maximum(jnp.round(y), 0)
    return y if sensor.saturation is None else jnp.minimum(y, _of(sensor.saturation, y))


def variance(sensor: Sensor, expected: jax.Array) -> jax.Array:
    """Variance of a recorded, unsaturated pixel: read + shot + misfit + quantisation (1/12).

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
    total = _of(sensor.read_noise, expected) ** 2 + jnp.zeros_like(expected)
    if sensor.effective_gain is not None:
        light = expected + _of(sensor.background, expected)
        total = total + light / _of(sensor.effective_gain, expected)
    if not _is_none(sensor.misfit):
        total = total + (_of(sensor.misfit, expected) * expected) ** 2
    return total + _QUANTISATION_VARIANCE if sensor.quantised else total


def is_saturated(sensor: Sensor, y: jax.Array) -> jax.Array:
    """(..., N, M) bool: recorded pixels at the sensor's full well.

    Example:
      >>> from dscsnet_jax.physics.preset import digital
      >>> is_saturated(digital(8), jnp.array([254.0, 255.0])).tolist()
      [False, True]
    """
    return y >= _of(np.inf if sensor.saturation is None else sensor.saturation, y)


def level(sensor: Sensor, like: jax.Array) -> jax.Array:
    """Expected counts of a pixel without targets, in the type of `like`."""
    return _of(sensor.pedestal, like) + _of(sensor.background, like)


def _multiplied(sensor: Sensor, key: jax.Array, electrons: jax.Array) -> jax.Array:
    """Electrons after multiplication, in numbers of those before: variance `F - 1` for each."""
    if _is_none(sensor.excess_noise, 1):
        return electrons
    spread = jnp.asarray(sensor.excess_noise, electrons.dtype) - 1
    some = (electrons > 0) & (spread > 0)
    scale = jnp.where(some, spread, 1)
    shape = jnp.where(some, electrons, 1) / scale
    drawn = jax.random.gamma(jax.random.fold_in(key, 1), shape, dtype=electrons.dtype) * scale
    return jnp.where(some, drawn, electrons)


def _of(value: Any, like: jax.Array) -> jax.Array:
    """A field in the type of `like`, a map with as many axes; 0 where it is not known."""
    array = jnp.asarray(0 if value is None else value, like.dtype)
    if array.ndim == 1:  # of each frame
        array = array[:, None, None]
    return array.reshape(*(1,) * (like.ndim - array.ndim), *array.shape) if array.ndim else array


def _is_none(value: Any, nothing: float = 0) -> bool:
    """Only for a Python number: skips drawing noise nobody asked for."""
    return value is None or (isinstance(value, int | float) and value == nothing)
