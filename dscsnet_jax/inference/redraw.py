"""Redraw: the light of targets whose places have moved, drawn from what the pixels tell of it.

Expected counts are linear in intensities and level. Given places `x` their likelihood is Gaussian,
of mean `m(x)` and inverse covariance `P(x)`; a move of the places that draws the light anew from it
walks through places as if the light had been integrated out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dscsnet_jax.inference import spd
from dscsnet_jax.inference.lanes import sum_leading, sum_of
from dscsnet_jax.inference.scene_model import SceneModel
from dscsnet_jax.inference.theta import parts_of, theta_of


def light_redrawn(
    theta: jax.Array, moved: jax.Array, model: SceneModel, white: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Targets at new places with their light drawn anew, of a model whose light is linear.

    Args:
      theta: (3K+1, 1, C) where chains are.
      moved: (3K+1, 1, C) the new places; their light is not asked for.
      model: of each chain's window.
      white: (K+1, 1, C) standard normal numbers.

    Returns:
      Where to, and the logarithm (1, C) of how much likelier its proposal is on the way back.
    """
    present = jnp.concatenate([model.mask, jnp.ones_like(model.mask[:1])])
    white = jnp.where(present, white, 0)
    mean, root = _light(moved, model)
    new = mean + spd.times(jnp.swapaxes(spd.triangular_inverse(root), 0, 1), white)
    row, col, _, _ = parts_of(moved)
    proposed = theta_of(row, col, jnp.where(model.mask, new[:-1], 0), new[-1])
    old_mean, old_root = _light(theta, model)
    _, _, v, t = parts_of(theta)
    off = jnp.where(present, jnp.concatenate([v, t[None]]) - old_mean, 0)
    old_white = spd.times(jnp.swapaxes(old_root, 0, 1), off)
    back = -sum_leading(old_white**2) / 2 + _log_determinant(old_root)
    there = -sum_leading(white**2) / 2 + _log_determinant(root)
    return proposed, back - there


def _log_determinant(root: jax.Array) -> jax.Array:
    return sum_leading(jnp.log(spd.diagonal(root)))


def _light(theta: jax.Array, model: SceneModel) -> tuple[jax.Array, jax.Array]:
    """Mean (K+1, 1, C) and root of the inverse covariance of the light at places.

    As if all pixels were seen alike, so that sums over rows and cols part; what differs costs
    acceptance, not truth.
    """
    row, col, v, _ = parts_of(theta)
    seen = model.seen
    tells = seen.valid & ~seen.saturated
    number = jnp.maximum(tells.sum((0, 1)), 1)
    weight = jnp.where(tells, 1 / seen.noise**2, 0).sum((0, 1)) / number
    rest = jnp.where(tells, seen.counts - seen.neighbours - seen.level, 0)
    by_v = jnp.where(model.mask, model.intensity_slope(v), 0)
    in_row, in_col = model.responses(row, col)
    in_col = in_col * by_v
    terms = range(len(in_row))
    rows, cols = rest.shape[:2]

    def crossed(image: jax.Array, r: int, s: int) -> jax.Array:
        return sum_of(image[r, n, :, None] * image[s, n, None] for n in range(image.shape[1]))

    both = sum_of(crossed(in_row, r, s) * crossed(in_col, r, s) for r in terms for s in terms)
    light = sum_of(sum_leading(in_row[r]) * sum_leading(in_col[r]) for r in terms)
    along = [sum_of(rest[n, :, None] * in_row[r, n] for n in range(rows)) for r in terms]
    right = sum_of(along[r][m] * in_col[r, m] for r in terms for m in range(cols))
    std = jnp.broadcast_to(seen.background_std, row.shape[1:])
    with_level = (std * light)[:, None]
    corner = (rows * cols * std**2)[None, None]
    top = jnp.concatenate([both, with_level], 1)
    bottom = jnp.concatenate([jnp.swapaxes(with_level, 0, 1), corner], 1)
    whole = rest.sum((0, 1)) * std
    right = jnp.concatenate([right, whole[None]]) * weight
    # `t` is standard normal, and shares are at most some times 1.
    information = jnp.concatenate([top, bottom]) * weight
    information += spd.diagonal_matrix(jnp.ones_like(right))
    root = spd.cholesky(information)
    inverse = spd.triangular_inverse(root)
    mean = spd.times(jnp.swapaxes(inverse, 0, 1), spd.times(inverse, right))
    return mean, root
