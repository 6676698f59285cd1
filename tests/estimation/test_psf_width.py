"""PSF width: one factor for rows and cols is recovered to its standard error."""

from functools import partial

import jax
import numpy as np
import pytest

from dscsnet_jax.estimation.psf_width import fit_width
from dscsnet_jax.estimation.solve import sampled_windows, selected
from dscsnet_jax.estimation.windows import flat
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import Observation, observe
from dscsnet_jax.inference.prior import preset_prior
from dscsnet_jax.physics import scene
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian
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


def test_width_of_the_psf_is_recovered(noisy: tuple[Observation, Targets]) -> None:
    seen, truth = noisy
    wrong = KNOWN.replace(psf=Gaussian(TRUE * np.float32(1.1)))
    found, targets = fit_width(seen, flat(truth), wrong)
    assert found.psf.width.shape == (2,)
    assert found.prior is KNOWN.prior
    factor = np.asarray(found.psf.width, float) / TRUE
    np.testing.assert_allclose(factor[0], factor[1], rtol=1e-5)
    # The scores of the frames by the width, at its estimate, tell its standard error.
    widest = float(wrong.psf.width.max() * np.exp(0.4))
    parts = selected(seen, targets, found, compare=False, widest=widest)
    scores = np.concatenate(
        [
            sampled_windows(
                w._replace(targets=s.fit.targets), found, seed=0, width_slope=True
            ).width_slope
            for w, s in parts
        ]
    ).astype(float)
    assert len(scores) == FRAMES
    error = 1 / np.sqrt((scores**2).sum())
    assert error < 0.02, "a fifth of what was wrong"
    assert np.abs(np.log(factor)).max() < 3 * error
    # Where the slope of the evidence is zero, within what the chains tell of it.
    assert abs(scores.sum()) < 1 / error
    right = np.bincount(targets.frame, minlength=FRAMES) == truth.mask.sum(1)
    assert right.mean() > 0.6


def test_a_width_without_targets_is_refused(noisy: tuple[Observation, Targets]) -> None:
    blank = noisy[0].replace(counts=np.zeros_like(noisy[0].counts))
    with pytest.raises(ValueError, match="without targets"):
        fit_width(blank, flat(from_lists([[]] * FRAMES, 5)), KNOWN)
