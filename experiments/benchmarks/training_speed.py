"""Training frames per second of the packaged network's size, after compilation.

Run: python experiments/benchmarks/training_speed.py [--frame-size 11] [--batch-size 128]

One step simulates its frames, unmixes them, differentiates and updates: everything that
training does but for evaluation and checkpoints. All local devices are used.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from dscsnet_jax.physics.optics import sensing_operator
from dscsnet_jax.physics.scene import frame_keys, get_preset
from dscsnet_jax.training.config import default_config
from dscsnet_jax.training.parallel import data_parallel
from dscsnet_jax.training.step import Step, TrainState, init_state, make_optimiser, make_step
from dscsnet_jax.unfolding.network import DSCSNet, num_parameters

WARM_UP_STEPS = 2


def build(frame_size: int) -> tuple[Step, TrainState]:
    """The compiled step of a default run at a frame size, and its first state."""
    config = default_config()
    network = DSCSNet()
    preset = get_preset(config.scene.preset, frame_size=frame_size)
    operator = sensing_operator(frame_size, division=preset.division, sigma=preset.sigma)
    optimiser = make_optimiser(num_steps=config.train.num_steps, **config.optimiser.to_dict())
    step, _ = data_parallel(
        lambda axis: make_step(
            network,
            preset,
            operator,
            optimiser,
            truth_width=config.train.truth_width,
            axis_name=axis,
        ),
        jax.local_devices(),
    )
    return step, init_state(network, operator, optimiser, config.seed)


def run(step: Step, state: TrainState, batch_size: int, num_steps: int) -> tuple[TrainState, float]:
    """The state after some more steps, and the seconds they took."""
    start, done = time.perf_counter(), int(state.step)
    for number in range(done, done + num_steps):
        keys = frame_keys(0, "train", number * batch_size + jnp.arange(batch_size))
        state, _ = step(state, keys)
    jax.block_until_ready(state)
    return state, time.perf_counter() - start


def main() -> None:
    """Print the median over several repeats, and their range."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frame-size", type=int, default=11, help="detector pixels per side")
    parser.add_argument("--batch-size", type=int, default=128, help="frames a step")
    parser.add_argument("--steps", type=int, default=5, help="steps timed at once")
    parser.add_argument("--repeats", type=int, default=7, help="times they are timed")
    args = parser.parse_args()
    step, state = build(args.frame_size)
    size = num_parameters(state.params)
    state, first = run(step, state, args.batch_size, WARM_UP_STEPS)
    rates = []
    for _ in range(args.repeats):
        state, seconds = run(step, state, args.batch_size, args.steps)
        rates.append(args.steps * args.batch_size / seconds)
    device = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    frames = f"frames of {args.frame_size} x {args.frame_size}, batches of {args.batch_size}"
    print(f"{size} parameters, {frames}, {device}, jax {jax.__version__}")
    print(f"compilation and {WARM_UP_STEPS} steps: {first:.1f} s")
    print(
        f"{statistics.median(rates):.1f} frames/s (median of {args.repeats}; "
        f"{min(rates):.1f} to {max(rates):.1f})"
    )


if __name__ == "__main__":
    main()
