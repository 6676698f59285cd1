"""Airy: the PSF of a telescope at its diffraction limit, with obscuration and jitter."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dscsnet_jax.physics.psf import floating, require
from dscsnet_jax.physics.psf_tables import TabulatedTerms

_SQUARE = 8  # lambda/D, half the side of the square in which an Airy pattern is tabulated
_PERIOD = 32  # lambda/D, at which it repeats: what folds over into the square is below 4e-5
_BLUR = 0.3  # lambda/D, by which errors are blurred before they are weighed, much as by pixels
_FAINT = 2.5e-4  # of the light so blurred, a term left out: errors of pixels stay near 1e-4


@flax.struct.dataclass
class Airy:
    """Diffraction by a round aperture with a round obscuration in its middle, and jitter.

    At `v = pi r / resolution` from the centre the light per square pixel is

        pi (1 - e^2) / (4 resolution^2) ((2 J1(v) / v - e^2 2 J1(e v) / (e v)) / (1 - e^2))^2

    blurred by the jitter, within a square of `half` pixels to each side. The light beyond, 2 % of
    it without an obscuration and 9 % with one of 0.8, is missing: shares are not scaled up to a
    sum of 1. Profiles are sums of cosines up to the highest frequency that an aperture lets pass.

    Attributes:
      resolution: wavelength / diameter of the aperture, pixels.
      jitter: standard deviation of a round Gaussian, pixels; may be 0.
      obscuration: diameter of the obscuration / that of the aperture, `e`.
      half: half the side of the square, pixels.
      over: knots per pixel.

    References:
      M. Born, E. Wolf, Principles of Optics, 7th ed. (1999), sections 8.5.2 and 8.6.2.
    """

    free: ClassVar[dict[str, str]] = {"resolution": "log", "jitter": "square"}

    resolution: Any
    jitter: Any
    obscuration: float = flax.struct.field(pytree_node=False)
    half: int = flax.struct.field(pytree_node=False)
    over: int = flax.struct.field(pytree_node=False)

    def terms(self) -> TabulatedTerms:
        """Enough for errors of a pixel near 1e-4 of the light, for obscurations up to 0.8."""
        resolution, jitter = self._lengths()
        dtype = resolution.dtype
        share, amplitude = (jnp.asarray(a, dtype) for a in _airy_terms(self.obscuration))
        turn = jnp.asarray(2 * np.pi * np.arange(_PERIOD) / _PERIOD, dtype) / resolution
        # A pixel's box, the jitter, and from values at knots to coefficients of splines.
        passed = jnp.sinc(turn / (2 * np.pi)) * jnp.exp(-((turn * jitter) ** 2) / 2) / resolution
        passed = passed * 3 / (2 + jnp.cos(turn / self.over))
        reach = self.half * self.over
        knot = jnp.asarray(np.arange(-reach, reach + 1) / self.over, dtype)
        wave = jnp.cos(turn[:, None] * knot[None])
        wave = jnp.where((jnp.abs(knot) < _PERIOD / 2 * resolution)[None], wave, 0)
        cols = jnp.matmul(amplitude * passed[None], wave, precision="highest")
        table = jnp.stack([share[:, None] * cols, cols])
        return TabulatedTerms(table, jnp.zeros(2, dtype), self.over)

    @property
    def width(self) -> jax.Array:
        """(2,) standard deviation of a Gaussian of the same effective area, pixels."""
        frequency = (np.arange(256) + 0.5) / 256
        weight = 2 * np.pi * frequency * _transfer(frequency, self.obscuration) ** 2 / 256
        resolution, jitter = self._lengths()
        turn, weight = (jnp.asarray(a, resolution.dtype) for a in (2 * np.pi * frequency, weight))
        blurred = weight * jnp.exp(-((turn * (jitter / resolution)) ** 2))
        return jnp.broadcast_to(resolution / jnp.sqrt(4 * np.pi * blurred.sum()), (2,))

    def widened(self, factor: ArrayLike) -> Airy:
        """As much wider, within the same square."""
        resolution, jitter = (length * factor for length in self._lengths())
        return Airy(resolution, jitter, self.obscuration, self.half, self.over)

    def _lengths(self) -> tuple[jax.Array, jax.Array]:
        """Resolution and jitter, of the same floating type."""
        resolution = floating(self.resolution)
        return resolution, jnp.asarray(self.jitter, resolution.dtype)


def airy(width: float, *, obscuration: float = 0.0, jitter: float = 0.0) -> Airy:
    """An `Airy` PSF within 8 lambda/D of its centre along each axis.

    Others of the same square, `.replace(resolution=...)`, share its programs.

    Args:
      width: lambda/D, wavelength / diameter of the aperture, pixels.
      obscuration: diameter of the obscuration / that of the aperture, from 0 to below 1.
      jitter: standard deviation of a round Gaussian blur, pixels.

    Raises:
      ValueError: if one of them is out of range.

    Example:
      >>> [round(float(s), 3) for s in airy(1.2, jitter=0.1).width]
      [0.575, 0.575]
    """
    what = "of an Airy PSF: must be"
    require(0 < width < math.inf, f"width {width} {what} a positive number of pixels")
    require(0 <= obscuration < 1, f"obscuration {obscuration} {what} from 0 to below 1")
    require(0 <= jitter < math.inf, f"jitter {jitter} {what} 0 or more pixels")
    half, over = math.ceil(_SQUARE * width), max(3, math.ceil(5 / width))
    return Airy(float(width), float(jitter), float(obscuration), half, over)


@lru_cache
def _airy_terms(obscuration: float) -> tuple[np.ndarray, np.ndarray]:
    """(R,) factors and (R, J) amplitudes of cosines, in units of lambda/D.

    The pattern repeated is a sum of products of cosines, its transfer function at multiples of
    a frequency; terms are its modes where errors count blurred.
    """
    frequency = np.arange(_PERIOD) / _PERIOD
    norm = np.sqrt(np.where(frequency > 0, 2, 1) / _PERIOD)
    blur = norm * np.exp(-2 * (np.pi * _BLUR * frequency) ** 2)
    pair = _transfer(np.hypot(frequency[:, None], frequency), obscuration)
    share, mode = np.linalg.eigh(pair * np.outer(blur, blur))
    order = np.argsort(-np.abs(share))[: np.sum(np.abs(share) > _FAINT)]
    return share[order], mode[:, order].T * norm**2 / blur


def _transfer(frequency: np.ndarray, obscuration: float) -> np.ndarray:
    """What of a ring-shaped aperture covers itself displaced, at frequencies in D/lambda."""
    outer, inner = 0.5, obscuration / 2
    area = _common(outer, outer, frequency)
    if inner > 0:
        area = area - 2 * _common(outer, inner, frequency) + _common(inner, inner, frequency)
    return area / (np.pi * (outer**2 - inner**2))


def _common(first: float, second: float, apart: np.ndarray) -> np.ndarray:
    """Area that two discs have in common; the first radius is the larger."""
    apart = np.clip(apart, max(first - second, 1e-9), first + second)
    along = (apart**2 + first**2 - second**2) / (2 * apart)
    angles = [np.arccos(np.clip(x, -1, 1)) for x in (along / first, (apart - along) / second)]
    height = np.sqrt(np.maximum(first**2 - along**2, 0))
    return first**2 * angles[0] + second**2 * angles[1] - apart * height
