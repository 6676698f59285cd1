"""Scene model: the one place with likelihood and prior; fit, evidence and chains ask it.

The parameters of a window with K slots are the vector

    theta = (row_0, col_0, v_0, row_1, ..., v_{K-1}, t),

intensities `I_k = Q(Phi(v_k))` through the quantile function `Q` of their density (without
one, `I_k = scale v_k`), and a pixel without targets expects `pedestal + background + std t`. With

    mu = level + neighbours + sum_k I_k h(row_k, col_k),   var = noise^2 + max(photons, 0) / gain

a pixel's log likelihood is `-(y - mu)^2 / (2 var) - 1/2 log var`, and `log Phi((mu - y) / sd)`
where it is saturated. Arrays have their structure in front (parameters, rows, cols) and any
further axes behind: none for one window, chains and windows for the sampler.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr

from dscsnet_jax.inference import pixels, spd
from dscsnet_jax.inference.derivatives import PriorTerms, Quadratic, Shapes
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.lanes import materialised, sum_leading, sum_of
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.places import Square, log_free_share, log_sequential
from dscsnet_jax.inference.theta import pairs_of, parts_of, spread, theta_of, with_jacobian
from dscsnet_jax.physics.psf import Psf, Terms, as_psf, require
from dscsnet_jax.physics.targets import Targets

SOFT, HARD = 0.03, 0.0005
"""Softness of the prior's limits, pixels: for fits, which need room to move, and for chains."""
MARGIN = 0.5
"""Pixels beyond the border of a window where a target may still be."""
_LOG_ROOT_2PI = 0.5 * float(np.log(2 * np.pi))


