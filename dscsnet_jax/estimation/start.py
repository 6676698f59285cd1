"""Start: first targets, read out of the network's maps of windows around what stands out.

A network that does not know the size of frames need not look at empty sky.
"""

from __future__ import annotations

import functools

import numpy as np

from dscsnet_jax.estimation import windows
from dscsnet_jax.estimation.groups import nearest_distance
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.io.weights import Weights
from dscsnet_jax.maps.detect import peaks_of
from dscsnet_jax.maps.network import network_of, read_maps
from dscsnet_jax.physics.targets import Targets, from_arrays
from dscsnet_jax.unfolding.registry import is_frame_bound

_FAINTEST_SNR = 4.0  # of a peak that is worth a look


def read_windows(
    observation: Observation,
    weights: Weights,
    known: Known,
    *,
    threshold: float | None,
    max_targets: int,
) -> windows.Flat:
    """Peaks of the maps of windows around all that stands out.

    Arguments as of `read_maps`. Frames are looked at as a whole by networks that are bound
    to their size.
    """
    read = functools.partial(
        read_maps,
        weights=weights,
        known=known,
        readout="peaks",
        threshold=threshold,
    )
    if is_frame_bound(network_of(weights)):
        return windows.flat(read(observation, max_targets=max_targets)[1])
    peaks = peaks_of(observation, known, max_targets=max_targets, least_snr=_FAINTEST_SNR)
    shapes = windows.fit_shapes(windows.widest_of(known.psf))[1:]
    parts = []
    for w in windows.cut(observation, windows.flat(peaks), shapes, psf=known.psf):
        found = read(w.observation, max_targets=w.targets.mask.shape[1])[1]
        parts.append((w, _own(found, w, peaks), ()))
    return windows.gather(parts)[0]


def _own(found: Targets, w: windows.Windows, peaks: Targets) -> Targets:
    """Without what belongs to a neighbouring window: nearer to its peaks than to the own."""

    def flat(of: Targets) -> tuple[np.ndarray, np.ndarray]:
        row, slot = np.nonzero(of.mask)
        return np.asarray(of.position, float)[row, slot], row

    (place, window), (own, of_window), (all_of, of_frame) = map(flat, (found, w.targets, peaks))
    origin = w.observation.origin
    to_own = nearest_distance(place, window, own, of_window)
    to_any = nearest_distance(place + origin[window], w.frame[window], all_of, of_frame)
    mask = np.array(found.mask)
    mask[mask] = to_own**2 <= to_any**2 + 1e-3
    return from_arrays(found.position, found.intensity, mask)
