"""CSO-mAP against the reference implementation's answers; counts and errors by hand."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.evaluation.metrics import (
    THRESHOLDS,
    average_precision,
    count_accuracy,
    count_confusion,
    cso_map,
    cso_map_matched,
    match_scores,
)
from dscsnet_jax.physics.targets import Targets, from_lists

ONE = [(5.0, 5.0, 240.0)]


def cases(data_dir):
    for case in json.loads((data_dir / "cso_map_cases.json").read_text()):
        yield from_lists(case["detections"]), from_lists(case["targets"]), case["expected"]


def shuffled(targets, frames, slots):
    return Targets(
        position=targets.position[frames][:, slots],
        intensity=targets.intensity[frames][:, slots],
        mask=targets.mask[frames][:, slots],
    )


def loop_ap(found, truth, threshold):
    """The metric written as its definition reads, one detection at a time."""
    ranked = []
    for b in range(len(found.mask)):
        real = truth.position[b][truth.mask[b]]
        taken = set()
        for k in np.argsort(-found.intensity[b], kind="stable"):
            if not found.mask[b, k]:
                continue
            distance = np.hypot(*(real - found.position[b, k]).T)
            nearest = int(distance.argmin()) if len(real) else -1
            hit = nearest >= 0 and distance[nearest] <= threshold and nearest not in taken
            if hit:
                taken.add(nearest)
            ranked.append((found.intensity[b, k], hit))
    ranked.sort(key=lambda pair: -pair[0])
    hits = [hit for _, hit in ranked]
    precision = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits))]
    best = [max(precision[i:]) for i, hit in enumerate(hits) if hit]
    return sum(best) / int(truth.mask.sum())


def test_equals_the_reference_implementation(data_dir):
    seen = 0
    for found, truth, expected in cases(data_dir):
        scores = cso_map(found, truth).as_dict()
        assert scores.keys() == expected.keys()
        for name, value in expected.items():
            assert scores[name] / 100 == pytest.approx(value, abs=1e-6), name
        seen += 1
    assert seen == 3


def test_equals_a_plain_loop_on_crowded_frames():
    rng = np.random.default_rng(0)
    tables = [
        [np.c_[rng.uniform(0, 1, (n, 2)), rng.uniform(50, 250, n)] for n in rng.integers(0, 7, 80)]
        for _ in range(2)
    ]
    found, truth = from_lists(tables[0], max_targets=12), from_lists(tables[1])
    expected = [loop_ap(found, truth, t) for t in THRESHOLDS]
    np.testing.assert_allclose(cso_map(found, truth).average_precisions, expected, rtol=1e-12)


def test_padding_and_array_type_do_not_matter(data_dir):
    found, truth, _ = next(cases(data_dir))
    wide = Targets(
        position=np.pad(found.position, ((0, 0), (0, 58), (0, 0)), constant_values=5.0),
        intensity=np.pad(found.intensity, ((0, 0), (0, 58)), constant_values=1e9),
        mask=np.pad(found.mask, ((0, 0), (0, 58))),
    )
    assert cso_map(wide, truth) == cso_map(found, truth)
    exact = from_lists([[(5.0, 5.125, 250.0)], ONE])
    on_device = Targets(*(jnp.asarray(a) for a in (exact.position, exact.intensity, exact.mask)))
    both = from_lists([ONE, ONE])
    assert cso_map(on_device, both) == cso_map(exact, both)


def test_row15_order_of_frames_and_slots_has_no_influence_even_with_equal_scores(data_dir):
    rng = np.random.default_rng(0)
    for found, truth, _ in cases(data_dir):
        tied = found.replace(intensity=np.round(found.intensity, -1))
        frames = rng.permutation(len(truth.mask))
        mixed = shuffled(tied, frames, rng.permutation(tied.mask.shape[1]))
        mixed_truth = shuffled(truth, frames, rng.permutation(truth.mask.shape[1]))
        assert len(np.unique(tied.intensity[tied.mask])) < tied.mask.sum()
        assert cso_map(mixed, mixed_truth) == cso_map(tied, truth)
        assert cso_map_matched(mixed, mixed_truth) == cso_map_matched(tied, truth)


def test_average_precision_by_hand():
    # Hits 1 0 1 1 of 5: P = 1, 1/2, 2/3, 3/4; envelope at the hits 1, 3/4, 3/4.
    hits = np.array([True, False, True, True])
    area = average_precision(np.array([4.0, 3.0, 2.0, 1.0]), hits, 5)
    assert area == pytest.approx((1 + 0.75 + 0.75) / 5, rel=1e-12)


def test_row15_equal_scores_are_one_step_of_the_curve():
    # After the tie: 1 hit of 2 detections, whichever of them stands first.
    scores = np.array([7.0, 7.0])
    for hits in ([True, False], [False, True]):
        assert average_precision(scores, np.array(hits), 1) == 0.5


def test_matched_variant_counts_the_crossed_pair():
    truth = from_lists([[(5.0, 5.0, 240.0), (5.0, 5.5, 230.0)]])
    found = from_lists([[(5.0, 5.125, 250.0), (5.0, 5.25, 225.0)]])
    assert cso_map(found, truth).average_precisions == (0.0, 0.0, 0.5, 0.5, 0.5)
    assert cso_map_matched(found, truth).average_precisions == (0.0, 0.0, 0.5, 0.5, 1.0)


def test_names_of_thresholds():
    scores = cso_map(from_lists([ONE]), from_lists([ONE]), (0.05, 0.125, 0.25, 1.0))
    assert list(scores.as_dict()) == ["mAP", "AP05", "AP12.5", "AP25", "AP100"]


@pytest.mark.parametrize("metric", [cso_map, cso_map_matched])
@pytest.mark.parametrize(
    ("found", "truth", "expected"),
    [
        ([], [], math.nan),
        ([[]], [[]], math.nan),
        ([ONE], [[]], math.nan),
        ([[]], [ONE], 0.0),
        ([ONE], [ONE], 1.0),
        ([[], ONE], [ONE, []], 0.0),
    ],
    ids=["no frames", "empty frame", "no truth", "no detections", "one image", "crossed"],
)
def test_row14_empty_cases_are_defined(metric, found, truth, expected):
    scores = metric(from_lists(found), from_lists(truth))
    np.testing.assert_equal(scores.average_precisions, (expected,) * 5)
    np.testing.assert_equal(scores.mean, expected)


def test_row14_zero_slots():
    none = from_lists([[], []], max_targets=0)
    assert cso_map(none, from_lists([ONE, []])).mean == 0.0
    assert math.isnan(cso_map(from_lists([ONE, []]), none).mean)
    assert count_confusion(none, none).tolist() == [[2, 0]]


def test_row14_counts_and_errors_of_nothing():
    empty = from_lists([])
    assert math.isnan(count_accuracy(empty, empty))
    assert count_confusion(empty, empty).tolist() == [[0, 0]]
    assert all(math.isnan(v) for v in match_scores(empty, empty, 0.25))
    missed = match_scores(from_lists([[]]), from_lists([ONE]), 0.25)
    assert missed.recall == 0.0
    assert all(math.isnan(v) for v in missed[1:])
    false_alarm = match_scores(from_lists([ONE]), from_lists([[]]), 0.25)
    assert math.isnan(false_alarm.recall)
    assert false_alarm.precision == 0.0


def test_confusion_and_accuracy_by_hand():
    truth = from_lists([ONE * n for n in (1, 1, 2, 2, 0, 2)])
    found = from_lists([ONE * n for n in (1, 2, 2, 5, 0, 3)])
    # Rows: 0, 1, 2 true; columns: 0, 1, 2, more than 2 estimated.
    assert count_confusion(found, truth).tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 2]]
    assert count_accuracy(found, truth) == 0.5


def test_errors_of_matched_targets_by_hand():
    truth = from_lists([[(5.0, 5.0, 200.0), (7.0, 7.0, 100.0)], [(2.0, 2.0, 100.0)], []])
    found = from_lists(
        [[(5.0, 5.25, 210.0), (9.0, 9.0, 80.0)], [(2.5, 2.0, 70.0)], [(1.0, 1.0, 60.0)]]
    )
    scores = match_scores(found, truth, 0.5)
    assert scores.recall == pytest.approx(2 / 3, rel=1e-12)
    assert scores.precision == 0.5
    assert scores.position_rmse == pytest.approx(((0.25**2 + 0.5**2) / 2) ** 0.5, rel=1e-12)
    assert scores.position_median == 0.375
    assert scores.intensity_rmse == pytest.approx(((10**2 + 30**2) / 2) ** 0.5, rel=1e-12)
    assert scores.intensity_bias == pytest.approx((10 - 30) / 300, rel=1e-12)
    near = match_scores(found, truth, 0.25)
    assert (near.recall, near.position_rmse) == (pytest.approx(1 / 3), 0.25)
