"""Clustered: places of targets near to each other, how near is not known.

A t density of two degrees of freedom of the contrasts of `n` places `x`, `r` its scale,

    p(x | mean) = Gamma(n) / n (2 pi r^2)^(1-n) (1 + sum_k |x_k - mean|^2 / (2 r^2))^(-n),

a Gaussian of unknown scale around `r`. Targets that cannot be told from one would be one: within
`r` of each other they are the less likely, the nearer they are, or their number had no end.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.inference import spd
from dscsnet_jax.inference.derivatives import PriorTerms

_BLURRED = 0.3  # of `r`, softness of the least distance
_BLURRED_SHARE = 0.0943  # of pairs, that it takes away


def terms(row: jax.Array, col: jax.Array, mask: jax.Array, scale: jax.Array) -> PriorTerms:
    """Of places (K, ...): cost (...,), gradient (2, K, ...), information (K, K, ...) of each axis.

    The information is that of the Gaussian that fits best, which is never negative.
    """
    present = mask.astype(row.dtype)
    number = jnp.maximum(present.sum(0), 1)
    off = jnp.stack(
        [jnp.where(mask, x - ((present * x).sum(0) / number)[None], 0) for x in (row, col)],
    )
    unit2 = 2 * scale**2
    square = (off**2).sum((0, 1)) / unit2
    weight = 2 * number / (1 + square) / unit2
    own = spd.diagonal_matrix(present) - present[:, None] * (present / number[None])[None]
    along = weight[None, None]
    return PriorTerms(number * jnp.log1p(square), along * off, along * own)


def log_scale(number: jax.Array, scale: jax.Array) -> jax.Array:
    """(...,) log density of places (number >= 1) on one spot, but for that of their mean."""
    log_unit = jnp.log(2 * np.pi * scale**2)
    return jax.lax.lgamma(number) - (number - 1) * log_unit - jnp.log(number)


def too_close(apart: jax.Array, scale: jax.Array) -> jax.Array:
    """Residuals of pairs so far apart."""
    return jnp.maximum(1 - apart / scale, 0) / _BLURRED


def log_share(number: jax.Array) -> jax.Array:
    """(...,) log probability that all pairs are kept, those of more than two nearly."""
    return (number * (number - 1) // 2) * float(np.log1p(-_BLURRED_SHARE))


def drawn(centre: jax.Array, mask: jax.Array, scale: Any, u: jax.Array) -> jax.Array:
    """Places (2, K, P, L) about their mean (2, 1, P, L), by uniform numbers (2K+1, P, L)."""
    inside = jnp.clip(u, 1e-6, 1 - 1e-6)
    own = scale * jax.lax.rsqrt(-jnp.log(inside[-1]))  # chi square of two is exponential
    white = jax.scipy.special.ndtri(inside[:-1]).reshape(2, len(mask), *u.shape[1:])
    white = jnp.where(mask[None], white, 0)
    mean = white.sum(1, keepdims=True) / jnp.maximum(mask.sum(0), 1)[None, None]
    return centre + own[None, None] * (white - mean)
