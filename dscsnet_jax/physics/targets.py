"""Targets: padded positions, intensities and mask, as one pytree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Targets:
    """Point targets of a batch of frames, padded to `K` slots.

    Slots where `mask` is false hold zeros and mean nothing. Fields may be JAX or
    NumPy arrays; `B` may be absent (one frame).

    Attributes:
      position: (B, K, 2) row, col in pixels; pixel centres on integers.
      intensity: (B, K) total energy, counts.
      mask: (B, K) bool, true where a target is present.

    Example:
      >>> from_lists([[(5.0, 4.5, 200.0)], []]).count.tolist()
      [1, 0]
    """

    position: jax.Array
    intensity: jax.Array
    mask: jax.Array

    @property
    def count(self) -> jax.Array:
        """(B,) number of targets per frame."""
        return self.mask.sum(-1)


def from_arrays(position: Any, intensity: Any, mask: Any) -> Targets:
    """`Targets` of arrays as they are, of JAX or of NumPy.

    Example:
      >>> int(from_arrays(np.zeros((3, 2)), np.ones(3), np.array([True, True, False])).count)
      2
    """
    return Targets(position=position, intensity=intensity, mask=mask)


def no_targets(num_frames: int, max_targets: int) -> Targets:
    """Float32 NumPy `Targets` of frames without any.

    Example:
      >>> no_targets(2, 3).count.tolist()
      [0, 0]
    """
    zero = np.zeros((num_frames, max_targets), np.float32)
    return from_arrays(np.zeros((*zero.shape, 2), np.float32), zero, zero > 0)


def from_lists(
    rows: Sequence[np.ndarray | Sequence[Sequence[float]]], max_targets: int | None = None
) -> Targets:
    """Pad per-frame tables of targets to one `Targets`.

    Args:
      rows: per frame an (n, 3) table of row, col (pixels), intensity (counts).
      max_targets: slots per frame, `K`; default: the largest `n`, at least 1.

    Returns:
      Float64 NumPy `Targets` with B = len(rows).

    Raises:
      ValueError: if a frame has more targets than `max_targets`.

    Example:
      >>> from_lists([[(1.0, 2.0, 240.0)], []]).count
      array([1, 0])
    """
    tables = [np.asarray(r, float).reshape(-1, 3) for r in rows]
    largest = max((len(t) for t in tables), default=0)
    slots = max(largest, 1) if max_targets is None else max_targets
    if largest > slots:
        raise ValueError(f"a frame has {largest} targets, more than max_targets={slots}")
    padded = np.zeros((len(tables), slots, 3))
    mask = np.zeros((len(tables), slots), bool)
    for i, table in enumerate(tables):
        padded[i, : len(table)] = table
        mask[i, : len(table)] = True
    return Targets(position=padded[..., :2], intensity=padded[..., 2], mask=mask)  # type: ignore[arg-type]


def to_lists(targets: Targets) -> list[np.ndarray]:
    """Per-frame (n, 3) tables of row, col, intensity; inverse of `from_lists`.

    Example:
      >>> to_lists(from_lists([[(1.0, 2.0, 240.0)], []]))[0]
      array([[  1.,   2., 240.]])
    """
    table = np.concatenate(
        [np.asarray(targets.position), np.asarray(targets.intensity)[..., None]], axis=-1
    )
    mask = np.asarray(targets.mask)
    return [t[m] for t, m in zip(table, mask, strict=True)]


def sort_by_intensity(targets: Targets) -> Targets:
    """Order each frame's targets by falling intensity, present ones first.

    Ties keep their order (stable), so the result is deterministic.

    Example:
      >>> t = from_lists([[(0, 0, 1.0), (1, 1, 9.0)]])
      >>> np.asarray(sort_by_intensity(t).intensity)
      array([[9., 1.]], dtype=float32)
    """
    key = jnp.where(targets.mask, -jnp.asarray(targets.intensity), jnp.inf)
    order = jnp.argsort(key, axis=-1, stable=True)
    return Targets(
        position=jnp.take_along_axis(jnp.asarray(targets.position), order[..., None], axis=-2),
        intensity=jnp.take_along_axis(jnp.asarray(targets.intensity), order, axis=-1),
        mask=jnp.take_along_axis(jnp.asarray(targets.mask), order, axis=-1),
    )
