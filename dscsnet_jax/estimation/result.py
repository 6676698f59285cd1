"""Result: what `unmix` returns, with its flags and goodness of fit."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from dscsnet_jax.estimation.groups import linked, reach_of_groups
from dscsnet_jax.estimation.solve import Solved
from dscsnet_jax.estimation.windows import frame_sources, widest_of
from dscsnet_jax.inference import pixels
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.io.catalog import Catalog, FrameTable, as_arrow, as_astropy, from_targets
from dscsnet_jax.maps.network import root_mean_square
from dscsnet_jax.physics.targets import Targets

_EDGE_SIGMAS = 3.0  # closer to the border than this, part of the PSF is cut off
_UNRESOLVED_PIXELS = 0.5  # in sigmas of the PSF
_UNRESOLVED_GAP = 2.0  # in standard deviations
_SEPARATION_SLACK = 0.1  # pixels below the prior's least distance
_UNEXPLAINED = 5.0  # standard deviations of chi square
_OF_TARGETS = ("near_edge", "saturated", "unresolved", "not_converged", "crowded")
_OF_FRAMES = ("unexplained", "truncated", "invalid")
_SHOWN = 24  # lines of a table in a notebook


@dataclasses.dataclass(frozen=True)
class UnmixResult:
    """Targets of B frames with what is known about them, as NumPy arrays.

    Attributes:
      targets: `Targets` of (B, K, ...): positions in pixels, intensities in counts.
      std: (B, K, 3) standard deviations of row, col (pixels) and intensity (counts), averaged
        over the counts that remain plausible; inf where the frame does not decide, NaN for the
        method `grid`, which gives none.
      interval: (B, K, 3, 4) quantiles of row, col and intensity, at one and two standard
        deviations of a Gaussian (2.3, 15.9, 84.1 and 97.7 %); NaN for `grid`.
      count_probability: (B, K+1) probability of each number of targets among those that
        were compared, the last of K or more; NaN for `grid`.
      confidence: (B, K) expected share of the radii 0.05, 0.10 .. 0.25 pixels (those of CSO-mAP)
        within which a true target lies, counts that remain plausible included; NaN for `grid`.
      residual: (B,) root mean square of frame minus model over the valid pixels, counts.
      chi_square: (B,) mean over the valid pixels of the squared residual over its
        variance: about 1 where the model explains the frame; NaN for `grid`.
      effective_sample_size: (B, K) of the posterior's chains; inf without sampling.
      pedestal: (B,) electronic offset as given, or 0, counts.
      background, noise: (B,) as given (the mean of a map) or estimated, counts.
      sigma: (B, 2) widths of the PSF as given or fitted, pixels.
      near_edge: (B, K) bool, target so close to the border that its PSF is cut off.
      saturated: (B, K) bool, a pixel within one pixel of the target is saturated.
      unresolved: (B, K) bool, target that its neighbour blends with, or that is probably
        several.
      not_converged: (B, K) bool, the fit did not converge; of the posterior mean: its chains.
      unexplained: (B,) bool, the residual is larger than the noise.
      crowded: (B, K) bool, target of a group too large to be fitted at once: it was split.
      truncated: (B,) bool, more targets than `max_targets`: the weakest are missing.
      invalid: (B,) bool, the frame had NaN or Inf pixels that were left out, not known to be bad.
      start: (B,) text, where the first targets came from: `network`, `detection` or `prior`.
      known: what was known of optics, sensor and scene, the PSF as given or fitted.
      psf_parameters: of a fitted PSF by name: value and standard error; None: none was fitted.
      samples: (B, S, K, 3) of the posterior at the best count: row, col (pixels) and intensity
        (counts) of the targets, which may exchange their numbers; None unless asked for.
      maps: (B, cN, cM) sub-pixel maps, counts; None unless asked for.

    Example:
      >>> import dscsnet_jax as dj
      >>> y = dj.render(dj.from_lists([[(5.0, 4.7, 240.0)], []]), frame_size=11, psf=0.5)
      >>> answer = dj.unmix(y, dj.Known(sensor=dj.Sensor(read_noise=1.0)), estimate="map")
      >>> answer
      <UnmixResult: 1 target in 2 frames>
      >>> len(answer), answer[0].status().tolist()[0][0]
      (2, 'ok')
      >>> print(answer.to_table()["frame", "target", "intensity"])
      frame target intensity
                       ct
      ----- ------ ---------
          0      0     240.0
    """

    targets: Targets
    std: np.ndarray
    interval: np.ndarray
    count_probability: np.ndarray
    confidence: np.ndarray
    residual: np.ndarray
    chi_square: np.ndarray
    effective_sample_size: np.ndarray
    pedestal: np.ndarray
    background: np.ndarray
    noise: np.ndarray
    sigma: np.ndarray
    near_edge: np.ndarray
    saturated: np.ndarray
    unresolved: np.ndarray
    not_converged: np.ndarray
    crowded: np.ndarray
    unexplained: np.ndarray
    truncated: np.ndarray
    invalid: np.ndarray
    start: np.ndarray
    known: Known
    psf_parameters: dict[str, tuple[float, float]] | None = None
    samples: np.ndarray | None = None
    maps: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of frames, `B`."""
        return len(self.residual)

    def __getitem__(self, frames: int | slice | np.ndarray) -> UnmixResult:
        """The answer of some frames; of one frame with B = 1."""
        if isinstance(frames, int | np.integer):
            if not -len(self) <= frames < len(self):  # else iteration would not end
                raise IndexError(f"frame {frames} of {len(self)}")
            frames = slice(frames, frames + 1 or None)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        shared = {name: fields.pop(name) for name in ("known", "psf_parameters")}
        some = jax.tree.map(lambda a: np.asarray(a)[frames], fields)
        return UnmixResult(**some, **shared)

    def __repr__(self) -> str:
        """What it is, in a line."""
        sizes = (int(np.asarray(self.targets.mask).sum()), "target"), (len(self), "frame")
        targets, frames = (f"{number} {what}{'s' * (number != 1)}" for number, what in sizes)
        return f"<UnmixResult: {targets} in {frames}>"

    def _repr_html_(self) -> str:
        """Its table, as notebooks show it."""
        try:
            lines = self.to_table().pformat(max_lines=_SHOWN, html=True, show_unit=True)
        except ImportError:  # without the extra `catalog`
            lines = []
        return "\n".join([f"<p>{html.escape(repr(self))}</p>", *lines])

    def catalog(self, names: Sequence[str] | None = None) -> Catalog:
        """One row a target; frames have the names given, or their numbers."""
        if names is None:
            names = [str(number) for number in range(len(self))]
        return from_targets(
            names,
            self.targets,
            std=self.std,
            status=self.status(),
            confidence=self.confidence,
        )

    def frame_table(self, names: Sequence[str] | None = None) -> FrameTable:
        """One row a frame: its count with the runner-up, their probabilities, noise and status."""
        if names is None:
            names = [str(number) for number in range(len(self))]
        count = np.asarray(self.targets.count)
        rows = np.arange(len(self))
        chance = np.array(self.count_probability)
        own = chance[rows, count]
        chance[rows, count] = -1
        second = np.where(chance.max(1) > 0, chance.argmax(1), -1)  # NaN is not
        return FrameTable(
            frame=np.array(list(names), str),
            count=count.astype(int),
            probability=own,
            runner_up=second,
            runner_up_probability=np.where(second < 0, np.nan, chance[rows, second]),
            noise=np.asarray(self.noise, float),
            pedestal=np.asarray(self.pedestal, float),
            background=np.asarray(self.background, float),
            residual=np.asarray(self.residual, float),
            status=self.frame_status(),
        )

    def to_table(self, names: Sequence[str] | None = None) -> Any:
        """`catalog` as an `astropy.table.Table` with units; needs the extra `catalog`."""
        return as_astropy(self.catalog(names))

    def to_arrow(self, names: Sequence[str] | None = None) -> Any:
        """`catalog` as a `pyarrow.Table`; needs the extra `catalog`."""
        return as_arrow(self.catalog(names))

    def to_pandas(self, names: Sequence[str] | None = None) -> Any:
        """`catalog` as a `pandas.DataFrame`; needs the extra `catalog`."""
        return self.to_arrow(names).to_pandas()

    def status(self) -> np.ndarray:
        """(B, K) text: `ok`, or the flags that hold, joined by `|`; empty where no target."""
        mask = np.asarray(self.targets.mask)
        shape = mask.shape
        flags = {name: getattr(self, name) for name in _OF_TARGETS}
        flags |= {n: np.broadcast_to(getattr(self, n)[:, None], shape) for n in _OF_FRAMES}
        return np.where(mask, _joined(flags), "")

    def frame_status(self) -> np.ndarray:
        """(B,) text: `ok`, or the flags that hold for the frame or any target of it."""
        mask = np.asarray(self.targets.mask)
        flags = {name: (getattr(self, name) & mask).any(1) for name in _OF_TARGETS}
        return _joined(flags | {name: getattr(self, name) for name in _OF_FRAMES})


