"""Grid: where cells lie, how they fold into pixels, which cell a target falls into."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.physics import grid


@pytest.mark.parametrize(
    ("division", "offset"), [(1, 0.0), (2, 0.5), (3, 1.0), (4, 1.5), (5, 2.0), (7, 3.0)]
)
def test_offset_puts_the_cells_of_a_pixel_around_its_centre(division: int, offset: float) -> None:
    assert grid.cell_offset(division) == offset
    centres = grid.cell_centres(4, division).reshape(4, division)
    np.testing.assert_allclose(centres.mean(1), np.arange(4), atol=1e-15)
    np.testing.assert_allclose(np.diff(centres.ravel()), 1 / division, rtol=1e-12)


@pytest.mark.parametrize("division", [0, -3, 2.5])
def test_bad_division_is_refused(division: float) -> None:
    with pytest.raises(ValueError, match="division must be a positive whole number"):
        grid.cell_offset(division)  # type: ignore[arg-type]


def test_odd_division_has_a_cell_at_the_pixel_centre_even_has_not() -> None:
    assert grid.cell_centres(3, 5)[7] == 1.0
    np.testing.assert_array_equal(grid.cell_centres(1, 4), [-0.375, -0.125, 0.125, 0.375])


@pytest.mark.parametrize("division", [1, 2, 3, 4, 5, 7])
def test_to_cell_inverts_to_position(division: int) -> None:
    position = np.linspace(-1.0, 12.0, 41)
    back = grid.to_position(grid.to_cell(position, division), division)
    np.testing.assert_allclose(back, position, atol=1e-14)


def test_frame_shape() -> None:
    assert grid.frame_shape(7) == (7, 7)
    assert grid.frame_shape((2, 9)) == (2, 9)
    with pytest.raises(ValueError, match="frame sides must be positive"):
        grid.frame_shape((3, 0))


def test_nearest_cell_rounds_half_to_even() -> None:
    # With c = 2 the position i lies half-way between cells 2i and 2i + 1.
    position = jnp.array([0.0, 1.0, 2.0, 3.0])
    np.testing.assert_array_equal(grid.nearest_cell(position, 2, 9), [0, 2, 4, 6])
    # With c = 4 the position i - 1/4 lies half-way between cells 4i and 4i + 1, and
    # i + 1/4 half-way between 4i + 2 and 4i + 3.
    quarters = jnp.array([0.75, 1.0, 1.25])
    np.testing.assert_array_equal(grid.nearest_cell(quarters, 4, 9), [4, 6, 6])
    # With c = 3 half-way is i + 1/2: exact in binary.
    np.testing.assert_array_equal(grid.nearest_cell(jnp.array([0.5, 1.5]), 3, 9), [2, 6])


def test_nearest_cell_is_the_nearest_and_stays_on_the_grid() -> None:
    position = np.random.default_rng(0).uniform(-2.0, 8.0, 500)
    for division in (2, 3, 5, 7):
        centres = grid.cell_centres(6, division)
        expected = np.abs(position[:, None] - centres[None]).argmin(1)
        found = grid.nearest_cell(jnp.asarray(position), division, 6)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, expected)


def test_fold_layout_channel_is_c_times_row_plus_col() -> None:
    rows, cols, c = 2, 4, 3
    a = jnp.arange(2 * rows * c * cols * c).reshape(2, rows * c, cols * c)
    folded = np.asarray(grid.fold(a, c))
    assert folded.shape == (2, rows, cols, c * c)
    for b, i, j, p, q in np.ndindex(2, rows, cols, c, c):
        assert folded[b, i, j, c * p + q] == a[b, c * i + p, c * j + q]


@pytest.mark.parametrize(("division", "lead"), [(1, ()), (2, (3,)), (3, (2, 2)), (5, ())])
def test_unfold_channels_inverts_fold(division: int, lead: tuple[int, ...]) -> None:
    cells = np.random.default_rng(0).random((*lead, 4 * division, 3 * division), np.float32)
    folded = grid.fold(cells, division)
    np.testing.assert_array_equal(grid.unfold_channels(folded, division), cells)
    again = grid.fold(grid.unfold_channels(folded, division), division)
    np.testing.assert_array_equal(again, folded)


# Two targets of the first frame share the cell (4, 4); a padded slot lies there too.
POSITION = np.array(
    [
        [[1.0, 1.0], [1.1, 0.9], [0.0, 2.0], [1.0, 1.0]],
        [[1.0, 1.0], [0.0, 2.0], [-9.0, 99.0], [0.3, 0.0]],
    ]
)
INTENSITY = np.array([[5.0, 7.0, 11.0, 13.0], [17.0, 19.0, 23.0, 29.0]])
MASK = np.array([[True, True, True, False], [True, False, True, True]])

grid_map = jax.jit(grid.grid_map, static_argnames=("frame_size", "division", "overwrite"))


@pytest.mark.parametrize(("overwrite", "shared"), [(False, 12.0), (True, 7.0)])
def test_grid_map_adds_or_keeps_the_last(overwrite: bool, shared: float) -> None:
    geometry = {"frame_size": (3, 5), "division": 3, "overwrite": overwrite}
    expected = np.zeros((2, 9, 15))
    expected[0, 4, 4] = shared
    expected[0, 1, 7] = 11.0
    expected[1, 4, 4] = 17.0
    expected[1, 0, 14] = 23.0
    expected[1, 2, 1] = 29.0
    x = grid_map(POSITION, INTENSITY, MASK, **geometry)
    np.testing.assert_array_equal(x, expected)
    assert not grid_map(POSITION, INTENSITY, np.zeros_like(MASK), **geometry).any()
    one = grid_map(POSITION[0], INTENSITY[0], MASK[0], **geometry)
    np.testing.assert_array_equal(one, expected[0])


def test_grid_map_of_some_width_keeps_flux_and_centroid() -> None:
    width, rows, cols = 0.8, 5, 4
    position = np.array([[[2.13, 1.4], [2.6, 1.9], [2.0, 2.0]], [[1.9, 1.57], [0, 0], [0, 0]]])
    intensity = np.array([[240.0, 90.0, 70.0], [10.0, 20.0, 30.0]])
    mask = np.array([[True, True, False], [True, False, False]])
    x = np.asarray(
        jax.jit(grid.grid_map, static_argnames=("frame_size", "division", "width"))(
            position, intensity, mask, frame_size=(rows, cols), division=3, width=width
        )
    )
    centres = [grid.cell_centres(side, 3) for side in (rows, cols)]
    expected = np.zeros_like(x)
    for b, k in np.argwhere(mask):
        shares = [
            np.exp(-((p - at) ** 2) / (2 * (width / 3) ** 2))
            for p, at in zip(position[b, k], centres, strict=True)
        ]
        row, col = (s / s.sum() for s in shares)
        expected[b] += intensity[b, k] * np.outer(row, col)
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(x.sum((1, 2)), (intensity * mask).sum(1), rtol=1e-6)
    alone = x[1] / x[1].sum()
    centroid = (alone.sum(1) @ centres[0], alone.sum(0) @ centres[1])
    np.testing.assert_allclose(centroid, position[1, 0], atol=1e-3)
