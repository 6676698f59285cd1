"""Redrawn light: places move as if the light had been integrated out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dscsnet_jax as dj
from dscsnet_jax.inference.lanes import lanes_last, to_lanes
from dscsnet_jax.inference.redraw import light_redrawn
from dscsnet_jax.inference.scene_model import scene_model

LANES = 2000
SCENE = [(3.0, 2.6, 240.0), (3.1, 3.5, 200.0)]
PSFS = {"gaussian": dj.Gaussian(0.5), "moffat": dj.Moffat(1.2, 3.0)}


def model_of(psf, slots=3, intensity=None):
    truth = dj.from_lists([SCENE], max_targets=slots)
    frames = np.asarray(dj.render(truth, frame_size=7, psf=psf), float)
    frames = frames + np.random.default_rng(0).normal(0, 3, frames.shape)
    seen = dj.observe(frames, dj.Sensor(read_noise=3.0, background=0.0))
    seen = jax.tree.map(lambda a: a if a.dtype == bool else jnp.asarray(a, float), seen)
    truth = jax.tree.map(lambda a: a if a.dtype == bool else jnp.asarray(a, float), truth)
    seen, truth = jax.tree.map(lambda a: a[..., None, :], to_lanes((seen, truth)))
    known = dj.Known(psf, prior=dj.scene_prior(intensity=intensity))
    model = scene_model(seen, truth.mask, known, uniform=True)
    return model, model.pack(truth)


redrawn = lanes_last(light_redrawn)


@lanes_last
def likelihood(model, theta):
    return model.log_likelihood(theta)


@lanes_last
def density(model, theta):
    return model.log_likelihood(theta) + model.log_prior(theta)


@pytest.mark.parametrize("psf", PSFS)
def test_what_is_accepted_knows_nothing_of_the_light(x64: None, psf: str) -> None:
    """Of a Gaussian likelihood the ratio is that of the integrals over light, at any light."""
    model, theta = model_of(PSFS[psf])
    rng = np.random.default_rng(1)
    moved = theta.at[0].add(0.2).at[4].add(-0.15)
    ratios = []
    for _ in range(4):
        start = theta.at[2].multiply(rng.uniform(0.9, 1.1)).at[5].multiply(rng.uniform(0.9, 1.1))
        white = jnp.asarray(rng.normal(size=(4, 1, 1)))
        new, gain = redrawn(start, moved, model, white)
        # The proposal holds a weak Gaussian density of all light, which the model has not.
        weak = [(jnp.where(model.mask, x[2:-1:3], 0) ** 2).sum() / 2 for x in (start, new)]
        change = likelihood(model, new) - likelihood(model, start)
        change += (start[-1] ** 2 - new[-1] ** 2) / 2 + weak[0] - weak[1]
        ratios.append(float(jnp.squeeze(change + gain)))
        assert float(new[8, 0, 0]) == 0  # a slot without target stays empty
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-8)
    assert abs(ratios[0]) > 0.1


def test_steps_keep_the_posterior_of_the_light(x64: None) -> None:
    """At places that stay, accepted draws have the density of prior and likelihood together."""
    model, theta = model_of(PSFS["gaussian"], 2, dj.Alike())
    theta = jnp.broadcast_to(theta, (*theta.shape[:2], LANES))

    def step(theta: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        one, other = jax.random.split(key)
        white = jax.random.normal(one, (3, 1, LANES), float)
        new, gain = redrawn(theta, theta, model, white)
        ratio = density(model, new) - density(model, theta) + gain
        accepted = jnp.log(jax.random.uniform(other, ratio.shape, float)) < ratio
        return jnp.where(accepted, new, theta), None

    theta, _ = jax.lax.scan(step, theta, jax.random.split(jax.random.key(0), 40))
    got = np.asarray(theta)[:, 0]
    # The same by a grid over both intensities and the level, which is known here.
    v = [np.linspace(got[i].min(), got[i].max(), 160) for i in (2, 5)]
    first, second = (a.ravel() for a in np.meshgrid(*v, indexing="ij"))
    grid = np.repeat(np.asarray(theta)[:, :, :1], len(first), 2)
    grid[2, 0], grid[5, 0], grid[-1, 0] = first, second, 0
    log = np.asarray(density(model, jnp.asarray(grid)))[0]
    weight = np.exp(log - log.max())
    for i, value in ((2, first), (5, second)):
        mean = np.average(value, weights=weight)
        std = np.average((value - mean) ** 2, weights=weight) ** 0.5
        assert abs(got[i].mean() - mean) < 4 * std / LANES**0.5
        assert abs(got[i].std() / std - 1) < 4 / (2 * LANES) ** 0.5
