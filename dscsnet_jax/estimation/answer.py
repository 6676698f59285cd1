"""Answer: what `unmix` returns, with its flags and goodness of fit."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import ndimage

from dscsnet_jax.estimation.observe import Observation
from dscsnet_jax.estimation.offgrid import Solved
from dscsnet_jax.estimation.prior import ScenePrior
from dscsnet_jax.estimation.windows import frame_sources
from dscsnet_jax.physics.targets import Targets

_EDGE_SIGMAS = 3.0  # closer to the border than this, part of the PSF is cut off
_UNRESOLVED_PIXELS = 0.5  # in sigmas of the PSF
_UNRESOLVED_GAP = 2.0  # in standard deviations
_SEPARATION_SLACK = 0.1  # pixels below the prior's least distance
_UNEXPLAINED = 5.0  # standard deviations of chi square


@dataclasses.dataclass(frozen=True)
class Unmixed:
    """Targets of B frames with what is known about them, as NumPy arrays.

    Attributes:
      targets: `Targets` of (B, K, ...): positions in pixels, intensities in counts.
      std: (B, K, 3) standard deviations of row, col (pixels) and intensity (counts); inf
        where the frame does not decide, NaN for the method `grid`, which gives none.
      interval: (B, K, 3, 4) quantiles of row, col and intensity, at one and two standard
        deviations of a Gaussian (2.3, 15.9, 84.1 and 97.7 %); NaN for `grid`.
      count_probability: (B, K+1) probability of each number of targets among those that
        were compared, the last of K or more; NaN for `grid`.
      residual: (B,) root mean square of frame minus model over the valid pixels, counts.
      chi_square: (B,) mean over the valid pixels of the squared residual over its
        variance: about 1 where the model explains the frame; NaN for `grid`.
      effective_size: (B, K) effective number of posterior samples; inf without sampling.
      background, noise: (B,) as given or estimated, counts.
      sigma: (B, 2) PSF standard deviations as given or fitted, pixels.
      near_edge: (B, K) bool, target so close to the border that its PSF is cut off.
      saturated: (B, K) bool, a pixel within one pixel of the target is saturated.
      unresolved: (B, K) bool, target that cannot be told from its neighbour, or is
        probably several.
      not_converged: (B, K) bool, the fit or its chains did not settle.
      unexplained: (B,) bool, the residual is larger than the noise.
      truncated: (B,) bool, more targets than `max_targets`: the weakest are missing.
      invalid: (B,) bool, the frame had NaN or Inf pixels that were left out.
      maps: (B, cN, cM) sub-pixel maps, counts; None unless asked for.
    """

    targets: Targets
    std: np.ndarray
    interval: np.ndarray
    count_probability: np.ndarray
    residual: np.ndarray
    chi_square: np.ndarray
    effective_size: np.ndarray
    background: np.ndarray
    noise: np.ndarray
    sigma: np.ndarray
    near_edge: np.ndarray
    saturated: np.ndarray
    unresolved: np.ndarray
    not_converged: np.ndarray
    unexplained: np.ndarray
    truncated: np.ndarray
    invalid: np.ndarray
    maps: np.ndarray | None = None

    def status(self) -> np.ndarray:
        """(B, K) text: `ok`, or the flags that hold, joined by `|`; empty where no target."""
        shape = self.near_edge.shape
        names = ("near_edge", "saturated", "unresolved", "not_converged")
        flags = {name: getattr(self, name) for name in names}
        for name in ("unexplained", "truncated", "invalid"):
            flags[name] = np.broadcast_to(getattr(self, name)[:, None], shape)
        text = np.full(shape, "", dtype=object)
        for name, flag in flags.items():
            text = np.where(flag, text + np.where(text == "", "", "|") + name, text)
        text = np.where(text == "", "ok", text)
        return np.where(np.asarray(self.targets.mask), text, "").astype(str)


def grid_answer(
    observation: Observation,
    targets: Targets,
    truncated: np.ndarray,
    invalid: np.ndarray,
    maps: np.ndarray | None,
) -> Unmixed:
    """The read-out itself, without errors."""
    slots = targets.mask.shape
    shape = observation.counts.shape[1:]
    source = frame_sources(observation, targets)
    return Unmixed(
        targets=targets,
        std=np.full((*slots, 3), np.nan),
        interval=np.full((*slots, 3, 4), np.nan),
        count_probability=np.full((slots[0], slots[1] + 1), np.nan),
        residual=_residual(observation, source),
        chi_square=np.full(slots[0], np.nan),
        effective_size=np.full(slots, np.inf),
        background=observation.background,
        noise=observation.noise,
        sigma=observation.sigma,
        near_edge=_near_edge(targets, shape, observation.sigma),
        saturated=_near_saturated(targets, observation.saturated),
        unresolved=np.zeros(slots, bool),
        not_converged=np.zeros(slots, bool),
        unexplained=np.zeros(slots[0], bool),
        truncated=truncated,
        invalid=invalid,
        maps=maps,
    )


def solved_answer(
    solved: Solved,
    prior: ScenePrior,
    truncated: np.ndarray,
    invalid: np.ndarray,
    maps: np.ndarray | None,
) -> Unmixed:
    """Flags and goodness of fit of a solution."""
    seen, targets = solved.observation, solved.targets
    shape = seen.counts.shape[1:]
    chi_square, expected_spread = _chi_square(seen, solved.source)
    return Unmixed(
        targets=targets,
        std=solved.std,
        interval=solved.interval,
        count_probability=solved.count_probability,
        residual=_residual(seen, solved.source),
        chi_square=chi_square,
        effective_size=solved.effective_size,
        background=seen.background,
        noise=seen.noise,
        sigma=seen.sigma,
        near_edge=_near_edge(targets, shape, seen.sigma),
        saturated=_near_saturated(targets, seen.saturated),
        unresolved=_unresolved(targets, solved.std, prior, seen.sigma),
        not_converged=np.asarray(targets.mask) & ~solved.converged,
        unexplained=chi_square > 1 + _UNEXPLAINED * expected_spread,
        truncated=truncated | solved.truncated,
        invalid=invalid,
        maps=maps,
    )


def _residual(observation: Observation, source: np.ndarray) -> np.ndarray:
    """(B,) root mean square residual of the valid, unsaturated pixels, counts."""
    used = observation.valid & ~observation.saturated
    left = observation.counts - observation.background[:, None, None] - source
    return np.sqrt((left**2).sum((1, 2), where=used) / np.maximum(used.sum((1, 2)), 1))


def _chi_square(observation: Observation, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B,) chi square per pixel, and its standard deviation if the noise is all there is."""
    used = observation.valid & ~observation.saturated
    left = observation.counts - observation.background[:, None, None] - source
    gain = observation.gain[:, None, None]
    variance = observation.noise[:, None, None] ** 2 + np.maximum(source, 0) / gain
    number = np.maximum(used.sum((1, 2)), 1)
    return (left**2 / variance).sum((1, 2), where=used) / number, np.sqrt(2 / number)


