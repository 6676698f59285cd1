"""Observation: windows of recorded pixels, with what is known or estimated of each."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dscsnet_jax.physics.sensor import Sensor

# Frames without any noise get this share of their brightest pixel.
_LEAST_NOISE = 1e-3
_CLIP_BELOW, _CLIP_ABOVE, _CLIP_ROUNDS = 4.0, 2.5, 8
_ONE_SIGMA_BELOW = 0.1587
_MEDIAN_ERROR = 1.2533  # standard error of a median, in those of a mean
_CLIP_AGAIN = 4.0  # standard deviations
_LEAST_OF_FIRST = 0.5  # a fit of few pixels may leave next to nothing
PER_PIXEL = ("noise", "pedestal", "background")
"""Fields of an `Observation` that are maps, or one number for all pixels."""
ROUNDING = 12**-0.5
"""Standard deviation of rounding to whole counts."""


@flax.struct.dataclass
class Observation:
    """Recorded pixels of windows, which may be whole frames; every field may be batched.

    Attributes:
      counts: (..., N, M) recorded counts; for saturated pixels the least value that
        saturates.
      valid: (..., N, M) bool, pixels to be used.
      saturated: (..., N, M) bool, pixels at the saturation level.
      neighbours: (..., N, M) expected counts of targets that are not the window's own.
      origin: (..., 2) row and col of the first pixel in the frame.
      noise: (..., N, M) or (..., 1, 1) standard deviation of read noise and quantisation,
        counts.
      pedestal: the same of the electronic offset, counts; it has no noise of its own.
      background: the same of the expected photon background, counts; its shot noise goes by
        the gain.
      background_std: (...,) standard deviation of pedestal and background together,
        counts; 0: known.
    """

    # JAX arrays inside a computation, NumPy arrays between two of them.
    counts: Any
    valid: Any
    saturated: Any
    neighbours: Any
    origin: Any
    noise: Any
    pedestal: Any
    background: Any
    background_std: Any

    @property
    def level(self) -> Any:
        """Expected counts of a pixel without targets, (..., N, M) or (..., 1, 1)."""
        return self.pedestal + self.background


def observe(
    frames: ArrayLike, sensor: Sensor | None = None, *, valid: ArrayLike | None = None
) -> Observation:
    """Put frames together with their sensor; what is not known is estimated from each frame.

    The level of the sky is the median of the pixels left after clipping those more than 2.5
    standard deviations above it; the noise is the distance from there to the 16th
    percentile, which targets do not touch. Frames of whole counts have at least the
    noise of rounding, 1/sqrt(12). Where no background is known, it is the level above the
    pedestal: all of it without one. A pixel is valid if it is finite, not bad, and its read
    noise a finite number.

    Args:
      frames: (B, N, M) recorded counts.
      sensor: what is known; None: nothing. Its read noise is without shot noise and rounding.
      valid: (B, N, M) bool; None: the pixels that are.

    Returns:
      A batched `Observation`.

    Example:
      >>> import jax
      >>> y = 10 + 2 * jax.random.normal(jax.random.key(0), (1, 64, 64))
      >>> seen = observe(y)
      >>> round(float(seen.level[0, 0, 0])), round(float(seen.noise[0, 0, 0]))
      (10, 2)
      >>> observe(y, Sensor(read_noise=2.0, background=10.0)).background_std.tolist()
      [0.0]
    """
    sensor = Sensor() if sensor is None else sensor
    frames = jnp.asarray(frames)
    frames = frames if jnp.issubdtype(frames.dtype, jnp.floating) else frames.astype(float)
    dtype, length = frames.dtype, frames.shape[0]
    of_pixels = partial(_of_pixels, like=frames)
    told = None if sensor.read_noise is None else of_pixels(sensor.read_noise)
    if valid is None:
        valid = jnp.isfinite(frames)
        valid = (
            valid if sensor.bad_pixels is None else valid & ~jnp.asarray(sensor.bad_pixels)[None]
        )
        valid = valid if told is None else valid & jnp.isfinite(told)
    valid = jnp.broadcast_to(valid, frames.shape)
    frames = jnp.where(valid, frames, 0)
    whole = (frames == jnp.round(frames)).all((-2, -1), keepdims=True)
    whole = whole if sensor.quantised is None else jnp.full_like(whole, sensor.quantised)
    rounding = jnp.where(whole, ROUNDING, 0).astype(dtype)
    well = of_pixels(jnp.inf if sensor.saturation is None else sensor.saturation)
    saturated = valid & (frames >= well)
    pedestal = of_pixels(0 if sensor.pedestal is None else sensor.pedestal)
    above = frames - pedestal - of_pixels(0 if sensor.background is None else sensor.background)
    measured = jax.vmap(_clipped)(above.reshape(length, -1), valid.reshape(length, -1))
    level, spread = (a[:, None, None] for a in measured)
    most = jnp.where(valid, jnp.abs(above - level), 0).max((-2, -1), keepdims=True)
    least = _LEAST_NOISE * most
    photons = level if sensor.background is None else of_pixels(sensor.background)
    gain = sensor.effective_gain
    shot = 0 * level if gain is None else jnp.maximum(photons, 0) / of_pixels(gain)
    if told is None:
        total = jnp.maximum(jnp.maximum(spread, rounding), least)
        # One number for the frame: what is left of its spread beside the typical shot noise.
        read = _root(jnp.maximum(total**2 - shot.mean((-2, -1), keepdims=True), rounding**2))
    else:
        read = _root(jnp.where(jnp.isfinite(told), told, 0) ** 2 + rounding**2)
    # Without any noise of its own a pixel has that of the frame's last digits.
    read = jnp.where(read**2 + shot > 0, read, least)
    read = jnp.where(read**2 + shot > 0, read, 1)
    error = _root(_mean(read**2 + shot, valid)) / jnp.sqrt(_number(valid).astype(dtype))
    unknown = sensor.background is None
    return Observation(
        counts=jnp.where(saturated, well - jnp.where(whole, 0.5, 0).astype(dtype), frames),
        valid=valid,
        saturated=saturated,
        neighbours=jnp.zeros_like(frames),
        origin=jnp.zeros((length, 2), dtype),
        noise=read,
        pedestal=pedestal,
        background=photons,
        background_std=2 * _MEDIAN_ERROR * error if unknown else jnp.zeros_like(error),
    )


def remeasured(
    seen: Observation,
    source: jax.Array,
    num_targets: jax.Array,
    gain: ArrayLike | None = None,
    misfit: ArrayLike | None = None,
) -> Observation:
    """Noise and level measured once more, with all targets subtracted; what is told stays.

    Without targets to be afraid of, all pixels within four standard deviations of a first
    measurement are used, less three for each target, which its fit has used up.

    Args:
      seen: `Observation` of (B, N, M), whose noise was estimated.
      source: (B, N, M) expected counts of the targets.
      num_targets: (B,) how many there are.
      gain: effective gain of the shot noise, `Sensor.effective_gain`; None: none.
      misfit: of the light of targets, `Sensor.misfit`; where it is more than the noise, pixels
        are not used; None: none.

    Returns:
      The `Observation` with another noise and, where the background was estimated, another
      background.

    Example:
      >>> y = 10 + 2 * jax.random.normal(jax.random.key(0), (1, 64, 64))
      >>> again = remeasured(observe(y), jnp.zeros_like(y), jnp.zeros(1))
      >>> round(float(again.background[0, 0, 0]), 1), round(float(again.noise[0, 0, 0]), 1)
      (10.0, 2.0)
    """
    dtype = seen.counts.dtype
    used = seen.valid & ~seen.saturated
    unknown = (seen.background_std > 0)[:, None, None]
    sky = seen.pedestal + jnp.where(unknown, 0, seen.background)
    left = jnp.where(used, seen.counts - seen.neighbours - source - sky, 0)
    first = observe(left, valid=used)
    off = jnp.abs(left - first.background)
    near = used & (off <= _CLIP_AGAIN * first.noise)
    if misfit is not None:
        off_by = _of_pixels(misfit, like=left) * jnp.maximum(seen.neighbours + source, 0)
        near = near & (off_by <= first.noise)
    number = _number(near).astype(dtype)
    freedom = jnp.maximum(number - 1 - 3 * num_targets, number / 2)
    level = jnp.where(near, left, 0).sum((1, 2)) / number
    off = left - level[:, None, None]
    square = jnp.where(near, off**2, 0).sum((1, 2)) / freedom
    background = jnp.where(unknown, level[:, None, None], seen.background)
    sky_noise = shot = jnp.zeros((len(level), 1, 1), dtype)
    if gain is not None:
        electrons = _of_pixels(gain, like=left)
        light = background + seen.neighbours + source
        sky_noise = jnp.maximum(background, 0) / electrons
        shot = _mean(jnp.maximum(light, 0), near)[:, None, None] / electrons
    if misfit is not None:
        shot = shot + _mean(off_by**2, near)[:, None, None]
    recorded = (seen.counts == jnp.round(seen.counts)) | seen.saturated
    whole = recorded.all((1, 2), keepdims=True)
    least = jnp.maximum(_LEAST_OF_FIRST * seen.noise, jnp.where(whole, ROUNDING, 0).astype(dtype))
    noise = jnp.maximum(_root(jnp.maximum(square[:, None, None] - shot, 0)), least)
    noise = jnp.where(noise**2 + sky_noise > 0, noise, first.noise)
    error = _root(_mean(noise**2 + sky_noise, near)) / jnp.sqrt(number)
    return dataclasses.replace(
        seen,
        noise=noise,
        background=background,
        background_std=jnp.where(unknown[:, 0, 0], error, 0),
    )


def _of_pixels(value: ArrayLike, *, like: jax.Array) -> jax.Array:
    """A number, one for each frame, a map or planes, as (B, 1, 1) or (B, N, M)."""
    array = jnp.asarray(value, like.dtype)
    if array.ndim < 2:
        return jnp.broadcast_to(array.reshape(-1, 1, 1), (like.shape[0], 1, 1))
    return jnp.broadcast_to(array, like.shape)


def _number(used: jax.Array) -> jax.Array:
    """(B,) pixels used, at least 1."""
    return jnp.maximum(used.sum((1, 2)), 1)


def _mean(values: jax.Array, used: jax.Array) -> jax.Array:
    """(B,) mean of the pixels used; of one number, itself."""
    if values.shape[1:] == (1, 1):
        return values[:, 0, 0]
    return jnp.where(used, values, 0).sum((1, 2)) / _number(used)


def _root(value: jax.Array) -> jax.Array:
    """Square root, whose derivative at 0 is 0."""
    return jnp.where(value > 0, jnp.sqrt(jnp.where(value > 0, value, 1)), 0)


def _clipped(y: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Median and standard deviation (from below) of the pixels that are background.

    The kept pixels are a run of the sorted ones, so that nothing is sorted twice.
    """
    ordered = jnp.sort(jnp.where(valid, y, jnp.inf))

    def between(low: jax.Array, high: jax.Array, share: float) -> jax.Array:
        at = low + share * jnp.maximum(high - low - 1, 0).astype(y.dtype)
        below = jnp.floor(at).astype(jnp.int32)
        above = jnp.minimum(below + 1, jnp.maximum(high - 1, 0))
        part = at - below
        first, second = (_finite(ordered[i]) for i in (below, above))
        return (1 - part) * first + part * second

    def measure(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        level = between(low, high, 0.5)
        return level, level - between(low, high, _ONE_SIGMA_BELOW)

    def clip(state: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple, None]:
        level, spread = state
        # A hundredth more, so that equal pixels are not all thrown out by rounding.
        low = (ordered < level - _CLIP_BELOW * 1.01 * spread).sum(dtype=jnp.int32)
        high = (ordered <= level + _CLIP_ABOVE * spread).sum(dtype=jnp.int32)
        return measure(low, high), None

    start = measure(jnp.zeros((), jnp.int32), valid.sum(dtype=jnp.int32))
    return jax.lax.scan(clip, start, None, length=_CLIP_ROUNDS)[0]


def _finite(value: jax.Array) -> jax.Array:
    """Zero for the filling of pixels that are not valid."""
    return jnp.where(jnp.isfinite(value), value, 0)
