"""LISTA: the iterative soft thresholding algorithm with learned matrices.

ISTA's iteration `x <- soft(x + Phi^T (y - Phi x) / L, lam / L)`, with `L = ||Phi||^2`, reads

    x <- soft(W x + B y, theta),   W = I - Phi^T Phi / L,   B = Phi^T / L,   theta = lam / L

and LISTA learns `W`, `B` and `theta`, here one set per iteration, one threshold per cell.
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
class LISTAConfig(dense.DenseConfig):
    """Hyper-parameters of LISTA; see `DenseConfig`."""


def lista_block(p: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """One iteration: `soft(W x + B y, max(theta, 0))`.

    Args:
      p: `W` (n, n), `B` (n, m) and `theta` (n,).
      x: (B, n) maps as vectors.
      y: (B, m) frames as vectors, in the unit of `x`.

    Returns:
      (B, n) maps.

    Example:
      >>> p = {"W": jnp.eye(2), "B": jnp.ones((2, 1)), "theta": jnp.array([1.0, 2.0])}
      >>> lista_block(p, jnp.array([[0.5, 0.5]]), jnp.array([[3.0]])).tolist()
      [[2.5, 1.5]]
    """
    z = dense.matvec(p["W"], x) + dense.matvec(p["B"], y)
    return admm.soft_threshold(z, jnp.maximum(p["theta"], 0)[None])


@register("lista")
@dataclasses.dataclass(frozen=True)
class LISTA(dense.DenseBaseline):
    """LISTA as an init/apply pair; untrained it is ISTA.

    The published network for this task starts with `B = Q`, a matrix fitted to the
    training set, and `W = I - Q Phi`.

    Attributes:
      config: hyper-parameters.

    Example:
      >>> from dscsnet_jax.physics.optics import sensing_operator
      >>> op = sensing_operator(5, division=3, psf=0.5)
      >>> net = LISTA(LISTAConfig(frame_size=5, iterations=2))
      >>> params = net.init(jax.random.key(0), op)
      >>> net.apply(params, jnp.zeros((4, 5, 5)), op).x.shape
      (4, 15, 15)

    References:
      Gregor and LeCun, Learning fast approximations of sparse coding, ICML 2010.
    """

    config: LISTAConfig = LISTAConfig()

    def _first(self, operator: SensingOperator) -> dict[str, jax.Array]:
        B = dense.scaled_adjoint(operator)
        theta = self.config.lam / self.config.intensity_scale / operator.norm() ** 2
        return {"W": dense.remainder(operator), "B": B, "theta": jnp.full(len(B), theta)}

    def _iteration(
        self,
        p: dict[str, jax.Array],
        state: tuple[jax.Array, ...],
        y: jax.Array,
        operator: SensingOperator,
    ) -> tuple[jax.Array, ...]:
        return (lista_block(p, state[0], dense.as_vectors(y)),)
