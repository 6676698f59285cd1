"""Solve: from the read-out's targets to fitted, counted and averaged ones.

windows around groups of targets -> fit, select counts -> [what was missed] -> posterior

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
from dscsnet_jax.estimation.groups import components, linked, ranks, reach_of_groups
from dscsnet_jax.estimation.rivals import (
    Rivals,
    averaged,
    confidence,
    rivals_of,
    shares,
    within,
)
from dscsnet_jax.estimation.windows import Flat, Windows
from dscsnet_jax.inference import observation as observing
from dscsnet_jax.inference import search
from dscsnet_jax.inference.chains import Chains, begin
from dscsnet_jax.inference.fit import Fit
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.search import Selected
from dscsnet_jax.inference.summary import Posterior
from dscsnet_jax.inference.turn import NUM_TURNS, turn
from dscsnet_jax.maps.detect import peaks_of
from dscsnet_jax.physics.targets import Targets

_SEARCHES = 3  # for targets that the start had missed, and for room
_SWEEPS = 60  # most over the parts of groups that no window holds
_NONE = np.zeros(0, int)
_SETTLED = 0.05  # noise by which neighbours' light may still change


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
      confidence: (B, K) expected share of `summary.RADII` within which a target lies.
      crowded: (B, K) bool, the target's group was too large for a window, and was split.
      truncated: (B,) bool, targets are missing for want of slots.
      observation: noise and background as given or estimated.
      source: (B, N, M) expected counts of the targets.
      samples: (B, S, K, 3) of the posterior, row, col and intensity; None unless asked for.
    """

    targets: Targets
    std: np.ndarray
    interval: np.ndarray
    converged: np.ndarray
    effective_sample_size: np.ndarray
    count_probability: np.ndarray
    confidence: np.ndarray
    crowded: np.ndarray
    truncated: np.ndarray
    observation: Observation
    source: np.ndarray
    samples: np.ndarray | None = None


def solve(
    observation: Observation,
    start: Flat,
    known: Known,
    *,
    max_targets: int | None = None,
    estimate: str = "mean",
    estimate_noise: bool = False,
    greedy: bool = False,
    fixed_count: bool = False,
    keep_samples: bool = False,
    seed: int = 0,
) -> Solved:
    """Fit, count and average the targets of frames.

    Args:
      observation: B whole frames.
      start: first targets of the frames.
      known: PSF, sensor's gain and scene prior.
      max_targets: slots of the answer; None: as many as are found.
      estimate: `map`: the fit; `mean`: the posterior mean.
      estimate_noise: measure noise and background once more on the residual, where no
        target is left to disturb.
      greedy: only add targets, one at a time.
      fixed_count: keep the number of targets of the start.
      keep_samples: answer with the samples of the posterior.
      seed: of the chains.

    Returns:
      `Solved`.

    Raises:
      ValueError: for an unknown estimate, or samples of one that has none.

    Example:
      >>> from dscsnet_jax.estimation.windows import flat
      >>> from dscsnet_jax.inference.observation import observe
      >>> from dscsnet_jax.physics.optics import render
      >>> from dscsnet_jax.physics.preset import Sensor
      >>> from dscsnet_jax.physics.psf import Gaussian
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> truth = from_lists([[(5.0, 4.6, 240.0), (5.1, 5.4, 200.0)]])
      >>> sensor = Sensor(read_noise=1.0, background=0.0)
      >>> seen = observe(render(truth, frame_size=11, psf=0.5), sensor)
      >>> answer = solve(seen, flat(truth), Known(psf=Gaussian(0.5)), max_targets=4, estimate="map")
      >>> answer.targets.intensity.round().tolist()
      [[240.0, 200.0, 0.0, 0.0]]
    """
    if estimate not in ESTIMATES:
        raise ValueError(f"unknown estimate {estimate!r}; choose one of {', '.join(ESTIMATES)}")
    if keep_samples and estimate != "mean":
        raise ValueError(f"samples are those of the estimate 'mean', got {estimate!r}")
    observation = jax.tree.map(np.asarray, observation)
    num_frames = len(observation.counts)
    if estimate_noise:
        start = gathered(selected(observation, start, known, compare=False, greedy=greedy))
        observation = remeasured(observation, start, known)
    counted = selected(observation, start, known, compare=not fixed_count, greedy=greedy)
    parts = [(w, s.fit.targets, (*_fit_values(w, s.fit), *rivals_of(w, s))) for w, s in counted]
    found, values = windows.gather(parts)
    if estimate == "mean" and len(found.frame):
        posteriors = sampled(observation, found, known, seed=seed, keep_samples=keep_samples)
        means = [(w, p.targets, (*_mean_values(w, p), w.number)) for w, p in posteriors]
        begun, (chance, offset) = found, values[-2:]
        found, (*of_means, number) = windows.gather(means)
        shift = begun.position[number] - found.position, begun.intensity[number] - found.intensity
        offset = offset[number] + np.column_stack(shift)[:, None]
        values = [*of_means, chance[number], offset]
    if len(found.frame):
        values = _over_counts(values, float(np.mean(known.psf.width)))
    targets, values, truncated = windows.padded(found, values, num_frames, max_targets)
    slots = targets.mask.shape
    none = [np.zeros((*slots, *shape)) for shape in ((3,), (3, 4), (), (), (), (), (0, 3))]
    std, interval, confident, converged, effective, crowded, *samples = (
        values if len(found.frame) else none[: 6 + keep_samples]
    )
    return Solved(
        targets=targets,
        std=std,
        interval=interval,
        converged=converged.astype(bool),
        effective_sample_size=effective,
        count_probability=_count_probability(counted, num_frames, slots[1]),
        confidence=confident,
        crowded=crowded.astype(bool),
        truncated=truncated,
        observation=observation,
        source=windows.frame_sources(targets, known.psf, observation.counts),
        samples=np.swapaxes(samples[0], 1, 2) if samples else None,
    )


