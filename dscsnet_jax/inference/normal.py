"""Normal: log of the normal distribution function, for pixels that are saturated.

In the chains it is half of all work, so it takes one logarithm, one error function and one
polynomial. Below -1, with `z = (-1 - x) / sqrt 2` and `t = 2 / (2 + z)`, between 0 and 1,

    log Phi(x) = -x^2 / 2 + log t + g(t),

and `g` is so smooth that the polynomial gives it to the last digit but one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import Chebyshev
from numpy.polynomial.chebyshev import cheb2poly
from scipy.special import erfcx

_DEGREES = {np.dtype(np.float32): 7, np.dtype(np.float64): 22}
_NODES = 400
_LOG_ROOT_2PI = 0.5 * float(np.log(2 * np.pi))
_FAR_UP = 12.0  # standard deviations


def log_ndtr(x: jax.Array) -> jax.Array:
    """Log of the probability that a standard normal number is below `x`.

    Args:
      x: any shape, float32 or float64.

    Returns:
      The same shape; in error by some roundings, of 1 or of the value if that is larger.

    Example:
      >>> [round(float(value), 3) for value in log_ndtr(jnp.array([-50.0, 0.0, 50.0]))]
      [-1254.831, -0.693, 0.0]
    """
    coefficients = _coefficients(_DEGREES[x.dtype])
    low = jnp.minimum(x, -1)
    t = 2 / (2 + (-1 - low) * 0.5**0.5)
    place, smooth = 2 * t - 1, jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        smooth = smooth * place + coefficient
    chance = (1 + jax.lax.erf(x * 0.5**0.5)) / 2
    return jnp.where(x < -1, smooth - low**2 / 2, 0) + jnp.log(jnp.where(x < -1, t, chance))


def inverse_mills(residual: jax.Array, log_tail: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`m = phi(r) / Phi(-r)` with `log Phi(-r)` given, and `m - r`.

    Far up, where `m - r` would be left of the rounding of two large numbers, by its series.
    """
    far = residual > _FAR_UP
    mills = jnp.exp(-(residual**2) / 2 - _LOG_ROOT_2PI - log_tail)
    above = jnp.where(far, residual, _FAR_UP)
    i = 1 / above**2
    series = (1 - i * (2 - i * (10 - i * (74 - i * 706)))) / above
    excess = jnp.where(far, series, jnp.maximum(mills - residual, 0))
    return jnp.where(far, residual + series, mills), excess


@functools.cache
def _coefficients(degree: int) -> tuple[float, ...]:
    """Of the powers of `2 t - 1`."""
    t = (np.cos(np.pi * (np.arange(_NODES) + 0.5) / _NODES) + 1) / 2
    smooth = np.log(erfcx(0.5**0.5 + 2 / t - 2) / (2 * t))
    return tuple(cheb2poly(Chebyshev.fit(t, smooth, degree, domain=[0, 1]).coef).tolist())
