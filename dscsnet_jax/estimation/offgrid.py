"""Offgrid: from the read-out's targets to fitted, counted and averaged ones.

windows around groups of targets -> refine -> count -> [what was missed] -> posterior

Works on whole sets of frames; every step runs on windows of a few fixed shapes.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import optimize

from dscsnet_jax.estimation import windows
from dscsnet_jax.estimation.blocks import frames_per_block, in_blocks, take_rows
from dscsnet_jax.estimation.counts import Selected, select_count
from dscsnet_jax.estimation.detect import peaks_of
from dscsnet_jax.estimation.observe import Observation, observe
from dscsnet_jax.estimation.posterior import sample_posterior
from dscsnet_jax.estimation.prior import ScenePrior, least_energy
from dscsnet_jax.estimation.refine import Fit, refine_frames
from dscsnet_jax.physics.targets import Targets, from_arrays

ESTIMATES = ("mean", "map")
_WIDTH_REACHES = (0.3, 0.1)  # of the factor's logarithm, in each pass
_WIDTH_STEP = 0.02  # of the factor's logarithm, for the slope's own slope
_SEARCHES = 3  # for targets that the start had missed, and for room
_CLIP = 4.0  # standard deviations
_LEAST_OF_GUESS = 0.5  # a fit of few pixels may leave next to nothing


class Solved(NamedTuple):
    """Targets of B frames off the grid, with what is known about them, as NumPy arrays.

    Attributes:
      targets: `Targets` (B, K, ...), brightest first.
      std: (B, K, 3) standard deviations of row, col (pixels) and intensity (counts).
      interval: (B, K, 3, 4) quantiles of the posterior (`posterior.LEVELS`), or those of
        a Gaussian.
      converged: (B, K) bool, the fit of the target's window found its minimum, and the
        chains agree.
      effective_size: (B, K) effective number of samples; inf without sampling.
      count_probability: (B, K+1) of each number of targets.
      truncated: (B,) bool, targets are missing for want of slots.
      observation: noise and background as given or estimated.
      source: (B, N, M) expected counts of the targets.
    """

    targets: Targets
    std: np.ndarray
    interval: np.ndarray
    converged: np.ndarray
    effective_size: np.ndarray
    count_probability: np.ndarray
    truncated: np.ndarray
    observation: Observation
    source: np.ndarray


def solve(
    observation: Observation,
    start: Targets,
    prior: ScenePrior,
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
      prior: what is known of the scene.
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
    """
    if estimate not in ESTIMATES:
        raise ValueError(f"unknown estimate {estimate!r}; choose one of {', '.join(ESTIMATES)}")
    observation, start = jax.tree.map(np.asarray, (observation, start))
    num_frames = len(observation.counts)
    room = max(max_targets, start.mask.shape[1])
    wide = partial(windows.join, num_frames=num_frames, max_targets=room)
    if estimate_noise:
        parts, _ = _fitted(observation, start, prior, spare=1)
        start = wide([(w, f.targets, ()) for w, f in parts])[0]
        observation = _remeasured(observation, start)
    if fixed_count:
        parts, crowded = _fitted(observation, start, prior, spare=0)
        counted = [(w, _uncounted(f)) for w, f in parts]
    else:
        counted, crowded = _counted(observation, start, prior, greedy, room)
    fits = [(w, s.fit) for w, s in counted]
    targets, values, over = windows.join(
        [(w, f.targets, _fit_values(f)) for w, f in fits], num_frames, max_targets
    )
    probability = _count_probability(counted, num_frames, max_targets)
    if estimate == "mean":
        if from_start:
            targets = wide([(w, w.targets, _fit_values(f)) for w, f in fits])[0]
        means, more = _sampled(observation, targets, prior, values, seed)
        targets, values, _ = windows.join(means, num_frames, max_targets)
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
        effective_size=effective,
        count_probability=probability,
        truncated=over | crowded,
        observation=observation,
        source=windows.frame_sources(observation, targets),
    )


