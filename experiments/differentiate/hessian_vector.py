"""Hessian-vector products of a network's loss, and what recomputing iterations saves.

    python experiments/differentiate/hessian_vector.py

Forward over reverse: `H v = d/de grad L(params + e v)` at e = 0 costs a few gradients and never
forms H. It is compared with finite differences of the gradient, in float64, and with itself
without `remat`. `remat` makes the backward pass compute each iteration anew instead of
remembering its inside; the memory is what the compiler sets aside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from dscsnet_jax.physics.grid import grid_map
from dscsnet_jax.physics.optics import SensingOperator, render, sensing_operator
from dscsnet_jax.physics.targets import from_lists
from dscsnet_jax.unfolding.network import DSCSNet, NetworkConfig

SIDE, DIVISION, SIGMA = 7, 3, 0.5
SCENES = [
    [(2.9, 3.1, 240.0)],
    [(2.8, 2.6, 240.0), (3.3, 3.4, 225.0)],
]
Loss = Callable[[Any], jax.Array]


def problem() -> tuple[SensingOperator, jax.Array, jax.Array]:
    """The operator, frames (B, N, N) and their true maps (B, cN, cN), counts."""
    truth = from_lists(SCENES)
    y = render(truth, frame_size=SIDE, psf=SIGMA)
    x = grid_map(truth.position, truth.intensity, truth.mask, frame_size=SIDE, division=DIVISION)
    return sensing_operator(SIDE, division=DIVISION, psf=SIGMA), y, x


def map_loss(
    params: Any,
    network: DSCSNet,
    operator: SensingOperator,
    y: jax.Array,
    truth: jax.Array,
    *,
    remat: bool,
) -> jax.Array:
    """Mean squared error of the map, in units of the network's intensity scale."""
    # A loop: unrolled, the compiler could merge what is computed twice.
    x = network.apply(params, y, operator, unroll=1, remat=remat).x
    return (((x - truth) / network.config.intensity_scale) ** 2).mean()


def hessian_vector(loss: Loss, params: Any, vector: Any) -> Any:
    """`H v`, of the structure of `params`."""
    return jax.jvp(jax.grad(loss), (params,), (vector,))[1]


def by_differences(slope: Callable[[Any], Any], params: Any, vector: Any, step: float) -> Any:
    """`(g(params + step v) - g(params - step v)) / (2 step)` of the gradient `g`."""

    def moved(by: float) -> Any:
        return slope(jax.tree.map(lambda p, v: p + by * v, params, vector))

    return jax.tree.map(lambda a, b: (a - b) / (2 * step), moved(step), moved(-step))


def perturbed(params: Any) -> Any:
    """Parameters of which no bias is zero, in float64.

    With zero biases, as `init` makes them, the empty pixels of a frame sit on the kink of
    the activations, where there is no second derivative.
    """
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: np.asarray(p) + 0.1 * rng.normal(size=p.shape), params)


def direction(params: Any) -> Any:
    """A random direction of length 1 with the structure of `params`."""
    rng = np.random.default_rng(1)
    vector = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
    length = sum((v**2).sum() for v in jax.tree.leaves(vector)) ** 0.5
    return jax.tree.map(lambda v: v / length, vector)


def distance(a: Any, b: Any) -> float:
    """`||a - b|| / ||b||` over all leaves."""

    def square(tree: Any) -> float:
        return sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(tree))

    return (square(jax.tree.map(lambda x, y: x - y, a, b)) / square(b)) ** 0.5


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Memory that a compiled function needs besides its arguments and answer."""
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    """Print the agreement with differences, and memory with and without `remat`."""
    operator, y, truth = problem()
    for iterations in (4, 16):
        network = DSCSNet(NetworkConfig(iterations=iterations, channels=16))
        params = perturbed(network.init(jax.random.key(0), operator))
        vector = direction(params)
        losses = [
            partial(map_loss, network=network, operator=operator, y=y, truth=truth, remat=remat)
            for remat in (True, False)
        ]
        products = [
            jax.jit(partial(hessian_vector, loss)).lower(params, vector).compile()
            for loss in losses
        ]
        slope = jax.jit(jax.grad(losses[1]))
        spared, plain = (product(params, vector) for product in products)
        memory = [temporary_bytes(product) / 2**20 for product in products]
        differences = by_differences(slope, params, vector, 1e-5)
        print(f"K = {iterations}: relative distance of H v")
        print(f"  to finite differences {distance(spared, differences):.1e}")
        print(f"  to that without remat {distance(spared, plain):.1e}")
        print(f"  memory {memory[0]:.1f} MiB with remat, {memory[1]:.1f} MiB without")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
