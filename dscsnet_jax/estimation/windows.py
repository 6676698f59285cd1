"""Windows: cut the groups of targets out of frames, and put their answers back.

Targets further apart than their PSFs reach do not disturb each other's fit. So a frame of
any size becomes a few small windows with few targets, of a few fixed shapes, and the cost
grows with the number of targets. What a window sees of other groups is told to it as the light
of neighbours. A group that no window holds is split; each part is fitted together with the
nearest targets of the others, its guests, whose answers their own windows give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from dscsnet_jax.batching import in_blocks, windows_per_block
from dscsnet_jax.estimation.groups import (
    boxes,
    components,
    linked,
    members,
    parts,
    ranks,
    reach_of_groups,
)
from dscsnet_jax.inference.observation import PER_PIXEL, Observation
from dscsnet_jax.maps.network import root_mean_square
from dscsnet_jax.physics import optics
from dscsnet_jax.physics.psf import Psf, support
from dscsnet_jax.physics.targets import Targets, from_arrays

_REACH = 4.0  # PSF sigmas around a target that its window holds
_SLOTS = 16  # fewest of an answer
_RENDERED = 16  # blocks of windows whose targets' light is made together


class Shape(NamedTuple):
    """Pixels per side and slots of a kind of window."""

    side: int
    slots: int


class Flat(NamedTuple):
    """Targets of many frames as one list.

    Attributes:
      frame: (T,) number of the frame of each.
      position: (T, 2) row and col, pixels.
      intensity: (T,) counts.
    """

    frame: np.ndarray
    position: np.ndarray
    intensity: np.ndarray


class Windows(NamedTuple):
    """Windows of one shape.

    Attributes:
      frame: (W,) number of the frame each was cut from.
      observation: its pixels, `Observation` of (W, P, P).
      targets: `Targets` (W, K, ...), positions within the window.
      guest: (W, K) bool, targets that belong to another window.
      split: (W,) bool, the window holds a part of a group.
      number: (W, K) of each target in the list that was cut; 0 where there is none.
    """

    frame: np.ndarray
    observation: Observation
    targets: Targets
    guest: np.ndarray
    split: np.ndarray
    number: np.ndarray


def widest_of(psf: Psf) -> float:
    """The larger one of a PSF's widths, pixels."""
    return float(np.max(psf.width))


def fit_shapes(sigma: float) -> tuple[Shape, ...]:
    """Shapes for fitting: room for more targets than there are so far.

    Example:
      >>> fit_shapes(0.5)[0]
      Shape(side=7, slots=4)
    """
    base = 2 * int(np.ceil(_REACH * sigma)) + 3
    return Shape(base, 4), Shape(base, 6), Shape(base + 4, 12)


def exact_shapes(sigma: float) -> tuple[Shape, ...]:
    """Shapes for sampling, with as few empty slots as possible.

    Chains of more targets would hardly ever agree; their groups are split.
    """
    _, small, large = fit_shapes(sigma)
    return *(Shape(small.side, slots) for slots in (2, 4, 6)), Shape(large.side, 8)


def flat(targets: Targets) -> Flat:
    """The targets of frames, `Targets` (B, K, ...), as one list."""
    at = np.nonzero(targets.mask)
    return Flat(at[0], np.asarray(targets.position)[at], np.asarray(targets.intensity)[at])


def together(*lists: Flat) -> Flat:
    """One list of several."""
    return Flat(*(np.concatenate(column) for column in zip(*lists, strict=True)))


