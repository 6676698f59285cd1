"""LAMP: approximate message passing with learned matrices.

From the map `x` and the corrected residual `v` (zero at first) of the iteration before,

    v <- y - Phi x + (||x||_0 / m) v             residual with Onsager's correction
    x <- soft(x + B v, lam ||v||_2 / sqrt(m))    threshold in units of the residual's size

for `m` pixels. LAMP learns `B` and `lam`, here one set per iteration, one `lam` per cell.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dscsnet_jax.physics.optics import SensingOperator
from dscsnet_jax.unfolding import admm
from dscsnet_jax.unfolding.baselines import dense
from dscsnet_jax.unfolding.registry import register


@dataclasses.dataclass(frozen=True)
class LAMPConfig(dense.DenseConfig):
    """Hyper-parameters of LAMP; see `DenseConfig`.

    Attributes:
      lam: first thresholds as a multiple of the residual's root mean square.
    """


def lamp_block(
    p: dict[str, jax.Array], x: jax.Array, v: jax.Array, residual: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One iteration: the two lines of the module's docstring.

    Args:
      p: `B` (n, m) and `lam` (n,); negative `lam` count as 0.
      x: (B, n) maps as vectors.
      v: (B, m) corrected residuals of the iteration before.
      residual: (B, m) `y - Phi x`.

    Returns:
      `x` (B, n) and `v` (B, m).

    Example:
      >>> p = {"B": jnp.ones((2, 1)), "lam": jnp.array([0.5, 0.0])}
      >>> x, v = lamp_block(p, jnp.array([[0.0, 1.0]]), jnp.ones((1, 1)), jnp.ones((1, 1)))
      >>> x.tolist(), v.tolist()
      ([[1.0, 3.0]], [[2.0]])
    """
    # The number of non-zeros has no derivative wherever it has one: none is followed.
    onsager = (x != 0).sum(-1, keepdims=True, dtype=v.dtype) / v.shape[-1]
    v = residual + onsager * v
    theta = jnp.maximum(p["lam"], 0)[None] * _root_mean_square(v)
    return admm.soft_threshold(x + dense.matvec(p["B"], v), theta), v


@register("lamp")
@dataclasses.dataclass(frozen=True)
class LAMP(dense.DenseBaseline):
    """LAMP as an init/apply pair.

    Untrained it is approximate message passing damped by `1 / L`, `L = ||Phi||^2`, as the
    published network for this task is: `B = Phi^T / L`, since with neighbouring cells as
    alike as these `B = Phi^T` diverges.

    Attributes:
      config: hyper-parameters.

    Example:
      >>> from dscsnet_jax.physics.optics import sensing_operator
      >>> op = sensing_operator(5, division=3, psf=0.5)
      >>> net = LAMP(LAMPConfig(frame_size=5, iterations=2))
      >>> params = net.init(jax.random.key(0), op)
      >>> net.apply(params, jnp.zeros((4, 5, 5)), op).x.shape
      (4, 15, 15)

    References:
      Borgerding, Schniter and Rangan, AMP-inspired deep networks for sparse linear
      inverse problems, IEEE Transactions on Signal Processing, 2017.
    """

    config: LAMPConfig = LAMPConfig()

    def _first(self, operator: SensingOperator) -> dict[str, jax.Array]:
        B = dense.scaled_adjoint(operator)
        return {"B": B, "lam": jnp.full(len(B), self.config.lam)}

    def _start(self, y: jax.Array, operator: SensingOperator) -> tuple[jax.Array, ...]:
        return (*super()._start(y, operator), jnp.zeros_like(dense.as_vectors(y)))

    def _iteration(
        self,
        p: dict[str, jax.Array],
        state: tuple[jax.Array, ...],
        y: jax.Array,
        operator: SensingOperator,
    ) -> tuple[jax.Array, ...]:
        x, v = state
        return lamp_block(p, x, v, dense.residual(x, y, operator))


def _root_mean_square(v: jax.Array) -> jax.Array:
    """`||v||_2 / sqrt(m)`: (B, m) -> (B, 1), with derivative 0 where it is 0."""
    square = (v**2).mean(-1, keepdims=True)
    positive = square > 0
    # The root's infinite slope at 0 would make NaN of the gradient of an empty frame.
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
