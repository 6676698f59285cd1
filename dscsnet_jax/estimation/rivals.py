"""Rivals: other numbers of targets that explain a window too, and what they mean for each target.

A target's errors are those of its window's best count. Where another count remains plausible, the
nearest target of that explanation is where the target may be instead: errors and confidence are
averaged over both.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from dscsnet_jax.estimation.windows import Windows
from dscsnet_jax.inference.search import Selected
from dscsnet_jax.inference.summary import RADII
from dscsnet_jax.physics.targets import Targets

NUM_RIVALS = 2
"""Other counts that are looked at: the most probable."""
_PLAUSIBLE = 0.05  # probability of a rival that two sigmas should hold; fewer would only make tails
_NODES = 48
_SAME = 1.0  # widths of the PSF, within which the rival's target is the same light


class Rivals(NamedTuple):
    """Other explanations of T targets, (T, NUM_RIVALS, ...).

    Attributes:
      probability: of each, 0 of none.
      offset: (..., 3) row, col (pixels) and intensity (counts) of its nearest target, from that
        of the best explanation; inf where it has none.
    """

    probability: np.ndarray
    offset: np.ndarray


def shares(log_evidence: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Probabilities (W, K+1) of each count.

    Args:
      log_evidence: (W, K+1) of each.
      kept: (W,) the count that was kept: certain where each was impossible.

    Example:
      >>> shares(np.array([[-np.inf, 0.0, 0.0], [-np.inf] * 3]), np.array([1, 2])).tolist()
      [[0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]
    """
    table = np.array(log_evidence, float)
    never = np.flatnonzero(~np.isfinite(table.max(1)))
    table[never, kept[never]] = 0
    share = np.exp(table - table.max(1, keepdims=True))
    return share / share.sum(1, keepdims=True)


def rivals_of(w: Windows, found: Selected) -> Rivals:
    """The rivals of each slot of windows, (W, K, ...)."""
    best = found.fit.targets
    count = np.asarray(best.mask).sum(1)
    return between(best, shares(np.asarray(found.log_evidence), count), found.of_counts)


def between(best: Targets, share: np.ndarray, others: Targets) -> Rivals:
    """The rivals of targets of B windows, (B, K, ...).

    Args:
      best: `Targets` (B, K, ...), one of the explanations.
      share: (B, n) probabilities of explanations, each of another number of targets.
      others: `Targets` (B, n, K, ...) of each.
    """
    rows = np.arange(len(share))[:, None]
    count, counts = (np.asarray(t.mask).sum(-1) for t in (best, others))
    own = np.where(share > 0, counts, -1) == count[:, None]
    rest = np.where(own, 0, share)
    order = np.argsort(-rest, axis=1, kind="stable")[:, :NUM_RIVALS]
    chance = rest[rows, order]
    looked_at = chance.sum(1) + np.where(own, share, 0).sum(1)
    chance = chance / np.where(looked_at > 0, looked_at, 1)[:, None]
    there, place, light = (
        np.asarray(a)[rows, order] for a in (others.mask, others.position, others.intensity)
    )  # (B, R, K)
    apart = place[:, None] - np.asarray(best.position)[:, :, None, None]
    distance = np.where(there[:, None], (apart**2).sum(-1), np.inf)
    nearest = distance.argmin(-1)[..., None]
    off = np.take_along_axis(apart, nearest[..., None], 3)[..., 0, :]
    brighter = light[:, None] - np.asarray(best.intensity)[:, :, None, None]
    off = np.concatenate([off, np.take_along_axis(brighter, nearest, 3)], -1)
    some = np.take_along_axis(distance, nearest, 3) < np.inf
    chance = np.broadcast_to(chance[:, None], off.shape[:3])
    return Rivals(chance, np.where(some, off, np.inf))


def averaged(
    std: np.ndarray, interval: np.ndarray, rivals: Rivals, width: float
) -> tuple[np.ndarray, np.ndarray]:
    """Errors and intervals of T targets, averaged over the counts that remain plausible.

    The mean squared distance of what may be true from what is answered,

        var + sum_r p_r offset_r^2,

    over plausible rivals whose nearest target is the same light. Intervals are stretched as much,
    on the sides where rivals are, and of no light below none.

    Args:
      std: (..., 3) standard deviations at the best count.
      interval: (..., 3, 4) quantiles, about their median.
      rivals: of the targets.
      width: of the PSF, pixels.

    Returns:
      `std` and `interval`.
    """
    same = (rivals.offset[..., :2] ** 2).sum(-1) <= (_SAME * width) ** 2
    counted = (same & (rivals.probability >= _PLAUSIBLE))[..., None]
    off = np.where(counted, rivals.offset, 0)
    known = (std > 0) & np.isfinite(std)

    def wider(off: np.ndarray) -> np.ndarray:
        return np.sqrt(std**2 + (rivals.probability[..., None] * off**2).sum(-2))

    sides = wider(np.minimum(off, 0)), wider(np.maximum(off, 0))
    below, above = (np.where(known, w, 1) / np.where(known, std, 1) for w in sides)
    stretched = np.stack([below, below, above, above], -1)
    finite = np.where(known[..., None], interval, 0)
    middle = finite[..., 1:3].mean(-1, keepdims=True)
    apart = np.where(known[..., None], middle + stretched * (finite - middle), interval)
    light = apart[..., 2, :]  # a view
    np.maximum(light, np.minimum(interval[..., 2, :], 0), out=light)
    return wider(off).astype(std.dtype), apart.astype(interval.dtype)


def confidence(given: np.ndarray, std: np.ndarray, rivals: Rivals) -> np.ndarray:
    """(...,) expected share of `summary.RADII` within which a target lies, over all counts.

    Args:
      given: (...,) at the best count.
      std: (..., 3) standard deviations at the best count, those of the rivals as well.
      rivals: of the targets.
    """
    some = rivals.probability > 0  # of few targets
    share = np.zeros(some.shape)
    each = np.broadcast_to(std[..., None, :], rivals.offset.shape)
    share[some] = within(each[some], rivals.offset[some])
    best = 1 - rivals.probability.sum(-1)
    return best * given + (rivals.probability * share).sum(-1)


def within(std: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Expected share of `summary.RADII` within which a target lies, of Gaussian errors.

    A sum over the axis of the smaller error, by Gauss-Hermite quadrature, of what lies within the
    circle along the other.

    Args:
      std: (..., 3) standard deviations of row, col and intensity.
      offset: (..., 3) of the expected place.

    Example:
      >>> off = np.array([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0], [np.inf, np.inf, np.inf]])
      >>> within(np.array([[0.01, 0.01, 5.0]] * 3), off).round(2).tolist()
      [1.0, 0.7, 0.0]
    """
    std, offset = np.broadcast_arrays(std[..., :2], offset[..., :2])
    there = np.isfinite(offset).all(-1) & np.isfinite(std).all(-1)
    std = np.where(there[..., None], np.maximum(std, 1e-6), 1)
    offset = np.where(there[..., None], offset, 0)
    order = np.argsort(std, axis=-1)
    small, large = np.moveaxis(np.take_along_axis(std, order, -1), -1, 0)[..., None]
    near, far = np.moveaxis(np.take_along_axis(offset, order, -1), -1, 0)[..., None]
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    across = near + small * nodes
    held = np.zeros(there.shape)
    for radius in RADII:
        half = np.sqrt(np.maximum(radius**2 - across**2, 0))
        share = ndtr((half - far) / large) - ndtr((-half - far) / large)
        held += share @ weights / weights.sum() / len(RADII)
    return np.where(there, held, 0)
