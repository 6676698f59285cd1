"""Posterior: moments against theory, hard limits, labels, and frames that stand alone."""

from functools import partial

import jax
import numpy as np
import pytest
from scipy.stats import truncnorm

from dscsnet_jax.estimation.observe import Observation, observe
from dscsnet_jax.estimation.posterior import Posterior, sample_posterior
from dscsnet_jax.estimation.prior import ScenePrior
from dscsnet_jax.estimation.refine import refine_frames
from dscsnet_jax.physics.limits import cramer_rao, information_root
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.sensor import Sensor
from dscsnet_jax.physics.targets import Targets, from_lists

NOISE = 4.0
SLOTS = 2
SAMPLES = 4 * 64  # chains times rounds that are kept
OPTICS = {"frame_size": 11, "sigma": 0.5}

ALONE = slice(0, 4)
APART = slice(4, 8)  # pairs that Fisher information describes
CLOSE, BLEND, EMPTY = 8, 9, 10
SCENES = [
    [(5.0, 5.0, 240.0)],
    [(4.8, 6.3, 150.0)],
    [(3.3, 3.6, 300.0)],
    [(6.5, 4.5, 240.0)],
    [(5.0, 4.0, 240.0), (5.0, 6.1, 240.0)],
    [(4.0, 5.1, 200.0), (6.0, 5.1, 250.0)],
    [(4.2, 4.2, 200.0), (5.8, 5.6, 200.0)],
    [(3.5, 6.5, 245.0), (7.6, 4.0, 240.0)],
    [(5.0, 4.7, 240.0), (5.0, 5.3, 240.0)],
    [(5.0, 5.0, 240.0), (5.05, 5.0, 240.0)],
    [],
]
TRUTH = from_lists(SCENES, SLOTS)
SWAPPED = Targets(TRUTH.position[:, ::-1], TRUTH.intensity[:, ::-1], TRUTH.mask[:, ::-1])
# One structure for all priors of this file: the chains are compiled once.
LIMITED = ScenePrior(intensity=(235.0, 250.0), separation=0.9, extent=4.0)
# And one set of options.
sample = partial(sample_posterior, width_slope=True)


@pytest.fixture(scope="module")
def seen() -> Observation:
    """Frames without noise, whose posterior is centred at the truth."""
    made = jax.jit(lambda t: observe(render(t, **OPTICS), sigma=0.5, noise=NOISE, background=0.0))
    return jax.tree.map(np.asarray, made(TRUTH))


@pytest.fixture(scope="module")
def free(seen: Observation) -> Posterior:
    return sample(seen, TRUTH)


@pytest.fixture(scope="module")
def limited(seen: Observation) -> Posterior:
    return sample(seen, TRUTH, LIMITED)


@pytest.fixture(scope="module")
def bounds() -> np.ndarray:
    """(B, K, 3) Cramer-Rao bounds."""

    @jax.jit
    def of(truth: Targets) -> tuple:
        root = information_root(truth, sensor=Sensor(read_noise=NOISE), **OPTICS)
        return cramer_rao(root, truth.mask)

    return np.stack(of(TRUTH), -1)


def table(targets: Targets) -> np.ndarray:
    return np.concatenate([targets.position, np.asarray(targets.intensity)[..., None]], -1)


def assert_same(a: Posterior, b: Posterior) -> None:
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("frames", [ALONE, APART], ids=["alone", "pairs"])
def test_mean_and_std_are_those_of_the_fisher_information(
    free: Posterior, bounds: np.ndarray, frames: slice
) -> None:
    mask = TRUTH.mask[frames]
    off = (table(free.targets) - table(TRUTH))[frames][mask] / bounds[frames][mask]
    # At least a fifth of the samples are independent.
    effective = free.effective_size[frames]
    assert (effective > SAMPLES / 20).all()
    assert np.abs(off).max() < 4 / (SAMPLES / 5) ** 0.5
    assert (off**2).mean() < 2 / (SAMPLES / 5)
    ratio = free.std[frames][mask] / bounds[frames][mask]
    assert np.abs(ratio - 1).max() < 3 / (2 * SAMPLES / 5) ** 0.5
    assert np.abs(ratio.mean() - 1) < 1 / (2 * SAMPLES / 5) ** 0.5
    assert free.mixed[frames].all()
    assert (free.acceptance[frames] > 0.15).all()
    assert (free.acceptance[frames] < 0.4).all()


def test_the_interval_of_a_gaussian_is_that_of_its_std(free: Posterior) -> None:
    centre, std = table(free.targets)[ALONE, 0], free.std[ALONE, 0]
    scaled = (free.interval[ALONE, 0] - centre[..., None]) / std[..., None]
    expected = np.broadcast_to([-2.0, -1.0, 1.0, 2.0], scaled.shape)
    np.testing.assert_allclose(scaled.mean((0, 1)), expected[0, 0], atol=0.3)
    assert (np.diff(free.interval[TRUTH.mask], axis=-1) > 0).all()


def test_covariance_belongs_to_std(free: Posterior) -> None:
    variance = np.diagonal(free.covariance, axis1=-2, axis2=-1)
    np.testing.assert_allclose(variance, free.std.reshape(len(SCENES), -1) ** 2, rtol=1e-5)
    np.testing.assert_array_equal(free.covariance, np.swapaxes(free.covariance, -1, -2))


def test_empty_slots_stay_zero(free: Posterior, limited: Posterior) -> None:
    assert (~TRUTH.mask).sum() == 6
    for answer in (free, limited):
        np.testing.assert_array_equal(answer.targets.mask, TRUTH.mask)
        for value in (answer.targets.intensity, answer.std, answer.interval):
            assert not np.asarray(value)[~TRUTH.mask].any()
            assert np.isfinite(value).all()
        assert answer.mixed[EMPTY]


