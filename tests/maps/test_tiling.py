"""Tiles cover the frame once, and cut nothing that matters."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

from dscsnet_jax.maps.tiling import tile_starts, tiled_map

CASES = [(20, 8, 2), (21, 8, 3), (9, 8, 2), (8, 8, 2), (5, 8, 2), (100, 30, 7), (31, 16, 5)]


@pytest.mark.parametrize(("side", "tile", "overlap"), CASES)
def test_tiles_lie_in_the_frame_and_overlap(side: int, tile: int, overlap: int) -> None:
    starts = tile_starts(side, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] + tile >= side
    assert all(s + tile <= max(side, tile) for s in starts)
    assert all(b - a <= tile - 2 * overlap for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize(("side", "tile", "overlap"), CASES)
def test_a_local_operation_is_the_same_as_in_one_piece(side: int, tile: int, overlap: int) -> None:
    frame = np.random.default_rng(0).normal(size=(side, side + 7))

    def blur(tiles: np.ndarray) -> np.ndarray:
        fine = np.repeat(np.repeat(tiles, 2, 1), 2, 2)
        return ndimage.uniform_filter(fine, (1, 4 * overlap + 1, 4 * overlap + 1), mode="constant")

    tiled = tiled_map(blur, frame, division=2, tile=tile, overlap=overlap)
    np.testing.assert_allclose(tiled, blur(frame[None])[0], atol=1e-12)


def test_an_overlap_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap of 4"):
        tile_starts(100, 8, 4)
