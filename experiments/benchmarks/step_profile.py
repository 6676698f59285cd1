"""Where the milliseconds of DSCSNet's forward pass and training step go.

    python experiments/benchmarks/step_profile.py

Parts are timed as programs of their own, in turns: the simulation with its truth maps, the K
data steps (auxiliary, multiplier and reconstruction step), and the optimiser's update.
Attention is what the network takes more than one with scalar thresholds, the convolutions
are the rest. The rate of a large matrix product tells what the machine could do.

2 CPU cores (AVX2), jax 0.10.2, 2026-11-25, batches of 128:

    forward pass: 239.1 ms                 training step: 815.8 ms
      convolutions     159.6 ms    67%       convolutions     582.6 ms    71%
      attention         75.4 ms    32%       attention        260.7 ms    32%
      data steps         4.0 ms     2%       data steps        10.2 ms     1%
                                             simulation         2.2 ms     0%
                                             optimiser          2.5 ms     0%
    forward pass: 31 GFLOP/s; 2048 x 2048 matrix product: 98 GFLOP/s

What was done about it: pixels instead of cells carry the features (c^2 = 9 times less
to convolve); bias and mask of attention are one array, and the sum of its weights comes out
of the product with the values; `unmix` shows the network windows of 7 x 7 pixels around what
stands out, one block of them on each core (0.8 ms a frame instead of 2); the gradient by the
baselines' kernels is nine matrix products (1.3 to 1.8 times as fast as XLA's on 33 x 33
cells). What was tried and is not kept: the same gradient for DSCSNet (between 1.2 times as
fast and slower on 11 x 11 and 7 x 7 pixels), convolutions as one matrix product of copied
neighbours (4 to 6 times slower).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dscsnet_jax.physics.optics import SensingOperator, sensing_operator
from dscsnet_jax.physics.scene import frame_keys, get_preset, simulate
from dscsnet_jax.training.config import default_config
from dscsnet_jax.training.losses import training_loss
from dscsnet_jax.training.step import grid_truth, init_state, make_optimiser, make_step
from dscsnet_jax.unfolding import admm
from dscsnet_jax.unfolding.network import DSCSNet, NetworkConfig

MATRIX = 2048
Work = Callable[[], object]


def data_steps(y: jax.Array, operator: SensingOperator, iterations: int) -> jax.Array:
    """Maps of K iterations of classical ADMM: the unfolded iteration without a network."""
    return admm.admm_lasso(y, operator, num_iterations=iterations, unroll=True).x


def network_works(
    config: NetworkConfig, operator: SensingOperator, y: jax.Array, truth: jax.Array
) -> tuple[Work, Work, float]:
    """Forward pass and gradient of the loss, and the GFLOP of the forward pass."""
    network = DSCSNet(config)
    params = jax.jit(network.init)(jax.random.key(0), operator)

    def loss(params: Any, y: jax.Array, truth: jax.Array) -> jax.Array:
        scale = network.scale(y)
        answer = network.apply(params, y, operator, scale=scale)
        return training_loss(answer, truth, scale=scale[:, None, None], symmetry_weight=0.0)

    forward = jax.jit(lambda params, y: network.apply(params, y, operator).x).lower(params, y)
    program = forward.compile()
    gradient = jax.jit(jax.value_and_grad(loss))
    flops = program.cost_analysis()["flops"] / 1e9
    return lambda: program(params, y), lambda: gradient(params, y, truth), flops


def make_works(frame_size: int, batch: int) -> tuple[dict[str, Work], float]:
    """What is timed, by name, and the GFLOP of the forward pass."""
    config = default_config()
    preset = get_preset(config.scene.preset, frame_size=frame_size)
    operator = sensing_operator(frame_size, division=preset.division, psf=preset.sigma)
    width = config.train.truth_width
    keys = frame_keys(0, "train", jnp.arange(batch))

    @jax.jit
    def scenes(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        scene = simulate(preset, keys)
        return scene.frames, grid_truth(scene.targets, preset, width)

    y, truth = scenes(keys)
    full = NetworkConfig()
    forward, gradient, flops = network_works(full, operator, y, truth)
    plain = network_works(NetworkConfig(threshold="scalar"), operator, y, truth)
    steps = jax.jit(partial(data_steps, operator=operator, iterations=full.iterations))
    steps_slope = jax.jit(jax.grad(lambda y: (steps(y) ** 2).sum()))
    optimiser = make_optimiser(num_steps=config.train.num_steps, **config.optimiser.to_dict())
    network = DSCSNet(full)
    state = init_state(network, operator, optimiser, 0)
    update = jax.jit(optimiser.update)
    step = jax.jit(make_step(network, preset, operator, optimiser, truth_width=width))
    matrix = jnp.ones((MATRIX, MATRIX))
    product = jax.jit(jnp.matmul)
    return {
        "matrix": lambda: product(matrix, matrix),
        "simulation": lambda: scenes(keys),
        "forward": forward,
        "forward, scalar": plain[0],
        "forward, data": lambda: steps(y),
        "gradient": gradient,
        "gradient, scalar": plain[1],
        "gradient, data": lambda: steps_slope(y),
        "optimiser": lambda: update(state.params, state.optimiser, state.params),
        "step": lambda: step(state, keys),
    }, flops


def medians(works: dict[str, Work], turns: int) -> dict[str, float]:
    """Seconds of each, in turns."""
    for work in works.values():
        jax.block_until_ready(work())
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            start = time.perf_counter()
            jax.block_until_ready(work())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print milliseconds a batch, and shares."""
    parser = argparse.ArgumentParser(description="Profile of the forward pass and the step.")
    parser.add_argument("--frame-size", type=int, default=11, help="detector pixels per side")
    parser.add_argument("--batch", type=int, default=128, help="frames at once")
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    works, flops = make_works(args.frame_size, args.batch)
    t = medians(works, args.turns)
    size, device = args.frame_size, jax.local_devices()[0].device_kind
    print(f"{args.batch} frames of {size} x {size}, {device}, jax {jax.__version__}")
    for whole, more in (("forward", ()), ("gradient", ("simulation", "optimiser"))):
        parts = {
            "convolutions": t[f"{whole}, scalar"] - t[f"{whole}, data"],
            "attention": t[whole] - t[f"{whole}, scalar"],
            "data steps": t[f"{whole}, data"],
            **{name: t[name] for name in more},
        }
        total = t["step"] if more else t[whole]
        print(f"{'training step' if more else 'forward pass'}: {1000 * total:.1f} ms")
        for name, part in parts.items():
            print(f"  {name:14}{1000 * part:8.1f} ms {part / total:6.0%}")
    print(f"forward pass: {flops / t['forward']:.0f} GFLOP/s")
    print(f"{MATRIX} x {MATRIX} matrix product: {2 * MATRIX**3 / t['matrix'] / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
