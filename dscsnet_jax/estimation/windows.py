"""Windows: cut the groups of targets out of frames, and put their answers back.

Targets further apart than their PSFs reach do not disturb each other's fit. So a frame of
any size becomes a few small windows with few targets, of a few fixed shapes, and the cost
grows with the number of targets. What a window sees of other groups is told to it as the light
of neighbours.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from dscsnet_jax.batching import frames_per_block, in_blocks
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.physics import optics
from dscsnet_jax.physics.targets import Targets, from_arrays, no_targets

_REACH = 4.0  # PSF sigmas around a target that its window holds
_LINK = 4.0  # PSF sigmas and a pixel between targets that are fitted together
_LINK_LEVELS = 6
_LINK_STEP = 0.7


class Shape(NamedTuple):
    """Pixels per side and slots of a kind of window."""

    side: int
    slots: int


class Windows(NamedTuple):
    """Windows of one shape.

    Attributes:
      frame: (W,) number of the frame each was cut from.
      observation: its pixels, `Observation` of (W, P, P).
      targets: `Targets` (W, K, ...), positions within the window.
    """

    frame: np.ndarray
    observation: Observation
    targets: Targets


def fit_shapes(sigma: float) -> tuple[Shape, ...]:
    """Shapes for fitting: room for more targets than there are so far.

    Example:
      >>> fit_shapes(0.5)[0]
      Shape(side=7, slots=4)
    """
    base = 2 * int(np.ceil(_REACH * sigma)) + 3
    return Shape(base, 4), Shape(base, 6), Shape(base + 4, 12), Shape(2 * base, 24)


def exact_shapes(sigma: float) -> tuple[Shape, ...]:
    """Shapes for sampling, with as few empty slots as possible."""
    _, small, middle, large = fit_shapes(sigma)
    few = tuple(Shape(small.side, slots) for slots in (2, 4, 6))
    return *few, Shape(middle.side, 8), Shape(middle.side, 12), large


def cut(
    observation: Observation,
    targets: Targets,
    shapes: tuple[Shape, ...],
    *,
    sigma: np.ndarray,
    widest: float | None = None,
    num_free_slots: int = 0,
) -> tuple[list[Windows], np.ndarray]:
    """Cut the groups of each frame's targets out as windows.

    Args:
      observation: B whole frames, NumPy arrays.
      targets: of the frames, `Targets` (B, K, ...).
      shapes: of the windows, from the smallest; a group takes the first that holds it.
      sigma: (2,) PSF standard deviation, pixels.
      widest: by which targets are grouped, pixels; None: the larger one of `sigma`.
      num_free_slots: of each window, for further targets.

    Returns:
      The windows, one item per shape that occurs, and (B,) bool: a group did not fit
      into the largest shape, and its weakest targets were left out.
    """
    mask = np.asarray(targets.mask, bool)
    position = np.asarray(targets.position, float)
    given = (float(np.max(sigma)) if widest is None else widest), shapes, num_free_slots
    label = _groups(position, mask, *given)
    frame, slot = np.nonzero(mask)
    group, member = np.unique(frame * mask.shape[1] + label[frame, slot], return_inverse=True)
    group_frame = group // max(mask.shape[1], 1)
    low, high, number = _boxes(position[frame, slot], member, len(group))
    kind, crowded = _kinds(low, high, number, *given)
    order = np.lexsort((-np.asarray(targets.intensity)[frame, slot], member))
    rank = np.empty(len(member), int)
    rank[order] = np.arange(len(member)) - np.searchsorted(member[order], member[order])
    truncated = np.zeros(len(mask), bool)
    truncated[group_frame[crowded]] = True
    source = frame_sources(targets, sigma, observation.counts)
    found = []
    for index, shape in enumerate(shapes):
        chosen = np.flatnonzero(kind == index)
        if not len(chosen):
            continue
        middle = np.rint((low[chosen] + high[chosen]) / 2).astype(int)
        origin = _inside(middle - shape.side // 2, observation.counts.shape[1:], shape.side)
        number_of = np.full(len(group), -1)
        number_of[chosen] = np.arange(len(chosen))
        inside = (number_of[member] >= 0) & (rank < shape.slots - num_free_slots)
        window, place = number_of[member[inside]], rank[inside]
        table = np.zeros((len(chosen), shape.slots, 3), np.asarray(targets.intensity).dtype)
        picked = position[frame[inside], slot[inside]] - origin[window]
        table[window, place, :2] = picked
        table[window, place, 2] = np.asarray(targets.intensity)[frame[inside], slot[inside]]
        present = np.zeros(table.shape[:2], bool)
        present[window, place] = True
        local = from_arrays(table[..., :2], table[..., 2], present)
        seen = _pixels(observation, source, group_frame[chosen], origin, shape.side)
        seen = _with_neighbours(seen, frame_sources(local, sigma, seen.counts))
        found.append(Windows(group_frame[chosen], seen, local))
    return found, truncated


def join(
    parts: list[tuple[Windows, Targets, tuple[Any, ...]]],
    num_frames: int,
    max_targets: int,
) -> tuple[Targets, list[np.ndarray], np.ndarray]:
    """Put the windows' answers together, brightest target first.

    Args:
      parts: windows, their targets, and further values per target (W, K, ...).
      num_frames: `B`.
      max_targets: slots of the answer.

    Returns:
      `Targets` (B, max_targets, ...), the further values in the same slots (0 where
      there is no target), and (B,) bool: there were more targets, the weakest are missing.
    """
    columns: list[list[np.ndarray]] = [[], [], []]
    for windows, targets, values in parts:
        window, slot = np.nonzero(targets.mask)
        table = np.asarray(targets.position)[window, slot] + windows.observation.origin[window]
        columns[0].append(windows.frame[window])
        columns[1].append(table)
        columns[2].append(np.asarray(targets.intensity)[window, slot])
        for number, value in enumerate(values):
            while len(columns) < number + 4:
                columns.append([])
            columns[number + 3].append(np.asarray(value)[window, slot])
    if not parts:
        return no_targets(num_frames, max_targets), [], np.zeros(num_frames, bool)
    flat = [np.concatenate(column) for column in columns]
    order = np.lexsort((-flat[2], flat[0]))
    flat = [column[order] for column in flat]
    rank = np.arange(len(order)) - np.searchsorted(flat[0], flat[0])
    kept = rank < max_targets
    truncated = np.zeros(num_frames, bool)
    truncated[flat[0][~kept]] = True

    def padded(column: np.ndarray) -> np.ndarray:
        answer = np.zeros((num_frames, max_targets, *column.shape[1:]), column.dtype)
        answer[flat[0][kept], rank[kept]] = column[kept]
        return answer

    mask = padded(np.ones(len(order), bool))
    targets = from_arrays(padded(flat[1]).astype(flat[2].dtype), padded(flat[2]), mask)
    return targets, [padded(column) for column in flat[3:]], truncated


def frame_sources(targets: Targets, sigma: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Expected counts of all targets of each frame, in the shape (B, N, M) and type of `like`."""
    cast = from_arrays(
        np.asarray(targets.position, like.dtype),
        np.asarray(targets.intensity, like.dtype),
        np.asarray(targets.mask),
    )
    render = partial(_render, frame_size=like.shape[1:])
    return in_blocks(render, cast, sigma, size=frames_per_block(like.shape[1:]))


