"""Solve: from the read-out's targets to fitted, counted and averaged ones.

windows around groups of targets -> fit -> select counts -> [what was missed] -> posterior

Works on whole sets of frames; every step runs on windows of a few fixed shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from dscsnet_jax.batching import (
    frames_per_block,
    in_blocks,
    put_rows,
    take_rows,
    windows_per_block,
)
from dscsnet_jax.estimation import ESTIMATES, windows
from dscsnet_jax.estimation.windows import Windows
from dscsnet_jax.inference import observation as observing
from dscsnet_jax.inference import program, sampler
from dscsnet_jax.inference.fit import Fit
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.prior import Known
from dscsnet_jax.inference.program import Selected
from dscsnet_jax.inference.sampler import Posterior
from dscsnet_jax.maps.detect import peaks_of
from dscsnet_jax.physics.targets import Targets, from_arrays

_SEARCHES = 3  # for targets that the start had missed, and for room


class Solved(NamedTuple):
    """Targets of B frames off the grid, with what is known about them, as NumPy arrays.

    Attributes:
      targets: `Targets` (B, K, ...), brightest first.
      std: (B, K, 3) standard deviations of row, col (pixels) and intensity (counts).
      interval: (B, K, 3, 4) quantiles of the posterior (`summary.LEVELS`), or those of
        a Gaussian.
      converged: (B, K) bool, the fit of the target's window found its minimum; of the
        posterior mean: its chains agree.
      effective_sample_size: (B, K) of the chains; inf without sampling.
      count_probability: (B, K+1) of each number of targets.
      truncated: (B,) bool, targets are missing for want of slots.
      observation: noise and background as given or estimated.
      source: (B, N, M) expected counts of the targets.
    """

    targets: Targets
    std: np.ndarray
    interval: np.ndarray
    converged: np.ndarray
    effective_sample_size: np.ndarray
    count_probability: np.ndarray
    truncated: np.ndarray
    observation: Observation
    source: np.ndarray


def solve(
    observation: Observation,
    start: Targets,
    known: Known,
    *,
    max_targets: int,
    estimate: str = "mean",
    estimate_noise: bool = False,
    greedy: bool = False,
    fixed_count: bool = False,
    from_start: bool = False,
    seed: int = 0,
) -> Solved:
    """Fit, count and average the targets of frames.

    Args:
      observation: B whole frames.
      start: of each frame, `Targets` (B, K, ...).
      known: PSF, gain and scene prior.
      max_targets: slots of the answer.
      estimate: `map`: the fit; `mean`: the posterior mean.
      estimate_noise: measure noise and background once more on the residual, where no
        target is left to disturb.
      greedy: only add targets, one at a time.
      fixed_count: keep the number of targets of the start.
      from_start: sample from the start itself instead of from its fit.
      seed: of the chains.

    Returns:
      `Solved`.

    Raises:
      ValueError: for an unknown estimate.

    Example:
      >>> from dscsnet_jax.inference.observation import observe
      >>> from dscsnet_jax.physics.optics import render
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> truth = from_lists([[(5.0, 4.6, 240.0), (5.1, 5.4, 200.0)]])
      >>> seen = observe(render(truth, frame_size=11, sigma=0.5), noise=1.0, background=0.0)
      >>> answer = solve(seen, truth, Known(sigma=0.5), max_targets=4, estimate="map")
      >>> answer.targets.intensity.round().tolist()
      [[240.0, 200.0, 0.0, 0.0]]
    """
    if estimate not in ESTIMATES:
        raise ValueError(f"unknown estimate {estimate!r}; choose one of {', '.join(ESTIMATES)}")
    observation, start = jax.tree.map(np.asarray, (observation, start))
    num_frames = len(observation.counts)
    room = max(max_targets, start.mask.shape[1])
    if estimate_noise:
        parts, _ = fitted(observation, start, known, num_free_slots=1)
        start = joined(parts, num_frames, room)
        observation = _remeasured(observation, start, known)
    if fixed_count:
        parts, crowded = fitted(observation, start, known, num_free_slots=0)
        counted = [(w, _uncounted(fit)) for w, fit in parts]
    else:
        counted, crowded = selected(observation, start, known, greedy=greedy, max_targets=room)
    fits = [(w, s.fit.targets, _fit_values(s.fit)) for w, s in counted]
    # What is too much is left out at the end: its neighbours' posteriors need it.
    most = room if estimate == "mean" else max_targets
    targets, values, over = windows.join(fits, num_frames, most)
    if estimate == "mean":
        if from_start:
            targets = windows.join([(w, w.targets, ()) for w, _ in counted], num_frames, room)[0]
        posteriors, more = sampled(observation, targets, known, seed=seed)
        means = [(w, p.targets, _mean_values(p)) for w, p in posteriors]
        targets, values, over = windows.join(means, num_frames, max_targets)
        crowded = crowded | more
    slots = targets.mask.shape
    std, interval, converged, effective = values or (
        np.zeros((*slots, 3)),
        np.zeros((*slots, 3, 4)),
        np.zeros(slots, bool),
        np.zeros(slots),
    )
    return Solved(
        targets=targets,
        std=std,
        interval=interval,
        converged=converged,
        effective_sample_size=effective,
        count_probability=_count_probability(counted, num_frames, max_targets),
        truncated=over | crowded,
        observation=observation,
        source=windows.frame_sources(targets, known.sigma, observation.counts),
    )


def fitted(
    observation: Observation,
    start: Targets,
    known: Known,
    *,
    num_free_slots: int,
    widest: float | None = None,
) -> tuple[list[tuple[Windows, Fit]], np.ndarray]:
    """Fits of all windows at the start's counts.

    Args:
      observation: B whole frames, NumPy arrays.
      start: of each frame, `Targets` (B, K, ...).
      known: PSF, gain and scene prior.
      num_free_slots: of each window.
      widest: as of `windows.cut`.

    Returns:
      The windows with their fits, and (B,) bool: a group was too crowded for any window.
    """
    shapes = windows.fit_shapes(float(np.max(known.sigma)) if widest is None else widest)
    how = {"sigma": known.sigma, "widest": widest, "num_free_slots": num_free_slots}
    cuts, crowded = windows.cut(observation, start, shapes, **how)
    fit = partial(_select, only_add=False)  # the program that compares counts, too
    return [(w, _run(fit, w, known, np.False_).fit) for w in cuts], crowded


def selected(
    observation: Observation, start: Targets, known: Known, *, greedy: bool, max_targets: int
) -> tuple[list[tuple[Windows, Selected]], np.ndarray]:
    """Fits with their counts selected; frames that lack targets or slots are done again.

    Args:
      observation: B whole frames, NumPy arrays.
      start: of each frame, `Targets` (B, K, ...).
      known: PSF, gain and scene prior.
      greedy: only add targets, one at a time.
      max_targets: most targets of a frame.

    Returns:
      The windows with their fits, and (B,) bool: a group was too crowded for any window.
    """
    num_frames = len(observation.counts)
    shapes = windows.fit_shapes(float(np.max(known.sigma)))
    start = _with_missed(observation, start, known, max_targets)
    todo = np.arange(num_frames)
    done: list[tuple[Windows, Selected]] = []
    crowded = np.zeros(num_frames, bool)
    for last in [False] * (_SEARCHES - 1) + [True]:
        some = take_rows(observation, todo)
        cuts, full = windows.cut(some, start, shapes, sigma=known.sigma, num_free_slots=1)
        crowded[todo] |= full
        counted = [(w, _run(partial(_select, only_add=greedy), w, known, np.True_)) for w in cuts]
        found = joined([(w, s.fit) for w, s in counted], len(todo), max_targets)
        more = _with_missed(some, found, known, max_targets)
        unfinished = more.mask.sum(1) > found.mask.sum(1)
        for w, s in counted:  # no slot left to add another target: a larger window has some
            unfinished[w.frame[s.fit.targets.mask.all(1)]] = True
        again = np.flatnonzero(unfinished) if not last else todo[:0]
        kept = ~np.isin(np.arange(len(todo)), again)
        for w, s in counted:
            w, s = take_rows((w, s), np.flatnonzero(kept[w.frame]))
            done.append((w._replace(frame=todo[w.frame]), s))
        todo, start = todo[again], take_rows(more, again)
        if not len(todo):
            break
    return done, crowded


def sampled(
    observation: Observation,
    targets: Targets,
    known: Known,
    *,
    seed: int,
) -> tuple[list[tuple[Windows, Posterior]], np.ndarray]:
    """Posteriors of all windows at the counts of the targets.

    Args:
      observation: B whole frames, NumPy arrays.
      targets: of each frame, `Targets` (B, K, ...), best those of a fit.
      known: PSF, gain and scene prior.
      seed: of the chains.

    Returns:
      The windows with their posteriors, and (B,) bool: a group was too crowded for any.
    """
    shapes = windows.exact_shapes(float(np.max(known.sigma)))
    cuts, crowded = windows.cut(observation, targets, shapes, sigma=known.sigma)
    return [(w, sampled_windows(w, known, seed=seed)) for w in cuts], crowded


def sampled_windows(w: Windows, known: Known, *, seed: int, width_slope: bool = False) -> Posterior:
    """`sampler.sample` of windows of one shape, in blocks of one size.

    Those whose chains disagree are gathered into new blocks, so that few slow ones do not cost
    all others their time.
    """
    told = known, np.uint32(seed)
    run = partial(_turn, width_slope=width_slope)
    todo = np.arange(len(w.frame))
    chains = _run(_begin, w, *told)
    answer: Any = None
    for number in range(sampler.NUM_TURNS):
        new, chains = _run(run, take_rows(w, todo), *told, np.int32(number), more=chains)
        answer = new if answer is None else put_rows(answer, todo, new)
        on = np.flatnonzero(~new.converged)
        todo, chains = todo[on], take_rows(chains, on)
        if not len(todo):
            break
    return answer


def _run(function: Callable[..., Any], w: Windows, *shared: Any, more: Any = ()) -> Any:
    """`function((windows, targets, more), *shared)`; blocks are filled up with empty windows.

    Those are quickly done: there is nothing to see, nor to doubt.
    """
    number = len(w.targets.mask)
    size = windows_per_block()
    index = np.arange(-(-number // size) * size)
    there = index < number
    seen, targets, more = take_rows((w.observation, w.targets, more), np.where(there, index, 0))
    seen = dataclasses.replace(seen, valid=seen.valid & there[:, None, None])
    targets = dataclasses.replace(targets, mask=targets.mask & there[:, None])
    answer = in_blocks(function, (seen, targets, more), *shared, size=size)
    return take_rows(answer, index[there])


_Given = tuple[Observation, Targets, Any]


@partial(jax.jit, static_argnames="only_add")
def _select(given: _Given, known: Known, compare: Any, *, only_add: bool) -> Selected:
    return program.select(*given[:2], known, only_add=only_add, compare=compare)


@jax.jit
def _begin(given: _Given, known: Known, seed: jax.Array) -> sampler.Chains:
    return sampler.begin(*given[:2], known, jax.random.key(seed))


@partial(jax.jit, static_argnames="width_slope")
def _turn(
    given: _Given, known: Known, seed: jax.Array, number: jax.Array, *, width_slope: bool
) -> tuple[Posterior, sampler.Chains]:
    key = jax.random.key(seed)
    return sampler.turn(*given, known, key, number, width_slope=width_slope)


@jax.jit
def _remeasure(given: tuple[Observation, Any, Any], gain: Any) -> Observation:
    return observing.remeasured(*given, gain)


def _remeasured(observation: Observation, targets: Targets, known: Known) -> Observation:
    """`observation.remeasured` with these targets, block by block."""
    source = windows.frame_sources(targets, known.sigma, observation.counts)
    number = targets.mask.sum(1).astype(source.dtype)
    size = frames_per_block(source.shape[1:])
    return in_blocks(_remeasure, (observation, source, number), known.gain, size=size)


def _with_missed(
    observation: Observation, targets: Targets, known: Known, max_targets: int
) -> Targets:
    """The targets, and the peaks of what they leave unexplained."""
    source = windows.frame_sources(targets, known.sigma, observation.counts)
    # A saturated pixel tells nothing of what is missing there but that something may be.
    valid = observation.valid & ~observation.saturated
    left = dataclasses.replace(observation, neighbours=source, valid=valid)
    peaks = peaks_of(left, known, max_targets=max_targets)
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b], 1), targets, peaks)
    order = np.argsort(~joined.mask, axis=1, kind="stable")[:, :max_targets]
    return from_arrays(
        np.take_along_axis(joined.position, order[..., None], 1),
        np.take_along_axis(joined.intensity, order, 1),
        np.take_along_axis(joined.mask, order, 1),
    )


def joined(parts: list[tuple[Windows, Fit]], num_frames: int, max_targets: int) -> Targets:
    """Fitted targets of frames, without what is known about them."""
    return windows.join([(w, fit.targets, ()) for w, fit in parts], num_frames, max_targets)[0]


def _fit_values(fit: Fit) -> tuple[np.ndarray, ...]:
    """Values per target of a fit, as `Solved` has them."""
    slots = fit.targets.mask.shape
    std = np.asarray(fit.std)
    centre = np.concatenate([fit.targets.position, fit.targets.intensity[..., None]], -1)
    interval = centre[..., None] + std[..., None] * np.array([-2.0, -1.0, 1.0, 2.0])
    converged = np.broadcast_to(np.asarray(fit.converged)[:, None], slots)
    return std, interval.astype(std.dtype), converged, np.full(slots, np.inf, std.dtype)


def _mean_values(posterior: Posterior) -> tuple[Any, ...]:
    """Values per target of a posterior, as `Solved` has them."""
    slots = posterior.targets.mask.shape
    converged = np.broadcast_to(np.asarray(posterior.converged)[:, None], slots)
    effective = np.broadcast_to(np.asarray(posterior.effective_sample_size)[:, None], slots)
    return posterior.std, posterior.interval, converged, effective


def _uncounted(fit: Fit) -> Selected:
    slots = fit.targets.mask.shape[-1] + 1
    chosen = fit.targets.mask.sum(-1)[:, None] == np.arange(slots)
    return Selected(fit, np.where(chosen, 0.0, -np.inf))  # type: ignore[arg-type]


def _count_probability(
    counted: list[tuple[Windows, Selected]], num_frames: int, max_targets: int
) -> np.ndarray:
    """(B, K+1) probabilities of each number of targets, group by group.

    What is above K is counted as K.
    """
    total = np.zeros((num_frames, max_targets + 1))
    total[:, 0] = 1
    for w, of_windows in counted:
        table = np.array(of_windows.log_evidence, float)
        # Where every count was impossible, the one that was kept is certain.
        never = np.flatnonzero(~np.isfinite(table.max(1)))
        table[never, np.asarray(of_windows.fit.targets.mask)[never].sum(1)] = 0
        share = np.exp(table - table.max(1, keepdims=True))
        share = share / share.sum(1, keepdims=True)
        order = np.argsort(w.frame, kind="stable")
        frame = w.frame[order]
        rank = np.arange(len(frame)) - np.searchsorted(frame, frame)
        for turn in range(rank.max(initial=-1) + 1):
            at = order[rank == turn]
            before = total[w.frame[at]]
            after = np.zeros_like(before)
            for number in range(share.shape[1]):
                fitting = max(max_targets + 1 - number, 0)
                after[:, number:] += share[at, number, None] * before[:, :fitting]
                after[:, -1] += share[at, number] * before[:, fitting:].sum(1)
            total[w.frame[at]] = after
    return total
