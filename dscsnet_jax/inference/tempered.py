"""Tempered: the posterior of windows from draws of the prior, and its evidence.

Sequential Monte Carlo: particles drawn from the prior see the likelihood to a power that grows
from 0 to 1, in steps that keep half of their effective number,

    p_j(theta) ~ p(theta) L(theta)^beta_j,   Z = prod_j mean_i L(theta_i)^(beta_j+1 - beta_j)

and after each step they are resampled and moved. It needs no start and finds all modes: an honest
reference, slower by far than a fit with chains around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dscsnet_jax.inference.chains import streams
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.lanes import lanes_last, to_lanes
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.particles import draws_of, from_prior, in_order, resampled
from dscsnet_jax.inference.scene_model import HARD, SceneModel, scene_model
from dscsnet_jax.inference.summary import Posterior, sorted_out, summarise
from dscsnet_jax.inference.tempered_moves import KINDS
from dscsnet_jax.inference.theta import parts_of

NUM_PARTICLES = 512
NUM_MOVES = 96
"""Moves of half of the particles after each step."""

_EFFECTIVE = 0.5  # of the particles, that a step keeps
_MOST_STEPS = 200
_LAST_STEPS = 8  # of moves alone, at the end
_ACCEPTANCE = 0.25
_POPULATIONS = 4  # of a window's particles
_AGREE = 1.5  # populations, in effect, that have the same evidence
_BEYOND = -50.0  # log prior of places that break its limits
_BISECTIONS = 30
_NUMBERINGS = 6  # of the targets of all particles, each nearer to their means


class Tempered(NamedTuple):
    """What particles tell of B windows.

    Attributes:
      posterior: means, errors and intervals; its samples are the particles. It has converged
        where populations have the same evidence within some e-folds; R-hat tells nothing.
      log_evidence: (B,) of the pixels given the number of targets, natural logarithms without
        `-1/2 log(2 pi)` of each pixel.
      log_likelihood: (B,) its posterior mean; over many windows that of the true scenes.
      num_steps: (B,) steps from the prior to the posterior.
    """

    posterior: Posterior
    log_evidence: jax.Array
    log_likelihood: jax.Array
    num_steps: jax.Array


class _State(NamedTuple):
    """Particles of L windows: places (D, P, L), their log likelihood and prior (P, L).

    A log weight (P, L) of the first step, which is 0 later. Of the windows (L,): power, log
    evidence so far, logarithms of the lengths of moves (kinds, L), steps that are left at the
    end, and those done; `number` is that of the steps of all.
    """

    theta: jax.Array
    like: jax.Array
    prior: jax.Array
    weight: jax.Array
    beta: jax.Array
    log_z: jax.Array
    log_length: jax.Array
    left: jax.Array
    steps: jax.Array
    number: jax.Array


@lanes_last
def tempered(
    windows: Observation,
    mask: jax.Array,
    known: Known,
    key: jax.Array,
    *,
    num_particles: int = NUM_PARTICLES,
    num_moves: int = NUM_MOVES,
) -> Tempered:
    """Posterior and evidence of windows with so many targets, from draws of the prior.

    A window's answer does not depend on its neighbours in the batch.

    Args:
      windows: `Observation` of (B, N, M).
      mask: (B, K) bool, the targets there are.
      known: PSF, sensor's gain and scene prior.
      key: PRNG key; each window's stream also depends on its recorded pixels.
      num_particles: of each window, a multiple of 8, in four populations that never meet.
      num_moves: of half of the particles, after each step.

    Returns:
      `Tempered`.

    Raises:
      ValueError: for another number of particles.

    Example:
      >>> import dscsnet_jax as dj
      >>> y = dj.render(dj.from_lists([[(3.0, 2.7, 200.0)]]), frame_size=7, psf=0.5)
      >>> windows = dj.observe(y, dj.Sensor(read_noise=2.0, background=0.0))
      >>> known = Known(dj.Gaussian(0.5), prior=dj.scene_prior(intensity=(150.0, 250.0)))
      >>> found = jax.jit(tempered)(windows, jnp.ones((1, 1), bool), known, jax.random.key(0))
      >>> [round(float(x), 1) for x in found.posterior.targets.position[0, 0]]
      [3.0, 2.7]

    References:
      P. Del Moral, A. Doucet, A. Jasra, J. R. Stat. Soc. B 68 (2006) 411;
      C. J. F. ter Braak, Stat. Comput. 16 (2006) 239 (differential evolution).
    """
    if num_particles % (2 * _POPULATIONS) or num_particles < 8:
        raise ValueError(f"num_particles must be a multiple of 8, got {num_particles}")
    num_windows = mask.shape[0]
    # Populations that never meet: where they agree, they can be believed.
    windows, mask = jax.tree.map(
        lambda a: jnp.concatenate([jnp.asarray(a)] * _POPULATIONS), (windows, mask)
    )
    population = jnp.repeat(jnp.arange(_POPULATIONS), num_windows)
    keys = jax.vmap(jax.random.fold_in)(streams(key, windows), population)
    number = num_particles // _POPULATIONS
    seen, present = jax.tree.map(lambda a: to_lanes(a)[..., None, :], (windows, mask))
    model = scene_model(seen, present, known, softness=HARD, uniform=True)
    draws = partial(draws_of, keys, dtype=seen.counts.dtype)
    theta, weight = from_prior(model, draws, number)
    like, prior = _densities(model, theta)
    zero = jnp.zeros(like.shape[-1], like.dtype)
    whole = jnp.zeros(zero.shape, jnp.int32)
    first = jnp.zeros((), jnp.int32)
    length = jnp.zeros((len(KINDS), *zero.shape), zero.dtype)  # logarithms
    last = whole + _LAST_STEPS
    state = _State(theta, like, prior, weight, zero, zero, length, last, whole, first)
    move = partial(_move, model=model, draws=draws)

    def step(state: _State) -> _State:
        active = state.left > 0
        turn = state.number + 1
        beta = _next_power(state.like, state.beta)
        # Draws that found no place carry no weight.
        weight = state.weight + (beta - state.beta) * state.like
        weight = jnp.where(state.prior > _BEYOND, weight, -jnp.inf)
        log_mean = jax.nn.logsumexp(weight, axis=0) - jnp.log(number)
        index = resampled(weight, draws(turn, 0, (1,))[0])
        theta = jnp.take_along_axis(state.theta, index[None], 1)
        like, prior = (jnp.take_along_axis(a, index, 0) for a in (state.like, state.prior))
        none = jnp.zeros_like(like)
        new = state._replace(theta=theta, like=like, prior=prior, weight=none, beta=beta)
        new = jax.lax.fori_loop(0, num_moves, lambda i, s: move(s, number=turn, index=i), new)
        new = new._replace(
            log_z=state.log_z + log_mean,
            left=state.left - (beta >= 1),
            steps=state.steps + 1,
        )
        kept = jax.tree.map(lambda a, b: jnp.where(active, a, b) if a.ndim else a, new, state)
        return kept._replace(number=turn)  # of all: what is drawn goes by it

    def going(state: _State) -> jax.Array:
        return (state.left > 0).any() & (state.number < _MOST_STEPS)

    state = jax.lax.while_loop(going, step, state)
    return _described(state, model, draws, num_windows)


def _densities(model: SceneModel, theta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log likelihood and log prior (P, L) of places; of joint draws that keep their distance."""
    return model.log_likelihood(theta), model.log_prior(theta) + model.log_squares(theta)


