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

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtr

from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.places import log_sequential
from dscsnet_jax.inference.prior import Known
from dscsnet_jax.physics.limits import point_response_derivative
from dscsnet_jax.physics.optics import point_response, psf_sigma
from dscsnet_jax.physics.targets import Targets

SOFT, HARD = 0.03, 0.0005
"""Softness of the prior's limits, pixels: for fits, which need room to move, and for chains."""
MARGIN = 0.5
"""Pixels beyond the border of a window where a target may still be."""
_LOG_ROOT_2PI = 0.5 * float(np.log(2 * np.pi))
_FAR_UP = 12.0  # standard deviations


class Quadratic(NamedTuple):
    """Minus the log density around a place, without the places' normalisation.

    Attributes:
      cost: minus log likelihood and prior.
      gradient: (3K+1,) its derivative.
      information: (3K+1, 3K+1) Fisher information of the pixels and curvature of the prior.
      terms: (R,) what the cost adds up, but for a constant: differences of costs keep the
        digits that the sums of many pixels lose.
    """

    cost: jax.Array
    gradient: jax.Array
    information: jax.Array
    terms: jax.Array


class Residuals(NamedTuple):
    """Rows whose squares make the information: `J^T r` is the gradient, `J^T J` the information.

    Attributes:
      value: (R,) residuals, those of the pixels first.
      jacobian: (R, 3K+1) of the expected values.
      pixels: (P,) log likelihood of the pixels but for `log_scale`; of the prior's rows it is
        minus half their squares.
    """

    value: jax.Array
    jacobian: jax.Array
    pixels: jax.Array


class Pixels(NamedTuple):
    """Log likelihood (N, M, ...) of pixels, its derivative by `mu`, and their information.

    Variances are in those of a pixel without targets; `SceneModel.log_scale` is the rest.
    """

    value: jax.Array
    slope: jax.Array
    information: jax.Array


