"""Evidence: how probable a number of targets is, whatever their places and intensities.

Laplace's approximation around a fit: with `d` parameters and their information `F`,

    log Z = log likelihood + log prior + d/2 log(2 pi) - 1/2 log det F

The prior is that of unordered targets, so it holds the `log n!` ways to number them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dscsnet_jax.inference import pixels, spd
from dscsnet_jax.inference.fit import NUM_ITERATIONS, Fit, fit, scaled
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.lanes import lanes_last, largest, to_lanes
from dscsnet_jax.inference.observation import Observation, observe
from dscsnet_jax.inference.scene_model import SceneModel, scene_model
from dscsnet_jax.inference.theta import pairs_of, present_of, spread, theta_of
from dscsnet_jax.inference.window_prior import MARGIN
from dscsnet_jax.physics.psf_coordinates import coordinates
from dscsnet_jax.physics.targets import Targets

_QUARTIC = 1.35 / 2 * (3 / (16 * np.pi)) ** 0.5


def log_evidence(
    frames: ArrayLike, targets: Targets, known: Known, *, num_iterations: int = 2 * NUM_ITERATIONS
) -> jax.Array:
    """How probable frames are with so many targets, whatever their places and intensities.

    For small frames or windows, one group of targets each. It is differentiable by every
    number of what is known, of optics, sensor and scene alike.

    Args:
      frames: (B, N, M) recorded counts.
      targets: `Targets` (B, K, ...) from which the fit starts.
      known: PSF, sensor and scene prior.
      num_iterations: of the fit.

    Returns:
      (B,) natural logarithms, as of `laplace`; their derivative is NaN where the fit has not
      converged.

    Example:
      >>> import dscsnet_jax as dj
      >>> truth = dj.from_lists([[(3.0, 2.6, 240.0), (3.1, 3.4, 200.0)]])
      >>> y = dj.render(truth, frame_size=7, psf=0.5)
      >>> def evidence(noise):
      ...     known = Known(dj.Gaussian(0.5), dj.Sensor(read_noise=noise, background=0.0))
      ...     return log_evidence(y, truth, known)[0]
      >>> bool(jax.grad(evidence)(1.0) < 0)  # noise-free frames ask for less noise
      True
    """
    seen = observe(frames, known.sensor)
    return laplace(fit(seen, targets, known, num_iterations=num_iterations), seen, known)


@lanes_last
def laplace(best: Fit, observation: Observation, known: Known, *, limits: bool = True) -> jax.Array:
    """Laplace evidence of fits, in full: of one window, counts and models compare.

    Without a prior of the intensities, any up to the window's flux is as likely; without
    a cluster size, any place of the window. It is differentiable by every number of
    observation, PSF, gain and prior, through the fit's own derivative too.

    Args:
      best: fits of B windows.
      observation: the windows.
      known: PSF, sensor's gain and scene prior.
      limits: that targets are within the window and their intensities not negative.

    Returns:
      (B,) natural logarithms, without `-1/2 log(2 pi)` of each pixel; -inf for counts the
      prior excludes and beyond the limits.

    References:
      D. J. C. MacKay, Information Theory, Inference, and Learning Algorithms, 2003, ch. 27.
    """
    given = jax.tree.map(jnp.asarray, (best.theta, best.targets.mask, observation))
    theta, mask, seen = to_lanes(given)
    model = scene_model(seen, mask, known)
    at = model.quadratic(theta)
    dimension = (3 * mask.sum(0) + 1).astype(theta.dtype)
    total = -at.cost - _log_determinant(theta, at.information, model) / 2
    total = total + dimension * float(np.log(2 * np.pi) / 2) + model.log_normalisation(theta)
    if not limits:
        return total
    return jnp.where(_impossible(model.unpack(theta), seen), -jnp.inf, total)


@lanes_last
def dark(observation: Observation, known: Known) -> jax.Array:
    """Log likelihood of windows without any target, at their expected level.

    Args:
      observation: B windows.
      known: PSF, sensor's gain and scene prior.

    Returns:
      (B,) natural logarithms, as of `laplace`.
    """
    seen = to_lanes(observation)
    mask = jnp.zeros((1, seen.counts.shape[-1]), bool)
    theta = jnp.zeros((4, seen.counts.shape[-1]), seen.counts.dtype)
    return scene_model(seen, mask, known).log_likelihood(theta)


@lanes_last
def psf_information(best: Fit, observation: Observation, known: Known) -> jax.Array:
    """Information of the PSF's coordinates when the targets of each window are unknown as well.

    The Schur complement of the targets' block in the information of both,
    `F_pp - F_pt F_tt^-1 F_tp`.

    Args:
      best: fits of B windows.
      observation: the windows.
      known: PSF, sensor's gain and scene prior.

    Returns:
      (B, P, P), of the coordinates of `physics.psf_coordinates`.
    """

    def one(theta: jax.Array, mask: jax.Array, seen: Observation) -> jax.Array:
        model = scene_model(seen, mask, known)
        free = coordinates(model.known.psf)

        def expected(theta: jax.Array, values: jax.Array) -> jax.Array:
            source = model.with_psf(free.psf(values)).source(theta)
            return source + seen.background_std * theta[-1]

        by_theta, by_psf = (
            jax.jacfwd(expected, i)(theta, free.values).reshape(seen.counts.size, -1)
            for i in (0, 1)
        )
        source, noise = model.source(theta), known.light_noise
        given = pixels.likelihoods(seen, noise, model.censors, source, theta[-1])
        weighted = by_psf * given.information.reshape(-1, 1)
        unit, scale = scaled(model.quadratic(theta).information, present_of(mask))
        with jax.default_matmul_precision("highest"):
            cross = (by_theta * scale[None]).T @ weighted
            return by_psf.T @ weighted - cross.T @ spd.inverse(unit)[0] @ cross

    return jax.vmap(one)(best.theta, best.targets.mask, observation)


def _impossible(targets: Targets, seen: Observation) -> jax.Array:
    """(...,) bool: a target lies outside, or takes light away."""
    outside = targets.intensity < 0
    for axis in range(2):
        middle = (seen.counts.shape[axis] - 1) / 2
        outside |= jnp.abs(targets.position[:, axis] - middle) > middle + 0.5 + MARGIN
    return (targets.mask & outside).any(0)


def _log_determinant(theta: jax.Array, information: jax.Array, model: SceneModel) -> jax.Array:
    """Log determinant of the information; no direction is wider than the scene.

    The window is the scene of the targets as a whole, a cluster's square that of each against
    the others: a square of unknown place tells nothing about the place of one target.

    Nor wider than the PSF's bend allows: where two targets coincide the window does not
    change to first order when they part, but `I/2 d^2` of the PSF's second derivative, of
    norm `sqrt(3/(16 pi)) / s^3` for a Gaussian of its width, is a quartic well as wide as the
    Gaussian of information `1.35 I/2 sqrt(3/(16 pi)) / (s^3 noise)`.
    """
    prior, seen = model.known.prior, model.seen
    whole = 12 / max(seen.counts.shape[:2]) ** 2  # one over the variance of a uniform density
    size = prior.cluster_size
    apart = whole if size is None else 12 / size**2
    both = model.mask[:, None] & model.mask[None]
    share = jnp.where(both, 1 / jnp.maximum(model.mask.sum(0), 1).astype(theta.dtype), 0)
    energy = 12.0 if prior.intensity is None else 0.0  # `v` has a prior of its own
    sigma = model.known.psf.width
    width = jnp.sqrt(sigma[0] * sigma[1])
    targets = model.unpack(theta)
    intensity = jnp.maximum(targets.intensity, 0)
    dark = dataclasses.replace(pixels.typical(seen), neighbours=seen.neighbours.min((0, 1)))
    noise = jnp.sqrt(pixels.variance(dark, model.known.light_noise, intensity)[0])
    bend = _QUARTIC * intensity / (width**3 * noise) * _blended(targets, width)
    place = (whole - apart) * share + spd.diagonal_matrix(apart + bend)
    zero = jnp.zeros_like(bend)
    least = spd.diagonal_matrix(theta_of(zero, zero, zero + energy, zero[0]))
    least += spread(place, 0, 0) + spread(place, 1, 1)
    unit, scale = scaled(information + least, present_of(model.mask))
    _, log_determinant = spd.inverse(unit)
    return log_determinant - 2 * jnp.log(jnp.where(scale > 0, scale, 1)).sum(0)


def _blended(targets: Targets, width: jax.Array) -> jax.Array:
    """(K, ...) 1 where a target coincides with another, 0 where it stands alone."""
    apart = targets.position[:, None] - targets.position[None]
    near = jnp.exp(-2 * (apart**2).sum(2) / width**2)
    return largest(jnp.where(pairs_of(targets.mask), near, 0))
