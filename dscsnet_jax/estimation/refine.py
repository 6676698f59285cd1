"""Refine: fit positions and intensities off the grid, with error bars and evidence.

Damped Gauss-Newton (Levenberg-Marquardt) on the exact pixel-integrated model:

    (J^T J + mu diag(J^T J)) step = -J^T r,     r, J from `objective.residuals`

The answer is differentiable by its optimality condition `J^T r = 0`; no gradient passes
through the iterations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.estimation.blocks import fits_per_block, in_blocks, take_rows
from dscsnet_jax.estimation.objective import Residuals, pack, residuals, unpack
from dscsnet_jax.estimation.observe import Observation
from dscsnet_jax.estimation.prior import ScenePrior
from dscsnet_jax.inference import spd
from dscsnet_jax.physics.targets import Targets

NUM_ITERATIONS = 25
_FIRST_ITERATIONS = 10  # enough for most fits
_DAMPING = (1e-2, 1e-8, 1e8)  # at the start, least, largest
_EASE, _TIGHTEN = 0.2, 5.0
_TOLERANCE = 1e-2  # largest Newton step at the answer, in standard deviations
_UNDECIDED = 0.05
_QUARTIC = 1.35 / 2 * (3 / (16 * np.pi)) ** 0.5
_LONGEST = 0.5  # pixels that a target may move in one step
_product = partial(jnp.einsum, precision="highest")


@flax.struct.dataclass
class Fit:
    """Answer of `refine` for B frames.

    Attributes:
      targets: fitted `Targets` (B, K, ...), in the slots of the start.
      background: (B,) counts.
      covariance: (B, 3K, 3K) of row, col (pixels) and intensity (counts) of each
        target in turn: inverse of the information of frame and prior; infinite on the
        diagonal where neither decides, zero for padded slots.
      chi_square: (B,) sum of the squared whitened residuals of the pixels.
      num_pixels: (B,) pixels that tell: valid, and not saturated.
      cost: (B,) minus log of likelihood and prior, up to constants.
      log_determinant: (B,) of the information of frame and prior, where what the prior
        leaves open has the variance of the whole frame, or of all its counts.
      converged: (B,) bool: the next step would be below 1/100 standard deviation.
    """

    targets: Targets
    background: jax.Array
    covariance: jax.Array
    chi_square: jax.Array
    num_pixels: jax.Array
    cost: jax.Array
    log_determinant: jax.Array
    converged: jax.Array

    @property
    def std(self) -> jax.Array:
        """(B, K, 3) standard deviations of row, col (pixels) and intensity (counts)."""
        variance = jnp.diagonal(self.covariance, axis1=-2, axis2=-1)
        return jnp.sqrt(variance).reshape(*self.targets.mask.shape, 3)


def refine(
    observation: Observation,
    start: Targets,
    prior: ScenePrior | None = None,
    *,
    num_iterations: int | jax.Array = NUM_ITERATIONS,
    unroll: bool = False,
) -> Fit:
    """Fit all targets of each frame jointly, off the grid.

    Args:
      observation: the frames, batched: every field with a leading axis B.
      start: `Targets` (B, K, ...) to start at.
      prior: what is known of the scene; None: nothing.
      num_iterations: of Levenberg-Marquardt.
      unroll: differentiate through the iterations instead of by the optimality
        condition: slow, kept to check the latter.

    Returns:
      A `Fit`. Its targets and background are differentiable with respect to the
      observation (frame, noise, PSF) and the prior's numbers; the derivative is NaN
      where the fit has not converged.

    Raises:
      ValueError: if the start is not of the frames.

    Example:
      >>> from dscsnet_jax.estimation.observe import observe
      >>> from dscsnet_jax.physics.optics import render
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> y = render(from_lists([[(5.1, 5.2, 200.0)]]), frame_size=11, sigma=0.5)
      >>> guess = from_lists([[(5.0, 5.0, 150.0)]])
      >>> fit = refine(observe(y, sigma=0.5, noise=1.0, background=0.0), guess)
      >>> [round(float(x), 3) for x in fit.targets.position[0, 0]], bool(fit.converged[0])
      ([5.1, 5.2], True)

    References:
      D. W. Marquardt, J. SIAM 11 (1963) 431; S. G. Krantz and H. R. Parks, The Implicit
      Function Theorem, 2002.
    """
    if observation.counts.ndim != 3 or len(observation.counts) != len(start.mask):
        raise ValueError(
            f"expected frames (B, N, M) and targets of as many, got {observation.counts.shape} "
            f"and {np.shape(start.mask)}"
        )
    prior = ScenePrior() if prior is None else prior
    dtype = observation.counts.dtype
    start = Targets(
        jnp.asarray(start.position, dtype),
        jnp.asarray(start.intensity, dtype),
        jnp.asarray(start.mask),
    )
    one = partial(_refine_one, prior=prior, num_iterations=num_iterations, unroll=unroll)
    return jax.vmap(one)(observation, start)


def refine_frames(
    observation: Observation,
    start: Targets,
    prior: ScenePrior,
    *,
    num_iterations: int | None = None,
) -> Fit:
    """`refine` for any number of frames, block by block, as NumPy arrays.

    Without a number of iterations, fits that have not converged after some go on, gathered
    into blocks, so that few slow ones do not cost all the others their time.
    """
    first = _FIRST_ITERATIONS if num_iterations is None else num_iterations
    run = partial(in_blocks, _refine_block, size=fits_per_block(start.mask.shape[-1]))
    fit = run((observation, start), prior, np.int32(first))
    slow = np.flatnonzero(~fit.converged)
    if num_iterations is not None or not len(slow):
        return fit
    more = run(take_rows((observation, fit.targets), slow), prior, np.int32(NUM_ITERATIONS))
    return jax.tree.map(lambda old, new: _with_rows(old, slow, new), fit, more)


@jax.jit
def _refine_block(
    frames: tuple[Observation, Targets], prior: ScenePrior, num_iterations: jax.Array
) -> Fit:
    return refine(*frames, prior, num_iterations=num_iterations)


def _with_rows(old: np.ndarray, index: np.ndarray, new: np.ndarray) -> np.ndarray:
    old = old.copy()
    old[index] = new
    return old


def _refine_one(
    observation: Observation,
    start: Targets,
    *,
    prior: ScenePrior,
    num_iterations: int | jax.Array,
    unroll: bool,
) -> Fit:
    """`refine` for one frame."""
    mask = start.mask
    theta = pack(start, jnp.zeros(()))
    present = _present(mask)

    def score(theta: jax.Array) -> jax.Array:
        """`J^T r`, whose root is the fit; padded slots stay where they are."""
        r = residuals(theta, mask, observation, prior)
        return jnp.where(present, _product("rp,r->p", r.jacobian, r.value), theta)

    def solve(_: object, theta: jax.Array) -> jax.Array:
        return _minimise(theta, mask, observation, prior, num_iterations)

    if unroll:
        theta = _minimise(theta, mask, observation, prior, num_iterations, by_scan=True)
    else:
        theta = jax.lax.custom_root(score, theta, solve, _solve_dense)
    fixed = jax.lax.stop_gradient
    fit = _describe(fixed(theta), mask, fixed(observation), fixed(prior))
    theta = _only_if(fit.converged, theta)
    level = observation.background + observation.background_std * theta[-1]
    return dataclasses.replace(fit, targets=unpack(theta, mask), background=level)


def _minimise(
    theta: jax.Array,
    mask: jax.Array,
    observation: Observation,
    prior: ScenePrior,
    num_iterations: int | jax.Array,
    *,
    by_scan: bool = False,
) -> jax.Array:
    """Levenberg-Marquardt; a step is taken only if it lowers the cost.

    A scan can be differentiated through, a loop takes a traced number of iterations.
    """
    present = _present(mask)
    start, least, largest = _DAMPING

    def iterate(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        theta, damping, cost, gradient, normal, std = state
        step = _damped_step(gradient, normal, damping, present)
        step = step * jnp.minimum(1, _LONGEST / jnp.maximum(_longest_move(step), _LONGEST))
        new = theta + step
        r = residuals(new, mask, observation, prior)
        new_cost = (r.value**2).sum() / 2
        # Weighed as at the old place: weights that move would favour bright models.
        pixels = r.value[: len(std)]
        moved = (pixels**2 * ((r.std / std) ** 2 - 1)).sum() / 2
        better = new_cost + moved < cost
        new_gradient, new_normal = _normal_equations(r)
        damping = jnp.clip(jnp.where(better, damping * _EASE, damping * _TIGHTEN), least, largest)
        old = (theta, cost, gradient, normal, std)
        new_state = (new, new_cost, new_gradient, new_normal, r.std)
        theta, *others = jax.tree.map(lambda a, b: jnp.where(better, a, b), new_state, old)
        return theta, damping, *others

    r = residuals(theta, mask, observation, prior)
    first: tuple[jax.Array, ...] = (
        theta,
        jnp.asarray(start, theta.dtype),
        (r.value**2).sum() / 2,
        *_normal_equations(r),
        r.std,
    )
    if by_scan:
        numbers = jnp.arange(num_iterations)
        return jax.lax.scan(lambda s, _: (iterate(s), None), first, numbers)[0][0]
    return jax.lax.fori_loop(0, num_iterations, lambda _, s: iterate(s), first)[0]


def _normal_equations(r: Residuals) -> tuple[jax.Array, jax.Array]:
    gradient = _product("rp,r->p", r.jacobian, r.value)
    return gradient, _product("rp,rq->pq", r.jacobian, r.jacobian)


def _scaled(normal: jax.Array, present: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`J^T J` with a unit diagonal, and the scale (3K+1,) of the parameters.

    Unit columns keep the digits that counts and pixels side by side would lose.
    """
    diagonal = jnp.diagonal(normal)
    tells = present & (diagonal > 0)
    scale = jnp.where(tells, jax.lax.rsqrt(jnp.where(tells, diagonal, 1)), 0)
    unit = normal * scale[:, None] * scale[None, :]
    return unit + jnp.diag(jnp.where(tells, 0, 1).astype(unit.dtype)), scale


