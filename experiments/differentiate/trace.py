"""What happens in every iteration: objective, sparsity, distance to the solution.

    python experiments/differentiate/trace.py

Three ways to see inside. Classical ADMM, composed of its pure steps: `unfold` stacks whatever
the step records, here the three numbers themselves, so no map is kept. The solvers stop at a
tolerance: `vmap` over `max_iterations` answers as after 0, 1, .. iterations, all in one
program (its work grows as the square of their number). A network records its maps itself
(`trace=True`). It is not the lasso that it solves: with iterations its maps leave the lasso's
solution for the truth.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.estimation.unmix import pretrained
from dscsnet_jax.maps.network import network_of
from dscsnet_jax.physics.grid import grid_map
from dscsnet_jax.physics.optics import SensingOperator, render, sensing_operator
from dscsnet_jax.physics.targets import from_lists
from dscsnet_jax.unfolding import admm
from dscsnet_jax.unfolding.admm import Iterate
from dscsnet_jax.unfolding.registry import Network
from dscsnet_jax.unfolding.solvers import solve_lasso

SIDE, DIVISION, SIGMA, NOISE, LAM = 7, 3, 0.5, 2.0, 10.0
SCENES = [
    [(2.9, 3.1, 240.0)],
    [(2.8, 2.6, 240.0), (3.3, 3.4, 225.0)],
]


class Measures(NamedTuple):
    """Of maps (..., cN, cN), each (...,).

    Attributes:
      objective: `1/2 ||Phi x - y||^2 + lam ||x||_1`, squared counts.
      sparsity: cells that are not zero.
      distance: `||x - solution|| / ||solution||`.
    """

    objective: jax.Array
    sparsity: jax.Array
    distance: jax.Array


def measure(
    x: jax.Array, y: jax.Array, operator: SensingOperator, lam: float, solution: jax.Array
) -> Measures:
    """The three numbers of maps (B, cN, cN)."""
    misfit = ((operator.apply(x) - y) ** 2).sum((-2, -1)) / 2
    away = jnp.linalg.norm(x - solution, axis=(-2, -1))
    return Measures(
        objective=misfit + lam * jnp.abs(x).sum((-2, -1)),
        sparsity=(x != 0).sum((-2, -1)),
        distance=away / jnp.linalg.norm(solution, axis=(-2, -1)),
    )


def trace_admm(
    y: jax.Array,
    operator: SensingOperator,
    lam: float,
    solution: jax.Array,
    *,
    num_iterations: int,
    rho: float = 0.1,
    eta: float = 1.6,
) -> Measures:
    """`Measures` (K, B) of the sparse variable in K iterations of classical ADMM."""

    def step(iterate: Iterate, _: Any) -> tuple[Iterate, Measures]:
        iterate, _residuals = admm.lasso_step(iterate, y, operator, rho=rho, lam=lam, eta=eta)
        return iterate, measure(iterate.z, y, operator, lam, solution)

    start = admm.zero_start(y, operator, rho)
    return admm.unfold(step, start, jnp.arange(num_iterations), trace=True)[1]


def trace_solver(
    y: jax.Array,
    operator: SensingOperator,
    lam: float,
    solution: jax.Array,
    *,
    num_iterations: int,
    method: str = "fista",
) -> Measures:
    """`Measures` (K, B) after each of 1 .. K iterations of a solver."""

    def after(most: jax.Array) -> Measures:
        x = solve_lasso(y, operator, lam=lam, method=method, tolerance=0.0, max_iterations=most).x
        return measure(x, y, operator, lam, solution)

    return jax.vmap(after)(1 + jnp.arange(num_iterations))


def trace_network(
    network: Network,
    params: Any,
    y: jax.Array,
    operator: SensingOperator,
    lam: float,
    solution: jax.Array,
    *,
    noise: jax.Array | None = None,
) -> Measures:
    """`Measures` (K, B) of the maps of a network's K iterations."""
    maps = network.apply(params, y, operator, noise=noise, trace=True).trace["x"]
    return jax.vmap(lambda x: measure(x, y, operator, lam, solution))(maps)


def show(title: str, trace: Measures) -> None:
    """Print a trace's means over the frames, at 1, 2, 4, .. iterations."""
    length = len(trace.objective)
    print(f"{title}\n    k  objective  cells  distance")
    for k in sorted({*(2**p for p in range(length.bit_length())), length}):
        row = [float(a[k - 1].mean()) for a in trace]
        print(f"{k:5d}{row[0]:11.1f}{row[1]:7.1f}{row[2]:10.4f}")


def main() -> None:
    """Print the traces of ADMM, FISTA and the pretrained network on the same frames."""
    operator, truth = sensing_operator(SIDE, division=DIVISION, psf=SIGMA), from_lists(SCENES)
    y = render(truth, frame_size=SIDE, psf=SIGMA)
    y = y + NOISE * np.random.default_rng(0).normal(size=y.shape).astype(y.dtype)
    solution = solve_lasso(y, operator, lam=LAM, max_iterations=50_000).x
    args = (y, operator, LAM, solution)
    show("ADMM", jax.jit(lambda: trace_admm(*args, num_iterations=256))())
    show("FISTA", jax.jit(lambda: trace_solver(*args, num_iterations=256))())
    weights = pretrained()
    network, noise = network_of(weights), jnp.full(len(y), NOISE)
    cells = grid_map(
        truth.position, truth.intensity, truth.mask, frame_size=SIDE, division=DIVISION
    )
    for name, goal in {"the lasso's solution": solution, "the true cells": cells}.items():
        seen = trace_network(network, weights.params, y, operator, LAM, goal, noise=noise)
        show(f"pretrained network, distance to {name}", seen)


if __name__ == "__main__":
    main()
