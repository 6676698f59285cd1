"""Fit: exact recovery, honest error bars, faults, and implicit derivatives."""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import ArrayLike

from dscsnet_jax.inference.fit import Fit, fit
from dscsnet_jax.inference.intensity import LogNormal, Uniform
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.prior import ScenePrior, scene_prior
from dscsnet_jax.inference.scene_model import SceneModel, scene_model
from dscsnet_jax.physics.limits import render_jacobian
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.targets import Targets, from_lists

FRAMES = 400
OPTICS: dict[str, Any] = {"frame_size": 11, "psf": 0.5}
PLAIN = Known(psf=Gaussian(np.float32(0.5)))
MANY = Known(psf=Gaussian(np.float32(0.5)), sensor=Sensor(gain=np.float32(1e12)))
"""Of so many electrons that their noise is none."""

# Compiling is what takes time: few shapes, and no optimisation.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
jit_fit = quick_jit(fit, static_argnames="unroll")
jit_render = quick_jit(partial(render, **OPTICS))

# Alone, a pair, a close three, two far apart; all start a tenth of a pixel and 15 % off.
SCENES = [
    [(4.2, 5.1, 240.0)],
    [(4.6, 6.1, 240.0), (5.1, 6.3, 130.0)],
    [(5.0, 5.0, 230.0), (5.6, 5.1, 240.0), (5.1, 5.7, 250.0)],
    [(7.3, 2.2, 90.0), (2.1, 8.4, 300.0)],
]
TRUTH = from_lists(SCENES)


def seen_as(
    frames: ArrayLike,
    noise: float,
    *,
    level: ArrayLike = 10.0,
    level_std: float = 0.0,
    saturated: ArrayLike = False,
) -> Observation:
    """Frames whose level and noise are told, without the estimates of `observe`."""
    frames = np.asarray(frames, np.float32)
    valid, numbers = np.isfinite(frames), np.zeros(len(frames), np.float32)
    return Observation(
        counts=np.where(valid, frames, np.float32(0)),
        valid=valid,
        saturated=np.broadcast_to(saturated, frames.shape),
        neighbours=np.zeros_like(frames),
        origin=np.zeros((len(frames), 2), np.float32),
        noise=(numbers + np.float32(noise))[:, None, None],
        pedestal=numbers[:, None, None],
        background=(numbers + np.asarray(level, np.float32))[:, None, None],
        background_std=numbers + np.float32(level_std),
    )


def perturbed(truth: Targets = TRUTH, seed: int = 0) -> Targets:
    rng = np.random.default_rng(seed)
    shift = rng.uniform(-0.15, 0.15, truth.position.shape) * truth.mask[..., None]
    return Targets(truth.position + shift, truth.intensity * 0.85, truth.mask)


def single(targets: Targets) -> Targets:
    """In float32 in both modes: compiled functions meet one precision only."""
    position, intensity = (np.asarray(a, np.float32) for a in (targets.position, targets.intensity))
    return Targets(position, intensity, np.asarray(targets.mask))  # type: ignore[arg-type]


def recorded(noise: float, truth: Targets = TRUTH, level: float = 10.0) -> np.ndarray:
    mean = np.asarray(jit_render(single(truth)), np.float32)
    return mean + level + noise * np.random.default_rng(1).normal(size=mean.shape).astype("f4")


def assert_no_nan(answer: Fit) -> None:
    for value in (*jax.tree.leaves(answer), answer.std):
        assert not np.isnan(np.asarray(value)).any()


def assert_same(a: Fit, b: Fit, frames: ArrayLike) -> None:
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(one)[frames], np.asarray(other)[frames])


# --- recovery ----------------------------------------------------------------------


def test_noise_free_targets_are_recovered() -> None:
    seen = seen_as(recorded(0.0), 1.0)
    for seed in range(5):
        found = jit_fit(seen, single(perturbed(seed=seed)), PLAIN)
        assert np.asarray(found.converged).all()
        np.testing.assert_allclose(found.targets.position, TRUTH.position, atol=1e-3)
        np.testing.assert_allclose(found.targets.intensity, TRUTH.intensity, atol=0.1)
        np.testing.assert_allclose(found.chi_square, 0, atol=1e-3)


