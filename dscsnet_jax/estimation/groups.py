"""Groups: targets that are fitted together, and how those that no window holds are split."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

_LINK = 4.0  # PSF sigmas and a pixel between targets that are fitted together


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


def components(pairs: np.ndarray, number: int) -> np.ndarray:
    """(T,) number of the group of each target, by the pairs (P, 2) that go together."""
    graph = coo_array((np.ones(len(pairs)), pairs.T), (number, number))
    return connected_components(graph, directed=False)[1]


def parts(position: np.ndarray, group: np.ndarray, room: float, most: int) -> np.ndarray:
    """(T,) number of the part of each target, in the order of the first target of each.

    Groups are whole where a window holds them; others are halved along their longer side, at
    the largest gap of the middle half, until there is room for as many guests again.
    """
    low, high, number = boxes(position, group)
    whole = ((high - low).max(-1, initial=0) <= room) & (number <= most)
    part = group.copy()
    order = np.flatnonzero(~whole[group])
    order = order[np.argsort(group[order], kind="stable")]
    todo = np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(order) else []
    while todo:
        index = todo.pop()
        extent = np.ptp(position[index], axis=0)
        if extent.max() <= room and len(index) <= (most + 1) // 2:
            part[index] = part.max() + 1
            continue
        index = index[np.argsort(position[index, extent.argmax()], kind="stable")]
        least, most_left = len(index) // 4, max(3 * len(index) // 4, 1)
        gaps = np.diff(position[index, extent.argmax()])[least:most_left]
        todo += np.split(index, [least + 1 + int(gaps.argmax())])
    # In the order of their frames and first targets, whatever other frames hold.
    _, first, label = np.unique(part, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[label]


def members(
    part: np.ndarray, pairs: np.ndarray, position: np.ndarray, intensity: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parts, their targets, and which are guests there: own ones first, then the nearest guests."""
    across = part[pairs[:, 0]] != part[pairs[:, 1]]
    ends = np.concatenate([pairs[across], pairs[across][:, ::-1]])
    near = np.sqrt(((position[ends[:, 0]] - position[ends[:, 1]]) ** 2).sum(-1))
    order = np.argsort(near, kind="stable")
    met = np.column_stack([part[ends[:, 0]], ends[:, 1]])[order]
    met, first = np.unique(met, axis=0, return_index=True)
    member = np.concatenate([part, met[:, 0]])
    target = np.concatenate([np.arange(len(part)), met[:, 1]])
    guest = np.arange(len(member)) >= len(part)
    order = np.lexsort((np.concatenate([-intensity, near[order][first]]), guest, member))
    return member[order], target[order], guest[order]


def ranks(sorted_numbers: np.ndarray) -> np.ndarray:
    """Rank of each item among those of the same number."""
    return np.arange(len(sorted_numbers)) - np.searchsorted(sorted_numbers, sorted_numbers)


def boxes(position: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least and largest position (G, 2) and the number of targets (G,) of each group."""
    number = np.bincount(member)
    low, high = np.full((len(number), 2), np.inf), np.full((len(number), 2), -np.inf)
    np.minimum.at(low, member, position)
    np.maximum.at(high, member, position)
    return low, high, number
