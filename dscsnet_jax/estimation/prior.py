"""Prior: what is known of a scene before its frame is seen.

Everything is optional; what is not given is not assumed. The same prior serves the fit
(as smooth penalties), the count (as evidence) and the posterior (exactly).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm

from dscsnet_jax.physics.scene import Preset

_DRAWS = 1 << 17
_MOST = 32
_LEAST_SHARE = 0.5  # of the least intensity


@flax.struct.dataclass
class ScenePrior:
    """Knowledge of the targets of one cluster.

    Attributes:
      intensity: least and largest intensity, counts, each value as likely; None: any.
      separation: least distance of two targets, pixels; 0: none.
      extent: all targets lie within a square of this side whose place is unknown,
        pixels; None: anywhere.
      corner: the square begins at some whole pixel plus this, in row and in col; None:
        at any place.
      count: relative probabilities of 0, 1, 2 .. targets, 0 for more; None: any count.
      log_free_share: (n,) see `log_free_share`; the last holds for larger counts.
    """

    intensity: tuple[float | jax.Array, float | jax.Array] | None = None
    separation: float | jax.Array = 0.0
    extent: float | jax.Array | None = None
    corner: float | jax.Array | None = None
    count: tuple[float, ...] | None = flax.struct.field(pytree_node=False, default=None)
    log_free_share: tuple[float, ...] | jax.Array = (0.0,)

    def intensity_moments(self) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation of the intensity, counts.

        Raises:
          ValueError: if the prior has no range of intensities.
        """
        if self.intensity is None:
            raise ValueError("the prior has no range of intensities")
        low, high = (jnp.asarray(v) for v in self.intensity)
        return (low + high) / 2, (high - low) / 12**0.5


def scene_prior(
    *,
    intensity: tuple[float, float] | None = None,
    separation: float = 0.0,
    extent: float | None = None,
    corner: float | None = None,
    count: Sequence[float] | None = None,
) -> ScenePrior:
    """A checked `ScenePrior`; arguments as there.

    Raises:
      ValueError: for an empty or negative range, a negative length, or counts that are
        no probabilities.

    Example:
      >>> scene_prior(intensity=(220, 250), separation=0.5).separation
      0.5
    """
    if intensity is not None and not 0 <= intensity[0] < intensity[1] < np.inf:
        raise ValueError(f"intensity must be a range 0 <= low < high, got {intensity}")
    if not 0 <= separation < np.inf:
        raise ValueError(f"separation must be finite and at least 0, got {separation}")
    if extent is not None and not separation < extent < np.inf:
        raise ValueError(f"extent must be finite and above the separation, got {extent}")
    if corner is not None and not (extent is not None and -np.inf < corner < np.inf):
        raise ValueError(f"corner must be finite, and goes with an extent, got {corner}")
    if count is not None and not (min(count, default=-1) >= 0 and 0 < sum(count) < np.inf):
        raise ValueError(f"count must be relative probabilities, got {count}")
    return ScenePrior(
        intensity=None if intensity is None else (float(intensity[0]), float(intensity[1])),
        separation=float(separation),
        extent=None if extent is None else float(extent),
        corner=None if corner is None else float(corner),
        count=None if count is None else tuple(float(p) / sum(count) for p in count),
        log_free_share=(0.0,) if extent is None else log_free_share(separation / extent),
    )


def preset_prior(preset: Preset) -> ScenePrior:
    """The prior that a preset's scenes are drawn from; only the place is left open.

    The count's probabilities are those of `round(Normal(mean, std))`, clipped; that a few
    targets find no place and are dropped (2.8 % of the frames of `csist`) is neglected.

    Example:
      >>> from dscsnet_jax.physics.scene import get_preset
      >>> prior = preset_prior(get_preset("csist"))
      >>> prior.intensity, [round(float(p), 2) for p in prior.count]
      ((220.0, 250.0), [0.0, 0.07, 0.24, 0.38, 0.24, 0.07])
    """
    cluster = preset.cluster
    counts = np.arange(1, cluster.max_targets)
    below = norm.cdf((counts + 0.5 - cluster.count_mean) / cluster.count_std)
    share = np.diff(np.concatenate([[0], below, [1]]))
    return scene_prior(
        intensity=cluster.intensity,
        separation=cluster.separation,
        extent=cluster.extent[1] - cluster.extent[0],
        corner=cluster.extent[0],
        count=(0.0, *share),
    )


def least_energy(prior: ScenePrior) -> float:
    """Energy below which a peak is no target, counts: half the least intensity, or 0.

    Example:
      >>> least_energy(scene_prior(intensity=(220, 250)))
      110.0
    """
    return 0.0 if prior.intensity is None else _LEAST_SHARE * float(prior.intensity[0])


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
    return tuple(np.log(shares).tolist())
