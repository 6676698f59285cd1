"""Observe: estimates on simulated frames against the truth, and what is known passes through."""

from functools import partial

import jax
import numpy as np
import pytest

from dscsnet_jax.estimation.observe import Observation, observe
from dscsnet_jax.physics.scene import frame_keys, get_preset, simulate

LEVEL, NOISE = 30.0, 4.0
FRAMES = 1000
ROUNDING = 12**-0.5


KNOWN = {"noise": NOISE, "background": LEVEL}

# One compilation for each set of arguments and shape, hence few frames, mostly as many.
jit_observe = partial(jax.jit(observe), sigma=0.5)
FEW = 20


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Frames with one to five bright targets on a level with noise, not rounded."""
    preset = get_preset("csist_float", offset=LEVEL, read_noise=NOISE)
    keys = frame_keys(1, "val", np.arange(FRAMES))
    return np.asarray(jax.jit(partial(simulate, preset))(keys).frames)


@pytest.fixture(scope="module")
def digital() -> np.ndarray:
    """Rounded 8-bit frames without other noise; their background is 0."""
    keys = frame_keys(2, "val", np.arange(FEW))
    return np.asarray(jax.jit(partial(simulate, get_preset("csist")))(keys).frames)


def assert_finite(seen: Observation) -> None:
    for name in ("counts", "noise", "background", "background_std", "sigma"):
        assert np.isfinite(getattr(seen, name)).all(), name
    assert np.all(np.asarray(seen.noise) > 0)


# --- estimates ---------------------------------------------------------------------


def test_estimates_are_those_of_a_plain_clipping(frames: np.ndarray) -> None:
    """The same eight rounds of clipping, written with NumPy's own median and percentile."""
    seen = jit_observe(frames)
    for i in range(0, FRAMES, 25):
        pixels = kept = frames[i].ravel().astype(float)
        for _ in range(8):
            level = np.median(kept)
            spread = level - np.percentile(kept, 15.87)
            kept = pixels[(pixels >= level - 4.04 * spread) & (pixels <= level + 2.5 * spread)]
        level = np.median(kept)
        assert float(seen.background[i]) == pytest.approx(level, abs=1e-4)
        spread = level - np.percentile(kept, 15.87)
        assert float(seen.noise[i]) == pytest.approx(spread, abs=1e-4)


def test_estimates_hit_the_truth_within_their_errors(frames: np.ndarray) -> None:
    """Targets bias the level by less than 5 % of the noise, and the noise by less than 5 %.

    A median of 121 pixels has the standard deviation 1.25 noise / 11; a percentile
    scatters 1.5 times as wide.
    """
    seen = jit_observe(frames)
    error = np.asarray(seen.background) - LEVEL
    assert abs(error.mean()) < 0.05 * NOISE
    ideal = 1.2533 * NOISE / 11
    assert 0.9 * ideal < error.std() < 1.3 * ideal
    noise = np.asarray(seen.noise)
    assert abs(noise.mean() / NOISE - 1) < 0.05
    assert noise.std() < 0.2 * NOISE
    # The error told is twice that of a median of as many pixels: it covers the bias.
    np.testing.assert_allclose(seen.background_std, 2 * 1.2533 * noise / 11, rtol=1e-3)
    pull = error / np.asarray(seen.background_std)
    assert np.mean(np.abs(pull) < 1) > 0.85
    assert np.mean(np.abs(pull) < 2) > 0.98


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("known", [False, True])
def test_row10_estimates_scale_with_the_frame(
    frames: np.ndarray, scale: float, known: bool
) -> None:
    few = frames[:FEW]
    base = jit_observe(few)
    scaled = (few * np.float32(scale)).astype(np.float32)
    if known:
        given = {"noise": NOISE * scale, "background": LEVEL * scale}
        seen, base = jit_observe(scaled, **given), jit_observe(few, **KNOWN)
    else:
        seen = jit_observe(scaled)
    for name in ("background", "noise", "background_std", "counts"):
        expected = np.asarray(getattr(base, name), float) * scale
        np.testing.assert_allclose(getattr(seen, name), expected, rtol=2e-5, err_msg=name)


def test_estimates_of_one_frame_do_not_depend_on_the_others(frames: np.ndarray) -> None:
    few = frames[:FEW].copy()
    base = jit_observe(few)
    few[3] = 1e30
    few[5] = np.nan
    others = np.setdiff1d(np.arange(FEW), [3, 5])
    for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(jit_observe(few)), strict=True):
        np.testing.assert_array_equal(a[others], b[others])


# --- what is known -----------------------------------------------------------------


