"""A whole path of the lasso, and an ablation of ADMM, each by one `vmap` in one program.

    python experiments/differentiate/lambda_grid.py

`solve_lasso` over a grid of `lam`: objective, cells that are not zero and CSO-mAP of the
read-out, per `lam`. Then classical ADMM after a fixed number of iterations over its
multiplier step `eta`. With 0 the multiplier is off (half-quadratic splitting), and the
threshold `lam / rho`, which it would make up for, leaves nothing.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.evaluation.metrics import cso_map
from dscsnet_jax.maps.readout import peak_centroids
from dscsnet_jax.physics.optics import SensingOperator, render, sensing_operator
from dscsnet_jax.physics.targets import Targets, from_lists
from dscsnet_jax.unfolding.admm import admm_lasso
from dscsnet_jax.unfolding.solvers import LassoSolution, solve_lasso

SIDE, DIVISION, SIGMA, NOISE = 7, 3, 0.5, 2.0
SCENES = [
    [(2.9, 3.1, 240.0)],
    [(2.8, 2.6, 240.0), (3.3, 3.4, 225.0)],
    [(3.6, 2.2, 230.0), (2.4, 3.5, 246.0)],
    [(2.3, 2.4, 221.0), (3.5, 2.9, 238.0), (2.6, 3.8, 249.0)],
]
_peaks = jax.jit(partial(peak_centroids, division=DIVISION))


def frames(seed: int = 0) -> jax.Array:
    """(B, N, N) noisy frames of `SCENES`."""
    clean = render(from_lists(SCENES), frame_size=SIDE, psf=SIGMA)
    return clean + NOISE * np.random.default_rng(seed).normal(size=clean.shape).astype(clean.dtype)


def lasso_path(lams: jax.Array, y: jax.Array, operator: SensingOperator) -> LassoSolution:
    """Solutions for each of L values of `lam`: every field has the leading axes (L, B)."""
    return jax.vmap(lambda lam: solve_lasso(y, operator, lam=lam))(lams)


def multiplier_path(
    etas: jax.Array, y: jax.Array, operator: SensingOperator, lam: float, num_iterations: int = 200
) -> jax.Array:
    """ADMM's maps (E, B, cN, cN) after `num_iterations` with each of E multiplier steps."""
    return jax.vmap(
        lambda eta: admm_lasso(y, operator, lam=lam, eta=eta, num_iterations=num_iterations).x
    )(etas)


def sparsity(x: jax.Array) -> jax.Array:
    """Number of cells that are not zero, (...,)."""
    return (x != 0).sum((-2, -1))


def score(x: jax.Array, truth: Targets) -> float:
    """CSO-mAP (percent) of the peaks of maps (B, cN, cN)."""
    return cso_map(_peaks(x).targets, truth).as_dict()["mAP"]


def main() -> None:
    """Print both tables: means over the frames."""
    operator = sensing_operator(SIDE, division=DIVISION, psf=SIGMA)
    y, truth = frames(), from_lists(SCENES)
    lams = jnp.array([1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0])
    path = jax.jit(lasso_path)(lams, y, operator)
    print("  lam  objective  cells  CSO-mAP  iterations  converged")
    for k, lam in enumerate(lams):
        print(
            f"{lam:5.0f}{path.objective[k].mean():11.1f}{sparsity(path.x[k]).mean():7.1f}"
            f"{score(path.x[k], truth):9.1f}{path.iterations[k].mean():12.0f}"
            f"{path.converged[k].mean():11.0%}"
        )
    etas, chosen = jnp.array([0.0, 0.5, 1.0, 1.6]), 3
    solution = path.x[chosen]
    maps = jax.jit(multiplier_path)(etas, y, operator, lams[chosen])
    print(f"  eta  distance to the solution of lam = {lams[chosen]:.0f}  cells  CSO-mAP")
    for eta, x in zip(etas, maps, strict=True):
        distance = jnp.linalg.norm(x - solution) / jnp.linalg.norm(solution)
        print(f"{eta:5.1f}{distance:37.4f}{sparsity(x).mean():7.1f}{score(x, truth):9.1f}")


if __name__ == "__main__":
    main()
