"""Moves of all parameters keep the Gaussian distribution that shapes them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.inference import spd
from dscsnet_jax.inference.alike import Alike
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.lanes import lanes_last
from dscsnet_jax.inference.moves import NUM_FURTHER, WALK, Shape, kind_of, propose
from dscsnet_jax.inference.observation import observe
from dscsnet_jax.inference.prior import scene_prior
from dscsnet_jax.inference.scene_model import scene_model
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian

SIZE, LANES = 7, 4096


@lanes_last
def shape_of(rng):
    a = rng.normal(size=(SIZE, SIZE))
    root = np.linalg.cholesky(a @ a.T / SIZE + 0.1 * np.eye(SIZE))
    mean = jnp.asarray(rng.normal(size=(SIZE, 1, 1)))
    root = jnp.asarray(root)[:, :, None, None]
    return Shape(mean, root, spd.triangular_inverse(root))


@lanes_last
def moved(shape, theta, length, u, kind=WALK):
    seen = observe(np.zeros((1, 3, 3)), Sensor(read_noise=1.0, background=0.0))
    seen = jax.tree.map(lambda a: jnp.moveaxis(jnp.asarray(a), 0, -1)[..., None], seen)
    model = scene_model(seen, jnp.ones((2, 1, 1), bool), Known(psf=Gaussian(np.float64(0.5))))
    told = shape, jnp.asarray(length)[None], model, theta, kind, u
    return propose(theta, *told, partial(log_density, shape))


@lanes_last
def log_density(shape, theta):
    unit = jnp.einsum("pqc,qsc->psc", shape.inverse[:, :, 0], theta - shape.mean)
    return -(unit**2).sum(0) / 2


@pytest.mark.parametrize("length", [0.01, 0.4, 1.0])
def test_all_parameters_of_a_gaussian_are_always_accepted_and_stay_so(x64, length):
    rng = np.random.default_rng(0)
    shape = shape_of(rng)
    draws = rng.normal(size=(SIZE, 1, LANES))
    theta = shape.mean + np.einsum("pqc,qsl->psl", shape.root[:, :, 0], draws)
    u = jnp.asarray(rng.uniform(size=(SIZE + NUM_FURTHER, 1, LANES)))
    new, gain = moved(shape, theta, np.full(1, length), u)
    ratio = log_density(shape, new) - log_density(shape, theta) + gain
    np.testing.assert_allclose(ratio, 0, atol=1e-10)
    off = np.asarray(new - shape.mean)[:, 0]
    root = np.asarray(shape.root)[..., 0, 0]
    covariance = off @ off.T / LANES
    std = np.sqrt(np.diag(root @ root.T))
    error = (covariance - root @ root.T) / np.outer(std, std)
    assert np.abs(error).max() < 4.5 * np.sqrt(2 / LANES)
    np.testing.assert_array_less(np.abs(off.mean(1)), 4.5 * std / np.sqrt(LANES))


@pytest.mark.parametrize("kind", [5, 6])
def test_places_whose_light_is_redrawn_move_whatever_the_light(x64, kind):
    """Or the way back would be another one."""
    rng = np.random.default_rng(2)
    shape = shape_of(rng)
    theta = jnp.asarray(rng.uniform(0.5, 2, size=(SIZE, 1, LANES)))
    u = jnp.asarray(rng.uniform(size=(SIZE + NUM_FURTHER, 1, LANES)))
    new, _ = moved(shape, theta, np.full(1, 0.5), u, kind)
    other, _ = moved(shape, theta.at[2].multiply(3.0), np.full(1, 0.5), u, kind)
    places = np.array([0, 1, 3, 4])
    np.testing.assert_allclose(new[places], other[places], rtol=1e-12)
    off = np.asarray(new - theta)[places].reshape(2, 2, LANES)
    assert (np.abs(off).max((0, 1)) > 0).mean() > 0.45
    if kind == 6:  # two targets, as far from where they were
        np.testing.assert_allclose(off[0], -off[1], atol=1e-12)


def test_what_is_not_there_stays_where_it_is():
    rng = np.random.default_rng(1)
    shape = shape_of(rng)
    there = jnp.asarray([1, 1, 1, 0, 0, 0, 1])[:, None, None]
    root = shape.root * there[:, None] * there[None]
    shape = Shape(shape.mean * there, root, spd.triangular_inverse(root))
    theta = jnp.asarray(rng.normal(size=(SIZE, 1, LANES)).astype("f")) * there
    u = jnp.zeros((SIZE + NUM_FURTHER, 1, LANES))  # the least of uniform numbers
    new, gain = moved(shape, theta, np.full(1, 0.5, "f"), u)
    assert np.isfinite(new).all()
    assert np.isfinite(gain).all()
    assert (new[3:6] == 0).all()
    assert (new[:3] != theta[:3]).all()


def test_trajectories_are_for_chains_that_have_disagreed():
    """And for light that no prior tells; the first turn, which most end with, has none."""
    seen = observe(np.zeros((1, 3, 3)), Sensor(read_noise=1.0, background=0.0))
    seen = jax.tree.map(lambda a: jnp.moveaxis(jnp.asarray(a), 0, -1)[..., None], seen)
    told = scene_prior(intensity=(50.0, 60.0))
    for prior, trajectories in ((scene_prior(intensity=Alike()), 0.2), (told, 0.0)):
        known = Known(psf=Gaussian(np.float32(0.5)), prior=prior)
        model = lanes_last(scene_model)(seen, jnp.ones((2, 1, 1), bool), known, uniform=True)
        u = jnp.linspace(0, 1, 100, endpoint=False)
        first, later = (np.array([kind_of(x, model, n) for x in u]) for n in (0, 1))
        assert first.max() == (6 if trajectories else 4)
        assert abs((later == 7).mean() - trajectories) < 0.02
