"""Matched filter: where a further target would explain most of what is left."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.physics.psf import Psf

SUBPIXELS = 3
"""Places per pixel side that are looked at."""


def matched_filter(residual: jax.Array, weight: jax.Array, psf: Psf) -> tuple[jax.Array, jax.Array]:
    """Energy and signal-to-noise ratio of a further target at every third of a pixel.

    Args:
      residual: (N, M) frame minus model, counts.
      weight: (N, M) one over the variance of the pixels; 0: not used.
      psf: of the target.

    Returns:
      Energies (3N, 3M), counts, and their ratios to their errors; place `i` is at pixel
      `(i - 1) / 3`.
    """
    terms = psf.terms()
    in_row, in_col = (
        terms.responses(axis, jnp.asarray(places(num), residual.dtype), num)
        for axis, num in enumerate(residual.shape)
    )

    def correlate(image: jax.Array, along_row: jax.Array, along_col: jax.Array) -> jax.Array:
        return jnp.einsum("tip,ij,tjq->pq", along_row, image, along_col, precision="highest")

    def of_pair(pair: jax.Array) -> jax.Array:
        """What two terms add to the PSF's square."""
        row, col = (along[pair[0]] * along[pair[1]] for along in (in_row, in_col))
        return correlate(weight, row[None], col[None]) * jnp.where(pair[0] == pair[1], 1, 2)

    pairs = jnp.asarray(np.stack(np.triu_indices(len(in_row)), 1))
    information = of_pair(pairs[0])
    if len(pairs) > 1:  # one after the other: large frames are large
        add = lambda total, pair: (total + of_pair(pair), None)  # noqa: E731
        information, _ = jax.lax.scan(add, information, pairs[1:])
    seen = information > 0
    signal = correlate(weight * residual, in_row, in_col)
    divisor = jnp.where(seen, information, 1)
    return jnp.where(seen, signal / divisor, 0), jnp.where(seen, signal * jax.lax.rsqrt(divisor), 0)


def places(num_pixels: int) -> np.ndarray:
    """Coordinates that `matched_filter` looks at along an axis, pixels.

    Example:
      >>> places(2).round(2).tolist()
      [-0.33, 0.0, 0.33, 0.67, 1.0, 1.33]
    """
    return (np.arange(SUBPIXELS * num_pixels) - (SUBPIXELS - 1) / 2) / SUBPIXELS
