"""Observation: estimates on simulated frames against the truth, and what is told passes through."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.inference.observation import (
    PER_PIXEL,
    ROUNDING,
    Observation,
    observe,
    remeasured,
)
from dscsnet_jax.inference.pixels import pixel_std
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.scene import Scene, frame_keys, get_preset, simulate

LEVEL, NOISE = 30.0, 4.0
FRAMES = 1000
ESTIMATED = ("pedestal", "background", "noise", "background_std", "counts")
KNOWN = {"read_noise": NOISE, "background": LEVEL}

# One compilation for each set of arguments and shape, hence few frames, mostly as many.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
FEW = 20


def numbers(seen: Observation, shape: tuple[int, ...] = (-1,)) -> Observation:
    """Of each frame one number (B,), where all pixels share it."""
    return seen.replace(**{name: getattr(seen, name).reshape(shape) for name in PER_PIXEL})


@quick_jit
def jit_observe(frames: Any, sensor: Sensor | None = None, valid: Any = None) -> Observation:
    return numbers(observe(frames, sensor, valid=valid))


@quick_jit
def jit_remeasured(seen: Observation, *given: Any) -> Observation:
    return numbers(remeasured(numbers(seen, (-1, 1, 1)), *given))


@pytest.fixture(scope="module")
def scenes() -> Scene:
    """Frames with one to five bright targets on a level with noise, not rounded."""
    preset = get_preset("csist_float", pedestal=LEVEL, read_noise=NOISE)
    keys = frame_keys(1, "val", np.arange(FRAMES))
    return jax.device_get(quick_jit(partial(simulate, preset))(keys))


@pytest.fixture(scope="module")
def frames(scenes: Scene) -> np.ndarray:
    return scenes.frames


@pytest.fixture(scope="module")
def source(scenes: Scene) -> np.ndarray:
    """Expected counts of the targets of `frames`."""
    draw = quick_jit(partial(render, frame_size=11, psf=get_preset("csist_float").sigma))
    return np.asarray(draw(scenes.targets))


@pytest.fixture(scope="module")
def digital() -> np.ndarray:
    """Rounded 8-bit frames without other noise; their background is 0."""
    keys = frame_keys(2, "val", np.arange(FEW))
    return np.asarray(quick_jit(partial(simulate, get_preset("csist")))(keys).frames)


def sky(number: int, gain: float, photons: float, pedestal: float, noise: float) -> np.ndarray:
    """Frames of light without targets, not rounded."""
    rng = np.random.default_rng(3)
    electrons = rng.poisson(photons * gain, (number, 11, 11))
    return np.float32(pedestal + electrons / gain + rng.normal(0, noise, electrons.shape))


def assert_finite(seen: Observation) -> None:
    for name in ESTIMATED:
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
        assert float(seen.level[i]) == pytest.approx(level, abs=1e-4)
        spread = level - np.percentile(kept, 15.87)
        assert float(seen.noise[i]) == pytest.approx(spread, abs=1e-4)


def test_estimates_hit_the_truth_within_their_errors(frames: np.ndarray) -> None:
    """Targets bias the level by less than 5 % of the noise, and the noise by less than 5 %.

    A median of 121 pixels has the standard deviation 1.25 noise / 11; a percentile
    scatters 1.5 times as wide.
    """
    seen = jit_observe(frames)
    error = np.asarray(seen.level) - LEVEL
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
    scaled = (few * np.float32(scale)).astype(np.float32)
    told = {name: value * scale for name, value in KNOWN.items()} if known else {}
    base, seen = (
        jit_observe(few, Sensor(**KNOWN if known else {})),
        jit_observe(scaled, Sensor(**told)),
    )
    for name in ESTIMATED:
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


# --- pedestal and photons ----------------------------------------------------------


def test_light_of_the_sky_has_shot_noise_and_a_pedestal_has_none() -> None:
    frames = sky(FEW, 1.0, 1000.0, 0.0, 2.0)
    told = {"read_noise": 2.0, "gain": 1.0}
    light = jit_observe(frames, Sensor(**told, pedestal=0.0, background=1000.0))
    np.testing.assert_array_equal(light.noise, np.float32(2))
    np.testing.assert_array_equal(light.level, np.float32(1000))
    np.testing.assert_allclose(pixel_std(light, 1.0), np.sqrt(4 + 1000), rtol=1e-6)
    offset = jit_observe(frames, Sensor(**told, pedestal=1000.0, background=0.0))
    np.testing.assert_array_equal(offset.level, light.level)
    np.testing.assert_array_equal(pixel_std(offset, 1.0), np.float32(2))
    # Without a gain nobody counts electrons.
    np.testing.assert_array_equal(pixel_std(light, None), np.float32(2))


@pytest.mark.parametrize("gain", [None, 2.0])
def test_an_estimated_level_is_light_above_the_pedestal(
    frames: np.ndarray, gain: float | None
) -> None:
    """With a gain and without one; no pedestal is none, as 0 is."""
    few, none = frames[:FEW], np.zeros(FEW)
    plain = jit_observe(few, Sensor(gain=gain))
    np.testing.assert_array_equal(plain.pedestal, none)
    level = np.asarray(plain.background)
    assert (np.abs(level - LEVEL) < NOISE).all()
    np.testing.assert_array_equal(plain.level, level)
    zero = jit_observe(few, Sensor(gain=gain, pedestal=0.0))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(zero), strict=True):
        np.testing.assert_array_equal(a, b)
    offset = jit_observe(few, Sensor(gain=gain, pedestal=12.0))
    np.testing.assert_array_equal(offset.pedestal, np.full(FEW, 12.0))
    np.testing.assert_allclose(offset.background, level - 12, rtol=1e-6)
    told = jit_observe(few, Sensor(gain=gain, background=5.0))
    np.testing.assert_array_equal(told.pedestal, none)
    np.testing.assert_array_equal(told.background, np.full(FEW, 5.0))


def test_estimated_noise_leaves_the_measured_variance(frames: np.ndarray) -> None:
    """What shot noise explains is not read noise; the rest is, down to none."""
    some, gain = frames[:FEW], 10.0
    spread = np.asarray(jit_observe(some).noise)
    seen = jit_observe(some, Sensor(gain=gain))
    shot = np.asarray(seen.background) / gain
    assert (shot < spread**2).all()
    np.testing.assert_allclose(pixel_std(seen, gain) ** 2, spread**2, rtol=1e-5)
    np.testing.assert_allclose(seen.noise**2 + shot, spread**2, rtol=1e-5)
    np.testing.assert_allclose(seen.background_std, 2 * 1.2533 * spread / 11, rtol=1e-5)
    # More shot noise than there is: all of it, and no read noise.
    seen = jit_observe(some, Sensor(gain=0.1))
    assert not np.asarray(seen.noise).any()
    np.testing.assert_allclose(pixel_std(seen, 0.1) ** 2, seen.background / 0.1, rtol=1e-6)
    # A level below its pedestal is no light.
    seen = jit_observe(some, Sensor(gain=0.1, pedestal=100.0))
    assert (np.asarray(seen.background) < 0).all()
    np.testing.assert_allclose(pixel_std(seen, 0.1), spread, rtol=1e-5)


def test_read_noise_is_found_beneath_shot_noise() -> None:
    """Variances add up: their mean over the frames, by its standard error."""
    gain, photons, pedestal, noise = 4.0, 40.0, 20.0, 5.0
    frames = sky(FRAMES, gain, photons, pedestal, noise)
    seen = jit_observe(frames, Sensor(gain=gain, pedestal=pedestal))
    variance = np.asarray(seen.noise, float) ** 2
    error = variance.std() / FRAMES**0.5
    # A percentile of 121 pixels is biased by less than 2 % of all the noise, 4 % of its square.
    assert abs(variance.mean() - noise**2) < 4 * error + 0.04 * (noise**2 + photons / gain)
    off = np.asarray(seen.background, float) - photons
    assert abs(off.mean()) < 4 * off.std() / FRAMES**0.5 + 0.02 * noise
    # As if all were read noise: far off.
    assert np.asarray(jit_observe(frames).noise, float).mean() > 1.1 * noise


# --- measured once more ------------------------------------------------------------


def test_the_second_measurement_is_that_of_plain_numpy(
    scenes: Scene, frames: np.ndarray, source: np.ndarray
) -> None:
    """Mean and deviation of what is within four deviations, with the fits' freedom taken off."""
    number = scenes.targets.count.astype(np.float32)
    seen = jit_observe(frames)
    again = jit_remeasured(seen, source, number)
    first = jit_observe(frames - source)
    for i in range(0, FRAMES, 25):
        left = (frames[i] - source[i]).astype(float).ravel()
        near = left[np.abs(left - float(first.level[i])) <= 4 * float(first.noise[i])]
        freedom = len(near) - 1 - 3 * number[i]
        noise = np.sqrt(((near - near.mean()) ** 2).sum() / freedom)
        assert float(again.background[i]) == pytest.approx(near.mean(), abs=1e-3)
        assert float(again.noise[i]) == pytest.approx(noise, rel=1e-3)
        error = noise / len(near) ** 0.5
        assert float(again.background_std[i]) == pytest.approx(error, rel=1e-3)
    for name in ("counts", "valid", "saturated", "neighbours", "origin", "pedestal"):
        np.testing.assert_array_equal(getattr(again, name), getattr(seen, name))


