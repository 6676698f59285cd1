"""ISTA-Net+: ISTA-Net whose transform works on the residual, in the space of features.

Iteration k, with an embedding `D` and a read-out `S` of one 3 x 3 convolution and a
transform `F` and a left inverse `G` of two each:

    r = x - step_k Phi^T (Phi x - y)
    x = r + S_k(G_k(soft(F_k(D_k(r)), theta_k)))

`G` inverts `F` on the embedded map: its error is `G(F(D(r))) - D(r)`. Kept of the
published network for this task (toolkit GrokCSO): 9 iterations, 32 features, convolutions
without bias, step and threshold free in sign. Its start is another, see `ConvConfig.start`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dscsnet_jax.unfolding.baselines.conv import (
    STEP,
    THRESHOLD,
    ConvBaseline,
    ConvConfig,
    residual_block,
    residual_sizes,
)
from dscsnet_jax.unfolding.baselines.convolution import draw_kernels
from dscsnet_jax.unfolding.baselines.published import Layout
from dscsnet_jax.unfolding.registry import register

LAYOUT = Layout(
    method="ista_net_plus",
    blocks={
        "step": "lambda_step",
        "threshold": "soft_thr",
        "embed": "conv_D",
        "forward1": "conv1_forward",
        "forward2": "conv2_forward",
        "backward1": "conv1_backward",
        "backward2": "conv2_backward",
        "readout": "conv_G",
    },
    sizes={"channels": "conv1_forward"},
)


@dataclasses.dataclass(frozen=True)
class IstaNetPlusConfig(ConvConfig):
    """Hyper-parameters of ISTA-Net+: those of `ConvConfig`."""


def block(p: dict[str, Any], r: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x = r + S(G(soft(F(D(r)), theta)))`, the learned part of an iteration.

    Args:
      p: its parameters: `threshold`, and the kernels `embed` of `D`, `forward1`,
        `forward2` of `F`, `backward1`, `backward2` of `G` and `readout` of `S`.
      r: (B, cN, cM) gradient step.

    Returns:
      `x` (B, cN, cM) and the error of the left inverse, (B, cN, cM, channels).
    """
    return residual_block({name: (value,) for name, value in p.items()}, r, p["threshold"])


@register("ista_net_plus")
@dataclasses.dataclass(frozen=True)
class IstaNetPlus(ConvBaseline):
    """ISTA-Net+ as an init/apply pair; weights run on frames of any size.

    Attributes:
      config: hyper-parameters.

    Example:
      >>> from dscsnet_jax.physics.optics import sensing_operator
      >>> op = sensing_operator(11, division=3, psf=0.5)
      >>> net = IstaNetPlus(IstaNetPlusConfig(iterations=2, channels=4))
      >>> params = net.init(jax.random.key(0), op)
      >>> net.apply(params, jnp.zeros((4, 11, 11)), op).x.shape
      (4, 33, 33)

    References:
      Zhang and Ghanem, ISTA-Net: Interpretable Optimization-Inspired Deep Network for Image
      Compressive Sensing, CVPR 2018.
    """

    config: IstaNetPlusConfig = IstaNetPlusConfig()
    layout: ClassVar[Layout] = LAYOUT

    def _draw(self, key: jax.Array) -> dict[str, Any]:
        scalars = {"step": jnp.asarray(STEP), "threshold": jnp.asarray(THRESHOLD)}
        return scalars | draw_kernels(key, residual_sizes(self.config.channels))

    def _block(self, p: Any, x: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
        return block(p, r)
