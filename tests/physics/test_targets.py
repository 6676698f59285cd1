"""Targets: tables to padded arrays and back, and their order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.physics.targets import Targets, from_lists, sort_by_intensity, to_lists

TABLES = [
    np.array([[1.0, 2.0, 240.0], [3.5, 4.25, 220.0], [0.1, 1e-300, -1.0]]),
    np.zeros((0, 3)),
    np.array([[9.0, 8.0, 1e22]]),
]


def test_padding_round_trip_is_exact() -> None:
    targets = from_lists(TABLES)
    assert targets.position.shape == (3, 3, 2)
    assert targets.mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert targets.count.tolist() == [3, 0, 1]
    assert not targets.position[1].any()
    assert not targets.intensity[2, 1:].any()
    for back, table in zip(to_lists(targets), TABLES, strict=True):
        np.testing.assert_array_equal(back, table)


def test_columns_are_row_col_intensity() -> None:
    targets = from_lists([[(1.0, 2.0, 3.0)]])
    assert targets.position.tolist() == [[[1.0, 2.0]]]
    assert targets.intensity.tolist() == [[3.0]]


def test_slots_may_be_more_than_needed_and_are_at_least_one() -> None:
    assert from_lists(TABLES, max_targets=5).mask.shape == (3, 5)
    assert from_lists([[], []]).mask.shape == (2, 1)
    assert from_lists([]).position.shape == (0, 1, 2)
    assert to_lists(from_lists([])) == []


def test_row12_more_targets_than_slots_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"3 targets, more than max_targets=2"):
        from_lists(TABLES, max_targets=2)


def test_gaps_in_the_mask_are_skipped() -> None:
    targets = from_lists([[(1, 1, 1.0), (2, 2, 2.0), (3, 3, 3.0)]])
    gap = targets.replace(mask=np.array([[True, False, True]]))
    assert to_lists(gap)[0][:, 2].tolist() == [1.0, 3.0]


def test_sort_is_falling_stable_and_moves_padding_last() -> None:
    intensity = jnp.array([[5.0, 9.0, 5.0, 100.0, 7.0, 5.0], [0.0, -2.0, 3.0, 0.0, 4.0, 0.0]])
    mask = jnp.array(
        [[True, True, True, False, True, True], [False, True, True, False, True, True]]
    )
    slots = jnp.arange(6.0)
    position = jnp.broadcast_to(jnp.stack((slots, -slots), -1), (2, 6, 2))
    got = sort_by_intensity(Targets(position=position, intensity=intensity, mask=mask))
    assert got.position[0, :, 0].tolist() == [1.0, 4.0, 0.0, 2.0, 5.0, 3.0]
    assert got.position[1, :4, 0].tolist() == [4.0, 2.0, 5.0, 1.0]
    np.testing.assert_array_equal(got.position[..., 1], -got.position[..., 0])
    assert got.intensity[0, :5].tolist() == [9.0, 7.0, 5.0, 5.0, 5.0]
    assert got.mask.tolist() == [[True] * 5 + [False], [True] * 4 + [False] * 2]


def test_targets_are_a_pytree_and_sort_under_jit_and_vmap() -> None:
    targets = jax.tree.map(jnp.asarray, from_lists(TABLES[::2]))
    plain = sort_by_intensity(targets)
    for transformed in (jax.jit(sort_by_intensity), jax.vmap(sort_by_intensity)):
        got = transformed(targets)
        jax.tree.map(np.testing.assert_array_equal, got, plain)
