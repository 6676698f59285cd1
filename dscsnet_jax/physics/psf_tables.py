"""PSFs whose terms are tabulated, and any PSF given as an array.

A profile along an axis is a cubic spline with knots a fraction of a pixel apart: its second
derivative is continuous, and its cost does not depend on the optics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy.interpolate import make_interp_spline

from dscsnet_jax.physics.psf import require

_KINDS = ("optical", "effective")
_MOST_TERMS = 12  # of an array
_MARGIN = 4  # values beyond an array, over which its spline fades
_KNOTS = 6  # per pixel at least
_NARROWEST = 0.2  # pixels, the least width an array is taken to have


@flax.struct.dataclass
class TabulatedTerms:
    """Splines along the axes, of profiles which are integrated over pixels already.

    With `B` the cubic B-spline, pixel `i` of a point at `p` gets

        f_r(i - p) = sum_k table[r, k] B((i - p - offset) over - k),  k = 0 in the middle.

    All pixels of a point lie alike between their knots: it needs `over + 3` weights only.

    Attributes:
      table: (2, R, Q) coefficients along the rows and along the columns.
      offset: (2,) place of the middle of the table from the centre of the PSF, pixels.
      over: knots per pixel.

    References:
      M. Unser, IEEE Signal Process. Mag. 16(6) (1999) 22.
    """

    table: jax.Array
    offset: jax.Array
    over: int = flax.struct.field(pytree_node=False)

    def responses(
        self, axis: int, place: jax.Array, num_pixels: int, *, order: int = 0
    ) -> jax.Array:
        """See `Terms.responses`.

        Example:
          >>> terms = empirical([[0, 1, 0], [1, 4, 1], [0, 1, 0]], oversampling=1).terms()
          >>> rows, cols = (terms.responses(axis, jnp.array(1.0), 3) for axis in (0, 1))
          >>> [round(float(v), 3) for v in (rows.T @ cols)[1]]
          [0.125, 0.5, 0.125]
        """
        place = jnp.asarray(place)
        dtype = jnp.promote_types(place.dtype, jnp.float32)
        apart = -place.astype(dtype) - self.offset[axis].astype(dtype)
        whole = jnp.floor(apart)

        def along_first(values: np.ndarray) -> jax.Array:
            return jnp.asarray(values, dtype).reshape(-1, *(1,) * place.ndim)

        knot = along_first(np.arange(-1, self.over + 2))
        weight = _bspline((apart - whole)[None] * self.over - knot, order) * (-self.over) ** order
        table, first = self._by_pixel(axis)
        shares = jnp.einsum("rsn,n...->rs...", table.astype(dtype), weight, precision="highest")
        pixel = whole[None] + along_first(np.arange(num_pixels) - first)
        pixel = jnp.clip(pixel, 0, table.shape[1] - 1).astype(jnp.int32)
        # Term by term, as XLA lays out a gather of all with the terms last, which is slow to read.
        return jnp.stack([jnp.take_along_axis(share, pixel, 0, mode="clip") for share in shares])

    def _by_pixel(self, axis: int) -> tuple[jax.Array, int]:
        """(R, S, over + 3) coefficients that reach each of S pixels, and which one is the first.

        None reach the first and the last, which stand for all pixels farther away.
        """
        length, over = self.table.shape[-1], self.over
        middle = length // 2
        first, last = (-middle - 2) // over - 1, (length - middle + 1) // over + 1
        before, after = 1 - over * first - middle, over * (last + 1) + 2 + middle - length
        padded = jnp.pad(self.table[axis], ((0, 0), (before, after)))
        start = over * np.arange(last - first + 1)
        return padded[:, start[:, None] + np.arange(over + 3)], first


@flax.struct.dataclass
class Empirical:
    """A PSF given as an array; see `empirical`.

    Attributes:
      table, offset, over: as of `TabulatedTerms`.
      scale: how many times wider the PSF is made than it was given.
    """

    free: ClassVar[dict[str, str]] = {"scale": "log"}

    table: jax.Array
    offset: jax.Array
    scale: Any
    over: int = flax.struct.field(pytree_node=False)

    def terms(self) -> TabulatedTerms:
        """The splines, or splines through wider ones at the same knots."""
        length = self.table.shape[-1]
        knot, again, scale = (
            jnp.asarray(a, self.table.dtype)
            for a in (np.arange(length) - length // 2, _coefficients(length), self.scale)
        )
        source = knot[None] / scale + (self.offset * self.over * (1 / scale - 1))[:, None]
        weight = _bspline(source[:, :, None] - knot[None, None], 0) / scale
        table = jnp.einsum("arq,ajq,kj->ark", self.table, weight, again, precision="highest")
        return TabulatedTerms(table, self.offset, self.over)

    @property
    def width(self) -> jax.Array:
        """(2,) standard deviation of a Gaussian of the same effective area, pixels.

        The variance of a pixel's box, 1 / 12, is taken off.
        """
        rows, cols = (self.table[..., :-2] + 4 * self.table[..., 1:-1] + self.table[..., 2:]) / 6
        alike = [jnp.matmul(a, a.T, precision="highest") for a in (rows, cols)]
        sharpness = jnp.sum(alike[0] * alike[1]) / self.over**2
        variance = jnp.asarray(self.scale, self.table.dtype) ** 2 / (4 * np.pi * sharpness) - 1 / 12
        return jnp.broadcast_to(jnp.sqrt(jnp.maximum(variance, _NARROWEST**2)), (2,))

    def widened(self, factor: ArrayLike) -> Empirical:
        """About as much wider: the pixels that see it widen too, the array's square does not."""
        scale = jnp.asarray(self.scale, self.table.dtype) * factor
        return Empirical(self.table, self.offset, scale, self.over)