@partial(jax.jit, static_argnames="frame_size")
def _render(targets: Targets, sigma: jax.Array, *, frame_size: tuple[int, int]) -> jax.Array:
    return optics.render(targets, frame_size=frame_size, sigma=sigma)


def _groups(
    position: np.ndarray,
    mask: np.ndarray,
    sigma: float,
    shapes: tuple[Shape, ...],
    num_free_slots: int,
) -> np.ndarray:
    """(B, K) number of the group of each target: the slot of its first member.

    Groups that no shape holds are parted at ever smaller gaps.
    """
    slots = mask.shape[1]
    apart = np.abs(position[:, :, None] - position[:, None, :]).max(-1, initial=0)
    both = mask[:, :, None] & mask[:, None, :]
    link = _LINK * sigma + 1
    label = np.broadcast_to(np.arange(slots), mask.shape).copy()
    done = ~mask
    for _ in range(_LINK_LEVELS):
        if done.all():
            break
        part = _connected(both & (apart <= link) & ~done[:, :, None] & ~done[:, None, :])
        label = np.where(done, label, part)
        frame, slot = np.nonzero(~done)
        group, member = np.unique(frame * slots + label[frame, slot], return_inverse=True)
        low, high, number = _boxes(position[frame, slot], member, len(group))
        crowded = _kinds(low, high, number, sigma, shapes, num_free_slots)[1]
        done[frame, slot] = ~crowded[member]
        link = link * _LINK_STEP
    return label


