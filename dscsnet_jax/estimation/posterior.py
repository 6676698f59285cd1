"""Posterior: average over all scenes that explain a frame, instead of the best one.

Random-walk Metropolis chains, several a frame, started around the fit and shaped by its
covariance, whose length is tuned in a burn-in. The maximum is a poor answer where the
posterior is broad or cut off by the prior; its mean has the least squared error, and its
spread is the error.

Frames run along the last axis, the vector lanes of the processor, and all chains share
one stream of random numbers: each chain is a proper one, and a frame's answer cannot
depend on its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.estimation.blocks import fits_per_block, in_blocks
from dscsnet_jax.estimation.objective import nearest_square, pack, residuals
from dscsnet_jax.estimation.observe import Observation
from dscsnet_jax.estimation.prior import ScenePrior
from dscsnet_jax.inference import spd
from dscsnet_jax.physics.optics import point_response
from dscsnet_jax.physics.targets import Targets, from_arrays

NUM_CHAINS = 4
NUM_BURN_IN = 16
NUM_SAMPLES = 64
THINNING = 24
LEVELS = (0.0228, 0.1587, 0.8413, 0.9772)
"""Quantiles of `Posterior.interval`: one and two standard deviations of a Gaussian."""

_ACCEPTANCE = 0.25
_WALL_PIXELS, _WALL_SHARE = 0.005, 0.01  # how soft the prior's hard limits are
_MIXED = 1.2
_LARGEST_SHARE = 1 / 3  # one over the least effective number of samples


@flax.struct.dataclass
class Posterior:
    """Samples of B frames, summed up.

    Attributes:
      targets: posterior mean, `Targets` (B, K, ...), in the slots of the start.
      covariance: (B, 3K, 3K) as `Fit.covariance`, with the error of the mean of so few
        samples.
      interval: (B, K, 3, 4) quantiles `LEVELS` of row, col and intensity.
      effective_size: (B,) effective number of samples of the worst parameter.
      acceptance: (B,) share of accepted steps.
      mixed: (B,) bool: the chains agree (R-hat below 1.2).
      width_slope: (B,) derivative of the log evidence by the logarithm of the PSF's width,
        which is the posterior mean of that of the log likelihood (Fisher's identity); 0
        unless asked for.
    """

    targets: Targets
    covariance: jax.Array
    interval: jax.Array
    effective_size: jax.Array
    acceptance: jax.Array
    mixed: jax.Array
    width_slope: jax.Array

    @property
    def std(self) -> jax.Array:
        """(B, K, 3) standard deviations of row, col (pixels) and intensity (counts)."""
        variance = jnp.diagonal(self.covariance, axis1=-2, axis2=-1)
        return jnp.sqrt(variance).reshape(*self.targets.mask.shape, 3)


def sample_posterior(
    observation: Observation,
    start: Targets,
    prior: ScenePrior | None = None,
    *,
    num_chains: int = NUM_CHAINS,
    num_burn_in: int = NUM_BURN_IN,
    num_samples: int = NUM_SAMPLES,
    thinning: int = THINNING,
    width_slope: bool = False,
    seed: int = 0,
) -> Posterior:
    """Posterior mean, errors and intervals of the targets of each frame.

    The number of targets is that of the start. Range, separation and extent of the
    prior hold strictly (the place of the extent is averaged over). Targets that change
    places are put back to where they are nearest to, sample by sample.

    Args:
      observation: B frames.
      start: `Targets` (B, K, ...), best those of a fit.
      prior: what is known of the scene; None: nothing.
      num_chains: per frame, at least 2.
      num_burn_in: rounds before, in which the length of the steps is tuned.
      num_samples: rounds that are kept, one sample each, of every chain.
      thinning: random-walk steps of a round; one turn of the cluster follows.
      width_slope: compute `Posterior.width_slope`.
      seed: of the random numbers.

    Returns:
      A `Posterior` of NumPy arrays.

    Raises:
      ValueError: if a number of chains, rounds or steps is too small.

    Example:
      >>> from dscsnet_jax.estimation.observe import observe
      >>> from dscsnet_jax.physics.optics import render
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> truth = from_lists([[(5.0, 5.0, 200.0)]])
      >>> y = render(truth, frame_size=11, sigma=0.5)
      >>> answer = sample_posterior(observe(y, sigma=0.5, noise=2.0, background=0.0), truth)
      >>> answer.targets.position[0, 0].round(1).tolist(), round(float(answer.std[0, 0, 0]), 2)
      ([5.0, 5.0], 0.02)

    References:
      G. O. Roberts, A. Gelman, W. R. Gilks, Ann. Appl. Probab. 7 (1997) 110 (scaling);
      A. Gelman et al., Bayesian Data Analysis, 3rd ed., 2013 (R-hat).
    """
    if num_chains < 2 or num_samples < 2 or num_burn_in < 1 or thinning < 1:
        raise ValueError(
            "expected at least 2 chains and samples, 1 burn-in round and step, got "
            f"{num_chains}, {num_samples}, {num_burn_in}, {thinning}"
        )
    prior = ScenePrior() if prior is None else prior
    run = partial(
        _sample_block,
        num_chains=num_chains,
        num_burn_in=num_burn_in,
        num_samples=num_samples,
        thinning=thinning,
        width_slope=width_slope,
        shot_noise=bool(np.isfinite(observation.gain).any()),
    )
    dtype = np.asarray(observation.counts).dtype
    start = from_arrays(
        np.asarray(start.position, dtype),
        np.asarray(start.intensity, dtype),
        np.asarray(start.mask),
    )
    # Lanes come last: what has none, or only them, broadcasts from the front.
    with jax.numpy_rank_promotion("allow"):
        size = fits_per_block(start.mask.shape[-1])
        return in_blocks(run, (observation, start), prior, np.uint32(seed), size=size)


_STATIC = (
    "num_chains",
    "num_burn_in",
    "num_samples",
    "thinning",
    "width_slope",
    "shot_noise",
)


@partial(jax.jit, static_argnames=_STATIC)
def _sample_block(
    frames: tuple[Observation, Targets],
    prior: ScenePrior,
    seed: jax.Array,
    *,
    num_chains: int,
    num_burn_in: int,
    num_samples: int,
    thinning: int,
    width_slope: bool,
    shot_noise: bool,
) -> Posterior:
    """All chains of one block: rounds of random-walk steps and one rotation each."""
    observation, start = frames
    theta = pack(start, jnp.zeros(len(start.mask)))
    root = jax.vmap(partial(_proposal_root, prior=prior))(theta, start.mask, observation)
    lanes = partial(jax.tree.map, lambda a: jnp.moveaxis(a, 0, -1)[..., None, :])
    seen, mask, fitted, root = lanes((observation, start.mask, theta, root))
    target = partial(_log_density, mask=mask, seen=seen, prior=prior, shot_noise=shot_noise)
    size = len(fitted)

    def slope(theta: jax.Array) -> jax.Array:
        """Derivative of the log density (P, L) by the logarithm of the PSF's width."""
        if not width_slope:
            return jnp.zeros(theta.shape[1:], theta.dtype)

        def widened(log_factor: jax.Array) -> jax.Array:
            wide = seen.replace(sigma=seen.sigma * jnp.exp(log_factor))
            return target(theta, seen=wide)

        zero, one = jnp.zeros((), theta.dtype), jnp.ones((), theta.dtype)
        return jax.jvp(widened, (zero,), (one,))[1]

    def step(state: _Chains, drawn: _Drawn) -> tuple[_Chains, jax.Array]:
        """One step of all chains, and the share accepted (L,).

        A random walk; or the cluster turned about its centre of energy, which makes
        blends that look alike. Both in one, so that the density is compiled once.
        """
        stride = _sum(root[:, q] * drawn.shift[q, :, None][None] for q in range(size))
        walked = state.theta + jnp.exp(state.log_length) * stride
        turned = _turned(state.theta, mask, drawn.angle[:, None])
        proposed = jnp.where(drawn.turn, turned, walked)
        density = target(proposed)
        share = jnp.minimum(jnp.exp(density - state.density), 1)
        rate = share.mean(0)
        accepted = drawn.chance[:, None] < share
        return _Chains(
            jnp.where(accepted, proposed, state.theta),
            jnp.where(accepted, density, state.density),
            state.log_length + jnp.where(drawn.turn, 0, drawn.learning * (rate - _ACCEPTANCE)),
        ), rate

    def one_round(state: _Chains, given: tuple) -> tuple[_Chains, tuple]:
        key, learning = given
        keys = jax.random.split(key, 3)
        steps = thinning + 1
        drawn = _Drawn(
            shift=jax.random.normal(keys[0], (steps, size, num_chains), theta.dtype),
            chance=jax.random.uniform(keys[1], (steps, num_chains), theta.dtype),
            angle=jax.random.uniform(keys[2], (steps, num_chains), theta.dtype, -np.pi, np.pi),
            turn=jnp.arange(steps) == thinning,
            learning=jnp.full(steps, learning),
        )
        state, rate = jax.lax.scan(step, state, drawn)
        return state, (state.theta, rate[:-1].mean(0), slope(state.theta))

    start_key, round_key = jax.random.split(jax.random.key(seed))
    spread = jax.random.normal(start_key, (size, num_chains), theta.dtype)
    dimension = 3 * mask[:, 0].sum(0) + 1
    length = jnp.log(2.38 / jnp.sqrt(dimension.astype(theta.dtype)))
    theta = fitted + jnp.exp(length) * (root * spread[None, :, :, None]).sum(1)
    # The first step is always taken.
    state = _Chains(theta, jnp.full(theta.shape[1:], -jnp.inf, theta.dtype), length)
    rounds = num_burn_in + num_samples
    number = jnp.arange(rounds, dtype=theta.dtype)
    learning = jnp.where(number < num_burn_in, jax.lax.rsqrt(1 + number), 0)
    given = (jax.random.split(round_key, rounds), learning)
    _, kept = jax.lax.scan(one_round, state, given)
    samples, rate, slopes = (a[num_burn_in:] for a in kept)
    table = jnp.moveaxis(samples[:, :-1], 2, 1)  # (S, chains, 3K, L)
    table = table.reshape(num_samples, num_chains, -1, 3, table.shape[-1])
    flat = table.reshape(-1, *table.shape[2:])
    flat = _sorted_out(flat, fitted[:-1, 0].reshape(flat.shape[1:]), mask[:, 0])
    summary = _summary(flat.reshape(table.shape), start.mask, rate.mean(0))
    return dataclasses.replace(summary, width_slope=slopes.mean((0, 1)))


class _Chains(NamedTuple):
    """Places of the chains (3K+1, P, L), log density there (P, L), log length of steps (L,)."""

    theta: jax.Array
    density: jax.Array
    log_length: jax.Array


class _Drawn(NamedTuple):
    """Random numbers of one step: the same for all frames."""

    shift: jax.Array
    chance: jax.Array
    angle: jax.Array
    turn: jax.Array
    learning: jax.Array


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
    """Sum over the leading axis, written out.

    The compiler's own reduction over it takes one lane at a time.
    """
    return functools.reduce(operator.add, terms)


def _turned(theta: jax.Array, mask: jax.Array, angle: jax.Array) -> jax.Array:
    """The targets turned by an angle about their centre of energy, which stays."""
    row, col, intensity = (theta[axis:-1:3] for axis in range(3))
    energy = jnp.where(mask, intensity, 0)
    total = _sum(energy)
    total = jnp.where(total > 0, total, 1)
    row_off = row - _sum(energy * row) / total
    col_off = col - _sum(energy * col) / total
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    new_row = row - row_off + cosine * row_off - sine * col_off
    new_col = col - col_off + sine * row_off + cosine * col_off
    table = jnp.stack([jnp.where(mask, new_row, row), jnp.where(mask, new_col, col), intensity], 1)
    return jnp.concatenate([table.reshape(-1, *table.shape[2:]), theta[-1:]])


def _proposal_root(
    theta: jax.Array, mask: jax.Array, observation: Observation, *, prior: ScenePrior
) -> jax.Array:
    """Root (3K+1, 3K+1) of one frame's covariance, as far as it is Gaussian."""
    jacobian = residuals(theta, mask, observation, prior).jacobian
    extent = max(observation.counts.shape) if prior.extent is None else prior.extent
    present = jnp.concatenate([jnp.repeat(mask, 3), jnp.ones(1, bool)])
    is_position = np.append(np.tile([1.0, 1.0, 0.0], len(mask)), 0.0)
    place = jnp.diag(jnp.asarray(is_position, theta.dtype)) * 12 / extent**2
    information = jnp.einsum("rp,rq->pq", jacobian, jacobian, precision="highest") + place
    diagonal = jnp.diagonal(information)
    tells = present & (diagonal > 0)
    scale = jnp.where(tells, jax.lax.rsqrt(jnp.where(tells, diagonal, 1)), 0)
    unit = information * scale[:, None] * scale[None, :]
    covariance, _ = spd.inverse(jnp.where(np.eye(len(theta)) > 0, 1, unit))
    width = jnp.sqrt(jnp.diagonal(covariance))
    root = spd.cholesky(covariance / (width[:, None] * width[None, :]))
    return root * (width * scale)[:, None]


def _log_density(
    theta: jax.Array,
    *,
    mask: jax.Array,
    seen: Observation,
    prior: ScenePrior,
    shot_noise: bool,
) -> jax.Array:
    """Log posterior (P, L) of `theta` (3K+1, P, L), up to a constant."""
    row, col, intensity = (theta[axis:-1:3] for axis in range(3))
    in_row = point_response(row, seen.counts.shape[0], seen.sigma[0], axis=0)
    in_col = point_response(col, seen.counts.shape[1], seen.sigma[1], axis=0)
    in_col = in_col * jnp.where(mask, intensity, 0)
    source = _sum(in_row[:, None, k] * in_col[None, :, k] for k in range(len(mask)))
    residual = seen.counts - source - (seen.background + seen.background_std * theta[-1])
    variance = seen.noise**2
    if shot_noise:
        variance = variance + jnp.maximum(source, 0) / seen.gain
    residual = jnp.where(seen.saturated, jnp.maximum(residual, 0), residual)
    terms = residual**2 / variance
    if shot_noise:
        terms = terms + jnp.where(seen.saturated, 0, jnp.log(variance))
    misfit = _sum(_sum(jnp.where(seen.valid, terms, 0)))
    shape = seen.counts.shape[:2]
    flat = _log_prior((row, col, intensity), mask, prior, shape, seen.noise)
    return flat - (misfit + theta[-1] ** 2) / 2


def _log_prior(
    table: tuple[jax.Array, jax.Array, jax.Array],
    mask: jax.Array,
    prior: ScenePrior,
    shape: tuple[int, ...],
    noise: jax.Array,
) -> jax.Array:
    """Log prior (P, L): flat within steep walls, so that a start outside finds its way in."""
    row, col, intensity = table
    low, high = (0.0, jnp.inf) if prior.intensity is None else prior.intensity
    wall = noise if prior.intensity is None else _WALL_SHARE * (high - low)
    beyond = jnp.maximum(low - intensity, 0) + jnp.maximum(intensity - high, 0)
    penalty = _sum(jnp.where(mask, (beyond / wall) ** 2, 0))
    for place, side in ((row, shape[0]), (col, shape[1])):
        outside = jnp.maximum(-0.5 - place, 0) + jnp.maximum(place - (side - 0.5), 0)
        penalty = penalty + _sum(jnp.where(mask, (outside / _WALL_PIXELS) ** 2, 0))
    for first, second in zip(*np.triu_indices(len(mask), 1), strict=True):
        distance2 = (row[first] - row[second]) ** 2 + (col[first] - col[second]) ** 2
        missing = jnp.maximum(prior.separation - jnp.sqrt(distance2), 0) / _WALL_PIXELS
        penalty = penalty + jnp.where(mask[first] & mask[second], missing**2, 0)
    total = -penalty / 2
    if prior.extent is None:
        return total
    if prior.corner is not None:
        for place in (row, col):
            begin = nearest_square(place, mask, prior)
            outside = jnp.maximum(begin - place, place - (begin + prior.extent))
            penalty = jnp.where(mask, jnp.maximum(outside, 0) / _WALL_PIXELS, 0) ** 2
            total = total - _sum(penalty) / 2
        return total
    for place in (row, col):
        spread = jnp.where(mask, place, -jnp.inf).max(0) - jnp.where(mask, place, jnp.inf).min(0)
        # A square of side e holds them in (e - spread) of its places.
        room = jnp.where(mask.any(0), prior.extent - spread, prior.extent)
        least = _WALL_PIXELS
        total = total + jnp.log(jnp.maximum(room, least))
        total = total - (jnp.maximum(least - room, 0) / least) ** 2 / 2
    return total


def _sorted_out(samples: jax.Array, reference: jax.Array, mask: jax.Array) -> jax.Array:
    """Undo label switching: targets (S, K, 3, L) in the order of a reference (K, 3, L).

    Pairs are exchanged as long as that brings them nearer to their places, first those
    of the reference, then those of the mean.
    """
    pairs = list(zip(*np.triu_indices(samples.shape[1], 1), strict=True))

    def exchange(samples: jax.Array, reference: jax.Array) -> jax.Array:
        targets = [samples[:, k] for k in range(samples.shape[1])]
        for a, b in [*pairs, *pairs]:
            # |a - ra|^2 + |b - rb|^2 > |a - rb|^2 + |b - ra|^2, multiplied out
            gain = ((targets[a] - targets[b]) * (reference[b] - reference[a]))[:, :2].sum(1)
            swap = ((gain > 0) & mask[a] & mask[b])[:, None]
            targets[a], targets[b] = (
                jnp.where(swap, targets[b], targets[a]),
                jnp.where(swap, targets[a], targets[b]),
            )
        return jnp.stack(targets, 1)

    once = exchange(samples, reference)
    return exchange(once, once.mean(0))


def _summary(samples: jax.Array, mask: jax.Array, acceptance: jax.Array) -> Posterior:
    """Moments and quantiles of samples (S, P, K, 3, L); answers with frames first."""
    chains = samples.shape[:2]
    samples = samples.reshape(-1, *samples.shape[2:])
    number, slots = samples.shape[:2]
    mean = samples.mean(0)
    off = samples - mean
    flat = off.reshape(number, 3 * slots, -1)
    covariance = jnp.einsum("spl,sql->lpq", flat, flat, precision="highest") / number
    # Means of P chains vary by P var/ESS.
    variance = (off**2).mean(0)
    between = off.reshape(*chains, *off.shape[1:]).mean(0).var(0, ddof=1)
    effective = jnp.where(
        variance > 0, chains[1] * variance / jnp.where(between > 0, between, 1), jnp.inf
    )
    within = jnp.maximum(variance - between, 0)
    ratio = jnp.sqrt(variance / jnp.where(within > 0, within, 1))
    used = mask.T[:, None]
    # The mean and the spread of few samples are uncertain themselves.
    shares = jnp.where(used & (variance > 0), between / jnp.where(variance > 0, variance, 1), 0)
    share = shares.sum((0, 1)) / jnp.maximum(3 * mask.sum(-1), 1) / chains[1]
    share = jnp.minimum(share, _LARGEST_SHARE)
    covariance = covariance * ((1 + share) / (1 - share))[:, None, None]
    ordered = jnp.sort(samples, axis=0)
    at = np.round(np.array(LEVELS) * (number - 1)).astype(int)
    interval = jnp.moveaxis(ordered[at], (0, -1), (-1, 0))
    mean = jnp.moveaxis(mean, -1, 0)
    present = mask[..., None]
    both = jnp.repeat(mask, 3, -1)
    return Posterior(
        targets=from_arrays(
            jnp.where(present, mean[..., :2], 0), jnp.where(mask, mean[..., 2], 0), mask
        ),
        covariance=jnp.where(both[:, :, None] & both[:, None, :], covariance, 0),
        interval=jnp.where(present[..., None], interval, 0),
        effective_size=jnp.minimum(jnp.where(used, effective, jnp.inf).min((0, 1)), number),
        acceptance=acceptance,
        width_slope=jnp.zeros_like(acceptance),
        mixed=jnp.where(used, ratio, 1).max((0, 1)) < _MIXED,
    )
