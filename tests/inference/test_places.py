"""Places: their density against plain draws of targets placed one after the other.

Squares are the unit square, `reach` is half its side, as in the preset `csist`.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.inference.places import log_free_share, log_sequential

REACH = 0.5
LATTICE = 0.02
"""Relative error of the density that comes with its lattice."""
PIECE, DRAWS = 2000, 30_000
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@jax.jit
def density(place: jax.Array, mask: jax.Array) -> jax.Array:
    """Of places (draws, K, 2), piece by piece to save memory."""

    def piece(some: jax.Array) -> jax.Array:
        row, col = jnp.moveaxis(some, (2, 1), (0, 1))
        there = jnp.broadcast_to(mask[:, None], row.shape)
        return jnp.exp(log_sequential(row, col, there, jnp.asarray(REACH, some.dtype)))

    pieces = place.reshape(-1, PIECE, *place.shape[1:])
    return jax.lax.map(piece, pieces).reshape(-1)


def apart(place: np.ndarray, reach: float = REACH) -> np.ndarray:
    """(draws,) bool: all pairs keep the separation."""
    first, second = np.triu_indices(place.shape[1], 1)
    return (np.linalg.norm(place[:, first] - place[:, second], axis=-1) >= reach).all(1)


def joint_draws(number: int) -> tuple[np.ndarray, float]:
    """Uniform places (DRAWS, number, 2) that keep the separation, and the share that did."""
    rng = np.random.default_rng(number)
    kept, tried = [], 0
    while sum(map(len, kept)) < DRAWS:
        place = rng.uniform(size=(400_000, number, 2))
        kept.append(place[apart(place)])
        tried += len(place)
    found = np.concatenate(kept)
    return np.float32(found[:DRAWS]), len(found) / tried


def sequential_draws(number: int) -> np.ndarray:
    """Places (DRAWS, number, 2), each drawn until it is far enough from those before."""
    rng = np.random.default_rng(10 + number)
    place = np.zeros((DRAWS, number, 2))
    for slot in range(number):
        todo = np.arange(DRAWS)
        while len(todo):
            place[todo, slot] = rng.uniform(size=(len(todo), 2))
            before = np.linalg.norm(place[todo, :slot] - place[todo, slot : slot + 1], axis=-1)
            todo = todo[(before < REACH).any(1)]
    return place


def in_the_middle(place: np.ndarray) -> np.ndarray:
    """(draws,) bool: some target lies in the central quarter of the square."""
    return (np.abs(place - 0.5).max(-1) < 0.25).any(1)


@pytest.fixture(scope="module", params=[2, 3], ids=["two", "three"])
def drawn(request: pytest.FixtureRequest) -> tuple[np.ndarray, float, np.ndarray]:
    """Joint draws, the share that keeps the separation, and their densities."""
    place, share = joint_draws(request.param)
    return place, share, np.asarray(density(place, np.ones(request.param, bool)), float)


def test_the_density_sums_to_one(drawn: tuple) -> None:
    _, share, value = drawn
    error = value.std() / DRAWS**0.5 * share
    assert error < LATTICE / 4, "the draws must tell"
    assert abs(value.mean() * share - 1) < LATTICE + 3 * error
    # It is not that of joint draws.
    assert value.std() * share > 0.1


def test_targets_avoid_the_middle_as_those_drawn_in_turn(drawn: tuple) -> None:
    """Who comes first may lie in the middle, and leaves little room for more."""
    place, _, value = drawn
    number = place.shape[1]
    middle, weight = in_the_middle(place), value / value.mean()
    reweighted = (weight * middle).mean()
    error = (weight * (middle - reweighted)).std() / DRAWS**0.5
    drawn_in_turn = in_the_middle(sequential_draws(number)).mean()
    both = np.hypot(error, (drawn_in_turn * (1 - drawn_in_turn) / DRAWS) ** 0.5)
    assert abs(reweighted - drawn_in_turn) < 0.005 + 3 * both
    expected, joint = {2: (0.386, 0.325), 3: (0.455, 0.338)}[number]
    assert drawn_in_turn == pytest.approx(expected, abs=0.01)
    assert middle.mean() == pytest.approx(joint, abs=0.01)


def test_the_order_of_targets_does_not_matter(drawn: tuple) -> None:
    place, _, value = drawn
    order = np.random.default_rng(0).permutation(place.shape[1])
    order = np.roll(order, 1) if (order == np.arange(len(order))).all() else order
    turned = density(place[:, order], np.ones(place.shape[1], bool))
    np.testing.assert_allclose(turned, value, rtol=1e-5)


def padded(place: np.ndarray, slots: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The same targets in some of `number` slots; the others hold anything."""
    wide = np.random.default_rng(1).uniform(size=(len(place), number, 2)).astype("f4")
    wide[:, slots] = place
    return wide, np.isin(np.arange(number), slots)