def _damped_step(
    gradient: jax.Array, normal: jax.Array, damping: jax.Array, present: jax.Array
) -> jax.Array:
    unit, scale = _scaled(normal, present)
    identity = jnp.eye(len(unit), dtype=unit.dtype)
    inverse, _ = spd.inverse((unit + damping * identity) / (1 + damping))
    return -scale * _product("pq,q->p", inverse, scale * gradient) / (1 + damping)


def _longest_move(step: jax.Array) -> jax.Array:
    return jnp.abs(step[:-1].reshape(-1, 3)[:, :2]).max()


def _present(mask: jax.Array) -> jax.Array:
    """(3K+1,) bool: parameters of targets present, and the background."""
    return jnp.concatenate([jnp.repeat(mask, 3), jnp.ones(1, bool)])


def _solve_dense(linear: Callable[[jax.Array], jax.Array], b: jax.Array) -> jax.Array:
    return jnp.linalg.solve(jax.jacobian(linear)(b), b)


@jax.custom_jvp
def _only_if(converged: jax.Array, theta: jax.Array) -> jax.Array:
    """`theta`; its derivative is NaN unless it is a root."""
    return theta


@_only_if.defjvp
def _only_if_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    converged, theta = primals
    return theta, tangents[1] * jnp.where(converged, 1, jnp.nan).astype(theta.dtype)