def test_an_unknown_level_is_fitted_too() -> None:
    seen = seen_as(recorded(0.0), 1.0, level_std=100.0)
    off = dataclasses.replace(seen, pedestal=seen.pedestal + 2)
    found = jit_fit(off, single(perturbed()), PLAIN)
    np.testing.assert_allclose(found.level, 10, atol=0.01)
    np.testing.assert_allclose(found.targets.position, TRUTH.position, atol=1e-3)


def test_counts_of_neighbours_are_not_the_window_s_own() -> None:
    others = recorded(0.0, from_lists([[(3.0, 4.0, 200.0)]] * 4, 3), level=0.0)
    seen = seen_as(recorded(0.0) + others, 1.0)
    found = jit_fit(dataclasses.replace(seen, neighbours=others), single(perturbed()), PLAIN)
    np.testing.assert_allclose(found.targets.position, TRUTH.position, atol=1e-3)
    np.testing.assert_allclose(found.chi_square, 0, atol=1e-3)


def test_padded_slots_stay_zero() -> None:
    found = jit_fit(seen_as(recorded(2.0), 2.0), single(perturbed()), PLAIN)
    padded = ~TRUTH.mask
    assert padded.sum() == 4
    np.testing.assert_array_equal(found.targets.mask, TRUTH.mask)
    assert not np.asarray(found.targets.position)[padded].any()
    assert not np.asarray(found.targets.intensity)[padded].any()
    assert not np.asarray(found.std)[padded].any()
    slots = np.repeat(padded, 3, axis=1)
    assert not np.asarray(found.covariance)[slots].any()


def test_goodness_is_that_of_the_fitted_frame() -> None:
    frames = recorded(2.0)
    frames[2, 0, :3] = np.nan
    found = jit_fit(seen_as(frames, 2.0), single(perturbed()), PLAIN)
    np.testing.assert_array_equal(found.num_pixels, [121, 121, 118, 121])
    left = (frames - np.asarray(jit_render(found.targets)) - 10) / 2
    chi_square = np.nansum(left**2, axis=(1, 2))
    np.testing.assert_allclose(found.chi_square, chi_square, rtol=1e-4)
    freedom = 121 - 3 * TRUTH.mask.sum(1)
    assert np.all(np.abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5)


def test_frames_and_starts_of_different_number_are_refused() -> None:
    seen = seen_as(recorded(1.0), 1.0)
    with pytest.raises(ValueError, match="targets of as many"):
        fit(seen, jax.tree.map(lambda a: a[:3], TRUTH), PLAIN)


# --- error bars --------------------------------------------------------------------


@pytest.fixture(scope="module")
def singles() -> Targets:
    rng = np.random.default_rng(5)
    position = rng.uniform(3.5, 6.5, (FRAMES, 1, 2))
    intensity = rng.uniform(150, 250, (FRAMES, 1))
    return single(Targets(position, intensity, np.ones((FRAMES, 1), bool)))  # type: ignore[arg-type]


def start_of(truth: Targets) -> Targets:
    """The pixels of the targets, and one intensity for all."""
    intensity = np.full(truth.mask.shape, 200.0, np.float32)
    return Targets(np.round(truth.position), intensity, truth.mask)  # type: ignore[arg-type]


def pulls(found: Fit, truth: Targets) -> np.ndarray:
    """(B, 3) errors of the only target, in its standard deviations."""
    error = [
        found.targets.position - truth.position,
        (found.targets.intensity - truth.intensity)[..., None],
    ]
    return np.asarray(np.concatenate(error, -1) / found.std)[:, 0]


def assert_honest(pull: np.ndarray) -> None:
    """Standard normal: mean, mean square, and coverage of one and two sigma."""
    number = len(pull)
    assert np.all(np.abs(pull.mean(0)) < 4 / number**0.5)
    assert np.all(np.abs((pull**2).mean(0) - 1) < 4 * (2 / number) ** 0.5)
    for reach, share in ((1, 0.6827), (2, 0.9545)):
        error = (share * (1 - share) / number) ** 0.5
        assert np.all(np.abs((np.abs(pull) < reach).mean(0) - share) < 4 * error)


