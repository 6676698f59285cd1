"""What a wrong PSF does to positions and counts, and what fitting its width brings back.

    python experiments/benchmarks/wrong_psf.py

Frames of `csist_noise` (8 bit, noise 5) whose PSF is narrower or wider than the one told
to `unmix`; then 100 of them with `fit_psf`.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import numpy as np

from dscsnet_jax.cli.simulate import simulated
from dscsnet_jax.estimation.unmix import Options, unmix
from dscsnet_jax.evaluation.report import evaluate
from dscsnet_jax.physics.scene import get_preset

TOLD = 0.5
FACTORS = (0.9, 0.95, 1.0, 1.05, 1.1)


def main() -> None:
    """Print a row for each true width."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="csist_noise")
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--num-fit", type=int, default=100)
    args = parser.parse_args()
    print(f"{args.preset}, told sigma {TOLD} px, {jax.devices()[0].device_kind}")
    print("true sigma | mAP  count %  RMSE px  unexplained % | fitted sigma  mAP after")
    for factor in FACTORS:
        preset = get_preset(args.preset, sigma=TOLD * factor)
        scene = simulated(preset, seed=0, split="test", num=args.num)
        frames, truth = np.asarray(scene.frames), scene.targets
        known = dataclasses.replace(preset.known, psf=TOLD)
        answer = unmix(frames, known, estimate="map")
        scores = evaluate(answer.targets, truth)
        some = frames[: args.num_fit]
        of_some = jax.tree.map(lambda a, n=args.num_fit: np.asarray(a)[:n], truth)
        fitted = unmix(some, known, estimate="map", options=Options(fit_psf=True))
        after = evaluate(fitted.targets, of_some)
        print(
            f"{TOLD * factor:10.3f} | {100 * scores.cso.mean:5.2f} "
            f"{100 * scores.count_accuracy:6.2f} {scores.matches.position_rmse:8.4f} "
            f"{100 * answer.unexplained.mean():8.1f}      | "
            f"{float(fitted.sigma[0].mean()):10.4f}  {100 * after.cso.mean:10.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
