"""Detect: isolated targets are found where they are, noise is not taken for one."""

from functools import partial

import jax
import numpy as np
import pytest

from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.matched_filter import SUBPIXELS, matched_filter, places
from dscsnet_jax.inference.observation import observe
from dscsnet_jax.inference.prior import scene_prior
from dscsnet_jax.maps.detect import LEAST_SNR, detect, peaks_of
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian, Psf
from dscsnet_jax.physics.psf_gaussians import rotated_gaussian
from dscsnet_jax.physics.targets import Targets, from_lists, to_lists

SIGMA = 0.5
SIZE = 33
NOISE = 2.0

FRAMES = 32  # one shape for all tests: everything is compiled once

jit_render = jax.jit(partial(render, frame_size=SIZE, psf=SIGMA))
jit_observe = jax.jit(observe)
KNOWN = Known(psf=Gaussian(np.full(2, SIGMA, np.float32)))
SHOT = KNOWN.replace(sensor=Sensor(gain=np.float32(1)))


def found_in(
    frames: np.ndarray, *, max_targets: int = 20, known: Known = KNOWN, **told: float
) -> Targets:
    """Peaks of up to 32 frames of counts."""
    counts = np.zeros((FRAMES, SIZE, SIZE), np.float32)
    counts[: len(frames)] = frames
    found = detect(jit_observe(counts, Sensor(**told)), known, max_targets=max_targets)
    return jax.tree.map(lambda a: np.asarray(a)[: len(frames)], found)


def rendered(tables: list) -> np.ndarray:
    """Noise-free frames of up to four targets."""
    tables = [*tables, *[[]] * (FRAMES - len(tables))]
    return np.asarray(jit_render(from_lists(tables, 4)))


@pytest.fixture(scope="module")
def truth() -> Targets:
    """32 frames of 16 isolated targets, at least 20 times as bright as their error."""
    rng = np.random.default_rng(0)
    rows, cols = np.meshgrid(np.arange(4, 32, 8), np.arange(4, 32, 8))
    centre = np.stack([rows.ravel(), cols.ravel()], -1)
    return from_lists(
        [
            np.column_stack([centre + rng.uniform(-2, 2, (16, 2)), rng.uniform(80, 250, 16)])
            for _ in range(FRAMES)
        ]
    )


def test_isolated_targets_are_found_within_a_third_of_a_pixel(truth: Targets) -> None:
    rng = np.random.default_rng(1)
    clean = np.asarray(jit_render(truth))
    found = found_in(clean + 20 + NOISE * rng.normal(size=clean.shape), read_noise=NOISE)
    assert found.count.tolist() == [16] * 32
    for ours, theirs in zip(to_lists(found), to_lists(truth), strict=True):
        apart = np.abs(ours[:, None, :2] - theirs[None, :, :2]).max(-1)
        nearest = apart.argmin(1)
        assert sorted(nearest) == list(range(16))
        assert apart.min(1).max() < 1 / 3
        # Half a step off costs up to 6 % of the energy, the noise 4 counts (1 sigma).
        np.testing.assert_allclose(ours[:, 2], theirs[nearest, 2], rtol=0.1, atol=16)


def test_pure_noise_raises_no_alarm() -> None:
    """A place is above 5 standard deviations at 3e-7: 9 x 33 x 33 of 32 frames, 0.08 times."""
    noise = NOISE * np.random.default_rng(2).normal(size=(32, SIZE, SIZE))
    assert found_in(noise + 20, read_noise=NOISE).count.sum() <= 1
    assert found_in(noise + 20).count.sum() <= 1


