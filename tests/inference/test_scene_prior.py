"""Prior: densities of intensities, values of the presets, refused arguments."""

import dataclasses
import math
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dscsnet_jax.inference.intensity import Histogram, IntensityPrior, LogNormal, Uniform
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.prior import (
    ScenePrior,
    least_energy,
    preset_prior,
    scene_prior,
)
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.scene import (
    ClusterModel,
    frame_keys,
    get_preset,
    sample_targets,
    simulate,
)
from dscsnet_jax.physics.targets import Targets

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# Standard errors of a Monte Carlo share that a right one may be off.
DEVIATIONS = 4.0

EDGES, SHARE = np.array([50.0, 100.0, 160.0, 300.0, 310.0]), np.array([0.3, 0.0, 0.5, 0.2])
DENSITIES: dict[str, tuple[IntensityPrior, Any]] = {
    "uniform": (Uniform(100.0, 300.0), stats.uniform(100, 200)),
    "log-normal": (LogNormal(5.0, 0.4), stats.lognorm(0.4, scale=math.exp(5.0))),
    # With an empty bin.
    "histogram": (Histogram(EDGES, SHARE), stats.rv_histogram((SHARE, EDGES), density=False)),
}
LATENT = np.linspace(-3.9, 3.9, 79)  # not on the border of a bin


@pytest.fixture(params=DENSITIES)
def density(request: pytest.FixtureRequest) -> tuple[IntensityPrior, Any]:
    return DENSITIES[request.param]


# --- densities of intensities ------------------------------------------------------


def test_quantiles_are_those_of_scipy(x64: None, density: tuple) -> None:
    prior, law = density
    u = stats.norm.cdf(LATENT)
    np.testing.assert_allclose(prior.quantile(jnp.asarray(u)), law.ppf(u), rtol=1e-9)
    np.testing.assert_allclose(prior.value(jnp.asarray(LATENT)), law.ppf(u), rtol=1e-9)


def test_slopes_and_bends_are_derivatives(x64: None, density: tuple) -> None:
    prior, _ = density
    v = jnp.asarray(LATENT)
    slope, second = (jax.vmap(f)(v) for f in (jax.grad(prior.value), jax.grad(prior.slope)))
    np.testing.assert_allclose(prior.slope(v), slope, rtol=1e-9)
    np.testing.assert_allclose(prior.bend(v), second / slope, rtol=1e-9, atol=1e-9)
    u = jnp.asarray(stats.norm.cdf(LATENT))
    by_u = jax.vmap(jax.grad(prior.quantile))(u)
    np.testing.assert_allclose(prior.quantile_slope(u), by_u, rtol=1e-9)


def test_density_is_one_over_the_slope(x64: None, density: tuple) -> None:
    """`p(I) = phi(v) / (dI/dv)`, what a Gaussian `v` makes of it."""
    prior, law = density
    intensity = prior.value(jnp.asarray(LATENT))
    got = stats.norm.pdf(LATENT) / np.asarray(prior.slope(jnp.asarray(LATENT)))
    np.testing.assert_allclose(got, law.pdf(intensity), rtol=1e-9)


def test_latent_undoes_value_and_stays_within_reach(x64: None, density: tuple) -> None:
    prior, law = density
    np.testing.assert_allclose(prior.latent(prior.value(jnp.asarray(LATENT))), LATENT, atol=1e-6)
    low, high = prior.range
    far = prior.latent(jnp.array([-1e9, 0.0, low, high, 1e9]))
    assert np.isfinite(far).all()
    np.testing.assert_allclose(far[np.array([0, 1])], -4, atol=1e-6)
    assert float(far[-1]) == pytest.approx(4, abs=1e-6)
    # The whole of the density, or two standard deviations of it.
    share = law.cdf(np.array([low, high]))
    expected = stats.norm.cdf([-2, 2]) if isinstance(prior, LogNormal) else [0, 1]
    np.testing.assert_allclose(share, expected, atol=1e-9)