def fit_width(
    observation: Observation,
    start: Targets,
    prior: ScenePrior,
    *,
    greedy: bool = False,
    seed: int = 0,
) -> tuple[Observation, Targets]:
    """Fit one factor of the PSF's width, common to all frames, with the targets.

    For each trial width all targets are fitted anew; the width with the largest Laplace
    evidence is taken. (The likelihood alone prefers narrow PSFs: noise drives the places of
    blended targets apart.) As a wrong width asks for wrong counts, counts are selected in
    between. Laplace's evidence ignores the prior's hard limits and is then some 1 % narrow:
    where there are any, the slope by the width of posterior chains is brought to zero at last.

    Args:
      observation: B frames with a first guess of the width.
      start: their targets.
      prior: what is known of the scene.
      greedy: as in `solve`.
      seed: of the posterior chains.

    Returns:
      The observation with the fitted width, and the targets.

    Raises:
      ValueError: if there is no target to fit it to.
    """
    observation, start = jax.tree.map(np.asarray, (observation, start))
    guess, slots = observation.sigma, start.mask.shape[1]
    # Costs compare over the same pixels only: windows of the largest width for all.
    largest = _largest_sigma(observation) * float(np.exp(sum(_WIDTH_REACHES)))

    def widened(log_factor: float) -> Observation:
        return dataclasses.replace(
            observation, sigma=(guess * np.exp(log_factor)).astype(guess.dtype)
        )

    log_factor = 0.0
    for reach in _WIDTH_REACHES:
        counted, _ = _counted(widened(log_factor), start, prior, greedy, slots)
        start = windows.join([(w, s.fit.targets, ()) for w, s in counted], len(guess), slots)[0]
        if not start.mask.any():
            raise ValueError("without targets the width of the PSF cannot be fitted")

        def cost(trial: float, start: Targets = start) -> float:
            parts, _ = _fitted(widened(trial), start, prior, spare=1, sigma=largest)
            spent = (fit.cost + fit.log_determinant / 2 for _, fit in parts)
            return float(sum(one.sum(dtype=float) for one in spent))

        bounds = (log_factor - reach, log_factor + reach)
        log_factor = optimize.minimize_scalar(
            cost, bounds=bounds, method="bounded", options={"xatol": 1e-4, "maxiter": 20}
        ).x

    if prior.intensity is None and prior.extent is None and float(prior.separation) == 0:
        return widened(log_factor), start

    def slope(trial: float) -> float:
        parts, _ = _fitted(widened(trial), start, prior, spare=1, sigma=largest)
        chains = (
            sample_posterior(w.observation, fit.targets, prior, width_slope=True, seed=seed)
            for w, fit in parts
        )
        return float(sum(chain.width_slope.sum(dtype=float) for chain in chains))

    trials = log_factor, log_factor + _WIDTH_STEP
    first, second = map(slope, trials)
    if first > second:  # the evidence has its maximum where the slope falls through zero
        reach = _WIDTH_REACHES[-1]
        move = float(np.clip(first / (first - second) * _WIDTH_STEP, -reach, reach))
        log_factor += move
    return widened(log_factor), start


def _fitted(
    observation: Observation,
    start: Targets,
    prior: ScenePrior,
    *,
    spare: int,
    sigma: float | None = None,
) -> tuple[list[tuple[windows.Windows, Fit]], np.ndarray]:
    """Fits of all windows, and (B,) where a group was too crowded for any.

    The windows are those of PSFs of width `sigma`, or of the frames'.
    """
    sigma = _largest_sigma(observation) if sigma is None else sigma
    cuts, crowded = windows.cut(
        observation, start, windows.fit_shapes(sigma), spare=spare, sigma=sigma
    )
    return [(w, refine_frames(w.observation, w.targets, prior)) for w in cuts], crowded


def _counted(
    observation: Observation, start: Targets, prior: ScenePrior, greedy: bool, max_targets: int
) -> tuple[list[tuple[windows.Windows, Selected]], np.ndarray]:
    """Fits with their counts selected; frames that lack targets or slots are done again."""
    num_frames = len(observation.counts)
    start = _with_missed(observation, start, prior, max_targets)
    todo = np.arange(num_frames)
    done: list[tuple[windows.Windows, Selected]] = []
    crowded = np.zeros(num_frames, bool)
    for last in [False] * (_SEARCHES - 1) + [True]:
        some = take_rows(observation, todo)
        parts, full = _fitted(some, start, prior, spare=1)
        crowded[todo] |= full
        counted = [
            (w, select_count(w.observation, fit, prior, only_add=greedy)) for w, fit in parts
        ]
        found, _, _ = windows.join(
            [(w, s.fit.targets, ()) for w, s in counted], len(todo), max_targets
        )
        more = _with_missed(some, found, prior, max_targets)
        unfinished = more.mask.sum(1) > found.mask.sum(1)
        for w, s in counted:  # no slot left to add another target: a larger window has some
            unfinished[w.frame[np.asarray(s.fit.targets.mask).all(1)]] = True
        again = np.flatnonzero(unfinished) if not last else todo[:0]
        kept = ~np.isin(np.arange(len(todo)), again)
        for w, s in counted:
            of_kept = kept[w.frame]
            w, s = take_rows((w, s), np.flatnonzero(of_kept))
            done.append((w._replace(frame=todo[w.frame]), s))
        todo, start = todo[again], take_rows(more, again)
        if not len(todo):
            break
    return done, crowded


