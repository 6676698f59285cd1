"""Intensity: densities of the targets' intensities.

Each has one quantile function `Q`, through which fit, evidence and chains reach it: a target's
intensity is `I = Q(Phi(v))` with `v` standard normal a priori.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri
from scipy.stats import norm

from dscsnet_jax.inference.alike import Alike

_FARTHEST = 4.0  # standard deviations, of the start of a fit


def _phi(v: jax.Array) -> jax.Array:
    return jnp.exp(-(v**2) / 2) / (2 * np.pi) ** 0.5


def _cdf(v: jax.Array) -> jax.Array:
    return (1 + jax.lax.erf(v * 0.5**0.5)) / 2


@flax.struct.dataclass
class Uniform:
    """Intensities between `low` and `high` counts, each as likely; both the same: known.

    Example:
      >>> [round(float(Uniform(100.0, 200.0).value(jnp.array(v))), 1) for v in (0.0, 1.0)]
      [150.0, 184.1]
    """

    low: Any
    high: Any

    def checked(self) -> Uniform:
        """Itself.

        Raises:
          ValueError: for an empty or negative range.
        """
        if not 0 <= self.low <= self.high < np.inf:
            raise ValueError(f"intensity must be a range 0 <= low <= high, got {self}")
        return self

    def value(self, v: jax.Array) -> jax.Array:
        """Intensity of `v`, counts."""
        return self.quantile(_cdf(v))

    def quantile(self, u: jax.Array) -> jax.Array:
        """Intensity, counts, that a share `u` of all does not reach."""
        return self.low + (self.high - self.low) * u

    def quantile_slope(self, u: jax.Array) -> jax.Array:
        """`dI/du`, counts."""
        return jnp.broadcast_to(jnp.asarray(self.high - self.low, u.dtype), u.shape)

    def slope(self, v: jax.Array) -> jax.Array:
        """`dI/dv`, counts."""
        return (self.high - self.low) * _phi(v)

    def bend(self, v: jax.Array) -> jax.Array:
        """`(d2I/dv2) / (dI/dv)`."""
        return -v

    def latent(self, intensity: jax.Array) -> jax.Array:
        """`v` of an intensity, within 4 standard deviations."""
        width = jnp.asarray(self.high - self.low, intensity.dtype)
        share = (intensity - self.low) / jnp.where(width > 0, width, 1)
        return jnp.where(width > 0, _latent(share), 0)

    @property
    def range(self) -> tuple[Any, Any]:
        """Least and largest intensity, counts."""
        return self.low, self.high


@flax.struct.dataclass
class LogNormal:
    """Intensities whose natural logarithm is Gaussian.

    Example:
      >>> round(float(LogNormal(5.0, 0.5).value(jnp.array(1.0))), 1)
      244.7
    """

    log_mean: Any
    log_std: Any

    def checked(self) -> LogNormal:
        """Itself.

        Raises:
          ValueError: for moments that are not finite, or a negative standard deviation.
        """
        if not (np.isfinite(self.log_mean) and 0 <= self.log_std < np.inf):
            raise ValueError(f"log_mean and log_std >= 0 must be finite, got {self}")
        return self

    def value(self, v: jax.Array) -> jax.Array:
        """Intensity of `v`, counts."""
        return jnp.exp(self.log_mean + self.log_std * v)

    def quantile(self, u: jax.Array) -> jax.Array:
        """Intensity, counts, that a share `u` of all does not reach."""
        return self.value(_latent(u))

    def quantile_slope(self, u: jax.Array) -> jax.Array:
        """`dI/du`, counts."""
        return self.slope(_latent(u)) / _phi(_latent(u))

    def slope(self, v: jax.Array) -> jax.Array:
        """`dI/dv`, counts."""
        return self.log_std * self.value(v)

    def bend(self, v: jax.Array) -> jax.Array:
        """`(d2I/dv2) / (dI/dv)`."""
        return jnp.broadcast_to(jnp.asarray(self.log_std, v.dtype), v.shape)

    def latent(self, intensity: jax.Array) -> jax.Array:
        """`v` of an intensity, within 4 standard deviations."""
        width = jnp.asarray(self.log_std, intensity.dtype)
        least = jnp.exp(self.log_mean - _FARTHEST * width)
        off = jnp.log(jnp.maximum(intensity, least)) - self.log_mean
        v = jnp.clip(off / jnp.where(width > 0, width, 1), -_FARTHEST, _FARTHEST)
        return jnp.where(width > 0, v, 0)

    @property
    def range(self) -> tuple[Any, Any]:
        """Intensities at two standard deviations, counts."""
        return tuple(jnp.exp(self.log_mean + s * self.log_std) for s in (-2, 2))  # type: ignore[return-value]


@flax.struct.dataclass
class Histogram:
    """Intensities by bins: `edges` (E+1,) counts, rising, and `share` (E,) of each, sum 1.

    Example:
      >>> prior = Histogram(jnp.array([0.0, 100.0, 300.0]), jnp.array([0.5, 0.5]))
      >>> round(float(prior.value(jnp.array(0.0)))), round(float(prior.value(jnp.array(0.6745))))
      (100, 200)
    """

    edges: Any
    share: Any

    def checked(self) -> Histogram:
        """Itself, with shares of sum 1.

        Raises:
          ValueError: for edges that do not rise from at least 0, or shares of no density.
        """
        edges, share = np.asarray(self.edges), np.asarray(self.share)
        rising = edges.shape == (len(share) + 1,) and (np.diff(edges) > 0).all()
        if not (rising and edges[0] >= 0 and edges[-1] < np.inf):
            raise ValueError(f"edges must rise from at least 0, one more than shares, got {edges}")
        if not ((share >= 0).all() and 0 < share.sum() < np.inf):
            raise ValueError(f"shares must be relative probabilities, got {share}")
        total = float(share.sum())  # what is read back stays as it is
        return self if abs(total - 1) < 1e-9 else Histogram(edges, share / total)

    def _bins(self, u: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """First edge and `dI/du` of the bins of `u`, and what of `u` is within."""
        edges = jnp.asarray(self.edges, u.dtype)
        share = jnp.asarray(self.share, u.dtype)
        below = jnp.concatenate([jnp.zeros(1, u.dtype), jnp.cumsum(share)[:-1]])
        index = jnp.maximum(jnp.searchsorted(below, u, side="right") - 1, 0)
        width = (edges[1:] - edges[:-1]) / jnp.where(share > 0, share, 1)
        return edges[index], jnp.where(share > 0, width, 0)[index], u - below[index]

    def value(self, v: jax.Array) -> jax.Array:
        """Intensity of `v`, counts."""
        return self.quantile(_cdf(v))

    def quantile(self, u: jax.Array) -> jax.Array:
        """Intensity, counts, that a share `u` of all does not reach."""
        edge, width, within = self._bins(u)
        return edge + width * within

    def quantile_slope(self, u: jax.Array) -> jax.Array:
        """`dI/du`, counts."""
        return self._bins(u)[1]

    def slope(self, v: jax.Array) -> jax.Array:
        """`dI/dv`, counts."""
        return self.quantile_slope(_cdf(v)) * _phi(v)

    def bend(self, v: jax.Array) -> jax.Array:
        """`(d2I/dv2) / (dI/dv)`."""
        return -v

    def latent(self, intensity: jax.Array) -> jax.Array:
        """`v` of an intensity, within 4 standard deviations."""
        edges = jnp.asarray(self.edges, intensity.dtype)
        share = jnp.asarray(self.share, intensity.dtype)
        below = jnp.concatenate([jnp.zeros(1, intensity.dtype), jnp.cumsum(share)])
        return _latent(jnp.interp(intensity, edges, below))

    @property
    def range(self) -> tuple[Any, Any]:
        """Least and largest intensity, counts."""
        return self.edges[0], self.edges[-1]


def _latent(share: jax.Array) -> jax.Array:
    edge = float(norm.cdf(-_FARTHEST))
    return ndtri(jnp.clip(share, edge, 1 - edge))


IntensityPrior = Uniform | LogNormal | Histogram | Alike
