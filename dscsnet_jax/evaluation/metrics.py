"""Metrics: CSO-mAP, counts, and the errors of matched targets.

Every function takes padded `Targets` (NumPy or JAX) of the same B frames, with any
two numbers of slots, and scores every frame. Where a quantity is undefined (no
frame, no truth, no pair) it is NaN, never an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dscsnet_jax.evaluation.matching import as_batches, matched, nearest_hits, optimal_hits
from dscsnet_jax.physics.targets import Targets

THRESHOLDS = (0.05, 0.10, 0.15, 0.20, 0.25)
"""Distance thresholds of CSO-mAP, pixels."""


class CsoMap(NamedTuple):
    """Average precisions at several distance thresholds.

    Attributes:
      thresholds: (T,) distances, pixels.
      average_precisions: (T,) fractions in 0..1; NaN where there is no truth.
    """

    thresholds: tuple[float, ...]
    average_precisions: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mAP: mean of the average precisions, a fraction."""
        return _mean(np.asarray(self.average_precisions))

    def as_dict(self) -> dict[str, float]:
        """`mAP` and `AP05`, `AP10`, ... in percent.

        Example:
          >>> CsoMap((0.05, 0.25), (0.0, 0.5)).as_dict()
          {'mAP': 25.0, 'AP05': 0.0, 'AP25': 50.0}
        """
        by_threshold = zip(self.thresholds, self.average_precisions, strict=True)
        named = {f"AP{100 * t:02g}": 100 * ap for t, ap in by_threshold}
        return {"mAP": 100 * self.mean} | named


class MatchScores(NamedTuple):
    """Scores of the targets paired by optimal assignment (`matching.matched`).

    Attributes:
      recall: matched pairs / true targets, a fraction.
      precision: matched pairs / detections, a fraction.
      position_rmse: root mean square distance of the pairs, pixels.
      position_median: median distance of the pairs, pixels.
      intensity_rmse: root mean square intensity error of the pairs, counts.
      intensity_bias: sum of the intensity errors / sum of the true intensities.
    """

    recall: float
    precision: float
    position_rmse: float
    position_median: float
    intensity_rmse: float
    intensity_bias: float


def cso_map(
    detections: Targets, truth: Targets, thresholds: Sequence[float] = THRESHOLDS
) -> CsoMap:
    """CSO-mAP, the benchmark's metric.

    True positives by `matching.nearest_hits`; all frames pooled and ranked by score
    (the intensity); `average_precision` per threshold; their mean.

    Equal scores form one step of the precision-recall curve, so the order of frames
    and slots has no influence.

    Args:
      detections: `Targets` of B frames; intensity is the score.
      truth: `Targets` of the same frames; the number of slots may differ.
      thresholds: distances, pixels.

    Returns:
      The `CsoMap`. Without truth its values are NaN; with truth but no detections, 0.

    Raises:
      ValueError: if shapes disagree or a present target is not finite.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> truth = from_lists([[(5.0, 5.0, 240.0)], [(3.0, 3.0, 230.0)]])
      >>> found = from_lists([[(5.0, 5.125, 250.0)], [(3.0, 3.0, 225.0)]])
      >>> cso_map(found, truth).as_dict()
      {'mAP': 70.0, 'AP05': 25.0, 'AP10': 25.0, 'AP15': 100.0, 'AP20': 100.0, 'AP25': 100.0}

    References:
      Han et al., "DISTA-Net", ICCV 2025, who define the metric.
    """
    return _pooled(*nearest_hits(detections, truth, thresholds), truth, thresholds)


def cso_map_matched(
    detections: Targets, truth: Targets, thresholds: Sequence[float] = THRESHOLDS
) -> CsoMap:
    """CSO-mAP with a corrected matching: a number of its own, not the benchmark's.

    As `cso_map`, but a detection is a true positive if the optimal assignment at the
    threshold (`matching.matched`) pairs it with a true target.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> truth = from_lists([[(5.0, 5.0, 240.0), (5.0, 5.5, 230.0)]])
      >>> found = from_lists([[(5.0, 5.125, 250.0), (5.0, 5.25, 225.0)]])
      >>> [m(found, truth, (0.25,)).mean for m in (cso_map, cso_map_matched)]
      [0.5, 1.0]
    """
    return _pooled(*optimal_hits(detections, truth, thresholds), truth, thresholds)


