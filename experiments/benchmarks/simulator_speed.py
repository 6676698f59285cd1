"""Frames simulated per second: keys, targets, optics and sensor, jitted as one function.

Each repeat makes new frames from their numbers alone, as a training step does. Compile
time is left out; the figure is the median of the repeats.

Command:   python experiments/benchmarks/simulator_speed.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from dscsnet_jax.physics import scene


def simulation_seconds(preset: scene.Preset, batch: int, repeats: int) -> list[float]:
    """Wall times of simulating `batch` frames, the first (compiling) call left out."""

    @jax.jit
    def frames_of(index: jax.Array) -> scene.Scene:
        return scene.simulate(preset, scene.frame_keys(0, "train", index))

    times = []
    for repeat in range(repeats + 1):
        index = repeat * batch + jnp.arange(batch)
        start = time.perf_counter()
        jax.block_until_ready(frames_of(index))
        times.append(time.perf_counter() - start)
    return times[1:]


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="csist")
    parser.add_argument("--batch", type=int, default=8192, help="frames at once")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    times = simulation_seconds(scene.get_preset(args.preset), args.batch, args.repeats)
    print(
        f"simulate {args.preset}: {args.batch / statistics.median(times):,.0f} frames/s "
        f"(median of {args.repeats} x {args.batch} frames, {jax.devices()[0].device_kind})"
    )


if __name__ == "__main__":
    main()