def _joined(flags: dict[str, np.ndarray]) -> np.ndarray:
    """Names of the flags that hold, joined by `|`; `ok` of none."""
    text = np.full(next(iter(flags.values())).shape, "", dtype=object)
    for name, flag in flags.items():
        text = np.where(flag, text + np.where(text == "", "", "|") + name, text)
    return np.where(text == "", "ok", text).astype(str)


def grid_result(
    observation: Observation,
    targets: Targets,
    known: Known,
    *,
    truncated: np.ndarray,
    maps: np.ndarray | None,
) -> UnmixResult:
    """The read-out itself, without errors.

    Args:
      observation: B whole frames, NumPy arrays.
      targets: read out, `Targets` (B, K, ...).
      known: PSF.
      truncated: (B,) bool, targets are missing.
      maps: (B, cN, cM) counts, or None.
    """
    frames, slots = len(targets.mask), targets.mask.shape
    source = frame_sources(targets, known.psf, observation.counts)
    return UnmixResult(
        std=np.full((*slots, 3), np.nan),
        interval=np.full((*slots, 3, 4), np.nan),
        count_probability=np.full((frames, slots[1] + 1), np.nan),
        confidence=np.full(slots, np.nan),
        chi_square=np.full(frames, np.nan),
        effective_sample_size=np.full(slots, np.inf),
        unresolved=np.zeros(slots, bool),
        not_converged=np.zeros(slots, bool),
        crowded=np.zeros(slots, bool),
        unexplained=np.zeros(frames, bool),
        truncated=truncated,
        start=np.full(frames, "network"),
        known=known,
        maps=maps,
        **_common(observation, targets, source, known),
    )