def test_the_second_measurement_is_the_better_one(frames: np.ndarray, source: np.ndarray) -> None:
    """Of the true sources, which no fit has bent: the scatter of a mean of all pixels."""
    seen = jit_observe(frames)
    again = jit_remeasured(seen, source, np.zeros(FRAMES, np.float32))
    for name, truth, scatter in (("level", LEVEL, NOISE / 11), ("noise", NOISE, NOISE / 242**0.5)):
        before, after = (np.asarray(getattr(o, name), float) - truth for o in (seen, again))
        assert abs(after.mean()) < 4 * scatter / FRAMES**0.5 + 2e-3 * NOISE  # the clipping's bias
        assert 0.9 * scatter < after.std() < 1.1 * scatter
        assert after.std() < 0.9 * before.std()
    pull = (np.asarray(again.level) - LEVEL) / np.asarray(again.background_std)
    assert 0.63 < np.mean(np.abs(pull) < 1) < 0.73


def test_what_is_told_is_not_measured_once_more(frames: np.ndarray, source: np.ndarray) -> None:
    few, sources, none = frames[:FEW], source[:FEW], np.zeros(FEW, np.float32)
    plain = jit_remeasured(jit_observe(few), sources, none)
    told = jit_remeasured(
        jit_observe(few, Sensor(pedestal=7.0, background=LEVEL - 7)), sources, none
    )
    np.testing.assert_array_equal(told.background, np.full(FEW, LEVEL - 7))
    np.testing.assert_array_equal(told.background_std, none)
    np.testing.assert_allclose(told.noise, plain.noise, rtol=1e-6)
    # Of a level that is estimated the pedestal is no part.
    offset = jit_remeasured(jit_observe(few, Sensor(pedestal=12.0)), sources, none)
    np.testing.assert_array_equal(offset.pedestal, np.full(FEW, 12.0))
    np.testing.assert_allclose(offset.background, plain.background - 12, rtol=1e-5)
    np.testing.assert_allclose(offset.noise, plain.noise, rtol=1e-6)
    np.testing.assert_allclose(offset.background_std, plain.background_std, rtol=1e-6)


