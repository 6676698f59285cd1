"""Weak prior: what is assumed of one frame alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import gammaln

import dscsnet_jax as dj
from dscsnet_jax.inference import clustered, particles
from dscsnet_jax.inference.lanes import to_lanes
from dscsnet_jax.inference.prior import strictly_told, weak_prior
from dscsnet_jax.inference.scene_model import SceneModel, scene_model
from dscsnet_jax.physics.targets import Targets

SIDE, SIGMA = 7, 0.5
SCENES = [
    [(3.0, 2.6, 240.0)],
    [(3.0, 2.6, 240.0), (3.1, 3.4, 20.0)],
    [(2.0, 2.6, 40.0), (3.1, 3.4, 200.0), (3.3, 3.1, 90.0)],
]


def models(uniform: bool) -> tuple[SceneModel, Targets]:
    truth = dj.from_lists(SCENES, max_targets=3)
    frames = np.asarray(dj.render(truth, frame_size=SIDE, psf=SIGMA), float)
    seen = dj.observe(frames, dj.Sensor(read_noise=2.0, background=0.0))
    known = dj.Known(dj.Gaussian(SIGMA), prior=weak_prior(dj.ScenePrior()))
    seen, truth = jax.tree.map(
        lambda a: jnp.asarray(a, float) if a.dtype != bool else a, (seen, truth)
    )
    seen, truth = to_lanes((seen, truth))
    return scene_model(seen, truth.mask, known, uniform=uniform), truth


def expected_density(scene: list[tuple[float, float, float]], light: float) -> float:
    """Log prior density of rows, cols and intensities of unordered targets, and of `t = 0`."""
    place, intensity = np.array(scene)[:, :2], np.array(scene)[:, 2]
    number = len(scene)
    alike = dj.Alike()
    covariance = alike.log_std**2 * np.eye(number) + alike.scale_log_std**2
    law = stats.multivariate_normal(np.full(number, np.log(light / number)), covariance)
    total = law.logpdf(np.log(intensity)) - np.log(intensity).sum()
    off2 = ((place - place.mean(0)) ** 2).sum()
    near = gammaln(number) - (number - 1) * np.log(2 * np.pi * SIGMA**2)
    near -= number * np.log1p(off2 / (2 * SIGMA**2)) + np.log(number)
    for one, other in itertools.combinations(place, 2):
        near -= (max(1 - np.hypot(*(one - other)) / SIGMA, 0) / 0.3) ** 2 / 2
        near -= np.log1p(-0.0943)
    total += near - np.log(SIDE**2) + gammaln(number + 1)
    return total + stats.poisson(3.0).logpmf(number) - np.log(2 * np.pi) / 2


@pytest.mark.parametrize("uniform", [False, True], ids=["fit", "chains"])
def test_fit_and_chains_have_the_density_that_is_written_down(x64: None, uniform: bool) -> None:
    model, truth = models(uniform)
    theta = model.pack(truth)
    density = model.log_prior(theta) + model.log_normalisation(theta)
    slope = jnp.where(truth.mask, model.intensity_slope(theta[2:-1:3]), 1)
    got = np.asarray(density - jnp.log(slope).sum(0))
    right = [expected_density(s, float(b)) for s, b in zip(SCENES, model.scale, strict=True)]
    np.testing.assert_allclose(got, right, rtol=1e-9)


@pytest.mark.parametrize("uniform", [False, True], ids=["fit", "chains"])
def test_derivatives_are_those_of_the_density(x64: None, uniform: bool) -> None:
    model, truth = models(uniform)
    theta = model.pack(truth) + 0.01
    terms = model.prior_terms(theta)
    np.testing.assert_allclose(terms.cost.sum(0), -model.log_prior(theta), rtol=1e-12)
    by_theta = -jax.grad(lambda t: model.log_prior(t).sum())(theta)
    np.testing.assert_allclose(terms.gradient, by_theta, rtol=1e-9, atol=1e-9)
    lowest = np.linalg.eigvalsh(np.moveaxis(np.asarray(terms.information), -1, 0))[:, 0]
    assert (lowest > -1e-9 * np.abs(np.asarray(terms.information)).max()).all()


def test_whitened_latents_are_independent(x64: None) -> None:
    alike, mask = dj.Alike(0.5, 1.5), jnp.array([True, False, True, True])[:, None]
    white = jnp.asarray(np.random.default_rng(0).standard_normal((4, 1)))
    latent = alike.unwhitened(white, mask)
    np.testing.assert_allclose(
        alike.whitened(latent, mask)[mask[:, 0]], white[mask[:, 0]], rtol=1e-12
    )
    present = np.asarray(mask[:, 0], float)
    root = np.stack([np.asarray(alike.whitened(e[:, None], mask))[:, 0] for e in jnp.eye(4)], 1)
    covariance = (0.5**2 * np.diag(present) + 1.5**2 * np.outer(present, present)) / 0.5**2
    np.testing.assert_allclose(root @ covariance @ root.T, np.diag(present), atol=1e-12)
    assert float(alike.determinant(mask)[0]) == pytest.approx(
        np.linalg.det(root + np.diag(1 - present))
    )


@pytest.mark.parametrize("number", [2, 3])
def test_places_are_normalised(x64: None, number: int) -> None:
    rng, draws = np.random.default_rng(1), 200_000
    u = jnp.asarray(rng.uniform(size=(2 * number + 1, draws, 1)))
    mask = jnp.ones((number, 1, 1), bool)
    place = np.asarray(clustered.drawn(jnp.zeros((2, 1, draws, 1)), mask, SIGMA, u))[..., 0]
    np.testing.assert_allclose(place.mean(1), 0, atol=1e-12)
    # The squared radius of 2 (n - 1) contrasts of a t density has an F law.
    square = (place**2).sum((0, 1)) / SIGMA**2 / (2 * (number - 1))
    assert stats.kstest(square, stats.f(2 * (number - 1), 2).cdf).pvalue > 1e-4
    apart = np.hypot(*(place[:, 0] - place[:, 1]))
    kept = np.exp(
        -(np.asarray(clustered.too_close(jnp.asarray(apart), jnp.asarray(SIGMA))) ** 2) / 2
    )
    error = kept.std() / draws**0.5
    assert abs(kept.mean() - np.exp(float(clustered.log_share(jnp.array(2))))) < 4 * error
    # The density, by the share of draws within a small radius of all contrasts.
    cost = clustered.terms(*jnp.zeros((2, number, 1)), mask[..., 0], jnp.asarray(SIGMA)).cost
    assert float(cost[0]) == 0
    peak = float(clustered.log_scale(jnp.array(float(number)), jnp.asarray(SIGMA)))
    small, size = 0.2, number - 1
    volume = np.pi**size * (small * SIGMA) ** (2 * size) / np.exp(gammaln(size + 1))
    inside = (square * 2 * size < small**2).mean()
    expected = np.exp(peak) * number * volume  # in contrasts the mean's volume is `1 / n`
    mean_fall = stats.f(2 * size, 2).cdf(small**2 / (2 * size)) / expected
    assert 0.9 < mean_fall <= 1.0
    assert abs(inside - mean_fall * expected) < 4 * (inside / draws) ** 0.5


def test_particles_are_drawn_from_it(x64: None) -> None:
    model, _ = models(True)
    seen = jax.tree.map(lambda a: a[..., None, :], (model.seen, model.mask))
    model = scene_model(*seen, model.known, uniform=True)
    keys = jax.random.split(jax.random.key(0), 3)

    def draws(number: int, index: int, shape: tuple[int, ...]) -> jax.Array:
        return particles.draws_of(keys, number, index, shape, jnp.float64)

    theta, weight = particles.from_prior(model, draws, 4000)
    np.testing.assert_allclose(weight, model.log_distances(theta), atol=1e-12)
    alike = dj.Alike()
    for window, number in enumerate((1, 2, 3)):
        share = np.asarray(theta[2:-1:3, :, window])[:number]
        relative = np.log(share * number)
        whole = np.sqrt(alike.log_std**2 / number + alike.scale_log_std**2)
        assert stats.kstest(relative.mean(0), stats.norm(scale=whole).cdf).pvalue > 1e-4
        if number > 1:
            apart = (relative[0] - relative[1]) / (2**0.5 * alike.log_std)
            assert stats.kstest(apart, stats.norm.cdf).pvalue > 1e-4


def test_is_assumed_only_where_no_intensity_is_told() -> None:
    nothing = dj.ScenePrior()
    weak = weak_prior(nothing)
    assert (weak.intensity, weak.count, weak.spread) == (dj.Alike(), dj.Poisson(3.0), 1.0)
    for told in (dj.scene_prior(intensity=(1, 2)), dj.scene_prior(intensity=dj.AnyIntensity())):
        assert weak_prior(told) == told
    square = weak_prior(dj.scene_prior(cluster_size=2.0, count=(0.5, 0.5)))
    assert (square.spread, square.count) == (None, (0.5, 0.5))
    assert weak_prior(dj.scene_prior(separation=0.5)).spread is None
    assert strictly_told(weak) == nothing
    none = dj.Known(0.5, prior=dj.scene_prior(intensity=dj.AnyIntensity()))
    assert none.with_weak_prior().for_windows().prior.intensity is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: dj.scene_prior(intensity=dj.Alike(0.0)),
        lambda: dj.scene_prior(intensity=dj.Alike(0.5, -1.0)),
        lambda: dj.scene_prior(count=dj.Poisson(0.0)),
        lambda: dj.scene_prior(spread=-1.0),
        lambda: dj.scene_prior(spread=1.0, separation=0.5),
        lambda: dj.scene_prior(spread=1.0, cluster_size=1.5),
    ],
)
def test_what_cannot_be_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match=r"log_std|count|spread"):
        wrong()


def test_files_hold_it(tmp_path) -> None:
    told = dj.scene_prior(intensity=dj.Alike(0.4, 1.0), spread=1.5, count=dj.Poisson(2.0))
    dj.Known(0.5, prior=told).to_json(tmp_path / "weak.json")
    assert dj.Known.from_json(tmp_path / "weak.json").prior == told
    none = dj.scene_prior(intensity=dj.AnyIntensity())
    dj.Known(0.5, prior=none).to_json(tmp_path / "none.json")
    assert dj.Known.from_json(tmp_path / "none.json").prior == none


# --- answers -----------------------------------------------------------------------


def counts(frames: np.ndarray) -> np.ndarray:
    return np.asarray(dj.unmix(frames, estimate="map").targets.count)


def rendered(scenes: list, noise: float, rng: np.random.Generator) -> np.ndarray:
    y = np.asarray(dj.render(dj.from_lists(scenes), frame_size=11, psf=SIGMA))
    return y + rng.normal(0, noise, y.shape)


def test_a_faint_neighbour_is_found() -> None:
    rng, number = np.random.default_rng(5), 200
    scenes = []
    for _ in range(number):
        place, angle = rng.uniform(4.5, 5.5, 2), rng.uniform(0, 2 * np.pi)
        off = 1.2 * np.array([np.cos(angle), np.sin(angle)])
        scenes.append([(*place, 200.0), (*(place + off), 20.0)])
    answer = dj.unmix(rendered(scenes, 1.0, rng), estimate="map")
    place = np.asarray(answer.targets.position)
    faint = np.array([scene[1][:2] for scene in scenes])
    off = np.hypot(*np.moveaxis(place - faint[:, None], -1, 0))
    assert (np.asarray(answer.targets.count) >= 2).mean() >= 0.95
    # It is drawn to its neighbour, and made brighter: half of them are this near.
    assert np.median(np.where(answer.targets.mask, off, np.inf).min(1)) < 0.4


def test_frames_without_targets_stay_so() -> None:
    frames = 7 + np.random.default_rng(5).normal(0, 2, (500, 11, 11))
    assert (counts(frames) > 0).mean() <= 0.02


def test_a_bright_target_stays_one() -> None:
    """Evidence cannot tell many targets on one spot from one: only the prior can."""
    rng = np.random.default_rng(6)
    scenes = [[(*rng.uniform(4.5, 5.5, 2), 200.0)] for _ in range(100)]
    assert (counts(rendered(scenes, 0.3, rng)) == 1).mean() >= 0.98
    found = counts(rendered(scenes, 2.0, rng))
    assert (found == 1).mean() >= 0.9
    assert found.max() <= 4


def test_counts_of_faint_clusters_have_an_end() -> None:
    preset = dj.get_preset("csist_float", read_noise=5.0)
    frames = dj.simulate(preset, dj.frame_keys(3, "val", np.arange(100))).frames
    assert counts(np.asarray(frames)).max() <= 8
