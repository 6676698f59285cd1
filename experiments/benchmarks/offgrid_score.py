"""Scores of the methods off the grid, beside the Bayes limit, on test frames of a preset.

    python experiments/benchmarks/offgrid_score.py --preset csist
    python experiments/benchmarks/offgrid_score.py --preset csist_float --read-noise 2
    python experiments/benchmarks/offgrid_score.py --num 1500 --known told learned nothing

prints, per method and estimate: CSO-mAP by intensity and by confidence, frames with the right
count, share of position errors within one and two reported standard deviations, targets that have
not converged, median position error of frames with two targets, and frames per second. The limit's
row is that of the first frames, its time with compiling.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import jax
import numpy as np

from dscsnet_jax.cli.scoring import ranked
from dscsnet_jax.cli.simulate import simulated
from dscsnet_jax.estimation.calibrate import calibrate
from dscsnet_jax.estimation.limit import bayes_limit
from dscsnet_jax.estimation.result import UnmixResult
from dscsnet_jax.estimation.unmix import unmix
from dscsnet_jax.evaluation.matching import matched
from dscsnet_jax.evaluation.report import evaluate
from dscsnet_jax.inference.known import Known
from dscsnet_jax.physics.scene import get_preset
from dscsnet_jax.physics.targets import Targets

SEED = 0
KNOWN = "told", "learned", "nothing"


def main() -> None:
    """Simulate, unmix with each method, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="csist")
    parser.add_argument("--read-noise", type=float)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--methods", nargs="+", default=["dscsnet", "grid", "greedy"])
    parser.add_argument("--estimates", nargs="+", default=["map", "mean"])
    parser.add_argument("--known", nargs="+", choices=KNOWN, default=["told"])
    parser.add_argument("--num-limit", type=int, default=500, help="frames of the limit's row")
    args = parser.parse_args()
    changes = {} if args.read_noise is None else {"read_noise": args.read_noise}
    preset = get_preset(args.preset, **changes)
    scene = simulated(preset, seed=SEED, split="test", num=args.num)
    truth, frames = scene.targets, np.asarray(scene.frames)
    if preset.sensor.quantised and preset.sensor.saturation == np.iinfo(np.uint8).max:
        frames = frames.astype(np.uint8)  # as files hold them: the full well is seen
    print(f"{preset.name} {changes or ''}: {args.num} test frames, {jax.devices()[0].device_kind}")
    head = "mAP", "AP05", "AP25", "ranked", "count %", "in 1s %", "in 2s %", "not conv %"
    print(f"{'method':<22}" + "".join(f"{name:>12}" for name in (*head, "median2 px", "fps")))
    for what in args.known:
        known = preset.known if what == "told" else Known()
        if what == "learned":
            start = time.perf_counter()
            taught = calibrate(frames)
            known = taught.known
            print(f"{taught.report()}\n{time.perf_counter() - start:.0f} s with compiling")
        for method in args.methods:
            for estimate in ["map"] if method == "grid" else args.estimates:
                run = partial(unmix, frames, known, method=method, estimate=estimate)
                run()  # compiles for all shapes of windows that occur
                start = time.perf_counter()
                answer = run()
                name = f"{method} {estimate} {what if what != 'told' else ''}"
                show(name, answer, truth, time.perf_counter() - start)
    if args.num_limit:
        some = jax.tree.map(lambda a: np.asarray(a)[: args.num_limit], truth)
        start = time.perf_counter()
        best = bayes_limit(frames[: args.num_limit], preset.known, count=some.count)
        show(f"limit, {args.num_limit}", best, some, time.perf_counter() - start)


def show(name: str, answer: UnmixResult, truth: Targets, seconds: float) -> None:
    """One row of the table."""
    scores = evaluate(answer.targets, truth, confidence=ranked([answer]))
    within = coverage(answer, truth)
    two = np.flatnonzero(np.asarray(truth.count) == 2)
    of_two = [jax.tree.map(lambda a: np.asarray(a)[two], t) for t in (answer.targets, truth)]
    median = evaluate(*of_two).matches.position_median if len(two) else np.nan
    values = scores.as_dict()
    cells = (
        f"{values['mAP']:12.2f}",
        f"{values['AP05']:12.2f}",
        f"{values['AP25']:12.2f}",
        f"{values.get('mAP_ranked', np.nan):12.2f}",
        f"{100 * scores.count_accuracy:12.2f}",
        f"{within[0]:12.1f}",
        f"{within[1]:12.1f}",
        f"{100 * answer.not_converged.sum() / max(scores.detections, 1):12.1f}",
        f"{median:12.4f}",
        f"{len(truth.count) / seconds:12.0f}",
    )
    print(f"{name:<22}" + "".join(cells), flush=True)


def coverage(answer: UnmixResult, truth: Targets) -> tuple[float, float]:
    """Percent of row and col errors of matched targets within 1 and 2 reported sigmas."""
    pairs = matched(answer.targets, truth, np.inf)
    error = np.abs(
        np.asarray(answer.targets.position)[pairs.frame, pairs.detection]
        - np.asarray(truth.position)[pairs.frame, pairs.truth]
    )
    ratio = error / answer.std[pairs.frame, pairs.detection, :2]
    return 100 * float((ratio <= 1).mean()), 100 * float((ratio <= 2).mean())


if __name__ == "__main__":
    main()
