"""Unmix: frames in, targets out: the main job.

frames -> noise and background -> windows -> network -> map -> read-out -> fit, count, posterior
    -> targets
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dscsnet_jax.batching import block_of, frames_per_block, in_blocks
from dscsnet_jax.estimation import ESTIMATES, METHODS, READOUTS
from dscsnet_jax.estimation.psf_width import fit_width
from dscsnet_jax.estimation.result import UnmixResult, grid_result, solved_result
from dscsnet_jax.estimation.solve import solve
from dscsnet_jax.estimation.start import read_windows
from dscsnet_jax.estimation.windows import flat
from dscsnet_jax.inference.observation import Observation, observe
from dscsnet_jax.inference.prior import Known, ScenePrior, preset_prior
from dscsnet_jax.io.frames import as_frames, full_well
from dscsnet_jax.io.weights import Weights, load_weights, packaged_weights
from dscsnet_jax.maps.network import check_psf, read_maps
from dscsnet_jax.physics.psf import Psf, as_psf, require
from dscsnet_jax.physics.scene import Preset, presets
from dscsnet_jax.physics.targets import Targets, no_targets

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


def known_of(preset: Preset) -> dict[str, Any]:
    """Arguments of `unmix` that tell all there is to know of a preset's scenes and sensor.

    Raises:
      ValueError: if the preset's conditions differ from frame to frame.

    Example:
      >>> known_of(presets()["csist_noise"])["pedestal"]
      10.0
    """
    if preset.variation is not None:
        raise ValueError(f"every frame of {preset.name} has a sensor of its own")
    sensor = preset.sensor
    return {
        "psf": as_psf(preset.sigma),
        "noise": float(sensor.read_noise),
        "pedestal": float(sensor.offset),
        "background": 0.0,
        "saturation": float(sensor.saturation),
        "gain": None if sensor.electrons_per_count is None else float(sensor.electrons_per_count),
        "prior": preset_prior(preset),
    }


def bayes_reference(
    frames: Any, truth: Targets, known: dict[str, Any], *, seed: int = 0
) -> UnmixResult:
    """Posterior mean of frames whose scene is known: what estimates can hope for.

    The chains start at the true targets and keep their number. Where a posterior has
    several separate modes they may stay in the true one, and are then better than any
    estimator could be.

    Args:
      frames: (B, N, M) frames, counts.
      truth: their targets.
      known: what is known of scene and sensor, as `known_of` tells.
      seed: of the posterior's random numbers.

    Returns:
      `UnmixResult`.
    """
    sensor = (known[name] for name in ("noise", "pedestal", "background", "saturation", "gain"))
    told = _known(known["psf"], known["gain"], known["prior"])
    solved = solve(
        _observed(np.asarray(frames, np.float32), *sensor),
        flat(truth),
        told,
        max_targets=np.asarray(truth.mask).shape[1],
        fixed_count=True,
        from_start=True,
        seed=seed,
    )
    return solved_result(solved, told)


def unmix(
    frames: Any,
    *,
    method: str = "dscsnet",
    estimate: str = "mean",
    prior: ScenePrior | None = None,
    weights: Weights | str | Path | None = None,
    psf: Psf | float | tuple[float, float] | None = None,
    fit_psf: bool = False,
    noise: float | None = None,
    pedestal: float | None = None,
    background: float | None = None,
    saturation: float | None = None,
    gain: float | None = None,
    readout: str = "peaks",
    threshold: float | None = None,
    max_targets: int | None = None,
    mask_invalid: bool = False,
    block: int | None = None,
    seed: int = 0,
    return_maps: bool = False,
) -> UnmixResult:
    """Resolve the targets of frames.

    Frames may have any size: the network looks at windows around what stands out of the
    noise (for `grid`, at whole frames, the large ones in overlapping tiles), and targets
    are fitted in windows. One frame never changes another
    frame's answer (but for `fit_psf`, which is shared).

    Args:
      frames: (N, M), (B, N, M) or (B, N, M, 1) array of counts, any real dtype.
      method: `dscsnet`: the network's read-out, refined off the grid, its count checked (where
        the weights are trained for another PSF: peaks of the residual instead, with a warning);
        `greedy`: no network, one target at a time at the residual's peak, refined alike;
        `grid`: the network's map alone, read out.
      estimate: `mean`: posterior mean; `map`: the fit. Not for `grid`.
      prior: what is known of the scene (`inference.prior`); None: nothing.
      weights: `Weights`, a file of them, the name of packaged ones, or None: the default.
      psf: a `physics.psf.Psf`; a number or a pair are the widths of a Gaussian one, pixels; None:
        that of the weights.
      fit_psf: fit one common factor to the PSF's width, from all frames together.
      noise: standard deviation of a pixel's read noise, counts; None: estimated from each
        frame. Rounding is added where frames hold whole counts.
      pedestal: electronic offset under every pixel, counts; it has no noise. None: 0.
      background: light under every pixel, counts, with shot noise by the gain; None:
        estimated from each frame, as what its level is above the pedestal.
      saturation: full well, counts, at which pixels tell only a lower limit; None: that
        of the type for frames of 8 or 16 bit, or of the sensor the weights were trained
        for where it is known.
      gain: electrons per count of the shot noise; None: none.
      readout: of the map: `peaks` (sub-cell centroids, one target a peak) or, for `grid`
        only, `cells` (reference rule of the benchmark: each cell above the threshold).
      threshold: least energy of a target read out, counts; None: by prior and noise, or
        50 counts for `cells`.
      max_targets: slots per frame, `K`; None: as many as are found, at least 16.
      mask_invalid: leave NaN and Inf pixels out and flag the frame, instead of an error.
      block: windows, and at most so many frames, that are computed together; None: what suits
        the device, whatever the number of frames. Another number changes the answers by
        rounding.
      seed: of the posterior's random numbers.
      return_maps: make, or keep, the maps of whole frames; None is returned without a network.

    Returns:
      `UnmixResult`.

    Raises:
      ValueError: for frames that are not images of real, finite counts; an unknown method,
        estimate or read-out; for `grid`, weights trained for another PSF.

    Example:
      >>> from dscsnet_jax.physics.optics import render
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> truth = from_lists([[(5.0, 4.7, 240.0), (5.1, 5.5, 200.0)]])
      >>> answer = unmix(render(truth, frame_size=11, psf=0.5), noise=0.1, estimate="map")
      >>> answer.targets.count.tolist(), answer.status()[0, :2].tolist()
      ([2], ['ok', 'ok'])
      >>> [round(float(x), 2) for x in answer.targets.position[0, 1]]
      [5.1, 5.5]
    """
    _check_choices(method, estimate, readout)
    y = as_frames(frames, mask_invalid=mask_invalid)
    named = weights is not None
    if not isinstance(weights, Weights):
        weights = _load(weights)
    if saturation is None:
        own = full_well(getattr(frames, "dtype", float))
        saturation = own if np.isfinite(own) or not named else _trained_well(weights)
    with np.errstate(over="ignore"):  # counts beyond float32 become infinite, and so invalid
        y = as_frames(y.astype(np.float32), mask_invalid=mask_invalid)
    if max_targets is not None and max_targets < 1:
        raise ValueError(f"max_targets must be at least 1, got {max_targets}")
    known = _known(
        weights.metadata.geometry.sigma if psf is None else psf,
        gain,
        ScenePrior() if prior is None else prior,
    )
    width = np.asarray(known.psf.width)
    require(
        bool((np.isfinite(width) & (width > 0)).all()),
        f"the PSF must have positive parameters, got {psf}",
    )
    observation = _observed(y, noise, pedestal, background, saturation, gain)
    most = max(_ROOM, y.shape[1] * y.shape[2] // 8)  # of a start
    given = observation, weights, known
    maps: np.ndarray | None = None
    with block_of(block):
        if method == "grid":
            check_psf(weights, known.psf)
            slots = most if max_targets is None else max_targets
            maps, read, over = read_maps(
                *given, readout=readout, threshold=threshold, max_targets=slots
            )
            maps = maps if return_maps else None
            return grid_result(observation, read, known, truncated=over, maps=maps)
        by_network = method == "dscsnet" and _trained_for(weights, known.psf)
        start = flat(no_targets(len(y), 1))
        if by_network:
            start = read_windows(*given, threshold=threshold, max_targets=most)
        if by_network and return_maps:
            maps = read_maps(*given, readout=readout, threshold=threshold, max_targets=1)[0]
        greedy = method == "greedy"
        if fit_psf:
            known, start = fit_width(observation, start, known, greedy=greedy, seed=seed)
        solved = solve(
            observation,
            start,
            known,
            max_targets=max_targets,
            estimate=estimate,
            estimate_noise=noise is None,
            greedy=greedy,
            seed=seed,
        )
    begun = "network" if by_network else "detection"
    return solved_result(solved, known, maps=maps, start=begun)


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


def _known(psf: Any, gain: float | None, prior: ScenePrior) -> Known:
    # As `fit_width` makes them: one structure, one program.
    told = jax.tree.map(lambda a: np.asarray(a, np.float32), as_psf(psf).widened(1.0))
    return Known(told, None if gain is None else np.float32(gain), prior)


def _observed(
    y: np.ndarray,
    noise: float | None,
    pedestal: float | None,
    background: float | None,
    saturation: float,
    gain: float | None,
) -> Observation:
    """The frames with their sensor, block by block."""
    given = {"noise": noise, "pedestal": pedestal, "background": background, "gain": gain}
    told = {name: value for name, value in given.items() if value is not None}
    for name, value in told.items():
        least = -np.inf if name in ("pedestal", "background") else 0
        if not (least <= value < np.inf and value != -np.inf):
            bound = "" if least else ", at least 0"
            raise ValueError(f"{name} must be finite counts{bound}, got {value!r}")
    for name, value in {"saturation": saturation, "gain": 1.0 if gain is None else gain}.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}")
    size = frames_per_block(y.shape[1:])
    return in_blocks(_observe, y, told | {"saturation": np.float32(saturation)}, size=size)


@jax.jit
def _observe(frames: jax.Array, sensor: dict[str, float]) -> Observation:
    return observe(frames, **sensor)
