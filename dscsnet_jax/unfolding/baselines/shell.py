"""Shell: what all baselines share around their iterations: checks and scaling."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dscsnet_jax.physics.optics import SensingOperator
from dscsnet_jax.unfolding import admm
from dscsnet_jax.unfolding.admm import Unfolded

INTENSITY_SCALE = 250.0
"""Default counts that a baseline sees as 1: the brightest target of the benchmark."""


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Base of the published networks; a subclass has `init` and `_unmix`.

    Attributes:
      config: its hyper-parameters, with `division` and `intensity_scale` (counts seen as
        1); with `frame_size` (N, M or one number) if its parameters fit one size only.
    """

    config: Any

    def scale(self, y: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Counts (B,) that the network sees as 1: the same for all frames."""
        return jnp.full(y.shape[:1], self.config.intensity_scale, jnp.result_type(y, float))

    def apply(
        self,
        params: dict[str, Any],
        y: jax.Array,
        operator: SensingOperator,
        *,
        noise: jax.Array | None = None,
        scale: jax.Array | None = None,
        unroll: int | bool | None = None,
        remat: bool = False,
        trace: bool = False,
    ) -> Unfolded:
        """Unmix frames into sub-pixel maps; see `registry.Network.apply`.

        The noise level is not used: the published networks have no input for it.

        Raises:
          ValueError: if frames, operator and network do not fit together.
        """
        self._check(operator)
        if y.ndim != 3:
            raise ValueError(f"frames must have shape (B, N, M), got {y.shape}")
        admm.check_frame_shape(y, operator)
        scale = self.scale(y) if scale is None else scale
        # Mixed types would promote the map between two iterations, which a scan refuses.
        params, y, scale = admm.cast((params, y, scale), admm.precision(y, operator))
        scale = scale[:, None, None]
        unroll = admm.default_unroll() if unroll is None else unroll
        x, seen = self._unmix(params, y / scale, operator, unroll=unroll, remat=remat, trace=trace)
        if trace:
            seen = {k: v if k == "symmetry" else v * scale[None] for k, v in seen.items()}
        return Unfolded(x=x * scale, trace=seen if trace else None)

    def init(self, key: jax.Array, operator: SensingOperator) -> dict[str, Any]:
        """Draw parameters; those of the iterations are stacked along a leading K axis."""
        raise NotImplementedError

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
        """Maps (B, cN, cM) of scaled frames, and the trace."""
        raise NotImplementedError

    def _check(self, operator: SensingOperator) -> None:
        """Raise ValueError for an operator that the parameters do not fit."""
        if operator.division != self.config.division:
            raise ValueError(
                f"the network divides pixels by {self.config.division}, "
                f"the operator by {operator.division}"
            )
        size = getattr(self.config, "frame_size", None)
        if size is not None and operator.frame_shape != (size, size):
            raise ValueError(
                f"the network is for frames of {size} x {size} pixels only, the operator's have "
                f"{operator.frame_shape[0]} x {operator.frame_shape[1]}"
            )
