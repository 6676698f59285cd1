"""How often points thrown into a unit square keep a distance: makes `inference/free_share.npy`.

    python experiments/free_share.py --out dscsnet_jax/inference/free_share.npy

Row `n` has, for distances 0, 0.02 .. 1, the natural logarithm of the probability that `n` points
keep it, by Monte Carlo: of the same throws for all, so that it falls smoothly. What no throw has
reached gets the logarithm of half a throw.
"""

from __future__ import annotations

import argparse

import numpy as np


def main() -> None:
    """Throw, count and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument("--throws", type=int, default=1 << 23)
    parser.add_argument("--most", type=int, default=33, help="points")
    parser.add_argument("--cells", type=int, default=50, help="of distances from 0 to 1")
    args = parser.parse_args()
    chunk = min(args.throws, 1 << 14)
    throws = args.throws // chunk * chunk
    rng = np.random.default_rng(0)
    distances = np.arange(args.cells + 1) / args.cells
    kept = np.zeros((args.most + 1, args.cells + 1))
    kept[:2] = throws
    for _ in range(throws // chunk):
        place = rng.uniform(size=(args.most, 2, chunk)).astype(np.float32)
        least = np.full(chunk, np.inf, np.float32)
        for n in range(1, args.most):
            apart = place[:n] - place[n]
            least = np.minimum(least, (apart**2).sum(1).min(0))
            kept[n + 1] += (least[:, None] >= distances**2).sum(0)
    table = np.log(np.maximum(kept, 0.5) / throws).astype(np.float32)
    np.save(args.out, table)
    print(f"{throws} throws: {args.out}, {table.shape}")


if __name__ == "__main__":
    main()
