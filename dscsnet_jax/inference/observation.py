"""Observation: windows of recorded pixels, with what is known or estimated of each."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# Frames without any noise get this share of their brightest pixel.
_LEAST_NOISE = 1e-3
_CLIP_BELOW, _CLIP_ABOVE, _CLIP_ROUNDS = 4.0, 2.5, 8
_ONE_SIGMA_BELOW = 0.1587
_MEDIAN_ERROR = 1.2533  # standard error of a median, in those of a mean
_CLIP_AGAIN = 4.0  # standard deviations
_LEAST_OF_FIRST = 0.5  # a fit of few pixels may leave next to nothing
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
      noise: (...,) standard deviation of read noise and quantisation, counts.
      pedestal: (...,) electronic offset, counts; it has no noise of its own.
      background: (...,) expected photon background, counts; its shot noise goes by the gain.
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
        """(...,) expected counts of a pixel without targets."""
        return self.pedestal + self.background


def observe(
    frames: ArrayLike,
    *,
    noise: ArrayLike | None = None,
    pedestal: ArrayLike | None = None,
    background: ArrayLike | None = None,
    saturation: ArrayLike = float("inf"),
    gain: ArrayLike | None = None,
    valid: ArrayLike | None = None,
) -> Observation:
    """Put frames together with their sensor; what is not given is estimated from each frame.

    The level of the sky is the median of the pixels left after clipping those more than 2.5
    standard deviations above it; the noise is the distance from there to the 16th
    percentile, which targets do not touch. Frames of whole counts have at least the
    noise of rounding, 1/sqrt(12). Where no background is told, it is the level above the
    pedestal: all of it without one.

    Args:
      frames: (B, N, M) recorded counts.
      noise: standard deviation of read noise (and other noise but shot noise and
        rounding), counts, a number or (B,); None: estimated.
      pedestal: electronic offset, counts, a number or (B,); None: 0.
      background: photon background, counts, a number or (B,); None: estimated, with its
        error.
      saturation: saturation level, counts; pixels there are censored.
      gain: electrons per count of the shot noise; None: none.
      valid: (B, N, M) bool; None: the finite pixels.

    Returns:
      A batched `Observation`.

    Example:
      >>> import jax
      >>> y = 10 + 2 * jax.random.normal(jax.random.key(0), (1, 64, 64))
      >>> seen = observe(y)
      >>> round(float(seen.level[0])), round(float(seen.noise[0]))
      (10, 2)
    """
    frames = jnp.asarray(frames)
    frames = frames if jnp.issubdtype(frames.dtype, jnp.floating) else frames.astype(float)
    dtype, length = frames.dtype, frames.shape[0]
    valid = jnp.isfinite(frames) if valid is None else jnp.asarray(valid)
    frames = jnp.where(valid, frames, 0)
    per_frame = partial(_per_frame, length=length, dtype=dtype)
    whole = (frames == jnp.round(frames)).all((-2, -1))
    rounding = jnp.where(whole, ROUNDING, 0).astype(dtype)
    saturated = valid & (frames >= per_frame(saturation)[:, None, None])
    level, spread = jax.vmap(_clipped)(frames.reshape(length, -1), valid.reshape(length, -1))
    num = jnp.maximum(valid.sum((-2, -1)), 1)
    least = _LEAST_NOISE * jnp.abs(frames - level[:, None, None]).max((-2, -1))
    offset = per_frame(0 if pedestal is None else pedestal)
    photons = level - offset if background is None else per_frame(background)
    shot = 0 * level if gain is None else jnp.maximum(photons, 0) / per_frame(gain)
    if noise is None:
        total = jnp.maximum(jnp.maximum(spread, rounding), least)
        read = _root(jnp.maximum(total**2 - shot, rounding**2))
    else:
        read = _root(per_frame(noise) ** 2 + rounding**2)
    # Without any noise of its own a pixel has that of the frame's last digits.
    read = jnp.where(read**2 + shot > 0, read, least)
    read = jnp.where(read**2 + shot > 0, read, 1)
    error = 2 * _MEDIAN_ERROR * _root(read**2 + shot) / jnp.sqrt(num.astype(dtype))
    edge = per_frame(saturation) - jnp.where(whole, 0.5, 0).astype(dtype)
    return Observation(
        counts=jnp.where(saturated, edge[:, None, None], frames),
        valid=valid,
        saturated=saturated,
        neighbours=jnp.zeros_like(frames),
        origin=jnp.zeros((length, 2), dtype),
        noise=read,
        pedestal=offset,
        background=photons,
        background_std=jnp.zeros_like(level) if background is not None else error,
    )


def remeasured(
    seen: Observation, source: jax.Array, num_targets: jax.Array, gain: ArrayLike | None = None
) -> Observation:
    """Noise and level measured once more, with all targets subtracted; what is told stays.

    Without targets to be afraid of, all pixels within four standard deviations of a first
    measurement are used, less three for each target, which its fit has used up.

    Args:
      seen: `Observation` of (B, N, M), whose noise was estimated.
      source: (B, N, M) expected counts of the targets.
      num_targets: (B,) how many there are.
      gain: electrons per count of the shot noise; None: none.

    Returns:
      The `Observation` with another noise and, where the background was estimated, another
      background.

    Example:
      >>> y = 10 + 2 * jax.random.normal(jax.random.key(0), (1, 64, 64))
      >>> again = remeasured(observe(y), jnp.zeros_like(y), jnp.zeros(1))
      >>> round(float(again.background[0]), 1), round(float(again.noise[0]), 1)
      (10.0, 2.0)
    """
    length, dtype = seen.counts.shape[0], seen.counts.dtype
    used = seen.valid & ~seen.saturated
    left = jnp.where(used, seen.counts - seen.neighbours - source, 0)
    first = observe(left, valid=used)
    off = jnp.abs(left - first.background[:, None, None])
    near = used & (off <= _CLIP_AGAIN * first.noise[:, None, None])
    number = jnp.maximum(near.sum((1, 2)), 1).astype(dtype)
    freedom = jnp.maximum(number - 1 - 3 * num_targets, number / 2)

    def total(values: jax.Array) -> jax.Array:
        return jnp.where(near, values, 0).sum((1, 2))

    level = total(left) / number
    square = total((left - level[:, None, None]) ** 2) / freedom
    unknown = seen.background_std > 0
    background = jnp.where(unknown, level - seen.pedestal, seen.background)
    sky = shot = jnp.zeros_like(level)
    if gain is not None:
        electrons = _per_frame(gain, length=length, dtype=dtype)
        light = background[:, None, None] + seen.neighbours + source
        sky = jnp.maximum(background, 0) / electrons
        shot = total(jnp.maximum(light, 0)) / number / electrons
    whole = ((seen.counts == jnp.round(seen.counts)) | seen.saturated).all((1, 2))
    least = jnp.maximum(_LEAST_OF_FIRST * seen.noise, jnp.where(whole, ROUNDING, 0).astype(dtype))
    noise = jnp.maximum(_root(jnp.maximum(square - shot, 0)), least)
    noise = jnp.where(noise**2 + sky > 0, noise, first.noise)
    error = jnp.sqrt((noise**2 + sky) / number)
    return dataclasses.replace(
        seen,
        noise=noise,
        background=background,
        background_std=jnp.where(unknown, error, 0),
    )


def _per_frame(value: ArrayLike, *, length: int, dtype: Any) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(value, dtype), (length,))


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