Counted = list[tuple[Windows, Selected]]


def selected(
    observation: Observation,
    start: Flat,
    known: Known,
    *,
    compare: bool = True,
    greedy: bool = False,
    widest: float | None = None,
    sweeps: int = _SWEEPS,
) -> Counted:
    """Fits of windows with their counts selected.

    Groups that lack targets or slots are done again, and so are those that were split, until
    the light that their parts tell each other has settled: at first with other counts, then
    with their own, and at last with others once more.

    Args:
      observation: B whole frames, NumPy arrays.
      start: first targets.
      known: PSF, sensor's gain and scene prior.
      compare: with other counts; else those of the start are kept.
      greedy: only add targets, one at a time.
      widest: as of `windows.cut`.
      sweeps: most turns over split groups.

    Returns:
      The windows with their fits.
    """
    reach = windows.widest_of(known.psf) if widest is None else widest
    cut = partial(windows.cut, shapes=windows.fit_shapes(reach), psf=known.psf, widest=widest)
    light = partial(windows.light_of, psf=known.psf, like=observation.counts)
    todo = windows.together(start, _missed(observation, start, known)) if compare else start
    run = partial(_run, partial(_select, only_add=greedy))
    done: Counted = []
    last = False
    for number in range(sweeps + 1):
        kept = gathered(done)
        before = light(windows.together(todo, kept))
        cuts = cut(observation, todo, num_free_slots=1, source=before)
        comparing = compare and (number < _SEARCHES or last)
        for w in cuts:
            done += _counted(run, w, known, comparing, begins=comparing and number == 0)
        if last or not done:
            break
        found = gathered(done)
        searching = compare and number < _SEARCHES - 1
        missed = _missed(observation, found, known) if searching else take_rows(found, _NONE)
        change = np.abs(light(found) - before)
        unfinished = np.concatenate([_unfinished(w, s, change, searching) for w, s in done])
        # Groups of all places that windows started from, of answers, and of what was missed.
        starts, window = _starts(done)
        places = windows.together(starts, found, missed)
        pairs = linked(places.position, places.frame, reach_of_groups(reach))
        group = components(pairs, len(places.frame))
        first, of_found, of_missed = np.split(group, np.cumsum([len(window), len(found.frame)]))
        again = np.zeros(len(group), bool)
        again[first[unfinished[window]]] = again[of_missed] = True
        if number == sweeps - 1 or not again.any():
            last = True  # once more with other counts, where parts were only fitted since
            again[:] = False
            again[first[np.concatenate([_only_fitted(w, s) for w, s in done])[window]]] = compare
            if not again.any():
                break
        todo = windows.together(take_rows(found, np.flatnonzero(again[of_found])), missed)
        settled = np.ones(len(unfinished), bool)
        settled[window[again[first]]] = False
        ends = np.cumsum([len(w.frame) for w, _ in done])[:-1]
        rows = [np.flatnonzero(part) for part in np.split(settled, ends)]
        done = [take_rows(part, some) for part, some in zip(done, rows, strict=True) if len(some)]
    return done


