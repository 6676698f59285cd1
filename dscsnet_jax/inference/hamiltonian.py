"""Hamiltonian: trajectories along the narrow, bent valleys of a posterior.

Targets that blend are known by a few moments of their light: thin sheets of a posterior that is
broad along them, where steps of a Gaussian shape are short or rejected. Leapfrog steps of

    H(theta, p) = -log density(theta) + |p|^2 / 2,    theta = root z,

with a momentum p drawn anew follow the sheet. They are reversible and keep volumes, so that the
change of H is all that is accepted or rejected.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dscsnet_jax.inference import spd
from dscsnet_jax.inference.lanes import sum_leading

NUM_STEPS = 20
_STEPS = (0.03, 0.08)  # standard deviations; drawn, so that no orbit closes


def trajectory(
    theta: jax.Array,
    root: jax.Array,
    log_density: Callable[[jax.Array], jax.Array],
    white: jax.Array,
    u: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Where a trajectory ends.

    Args:
      theta: (3K+1, 1, C) places of C chains.
      root: (3K+1, 3K+1, 1, C) lower triangular, of a covariance like the posterior's; zero for
        what is not there.
      log_density: of places, (1, C), up to a constant.
      white: (3K+1, 1, C) standard normal numbers.
      u: (1, C) uniform numbers.

    Returns:
      Where to, and the logarithm (1, C) of how much likelier its proposal is on the way back; no
      move, and -inf, where numbers overflow.

    References:
      R. M. Neal, MCMC using Hamiltonian dynamics, in Handbook of Markov Chain Monte Carlo, 2011.
    """
    there = spd.diagonal(root) > 0
    across = jnp.swapaxes(root, 0, 1)
    low, high = _STEPS
    length = (low * (high / low) ** u)[None]

    def force(theta: jax.Array) -> jax.Array:
        total, pull = jax.vjp(log_density, theta)
        return jnp.where(there, spd.times(across, pull(jnp.ones_like(total))[0]), 0)

    def step(number: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        at, momentum = state
        at = at + spd.times(root, length * momentum)
        last = number == NUM_STEPS - 1
        return at, momentum + jnp.where(last, 0.5, 1.0) * length * force(at)

    first = jnp.where(there, white, 0)
    begin = theta, first + length / 2 * force(theta)
    end, momentum = jax.lax.fori_loop(0, NUM_STEPS, step, begin)
    gain = (sum_leading(first**2) - sum_leading(momentum**2)) / 2
    fine = jnp.isfinite(gain) & jnp.isfinite(end).all(0)
    return jnp.where(fine, end, theta), jnp.where(fine, gain, -jnp.inf)
