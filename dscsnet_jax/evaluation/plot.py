"""Plot: frames, sub-pixel maps and targets as a picture.

Matplotlib (the extra `dscsnet_jax[plot]`) is imported on the first call, and used
through its objects alone: no window, no global state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from dscsnet_jax.evaluation.matching import Batch, as_batch
from dscsnet_jax.physics import grid
from dscsnet_jax.physics.psf import Psf
from dscsnet_jax.physics.targets import Targets

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and vermilion stay apart for every common colour vision deficiency, and the two
# shapes differ as well.
_TRUE_COLOUR, _ESTIMATE_COLOUR = "#0072B2", "#D55E00"
_TRUE_STYLE = {"marker": "o", "s": 160, "facecolors": "none", "edgecolors": _TRUE_COLOUR}
_ESTIMATE_STYLE = {"marker": "x", "s": 70, "c": _ESTIMATE_COLOUR}
_LINE = 2.0  # points
_MARGIN = 1.0  # pixels shown around the targets in the close-up
_WIDTH = 12.0  # inches, at 100 dots each


class _Example(NamedTuple):
    """What one row of the picture shows."""

    number: int
    frame: np.ndarray
    cells: np.ndarray | None
    truth: np.ndarray | None
    estimates: np.ndarray
    std: np.ndarray | None


def plot_unmixing(
    frames: ArrayLike | jax.Array,
    maps: ArrayLike | jax.Array | None,
    truth: Targets | None,
    estimates: Targets,
    *,
    division: int,
    max_frames: int = 4,
    std: ArrayLike | jax.Array | None = None,
) -> Figure:
    """Picture of the first frames: detector frame, sub-pixel map, targets in close-up.

    All axes are in pixels, row downwards. The close-up shows the part of the frame
    outlined in the first panel, with true positions as circles and estimated ones as
    crosses.

    Args:
      frames: (B, N, M) detector frames, counts; or one (N, M).
      maps: (B, cN, cM) sub-pixel maps, counts; or one (cN, cM); None: no such panel.
      truth: true `Targets`; None where unknown.
      estimates: estimated `Targets`.
      division: cells per pixel side of the maps, `c`.
      max_frames: most frames to show.
      std: (B, K, 2) standard deviations (row, col) of the estimates, pixels, drawn as
        one-sigma ellipses where finite.

    Returns:
      A `matplotlib.figure.Figure`, 1200 dots wide; `figure.savefig(path)` writes it.

    Raises:
      ImportError: if Matplotlib is missing.
      ValueError: if there is no frame, or if shapes disagree.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> found = from_lists([[(1.0, 1.0, 9.0)]])
      >>> figure = plot_unmixing(np.eye(3), np.eye(9), None, found, division=3)
      >>> [ax.get_title() for ax in figure.axes[:3]]
      ['frame 0', 'sub-pixel map, c = 3', '1 estimated']
    """
    examples = _examples(frames, maps, truth, estimates, division, max_frames, std)
    figure = _new_figure(len(examples))
    panels = figure.subplots(len(examples), 2 if maps is None else 3, squeeze=False)
    for example, row in zip(examples, panels, strict=True):
        _draw_image(row[0], example.frame, 1, f"frame {example.number}")
        if example.cells is not None:
            _draw_image(row[1], example.cells, division, f"sub-pixel map, c = {division}")
        _draw_close_up(row[-1], example)
        _outline(row[0], row[-1])
    handles, labels = panels[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def plot_psf(psf: Psf, *, reach: int = 5, finer: int = 8) -> Figure:
    """Light of a point in a pixel, against the way from the point to the pixel.

    Args:
      psf: a `physics.psf.Psf`.
      reach: pixels to each side.
      finer: values per pixel.

    Returns:
      A Matplotlib figure: the image, in powers of ten, and its profiles along the axes.

    Example:
      >>> from dscsnet_jax.physics.psf import Gaussian
      >>> [axes.get_title() for axes in plot_psf(Gaussian(0.5)).axes[:2]]
      ['share of the light in a pixel', 'profiles']
    """
    away, image = _oversampled(psf, reach, finer)
    figure = _new_figure(1)
    figure.clear()
    overview, profiles = figure.subplots(1, 2)
    ends = (away[0], away[-1])
    faint = np.log10(np.maximum(image, 1e-7))
    shown = overview.imshow(faint, extent=(*ends, *ends[::-1]), vmin=-6, cmap="viridis")
    figure.colorbar(shown, ax=overview, label="log10 of the share")
    overview.set(title="share of the light in a pixel", xlabel="col, pixels", ylabel="row, pixels")
    middle = len(away) // 2
    profiles.semilogy(away, np.maximum(image[middle], 1e-7), label="along the columns")
    profiles.semilogy(away, np.maximum(image[:, middle], 1e-7), "--", label="along the rows")
    profiles.set(title="profiles", xlabel="pixels from the point", ylabel="share of the light")
    profiles.legend()
    return figure


def _oversampled(psf: Psf, reach: int, finer: int) -> tuple[np.ndarray, np.ndarray]:
    """Ways (S,) from a point to a pixel along an axis, and the pixel's light (S, S)."""
    number = 2 * reach + 1
    place = np.float32(reach) - np.arange(finer) / np.float32(finer)
    terms = psf.terms()
    in_row, in_col = (
        np.asarray(terms.responses(axis, jnp.asarray(place), number)).reshape(-1, number * finer)
        for axis in (0, 1)
    )
    last = (number - 1) * finer + 1  # as far to one side as to the other
    return np.arange(last) / finer - reach, (in_row.T @ in_col)[:last, :last]


