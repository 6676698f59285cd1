"""Read-out rules on maps whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.evaluation.report import evaluate
from dscsnet_jax.maps.readout import peak_centroids, threshold_cells
from dscsnet_jax.physics import grid, scene


def one_map(cells: dict[tuple[int, int], float], side: int = 15) -> jax.Array:
    x = np.zeros((1, side, side), np.float32)
    for cell, value in cells.items():
        x[0][cell] = value
    return jnp.asarray(x)


@pytest.mark.parametrize("division", [3, 5])
def test_cells_at_or_above_the_threshold_in_falling_order(division: int) -> None:
    x = one_map({(3, 4): 50.0, (8, 2): 70.0, (9, 9): 49.99})
    found = threshold_cells(x, division=division, max_targets=4).targets
    assert found.mask[0].tolist() == [True, True, False, False]
    assert found.intensity[0, :2].tolist() == [70.0, 50.0]
    expected = [[grid.to_position(v, division) for v in cell] for cell in ((8, 2), (3, 4))]
    np.testing.assert_allclose(found.position[0, :2], expected, atol=1e-6)


def test_row15_equal_cells_keep_the_order_of_the_cells() -> None:
    x = one_map({(9, 1): 60.0, (2, 7): 60.0, (2, 3): 60.0})
    found = threshold_cells(x, division=3, max_targets=3).targets
    order = [(2, 3), (2, 7), (9, 1)]
    np.testing.assert_allclose(found.position[0] * 3 + 1, order, atol=1e-5)


@pytest.mark.parametrize("rule", [threshold_cells, peak_centroids])
def test_row12_more_targets_than_slots_is_flagged(rule) -> None:  # type: ignore[no-untyped-def]
    cells = {(1, 1): 100.0, (1, 9): 90.0, (9, 1): 80.0}
    full = rule(one_map(cells), division=3, max_targets=2)
    assert full.truncated.tolist() == [True]
    assert full.targets.intensity[0].tolist() == [100.0, 90.0]
    assert rule(one_map(cells), division=3, max_targets=3).truncated.tolist() == [False]


def test_peak_claims_what_it_lacks_from_its_neighbours() -> None:
    x = one_map({(7, 7): 150.0, (7, 8): 100.0, (6, 7): 70.0})
    found = peak_centroids(x, division=3, capacity=235.0).targets
    share = 85 / 170  # it lacks 85 of the 170 counts around it
    np.testing.assert_allclose(found.intensity[0, 0], 235.0, rtol=1e-6)
    expected = [(7 - 70 * share / 235 - 1) / 3, (7 + 100 * share / 235 - 1) / 3]
    np.testing.assert_allclose(found.position[0, 0], expected, rtol=1e-5)


def test_targets_two_cells_apart_keep_their_energy() -> None:
    x = one_map({(7, 5): 200.0, (7, 6): 40.0, (7, 7): 230.0})
    found = peak_centroids(x, division=3, capacity=235.0).targets
    assert int(found.count[0]) == 2
    assert float(found.intensity.sum()) <= 470.0 + 1e-3
    assert float(found.intensity[0, 1]) >= 230.0


def test_peaks_closer_than_the_separation_are_one_target() -> None:
    x = one_map({(7, 7): 235.0, (8, 8): 100.0})
    assert int(peak_centroids(x, division=3, separation=0.5, capacity=235.0).targets.count[0]) == 1
    assert int(peak_centroids(x, division=3, separation=0.4, capacity=235.0).targets.count[0]) == 2


def test_borders_zeros_and_negatives() -> None:
    x = one_map({(0, 0): 235.0, (14, 14): 100.0, (5, 5): -300.0})
    found = peak_centroids(x, division=3).targets
    np.testing.assert_allclose(found.position[0, :2], [[-1 / 3, -1 / 3], [13 / 3, 13 / 3]])
    assert int(peak_centroids(one_map({}), division=3).targets.count[0]) == 0
    assert int(threshold_cells(one_map({}), division=3).targets.count[0]) == 0


def test_frames_do_not_change_each_other() -> None:
    key = jax.random.key(0)
    x = 200 * jax.random.uniform(key, (4, 15, 15)) ** 6
    together = peak_centroids(x, division=3)
    changed = peak_centroids(x.at[0].set(0), division=3)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(changed), strict=True):
        np.testing.assert_array_equal(a[1:], b[1:])


def test_perfect_maps_that_keep_sub_cell_positions_beat_the_grid_wall() -> None:
    preset = scene.get_preset("csist")
    truth = scene.simulate(preset, scene.frame_keys(0, "val", jnp.arange(500))).targets
    kwargs = {"frame_size": 11, "division": 3}
    fields = (truth.position, truth.intensity, truth.mask)
    scores = {}
    for width in (0.0, 0.3):
        x = grid.grid_map(*fields, **kwargs, width=width)
        found = peak_centroids(x, division=3, separation=0.4, capacity=235.0).targets
        scores[width] = evaluate(found, truth)
    assert scores[0.3].count_accuracy > 0.95
    assert scores[0.3].cso.mean > scores[0.0].cso.mean + 0.15


@pytest.mark.parametrize("rule", [threshold_cells, peak_centroids])
def test_row5_maps_need_a_batch_axis_and_slots(rule) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"\(15, 15\)"):
        rule(jnp.zeros((15, 15)), division=3)
    with pytest.raises(ValueError, match="max_targets"):
        rule(jnp.zeros((1, 15, 15)), division=3, max_targets=0)