@pytest.mark.parametrize("known", [Uniform(240.0, 240.0), LogNormal(math.log(240.0), 0.0)])
def test_an_intensity_may_be_known_exactly(known: IntensityPrior) -> None:
    v = jnp.array([-3.0, 0.0, 2.0])
    np.testing.assert_allclose(known.value(v), 240, rtol=1e-6)
    np.testing.assert_array_equal(known.slope(v), [0, 0, 0])
    np.testing.assert_array_equal(known.latent(jnp.array([0.0, 240.0, 1e6])), [0, 0, 0])
    np.testing.assert_allclose(known.range, 240, rtol=1e-6)


def test_intensities_follow_the_numbers_of_their_density(x64: None, density: tuple) -> None:
    """Derivatives by every number, as differences have them, down to the histogram's shares."""
    prior, _ = density
    v, rng = jnp.array([-1.3, 0.2, 0.9]), np.random.default_rng(0)
    given = jax.tree.map(lambda a: jnp.asarray(a, float), prior)
    change = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), given)
    if isinstance(change, Histogram):  # an empty bin stays empty, and probabilities sum to 1
        share = jnp.array([0.1, 0.0, -0.3, 0.2])
        change = dataclasses.replace(change, share=share)

    def moved(step: float) -> jax.Array:
        return jax.tree.map(lambda a, b: a + step * b, given, change).value(v)

    _, slope = jax.jvp(moved, (0.0,), (1.0,))
    np.testing.assert_allclose(slope, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-7)


# --- presets -----------------------------------------------------------------------


def normal_below(x: float) -> float:
    return (1 + math.erf(x / 2**0.5)) / 2


@pytest.mark.parametrize(
    ("name", "intensity"),
    [("csist", (220.0, 250.0)), ("csist_noise", (220.0, 250.0)), ("csist_wide", (50.0, 250.0))],
)
def test_prior_of_a_preset(name: str, intensity: tuple[float, float]) -> None:
    prior = preset_prior(get_preset(name))
    assert prior.intensity == Uniform(*intensity)
    assert prior.separation == 0.5
    assert prior.cluster_size == pytest.approx(1.0)
    assert prior.cluster_offset == -0.4
    assert prior.places == "sequential"
    # round(Normal(3, 1)) clipped to 1..5: halves are the borders.
    below = [0.0, *(normal_below(k + 0.5 - 3) for k in (1, 2, 3, 4)), 1.0]
    assert prior.count is not None
    assert prior.count == pytest.approx((0.0, *(b - a for a, b in pairwise(below))))


def test_prior_of_a_changed_preset() -> None:
    changed = get_preset(
        "csist", count_mean=1.0, count_std=0.5, max_targets=2, extent=(-1.0, 1.0), separation=0.3
    )
    prior = preset_prior(changed)
    assert prior.count == pytest.approx((0.0, normal_below(1.0), 1 - normal_below(1.0)))
    assert (prior.cluster_size, prior.cluster_offset, prior.separation) == (2.0, -1.0, 0.3)
    certain = preset_prior(get_preset("csist", count_mean=2.0, count_std=0.0))
    assert certain.count == (0, 0, 1, 0, 0, 0)


def test_prior_counts_are_those_drawn_before_any_target_is_dropped() -> None:
    cluster = ClusterModel(separation=1e-3)  # every target finds its place
    keys = frame_keys(0, "val", np.arange(2000))
    counts = quick_jit(jax.vmap(lambda key: sample_targets(cluster, 11, key).count))(keys)
    found = np.bincount(np.asarray(counts), minlength=6)
    share = np.array(preset_prior(get_preset("csist")).count)
    error = np.sqrt(2000 * share * (1 - share))
    np.testing.assert_array_less(np.abs(found - 2000 * share), DEVIATIONS * error + 1e-9)


@pytest.fixture(scope="module")
def truth() -> Targets:
    """Targets of 2000 scenes of the preset `csist`."""
    keys = frame_keys(3, "val", np.arange(2000))
    return quick_jit(partial(simulate, get_preset("csist")))(keys).targets


