"""Chains against true posteriors, and each window's own stream."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from dscsnet_jax.inference.chains import NUM_SAMPLES
from dscsnet_jax.inference.fit import fit
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import Observation, observe
from dscsnet_jax.inference.prior import preset_prior, scene_prior
from dscsnet_jax.inference.sampler import sample
from dscsnet_jax.inference.summary import (
    ENOUGH_SAMPLES,
    RADII,
    Posterior,
    is_numbered,
    numbered,
)
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.scene import frame_keys, get_preset, simulate
from dscsnet_jax.physics.targets import Targets, from_lists

pytestmark = pytest.mark.slow

SIDE = 7


def single(targets: Targets) -> Targets:
    return Targets(
        *(
            jnp.asarray(a)
            for a in (targets.position.astype("f"), targets.intensity.astype("f"), targets.mask)
        )
    )


@jax.jit
def posterior(seen: Observation, start: Targets, known: Known, seed: int) -> Posterior:
    return sample(seen, fit(seen, start, known).targets, known, jax.random.key(seed))


@jax.jit
def posterior_of_long_chains(
    seen: Observation, start: Targets, known: Known, seed: int
) -> Posterior:
    places, key = fit(seen, start, known).targets, jax.random.key(seed)
    return sample(seen, places, known, key, num_samples=10 * NUM_SAMPLES)


def fixture(data_dir, name: str, most: int):
    """Windows, true targets, what is known, and the mean and std of tempered chains."""
    data = np.load(data_dir / "posterior" / f"{name}.npz")
    chosen = np.flatnonzero(data["count"] <= most)
    tables, frames, means, stds = [], [], [], []
    for i in chosen:
        n = int(data["count"][i])
        corner = np.clip(np.round(data["true_position"][i, :n].mean(0)) - SIDE // 2, 0, 4)
        row, col = corner.astype(int)
        frames.append(data["frames"][i, row : row + SIDE, col : col + SIDE])
        place = data["true_position"][i, :n] - corner
        tables.append(np.column_stack([place, data["true_intensity"][i, :n]]))
        means.append(data["mean"][i, :n] - [row, col, 0])
        stds.append(data["std"][i, :n])
    prior = scene_prior(
        intensity=tuple(data["intensity"]), separation=0.5, cluster_size=1.0, cluster_offset=-0.4
    )
    seen = observe(np.array(frames, "f"), Sensor(read_noise=float(data["noise"]), background=0.0))
    known = Known(psf=Gaussian(np.float32(0.5)), prior=prior)
    return seen, single(from_lists(tables, most)), known, means, stds


def pulls(answer: Posterior, means, stds) -> tuple[np.ndarray, np.ndarray]:
    """(mean - true mean) / std of every position, and log ratios of the std, best paired."""
    off, ratio = [], []
    for i, (mean, std) in enumerate(zip(means, stds, strict=True)):
        place = np.asarray(answer.targets.position[i])[: len(mean)]
        apart = (mean[:, None, :2] - place[None]) / std[:, None, :2]
        pairs = linear_sum_assignment((apart**2).sum(-1))[1]
        off.append((place[pairs] - mean[:, :2]) / std[:, :2])
        ratio.append(np.log(np.asarray(answer.std[i])[pairs, :2] / std[:, :2]))
    return np.concatenate(off), np.concatenate(ratio)


def allowed(answer: Posterior, means) -> np.ndarray:
    """What the means of so many samples may be off, in std, for each target's place."""
    effective = np.asarray(answer.effective_sample_size)
    return np.repeat(0.15 + 2 / np.sqrt(effective), [len(mean) for mean in means])[:, None]


def assert_true(answer: Posterior, means, stds, spread: float, num_errors: float = 0.0) -> None:
    """Means of 95 % and spreads, to such a factor, of 90 % of the targets are the true ones.

    At most so many standard errors of such a share below.
    """
    off, ratio = pulls(answer, means, stds)
    for fine, share in (
        (np.abs(off) < allowed(answer, means), 0.95),
        (np.abs(ratio) < np.log(spread), 0.9),
    ):
        assert fine.mean() >= share - num_errors * (share * (1 - share) / len(fine)) ** 0.5


@pytest.mark.parametrize("name", ["std1", "std2"])
def test_means_and_spreads_are_those_of_the_true_posterior(data_dir, name):
    seen, start, known, means, stds = fixture(data_dir, name, 3)
    answer = posterior(seen, start, known, 0)
    assert_true(answer, means, stds, 1.25)
    assert np.asarray(answer.converged).mean() >= 0.95


@pytest.mark.parametrize("name", ["std1", "std2", "std5"])
def test_long_chains_have_the_true_posterior(data_dir, name):
    """Ten times as many samples: what is left is mostly the reference's own error.

    At noise 5 which targets are off is left to the random numbers, and so to rounding.
    """
    seen, start, known, means, stds = fixture(data_dir, name, 3)
    answer = posterior_of_long_chains(seen, start, known, 0)
    assert_true(answer, means, stds, 1.15, num_errors=2.0 if name == "std5" else 0.0)


