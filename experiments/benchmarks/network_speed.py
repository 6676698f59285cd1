"""Frames per second of networks, forward and in training, as ratios within one run.

    python experiments/benchmarks/network_speed.py --methods dscsnet dista_net

Methods take turns, so that whatever else the machine does hits all of them; a ratio is that
of one turn, and shown with its range over the turns. Forward is the jitted network on frames
that lie on the device, training the whole compiled step (simulation, loss, gradient, AdamW).
`dscsnet` has the architecture of the packaged weights; speed does not depend on values.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dscsnet_jax.estimation.unmix import pretrained
from dscsnet_jax.maps.network import network_of
from dscsnet_jax.physics.optics import sensing_operator
from dscsnet_jax.physics.scene import frame_keys, get_preset, simulate
from dscsnet_jax.training.config import default_config
from dscsnet_jax.training.parallel import data_parallel
from dscsnet_jax.training.step import init_state, make_optimiser, make_step
from dscsnet_jax.unfolding.network import num_parameters
from dscsnet_jax.unfolding.registry import Network, make_network, network_names

Work = Callable[[], object]
WARM_UP = 2  # the first call compiles


def works(network: Network, frame_size: int, batch: int) -> dict[str, Work]:
    """One forward pass, and one training step, of a batch."""
    config = default_config()
    preset = get_preset(config.scene.preset, frame_size=frame_size)
    operator = sensing_operator(frame_size, division=preset.division, psf=preset.sigma)
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
    state = init_state(network, operator, optimiser, config.seed)
    keys = frame_keys(config.seed, "train", jnp.arange(batch))
    y = jax.jit(simulate, static_argnums=0)(preset, keys).frames
    # The state's arrays are donated to the step.
    params = jax.tree.map(jnp.copy, state.params)
    infer = jax.jit(lambda params, y: network.apply(params, y, operator).x)

    def train() -> object:
        nonlocal state
        state, metrics = step(state, keys)
        return metrics

    return {"forward": lambda: infer(params, y), "training": train}


def seconds(work: Work, times: int) -> float:
    """Wall time of some calls."""
    start = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(work())
    return time.perf_counter() - start


def spread(values: list[float], digits: int) -> str:
    """Median, and range."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    """Print frames per second, and the ratio of the first method to each of the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = network_names()
    parser.add_argument("--methods", nargs="+", default=["dscsnet", "dista_net"], choices=known)
    parser.add_argument("--frame-size", type=int, default=11, help="detector pixels per side")
    parser.add_argument("--batch", type=int, default=64, help="frames at once")
    parser.add_argument("--calls", type=int, default=5, help="of the first method, in each turn")
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    device = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    size = args.frame_size
    print(f"frames of {size} x {size}, batches of {args.batch}, {device}, jax {jax.__version__}")
    first, *_ = args.methods
    networks = {name: make_network(name) for name in args.methods}
    if "dscsnet" in networks:
        networks["dscsnet"] = network_of(pretrained())
    made = {name: works(network, size, args.batch) for name, network in networks.items()}
    operator = sensing_operator(size, division=3, psf=0.5)
    for name, network in networks.items():
        shapes = jax.eval_shape(network.init, jax.random.key(0), operator)
        print(f"{name}: {num_parameters(shapes):,} parameters")
    for kind in ("forward", "training"):
        rates: dict[str, list[float]] = {name: [] for name in args.methods}
        for name in args.methods:
            seconds(made[name][kind], WARM_UP)
        for _ in range(args.turns):
            for name in args.methods:
                calls = args.calls if name == first else 1
                rates[name].append(calls * args.batch / seconds(made[name][kind], calls))
        for name, values in rates.items():
            ratios = [a / b for a, b in zip(rates[first], values, strict=True)]
            against = "" if name == first else f"; {first} is {spread(ratios, 1)} times as fast"
            print(f"{kind:9}{name:14}{spread(values, 1)} frames/s{against}", flush=True)


if __name__ == "__main__":
    main()