def test_shot_noise_of_sky_and_targets_is_not_read_noise() -> None:
    gain, photons, pedestal, noise = 4.0, 40.0, 20.0, 5.0
    # An even brightness of all pixels, in the place of targets that cover the frame.
    light = np.full((FRAMES, 11, 11), 60.0, np.float32)
    frames = sky(FRAMES, gain, photons + 60.0, pedestal, noise)
    none = np.zeros(FRAMES, np.float32)
    seen = jit_observe(frames, Sensor(gain=gain, pedestal=pedestal))
    own = jit_remeasured(seen, light, none, gain)
    variance = np.asarray(own.noise, float) ** 2
    assert abs(variance.mean() - noise**2) < 4 * variance.std() / FRAMES**0.5 + 0.02 * noise**2
    off = np.asarray(own.background, float) - photons
    assert abs(off.mean()) < 4 * off.std() / FRAMES**0.5
    # Neighbours are light as the window's own targets are.
    both = jit_remeasured(seen.replace(neighbours=light / 4), light * 0.75, none, gain)
    np.testing.assert_allclose(both.noise, own.noise, rtol=1e-3)
    np.testing.assert_allclose(both.background, own.background, rtol=1e-5)
    # Nor is the misfit of targets, which grows with their light.
    off_by = 0.1 * 60 * np.random.default_rng(1).normal(size=frames.shape).astype("f")
    own = jit_remeasured(seen.replace(counts=seen.counts + off_by), light, none, gain, 0.1)
    variance = np.asarray(own.noise, float) ** 2
    assert abs(variance.mean() - noise**2) < 4 * variance.std() / FRAMES**0.5 + 0.02 * noise**2
    # Without a gain all of it is read noise.
    plain = np.asarray(jit_remeasured(seen, light, none).noise, float) ** 2
    assert abs(plain.mean() - noise**2 - (photons + 60) / gain) < 4 * plain.std() / FRAMES**0.5 + 1