def _new_figure(num_rows: int) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need Matplotlib, which is not installed: install the extra dscsnet_jax[plot]"
        ) from error
    figure = Figure(figsize=(_WIDTH, 3.7 * num_rows + 0.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _examples(
    frames: ArrayLike | jax.Array,
    maps: ArrayLike | jax.Array | None,
    truth: Targets | None,
    estimates: Targets,
    division: int,
    max_frames: int,
    std: ArrayLike | jax.Array | None,
) -> list[_Example]:
    """Checked inputs, cut to the rows of the picture."""
    images = _stack(frames, "frames", None)
    num_frames, rows, cols = images.shape
    if min(num_frames, max_frames) < 1:
        raise ValueError(f"nothing to draw: {num_frames} frames, max_frames={max_frames}")
    map_shape = (num_frames, rows * division, cols * division)
    cells = None if maps is None else _stack(maps, "maps", map_shape)
    real = None if truth is None else _batch_of(truth, "truth", num_frames)
    found = _batch_of(estimates, "estimates", num_frames)
    errors = None if std is None else _stack(std, "std", found.position.shape)
    return [
        _Example(
            number=i,
            frame=images[i],
            cells=None if cells is None else cells[i],
            truth=None if real is None else real.position[i][real.mask[i]],
            estimates=found.position[i][found.mask[i]],
            std=None if errors is None else errors[i][found.mask[i]],
        )
        for i in range(min(num_frames, max_frames))
    ]


def _stack(values: ArrayLike | jax.Array, name: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """Float64 (B, ...) array of three axes, of the shape expected."""
    array = np.asarray(values, float)
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or (shape is not None and array.shape != shape):
        raise ValueError(f"{name}: expected shape {shape or '(B, N, M)'}, got {array.shape}")
    return array


def _batch_of(targets: Targets, name: str, num_frames: int) -> Batch:
    batch = as_batch(targets, name)
    if len(batch.mask) != num_frames:
        raise ValueError(f"{name}: expected {num_frames} frames, got {len(batch.mask)}")
    return batch


def _extent(shape: tuple[int, ...], division: int) -> tuple[float, float, float, float]:
    """Outer edges (left, right, bottom, top) of an image of cells, pixels, row downwards."""
    first = grid.to_position(-0.5, division)
    bottom, right = (grid.to_position(side - 0.5, division) for side in shape)
    return first, right, bottom, first


def _draw_image(
    axes: Axes, image: np.ndarray, division: int, title: str, *, colour_bar: bool = True
) -> None:
    extent = _extent(image.shape, division)
    drawn = axes.imshow(image, extent=extent, cmap="gray", interpolation="nearest")
    axes.set(title=title, xlabel="col (pixels)", ylabel="row (pixels)")
    if colour_bar:
        axes.figure.colorbar(drawn, ax=axes, label="counts", shrink=0.8)


def _draw_close_up(axes: Axes, example: _Example) -> None:
    title, shown = f"{len(example.estimates)} estimated", example.estimates
    if example.truth is not None:
        title = f"{len(example.truth)} true, {title}"
        shown = np.concatenate([example.truth, shown])
    _draw_image(axes, example.frame, 1, title, colour_bar=False)
    if example.truth is not None:
        _draw_targets(axes, example.truth, "true", _TRUE_STYLE)
    _draw_targets(axes, example.estimates, "estimated", _ESTIMATE_STYLE)
    if example.std is not None:
        _draw_ellipses(axes, example.estimates, example.std)
    top, left, bottom, right = _window(shown, example.frame.shape)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def _draw_targets(axes: Axes, position: np.ndarray, label: str, style: dict[str, Any]) -> None:
    from matplotlib.patheffects import withStroke

    row, col = position.T
    # A white rim keeps the markers visible on dark and bright pixels alike.
    rim = withStroke(linewidth=_LINE + 2.5, foreground="white")
    axes.scatter(col, row, label=label, linewidths=_LINE, path_effects=[rim], **style)


def _window(position: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float, float, float]:
    """Square around the targets, moved into the frame; all of it without targets.

    Returns:
      Its edges top, left, bottom, right, pixels.
    """
    first, last_col, last_row, _ = _extent(shape, 1)
    last = np.array([last_row, last_col])
    if not len(position):
        return first, first, last_row, last_col
    low, high = position.min(0) - _MARGIN, position.max(0) + _MARGIN
    side = np.minimum((high - low).max(), last - first)
    start = np.clip((low + high - side) / 2, first, last - side)
    return start[0], start[1], start[0] + side[0], start[1] + side[1]


def _draw_ellipses(axes: Axes, position: np.ndarray, std: np.ndarray) -> None:
    from matplotlib.patches import Ellipse

    for (row, col), (row_std, col_std) in zip(position, std, strict=True):
        if np.isfinite([row_std, col_std]).all():
            size = {"width": 2 * col_std, "height": 2 * row_std}
            axes.add_patch(Ellipse((col, row), **size, fill=False, ec=_ESTIMATE_COLOUR))


def _outline(overview: Axes, close_up: Axes) -> None:
    """The close-up's limits as a rectangle in the overview."""
    from matplotlib.patches import Rectangle

    (left, right), (bottom, top) = close_up.get_xlim(), close_up.get_ylim()
    box = Rectangle(
        (left, top), right - left, bottom - top, fill=False, ec=_ESTIMATE_COLOUR, lw=1.5
    )
    overview.add_patch(box)
