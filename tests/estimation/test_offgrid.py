"""Offgrid: counts kept or told, noise measured, and the width of the PSF found."""

from functools import partial

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from dscsnet_jax.estimation.observe import Observation, observe
from dscsnet_jax.estimation.offgrid import Solved, fit_width, solve
from dscsnet_jax.estimation.posterior import sample_posterior
from dscsnet_jax.estimation.prior import ScenePrior, preset_prior
from dscsnet_jax.physics import scene
from dscsnet_jax.physics.limits import cramer_rao, information_root
from dscsnet_jax.physics.sensor import Sensor
from dscsnet_jax.physics.targets import Targets, to_lists

NOISY = scene.get_preset("csist_noise")
PRIOR = preset_prior(NOISY)
NOISE, LEVEL = 5.0, 10.0
SLOTS = 8
OPTICS = {"frame_size": 11, "sigma": 0.5}

jit_simulate = jax.jit(scene.simulate, static_argnums=0)
jit_observe = jax.jit(partial(observe, saturation=255.0))


@pytest.fixture(scope="module")
def noisy() -> tuple[Targets, np.ndarray]:
    made = jit_simulate(NOISY, scene.frame_keys(9, "val", np.arange(32)))
    return made.targets, np.asarray(made.frames)


@pytest.fixture(scope="module")
def seen(noisy: tuple[Targets, np.ndarray]) -> Observation:
    return jit_observe(noisy[1], sigma=0.5, noise=NOISE, background=LEVEL)


@pytest.fixture(scope="module")
def fitted(noisy: tuple[Targets, np.ndarray], seen: Observation) -> Solved:
    """Counts as in truth, so that errors can be compared target by target."""
    return solve(seen, noisy[0], PRIOR, max_targets=SLOTS, estimate="map", fixed_count=True)


@pytest.fixture(scope="module")
def averaged(noisy: tuple[Targets, np.ndarray], seen: Observation) -> Solved:
    return solve(seen, noisy[0], PRIOR, max_targets=SLOTS, fixed_count=True)


@pytest.fixture(scope="module")
def counted(noisy: tuple[Targets, np.ndarray], seen: Observation) -> Solved:
    return solve(seen, noisy[0], PRIOR, max_targets=SLOTS, estimate="map")


def squared_errors(answer: Solved, truth: Targets) -> np.ndarray:
    """Mean squared distance to the truth of each frame, targets paired at best."""
    errors = []
    for ours, theirs in zip(to_lists(answer.targets), to_lists(truth), strict=True):
        cost = ((ours[:, None, :2] - theirs[None, :, :2]) ** 2).sum(-1)
        errors.append(cost[linear_sum_assignment(cost)].mean())
    return np.array(errors)


def test_fixed_counts_are_kept(
    noisy: tuple[Targets, np.ndarray], fitted: Solved, averaged: Solved
) -> None:
    number = np.asarray(noisy[0].count)
    assert len(set(number.tolist())) >= 4
    for answer in (fitted, averaged):
        np.testing.assert_array_equal(answer.targets.count, number)
        certain = np.arange(SLOTS + 1) == number[:, None]
        np.testing.assert_array_equal(answer.count_probability, certain)
        assert not answer.truncated.any()
        assert (np.diff(np.asarray(answer.targets.intensity), axis=1) <= 0).all()  # brightest first


def test_the_mean_has_less_error_than_the_fit(
    noisy: tuple[Targets, np.ndarray], fitted: Solved, averaged: Solved
) -> None:
    truth = noisy[0]
    fit, mean = squared_errors(fitted, truth), squared_errors(averaged, truth)
    assert mean.mean() < fit.mean()
    assert not np.array_equal(fitted.targets.position, averaged.targets.position)
    mask = np.asarray(averaged.targets.mask)
    assert np.isinf(fitted.effective_size[mask]).all()
    assert (averaged.effective_size[mask] >= 1).all()
    assert (averaged.effective_size[mask] <= 256).all()


def test_intervals_of_the_mean_hold_the_truth(
    noisy: tuple[Targets, np.ndarray], averaged: Solved
) -> None:
    """95 % intervals of the intensities, whose prior is uniform."""
    low, high = PRIOR.intensity
    mask = np.asarray(averaged.targets.mask)
    interval = averaged.interval[mask][:, 2]
    wall = 0.02 * (high - low)
    assert (interval[:, 0] > low - wall).all()
    assert (interval[:, -1] < high + wall).all()
    # A squared distance is the sum of two variances, on average over the frames.
    variance = (averaged.std[..., :2] ** 2).sum(-1).sum(1) / mask.sum(1)
    ratio = squared_errors(averaged, noisy[0]).sum() / variance.sum()
    assert 0.5 < ratio < 1.7


