"""Optics: the Gaussian PSF, its response integrated over pixels, the sensing operator.

A Gaussian PSF integrated over square pixels is separable, so the response of every
detector pixel to a point at `p` is a product of two 1-D responses

    R[i, p] = (erf((i + 1/2 - p)/(s sqrt 2)) - erf((i - 1/2 - p)/(s sqrt 2))) / 2

and the sensing operator of the sub-pixel map `x` is `Phi x = R_row x R_col^T`. No
matrix of N^2 x (cN)^2 entries is ever formed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dscsnet_jax.physics import grid
from dscsnet_jax.physics.targets import Targets

_matmul = partial(jnp.einsum, precision="highest")


def point_response(
    position: ArrayLike, num_pixels: int, sigma: ArrayLike, *, axis: int = -1
) -> jax.Array:
    """Share of a point's energy along one axis that falls into each pixel.

    Args:
      position: (...,) coordinate of the points, pixels.
      num_pixels: detector pixels along the axis, `N`.
      sigma: standard deviation of the Gaussian PSF along the axis, pixels.
      axis: where the pixels' axis goes, -1 or 0.

    Returns:
      (..., N) non-negative response (or (N, ...)); sums to 1 for points well inside the
      frame.

    Example:
      >>> [round(float(v), 3) for v in point_response(1.0, 3, 0.5)]
      [0.157, 0.683, 0.157]
    """
    position = jnp.asarray(position)
    dtype = jnp.promote_types(position.dtype, jnp.float32)
    edges = pixel_edges(num_pixels, position.ndim, axis, dtype)
    position = jnp.expand_dims(position.astype(dtype), axis)
    scaled = (edges - position) / (jnp.asarray(sigma, dtype) * 2**0.5)
    # The difference of two equal erf values can round to just below zero.
    return jnp.maximum(jnp.diff(jax.lax.erf(scaled), axis=axis) / 2, 0)


def pixel_edges(num_pixels: int, ndim: int, axis: int, dtype: Any) -> jax.Array:
    """The edges of a row of pixels along an axis, -1 or 0, beside `ndim` others of length 1."""
    others = [1] * ndim
    edges = jnp.arange(num_pixels + 1, dtype=dtype) - 0.5
    return edges.reshape([*others, -1] if axis == -1 else [-1, *others])


def psf_sigma(sigma: ArrayLike | tuple[float, float]) -> jax.Array:
    """A PSF width as the pair (sigma_row, sigma_col), pixels.

    Example:
      >>> psf_sigma(0.5).tolist()
      [0.5, 0.5]
    """
    value = jnp.asarray(sigma)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        value = value.astype(jnp.float32)
    return jnp.broadcast_to(value, (2,))


def render(
    targets: Targets, *, frame_size: int | tuple[int, int], sigma: ArrayLike | tuple[float, float]
) -> jax.Array:
    """Expected frame of off-grid point targets: `y = sum_k I_k R(row_k) R(col_k)^T`.

    Exact for a Gaussian PSF integrated over square pixels.

    Args:
      targets: `Targets` of shapes (..., K, 2), (..., K), (..., K).
      frame_size: detector pixels per side, `N`, or (rows, cols).
      sigma: PSF standard deviation, pixels; a number or (sigma_row, sigma_col).

    Returns:
      (..., N, M) expected counts.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> y = render(from_lists([[(5.0, 5.0, 100.0)]]), frame_size=11, sigma=0.5)
      >>> round(float(y.sum()), 2)
      100.0
    """
    rows, cols = grid.frame_shape(frame_size)
    width = psf_sigma(sigma)
    position = jnp.asarray(targets.position)
    value = jnp.where(targets.mask, targets.intensity, 0)
    in_row = point_response(position[..., 0], rows, width[0]) * value[..., None]
    in_col = point_response(position[..., 1], cols, width[1])
    return _matmul("...ki,...kj->...ij", in_row, in_col)


@flax.struct.dataclass
class SensingOperator:
    """The sensing operator `Phi x = R_row x R_col^T` and its exact regularised inverse.

    Build it with `sensing_operator`. All products are separable: memory grows with
    N^2, not N^4. Leading axes of maps and frames are batch axes.

    Attributes:
      response_row: (N, cN) 1-D response along rows, `R_row`.
      response_col: (M, cM) 1-D response along columns, `R_col`.
      basis_row, spectrum_row: eigenvectors (N, N) and eigenvalues (N,) of
        `R_row R_row^T`; held constant under differentiation (see `solve_gram`).
      basis_col, spectrum_col: the same of `R_col R_col^T`.
      sigma: (2,) PSF standard deviations (row, col), pixels.
      division: cells per pixel side, `c`.
    """

    response_row: jax.Array
    response_col: jax.Array
    basis_row: jax.Array
    spectrum_row: jax.Array
    basis_col: jax.Array
    spectrum_col: jax.Array
    sigma: jax.Array
    division: int = flax.struct.field(pytree_node=False)

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Detector pixels (N, M)."""
        return self.response_row.shape[0], self.response_col.shape[0]

    @property
    def map_shape(self) -> tuple[int, int]:
        """Sub-pixel cells (cN, cM)."""
        return self.response_row.shape[1], self.response_col.shape[1]

    def apply(self, x: jax.Array) -> jax.Array:
        """`Phi x = R_row x R_col^T`: (..., cN, cM) map -> (..., N, M) frame, counts."""
        return _matmul("ia,...ab,jb->...ij", self.response_row, x, self.response_col)

    def adjoint(self, y: jax.Array) -> jax.Array:
        """`Phi^T y = R_row^T y R_col`: (..., N, M) frame -> (..., cN, cM) map."""
        return _matmul("ia,...ij,jb->...ab", self.response_row, y, self.response_col)

    def solve_gram(self, t: jax.Array, rho: ArrayLike) -> jax.Array:
        """`(Phi Phi^T + rho I)^-1 t` in the frame's space.

        With `R R^T = U diag(w) U^T` per axis the inverse is
        `U_row [(U_row^T t U_col) / (w_row,i w_col,j + rho)] U_col^T`. The derivative is
        that of the linear system itself (`jax.lax.custom_linear_solve`), so no
        gradient ever passes through the eigendecomposition.

        Args:
          t: (..., N, M) right-hand side.
          rho: positive penalty, a scalar.

        Returns:
          (..., N, M) solution.
        """
        gram_row = _matmul("ia,ja->ij", self.response_row, self.response_row)
        gram_col = _matmul("ia,ja->ij", self.response_col, self.response_col)
        t = jnp.asarray(t, jnp.result_type(t, self.response_row))
        rho = jnp.asarray(rho, t.dtype)
        constant = jax.lax.stop_gradient
        basis_row, basis_col = constant(self.basis_row), constant(self.basis_col)
        scale = jnp.outer(constant(self.spectrum_row), constant(self.spectrum_col)) + constant(rho)

        def matvec(s: jax.Array) -> jax.Array:
            return _matmul("ij,...jk,kl->...il", gram_row, s, gram_col) + rho * s

        def solve(_: object, b: jax.Array) -> jax.Array:
            spectral = _matmul("ji,...jk,kl->...il", basis_row, b, basis_col)
            spectral = spectral / jnp.expand_dims(scale, tuple(range(b.ndim - 2)))
            return _matmul("ij,...jk,lk->...il", basis_row, spectral, basis_col)

        return jax.lax.custom_linear_solve(matvec, t, solve, symmetric=True)

    def data_step(self, y: jax.Array, v: jax.Array, rho: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Minimiser of `1/2 ||Phi r - y||^2 + rho/2 ||r - v||^2`, exactly.

        By the push-through identity `r = v + Phi^T g` with
        `g = (Phi Phi^T + rho I)^-1 (y - Phi v)`, which needs N x N algebra only and
        gives the residual for nothing: `y - Phi r = rho g`.

        Args:
          y: (..., N, M) frame, counts.
          v: (..., cN, cM) map to stay close to.
          rho: positive penalty, a scalar.

        Returns:
          `r` (..., cN, cM) and the residual `y - Phi r` (..., N, M).
        """
        g = self.solve_gram(y - self.apply(v), rho)
        return v + self.adjoint(g), jnp.asarray(rho, g.dtype) * g

    def solve(self, b: jax.Array, rho: ArrayLike) -> jax.Array:
        """`(Phi^T Phi + rho I)^-1 b` for a (..., cN, cM) map `b` and positive `rho`.

        Example:
          >>> op = sensing_operator(5, division=3, sigma=0.5)
          >>> x = jnp.ones((15, 15))
          >>> b = op.adjoint(op.apply(x)) + 0.1 * x
          >>> bool(jnp.allclose(op.solve(b, 0.1), x, atol=1e-4))
          True
        """
        rho = jnp.asarray(rho, jnp.result_type(b, self.response_row))

        def inverse(b: jax.Array) -> jax.Array:
            return (b - self.adjoint(self.solve_gram(self.apply(b), rho))) / rho

        # The difference cancels digits when rho is small: one step of refinement.
        x = inverse(b)
        return x + inverse(b - self.adjoint(self.apply(x)) - rho * x)

    def norm(self) -> jax.Array:
        """Largest singular value of `Phi`."""
        return jnp.sqrt(self.spectrum_row[-1] * self.spectrum_col[-1])


def sensing_operator(
    frame_size: int | tuple[int, int], *, division: int, sigma: ArrayLike | tuple[float, float]
) -> SensingOperator:
    """Sensing operator of a Gaussian PSF on a grid of sub-pixel cells.

    Differentiable with respect to `sigma`.

    Args:
      frame_size: detector pixels per side, `N`, or (rows, cols).
      division: cells per pixel side, `c`; odd or even.
      sigma: PSF standard deviation, pixels; a number or (sigma_row, sigma_col).

    Returns:
      A `SensingOperator` in the precision of `sigma`.

    Raises:
      ValueError: if the frame's sides or the division are not positive.

    Example:
      >>> op = sensing_operator(11, division=3, sigma=0.5)
      >>> op.frame_shape, op.map_shape
      ((11, 11), (33, 33))
    """
    width = psf_sigma(sigma)
    shape = grid.frame_shape(frame_size)
    responses, bases, spectra = [], [], []
    for axis, side in enumerate(shape):
        centres = jnp.asarray(grid.cell_centres(side, division), width.dtype)
        response = point_response(centres, side, width[axis]).T
        gram = jax.lax.stop_gradient(_matmul("ia,ja->ij", response, response))
        spectrum, basis = jnp.linalg.eigh(gram)
        responses.append(response)
        bases.append(basis)
        spectra.append(spectrum)
    return SensingOperator(
        response_row=responses[0],
        response_col=responses[1],
        basis_row=bases[0],
        spectrum_row=spectra[0],
        basis_col=bases[1],
        spectrum_col=spectra[1],
        sigma=width,
        division=int(division),
    )
