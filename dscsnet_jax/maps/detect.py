"""Detect: isolated peaks of a frame by the matched filter, without a network."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.batching import frames_per_block, in_blocks
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.matched_filter import SUBPIXELS, matched_filter
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.pixels import variance
from dscsnet_jax.inference.prior import least_energy
from dscsnet_jax.physics.targets import Targets

LEAST_SNR = 5.0
"""Signal-to-noise ratio of the faintest peak that counts as a target."""

_SLOTS = 16


@partial(jax.jit, static_argnames="max_targets")
def detect(
    observation: Observation,
    known: Known,
    *,
    max_targets: int,
    least_energy: float = 0.0,
    least_snr: float = LEAST_SNR,
) -> Targets:
    """Local maxima of the matched filter, one target per peak.

    Args:
      observation: B frames.
      known: PSF and gain.
      max_targets: slots of the answer; the most significant peaks are kept.
      least_energy: counts.
      least_snr: signal-to-noise ratio of the faintest peak.

    Returns:
      `Targets` (B, max_targets, ...), the most significant first.

    Example:
      >>> from dscsnet_jax.inference.observation import observe
      >>> from dscsnet_jax.physics.optics import render
      >>> from dscsnet_jax.physics.preset import Sensor
      >>> from dscsnet_jax.physics.psf import Gaussian
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> y = render(from_lists([[(3.0, 7.0, 200.0)]]), frame_size=11, psf=0.5)
      >>> seen = observe(y, Sensor(read_noise=1.0))
      >>> found = detect(seen, Known(psf=Gaussian(0.5)), max_targets=4)
      >>> found.count.tolist(), found.position[0, 0].tolist()
      ([1], [3.0, 7.0])
    """

    def one(seen: Observation) -> Targets:
        residual = jnp.where(seen.valid, seen.counts - seen.neighbours - seen.level, 0)
        spread = variance(seen, known.light_noise, jnp.zeros_like(seen.counts))[0]
        weight = jnp.where(seen.valid, 1 / spread, 0)
        energy, ratio = matched_filter(residual, weight, known.psf)
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
    observation: Observation, known: Known, *, max_targets: int, least_snr: float = LEAST_SNR
) -> Targets:
    """`detect` for any number of frames, block by block, as NumPy arrays.

    Peaks hold at least half the least intensity of the prior. There are at least 16 slots,
    so that calls for a few targets share a program.
    """
    pixels = int(np.prod(observation.counts.shape[1:]))
    look = partial(
        detect,
        max_targets=min(max(_SLOTS, max_targets), SUBPIXELS**2 * pixels or 1),
        least_energy=least_energy(known.prior),
        least_snr=least_snr,
    )
    return in_blocks(look, observation, known, size=frames_per_block(observation.counts.shape[1:]))


def _largest_nearby(values: jax.Array) -> jax.Array:
    """Largest value within a pixel in row and col."""
    reach = (2 * SUBPIXELS + 1,) * 2
    return jax.lax.reduce_window(values, -jnp.inf, jax.lax.max, reach, (1, 1), "SAME")