@flax.struct.dataclass
class SceneModel:
    """Likelihood and prior of a window's targets; build it with `scene_model`.

    Attributes:
      seen: the pixels.
      mask: (K, ...) targets present.
      known: PSF, gain and scene prior.
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
    scale: jax.Array
    censors: jax.Array
    softness: float = flax.struct.field(pytree_node=False)
    uniform: bool = flax.struct.field(pytree_node=False)

    def intensity(self, v: jax.Array) -> jax.Array:
        """Intensities of `v`, counts."""
        prior = self.known.prior.intensity
        if prior is None:
            return self.scale * v
        return prior.quantile(v) if self.uniform else prior.value(v)

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
        """`theta` of targets at the expected level; of one window."""
        v = jnp.where(self.mask, self.latent(targets.intensity), 0).astype(self.scale.dtype)
        table = jnp.concatenate([targets.position.astype(v.dtype), v[:, None]], -1)
        return jnp.append(table.reshape(-1), jnp.zeros((), v.dtype))

    def unpack(self, theta: jax.Array) -> Targets:
        """Targets of `theta`, of one window; padded slots hold zeros."""
        row, col, v, _ = _parts(theta)
        place = jnp.where(self.mask[:, None], jnp.stack([row, col], -1), 0)
        return Targets(place, jnp.where(self.mask, self.intensity(v), 0), self.mask)

    def log_likelihood(self, theta: jax.Array) -> jax.Array:
        """(...,) log likelihood of the pixels, without `-1/2 log 2 pi` each."""
        return _sum(_sum(self._pixels(self.source(theta), theta[-1]).value)) + self.log_scale()

    def log_scale(self) -> jax.Array:
        """(...,) log likelihood that no target changes: `-log` of the noise, of every pixel."""
        tells = (self.seen.valid & ~self.seen.saturated).sum((0, 1))
        return -tells * jnp.log(pixel_std(self.seen, self.known.gain))

    def log_prior(self, theta: jax.Array) -> jax.Array:
        """(...,) log prior of `theta` up to a constant of each count, places drawn jointly.

        Limits are steep walls, so that a start beyond them finds its way in.
        """
        total = -sum_of(_sum(row**2) for row in self._prior_rows(theta)) / 2
        room = self._room(theta)
        return total if room is None else total + _sum(jnp.log(room))

    def log_places(self, theta: jax.Array) -> jax.Array:
        """(...,) log of the places' density against that of joint draws without a separation."""
        prior = self.known.prior
        row, col, *_ = _parts(theta)
        number = self.mask.sum(0)
        if prior.cluster_size is None:
            area = self._area()
            share = jnp.minimum(np.pi * prior.separation**2 / area, 0.5)
            return -(number * (number - 1) // 2) * jnp.log1p(-share)
        if prior.places == "joint":
            table = jnp.stack([jnp.asarray(s, row.dtype) for s in prior.log_free_share])
            return -table[jnp.minimum(number, len(prior.log_free_share) - 1)]
        rows, cols = (self._begins(place) for place in (row, col))
        size = prior.cluster_size
        in_square = [
            log_sequential((row - r) / size, (col - c) / size, self.mask, prior.separation / size)
            for r in rows
            for c in cols
        ]
        return jax.nn.logsumexp(jnp.stack(in_square), axis=0) - float(np.log(len(in_square)))

    def log_normalisation(self, theta: jax.Array) -> jax.Array:
        """(...,) what is to be added to `log_prior`: its density is then that of unordered targets.

        `log p(n)`, that of the places, `log n!`, and `-1/2 log 2 pi` of each `v` and of `t`.
        """
        prior = self.known.prior
        row, col, *_ = _parts(theta)
        number = self.mask.sum(0)
        log_area = jnp.log(self._area())
        total = self.log_places(theta) + jax.lax.lgamma(number + jnp.ones((), theta.dtype))
        if prior.cluster_size is None:
            total = total - number * log_area
        else:
            total = total - jnp.where(number > 0, log_area, 0)
            total = total - 2 * number * jnp.log(jnp.asarray(prior.cluster_size, theta.dtype))
            if prior.cluster_offset is not None:
                total = total + _sum(jnp.log(jnp.stack([self._squares(p) for p in (row, col)])))
        if prior.intensity is not None and not self.uniform:  # else `v` is uniform up to 1
            total = total - number * _LOG_ROOT_2PI
        if prior.count is not None:
            total = total + self._log_count(number, theta.dtype)
        return total - _LOG_ROOT_2PI

    def source(self, theta: jax.Array) -> jax.Array:
        """(N, M, ...) expected counts of the window's targets."""
        row, col, v, _ = _parts(theta)
        in_row, in_col = self._responses(row, col)
        in_col = in_col * jnp.where(self.mask, self.intensity(v), 0)
        slots = range(self.mask.shape[0])
        return sum_of(in_row[:, None, k] * in_col[None, :, k] for k in slots)

    def variance(self, source: jax.Array, t: jax.Array | float = 0.0) -> tuple[jax.Array, Any]:
        """(N, M, ...) variance of the pixels, counts squared, and its derivative by `mu`."""
        seen, gain = self.seen, self.known.gain
        if gain is None:
            return jnp.broadcast_to(seen.noise**2, source.shape), 0.0
        photons = seen.background + seen.background_std * t + seen.neighbours + source
        slope = jnp.where(photons > 0, 1 / jnp.asarray(gain, source.dtype), 0)
        return seen.noise**2 + photons * slope, slope

    def quadratic(self, theta: jax.Array) -> Quadratic:
        """Cost, gradient and information at `theta` of one window."""
        rows = self.residuals(theta)
        terms = [-rows.pixels, rows.value[len(rows.pixels) :] ** 2 / 2]
        gradient = _product("rp,r->p", rows.jacobian, rows.value)
        information = _product("rp,rq->pq", rows.jacobian, rows.jacobian)
        information = information + jnp.diag(self._latent_curvature(theta))
        if self._room(theta) is not None:
            room, by_room = _with_jacobian(self._room, theta)
            by_room = by_room / room[:, None]
            terms.append(-jnp.log(room))
            gradient = gradient - by_room.sum(0)
            information = information + _product("rp,rq->pq", by_room, by_room)
        total = jnp.concatenate(terms)
        return Quadratic(total.sum() - self.log_scale(), gradient, information, total)

    def residuals(self, theta: jax.Array) -> Residuals:
        """Residuals of one window's pixels and prior, weighed by their information."""
        pixels = self._pixels(self.source(theta), theta[-1])
        tells = pixels.information > 0
        root = jnp.where(tells, jnp.sqrt(jnp.where(tells, pixels.information, 1)), 0)
        value = -pixels.slope / jnp.where(tells, root, 1)
        columns = (self.jacobian(theta) * root).reshape(len(theta), -1).T
        prior, by_theta = _with_jacobian(lambda at: jnp.concatenate(self._prior_rows(at)), theta)
        return Residuals(
            jnp.concatenate([value.reshape(-1), prior]),
            jnp.concatenate([columns, by_theta]),
            pixels.value.reshape(-1),
        )

    def jacobian(self, theta: jax.Array) -> jax.Array:
        """(3K+1, N, M) derivative of the expected counts of one window."""
        row, col, v, _ = _parts(theta)
        in_row, in_col = self._responses(row, col)
        sigma, shape = psf_sigma(self.known.sigma), self.seen.counts.shape
        by_row, by_col = (
            point_response_derivative(place, shape[axis], sigma[axis]).astype(theta.dtype).T
            for axis, place in enumerate((row, col))
        )
        energy = jnp.where(self.mask, self.intensity(v), 0)
        slope = jnp.where(self.mask, self.intensity_slope(v), 0)
        columns = [
            (by_row * energy)[:, None] * in_col[None],
            (in_row * energy)[:, None] * by_col[None],
            (in_row * slope)[:, None] * in_col[None],
        ]
        table = jnp.moveaxis(jnp.stack(columns), (0, 3), (1, 0)).reshape(-1, *shape)
        level = jnp.broadcast_to(self.seen.background_std, (1, *shape))
        return jnp.concatenate([table, level])

    def mirrored(self, theta: jax.Array, at: jax.Array) -> jax.Array:
        """`theta` mirrored at the ends of its ranges: those of `u`, and of the square around `at`.

        A symmetric proposal from `at` stays one, and none is wasted beyond the ranges.
        """
        row, col, v, _ = _parts(theta)
        prior = self.known.prior
        if self.uniform and prior.intensity is not None:
            v = _folded(v)
        if prior.cluster_offset is not None:
            size, begins = prior.cluster_size, map(self._square_begin, _parts(at)[:2])
            row, col = (
                begin + size * _folded((place - begin) / size)
                for place, begin in zip((row, col), begins, strict=True)
            )
        table = jnp.stack([row, col, v], 1)
        return jnp.concatenate([table.reshape(-1, *table.shape[2:]), theta[-1:]])

    def _responses(self, row: jax.Array, col: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(N, K, ...) and (M, K, ...) responses along the axes."""
        sigma, shape = psf_sigma(self.known.sigma).astype(row.dtype), self.seen.counts.shape
        in_row = point_response(row, shape[0], sigma[0], axis=0)
        return in_row, point_response(col, shape[1], sigma[1], axis=0)

    def _pixels(self, source: jax.Array, t: jax.Array) -> Pixels:
        seen = self.seen
        variance, slope = self.variance(source, t)
        sd = jnp.sqrt(variance)
        residual = (
            seen.counts - seen.neighbours - source - (seen.level + seen.background_std * t)
        ) / sd
        value = -(residual**2 + jnp.log(variance / pixel_std(seen, self.known.gain) ** 2)) / 2
        by_mu = residual / sd + (residual**2 - 1) * slope / variance / 2
        information = 1 / variance + (slope / variance) ** 2 / 2
        censored = jax.lax.cond(self.censors, log_ndtr, jnp.zeros_like, -residual)
        by_sd = 1 / sd + residual * slope / variance / 2
        mills, excess = _mills(residual, censored)

        def choose(saturated: jax.Array, otherwise: jax.Array) -> jax.Array:
            return jnp.where(seen.valid, jnp.where(seen.saturated, saturated, otherwise), 0)

        return Pixels(
            choose(censored, value),
            choose(mills * by_sd, by_mu),
            choose(mills * excess * by_sd**2, information),
        )

    def _prior_rows(self, theta: jax.Array) -> list[jax.Array]:
        """Residuals (R, ...) of the prior: half their squares is minus its logarithm."""
        row, col, v, t = _parts(theta)
        prior, mask = self.known.prior, self.mask
        off = v
        if prior.intensity is None:
            off = jnp.maximum(-self.intensity(v), 0) / pixel_std(self.seen, self.known.gain)
        elif self.uniform:
            off = jnp.maximum(jnp.maximum(-v, v - 1), 0) / self.softness
        rows = [jnp.where(mask, off, 0), t[None]]
        for axis, place in enumerate((row, col)):
            last = self.seen.counts.shape[axis] - 0.5 + MARGIN
            outside = jnp.maximum(-0.5 - MARGIN - place, place - last)
            rows.append(self._wall(outside, mask))
        for step in range(1, mask.shape[0]):  # each pair once, without a gather
            apart2 = (row[step:] - row[:-step]) ** 2 + (col[step:] - col[:-step]) ** 2
            apart = jnp.where(apart2 > 0, jnp.sqrt(jnp.where(apart2 > 0, apart2, 1)), 0)
            rows.append(self._wall(prior.separation - apart, mask[step:] & mask[:-step]))
        if prior.cluster_offset is not None:
            for place in (row, col):
                begin = jax.lax.stop_gradient(self._square_begin(place))
                outside = jnp.maximum(begin - place, place - (begin + prior.cluster_size))
                rows.append(self._wall(outside, mask))
        elif prior.cluster_size is not None:
            beyond = jnp.stack([self._spread(place) for place in (row, col)]) - prior.cluster_size
            rows.append(self._wall(beyond + self.softness, jnp.array(True)))
        return rows

    def _wall(self, excess: jax.Array, there: jax.Array) -> jax.Array:
        return jnp.where(there & (excess > 0), excess, 0) / self.softness

    def _room(self, theta: jax.Array) -> jax.Array | None:
        """(2, ...) along each axis, where a square of unknown place that holds all may begin."""
        prior = self.known.prior
        if prior.cluster_size is None or prior.cluster_offset is not None:
            return None
        row, col, *_ = _parts(theta)
        spread = jnp.stack([self._spread(place) for place in (row, col)])
        some = self.mask.any(0)
        return jnp.where(some, jnp.maximum(prior.cluster_size - spread, self.softness), 1)

    def _spread(self, place: jax.Array) -> jax.Array:
        """(...,) largest minus least place of the targets."""
        low = jnp.where(self.mask, place, jnp.inf).min(0)
        high = jnp.where(self.mask, place, -jnp.inf).max(0)
        some = self.mask.any(0)
        return jnp.where(some, high, 0) - jnp.where(some, low, 0)

    def _middle(self, place: jax.Array) -> jax.Array:
        low = jnp.where(self.mask, place, jnp.inf).min(0)
        high = jnp.where(self.mask, place, -jnp.inf).max(0)
        some = self.mask.any(0)
        return (jnp.where(some, low, 0) + jnp.where(some, high, 0)) / 2

    def _square_begin(self, place: jax.Array) -> jax.Array:
        prior, middle = self.known.prior, self._middle(place)
        if prior.cluster_offset is None:
            return middle - prior.cluster_size / 2
        offset = prior.cluster_offset
        return jnp.round(middle - offset - prior.cluster_size / 2) + offset

    def _begins(self, place: jax.Array) -> list[jax.Array]:
        """Where the square begins along an axis; of unknown place: Gauss's two nodes of all."""
        begin, prior = self._square_begin(place), self.known.prior
        if prior.cluster_offset is not None:
            return [begin]
        off = jnp.maximum(prior.cluster_size - self._spread(place), 0) / 12**0.5
        return [begin - off, begin + off]

    def _squares(self, place: jax.Array) -> jax.Array:
        """(...,) along an axis, the number of squares that hold all targets, at least 1."""
        prior = self.known.prior
        low = self._middle(place) - self._spread(place) / 2
        high = low + self._spread(place)
        offset, size = prior.cluster_offset, prior.cluster_size
        number = jnp.floor(low - offset) - jnp.ceil(high - offset - size) + 1
        return jnp.where(self.mask.any(0), jnp.maximum(number, 1), 1)

    def _latent_curvature(self, theta: jax.Array) -> jax.Array:
        """(3K+1,) what `d2I/dv2` adds where the fit has come to rest: `-v I''/I'`, if positive.

        At the fit the likelihood's slope is that of the prior: `v = dlogL/dI dI/dv`.
        """
        prior = self.known.prior.intensity
        if prior is None or self.uniform:
            return jnp.zeros_like(theta)
        v = _parts(theta)[2]
        curvature = jnp.where(self.mask, jnp.maximum(-v * prior.bend(v), 0), 0)
        zero = jnp.zeros_like(curvature)
        return jnp.append(jnp.stack([zero, zero, curvature], -1).reshape(-1), zero[:1])

    def _log_count(self, number: jax.Array, dtype: Any) -> jax.Array:
        """(...,) `log p(n)`; 0 for counts that are not listed."""
        share = jnp.stack([jnp.asarray(p, dtype) for p in self.known.prior.count])
        index = jnp.minimum(number, share.shape[0] - 1)
        chance = jnp.where(number < share.shape[0], share[index], 0)
        return jnp.where(chance > 0, jnp.log(jnp.where(chance > 0, chance, 1)), -jnp.inf)

    def _area(self) -> jax.Array:
        """(...,) valid pixels, at least 1."""
        return jnp.maximum(self.seen.valid.sum((0, 1)), 1).astype(self.scale.dtype)


def scene_model(
    seen: Observation,
    mask: jax.Array,
    known: Known,
    *,
    censors: jax.Array | None = None,
    softness: float = SOFT,
    uniform: bool = False,
) -> SceneModel:
    """The model of windows with their structure in front.

    Args:
      seen: `Observation` of (N, M, ...) pixels and (...) numbers.
      mask: (K, ...) targets present.
      known: PSF, gain and scene prior.
      censors: see `SceneModel`; None: looked up.
      softness: of the prior's limits, pixels.
      uniform: see `SceneModel`.
    """
    censors = seen.saturated.any() if censors is None else censors
    known = jax.tree.map(lambda a: jnp.asarray(a, seen.counts.dtype), known)
    return SceneModel(seen, mask, known, all_counts(seen, known.gain), censors, softness, uniform)


def pixel_std(seen: Observation, gain: Any) -> jax.Array:
    """(...,) standard deviation of a pixel without targets, counts."""
    if gain is None:
        return seen.noise
    return jnp.sqrt(seen.noise**2 + jnp.maximum(seen.background, 0) / gain)


def all_counts(seen: Observation, gain: Any) -> jax.Array:
    """(...,) counts of windows (N, M, ...) above their level: the most a target can have."""
    above = seen.counts - seen.neighbours - seen.level
    total = jnp.where(seen.valid, jnp.maximum(above, 0), 0).sum((0, 1))
    return jnp.maximum(total, pixel_std(seen, gain))


def _mills(residual: jax.Array, censored: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`m = phi(r) / Phi(-r)` with `log Phi(-r)` given, and `m - r`.

    Far up, where `m - r` would be left of the rounding of two large numbers, by its series.
    """
    far = residual > _FAR_UP
    mills = jnp.exp(-(residual**2) / 2 - _LOG_ROOT_2PI - censored)
    above = jnp.where(far, residual, _FAR_UP)
    i = 1 / above**2
    series = (1 - i * (2 - i * (10 - i * (74 - i * 706)))) / above
    excess = jnp.where(far, series, jnp.maximum(mills - residual, 0))
    return jnp.where(far, residual + series, mills), excess


def _folded(u: jax.Array) -> jax.Array:
    """A coordinate mirrored at 0 and 1."""
    return 1 - jnp.abs(u - 2 * jnp.floor(u / 2) - 1)


def _with_jacobian(function: Any, theta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values (R,) and their Jacobian (R, 3K+1), in one forward sweep."""
    value, push = jax.linearize(function, theta)
    return value, jax.vmap(push, out_axes=-1)(jnp.eye(len(theta), dtype=theta.dtype))


def _parts(theta: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Rows, cols, `v` (K, ...) and `t` (...)."""
    return theta[0:-1:3], theta[1:-1:3], theta[2:-1:3], theta[-1]


_product = functools.partial(jnp.einsum, precision="highest")
_Any = TypeVar("_Any", bound=Callable[..., Any])


def lanes_last(function: _Any) -> _Any:
    """Let a function's arrays be aligned at their last axes, whatever the user has set.

    Numbers of windows broadcast over pixels and chains, which come in front of them.
    """

    @functools.wraps(function)
    def aligned(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return cast(_Any, aligned)


def _sum(terms: jax.Array) -> jax.Array:
    """Sum over the leading axis; written out where windows are the last one.

    The compiler's own reduction over it takes one lane at a time.
    """
    return terms.sum(0) if terms.ndim < 3 else sum_of(terms[i] for i in range(terms.shape[0]))


def sum_of(terms: Iterable[jax.Array]) -> jax.Array:
    """The sum of arrays, one after the other."""
    return functools.reduce(operator.add, terms)
