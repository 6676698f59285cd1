"""Changes: other starts for a window's fit: one target more or less, or the cluster rotated.

The faintest or all faint targets removed, the closest pair or all of them merged, one added at
the residual's peak, the target that looks most extended split in two, and as many targets
rotated about their centre of energy.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.inference import spd
from dscsnet_jax.inference.fit import Fit, scaled
from dscsnet_jax.inference.intensity import IntensityPrior
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.lanes import lanes_last
from dscsnet_jax.inference.matched_filter import matched_filter, places
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.scene_model import scene_model
from dscsnet_jax.physics.psf import Psf
from dscsnet_jax.physics.targets import Targets

_SPLIT = (0.25, 0.6)  # least and largest half distance of a split pair, sigmas of the PSF x 2
_FAINT = 0.1  # of the brightest: companions that a poor fit of bright ones asks for
_ROTATIONS = (np.pi, np.pi / 2, np.pi / 4)
NEAR_CHANGES = 1 + len(_ROTATIONS)
"""The last ones of `changes`: those that targets near to each other ask for."""
NUM_CHANGES = 5 + NEAR_CHANGES
"""Of all kinds."""


@lanes_last
def changes(best: Fit, observation: Observation, known: Known, *, only_add: bool) -> Targets:
    """Other starts for each window; where there is no neighbouring count, the same.

    Args:
      best: fits of B windows.
      observation: the windows.
      known: PSF, sensor's gain and scene prior.
      only_add: only the one with a target more at the residual's peak.

    Returns:
      `Targets` (B, changes, K, ...).
    """
    one = partial(_changes, only_add=only_add)
    found = jax.vmap(one, (0, 0, None))(best, observation, known)
    return jax.tree.map(lambda *a: jnp.stack(a, 1), *found)


def _changes(best: Fit, observation: Observation, known: Known, *, only_add: bool) -> list[Targets]:
    """Other starts for one window."""
    targets, std = best.targets, best.std
    residual, weight, _ = left(best, observation, known)
    added = _with_peak_added(targets, residual, weight, known.psf, known.prior.intensity)
    if only_add:
        return [added]
    return [
        added,
        _without_faintest(targets, std),
        _masked(targets, targets.mask & (targets.intensity >= _FAINT * targets.intensity.max())),
        _as_one(targets),
        _with_one_split(targets, residual, weight, known.psf),
        # From here on: what near targets ask for, see `NEAR_CHANGES`.
        _with_closest_merged(targets),
        *(_rotated(targets, angle) for angle in _ROTATIONS),
    ]


def left(
    best: Fit, observation: Observation, known: Known
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(N, M) what the fit of one window leaves, one over its variance, and the targets' light."""
    model = scene_model(observation, best.targets.mask, known)
    source, t = model.source(best.theta), best.theta[-1]
    level = observation.level + observation.background_std * t
    residual = observation.counts - observation.neighbours - source - level
    residual = jnp.where(observation.saturated, jnp.maximum(residual, 0), residual)
    return residual, jnp.where(observation.valid, 1 / model.variance(source, t)[0], 0), source


def _rotated(targets: Targets, angle: float) -> Targets:
    """The same targets rotated about their centre of energy: blends look alike so."""
    energy = targets.intensity / jnp.where(targets.mask.any(), targets.intensity.sum(), 1)
    centre = (energy[:, None] * targets.position).sum(0)
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    off = targets.position - centre[None]
    turned = jnp.einsum("ka,ab->kb", off, jnp.asarray(matrix, off.dtype), precision="highest")
    turned = turned + centre[None]
    return dataclasses.replace(targets, position=jnp.where(targets.mask[:, None], turned, 0))


def _as_one(targets: Targets) -> Targets:
    """All targets merged into one: the way back from many faint companions."""
    energy = jnp.where(targets.mask, targets.intensity, 0)
    total = energy.sum()
    centre = (energy[:, None] * targets.position).sum(0) / jnp.where(total > 0, total, 1)
    kept = jnp.arange(len(energy)) == jnp.argmax(energy)
    merged = Targets(
        jnp.where(kept[:, None], centre[None], 0),
        jnp.where(kept, total, 0),
        kept & targets.mask,
    )
    some = total > 0
    return jax.tree.map(lambda new, old: jnp.where(some, new, old), merged, targets)


def _without_faintest(targets: Targets, std: jax.Array) -> Targets:
    significance = jnp.where(targets.mask, targets.intensity / std[:, 2], jnp.inf)
    gone = jnp.arange(len(significance)) == jnp.argmin(significance)
    return _masked(targets, targets.mask & ~gone)


def closest_pair(targets: Targets) -> tuple[jax.Array, jax.Array]:
    """Distance (..., ) of the closest pair, pixels, and its number among the pairs."""
    slots = targets.mask.shape[-1]
    if slots < 2:
        alone = targets.intensity.sum(-1)
        return jnp.full_like(alone, jnp.inf), jnp.zeros(alone.shape, jnp.int32)
    first, second = np.triu_indices(slots, 1)
    apart = targets.position[..., first, :] - targets.position[..., second, :]
    both = targets.mask[..., first] & targets.mask[..., second]
    distance = jnp.where(both, jnp.sqrt((apart**2).sum(-1)), jnp.inf)
    return distance.min(-1), distance.argmin(-1)


