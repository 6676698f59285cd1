"""ISTA-Net: unfolded ISTA with a learned transform and its left inverse.

Iteration k, with a transform `F` and a left inverse `G` of two 3 x 3 convolutions each:

    r = x - step_k Phi^T (Phi x - y)
    x = G_k(soft(F_k(r), theta_k))

Facts of the published network for this task (toolkit GrokCSO) that are kept: 9
iterations, 32 features, convolutions without bias at the resolution of the cells, step
and threshold free in sign. Its start is another, see `ConvConfig.start`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dscsnet_jax.unfolding.admm import soft_threshold
from dscsnet_jax.unfolding.baselines.conv import (
    STEP,
    THRESHOLD,
    ConvBaseline,
    ConvConfig,
    transform_sizes,
)
from dscsnet_jax.unfolding.baselines.convolution import draw_kernels, pair
from dscsnet_jax.unfolding.baselines.published import Layout
from dscsnet_jax.unfolding.registry import register

LAYOUT = Layout(
    method="ista_net",
    blocks={
        "step": "lambda_step",
        "threshold": "soft_thr",
        "forward1": "conv1_forward",
        "forward2": "conv2_forward",
        "backward1": "conv1_backward",
        "backward2": "conv2_backward",
    },
    sizes={"channels": "conv1_forward"},
)


@dataclasses.dataclass(frozen=True)
class IstaNetConfig(ConvConfig):
    """Hyper-parameters of ISTA-Net: those of `ConvConfig`."""


def block(p: dict[str, Any], r: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x = G(soft(F(r), theta))`, the learned part of an iteration.

    Args:
      p: its parameters: `threshold`, and the kernels `forward1`, `forward2` of `F` and
        `backward1`, `backward2` of `G`.
      r: (B, cN, cM) gradient step.

    Returns:
      `x` (B, cN, cM) and the error of the left inverse `G(F(r)) - r` (B, cN, cM).
    """
    f = pair(r[..., None], (p["forward1"],), (p["forward2"],))

    def inverse(f: jax.Array) -> jax.Array:
        return pair(f, (p["backward1"],), (p["backward2"],))[..., 0]

    return inverse(soft_threshold(f, p["threshold"])), inverse(f) - r


@register("ista_net")
@dataclasses.dataclass(frozen=True)
class IstaNet(ConvBaseline):
    """ISTA-Net as an init/apply pair; weights run on frames of any size.

    Attributes:
      config: hyper-parameters.

    Example:
      >>> from dscsnet_jax.physics.optics import sensing_operator
      >>> op = sensing_operator(11, division=3, psf=0.5)
      >>> net = IstaNet(IstaNetConfig(iterations=2, channels=4))
      >>> params = net.init(jax.random.key(0), op)
      >>> net.apply(params, jnp.zeros((4, 11, 11)), op).x.shape
      (4, 33, 33)

    References:
      Zhang and Ghanem, ISTA-Net: Interpretable Optimization-Inspired Deep Network for Image
      Compressive Sensing, CVPR 2018.
    """

    config: IstaNetConfig = IstaNetConfig()
    layout: ClassVar[Layout] = LAYOUT

    def _draw(self, key: jax.Array) -> dict[str, Any]:
        scalars = {"step": jnp.asarray(STEP), "threshold": jnp.asarray(THRESHOLD)}
        return scalars | draw_kernels(key, transform_sizes(self.config.channels))

    def _block(self, p: Any, x: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
        return block(p, r)
