"""Calibrate: what frames teach of the sensor and the scenes that they have in common.

Empirical Bayes: of all that might be known, that is taken under which the frames are most
probable, whatever their targets and their numbers of targets. With `Z_n(g)` the evidence of
`n` targets in a group `g`, against none,

    S(known) = sum_f log [ (1 - w) prod_(g in f) sum_n p(n) Z_n(g | known) + w Z(f | start) ]

where the last term, of weight `w`, is what a frame `f` would be worth to who knew no more than
before: one that is of another kind counts as such, instead of carrying all others away.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import optimize

from dscsnet_jax.batching import in_blocks, take_rows, windows_per_block
from dscsnet_jax.estimation.groups import components, linked, reach_of_groups
from dscsnet_jax.estimation.observed import observed, recorded, with_full_well
from dscsnet_jax.estimation.solve import gathered, remeasured, selected
from dscsnet_jax.estimation.unmix import pretrained
from dscsnet_jax.estimation.windows import Flat, flat, widest_of
from dscsnet_jax.inference.evidence import dark
from dscsnet_jax.inference.intensity import Uniform
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import ROUNDING, Observation
from dscsnet_jax.inference.prior import scene_prior, strictly_told
from dscsnet_jax.io.frames import full_well
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian, as_psf, require
from dscsnet_jax.physics.sensor import PER_PIXEL
from dscsnet_jax.physics.targets import no_targets

_FRAMES = 256  # that are looked at, of more
_FEWEST = 8
_OTHER = 0.01  # share of frames that may be of another kind
_MOST = 8  # targets of a group whose probabilities are learned
_LEAST_SHARE = 1e-3  # of a count
_SWEEPS = 4
_TRIALS, _FEW_TRIALS = 9, 5  # of one number in a sweep, and on the way from a start
_STUCK = 8  # pixels at a full well, and in what its neighbours let expect
_WORTH = 6.0  # nats that another number must bring
_DONE = 1.0  # nats of a sweep that is the last
_MEDIAN_OFF = 0.6745  # of a Gaussian, in standard deviations
_COMMON = 1.5  # scatter of the frames' levels, in their errors, if they have one in common
_PATHS, _ROUGHLY = 3, 64  # starts that are followed to the end, by how many of the frames
_HOPEFUL = 50.0  # nats by which an end of these may be behind, and still be the best of all
_REACH = {"intensity": 1.2, "spread": 5.0, "width": 1.1}  # factors of a first search
_ROUGH, _MOST_ROUGH = 1.15, 8  # steps of a first search for the width of the PSF
_FAINT = 20  # counts below which whole ones pile up without a full well
_STEPS = np.cumsum(0.0005 * 2.5 ** np.arange(9))  # of a number from its best, to see how it falls
_FALLEN = 8.0  # nats, from where on nothing counts
_LEAST_SPREAD, _MOST_SPREAD = 0.01, 0.98
_LABELS = {
    "read_noise": ("read noise", "counts"),
    "level": ("level without targets", "counts"),
    "intensity": ("intensities, middle", "counts"),
    "spread": ("intensities, half range by it", ""),
    "width": ("PSF sigma", "pixels"),
    "separation": ("least separation", "pixels"),
    "cluster_size": ("cluster size", "pixels"),
}
_STARTS = np.geomspace(1, 6, 8)  # targets that may make the light of a typical group
_SIZES = (0.8, 1.0, 1.25, 1.6)  # of a cluster, in what the widest ones seem to have
_SEPARATIONS = (0.2, 0.35, 0.5)  # sizes of the cluster
_OFFSETS = np.arange(-5, 5) / 10  # pixels


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What frames have taught.

    Attributes:
      known: what was known before, completed.
      parameters: each learned number by name: value and standard error; inf where the frames
        do not tell it.
      gain: nats of evidence that it is worth over what was known before.
      lead: nats, over the best of other explanations that were followed: intensities apart by
        a tenth and more, with other numbers of targets; inf: all ways led to the same.
      other: share of the frames that are of another kind than the rest.
      num_frames: that it was learned from.

    Example:
      >>> print(Calibration(Known(0.5), {"width": (0.5, 0.01)}, 9.0, 7.0, 0.0, 8).report())
      learned from 8 frames
      PSF sigma                        0.5 +- 0.01 pixels
      evidence gained: 9 nats
      brighter or fainter targets: 7 nats less
    """

    known: Known
    parameters: dict[str, tuple[float, float]]
    gain: float
    lead: float
    other: float
    num_frames: int

    def report(self) -> str:
        """What was learned, a line each, with errors and units."""
        lines = [f"learned from {self.num_frames} frames"]
        for name, (value, error) in self.parameters.items():
            told = "the frames do not tell it" if np.isinf(error) else f"+- {error:.2g}"
            lines.append(f"{_LABELS[name][0]:<26}{value:10.4g} {told} {_LABELS[name][1]}".rstrip())
        offset, count = self.known.prior.cluster_offset, self.known.prior.count
        if "cluster_size" in self.parameters and offset is not None:
            lines.append(f"{'cluster from pixel':<26}{offset:+10.4g} pixels")
        if count is not None:
            shares = ", ".join(f"{n}: {100 * p:.0f} %" for n, p in enumerate(count) if p >= 0.005)
            lines.append(f"groups by targets: {shares}")
        lines.append(f"evidence gained: {self.gain:.0f} nats")
        if np.isfinite(self.lead):
            lines.append(f"brighter or fainter targets: {self.lead:.0f} nats less")
        if self.other:
            lines.append(f"frames of another kind: {100 * self.other:.0f} %")
        return "\n".join(lines)


