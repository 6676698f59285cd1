"""Counts: how many targets a frame holds, by comparing the evidence of neighbouring counts.

The evidence of a count is Laplace's: with `d` parameters, their information `F` and the
prior's density `p` at the fit,

    log Z = log likelihood + log p + d/2 log(2 pi) - 1/2 log det F + log n!

The start is the read-out's count. Frames whose fit the noise does not explain, or whose
targets are in doubt, are compared with fewer targets (the faintest or all faint ones removed,
the closest pair or all of them merged), one more (added at the residual's peak, or the target
that looks most extended split in two), and as many turned about their centre of energy.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln

from dscsnet_jax.estimation.blocks import in_blocks, take_rows
from dscsnet_jax.estimation.detect import matched_filter, places
from dscsnet_jax.estimation.objective import pixel_std
from dscsnet_jax.estimation.observe import Observation
from dscsnet_jax.estimation.prior import ScenePrior
from dscsnet_jax.estimation.refine import Fit, all_counts, refine_frames
from dscsnet_jax.inference import spd
from dscsnet_jax.physics import limits, optics
from dscsnet_jax.physics.targets import Targets

MAX_ROUNDS = 6
_HEATS = ((8, 3), (12, 1))  # iterations of the candidates' fits, and how many of a frame go on
_MARGIN = 0.5  # pixels beyond the border where a target may still be
_SPLIT = (0.25, 0.6)  # least and largest half distance of a split pair, sigmas of the PSF x 2
_UNEXPLAINED = 3.0  # standard deviations of chi square
_DOUBTFUL_SNR = 6.0
_DOUBTFUL_INTENSITY = 2.0  # standard deviations expected of fits
_LEAST_SPREAD = 0.01  # of the prior's variance
_FAINT = 0.1  # of the brightest: companions that a poor fit of bright ones asks for
_CLOSE = 1.3  # PSF sigmas
_TURNS = (np.pi, np.pi / 2, np.pi / 4)
_NEAR_CHANGES = 1 + len(_TURNS)  # the last ones of `_changes`
_NEAR, _DOUBTED = 1, 2  # degrees of doubt


class Selected(NamedTuple):
    """Answer of `select_count`.

    Attributes:
      fit: of the best count.
      log_evidence: (B, K+1) of each count that was tried; -inf of the others.
    """

    fit: Fit
    log_evidence: Any


def log_evidence(fit: Fit, observation: Observation, prior: ScenePrior) -> jax.Array:
    """Laplace evidence of fits, up to a constant of each frame.

    Args:
      fit: of B frames.
      observation: the frames.
      prior: what is known of the scene; a range of intensities counts as a Gaussian of
        its mean and variance. Without one, any up to the frame's flux is as likely;
        without an extent, any place of the frame.

    Returns:
      (B,) natural logarithms.
    """
    mask = fit.targets.mask
    number = mask.sum(-1)
    slots = mask.shape[-1]
    if prior.intensity is None:
        log_density = -jnp.log(all_counts(observation))
    else:
        log_density = -jnp.log(prior.intensity_moments()[1] * (2 * np.pi) ** 0.5)
    area = jnp.log(observation.valid.sum((-2, -1)).clip(1))
    total = -fit.cost - fit.log_determinant / 2 + 1.5 * number * np.log(2 * np.pi)
    total = total + number * log_density + gammaln(number + 1.0)
    if prior.extent is None:
        total = total - number * area
    else:
        share = jnp.asarray(prior.log_free_share)
        total = total - jnp.where(number > 0, area, 0) - share[jnp.minimum(number, len(share) - 1)]
        total = total - 2 * number * jnp.log(prior.extent)
    rows, cols = observation.counts.shape[-2:]
    row, col = fit.targets.position[..., 0], fit.targets.position[..., 1]
    inside = (jnp.abs(row - (rows - 1) / 2) <= rows / 2 + _MARGIN) & (
        jnp.abs(col - (cols - 1) / 2) <= cols / 2 + _MARGIN
    )
    impossible = mask & (~inside | (fit.targets.intensity < 0))
    total = jnp.where(impossible.any(-1), -jnp.inf, total)
    if prior.count is not None:
        chance = np.zeros(slots + 1)
        chance[: len(prior.count)] = prior.count[: slots + 1]
        total = total + jnp.log(jnp.asarray(chance, total.dtype))[number]
    return total


def select_count(
    observation: Observation,
    fit: Fit,
    prior: ScenePrior,
    *,
    only_add: bool = False,
    max_rounds: int = MAX_ROUNDS,
) -> Selected:
    """Remove or add targets where the evidence says so.

    Only frames in doubt are compared; those are gathered into blocks of one fixed shape,
    so that no frame's answer depends on the others.

    Args:
      observation: B frames.
      fit: their fits at the first count.
      prior: what is known of the scene.
      only_add: add one target at a time at the residual's peak as long as the evidence
        grows, from any start, and try nothing else: what one would write by hand.
      max_rounds: most times that a count may change.

    Returns:
      `Selected`, as NumPy arrays.
    """
    evidence, doubt = in_blocks(_assess, (fit, observation), prior)
    fit, evidence, doubt = jax.tree.map(np.array, (fit, evidence, doubt))
    number = fit.targets.mask.sum(-1)
    table = np.full((len(number), fit.targets.mask.shape[-1] + 1), -np.inf, evidence.dtype)
    table[np.arange(len(number)), number] = evidence
    todo = np.flatnonzero((doubt > 0) | only_add)
    for _ in range(max_rounds):
        if not len(todo):
            break
        seen, some = take_rows((observation, fit), todo)
        found = _candidates(todo, seen, some, prior, only_add)
        few = (doubt[found.frame] == _NEAR) & ~found.near & (not only_add)
        found = take_rows(found, np.flatnonzero(~few))
        found, hopeful = _contest(found, prior, table)
        found = take_rows(found, np.flatnonzero(hopeful > evidence[found.frame]))
        new = refine_frames(found.observation, found.targets, prior)
        reached, _ = in_blocks(_assess, (new, found.observation), prior)
        doubt[found.frame] = _DOUBTED  # in a further round
        todo, number = found.frame, new.targets.mask.sum(-1)
        table[todo, number] = np.maximum(table[todo, number], reached)
        better, changed = reached > evidence[todo], number != fit.targets.mask[todo].sum(-1)
        evidence[todo[better]] = reached[better]
        for ours, theirs in zip(jax.tree.leaves(fit), jax.tree.leaves(new), strict=True):
            ours[todo[better]] = theirs[better]
        todo = todo[better & changed]
    return Selected(fit, table)


@jax.jit
def _assess(
    fit_and_frames: tuple[Fit, Observation], prior: ScenePrior
) -> tuple[jax.Array, jax.Array]:
    fit, observation = fit_and_frames
    return log_evidence(fit, observation, prior), _in_doubt(fit, observation, prior)


def _in_doubt(fit: Fit, observation: Observation, prior: ScenePrior) -> jax.Array:
    """(B,) degree of doubt: 0, or targets are near to each other, or more than that.

    More is that the noise does not explain the fit, or a target may be too much or two.
    """
    mask, intensity = fit.targets.mask, fit.targets.intensity
    freedom = jnp.maximum(fit.num_pixels - 3 * mask.sum(-1), 1)
    unexplained = fit.chi_square > freedom + _UNEXPLAINED * jnp.sqrt(2.0 * freedom)
    weak = mask & ~(intensity > _DOUBTFUL_SNR * fit.std[..., 2])
    unlikely = jnp.zeros_like(unexplained)
    if prior.intensity is not None:
        unlikely = _unlikely_intensities(fit, prior)
    close = _closest(fit.targets)[0] < _CLOSE * observation.sigma.mean(-1)
    doubted = unexplained | unlikely | weak.any(-1) | ~fit.converged
    return jnp.where(doubted, _DOUBTED, jnp.where(close, _NEAR, 0))


def _unlikely_intensities(fit: Fit, prior: ScenePrior) -> jax.Array:
    """(B,) bool: a target, or all together, brighter or fainter than the prior expects.

    The fit draws intensities to the prior's mean the more, the less the frame tells: over
    scenes, fitted ones vary by the variance of the prior less that of the posterior.
    """
    mask = fit.targets.mask
    mean, std = prior.intensity_moments()
    off = jnp.where(mask, fit.targets.intensity - mean, 0)
    covariance = fit.covariance[..., 2::3, 2::3]
    both = mask[..., :, None] & mask[..., None, :]
    covariance = jnp.where(both & jnp.isfinite(covariance), covariance, 0)
    alone = jnp.diagonal(covariance, axis1=-2, axis2=-1)
    number = mask.sum(-1)

    def far(off: jax.Array, prior_variance: jax.Array, variance: jax.Array) -> jax.Array:
        expected = jnp.maximum(prior_variance - variance, _LEAST_SPREAD * prior_variance)
        return off**2 > _DOUBTFUL_INTENSITY**2 * expected

    total = far(off.sum(-1), number * std**2, covariance.sum((-2, -1)))
    return far(off, std**2, alone).any(-1) | total


class _Candidates(NamedTuple):
    """Other starts of frames, one row a start.

    The frame's number, whether the change is one for near targets, its pixels, targets.
    """

    frame: np.ndarray
    near: np.ndarray
    observation: Observation
    targets: Targets


def _candidates(
    frame: np.ndarray, observation: Observation, fit: Fit, prior: ScenePrior, only_add: bool
) -> _Candidates:
    """All changes of the fits that are one."""
    given = (fit.targets, fit.std, observation, fit.background)
    changes = in_blocks(partial(_all_changes, only_add=only_add), given, prior)
    mine = jax.tree.map(lambda a: np.asarray(a)[:, None], fit.targets)
    other = (changes.mask != mine.mask).any(-1) | (changes.position != mine.position).any((-2, -1))
    row, change = np.nonzero(other)
    targets = jax.tree.map(lambda a: a[row, change], changes)
    near = change >= other.shape[1] - _NEAR_CHANGES
    return _Candidates(frame[row], near, take_rows(observation, row), targets)


def _contest(
    candidates: _Candidates, prior: ScenePrior, table: np.ndarray
) -> tuple[_Candidates, np.ndarray]:
    """The best candidate of each frame and its evidence, after fits of some iterations.

    All run the first heat, the best of each frame the second; `table` (frames, K+1) takes
    the evidence that the counts reach.
    """
    evidence = np.zeros(0, table.dtype)
    for iterations, winners in _HEATS:
        fit = refine_frames(
            candidates.observation, candidates.targets, prior, num_iterations=iterations
        )
        evidence, _ = in_blocks(_assess, (fit, candidates.observation), prior)
        evidence = np.where(np.isfinite(evidence), evidence, -np.inf)
        np.maximum.at(table, (candidates.frame, fit.targets.mask.sum(-1)), evidence)
        kept = _leading(candidates.frame, evidence, winners)
        candidates = candidates._replace(targets=fit.targets)
        candidates, evidence = take_rows((candidates, evidence), kept)
    return candidates, evidence


def _leading(frame: np.ndarray, value: np.ndarray, number: int) -> np.ndarray:
    """Rows with the largest values of each frame, ordered by frame."""
    order = np.lexsort((-value, frame))
    rank = np.arange(len(order)) - np.searchsorted(frame[order], frame[order])
    return order[(rank < number) & np.isfinite(value[order])]


@partial(jax.jit, static_argnames="only_add")
def _all_changes(
    given: tuple[Targets, jax.Array, Observation, jax.Array], prior: ScenePrior, *, only_add: bool
) -> Targets:
    """`_changes` of B frames, stacked: `Targets` (B, changes, K, ...)."""
    changes = jax.vmap(partial(_changes, prior=prior, only_add=only_add))(*given)
    return jax.tree.map(lambda *a: jnp.stack(a, 1), *changes)


def _changes(
    targets: Targets,
    std: jax.Array,
    observation: Observation,
    background: jax.Array,
    *,
    prior: ScenePrior,
    only_add: bool,
) -> list[Targets]:
    """Other starts for one frame; where there is no neighbouring count, the same."""
    rows, cols = observation.counts.shape
    source = optics.render(targets, frame_size=(rows, cols), sigma=observation.sigma)
    residual = observation.counts - source - background
    residual = jnp.where(observation.saturated, jnp.maximum(residual, 0), residual)
    weight = jnp.where(observation.valid, 1 / pixel_std(observation, source) ** 2, 0)
    added = _with_peak_added(targets, residual, weight, observation.sigma, prior)
    if only_add:
        return [added]
    return [
        added,
        _without_faintest(targets, std),
        _masked(targets, targets.mask & (targets.intensity >= _FAINT * targets.intensity.max())),
        _as_one(targets),
        _with_one_split(targets, residual, weight, observation.sigma),
        # From here on: what near targets ask for, see `_NEAR_CHANGES`.
        _with_closest_merged(targets),
        *(_turned(targets, angle) for angle in _TURNS),
    ]


def _turned(targets: Targets, angle: float) -> Targets:
    """The same targets turned about their centre of energy: blends look alike so."""
    energy = targets.intensity / jnp.where(targets.mask.any(), targets.intensity.sum(), 1)
    centre = (energy[:, None] * targets.position).sum(0)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    off = targets.position - centre[None]
    turned = jnp.einsum("ka,ab->kb", off, jnp.asarray(turn, off.dtype), precision="highest")
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


def _closest(targets: Targets) -> tuple[jax.Array, jax.Array]:
    """Distance (..., ) of the closest pair, pixels, and its number among the pairs."""
    slots = targets.mask.shape[-1]
    first, second = np.triu_indices(slots, 1)
    apart = targets.position[..., first, :] - targets.position[..., second, :]
    both = targets.mask[..., first] & targets.mask[..., second]
    distance = jnp.where(both, jnp.sqrt((apart**2).sum(-1)), jnp.inf)
    return distance.min(-1), distance.argmin(-1)


def _with_closest_merged(targets: Targets) -> Targets:
    first, second = np.triu_indices(len(targets.mask), 1)
    pair = _closest(targets)[1]
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
    targets: Targets, residual: jax.Array, weight: jax.Array, sigma: jax.Array, prior: ScenePrior
) -> Targets:
    energy, ratio = matched_filter(residual, weight, sigma)
    row, col = jnp.divmod(jnp.argmax(ratio), ratio.shape[1])
    energy = energy[row, col]
    place = jnp.stack(
        [
            jnp.asarray(places(n), residual.dtype)[i]
            for n, i in zip(residual.shape, (row, col), strict=True)
        ]
    )
    if prior.intensity is not None:
        energy = jnp.clip(energy, *prior.intensity)
    return _put(targets, jnp.argmin(targets.mask), place, energy)


def _with_one_split(
    targets: Targets, residual: jax.Array, weight: jax.Array, sigma: jax.Array
) -> Targets:
    """Split the target whose surroundings look most like those of a pair.

    Two halves at `+-delta` along `e` differ from one target by `I/2 delta^2 e^T H e`, `H`
    the second derivatives of the PSF: the residual's share in them gives target,
    direction and distance.
    """
    rows, cols = residual.shape
    moments = []
    for axis, num in ((0, rows), (1, cols)):
        place = targets.position[:, axis]
        value = optics.point_response(place, num, sigma[axis])
        slope = limits.point_response_derivative(place, num, sigma[axis])
        bend = jax.vmap(
            jax.jacfwd(partial(limits.point_response_derivative, num_pixels=num, sigma=sigma[axis]))
        )(place)
        moments.append((value, slope, bend))
    pairs = ((2, 0), (0, 2), (1, 1))
    shapes = jnp.stack([moments[0][a][:, :, None] * moments[1][b][:, None, :] for a, b in pairs], 1)
    shapes = shapes * targets.intensity[:, None, None, None] / 2
    shapes = shapes * jnp.array([1.0, 1.0, 2.0], shapes.dtype)[None, :, None, None]
    normal = jnp.einsum("ksij,ktij,ij->kst", shapes, shapes, weight, precision="highest")
    right = jnp.einsum("ksij,ij->ks", shapes, weight * residual, precision="highest")
    diagonal = jnp.diagonal(normal, axis1=-2, axis2=-1)
    scale = jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1))
    inverse, _ = spd.inverse(
        jnp.where(np.eye(3) > 0, 1, normal * scale[:, :, None] * scale[:, None, :])
    )
    solution = scale * jnp.einsum("kst,kt->ks", inverse, scale * right, precision="highest")
    rr, cc, rc = jnp.moveaxis(solution, -1, 0)
    middle, radius = (rr + cc) / 2, jnp.sqrt(((rr - cc) / 2) ** 2 + rc**2)
    chosen = jnp.argmax(jnp.where(targets.mask, (middle + radius) * targets.intensity, -jnp.inf))
    angle = jnp.arctan2(2 * rc[chosen], rr[chosen] - cc[chosen]) / 2
    least, largest = (2 * s * sigma.mean() for s in _SPLIT)
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