def _with_closest_merged(targets: Targets) -> Targets:
    if len(targets.mask) < 2:
        return targets
    first, second = np.triu_indices(len(targets.mask), 1)
    pair = closest_pair(targets)[1]
    a, b = jnp.asarray(first)[pair], jnp.asarray(second)[pair]
    both = targets.mask[a] & targets.mask[b]
    energy = targets.intensity[a] + targets.intensity[b]
    share = targets.intensity[a] / jnp.where(energy == 0, 1, energy)
    centre = share * targets.position[a] + (1 - share) * targets.position[b]
    merged = Targets(
        targets.position.at[a].set(centre),
        targets.intensity.at[a].set(energy),
        targets.mask.at[b].set(False),
    )
    kept = jax.tree.map(lambda new, old: jnp.where(both, new, old), merged, targets)
    return _masked(kept, kept.mask)


def _with_peak_added(
    targets: Targets,
    residual: jax.Array,
    weight: jax.Array,
    psf: Psf,
    prior: IntensityPrior | None,
) -> Targets:
    energy, ratio = matched_filter(residual, weight, psf)
    row, col = jnp.divmod(jnp.argmax(ratio), ratio.shape[1])
    energy = energy[row, col]
    place = jnp.stack(
        [
            jnp.asarray(places(n), residual.dtype)[i]
            for n, i in zip(residual.shape, (row, col), strict=True)
        ]
    )
    if prior is not None:
        energy = jnp.clip(energy, *prior.range).astype(residual.dtype)
    return _put(targets, jnp.argmin(targets.mask), place, energy)


def _with_one_split(targets: Targets, residual: jax.Array, weight: jax.Array, psf: Psf) -> Targets:
    """Split the target whose surroundings look most like those of a pair.

    Two halves at `+-delta` along `e` differ from one target by `I/2 delta^2 e^T H e`, `H`
    the second derivatives of the PSF: the residual's share in them gives target,
    direction and distance.
    """
    terms = psf.terms()
    in_row, in_col = (
        [terms.responses(axis, targets.position[:, axis], num, order=order) for order in range(3)]
        for axis, num in enumerate(residual.shape)
    )
    pairs = ((2, 0), (0, 2), (1, 1))
    image = partial(jnp.einsum, "rik,rjk->kij", precision="highest")
    shapes = jnp.stack([image(in_row[a], in_col[b]) for a, b in pairs], 1)
    shapes = shapes * targets.intensity[:, None, None, None] / 2
    shapes = shapes * jnp.array([1.0, 1.0, 2.0], shapes.dtype)[None, :, None, None]
    normal = jnp.einsum("ksij,ktij,ij->stk", shapes, shapes, weight, precision="highest")
    right = jnp.einsum("ksij,ij->sk", shapes, weight * residual, precision="highest")
    unit, scale = scaled(normal, jnp.ones(right.shape, bool))
    inverse, _ = spd.inverse(unit)
    rr, cc, rc = scale * jnp.einsum("stk,tk->sk", inverse, scale * right, precision="highest")
    middle, radius = (rr + cc) / 2, jnp.sqrt(((rr - cc) / 2) ** 2 + rc**2)
    chosen = jnp.argmax(jnp.where(targets.mask, (middle + radius) * targets.intensity, -jnp.inf))
    angle = jnp.arctan2(2 * rc[chosen], rr[chosen] - cc[chosen]) / 2
    least, largest = (2 * s * psf.width.mean().astype(residual.dtype) for s in _SPLIT)
    half = jnp.sqrt(jnp.clip((middle + radius)[chosen], least**2, largest**2))
    offset = half * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    centre, energy = targets.position[chosen], targets.intensity[chosen] / 2
    free = jnp.argmin(targets.mask)
    first = Targets(
        targets.position.at[chosen].set(centre + offset),
        targets.intensity.at[chosen].set(energy),
        targets.mask,
    )
    both = _put(first, free, centre - offset, energy)
    possible = targets.mask.any() & ~targets.mask[free]
    return jax.tree.map(lambda new, old: jnp.where(possible, new, old), both, targets)


def _put(targets: Targets, slot: jax.Array, place: jax.Array, energy: jax.Array) -> Targets:
    """A target more, if the slot is free."""
    free = ~targets.mask[slot]
    return Targets(
        targets.position.at[slot].set(jnp.where(free, place, targets.position[slot])),
        targets.intensity.at[slot].set(jnp.where(free, energy, targets.intensity[slot])),
        targets.mask.at[slot].set(True),
    )


def _masked(targets: Targets, mask: jax.Array) -> Targets:
    return Targets(
        jnp.where(mask[:, None], targets.position, 0), jnp.where(mask, targets.intensity, 0), mask
    )
