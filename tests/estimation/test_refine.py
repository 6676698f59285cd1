"""Refine: exact recovery, honest error bars, faults, and implicit derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import ArrayLike

from dscsnet_jax.estimation.observe import observe
from dscsnet_jax.estimation.prior import ScenePrior
from dscsnet_jax.estimation.refine import Fit, refine
from dscsnet_jax.physics.limits import cramer_rao, information_root
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.sensor import Sensor
from dscsnet_jax.physics.targets import Targets, from_lists

FRAMES = 1000
OPTICS = {"frame_size": 11, "sigma": 0.5}

jit_refine = jax.jit(refine, static_argnames=("num_iterations", "unroll"))
jit_observe = partial(jax.jit(observe), sigma=0.5)
jit_render = jax.jit(partial(render, **OPTICS))

# Alone, a pair, a close three; all start a tenth of a pixel and 15 % off.
SCENES = [
    [(4.2, 5.1, 240.0)],
    [(4.6, 6.1, 240.0), (5.1, 6.3, 130.0)],
    [(5.0, 5.0, 230.0), (5.6, 5.1, 240.0), (5.1, 5.7, 250.0)],
    [(7.3, 2.2, 90.0), (2.1, 8.4, 300.0)],
]
TRUTH = from_lists(SCENES)


def perturbed(truth: Targets = TRUTH, seed: int = 0) -> Targets:
    rng = np.random.default_rng(seed)
    shift = rng.uniform(-0.15, 0.15, truth.position.shape) * truth.mask[..., None]
    return Targets(truth.position + shift, truth.intensity * 0.85, truth.mask)


def recorded(noise: float, truth: Targets = TRUTH, level: float = 10.0) -> np.ndarray:
    # In float32 in both modes: a compiled function must not meet NumPy's float64 in one only.
    single = (np.asarray(a, np.float32) for a in (truth.position, truth.intensity))
    mean = np.asarray(jit_render(Targets(*single, truth.mask)), np.float32)
    return mean + level + noise * np.random.default_rng(1).normal(size=mean.shape).astype("f4")


def assert_no_nan(fit: Fit) -> None:
    for value in jax.tree.leaves(fit):
        assert not np.isnan(np.asarray(value)).any()
    assert not np.isnan(np.asarray(fit.std)).any()


def assert_same(a: Fit, b: Fit, frames: ArrayLike) -> None:
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(one)[frames], np.asarray(other)[frames])


# --- recovery ----------------------------------------------------------------------


def test_noise_free_targets_are_recovered() -> None:
    seen = jit_observe(recorded(0.0), noise=1.0, background=10.0)
    for seed in range(5):
        fit = jit_refine(seen, perturbed(seed=seed))
        assert np.asarray(fit.converged).all()
        np.testing.assert_allclose(fit.targets.position, TRUTH.position, atol=1e-3)
        np.testing.assert_allclose(fit.targets.intensity, TRUTH.intensity, atol=0.1)
        np.testing.assert_allclose(fit.chi_square, 0, atol=1e-3)


def test_an_unknown_background_is_fitted_too() -> None:
    seen = jit_observe(recorded(0.0), noise=1.0, background=10.0)
    off = seen.replace(background=seen.background + 2, background_std=jnp.full(4, 100.0))
    fit = jit_refine(off, perturbed())
    np.testing.assert_allclose(fit.background, 10, atol=0.01)
    np.testing.assert_allclose(fit.targets.position, TRUTH.position, atol=1e-3)


def test_padded_slots_stay_zero() -> None:
    fit = jit_refine(jit_observe(recorded(2.0), noise=2.0, background=10.0), perturbed())
    padded = ~TRUTH.mask
    assert padded.sum() == 4
    np.testing.assert_array_equal(fit.targets.mask, TRUTH.mask)
    assert not np.asarray(fit.targets.position)[padded].any()
    assert not np.asarray(fit.targets.intensity)[padded].any()
    assert not np.asarray(fit.std)[padded].any()
    slots = np.repeat(padded, 3, axis=1)
    assert not np.asarray(fit.covariance)[slots].any()


def test_goodness_is_that_of_the_fitted_frame() -> None:
    frames = recorded(2.0)
    frames[2, 0, :3] = np.nan
    fit = jit_refine(jit_observe(frames, noise=2.0, background=10.0), perturbed())
    np.testing.assert_array_equal(fit.num_pixels, [121, 121, 118, 121])
    left = (frames - np.asarray(jit_render(fit.targets)) - 10) / 2
    chi_square = np.nansum(left**2, axis=(1, 2))
    np.testing.assert_allclose(fit.chi_square, chi_square, rtol=1e-4)
    np.testing.assert_allclose(fit.cost, chi_square / 2, rtol=1e-4)
    # Chi-square of some 115 degrees of freedom: 115 +- 15.
    assert np.all(np.abs(chi_square - 115) < 4 * 15)


def test_frames_and_starts_of_different_number_are_refused() -> None:
    seen = jit_observe(recorded(1.0), noise=1.0, background=10.0)
    with pytest.raises(ValueError, match="targets of as many"):
        refine(seen, jax.tree.map(lambda a: a[:3], TRUTH))


# --- error bars --------------------------------------------------------------------


@pytest.mark.parametrize("gain", [None, 2.0])
def test_error_bars_are_the_cramer_rao_bounds(x64: None, gain: float | None) -> None:
    """Of a target alone, a blended pair, a close three and two far apart."""
    seen = jit_observe(
        jit_render(TRUTH), noise=2.0, background=0.0, gain=np.inf if gain is None else gain
    )
    fit = jit_refine(seen.replace(noise=jnp.full(4, 2.0)), perturbed())
    sensor = Sensor(read_noise=2.0, electrons_per_count=gain)
    root = jax.jit(partial(information_root, sensor=sensor, **OPTICS))(fit.targets)
    bounds = np.stack(cramer_rao(root, fit.targets.mask), -1)
    np.testing.assert_allclose(fit.std[TRUTH.mask], bounds[TRUTH.mask], rtol=1e-6)
    # The whole matrix, and its determinant: the root has the identity in padded slots.
    information = np.einsum("bap,baq->bpq", root, root)
    slots = np.repeat(TRUTH.mask, 3, axis=1)
    for i, present in enumerate(slots):
        expected = np.linalg.inv(information[i][np.ix_(present, present)])
        got = np.asarray(fit.covariance)[i][np.ix_(present, present)]
        scale = np.sqrt(np.diag(expected))
        np.testing.assert_allclose(
            got / np.outer(scale, scale), expected / np.outer(scale, scale), atol=1e-6
        )
    # No direction is wider than the frame, than the bend of a blend allows, or brighter
    # than all of the frame.
    all_counts = np.asarray(jit_render(TRUTH)).sum((1, 2))
    for i, present in enumerate(slots):
        bend = bends(fit.targets.position[i], fit.targets.intensity[i], TRUTH.mask[i], gain)
        energy = np.full_like(bend, 12 / all_counts[i] ** 2)
        scene = np.stack([12 / 11**2 + bend, 12 / 11**2 + bend, energy], -1).ravel()
        whole = information[i] + np.diag(np.where(present, scene, 0))
        np.testing.assert_allclose(fit.log_determinant[i], np.linalg.slogdet(whole)[1], rtol=1e-5)


def bends(
    position: jax.Array, intensity: jax.Array, mask: np.ndarray, gain: float | None
) -> np.ndarray:
    """(K,) information on the place of targets that lie on each other, of read noise 2."""
    place, sigma = np.asarray(position), OPTICS["sigma"]
    apart2 = ((place[:, None] - place[None]) ** 2).sum(-1)
    apart2[~mask[:, None] | ~mask[None] | np.eye(len(mask), dtype=bool)] = np.inf
    value = np.where(mask, np.asarray(intensity), 0)
    noise = np.sqrt(4.0 + (0 if gain is None else value / gain))
    quartic = value / 2 * np.sqrt(3 / (16 * np.pi)) / (sigma**3 * noise)
    return 1.35 * quartic * np.exp(-2 * apart2.min(1) / sigma**2)


def test_a_quartic_well_is_as_wide_as_its_gaussian() -> None:
    """What `_log_determinant` takes the bend for: equal integrals, for any `q`."""
    for q in (0.3, 20.0):
        x = np.linspace(-30, 30, 2_000_001) / np.sqrt(q)
        well = np.exp(-((q * x**2) ** 2) / 2).sum() * (x[1] - x[0])
        np.testing.assert_allclose(well, np.sqrt(2 * np.pi / (1.35 * q)), rtol=2e-3)
    # And the norm of the second derivative of a Gaussian PSF of width 1.
    x = np.linspace(-9, 9, 4001)
    bend = (x**2 - 1) * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    across = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    norm2 = (bend**2).sum() * (across**2).sum() * (x[1] - x[0]) ** 2
    np.testing.assert_allclose(norm2, 3 / (16 * np.pi), rtol=1e-6)


@pytest.fixture(scope="module")
def singles() -> Targets:
    rng = np.random.default_rng(5)
    position = rng.uniform(3.5, 6.5, (FRAMES, 1, 2))
    intensity = rng.uniform(150, 250, (FRAMES, 1))
    return Targets(
        *(jnp.asarray(a, jnp.float32) for a in (position, intensity)), jnp.ones((FRAMES, 1), bool)
    )


def start_of(truth: Targets) -> Targets:
    """The pixels of the targets, and one intensity for all."""
    return Targets(jnp.round(truth.position), jnp.full(truth.mask.shape, 200.0), truth.mask)


def pulls(fit: Fit, truth: Targets) -> np.ndarray:
    """(B, 3) errors of the only target, in its standard deviations."""
    error = [
        fit.targets.position - truth.position,
        (fit.targets.intensity - truth.intensity)[..., None],
    ]
    return np.asarray(np.concatenate(error, -1) / fit.std)[:, 0]


def assert_honest(pull: np.ndarray) -> None:
    """Standard normal: mean, standard deviation, and coverage of one and two sigma."""
    number = len(pull)
    assert np.all(np.abs(pull.mean(0)) < 4 / np.sqrt(number))
    assert np.all((pull.std(0) > 0.9) & (pull.std(0) < 1.1))
    for reach, share in ((1, 0.6827), (2, 0.9545)):
        error = np.sqrt(share * (1 - share) / number)
        assert np.all(np.abs((np.abs(pull) < reach).mean(0) - share) < 4 * error)


def test_errors_follow_the_error_bars(singles: Targets) -> None:
    frames = recorded(2.0, singles)
    fit = jit_refine(jit_observe(frames, noise=2.0, background=10.0), start_of(singles))
    assert np.asarray(fit.converged).all()
    assert_honest(pulls(fit, singles))


def test_errors_of_an_uncertain_background_are_in_the_error_bars(singles: Targets) -> None:
    """The level told is wrong by the error told: 1.5 counts, three times that of its fit."""
    frames = recorded(2.0, singles)
    seen = jit_observe(frames, noise=2.0, background=10.0)
    told = 10 + 1.5 * np.random.default_rng(2).normal(size=FRAMES)
    unsure = seen.replace(
        background=jnp.asarray(told, jnp.float32), background_std=jnp.full(FRAMES, 1.5)
    )
    fit = jit_refine(unsure, start_of(singles))
    assert_honest(pulls(fit, singles))
    assert np.std(np.asarray(fit.background) - 10) < 0.25


def test_weights_of_shot_noise_beat_equal_weights(singles: Targets) -> None:
    rng = np.random.default_rng(6)
    mean = np.asarray(jit_render(singles), float)
    frames = np.float32(rng.poisson(mean) + rng.normal(size=mean.shape))
    weighted, equal = (
        jit_refine(jit_observe(frames, noise=1.0, background=0.0, gain=gain), start_of(singles))
        for gain in (1.0, np.inf)
    )
    squares = [
        np.asarray((fit.targets.position - singles.position) ** 2).mean()
        for fit in (weighted, equal)
    ]
    assert squares[0] < 0.85 * squares[1]
    assert_honest(pulls(weighted, singles))
    # Without the weights the error bars are far too small.
    assert np.all(pulls(equal, singles).std(0) > 2)


def test_weights_of_shot_noise_do_not_hinder_convergence(singles: Targets) -> None:
    rng = np.random.default_rng(6)
    mean = np.asarray(jit_render(singles), float)
    frames = np.float32(rng.poisson(mean) + rng.normal(size=mean.shape))
    fit = jit_refine(jit_observe(frames, noise=1.0, background=0.0, gain=1.0), start_of(singles))
    assert np.asarray(fit.converged).mean() > 0.98


# --- batches -----------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [np.nan, 1e30, -1e6, 0.0])
def test_row1_a_fit_does_not_depend_on_other_frames(garbage: float) -> None:
    frames = recorded(2.0)
    start = perturbed()
    base = jit_refine(jit_observe(frames, noise=2.0), start)
    frames[1] = garbage
    got = jit_refine(jit_observe(frames, noise=2.0), start)
    assert_same(base, got, [0, 2, 3])
    assert_no_nan(got)


def test_frames_may_change_places() -> None:
    order = np.array([2, 0, 3, 1])
    seen, start = jit_observe(recorded(2.0), noise=2.0), perturbed()
    moved = jax.tree.map(lambda a: a[order], (seen, start))
    assert_same(
        jax.tree.map(lambda a: a[order], jit_refine(seen, start)), jit_refine(*moved), slice(None)
    )


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_row10_fits_scale_with_the_frame(scale: float) -> None:
    start = perturbed()
    base = jit_refine(jit_observe(recorded(2.0), noise=2.0), start)
    scaled = (recorded(2.0) * scale).astype(np.float32)
    bright = Targets(start.position, start.intensity * scale, start.mask)
    got = jit_refine(jit_observe(scaled, noise=2.0 * scale), bright)
    assert np.asarray(got.converged).all()
    # Fits end within a hundredth of a standard deviation of each other.
    error = np.asarray(base.std)[..., :2]
    assert np.all(np.abs(got.targets.position - base.targets.position) <= 0.02 * error)
    error = np.asarray(base.std)[..., 2]
    assert np.all(np.abs(got.targets.intensity / scale - base.targets.intensity) <= 0.02 * error)
    np.testing.assert_allclose(got.std, np.asarray(base.std) * [1, 1, scale], rtol=2e-2)


# --- faults ------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.0, 40.0])
def test_rows2_and_3_constant_frames_are_finite(level: float) -> None:
    frames = np.full((4, 11, 11), level, np.float32)
    for given in ({}, {"noise": 2.0, "background": 0.0}):
        fit = jit_refine(jit_observe(frames, **given), perturbed())
        assert_no_nan(fit)
        for value in (fit.targets.position, fit.targets.intensity, fit.background, fit.chi_square):
            assert np.isfinite(value).all()
        assert np.isfinite(fit.cost).all()
        assert np.isfinite(fit.log_determinant).all()


def test_row2_a_frame_without_targets_has_finite_derivatives() -> None:
    nobody = from_lists([[]] * 2)

    def level(frames: jax.Array) -> jax.Array:
        seen = jit_observe(frames, noise=1.0, background=0.0)
        seen = seen.replace(background_std=jnp.ones(2))
        fit = refine(seen, nobody)
        return fit.background.sum() + fit.targets.position.sum() + fit.targets.intensity.sum()

    slope = jax.jit(jax.grad(level))(jnp.zeros((2, 11, 11)))
    # Of 121 pixels of noise `s = sqrt(1 + 1/12)` and a level known to 1 count.
    variance = 1 + 1 / 12
    np.testing.assert_allclose(slope, 1 / (121 + variance), rtol=1e-5)


def test_row4_saturated_pixels_are_censored() -> None:
    """Clipped at 150 of 280 counts: the wings still tell the intensity."""
    rng = np.random.default_rng(0)
    tables = [[(*place, 600.0)] for place in rng.uniform(4.7, 5.3, (FRAMES, 2))]
    truth = from_lists(tables)
    frames = np.minimum(recorded(1.0, truth, level=0.0), 150).astype(np.float32)
    assert ((frames == 150).sum((1, 2)) >= 1).all()
    start = Targets(np.round(truth.position), truth.intensity * 0.7, truth.mask)
    fit, blind = (
        jit_refine(jit_observe(frames, noise=1.0, background=0.0, saturation=well), start)
        for well in (150.0, np.inf)
    )
    clipped = (frames == 150).sum((1, 2))
    np.testing.assert_array_equal(fit.num_pixels, 121 - clipped)
    assert np.asarray(fit.converged).all()
    error = np.asarray(fit.targets.intensity)[:, 0] - 600
    pull = error / np.asarray(fit.std)[:, 0, 2]
    assert abs(pull.mean()) < 0.2
    assert 0.9 < pull.std() < 1.1
    assert np.sqrt((error**2).mean()) < 30
    # Taken at their word, the clipped pixels hide more than a tenth of the intensity.
    assert np.sqrt(((np.asarray(blind.targets.intensity) - 600) ** 2).mean()) > 60


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
    fit = jit_refine(jit_observe(recorded(0.0, truth), noise=2.0, background=10.0), start)
    assert_no_nan(fit)
    std = np.asarray(fit.std)
    assert np.all(std[:, :2, :2].max(-1) > 1), "pixels"
    assert np.all(std[:, :2, 2] > 100), "counts"
    # The third is far away and as certain as ever.
    lone = from_lists([[(2.0, 2.0, 200.0)]] * 4, max_targets=3)
    seen = jit_observe(recorded(0.0, lone), noise=2.0, background=10.0)
    alone = np.asarray(jit_refine(seen, lone).std)[:, 0]
    np.testing.assert_allclose(std[:, 2], alone, rtol=0.02)


def test_row13_a_prior_makes_coincident_targets_certain_within_it() -> None:
    truth = from_lists([[(5.1, 5.2, 230.0), (5.1, 5.2, 240.0)]])
    start = from_lists([[(5.0, 5.0, 220.0), (5.3, 5.3, 220.0)]])
    prior = ScenePrior(intensity=(220.0, 250.0), separation=0.5, extent=1.0)
    fit = jit_refine(jit_observe(recorded(0.0, truth), noise=2.0, background=10.0), start, prior)
    assert_no_nan(fit)
    assert np.all(np.asarray(fit.std) < [1.0, 1.0, 30 / 12**0.5])
    apart = np.linalg.norm(fit.targets.position[0, 0] - fit.targets.position[0, 1])
    assert 0.3 < apart < 0.5, "held apart, softly"


# --- derivatives -------------------------------------------------------------------

PAIRS = from_lists([[(4.8, 5.1, 230.0), (5.3, 5.5, 240.0)], [(4.1, 6.2, 200.0)]])
SIZES = {"frame": 0.5, "sigma": 2e-3, "noise": 0.02, "low": 0.5, "high": 0.5, "gain": 0.02}


@partial(jax.jit, static_argnames=("unroll", "with_gain"))
def moved(
    at: dict[str, jax.Array], tangent: dict[str, jax.Array], unroll: bool, with_gain: bool
) -> tuple[jax.Array, jax.Array]:
    """Fits (2, 7) and their derivative along `tangent`, in forward mode."""

    def answer(at: dict[str, jax.Array]) -> jax.Array:
        given = {"gain": at["gain"]} if with_gain else {}
        seen = observe(at["frame"], sigma=at["sigma"], noise=at["noise"], background=4.0, **given)
        seen = seen.replace(background_std=jnp.full(2, 0.7))
        prior = ScenePrior(intensity=(at["low"], at["high"]), separation=0.8, extent=1.0)
        fit = refine(seen, perturbed(PAIRS), prior, num_iterations=60, unroll=unroll)
        place = fit.targets.position.reshape(2, 4)
        return jnp.concatenate([place, fit.targets.intensity, fit.background[:, None]], -1)

    return jax.jvp(answer, (at,), (tangent,))


def point() -> dict[str, jax.Array]:
    frame = recorded(1.0, PAIRS, level=5.0)
    values = {
        "frame": frame,
        "sigma": [0.5, 0.52],
        "noise": 1.3,
        "low": 220,
        "high": 250,
        "gain": 2,
    }
    return {name: jnp.asarray(value, float) for name, value in values.items()}


def differences(name: str, with_gain: bool) -> tuple[dict, dict, np.ndarray]:
    """The point, a direction along `name`, and the five-point difference of the fit."""
    at = point()
    tangent = jax.tree.map(jnp.zeros_like, at)
    direction = np.random.default_rng(4).normal(size=at[name].shape)
    tangent[name] = jnp.asarray(direction)
    step = SIZES[name]
    shifted = [
        moved({**at, name: at[name] + k * step * direction}, tangent, False, with_gain)[0]
        for k in (-2, -1, 1, 2)
    ]
    weights = np.array([1, -8, 8, -1]) / (12 * step)
    return at, tangent, np.einsum("k,kbp->bp", weights, np.stack(shifted))


# A fit rests where no step lowers its cost, some 60, any more: `sqrt(eps cost)` standard
# deviations from the minimum; the five-point difference adds up 1.5 of them per step.
STANDARD_ERRORS = (0.02, 5.0, 0.5)  # of positions, intensities, level


def assert_close(got: jax.Array, expected: np.ndarray, name: str) -> None:
    """Within 1e-5 of the largest change of a position, of an intensity, of the level."""
    rest = 1.5 / SIZES[name] * np.sqrt(np.finfo(float).eps * 60)
    for columns, std in zip((slice(0, 4), slice(4, 6), slice(6, 7)), STANDARD_ERRORS, strict=True):
        largest = np.abs(expected[:, columns]).max()
        assert largest > 1e-6, "the direction must move the fit"
        assert rest * std < 1e-3 * largest, "the differences must tell"
        np.testing.assert_allclose(
            got[:, columns], expected[:, columns], rtol=0, atol=1e-5 * largest + rest * std
        )


@pytest.mark.parametrize("name", ["frame", "sigma", "noise", "low", "high"])
def test_implicit_derivative_equals_differences_and_unrolling(x64: None, name: str) -> None:
    at, tangent, expected = differences(name, with_gain=False)
    _, implicit = moved(at, tangent, False, False)
    assert_close(implicit, expected, name)
    _, unrolled = moved(at, tangent, True, False)
    assert_close(unrolled, expected, name)


@pytest.mark.parametrize("name", ["frame", "sigma", "noise", "gain"])
def test_implicit_derivative_with_shot_noise_equals_differences(x64: None, name: str) -> None:
    at, tangent, expected = differences(name, with_gain=True)
    _, implicit = moved(at, tangent, False, True)
    assert_close(implicit, expected, name)


def summed(frames: jax.Array, position: jax.Array) -> jax.Array:
    seen = observe(frames, sigma=0.5, noise=2.0, background=10.0)
    start = Targets(position, jnp.asarray(PAIRS.intensity), jnp.asarray(PAIRS.mask))
    fit = refine(seen, start)
    return fit.targets.position.sum() + fit.targets.intensity.sum() / 100


def test_reverse_mode_equals_differences_and_forgets_the_start(x64: None) -> None:
    frames = jnp.asarray(recorded(2.0, PAIRS), float)
    position = jnp.asarray(perturbed(PAIRS).position)
    value_and_slope = jax.jit(jax.value_and_grad(summed, (0, 1)))
    _, (by_frame, by_start) = value_and_slope(frames, position)
    assert np.isfinite(by_frame).all()
    direction = np.random.default_rng(0).normal(size=frames.shape)
    ahead, behind = (value_and_slope(frames + s * direction, position)[0] for s in (0.02, -0.02))
    slope = float((by_frame * direction).sum())
    assert slope == pytest.approx(float(ahead - behind) / 0.04, rel=1e-4)
    np.testing.assert_array_equal(by_start, np.zeros(position.shape))


def test_no_gradient_passes_through_the_iterations() -> None:
    """A gradient through the iterations runs a loop in reverse; ours runs none."""
    # Put together outside: the estimates of `observe` have a loop of their own.
    seen = jit_observe(recorded(2.0, PAIRS), noise=2.0, background=10.0)
    start = perturbed(PAIRS)

    def places(counts: jax.Array, unroll: bool) -> jax.Array:
        return refine(seen.replace(counts=counts), start, unroll=unroll).targets.position.sum()

    implicit, unrolled = (
        str(jax.make_jaxpr(jax.grad(partial(places, unroll=unroll)))(seen.counts))
        for unroll in (False, True)
    )
    assert "reverse=True" in unrolled
    assert "reverse=True" not in implicit


@pytest.mark.parametrize("num_iterations", [0, 1])
def test_row34_the_derivative_of_an_unfinished_fit_is_refused(num_iterations: int) -> None:
    """Frame 0 starts at its answer and is done at once; the others are not."""
    frames = jnp.asarray(recorded(0.0), jnp.float32)
    seen = jit_observe(frames, noise=2.0, background=10.0)
    rough = perturbed()
    position = rough.position.copy()
    intensity = rough.intensity.copy()
    position[0], intensity[0] = TRUTH.position[0], TRUTH.intensity[0]
    start = Targets(position, intensity, TRUTH.mask)

    def places(counts: jax.Array) -> tuple[jax.Array, Fit]:
        fit = refine(seen.replace(counts=counts), start, num_iterations=num_iterations)
        return fit.targets.position.sum() + fit.targets.intensity.sum(), fit

    slope, fit = jax.jit(jax.grad(places, has_aux=True))(frames)
    assert np.asarray(fit.converged).tolist() == [True, False, False, False]
    assert_no_nan(fit)
    assert np.isfinite(slope[0]).all()
    assert np.abs(slope[0]).max() > 0
    assert np.isnan(slope[1:]).any((1, 2)).all()
