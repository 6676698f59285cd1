"""Convergence: do the chains of a posterior agree, and how many samples are they worth.

Rank-normalised split R-hat, bulk and tail effective sample size of A. Vehtari, A. Gelman,
D. Simpson, B. Carpenter, P.-C. Buerkner, Bayesian Analysis 16 (2021) 667.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

_TAILS = (0.05, 0.95)
_ROWS = 16  # compared at a time, while they are at hand


class Convergence(NamedTuple):
    """Of each parameter: R-hat, bulk and tail effective sample size.

    A parameter that is the same in all samples has R-hat 1 and as many effective samples
    as there are; chains that are stuck at different values have R-hat inf.
    """

    rhat: jax.Array
    bulk: jax.Array
    tail: jax.Array


def convergence(samples: jax.Array) -> Convergence:
    """R-hat and effective sample sizes of chains.

    Args:
      samples: (S, P, ...) of S >= 4 draws and P >= 1 chains; of an odd number of draws the
        middle one is left out.

    Returns:
      `Convergence` of (...).

    Example:
      >>> import jax
      >>> x = jax.random.normal(jax.random.key(0), (100, 4))
      >>> stuck = 0.001 * x + jnp.arange(4.0)
      >>> [bool(c.rhat < 1.1) for c in map(convergence, (x, stuck))]
      [True, False]
    """
    half = samples.shape[0] // 2
    parts = [samples[:half], samples[-half:]]
    split = jnp.concatenate(parts, 1)  # (S/2, 2P, ...)
    flat = split.reshape(-1, *split.shape[2:])
    normal = _normal_scores(split)
    ordered = sort_leading(flat)
    number = flat.shape[0]
    median = (ordered[(number - 1) // 2] + ordered[number // 2]) / 2
    if samples.shape[0] % 2:
        ordered = sort_leading(samples.reshape(-1, *samples.shape[2:]))
    folded = _normal_scores(jnp.abs(split - median[None, None]))
    rhat = jnp.maximum(_rhat(normal), _rhat(folded))
    tails = [
        _effective((split <= _quantile(ordered, p)[None, None]).astype(flat.dtype)) for p in _TAILS
    ]
    return Convergence(rhat, _effective(normal), jnp.minimum(*tails))


def sort_leading(values: jax.Array) -> jax.Array:
    """Values (S, ...) sorted along the leading axis.

    By a bitonic network, whose exchanges run along the vector lanes of the last axes: on
    CPU twenty times as fast as the compiler's sort, which takes one column at a time.

    Example:
      >>> sort_leading(jnp.array([3.0, 1.0, 2.0, 0.0])).tolist()
      [0.0, 1.0, 2.0, 3.0]

    References:
      K. E. Batcher, AFIPS Spring Joint Computer Conference (1968) 307.
    """
    number = values.shape[0]
    if number & (number - 1):
        return jnp.sort(values, 0)
    for log_run in range(1, number.bit_length()):
        for log_gap in reversed(range(log_run)):
            pairs = values.reshape(-1, 2, 1 << log_gap, *values.shape[1:])
            low, high = jnp.minimum(pairs[:, 0], pairs[:, 1]), jnp.maximum(pairs[:, 0], pairs[:, 1])
            first = np.arange(len(pairs)) << (log_gap + 1)
            rising = ((first >> log_run) & 1 == 0).reshape(-1, *(1,) * values.ndim)
            sides = [jnp.where(rising, low, high), jnp.where(rising, high, low)]
            values = jnp.stack(sides, 1).reshape(values.shape)
    return values


def _normal_scores(split: jax.Array) -> jax.Array:
    """Normal quantiles of the average ranks (Blom) among all draws of all chains.

    Ranks by counting: ties, which rejected steps make, get their mean rank, and it is
    faster than two sorts where windows are the last axis.
    """
    flat = split.reshape(-1, *split.shape[2:])
    number = flat.shape[0]

    step = _ROWS if number % _ROWS == 0 else 1

    def count(i: jax.Array, twice: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(flat, i * step, step)
        for row in range(step):
            value = rows[row][None]
            above = (flat > value).astype(flat.dtype) + (flat >= value).astype(flat.dtype)
            twice = twice + above
        return twice

    twice = jax.lax.fori_loop(0, number // step, count, jnp.ones_like(flat))
    rank = twice / 2
    return ndtri((rank - 3 / 8) / (number + 1 / 4)).reshape(split.shape)


def _quantile(ordered: jax.Array, share: float) -> jax.Array:
    """The quantile by linear interpolation."""
    at = share * (ordered.shape[0] - 1)
    low = int(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, ordered.shape[0] - 1)] - ordered[low])


def _rhat(split: jax.Array) -> jax.Array:
    """Root of the pooled over the within-chain variance."""
    draws = split.shape[0]
    within = split.var(0, ddof=1).mean(0)
    between = split.mean(0).var(0, ddof=1)
    moves = within > 0
    ratio = between / jnp.where(moves, within, 1) + (draws - 1) / draws
    stuck = jnp.where(between > 0, jnp.inf, 1.0).astype(split.dtype)
    return jnp.where(moves, jnp.sqrt(ratio), stuck)


def _effective(split: jax.Array) -> jax.Array:
    """Effective sample size by Geyer's initial monotone sequence."""
    draws, chains = split.shape[:2]
    off = split - split.mean(0, keepdims=True)
    # Autocovariance of lag t, averaged over chains, and the pooled variance.
    lags = [(off[: draws - t] * off[t:]).sum(0).mean(0) / draws for t in range(draws)]
    within = lags[0] * draws / (draws - 1)
    pooled = lags[0] + (split.mean(0).var(0, ddof=1) if chains > 1 else 0)
    moves = pooled > 0
    pooled = jnp.where(moves, pooled, 1)
    rho = [jnp.ones_like(pooled)] + [1 - (within - lag) / pooled for lag in lags[1:]]
    positive = jnp.ones(pooled.shape, bool)
    least = jnp.full_like(pooled, jnp.inf)
    total = -jnp.ones_like(pooled)
    last = jnp.zeros_like(pooled)
    for t in range(0, draws - 4, 2):
        pair = rho[t] + rho[t + 1]
        positive = positive & (pair > 0)
        least = jnp.minimum(least, pair)
        # The even lag after the last pair is kept where it is positive.
        last = jnp.where(positive, jnp.maximum(rho[t + 2], 0), last)
        total = total + jnp.where(positive, 2 * least, 0)
    number = draws * chains
    time = jnp.maximum(total + last, 1 / jnp.log10(jnp.asarray(float(number), split.dtype)))
    return jnp.where(moves, number / time, number)
