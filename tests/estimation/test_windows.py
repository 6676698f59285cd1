"""Windows: groups are cut out whole, see nobody else, and come back where they were."""

import dataclasses

import numpy as np
import pytest
from scipy.special import erf

from dscsnet_jax.estimation.observe import Observation
from dscsnet_jax.estimation.windows import (
    Shape,
    Windows,
    cut,
    exact_shapes,
    fit_shapes,
    frame_sources,
    join,
)
from dscsnet_jax.physics.targets import Targets, from_lists, to_lists

SIGMA = 0.5
SIZE = (118, 60)
SLOTS = 130  # one size of frames and slots for all tests: rendering is compiled once
BACKGROUND = 7.0


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
    counts = np.array(clean, np.float32).reshape(-1, *SIZE) + np.float32(BACKGROUND)
    number = np.ones(len(counts), np.float32)
    valid = np.ones(counts.shape, bool)
    seen = Observation(
        counts=counts,
        valid=valid,
        saturated=~valid,
        noise=number,
        background=BACKGROUND * number,
        background_std=0 * number,
        gain=np.inf * number,
        sigma=np.full((len(counts), 2), SIGMA, np.float32),
    )  # type: ignore[arg-type]
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
    joined, (doubled,), truncated = join(marks, len(truth.mask), number)
    np.testing.assert_array_equal(joined.count, truth.count)
    np.testing.assert_array_equal(truncated, False)
    for ours, theirs in zip(to_lists(joined), to_lists(truth), strict=True):
        np.testing.assert_allclose(ours, theirs[np.argsort(-theirs[:, 2])], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(doubled, 2 * np.asarray(joined.intensity))


def own_counts(w: Windows) -> np.ndarray:
    shape = w.observation.counts.shape[1:]
    return BACKGROUND + np.stack([sources(table, shape) for table in to_lists(w.targets)])


@pytest.mark.parametrize(("shapes", "spare"), [(fit_shapes(SIGMA), 1), (exact_shapes(SIGMA), 0)])
def test_cut_and_join_is_the_identity(
    scenes: tuple[Observation, Targets], shapes: tuple[Shape, ...], spare: int
) -> None:
    observation, truth = scenes
    cuts, crowded = cut(observation, truth, shapes, spare=spare)
    assert not crowded.any()
    assert_put_back(cuts, truth)
    for w in cuts:
        slots = w.targets.mask.shape[1]
        assert w.observation.counts.shape[1:] == (w.observation.counts.shape[1],) * 2
        assert (w.targets.mask.sum(1) + spare <= slots).all()
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
        outside.append(0)
        for w in cut(observation, truth, fit_shapes(SIGMA))[0]:
            side = w.observation.counts.shape[1]
            for frame, origin, valid in zip(w.frame, w.origin, w.observation.valid, strict=True):
                around = np.pad(observation.valid[frame], 30)
                row, col = origin + 30
                np.testing.assert_array_equal(valid, around[row : row + side, col : col + side])
                outside[-1] += (~valid).sum()
    # Windows lie within frames that are larger, and around those that are smaller.
    assert outside[0] == (~whole.valid).sum()
    assert outside[1] > 50


def test_only_the_own_group_is_left_in_a_window(scenes: tuple[Observation, Targets]) -> None:
    for w in cut(*scenes, fit_shapes(SIGMA))[0]:
        error = np.abs(w.observation.counts - own_counts(w))[w.observation.valid]
        assert error.max() < 1e-2


@pytest.mark.parametrize(
    ("gap", "number", "leak"),
    [(3.2, 2, 0.5), (2.2, 36, 5.0)],
    ids=["near groups", "a lattice that has to be parted"],
)
def test_what_leaks_in_from_neighbours_is_subtracted(gap: float, number: int, leak: float) -> None:
    """Windows that overlap, and more linked targets than any window takes."""
    rows, cols = np.divmod(np.arange(number), int(number**0.5))
    table = np.column_stack([4.1 + gap * rows, 4.3 + gap * cols, np.linspace(100, 300, number)])
    observation, truth = scene([table])
    cuts, crowded = cut(observation, truth, fit_shapes(SIGMA), spare=1)
    assert not crowded.any()
    assert sum(len(w.frame) for w in cuts) == number
    assert_put_back(cuts, truth)
    recorded = np.pad(observation.counts[0], 9)
    leaked = 0.0
    for w in cuts:
        own, side = own_counts(w), w.observation.counts.shape[1]
        for k, (row, col) in enumerate(w.origin + 9):
            valid = w.observation.valid[k]
            assert np.abs(w.observation.counts[k] - own[k])[valid].max() < 1e-2
            raw = recorded[row : row + side, col : col + side]
            leaked = max(leaked, np.abs(raw - own[k])[valid].max())
    assert leaked > leak  # there was something to subtract


@pytest.mark.parametrize("spare", [0, 1])
def test_row12_groups_too_crowded_are_flagged_and_keep_their_brightest(spare: int) -> None:
    rng = np.random.default_rng(2)
    dense = np.column_stack([5 + rng.uniform(0, 0.3, (30, 2)), rng.permutation(30) + 100.0])
    observation, truth = scene([[(5.0, 5.0, 90.0)], dense, [(2.0, 8.0, 90.0)]])
    cuts, crowded = cut(observation, truth, fit_shapes(SIGMA), spare=spare)
    assert crowded.tolist() == [False, True, False]
    joined, _, _ = join([(w, w.targets, ()) for w in cuts], 3, 30)
    assert joined.count.tolist() == [1, 24 - spare, 1]
    kept = np.asarray(joined.intensity)[1, : 24 - spare]
    np.testing.assert_array_equal(kept, np.arange(129, 105 + spare, -1))


def test_row12_join_keeps_the_brightest_and_says_so() -> None:
    pair = scene([[(3, 3, 90.0), (3, 9, 110.0), (9, 3, 100.0)], [(5.0, 5.0, 90.0)]])
    cuts, _ = cut(*pair, fit_shapes(SIGMA))
    joined, _, truncated = join([(w, w.targets, ()) for w in cuts], 2, 2)
    assert truncated.tolist() == [True, False]
    assert np.asarray(joined.intensity).tolist() == [[110.0, 100.0], [90.0, 0.0]]


@pytest.mark.parametrize("frames", [0, 2])
def test_no_frames_and_no_targets_give_no_windows(frames: int) -> None:
    observation, none = scene([[]] * frames)
    cuts, crowded = cut(observation, none, fit_shapes(SIGMA), spare=1)
    assert cuts == []
    assert crowded.tolist() == [False] * frames
    joined, values, truncated = join([], frames, 4)
    assert joined.position.shape == (frames, 4, 2)
    assert not joined.mask.any()
    assert values == []
    assert truncated.tolist() == [False] * frames
    assert frame_sources(observation, none).shape == (frames, *SIZE)


def test_a_group_alone_sees_its_frame_unchanged_to_the_bit() -> None:
    rng = np.random.default_rng(3)
    observation, truth = scene([[(5.2, 5.4, 240.0), (5.6, 4.9, 230.0)]])
    noisy = observation.counts + rng.normal(size=(1, *SIZE)).astype("f4")
    (w,), _ = cut(observation.replace(counts=noisy), truth, fit_shapes(SIGMA))
    (row, col), side = w.origin[0], w.observation.counts.shape[1]
    np.testing.assert_array_equal(
        w.observation.counts[0], noisy[0, row : row + side, col : col + side]
    )