def cut(
    observation: Observation,
    targets: Flat,
    shapes: tuple[Shape, ...],
    *,
    psf: Psf,
    widest: float | None = None,
    num_free_slots: int = 0,
    source: np.ndarray | None = None,
) -> list[Windows]:
    """Cut the groups of each frame's targets out as windows.

    Args:
      observation: B whole frames, NumPy arrays.
      targets: of the frames.
      shapes: of the windows, from the smallest; a group takes the first that holds it.
      psf: of the targets.
      widest: PSF width by which targets are grouped, pixels; None: the larger one of `psf`.
      num_free_slots: of each window, for further targets.
      source: (B, N, M) expected counts of all targets the windows may see, by `light_of`;
        None: of these targets.

    Returns:
      The windows, one item per shape that occurs.
    """
    reach = widest_of(psf) if widest is None else widest
    rooms = np.array([shape.side - 2 * _REACH * reach for shape in shapes])
    slots = np.array([shape.slots - num_free_slots for shape in shapes])
    frame, position, intensity = targets
    pairs = linked(position, frame, reach_of_groups(reach))
    group = components(pairs, len(frame))
    part = parts(position, group, rooms[-1], slots[-1])
    low, high, number = boxes(position, part)
    part_group, part_frame = np.empty((2, len(number)), int)
    part_group[part], part_frame[part] = group, frame
    split = np.bincount(part_group)[part_group] > 1 if len(part) else np.zeros(0, bool)
    member, target, guest = members(part, pairs, position, intensity)
    rank = ranks(member)
    number = np.minimum(np.bincount(member, minlength=len(number)), slots[-1])
    extent = (high - low).max(-1, initial=0)
    kind = ((extent[:, None] <= rooms) & (number[:, None] <= slots)).argmax(1)
    if source is None:
        source = light_of(targets, psf, observation.counts)
    found = []
    for index, shape in enumerate(shapes):
        chosen = np.flatnonzero(kind == index)
        if not len(chosen):
            continue
        middle = np.rint((low[chosen] + high[chosen]) / 2).astype(int)
        origin = _inside(middle - shape.side // 2, observation.counts.shape[1:], shape.side)
        number_of = np.full(len(kind), -1)
        number_of[chosen] = np.arange(len(chosen))
        at = np.flatnonzero((number_of[member] >= 0) & (rank < slots[index]))
        place = position[target[at]] - origin[number_of[member[at]]]
        within = (np.abs(place - (shape.side - 1) / 2) <= shape.side / 2).all(-1)
        at, place = (a[within | ~guest[at]] for a in (at, place))
        slot = number_of[member[at]], rank[at]
        table = np.zeros((len(chosen), shape.slots, 3), observation.counts.dtype)
        table[slot] = np.column_stack([place, intensity[target[at]]])
        present, foreign = np.zeros((2, *table.shape[:2]), bool)
        present[slot], foreign[slot] = True, guest[at]
        listed = np.zeros(present.shape, int)
        listed[slot] = target[at]
        local = from_arrays(table[..., :2], table[..., 2], present)
        seen = _pixels(observation, source, part_frame[chosen], origin, shape.side)
        seen = _with_neighbours(seen, frame_sources(local, psf, seen.counts))
        found.append(Windows(part_frame[chosen], seen, local, foreign, split[chosen], listed))
    return found


def gather(
    answers: Sequence[tuple[Windows, Targets, tuple[Any, ...]]],
) -> tuple[Flat, list[np.ndarray]]:
    """Put the windows' answers together, without those of their guests.

    Args:
      answers: windows, their targets, and further values per target (W, K, ...).

    Returns:
      The targets, and the further values of each.
    """
    columns = []
    for windows, targets, values in answers:
        at = np.nonzero(own(windows, targets))
        place = np.asarray(targets.position)[at] + windows.observation.origin[at[0]]
        rest = [np.asarray(value)[at] for value in (targets.intensity, *values)]
        columns.append([windows.frame[at[0]], place, *rest])
    if not columns:
        return Flat(np.zeros(0, int), np.zeros((0, 2), np.float32), np.zeros(0, np.float32)), []
    joined = [np.concatenate(column) for column in zip(*columns, strict=True)]
    return Flat(joined[0], joined[1].astype(joined[2].dtype), joined[2]), joined[3:]


def own(windows: Windows, targets: Targets) -> np.ndarray:
    """(W, K) bool: targets of answers that do not belong to a guest, the nearest start's owner."""
    start, mask = windows.targets, np.asarray(targets.mask)
    apart = np.asarray(targets.position)[:, :, None] - np.asarray(start.position)[:, None]
    distance = np.where(np.asarray(start.mask)[:, None], (apart**2).sum(-1), np.inf)
    return mask & ~np.take_along_axis(windows.guest, distance.argmin(-1), 1)


def highest(windows: Windows, image: np.ndarray) -> np.ndarray:
    """(W,) largest value of frames (B, N, M) within each window."""
    origin = np.asarray(windows.observation.origin, int)
    at, inside = _pixels_at(origin, windows.observation.counts.shape[1], image.shape[1:])
    return np.where(inside, image[(windows.frame[:, None, None], *at)], 0).max((1, 2), initial=0)


def noise_of(windows: Windows) -> np.ndarray:
    """(W,) read noise of each window, counts: its root mean square."""
    return root_mean_square(windows.observation.noise, windows.observation.valid)


def padded(
    targets: Flat, values: list[np.ndarray], num_frames: int, max_targets: int | None
) -> tuple[Targets, list[np.ndarray], np.ndarray]:
    """Targets frame by frame, the brightest first.

    Args:
      targets: of all frames.
      values: further values of each target.
      num_frames: `B`.
      max_targets: slots of the answer, `K`; None: as many as there are in a frame, and some.

    Returns:
      `Targets` (B, K, ...), the further values in the same slots (0 where there is no
      target), and (B,) bool: there were more targets, the weakest are missing.
    """
    order = np.lexsort((-targets.intensity, targets.frame))
    frame = targets.frame[order]
    rank = ranks(frame)
    slots = max(rank.max(initial=-1) + 1, _SLOTS) if max_targets is None else max_targets
    kept = rank < slots
    truncated = np.zeros(num_frames, bool)
    truncated[frame[~kept]] = True

    def table(column: np.ndarray) -> np.ndarray:
        answer = np.zeros((num_frames, slots, *column.shape[1:]), column.dtype)
        answer[frame[kept], rank[kept]] = column[order[kept]]
        return answer

    mask = table(np.ones(len(order), bool))
    answer = from_arrays(table(targets.position), table(targets.intensity), mask)
    return answer, [table(column) for column in values], truncated


def frame_sources(targets: Targets, psf: Psf, like: np.ndarray) -> np.ndarray:
    """`light_of` of `Targets` (B, K, ...)."""
    return light_of(flat(targets), psf, like)


def light_of(targets: Flat, psf: Psf, like: np.ndarray) -> np.ndarray:
    """Expected counts of all targets of each frame, in the shape (B, N, M) and type of `like`."""
    frame, place, intensity = targets
    side = 2 * min(support(psf), max(like.shape[1:])) + 1
    pixel = np.rint(place).astype(int) - side // 2
    one = from_arrays(
        (place - pixel).astype(like.dtype)[:, None],
        intensity.astype(like.dtype)[:, None],
        np.ones((len(frame), 1), bool),
    )
    source = np.zeros_like(like)
    if not len(frame):
        return source
    render = partial(_render, frame_size=(side, side))
    light = in_blocks(render, one, psf, size=_RENDERED * windows_per_block())
    at, inside = _pixels_at(pixel, side, like.shape[1:])
    np.add.at(source, (frame[:, None, None], *at), np.where(inside, light, 0))
    return source


@partial(jax.jit, static_argnames="frame_size")
def _render(targets: Targets, psf: Psf, *, frame_size: tuple[int, int]) -> jax.Array:
    return optics.render(targets, frame_size=frame_size, psf=psf)


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
        background_std=observation.background_std[frame],
        **{name: _of_windows(getattr(observation, name), at) for name in PER_PIXEL},
    )


def _of_windows(values: np.ndarray, at: tuple[np.ndarray, ...]) -> np.ndarray:
    """Pixels (W, P, P) of maps (B, N, M), or of (B, 1, 1) the number (W, 1, 1) of each window."""
    return values[at[0][:, 0, 0]] if values.shape[1:] == (1, 1) else values[at]


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
    tells = np.abs(others) > 1e-3 * seen.noise
    return dataclasses.replace(seen, neighbours=np.where(tells, others, 0))