def test_known_values_pass_through(frames: np.ndarray) -> None:
    seen = jit_observe(frames[:FEW], **KNOWN)
    np.testing.assert_array_equal(seen.noise, np.full(FEW, NOISE))
    np.testing.assert_array_equal(seen.background, np.full(FEW, LEVEL))
    np.testing.assert_array_equal(seen.background_std, np.zeros(FEW))
    np.testing.assert_array_equal(seen.counts, frames[:FEW])
    np.testing.assert_array_equal(seen.gain, np.full(FEW, np.inf))
    assert np.asarray(seen.valid).all()
    assert not np.asarray(seen.saturated).any()


def test_known_values_may_differ_from_frame_to_frame(frames: np.ndarray) -> None:
    noise, level, gain = (np.array(v, np.float32) for v in ([1, 2, 3], [7, 8, 9], [4, 5, 6]))
    seen = jit_observe(frames[:3], sigma=(0.45, 0.6), noise=noise, background=level, gain=gain)
    for got, given in ((seen.noise, noise), (seen.background, level), (seen.gain, gain)):
        np.testing.assert_array_equal(got, given)
    np.testing.assert_array_equal(seen.sigma, np.float32([[0.45, 0.6]] * 3))


def test_a_known_background_leaves_the_noise_to_be_estimated(frames: np.ndarray) -> None:
    few = frames[:FEW]
    both, level, noise = (
        jit_observe(few, **given) for given in ({}, {"background": LEVEL}, {"noise": NOISE})
    )
    np.testing.assert_allclose(level.noise, both.noise, rtol=1e-6)
    np.testing.assert_allclose(noise.background, both.background, rtol=1e-6)
    np.testing.assert_allclose(noise.background_std, 2 * 1.2533 * NOISE / 11, rtol=1e-6)


# --- rounding, full well, invalid pixels -------------------------------------------


def test_whole_counts_have_at_least_the_noise_of_rounding(digital: np.ndarray) -> None:
    estimated = jit_observe(digital)
    # Most pixels are 0: without the floor the estimate would be no noise at all.
    assert np.mean(digital == 0) > 0.5
    assert np.all(np.asarray(estimated.noise) >= np.float32(ROUNDING))
    told = jit_observe(digital, noise=0.0)
    np.testing.assert_allclose(told.noise, ROUNDING, rtol=1e-6)
    told = jit_observe(digital, noise=2.0)
    np.testing.assert_allclose(told.noise, np.sqrt(4 + 1 / 12), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_row7_whole_dtypes_equal_the_same_counts_as_floats(
    digital: np.ndarray, dtype: type
) -> None:
    as_float, as_whole = (jit_observe(digital.astype(t)) for t in (np.float32, dtype))
    for a, b in zip(jax.tree.leaves(as_float), jax.tree.leaves(as_whole), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_row4_saturated_whole_counts_began_half_a_count_lower(digital: np.ndarray) -> None:
    full = np.minimum(digital[0], 254)
    full[1, 5:7] = 255
    frames = np.stack([full, full])
    frames[1, 0, 0] += 0.25
    seen = jit_observe(frames, saturation=255.0)
    flags = full == 255
    assert flags.sum() == 2
    np.testing.assert_array_equal(seen.saturated, np.stack([flags, flags]))
    np.testing.assert_array_equal(seen.counts[0], np.where(flags, 254.5, full))
    # The second frame is not rounded: its well is where it says.
    np.testing.assert_array_equal(seen.counts[1], frames[1])


@pytest.mark.parametrize("level", [0.0, 40.0, 40.5, 1e-6, 1e6])
def test_rows2_and_3_constant_frames_are_finite(level: float) -> None:
    frames = np.full((FEW, 11, 11), level, np.float32)
    for given in ({}, {"noise": 0.0}, {"background": 0.0}):
        assert_finite(jit_observe(frames, **given))
    np.testing.assert_array_equal(jit_observe(frames).background, frames[:, 0, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_row1_pixels_that_are_not_finite_are_left_out(frames: np.ndarray, bad: float) -> None:
    few = frames[:FEW].copy()
    broken = np.zeros(few.shape, bool)
    broken[:, 2, 3:6] = True
    few[broken] = bad
    seen = jit_observe(few)
    assert_finite(seen)
    np.testing.assert_array_equal(seen.valid, ~broken)
    # The same as three pixels masked by hand, whatever they hold.
    masked = jit_observe(np.where(broken, np.float32(1e9), few), valid=~broken)
    for name in ("noise", "background", "background_std", "counts", "valid"):
        np.testing.assert_allclose(getattr(masked, name), getattr(seen, name), rtol=1e-6)
    # Medians of the 118 pixels left.
    near = np.abs(np.asarray(seen.background) - np.asarray(jit_observe(frames[:FEW]).background))
    assert near.max() < NOISE * 0.1


def test_row1_a_frame_without_any_valid_pixel_is_finite() -> None:
    seen = jit_observe(np.full((FEW, 11, 11), np.nan, np.float32))
    assert_finite(seen)
    assert not np.asarray(seen.valid).any()
