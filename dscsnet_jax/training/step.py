"""Step: simulate, unmix, differentiate, update: one pure function of state and indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dscsnet_jax.physics import grid
from dscsnet_jax.physics.optics import SensingOperator, sensing_operator
from dscsnet_jax.physics.scene import Preset, Scene, simulate
from dscsnet_jax.physics.targets import Targets
from dscsnet_jax.training.losses import training_loss
from dscsnet_jax.unfolding.admm import Unfolded
from dscsnet_jax.unfolding.registry import Network

# Splitting the bare key of a seed would give the keys of the data's splits (`SPLITS`) again.
_PARAMETER_STREAM = 2**31


class TrainState(NamedTuple):
    """Everything that training carries from step to step.

    Attributes:
      step: () int32, steps done.
      params: parameters of the network.
      optimiser: state of the optimiser.
    """

    step: jax.Array
    params: Any
    optimiser: Any


Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]


def make_optimiser(
    *,
    learning_rate: float,
    warmup_steps: int,
    num_steps: int,
    weight_decay: float,
    clip_norm: float,
    final_fraction: float,
) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm, with linear warm-up and cosine decay.

    Args:
      learning_rate: peak rate.
      warmup_steps: steps from 0 to the peak.
      num_steps: steps of the whole schedule.
      weight_decay: decoupled decay of AdamW.
      clip_norm: largest global norm of the gradient.
      final_fraction: rate at the end as a share of the peak.

    Returns:
      An Optax gradient transformation.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps, num_steps, learning_rate * final_fraction
    )
    return optax.chain(
        optax.clip_by_global_norm(clip_norm), optax.adamw(schedule, weight_decay=weight_decay)
    )


def init_state(
    network: Network,
    operator: SensingOperator,
    optimiser: optax.GradientTransformation,
    seed: int,
    params: Any = None,
) -> TrainState:
    """First state: given parameters, or new ones drawn from `seed`, independent of its data."""
    if params is None:
        key = jax.random.fold_in(jax.random.key(seed), _PARAMETER_STREAM)
        params = jax.jit(network.init)(key, operator)
    # A weakly typed leaf would become a strong one in the first step and compile a second.
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimiser.init(params))


def make_step(
    network: Network,
    preset: Preset,
    operator: SensingOperator,
    optimiser: optax.GradientTransformation,
    *,
    truth_width: float = 0.0,
    symmetry_weight: float = 0.0,
    remat: bool = False,
    axis_name: str | None = None,
) -> Step:
    """Build the training step `(state, keys of frames) -> (state, metrics)`.

    The frames are simulated inside the step from their keys (see `scene.frame_keys`), so
    nothing is read from the host, any device can make any frame, and runs of other seeds
    share the compiled program.

    Args:
      network: what is trained.
      preset: recipe of the frames.
      operator: sensing operator of the preset; where it varies the PSF, each frame has its own.
      optimiser: see `make_optimiser`.
      truth_width: see `grid_truth`.
      symmetry_weight: see `losses.training_loss`.
      remat: recompute iterations in the backward pass.
      axis_name: mapped axis over which gradients and metrics are averaged; None on a
        single device.

    Returns:
      The step; metrics are `loss` and `gradient_norm`, scalars.
    """

    def loss_of(params: Any, scene: Scene, truth: jax.Array) -> jax.Array:
        options = {"remat": remat, "trace": bool(symmetry_weight)}
        answer = apply_to_scene(network, params, scene, preset, operator, **options)
        y = scene.frames - scene.level[:, None, None]
        scale = network.scale(y, scene.noise)[:, None, None]
        return training_loss(answer, truth, scale=scale, symmetry_weight=symmetry_weight)

    def step(state: TrainState, keys: jax.Array) -> tuple[TrainState, Metrics]:
        scene = simulate(preset, keys)
        truth = grid_truth(scene.targets, preset, truth_width)
        loss, gradient = jax.value_and_grad(loss_of)(state.params, scene, truth)
        if axis_name is not None:
            loss, gradient = jax.lax.pmean((loss, gradient), axis_name)
        updates, optimiser_state = optimiser.update(gradient, state.optimiser, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, params, optimiser_state), metrics

    return step


def apply_to_scene(
    network: Network,
    params: Any,
    scene: Scene,
    preset: Preset,
    operator: SensingOperator,
    **options: Any,
) -> Unfolded:
    """Maps of simulated frames: as `network.apply`, each frame by the optics it was seen with.

    Args:
      network: the network.
      params: its parameters.
      scene: B frames.
      preset: their recipe.
      operator: sensing operator of the preset; where it varies the PSF, its size and division.
      **options: further ones of `network.apply`.

    Returns:
      `Unfolded`.
    """
    y = scene.frames - scene.level[:, None, None]
    if preset.variation is None:
        return network.apply(params, y, operator, noise=scene.noise, **options)

    def one(y: jax.Array, noise: jax.Array, sigma: jax.Array) -> tuple[jax.Array, Any]:
        own = sensing_operator(operator.frame_shape, division=operator.division, psf=sigma)
        answer = network.apply(params, y[None], own, noise=noise[None], **options)
        return answer.x[0], jax.tree.map(lambda a: a[:, 0], answer.trace)

    return Unfolded(*jax.vmap(one, out_axes=(0, 1))(y, scene.noise, scene.sigma))


def grid_truth(targets: Targets, preset: Preset, width: float = 0.0) -> jax.Array:
    """Map that the network shall answer with for a preset's targets.

    Args:
      targets: the truth, `Targets` of (B, K, ...).
      preset: recipe of the frames.
      width: cells by which a target's intensity is shared around its true position
        (see `grid.grid_map`). The nearest cell alone (0, the field's choice) throws
        the position within the cell away: even its perfect answer scores 48.9.

    Returns:
      (B, cN, cN) counts.
    """
    return grid.grid_map(
        targets.position,
        targets.intensity,
        targets.mask,
        frame_size=preset.frame_size,
        division=preset.division,
        width=width,
    )
