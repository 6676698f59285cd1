"""Observed: users' arrays of counts as observations, each with its sensor."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from dscsnet_jax.batching import frames_per_block, in_blocks
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import Observation, observe
from dscsnet_jax.io.frames import as_frames
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.sensor import PER_PIXEL


def recorded(frames: Any, bad_pixels: Any, *, mask_invalid: bool) -> np.ndarray:
    """The frames (B, N, M) as float32; what bad pixels hold does not matter."""
    y = as_frames(frames, mask_invalid=mask_invalid or bad_pixels is not None)
    if bad_pixels is not None and np.shape(bad_pixels) == y.shape[1:]:
        y = np.where(np.asarray(bad_pixels, bool), 0, y)
    with np.errstate(over="ignore"):  # counts beyond float32 become infinite, and so invalid
        return as_frames(y.astype(np.float32), mask_invalid=mask_invalid)


def with_full_well(known: Known, well: float) -> Known:
    """What is known, with a full well, counts, where none is told."""
    if known.sensor.saturation is not None:
        return known
    return dataclasses.replace(known, sensor=dataclasses.replace(known.sensor, saturation=well))


def observed(y: np.ndarray, sensor: Sensor) -> Observation:
    """The frames with their sensor, block by block."""
    given = {name: getattr(sensor, name) for name in PER_PIXEL}
    told = {name: np.asarray(v, np.float32) for name, v in given.items() if v is not None}
    of_frames = {name: v for name, v in told.items() if v.ndim in (1, 3)}
    fields: dict[str, Any] = told | dict.fromkeys([*of_frames, "bad_pixels"])
    numbers = dataclasses.replace(sensor, **fields)
    numbers = jax.tree.map(lambda a: np.asarray(a, np.float32), numbers)
    shared = dataclasses.replace(numbers, bad_pixels=sensor.bad_pixels)
    size = frames_per_block(y.shape[1:])
    return in_blocks(_observe, (y, of_frames), shared, size=size)


@jax.jit
def _observe(given: tuple[jax.Array, dict[str, Any]], sensor: Sensor) -> Observation:
    frames, of_frames = given
    return observe(frames, dataclasses.replace(sensor, **of_frames))