def test_a_range_of_intensities_cuts_the_posterior_off(
    limited: Posterior, free: Posterior, bounds: np.ndarray
) -> None:
    """A target alone at 240 counts +- 8 within 235 .. 250: a Gaussian cut off at both."""
    low, high = LIMITED.intensity
    std = bounds[0, 0, 2]
    assert std > 5
    cut = truncnorm((low - 240) / std, (high - 240) / std, loc=240, scale=std)
    got = limited.interval[0, 0, 2]
    wall = 0.02 * (high - low)  # twice the softness
    assert got[0] > low - wall
    assert got[-1] < high + wall
    np.testing.assert_allclose(got, cut.ppf([0.0228, 0.1587, 0.8413, 0.9772]), atol=1.5)
    error = cut.std() / (SAMPLES / 5) ** 0.5
    assert abs(float(limited.targets.intensity[0, 0]) - cut.mean()) < 4 * error
    assert limited.std[0, 0, 2] == pytest.approx(cut.std(), rel=0.2)
    assert free.interval[0, 0, 2, 0] < low
    assert free.interval[0, 0, 2, -1] > high


def test_a_start_outside_the_range_finds_its_way_in(limited: Posterior) -> None:
    low, high = LIMITED.intensity
    for frame in (1, 2):  # of 150 and of 300 counts
        mean = float(limited.targets.intensity[frame, 0])
        assert low - 1 < mean < high + 1


def mean_square_distance(answer: Posterior, frame: int) -> np.ndarray:
    """(2,) mean over the samples of the squared distance of a pair along row and col."""
    apart = answer.targets.position[frame, 0] - answer.targets.position[frame, 1]
    c = answer.covariance[frame].reshape(2, 3, 2, 3)
    spread = [c[0, i, 0, i] + c[1, i, 1, i] - 2 * c[0, i, 1, i] for i in (0, 1)]
    return apart**2 + np.array(spread)


def test_separation_and_extent_hold(limited: Posterior, free: Posterior) -> None:
    """Of all samples, so of their mean square; the walls are 0.005 pixels soft."""
    near, far = 0.9, 4.0
    # The error of a mean square distance: of the distance's spread, by the samples' worth.
    spread = np.sqrt((free.std[CLOSE, :, :2] ** 2).sum())
    error = spread / np.sqrt(free.effective_size[CLOSE])
    assert mean_square_distance(free, CLOSE).sum() ** 0.5 + 2 * error < near - 0.01
    assert mean_square_distance(limited, CLOSE).sum() ** 0.5 > near - 0.01
    wide = 7
    assert mean_square_distance(free, wide).max() ** 0.5 > far + 0.05
    assert mean_square_distance(limited, wide).max() ** 0.5 < far + 0.01


def test_exchanged_targets_are_the_same_targets(
    seen: Observation, free: Posterior, bounds: np.ndarray
) -> None:
    """Turns by half a circle exchange equal targets: that must not blur their places."""
    other = sample(seen, SWAPPED)
    frames = [4, 5, 6, 7]
    np.testing.assert_array_equal(other.targets.mask, SWAPPED.mask)
    off = table(other.targets)[frames, ::-1] - table(free.targets)[frames]
    assert np.abs(off / bounds[frames]).max() < 4 * (2 / (SAMPLES / 5)) ** 0.5
    assert np.abs(off).max() > 0  # other chains


def test_width_slope_is_that_of_the_evidence(seen: Observation) -> None:
    """Where the posterior is Gaussian, Laplace's evidence has no error; the PSF is too narrow."""

    def evidence(factor: float) -> np.ndarray:
        wide = seen.replace(sigma=np.float32(factor) * seen.sigma)
        fit = refine_frames(wide, TRUTH, ScenePrior())
        return -np.float64(fit.cost + fit.log_determinant / 2)

    expected = (evidence(0.92) - evidence(0.88)) / np.log(0.92 / 0.88)
    slope = sample(seen.replace(sigma=np.float32(0.9) * seen.sigma), TRUTH).width_slope
    gaussian = slice(ALONE.start, APART.stop)
    assert expected[gaussian].max() > 100
    np.testing.assert_allclose(slope[gaussian], expected[gaussian], rtol=0.1, atol=5)


def test_seeds(seen: Observation, free: Posterior) -> None:
    assert_same(sample(seen, TRUTH), free)
    other = sample(seen, TRUTH, seed=1)
    off = (table(other.targets) - table(free.targets))[:8][TRUTH.mask[:8]]
    error = free.std[:8][TRUTH.mask[:8]] * (2 / (SAMPLES / 5)) ** 0.5
    assert np.abs(off / error).max() < 4
    assert (off != 0).all()


def test_frames_do_not_depend_on_each_other(seen: Observation, free: Posterior) -> None:
    order = np.array([9, 3, 4])
    some = partial(jax.tree.map, lambda a: np.asarray(a)[order])
    assert_same(sample(some(seen), some(TRUTH)), some(free))


def test_row13_what_cannot_be_told_apart_has_large_errors(free: Posterior) -> None:
    assert not free.mixed[BLEND] or free.std[BLEND, :, :2].max() > 0.1
    assert free.std[BLEND, :, 2].min() > 5 * free.std[0, 0, 2]


@pytest.mark.parametrize(
    "wrong", [{"num_chains": 1}, {"num_samples": 1}, {"num_burn_in": 0}, {"thinning": 0}]
)
def test_too_few_chains_or_steps_are_refused(seen: Observation, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 2 chains"):
        sample(seen, TRUTH, **wrong)
