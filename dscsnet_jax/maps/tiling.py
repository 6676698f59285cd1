"""Tiling: large frames in overlapping tiles, put together to the same map as in one piece.

Tiles never reach over the frame's border: the outer ones are moved inwards, so a tile
sees the frame's border only where the frame has one. Each cell is taken from the tile
in which it lies furthest from a cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

TILE = 96
OVERLAP = 16


def tile_starts(side: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the tiles along one axis.

    Args:
      side: pixels of the frame.
      tile: pixels of a tile.
      overlap: pixels on each inner side of a tile that are not used.

    Returns:
      Rising first pixels; `[0]` if one tile holds the frame.

    Raises:
      ValueError: if the overlap is negative or leaves nothing of a tile.

    Example:
      >>> tile_starts(200, 96, 16)
      [0, 64, 104]
    """
    if overlap < 0 or tile <= 2 * overlap:
        raise ValueError(f"an overlap of {overlap} pixels does not fit a tile of {tile}")
    if side <= tile:
        return [0]
    return [*range(0, side - tile, tile - 2 * overlap), side - tile]


def tiled_map(
    make_map: Callable[[np.ndarray], np.ndarray],
    frame: np.ndarray,
    *,
    division: int,
    tile: int = TILE,
    overlap: int = OVERLAP,
) -> np.ndarray:
    """Map of one large frame, tile by tile.

    Args:
      make_map: (T, n, m) tiles -> (T, cn, cm) maps.
      frame: (N, M) counts.
      division: cells per pixel side, `c`.
      tile: pixels of a tile per side.
      overlap: pixels on each inner side of a tile that are not used.

    Returns:
      (cN, cM) map, counts.

    Example:
      >>> frame = np.arange(400.0).reshape(20, 20)
      >>> same = tiled_map(lambda t: t, frame, division=1, tile=8, overlap=2)
      >>> bool((same == frame).all())
      True
    """
    starts = [tile_starts(side, tile, overlap) for side in frame.shape]
    sides = [min(tile, side) for side in frame.shape]
    corners = [(row, col) for row in starts[0] for col in starts[1]]
    tiles = np.stack([frame[r : r + sides[0], c : c + sides[1]] for r, c in corners])
    maps = make_map(tiles)
    whole = np.zeros([side * division for side in frame.shape], maps.dtype)
    owned = [_owned(s, side, n) for s, side, n in zip(starts, sides, frame.shape, strict=True)]
    for (row, col), part in zip(corners, maps, strict=True):
        rows, cols = owned[0][row], owned[1][col]
        target = tuple(slice(a * division, b * division) for a, b in (rows, cols))
        source = tuple(
            slice((a - first) * division, (b - first) * division)
            for (a, b), first in ((rows, row), (cols, col))
        )
        whole[target] = part[source]
    return whole


def _owned(starts: list[int], tile: int, side: int) -> dict[int, tuple[int, int]]:
    """Pixels each tile answers for: cuts run through the middle of the overlaps."""
    cuts = [(b + a + tile) // 2 for a, b in itertools.pairwise(starts)]
    return dict(zip(starts, zip([0, *cuts], [*cuts, side], strict=True), strict=True))
