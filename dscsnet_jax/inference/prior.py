"""Prior: what is known before a frame is seen: optics, gain, and the scene.

Everything of a scene is optional; what is not given is not assumed. Intensities have one
density, which fit, evidence and chains reach through the same variable: a target's
intensity is `I = Q(Phi(v))` with `v` standard normal a priori and `Q` the quantile function.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri
from scipy.stats import norm

from dscsnet_jax.physics.scene import Preset

PLACES = ("joint", "sequential")
_DRAWS = 1 << 17
_MOST = 32
_LEAST_SHARE = 0.5  # of the least intensity
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


IntensityPrior = Uniform | LogNormal | Histogram


@flax.struct.dataclass
class ScenePrior:
    """Knowledge of the targets of one cluster.

    Attributes:
      intensity: density of the intensities; None: any, up to all counts of the frame.
      separation: least distance of two targets, pixels; 0: none.
      cluster_size: all targets lie within a square of this side whose place is unknown,
        pixels; None: anywhere.
      cluster_offset: the square begins at some whole pixel plus this, in row and in col;
        None: at any place.
      count: (n,) probabilities of 0, 1, 2 .. targets, 0 for more; None: any count.
      log_free_share: (n,) see `log_free_share`; the last holds for larger counts.
      places: `joint`: all places that keep the separation are as likely; `sequential`:
        each target is placed, after the ones before, uniformly in what is free.
    """

    intensity: IntensityPrior | None = None
    separation: Any = 0.0
    cluster_size: Any = None
    cluster_offset: Any = None
    count: Any = None
    log_free_share: Any = (0.0,)
    places: str = flax.struct.field(pytree_node=False, default="joint")


@flax.struct.dataclass
class Known:
    """What is known before a frame is seen.

    Attributes:
      sigma: PSF standard deviation, pixels, a number or (2,) of row and col.
      gain: electrons per count of the shot noise; None: no shot noise.
      prior: of the scene.
    """

    sigma: Any
    gain: Any = None
    prior: ScenePrior = ScenePrior()


def scene_prior(
    *,
    intensity: tuple[float, float] | IntensityPrior | None = None,
    separation: float = 0.0,
    cluster_size: float | None = None,
    cluster_offset: float | None = None,
    count: Sequence[float] | None = None,
    places: str = "joint",
) -> ScenePrior:
    """A checked `ScenePrior`; arguments as there, a pair of intensities is their range.

    Raises:
      ValueError: for an empty or negative range, a negative length, counts that are
        no probabilities, or an unknown law of the places.

    Example:
      >>> scene_prior(intensity=(220, 250), separation=0.5).separation
      0.5
    """
    if isinstance(intensity, tuple | list):
        low, high = intensity
        if not 0 <= low <= high < np.inf:
            raise ValueError(f"intensity must be a range 0 <= low <= high, got {intensity}")
        intensity = Uniform(float(low), float(high))
    if not 0 <= separation < np.inf:
        raise ValueError(f"separation must be finite and at least 0, got {separation}")
    if cluster_size is not None and not separation < cluster_size < np.inf:
        raise ValueError(
            f"cluster_size must be finite and above the separation, got {cluster_size}"
        )
    if cluster_offset is not None and not (
        cluster_size is not None and -np.inf < cluster_offset < np.inf
    ):
        raise ValueError(
            f"cluster_offset must be finite, and goes with a cluster_size, got {cluster_offset}"
        )
    if count is not None and not (min(count, default=-1) >= 0 and 0 < sum(count) < np.inf):
        raise ValueError(f"count must be relative probabilities, got {count}")
    if places not in PLACES:
        raise ValueError(f"unknown places {places!r}; choose one of {', '.join(PLACES)}")
    return ScenePrior(
        intensity=intensity,
        separation=float(separation),
        cluster_size=None if cluster_size is None else float(cluster_size),
        cluster_offset=None if cluster_offset is None else float(cluster_offset),
        count=None if count is None else tuple(float(p) / sum(count) for p in count),
        log_free_share=(0.0,)
        if cluster_size is None
        else log_free_share(separation / cluster_size),
        places=places,
    )


def preset_prior(preset: Preset) -> ScenePrior:
    """The prior that a preset's scenes are drawn from; only the place is left open.

    The count's probabilities are those of `round(Normal(mean, std))`, clipped; that a few
    targets find no place and are dropped (2.8 % of the frames of `csist`) is neglected.

    Example:
      >>> from dscsnet_jax.physics.scene import get_preset
      >>> prior = preset_prior(get_preset("csist"))
      >>> prior.intensity.range, [round(float(p), 2) for p in prior.count]
      ((220.0, 250.0), [0.0, 0.07, 0.24, 0.38, 0.24, 0.07])
    """
    cluster = preset.cluster
    edges = np.arange(1, cluster.max_targets) + 0.5
    if cluster.count_std > 0:
        below = norm.cdf((edges - cluster.count_mean) / cluster.count_std)
    else:
        below = (np.round(cluster.count_mean) < edges).astype(float)
    share = np.diff(np.concatenate([[0], below, [1]]))
    return scene_prior(
        intensity=cluster.intensity,
        separation=cluster.separation,
        cluster_size=cluster.extent[1] - cluster.extent[0],
        cluster_offset=cluster.extent[0],
        count=(0.0, *share),
        places="sequential",
    )


def least_energy(prior: ScenePrior) -> float:
    """Energy below which a peak is no target, counts: half the least intensity, or 0.

    Example:
      >>> least_energy(scene_prior(intensity=(220, 250)))
      110.0
    """
    return 0.0 if prior.intensity is None else _LEAST_SHARE * float(prior.intensity.range[0])


@functools.lru_cache(maxsize=32)
def log_free_share(separation: float) -> tuple[float, ...]:
    """Log probability that 0, 1, 2 .. targets thrown into a unit square keep their distance.

    By Monte Carlo over 131,072 throws of a fixed seed, up to the count that no throw
    reaches, which gets the log of half a throw.

    Args:
      separation: least distance, in sides of the square.

    Example:
      >>> [round(v, 1) for v in log_free_share(0.5)[:3]]
      [0.0, 0.0, -0.7]
    """
    if separation == 0:
        return (0.0,)
    rng = np.random.default_rng(0)
    place = rng.uniform(size=(_DRAWS, 1, 2))
    shares = [1.0, 1.0]
    while len(place) and len(shares) <= _MOST:
        new = rng.uniform(size=(len(place), 1, 2))
        apart = (((place - new) ** 2).sum(-1) >= separation**2).all(1)
        place = np.concatenate([place, new], 1)[apart]
        shares.append(max(len(place), 0.5) / _DRAWS)
    return tuple(math.log(share) for share in shares)
