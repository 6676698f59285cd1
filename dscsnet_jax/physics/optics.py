"""Optics: expected frames of off-grid targets, and the sensing operator of a sub-pixel map.

A PSF is a sum of separable terms (`psf`), and so is the sensing operator of the sub-pixel map `x`:

    Phi x = sum_r R_r x C_r^T

with `R_r` and `C_r` the responses of the pixels along rows and columns to points at the cells'
centres. No matrix of N^2 x (cN)^2 entries is ever formed.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dscsnet_jax.physics import grid
from dscsnet_jax.physics.psf import Gaussian, Psf, as_psf
from dscsnet_jax.physics.targets import Targets

_matmul = functools.partial(jnp.einsum, precision="highest")
_POWER_STEPS = 64  # of the operator's norm, where there are several terms
_CG_STEPS, _CG_TOLERANCE, _CG_FAILED = 200, 1e-6, 1e-3


def render(
    targets: Targets,
    *,
    frame_size: int | tuple[int, int],
    psf: Psf | ArrayLike | tuple[float, float],
) -> jax.Array:
    """Expected frame of off-grid point targets: `y = sum_k I_k h(row_k, col_k)`.

    Args:
      targets: `Targets` of shapes (..., K, 2), (..., K), (..., K).
      frame_size: detector pixels per side, `N`, or (rows, cols).
      psf: a `Psf`; a number or a pair are the widths of a Gaussian one, pixels.

    Returns:
      (..., N, M) expected counts, exact as far as the PSF's terms are.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> y = render(from_lists([[(5.0, 5.0, 100.0)]]), frame_size=11, psf=0.5)
      >>> round(float(y.sum()), 2)
      100.0
    """
    rows, cols = grid.frame_shape(frame_size)
    terms, position = as_psf(psf).terms(), jnp.asarray(targets.position)
    value = jnp.where(targets.mask, targets.intensity, 0)
    in_row = terms.responses(0, position[..., 0], rows)
    in_col = terms.responses(1, position[..., 1], cols)
    return _matmul("ri...k,rj...k->...ij", in_row * value[None, None], in_col)


@flax.struct.dataclass
class SensingOperator:
    """The sensing operator `Phi x = sum_r R_r x C_r^T` and its regularised inverse.

    Build it with `sensing_operator`. All products are separable: memory grows with
    N^2, not N^4. Leading axes of maps and frames are batch axes.

    Attributes:
      response_row: (R, N, cN) 1-D responses along rows, `R_r`.
      response_col: (R, M, cM) 1-D responses along columns, `C_r`.
      basis_row, spectrum_row: eigenvectors (N, N) and eigenvalues (N,) of `R_row R_row^T`; of
        several terms those of the Gaussian PSF that is much like it. Held constant under
        differentiation (see `solve_gram`).
      basis_col, spectrum_col: the same of `R_col R_col^T`.
      psf: the `Psf`.
      division: cells per pixel side, `c`.
    """

    response_row: jax.Array
    response_col: jax.Array
    basis_row: jax.Array
    spectrum_row: jax.Array
    basis_col: jax.Array
    spectrum_col: jax.Array
    psf: Any
    division: int = flax.struct.field(pytree_node=False)

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Detector pixels (N, M)."""
        return self.response_row.shape[1], self.response_col.shape[1]

    @property
    def map_shape(self) -> tuple[int, int]:
        """Sub-pixel cells (cN, cM)."""
        return self.response_row.shape[2], self.response_col.shape[2]

    @property
    def num_terms(self) -> int:
        """Separable terms, `R`."""
        return self.response_row.shape[0]

    def apply(self, x: jax.Array) -> jax.Array:
        """`Phi x = sum_r R_r x C_r^T`: (..., cN, cM) map -> (..., N, M) frame, counts."""
        return self._sum_of_terms("ia,...ab,jb->...ij", x)

    def adjoint(self, y: jax.Array) -> jax.Array:
        """`Phi^T y = sum_r R_r^T y C_r`: (..., N, M) frame -> (..., cN, cM) map."""
        return self._sum_of_terms("ia,...ij,jb->...ab", y)

    def matrix(self) -> jax.Array:
        """`Phi` as a matrix (NM, cN cM), for small frames."""
        return functools.reduce(operator.add, map(jnp.kron, self.response_row, self.response_col))

    def _sum_of_terms(self, product: str, image: jax.Array) -> jax.Array:
        pairs = zip(self.response_row, self.response_col, strict=True)
        images = (_matmul(product, row, image, col) for row, col in pairs)
        return functools.reduce(operator.add, images)

    def solve_gram(self, t: jax.Array, rho: ArrayLike) -> jax.Array:
        """`(Phi Phi^T + rho I)^-1 t` in the frame's space.

        With one term and `R R^T = U diag(w) U^T` per axis the inverse is
        `U_row [(U_row^T t U_col) / (w_row,i w_col,j + rho)] U_col^T`, exactly. With several it
        is found by conjugate gradients, which that of a Gaussian PSF preconditions: to a relative
        residual of 1e-6 or what rounding leaves of it, and NaN where 1e-3 is not reached. The
        derivative is that of the linear system itself (`jax.lax.custom_linear_solve`), so no
        gradient ever passes through the eigendecomposition or the iterations.

        Args:
          t: (..., N, M) right-hand side.
          rho: positive penalty, a scalar.

        Returns:
          (..., N, M) solution.
        """
        t = jnp.asarray(t, jnp.result_type(t, self.response_row))
        rho = jnp.asarray(rho, t.dtype)
        constant = jax.lax.stop_gradient
        basis_row, basis_col = constant(self.basis_row), constant(self.basis_col)
        scale = jnp.outer(constant(self.spectrum_row), constant(self.spectrum_col)) + constant(rho)

        def separable(b: jax.Array) -> jax.Array:
            spectral = _matmul("ji,...jk,kl->...il", basis_row, b, basis_col)
            spectral = spectral / jnp.expand_dims(scale, tuple(range(b.ndim - 2)))
            return _matmul("ij,...jk,lk->...il", basis_row, spectral, basis_col)

        alone = self.num_terms == 1
        gram_row, gram_col = (
            _matmul("ia,ja->ij", r[0], r[0]) for r in (self.response_row, self.response_col)
        )

        def matvec(s: jax.Array) -> jax.Array:
            if alone:
                return _matmul("ij,...jk,kl->...il", gram_row, s, gram_col) + rho * s
            return self.apply(self.adjoint(s)) + rho * s

        def solve(matvec: Any, b: jax.Array) -> jax.Array:
            return separable(b) if alone else _conjugate_gradients(matvec, b, separable)

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
          >>> op = sensing_operator(5, division=3, psf=0.5)
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
        """Largest singular value of `Phi`; of several terms by power iteration."""
        if self.num_terms == 1:
            return jnp.sqrt(self.spectrum_row[-1] * self.spectrum_col[-1])
        start = jnp.outer(self.basis_row[:, -1], self.basis_col[:, -1])

        def step(_: int, y: jax.Array) -> jax.Array:
            y = self.apply(self.adjoint(y))
            return y / jnp.linalg.norm(y)

        return jnp.linalg.norm(self.adjoint(jax.lax.fori_loop(0, _POWER_STEPS, step, start)))


