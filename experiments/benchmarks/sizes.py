"""Any division, any frame size: a few training steps at c = 3, 5, 7, and memory against N.

For each c a new network is trained for a few steps on csist frames; the loss is that of
one fixed batch before and after. For each N a network at c = 3 unmixes a batch of N x N
frames; the memory is what the compiled forward pass reserves for temporaries, per frame.
No matrix of N^2 x (cN)^2 entries is formed, so bytes per pixel should not grow with N,
once frames are larger than one block of attention (11 x 11 pixels, which needs no halo).

Command:   python experiments/benchmarks/sizes.py
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp

from dscsnet_jax.physics import scene
from dscsnet_jax.physics.optics import SensingOperator, sensing_operator
from dscsnet_jax.training.step import init_state, make_optimiser, make_step
from dscsnet_jax.unfolding.network import DSCSNet, NetworkConfig

DIVISIONS, SIDES = (3, 5, 7), (11, 22, 44, 64)


def operator_of(preset: scene.Preset) -> SensingOperator:
    """The sensing operator of a preset's frames."""
    return sensing_operator(
        preset.frame_size, division=preset.division, psf=jnp.array(preset.sigma)
    )


def losses_around_training(division: int, steps: int, batch: int) -> tuple[float, float]:
    """Loss of one fixed batch before and after a few steps on other frames."""
    preset = scene.get_preset("csist", division=division)
    network, operator = DSCSNet(NetworkConfig(division=division)), operator_of(preset)
    optimiser = make_optimiser(
        learning_rate=2e-3,
        warmup_steps=1,
        num_steps=max(steps, 2),
        weight_decay=1e-4,
        clip_norm=1.0,
        final_fraction=1.0,
    )
    step = jax.jit(make_step(network, preset, operator, optimiser, truth_width=0.3))
    state = init_state(network, operator, optimiser, seed=0)

    def frames(number: int) -> jax.Array:
        return scene.frame_keys(0, "train", number * batch + jnp.arange(batch))

    before = step(state, frames(0))[1]["loss"]
    for number in range(1, steps + 1):
        state, _ = step(state, frames(number))
    return float(before), float(step(state, frames(0))[1]["loss"])


def forward_bytes(frame_size: int, batch: int) -> int:
    """Run one forward pass and return the bytes its temporaries take, per frame."""
    preset = scene.get_preset("csist", frame_size=frame_size)
    network, operator = DSCSNet(NetworkConfig()), operator_of(preset)
    params = network.init(jax.random.key(0), operator)
    keys = scene.frame_keys(0, "test", jnp.arange(batch))
    y = jax.jit(scene.simulate, static_argnums=0)(preset, keys).frames
    forward = jax.jit(lambda params, y: network.apply(params, y, operator).x)
    compiled = forward.lower(params, y).compile()
    x = compiled(params, y)
    if x.shape != (batch, *operator.map_shape) or not bool(jnp.isfinite(x).all()):
        raise RuntimeError(f"N = {frame_size}: expected finite maps, got {x.shape}")
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError("this backend does not tell its memory")
    return memory.temp_size_in_bytes // batch


def main() -> None:
    """Print one line per division and per side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="training steps per division")
    parser.add_argument("--batch", type=int, default=32, help="frames at once")
    args = parser.parse_args()
    print(jax.devices()[0].device_kind)
    for division in DIVISIONS:
        before, after = losses_around_training(division, args.steps, args.batch)
        print(
            f"c = {division}: loss {before:.3f} -> {after:.3f} after "
            f"{args.steps} steps of {args.batch} frames"
        )
    sizes = {side: forward_bytes(side, args.batch) for side in SIDES}
    for side, size in sizes.items():
        print(
            f"N = {side:2d}: {size / 2**20:7.2f} MiB of temporaries per frame, "
            f"{size / side**2:,.0f} bytes per pixel"
        )
    small, large = SIDES[1], SIDES[-1]
    growth, area = sizes[large] / sizes[small], (large / small) ** 2
    print(f"N = {small} to {large}: memory x {growth:.1f}, N^2 x {area:.1f}, N^4 x {area**2:.1f}")


if __name__ == "__main__":
    main()
