"""Turn: rounds of steps of all chains of some windows, and what their samples tell.

Chains of all windows run along the last axis, the vector lanes of the processor. Windows share
uniform random numbers, which each window shifts, modulo 1, by its own (Cranley and Patterson
1976), drawn anew every round: every stream is a proper one, the streams of two windows are
independent.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dscsnet_jax.inference import spd
from dscsnet_jax.inference.chains import NUM_SAMPLES, Chains, roots_of, streams
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.lanes import from_lanes, lanes_last, to_lanes
from dscsnet_jax.inference.moves import NUM_FURTHER, WALK, Shape, kind_of, propose
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.scene_model import HARD, scene_model
from dscsnet_jax.inference.summary import (
    Posterior,
    is_numbered,
    numbered,
    sorted_out,
    summarise,
)
from dscsnet_jax.physics.psf_coordinates import coordinates
from dscsnet_jax.physics.targets import Targets

NUM_BURN_IN = 8
THINNING = 6
_ACCEPTANCE = 0.1
_TIMES = (1, 1, 2, 4, 8)  # as many steps a sample in each turn of a window whose chains disagree
_LINEAR_TIMES = (1, 1, 1, 2, 4)  # where some of the steps are trajectories
NUM_TURNS = len(_TIMES)
_FIRST_WEIGHT = 200.0  # samples that the shape before is worth: few make one that is too narrow
_WIDER = 1.15  # than the samples: what the prior cuts off has its corners far out
_LEARN_EVERY = 2, 8  # rounds of the burn-in, and after it


class _State(NamedTuple):
    """Where chains stand and how they step.

    Places (3K+1, 1, C) of the chains of all windows, log density there and that of the places
    against joint draws; of the steps log length (1, C) and shape; of L windows mean (3K+1, L) and
    covariance of the places so far.
    """

    theta: jax.Array
    density: jax.Array
    log_places: jax.Array
    log_length: jax.Array
    shape: Shape
    mean: jax.Array
    covariance: jax.Array


@lanes_last
def turn(
    windows: Observation,
    start: Targets,
    chains: Chains,
    known: Known,
    key: jax.Array,
    number: int | jax.Array,
    *,
    num_burn_in: int = NUM_BURN_IN,
    num_samples: int = NUM_SAMPLES,
    thinning: int = THINNING,
    psf_slope: bool = False,
    keep_samples: bool = False,
) -> tuple[Posterior, Chains]:
    """Rounds of steps of all chains, and what the kept samples tell.

    Windows whose chains disagree go on with the chains of this turn, for `NUM_TURNS` turns.

    Args:
      windows: `Observation` of (B, N, M).
      start: `Targets` (B, K, ...).
      chains: of the turn before, at first of `begin`.
      known: PSF, sensor's gain and scene prior.
      key: as of `begin`.
      number: of the turn; later ones are longer.
      num_burn_in: as of `sample`.
      num_samples: as of `sample`.
      thinning: as of `sample`.
      psf_slope: as of `sample`.
      keep_samples: as of `sample`.

    Returns:
      `Posterior`, and the chains to go on with.
    """
    shared, keys = jax.random.fold_in(key, 1), streams(key, windows)
    num_windows, num_chains, size = chains.theta.shape
    thinning *= start.mask.shape[1]  # a walk's samples are alike for as long as it has parameters

    def tiled(a: jax.Array) -> jax.Array:
        """Values (..., L) of windows for each of their chains, (..., 1, C)."""
        return jnp.tile(a, num_chains)[..., None, :]

    def by_window(a: jax.Array) -> jax.Array:
        """Values (..., 1, C) of chains as (..., chains, L)."""
        return a.reshape(*a.shape[:-2], num_chains, num_windows)

    lanes = partial(jax.tree.map, lambda a: tiled(to_lanes(a)))
    mask = lanes(start.mask)
    model = scene_model(lanes(windows), mask, known, softness=HARD, uniform=True)
    times = jnp.asarray(_LINEAR_TIMES if model.linear else _TIMES, jnp.int32)[number]
    fitted = lanes(chains.fitted)
    theta = jnp.moveaxis(chains.theta, -1, 0).swapaxes(1, 2).reshape(size, 1, -1)
    sequential = known.prior.places == "sequential" and known.prior.cluster_size is not None

    def log_density(theta: jax.Array) -> jax.Array:
        return model.log_likelihood(theta) + model.log_prior(theta) + model.log_squares(theta)

    def density(theta: jax.Array) -> jax.Array:
        """Log posterior of targets numbered as they are fitted: the steps' shape is theirs."""
        return jnp.where(is_numbered(theta, fitted, mask), log_density(theta), -jnp.inf)

    def slope(theta: jax.Array) -> jax.Array:
        """Derivatives of the log likelihood (P, 1, C) by the coordinates of the PSF."""
        if not psf_slope:
            return jnp.zeros((0, *theta.shape[1:]), theta.dtype)
        free = coordinates(model.known.psf)

        def changed(values: jax.Array) -> jax.Array:
            return model.with_psf(free.psf(values)).log_likelihood(theta)

        return jnp.moveaxis(jax.jacfwd(changed)(free.values), -1, 0)

    def one_round(state: _State, round_: jax.Array) -> tuple[_State, tuple]:
        """Steps that keep the joint density, then accepted as one for the places' own."""
        key = jax.random.fold_in(jax.random.fold_in(shared, number), round_)
        own = jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(k, number), round_))(keys)
        draw = partial(jax.random.uniform, dtype=theta.dtype)
        numbers = (size + NUM_FURTHER + 2, num_chains)
        shift = to_lanes(jax.vmap(partial(draw, shape=numbers))(own)).reshape(numbers[0], 1, -1)
        learning = jnp.where(round_ < num_burn_in, jax.lax.rsqrt(1 + round_.astype(theta.dtype)), 0)

        def step(carry: tuple[_State, jax.Array], drawn: jax.Array) -> tuple[tuple, None]:
            state, taken = carry
            kind = kind_of(drawn[0, 0, 0], model, number)
            u = drawn[1:] + shift
            u = u - (u >= 1)
            length = jnp.exp(state.log_length)
            at = state.theta, state.shape, length
            proposed, gain = propose(*at, model, fitted, kind, u, log_density)
            new = density(proposed)
            ratio = jnp.minimum(new - state.density + gain, 0)
            share = jnp.where(new > -jnp.inf, jnp.exp(ratio), 0)
            accepted = u[-1] < share
            rate = jnp.tile(by_window(share).mean(0), num_chains)[None]
            tune = jnp.where(kind == WALK, learning, 0) * (rate - _ACCEPTANCE)
            moved = state._replace(
                theta=jnp.where(accepted, proposed, state.theta),
                density=jnp.where(accepted, new, state.density),
                log_length=jnp.minimum(state.log_length + tune, 0),
            )
            return (moved, taken + rate), None

        def steps(i: jax.Array, carry: tuple[_State, jax.Array]) -> tuple[_State, jax.Array]:
            drawn = draw(jax.random.fold_in(key, i), (thinning, 1 + numbers[0], num_chains))
            drawn = jnp.repeat(drawn, num_windows, axis=-1)[:, :, None]
            return jax.lax.scan(step, carry, drawn)[0]

        taken = jnp.zeros_like(state.log_length)
        new, taken = jax.lax.fori_loop(0, times, steps, (state, taken))
        if sequential:
            log_places = model.log_places(new.theta)
            accepted = shift[-2] < jnp.exp(jnp.minimum(log_places - state.log_places, 0))
            new = new._replace(
                theta=jnp.where(accepted, new.theta, state.theta),
                density=jnp.where(accepted, new.density, state.density),
                log_places=jnp.where(accepted, log_places, state.log_places),
            )
        new = learned(new, round_)
        return new, (new.theta, taken / (thinning * times), slope(new.theta))

    def learned(state: _State, round_: jax.Array) -> _State:
        """The covariance of the places so far shapes the steps."""
        weight = _FIRST_WEIGHT + num_chains * (round_ + 1).astype(theta.dtype)
        places = by_window(state.theta)
        off = places - state.mean[:, None]
        mean = state.mean + off.sum(1) / weight
        square = (off[:, None] * (places - mean[:, None])[None]).sum(2)
        covariance = state.covariance + (square - num_chains * state.covariance) / weight
        again = (round_ + 1) % jnp.where(round_ < num_burn_in, *_LEARN_EVERY) == 0
        shape = jax.lax.cond(
            again, lambda: shaped(mean, roots_of(covariance, own_mask)), lambda: state.shape
        )
        return state._replace(shape=shape, mean=mean, covariance=covariance)

    def shaped(mean: jax.Array, root: jax.Array) -> Shape:
        root = _WIDER * root
        return Shape(*map(tiled, (mean, root, spd.triangular_inverse(root))))

    own_mask, centre, mean, root, log_length = to_lanes(
        (start.mask, chains.fitted, chains.mean, chains.root, chains.log_length)
    )
    theta = numbered(theta, fitted, mask)
    covariance = jnp.einsum("pql,rql->prl", root, root, precision="highest")
    first = density(theta)
    places = model.log_places(theta) if sequential else jnp.zeros_like(first)
    shape = shaped(mean, root)
    state = _State(theta, first, places, tiled(log_length), shape, mean, covariance)
    rounds = jnp.arange(num_burn_in + num_samples, dtype=jnp.int32)
    state, kept = jax.lax.scan(one_round, state, rounds)
    new, rate, slopes = (by_window(a[num_burn_in:]) for a in kept)
    both = jnp.concatenate([to_lanes(chains.samples)[::2][: num_samples // 2], new[::-2][::-1]])
    samples = jnp.where(jnp.asarray(number) == 0, new, both)
    table = jnp.moveaxis(samples[:, :-1], 2, 1)  # (S, chains, 3K, L)
    table = table.reshape(*table.shape[:2], -1, 3, table.shape[-1])
    flat = table.reshape(-1, *table.shape[2:])
    flat = sorted_out(flat, centre[:-1].reshape(flat.shape[1:]), own_mask)
    seen = jax.tree.map(lambda a: to_lanes(a)[..., None, :], windows)
    of_windows = scene_model(seen, own_mask[:, None], known, softness=HARD, uniform=True)
    of_steps = rate.mean((0, 1)), slopes.mean((0, 2))
    answer = summarise(flat.reshape(table.shape), of_windows, *of_steps, keep_samples=keep_samples)
    chains = chains._replace(samples=from_lanes(samples))
    flat = flat.reshape(len(flat), -1, flat.shape[-1])
    flat = jnp.concatenate([flat, samples[:, -1].reshape(len(flat), 1, -1)], 1)
    log_length = from_lanes(by_window(state.log_length)[0])
    return answer, _adapted(chains, flat, log_length, start.mask)


def _adapted(chains: Chains, samples: jax.Array, log_length: jax.Array, mask: jax.Array) -> Chains:
    """Chains to go on with, shaped by the samples (S, 3K+1, L) so far."""
    mean = samples.mean(0)
    off = samples - mean
    covariance = jnp.einsum("spl,sql->pql", off, off, precision="highest") / len(samples)
    root = roots_of(covariance, mask.T)
    theta, mean, root = from_lanes((samples[-chains.theta.shape[1] :], mean, root))
    return chains._replace(theta=theta, mean=mean, root=root, log_length=log_length)