def _next_power(like: jax.Array, beta: jax.Array) -> jax.Array:
    """(L,) largest power, up to 1, whose weights keep half of the effective number."""
    best = like.max(0)

    def keeps(power: jax.Array) -> jax.Array:
        weight = jnp.exp((power - beta) * (like - best))
        return weight.sum(0) ** 2 >= _EFFECTIVE * len(like) * (weight**2).sum(0)

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        # In the logarithm of what is added: first steps are a millionth of the last.
        middle = jnp.sqrt(low * high)
        fine = keeps(beta + middle)
        return jnp.where(fine, middle, low), jnp.where(fine, high, middle)

    ends = jnp.full_like(beta, 1e-9), 1 - beta
    low, _ = jax.lax.fori_loop(0, _BISECTIONS, halve, ends)
    return jnp.where(keeps(jnp.ones_like(beta)), 1.0, jnp.minimum(beta + low, 1))


def _move(
    state: _State,
    *,
    model: SceneModel,
    draws: Callable[..., jax.Array],
    number: jax.Array,
    index: jax.Array,
) -> _State:
    """A move of half of the particles, which the others tell how far to step."""
    half = state.like.shape[0] // 2
    own, others = state.theta[:, :half], state.theta[:, half:]
    u = draws(number, 4 + index, (6, half))
    length = jnp.exp(state.log_length[index % len(KINDS)])
    kinds = [partial(kind, own, others, u, length, model) for kind in KINDS]
    proposed, ordered = jax.lax.switch(index % len(kinds), kinds)
    proposed, fine = in_order(proposed, model.mask)
    like, prior = _densities(model, proposed)
    like = jnp.where(jnp.isfinite(like), like, -jnp.inf)
    gain = state.beta * (like - state.like[:half]) + prior - state.prior[:half]
    gain = jnp.where(_inside(proposed, model), gain, -jnp.inf)
    accepted = (jnp.log(u[-1]) < gain) & (fine | ~ordered)

    def joined(new: jax.Array, old: jax.Array, rest: jax.Array, axis: int) -> jax.Array:
        return jnp.concatenate([rest, jnp.where(accepted, new, old)], axis)

    rate = accepted.mean(0, dtype=like.dtype)
    learned = state.log_length[index % len(kinds)] + 0.5 * (rate - _ACCEPTANCE)
    return state._replace(
        theta=joined(proposed, own, others, 1),
        like=joined(like, state.like[:half], state.like[half:], 0),
        prior=joined(prior, state.prior[:half], state.prior[half:], 0),
        log_length=state.log_length.at[index % len(kinds)].set(jnp.clip(learned, -4, 1)),
    )


