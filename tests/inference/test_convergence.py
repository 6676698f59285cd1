"""R-hat and effective sample sizes against ArviZ."""

import warnings

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


@pytest.mark.parametrize("kind", KINDS)
def test_equals_arviz(kind, x64):
    samples = chains(kind)
    found = convergence(jnp.asarray(samples))
    theirs = np.ascontiguousarray(samples.T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = (
            arviz.rhat(theirs),
            arviz.ess(theirs, method="bulk"),
            arviz.ess(theirs, method="tail"),
        )
    np.testing.assert_allclose(found, np.array([float(e) for e in expected]), rtol=1e-9)


def test_single_precision_and_further_axes():
    samples = np.stack([chains("slow"), chains("stuck")], -1)
    found = convergence(jnp.asarray(samples, jnp.float32))
    for column, kind in enumerate(("slow", "stuck")):
        alone = convergence(jnp.asarray(chains(kind), jnp.float32))
        np.testing.assert_allclose([c[column] for c in found], alone, rtol=1e-5)


def test_chains_that_are_stuck_apart_do_not_agree():
    apart = jnp.broadcast_to(jnp.arange(4.0), (64, 4))
    assert convergence(apart).rhat > 1e3
    assert convergence(jnp.asarray(chains("stuck"), jnp.float32)).rhat > 2


def test_what_is_known_exactly_has_converged():
    found = convergence(jnp.full((64, 4), 230.0))
    assert [float(value) for value in found] == [1.0, 256.0, 256.0]


@pytest.mark.parametrize("number", [1, 2, 64, 100])
def test_sorts_along_the_leading_axis(number):
    values = np.random.default_rng(0).normal(size=(number, 3, 5)).round(1)
    np.testing.assert_array_equal(sort_leading(jnp.asarray(values)), np.sort(values, 0).astype("f"))
