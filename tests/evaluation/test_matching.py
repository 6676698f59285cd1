"""Matching: the benchmark's greedy rule and the optimal assignment."""

from itertools import permutations

import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.evaluation.matching import as_batch, matched, nearest_hits, optimal_hits
from dscsnet_jax.physics.targets import Targets, from_lists


def random_case(num_frames: int, seed: int) -> tuple[Targets, Targets]:
    rng = np.random.default_rng(seed)
    tables = [
        [
            np.c_[rng.uniform(0, 1, (n, 2)), rng.uniform(50, 250, n)]
            for n in rng.integers(0, 5, num_frames)
        ]
        for _ in range(2)
    ]
    return from_lists(tables[0], max_targets=7), from_lists(tables[1])


def brute_force(distance: np.ndarray, limit: float) -> tuple[int, float]:
    """(pairs, sum of distances) of the best matching, by trying all of them."""
    n, k = distance.shape
    wide = np.full((n, k + n), np.inf)  # the extra columns: unmatched
    wide[:, :k] = np.where(distance <= limit, distance, np.inf)
    best = (0, 0.0)
    for columns in permutations(range(k + n), n):
        chosen = wide[np.arange(n), columns]
        pairs = np.isfinite(chosen)
        best = min(best, (-int(pairs.sum()), float(chosen[pairs].sum())))
    return -best[0], best[1]


def test_nearest_taken_is_a_false_positive_even_with_a_second_truth_in_reach():
    truth = from_lists([[(5.0, 5.0, 240.0), (5.0, 5.5, 230.0)]])
    found = from_lists([[(5.0, 5.125, 250.0), (5.0, 5.25, 225.0)]])
    _, hits = nearest_hits(found, truth, (0.25,))
    assert hits.tolist() == [[True, False]]
    assert optimal_hits(found, truth, (0.25,))[1].tolist() == [[True, True]]


def test_threshold_is_inclusive():
    truth, found = from_lists([[(5.0, 5.0, 1.0)]]), from_lists([[(5.25, 5.0, 1.0)]])
    below = float(np.nextafter(0.25, 0))
    assert nearest_hits(found, truth, (below, 0.25))[1].tolist() == [[False], [True]]
    assert matched(found, truth, 0.25).distance.tolist() == [0.25]
    assert matched(found, truth, below).distance.size == 0


def test_brighter_detection_claims_the_truth_wherever_its_slot():
    truth = from_lists([[(5.0, 5.0, 240.0)]])
    found = from_lists([[(5.0, 5.0, 100.0), (5.0, 5.125, 200.0)]])
    scores, hits = nearest_hits(found, truth, (0.25,))
    assert scores.tolist() == [100.0, 200.0]
    assert hits.tolist() == [[False, True]]


def test_optimal_assignment_prefers_more_pairs_then_less_distance():
    # Nearest-first pairs (0, 0) and leaves detection 1 without a truth in reach.
    truth = from_lists([[(0.0, 0.0, 1.0), (0.0, 0.75, 1.0)]])
    found = from_lists([[(0.0, 0.25, 1.0), (0.0, -0.5, 1.0)]])
    pairs = matched(found, truth, 0.5)
    assert dict(zip(pairs.detection.tolist(), pairs.truth.tolist(), strict=True)) == {0: 1, 1: 0}
    assert pairs.distance.tolist() == [0.5, 0.5]
    # With a wider reach both matchings have two pairs: 0.5 + 0.5 < 0.25 + 1.25.
    assert matched(found, truth, np.inf).distance.sum() == 1.0


@pytest.mark.parametrize("limit", [0.0, 0.2, 0.45, 0.8, np.inf])
def test_optimal_assignment_equals_exhaustive_search(limit):
    found, truth = random_case(60, seed=1)
    pairs = matched(found, truth, limit)
    for b in range(60):
        p = found.position[b][found.mask[b]]
        q = truth.position[b][truth.mask[b]]
        distance = np.linalg.norm(p[:, None] - q[None], axis=-1)
        mine = pairs.distance[pairs.frame == b]
        size, total = brute_force(distance, limit)
        assert len(mine) == size
        assert mine.sum() == pytest.approx(total, abs=1e-12)


def test_pairs_are_one_to_one_and_index_the_padded_slots():
    found, truth = random_case(200, seed=2)
    pairs = matched(found, truth, 0.4)
    assert len(pairs.frame) > 100
    for side, slot in ((found, pairs.detection), (truth, pairs.truth)):
        assert len(set(zip(pairs.frame.tolist(), slot.tolist(), strict=True))) == len(slot)
        assert side.mask[pairs.frame, slot].all()
    offset = found.position[pairs.frame, pairs.detection] - truth.position[pairs.frame, pairs.truth]
    np.testing.assert_allclose(np.linalg.norm(offset, axis=-1), pairs.distance, rtol=1e-12)


def test_empty_slots_never_match_whatever_they_hold():
    truth = Targets(
        position=np.array([[[np.nan, 1.0], [3.0, 3.0]]]),
        intensity=np.array([[np.inf, 5.0]]),
        mask=np.array([[False, True]]),
    )
    found = from_lists([[(1.0, 1.0, 9.0), (3.0, 3.0, 8.0)]])
    pairs = matched(found, truth, np.inf)
    assert (pairs.detection.tolist(), pairs.truth.tolist()) == ([1], [1])


def test_jax_arrays_and_single_frames_are_accepted():
    truth = from_lists([[(1.0, 2.0, 240.0)]])
    single = Targets(
        position=jnp.asarray(truth.position[0]),
        intensity=jnp.asarray(truth.intensity[0]),
        mask=jnp.asarray(truth.mask[0]),
    )
    assert matched(single, truth, 0.1).distance.tolist() == [0.0]


def test_row05_wrong_shapes_name_the_argument_and_both_shapes():
    one, two = from_lists([[]]), from_lists([[], []])
    with pytest.raises(ValueError, match="detections hold 2 frames, truth holds 1"):
        matched(two, one, 0.25)
    wrong = Targets(position=np.zeros((1, 2, 3)), intensity=np.zeros((1, 2)), mask=np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"truth: expected .* got \(1, 2, 3\)"):
        as_batch(wrong, "truth")


def test_a_target_that_is_not_finite_is_refused():
    found = from_lists([[], [(np.nan, 1.0, 9.0)]])
    with pytest.raises(ValueError, match="detections: frame 1"):
        matched(found, from_lists([[], []]), 0.25)


@pytest.mark.parametrize("distance", [-1.0, np.nan])
def test_impossible_distance_is_refused(distance):
    with pytest.raises(ValueError, match="max_distance"):
        matched(from_lists([[]]), from_lists([[]]), distance)