def fisher_std(targets: Targets, noise: float, gain: float, level_std: float) -> np.ndarray:
    """(B, 3) of one target alone and a level, by the information of Gaussian pixels.

    Their variance tells too: `(dmu)^2 (1/var + (dvar/dmu / var)^2 / 2)`.
    """
    jacobian = np.asarray(render_jacobian(targets, **OPTICS), float)
    level = np.ones_like(jacobian[:, :1]) * level_std
    jacobian = np.concatenate([jacobian, level], 1)
    variance = noise**2 + np.asarray(jit_render(targets), float) / gain
    weight = 1 / variance + (1 / gain / variance) ** 2 / 2
    information = np.einsum("bpij,bqij,bij->bpq", jacobian, jacobian, weight)
    information[:, -1, -1] += 1
    return np.sqrt(np.diagonal(np.linalg.inv(information), axis1=1, axis2=2))[:, :3]


def test_errors_follow_the_error_bars(singles: Targets) -> None:
    seen = seen_as(recorded(2.0, singles), 2.0)
    found = jit_fit(seen, start_of(singles), MANY)
    assert np.asarray(found.converged).all()
    assert_honest(pulls(found, singles))
    expected = fisher_std(found.targets, 2.0, np.inf, 0.0)
    np.testing.assert_allclose(found.std[:, 0], expected, rtol=1e-3)


def test_errors_of_an_uncertain_level_are_in_the_error_bars(singles: Targets) -> None:
    """The level told is wrong by the error told: 1.5 counts, six times that of its fit."""
    told = 10 + 1.5 * np.random.default_rng(2).normal(size=FRAMES)
    seen = seen_as(recorded(2.0, singles), 2.0, level=told, level_std=1.5)
    found = jit_fit(seen, start_of(singles), MANY)
    assert_honest(pulls(found, singles))
    np.testing.assert_allclose(
        found.std[:, 0], fisher_std(found.targets, 2.0, np.inf, 1.5), rtol=1e-3
    )
    # 117 pixels or so of noise 2 tell the level to 0.19 counts.
    assert np.std(np.asarray(found.level) - 10) < 0.25


def test_weights_of_shot_noise_beat_equal_weights(singles: Targets) -> None:
    rng = np.random.default_rng(6)
    mean = np.asarray(jit_render(singles), float)
    frames = np.float32(rng.poisson(mean) + rng.normal(size=mean.shape))
    seen = seen_as(frames, 1.0, level=0.0)
    weighted = jit_fit(
        seen, start_of(singles), dataclasses.replace(PLAIN, sensor=Sensor(gain=np.float32(1)))
    )
    equal = jit_fit(seen, start_of(singles), MANY)
    squares = [
        np.asarray((found.targets.position - singles.position) ** 2).mean()
        for found in (weighted, equal)
    ]
    assert squares[0] < 0.85 * squares[1]
    assert np.asarray(weighted.converged).all()
    assert_honest(pulls(weighted, singles))
    expected = fisher_std(weighted.targets, 1.0, 1.0, 0.0)
    np.testing.assert_allclose(weighted.std[:, 0], expected, rtol=1e-3)
    # Without the weights the error bars are far too small.
    assert np.all(pulls(equal, singles).std(0) > 2)


def test_row4_saturated_pixels_are_censored() -> None:
    """Clipped at 150 of 280 counts: the wings still tell the intensity."""
    rng = np.random.default_rng(0)
    truth = single(from_lists([[(*place, 600.0)] for place in rng.uniform(4.7, 5.3, (FRAMES, 2))]))
    frames = np.minimum(recorded(1.0, truth, level=0.0), 150).astype(np.float32)
    clipped = (frames == 150).sum((1, 2))
    assert (clipped >= 1).all()
    start = start_of(dataclasses.replace(truth, intensity=truth.intensity * 0.7))
    found, blind = (
        jit_fit(seen_as(frames, 1.0, level=0.0, saturated=frames >= well), start, MANY)
        for well in (150.0, np.inf)
    )
    np.testing.assert_array_equal(found.num_pixels, 121 - clipped)
    assert np.asarray(found.converged).all()
    pull = pulls(found, truth)
    assert_honest(pull)
    error = np.asarray(found.targets.intensity)[:, 0] - 600
    assert np.sqrt((error**2).mean()) < 30
    # Taken at their word, the clipped pixels hide more than a tenth of the intensity.
    assert np.sqrt(((np.asarray(blind.targets.intensity) - 600) ** 2).mean()) > 60