def test_padded_slots_change_nothing(drawn: tuple) -> None:
    place, _, value = drawn
    some, slots = place[:PIECE], np.array([4, 0, 2])[: place.shape[1]]
    np.testing.assert_allclose(density(*padded(some, slots, 5)), value[:PIECE], rtol=1e-5)


@pytest.mark.parametrize("slots", [[0, 1, 2], [6, 1, 4], [7, 2]])
def test_cyclic_orders_of_many_slots_come_near_to_all_orders(slots: list[int]) -> None:
    """Exactly for two targets, within some % for three, whichever slots they are in."""
    place, share = joint_draws(len(slots))
    exact = np.asarray(density(place, np.ones(len(slots), bool)), float)
    cyclic = np.asarray(density(*padded(place, np.array(slots), 8)), float)
    assert abs(cyclic.mean() * share - 1) < LATTICE + 3 * cyclic.std() * share / DRAWS**0.5
    if len(slots) == 2:
        np.testing.assert_allclose(cyclic, exact, rtol=1e-5)
    off = np.log(cyclic / exact)
    assert off.std() < 0.05
    assert np.abs(off).max() < 0.25
    turned = density(*padded(place, np.roll(slots, 1), 8))
    np.testing.assert_allclose(turned, cyclic, rtol=1e-5)


@pytest.mark.parametrize("slots", [3, 8])
def test_fewer_than_two_targets_and_no_separation_are_uniform(slots: int) -> None:
    row, col = np.float32([[0.2, 0.6, 0.9], [0.1, 0.3, 0.7]])
    row, col = (np.tile(a, 3)[:slots] for a in (row, col))
    second, log_density = np.arange(slots) == 1, quick_jit(log_sequential)
    for mask, reach in ((second & False, REACH), (second, REACH), (second | True, 0.0)):
        value = log_density(row, col, mask, np.float32(reach))
        assert float(value) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("slots", "x64"), [(3, True), (8, False)])
def test_derivatives_are_finite(slots: int, x64: bool) -> None:
    """Of any places: apart, on a lattice point, on each other, and where nothing is free."""
    with jax.enable_x64(x64), jax.debug_nans(True):
        rng = np.random.default_rng(2)
        place = rng.uniform(size=(100, 2, slots))
        place[1] = 6.5 / 12
        place[2, :, 1] = place[2, :, 0]
        place[3] = np.linspace(0, 1, slots)
        mask = rng.uniform(size=(100, slots)) < 0.7
        mask[:4] = True
        reach = np.where(np.arange(100) % 2 == 0, REACH, 0.9)
        reach[4] = 0

        def value(place: jax.Array, mask: jax.Array, reach: jax.Array) -> jax.Array:
            return log_sequential(place[0], place[1], mask, reach)

        slopes = quick_jit(jax.vmap(jax.grad(value, (0, 2))))
        by_place, by_reach = slopes(
            jnp.asarray(place, float), jnp.asarray(mask), jnp.asarray(reach, float)
        )
        assert np.isfinite(by_place).all()
        assert np.isfinite(by_reach).all()
        assert not np.asarray(by_place).swapaxes(1, 2)[~mask].any()
        assert (np.abs(by_place).max((1, 2)) > 0).mean() > 0.5


