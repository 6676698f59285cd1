"""Observe: recorded frames with what is known, or estimated, of sensor and background."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dscsnet_jax.physics.optics import psf_sigma

# Frames without any noise get this share of their brightest pixel.
_LEAST_NOISE = 1e-3
_CLIP_BELOW, _CLIP_ABOVE, _CLIP_ROUNDS = 4.0, 2.5, 8
_ONE_SIGMA_BELOW = 0.1587
_MEDIAN_ERROR = 1.2533  # standard error of a median, in those of a mean


@flax.struct.dataclass
class Observation:
    """Recorded frames and what is known of their sensor; every field may be batched.

    Attributes:
      counts: (..., N, M) recorded counts; for saturated pixels the least value that
        saturates.
      valid: (..., N, M) bool, pixels to be used.
      saturated: (..., N, M) bool, pixels at the full well.
      noise: (...,) standard deviation of read noise and quantisation, counts.
      background: (...,) expected background, counts.
      background_std: (...,) its standard deviation, counts; 0: known.
      gain: (...,) electrons per count of the shot noise; inf: no shot noise.
      sigma: (..., 2) standard deviation of the PSF in row and col, pixels.
    """

    # JAX arrays inside a computation, NumPy arrays between two of them.
    counts: Any
    valid: Any
    saturated: Any
    noise: Any
    background: Any
    background_std: Any
    gain: Any
    sigma: Any


def observe(
    frames: ArrayLike,
    *,
    sigma: ArrayLike | tuple[float, float],
    noise: ArrayLike | None = None,
    background: ArrayLike | None = None,
    saturation: ArrayLike = float("inf"),
    gain: ArrayLike = float("inf"),
    valid: ArrayLike | None = None,
) -> Observation:
    """Put frames together with their sensor; what is not given is estimated from each frame.

    The background is the median of the pixels left after clipping those more than 2.5
    standard deviations above it; the noise is the distance from there to the 16th
    percentile, which targets do not touch. Frames of whole counts have at least the
    noise of rounding, 1/sqrt(12).

    Args:
      frames: (B, N, M) recorded counts.
      sigma: PSF standard deviation, pixels; a number or (sigma_row, sigma_col).
      noise: standard deviation of read noise (and other noise but shot noise and
        rounding), counts, a number or (B,); None: estimated.
      background: counts, a number or (B,); None: estimated, with its error.
      saturation: full well, counts; pixels there are censored.
      gain: electrons per count of the shot noise; inf: none.
      valid: (B, N, M) bool; None: the finite pixels.

    Returns:
      A batched `Observation`.

    Example:
      >>> import jax
      >>> y = 10 + 2 * jax.random.normal(jax.random.key(0), (1, 64, 64))
      >>> seen = observe(y, sigma=0.5)
      >>> round(float(seen.background[0])), round(float(seen.noise[0]))
      (10, 2)
    """
    frames = jnp.asarray(frames)
    frames = frames if jnp.issubdtype(frames.dtype, jnp.floating) else frames.astype(float)
    dtype, length = frames.dtype, len(frames)
    valid = jnp.isfinite(frames) if valid is None else jnp.asarray(valid)
    frames = jnp.where(valid, frames, 0)
    per_frame = partial(_per_frame, length=length, dtype=dtype)
    whole = (frames == jnp.round(frames)).all((-2, -1))
    rounding = jnp.where(whole, 12**-0.5, 0).astype(dtype)
    saturated = valid & (frames >= per_frame(saturation)[:, None, None])
    level, spread = jax.vmap(_clipped)(frames.reshape(length, -1), valid.reshape(length, -1))
    num = jnp.maximum(valid.sum((-2, -1)), 1)
    least = _LEAST_NOISE * jnp.abs(frames - level[:, None, None]).max((-2, -1))
    if noise is None:
        spread = jnp.maximum(jnp.maximum(spread, rounding), least)
    else:
        spread = jnp.sqrt(per_frame(noise) ** 2 + rounding**2)
        spread = jnp.where(spread > 0, spread, least)
    spread = jnp.where(spread > 0, spread, 1)
    known = background is not None
    error = jnp.zeros_like(level) if known else 2 * _MEDIAN_ERROR * spread / jnp.sqrt(num)
    edge = per_frame(saturation) - jnp.where(whole, 0.5, 0)
    return Observation(
        counts=jnp.where(saturated, edge[:, None, None], frames),
        valid=valid,
        saturated=saturated,
        noise=spread,
        background=level if background is None else per_frame(background),
        background_std=error,
        gain=per_frame(gain),
        sigma=jnp.broadcast_to(psf_sigma(sigma).astype(dtype), (length, 2)),
    )


def _per_frame(value: ArrayLike, *, length: int, dtype: Any) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(value, dtype), (length,))


def _clipped(y: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Median and standard deviation (from below) of the pixels that are background.

    The kept pixels are a run of the sorted ones, so that nothing is sorted twice.
    """
    ordered = jnp.sort(jnp.where(valid, y, jnp.inf))

    def between(low: jax.Array, high: jax.Array, share: float) -> jax.Array:
        at = low + share * jnp.maximum(high - low - 1, 0)
        below = jnp.floor(at).astype(jnp.int32)
        above = jnp.minimum(below + 1, jnp.maximum(high - 1, 0))
        part = at - below
        # Pixels that are not valid are infinite, and no share of them is wanted.
        first, second = (jnp.where(jnp.isfinite(v), v, 0) for v in (ordered[below], ordered[above]))
        return (1 - part) * first + part * second

    def measure(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        level = between(low, high, 0.5)
        return level, level - between(low, high, _ONE_SIGMA_BELOW)

    def clip(state: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple, None]:
        level, spread = state
        # A hundredth more, so that equal pixels are not all thrown out by rounding.
        low = (ordered < level - _CLIP_BELOW * 1.01 * spread).sum()
        high = (ordered <= level + _CLIP_ABOVE * spread).sum()
        return measure(low, high), None

    some = valid.any()
    start = measure(jnp.zeros((), jnp.int32), valid.sum())
    level, spread = jax.lax.scan(clip, start, None, length=_CLIP_ROUNDS)[0]
    return jnp.where(some, level, 0), jnp.where(some, spread, 0)
