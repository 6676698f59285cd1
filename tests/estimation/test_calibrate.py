"""Calibration: what frames have in common is learned from them, and what is known is kept."""

from collections.abc import Callable

import jax
import numpy as np
import pytest

from dscsnet_jax.estimation.calibrate import Calibration, _piled_up, _Search, _Trial, calibrate
from dscsnet_jax.estimation.windows import flat
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.prior import preset_prior, scene_prior
from dscsnet_jax.physics import scene
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.targets import from_lists

pytestmark = pytest.mark.slow

PRESET = scene.get_preset("csist_noise", read_noise=2.0, pedestal=15.0, sigma=0.6)
TRUE = PRESET.known
PLACES = preset_prior(PRESET).replace(intensity=None, count=None, places="joint")
"""Where targets are is told: to search for it takes minutes."""


def frames_of(number: int) -> np.ndarray:
    keys = scene.frame_keys(5, "val", np.arange(number))
    return np.asarray(jax.jit(scene.simulate, static_argnums=0)(PRESET, keys).frames)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return frames_of(48)


@pytest.fixture(scope="module")
def taught(frames: np.ndarray) -> Calibration:
    return calibrate(frames, Known(0.6, prior=PLACES))


def test_sensor_is_learned(taught: Calibration) -> None:
    for name, truth in (("read_noise", 2.0), ("level", 15.0)):
        value, error = taught.parameters[name]
        assert abs(value - truth) < 4 * error, name
        assert error < 0.03, name
    assert taught.known.sensor.saturation == 255  # many pixels are stuck at it


def test_optics_are_learned(frames: np.ndarray) -> None:
    prior = PLACES.replace(intensity=TRUE.prior.intensity, count=TRUE.prior.count)
    known = Known(sensor=Sensor(read_noise=2.0, background=15.0), prior=prior)
    found = calibrate(frames[:32], known)
    width, error = found.parameters["width"]  # the search begins at 0.5
    assert found.known.psf.sigma == pytest.approx(width)
    assert abs(width - 0.6) < 4 * error
    assert error < 0.01


def test_intensities_are_learned(taught: Calibration) -> None:
    low, high = taught.known.prior.intensity.range
    assert abs(low - 220) < 11
    assert abs(high - 250) < 12.5


def test_counts_are_learned(taught: Calibration) -> None:
    share = np.array(taught.known.prior.count)
    truth = np.array(TRUE.prior.count)
    assert share.sum() == pytest.approx(1)
    assert np.abs(share[: len(truth)] - truth).max() < 4 * (0.25 / 48) ** 0.5
    assert taught.gain > 50
    assert taught.other < 0.1


def test_it_tells_what_it_learned(taught: Calibration) -> None:
    lines = taught.report().splitlines()
    assert lines[0] == "learned from 48 frames"
    assert any(line.startswith("read noise") and line.endswith("counts") for line in lines)
    assert any(line.startswith("groups by targets: ") and "3: " in line for line in lines)


def test_what_is_known_is_kept(frames: np.ndarray) -> None:
    prior = PLACES.replace(intensity=TRUE.prior.intensity, count=TRUE.prior.count)
    start = Known(0.6, Sensor(read_noise=2.0, background=15.0, saturation=255.0), prior)
    kept = calibrate(frames[:16], start)
    assert kept.known.sensor == start.sensor
    assert kept.known.prior.intensity == prior.intensity
    assert kept.known.psf.sigma == 0.6
    assert not kept.parameters


@pytest.mark.parametrize(
    ("wrong", "start", "message"),
    [
        (np.zeros((3, 11, 11)), Known(), "at least 8 frames"),
        (np.zeros((9, 11, 11)), Known(), "without targets"),
        (np.zeros((9, 11, 11)), Known(sensor=Sensor(read_noise=np.ones(9))), "'read_noise'"),
    ],
)
def test_what_teaches_nothing_is_refused(wrong: np.ndarray, start: Known, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(wrong, start)


def test_a_full_well_is_what_many_pixels_are_stuck_at() -> None:
    rng = np.random.default_rng(0)
    light = np.round(rng.gamma(1, 100, (16, 11, 11)))
    assert _piled_up(np.minimum(light, 255.0)) == 255
    assert _piled_up(light) == np.inf
    assert _piled_up(rng.poisson(1.0, (16, 11, 11)).clip(max=3).astype(float)) == np.inf
    light[0, 0, 0] = np.nan
    assert _piled_up(np.minimum(light, 255.0)) == 255


class Told(_Search):
    """A search among what is worth so much, with 80 frames of one group each."""

    def __init__(self, value: Callable[[Known], float]) -> None:
        self.value, self.y, self.start, self.trials = value, np.zeros((80, 11, 11)), Known(0.5), 9
        self.observation, self.base, self.parameters = np.zeros(80), np.zeros(80), {}
        self.targets = flat(from_lists([[(5.0, 5.0, 600.0)]] * 80))
        self.best = self.trial(Known(Gaussian(0.5)))

    def trial(self, known: Known) -> _Trial:
        score = np.full(len(self.y), self.value(known) / 80)
        counts = np.tile(np.eye(9)[2], (len(score), 1))
        return _Trial(known, float(score.sum()), score, self.targets, counts)


def test_what_is_known_of_places_decides_between_brighter_and_fainter_targets() -> None:
    def value(known: Known) -> float:
        if known.prior.intensity is None:
            return 0.0
        low, high = known.prior.intensity.range
        middle = (low + high) / 2
        bright, faint = (np.exp(-(np.log(middle / at) ** 2) / 0.08) for at in (500.0, 200.0))
        # Bright ones are worth more until a square is known that holds the faint ones.
        return float(400 * bright + faint * (300 if known.prior.cluster_size is None else 900))

    search = Told(value)
    taught = search.calibration()
    low, high = taught.known.prior.intensity.range
    assert abs(np.log((low + high) / 2 / 200)) < 0.05
    assert taught.known.prior.cluster_size is not None
    assert taught.lead == pytest.approx(500 * 64 / 80, rel=0.02)  # by those that were followed


def test_a_number_at_the_end_of_what_can_be_is_averaged_over_the_others() -> None:
    def value(known: Known) -> float:
        """Rises by 50 nats with the logarithm of the separation up to 0.55, where it ends."""
        apart = known.prior.separation
        return 50 * float(np.log(apart / 0.55)) if 0 < apart <= 0.55 else -1e4

    search = Told(value)
    prior = scene_prior(separation=0.55, cluster_size=1.0)
    search.best = search.trial(Known(Gaussian(0.5), prior=prior))
    mean, std = search.averaged("separation")
    assert np.log(mean / 0.55) == pytest.approx(-1 / 50, rel=0.1)
    assert std == pytest.approx(mean / 50, rel=0.1)
    assert search.best.known.prior.separation == mean


def test_what_the_frames_do_not_tell_has_no_error() -> None:
    search = Told(lambda known: 0.0)
    prior = scene_prior(separation=0.5, cluster_size=1.0)
    search.best = search.trial(Known(Gaussian(0.5), prior=prior))
    assert search.averaged("separation") == (0.5, np.inf)
