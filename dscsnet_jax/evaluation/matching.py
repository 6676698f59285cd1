"""Matching: which detection answers which true target, within one frame.

Two rules. `nearest_hits` is the benchmark's: detections in order of falling score
each ask for their nearest true target. `matched` is the corrected one: an optimal
assignment, so that one badly ranked detection cannot take another's target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from dscsnet_jax.physics.targets import Targets


class Batch(NamedTuple):
    """`Targets` of B frames as float64 NumPy arrays, checked.

    Attributes:
      position: (B, K, 2) row, col in pixels.
      intensity: (B, K) counts.
      mask: (B, K) bool.
    """

    position: np.ndarray
    intensity: np.ndarray
    mask: np.ndarray


class Matching(NamedTuple):
    """Matched pairs of all frames, ordered by frame, then by detection slot.

    Attributes:
      frame: (M,) frame of each pair.
      detection: (M,) slot of the detection in its frame.
      truth: (M,) slot of the true target in its frame.
      distance: (M,) distance of the pair, pixels.
    """

    frame: np.ndarray
    detection: np.ndarray
    truth: np.ndarray
    distance: np.ndarray


class _Pairs(NamedTuple):
    """Every present detection against every truth slot of its frame.

    Attributes:
      frame, slot: (n,) of each detection, ordered by frame, then slot.
      score: (n,) its intensity.
      distance: (n, K) to the true targets, pixels; inf where there is none.
      num_frames: `B`.
    """

    frame: np.ndarray
    slot: np.ndarray
    score: np.ndarray
    distance: np.ndarray
    num_frames: int


def as_batch(targets: Targets, name: str) -> Batch:
    """`targets` on the host, with a frame axis.

    Args:
      targets: `Targets` of B frames, or of one frame without that axis.
      name: what to call them in an error.

    Raises:
      ValueError: if the shapes disagree, or if a present target is not finite.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> as_batch(from_lists([[(1.0, 2.0, 240.0)], []]), "truth").mask.shape
      (2, 1)
    """
    position = np.asarray(targets.position, float)
    intensity = np.asarray(targets.intensity, float)
    mask = np.asarray(targets.mask, bool)
    if mask.ndim == 1:
        position, intensity, mask = position[None], intensity[None], mask[None]
    if mask.ndim != 2 or intensity.shape != mask.shape or position.shape != (*mask.shape, 2):
        raise ValueError(
            f"{name}: expected position (B, K, 2), intensity (B, K), mask (B, K), "
            f"got {position.shape}, {intensity.shape}, {mask.shape}"
        )
    finite = np.isfinite(position).all(-1) & np.isfinite(intensity)
    bad = np.flatnonzero((mask & ~finite).any(-1))
    if bad.size:
        raise ValueError(f"{name}: frame {bad[0]} holds a target that is not finite")
    return Batch(position, intensity, mask)


def as_batches(detections: Targets, truth: Targets) -> tuple[Batch, Batch]:
    """Both sides on the host, of the same number of frames.

    Raises:
      ValueError: as `as_batch`, and if the numbers of frames differ.
    """
    found, real = as_batch(detections, "detections"), as_batch(truth, "truth")
    if len(found.mask) != len(real.mask):
        raise ValueError(
            f"detections hold {len(found.mask)} frames, truth holds {len(real.mask)}: "
            "they must describe the same frames"
        )
    return found, real


def nearest_hits(
    detections: Targets, truth: Targets, thresholds: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """True positives by the benchmark's rule, for every threshold.

    Within a frame, in order of falling intensity, a detection is a true positive if
    its *nearest* true target lies within the threshold (<=) and is not yet taken. A
    detection whose nearest target is taken is a false positive even where a second
    target is within reach. Two equally near targets: the one in the earlier slot.

    Args:
      detections: `Targets` of B frames; intensity is the score.
      truth: `Targets` of the same frames; the number of slots may differ.
      thresholds: T distances, pixels.

    Returns:
      The scores (n,) of all present detections, by frame and slot, and (T, n) bool.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> found = from_lists([[(1.0, 1.25, 90.0), (1.0, 1.125, 80.0)]])
      >>> nearest_hits(found, from_lists([[(1.0, 1.0, 100.0)]]), (0.125, 0.25))[1]
      array([[False,  True],
             [ True, False]])
    """
    pairs = _pairs(*as_batches(detections, truth))
    nearest = pairs.distance.argmin(-1)
    reach = pairs.distance.min(-1)
    asked = pairs.frame * pairs.distance.shape[1] + nearest
    queue = np.lexsort((-pairs.score, asked))  # stable: per true target, best score first
    hits = np.zeros((len(thresholds), len(queue)), bool)
    for row, threshold in zip(hits, thresholds, strict=True):
        within = queue[reach[queue] <= threshold]
        row[within[np.diff(asked[within], prepend=-1) > 0]] = True
    return pairs.score, hits


def matched(detections: Targets, truth: Targets, max_distance: float) -> Matching:
    """Optimal assignment of detections to true targets, frame by frame.

    Of all one-to-one matchings whose pairs lie within `max_distance` (<=), one with
    the most pairs and, among those, the smallest sum of distances. Scores play no
    part.

    Args:
      detections: `Targets` of B frames.
      truth: `Targets` of the same frames; the number of slots may differ.
      max_distance: largest distance of a pair, pixels; may be inf.

    Returns:
      The `Matching`.

    Raises:
      ValueError: if the frames differ in number or `max_distance` is not >= 0.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> found = from_lists([[(1.0, 1.4, 90.0), (1.0, 1.6, 80.0)]])
      >>> pairs = matched(found, from_lists([[(1.0, 1.5, 99.0), (1.0, 2.0, 99.0)]]), 0.5)
      >>> pairs.detection, pairs.truth
      (array([0, 1]), array([0, 1]))
    """
    pairs = _pairs(*as_batches(detections, truth))
    row, column = np.nonzero(_assign(pairs, max_distance))
    return Matching(pairs.frame[row], pairs.slot[row], column, pairs.distance[row, column])


def optimal_hits(
    detections: Targets, truth: Targets, thresholds: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """True positives by optimal assignment at every threshold; shapes as `nearest_hits`."""
    pairs = _pairs(*as_batches(detections, truth))
    hits = np.zeros((len(thresholds), len(pairs.frame)), bool)
    for row, threshold in zip(hits, thresholds, strict=True):
        row[:] = _assign(pairs, threshold).any(-1)
    return pairs.score, hits


def _pairs(found: Batch, real: Batch) -> _Pairs:
    """All distances; at least one (empty) truth slot, so that reductions are defined."""
    num_frames, slots = real.mask.shape
    place = np.full((num_frames, max(slots, 1), 2), np.inf)
    place[:, :slots][real.mask] = real.position[real.mask]
    frame, slot = np.nonzero(found.mask)
    offset = found.position[frame, slot][:, None, :] - place[frame]
    distance = np.hypot(offset[..., 0], offset[..., 1])
    return _Pairs(frame, slot, found.intensity[frame, slot], distance, num_frames)


def _assign(pairs: _Pairs, max_distance: float) -> np.ndarray:
    """(n, K) bool: the optimal assignment.

    A pair that is alone in its row and its column belongs to every largest matching,
    so only frames where pairs compete need the assignment solver.
    """
    if not max_distance >= 0:
        raise ValueError(f"max_distance must be >= 0 pixels, got {max_distance!r}")
    near = (pairs.distance <= max_distance) & np.isfinite(pairs.distance)
    row, column = np.nonzero(near)
    column_key = pairs.frame[row] * near.shape[1] + column
    alone = (np.bincount(row)[row] == 1) & (np.bincount(column_key)[column_key] == 1)
    contested = np.unique(pairs.frame[row[~alone]])
    # A missing pair costs more than any sum of distances: size first, then distance.
    penalty = 1.0 + near.shape[1] * pairs.distance[near].max(initial=0.0)
    cost = np.where(near, pairs.distance, penalty)
    starts = np.searchsorted(pairs.frame, np.arange(pairs.num_frames + 1))
    chosen = near  # right already wherever no pairs compete
    for b in contested:
        block = slice(starts[b], starts[b + 1])
        rows, columns = linear_sum_assignment(cost[block])
        won = np.zeros_like(near[block])
        won[rows, columns] = True
        chosen[block] &= won
    return chosen