def solved_result(
    solved: Solved,
    known: Known,
    *,
    maps: np.ndarray | None = None,
    start: str = "network",
    psf_parameters: dict[str, tuple[float, float]] | None = None,
) -> UnmixResult:
    """Flags and goodness of fit of a solution.

    Args:
      solved: of B frames.
      known: PSF, sensor's gain and scene prior.
      maps: (B, cN, cM) counts, or None.
      start: where the first targets came from.
      psf_parameters: of a fitted PSF, with their errors.
    """
    chi_square, expected_spread = _chi_square(solved.observation, solved.source, known)
    return UnmixResult(
        std=solved.std,
        interval=solved.interval,
        count_probability=solved.count_probability,
        confidence=solved.confidence,
        chi_square=chi_square,
        effective_sample_size=solved.effective_sample_size,
        unresolved=_unresolved(solved.targets, solved.std, known),
        not_converged=np.asarray(solved.targets.mask) & ~solved.converged,
        crowded=solved.crowded,
        unexplained=chi_square > 1 + _UNEXPLAINED * expected_spread,
        truncated=solved.truncated,
        start=np.full(len(solved.truncated), start),
        known=known,
        psf_parameters=psf_parameters,
        samples=solved.samples,
        maps=maps,
        **_common(solved.observation, solved.targets, solved.source, known),
    )


