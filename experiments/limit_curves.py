"""CSO-mAP and position error of all methods beside the Bayes limit, as a picture.

    python experiments/limit_curves.py --num 500 --out experiments/figures/limit_curves.png

Against noise (the csist scenes, unrounded), against the distance of two targets of 220 to
250 counts at noise 2 (nothing known of their distance), and against the number of targets
of the csist scenes at noise 2. Every method is told the sensor and the prior.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

from dscsnet_jax.cli.simulate import simulated
from dscsnet_jax.estimation.limit import bayes_limit
from dscsnet_jax.estimation.result import UnmixResult
from dscsnet_jax.estimation.unmix import unmix
from dscsnet_jax.evaluation.report import Scores, evaluate
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.prior import scene_prior
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.scene import get_preset
from dscsnet_jax.physics.targets import Targets, from_arrays

NOISE = (0.5, 1.0, 2.0, 5.0, 10.0)
DISTANCE = (0.15, 0.25, 0.35, 0.5, 0.7, 1.0, 1.5)
MIDDLE = 2.0
SEED = 0
METHODS: dict[str, Callable[[np.ndarray, Targets, Known], UnmixResult]] = {
    "dscsnet": lambda frames, _, known: unmix(frames, known),
    "greedy": lambda frames, _, known: unmix(frames, known, method="greedy"),
    "grid": lambda frames, _, known: unmix(frames, known, method="grid"),
    "Bayes limit": lambda frames, truth, known: bayes_limit(
        frames, known, count=np.asarray(truth.count)
    ),
}
Curves = dict[str, list[tuple[float, float, float]]]


def main() -> None:
    """Compute the three families of curves and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=500, help="frames per point")
    parser.add_argument("--out", type=Path, default=Path("limit_curves.png"))
    args = parser.parse_args()
    families = {
        "noise (counts)": against_noise(args.num),
        "distance of two targets (pixels)": against_distance(args.num),
        "number of targets": against_count(4 * args.num),
    }
    args.out.with_suffix(".json").write_text(json.dumps(families, indent=1) + "\n")
    draw(families, args.out)


def against_noise(num: int) -> Curves:
    """(noise, mAP, RMSE) of each method."""
    curves: Curves = {name: [] for name in METHODS}
    for noise in NOISE:
        preset = get_preset("csist_float", read_noise=noise)
        scene = simulated(preset, seed=SEED, split="test", num=num)
        for name, method in METHODS.items():
            answer = method(np.asarray(scene.frames), scene.targets, preset.known)
            add(curves[name], noise, evaluate(answer.targets, scene.targets))
    return curves


def against_distance(num: int) -> Curves:
    """(distance, mAP, RMSE) of two targets each, at any angle."""
    curves: Curves = {name: [] for name in METHODS}
    prior = scene_prior(intensity=(220.0, 250.0), count=(0.0, 0.5, 0.5))
    known = dataclasses.replace(get_preset("csist_float", read_noise=MIDDLE).known, prior=prior)
    rng = np.random.default_rng(SEED)
    for distance in DISTANCE:
        truth = pairs(rng, num, distance)
        frames = np.asarray(render(truth, frame_size=11, psf=known.psf))
        frames = frames + MIDDLE * rng.standard_normal(frames.shape).astype(np.float32)
        for name, method in METHODS.items():
            answer = method(frames, truth, known)
            add(curves[name], distance, evaluate(answer.targets, truth))
    return curves


def pairs(rng: np.random.Generator, num: int, distance: float) -> Targets:
    """Two targets a frame around its middle."""
    angle = rng.uniform(0, 2 * np.pi, num)
    half = distance / 2 * np.stack([np.cos(angle), np.sin(angle)], -1)
    middle = rng.uniform(4.5, 5.5, (num, 2))
    position = np.stack([middle + half, middle - half], 1).astype(np.float32)
    intensity = rng.uniform(220, 250, (num, 2)).astype(np.float32)
    return from_arrays(position, intensity, np.ones((num, 2), bool))


def against_count(num: int) -> Curves:
    """(count, mAP, RMSE) of each method, frames sorted by their true count."""
    curves: Curves = {name: [] for name in METHODS}
    preset = get_preset("csist_float", read_noise=MIDDLE)
    scene = simulated(preset, seed=SEED, split="test", num=num)
    counts = np.asarray(scene.targets.count)
    for name, method in METHODS.items():
        answer = method(np.asarray(scene.frames), scene.targets, preset.known)
        for count in range(1, 6):
            chosen = np.flatnonzero(counts == count)
            sides = (answer.targets, scene.targets)
            some = [jax.tree.map(lambda a, i=chosen: np.asarray(a)[i], t) for t in sides]
            add(curves[name], count, evaluate(*some))
    return curves


def add(curve: list[tuple[float, float, float]], at: float, scores: Scores) -> None:
    """A point: where, CSO-mAP in percent, position RMSE in pixels."""
    curve.append((at, 100 * scores.cso.mean, scores.matches.position_rmse))
    print(at, f"{curve[-1][1]:.2f} {curve[-1][2]:.4f}", flush=True)


def draw(families: dict[str, Curves], path: Path) -> None:
    """Two rows of three panels."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), sharex="col", layout="constrained")
    for column, (label, curves) in zip(axes.T, families.items(), strict=True):
        for name, points in curves.items():
            x, score, error = np.array(points).T
            style = "k--" if name == "Bayes limit" else "o-"
            column[0].plot(x, score, style, label=name, markersize=4)
            column[1].plot(x, error, style, label=name, markersize=4)
        column[1].set(xlabel=label, yscale="log")
        if label.startswith("noise"):
            column[1].set_xscale("log")
    axes[0, 0].set_ylabel("CSO-mAP (%)")
    axes[1, 0].set_ylabel("position RMSE of pairs\nwithin 0.25 px (px)")
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