# --- batches -----------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [np.nan, 1e30, 1e12, -1e6, 0.0])
def test_row1_a_fit_does_not_depend_on_other_frames(garbage: float) -> None:
    frames, start = recorded(2.0), single(perturbed())
    base = jit_fit(seen_as(frames, 2.0, level_std=0.5), start, PLAIN)
    frames[1] = garbage
    got = jit_fit(seen_as(frames, 2.0, level_std=0.5), start, PLAIN)
    assert_same(base, got, [0, 2, 3])
    if garbage == 1e30:  # whose square is infinite
        assert not got.converged[1]
    else:
        assert_no_nan(got)


def test_frames_may_change_places_or_stand_alone() -> None:
    """To the last bit, in a batch of the same size."""
    seen, start = seen_as(recorded(2.0), 2.0, level_std=0.5), single(perturbed())
    base = jit_fit(seen, start, PLAIN)
    order = np.array([2, 0, 3, 1])
    some = partial(jax.tree.map, lambda a: np.asarray(a)[order])
    assert_same(some(base), jit_fit(some(seen), some(start), PLAIN), slice(None))
    for frame in range(4):
        alone = np.arange(4) == frame
        blank, nobody = np.where(alone[:, None, None], seen.counts, 0), start.mask & alone[:, None]
        got = jit_fit(
            dataclasses.replace(seen, counts=blank), dataclasses.replace(start, mask=nobody), PLAIN
        )
        assert_same(base, got, frame)


