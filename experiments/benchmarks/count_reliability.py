"""Is a count as often right as `count_probability` says?

    python experiments/benchmarks/count_reliability.py --preset csist_wide --read-noise 1
    python experiments/benchmarks/count_reliability.py --known learned --preset csist_noise

prints, for every number of targets of every frame, in bins of the probability that was told: how
many there are, the mean of what was told, how often it was right, the difference with its standard
error, and whether a bin of 300 and more is off by over 3 points and 2 standard errors.
"""

from __future__ import annotations

import argparse

import jax
import numpy as np

from dscsnet_jax.cli.simulate import simulated
from dscsnet_jax.estimation.calibrate import calibrate
from dscsnet_jax.estimation.unmix import unmix
from dscsnet_jax.inference.known import Known
from dscsnet_jax.physics.scene import get_preset

SEED = 0
_TEACH = 1500  # frames that a calibration is given
_BINS = np.array([0.0, 0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.0])
_ENOUGH, _OFF = 300, 0.03


def main() -> None:
    """Simulate, unmix, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="csist_wide")
    parser.add_argument("--read-noise", type=float)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--known", choices=("told", "learned", "nothing"), default="told")
    args = parser.parse_args()
    changes = {} if args.read_noise is None else {"read_noise": args.read_noise}
    preset = get_preset(args.preset, **changes)
    scene = simulated(preset, seed=SEED, split="test", num=args.num)
    frames, count = np.asarray(scene.frames), np.asarray(scene.targets.count)
    known = preset.known if args.known == "told" else Known()
    if args.known == "learned":
        others = simulated(preset, seed=SEED, split="val", num=_TEACH)
        known = calibrate(np.asarray(others.frames)).known
    told = unmix(frames, known, estimate="map").count_probability
    right = np.minimum(count, told.shape[1] - 1)[:, None] == np.arange(told.shape[1])
    print(f"{preset.name} {changes or ''}, {args.known}: {args.num} test frames, "
          f"{jax.devices()[0].device_kind}")  # fmt: skip
    print(f"{'told':>12}{'number':>10}{'mean':>10}{'right':>10}{'off':>10}{'std error':>10}")
    index = np.clip(np.searchsorted(_BINS, told, side="right") - 1, 0, len(_BINS) - 2)
    for number in range(len(_BINS) - 1):
        chosen = index == number
        size = int(chosen.sum())
        if not size:
            continue
        mean, share = told[chosen].mean(), right[chosen].mean()
        error = (mean * (1 - mean) / size) ** 0.5
        far = size >= _ENOUGH and abs(share - mean) > _OFF + 2 * error
        low, high = _BINS[number : number + 2]
        print(f"{low:5.3f}-{high:5.3f}{size:10d}{mean:10.3f}{share:10.3f}{share - mean:10.3f}"
              f"{error:10.4f}{'  off' if far else ''}")  # fmt: skip


if __name__ == "__main__":
    main()
