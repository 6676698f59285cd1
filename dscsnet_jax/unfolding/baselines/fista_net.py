"""FISTA-Net: unfolded FISTA, one block for all iterations, scalars on a schedule.

Iteration k = 0 .. K-1, with an embedding `D`, a read-out `S`, a transform `F` and a left
inverse `G` as in ISTA-Net+, all with bias and the same in every iteration:

    r = v - mu_k Phi^T (Phi v - y)
    x' = relu(r + S(G(soft(F(D(r)), theta_k))))
    v = x' + rho_k (x' - x),   x = x'

    mu_k = softplus(w_mu k + b_mu),   theta_k = softplus(w_theta k + b_theta)
    rho_k = 1 - softplus(b_rho) / softplus(w_rho k + b_rho)

`rho_0 = 0`, and that of the last iteration is not used: `w_rho` and `b_rho` have an effect
from three iterations on. The published network for this task (toolkit GrokCSO) uses the
first and the last of the four convolutions of its transform and of the inverse; the other
two of each, 36,992 of its 74,599 parameters, are stored, counted and never run. Here they
do not exist. Its start is another, see `ConvConfig.start`. Its training adds penalties
(l1 of the error of the map and of the thresholded features) that are no part of the network.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dscsnet_jax.physics.optics import SensingOperator
from dscsnet_jax.unfolding import admm
from dscsnet_jax.unfolding.baselines.conv import (
    ConvBaseline,
    ConvConfig,
    data_gradient_step,
    record,
    residual_block,
    residual_sizes,
)
from dscsnet_jax.unfolding.baselines.convolution import draw_kernels
from dscsnet_jax.unfolding.baselines.published import Layout
from dscsnet_jax.unfolding.registry import register

_CONVOLUTIONS = {
    "embed": "conv_D",
    "forward1": "conv1_forward",
    "forward2": "conv4_forward",
    "backward1": "conv1_backward",
    "backward2": "conv4_backward",
    "readout": "conv_G",
}
_SCHEDULE = {
    "step_slope": ("w_mu", -0.2),
    "step_offset": ("b_mu", 0.1),
    "threshold_slope": ("w_theta", -0.5),
    "threshold_offset": ("b_theta", -2.0),
    "momentum_slope": ("w_rho", 0.5),
    "momentum_offset": ("b_rho", 0.0),
}
_ENDS = {"kernel": "weight", "bias": "bias"}
LAYOUT = Layout(
    method="fista_net",
    blocks={f"{o}/{e}": f"{t}.{_ENDS[e]}" for o, t in _CONVOLUTIONS.items() for e in _ENDS},
    outside={f"schedule/{ours}": theirs for ours, (theirs, _) in _SCHEDULE.items()},
    sizes={"channels": "conv1_forward.weight"},
    unused=frozenset(
        f"conv{n}_{way}.{end}"
        for n in (2, 3)
        for way in ("forward", "backward")
        for end in ("weight", "bias")
    ),
    shared=True,
)


@dataclasses.dataclass(frozen=True)
class FistaNetConfig(ConvConfig):
    """Hyper-parameters of FISTA-Net: those of `ConvConfig`, with 7 iterations."""

    iterations: int = 7


def block(p: dict[str, Any], r: jax.Array, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x = relu(r + S(G(soft(F(D(r)), theta))))`, the learned part of an iteration.

    Args:
      p: its parameters: `kernel` and `bias` of `embed` (`D`), `forward1`, `forward2`
        (`F`), `backward1`, `backward2` (`G`) and `readout` (`S`).
      r: (B, cN, cM) gradient step.
      threshold: `theta`, positive.

    Returns:
      `x` (B, cN, cM) and the error of the left inverse, (B, cN, cM, channels).
    """
    layers = {name: (layer["kernel"], layer["bias"]) for name, layer in p.items()}
    x, error = residual_block(layers, r, threshold)
    return nn.relu(x), error


def schedule(s: dict[str, jax.Array], k: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Step `mu_k`, threshold `theta_k` and momentum `rho_k`; see the module's docstring.

    Example:
      >>> start = {name: jnp.asarray(value) for name, (_, value) in _SCHEDULE.items()}
      >>> [round(float(v), 3) for v in schedule(start, jnp.asarray(2.0))]
      [0.554, 0.049, 0.472]
    """
    mu = nn.softplus(s["step_slope"] * k + s["step_offset"])
    theta = nn.softplus(s["threshold_slope"] * k + s["threshold_offset"])
    rho = nn.softplus(s["momentum_slope"] * k + s["momentum_offset"])
    return mu, theta, 1 - nn.softplus(s["momentum_offset"]) / rho


@register("fista_net")
@dataclasses.dataclass(frozen=True)
class FistaNet(ConvBaseline):
    """FISTA-Net as an init/apply pair; weights run on frames of any size.

    Attributes:
      config: hyper-parameters.

    Example:
      >>> from dscsnet_jax.physics.optics import sensing_operator
      >>> op = sensing_operator(11, division=3, psf=0.5)
      >>> net = FistaNet(FistaNetConfig(iterations=3, channels=4))
      >>> params = net.init(jax.random.key(0), op)
      >>> net.apply(params, jnp.zeros((4, 11, 11)), op).x.shape
      (4, 33, 33)

    References:
      Xiang, Dong and Yang, FISTA-Net: Learning a Fast Iterative Shrinkage Thresholding
      Network for Inverse Problems in Imaging, IEEE Transactions on Medical Imaging 2021.
    """

    config: FistaNetConfig = FistaNetConfig()
    layout: ClassVar[Layout] = LAYOUT

    def init(self, key: jax.Array, operator: SensingOperator) -> dict[str, Any]:
        """Draw parameters: one block, on a leading axis of length 1, and the schedule."""
        numbers = {name: jnp.float32(value) for name, (_, value) in _SCHEDULE.items()}
        return super().init(key, operator) | {"schedule": numbers}

    @property
    def _copies(self) -> int:
        return 1

    def _draw(self, key: jax.Array) -> dict[str, Any]:
        kernels = draw_kernels(key, residual_sizes(self.config.channels))
        return {
            name: {"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1])}
            for name, kernel in kernels.items()
        }

    def _unmix(
        self,
        params: dict[str, Any],
        y: jax.Array,
        operator: SensingOperator,
        *,
        unroll: int | bool,
        remat: bool,
        trace: bool,
    ) -> tuple[jax.Array, Any]:
        p = jax.tree.map(lambda a: a[0], params["iterations"])

        def iteration(
            state: tuple[jax.Array, jax.Array], k: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], Any]:
            x, v = state
            mu, theta, rho = schedule(params["schedule"], k)
            following, error = block(p, data_gradient_step(v, y, operator, mu), theta)
            v = following + rho * (following - x)
            return (following, v), record(following, error)

        start = self._start(params, y, operator)
        numbers = jnp.arange(self.config.iterations, dtype=y.dtype)
        (x, _), seen = admm.unfold(
            iteration, (start, start), numbers, unroll=unroll, remat=remat, trace=trace
        )
        return x, seen