def test_the_second_measurement_is_bounded_by_the_first(digital: np.ndarray) -> None:
    """A fit that leaves nothing does not make the noise vanish, nor that of rounding."""
    few = digital[:FEW].astype(np.float32)
    whole = jit_remeasured(jit_observe(few), few, np.zeros(FEW, np.float32))
    assert (np.asarray(whole.noise) >= np.float32(ROUNDING)).all()
    few = few + np.random.default_rng(0).normal(0, 1, few.shape).astype("f")
    seen = jit_observe(few)
    again = jit_remeasured(seen, few, np.full(FEW, 50, np.float32))
    np.testing.assert_allclose(again.noise, 0.5 * seen.noise, rtol=1e-6)
    assert_finite(again)


def test_pixels_that_tell_nothing_are_not_measured(frames: np.ndarray, source: np.ndarray) -> None:
    """Invalid and saturated ones; and no frame depends on the others."""
    few, none = frames[:FEW].copy(), np.zeros(FEW, np.float32)
    seen = jit_observe(few)
    base = jit_remeasured(seen, source[:FEW], none)
    out = np.zeros(few.shape, bool)
    out[3, 2, 3:6] = True
    broken = [
        seen.replace(valid=~out, counts=np.where(out, np.float32(1e9), few)),
        seen.replace(saturated=out, counts=np.where(out, np.float32(1e9), few)),
    ]
    others = np.arange(FEW) != 3
    found = [jit_remeasured(o, source[:FEW], none) for o in broken]
    for again in found:
        assert_finite(again)
        for name in ("noise", "background", "background_std"):
            a, b = (np.asarray(getattr(o, name)) for o in (again, base))
            np.testing.assert_array_equal(a[others], b[others])
            np.testing.assert_array_equal(a, np.asarray(getattr(found[0], name)))
        assert abs(float(again.background[3] - base.background[3])) < 0.2 * NOISE


# --- what is known -----------------------------------------------------------------


def test_known_values_pass_through(frames: np.ndarray) -> None:
    seen = jit_observe(frames[:FEW], Sensor(**KNOWN))
    np.testing.assert_array_equal(seen.noise, np.full(FEW, NOISE))
    np.testing.assert_array_equal(seen.background, np.full(FEW, LEVEL))
    np.testing.assert_array_equal(seen.background_std, np.zeros(FEW))
    np.testing.assert_array_equal(seen.counts, frames[:FEW])
    np.testing.assert_array_equal(seen.neighbours, np.zeros_like(frames[:FEW]))
    np.testing.assert_array_equal(seen.origin, np.zeros((FEW, 2)))
    assert np.asarray(seen.valid).all()
    assert not np.asarray(seen.saturated).any()


def test_known_values_may_differ_from_frame_to_frame(frames: np.ndarray) -> None:
    few = frames[:FEW]
    noise, pedestal, level, gain = np.float32(np.arange(1, 4 * FEW + 1).reshape(4, FEW))
    seen = jit_observe(
        few, Sensor(read_noise=noise, pedestal=pedestal, background=level, gain=gain)
    )
    for got, given in ((seen.noise, noise), (seen.pedestal, pedestal), (seen.background, level)):
        np.testing.assert_array_equal(got, given)
    np.testing.assert_array_equal(seen.level, pedestal + level)
    well = np.linspace(100, 200, FEW, dtype="f4")
    saturated = jit_observe(few, Sensor(saturation=well)).saturated
    np.testing.assert_array_equal(saturated, few >= well[:, None, None])
    assert np.asarray(saturated).any()


def test_a_known_background_leaves_the_noise_to_be_estimated(frames: np.ndarray) -> None:
    few = frames[:FEW]
    both, level, noise = (
        jit_observe(few, Sensor(**given))
        for given in ({}, {"background": LEVEL}, {"read_noise": NOISE})
    )
    np.testing.assert_allclose(level.noise, both.noise, rtol=1e-6)
    np.testing.assert_allclose(noise.level, both.level, rtol=1e-6)
    np.testing.assert_allclose(noise.background_std, 2 * 1.2533 * NOISE / 11, rtol=1e-6)


