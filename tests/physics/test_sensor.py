"""Sensor: what is recorded, in which order, and the moments of its noise."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.physics import sensor as sensors
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.preset import digital
from dscsnet_jax.physics.sensor import (
    Sensor,
    checked,
    expose,
    is_saturated,
    variance,
)
from dscsnet_jax.physics.targets import from_lists

KEY = jax.random.key(7)
SAMPLES = 400_000
# Tolerances are this many standard errors of the sampled moment: with a fixed key the
# tests are deterministic, and a wrong formula is off by far more.
DEVIATIONS = 4.0
jit_expose = jax.jit(expose)


def assert_moments(y: jax.Array, mean: float, var: float, fourth: float | None = None) -> None:
    """Sample mean and variance agree within `DEVIATIONS` standard errors.

    `fourth` is the fourth central moment; default that of a Gaussian, 3 var^2.
    """
    sample = np.asarray(y, float).ravel()
    fourth = 3 * var**2 if fourth is None else fourth
    assert abs(sample.mean() - mean) < DEVIATIONS * np.sqrt(var / sample.size)
    assert abs(sample.var() - var) < DEVIATIONS * np.sqrt((fourth - var**2) / sample.size)


def test_a_bare_sensor_changes_nothing() -> None:
    expected = jax.random.uniform(KEY, (5, 5)) * 1e4
    np.testing.assert_array_equal(expose(Sensor(), KEY, expected), expected)


def test_order_offset_then_noise_then_rounding_then_full_well() -> None:
    expected = jnp.array([0.3, 10.2, 10.3, 200.0, 254.4])
    sensor = digital(8, pedestal=0.25)
    # 10.2 + 0.25 rounds to 10 and 10.3 + 0.25 to 11: the offset comes before rounding.
    np.testing.assert_array_equal(expose(sensor, KEY, expected), [1, 10, 11, 200, 255])
    noisy = expose(digital(8, pedestal=100.0, read_noise=3.0), KEY, jnp.full((SAMPLES,), 50.4))
    whole = np.asarray(noisy)
    np.testing.assert_array_equal(whole, np.round(whole))
    same = expose(Sensor(pedestal=100.0, read_noise=3.0), KEY, jnp.full((SAMPLES,), 50.4))
    np.testing.assert_array_equal(whole, np.round(np.asarray(same)))


def test_noise_comes_before_the_full_well() -> None:
    y = expose(digital(8, read_noise=5.0), KEY, jnp.full((SAMPLES,), 255.0))
    assert float(y.max()) == 255.0
    # Half of the noise falls below the well; 4 standard errors of a coin's mean.
    share = float((y < 254.5).mean())
    below = 0.5 * math.erfc(0.5 / 5.0 / math.sqrt(2))
    assert abs(share - below) < DEVIATIONS * 0.5 / np.sqrt(SAMPLES)


def test_rounding_is_half_to_even_and_clips_below_only_when_quantised() -> None:
    expected = jnp.array([-3.0, 0.5, 1.5, 2.5])
    np.testing.assert_array_equal(expose(digital(8), KEY, expected), [0, 0, 2, 2])
    np.testing.assert_array_equal(expose(Sensor(), KEY, expected), expected)


def test_read_noise_moments() -> None:
    y = expose(Sensor(pedestal=10.0, read_noise=5.0), KEY, jnp.full((SAMPLES,), 7.0))
    assert_moments(y, 17.0, 25.0)


@pytest.mark.parametrize("gain", [0.5, 4.0])
def test_shot_noise_moments(gain: float) -> None:
    level = 20.0
    y = expose(Sensor(gain=gain), KEY, jnp.full((SAMPLES,), level))
    electrons = level * gain
    assert_moments(y, level, level / gain, (electrons + 3 * electrons**2) / gain**4)
    np.testing.assert_array_equal(np.asarray(y) * gain, np.round(np.asarray(y) * gain))


def test_the_offset_carries_no_shot_noise() -> None:
    y = expose(Sensor(gain=1.0, pedestal=1000.0), KEY, jnp.zeros((SAMPLES,)))
    np.testing.assert_array_equal(y, 1000.0)


@pytest.mark.parametrize(
    "sensor",
    [
        Sensor(read_noise=2.0),
        Sensor(gain=2.0),
        Sensor(gain=2.0, read_noise=3.0, pedestal=5.0),
        digital(16, read_noise=2.0),
        digital(16, gain=0.7, read_noise=1.0),
        Sensor(read_noise=2.0, misfit=0.1),
        digital(16, gain=4.0, read_noise=1.0, misfit=0.1),
    ],
)
def test_variance_formula_against_monte_carlo(sensor: Sensor) -> None:
    for level in (3.0, 90.0):
        # Levels spread over one count, so that rounding errors are uniform.
        spread = jnp.linspace(-0.5, 0.5, SAMPLES, endpoint=False)
        base = 20.0 if sensor.quantised else 0.0
        expected = level + base + spread
        error = expose(sensor, KEY, expected) - expected
        mean_variance = float(variance(sensor, expected).mean())
        electrons = 0.0 if sensor.gain is None else float(sensor.gain)
        # Fourth moment of Poisson + Gaussian: 3 var^2 + mu / gain^3.
        skew = 0.0 if electrons == 0 else (level + base) / electrons**3
        assert_moments(
            error, float(sensor.pedestal or 0), mean_variance, 3 * mean_variance**2 + skew
        )


def test_variance_adds_its_parts() -> None:
    sensor = digital(8, gain=4.0, read_noise=3.0, pedestal=50.0)
    got = variance(sensor, jnp.array([0.0, 8.0]))
    np.testing.assert_allclose(got, [9 + 1 / 12, 11 + 1 / 12], rtol=1e-6)
    np.testing.assert_array_equal(variance(Sensor(), jnp.ones((2, 3))), np.zeros((2, 3)))


def test_row4_saturated_core_is_found_at_the_full_well() -> None:
    expected = jnp.array([[10.0, 254.4, 254.6], [255.0, 400.0, 0.0]])
    flags = np.array([[False, False, True], [True, True, False]])
    sensor = digital(8)
    y = expose(sensor, KEY, expected)
    assert y.tolist() == [[10.0, 254.0, 255.0], [255.0, 255.0, 0.0]]
    np.testing.assert_array_equal(is_saturated(sensor, y), flags)
    well = Sensor(saturation=1000.5)
    deep = expose(well, KEY, jnp.array([1000.0, 1000.5, 1e6]))
    assert deep.tolist() == [1000.0, 1000.5, 1000.5]
    assert is_saturated(well, deep).tolist() == [False, True, True]
    assert not is_saturated(Sensor(), jnp.array([1e30])).any()


@pytest.mark.parametrize(("bits", "full"), [(1, 1), (8, 255), (12, 4095), (16, 65535)])
def test_full_well_of_a_digital_sensor(bits: int, full: int) -> None:
    assert expose(digital(bits), KEY, jnp.array([1e9])).tolist() == [full]


@pytest.mark.parametrize("bits", [0, 33])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=r"bits must lie in 1\.\.32"):
        digital(bits)


SHOT_AND_READ = digital(12, gain=2.0, read_noise=3.0)


def test_row32_same_key_same_frame_bit_for_bit() -> None:
    expected = jnp.full((SAMPLES,), 30.0)
    first = expose(SHOT_AND_READ, KEY, expected)
    np.testing.assert_array_equal(first, expose(SHOT_AND_READ, KEY, expected))
    other = expose(SHOT_AND_READ, jax.random.key(8), expected)
    assert float((first != other).mean()) > 0.5


def test_shot_and_read_noise_are_independent() -> None:
    expected = jnp.full((SAMPLES,), 50.0)
    shot = np.asarray(expose(Sensor(gain=1.0), KEY, expected)) - 50
    read = np.asarray(expose(Sensor(read_noise=1.0), KEY, expected)) - 50
    assert abs(np.corrcoef(shot, read)[0, 1]) < DEVIATIONS / np.sqrt(SAMPLES)


def test_fields_may_be_traced() -> None:
    expected = jnp.full((1000,), 30.0)
    sensor = digital(12, read_noise=3.0, pedestal=2.5)
    np.testing.assert_array_equal(
        jax.jit(expose)(sensor, KEY, expected), expose(sensor, KEY, expected)
    )
    slope = jax.grad(lambda s: variance(Sensor(read_noise=s), expected).sum())(3.0)
    assert float(slope) == pytest.approx(1000 * 6.0)


def test_dark_pixels_of_a_rendered_frame_hold_no_negative_electrons() -> None:
    places = np.random.default_rng(0).uniform(0, 10, (4000, 2))
    truth = from_lists([[(*place, 240.0)] for place in places])
    expected = render(truth, frame_size=11, psf=0.5).ravel()[:SAMPLES]
    sensor = Sensor(gain=1.0)
    assert float(expose(sensor, KEY, expected).min()) == 0.0
    assert float(variance(sensor, expected).min()) >= 0.0


# --- the whole sensor ----------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0])
def test_multiplied_electrons_have_the_excess_noise(factor: float) -> None:
    """Mean `mu`, variance `F mu / gain`; no count without an electron."""
    gain, mu = 2.0, 20.0
    sensor = Sensor(gain=gain, excess_noise=factor)
    y = np.asarray(jit_expose(sensor, KEY, jnp.full((SAMPLES,), mu)), float)
    expected = float(variance(sensor, jnp.float32(mu)))
    assert expected == pytest.approx(factor * mu / gain)
    # A Poisson sum of gamma distributed electrons X has the fourth cumulant mu / gain^3 E[X^4].
    fourth = np.prod([1 + i * (factor - 1) for i in range(4)]) * mu / gain**3
    assert_moments(y - mu, 0.0, expected, 3 * expected**2 + fourth)
    faint = np.asarray(jit_expose(sensor, KEY, jnp.full((SAMPLES,), 0.05)))
    assert np.mean(faint == 0) == pytest.approx(np.exp(-0.05 * gain), abs=4 * SAMPLES**-0.5)
    assert (faint >= 0).all()


def test_background_is_light_and_a_pedestal_is_none() -> None:
    sensor = Sensor(gain=1.0, background=30.0, pedestal=100.0)
    y = np.asarray(jit_expose(sensor, KEY, jnp.full((SAMPLES,), 20.0)), float)
    assert_moments(y, 150.0, 50.0, 3 * 50.0**2 + 50)
    assert float(variance(sensor, jnp.float32(20))) == 50
    assert float(sensors.level(sensor, jnp.float32(0))) == 130


def test_fields_may_be_maps() -> None:
    noise = np.array([[0.0, 2.0], [4.0, 1.0]], np.float32)
    sensor = Sensor(read_noise=noise, pedestal=10 * noise, background=noise, gain=1.0)
    expected = jnp.full((SAMPLES // 4, 2, 2), 5.0)
    y = np.asarray(jit_expose(sensor, KEY, expected), float)
    spread = np.asarray(variance(sensor, expected))[0]
    np.testing.assert_allclose(spread, noise**2 + noise + 5)
    error = 4 * np.sqrt(spread / len(y))
    assert (np.abs(y.mean(0) - 5 - 11 * noise) < error).all()
    np.testing.assert_allclose(y.var(0), spread, rtol=0.1)


def test_numbers_of_each_frame_are_those_of_the_frames() -> None:
    noise = np.array([1.0, 2.0, 3.0], np.float32)
    spread = variance(Sensor(read_noise=noise), jnp.zeros((3, 3, 3)))
    np.testing.assert_array_equal(spread[:, 0, 0], noise**2)
    np.testing.assert_array_equal(spread[:, 2, 1], noise**2)


def test_nothing_known_is_nothing_done() -> None:
    expected = jnp.linspace(0, 1e6, 7)
    np.testing.assert_array_equal(expose(Sensor(), KEY, expected), expected)
    assert not np.asarray(is_saturated(Sensor(), expected)).any()
    np.testing.assert_array_equal(variance(Sensor(), expected), np.zeros(7))


SHAPE = (4, 9, 11)


@pytest.mark.parametrize("shape", [(), (4,), (9, 11), SHAPE])
def test_row21_maps_of_the_frames_are_right(shape: tuple[int, ...]) -> None:
    value = np.ones(shape)
    sensor = Sensor(read_noise=value, pedestal=-value, background=value)
    assert checked(sensor, SHAPE) is sensor
    assert checked(sensor) is sensor
    if len(shape) > 1:  # pixels of an error plane may tell nothing
        value[..., 0, 0] = np.nan
        value[..., 0, 1] = np.inf
        checked(Sensor(read_noise=value), SHAPE)


@pytest.mark.parametrize("name", ["read_noise", "pedestal", "background", "bad_pixels"])
@pytest.mark.parametrize("shape", [(11, 9), (9,), (3, 9, 11), (1, 4, 9, 11)])
def test_row21_maps_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    value = np.ones(shape, bool if name == "bad_pixels" else float)
    with pytest.raises(ValueError, match=name) as caught:
        checked(Sensor(**{name: value}), SHAPE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"read_noise": np.full((9, 11), -1.0)},
        {"pedestal": np.full((9, 11), np.nan)},
        {"background": np.full((9, 11), np.inf)},
        {"read_noise": np.array([1.0, np.nan, 1.0, 1.0])},
        {"read_noise": "2"},
        {"gain": np.ones(4)},
        {"gain": np.inf},
        {"excess_noise": 0.99},
        {"saturation": np.nan},
        {"quantised": 1},
        {"bad_pixels": np.zeros((9, 11))},
    ],
)
def test_row21_what_no_sensor_has_is_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        checked(Sensor(**wrong), SHAPE)