def _connected(adjacent: np.ndarray) -> np.ndarray:
    """(B, K) least number among all that are connected, from (B, K, K)."""
    slots = adjacent.shape[-1]
    label = np.broadcast_to(np.arange(slots), adjacent.shape[:2])
    while True:
        nearby = np.where(adjacent, label[:, None, :], slots).min(-1, initial=slots)
        new = np.minimum(label, nearby)
        if (new == label).all():
            return label
        label = new


def _boxes(
    position: np.ndarray, member: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least and largest position (G, 2) and the number of targets (G,) of each group."""
    low, high = np.full((number, 2), np.inf), np.full((number, 2), -np.inf)
    np.minimum.at(low, member, position)
    np.maximum.at(high, member, position)
    return low, high, np.bincount(member, minlength=number)


def _kinds(
    low: np.ndarray,
    high: np.ndarray,
    number: np.ndarray,
    sigma: float,
    shapes: tuple[Shape, ...],
    num_free_slots: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The first shape (G,) that holds each group, else the last; and where none does."""
    extent = (high - low).max(-1, initial=0)
    room = [shape.side - 2 * _REACH * sigma for shape in shapes]
    holds = np.stack(
        [
            (extent <= most) & (number <= shape.slots - num_free_slots)
            for most, shape in zip(room, shapes, strict=True)
        ]
    )
    none = np.asarray(~holds.any(0))
    return np.where(none, len(shapes) - 1, holds.argmax(0)), none


def _inside(origin: np.ndarray, frame_shape: tuple[int, ...], side: int) -> np.ndarray:
    """Origins (W, 2) moved so that the windows lie within the frame, or around a small one."""
    free = np.array(frame_shape) - side
    return np.where(free < 0, free // 2, np.clip(origin, 0, np.maximum(free, 0)))


def _pixels(
    observation: Observation, source: np.ndarray, frame: np.ndarray, origin: np.ndarray, side: int
) -> Observation:
    """The windows' pixels, with all targets as neighbours; outside the frame none is valid."""
    step = np.arange(side)
    row = origin[:, 0, None, None] + step[None, :, None]
    col = origin[:, 1, None, None] + step[None, None, :]
    rows, cols = observation.counts.shape[1:]
    inside = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
    at = (frame[:, None, None], row.clip(0, rows - 1), col.clip(0, cols - 1))
    zero = np.zeros((), source.dtype)
    return Observation(
        counts=np.where(inside, observation.counts[at], zero),
        valid=observation.valid[at] & inside,
        saturated=observation.saturated[at] & inside,
        neighbours=np.where(inside, source[at], zero),
        origin=origin.astype(source.dtype),
        **{
            name: getattr(observation, name)[frame]
            for name in ("noise", "pedestal", "background", "background_std")
        },
    )


def _with_neighbours(seen: Observation, own: np.ndarray) -> Observation:
    """The windows without their own targets (W, P, P) among the neighbours.

    A group alone in its frame must not feel the rounding of the difference.
    """
    others = np.where(seen.valid, seen.neighbours - own, 0).astype(own.dtype)
    tells = np.abs(others) > 1e-3 * seen.noise[:, None, None]
    return dataclasses.replace(seen, neighbours=np.where(tells, others, 0))
