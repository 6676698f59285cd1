"""Readout: from a sub-pixel map to padded targets and their count.

Two rules: `threshold_cells`, the reference rule of the benchmark (every cell at or
above a threshold is a detection at its centre), and `peak_centroids`, one target a
peak with a sub-cell position.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.physics import grid
from dscsnet_jax.physics.targets import Targets

REFERENCE_THRESHOLD = 50.0
_LEAST = 1e-12


@flax.struct.dataclass
class Readout:
    """Targets read out of maps.

    Attributes:
      targets: (B, K, ...) in falling order of the value of their highest cell.
      truncated: (B,) bool, true where more than K targets were found and the last of
        this order are missing.
    """

    targets: Targets
    truncated: jax.Array


def threshold_cells(
    x: jax.Array,
    *,
    division: int,
    threshold: float = REFERENCE_THRESHOLD,
    max_targets: int = 32,
) -> Readout:
    """Reference rule: each cell with value >= `threshold` is a target at its centre.

    Equal values keep the order of the cells (row by row), so the answer is
    deterministic.

    Args:
      x: (B, cN, cM) maps, counts.
      division: cells per pixel side, `c`.
      threshold: counts.
      max_targets: slots per frame, `K`.

    Returns:
      `Readout` with `K` slots.

    Raises:
      ValueError: if `max_targets` is not positive or `x` has no batch axis.

    Example:
      >>> x = jnp.zeros((1, 9, 9)).at[0, 4, 4].set(240.0)
      >>> threshold_cells(x, division=3).targets.position[0, 0].tolist()
      [1.0, 1.0]
    """
    _check(x, max_targets)
    slots = min(max_targets, x.shape[-2] * x.shape[-1])
    flat = x.reshape(len(x), -1)
    value, cell = jax.lax.top_k(flat, slots)
    mask = value >= threshold
    position = jnp.stack([cell // x.shape[-1], cell % x.shape[-1]], -1).astype(x.dtype)
    targets = Targets(
        position=jnp.where(mask[..., None], grid.to_position(position, division), 0),
        intensity=jnp.where(mask, value, 0),
        mask=mask,
    )
    return Readout(targets, (flat >= threshold).sum(-1) > slots)


@dataclasses.dataclass(frozen=True)
class ReadoutRule:
    """A rule with its settings; hashable, so that it can be a static argument of `jit`.

    Attributes:
      name: `cells` (`threshold_cells`) or `peaks` (`peak_centroids`).
      division, threshold, separation, capacity, max_targets: as there; `cells` uses
        neither separation nor capacity.

    Example:
      >>> rule = ReadoutRule("cells", 3, threshold=50.0)
      >>> rule(jnp.zeros((2, 9, 9)).at[0, 4, 4].set(60.0)).targets.count.tolist()
      [1, 0]
    """

    name: str
    division: int
    threshold: float = REFERENCE_THRESHOLD
    separation: float = 0.5
    capacity: float | None = None
    max_targets: int = 8

    def __call__(self, x: jax.Array) -> Readout:
        """Read (B, cN, cM) maps out."""
        settings = dataclasses.asdict(self)
        if settings.pop("name") == "cells":
            del settings["separation"], settings["capacity"]
            return threshold_cells(x, **settings)
        return peak_centroids(x, **settings)


class _Claims(NamedTuple):
    """State of the peak read-out of one frame, padded by the reach of a peak.

    `left` is the energy not yet claimed, `free` where a peak may still be; position
    and intensity hold what was found, in cells and counts, `found` how many.
    """

    left: jax.Array
    free: jax.Array
    position: jax.Array
    intensity: jax.Array
    found: jax.Array


def peak_centroids(
    x: jax.Array,
    *,
    division: int,
    threshold: float = REFERENCE_THRESHOLD,
    separation: float = 0.5,
    capacity: float | None = None,
    max_targets: int = 8,
) -> Readout:
    """One target a peak, with the centroid of the energy the peak claims as position.

    The highest cell claims from its 4-neighbours only the energy it lacks to hold
    `capacity`, in proportion to what they have; that is removed and the next highest
    cell follows. A peak closer than `separation` to an earlier one is suppressed. A
    plain centroid would steal energy from targets one and a half cells away.

    Args:
      x: (B, cN, cM) maps, counts.
      division: cells per pixel side, `c`.
      threshold: least energy of a target, counts.
      separation: least distance between two targets, pixels.
      capacity: energy of a typical target, counts; None: a peak claims all of its
        4-neighbours.
      max_targets: slots per frame, `K`.

    Returns:
      `Readout` with `K` slots, in the order of the claims.

    Raises:
      ValueError: if `max_targets` is not positive or `x` has no batch axis.

    Example:
      >>> x = jnp.zeros((1, 9, 9)).at[0, 4, 4].set(150.0).at[0, 4, 5].set(75.0)
      >>> targets = peak_centroids(x, division=3, capacity=225.0).targets
      >>> round(float(targets.position[0, 0, 1]), 3), float(targets.intensity[0, 0])
      (1.111, 225.0)
    """
    _check(x, max_targets)
    rule = _PeakRule(
        threshold=threshold,
        separation=separation * division,
        capacity=jnp.inf if capacity is None else capacity,
    )
    pad = rule.reach
    # One slot more than asked for: if it fills, the frame is truncated.
    slots = max_targets + 1

    def one(frame: jax.Array) -> Readout:
        start = _Claims(
            left=jnp.pad(jnp.maximum(frame, 0), pad),
            free=jnp.pad(jnp.ones(frame.shape, bool), pad),
            position=jnp.zeros((slots, 2), frame.dtype),
            intensity=jnp.zeros((slots,), frame.dtype),
            found=jnp.zeros((), jnp.int32),
        )
        # A peak among lower cells claims at most 5 times its own value: cells lower
        # than that are no targets, nor may they collect what earlier peaks left over.
        last = jax.lax.while_loop(
            lambda s: (
                (s.found < slots)
                & (jnp.where(s.free, s.left, 0).max() >= max(threshold / 5, _LEAST))
            ),
            lambda s: _claim_peak(s, rule),
            start,
        )
        mask = jnp.arange(slots) < last.found
        position = jnp.where(mask[:, None], grid.to_position(last.position, division), 0)
        kept = Targets(position=position, intensity=last.intensity, mask=mask)
        return Readout(jax.tree.map(lambda a: a[:max_targets], kept), mask[max_targets])

    return jax.vmap(one)(x)


class _PeakRule(NamedTuple):
    """Numbers of the peak rule; lengths in cells."""

    threshold: float
    separation: float
    capacity: float

    @property
    def reach(self) -> int:
        """Cells around a peak that it can change."""
        return int(self.separation) + 2


def _claim_peak(state: _Claims, rule: _PeakRule) -> _Claims:
    """Let the highest free cell claim its energy, or rule it out."""
    width, reach = state.left.shape[1], rule.reach
    peak = jnp.argmax(jnp.where(state.free, state.left, 0))
    row, col = peak // width, peak % width
    corner, side = (row - reach, col - reach), (2 * reach + 1, 2 * reach + 1)
    around = jax.lax.dynamic_slice(state.left, corner, side)
    free = jax.lax.dynamic_slice(state.free, corner, side)
    step = np.arange(-reach, reach + 1)
    cross = np.abs(step)[:, None] + np.abs(step)[None, :] == 1
    value = around[reach, reach]
    available = jnp.where(cross, around, 0)
    lacking = jnp.maximum(rule.capacity - value, 0)
    claimed = available * jnp.minimum(lacking / jnp.maximum(available.sum(), _LEAST), 1)
    claimed = claimed.at[reach, reach].set(value)
    total = claimed.sum()
    step = step.astype(value.dtype)
    # Sums, not products of matrices: those have few digits on accelerators.
    shift = jnp.stack([(claimed.sum(1) * step).sum(), (claimed.sum(0) * step).sum()]) / total
    accept = total >= rule.threshold
    distance2 = (step - shift[0])[:, None] ** 2 + (step - shift[1])[None, :] ** 2
    suppressed = (distance2 < rule.separation**2) & accept
    slot = (jnp.arange(len(state.intensity)) == state.found) & accept
    centre = jnp.stack([row, col]) - reach + shift
    around = jnp.where(accept, around - claimed, around)
    free = (free & ~suppressed).at[reach, reach].set(False)
    return _Claims(
        left=jax.lax.dynamic_update_slice(state.left, around, corner),
        free=jax.lax.dynamic_update_slice(state.free, free, corner),
        position=jnp.where(slot[:, None], centre[None], state.position),
        intensity=jnp.where(slot, total, state.intensity),
        found=state.found + accept,
    )


def _check(x: jax.Array, max_targets: int) -> None:
    if x.ndim != 3:
        raise ValueError(f"maps must have shape (B, cN, cM), got {x.shape}")
    if max_targets < 1:
        raise ValueError(f"max_targets must be at least 1, got {max_targets}")
