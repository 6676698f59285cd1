"""LIHT: iterative hard thresholding with learned matrices.

Iterative hard thresholding for `1/2 ||Phi x - y||^2 + lam ||x||_0`, with `L = ||Phi||^2`, is

    x <- hard(W x + B y, theta),  W = I - Phi^T Phi / L,  B = Phi^T / L,  theta = sqrt(2 lam / L)

and LIHT learns `W`, `B` and `theta`. The step of `hard` has no slope, so that nothing could
move `theta`: the paper trains with a steep ramp in its place, and so do we.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dscsnet_jax.physics.optics import SensingOperator
from dscsnet_jax.unfolding.baselines import dense
from dscsnet_jax.unfolding.registry import register


@dataclasses.dataclass(frozen=True)
class LIHTConfig(dense.DenseConfig):
    """Hyper-parameters of LIHT; see `DenseConfig`.

    Attributes:
      lam: l0 weight, counts squared, that the first thresholds are made of.
      ramp: width of the threshold's ramp as a share of the threshold, in (0, 1].
      compat: threshold with a step, as the published network for this task does: its
        thresholds get no gradient and stay as they are.

    Raises:
      ValueError: if a value is too small, or the ramp too wide.
    """

    ramp: float = 0.2
    compat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ramp <= 1:
            raise ValueError(f"ramp must be in (0, 1], got {self.ramp}")


def hard_threshold(v: jax.Array, theta: jax.Array, ramp: float = 0.0) -> jax.Array:
    """Keep what is larger than the threshold: `v` where `|v| > theta`, else 0.

    With a ramp `s` there is a straight line from 0 at `|v| = (1 - s) theta` to `theta`
    (HELU): `sign(v) min(max(|v| - (1 - s) theta, 0) / s, |v|)`.

    Args:
      v: any shape.
      theta: non-negative thresholds, of the rank of `v`.
      ramp: `s`, in [0, 1]; with 0, the thresholds have no gradient.

    Returns:
      The shape of `v`.

    Example:
      >>> v, theta = jnp.array([-3.0, 0.85, 0.95]), jnp.array([1.0])
      >>> hard_threshold(v, theta).tolist()
      [-3.0, 0.0, 0.0]
      >>> [round(float(h), 3) for h in hard_threshold(v, theta, 0.2)]
      [-3.0, 0.25, 0.75]
    """
    size = jnp.abs(v)
    if ramp == 0:
        return jnp.where(size > theta, v, 0)
    return jnp.sign(v) * jnp.minimum(jnp.maximum(size - (1 - ramp) * theta, 0) / ramp, size)


def liht_block(
    p: dict[str, jax.Array], x: jax.Array, y: jax.Array, *, ramp: float = 0.0
) -> jax.Array:
    """One iteration: `hard(W x + B y, max(theta, 0))`.

    Args:
      p: `W` (n, n), `B` (n, m) and `theta` (n,).
      x: (B, n) maps as vectors.
      y: (B, m) frames as vectors, in the unit of `x`.
      ramp: see `hard_threshold`.

    Returns:
      (B, n) maps.

    Example:
      >>> p = {"W": jnp.eye(2), "B": jnp.ones((2, 1)), "theta": jnp.array([1.0, 4.0])}
      >>> liht_block(p, jnp.array([[0.5, 0.5]]), jnp.array([[3.0]])).tolist()
      [[3.5, 0.0]]
    """
    z = dense.matvec(p["W"], x) + dense.matvec(p["B"], y)
    return hard_threshold(z, jnp.maximum(p["theta"], 0)[None], ramp)


@register("liht")
@dataclasses.dataclass(frozen=True)
class LIHT(dense.DenseBaseline):
    """LIHT as an init/apply pair; untrained it is iterative hard thresholding.

    The published network for this task starts with `W = I`, which is no iteration for
    `Phi x = y` (each one adds `B y` once more), `B = Q`, a matrix fitted to the training
    set, and `theta = sqrt(lam)`.

    Attributes:
      config: hyper-parameters.

    Example:
      >>> from dscsnet_jax.physics.optics import sensing_operator
      >>> op = sensing_operator(5, division=3, psf=0.5)
      >>> net = LIHT(LIHTConfig(frame_size=5, iterations=2))
      >>> params = net.init(jax.random.key(0), op)
      >>> net.apply(params, jnp.zeros((4, 5, 5)), op).x.shape
      (4, 15, 15)

    References:
      Wang, Ling and Huang, Learning deep l0 encoders, AAAI 2016.
      Xin et al., Maximal sparsity with deep networks?, NeurIPS 2016.
    """

    config: LIHTConfig = LIHTConfig()

    def _first(self, operator: SensingOperator) -> dict[str, jax.Array]:
        B = dense.scaled_adjoint(operator)
        theta = (2 * self.config.lam) ** 0.5 / self.config.intensity_scale / operator.norm()
        return {"W": dense.remainder(operator), "B": B, "theta": jnp.full(len(B), theta)}

    def _iteration(
        self,
        p: dict[str, jax.Array],
        state: tuple[jax.Array, ...],
        y: jax.Array,
        operator: SensingOperator,
    ) -> tuple[jax.Array, ...]:
        ramp = 0.0 if self.config.compat else self.config.ramp
        return (liht_block(p, state[0], dense.as_vectors(y), ramp=ramp),)