def test_a_saturated_neighbour_changes_nothing() -> None:
    """One saturated pixel has the censored likelihood worked out for all windows."""
    seen, start = seen_as(recorded(2.0), 2.0, level_std=0.5), single(perturbed())
    saturated = np.zeros(seen.counts.shape, bool)
    saturated[3, 7, 2] = True
    with_it = jit_fit(dataclasses.replace(seen, saturated=saturated), start, PLAIN)
    base = jit_fit(seen, start, PLAIN)
    assert_same(base, with_it, [0, 1, 2])
    assert with_it.num_pixels.tolist() == [121, 121, 121, 120]


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_row10_fits_scale_with_the_frame(scale: float) -> None:
    start = perturbed()
    base = jit_fit(seen_as(recorded(2.0), 2.0, level_std=0.5), single(start), PLAIN)
    scaled = (recorded(2.0) * scale).astype(np.float32)
    bright = Targets(start.position, start.intensity * scale, start.mask)
    got = jit_fit(
        seen_as(scaled, 2.0 * scale, level=10.0 * scale, level_std=0.5 * scale),
        single(bright),
        PLAIN,
    )
    assert np.asarray(got.converged).all()
    # Fits end within a hundredth of a standard deviation of each other.
    error = np.asarray(base.std)[..., :2]
    assert np.all(np.abs(got.targets.position - base.targets.position) <= 0.02 * error)
    error = np.asarray(base.std)[..., 2]
    assert np.all(np.abs(got.targets.intensity / scale - base.targets.intensity) <= 0.02 * error)
    np.testing.assert_allclose(got.std, np.asarray(base.std) * [1, 1, scale], rtol=2e-2)
    np.testing.assert_allclose(got.chi_square, base.chi_square, rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_row10_every_fit_comes_to_rest_at_any_scale(singles: Targets, scale: float) -> None:
    """Sums of many pixels' likelihoods lose the digits that the last steps need."""
    frames = recorded(2.0, singles) * np.float32(scale)
    start = start_of(singles)
    start = dataclasses.replace(start, intensity=start.intensity * np.float32(scale))
    found = jit_fit(seen_as(frames, 2.0 * scale, level=10.0 * scale), start, MANY)
    assert np.asarray(found.converged).all()


# --- faults ------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.0, 40.0])
def test_rows2_and_3_constant_frames_are_finite(level: float) -> None:
    frames = np.full((4, 11, 11), level, np.float32)
    for noise in (2.0, 1e-3):
        found = jit_fit(seen_as(frames, noise, level=0.0), single(perturbed()), PLAIN)
        assert_no_nan(found)
        targets = found.targets
        for value in (targets.position, targets.intensity, found.level, found.chi_square):
            assert np.isfinite(value).all()


def test_targets_without_light_keep_none_from_finding_it() -> None:
    """Their places tell nothing, and may lie anywhere: steps of the light do not wait for them."""
    truth = from_lists([[(5.0, 5.0, 240.0)]])
    places = [(4.2, 4.7), (4.8, 5.0), (4.2, 5.1), (5.9, 4.9)]
    dark = from_lists([[(*place, 1e-9) for place in places]])
    found = jit_fit(seen_as(recorded(0.0, truth), 1.0, level=10.0), dark, PLAIN)
    np.testing.assert_allclose(found.targets.intensity.sum(1), 240, rtol=1e-2)
    assert (found.chi_square < 1).all()


@pytest.mark.parametrize("apart", [0.0, 1e-6])
def test_row13_coincident_targets_have_no_certain_place(apart: float) -> None:
    truth = from_lists([[(5.1, 5.2, 120.0), (5.1, 5.2, 130.0), (2.0, 2.0, 200.0)]] * 4)
    start = from_lists(
        [
            [(5.0, 5.0, 110.0), (5.0, 5.0 + apart, 110.0), (2.1, 2.0, 180.0)],
            [(5.1, 5.2, 120.0), (5.1, 5.2 + apart, 130.0), (2.1, 2.0, 180.0)],
        ]
        * 2
    )
    seen = seen_as(recorded(0.0, truth), 2.0)
    found = jit_fit(seen, single(start), PLAIN)
    assert_no_nan(found)
    std = np.asarray(found.std)
    assert np.all(std[:, :2, :2].max(-1) > 1), "pixels"
    assert np.all(std[:, :2, 2] > 100), "counts"
    # The third is far away and as certain as ever.
    lone = from_lists([[(2.0, 2.0, 200.0)]] * 4, max_targets=3)
    seen = seen_as(recorded(0.0, lone), 2.0)
    alone = np.asarray(jit_fit(seen, single(lone), PLAIN).std)[:, 0]
    np.testing.assert_allclose(std[:, 2], alone, rtol=0.02)


def told(low: float, high: float, *, separation: float = 0.5, size: float = 1.0) -> Known:
    prior = scene_prior(intensity=(low, high), separation=separation, cluster_size=size)
    return jax.tree.map(np.float32, dataclasses.replace(PLAIN, prior=prior))


def test_row13_a_prior_makes_coincident_targets_certain_within_it() -> None:
    truth = from_lists([[(5.1, 5.2, 230.0), (5.1, 5.2, 240.0)]] * 4, 3)
    start = from_lists([[(5.0, 5.0, 220.0), (5.3, 5.3, 220.0)]] * 4, 3)
    seen = seen_as(recorded(0.0, truth), 2.0)
    found = jit_fit(seen, single(start), told(220, 250))
    assert_no_nan(found)
    std = np.asarray(found.std)[:, :2]
    # `v` is known to 1 at least, and `dI/dv` is `(high - low) phi(v)`.
    assert np.all(std < [0.1, 0.1, 30 / (2 * np.pi) ** 0.5])
    apart = np.linalg.norm(found.targets.position[:, 0] - found.targets.position[:, 1], axis=-1)
    assert ((apart > 0.3) & (apart < 0.5)).all(), "held apart, softly"


def test_an_intensity_known_exactly_stays_what_it_is() -> None:
    """And tells the place no worse than one that is fitted."""
    alone = from_lists([[(5.1 + shift, 5.2, 240.0)] for shift in (-0.3, -0.1, 0.1, 0.3)], 3)
    seen = seen_as(recorded(2.0, alone), 2.0)
    exact = jit_fit(seen, single(perturbed(alone)), told(240, 240))
    free = jit_fit(seen, single(perturbed(alone)), told(200, 280))
    for found in (exact, free):
        assert np.asarray(found.converged).all()
        assert_no_nan(found)
    np.testing.assert_array_equal(exact.targets.intensity[:, 0], np.float32(240))
    np.testing.assert_array_equal(exact.std[:, 0, 2], 0)
    assert (np.asarray(exact.std)[:, 0, :2] <= np.asarray(free.std)[:, 0, :2] * 1.001).all()
    off = (exact.targets.position - alone.position)[:, 0] / np.asarray(exact.std)[:, 0, :2]
    assert np.abs(off).max() < 4


# --- the mode ----------------------------------------------------------------------

PAIRS = from_lists([[(4.8, 5.1, 230.0), (5.3, 5.5, 240.0)], [(4.1, 6.2, 200.0)]])
# A level told as 6 counts, known to 0.7, is 6.5; the first frame saturates.
POINT = {"noise": 1.3, "pedestal": 2.0, "background": 4.0, "level_std": 0.7, "sigma": 0.5}
RANGE = {**POINT, "gain": 2.0, "low": 220.0, "high": 250.0, "separation": 0.8, "size": 1.0}
LOG_NORMAL = {**POINT, "log_mean": 5.4, "log_std": 0.2}
# Far below what makes the root bend.
STEPS = {
    "frame": 1e-2, "gain": 1e-2, "noise": 1e-2, "pedestal": 1e-2, "background": 1e-2,
    "level_std": 1e-3, "sigma": 1e-4, "separation": 1e-4, "size": 1e-4, "low": 1e-2, "high": 1e-2,
    "log_mean": 1e-3, "log_std": 1e-3,
}  # fmt: skip
Point = dict[str, jax.Array]


@functools.cache
def pair_frames() -> tuple[np.ndarray, np.ndarray]:
    """Frames of the pairs, and which pixels of the first are above 60 counts."""
    frames = recorded(1.3, PAIRS, level=6.5)
    return frames, (frames > 60) & (np.arange(2) == 0)[:, None, None]


def point(numbers: dict[str, float]) -> Point:
    """All that an answer depends on."""
    values = {**numbers, "frame": pair_frames()[0]}
    return {name: jnp.asarray(value, float) for name, value in values.items()}


def known_of(at: Point) -> Known:
    law = (
        Uniform(at["low"], at["high"]) if "low" in at else LogNormal(at["log_mean"], at["log_std"])
    )
    prior = ScenePrior(law, separation=at.get("separation", 0.0), cluster_size=at.get("size"))
    return Known(psf=Gaussian(at["sigma"]), sensor=Sensor(gain=at.get("gain")), prior=prior)


def observed(at: Point) -> Observation:
    saturated = jnp.asarray(pair_frames()[1])
    told = ("noise", "pedestal", "background", "level_std")
    noise, pedestal, background, level_std = (jnp.broadcast_to(at[name], 2) for name in told)
    return Observation(
        counts=jnp.where(saturated, 60, at["frame"]),
        valid=jnp.ones_like(saturated),
        saturated=saturated,
        neighbours=jnp.zeros_like(at["frame"]),
        origin=jnp.zeros((2, 2)),
        noise=noise[:, None, None],
        pedestal=pedestal[:, None, None],
        background=background[:, None, None],
        background_std=level_std,
    )


def usual() -> tuple[Targets, jax.Array]:
    """Where the fits begin, and how long they go on."""
    start = perturbed(PAIRS)
    position, intensity = (jnp.asarray(a, float) for a in (start.position, start.intensity))
    return Targets(position, intensity, jnp.asarray(start.mask)), jnp.asarray(60)


def answer(at: Point, *given: Any, unroll: bool = False) -> tuple[jax.Array, Fit]:
    """(2, 7) positions, intensities and level."""
    start, number = given or usual()
    number = 60 if unroll else number
    found = fit(observed(at), start, known_of(at), num_iterations=number, unroll=unroll)
    return flat(found.targets, found.level), found


def flat(targets: Targets, level: jax.Array) -> jax.Array:
    place = targets.position.reshape(2, 4)
    return jnp.concatenate([place, targets.intensity, level[:, None]], -1)


@quick_jit
def newton(theta: jax.Array, at: Point) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step to the root of the density's gradient, by autodiff of the density alone.

    Returns the step, standard deviations of `theta`, and the answer there.
    """
    seen, known, mask = observed(at), known_of(at), jnp.asarray(PAIRS.mask)

    def one(theta: jax.Array, seen: Observation, mask: jax.Array) -> tuple:
        model: SceneModel = scene_model(seen, mask, known)

        def cost(theta: jax.Array) -> jax.Array:
            present = jnp.append(jnp.repeat(mask, 3), True)
            theta = jnp.where(present, theta, 0)
            return -model.log_likelihood(theta) - model.log_prior(theta)

        hessian = jax.hessian(cost)(theta)
        empty = jnp.where(jnp.diagonal(hessian) == 0, 1, 0)
        inverse = jnp.linalg.inv(hessian + jnp.diag(empty))
        level = seen.level[0, 0] + seen.background_std * theta[-1]
        step = -jnp.einsum("pq,q->p", inverse, jax.grad(cost)(theta))
        return step, jnp.sqrt(jnp.diagonal(inverse)), model.unpack(theta), level

    with jax.numpy_rank_promotion("allow"):
        step, std, targets, level = jax.vmap(one)(theta, seen, mask)
    return step, std, flat(targets, level)


@pytest.fixture(scope="module")
def push() -> Any:
    """The answer and its derivative along a tangent, forward."""
    return quick_jit(lambda at, tangent: jax.jvp(answer, (at,), (tangent,), has_aux=True))


@pytest.fixture(scope="module")
def pull() -> Any:
    """The answer and the derivative of its sum with weights, backward."""

    def weighed(at: Point, start: Targets, weight: jax.Array, number: jax.Array) -> tuple:
        value, found = answer(at, start, number)
        return (weight * value).sum(), found

    slopes = quick_jit(jax.value_and_grad(weighed, (0, 1), has_aux=True, allow_int=True))
    return lambda at, weight, start, number: slopes(at, start, weight, number)


def direction(at: Point, name: str) -> Point:
    value = np.random.default_rng(4).normal(size=at[name].shape) if name == "frame" else 1.0
    return {key: jnp.asarray(value if key == name else 0 * at[key], float) for key in at}


def difference(theta: jax.Array, at: Point, tangent: Point, step: float) -> np.ndarray:
    """(2, 7) five-point difference of the density's roots."""
    roots = []
    for k in (-2, -1, 1, 2):
        there, moved = theta, jax.tree.map(lambda a, b, k=k: a + k * step * b, at, tangent)
        for _ in range(4):
            there = there + newton(there, moved)[0]
        roots.append(newton(there, moved)[2])
    return np.einsum("k,kbp->bp", np.array([1, -8, 8, -1]) / (12 * step), np.stack(roots))


def assert_derivative(got: ArrayLike, expected: np.ndarray, share: float) -> None:
    """Within a share of the largest change of a position, of an intensity, of the level."""
    for columns in (slice(0, 4), slice(4, 6), slice(6, 7)):
        largest = np.abs(expected[:, columns]).max()
        assert largest > 1e-6, "the direction must move the fit"
        np.testing.assert_allclose(
            np.asarray(got)[:, columns], expected[:, columns], rtol=0, atol=share * largest
        )


@pytest.mark.parametrize("name", [n for n in STEPS if n == "frame" or n in RANGE])
def test_implicit_derivative_equals_differences(x64: None, push: Any, name: str) -> None:
    """With shot noise, censored pixels and all limits; of roots found by autodiff alone."""
    at = point(RANGE)
    tangent = direction(at, name)
    _, implicit, found = push(at, tangent)
    assert_derivative(implicit, difference(found.theta, at, tangent, STEPS[name]), 1e-5)


def assert_mode(found: Fit, at: Point) -> None:
    """The plain density's gradient vanishes, to what rounding of its value lets a step see."""
    assert np.asarray(found.converged).all()
    step, std, _ = newton(found.theta, at)
    np.testing.assert_allclose(step / std, 0, atol=1e-5)
    # A hundredth of a standard deviation off is seen as such.
    off, _, _ = newton(found.theta + 0.01 * std, at)
    np.testing.assert_allclose(off[0] / std[0], -0.01, rtol=0.2)


def test_the_answer_is_the_mode_of_likelihood_and_prior(x64: None, push: Any, pull: Any) -> None:
    """Of pixels whose variance goes with their light, of censored ones, and of both densities."""
    assert int(pair_frames()[1].sum()) >= 2
    at = point(RANGE)
    assert_mode(push(at, direction(at, "noise"))[2], at)
    at = point(LOG_NORMAL)
    assert_mode(pull(at, jnp.ones((2, 7)), *usual())[0][1], at)


def test_unrolled_iterations_have_the_same_derivative(x64: None, push: Any) -> None:
    """They come to rest with the digits of the fit's place, half of all."""
    at = point(RANGE)
    unrolled = quick_jit(
        lambda at, tangent: jax.jvp(partial(answer, unroll=True), (at,), (tangent,), has_aux=True)
    )
    for name in ("frame", "sigma", "gain", "high"):
        tangent = direction(at, name)
        assert_derivative(push(at, tangent)[1], unrolled(at, tangent)[1], 1e-4)


def test_reverse_mode_equals_differences_and_forgets_the_start(x64: None, pull: Any) -> None:
    at = point(LOG_NORMAL)
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7)))
    (_, found), (slopes, by_start) = pull(at, weight, *usual())
    assert not np.asarray(by_start.position).any()
    assert not np.asarray(by_start.intensity).any()
    for name in at:
        tangent = direction(at, name)
        expected = float((weight * difference(found.theta, at, tangent, STEPS[name])).sum())
        assert abs(expected) > 1e-6
        got = float((slopes[name] * tangent[name]).sum())
        assert got == pytest.approx(expected, rel=1e-5), name


