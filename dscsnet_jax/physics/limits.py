"""Limits: how well any estimator can place and weigh the targets of a frame.

Fisher information of (row, col, intensity) of all targets of a frame and the
Cramer-Rao bounds that follow from it: limits of optics and sensor, whatever the method.

Bounds come from a square root `L` of the information `F = L^T L`: the condition number
of `F` is the square of that of `L`, and would use up all digits of float32 for five
targets within a pixel. Entries `3k, 3k+1, 3k+2` are row, col, intensity of target `k`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dscsnet_jax.physics import grid, optics
from dscsnet_jax.physics.psf import Psf, as_psf
from dscsnet_jax.physics.scene import Preset
from dscsnet_jax.physics.sensor import Sensor, is_saturated, level, variance
from dscsnet_jax.physics.targets import Targets

# Relative singular values below this many rounding errors per parameter are zero.
_ROUNDING_MARGIN = 10


class Bounds(NamedTuple):
    """Smallest standard deviations an unbiased estimator can reach.

    Attributes:
      row_std, col_std: (..., K) of the position, pixels.
      intensity_std: (..., K) of the intensity, counts.
    """

    row_std: jax.Array
    col_std: jax.Array
    intensity_std: jax.Array


def render_jacobian(
    targets: Targets,
    *,
    frame_size: int | tuple[int, int],
    psf: Psf | ArrayLike | tuple[float, float],
) -> jax.Array:
    """Derivative of the expected frame `optics.render` by every target's parameters.

    `d/d row = I R'(row) R(col)^T`, `d/d col = I R(row) R'(col)^T`, `d/d I = R(row) R(col)^T`.

    Args:
      targets: `Targets` of shapes (..., K, 2), (..., K), (..., K).
      frame_size: detector pixels per side, `N`, or (rows, cols).
      psf: a `Psf`; a number or a pair are the widths of a Gaussian one, pixels.

    Returns:
      (..., 3K, N, M): counts per pixel, counts per pixel, 1; zero for padded slots.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> render_jacobian(from_lists([[(5.0, 5.0, 9.0)]]), frame_size=11, psf=0.5).shape
      (1, 3, 11, 11)
    """
    rows, cols = grid.frame_shape(frame_size)
    terms = as_psf(psf).terms()
    row, col = jnp.moveaxis(jnp.asarray(targets.position), -1, 0)
    intensity = jnp.where(targets.mask, targets.intensity, 0)
    present = jnp.asarray(targets.mask, intensity.dtype)
    in_row, by_row = (terms.responses(0, row, rows, order=order) for order in (0, 1))
    in_col, by_col = (terms.responses(1, col, cols, order=order) for order in (0, 1))
    along_row = jnp.stack((by_row, in_row, in_row), -1)
    along_col = jnp.stack((in_col, by_col, in_col), -1)
    factor = jnp.stack((intensity, intensity, present), -1)
    shapes = jnp.einsum("ri...p,rj...p->...pij", along_row, along_col, precision="highest")
    jacobian = factor[..., None, None] * shapes
    return jacobian.reshape(*row.shape[:-1], 3 * row.shape[-1], rows, cols)


def information_root(
    targets: Targets,
    *,
    frame_size: int | tuple[int, int],
    psf: Psf | ArrayLike | tuple[float, float],
    sensor: Sensor,
    position_prior_variance: ArrayLike = np.inf,
    intensity_prior_variance: ArrayLike = np.inf,
) -> jax.Array:
    """Square root `L` of the Fisher information, upper triangular, by QR.

    `F = L^T L = J^T diag(1/var) J + diag(1/prior variance)`, with `J` from
    `render_jacobian` and `var` the variance of a recorded pixel (read + shot +
    misfit + quantisation). What is neglected:

    - The term `(d var / var)^2 / 2` of a Gaussian of varying variance: `(d mu)^2 / var`
      is what any pixel tells at least, and all that pure read or pure shot noise tells.
    - Pixels whose expected count reaches the full well.
    - All of quantisation but its variance 1/12: without other noise, only a guide.

    A prior makes the information Bayesian (van Trees) at the given targets: exact for
    Gaussian priors of a linear model, a guide for others.

    Args:
      targets: `Targets` of shapes (..., K, 2), (..., K), (..., K).
      frame_size: detector pixels per side, `N`, or (rows, cols).
      psf: a `Psf`; a number or a pair are the widths of a Gaussian one, pixels.
      sensor: the `Sensor` that records the frame.
      position_prior_variance: pixels squared, of row and of col (`w^2/12` for a uniform
        range of width `w`); inf: no prior.
      intensity_prior_variance: counts squared; inf: no prior.

    Returns:
      (..., 3K, 3K) root; the block of a padded slot in `L^T L` is the identity.

    Raises:
      ValueError: if the sensor has no noise, or a prior variance is not positive.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> targets = from_lists([[(5.0, 5.0, 100.0)]])
      >>> root = information_root(
      ...     targets, frame_size=11, psf=0.5, sensor=Sensor(read_noise=2.0))
      >>> round(float(cramer_rao(root, targets.mask).intensity_std[0, 0]), 3)
      3.879

    References:
      H. L. van Trees, Detection, Estimation, and Modulation Theory, part I, 1968.
    """
    _require_noise(sensor)
    expected = optics.render(targets, frame_size=frame_size, psf=psf)
    noise, dtype = variance(sensor, expected), expected.dtype
    # Shot noise alone has no variance where nothing is expected, and nothing to tell.
    counts = (noise > 0) & ~is_saturated(sensor, expected + level(sensor, expected))
    weight = jnp.where(counts, jax.lax.rsqrt(jnp.where(counts, noise, 1)), 0)
    jacobian = render_jacobian(targets, frame_size=frame_size, psf=psf)
    whitened = (jacobian * weight[..., None, :, :]).reshape(*jacobian.shape[:-2], -1)
    mask = jnp.repeat(jnp.asarray(targets.mask), 3, axis=-1)
    prior = _prior_root(position_prior_variance, intensity_prior_variance).astype(dtype)
    prior = jnp.broadcast_to(jnp.tile(prior, targets.mask.shape[-1]), mask.shape)
    diagonal = jnp.vectorize(jnp.diag, signature="(p)->(p,p)")(jnp.where(mask, prior, 1))
    stacked = jnp.concatenate((jnp.swapaxes(whitened, -1, -2), diagonal), axis=-2)
    return jnp.linalg.qr(stacked, mode="r")


def fisher_information(
    targets: Targets,
    *,
    frame_size: int | tuple[int, int],
    psf: Psf | ArrayLike | tuple[float, float],
    sensor: Sensor,
    position_prior_variance: ArrayLike = np.inf,
    intensity_prior_variance: ArrayLike = np.inf,
) -> jax.Array:
    """Fisher information `F = L^T L` of all targets of each frame.

    Arguments and errors are those of `information_root`, which keeps more digits.

    Returns:
      (..., 3K, 3K) information; the block of a padded slot is the identity.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> info = fisher_information(from_lists([[(5.0, 5.0, 100.0)]]),
      ...                           frame_size=11, psf=0.5, sensor=Sensor(read_noise=2.0))
      >>> round(float(info[0, 2, 2]), 3)
      0.066
    """
    root = information_root(
        targets,
        frame_size=frame_size,
        psf=psf,
        sensor=sensor,
        position_prior_variance=position_prior_variance,
        intensity_prior_variance=intensity_prior_variance,
    )
    return jnp.einsum("...ap,...aq->...pq", root, root, precision="highest")


def cramer_rao(root: jax.Array, mask: jax.Array) -> Bounds:
    """Cramer-Rao bounds `sqrt(diag(F^-1))`, infinite where the frame does not decide.

    Args:
      root: (..., 3K, 3K) from `information_root`.
      mask: (..., K) bool, true where a target is present.

    Returns:
      `Bounds` of (..., K), never NaN; inf for padded slots and, without a prior, for
      targets at one place (within rounding).

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> targets = from_lists([[(5.0, 5.0, 100.0)], [(5.0, 5.0, 100.0), (5.0, 5.0, 90.0)]])
      >>> root = information_root(
      ...     targets, frame_size=11, psf=0.5, sensor=Sensor(read_noise=2.0))
      >>> print(cramer_rao(root, targets.mask).row_std.round(4))
      [[0.0415    inf]
       [   inf    inf]]
    """
    inverse, decided = _inverse_root(root)
    std = jnp.where(decided, jnp.sqrt((inverse**2).sum(-1)), jnp.inf)
    std = jnp.where(jnp.asarray(mask)[..., None], std.reshape(*mask.shape, 3), jnp.inf)
    return Bounds(*jnp.moveaxis(std, -1, 0))


def estimates_at_bound(
    key: jax.Array,
    targets: Targets,
    root: jax.Array,
    intensity_range: tuple[float, float] | None = None,
) -> Targets:
    """Estimates of an imagined estimator whose errors are `N(0, F^-1)`.

    Scored against `targets` they tell what a metric, such as CSO-mAP, can reach. Where
    the bound is infinite, the errors are huge but finite.

    Args:
      key: PRNG key.
      targets: the truth, `Targets` of (..., K, 2), (..., K), (..., K).
      root: (..., 3K, 3K) from `information_root`, of these targets.
      intensity_range: clip the intensities to this range, counts.

    Returns:
      `Targets` with the truth's mask; padded slots hold zeros.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> targets = from_lists([[(5.0, 5.0, 100.0)]])
      >>> estimates = estimates_at_bound(jax.random.key(0), targets, 1e3 * jnp.eye(3)[None])
      >>> estimates.position.round(1).tolist()
      [[[5.0, 5.0]]]
    """
    mask = jnp.asarray(targets.mask)
    inverse, _ = _inverse_root(root)
    # In another type the same key would draw other numbers.
    normal = jax.random.normal(key, root.shape[:-1], jnp.float32).astype(root.dtype)
    error = jnp.einsum("...pq,...q->...p", inverse, normal, precision="highest")
    error = error.reshape(*mask.shape, 3)
    intensity = targets.intensity + error[..., 2]
    if intensity_range is not None:
        intensity = jnp.clip(intensity, *intensity_range)
    return Targets(
        position=jnp.where(mask[..., None], targets.position + error[..., :2], 0),
        intensity=jnp.where(mask, intensity, 0),
        mask=mask,
    )


def preset_limit(key: jax.Array, targets: Targets, preset: Preset) -> Targets:
    """Estimates at the Bayesian bound of a preset's frames, beside which to show a score.

    The prior variances are those of the preset's uniform intensities and of a place
    anywhere in the cluster's pixel.

    Args:
      key: PRNG key.
      targets: the truth, `Targets` of (B, K, ...).
      preset: the recipe the targets were drawn by.

    Returns:
      `Targets` with the truth's mask: the count is given to this estimator.

    Raises:
      ValueError: if the preset's sensor has no noise, or its conditions vary from frame to
        frame: the bound of one frame needs the conditions of that frame.

    Example:
      >>> from dscsnet_jax.physics import scene
      >>> preset = scene.get_preset("csist")
      >>> truth = scene.simulate(preset, scene.frame_keys(0, "val", jnp.arange(2))).targets
      >>> preset_limit(jax.random.key(0), truth, preset).position.shape
      (2, 5, 2)
    """
    if preset.variation is not None:
        raise ValueError(
            f"preset {preset.name!r} varies optics and sensor from frame to frame: its frames "
            "have no limit in common"
        )
    low, high = preset.cluster.intensity
    first, last = preset.cluster.extent
    root = information_root(
        targets,
        frame_size=preset.frame_size,
        psf=preset.sigma,
        sensor=preset.sensor,
        position_prior_variance=(last - first) ** 2 / 12,
        intensity_prior_variance=(high - low) ** 2 / 12,
    )
    return estimates_at_bound(key, targets, root, (low, high))


def _inverse_root(root: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A matrix `E` with `E E^T = F^-1`, and which parameters (..., 3K) have a finite variance.

    With unit columns `L = G D`, `G = U S V^T`: `E = D^-1 V S^-1 V^T`, with `S` held above
    the rounding floor. A parameter with a share in directions below it is undecided. The
    last `V^T` makes `E` unique: singular vectors alone turn and flip with rounding.
    """
    norm = jnp.sqrt((root**2).sum(-2))
    scale = jnp.where(norm > 0, norm, 1)
    _, singular, right = jnp.linalg.svd(root / scale[..., None, :], full_matrices=False)
    rounding = jnp.finfo(root.dtype).eps
    floor = _ROUNDING_MARGIN * root.shape[-1] * rounding * singular[..., :1]
    unseen = jnp.where((singular <= floor)[..., None], right**2, 0).sum(-2)
    weighted = right / jnp.maximum(singular, floor)[..., None]
    inverse = jnp.einsum("...mp,...mq->...pq", weighted, right, precision="highest")
    return inverse / scale[..., None], unseen <= rounding


def _require_noise(sensor: Sensor) -> None:
    """Refuse a sensor without any noise, unless its values are traced."""
    noisy = sensor.quantised or sensor.gain is not None
    if not (noisy or isinstance(sensor.read_noise, jax.core.Tracer) or np.any(sensor.read_noise)):
        raise ValueError(
            "without noise the information is infinite: the sensor needs read_noise > 0, "
            "a gain or quantised=True"
        )


def _prior_root(position: ArrayLike, intensity: ArrayLike) -> jax.Array:
    """(3,) `1 / sqrt(prior variance)`, refused unless positive or traced."""
    for value in (position, intensity):
        if not (isinstance(value, jax.core.Tracer) or np.asarray(value) > 0):
            raise ValueError(f"prior variances must be positive (inf: none), got {value}")
    return jax.lax.rsqrt(jnp.array([position, position, intensity], float))
