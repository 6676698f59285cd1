"""TiLISTA: soft thresholding with tied matrices and support selection.

    z = x + alpha W (y - Phi x)
    x <- z for the p_k percent largest |z| above theta, soft(z, theta) for the others

`W` (the same for all iterations if `tied`), `alpha` and `theta` are learned; the percentage
of cells trusted to hold a target, `p_k = min(k p, p_max)`, is not. Selection spares the
targets the bias of the soft threshold.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dscsnet_jax.physics.optics import SensingOperator
from dscsnet_jax.unfolding import admm
from dscsnet_jax.unfolding.baselines import dense
from dscsnet_jax.unfolding.registry import register


@dataclasses.dataclass(frozen=True)
class TiLISTAConfig(dense.DenseConfig):
    """Hyper-parameters of TiLISTA; see `DenseConfig`.

    Attributes:
      percent: share of cells selected in the first iteration, and how much it grows in
        each, %.
      percent_max: largest share of cells selected, %.
      tied: one `W` for all iterations, as in the paper. The published network for this
        task has one per iteration, and 2.1 million parameters for that.
      compat: let a negative threshold enlarge what is not selected, as the published
        network for this task does; without, it counts as 0.

    Raises:
      ValueError: if a value is too small, or a share is not in 0 .. 100.
    """

    percent: float = 1.2
    percent_max: float = 13.0
    tied: bool = False
    compat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("percent", "percent_max"):
            if not 0 <= getattr(self, field) <= 100:
                raise ValueError(f"{field} must be in 0 .. 100, got {getattr(self, field)}")


def selective_threshold(v: jax.Array, theta: jax.Array, percent: ArrayLike) -> jax.Array:
    """`v` where `|v|` is above `theta` and among the largest, `soft(v, theta)` elsewhere.

    Args:
      v: (B, n) vectors; each is judged by itself.
      theta: (1, n) thresholds.
      percent: share of entries to select, %, a scalar.

    Returns:
      (B, n).

    Example:
      >>> v = jnp.array([[4.0, -3.0, 2.0, 0.5, 0.0]])
      >>> selective_threshold(v, jnp.ones((1, 5)), 20.0).tolist()
      [[4.0, -2.0, 1.0, 0.0, 0.0]]
    """
    size = jnp.abs(jax.lax.stop_gradient(v))  # a selection has no slope
    least = jnp.quantile(size, 1 - jnp.asarray(percent, v.dtype) / 100, axis=-1, keepdims=True)
    return jnp.where((size > theta) & (size > least), v, admm.soft_threshold(v, theta))


def tilista_block(
    p: dict[str, jax.Array],
    x: jax.Array,
    residual: jax.Array,
    percent: ArrayLike,
    *,
    compat: bool = False,
) -> jax.Array:
    """One iteration: the two lines of the module's docstring.

    Args:
      p: `W` (n, m), `alpha` () and `theta` (n,).
      x: (B, n) maps as vectors.
      residual: (B, m) `y - Phi x`.
      percent: `p_k`, %.
      compat: do not count negative thresholds as 0.

    Returns:
      (B, n) maps.

    Example:
      >>> p = {"W": jnp.ones((2, 1)), "alpha": jnp.array(2.0), "theta": jnp.ones(2)}
      >>> tilista_block(p, jnp.array([[0.0, 1.0]]), jnp.ones((1, 1)), 50.0).tolist()
      [[1.0, 3.0]]
    """
    z = x + p["alpha"] * dense.matvec(p["W"], residual)
    theta = p["theta"] if compat else jnp.maximum(p["theta"], 0)
    return selective_threshold(z, theta[None], percent)


@register("tilista")
@dataclasses.dataclass(frozen=True)
class TiLISTA(dense.DenseBaseline):
    """TiLISTA as an init/apply pair; untrained it is ISTA with support selection.

    The published network for this task starts with `W = Q`, a matrix fitted to the
    training set, and `theta = lam / (1.001 L)`.

    Attributes:
      config: hyper-parameters.

    Example:
      >>> from dscsnet_jax.physics.optics import sensing_operator
      >>> op = sensing_operator(5, division=3, psf=0.5)
      >>> net = TiLISTA(TiLISTAConfig(frame_size=5, iterations=2))
      >>> params = net.init(jax.random.key(0), op)
      >>> net.apply(params, jnp.zeros((4, 5, 5)), op).x.shape
      (4, 15, 15)

    References:
      Liu et al., ALISTA: analytic weights are as good as learned weights in LISTA, ICLR 2019.
      Chen et al., Theoretical linear convergence of unfolded ISTA and its practical weights
      and thresholds, NeurIPS 2018 (support selection).
    """

    config: TiLISTAConfig = TiLISTAConfig()

    def init(self, key: jax.Array, operator: SensingOperator) -> dict[str, Any]:
        """See `DenseBaseline.init`; with `tied`, there is one `W`."""
        params = super().init(key, operator)
        if self.config.tied:
            params["iterations"]["W"] = params["iterations"]["W"][:1]
        return params

    def _first(self, operator: SensingOperator) -> dict[str, jax.Array]:
        W = dense.scaled_adjoint(operator)
        theta = self.config.lam / self.config.intensity_scale / operator.norm() ** 2
        return {"W": W, "alpha": jnp.ones(()), "theta": jnp.full(len(W), theta)}

    def _iteration(
        self,
        p: dict[str, jax.Array],
        state: tuple[jax.Array, ...],
        y: jax.Array,
        operator: SensingOperator,
    ) -> tuple[jax.Array, ...]:
        r = dense.residual(state[0], y, operator)
        return (tilista_block(p, state[0], r, p["percent"], compat=self.config.compat),)

    def _scanned(self, params: dict[str, Any]) -> Any:
        cfg, learned = self.config, dict(params["iterations"])
        W = learned["W"]
        learned["W"] = jnp.broadcast_to(W, (cfg.iterations, *W.shape[1:]))
        share = cfg.percent * jnp.arange(1, cfg.iterations + 1, dtype=W.dtype)
        return learned | {"percent": jnp.minimum(share, cfg.percent_max)}
