"""Scene model: the one likelihood, and with `window_prior` the one prior, of fit, evidence, chains.

The parameters of a window with K slots are the vector

    theta = (row_0, col_0, v_0, row_1, ..., v_{K-1}, t),

intensities `I_k = Q(Phi(v_k))` through the quantile function `Q` of their density (without
one, `I_k = scale v_k`), and a pixel without targets expects `pedestal + background + std t`. With

    mu = level + neighbours + sum_k I_k h(row_k, col_k)

a pixel's log likelihood is that of `pixels`. Arrays have their structure in front (parameters,
rows, cols) and any further axes behind: none for one window, chains and windows for the sampler.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from dscsnet_jax.inference import pixels
from dscsnet_jax.inference.derivatives import PriorTerms, Quadratic, Shapes
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.lanes import materialised, sum_of
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.theta import parts_of, theta_of
from dscsnet_jax.inference.window_prior import WindowPrior, flat_image
from dscsnet_jax.physics.psf import Psf, Terms, as_psf, require

SOFT, HARD = 0.03, 0.0005
"""Softness of the prior's limits, pixels: for fits, which need room to move, and for chains."""


@flax.struct.dataclass
class SceneModel(WindowPrior):
    """Likelihood and prior of a window's targets; build it with `scene_model`.

    Attributes:
      terms: of the PSF.
      censors: whether any pixel of the batch is saturated; not batched, so that the
        censored likelihood costs nothing where there are none.
    """

    terms: Terms
    censors: jax.Array

    def with_psf(self, psf: Psf) -> SceneModel:
        """The same with another PSF."""
        known = dataclasses.replace(self.known, psf=psf)
        return dataclasses.replace(self, known=known, terms=psf.terms())

    def log_likelihood(self, theta: jax.Array) -> jax.Array:
        """(...,) log likelihood of the pixels, without `-1/2 log 2 pi` each."""
        source = self.source(theta)
        given = self.seen, self.known.light_noise, self.censors, source, theta[-1]
        return pixels.log_likelihood(*given) + self._log_scale

    def source(self, theta: jax.Array) -> jax.Array:
        """(N, M, ...) expected counts of the window's targets."""
        row, col, v, _ = parts_of(theta)
        in_row, in_col = self.responses(row, col)
        in_col = in_col * jnp.where(self.mask, self.intensity(v), 0)
        slots = [(r, k) for r in range(len(in_row)) for k in range(self.mask.shape[0])]
        return sum_of(in_row[r, :, None, k] * in_col[r, None, :, k] for r, k in slots)

    def variance(self, source: jax.Array, t: jax.Array | float = 0.0) -> tuple[jax.Array, Any]:
        """(N, M, ...) variance of the pixels, counts squared, and its derivative by `mu`."""
        return pixels.variance(self.seen, self.known.light_noise, source, t)

    @jax.jit  # programs ask for it in many places: it is traced once
    def quadratic(self, theta: jax.Array) -> Quadratic:
        """Cost, gradient and information at `theta`."""
        source = self.source(theta)
        given = self.seen, self.known.light_noise, self.censors, source, theta[-1]
        seen = pixels.likelihoods(*given)
        shapes, prior = materialised(self.censors, self._derivatives, theta)
        gradient, information = shapes.products(seen.slope, seen.information)
        terms = jnp.concatenate([-flat_image(seen.value), prior.cost])
        return Quadratic(
            terms.sum(0) - self._log_scale,
            prior.gradient - gradient,
            information + prior.information,
            terms,
        )

    @property
    def _log_scale(self) -> jax.Array:
        return pixels.log_scale(self.seen, self.known.effective_gain)

    def _derivatives(self, theta: jax.Array) -> tuple[Shapes, PriorTerms]:
        """Those of the expected counts, and of the prior."""
        row, col, v, _ = parts_of(theta)
        (in_row, in_col), (by_row, by_col) = (self.responses(row, col, order) for order in (0, 1))
        energy = jnp.where(self.mask, self.intensity(v), 0)
        slope = jnp.where(self.mask, self.intensity_slope(v), 0)
        one = jnp.ones_like(theta[-1])

        first = jnp.arange(len(in_row)) == 0  # the level goes with the first term

        def along(level: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
            """(R, N, 3K+1, ...) of parts (R, N, K, ...)."""
            levels = jnp.where(first.reshape(-1, 1, *(1,) * level.ndim), level[None, None], 0)
            levels = jnp.broadcast_to(levels, (*a.shape[:2], *level.shape))
            return jax.vmap(jax.vmap(theta_of))(a, b, c, levels)

        rows = by_row * energy, in_row * energy, in_row * slope
        along_row = along(one * self.seen.background_std, *rows)
        return Shapes(along_row, along(one, in_col, by_col, in_col)), self.prior_terms(theta)

    def responses(
        self, row: jax.Array, col: jax.Array, order: int = 0
    ) -> tuple[jax.Array, jax.Array]:
        """(R, N, K, ...) and (R, M, K, ...) responses along the axes, or their derivatives."""
        rows, cols = self.seen.counts.shape[:2]
        in_row = self.terms.responses(0, row, rows, order=order)
        return in_row, self.terms.responses(1, col, cols, order=order)


def scene_model(
    seen: Observation,
    mask: jax.Array,
    known: Known,
    *,
    softness: float = SOFT,
    uniform: bool = False,
) -> SceneModel:
    """The model of windows with their structure in front.

    Args:
      seen: `Observation` of (N, M, ...) pixels and (...) numbers.
      mask: (K, ...) targets present.
      known: PSF, sensor's gain and scene prior.
      softness: of the prior's limits, pixels.
      uniform: see `WindowPrior`.
    """
    require(known.psf is not None, "the scene model needs a PSF, and what is known has none")
    known = dataclasses.replace(known, psf=as_psf(known.psf))
    known = jax.tree.map(lambda a: jnp.asarray(a, seen.counts.dtype), known)
    scale, censors = pixels.all_counts(seen, known.effective_gain), seen.saturated.any()
    return SceneModel(
        seen, mask, known, scale, softness, uniform, terms=known.psf.terms(), censors=censors
    )
