"""Report: all scores of a method in one object, as JSON and as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from numpy.typing import ArrayLike

from dscsnet_jax.evaluation import maps as map_scores
from dscsnet_jax.evaluation.matching import Batch, as_batch, as_batches
from dscsnet_jax.evaluation.metrics import (
    CsoMap,
    MatchScores,
    count_accuracy,
    count_confusion,
    cso_map,
    cso_map_matched,
    match_scores,
)
from dscsnet_jax.physics.targets import Targets

MATCH_DISTANCE = 0.25
"""Default largest distance of a matched pair, pixels: CSO-mAP's widest threshold."""

TABLE_COLUMNS = {
    "mAP": 2,
    "mAP_ranked": 2,
    "AP05": 2,
    "AP10": 2,
    "AP15": 2,
    "AP20": 2,
    "AP25": 2,
    "count_accuracy": 2,
    "recall": 2,
    "precision": 2,
    "position_rmse": 4,
    "intensity_rmse": 2,
    "psnr": 2,
    "ssim": 4,
}
"""Default columns of `format_table`, with their decimals."""


@dataclass(frozen=True)
class Scores:
    """Scores of one method on one data set; build it with `evaluate`.

    Attributes:
      frames, targets, detections: how many there are.
      cso: the benchmark's CSO-mAP.
      cso_matched: the same with optimal matching.
      cso_ranked: CSO-mAP with detections ranked by their confidence instead of their intensity: a
        number of its own, not the benchmark's; None without confidence.
      count_accuracy: fraction of frames with the right number of targets.
      count_confusion: frames by true (row) and estimated (column) number of
        targets; the last column collects larger estimates.
      match_distance: largest distance of a matched pair, pixels.
      matches: recall, precision and errors of the matched targets.
      psnr: mean PSNR of the maps, dB; NaN without maps.
      ssim: mean SSIM of the maps; NaN without maps.
    """

    frames: int
    targets: int
    detections: int
    cso: CsoMap
    cso_matched: CsoMap
    cso_ranked: CsoMap | None
    count_accuracy: float
    count_confusion: np.ndarray
    match_distance: float
    matches: MatchScores
    psnr: float
    ssim: float

    def as_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON.

        `mAP`, `AP05`, ..., `count_accuracy`, `recall`, `precision` and
        `intensity_bias` are in percent, positions in pixels, intensities in counts,
        `psnr` in dB. `matched` holds the CSO-mAP with optimal matching. Values that
        are not finite become None (JSON null).

        Example:
          >>> from dscsnet_jax.physics.targets import from_lists
          >>> truth = from_lists([[(5.0, 5.0, 240.0)]])
          >>> scores = evaluate(truth, truth).as_dict()
          >>> scores["mAP"], scores["position_rmse"], scores["psnr"]
          (100.0, 0.0, None)
        """
        errors = self.matches._asdict()
        for share in ("recall", "precision", "intensity_bias"):
            errors[share] *= 100
        ranked = {} if self.cso_ranked is None else {"mAP_ranked": 100 * self.cso_ranked.mean}
        flat = {
            **self.cso.as_dict(),
            **ranked,
            "frames": self.frames,
            "targets": self.targets,
            "detections": self.detections,
            "count_accuracy": 100 * self.count_accuracy,
            "match_distance": self.match_distance,
            **errors,
            "psnr": self.psnr,
            "ssim": self.ssim,
        }
        return {
            **_finite_or_none(flat),
            "matched": _finite_or_none(self.cso_matched.as_dict()),
            "count_confusion": self.count_confusion.tolist(),
        }


def evaluate(
    detections: Targets,
    truth: Targets,
    *,
    confidence: ArrayLike | None = None,
    maps: ArrayLike | jax.Array | None = None,
    truth_maps: ArrayLike | jax.Array | None = None,
    match_distance: float = MATCH_DISTANCE,
    data_range: float = map_scores.DATA_RANGE,
) -> Scores:
    """Score estimated targets, and maps if given, against the truth.

    Every frame given is scored once. Join batches first (`join_batches`): average
    precision ranks the detections of all frames, so it is not a mean over batches.

    Args:
      detections: `Targets` of B frames; intensity is the score.
      truth: `Targets` of the same frames; the number of slots may differ.
      confidence: (B, K) of the detections, by which `cso_ranked` ranks them.
      maps: (B, cN, cM) sub-pixel maps, counts.
      truth_maps: grid truth of the same shape (`physics.grid.grid_map`).
      match_distance: largest distance of a matched pair, pixels; may be inf.
      data_range: range of the maps' values for PSNR and SSIM, counts.

    Returns:
      The `Scores`; NaN where undefined.

    Raises:
      ValueError: if shapes disagree, a present target or confidence is not finite, or only one
        of `maps` and `truth_maps` is given.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> truth = from_lists([[(5.0, 5.0, 240.0), (5.0, 5.5, 230.0)]])
      >>> scores = evaluate(from_lists([[(5.0, 5.0, 240.0)]]), truth)
      >>> scores.matches.recall, scores.count_accuracy
      (0.5, 0.0)
    """
    if (maps is None) != (truth_maps is None):
        raise ValueError("give both maps and truth_maps, or neither")
    found, real = as_batches(detections, truth)
    mean_psnr = mean_ssim = float("nan")
    if maps is not None and truth_maps is not None and len(real.mask):
        mean_psnr = float(map_scores.psnr(maps, truth_maps, data_range).mean())
        mean_ssim = float(map_scores.ssim(maps, truth_maps, data_range).mean())
    return Scores(
        frames=len(real.mask),
        targets=int(real.mask.sum()),
        detections=int(found.mask.sum()),
        cso=cso_map(detections, truth),
        cso_matched=cso_map_matched(detections, truth),
        cso_ranked=_ranked(detections, truth, confidence),
        count_accuracy=count_accuracy(detections, truth),
        count_confusion=count_confusion(detections, truth),
        match_distance=float(match_distance),
        matches=match_scores(detections, truth, match_distance),
        psnr=mean_psnr,
        ssim=mean_ssim,
    )


def _ranked(detections: Targets, truth: Targets, confidence: ArrayLike | None) -> CsoMap | None:
    """CSO-mAP with detections ranked by their confidence."""
    if confidence is None:
        return None
    score, shape = np.asarray(confidence, float), np.shape(detections.mask)
    if score.shape != shape:
        raise ValueError(f"confidence: expected shape {shape}, got {score.shape}")
    return cso_map(dataclasses.replace(detections, intensity=score), truth)  # type: ignore[arg-type]


def join_batches(batches: Iterable[Targets], num_frames: int | None = None) -> Targets:
    """One `Targets` of all batches, whatever their numbers of slots.

    Args:
      batches: `Targets` in the order of the data set.
      num_frames: frames of the data set; what a padded last batch holds beyond them
        is dropped. Default: keep all.

    Returns:
      Float64 NumPy `Targets`, padded to the largest number of slots.

    Raises:
      ValueError: if the batches hold fewer than `num_frames` frames.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> one, two = [(1.0, 1.0, 9.0)], [(2.0, 2.0, 9.0)] * 2
      >>> join_batches([from_lists([one]), from_lists([two, []])], num_frames=2).count
      array([1, 2])
    """
    parts = [as_batch(batch, f"batch {i}") for i, batch in enumerate(batches)]
    slots = max((part.mask.shape[1] for part in parts), default=1)
    empty = Batch(np.zeros((0, slots, 2)), np.zeros((0, slots)), np.zeros((0, slots), bool))
    padded = [empty, *(_with_slots(part, slots) for part in parts)]
    position, intensity, mask = (np.concatenate(field) for field in zip(*padded, strict=True))
    if num_frames is not None and len(mask) < num_frames:
        raise ValueError(f"the batches hold {len(mask)} frames, expected num_frames={num_frames}")
    cut = Batch(position[:num_frames], intensity[:num_frames], mask[:num_frames])
    return Targets(**cut._asdict())


def format_table(
    rows: Mapping[str, Scores | Mapping[str, object]],
    columns: Mapping[str, int] | None = None,
) -> str:
    """Methods side by side, as plain aligned text.

    Args:
      rows: per method its `Scores`, or a dictionary such as `Scores.as_dict` gives;
        what it lacks (published scores, for instance) shows as `-`.
      columns: key -> decimals; default: those of `TABLE_COLUMNS` that any row holds.

    Returns:
      Lines joined by newlines, no newline at the end.

    Example:
      >>> print(format_table({"ours": {"mAP": 95.0, "AP05": 90.5}, "theirs": {"mAP": 46.36}}))
      method    mAP   AP05
      ------  -----  -----
      ours    95.00  90.50
      theirs  46.36      -
    """
    values = {k: v.as_dict() if isinstance(v, Scores) else v for k, v in rows.items()}
    if columns is None:
        held = {key for row in values.values() for key, value in row.items() if value is not None}
        columns = {key: digits for key, digits in TABLE_COLUMNS.items() if key in held}
    lines = [["method", *columns]]
    for name, row in values.items():
        lines.append([name, *(_cell(row.get(key), digits) for key, digits in columns.items())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(_aligned(line, widths) for line in lines)


def _aligned(line: list[str], widths: list[int]) -> str:
    """Name to the left, numbers to the right."""
    numbers = (text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))
    return "  ".join([line[0].ljust(widths[0]), *numbers]).rstrip()


def _cell(value: object, digits: int) -> str:
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.{digits}f}" if known else "-"


def _finite_or_none(values: Mapping[str, float]) -> dict[str, object]:
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def _with_slots(batch: Batch, slots: int) -> Batch:
    """Empty slots appended, up to `slots`."""
    extra = ((0, 0), (0, slots - batch.mask.shape[1]))
    return Batch(
        np.pad(batch.position, (*extra, (0, 0))),
        np.pad(batch.intensity, extra),
        np.pad(batch.mask, extra),
    )