def calibrate(frames: Any, start: Known | None = None, *, seed: int = 0) -> Calibration:
    """Learn from frames what sensor, optics and scenes they have in common (empirical Bayes).

    Read noise and level come from the pixels, once their targets are subtracted; the density of
    the intensities (a uniform range), one factor of the PSF's width, the probabilities of the
    counts, size and place of the square that holds a cluster and the least separation from the
    marginal likelihood of the frames, their numbers of targets unknown. What is known is kept.

    Args:
      frames: (B, N, M) frames of counts, of one sensor and one kind of scenes. NaN and infinite
        pixels are left out.
      start: what is known already; None: nothing.
      seed: of the choice of frames, where there are many.

    Returns:
      `Calibration`.

    Raises:
      ValueError: for fewer than 8 frames, frames without targets, or a sensor with numbers of
        each frame.

    Example:
      >>> import dscsnet_jax as dj
      >>> rng = np.random.default_rng(0)
      >>> truth = dj.from_lists([[(5 + r, 5 + c, 200.0)] for r, c in rng.uniform(-1, 1, (8, 2))])
      >>> y = dj.render(truth, frame_size=11, psf=0.5) + rng.normal(20, 2, (8, 11, 11))
      >>> scene = dj.scene_prior(intensity=(150, 250), cluster_size=2, count=(0, 1))
      >>> taught = calibrate(y, Known(psf=0.5, prior=scene))
      >>> round(float(taught.known.sensor.read_noise)), round(float(taught.known.sensor.pedestal))
      (2, 20)

    References:
      H. Robbins, Proc. Third Berkeley Symp. Math. Stat. Prob. 1 (1956) 157 (empirical Bayes).
    """
    start = start or Known()
    start = dataclasses.replace(start, prior=strictly_told(start.prior))
    y = recorded(frames, start.sensor.bad_pixels, mask_invalid=True)
    well = min(full_well(getattr(frames, "dtype", float)), _piled_up(y))
    start = start.checked(y.shape)
    of_frames = [n for n in PER_PIXEL if np.ndim(getattr(start.sensor, n)) in (1, 3)]
    require(not of_frames, f"what is common to all frames is learned, got {of_frames} of each")
    require(len(y) >= _FEWEST, f"expected at least {_FEWEST} frames to learn from, got {len(y)}")
    some = np.random.default_rng(seed).permutation(len(y))[:_FRAMES]
    return _Search(y[np.sort(some)], start, well).calibration()


