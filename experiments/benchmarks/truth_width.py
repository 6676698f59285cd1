"""How sharp should the grid truth be? Scores of perfect maps, by the width of the truth.

The field trains on maps whose every target fills its nearest cell. Even a perfect
answer of that kind scores 48.9, because the position within the cell is gone. Shared
among the cells around the true position (`grid.grid_map(width=...)`) the map keeps it;
shared too widely, weak cells of one target outrank the best cell of another and AP25
falls. Each row is a perfect map of that width, scored by both read-outs.

Command:   python experiments/benchmarks/truth_width.py
"""

from __future__ import annotations

import argparse

import jax.numpy as jnp

from dscsnet_jax.evaluation.report import evaluate, format_table
from dscsnet_jax.maps.readout import peak_centroids, threshold_cells
from dscsnet_jax.physics import grid, scene


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=4000, help="frames of the val split")
    parser.add_argument("--preset", default="csist")
    parser.add_argument("--division", type=int, default=3)
    args = parser.parse_args()
    preset = scene.get_preset(args.preset, division=args.division)
    truth = scene.simulate(preset, scene.frame_keys(0, "val", jnp.arange(args.num))).targets
    capacity = sum(preset.cluster.intensity) / 2
    rows = {}
    for width in (0.0, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5):
        x = grid.grid_map(
            truth.position,
            truth.intensity,
            truth.mask,
            frame_size=preset.frame_size,
            division=args.division,
            width=width,
        )
        cells = threshold_cells(x, division=args.division)
        peaks = peak_centroids(x, division=args.division, separation=0.4, capacity=capacity)
        rows[f"width {width}, cells"] = evaluate(cells.targets, truth)
        rows[f"width {width}, peaks"] = evaluate(peaks.targets, truth)
    print(format_table(rows))


if __name__ == "__main__":
    main()
