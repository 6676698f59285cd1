"""CSO-mAP of the map of the weights `csist_c3` on csist test frames, beside the limits.

Rows of the table:
- `map, cells`: the network's map by the reference rule (each cell >= 50 counts is a
  detection at its centre): the number to compare with published scores.
- `map, peaks`: the same maps by the peak read-out, as `unmix --method grid` answers.
- `true cells`: the perfect grid map by the reference rule.
- `limit`: the truth with errors drawn at the Bayesian Cramer-Rao bound of the frames
  (`physics.limits`); the count is given to it. A guide for quantised frames.

Positions in pixels, intensities in counts, the rest in percent; errors are those of
pairs within 0.25 pixels, so read them with the recall.

Command:   python experiments/benchmarks/map_score.py
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.estimation.unmix import Options, pretrained, unmix
from dscsnet_jax.evaluation.report import Scores, evaluate, format_table
from dscsnet_jax.inference.known import Known
from dscsnet_jax.io.weights import Weights, load_weights
from dscsnet_jax.maps.readout import threshold_cells
from dscsnet_jax.physics import grid, limits, scene
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.targets import Targets

SEED = 0


def network_rows(weights: Weights, frames: np.ndarray, truth: Targets) -> dict[str, Scores]:
    """Scores of the network's maps by both read-outs."""
    known, options = Known(sensor=Sensor(background=0.0)), Options(weights, return_maps=True)
    peaks = unmix(frames, known, method="grid", options=options)
    cells = threshold_cells(jnp.asarray(peaks.maps), division=weights.metadata.geometry.division)
    return {
        "map, cells": evaluate(cells.targets, truth),
        "map, peaks": evaluate(peaks.targets, truth),
    }


def reference_rows(preset: scene.Preset, truth: Targets) -> dict[str, Scores]:
    """Scores of the true cells and of an estimator at the bound."""
    x = grid.grid_map(
        truth.position,
        truth.intensity,
        truth.mask,
        frame_size=preset.frame_size,
        division=preset.division,
    )
    cells = threshold_cells(x, division=preset.division)
    at_bound = limits.preset_limit(jax.random.key(SEED), truth, preset)
    return {
        "true cells": evaluate(cells.targets, truth),
        "limit": evaluate(at_bound, truth),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=10_000, help="frames of the test split")
    parser.add_argument("--weights", help="weights file (.safetensors); default: packaged")
    args = parser.parse_args()
    weights = load_weights(args.weights) if args.weights else pretrained("csist_c3")
    preset = scene.get_preset("csist", division=weights.metadata.geometry.division)
    keys = scene.frame_keys(SEED, "test", jnp.arange(args.num))
    truth, frames, *_ = jax.jit(scene.simulate, static_argnums=0)(preset, keys)
    rows = network_rows(weights, np.asarray(frames), truth) | reference_rows(preset, truth)
    print(
        f"csist, c = {preset.division}, {args.num} frames of the test split, seed {SEED}, "
        f"{jax.devices()[0].device_kind}"
    )
    print(format_table(rows))


if __name__ == "__main__":
    main()
