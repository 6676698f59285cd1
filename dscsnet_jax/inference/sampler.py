"""Sampler: average over all scenes that explain a window, instead of the best one.

Metropolis chains, several a window, started around the fit. Their steps would leave a Gaussian
distribution as it is, however long they are: that of the fit at first, then more and more that
of the samples so far (an adaptation that dies out: Haario, Saksman and Tamminen 2001); their
length is tuned in a burn-in. The maximum is a poor answer where the posterior is broad or cut
off by the prior; its mean has the least squared error, and its spread is the error. Windows
whose chains disagree go on: with every turn they have run twice as long, and keep every other
sample.

Chains of all windows run along the last axis, the vector lanes of the processor. Windows share
uniform random numbers, which each window shifts, modulo 1, by its own (Cranley and Patterson
1976), drawn anew every round from the key and a hash of its recorded pixels: every stream is a
proper one, the streams of two windows are independent, and no answer depends on its neighbours.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dscsnet_jax.inference import spd
from dscsnet_jax.inference.fit import scaled
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.lanes import from_lanes, lanes_last, to_lanes
from dscsnet_jax.inference.moves import NUM_FURTHER, WALK, Shape, kind_of, propose
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.scene_model import HARD, SceneModel, scene_model
from dscsnet_jax.inference.summary import (
    Posterior,
    is_numbered,
    nothing,
    numbered,
    sorted_out,
    summarise,
)
from dscsnet_jax.inference.theta import present_of
from dscsnet_jax.physics.psf_coordinates import coordinates
from dscsnet_jax.physics.targets import Targets

NUM_CHAINS = 4
NUM_BURN_IN = 8
NUM_SAMPLES = 32
THINNING = 6
_ACCEPTANCE = 0.1
_PIECE = 32  # windows that run together
_TIMES = (1, 1, 2, 4, 8)  # as many steps a sample in each turn of a window whose chains disagree
NUM_TURNS = len(_TIMES)
_RIDGE = 1e-4  # of samples that are all alike
_FIRST_WEIGHT = 200.0  # samples that the shape before is worth: few make one that is too narrow
_WIDER = 1.15  # than the samples: what the prior cuts off has its corners far out
_LEARN_EVERY = 2, 8  # rounds of the burn-in, and after it


@lanes_last
def sample(
    windows: Observation,
    start: Targets,
    known: Known,
    key: jax.Array,
    *,
    num_chains: int = NUM_CHAINS,
    num_burn_in: int = NUM_BURN_IN,
    num_samples: int = NUM_SAMPLES,
    thinning: int = THINNING,
    psf_slope: bool = False,
    keep_samples: bool = False,
) -> Posterior:
    """Posterior mean, errors and intervals of the targets of each window.

    The number of targets is that of the start. Limits of the prior hold but for 0.0005
    pixels. Targets that change places are put back to where they are nearest to, sample
    by sample. Windows whose chains disagree go on, with more steps a sample.

    Args:
      windows: `Observation` of (B, N, M).
      start: `Targets` (B, K, ...), best those of a fit.
      known: PSF, sensor's gain and scene prior.
      key: PRNG key.
      num_chains: per window, at least 2.
      num_burn_in: rounds before, for the chains to forget their start.
      num_samples: rounds that are kept, one sample each, of every chain.
      thinning: steps of a round, for each slot of a window.
      psf_slope: compute `Posterior.psf_slope`.
      keep_samples: answer with `Posterior.samples`.

    Returns:
      A `Posterior`.

    Raises:
      ValueError: if a number of chains, rounds or steps is too small.

    Example:
      >>> from dscsnet_jax.inference.observation import observe
      >>> from dscsnet_jax.physics.optics import render
      >>> from dscsnet_jax.physics.preset import Sensor
      >>> from dscsnet_jax.physics.psf import Gaussian
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> truth = from_lists([[(5.0, 5.0, 200.0)]])
      >>> y = render(truth, frame_size=11, psf=0.5)
      >>> seen = observe(y, Sensor(read_noise=2.0, background=0.0))
      >>> answer = jax.jit(sample)(seen, truth, Known(psf=Gaussian(0.5)), jax.random.key(0))
      >>> answer.targets.position[0, 0].round(1).tolist(), round(float(answer.std[0, 0, 0]), 2)
      ([5.0, 5.0], 0.02)

    References:
      G. O. Roberts, A. Gelman, W. R. Gilks, Ann. Appl. Probab. 7 (1997) 110 (scaling);
      H. Haario, E. Saksman, J. Tamminen, Bernoulli 7 (2001) 223 (adaptation);
      J. S. Liu, Monte Carlo Strategies in Scientific Computing, 2001 (surrogate transitions);
      R. Cranley, T. N. L. Patterson, SIAM J. Numer. Anal. 13 (1976) 904.
    """
    if num_chains < 2 or num_samples < 4 or num_burn_in < 1 or thinning < 1:
        raise ValueError(
            "expected at least 2 chains, 4 samples, 1 burn-in round and step, got "
            f"{num_chains}, {num_samples}, {num_burn_in}, {thinning}"
        )
    start = jax.tree.map(jnp.asarray, start)
    length, size = start.mask.shape[0], min(_PIECE, start.mask.shape[0])
    numbers = {"num_chains": num_chains, "num_samples": num_samples}
    given = windows, start, begin(windows, start, known, key, **numbers)
    run = partial(
        turn,
        known=known,
        key=key,
        num_burn_in=num_burn_in,
        num_samples=num_samples,
        thinning=thinning,
        psf_slope=psf_slope,
        keep_samples=keep_samples,
    )

    def piece(loop: _Loop) -> _Loop:
        """Windows that stand at the same turn go on together."""
        number = loop.turn.min()
        index = jnp.nonzero(loop.turn == number, size=size, fill_value=length)[0]
        some = jax.tree.map(lambda a: a.at[index].get(mode="clip"), (windows, start, loop.chains))
        new = run(*some, number=number)
        answer, chains = jax.tree.map(
            lambda a, b: a.at[index].set(b, mode="drop"), (loop.answer, loop.chains), new
        )
        after = jnp.where(new[0].settled, NUM_TURNS, number + 1)
        return _Loop(loop.turn.at[index].set(after, mode="drop"), answer, chains)

    shapes = jax.eval_shape(lambda: run(*given, number=0))[0]
    first = jnp.where(start.mask.any(1), 0, NUM_TURNS).astype(jnp.int32)
    loop = _Loop(first, nothing(shapes), given[2])
    return jax.lax.while_loop(lambda loop: loop.turn.min() < NUM_TURNS, piece, loop).answer


class Chains(NamedTuple):
    """Chains of windows (B, ...): where they are, and how their steps are shaped.

    Attributes:
      theta: (B, chains, 3K+1) places.
      fitted: (B, 3K+1) the fit, by which targets are numbered.
      mean: (B, 3K+1) of the distribution that shapes a step of all parameters.
      root: (B, 3K+1, 3K+1) root of its covariance.
      log_length: (B,) of the steps.
      samples: (B, S, 3K+1, chains) of all turns so far, evenly thinned.
    """

    theta: jax.Array
    fitted: jax.Array
    mean: jax.Array
    root: jax.Array
    log_length: jax.Array
    samples: jax.Array


class _Loop(NamedTuple):
    """How often the chains of each window (B,) have run, what they tell, where they are."""

    turn: jax.Array
    answer: Posterior
    chains: Chains


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


def streams(key: jax.Array, windows: Observation) -> jax.Array:
    """The key of each window (B,): folded with a hash of its recorded pixels."""
    return jax.vmap(partial(_stream, key))(windows)


def _stream(key: jax.Array, window: Observation) -> jax.Array:
    recorded = jnp.where(window.valid, window.counts, 0).astype(jnp.float32).reshape(-1)
    bits = jax.lax.bitcast_convert_type(recorded, jnp.uint32)
    odd = jnp.arange(bits.shape[0], dtype=jnp.uint32) * jnp.uint32(2654435762) + jnp.uint32(1)
    mixed = (bits ^ (bits >> 15)) * odd
    return jax.random.fold_in(key, (mixed ^ (mixed >> 13)).sum(dtype=jnp.uint32))


@lanes_last
def begin(
    windows: Observation,
    start: Targets,
    known: Known,
    key: jax.Array,
    *,
    num_chains: int = NUM_CHAINS,
    num_samples: int = NUM_SAMPLES,
) -> Chains:
    """Chains spread around the start as far as the fit is uncertain. Arguments as of `sample`."""
    keys = streams(key, windows)
    seen, targets = to_lanes((windows, start))
    model = scene_model(seen, targets.mask, known, softness=HARD, uniform=True)
    fitted = model.pack(targets)
    root = _root_of_inverse(_information(fitted, model), present_of(targets.mask))
    draw = partial(jax.random.normal, shape=(num_chains, fitted.shape[0]), dtype=fitted.dtype)
    dimension = 3 * targets.mask.sum(0) + 1
    length = 2.38 / jnp.sqrt(dimension.astype(fitted.dtype))
    fitted, root, length = from_lanes((fitted, root, length))
    off = jnp.einsum("bpq,bcq->bcp", root, jax.vmap(draw)(keys), precision="highest")
    theta = fitted[:, None] + length[:, None, None] * off
    none = jnp.zeros((len(theta), num_samples, theta.shape[2], num_chains), theta.dtype)
    return Chains(theta, fitted, fitted, root, jnp.log(length), none)


def _information(theta: jax.Array, model: SceneModel) -> jax.Array:
    """Information (3K+1, 3K+1, B), in which nothing is wider than its prior."""
    size = model.known.prior.cluster_size
    size = max(model.seen.counts.shape[:2]) if size is None else size
    widest = jnp.zeros_like(theta).at[:-1].set(12 / size**2).at[2:-1:3].set(12)
    return model.quadratic(theta).information + spd.diagonal_matrix(widest)


def _root_of_inverse(matrix: jax.Array, present: jax.Array) -> jax.Array:
    """Lower triangular root of the inverse; zero for what is not there."""
    unit, scale = scaled(matrix, present)
    inverse, _ = spd.inverse(unit)
    width = jnp.sqrt(spd.diagonal(inverse))
    return spd.cholesky(inverse / (width[:, None] * width[None])) * (width * scale)[:, None]


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
    times = jnp.asarray(_TIMES, jnp.int32)[number]
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
    fitted = lanes(chains.fitted)
    theta = jnp.moveaxis(chains.theta, -1, 0).swapaxes(1, 2).reshape(size, 1, -1)
    sequential = known.prior.places == "sequential" and known.prior.cluster_size is not None

    def density(theta: jax.Array) -> jax.Array:
        """Log posterior of targets numbered as they are fitted: the steps' shape is theirs."""
        total = model.log_likelihood(theta) + model.log_prior(theta) + model.log_squares(theta)
        return jnp.where(is_numbered(theta, fitted, mask), total, -jnp.inf)

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
            kind = kind_of(drawn[0, 0, 0])
            u = drawn[1:] + shift
            u = u - (u >= 1)
            length = jnp.exp(state.log_length)
            proposed, gain = propose(state.theta, state.shape, length, model, fitted, kind, u)
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
            again, lambda: shaped(mean, _roots(covariance, own_mask)), lambda: state.shape
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
    root = _roots(covariance, mask.T)
    theta, mean, root = from_lanes((samples[-chains.theta.shape[1] :], mean, root))
    return chains._replace(theta=theta, mean=mean, root=root, log_length=log_length)


def _roots(covariance: jax.Array, mask: jax.Array) -> jax.Array:
    """(3K+1, 3K+1, L) roots of covariances, slightly drawn to their diagonals."""
    unit, scale = scaled(covariance, present_of(mask))
    wide = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    ridge = spd.diagonal_matrix(jnp.full_like(scale, _RIDGE))
    return spd.cholesky((unit + ridge) / (1 + _RIDGE)) * wide[:, None]