def test_prior_ranges_are_those_of_the_scenes(truth: Targets) -> None:
    prior = preset_prior(get_preset("csist"))
    mask = np.asarray(truth.mask)
    assert prior.intensity is not None
    low, high = prior.intensity.range
    share = (np.asarray(truth.intensity, float)[mask] - low) / (high - low)
    assert stats.kstest(share, "uniform").pvalue > 1e-4
    # The square begins at a whole pixel plus the offset.
    assert prior.cluster_offset is not None
    inside = (np.asarray(truth.position)[mask] - prior.cluster_offset) % 1.0
    assert abs(inside.mean() - 0.5) < 0.01
    begin = np.floor(np.asarray(truth.position) - prior.cluster_offset + 1e-5)
    first = np.where(mask[..., None], begin, np.inf).min(1)
    last = np.where(mask[..., None], begin, -np.inf).max(1)
    np.testing.assert_array_equal(first, last)


# --- arguments ---------------------------------------------------------------------


def test_nothing_given_is_nothing_assumed() -> None:
    assert scene_prior() == ScenePrior()
    empty = Known(psf=Gaussian(0.5)).prior
    assert (empty.intensity, empty.separation, empty.cluster_size) == (None, 0.0, None)
    assert (empty.cluster_offset, empty.count) == (None, None)
    assert (empty.places, Known().sensor) == ("joint", Sensor())
    assert least_energy(empty) == 0


def test_given_values_arrive_and_probabilities_are_normalised() -> None:
    prior = scene_prior(
        intensity=(100, 300),
        separation=0.5,
        cluster_size=2,
        cluster_offset=-0.25,
        count=[1, 2, 1],
        places="sequential",
    )
    assert prior.intensity == Uniform(100.0, 300.0)
    assert (prior.separation, prior.cluster_size, prior.cluster_offset) == (0.5, 2.0, -0.25)
    assert prior.count == (0.25, 0.5, 0.25)
    assert prior.places == "sequential"
    assert least_energy(prior) == 50
    law = LogNormal(5.0, 0.5)
    assert scene_prior(intensity=law).intensity is law
    found = scene_prior(intensity=Histogram(EDGES, 3 * np.asarray(SHARE))).intensity
    np.testing.assert_allclose(found.share, SHARE)
    np.testing.assert_array_equal(found.edges, EDGES)
    assert least_energy(scene_prior(intensity=Histogram(EDGES, SHARE))) == 25


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"intensity": (250, 220)}, "intensity"),
        ({"intensity": (-1, 220)}, "intensity"),
        ({"intensity": (0, math.inf)}, "intensity"),
        ({"intensity": (math.nan, 220)}, "intensity"),
        ({"separation": -0.1}, "separation"),
        ({"separation": math.inf}, "separation"),
        ({"separation": math.nan}, "separation"),
        ({"cluster_size": 0.0}, "cluster_size"),
        ({"cluster_size": 0.5, "separation": 0.5}, "cluster_size"),
        ({"cluster_size": math.inf}, "cluster_size"),
        ({"cluster_size": math.nan}, "cluster_size"),
        ({"cluster_offset": 0.0}, "cluster_offset"),
        ({"cluster_offset": math.nan, "cluster_size": 1.0}, "cluster_offset"),
        ({"cluster_offset": math.inf, "cluster_size": 1.0}, "cluster_offset"),
        ({"count": [0, 0]}, "count"),
        ({"count": [1, -1, 3]}, "count"),
        ({"count": [1, math.inf]}, "count"),
        ({"count": [1, math.nan]}, "count"),
        ({"count": [math.nan, 1]}, "count"),
        ({"count": []}, "count"),
    ],
)
def test_impossible_priors_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message} must be"):
        scene_prior(**given)


@pytest.mark.parametrize(
    "law",
    [
        Uniform(5.0, 3.0),
        LogNormal(5.0, -1.0),
        LogNormal(np.inf, 1.0),
        Histogram([0.0, 1.0, 1.0], [0.5, 0.5]),
        Histogram([-1.0, 1.0], [1.0]),
        Histogram([0.0, 1.0], [0.5, 0.5]),
        Histogram([0.0, 1.0, 2.0], [1.0, -0.5]),
        Histogram([0.0, 1.0, 2.0], [0.0, 0.0]),
    ],
)
def test_densities_that_are_none_are_refused(law: IntensityPrior) -> None:
    with pytest.raises(ValueError, match=r"must (be|rise)"):
        scene_prior(intensity=law)


def test_unknown_places_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown places 'one by one'; choose one of joint, seq"):
        scene_prior(places="one by one")