def _counted(
    run: Callable[..., Selected], w: Windows, known: Known, comparing: bool, *, begins: bool
) -> Counted:
    """Windows with their answers; in the beginning those near others are only fitted.

    The light of their neighbours as the start has it would ask for targets. Parts of a group have
    their nearest neighbours as guests; what is known of counts is of whole groups.
    """
    only = _near_others(w) & ~w.split & begins
    kinds = (
        (~only & ~w.split, known, comparing),
        (only, known, False),
        (w.split, known.of_parts(), comparing),
    )
    parts = [(take_rows(w, np.flatnonzero(rows)), *told) for rows, *told in kinds]
    return [(part, run(part, told, compare)) for part, told, compare in parts if len(part.frame)]


def _unfinished(w: Windows, s: Selected, change: np.ndarray, searching: bool) -> np.ndarray:
    """(W,) bool: no slot is left to add another target, or the other parts' light has changed."""
    full = np.asarray(s.fit.targets.mask).all(1) & searching
    moved = windows.highest(w, change) > _SETTLED * windows.noise_of(w)
    return full | (_near_others(w) & moved)


def _near_others(w: Windows) -> np.ndarray:
    """(W,) bool: a part of a group, or light of others falls into the window."""
    light = w.observation.neighbours.max((1, 2), initial=0)
    return w.split | (light > _SETTLED * windows.noise_of(w))


def _only_fitted(w: Windows, s: Selected) -> np.ndarray:
    """(W,) bool: seen with the light of others, and not compared with other counts."""
    return _near_others(w) & (np.isfinite(s.log_evidence).sum(1) <= 1)


def _starts(done: Counted) -> tuple[Flat, np.ndarray]:
    """The windows' own first targets, and the number of the window of each."""
    parts, number = [], 0
    for w, _ in done:
        index = number + np.arange(len(w.frame))
        parts.append((w, w.targets, (_each(w, index),)))
        number += len(index)
    starts, (window,) = windows.gather(parts)
    return starts, window


def sampled(
    observation: Observation,
    targets: Flat,
    known: Known,
    *,
    seed: int,
    keep_samples: bool = False,
) -> list[tuple[Windows, Posterior]]:
    """Posteriors of all windows at the counts of the targets.

    Args:
      observation: B whole frames, NumPy arrays.
      targets: best those of a fit.
      known: PSF, sensor's gain and scene prior.
      seed: of the chains.
      keep_samples: answer with them.

    Returns:
      The windows with their posteriors.
    """
    shapes = windows.exact_shapes(windows.widest_of(known.psf))
    cuts = windows.cut(observation, targets, shapes, psf=known.psf)
    run = partial(sampled_windows, known=known, seed=seed, keep_samples=keep_samples)
    return [(w, run(w)) for w in cuts]


def sampled_windows(
    w: Windows,
    known: Known,
    *,
    seed: int,
    psf_slope: bool = False,
    keep_samples: bool = False,
) -> Posterior:
    """`sampler.sample` of windows of one shape, in blocks of one size.

    Those whose chains disagree are gathered into new blocks, so that few slow ones do not cost
    all others their time.
    """
    told = known, np.uint32(seed)
    run = partial(_turn, psf_slope=psf_slope, keep_samples=keep_samples)
    todo = np.arange(len(w.frame))
    run_chains = partial(_run, of_chains=True)
    chains = run_chains(_begin, w, *told)
    answer: Any = None
    for number in range(NUM_TURNS):
        some = take_rows(w, todo)
        new, chains = run_chains(run, some, *told, np.int32(number), more=chains)
        answer = new if answer is None else put_rows(answer, todo, new)
        on = np.flatnonzero(~new.settled)
        todo, chains = todo[on], take_rows(chains, on)
        if not len(todo):
            break
    return answer


def _run(
    function: Callable[..., Any], w: Windows, *shared: Any, more: Any = (), of_chains: bool = False
) -> Any:
    """`function((windows, targets, more), *shared)`; blocks are filled up with empty windows.

    Those are quickly done: there is nothing to see, nor to doubt.
    """
    number = len(w.targets.mask)
    size = windows_per_block(of_chains=of_chains)
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
    return search.select(*given[:2], known, only_add=only_add, compare=compare)


@jax.jit
def _begin(given: _Given, known: Known, seed: jax.Array) -> Chains:
    return begin(*given[:2], known, jax.random.key(seed))


@partial(jax.jit, static_argnames=("psf_slope", "keep_samples"))
def _turn(
    given: _Given, known: Known, seed: jax.Array, number: jax.Array, **what: Any
) -> tuple[Posterior, Chains]:
    return turn(*given, known, jax.random.key(seed), number, **what)