def test_chains_that_have_not_been_everywhere_do_not_agree():
    """Five targets in what noise 10 leaves of a pixel: not all windows' chains come around."""
    preset = get_preset("csist_float", read_noise=10.0, count_mean=5.0, count_std=0.0)
    scene = simulate(preset, frame_keys(0, "val", np.arange(96)))
    seen = observe(scene.frames, Sensor(read_noise=10.0, background=0.0))
    known = Known(psf=Gaussian(np.float32(0.5)), prior=preset_prior(preset))
    answer = posterior(seen, scene.targets, known, 0)
    converged = np.asarray(answer.converged)
    assert 0.2 < converged.mean() < 0.8
    # Those that do not agree tell another mean with other numbers, and more so.
    again = posterior(seen, scene.targets, known, 1)
    off = answer.targets.position - again.targets.position
    off = np.asarray(jnp.sqrt((off**2).mean((1, 2))))
    assert off[~converged].mean() > 1.3 * off[converged].mean()


@pytest.fixture(scope="module")
def pairs():
    """256 windows of two targets each, noise 1."""
    rng = np.random.default_rng(3)
    place = 3 + rng.uniform(-0.4, 0.6, (256, 1, 2)) + np.array([[[-0.4, 0.0], [0.4, 0.0]]])
    energy = rng.uniform(220, 250, (256, 2, 1))
    truth = single(from_lists(list(np.concatenate([place, energy], -1))))
    y = render(truth, frame_size=SIDE, psf=0.5)
    y = y + jax.random.normal(jax.random.key(1), y.shape)
    prior = scene_prior(intensity=(220, 250))
    known = Known(psf=Gaussian(np.float32(0.5)), prior=prior)
    return observe(y, Sensor(read_noise=1.0, background=0.0)), truth, known


def test_errors_of_the_means_average_out(pairs):
    # One stream for all windows gave 0.06 here.
    seen, truth, known = pairs
    answer = posterior(seen, truth, known, 0)
    again = posterior(seen, truth, known, 7)
    pull = (answer.targets.position - again.targets.position) / answer.std[..., :2]
    pull = np.asarray(pull).reshape(256, -1).mean(1) / 2**0.5
    assert abs(pull.mean()) < 3 * pull.std(ddof=1) / 16
    assert pull.std() > 0.01


def test_coverage(pairs):
    seen, truth, known = pairs
    answer = posterior(seen, truth, known, 0)
    error = np.abs(answer.targets.position - truth.position) / answer.std[..., :2]
    inside = np.asarray(error < 1).mean((1, 2))
    assert abs(inside.mean() - 0.6827) < 3 * inside.std(ddof=1) / 16


def test_a_window_has_its_answer_wherever_it_stands(pairs):
    seen, truth, known = pairs
    answer = posterior(seen, truth, known, 0)
    turned = posterior(*jax.tree.map(lambda a: a[::-1], (seen, truth)), known, 0)
    for one, other in zip(jax.tree.leaves(answer), jax.tree.leaves(turned), strict=True):
        np.testing.assert_array_equal(one, other[::-1])


def test_streams_differ(pairs):
    seen, truth, known = pairs
    one = jax.tree.map(lambda a: jnp.repeat(a[:1], 256, 0), (seen, truth))
    same = posterior(*one, known, 0).targets.position
    np.testing.assert_array_equal(same, jnp.broadcast_to(same[:1], same.shape))
    # A change of one count in a corner, far from the targets, changes the numbers drawn.
    moved = one[0].replace(counts=one[0].counts.at[1:, 0, 0].add(1e-3 * jnp.arange(1.0, 256)))
    other = np.asarray(posterior(moved, one[1], known, 0).targets.position[:, 0])
    assert len(np.unique(other, axis=0)) == 256  # one number alone may round to the same


def test_known_exactly(pairs):
    seen, truth, _ = pairs
    known = Known(psf=Gaussian(np.float32(0.5)), prior=scene_prior(intensity=(230, 230)))
    answer = posterior(seen, truth, known, 0)
    np.testing.assert_allclose(answer.targets.intensity, 230, rtol=1e-6)
    np.testing.assert_allclose(answer.std[..., 2], 0, atol=1e-3)
    assert np.isfinite(answer.std).all()


def test_numbering_is_that_of_the_fit():
    fitted = jnp.array([0.0, 0, 1, 2, 0, 1, 0, 2, 1, 0])
    mask = jnp.ones(3, bool)
    mixed = jnp.array([0.1, 2, 5, 0, 0.1, 6, 2.1, 0, 7, 0.5])
    assert not is_numbered(mixed, fitted, mask)
    found = numbered(mixed, fitted, mask)
    np.testing.assert_allclose(found, [0, 0.1, 6, 2.1, 0, 7, 0.1, 2, 5, 0.5], rtol=1e-6)
    assert is_numbered(found, fitted, mask)


