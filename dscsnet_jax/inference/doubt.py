"""Doubt: which fits are to be compared with other counts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dscsnet_jax.inference.changes import closest_pair
from dscsnet_jax.inference.fit import Fit
from dscsnet_jax.inference.known import Known

NEAR, DOUBTED = 1, 2
"""Degrees of doubt."""
_UNEXPLAINED = 3.0  # standard deviations of chi square
_DOUBTFUL_SNR = 6.0
_DOUBTFUL_LATENT = 2.0  # standard deviations expected of fits
_LEAST_SPREAD = 0.01  # of the prior's variance
_CLOSE = 1.3  # PSF sigmas


def doubt(best: Fit, known: Known) -> jax.Array:
    """(B,) degree of doubt: 0, or targets are near to each other, or more than that.

    More is that the noise does not explain the fit, or a target may be too much or two.
    """
    mask, intensity = best.targets.mask, best.targets.intensity
    freedom = jnp.maximum(best.num_pixels - 3 * mask.sum(-1), 1).astype(intensity.dtype)
    unexplained = best.chi_square > freedom + _UNEXPLAINED * jnp.sqrt(2 * freedom)
    weak = mask & ~(intensity > _DOUBTFUL_SNR * best.std[..., 2])
    close = closest_pair(best.targets)[0] < _CLOSE * known.psf.width.mean()
    doubted = unexplained | weak.any(-1) | ~best.converged
    if known.prior.intensity is not None:
        doubted |= _unlikely(best, known)
    return jnp.where(doubted, DOUBTED, jnp.where(close, NEAR, 0)).astype(jnp.int32)


def _unlikely(best: Fit, known: Known) -> jax.Array:
    """(B,) bool: a target, or all together, brighter or fainter than the prior expects.

    The fit draws `v` to 0 the more, the less the window tells: over scenes, fitted ones vary
    by the variance of the prior, 1, less that of the posterior.
    """
    mask = best.targets.mask
    v = jnp.where(mask, best.theta[:, 2:-1:3], 0)
    slope = jnp.where(mask, known.prior.intensity.slope(v), 1)  # type: ignore[union-attr]
    tells = mask & (slope > 0)
    slope = jnp.where(tells, slope, 1)
    covariance = best.covariance[:, 2::3, 2::3] / (slope[:, :, None] * slope[:, None, :])
    both = tells[:, :, None] & tells[:, None, :] & jnp.isfinite(covariance)
    covariance = jnp.where(both, covariance, 0)
    number = mask.sum(-1).astype(v.dtype)

    def far(off: jax.Array, prior_variance: Any, variance: jax.Array) -> jax.Array:
        expected = jnp.maximum(prior_variance - variance, _LEAST_SPREAD * prior_variance)
        return off**2 > _DOUBTFUL_LATENT**2 * expected

    alone = jnp.diagonal(covariance, axis1=-2, axis2=-1)
    total = far(v.sum(-1), number, covariance.sum((-2, -1)))
    return (far(v, 1.0, alone) & tells).any(-1) | (total & tells.any(-1))
