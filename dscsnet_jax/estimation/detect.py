"""Detect: isolated peaks of a frame by the matched filter, without a network."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.estimation.blocks import frames_per_block, in_blocks
from dscsnet_jax.estimation.observe import Observation
from dscsnet_jax.physics import optics
from dscsnet_jax.physics.targets import Targets

SUBPIXELS = 3
"""Places per pixel at which the filter looks for a target."""

LEAST_SNR = 5.0
"""Signal-to-noise ratio of the faintest peak that counts as a target."""

_SLOTS = 16


def matched_filter(
    residual: jax.Array, weight: jax.Array, sigma: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Energy and signal-to-noise ratio of a further target at every third of a pixel.

    Args:
      residual: (N, M) frame minus model, counts.
      weight: (N, M) one over the variance of the pixels; 0: not used.
      sigma: (2,) PSF standard deviations, pixels.

    Returns:
      Energies (3N, 3M), counts, and their ratios to their errors; place `i` is at pixel
      `(i - 1) / 3`.
    """
    shape = residual.shape
    responses = [
        optics.point_response(places(num).astype(residual.dtype), num, width)
        for num, width in zip(shape, sigma, strict=True)
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


@partial(jax.jit, static_argnames="max_targets")
def detect(
    observation: Observation,
    *,
    max_targets: int,
    least_energy: float = 0.0,
    least_snr: float = LEAST_SNR,
) -> Targets:
    """Local maxima of the matched filter, one a peak.

    Args:
      observation: B frames.
      max_targets: slots of the answer; the most significant peaks are kept.
      least_energy: counts.
      least_snr: signal-to-noise ratio of the faintest peak.

    Returns:
      `Targets` (B, max_targets, ...), the most significant first.

    Example:
      >>> from dscsnet_jax.estimation.observe import observe
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> y = optics.render(from_lists([[(3.0, 7.0, 200.0)]]), frame_size=11, sigma=0.5)
      >>> found = detect(observe(y, sigma=0.5, noise=1.0), max_targets=4)
      >>> found.count.tolist(), found.position[0, 0].tolist()
      ([1], [3.0, 7.0])
    """

    def one(seen: Observation) -> Targets:
        residual = jnp.where(seen.valid, seen.counts - seen.background, 0)
        weight = jnp.where(seen.valid & (seen.noise > 0), 1 / seen.noise**2, 0)
        energy, ratio = matched_filter(residual, weight, seen.sigma)
        highest = _largest_nearby(ratio)
        # Of equal neighbours the first in the order of the places is the peak.
        order = -jnp.arange(ratio.size, dtype=ratio.dtype).reshape(ratio.shape)
        top = ratio >= highest
        peak = top & (order >= _largest_nearby(jnp.where(top, order, -jnp.inf)))
        peak = peak & (ratio >= least_snr) & (energy >= least_energy)
        value, index = jax.lax.top_k(jnp.where(peak, ratio, 0).reshape(-1), max_targets)
        row, col = jnp.divmod(index, ratio.shape[1])
        position = (jnp.stack([row, col], -1) - (SUBPIXELS - 1) / 2) / SUBPIXELS
        mask = value > 0
        return Targets(
            jnp.where(mask[:, None], position.astype(residual.dtype), 0),
            jnp.where(mask, energy.reshape(-1)[index], 0),
            mask,
        )

    return jax.vmap(one)(observation)


def peaks_of(
    observation: Observation, *, max_targets: int, least_energy: float, least_snr: float = LEAST_SNR
) -> Targets:
    """`detect` for any number of frames, block by block, as NumPy arrays.

    There are at least 16 slots, so that calls for a few targets share a program.
    """
    pixels = int(np.prod(observation.counts.shape[1:]))
    look = partial(
        detect,
        max_targets=min(max(_SLOTS, max_targets), SUBPIXELS**2 * pixels or 1),
        least_energy=least_energy,
        least_snr=least_snr,
    )
    return in_blocks(look, observation, size=frames_per_block(observation.counts.shape[1:]))


def _largest_nearby(values: jax.Array) -> jax.Array:
    """Largest value within a pixel in row and col."""
    reach = (2 * SUBPIXELS + 1,) * 2
    return jax.lax.reduce_window(values, -jnp.inf, jax.lax.max, reach, (1, 1), "SAME")
