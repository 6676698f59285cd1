"""Rivals: other numbers of targets that explain a window too, and what they mean for each target.

A target's errors are those of its window's best count. Where another count remains plausible, the
nearest target of that explanation is where the target may be instead: errors and confidence are
averaged over both.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import ncx2

from dscsnet_jax.estimation.windows import Windows
from dscsnet_jax.inference.search import Selected
from dscsnet_jax.inference.summary import RADII

NUM_RIVALS = 2
"""Other counts that are looked at: the most probable."""
_PLAUSIBLE = 0.05  # probability from which on a rival is felt in an interval of two sigmas
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
    mask = np.asarray(best.mask)
    count = mask.sum(1)
    share = shares(np.asarray(found.log_evidence), count)
    rows = np.arange(len(mask))[:, None]
    share[rows[:, 0], count] = 0
    order = np.argsort(-share, axis=1, kind="stable")[:, :NUM_RIVALS]
    there = np.asarray(found.of_counts.mask)[rows, order]  # (W, R, K)
    place = np.asarray(found.of_counts.position)[rows, order]
    light = np.asarray(found.of_counts.intensity)[rows, order]
    apart = place[:, None] - np.asarray(best.position)[:, :, None, None]
    distance = np.where(there[:, None], (apart**2).sum(-1), np.inf)
    nearest = distance.argmin(-1)[..., None]
    off = np.take_along_axis(apart, nearest[..., None], 3)[..., 0, :]
    brighter = light[:, None] - np.asarray(best.intensity)[:, :, None, None]
    off = np.concatenate([off, np.take_along_axis(brighter, nearest, 3)], -1)
    some = np.take_along_axis(distance, nearest, 3) < np.inf
    chance = np.broadcast_to(share[rows, order][:, None], off.shape[:3])
    return Rivals(chance, np.where(some, off, np.inf))


def averaged(
    std: np.ndarray, interval: np.ndarray, rivals: Rivals, width: float
) -> tuple[np.ndarray, np.ndarray]:
    """Errors and intervals of T targets, averaged over the counts that remain plausible.

    The mean squared distance of what may be true from what is answered,

        var + sum_r p_r offset_r^2,

    over plausible rivals whose nearest target is the same light; intervals are stretched alike.

    Args:
      std: (T, 3) standard deviations at the best count.
      interval: (T, 3, 4) quantiles, about their median.
      rivals: of the targets.
      width: of the PSF, pixels.

    Returns:
      `std` and `interval`.
    """
    same = (rivals.offset[..., :2] ** 2).sum(-1) <= (_SAME * width) ** 2
    counted = (same & (rivals.probability >= _PLAUSIBLE))[..., None]
    more = rivals.probability[..., None] * np.where(counted, rivals.offset, 0) ** 2
    wider = np.sqrt(std**2 + more.sum(1)).astype(std.dtype)
    known = (std > 0) & np.isfinite(std)
    finite = np.where(known[..., None], interval, 0)
    middle = finite[..., 1:3].mean(-1, keepdims=True)
    stretched = (np.where(known, wider, 1) / np.where(known, std, 1))[..., None]
    apart = np.where(known[..., None], middle + stretched * (finite - middle), interval)
    return wider, apart.astype(interval.dtype)


def confidence(given: np.ndarray, std: np.ndarray, rivals: Rivals) -> np.ndarray:
    """(T,) expected share of `summary.RADII` within which a target lies, over all counts.

    Args:
      given: (T,) at the best count.
      std: (T, 3) standard deviations at the best count, those of the rivals as well.
      rivals: of the targets.
    """
    share = within(std[:, None], rivals.offset)
    best = 1 - rivals.probability.sum(1)
    return best * given + (rivals.probability * share).sum(1)


def within(std: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Expected share of `summary.RADII` within which a target lies, of Gaussian errors.

    Args:
      std: (..., 3) standard deviations of row, col and intensity.
      offset: (..., 3) of the expected place.

    Example:
      >>> off = np.array([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0], [np.inf, np.inf, np.inf]])
      >>> within(np.array([[0.01, 0.01, 5.0]] * 3), off).round(2).tolist()
      [1.0, 0.7, 0.0]
    """
    variance = np.maximum((std[..., :2] ** 2).mean(-1), 1e-12)
    off = (offset[..., :2] ** 2).sum(-1)
    there = np.isfinite(off)
    scaled = np.where(there, off, 0) / variance
    held = [ncx2.cdf(r**2 / variance, 2, scaled) for r in RADII]
    return np.where(there, np.mean(held, 0), 0)
