"""PSF: the light of a point on the pixels, for any optics: the seam that every part uses.

A PSF is a pytree of its parameters which tells its terms: each a product of a profile along the
rows and one along the columns, integrated over pixels,

    h[i, j](row, col) = sum_r f_r[i](row) g_r[j](col)

so that images, derivatives and the sensing operator are sums of a few separable products.
Terms are Gaussian here; those of `psf_tables` and `psf_airy` are tabulated.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jax.typing import ArrayLike

_ROOT_2PI = math.sqrt(2 * math.pi)
_FAINTEST = 1e-7  # of the brightest pixel, where a PSF's light ends
_FARTHEST = 64  # pixels
_MOFFAT_TERMS = 10
_MOST_NODES = 24
_NODES = 1e-3  # correlation to the power of their number: errors of pixels are 1/20 of it


class Terms(Protocol):
    """Separable terms of a PSF, worked out from its parameters once for many points."""

    def responses(
        self, axis: int, place: jax.Array, num_pixels: int, *, order: int = 0
    ) -> jax.Array:
        """Share of the light that falls into each pixel along one axis, or its derivative.

        Args:
          axis: 0: along the rows, 1: along the columns. Their products, summed over the
            terms, are the shares of the pixels; only the sum has to be positive.
          place: (...) coordinate of the points along the axis, pixels.
          num_pixels: along the axis, `N`.
          order: of the derivative by `place`: 0, 1 or 2.

        Returns:
          (R, N, ...) for R terms, 1 / pixel^order.
        """
        ...


class Psf(Protocol):
    """Point spread function: a pytree whose leaves are its parameters.

    It integrates to 1 over the plane, and a point at (row, col) has its centre there. To add
    one, write a `flax.struct.dataclass` with these members; see CONTRIBUTING.
    """

    def terms(self) -> Terms:
        """Its separable terms; differentiable by the parameters."""
        ...

    @property
    def width(self) -> jax.Array:
        """(2,) standard deviations of a Gaussian PSF much like it, row and col, pixels."""
        ...

    def widened(self, factor: ArrayLike) -> Any:
        """The same PSF as much wider."""
        ...


@flax.struct.dataclass
class GaussianTerms:
    """Gaussians along the axes, integrated over pixels.

    With `F` the integral of a Gaussian of width `s`, pixel `i` of a point at `p` gets
    `F(i + 1/2 - p) - F(i - 1/2 - p)`.

    Attributes:
      weight: (R,) share of the light.
      offset: (R, 2) of their centres from that of the PSF, pixels.
      sigma: (R, 2) standard deviations, pixels.
    """

    weight: jax.Array
    offset: jax.Array
    sigma: jax.Array

    def responses(
        self, axis: int, place: jax.Array, num_pixels: int, *, order: int = 0
    ) -> jax.Array:
        """See `Terms.responses`.

        Example:
          >>> along = Gaussian(0.5).terms().responses(0, jnp.array(1.0), 3)
          >>> [round(float(v), 3) for v in along[0]]
          [0.157, 0.683, 0.157]
        """
        place = jnp.asarray(place)
        dtype = jnp.promote_types(place.dtype, jnp.float32)
        behind = (1,) * place.ndim

        def of_terms(values: jax.Array) -> jax.Array:
            return jnp.asarray(values, dtype).reshape(-1, 1, *behind)

        edges = (jnp.arange(num_pixels + 1, dtype=dtype) - 0.5).reshape(1, -1, *behind)
        sigma = of_terms(self.sigma[:, axis])
        off = edges - place.astype(dtype)[None, None] - of_terms(self.offset[:, axis])
        scaled = off / sigma
        if order == 0:
            # The difference of two equal erf values can round to just below zero.
            share = jnp.maximum(jnp.diff(jax.lax.erf(scaled / 2**0.5), axis=1) / 2, 0)
        else:
            density = jnp.exp(-(scaled**2) / 2) / (sigma * _ROOT_2PI)
            share = -jnp.diff(density if order == 1 else density * scaled / sigma, axis=1)
        return share * of_terms(self.weight) if axis == 0 else share


@flax.struct.dataclass
class Gaussian:
    """Gaussian PSF along the axes.

    Attributes:
      sigma: standard deviation, pixels, a number or (2,) of row and col.

    Example:
      >>> Gaussian(0.5).width.tolist()
      [0.5, 0.5]
    """

    sigma: Any = 0.5

    def terms(self) -> GaussianTerms:
        """Itself."""
        width = self.width
        return GaussianTerms(jnp.ones(1, width.dtype), jnp.zeros((1, 2), width.dtype), width[None])

    @property
    def width(self) -> jax.Array:
        """(2,) its standard deviations, pixels."""
        return jnp.broadcast_to(_floating(self.sigma), (2,))

    def widened(self, factor: ArrayLike) -> Gaussian:
        """As much wider."""
        return Gaussian(self.width * factor)


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
    """

    sigma: Any
    angle: Any
    num_terms: int = flax.struct.field(pytree_node=False, default=8)

    def terms(self) -> GaussianTerms:
        """Displaced Gaussians."""
        (rr, cc), rc = self._covariance()
        width = self.width
        share = jnp.abs(rc) / jnp.sqrt(rr * cc)
        share = jnp.where(share > 0, share, 0)
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
        return RotatedGaussian(_floating(self.sigma) * factor, self.angle, self.num_terms)

    def _covariance(self) -> tuple[jax.Array, jax.Array]:
        """(2,) variances of row and col, and their covariance."""
        first, second = _floating(self.sigma) ** 2
        angle = jnp.deg2rad(_floating(self.angle))
        cosine, sine = jnp.cos(angle), jnp.sin(angle)
        rows = first * cosine**2 + second * sine**2
        cols = first * sine**2 + second * cosine**2
        return jnp.stack([rows, cols]), (first - second) * sine * cosine