@flax.struct.dataclass
class SceneModel:
    """Likelihood and prior of a window's targets; build it with `scene_model`.

    Attributes:
      seen: the pixels.
      mask: (K, ...) targets present.
      known: PSF, sensor's gain and scene prior.
      terms: of the PSF.
      scale: (...,) counts of the window above its level: the most a target can have.
      censors: whether any pixel of the batch is saturated; not batched, so that the
        censored likelihood costs nothing where there are none.
      softness: of the prior's limits, pixels.
      uniform: intensities are told by `u = Phi(v)`, uniform in 0 .. 1, instead of by `v`: sums of
        intensities are then straight in `theta`, for chains.
    """

    seen: Observation
    mask: jax.Array
    known: Known
    terms: Terms
    scale: jax.Array
    censors: jax.Array
    softness: float = flax.struct.field(pytree_node=False)
    uniform: bool = flax.struct.field(pytree_node=False)

    def with_psf(self, psf: Psf) -> SceneModel:
        """The same with another PSF."""
        known = dataclasses.replace(self.known, psf=psf)
        return dataclasses.replace(self, known=known, terms=psf.terms())

    def intensity(self, v: jax.Array) -> jax.Array:
        """Intensities of `v`, counts."""
        prior = self.known.prior.intensity
        if prior is None:
            return self.scale * v
        # Steps may end within the softness of the walls, intensities never beyond the prior's.
        return prior.quantile(jnp.clip(v, 0, 1)) if self.uniform else prior.value(v)

    def intensity_slope(self, v: jax.Array) -> jax.Array:
        """`dI/dv`, counts."""
        prior = self.known.prior.intensity
        if prior is None:
            return jnp.broadcast_to(self.scale, v.shape)
        return prior.quantile_slope(v) if self.uniform else prior.slope(v)

    def latent(self, intensity: jax.Array) -> jax.Array:
        """`v` of intensities; those beyond the prior's reach are moved to its edge."""
        prior = self.known.prior.intensity
        if prior is None:
            return intensity / self.scale
        v = prior.latent(intensity)
        return ndtr(v) if self.uniform else v

    def pack(self, targets: Targets) -> jax.Array:
        """`theta` of targets at the expected level."""
        v = jnp.where(self.mask, self.latent(targets.intensity), 0).astype(self.scale.dtype)
        row, col = (targets.position[:, axis].astype(v.dtype) for axis in range(2))
        return theta_of(row, col, v, jnp.zeros(v.shape[1:], v.dtype))

    def unpack(self, theta: jax.Array) -> Targets:
        """Targets of `theta`; padded slots hold zeros."""
        row, col, v, _ = parts_of(theta)
        place = jnp.where(self.mask[:, None], jnp.stack([row, col], 1), 0)
        return Targets(place, jnp.where(self.mask, self.intensity(v), 0), self.mask)

    def log_likelihood(self, theta: jax.Array) -> jax.Array:
        """(...,) log likelihood of the pixels, without `-1/2 log 2 pi` each."""
        given = self.seen, self.known.effective_gain
        total = pixels.log_likelihood(*given, self.censors, self.source(theta), theta[-1])
        return total + pixels.log_scale(*given)

    def log_prior(self, theta: jax.Array) -> jax.Array:
        """(...,) log prior of `theta` up to a constant of each count, places drawn jointly.

        Limits are steep walls, so that a start beyond them finds its way in.
        """
        rows, (row, col, *_) = self._own_rows(theta), parts_of(theta)
        for step in range(1, self.mask.shape[0]):  # each pair once, without a gather
            both = self.mask[step:] & self.mask[:-step]
            rows.append(self._too_close(row[step:] - row[:-step], col[step:] - col[:-step], both))
        room = self._room(theta)
        if room is None:
            return -sum_of(sum_leading(row**2) for row in rows) / 2
        rows.append(self._room_rows(theta))
        return sum_leading(jnp.log(room)) - sum_of(sum_leading(row**2) for row in rows) / 2

    def log_squares(self, theta: jax.Array) -> jax.Array:
        """(...,) log of the number of squares on whole pixels that hold all targets."""
        if self.known.prior.cluster_offset is None:
            return jnp.zeros_like(theta[-1])
        return sum_of(jnp.log(self.square(place).number) for place in parts_of(theta)[:2])

    def log_places(self, theta: jax.Array) -> jax.Array:
        """(...,) log of the places' density against that of joint draws without a separation."""
        prior = self.known.prior
        row, col, *_ = parts_of(theta)
        if prior.cluster_size is None or prior.places == "joint":
            return -self.log_free_share()
        rows, cols = (self.square(place).nodes for place in (row, col))
        size = prior.cluster_size
        in_square = [
            log_sequential((row - r) / size, (col - c) / size, self.mask, prior.separation / size)
            for r in rows
            for c in cols
        ]
        return jax.nn.logsumexp(jnp.stack(in_square), axis=0) - float(np.log(len(in_square)))

    def log_free_share(self) -> jax.Array:
        """(...,) log probability that joint draws of all targets keep the separation."""
        prior, number = self.known.prior, self.mask.sum(0)
        if prior.cluster_size is None:
            share = jnp.minimum(np.pi * prior.separation**2 / self._area(), 0.5)
            return (number * (number - 1) // 2) * jnp.log1p(-share)
        return log_free_share(number, prior.separation / prior.cluster_size)

    def log_normalisation(self, theta: jax.Array) -> jax.Array:
        """(...,) what is to be added to `log_prior`: its density is then that of unordered targets.

        `log p(n)`, that of the places, `log n!`, and `-1/2 log 2 pi` of each `v` and of `t`.
        """
        prior = self.known.prior
        number = self.mask.sum(0)
        log_area = jnp.log(self._area())
        total = self.log_places(theta) + jax.lax.lgamma(number + jnp.ones((), theta.dtype))
        if prior.cluster_size is None:
            total = total - number * log_area
        else:
            total = total - jnp.where(number > 0, log_area, 0)
            total = total - 2 * number * jnp.log(jnp.asarray(prior.cluster_size, theta.dtype))
            total = total + self.log_squares(theta)
        if prior.intensity is not None and not self.uniform:  # else `v` is uniform up to 1
            total = total - number * _LOG_ROOT_2PI
        return total + prior.log_count(number, theta.dtype) - _LOG_ROOT_2PI

    def source(self, theta: jax.Array) -> jax.Array:
        """(N, M, ...) expected counts of the window's targets."""
        row, col, v, _ = parts_of(theta)
        in_row, in_col = self._responses(row, col)
        in_col = in_col * jnp.where(self.mask, self.intensity(v), 0)
        slots = [(r, k) for r in range(len(in_row)) for k in range(self.mask.shape[0])]
        return sum_of(in_row[r, :, None, k] * in_col[r, None, :, k] for r, k in slots)

    def variance(self, source: jax.Array, t: jax.Array | float = 0.0) -> tuple[jax.Array, Any]:
        """(N, M, ...) variance of the pixels, counts squared, and its derivative by `mu`."""
        return pixels.variance(self.seen, self.known.effective_gain, source, t)

    @jax.jit  # programs ask for it in many places: it is traced once
    def quadratic(self, theta: jax.Array) -> Quadratic:
        """Cost, gradient and information at `theta`."""
        given = self.seen, self.known.effective_gain
        seen = pixels.likelihoods(*given, self.censors, self.source(theta), theta[-1])
        shapes, prior = materialised(self.censors, self._derivatives, theta)
        gradient, information = shapes.products(seen.slope, seen.information)
        terms = jnp.concatenate([-_flat(seen.value), prior.cost])
        return Quadratic(
            terms.sum(0) - pixels.log_scale(*given),
            prior.gradient - gradient,
            information + prior.information,
            terms,
        )

    def _derivatives(self, theta: jax.Array) -> tuple[Shapes, PriorTerms]:
        """Those of the expected counts, and of the prior."""
        row, col, v, _ = parts_of(theta)
        (in_row, in_col), (by_row, by_col) = (self._responses(row, col, order) for order in (0, 1))
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
        return Shapes(along_row, along(one, in_col, by_col, in_col)), self._prior(theta)

    def _prior(self, theta: jax.Array) -> PriorTerms:
        """Minus the log prior's cost and derivatives, by the structure of its rows."""
        zero = jnp.zeros_like(theta)
        cost, gradient, diagonal = [], zero, self._latent_curvature(theta)
        for row, by_own in zip(*jax.jvp(self._own_rows, (theta,), (zero + 1,)), strict=True):
            cost.append(row**2 / 2)
            gradient += row * by_own
            diagonal += by_own**2
        information = spd.diagonal_matrix(diagonal)
        if self.mask.shape[0] > 1:
            apart = tuple(place[:, None] - place[None] for place in parts_of(theta)[:2])
            too_close = partial(self._too_close, both=pairs_of(self.mask))
            wall, push = jax.linearize(too_close, *apart)
            unit = jnp.ones_like(wall), jnp.zeros_like(wall)
            by_place = push(*unit), push(*unit[::-1])
            cost.append(_flat(wall**2 / 4))  # each pair is there twice
            by_row, by_col = ((wall * by).sum(1) for by in by_place)
            gradient += theta_of(by_row, by_col, 0 * by_row, zero[-1])
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                weight = by_place[i] * by_place[j]
                block = spd.diagonal_matrix(weight.sum(1)) - weight
                information += spread(block, i, j)
        if self._room(theta) is not None:
            rows, by_theta = with_jacobian(self._room_rows, theta)
            room, by_room = with_jacobian(self._room, theta)
            cost += [rows**2 / 2, -jnp.log(room)]
            gradient += (rows[:, None] * by_theta - by_room / room[:, None]).sum(0)
            for d in (*by_theta, *(by_room / room[:, None])):
                information += d[:, None] * d[None]
        return PriorTerms(jnp.concatenate(cost), gradient, information)

    def _responses(
        self, row: jax.Array, col: jax.Array, order: int = 0
    ) -> tuple[jax.Array, jax.Array]:
        """(R, N, K, ...) and (R, M, K, ...) responses along the axes, or their derivatives."""
        rows, cols = self.seen.counts.shape[:2]
        in_row = self.terms.responses(0, row, rows, order=order)
        return in_row, self.terms.responses(1, col, cols, order=order)

    def _own_rows(self, theta: jax.Array) -> list[jax.Array]:
        """Residuals of the prior, (3K+1, ...), each of its own parameter alone."""
        row, col, v, t = parts_of(theta)
        prior, mask = self.known.prior, self.mask
        off = v
        if prior.intensity is None:
            off = jnp.maximum(-self.intensity(v), 0) / self._typical_std()
        elif self.uniform:
            off = jnp.maximum(jnp.maximum(-v, v - 1), 0) / self.softness
        border, square = [], []
        for axis, place in enumerate((row, col)):
            last = self.seen.counts.shape[axis] - 0.5 + MARGIN
            outside = jnp.maximum(-0.5 - MARGIN - place, place - last)
            border.append(self._wall(outside, mask))
            if prior.cluster_offset is not None:
                begin = jax.lax.stop_gradient(self.square(place).begin)
                outside = jnp.maximum(begin - place, place - (begin + prior.cluster_size))
                square.append(self._wall(outside, mask))
        rows = [theta_of(border[0], border[1], jnp.where(mask, off, 0), t)]
        return [*rows, theta_of(square[0], square[1], 0 * v, 0 * t)] if square else rows

    def _too_close(self, row: jax.Array, col: jax.Array, both: jax.Array) -> jax.Array:
        """Residuals of pairs so far apart."""
        apart2 = row**2 + col**2
        apart = jnp.where(apart2 > 0, jnp.sqrt(jnp.where(apart2 > 0, apart2, 1)), 0)
        return self._wall(self.known.prior.separation - apart, both)

    def _room_rows(self, theta: jax.Array) -> jax.Array:
        """(2, ...) residuals of squares of unknown place that hold not all targets."""
        room = jnp.stack([self.square(place).room for place in parts_of(theta)[:2]])
        return self._wall(self.softness - room, jnp.array(True))

    def _wall(self, excess: jax.Array, there: jax.Array) -> jax.Array:
        return jnp.where(there & (excess > 0), excess, 0) / self.softness

    def _room(self, theta: jax.Array) -> jax.Array | None:
        """(2, ...) along each axis, where a square of unknown place that holds all may begin."""
        prior = self.known.prior
        if prior.cluster_size is None or prior.cluster_offset is not None:
            return None
        row, col, *_ = parts_of(theta)
        room = jnp.stack([self.square(place).room for place in (row, col)])
        return jnp.where(self.mask.any(0), jnp.maximum(room, self.softness), 1)

    def square(self, place: jax.Array) -> Square:
        """The square that holds the cluster, along one axis."""
        prior = self.known.prior
        return Square(place, self.mask, prior.cluster_size, prior.cluster_offset)

    def _latent_curvature(self, theta: jax.Array) -> jax.Array:
        """(3K+1,) what `d2I/dv2` adds where the fit has come to rest: `-v I''/I'`, if positive.

        At the fit the likelihood's slope is that of the prior: `v = dlogL/dI dI/dv`.
        """
        prior = self.known.prior.intensity
        if prior is None or self.uniform:
            return jnp.zeros_like(theta)
        v = parts_of(theta)[2]
        curvature = jnp.where(self.mask, jnp.maximum(-v * prior.bend(v), 0), 0)
        zero = jnp.zeros_like(curvature)
        return theta_of(zero, zero, curvature, jnp.zeros_like(theta[-1]))

    def _typical_std(self) -> jax.Array:
        """(...,) standard deviation of a pixel without targets, counts."""
        return pixels.pixel_std(pixels.typical(self.seen), self.known.effective_gain)

    def _area(self) -> jax.Array:
        """(...,) valid pixels, at least 1."""
        return jnp.maximum(self.seen.valid.sum((0, 1)), 1).astype(self.scale.dtype)


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
      uniform: see `SceneModel`.
    """
    require(known.psf is not None, "the scene model needs a PSF, and what is known has none")
    known = dataclasses.replace(known, psf=as_psf(known.psf))
    known = jax.tree.map(lambda a: jnp.asarray(a, seen.counts.dtype), known)
    scale, censors = pixels.all_counts(seen, known.effective_gain), seen.saturated.any()
    return SceneModel(seen, mask, known, known.psf.terms(), scale, censors, softness, uniform)


def _flat(image: jax.Array) -> jax.Array:
    """Pixels (N, M, ...) as one axis."""
    return image.reshape(-1, *image.shape[2:])
