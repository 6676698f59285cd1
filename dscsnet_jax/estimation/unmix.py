"""Unmix: frames in, targets out: the main job.

frames -> noise and background -> windows -> network -> map -> read-out -> fit, count, posterior
    -> targets
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dscsnet_jax.batching import block_of
from dscsnet_jax.estimation import ESTIMATES, METHODS, READOUTS
from dscsnet_jax.estimation.observed import observed, recorded, with_full_well
from dscsnet_jax.estimation.psf_fit import fit_psf
from dscsnet_jax.estimation.result import UnmixResult, grid_result, solved_result
from dscsnet_jax.estimation.solve import solve
from dscsnet_jax.estimation.start import read_windows
from dscsnet_jax.estimation.windows import flat
from dscsnet_jax.inference.known import Known
from dscsnet_jax.io.frames import full_well
from dscsnet_jax.io.weights import Weights, load_weights, packaged_weights
from dscsnet_jax.maps.network import check_psf, read_maps
from dscsnet_jax.physics.preset import presets
from dscsnet_jax.physics.psf import Psf, as_psf
from dscsnet_jax.physics.targets import no_targets

DEFAULT_WEIGHTS = "varied_c3"
_ROOM = 16


@functools.lru_cache(maxsize=8)
def pretrained(name: str = DEFAULT_WEIGHTS) -> Weights:
    """Weights shipped in the package, by name.

    `varied_c3` serves any noise, offset and brightness and PSF widths of 0.45 .. 0.55
    pixels; `csist_c3` was trained for the frames of the preset `csist` alone.

    Raises:
      FileNotFoundError: if there are none of that name; lists those there are.
    """
    return load_weights(packaged_weights(name))


@dataclasses.dataclass(frozen=True)
class Options:
    """How `unmix` works, where its defaults do not serve.

    Attributes:
      weights: `Weights`, a file of them, the name of packaged ones, or None: the default.
      readout: of the map: `peaks` (sub-cell centroids, one target a peak) or, for `grid`
        only, `cells` (reference rule of the benchmark: each cell above the threshold).
      threshold: least energy of a target read out, counts; None: by prior and noise, or
        50 counts for `cells`.
      fit_psf: fit the PSF's parameters, from all frames together.
      block: windows, and at most so many frames, that are computed together; None: what suits
        the device, whatever the number of frames. Another number changes the answers by
        rounding.
      return_maps: make, or keep, the maps of whole frames; None is returned without a network.
      samples: answer with the posterior's samples; for the estimate `mean`.

    Example:
      >>> Options(threshold=50.0).readout
      'peaks'
    """

    weights: Weights | str | Path | None = None
    readout: str = "peaks"
    threshold: float | None = None
    fit_psf: bool = False
    block: int | None = None
    return_maps: bool = False
    samples: bool = False


def unmix(
    frames: Any,
    known: Known | None = None,
    *,
    method: str = "dscsnet",
    estimate: str = "mean",
    max_targets: int | None = None,
    mask_invalid: bool = False,
    seed: int = 0,
    options: Options | None = None,
) -> UnmixResult:
    """Resolve the targets of frames.

    Frames may have any size: the network looks at windows around what stands out of the
    noise (for `grid`, at whole frames, the large ones in overlapping tiles), and targets
    are fitted in windows. One frame never changes another
    frame's answer (but for a fit of the PSF, which is shared).

    Args:
      frames: (N, M), (B, N, M) or (B, N, M, 1) array of counts, any real dtype.
      known: what is known of optics, sensor and scene; None: nothing. Where it does not tell,
        the PSF is that of the weights; noise and background are estimated from each frame (the
        background is what its level is above the pedestal, which is then 0); saturation is the
        full well of the type for frames of 8 or 16 bit, or that of the sensor the weights were
        trained for; there is no shot noise. Rounding adds noise where frames hold whole counts.
      method: `dscsnet`: the network's read-out, refined off the grid, its count checked (where
        the weights are trained for another PSF: peaks of the residual instead, with a warning);
        `greedy`: no network, one target at a time at the residual's peak, refined alike;
        `grid`: the network's map alone, read out.
      estimate: `mean`: posterior mean; `map`: the fit. Not for `grid`.
      max_targets: slots per frame, `K`; None: as many as are found, at least 16.
      mask_invalid: leave NaN and Inf pixels out and flag the frame, instead of an error.
      seed: of the posterior's random numbers.
      options: how it works in detail; None: as it is best.

    Returns:
      `UnmixResult`.

    Raises:
      ValueError: for frames that are not images of real, finite counts; what is known and
        cannot be, or is not of these frames; an unknown method, estimate or read-out; for `grid`,
        weights trained for another PSF.

    Example:
      >>> from dscsnet_jax.physics.optics import render
      >>> from dscsnet_jax.physics.preset import Sensor
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> truth = from_lists([[(5.0, 4.7, 240.0), (5.1, 5.5, 200.0)]])
      >>> y = render(truth, frame_size=11, psf=0.5)
      >>> answer = unmix(y, Known(sensor=Sensor(read_noise=0.1)), estimate="map")
      >>> answer.targets.count.tolist(), answer.status()[0, :2].tolist()
      ([2], ['ok', 'ok'])
      >>> [round(float(x), 2) for x in answer.targets.position[0, 1]]
      [5.1, 5.5]
    """
    known, options = known or Known(), options or Options()
    _check_choices(method, estimate, options.readout)
    if method == "grid" and (options.samples or options.fit_psf):
        raise ValueError("the method 'grid' has no samples, and fits no PSF")
    if max_targets is not None and max_targets < 1:
        raise ValueError(f"max_targets must be at least 1, got {max_targets}")
    y = recorded(frames, known.sensor.bad_pixels, mask_invalid=mask_invalid)
    weights = options.weights if isinstance(options.weights, Weights) else _load(options.weights)
    named = options.weights is not None
    known = _completed(known, full_well(getattr(frames, "dtype", float)), weights, named=named)
    known = known.checked(y.shape)
    observation, told = observed(y, known.sensor), known.for_windows()
    most = max(_ROOM, y.shape[1] * y.shape[2] // 8)  # of a start
    maps: np.ndarray | None = None
    parameters: dict[str, tuple[float, float]] | None = None
    read = functools.partial(
        read_maps,
        observation,
        weights,
        told,
        readout=options.readout,
        threshold=options.threshold,
    )
    with block_of(options.block):
        if method == "grid":
            check_psf(weights, told.psf)
            maps, found, over = read(max_targets=most if max_targets is None else max_targets)
            maps = maps if options.return_maps else None
            return grid_result(observation, found, known, truncated=over, maps=maps)
        by_network = method == "dscsnet" and _trained_for(weights, told.psf)
        start = flat(no_targets(len(y), 1))
        if by_network:
            start = read_windows(
                observation, weights, told, threshold=options.threshold, max_targets=most
            )
        if by_network and options.return_maps:
            maps = read(max_targets=1)[0]
        greedy = method == "greedy"
        if options.fit_psf:
            own = jax.tree.map(lambda a: np.asarray(a, np.float32), known.psf)
            guess = dataclasses.replace(told, psf=own)
            fitted = fit_psf(observation, start, guess, greedy=greedy, seed=seed)
            known, start = dataclasses.replace(known, psf=fitted.known.psf), fitted.targets
            parameters = fitted.parameters
        solved = solve(
            observation,
            start,
            known.with_weak_prior().for_windows(),
            max_targets=max_targets,
            estimate=estimate,
            estimate_noise=known.sensor.read_noise is None,
            greedy=greedy,
            keep_samples=options.samples,
            seed=seed,
        )
    begun = "network" if by_network else "detection"
    return solved_result(solved, known, maps=maps, start=begun, psf_parameters=parameters)


def _completed(known: Known, well: float, weights: Weights, *, named: bool) -> Known:
    """What is known, with the PSF of the weights and a full well where none is told."""
    psf = weights.metadata.geometry.sigma if known.psf is None else known.psf
    own = well if np.isfinite(well) or not named else _trained_well(weights)
    return with_full_well(dataclasses.replace(known, psf=as_psf(psf)), own)


def _trained_for(weights: Weights, psf: Psf) -> bool:
    """Whether the weights know a PSF; the caller of `unmix` is warned if not."""
    try:
        check_psf(weights, psf)
    except ValueError as error:
        warnings.warn(f"{error}; this answer starts from detection", stacklevel=3)
        return False
    return True


def _check_choices(method: str, estimate: str, readout: str) -> None:
    choices = (
        ("method", method, METHODS),
        ("estimate", estimate, ESTIMATES),
        ("read-out", readout, READOUTS),
    )
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
    if readout == "cells" and method != "grid":
        raise ValueError("the read-out 'cells' goes with the method 'grid' only")


def _load(weights: str | Path | None) -> Weights:
    """Weights of a file, or packaged ones by name."""
    if weights is None:
        return pretrained()
    name = str(weights)
    return load_weights(weights) if "." in name or "/" in name else pretrained(name)


def _trained_well(weights: Weights) -> float:
    """Full well of the sensor that weights were trained for, counts; inf if not known."""
    preset = presets().get(weights.metadata.training.get("preset", ""))
    if preset is None or preset.variation is not None:
        return float("inf")
    return float(preset.sensor.saturation)