@jax.jit
def _remeasure(given: tuple[Observation, Any, Any], noise: tuple[Any, Any]) -> Observation:
    return observing.remeasured(*given, *noise)


def remeasured(observation: Observation, targets: Flat, known: Known) -> Observation:
    """`observation.remeasured` with these targets, block by block."""
    source = windows.light_of(targets, known.psf, observation.counts)
    number = np.bincount(targets.frame, minlength=len(source)).astype(source.dtype)
    size = frames_per_block(source.shape[1:])
    noise = known.effective_gain, known.sensor.misfit
    return in_blocks(_remeasure, (observation, source, number), noise, size=size)


def _missed(observation: Observation, targets: Flat, known: Known) -> Flat:
    """Peaks of what the targets leave unexplained."""
    source = windows.light_of(targets, known.psf, observation.counts)
    # A saturated pixel tells nothing of what is missing there but that something may be.
    valid = observation.valid & ~observation.saturated
    left = dataclasses.replace(observation, neighbours=source, valid=valid)
    return windows.flat(peaks_of(left, known, max_targets=source[:1].size // 8))


def gathered(counted: Counted) -> Flat:
    """Fitted targets of frames, without what is known about them."""
    return windows.gather([(w, s.fit.targets, ()) for w, s in counted])[0]


def _fit_values(w: Windows, fit: Fit) -> tuple[np.ndarray, ...]:
    """Values per target of a fit, as `Solved` has them."""
    std = np.asarray(fit.std)
    centre = np.concatenate([fit.targets.position, fit.targets.intensity[..., None]], -1)
    interval = centre[..., None] + std[..., None] * np.array([-2.0, -1.0, 1.0, 2.0])
    effective = np.full(len(std), np.inf, std.dtype)
    by_window = (_each(w, a) for a in (fit.converged, effective, w.split))
    return std, interval.astype(std.dtype), within(std, np.zeros_like(std)), *by_window


def _mean_values(w: Windows, posterior: Posterior) -> tuple[Any, ...]:
    """Values per target of a posterior, as `Solved` has them."""
    of_windows = posterior.converged, posterior.effective_sample_size, w.split
    by_window = (_each(w, a) for a in of_windows)
    values = posterior.std, posterior.interval, posterior.confidence, *by_window
    if posterior.samples is None:
        return values
    place = np.pad(w.observation.origin, ((0, 0), (0, 1)))  # of the window in the frame
    return *values, np.swapaxes(posterior.samples, 1, 2) + place[:, None, None]


def _over_counts(values: list[np.ndarray], width: float) -> list[np.ndarray]:
    """Values per target, the last two those of their rivals, averaged over the counts."""
    std, interval, given, *others = values[:-2]
    rivals = Rivals(*values[-2:])
    return [*averaged(std, interval, rivals, width), confidence(given, std, rivals), *others]


def _each(w: Windows, of_windows: Any) -> np.ndarray:
    """Values (W,) of windows for each of their slots (W, K)."""
    return np.broadcast_to(np.asarray(of_windows)[:, None], w.targets.mask.shape)


def _count_probability(counted: Counted, num_frames: int, max_targets: int) -> np.ndarray:
    """(B, K+1) probabilities of each number of targets, group by group.

    What is above K is counted as K.
    """
    total = np.zeros((num_frames, max_targets + 1))
    total[:, 0] = 1
    for w, of_windows in counted:
        mask = np.asarray(of_windows.fit.targets.mask)
        # Guests are counted by their own windows.
        kept = windows.own(w, of_windows.fit.targets).sum(1)
        table = np.asarray(of_windows.log_evidence)
        column = np.arange(table.shape[1]) + (mask.sum(1) - kept)[:, None]
        table = np.pad(table, ((0, 0), (0, len(mask[0]))), constant_values=-np.inf)
        share = shares(np.take_along_axis(table, column, 1), kept)
        order = np.argsort(w.frame, kind="stable")
        frame = w.frame[order]
        rank = ranks(frame)
        for nth in range(rank.max(initial=-1) + 1):
            at = order[rank == nth]
            before = total[w.frame[at]]
            after = np.zeros_like(before)
            for number in range(share.shape[1]):
                fitting = max(max_targets + 1 - number, 0)
                after[:, number:] += share[at, number, None] * before[:, :fitting]
                after[:, -1] += share[at, number] * before[:, fitting:].sum(1)
            total[w.frame[at]] = after
    return total
