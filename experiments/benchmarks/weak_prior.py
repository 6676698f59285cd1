"""What `unmix` makes of frames of which it is told nothing: faint neighbours, singles, noise.

    python experiments/benchmarks/weak_prior.py
    python experiments/benchmarks/weak_prior.py --prior none

prints, of frames of 11 x 11 pixels, how many have which number of targets. Clusters as the presets
draw them are in `offgrid_score.py --known nothing`.
"""

from __future__ import annotations

import argparse

import numpy as np

import dscsnet_jax as dj

SIGMA = 0.5
Scenes = list[list[tuple[float, float, float]]]


def main() -> None:
    """Simulate, unmix, print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--prior", choices=["weak", "none"], default="weak")
    args = parser.parse_args()
    rng = np.random.default_rng(5)
    none = dj.scene_prior(intensity=dj.AnyIntensity())
    known = dj.Known(prior=none) if args.prior == "none" else dj.Known()

    def show(name: str, scenes: Scenes, noise: float) -> None:
        y = np.asarray(dj.render(dj.from_lists(scenes, 2), frame_size=11, psf=SIGMA))
        answer = dj.unmix(y + rng.normal(0, noise, y.shape), known, estimate="map")
        share = np.bincount(np.asarray(answer.targets.count)) / len(scenes)
        found = ", ".join(f"{n}: {100 * p:.1f}" for n, p in enumerate(share) if p)
        print(f"{name:<42} noise {noise:<5} % of frames by targets: {found}", flush=True)

    pairs: Scenes = []
    for _ in range(args.num):
        place, angle = rng.uniform(4.5, 5.5, 2), rng.uniform(0, 2 * np.pi)
        faint = place + 1.2 * np.array([np.cos(angle), np.sin(angle)])
        pairs.append([(*place, 200.0), (*faint, 20.0)])
    show("200 counts, 20 counts 1.2 px from them", pairs, 1.0)
    for noise in (0.3, 2.0, 10.0):
        singles: Scenes = [[(*rng.uniform(4.5, 5.5, 2), 200.0)] for _ in range(args.num)]
        show("one target of 200 counts", singles, noise)
    show("nothing", [[] for _ in range(10 * args.num)], 2.0)


if __name__ == "__main__":
    main()
