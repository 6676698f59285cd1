"""Losses: pure functions of an unfolded answer and the grid truth."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from dscsnet_jax.unfolding.admm import Unfolded


def map_error(x: jax.Array, truth: jax.Array, scale: ArrayLike) -> jax.Array:
    """Mean over frames of `sum over cells ((x - truth) / scale)^2`.

    Args:
      x: (B, cN, cM) maps, counts.
      truth: (B, cN, cM) grid truth, counts.
      scale: counts that weigh as 1, a number or (B, 1, 1).

    Returns:
      A scalar without unit.

    Example:
      >>> import jax.numpy as jnp
      >>> float(map_error(jnp.ones((2, 3, 3)), jnp.zeros((2, 3, 3)), 1.0))
      9.0
    """
    return (((x - truth) / scale) ** 2).sum((-2, -1)).mean()


def training_loss(
    answer: Unfolded, truth: jax.Array, *, scale: ArrayLike, symmetry_weight: float
) -> jax.Array:
    """`map_error(x) + symmetry_weight * mean_k symmetry_k`.

    Args:
      answer: of a network, with its trace if `symmetry_weight` is not zero.
      truth: (B, cN, cM) grid truth, counts.
      scale: counts that weigh as 1, a number or (B, 1, 1).
      symmetry_weight: weight of the transform's left-inverse error.

    Returns:
      A scalar.

    Raises:
      ValueError: if the error is weighed but the network has no left inverse.

    References:
      Zhang and Ghanem, ISTA-Net, CVPR 2018 (the symmetry term).
    """
    loss = map_error(answer.x, truth, scale)
    if symmetry_weight:
        if "symmetry" not in answer.trace:
            raise ValueError(
                f"symmetry_weight {symmetry_weight}: the network has no learned left inverse"
            )
        loss = loss + symmetry_weight * answer.trace["symmetry"].mean()
    return loss
