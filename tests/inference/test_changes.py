"""Changes: each kind on windows made for it, of fits written by hand."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.inference.changes import NEAR_CHANGES, NUM_CHANGES, changes, closest_pair
from dscsnet_jax.inference.fit import Fit
from dscsnet_jax.inference.intensity import Uniform
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.matched_filter import matched_filter, places
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.prior import scene_prior
from dscsnet_jax.inference.scene_model import scene_model
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.targets import Targets, from_lists, to_lists

SIDE, SLOTS, LEVEL, NOISE = 11, 4, 10.0, 2.0
KNOWN = Known(psf=Gaussian(np.float32(0.5)))
TOLD = dataclasses.replace(
    KNOWN, sensor=Sensor(gain=np.float32(0.5)), prior=scene_prior(intensity=Uniform(20.0, 1000.0))
)

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
jit_changes = quick_jit(changes, static_argnames="only_add")
jit_render = quick_jit(partial(render, frame_size=SIDE, psf=0.5))

ADDED, FAINTEST, FAINT, ONE, SPLIT, MERGED, *ROTATED = range(NUM_CHANGES)
(
    MISSED,  # one of two is not in the fit
    COLUMNS,  # pairs fitted as one
    DIAGONAL,
    THREE,  # well fitted, the third faint
    EMPTY,
    FULL,  # no slot is free
    UNCERTAIN,  # the brighter one has the larger error
    SATURATED,
    NEIGHBOUR,
    BROKEN,
) = range(10)
TRUTH = [
    [(4.0, 4.0, 200.0), (7.0, 7.3, 150.0)],
    [(5.0, 4.7, 120.0), (5.0, 5.3, 120.0)],
    [(2.0, 2.0, 90.0), (5.2, 5.2, 120.0), (4.8, 4.8, 120.0)],
    [(3.0, 3.0, 200.0), (3.5, 3.2, 100.0), (8.0, 8.0, 15.0)],
    [],
    [(2.0, 2.0, 90.0), (5.0, 5.0, 100.0), (8.0, 8.0, 110.0), (2.0, 8.0, 120.0)],
    [(3.0, 3.0, 200.0), (7.0, 7.0, 100.0)],
    [(5.0, 5.0, 600.0), (5.0, 6.0, 150.0)],
    [(3.0, 3.0, 200.0), (8.0, 8.0, 40.0)],
    [(3.0, 3.0, 200.0), (8.0, 8.0, 40.0)],
]
FOUND = [
    TRUTH[MISSED][:1],
    [(5.0, 5.0, 240.0)],
    [(2.0, 2.0, 90.0), (5.0, 5.0, 240.0)],
    TRUTH[THREE],
    [],
    TRUTH[FULL],
    TRUTH[UNCERTAIN],
    TRUTH[SATURATED][:1],
    TRUTH[NEIGHBOUR][:1],
    TRUTH[BROKEN][:1],
]


def single(targets: Targets) -> Targets:
    position, intensity = (np.asarray(a, np.float32) for a in (targets.position, targets.intensity))
    return Targets(position, intensity, np.asarray(targets.mask))  # type: ignore[arg-type]


def windows(truth: list) -> Observation:
    """Without noise, but of known noise."""
    counts = np.asarray(jit_render(single(from_lists(truth, SLOTS)))) + np.float32(LEVEL)
    zero = np.zeros(len(truth), np.float32)
    return Observation(
        counts=counts,
        valid=np.ones(counts.shape, bool),
        saturated=np.zeros(counts.shape, bool),
        neighbours=np.zeros_like(counts),
        origin=np.zeros((len(truth), 2), np.float32),
        noise=zero[:, None, None] + np.float32(NOISE),
        pedestal=zero[:, None, None] + np.float32(LEVEL),
        background=zero[:, None, None],
        background_std=zero,
    )


@partial(quick_jit)
def fit_of(targets: Targets, seen: Observation, known: Known, std: jax.Array) -> Fit:
    """What `fit` would tell of these targets."""

    def pack(targets: Targets, seen: Observation) -> jax.Array:
        return scene_model(seen, targets.mask, known).pack(targets)

    number = targets.mask.shape[0]
    return Fit(
        theta=jax.vmap(pack)(targets, seen),
        targets=targets,
        level=seen.level[:, 0, 0],
        covariance=jax.vmap(jnp.diag)((std**2).reshape(number, -1)),
        chi_square=jnp.zeros(number),
        num_pixels=jnp.zeros(number, int),
        converged=jnp.ones(number, bool),
    )


def batch() -> tuple[Observation, Targets, np.ndarray]:
    seen = windows(TRUTH)
    seen.counts[SATURATED] = np.minimum(seen.counts[SATURATED], 200)
    seen.saturated[SATURATED] = seen.counts[SATURATED] == 200
    assert seen.saturated.sum() == 1
    other = from_lists([[(6.0, 3.0, 300.0)]], SLOTS)
    seen.neighbours[NEIGHBOUR] = np.asarray(jit_render(single(other)))[0]
    seen.counts[NEIGHBOUR] += seen.neighbours[NEIGHBOUR]
    seen.valid[BROKEN, 5, 6] = False
    seen.counts[BROKEN, 5, 6] = 1e4
    std = np.ones((len(TRUTH), SLOTS, 3), np.float32)
    std[UNCERTAIN, 0, 2] = 50
    return seen, single(from_lists(FOUND, SLOTS)), std


@pytest.fixture(scope="module")
def found() -> tuple[Fit, Targets]:
    """Fits, and their changes."""
    seen, start, std = batch()
    best = fit_of(start, seen, KNOWN, std)
    return best, jit_changes(best, seen, KNOWN, only_add=False)


def table(targets: Targets, *index: int) -> np.ndarray:
    """(n, 3) of one window, of one change."""
    one = jax.tree.map(lambda a: np.asarray(a)[index][None], targets)
    return to_lists(one)[0].astype(float)


def centre(rows: np.ndarray) -> np.ndarray:
    return rows[:, 2] @ rows[:, :2] / rows[:, 2].sum()


def assert_left_alone(found: tuple[Fit, Targets], window: int, change: int) -> None:
    best, other = found
    for ours, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(best.targets), strict=True):
        np.testing.assert_array_equal(ours[window, change], theirs[window])


def test_shapes_and_padded_slots(found: tuple[Fit, Targets]) -> None:
    _, other = found
    assert NEAR_CHANGES == 4
    assert other.mask.shape == (len(TRUTH), NUM_CHANGES, SLOTS)
    padded = ~np.asarray(other.mask)
    assert not np.asarray(other.position)[padded].any()
    assert not np.asarray(other.intensity)[padded].any()
    for value in (other.position, other.intensity):
        assert np.isfinite(value).all()


@pytest.mark.parametrize("window", [MISSED, SATURATED, NEIGHBOUR, BROKEN])
def test_a_target_is_added_where_one_is_missing(found: tuple[Fit, Targets], window: int) -> None:
    """Saturated pixels tell no lack of light, neighbours' is not asked for, nor broken pixels'."""
    _, other = found
    missed = np.array(TRUTH[window][1])
    rows = table(other, window, ADDED)
    assert len(rows) == 2
    np.testing.assert_allclose(rows[0], FOUND[window][0], rtol=1e-6)
    # At the nearest third of a pixel; the energy lacks what a sixth of a pixel costs.
    assert np.abs(rows[1, :2] - missed[:2]).max() < 1 / 6 + 1e-3
    assert rows[1, 2] == pytest.approx(missed[2], rel=0.15)


def test_full_slots_and_empty_windows_have_no_neighbouring_count(
    found: tuple[Fit, Targets],
) -> None:
    for change in (ADDED, SPLIT):
        assert_left_alone(found, FULL, change)
    for change in range(NUM_CHANGES):
        if change != ADDED:
            assert_left_alone(found, EMPTY, change)


def test_the_least_significant_target_is_removed(found: tuple[Fit, Targets]) -> None:
    _, other = found
    np.testing.assert_allclose(table(other, THREE, FAINTEST), TRUTH[THREE][:2], rtol=1e-6)
    np.testing.assert_allclose(table(other, UNCERTAIN, FAINTEST), TRUTH[UNCERTAIN][1:], rtol=1e-6)
    assert len(table(other, MISSED, FAINTEST)) == 0


def test_all_faint_targets_are_removed(found: tuple[Fit, Targets]) -> None:
    """Those below a tenth of the brightest."""
    _, other = found
    np.testing.assert_allclose(table(other, THREE, FAINT), TRUTH[THREE][:2], rtol=1e-6)
    assert_left_alone(found, UNCERTAIN, FAINT)


def test_all_targets_become_one(found: tuple[Fit, Targets]) -> None:
    _, other = found
    for window in (THREE, FULL):
        rows = np.array(TRUTH[window])
        expected = [[*centre(rows), rows[:, 2].sum()]]
        np.testing.assert_allclose(table(other, window, ONE), expected, rtol=1e-5)
        # In the slot of the brightest.
        assert np.asarray(other.mask[window, ONE]).argmax() == rows[:, 2].argmax()


@pytest.mark.parametrize(
    ("window", "direction"), [(COLUMNS, [0.0, 1.0]), (DIAGONAL, [0.5**0.5, 0.5**0.5])]
)
def test_the_target_that_is_a_pair_is_split_along_it(
    found: tuple[Fit, Targets], window: int, direction: list[float]
) -> None:
    _, other = found
    rows = table(other, window, SPLIT)
    pair = rows[rows[:, 2] == 120]
    assert len(pair) == 2
    assert len(rows) == len(FOUND[window]) + 1
    np.testing.assert_allclose(pair[:, :2].mean(0), [5, 5], atol=1e-5)
    apart = pair[0, :2] - pair[1, :2]
    distance = np.linalg.norm(apart)
    assert abs(apart @ np.array(direction)) / distance > 0.999
    truth = np.array(TRUTH[window])[-2:, :2]
    assert distance == pytest.approx(np.linalg.norm(truth[0] - truth[1]), rel=0.2)


def test_the_closest_pair_is_merged(found: tuple[Fit, Targets]) -> None:
    best, other = found
    rows = np.array(TRUTH[THREE])
    pair = [*centre(rows[:2]), rows[:2, 2].sum()]
    np.testing.assert_allclose(table(other, THREE, MERGED), [pair, rows[2]], rtol=1e-5)
    assert_left_alone(found, MISSED, MERGED)  # there is no pair
    distance, _ = closest_pair(best.targets)
    expected = [np.inf] * len(TRUTH)
    expected[DIAGONAL], expected[THREE] = 18**0.5, 0.29**0.5
    expected[FULL], expected[UNCERTAIN] = 18**0.5, 32**0.5
    np.testing.assert_allclose(distance, expected, rtol=1e-5)


@pytest.mark.parametrize(("change", "angle"), list(zip(ROTATED, (180, 90, 45), strict=True)))
def test_targets_are_rotated_about_their_centre_of_energy(
    found: tuple[Fit, Targets], change: int, angle: float
) -> None:
    _, other = found
    for window in (THREE, FULL, UNCERTAIN):
        rows, turned = np.array(TRUTH[window]), table(other, window, change)
        np.testing.assert_allclose(turned[:, 2], rows[:, 2], rtol=1e-6)
        np.testing.assert_allclose(centre(turned), centre(rows), atol=1e-4)
        before, after = (
            (r[:, :2] - centre(r)) @ np.array([1, 1j]) for r in (rows, turned)
        )  # as complex numbers
        turn = after / before
        np.testing.assert_allclose(np.abs(turn), 1, atol=1e-4)
        np.testing.assert_allclose(turn, turn[0], atol=1e-4)
        assert abs(np.degrees(np.angle(turn[0]))) == pytest.approx(angle, abs=0.01)


def test_only_add_is_the_first_of_all(found: tuple[Fit, Targets]) -> None:
    best, other = found
    added = jit_changes(best, batch()[0], KNOWN, only_add=True)
    assert added.mask.shape == (len(TRUTH), 1, SLOTS)
    for ours, theirs in zip(jax.tree.leaves(added), jax.tree.leaves(other), strict=True):
        ours, theirs = np.array(ours[:, 0]), np.array(theirs[:, ADDED])
        if ours.dtype != bool:
            # The fit explains this window: its peak is one of roundings, which programs differ in.
            ours[THREE, 3] = theirs[THREE, 3] = 0
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_windows_stand_alone(found: tuple[Fit, Targets]) -> None:
    best, other = found
    order = np.random.default_rng(0).permutation(len(TRUTH))
    some: Any = partial(jax.tree.map, lambda a: np.asarray(a)[order])
    got = jit_changes(some(best), some(batch()[0]), KNOWN, only_add=False)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(some(other)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_added_intensities_keep_to_the_prior_and_shot_noise_hides_targets() -> None:
    """A faint one, a bright one, and two alike of which one lies beneath a bright target."""
    truth = [
        [(4.0, 4.0, 12.0)],
        [(4.0, 4.0, 3000.0)],
        [(3.0, 3.0, 900.0), (3.0, 4.0, 60.0), (8.0, 8.0, 55.0)],
    ]
    found = [[], [], truth[2][:1]]
    seen, start = windows(truth), single(from_lists(found, SLOTS))
    best = fit_of(start, seen, TOLD, np.ones((3, SLOTS, 3), np.float32))
    rows = [
        table(jit_changes(best, seen, TOLD, only_add=True), window, 0)[-1] for window in range(3)
    ]
    np.testing.assert_allclose([r[2] for r in rows[:2]], [20, 1000], rtol=1e-6)
    np.testing.assert_allclose([r[:2] for r in rows], [[4, 4], [4, 4], [8, 8]], atol=0.01)
    # Without shot noise it is the brighter one.
    plain = dataclasses.replace(TOLD, sensor=Sensor(gain=np.float32(1e12)))
    row = table(jit_changes(best, seen, plain, only_add=True), 2, 0)[-1]
    np.testing.assert_allclose(row[:2], [3, 4], atol=0.4)


def test_matched_filter_tells_energy_and_its_error() -> None:
    """Of the one target in a window, and of none where no pixel is used."""
    counts = np.asarray(jit_render(single(from_lists([[(4.0, 6.0, 100.0)]], SLOTS))))[0]
    weight = np.full_like(counts, 1 / NOISE**2)
    weight[:4, :4] = 0
    energy, ratio = quick_jit(matched_filter)(counts, weight, Gaussian(np.float32(0.5)))
    assert energy.shape == ratio.shape == (3 * SIDE, 3 * SIDE)
    row, col = np.divmod(np.argmax(ratio), 3 * SIDE)
    assert (places(SIDE)[row], places(SIDE)[col]) == (4, 6)
    assert float(energy[row, col]) == pytest.approx(100, rel=1e-4)
    expected = (counts**2).sum() ** 0.5 / NOISE
    assert float(ratio[row, col]) == pytest.approx(expected, rel=1e-4)
    assert float(ratio[0, 0]) == float(energy[0, 0]) == 0
