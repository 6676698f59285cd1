"""Scores under any optics: told the PSF, told a Gaussian of its width, and with a PSF fitted.

    python experiments/benchmarks/optics.py

Frames with Gaussian noise of 1 count and the scenes of `csist`, whose lengths grow with the
PSF's width. The fit begins 5 % too wide, with the PSF's own class. Beside them the Bayes limit
(`estimation.limit`), same frames.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np
from offgrid_score import coverage

from dscsnet_jax.estimation.limit import bayes_limit
from dscsnet_jax.estimation.unmix import Options, unmix
from dscsnet_jax.evaluation.report import evaluate
from dscsnet_jax.physics import scene
from dscsnet_jax.physics.psf import Gaussian, Psf
from dscsnet_jax.physics.psf_airy import airy
from dscsnet_jax.physics.psf_gaussians import Moffat, rotated_gaussian
from dscsnet_jax.physics.psf_tables import empirical

NOISE, WIDTH = 1.0, 0.5


def coma() -> Psf:
    """An array of a Gaussian of 0.5 pixels with 5 % of its light in a tail to one side."""
    place = (np.arange(61) - 30) / 5

    def spot(row: float, col: float, sigma: float) -> np.ndarray:
        square = (place[:, None] - row) ** 2 + (place[None] - col) ** 2
        return np.exp(-square / 2 / sigma**2) / sigma**2

    return empirical(0.95 * spot(0, 0, 0.5) + 0.05 * spot(0.8, 0.3, 0.6), oversampling=5)


PSFS: dict[str, Any] = {
    "Gaussian 0.4": lambda: Gaussian(0.4),
    "Gaussian 0.5": lambda: Gaussian(0.5),
    "Gaussian 0.7": lambda: Gaussian(0.7),
    "Gaussian 1.0": lambda: Gaussian(1.0),
    "0.45 x 0.6 at 30 degrees": lambda: rotated_gaussian((0.45, 0.6), 30),
    "Airy 0.95, 30 % obscured": lambda: airy(0.95, obscuration=0.3),
    "Moffat 2.5": lambda: Moffat(0.86, 2.5),
    "array with 5 % coma": coma,
}


def frames_of(psf: Psf, num: int) -> tuple[scene.Preset, scene.Scene]:
    """Frames of a PSF, with the preset whose scenes they show."""
    scale = float(np.mean(psf.width)) / WIDTH
    plain = scene.get_preset("csist_float", read_noise=NOISE)
    low, high = plain.cluster.extent
    preset = scene.get_preset(
        "csist_float",
        read_noise=NOISE,
        frame_size=2 * int(np.ceil(5 * scale)) + 1,
        separation=scale * plain.cluster.separation,
        extent=(scale * low, scale * high),
    )
    keys = scene.frame_keys(0, "test", np.arange(num))
    made = jax.jit(functools.partial(scene.simulate, preset))(keys, psf=psf)
    return preset, jax.tree.map(np.asarray, made)


def main() -> None:
    """Print a row for each PSF and what is told of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--num-fit", type=int, default=100, help="frames to fit a width to")
    parser.add_argument("--psf", choices=PSFS, action="append", help="default: all")
    args = parser.parse_args()
    print(f"{args.num} frames, {jax.devices()[0].device_kind}")
    print(
        "| PSF | width | told | mAP | count % | within 1 / 2 sigma, % | width off, % | frames/s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in args.psf or PSFS:
        psf = PSFS[name]()
        width = float(np.mean(psf.width))
        preset, made = frames_of(psf, args.num)
        known = dataclasses.replace(preset.known, psf=psf)
        some = np.asarray(made.frames)[: args.num_fit]
        guess = dataclasses.replace(known, psf=psf.widened(1.05))
        fitted = unmix(some, guess, estimate="map", options=Options(fit_psf=True)).known
        rows = {
            "right": known,
            "a Gaussian of its width": dataclasses.replace(known, psf=Gaussian(np.float32(width))),
            "its class, fitted": fitted,
        }
        for told, some_known in rows.items():
            unmix(made.frames, some_known)  # compiles
            start = time.perf_counter()
            answer = unmix(made.frames, some_known)
            speed = args.num / (time.perf_counter() - start)
            off = 100 * (float(np.mean(answer.sigma[0])) / width - 1)
            print(_row(name, width, told, answer, made.targets, off, f"{speed:.0f}"), flush=True)
        limit = bayes_limit(made.frames, known, count=made.targets.mask.sum(1))
        print(_row(name, width, "right, limit", limit, made.targets, 0.0, ""), flush=True)


def _row(
    name: str, width: float, told: str, answer: Any, truth: Any, off: float, speed: str
) -> str:
    report = evaluate(answer.targets, truth)
    within = " / ".join(f"{share:.1f}" for share in coverage(answer, truth))
    scores = f"{100 * report.cso.mean:.2f} | {100 * report.count_accuracy:.2f} | {within}"
    return f"| {name} | {width:.3f} | {told} | {scores} | {off:+.2f} | {speed} |"


if __name__ == "__main__":
    main()