def _piled_up(y: np.ndarray) -> float:
    """The full well by the pixels that are stuck at the largest value; inf: they are not many."""
    seen = y[np.isfinite(y)]
    most = seen.max(initial=0)
    if most < _FAINT:
        return float("inf")
    stuck, below = (seen == most).sum(), ((seen < most) & (seen >= 0.9 * most)).sum()
    # In as many steps as whole counts are within a tenth of the largest value, at most.
    expected = below / max(0.1 * most, 1)
    return float(most) if stuck >= _STUCK and stuck > _STUCK * expected else float("inf")


class _Trial(NamedTuple):
    """What is known is worth so much.

    `known`, its value in nats, score (B,) of each frame, its targets, and expected number of
    groups (B, n) of each count.
    """

    known: Known
    value: float
    score: np.ndarray
    targets: Flat
    counts: np.ndarray


class _Search:
    """Coordinate by coordinate, from several starts."""

    def __init__(self, y: np.ndarray, start: Known, well: float) -> None:
        self.y, self.start, self.trials = y, start, _TRIALS
        psf = pretrained().metadata.geometry.sigma[0] if start.psf is None else start.psf
        known = dataclasses.replace(with_full_well(start, well), psf=as_psf(psf))
        self.observation = observed(y, known.sensor)
        self.targets, self.base = flat(no_targets(len(y), 1)), None
        self.best = self.trial(known)
        self.targets = self.best.targets
        require(len(self.targets.frame) > 0, "without targets there is nothing to learn from")
        if start.psf is None:
            for factor in (_ROUGH, 1 / _ROUGH):
                self.wider(factor)
        self.targets, known = self.best.targets, self.best.known
        self.parameters: dict[str, tuple[float, float]] = {}
        known = dataclasses.replace(known, sensor=self.measured(known))
        self.observation = observed(y, known.sensor)
        self.best = self.trial(known)
        self.base = self.best.score

    def wider(self, factor: float) -> None:
        """Ever wider PSFs, or narrower ones, as long as they are worth more."""
        for _ in range(_MOST_ROUGH):
            at = self.best
            self.better(
                self.trial(_changed(at.known, "width", _number(at.known, "width") * factor))
            )
            if self.best is at:
                break

    def measured(self, known: Known) -> Sensor:
        """The sensor with the noise and the level that all frames have in common."""
        sensor = known.sensor
        if sensor.read_noise is not None and sensor.background is not None:
            return sensor
        again = remeasured(self.observation, self.targets, known.for_windows())
        if sensor.read_noise is None:
            used = 3 * np.bincount(self.targets.frame, minlength=len(self.y)) + 1
            freedom = np.maximum(again.valid.sum((1, 2)) - used, 5)
            variance = np.asarray(again.noise, float)[:, 0, 0] ** 2
            # Of chi square the median; frames of another kind do not move it.
            noise2 = float(np.median(variance / (1 - 2 / (9 * freedom)) ** 3))
            seen = self.y[np.isfinite(self.y)]
            whole = (seen == np.round(seen)).all() if sensor.quantised is None else sensor.quantised
            read = float(np.sqrt(max(noise2 - (ROUNDING**2 if whole else 0), 0)))
            # A median's error is that of a mean, times sqrt(pi / 2).
            of_median = noise2 * float(np.sqrt(np.pi / 4 / freedom.sum())) / max(read, ROUNDING)
            self.parameters["read_noise"] = read, of_median
            sensor = dataclasses.replace(sensor, read_noise=read)
        if sensor.background is not None:
            return sensor
        # What is above the pedestal: one number a frame.
        level, error = np.asarray(again.background, float)[:, 0, 0], again.background_std
        off = np.median(np.abs(level - np.median(level)) / error) / _MEDIAN_OFF
        if off > _COMMON:
            return sensor
        common = float(np.average(level, weights=1 / error**2))
        self.parameters["level"] = common, float((error**-2).sum() ** -0.5)
        if sensor.gain is None and sensor.pedestal is None:  # without shot noise it is no light
            return dataclasses.replace(sensor, pedestal=common, background=0.0)
        return dataclasses.replace(sensor, background=common)

    def trial(self, known: Known) -> _Trial:
        """The evidence of all frames, their numbers of targets unknown."""
        # Numbers of one type: one program, whichever were searched.
        told = jax.tree.map(np.float32, known.for_windows())
        score, counts = np.zeros(len(self.y)), np.zeros((len(self.y), _MOST + 1))
        pixels = self.observation.valid.sum((1, 2))
        counted = selected(self.observation, self.targets, told)
        for w, s in counted:
            none = in_blocks(_dark, w.observation, told, size=windows_per_block())
            table = np.asarray(s.log_evidence, float)
            # Places are as likely all over the frame, whatever the window.
            number = np.arange(table.shape[1])
            number = number if known.prior.cluster_size is None else np.minimum(number, 1)
            area = w.observation.valid.sum((1, 2)) / pixels[w.frame]
            table = table + number * np.log(np.maximum(area, 1e-6))[:, None]
            table[w.split] = -np.inf  # a part of a group, with guests: its evidence is not its own
            none[w.split] = 0
            best = np.where(np.isfinite(table.max(1)), table.max(1), 0)
            share = np.exp(table - best[:, None])
            total = np.maximum(share.sum(1), 1e-30)
            possible = np.where(w.split, 0, -np.inf)
            value = np.where(np.isfinite(table.max(1)), best + np.log(total) - none, possible)
            np.add.at(score, w.frame, value)
            share = (share / total[:, None])[:, : _MOST + 1]
            np.add.at(counts[:, : share.shape[1]], w.frame, share)
        score = score if self.base is None else _mixed(score, self.base)
        return _Trial(known, float(score.sum()), score, gathered(counted), counts)

    def better(self, trial: _Trial, least: float = 0.0) -> None:
        """Go on from there, if it is worth more."""
        if trial.value > self.best.value + least:
            self.best = trial

    def along(self, name: str, low: float, high: float) -> None:
        """The best value of a number within bounds, in its logarithm."""

        def cost(x: float) -> float:
            trial = self.trial(_changed(self.best.known, name, float(np.exp(x))))
            tried.append(trial)
            return -trial.value

        tried: list[_Trial] = []
        ends = np.log(low), np.log(high)
        options = {"xatol": 0.02 * (ends[1] - ends[0]), "maxiter": self.trials}
        optimize.minimize_scalar(cost, bounds=ends, method="bounded", options=options)
        self.better(max(tried, key=lambda t: t.value))

    def one_of(self, name: str, values: np.ndarray) -> None:
        """A further number, if it is worth it."""
        tried = [self.trial(_changed(self.best.known, name, float(v))) for v in values]
        self.better(max(tried, key=lambda t: t.value), _WORTH)

    def counted(self) -> None:
        """The probabilities of the counts, by those of the groups (one step of EM)."""
        if self.start.prior.count is not None:
            return
        weight = 1 - np.exp(np.minimum(np.log(_OTHER) + self.base - self.best.score, 0))
        share = (self.best.counts * weight[:, None]).sum(0)
        if not share.sum() > 0:  # a start that explains no frame
            return
        share = np.maximum(share / share.sum(), _LEAST_SHARE)
        prior = dataclasses.replace(self.best.known.prior, count=tuple(share / share.sum()))
        self.better(self.trial(dataclasses.replace(self.best.known, prior=prior)))

    def cluster(self) -> None:
        """A square that holds all targets of a group, and a separation, where they are worth it."""
        prior = self.start.prior
        if prior.cluster_size is None:
            extent = _extents(self.best)
            widest = max(float(np.quantile(extent, 0.95)) if len(extent) else 0.0, 0.2)
            least = 1.01 * self.best.known.prior.separation
            self.one_of("cluster_size", np.maximum(widest * np.array(_SIZES), least))
        size = self.best.known.prior.cluster_size
        if size is not None and prior.separation == 0:
            self.one_of("separation", size * np.array(_SEPARATIONS))

    def offset(self) -> None:
        """Where on the pixels the square begins, if it is worth it."""
        size = self.best.known.prior.cluster_size
        if self.start.prior.cluster_offset is None and size is not None and size <= 2:
            self.one_of("cluster_offset", _OFFSETS)

    def calibration(self) -> Calibration:
        """Search, and describe what was found."""
        first = self.best.value
        ends = self.ends()
        hopeful = [end.known for end in ends if end.value > ends[0].value - _HOPEFUL]
        found = sorted((self.refined(known) for known in hopeful), key=lambda t: -t.value)
        self.best = found[0]
        behind = [self.best.value - t.value for t in found if not _alike(t.known, self.best.known)]
        behind += [ends[0].value - end.value for end in ends[len(hopeful) :]]
        for name in (*_REACH, "separation", "cluster_size"):
            if self.learns(name) and (_number(self.best.known, name) or 0) > 0:
                self.parameters[name] = self.averaged(name)
        return Calibration(
            self.found(),
            self.parameters,
            self.best.value - first,
            min(behind, default=np.inf),
            float((self.best.score <= self.base + np.log(_OTHER) + 0.1).mean()),
            len(self.y),
        )

    def refined(self, known: Known) -> _Trial:
        """The best near to what is known."""
        self.best = self.trial(known)
        for number in range(1, _SWEEPS):
            before = self.best.value
            self.sweep(0.5**number)
            if self.best.value - before < _DONE:
                break
        return self.best

    def sweep(self, shrink: float) -> None:
        """One number after the other, within ever narrower bounds."""
        self.targets = self.best.targets
        self.counted()
        for name, factor in _REACH.items():
            if self.learns(name):
                at, reach = _number(self.best.known, name), factor**shrink
                self.along(name, at / reach, at * reach)
        prior = self.best.known.prior
        if prior.cluster_size is not None:
            for name in ("separation", "cluster_size"):
                at = _number(self.best.known, name)
                if self.learns(name) and at > 0:
                    least = 1.01 * prior.separation if name == "cluster_size" else 0
                    self.along(name, max(at / 1.15**shrink, least), at * 1.15**shrink)

    def path(self, known: Known) -> _Search:
        """A search from a start, by some of the frames."""
        path = copy.copy(self)
        path.trials = _FEW_TRIALS
        rows = np.unique(np.linspace(0, len(self.y) - 1, _ROUGHLY).astype(int))
        path.y, path.observation, path.base = take_rows((self.y, self.observation, self.base), rows)
        some = np.searchsorted(rows, at := self.targets.frame)
        kept = np.flatnonzero(rows[np.minimum(some, len(rows) - 1)] == at)
        path.targets = take_rows(self.targets._replace(frame=some), kept)
        path.best = path.trial(known)
        path.targets = path.best.targets
        path.counted()
        path.cluster()
        path.counted()
        return path

    def found(self) -> Known:
        """What is known in the end, checked, as plain numbers."""
        psf, prior, sensor = self.best.known.psf, self.best.known.prior, self.best.known.sensor
        if self.start.sensor.saturation is None and sensor.saturation == np.inf:
            sensor = dataclasses.replace(sensor, saturation=None)  # none was seen
        names = ("separation", "cluster_size", "cluster_offset", "count", "places", "intensity")
        given = {name: getattr(prior, name) for name in names}
        if self.start.psf is None:
            psf = Gaussian(float(np.mean(psf.width)))
        return Known(psf, sensor, scene_prior(**given)).checked()

    def learns(self, name: str) -> bool:
        """Whether a number is not told."""
        prior = self.start.prior
        told = {
            "intensity": prior.intensity is not None,
            "spread": prior.intensity is not None,
            "width": self.start.psf is not None,
            "separation": prior.separation > 0,
            "cluster_size": prior.cluster_size is not None,
        }
        return not told[name]

    def ends(self) -> list[_Trial]:
        """Where several starts lead, the best first; those that are not alike.

        The light of a typical group is made by one target or by several: what is known of places
        may decide it, which the way learns.
        """
        starts = [self.best]
        if self.learns("intensity"):
            light = np.bincount(_groups(self.best), self.best.targets.intensity)
            typical = float(np.median(light[light > 0]))
            count = self.start.prior.count or (_LEAST_SHARE, *[1.0] * _MOST)
            tried = []
            for share in _STARTS:
                middle = typical / share
                prior = dataclasses.replace(
                    self.start.prior,
                    intensity=Uniform(0.7 * middle, 1.3 * middle),
                    count=tuple(np.array(count) / np.sum(count)),
                )
                tried.append(self.trial(dataclasses.replace(self.best.known, prior=prior)))
            starts = tried
        paths = sorted((self.path(t.known) for t in starts), key=lambda p: -p.best.value)
        for path in paths[:_PATHS]:
            path.offset()
            path.sweep(1.0)
        different: list[_Trial] = []
        for path in sorted(paths[:_PATHS], key=lambda p: -p.best.value):
            if not any(_alike(path.best.known, other.known) for other in different):
                different.append(path.best)
        return different

    def averaged(self, name: str) -> tuple[float, float]:
        """A number's mean and spread over all values, weighed by their evidence.

        Ends of ranges have their largest evidence where it breaks off: a bend there tells nothing.
        """
        at, x, value = _number(self.best.known, name), [0.0], [self.best.value]
        for way in (-1, 1):
            for step in _STEPS:
                to = _moved(name, at, way * step)
                trial = self.trial(_changed(self.best.known, name, to))
                x.append(to - at if name == "spread" else way * step)
                value.append(trial.value)
                if value[-1] < max(value) - _FALLEN:
                    break
                if name == "spread" and not _LEAST_SPREAD < to < _MOST_SPREAD:
                    break
            else:
                return at, float("inf")
        order = np.argsort(x)
        off, weight = np.array(x)[order], np.exp(np.array(value)[order] - max(value))
        total = np.trapezoid(weight, off)
        mean = np.trapezoid(weight * off, off) / total
        std = float(np.sqrt(np.trapezoid(weight * (off - mean) ** 2, off) / total))
        mean = _moved(name, at, float(mean))
        self.best = self.trial(_changed(self.best.known, name, mean))
        return mean, std if name == "spread" else mean * std


