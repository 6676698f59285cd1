"""SRCNN: a peer from image super-resolution that knows no optics.

    x = C3 * relu(C2 * relu(C1 * u + b1) + b2) + b3,   u = the frame, enlarged by cubics

with kernels of 9 x 9, 1 x 1 (or what `middle_kernel` says) and 5 x 5 cells.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dscsnet_jax.physics.optics import SensingOperator
from dscsnet_jax.unfolding.baselines.shell import INTENSITY_SCALE, Baseline
from dscsnet_jax.unfolding.registry import register

_OUTER_KERNELS = (9, 5)


@dataclasses.dataclass(frozen=True)
class SRCNNConfig:
    """Hyper-parameters of SRCNN.

    Attributes:
      division: cells per pixel side, `c`.
      channels: features of the first layer, even; the second has half as many.
      middle_kernel: side of the second layer's kernels, cells, odd: 1 for the paper's
        9-1-5 network, 5 for its 9-5-5.
      intensity_scale: counts that the network sees as 1.

    Raises:
      ValueError: if a value is too small, or a kernel has no middle cell.
    """

    division: int = 3
    channels: int = 64
    middle_kernel: int = 1
    intensity_scale: float = INTENSITY_SCALE

    def __post_init__(self) -> None:
        for field, least in {"division": 1, "channels": 2, "middle_kernel": 1}.items():
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}, got {getattr(self, field)}")
        if self.middle_kernel % 2 == 0:
            raise ValueError(f"middle_kernel must be odd, got {self.middle_kernel}")
        if self.channels % 2:
            raise ValueError(f"channels must be even, got {self.channels}")
        if not self.intensity_scale > 0:
            raise ValueError(f"intensity_scale must be positive, got {self.intensity_scale}")


class Layers(nn.Module):
    """The three convolutions; borders are padded with zeros, so that the size is kept."""

    config: SRCNNConfig

    @nn.compact
    def __call__(self, u: jax.Array) -> jax.Array:
        """Enlarged frames (B, cN, cM) -> maps (B, cN, cM)."""
        first, last = _OUTER_KERNELS
        middle = self.config.middle_kernel
        features = nn.relu(_conv(self.config.channels, first, "extract")(u[..., None]))
        features = nn.relu(_conv(self.config.channels // 2, middle, "map")(features))
        return _conv(1, last, "rebuild")(features)[..., 0]


def enlarge(y: jax.Array, division: int) -> jax.Array:
    """Values at the centres of the cells, between those of the pixels, by Keys' cubics.

    Args:
      y: (B, N, M) frames.
      division: cells per pixel side, `c`.

    Returns:
      (B, cN, cM); a straight slope is kept exactly, but for the border.

    Example:
      >>> y = jnp.broadcast_to(jnp.arange(5.0), (1, 5, 5))
      >>> [round(float(v), 3) for v in enlarge(y, 3)[0, 7, 6:9]]
      [1.667, 2.0, 2.333]
    """
    batch, rows, cols = y.shape
    return jax.image.resize(y, (batch, division * rows, division * cols), "cubic")


@register("srcnn")
@dataclasses.dataclass(frozen=True)
class SRCNN(Baseline):
    """SRCNN as an init/apply pair; weights run on frames of any size.

    It has no iterations: the trace holds its answer as the only one. The network scored in
    the field for this task has kernels of 3 x 3 throughout.

    Attributes:
      config: hyper-parameters.

    Example:
      >>> from dscsnet_jax.physics.optics import sensing_operator
      >>> op = sensing_operator(5, division=3, psf=0.5)
      >>> net = SRCNN(SRCNNConfig(channels=4))
      >>> params = net.init(jax.random.key(0), op)
      >>> net.apply(params, jnp.zeros((4, 5, 5)), op).x.shape
      (4, 15, 15)

    References:
      Dong et al., Learning a deep convolutional network for image super-resolution, ECCV 2014.
    """

    config: SRCNNConfig = SRCNNConfig()

    def init(self, key: jax.Array, operator: SensingOperator) -> dict[str, Any]:
        """Draw parameters of the three layers.

        Raises:
          ValueError: if the operator's division is not the network's.
        """
        self._check(operator)
        u = jnp.zeros((1, *operator.map_shape))
        return dict(Layers(self.config).init(key, u)["params"])

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
        layers = Layers(self.config).apply
        run = jax.checkpoint(layers) if remat else layers
        x: Any = run({"params": params}, enlarge(y, self.config.division))
        return x, {"x": x[None]} if trace else None


def _conv(features: int, side: int, name: str) -> nn.Conv:
    return nn.Conv(features, (side, side), name=name)
