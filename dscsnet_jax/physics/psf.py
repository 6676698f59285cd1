"""PSF: the light of a point on the pixels, for any optics: the seam that every part uses.

A PSF is a pytree of its parameters which tells its terms: each a product of a profile along the
rows and one along the columns, integrated over pixels,

    h[i, j](row, col) = sum_r f_r[i](row) g_r[j](col)

so that images, derivatives and the sensing operator are sums of a few separable products.
Here is the Gaussian one; `psf_gaussians` has sums of several, `psf_tables` and `psf_airy` splines.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

_ROOT_2PI = math.sqrt(2 * math.pi)
_FAINTEST = 1e-7  # of the brightest pixel, where a PSF's light ends
_FARTHEST = 64  # pixels, or 7 widths, to which light is looked for


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

    free: ClassVar[dict[str, str]] = {"sigma": "log"}

    sigma: Any = 0.5

    def terms(self) -> GaussianTerms:
        """Itself."""
        width = self.width
        return GaussianTerms(jnp.ones(1, width.dtype), jnp.zeros((1, 2), width.dtype), width[None])

    @property
    def width(self) -> jax.Array:
        """(2,) its standard deviations, pixels."""
        return jnp.broadcast_to(floating(self.sigma), (2,))

    def widened(self, factor: ArrayLike) -> Gaussian:
        """As much wider."""
        return Gaussian(floating(self.sigma) * factor)


def as_psf(psf: Any) -> Any:
    """A PSF; a number or a pair are the widths of a Gaussian one.

    Example:
      >>> as_psf(0.5)
      Gaussian(sigma=0.5)
    """
    return psf if hasattr(psf, "terms") else Gaussian(psf)


def with_both_widths(psf: Psf) -> Psf:
    """A Gaussian with a width for each axis, other PSFs as they are: one structure, one program.

    Example:
      >>> with_both_widths(Gaussian(0.5)).sigma.tolist()
      [0.5, 0.5]
    """
    return Gaussian(psf.width) if isinstance(psf, Gaussian) else psf


def support(psf: Psf) -> int:
    """Pixels from its centre at which a PSF's light ends, below the rounding of its peak.

    Example:
      >>> support(Gaussian(0.5))
      4
    """
    far = max(_FARTHEST, math.ceil(7 * float(np.max(psf.width))))
    rows, cols = (np.asarray(along, float) for along in _profiles(psf, far))
    image = np.abs(rows.T @ cols)
    away = np.abs(np.arange(2 * far + 1) - far)
    there = image > _FAINTEST * image.max()
    return int(np.where(there, np.maximum(away[:, None], away), 0).max()) + 1


@partial(jax.jit, static_argnames="far")
def _profiles(psf: Psf, far: int) -> list[jax.Array]:
    """(R, 2 far + 1) responses along each axis, of a point in the middle."""
    terms = psf.terms()
    return [terms.responses(axis, jnp.array(float(far)), 2 * far + 1) for axis in (0, 1)]


def require(true: bool, otherwise: str) -> None:
    """Refuse what cannot be.

    Raises:
      ValueError: with that text.
    """
    if not true:
        raise ValueError(otherwise)


def floating(value: ArrayLike) -> jax.Array:
    """An array of floating point; whole numbers are float32."""
    array = jnp.asarray(value)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)
