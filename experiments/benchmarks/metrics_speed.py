"""Seconds to score 10,000 frames on the host, without and with map scores.

Run: python experiments/benchmarks/metrics_speed.py [--frames 10000]

The detections are the truth with Gaussian position errors, some targets missing and
some false alarms, so that every part of the metrics has work to do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from dscsnet_jax.evaluation import maps, metrics, report
from dscsnet_jax.physics.targets import Targets

SLOTS, FALSE_SLOTS = 5, 3


def synthetic_case(num_frames: int, seed: int = 0) -> tuple[Targets, Targets]:
    """Detections in 8 slots and truth in 5, about three targets per frame."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform(2, 8, (num_frames, 1, 2))
    position = centre + rng.uniform(-0.5, 0.5, (num_frames, SLOTS, 2))
    intensity = rng.uniform(220, 250, (num_frames, SLOTS))
    count = np.clip(np.round(rng.normal(3, 1, num_frames)), 1, SLOTS)
    present = np.arange(SLOTS) < count[:, None]
    truth = Targets(position=position, intensity=intensity, mask=present)
    kept = present & (rng.random(present.shape) < 0.97)
    noisy = position + rng.normal(0, 0.08, position.shape)
    false_place = centre + rng.uniform(-1, 1, (num_frames, FALSE_SLOTS, 2))
    false_alarm = rng.random((num_frames, FALSE_SLOTS)) < 0.05
    false_score = rng.uniform(50, 200, (num_frames, FALSE_SLOTS))
    found = Targets(
        position=np.concatenate([noisy, false_place], 1),
        intensity=np.concatenate([intensity, false_score], 1),
        mask=np.concatenate([kept, false_alarm], 1),
    )
    return found, truth


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Shortest wall time of several runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print one line per metric."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=10_000)
    num_frames = parser.parse_args().frames
    found, truth = synthetic_case(num_frames)
    x = np.random.default_rng(1).uniform(0, 255, (num_frames, 33, 33))
    jobs: dict[str, Callable[[], object]] = {
        "cso_map": lambda: metrics.cso_map(found, truth),
        "cso_map_matched": lambda: metrics.cso_map_matched(found, truth),
        "match_scores, 0.25 px": lambda: metrics.match_scores(found, truth, 0.25),
        "match_scores, any distance": lambda: metrics.match_scores(found, truth, np.inf),
        "evaluate, no maps": lambda: report.evaluate(found, truth),
        "psnr, 33 x 33 cells": lambda: maps.psnr(x, x[::-1]),
        "ssim, 33 x 33 cells": lambda: maps.ssim(x, x[::-1]),
    }
    print(f"{num_frames} frames, best of 3")
    for name, work in jobs.items():
        print(f"{name:<28}{seconds(work):8.3f} s")


if __name__ == "__main__":
    main()
