"""Doubt: which fits are to be compared with other counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dscsnet_jax.inference.alike import Alike
from dscsnet_jax.inference.changes import closest_pair, left
from dscsnet_jax.inference.fit import Fit
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.lanes import lanes_last
from dscsnet_jax.inference.matched_filter import matched_filter
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.prior import ScenePrior

NEAR, DOUBTED = 1, 2
"""Degrees of doubt."""
_UNEXPLAINED = 3.0  # standard deviations of chi square
_PEAK = 3.5  # signal-to-noise ratio of what may be a further target
_DOUBTFUL_SNR = 6.0
_SHAPED_SNR = 20.0  # of a target, from which the window's shape alone tells that it is one
_LIGHT = 4.0  # standard deviations of the light, within which another count may explain it
_DOUBTFUL_LATENT = 2.0  # standard deviations expected of fits
_LEAST_SPREAD = 0.01  # of the prior's variance
_CLOSE = 1.3  # PSF sigmas


def doubt(best: Fit, windows: Observation, known: Known) -> jax.Array:
    """(B,) degree of doubt: 0, or targets are near to each other, or more than that.

    More is that the noise does not explain the fit, that a target may be too much or two, or one
    is missing.
    """
    mask, intensity = best.targets.mask, best.targets.intensity
    freedom = jnp.maximum(best.num_pixels - 3 * mask.sum(-1), 1).astype(intensity.dtype)
    unexplained = best.chi_square > freedom + _UNEXPLAINED * jnp.sqrt(2 * freedom)
    weak = mask & ~(intensity > _DOUBTFUL_SNR * best.std[..., 2])
    close = closest_pair(best.targets)[0] < _CLOSE * known.psf.width.mean()
    doubted = unexplained | weak.any(-1) | ~best.converged
    if known.prior.intensity is not None:  # else the noise's peaks are as good as any
        at = _light(best, windows, known)
        doubted |= (at.peak > _PEAK) | _ambiguous(at, mask.sum(-1), known.prior)
        doubted |= _unlikely(best, known)
    return jnp.where(doubted, DOUBTED, jnp.where(close, NEAR, 0)).astype(jnp.int32)


def _unlikely(best: Fit, known: Known) -> jax.Array:
    """(B,) bool: a target, or all together, brighter or fainter than the prior expects.

    The fit draws `v` to 0 the more, the less the window tells: over scenes, fitted ones vary
    by the variance of the prior, 1, less that of the posterior.
    """
    mask = best.targets.mask
    if isinstance(known.prior.intensity, Alike):
        return jnp.zeros_like(best.converged)  # nothing is brighter or fainter than expected
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


class _Light(NamedTuple):
    """What is left and there in windows (B,).

    Signal-to-noise ratio of the best place for a further target; light of all targets, counts,
    of the fit's shape but whatever the prior says, and its error.
    """

    peak: jax.Array
    light: jax.Array
    error: jax.Array


@lanes_last
def _light(best: Fit, windows: Observation, known: Known) -> _Light:
    def one(best: Fit, window: Observation) -> _Light:
        residual, weight, source = left(best, window, known)
        peak = matched_filter(residual, weight, known.psf)[1].max()
        total = best.targets.intensity.sum()
        shape = source / jnp.where(total > 0, total, 1)
        told = jnp.where(window.saturated, 0, weight) * shape
        information = (told * shape).sum()
        tells = information > 0
        information = jnp.where(tells, information, 1)
        error = jnp.where(tells, jax.lax.rsqrt(information), jnp.inf)
        return _Light(peak, total + (told * residual).sum() / information, error)

    return jax.vmap(one)(best, windows)


def _ambiguous(at: _Light, number: jax.Array, prior: ScenePrior) -> jax.Array:
    """(B,) bool: one target more or less makes as much light, and the shape does not tell.

    Of two and more it never does: another one may hide between them.
    """
    low, high = prior.intensity.range  # type: ignore[union-attr]
    blurred = (at.light < _SHAPED_SNR * at.error) | (number > 1)
    ambiguous = jnp.zeros_like(blurred)
    for other in (number - 1, number + 1):
        off = jnp.maximum(other * low - at.light, at.light - jnp.maximum(other, 1) * high)
        possible = (other > 0) & (prior.log_count(other, at.light.dtype) > -jnp.inf)
        ambiguous |= possible & (off < _LIGHT * at.error)
    return ambiguous & blurred & (number > 0)
