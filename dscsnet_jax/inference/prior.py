"""Prior: what is known of a scene before a frame is seen; what is not given is not assumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm

from dscsnet_jax.inference.alike import Alike, AnyIntensity
from dscsnet_jax.inference.intensity import IntensityPrior, Uniform
from dscsnet_jax.physics.scene import Preset

PLACES = ("joint", "sequential")
_LEAST_SHARE = 0.5  # of the least intensity
_SPREAD = 1.0  # PSF widths
_MEAN_COUNT = 3.0  # up to five targets as likely as if any number were, more of them less


@flax.struct.dataclass
class Poisson:
    """Numbers of targets that know nothing of each other, `mean` expected; any is possible.

    Example:
      >>> Poisson(3.0).mean
      3.0
    """

    mean: Any

    def checked(self) -> Poisson:
        """Itself.

        Raises:
          ValueError: for a mean that is not positive.
        """
        if not 0 < self.mean < np.inf:
            raise ValueError(f"the mean count must be positive and finite, got {self.mean}")
        return self

    def log_count(self, number: jax.Array, dtype: Any) -> jax.Array:
        """(...,) `log p(n)`."""
        number = number.astype(dtype)
        log_mean = jnp.log(jnp.asarray(self.mean, dtype))
        return number * log_mean - self.mean - jax.lax.lgamma(number + 1)


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
      spread: how far a cluster's targets are from its centre, in widths of the PSF, where no size
        is told (`inference.clustered`); None: uniform.
      count: (n,) probabilities of 0, 1, 2 .. targets, 0 for more; or `Poisson`; None: any count.
      places: `joint`: all places that keep the separation are as likely; `sequential`:
        each target is placed, after the ones before, uniformly in what is free.

    Example:
      >>> ScenePrior().separation  # `scene_prior` makes and checks others
      0.0
    """

    intensity: IntensityPrior | None = None
    separation: Any = 0.0
    cluster_size: Any = None
    cluster_offset: Any = None
    spread: Any = None
    count: Any = None
    places: str = flax.struct.field(pytree_node=False, default="joint")

    def log_count(self, number: jax.Array, dtype: Any) -> jax.Array:
        """(...,) `log p(n)` of numbers of targets; -inf for those that are excluded."""
        if self.count is None:
            return jnp.zeros(number.shape, dtype)
        if isinstance(self.count, Poisson):
            return self.count.log_count(number, dtype)
        share = jnp.stack([jnp.asarray(p, dtype) for p in self.count])
        index = jnp.minimum(number, share.shape[0] - 1)
        chance = jnp.where(number < share.shape[0], share[index], 0)
        return jnp.where(chance > 0, jnp.log(jnp.where(chance > 0, chance, 1)), -jnp.inf)


def scene_prior(
    *,
    intensity: tuple[float, float] | IntensityPrior | AnyIntensity | None = None,
    separation: float = 0.0,
    cluster_size: float | None = None,
    cluster_offset: float | None = None,
    spread: float | None = None,
    count: Sequence[float] | Poisson | None = None,
    places: str = "joint",
) -> ScenePrior:
    """A checked `ScenePrior`; arguments as there, a pair of intensities is their range.

    Raises:
      ValueError: for an empty or negative range, a density that is none, a negative length,
        counts that are no probabilities, or an unknown law of the places.

    Example:
      >>> scene_prior(intensity=(220, 250), separation=0.5).separation
      0.5
    """
    if isinstance(intensity, tuple | list):
        intensity = Uniform(*map(float, intensity))
    if intensity is not None:
        intensity = intensity.checked()
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
    if spread is not None and not (0 < spread < np.inf and cluster_size is None and not separation):
        raise ValueError(
            "spread must be finite and above 0, and goes with neither a separation nor a "
            f"cluster_size, got {spread}"
        )
    if places not in PLACES:
        raise ValueError(f"unknown places {places!r}; choose one of {', '.join(PLACES)}")
    return ScenePrior(
        intensity=intensity,  # type: ignore[arg-type]  # `AnyIntensity` is for `unmix` alone
        separation=float(separation),
        cluster_size=None if cluster_size is None else float(cluster_size),
        cluster_offset=None if cluster_offset is None else float(cluster_offset),
        spread=None if spread is None else float(spread),
        count=count.checked() if isinstance(count, Poisson) else _probabilities(count),
        places=places,
    )


def _probabilities(count: Sequence[float] | None) -> tuple[float, ...] | None:
    if count is None:
        return None
    if not (min(count, default=-1) >= 0 and 0 < sum(count) < np.inf):
        raise ValueError(f"count must be relative probabilities, got {count}")
    total = float(sum(count))
    total = 1.0 if abs(total - 1) < 1e-9 else total  # what is read back stays as it is
    return tuple(float(p) / total for p in count)


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


def weak_prior(told: ScenePrior) -> ScenePrior:
    """What is assumed of one frame alone, where nothing is told of the intensities.

    Those of a cluster are alike within a factor, on any scale (`Alike`). Where nothing is told
    of the places either, targets are near to each other in units of the PSF's width (`spread`);
    where nothing is told of their number, it is that of `Poisson`. `AnyIntensity` is told.

    Example:
      >>> weak_prior(ScenePrior()).intensity
      Alike(log_std=0.6, scale_log_std=2.0)
    """
    if told.intensity is not None:
        return told
    free = told.cluster_size is None and np.ndim(told.separation) == 0 and told.separation == 0
    return dataclasses.replace(
        told,
        intensity=Alike(),
        spread=_SPREAD if free and told.spread is None else told.spread,
        count=Poisson(_MEAN_COUNT) if told.count is None else told.count,
    )


def strictly_told(prior: ScenePrior) -> ScenePrior:
    """The prior without what `weak_prior` may assume, so that it can be learned.

    Example:
      >>> strictly_told(weak_prior(ScenePrior())) == ScenePrior()
      True
    """
    weak = isinstance(prior.intensity, Alike | AnyIntensity)
    return dataclasses.replace(
        prior,
        intensity=None if weak else prior.intensity,
        spread=None,
        count=None if isinstance(prior.count, Poisson) else prior.count,
    )


def least_energy(prior: ScenePrior) -> float:
    """Energy below which a peak is no target, counts: half the least intensity, or 0.

    Example:
      >>> least_energy(scene_prior(intensity=(220, 250)))
      110.0
    """
    return 0.0 if prior.intensity is None else _LEAST_SHARE * float(prior.intensity.range[0])
