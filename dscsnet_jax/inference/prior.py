"""Prior: what is known of a scene before a frame is seen; what is not given is not assumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm

from dscsnet_jax.inference.intensity import IntensityPrior, Uniform
from dscsnet_jax.physics.scene import Preset

PLACES = ("joint", "sequential")
_LEAST_SHARE = 0.5  # of the least intensity


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
    count: Any = None
    places: str = flax.struct.field(pytree_node=False, default="joint")

    def log_count(self, number: jax.Array, dtype: Any) -> jax.Array:
        """(...,) `log p(n)` of numbers of targets; -inf for those that are excluded."""
        if self.count is None:
            return jnp.zeros(number.shape, dtype)
        share = jnp.stack([jnp.asarray(p, dtype) for p in self.count])
        index = jnp.minimum(number, share.shape[0] - 1)
        chance = jnp.where(number < share.shape[0], share[index], 0)
        return jnp.where(chance > 0, jnp.log(jnp.where(chance > 0, chance, 1)), -jnp.inf)


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
    if count is not None and not (min(count, default=-1) >= 0 and 0 < sum(count) < np.inf):
        raise ValueError(f"count must be relative probabilities, got {count}")
    total = 1.0 if count is None else float(sum(count))
    total = 1.0 if abs(total - 1) < 1e-9 else total  # what is read back stays as it is
    if places not in PLACES:
        raise ValueError(f"unknown places {places!r}; choose one of {', '.join(PLACES)}")
    return ScenePrior(
        intensity=intensity,
        separation=float(separation),
        cluster_size=None if cluster_size is None else float(cluster_size),
        cluster_offset=None if cluster_offset is None else float(cluster_offset),
        count=None if count is None else tuple(float(p) / total for p in count),
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
