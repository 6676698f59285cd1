"""Frames unmixed per second: the whole of `unmix`, and the network's forward pass alone.

The frames lie in memory. The whole of `unmix` takes them as a NumPy array and answers
with NumPy arrays: checks, background, network, read-out, residual and flags. The forward
pass alone starts from one batch on the device and is jitted. Compile time is left out;
each figure is the median of the repeats.

Command:   python experiments/benchmarks/unmix_speed.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.estimation.unmix import Options, pretrained, unmix
from dscsnet_jax.io.weights import Weights
from dscsnet_jax.maps.network import network_of
from dscsnet_jax.physics import scene
from dscsnet_jax.physics.optics import sensing_operator


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of `work`, after one call that compiles."""
    jax.block_until_ready(work())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def forward_pass(weights: Weights, y: np.ndarray) -> Callable[[], jax.Array]:
    """The jitted network on one batch that already lies on the device."""
    network, geometry = network_of(weights), weights.metadata.geometry
    operator = sensing_operator(
        y.shape[1:], division=geometry.division, psf=jnp.array(geometry.sigma)
    )
    forward = jax.jit(lambda params, y: network.apply(params, y, operator).x)
    params, batch = jax.device_put((weights.params, y))
    return lambda: forward(params, batch)


def main() -> None:
    """Print one line per figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=4096, help="frames of the test split")
    parser.add_argument("--batch", type=int, default=256, help="frames at once")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    keys = scene.frame_keys(0, "test", jnp.arange(args.num))
    simulate = jax.jit(scene.simulate, static_argnums=0)
    frames = np.asarray(simulate(scene.get_preset("csist"), keys).frames)
    weights = pretrained("csist_c3")
    device = jax.devices()[0].device_kind
    whole = median_seconds(
        lambda: unmix(frames, method="grid", options=Options(weights, block=args.batch)).residual,
        args.repeats,
    )
    print(
        f"unmix, end to end: {len(frames) / whole:,.0f} frames/s (median of {args.repeats} x "
        f"{len(frames)} frames, batch {args.batch}, {device})"
    )
    batch = frames[: args.batch]
    forward = median_seconds(forward_pass(weights, batch), 4 * args.repeats)
    print(
        f"network forward alone: {len(batch) / forward:,.0f} frames/s (median of "
        f"{4 * args.repeats} x {len(batch)} frames, {device})"
    )


if __name__ == "__main__":
    main()