def test_steps_keep_their_length_where_chains_begin_out_of_order():
    """Of many faint targets some chains begin numbered unlike the fit, with no density at all."""
    places = np.random.default_rng(0).uniform(2.5, 3.5, (32, 6, 2))
    faint = single(from_lists([[(row, col, 5.0) for row, col in rows] for rows in places]))
    seen = observe(np.zeros((32, 7, 7), "f"), Sensor(read_noise=5.0, background=0.0))
    known = Known(psf=Gaussian(np.float32(0.5)), prior=scene_prior(intensity=(0, 10)))
    draw = jax.jit(lambda seen, start: sample(seen, start, known, jax.random.key(0), thinning=2))
    acceptance = np.asarray(draw(seen, faint).acceptance)
    assert (acceptance > 0.05).all()  # NaN is not


def test_chains_that_agree_with_few_samples_go_on(pairs):
    answer = posterior(*pairs, 0)
    assert answer.settled.any()
    few = answer.replace(effective_sample_size=jnp.full_like(answer.rhat, ENOUGH_SAMPLES - 1))
    assert not few.settled.any()
    apart = answer.replace(converged=~answer.converged)
    assert not (answer.settled & apart.settled).any()


def test_too_few_chains_are_refused(pairs):
    seen, truth, known = pairs
    with pytest.raises(ValueError, match="at least 2 chains"):
        sample(seen, truth, known, jax.random.key(0), num_chains=1)


def test_spread_between_limits():
    """Pairs whose intensities go together and end at limits, against importance sampling.

    Steps mirrored at the limits, parameter by parameter, made them 10 % too wide.
    """
    rng = np.random.default_rng(6)
    low, high, noise, number = 150.0, 250.0, 5.0, 40_000

    def images(table: np.ndarray) -> np.ndarray:
        mask = np.ones(table.shape[:2], bool)
        return np.asarray(
            render(single(Targets(table[..., :2], table[..., 2], mask)), frame_size=SIDE, psf=0.5)
        )

    truth = np.array([[3.0, 2.5, 0], [3.0, 3.5, 0]]) + np.zeros((24, 1, 1))
    truth[:, :, 2] = rng.uniform(low + 10, high - 10, (24, 2))
    y = images(truth) + rng.normal(0, noise, (24, SIDE, SIDE))
    seen = observe(y.astype("f"), Sensor(read_noise=noise, background=0.0))
    start = single(Targets(truth[..., :2], truth[..., 2], np.ones((24, 2), bool)))
    known = Known(psf=Gaussian(np.float32(0.5)), prior=scene_prior(intensity=(low, high)))
    answer = posterior(seen, start, known, 0)
    exact = np.zeros((24, 2))
    for i, frame in enumerate(y):
        place, intensity = answer.targets.position[i], answer.targets.intensity[i]
        centre = np.concatenate([place, intensity[:, None]], 1).ravel()
        root = 1.2 * np.linalg.cholesky(np.asarray(answer.covariance[i], float))
        z = rng.normal(size=(number, 6))
        table = (centre + z @ root.T).reshape(number, 2, 3)
        misfit = ((images(table) - frame) ** 2).sum((1, 2)) / noise**2
        inside = ((table[..., 2] > low) & (table[..., 2] < high)).all(1)
        weight = np.where(inside, np.exp(((z**2).sum(1) - misfit + misfit.min()) / 2), 0)
        weight = weight / weight.sum()
        assert 1 / (weight**2).sum() > 300
        mean = weight @ table[..., 2]
        exact[i] = np.sqrt(weight @ (table[..., 2] - mean) ** 2)
    ratio = np.asarray(answer.std)[..., 2] / exact
    error = ratio.std() / np.sqrt(ratio.size)
    assert error < 0.02
    assert abs(ratio.mean() - 1) < 3 * error + 0.01  # the error of the mean of so few samples


def test_confidence_is_the_share_of_radii_that_hold_a_sampled_target(pairs):
    """Around the mean, any target of a sample counts."""
    seen, truth, known = pairs
    some = jax.tree.map(lambda a: a[:32], (seen, truth))
    answer = jax.jit(sample, static_argnames="keep_samples")(
        *some, known, jax.random.key(0), keep_samples=True
    )
    place = np.asarray(answer.samples)[..., :2]
    centre = np.asarray(answer.targets.position)
    apart = np.linalg.norm(place[:, :, None] - centre[:, None, :, None], axis=-1)  # (B, S, K, K')
    mask = np.asarray(answer.targets.mask)
    nearest = np.where(mask[:, None, None], apart, np.inf).min(-1)
    expected = np.mean([(nearest <= r).mean(1) for r in RADII], 0) * mask
    np.testing.assert_allclose(answer.confidence, expected, atol=2 / place.shape[1])
    assert 0.3 < answer.confidence[mask].mean() < 1
