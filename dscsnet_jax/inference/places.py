"""Places: the square that holds a cluster, and the density of its targets' places.

A simulator that draws each target uniformly in what the ones before leave free makes
places of density

    p(x_1 .. x_n) = mean over orders of  prod_i 1 / a(x_1 .. x_{i-1}),

`a` the area of the square that is at least the separation away from all before. The areas
are sums over a lattice whose points are covered smoothly, so that they can be differentiated;
their error is about 1 % (measured in the tests by the density's integral).
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_LATTICE = 12
_MOST_ORDERED = 6  # targets up to which all orders are summed


class Square(NamedTuple):
    """The square that holds a cluster, along one axis.

    Attributes:
      place: (K, ...) rows or cols of the targets.
      mask: (K, ...) targets present.
      size: its side, pixels.
      offset: it begins at some whole pixel plus this; None: at any place.
    """

    place: jax.Array
    mask: jax.Array
    size: Any
    offset: Any

    @property
    def ends(self) -> tuple[jax.Array, jax.Array]:
        """(...,) least and largest place of the targets; 0 without any."""
        low = jnp.where(self.mask, self.place, jnp.inf).min(0)
        high = jnp.where(self.mask, self.place, -jnp.inf).max(0)
        some = self.mask.any(0)
        return jnp.where(some, low, 0), jnp.where(some, high, 0)

    @property
    def room(self) -> jax.Array:
        """(...,) length along which it may begin and hold all targets; negative: none."""
        low, high = self.ends
        return self.size - (high - low)

    @property
    def begin(self) -> jax.Array:
        """(...,) where it begins if the targets are in its middle, as nearly as they can be."""
        low, high = self.ends
        begin = (low + high) / 2 - self.size / 2
        return begin if self.offset is None else jnp.round(begin - self.offset) + self.offset

    @property
    def nodes(self) -> list[jax.Array]:
        """Where it begins; of unknown place: Gauss's two nodes of all places."""
        if self.offset is not None:
            return [self.begin]
        off = jnp.maximum(self.room, 0) / 12**0.5
        return [self.begin - off, self.begin + off]

    @property
    def number(self) -> jax.Array:
        """(...,) of the squares on whole pixels that hold all targets, at least 1."""
        low, high = self.ends
        number = jnp.floor(low - self.offset) - jnp.ceil(high - self.offset - self.size) + 1
        return jnp.where(self.mask.any(0), jnp.maximum(number, 1), 1)


def log_free_share(number: jax.Array, ratio: jax.Array) -> jax.Array:
    """Log probability that targets thrown into a unit square keep their distance.

    A table of Monte Carlo (`experiments/free_share.py`), interpolated by cubics, so that its
    derivative is continuous; what no throw has reached has the log of half a throw.
    It never falls below that.

    Args:
      number: (...,) of the targets.
      ratio: least distance, in sides of the square; above 1 it counts as 1.

    Returns:
      (...,) natural logarithms.

    Example:
      >>> [round(float(v), 1) for v in log_free_share(jnp.arange(3), jnp.array(0.5))]
      [0.0, 0.0, -0.7]
    """
    table = _free_shares()
    cells = table.shape[1] - 3
    x = jnp.clip(ratio, 0, 1) * cells
    cell = jnp.clip(jnp.floor(jax.lax.stop_gradient(x)).astype(jnp.int32), 0, cells - 1)
    t, row = x - cell, jnp.minimum(number, len(table) - 1)
    a, b, c, d = (jnp.asarray(table, t.dtype)[row, cell + i] for i in range(4))
    # Catmull and Rom's cubic: through b and c, with the slopes of their neighbours.
    cubic = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return jnp.where(cubic < c, c, cubic)


@functools.cache
def _free_shares() -> np.ndarray:
    """(counts, cells + 3): with a column before the first, which is that of an even function."""
    with (resources.files(__package__) / "free_share.npy").open("rb") as file:
        table = np.load(file)
    return np.concatenate([table[:, 1:2], table, 2 * table[:, -1:] - table[:, -2:-1]], 1)


def log_sequential(row: jax.Array, col: jax.Array, mask: jax.Array, reach: jax.Array) -> jax.Array:
    """Log density of places in the unit square, against the uniform one.

    For more than six slots the mean is over the cyclic orders of the targets present only:
    exact for two, within some % for three.

    Args:
      row: (K, ...) places, in sides of the square.
      col: the same across.
      mask: (K, ...) targets present.
      reach: least distance, in sides of the square.

    Returns:
      (...,) natural logarithms; 0 for fewer than two targets.

    Example:
      >>> x = jnp.array([0.5, 0.1])
      >>> round(float(log_sequential(x, x, jnp.ones(2, bool), jnp.array(0.3))), 1)
      0.2
    """
    free = 1 - _covered(row, col, mask, reach)
    slots = mask.shape[0]
    if slots > _MOST_ORDERED:
        orders = [np.roll(np.arange(slots), -shift) for shift in range(slots)]
        total = sum(jnp.where(mask[o[0]], _in_order(free[o], mask[o]), 0) for o in orders)
        number = mask.sum(0)
        return jnp.log(jnp.where(number > 0, total, 1) / jnp.maximum(number, 1))
    # Sum over orders by subsets: of all that end with target i.
    area: dict[int, jax.Array] = {0: jnp.ones_like(free[0])}
    mean: dict[int, jax.Array] = {0: jnp.ones(free.shape[3:], free.dtype)}
    factor: dict[int, jax.Array] = {0: jnp.ones(free.shape[3:], free.dtype)}
    for subset in range(1, 1 << slots):
        members = [i for i in range(slots) if subset >> i & 1]
        ending = [
            mean[subset ^ 1 << i] * jnp.where(mask[i], factor[subset ^ 1 << i], 1) for i in members
        ]
        mean[subset] = sum(ending[1:], ending[0]) / len(members)
        last = members[-1]
        area[subset] = area[subset ^ 1 << last] * free[last]
        factor[subset] = 1 / _share(area[subset])
    return jnp.log(mean[(1 << slots) - 1])


def _in_order(free: jax.Array, mask: jax.Array) -> jax.Array:
    """Product of one over the free areas, targets in the order given."""
    left, density = jnp.ones_like(free[0]), jnp.ones(free.shape[3:], free.dtype)
    for slot in range(free.shape[0]):
        density = density * jnp.where(mask[slot], 1 / _share(left), 1)
        left = left * free[slot]
    return density


def _share(free: jax.Array) -> jax.Array:
    """Share (...,) of the lattice that is free, at least half a point."""
    return jnp.maximum(free.mean((0, 1)), 0.5 / _LATTICE**2)


def _covered(row: jax.Array, col: jax.Array, mask: jax.Array, reach: jax.Array) -> jax.Array:
    """(K, G, G, ...) share of each lattice point that a target covers."""
    lattice = (np.arange(_LATTICE) + 0.5) / _LATTICE
    across = jnp.asarray(lattice, row.dtype).reshape(1, -1, *(1,) * (row.ndim - 1))
    distance2 = ((row[:, None] - across) ** 2)[:, :, None] + ((col[:, None] - across) ** 2)[:, None]
    distance = jnp.sqrt(jnp.maximum(distance2, 1e-12))
    covered = jnp.clip((reach - distance) * _LATTICE + 0.5, 0, 1)
    # A separation of zero covers nothing.
    return jnp.where(mask[:, None, None] & (reach > 0), covered, 0)