def _describe(
    theta: jax.Array, mask: jax.Array, observation: Observation, prior: ScenePrior
) -> Fit:
    """Covariance, goodness and convergence at `theta`."""
    present = _present(mask)
    r = residuals(theta, mask, observation, prior)
    gradient, normal = _normal_equations(r)
    unit, scale = _scaled(normal, present)
    inverse, _ = spd.inverse(unit)
    variance = jnp.diagonal(inverse)
    # A pivot at the floor: the parameter is a combination of others, or not seen at all.
    undecided = present & ((variance > _UNDECIDED / spd.rounding_floor(unit)) | (scale == 0))
    covariance = inverse * scale[:, None] * scale[None, :]
    covariance = jnp.where(jnp.diag(undecided), jnp.inf, covariance)
    step = jnp.where(present & ~undecided, _product("pq,q->p", inverse, scale * gradient), 0)
    pixels = observation.counts.size
    return Fit(
        targets=unpack(theta, mask),
        background=theta[-1],
        covariance=covariance[:-1, :-1],
        chi_square=(r.value[:pixels] ** 2).sum(),
        num_pixels=(observation.valid & ~observation.saturated).sum(),
        cost=(r.value**2).sum() / 2,
        log_determinant=_log_determinant(theta, normal, mask, observation, prior),
        converged=(jnp.abs(step) <= _TOLERANCE * jnp.sqrt(variance)).all()
        & jnp.isfinite(theta).all(),
    )


