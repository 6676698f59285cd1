"""PSFs that are sums of Gaussians: rotated ones, Moffat's, and any mixture."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jax.typing import ArrayLike

from dscsnet_jax.physics.psf import GaussianTerms, floating, require

_MOFFAT_TERMS = 10
_FEWEST_NODES, _MOST_NODES = 5, 24
_NODES = 1e-3  # correlation to the power of their number: errors of pixels are 1/20 of it


@flax.struct.dataclass
class RotatedGaussian:
    """Gaussian PSF of two widths in any direction.

    With `rho` the correlation of row and col it is the mean of Gaussians of variances
    `(1 - |rho|)` times its own, displaced along a line by a Gaussian of its own: the mean is
    taken at the nodes of Gauss-Hermite quadrature.

    Attributes:
      sigma: (2,) standard deviations along the first and the second axis, pixels.
      angle: of the first axis from the rows' towards the columns', degrees.
      num_terms: nodes; see `rotated_gaussian`.

    It is differentiable by the angle except where the axes are those of the pixels.
    """

    free: ClassVar[dict[str, str]] = {"sigma": "log", "angle": "degrees"}

    sigma: Any
    angle: Any
    num_terms: int = flax.struct.field(pytree_node=False, default=8)

    def terms(self) -> GaussianTerms:
        """Displaced Gaussians."""
        (rr, cc), rc = self._covariance()
        width = self.width
        share = jnp.abs(rc) / jnp.sqrt(rr * cc)
        nodes, weights = np.polynomial.hermite_e.hermegauss(self.num_terms)
        node = jnp.asarray(nodes, width.dtype)
        weight = jnp.asarray(weights / weights.sum(), width.dtype)
        sign = jnp.stack([jnp.ones_like(rc), jnp.where(rc < 0, -1, 1).astype(rc.dtype)])
        offset = node[:, None] * (_root(share) * sign * width)[None]
        sigma = jnp.broadcast_to((jnp.sqrt(1 - share) * width)[None], offset.shape)
        return GaussianTerms(weight, offset, sigma)

    @property
    def width(self) -> jax.Array:
        """(2,) standard deviations of row and col, pixels."""
        return jnp.sqrt(self._covariance()[0])

    def widened(self, factor: ArrayLike) -> RotatedGaussian:
        """As much wider."""
        return RotatedGaussian(floating(self.sigma) * factor, self.angle, self.num_terms)

    def _covariance(self) -> tuple[jax.Array, jax.Array]:
        """(2,) variances of row and col, and their covariance."""
        first, second = floating(self.sigma) ** 2
        angle = jnp.deg2rad(floating(self.angle))
        cosine, sine = jnp.cos(angle), jnp.sin(angle)
        rows = first * cosine**2 + second * sine**2
        cols = first * sine**2 + second * cosine**2
        return jnp.stack([rows, cols]), (first - second) * sine * cosine


def rotated_gaussian(sigma: tuple[float, float], angle: float) -> RotatedGaussian:
    """A `RotatedGaussian` with as many terms as its ellipticity asks for.

    Args:
      sigma: standard deviations along the first and the second axis, pixels.
      angle: of the first axis from the rows' towards the columns', degrees.

    Raises:
      ValueError: if a width is not positive, or so many terms would be needed that it is better
        given as an array.

    Example:
      >>> rotated_gaussian((0.45, 0.6), 30).num_terms
      5
    """
    lengths = tuple(map(float, sigma))
    positive = len(lengths) == 2 and all(0 < length < math.inf for length in lengths)
    require(positive, f"sigma {sigma} of a rotated Gaussian: must be two positive widths in pixels")
    first, second = (length**2 for length in lengths)
    twice = 2 * math.radians(angle)
    rc = (first - second) * math.sin(twice) / 2
    half = (first - second) * math.cos(twice) / 2
    rho = abs(rc) / math.sqrt((first / 2 + second / 2) ** 2 - half**2)
    nodes = math.ceil(math.log(_NODES) / math.log(rho)) if rho > _NODES else 1
    require(
        nodes <= _MOST_NODES, f"sigma {sigma} at {angle} degrees: too long, give it as an array"
    )
    return RotatedGaussian(lengths, float(angle), max(nodes, _FEWEST_NODES))


@flax.struct.dataclass
class Moffat:
    """Moffat's PSF `(1 + (r / a)^2)^-beta`, which has the wings of seeing and scattered light.

    It is a mean of round Gaussians whose inverse variances have a gamma distribution, taken by
    the trapezoidal rule over their logarithm: to 1e-4 of the light in a pixel from beta 2 upwards.

    Attributes:
      fwhm: full width at half maximum, `2 a sqrt(2^(1 / beta) - 1)`, pixels.
      beta: power of the wings, above 1.

    Example:
      >>> round(float(Moffat(1.2, beta=2.5).width[0]), 2)
      0.71

    References:
      A. F. J. Moffat, Astron. Astrophys. 3 (1969) 455.
    """

    free: ClassVar[dict[str, str]] = {"fwhm": "log", "beta": "above_one"}

    fwhm: Any
    beta: Any = 2.5

    def terms(self) -> GaussianTerms:
        """Round Gaussians from the core to the wings."""
        fwhm, beta = (floating(v) for v in (self.fwhm, self.beta))
        scale = fwhm / 2 / jnp.sqrt(2 ** (1 / beta) - 1)
        power = beta - 1
        # Logarithms of inverse variances around that of their mean.
        low, high = -6.7 / jnp.sqrt(power), 0.25 + 1.6 / jnp.sqrt(power)
        share = jnp.linspace(0, 1, _MOFFAT_TERMS, dtype=power.dtype)
        inverse = power * jnp.exp(low + (high - low) * share)
        log_weight = power * jnp.log(inverse) - inverse - gammaln(power)
        sigma = scale / jnp.sqrt(2 * inverse)
        return _round_terms(jax.nn.softmax(log_weight), sigma)

    @property
    def width(self) -> jax.Array:
        """(2,) standard deviation of a Gaussian of the same effective area, pixels."""
        return _equivalent_width(self.terms())

    def widened(self, factor: ArrayLike) -> Moffat:
        """As much wider."""
        return Moffat(floating(self.fwhm) * factor, self.beta)


@flax.struct.dataclass
class GaussianMixture:
    """A sum of Gaussian PSFs.

    Attributes:
      weight: (R,) relative shares of the light, positive.
      sigma: (R,) standard deviations, or (R, 2) of row and col, pixels.
      offset: (R, 2) of their centres from that of the PSF, pixels; None: none.

    Example:
      >>> core_and_halo = GaussianMixture((0.8, 0.2), (0.5, 1.2))
      >>> round(float(core_and_halo.width[0]), 2)
      0.58
    """

    free: ClassVar[dict[str, str]] = {"weight": "shares", "sigma": "log"}

    weight: Any
    sigma: Any
    offset: Any = None

    def terms(self) -> GaussianTerms:
        """Its Gaussians."""
        weight, sigma = (floating(v) for v in (self.weight, self.sigma))
        weight = weight / weight.sum()
        if sigma.ndim == 1:
            sigma = jnp.stack([sigma, sigma], -1)
        offset = jnp.zeros_like(sigma) if self.offset is None else floating(self.offset)
        return GaussianTerms(weight, offset, sigma)

    @property
    def width(self) -> jax.Array:
        """(2,) standard deviation of a Gaussian of the same effective area, pixels."""
        return _equivalent_width(self.terms())

    def widened(self, factor: ArrayLike) -> GaussianMixture:
        """As much wider."""
        offset = None if self.offset is None else floating(self.offset) * factor
        return GaussianMixture(self.weight, floating(self.sigma) * factor, offset)


def _round_terms(weight: jax.Array, sigma: jax.Array) -> GaussianTerms:
    centred = jnp.zeros((len(sigma), 2), sigma.dtype)
    return GaussianTerms(weight, centred, jnp.stack([sigma, sigma], -1))


def _equivalent_width(terms: GaussianTerms) -> jax.Array:
    """(2,) width of the round Gaussian whose square has the same integral, `1 / (4 pi s^2)`."""
    apart = terms.offset[:, None] - terms.offset[None]
    variance = terms.sigma[:, None] ** 2 + terms.sigma[None] ** 2
    overlap = jnp.exp(-(apart**2) / variance / 2) / jnp.sqrt(2 * np.pi * variance)
    pair = terms.weight[:, None] * terms.weight[None] * overlap.prod(-1)
    return jnp.broadcast_to(jnp.sqrt(1 / (4 * np.pi * pair.sum())), (2,))


def _root(value: jax.Array) -> jax.Array:
    """Square root, whose derivative at 0 is 0."""
    return jnp.where(value > 0, jnp.sqrt(jnp.where(value > 0, value, 1)), 0)