def _moved(name: str, at: float, x: float) -> float:
    """A number further on: by so much itself, or its logarithm where it has a scale."""
    if name != "spread":
        return at * float(np.exp(x))
    return float(np.clip(at + x, _LEAST_SPREAD, _MOST_SPREAD))


def _alike(one: Known, other: Known) -> bool:
    """Whether intensities are the same within a tenth."""
    if one.prior.intensity is None:
        return True
    ratio = _number(one, "intensity") / _number(other, "intensity")
    return abs(np.log(ratio)) < 0.1


def _number(known: Known, name: str) -> float:
    """One number of what is known: the middle of the intensities, their half range by it ..."""
    prior = known.prior
    if name == "width":
        return float(np.mean(known.psf.width))
    if name in ("intensity", "spread"):
        low, high = (float(v) for v in prior.intensity.range)  # type: ignore[union-attr]
        return (low + high) / 2 if name == "intensity" else (high - low) / (high + low)
    return getattr(prior, name)


def _changed(known: Known, name: str, value: float) -> Known:
    """The same with another value of a number."""
    prior = known.prior
    if name == "width":
        factor = np.float32(value / _number(known, name))
        return dataclasses.replace(known, psf=jax.tree.map(np.asarray, known.psf.widened(factor)))
    if name in ("intensity", "spread"):
        middle, half = _number(known, "intensity"), _number(known, "spread")
        middle, half = (value, half) if name == "intensity" else (middle, value)
        half = float(np.clip(half, _LEAST_SPREAD, _MOST_SPREAD))
        changes: dict[str, Any] = {"intensity": Uniform(middle * (1 - half), middle * (1 + half))}
    else:
        changes = {name: value}
    return dataclasses.replace(known, prior=dataclasses.replace(prior, **changes))


def _groups(trial: _Trial) -> np.ndarray:
    """(T,) number of the group of each target."""
    at, reach = trial.targets, reach_of_groups(widest_of(trial.known.psf))
    return components(linked(at.position, at.frame, reach), len(at.frame))


def _extents(trial: _Trial) -> np.ndarray:
    """Larger side of each group of several targets, pixels."""
    group = _groups(trial)
    order = np.argsort(group, kind="stable")
    place = trial.targets.position[order]
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    if not len(starts):
        return np.zeros(0)
    side = (np.maximum.reduceat(place, starts) - np.minimum.reduceat(place, starts)).max(1)
    return side[side > 0]


def _mixed(score: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Scores of frames of which some may be of another kind."""
    return np.logaddexp(np.log1p(-_OTHER) + score, np.log(_OTHER) + base)


@jax.jit
def _dark(observation: Observation, known: Known) -> jax.Array:
    return dark(observation, known)
