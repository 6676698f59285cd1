"""Window prior: the parameters `theta` of a window's targets and their prior density.

Limits are walls as steep as the softness tells: a fit needs room to move, chains do not.
"""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr

from dscsnet_jax.inference import clustered, pixels, spd
from dscsnet_jax.inference.alike import Alike
from dscsnet_jax.inference.derivatives import PriorTerms
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.lanes import sum_leading, sum_of
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.places import Square, log_free_share, log_sequential
from dscsnet_jax.inference.theta import pairs_of, parts_of, spread, theta_of, with_jacobian
from dscsnet_jax.physics.targets import Targets

MARGIN = 0.5
"""Pixels beyond the border of a window where a target may still be."""
_LOG_ROOT_2PI = 0.5 * float(np.log(2 * np.pi))


@flax.struct.dataclass
class WindowPrior:
    """Prior of a window's targets, and what of `theta` is what.

    Attributes:
      seen: the pixels.
      mask: (K, ...) targets present.
      known: PSF, sensor's gain and scene prior.
      scale: (...,) counts of the window above its level: the most a target can have.
      softness: of the prior's limits, pixels.
      uniform: intensities are told by `u = Phi(v)`, uniform in 0 .. 1, instead of by `v`, those
        that are alike by their share of the scale: sums of intensities are then straight in
        `theta`, for chains.
    """

    seen: Observation
    mask: jax.Array
    known: Known
    scale: jax.Array
    softness: float = flax.struct.field(pytree_node=False)
    uniform: bool = flax.struct.field(pytree_node=False)

    def intensity(self, v: jax.Array) -> jax.Array:
        """Intensities of `v`, counts."""
        prior = self.known.prior.intensity
        if prior is None or self._shares:
            return self.scale[None] * v
        if isinstance(prior, Alike):
            return self._each * prior.value(v)
        # Steps may end within the softness of the walls, intensities never beyond the prior's.
        return prior.quantile(jnp.clip(v, 0, 1)) if self.uniform else prior.value(v)

    def intensity_slope(self, v: jax.Array) -> jax.Array:
        """`dI/dv`, counts."""
        prior = self.known.prior.intensity
        if prior is None or self._shares:
            return jnp.broadcast_to(self.scale, v.shape)
        if isinstance(prior, Alike):
            return self._each * prior.slope(v)
        return prior.quantile_slope(v) if self.uniform else prior.slope(v)

    def latent(self, intensity: jax.Array) -> jax.Array:
        """`v` of intensities; those beyond the prior's reach are moved to its edge."""
        prior = self.known.prior.intensity
        if prior is None or self._shares:
            return intensity / self.scale[None]
        if isinstance(prior, Alike):
            return prior.latent(intensity / self._each)
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

    def log_prior(self, theta: jax.Array) -> jax.Array:
        """(...,) log prior of `theta` up to a constant of each count, places drawn jointly.

        Limits are steep walls, so that a start beyond them finds its way in.
        """
        rows, alike = self._own_rows(theta), self._alike(theta)
        total = self.log_distances(theta) - sum_of(sum_leading(row**2) for row in rows) / 2
        if alike is not None:
            total = total - sum_leading(alike.cost)
        if self.known.prior.spread is not None:
            total = total - self._clustered(theta).cost
        room = self._room(theta)
        if room is None:
            return total
        return total + sum_leading(jnp.log(room) - self._room_rows(theta) ** 2 / 2)

    def log_distances(self, theta: jax.Array) -> jax.Array:
        """(...,) of `log_prior`, what keeps targets from each other."""
        row, col, *_ = parts_of(theta)
        total = jnp.zeros_like(theta[-1])
        for step in range(1, self.mask.shape[0]):  # each pair once, without a gather
            both = self.mask[step:] & self.mask[:-step]
            close = self._too_close(row[step:] - row[:-step], col[step:] - col[:-step], both)
            total -= sum_leading(close**2) / 2
        return total

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
        """(...,) log probability that joint draws of all targets keep their distance."""
        prior, number = self.known.prior, self.mask.sum(0)
        if prior.spread is not None:
            return clustered.log_share(number)
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
        if prior.spread is not None:
            some = jnp.maximum(number, 1).astype(theta.dtype)
            near = clustered.log_scale(some, self.spread_width())
            total = total + jnp.where(number > 0, near - log_area, 0)
        elif prior.cluster_size is None:
            total = total - number * log_area
        else:
            total = total - jnp.where(number > 0, log_area, 0)
            total = total - 2 * number * jnp.log(jnp.asarray(prior.cluster_size, theta.dtype))
            total = total + self.log_squares(theta)
        if isinstance(prior.intensity, Alike):
            total = total - number * _LOG_ROOT_2PI + jnp.log(prior.intensity.determinant(self.mask))
            if self.uniform:
                total = total - number * jnp.log(prior.intensity.log_std)
        elif prior.intensity is not None and not self.uniform:  # else `v` is uniform up to 1
            total = total - number * _LOG_ROOT_2PI
        return total + prior.log_count(number, theta.dtype) - _LOG_ROOT_2PI

    def prior_terms(self, theta: jax.Array) -> PriorTerms:
        """Minus the log prior's cost and derivatives, by the structure of its rows."""
        zero = jnp.zeros_like(theta)
        cost, gradient, diagonal = [], zero, self._latent_curvature(theta)
        for row, by_own in zip(*jax.jvp(self._own_rows, (theta,), (zero + 1,)), strict=True):
            cost.append(row**2 / 2)
            gradient += row * by_own
            diagonal += by_own**2
        information = spd.diagonal_matrix(diagonal)
        alike = self._alike(theta)
        if alike is not None:
            cost.append(alike.cost)
            gradient += theta_of(0 * alike.gradient, 0 * alike.gradient, alike.gradient, zero[-1])
            information += spread(alike.information, 2, 2)
        if self.known.prior.spread is not None:
            near = self._clustered(theta)
            cost.append(near.cost[None])
            by_row, by_col = near.gradient
            gradient += theta_of(by_row, by_col, 0 * by_row, zero[-1])
            information += spread(near.information, 0, 0) + spread(near.information, 1, 1)
        if self.mask.shape[0] > 1:
            apart = tuple(place[:, None] - place[None] for place in parts_of(theta)[:2])
            too_close = partial(self._too_close, both=pairs_of(self.mask))
            wall, push = jax.linearize(too_close, *apart)
            unit = jnp.ones_like(wall), jnp.zeros_like(wall)
            by_place = push(*unit), push(*unit[::-1])
            cost.append(flat_image(wall**2 / 4))  # each pair is there twice
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

    def _own_rows(self, theta: jax.Array) -> list[jax.Array]:
        """Residuals of the prior, (3K+1, ...), each of its own parameter alone."""
        row, col, v, t = parts_of(theta)
        prior, mask = self.known.prior, self.mask
        off = v
        if isinstance(prior.intensity, Alike):
            off = jnp.zeros_like(v)
            if self.uniform:
                least = prior.intensity.least_share(self.mask)
                off = jnp.maximum(1 - v / least[None], 0) / self.softness
        elif prior.intensity is None:
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

    @property
    def linear(self) -> bool:
        """Whether intensities are linear in `theta` with one factor, that of all light."""
        return self.known.prior.intensity is None or self._shares

    @property
    def _shares(self) -> bool:
        """Whether intensities are alike and told by their share of the scale."""
        return self.uniform and isinstance(self.known.prior.intensity, Alike)

    @property
    def _each(self) -> jax.Array:
        """(1, ...) the scale for each target, counts."""
        return (self.scale / jnp.maximum(self.mask.sum(0), 1))[None]

    def _alike(self, theta: jax.Array) -> PriorTerms | None:
        """Of intensities (K, ...) that are alike; (K, K, ...) information."""
        prior, mask = self.known.prior.intensity, self.mask
        if not isinstance(prior, Alike):
            return None
        return prior.terms(parts_of(theta)[2], mask, shares=self.uniform)

    def _clustered(self, theta: jax.Array) -> PriorTerms:
        row, col, *_ = parts_of(theta)
        return clustered.terms(row, col, self.mask, self.spread_width())

    def spread_width(self) -> jax.Array:
        """Scale of the places' spread, pixels."""
        width = self.known.psf.width
        return self.known.prior.spread * jnp.sqrt(width[0] * width[1])

    def _too_close(self, row: jax.Array, col: jax.Array, both: jax.Array) -> jax.Array:
        """Residuals of pairs so far apart."""
        apart2 = row**2 + col**2
        apart = jnp.where(apart2 > 0, jnp.sqrt(jnp.where(apart2 > 0, apart2, 1)), 0)
        if self.known.prior.spread is None:
            return self._wall(self.known.prior.separation - apart, both)
        return jnp.where(both, clustered.too_close(apart, self.spread_width()), 0)

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
        pull = v
        if isinstance(prior, Alike):
            pull = prior.whitened(prior.whitened(v, self.mask), self.mask)
        curvature = jnp.where(self.mask, jnp.maximum(-pull * prior.bend(v), 0), 0)
        zero = jnp.zeros_like(curvature)
        return theta_of(zero, zero, curvature, jnp.zeros_like(theta[-1]))

    def _typical_std(self) -> jax.Array:
        """(...,) standard deviation of a pixel without targets, counts."""
        return pixels.pixel_std(pixels.typical(self.seen), self.known.effective_gain)

    def _area(self) -> jax.Array:
        """(...,) valid pixels, at least 1."""
        return jnp.maximum(self.seen.valid.sum((0, 1)), 1).astype(self.scale.dtype)


def flat_image(image: jax.Array) -> jax.Array:
    """Pixels (N, M, ...) as one axis."""
    return image.reshape(-1, *image.shape[2:])
