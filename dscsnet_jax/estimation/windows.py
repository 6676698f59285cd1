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
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from dscsnet_jax.batching import in_blocks, windows_per_block
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.physics import optics
from dscsnet_jax.physics.targets import Targets, from_arrays, no_targets

_REACH = 4.0  # PSF sigmas around a target that its window holds
_LINK = 4.0  # PSF sigmas and a pixel between targets that are fitted together
_FAR = 7.0  # PSF sigmas at which a target's light ends, below the rounding of its peak
_RENDERED = 16  # blocks of windows whose targets' light is made together
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
    given = (float(np.max(sigma)) if widest is None else widest), shapes, num_free_slots
    frame, slot = np.nonzero(targets.mask)
    position = np.asarray(targets.position, float)[frame, slot]
    intensity = np.asarray(targets.intensity)[frame, slot]
    label = _groups(position, frame, *given)
    # In the order of their frames and first targets, whatever other frames hold.
    _, first, label = np.unique(label, return_index=True, return_inverse=True)
    order = np.argsort(first)
    member, group_frame = np.argsort(order)[label], frame[first[order]]
    low, high, number = _boxes(position, member, len(order))
    kind, crowded = _kinds(low, high, number, *given)
    order = np.lexsort((-intensity, member))
    rank = np.empty(len(member), int)
    rank[order] = np.arange(len(member)) - np.searchsorted(member[order], member[order])
    truncated = np.zeros(len(observation.counts), bool)
    truncated[group_frame[crowded]] = True
    source = frame_sources(targets, sigma, observation.counts)
    found = []
    for index, shape in enumerate(shapes):
        chosen = np.flatnonzero(kind == index)
        if not len(chosen):
            continue
        middle = np.rint((low[chosen] + high[chosen]) / 2).astype(int)
        origin = _inside(middle - shape.side // 2, observation.counts.shape[1:], shape.side)
        number_of = np.full(len(kind), -1)
        number_of[chosen] = np.arange(len(chosen))
        inside = (number_of[member] >= 0) & (rank < shape.slots - num_free_slots)
        window, place = number_of[member[inside]], rank[inside]
        table = np.zeros((len(chosen), shape.slots, 3), intensity.dtype)
        table[window, place, :2] = position[inside] - origin[window]
        table[window, place, 2] = intensity[inside]
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
    frame, slot = np.nonzero(targets.mask)
    place = np.asarray(targets.position)[frame, slot]
    side = 2 * int(np.ceil(_FAR * np.max(sigma))) + 1
    pixel = np.rint(place).astype(int) - side // 2
    one = from_arrays(
        (place - pixel).astype(like.dtype)[:, None],
        np.asarray(targets.intensity)[frame, slot].astype(like.dtype)[:, None],
        np.ones((len(frame), 1), bool),
    )
    source = np.zeros_like(like)
    if not len(frame):
        return source
    render = partial(_render, frame_size=(side, side))
    light = in_blocks(render, one, sigma, size=_RENDERED * windows_per_block())
    at, inside = _pixels_at(pixel, side, like.shape[1:])
    np.add.at(source, (frame[:, None, None], *at), np.where(inside, light, 0))
    return source


@partial(jax.jit, static_argnames="frame_size")
def _render(targets: Targets, sigma: jax.Array, *, frame_size: tuple[int, int]) -> jax.Array:
    return optics.render(targets, frame_size=frame_size, sigma=sigma)


def reach_of_groups(sigma: float) -> float:
    """Pixels in row or col between targets that are fitted together."""
    return _LINK * sigma + 1


def linked(position: np.ndarray, frame: np.ndarray, reach: float) -> np.ndarray:
    """(P, 2) pairs of targets (T, 2) of the same frame (T,) no further apart in row and col."""
    apart = _frames_apart(position, reach)
    tree = cKDTree(np.column_stack([frame * apart, position]))
    return tree.query_pairs(reach, p=np.inf, output_type="ndarray")


def nearest_distance(
    place: np.ndarray, frame: np.ndarray, to: np.ndarray, to_frame: np.ndarray
) -> np.ndarray:
    """(T,) pixels from each place (T, 2) to the nearest of some (S, 2) in its own frame."""
    apart = _frames_apart(np.concatenate([place, to]), 0)
    tree = cKDTree(np.column_stack([to_frame * apart, to]))
    return tree.query(np.column_stack([frame * apart, place]))[0]


def _frames_apart(position: np.ndarray, reach: float) -> float:
    """What keeps frames apart along an axis of their own: more than places of one, and a reach."""
    return 4 * (np.abs(position).max(initial=0) + reach) + 1


def _groups(
    position: np.ndarray,
    frame: np.ndarray,
    sigma: float,
    shapes: tuple[Shape, ...],
    num_free_slots: int,
) -> np.ndarray:
    """(T,) number of the group of each target (T, 2).

    Groups that no shape holds are parted at ever smaller gaps.
    """
    group = np.zeros(len(frame), int)
    todo = np.arange(len(frame))
    link = reach_of_groups(sigma)
    for _ in range(_LINK_LEVELS):
        if not len(todo):
            break
        pairs = linked(position[todo], frame[todo], link)
        graph = coo_array((np.ones(len(pairs)), pairs.T), (len(todo),) * 2)
        number, member = connected_components(graph, directed=False)
        group[todo] = group.max() + 1 + member
        boxes = _boxes(position[todo], member, number)
        crowded = _kinds(*boxes, sigma, shapes, num_free_slots)[1]
        todo = todo[crowded[member]]
        link = link * _LINK_STEP
    return group


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
    pixel, inside = _pixels_at(origin, side, observation.counts.shape[1:])
    at = (frame[:, None, None], *pixel)
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


def _pixels_at(
    origin: np.ndarray, side: int, shape: tuple[int, ...]
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Rows and cols of squares that begin at `origin` (W, 2), kept in the frame, and which are."""
    step = np.arange(side)
    row = origin[:, 0, None, None] + step[None, :, None]
    col = origin[:, 1, None, None] + step[None, None, :]
    rows, cols = shape
    inside = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
    return (row.clip(0, rows - 1), col.clip(0, cols - 1)), inside


def _with_neighbours(seen: Observation, own: np.ndarray) -> Observation:
    """The windows without their own targets (W, P, P) among the neighbours.

    A group alone in its frame must not feel the rounding of the difference.
    """
    others = np.where(seen.valid, seen.neighbours - own, 0).astype(own.dtype)
    tells = np.abs(others) > 1e-3 * seen.noise[:, None, None]
    return dataclasses.replace(seen, neighbours=np.where(tells, others, 0))