def average_precision(scores: np.ndarray, hits: np.ndarray, num_truth: int) -> float:
    """Area under the interpolated precision-recall curve.

    With `TP(s)` the hits and `n(s)` the detections of score >= s, `P = TP / n` and
    `R = TP / num_truth`, the area is `sum_s (R(s) - R(s+)) max_{s' <= s} P(s')` over
    the distinct scores s, s+ being the next higher one.

    Args:
      scores: (n,) scores of the detections of all frames.
      hits: (n,) bool, true positives.
      num_truth: number of true targets in all frames.

    Returns:
      The area in 0..1; NaN if there is no truth.

    Example:
      >>> average_precision(np.array([3.0, 2.0, 1.0]), np.array([True, False, True]), 2)
      0.8333333333333333
    """
    if num_truth == 0:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last_of_score = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], ranked.size > 0))
    found = np.cumsum(hits[order])[last_of_score]
    precision = found / (last_of_score + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(found, prepend=0) * envelope) / num_truth)


def count_accuracy(detections: Targets, truth: Targets) -> float:
    """Fraction of frames whose number of targets is right; NaN without frames.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> one = [(5.0, 5.0, 240.0)]
      >>> count_accuracy(from_lists([one, []]), from_lists([one, one]))
      0.5
    """
    found, real = as_batches(detections, truth)
    return _mean(found.mask.sum(-1) == real.mask.sum(-1))


def count_confusion(detections: Targets, truth: Targets) -> np.ndarray:
    """Frames by true and by estimated number of targets.

    Args:
      detections: `Targets` of B frames.
      truth: `Targets` of the same frames.

    Returns:
      (C+1, C+2) whole numbers, `C` the largest true count: entry `[i, j]` is the
      number of frames with i targets and j detections; the last column collects
      every j > C.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> one = [(5.0, 5.0, 240.0)]
      >>> count_confusion(from_lists([one, one * 3]), from_lists([one, one]))
      array([[0, 0, 0],
             [0, 1, 1]])
    """
    found, real = as_batches(detections, truth)
    true_count = real.mask.sum(-1)
    largest = int(true_count.max(initial=0))
    estimated = np.minimum(found.mask.sum(-1), largest + 1)
    shape = (largest + 1, largest + 2)
    flat = np.bincount(true_count * shape[1] + estimated, minlength=shape[0] * shape[1])
    return flat.reshape(shape)


def match_scores(detections: Targets, truth: Targets, max_distance: float) -> MatchScores:
    """Recall, precision and the errors of optimally matched targets.

    The errors are those of pairs within `max_distance` only: read them together with
    the recall.

    Args:
      detections: `Targets` of B frames.
      truth: `Targets` of the same frames; the number of slots may differ.
      max_distance: largest distance of a pair, pixels.

    Returns:
      The `MatchScores`; NaN where undefined.

    Raises:
      ValueError: if shapes disagree or `max_distance` is not >= 0.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> truth = from_lists([[(5.0, 5.0, 200.0), (1.0, 1.0, 200.0)]])
      >>> scores = match_scores(from_lists([[(5.0, 5.25, 210.0)]]), truth, 0.5)
      >>> scores.recall, scores.precision, scores.position_rmse, scores.intensity_bias
      (0.5, 1.0, 0.25, 0.05)
    """
    found, real = as_batches(detections, truth)
    pairs = matched(detections, truth, max_distance)
    value = real.intensity[pairs.frame, pairs.truth]
    error = found.intensity[pairs.frame, pairs.detection] - value
    return MatchScores(
        recall=_ratio(pairs.frame.size, real.mask.sum()),
        precision=_ratio(pairs.frame.size, found.mask.sum()),
        position_rmse=_mean(pairs.distance**2) ** 0.5,
        position_median=float(np.median(pairs.distance)) if pairs.frame.size else float("nan"),
        intensity_rmse=_mean(error**2) ** 0.5,
        intensity_bias=_ratio(error.sum(), value.sum()),
    )


def _pooled(
    scores: np.ndarray, hits: np.ndarray, truth: Targets, thresholds: Sequence[float]
) -> CsoMap:
    """Average precision of every row of `hits` over all frames."""
    num_truth = int(np.asarray(truth.mask).sum())
    return CsoMap(
        tuple(float(t) for t in thresholds),
        tuple(average_precision(scores, row, num_truth) for row in hits),
    )


def _mean(values: np.ndarray) -> float:
    """Mean of all entries; NaN, without a warning, of none."""
    return float(values.mean()) if values.size else float("nan")


def _ratio(part: float, whole: float) -> float:
    """`part / whole`; NaN, without a warning, of a zero whole."""
    return float(part / whole) if whole else float("nan")
