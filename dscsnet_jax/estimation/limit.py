"""Limit: the best that can be known of frames, by a posterior that needs no start."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.batching import in_blocks, windows_per_block
from dscsnet_jax.estimation.observed import observed, recorded, with_full_well
from dscsnet_jax.estimation.result import UnmixResult, solved_result
from dscsnet_jax.estimation.rivals import Rivals, averaged, between, confidence
from dscsnet_jax.estimation.solve import Solved
from dscsnet_jax.estimation.windows import frame_sources
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.tempered import Tempered, tempered
from dscsnet_jax.io.frames import full_well
from dscsnet_jax.physics.psf import as_psf, require

_MOST = 5  # targets that are tried where nothing is known of their number
_LANES = 32  # of a block, that the particles of one window take


def bayes_limit(
    frames: Any, known: Known, *, count: np.ndarray | None = None, seed: int = 0
) -> UnmixResult:
    """Posterior mean of small frames, from draws of the prior: what any estimate can hope for.

    By `inference.tempered`, which finds all modes and needs no start. Its samples have the mean
    log likelihood of the true scenes, averaged over frames that were drawn from the prior.

    Args:
      frames: (B, N, M) frames, counts, each with one group of targets.
      known: all of optics, sensor and scene: it is the limit of who knows so much.
      count: (B,) how many targets there are; None: unknown, and found by the evidence.
      seed: of the random numbers.

    Returns:
      `UnmixResult` with `samples`; `count_probability` is 1 for a count that is given.

    Raises:
      ValueError: if the PSF is not known.

    Example:
      >>> import dscsnet_jax as dj
      >>> y = dj.render(dj.from_lists([[(3.0, 2.7, 200.0)]]), frame_size=7, psf=0.5)
      >>> sensor = dj.Sensor(read_noise=2.0, background=0.0)
      >>> known = dj.Known(0.5, sensor, dj.scene_prior(intensity=(150.0, 250.0)))
      >>> best = bayes_limit(y, known, count=np.array([1]))
      >>> [round(float(x), 1) for x in best.targets.position[0, 0]]
      [3.0, 2.7]
    """
    require(known.psf is not None, "the limit needs a PSF, and what is known has none")
    y = recorded(frames, known.sensor.bad_pixels, mask_invalid=False)
    known = with_full_well(known, full_well(getattr(frames, "dtype", float)))
    known = dataclasses.replace(known, psf=as_psf(known.psf)).checked(y.shape)
    told, seen = known.with_weak_prior().for_windows(), observed(y, known.sensor)
    rivals: Rivals | None = None
    if count is not None:
        number = np.asarray(count, int)
        right = number.shape == (len(y),) and bool((number >= 0).all())
        require(right, f"count must be a number for each of {len(y)} frames, got {number.shape}")
        slots = int(number.max(initial=1))
        found = _tempered(seen, number, slots, told, seed)
        chance = (number[:, None] == np.arange(slots + 1)).astype(float)
    else:
        listed = told.prior.count
        most = len(listed) - 1 if isinstance(listed, tuple) else _MOST
        share = np.exp(np.asarray(told.prior.log_count(jnp.arange(most + 1), float)))
        slots = max(len(share) - 1, 1)
        tried = [n for n in range(len(share)) if share[n] > 0]
        answers = [_tempered(seen, np.full(len(y), n), slots, told, seed) for n in tried]
        evidence = np.full((len(y), slots + 1), -np.inf)
        evidence[:, tried] = np.stack([a.log_evidence for a in answers], 1) + np.log(share[tried])
        chance = np.exp(evidence - evidence.max(1, keepdims=True))
        chance /= chance.sum(1, keepdims=True)
        best = np.searchsorted(tried, chance.argmax(1))
        stacked = jax.tree.map(lambda *a: np.stack(a), *answers)
        found = jax.tree.map(lambda a: a[best, np.arange(len(y))], stacked)
        others = jax.tree.map(lambda a: np.moveaxis(a, 0, 1), stacked.posterior.targets)
        rivals = between(found.posterior.targets, chance[:, tried], others)
    return solved_result(_solved(found, chance, rivals, seen, told), known, start="prior")


def _tempered(seen: Any, number: np.ndarray, slots: int, told: Known, seed: int) -> Tempered:
    """`tempered` of frames with so many targets each, block by block."""
    mask = np.arange(slots) < number[:, None]
    size = max(windows_per_block() // _LANES, 1)
    return in_blocks(_run, (seen, mask), told, np.uint32(seed), size=size)


@jax.jit
def _run(given: tuple[Any, Any], told: Known, seed: jax.Array) -> Tempered:
    return tempered(*given, told, jax.random.key(seed))


def _solved(
    found: Tempered, chance: np.ndarray, rivals: Rivals | None, seen: Any, told: Known
) -> Solved:
    """The posteriors as a solution, targets by falling intensity."""
    posterior = found.posterior
    std, interval, trust = (
        np.asarray(a) for a in (posterior.std, posterior.interval, posterior.confidence)
    )
    if rivals is not None:
        trust = confidence(trust, std, rivals)
        std, interval = averaged(std, interval, rivals, float(np.mean(told.psf.width)))
    order = np.argsort(-np.asarray(posterior.targets.intensity), axis=1, kind="stable")
    rows = np.arange(len(order))[:, None]
    targets = jax.tree.map(lambda a: np.asarray(a)[rows, order], posterior.targets)
    slots = targets.mask.shape
    return Solved(
        targets=targets,
        std=std[rows, order],
        interval=interval[rows, order],
        converged=np.broadcast_to(posterior.converged[:, None], slots),
        effective_sample_size=np.broadcast_to(posterior.effective_sample_size[:, None], slots),
        count_probability=chance,
        confidence=trust[rows, order],
        crowded=np.zeros(slots, bool),
        truncated=np.zeros(len(order), bool),
        observation=seen,
        source=frame_sources(targets, told.psf, seen.counts),
        samples=np.take_along_axis(posterior.samples, order[:, None, :, None], 2),
    )
