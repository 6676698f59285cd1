"""The report: one object, JSON, tables, batches."""

import json

import numpy as np
import pytest

from dscsnet_jax.evaluation import metrics
from dscsnet_jax.evaluation.maps import psnr, ssim
from dscsnet_jax.evaluation.report import evaluate, format_table, join_batches
from dscsnet_jax.physics.targets import Targets, from_lists

TRUTH = [[(5.0, 5.0, 200.0), (5.0, 6.0, 200.0)], [(3.0, 3.0, 100.0)], []]
FOUND = [[(5.0, 5.125, 210.0)], [(3.0, 3.0, 100.0)], [(1.0, 1.0, 50.0)]]


def part(targets, frames, slots=None):
    kept = slice(slots)
    return Targets(
        position=targets.position[frames, kept],
        intensity=targets.intensity[frames, kept],
        mask=targets.mask[frames, kept],
    )


def test_scores_by_hand():
    row = evaluate(from_lists(FOUND), from_lists(TRUTH)).as_dict()
    # Ranked 210, 100, 50. At 0.05 and 0.10 px: miss, hit, miss; from 0.15 px: hit, hit, miss.
    assert row["AP05"] == row["AP10"] == pytest.approx(100 / 6, rel=1e-12)
    assert row["AP15"] == row["AP25"] == pytest.approx(200 / 3, rel=1e-12)
    assert row["mAP"] == pytest.approx((2 * 100 / 6 + 3 * 200 / 3) / 5, rel=1e-12)
    assert (row["frames"], row["targets"], row["detections"]) == (3, 3, 3)
    assert row["count_accuracy"] == pytest.approx(100 / 3, rel=1e-12)
    assert row["count_confusion"] == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    assert row["recall"] == row["precision"] == pytest.approx(200 / 3, rel=1e-12)
    assert row["position_rmse"] == pytest.approx(0.125 / 2**0.5, rel=1e-12)
    assert row["intensity_bias"] == pytest.approx(100 * 10 / 300, rel=1e-12)
    assert row["psnr"] is None
    assert row["matched"]["mAP"] == row["mAP"]


def test_match_distance_reaches_the_errors_but_not_the_map():
    narrow = evaluate(from_lists(FOUND), from_lists(TRUTH), match_distance=0.1)
    assert narrow.matches.recall == pytest.approx(1 / 3)
    assert narrow.cso == evaluate(from_lists(FOUND), from_lists(TRUTH)).cso
    assert narrow.as_dict()["match_distance"] == 0.1


def test_row14_empty_scores_are_json_with_null():
    for found, truth in (([], []), ([[]], [[]]), ([[]], [[(1.0, 1.0, 9.0)]])):
        row = evaluate(from_lists(found), from_lists(truth)).as_dict()
        again = json.loads(json.dumps(row, allow_nan=False))
        assert again == row
        assert again["position_rmse"] is None
    assert again["mAP"] == 0.0
    assert evaluate(from_lists([]), from_lists([])).as_dict()["mAP"] is None
    maps = np.zeros((0, 33, 33))
    none = from_lists([])
    assert evaluate(none, none, maps=maps, truth_maps=maps).as_dict()["ssim"] is None


def test_maps_are_scored_with_the_data_range_given():
    rng = np.random.default_rng(0)
    x, truth = rng.uniform(0, 99, (2, 3, 12, 12))
    targets = from_lists(TRUTH)
    scores = evaluate(targets, targets, maps=x, truth_maps=truth, data_range=99.0)
    assert scores.psnr == pytest.approx(psnr(x, truth, 99.0).mean(), rel=1e-12)
    assert scores.ssim == pytest.approx(ssim(x, truth, 99.0).mean(), rel=1e-12)
    with pytest.raises(ValueError, match="both maps and truth_maps"):
        evaluate(targets, targets, maps=x)


def test_row33_ragged_last_batch_scores_every_frame_once(data_dir):
    case = json.loads((data_dir / "cso_map_cases.json").read_text())[0]
    found, truth = from_lists(case["detections"]), from_lists(case["targets"])
    # 300 frames in batches of 128: the last one is padded with copies of its frames.
    index = [np.arange(0, 128), np.arange(128, 256), np.arange(256, 384) % 300]
    slots = [int(found.mask[i].sum(-1).max()) for i in index]
    joined = join_batches(
        (part(found, i, k) for i, k in zip(index, slots, strict=True)), num_frames=300
    )
    joined_truth = join_batches([part(truth, i) for i in index], num_frames=300)
    assert joined.mask.shape[0] == 300
    assert evaluate(joined, joined_truth).as_dict() == evaluate(found, truth).as_dict()
    tail = evaluate(part(joined, slice(256, 300)), part(joined_truth, slice(256, 300)))
    assert tail.frames == 44


def test_joining_fewer_frames_than_promised_is_refused():
    with pytest.raises(ValueError, match="2 frames, expected num_frames=3"):
        join_batches([from_lists([[], []])], num_frames=3)
    assert join_batches([]).mask.shape == (0, 1)


def test_table_aligns_and_marks_what_is_missing():
    ours = evaluate(from_lists(FOUND), from_lists(TRUTH))
    lines = format_table({"ours": ours, "a longer name": {"mAP": 46.36}}).splitlines()
    assert len({len(line) for line in lines}) == 1
    header = lines[0].split()
    assert header[:7] == ["method", "mAP", "AP05", "AP10", "AP15", "AP20", "AP25"]
    assert "psnr" not in header
    assert lines[2].split()[1] == f"{ours.cso.as_dict()['mAP']:.2f}"
    assert lines[3].split()[3:] == ["46.36"] + ["-"] * (len(header) - 2)


def test_table_of_chosen_columns():
    text = format_table({"a": {"mAP": 1.0, "targets": 7}}, {"targets": 0, "mAP": 1})
    assert text.splitlines()[2].split() == ["a", "7", "1.0"]
    assert format_table({}) == "method\n------"


def test_default_thresholds_name_the_keys_of_the_json_file():
    row = evaluate(from_lists(FOUND), from_lists(TRUTH)).as_dict()
    expected = [f"AP{round(100 * t):02d}" for t in metrics.THRESHOLDS]
    assert list(row)[:6] == ["mAP", *expected]
