"""Trajectories keep the density they follow, and go along bent sheets."""

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.inference.hamiltonian import trajectory
from dscsnet_jax.inference.lanes import lanes_last

LANES = 4000
ROOT = np.array([[1.0, 0.0, 0.0], [0.3, 0.8, 0.0], [0.0, 0.0, 0.0]])[:, :, None, None]


def bent(theta: jax.Array) -> jax.Array:
    """A sheet of width 0.1 along a parabola, `a` standard normal; what is last is not there."""
    a, b = theta[0], theta[1]
    return -(a**2) / 2 - (b - 0.5 * (a**2 - 1)) ** 2 / (2 * 0.1**2)


def drawn(rng: np.random.Generator) -> jax.Array:
    a = rng.normal(size=(1, LANES))
    b = 0.5 * (a**2 - 1) + 0.1 * rng.normal(size=a.shape)
    return jnp.asarray(np.stack([a, b, np.full_like(a, 7.0)]))


@lanes_last
def walked(theta: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """Places after accepted trajectories, and the share of those."""

    def step(theta: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        one, two, three = jax.random.split(key, 3)
        white = jax.random.normal(one, theta.shape, float)
        u = jax.random.uniform(two, theta.shape[1:], float)
        new, gain = trajectory(theta, jnp.asarray(ROOT), bent, white, u)
        ratio = bent(new) - bent(theta) + gain
        accepted = jnp.log(jax.random.uniform(three, ratio.shape, float)) < ratio
        return jnp.where(accepted, new, theta), accepted.mean()

    theta, rate = jax.lax.scan(step, theta, jax.random.split(jax.random.key(0), number))
    return theta, rate.mean()


def moments(theta: jax.Array) -> np.ndarray:
    a, b, _ = np.asarray(theta)[:, 0]
    return np.stack([a, a**2, b, b**2, (b - 0.5 * (a**2 - 1)) ** 2 * 100])


def test_trajectories_keep_the_density(x64: None) -> None:
    """Draws of a bent sheet are draws of it afterwards; each has gone somewhere else."""
    before = drawn(np.random.default_rng(0))
    after, rate = jax.jit(walked, static_argnums=1)(before, 30)
    assert rate > 0.8
    assert np.corrcoef(before[0, 0], after[0, 0])[0, 1] < 0.5
    assert (np.asarray(after)[2] == 7).all()
    got = moments(after)
    exact = np.array([0, 1, 0, 0.5 + 0.1**2, 1])
    error = got.std(1) / LANES**0.5
    np.testing.assert_array_less(np.abs(got.mean(1) - exact), 4.5 * error)


def test_from_one_place_they_reach_all(x64: None) -> None:
    start = jnp.broadcast_to(jnp.asarray([1.0, 0.0, 7.0])[:, None, None], (3, 1, LANES))
    after, _ = jax.jit(walked, static_argnums=1)(start, 400)
    got = moments(after)
    exact = np.array([0, 1, 0, 0.5 + 0.1**2, 1])
    error = got.std(1) / LANES**0.5
    np.testing.assert_array_less(np.abs(got.mean(1) - exact), 4.5 * error)


@lanes_last
def test_what_overflows_is_no_move(x64: None) -> None:
    theta = jnp.zeros((3, 1, 2)).at[2].set(7)

    def steep(theta: jax.Array) -> jax.Array:
        return -jnp.exp(1e4 * theta[0] ** 2)

    new, gain = trajectory(theta, jnp.asarray(ROOT), steep, jnp.ones((3, 1, 2)), jnp.ones((1, 2)))
    np.testing.assert_array_equal(new, theta)
    assert (np.asarray(gain) == -np.inf).all()