@pytest.mark.parametrize("level", [0.0, 3.0, 1e4])
def test_rows2_and_3_constant_frames_hold_nothing(level: float) -> None:
    for told in ({}, {"read_noise": NOISE}):
        assert found_in(np.full((2, SIZE, SIZE), level), **told).count.tolist() == [0, 0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("psf", [Gaussian((0.5, 0.7)), rotated_gaussian((0.5, 0.8), 30)])
def test_filter_is_the_weighted_fit_of_one_target_at_every_place(psf: Psf) -> None:
    rng = np.random.default_rng(3)
    residual, weight = rng.normal(size=(9, 7)), rng.uniform(0.1, 2, (9, 7))
    weight[2, 3] = 0
    energy, ratio = map(np.asarray, jax.jit(matched_filter)(residual, weight, psf))
    unit = jax.jit(partial(render, frame_size=(9, 7)))
    for i, row in enumerate(places(9)):
        for j, col in enumerate(places(7)):
            seen = np.asarray(unit(from_lists([[(row, col, 1.0)]]), psf=psf))[0]
            information = (weight * seen**2).sum()
            fitted = (weight * seen * residual).sum() / information
            np.testing.assert_allclose(energy[i, j], fitted, rtol=1e-8)
            np.testing.assert_allclose(ratio[i, j], fitted * information**0.5, rtol=1e-8)


def test_the_ratio_of_noise_has_unit_spread() -> None:
    noise = NOISE * np.random.default_rng(4).normal(size=(400, 11, 11))
    one = partial(matched_filter, weight=np.full((11, 11), NOISE**-2), psf=Gaussian(SIGMA))
    ratio = np.asarray(jax.jit(jax.vmap(one))(noise))[1]
    spread = ratio[:, 16, 16]  # the middle of the frame, one value a frame: 1 +- 0.035
    assert abs(spread.std() - 1) < 4 * 0.035
    assert abs(spread.mean()) < 4 * 0.05


def test_a_peak_at_the_limit_is_kept_and_one_below_is_not() -> None:
    """At a place of the filter and without noise, the ratio is intensity over error."""
    psf = rendered([[(5.0, 5.0, 1.0)]])[0]
    error = NOISE / np.sqrt((psf**2).sum())
    frames = np.stack([psf * error * LEAST_SNR * share for share in (1.02, 0.98)])
    assert found_in(frames, read_noise=NOISE, background=0.0).count.tolist() == [1, 0]


def test_least_energy_and_most_targets() -> None:
    frames = rendered([[(4, 4, 100.0), (4, 12, 200.0), (12, 4, 300.0)]])
    two = found_in(frames[:1], max_targets=2, read_noise=1.0, background=0.0)
    np.testing.assert_array_equal(two.position, [[[12, 4], [4, 12]]])
    np.testing.assert_allclose(two.intensity, [[300, 200]], rtol=1e-5)
    seen = jit_observe(frames, Sensor(read_noise=1.0, background=0.0))
    bright = detect(seen, KNOWN, max_targets=2, least_energy=250.0)
    assert bright.count.tolist() == [1] + [0] * (FRAMES - 1)
    assert not np.asarray(bright.intensity)[0, 1:].any()


def test_row1_pixels_that_are_not_valid_are_not_looked_at() -> None:
    frames = np.zeros((FRAMES, SIZE, SIZE), np.float32)
    frames[0, 8, 8] = np.nan
    frames[0, 3, 3] = 1e6
    seen = jit_observe(frames, Sensor(read_noise=1.0, background=0.0))
    without = seen.replace(valid=seen.valid.at[0, 3, 3].set(False))
    assert detect(seen, KNOWN, max_targets=2).count[0] == 1
    assert detect(without, KNOWN, max_targets=2).count[0] == 0


def test_light_of_neighbours_is_not_looked_for() -> None:
    frames = rendered([[(4, 4, 100.0), (12, 12, 200.0)], [(5, 9, 150.0)]])
    seen = jit_observe(frames, Sensor(read_noise=1.0, background=0.0))
    others = rendered([[(12, 12, 200.0)], [(5, 9, 150.0)]])
    assert detect(seen, KNOWN, max_targets=2).count[:2].tolist() == [2, 1]
    found = detect(seen.replace(neighbours=others), KNOWN, max_targets=2)
    assert found.count.tolist() == [1] + [0] * (FRAMES - 1)
    np.testing.assert_array_equal(found.position[0, 0], [4, 4])


def test_the_shot_noise_of_the_sky_is_no_target() -> None:
    """That of a pedestal would be: with its light the sky is 16 times as noisy as without."""
    sky = np.random.default_rng(5).poisson(1000, (FRAMES, SIZE, SIZE)).astype(np.float32)
    told = {"read_noise": NOISE, "known": SHOT}
    assert found_in(sky, background=1000.0, **told).count.sum() <= 1
    offset = found_in(sky, pedestal=1000.0, background=0.0, **told)
    assert (offset.count > 0).all()


def test_any_number_of_frames_has_the_peaks_of_each() -> None:
    """In blocks of 128, with at least 16 slots, above half the prior's least intensity."""
    tables = [[(3, 3, 40.0 + i), (8, 8, 200.0)] for i in range(10)]
    few = np.asarray(jax.jit(partial(render, frame_size=11, psf=SIGMA))(from_lists(tables, 2)))
    seen = jax.tree.map(
        np.asarray, jit_observe(np.tile(few, (13, 1, 1)), Sensor(read_noise=1.0, background=0.0))
    )
    known = KNOWN.replace(prior=scene_prior(intensity=(90, 300)))
    found = peaks_of(seen, known, max_targets=2)
    assert found.mask.shape == (130, 16)
    # The filter sees 40 to 49 counts without an error; 45 and more count.
    assert found.count.tolist() == ([1] * 5 + [2] * 5) * 13
    by_slots = peaks_of(seen, known, max_targets=20)
    assert by_slots.mask.shape == (130, 20)
    np.testing.assert_array_equal(by_slots.position[:, :2], found.position[:, :2])
    tiny = jax.tree.map(lambda a: a[:, :1, :1] if a.ndim == 3 else a, seen)
    assert peaks_of(tiny, KNOWN, max_targets=20).mask.shape == (130, SUBPIXELS**2)


@pytest.mark.parametrize("place", [(5 + 1 / 6, 5.0), (5 + 1 / 6, 5 + 1 / 6), (5.5, 5.5)])
def test_a_target_between_places_is_one_peak(place: tuple[float, float]) -> None:
    """Two places see it alike; rounding must not decide whether there are two targets."""
    frames = rendered([[(*place, intensity)] for intensity in np.linspace(100, 300, FRAMES)])
    assert found_in(frames, read_noise=1.0, background=0.0).count.tolist() == [1] * FRAMES