def test_the_error_of_the_fit_is_the_bound_of_a_target_alone(fitted: Solved) -> None:
    alone = np.flatnonzero(np.asarray(fitted.targets.count) == 1)
    assert len(alone) >= 1
    some = jax.tree.map(lambda a: np.asarray(a)[alone, :1], fitted.targets)
    sensor = Sensor(read_noise=(NOISE**2 + 1 / 12) ** 0.5)
    low, high = PRIOR.intensity
    root = jax.jit(
        partial(
            information_root,
            sensor=sensor,
            intensity_prior_variance=(high - low) ** 2 / 12,
            **OPTICS,
        )
    )(some)
    bound = np.stack(cramer_rao(root, some.mask), -1)
    np.testing.assert_allclose(fitted.std[alone, :1], bound, rtol=1e-3)


def test_count_probabilities(noisy: tuple[Targets, np.ndarray], counted: Solved) -> None:
    share, number = counted.count_probability, np.asarray(counted.targets.count)
    assert share.shape == (32, SLOTS + 1)
    np.testing.assert_allclose(share.sum(1), 1, rtol=1e-12)
    assert (share >= 0).all()
    np.testing.assert_array_equal(share.argmax(1), number)
    clear = share.max(1) > 0.9
    right = number == np.asarray(noisy[0].count)
    assert clear.sum() >= 8
    assert right[clear].mean() > 0.8


def test_source_and_observation_belong_to_the_answer(counted: Solved, seen: Observation) -> None:
    for ours, theirs in zip(
        jax.tree.leaves(counted.observation), jax.tree.leaves(seen), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)  # noise was given
    left = counted.observation.counts - counted.source - LEVEL
    left = left[~counted.observation.saturated]
    # A root mean square of 5 counts, 32 x 121 pixels, some 9 of each used up by the fit.
    assert (left**2).mean() ** 0.5 == pytest.approx(NOISE, rel=0.08)


def test_noise_is_measured_where_no_target_is_left() -> None:
    made = jit_simulate(
        scene.get_preset("csist_noise", read_noise=2.0), scene.frame_keys(2, "val", np.arange(32))
    )
    observation = jit_observe(made.frames, sigma=0.5)
    answer = solve(
        observation,
        made.targets,
        PRIOR,
        max_targets=SLOTS,
        estimate="map",
        estimate_noise=True,
        fixed_count=True,
    )
    noise, true = answer.observation.noise, (4 + 1 / 12) ** 0.5
    assert np.median(noise) == pytest.approx(true, rel=0.05)
    assert np.abs(noise / true - 1).max() < 0.35  # 121 pixels tell 9 % (1 sigma)
    assert np.sqrt(((noise / true - 1) ** 2).mean()) < 0.15
    level = answer.observation.background
    assert np.abs(level - LEVEL).max() < 1.0
    assert (np.abs(level - LEVEL) < 4 * answer.observation.background_std).all()


def test_width_of_the_psf_is_recovered(
    noisy: tuple[Targets, np.ndarray], seen: Observation
) -> None:
    """The slow one: some 40 fits of all windows."""
    wrong = seen.replace(sigma=seen.sigma * 1.1)
    found, targets = fit_width(wrong, noisy[0], PRIOR)
    assert found.sigma.shape == (32, 2)
    # The scores of the frames by the width, at its estimate, tell its standard error.
    chains = sample_posterior(found, targets, PRIOR, width_slope=True)
    error = 1 / np.sqrt((np.asarray(chains.width_slope, float) ** 2).sum())
    assert error < 0.015
    assert np.abs(np.log(found.sigma / 0.5)).max() < 3 * error
    assert np.unique(found.sigma).size == 1
    right = np.asarray(targets.count) == np.asarray(noisy[0].count)
    assert right.mean() > 0.6


def test_no_targets_and_no_frames(seen: Observation) -> None:
    blank = jax.tree.map(np.asarray, seen)
    blank = blank.replace(counts=np.full_like(blank.counts, LEVEL))
    none = Targets(np.zeros((32, 2, 2)), np.zeros((32, 2)), np.zeros((32, 2), bool))  # type: ignore[arg-type]
    answer = solve(blank, none, PRIOR, max_targets=SLOTS)
    assert answer.targets.count.tolist() == [0] * 32
    np.testing.assert_array_equal(answer.count_probability, np.eye(SLOTS + 1)[[0] * 32])
    assert not answer.source.any()
    with pytest.raises(ValueError, match="without targets"):
        fit_width(blank, none, PRIOR)
    empty = jax.tree.map(lambda a: a[:0], (blank, none))
    assert solve(*empty, PRIOR, max_targets=SLOTS).targets.mask.shape == (0, SLOTS)


def test_an_unknown_estimate_is_refused(seen: Observation, noisy: tuple) -> None:
    with pytest.raises(ValueError, match="unknown estimate 'mode'"):
        solve(seen, noisy[0], ScenePrior(), max_targets=SLOTS, estimate="mode")
