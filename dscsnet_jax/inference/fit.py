"""Fit: positions and intensities off the grid, with error bars.

Damped Gauss-Newton (Levenberg-Marquardt) on the scene model, by Fisher scoring:

    (F + mu diag(F)) step = -g,     cost, g, F from `SceneModel.quadratic`

The answer is differentiable by its optimality condition `g = 0`; no gradient passes
through the iterations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp

from dscsnet_jax.inference import spd
from dscsnet_jax.inference.derivatives import Quadratic
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.lanes import from_lanes, lanes_last, to_lanes, zeros_of
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.pixels import typical
from dscsnet_jax.inference.scene_model import SceneModel, scene_model
from dscsnet_jax.inference.theta import parts_of, present_of, theta_of
from dscsnet_jax.physics.targets import Targets

NUM_ITERATIONS = 25
_DAMPING = (1e-2, 1e-8, 1e8)  # at the start, least, largest
_EASE, _TIGHTEN = 0.2, 5.0
_TOLERANCE = 1e-2  # largest Newton step at the answer, in standard deviations
_UNDECIDED = 0.05
_LONGEST = 0.5  # pixels that a target may move in one step


@flax.struct.dataclass
class Fit:
    """Answer of `fit` for B windows.

    Attributes:
      theta: (B, 3K+1) parameters of the scene model.
      targets: fitted `Targets` (B, K, ...), in the slots of the start.
      level: (B,) fitted counts of a typical pixel without targets.
      covariance: (B, 3K, 3K) of row, col (pixels) and intensity (counts) of each
        target in turn: inverse of the information of window and prior; infinite on the
        diagonal where neither decides, zero for padded slots.
      chi_square: (B,) sum of the squared whitened residuals of the pixels.
      num_pixels: (B,) pixels that tell: valid, and not saturated.
      converged: (B,) bool: the next step would be below 1/100 standard deviation.
    """

    theta: jax.Array
    targets: Targets
    level: jax.Array
    covariance: jax.Array
    chi_square: jax.Array
    num_pixels: jax.Array
    converged: jax.Array

    @property
    def std(self) -> jax.Array:
        """(B, K, 3) standard deviations of row, col (pixels) and intensity (counts)."""
        variance = jnp.diagonal(self.covariance, axis1=-2, axis2=-1)
        return jnp.sqrt(variance).reshape(*self.targets.mask.shape, 3)


@lanes_last
def fit(
    observation: Observation,
    start: Targets,
    known: Known,
    *,
    num_iterations: int | jax.Array = NUM_ITERATIONS,
    unroll: bool = False,
    differentiable: bool = True,
) -> Fit:
    """Most probable positions and intensities near the start, window by window.

    The mode is that of `theta`: of the intensities' `v`, in which the prior is Gaussian.

    Args:
      observation: B windows, `Observation` of (B, N, M).
      start: `Targets` (B, K, ...) with positions within a pixel or so of the answer.
      known: PSF, sensor's gain and scene prior.
      num_iterations: of Levenberg-Marquardt.
      unroll: differentiate through the iterations instead of by the optimality
        condition: slow, kept to check the latter.
      differentiable: else it is traced in a fraction of the time, and has no derivative.

    Returns:
      A `Fit`. Its targets and level are differentiable with respect to the
      observation (counts, noise) and what is known (PSF, gain, the prior's numbers); the
      derivative is NaN where the fit has not converged.

    Raises:
      ValueError: if the start is not of the windows.

    Example:
      >>> from dscsnet_jax.inference.observation import observe
      >>> from dscsnet_jax.physics.optics import render
      >>> from dscsnet_jax.physics.preset import Sensor
      >>> from dscsnet_jax.physics.psf import Gaussian
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> y = render(from_lists([[(5.1, 5.2, 200.0)]]), frame_size=11, psf=0.5)
      >>> guess = from_lists([[(5.0, 5.0, 150.0)]])
      >>> seen = observe(y, Sensor(read_noise=1.0, background=0.0))
      >>> best = fit(seen, guess, Known(psf=Gaussian(0.5)))
      >>> [round(float(x), 3) for x in best.targets.position[0, 0]], bool(best.converged[0])
      ([5.1, 5.2], True)

    References:
      D. W. Marquardt, J. SIAM 11 (1963) 431; S. G. Krantz and H. R. Parks, The Implicit
      Function Theorem, 2002.
    """
    if observation.counts.ndim != 3 or observation.counts.shape[0] != start.mask.shape[0]:
        raise ValueError(
            "expected windows (B, N, M) and targets of as many, got "
            f"{observation.counts.shape} and {start.mask.shape}"
        )
    observation, start = to_lanes(jax.tree.map(jnp.asarray, (observation, start)))
    model = scene_model(observation, start.mask, known)
    theta, present = model.pack(start), present_of(start.mask)

    def score(theta: jax.Array) -> jax.Array:
        """The gradient, whose root is the fit; padded slots stay where they are."""
        return jnp.where(present, model.quadratic(theta).gradient, theta)

    def solve(_: object, theta: jax.Array) -> tuple[jax.Array, Quadratic]:
        return _minimise(theta, model, num_iterations)

    if unroll or not differentiable:
        theta, at = _minimise(theta, model, num_iterations, by_scan=unroll)
    else:
        theta, at = jax.lax.custom_root(score, theta, solve, _solve_dense, has_aux=True)
    answer = _describe(*jax.lax.stop_gradient((theta, at, model)))
    theta = _only_if(answer.converged, theta)
    level = typical(observation).level + observation.background_std * theta[-1]
    answer = dataclasses.replace(answer, theta=theta, targets=model.unpack(theta), level=level)
    return cast(Fit, from_lanes(answer))


def _minimise(
    theta: jax.Array,
    model: SceneModel,
    num_iterations: int | jax.Array,
    *,
    by_scan: bool = False,
) -> tuple[jax.Array, Quadratic]:
    """Levenberg-Marquardt; a step is taken only if it lowers the cost.

    A scan can be differentiated through, a loop takes a traced number of iterations. The model
    is compiled once: from a cost without end and a slope of 0 the first turn takes no step.
    """
    present = present_of(model.mask)
    start, least, largest = _DAMPING
    # No place is wider than the window: one that the light does not tell keeps none from changing.
    widest = jnp.full_like(theta[:-1:3], 12 / max(model.seen.counts.shape[:2]) ** 2)
    widest = theta_of(widest, widest, jnp.zeros_like(widest), jnp.zeros_like(theta[-1]))
    State = tuple[jax.Array, jax.Array, Quadratic]

    def iterate(state: State) -> State:
        theta, damping, old = state
        step = _damped_step(old, widest, damping, present)
        step = step * _LONGEST / jnp.maximum(_longest_move(step), _LONGEST)
        new = model.quadratic(theta + step)
        better = ((new.terms - old.terms).sum(0) < 0) | (old.cost == jnp.inf)
        damping = jnp.clip(jnp.where(better, damping * _EASE, damping * _TIGHTEN), least, largest)
        theta, kept = jax.tree.map(
            lambda a, b: jnp.where(better, a, b), (theta + step, new), (theta, old)
        )
        return theta, damping, kept

    at = zeros_of(model.quadratic, theta)
    at = at._replace(cost=jnp.full_like(at.cost, jnp.inf))
    first: State = (theta, jnp.full_like(theta[-1], start / _EASE), at)
    if by_scan:
        numbers = jnp.arange(num_iterations + 1)
        theta, _, at = jax.lax.scan(lambda s, _: (iterate(s), None), first, numbers)[0]
    else:
        theta, _, at = jax.lax.fori_loop(0, num_iterations + 1, lambda _, s: iterate(s), first)
    return theta, at


def scaled(information: jax.Array, present: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The information with a unit diagonal, and the scale (3K+1, ...) of the parameters.

    Unit columns keep the digits that counts and pixels side by side would lose.
    """
    diagonal = spd.diagonal(information)
    tells = present & (diagonal > 0)
    scale = jnp.where(tells, jax.lax.rsqrt(jnp.where(tells, diagonal, 1)), 0)
    unit = information * scale[:, None] * scale[None]
    return unit + spd.diagonal_matrix(jnp.where(tells, 0, 1).astype(unit.dtype)), scale


def _damped_step(
    at: Quadratic, widest: jax.Array, damping: jax.Array, present: jax.Array
) -> jax.Array:
    unit, scale = scaled(at.information + spd.diagonal_matrix(widest), present)
    wider = spd.diagonal_matrix(jnp.broadcast_to(damping, scale.shape))
    inverse, _ = spd.inverse((unit + wider) / (1 + damping))
    return -scale * spd.times(inverse, scale * at.gradient) / (1 + damping)


def _longest_move(step: jax.Array) -> jax.Array:
    """(...,) longest way along an axis of any target; a length without a derivative."""
    # That of a maximum asks which is equal to it, and two roundings of one number are not.
    row, col, *_ = parts_of(jax.lax.stop_gradient(step))
    return jnp.maximum(jnp.abs(row), jnp.abs(col)).max(0, initial=0)


def _solve_dense(linear: Callable[[jax.Array], jax.Array], b: jax.Array) -> jax.Array:
    """Solve for each window (3K+1, B); none depends on another."""
    matrix = jax.vmap(linear, out_axes=1)(spd.diagonal_matrix(jnp.ones_like(b)))
    matrix, b = from_lanes((matrix, b))
    return cast(jax.Array, to_lanes(jnp.linalg.solve(matrix, b[..., None])[..., 0]))


@jax.custom_jvp
def _only_if(converged: jax.Array, theta: jax.Array) -> jax.Array:
    """`theta`; its derivative is NaN unless it is a root."""
    return theta


@_only_if.defjvp
def _only_if_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    converged, theta = primals
    return theta, tangents[1] * jnp.where(converged, 1, jnp.nan).astype(theta.dtype)


def _describe(theta: jax.Array, at: Quadratic, model: SceneModel) -> Fit:
    """Covariance, goodness and convergence at `theta`."""
    seen, present = model.seen, present_of(model.mask)
    unit, scale = scaled(at.information, present)
    inverse, _ = spd.inverse(unit)
    variance = spd.diagonal(inverse)
    # A pivot at the floor: the parameter is a combination of others, or not seen at all.
    undecided = present & ((variance > _UNDECIDED / spd.rounding_floor(unit)) | (scale == 0))
    slope = jnp.where(model.mask, model.intensity_slope(theta[2:-1:3]), 0)
    one = jnp.ones_like(slope)
    by_theta = scale * theta_of(one, one, slope, jnp.ones_like(theta[-1]))
    covariance = inverse * by_theta[:, None] * by_theta[None]
    covariance = jnp.where(spd.diagonal_matrix(undecided), jnp.inf, covariance)
    step = jnp.where(present & ~undecided, spd.times(inverse, scale * at.gradient), 0)
    used = seen.valid & ~seen.saturated
    source = model.source(theta)
    left = seen.counts - seen.neighbours - source - seen.level - seen.background_std * theta[-1]
    whitened = jnp.where(used, left**2 / model.variance(source, theta[-1])[0], 0)
    return Fit(
        theta=theta,
        targets=model.unpack(theta),
        level=theta[-1],
        covariance=covariance[:-1, :-1],
        chi_square=whitened.sum((0, 1)),
        num_pixels=used.sum((0, 1), dtype=jnp.int32),
        converged=(jnp.abs(step) <= _TOLERANCE * jnp.sqrt(variance)).all(0)
        & jnp.isfinite(theta).all(0),
    )