def _log_determinant(
    theta: jax.Array,
    normal: jax.Array,
    mask: jax.Array,
    observation: Observation,
    prior: ScenePrior,
) -> jax.Array:
    """Log determinant of the information; no direction is wider than the scene.

    Nor wider than the PSF's bend allows: where two targets coincide the frame does not
    change to first order when they part, but `I/2 d^2` of the PSF's second derivative, of
    norm `sqrt(3/(16 pi)) / s^3`, is a quartic well as wide as the Gaussian of information
    `1.35 I/2 sqrt(3/(16 pi)) / (s^3 noise)`.
    """
    extent = max(observation.counts.shape) if prior.extent is None else prior.extent
    place = 12 / jnp.asarray(extent, normal.dtype) ** 2
    energy = jnp.zeros((), normal.dtype)  # a range is in the residuals already
    if prior.intensity is None:
        energy = 12 / all_counts(observation) ** 2
    width = jnp.sqrt(observation.sigma[0] * observation.sigma[1])
    targets = unpack(theta, mask)
    intensity = jnp.maximum(targets.intensity, 0)
    noise = jnp.sqrt(observation.noise**2 + intensity / observation.gain)
    bend = _QUARTIC * intensity / (width**3 * noise) * _blended(targets, width)
    columns = [place + bend, place + bend, jnp.broadcast_to(energy, bend.shape)]
    least = jnp.append(jnp.stack(columns, -1).reshape(-1), 0)
    unit, scale = _scaled(normal + jnp.diag(least), _present(mask))
    _, log_determinant = spd.inverse(unit)
    return log_determinant - 2 * jnp.log(jnp.where(scale > 0, scale, 1)).sum()


def _blended(targets: Targets, width: jax.Array) -> jax.Array:
    """(K,) 1 where a target coincides with another, 0 where it stands alone."""
    apart = targets.position[:, None] - targets.position[None]
    other = targets.mask[:, None] & targets.mask[None] & ~np.eye(len(targets.mask), dtype=bool)
    near = jnp.exp(-2 * (apart**2).sum(-1) / width**2)
    return jnp.where(other, near, 0).max(-1, initial=0)


def all_counts(observation: Observation) -> jax.Array:
    """(...,) counts of a frame above its background: the most a target can have."""
    above = observation.counts - observation.background[..., None, None]
    total = jnp.where(observation.valid, jnp.maximum(above, 0), 0).sum((-2, -1))
    return jnp.maximum(total, observation.noise)