def test_row34_the_derivative_of_an_unfinished_fit_is_refused(x64: None, pull: Any) -> None:
    """Frame 1 starts at its answer and is done at once; frame 0 is not."""
    # The level starts at what is told, not at its answer: let it be known.
    at, (start, _) = point({**LOG_NORMAL, "level_std": 1e-9}), usual()
    weight = jnp.ones((2, 7))
    (_, done), _ = pull(at, weight, *usual())
    near = jax.tree.map(lambda a, b: jnp.stack([b[0], a[1]]), done.targets, start)
    for number in (0, 1):
        (_, found), (slopes, _) = pull(at, weight, near, jnp.asarray(number))
        assert_no_nan(found)
        assert np.asarray(found.converged).tolist() == [False, True]
        tells = ~pair_frames()[1][0]
        assert np.isnan(slopes["frame"][0][tells]).all()
        assert np.isfinite(slopes["frame"][1]).all()
        assert np.abs(slopes["frame"][1]).max() > 0


def test_row2_a_frame_without_targets_has_finite_derivatives(x64: None, pull: Any) -> None:
    at, (start, number) = point(LOG_NORMAL), usual()
    at["frame"] = 0 * at["frame"]
    nobody = dataclasses.replace(start, mask=jnp.zeros((2, 2), bool))
    _, (slopes, _) = pull(at, jnp.ones((2, 7)), nobody, number)
    # The level is known to 0.7 counts and told by the pixels that are not saturated.
    tells = ~pair_frames()[1]
    expected = 1 / (tells.sum((1, 2)) + POINT["noise"] ** 2 / 0.7**2)
    for got, one, some in zip(slopes["frame"], expected, tells, strict=True):
        assert np.isfinite(got).all()
        if some.all():
            np.testing.assert_allclose(got, one, rtol=1e-9)


def test_no_gradient_passes_through_the_iterations() -> None:
    """A gradient through the iterations runs a loop in reverse; ours runs none."""
    seen, start = seen_as(recorded(2.0), 2.0), single(perturbed())

    def places(counts: jax.Array) -> jax.Array:
        found = fit(dataclasses.replace(seen, counts=counts), start, PLAIN)
        return found.targets.position.sum()

    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, None, length=3)[0]

    assert "reverse=True" in str(jax.make_jaxpr(jax.grad(loop))(1.0))
    assert "reverse=True" not in str(jax.make_jaxpr(jax.grad(places))(seen.counts))
