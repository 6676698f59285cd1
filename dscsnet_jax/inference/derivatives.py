"""Derivatives of the scene model around a place, of windows along the last axis.

Sums are written out: the compiler's own product of small matrices takes them one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dscsnet_jax.inference.lanes import sum_leading, sum_of


class Quadratic(NamedTuple):
    """Minus the log density around a place, without the places' normalisation.

    Attributes:
      cost: minus log likelihood and prior.
      gradient: (3K+1, ...) its derivative.
      information: (3K+1, 3K+1, ...) Fisher information of the pixels and curvature of the prior.
      terms: (R, ...) what the cost adds up, but for a constant: differences of costs keep the
        digits that the sums of many pixels lose.
    """

    cost: jax.Array
    gradient: jax.Array
    information: jax.Array
    terms: jax.Array


class Shapes(NamedTuple):
    """Derivatives of the expected counts by `theta`, sums of products along rows and cols.

    Attributes:
      along_row: (R, N, 3K+1, ...) counts.
      along_col: (R, M, 3K+1, ...).
    """

    along_row: jax.Array
    along_col: jax.Array

    def products(self, slope: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`J^T slope` and `J^T weight J` for images (N, M, ...)."""
        if len(self.along_row) > 1:
            return self._of_several(slope, weight)
        rows, cols = self.along_row[0], self.along_col[0]
        number = range(cols.shape[0])
        once = sum_of(slope[:, m, None] * cols[m] for m in number)
        twice = sum_of(weight[:, m, None, None] * (cols[m][:, None] * cols[m]) for m in number)
        return sum_leading(rows * once), sum_leading(rows[:, :, None] * rows[:, None] * twice)

    def _of_several(self, slope: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`products` of several terms, whose images (N, M, 3K+1, ...) are made first."""

        def add(images: jax.Array, term: Shapes) -> tuple[jax.Array, None]:
            return images + term.along_row[:, None] * term.along_col[None], None

        none = jnp.zeros_like(self.along_row[0][:, None] * self.along_col[0][None])
        images, _ = jax.lax.scan(add, none, self)  # written out they take long to compile
        number = range(images.shape[1])
        once = sum_of(slope[:, m, None] * images[:, m] for m in number)
        twice = sum_of(
            weight[:, m, None, None] * images[:, m, :, None] * images[:, m, None] for m in number
        )
        return sum_leading(once), sum_leading(twice)


class PriorTerms(NamedTuple):
    """Minus the log prior: its terms (R, ...), gradient (3K+1, ...) and information."""

    cost: jax.Array
    gradient: jax.Array
    information: jax.Array
