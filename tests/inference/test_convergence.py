"""R-hat and effective sample sizes against ArviZ."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.inference.convergence import convergence, sort_leading

with warnings.catch_warnings():  # its own, on import
    warnings.simplefilter("ignore")
    import arviz


def autoregressive(rng: np.random.Generator, memory: float, draws: int) -> np.ndarray:
    x = rng.normal(size=(draws, 4))
    for t in range(1, draws):
        x[t] += memory * x[t - 1]
    return x


def chains(kind: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    normal = rng.normal(size=(64, 4))
    made = {
        "independent": normal,
        "slow": autoregressive(rng, 0.95, 64),
        "alternating": autoregressive(rng, -0.5, 100),
        "odd": autoregressive(rng, 0.5, 101),
        "heavy tails": rng.standard_cauchy((64, 4)),
        "means differ": normal + np.arange(4),
        "spreads differ": normal * np.array([1, 1, 1, 5.0]),
        "ties": np.round(autoregressive(rng, 0.7, 64)),
        "stuck": 1e-3 * normal + np.arange(4),
    }
    return made[kind]


KINDS = [
    "independent",
    "slow",
    "alternating",
    "odd",
    "heavy tails",
    "means differ",
    "spreads differ",
    "ties",
    "stuck",
]


def by_arviz(samples: np.ndarray) -> list[float]:
    theirs = np.ascontiguousarray(samples.T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = (
            arviz.rhat(theirs),
            arviz.ess(theirs, method="bulk"),
            arviz.ess(theirs, method="tail"),
        )
    return [float(value) for value in found]


def by_arviz_of_mean(samples: np.ndarray) -> float:
    return float(arviz.ess(np.ascontiguousarray(samples.T, float), method="mean"))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_arviz(kind, x64):
    samples = chains(kind)
    found = convergence(jnp.asarray(samples))
    np.testing.assert_allclose(found, by_arviz(samples), rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_arviz_in_single_precision(kind):
    samples = chains(kind).astype(np.float32)
    with jax.debug_nans(True):
        found = convergence(jnp.asarray(samples))
    assert found.rhat.dtype == np.float32
    np.testing.assert_allclose(found, by_arviz(samples), rtol=1e-3)


@pytest.mark.parametrize(("draws", "number"), [(4, 4), (5, 4), (8, 3), (10, 3), (16, 4), (33, 2)])
def test_equals_arviz_for_short_chains(draws, number, x64):
    # Many of them: rare ends of Geyer's sequence, such as a last even lag below zero.
    rng = np.random.default_rng(2)
    many = rng.normal(size=(100, draws, number)) + rng.normal(size=(100, 1, number))
    found = convergence(jnp.asarray(np.moveaxis(many, 0, -1)))
    expected = np.array([by_arviz(samples) for samples in many])
    np.testing.assert_allclose(np.stack(found, 1), expected, rtol=1e-9)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (130,), (3, 100), (0,)])
def test_further_axes_are_parameters_of_their_own(shape):
    # Some fill the lanes counted at once, some do not.
    samples = np.random.default_rng(3).normal(size=(20, 2, *shape)).round(1).astype("f")
    found = convergence(jnp.asarray(samples))
    assert found.rhat.shape == shape
    for place in [*np.ndindex(shape)][:: max(np.prod(shape) // 5, 1)]:
        alone = convergence(jnp.asarray(samples[:, :, *place]))
        np.testing.assert_allclose([c[place] for c in found], alone, rtol=1e-5)


def test_a_quantile_that_is_a_sample_counts_it(x64):
    # The 5 % quantile is the second least, 1/20 of the way: rounding must not leave it out.
    samples = np.random.default_rng(4).permutation(21.0 * np.arange(1, 22) / 10)[:, None]
    at_most = [samples <= np.sort(samples, 0)[place] for place in (1, 19)]
    expected = min(by_arviz_of_mean(found) for found in at_most)
    np.testing.assert_allclose(convergence(jnp.asarray(samples)).tail, expected)


def test_chains_that_are_stuck_apart_do_not_agree():
    apart = jnp.broadcast_to(jnp.arange(4.0), (64, 4))
    assert convergence(apart).rhat == np.inf
    assert convergence(0.1 * apart[:20]).rhat == np.inf
    assert convergence(jnp.asarray(chains("stuck"), jnp.float32)).rhat > 2


@pytest.mark.parametrize("draws", [20, 21, 64])
@pytest.mark.parametrize("number", [3, 4])
def test_what_is_known_exactly_has_converged(draws, number):
    # Also where a mean of equal numbers is not the number: 1/10 is rounded.
    found = convergence(jnp.full((draws, number), 230.1))
    all_samples = draws // 2 * 2 * number
    assert [float(value) for value in found] == [1.0, all_samples, all_samples]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_have_not_converged(value):
    samples = np.stack([chains("independent")] * 2, -1).astype("f")
    samples[10, 1, 0] = value
    found = convergence(jnp.asarray(samples))
    assert [float(c[0]) for c in found] == [np.inf, 0, 0]
    np.testing.assert_allclose([c[1] for c in found], by_arviz(samples[..., 1]), rtol=1e-3)


def test_refuses_fewer_than_four_draws():
    with pytest.raises(ValueError, match="at least 4 draws, got 3"):
        convergence(jnp.zeros((3, 4)))


@pytest.mark.parametrize("number", [1, 2, 64, 100])
def test_sorts_along_the_leading_axis(number):
    values = np.random.default_rng(0).normal(size=(number, 3, 5)).round(1)
    np.testing.assert_array_equal(sort_leading(jnp.asarray(values)), np.sort(values, 0).astype("f"))