def _with_missed(
    observation: Observation, targets: Targets, prior: ScenePrior, max_targets: int
) -> Targets:
    """The targets, and the peaks of what they leave unexplained."""
    source = windows.frame_sources(observation, targets)
    left = dataclasses.replace(
        observation, counts=(observation.counts - source).astype(source.dtype)
    )
    # A saturated pixel tells nothing of what is missing there but that something may be.
    left = dataclasses.replace(left, valid=left.valid & ~left.saturated)
    least = least_energy(prior)
    peaks = peaks_of(left, max_targets=max_targets, least_energy=least)
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b], 1), targets, peaks)
    order = np.argsort(~joined.mask, axis=1, kind="stable")[:, :max_targets]
    return from_arrays(
        np.take_along_axis(joined.position, order[..., None], 1),
        np.take_along_axis(joined.intensity, order, 1),
        np.take_along_axis(joined.mask, order, 1),
    )


def _remeasured(observation: Observation, targets: Targets) -> Observation:
    """Noise and background from the residual; what was known stays.

    Without targets to be afraid of, all pixels within some standard deviations of the
    first measurement are used, less those that the fit has used up.
    """
    used = observation.valid & ~observation.saturated
    left = np.where(used, observation.counts - windows.frame_sources(observation, targets), 0)
    size = frames_per_block(observation.counts.shape[1:])
    first = in_blocks(_remeasure, (left, used), size=size)
    near = np.abs(left - first.background[:, None, None]) <= _CLIP * first.noise[:, None, None]
    near = near & used
    number = np.maximum(near.sum((1, 2)), 1)
    level = (left * near).sum((1, 2)) / number
    square = ((left - level[:, None, None]) ** 2).sum((1, 2), where=near)
    freedom = np.maximum(number - 1 - 3 * targets.mask.sum(1), number / 2)
    whole = (observation.counts == np.round(observation.counts)) | observation.saturated
    rounding = np.where(whole.all((1, 2)), 12**-0.5, 0)
    noise = np.maximum(np.sqrt(square / freedom), rounding)
    peak = np.abs(left).max((1, 2), initial=0)
    noise = np.where(noise > 0, noise, np.where(peak > 0, peak, 1)).astype(left.dtype)
    unknown = observation.background_std > 0
    error = noise / np.sqrt(number)
    return dataclasses.replace(
        observation,
        noise=np.maximum(noise, _LEAST_OF_GUESS * observation.noise),
        background=np.where(unknown, level, observation.background).astype(noise.dtype),
        background_std=np.where(unknown, error, 0).astype(noise.dtype),
    )


@jax.jit
def _remeasure(frames: tuple[jax.Array, jax.Array]) -> Observation:
    left, used = frames
    return observe(left, sigma=1.0, valid=used)


def _sampled(
    observation: Observation,
    targets: Targets,
    prior: ScenePrior,
    values: list[np.ndarray],
    seed: int,
) -> tuple[list[tuple[windows.Windows, Targets, tuple[Any, ...]]], np.ndarray]:
    """Posterior means of all windows, with their values per target."""
    shapes = windows.exact_shapes(_largest_sigma(observation))
    cuts, crowded = windows.cut(observation, targets, shapes)
    fine = np.zeros(len(crowded), bool)
    if values:
        fine = np.asarray(values[2].all(1, where=np.asarray(targets.mask)))
    parts = []
    for w in cuts:
        answer = sample_posterior(w.observation, w.targets, prior, seed=seed)
        slots = w.targets.mask.shape
        settled = np.broadcast_to((answer.mixed & fine[w.frame])[:, None], slots)
        size = np.broadcast_to(answer.effective_size[:, None], slots)
        parts.append((w, answer.targets, (answer.std, answer.interval, settled, size)))
    return parts, crowded


def _fit_values(fit: Fit) -> tuple[np.ndarray, ...]:
    """Values per target of a fit, as `Solved` has them."""
    slots = fit.targets.mask.shape
    std = np.asarray(fit.std)
    centre = np.concatenate([fit.targets.position, fit.targets.intensity[..., None]], -1)
    interval = centre[..., None] + std[..., None] * np.array([-2.0, -1.0, 1.0, 2.0])
    settled = np.broadcast_to(fit.converged[:, None], slots)
    return std, interval.astype(std.dtype), settled, np.full(slots, np.inf, std.dtype)


def _uncounted(fit: Fit) -> Selected:
    slots = fit.targets.mask.shape[-1] + 1
    chosen = fit.targets.mask.sum(-1)[:, None] == np.arange(slots)
    return Selected(fit, np.where(chosen, 0.0, -np.inf))


def _count_probability(
    counted: list[tuple[windows.Windows, Selected]], num_frames: int, max_targets: int
) -> np.ndarray:
    """(B, K+1) probabilities of each number of targets, group by group.

    What is above K is counted as K.
    """
    total = np.zeros((num_frames, max_targets + 1))
    total[:, 0] = 1
    for w, selected in counted:
        table = np.array(selected.log_evidence, float)
        # Where every count was impossible, the one that was kept is certain.
        never = np.flatnonzero(~np.isfinite(table.max(1)))
        table[never, np.asarray(selected.fit.targets.mask)[never].sum(1)] = 0
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


def _largest_sigma(observation: Observation) -> float:
    return float(observation.sigma.max(initial=0.1))
