"""Objective: residuals against plain formulas, their Jacobian against autodiff in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.estimation.objective import (
    SOFTNESS,
    Residuals,
    nearest_square,
    pack,
    residuals,
    unpack,
)
from dscsnet_jax.estimation.observe import Observation
from dscsnet_jax.estimation.prior import ScenePrior, preset_prior
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.scene import frame_keys, get_preset, simulate
from dscsnet_jax.physics.targets import Targets

SHAPE, SIGMA = (9, 10), (0.5, 0.6)
PIXELS = SHAPE[0] * SHAPE[1]
WELL = 120.0
# A close pair, a third far from both, a padded slot.
TABLE = np.array([[4.2, 4.1, 230.0], [4.45, 4.3, 160.0], [6.1, 5.7, 200.0], [0.0, 0.0, 0.0]])
MASK = np.array([True, True, True, False])

PRIORS = {
    "none": ScenePrior(),
    "intensity": ScenePrior(intensity=(100.0, 180.0)),
    "separation": ScenePrior(separation=0.5),
    "extent": ScenePrior(separation=0.5, extent=1.2),
    "corner": ScenePrior(intensity=(100.0, 180.0), separation=0.5, extent=1.2, corner=-0.4),
}

jit_residuals = jax.jit(residuals)
jit_autodiff = jax.jit(
    lambda theta, *rest: jax.jacfwd(lambda theta: residuals(theta, *rest).value)(theta)
)


def targets(table: np.ndarray = TABLE, mask: np.ndarray = MASK) -> Targets:
    return Targets(jnp.asarray(table[:, :2]), jnp.asarray(table[:, 2]), jnp.asarray(mask))


def expected_frame(table: np.ndarray = TABLE) -> np.ndarray:
    return np.asarray(render(targets(table), frame_size=SHAPE, sigma=jnp.array(SIGMA)))


def observation(gain: float = np.inf) -> Observation:
    """A frame not far from `TABLE`, on a level known to 1.5 counts, with censored pixels.

    One saturated pixel expects less than the well at `TABLE`, the others more.
    """
    rng = np.random.default_rng(0)
    truth = TABLE + np.array([0.05, -0.04, 5.0]) * MASK[:, None]
    counts = np.array(expected_frame(truth) + 5 + 2 * rng.normal(size=SHAPE))
    saturated = counts >= WELL
    saturated[1, 1] = True
    valid = np.ones(SHAPE, bool)
    valid[7, 2] = valid[4, 5] = False
    return Observation(
        counts=jnp.asarray(np.where(saturated, WELL, counts)),
        valid=jnp.asarray(valid),
        saturated=jnp.asarray(saturated),
        noise=jnp.asarray(2.0),
        background=jnp.asarray(4.0),
        background_std=jnp.asarray(1.5),
        gain=jnp.asarray(gain),
        sigma=jnp.array(SIGMA),
    )


def theta_at(t: float = 0.3) -> jax.Array:
    return pack(targets(), jnp.asarray(t))


# --- parameters --------------------------------------------------------------------


def test_parameters_are_row_col_intensity_of_each_target_then_background(x64: None) -> None:
    theta = theta_at(0.3)
    np.testing.assert_array_equal(theta, [*TABLE.ravel(), 0.3])
    back = unpack(theta, jnp.asarray(MASK))
    np.testing.assert_array_equal(back.position, TABLE[:, :2])
    np.testing.assert_array_equal(back.intensity, TABLE[:, 2])
    np.testing.assert_array_equal(back.mask, MASK)


def test_padded_slots_unpack_to_zeros_whatever_they_hold() -> None:
    back = unpack(jnp.arange(1.0, 15.0).reshape(2, 7), jnp.array([[True, False], [False, True]]))
    np.testing.assert_array_equal(back.position, [[[1, 2], [0, 0]], [[0, 0], [11, 12]]])
    np.testing.assert_array_equal(back.intensity, [[3, 0], [0, 13]])


# --- pixels ------------------------------------------------------------------------


def test_row4_saturated_pixels_tell_only_what_is_missing(x64: None) -> None:
    seen = observation()
    saturated = np.asarray(seen.saturated)
    got = jit_residuals(theta_at(), jnp.asarray(MASK), seen, ScenePrior())
    value = np.asarray(got.value[:PIXELS]).reshape(SHAPE)
    slope = np.asarray(got.jacobian[:PIXELS]).reshape(*SHAPE, -1)
    over = saturated & (expected_frame() + 4.45 > WELL)
    assert over.any(), "a saturated pixel must expect more than the well"
    assert not value[over].any()
    assert not slope[over].any()
    # Nothing is expected at the first pixel: the whole well is missing there.
    assert value[1, 1] == pytest.approx((WELL - 4.45) / 2.0)
    assert slope[1, 1, -1] == pytest.approx(-1.5 / 2.0)


def test_row1_invalid_pixels_tell_nothing(x64: None) -> None:
    seen = observation()
    theta, mask = theta_at(), jnp.asarray(MASK)
    base = jit_residuals(theta, mask, seen, ScenePrior())
    wild = seen.replace(counts=jnp.where(seen.valid, seen.counts, 1e9))
    for a, b in zip(base, jit_residuals(theta, mask, wild, ScenePrior()), strict=True):
        np.testing.assert_array_equal(a, b)
    invalid = ~np.asarray(seen.valid).ravel()
    assert invalid.sum() == 2
    assert not np.asarray(base.value[:PIXELS])[invalid].any()
    assert not np.asarray(base.jacobian[:PIXELS])[invalid].any()


# --- Jacobian ----------------------------------------------------------------------


def generic_points() -> list[np.ndarray]:
    """`TABLE` and points around it: overlapping, wide apart, partly out of the frame."""
    rng = np.random.default_rng(3)
    close = [TABLE + MASK[:, None] * rng.normal(size=(4, 3)) * [0.1, 0.1, 20] for _ in range(4)]
    wide = TABLE + MASK[:, None] * np.array([[-4.3, 0.2, 9], [0.1, 5.9, 9], [2.2, 0.3, 9], [0] * 3])
    return [TABLE, wide, *close]


@pytest.mark.parametrize("name", PRIORS)
def test_jacobian_equals_autodiff(x64: None, name: str) -> None:
    seen, mask, prior = observation(), jnp.asarray(MASK), PRIORS[name]
    for table in generic_points():
        theta = pack(targets(table), jnp.asarray(-0.7))
        got = jit_residuals(theta, mask, seen, prior)
        expected = jit_autodiff(theta, mask, seen, prior)
        np.testing.assert_allclose(got.jacobian, expected, rtol=0, atol=1e-10)
        assert not np.asarray(got.jacobian)[:, 9:12].any(), "the padded slot tells nothing"
        # No row that has a value lacks a slope.
        values = np.abs(np.asarray(got.value)) > 0
        values[PIXELS] = True
        assert np.all(np.abs(np.asarray(got.jacobian)).sum(1)[values] > 0)


def test_jacobian_holds_the_weights_of_shot_noise(x64: None) -> None:
    """Derivative of `(y - mu(theta)) / std` with `std` that of the point, not following it."""
    seen, mask = observation(gain=2.0), jnp.asarray(MASK)
    theta = theta_at()
    std = np.sqrt(4.0 + expected_frame() / 2.0)

    def held(theta: jax.Array) -> jax.Array:
        source = render(unpack(theta, mask), frame_size=SHAPE, sigma=seen.sigma)
        residual = (seen.counts - source - 4.0 - 1.5 * theta[-1]) / std
        residual = jnp.where(seen.saturated, jnp.maximum(residual, 0), residual)
        return jnp.where(seen.valid, residual, 0).reshape(-1)

    got = jit_residuals(theta, mask, seen, ScenePrior())
    np.testing.assert_allclose(got.jacobian[:PIXELS], jax.jacfwd(held)(theta), rtol=0, atol=1e-10)


# --- prior -------------------------------------------------------------------------


def prior_rows(name: str) -> Residuals:
    """Residuals behind those of the pixels and the background."""
    seen = observation()
    got = jit_residuals(theta_at(), jnp.asarray(MASK), seen, PRIORS[name])
    return Residuals(got.value[PIXELS + 1 :], got.jacobian[PIXELS + 1 :])


def test_intensity_counts_in_standard_deviations_of_its_range(x64: None) -> None:
    std = 80 / 12**0.5
    got = np.asarray(prior_rows("intensity").value)
    np.testing.assert_allclose(got[:4], [90 / std, 20 / std, 60 / std, 0], rtol=1e-12)
    assert not got[4:].any()


def test_pairs_below_the_separation_are_pushed_apart(x64: None) -> None:
    got = prior_rows("separation")
    distance = np.hypot(0.25, 0.2)
    # Pairs in order 01 02 03 12 13 23: only the first is close.
    np.testing.assert_allclose(got.value, [(0.5 - distance) / SOFTNESS, 0, 0, 0, 0, 0], rtol=1e-12)
    slope = np.asarray(got.jacobian[0]) * SOFTNESS
    along = np.array([0.25, 0.2]) / distance
    np.testing.assert_allclose(slope, [*along, 0, *-along, 0, *np.zeros(7)], atol=1e-12)


def test_pairs_wider_than_the_extent_are_pulled_together(x64: None) -> None:
    got = np.asarray(prior_rows("extent").value) * SOFTNESS
    np.testing.assert_allclose(got[6:12], [0, 0.7, 0, 0.45, 0, 0], atol=1e-12)  # rows
    np.testing.assert_allclose(got[12:], [0, 0.4, 0, 0.2, 0, 0], atol=1e-12)  # cols


def test_targets_outside_the_nearest_square_are_pulled_in(x64: None) -> None:
    """Rows 4.2 .. 6.1: of the squares from n - 0.4 to n + 0.8 that at 4.6 lies nearest."""
    got = np.asarray(prior_rows("corner").value)[4 + 6 :] * SOFTNESS
    np.testing.assert_allclose(got[:4], [0.4, 0.15, 0.3, 0], atol=1e-12)
    # Cols 4.1 .. 5.7: the square begins at 4.6.
    np.testing.assert_allclose(got[4:], [0.5, 0.3, 0, 0], atol=1e-12)


def test_nearest_square_holds_the_targets_that_one_square_can_hold() -> None:
    prior = ScenePrior(extent=1.0, corner=-0.4)
    rng = np.random.default_rng(0)
    first = rng.integers(-3, 9, 500)
    place = first - 0.4 + rng.uniform(0, 1, (4, 500))
    place[:2] = first - 0.4 + np.array([[0.02], [0.98]])
    mask = np.broadcast_to([[True], [True], [True], [False]], place.shape)
    got = nearest_square(jnp.asarray(place), jnp.asarray(mask), prior)
    np.testing.assert_allclose(got, first - 0.4, atol=1e-5)
    nobody = nearest_square(jnp.asarray(place), jnp.zeros(place.shape, bool), prior)
    assert np.isfinite(nobody).all()


def test_the_truth_of_a_preset_meets_no_resistance() -> None:
    """Separation and square of the prior cost simulated scenes nothing."""
    preset = get_preset("csist")
    prior = preset_prior(preset)
    scene = jax.jit(partial(simulate, preset))(frame_keys(0, "val", np.arange(200)))
    frame = observation().replace(counts=jnp.zeros((11, 11)), sigma=jnp.array([0.5, 0.5]))
    frame = frame.replace(valid=jnp.zeros((11, 11), bool), saturated=jnp.zeros((11, 11), bool))

    def rows(truth: Targets) -> jax.Array:
        theta = pack(truth, jnp.zeros(()))
        return residuals(theta, truth.mask, frame, prior).value[121 + 1 + 5 :]

    value = np.asarray(jax.jit(jax.vmap(rows))(scene.targets))
    assert value.shape == (200, 10 + 5 + 5)
    assert np.abs(value).max() * SOFTNESS < 1e-5


@pytest.mark.parametrize("name", ["separation", "extent", "corner"])
def test_row13_coincident_targets_have_no_nan(x64: None, name: str) -> None:
    table = TABLE.copy()
    table[1, :2] = table[0, :2]
    theta = pack(targets(table), jnp.zeros(()))
    got = jit_residuals(theta, jnp.asarray(MASK), observation(), PRIORS[name])
    assert np.isfinite(got.value).all()
    assert np.isfinite(got.jacobian).all()
    pairs = PIXELS + 1 + (4 if PRIORS[name].intensity is not None else 0)
    assert float(got.value[pairs]) == pytest.approx(0.5 / SOFTNESS)
    # Nor has anything that differentiates through them.
    slope = jit_autodiff(theta, jnp.asarray(MASK), observation(), PRIORS[name])
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("name", ["none", "corner"])
def test_one_slot_alone_works(x64: None, name: str) -> None:
    seen, mask = observation(), jnp.ones(1, bool)
    theta = pack(targets(TABLE[:1], MASK[:1]), jnp.asarray(0.3))
    got = jit_residuals(theta, mask, seen, PRIORS[name])
    expected = jit_autodiff(theta, mask, seen, PRIORS[name])
    np.testing.assert_allclose(got.jacobian, expected, rtol=0, atol=1e-10)
