"""Convergence: have the chains of a sampler forgotten where they started?

Rank-normalised split R-hat and effective sample sizes, in plain array operations over lanes.
Ranks come from counting the samples below and above each one: at a few hundred samples this
beats both the processor's sort, which takes one lane at a time, and sorting networks, which
still owe the way back from places to samples.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

_LANES = 128  # counted at once: samples and counts stay in the cache of one core
_ROWS = 16  # compared in one go, which saves the trip of the counts through memory
_LEAST_DRAWS = 4
_TAILS = (5, 95)  # per cent

_Three = tuple[jax.Array, jax.Array, jax.Array]


class Convergence(NamedTuple):
    """What the samples say of each parameter.

    Attributes:
      rhat: (...) rank-normalised split R-hat: 1 if the chains agree, at most 1.01 is good; at
        least sqrt((N-1)/N), never NaN.
      bulk: (...) effective sample size: how many independent samples would know the centre
        of the distribution as well; of the normal scores of the ranks.
      tail: (...) how many would know the limits of a 90 % interval as well: of being at most
        the 5 % and at most the 95 % quantile, the smaller number of both.
    """

    rhat: jax.Array
    bulk: jax.Array
    tail: jax.Array


@jax.jit
def convergence(samples: jax.Array) -> Convergence:
    r"""Rank-normalised split R-hat, bulk and tail effective sample size.

    Chains are cut in half, samples x replaced by normal scores of their ranks r among all S,

        z = Phi^-1((r - 3/8) / (S + 1/4)),   R^2 = ((N-1)/N W + B/N) / W,

    where W is the mean variance within the C halves of N draws and B/N the variance of their
    means. The R-hat is the larger one of that of x (do places agree?) and of |x - median|
    (do spreads?). Ties share their mean rank.

    A parameter which never changes has R-hat 1, and all samples are effective. Chains that
    are stuck, each at its own value, have one far above 1 or infinite. Ranks bound it where
    chains still move, however little: four chains side by side reach 3. Where some samples
    are not finite it is infinite, and none is effective.

    Args:
      samples: (S, P, ...), S draws of P chains, at least 4; an odd S drops the middle one.

    Returns:
      A `Convergence` of arrays (...).

    Raises:
      ValueError: if there are fewer than 4 draws.

    Example:
      >>> mixed = jax.random.normal(jax.random.key(0), (200, 4))
      >>> apart, walk = mixed + jnp.arange(4.0)[None], jnp.cumsum(mixed, axis=0)
      >>> [round(float(convergence(chains).rhat), 1) for chains in (mixed, apart)]
      [1.0, 1.5]
      >>> [bool(convergence(chains).bulk > 400) for chains in (mixed, walk)]
      [True, False]

    References:
      A. Vehtari, A. Gelman, D. Simpson, B. Carpenter, P.-C. Buerkner, Bayesian Analysis 16
      (2021) 667; C. J. Geyer, Stat. Sci. 7 (1992) 473.
    """
    draws, chains, *rest = samples.shape
    if draws < _LEAST_DRAWS:
        raise ValueError(f"expected at least {_LEAST_DRAWS} draws, got {draws}")
    samples = samples.astype(jnp.promote_types(samples.dtype, jnp.float32))
    lanes = math.prod(rest)
    width = max(min(lanes, _LANES), 1)
    flat = jnp.pad(samples.reshape(draws, chains, lanes), ((0, 0), (0, 0), (0, -lanes % width)))
    blocks = jnp.moveaxis(flat.reshape(draws, chains, -1, width), 2, 0)
    answers = jax.lax.map(_of_block, blocks)
    return jax.tree.map(lambda answer: answer.reshape(-1)[:lanes].reshape(rest), answers)


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


class _Split(NamedTuple):
    """Chains cut in half and how their samples compare.

    Samples (N, C, L) of N draws, C halves, L lanes; `less` and `more` (NC, L), how many of
    them are less and more than each; `left_out` (M, L), the middle draws; `finite` (L,).
    """

    samples: jax.Array
    less: jax.Array
    more: jax.Array
    left_out: jax.Array
    finite: jax.Array


def _of_block(samples: jax.Array) -> Convergence:
    split = _split(samples)
    return Convergence(_rhat(split), _bulk(split), _tail(split))


def _split(samples: jax.Array) -> _Split:
    """Samples (S, P, L) cut in half; lanes with any that is not finite are set to zero."""
    draws, chains, lanes = samples.shape
    half = draws // 2
    finite = jnp.isfinite(samples).all((0, 1))
    samples = jnp.where(finite[None, None], samples, 0)
    both = jnp.stack([samples[:half], samples[draws - half :]], 1)
    rows = both.reshape(-1, lanes)
    less, more = _counts(rows, among=rows)
    left_out = samples[half : draws - half].reshape(-1, lanes)
    return _Split(both.reshape(half, 2 * chains, lanes), less, more, left_out, finite)


def _counts(rows: jax.Array, *, among: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many of (M, L) are less, how many more than each of (N, L)."""

    def compare(counts: tuple[jax.Array, jax.Array], others: jax.Array) -> Any:
        less, more = counts
        for other in others:
            less = less + (other[None] < rows)
            more = more + (other[None] > rows)
        return (less, more), None

    whole = len(among) // _ROWS * _ROWS
    none = jnp.zeros(rows.shape, jnp.int32)
    blocks = among[:whole].reshape(-1, _ROWS, among.shape[-1])
    counts, _ = jax.lax.scan(compare, (none, none), blocks)
    return compare(counts, among[whole:])[0]


