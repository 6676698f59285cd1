"""PSF fit: the parameters of a PSF are recovered to their stated errors."""

from functools import partial

import jax
import numpy as np
import pytest

from dscsnet_jax.estimation import psf_fit
from dscsnet_jax.estimation.solve import sampled_windows, selected
from dscsnet_jax.estimation.windows import flat
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import Observation, observe
from dscsnet_jax.inference.prior import ScenePrior, preset_prior
from dscsnet_jax.physics import scene
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.psf_coordinates import coordinates
from dscsnet_jax.physics.psf_gaussians import GaussianMixture, Moffat, rotated_gaussian
from dscsnet_jax.physics.targets import Targets, from_lists

pytestmark = pytest.mark.slow

NOISY = scene.get_preset("csist_noise")
FRAMES, NOISE = 32, 5.0
TRUE = np.array([0.47, 0.53], np.float32)
KNOWN = Known(psf=Gaussian(TRUE), prior=preset_prior(NOISY))

jit_simulate = jax.jit(scene.simulate, static_argnums=0)
jit_observe = jax.jit(partial(observe, sensor=Sensor(read_noise=NOISE, background=0.0)))


@pytest.fixture(scope="module")
def noisy() -> tuple[Observation, Targets]:
    """Frames of clusters whose PSF is wider in cols than in rows."""
    truth = jit_simulate(NOISY, scene.frame_keys(9, "val", np.arange(FRAMES))).targets
    clean = np.asarray(jax.jit(partial(render, frame_size=11, psf=TRUE))(truth))
    noise = np.random.default_rng(0).normal(0, NOISE, clean.shape)
    seen = jit_observe(np.float32(clean + noise))
    return jax.tree.map(np.asarray, (seen, truth))


def assert_within(found: psf_fit.PsfFit, truth: dict[str, float], share: float) -> None:
    """Each parameter within its stated error, which is a small share of the parameter."""
    assert found.parameters.keys() == truth.keys()
    for name, (value, std) in found.parameters.items():
        assert abs(value - truth[name]) < 3.5 * std, name
        assert std < share * abs(truth[name]), name


def scores_at_the_end(seen: Observation, found: psf_fit.PsfFit) -> np.ndarray:
    """(FRAMES, 2) slopes of the frames' evidence by the logarithms of both widths."""
    told = found.known.for_windows()
    scores = [
        sampled_windows(w._replace(targets=s.fit.targets), told, seed=1, psf_slope=True).psf_slope
        for w, s in selected(seen, found.targets, told, compare=False)
    ]
    return np.concatenate(scores).astype(float)


def test_both_widths_are_recovered(noisy: tuple[Observation, Targets]) -> None:
    """Their errors are what scores of the frames say at the end."""
    seen, truth = noisy
    wrong = KNOWN.replace(psf=Gaussian(TRUE * np.float32(1.1)))
    found = psf_fit.fit_psf(seen, flat(truth), wrong)
    assert found.known.prior is KNOWN.prior
    assert_within(found, {"sigma[0]": 0.47, "sigma[1]": 0.53}, 0.02)
    right = np.bincount(found.targets.frame, minlength=FRAMES) == truth.mask.sum(1)
    assert right.mean() > 0.6
    scores = scores_at_the_end(seen, found)
    assert scores.shape == (FRAMES, 2)
    values, std = np.array(list(found.parameters.values())).T
    expected = np.sqrt(np.diag(np.linalg.inv(scores.T @ scores)))
    np.testing.assert_allclose(std, values * expected, rtol=0.2)
    # The slope of the evidence is zero there.
    assert (np.abs(scores.sum(0)) < 1.5 * np.sqrt((scores**2).sum(0))).all()


def test_one_width_told_is_one_width_fitted(noisy: tuple[Observation, Targets]) -> None:
    """Both axes share it; its error is what scores of the frames say at the end."""
    seen, truth = noisy
    wrong = KNOWN.replace(psf=Gaussian(np.float32(0.58)))
    found = psf_fit.fit_psf(seen, flat(truth), wrong)
    ((value, std),) = found.parameters.values()
    assert 0.48 < value < 0.52
    assert np.shape(found.known.psf.sigma) == ()
    scores = scores_at_the_end(seen, found).sum(1)
    assert scores.shape == (FRAMES,)
    assert std == pytest.approx(value / np.sqrt((scores**2).sum()), rel=0.15)
    assert abs(scores.sum()) < 1.5 * value / std  # the slope of the evidence is zero there


PSFS = {
    "rotated": (rotated_gaussian((0.45, 0.6), 30.0), rotated_gaussian((0.5, 0.58), 20.0)),
    "moffat": (Moffat(1.18, 2.5), Moffat(1.1, 3.0)),
    "mixture": (
        GaussianMixture(np.array([0.8, 0.2]), np.array([0.45, 1.0])),
        GaussianMixture(np.array([0.7, 0.3]), np.array([0.5, 0.9])),
    ),
}


@pytest.mark.parametrize("name", PSFS)
def test_all_parameters_of_other_psfs_are_recovered(name: str) -> None:
    true, guess = PSFS[name]
    singles = scene.get_preset("csist_float", read_noise=1.0, max_targets=2)
    keys = scene.frame_keys(4, "val", np.arange(48))
    made = jax.device_get(jax.jit(partial(scene.simulate, singles))(keys, psf=true))
    sensor = Sensor(read_noise=1.0, pedestal=0.0, background=0.0)
    seen = jax.jit(partial(observe, sensor=sensor))(made.frames)
    known = Known(psf=guess, prior=preset_prior(singles))
    known = jax.tree.map(lambda a: np.asarray(a, np.float32), known.replace(prior=ScenePrior()))
    known = known.replace(prior=preset_prior(singles))
    found = psf_fit.fit_psf(seen, flat(made.targets), known)
    free = coordinates(true)
    expected = {n: v for n, (v, _) in free.errors(np.eye(len(free.names))).items()}
    for parameter, (value, std) in found.parameters.items():
        assert np.isfinite(std), parameter
        assert abs(value - expected[parameter]) < 3.5 * std, parameter


def test_without_targets_there_is_nothing_to_fit(noisy: tuple[Observation, Targets]) -> None:
    blank = noisy[0].replace(counts=np.zeros_like(noisy[0].counts))
    with pytest.raises(ValueError, match="without targets"):
        psf_fit.fit_psf(blank, flat(from_lists([[]] * FRAMES, 5)), KNOWN)