def test_derivatives_are_those_of_differences(x64: None) -> None:
    """Along a line of places: the density's change is the derivative's integral."""
    start, end = np.array([[0.1, 0.2], [0.8, 0.9]]), np.array([[0.3, 0.25], [0.6, 0.95]])
    steps = (np.arange(400) + 0.5) / 400

    @partial(jax.vmap, in_axes=0)
    def value_and_slope(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        def value(t: jax.Array) -> jax.Array:
            place = (1 - t) * start + t * end
            return log_sequential(place[:, 0], place[:, 1], jnp.ones(2, bool), jnp.array(REACH))

        return jax.jvp(value, (t,), (jnp.ones(()),))

    slope = quick_jit(value_and_slope)(jnp.asarray(steps))[1]
    ends = quick_jit(value_and_slope)(jnp.array([0.0, 1.0]))[0]
    assert abs(float(ends[1] - ends[0])) > 0.1
    np.testing.assert_allclose(slope.mean(), ends[1] - ends[0], atol=2e-3)


# --- shares of free places ---------------------------------------------------------

THROWS = 1 << 23  # of the table
LEAST = math.log(0.5 / THROWS)


def free_of_two(d: Any) -> Any:
    """P(distance > d) of two points in a unit square, d <= 1."""
    return 1 - (math.pi * d**2 - 8 / 3 * d**3 + d**4 / 2)


def test_free_share_of_two_and_its_derivative_equal_the_closed_form(x64: None) -> None:
    """On the points of the table and between them; a count's error is four standard ones."""
    d = jnp.array([0.013, 0.1, 0.307, 0.3, 0.5, 0.8, 0.991, 1.0])
    share = partial(log_free_share, jnp.array(2))
    free = free_of_two(d)
    error = 4 * jnp.sqrt((1 - free) / (free * THROWS))
    assert (jnp.abs(jnp.exp(jax.vmap(share)(d)) / free - 1) < error + 1e-5).all()
    d, free = d[:-1], free[:-1]  # at the end it is one of one side
    slope = jax.vmap(jax.grad(share))(d)
    expected = jax.vmap(jax.grad(lambda d: jnp.log(free_of_two(d))))(d)
    # Of the throws that fall into the two cells around.
    error = 4 / jnp.sqrt(0.04 * THROWS * -expected * free)
    assert (jnp.abs(slope / expected - 1) < error + 1e-2).all()


@pytest.mark.parametrize("ratio", [0.2, 0.37])
def test_free_shares_of_more_equal_plain_throws(ratio: float) -> None:
    """Three to five points thrown at once, by other random numbers."""
    place = np.random.default_rng(7).uniform(size=(100_000, 5, 2))
    apart = ((place[:, :, None] - place[:, None]) ** 2).sum(-1) >= ratio**2
    shares = np.exp(np.asarray(log_free_share(jnp.arange(6), jnp.array(ratio))))
    for count in (3, 4, 5):
        pairs = np.triu_indices(count, 1)
        free = apart[:, pairs[0], pairs[1]].all(1).mean()
        assert abs(shares[count] - free) < 4 * math.sqrt(free * (1 - free) / 100_000)


def test_free_shares_fall_to_half_a_throw() -> None:
    for d in (0.207, 0.3, 0.515, 0.9, 1.0, 1.5):
        shares = np.asarray(log_free_share(jnp.arange(40), jnp.array(d)))
        assert shares[:2].tolist() == [0, 0]
        fall = np.diff(shares[1:])
        assert (fall[shares[1:-1] > LEAST + 1e-3] < 0).all()
        assert (fall <= 0).all()
        assert shares[2] < 0
        assert shares[-1] == pytest.approx(LEAST)
    assert not np.asarray(log_free_share(jnp.arange(40), jnp.array(0.0))).any()