def _normal_scores(less: jax.Array, more: jax.Array, like: jax.Array) -> jax.Array:
    """Quantiles of the normal distribution at the mean ranks, as `like` (N, C, L)."""
    number = len(less)
    ranks = 1 + np.arange(2 * number - 1) / 2  # all there are: the function is dear
    table = ndtri(jnp.asarray((ranks - 3 / 8) / (number + 1 / 4), like.dtype))
    return table[less - more + number - 1].reshape(like.shape)


def _rhat(split: _Split) -> jax.Array:
    rows = split.samples.reshape(split.less.shape)
    # The largest sample which has at most k below is the one in place k.
    places = len(rows) // 2 - 1, len(rows) // 2
    low, high = (jnp.where(split.less <= k, rows, -jnp.inf).max(0) for k in places)
    folded = jnp.abs(rows - (low / 2 + high / 2)[None])
    scores = (
        _normal_scores(less, more, split.samples)
        for less, more in ((split.less, split.more), _counts(folded, among=folded))
    )
    return jnp.where(split.finite, jnp.maximum(*map(_spread_ratio, scores)), jnp.inf)


def _bulk(split: _Split) -> jax.Array:
    scores = _normal_scores(split.less, split.more, split.samples)
    return jnp.where(split.finite, _effective(scores), 0)


def _tail(split: _Split) -> jax.Array:
    less, _ = _counts(split.samples.reshape(split.less.shape), among=split.left_out)
    less = (less + split.less).reshape(split.samples.shape)
    last = less.shape[0] * less.shape[1] + len(split.left_out) - 1
    # A sample is at most the quantile if no more than these are less: no rounding.
    sizes = [_effective((less <= last * p // 100).astype(split.samples.dtype)) for p in _TAILS]
    return jnp.where(split.finite, jnp.minimum(*sizes), 0)


def _spread_ratio(chains: jax.Array) -> jax.Array:
    """Root of the whole variance over that within chains (N, C, L)."""
    draws = len(chains)
    # From the first draw on: rounding of a mean must not make a stuck chain move.
    moved = chains - chains[:1]
    within = moved.var(0, ddof=1).mean(0)
    between = (chains[0] + moved.mean(0)).var(0, ddof=1)
    ratio = jnp.sqrt((draws - 1) / draws + between / jnp.where(within > 0, within, 1))
    return jnp.where(within > 0, ratio, jnp.where(between > 0, jnp.inf, 1))


def _effective(chains: jax.Array) -> jax.Array:
    r"""Effective number of samples (N, C, L) by Geyer's initial monotone sequence.

        rho_t = 1 - (W - mean_c acov_ct) / var+,   Gamma_k = rho_2k + rho_2k+1,
        ESS = N C / (-1 + 2 sum_k<m min_j<=k Gamma_j + rho_2m),

    where m is the first with Gamma_m <= 0 or the last that is known well.
    """
    draws, halves, _ = chains.shape
    chains = chains - chains[:1, :1]  # what is constant stays so, whatever a mean's rounding
    covariance = _autocovariance(chains)
    pooled = covariance[0] + chains.mean(0).var(0, ddof=1)
    varies = pooled > 0
    within = covariance[:1] * (draws / (draws - 1))
    rho = 1 - (within - covariance) / jnp.where(varies, pooled, 1)[None]
    rho = jnp.where(jnp.arange(draws)[:, None] > 0, rho, 1)
    last = max((draws - 3) // 2, 0)
    even, odd = rho[: 2 * last + 1 : 2], rho[1 : 2 * last + 2 : 2]

    def add(state: _Three, pair: _Three) -> tuple[_Three, None]:
        going, least, time = state
        even, odd, more = pair
        goes = going & (even + odd > 0) & more
        least = jnp.minimum(least, even + odd)
        end = jnp.where((even > 0) | (even + odd >= 0), even, 0)
        return (goes, least, time + jnp.where(goes, 2 * least, jnp.where(going, end, 0))), None

    start = jnp.ones(pooled.shape, bool), jnp.full_like(pooled, jnp.inf), jnp.full_like(pooled, -1)
    (_, _, time), _ = jax.lax.scan(add, start, (even, odd, jnp.arange(last + 1) < last))
    number = draws * halves
    return jnp.where(varies, number / jnp.maximum(time, 1 / math.log10(number)), number)


def _autocovariance(chains: jax.Array) -> jax.Array:
    """Of lags 0 to N-1 (N, L), mean of the chains (N, C, L).

    By a Fourier transform of chains padded to twice their length, as products of matrices:
    on CPU thirty times as fast as sums over draws, which take one lane at a time.
    """
    draws, halves, lanes = chains.shape
    off = chains - chains.mean(0)[None]
    waves = np.arange(draws + 1)
    angle = np.outer(waves, np.arange(draws)) * np.pi / draws
    there = np.concatenate([np.cos(angle), np.sin(angle)])
    weight = np.where(waves % draws == 0, 1, 2) / (2 * draws**2 * halves)
    back = np.tile(np.cos(angle.T) * weight, 2)
    wave = jnp.dot(there.astype(chains.dtype), off.reshape(draws, -1), precision="highest")
    power = (wave.reshape(-1, halves, lanes) ** 2).sum(1)
    return jnp.dot(back.astype(chains.dtype), power, precision="highest")
