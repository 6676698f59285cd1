"""Windows: groups are cut out whole, see nobody else, and come back where they were."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy.special import erf

from dscsnet_jax.estimation.groups import linked, nearest_distance
from dscsnet_jax.estimation.windows import (
    Shape,
    Windows,
    exact_shapes,
    fit_shapes,
    flat,
    frame_sources,
    gather,
    own,
    padded,
)
from dscsnet_jax.estimation.windows import cut as cut_by_width
from dscsnet_jax.inference.observation import PER_PIXEL, Observation
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.targets import Targets, from_lists, to_lists

SIGMA = 0.5
WIDTH = np.full(2, SIGMA, np.float32)
SIZE = (118, 60)
SLOTS = 130  # one size of frames and slots for all tests: rendering is compiled once
PEDESTAL, BACKGROUND = 3.0, 4.0
LEVEL = PEDESTAL + BACKGROUND


def cut(observation: Observation, targets: Targets, *shapes: Any, **how: Any) -> list[Windows]:
    return cut_by_width(observation, flat(targets), *shapes, psf=Gaussian(WIDTH), **how)


def joined(cuts: list[Windows], frames: int, slots: int | None) -> tuple[Targets, np.ndarray]:
    answer, _, truncated = padded(*gather([(w, w.targets, ()) for w in cuts]), frames, slots)
    return answer, truncated


def sources(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Expected counts of targets (n, 3), by the error function in float64."""

    def response(place: np.ndarray, pixels: int) -> np.ndarray:
        edges = np.arange(pixels + 1) - 0.5
        return np.diff(erf((edges - place[:, None]) / (SIGMA * 2**0.5)) / 2, axis=1)

    in_row, in_col = response(table[:, 0], shape[0]), response(table[:, 1], shape[1])
    return np.einsum("k,ki,kj->ij", table[:, 2], in_row, in_col)


def scene(tables: list) -> tuple[Observation, Targets]:
    """Noise-free frames over a known background, and their targets."""
    truth = from_lists(tables, SLOTS)
    clean = [sources(table, SIZE) for table in to_lists(truth)]
    counts = np.array(clean, np.float32).reshape(-1, *SIZE) + np.float32(LEVEL)
    number = np.ones(len(counts), np.float32)
    valid = np.ones(counts.shape, bool)
    seen = Observation(
        counts=counts,
        valid=valid,
        saturated=~valid,
        neighbours=np.zeros_like(counts),
        origin=np.zeros((len(counts), 2), np.float32),
        noise=number[:, None, None],
        pedestal=PEDESTAL * number[:, None, None],
        background=BACKGROUND * number[:, None, None],
        background_std=0 * number,
    )
    return seen, truth


def scattered(seed: int) -> np.ndarray:
    """Clusters of 1 to 5 targets 9 pixels and more apart, and some on border and corner."""
    rng = np.random.default_rng(seed)
    rows, cols = np.meshgrid(np.arange(9, 112, 14), np.arange(9, 54, 14), indexing="ij")
    centre = np.stack([rows.ravel(), cols.ravel()], -1) + rng.uniform(-2.5, 2.5, (rows.size, 2))
    edges = [(-0.4, -0.3), (0.1, 30.3), (SIZE[0] - 0.6, SIZE[1] - 0.7), (70.2, SIZE[1] - 0.6)]
    table = [
        np.column_stack([place + rng.uniform(-0.5, 0.5, (n, 2)), rng.uniform(50, 250, n)])
        for place in [*centre, *edges]
        for n in [rng.integers(1, 6)]
    ]
    everything = np.concatenate(table)
    everything[:, :2] = everything[:, :2].clip(-0.49, np.array(SIZE) - 0.51)
    return rng.permutation(everything)


@pytest.fixture(scope="module")
def scenes() -> tuple[Observation, Targets]:
    return scene([scattered(0), scattered(1)[:40], []])