def _common(
    seen: Observation, targets: Targets, source: np.ndarray, known: Known
) -> dict[str, Any]:
    """What is told of any answer."""
    sigma = np.asarray(known.psf.width)
    bad = False if known.sensor.bad_pixels is None else np.asarray(known.sensor.bad_pixels)
    if np.ndim(known.sensor.read_noise) > 1:  # a pixel without an error is told to tell nothing
        bad = bad | ~np.isfinite(known.sensor.read_noise)
    used, left = _left(seen, source)
    return {
        "targets": targets,
        "residual": np.sqrt((left**2).sum((1, 2), where=used) / np.maximum(used.sum((1, 2)), 1)),
        "pedestal": seen.pedestal.mean((1, 2)),
        "background": seen.background.mean((1, 2)),
        "noise": root_mean_square(seen.noise, seen.valid),
        "sigma": np.broadcast_to(sigma, (len(seen.counts), 2)),
        "near_edge": _near_edge(targets, seen.counts.shape[1:], sigma),
        "saturated": _near_saturated(targets, seen.saturated),
        "invalid": ~(seen.valid | bad).all((1, 2)),
    }


def _left(seen: Observation, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that tell (B, N, M), and what is left of them with all targets subtracted."""
    return seen.valid & ~seen.saturated, seen.counts - seen.level - source


def _chi_square(
    seen: Observation, source: np.ndarray, known: Known
) -> tuple[np.ndarray, np.ndarray]:
    """(B,) chi square per pixel, and its standard deviation if the noise is all there is."""
    used, left = _left(seen, source)
    noise, variance = known.light_noise, seen.noise**2
    if noise is not None:  # else it is at hand
        at_level = dataclasses.replace(seen, background_std=0.0)
        variance = np.asarray(pixels.variance(at_level, noise, jnp.asarray(source))[0])
    number = np.maximum(used.sum((1, 2)), 1)
    total = (left**2 / variance).sum((1, 2), where=used)
    return total / number, np.sqrt(2 / number)


def _unresolved(targets: Targets, std: np.ndarray, known: Known) -> np.ndarray:
    """(B, K): a broad place, a neighbour within the errors, or no such scene as the prior's."""
    mask, position = np.asarray(targets.mask), np.asarray(targets.position)
    spread = np.sqrt((std[..., :2] ** 2).sum(-1))
    broadest = _UNRESOLVED_PIXELS * float(np.mean(known.psf.width)) * 2**0.5
    least = float(known.prior.separation) - _SEPARATION_SLACK
    frame, slot = np.nonzero(mask)
    place, wide = position[frame, slot], spread[frame, slot]
    one, other = linked(place, frame, max(reach_of_groups(widest_of(known.psf)), least)).T
    apart = np.sqrt(((place[one] - place[other]) ** 2).sum(-1))
    error = np.sqrt((wide[one] ** 2 + wide[other] ** 2) / 2)
    blends = (apart < _UNRESOLVED_GAP * error) | (apart < least)
    blended = np.zeros_like(mask)
    for end in (one[blends], other[blends]):
        blended[frame[end], slot[end]] = True
    broad = ~(spread < broadest)
    found = blended | broad
    if known.prior.intensity is not None:
        brightest = float(known.prior.intensity.range[1])
        found |= np.asarray(targets.intensity) > brightest + 3 * std[..., 2]
    return mask & found


def _near_edge(targets: Targets, shape: tuple[int, ...], sigma: np.ndarray) -> np.ndarray:
    position = np.asarray(targets.position)
    reach = _EDGE_SIGMAS * sigma
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