def _unresolved(
    targets: Targets, std: np.ndarray, prior: ScenePrior, sigma: np.ndarray
) -> np.ndarray:
    """(B, K): a broad place, a neighbour within the errors, or no such scene as the prior's."""
    mask, position = np.asarray(targets.mask), np.asarray(targets.position)
    spread = np.sqrt((std[..., :2] ** 2).sum(-1))
    apart = np.sqrt(((position[:, :, None] - position[:, None, :]) ** 2).sum(-1))
    other = mask[:, :, None] & mask[:, None, :] & ~np.eye(mask.shape[1], dtype=bool)
    error = np.sqrt(spread[:, :, None] ** 2 + spread[:, None, :] ** 2) / 2**0.5
    too_close = apart < float(prior.separation) - _SEPARATION_SLACK
    blended = (other & ((apart < _UNRESOLVED_GAP * error) | too_close)).any(-1)
    broad = ~(spread < _UNRESOLVED_PIXELS * sigma.mean(-1)[:, None] * 2**0.5)
    found = blended | broad
    if prior.intensity is not None:
        brightest = float(prior.intensity[1])
        found |= np.asarray(targets.intensity) > brightest + 3 * std[..., 2]
    return mask & found


def _near_edge(targets: Targets, shape: tuple[int, ...], sigma: np.ndarray) -> np.ndarray:
    position = np.asarray(targets.position)
    reach = _EDGE_SIGMAS * sigma[:, None]
    low, high = -0.5 + reach, np.array(shape) - 0.5 - reach
    outside = (position < low) | (position > high)
    return outside.any(-1) & np.asarray(targets.mask)


def _near_saturated(targets: Targets, saturated: np.ndarray) -> np.ndarray:
    """(B, K): a pixel of the 3 x 3 around the target is saturated."""
    around = ndimage.maximum_filter(saturated, (1, 3, 3), mode="constant")
    pixel = np.rint(np.asarray(targets.position)).astype(int)
    pixel = np.clip(pixel, 0, np.array(saturated.shape[1:]) - 1)
    frame = np.arange(len(saturated))[:, None]
    return around[frame, pixel[..., 0], pixel[..., 1]] & np.asarray(targets.mask)