# --- rounding, full well, invalid pixels -------------------------------------------


def test_whole_counts_have_at_least_the_noise_of_rounding(digital: np.ndarray) -> None:
    estimated = jit_observe(digital)
    # Most pixels are 0: without the floor the estimate would be no noise at all.
    assert np.mean(digital == 0) > 0.5
    assert np.all(np.asarray(estimated.noise) >= np.float32(ROUNDING))
    told = jit_observe(digital, Sensor(read_noise=0.0))
    np.testing.assert_allclose(told.noise, ROUNDING, rtol=1e-6)
    told = jit_observe(digital, Sensor(read_noise=2.0))
    np.testing.assert_allclose(told.noise, np.sqrt(4 + 1 / 12), rtol=1e-6)
    # Shot noise explains no rounding.
    told = jit_observe(digital + 100, Sensor(gain=0.01))
    np.testing.assert_allclose(told.noise, ROUNDING, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_row7_whole_dtypes_equal_the_same_counts_as_floats(
    digital: np.ndarray, dtype: type
) -> None:
    as_float, as_whole = (jit_observe(digital.astype(t)) for t in (np.float32, dtype))
    for a, b in zip(jax.tree.leaves(as_float), jax.tree.leaves(as_whole), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_row4_saturated_whole_counts_began_half_a_count_lower(digital: np.ndarray) -> None:
    frames = np.minimum(digital, 254)
    frames[:, 1, 5:7] = 255
    frames[1, 0, 0] += 0.25
    seen = jit_observe(frames, Sensor(saturation=np.full(FEW, 255.0, np.float32)))
    flags = frames == 255
    assert flags.sum() == 2 * FEW
    np.testing.assert_array_equal(seen.saturated, flags)
    expected = np.where(flags, 254.5, frames)
    # The second frame is not rounded: its well is where it says.
    expected[1] = frames[1]
    np.testing.assert_array_equal(seen.counts, expected)


@pytest.mark.parametrize("level", [0.0, 40.0, 40.5, 1e-6, 1e6])
def test_rows2_and_3_constant_frames_are_finite(level: float) -> None:
    frames = np.full((FEW, 11, 11), level, np.float32)
    for given in ({}, {"read_noise": 0.0}, {"background": 0.0}):
        assert_finite(jit_observe(frames, Sensor(**given)))
    np.testing.assert_array_equal(jit_observe(frames).level, frames[:, 0, 0])


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
    for name in (*ESTIMATED, "valid"):
        np.testing.assert_allclose(getattr(masked, name), getattr(seen, name), rtol=1e-6)
    # Medians of the 118 pixels left.
    near = np.abs(np.asarray(seen.level) - np.asarray(jit_observe(frames[:FEW]).level))
    assert near.max() < NOISE * 0.1


def test_row1_a_frame_without_any_valid_pixel_is_finite() -> None:
    seen = jit_observe(np.full((FEW, 11, 11), np.nan, np.float32))
    assert_finite(seen)
    assert not np.asarray(seen.valid).any()


@pytest.mark.parametrize("x64", [False, True])
def test_no_value_or_derivative_passes_through_nan(frames: np.ndarray, x64: bool) -> None:
    """Of usual, rounded, constant and saturated frames, in both precisions."""
    few = np.stack([frames[0], np.round(frames[1]), np.full((11, 11), 7.5), np.zeros((11, 11))])
    told = {"gain": 2.0, "saturation": 99.0, **({"read_noise": 0.0} if x64 else {})}

    def total(y: jax.Array) -> tuple[jax.Array, Observation]:
        seen = observe(y, Sensor(**told))
        return seen.noise.sum() + seen.level.sum() + seen.background_std.sum(), seen

    with jax.enable_x64(x64), jax.debug_nans(True):
        y = jnp.asarray(few, float)
        assert y.dtype == (np.float64 if x64 else np.float32)
        slope, seen = quick_jit(jax.grad(total, has_aux=True))(y)
        assert np.isfinite(slope).all()
        assert (np.abs(slope[:2]).max((1, 2)) > 0).all()
        for leaf in jax.tree.leaves(seen):
            assert leaf.dtype in (bool, y.dtype)
            assert np.isfinite(leaf).all()
        assert (np.asarray(pixel_std(seen, told["gain"])) > 0).all()


# --- maps --------------------------------------------------------------------------


jit_whole = quick_jit(observe)


def test_maps_of_one_number_are_that_number(frames: np.ndarray) -> None:
    few = frames[:FEW]
    numbers_told = Sensor(read_noise=NOISE, pedestal=7.0, background=LEVEL - 7, gain=2.0)
    maps = Sensor(
        read_noise=np.full((11, 11), NOISE, "f4"),
        pedestal=np.full((FEW, 11, 11), 7, "f4"),
        background=np.full((11, 11), LEVEL - 7, "f4"),
        gain=2.0,
    )
    one, other = jit_whole(few, numbers_told), jit_whole(few, maps)
    for name in PER_PIXEL:
        assert getattr(other, name).shape == few.shape
        np.testing.assert_array_equal(
            np.broadcast_to(getattr(one, name), few.shape), getattr(other, name)
        )
    for name in ("counts", "valid", "saturated", "background_std"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_the_level_is_found_above_a_pedestal_that_is_a_map(frames: np.ndarray) -> None:
    """A slope told as the pedestal is as if it were not there."""
    slope = np.add.outer(np.linspace(-40, 40, 11), np.linspace(0, 90, 11)).astype("f4")
    plain, sloped = jit_observe(frames), jit_whole(frames + slope, Sensor(pedestal=slope))
    np.testing.assert_allclose(sloped.background[:, 0, 0], plain.background, atol=2e-4)
    np.testing.assert_allclose(sloped.noise[:, 0, 0], plain.noise, rtol=1e-3)
    np.testing.assert_allclose(sloped.background_std, plain.background_std, rtol=1e-3)
    source = np.zeros_like(frames)
    none = np.zeros(FRAMES, np.float32)
    again = quick_jit(remeasured)(sloped, source, none)
    expected = jit_remeasured(plain, source, none)
    np.testing.assert_allclose(again.background[:, 0, 0], expected.background, atol=1e-3)
    np.testing.assert_allclose(again.noise[:, 0, 0], expected.noise, rtol=1e-3)


def test_noise_is_estimated_beneath_the_shot_noise_of_a_map() -> None:
    rng = np.random.default_rng(5)
    light = np.linspace(5, 60, 121).reshape(11, 11)
    frames = np.float32(rng.poisson(light, (FRAMES, 11, 11)) + rng.normal(0, 6, (FRAMES, 11, 11)))
    sensor = Sensor(background=np.float32(light), gain=1.0)
    seen = jit_whole(frames, sensor)
    again = quick_jit(remeasured)(seen, np.zeros_like(frames), np.zeros(FRAMES, np.float32), 1.0)
    variance = np.asarray(again.noise, float)[:, 0, 0] ** 2
    assert abs(variance.mean() - 36) < 4 * variance.std() / FRAMES**0.5 + 0.02 * 36
    np.testing.assert_array_equal(again.background[0], np.float32(light))
    assert not np.asarray(again.background_std).any()


def test_bad_pixels_and_those_without_an_error_are_left_out(frames: np.ndarray) -> None:
    few = frames[:FEW].copy()
    bad = np.zeros((11, 11), bool)
    bad[3, 4] = True
    plane = np.full(few.shape, NOISE, "f4")
    plane[2, 0, 0], plane[5, 1, 1] = np.nan, np.inf
    few[:, 3, 4] = np.nan
    seen = jit_whole(few, Sensor(read_noise=plane, background=LEVEL, bad_pixels=bad))
    expected = np.broadcast_to(~bad, few.shape).copy()
    expected[2, 0, 0] = expected[5, 1, 1] = False
    np.testing.assert_array_equal(seen.valid, expected)
    assert np.isfinite(seen.noise).all()
    assert (np.asarray(seen.noise) > 0).all()


def test_the_excess_noise_is_more_shot_noise(frames: np.ndarray) -> None:
    few = frames[:FEW]
    one, other = (
        jit_observe(few, Sensor(gain=gain, excess_noise=factor))
        for gain, factor in ((10.0, 1.0), (20.0, 2.0))
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("quantised", [False, True])
def test_what_is_told_of_rounding_is_believed(digital: np.ndarray, quantised: bool) -> None:
    seen = jit_observe(digital, Sensor(read_noise=2.0, quantised=quantised))
    np.testing.assert_allclose(seen.noise, np.sqrt(4 + quantised / 12), rtol=1e-6)
