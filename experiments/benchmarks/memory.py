"""Peak memory of `unmix` against the number of frames, and against the number of targets.

Every point is a process of its own, which tells its largest resident memory, its time with all
compilation, and how many targets it found. Frames are of the preset `csist`; large frames hold
clusters of one to three targets, 150 to 250 counts each and half a pixel and more apart, over a
background of 10 counts and noise of 2, one cluster on 1,024 pixels.

Command:   python experiments/benchmarks/memory.py --out experiments/figures/memory.png
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import jax
import matplotlib.pyplot as plt
import numpy as np

from dscsnet_jax.estimation.unmix import unmix
from dscsnet_jax.estimation.windows import Flat, light_of
from dscsnet_jax.physics import scene

FRAMES, SIDES = (64, 512, 4096, 16384), (128, 256, 512, 1024)
_PIXELS_PER_CLUSTER, _LEVEL, _NOISE, _APART = 1024, 10.0, 2.0, 0.5


def large_frame(side: int, seed: int = 0) -> tuple[np.ndarray, Flat]:
    """A frame of so many pixels a side, and its targets.

    Example:
      >>> frame, truth = large_frame(64)
      >>> frame.shape, len(truth.frame) >= 4
      ((64, 64), True)
    """
    rng, table = np.random.default_rng(seed), []
    while len(table) < side**2 // _PIXELS_PER_CLUSTER:
        place = rng.uniform(4, side - 5, 2) + rng.uniform(-0.6, 0.6, (rng.integers(1, 4), 2))
        apart = np.linalg.norm(place[:, None] - place, axis=-1)[np.triu_indices(len(place), 1)]
        if apart.min(initial=np.inf) > _APART:
            table.append(np.column_stack([place, rng.uniform(150, 250, len(place))]))
    targets = np.concatenate(table).astype(np.float32)
    truth = Flat(np.zeros(len(targets), int), targets[:, :2], targets[:, 2])
    sky = np.full((1, side, side), _LEVEL, np.float32)
    expected = light_of(truth, np.full(2, 0.5, np.float32), sky)[0] + _LEVEL
    return expected + rng.normal(0, _NOISE, expected.shape), truth


def measure(kind: str, number: int, estimate: str) -> dict[str, float]:
    """Unmix so many frames, or one frame of so many pixels a side, in this process."""
    if kind == "frames":
        preset = scene.get_preset("csist")
        made = jax.jit(scene.simulate, static_argnums=0)
        keys = [
            scene.frame_keys(0, "test", start + np.arange(64)) for start in range(0, number, 64)
        ]
        parts = [jax.tree.map(np.asarray, made(preset, some)) for some in keys]
        y = np.concatenate([part.frames for part in parts])
        there, told = sum(int(part.targets.mask.sum()) for part in parts), preset.known
    else:
        y, truth = large_frame(number)
        there, told = len(truth.frame), None
    start = time.perf_counter()
    found = int(np.asarray(unmix(y, told, estimate=estimate).targets.count).sum())
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"gigabytes": memory, "seconds": seconds, "found": found, "targets": there}


def main() -> None:
    """Print one line per point, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--estimate", default="map", choices=("map", "mean"))
    parser.add_argument("--out", default="experiments/figures/memory.png", help="figure")
    parser.add_argument("--point", nargs=2, metavar=("KIND", "NUMBER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(args.point[0], int(args.point[1]), args.estimate)))
        return
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained", sharey=True)
    panels = (("frames", FRAMES, "frames of 11 x 11"), ("side", SIDES, "targets of one frame"))
    for axis, (kind, numbers, label) in zip(axes, panels, strict=True):
        x, y = [], []
        for number in numbers:
            command = [sys.executable, __file__, "--estimate", args.estimate, "--point", kind]
            told = subprocess.run([*command, str(number)], check=True, capture_output=True)
            point = json.loads(told.stdout.splitlines()[-1])
            print(
                f"{kind} {number:5d}: {point['gigabytes']:.2f} GiB, {point['seconds']:.1f} s, "
                f"{point['found']} targets of {point['targets']}",
                flush=True,
            )
            x.append(number if kind == "frames" else point["targets"])
            y.append(point["gigabytes"])
        axis.plot(x, y, "o-")
        axis.set(xlabel=label, xscale="log", ylim=(0, None))
    axes[0].set_ylabel("peak memory, GiB")
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
