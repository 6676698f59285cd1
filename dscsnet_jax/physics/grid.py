"""Grid: pixels, sub-pixel cells and flat indices; the only owner of the offset (c-1)/2.

A detector pixel `i` has its centre at position `i`; each pixel side is divided
into `c` cells, so cell `j` of the fine grid has its centre at
`p_j = (j - (c-1)/2) / c` pixels, for odd and even `c` alike.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def cell_offset(division: int) -> float:
    """Index, on the cell axis, of the centre of pixel 0: `(c-1)/2`.

    Args:
      division: cells per pixel side, `c` >= 1.

    Returns:
      The offset in cells.

    Raises:
      ValueError: if `division` is not a positive whole number.

    Example:
      >>> cell_offset(3), cell_offset(4)
      (1.0, 1.5)
    """
    if int(division) != division or division < 1:
        raise ValueError(f"division must be a positive whole number, got {division!r}")
    return (division - 1) / 2


def cell_centres(num_pixels: int, division: int) -> np.ndarray:
    """Centres of all cells along one axis, in pixels.

    Args:
      num_pixels: detector pixels along the axis, `N`.
      division: cells per pixel side, `c`.

    Returns:
      (cN,) positions `p_j = (j - (c-1)/2)/c`, pixels.

    Example:
      >>> cell_centres(2, 2)
      array([-0.25,  0.25,  0.75,  1.25])
    """
    return to_position(np.arange(num_pixels * division), division)


def frame_shape(frame_size: int | tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a frame given as one side or as a pair.

    Raises:
      ValueError: if a side is not a positive whole number.

    Example:
      >>> frame_shape(11), frame_shape((480, 640))
      ((11, 11), (480, 640))
    """
    rows, cols = (float(side) for side in np.broadcast_to(frame_size, 2))
    if not (rows.is_integer() and cols.is_integer() and min(rows, cols) >= 1):
        raise ValueError(f"frame sides must be positive whole numbers, got {frame_size}")
    return int(rows), int(cols)


def to_position(cell, division: int):  # type: ignore[no-untyped-def]
    """Position in pixels of a (fractional) cell index; any shape.

    Example:
      >>> float(to_position(4, 3))
      1.0
    """
    return (cell - cell_offset(division)) / division


def to_cell(position, division: int):  # type: ignore[no-untyped-def]
    """Fractional cell index of a position in pixels; inverse of `to_position`.

    Example:
      >>> to_cell(1.0, 3)
      4.0
    """
    return division * position + cell_offset(division)


def nearest_cell(position: jax.Array, division: int, num_pixels: int) -> jax.Array:
    """Whole cell index of a position: `round(c p + (c-1)/2)`, half to even, kept on the grid.

    This is the rule of the published set's grid truth (CSIST-100K, odd `c`).

    Args:
      position: any shape, pixels.
      division: cells per pixel side, `c`.
      num_pixels: detector pixels along the axis, `N`.

    Returns:
      int32 of the same shape, in `0 .. cN-1`.

    Example:
      >>> nearest_cell(jnp.array([0.0, 0.4, 99.0]), 3, 2)
      Array([1, 2, 5], dtype=int32)
    """
    cell = jnp.round(to_cell(jnp.asarray(position), division))
    return jnp.clip(cell, 0, num_pixels * division - 1).astype(jnp.int32)


def fold(cells: jax.Array, division: int) -> jax.Array:
    """Space to depth: the c x c cells of each pixel become channels.

    Args:
      cells: (..., cN, cM) map.
      division: cells per pixel side, `c`.

    Returns:
      (..., N, M, c*c); channel `c*a + b` is cell `(a, b)` of the pixel.

    Example:
      >>> fold(jnp.arange(4.0).reshape(2, 2), 2).shape
      (1, 1, 4)
    """
    c = division
    *lead, rows, cols = cells.shape
    blocks = cells.reshape(*lead, rows // c, c, cols // c, c)
    return jnp.swapaxes(blocks, -3, -2).reshape(*lead, rows // c, cols // c, c * c)


def unfold_channels(channels: jax.Array, division: int) -> jax.Array:
    """Depth to space: the inverse of `fold`.

    Args:
      channels: (..., N, M, c*c).
      division: cells per pixel side, `c`.

    Returns:
      (..., cN, cM).

    Example:
      >>> m = jnp.arange(36.0).reshape(6, 6)
      >>> bool((unfold_channels(fold(m, 3), 3) == m).all())
      True
    """
    c = division
    *lead, rows, cols, _ = channels.shape
    blocks = channels.reshape(*lead, rows, cols, c, c)
    return jnp.swapaxes(blocks, -3, -2).reshape(*lead, rows * c, cols * c)


def grid_map(
    position: jax.Array,
    intensity: jax.Array,
    mask: jax.Array,
    *,
    frame_size: int | tuple[int, int],
    division: int,
    overwrite: bool = False,
    width: float = 0.0,
) -> jax.Array:
    """Grid truth: each target's intensity in its nearest cell, or shared by those around it.

    Targets that share a cell add up. `overwrite=True` is the `compat` switch: the
    reference toolkit lets the last target win. With `width` > 0 a target's intensity
    is shared among the cells by a normalised Gaussian of that width around its true
    position, so the map keeps where in its cell the target is.

    Args:
      position: (..., K, 2) row, col, pixels.
      intensity: (..., K) counts.
      mask: (..., K) bool, true where a target is present.
      frame_size: detector pixels per side, `N`, or (rows, cols).
      division: cells per pixel side, `c`.
      overwrite: keep only the last target of a cell.
      width: standard deviation of the shares, cells; 0: all to the nearest cell.

    Returns:
      (..., cN, cM) map `x`, counts.

    Example:
      >>> x = grid_map(jnp.array([[1.0, 1.0]]), jnp.array([5.0]), jnp.array([True]),
      ...              frame_size=3, division=3)
      >>> float(x[4, 4]), float(x.sum())
      (5.0, 5.0)
    """
    rows, cols = frame_shape(frame_size)
    row = nearest_cell(position[..., 0], division, rows)
    col = nearest_cell(position[..., 1], division, cols)
    if overwrite:
        same = (row[..., :, None] == row[..., None, :]) & (col[..., :, None] == col[..., None, :])
        later = jnp.triu(jnp.ones(same.shape, bool), 1)
        mask = mask & ~(same & later & mask[..., None, :]).any(-1)
    value = jnp.where(mask, intensity, 0)
    if width > 0:
        in_row = _shares(position[..., 0], division, rows, width)
        in_col = _shares(position[..., 1], division, cols, width)
    else:
        in_row = jax.nn.one_hot(row, rows * division, dtype=value.dtype)
        in_col = jax.nn.one_hot(col, cols * division, dtype=value.dtype)
    return jnp.einsum("...k,...ki,...kj->...ij", value, in_row, in_col, precision="highest")


def _shares(position: jax.Array, division: int, num_pixels: int, width: float) -> jax.Array:
    """(..., K) positions -> (..., K, cN) shares of the cells of an axis, summing to 1."""
    last = num_pixels * division - 1
    cell = jnp.clip(to_cell(position, division), 0, last)[..., None]
    index = jnp.arange(last + 1, dtype=cell.dtype).reshape((1,) * position.ndim + (-1,))
    return jax.nn.softmax(-((index - cell) ** 2) / (2 * width**2), axis=-1)