def empirical(
    array: Any,
    *,
    oversampling: int,
    centre: Sequence[float] | None = None,
    kind: str = "optical",
    tolerance: float = 1e-5,
) -> Empirical:
    """A PSF from an array of values a fraction of a pixel apart.

    Args:
      array: (H, W), up to a common factor; there is no light outside.
      oversampling: values per pixel along each axis. For a Gaussian of 0.5 pixels 3 leave errors
        of 1e-4 of the light, 4 a tenth of that; beyond 6 only the costs grow.
      centre: (row, col) index of the point in the array, may be fractional; None: its middle.
      kind: "optical": each value is the light in a small cell, as optics programs tell;
        "effective": in a whole pixel around that place, as measured on stars (the effective
        PSF of photutils, the pixel response function of Kepler).
      tolerance: of the light, what the terms left out may amount to in a pixel; but there are
        at most 12, since noise in an array would ask for all.

    Raises:
      ValueError: if the array cannot be a PSF, or another argument is out of range.

    Example:
      >>> psf = empirical([[0, 1, 0], [1, 4, 1], [0, 1, 0]], oversampling=1)
      >>> rows, cols = (psf.terms().responses(axis, jnp.array(1.0), 3) for axis in (0, 1))
      >>> jnp.abs(rows.T @ cols).round(3).tolist()
      [[0.0, 0.125, 0.0], [0.125, 0.5, 0.125], [0.0, 0.125, 0.0]]

    References:
      J. Anderson, I. R. King, Publ. Astron. Soc. Pac. 112 (2000) 1360.
    """
    whole = oversampling >= 1 and oversampling % 1 == 0
    require(whole, f"oversampling {oversampling} of a PSF: must be a positive whole number")
    require(kind in _KINDS, f"kind {kind!r} of a PSF array: must be one of {', '.join(_KINDS)}")
    over = int(oversampling)
    values, place = _checked(np.asarray(array, float), centre, over)
    if kind == "optical":
        # Sums of whole cells: for an even number the middle of a pixel is an edge of cells.
        for axis in (0, 1):
            values = np.apply_along_axis(np.convolve, axis, values, np.ones(over))
        place = place + (over - 1) / 2
    finer = math.ceil(_KNOTS / over)
    profiles = _separated(values * over**2 / values.sum(), tolerance)
    samples = np.stack([_resampled(a, max(values.shape), finer) for a in profiles])
    length = samples.shape[-1]
    table = jnp.asarray(samples @ _coefficients(length).T)
    offset = jnp.asarray((length // 2 / finer - _MARGIN - place) / over)
    return Empirical(table, offset, 1.0, finer * over)


def _bspline(x: jax.Array, order: int) -> jax.Array:
    """The cubic B-spline with knots 1 apart, or a derivative by `x`."""
    far = jnp.where(x < 0, -x, x)  # unlike |x| it has a second derivative at 0
    outer, inner = jnp.maximum(2 - far, 0), jnp.maximum(1 - far, 0)
    if order == 0:
        return (outer**3 - 4 * inner**3) / 6
    if order == 1:
        slope = 2 * inner**2 - outer**2 / 2
        return jnp.where(x < 0, -slope, slope)
    return outer - 4 * inner


@lru_cache
def _coefficients(length: int) -> np.ndarray:
    """(Q, Q) matrix that makes coefficients of cubic B-splines of their values at the knots."""
    beside = np.eye(length, k=1) + np.eye(length, k=-1)
    return np.linalg.inv((4 * np.eye(length) + beside) / 6)


def _checked(
    values: np.ndarray, centre: Sequence[float] | None, over: int
) -> tuple[np.ndarray, np.ndarray]:
    """The array of a PSF and the (2,) index of the point in it, if they can be such."""
    what = f"PSF array of shape {values.shape}"
    require(values.ndim == 2, f"{what}: must have two axes, rows and columns")
    require(min(values.shape) >= over, f"{what}: must span a pixel, {over} values along each axis")
    bad = np.argwhere(~np.isfinite(values)).tolist()
    require(not bad, f"{what} has a NaN or an infinity at {next(iter(bad), '')}: must be finite")
    require(values.sum() > 0, f"{what} adds up to {values.sum():g}: light must be positive")
    last = np.array(values.shape) - 1
    odd = centre is not None or not (last % 2).any()
    require(odd, f"{what} has an even side: tell the centre, (row, col) of the point")
    place = last / 2 if centre is None else np.asarray(centre, float)
    inside = place.shape == (2,) and bool(((place >= 0) & (place <= last)).all())
    require(inside, f"centre {centre} of a PSF array: must be within [0, 0] and {last.tolist()}")
    return values, place


def _separated(values: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """(R, H) and (R, W) profiles, the fewest whose products add up to an array."""
    rows, share, cols = np.linalg.svd(values, full_matrices=False)
    rows = (rows * share).T
    for num in range(1, min(_MOST_TERMS, len(share)) + 1):
        if np.abs(values - rows[:num].T @ cols[:num]).max() <= tolerance:
            break
    return rows[:num], cols[:num]


def _resampled(samples: np.ndarray, length: int, finer: int) -> np.ndarray:
    """Profiles among margins, with so many samples for each given one, by splines of degree 5."""
    padded = np.pad(samples, ((0, 0), (_MARGIN, _MARGIN + length - samples.shape[1])))
    place = np.arange(padded.shape[1])
    finely = np.arange(finer * (len(place) - 1) + 1) / finer
    return make_interp_spline(place, padded, k=5, axis=1)(finely)