def _inside(theta: jax.Array, model: SceneModel) -> jax.Array:
    """(P/2, L) bool: within what the prior is drawn from, where its density has no such wall."""
    row, col, v, _ = parts_of(theta)
    fine = jnp.ones(theta.shape[1:], bool)
    if model.known.prior.intensity is None:
        fine &= (~model.mask | ((v >= 0) & (v <= 1))).all(0)
    if model.known.prior.cluster_size is None and model.known.prior.spread is None:
        for place, last in zip((row, col), model.seen.counts.shape, strict=False):
            fine &= (~model.mask | ((place >= -0.5) & (place <= last - 0.5))).all(0)
    return fine


def _described(
    state: _State, model: SceneModel, draws: Callable[..., jax.Array], num_windows: int
) -> Tempered:
    """Places weighed by their own density, and the populations of each window summed up."""
    theta, like = state.theta, state.like
    number = like.shape[0]
    log_weight = jnp.broadcast_to(model.log_places(theta), like.shape)
    log_z = state.log_z + jax.nn.logsumexp(log_weight, axis=0) - jnp.log(number)
    index = resampled(log_weight, draws(_MOST_STEPS, 0, (1,))[0])
    theta, like = jnp.take_along_axis(theta, index[None], 1), jnp.take_along_axis(like, index, 0)
    slots = model.mask.shape[0]

    def together(a: jax.Array) -> jax.Array:
        """Values (..., L) of populations as (..., populations, windows)."""
        return a.reshape(*a.shape[:-1], _POPULATIONS, num_windows)

    table = jnp.moveaxis(theta[:-1].reshape(slots, 3, *theta.shape[1:]), 2, 0)  # (P, K, 3, L)
    table = jnp.moveaxis(together(table), -2, 1)  # (P, populations, K, 3, windows)
    flat = table.reshape(-1, *table.shape[2:])
    best = jnp.argmax(together(like).reshape(-1, num_windows), 0)
    reference = jnp.take_along_axis(flat, best[None, None, None], 0)[0]
    # A population weighs as its evidence: one that has missed the scene does not count.
    evidence = together(log_z)
    share = jax.nn.softmax(evidence, axis=0)
    each = jnp.broadcast_to(jnp.log(share)[None], (number, *share.shape))
    u = draws(_MOST_STEPS, 1, (1,))[0, :num_windows]
    index = resampled(each.reshape(-1, num_windows), u)
    order = jnp.argsort(draws(_MOST_STEPS, 2, (len(index),))[:, :num_windows], 0)
    index = jnp.take_along_axis(index, order, 0)  # groups of a summary are alike
    flat = jnp.take_along_axis(flat, index[:, None, None], 0)
    seen, mask = jax.tree.map(lambda a: a[..., :num_windows], (model.seen, model.mask))
    for _ in range(_NUMBERINGS):
        flat = sorted_out(flat, reference, mask[:, 0])
        reference = flat.mean(0)
    of_windows = scene_model(seen, mask, model.known, softness=HARD, uniform=True)
    none = jnp.zeros(num_windows, like.dtype)
    posterior = summarise(
        flat.reshape(table.shape), of_windows, none, none[None][:0], keep_samples=True
    )
    effective = 1 / (share**2).sum(0)
    posterior = dataclasses.replace(
        posterior,
        converged=together(state.beta >= 1).all(0) & (effective > _AGREE),
        effective_sample_size=posterior.effective_sample_size * effective / _POPULATIONS,
    )
    log_z = jax.nn.logsumexp(evidence, axis=0) - jnp.log(_POPULATIONS)
    steps = together(state.steps).max(0)
    return Tempered(posterior, log_z, (share * together(like.mean(0))).sum(0), steps)
