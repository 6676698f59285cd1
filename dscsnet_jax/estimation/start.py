"""Start: first targets, read out of the network's maps of windows around what stands out.

A network that does not know the size of frames need not look at empty sky.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from dscsnet_jax.estimation import windows
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.prior import Known
from dscsnet_jax.io.weights import Weights
from dscsnet_jax.maps.detect import peaks_of
from dscsnet_jax.maps.network import network_of, read_maps
from dscsnet_jax.physics.targets import Targets
from dscsnet_jax.unfolding.registry import is_frame_bound

_FAINTEST_SNR = 4.0  # of a peak that is worth a look


def read_windows(
    observation: Observation,
    weights: Weights,
    known: Known,
    *,
    threshold: float | None,
    max_targets: int,
    batch_size: int | None,
) -> tuple[Targets, np.ndarray]:
    """Peaks of the maps of windows around all that stands out, and where slots were missing.

    Arguments as of `read_maps`. Frames are looked at as a whole by networks that are bound
    to their size.
    """
    read = functools.partial(
        read_maps,
        weights=weights,
        known=known,
        readout="peaks",
        threshold=threshold,
        batch_size=batch_size,
    )
    if is_frame_bound(network_of(weights)):
        return read(observation, max_targets=max_targets)[1:]
    peaks = peaks_of(observation, known, max_targets=max_targets, least_snr=_FAINTEST_SNR)
    shapes = windows.exact_shapes(float(np.max(known.sigma)))[2:]
    cuts, crowded = windows.cut(observation, peaks, shapes, sigma=known.sigma)
    parts = []
    for w in cuts:
        slots = w.targets.mask.shape[1]
        _, found, over = read(w.observation, max_targets=slots)
        crowded[w.frame[over]] = True
        parts.append((w, _own(found, w, peaks), ()))
    targets, _, over = windows.join(parts, len(crowded), max_targets)
    return targets, over | crowded


def _own(found: Targets, w: windows.Windows, peaks: Targets) -> Targets:
    """Without what belongs to a neighbouring window: nearer to its peaks than to the own."""
    place = np.asarray(found.position)

    def nearest(to: np.ndarray, there: np.ndarray) -> np.ndarray:
        apart = ((place[:, :, None] - to[:, None]) ** 2).sum(-1)
        return np.where(there[:, None], apart, np.inf).min(-1, initial=np.inf)

    of_frame, of_window = (jax.tree.map(np.asarray, t) for t in (peaks, w.targets))
    closest = nearest(
        of_frame.position[w.frame] - w.observation.origin[:, None], of_frame.mask[w.frame]
    )
    own = nearest(of_window.position, of_window.mask) <= closest + 1e-3
    return dataclasses.replace(found, mask=found.mask & own)