def sensing_operator(
    frame_size: int | tuple[int, int],
    *,
    division: int,
    psf: Psf | ArrayLike | tuple[float, float],
) -> SensingOperator:
    """Sensing operator of a PSF on a grid of sub-pixel cells.

    Differentiable with respect to the PSF's parameters.

    Args:
      frame_size: detector pixels per side, `N`, or (rows, cols).
      division: cells per pixel side, `c`; odd or even.
      psf: a `Psf`; a number or a pair are the widths of a Gaussian one, pixels.

    Returns:
      A `SensingOperator` in the precision of the PSF.

    Raises:
      ValueError: if the frame's sides or the division are not positive.

    Example:
      >>> op = sensing_operator(11, division=3, psf=0.5)
      >>> op.frame_shape, op.map_shape
      ((11, 11), (33, 33))
    """
    given: Psf = jax.tree.map(jnp.asarray, as_psf(psf))
    responses = _responses(given, grid.frame_shape(frame_size), division)
    nearest = responses
    if len(responses[0]) > 1:
        alike = Gaussian(jax.lax.stop_gradient(given.width))
        nearest = _responses(alike, grid.frame_shape(frame_size), division)
    spectra, bases = zip(*(_eigen(r[0]) for r in nearest), strict=True)
    return SensingOperator(
        response_row=responses[0],
        response_col=responses[1],
        basis_row=bases[0],
        spectrum_row=spectra[0],
        basis_col=bases[1],
        spectrum_col=spectra[1],
        psf=given,
        division=int(division),
    )


def _responses(psf: Psf, shape: tuple[int, int], division: int) -> list[jax.Array]:
    """(R, N, cN) responses along each axis of the cells' centres."""
    terms, dtype = psf.terms(), psf.width.dtype
    return [
        terms.responses(axis, jnp.asarray(grid.cell_centres(side, division), dtype), side)
        for axis, side in enumerate(shape)
    ]


def _eigen(response: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors of `R R^T`, constants under differentiation."""
    gram = jax.lax.stop_gradient(_matmul("ia,ja->ij", response, response))
    spectrum, basis = jnp.linalg.eigh(gram)
    return spectrum, basis


def _conjugate_gradients(matvec: Any, b: jax.Array, precondition: Any) -> jax.Array:
    """Solution (..., N, M) of symmetric systems, one a frame, each until its own is found."""

    def dot(x: jax.Array, y: jax.Array) -> jax.Array:
        return (x * y).sum((-2, -1), keepdims=True)

    limit = _CG_TOLERANCE**2 * dot(b, b)

    def going_on(state: tuple) -> jax.Array:
        number, _, residual, *_ = state
        return (number < _CG_STEPS) & (dot(residual, residual) > limit).any()

    def step(state: tuple) -> tuple:
        number, x, residual, direction, product = state
        active = dot(residual, residual) > limit  # of a frame's own: others do not change it
        image = matvec(direction)
        curvature = dot(direction, image)
        length = jnp.where(active, product / jnp.where(curvature > 0, curvature, 1), 0)
        x, residual = x + length * direction, residual - length * image
        towards = precondition(residual)
        new = dot(residual, towards)
        share = jnp.where(active, new / jnp.where(product > 0, product, 1), 0)
        direction = jnp.where(active, towards + share * direction, direction)
        return number + 1, x, residual, direction, jnp.where(active, new, product)

    first = precondition(b)
    state = (jnp.zeros((), jnp.int32), jnp.zeros_like(b), b, first, dot(b, first))
    x = jax.lax.while_loop(going_on, step, state)[1]
    left = b - matvec(x)
    return jnp.where(dot(left, left) <= _CG_FAILED**2 * dot(b, b), x, jnp.nan)
