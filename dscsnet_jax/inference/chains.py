"""Chains: where they begin, how their steps are shaped, and the random numbers of each window.

Every window has a stream of its own, from the key and a hash of its recorded pixels, so that no
answer depends on its neighbours and errors of many windows average out.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dscsnet_jax.inference import spd
from dscsnet_jax.inference.fit import scaled
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.lanes import from_lanes, lanes_last, to_lanes
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.scene_model import HARD, SceneModel, scene_model
from dscsnet_jax.inference.theta import present_of
from dscsnet_jax.physics.targets import Targets

NUM_CHAINS = 4
NUM_SAMPLES = 32
_RIDGE = 1e-4  # of samples that are all alike


class Chains(NamedTuple):
    """Chains of windows (B, ...): where they are, and how their steps are shaped.

    Attributes:
      theta: (B, chains, 3K+1) places.
      fitted: (B, 3K+1) the fit, by which targets are numbered.
      mean: (B, 3K+1) of the distribution that shapes a step of all parameters.
      root: (B, 3K+1, 3K+1) root of its covariance.
      log_length: (B,) of the steps.
      samples: (B, S, 3K+1, chains) of all turns so far, the earlier ones thinned.
    """

    theta: jax.Array
    fitted: jax.Array
    mean: jax.Array
    root: jax.Array
    log_length: jax.Array
    samples: jax.Array


def streams(key: jax.Array, windows: Observation) -> jax.Array:
    """The key of each window (B,): folded with a hash of its recorded pixels."""
    return jax.vmap(partial(_stream, key))(windows)


def _stream(key: jax.Array, window: Observation) -> jax.Array:
    recorded = jnp.where(window.valid, window.counts, 0).astype(jnp.float32).reshape(-1)
    bits = jax.lax.bitcast_convert_type(recorded, jnp.uint32)
    odd = jnp.arange(bits.shape[0], dtype=jnp.uint32) * jnp.uint32(2654435762) + jnp.uint32(1)
    mixed = (bits ^ (bits >> 15)) * odd
    return jax.random.fold_in(key, (mixed ^ (mixed >> 13)).sum(dtype=jnp.uint32))


@lanes_last
def begin(
    windows: Observation,
    start: Targets,
    known: Known,
    key: jax.Array,
    *,
    num_chains: int = NUM_CHAINS,
    num_samples: int = NUM_SAMPLES,
) -> Chains:
    """Chains spread around the start as far as the fit is uncertain. Arguments as of `sample`."""
    keys = streams(key, windows)
    seen, targets = to_lanes((windows, start))
    model = scene_model(seen, targets.mask, known, softness=HARD, uniform=True)
    fitted = model.pack(targets)
    root = _root_of_inverse(_information(fitted, model), present_of(targets.mask))
    draw = partial(jax.random.normal, shape=(num_chains, fitted.shape[0]), dtype=fitted.dtype)
    dimension = 3 * targets.mask.sum(0) + 1
    length = 2.38 / jnp.sqrt(dimension.astype(fitted.dtype))
    fitted, root, length = from_lanes((fitted, root, length))
    off = jnp.einsum("bpq,bcq->bcp", root, jax.vmap(draw)(keys), precision="highest")
    theta = fitted[:, None] + length[:, None, None] * off
    none = jnp.zeros((len(theta), num_samples, theta.shape[2], num_chains), theta.dtype)
    return Chains(theta, fitted, fitted, root, jnp.log(length), none)


def _information(theta: jax.Array, model: SceneModel) -> jax.Array:
    """Information (3K+1, 3K+1, B), in which nothing is wider than its prior."""
    size = model.known.prior.cluster_size
    size = max(model.seen.counts.shape[:2]) if size is None else size
    widest = jnp.zeros_like(theta).at[:-1].set(12 / size**2).at[2:-1:3].set(12)
    return model.quadratic(theta).information + spd.diagonal_matrix(widest)


def _root_of_inverse(matrix: jax.Array, present: jax.Array) -> jax.Array:
    """Lower triangular root of the inverse; zero for what is not there."""
    unit, scale = scaled(matrix, present)
    inverse, _ = spd.inverse(unit)
    width = jnp.sqrt(spd.diagonal(inverse))
    return spd.cholesky(inverse / (width[:, None] * width[None])) * (width * scale)[:, None]


def roots_of(covariance: jax.Array, mask: jax.Array) -> jax.Array:
    """(3K+1, 3K+1, L) roots of covariances, slightly drawn to their diagonals."""
    unit, scale = scaled(covariance, present_of(mask))
    wide = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    ridge = spd.diagonal_matrix(jnp.full_like(scale, _RIDGE))
    return spd.cholesky((unit + ridge) / (1 + _RIDGE)) * wide[:, None]
