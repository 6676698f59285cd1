"""Calibration: the truth is anywhere among the samples as often, for each prior and sensor."""

import dataclasses

import calibration
import pytest

pytestmark = pytest.mark.slow

NUM = 200
LEAST = 1e-4  # of 130 probabilities one is below this by chance in 80 runs; seeds are fixed


CASES = [
    (prior, sensor)
    for prior in calibration.PRIORS
    for sensor in calibration.SENSORS
    if sensor != "misfit" or prior == "cluster"  # whose programs are others; all by command
]


@pytest.mark.parametrize(("prior", "sensor"), CASES)
def test_the_truth_has_any_rank_among_the_samples_as_often(prior: str, sensor: str) -> None:
    found = calibration.calibrate(prior, sensor, NUM, seed=1)
    assert min(found.values()) > LEAST, found


def test_error_bars_that_are_too_small_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    observe = calibration.observe
    monkeypatch.setattr(
        calibration,
        "observe",
        lambda frames, sensor: observe(frames, dataclasses.replace(sensor, read_noise=1.0)),
    )
    found = calibration.calibrate("cluster", "gaussian", NUM, seed=1)
    assert max(found[name] for name in ("row", "col")) < LEAST, found
