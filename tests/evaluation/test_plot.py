"""The picture: what is drawn, and where."""

import io
import sys

import numpy as np
import pytest

from dscsnet_jax.evaluation.plot import plot_unmixing
from dscsnet_jax.physics import grid
from dscsnet_jax.physics.targets import from_lists

TRUTH = from_lists([[(4.25, 5.0, 230.0), (4.5, 5.75, 240.0)], [(8.0, 2.0, 225.0)]])
FOUND = from_lists([[(4.5, 5.5, 230.0)], [(8.0, 2.25, 225.0), (7.5, 3.0, 60.0)]])


def make_frames(division=3):
    rng = np.random.default_rng(0)
    shape = (2, 11 * division, 12 * division)
    return rng.uniform(0, 255, (2, 11, 12)), rng.uniform(0, 255, shape)


def markers(axes):
    return {c.get_label(): np.asarray(c.get_offsets()) for c in axes.collections}


def by_title(figure, start):
    return [ax for ax in figure.axes if ax.get_title().startswith(start)]


def test_panels_titles_and_legend():
    frames, maps = make_frames()
    figure = plot_unmixing(frames, maps, TRUTH, FOUND, division=3)
    assert len(figure.axes) == 2 * 3 + 2 * 2  # three panels per frame, two with a colour bar
    assert [ax.get_title() for ax in figure.axes if ax.get_title()] == [
        "frame 0",
        "sub-pixel map, c = 3",
        "2 true, 1 estimated",
        "frame 1",
        "sub-pixel map, c = 3",
        "1 true, 2 estimated",
    ]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["true", "estimated"]
    assert figure.get_size_inches()[0] * figure.dpi == 1200


def test_markers_stand_at_column_and_row_of_the_targets():
    frames, maps = make_frames()
    figure = plot_unmixing(frames, maps, TRUTH, FOUND, division=3)
    first, second = (by_title(figure, f"{n} true")[0] for n in (2, 1))
    assert markers(first)["true"].tolist() == [[5.0, 4.25], [5.75, 4.5]]
    assert markers(first)["estimated"].tolist() == [[5.5, 4.5]]
    assert markers(second)["estimated"].tolist() == [[2.25, 8.0], [3.0, 7.5]]
    for axes, points in ((first, TRUTH.position[0]), (second, FOUND.position[1])):
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert bottom > top  # rows run downwards
        assert right - left == pytest.approx(bottom - top)
        assert (points[:, 1] > left).all()
        assert (points[:, 1] < right).all()
        assert (points[:, 0] > top).all()
        assert (points[:, 0] < bottom).all()


@pytest.mark.parametrize("division", [2, 3, 5])
def test_map_cells_stand_at_their_positions_in_pixels(division):
    frames, maps = make_frames(division)
    figure = plot_unmixing(frames, maps, None, FOUND, division=division, max_frames=1)
    (axes,) = by_title(figure, "sub-pixel map")
    image = axes.images[0]
    left, right, bottom, top = image.get_extent()
    shape = maps.shape[1:]
    cols = left + (np.arange(shape[1]) + 0.5) * (right - left) / shape[1]
    rows = top + (np.arange(shape[0]) + 0.5) * (bottom - top) / shape[0]
    np.testing.assert_allclose(cols, grid.cell_centres(12, division), atol=1e-12)
    np.testing.assert_allclose(rows, grid.cell_centres(11, division), atol=1e-12)
    np.testing.assert_array_equal(image.get_array(), maps[0])


def test_close_up_is_outlined_in_the_frame():
    frames, maps = make_frames()
    figure = plot_unmixing(frames, maps, TRUTH, FOUND, division=3)
    box = by_title(figure, "frame 1")[0].patches[0].get_bbox()
    close_up = by_title(figure, "1 true")[0]
    assert (box.x0, box.x1) == pytest.approx(close_up.get_xlim())
    assert (box.y1, box.y0) == pytest.approx(close_up.get_ylim())


def test_ellipses_have_the_standard_deviations_and_skip_infinite_ones():
    frames, maps = make_frames()
    std = np.zeros((2, 2, 2))
    std[0, 0], std[1, 0], std[1, 1] = (0.1, 0.2), (np.inf, np.inf), (0.05, 0.05)
    figure = plot_unmixing(frames, maps, TRUTH, FOUND, division=3, std=std)
    (ellipse,) = by_title(figure, "2 true")[0].patches
    assert ellipse.get_center() == (5.5, 4.5)
    assert (ellipse.width, ellipse.height) == (0.4, 0.2)  # col, row
    (ellipse,) = by_title(figure, "1 true")[0].patches
    assert ellipse.get_center() == (3.0, 7.5)


def test_unknown_truth_missing_maps_and_single_frames():
    frames, _ = make_frames()
    figure = plot_unmixing(frames[0], None, None, from_lists([[]]), division=3)
    assert [ax.get_title() for ax in figure.axes][:2] == ["frame 0", "0 estimated"]
    close_up = by_title(figure, "0 estimated")[0]
    assert close_up.get_xlim() == (-0.5, 11.5)  # nothing to enlarge: the whole frame
    assert close_up.get_ylim() == (10.5, -0.5)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["estimated"]


def test_max_frames_and_png_without_pyplot():
    frames, maps = make_frames()
    before = "matplotlib.pyplot" in sys.modules
    figure = plot_unmixing(frames, maps, TRUTH, FOUND, division=3, max_frames=1)
    assert not by_title(figure, "frame 1")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_row05_wrong_shapes_name_the_argument():
    frames, maps = make_frames()
    with pytest.raises(ValueError, match=r"maps: expected shape \(2, 33, 36\), got \(2, 33, 35\)"):
        plot_unmixing(frames, maps[..., 1:], TRUTH, FOUND, division=3)
    with pytest.raises(ValueError, match="estimates: expected 2 frames, got 1"):
        plot_unmixing(frames, maps, TRUTH, from_lists([[]]), division=3)
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_unmixing(frames[:0], None, None, from_lists([]), division=3)


def test_missing_matplotlib_names_the_extra(monkeypatch):
    frames, maps = make_frames()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"dscsnet_jax\[plot\]"):
        plot_unmixing(frames, maps, TRUTH, FOUND, division=3)
