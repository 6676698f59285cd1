"""Parameters of PSFs fitted without being told: do the stated errors hold, is there a bias?

    python experiments/benchmarks/psf_fit.py --sets 20 --num 200 --psf gaussian
    python experiments/benchmarks/psf_fit.py --sets 10 --num 200 --places joint

makes sets of csist scenes at noise 1, tells each fit a PSF that is off by some percent, and prints
of every set the fitted parameters with their errors, then of each parameter the mean, its standard
error, and the share within three stated errors of the truth.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

import dscsnet_jax as dj
from dscsnet_jax.physics.psf_coordinates import coordinates
from dscsnet_jax.physics.sensor import expose

NOISE = 1.0
PSFS = {  # the true one, and the first guess
    "gaussian": (dj.Gaussian(0.5), dj.Gaussian(0.515)),
    "two widths": (dj.Gaussian((0.45, 0.55)), dj.Gaussian((0.5, 0.5))),
    "rotated": (dj.rotated_gaussian((0.45, 0.6), 30.0), dj.rotated_gaussian((0.5, 0.58), 20.0)),
    "moffat": (dj.Moffat(1.18, 2.5), dj.Moffat(1.1, 3.0)),
    "airy": (
        dj.airy(1.05, obscuration=0.3, jitter=0.25),
        dj.airy(1.15, obscuration=0.3, jitter=0.2),
    ),
    "mixture": (
        dj.GaussianMixture(np.array([0.8, 0.2]), np.array([0.45, 1.0])),
        dj.GaussianMixture(np.array([0.7, 0.3]), np.array([0.5, 0.9])),
    ),
}


def main() -> None:
    """Print a line for each set and for each parameter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=20)
    parser.add_argument("--num", type=int, default=200, help="frames of a set")
    parser.add_argument("--psf", choices=PSFS, default="gaussian")
    parser.add_argument("--places", choices=("sequential", "joint"), default="sequential")
    args = parser.parse_args()
    true, guess = PSFS[args.psf]
    preset = dj.get_preset("csist_float", read_noise=NOISE)
    prior = dataclasses.replace(preset.known.prior, places=args.places)
    known = dataclasses.replace(preset.known, psf=guess, prior=prior)
    make = jax.jit(functools.partial(dj.simulate, preset))
    options = dj.Options(fit_psf=True)
    found, start = [], time.perf_counter()
    for number in range(args.sets):
        keys = dj.frame_keys(0, "val", number * args.num + np.arange(args.num))
        scene = make(keys, psf=true)
        joint = args.places == "joint"
        frames = placed_jointly(scene.targets, preset, true, number) if joint else scene.frames
        with_fit = dj.unmix(np.asarray(frames), known, estimate="map", options=options)
        parameters = with_fit.psf_parameters or {}
        found.append(list(parameters.values()))
        told = ", ".join(f"{n} {v:.5f} +- {s:.5f}" for n, (v, s) in parameters.items())
        print(f"{number}: {told}", flush=True)
    seconds = (time.perf_counter() - start) / args.sets
    free = coordinates(jax.tree.map(np.float32, true))
    truth = free.errors(np.eye(len(free.names)))
    print(f"{args.psf}, {args.sets} sets of {args.num} frames, {seconds:.0f} s each")
    for name, values in zip(truth, np.moveaxis(np.array(found), 1, 0), strict=True):
        off, std = values[:, 0] / truth[name][0] - 1, values[:, 1] / abs(truth[name][0])
        error = 100 * off.std(ddof=1) / len(off) ** 0.5
        within = 100 * np.mean(np.abs(off) < 3 * std)
        scatter, stated = 100 * off.std(ddof=1), 100 * np.median(std)
        print(
            f"{name}: bias {100 * off.mean():+.3f} +- {error:.3f} %, scatter {scatter:.3f} %, "
            f"stated {stated:.3f} %, within 3 stated errors {within:.0f} %"
        )


def placed_jointly(targets: dj.Targets, preset: dj.Preset, psf: Any, seed: int) -> np.ndarray:
    """Frames of the same counts and intensities with all targets of a cluster placed at once."""
    rng = np.random.default_rng(seed)
    cluster, mask = preset.cluster, np.asarray(targets.mask)
    low, high = cluster.extent
    pixel = np.floor(np.asarray(targets.position)[:, :1] - low)
    both = mask[:, :, None] & mask[:, None] & ~np.eye(mask.shape[1], dtype=bool)
    place = np.zeros((*mask.shape, 2))
    todo = np.arange(len(mask))
    while len(todo):
        place[todo] = rng.uniform(low, high, (len(todo), mask.shape[1], 2))
        apart = np.linalg.norm(place[todo, :, None] - place[todo, None], axis=-1)
        todo = todo[((apart < cluster.separation) & both[todo]).any((1, 2))]
    place = np.where(mask[..., None], pixel + place, 0).astype(np.float32)
    placed = dataclasses.replace(targets, position=place)
    light = dj.render(placed, frame_size=preset.frame_size, psf=psf)
    return np.asarray(expose(preset.sensor, jax.random.key(seed), light))


if __name__ == "__main__":
    main()
