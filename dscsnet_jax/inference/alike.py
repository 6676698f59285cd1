"""Alike: the prior of one frame alone, whose targets are alike within a factor, on any scale.

It is a density of all intensities of a window together; `intensity` has those of single targets.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.inference import spd
from dscsnet_jax.inference.derivatives import PriorTerms

_FARTHEST = 4.0  # standard deviations that an intensity can be off


@flax.struct.dataclass
class Alike:
    """Intensities that are alike within a factor, on any scale.

    Relative to what the window's light is for each of its `n` targets,

        log I_k - log(light / n) = scale_log_std a + log_std z_k,   a, z_k standard normal,

    so their latents `v_k = z_k + scale_log_std / log_std a` are Gaussian together, with the inverse
    covariance `W^2`, `W v = v - (1 - c) mean(v)`, `c = log_std / sqrt(log_std^2 + n
    scale_log_std^2)`.

    Example:
      >>> round(float(Alike().value(jnp.array(1.0))), 2)  # of the light for each target
      1.82
    """

    log_std: Any = 0.6
    scale_log_std: Any = 2.0

    def checked(self) -> Alike:
        """Itself.

        Raises:
          ValueError: for standard deviations that are not positive.
        """
        if not (0 < self.log_std < np.inf and 0 < self.scale_log_std < np.inf):
            raise ValueError(f"log_std and scale_log_std must be positive, got {self}")
        return self

    def value(self, v: jax.Array) -> jax.Array:
        """Relative intensity of `v`."""
        return jnp.exp(self.log_std * v)

    def slope(self, v: jax.Array) -> jax.Array:
        """`dI/dv`, relative."""
        return self.log_std * self.value(v)

    def bend(self, v: jax.Array) -> jax.Array:
        """`(d2I/dv2) / (dI/dv)`."""
        return jnp.broadcast_to(jnp.asarray(self.log_std, v.dtype), v.shape)

    def latent(self, relative: jax.Array) -> jax.Array:
        """`v` of a relative intensity, within 4 standard deviations."""
        return jnp.log(jnp.clip(relative, self.least, 1 / self.least)) / self.log_std

    @property
    def least(self) -> Any:
        """Relative intensity 4 standard deviations below the middle."""
        return jnp.exp(-_FARTHEST * jnp.sqrt(self.log_std**2 + self.scale_log_std**2))

    @property
    def range(self) -> tuple[Any, Any]:
        """Least and largest intensity, counts: any."""
        return 0.0, np.inf

    def whitened(self, v: jax.Array, mask: jax.Array) -> jax.Array:
        """(K, ...) `W v`: independent standard normal numbers of the targets present."""
        return _with_mean_times(self.determinant(mask), v, mask)

    def unwhitened(self, white: jax.Array, mask: jax.Array) -> jax.Array:
        """(K, ...) latents of such numbers."""
        return _with_mean_times(1 / self.determinant(mask), white, mask)

    def determinant(self, mask: jax.Array) -> jax.Array:
        """(...,) `c`, the determinant of `W`; 1 without targets."""
        variance = self.log_std**2
        return jnp.sqrt(variance / (variance + mask.sum(0) * self.scale_log_std**2))

    def least_share(self, mask: jax.Array) -> jax.Array:
        """(...,) least share of the light that a target can have."""
        return self.least / jnp.maximum(mask.sum(0), 1)

    def terms(self, v: jax.Array, mask: jax.Array, *, shares: bool) -> PriorTerms:
        """Of (K, ...) latents, or of shares of the light instead; (K, K, ...) information."""
        if not shares:
            white = self.whitened(v, mask)
            curvature = self.curvature(mask, v.dtype)
            return PriorTerms(white**2 / 2, self.whitened(white, mask), curvature)
        share = jnp.maximum(v, self.least_share(mask)[None])
        number = jnp.maximum(mask.sum(0), 1)
        white = self.whitened(self.latent(share * number[None]), mask)
        # The density of shares has `dv/dshare` in it, `1 / (log_std share)`.
        by = jnp.where(mask & (v >= share), 1 / share, 0)
        by_latent = by / self.log_std
        return PriorTerms(
            white**2 / 2 + jnp.where(mask, jnp.log(share), 0),
            by_latent * self.whitened(white, mask) + by,
            self.curvature(mask, v.dtype) * by_latent[:, None] * by_latent[None],
        )

    def curvature(self, mask: jax.Array, dtype: Any) -> jax.Array:
        """(K, K, ...) `W^2`."""
        present = mask.astype(dtype)
        share = (1 - self.determinant(mask) ** 2) / jnp.maximum(present.sum(0), 1)
        return spd.diagonal_matrix(present) - present[:, None] * (share[None] * present)[None]


def _with_mean_times(factor: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    v = jnp.where(mask, v, 0)
    mean = v.sum(0) / jnp.maximum(mask.sum(0), 1)
    return jnp.where(mask, v + ((factor - 1) * mean)[None], 0)


@flax.struct.dataclass
class AnyIntensity:
    """Any intensity, up to all of a window's light, and not even alike: no prior at all.

    Example:
      >>> AnyIntensity().range
      (0.0, inf)
    """

    def checked(self) -> AnyIntensity:
        """Itself."""
        return self

    @property
    def range(self) -> tuple[float, float]:
        """Least and largest intensity, counts: any."""
        return 0.0, np.inf