def rotated_gaussian(sigma: tuple[float, float], angle: float) -> RotatedGaussian:
    """A `RotatedGaussian` with as many terms as its ellipticity asks for.

    Example:
      >>> rotated_gaussian((0.45, 0.6), 30).num_terms
      5
    """
    first, second = (float(s) ** 2 for s in sigma)
    twice = 2 * math.radians(angle)
    rc = (first - second) * math.sin(twice) / 2
    half = (first - second) * math.cos(twice) / 2
    rho = abs(rc) / math.sqrt((first / 2 + second / 2) ** 2 - half**2)
    nodes = math.ceil(math.log(_NODES) / math.log(rho)) if rho > _NODES else 1
    return RotatedGaussian(tuple(map(float, sigma)), float(angle), min(nodes, _MOST_NODES))


@flax.struct.dataclass
class Moffat:
    """Moffat's PSF `(1 + (r / a)^2)^-beta`, which has the wings of seeing and scattered light.

    It is a mean of round Gaussians whose inverse variances have a gamma distribution, taken by
    the trapezoidal rule over their logarithm: to 1e-4 of the light in a pixel from beta 2 upwards.

    Attributes:
      fwhm: full width at half maximum, `2 a sqrt(2^(1 / beta) - 1)`, pixels.
      beta: power of the wings, above 1.

    References:
      A. F. J. Moffat, Astron. Astrophys. 3 (1969) 455.
    """

    fwhm: Any
    beta: Any = 2.5

    def terms(self) -> GaussianTerms:
        """Round Gaussians from the core to the wings."""
        fwhm, beta = (_floating(v) for v in (self.fwhm, self.beta))
        scale = fwhm / 2 / jnp.sqrt(2 ** (1 / beta) - 1)
        power = beta - 1
        # Logarithms of inverse variances around that of their mean.
        low, high = -6.7 / _root(power), 0.25 + 1.6 / _root(power)
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
        return Moffat(_floating(self.fwhm) * factor, self.beta)


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

    weight: Any
    sigma: Any
    offset: Any = None

    def terms(self) -> GaussianTerms:
        """Its Gaussians."""
        weight, sigma = (_floating(v) for v in (self.weight, self.sigma))
        weight = weight / weight.sum()
        if sigma.ndim == 1:
            sigma = jnp.stack([sigma, sigma], -1)
        offset = jnp.zeros_like(sigma) if self.offset is None else _floating(self.offset)
        return GaussianTerms(weight, offset, sigma)

    @property
    def width(self) -> jax.Array:
        """(2,) standard deviation of a Gaussian of the same effective area, pixels."""
        return _equivalent_width(self.terms())

    def widened(self, factor: ArrayLike) -> GaussianMixture:
        """As much wider."""
        offset = None if self.offset is None else _floating(self.offset) * factor
        return GaussianMixture(self.weight, _floating(self.sigma) * factor, offset)


def as_psf(psf: Any) -> Any:
    """A PSF; a number or a pair are the widths of a Gaussian one.

    Example:
      >>> as_psf(0.5)
      Gaussian(sigma=0.5)
    """
    return psf if hasattr(psf, "terms") else Gaussian(psf)


def support(psf: Psf) -> int:
    """Pixels from its centre at which a PSF's light ends, below the rounding of its peak.

    Example:
      >>> support(Gaussian(0.5))
      4
    """
    num = 2 * _FARTHEST + 1
    middle, terms = jnp.array(float(_FARTHEST)), psf.terms()
    rows, cols = (np.asarray(terms.responses(axis, middle, num), float) for axis in (0, 1))
    image = np.abs(rows.T @ cols)
    away = np.abs(np.arange(num) - _FARTHEST)
    there = image > _FAINTEST * image.max()
    return int(np.where(there, np.maximum(away[:, None], away), 0).max()) + 1


def require(true: bool, otherwise: str) -> None:
    """Refuse what cannot be.

    Raises:
      ValueError: with that text.
    """
    if not true:
        raise ValueError(otherwise)


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


def _floating(value: ArrayLike) -> jax.Array:
    """An array of floating point; whole numbers are float32."""
    array = jnp.asarray(value)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)


def _root(value: jax.Array) -> jax.Array:
    """Square root, whose derivative at 0 is 0."""
    return jnp.where(value > 0, jnp.sqrt(jnp.where(value > 0, value, 1)), 0)
