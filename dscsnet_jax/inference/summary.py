"""Summary: means, errors, intervals and convergence of a posterior's samples."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.inference.convergence import convergence, sort_leading
from dscsnet_jax.inference.scene_model import SceneModel
from dscsnet_jax.physics.targets import Targets

LEVELS = (0.0228, 0.1587, 0.8413, 0.9772)
"""Quantiles of `Posterior.interval`: one and two standard deviations of a Gaussian."""
LARGEST_RHAT = 1.1
"""R-hat below which chains agree."""
ENOUGH_SAMPLES = 50
"""Effective samples that know the spread to 10 %; with fewer, chains agree by chance."""
RADII = (0.05, 0.10, 0.15, 0.20, 0.25)
"""Pixels, within which a target counts as found: those of CSO-mAP."""
_LARGEST_SHARE = 1 / 3  # one over the least effective number of samples


@flax.struct.dataclass
class Posterior:
    """Samples of B windows, summed up.

    Attributes:
      targets: posterior mean, `Targets` (B, K, ...), in the slots of the start.
      covariance: (B, 3K, 3K) as `Fit.covariance`, with the error of the mean of so few
        samples.
      interval: (B, K, 3, 4) quantiles `LEVELS` of row, col and intensity.
      effective_sample_size: (B,) of the worst parameter, bulk.
      rhat: (B,) rank-normalised split R-hat of the worst parameter.
      acceptance: (B,) share of accepted steps.
      converged: (B,) bool: R-hat is below 1.1.
      confidence: (B, K) expected share of the `RADII` within which a target lies, given that
        there are so many.
      psf_slope: (B, P) derivatives of the log evidence by the coordinates of the PSF
        (`psf_coordinates`), which are the posterior means of those of the log likelihood
        (Fisher's identity); P = 0 unless asked for.
      samples: (B, S, K, 3) row, col and intensity of the targets, in the slots of the mean;
        None unless asked for.
    """

    targets: Targets
    covariance: jax.Array
    interval: jax.Array
    effective_sample_size: jax.Array
    rhat: jax.Array
    acceptance: jax.Array
    converged: jax.Array
    confidence: jax.Array
    psf_slope: jax.Array
    samples: jax.Array | None = None

    @property
    def settled(self) -> jax.Array:
        """(B,) bool: the chains agree and tell enough; else they should go on."""
        return self.converged & (self.effective_sample_size >= ENOUGH_SAMPLES)

    @property
    def std(self) -> jax.Array:
        """(B, K, 3) standard deviations of row, col (pixels) and intensity (counts)."""
        variance = jnp.diagonal(self.covariance, axis1=-2, axis2=-1)
        return jnp.sqrt(variance).reshape(*self.targets.mask.shape, 3)


def numbered(theta: jax.Array, fitted: jax.Array, mask: jax.Array) -> jax.Array:
    """`theta` (3K+1, ...) with its targets exchanged, pair by pair, to be near to the fitted."""
    table = _exchanged(_table(theta), _table(fitted), mask)
    return jnp.concatenate([table.reshape(-1, *theta.shape[1:]), theta[-1:]])


def is_numbered(theta: jax.Array, fitted: jax.Array, mask: jax.Array) -> jax.Array:
    """(...,) bool: no exchange of two targets of `theta` brings them nearer to the fitted."""
    table, reference = _table(theta), _table(fitted)
    fine = jnp.ones(theta.shape[1:], bool)
    for a, b in _pairs(len(table)):
        fine &= ~_nearer(table[a], table[b], reference[a], reference[b], mask[a] & mask[b])
    return fine


def sorted_out(samples: jax.Array, reference: jax.Array, mask: jax.Array) -> jax.Array:
    """Undo label switching: targets (S, K, 3, L) in the order of a reference (K, 3, L).

    Pairs are exchanged as long as that brings them nearer to their places, first those
    of the reference, then those of the mean.
    """
    mask = mask[:, None]
    once = _exchanged(jnp.moveaxis(samples, 0, 2), reference[:, :, None], mask)
    return jnp.moveaxis(_exchanged(once, once.mean(2, keepdims=True), mask), 2, 0)


def _table(theta: jax.Array) -> jax.Array:
    """(K, 3, ...) rows, cols and `v`."""
    return theta[:-1].reshape(-1, 3, *theta.shape[1:])


def _pairs(slots: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(slots) for b in range(a + 1, slots)]


def _exchanged(table: jax.Array, reference: jax.Array, mask: jax.Array) -> jax.Array:
    """Targets (K, 3, ...) exchanged, in two passes over all pairs, to be near to a reference."""
    pairs = _pairs(len(table))
    if not pairs:
        return table
    first, second = jnp.asarray(np.array(pairs, np.int32).T)

    def exchange(i: jax.Array, table: jax.Array) -> jax.Array:
        a, b = first[i % len(pairs)], second[i % len(pairs)]
        swap = _nearer(table[a], table[b], reference[a], reference[b], mask[a] & mask[b])
        one, other = jnp.where(swap, table[b], table[a]), jnp.where(swap, table[a], table[b])
        return table.at[a].set(one).at[b].set(other)

    # A loop: written out, the compiler works out each exchange anew for all that follow.
    return jax.lax.fori_loop(0, 2 * len(pairs), exchange, table)


def _nearer(
    one: jax.Array, other: jax.Array, to: jax.Array, to_other: jax.Array, both: jax.Array
) -> jax.Array:
    """Whether two targets (3, ...) are nearer to their places exchanged, if both are there.

    `|a - ra|^2 + |b - rb|^2 > |a - rb|^2 + |b - ra|^2`, multiplied out.
    """
    return (((one - other) * (to_other - to))[:2].sum(0) > 0) & both


def nothing(like: Posterior) -> Posterior:
    """What windows without targets tell, in the shapes of `like`."""
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    return zero.replace(rhat=zero.rhat + 1, converged=~zero.converged)


def summarise(
    samples: jax.Array,
    model: SceneModel,
    acceptance: jax.Array,
    psf_slope: jax.Array,
    *,
    keep_samples: bool = False,
) -> Posterior:
    """Moments, quantiles and convergence of samples.

    Args:
      samples: (S, chains, K, 3, L) rows, cols and `v` of L windows.
      model: of the windows, (..., 1, L).
      acceptance: (L,) share of accepted steps.
      psf_slope: (P, L) see `Posterior`.
      keep_samples: answer with them.

    Returns:
      A `Posterior`; windows come first.
    """
    mask = model.mask[:, 0].T
    intensity = model.intensity(jnp.moveaxis(samples[:, :, :, 2], 2, 0))
    used = mask.T[:, None]
    checked = convergence(samples)
    intensity = jnp.moveaxis(intensity, 0, 2)[:, :, :, None]
    samples = jnp.concatenate([samples[:, :, :, :2], intensity], 3)
    samples = samples.reshape(-1, *samples.shape[2:])
    number, slots = samples.shape[:2]
    mean = samples.mean(0)
    off = samples - mean
    flat = off.reshape(number, 3 * slots, -1)
    covariance = jnp.einsum("spl,sql->lpq", flat, flat, precision="highest") / number
    # The mean and the spread of few samples are uncertain themselves.
    share = jnp.where(used, 1 / jnp.maximum(checked.bulk, 1), 0).sum((0, 1))
    share = jnp.minimum(share / jnp.maximum(3 * mask.sum(-1), 1), _LARGEST_SHARE)
    covariance = covariance * ((1 + share) / (1 - share))[:, None, None]
    ordered = sort_leading(samples)
    # The truth is below the i-th of n samples with probability i / (n + 1).
    at = np.clip(np.round(np.array(LEVELS) * (number + 1)).astype(int) - 1, 0, number - 1)
    interval = jnp.moveaxis(ordered[at], (0, -1), (-1, 0))
    mean = jnp.moveaxis(mean, -1, 0)
    present, both = mask[..., None], jnp.repeat(mask, 3, -1)
    rhat = jnp.where(used, checked.rhat, 1).max((0, 1), initial=1)
    effective = jnp.where(used, checked.bulk, number).min((0, 1), initial=number)
    return Posterior(
        targets=Targets(
            jnp.where(present, mean[..., :2], 0), jnp.where(mask, mean[..., 2], 0), mask
        ),
        covariance=jnp.where(both[:, :, None] & both[:, None, :], covariance, 0),
        interval=jnp.where(present[..., None], interval, 0),
        effective_sample_size=effective,
        rhat=rhat,
        acceptance=acceptance,
        converged=rhat < LARGEST_RHAT,
        confidence=_confidence(samples[:, :, :2], used[:, 0]).T,
        psf_slope=jnp.moveaxis(psf_slope, -1, 0),
        samples=jnp.moveaxis(samples, -1, 0) * present[:, None] if keep_samples else None,
    )


def _confidence(samples: jax.Array, mask: jax.Array) -> jax.Array:
    """(K, L) expected share of the radii around the mean place that hold a target.

    Args:
      samples: (S, K, 2, L) rows and cols.
      mask: (K, L) targets that are there.
    """

    def one(centre: jax.Array) -> jax.Array:
        distance = ((samples - centre[None, None]) ** 2).sum(2)
        nearest = jnp.where(mask[None], distance, jnp.inf).min(1)
        return jnp.stack([nearest <= r**2 for r in RADII]).mean((0, 1), dtype=samples.dtype)

    return jnp.where(mask, jax.lax.map(one, samples.mean(0)), 0)
