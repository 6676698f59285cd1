"""Largest difference between `optics.render` and independently integrated frames, counts.

The 48 frames in `tests/data/csist_sample` were made by numerical double integration of
the PSF over every pixel, in float64; `render` is the closed form, here in float32.

Command:   python experiments/benchmarks/render_accuracy.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np

from dscsnet_jax.io.csist import read_csist
from dscsnet_jax.physics import optics

SAMPLE = Path(__file__).parents[2] / "tests" / "data" / "csist_sample"


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=SAMPLE, help="split with float64 frames")
    folder = parser.parse_args().data
    split = read_csist(folder)
    integrated = np.load(folder / "frames_float64.npz")["frames"]
    closed = optics.render(split.targets, frame_size=integrated.shape[1:], psf=split.sigma)
    largest = np.abs(np.asarray(closed, np.float64) - integrated).max()
    print(
        f"render: at most {largest:.1e} counts from {len(integrated)} integrated frames of up to "
        f"{integrated.max():.0f} counts ({closed.dtype}, {jax.devices()[0].device_kind})"
    )


if __name__ == "__main__":
    main()