def assert_put_back(cuts: list[Windows], truth: Targets) -> None:
    number = truth.mask.shape[1]
    marks = [(w, w.targets, (w.targets.intensity * 2,)) for w in cuts]
    answer, (doubled,), truncated = padded(*gather(marks), len(truth.mask), number)
    np.testing.assert_array_equal(answer.count, truth.count)
    np.testing.assert_array_equal(truncated, False)
    for ours, theirs in zip(to_lists(answer), to_lists(truth), strict=True):
        np.testing.assert_allclose(ours, theirs[np.argsort(-theirs[:, 2])], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(doubled, 2 * np.asarray(answer.intensity))


def own_sources(w: Windows) -> np.ndarray:
    shape = w.observation.counts.shape[1:]
    return np.stack([sources(table, shape) for table in to_lists(w.targets)])


def origins(w: Windows) -> np.ndarray:
    return w.observation.origin.astype(int)


def pixels_of(image: np.ndarray, w: Windows) -> np.ndarray:
    """What an image (B, N, M) holds at the windows' pixels, 0 outside."""
    around = np.pad(image, [(0, 0), (30, 30), (30, 30)])
    side = w.observation.counts.shape[1]
    return np.stack(
        [
            around[frame, row : row + side, col : col + side]
            for frame, (row, col) in zip(w.frame, origins(w) + 30, strict=True)
        ]
    )


@pytest.mark.parametrize(("shapes", "free"), [(fit_shapes(SIGMA), 1), (exact_shapes(SIGMA), 0)])
def test_what_is_cut_is_put_back(
    scenes: tuple[Observation, Targets], shapes: tuple[Shape, ...], free: int
) -> None:
    observation, truth = scenes
    cuts = cut(observation, truth, shapes, num_free_slots=free)
    assert_put_back(cuts, truth)
    for w in cuts:
        slots = w.targets.mask.shape[1]
        assert w.observation.counts.shape[1:] == (w.observation.counts.shape[1],) * 2
        assert (w.targets.mask.sum(1) + free <= slots).all()
        place = w.targets.position[w.targets.mask]
        assert (place >= -0.5).all()
        assert (place <= w.observation.counts.shape[1] - 0.5).all()


def test_a_window_sees_the_pixels_of_its_frame_and_no_others(
    scenes: tuple[Observation, Targets],
) -> None:
    whole, truth = scenes
    outside = []
    for size in (whole.counts.shape[1], 5):
        images = {k: getattr(whole, k)[:, :size, :size] for k in ("counts", "valid", "saturated")}
        observation = dataclasses.replace(whole, **images)
        observation.saturated[:, 3] = True
        outside.append(0)
        assert observation.saturated.any()
        for w in cut(observation, truth, fit_shapes(SIGMA)):
            for name in images:
                expected = pixels_of(getattr(observation, name), w)
                np.testing.assert_array_equal(getattr(w.observation, name), expected)
            outside[-1] += (~w.observation.valid).sum()
    # Windows lie within frames that are larger, and around those that are smaller.
    assert outside[0] == 0
    assert outside[1] > 50


def test_numbers_of_a_frame_are_those_of_its_windows(scenes: tuple[Observation, Targets]) -> None:
    whole, truth = scenes
    number = np.arange(len(whole.counts), dtype="f4")
    told = {name: (10 * i + number)[:, None, None] for i, name in enumerate(PER_PIXEL)}
    told["background_std"] = 50 + number
    for w in cut(dataclasses.replace(whole, **told), truth, fit_shapes(SIGMA)):
        for name, value in told.items():
            np.testing.assert_array_equal(getattr(w.observation, name), value[w.frame])


def test_pixels_of_maps_are_those_of_the_windows(scenes: tuple[Observation, Targets]) -> None:
    whole, truth = scenes
    rng = np.random.default_rng(0)
    maps = {name: rng.uniform(1, 2, whole.counts.shape).astype("f4") for name in PER_PIXEL}
    for w in cut(dataclasses.replace(whole, **maps), truth, fit_shapes(SIGMA)):
        inside = w.observation.valid
        for name, values in maps.items():
            got = getattr(w.observation, name)
            np.testing.assert_array_equal(got[inside], pixels_of(values, w)[inside])
            assert (got > 0).all()  # outside of the frame too: nothing divides by 0


def test_light_of_other_groups_goes_to_the_neighbours(scenes: tuple[Observation, Targets]) -> None:
    """Counts stay as recorded; with the own targets and the level the neighbours explain them."""
    whole, truth = scenes
    for w in cut(whole, truth, fit_shapes(SIGMA)):
        seen = w.observation
        np.testing.assert_array_equal(seen.counts, pixels_of(whole.counts, w))
        explained = LEVEL + own_sources(w) + seen.neighbours
        assert np.abs(seen.counts - explained)[seen.valid].max() < 1e-2


@pytest.mark.parametrize(
    ("gap", "number", "leak"),
    [(3.2, 2, 0.5), (2.2, 36, 5.0)],
    ids=["near groups", "a lattice that has to be parted"],
)
def test_what_leaks_in_from_neighbours_is_told(gap: float, number: int, leak: float) -> None:
    """Windows that overlap, and more linked targets than any window takes."""
    rows, cols = np.divmod(np.arange(number), int(number**0.5))
    table = np.column_stack([4.1 + gap * rows, 4.3 + gap * cols, np.linspace(100, 300, number)])
    observation, truth = scene([table])
    cuts = cut(observation, truth, fit_shapes(SIGMA), num_free_slots=1)
    assert sum(own(w, w.targets).sum() for w in cuts) == number
    assert_put_back(cuts, truth)
    leaked = 0.0
    for w in cuts:
        others = pixels_of(observation.counts, w) - LEVEL - own_sources(w)
        valid = w.observation.valid
        assert np.abs(w.observation.neighbours - others)[valid].max() < 1e-2
        assert not w.observation.neighbours[~valid].any()
        leaked = max(leaked, np.abs(others)[valid].max())
    assert leaked > leak  # there was something to tell


def test_targets_are_grouped_by_the_widest_psf() -> None:
    """Evidences of several widths compare over the same windows only."""
    observation, truth = scene([[(5.0, 5.0, 200.0), (5.0, 8.6, 200.0)]])
    narrow, wide = (
        sum(len(w.frame) for w in cut(observation, truth, fit_shapes(0.7), widest=widest))
        for widest in (None, 0.7)
    )
    assert (narrow, wide) == (2, 1)


@pytest.mark.parametrize("free", [0, 1])
def test_row12_groups_that_no_window_holds_are_split(free: int) -> None:
    """Each target is of one part only; its nearest ones are guests there."""
    rng = np.random.default_rng(2)
    dense = np.column_stack([5 + rng.uniform(0, 0.3, (30, 2)), rng.permutation(30) + 100.0])
    line = np.column_stack([20 + 0.7 * np.arange(13), np.full(13, 9.0), np.full(13, 90.0)])
    tables = [[(5.0, 5.0, 90.0)], dense, [(2.0, 8.0, 90.0), *line]]
    observation, truth = scene([*tables, []])
    shapes = fit_shapes(SIGMA)
    cuts = cut(observation, truth, shapes, num_free_slots=free)
    assert_put_back(cuts, truth)
    split = np.concatenate([w.frame[w.split] for w in cuts])
    assert np.bincount(split).tolist() == [0, 8, 3]
    for w in cuts:
        mine, there = own(w, w.targets), np.asarray(w.targets.mask)
        np.testing.assert_array_equal(w.guest, there & ~mine)
        assert (w.guest.any(1) == w.split).all()
        assert (there.sum(1) + free <= there.shape[1]).all()
        assert mine[w.split].sum(1).max(initial=0) <= (shapes[-1].slots - free + 1) // 2
    # Of the line, the parts' ends are nearest to each other.
    for w in cuts:
        for number in np.flatnonzero(w.split & (w.frame == 2)):
            rows = np.asarray(w.targets.position)[number, :, 0]
            mine, guest = rows[own(w, w.targets)[number]], rows[w.guest[number]]
            assert np.abs(guest[:, None] - mine).min(1).max() < 4 * SIGMA + 1


def test_row12_answers_of_too_few_slots_keep_the_brightest_and_say_so() -> None:
    pair = scene([[(3, 3, 90.0), (3, 9, 110.0), (9, 3, 100.0)], [(5.0, 5.0, 90.0)]])
    cuts = cut(*pair, fit_shapes(SIGMA))
    answer, truncated = joined(cuts, 2, 2)
    assert truncated.tolist() == [True, False]
    assert np.asarray(answer.intensity).tolist() == [[110.0, 100.0], [90.0, 0.0]]
    # Not told: as many as there are, and some.
    answer, truncated = joined(cuts, 2, None)
    assert answer.mask.shape == (2, 16)
    assert truncated.tolist() == [False, False]
    assert answer.count.tolist() == [3, 1]


@pytest.mark.parametrize("frames", [0, 2])
def test_no_frames_and_no_targets_give_no_windows(frames: int) -> None:
    observation, none = scene([[]] * frames)
    assert cut(observation, none, fit_shapes(SIGMA), num_free_slots=1) == []
    answer, truncated = joined([], frames, 4)
    assert answer.position.shape == (frames, 4, 2)
    assert not answer.mask.any()
    assert truncated.tolist() == [False] * frames
    assert frame_sources(none, Gaussian(WIDTH), observation.counts).shape == (frames, *SIZE)


def test_a_group_alone_has_no_neighbours_to_the_bit() -> None:
    rng = np.random.default_rng(3)
    observation, truth = scene([[(5.2, 5.4, 240.0), (5.6, 4.9, 230.0)]])
    noisy = observation.counts + rng.normal(size=(1, *SIZE)).astype("f4")
    (w,) = cut(observation.replace(counts=noisy), truth, fit_shapes(SIGMA))
    np.testing.assert_array_equal(w.observation.counts, pixels_of(noisy, w))
    assert not w.observation.neighbours.any()


def test_pairs_are_of_one_frame_and_near() -> None:
    position = np.array([[0.0, 0.0], [2.0, 1.0], [0.0, 0.0], [5.0, 3.1], [-0.4, 2.0]])
    frame = np.array([0, 0, 1, 0, 0])
    pairs = {tuple(sorted(pair)) for pair in linked(position, frame, 2.0).tolist()}
    assert pairs == {(0, 1), (0, 4)}
    assert linked(np.zeros((0, 2)), np.zeros(0, int), 2.0).shape == (0, 2)


def test_the_nearest_is_of_the_same_frame() -> None:
    to, to_frame = np.array([[0.0, 0.0], [9.0, 9.0], [3.0, 4.0]]), np.array([0, 0, 2])
    place, frame = np.array([[0.0, 1.0], [9.0, 5.0], [3.0, 4.5]]), np.array([0, 0, 2])
    distance = nearest_distance(place, frame, to, to_frame)
    np.testing.assert_allclose(distance, [1.0, 4.0, 0.5], rtol=1e-12)
    assert nearest_distance(place[:0], frame[:0], to, to_frame).shape == (0,)
    # The farthest of one frame is nearer than any of another.
    far = nearest_distance(
        np.array([[9.0, 9.0]]), np.array([1]), np.zeros((2, 2)), np.array([1, 2])
    )
    np.testing.assert_allclose(far, 9 * 2**0.5, rtol=1e-12)
