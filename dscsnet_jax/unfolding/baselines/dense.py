"""Dense: what the methods with one learned matrix per iteration share.

They see the map and the frame as vectors, row by row, and `Phi` as a matrix of N^2 x (cN)^2
entries: so their parameters fit one size of frames only.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dscsnet_jax.physics.optics import SensingOperator
from dscsnet_jax.unfolding import admm
from dscsnet_jax.unfolding.baselines.shell import INTENSITY_SCALE, Baseline

START_RHO = 0.1
"""Penalty of the first map, `x = Phi^T (Phi Phi^T + rho I)^-1 y`."""

_LEAST = {"division": 1, "frame_size": 1, "iterations": 1, "lam": 0}
_highest = partial(jnp.einsum, precision="highest")


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """Hyper-parameters that all dense methods have.

    Attributes:
      division: cells per pixel side, `c`.
      frame_size: pixels per side of the only frames the parameters fit, `N`.
      iterations: unfolded iterations, `K`.
      intensity_scale: counts that the network sees as 1.
      lam: l1 weight, counts, that the first thresholds are made of.

    Raises:
      ValueError: if a value is too small.
    """

    division: int = 3
    frame_size: int = 11
    iterations: int = 16
    intensity_scale: float = INTENSITY_SCALE
    lam: float = 0.4

    def __post_init__(self) -> None:
        for field, least in _LEAST.items():
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}, got {getattr(self, field)}")
        if not self.intensity_scale > 0:
            raise ValueError(f"intensity_scale must be positive, got {self.intensity_scale}")


class DenseBaseline(Baseline):
    """Base of the dense methods; a subclass has `_first` and `_iteration`.

    The published networks start from `Q y`, with `Q` fitted to pairs of maps and frames by
    least squares; this one starts from the same estimate for white maps (`START_RHO`), for
    which the operator is enough.
    """

    def init(self, key: jax.Array, operator: SensingOperator) -> dict[str, Any]:
        """Parameters of the classical method, the same for all iterations.

        Args:
          key: not used, as nothing is drawn at random.
          operator: sensing operator of the frames to unmix.

        Returns:
          `{"iterations": ...}`, arrays stacked along a leading K axis.

        Raises:
          ValueError: if division or size of the operator are not the network's.
        """
        self._check(operator)
        first = admm.cast(self._first(operator), jnp.float32)
        copies = self.config.iterations
        return {"iterations": {name: jnp.stack([a] * copies) for name, a in first.items()}}

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
        def step(state: tuple[jax.Array, ...], p: Any) -> tuple[tuple[jax.Array, ...], Any]:
            state = self._iteration(p, state, y, operator)
            return state, {"x": as_maps(state[0], operator)} if trace else {}

        last, seen = admm.unfold(
            step,
            self._start(y, operator),
            self._scanned(params),
            unroll=unroll,
            remat=remat,
            trace=trace,
        )
        return as_maps(last[0], operator), seen

    def _first(self, operator: SensingOperator) -> dict[str, jax.Array]:
        """Parameters of one iteration of the classical method."""
        raise NotImplementedError

    def _iteration(
        self,
        p: dict[str, jax.Array],
        state: tuple[jax.Array, ...],
        y: jax.Array,
        operator: SensingOperator,
    ) -> tuple[jax.Array, ...]:
        """One unfolded iteration; the state's first entry is the map (B, c^2 N^2)."""
        raise NotImplementedError

    def _start(self, y: jax.Array, operator: SensingOperator) -> tuple[jax.Array, ...]:
        """State before the first iteration."""
        return (as_vectors(admm.zero_start(y, operator, START_RHO).x),)

    def _scanned(self, params: dict[str, Any]) -> Any:
        """What the iterations need one by one, with a leading K axis."""
        return params["iterations"]


def as_vectors(a: jax.Array) -> jax.Array:
    """(B, rows, cols) -> (B, rows * cols), row by row.

    Example:
      >>> as_vectors(jnp.array([[[1, 2], [3, 4]]])).tolist()
      [[1, 2, 3, 4]]
    """
    return a.reshape(a.shape[0], -1)


def as_maps(x: jax.Array, operator: SensingOperator) -> jax.Array:
    """(B, c^2 N M) -> (B, cN, cM), the inverse of `as_vectors` on maps."""
    return x.reshape(x.shape[0], *operator.map_shape)


def residual(x: jax.Array, y: jax.Array, operator: SensingOperator) -> jax.Array:
    """`y - Phi x` of maps (B, c^2 N M) and frames (B, N, M), as vectors (B, N M)."""
    return as_vectors(y - operator.apply(as_maps(x, operator)))


def matvec(matrix: jax.Array, v: jax.Array) -> jax.Array:
    """`A v` for each vector of a batch: (m, n), (B, n) -> (B, m).

    Example:
      >>> matvec(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])).tolist()
      [[11.0]]
    """
    return _highest("ij,bj->bi", matrix, v)


def scaled_adjoint(operator: SensingOperator) -> jax.Array:
    """`Phi^T / L` (c^2 N M, N M) with `L = ||Phi||^2`: a gradient step of length 1/L."""
    return operator.matrix().T / operator.norm() ** 2


def remainder(operator: SensingOperator) -> jax.Array:
    """`I - Phi^T Phi / L` (c^2 N M, c^2 N M): what a step of length 1/L leaves of the map."""
    phi = operator.matrix()
    unit = jnp.eye(phi.shape[1], dtype=phi.dtype)
    return unit - _highest("ij,ik->jk", phi, phi) / operator.norm() ** 2
