"""Scores of an answer in one table: the read-out asked for, the reference rule, the limit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import numpy as np

from dscsnet_jax.estimation.limit import bayes_limit
from dscsnet_jax.estimation.result import UnmixResult
from dscsnet_jax.evaluation.report import Scores, evaluate, join_batches
from dscsnet_jax.inference.known import Known
from dscsnet_jax.maps.readout import REFERENCE_THRESHOLD, threshold_cells
from dscsnet_jax.physics.grid import grid_map
from dscsnet_jax.physics.limits import preset_limit
from dscsnet_jax.physics.scene import Preset
from dscsnet_jax.physics.targets import Targets

GUIDE = "Gaussian guide (Cramer-Rao and prior, count given)"
LIMITS = {
    "given": "Bayes limit (tempered posterior, count given)",
    "unknown": "Bayes limit (tempered posterior, count unknown)",
}


def label(method: str, estimate: str, readout: str) -> str:
    """Name of a row.

    Example:
      >>> label("grid", "mean", "cells"), label("dscsnet", "map", "peaks")
      ('grid (cells: reference rule)', 'dscsnet (map)')
    """
    if method == "grid":
        return "grid (cells: reference rule)" if readout == "cells" else "grid (peaks)"
    return f"{method} ({estimate})"


def ranked(answers: Sequence[UnmixResult]) -> np.ndarray | None:
    """Confidence (B, K) of the targets of all answers, as `join_batches` has them; or None."""
    if any(np.isnan(a.confidence).any() for a in answers):
        return None
    trusted = (replace(a.targets, intensity=a.confidence) for a in answers)  # type: ignore[arg-type]
    return np.asarray(join_batches(trusted).intensity)


def method_rows(
    name: str,
    found: Targets,
    maps: np.ndarray | None,
    truth: Targets,
    *,
    num_pixels: int,
    confidence: np.ndarray | None = None,
) -> dict[str, Scores]:
    """Scores of an answer and, where there are maps, of the reference rule on them.

    Args:
      name: of the answer's row.
      found: `Targets` of (B, K, ...).
      maps: (B, cN, cM) sub-pixel maps, counts, or None.
      truth: `Targets` of the same frames.
      num_pixels: rows of the detector's frame, `N`.
      confidence: (B, K) of the answer, or None.

    Returns:
      `Scores` by name, the answer's first.
    """
    score = partial(evaluate, found, truth, confidence=confidence)
    if maps is None:
        return {name: score()}
    division = maps.shape[1] // num_pixels
    size = (num_pixels, maps.shape[2] // division)
    position, intensity = (np.asarray(a, np.float32) for a in (truth.position, truth.intensity))
    true_maps = grid_map(position, intensity, truth.mask, frame_size=size, division=division)  # type: ignore[arg-type]
    slots = max(1, int((maps >= REFERENCE_THRESHOLD).sum((1, 2)).max(initial=1)))
    read = jax.jit(partial(threshold_cells, division=division, max_targets=slots))
    cells = read(maps).targets
    rows = {name: score(maps=maps, truth_maps=true_maps)}
    rows.setdefault(label("grid", "", "cells"), evaluate(cells, truth))
    return rows


def guide_row(truth: Targets, preset: Preset) -> dict[str, Scores]:
    """Scores of an estimator with Gaussian errors at the bound of the preset.

    None, with a note, where there is no such bound.
    """
    try:
        best = jax.jit(partial(preset_limit, preset=preset))(jax.random.key(0), truth)
    except ValueError as error:
        print(f"no limit: {error}", file=sys.stderr)
        return {}
    return {GUIDE: evaluate(best, truth)}


def limit_row(frames: np.ndarray, truth: Targets, known: Known, count: str) -> dict[str, Scores]:
    """Scores of the posterior from draws of the prior, the count `given` or `unknown`."""
    number = np.asarray(truth.mask).sum(1) if count == "given" else None
    best = bayes_limit(frames, known, count=number)
    return {LIMITS[count]: evaluate(best.targets, truth, confidence=best.confidence)}


def against_limit(rows: dict[str, Scores], name: str, count: str) -> str:
    """What a row lacks to the limit, in a line.

    Returns:
      Difference of CSO-mAP and ratio of the position errors.
    """
    ours, best = rows[name], rows[LIMITS[count]]
    ratio = ours.matches.position_rmse / best.matches.position_rmse
    return (
        f"{name}: {100 * (best.cso.mean - ours.cso.mean):.2f} points of CSO-mAP below the "
        f"limit, position RMSE {ratio:.3f} times its"
    )
