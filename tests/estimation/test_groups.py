"""Groups: split at their weakest links, and answered as one where no window holds them."""

from typing import Any

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from dscsnet_jax.estimation.groups import components, linked, members, parts, reach_of_groups
from dscsnet_jax.estimation.unmix import unmix
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.prior import scene_prior
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.targets import from_lists

pytestmark = pytest.mark.slow

LINE = np.column_stack([np.full(13, 15.0), 5.0 + np.arange(13), np.full(13, 200.0)])
_ANGLE = 2 * np.pi * np.arange(24) / 24
_RADIUS = 24 / (2 * np.pi)  # pixels: neighbours are one pixel apart along the ring
RING = np.column_stack(
    [15 + _RADIUS * np.cos(_ANGLE), 15 + _RADIUS * np.sin(_ANGLE), np.full(24, 200.0)]
)
MOST, ROOM = 11, 7.0


def frames_of(tables: list[Any], side: int, seed: int = 0) -> np.ndarray:
    truth = from_lists([table.tolist() for table in tables])
    clean = jax.jit(lambda t: render(t, frame_size=side, psf=0.5))(truth)
    rng = np.random.default_rng(seed)
    return np.asarray(clean) + 10 + rng.normal(0, 1, clean.shape)


def parts_of(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    frame = np.zeros(len(table), int)
    pairs = linked(table[:, :2], frame, reach_of_groups(0.5))
    group = components(pairs, len(table))
    return parts(table[:, :2], group, ROOM, MOST), pairs


@pytest.mark.parametrize("table", [LINE, RING], ids=["line", "ring"])
def test_parts_leave_room_for_as_many_guests(table: np.ndarray) -> None:
    part, pairs = parts_of(table)
    number = np.bincount(part)
    assert len(number) >= 3
    assert number.max() <= (MOST + 1) // 2
    assert number.min() >= 2
    for index in range(len(number)):
        assert np.ptp(table[part == index, :2], axis=0).max() <= ROOM
    member, target, guest = members(part, pairs, table[:, :2], table[:, 2])
    np.testing.assert_array_equal(np.sort(target[~guest]), np.arange(len(table)))
    np.testing.assert_array_equal(member[~guest], part[target[~guest]])
    assert (part[target[guest]] != member[guest]).all()
    for index in range(len(number)):  # own ones first, and of the guests the nearest first
        own, far = table[part == index, :2], table[target[guest & (member == index)], :2]
        assert not guest[member == index][: number[index]].any()
        distance = np.linalg.norm(far[:, None] - own, axis=-1).min(1)
        assert (np.diff(distance) >= -1e-9).all()


def test_groups_that_a_window_holds_stay_whole_and_others_are_cut_at_the_gap() -> None:
    small = LINE[:5]
    assert (parts_of(small)[0] == 0).all()
    # Twelve in a row, with the largest gap of the middle half between the fifth and the sixth.
    row = np.column_stack([np.zeros(12), 0.5 * np.arange(12) + (np.arange(12) > 4), np.ones(12)])
    part, _ = parts_of(row)
    assert (part[:5] == part[0]).all()
    assert part[5] != part[4]


@pytest.mark.parametrize("table", [LINE, RING], ids=["line", "ring"])
def test_row12_more_targets_that_touch_than_a_window_holds_are_all_found(table: np.ndarray) -> None:
    """Told how bright they are: fewer and brighter ones one pixel apart give the same frame."""
    known = Known(sensor=Sensor(read_noise=1.0), prior=scene_prior(intensity=(195.0, 205.0)))
    answer = unmix(frames_of([table], 31), known, estimate="map")
    there = np.asarray(answer.targets.mask)[0]
    assert there.sum() == len(table)
    assert answer.crowded[0, there].all()
    assert set(answer.status()[0, there].tolist()) == {"crowded"}
    assert not answer.truncated.any()
    place = np.asarray(answer.targets.position)[0, there]
    distance = np.linalg.norm(place[:, None] - table[:, :2], axis=-1)
    assert distance[linear_sum_assignment(distance)].max() < 0.5
    assert (np.asarray(answer.residual) ** 2).mean() < 1.15


@pytest.mark.parametrize("estimate", ["map", "mean"])
def test_row4_one_target_without_its_peak_is_found_and_not_truncated(estimate: str) -> None:
    """Saturated by far, or with its brightest pixel masked."""
    rng = np.random.default_rng(1)
    bright = [[500.0, 1500.0, 10_000.0, 50_000.0][k % 4] for k in range(16)]
    tables = [np.array([[*(5 + rng.uniform(-0.4, 0.4, 2)), light]]) for light in bright]
    frames = frames_of(tables, 11)
    wells = unmix(np.clip(frames.round(), 0, 255).astype(np.uint8), estimate=estimate)
    frames[:, 5, 5] = np.nan
    masked = unmix(frames, estimate=estimate, mask_invalid=True)
    for answer in (wells, masked):
        assert answer.targets.count.tolist() == [1] * 16
        assert not answer.truncated.any()
        error = np.asarray(answer.targets.position)[:, 0] - np.array(tables)[:, 0, :2]
        assert np.abs(error / answer.std[:, 0, :2]).max() < 5
    assert wells.saturated[:, 0].tolist() == [light >= 1500 for light in bright]
    assert set(masked.status()[:, 0].tolist()) == {"invalid"}
