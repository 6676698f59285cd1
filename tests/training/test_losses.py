"""Losses: against sums done by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.training.losses import map_error, training_loss
from dscsnet_jax.unfolding.admm import Unfolded

X = np.array([[[3.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [5.0, 0.0]]], np.float32)
TRUTH = np.array([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 2.0]]], np.float32)
# Frame 0: 2^2 + 1^2 = 5; frame 1: 4^2 + 2^2 = 20; mean 12.5.
MEAN_OF_SUMS = 12.5


def test_map_error_sums_over_cells_and_averages_over_frames() -> None:
    assert float(map_error(jnp.asarray(X), jnp.asarray(TRUTH), 1.0)) == MEAN_OF_SUMS


def test_map_error_counts_in_units_of_the_scale() -> None:
    assert float(map_error(jnp.asarray(X), jnp.asarray(TRUTH), 2.0)) == MEAN_OF_SUMS / 4


def test_map_error_does_not_depend_on_how_frames_are_split_into_equal_batches() -> None:
    parts = [float(map_error(jnp.asarray(X[i : i + 1]), TRUTH[i : i + 1], 1.0)) for i in (0, 1)]
    assert parts == [5.0, 20.0]
    assert np.mean(parts) == MEAN_OF_SUMS


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 12.5), (0.5, 14.0), (2.0, 18.5)])
def test_symmetry_term_adds_its_mean_over_iterations_and_frames(
    weight: float, expected: float
) -> None:
    symmetry = jnp.array([[1.0, 3.0], [2.0, 6.0]])  # (K, B), mean 3
    answer = Unfolded(jnp.asarray(X), {"symmetry": symmetry})
    loss = training_loss(answer, jnp.asarray(TRUTH), scale=1.0, symmetry_weight=weight)
    assert float(loss) == expected


def test_without_symmetry_no_trace_is_needed() -> None:
    loss = training_loss(Unfolded(jnp.asarray(X)), TRUTH, scale=1.0, symmetry_weight=0.0)
    assert float(loss) == MEAN_OF_SUMS
