"""Matched filter: where a further target would explain most of what is left."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.physics import optics

SUBPIXELS = 3
"""Places per pixel side that are looked at."""


def matched_filter(
    residual: jax.Array, weight: jax.Array, sigma: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Energy and signal-to-noise ratio of a further target at every third of a pixel.

    Args:
      residual: (N, M) frame minus model, counts.
      weight: (N, M) one over the variance of the pixels; 0: not used.
      sigma: PSF standard deviation, pixels, a number or (2,).

    Returns:
      Energies (3N, 3M), counts, and their ratios to their errors; place `i` is at pixel
      `(i - 1) / 3`.
    """
    responses = [
        optics.point_response(places(num).astype(residual.dtype), num, width)
        for num, width in zip(residual.shape, optics.psf_sigma(sigma), strict=True)
    ]

    def correlate(image: jax.Array, power: int) -> jax.Array:
        in_row, in_col = (r**power for r in responses)
        return jnp.einsum("pi,ij,qj->pq", in_row, image, in_col, precision="highest")

    information = correlate(weight, 2)
    seen = information > 0
    signal = correlate(weight * residual, 1)
    divisor = jnp.where(seen, information, 1)
    return jnp.where(seen, signal / divisor, 0), jnp.where(seen, signal * jax.lax.rsqrt(divisor), 0)


def places(num_pixels: int) -> np.ndarray:
    """Coordinates that `matched_filter` looks at along an axis, pixels.

    Example:
      >>> places(2).round(2).tolist()
      [-0.33, 0.0, 0.33, 0.67, 1.0, 1.33]
    """
    return (np.arange(SUBPIXELS * num_pixels) - (SUBPIXELS - 1) / 2) / SUBPIXELS
